"""Files that a crash leaves complete, the old one or the new one; locks, encodings, checksums."""
import contextlib
import hashlib
import os
import time
from pathlib import Path

from onecard.settings import UserError

DATA = Path("data")                     # where datasets lie
LOCKS = {}                              # {folder: handle}, of this process


@contextlib.contextmanager
def written_beside(path):
    """Write the file at the path that this yields; then it takes the place of `path`.

        with written_beside("a.txt") as beside:
            beside.write_text("new")

    If the block raises, the new file is removed and `path` stays as it was.
    """
    path = Path(path)
    beside = path.with_name(path.name + ".onecard-new")
    # a killed process may have left it, perhaps as a hard link to a file that must stay
    beside.unlink(missing_ok=True)
    try:
        yield beside
        replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def replace(beside, path):
    """Rename the finished file `beside` to `path`, after it has reached the disk."""
    with open(beside, "rb+") as f:      # Windows needs the +
        os.fsync(f.fileno())
    for wait_seconds in (0.1, 0.5, 2.0, None):
        try:
            os.replace(beside, path)
            break
        except PermissionError:         # Windows, while a virus scanner has the file open
            if wait_seconds is None:
                raise
            time.sleep(wait_seconds)
    if os.name == "posix":              # the new name must reach the disk, too
        folder = os.open(Path(path).parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def write_text(path, text):
    """Write `text` to `path`, atomically."""
    with written_beside(path) as beside:
        beside.write_text(text, encoding="utf-8")


def lock(folder, what):
    """Lock a folder for this process, until unlock() or until it ends. `what` is for the message.

    A second process that locks it gets a UserError. It can still read what is in the folder.
    """
    folder = Path(folder).resolve()
    if os.name != "posix":              # no such lock, but nobody can replace a file that is open
        return
    if folder in LOCKS and os.path.samestat(os.fstat(LOCKS[folder]), os.stat(folder)):
        return
    unlock(folder)                      # the folder was moved away, and this is a new one
    import fcntl
    LOCKS[folder] = os.open(folder, os.O_RDONLY)        # closed in other programs
    try:
        fcntl.flock(LOCKS[folder], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        unlock(folder)
        raise UserError(f"another process is {what} in {folder}; wait until it ends, or use "
                        "another folder") from None
    except OSError:                     # some network disks have no locks
        unlock(folder)


def unlock(folder):
    """Give back what lock() took in this process."""
    handle = LOCKS.pop(Path(folder).resolve(), None)
    if handle is not None:
        os.close(handle)


def text_encoding(first_bytes):
    """The name of a text's encoding by its byte order mark: UTF-16, else UTF-8."""
    if first_bytes[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16"
    return "utf-8-sig"                  # without the mark, if it has one


def sha256(path):
    """The SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
