"""One training run inside ComfyUI, from the node's inputs to what it hands on."""

import json
import logging
import math
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import comfy.model_management
import numpy as np
import torch

from .. import lorafile, runfolder, trainer
from .. import recipe as recipes
from ..dataset import Dataset
from ..errors import TrainingError, ZTurboError
from ..lorafile import LoraState
from ..recipe import Previews, Recipe
from ..runfolder import RunFolder
from . import comfy_paths
from .comfy import ComfyHost
from .comfy_control import ComfyControl

log = logging.getLogger("zturbo")
AUTO, NEW = "auto", "new"
live: set[str] = set()  # names of the run folders that are being trained in this process


@dataclass
class Trained:
    """images: IMAGE [B, H, W, 3], the newest previews, or one black pixel block where none were asked for."""

    lora: LoraState
    losses: list[float]
    images: torch.Tensor
    path: Path
    steps: int


def train(recipe: Recipe, dataset: Dataset, model, clip, vae, preview_model, node_id: str, resume: str = AUTO) -> Trained:
    """Train in this process. Raises ZTurboError with a sentence, or ComfyUI's own interrupt; in both cases the LoRA so far is saved.

    resume: see `choose_run`.
    """
    if not isinstance(dataset, Dataset):
        raise ZTurboError(f"dataset is a {type(dataset).__name__}; connect Image Dataset.")
    with torch.inference_mode(False), torch.enable_grad():
        recipe = replace(recipe, data=dataset.options)
        host = ComfyHost(model, clip, vae, recipe, preview_model)
        given = Given(recipes.teaches(recipe), f"{dataset.digest()}-{host.digest()}", source_of(resume))
        run, note = choose_run(recipe, given, resume)
        if recipe.compute.adapter == AUTO:
            host.carry(runfolder.start_of(run.path).get("way") or host.way)  # as it was begun, whatever memory is free today
        control = ComfyControl(run, recipe.steps, node_id, _send)
        log.info("%s Run folder: %s", host.describe(), run.path)
        live.add(run.path.name)
        run.event(event="start", total=recipe.steps, adapter=host.describe(), way=host.way, **vars(given))
        control.push("start", adapter=host.describe())
        for sentence in filter(None, (note, host.warning())):
            trainer.tell(run, control, 0, sentence)
        ended = "failed"
        try:
            facts = metadata(recipe, dataset, host)
            result = trainer.train(recipe, dataset, host, run, control, facts)
            ended = "stopped" if result.steps < recipe.steps else "finished"
        except comfy.model_management.InterruptProcessingException:
            ended = "cancelled"
            log.info("Cancelled. %s", run.kept())
            raise
        except ZTurboError as error:
            raise TrainingError(f"{error} {run.kept()}") from error
        except Exception as error:
            if comfy.model_management.is_oom(error):
                comfy.model_management.soft_empty_cache()
                raise TrainingError(f"There was not enough memory to train. {run.kept()} {less_memory(recipe)}") from error
            raise TrainingError(f"Training ended with {type(error).__name__}: {error}. {run.kept()}") from error
        finally:
            live.discard(run.path.name)
            run.event(event="end", how=ended, saved=run.saved_steps)
            control.flush()
            control.push("end", how=ended, saved=run.saved_steps)
    return Trained(LoraState(result.state, facts | lorafile.thumbnail(result.images)), result.losses, _images(result.images), run.lora, result.steps)


@dataclass(frozen=True)
class Given:
    """What a run is a function of. teaches: see `recipe.teaches`, numbers and words only, so that the log gives them back alike; inputs: digest of pictures and model; source: the checkpoint that it goes on from, or nothing."""

    teaches: dict
    inputs: str
    source: str

    def same_as(self, start: dict) -> bool:
        """Is this what a run's start event says?"""
        return self.teaches == start.get("teaches") and self.inputs == start.get("inputs") and (not self.source or self.source == start.get("source"))

    def differs(self, start: dict) -> str:
        """In words, what is another than a start event says."""
        before, now = start.get("teaches") or {}, self.teaches
        names = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
        return f"other settings ({', '.join(names)})" if names else "other pictures, captions, model or adapter"


def source_of(resume: str) -> str:
    """`run/step` of the checkpoint that a run is to go on from; nothing for auto and new. Raises ZTurboError when it is not there."""
    if resume in (AUTO, NEW):
        return ""
    path = comfy_paths.checkpoint(resume)
    return f"{path.parents[1].name}/{path.stem}"


