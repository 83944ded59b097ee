"""Drawing as core ComfyUI draws: core's sampler, core's LoRA loader, core's VAE.

Previews and the Sampler node share it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.sd
import comfy.utils
import numpy as np
import torch
from PIL import Image

from .. import lorafile
from ..family import Z_IMAGE
from . import comfy_adapter

CFG = 1.0  # Turbo is distilled with its guidance: no negative prompt, one pass a step
SCHEDULER = "simple"


@dataclass(frozen=True)
class Drawing:
    """How a picture is drawn. width, height: pixels; negative: CONDITIONING, needed where cfg is not 1."""

    width: int
    height: int
    steps: int
    seed: int
    sampler: str
    cfg: float = CFG
    negative: Any = None


def with_lora(model, state: dict[str, torch.Tensor], strength: float = 1.0):
    """A clone of MODEL with a LoRA file's tensors on it, exactly as core's LoraLoaderModelOnly applies them."""
    return comfy.sd.load_lora_for_models(model, None, dict(state), strength, 0)[0]


def lora_for(
    model, lora: dict[str, torch.Tensor] | Path, name: str = "The LoRA"
) -> tuple[dict[str, torch.Tensor], str]:
    """(tensors for `with_lora`, what of it is left out, or nothing) of a file in any dialect, or of a LORA_MODEL.

    name: what it is called. Raises LoraFileError where it has nothing for this MODEL.
    """
    if isinstance(lora, Path):
        file = lorafile.read(lora, keep_fused=True)
    else:
        file = lorafile.of_state(lora, name, keep_fused=True)
    state, _, lost = lorafile.whole_state(file, torch.float32, name, lossy=True)
    # one that stayed whole is core's own
    parts = {part: one for part, one in file.factors.items() if not part.endswith("attention.qkv")}
    lorafile.check_fit(parts, comfy_adapter.targets(comfy_adapter.diffusion_model(model), ("",)), name)
    return (lora if isinstance(lora, dict) else state), lost


def encode_prompt(clip, text: str):
    """CONDITIONING, as CLIPTextEncode makes it."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def sample(model, positive, how: Drawing, batch_size: int = 1, callback=None) -> torch.Tensor:
    """Latents [B, 16, H/8, W/8] as KSampler gives them at scheduler simple."""
    empty = torch.zeros(
        Z_IMAGE.latent(batch_size, how.width, how.height),
        device=comfy.model_management.intermediate_device(),
        dtype=comfy.model_management.intermediate_dtype(),
    )
    latent = comfy.sample.fix_empty_latent_channels(model, empty, Z_IMAGE.reduction)
    return comfy.sample.sample(
        model=model,
        noise=comfy.sample.prepare_noise(latent, how.seed),
        steps=how.steps,
        cfg=how.cfg,
        sampler_name=how.sampler,
        scheduler=SCHEDULER,
        positive=positive,
        negative=how.negative or [[torch.zeros_like(features), {}] for features, _ in positive],
        latent_image=latent,
        callback=callback,
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=how.seed,
    )


def draw(model, vae, prompts: Iterable, how: Drawing) -> Iterator[torch.Tensor]:
    """A picture [H, W, 3] for each CONDITIONING, all from the same noise."""
    for prompt in prompts:
        yield from decode(vae, sample(model, prompt, how))


def grid(rows: list[list[torch.Tensor]]) -> torch.Tensor:
    """IMAGE [1, H, W, 3] of rows of pictures [h, w, 3] of one size."""
    return torch.cat([torch.cat(row, dim=1) for row in rows])[None]


def decode(vae, latents: torch.Tensor) -> torch.Tensor:
    """IMAGE [B, H, W, 3] in 0..1."""
    return vae.decode(latents)


def to_bytes(image: torch.Tensor) -> np.ndarray:
    """[H, W, 3] 0..1 -> uint8, cut as core's SaveImage cuts (no rounding)."""
    return np.clip(255.0 * image.cpu().numpy(), 0, 255).astype(np.uint8)


def as_image(picture: Image.Image) -> torch.Tensor:
    """IMAGE [1, H, W, 3] in 0..1."""
    return torch.from_numpy(np.asarray(picture.convert("RGB"), np.float32) / 255.0)[None]
