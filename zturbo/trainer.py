"""The training loop, readable top to bottom.

Step `n` is a function of (recipe, seed, n): order, noise and timesteps come from counters (`flow.generator`),
so nothing that happens between steps, a preview or a pause, can change what is learnt.
"""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from . import flow, health, lorafile, lowrank, network, optimizers, turbo
from .checkpoint import State
from .dataset import Captions, Dataset, Encoded
from .errors import LossError, ZTurboError
from .lowrank import Difference, Target
from .recipe import Recipe
from .runfolder import RunFolder, request_stop, step_of
from .turbo import Velocity
from .writer import Writer

log = logging.getLogger("zturbo")
WINDOW = 50  # steps
EXPLOSION = 5  # times
RESTORING = "The pictures are learnt. From here on the LoRA is taught to be as it is where a prompt names it, and to leave turbo alone where none does."
LOOKED_AT = 6  # pictures of each kind in a validation
FOLLOWED = 64  # captions at most whose paths restoring walks: one keeps some megabytes
FIXED_SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)
Lora = dict[str, Difference]


class Host(Protocol):
    """What the trainer trains in: a model with its text encoder and autoencoder, and a way to draw."""

    device: torch.device
    targets: list[Target]
    turbo: bool  # is the model that trains turbo itself, once its adapter is taken away?

    def encode(self, dataset: Dataset, captions: Captions, check: Callable[[], None]) -> Encoded:
        """Latents of the pictures. Keeps the captions, and behind them the texts of `turbo.texts`. check: called between two pictures; may raise."""
        ...

    def start(self) -> Lora | None:
        """The LoRA that the recipe starts from, where it names one."""
        ...

    def norms(self, targets: list[Target]) -> dict[str, torch.Tensor]:
        """[1, in] column norms of the clean weights by part, for DoRA."""
        ...

    def training(self, lora: Lora) -> AbstractContextManager[Velocity]:
        """While open, the model is loaded with the adapter and `lora`: velocity(x_t [B,16,h,w], sigma [B], caption numbers, factor on the adapter's strength)."""
        ...

    def out_of_memory(self, error: Exception) -> bool: ...

    def save_memory(self) -> None:
        """From now on recompute instead of keep, whatever the recipe says."""
        ...

    def memory(self) -> dict[str, float]:
        """GB in use where the model runs, as fields of a step's event (see `hosts.devices.memory_facts`)."""
        ...

    def draw(self, state: dict[str, torch.Tensor]) -> list[np.ndarray]:
        """Previews [H, W, 3] uint8 of the LoRA in `state`, on the clean turbo model; one a prompt."""
        ...


class Control(Protocol):
    """The person at the screen."""

    @property
    def stop_requested(self) -> bool: ...

    def check(self) -> None:
        """Raises when the run was cancelled."""
        ...

    def step(self, event: dict) -> None: ...

    def preview(self, step: int, images: list[np.ndarray], paths: list[Path | None]) -> None: ...

    def look(self, event: dict) -> None: ...

    def say(self, sentence: str) -> None:
        """Something that the person should know; training goes on."""
        ...


class Unattended:
    """A `Control` with nobody at the screen."""

    stop_requested = False

    def check(self): ...

    def step(self, event: dict): ...

    def preview(self, step: int, images: list[np.ndarray], paths: list[Path | None]): ...

    def look(self, event: dict): ...

    def say(self, sentence: str): ...


@dataclass
class Result:
    """What a run leaves. state: the LoRA file's tensors. losses: one a step. images: the newest previews."""

    state: dict[str, torch.Tensor]
    losses: list[float]
    images: list[np.ndarray]
    steps: int
    seconds_per_step: float


