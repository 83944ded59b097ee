"""Optimizers by name, from the libraries that keep them, and the learning rate's course over a run."""

import importlib
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .errors import TrainingError
from .recipe import Optimizer

# name -> (module, class, options beside learning rate and weight decay)
KNOWN: dict[str, tuple[str, str, dict]] = {
    "adamw": ("torch.optim", "AdamW", {}),
    "muon": ("torch.optim", "Muon", {"adjust_lr_fn": "match_rms_adamw"}),  # AdamW's learning rates fit
    "adamw8bit": ("bitsandbytes.optim", "AdamW8bit", {}),
    # else B, which begins at 0, hardly moves
    "adafactor": ("pytorch_optimizer", "AdaFactor", {"scale_parameter": False, "relative_step": False}),
    "prodigy": ("pytorch_optimizer", "Prodigy", {"safeguard_warmup": True}),
    "schedule_free": ("pytorch_optimizer", "ScheduleFreeAdamW", {}),
    "lion": ("pytorch_optimizer", "Lion", {}),
    "came": ("pytorch_optimizer", "CAME", {}),
}
FUSED = ("adamw",)  # where PyTorch has one kernel for all tensors
PACKAGES = {"pytorch_optimizer": "pytorch-optimizer", "bitsandbytes.optim": "bitsandbytes"}


def build(options: Optimizer, parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
    """The optimizer of a recipe. Raises TrainingError, with the command to install it, where its library is missing."""
    module, name, more = KNOWN[options.name]
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, OSError) as error:
        if module not in PACKAGES:
            raise TrainingError(
                f"The optimizer {options.name} is not in this PyTorch ({torch.__version__}); it came with 2.9. "
                "Choose adamw."
            ) from error
        package = PACKAGES[module]
        raise TrainingError(
            f"The optimizer {options.name} needs the package {package} ({error}). "
            f"Install it into ComfyUI's Python (pip install {package}), or choose adamw."
        ) from error
    if options.name in FUSED and parameters[0].device.type in ("cpu", "cuda"):
        more = more | {"fused": True}
    return kind(parameters, lr=options.learning_rate, weight_decay=options.weight_decay, **more)


def learning_rate(options: Optimizer, step: int, total: int) -> float:
    """The learning rate of step `step` (from 0) of `total`: warm-up, then the schedule, then the decay at the end."""
    warm = min(1.0, (step + 1) / options.warmup) if options.warmup else 1.0
    course = max(0, step - options.warmup) / max(1, total - options.warmup)  # 0 to 1 behind the warm-up
    if options.schedule == "linear":
        shape = 1 - course
    elif options.schedule == "cosine":
        shape = (1 + math.cos(math.pi * course)) / 2
    elif options.schedule == "cosine_restarts":
        shape = (1 + math.cos(math.pi * (course * options.restarts % 1))) / 2
    else:
        shape = 1.0
    tail = min(1.0, (total - step) / options.decay) if options.decay else 1.0
    return options.learning_rate * warm * shape * tail


@contextmanager
def averaged(
    optimizer: torch.optim.Optimizer, parameters: list[torch.Tensor], average: list[torch.Tensor]
) -> Iterator[None]:
    """While open, the parameters are what is exported.

    That is their `average` where there is one, else what a schedule-free optimizer gives out.
    Afterwards they are, to the bit, what they were.
    """
    swaps = hasattr(optimizer, "eval") and hasattr(optimizer, "train")
    if not swaps and not average:
        yield
        return
    before = [parameter.detach().clone() for parameter in parameters]
    if swaps:
        optimizer.eval()  # type: ignore[attr-defined]
    try:
        _copy(average, parameters)
        yield
    finally:
        if swaps:
            optimizer.train()  # type: ignore[attr-defined]
        _copy(before, parameters)


@torch.no_grad()
def _copy(values: list[torch.Tensor], parameters: list[torch.Tensor]):
    for parameter, value in zip(parameters, values):
        parameter.copy_(value)
