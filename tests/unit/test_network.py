"""What is trained where: targets, layers, ranks, forms, and a start from another LoRA."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from zturbo import lorafile, lowrank, lycoris, network
from zturbo.errors import LoraFileError, ZTurboError
from zturbo.lorafile import module_targets
from zturbo.recipe import Network

LEAVES = (
    ("attention.qkv", 12, 36),
    ("attention.out", 12, 12),
    ("feed_forward.w1", 12, 20),
    ("adaLN_modulation.0", 8, 48),
)
TARGETS = [module_targets(f"layers.{n}.{leaf}", inside, out) for n in range(4) for leaf, inside, out in LEAVES]


def ranks(**settings):
    chosen = network.trainable_modules(TARGETS, Network(rank=4, alpha=4, **settings))
    return {one.part.name: one.rank for one in chosen}


def test_everything_is_trained_unless_something_is_said():
    assert ranks() == {part.name: 4 for target in TARGETS for part in target.parts} and len(ranks()) == 4 * 6


def test_groups_patterns_and_ranks_of_their_own_the_last_that_fits_counts():
    assert set(ranks(targets="feed_forward")) == {f"layers.{n}.feed_forward.w1" for n in range(4)}
    chosen = ranks(targets="attention:8, *.to_v:0, layers.2.*:2")
    assert (
        chosen["layers.0.attention.to_q"] == 8
        and chosen["layers.2.attention.to_q"] == 2
        and chosen["layers.2.adaLN_modulation.0"] == 2
    )
    assert (
        "layers.0.attention.to_v" not in chosen
        and "layers.0.feed_forward.w1" not in chosen
        and chosen["layers.2.attention.to_v"] == 2
    )


@pytest.mark.parametrize("rank", [2, 4, 400])
@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
def test_counting_is_of_what_would_be_trained(kind, rank):
    """400: the second matrix of a LoKr is whole."""
    given = Network(rank, float(rank), kind, factor=4, targets=f"attention:{rank}, feed_forward:3", layers="1-2")
    assert network.count(TARGETS, given) == lowrank.count(network.create(TARGETS, given, 0))


def test_layers_are_numbers_and_ranges():
    assert {network.layer_of(name) for name in ranks(layers="0-1, 3")} == {0, 1, 3}
    assert network.read_layers(" ") is None


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"targets": "atention"}, "'atention' fits no part of the model. There are, in each layer: attention.to_q"),
        ({"targets": "attention:many"}, "no rank behind its colon"),
        ({"layers": "9"}, "goes beyond the model, which has the layers 0 to 3"),
        ({"layers": "3-1"}, "is no layer number and no range"),
        ({"layers": "a"}, "is no layer number and no range"),
        ({"targets": "attention:0"}, "Nothing is left to train"),
    ],
)
def test_what_fits_nothing_is_said(settings, words):
    with pytest.raises(ZTurboError, match=words):
        ranks(**settings)


def test_a_group_of_another_rank_has_the_same_scale():
    lora = network.create(TARGETS, Network(rank=4, alpha=2, targets="attention:8, feed_forward"), 0)
    assert {one.rank for one in lora.values()} == {8, 4} and {one.scale for one in lora.values()} == {0.5}
    assert network.describe(lora) == f"LoRA of rank 4, 8: {lowrank.count(lora):,} numbers in 20 places."


@pytest.mark.parametrize("kind", ["lora", "dora", "lokr", "loha"])
def test_every_form_begins_as_nothing_and_learns(kind):
    weight = torch.randn(36, 12)
    fetch = lambda x: nullcontext((weight, None))  # noqa: E731
    target = TARGETS[0]
    norms = lambda targets: {
        part.name: lowrank.column_norms(None, fetch, part.rows, torch.zeros(1)) for part in targets[0].parts
    }  # noqa: E731
    lora = network.create([target], Network(kind=kind, rank=2, alpha=2, factor=2), 0, norms=norms)
    linear, x = nn.Linear(12, 36, bias=False), torch.randn(5, 12, requires_grad=True)
    with lowrank.attached({target.module: (linear, fetch)}, [target], [lora]):
        assert torch.allclose(linear(x), x @ weight.T, atol=1e-5)
        linear(x).square().sum().backward()
    gradients = [one for one in (p.grad for p in lowrank.parameters(lora)) if one is not None and one.abs().max() > 0]
    assert len(gradients) >= len(lora)
    assert x.grad.abs().max() > 0


@pytest.mark.parametrize(
    "one",
    [
        lycoris.LoKr(torch.randn(2, 3), (torch.randn(5, 4),), 0.5),
        lycoris.LoKr(torch.randn(2, 3), (torch.randn(5, 2), torch.randn(2, 4)), 0.5),
        lycoris.LoHa(torch.randn(10, 2), torch.randn(2, 12), torch.randn(10, 2), torch.randn(2, 12), 0.5),
    ],
)
def test_output_is_delta_times_x(one):
    x = torch.randn(2, 3, 12)
    assert one.shape == (10, 12) == tuple(one.delta().shape)
    assert torch.allclose(one.output(x), x @ one.delta().T, atol=1e-5)


def test_the_factor_is_the_size_of_lokrs_small_matrix():
    sizes = {}
    for factor in (1, 2, 4):
        lora = network.create(TARGETS[2:3], Network(kind="lokr", rank=1, alpha=1, factor=factor), 0)
        sizes[factor] = lora["layers.0.feed_forward.w1"].w1.shape
    assert sizes == {1: (1, 1), 2: (2, 2), 4: (4, 3)}


def test_dora_output_is_the_normed_weight_times_x():
    weight, target = torch.randn(12, 12), TARGETS[1]
    one = lowrank.Factors(torch.randn(2, 12), torch.randn(12, 2), 0.5, torch.rand(1, 12) + 0.5)
    adapter = lowrank.Factors(torch.randn(3, 12), torch.randn(12, 3), 0.7)
    fetch = lambda x: nullcontext((weight, None))  # noqa: E731
    x, name = torch.randn(4, 12), target.parts[0].name
    whole = weight + one.delta()
    gain = one.magnitude / whole.norm(dim=0, keepdim=True)
    got = lowrank.decomposed_output(x, target, fetch, [{name: adapter}, {name: one}])
    assert torch.allclose(got, x @ ((whole + adapter.delta()) * gain).T, atol=1e-4)


def test_a_start_from_another_lora_is_that_lora_at_a_higher_rank():
    given = network.create(TARGETS, Network(rank=2, alpha=1), 5)
    for one in given.values():
        one.B.data.normal_()
    read, _ = lorafile.parse(lorafile.state_dict(given, torch.float32))
    lora = network.create(TARGETS, Network(rank=4, alpha=4), 0, start=read)
    assert all(
        one.rank == 4 and torch.allclose(one.delta(), given[name].delta(), atol=1e-5) for name, one in lora.items()
    )
    assert all(
        one.A.requires_grad and one.A[2:].abs().max() > 0 and one.B[:, 2:].abs().max() == 0 for one in lora.values()
    )


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"rank": 1}, "has rank 2; this run has 1"),
        ({"rank": 2, "layers": "0"}, "parts that this run does not train"),
        ({"rank": 2, "kind": "loha"}, "is a LoRA; this run trains a LoHa"),
    ],
)
def test_a_start_that_would_lose_something_is_refused(settings, words):
    given = network.create(TARGETS, Network(rank=2, alpha=2), 5)
    with pytest.raises(LoraFileError, match=words):
        network.create(TARGETS, Network(**settings), 0, start=given)
