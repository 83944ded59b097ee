"""Velocity and gradients against diffusers' Z-Image on the same weights, with and without a LoRA file."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parent))
import diffusers_twin

from zturbo import dataset, lorafile, lowrank, network
from zturbo.hosts import comfy_adapter, comfy_draw, comfy_paths, comfy_tiny
from zturbo.hosts.comfy import ComfyHost
from zturbo.recipe import Compute, Network, Recipe

TOLERANCE = 1e-4  # relative L2 in fp32: two orders of summation, four blocks deep


def relative(a, b) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture
def scene(tiny):
    model, clip, vae = tiny
    with torch.inference_mode(False):
        host = ComfyHost(model, clip, vae, Recipe(network=Network(4, 4), compute=Compute("fp32", False)))
        pictures = dataset.from_folder(comfy_paths.dataset_folder(comfy_paths.BUNDLED), (128,), "zsmile")
        host.encode(pictures, pictures.captions())
        twin = diffusers_twin.build(host.dit, comfy_tiny.config()["unet_config"])
    x = torch.randn(2, 16, 18, 14, generator=torch.Generator().manual_seed(0))  # not square, and padded to 64 tokens
    return host, twin, x, torch.tensor([0.9, 0.3])


def a_lora(host, rank, alpha):
    lora = network.create(host.targets, Network(rank, alpha), 0)
    for part in lora.values():
        part.B.data = torch.randn(part.B.shape, generator=torch.Generator().manual_seed(part.B.numel())) * 0.05
    return lora


def test_velocity_is_diffusers_velocity(scene):
    host, twin, x, sigma = scene
    with torch.inference_mode(False), torch.no_grad(), host.training({}) as velocity:
        assert (
            relative(
                velocity(x, sigma, (0, 1)),
                diffusers_twin.velocity(twin, x, sigma, [host.features[n][0] for n in (0, 1)]),
            )
            < TOLERANCE
        )


@pytest.mark.parametrize("rank, alpha", [(4, 4.0), (8, 2.0)])
def test_lora_velocity_and_gradients_are_those_of_diffusers_with_peft(scene, rank, alpha):
    host, twin, x, sigma = scene
    with torch.inference_mode(False), torch.enable_grad():
        lora = a_lora(host, rank, alpha)
        diffusers_twin.load_lora(twin, lorafile.state_dict(lora, torch.float32))
        peft = {re.sub(r"(lora_[AB])\.[^.]+", r"\1", name): p for name, p in twin.named_parameters() if "lora_" in name}
        assert len(peft) == 2 * len(lora)  # nothing left over on either side
        for parameter in peft.values():
            parameter.requires_grad_(True)
        with host.training(lora) as velocity:
            ours = velocity(x, sigma, (0, 1))
            theirs = diffusers_twin.velocity(twin, x, sigma, [host.features[n][0] for n in (0, 1)])
            assert relative(ours, theirs) < TOLERANCE
            target = torch.randn_like(ours)
            got = dict(
                zip(
                    sorted(lora),
                    zip(*[iter(torch.autograd.grad((ours - target).square().mean(), lowrank.parameters(lora)))] * 2),
                )
            )
        (theirs - target).square().mean().backward()
    for name, gradients in got.items():
        for letter, ours_now, gradient in zip("AB", (lora[name].A, lora[name].B), gradients):
            parameter = peft[f"{name}.lora_{letter}.weight"]
            # diffusers spreads alpha / rank over A and B: chain rule
            share = (parameter.detach().norm() / ours_now.norm()).item()
            assert relative(gradient, share * parameter.grad) < 1e-3


def test_core_loader_diffusers_and_the_branch_agree_on_one_file(scene, tiny, caplog):
    """The three ways to use one LoRA file give one velocity, and core leaves no key over."""
    host, twin, x, sigma = scene
    state = lorafile.state_dict(a_lora(host, 4, 2.0), torch.bfloat16)
    patched = comfy_draw.with_lora(tiny[0], state)
    assert "lora key not loaded" not in caplog.text and "NOT LOADED" not in caplog.text
    # qkv counts three
    assert sum(len(entries) for entries in patched.patches.values()) == len(host.targets) + 2 * len(host.dit.layers)
    diffusers_twin.load_lora(twin, state)
    with torch.inference_mode(False), torch.no_grad():
        merged = ComfyHost(patched, *tiny[1:], host.recipe)
        merged.features = host.features
        with merged.training({}) as velocity:
            by_core = velocity(x, sigma, (0, 1))
        with host.training(lorafile.parse(state)[0]) as velocity:
            by_branch = velocity(x, sigma, (0, 1))
        by_diffusers = diffusers_twin.velocity(twin.float(), x, sigma, [host.features[n][0] for n in (0, 1)])
    assert relative(by_branch, by_core) < TOLERANCE
    assert relative(by_diffusers, by_core) < TOLERANCE


def test_captions_share_a_batch_when_their_padded_lengths_agree(scene):
    """NextDiT has no caption mask, but pads each caption by itself: each picture's velocity is what it is alone."""
    host, _, x, sigma = scene
    pictures = dataset.from_arrays(
        [np.zeros((64, 64, 3), np.uint8)] * 3, ["zsmile", "a large zsmile on a blue background", "a very " * 20], (64,)
    )
    captions = pictures.captions()
    with torch.inference_mode(False):
        host.encode(pictures, captions)
        lengths = [-(-features.shape[1] // 32) * 32 for features in host.features]
    order = [
        captions.texts.index(text)
        for text in ("zsmile", "a large zsmile on a blue background", ("a very " * 20).strip())
    ]
    assert [lengths[n] for n in order] == [32, 32, 64] and host.features[order[0]].shape[1] != host.features[
        order[1]
    ].shape[1]
    with torch.inference_mode(False), torch.no_grad(), host.training({}) as velocity:
        both = velocity(x, sigma, tuple(order[:2]))
        alone = torch.cat([velocity(x[i : i + 1], sigma[i : i + 1], (order[i],)) for i in range(2)])
    assert relative(both, alone) < TOLERANCE
    assert comfy_adapter.carried(host.model) is None
