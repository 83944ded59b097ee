"""The elementwise parts of a transformer block with their backward passes, each in as few passes as PyTorch allows.

`compiled` has the same functions, fused; a Block computes with either. x, y, g (a gradient): [B, T, D]; m: [B, 1, D],
what a normed x is multiplied by; heads: [B, T, 3 H, d], queries, keys and values beside each other. Reductions are in
fp32, whatever the dtype.
"""

from typing import Any

import torch
import torch.nn.functional as F

PIECES, PIECE = 8, 2**18  # at most so many, of at least so many numbers


class Norm:
    """RMSNorm (arXiv 1910.07467) unweighted, once through a block and back: n = x inv, inv = 1 / sqrt(mean of squares +
    eps).

    inv: [..., 1] fp32, from the forward on. n: in x's dtype, kept on the way back alone. x: what is normed, on the way
    back and where n is not there.
    """

    def __init__(self, eps: float):
        self.eps, self.way_back = eps, False
        # Any: not there before they are computed, and behind their last use
        self.inv: Any = None
        self.n: Any = None
        self.x: Any = None

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """n"""
        if self.n is not None:
            return self.n
        n, self.inv = normed(x, self.eps, self.inv)
        if self.way_back:
            self.n, self.x = n, None
        return n

    def rest(self, x: torch.Tensor):
        """Drop n until it is wanted again. x: what it is of."""
        self.n, self.x = None, x

    def last(self) -> torch.Tensor:
        """n, for the last time."""
        n, self.n = self.of(self.x), None
        return n


def normed(x: torch.Tensor, eps: float, inv: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, inv) as in `Norm`. inv: where it is known already."""
    if inv is not None and x.dtype == torch.float32:
        return x * inv, inv
    if hasattr(torch.ops.aten, "_fused_rms_norm"):
        return torch.ops.aten._fused_rms_norm(x, x.shape[-1:], None, eps)
    inv = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    return (x * inv).to(x.dtype), inv


def scaled(x: torch.Tensor, m: torch.Tensor, norm: Norm) -> torch.Tensor:
    """n m, n of x."""
    n = norm.of(x)
    return n.mul_(m) if norm.n is None else n * m


def added(x: torch.Tensor, y: torch.Tensor, m: torch.Tensor, norm: Norm) -> torch.Tensor:
    """x + n m, n of y."""
    n = norm.of(y)
    return torch.addcmul(x, n, m, out=n) if norm.n is None else torch.addcmul(x, n, m)


def scaled_backward(g: torch.Tensor, m: torch.Tensor, norm: Norm) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of n m: (to what is normed, to m [B, 1, D])."""
    n = norm.last()
    product = g * n
    along = product @ m.transpose(1, 2)
    dx = torch.mul(g, m).addcmul_(n, along, value=-1 / n.shape[-1])
    return dx.mul_(norm.inv.to(dx.dtype)), product.sum(1, keepdim=True)


def turned(heads: torch.Tensor, weight: torch.Tensor, rope: torch.Tensor, norm: Norm) -> torch.Tensor:
    """Queries and keys [B, T, 2 H, d]: normed, weighted and turned (rotary embedding, arXiv 2104.09864).

    A pair that turns lies beside each other. weight: [2 H, d] fp32; rope: complex [T, 1, d / 2].
    """
    n = norm.of(heads[:, :, : len(weight)])
    y = n.mul_(weight) if norm.n is None and n.dtype == weight.dtype else torch.mul(n, weight)
    _pairs(y).mul_(rope)
    return y.to(n.dtype)


def turned_backward(
    d: list[torch.Tensor], heads: torch.Tensor, weight: torch.Tensor, back: torch.Tensor, norm: Norm
) -> torch.Tensor:
    """To heads. d: to queries and keys as `turned` gave them and to values, each [B, T, H, d]; this empties it.

    back: the conjugate of rope.
    """
    g, dv = torch.cat(d[:2], dim=2), d[2]
    d.clear()
    n = norm.last()
    g, wide = g.float(), n.float()
    _pairs(g).mul_(back)
    g.mul_(weight)
    along = torch.mul(g, wide).sum(-1, keepdim=True)
    g = g.addcmul_(wide, along, value=-1 / n.shape[-1]).mul_(norm.inv).to(n.dtype)
    return torch.cat((g, dv), dim=2)


def _pairs(x: torch.Tensor) -> torch.Tensor:
    return torch.view_as_complex(x.view(*x.shape[:-1], -1, 2))


def gated(u: list[torch.Tensor]) -> torch.Tensor:
    """silu(a) b of u = [a, b] (SwiGLU, arXiv 2002.05202)."""
    return F.silu(u[0]).mul_(u[1])


def gated_backward(g: torch.Tensor, u: list[torch.Tensor]) -> list[torch.Tensor]:
    """Gradients of gated(u), in u's place: this is where a block's way back needs most."""
    rows = max(-(-len(g) // PIECES), PIECE // g.shape[1])
    for a, b, part in zip(*(one.split(rows) for one in (*u, g))):
        to_gate = part * b
        torch.mul(F.silu(a), part, out=b)
        torch.ops.aten.silu_backward.grad_input(to_gate, a, grad_input=a)
    return u
