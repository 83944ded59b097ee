"""The algebra of +1 and -1 on ComfyUI's MODEL, to the bit."""

import comfy.lora
import comfy.model_management
import comfy.sd
import pytest
import torch
from safetensors.torch import load_file, save_file

from zturbo import lorafile, network
from zturbo.errors import LoraFileError
from zturbo.hosts import comfy_adapter, comfy_draw, comfy_tiny
from zturbo.lowrank import Factors
from zturbo.recipe import Network

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.float8_e4m3fn}


@pytest.fixture
def adapter():
    return lorafile.read(comfy_tiny.ADAPTER)


def model_in(dtype: str):
    """The tiny turbo with its weights in a dtype; fp8 weights are cast at each use, as core's fp8 loading does."""
    with torch.inference_mode():
        model = comfy_tiny.load_model(comfy_tiny.MODEL, torch.float32 if dtype == "fp8" else DTYPES[dtype])
        if dtype == "fp8":
            for module in comfy_adapter.linears(model.model.diffusion_model).values():
                module.weight = torch.nn.Parameter(module.weight.to(DTYPES["fp8"]), requires_grad=False)
                module.comfy_cast_weights = True
    return model


def weights(model) -> dict[str, torch.Tensor]:
    """The weights that this MODEL computes with, as bytes."""
    with torch.inference_mode():
        comfy.model_management.load_models_gpu([model])
        copied = {
            key: tensor.clone().view(torch.uint8)
            for key, tensor in model.model.state_dict().items()
            if "layers" in key and tensor.ndim == 2
        }
        comfy.model_management.unload_model_and_clones(model)
    return copied


def same(a, b) -> bool:
    return all(torch.equal(a[key], b[key]) for key in a)


