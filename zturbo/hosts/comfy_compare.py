"""LoRAs and a run's checkpoints side by side, drawn at turbo speed as core draws them, from one model."""

import logging
from dataclasses import dataclass
from pathlib import Path

import comfy.utils
import folder_paths
import torch

from .. import checkpoint, comparison, lorafile, recipefile, session
from ..comparison import Column
from ..errors import ZTurboError
from ..runfolder import CHECKPOINTS, RECIPE
from . import comfy_adapter, comfy_draw, comfy_paths
from .comfy import ComfyHost, release

log = logging.getLogger("zturbo")
CONNECTED = "LoRA"  # the name of the one that comes in by a wire
Given = dict[str, torch.Tensor] | Path  # a LORA_MODEL, or a LoRA's or a checkpoint's file


@dataclass
class Compared:
    """grid: IMAGE [1, H, W, 3] with labels; pictures: IMAGE [B, H, W, 3], prompt by prompt; text: what stands where."""

    grid: torch.Tensor
    pictures: torch.Tensor
    text: str


def given(names: tuple[str, ...], lora: dict[str, torch.Tensor] | None) -> dict[str, Given]:
    """What is compared, by its name in the grid. lora: the one that is connected, which comes first.

    names: of files in models/loras, or of runs, see `Runs.loras`. Raises ZTurboError for what is not there.
    """
    found: dict[str, Given] = {} if lora is None else {CONNECTED: lora}
    for name in names:
        found |= _named(name)
    return found


def _named(name: str) -> dict[str, Given]:
    for file in (name, f"{name}.safetensors"):
        if file.endswith(".safetensors") and folder_paths.get_full_path("loras", file):
            return {file.removesuffix(".safetensors"): comfy_paths.lora_file(file)}
    if name.endswith(".safetensors"):
        raise ZTurboError(f"There is no LoRA {name!r} in models/loras. Write a file's name as loaders list it.")
    return dict(comfy_paths.runs().loras(name))


def fingerprint(names: tuple[str, ...]) -> str:
    """Changes when what these names mean does, or a file of it."""
    try:
        paths = [one for one in given(names, None).values() if isinstance(one, Path)]
        return str([(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in paths])
    except (ZTurboError, OSError) as error:
        return str(error)


def compare(
    models: tuple, loras: dict[str, Given], columns: list[Column], prompts: tuple[str, ...], how, node_id: str
) -> Compared:
    """Draw each prompt in each column. models: MODEL, CLIP and VAE; how: a `Drawing`."""
    model, clip, vae = models
    clean = comfy_adapter.clean(model)
    comfy_adapter.diffusion_model(clean)
    positive = [comfy_draw.encode_prompt(clip, prompt) for prompt in prompts]
    bar = comfy.utils.ProgressBar(len(columns) * len(prompts), node_id=node_id)
    drawn: list[list[torch.Tensor]] = []
    notes: list[str] = []
    name, state = "", {}  # the LoRA that was read last
    try:
        for column in columns:
            if column.lora and column.lora != name:
                name, (state, lost) = column.lora, _state(loras[column.lora], column.lora, (clean, clip, vae))
                notes += [f"Left out of {name} are {lost}."] if lost else []
            changed = comfy_draw.with_lora(clean, state, column.strength) if column.lora else clean
            images = []
            for image in comfy_draw.draw(changed, vae, positive, how):
                images.append(image.cpu())
                bar.update(1)
            drawn.append(images)
    finally:
        release(clean)
    rows = [list(row) for row in zip(*drawn)]
    text = "\n".join([*_legend("column", [c.label for c in columns]), *_legend("row", list(prompts)), *notes])
    log.info("%s", text)
    shown = [[comfy_draw.to_bytes(image) for image in row] for row in rows]
    grid = comparison.grid(shown, [column.label for column in columns], list(prompts))
    return Compared(grid, torch.stack([image for row in rows for image in row]), text)


def _legend(what: str, texts: list[str]) -> list[str]:
    return [f"{what} {number}: {text}" for number, text in enumerate(texts, 1)]


def _state(lora: Given, name: str, models: tuple) -> tuple[dict[str, torch.Tensor], str]:
    """(tensors for core's loader, what is left out)."""
    if isinstance(lora, Path) and lora.parent.name == CHECKPOINTS:
        return of_checkpoint(lora, models), ""
    return comfy_draw.lora_for(models[0], lora, name)


def of_checkpoint(path: Path, models: tuple) -> dict[str, torch.Tensor]:
    """The LoRA that a run would have handed on at this checkpoint. Raises ZTurboError.

    models: MODEL, CLIP and VAE, the model as clean as the run drew with it.
    """
    recipe = recipefile.read(path.parents[1] / RECIPE)
    with torch.inference_mode(False):
        state = session.untrained(recipe, ComfyHost(*models, recipe, lora_file=comfy_paths.lora_file))
        state.take(*checkpoint.read(path))
        return state.exported(lorafile.DTYPES[recipe.saving.dtype])
