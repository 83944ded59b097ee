"""The bundled tiny Z-Image: ComfyUI's own classes at a small size.

Core recognises Z-Image by its width of 3840, so a small one is built by hand here; from then on it is
a MODEL, a CLIP and a VAE like any other.
"""

import json
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import comfy.supported_models_base
import comfy.text_encoders.z_image
import comfy.utils
import torch

FOLDER = Path(__file__).resolve().parents[2] / "models" / "tiny"
MODEL = FOLDER / "z_image_turbo_tiny.safetensors"
ADAPTER = FOLDER / "z_image_turbo_tiny_adapter.safetensors"
VAE = FOLDER / "vae.safetensors"
PICTURES = FOLDER / "smiley"


def config() -> dict:
    return json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))


def build(dtype: torch.dtype, device: torch.device | str = "cpu"):
    """ComfyUI's `ZImage` BaseModel at the tiny size, with uninitialised weights."""
    model_config = comfy.supported_models.ZImage(dict(config()["unet_config"]))
    model_config.set_inference_dtype(dtype, None)
    return model_config.get_model({}, "", device=device)


def load_model(path: str | Path, dtype: torch.dtype | None = None, disable_dynamic: bool = False):
    """MODEL from a tiny checkpoint. dtype: of the weights; default fp32 on a CPU, bf16 elsewhere."""
    device = comfy.model_management.get_torch_device()
    if dtype is None:
        dtype = torch.float32 if comfy.model_management.is_device_cpu(device) else torch.bfloat16
    model = build(dtype)
    state = {key: value.to(dtype) for key, value in comfy.utils.load_torch_file(str(path), safe_load=True).items()}
    model.load_model_weights(state, "")
    patcher_class = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = patcher_class(model, load_device=device, offload_device=comfy.model_management.unet_offload_device())
    patcher.cached_patcher_init = (load_model, (path, dtype))
    return patcher


def load_clip():
    """CLIP: core's Qwen3 code at a tiny size. Its frozen random weights are drawn from a seed, the same everywhere."""
    settings = config()
    target = comfy.supported_models_base.ClipTarget(comfy.text_encoders.z_image.ZImageTokenizer, comfy.text_encoders.z_image.te(dtype_llama=torch.float32))
    options = {"qwen3_4b_model_config": settings["text_encoder"], "dtype": torch.float32}
    clip = comfy.sd.CLIP(target=target, model_options=options, disable_dynamic=True)
    draw_weights(clip.cond_stage_model, settings["text_encoder_seed"])
    return clip


def draw_weights(module: torch.nn.Module, seed: int):
    """Fill every parameter from one seeded CPU generator: norms 1, biases 0, embeddings N(0, 1), matrices N(0, 1/in)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            if parameter.ndim < 2:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            scale = 1.0 if "embed" in name else parameter.shape[1] ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float32) * scale)
