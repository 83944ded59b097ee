"""The 6.15 B parameter Z-Image on the meta device: names, shapes and counts, without a byte of weights."""

import comfy.lora
import comfy.ops
import comfy.supported_models
import pytest
import torch

from bench.gpu_files import FULL
from zturbo import lorafile, lowrank, network
from zturbo.hosts import comfy_adapter
from zturbo.lowrank import Factors
from zturbo.recipe import Network


@pytest.fixture(scope="module")
def full(comfyui):
    config = comfy.supported_models.ZImage(dict(FULL))
    config.set_inference_dtype(torch.bfloat16, None)
    return config.get_model({}, "", device="meta")


def test_it_is_the_real_size(full):
    dit = full.diffusion_model
    assert dit.layers[0].feed_forward.w1.out_features == 10240
    assert sum(p.numel() for p in dit.parameters()) == pytest.approx(6.15e9, rel=0.01)


def test_targets_cover_all_layers_and_count_2657280_a_rank(full):
    targets = comfy_adapter.targets(full.diffusion_model, ("layers.",))
    names = {part.name for target in targets for part in target.parts}
    leaves = (
        "attention.to_q",
        "attention.to_k",
        "attention.to_v",
        "attention.to_out.0",
        "feed_forward.w1",
        "feed_forward.w2",
        "feed_forward.w3",
        "adaLN_modulation.0",
    )
    assert names == {f"layers.{layer}.{leaf}" for layer in range(30) for leaf in leaves}
    assert lowrank.count(network.create(targets, Network(1, 1), 0)) == 2_657_280


def test_every_key_written_is_one_that_core_knows(full):
    targets = comfy_adapter.targets(full.diffusion_model, ("layers.",))
    empty = {
        part.name: Factors(torch.empty(1, target.in_features), torch.empty(part.size, 1), 0.5)
        for target in targets
        for part in target.parts
    }
    state = lorafile.state_dict(empty, torch.bfloat16)
    known = comfy.lora.model_lora_keys_unet(full, {})
    stems = {key.removesuffix(".lora_A.weight").removesuffix(".lora_B.weight").removesuffix(".alpha") for key in state}
    assert stems <= set(known) and len(stems) == 240
    slices = {key for key in stems if isinstance(known[key], tuple)}
    assert slices == {key for key in stems if key.endswith(("to_q", "to_k", "to_v"))}
    assert known["diffusion_model.layers.4.attention.to_k"] == (
        "diffusion_model.layers.4.attention.qkv.weight",
        (0, 3840, 3840),
    )


def test_refiners_are_known_for_adapters_that_have_them(full):
    names = {part.name for target in comfy_adapter.targets(full.diffusion_model) for part in target.parts}
    assert {"noise_refiner.1.adaLN_modulation.0", "context_refiner.0.attention.to_q"} <= names and len(
        names
    ) == 240 + 2 * 8 + 2 * 7
