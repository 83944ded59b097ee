"""The training loop, readable top to bottom.

Step `n` is a function of (recipe, seed, n): order, noise and timesteps come from counters (`flow.generator`),
so nothing that happens between steps, a preview or a pause, can change what is learnt.
"""

import logging
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from . import flow, lorafile, lowrank, optimizers
from .checkpoint import State
from .dataset import Captions, Dataset, Encoded
from .errors import LossError
from .lowrank import Factors, Target
from .recipe import Recipe
from .runfolder import RunFolder

log = logging.getLogger("zturbo")
WINDOW = 50  # steps
EXPLOSION = 5  # times
Velocity = Callable[[torch.Tensor, torch.Tensor, tuple[int, ...]], torch.Tensor]


class Host(Protocol):
    """What the trainer trains in: a model with its text encoder and autoencoder, and a way to draw."""

    device: torch.device
    targets: list[Target]

    def encode(self, dataset: Dataset, captions: Captions) -> Encoded:
        """Latents of the pictures, lengths of the captions. Keeps the captions themselves."""
        ...

    def training(self, lora: dict[str, Factors]) -> AbstractContextManager[Velocity]:
        """While open, the model is loaded with the adapter and `lora`: velocity(x_t [B,16,h,w], sigma [B], caption numbers)."""
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
    """Which pictures a step sees. Every epoch shows each picture once; a batch is of one shape and one caption length."""

    groups: tuple[tuple[int, ...], ...]  # picture numbers that may share a batch
    size: int
    seed: int

    @property
    def per_epoch(self) -> int:
        return sum(math.ceil(len(group) / self.size) for group in self.groups)

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
class Pictures:
    """What a batch is made of."""

    encoded: Encoded
    captions: Captions
    batches: Batches

    def at(self, recipe: Recipe, place: int) -> tuple[torch.Tensor, tuple[int, ...]]:
        """Latents [B, 16, h, w] and caption numbers of batch `place`: which mirrored, which tag order, whether the captions are dropped."""
        numbers = self.batches.at(place)
        random = flow.generator(recipe.seed, "look", place)
        latents = [self.encoded.latents[n] for n in numbers]
        x0 = torch.stack([views[torch.randint(len(views), (), generator=random)] for views in latents])
        drop = torch.rand((), generator=random).item() < recipe.data.caption_dropout
        if drop and self.captions.dropped is not None:
            return x0, (self.captions.dropped,) * len(numbers)
        texts = [self.captions.of[n] for n in numbers]
        chosen = tuple(variants[torch.randint(len(variants), (), generator=random)] for variants in texts)
        if len({self.encoded.lengths[n] for n in chosen}) > 1:  # an order of tags that falls into another padding block
            chosen = tuple(variants[0] for variants in texts)
        return x0, chosen


def group_pictures(encoded: Encoded, captions: Captions, repeats: list[int]) -> tuple[tuple[int, ...], ...]:
    """Pictures of the same latent shape and caption length together: NextDiT has no caption mask. A picture stands there as often as it is shown in an epoch."""
    groups: dict[tuple, list[int]] = {}
    for number, (views, variants) in enumerate(zip(encoded.latents, captions.of)):
        groups.setdefault((tuple(views.shape[1:]), encoded.lengths[variants[0]]), []).extend([number] * repeats[number])
    return tuple(tuple(groups[key]) for key in sorted(groups))


def train(recipe: Recipe, dataset: Dataset, host: Host, run: RunFolder, control: Control, metadata: dict[str, str]) -> Result:
    """Train a LoRA, or go on from the run folder's newest checkpoint, to the same bits as if it had never stopped.

    Must be called outside inference mode, with gradients enabled. Writes a checkpoint and `run.lora` every
    `recipe.saving.every` steps, at the end, and before it raises: on cancel (whatever `control.check` raises), on
    anything else. A loss that is no number, or has exploded, sends the run back to the last good checkpoint with half
    the learning rate, once; then it raises LossError. Stopping waits for the first step; a preview that cannot be
    drawn is said and costs nothing else.
    """
    captions = dataset.captions()
    encoded = host.encode(dataset, captions)
    repeats = [item.repeats for item in dataset.items]
    pictures = Pictures(encoded, captions, Batches(group_pictures(encoded, captions, repeats), recipe.batch_size, recipe.seed))
    state = begin(recipe, host, run)
    had_ended = finished(recipe, state, control)
    dtype = lorafile.DTYPES[recipe.saving.dtype]
    images: list[np.ndarray] = []

    def save():
        run.save(state.step, state.shown(dtype), metadata)
        if state.whole:
            run.checkpoint(state, recipe.saving.keep)

    try:
        while not finished(recipe, state, control):
            try:
                with host.training(state.lora) as velocity:
                    while not finished(recipe, state, control):
                        control.check()
                        event = one_step(recipe, pictures, state, velocity, host.device)
                        run.event(**event)
                        control.step(event)
                        if save_due(recipe, state, run):
                            save()
                        if preview_due(recipe, state):
                            break
            except LossError as error:
                if state.setbacks:
                    raise
                state = step_back(recipe, host, run, state, error)
                continue
            # Drawn outside the training context: the model is clean again, as a user's own graph would have it.
            if recipe.previews.prompts and (preview_due(recipe, state) or finished(recipe, state, control)):
                images = draw(host, state.shown(dtype), state.step, run, control) or images
    except BaseException:
        if state.losses and run.saved_steps < state.step and (state.whole or not run.saved_steps):
            try:
                save()
            except Exception as error:  # a device that died takes the newest LoRA with it: the last saved one stays
                log.error("The LoRA of step %d could not be saved: %s", state.step, error)
        raise
    if run.saved_steps < state.step:
        save()
    if recipe.previews.prompts and had_ended:
        images = draw(host, state.shown(dtype), state.step, run, control)
    return Result(state.shown(dtype), state.losses, images, state.step, state.seconds / state.step)


