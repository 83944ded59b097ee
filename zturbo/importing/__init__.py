"""Recipes out of other trainers' settings: ai-toolkit's jobs, kohya's training and dataset files.

Nothing in a file is run: YAML is read by `safe_load_all`, TOML and JSON hold nothing but values. What a file leaves out
is that trainer's own default where it decides what is learnt.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from .. import recipefile, words
from ..errors import ZTurboError
from ..recipe import Recipe
from . import kohya, kohya_sets, shared, toolkit
from .record import Line, Moved, brief, nested

LARGEST = 4e6  # bytes of a file that holds settings
GIVE = "Give ai-toolkit's .yaml or .json, or the .toml of sd-scripts or musubi-tuner."


@dataclass(frozen=True)
class Imported:
    """trainer: whose settings they were."""

    recipe: Recipe
    lines: tuple[Line, ...]
    trainer: str


def read(path: Path, dataset: Path | None = None) -> Imported:
    """The recipe that another trainer's file means, and a line for each of its settings. Raises ZTurboError.

    dataset: kohya's dataset file, where the training file does not name it.
    """
    values = _values(path)
    if toolkit.is_job(values):
        if dataset is not None:
            raise ZTurboError(f"{path.name} names its pictures itself. Leave --dataset out.")
        return _done(toolkit.import_job(values, path.parent), "ai-toolkit")
    if kohya.is_training(values):
        return _done(kohya.import_training(values, _dataset(values, dataset, path.parent), path.parent), "kohya")
    if kohya_sets.is_dataset(values):
        return _done(kohya.import_pictures(values, path.parent), "kohya")
    if values and set(values) <= {field.name for field in dataclasses.fields(Recipe)}:
        raise ZTurboError(f"{path.name} is a recipe of this pack already: python -m zturbo train {path.name}.")
    found = ", ".join(map(str, list(values)[:6])) or "nothing"
    raise ZTurboError(f"{path.name} is no trainer's settings that are known here (it has {found}). {GIVE}")


def _done(moved: Moved, trainer: str) -> Imported:
    try:
        recipe = recipefile.from_values(nested(moved.values))
    except ZTurboError as error:
        raise ZTurboError(f"What the file says makes no recipe: {error}") from error
    return Imported(recipe, tuple(moved.lines), trainer)


def _dataset(values: dict, given: Path | None, near: Path) -> dict | None:
    """Of the dataset file, or of the same file; None: there is none."""
    if given is not None:
        return _values(given)
    if kohya_sets.is_dataset(values):
        return {key: values[key] for key in ("general", "datasets") if key in values}
    named = kohya.together(values).get("dataset_config")
    place = shared.there(named, near) if isinstance(named, str) else None
    return None if place is None else _values(place)


def _values(path: Path) -> dict:
    """What a file of settings holds. Raises ZTurboError."""
    if not path.is_file():
        raise ZTurboError(f"There is no file {path}. {GIVE}")
    if path.stat().st_size > LARGEST:
        raise ZTurboError(f"{path.name} has {path.stat().st_size / 1e6:.0f} MB, which no settings have. {GIVE}")
    text = words.read(path)
    kind = path.suffix.lower()
    if kind == ".toml":
        found = [recipefile.read_toml(text, path.name, "Mend that line.")]
    elif kind in (".json", ".jsonc"):
        found = [_json(text, path.name)]
    elif kind in (".yaml", ".yml"):
        found = _yaml(text, path.name)
    else:
        raise ZTurboError(f"{path.name} ends in {kind or 'nothing'}. {GIVE}")
    if len(found) > 1:
        named = ", ".join(brief(_name(one)) for one in found)
        raise ZTurboError(f"{path.name} holds {len(found)} jobs ({named}). Give each a file of its own.")
    if not found or not isinstance(found[0], dict):
        raise ZTurboError(f"{path.name} holds no settings with names. {GIVE}")
    return found[0]


def _name(job) -> object:
    config = job.get("config") if isinstance(job, dict) else None
    return config.get("name") if isinstance(config, dict) else None


def _json(text: str, name: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ZTurboError(f"{name} is not JSON ({error}). Mend it, or give the job as YAML.") from error


def _yaml(text: str, name: str) -> list:
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise ZTurboError(
            "Reading YAML needs the package PyYAML, which ComfyUI and transformers bring: pip install pyyaml; "
            "or give the job as JSON."
        ) from error
    try:
        return [one for one in yaml.safe_load_all(text) if one is not None]
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:
        raise ZTurboError(f"{name} is not plain YAML ({error}). Mend that line.") from error
