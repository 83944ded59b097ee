"""The loop on a host small enough to check by hand: a model that is one linear map, in plain PyTorch."""

import os
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from zturbo import batches, dataset, flow, hooks, lorafile, lowrank, memory, objectives, runfolder, runlog, trainer
from zturbo.dataset import Encoded
from zturbo.errors import LossError, ZTurboError
from zturbo.family import Z_IMAGE
from zturbo.lorafile import module_targets
from zturbo.recipe import AdapterCourse, Data, Optimizer, Previews, Recipe, Saving, Timesteps, Turbo
from zturbo.runfolder import RunFolder
from zturbo.step import exploded
from zturbo.world import Elsewhere

SHAPES = ((16, 2, 2), (16, 2, 4))


# caption n is picture n's
PICTURES = dataset.from_arrays(
    [np.zeros((32, 32, 3), np.uint8)] * 6, list("abcdef"), (64,), options=Data(caption_dropout=0)
)


class LinearHost:
    """v = W x over the 16 channels."""

    family, turbo = Z_IMAGE, True

    def __init__(self, pictures=6):
        torch.manual_seed(0)
        self.device = torch.device("cpu")
        self.linear = nn.Linear(16, 16, bias=False).requires_grad_(False)
        self.targets = [module_targets("layers.0.feed_forward.w1", 16, 16)]
        self.latents = [torch.randn(SHAPES[i % 2]) for i in range(pictures)]
        self.drawn, self.seen, self.fail_at = 0, [], ()

    def start(self):
        return None

    def norms(self, targets):
        return {targets[0].module: self.linear.weight.norm(dim=0, keepdim=True)}

    def out_of_memory(self, error):
        return isinstance(error, MemoryError)

    at_once, frugal = None, True

    def told(self):
        return []

    def save_memory(self):
        raise AssertionError("there is nothing to give up")

    def memory(self):
        return {"memory": 0.5}

    def encode(self, _dataset, _captions, progress):
        progress(0, 1)
        return Encoded([latent[None] for latent in self.latents])

    @contextmanager
    def training(self, lora):
        fetch = lambda x: nullcontext((self.linear.weight, None))  # noqa: E731

        def velocity(x, sigma, numbers, adapter=1.0):
            if numbers[0] < len(self.latents):  # else an unrelated prompt, for gauge and guard
                self.seen.append(numbers)
            if len(self.seen) in self.fail_at:
                return self.linear(x.movedim(1, -1)).movedim(-1, 1) * float("nan")
            return self.linear(x.movedim(1, -1)).movedim(-1, 1)

        with lowrank.attached({"layers.0.feed_forward.w1": (self.linear, fetch)}, self.targets, [lora]):
            yield velocity

    def draw(self, state, progress):
        progress(0, 1)
        assert "forward" not in self.linear.__dict__  # previews see a clean model
        self.drawn += 1
        return [np.zeros((8, 8, 3), np.uint8)]


class Nobody:
    def __init__(self, stop_after=None, cancel_after=None):
        self.stop_after, self.cancel_after, self.steps, self.previews = stop_after, cancel_after, 0, []

    @property
    def stop_requested(self):
        return self.stop_after is not None and self.steps >= self.stop_after

    def check(self):
        if self.cancel_after is not None and self.steps >= self.cancel_after:
            raise KeyboardInterrupt

    def phase(self, name, done, total):
        self.phases = [*getattr(self, "phases", []), (name, done, total)]

    def step(self, event):
        self.steps = event["step"]

    def preview(self, step, images, paths):
        self.previews.append(step)

    def look(self, event):
        self.looks = [*getattr(self, "looks", []), event]

    def say(self, sentence):
        self.said = [*getattr(self, "said", []), sentence]


def notes(run, words):
    return [event for event in runlog.read_events(run.events) if words in event.get("text", "")]


def go(tmp_path, recipe, host=None, control=None):
    host, control = host or LinearHost(), control or Nobody()
    run = RunFolder.new(tmp_path, recipe)
    return trainer.train(recipe, PICTURES, host, run, control, {"a": "b"}), run, host, control


def recipe(**changes):
    return Recipe(
        **{
            "steps": 40,
            "batch_size": 2,
            "saving": Saving(dtype="fp32"),
            "timesteps": Timesteps("sigmoid"),
            "optimizer": Optimizer(learning_rate=1e-2),
            **changes,
        }
    )