def some_lora(model, seed, rank=4):
    """A user's LoRA as a file's tensors."""
    lora = network.create(comfy_adapter.targets(model.model.diffusion_model, ("layers.",)), Network(rank, rank), seed)
    for part in lora.values():
        part.B.data.normal_(std=0.05, generator=torch.Generator().manual_seed(seed))
    return lorafile.state_dict(lora, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strength", [1.0, 0.35, 1.7])
def test_plus_then_minus_is_nothing(comfyui, adapter, dtype, strength):
    model = model_in(dtype)
    clean = weights(model)
    on = comfy_adapter.apply(model, adapter, "a", strength)
    off = comfy_adapter.apply(on, adapter, "a", -strength)
    assert not same(weights(on), clean)
    assert same(weights(off), clean) and same(weights(model), clean)
    assert comfy_adapter.carried(on).net == strength and comfy_adapter.carried(off) is None


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp8"])
def test_loras_in_between_stay_and_order_does_not_matter(comfyui, adapter, dtype):
    """(W + A) + L1 + L2 - A has the same bits as W + L1 + L2, also after several partial steps."""
    model = model_in(dtype)
    one, two = some_lora(model, 1), some_lora(model, 2)
    wanted = weights(comfy_draw.with_lora(comfy_draw.with_lora(model, one), two))
    on = comfy_adapter.apply(model, adapter, "a", 0.6)
    on = comfy_draw.with_lora(on, one)
    on = comfy_adapter.apply(on, adapter, "a", 0.4).clone()  # a clone, as core nodes make
    on = comfy_draw.with_lora(on, two)
    assert comfy_adapter.carried(on).net == pytest.approx(1.0)
    half = comfy_adapter.apply(on, adapter, "a", -0.5)
    assert same(weights(comfy_adapter.apply(half, adapter, "a", -0.5)), wanted)
    assert same(weights(comfy_adapter.clean(on)), wanted)
    assert same(weights(comfy_adapter.without_adapter(on)), wanted)


def test_plus_one_is_the_written_out_sum(comfyui, adapter):
    model = model_in("fp32")
    with torch.inference_mode():
        before = {key: value.clone() for key, value in model.model.state_dict().items()}
        on = comfy_adapter.apply(model, adapter, "a", 1.0)
        comfy.model_management.load_models_gpu([on])
        after = {key: value.clone() for key, value in on.model.state_dict().items()}
        comfy.model_management.unload_model_and_clones(on)
    qkv = "diffusion_model.layers.0.attention.qkv.weight"
    delta = torch.cat([adapter.factors[f"layers.0.attention.to_{letter}"].delta() for letter in "qkv"])
    assert torch.allclose(after[qkv] - before[qkv], delta, atol=1e-6)
    w2 = "diffusion_model.layers.1.feed_forward.w2.weight"
    assert torch.allclose(after[w2] - before[w2], adapter.factors["layers.1.feed_forward.w2"].delta(), atol=1e-6)


def test_minus_one_on_clean_weights_is_refused(comfyui, adapter):
    with pytest.raises(LoraFileError, match="carries no adapter.*broken model.*checkpoint_has_adapter"):
        comfy_adapter.apply(model_in("fp32"), adapter, "a", -1.0)


def test_taking_away_more_than_there_is_is_refused(comfyui, adapter):
    on = comfy_adapter.apply(model_in("fp32"), adapter, "a", 0.75)
    with pytest.raises(
        LoraFileError, match=r"carries a at \+0.75, so 1 of it cannot be taken away. Set strength to 0.75"
    ):
        comfy_adapter.apply(on, adapter, "a", -1.0)
    declared = comfy_adapter.apply(model_in("fp32"), adapter, "a", -1.0, baked=1.0)
    with pytest.raises(LoraFileError, match="cannot be taken away"):
        comfy_adapter.apply(declared, adapter, "a", -0.5)
    assert comfy_adapter.carried(comfy_adapter.apply(on, adapter, "a", -0.25)).net == 0.5


def test_minus_one_on_a_checkpoint_declared_as_merged_subtracts(comfyui, adapter):
    model = model_in("fp32")
    clean = weights(model)
    # an adapter inside, no tag
    merged = comfy_draw.with_lora(model, lorafile.state_dict(adapter.factors, torch.float32))
    restored = comfy_adapter.apply(merged, adapter, "a", -1.0, baked=1.0)
    assert comfy_adapter.carried(restored).net == 0
    for key, value in weights(restored).items():
        assert torch.allclose(value.view(torch.float32), clean[key].view(torch.float32), atol=1e-6)


def test_another_adapter_than_the_one_on_the_model_is_refused(comfyui, adapter, tmp_path):
    state = load_file(comfy_tiny.ADAPTER)
    other = lorafile.write(tmp_path / "other.safetensors", {key: value * 2 for key, value in state.items()}, {})
    on = comfy_adapter.apply(model_in("fp32"), adapter, "first.safetensors", 1.0)
    with pytest.raises(
        LoraFileError, match=r"carries the adapter first.safetensors at \+1; other.safetensors is another one"
    ):
        comfy_adapter.apply(on, lorafile.read(other), "other.safetensors", -1.0)


def test_an_adapter_that_fits_no_key_or_only_some_is_refused_with_counts(comfyui, tmp_path):
    model, state = model_in("fp32"), load_file(comfy_tiny.ADAPTER)
    more = {
        **state,
        "diffusion_model.layers.29.attention.to_q.lora_A.weight": torch.zeros(2, 8),
        "diffusion_model.layers.29.attention.to_q.lora_B.weight": torch.zeros(8, 2),
    }
    save_file(more, tmp_path / "more.safetensors")
    counts = f"{len(state) // 2} of its {len(state) // 2 + 1} matrices do"
    with pytest.raises(LoraFileError, match=f"more.safetensors does not fit this model: {counts}.*layers.29"):
        comfy_adapter.apply(model, lorafile.read(tmp_path / "more.safetensors"), "more.safetensors", 1.0)
    full = {
        key.replace("layers.0.", "layers.7."): torch.zeros(16, 3840) if "lora_A" in key else torch.zeros(3840, 16)
        for key in state
        if "layers.0.attention" in key
    }
    save_file(full, tmp_path / "full.safetensors")
    with pytest.raises(LoraFileError, match="0 of its 4 matrices do"):
        comfy_adapter.apply(model, lorafile.read(tmp_path / "full.safetensors"), "full.safetensors", 1.0)
    save_file({**state, "diffusion_model.x_embedder.diff": torch.zeros(3)}, tmp_path / "odd.safetensors")
    with pytest.raises(LoraFileError, match="1 keys of odd.safetensors are not understood.*x_embedder.diff"):
        comfy_adapter.apply(model, lorafile.read(tmp_path / "odd.safetensors"), "odd.safetensors", 1.0)


def test_rank_alpha_and_dtype_are_read_from_the_file(comfyui, adapter, tmp_path):
    model = model_in("fp32")
    scaled = {name: Factors(f.A, f.B, 0.5) for name, f in adapter.factors.items()}
    lorafile.write(tmp_path / "half.safetensors", lorafile.state_dict(scaled, torch.float16), {})
    file = lorafile.read(tmp_path / "half.safetensors")
    assert file.ranks == adapter.ranks and file.dtypes == ["float16"]
    by_file, by_strength = (weights(comfy_adapter.apply(model, a, "a", s)) for a, s in ((file, 1.0), (adapter, 0.5)))
    for key, value in by_file.items():
        assert torch.allclose(value.view(torch.float32), by_strength[key].view(torch.float32), atol=1e-4)
