"""Which code runs the model: ComfyUI's where there is one, else diffusers'."""

import argparse
import contextlib
import importlib.metadata
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .. import lorafile
from ..errors import ModelError, ZTurboError
from ..recipe import Inputs, Recipe

TINY = "tiny"
PARTS = ("text_encoder", "vae", "tokenizer")  # beside the transformer in a folder of diffusers' form
NAMES = {
    "model": "a safetensors file, a folder of diffusers' form with all parts in it, or tiny (bundled)",
    "text_encoder": "Qwen3-4B: a file or folder",
    "vae": "a file or folder",
    "tokenizer": "a folder, for diffusers' code; without one Qwen's is used, which is bundled",
    "adapter": "the de-distill adapter's file, or tiny (bundled)",
}
HOST = (
    "whose code runs the model; auto: ComfyUI's where it is found "
    "(--comfyui, COMFYUI_PATH, the install around this folder, ~/comfy/ComfyUI)"
)
DEVICE = "of diffusers' code; ComfyUI chooses for itself"
PLACES = (*NAMES, "pictures", "regularisation")
# the least; the bundled tokenizer is built as transformers 5 builds one
NEEDED = {"diffusers": "0.36", "transformers": "5.0"}


def add_options(parser: argparse.ArgumentParser, but: tuple[str, ...] = ()):
    group = parser.add_argument_group("model")
    for name, text in NAMES.items():
        if name not in but:
            group.add_argument("--" + name.replace("_", "-"), metavar="PATH", help=text)
    group.add_argument("--host", choices=("auto", "comfy", "diffusers"), default="auto", help=HOST)
    group.add_argument("--comfyui", metavar="FOLDER", help="the folder that holds ComfyUI's main.py")
    group.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help=DEVICE)


def given(inputs: Inputs, args) -> Inputs:
    """The inputs with what the options say, as whole paths, so that a run goes on from any folder.

    A model folder that holds the other parts, too, gives those that are not named.
    """
    said = {name: getattr(args, name, None) for name in vars(inputs)}
    wish = replace(inputs, **{name: value for name, value in said.items() if value is not None})
    places = {name: getattr(wish, name) for name in PLACES}
    homes: dict[str, Any] = {name: os.path.expanduser(at) for name, at in places.items() if at.startswith("~")}
    wish = replace(wish, **homes)
    whole = Path(wish.model)
    if wish.model and is_folder(whole / "transformer"):
        open_parts = [name for name in PARTS if not getattr(wish, name)]
        parts: dict[str, Any] = {name: str(whole / name) for name in open_parts if is_folder(whole / name)}
        wish = replace(wish, model=str(whole / "transformer"), **parts)
    places = {name: getattr(wish, name) for name in PLACES}
    found = {name: at for name, at in places.items() if at not in ("", TINY) and there(at)}
    resolved: dict[str, Any] = {name: str(Path(at).resolve()) for name, at in found.items()}
    return replace(wish, **resolved)


def there(place: str) -> bool:
    """Is there such a file or folder? What no system takes for a path is none."""
    with contextlib.suppress(OSError, ValueError):
        return Path(place).exists()
    return False


def is_folder(place: str | Path) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return Path(place).is_dir()
    return False


def choose(args, inputs: Inputs) -> str:
    """comfy or diffusers; for comfy its folder is on the path then. Raises ZTurboError."""
    named = [place for place in (inputs.model, inputs.text_encoder, inputs.vae) if place not in ("", TINY)]
    folders = [place for place in named if is_folder(place)]
    if args.host == "comfy" and folders:
        raise ZTurboError(_folder_for_comfyui(folders[0]))
    if args.host == "diffusers" or folders:
        return need_diffusers()
    folder = find_comfyui(args.comfyui)
    if folder is None:
        if args.host == "comfy":
            raise ZTurboError(NO_COMFYUI)
        return need_diffusers()
    if args.device != "auto":
        raise ZTurboError(_device_for_comfyui(args.device))
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    return "comfy"


def may_be_comfy(args, inputs: Inputs) -> bool:
    """Would `choose` say comfy, as far as can be known with nothing loaded?"""
    return args.host != "diffusers" and not is_folder(inputs.model) and find_comfyui(args.comfyui) is not None


def need_diffusers() -> str:
    missing = []
    for name, least in NEEDED.items():
        version = installed(name)
        if version is None or number(version) < number(least):
            missing.append(f"{name} {version or 'is not installed'}")
    if missing:
        raise ZTurboError(_no_diffusers(missing))
    return "diffusers"


