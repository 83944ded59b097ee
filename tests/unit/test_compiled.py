"""The fused elementwise parts of a block beside those that run one by one, compiled by inductor for this CPU.

From a machine's first use on, this takes half a minute; before it, inductor makes a header for the compiler.
"""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

sys.path.append(str(Path(__file__).parent))
from conftest import missing
from test_block import CASES, EPS, HEADS, WIDTH, Scene, run, scene

from zturbo import compiled, kernels
from zturbo.block import Keep
from zturbo.compiled import BODIES, Compiled
from zturbo.kernels import Norm

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
SIDE = WIDTH // HEADS


@pytest.fixture(scope="module")
def ops() -> Compiled:
    """Compiled once for all tests."""
    try:
        torch._inductor.cpp_builder.get_cpp_compiler()
    except Exception:
        missing("needs a C++ compiler: apt install g++, or on a Mac xcode-select --install")
    return Compiled()


def plain() -> Compiled:
    """The same bodies, not compiled."""
    return Compiled(lambda body: body)


def numbers(*shape, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(dtype)


def parts(of, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What every function of `of` gives, and the backwards after their forwards."""
    torch.manual_seed(0)
    x, y, g = (numbers(2, 7, WIDTH, dtype=dtype) for _ in range(3))
    m, gu = numbers(2, 4, WIDTH, dtype=dtype)[:, 1:2], numbers(14, 48, dtype=dtype)
    u = [numbers(14, 48, dtype=dtype) for _ in range(2)]
    heads, weight = numbers(2, 7, 3 * HEADS, SIDE, dtype=dtype), numbers(2 * HEADS, SIDE)
    d = [numbers(2, 7, HEADS, SIDE, dtype=dtype) for _ in range(3)]
    rope = torch.polar(torch.ones(7, 1, SIDE // 2), torch.rand(7, 1, SIDE // 2))
    first, second, third = Norm(EPS), Norm(EPS), Norm(EPS)
    for norm in (first, second, third):
        norm.way_back = True
    return {
        "scaled": of.scaled(x, m, first),
        "added": of.added(x, y, m, second),
        "turned": of.turned(heads, weight, rope, third),
        "inv": torch.cat([norm.inv.flatten() for norm in (first, second, third)]),
        "gated": of.gated(u),
        "scaled_backward": of.scaled_backward(g, m, first)[0],
        "to m": of.scaled_backward(g, m, second)[1],
        "turned_backward": of.turned_backward(d, heads, weight, rope.conj().resolve_conj(), third),
        "gated_backward": torch.cat(of.gated_backward(gu.clone(), [one.clone() for one in u])),
    }


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@torch.no_grad()
def test_every_body_gives_what_its_eager_counterpart_gives(ops, dtype):
    found, expected = parts(ops, dtype), parts(kernels, dtype)
    assert not ops.why and {body.__name__ for body in BODIES} <= set(ops.bodies)
    for name, theirs in expected.items():
        assert found[name].dtype == theirs.dtype and found[name].shape == theirs.shape, name
        error = (found[name] - theirs).float().abs().max() / theirs.float().abs().max()
        assert error < TOLERANCE[dtype], (name, error)


def shorter(made: Scene, tokens: int) -> Scene:
    x = made.x.detach()[:, :tokens].clone().requires_grad_()
    return replace(made, x=x, rope=tuple(one[:tokens] for one in made.rope))


def test_a_block_gives_autograds_gradients_with_two_graphs_a_body_at_most(ops):
    before = counters["stats"]["unique_graphs"]
    for batch in (1, 2):
        for tokens in (7, 5):
            made = shorter(scene(carried=("to_q", "w3"), batch=batch), tokens)
            alike(made, run(made), ops)
    assert not ops.why
    assert counters["stats"]["unique_graphs"] - before <= 2 * len(BODIES)


def alike(made: Scene, expected, ops):
    block = made.block()
    block.ops = ops
    for block.keep in Keep:
        y, found = run(made, block)
        torch.testing.assert_close(y, expected[0], rtol=1e-5, atol=1e-5)
        for mine, theirs in zip(found, expected[1]):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_the_bodies_themselves_give_autograds_gradients(case):
    made, ops = scene(**CASES[case]), plain()
    alike(made, run(made), ops)
    assert not ops.why


def broken(error: Exception):
    """A compiler that fails, as torch.compile hands that on."""

    def backend(graph, inputs):
        raise error

    return lambda body: torch.compile(body, backend=backend)


@pytest.mark.parametrize("from_the_start", [True, False])
def test_where_compiling_fails_the_numbers_are_the_same_and_it_is_said(from_the_start):
    """Also in mid-block: the forward was fused and its backward is not."""
    fails = broken(RuntimeError("no such compiler\nand more"))
    ops = Compiled(lambda body: fails(body) if from_the_start or body.__name__ == "gated_backward" else body)
    made = scene()
    alike(made, run(made), ops)
    assert ops.why == "RuntimeError: no such compiler"
    assert ops.sentence().startswith("Compiling failed (RuntimeError: no such compiler). Training goes on without")
    block, eager = made.block(), made.block()
    block.ops = ops
    for mine, theirs in zip(run(made, block)[1], run(made, eager)[1]):
        assert torch.equal(mine, theirs)


def test_memory_that_runs_out_is_no_failure_of_the_compiler():
    ops = Compiled(broken(torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(torch.OutOfMemoryError), torch.no_grad():
        ops.gated([numbers(4, 8), numbers(4, 8)])
    assert not ops.why


def test_where_it_is_tried(monkeypatch):
    cpu, card = torch.device("cpu"), torch.device("cuda")
    assert compiled.why_not(cpu, "auto", "exact") and not compiled.why_not(cpu, "on", "exact")
    assert compiled.why_not(card, "off", "exact") == "compile is off"
    monkeypatch.setitem(sys.modules, "triton", None)
    assert compiled.why_not(card, "auto", "exact") == "Triton is not installed"
    monkeypatch.setattr(compiled, "DETERMINISTIC", "a setting of another PyTorch")
    assert "same bits" in compiled.why_not(card, "on", "exact") and not compiled.why_not(card, "on", "fast")
