"""Which folders of ComfyUI a node may read and write. No name that a workflow brings leads out of them."""

import os
from pathlib import Path

import folder_paths

from ..errors import DatasetError, ModelError, ZTurboError
from ..filenames import bad_name, file_name
from ..folder import all_files
from ..modelfile import SUFFIXES
from ..runs import Runs
from . import comfy_tiny

BUNDLED = "bundled: smiley"
SETS = "zturbo_sets"
TINY = "tiny (bundled)"  # model and adapter in the lists
# in front of a file of models/checkpoints where files of models/diffusion_models are listed, too
CHECKPOINTS = "checkpoints/"


def dataset_folder(name: str) -> Path:
    """The folder that a Dataset node means: inside input, output or temp. Raises DatasetError for any other place."""
    if name.strip() == BUNDLED:
        return comfy_tiny.PICTURES
    roots = [folder_paths.get_input_directory(), folder_paths.get_output_directory(), folder_paths.get_temp_directory()]
    given = name.strip().strip("\"'").strip()
    slashes = given.replace("\\", "/")
    wishes = dict.fromkeys((given, slashes, slashes.removeprefix("input/")))  # as people paste them
    allowed = [place for wish in wishes if wish for root in roots if (place := under(root, wish))]
    if not allowed:
        raise DatasetError(_outside(name, roots[0]))
    try:
        os.path.realpath(allowed[0])  # raises for what no system takes
        return next((place for place in allowed if place.is_dir()), allowed[0])
    except (OSError, ValueError) as error:  # too long, zeros, half a character
        raise DatasetError(_no_name(name, error)) from error


def under(root: str, name: str) -> Path | None:
    """The place of this name under a folder of ComfyUI's; None for a name that leads out of it.

    `..`, an absolute path and another drive lead out. Links on the disk are the owner's, and are followed as ComfyUI
    itself follows them: whole drives are mounted so.
    """
    # people may call a linked folder by either name
    for base in dict.fromkeys((os.path.abspath(root), os.path.realpath(root))):
        place = Path(os.path.normpath(os.path.join(base, name)))
        if place.is_relative_to(base):
            return place
    return None


def folder_fingerprint(name: str) -> str:
    """Changes when a file in the dataset folder comes, goes or changes."""
    try:
        folder = dataset_folder(name)
        files = [(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in all_files(folder)]
    except (DatasetError, OSError) as error:
        return str(error)
    return str(files)


def set_folder(name: str) -> Path:
    """Where a set of pictures of this name is drawn: output/zturbo_sets/name.

    Raises ZTurboError for a name that leads elsewhere.
    """
    if sentence := bad_name(name):
        raise ZTurboError(sentence)
    return Path(folder_paths.get_output_directory()) / SETS / name


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
        raise ModelError(_no_model(name))
    return Path(found)


def part_file(folder: str, *names: str) -> Path:
    """The first of these text encoders or VAEs that is there, by its name in ComfyUI's lists.

    Raises ModelError when none is.
    """
    # in sub-folders, as some sort them
    places = [one for name in names for one in folder_paths.get_filename_list(folder) if Path(one).name == name]
    found = next((path for name in (*names, *places) if (path := folder_paths.get_full_path(folder, name))), None)
    if found is None:
        raise ModelError(_no_part(folder, names))
    return Path(found)


def _parts(name: str) -> list[str]:
    return name.strip().removesuffix(".safetensors").split("/")


def bad_lora_name(name: str) -> str:
    """What is wrong with a name that cannot be a LoRA file's, or nothing."""
    if all(file_name(part) for part in _parts(name)):
        return ""
    allowed = "Use letters, digits, spaces and . _ - only (and / for a sub-folder)."
    return f"The name {name!r} cannot be a LoRA file's. {allowed}"


def lora_path(name: str, overwrite: bool) -> Path:
    """Where a LoRA of this name is saved in models/loras; sub-folders with /.

    Raises ZTurboError for a name that leads elsewhere.
    """
    if sentence := bad_lora_name(name):
        raise ZTurboError(sentence)
    root = Path(folder_paths.get_folder_paths("loras")[0])
    path = root.joinpath(*_parts(name))
    stem, number = path.name, 1
    target = path.with_name(stem + ".safetensors")
    while target.exists() and not overwrite:
        number += 1
        target = path.with_name(f"{stem}_{number}.safetensors")
    return target


# What is said of names


def _outside(name: str, root: str) -> str:
    return (
        f"The folder {name!r} is not inside ComfyUI's input or output folder. "
        f"Put your pictures into a folder in {root} and give its name."
    )


def _no_name(name: str, error: Exception) -> str:
    return (
        f"{name[:100]!r} cannot be the name of a folder ({error}). "
        "Give the name of a folder inside ComfyUI's input folder."
    )


def _no_model(name: str) -> str:
    return f"There is no {name} in models/diffusion_models. Put it there and press R, or choose one from the list."


def _no_part(folder: str, names: tuple[str, ...]) -> str:
    return (
        f"There is no {' or '.join(names)} in models/{folder}. "
        "Put it there and press R, or choose another file in the node."
    )
