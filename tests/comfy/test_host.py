"""The ComfyUI host on the bundled tiny turbo: gradients, both ways of carrying the adapter, and clean weights."""

import hashlib
from dataclasses import replace

import comfy.model_management
import numpy as np
import pytest
import torch

from zturbo import cache, dataset, flow, lorafile, lowrank, network
from zturbo.errors import ModelError, ZTurboError
from zturbo.hosts import comfy_adapter, comfy_cache, comfy_draw, comfy_paths, comfy_tiny
from zturbo.hosts.comfy import ComfyHost
from zturbo.hosts.devices import promise, repeatable
from zturbo.recipe import AdapterCourse, Compute, Data, Network, Recipe


def recipe(way="merged", checkpointing=False, dtype="fp32", **changes):
    return Recipe(
        **{"batch_size": 2, "network": Network(4, 4), "compute": Compute(dtype, checkpointing, way), **changes}
    )


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


def test_an_adapter_schedule_is_the_adapter_at_that_strength(tiny):
    """At factor 0.5 the velocity is that of a model with the adapter at 0.5; at 0 that of clean turbo."""
    model, clip, vae = tiny
    x, sigma = torch.randn(2, 16, 16, 16, generator=flow.generator("x")), torch.tensor([0.8, 0.3])

    def velocity_of(given, factor, course):
        with torch.inference_mode(False), torch.no_grad():
            host = ComfyHost(given, clip, vae, replace(recipe("auto"), adapter=course))
            encode(host)
            with host.training({}) as velocity:
                first = velocity(x, sigma, (0, 3), factor)
                assert not close(velocity(x, sigma, (0, 3), 1.0), first, 1e-4) or factor == 1
                return first

    fading = AdapterCourse(1.0, 0.0)
    half = comfy_adapter.apply(model, lorafile.read(comfy_tiny.ADAPTER), "tiny", 0.5)
    assert close(velocity_of(de_distilled(model), 0.5, fading), velocity_of(half, 1.0, AdapterCourse()), 1e-4)
    assert close(velocity_of(de_distilled(model), 0.0, fading), velocity_of(model, 1.0, AdapterCourse()), 1e-6)


def test_captions_of_other_lengths_in_one_batch_are_as_they_are_alone(tiny):
    model, clip, vae = tiny
    given = dataset.from_arrays([np.zeros((64, 64, 3), np.uint8)] * 3, ["short", "very " * 40 + "long", "brief"], (64,))
    with torch.inference_mode(False), torch.no_grad():
        host = ComfyHost(model, clip, vae, recipe())
        host.encode(given, given.captions())
        numbers = tuple(variants[0] for variants in given.captions().of)
        x, sigma = torch.randn(3, 16, 8, 8, generator=flow.generator("x")), torch.tensor([0.8, 0.3, 0.5])
        with host.training({}) as velocity:
            together = velocity(x, sigma, numbers)
            alone = torch.cat([velocity(x[i : i + 1], sigma[i : i + 1], numbers[i : i + 1]) for i in range(3)])
    assert close(together, alone, 1e-5)


def test_the_cache_tells_text_encoders_vaes_and_their_loras_apart(tiny):
    _, clip, vae = tiny
    other = clip.clone()
    key = next(iter(other.patcher.model.state_dict()))
    other.add_patches({key: (torch.ones(1),)}, 0.5)
    layer = clip.clone()
    layer.clip_layer(-3)
    keys = [comfy_cache.of_clip(clip), comfy_cache.of_clip(other), comfy_cache.of_clip(layer), comfy_cache.of_vae(vae)]
    assert len(set(keys)) == 4 and keys[0] == comfy_cache.of_clip(clip.clone())
    weight = dict(vae.patcher.model.named_parameters())
    with torch.no_grad(), torch.inference_mode():
        next(iter(weight.values())).add_(1e-3)
    assert comfy_cache.of_vae(vae) != keys[3]


