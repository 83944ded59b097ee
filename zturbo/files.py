"""Writing so that a file is never half there: beside, flushed to the disk, renamed."""

import contextlib
import os
from pathlib import Path


def write(path: Path, content: bytes, own: str = ""):
    """Replace `path` by a file of this content. An older one stays whole until the new one is. Raises OSError.

    own: a word that no other writer of the same file has, where there may be several at once.
    """
    beside = path.with_name(path.name + own + ".part")
    try:
        if beside.is_symlink():
            beside.unlink()
        with open(beside, "wb", opener=_unfollowed) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise
    flush_folder(path.parent)


def _unfollowed(path: str, flags: int) -> int:
    """Open what stands here, never what a link leads to."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def flush_folder(folder: Path):
    """Make renames in a folder survive a power cut, where the system can (not on Windows)."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
