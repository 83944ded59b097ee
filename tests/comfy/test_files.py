"""Every form of file that core's loaders read, at the real names and sizes.

Load Z-Image Turbo reads it, too, to the same thing. The weights are holes in the files and are assigned, not copied, so
nothing of 12 GB is ever in memory.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import comfy.model_patcher
import comfy.ops
import comfy.quant_ops
import comfy.sd
import comfy.supported_models
import comfy.text_encoders.llama
import folder_paths
import psutil
import pytest
import torch
from comfy.ldm.modules.diffusionmodules.model import Decoder, Encoder
from safetensors.torch import load_file

sys.path.append(str(Path(__file__).parent))
import model_files as files
from model_files import CANARY, PREFIX, Hole
from test_full_size import FULL

from zturbo import modelfile
from zturbo.cli import headers
from zturbo.errors import ModelError, ZTurboError
from zturbo.hosts import comfy_adapter, comfy_load, diffusers_load

CLIP_PREFIX, VAE_PREFIX = "text_encoders.qwen3_4b.transformer.", "vae."
NORM = "layers.7.attention.q_norm.weight"  # 128 numbers, by which a file's weights are known again
AE = dict(
    double_z=True,
    z_channels=16,
    resolution=256,
    in_channels=3,
    out_ch=3,
    ch=128,
    ch_mult=[1, 2, 4, 4],
    num_res_blocks=2,
    attn_resolutions=[],
    dropout=0.0,
)
FOLDERS = ("diffusion_models", "checkpoints", "text_encoders", "vae")


@pytest.fixture
def place(comfyui, tmp_path, monkeypatch):
    """ComfyUI's models folder, empty and for one test."""
    for folder in FOLDERS:
        (tmp_path / folder).mkdir()
        monkeypatch.setitem(
            folder_paths.folder_names_and_paths,
            folder,
            ([str(tmp_path / folder)], folder_paths.supported_pt_extensions),
        )
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


