"""A run is a folder: the recipe, the event log that panel and plots read, checkpoints, previews, the LoRA so far.

Every file is written beside and renamed; the event log is appended to, a JSON object a line.
"""

import contextlib
import io
import json
import logging
import math
import os
import re
import shutil
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from PIL import Image
from safetensors import SafetensorError, safe_open

from . import checkpoint, files, lorafile, recipefile, runlog
from .checkpoint import Copy
from .errors import CheckpointError, LoraFileError, ZTurboError
from .lowrank import Difference
from .recipe import Recipe
from .runlog import EVENTS, PREVIEWS
from .state import State
from .world import ALONE, World

log = logging.getLogger("zturbo")
RECIPE, CHECKPOINTS = "recipe.toml", "checkpoints"
LORA, HEALTHY, LEARNT = "lora.safetensors", "healthy.safetensors", "taught.safetensors"
WORKFLOW, LOCK = "workflow.json", "lock"
# empty files: what someone asks of a run
STOP, SAVE, PAUSE, CANCEL = WISHES = ("stop", "save", "pause", "cancel")
BLANK = {RECIPE, EVENTS, PREVIEWS, CHECKPOINTS, WORKFLOW, LOCK, *WISHES}
STEPS = "ss_steps"  # of a LoRA's metadata
SAFE = 100  # steps: a checkpoint that far behind is from before an explosion that is noticed now


