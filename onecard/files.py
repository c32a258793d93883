"""How is a file written so that a crash leaves the old one or the new one, never half of one?"""
import contextlib
import hashlib
import os
import time
from pathlib import Path


@contextlib.contextmanager
def written_beside(path):
    """Write the file at the path that this yields; then it takes the place of `path`.

        with written_beside("a.txt") as beside:
            beside.write_text("new")

    If the block raises, the new file is removed and `path` stays as it was.
    """
    path = Path(path)
    beside = path.with_name(path.name + ".new")
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


def sha256(path):
    """The SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