@dataclass(frozen=True)
class Batches:
    """Which pictures a step sees. Every epoch shows each picture once; a batch is of one shape."""

    groups: tuple[tuple[int, ...], ...]  # picture numbers that may share a batch
    size: int
    seed: int

    @property
    def per_epoch(self) -> int:
        return sum(math.ceil(len(group) / self.size) for group in self.groups)

    def note(self) -> str:
        """A sentence where shapes keep batches from being full, or nothing."""
        short = sum(len(group) % self.size > 0 for group in self.groups)
        if not short or self.per_epoch == 1:
            return ""
        return f"{short} of {self.per_epoch} batches an epoch have fewer than {self.size} pictures: only pictures of one shape share a batch. Crop the pictures to fewer shapes for full ones."

    def at(self, step: int) -> tuple[int, ...]:
        """Picture numbers of step `step` (from 0)."""
        epoch, place = divmod(step, self.per_epoch)
        random = flow.generator(self.seed, "order", epoch)
        batches = []
        for group in self.groups:
            order = [group[i] for i in torch.randperm(len(group), generator=random).tolist()]
            batches += [tuple(order[i : i + self.size]) for i in range(0, len(order), self.size)]
        return batches[int(torch.randperm(len(batches), generator=random)[place])]


@dataclass(frozen=True)
class Batch:
    """x0: latents [B, 16, h, w]; captions: their numbers; weight: [B] on the loss; mask: [B, 1, h, w] of mean 1, or None where no picture has one."""

    x0: torch.Tensor
    captions: tuple[int, ...]
    weight: torch.Tensor
    mask: torch.Tensor | None


@dataclass(frozen=True)
class Pictures:
    """What batches are made of; lists have an entry a picture. masks: [V, 1, h, w] of mean 1, or None; dropout: chance that its caption is dropped; weight: on its loss."""

    encoded: Encoded
    captions: Captions
    batches: Batches
    masks: list[torch.Tensor | None]
    dropout: list[float]
    weight: list[float]
    held_out: tuple[int, ...] = ()  # numbers of those that are only looked at
    trained: tuple[int, ...] = ()  # and of those that they are compared with

    def at(self, recipe: Recipe, place: int) -> Batch:
        """Batch `place`: which pictures, which mirrored, in which tag order, whose captions are dropped."""
        numbers = self.batches.at(place)
        random = flow.generator(recipe.seed, "look", place)
        views = [int(torch.randint(len(self.encoded.latents[n]), (), generator=random)) for n in numbers]
        chosen = []
        for n in numbers:
            dropped = torch.rand((), generator=random).item() < self.dropout[n]
            variants = self.captions.of[n]
            text = variants[int(torch.randint(len(variants), (), generator=random))]
            chosen.append(self.captions.dropped if dropped and self.captions.dropped is not None else text)
        x0 = torch.stack([self.encoded.latents[n][view] for n, view in zip(numbers, views)])
        masks = [self.masks[n] for n in numbers]
        mask = None
        if any(one is not None for one in masks):
            mask = torch.stack(
                [torch.ones_like(x0[0, :1]) if one is None else one[view] for one, view in zip(masks, views)]
            )
        return Batch(x0, tuple(chosen), torch.tensor([self.weight[n] for n in numbers]), mask)

    def one(self, number: int) -> Batch:
        """Picture `number` as it is, with its own caption, unmasked."""
        return Batch(self.encoded.latents[number][:1], self.captions.of[number][:1], torch.ones(1), None)


def pictures_of(recipe: Recipe, dataset: Dataset, host: Host, check: Callable[[], None] = lambda: None) -> Pictures:
    """Everything that steps are made of, encoded. check: called between two pictures; may raise."""
    captions = dataset.captions()
    encoded = host.encode(dataset, captions, check)
    masks = [item.mask(recipe.data.outside) for item in dataset.items]
    views = [
        None if mask is None else torch.stack([mask, mask.flip(-1)][: len(encoded.latents[n])])
        for n, mask in enumerate(masks)
    ]
    held = sorted(dataset.held_out())
    trained = [n for n, item in enumerate(dataset.items) if n not in held and not item.regularisation]
    repeats = [0 if n in held else item.repeats for n, item in enumerate(dataset.items)]
    batches = Batches(group_pictures(encoded, repeats), recipe.batch_size, recipe.seed)
    weight = [recipe.data.regularisation_weight if item.regularisation else 1.0 for item in dataset.items]
    return Pictures(
        encoded,
        captions,
        batches,
        views,
        [dataset.dropout(n) for n in range(len(dataset.items))],
        weight,
        tuple(held),
        tuple(trained),
    )


