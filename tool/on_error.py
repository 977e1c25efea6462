"""Errors at single images: the --on_error flag, and errors that must not stop a run."""
import contextlib
import os

from tqdm import tqdm

from tool.cli import BadInput, CannotWrite, is_out_of_memory


class Errors:
    """Handles a bad image, and one for which memory runs out, as the `--on_error` flag says: stop raises a BadInput,
    skip keeps its text for the end. memory_help: text on what the user may change if memory runs out. folders: the
    ResultFolders of the run; the outdated files of a skipped image are removed there, because the next step would take
    them for new ones."""

    def __init__(self, on_error, memory_help, folders=()):
        self.skip, self.memory_help, self.folders, self.lines = on_error == 'skip', memory_help, folders, []

    @contextlib.contextmanager
    def caught(self, name):
        """Context for the work on the image `name`. A full disk stops the run in any case."""
        try:
            yield
        except CannotWrite:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                error = BadInput(f'out of memory at the image {name}; what helps: {self.memory_help}')
            if not (self.skip and isinstance(error, BadInput)):
                raise error
            removed = [path for folder in self.folders if (path := folder.remove_outdated(name))]
            self.lines.append(str(error) + (f'; removed outdated: {", ".join(removed)}' if removed else ''))

    def pop(self):
        """Returns the errors of the skipped images, and starts over."""
        lines, self.lines = self.lines, []
        return lines

    def report(self):
        """Prints the errors of the skipped images. Returns the exit code: 3 if there are any, else 0. For ranks of
        torchrun it is always 0, because torchrun would stop the other ranks."""
        for line in self.lines:
            tqdm.write(f'skipped: {line}')
        return 3 if self.lines and 'WORLD_SIZE' not in os.environ else 0


@contextlib.contextmanager
def no_more_than_a_warning(what):
    """Context for pictures, which must not stop an inference: an error becomes one line. what: the line's subject."""
    try:
        yield
    except Exception as error:
        tqdm.write(f'warning: {what}: {" ".join(str(error).split()) or type(error).__name__}')