def test_loss_goes_down_and_file_events_and_result_agree(tmp_path):
    result, run, _, _ = go(tmp_path, recipe(steps=300))
    assert np.mean(result.losses[-50:]) < 0.9 * np.mean(result.losses[:50])
    events = [event for event in runlog.read_events(run.events) if "loss" in event]
    assert [event["step"] for event in events] == list(range(1, 301))
    assert [event["loss"] for event in events] == result.losses
    saved = load_file(run.lora)
    assert saved.keys() == result.state.keys() and all(torch.equal(saved[key], result.state[key]) for key in saved)


def test_first_loss_is_the_written_out_equation(tmp_path):
    from zturbo import flow

    given = recipe(steps=1)
    result, _, host, _ = go(tmp_path, given)
    numbers = host.seen[0]
    random = flow.generator(given.seed, "step", 0)
    sigma = torch.sigmoid(torch.randn(len(numbers), generator=random)).view(-1, 1, 1, 1)
    x0 = torch.stack([host.latents[n] for n in numbers])
    eps = torch.randn(x0.shape, generator=random)
    x = (1 - sigma) * x0 + sigma * eps
    v = torch.einsum("oc,bchw->bohw", host.linear.weight, x)
    assert result.losses[0] == pytest.approx(((v - (eps - x0)) ** 2).mean().item(), rel=1e-5)


def test_a_run_is_a_function_of_recipe_and_seed_whatever_is_drawn_in_between(tmp_path):
    plain, _, _, _ = go(tmp_path, recipe())
    torch.manual_seed(99)
    drawn, _, host, control = go(tmp_path, recipe(previews=Previews(("p",), every=7)))
    other, _, _, _ = go(tmp_path, recipe(seed=1))
    assert plain.losses == drawn.losses and all(torch.equal(plain.state[key], drawn.state[key]) for key in plain.state)
    assert control.previews == [7, 14, 21, 28, 35, 40] and host.drawn == 6
    assert other.losses != plain.losses


def test_stop_and_keep_hands_on_the_lora_so_far(tmp_path):
    result, run, _, control = go(tmp_path, recipe(previews=Previews(("p",), every=0)), control=Nobody(stop_after=5))
    assert result.steps == 5 and run.lora.is_file() and control.previews == [5]
    whole, _, _, _ = go(tmp_path, recipe(steps=5))
    assert all(torch.equal(result.state[key], whole.state[key]) for key in whole.state)


def test_stop_waits_for_the_first_step(tmp_path):
    result, run, _, _ = go(tmp_path, recipe(), control=Nobody(stop_after=0))
    assert result.steps == 1 and run.saved_steps == 1


def until(true, seconds=5.0):
    """Wait for what a thread does."""
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.01)


def test_the_lora_is_on_the_disk_every_save_every_steps(tmp_path):
    """A power cut leaves what was saved last."""

    class PowerCut(Nobody):
        def step(self, event):
            super().step(event)
            if event["step"] == 12:
                until(lambda: runfolder.steps_of(run.lora) == 10)  # it is written while training goes on
                self.seen = load_file(run.lora)

    control = PowerCut()
    run = RunFolder.new(tmp_path, recipe(saving=Saving(5, dtype="fp32")))
    trainer.train(recipe(saving=Saving(5, dtype="fp32")), PICTURES, LinearHost(), run, control, {})
    whole, _, _, _ = go(tmp_path, recipe(steps=10))
    assert all(torch.equal(control.seen[key], whole.state[key]) for key in whole.state)


def test_a_preview_that_fails_is_said_and_training_goes_on(tmp_path):
    class NoPictures(LinearHost):
        def draw(self, state, progress):
            raise RuntimeError("no room for a picture")

    result, run, _, control = go(tmp_path, recipe(previews=Previews(("p",), every=10)), host=NoPictures())
    plain, _, _, _ = go(tmp_path, recipe())
    assert result.losses == plain.losses and result.images == [] and control.previews == []
    failed = notes(run, "could not be drawn")
    assert [event["step"] for event in failed] == [10, 20, 30, 40] and "no room for a picture" in failed[0]["text"]


def test_a_device_that_dies_leaves_the_last_saved_lora_and_its_own_error(tmp_path, monkeypatch):
    run = RunFolder.new(tmp_path, recipe(saving=Saving(2, dtype="fp32")))
    good = lorafile.state_dict

    def dead(*args):
        raise RuntimeError("device lost while copying")

    class Dying(Nobody):
        def check(self):
            if self.steps == 3:
                monkeypatch.setattr(lorafile, "state_dict", dead)
                raise RuntimeError("device lost")

    with pytest.raises(RuntimeError, match="^device lost$"):
        trainer.train(recipe(saving=Saving(2, dtype="fp32")), PICTURES, LinearHost(), run, Dying(), {})
    monkeypatch.setattr(lorafile, "state_dict", good)
    assert run.saved_steps == 2 and "The LoRA of step 2 is saved as" in run.kept()


