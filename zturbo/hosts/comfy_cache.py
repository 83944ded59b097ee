"""What of ComfyUI's text encoder and VAE changes their results, as keys for the cache."""

import hashlib

import comfyui_version
import torch

from . import comfy_added
from .comfy_mode import lent

SAMPLES = 64  # numbers of each tensor


def of_clip(clip) -> str:
    options = (
        comfyui_version.__version__,
        clip.layer_idx,
        sorted(clip.tokenizer_options.items(), key=str),
        type(clip.tokenizer).__name__,
        clip.use_clip_schedule,
        id(clip.apply_hooks_to_conds) if clip.apply_hooks_to_conds else None,
    )
    if clip.patcher.forced_hooks:
        options += (id(clip.patcher.forced_hooks),)
    return fingerprint(clip.patcher, options)


def of_vae(vae) -> str:
    return fingerprint(vae.patcher, (comfyui_version.__version__, str(vae.vae_dtype), vae.latent_channels))


def fingerprint(patcher, options: tuple) -> str:
    """sha256 over the options, the device, and each tensor and each patch.

    Of a tensor the name, shape, dtype and some numbers from all over it count.
    """
    total = hashlib.sha256(repr((patcher.load_device.type, options)).encode())
    tensors = {**dict(patcher.model.named_parameters()), **dict(patcher.model.named_buffers())}
    for name, tensor in sorted(tensors.items()):
        # the clean weight, where a patched one stands in the model
        add(total, name, getattr(patcher.backup.get(name), "weight", tensor))
    for key, entries in sorted(patcher.patches.items(), key=lambda item: str(item[0])):
        for strength, patch, *_ in entries:
            total.update(repr((str(key), strength)).encode())
            for number, part in enumerate(leaves(getattr(patch, "weights", patch))):
                add(total, str(number), part)
    for number, part in enumerate(leaves(tuple(comfy_added.injected(patcher)))):
        # core casts them to the weights' dtype when they are first used
        add(total, str(number), part.bfloat16() if isinstance(part, torch.Tensor) else part)
    return total.hexdigest()


def leaves(value):
    """What nested tuples and lists hold: core's patches are adapters, or ("diff", (tensor, …))."""
    if isinstance(value, (tuple, list)):
        for part in value:
            yield from leaves(part)
    else:
        yield value


def add(total, name: str, tensor):
    if not isinstance(tensor, torch.Tensor):
        total.update(repr((name, tensor)).encode())
        return
    total.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
    stored = getattr(tensor, "_qdata", tensor)  # a quantised tensor's own numbers
    if stored.device.type != "meta":
        numbers = lent(stored).reshape(-1)
        total.update(numbers[:: max(1, numbers.numel() // SAMPLES)][:SAMPLES].float().cpu().numpy().tobytes())
