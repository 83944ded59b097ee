"""Core's quantised files: int8 and scaled fp8 weights, loaded by core's own mixed-precision code."""

import json
import sys
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.quant_ops
import comfy.supported_models
import pytest
import torch
from safetensors.torch import load_file

sys.path.append(str(Path(__file__).parent))
from test_host import close, de_distilled, recipe, velocity_and_gradients

from zturbo import lorafile
from zturbo.hosts import comfy_adapter, comfy_tiny, comfy_weights
from zturbo.hosts.comfy import choose_way

FORMATS = ("int8_tensorwise", "float8_e4m3fn", "float8_e5m2", "mxfp8", "nvfp4")


def quantised_model(kind: str | None):
    """The tiny turbo with the Linears of its layers quantised (None: not), through core's loading of such files."""
    state = {}
    for key, value in load_file(comfy_tiny.MODEL).items():
        if kind and key.startswith("layers.") and value.ndim == 2:
            layout = comfy.quant_ops.QUANT_ALGOS[kind]["comfy_tensor_layout"]
            state |= comfy.quant_ops.QuantizedTensor.from_float(value.float(), layout).state_dict(key)
            state[key.removesuffix("weight") + "comfy_quant"] = torch.tensor(
                list(json.dumps({"format": kind}).encode()), dtype=torch.uint8
            )
        else:
            state[key] = value.float()
    config = comfy.supported_models.ZImage(dict(comfy_tiny.config()["unet_config"]))
    config.quant_config = {"mixed_ops": True}
    config.set_inference_dtype(torch.float32, torch.float32)
    with torch.inference_mode():
        model = config.get_model({}, "")
        device, rest = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
        patcher = comfy.model_patcher.CoreModelPatcher(model, device, rest)
        model.load_model_weights(state, "", assign=patcher.is_dynamic())
    return patcher


@pytest.fixture(params=FORMATS)
def quantised(comfyui, request):
    return quantised_model(request.param)


def raw(model) -> dict[str, torch.Tensor]:
    """What lies in memory for each weight, as bytes."""
    return {
        key: tensor.clone().contiguous().reshape(-1).view(torch.uint8)
        for key, tensor in model.model.state_dict().items()
        if tensor.ndim
    }


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_it_is_really_quantised(quantised):
    weight = quantised.model.diffusion_model.layers[0].attention.qkv.weight
    assert isinstance(weight, comfy.quant_ops.QuantizedTensor) and weight.dequantize().dtype == torch.float32


def test_the_branch_way_is_picked_and_trains_on_the_dequantised_weights(quantised, tiny):
    """Same velocity and gradients as on a model whose full-precision weights are the dequantised ones."""
    model = de_distilled(quantised)
    assert choose_way(model, "auto") == "branch"
    v, gradients = velocity_and_gradients(model, *tiny[1:], recipe("auto"))
    plain = comfy_tiny.load_model(comfy_tiny.MODEL)
    with torch.inference_mode():
        for name, module in comfy_adapter.linears(plain.model.diffusion_model, ("layers.",)).items():
            module.weight.copy_(quantised.model.diffusion_model.get_submodule(name).weight.dequantize())
    v_plain, gradients_plain = velocity_and_gradients(de_distilled(plain), *tiny[1:], recipe("branch"))
    assert close(v, v_plain, 1e-5)
    assert all(close(a, b, 1e-4) for a, b in zip(gradients, gradients_plain))


@pytest.mark.parametrize("way", ["branch", "merged"])
def test_weights_are_clean_after_training_either_way(quantised, tiny, way):
    before = raw(quantised)
    velocity_and_gradients(de_distilled(quantised), *tiny[1:], recipe(way))
    assert same(raw(quantised), before)


def test_plus_then_minus_is_nothing(quantised):
    adapter = lorafile.read(comfy_tiny.ADAPTER)
    before = raw(quantised)
    on = comfy_adapter.apply(quantised, adapter, "a", 1.0)
    off = comfy_adapter.apply(on, adapter, "a", -1.0)
    states = []
    for model in (on, off):
        with torch.inference_mode():
            comfy.model_management.load_models_gpu([model])
            states.append(raw(model))
            comfy.model_management.unload_model_and_clones(model)
    assert not same(states[0], before) and same(states[1], before)


def test_weights_are_read_clean_and_dequantised_also_while_the_adapter_is_patched_in(quantised):
    """What Convert LoRA and Extract Adapter read."""
    targets = comfy_adapter.targets(quantised.model.diffusion_model, ("layers.",))
    places = [(part, target.module) for target in targets for part in target.parts]
    expected = {
        part.name: quantised.model.diffusion_model.get_submodule(module).weight.dequantize()[part.rows].clone()
        for part, module in places
    }
    on = de_distilled(quantised)
    with torch.inference_mode():
        comfy.model_management.load_models_gpu([on])
        read = comfy_weights.weights(on, targets)
        assert all(torch.equal(read(name), tensor) for name, tensor in expected.items())
        comfy.model_management.unload_model_and_clones(on)