def test_cancel_saves_and_raises(tmp_path):
    run = RunFolder.new(tmp_path, recipe())
    with pytest.raises(KeyboardInterrupt):
        trainer.train(recipe(), PICTURES, LinearHost(), run, Nobody(cancel_after=3), {})
    whole, _, _, _ = go(tmp_path, recipe(steps=3))
    saved = load_file(run.lora)
    assert all(torch.equal(saved[key], whole.state[key]) for key in saved)


def test_a_loss_that_is_no_number_goes_back_once_with_half_the_learning_rate(tmp_path):
    host, given = LinearHost(), recipe(steps=20, saving=Saving(4, 2, "fp32"))
    host.fail_at = (11,)
    run = RunFolder.new(tmp_path, given)
    result = trainer.train(given, PICTURES, host, run, Nobody(), {})
    steps = [(event["step"], event["lr"]) for event in runlog.read_events(run.events) if "loss" in event]
    assert steps == [(n, 1e-2 if n <= 8 else 5e-3) for n in range(1, 21)]
    assert "Going back to step 8" in notes(run, "nan")[0]["text"]
    assert result.steps == 20 and all(torch.isfinite(value).all() for value in result.state.values())


def test_a_loss_that_is_no_number_twice_stops_and_leaves_what_was_good(tmp_path):
    host, given = LinearHost(), recipe(saving=Saving(4, 2, "fp32"))
    host.fail_at = (11, 17)
    run = RunFolder.new(tmp_path, given)
    with pytest.raises(LossError, match="training was stopped before"):
        trainer.train(given, PICTURES, host, run, Nobody(), {})
    assert [path.stem for path in run.checkpoint_files()] == ["step_000012", "step_000008"] and run.saved_steps == 12
    kept, known = load_file(run.lora), run.newest_checkpoint()[0]
    assert all(
        torch.equal(
            kept[f"diffusion_model.layers.0.feed_forward.w1.{part}"], known[f"lora.layers.0.feed_forward.w1.{part}"]
        )
        for part in ("lora_A.weight", "lora_B.weight")
    )
    assert "The LoRA of step 12 is saved" in RunFolder(run.path).kept()


def test_no_number_right_behind_a_checkpoint_goes_back_one_further(tmp_path):
    host, given = LinearHost(), recipe(steps=20, saving=Saving(4, 3, "fp32"))
    host.fail_at = (9,)
    run = RunFolder.new(tmp_path, given)
    trainer.train(given, PICTURES, host, run, Nobody(), {})
    assert "Going back to step 4" in notes(run, "nan")[0]["text"]


def test_one_checkpoint_from_before_an_explosion_always_stays(tmp_path):
    given = recipe(steps=260, saving=Saving(10, 1, "fp32"))
    _, run, _, _ = go(tmp_path, given)
    assert [path.stem for path in run.checkpoint_files()] == ["step_000260", "step_000200", "step_000100"]


def test_an_explosion_is_told_from_noise():
    quiet = [1.0 + 0.3 * (n % 3) for n in range(150)]
    assert not any(exploded(quiet[:n]) for n in range(151))
    assert (
        exploded([*quiet, *[8.0] * 50])
        and not exploded([*quiet, *[8.0] * 49])
        and not exploded([*quiet, 400.0, *quiet[:49]][:200][:151])
    )


def test_an_explosion_goes_back_before_it_began(tmp_path):
    class Exploding(LinearHost):
        @contextmanager
        def training(self, lora):
            with super().training(lora) as velocity:
                yield lambda *args: velocity(*args) * (50.0 if 230 < len(self.seen) + 1 <= 250 else 1.0)

    given = recipe(steps=320, saving=Saving(40, 9, "fp32"))
    run = RunFolder.new(tmp_path, given)
    trainer.train(given, PICTURES, Exploding(), run, Nobody(), {})
    assert "Going back to step 120" in notes(run, "more than 5 times")[0]["text"]
    assert [event["step"] for event in runlog.read_events(run.events) if "loss" in event] == list(range(1, 321))


