"""Low-rank branches on frozen Linears: the de-distill adapter and the LoRA that trains beside it.

A branch adds `scale * B (A x)` to a Linear's output (LoRA, arXiv 2106.09685). On NextDiT's fused `qkv`
three branches (`to_q`, `to_k`, `to_v`) write to their own rows. All A's of a Linear, the frozen
adapter's and the trained LoRA's, are stacked into one matrix, so they cost one GEMM. Other forms of a
difference (`lycoris.LoKr`, `lycoris.LoHa`) run beside them.

With a magnitude a branch is DoRA (arXiv 2402.09353): the columns of W + scale B A, of the clean weight, are
brought to lengths of their own, as core does it with `dora_scale` [1, in]. The adapter is under that gain too,
so taking it away leaves W + scale B A with the very gain that was trained.

The frozen weight never enters autograd: its owner lends it when asked (`fetch`), once in forward and
once in backward, so it may be quantised, offloaded, or made under inference mode.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

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

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.size)


@dataclass(frozen=True)
class Target:
    """A Linear of the model and the LoRAs that live on it."""

    module: str  # e.g. layers.0.attention.qkv
    in_features: int
    out_features: int
    parts: tuple[Part, ...]


class Difference(Protocol):
    """What is trained on one Linear (or on its rows): LoRA, DoRA, LoKr or LoHa."""

    @property
    def scale(self) -> float: ...

    @property
    def rank(self) -> int: ...

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight that it changes."""
        ...

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Its trained numbers by their names in a file, in a fixed order."""
        ...

    @property
    def alpha(self) -> float | None:
        """The file's `.alpha`, or None where none is needed."""
        ...

    def output(self, x: torch.Tensor) -> torch.Tensor:
        """delta x. [..., in] -> [..., out] in x's dtype."""
        ...

    def delta(self) -> torch.Tensor:
        """[out, in] fp32."""
        ...

    def of(self, tensors: dict[str, torch.Tensor]) -> "Difference":
        """The same form around other numbers."""
        ...


@dataclass(frozen=True)
class Factors:
    """One low-rank difference: scale * B @ A.

    A: [rank, in], B: [out, rank], magnitude: [1, in] (DoRA), any float dtype.
    """

    A: torch.Tensor
    B: torch.Tensor
    scale: float = 1.0
    magnitude: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.B.shape[0], self.A.shape[1]

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        pair = {"lora_A.weight": self.A, "lora_B.weight": self.B}
        return pair if self.magnitude is None else {**pair, "dora_scale": self.magnitude}

    @property
    def alpha(self) -> float | None:
        return None if self.scale == 1.0 else self.scale * self.rank

    def output(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.linear(x, self.A.to(x.dtype)) * self.scale, self.B.to(x.dtype))

    def delta(self) -> torch.Tensor:
        """[out, in] fp32, before any magnitude."""
        return self.scale * (self.B.float() @ self.A.float())

    def of(self, tensors: dict[str, torch.Tensor]) -> "Factors":
        return Factors(tensors["lora_A.weight"], tensors["lora_B.weight"], self.scale, tensors.get("dora_scale"))


def create(name: str, rows: int, columns: int, rank: int, alpha: float, seed: int) -> Factors:
    """An untrained fp32 LoRA. A: Kaiming uniform (a = sqrt 5), B: zero, as in peft; a function of seed and name."""
    return Factors(uniform(rank, columns, seed, "lora", name), torch.zeros(rows, rank), alpha / rank)


def uniform(rows: int, columns: int, *counters) -> torch.Tensor:
    """[rows, columns] Kaiming uniform (a = sqrt 5), a function of the counters."""
    bound = columns**-0.5
    return torch.rand(rows, columns, generator=flow.generator(*counters)) * (2 * bound) - bound


def parameters(lora: Mapping[str, Difference]) -> list[torch.Tensor]:
    """The trained numbers of every part, in a fixed order."""
    return [tensor for name in sorted(lora) for tensor in lora[name].tensors.values()]


def plain(parts: Mapping[str, Difference]) -> dict[str, Factors]:
    """Those that are plain LoRA: no DoRA, LoKr or LoHa."""
    return {name: one for name, one in parts.items() if isinstance(one, Factors) and one.magnitude is None}


