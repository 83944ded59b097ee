"""One optimizer step: gradients of the phase's objective and penalties, clipping, the optimizer, the moving average."""

import math
import time
from collections.abc import Iterator
from dataclasses import replace

import torch

from . import lowrank
from .errors import LossError
from .objectives import Loss, Split
from .plan import Phase
from .recipe import Optimizer
from .roles import Velocity
from .state import State

WINDOW = 50  # steps
EXPLOSION = 5  # times


def optimizer_step(options: Optimizer, phase: Phase, state: State, velocity: Velocity, split: Split) -> dict:
    """Backward, clip, step; the state moves on by one. Returns the step's event.

    Raises LossError, before anything is changed, for a loss that is no number or has exploded.
    """
    started, step = time.perf_counter(), state.step
    rate = phase.learning_rate(step) / 2**state.rollbacks
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    state.optimizer.zero_grad(set_to_none=True)
    parameters = lowrank.parameters(state.lora)
    zero, sigmas = torch.zeros((), device=parameters[0].device), []
    total = zero.clone()
    for index in range(step * options.accumulation, (step + 1) * options.accumulation):
        losses = phase.objective.losses(index, velocity, replace(split, turn=index))
        for part, levels in backward(losses, batches=options.accumulation):
            total += part
            sigmas.append(levels)
    penalties = {
        one.name: sum((part for part, _ in backward(one.objective.losses(step, velocity, split), one.weight)), zero)
        for one in phase.penalties
        if step % one.every == 0
    }
    levels = torch.cat([torch.empty(0), *sigmas])
    numbers = [total, levels.sum(), torch.tensor(float(len(levels))), *penalties.values()]
    total, level, rows, *beside = split.world.sum(parameters, numbers)
    length = torch.nn.utils.clip_grad_norm_(parameters, options.max_grad_norm or math.inf)
    # the one point where a step waits for the device
    loss, norm, sigma = total.item(), length.item(), (level / rows).item()
    extras = {name: value.item() for name, value in zip(penalties, beside)}
    check([*state.losses_in(phase.number), loss], norm, step, rate)
    with state.stepping(phase.number, loss):
        state.optimizer.step()
        state.average(options.ema)
    seconds = time.perf_counter() - started
    state.seconds += seconds
    event = {"step": step + 1, "loss": loss, "lr": rate, "grad_norm": norm, "sigma": sigma}
    return {**event, "seconds": round(seconds, 4), **extras}


def backward(losses: Iterator[Loss], weight: float = 1.0, batches: int = 1) -> Iterator[Loss]:
    """Add the gradients of weight * loss / batches, a micro-batch at a time. Gives (loss / batches, sigmas) of each."""
    for loss, sigmas in losses:
        (weight * loss / batches).backward()
        yield loss.detach() / batches, sigmas


def check(losses: list[float], norm: float, step: int, rate: float):
    """Raise LossError for a newest loss that is no number, or has exploded. losses: of this phase so far."""
    loss = losses[-1]
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise LossError(NOT_A_NUMBER.format(loss=loss, norm=norm, step=step + 1, rate=rate), math.nan)
    if exploded(losses):
        raise LossError(EXPLODED.format(window=WINDOW, times=EXPLOSION, step=step + 1, rate=rate), loss)


def exploded(losses: list[float]) -> bool:
    """Looked at every WINDOW steps: is the mean of the last so many more than EXPLOSION times the lowest one before?"""
    if len(losses) % WINDOW or len(losses) < 2 * WINDOW:
        return False
    means = [sum(losses[i : i + WINDOW]) / WINDOW for i in range(0, len(losses), WINDOW)]
    return means[-1] > EXPLOSION * min(means[:-1])


NOT_A_NUMBER = (
    "The loss became {loss} and its gradient {norm} at step {step}; training was stopped before that step could do "
    "harm. Try a lower learning rate than {rate:g}, or fp32."
)
EXPLODED = (
    "The loss of the last {window} steps before step {step} is more than {times} times what it was. "
    "Try a lower learning rate than {rate:g}."
)
