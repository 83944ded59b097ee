"""A set of pictures drawn by turbo at 8 steps, with core's own sampler, streamed to a folder."""

import logging
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths

from ..errors import ZTurboError
from ..pictureset import PictureSet, Plan, asked_wildcards
from ..recipe import bad_name
from . import comfy_adapter, comfy_draw

log = logging.getLogger("zturbo")
TOGETHER = 8  # pictures between two changes of model: prompts are encoded, then drawn, then decoded
SETS = "zturbo_sets"


def draw(model, clip, vae, plan: Plan, name: str, node_id: str) -> tuple[PictureSet, int]:
    """(the set, how many pictures were drawn now). Raises ComfyUI's interrupt when cancelled; what is drawn stays."""
    tag = comfy_adapter.carried(model)
    if tag is not None and tag.net != 0:
        raise ZTurboError(f"The model carries the de-distill adapter {tag.file} at {tag.net:+g}: it would draw blurred pictures. Connect the clean turbo model.")
    comfy_adapter.diffusion_model(model)
    if sentence := bad_name(name):
        raise ZTurboError(sentence)
    made = PictureSet(Path(folder_paths.get_output_directory()) / SETS / name, plan)
    todo = list(made.missing())
    bar, drawn = comfy.utils.ProgressBar(plan.count, node_id=node_id), plan.count - len(todo)
    bar.update_absolute(drawn)
    log.info("%s: %d of %d pictures are there.", made.folder, drawn, plan.count)
    try:
        for some in (todo[i : i + TOGETHER] for i in range(0, len(todo), TOGETHER)):
            prompts = [comfy_draw.encode_prompt(clip, picture.prompt) for picture in some]
            latents = []
            for picture, prompt in zip(some, prompts):
                comfy.model_management.throw_exception_if_processing_interrupted()
                latents.append(comfy_draw.sample(model, prompt, picture.width, picture.height, 8, picture.seed, "euler"))
            for picture, latent in zip(some, latents):
                made.write(picture, comfy_draw.to_bytes(comfy_draw.decode(vae, latent)[0]))
                drawn += 1
                bar.update_absolute(drawn)
    finally:
        made.write_list()
    return made, len(todo)


def prompt_file(name: str) -> tuple[str, ...]:
    """The lines of a text file in ComfyUI's input folder."""
    return _lines(_inside(name), name) if name.strip() else ()


def wildcards(prompts: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """The lines of every wildcard that prompts ask for, from input/wildcards; and of those that these ask for."""
    found: dict[str, tuple[str, ...]] = {}
    wanted = asked_wildcards(prompts)
    while todo := wanted - found.keys():
        for name in todo:
            path = _inside(f"wildcards/{name}.txt")
            found[name] = _lines(path, path.name) if path.is_file() else ()
        wanted = asked_wildcards(line for lines in found.values() for line in lines) | wanted
    return {name: found[name] for name in sorted(found) if found[name]}


def _inside(name: str) -> Path:
    root = Path(folder_paths.get_input_directory()).resolve()
    try:
        path = (root / name.strip()).resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise ZTurboError(f"{name[:100]!r} cannot be the name of a file ({error}).") from error
    if not path.is_relative_to(root):
        raise ZTurboError(f"{name!r} is not inside ComfyUI's input folder. Put the file there and give its name.")
    return path


def _lines(path: Path, name: str) -> tuple[str, ...]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ZTurboError(f"The file {name} cannot be read: {error.strerror}. Put it into {folder_paths.get_input_directory()}.") from error
    except ValueError as error:
        raise ZTurboError(f"The file {name} is no text in UTF-8 ({error}). Save it as UTF-8.") from error
    return tuple(line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#"))


def changed(*names: str) -> str:
    """Something that changes when one of these input files, or a wildcard, does."""
    root = Path(folder_paths.get_input_directory())
    paths = [*(root / name for name in names if name), *sorted((root / "wildcards").rglob("*.txt"))]
    return str([(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in paths if path.is_file()])
