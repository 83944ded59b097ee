"""zturbo.lowrank against dense matrices: W + sum of scale * B @ A, values and gradients."""

from contextlib import nullcontext

import torch
from torch import nn

from zturbo import lowrank, network
from zturbo.lorafile import module_targets
from zturbo.lowrank import Factors
from zturbo.recipe import Network

QKV = module_targets("layers.0.attention.qkv", 12, 36)


def linear(out: int, bias: bool = False) -> nn.Linear:
    return nn.Linear(12, out, bias=bias).requires_grad_(False)


def fetch(module):
    return lambda x: nullcontext((module.weight, module.bias))


def random_lora(rank: int, scale: float, trainable: bool) -> dict[str, Factors]:
    return {
        p.name: Factors(
            torch.randn(rank, 12).requires_grad_(trainable), torch.randn(p.size, rank).requires_grad_(trainable), scale
        )
        for p in QKV.parts
    }


def dense(lora) -> torch.Tensor:
    return torch.cat([lora[part.name].scale * lora[part.name].B @ lora[part.name].A for part in QKV.parts])


def test_fused_qkv_with_adapter_and_lora_equals_the_dense_sum_in_value_and_gradient():
    torch.manual_seed(0)
    module, x = linear(36), torch.randn(2, 5, 12, requires_grad=True)
    adapter, lora = random_lora(3, 0.7, False), random_lora(4, 2.0, True)
    with lowrank.attached({QKV.module: (module, fetch(module))}, [QKV], [adapter, lora]):
        y = module(x)
    probe = torch.randn_like(y)
    got = torch.autograd.grad((y * probe).sum(), [x, *lowrank.parameters(lora)])
    expected_y = x @ (module.weight + dense(adapter) + dense(lora)).T
    expected = torch.autograd.grad((expected_y * probe).sum(), [x, *lowrank.parameters(lora)])
    assert torch.allclose(y, expected_y, atol=1e-4)
    for a, b in zip(got, expected):
        assert torch.allclose(a, b, atol=1e-3)


def test_a_part_without_lora_is_left_alone():
    module, x = linear(36), torch.randn(3, 12)
    only_k = {QKV.parts[1].name: Factors(torch.randn(2, 12), torch.randn(12, 2))}
    with lowrank.attached({QKV.module: (module, fetch(module))}, [QKV], [only_k]):
        changed = (module(x) - x @ module.weight.T).abs().amax(0)
    assert changed[:12].max() < 1e-5 and changed[24:].max() < 1e-5 and changed[12:24].min() > 1e-4


def test_new_lora_changes_nothing_and_depends_on_seed_and_name_only():
    one, two = network.create([QKV], Network(4, 4), 5), network.create([QKV], Network(4, 4), 5)
    assert all(torch.equal(one[name].A, two[name].A) for name in one)
    assert all(factors.delta().abs().max() == 0 for factors in one.values())
    assert not torch.equal(one[QKV.parts[0].name].A, one[QKV.parts[1].name].A)
    assert not torch.equal(one[QKV.parts[0].name].A, network.create([QKV], Network(4, 4), 6)[QKV.parts[0].name].A)


def test_nothing_is_left_after_the_context_even_when_it_ends_in_an_error():
    module = linear(36, bias=True)
    own = lambda x: x  # noqa: E731  somebody else's patch
    other = linear(36)
    other.forward = own
    try:
        with lowrank.attached({"a": (module, fetch(module)), "b": (other, fetch(other))}, [QKV], []):
            raise RuntimeError("stop")
    except RuntimeError:
        pass
    assert "forward" not in module.__dict__
    assert other.forward is own


def test_frozen_weight_made_under_inference_mode_still_gives_gradients():
    with torch.inference_mode():
        module = linear(36)
        module.weight = nn.Parameter(torch.randn(36, 12), requires_grad=False)
    x = torch.randn(2, 12, requires_grad=True)
    with lowrank.attached({"m": (module, fetch(module))}, [], []):
        (gradient,) = torch.autograd.grad(module(x).sum(), x)
    assert torch.allclose(gradient, torch.ones(2, 36) @ module.weight, atol=1e-5)


def test_parameter_count_is_rank_times_in_plus_rows():
    assert lowrank.count(network.create([QKV], Network(2, 2), 0)) == 2 * 3 * (12 + 12)