def begin(recipe: Recipe, host: Host, run: RunFolder) -> State:
    """The state to go on from: the newest checkpoint's, or an untrained LoRA."""
    lora = lowrank.create(host.targets, recipe.network.rank, recipe.network.alpha, recipe.seed, host.device)
    average = {name: Factors(f.A.detach().clone(), f.B.detach().clone(), f.scale) for name, f in lora.items()} if recipe.optimizer.ema else {}
    state = State(lora, optimizers.build(recipe.optimizer, lowrank.parameters(lora)), average)
    saved = run.newest_checkpoint()
    if saved is not None:
        state.take(*saved)
        log.info("Going on from step %d.", state.step)
    run.rewind(state.step)
    return state


def step_back(recipe: Recipe, host: Host, run: RunFolder, state: State, error: LossError) -> State:
    """The state of the last good checkpoint, or of the beginning, to go on from with half the learning rate."""
    run.forget_checkpoints(after=state.step - 2 * WINDOW if math.isfinite(error.loss) else state.step)
    failed = state.step + 1
    state = begin(recipe, host, run)
    state.setbacks += 1
    run.saved_steps = 0  # the LoRA on the disk has learnt what is undone now
    log.warning("%s Going back to step %d with half the learning rate.", error, state.step)
    run.event(event="step back", step=state.step, failed=failed, error=str(error))
    return state


def draw(host: Host, state: dict[str, torch.Tensor], step: int, run: RunFolder, control: Control) -> list[np.ndarray]:
    """Draw, keep and show the previews of a step. None, with a warning, when drawing fails: training is worth more."""
    try:
        images = host.draw(state)
    except Exception as error:
        log.warning("The preview at step %d could not be drawn (%s: %s); training goes on.", step, type(error).__name__, error)
        run.event(event="preview failed", step=step, error=str(error))
        return []
    control.preview(step, images, [run.preview(step, number, image) for number, image in enumerate(images)])
    return images


def one_step(recipe: Recipe, pictures: "Pictures", state: State, velocity: Velocity, device) -> dict:
    """One optimizer step; the state moves on by one. Returns its event. Raises TrainingError, before anything is changed, for a loss that is no number."""
    started, step, options = time.perf_counter(), state.step, recipe.optimizer
    rate = optimizers.learning_rate(options, step, recipe.steps) / 2**state.setbacks
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    state.optimizer.zero_grad(set_to_none=True)
    total, sigmas = torch.zeros((), device=device), []
    for place in range(step * options.accumulation, (step + 1) * options.accumulation):
        loss, sigma = one_loss(recipe, place, pictures, velocity, device)
        (loss / options.accumulation).backward()
        total += loss.detach() / options.accumulation
        sigmas.append(sigma)
    parameters = lowrank.parameters(state.lora)
    norm = torch.nn.utils.clip_grad_norm_(parameters, options.max_grad_norm or math.inf)
    value = total.item()  # the one point where a step waits for the device
    if not math.isfinite(value) or not math.isfinite(norm.item()):
        sentence = f"The loss became {value} and its gradient {norm.item()} at step {step + 1}; training was stopped before that step could do harm."
        raise LossError(f"{sentence} Try a lower learning rate than {rate:g}, or fp32.", math.nan)
    if exploded([*state.losses, value]):
        raise LossError(f"The loss of the last {WINDOW} steps before step {step + 1} is more than {EXPLOSION} times what it was. Try a lower learning rate than {rate:g}.", value)
    state.whole = False
    state.optimizer.step()
    if state.average:
        torch._foreach_lerp_(lowrank.parameters(state.average), [p.detach() for p in parameters], 1 - options.ema)
    state.losses.append(value)
    state.whole = True
    seconds = time.perf_counter() - started
    state.seconds += seconds
    return {"step": step + 1, "loss": value, "lr": rate, "grad_norm": norm.item(), "sigma": torch.cat(sigmas).mean().item(), "seconds": round(seconds, 4)}


def exploded(losses: list[float]) -> bool:
    """Looked at every WINDOW steps: is the mean of the last so many more than EXPLOSION times the lowest one before?"""
    if len(losses) % WINDOW or len(losses) < 2 * WINDOW:
        return False
    means = [sum(losses[i : i + WINDOW]) / WINDOW for i in range(0, len(losses), WINDOW)]
    return means[-1] > EXPLOSION * min(means[:-1])


def one_loss(recipe: Recipe, place: int, pictures: "Pictures", velocity: Velocity, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and sigmas [B] of batch `place` (counted over the whole run)."""
    x0, numbers = pictures.at(recipe, place)
    random = flow.generator(recipe.seed, "step", place)
    options = recipe.timesteps
    sigma = flow.sample_sigma(options.density, len(numbers), random, options.mean, options.std)
    sigma = options.min_sigma + (options.max_sigma - options.min_sigma) * sigma
    eps = torch.randn(x0.shape, generator=random)
    x0, eps, noise = x0.to(device), eps.to(device), sigma.to(device)
    v = velocity(flow.add_noise(x0, eps, noise), noise, numbers)
    target = flow.velocity_target(x0, eps)
    if recipe.loss.guidance > 1:
        target = flow.guided_target(v, target, recipe.loss.guidance)
    delta = recipe.loss.huber_delta if recipe.loss.kind == "huber" else None
    return flow.velocity_loss(v, target, flow.loss_weight(options.density, noise), delta), sigma


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
