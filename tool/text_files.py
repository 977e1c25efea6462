"""Reads and writes text and CSV files in utf-8."""
import csv
import io

from tool.files import atomic_write


def write_text(path, text):
    with atomic_write(path) as file:
        file.write(text.encode('utf-8', 'backslashreplace'))       # file names may not be utf-8


def write_csv(path, header, rows):
    text = io.StringIO()
    csv.writer(text, lineterminator='\n').writerows([header, *rows])
    write_text(path, text.getvalue())


def read_csv(path):
    """Returns a list of dicts, one per row, of a CSV file with a header."""
    with open(path, encoding='utf-8', newline='') as file:
        return list(csv.DictReader(file))
