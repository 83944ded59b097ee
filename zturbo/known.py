"""What was read out of pictures, masks and captions, kept on the disk: of a file that has not changed it is known.

A JSON file for each folder of pictures. A file is the same while its size and its times are: when its content changed,
and when anything about it did, which no program can set (on Windows the second is when it was made).
"""

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from . import files

FORM = 1  # a higher one where what is kept means something else
FRESH = 3e9  # nanoseconds: a file this young may change again within one tick of its times, and is not kept
T = TypeVar("T", bool, str, list)
Stamp = list[int]


class Known:
    """`get` finds or reads. Without a cache folder everything is read anew."""

    def __init__(self, cache: Path | None, folder: Path):
        name = hashlib.sha256(os.path.realpath(folder).encode(errors="surrogatepass")).hexdigest()[:40]
        self.file = None if cache is None else cache / f"{name}.files.json"
        self.before = _load(self.file)
        # path -> (its stamp, what is known of it by name); what is gone is forgotten
        self.now: dict[str, tuple[Stamp, dict]] = {}
        self.read = 0

    def get(self, path: Path, what: str, read: Callable[[], T]) -> T:
        """What `read` gives of a file: a truth, a text or a list. what: its name. Raises what `read` does.

        A file that cannot be asked for its times is read each time.
        """
        facts = self._facts(str(path))
        if what not in facts:
            self.read += 1
            facts[what] = read()
        return facts[what]

    def sha256(self, path: Path) -> str:
        """Of a file's content. Raises OSError."""
        return self.get(path, "sha256", lambda: files.sha256(path))

    def _facts(self, path: str) -> dict:
        if path in self.now:
            return self.now[path][1]
        try:
            found = os.stat(path)
        except (OSError, ValueError):
            return {}
        stamp = [found.st_size, found.st_mtime_ns, found.st_ctime_ns]
        then, facts = self.before.get(path, ([], {}))
        self.now[path] = stamp, (facts if then == stamp else {})
        return self.now[path][1]

    def save(self):
        """Keep what is known of files that are not too young. Without room on the disk it is read again next time."""
        if self.file is None:
            return
        young = time.time_ns() - FRESH
        kept = {path: entry for path, entry in self.now.items() if entry[1] and max(entry[0][1:]) < young}
        if not self.read and len(kept) == len(self.before):
            with contextlib.suppress(OSError):
                os.utime(self.file)  # used today
            return
        content = json.dumps(kept).encode()
        with contextlib.suppress(OSError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            files.write(self.file, _head(content) + content, own=f".{os.getpid()}.{threading.get_ident()}")


def _head(content: bytes) -> bytes:
    return f"{FORM} {hashlib.sha256(content).hexdigest()}\n".encode()


def _load(file: Path | None) -> dict[str, tuple[Stamp, dict]]:
    """Nothing where there is no file, or one that is damaged."""
    if file is None:
        return {}
    try:
        head, _, content = file.read_bytes().partition(b"\n")
    except OSError:
        return {}
    return json.loads(content) if head + b"\n" == _head(content) else {}
