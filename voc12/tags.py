"""Image-level tags that the classifier predicts: their thresholds and tables."""
import os

import numpy as np

from tool.cli import BadInput
from tool.image_lists import read_lines
from tool.metrics import best_tag_threshold
from tool.text_files import write_csv
from voc12.lists import clean_class_name, join_first


def parse_threshold(text, what):
    """Returns a text as a probability from 0 to 1. what: the text and its source, for the message. Raises BadInput."""
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value <= 1:
        raise BadInput(f'{what} is not a probability from 0 to 1')
    return value


def load_tag_thresholds(text, class_names):
    """Reads the --tag_threshold flag: returns a float for all classes or, if it names a file with a line
    CLASS,THRESHOLD for each class, a list in the order of the classes. Raises BadInput."""
    if not os.path.isfile(text):
        return parse_threshold(text, f'--tag_threshold {text} is not a file, and')
    rows = [line.rpartition(',') for line in read_lines(text, '--tag_threshold') if line.strip()]
    names = [clean_class_name(name) for name, _, _ in rows]
    wrong = {name for name in names if names.count(name) > 1} | set(names) ^ set(class_names)
    if wrong:
        raise BadInput(f'{text} (--tag_threshold) needs one line CLASS,THRESHOLD for each class of --class_names; '
                       f'these are missing, unknown or there twice: {join_first(sorted(wrong))}')
    values = {name: parse_threshold(value, f'{text} (--tag_threshold): {value.strip()!r}, of {name},')
              for name, (_, _, value) in zip(names, rows)}
    return [values[name] for name in class_names]


def write_tag_tables(folder, names, paths, class_names, thresholds, labels):
    """Writes tables of the classifier's predictions for the finished images, and prints a summary.

    probabilities.csv has the probability of every class. With `thresholds` (see `load_tag_thresholds`), tags.csv has
    the classes above them, in the form that make_custom.py reads. Without `thresholds`, the tags are known from
    `labels`, dict name -> (C,) multi-hot, and a line suggests the threshold that predicts them best.
    folder: ResultFolder of the probabilities, NAME.npy, float32 (C,). names: of the images. paths: dict name -> name of
    the image in the tables.
    """
    finished = folder.finished()
    names = [name for name in dict.fromkeys(names) if name in finished]
    if not names:
        return
    probability = np.stack([np.load(folder.file(name)) for name in names])          # (N, C)
    write_csv(os.path.join(folder.path, 'probabilities.csv'), ['image', *class_names],
              [[paths[name], *(f'{value:.4f}' for value in row)] for name, row in zip(names, probability)])
    if thresholds is None:
        best, precision, recall, f1 = best_tag_threshold(probability, np.stack([labels[name] for name in names]))
        print(f'tags: --tag_threshold {best} predicts the known tags of these {len(names):,} images best: precision '
              f'{precision:.1f}%, recall {recall:.1f}%, F1 {f1:.1f}%. On images that the network was trained on, these '
              'numbers are better than on new ones')
        return
    taken = probability > thresholds                                                # (N, C)
    write_csv(os.path.join(folder.path, 'tags.csv'), ['image', 'class'],
              [[paths[name], ';'.join(np.array(class_names)[row])] for name, row in zip(names, taken)])
    counts = [f'{name} {count}' for name, count in zip(class_names, taken.sum(axis=0)) if count]
    print(f'tags: {", ".join(counts) or "none"}, of {len(names):,} images, in {os.path.join(folder.path, "tags.csv")}')
    empty = [name for name, row in zip(names, taken) if not row.any()]
    if empty:
        print(f'tags: in {len(empty):,} of {len(names):,} images no class is above --tag_threshold, so their CAM files '
              f'are empty: {join_first(empty)}')
