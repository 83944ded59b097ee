"""A transformer block of Z-Image with its LoRA: forward and backward written out.

What autograd would do in some hundred small operations and with everything kept is here one autograd function: the
frozen weights are borrowed (`lowrank.Fetch`), all A's that read the same input are one matrix, the elementwise parts
are those of `kernels`, and what is kept for the backward is chosen (`Keep`). The block is NextDiT's (arXiv 2406.18583)
with Z-Image's modulation by the time:

    x1 = x  + tanh(gate 1) norm2(attention((1 + scale 1) norm1(x)))
    y  = x1 + tanh(gate 2) norm4(w2(silu(w1 h) w3 h)),  h = (1 + scale 2) norm3(x1)

A scale or gate and the weight of its norm are one factor m; u is w1 h beside w3 h. B: batch, T: tokens, D: width,
N: B T rows, F: inner width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch

from . import attention, kernels
from .stack import Stack

SCALES, GATES = slice(0, None, 2), slice(1, None, 2)  # of the four factors
Rope = tuple[torch.Tensor, torch.Tensor]


class Keep(IntEnum):
    """What a block keeps for its backward, beside its input and what is small; the rest is computed again."""

    INPUT = 0  # nothing
    ATTENTION = 1  # what attention and the feed-forward gave: twice the input's size
    ALL = 2  # all that is no elementwise function of the rest: about twelve times its size


FORGOTTEN = {
    Keep.INPUT: ("qkv", "attended", "o", "u", "d"),
    Keep.ATTENTION: ("qkv", "o", "u"),
    Keep.ALL: (),
}


@dataclass
class Shape:
    """Of a block. eps: of the four norms, and of those of queries and keys."""

    heads: int
    eps: float
    head_eps: float


class Block:
    """See above."""

    def __init__(self, shape: Shape, stacks: Mapping[str, Stack], norms: torch.Tensor, head_norms: torch.Tensor):
        """stacks: time, qkv, out, up (w1 and w3), down (w2). norms: [4, D]; head_norms: [2 heads, d], queries first."""
        self.shape, self.norms, self.head_norms, self.stacks = shape, norms, head_norms, stacks
        self.parameters = [one for stack in stacks.values() for one in stack.parameters]
        self.keep = Keep.ALL

    def __call__(self, x: torch.Tensor, time: torch.Tensor, rope: Rope) -> torch.Tensor:
        """x: [B, T, D]; time: [B, E], embedded; rope: as in `kernels.turned`, and its conjugate. Gives [B, T, D]."""
        if torch.is_grad_enabled() and (x.requires_grad or self.parameters):
            return BlockFunction.apply(self, x, time, rope, *self.parameters)
        with torch.no_grad():
            return Pass(self, x, time, rope, backward=False).forward()


class BlockFunction(torch.autograd.Function):
    """A block as autograd sees it. Its backward runs once."""

    @staticmethod
    def forward(ctx, block: Block, x: torch.Tensor, time: torch.Tensor, rope: Rope, *parameters: torch.Tensor):
        ctx.run = Pass(block, x, time, rope)
        y = ctx.run.forward()
        ctx.run.forget(block.keep)
        return y

    @staticmethod
    def backward(ctx, g: torch.Tensor):
        run, ctx.run = ctx.run, None
        dx, found = run.backward(g.contiguous())
        return None, dx if ctx.needs_input_grad[1] else None, None, None, *found


class Pass:
    """Once through a block, and back."""

    def __init__(self, block: Block, x: torch.Tensor, time: torch.Tensor, rope: Rope, backward: bool = True):
        self.block, self.x, self.time, self.rope = block, x, time, rope
        self.train, self.way_back = backward, False
        self.rows, self.width = x.shape[0] * x.shape[1], x.shape[2]
        self.hidden: dict[str, torch.Tensor | None] = {}  # A x of each stack
        self.n: dict[str, torch.Tensor] = {}  # of each norm, on the way back
        self.inv: dict[str, torch.Tensor] = {}  # of each norm
        # Any: not there before they are computed, and behind their last use
        self.qkv: Any = None  # [N, 3 D]
        self.attended: Any = None  # attention.Attended
        self.o: Any = None  # [N, D], what is normed into x1
        self.u: Any = None  # [N, 2 F]
        self.d: Any = None  # [N, D], what is normed into y

    def forward(self) -> torch.Tensor:
        self.modulate()
        self.look()
        self.give()
        x1 = self.middle()
        self.widen(x1)
        self.narrow()
        return torch.addcmul(x1, self.norm("4", self.d.view_as(x1)), self.m(3))

    def forget(self, keep: Keep):
        """Drop what this choice does not keep. Attention that runs under autograd is dropped with q, k and v."""
        for name in FORGOTTEN[keep]:
            setattr(self, name, None)
        if keep == Keep.ATTENTION and not self.attended.light:
            self.attended = None

    def fill(self) -> torch.Tensor:
        """Compute again what was dropped. Gives x1."""
        if self.qkv is None:
            self.look()
        elif self.attended is None:
            self.attend()
        if self.o is None:
            self.give()
        x1 = self.middle()
        if self.u is None:
            self.widen(x1)
        if self.d is None:
            self.narrow()
        return x1

    # the parts

    def apply(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """x through a stack. [..., in] -> [N, out]."""
        output, self.hidden[name] = self.block.stacks[name].forward(x.reshape(-1, x.shape[-1]))
        return output

    def m(self, number: int) -> torch.Tensor:
        """[B, 1, D]"""
        return self.factors[:, number : number + 1]

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """x normed. On the way back that is kept for the norm's own backward."""
        if name in self.n:
            return self.n[name]
        eps = self.block.shape.head_eps if name == "heads" else self.block.shape.eps
        n, self.inv[name] = kernels.normed(x, eps, self.inv.get(name))
        if self.way_back:
            self.n[name] = n
        return n

    def modulate(self):
        self.opening = self.apply("time", self.time).view(-1, 4, self.width)
        self.opening[:, SCALES].add_(1)
        self.opening[:, GATES].tanh_()
        self.factors = self.opening * self.block.norms

    def first(self) -> torch.Tensor:
        """[B, T, D], what queries, keys and values are made of."""
        return self.norm("1", self.x) * self.m(0)

    def look(self):
        """[N, 3 D]: queries, keys and values; and attention, where it is not kept."""
        self.qkv = self.apply("qkv", self.first())
        if self.attended is None:
            self.attend()

    def heads(self) -> torch.Tensor:
        """[B, T, 3 heads, d]"""
        return self.qkv.view(*self.x.shape[:2], 3 * self.block.shape.heads, -1)

    def turned(self) -> tuple[torch.Tensor, ...]:
        """q, k, v [B, heads, T, d] as attention takes them."""
        heads, count = self.heads(), self.block.shape.heads
        n = self.norm("heads", heads[:, :, : 2 * count])
        both = kernels.turned(n, self.block.head_norms, self.rope[0])
        parts = both[:, :, :count], both[:, :, count:], heads[:, :, 2 * count :]
        return tuple(part.transpose(1, 2) for part in parts)

    def attend(self):
        q, k, v = self.turned()
        self.attended = attention.attend(q, k, v, backward=self.train)

    def seen(self) -> torch.Tensor:
        """[N, D], what attention gave."""
        return self.attended.out.transpose(1, 2).reshape(self.rows, self.width)

    def give(self):
        self.o = self.apply("out", self.seen())

    def middle(self) -> torch.Tensor:
        """x1 [B, T, D]. On the way back o has served its turn then."""
        x1 = torch.addcmul(self.x, self.norm("2", self.o.view_as(self.x)), self.m(1))
        self.o = None if self.way_back else self.o
        return x1

    def second(self, x1: torch.Tensor) -> torch.Tensor:
        """[B, T, D], what the feed-forward is given."""
        return self.norm("3", x1) * self.m(2)

    def widen(self, x1: torch.Tensor):
        self.u = self.apply("up", self.second(x1))

    def narrow(self):
        self.d = self.apply("down", kernels.gated(self.u))

    # backward

    def backward(self, g: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Gradients to x, and to the block's parameters. g: to y."""
        self.way_back = True
        x1 = self.fill()
        found: dict[str, list[torch.Tensor]] = {}
        dm: list[torch.Tensor] = [g] * 4
        dx1 = self.feed_backward(g, x1, found, dm)
        del x1
        dx1 += g
        dx = self.attend_backward(dx1, found, dm)
        dx += dx1
        self.time_backward(dm, found)
        return dx, together([one for name in self.block.stacks for one in found[name]], self.block.parameters)

    def back(self, name: str, grad: torch.Tensor, x: torch.Tensor, found: dict) -> Any:
        """To the input of a stack; its parameters' go into `found`."""
        grad, x = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        dx, found[name] = self.block.stacks[name].backward(grad, x, self.hidden.pop(name), wanted=name != "time")
        return dx

    def norm_back(self, name: str, grad: torch.Tensor, number: int, dm: list) -> torch.Tensor:
        """To the input of a norm; to its m goes into `dm`."""
        dx, dm[number] = kernels.scaled_backward(grad, self.n.pop(name), self.inv[name], self.m(number))
        return dx

    def feed_backward(self, g: torch.Tensor, x1: torch.Tensor, found: dict, dm: list) -> torch.Tensor:
        """To x1 by way of the feed-forward."""
        self.norm("4", self.d.view_as(g))
        self.d = None
        dd = self.norm_back("4", g, 3, dm)
        ds = self.back("down", dd, kernels.gated(self.u), found)
        du = kernels.gated_backward(ds, self.u)
        self.u = None
        del ds, dd
        dh = self.back("up", du, self.second(x1), found).view_as(g)
        return self.norm_back("3", dh, 2, dm)

    def attend_backward(self, dx1: torch.Tensor, found: dict, dm: list) -> torch.Tensor:
        """To x by way of attention."""
        do = self.norm_back("2", dx1, 1, dm)
        da = self.back("out", do, self.seen(), found)
        do = da.view(*self.x.shape[:2], self.block.shape.heads, -1).transpose(1, 2)
        del da
        dqkv = self.heads_backward(do)
        self.qkv = None
        del do
        dh = self.back("qkv", dqkv, self.first(), found).view_as(dx1)
        return self.norm_back("1", dh, 0, dm)

    def heads_backward(self, da: torch.Tensor) -> torch.Tensor:
        """[N, 3 D]: to queries, keys and values as the Linear gave them."""
        q, k, v = self.turned()
        d = [one.transpose(1, 2) for one in attention.attend_backward(da, q, k, v, self.attended)]
        del q, k, v
        self.attended = None
        both, dv = torch.cat(d[:2], dim=2), d[2]
        del d, da
        n, inv = self.n.pop("heads"), self.inv["heads"]
        both = kernels.turned_backward(both, n, inv, self.block.head_norms, self.rope[1])
        return torch.cat((both, dv), dim=2).view_as(self.qkv)

    def time_backward(self, dm: list[torch.Tensor], found: dict):
        grad = torch.cat(dm, dim=1).mul_(self.block.norms)
        gates = grad[:, GATES]
        gates.copy_(torch.ops.aten.tanh_backward(gates, self.opening[:, GATES]))
        self.back("time", grad.view(len(grad), -1), self.time, found)


def together(found: list[torch.Tensor], parameters: list[torch.Tensor]) -> list[torch.Tensor]:
    """The gradients in the parameters' dtype, cast in one go."""
    if not found or found[0].dtype == parameters[0].dtype:
        return found
    whole = torch.cat([one.reshape(-1) for one in found]).to(parameters[0].dtype)
    return [part.view_as(one) for part, one in zip(whole.split([one.numel() for one in found]), found)]