@pytest.fixture(autouse=True)
def assigned(comfyui, monkeypatch):
    """Core takes the file's tensors themselves as weights, as it does on NVIDIA cards.

    Without a card it would copy 12 GB.
    """
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "is_dynamic", lambda self: True)
    plenty = psutil.virtual_memory()._replace(available=10**15)  # files of holes take none
    monkeypatch.setattr(psutil, "virtual_memory", lambda: plenty)
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module", autouse=True)
def given_back():
    """`dev.py test` keeps freed memory, and with gigabytes of it the forks of later tests are slow."""
    yield
    gc.collect()
    with contextlib.suppress(OSError, AttributeError, TypeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(scope="session")
def stock(comfyui):
    """ComfyUI's own nodes."""
    return importlib.import_module("nodes")


@pytest.fixture(scope="session")
def load_node(pack, schemas):
    """Load Z-Image Turbo as ComfyUI calls it: (diffusion_model, text_encoder, vae) -> (MODEL, CLIP, VAE)."""
    node = importlib.import_module(f"{pack.__name__}.nodes.model").ZTurboLoadModel
    return lambda model, clip="auto", vae="auto": node.execute(model, clip, vae).result


@pytest.fixture(scope="module")
def names(comfyui) -> "Names":
    import diffusers
    from diffusers.utils import logging

    from zturbo.hosts.diffusers_load import AUTOENCODER

    logging.set_verbosity_error()
    with torch.device("meta"):
        qwen = comfy.text_encoders.llama.Qwen3_4B({}, torch.bfloat16, "meta", comfy.ops.manual_cast)
        dit = comfy.supported_models.ZImage(dict(FULL)).get_model({}, "", device="meta").diffusion_model
        omni = (
            comfy.supported_models.ZImage(FULL | {"siglip_feat_dim": 1152})
            .get_model({}, "", device="meta")
            .diffusion_model
        )
        transformer, autoencoder = diffusers.ZImageTransformer2DModel(), diffusers.AutoencoderKL(**AUTOENCODER)
        ae = torch.nn.ModuleDict({"encoder": Encoder(**AE), "decoder": Decoder(**AE)})
    return Names(dit, omni, transformer, qwen, ae, autoencoder)


@dataclass(frozen=True)
class Names:
    """Modules on the meta device whose state dicts are the files' names and shapes: core's and diffusers'."""

    dit: torch.nn.Module
    omni: torch.nn.Module
    transformer: torch.nn.Module
    qwen: torch.nn.Module
    ae: torch.nn.Module
    autoencoder: torch.nn.Module

    def model(self, dtype="BF16"):
        return marked(files.holes(self.dit, dtype), dtype, NORM)

    def diffusers_model(self, dtype="BF16"):
        found = marked(files.holes(self.transformer, dtype), dtype, "layers.7.attention.norm_q.weight")
        return marked(found, dtype, "layers.7.attention.to_k.weight")

    def clip(self, dtype="BF16"):
        return marked(files.holes(self.qwen, dtype), dtype, "model.layers.7.self_attn.q_norm.weight")

    def vae(self, dtype="BF16"):
        return marked(files.holes(self.ae, dtype), dtype, "decoder.mid.block_1.norm1.weight")

    def diffusers_vae(self, dtype="BF16"):
        return marked(files.holes(self.autoencoder, dtype), dtype, "decoder.mid_block.resnets.0.norm1.weight")

    def whole(self, clip=None, vae=None):
        """A checkpoint of all three."""
        return (
            files.behind(PREFIX, self.model())
            | files.behind(CLIP_PREFIX, clip or self.clip())
            | files.behind(VAE_PREFIX, vae or self.vae())
        )


KINDS = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def marked(tensors: dict[str, Hole], dtype: str, name: str) -> dict[str, Hole]:
    """With the canary at the start of one tensor."""
    return tensors | {name: Hole(dtype, tensors[name].shape, files.raw(CANARY.to(KINDS[dtype])))}


# Diffusion models


@dataclass(frozen=True)
class Form:
    """A file's tensors, and how its matrices lie in memory: a dtype, or the layout of core's quantised tensors."""

    tensors: Callable[[Names], dict[str, Hole]]
    lies_as: torch.dtype | str
    words: Callable[[Names], dict[str, str]] = lambda names: {}


def float_form(dtype: str, prefix: str = "") -> Form:
    return Form(lambda names: files.behind(prefix, names.model(dtype)), KINDS[dtype])


def quantised(kind: str, layout: str, prefix: str = "", said: dict | None = None) -> Form:
    return Form(lambda names: files.behind(prefix, files.quantised(names.model(), kind, said)), layout)


def in_header(names):
    return files.said_in_header(names.model(), "float8_e4m3fn")


FP8, INT8 = "TensorCoreFP8E4M3Layout", "TensorWiseINT8Layout"
FORMS = {
    "bf16": float_form("BF16"),
    "bf16, prefix": float_form("BF16", PREFIX),
    "fp16": float_form("F16"),
    "fp32": float_form("F32"),
    "fp8 e4m3": float_form("F8_E4M3"),
    "fp8 e5m2": float_form("F8_E5M2"),
    "scaled fp8": Form(lambda names: files.scaled_fp8(names.model()), FP8),
    "scaled fp8, prefix": Form(lambda names: files.behind(PREFIX, files.scaled_fp8(names.model())), FP8),
    "fp8 by comfy_quant": quantised("float8_e4m3fn", FP8),
    "fp8 by comfy_quant, prefix": quantised("float8_e4m3fn", FP8, PREFIX),
    "fp8 said in the header": Form(lambda names: in_header(names)[0], FP8, lambda names: in_header(names)[1]),
    "int8": quantised("int8_tensorwise", INT8),
    "int8 convrot": quantised(
        "int8_rows", INT8, said={"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256}
    ),
    "mxfp8": quantised("mxfp8", "TensorCoreMXFP8Layout"),
    "nvfp4": quantised("nvfp4", "TensorCoreNVFP4Layout"),
    "nvfp4, prefix": quantised("nvfp4", "TensorCoreNVFP4Layout", PREFIX),
    "int4 convrot": quantised("convrot_w4a4", "TensorCoreConvRotW4A4Layout"),
    "diffusers' names": Form(lambda names: names.diffusers_model(), torch.bfloat16),
    "Z-Image Omni": Form(lambda names: marked(files.holes(names.omni, "BF16"), "BF16", NORM), torch.bfloat16),
}


def lies_as(weight: torch.Tensor) -> torch.dtype | str:
    return weight._layout_cls if isinstance(weight, comfy.quant_ops.QuantizedTensor) else weight.dtype


def facts(patcher) -> dict:
    """Everything of a loaded MODEL that differs between files."""
    model = patcher.model
    return {
        "class": (type(model), type(model.model_config), type(patcher)),
        "config": model.model_config.unet_config,
        "computes in": (model.get_dtype(), model.manual_cast_dtype, model.get_dtype_inference()),
        "weights": {
            name: (lies_as(weight), weight.dtype, tuple(weight.shape))
            for name, weight in model.diffusion_model.named_parameters()
        },
        "modules": [type(module).__qualname__ for module in model.diffusion_model.modules()],
        "size": patcher.model_size(),
        "again": patcher.cached_patcher_init[0],
    }


def test_the_names_are_the_real_ones(names):
    """As the published z_image_turbo_bf16, qwen_3_4b and ae files have them."""
    model, clip, vae = names.model(), names.clip(), names.vae()
    assert (len(model), len(clip), len(vae)) == (453, 398, 244)
    assert sum(hole.size() for hole in model.values()) == pytest.approx(12.3e9, rel=0.01)
    assert model["layers.29.attention.qkv.weight"].shape == (11520, 3840) and model["x_pad_token"].shape == (1, 3840)
    assert clip["model.embed_tokens.weight"].shape == (151936, 2560)
    assert vae["decoder.conv_in.weight"].shape == (512, 16, 3, 3)


@pytest.mark.parametrize("form", FORMS)
def test_a_model_is_read_as_core_reads_it(place, stock, names, form):
    tensors, words = FORMS[form].tensors(names), FORMS[form].words(names)
    path = files.write(place / "diffusion_models" / "m.safetensors", tensors, words)
    ours = comfy_load.load_model(path)
    found, layers = facts(ours), ours.model.diffusion_model.layers
    assert lies_as(layers[29].feed_forward.w2.weight) == FORMS[form].lies_as
    norm = layers[7].attention.q_norm.weight
    assert torch.equal(norm.float(), CANARY.to(norm.dtype).float())
    if form == "diffusers' names":  # keys go behind queries in the fused matrix
        qkv = layers[7].attention.qkv.weight
        assert torch.equal(qkv[3840, :128].float(), CANARY) and not qkv[0, :128].any() and not qkv[7680, :128].any()
        del qkv
    targets = comfy_adapter.targets(comfy_adapter.diffusion_model(ours), ("layers.",))
    assert sum(len(target.parts) for target in targets) == 240  # LoRAs on every layer, as training puts them there
    del ours, layers, norm, targets
    (theirs,) = stock.UNETLoader().load_unet("m.safetensors", "default")
    assert found == facts(theirs)


@pytest.mark.parametrize("whole", [False, True])
def test_core_can_make_another_of_the_model(place, names, whole):
    """What core's trainer and its multi-GPU nodes do: load the same file again, without dynamic memory."""
    path = files.write(place / "m.safetensors", names.whole() if whole else names.model())
    model = comfy_load.load_checkpoint(path, clip=False)[0]
    factory, arguments, *index = model.cached_patcher_init
    again = factory(*arguments, disable_dynamic=True)
    again = again[index[0]] if index else again
    assert again is not model and again.model is not model.model
    assert torch.equal(again.model.diffusion_model.get_parameter(NORM).float(), CANARY)


# Text encoders and VAEs


CLIPS = {
    "bf16": (lambda names: names.clip(), torch.bfloat16),
    "fp8 e4m3": (lambda names: names.clip("F8_E4M3"), torch.float8_e4m3fn),
    "scaled fp8": (lambda names: files.scaled_fp8(names.clip()), FP8),
    "fp8 by comfy_quant": (lambda names: files.quantised(names.clip(), "float8_e4m3fn"), FP8),
    "with a head": (lambda names: names.clip() | {"lm_head.weight": Hole("BF16", (151936, 2560))}, torch.bfloat16),
}
VAES = {
    "ae": lambda names: names.vae("F32"),
    "ae, bf16": lambda names: names.vae(),
    "diffusers' names": lambda names: names.diffusers_vae("F32"),
    "diffusers' names, bf16": lambda names: names.diffusers_vae(),
}


def clip_facts(clip) -> dict:
    return {
        "class": (type(clip.cond_stage_model).__qualname__, type(clip.tokenizer), type(clip.patcher)),
        "weights": {
            name: (lies_as(weight), tuple(weight.shape)) for name, weight in clip.cond_stage_model.named_parameters()
        },
        "words": clip.tokenize("a (cat:1.2)"),
        "embeddings": clip.tokenizer.qwen3_4b.embedding_directory,
        "again": clip.patcher.cached_patcher_init[0],
    }


def vae_facts(vae) -> dict:
    return {
        "class": (type(vae.first_stage_model), vae.latent_channels, vae.downscale_ratio, vae.vae_dtype),
        "weights": {
            name: (weight.dtype, tuple(weight.shape)) for name, weight in vae.first_stage_model.named_parameters()
        },
        "again": vae.patcher.cached_patcher_init[0],
    }


@pytest.mark.parametrize("form", CLIPS)
def test_a_text_encoder_is_read_as_core_reads_it(place, stock, names, form):
    tensors, kind = CLIPS[form]
    path = files.write(place / "text_encoders" / "q.safetensors", tensors(names))
    ours = comfy_load.load_clip(path)
    found, layer = clip_facts(ours), ours.cond_stage_model.qwen3_4b.transformer.model.layers[7]
    assert lies_as(layer.mlp.up_proj.weight) == kind
    assert torch.equal(layer.self_attn.q_norm.weight.float(), CANARY.to(layer.self_attn.q_norm.weight.dtype).float())
    (theirs,) = stock.CLIPLoader().load_clip("q.safetensors", "lumina2")
    assert found == clip_facts(theirs)


@pytest.mark.parametrize("form", VAES)
def test_a_vae_is_read_as_core_reads_it(place, stock, names, form):
    path = files.write(place / "vae" / "v.safetensors", VAES[form](names))
    ours = comfy_load.load_vae(path)
    norm = ours.first_stage_model.decoder.mid.block_1.norm1.weight
    assert torch.equal(norm[:128].float(), CANARY) and not norm[128:].any()
    (theirs,) = stock.VAELoader().load_vae("v.safetensors")
    assert vae_facts(ours) == vae_facts(theirs)


# The node


def test_the_node_finds_the_files_of_the_usual_names(place, load_node, names):
    files.write(place / "diffusion_models" / "z_image_turbo_bf16.safetensors", names.model())
    files.write(
        place / "text_encoders" / "qwen_3_4b_fp8_mixed.safetensors", files.quantised(names.clip(), "float8_e4m3fn")
    )
    files.write(place / "vae" / "ae.safetensors", names.vae("F32"))
    model, clip, vae = load_node("z_image_turbo_bf16.safetensors")
    assert type(model.model.model_config).__name__ == "ZImage" and vae.latent_channels == 16
    assert lies_as(clip.cond_stage_model.qwen3_4b.transformer.model.layers[0].mlp.up_proj.weight) == FP8


def test_a_checkpoint_brings_its_own_text_encoder_and_vae(place, load_node, stock, names):
    """Nothing lies in models/text_encoders and models/vae."""
    files.write(place / "checkpoints" / "all.safetensors", names.whole())
    model, clip, vae = load_node("checkpoints/all.safetensors")
    their_model, their_clip, their_vae = stock.CheckpointLoaderSimple().load_checkpoint("all.safetensors")
    assert facts(model) == facts(their_model)
    assert clip_facts(clip) == clip_facts(their_clip)
    assert vae_facts(vae) == vae_facts(their_vae)
    assert torch.equal(
        clip.cond_stage_model.qwen3_4b.transformer.model.layers[7].self_attn.q_norm.weight.float(), CANARY
    )
    assert torch.equal(vae.first_stage_model.decoder.mid.block_1.norm1.weight[:128].float(), CANARY)


def test_what_is_chosen_wins_over_what_the_checkpoint_holds(place, load_node, names):
    files.write(
        place / "checkpoints" / "all.safetensors",
        names.whole(clip=files.scaled_fp8(names.clip()), vae=names.vae("F32")),
    )
    files.write(place / "text_encoders" / "mine.safetensors", names.clip())
    files.write(place / "vae" / "mine.safetensors", names.diffusers_vae("BF16"))

    def lie_as(clip, vae):
        _, clip, vae = load_node("checkpoints/all.safetensors", clip, vae)
        return lies_as(
            clip.cond_stage_model.qwen3_4b.transformer.model.layers[0].mlp.up_proj.weight
        ), vae.patcher.cached_patcher_init[1][0]

    whole, mine = str(place / "checkpoints" / "all.safetensors"), str(place / "vae" / "mine.safetensors")
    assert lie_as("mine.safetensors", "auto") == (torch.bfloat16, whole)
    assert lie_as("auto", "mine.safetensors") == (FP8, mine)


def test_a_checkpoint_without_a_text_encoder_takes_the_usual_one(place, load_node, names):
    tensors = files.behind(PREFIX, names.model("F8_E4M3")) | files.behind(VAE_PREFIX, names.vae())
    files.write(place / "checkpoints" / "two.safetensors", tensors)
    names_of_it = "qwen_3_4b.safetensors or qwen_3_4b_fp8_mixed.safetensors"
    with pytest.raises(Exception, match=f"There is no {names_of_it} in models/text_encoders. Put it there and press R"):
        load_node("checkpoints/two.safetensors")
    files.write(place / "text_encoders" / "qwen_3_4b.safetensors", names.clip())
    model, clip, vae = load_node("checkpoints/two.safetensors")
    assert model.model.diffusion_model.get_parameter(NORM).dtype == torch.float8_e4m3fn
    assert clip is not None and vae.latent_channels == 16


def test_the_list_holds_both_folders_and_old_names_stay_valid(place, load_node, pack):
    for name in ("diffusion_models/a.safetensors", "checkpoints/b.safetensors", "checkpoints/old.ckpt"):
        (place / name).touch()
    schema = importlib.import_module(f"{pack.__name__}.nodes.model").ZTurboLoadModel.define_schema()
    assert schema.inputs[0].options == ["tiny (bundled)", "a.safetensors", "checkpoints/b.safetensors"]
    with pytest.raises(Exception, match="There is no gone.safetensors in models/diffusion_models"):
        load_node("gone.safetensors")


@pytest.mark.parametrize("name, words", [
    ("z_image_de_turbo_v1.safetensors", {}),
    ("z-image-base_bf16.safetensors", {}),
    ("mine.safetensors", {"modelspec.title": "Z-Image-De-Turbo"}),
])  # fmt: skip
def test_an_undistilled_model_is_taken_and_said_to_be_one(place, names, caplog, name, words):
    """Turbo, base and De-Turbo have the same names and shapes, so only what they are called tells."""
    caplog.set_level("INFO", "zturbo")
    comfy_load.load_model(files.write(place / "z_image_turbo_bf16.safetensors", names.model()))
    assert "never distilled" not in caplog.text
    comfy_load.load_model(files.write(place / name, names.model(), words))
    assert f"{name} seems to be a Z-Image that was never distilled" in caplog.text and "preview_model" in caplog.text


# Without ComfyUI


HEADLESS = {
    "plain": lambda names: names.model(),
    "prefix": lambda names: files.behind(PREFIX, names.model()),
    "diffusers' names": lambda names: names.diffusers_model(),
    "a checkpoint": lambda names: names.whole(),
}


@pytest.mark.parametrize("form", HEADLESS)
def test_diffusers_code_reads_the_single_files(place, names, form):
    path = files.write(place / "m.safetensors", HEADLESS[form](names))
    transformer = diffusers_load.load_transformer(path, torch.bfloat16)
    assert sum(parameter.numel() for parameter in transformer.parameters()) == pytest.approx(6.15e9, rel=0.01)
    assert torch.equal(transformer.layers[7].attention.norm_q.weight.float(), CANARY)
    # what plan counts
    assert (
        sum(len(one.target.parts) for one in headers.matrices(path) if one.target.module.startswith("layers.")) == 240
    )


@pytest.mark.parametrize("form", ["scaled fp8", "int8", "nvfp4, prefix"])
def test_diffusers_code_names_what_only_comfyui_reads(place, names, form):
    path = files.write(place / "m.safetensors", FORMS[form].tensors(names))
    with pytest.raises(
        ModelError, match="m.safetensors is quantised, which diffusers' code cannot load. .*--host comfy"
    ):
        diffusers_load.load_transformer(path, torch.bfloat16)


def test_diffusers_code_reads_the_text_encoder_and_both_names_of_the_vae(place, names):
    qwen = diffusers_load.load_text_encoder(files.write(place / "q.safetensors", names.clip()), torch.bfloat16)
    assert torch.equal(qwen.layers[7].self_attn.q_norm.weight.float(), CANARY)
    for tensors in (names.vae(), names.diffusers_vae()):
        vae = diffusers_load.load_autoencoder(files.write(place / "v.safetensors", tensors), torch.bfloat16)
        assert torch.equal(vae.module.decoder.mid_block.resnets[0].norm1.weight[:128].float(), CANARY)


# What is refused


def lumina(names):
    sizes = {
        "dim": 2304,
        "cap_feat_dim": 2304,
        "n_layers": 26,
        "n_heads": 24,
        "n_kv_heads": 8,
        "axes_dims": [32, 32, 32],
        "rope_theta": 1e4,
        "ffn_dim_multiplier": 4.0,
    }
    config = {
        key: value
        for key, value in (FULL | sizes).items()
        if key not in ("z_image_modulation", "time_scale", "pad_tokens_multiple")
    }
    return core_model(comfy.supported_models.Lumina2, config)


def pixel_space(names):
    decoder = {
        "decoder_in_channels": 3072,
        "decoder_hidden_size": 3840,
        "decoder_num_res_blocks": 4,
        "decoder_max_freqs": 8,
    }
    return core_model(
        comfy.supported_models.ZImagePixelSpace,
        FULL | decoder | {"image_model": "zimage_pixel", "patch_size": 32, "in_channels": 3},
    )


def flux(names):
    sizes = {
        "in_channels": 16,
        "out_channels": 16,
        "vec_in_dim": 768,
        "context_in_dim": 4096,
        "hidden_size": 3072,
        "num_heads": 24,
        "depth": 19,
        "depth_single_blocks": 38,
    }
    rest = {
        "image_model": "flux",
        "patch_size": 2,
        "mlp_ratio": 4.0,
        "axes_dim": [16, 56, 56],
        "txt_ids_dims": [],
        "theta": 10000,
        "qkv_bias": True,
        "guidance_embed": True,
    }
    return core_model(comfy.supported_models.Flux, sizes | rest)


def core_model(kind, config):
    with torch.device("meta"):
        return files.holes(kind(config).get_model({}, "", device="meta").diffusion_model, "BF16")


def text_encoder(name):
    with torch.device("meta"):
        return files.holes(
            getattr(comfy.text_encoders.llama, name)({}, torch.bfloat16, "meta", comfy.ops.manual_cast), "BF16"
        )


def sd_vae(names):
    import diffusers

    with torch.device("meta"):
        blocks = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
        return files.holes(diffusers.AutoencoderKL(3, 3, *blocks, (128, 256, 512, 512), 2), "F32")


def lora(form):
    place = "diffusion_model.layers.0.attention.to_q"
    return lambda names: {f"{place}.{name}": Hole("BF16", shape) for name, shape in form.items()}


def first_third(tensors):
    """As a model in three files is split: by size, in the order of the names."""
    return dict(list(tensors.items())[: len(tensors) // 3])


def without(tensors, name):
    return {key: hole for key, hole in tensors.items() if key != name}


MODEL, CLIP, VAE = (
    r"Choose Z-Image-Turbo \(z_image_turbo_bf16.safetensors\)",
    r"Choose qwen_3_4b.safetensors",
    r"Choose Z-Image's VAE \(ae.safetensors\)",
)
VISION = {
    "model.visual.deepstack_merger_list.0.norm.weight": Hole("BF16", (4096,)),
    "model.visual.merger.linear_fc2.weight": Hole("BF16", (2560, 4096)),
}
WRONG = {  # the slot it is put into, what it is, the sentence
    "a LoRA": ("model", lora({"lora_A.weight": (16, 3840), "lora_B.weight": (3840, 16)}),
        f"x.safetensors is a LoRA or adapter. {MODEL}"),
    "a LoKr": ("model", lora({"lokr_w1": (16, 16), "lokr_w2": (240, 240)}), f"is a LoRA or adapter. {MODEL}"),
    "a ControlNet": ("model", lambda names: {"control_all_x_embedder.2-1.weight": Hole("BF16", (3840, 132))},
        f"is a ControlNet. {MODEL}"),
    "Lumina 2": ("model", lumina,
        f"is Lumina 2 or a model built like it, of which Z-Image is a relative, not Z-Image. {MODEL}"),
    "pixel space": ("model", pixel_space, f"is a Z-Image that draws pixels without a VAE, not Z-Image. {MODEL}"),
    "Flux": ("model", flux, f"is a Flux model, not Z-Image. {MODEL}"),
    "a text encoder": ("model", lambda names: names.clip(), rf"is a text encoder \(QWEN3_4B\). {MODEL}"),
    "a VAE": ("model", lambda names: names.vae(), f"is a VAE. {MODEL}"),
    "a VAE, diffusers' names": ("model", lambda names: names.diffusers_vae(), f"is a VAE. {MODEL}"),
    "no model": ("model", lambda names: {"foo": Hole("F32", (3,))},
        f"is nothing of that kind that ComfyUI knows .*{MODEL}"),
    "a matrix missing": ("model", lambda names: without(names.model(), "layers.3.attention.qkv.weight"),
        r"lacks 1 of the 208 matrices of Z-Image \(for example layers.3.attention.qkv.weight\)"),
    "a model as text encoder": ("clip", lambda names: names.model(),
        rf"is no text encoder of Z-Image, but a diffusion model \(ZImage\). {CLIP}"),
    "a VAE as text encoder": ("clip", lambda names: names.vae(), f"is no text encoder of Z-Image, but a VAE. {CLIP}"),
    "a LoRA as text encoder": ("clip", lora({"lora_A.weight": (16, 3840)}),
        f"is no text encoder of Z-Image, but a LoRA or adapter. {CLIP}"),
    "Qwen2.5": ("clip", lambda names: text_encoder("Qwen25_7BVLI"),
        rf"is no text encoder of Z-Image, but a text encoder \(QWEN25_7B\). {CLIP}"),
    "Qwen3 of 8 B": ("clip", lambda names: text_encoder("Qwen3_8B"),
        rf"is no text encoder of Z-Image, but a text encoder \(QWEN3_8B\). {CLIP}"),
    "Qwen3-VL of 4 B": ("clip", lambda names: names.clip() | VISION, rf"but a text encoder \(QWEN3VL_4B\). {CLIP}"),
    "a layer of Qwen missing": ("clip", lambda names: without(names.clip(), "model.layers.9.mlp.up_proj.weight"),
        r"lacks 1 of the 252 matrices of Qwen3-4B \(for example model.layers.9.mlp.up_proj.weight\)"),
    "a model as VAE": ("vae", lambda names: names.model(), rf"is a diffusion model \(ZImage\). {VAE}"),
    "a text encoder as VAE": ("vae", lambda names: names.clip(), rf"is a text encoder \(QWEN3_4B\). {VAE}"),
    "Stable Diffusion's VAE": ("vae", sd_vae,
        f"is a VAE of another model: its latents have 4 channels in 2 dimensions, and Z-Image's have 16 in 2. {VAE}"),
}  # fmt: skip
LOADERS = {"model": comfy_load.load_model, "clip": comfy_load.load_clip, "vae": comfy_load.load_vae}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_file_is_named(place, names, what):
    slot, tensors, sentence = WRONG[what]
    path = files.write(place / "x.safetensors", tensors(names))
    with pytest.raises(ModelError, match=sentence):
        LOADERS[slot](path)


@pytest.mark.parametrize("slot, name, tensors", [
    ("model", "diffusion_pytorch_model-00001-of-00003.safetensors", lambda names: first_third(names.diffusers_model())),
    ("model", "diffusion_pytorch_model-00003-of-00003.safetensors",
        lambda names: {"layers.29.ffn_norm2.weight": Hole("BF16", (3840,))}),
    ("clip", "model-00001-of-00003.safetensors", lambda names: first_third(names.clip())),
    ("clip", "model-00003-of-00003.safetensors", lambda names: {"model.norm.weight": Hole("BF16", (2560,))}),
])  # fmt: skip
def test_one_file_of_several_is_named(place, names, slot, name, tensors):
    """Core would load what it finds, and leave the rest to chance."""
    with pytest.raises(ModelError, match=f"{name} .*part {int(name[-22])} of 3"):
        LOADERS[slot](files.write(place / name, tensors(names)))


LFS = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:2407613050b809ffdff18a4ac99af83ea6b95443ecebdf80e064a79c825574a6\n"
    b"size 12309866400\n"
)
PAGE = b"<!DOCTYPE html>\n<html class=''>\n<head><title>Tongyi-MAI/Z-Image-Turbo - Hugging Face</title></head></html>"
BROKEN = {
    "a Git LFS pointer": ("m.safetensors", LFS,
        "m.safetensors is a Git LFS pointer: 136 bytes of text that stand for the file.*Run git lfs pull"),
    "a web page": ("m.safetensors", PAGE, "m.safetensors is a web page.*Download it again"),
    "a server's answer": ("m.safetensors", b"Entry not found",
        "m.safetensors holds no weights, but the words 'Entry not found'. Download it again"),
    "nothing": ("m.safetensors", b"", "m.safetensors is empty. Download it again"),
    "a pickle": ("m.safetensors", b"\x80\x04" + bytes(5000),
        "m.safetensors is a PyTorch file under the name of a safetensors file"),
    "a zipped pickle": ("m.safetensors", b"PK\x03\x04" + bytes(26) + b"archive/data.pkl" + bytes(5000),
        "m.safetensors is a PyTorch file under the name of a safetensors file"),
    "an archive": ("m.safetensors", b"PK\x03\x04" + bytes(26) + b"model.safetensors" + bytes(5000),
        "m.safetensors is a ZIP archive under the name of a safetensors file. Unpack it"),
    "noise": ("m.safetensors", b"\xff" * 5000,
        "m.safetensors cannot be read: it does not begin as a safetensors file does"),
    "GGUF": ("m.gguf", b"GGUF\x03\0\0\0" + bytes(5000),
        r"m.gguf is a GGUF file. Load it with the ComfyUI-GGUF pack's own nodes, "
        r"Unet Loader \(GGUF\) or CLIPLoader \(GGUF\)"),
    "GGUF, renamed": ("m.safetensors", b"GGUF\x03\0\0\0" + bytes(5000), "m.safetensors is a GGUF file"),
    "ckpt": ("m.ckpt", bytes(5000),
        "m.ckpt is no safetensors file; other kinds can hold programs. Choose a file that ends in .safetensors"),
    "pt": ("m.pt", b"PK\x03\x04" + bytes(5000), "m.pt is no safetensors file"),
    "a header of no JSON": ("m.safetensors", (400).to_bytes(8, "little") + b"{" * 400,
        "m.safetensors cannot be read: its header is damaged"),
    "a header cut off": ("m.safetensors", (90000).to_bytes(8, "little") + b"{" * 4000,
        "m.safetensors cannot be read: it is cut off within its header"),
}  # fmt: skip


@pytest.mark.parametrize("slot", LOADERS)
@pytest.mark.parametrize("what", BROKEN)
def test_a_download_gone_wrong_is_named(place, slot, what):
    name, content, sentence = BROKEN[what]
    (place / name).write_bytes(content)
    with pytest.raises(ModelError, match=sentence):
        LOADERS[slot](place / name)


@pytest.mark.parametrize("slot", LOADERS)
def test_a_file_that_is_cut_off_says_how_much_is_there(place, names, slot):
    path = files.write(place / "m.safetensors", names.model())
    with open(path, "r+b") as file:
        file.truncate(7_000_000_000)
    with pytest.raises(ModelError, match=r"m.safetensors is cut off: it has 7.00 GB of 12.31 GB. Download it again"):
        LOADERS[slot](path)
    with pytest.raises(ModelError, match="There is no file .*gone.safetensors"):
        LOADERS[slot](place / "gone.safetensors")


def test_the_node_says_it_as_well(place, load_node):
    (place / "diffusion_models" / "m.safetensors").write_bytes(PAGE)
    with pytest.raises(Exception, match="m.safetensors is a web page"):
        load_node("m.safetensors")


@pytest.mark.parametrize(
    "gigabytes, dtype, takes", [(40, None, 24.6), (20, torch.bfloat16, 12.3), (10, torch.bfloat16, 12.3)]
)
def test_on_a_cpu_weights_stay_bf16_where_fp32_would_not_fit(place, names, monkeypatch, gigabytes, dtype, takes):
    """Core makes fp32 of them: 24.6 GB."""
    files.write(place / "z_image_turbo_bf16.safetensors", names.model())
    memory = psutil.virtual_memory()._replace(available=gigabytes * 10**9)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    chosen, need = comfy_load._weights(place / "z_image_turbo_bf16.safetensors", torch.device("cpu"), [])
    assert chosen is dtype and need.size / 1e9 == pytest.approx(takes, rel=0.01)
    if gigabytes == 10:
        with pytest.raises(ZTurboError, match="12.3 GB z_image_turbo_bf16.safetensors, and 9.5 GB are free"):
            comfy_load.load(place / "z_image_turbo_bf16.safetensors", place / "no.safetensors", None)
    elif dtype is not None:
        model = comfy_load.load_model(place / "z_image_turbo_bf16.safetensors", dtype)
        assert (
            lies_as(model.model.diffusion_model.layers[0].attention.out.weight) == torch.bfloat16
            and model.model.manual_cast_dtype == torch.float32
        )


def test_a_header_may_have_the_length_that_a_pickle_begins_with(tmp_path):
    """640 bytes: 80 02 00 …, as a pickle of protocol 2."""
    raw = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "x.safetensors").write_bytes((640).to_bytes(8, "little") + raw.ljust(640) + b"\0" * 4)
    assert load_file(tmp_path / "x.safetensors")["x"] == 0
    assert list(modelfile.read(tmp_path / "x.safetensors").tensors) == ["x"]