class ShortOfMemory(LinearHost):
    """Holds at most so many pictures at once."""

    room = 1

    @property
    def frugal(self):
        return self.at_once == 1

    def save_memory(self):
        self.at_once = memory.fewer(recipe(batch_size=5), self.at_once)
        return memory.at_a_time(self.at_once)

    @contextmanager
    def training(self, lora):
        with super().training(lora) as velocity:

            def run(x, *args):
                if len(x) > self.room:
                    raise MemoryError("out of memory")
                return velocity(x, *args)

            yield run


@pytest.mark.parametrize("room", [1, 2])
def test_memory_that_runs_out_is_answered_with_half_as_many_pictures_at_a_time(tmp_path, room):
    given, short = recipe(steps=6, batch_size=5, saving=Saving(2, 9, "fp32")), ShortOfMemory()
    short.room = room
    result, run, host, control = go(tmp_path, given, short)
    plain, _, _, _ = go(tmp_path, given)
    assert result.losses == pytest.approx(plain.losses, rel=1e-5) and max(map(len, host.seen)) == host.at_once
    steps = ["2 pictures at a time", "one picture at a time"][: 2 if room == 1 else 1]
    assert host.at_once == room
    assert [text for text in control.said if "not enough memory at step 1" in text] == [
        f"There was not enough memory at step 1. It goes on with {how}, which takes longer." for how in steps
    ]
    assert len(notes(run, "at a time")) == len(steps)
    # what was given up stays so when the run is taken up
    run.forget_checkpoints(after=4)
    later = ShortOfMemory()
    later.room = room
    again = trainer.train(given, PICTURES, later, RunFolder(run.path), control, {"a": "b"})
    assert again.losses == result.losses and later.at_once == host.at_once
    assert len(notes(run, "not enough memory")) == len(steps)


def test_memory_that_runs_out_with_nothing_to_give_up_ends_the_run(tmp_path):
    given = recipe(steps=6, batch_size=3)
    nowhere = ShortOfMemory()
    nowhere.room = 0
    with pytest.raises(MemoryError):
        go(tmp_path, given, nowhere)


def test_a_process_that_has_nothing_to_give_up_goes_on_where_another_ran_out_of_memory(tmp_path):
    class Frugal(LinearHost):
        """Hears once that another process ran out of memory."""

        heard = False

        @contextmanager
        def training(self, lora):
            with super().training(lora) as velocity:

                def run(*given):
                    if len(self.seen) == 2 and not self.heard:
                        self.heard = True
                        raise Elsewhere("its memory ran out", memory=True)
                    return velocity(*given)

                yield run

    result, run, host, control = go(tmp_path, recipe(steps=6), Frugal())
    plain, _, _, _ = go(tmp_path, recipe(steps=6))
    assert result.losses == plain.losses and not notes(run, "not enough memory")


def test_pictures_held_out_are_looked_at_and_never_trained_on(tmp_path):
    options = Data(caption_dropout=0, validation=0.3, validation_every=4)
    pictures = replace(PICTURES, options=options)
    held = pictures.held_out()
    assert len(held) == 2
    given = recipe(steps=10, batch_size=1, data=options)
    run, host, control = RunFolder.new(tmp_path, given), LinearHost(), Nobody()
    trainer.train(given, pictures, host, run, control, {})
    looks = [event for event in runlog.read_events(run.events) if event.get("event") == "validation"]
    assert looks == [event for event in control.looks if event["event"] == "validation"] and [
        event["step"] for event in looks
    ] == [0, 4, 8]
    trained = batches.pictures_of(given, pictures, host).batches
    assert {n for place in range(100) for n in trained.at(place)} == set(range(6)) - held
    with torch.no_grad():  # the untrained look, by hand
        total = 0.0
        for n in held:
            for sigma in hooks.FIXED_SIGMAS:
                x0 = host.latents[n][None]
                eps = torch.randn(x0.shape, generator=flow.generator(given.seed, "validation", n, sigma))
                v = host.linear(((1 - sigma) * x0 + sigma * eps).movedim(1, -1)).movedim(-1, 1)
                total += (v - (eps - x0)).square().mean().item()
    assert looks[0]["held_out"] == pytest.approx(total / (len(held) * len(hooks.FIXED_SIGMAS)), rel=1e-5)
    quiet, _, _, _ = go(tmp_path, recipe(steps=4, batch_size=1))
    assert "validation" not in (tmp_path / "my_lora_2" / "events.jsonl").read_text() and quiet.steps == 4


