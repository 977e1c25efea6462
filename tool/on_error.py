"""What a run does about errors at single images: the --on_error flag, and errors that stop nothing."""
import contextlib
import os

from tqdm import tqdm

from tool.cli import BadInput, CannotWrite, is_out_of_memory


class Errors:
    """What `--on_error` does with a bad image, and with one for which memory runs out: stop raises a BadInput, skip
    keeps it for the end. memory_help: what the user may change where memory runs out."""

    def __init__(self, on_error, memory_help):
        self.skip, self.memory_help, self.lines = on_error == 'skip', memory_help, []

    @contextlib.contextmanager
    def caught(self, name):
        """The context in which the image `name` is worked on. A disk that is full stops the run in any case."""
        try:
            yield
        except CannotWrite:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                error = BadInput(f'out of memory at the image {name}; what helps: {self.memory_help}')
            if not (self.skip and isinstance(error, BadInput)):
                raise error
            self.lines.append(str(error))

    def pop(self):
        """Returns the list of what was skipped, and starts over."""
        lines, self.lines = self.lines, []
        return lines

    def report(self):
        """Lists what was skipped. Returns the exit code: 3 where something was, else 0; also for a rank of torchrun,
        which would stop the other ranks."""
        for line in self.lines:
            tqdm.write(f'skipped: {line}')
        return 3 if self.lines and 'WORLD_SIZE' not in os.environ else 0


@contextlib.contextmanager
def no_more_than_a_warning(what):
    """For pictures, which must not stop an inference: whatever goes wrong is one line."""
    try:
        yield
    except Exception as error:
        tqdm.write(f'warning: {what}: {" ".join(str(error).split()) or type(error).__name__}')
