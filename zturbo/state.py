"""All that a run has learnt: the LoRA, its moving average, the optimizer, the losses so far.

A step is a function of (recipe, seed, step), so this is everything that training needs to go on as if it had never
stopped.
"""

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import torch

from . import lorafile, lowrank, optimizers, tensorfile
from .checkpoint import FORMAT, Copy
from .errors import CheckpointError
from .lowrank import Difference

MOST_PHASES = 16  # more than any plan has


@dataclass
class State:
    """A run after `len(losses)` steps.

    ema: the LoRA's moving average, where the recipe asks for one. seconds: spent in steps. phase: the number of the
    phase (see `phases.plan`) that the newest step belongs to, and phase_start: the step before the first of those in a
    row that do. rollbacks: times that the run went back to a checkpoint with half the learning rate. at_once: pictures
    that go through the model together, which is in the bits of a sum; 0: all of a batch. whole: False while the
    optimizer moves the weights.
    """

    lora: dict[str, Difference]
    optimizer: torch.optim.Optimizer
    ema: dict[str, Difference] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    phase: int = 0
    phase_start: int = 0
    rollbacks: int = 0
    at_once: int = 0
    whole: bool = True

    @property
    def step(self) -> int:
        """Steps taken."""
        return len(self.losses)

    def exported(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """What is previewed, saved and handed on, as a LoRA file's tensors.

        It is the moving average where there is one, else what the optimizer gives out.
        """
        with self.as_exported():
            return lorafile.state_dict(self.lora, dtype)

    def as_exported(self) -> AbstractContextManager[None]:
        """While open, the LoRA that trains has the exported numbers; afterwards, to the bit, its own."""
        return optimizers.averaged(self.optimizer, lowrank.parameters(self.lora), lowrank.parameters(self.ema))

    def losses_in(self, phase: int) -> list[float]:
        """Of the newest steps in a row that belong to this phase."""
        return self.losses[self.phase_start :] if phase == self.phase else []

    @contextmanager
    def stepping(self, phase: int, loss: float) -> Iterator[None]:
        """While open, the optimizer moves the weights; then this is one step more, of this phase."""
        self.whole = False
        yield
        if phase != self.phase:
            self.phase, self.phase_start = phase, self.step
        self.losses.append(loss)
        self.whole = True

    def average(self, decay: float):
        """Bring the moving average nearer to the LoRA. decay: the part of it that stays, smaller in the first steps."""
        if not self.ema:
            return
        stays = min(decay, (1 + self.step) / (10 + self.step))
        new = [parameter.detach() for parameter in lowrank.parameters(self.lora)]
        torch._foreach_lerp_(lowrank.parameters(self.ema), new, 1 - stays)

    def parts(self) -> dict[str, torch.Tensor]:
        """The trained numbers of the LoRA and of its average, by their names in a checkpoint."""
        sets = {"lora": self.lora, "average": self.ema}
        return {
            f"{kind}.{name}.{part}": tensor
            for kind, lora in sets.items()
            for name, one in lora.items()
            for part, tensor in one.tensors.items()
        }

    def copied(self) -> Copy:
        """All of it, as it is now, in main memory: training may go on while this is written."""
        tensors = {"losses": torch.tensor(self.losses, dtype=torch.float64)}
        tensors |= self.parts()
        optimizer = _pack(self.optimizer.state_dict(), "optimizer", tensors)
        # 8-bit optimizers share tables
        tensors = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
        facts = {
            "format": FORMAT,
            "seconds": repr(self.seconds),
            "setbacks": str(self.rollbacks),  # these three have the names of the first version
            "restoring": str(self.phase),
            "since": str(self.phase_start),
            **({"at once": str(self.at_once)} if self.at_once else {}),
            "optimizer": json.dumps(optimizer),
            **self.kinds(),
        }
        return Copy(tensors, facts)

    def kinds(self) -> dict[str, str]:
        """What the numbers of a checkpoint mean nothing without."""
        return {
            "optimizer class": type(self.optimizer).__name__,
            "moving average": "yes" if self.ema else "no",
            "scale": str(sorted({one.scale for one in self.lora.values()})),
        }

    def take(self, tensors: dict[str, torch.Tensor], facts: dict[str, str]):
        """Become the state that was saved.

        Raises CheckpointError, and stays as it is, when that is of another LoRA or optimizer.
        """
        self._need_same_kinds(tensors, facts)
        course = _course(tensors["losses"], facts)
        self._take_optimizer(tensors, facts)
        with torch.no_grad():
            for key, tensor in self.parts().items():
                tensor.copy_(tensors[key])
        self.losses, self.seconds, self.rollbacks, self.phase, self.phase_start, self.at_once = course

    def _need_same_kinds(self, tensors: dict[str, torch.Tensor], facts: dict[str, str]):
        for name, mine in self.kinds().items():
            if facts.get(name) != mine:
                raise CheckpointError(
                    f"The checkpoint is of another {name}: it has {facts.get(name)}, this run {mine}. "
                    "Use the same settings, or start a new run."
                )
        parts = self.parts()
        saved = {key for key in tensors if key.startswith(("lora.", "average."))}
        wrong = list(parts.keys() ^ saved) or [key for key in parts if _form(parts[key]) != _form(tensors[key])]
        if wrong:
            raise CheckpointError(
                f"The checkpoint is of another LoRA: {len(wrong)} of {len(parts)} matrices differ "
                f"(for example {wrong[0]}). Use the same rank and targets, or start a new run."
            )

    def _take_optimizer(self, tensors: dict[str, torch.Tensor], facts: dict[str, str]):
        before = self.optimizer.state_dict()
        decay = [group.get("weight_decay") for group in self.optimizer.param_groups]
        try:
            saved = _unpack(json.loads(facts["optimizer"]), tensors)
            _need_alike(saved, before)
            self.optimizer.load_state_dict(saved)
        except Exception as error:  # each optimizer has its own way to refuse
            self.optimizer.load_state_dict(before)
            raise CheckpointError(
                f"The checkpoint is of another optimizer ({type(error).__name__}: {error}). "
                "Use the same one, or start a new run."
            ) from error
        for group, value in zip(self.optimizer.param_groups, decay):
            if value is not None:
                group["weight_decay"] = value  # the recipe's, which may be another when a run is continued


def _form(tensor: torch.Tensor) -> tuple:
    return tensor.shape, tensor.dtype


def _course(losses: torch.Tensor, facts: dict[str, str]) -> tuple[list[float], float, int, int, int, int]:
    """`State`'s (losses, seconds, rollbacks, phase, phase_start, at_once). Raises CheckpointError for no such."""
    try:
        seconds = float(facts["seconds"])
        rollbacks, phase, phase_start = (int(facts[name]) for name in ("setbacks", "restoring", "since"))
        at_once = int(facts.get("at once", "0"))
    except ValueError as error:
        raise CheckpointError(f"The checkpoint is no run's: {error}.") from error
    whole = losses.ndim == 1 and losses.dtype == torch.float64 and bool(losses.isfinite().all())
    counts = 0 <= seconds < float("inf") and min(rollbacks, at_once) >= 0 and 0 <= phase < MOST_PHASES
    if not (whole and counts and 0 <= phase_start <= len(losses)):
        raise CheckpointError(
            "The checkpoint is no run's: its losses, seconds, setbacks, phase or pictures at once are no such numbers."
        )
    return losses.tolist(), seconds, rollbacks, phase, phase_start, at_once


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
    kept = (value for state in saved["state"].values() for value in state.values() if isinstance(value, torch.Tensor))
    if odd := next((value.dtype for value in kept if value.dtype not in tensorfile.DTYPES), None):
        raise ValueError(f"it holds {odd} numbers")


def _same_kind(a, b) -> bool:
    """Are these two values of a setting of the same kind, and is a number without an end so in both?"""
    if isinstance(b, (tuple, list)):
        return isinstance(a, (tuple, list)) and len(a) == len(b) and all(map(_same_kind, a, b))
    if isinstance(b, (int, float)) and not isinstance(b, bool):
        return isinstance(a, torch.Tensor) or (
            isinstance(a, (int, float)) and not isinstance(a, bool) and (abs(a) < float("inf") or a == b)
        )
    return b is None or a is None or type(a) is type(b)


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
