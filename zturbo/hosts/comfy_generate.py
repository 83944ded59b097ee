"""A set of pictures drawn by turbo at 8 steps, with core's own sampler, streamed to a folder."""

import logging
from dataclasses import replace
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
import torch

from .. import words
from ..errors import ZTurboError
from ..pictureset import Picture, PictureSet, Plan, asked_wildcards, read_sizes
from . import comfy_adapter, comfy_added, comfy_cache, comfy_draw, comfy_paths
from .comfy_draw import Drawing

log = logging.getLogger("zturbo")
TOGETHER = 8  # pictures between two changes of model: prompts are encoded, then drawn, then decoded


def plan(prompts: tuple[str, ...], prompt_file: str, sizes: str, seed: int, count: int) -> Plan:
    """A set's plan from the node's inputs and the files that they name. Raises ZTurboError."""
    templates = (*prompts, *read_prompts(prompt_file))
    return Plan(templates, wildcards(templates), read_sizes(sizes), seed, count)


def wrong(name: str, prompts: tuple[str, ...], prompt_file: str, sizes: str) -> str:
    """What is wrong with these inputs, in a sentence, or nothing."""
    try:
        comfy_paths.set_folder(name)
        plan(prompts, prompt_file, sizes, 0, 1)
    except ZTurboError as error:
        return str(error)
    return ""


def draw(model, clip, vae, asked: Plan, name: str, node_id: str) -> tuple[PictureSet, int]:
    """(the set, how many pictures were drawn now). Raises ComfyUI's interrupt when cancelled; what is drawn stays."""
    tag = comfy_adapter.carried(model)
    if tag is not None and tag.net != 0:
        raise ZTurboError(_adapter_on(tag.file, tag.net))
    comfy_adapter.diffusion_model(model)
    models = "-".join(_digest(patcher) for patcher in (model, clip.patcher, vae.patcher))
    made = PictureSet(comfy_paths.set_folder(name), replace(asked, models=models))
    todo = made.missing()
    bar = comfy.utils.ProgressBar(asked.count, node_id=node_id)
    bar.update_absolute(asked.count - len(todo))
    log.info("%s: %d of %d pictures are there.", made.folder, asked.count - len(todo), asked.count)
    try:
        for some in (todo[i : i + TOGETHER] for i in range(0, len(todo), TOGETHER)):
            _draw_some(model, clip, vae, some, made, bar)
    finally:
        made.write_list()
    return made, len(todo)


def _digest(patcher) -> str:
    return comfy_cache.fingerprint(patcher, tuple(comfy_added.unseen(patcher)))[:16]


def _draw_some(model, clip, vae, some: list[Picture], made: PictureSet, bar):
    """Draw and keep these. When it is cancelled, those that are drawn by then are kept."""
    prompts = [comfy_draw.encode_prompt(clip, picture.prompt) for picture in some]
    latents: list[torch.Tensor] = []
    try:
        for picture, prompt in zip(some, prompts):
            comfy.model_management.throw_exception_if_processing_interrupted()
            how = Drawing(picture.width, picture.height, 8, picture.seed, "euler")
            latents.append(comfy_draw.sample(model, prompt, how))
            bar.update(1)
    finally:
        for picture, latent in zip(some, latents):
            made.write(picture, comfy_draw.to_bytes(comfy_draw.decode(vae, latent)[0]))


def read_prompts(name: str) -> tuple[str, ...]:
    """The lines of a text file in ComfyUI's input folder. Raises ZTurboError."""
    if not name.strip():
        return ()
    if (path := _input_file(name.strip())) is None:
        raise ZTurboError(_no_file(name))
    return _lines(path)


def wildcards(prompts: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """The lines of every wildcard that prompts ask for, from input/wildcards; and of those that these ask for."""
    found: dict[str, tuple[str, ...]] = {}
    wanted = asked_wildcards(prompts)
    while todo := wanted - found.keys():
        for name in todo:
            path = _input_file(f"wildcards/{name}.txt")
            found[name] = () if path is None else _lines(path)
        wanted = asked_wildcards(line for lines in found.values() for line in lines) | wanted
    return {name: found[name] for name in sorted(found) if found[name]}


def _input_file(name: str) -> Path | None:
    """The file of this name in ComfyUI's input folder, if there is one.

    Raises ZTurboError for a name that leads elsewhere.
    """
    path = comfy_paths.under(folder_paths.get_input_directory(), name)
    try:
        is_there = path is not None and path.is_file()
    except (OSError, ValueError) as error:  # too long, zeros
        raise ZTurboError(_no_name(name)) from error
    if path is None:
        raise ZTurboError(f"{name[:100]!r} is not inside ComfyUI's input folder. Put the file there and give its name.")
    return path if is_there else None


def _lines(path: Path) -> tuple[str, ...]:
    return tuple(line.strip() for line in words.read(path).splitlines() if line.strip() and not line.startswith("#"))


def changed(name: str) -> str:
    """Something that changes when the prompt file of this name, or a wildcard, does."""
    try:
        prompts, lines = _input_file(name.strip()), Path(folder_paths.get_input_directory()) / "wildcards"
        found = [*([] if prompts is None else [prompts]), *sorted(lines.rglob("*.txt"))]
        return str([(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in found])
    except (ZTurboError, OSError) as error:
        return str(error)


# What is said of the model and of files


def _adapter_on(file: str, strength: float) -> str:
    return (
        f"The model carries the de-distill adapter {file} at {strength:+g}: it would draw blurred pictures. "
        "Connect the clean turbo model."
    )


def _no_file(name: str) -> str:
    folder = folder_paths.get_input_directory()
    return f"There is no file {name[:100]!r} in ComfyUI's input folder. Put it into {folder}."


def _no_name(name: str) -> str:
    return f"{name[:100]!r} cannot be the name of a file. Give the name of a text file in ComfyUI's input folder."
