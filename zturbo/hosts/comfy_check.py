"""Is an adapter done? Turbo, and turbo with the adapter on, drawn as core draws them, in 8 steps and in many."""

import logging
from dataclasses import dataclass

import comfy.utils
import torch

from .. import health
from ..errors import ZTurboError
from ..lorafile import LoraFile
from . import comfy_adapter, comfy_draw
from .comfy import release

log = logging.getLogger("zturbo")
SOFT = 0.92  # sharpness of 8 steps with the adapter, of turbo's: at most this when the distillation has let go
WHOLE = 0.92  # of many guided steps: at least this while the knowledge is there


@dataclass
class Check:
    """pictures: IMAGE [1, H, W, 3] in three rows: turbo at 8 steps; with the adapter at 8 steps; with the adapter at many steps, guided."""

    done: bool
    text: str
    pictures: torch.Tensor


def check(
    model,
    clip,
    vae,
    adapter: LoraFile,
    file: str,
    prompts: tuple[str, ...],
    size: int,
    seed: int,
    steps: int,
    cfg: float,
    node_id: str,
) -> Check:
    """Draw each prompt three times and judge by sharpness. size: pixels."""
    if not prompts:
        raise ZTurboError("There are no prompts. Write a few, one a line.")
    clean = comfy_adapter.clean(model)
    on = comfy_adapter.apply(clean, adapter, file, 1.0)
    positive, negative = (
        [comfy_draw.encode_prompt(clip, prompt) for prompt in prompts],
        comfy_draw.encode_prompt(clip, ""),
    )
    bar = comfy.utils.ProgressBar(3 * len(prompts), node_id=node_id)
    rows = []
    for one, count, guidance in ((clean, 8, 1.0), (on, 8, 1.0), (on, steps, cfg)):
        images: list[torch.Tensor] = []
        for image in comfy_draw.draw(
            one,
            vae,
            positive,
            size,
            size,
            count,
            seed,
            "euler",
            cfg=guidance,
            negative=None if guidance == 1 else negative,
        ):
            images.append(image)
            bar.update(1)
        rows.append(images)
        release(one)
    turbo, short, long = (health.sharpness(torch.stack(row)) for row in rows)
    done, text = verdict(short / max(turbo, 1e-12), long / max(turbo, 1e-12), steps, cfg, file)
    log.info("%s", text)
    return Check(done, text, comfy_draw.grid(rows))


def verdict(short: float, long: float, steps: int, cfg: float, file: str) -> tuple[bool, str]:
    """(is it done, the report). short, long: sharpness of 8 steps and of many with the adapter, of turbo's own 8."""
    measured = f"Sharpness with {file} on, of turbo's 8 steps: {short:.2f} at 8 steps, {long:.2f} at {steps} steps with CFG {cfg:g}."
    if long < WHOLE and long <= short:
        said = f"Not done: many guided steps do not bring the pictures back (they should reach {WHOLE:g}). It has forgotten, or trained too fast: use a lower learning rate or an earlier checkpoint."
    elif short > SOFT:
        said = f"Not done: 8 steps are as sharp as turbo's (above {SOFT:g}), so the distillation has not let go yet. Train longer."
    elif long < WHOLE:
        said = f"Nearly: 8 steps blur as they should, and many guided steps sharpen, but not to {WHOLE:g}. More pictures, or a lower learning rate."
    else:
        said = "Done: it blurs at 8 steps and is whole again in many guided ones, as an undistilled model is. Train a LoRA on it, and look at that with Turbo Health."
    return said.startswith("Done"), f"{said}\n{measured}"
