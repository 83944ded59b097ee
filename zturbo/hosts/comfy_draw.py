"""Drawing as core ComfyUI draws: core's sampler, core's LoRA loader, core's VAE.

Previews and the Sampler node share it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.sd
import comfy.utils
import numpy as np
import torch
from PIL import Image

from ..family import Z_IMAGE

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


def with_lora(model, state: dict[str, torch.Tensor]):
    """A clone of MODEL with a LoRA file's tensors at strength 1, exactly as core's LoraLoaderModelOnly applies them."""
    return comfy.sd.load_lora_for_models(model, None, dict(state), 1.0, 0)[0]


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
