"""Latents and text features on the disk, shared by all runs: computed once, found by what they were made from.

One safetensors file a tensor, named after a hash of everything that changes it, with a checksum of its content.
Files are written beside and renamed, so two runs may share the folder; a damaged file is made again.
"""

import contextlib
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from . import files

log = logging.getLogger("zturbo")
TENSOR = "tensor"
KEPT = 60  # days
NOT_WRITTEN = "The cache %s cannot be written (%s); it will be made anew in the next run."


class Cache:
    """`get` finds or makes. Without a folder everything is made anew."""

    def __init__(self, folder: Path | None):
        self.folder = folder
        self.found = self.made = 0

    def get(self, parts: tuple, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The tensor that `make` gives, on the CPU.

        parts: everything that changes it: strings, numbers, tuples, bytes.
        """
        path = None if self.folder is None else self.folder / f"{key(parts)}.safetensors"
        kept = None if path is None else read(path)
        if path is not None and kept is not None:
            self.found += 1
            with contextlib.suppress(OSError):
                os.utime(path)  # used today
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
        """Delete what no run has used for `KEPT` days, and what a crash left half written."""
        for path in self.folder.iterdir() if self.folder is not None and self.folder.is_dir() else ():
            with contextlib.suppress(OSError):
                days = (time.time() - path.stat().st_mtime) / 86400
                if days > (1 if path.suffix == ".part" else KEPT):
                    path.unlink()

    def report(self) -> str:
        """What was found and made, and how much room the folder takes."""
        if self.folder is None:
            return f"No cache: {self.made} latents and texts were encoded."
        room = f"{self.folder.name} holds {self.size() / 1e6:,.1f} MB"
        return f"Cache: {self.found} latents and texts found, {self.made} encoded; {room}."

    def size(self) -> int:
        """Bytes of all files in the folder."""
        total = 0
        for path in self.folder.glob("*.safetensors") if self.folder is not None else ():
            with contextlib.suppress(OSError):  # another run may be at it
                total += path.stat().st_size
        return total


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
