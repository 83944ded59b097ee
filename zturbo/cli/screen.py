"""The person at a terminal: a bar or JSON lines, Ctrl-C, and TensorBoard's file where that is installed."""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from ..runfolder import STOP, RunFolder, request

STEPS = ("training", "restoring")  # phases whose progress the bar itself shows
PAUSE = 1.0  # seconds between two words on how far the others are


def unread():
    """Nobody reads what is printed any more: let it go nowhere, also what Python still holds."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Screen:
    """See `runs.Control`. Ctrl-C: stop and keep; a second one: now."""

    def __init__(self, run: RunFolder, total: int, as_json: bool):
        self.run, self.total, self.as_json = run, total, as_json
        self.bar: Any = None
        self.board: Any = None
        self.asked = False
        self.doing: tuple[str, int] = ("", 0)
        self.said = 0.0

    def print(self, **values):
        if not self.as_json:
            return
        try:
            print(json.dumps(values), flush=True)
        except BrokenPipeError:  # the run goes on
            self.as_json = False
            unread()

    def begin(self, described: str):
        self.print(event="start", run=str(self.run.path), total=self.total, adapter=described)
        signal.signal(signal.SIGINT, self.interrupted)
        if not self.as_json:
            from tqdm import tqdm

            print(f"{described}\nRun folder: {self.run.path}", file=sys.stderr)
            self.bar = tqdm(total=self.total, initial=0, unit="step", dynamic_ncols=True, file=sys.stderr)
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(self.run.path / "tensorboard"))
        except ImportError:
            self.board = None

    def interrupted(self, *_):
        if self.asked:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # what is kept is written now
            raise KeyboardInterrupt
        self.asked = True
        request(self.run.path, STOP)
        self.say("Stopping after this step; what is learnt is kept. Ctrl-C again ends it at once.")

    def end(self, how: str, saved: int):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.bar is not None:
            self.bar.close()
        if self.board is not None:
            self.board.close()
        self.print(event="end", how=how, saved=saved, lora=str(self.run.lora) if saved else None)
        if how == "cancelled" and self.bar is not None:
            print(f"Cancelled. {self.run.kept()}", file=sys.stderr)

    @property
    def stop_requested(self) -> bool:
        return self.run.stop.exists()

    def check(self):
        """What a page of ComfyUI asks, where it shows this run. Many processes do not wait for one."""
        if self.run.cancel.exists():
            raise KeyboardInterrupt
        while self.run.pause.exists() and self.run.world.size == 1:
            if self.run.stop.exists() or self.run.cancel.exists():
                return
            time.sleep(0.2)

    def phase(self, name: str, done: int, total: int):
        if (name, total) == self.doing and time.monotonic() - self.said < PAUSE:
            return
        self.doing, self.said = (name, total), time.monotonic()
        self.print(event="phase", name=name, done=done, of=total)
        if self.bar is not None:
            self.bar.set_description(f"{name} {done}/{total}" if total and name not in STEPS else name)

    def step(self, event: dict):
        self.print(event="step", **event)
        if self.bar is not None:
            self.bar.update(event["step"] - self.bar.n)
            self.bar.set_postfix(loss=f"{event['loss']:.4f}", refresh=False)
        if self.board is not None:
            for key in ("loss", "lr", "grad_norm"):
                self.board.add_scalar(key, event[key], event["step"])

    def preview(self, step: int, images: list[np.ndarray], paths: list[Path | None]):
        self.print(event="preview", step=step, files=[str(path) for path in paths if path is not None])
        for number, image in enumerate(images if self.board is not None else ()):
            self.board.add_image(f"preview {number}", image, step, dataformats="HWC")

    def look(self, event: dict):
        self.print(**event)
        for key in ("gauge", "trained", "held_out"):
            if self.board is not None and key in event:
                self.board.add_scalar(key, event[key], event["step"])

    def say(self, sentence: str):
        self.print(event="note", text=sentence)
        if self.bar is not None:
            self.bar.write(sentence, file=sys.stderr)
