"""The ComfyUI host on the bundled tiny turbo: gradients, both ways of carrying the adapter, and clean weights."""

import hashlib

import comfy.model_management
import numpy as np
import pytest
import torch

from zturbo import dataset, flow, lorafile, lowrank, network
from zturbo.errors import ModelError
from zturbo.hosts import comfy_adapter, comfy_draw, comfy_paths, comfy_tiny
from zturbo.hosts.comfy import ComfyHost
from zturbo.recipe import Compute, Data, Network, Recipe


def recipe(way="merged", checkpointing=False, dtype="fp32", **changes):
    return Recipe(**{"batch_size": 2, "network": Network(4, 4), "compute": Compute(dtype, checkpointing, way), **changes})


def fingerprint(model) -> str:
    """sha256 over every byte of every weight."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def de_distilled(model):
    return comfy_adapter.apply(model, lorafile.read(comfy_tiny.ADAPTER), "tiny", 1.0)


def pictures():
    return dataset.from_folder(comfy_paths.dataset_folder(comfy_paths.BUNDLED), (128,), "zsmile")


def encode(host, given=None):
    given = given or pictures()
    return host.encode(given, given.captions())


def velocity_and_gradients(model, clip, vae, given, seed=0):
    """(velocity, gradients of a random LoRA) of one fixed batch."""
    with torch.inference_mode(False), torch.enable_grad():
        host = ComfyHost(model, clip, vae, given)
        latents = encode(host).latents
        lora = network.create(host.targets, Network(4, 4), 0)
        for part in lora.values():
            part.B.data = torch.randn(part.B.shape, generator=flow.generator("B", *part.B.shape)) * 0.02
        numbers = (0, 3)
        x0 = torch.stack([latents[n][0] for n in numbers])
        eps, sigma = torch.randn(x0.shape, generator=flow.generator(seed)), torch.tensor([0.8, 0.3])
        with host.training(lora) as velocity:
            v = velocity(flow.add_noise(x0, eps, sigma), sigma, numbers)
            gradients = torch.autograd.grad((v - (eps - x0)).square().mean(), lowrank.parameters(lora))
    return v.detach(), gradients


def close(a, b, tolerance):
    return ((a - b).norm() / b.norm()).item() < tolerance


def test_branch_and_merged_give_the_same_velocity_and_gradients(tiny):
    """Tolerance 1e-3 relative in fp32: rounding of W + dA against W x + B (A x)."""
    model, clip, vae = tiny
    v_branch, g_branch = velocity_and_gradients(de_distilled(model), clip, vae, recipe("branch"))
    v_merged, g_merged = velocity_and_gradients(de_distilled(model), clip, vae, recipe("merged"))
    v_plain, _ = velocity_and_gradients(model, clip, vae, recipe())
    assert close(v_branch, v_merged, 1e-4)
    assert all(close(a, b, 1e-3) for a, b in zip(g_branch, g_merged))
    assert not close(v_plain, v_merged, 1e-3)  # the adapter does something


def test_checkpointing_changes_no_gradient(tiny):
    model, clip, vae = tiny
    _, without = velocity_and_gradients(model, clip, vae, recipe(checkpointing=False))
    _, with_it = velocity_and_gradients(model, clip, vae, recipe(checkpointing=True))
    assert all(torch.equal(a, b) for a, b in zip(without, with_it))


def test_bf16_is_near_fp32(tiny):
    """Relative 0.02 on the velocity: bf16 has 8 bits of mantissa and the model is 4 blocks deep."""
    model, clip, vae = tiny
    exact, _ = velocity_and_gradients(model, clip, vae, recipe())
    rough, gradients = velocity_and_gradients(model, clip, vae, recipe(dtype="bf16"))
    assert close(rough, exact, 0.02)
    assert all(gradient.dtype == torch.float32 for gradient in gradients)


def test_the_timestep_is_not_rounded_to_bf16(tiny, monkeypatch):
    """In bf16 compute, time goes into the model in fp32, as core's sampling gives it."""
    model, clip, vae = tiny
    embedder, seen = model.model.diffusion_model.t_embedder, []
    plain = embedder.forward
    monkeypatch.setattr(embedder, "forward", lambda t, dtype: (seen.append(t.clone()), plain(t, dtype))[1])
    velocity_and_gradients(model, clip, vae, recipe(dtype="bf16"))
    assert torch.equal(seen[0], (1 - torch.tensor([0.8, 0.3])) * 1000)


