"""Writing so that a file is never half there: beside, flushed to the disk, renamed."""

import contextlib
import errno
import hashlib
import os
import time
from collections.abc import Iterable
from pathlib import Path


def write(path: Path, content: bytes | Iterable[bytes | memoryview], own: str = ""):
    """Replace `path` by a file of this content, whole or in pieces.

    An older one stays whole until the new one is. Raises OSError. own: a word that no other writer of the same file
    has, where there may be several at once.
    """
    beside = path.with_name(path.name + own + ".part")
    try:
        if beside.is_symlink():
            beside.unlink()
        with open(beside, "wb", opener=_unfollowed) as file:
            for piece in [content] if isinstance(content, bytes) else content:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        replace(beside, path)
    except OSError:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise
    flush_folder(path.parent)


def sha256(path: Path) -> str:
    """Of a file, read in pieces. Raises OSError."""
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(2**20):
            total.update(piece)
    return total.hexdigest()


def replace(beside: Path, path: Path):
    """Rename. On Windows a virus scanner or a reader may hold the file for a moment: that is waited for."""
    for pause in (0.1, 0.3, 1.0):
        try:
            return os.replace(beside, path)
        except PermissionError:
            time.sleep(pause)
    os.replace(beside, path)


def _unfollowed(path: str, flags: int) -> int:
    """Open what stands here, never what a link leads to."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def flush_folder(folder: Path):
    """Make renames in a folder survive a power cut, where the system can.

    Windows cannot, nor can every network drive.
    """
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def advice(error: OSError) -> str:
    """What a person can do about a file that could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "Free some room."
    if isinstance(error, PermissionError):
        return "Close what has it open, or make the folder writable."
    return "Check the disk and the folder."