def group_pictures(encoded: Encoded, repeats: list[int]) -> tuple[tuple[int, ...], ...]:
    """Pictures of the same latent shape together. A picture stands there as often as it is shown in an epoch."""
    groups: dict[tuple, list[int]] = {}
    for number, views in enumerate(encoded.latents):
        groups.setdefault(tuple(views.shape[1:]), []).extend([number] * repeats[number])
    return tuple(tuple(groups[key]) for key in sorted(groups) if groups[key])


def train(
    recipe: Recipe, dataset: Dataset, host: Host, run: RunFolder, control: Control, metadata: dict[str, str]
) -> Result:
    """Train a LoRA, or go on from the run folder's newest checkpoint, to the same bits as if it had never stopped.

    Must be called outside inference mode, with gradients enabled. Writes a checkpoint and `run.lora` every
    `recipe.saving.every` steps (a thread does, while training goes on), at the end, and before it raises: on cancel (whatever `control.check` raises), on
    anything else. A loss that is no number, or has exploded, sends the run back to the last good checkpoint with half
    the learning rate, once; then it raises LossError. Memory that runs out is answered once: with recomputation and one
    picture at a time. Stopping waits for the first step; a preview that cannot be drawn is said and costs nothing else.
    """
    need_turbo(recipe, host)
    state = begin(recipe, host, run)  # first: what is wrong with a recipe is said before pictures are encoded
    if state.step == 0:
        tell(run, control, 0, network.describe(state.lora))
    pictures = pictures_of(recipe, dataset, host, control.check)
    for note in (
        filter(None, (pictures.batches.note(), *turbo.doubts(recipe, dataset.trigger))) if state.step == 0 else ()
    ):
        tell(run, control, 0, note)
    dtype = lorafile.DTYPES[recipe.saving.dtype]
    images: list[np.ndarray] = []
    thrifty = False  # one picture at a time, since memory ran out once
    writer = Writer()

    reading, worn, said = 0.0, False, ""  # of the gauge; whether it has ended the run; what of the disk has been said

    def ended() -> bool:
        return worn or finished(recipe, state, control)

    had_ended = ended()
    if state.since < recipe.taught <= state.step and (state.restoring or state.step > recipe.taught) and not had_ended:
        tell(
            run,
            control,
            state.step,
            f"No pictures are trained in what is left: the last {recipe.turbo.restore_steps} of {recipe.steps} steps restore turbo, and {state.step} are done.",
        )
    restore: turbo.Restore | None = None
    watched = turbo.Watch() if had_ended else watch(recipe, pictures, host, control.check)

    def settle():
        """Until what was handed over is written; what the disk refused of it is told."""
        nonlocal said
        writer.wait()
        if run.refused and run.refused != said:
            said = run.refused
            tell(run, control, state.step, f"{run.refused} Training goes on in memory, and each save tries again.")

    def save(with_checkpoint: bool = True):
        """Copy what is learnt, and have it written while training goes on."""
        settle()
        if with_checkpoint:
            run.refused = ""
        step, lora, words = state.step, state.shown(dtype), metadata | lorafile.thumbnail(images)
        copy = run.copy_of(state) if with_checkpoint and state.whole else None
        writer.submit(lambda: run.keep(step, lora, words, copy, recipe.saving.keep))

    def keep_healthy():
        settle()
        step, lora = state.step, state.shown(dtype)
        writer.submit(lambda: run.keep_healthy(step, lora, metadata))
        if recipe.turbo.stop_above:
            save()  # with a checkpoint to go back to

    try:
        if state.step == 0 and pictures.held_out:
            with host.training(state.lora) as velocity:
                look(pictures, state, velocity, host.device, run, control, recipe.seed)
        while not ended():
            out_of_memory = False
            restore = restore if restoring(recipe, state) else None
            try:
                if restoring(recipe, state) and restore is None:
                    if not state.restoring:
                        tell(run, control, state.step, RESTORING)
                    restore = walk_restore(recipe, dataset, pictures, host, run, state, control)
                with host.training(state.lora) as velocity:
                    while not ended():
                        control.check()
                        event = one_step(recipe, pictures, watched, restore, state, velocity, host.device, thrifty)
                        event |= host.memory()
                        run.event(**event)
                        control.step(event)
                        if pictures.held_out and state.step % recipe.data.validation_every == 0:
                            look(pictures, state, velocity, host.device, run, control, recipe.seed)
                        if reading_due(recipe, state, watched):
                            reading = read_gauge(
                                recipe, state, watched, velocity, host.device, run, control, keep_healthy
                            )
                            worn = recipe.turbo.stop_above > 0 and not reading <= recipe.turbo.stop_above
                        if not writer.busy:
                            settle()
                        if save_due(recipe, state, run):
                            save()
                        if worn or preview_due(recipe, state) or (restore is None and restoring(recipe, state)):
                            break
            except LossError as error:
                settle()
                spent = state.setbacks > 0
                state = step_back(recipe, host, run, state, error)
                if spent:
                    run.save(state.step, state.shown(dtype), metadata)
                    raise
                tell(run, control, state.step, f"{error} Going back to step {state.step} with half the learning rate.")
                continue
            except Exception as error:
                out_of_memory = state.whole and host.out_of_memory(error)
                if (
                    not out_of_memory
                    or thrifty
                    or (recipe.batch_size == 1 and recipe.compute.checkpointing and recipe.turbo.keep == "off")
                ):
                    raise
            if out_of_memory:  # out here, where nothing of the failed step is held any more
                thrifty = True
                save_memory(host, run, state, control)
                continue
            if worn:
                settle()
                state = end_worn(recipe, host, run, state, control, reading)
            # Drawn outside the training context: the model is clean again, as a user's own graph would have it.
            if recipe.previews.prompts and (preview_due(recipe, state) or ended()):
                images = draw(host, state.shown(dtype), state.step, run, control) or images
    except LossError:
        raise  # the disk has what was good
    except BaseException:
        with contextlib.suppress(Exception):  # what it could not write is tried again
            writer.wait()
        try:
            if state.losses and run.saved_steps < state.step and (state.whole or not run.saved_steps):
                save()
                writer.wait()
        except Exception as error:  # a device that died takes the newest LoRA with it: the last saved one stays
            log.error("The LoRA of step %d could not be saved: %s", state.step, error)
        raise
    if not worn and not had_ended:
        tell_of_wear(recipe, run, control, state.step)
    if recipe.previews.prompts and had_ended:
        images = draw(host, state.shown(dtype), state.step, run, control)
    settle()
    if run.saved_steps < state.step:
        save()
    elif images:  # the last preview as its thumbnail
        save(with_checkpoint=False)
    settle()
    return Result(state.shown(dtype), state.losses, images, state.step, state.seconds / max(1, state.step))


