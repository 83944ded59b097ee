"""What happens beside the optimizer steps. Each hook decides by itself when it is due, and none calls another.

`after_step` runs while the model is loaded with the LoRA. A hook that needs the model clean says so in `wants_pause`,
and acts in `on_pause`, which is called at the pauses of others, too. A further hook is another class here, and an entry
in `all_hooks`.
"""

import numpy as np
import torch

from . import flow, runfolder
from .batches import Pictures, spread
from .roles import Velocity
from .session import Session

LOOKED_AT = 6  # pictures of each kind in a validation
FIXED_SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)


class Hook:
    """Does nothing. Hooks are called in the order of `all_hooks`.

    everywhere: where many processes train a run, does it act in each of them? Else in the first alone.
    """

    everywhere = False

    def on_start(self, session: Session):
        """Before the first step of a run, or of one that is taken up."""

    def after_step(self, session: Session, velocity: Velocity, event: dict):
        """event: the step's."""

    def wants_pause(self, session: Session) -> bool:
        return False

    def on_pause(self, session: Session):
        """The model is clean: between two steps, when some hook wants a pause, a phase is over or the run ends."""

    def on_end(self, session: Session):
        """The last step is done. It is not called where the run fails."""


def all_hooks() -> tuple[Hook, ...]:
    """In this order: a step is logged before what follows from it; the gauge comes before saving and drawing."""
    return StepLog(), Validation(), Gauge(), Saving(), Previews()


class StepLog(Hook):
    """Each step on the screen and in the log, and what the host has to say."""

    everywhere = True

    def after_step(self, session: Session, velocity: Velocity, event: dict):
        event |= session.host.memory()
        session.run.event(**event)
        session.control.step(event)
        for sentence in session.host.told():
            session.tell(sentence)


class Validation(Hook):
    """The loss at fixed noise levels and noise, on pictures held out and on as many that are trained on."""

    def on_start(self, session: Session):
        if session.state.step == 0 and session.pictures.held_out:
            session.control.phase("validating", 0, 0)
            with session.host.training(session.state.lora) as velocity:
                self.read(session, velocity)

    def after_step(self, session: Session, velocity: Velocity, event: dict):
        if session.pictures.held_out and session.state.step % session.recipe.data.validation_every == 0:
            self.read(session, velocity)

    def read(self, session: Session, velocity: Velocity):
        pictures, device, seed = session.pictures, session.host.device, session.recipe.seed
        with session.state.as_exported():
            found = {
                kind: fixed_loss(pictures, spread(numbers, LOOKED_AT), velocity, device, seed)
                for kind, numbers in (("held_out", pictures.held_out), ("trained", pictures.trained))
            }
        session.log_reading({"event": "validation", "step": session.state.step, **found})


class Gauge(Hook):
    """Reads how turbo the model still is, keeps the newest healthy LoRA, and ends the run above the limit."""

    everywhere = True

    def __init__(self):
        self.reading = 0.0

    def after_step(self, session: Session, velocity: Velocity, event: dict):
        options, step = session.recipe.turbo, session.state.step
        if session.references.gauge is None or not (step % options.every == 0 or step == session.recipe.steps):
            return
        with session.state.as_exported():
            reading = session.references.read(velocity, step, session.host.device)
        reading = session.world.agree("gauge", reading)
        session.log_reading(reading)
        self.reading = reading["gauge"]
        if self.reading <= options.healthy:
            session.save_healthy()
        session.stopped = options.stop_above > 0 and not self.reading <= options.stop_above

    def wants_pause(self, session: Session) -> bool:
        return session.stopped

    def on_pause(self, session: Session):
        """Turbo has drifted too far: the run ends with the LoRA of the last reading within the limit."""
        if not session.stopped:
            return
        session.settle()
        run, reached = session.run, session.state.step
        kept = run.healthy_step in map(runfolder.step_of, run.checkpoint_files())
        if session.world.agree("kept", kept):
            session.go_back(run.healthy_step)
        run.request_stop()
        step, limit = session.state.step, session.recipe.turbo.stop_above
        ending = f"training ends with the LoRA of step {step}." if step < reached else NONE_WITHIN
        session.tell(f"The gauge read {self.reading:.2f} at step {reached}, above {limit:g}: {ending}")

    def on_end(self, session: Session):
        """Is turbo worn, which LoRA was the last healthy one, and was turbo restored, where it was to be?"""
        if session.stopped:
            return
        recipe, run, step = session.recipe, session.run, session.state.step
        reading, healthy, parts = run.newest_reading(), recipe.turbo.healthy, []
        if reading > healthy and run.healthy_step < step:
            parts.append(f"Turbo is worn: the gauge reads {reading:.2f} (0 untouched, 1 broken).")
            if run.healthy_step:
                kept = f"The LoRA of step {run.healthy_step}, when it still read at most {healthy:g}, is kept as"
                parts.append(f"{kept} {run.healthy.name}.")
        if recipe.turbo.restores and step < recipe.steps:
            wholly = "wholly " if step > recipe.learning_steps else ""
            parts.append(NOT_RESTORED.format(step=step, steps=recipe.steps, wholly=wholly))
        if parts:
            session.tell(" ".join(parts))


class Saving(Hook):
    """The LoRA and a checkpoint, every so many steps and when someone asked to save now."""

    def after_step(self, session: Session, velocity: Velocity, event: dict):
        if not session.writer.busy:
            session.settle()
        run = session.run
        asked = run.save_now.exists()
        if asked:
            run.save_now.unlink(missing_ok=True)
        if asked or session.state.step % session.recipe.saving.every == 0:
            session.save()


class Previews(Hook):
    """Pictures drawn on the clean model, as a user's own graph would have it."""

    def wants_pause(self, session: Session) -> bool:
        options = session.recipe.previews
        return bool(options.prompts) and options.every > 0 and session.state.step % options.every == 0

    def on_pause(self, session: Session):
        if session.recipe.previews.prompts and (self.wants_pause(session) or session.ended):
            session.images = self.draw(session) or session.images

    def draw(self, session: Session) -> list[np.ndarray]:
        """Nothing, with a note, when drawing fails: training is worth more."""
        step = session.state.step
        try:
            images = session.host.draw(session.exported(), session.progress("drawing"))
        except Exception as error:
            problem = f"({type(error).__name__}: {error})"
            session.tell(f"The preview at step {step} could not be drawn {problem}; training goes on.")
            return []
        paths = [session.run.preview(step, number, image) for number, image in enumerate(images)]
        session.control.preview(step, images, paths)
        return images


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


NONE_WITHIN = (
    "training ends here: there is no earlier checkpoint within the limit. Let gauge_every be smaller to end earlier."
)
NOT_RESTORED = (
    "The run ended at step {step} of {steps}, before turbo was {wholly}restored: go on from it by its name in resume."
)
