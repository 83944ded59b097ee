"""Attention whose backward is called by hand, so that its forward runs once though the rest is computed again.

q, k, v: [B, heads, T, d]. Flash attention (arXiv 2205.14135) gives its output and a number a row, out of which its
backward makes gradients. Where PyTorch has none for a device or a dtype, its own choice runs under autograd.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

aten = torch.ops.aten


@dataclass
class Attended:
    """out: [B, heads, T, d]. rest: what the backward of this kind needs beside q, k and v."""

    out: torch.Tensor
    rest: Any

    @property
    def light(self) -> bool:
        """Does it hold nothing of the size of q, k, v but its output?"""
        return not isinstance(self.rest, Graph)


@dataclass
class Graph:
    """PyTorch's own choice, kept as a graph. inputs: q, k, v with gradients; out: with the graph."""

    inputs: tuple[torch.Tensor, ...]
    out: torch.Tensor


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backward: bool = True) -> Attended:
    """softmax(q k^T / sqrt d) v. backward: will `attend_backward` be called?"""
    if not backward:
        return Attended(F.scaled_dot_product_attention(q, k, v), None)
    if q.device.type == "cpu":
        return Attended(*aten._scaled_dot_product_flash_attention_for_cpu(q, k, v))
    if q.device.type == "cuda" and flash(q, k, v):
        out, *rest = aten._scaled_dot_product_flash_attention(q, k, v)
        return Attended(out, rest[:-1])
    with torch.enable_grad():
        q, k, v = inputs = tuple(one.detach().requires_grad_() for one in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v)
    return Attended(out.detach(), Graph(inputs, out))


def by_graph(device: torch.device, dtype: torch.dtype) -> bool:
    """Will attention run under autograd there? A guess, before there are q, k and v."""
    return not (device.type == "cpu" or (device.type == "cuda" and dtype != torch.float32))


def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Would PyTorch itself take flash attention for these, on an NVIDIA or ROCm card?"""
    cuda: Any = torch.backends.cuda
    try:
        return cuda.flash_sdp_enabled() and cuda.can_use_flash_attention(
            cuda.SDPAParams(q, k, v, None, 0.0, False, False), False
        )
    except (AttributeError, TypeError):  # another PyTorch
        return False


def attend_backward(
    g: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attended: Attended
) -> tuple[torch.Tensor, ...]:
    """Gradients to q, k and v."""
    if isinstance(attended.rest, Graph):
        return torch.autograd.grad(attended.rest.out, attended.rest.inputs, g)
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            g, q, k, v, attended.out, attended.rest, 0.0, False
        )
    lse, *more = attended.rest  # more: cum_seq_q, cum_seq_k, max_q, max_k, rng_state, unused
    return aten._scaled_dot_product_flash_attention_backward(
        g, q, k, v, attended.out, lse, *more[:4], 0.0, False, *more[4:]
    )
