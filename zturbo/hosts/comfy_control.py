"""The person at ComfyUI's screen: Cancel, Pause, Stop and keep, the progress bar, the events that the panel draws."""

import logging
import time
from pathlib import Path

import comfy.model_management
import comfy.utils
import numpy as np

from ..roles import PAUSED
from ..runfolder import RunFolder
from ..runlog import STEP

log = logging.getLogger("zturbo")
EVERY = 0.2  # seconds between two events to the panel, and between two looks whether a pause is over


class ComfyControl:
    """See `runs.Control`. `send(name, data)` pushes one event to the frontend."""

    def __init__(self, run: RunFolder, total: int, node_id: str, send):
        self.run, self.total, self.node_id, self.send = run, total, node_id, send
        self.bar = comfy.utils.ProgressBar(total, node_id=node_id)
        self.pending: list[dict] = []
        self.sent = 0.0
        self.named: tuple[str, int] = ("", 0)
        self.done = 0

    def begin(self, described: str):
        self.push("start", adapter=described, goes_on=bool(self.run.checkpoint_files()))

    def end(self, how: str, saved: int):
        self.flush()
        self.push("end", how=how, saved=saved)

    @property
    def stop_requested(self) -> bool:
        return self.run.stop.exists()

    def check(self):
        comfy.model_management.throw_exception_if_processing_interrupted()
        if self.run.cancel.exists():
            raise comfy.model_management.InterruptProcessingException
        if self.run.pause.exists() and not self.run.stop.exists():
            self.wait()

    def wait(self):
        """Until the pause is taken back, or someone cancels or stops. The model stays where it is."""
        self.flush()
        before, done = self.named, self.done
        self.named = PAUSED, 0
        self.push("phase", done=0, of=0)
        while self.run.pause.exists() and not (self.run.stop.exists() or self.run.cancel.exists()):
            time.sleep(EVERY)
            comfy.model_management.throw_exception_if_processing_interrupted()
        self.named = before
        self.push("phase", done=done, of=before[1])
        self.check()

    def push(self, kind: str, **data):
        """phase: what the run does now; a page that is opened in the middle of it learns it from any event."""
        about = {"node": self.node_id, "run": self.run.path.name, "total": self.total, "phase": self.named[0]}
        self.send("zturbo." + kind, {**about, **data})

    def phase(self, name: str, done: int, total: int):
        """Pushed when it is another one, and else as often as steps are."""
        other = (name, total) != self.named
        self.done = done
        if other or time.monotonic() - self.sent > EVERY:
            self.flush()
            self.named = name, total
            self.push("phase", done=done, of=total)

    def step(self, event: dict):
        self.pending.append({name: event[name] for name in STEP if name in event})
        self.bar.update_absolute(event["step"])
        if time.monotonic() - self.sent > EVERY:
            self.flush()

    def flush(self):
        """Push the steps that wait."""
        if self.pending:
            self.push("steps", steps=self.pending)
        self.pending, self.sent = [], time.monotonic()

    def preview(self, step: int, images: list[np.ndarray], paths: list[Path | None]):
        self.push("preview", step=step, files=[path.name for path in paths if path is not None])

    def look(self, event: dict):
        self.push("look", looks=[event])

    def say(self, sentence: str):
        log.info("%s", sentence)
        self.flush()  # a run that goes back says so between the steps that it takes back and those that it takes anew
        self.push("note", notes=[sentence])


def sampling_progress(model, steps: int):
    """Core's own progress callback for drawing: the bar and the picture taking shape."""
    import latent_preview

    return latent_preview.prepare_callback(model, steps)
