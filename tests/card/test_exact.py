"""Velocity and gradients on a card are to the bit those of the plain patcher, however much of the weights fits.

The weights stay clean.
"""

import functools

import comfy.model_patcher
import comfy.quant_ops
import pytest
import torch
from cards import load_tiny, opened
from test_host import de_distilled, fingerprint, recipe
from test_quantised import FORMATS, quantised_model, raw, same

from zturbo import flow, lowrank, network
from zturbo.hosts import comfy_cache
from zturbo.hosts.comfy import ComfyHost
from zturbo.recipe import Network

FITS = {
    "all": (1.0, False),
    "all, taken away at once": (1.0, True),
    "a third": (1 / 3, False),
    "none, taken away at once": (0.0, True),
}
CAPTIONS = (
    "a large zsmile on a blue background",
    "a small red square, and beside it a circle, on a background of many greens, drawn with a thick line",
)


def velocity_and_gradients(model, clip, vae, given):
    """(velocity, gradients of a random LoRA) of two pictures of noise whose captions differ in length."""
    with torch.inference_mode(False), torch.enable_grad():
        host = ComfyHost(model, clip, vae, given)
        host.encode_texts(CAPTIONS)
        lora = network.create(host.targets, Network(4, 4), 0)
        for part in lora.values():
            part.B.data = torch.randn(part.B.shape, generator=flow.generator("B", *part.B.shape)) * 0.02
        x, sigma = torch.randn(2, 16, 8, 8, generator=flow.generator("x")), torch.tensor([0.8, 0.3])
        with host.training(lora) as velocity:
            v = velocity(x, sigma, (0, 1))
            gradients = torch.autograd.grad(v.square().mean(), lowrank.parameters(lora))
    return [v.detach(), *gradients]


@functools.cache
def reference(way: str, checkpointing: bool):
    """Of the plain patcher, with all weights where they are computed with."""
    with opened("plain"):
        model, clip, vae = load_tiny()
        return velocity_and_gradients(de_distilled(model), clip, vae, recipe(way, checkpointing))


@pytest.fixture
def expected(way, checkpointing):
    """Before the card of the test is there."""
    return reference(way, checkpointing)


def alike(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("way", ["branch", "merged"])
def test_the_same_bits_and_clean_weights(expected, card, tiny, way, checkpointing, fit):
    card.fit(*FITS[fit])
    before = fingerprint(tiny[0])
    for _ in range(2):  # in one session
        assert alike(velocity_and_gradients(de_distilled(tiny[0]), *tiny[1:], recipe(way, checkpointing)), expected)
        assert fingerprint(tiny[0]) == before


def dequantised(kind: str, clip, vae):
    """Of a model whose weights are the quantised ones' numbers, in full precision, on the plain patcher on the CPU."""
    quantised = quantised_model(kind).model
    plain = quantised_model(None)
    with torch.inference_mode():
        for name, module in quantised.named_modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, comfy.quant_ops.QuantizedTensor):
                plain.model.get_submodule(name).weight.copy_(weight.dequantize())
    return velocity_and_gradients(de_distilled(plain), clip, vae, recipe("branch", True))


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("kind", FORMATS)
def test_quantised_weights_in_branch(card, tiny, kind, fit):
    expected = dequantised(kind, *tiny[1:])
    card.fit(*FITS[fit])
    model = quantised_model(kind)
    before = raw(model)
    assert alike(velocity_and_gradients(de_distilled(model), *tiny[1:], recipe("auto", True)), expected)
    assert same(raw(model), before)


def test_smoke_weights_can_be_looked_at_while_and_behind_a_training(card, tiny):
    """What a second run in a session begins with; smoke enough for a card."""
    model, clip, vae = tiny
    before = comfy_cache.fingerprint(model, ())
    for _ in range(2):
        host = ComfyHost(de_distilled(model), clip, vae, recipe("branch"))
        host.features = [torch.randn(1, 40, host.dit.cap_embedder[1].in_features)]
        with host.training({}) as velocity, torch.no_grad():
            assert velocity(torch.randn(1, 16, 8, 8), torch.ones(1), (0,)).isfinite().all()
            assert comfy_cache.fingerprint(model, ()) == before
        assert comfy_cache.fingerprint(model, ()) == before


def test_a_weight_that_cannot_be_made_is_given_back(card, tiny, monkeypatch):
    """Memory that runs out while a quantised weight is taken apart."""
    host = ComfyHost(de_distilled(quantised_model("float8_e4m3fn")), *tiny[1:], recipe("branch"))
    host.features = [torch.randn(1, 40, host.dit.cap_embedder[1].in_features)]

    def short(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError), host.training({}) as velocity:
        patch.setattr(comfy.quant_ops.QuantizedTensor, "dequantize", short)
        velocity(torch.randn(1, 16, 8, 8), torch.ones(1), (0,))
    assert card.pins == 0
