"""Low-rank branches on frozen Linears: the de-distill adapter and the LoRA that trains beside it.

A branch adds `scale * B (A x)` to a Linear's output (LoRA, arXiv 2106.09685). On NextDiT's fused `qkv`
three branches (`to_q`, `to_k`, `to_v`) write to their own rows. All A's of a Linear, the frozen
adapter's and the trained LoRA's, are stacked into one matrix, so they cost one GEMM.

The frozen weight never enters autograd: its owner lends it when asked (`fetch`), once in forward and
once in backward, so it may be quantised, offloaded, or made under inference mode.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from . import flow

Fetch = Callable[[torch.Tensor], AbstractContextManager[tuple[torch.Tensor, torch.Tensor | None]]]


@dataclass(frozen=True)
class Part:
    """Where a named LoRA writes: rows [start, start + size) of a Linear's output."""

    name: str  # the LoRA's canonical name, e.g. layers.0.attention.to_q
    start: int
    size: int


@dataclass(frozen=True)
class Target:
    """A Linear of the model and the LoRAs that live on it."""

    module: str  # e.g. layers.0.attention.qkv
    in_features: int
    out_features: int
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Factors:
    """One low-rank difference: scale * B @ A. A: [rank, in], B: [out, rank], any float dtype."""

    A: torch.Tensor
    B: torch.Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def delta(self) -> torch.Tensor:
        """[out, in] fp32."""
        return self.scale * (self.B.float() @ self.A.float())


def create(targets: list[Target], rank: int, alpha: float, seed: int, device="cpu") -> dict[str, Factors]:
    """Trainable fp32 LoRA for every part. A: Kaiming uniform (a = sqrt 5), B: zero, as in peft; a function of seed and name."""
    lora = {}
    for target in targets:
        bound = 1 / math.sqrt(target.in_features)  # kaiming_uniform_(a=sqrt(5)) on [rank, in]
        for part in target.parts:
            A = torch.rand(rank, target.in_features, generator=flow.generator(seed, "lora", part.name)) * (2 * bound) - bound
            B = torch.zeros(part.size, rank)
            lora[part.name] = Factors(A.to(device).requires_grad_(True), B.to(device).requires_grad_(True), alpha / rank)
    return lora


def parameters(lora: dict[str, Factors]) -> list[torch.Tensor]:
    """A and B of every part, in a fixed order."""
    return [tensor for name in sorted(lora) for tensor in (lora[name].A, lora[name].B)]


class FrozenLinear(torch.autograd.Function):
    """y = x W^T + b with a gradient for x only. W is fetched again for backward instead of being kept."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, fetch: Fetch) -> torch.Tensor:
        ctx.fetch = fetch
        return linear(x, fetch)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        with ctx.fetch(grad) as (weight, _):
            return grad @ weight, None


def linear(x: torch.Tensor, fetch: Fetch) -> torch.Tensor:
    with fetch(x) as (weight, bias):
        return F.linear(x, weight, bias)


def branch_output(x: torch.Tensor, target: Target, branches: list[dict[str, Factors]]) -> torch.Tensor | None:
    """Sum of all branches on one Linear. x: [..., in] -> [..., out] in x's dtype, or None where no branch lives."""
    present = [[branch[part.name] for branch in branches if part.name in branch] for part in target.parts]
    stacked = [factors.A.to(x.dtype) for group in present for factors in group]
    if not stacked:
        return None
    hidden = F.linear(x, torch.cat(stacked))
    pieces = iter(hidden.split([A.shape[0] for A in stacked], dim=-1))
    outputs = []
    for part, group in zip(target.parts, present):
        rows = [F.linear(next(pieces) * factors.scale, factors.B.to(x.dtype)) for factors in group]
        outputs.append(sum(rows[1:], rows[0]) if rows else x.new_zeros(*x.shape[:-1], part.size))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


@contextmanager
def attached(linears: Mapping[str, tuple[torch.nn.Module, Fetch]], targets: list[Target], branches: list[dict[str, Factors]]) -> Iterator[None]:
    """Run the given Linears frozen, with branches, while the context lasts. Nothing of it is left afterwards.

    linears: module name -> (module, fetch).
    """
    by_module = {target.module: target for target in targets}
    with covered((module, _forward(fetch, by_module.get(name), branches)) for name, (module, fetch) in linears.items()):
        yield


@contextmanager
def covered(forwards: Iterable[tuple[torch.nn.Module, Callable]]) -> Iterator[None]:
    """Give the instances another `forward` while the context lasts."""
    changed = []
    try:
        for module, forward in forwards:
            changed.append((module, module.__dict__.get("forward")))
            module.forward = forward
        yield
    finally:
        for module, before in reversed(changed):
            if before is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = before


def _forward(fetch: Fetch, target: Target | None, branches: list[dict[str, Factors]]):
    def forward(x: torch.Tensor) -> torch.Tensor:
        y = FrozenLinear.apply(x, fetch) if x.requires_grad else linear(x, fetch)
        extra = branch_output(x, target, branches) if target is not None else None
        return y if extra is None else y + extra

    return forward


def parameter_count(targets: list[Target], rank: int) -> int:
    """Trained numbers: rank * (in + rows) summed over all parts."""
    return sum(rank * (target.in_features + part.size) for target in targets for part in target.parts)
