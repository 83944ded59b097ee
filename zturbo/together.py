"""What of a run is another in processes beside the first, where many train together (see `world`)."""

import hashlib
from pathlib import Path

import numpy as np

from .errors import ZTurboError
from .roles import Control
from .runfolder import RunFolder
from .world import World


class FollowedRun(RunFolder):
    """A run's folder as the processes beside the first one have it: they are sent what it holds, and write nothing.

    So it need not be on their machine.
    """

    def __init__(self, world: World):
        super().__init__(Path())
        self.world = world
        self.saved_steps = self.healthy_step = 0

    def checkpoint_files(self) -> list[Path]:
        return []

    def kept(self) -> str:
        return ""

    def newest_reading(self) -> float:
        return 0.0

    def event(self, **values): ...

    def rewind(self, step: int, rolled_back: bool = False): ...

    def forget_checkpoints(self, after: int): ...

    def forget_healthy(self): ...

    def request_stop(self): ...

    def save_lora(self, steps, state, metadata): ...

    def save_learnt(self, state) -> str:
        return ""


class Together:
    """The person at the first process's screen, as all processes see them: a wish to stop is agreed on once a step."""

    def __init__(self, control: Control, world: World):
        self.control, self.world = control, world
        self.agreed: bool = world.agree("stop", control.stop_requested)

    @property
    def stop_requested(self) -> bool:
        return self.control.stop_requested if self.world.size == 1 else self.agreed

    def check(self):
        self.control.check()

    def phase(self, name: str, done: int, total: int):
        self.control.phase(name, done, total)

    def step(self, event: dict):
        self.control.step(event)
        self.agreed = self.world.agree("stop", self.control.stop_requested)

    def preview(self, step: int, images: list[np.ndarray], paths: list[Path | None]):
        self.control.preview(step, images, paths)

    def look(self, event: dict):
        self.control.look(event)

    def say(self, sentence: str):
        self.control.say(sentence)


def meet(world: World, teaches: dict, inputs: str, way: str) -> str:
    """The first process's way to carry the adapter.

    teaches, inputs: what the run is a function of. Raises ZTurboError, in all processes, unless they were given the
    same.
    """
    given = hashlib.sha256(repr((sorted(teaches.items()), inputs)).encode()).hexdigest()
    every = world.exchange("meet", [given, way])
    others = [rank for rank, (theirs, _) in enumerate(every) if theirs != every[0][0]]
    if others:
        raise ZTurboError(
            f"Process {others[0]} of {world.size} (counted from 0) was given other settings, pictures or models than "
            "process 0. Give all of them the same command, and all machines the same files and packages."
        )
    return every[0][1]