@pytest.mark.parametrize("at_once", [0, 1000])
def test_a_second_run_encodes_nothing_and_text_encoder_and_vae_leave_memory(tiny, tmp_path, monkeypatch, at_once):
    """Nor does it decode a picture; with many pictures what it needs is read when it is asked for."""
    model, clip, vae = tiny
    with torch.inference_mode(False), torch.no_grad():
        first, second = (ComfyHost(model, clip, vae, recipe(), cache=tmp_path) for _ in range(2))
        a, given = encode(first), pictures()
        monkeypatch.setattr(cache, "AT_ONCE", at_once)
        monkeypatch.setattr(dataset.Item, "pixels", lambda item: pytest.fail("it was decoded"))
        b = encode(second, given)
        # a picture of each bucket is looked at, the first text and the longest
        assert at_once or len(second.cache.held) <= 2 + len(given.buckets())
        assert b.shapes == a.shapes == [tuple(views.shape) for views in a.latents]
        assert second.tokens(None) == first.tokens(None) and second.image_tokens == first.image_tokens
        assert first.cache.made > 0 and (second.cache.made, second.cache.found) == (0, first.cache.made)
        assert all(
            torch.equal(x, y)
            for x, y in zip([*a.latents, *first.features], [*b.latents, *second.features], strict=True)
        )
        comfy.model_management.load_models_gpu([clip.patcher, vae.patcher])
        with second.training({}):
            loaded = [one.model for one in comfy.model_management.current_loaded_models]
            assert second.model in loaded and clip.patcher not in loaded and vae.patcher not in loaded


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
    assert torch.equal(seen[-1], (1 - torch.tensor([0.8, 0.3])) * 1000)


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
        refined = []
        for _ in range(2):
            with host.training({}) as velocity:
                for caption in (caption for variants in pictures().captions().of for caption in variants):
                    velocity(torch.zeros(1, 16, 8, 8), torch.ones(1), (caption,))
            refined.append(list(map(id, host.captions.values())))
        assert (
            len(host.captions)
            == len({n for variants in pictures().captions().of for n in variants})
            < len(pictures().items)
        )
        assert refined[0] == refined[1]


def test_the_digest_tells_models_adapters_and_loras_apart(tiny):
    model, clip, vae = tiny
    lora = network.create(ComfyHost(model, clip, vae, recipe()).targets, Network(4, 4), 0)
    other = network.create(ComfyHost(model, clip, vae, recipe()).targets, Network(4, 4), 1)
    with_one, with_other = (
        comfy_draw.with_lora(model, lorafile.state_dict(given, torch.float32)) for given in (lora, other)
    )
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
        pixels = pictures().items[0].pixels()
        given = dataset.from_arrays(
            [(view * 255).round().astype(np.uint8) for view in (pixels, pixels[:, ::-1])], [], (128,), "zsmile"
        )
        plain = encode(host, given).latents
        assert both.shape[0] == 2 and torch.equal(both[:1], plain[0]) and torch.equal(both[1:], plain[1])
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


def test_repeatable_kernels_are_asked_for_on_a_gpu_and_the_flags_put_back():
    """Without warn_only: with it flash attention's backward stays the one that is not repeatable."""
    memory = torch.utils.deterministic
    flags = lambda: (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        memory.fill_uninitialized_memory,
    )  # noqa: E731
    before = flags()
    for device, repeat, asked in (
        ("cuda", "exact", (True, False, False)),
        ("mps", "exact", (True, True, False)),
        ("cuda", "fast", before),
        ("cpu", "exact", before),
    ):
        with repeatable(torch.device(device), repeat):
            assert flags() == asked
        assert flags() == before
    with pytest.raises(ZTurboError, match="Set repeat to fast"), repeatable(torch.device("cuda"), "exact"):
        raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation, but you set ...")
    assert flags() == before


@pytest.mark.parametrize(
    "device, repeat, said",
    [
        ("cpu", "fast", "Repeatable"),
        ("cuda", "exact", "Repeatable"),
        ("cuda", "fast", "Not repeatable"),
        ("mps", "exact", "no Apple GPU"),
        ("xpu", "exact", "no Intel card"),
    ],
)
def test_a_run_says_whether_it_can_be_repeated(device, repeat, said):
    assert said in promise(torch.device(device), repeat)


def test_a_run_is_carried_as_it_was_begun_and_wiring_mistakes_are_said(tiny):
    model, clip, vae = tiny
    host = ComfyHost(de_distilled(model), clip, vae, recipe("auto"))
    digest, way = host.digest(), host.way
    host.carry({"merged": "branch", "branch": "merged"}[way])
    assert host.digest() == digest and host.warning() == ""
    assert "no de-distill adapter on the model" in ComfyHost(model, clip, vae, recipe("auto")).warning()
    assert ComfyHost(model, clip, vae, recipe("auto"), preview_model=model).warning() == ""
    fading = replace(recipe("auto"), adapter=AdapterCourse(1.0, 0.5))
    assert "no effect" in ComfyHost(model, clip, vae, fading, preview_model=model).warning()