def need_turbo(recipe: Recipe, host: Host):
    """Raise ZTurboError for what of a recipe needs a turbo model to train on, where there is none."""
    named = (
        f"keep_turbo is {recipe.turbo.keep}"
        if recipe.turbo.restores
        else f"stop_above is {recipe.turbo.stop_above:g}"
        if recipe.turbo.stop_above
        else ""
    )
    if named and not host.turbo:
        raise ZTurboError(
            f"{named}, but the model that trains is not turbo: previews are drawn with another one (preview_model). Set keep_turbo to off or guard, and stop_above to 0."
        )


def watch(recipe: Recipe, pictures: Pictures, host: Host, check: Callable[[], None]) -> turbo.Watch:
    """What the gauge and the guard need, where they are asked for and can be had."""
    if not recipe.turbo.prompts or not (recipe.turbo.guarded or (recipe.turbo.every and host.turbo)):
        return turbo.Watch()
    with host.training({}) as velocity:
        return turbo.watch(
            recipe, len(pictures.captions.texts), shortest(pictures), host.turbo, checked(velocity, check), host.device
        )


def checked(velocity: Velocity, check: Callable[[], None]) -> Velocity:
    """The velocity, before each of which a cancel is noticed."""

    def asked(*given):
        check()
        return velocity(*given)

    return asked


