"""Linears that read the same input, with every low-rank difference on them: the LoRA and the adapter's branch.

All A's are one matrix, so the input is read once for them, and kept once; B's of the same shape are one batch. The
backward is written out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from .lowrank import Factors, Fetch, Target

LARGE = 2**26  # multiplications; below, a call's own cost is more than what is won
LONG = 2**20  # numbers
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@dataclass
class Low:
    """A low-rank difference in a stack. rows: of its Linear's output; columns: of the stack's hidden numbers A x."""

    factors: Factors
    linear: int
    rows: slice
    columns: slice
    trained: bool


class Group:
    """Differences of one shape and scale that lie beside each other on one Linear."""

    def __init__(self, lows: list[Low], dtype: torch.dtype):
        self.lows, self.scale, self.trained, self.count = lows, lows[0].factors.scale, lows[0].trained, len(lows)
        self.linear = lows[0].linear
        self.rows = slice(lows[0].rows.start, lows[-1].rows.stop)
        self.columns = slice(lows[0].columns.start, lows[-1].columns.stop)
        found = [low.factors.B.detach().to(dtype) for low in lows]
        self.B = found[0] if self.count == 1 else torch.stack(found)  # [out, rank] or [count, out, rank]

    def split(self, tensor: torch.Tensor) -> torch.Tensor:
        """[N, count * size] -> [count, N, size]"""
        return tensor.unflatten(1, (self.count, -1)).transpose(0, 1)

    def add(self, hidden: torch.Tensor, outputs: list[torch.Tensor]):
        """outputs += scale B hidden."""
        hidden, output = hidden[:, self.columns], outputs[self.linear][:, self.rows]
        if self.count == 1:
            output.addmm_(hidden, self.B.T, alpha=self.scale)
        else:
            self.split(output).baddbmm_(self.split(hidden), self.B.transpose(1, 2), alpha=self.scale)

    def down(self, grads: list[torch.Tensor], hidden: torch.Tensor):
        """hidden = scale B^T grads."""
        grad, hidden = grads[self.linear][:, self.rows], hidden[:, self.columns]
        if self.count == 1:
            torch.addmm(hidden, grad, self.B, beta=0, alpha=self.scale, out=hidden)
        else:
            self.split(hidden).baddbmm_(self.split(grad), self.B, beta=0, alpha=self.scale)

    def gradient(self, grads: list[torch.Tensor], hidden: torch.Tensor) -> list[torch.Tensor]:
        """To each B."""
        grad, hidden = grads[self.linear][:, self.rows], hidden[:, self.columns]
        if self.count > 1:
            found = self.split(grad).transpose(1, 2) @ self.split(hidden)
        elif grad.numel() >= LONG:  # a long strip is quicker made lying, but for the call that turns it
            found = (hidden.T @ grad).T.contiguous()
        else:
            found = grad.T @ hidden
        found = found if self.scale == 1 else found.mul_(self.scale)
        return [found] if self.count == 1 else list(found.unbind())


class Stack:
    """See above. N rows of input at once; `parameters` are the trained A's and then the B's, fp32."""

    def __init__(self, linears: list[tuple[Target, Fetch]], lora: Mapping[str, Factors], dtype: torch.dtype):
        """lora: what is trained, by the parts' names. dtype: that the input has."""
        self.linears, self.dtype = linears, dtype
        self.trained = self._place(lora, start=0, trained=True)
        self.rank = self.trained[-1].columns.stop if self.trained else 0
        self.parameters = [low.factors.A for low in self.trained] + [low.factors.B for low in self.trained]
        self.adapter: Mapping[str, Factors] = {}
        self._take(self.trained)

    def _place(self, factors: Mapping[str, Factors], start: int, trained: bool) -> list[Low]:
        lows = []
        for number, (target, _) in enumerate(self.linears):
            for part in target.parts:
                if part.name in factors:
                    one = factors[part.name]
                    rows = slice(part.start, part.start + part.size)
                    lows.append(Low(one, number, rows, slice(start, start + one.rank), trained))
                    start += one.rank
        return lows

    def carry(self, adapter: Mapping[str, Factors]) -> bool:
        """Take these frozen differences too, in place of those before. True: the matrices lie elsewhere now."""
        if adapter is self.adapter:
            return False
        before = self.lows[len(self.trained) :]
        lows = self._place(adapter, self.rank, trained=False)
        self.adapter = adapter
        if len(before) == len(lows) and all(a.factors.A is b.factors.A for a, b in zip(before, lows)):
            scales = {(low.linear, low.rows.start): low.factors.scale for low in lows}
            for group in self.groups:  # the same at another strength
                group.scale = group.scale if group.trained else scales[group.linear, group.rows.start]
            return False
        self._take(self.trained + lows)
        return True

    @torch.no_grad()
    def _take(self, lows: list[Low]):
        self.lows = lows
        grouped: list[list[Low]] = []
        for low in lows:
            if grouped and beside(grouped[-1], low):
                grouped[-1].append(low)
            else:
                grouped.append([low])
        self.groups = [Group(one, self.dtype) for one in grouped]
        self.A: Any = None  # [ranks, in] in the input's dtype, where there are differences
        if len(lows) == 1:
            self.A = lows[0].factors.A.detach().to(self.dtype)
        elif lows:
            self.A = torch.cat([low.factors.A.to(self.dtype) for low in lows])

    def stale(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(to, from) of the trained numbers that are not read where they lie: to be copied when they have changed."""
        pairs = [(self.A[low.columns], low.factors.A.detach()) for low in self.trained]
        for group in self.groups:
            places = [group.B] if len(group.lows) == 1 else group.B
            pairs += [(to, low.factors.B.detach()) for to, low in zip(places, group.lows) if group.trained]
        return [(to, source) for to, source in pairs if to.data_ptr() != source.data_ptr()]

    def forward(self, x: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """x: [N, in]. Gives the Linears' outputs, each [N, out], and A x [N, ranks]."""
        outputs = []
        for _, fetch in self.linears:
            with fetch(x) as (weight, bias):
                outputs.append(product(x, weight, bias))
        if not self.lows:
            return outputs, None
        hidden = x @ self.A.T
        for group in self.groups:
            group.add(hidden, outputs)
        return outputs, hidden

    def learn(
        self, grads: list[torch.Tensor], x: torch.Tensor, hidden: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """Gradients to A x, and to `parameters`. grads: to the outputs. x: as `forward` was given it."""
        if hidden is None:
            return None, []
        down = torch.empty_like(hidden)
        for group in self.groups:
            group.down(grads, down)
        if not self.trained:
            return down, []
        dA = down[:, : self.rank].T @ x
        dB = [one for group in self.groups if group.trained for one in group.gradient(grads, hidden)]
        return down, [dA[low.columns] for low in self.trained] + dB

    def through(self, grads: list[torch.Tensor], down: torch.Tensor | None) -> torch.Tensor:
        """Gradient to x [N, in]. down: to A x."""
        dx: Any = None
        for (_, fetch), grad in zip(self.linears, grads):
            with fetch(grad) as (weight, _):
                if dx is None or by_onednn(grad, weight.T):
                    more = product(grad, weight.T)
                    dx = more if dx is None else dx.add_(more)
                else:
                    dx.addmm_(grad, weight)
        return dx if down is None else dx.addmm_(down, self.A)


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x weight^T + bias. x: [N, in], weight: [out, in]."""
    if by_onednn(x, weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def by_onednn(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Is oneDNN to do it? In fp32 on a CPU PyTorch takes MKL, which is slower on some processors and no faster."""
    large = x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() * weight.shape[0] >= LARGE
    return large and ONEDNN


def beside(group: list[Low], low: Low) -> bool:
    """Can it be in a batch with these: of one shape, scale and kind, and next to the last of them?"""
    last = group[-1]
    alike = low.factors.B.shape == last.factors.B.shape and low.factors.scale == last.factors.scale
    next_to = low.rows.start == last.rows.stop and low.columns.start == last.columns.stop
    return alike and next_to and (low.trained, low.linear) == (last.trained, last.linear)