def test_the_adapter_course_goes_from_start_to_end():
    given = recipe(steps=11, adapter=AdapterCourse(1.0, 0.5))
    assert [objectives.adapter_factor(given, step) for step in (0, 5, 10)] == pytest.approx([1.0, 0.75, 0.5])
    assert objectives.adapter_factor(recipe(steps=1), 0) == 1.0
    restored = recipe(steps=21, adapter=AdapterCourse(1.0, 0.5), turbo=Turbo("restore", restore_steps=10))
    assert [objectives.adapter_factor(restored, step) for step in (0, 5, 10)] == pytest.approx([1.0, 0.75, 0.5])
    with pytest.raises(ZTurboError, match="adapter schedule away"):
        recipe(adapter=AdapterCourse(1.0, 0.5), turbo=Turbo("guard"))


def test_regularisation_pictures_and_masks_weigh_the_loss():
    v, target = torch.zeros(2, 16, 2, 2), torch.ones(2, 16, 2, 2)
    target[1, :, 0] = 3.0
    mask = torch.ones(2, 1, 2, 2)
    mask[1, :, 0], mask[1, :, 1] = 0.2, 1.8
    batch = batches.Batch(torch.zeros_like(v), (0, 0), torch.tensor([0.5, 1.0]), mask)
    given = recipe(timesteps=Timesteps("linear"))
    losses = objectives.picture_losses(given, batch, target, torch.tensor([0.5, 0.5]), lambda *args: v, 1.0)
    assert losses.tolist() == pytest.approx([0.5, (9 * 0.2 + 1 * 1.8) / 2])


def test_every_epoch_shows_each_picture_once_in_batches_of_one_shape():
    encoded = Encoded([torch.zeros(1, *SHAPES[i % 2]) for i in range(7)])
    groups = batches.group_pictures(encoded, [1] * 7)
    made = batches.Batches(groups, 2, seed=3)
    for epoch in range(3):
        shown = [made.at(epoch * made.per_epoch + i) for i in range(made.per_epoch)]
        assert sorted(n for batch in shown for n in batch) == list(range(7))
        for batch in shown:
            assert len({n % 2 for n in batch}) == 1
    assert (
        made.note().startswith("1 of 4 batches an epoch have fewer than 2 pictures")
        and batches.Batches(((0, 1), (2, 3)), 2, 0).note() == ""
    )
    assert [made.at(i) for i in range(4)] != [made.at(i + made.per_epoch) for i in range(4)]


def test_a_full_disk_costs_the_file_but_not_the_lora_in_memory(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    run = RunFolder.new(tmp_path, recipe())
    monkeypatch.setattr("os.fsync", full)
    result = trainer.train(recipe(), PICTURES, LinearHost(), run, Nobody(), {})
    assert result.steps == 40 and len(result.state) == 2 and not run.lora.exists()
    assert "No space left on device" in run.kept()


def test_a_disk_that_is_full_for_a_while_is_said_once_and_tried_again(tmp_path, monkeypatch):
    given = recipe(steps=20, saving=Saving(4, 2, "fp32"))
    run, control, fsync = RunFolder.new(tmp_path, given), Nobody(), os.fsync

    def full_until_step_12(descriptor):
        if control.steps < 12:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr("os.fsync", full_until_step_12)
    trainer.train(given, PICTURES, LinearHost(), run, control, {})
    assert [text for text in control.said if "No space" in text and "each save tries again" in text] and len(
        notes(run, "No space")
    ) <= 2
    assert run.lora.is_file() and [path.stem for path in run.checkpoint_files()] == ["step_000020", "step_000016"]


def test_run_folders_count_up_and_summaries_thin_the_curve(tmp_path):
    names = [RunFolder.new(tmp_path, recipe(name="x")).path.name for _ in range(3)]
    assert names == ["x", "x_2", "x_3"]
    run = RunFolder.new(tmp_path, recipe(name="y"))
    run.event(event="start", total=1000, adapter="none")
    for step in range(1, 1001):
        run.event(step=step, loss=1.0, seconds=0.1)
    with open(run.events, "a") as file:
        file.write('{"step": 10')  # the process died here
    for most in (1, 100, 250, 333, 500, 999):
        steps = runlog.summary(run.path, most)["steps"]
        assert most / 2 <= len(steps) <= most and steps[-1]["step"] == 1000
        assert most == 1 or steps[0]["step"] <= 1000 / most + 1
    facts = runlog.summary(run.path, 1000)
    assert facts["total"] == 1000 and len(facts["steps"]) == 1000 and facts["how"] is None
