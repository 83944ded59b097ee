"""All runs at a glance, and what a person does with one that has ended: delete it, take its LoRA, open its graph."""

import json
import shutil
from functools import lru_cache
from pathlib import Path

from . import files, runlog
from .errors import ZTurboError
from .runfolder import HEALTHY, LORA, RECIPE, WORKFLOW, RunFolder, step_of
from .runs import Runs, name_of, own

RUNNING, DIED = "running", "died"
KINDS = {"newest": LORA, "healthy": HEALTHY}  # of a run's LoRAs


def runs_of(runs: Runs) -> list[dict]:
    """Facts of each run, the one that was last trained first."""
    if not runs.root.is_dir():
        return []
    found = [facts(path) for path in runs.root.iterdir() if path != runs.cache and own(path) and name_of(path)]
    return sorted(found, key=lambda run: (-run["modified"], run["run"]))


def facts(folder: Path) -> dict:
    """Of one run. modified: seconds since 1970; how: as `runlog.how_ended`, or running or died."""
    run, log = RunFolder(folder), folder / runlog.EVENTS
    stamp = log.stat() if log.is_file() else folder.stat()
    told = _told(folder, stamp.st_mtime_ns, stamp.st_size)
    shown = runlog.previews(folder)
    return {
        "run": folder.name,
        "name": name_of(folder),
        **told,
        "how": told["how"] or (RUNNING if run.is_live() else DIED),
        "saved": run.saved_steps,
        "healthy": run.healthy_step,
        "checkpoints": [step_of(path) for path in run.checkpoint_files()],
        "preview": shown[max(shown)][0] if shown else "",
        "workflow": (folder / WORKFLOW).is_file(),
        "modified": stamp.st_mtime,
    }


@lru_cache(1024)
def _told(folder: Path, changed: int, size: int) -> dict:
    """What a run's log says of it. changed, size: of the log."""
    events = runlog.read_events(folder / runlog.EVENTS)
    losses = [event["loss"] for event in events if "loss" in event]
    gauges = [event["gauge"] for event in events if event.get("event") == "health"]
    last = losses[-100:]
    return {
        "total": runlog.newest_start(events).get("total", 0),
        "step": max((event["step"] for event in events if "loss" in event), default=0),
        "loss": sum(last) / len(last) if last else None,
        "gauge": gauges[-1] if gauges else None,
        "how": next((event["how"] for event in reversed(events) if event.get("event") == "end"), None),
    }


def recipe(folder: Path) -> str:
    """The TOML file. Raises ZTurboError."""
    try:
        return (folder / RECIPE).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ZTurboError(f"The recipe of {folder.name} cannot be read ({error}).") from error


def workflow(folder: Path) -> dict:
    """The graph that a run was a node of. Raises ZTurboError."""
    try:
        found = json.loads((folder / WORKFLOW).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ZTurboError(f"The run {folder.name} has no graph that can be opened ({error}).") from error
    if not isinstance(found, dict):
        raise ZTurboError(f"The graph of the run {folder.name} is none.")
    return found


def delete(folder: Path):
    """Remove a run with all that it has made. Raises ZTurboError for one that is being trained."""
    run = RunFolder(folder)
    if not run.take():
        raise ZTurboError(f"The run {folder.name} is being trained right now. Stop or cancel it first.")
    try:
        run.release()
        shutil.rmtree(folder)
    except OSError as error:
        raise ZTurboError(
            f"The run {folder.name} cannot be deleted: {error.strerror}. {files.advice(error)}"
        ) from error


def lora(folder: Path, kind: str) -> Path:
    """A run's LoRA file. kind: newest, or healthy, the newest with which turbo was not worn. Raises ZTurboError."""
    path = folder / KINDS.get(kind, "")
    if kind not in KINDS or not path.is_file():
        raise ZTurboError(f"The run {folder.name} has no {kind} LoRA.")
    return path
