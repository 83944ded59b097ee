"""All that a run has learnt, as one file: tensors in safetensors, the rest as JSON in its header.

A step is a function of (recipe, seed, step), so the trained weights, the optimizer's state and the losses so
far are everything that training needs to go on as if it had never stopped.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from . import files, lorafile, lowrank, optimizers, tensorfile
from .errors import CheckpointError
from .lowrank import Difference

FORMAT = "1"


@dataclass
class State:
    """A run after `len(losses)` steps. seconds: spent in steps."""

    lora: dict[str, Difference]
    optimizer: torch.optim.Optimizer
    # the LoRA's moving average, where the recipe asks for one
    average: dict[str, Difference] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    restoring: bool = False  # what the newest step taught: to restore turbo, or pictures
    since: int = 0  # the step before the first of those in a row that taught it
    setbacks: int = 0  # times that the run went back to a checkpoint with half the learning rate
    whole: bool = True  # False while the optimizer moves the weights

    @property
    def step(self) -> int:
        """Steps taken."""
        return len(self.losses)

    def shown(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """What is previewed, saved and handed on, as a LoRA file's tensors: the average where there is one, else what the optimizer gives out."""
        with self.as_shown():
            return lorafile.state_dict(self.lora, dtype)

    def as_shown(self) -> AbstractContextManager[None]:
        """While open, the LoRA that trains has the numbers that are previewed and saved; afterwards, to the bit, its own."""
        return optimizers.averaged(self.optimizer, lowrank.parameters(self.lora), lowrank.parameters(self.average))

    def parts(self) -> dict[str, torch.Tensor]:
        """The trained numbers of the LoRA and of its average, by their names in the file."""
        sets = {"lora": self.lora, "average": self.average}
        return {
            f"{kind}.{name}.{part}": tensor
            for kind, lora in sets.items()
            for name, one in lora.items()
            for part, tensor in one.tensors.items()
        }

    def copied(self) -> "Copy":
        """All of it, as it is now, in main memory: training may go on while this is written."""
        tensors = {"losses": torch.tensor(self.losses, dtype=torch.float64)}
        tensors |= self.parts()
        optimizer = _pack(self.optimizer.state_dict(), "optimizer", tensors)
        # 8-bit optimizers share tables
        tensors = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
        facts = {
            "format": FORMAT,
            "seconds": repr(self.seconds),
            "setbacks": str(self.setbacks),
            "restoring": str(int(self.restoring)),
            "since": str(self.since),
            "optimizer": json.dumps(optimizer),
            **self.kinds(),
        }
        return Copy(tensors, facts)

    def kinds(self) -> dict[str, str]:
        """What the numbers of a checkpoint mean nothing without."""
        return {
            "optimizer class": type(self.optimizer).__name__,
            "moving average": "yes" if self.average else "no",
            "scale": str(sorted({one.scale for one in self.lora.values()})),
        }

    def take(self, tensors: dict[str, torch.Tensor], facts: dict[str, str]):
        """Become the state that was saved. Raises CheckpointError, and stays as it is, when that is of another LoRA or optimizer."""
        for name, mine in self.kinds().items():
            if facts.get(name) != mine:
                raise CheckpointError(
                    f"The checkpoint is of another {name}: it has {facts.get(name)}, this run {mine}. Use the same settings, or start a new run."
                )
        parts = self.parts()
        saved = {key for key in tensors if key.startswith(("lora.", "average."))}
        wrong = [key for key in parts.keys() ^ saved] or [
            key for key in parts if (parts[key].shape, parts[key].dtype) != (tensors[key].shape, tensors[key].dtype)
        ]
        if wrong:
            raise CheckpointError(
                f"The checkpoint is of another LoRA: {len(wrong)} of {len(parts)} matrices differ (for example {wrong[0]}). Use the same rank and targets, or start a new run."
            )
        course = _course(tensors["losses"], facts)
        before = self.optimizer.state_dict()
        decay = [group.get("weight_decay") for group in self.optimizer.param_groups]
        try:
            saved_optimizer = _unpack(json.loads(facts["optimizer"]), tensors)
            _need_alike(saved_optimizer, before)
            self.optimizer.load_state_dict(saved_optimizer)
        except Exception as error:  # each optimizer has its own way to refuse
            self.optimizer.load_state_dict(before)
            raise CheckpointError(
                f"The checkpoint is of another optimizer ({type(error).__name__}: {error}). Use the same one, or start a new run."
            ) from error
        for group, value in zip(self.optimizer.param_groups, decay):
            if value is not None:
                group["weight_decay"] = value  # the recipe's, which may be another when a run is continued
        with torch.no_grad():
            for key, tensor in parts.items():
                tensor.copy_(tensors[key])
        self.losses, self.seconds, self.setbacks, self.restoring, self.since = course


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


