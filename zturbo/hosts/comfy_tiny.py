"""The bundled tiny Z-Image: ComfyUI's own classes at a small size.

Core recognises Z-Image by its width of 3840, so a small one is built by hand here; from then on it is
a MODEL, a CLIP and a VAE like any other.
"""

from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import comfy.supported_models_base
import comfy.text_encoders.z_image
import comfy.utils
import torch

from .tiny import ADAPTER as ADAPTER
from .tiny import MODEL as MODEL
from .tiny import PICTURES as PICTURES
from .tiny import VAE as VAE
from .tiny import config as config
from .tiny import text_encoder_weights


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
    patcher_class = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = patcher_class(model, load_device=device, offload_device=comfy.model_management.unet_offload_device())
    model.load_model_weights(state, "", assign=patcher.is_dynamic())
    patcher.cached_patcher_init = (load_model, (path, dtype))
    return patcher


def load_clip(disable_dynamic: bool = False):
    """CLIP: core's Qwen3 code at a tiny size. Its frozen random weights are drawn from a seed, the same everywhere."""
    te = comfy.text_encoders.z_image.te(dtype_llama=torch.float32)
    target = comfy.supported_models_base.ClipTarget(comfy.text_encoders.z_image.ZImageTokenizer, te)
    options = {"qwen3_4b_model_config": config()["text_encoder"], "dtype": torch.float32}
    weights = {f"model.{name}": tensor for name, tensor in text_encoder_weights().items()}
    return comfy.sd.CLIP(target=target, state_dict=[weights], model_options=options, disable_dynamic=disable_dynamic)
