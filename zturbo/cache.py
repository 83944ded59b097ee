"""Latents and text features on the disk, shared by all runs: computed once, found by what they were made from.

One safetensors file a tensor, named after a hash of everything that changes it, with a checksum of its content.
Files are written beside and renamed, so two runs may share the folder; a damaged file is made again.

A run needs all of its tensors at its start and reads each when a step asks for it: of many pictures only the names are
looked up. The first ones are read at once, so that with few pictures everything is known to be whole.
"""

import contextlib
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from . import files
from .errors import CacheError

log = logging.getLogger("zturbo")
T = TypeVar("T")
TENSOR, SUFFIX = "tensor", ".safetensors"
KEPT, DAY = 60, 86400  # days, and seconds of one
AT_ONCE = 1000  # entries that are read when a run begins
ROOM = 2**30  # bytes of entries that stay in memory
GONE = (
    "The entry {name} of the cache of pictures and captions was damaged or deleted while it was used. "
    "Queue again: it is made anew, and the run goes on from where it is."
)
NOT_WRITTEN = "The cache %s cannot be written (%s); it will be made anew in the next run."


class Cache:
    """`get` finds or makes. `need` does it for what is read later. Without a folder everything is made anew."""

    def __init__(self, folder: Path | None):
        self.folder = folder
        self.found = self.made = 0
        self.held: dict[str, torch.Tensor] = {}  # by key: in memory, up to ROOM bytes, and what is not on the disk
        self.room = ROOM
        self.total: int | None = None  # bytes in the folder, when it was tidied

    @cached_property
    def there(self) -> dict[str, os.stat_result]:
        """Key -> facts of the files in the folder, when they were first asked for."""
        return {name.removesuffix(SUFFIX): facts for name, facts in self._files() if name.endswith(SUFFIX)}

    def _files(self) -> Iterator[tuple[str, os.stat_result]]:
        """(name, facts) of what is in the folder now; another run may be at it."""
        try:
            with os.scandir(self.folder) if self.folder is not None else contextlib.nullcontext(()) as scanned:
                for entry in scanned:
                    with contextlib.suppress(OSError):
                        yield entry.name, entry.stat()
        except OSError:
            return

    def need(self, parts: tuple, make: Callable[[], torch.Tensor]) -> str:
        """The key by which `read` gives the tensor from now on. It is made here where it is not there."""
        name = key(parts)
        if name in self.held:
            return name
        if name not in self.there or len(self.held) < AT_ONCE and self.room > 0:
            self._hold(name, self.get(parts, make))
        else:
            self.found += 1
            if time.time() - self.there[name].st_mtime > DAY:
                _touch(self._path(name))
        return name

    def read(self, name: str) -> torch.Tensor:
        """The tensor of a key that `need` gave. Raises CacheError where its file was damaged or deleted since."""
        if name in self.held:
            return self.held[name]
        tensor = read(self._path(name))
        if tensor is None:
            with contextlib.suppress(OSError):
                self._path(name).unlink()
            raise CacheError(GONE.format(name=name))
        self._hold(name, tensor)
        return tensor

    def size_of(self, name: str) -> int:
        """Bytes of the tensor of a key, about: its file's, or its own where it is in memory."""
        if name in self.held:
            return self.held[name].nbytes
        facts = self.there.get(name)  # one that was made since is asked for itself
        return facts.st_size if facts else self._path(name).stat().st_size

    def _hold(self, name: str, tensor: torch.Tensor):
        if self.room > 0 or not self._path(name).is_file():
            self.held[name] = tensor
            self.room -= tensor.nbytes

    def _path(self, name: str) -> Path:
        return Path() if self.folder is None else self.folder / f"{name}{SUFFIX}"

    def get(self, parts: tuple, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The tensor that `make` gives, on the CPU.

        parts: everything that changes it: strings, numbers, tuples, bytes.
        """
        path = None if self.folder is None else self._path(key(parts))
        kept = None if path is None else read(path)
        if path is not None and kept is not None:
            self.found += 1
            _touch(path)
            return kept
        made = make().detach().cpu().contiguous().clone()
        self.made += 1
        if path is not None:
            self._keep(path, made)
        return made

    def _keep(self, path: Path, made: torch.Tensor):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            content = save({TENSOR: made}, {"sha256": checksum(made)})
            files.write(path, content, own=f".{os.getpid()}.{threading.get_ident()}")
        except OSError as error:
            log.warning(NOT_WRITTEN, path.parent, error.strerror)

    def tidy(self):
        """Delete what no run has used for `KEPT` days, and what a crash left half written.

        What remains is summed up for the report.
        """
        now, self.total = time.time(), 0
        for name, facts in self._files():
            if now - facts.st_mtime > DAY * (1 if name.endswith(".part") else KEPT):
                with contextlib.suppress(OSError):
                    os.unlink(f"{self.folder}/{name}")
            else:
                self.total += facts.st_size

    def report(self) -> str:
        """What was found and made, and how much room the folder takes."""
        if self.folder is None:
            return f"No cache: {self.made} latents and texts were encoded."
        total = self.size() if self.total is None else self.total
        room = f"{self.folder.name} holds {total / 1e6:,.1f} MB"
        return f"Cache: {self.found} latents and texts found, {self.made} encoded; {room}."

    def size(self) -> int:
        """Bytes of all files in the folder."""
        return sum(facts.st_size for _, facts in self._files())


class Lazy(Sequence[T]):
    """Things that are made each time they are asked for, by their number."""

    def __init__(self, length: int, make: Callable[[int], T]):
        self.length, self.make = length, make

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number):
        if isinstance(number, slice):
            return [self[n] for n in range(*number.indices(self.length))]
        if not -self.length <= number < self.length:
            raise IndexError(number)
        return self.make(number % self.length)


def _touch(path: Path):
    """It was used today."""
    with contextlib.suppress(OSError):
        os.utime(path)


def key(parts: tuple) -> str:
    digest = hashlib.sha256()
    for part in parts:
        content = part if isinstance(part, bytes) else repr(part).encode()
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()[:40]


def checksum(tensor: torch.Tensor) -> str:
    head = repr((tuple(tensor.shape), str(tensor.dtype))).encode()
    return hashlib.sha256(head + tensor.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def read(path: Path) -> torch.Tensor | None:
    """The tensor of a whole entry, or None: absent, damaged, or something else."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as opened:
            tensor, facts = opened.get_tensor(TENSOR), opened.metadata() or {}
        reason = "" if facts.get("sha256") == checksum(tensor) else "its checksum is another"
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError) as error:
        reason = str(error)
    if reason:
        log.warning("The cache entry %s is damaged (%s); it is made anew.", path.name, reason)
        return None
    return tensor
