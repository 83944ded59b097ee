"""What a phase of a run is, and a plan of phases. Those that there are stand in `phases`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .objectives import Objective, Penalty


@dataclass(frozen=True)
class Phase:
    """A stretch of steps with one objective.

    learning_rate: of a step, counted from 0 over the whole run. number: its place in the plan, which the session knows.
    """

    objective: Objective
    learning_rate: Callable[[int], float]
    penalties: tuple[Penalty, ...] = ()
    number: int = 0


@dataclass(frozen=True)
class PlannedPhase:
    """A phase before it is begun.

    name: as the screen says it. until: how many steps of the run are done at its end. begin: makes the phase of a
    `Session`, when its first step comes.
    """

    name: str
    until: int
    begin: Callable[[Any], Phase]


Plan = tuple[PlannedPhase, ...]


def number_at(plan: Plan, step: int) -> int:
    """The number of the phase that step `step` (from 0) belongs to; behind the last step, the last phase's."""
    return next((number for number, phase in enumerate(plan) if step < phase.until), len(plan) - 1)
