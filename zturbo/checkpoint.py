"""A checkpoint: all that a run has learnt, as one file. Tensors in safetensors, the rest as JSON in its header.

`state` says what goes in; the hook `Saving` and the end of a run have it written, through `Session.save` and
`RunFolder.save_checkpoint`, which also forgets old ones.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from . import files, tensorfile
from .errors import CheckpointError

FORMAT = "1"


@dataclass(frozen=True)
class Copy:
    """A state in main memory, as it goes into a file."""

    tensors: dict[str, torch.Tensor]
    facts: dict[str, str]

    @property
    def step(self) -> int:
        return len(self.tensors["losses"])

    def pieces(self) -> Iterator[bytes | memoryview]:
        """Of the file."""
        return tensorfile.pieces(self.tensors, {**self.facts, "sha256": _sha256(self.tensors, self.facts)})


def write(path: Path, copy: Copy):
    """Write, and read back: when this returns, the file is whole. Raises CheckpointError."""
    written = hashlib.sha256()

    def passing() -> Iterator[bytes | memoryview]:
        for piece in copy.pieces():
            written.update(piece)
            yield piece

    try:
        files.write(path, passing())
        if files.sha256(path) != written.hexdigest():
            path.unlink()
            raise CheckpointError(f"The checkpoint {path} does not read back as it was written. Check the disk.")
    except OSError as error:
        raise CheckpointError(
            f"The checkpoint {path} cannot be written: {error.strerror}. {files.advice(error)}"
        ) from error


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and facts of a checkpoint file. Raises CheckpointError for what is not a whole one."""
    try:
        content = path.read_bytes()
        tensors = load(content)
        facts = tensorfile.header(content).get("__metadata__") or {}
    except (OSError, SafetensorError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"The checkpoint {path.name} cannot be read ({error}).") from error
    if (
        facts.get("format") != FORMAT
        or not {"optimizer", "seconds", "setbacks", "restoring", "since"} <= facts.keys()
        or "losses" not in tensors
    ):
        raise CheckpointError(f"{path.name} is not a checkpoint of this version.")
    if facts.pop("sha256", None) != _sha256(tensors, facts):
        raise CheckpointError(f"The checkpoint {path.name} is damaged: its checksum is another.")
    return tensors, facts


def _sha256(tensors: dict[str, torch.Tensor], facts: dict[str, str]) -> str:
    total = hashlib.sha256(repr(sorted(facts.items())).encode())
    for key, tensor in sorted(tensors.items()):
        total.update(repr((key, tuple(tensor.shape), str(tensor.dtype))).encode())
        total.update(tensorfile.raw(tensor))
    return total.hexdigest()