class RunFolder:
    """The folder of one run. `new` makes one, `RunFolder(path)` opens one that is there.

    world: the processes that train it. The folder is the first one's; `together.FollowedRun` is the others' view.
    """

    def __init__(self, path: Path):
        self.path = path
        self.world: World = ALONE
        self.events = self.path / EVENTS
        self.checkpoints = self.path / CHECKPOINTS
        self.lora = self.path / LORA
        self.stop = self.path / STOP  # exists once someone asked to stop and keep
        self.save_now = self.path / SAVE  # exists until someone's wish to save now is taken up
        self.pause = self.path / PAUSE  # exists while someone wants it to wait
        self.cancel = self.path / CANCEL  # exists until someone's wish to end it at once is taken up
        self.healthy = self.path / HEALTHY  # the newest LoRA with which turbo was healthy still
        self.healthy_step = steps_of(self.healthy)
        # the LoRA when the last picture had been trained, where turbo is restored behind that
        self.learnt = self.path / LEARNT
        self.saved_steps = steps_of(self.lora)  # what the LoRA file on the disk has learnt
        self.refused = ""  # why a newer one, or a checkpoint, could not be written
        self._log_failed = False
        self._lock = FileLock(self.path / LOCK)

    def take(self, wait: float = 0.2) -> bool:
        """Keep every other run out of the folder, in this process and in others, until `release` or the process's end.

        False: another is in it. wait: seconds, as somebody may be just looking whether it is free.
        """
        try:
            self._lock.acquire(timeout=wait, poll_interval=0.02)
        except Timeout:
            return False
        # a network drive without locks, or a folder that cannot be written
        except (OSError, NotImplementedError) as error:
            log.warning("The run folder %s cannot be locked (%s).", self.path, error)
        return True

    def release(self):
        self._lock.release()

    def give_up(self):
        """Leave the folder. One that was made just now, and in which nothing has begun, goes."""
        self.release()
        if not self.events.exists() and not self.checkpoint_files():
            shutil.rmtree(self.path, ignore_errors=True)

    def is_live(self) -> bool:
        """Is it being trained in, in any process?"""
        free = self.take(wait=0)
        self.release()
        return not free

    @classmethod
    def new(cls, parent: Path, recipe: Recipe, taken: bool = False) -> "RunFolder":
        """`name`, or `name_2`, `name_3` … under `parent`. taken: as `take` would, from its first moment on.

        Raises ZTurboError when nothing can be written there.
        """
        try:
            run = cls(_new_folder(parent, recipe.name))
            while taken and not run.take():  # another process has found the empty folder and begun in it
                run = cls(_new_folder(parent, recipe.name))
        except OSError as error:
            raise ZTurboError(
                f"The run folder {parent / recipe.name} cannot be made: {error.strerror}. {files.advice(error)}"
            ) from error
        run.furnish(recipe)
        return run

    def furnish(self, recipe: Recipe):
        """Write into a new folder, or one that never came further, what stands in each.

        Raises ZTurboError when nothing can be written there.
        """
        try:
            files.write(self.path / RECIPE, recipefile.to_toml(recipe).encode())
            (self.path / PREVIEWS).mkdir(exist_ok=True)
            self.checkpoints.mkdir(exist_ok=True)
        except OSError as error:
            self.give_up()
            raise ZTurboError(
                f"The run folder {self.path} cannot be made: {error.strerror}. {files.advice(error)}"
            ) from error

    def is_blank(self, source: str = "") -> bool:
        """Has nothing begun in it? So a process that died between making it and its start event leaves it.

        source: of the checkpoint that it may be a copy of, by its stem.
        """
        allowed = BLANK | ({f"{CHECKPOINTS}/{source}.safetensors", LEARNT} if source else set())
        there = {path.relative_to(self.path).as_posix().removesuffix(".part") for path in self.path.rglob("*")}
        return there <= allowed and not runlog.read_events(self.events)

    def keep_recipe(self, recipe: Recipe):
        """Write down the settings of a run that is taken up: previews and saving may be others than before."""
        with contextlib.suppress(OSError):
            files.write(self.path / RECIPE, recipefile.to_toml(recipe).encode())

    def save_checkpoint(self, copy: Copy, keep: int):
        """Save everything of this moment; then, once the new file is proven whole, older ones go.

        The newest `keep` stay, and one or two to fall back on: of each hundred of steps behind, the last checkpoint in
        it stays until it is SAFE steps old and a younger one is too.
        A disk that refuses is said and never ends a run.
        """
        try:
            with contextlib.suppress(OSError), open(self.events, "rb") as log_file:
                os.fsync(log_file.fileno())  # what the checkpoint knows, the log knows
            checkpoint.write(self.checkpoints / f"{step_name(copy.step)}.safetensors", copy)
        except CheckpointError as error:
            log.error("%s", error)
            self.refused = str(error)
            return
        written = self.checkpoint_files()
        whole = copy.step // SAFE * SAFE
        safe = [next((path for path in written if step_of(path) <= limit), None) for limit in (whole, whole - SAFE)]
        for old in written[keep:]:
            if old not in safe and step_of(old) != self.healthy_step:
                with contextlib.suppress(OSError):
                    old.unlink()

    def checkpoint_files(self) -> list[Path]:
        """Newest first."""
        steps = {
            path: re.fullmatch("step_([0-9]{1,18})", path.stem)
            for path in self.checkpoints.glob("step_*.safetensors")
            if path.is_file()
        }
        return sorted((path for path, step in steps.items() if step), key=step_of, reverse=True)

    def adopt(self, checkpoint_file: Path, **start):
        """Begin where another run's checkpoint ends, with a copy of it and of that run's log.

        start: what this run was given; it stands last in the log, as the start event. Raises ZTurboError.
        """
        source = checkpoint_file.parents[1]
        try:
            files.write(self.checkpoints / checkpoint_file.name, checkpoint_file.read_bytes())
            if (source / LEARNT).is_file():
                files.write(self.learnt, (source / LEARNT).read_bytes())
            else:
                self.learnt.unlink(missing_ok=True)  # of a source that was given before
            begun = runlog.read_events(source / EVENTS)
            if start:
                way = runlog.newest_start(begun).get("way")
                begun.append({"event": "start", **start} | ({"way": way} if way else {}))
            files.write(self.events, runlog.lines(begun))
        except OSError as error:
            raise ZTurboError(f"The checkpoint {checkpoint_file} cannot be copied: {error.strerror}.") from error

    def newest_checkpoint(self) -> tuple[dict[str, torch.Tensor], dict[str, str]] | None:
        """Tensors and facts of the newest checkpoint that is whole; None where there is none at all.

        Raises CheckpointError where there are some and none is whole: beginning anew would write over what was learnt.
        """
        return self.world.from_main(self._newest_checkpoint)

    def _newest_checkpoint(self) -> tuple[dict[str, torch.Tensor], dict[str, str]] | None:
        damaged = []
        for path in self.checkpoint_files():
            try:
                return checkpoint.read(path)
            except CheckpointError as error:
                log.warning("%s", error)
                damaged.append(str(error))
        if damaged:
            raise CheckpointError(
                f"No checkpoint of the run {self.path.name} can be used: {damaged[0]} To begin anew, set resume to new."
            )
        return None

    def forget_checkpoints(self, after: int):
        """Delete the checkpoints behind a step: they have learnt what is to be undone."""
        for path in self.checkpoint_files():
            if step_of(path) > after:
                path.unlink(missing_ok=True)

    def rewind(self, step: int, rolled_back: bool = False):
        """Forget what was logged after `step`: it will be done again, to the same bits.

        A run that begins does its first validation again, one that is rolled back to its beginning does not.
        """
        again = {"end"} if step or rolled_back else {"end", "validation"}
        events = runlog.read_events(self.events)
        kept = [event for event in events if event.get("step", 0) <= step and event.get("event") not in again]
        with contextlib.suppress(OSError):
            files.write(self.events, runlog.lines(kept))
        self.save_now.unlink(missing_ok=True)

    def forget_wishes(self):
        """What was asked of it before it began or was taken up, but for stopping."""
        for wish in (self.save_now, self.pause, self.cancel):
            wish.unlink(missing_ok=True)

    def begin(self, **start):
        """Append the start event, in place of what `adopt` said of this beginning."""
        events = runlog.read_events(self.events)
        if events and events[-1].get("event") == "start" and "total" not in events[-1]:
            with contextlib.suppress(OSError):
                files.write(self.events, runlog.lines([*events[:-1], {"event": "start", **start}]))
                return
        self.event(event="start", **start)

    def event(self, **values):
        """Append one event. A log that cannot be written is said once and never ends a run."""
        try:
            with open(self.events, "a+b") as file:
                size = file.tell()
                file.seek(max(0, size - 1))
                torn = size and file.read() != b"\n"  # a line that its process could not end
                file.write((b"\n" if torn else b"") + json.dumps(values).encode() + b"\n")
        except OSError as error:
            if not self._log_failed:
                log.warning(
                    "The event log %s cannot be written (%s); training goes on without it.", self.events, error.strerror
                )
            self._log_failed = True

    def copy_of(self, state: State) -> Copy | None:
        """Everything of this moment, to be written; None, and why in `refused`, where a checkpoint cannot hold it."""
        try:
            return state.copied()
        except CheckpointError as error:
            self.refused = str(error)
            return None

    def save(self, steps: int, state: dict[str, torch.Tensor], metadata: dict[str, str], copy: Copy | None, keep: int):
        """Write the LoRA of `steps` steps, and a checkpoint of the same moment where one is given.

        keep: how many checkpoints stay. What a disk refuses is in `refused`.
        """
        try:
            if copy is not None:
                self.save_checkpoint(copy, keep)
        finally:
            self.save_lora(steps, state, metadata)

    def save_lora(self, steps: int, state: dict[str, torch.Tensor], metadata: dict[str, str]):
        """Write the LoRA of `steps` steps.

        A disk that refuses is said, and never ends a run: the LoRA is still in memory.
        """
        try:
            lorafile.write(self.lora, state, metadata | {STEPS: str(steps)})
            self.saved_steps = steps
        except LoraFileError as error:
            log.error("%s", error)
            self.refused = str(error)

    def save_healthy(self, steps: int, state: dict[str, torch.Tensor], metadata: dict[str, str]):
        """Write the LoRA of `steps` steps as the healthy one. A disk that refuses is logged."""
        try:
            lorafile.write(self.healthy, state, metadata | {STEPS: str(steps)})
            self.healthy_step = steps
        except LoraFileError as error:
            log.warning("%s", error)

    def save_learnt(self, state: dict[str, torch.Tensor]) -> str:
        """Write the LoRA as the learning phase left it, in fp32. Returns why a disk refused, or nothing."""
        try:
            lorafile.write(self.learnt, state, {})
            return ""
        except LoraFileError as error:
            return str(error)

    def learnt_lora(self, device, like: dict[str, Difference]) -> dict[str, Difference]:
        """The LoRA that `save_learnt` wrote. like: the run's own, for its names.

        Raises LoraFileError when it is not there any more, or is another.
        """
        try:
            made = self.world.from_main(self._learnt_state)
            found = {} if made is None else lorafile.from_state(made[0])
            if found.keys() != like.keys():
                raise LoraFileError(f"{self.learnt.name} is the LoRA of another run.")
            return lorafile.on_device(found, device)
        except LoraFileError as error:
            raise LoraFileError(
                f"{error} It is the LoRA as it was before restoring, without which restoring cannot go on. "
                f"Set resume to a checkpoint from before that ({self.path.name}/step_…)."
            ) from error

    def _learnt_state(self) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        return lorafile.state_dict(lorafile.read_own(self.learnt), torch.float32), {}

    def forget_healthy(self):
        """Delete the healthy LoRA: it has learnt what is undone."""
        self.healthy.unlink(missing_ok=True)
        self.healthy_step = 0

    def newest_reading(self) -> float:
        """Of the gauge; NaN for none."""
        newest_first = reversed(runlog.read_events(self.events))
        return next((event["gauge"] for event in newest_first if event.get("event") == "health"), math.nan)

    def request_stop(self):
        """As `request` with STOP."""
        request(self.path, STOP)

    def keep_workflow(self, workflow: dict):
        """Write down the graph that this run is a node of, so that it can be opened again. A disk may refuse."""
        with contextlib.suppress(OSError):
            files.write(self.path / WORKFLOW, json.dumps(workflow).encode())

    def kept(self) -> str:
        """A sentence: what of the LoRA is on the disk."""
        there = (
            f"The LoRA of step {self.saved_steps} is saved as {self.lora}; to use it, copy it into models/loras."
            if self.saved_steps
            else ""
        )
        return " ".join(filter(None, (self.refused, there))) or "Nothing had been learnt yet."

    def preview(self, step: int, number: int, image: np.ndarray) -> Path | None:
        """Keep a preview [H, W, 3] uint8 as PNG. Returns its path, or None where it could not be written."""
        path = self.path / PREVIEWS / f"{step_name(step)}_{number}.png"
        content = io.BytesIO()
        Image.fromarray(image).save(content, format="PNG", compress_level=4)  # as core saves, so that files compare
        try:
            files.write(path, content.getvalue())
        except OSError as error:
            log.warning("The preview %s cannot be written (%s).", path, error.strerror)
            return None
        return path


def step_name(step: int) -> str:
    """How a checkpoint of this step is called, and its previews before their numbers."""
    return f"step_{step:06d}"


def step_of(checkpoint_file: Path) -> int:
    return int(checkpoint_file.stem.removeprefix("step_"))


def steps_of(lora: Path) -> int:
    """Steps that a LoRA file says it has been trained for; 0 for none."""
    try:
        with safe_open(lora, "pt") as opened:
            return int((opened.metadata() or {}).get(STEPS, 0))
    except (OSError, SafetensorError, ValueError):
        return 0


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


def request(folder: Path, wish: str):
    """Ask something of the run in this folder, after its current step. wish: one of WISHES."""
    with contextlib.suppress(FileExistsError), open(folder / wish, "x"):  # here, and not where a link may lead
        pass


def take_back(folder: Path, wish: str):
    (folder / wish).unlink(missing_ok=True)
