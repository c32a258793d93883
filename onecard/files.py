"""How is a file written so that a crash leaves the old one or the new one, never half of one?"""
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
    # a killed process may have left it, perhaps as a second name of a file that must stay
    beside.unlink(missing_ok=True)
    try:
        yield beside
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    replace(beside, path)


def replace(beside, path):
    """Rename the finished file `beside` to `path`, after it has reached the disk."""
    with open(beside, "rb+") as f:
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
    """Keep other processes from `what` in this folder until this one ends, even by a kill.

    The second process gets a UserError. It can still read what is in the folder.
    """
    folder = Path(folder).resolve()
    if os.name != "posix":              # Windows does not replace a file that is in use
        return
    if folder in LOCKS and os.path.samestat(os.fstat(LOCKS[folder]), os.stat(folder)):
        return
    unlock(folder)                      # of a folder that was moved away: this is another one
    import fcntl
    LOCKS[folder] = os.open(folder, os.O_RDONLY)        # other programs do not inherit it
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
    """The name of a text's encoding: UTF-16 or 32 if it begins with that mark, else UTF-8."""
    if first_bytes[:4] in (b"\xff\xfe\0\0", b"\0\0\xfe\xff"):
        return "utf-32"
    if first_bytes[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16"
    return "utf-8-sig"                  # without the mark that some programs write


def sha256(path):
    """The SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