@pytest.mark.parametrize("way", ["branch", "merged"])
def test_weights_are_clean_after_training_and_after_an_error_inside(tiny, way):
    model, clip, vae = tiny
    before = fingerprint(model)
    velocity_and_gradients(de_distilled(model), clip, vae, recipe(way))
    assert fingerprint(model) == before
    host = ComfyHost(de_distilled(model), clip, vae, recipe(way))
    encode(host)
    with pytest.raises(RuntimeError, match="inside"), host.training({}):
        raise RuntimeError("inside")
    assert fingerprint(model) == before
    assert comfy.model_management.in_training is False
    assert not any("forward" in module.__dict__ for module in host.dit.modules())


def test_lora_of_seed_zero_trains_from_nothing(tiny):
    """B is zero at the start: the LoRA changes no velocity, and only B has a gradient."""
    model, clip, vae = tiny
    with torch.inference_mode(False), torch.enable_grad():
        host = ComfyHost(model, clip, vae, recipe())
        encode(host)
        lora = network.create(host.targets, Network(4, 4), 0)
        x, sigma = torch.randn(1, 16, 16, 16), torch.tensor([0.5])
        with host.training(lora) as velocity:
            v = velocity(x, sigma, (0,))
            v.square().mean().backward()
        with host.training({}) as velocity:
            assert torch.equal(v.detach(), velocity(x, sigma, (0,)).detach())
    assert all(part.A.grad.abs().max() == 0 for part in lora.values())
    assert max(part.B.grad.abs().max().item() for part in lora.values()) > 0


def test_previews_are_drawn_without_the_adapter_also_on_a_preview_model_that_carries_it(tiny):
    model, clip, vae = tiny
    for preview_model in (None, de_distilled(model)):
        host = ComfyHost(de_distilled(model), clip, vae, recipe(), preview_model)
        assert comfy_adapter.carried(host.preview_model) is None and host.preview_model.patches == {}
        assert comfy_adapter.carried(host.model).net == 1


def test_a_caption_is_refined_once_and_lent_to_each_of_its_pictures(tiny):
    model, clip, vae = tiny
    with torch.inference_mode(False), torch.no_grad():
        host = ComfyHost(de_distilled(model), clip, vae, recipe())
        encode(host)
        for _ in range(2):
            with host.training({}):
                first = list(map(id, host.captions))
        assert len(host.captions) == len(pictures().captions().texts) < len(pictures().items)
        assert first == list(map(id, host.captions))


def test_the_digest_tells_models_adapters_and_loras_apart(tiny):
    model, clip, vae = tiny
    lora = network.create(ComfyHost(model, clip, vae, recipe()).targets, Network(4, 4), 0)
    other = network.create(ComfyHost(model, clip, vae, recipe()).targets, Network(4, 4), 1)
    with_one, with_other = (comfy_draw.with_lora(model, lorafile.state_dict(given, torch.float32)) for given in (lora, other))
    half = comfy_tiny.load_model(comfy_tiny.MODEL, torch.bfloat16)
    half_strength = comfy_adapter.apply(model, lorafile.read(comfy_tiny.ADAPTER), "tiny", 0.5)
    models = [model, de_distilled(model), half_strength, with_one, with_other, half]
    digests = [ComfyHost(given, clip, vae, recipe()).digest() for given in models]
    assert len(set(digests)) == len(models)
    assert digests == [ComfyHost(given, clip, vae, recipe()).digest() for given in models]


def test_flips_are_the_mirrored_pictures_latents(tiny):
    model, clip, vae = tiny
    folder = comfy_paths.dataset_folder(comfy_paths.BUNDLED)
    with torch.inference_mode(False), torch.no_grad():
        host = ComfyHost(model, clip, vae, recipe())
        both = encode(host, dataset.from_folder(folder, (128,), "zsmile", Data(flip=True))).latents[0]
        item = pictures().items[0]
        mirrored = np.ascontiguousarray(item.pixels()[:, ::-1])
        assert both.shape[0] == 2 and torch.equal(both[:1], host._views("x", item.pixels(), False)) and torch.equal(both[1:], host._views("x", mirrored, False))
        assert not torch.equal(both[0], both[1])


def test_wrong_text_encoder_vae_and_model_get_a_sentence(tiny):
    model, clip, vae = tiny
    host = ComfyHost(model, clip, vae, recipe())
    host.dit.cap_embedder[1].in_features = 2560
    try:
        with pytest.raises(ModelError, match="gives 64 numbers a token; this Z-Image needs 2560"):
            encode(host)
    finally:
        host.dit.cap_embedder[1].in_features = 64
    with pytest.raises(ModelError, match="not Z-Image"):
        comfy_adapter.diffusion_model(vae.patcher if hasattr(vae, "patcher") else vae)
