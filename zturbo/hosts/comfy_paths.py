"""Which folders of ComfyUI a node may read and write. Nothing outside them is touched."""

from pathlib import Path

import folder_paths

from ..errors import DatasetError, ModelError, ZTurboError
from ..modelfile import SUFFIXES
from ..recipe import bad_name, file_name
from ..runs import Runs
from . import comfy_tiny

BUNDLED = "bundled: smiley"
SETS = "zturbo_sets"
TINY = "tiny (bundled)"  # model and adapter in the lists
CHECKPOINTS = "checkpoints/"  # in front of a file of models/checkpoints where files of models/diffusion_models are listed, too


def dataset_folder(name: str) -> Path:
    """The folder that a Dataset node means: inside input, output or temp. Raises DatasetError for any other place."""
    if name.strip() == BUNDLED:
        return comfy_tiny.PICTURES
    roots = [Path(root).resolve() for root in (folder_paths.get_input_directory(), folder_paths.get_output_directory(), folder_paths.get_temp_directory())]
    try:
        places = [(root / name.strip()).resolve() for root in roots]
        there = [place.is_dir() for place in places]
    except (OSError, ValueError, RuntimeError) as error:  # too long, zeros, links in a circle
        raise DatasetError(f"{name[:100]!r} cannot be the name of a folder ({error}). Give the name of a folder inside ComfyUI's input folder.") from error
    allowed = [(place, is_there) for place, is_there in zip(places, there) if name.strip() and any(place.is_relative_to(root) for root in roots)]
    if not allowed:
        raise DatasetError(f"The folder {name!r} is not inside ComfyUI's input or output folder. Put your pictures into a folder in {roots[0]} and give its name.")
    return next((place for place, is_there in allowed if is_there), allowed[0][0])


def folder_fingerprint(name: str) -> str:
    """Changes when a file in the dataset folder comes, goes or changes."""
    try:
        folder = dataset_folder(name)
        files = [(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(folder.rglob("*")) if path.is_file()]
    except (DatasetError, OSError) as error:
        return str(error)
    return str(files)


def set_folder(name: str) -> Path:
    """Where a set of pictures of this name is drawn: output/zturbo_sets/name. Raises ZTurboError for a name that leads elsewhere."""
    if sentence := bad_name(name):
        raise ZTurboError(sentence)
    root = Path(folder_paths.get_output_directory())
    if not _leads_into(root / SETS / name, root):
        raise ZTurboError(f"{SETS}/{name} is a link that leads out of {root}. Choose another name.")
    return root / SETS / name


def runs() -> Runs:
    """Where run folders live: output/zturbo."""
    return Runs(Path(folder_paths.get_output_directory()) / "zturbo")


def lora_file(name: str) -> Path:
    """A LoRA file of models/loras by its name in ComfyUI's lists. Raises ZTurboError when it is not there."""
    found = folder_paths.get_full_path("loras", name)
    if found is None:
        raise ZTurboError(f"There is no LoRA {name!r} in models/loras. Choose one from the list.")
    return Path(found)


def model_names() -> list[str]:
    """Files that may hold a diffusion model: models/diffusion_models, and models/checkpoints behind its name."""
    checkpoints = [name for name in folder_paths.get_filename_list("checkpoints") if name.lower().endswith(SUFFIXES)]
    return [*folder_paths.get_filename_list("diffusion_models"), *(CHECKPOINTS + name for name in checkpoints)]


def model_file(name: str) -> Path:
    """The file behind a name of `model_names`. Raises ModelError when it is not there."""
    found = folder_paths.get_full_path("diffusion_models", name)
    if found is None and name.startswith(CHECKPOINTS):
        found = folder_paths.get_full_path("checkpoints", name.removeprefix(CHECKPOINTS))
    if found is None:
        raise ModelError(f"There is no {name} in models/diffusion_models. Put it there and press R, or choose one from the list.")
    return Path(found)


def part_file(folder: str, *names: str) -> Path:
    """The first of these text encoders or VAEs that is there, by its name in ComfyUI's lists. Raises ModelError when none is."""
    found = next((path for name in names if (path := folder_paths.get_full_path(folder, name))), None)
    if found is None:
        raise ModelError(f"There is no {' or '.join(names)} in models/{folder}. Put it there and press R, or choose another file in the node.")
    return Path(found)


def _parts(name: str) -> list[str]:
    return name.strip().removesuffix(".safetensors").split("/")


def bad_lora_name(name: str) -> str:
    """What is wrong with a name that cannot be a LoRA file's, or nothing."""
    if all(file_name(part) for part in _parts(name)):
        return ""
    return f"The name {name!r} cannot be a LoRA file's. Use letters, digits, spaces and . _ - only (and / for a sub-folder)."


def _leads_into(path: Path, root: Path) -> bool:
    """Is this a place under the root, links followed?"""
    try:
        return path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError):  # links in a circle
        return False


def lora_path(name: str, overwrite: bool) -> Path:
    """Where a LoRA of this name is saved in models/loras; sub-folders with /. Raises ZTurboError for a name that leads elsewhere."""
    if sentence := bad_lora_name(name):
        raise ZTurboError(sentence)
    root = Path(folder_paths.get_folder_paths("loras")[0])
    path = root.joinpath(*_parts(name))
    if not _leads_into(path.parent, root):
        raise ZTurboError(f"The sub-folder of {name!r} is a link that leads out of {root}. Choose another sub-folder.")
    stem, number = path.name, 1
    target = path.with_name(stem + ".safetensors")
    while target.exists() and not overwrite:
        number += 1
        target = path.with_name(f"{stem}_{number}.safetensors")
    return target
