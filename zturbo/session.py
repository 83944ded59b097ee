"""A run while it trains: what it is made of, where it stands, and what can happen to it.

It can be saved, rolled back after a bad loss, and made to need less memory. The trainer and the hooks act through it.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from . import lorafile, lowrank, network, optimizers, turbo
from .batches import Pictures, pictures_of
from .dataset import Dataset
from .errors import LossError
from .objectives import Split
from .plan import Phase, Plan, number_at
from .recipe import Recipe
from .roles import Control, Host, Progress, counter
from .runfolder import RunFolder
from .state import State
from .step import WINDOW
from .turbo import References
from .world import Elsewhere, World
from .writer import Writer

log = logging.getLogger("zturbo")


@dataclass
class Session:
    """metadata: of the LoRA file. phase: the one that is under way. images: the newest previews.

    stopped: a hook has ended the run. told: what of the disk's refusals was said.
    """

    recipe: Recipe
    dataset: Dataset
    host: Host
    run: RunFolder
    control: Control
    metadata: dict[str, str]
    plan: Plan
    state: State
    pictures: Pictures
    references: References = field(default_factory=References)
    phase: Phase | None = None
    images: list[np.ndarray] = field(default_factory=list)
    writer: Writer = field(default_factory=Writer)
    stopped: bool = False
    told: str = ""

    @property
    def world(self) -> World:
        """The processes that train this run."""
        return self.run.world

    @property
    def split(self) -> Split:
        """How a batch goes through the model."""
        return Split(self.host.at_once or None, self.world)

    @property
    def ended(self) -> bool:
        """Stopping waits for the first step: before that there is nothing to keep."""
        asked = self.state.step > 0 and self.control.stop_requested
        return self.stopped or asked or self.state.step >= self.recipe.steps

    # what a run is made of

    def walk_references(self):
        """The trajectories that gauge and guard compare with, where they are asked for and can be had."""
        total = turbo.forwards(self.recipe, self.host)
        if not total:
            return
        first, short = len(self.pictures.captions.texts), self.pictures.shortest
        with self.host.training({}) as velocity:
            told = turbo.telling(velocity, counter(self.progress("walking"), total))
            self.references = turbo.references(self.recipe, self.host, first, short, told)

    def enter_phase(self) -> Phase:
        """The phase of the steps to come. It is begun here, where it is another one than before, and announced."""
        planned = self.plan[self.phase_number]
        if self.phase_is_over:
            self.phase = None  # what it kept goes before the next one needs memory
            self.phase = replace(planned.begin(self), number=self.phase_number)
        if not self.ended:
            self.control.phase(planned.name, self.state.step, self.recipe.steps)
        assert self.phase is not None
        return self.phase

    @property
    def phase_number(self) -> int:
        """The place in the plan of the phase that the next step belongs to."""
        return number_at(self.plan, self.state.step)

    @property
    def goes_on_with_phase(self) -> bool:
        """Does the newest step belong to the phase of the next one, too? False: that one begins here."""
        return self.state.phase == self.phase_number

    @property
    def phase_is_over(self) -> bool:
        return self.phase is None or self.phase.number != self.phase_number

    # what is said

    def tell(self, sentence: str):
        """Say something on the screen and in the log."""
        tell(self.run, self.control, self.state.step, sentence)

    def log_reading(self, event: dict):
        """A validation, or a reading of the gauge."""
        self.run.event(**event)
        self.control.look(event)

    def progress(self, name: str) -> Progress:
        """See `progress_of`."""
        return progress_of(self.control, name)

    # what is saved

    def exported(self) -> dict[str, torch.Tensor]:
        """The LoRA as it is previewed, saved and handed on."""
        return self.state.exported(lorafile.DTYPES[self.recipe.saving.dtype])

    def save(self, with_checkpoint: bool = True):
        """Copy the LoRA, and what a checkpoint needs, and have it written by a thread while training goes on."""
        if not self.world.main:
            return
        self.settle()
        if with_checkpoint:
            self.run.refused = ""
        self.state.at_once = self.host.at_once or 0
        step, lora, keep = self.state.step, self.exported(), self.recipe.saving.keep
        facts = self.metadata | lorafile.thumbnail(self.images)
        copy = self.run.copy_of(self.state) if with_checkpoint and self.state.whole else None
        self.writer.submit(lambda: self.run.save(step, lora, facts, copy, keep))

    def save_healthy(self):
        """Keep the LoRA as the healthy one; where the gauge may end the run, with a checkpoint to go back to."""
        if not self.world.main:
            return
        self.settle()
        step, lora = self.state.step, self.exported()
        self.writer.submit(lambda: self.run.save_healthy(step, lora, self.metadata))
        if self.recipe.turbo.stop_above:
            self.save()

    def settle(self):
        """Wait until what was handed to the writer is on the disk. What the disk refuses is said once."""
        self.writer.wait()
        if self.run.refused and self.run.refused != self.told:
            self.told = self.run.refused
            self.tell(f"{self.run.refused} Training goes on in memory, and each save tries again.")

    @contextmanager
    def saved_on_failure(self) -> Iterator[None]:
        """Whatever ends the run, what is learnt is on the disk. After a LossError the disk has what was good."""
        try:
            yield
        except LossError:
            raise
        except BaseException:
            try:
                self._save_the_rest()
            except Exception as error:  # a device that died takes the newest LoRA with it: the last saved one stays
                log.error("The LoRA of step %d could not be saved: %s", self.state.step, error)
            raise

    def _save_the_rest(self):
        try:
            self.writer.wait()
        except Exception as error:  # what the thread could not write is tried again
            log.warning("The newest save failed: %s", error)
        unsaved = self.state.losses and self.run.saved_steps < self.state.step
        if unsaved and (self.state.whole or not self.run.saved_steps):
            self.save()
            self.writer.wait()

    # what can happen

    def go_back(self, after: int):
        """To the newest checkpoint up to step `after`, or to the beginning; nothing later is left on the disk."""
        self.run.forget_checkpoints(after=after)
        self.state = begin(self.recipe, self.host, self.run, rolled_back=True)
        self.run.saved_steps = 0  # the LoRA on the disk has learnt what is undone now
        self.images = []

    def roll_back(self, error: LossError):
        """To the last good checkpoint, with half the learning rate. Raises the error where that was done before."""
        self.settle()
        rolled_back, step = self.state.rollbacks > 0, self.state.step
        self.go_back(step - 2 * WINDOW if math.isfinite(error.loss) else step - 1)
        self.state.rollbacks += 1
        if self.run.healthy_step > self.state.step:
            self.run.forget_healthy()
        if rolled_back:
            self.run.save_lora(self.state.step, self.exported(), self.metadata)
            raise error
        self.tell(f"{error} Going back to step {self.state.step} with half the learning rate.")

    def can_save_memory(self, error: Exception) -> bool:
        """Is this memory that ran out, in the middle of no change, and is there something to give up for it?"""
        heard = isinstance(error, Elsewhere) and error.memory
        return self.state.whole and (heard or (self.host.out_of_memory(error) and not self.host.frugal))

    def tell_of_memory(self, error: Exception):
        """Have the other processes need less memory too, unless it was one of them that ran out."""
        if not isinstance(error, Elsewhere):
            self.world.tell("its memory ran out", memory=True)

    def save_memory(self):
        """Memory ran out: from now on less is kept, or fewer pictures go through the model at once.

        The LoRA is the same but for rounding. Of many processes each gives up what it still can.
        """
        if self.world.size > 1:
            self.phase = None  # all begin it again: one of them may have failed while it began
        if not self.host.frugal:
            self.tell(OUT_OF_MEMORY.format(step=self.state.step + 1, how=self.host.save_memory()))


def open_session(
    recipe: Recipe, dataset: Dataset, host: Host, run: RunFolder, control: Control, metadata: dict[str, str], plan: Plan
) -> Session:
    """Everything that a run needs, in the order that says first what is wrong and takes long last.

    Raises ZTurboError for what is wrong with a recipe, before pictures are encoded.
    """
    assert plan[-1].until == recipe.steps, "a plan has all steps of the recipe"
    turbo.refuse(recipe, host.turbo)
    state = begin(recipe, host, run)
    if state.step == 0:
        tell(run, control, 0, network.describe(state.lora))
    progress = progress_of(control, "encoding")
    with run.world.main_first(progress) if recipe.data.cache else nullcontext(progress) as progress:
        pictures = pictures_of(recipe, dataset, host, progress)
    session = Session(recipe, dataset, host, run, control, metadata, plan, state, pictures)
    if state.step == 0:
        for note in filter(None, (pictures.batches.note(), *turbo.doubts(recipe, dataset.trigger))):
            session.tell(note)
    if not session.ended:
        if only_restores(recipe, state):
            session.tell(ONLY_RESTORES.format(last=recipe.turbo.restore_steps, steps=recipe.steps, done=state.step))
        session.walk_references()
    return session


def begin(recipe: Recipe, host: Host, run: RunFolder, rolled_back: bool = False) -> State:
    """The state to go on from: the newest checkpoint's, or an untrained LoRA. The log forgets what came behind it."""
    state = untrained(recipe, host)
    saved = run.newest_checkpoint()
    if saved is not None:
        state.take(*saved)
        host.at_once = min(filter(None, (host.at_once, state.at_once)), default=0)
        log.info("Going on from step %d.", state.step)
    run.rewind(state.step, rolled_back)
    return state


