"""A run is a folder: the recipe, the event log that panel and plots read, previews, the LoRA so far.

Every file is written beside and renamed; the event log is appended to, a JSON object a line.
"""

import contextlib
import json
import logging
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from . import lorafile
from . import recipe as recipes
from .errors import LoraFileError, ZTurboError

log = logging.getLogger("zturbo")
RECIPE, EVENTS, PREVIEWS, LORA, STOP = "recipe.toml", "events.jsonl", "previews", "lora.safetensors", "stop"


class RunFolder:
    """Open a new run under `parent`. Raises ZTurboError when nothing can be written there."""

    def __init__(self, parent: Path, recipe: recipes.Recipe):
        try:
            self.path = _new_folder(parent, recipe.name)
            self._write(RECIPE, recipes.to_toml(recipe).encode())
            (self.path / PREVIEWS).mkdir()
        except OSError as error:
            raise ZTurboError(f"The run folder {parent / recipe.name} cannot be made: {error.strerror}. Free some room or make the output folder writable.") from error
        self.events = self.path / EVENTS
        self.lora = self.path / LORA
        self.stop = self.path / STOP  # exists once someone asked to stop and keep
        self.saved_steps = 0  # what the LoRA file on the disk has learnt
        self.refused = ""  # why a newer one could not be written
        self._log_failed = False

    def _write(self, name: str, content: bytes):
        path = self.path / name
        beside = path.with_name(path.name + ".part")
        beside.write_bytes(content)
        os.replace(beside, path)

    def event(self, **values):
        """Append one event. A log that cannot be written is said once and never ends a run."""
        try:
            with open(self.events, "a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:
            if not self._log_failed:
                log.warning("The event log %s cannot be written (%s); training goes on without it.", self.events, error.strerror)
            self._log_failed = True

    def save(self, steps: int, state: dict[str, torch.Tensor], metadata: dict[str, str]):
        """Write the LoRA of `steps` steps. A disk that refuses is said, and never ends a run: the LoRA is still in memory."""
        try:
            lorafile.write(self.lora, state, metadata)
            self.saved_steps, self.refused = steps, ""
        except LoraFileError as error:
            log.error("%s", error)
            self.refused = str(error)

    def kept(self) -> str:
        """A sentence: what of the LoRA is on the disk."""
        there = f"The LoRA of step {self.saved_steps} is saved as {self.lora}; to use it, copy it into models/loras." if self.saved_steps else ""
        return " ".join(filter(None, (self.refused, there))) or "Nothing had been learnt yet."

    def preview(self, step: int, number: int, image: np.ndarray) -> Path | None:
        """Keep a preview [H, W, 3] uint8 as PNG. Returns its path, or None where it could not be written."""
        path = self.path / PREVIEWS / f"step_{step:06d}_{number}.png"
        beside = path.with_suffix(".part")
        try:
            Image.fromarray(image).save(beside, format="PNG", compress_level=4)  # as core saves, so that files compare
            os.replace(beside, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                beside.unlink()
            log.warning("The preview %s cannot be written (%s).", path, error.strerror)
            return None
        return path


def _new_folder(parent: Path, name: str) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        path = parent / (name if number == 1 else f"{name}_{number}")
        try:
            path.mkdir()
            return path
        except FileExistsError:
            number += 1


def read_events(path: Path) -> list[dict]:
    """The events of a run, oldest first; a line that was cut off is left out."""
    if not path.is_file():
        return []
    events = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return events


def summary(folder: Path, points: int) -> dict:
    """What the panel needs to redraw a run: total steps, the curve in at most `points` points, newest previews, its end event."""
    events = read_events(folder / EVENTS)
    steps = [{key: event[key] for key in ("step", "loss", "seconds")} for event in events if "loss" in event]
    start = next((event for event in events if event.get("event") == "start"), {})
    end = next((event for event in events if event.get("event") == "end"), {})
    thin = max(1, -(-len(steps) // points))
    return {
        "run": folder.name,
        "total": start.get("total", 0),
        "adapter": start.get("adapter", ""),
        "steps": steps[::thin] + (steps[-1:] if steps and (len(steps) - 1) % thin else []),
        "files": newest_previews(folder),
        "how": end.get("how"),
        "saved": end.get("saved", 0),
    }


def newest_previews(folder: Path) -> list[str]:
    """File names of the previews of the newest step that has any."""
    names = sorted(path.name for path in (folder / PREVIEWS).glob("step_*.png"))
    return [name for name in names if name.rsplit("_", 1)[0] == names[-1].rsplit("_", 1)[0]] if names else []


def request_stop(folder: Path):
    """Ask the run in this folder to stop after its current step and keep what it has."""
    (folder / STOP).touch()
