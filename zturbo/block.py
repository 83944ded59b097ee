"""A transformer block of Z-Image with its LoRA: forward and backward written out.

What autograd would do in some hundred small operations and with everything kept is here one autograd function: the
frozen weights are borrowed (`lowrank.Fetch`), all A's that read the same input are one matrix, the elementwise parts
are those of `kernels` or `compiled`, and what is kept for the backward is chosen (`Keep`). The block is NextDiT's
(arXiv 2406.18583) with Z-Image's modulation by the time:

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
import torch.nn.functional as F

from . import attention, kernels
from .kernels import Norm
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
        self.ops: Any = kernels  # or a Compiled

    def __call__(self, x: torch.Tensor, time: torch.Tensor, rope: Rope, start: int = 0) -> torch.Tensor:
        """x: [B, T, D]; time: [B, E], embedded; rope: as in `kernels.turned`, and its conjugate. Gives [B, T, D].

        start: tokens at the beginning whose output nobody reads, and which is not computed.
        """
        if torch.is_grad_enabled() and (x.requires_grad or self.parameters):
            return BlockFunction.apply(self, x, time, rope, start, *self.parameters)
        with torch.no_grad():
            return Pass(self, x, time, rope, start, backward=False).forward()


class BlockFunction(torch.autograd.Function):
    """A block as autograd sees it. Its backward runs once."""

    @staticmethod
    def forward(ctx, block: Block, x: torch.Tensor, time: torch.Tensor, rope: Rope, start: int, *parameters):
        ctx.run = Pass(block, x, time, rope, start)
        y = ctx.run.forward()
        ctx.run.forget(block.keep)
        return y

    @staticmethod
    def backward(ctx, g: torch.Tensor):
        run, ctx.run = ctx.run, None
        dx, found = run.backward(g.contiguous())
        return None, dx if ctx.needs_input_grad[1] else None, None, None, None, *found


class Pass:
    """Once through a block, and back."""

    def __init__(
        self, block: Block, x: torch.Tensor, time: torch.Tensor, rope: Rope, start: int, backward: bool = True
    ):
        self.block, self.x, self.time, self.ops = block, x.detach(), time, block.ops
        self.rope, self.start = rope, start
        self.train, self.way_back = backward, False
        self.width = x.shape[2]
        self.hidden: dict[str, torch.Tensor | None] = {}  # A x of each stack
        self.found: dict[str, list[torch.Tensor]] = {}  # gradients to the parameters of each stack
        self.dm: dict[int, torch.Tensor] = {}  # and to each m
        self.norms = [Norm(block.shape.eps) for _ in range(4)]
        self.head_norm = Norm(block.shape.head_eps)
        # Any: not there before they are computed, and behind their last use
        self.qkv: Any = None  # [N, 3 D]
        self.attended: Any = None  # attention.Attended
        self.o: Any = None  # [N, D], what is normed into x1
        self.u: Any = None  # [N, F] twice
        self.d: Any = None  # [N, D], what is normed into y

    def forward(self) -> torch.Tensor:
        self.modulate()
        self.look()
        self.give()
        x1 = self.middle()
        self.widen(x1)
        self.narrow()
        return self.ops.added(x1, self.d.view_as(x1), self.m(3), self.norms[3])

    def forget(self, keep: Keep):
        """Drop what this choice does not keep. Attention that runs under autograd is dropped with q, k and v."""
        for name in FORGOTTEN[keep]:
            setattr(self, name, None)
        if keep == Keep.ATTENTION and not self.attended.light:
            self.attended = None

    def fill(self):
        """Compute again what was dropped."""
        if self.qkv is None:
            self.look()
        elif self.attended is None:
            self.attend()
        if self.o is None:
            self.give()
        x1 = self.middle()
        if self.u is None:
            self.widen(x1)
        if self.norms[2].n is None:
            self.norms[2].x = x1
        del x1
        if self.d is None:
            self.narrow()

    # the parts

    def apply(self, name: str, x: torch.Tensor) -> list[torch.Tensor]:
        """x through a stack. [..., in] -> [N, out] of each Linear."""
        outputs, self.hidden[name] = self.block.stacks[name].forward(x.reshape(-1, x.shape[-1]))
        return outputs

    def only(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """The same of a stack of one Linear."""
        return self.apply(name, x)[0]

    def m(self, number: int) -> torch.Tensor:
        """[B, 1, D]"""
        return self.factors[:, number : number + 1]

    def modulate(self):
        self.opening = self.only("time", self.time).view(-1, 4, self.width)
        self.opening[:, SCALES].add_(1)
        self.opening[:, GATES].tanh_()
        self.factors = self.opening * self.block.norms

    def first(self) -> torch.Tensor:
        """[B, T, D], what queries, keys and values are made of."""
        return self.ops.scaled(self.x, self.m(0), self.norms[0])

    def look(self):
        """Queries, keys and values; and attention, where it is not kept."""
        self.qkv = self.only("qkv", self.first())
        if self.way_back:
            self.norms[0].rest(self.x)  # not before attention's own way back
        if self.attended is None:
            self.attend()

    def heads(self) -> torch.Tensor:
        """[B, T, 3 heads, d]"""
        return self.qkv.view(*self.x.shape[:2], 3 * self.block.shape.heads, -1)

    def turned(self) -> tuple[torch.Tensor, ...]:
        """q, k, v [B, heads, T, d] as attention takes them; of q the tokens that are read."""
        heads, count = self.heads(), self.block.shape.heads
        both = self.ops.turned(heads, self.block.head_norms, self.rope[0], self.head_norm)
        parts = both[:, self.start :, :count], both[:, :, count:], heads[:, :, 2 * count :]
        return tuple(part.transpose(1, 2) for part in parts)

    def attend(self):
        q, k, v = self.turned()
        self.attended = attention.attend(q, k, v, backward=self.train)
        if self.way_back:
            self.head_norm.rest(self.heads()[:, :, : len(self.block.head_norms)])

    def seen(self) -> torch.Tensor:
        """[N, D], what attention gave, of the tokens that are read."""
        return self.attended.out.transpose(1, 2).reshape(-1, self.width)

    def give(self):
        self.o = self.only("out", self.seen())

    def middle(self) -> torch.Tensor:
        """x1 [B, T, D]. On the way back o has served its turn then."""
        x = self.x[:, self.start :]
        x1 = self.ops.added(x, self.o.view(x.shape), self.m(1), self.norms[1])
        self.o = None if self.way_back else self.o
        return x1

    def second(self, x1: torch.Tensor | None) -> torch.Tensor:
        """[B, T, D], what the feed-forward is given. x1: None where its norm has n."""
        return self.ops.scaled(x1, self.m(2), self.norms[2])

    def widen(self, x1: torch.Tensor):
        self.u = self.apply("up", self.second(x1))

    def narrow(self):
        self.d = self.only("down", self.ops.gated(self.u))

    # backward

    def backward(self, g: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Gradients to x, and to the block's parameters. g: to y."""
        self.way_back = True
        for norm in (*self.norms, self.head_norm):
            norm.way_back = True
        self.fill()
        dx1 = self.feed_backward(g)
        dx1 += g
        dx = self.attend_backward(dx1)
        dx[:, self.start :] += dx1
        self.time_backward()
        return dx, together([one for name in self.block.stacks for one in self.found[name]], self.block.parameters)

    def back(self, name: str, grads: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """To the input of a stack, and to its parameters. grads: to the Linears' outputs."""
        return self.through(name, grads, self.learn(name, grads, x))

    def learn(self, name: str, grads: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor | None:
        """To the parameters of a stack. Gives that to A x. x may go then."""
        x = x.reshape(-1, x.shape[-1])
        down, self.found[name] = self.block.stacks[name].learn(rows(grads), x, self.hidden.pop(name))
        return down

    def through(self, name: str, grads: list[torch.Tensor], down: torch.Tensor | None) -> torch.Tensor:
        """To the input of a stack."""
        return self.block.stacks[name].through(rows(grads), down)

    def norm_back(self, number: int, grad: torch.Tensor) -> torch.Tensor:
        """To the input of a norm, and to its m."""
        dx, self.dm[number] = self.ops.scaled_backward(grad, self.m(number), self.norms[number])
        return dx

    def feed_backward(self, g: torch.Tensor) -> torch.Tensor:
        """To x1 by way of the feed-forward."""
        self.norms[3].x, self.d = self.d.view_as(g), None
        dd = self.norm_back(3, g)
        down = self.learn("down", [dd], self.ops.gated(self.u))
        ds = self.through("down", [dd], down)
        del dd, down
        du = self.ops.gated_backward(ds, self.u)
        self.u = None
        del ds
        dh = self.back("up", du, self.second(self.norms[2].x)).view_as(g)
        return self.norm_back(2, dh)

    def attend_backward(self, dx1: torch.Tensor) -> torch.Tensor:
        """To x by way of attention."""
        do = self.norm_back(1, dx1)
        da = self.back("out", [do], self.seen())
        do = da.view(len(self.x), -1, self.block.shape.heads, self.width // self.block.shape.heads)
        del da
        dqkv = self.heads_backward(do.transpose(1, 2))
        self.qkv = None
        del do
        dh = self.back("qkv", [dqkv], self.first()).view_as(self.x)
        return self.norm_back(0, dh)

    def heads_backward(self, da: torch.Tensor) -> torch.Tensor:
        """[N, 3 D]: to queries, keys and values as the Linear gave them."""
        q, k, v = self.turned()
        d = [one.transpose(1, 2) for one in attention.attend_backward(da, q, k, v, self.attended)]
        if self.start:
            d[0] = F.pad(d[0], (0, 0, 0, 0, self.start, 0))
        del q, k, v
        self.attended = None
        del da
        grads = self.ops.turned_backward(d, self.heads(), self.block.head_norms, self.rope[1], self.head_norm)
        return grads.view_as(self.qkv)

    def time_backward(self):
        grad = torch.cat([self.dm[number] for number in range(4)], dim=1).mul_(self.block.norms)
        gates = grad[:, GATES]
        gates.copy_(torch.ops.aten.tanh_backward(gates, self.opening[:, GATES]))
        self.learn("time", [grad.view(len(grad), -1)], self.time)


def rows(grads: list[torch.Tensor]) -> list[torch.Tensor]:
    """[..., out] -> [N, out]"""
    return [grad.reshape(-1, grad.shape[-1]) for grad in grads]


def together(found: list[torch.Tensor], parameters: list[torch.Tensor]) -> list[torch.Tensor]:
    """The gradients in the parameters' dtype, cast in one go."""
    if not found or found[0].dtype == parameters[0].dtype:
        return found
    whole = torch.cat([one.reshape(-1) for one in found]).to(parameters[0].dtype)
    return [part.view_as(one) for part, one in zip(whole.split([one.numel() for one in found]), found)]
