"""LoRAs and a run's checkpoints side by side, drawn at turbo speed as core draws them, from one model."""

import logging
from dataclasses import dataclass
from pathlib import Path

import comfy.utils
import folder_paths
import torch

from .. import checkpoint, comparison, lorafile, network, recipefile, session, words
from ..comparison import Column
from ..errors import ZTurboError
from ..family import Z_IMAGE
from ..lowrank import Target
from ..recipe import Recipe
from ..runfolder import HEALTHY, LORA, RECIPE
from ..runs import TRIGGER
from . import comfy_adapter, comfy_draw, comfy_paths
from .comfy import release

log = logging.getLogger("zturbo")
CONNECTED = "LoRA"  # the name of the one that comes in by a wire


@dataclass(frozen=True)
class Checkpoint:
    """Of a run: its file."""

    path: Path


Given = dict[str, torch.Tensor] | Path | Checkpoint  # a LORA_MODEL, a LoRA's file, or a checkpoint


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
        if file.endswith(".safetensors") and _is_there(file):
            shown = file.removesuffix(".safetensors")
            return {file if shown == CONNECTED else shown: comfy_paths.lora_file(file)}
    if name.endswith(".safetensors"):
        raise ZTurboError(f"There is no LoRA {name!r} in models/loras. Write a file's name as loaders list it.")
    found = comfy_paths.runs().loras(name)
    return {one: path if path.name in (LORA, HEALTHY) else Checkpoint(path) for one, path in found}


def _is_there(file: str) -> bool:
    """Is it in models/loras? Windows raises for a name on another drive."""
    try:
        return folder_paths.get_full_path("loras", file) is not None
    except ValueError:
        return False


def filled(prompts: tuple[str, ...], loras: dict[str, Given]) -> tuple[str, ...]:
    """With the trigger word where they say `[trigger]`: that of the first LoRA which says one. Raises ZTurboError."""
    if not any(words.PLACE.search(prompt) for prompt in prompts):
        return prompts
    trigger = next(filter(None, map(_trigger, loras.values())), "")
    if not trigger:
        raise ZTurboError(
            "A prompt says [trigger], and none of these LoRAs says what its trigger word is. Write the word."
        )
    return tuple(words.filled(prompt, trigger) for prompt in prompts)


def _trigger(lora: Given) -> str:
    """As its run wrote it down, or nothing."""
    if isinstance(lora, Checkpoint):
        return recipefile.read(lora.path.parents[1] / RECIPE).inputs.trigger
    metadata = lorafile.metadata(lora) if isinstance(lora, Path) else getattr(lora, "metadata", {})
    return metadata.get(TRIGGER, "")


def fingerprint(names: tuple[str, ...]) -> str:
    """Changes when what these names mean does, or a file of it."""
    try:
        paths = [one.path if isinstance(one, Checkpoint) else one for one in given(names, None).values()]
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
    pictures, shown, notes = None, [[] for _ in prompts], []
    name, state = "", {}  # the LoRA that was read last
    try:
        for x, column in enumerate(columns):
            if column.lora and column.lora != name:
                name, (state, lost) = column.lora, _state(loras[column.lora], column.lora, clean)
                notes += [f"Left out of {name} are {lost}."] if lost else []
            changed = comfy_draw.with_lora(clean, state, column.strength) if column.lora else clean
            for y, image in enumerate(comfy_draw.draw(changed, vae, positive, how)):
                if pictures is None:
                    pictures = torch.empty(len(prompts), len(columns), *image.shape)
                pictures[y, x] = image
                shown[y].append(comfy_draw.to_bytes(image))
                bar.update(1)
    finally:
        release(clean)
    assert pictures is not None, "there are columns and prompts"
    text = "\n".join([*_legend("column", [c.label for c in columns]), *_legend("row", list(prompts)), *notes])
    log.info("%s", text)
    grid = comparison.grid(shown, [column.label for column in columns], list(prompts))
    return Compared(grid, pictures.flatten(0, 1), text)


def _legend(what: str, texts: list[str]) -> list[str]:
    return [f"{what} {number}: {text}" for number, text in enumerate(texts, 1)]


def _state(lora: Given, name: str, clean) -> tuple[dict[str, torch.Tensor], str]:
    """(tensors for core's loader, what is left out)."""
    if isinstance(lora, Checkpoint):
        return of_checkpoint(lora.path, clean), ""
    return comfy_draw.lora_for(clean, lora, name)


@dataclass
class Shapes:
    """What `session.untrained` asks of a host, where nothing is trained."""

    recipe: Recipe
    targets: list[Target]
    family = Z_IMAGE
    device = torch.device("cpu")

    def start(self):
        name = self.recipe.network.start
        return network.read_start(comfy_paths.lora_file(name), self.targets) if name else None

    def norms(self, targets: list[Target]) -> dict[str, torch.Tensor]:
        """In the shape of the clean weights' norms; the checkpoint has its own."""
        return {part.name: torch.ones(1, target.in_features) for target in targets for part in target.parts}


def of_checkpoint(path: Path, model) -> dict[str, torch.Tensor]:
    """The LoRA that a run would have handed on at this checkpoint. Raises ZTurboError. model: MODEL."""
    recipe = recipefile.read(path.parents[1] / RECIPE)
    targets = comfy_adapter.targets(comfy_adapter.diffusion_model(model), Z_IMAGE.trained)
    with torch.inference_mode(False):
        state = session.untrained(recipe, Shapes(recipe, targets))
        state.take(*checkpoint.read(path))
        return state.exported(lorafile.DTYPES[recipe.saving.dtype])
