"""The phases of a run: which steps belong to which, what each makes small, and how each is begun.

Most runs have one, learning the pictures. With keep_turbo at restore a second one follows, which restores turbo. A
further phase is another function here that returns its `Phase`, and a line in `plan`.
"""

import torch

from . import health, lorafile, optimizers, turbo
from .batches import spread
from .objectives import Anchors, FlowMatching, Penalty, TrajectoryMatching
from .plan import Phase, Plan, PlannedPhase
from .recipe import Recipe
from .roles import Lora, counter
from .session import Session

# Share of the named prompts in the loss of restoring. At a half the LoRA loses more of what it learnt, and no more of
# turbo comes back (tried on the tiny turbo).
NAMED = 0.75
FOLLOWED = 64  # captions at most whose trajectories restoring walks: one keeps some megabytes
RESTORING = (
    "The pictures are learnt. From here on the LoRA is taught to be as it is where a prompt names it, "
    "and to leave turbo alone where none does."
)


def plan(recipe: Recipe) -> Plan:
    """The phases of a run, in their order."""
    first = PlannedPhase("training", recipe.learning_steps, learning)
    return (first, PlannedPhase("restoring", recipe.steps, restoring)) if recipe.turbo.restores else (first,)


def learning(session: Session) -> Phase:
    """Flow matching on the pictures. With keep_turbo at guard, the LoRA is held to leave unrelated prompts alone."""
    recipe, guard = session.recipe, session.references.guard
    penalties: list[Penalty] = []
    if guard is not None:
        kept = TrajectoryMatching(recipe.seed, (Anchors(guard),), 1.0, session.host.device)
        penalties.append(Penalty("guard", kept, recipe.turbo.weight, recipe.turbo.interval))

    def rate(step: int) -> float:
        return optimizers.learning_rate(recipe.optimizer, step, recipe.learning_steps)

    return Phase(FlowMatching(recipe, session.pictures, session.host), rate, tuple(penalties))


def restoring(session: Session) -> Phase:
    """The last steps, without the adapter: the LoRA stays as it was learnt where a prompt names it.

    Where none does, it is brought back to clean turbo.
    """
    recipe = session.recipe
    if not session.goes_on_with_phase:
        session.tell(RESTORING)
    named, unrelated = prompts_to_walk(session)
    total = (len(named) + len(unrelated)) * session.host.family.steps
    told = counter(session.progress("walking"), total)

    def walk(lora: Lora, numbers: tuple[int, ...]) -> health.Trajectories:
        size = (turbo.side(recipe, session.host, session.pictures.shortest),) * 2
        with session.host.training(lora) as velocity:
            clean = turbo.with_adapter_at(0.0, turbo.telling(velocity, told))
            return health.walk(session.host.family, clean, numbers, size, recipe.seed, session.host.device)

    sets = (
        Anchors(walk(learnt(session), named), NAMED, "named"),
        Anchors(walk({}, unrelated), 1 - NAMED, "clean"),
    )

    def rate(step: int) -> float:
        return recipe.optimizer.learning_rate * (recipe.steps - step) / recipe.turbo.restore_steps

    return Phase(TrajectoryMatching(recipe.seed, sets, 0.0, session.host.device), rate)


def learnt(session: Session) -> Lora:
    """The LoRA as the learning phase left it.

    It lies in the run folder, so that a run that is taken up walks the same trajectories. Raises LoraFileError when it
    is needed from there and gone.
    """
    run, state, device = session.run, session.state, session.host.device
    if session.goes_on_with_phase:
        return run.learnt_lora(device, state.lora)
    exported = state.exported(torch.float32)
    if refused := run.save_learnt(exported):
        session.tell(f"{refused} Restoring goes on, but it cannot be taken up again if it is cut off.")
    return lorafile.on_device(lorafile.from_state(exported), device)


def prompts_to_walk(session: Session) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The host's numbers of (the texts that name what is trained, the unrelated prompts behind the gauge's)."""
    recipe, dataset, captions = session.recipe, session.dataset, session.pictures.captions
    own = {n for item, numbers in zip(dataset.items, captions.of) if not item.regularisation for n in numbers}
    if dataset.trigger and captions.dropped is not None:
        own.add(captions.dropped)  # the trigger word alone
    first, unrelated = len(captions.texts), len(recipe.turbo.prompts)
    last = first + len(turbo.texts(recipe, dataset.trigger, True))
    named = (*spread(tuple(sorted(own)), FOLLOWED), *range(first + unrelated, last))
    return named, tuple(range(first + health.WATCHED, first + unrelated))