def shortest(pictures: Pictures) -> int:
    """Side of the latents."""
    return min(side for views in pictures.encoded.latents for side in views.shape[2:])


def restoring(recipe: Recipe, state: State) -> bool:
    """Are these the last steps, which restore turbo?"""
    return recipe.turbo.restores and recipe.taught <= state.step < recipe.steps


def walk_restore(
    recipe: Recipe, dataset: Dataset, pictures: Pictures, host: Host, run: RunFolder, state: State, control: Control
) -> turbo.Restore:
    """The paths that the last steps are held to. The LoRA as it was taught lies in the run folder, so that a run that is taken up walks the same ones. Raises LoraFileError when it is needed from there and gone."""
    if state.restoring:
        taught = run.taught_lora(host.device)
    else:
        learnt = state.shown(torch.float32)
        if refused := run.keep_taught(learnt):
            tell(
                run,
                control,
                state.step,
                f"{refused} Restoring goes on, but it cannot be taken up again if it is cut off.",
            )
        taught = lorafile.on_device(lorafile.parse(learnt)[0], host.device)
    extra = turbo.texts(recipe, dataset.trigger, True)
    first, unrelated = len(pictures.captions.texts), len(recipe.turbo.prompts)
    own = {
        number
        for item, numbers in zip(dataset.items, pictures.captions.of)
        if not item.regularisation
        for number in numbers
    }
    if dataset.trigger and pictures.captions.dropped is not None:
        own.add(pictures.captions.dropped)  # the trigger word alone
    named = (*spread(tuple(sorted(own)), FOLLOWED), *range(first + unrelated, first + len(extra)))
    width = turbo.side(recipe, shortest(pictures))

    def walk(lora: Lora, numbers) -> health.Paths:
        with host.training(lora) as velocity:
            asked = checked(velocity, control.check)
            return health.walk(
                lambda x, sigma, some: asked(x, sigma, some, 0.0),
                tuple(numbers),
                width,
                width,
                recipe.seed,
                host.device,
            )

    return turbo.Restore(walk(taught, named), walk({}, range(first + health.WATCHED, first + unrelated)))


def begin(recipe: Recipe, host: Host, run: RunFolder) -> State:
    """The state to go on from: the newest checkpoint's, or an untrained LoRA."""
    lora = network.create(host.targets, recipe.network, recipe.seed, host.device, host.norms, host.start())
    average = network.frozen_copy(lora) if recipe.optimizer.ema else {}
    state = State(lora, optimizers.build(recipe.optimizer, lowrank.parameters(lora)), average)
    saved = run.newest_checkpoint()
    if saved is not None:
        state.take(*saved)
        log.info("Going on from step %d.", state.step)
    run.rewind(state.step)
    return state


def step_back(recipe: Recipe, host: Host, run: RunFolder, state: State, error: LossError) -> State:
    """The state of the last good checkpoint, or of the beginning, with half the learning rate; nothing later is left on the disk."""
    run.forget_checkpoints(after=state.step - 2 * WINDOW if math.isfinite(error.loss) else state.step - 1)
    state = begin(recipe, host, run)
    state.setbacks += 1
    run.saved_steps = 0  # the LoRA on the disk has learnt what is undone now
    if run.healthy_step > state.step:
        run.forget_healthy()
    return state


