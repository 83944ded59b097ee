"""All runs at a glance, and what a person does with one that has ended: delete it, take its LoRA, open its graph."""

import contextlib
import json
import shutil
import time
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
    found = []
    for path in runs.root.iterdir():
        with contextlib.suppress(OSError):  # it may go in this moment
            if is_run(path):
                found.append(facts(path))
    return sorted(found, key=lambda run: (-run["modified"], run["run"]))


def is_run(folder: Path) -> bool:
    """Names with a dot in front are no run's."""
    return not folder.name.startswith(".") and own(folder) and bool(name_of(folder))


def facts(folder: Path) -> dict:
    """Of one run. modified: seconds since 1970; how: as `runlog.how_ended`, or running or died."""
    run, log = RunFolder(folder), folder / runlog.EVENTS
    stamp = log.stat() if log.is_file() else folder.stat()
    told = _told(folder, stamp.st_mtime_ns, stamp.st_size)
    shown = runlog.previews(folder, told["step"])
    return {
        "run": folder.name,
        "name": name_of(folder),
        **told,
        "how": how(run, told["how"]),
        "saved": run.saved_steps,
        "healthy": run.healthy_step,
        "checkpoints": [step_of(path) for path in run.checkpoint_files()],
        "preview": shown[-1]["files"][0] if shown else "",
        "workflow": (folder / WORKFLOW).is_file(),
        "modified": stamp.st_mtime,
    }


def how(run: RunFolder, ended: str | None) -> str:
    """How a run is: as it said that it ended, or running, or died where its process went away before it could."""
    return ended or (RUNNING if run.is_live() else DIED)


@lru_cache(1024)
def _told(folder: Path, changed: int, size: int) -> dict:
    """What a run's log says of it. changed, size: of the log."""
    events = runlog.read_events(folder / runlog.EVENTS)
    losses = [event["loss"] for event in events if "loss" in event]
    gauges = [event["gauge"] for event in events if event.get("event") == "health"]
    last = losses[-100:]
    return {
        "total": runlog.newest_start(events).get("total", 0),
        "step": runlog.last_step(events),
        "loss": sum(last) / len(last) if last else None,
        "gauge": gauges[-1] if gauges else None,
        "how": runlog.end_of(events).get("how"),
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
        raise ZTurboError(f"The graph that the run {folder.name} has kept is no graph.")
    return found


def delete(folder: Path):
    """Remove a run with all that it has made.

    Raises ZTurboError for one that is being trained, for a link, and for a folder that is no run. It goes out of the
    way as a whole first, so that no half of it is left where a file cannot be deleted.
    """
    if folder.is_symlink() or not is_run(folder):
        raise ZTurboError(f"{folder.name} is no run's own folder, and is not deleted.")
    if RunFolder(folder).is_live():
        raise ZTurboError(f"The run {folder.name} is being trained right now. Stop or cancel it first.")
    aside = folder.with_name(f".deleted_{folder.name}_{time.time_ns()}")
    try:
        folder.rename(aside)
        shutil.rmtree(aside)
    except OSError as error:
        why = f"{error.strerror or error}. {files.advice(error)}"
        raise ZTurboError(f"The run {folder.name} cannot be deleted: {why}") from error


def lora(folder: Path, kind: str) -> Path:
    """A run's LoRA file. kind: newest, or healthy, the newest with which turbo was not worn. Raises ZTurboError."""
    path = folder / KINDS.get(kind, "")
    if kind not in KINDS or not path.is_file():
        raise ZTurboError(f"The run {folder.name} has no {kind} LoRA.")
    return path
