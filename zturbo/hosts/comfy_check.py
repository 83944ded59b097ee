"""Is an adapter done? Turbo, and turbo with the adapter on, drawn as core draws them, in 8 steps and in many."""

import logging
from dataclasses import dataclass, replace

import comfy.utils
import torch

from .. import health
from ..errors import ZTurboError
from ..lorafile import LoraFile
from . import comfy_adapter, comfy_draw
from .comfy import release
from .comfy_draw import Drawing

log = logging.getLogger("zturbo")
SOFT = 0.92  # sharpness of 8 steps with the adapter, of turbo's: at most this when the distillation has let go
WHOLE = 0.92  # of many guided steps: at least this while the knowledge is there
FORGOTTEN = (
    f"Not done: many guided steps do not bring the pictures back (they should reach {WHOLE:g}). "
    "It has forgotten, or trained too fast: use a lower learning rate or an earlier checkpoint."
)
STILL_TURBO = (
    f"Not done: 8 steps are as sharp as turbo's (above {SOFT:g}), so the distillation has not let go yet. Train longer."
)
NEARLY = (
    f"Nearly: 8 steps blur as they should, and many guided steps sharpen, but not to {WHOLE:g}. "
    "More pictures, or a lower learning rate."
)
DONE = (
    "Done: it blurs at 8 steps and is whole again in many guided ones, as an undistilled model is. "
    "Train a LoRA on it, and look at that with Turbo Health."
)


@dataclass(frozen=True)
class Trial:
    """What a check draws. size: pixels; steps: many, at this cfg."""

    prompts: tuple[str, ...]
    size: int
    seed: int
    steps: int
    cfg: float


@dataclass
class Check:
    """What a check found.

    pictures: IMAGE [1, H, W, 3] in three rows: turbo at 8 steps; with the adapter at 8 steps; with the adapter at many
    steps, guided.
    """

    done: bool
    text: str
    pictures: torch.Tensor


def check(model, clip, vae, adapter: LoraFile, file: str, trial: Trial, node_id: str) -> Check:
    """Draw each prompt three times and judge by sharpness."""
    if not trial.prompts:
        raise ZTurboError("There are no prompts. Write a few, one a line.")
    clean = comfy_adapter.clean(model)
    on = comfy_adapter.apply(clean, adapter, file, 1.0)
    positive = [comfy_draw.encode_prompt(clip, prompt) for prompt in trial.prompts]
    negative = comfy_draw.encode_prompt(clip, "")
    short_way = Drawing(trial.size, trial.size, 8, trial.seed, "euler", cfg=1.0)
    long_way = replace(short_way, steps=trial.steps, cfg=trial.cfg, negative=None if trial.cfg == 1 else negative)
    bar = comfy.utils.ProgressBar(3 * len(trial.prompts), node_id=node_id)
    rows = []
    for one, how in ((clean, short_way), (on, short_way), (on, long_way)):
        images: list[torch.Tensor] = []
        for image in comfy_draw.draw(one, vae, positive, how):
            images.append(image)
            bar.update(1)
        rows.append(images)
        release(one)
    turbo, short, long = (health.sharpness(torch.stack(row)) for row in rows)
    done, text = verdict(short / max(turbo, 1e-12), long / max(turbo, 1e-12), trial.steps, trial.cfg, file)
    log.info("%s", text)
    return Check(done, text, comfy_draw.grid(rows))


def verdict(short: float, long: float, steps: int, cfg: float, file: str) -> tuple[bool, str]:
    """(is it done, the report). short, long: sharpness of 8 steps and of many with the adapter, of turbo's own 8."""
    if long < WHOLE and long <= short:
        said = FORGOTTEN
    elif short > SOFT:
        said = STILL_TURBO
    elif long < WHOLE:
        said = NEARLY
    else:
        said = DONE
    numbers = f"{short:.2f} at 8 steps, {long:.2f} at {steps} steps with CFG {cfg:g}"
    return said is DONE, f"{said}\nSharpness with {file} on, of turbo's 8 steps: {numbers}."
