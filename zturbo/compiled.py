"""The functions of `kernels`, each fused into one kernel or a few by torch.compile.

A body is a pure function of plain tensors, in fp32 inside, with one cast at the end; no gradient goes through it, so
the compiler sees no autograd. What a backward needs of n it computes again from x, which is in the kernel anyway.

A body has at most two graphs in a run: one for a single picture, one for several. Each is compiled at TYPICAL tokens,
with their number left open, whatever the first batch is: how a reduction is split depends on the sizes that the
compiler sees, and so would a run's bits on the batch that it begins or goes on with. Kernels are not picked by timing.

The first failure, but for want of memory, sends everything through `kernels` for good.
"""

import importlib
import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from . import kernels
from .errors import readable
from .kernels import Norm

log = logging.getLogger("zturbo")
TYPICAL = 1024  # tokens
DEVICES = ("cuda", "xpu")  # where compiling pays
DETERMINISTIC = "deterministic"  # inductor's setting: no reduction is picked by timing
OPTIONS: dict[str, Any] = {  # inductor's, as far as this PyTorch knows them
    DETERMINISTIC: True,
    "max_autotune": False,
    "max_autotune_pointwise": False,
    "coordinate_descent_tuning": False,
    "benchmark_fusion": False,
    "triton.autotune_pointwise": False,
    "triton.multi_kernel": 0,
    "triton.mix_order_reduction": False,  # is chosen by the number of tokens
    # a second look at the inputs is cheaper than numbers in between that go through memory, in fp32
    "realize_reads_threshold": 64,
    "realize_opcount_threshold": 1000,
    "realize_acc_reads_threshold": 64,
}


# The bodies. Shapes as in `kernels`


