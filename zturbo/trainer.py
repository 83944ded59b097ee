"""The training loop, readable top to bottom.

Step `n` is a function of (recipe, seed, n): order, noise and timesteps come from counters (`flow.generator`), so
nothing that happens between steps, a preview or a pause, can change what is learnt.

A run is a `Session` (session.py). step.py makes a step, with the objective (objectives.py) of its phase (phases.py).
What happens beside the steps is in hooks.py. `advance` answers a bad loss (`Session.roll_back`) and memory that runs
out (`Session.save_memory`).
"""

from dataclasses import dataclass

import numpy as np
import torch

from . import phases
from .dataset import Dataset
from .errors import LossError
from .hooks import Hook, Previews, all_hooks
from .plan import Phase, Plan
from .recipe import Recipe
from .roles import Control, Host, Velocity
from .runfolder import RunFolder
from .session import Session, open_session
from .step import optimizer_step


@dataclass
class Result:
    """What a run leaves. state: the LoRA file's tensors. losses: one a step. images: the newest previews."""

    state: dict[str, torch.Tensor]
    losses: list[float]
    images: list[np.ndarray]
    steps: int
    seconds_per_step: float


def train(
    recipe: Recipe,
    dataset: Dataset,
    host: Host,
    run: RunFolder,
    control: Control,
    metadata: dict[str, str],
    plan: Plan | None = None,
) -> Result:
    """Train a LoRA, or go on from the run folder's newest checkpoint, to the same bits as if it had never stopped.

    Must be called outside inference mode, with gradients enabled. plan: the phases; None: those of the recipe.
    Whatever ends the run, what is learnt is saved first: on cancel (whatever `control.check` raises), on anything else.
    A loss that is no number, or has exploded, rolls the run back, once; then LossError is raised. Memory that runs out
    is answered with gradient checkpointing, then with half as many pictures at once, down to one.
    """
    session = open_session(recipe, dataset, host, run, control, metadata, plan or phases.plan(recipe))
    with session.saved_on_failure():
        if session.ended:  # it is handed on as it is
            if run.world.main:
                Previews().on_pause(session)
        else:
            train_on(session, tuple(hook for hook in all_hooks() if run.world.main or hook.everywhere))
    return finish(session)


def train_on(session: Session, hooks: tuple[Hook, ...]):
    """Every step that is left, with pauses for what needs the model clean."""
    for hook in hooks:
        hook.on_start(session)
    while not session.ended:
        if advance(session, hooks) or session.ended:
            for hook in hooks:
                hook.on_pause(session)
    for hook in hooks:
        hook.on_end(session)


def advance(session: Session, hooks: tuple[Hook, ...]) -> bool:
    """Steps until a hook wants a pause, the phase is over or the run ends.

    False: there was a bad loss and the session was rolled back, or memory ran out and it needs less from now on. Both
    are answered behind the `try`, where nothing of the failed step is held any more.
    """
    bad: LossError | None = None
    try:
        phase = session.enter_phase()
        with session.host.training(session.state.lora) as velocity:
            while not session.ended:
                step(session, phase, velocity, hooks)
                if session.phase_is_over or any(hook.wants_pause(session) for hook in hooks):
                    break
        return True
    except LossError as error:
        bad = error.with_traceback(None)
    except Exception as error:
        if not session.can_save_memory(error):
            raise
        session.tell_of_memory(error)
    if bad is not None:
        session.roll_back(bad)
    else:
        session.save_memory()
    return False


def step(session: Session, phase: Phase, velocity: Velocity, hooks: tuple[Hook, ...]):
    """One optimizer step, and what the hooks do behind it."""
    session.control.check()
    event = optimizer_step(session.recipe.optimizer, phase, session.state, velocity, session.split)
    for hook in hooks:
        hook.after_step(session, velocity, event)


def finish(session: Session) -> Result:
    """The newest LoRA and its thumbnail on the disk, and what is handed on."""
    state = session.state
    session.control.phase("saving", 0, 0)
    session.settle()
    if session.run.saved_steps < state.step:
        session.save()
    elif session.images:  # the last preview as its thumbnail
        session.save(with_checkpoint=False)
    session.settle()
    return Result(session.exported(), state.losses, session.images, state.step, state.seconds / max(1, state.step))
