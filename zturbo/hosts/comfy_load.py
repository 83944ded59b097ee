"""Loading Z-Image from the files that ComfyUI users have, through core's own loaders, and refusing what is not Z-Image."""

from pathlib import Path

import comfy.model_detection
import comfy.sd
import comfy.supported_models
import comfy.utils

from ..errors import ModelError


def load_model(path: str | Path):
    """MODEL from a diffusion model file. Raises ModelError, naming what was found, unless it is Z-Image."""
    path = str(path)
    state = _read(path)
    name = Path(path).name
    try:
        config = comfy.model_detection.model_config_from_unet(state, comfy.model_detection.unet_prefix_from_state_dict(state))
    except Exception as error:  # core looks at shapes without asking whether they are there
        raise ModelError(f"{name} is damaged, or no diffusion model ({type(error).__name__}: {error}). Choose Z-Image-Turbo (z_image_turbo_bf16.safetensors).") from error
    if config is None:
        kind = "a LoRA or adapter" if any("lora" in key for key in state) else "no diffusion model that ComfyUI knows"
        raise ModelError(f"{name} is {kind}. Choose Z-Image-Turbo (z_image_turbo_bf16.safetensors).")
    if type(config) is not comfy.supported_models.ZImage:
        raise ModelError(f"{name} is a {type(config).__name__} model, not Z-Image. Choose Z-Image-Turbo (z_image_turbo_bf16.safetensors).")
    del state
    return comfy.sd.load_diffusion_model(path)


def load_clip(path: str | Path):
    """CLIP from a Qwen3-4B file. Raises ModelError for any other."""
    state = _read(str(path))
    try:
        kind = comfy.sd.detect_te_model(state)
    except Exception:  # core looks at shapes without asking whether they are there
        kind = None
    if kind is not comfy.sd.TEModel.QWEN3_4B:
        raise ModelError(f"{Path(path).name} is no text encoder of Z-Image, but {'nothing that ComfyUI knows' if kind is None else kind.name}. Choose qwen_3_4b.safetensors.")
    return comfy.sd.load_clip([str(path)], clip_type=comfy.sd.CLIPType.LUMINA2)


def load_vae(path: str | Path):
    """VAE from a Flux (`ae.safetensors`) or TAESD file. Raises ModelError when it is none."""
    state, metadata = _read(str(path), return_metadata=True)
    try:
        vae = comfy.sd.VAE(sd=state, metadata=metadata)
        vae.throw_exception_if_invalid()
    except Exception as error:  # core looks at shapes without asking whether they are there
        raise ModelError(f"{Path(path).name} is no VAE. Choose Z-Image's VAE (ae.safetensors).") from error
    return vae


def _read(path: str, **options):
    if not path.lower().endswith((".safetensors", ".sft")):
        raise ModelError(f"{Path(path).name} is no safetensors file; other kinds can hold programs. Choose a file that ends in .safetensors.")
    try:
        return comfy.utils.load_torch_file(path, safe_load=True, **options)
    except Exception as error:  # core raises plain exceptions of several libraries here
        raise ModelError(f"{Path(path).name} cannot be read ({error}). It may be cut off: download it again.") from error


def fingerprint(path: str | Path | None) -> str:
    """Changes when the file does."""
    if path is None or not Path(path).is_file():
        return "missing"
    stat = Path(path).stat()
    return f"{stat.st_mtime_ns}:{stat.st_size}"