def scaled(x: torch.Tensor, m: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(n m, inv)"""
    wide = x.float()
    inv = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * inv * m).to(x.dtype), inv


def added(x: torch.Tensor, y: torch.Tensor, m: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(x + n m, inv), n of y."""
    wide = y.float()
    inv = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (x + wide * inv * m).to(x.dtype), inv


def scaled_backward(
    g: torch.Tensor, x: torch.Tensor, inv: torch.Tensor, m: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of n m, n of x: (to x, to m)."""
    g, n = g.float(), x.float() * inv
    product = g * n
    along = (product * m).mean(-1, keepdim=True)
    return ((g * m - n * along) * inv).to(x.dtype), product.sum(1, keepdim=True).to(x.dtype)


def turned(
    heads: torch.Tensor, weight: torch.Tensor, rope: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(queries and keys, inv). rope: [1, T, 1, d / 2, 2], cosine and sine."""
    wide = heads[:, :, : weight.shape[0]].float()
    inv = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return _turn(wide * inv * weight, rope).to(heads.dtype), inv


def turned_backward(
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    heads: torch.Tensor,
    inv: torch.Tensor,
    weight: torch.Tensor,
    back: torch.Tensor,
) -> torch.Tensor:
    """To heads."""
    count, found = dq.shape[2], []
    for n, g in enumerate((dq, dk)):
        rows = slice(n * count, (n + 1) * count)
        there = inv[:, :, rows]
        wide = heads[:, :, rows].float() * there
        g = _turn(g.float(), back) * weight[rows]
        along = (g * wide).mean(-1, keepdim=True)
        found.append(((g - wide * along) * there).to(heads.dtype))
    return torch.cat((*found, dv), dim=2)


def _turn(x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """(a + ib)(c + is) of pairs that lie beside each other."""
    pairs = x.unflatten(-1, (-1, 2))
    cosine, sine = rope[..., :1], rope[..., 1:]
    sign = 2 * torch.arange(2, device=x.device) - 1
    return (pairs * cosine + pairs.flip(-1) * (sine * sign)).flatten(-2)


def gated(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (F.silu(a.float()) * b.float()).to(a.dtype)


def gated_backward(g: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(to a, to b)"""
    g, wide = g.float(), a.float()
    s = torch.sigmoid(wide)
    return (g * b.float() * s * (1 + wide * (1 - s))).to(a.dtype), (g * wide * s).to(a.dtype)


BODIES = (scaled, added, scaled_backward, turned, turned_backward, gated, gated_backward)


class Compiled:
    """The functions of `kernels`, compiled; of tensors that ask for no gradient, and with gradients off.

    why: the reason why they are not compiled, after a failure.
    """

    def __init__(self, compiler: Callable[[Callable], Callable] | None = None):
        """compiler: in place of torch.compile."""
        self.compiler = compiler or compile_body
        self.bodies: dict[str, Callable] = {}
        self.seen: set[tuple] = set()  # forms that bodies are compiled for
        self.ready: set[tuple] = set()  # arguments, to the number, that go in as they are
        self.why = ""

    def scaled(self, x: torch.Tensor, m: torch.Tensor, norm: Norm) -> torch.Tensor:
        found = self._run(scaled, x, m, norm.eps)
        return kernels.scaled(x, m, norm) if found is None else self._keep(norm, x, *found)

    def added(self, x: torch.Tensor, y: torch.Tensor, m: torch.Tensor, norm: Norm) -> torch.Tensor:
        found = self._run(added, x, y, m, norm.eps)
        return kernels.added(x, y, m, norm) if found is None else self._keep(norm, y, *found)

    def scaled_backward(self, g: torch.Tensor, m: torch.Tensor, norm: Norm) -> tuple[torch.Tensor, torch.Tensor]:
        found = None if norm.x is None else self._run(scaled_backward, g, norm.x, norm.inv, m)
        if found is None:
            return kernels.scaled_backward(g, m, norm)
        norm.x = None
        return found

    def turned(self, heads: torch.Tensor, weight: torch.Tensor, rope: torch.Tensor, norm: Norm) -> torch.Tensor:
        found = self._run(turned, heads, weight, _real(rope), norm.eps)
        if found is None:
            return kernels.turned(heads, weight, rope, norm)
        return self._keep(norm, heads[:, :, : len(weight)], *found)

    def turned_backward(
        self, d: list[torch.Tensor], heads: torch.Tensor, weight: torch.Tensor, back: torch.Tensor, norm: Norm
    ) -> torch.Tensor:
        found = None if norm.x is None else self._run(turned_backward, *d, heads, norm.inv, weight, _real(back))
        if found is None:
            return kernels.turned_backward(d, heads, weight, back, norm)
        d.clear()
        norm.x = None
        return found

    def gated(self, u: list[torch.Tensor]) -> torch.Tensor:
        found = self._run(gated, *(one[None] for one in u))
        return kernels.gated(u) if found is None else found[0]

    def gated_backward(self, g: torch.Tensor, u: list[torch.Tensor]) -> list[torch.Tensor]:
        found = self._run(gated_backward, *(one[None] for one in (g, *u)))
        return kernels.gated_backward(g, u) if found is None else [one[0] for one in found]

    @staticmethod
    def _keep(norm: Norm, x: torch.Tensor, y: torch.Tensor, inv: torch.Tensor) -> torch.Tensor:
        norm.inv, norm.x = inv, x if norm.way_back else None
        return y

    def _run(self, body: Callable, *args) -> Any:
        """What it gives; None where it cannot be compiled."""
        if self.why:
            return None
        try:
            run = self.bodies.get(body.__name__)
            if run is None:
                run = self.bodies[body.__name__] = self.compiler(body)
            exact = torch.are_deterministic_algorithms_enabled(), *map(_exactly, args)
            if (run, exact) in self.ready:
                return run(*args)
            lies = tuple(laid(one, args[0].shape[1]) if isinstance(one, torch.Tensor) else one for one in args)
            self._prepare(run, lies)
            if all(a is b for a, b in zip(args, lies)):
                self.ready.add((run, exact))
            return run(*lies)
        except Exception as error:
            if (memory := out_of_memory(error)) is not None:
                raise memory from None
            self.why = reason(error)
            log.warning("%s", self.sentence(), exc_info=error)
            return None

    def _prepare(self, run: Callable, args: tuple):
        """Compile it for such arguments, where that has not been done."""
        forms = tuple(form(one, *args[0].shape[:2]) if isinstance(one, torch.Tensor) else one for one in args)
        key = run, args[0].device, torch.are_deterministic_algorithms_enabled(), forms
        if key not in self.seen:
            self.seen.add(key)
            run(*(zeros(one, args[0].device) if isinstance(one, Form) else one for one in forms))

    def sentence(self) -> str:
        """For the screen."""
        if self.why:
            return (
                f"Compiling failed ({self.why}). Training goes on without: what is learnt is as good, and a step takes "
                "longer. compile at off spares the next try."
            )
        return "Compiled: norms, gates and rotations run fused. The first steps take longer, while they are compiled."


def compile_body(body: Callable) -> Callable:
    """By torch.compile with its inductor."""
    known = importlib.import_module("torch._inductor").list_options()
    options = {name: value for name, value in OPTIONS.items() if name in known}
    return torch.compile(body, fullgraph=True, dynamic=False, options=options)


class Form(NamedTuple):
    """How a tensor is laid out, with two pictures for several and TYPICAL tokens. left: sizes that are left open."""

    dtype: torch.dtype
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    left: tuple[int, ...]


def laid(one: torch.Tensor, tokens: int) -> torch.Tensor:
    """The same with strides that follow from its sizes, as the compiler wants them even where a size is 1."""
    if one.dim() < 3 or one.shape[1] != tokens:
        return one
    if len(one) == 1:
        return one if one.stride(0) == one.stride(1) * one.shape[1] else one[0][None]
    reach = 1 + sum((size - 1) * stride for size, stride in zip(one.shape, one.stride()))
    return one if reach == one.numel() else one.contiguous()


def form(one: torch.Tensor, batch: int, tokens: int) -> Form:
    sizes, strides, left = tuple(one.shape), one.stride(), tuple[int, ...]()
    if len(sizes) >= 3:
        if sizes[0] == batch > 1:
            sizes, left = (2, *sizes[1:]), (0,)
        if sizes[1] == tokens > 1:
            strides = tuple(n // tokens * TYPICAL if n > strides[1] else n for n in strides)
            sizes, left = (sizes[0], TYPICAL, *sizes[2:]), (*left, 1)
    return Form(one.dtype, sizes, strides, left)


def zeros(like: Form, device: torch.device) -> torch.Tensor:
    made = torch.empty_strided(like.sizes, like.strides, dtype=like.dtype, device=device).zero_()
    for dimension in like.left:
        torch._dynamo.mark_dynamic(made, dimension)
    return made


def _exactly(one) -> Any:
    return (one.shape, one.stride(), one.dtype, one.device) if isinstance(one, torch.Tensor) else one


def _real(rope: torch.Tensor) -> torch.Tensor:
    """[T, 1, d / 2] complex -> [1, T, 1, d / 2, 2]"""
    return torch.view_as_real(rope)[None]


def out_of_memory(error: BaseException | None) -> BaseException | None:
    """That which says so, of an error and of those behind it."""
    while error is not None and not isinstance(error, torch.OutOfMemoryError | MemoryError):
        error = getattr(error, "inner_exception", None) or error.__cause__ or error.__context__
    return error


def reason(error: BaseException) -> str:
    """In a line."""
    error = getattr(error, "inner_exception", None) or error
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return readable(f"{type(error).__name__}: {said}"[:200].rstrip(": "))


@lru_cache(1)
def shared() -> Compiled:
    """The one of this process: compiling takes long, and a failure stays one."""
    return Compiled()


def why_not(device: torch.device, wish: str, repeat: str) -> str:
    """Why compiling is not tried, or nothing. wish and repeat: as in the recipe."""
    if wish == "off":
        return "compile is off"
    if wish == "auto" and device.type not in DEVICES:
        return "it pays on NVIDIA, AMD and Intel cards alone"
    if wish == "auto" and not _has_triton():
        return "Triton is not installed"
    if device.type != "cpu" and repeat == "exact" and not _repeats():
        return "this PyTorch cannot promise the same bits of compiled kernels, and repeat is exact"
    return ""


def _has_triton() -> bool:
    try:
        importlib.import_module("triton")
    except Exception:  # an installation may be broken in any way
        return False
    return True


def _repeats() -> bool:
    return DETERMINISTIC in importlib.import_module("torch._inductor").list_options()