def reading_due(recipe: Recipe, state: State, watched: turbo.Watch) -> bool:
    return watched.gauge is not None and (state.step % recipe.turbo.every == 0 or state.step == recipe.steps)


def read_gauge(
    recipe: Recipe,
    state: State,
    watched: turbo.Watch,
    velocity: Velocity,
    device,
    run: RunFolder,
    control: Control,
    keep: Callable[[], None],
) -> float:
    """Log and return a reading of the gauge, and keep the LoRA while turbo is healthy."""
    with state.as_shown():
        event = watched.read(velocity, state.step, device)
    run.event(**event)
    control.look(event)
    if event["gauge"] <= recipe.turbo.healthy:
        keep()
    return event["gauge"]


def end_worn(recipe: Recipe, host: Host, run: RunFolder, state: State, control: Control, reading: float) -> State:
    """The run ends because turbo is worn: with the LoRA of the last reading that was within the limit, where there is one."""
    reached = state.step
    if run.healthy_step in map(step_of, run.checkpoint_files()):
        run.forget_checkpoints(after=run.healthy_step)
        state = begin(recipe, host, run)
        run.saved_steps = 0
    request_stop(run.path)
    ending = (
        f"training ends with the LoRA of step {state.step}."
        if state.step < reached
        else "training ends here: there is no earlier checkpoint within the limit. Let gauge_every be smaller to end earlier."
    )
    tell(
        run,
        control,
        state.step,
        f"The gauge read {reading:.2f} at step {reached}, above {recipe.turbo.stop_above:g}: {ending}",
    )
    return state


def tell_of_wear(recipe: Recipe, run: RunFolder, control: Control, step: int):
    """At the end: is turbo worn, which LoRA was the last healthy one, and was turbo restored, where it was to be?"""
    reading, parts = run.newest_reading(), []
    if reading > recipe.turbo.healthy and run.healthy_step < step:
        parts.append(f"Turbo is worn: the gauge reads {reading:.2f} (0 untouched, 1 broken).")
        if run.healthy_step:
            parts.append(
                f"The LoRA of step {run.healthy_step}, when it still read at most {recipe.turbo.healthy:g}, is kept as {run.healthy.name}."
            )
    if recipe.turbo.restores and step < recipe.steps:
        parts.append(
            f"The run ended at step {step} of {recipe.steps}, before turbo was {'wholly ' if step > recipe.taught else ''}restored: go on from it by its name in resume."
        )
    if parts:
        tell(run, control, step, " ".join(parts))


def tell(run: RunFolder, control: Control, step: int, sentence: str):
    """Say something on the screen and in the log."""
    run.event(event="note", step=step, text=sentence)
    control.say(sentence)


def save_memory(host: Host, run: RunFolder, state: State, control: Control):
    """One picture at a time from now on, and every layer computed again in backward: the same LoRA but for rounding."""
    host.save_memory()
    tell(
        run,
        control,
        state.step,
        f"There was not enough memory at step {state.step + 1}. It goes on with gradient checkpointing, one picture at a time. This takes longer.",
    )


def look(pictures: Pictures, state: State, velocity: Velocity, device, run: RunFolder, control: Control, seed: int):
    """Log the loss at fixed noise levels and fixed noise on pictures held out, and on as many that are trained on: "validation" events."""
    with state.as_shown():
        found = {
            kind: fixed_loss(pictures, spread(getattr(pictures, kind)), velocity, device, seed)
            for kind in ("held_out", "trained")
        }
    event = {"event": "validation", "step": state.step, **found}
    run.event(**event)
    control.look(event)


