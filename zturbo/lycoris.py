"""LoKr and LoHa: differences that are no plain product of two matrices (LyCORIS, arXiv 2309.14859).

Names, factorisation and scale are those of LyCORIS and of core ComfyUI, which reads both. diffusers reads LoKr.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from . import flow
from .lowrank import uniform

WHOLE, PRODUCT = ("lokr_w2",), ("lokr_w2_a", "lokr_w2_b")


@dataclass(frozen=True)
class LoKr:
    """scale * kron(w1, w2). w1: [o1, i1]; w2: one matrix [o2, i2], or two, [o2, rank] and [rank, i2], that make it."""

    w1: torch.Tensor
    w2: tuple[torch.Tensor, ...]
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return min(self.w2[-1].shape)

    @property
    def shape(self) -> tuple[int, int]:
        return self.w1.shape[0] * self.w2[0].shape[0], self.w1.shape[1] * self.w2[-1].shape[1]

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return {"lokr_w1": self.w1, **dict(zip(WHOLE if len(self.w2) == 1 else PRODUCT, self.w2))}

    @property
    def alpha(self) -> float | None:
        return None if len(self.w2) == 1 else self.scale * self.rank  # core scales only where there is a rank

    def matrices(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """w1 and w2, both whole."""
        left, *right = (tensor.to(dtype) for tensor in self.w2)
        return self.w1.to(dtype), left @ right[0] if right else left

    def output(self, x: torch.Tensor) -> torch.Tensor:
        """kron(w1, w2) x = w1 X w2^T with X = x as a matrix [i1, i2]. [..., in] -> [..., out]."""
        w1, w2 = self.matrices(x.dtype)
        inner = F.linear(x.unflatten(-1, (w1.shape[1], -1)), w2)
        return (self.scale * (w1 @ inner)).flatten(-2)

    def delta(self) -> torch.Tensor:
        """[out, in] fp32."""
        return self.scale * torch.kron(*self.matrices(torch.float32))

    def of(self, tensors: dict[str, torch.Tensor]) -> "LoKr":
        w2 = tuple(tensors[name] for name in (*WHOLE, *PRODUCT) if name in tensors)
        return LoKr(tensors["lokr_w1"], w2, self.scale)


@dataclass(frozen=True)
class LoHa:
    """scale * (w1_a @ w1_b) * (w2_a @ w2_b), element by element. w?_a: [out, rank], w?_b: [rank, in]."""

    w1_a: torch.Tensor
    w1_b: torch.Tensor
    w2_a: torch.Tensor
    w2_b: torch.Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return self.w1_b.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.w1_a.shape[0], self.w1_b.shape[1]

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return {"hada_w1_a": self.w1_a, "hada_w1_b": self.w1_b, "hada_w2_a": self.w2_a, "hada_w2_b": self.w2_b}

    @property
    def alpha(self) -> float:
        return self.scale * self.rank

    def _dense(self, dtype: torch.dtype) -> torch.Tensor:
        w1_a, w1_b, w2_a, w2_b = (tensor.to(dtype) for tensor in self.tensors.values())
        return (w1_a @ w1_b) * (w2_a @ w2_b) * self.scale

    def output(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self._dense(x.dtype))

    def delta(self) -> torch.Tensor:
        """[out, in] fp32."""
        return self._dense(torch.float32)

    def of(self, tensors: dict[str, torch.Tensor]) -> "LoHa":
        return LoHa(tensors["hada_w1_a"], tensors["hada_w1_b"], tensors["hada_w2_a"], tensors["hada_w2_b"], self.scale)


def split(dimension: int, factor: int) -> tuple[int, int]:
    """(small, large) with small * large = dimension, as LyCORIS and peft split.

    small is the largest divisor up to `factor` and the root.
    """
    small = max(n for n in range(1, min(factor, dimension) + 1) if dimension % n == 0 and n * n <= dimension)
    return small, dimension // small


def create_lokr(name: str, rows: int, columns: int, rank: int, alpha: float, factor: int, seed: int) -> LoKr:
    """An untrained LoKr: w1 Kaiming uniform, w2 zero. A function of seed and name.

    w2 is whole where the rank would not make it smaller.
    """
    (o1, o2), (i1, i2) = split(rows, factor), split(columns, factor)
    w1 = uniform(o1, i1, seed, "lokr w1", name)
    if 2 * rank >= max(o2, i2):
        return LoKr(w1, (torch.zeros(o2, i2),))
    return LoKr(w1, (uniform(o2, rank, seed, "lokr w2", name), torch.zeros(rank, i2)), alpha / rank)


def count_lokr(rows: int, columns: int, rank: int, factor: int) -> int:
    """Numbers of such a LoKr."""
    (o1, o2), (i1, i2) = split(rows, factor), split(columns, factor)
    return o1 * i1 + (o2 * i2 if 2 * rank >= max(o2, i2) else rank * (o2 + i2))


def create_loha(name: str, rows: int, columns: int, rank: int, alpha: float, seed: int) -> LoHa:
    """An untrained LoHa as LyCORIS begins it: w1_a N(0, 0.1), w1_b and w2_b N(0, 1), w2_a zero.

    A function of seed and name.
    """
    random = flow.generator(seed, "loha", name)
    w1_a = torch.randn(rows, rank, generator=random) * 0.1
    w1_b = torch.randn(rank, columns, generator=random)
    w2_b = torch.randn(rank, columns, generator=random)
    return LoHa(w1_a, w1_b, torch.zeros(rows, rank), w2_b, alpha / rank)
