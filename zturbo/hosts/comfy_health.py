"""The damage report on a LoRA: velocities on clean turbo's own paths, and 8-step pictures side by side.

The pictures are drawn as core draws them.
"""

import logging
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import health, plots, turbo
from ..errors import ZTurboError
from ..family import Z_IMAGE
from ..recipe import Compute, Recipe, Turbo
from . import comfy_adapter, comfy_added, comfy_draw
from .comfy import ComfyHost, release

log = logging.getLogger("zturbo")


@dataclass
class Health:
    """A report. plot and pictures: IMAGE [1, H, W, 3].

    In pictures the upper row is turbo's, the lower one's with the LoRA.
    """

    gauge: float
    text: str
    plot: torch.Tensor
    pictures: torch.Tensor


def report(model, clip, vae, lora: dict | Path, prompts: tuple[str, ...], size: int, seed: int) -> Health:
    """Compare clean turbo with itself under a LoRA (a file, or its tensors).

    The prompts have nothing to do with it. size: pixels.
    """
    if not prompts:
        raise ZTurboError("There are no prompts. Write some that have nothing to do with the LoRA, one a line.")
    if size < 64 or size % 16:
        raise ZTurboError(f"size is {size}; it must be a multiple of 16 from 64.")
    clean = comfy_adapter.clean(model)
    comfy_added.refuse(clean, "the gauge")
    state, lost = comfy_draw.lora_for(clean, lora)
    changed = comfy_draw.with_lora(clean, state)
    side = size // Z_IMAGE.reduction
    with torch.inference_mode(False), torch.no_grad():
        with velocities(clean, clip, vae, prompts) as (velocity, host):
            paths = health.walk(host.family, velocity, tuple(range(len(prompts))), (side, side), seed, host.device)
        with velocities(changed, clip, vae, prompts) as (velocity, host):
            deviations = health.deviations(paths, velocity, host.device)
    before, after = (drawn(one, clip, vae, prompts, size, seed) for one in (clean, changed))
    gauge = health.gauge(health.high(deviations))
    text = words(gauge, deviations, before, after) + (f"\nLeft out of the LoRA are {lost}." if lost else "")
    log.info("%s", text)
    sigmas = Z_IMAGE.sigmas()[:8].tolist()
    curve = plots.curves(
        {"deviation from clean turbo": list(zip(sigmas, deviations.mean(0).tolist()))},
        f"Turbo wear {gauge:.2f} (0 untouched, 1 broken)",
        "noise level",
    )
    return Health(gauge, text, comfy_draw.as_image(curve), comfy_draw.grid([before, after]))


@contextmanager
def velocities(model, clip, vae, prompts: tuple[str, ...]):
    """While open, (velocity by the numbers of the prompts, host) of a MODEL as it is."""
    weights = next(iter(comfy_adapter.linears(comfy_adapter.diffusion_model(model)).values())).weight
    compute = Compute("fp32" if weights.dtype == torch.float32 else "bf16")
    host = ComfyHost(model, clip, vae, Recipe(compute=compute, turbo=Turbo(prompts=prompts, every=0)))
    host.encode_texts(prompts)
    with host.training({}) as velocity:
        yield turbo.with_adapter_at(0.0, velocity), host


def drawn(model, clip, vae, prompts: tuple[str, ...], size: int, seed: int) -> list[torch.Tensor]:
    """A picture [H, W, 3] a prompt, at 8 steps."""
    with torch.inference_mode():
        encoded = [comfy_draw.encode_prompt(clip, prompt) for prompt in prompts]
        images = list(comfy_draw.draw(model, vae, encoded, comfy_draw.Drawing(size, size, 8, seed, "euler")))
        release(model)
    return images


def words(gauge: float, deviations: torch.Tensor, before: list[torch.Tensor], after: list[torch.Tensor]) -> str:
    """The report: the gauge, what it is made of, and what the pictures say."""
    levels = ", ".join(
        f"{sigma:.2f}: {value:.3f}" for sigma, value in zip(Z_IMAGE.sigmas().tolist(), deviations.mean(0).tolist())
    )
    sharp = health.sharpness(torch.stack(after)) / max(health.sharpness(torch.stack(before)), 1e-12)
    apart = (torch.stack(after) - torch.stack(before)).abs().mean().item()
    made_of = f"The first {health.HIGH} make the gauge, one for each prompt."
    difference = f"{apart:.3f} apart (mean difference of pixels from 0 to 1)"
    lines = (
        f"Turbo wear {gauge:.2f} (0 untouched, 1 broken): turbo is {wear(gauge)} on {len(before)} unrelated prompts.",
        f"Velocity's relative deviation by noise level: {levels}. {made_of}",
        f"8-step pictures: sharpness {sharp:.2f} of turbo's, {difference}.",
    )
    return "\n".join(lines)


def wear(gauge: float) -> str:
    """The gauge in a word."""
    if gauge < 0.005:
        return "untouched"
    if gauge <= health.HEALTHY:
        return "healthy"
    return "worn" if gauge <= 0.7 else "broken"