def _course(losses: torch.Tensor, facts: dict[str, str]) -> tuple[list[float], float, int, bool, int]:
    """(losses, seconds, setbacks, restoring, since) so far. Raises CheckpointError for what no run can have."""
    try:
        seconds, setbacks, restoring, since = (
            float(facts["seconds"]),
            int(facts["setbacks"]),
            int(facts["restoring"]),
            int(facts["since"]),
        )
    except ValueError as error:
        raise CheckpointError(f"The checkpoint is no run's: {error}.") from error
    if (
        losses.ndim != 1
        or losses.dtype != torch.float64
        or not losses.isfinite().all()
        or not 0 <= seconds < float("inf")
        or setbacks < 0
        or restoring not in (0, 1)
        or not 0 <= since <= len(losses)
    ):
        raise CheckpointError("The checkpoint is no run's: its losses, seconds, setbacks or phase are no such numbers.")
    return losses.tolist(), seconds, setbacks, bool(restoring), since


def _need_alike(saved, mine: dict):
    """Raise ValueError unless an optimizer's saved state has the settings of mine and no parameters beyond mine."""
    if len(saved["param_groups"]) != len(mine["param_groups"]):
        raise ValueError("it has another number of groups")
    for theirs, own in zip(saved["param_groups"], mine["param_groups"]):
        different = [key for key, value in own.items() if key not in theirs or not _same_kind(theirs[key], value)]
        if different or theirs["params"] != own["params"]:
            raise ValueError(f"it differs in {', '.join(different) or 'its parameters'}")
    known = {number for group in mine["param_groups"] for number in group["params"]}
    if not saved["state"].keys() <= known or not all(isinstance(state, dict) for state in saved["state"].values()):
        raise ValueError("it has the state of other parameters")


def _same_kind(a, b) -> bool:
    """Are these two values of a setting of the same kind, and is a number without an end so in both?"""
    if isinstance(b, (tuple, list)):
        return isinstance(a, (tuple, list)) and len(a) == len(b) and all(map(_same_kind, a, b))
    if isinstance(b, (int, float)) and not isinstance(b, bool):
        return isinstance(a, torch.Tensor) or (
            isinstance(a, (int, float)) and not isinstance(a, bool) and (abs(a) < float("inf") or a == b)
        )
    return b is None or a is None or type(a) is type(b)


def _sha256(tensors: dict[str, torch.Tensor], facts: dict[str, str]) -> str:
    total = hashlib.sha256(repr(sorted(facts.items())).encode())
    for key, tensor in sorted(tensors.items()):
        total.update(repr((key, tuple(tensor.shape), str(tensor.dtype))).encode())
        total.update(tensorfile.raw(tensor))
    return total.hexdigest()


def _pack(value, name: str, tensors: dict[str, torch.Tensor]):
    """Nested state as JSON; each tensor moves to `tensors`, and its name stays behind."""
    if isinstance(value, torch.Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, _pack(item, f"{name}.{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return {
            "list": [_pack(item, f"{name}.{number}", tensors) for number, item in enumerate(value)],
            "tuple": isinstance(value, tuple),
        }
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    raise CheckpointError(f"The optimizer keeps a {type(value).__name__} in {name}, which a checkpoint cannot hold.")


def _unpack(packed: dict, tensors: dict[str, torch.Tensor]):
    if "tensor" in packed:
        return tensors[packed["tensor"]]
    if "dict" in packed:
        return {key: _unpack(item, tensors) for key, item in packed["dict"]}
    if "list" in packed:
        items = [_unpack(item, tensors) for item in packed["list"]]
        return tuple(items) if packed["tuple"] else items
    return packed["value"]
