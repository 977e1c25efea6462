"""Files that are written whole or not at all; why one could not be read."""
import contextlib
import hashlib
import os
import secrets

from tool.cli import CannotWrite, is_out_of_memory


@contextlib.contextmanager
def atomic_write(path):
    """Opens a temporary binary file beside `path` and renames it to `path` when the block ends well.

    A run that is killed, or an error in the block, leaves `path` as it was. Raises CannotWrite, a BadInput, where the
    disk is full or the folder is read-only.
    """
    folder, name = os.path.split(os.path.abspath(path))
    temporary = os.path.join(folder, f'.{name}.{secrets.token_hex(4)}')
    try:
        with open(temporary, 'xb') as file:
            yield file
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError):
            raise CannotWrite(f'cannot write {path}: {error.strerror}') from error
        raise


def file_digest(path):
    """Eight bytes of a file's blake2b, as hex: tells weight files of one name apart."""
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).hexdigest()


def describe(error):
    """One printable line on why a file could not be read."""
    if is_out_of_memory(error):
        return 'out of memory'
    if isinstance(error, (LookupError, TypeError, AttributeError)):
        return f'it is damaged ({type(error).__name__})'
    text = ' '.join(str(getattr(error, 'strerror', None) or error).split())[:400] or type(error).__name__
    return ''.join(character if character.isprintable() else '?' for character in text)
