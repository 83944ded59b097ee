"""A block whose backward is written out, against the same maths under autograd."""

from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F

from zturbo import attention, keeping, kernels
from zturbo import stack as stacks
from zturbo.block import Block, Keep, Shape
from zturbo.keeping import Sizes
from zturbo.lowrank import Factors, Part, Target
from zturbo.stack import Stack

WIDTH, INNER, HEADS, TIME, EPS = 32, 48, 2, 8, 1e-5
LINEARS = {  # name: (stack, in, parts)
    "time": ("time", TIME, {"time": 4 * WIDTH}),
    "qkv": ("qkv", WIDTH, {"to_q": WIDTH, "to_k": WIDTH, "to_v": WIDTH}),
    "out": ("out", WIDTH, {"out": WIDTH}),
    "w1": ("up", WIDTH, {"w1": INNER}),
    "w3": ("up", WIDTH, {"w3": INNER}),
    "w2": ("down", INNER, {"w2": WIDTH}),
}
ALL = tuple(name for _, _, parts in LINEARS.values() for name in parts)


@dataclass
class Scene:
    targets: dict[str, Target]
    weights: dict[str, torch.Tensor]
    bias: torch.Tensor  # of the time's Linear
    lora: dict[str, Factors]
    adapter: dict[str, Factors]
    x: torch.Tensor
    time: torch.Tensor
    rope: tuple[torch.Tensor, torch.Tensor]
    norms: torch.Tensor
    head_norms: torch.Tensor
    unread: int = 0

    def block(self, dtype=torch.float32) -> Block:
        found: dict[str, list] = {}
        for name, (stack, *_) in LINEARS.items():
            found.setdefault(stack, []).append((self.targets[name], self.fetch(name)))
        built = {name: Stack(linears, self.lora, dtype) for name, linears in found.items()}
        return Block(Shape(HEADS, EPS, EPS), built, self.norms.to(dtype), self.head_norms)

    def fetch(self, name: str):
        @contextmanager
        def lent(x):
            yield self.weights[name].to(x.dtype), self.bias.to(x.dtype) if name == "time" else None

        return lent

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, self.weights[name], self.bias if name == "time" else None)
        pieces = []
        for part in self.targets[name].parts:
            piece = y[..., part.rows]
            for one in (self.lora.get(part.name), self.adapter.get(part.name)):
                piece = piece if one is None else piece + F.linear(F.linear(x, one.A) * one.scale, one.B)
            pieces.append(piece)
        return torch.cat(pieces, dim=-1)

    def plain(self) -> torch.Tensor:
        """The same, as it stands in the docstring of `block`."""
        x, found = self.x, self.linear("time", self.time).chunk(4, dim=-1)
        scale1, gate1, scale2, gate2 = (one[:, None] for one in found)
        batch, tokens, _ = x.shape
        norm = [F.rms_norm(x, (WIDTH,), self.norms[0], EPS) * (1 + scale1)]
        q, k, v = self.linear("qkv", norm[0]).view(batch, tokens, 3, HEADS, -1).unbind(2)
        q, k = (self.turn(F.rms_norm(one, one.shape[-1:], None, EPS), n) for n, one in enumerate((q, k)))
        seen = F.scaled_dot_product_attention(*(one.transpose(1, 2) for one in (q, k, v)))
        o = self.linear("out", seen.transpose(1, 2).flatten(2))
        x1 = x + gate1.tanh() * F.rms_norm(o, (WIDTH,), self.norms[1], EPS)
        h = F.rms_norm(x1, (WIDTH,), self.norms[2], EPS) * (1 + scale2)
        d = self.linear("w2", F.silu(self.linear("w1", h)) * self.linear("w3", h))
        return x1 + gate2.tanh() * F.rms_norm(d, (WIDTH,), self.norms[3], EPS)

    def turn(self, x: torch.Tensor, which: int) -> torch.Tensor:
        x = x * self.head_norms[which * HEADS : (which + 1) * HEADS]
        turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * self.rope[0]
        return torch.view_as_real(turned).flatten(-2)