def choose_run(recipe: Recipe, given: Given, resume: str) -> tuple[RunFolder, str]:
    """The run folder to work in, and a sentence where one that might have been expected is not taken up.

    resume: "auto" opens the newest run of this name that was given the same: one that was cancelled or whose process
    died goes on, one that was finished or stopped hands on what it has. "new" makes a new run. A run's name, or a
    name and a checkpoint (`my_lora_2/step_000500`), makes a new run that goes on from there, or opens the one that
    did so before. Raises ZTurboError for what is not there.
    """
    named = [] if resume == NEW else [path for path in reversed(comfy_paths.runs_named(recipe.name)) if path.name not in live]
    for path in named:
        if given.same_as(runfolder.start_of(path)):
            run = RunFolder(path)
            run.keep_recipe(recipe)
            if runfolder.how_ended(path) != "stopped":
                run.stop.unlink(missing_ok=True)
            log.info("The run %s was given the same settings and pictures: it is taken up again.", path)
            return run, ""
    run = RunFolder.new(comfy_paths.runs(), recipe)
    if given.source:
        run.adopt(comfy_paths.checkpoint(resume))
    cut = named[0] if named and not given.source and runfolder.how_ended(named[0]) not in ("finished", "stopped") else None
    return run, "" if cut is None else f"A new run begins: {cut.name}, which was cut off, had {given.differs(runfolder.start_of(cut))}."


def metadata(recipe: Recipe, dataset: Dataset, host: ComfyHost) -> dict[str, str]:
    """What the LoRA file says about itself: the fields that model browsers show, the recipe, the adapter. No paths."""
    facts = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "z-image-turbo/lora",
        "modelspec.title": recipe.name,
        "modelspec.trigger_phrase": dataset.trigger,
        "modelspec.prediction_type": "rectified_flow",
        "modelspec.resolution": "{}x{}".format(*max(dataset.buckets(), key=math.prod)),
        "ss_output_name": recipe.name,
        "ss_base_model_version": "zimage",
        "ss_network_module": {"lora": "networks.lora", "dora": "networks.lora"}.get(recipe.network.kind, "lycoris.kohya"),
        "ss_network_dim": str(recipe.network.rank),
        "ss_network_alpha": f"{recipe.network.alpha:g}",
        "ss_learning_rate": f"{recipe.optimizer.learning_rate:g}",
        "ss_max_train_steps": str(recipe.steps),
        "ss_seed": str(recipe.seed),
        "ss_optimizer": recipe.optimizer.name,
        "ss_lr_scheduler": recipe.optimizer.schedule,
        "ss_batch_size_per_device": str(recipe.batch_size),
        "ss_num_train_images": str(sum(item.repeats for item in dataset.items)),
        "ss_tag_frequency": json.dumps({dataset.trigger or recipe.name: tag_counts(dataset)}, ensure_ascii=False),
        "zturbo.recipe": recipes.to_toml(replace(recipe, previews=Previews())),  # prompts are the artist's own
    }
    if host.tag is not None:
        facts |= {"zturbo.adapter_sha256": host.tag.sha256, "zturbo.adapter_strength": f"{host.tag.net:g}"}
    return facts


def tag_counts(dataset: Dataset) -> dict[str, int]:
    """How many pictures have each tag (what stands between commas) in their caption, the most frequent first."""
    counts = Counter(tag.strip() for item in dataset.items if not item.regularisation for tag in item.caption.split(",") if tag.strip())
    return dict(counts.most_common(200))


def less_memory(recipe: Recipe) -> str:
    """What this recipe can still give up, when one picture at a time with gradient checkpointing was too much."""
    ways = ["set compute_dtype to bf16"] if recipe.compute.dtype == "fp32" else []
    return f"To need less: {', '.join([*ways, 'lower the resolution of Image Dataset'])}, or load an fp8 or int8 file of the model."


def _images(images: list[np.ndarray]) -> torch.Tensor:
    if not images:
        return torch.zeros(1, 64, 64, 3)
    return torch.from_numpy(np.stack(images).astype(np.float32) / 255.0)


def _send(event: str, data: dict):
    from server import PromptServer

    PromptServer.instance.send_sync(event, data)