def untrained(recipe: Recipe, host) -> State:
    """The state before the first step. host: a `Host`, or what has its targets, device, family, start and norms."""
    start, groups = host.start(), host.family.groups
    lora = network.create(host.targets, recipe.network, recipe.seed, host.device, host.norms, start, groups)
    ema = network.frozen_copy(lora) if recipe.optimizer.ema else {}
    return State(lora, optimizers.build(recipe.optimizer, lowrank.parameters(lora)), ema)


def only_restores(recipe: Recipe, state: State) -> bool:
    """Is a run taken up that trains no pictures any more, though its person may think so?

    For instance one that restored turbo in steps 41 to 60 and is given more steps: all of them restore.
    """
    behind = state.phase_start < recipe.learning_steps <= state.step
    return behind and (state.phase > 0 or state.step > recipe.learning_steps)


def progress_of(control: Control, name: str) -> Progress:
    """Says how far a phase of `roles.PHASES` is, and notices a cancel."""

    def said(done: int, total: int):
        control.check()
        control.phase(name, done, total)

    return said


def tell(run: RunFolder, control: Control, step: int, sentence: str):
    """Say something on the screen and in the log."""
    run.event(event="note", step=step, text=sentence)
    control.say(sentence)


OUT_OF_MEMORY = "There was not enough memory at step {step}. It goes on with {how}, which takes longer."
ONLY_RESTORES = (
    "No pictures are trained in what is left: the last {last} of {steps} steps restore turbo, and {done} are done."
)