def scene(trained=ALL, carried=(), batch=2, scale=1.0, unread=0) -> Scene:
    random = torch.Generator().manual_seed(0)

    def numbers(*shape, factor=0.2):
        return torch.randn(*shape, generator=random) * factor

    targets, weights, lora, adapter = {}, {}, {}, {}
    for name, (_, width, parts) in LINEARS.items():
        start, made = 0, []
        for part, size in parts.items():
            made.append(Part(part, start, size))
            start += size
            if part in trained:
                rank = 3 if part != "to_v" else 2  # so that not all of qkv is one batch
                lora[part] = Factors(numbers(rank, width), numbers(size, rank), scale)
                lora[part].A.requires_grad_(), lora[part].B.requires_grad_()
            if part in carried:
                adapter[part] = Factors(numbers(2, width), numbers(size, 2), 0.7 if part in ("to_k", "w3") else 0.4)
        targets[name], weights[name] = Target(name, width, start, tuple(made)), numbers(start, width)
    angles = torch.rand(7, 1, WIDTH // HEADS // 2, generator=random)
    rope = torch.polar(torch.ones_like(angles), angles)
    x = numbers(batch, 7, WIDTH, factor=1.0).requires_grad_()
    norms, head_norms = 1 + numbers(4, WIDTH), 1 + numbers(2 * HEADS, WIDTH // HEADS)
    turns = rope, rope.conj().resolve_conj()
    time, bias = numbers(batch, TIME), numbers(4 * WIDTH)
    return Scene(targets, weights, bias, lora, adapter, x, time, turns, norms, head_norms, unread)


def run(made: Scene, block: Block | None = None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(output, gradients to x and to the LoRA) of the block, or of the plain maths."""
    if block is not None:
        for stack in block.stacks.values():
            stack.carry(made.adapter)
            for to, source in stack.stale():
                to.copy_(source)
    y = made.plain()[:, made.unread :] if block is None else block(made.x, made.time, made.rope, made.unread)
    wanted = [made.x, *(t for name in sorted(made.lora) for t in (made.lora[name].A, made.lora[name].B))]
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    return y, list(torch.autograd.grad((y * weight).sum(), wanted))


CASES = {
    "lora on all": {},
    "alpha": {"scale": 0.3},
    "some tokens are not read": {"unread": 3},
    "one picture": {"batch": 1},
    "adapter beside it": {"carried": ALL},
    "adapter on some": {"carried": ("to_q", "w3"), "trained": ("to_q", "to_v", "w1")},
    "only the time": {"trained": ("time",)},
    "nothing trained below": {"trained": (), "carried": ("out",)},
}


@pytest.mark.parametrize("keep", Keep)
@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_are_those_of_autograd(case, keep):
    made = scene(**CASES[case])
    block = made.block()
    block.keep = keep
    y, found = run(made, block)
    expected, gradients = run(made)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(found, gradients):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_what_is_kept_changes_no_bit():
    made = scene(carried=ALL)
    outcomes = []
    for keep in Keep:
        block = made.block()
        block.keep = keep
        outcomes.append(run(made, block))
    for y, found in outcomes[1:]:
        assert torch.equal(y, outcomes[0][0])
        assert all(torch.equal(a, b) for a, b in zip(found, outcomes[0][1]))


def test_attention_where_pytorch_chooses_runs_under_autograd(monkeypatch):
    """As on a device without flash attention, and then attention is not kept without q, k and v."""
    made = scene()
    _, expected = run(made)
    monkeypatch.setattr(attention, "attend", by_graph)
    for keep in Keep:
        block = made.block()
        block.keep = keep
        for mine, theirs in zip(run(made, block)[1], expected):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_without_gradients_nothing_is_kept_and_the_output_is_the_same():
    made = scene()
    block = made.block()
    y, _ = run(made, block)
    with torch.no_grad():
        assert torch.equal(block(made.x, made.time, made.rope), y)


def test_an_adapter_that_fades_or_is_taken_off_is_followed():
    made = scene(carried=ALL)
    block = made.block()
    run(made, block)
    for strength in (0.2, 0.0):
        scaled = {name: replace(one, scale=one.scale * strength) for name, one in made.adapter.items()}
        made.adapter = scaled if strength else {}
        y, found = run(made, block)
        expected, gradients = run(made)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[1], gradients[1], rtol=1e-4, atol=1e-5)


def test_bf16_is_as_near_to_fp32_as_autograd_is():
    made = scene()
    _, exact = run(made)
    half = replace(made, x=made.x.detach().bfloat16().requires_grad_(), time=made.time.bfloat16())
    block = half.block(torch.bfloat16)
    _, found = run(half, block)
    for mine, theirs in zip(found, exact):
        assert (mine.float() - theirs).norm() / theirs.norm() < 0.03
    assert {one.dtype for one in found[1:]} == {torch.float32}


SIZES = Sizes(blocks=30, width=3840, inner=10240, heads=30, ranks=112, itemsize=2)


def test_a_plan_keeps_as_much_as_fits():
    least = keeping.plan(SIZES, 4224, 0)
    assert least.bytes <= keeping.needed(SIZES, 4224, (Keep.INPUT,) * 30)
    spared = []
    for free in (0, 3e9, 4e9, 8e9, 12e9, 40e9):
        plan = keeping.plan(SIZES, 4224, free)
        assert plan.bytes <= max(free, least.bytes) and plan.blocks == tuple(sorted(plan.blocks))
        assert plan.bytes == keeping.needed(SIZES, 4224, plan.blocks)
        spared.append(sum(SIZES.spared(keep, 4224) for keep in plan.blocks))
    assert spared == sorted(spared) and spared[-1] > 5 * spared[0] and set(plan.blocks) == {Keep.ALL}


def test_the_last_block_keeps_everything_at_no_cost():
    """Its backward comes first, when all of it is there anyway."""
    assert keeping.plan(SIZES, 4224, 0).blocks[-1] == Keep.ALL
    assert keeping.plan(SIZES, 4224, 1e12, 0).blocks == keeping.plan(SIZES, 4224, 0).blocks


def test_a_plan_by_hand():
    four = keeping.plan(SIZES, 4224, 0, 4)
    assert four.blocks[-4:] == (Keep.ALL,) * 4 and four.blocks[:20] == (Keep.INPUT,) * 20
    assert four.bytes <= keeping.needed(SIZES, 4224, (Keep.INPUT,) * 26 + (Keep.ALL,) * 4)
    assert keeping.plan(SIZES, 4224, 0, 99).blocks == (Keep.ALL,) * 30
    assert "4 of 30 layers are kept" in four.spelled() and "computed twice" in four.spelled()


@pytest.mark.parametrize("keep", Keep)
@pytest.mark.parametrize("unread", [0, 3])
@pytest.mark.parametrize("graph", [False, True])
def test_in_pieces_and_long_strips_it_is_the_same(monkeypatch, keep, unread, graph):
    """As large batches go: the gate's gradient piece by piece, gradients to B lying; by PyTorch's attention, too."""
    monkeypatch.setattr(kernels, "PIECE", 1)
    monkeypatch.setattr(stacks, "LONG", 1)
    made = scene(carried=("to_k", "w3"), unread=unread)
    if graph:
        monkeypatch.setattr(attention, "attend", by_graph)
    block = made.block()
    block.keep = keep
    for stacked in block.stacks.values():
        stacked.carry(made.adapter)
    _, expected = run(made)
    _, found = run(made, block)
    for mine, theirs in zip(found, expected):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def by_graph(q, k, v, backward=True):
    with torch.enable_grad():
        inputs = tuple(one.detach().requires_grad_() for one in (q, k, v))
        out = F.scaled_dot_product_attention(*inputs)
    return attention.Attended(out.detach(), attention.Graph(inputs, out))
