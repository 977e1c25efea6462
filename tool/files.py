"""Writing files whole or not at all, digests, and why a file could not be read."""
import contextlib
import hashlib
import os
import secrets

from tool.cli import BadInput, CannotWrite, is_out_of_memory


@contextlib.contextmanager
def atomic_write(path):
    """Opens a temporary binary file beside `path`, and renames it to `path` when the block ends without an error.

    A run that is killed, or an error in the block, leaves `path` unchanged. Raises CannotWrite, a BadInput, if the disk
    is full or the folder read-only.
    """
    folder, name = os.path.split(os.path.abspath(path))
    # a name of 255 bytes, the most that file systems allow, has no room for more
    temporary = os.path.join(folder, f'.{name[:20]}.{secrets.token_hex(4)}')
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


def set_aside(path):
    """Renames a file or folder of an earlier run, which a later --resume would take for its own, to NAME_earlier.
    Returns the new path; does nothing if there is no such file. Replaces a file of that name, and raises BadInput if
    there is a folder of that name, which may hold the work of days."""
    stem, extension = os.path.splitext(os.path.normpath(path))
    earlier = f'{stem}_earlier{extension}'
    if os.path.isdir(path) and os.path.exists(earlier):
        raise BadInput(f'{path} and {earlier} are results of earlier runs: remove one, or go on with --resume')
    if os.path.exists(path):
        os.replace(os.path.normpath(path), earlier)
    return earlier


def file_digest(path):
    """Returns a digest of a file's content, eight bytes of blake2b as hex."""
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).hexdigest()


def describe(error):
    """Returns one printable line on why a file could not be read. error: the exception."""
    if is_out_of_memory(error):
        return 'out of memory'
    if isinstance(error, (LookupError, TypeError, AttributeError)):
        return f'it is damaged ({type(error).__name__})'
    text = ' '.join(str(getattr(error, 'strerror', None) or error).split())[:400] or type(error).__name__
    return ''.join(character if character.isprintable() else '?' for character in text)