def spread(numbers: tuple[int, ...], most: int = LOOKED_AT) -> tuple[int, ...]:
    """At most so many of them, evenly from first to last."""
    return numbers if len(numbers) <= most else tuple(numbers[i * len(numbers) // most] for i in range(most))


def fixed_loss(pictures: Pictures, numbers: tuple[int, ...], velocity: Velocity, device, seed: int) -> float:
    """Mean square error of the velocity over these pictures at FIXED_SIGMAS, with noise that never changes."""
    total = 0.0
    with torch.no_grad():
        for n in numbers:
            batch = pictures.one(n)
            for sigma in FIXED_SIGMAS:
                eps = torch.randn(batch.x0.shape, generator=flow.generator(seed, "validation", n, sigma)).to(device)
                x0, noise = batch.x0.to(device), torch.full((1,), sigma, device=device)
                v = velocity(flow.add_noise(x0, eps, noise), noise, batch.captions, 1.0)
                total += flow.velocity_loss(v, flow.velocity_target(x0, eps), torch.ones_like(noise)).item()
    return total / (len(numbers) * len(FIXED_SIGMAS))


def draw(host: Host, state: dict[str, torch.Tensor], step: int, run: RunFolder, control: Control) -> list[np.ndarray]:
    """Draw, keep and show the previews of a step. Nothing, with a note, when drawing fails: training is worth more."""
    try:
        images = host.draw(state)
    except Exception as error:
        tell(
            run,
            control,
            step,
            f"The preview at step {step} could not be drawn ({type(error).__name__}: {error}); training goes on.",
        )
        return []
    control.preview(step, images, [run.preview(step, number, image) for number, image in enumerate(images)])
    return images


def one_step(
    recipe: Recipe,
    pictures: Pictures,
    watched: turbo.Watch,
    restore: turbo.Restore | None,
    state: State,
    velocity: Velocity,
    device,
    thrifty: bool,
) -> dict:
    """One optimizer step; the state moves on by one. thrifty: pictures go through the model one by one. Returns its event. Raises LossError, before anything is changed, for a loss that is no number."""
    started, step, options = time.perf_counter(), state.step, recipe.optimizer
    rate = (
        optimizers.learning_rate(options, step, recipe.taught)
        if restore is None
        else options.learning_rate * (recipe.steps - step) / recipe.turbo.restore_steps
    )
    rate /= 2**state.setbacks
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    state.optimizer.zero_grad(set_to_none=True)
    adapter = adapter_factor(recipe, step)
    total, sigmas = torch.zeros((), device=device), []
    for place in range(step * options.accumulation, (step + 1) * options.accumulation):
        batch = (
            losses(recipe, place, pictures, velocity, device, thrifty, adapter)
            if restore is None
            else restore.losses(recipe, place, velocity, device, lambda size: pieces(size, thrifty))
        )
        for loss, sigma in batch:
            (loss / options.accumulation).backward()
            total += loss.detach() / options.accumulation
            sigmas.append(sigma)
    guard = {}
    if watched.guard is not None and step % recipe.turbo.interval == 0:
        guard["guard"] = watched.hold(recipe, step, velocity, device, lambda size: pieces(size, thrifty))
    parameters = lowrank.parameters(state.lora)
    norm = torch.nn.utils.clip_grad_norm_(parameters, options.max_grad_norm or math.inf)
    value = total.item()  # the one point where a step waits for the device
    if not math.isfinite(value) or not math.isfinite(norm.item()):
        sentence = f"The loss became {value} and its gradient {norm.item()} at step {step + 1}; training was stopped before that step could do harm."
        raise LossError(f"{sentence} Try a lower learning rate than {rate:g}, or fp32.", math.nan)
    since = state.since if state.restoring == (restore is not None) else step
    if exploded([*state.losses, value][since:]):
        raise LossError(
            f"The loss of the last {WINDOW} steps before step {step + 1} is more than {EXPLOSION} times what it was. Try a lower learning rate than {rate:g}.",
            value,
        )
    state.whole = False
    state.optimizer.step()
    if state.average:
        torch._foreach_lerp_(
            lowrank.parameters(state.average),
            [p.detach() for p in parameters],
            1 - min(options.ema, (1 + step) / (10 + step)),
        )
    state.losses.append(value)
    state.restoring, state.since = restore is not None, since
    state.whole = True
    seconds = time.perf_counter() - started
    state.seconds += seconds
    return {
        "step": step + 1,
        "loss": value,
        "lr": rate,
        "grad_norm": norm.item(),
        "sigma": torch.cat(sigmas).mean().item(),
        "seconds": round(seconds, 4),
        **guard,
    }


def exploded(losses: list[float]) -> bool:
    """Looked at every WINDOW steps: is the mean of the last so many more than EXPLOSION times the lowest one before?"""
    if len(losses) % WINDOW or len(losses) < 2 * WINDOW:
        return False
    means = [sum(losses[i : i + WINDOW]) / WINDOW for i in range(0, len(losses), WINDOW)]
    return means[-1] > EXPLOSION * min(means[:-1])


def adapter_factor(recipe: Recipe, step: int) -> float:
    """How much of the adapter's strength there is at step `step` (from 0)."""
    course = min(1.0, step / max(1, recipe.taught - 1))
    return recipe.adapter.start + (recipe.adapter.end - recipe.adapter.start) * course


def losses(
    recipe: Recipe, place: int, pictures: Pictures, velocity: Velocity, device, thrifty: bool, adapter: float
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Loss and sigmas of each piece of batch `place` (counted over the whole run); the losses add up to the batch's mean."""
    batch, options = pictures.at(recipe, place), recipe.timesteps
    random = flow.generator(recipe.seed, "step", place)
    size = len(batch.captions)
    sigma = flow.sample_sigma(options.density, size, random, options.mean, options.std)
    sigma = options.min_sigma + (options.max_sigma - options.min_sigma) * sigma
    eps = torch.randn(batch.x0.shape, generator=random)
    for rows in pieces(size, thrifty):
        part = Batch(
            batch.x0[rows].to(device),
            batch.captions[rows],
            batch.weight[rows].to(device),
            None if batch.mask is None else batch.mask[rows].to(device),
        )
        each = piece_loss(recipe, part, eps[rows].to(device), sigma[rows].to(device), velocity, adapter)
        yield each.sum() / size, sigma[rows]


def pieces(size: int, thrifty: bool) -> list[slice]:
    """What of a batch goes through the model at once: all of it, or one by one."""
    return [slice(n, n + 1) for n in range(size)] if thrifty else [slice(0, size)]


def piece_loss(
    recipe: Recipe, batch: Batch, eps: torch.Tensor, sigma: torch.Tensor, velocity: Velocity, adapter: float
) -> torch.Tensor:
    """[B] losses of pictures that go through the model at once."""
    v = velocity(flow.add_noise(batch.x0, eps, sigma), sigma, batch.captions, adapter)
    target = flow.velocity_target(batch.x0, eps)
    if recipe.loss.guidance not in (0, 1):
        target = flow.guided_target(v, target, recipe.loss.guidance)
    weight = flow.loss_weight(recipe.timesteps.density, sigma, recipe.loss.weighting) * batch.weight
    delta = recipe.loss.huber_delta if recipe.loss.kind == "huber" else None
    return flow.velocity_loss(v, target, weight, delta, batch.mask)


def save_due(recipe: Recipe, state: State, run: RunFolder) -> bool:
    """Every so many steps, and when someone asked to save now."""
    asked = run.save_now.exists()
    if asked:
        run.save_now.unlink(missing_ok=True)
    return asked or state.step % recipe.saving.every == 0


def preview_due(recipe: Recipe, state: State) -> bool:
    return bool(recipe.previews.prompts) and recipe.previews.every > 0 and state.step % recipe.previews.every == 0


def finished(recipe: Recipe, state: State, control: Control) -> bool:
    return state.step >= recipe.steps or (state.step > 0 and control.stop_requested)
