"""The elementwise parts of a transformer block with their backward passes, each in as few passes as PyTorch allows.

x, n, g (a gradient): [B, T, D]; m: [B, 1, D], what a normed x is multiplied by. Reductions are in fp32, whatever the
dtype.
"""

import torch
import torch.nn.functional as F


def normed(x: torch.Tensor, eps: float, inv: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(n = x inv in x's dtype, inv), inv = 1 / sqrt(mean of squares + eps): RMSNorm (arXiv 1910.07467) unweighted.

    inv: [..., 1] fp32, where it is known already.
    """
    if inv is not None and x.dtype == torch.float32:
        return x * inv, inv
    if hasattr(torch.ops.aten, "_fused_rms_norm"):
        return torch.ops.aten._fused_rms_norm(x, x.shape[-1:], None, eps)
    inv = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    return (x * inv).to(x.dtype), inv


def scaled_backward(
    g: torch.Tensor, n: torch.Tensor, inv: torch.Tensor, m: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of n m by way of n = normed(x): (to x, to m [B, 1, D])."""
    product = g * n
    along = product @ m.transpose(1, 2)
    dx = torch.mul(g, m).addcmul_(n, along, value=-1 / n.shape[-1])
    return dx.mul_(inv.to(dx.dtype)), product.sum(1, keepdim=True)


def turned(n: torch.Tensor, weight: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """Queries and keys: normed heads, weighted and turned (rotary embedding, arXiv 2104.09864).

    A pair that turns lies beside each other.
    n: [B, T, heads, d]; weight: [heads, d] fp32; rope: complex [T, 1, d / 2].
    """
    y = torch.mul(n, weight)
    _pairs(y).mul_(rope)
    return y.to(n.dtype)


def turned_backward(
    g: torch.Tensor, n: torch.Tensor, inv: torch.Tensor, weight: torch.Tensor, back: torch.Tensor
) -> torch.Tensor:
    """Gradient of turned(n) by way of n = normed(x), to x. g: may be overwritten; back: the conjugate of rope."""
    g, wide = g.float(), n.float()
    _pairs(g).mul_(back)
    g.mul_(weight)
    along = torch.mul(g, wide).sum(-1, keepdim=True)
    return g.addcmul_(wide, along, value=-1 / n.shape[-1]).mul_(inv).to(n.dtype)


def _pairs(x: torch.Tensor) -> torch.Tensor:
    return torch.view_as_complex(x.view(*x.shape[:-1], -1, 2))


def gated(u: torch.Tensor) -> torch.Tensor:
    """silu(a) b of u = [a, b] in the last dimension (SwiGLU, arXiv 2002.05202)."""
    a, b = u.chunk(2, dim=-1)
    return F.silu(a).mul_(b)


def gated_backward(g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Gradient of gated(u). g is overwritten."""
    a, b = u.chunk(2, dim=-1)
    du = torch.empty_like(u)
    da, db = du.chunk(2, dim=-1)
    torch.ops.aten.silu.out(a, out=db).mul_(g)
    torch.ops.aten.silu_backward.grad_input(g.mul_(b), a, grad_input=da)
    return du
