"""The fast way through NextDiT beside its own modules: the same velocity and gradients, and a third of the launches."""

import sys
from dataclasses import replace
from pathlib import Path

import comfy.ldm.lumina.model
import pytest
import torch

sys.path.append(str(Path(__file__).parent))
from test_host import de_distilled, pictures, recipe

from bench import launches
from zturbo import compiled, lowrank, memory, network
from zturbo.block import Keep
from zturbo.hosts import comfy_blocks, comfy_needs
from zturbo.hosts.comfy import ComfyHost
from zturbo.recipe import Compute

# launches and casts of a step as they were when everything went through the modules under autograd
BEFORE = {
    ("merged", "fp32", True): (1627, 21),
    ("merged", "fp32", False): (1396, 21),
    ("merged", "bf16", True): (1849, 260),
    ("merged", "bf16", False): (1558, 200),
    ("branch", "fp32", True): (1819, 21),
    ("branch", "fp32", False): (1516, 21),
    ("branch", "bf16", True): (2041, 260),
    ("branch", "bf16", False): (1678, 200),
}


@pytest.mark.parametrize("way", BEFORE, ids=lambda way: launches.spelled(*way))
def test_a_step_has_a_third_of_the_launches_and_casts(way):
    found, casts = launches.count(*way)
    assert found.total() <= BEFORE[way][0] / 3, found.most_common()
    assert casts <= BEFORE[way][1] / 3


def velocity(tiny, wish, slow=False, factor=1.0, batch=3):
    """(v, gradients, the host) of a few pictures with a LoRA that is no zero."""
    model, clip, vae = tiny
    host = ComfyHost(de_distilled(model), clip, vae, wish)
    host.encode(pictures(), pictures().captions())
    lora = network.create(host.targets, wish.network, 0)
    random = torch.Generator().manual_seed(0)
    for one in lora.values():
        one.B.data.normal_(std=0.1, generator=random)
    host.steps.why_not = "slow" if slow else ""
    x = torch.randn(batch, 16, 16, 12, generator=random)
    with host.training(lora) as at:
        assert (host.steps.fast is None) == slow
        v = at(x, torch.linspace(0.2, 0.8, batch), tuple(range(batch)), factor)
        v.square().mean().backward()
    return v.detach(), [one.grad for one in lowrank.parameters(lora)], host


@pytest.mark.parametrize("keep_layers", [-1, 0, 1])
@pytest.mark.parametrize("way", ["merged", "branch"])
@pytest.mark.parametrize("factor", [1.0, 0.0])
def test_both_ways_agree(tiny, way, factor, keep_layers):
    wish = replace(recipe(way), compute=replace(Compute("fp32", True, way), keep_layers=keep_layers))
    fast, fast_grads, _ = velocity(tiny, wish, factor=factor)
    slow, slow_grads, _ = velocity(tiny, wish, slow=True, factor=factor)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-4)
    for a, b in zip(fast_grads, slow_grads):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())


def test_what_is_kept_changes_no_bit(tiny):
    outcomes = []
    for keep_layers in (-1, 0, 2):
        wish = replace(recipe(), compute=replace(Compute("fp32", True, "merged"), keep_layers=keep_layers))
        outcomes.append(velocity(tiny, wish)[:2])
    for v, grads in outcomes[1:]:
        assert torch.equal(v, outcomes[0][0]) and all(map(torch.equal, grads, outcomes[0][1]))


def test_the_plan_is_told_once_and_follows_the_recipe(tiny):
    for compute, first in (
        (Compute("fp32", False, "merged"), Keep.ALL),
        (Compute("fp32", True, "merged"), Keep.ALL),  # all of the tiny model fits
        (Compute("fp32", True, "merged", keep_layers=0), Keep.INPUT),
    ):
        _, _, host = velocity(tiny, replace(recipe(), compute=compute))
        assert host.steps.keeping.blocks[0] == first
        assert len(host.told()) == 1 and host.told() == []
        gave = [] if host.steps.recomputes else [host.save_memory()]
        assert gave == [memory.RECOMPUTING] * (first == Keep.ALL) and host.steps.recomputes
        assert not host.frugal and host.save_memory() == "one picture at a time" and host.frugal


def test_too_little_memory_for_everything_keeps_less(tiny, monkeypatch):
    wish = replace(recipe(), compute=Compute("fp32", True, "merged"))
    _, _, host = velocity(tiny, wish)
    whole = host.steps.keeping.bytes
    for share, most in ((2.0, Keep.ALL), (0.9, Keep.ATTENTION), (0.0, Keep.INPUT)):
        monkeypatch.setattr(comfy_needs, "free", lambda host, share=share: share * whole + beside(host))
        v, _, host = velocity(tiny, wish)
        assert min(host.steps.keeping.blocks) <= most
        assert share == 0.0 or host.steps.keeping.bytes <= share * whole


def beside(host) -> float:
    numbers = network.count(host.targets, host.recipe.network)
    return memory.total(comfy_needs.of_step(host, numbers, host.tokens(None), 0.0))


def test_a_layer_that_computes_something_else_is_noticed(tiny, monkeypatch):
    """As when a later ComfyUI changes NextDiT: training goes on through its own modules, and that is said."""
    before = comfy.ldm.lumina.model.JointTransformerBlock.forward

    def other(self, x, *args, **options):
        return before(self, x, *args, **options) * 1.2

    wish = recipe()
    monkeypatch.setattr(comfy.ldm.lumina.model.JointTransformerBlock, "forward", other)
    fast, _, host = velocity(tiny, wish)
    assert host.steps.fast is None
    assert any("own modules" in sentence for sentence in host.told())
    slow, _, _ = velocity(tiny, wish, slow=True)
    assert torch.equal(fast, slow)


def test_other_forms_go_through_the_modules(tiny):
    model, clip, vae = tiny
    wish = replace(recipe("branch"), network=replace(recipe().network, kind="dora"))
    host = ComfyHost(de_distilled(model), clip, vae, wish)
    lora = network.create(host.targets, wish.network, 0, norms=host.norms)
    assert "kind" in comfy_blocks.usable(host.dit, lora, host.device)
    assert "mps" in comfy_blocks.usable(host.dit, {}, torch.device("mps"))
    assert not comfy_blocks.usable(host.dit, {}, host.device)


def broken(body):
    def run(*args):
        raise RuntimeError("no compiler")

    return run


@pytest.mark.parametrize("compiler, said", [(lambda body: body, "Compiled"), (broken, "(RuntimeError: no compiler)")])
def test_compiling_is_said_and_changes_nothing_but_rounding(tiny, monkeypatch, compiler, said):
    """The bodies as they are handed to the compiler; tests/unit/test_compiled.py compiles them."""
    ours = compiled.Compiled(compiler)
    monkeypatch.setattr(compiled, "shared", lambda: ours)
    wish = replace(recipe(), compute=Compute("fp32", True, "merged", compile="off"))
    eager, eager_grads, host = velocity(tiny, wish)
    assert not any("ompil" in sentence for sentence in host.told()) and not ours.bodies
    v, grads, host = velocity(tiny, replace(wish, compute=replace(wish.compute, compile="on")))
    assert [said in sentence for sentence in host.told()].count(True) == 1 and host.told() == []
    assert ours.bodies
    torch.testing.assert_close(v, eager, rtol=1e-4, atol=1e-4)
    for a, b in zip(grads, eager_grads):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())