def count(lora: Mapping[str, Difference]) -> int:
    """How many numbers are trained."""
    return sum(tensor.numel() for tensor in parameters(lora))


class FrozenLinear(torch.autograd.Function):
    """y = x W^T + b, or those rows of it, with a gradient for x only.

    W is fetched again for backward instead of being kept.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, fetch: Fetch, rows: slice) -> torch.Tensor:
        ctx.fetch, ctx.rows = fetch, rows
        return linear(x, fetch, rows)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        with ctx.fetch(grad) as (weight, _):
            return grad @ weight[ctx.rows], None, None


ALL = slice(None)


def linear(x: torch.Tensor, fetch: Fetch, rows: slice = ALL) -> torch.Tensor:
    with fetch(x) as (weight, bias):
        return F.linear(x, weight[rows], None if bias is None else bias[rows])


def frozen(x: torch.Tensor, fetch: Fetch, rows: slice = ALL) -> torch.Tensor:
    return FrozenLinear.apply(x, fetch, rows) if x.requires_grad else linear(x, fetch, rows)


Branches = list[Mapping[str, Difference]]


def branch_output(x: torch.Tensor, target: Target, branches: Branches) -> torch.Tensor | None:
    """Sum of all branches on one Linear. x: [..., in] -> [..., out] in x's dtype, or None where no branch lives."""
    present = [[branch[part.name] for branch in branches if part.name in branch] for part in target.parts]
    stacked = [factors.A.to(x.dtype) for group in present for factors in group if isinstance(factors, Factors)]
    if not any(present):
        return None
    hidden = F.linear(x, torch.cat(stacked)).split([A.shape[0] for A in stacked], dim=-1) if stacked else ()
    pieces = iter(hidden)
    outputs = []
    for part, group in zip(target.parts, present):
        rows = [
            F.linear(next(pieces) * one.scale, one.B.to(x.dtype)) if isinstance(one, Factors) else one.output(x)
            for one in group
        ]
        outputs.append(sum(rows[1:], rows[0]) if rows else x.new_zeros(*x.shape[:-1], part.size))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


def decomposed_output(x: torch.Tensor, target: Target, fetch: Fetch, branches: Branches) -> torch.Tensor:
    """Linear and branches together where a branch is DoRA: each part sees x under its own gain.

    [..., in] -> [..., out].
    """
    outputs = []
    for part in target.parts:
        present = [branch[part.name] for branch in branches if part.name in branch]
        z = x
        for one in present:
            if isinstance(one, Factors) and one.magnitude is not None:
                assert one.magnitude.shape[0] == 1, "a length for each column; files may have one for each row"
                z = z * (one.magnitude / column_norms(one, fetch, part.rows, x))[0].to(x.dtype)
        outputs.append(sum((one.output(z) for one in present), frozen(z, fetch, part.rows)))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


def column_norms(factors: Factors | None, fetch: Fetch, rows: slice, like: torch.Tensor) -> torch.Tensor:
    """[1, in] fp32: L2 norms of the columns of these rows of W (+ the difference).

    No gradient passes (arXiv 2402.09353, 4.3).
    """
    with torch.no_grad(), fetch(like) as (weight, _):
        whole = weight[rows].float() if factors is None else weight[rows].float() + factors.delta()
        return whole.norm(dim=0, keepdim=True).clamp_min(1e-12)


@contextmanager
def attached(
    linears: Mapping[str, tuple[torch.nn.Module, Fetch]], targets: list[Target], branches: Branches
) -> Iterator[None]:
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


def _forward(fetch: Fetch, target: Target | None, branches: Branches):
    if target is not None and decomposed(target, branches):
        return lambda x: decomposed_output(x, target, fetch, branches)

    def forward(x: torch.Tensor) -> torch.Tensor:
        y = frozen(x, fetch)
        extra = branch_output(x, target, branches) if target is not None else None
        return y if extra is None else y + extra

    return forward


def decomposed(target: Target, branches: Branches) -> bool:
    """Is one of the branches on this Linear DoRA?"""
    present = [branch.get(part.name) for branch in branches for part in target.parts]
    return any(getattr(one, "magnitude", None) is not None for one in present)
