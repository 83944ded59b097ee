"""One training run inside ComfyUI, from the node's inputs to what it hands on."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
import numpy as np
import torch

from .. import lorafile, runs
from ..dataset import Dataset
from ..errors import ZTurboError
from ..lorafile import LoraState
from ..recipe import Inputs, Recipe
from ..runfolder import RunFolder
from . import comfy_adapter, comfy_paths, comfy_tiny
from .comfy import ComfyHost
from .comfy_control import ComfyControl


@dataclass
class Trained:
    """images: IMAGE [B, H, W, 3], the newest previews, or one black pixel block where none were asked for."""

    lora: LoraState
    losses: list[float]
    images: torch.Tensor
    path: Path
    steps: int


@dataclass(frozen=True)
class Models:
    """MODEL, CLIP and VAE that a run trains on. preview: the MODEL that previews are drawn with; None: the same."""

    model: Any
    clip: Any
    vae: Any
    preview: Any = None


def train(
    recipe: Recipe,
    dataset: Dataset,
    models: Models,
    node_id: str,
    resume: str = runs.AUTO,
    workflow: dict | None = None,
) -> Trained:
    """Train in this process.

    Raises ZTurboError with a sentence, or ComfyUI's own interrupt; in both cases the LoRA so far is saved.

    resume: see `runs.choose_run`. workflow: the graph that the node is in, which the run folder keeps.
    """
    if not isinstance(dataset, Dataset):
        raise ZTurboError(f"dataset is a {type(dataset).__name__}; connect Image Dataset.")
    with torch.inference_mode(False), torch.enable_grad():
        inputs = inputs_of(dataset, models.model)
        recipe = runs.filled(replace(recipe, data=dataset.options, inputs=inputs), dataset.trigger)
        cache, cancelled = comfy_paths.runs().cache, comfy.model_management.InterruptProcessingException
        given = models.model, models.clip, models.vae
        host = ComfyHost(*given, recipe, models.preview, cache, comfy_paths.lora_file)

        def control_of(run: RunFolder) -> ComfyControl:
            if workflow is not None:
                run.keep_workflow(workflow)
            return ComfyControl(run, recipe.steps, node_id, _send)

        done = runs.conduct(recipe, dataset, host, comfy_paths.runs(), resume, control_of, cancelled)
    result = done.result
    lora = LoraState(result.state, done.facts | lorafile.thumbnail(result.images))
    return Trained(lora, result.losses, _images(result.images), done.run.lora, result.steps)


def inputs_of(dataset: Dataset, model) -> Inputs:
    """What a graph knows of where its model and pictures lie, so that the run can be done again without it.

    Text encoder and VAE do not say where they are from.
    """
    tag = comfy_adapter.carried(model)
    factory = getattr(model, "cached_patcher_init", None)
    file = (
        next((str(value) for value in factory[1] if isinstance(value, (str, Path)) and str(value)), "")
        if factory
        else ""
    )
    adapter = (
        ""
        if tag is None or tag.net == 0
        else "tiny"
        if tag.file == comfy_paths.TINY
        else str(folder_paths.get_full_path("loras", tag.file) or "")
    )
    return Inputs(
        model="tiny" if file == str(comfy_tiny.MODEL) else file,
        adapter=adapter,
        adapter_strength=1.0 if tag is None else tag.net,
        pictures=dataset.folder,
        trigger=dataset.trigger,
        resolutions=", ".join(map(str, dataset.resolutions)) or "1024",
        regularisation=dataset.regularisation,
    )


def _images(images: list[np.ndarray]) -> torch.Tensor:
    if not images:
        return torch.zeros(1, 64, 64, 3)
    return torch.from_numpy(np.stack(images).astype(np.float32) / 255.0)


def _send(event: str, data: dict):
    from server import PromptServer

    PromptServer.instance.send_sync(event, data)