def installed(package: str) -> str | None:
    """Its version, None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def number(version: str) -> tuple[int, ...]:
    """`5.1rc2` -> (5, 1), to compare by."""
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def find_comfyui(named: str | None) -> Path | None:
    """Raises ZTurboError for a named folder that is none."""
    # the pack may be a link in custom_nodes
    packs = [Path(os.path.abspath(__file__)).parents[2], Path(__file__).resolve().parents[2]]
    around = [pack.parents[1] for pack in packs if pack.parent.name == "custom_nodes"]
    wish = named or os.environ.get("COMFYUI_PATH")
    if wish:
        if not is_comfyui(Path(wish)):
            raise ZTurboError(_no_comfyui_folder(wish))
        return Path(wish).resolve()
    return next((place for place in (*around, Path.home() / "comfy" / "ComfyUI") if is_comfyui(place)), None)


def is_comfyui(path: Path) -> bool:
    return (path / "main.py").is_file() and (path / "comfy" / "sd.py").is_file()


def open_host(chosen: str, recipe: Recipe, args, cache: Path | None):
    """A `runs.Host` for the recipe's inputs, which `need` has looked at. Raises ZTurboError for what is missing."""
    if chosen == "comfy":
        try:
            from ..hosts import comfy_headless

            return comfy_headless.open_host(recipe, cache)
        except ModuleNotFoundError as error:
            raise ZTurboError(_package_missing(error.name)) from error
    return open_diffusers(recipe, device_of(args.device), cache)


def need(inputs: Inputs, beside: tuple[str, ...] = ("text_encoder", "vae")):
    """Raise ZTurboError unless every place that is named is there, and all that is needed is named.

    Needed is the model, and beside one that is not bundled also what `beside` lists.
    """
    for name in ("model", *(() if inputs.model == TINY else beside)):
        if not getattr(inputs, name):
            raise ZTurboError(f"inputs.{name} is empty: give --{name.replace('_', '-')}, {NAMES[name]}.")
    for name in PLACES:
        value = getattr(inputs, name)
        if value and value != TINY and not there(value):
            raise ZTurboError(_not_there(name, value))


def open_diffusers(recipe: Recipe, device: torch.device, cache: Path | None):
    from ..hosts import diffusers_load, diffusers_tiny
    from ..hosts.diffusers import DiffusersHost

    inputs = recipe.inputs
    dtype = torch.float32 if device.type == "cpu" and inputs.model == TINY else torch.bfloat16
    if inputs.model == TINY:
        loaded = diffusers_tiny.load(dtype)
    else:
        tokenizer = Path(inputs.tokenizer) if inputs.tokenizer else None
        loaded = diffusers_load.load(Path(inputs.model), Path(inputs.text_encoder), Path(inputs.vae), tokenizer, dtype)
    file = adapter_file(inputs)
    adapter = None if file is None else lorafile.read(file)
    return DiffusersHost(loaded, recipe, device, adapter, inputs.adapter_strength, file.name if file else "", cache)


def model_file(inputs: Inputs) -> Path:
    from ..hosts import diffusers_tiny

    return diffusers_tiny.MODEL if inputs.model == TINY else Path(inputs.model)


def adapter_file(inputs: Inputs) -> Path | None:
    """None: straight on the model."""
    from ..hosts import diffusers_tiny

    if not inputs.adapter or not inputs.adapter_strength:
        return None
    return diffusers_tiny.ADAPTER if inputs.adapter == TINY else Path(inputs.adapter)


def device_of(name: str) -> torch.device:
    """Raises ModelError for one that is not there."""
    can = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if can[kind])
    if not can[name]:
        found = ", ".join(kind for kind, is_there in can.items() if is_there)
        raise ModelError(f"There is no {name} device here. Choose {found}.")
    return torch.device(name)


# What is said of places and packages

NO_COMFYUI = (
    "There is no ComfyUI in COMFYUI_PATH, around this folder, or at ~/comfy/ComfyUI. "
    "Give its folder with --comfyui, or choose --host diffusers."
)


def _folder_for_comfyui(folder: str) -> str:
    return f"{folder} is a folder, and ComfyUI's code loads single files. Choose --host diffusers, or name files."


def _device_for_comfyui(device: str) -> str:
    return (
        f"--device is {device}, and ComfyUI's code chooses its device itself. Leave it out, or choose --host diffusers."
    )


def _no_diffusers(missing: list[str]) -> str:
    wanted = " ".join(f"'{name}>={least}'" for name, least in NEEDED.items())
    return (
        f"diffusers' code is to run the model, and {', '.join(missing)}. pip install {wanted} accelerate; "
        "or give ComfyUI with --comfyui FOLDER: none is in COMFYUI_PATH, around this folder, or at ~/comfy/ComfyUI."
    )


def _no_comfyui_folder(place: str) -> str:
    return f"{place} is not a ComfyUI folder (no main.py and comfy/ in it). Give the folder that holds main.py."


def _package_missing(package: str | None) -> str:
    return (
        f"ComfyUI's code needs the package {package}, which this Python does not have. "
        "Use ComfyUI's own Python, or choose --host diffusers."
    )


def _not_there(name: str, place: str) -> str:
    seen = "" if Path(place).is_absolute() else f" (seen from {Path.cwd()})"
    return f"inputs.{name} is {place!r}, and nothing is there{seen}. Give {NAMES.get(name, 'a folder of pictures')}."
