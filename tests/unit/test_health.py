"""The gauge and the guard: on a model that is one linear map, where both can be checked by hand."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.append(str(Path(__file__).parent))
from test_trainer import PICTURES, LinearHost, Nobody, go, notes, recipe, until

from zturbo import flow, health, phases, runfolder, runlog, trainer, turbo
from zturbo.errors import ZTurboError
from zturbo.family import Z_IMAGE
from zturbo.recipe import Recipe, Turbo
from zturbo.runfolder import RunFolder
from zturbo.step import EXPLOSION

SMALL = Turbo(size=64, every=5)


def linear(weight):
    return lambda x, sigma, numbers: torch.einsum("oc,bchw->bohw", weight, x)


def walked(weight, **options):
    return health.walk(Z_IMAGE, linear(weight), (3, 4, 5), (2, 4), 7, torch.device("cpu"), **options)


def test_a_path_is_eulers_from_noise_that_belongs_to_prompt_and_seed():
    weight = torch.randn(16, 16, generator=torch.Generator().manual_seed(1)) / 8
    paths = walked(weight)
    assert paths.states.shape == paths.velocities.shape == (3, 8, 16, 2, 4) and paths.numbers == (3, 4, 5)
    assert torch.equal(paths.sigmas, Z_IMAGE.sigmas()[:8].expand(3, 8))
    x = torch.randn(16, 2, 4, generator=flow.generator(7, "health", 4))
    for place, (high, low) in enumerate(zip(Z_IMAGE.sigmas(), Z_IMAGE.sigmas()[1:])):
        torch.testing.assert_close(paths.states[1, place], x)
        v = torch.einsum("oc,chw->ohw", weight, x)
        torch.testing.assert_close(paths.velocities[1, place], v)
        x = x + v * (low - high)
    short = walked(weight, steps=3)
    assert torch.equal(short.states, paths.states[:, :3]) and short.sigmas.shape == (3, 3)
    one = short.one_each()
    assert one.sigmas[:, 0].tolist() == paths.sigmas[0, :3].tolist() and all(
        torch.equal(one.states[n, 0], paths.states[n, n]) and torch.equal(one.velocities[n, 0], paths.velocities[n, n])
        for n in range(3)
    )


def test_deviation_is_relative_and_nothing_where_nothing_is_changed():
    weight = torch.eye(16)
    paths = walked(weight)
    assert health.deviations(paths, linear(weight), torch.device("cpu")).max() == 0
    torch.testing.assert_close(
        health.deviations(paths, linear(1.25 * weight), torch.device("cpu")), torch.full((3, 8), 0.25)
    )
    assert health.high(torch.arange(40.0).view(5, 8)) == pytest.approx((0 + 9 + 18 + 24 + 33) / 5)


def test_the_gauge_runs_from_nothing_to_one():
    readings = [health.gauge(deviation) for deviation in (0, 0.01, 0.1, health.DRIFT, 1, 100)]
    assert (
        readings[0] == 0
        and readings == sorted(readings)
        and readings[3] == pytest.approx(1 - 1 / math.e)
        and readings[-1] <= 1
    )


def test_guarded_states_cover_the_noise_levels_and_belong_to_their_counters():
    paths = walked(torch.eye(16))
    states, sigmas, clean, numbers = health.anchors(paths, 0, 12)
    places = [paths.sigmas[0].tolist().index(sigma) for sigma in sigmas.tolist()]
    assert sorted(place % 2 for place in places) in ([0] * 4, [1] * 4) and len(set(places)) == 4
    for state, v, place, number in zip(states, clean, places, numbers):
        row = paths.numbers.index(number)
        assert torch.equal(state, paths.states[row, place]) and torch.equal(v, paths.velocities[row, place])
    assert torch.equal(health.anchors(paths, 0, 12)[0], states) and not torch.equal(
        health.anchors(paths, 0, 13)[0], states
    )


def readings(run):
    return [event for event in runlog.read_events(run.events) if event.get("event") == "health"]


def test_readings_are_logged_and_shown_and_change_nothing_that_is_learnt(tmp_path):
    result, run, _, control = go(tmp_path, recipe(steps=12, turbo=SMALL))
    plain, _, _, _ = go(tmp_path, recipe(steps=12, turbo=replace(SMALL, every=0)))
    found = readings(run)
    assert [event["step"] for event in found] == [5, 10, 12] and 0 < found[0]["gauge"] < found[1]["gauge"] < 1
    assert [event for event in control.looks if event["event"] == "health"] == found
    assert result.losses == plain.losses and all(
        torch.equal(result.state[key], plain.state[key]) for key in plain.state
    )
    assert runlog.summary(run.path, 100)["looks"] == [
        {key: event[key] for key in ("event", "step", "gauge")} for event in found
    ]


def test_the_guard_holds_turbo_where_nothing_is_trained(tmp_path):
    pace = recipe(steps=60).optimizer
    free, free_run, _, _ = go(tmp_path, recipe(steps=60, optimizer=replace(pace, learning_rate=0.01), turbo=SMALL))
    held, held_run, _, _ = go(
        tmp_path,
        recipe(steps=60, optimizer=replace(pace, learning_rate=0.01), turbo=replace(SMALL, keep="guard", weight=10.0)),
    )
    assert readings(held_run)[-1]["deviation"] < 0.5 * readings(free_run)[-1]["deviation"]
    guarded = ["guard" in event for event in runlog.read_events(held_run.events) if "loss" in event]
    assert guarded == [True, False] * 30 and not any("guard" in event for event in runlog.read_events(free_run.events))


def test_a_guarded_steps_loss_is_its_mean_square_difference(tmp_path):
    """One guarded step's mean square difference, by hand."""
    given = recipe(steps=2, turbo=replace(SMALL, keep="guard", interval=1))
    _, run, host, _ = go(tmp_path, given)
    second = [event for event in runlog.read_events(run.events) if "loss" in event][1]
    one, _, again, _ = go(tmp_path, replace(given, steps=1, saving=replace(given.saving, dtype="fp32")))
    weight = host.linear.weight.detach()
    A, B = (one.state[f"diffusion_model.layers.0.feed_forward.w1.lora_{side}.weight"] for side in "AB")
    paths = health.walk(Z_IMAGE, linear(weight), tuple(range(8, 32)), (8, 8), given.seed, host.device)
    states, _, clean, _ = health.anchors(paths, given.seed, 1)
    scale = given.network.alpha / given.network.rank
    assert second["guard"] == pytest.approx(
        (linear(weight + scale * B @ A)(states, None, None) - clean).square().mean().item(), rel=1e-4
    )


def test_a_guarded_run_goes_on_to_the_same_bits(tmp_path):
    given = recipe(steps=9, turbo=replace(SMALL, keep="guard"))
    whole, _, _, _ = go(tmp_path, given)
    run = RunFolder.new(tmp_path, given)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(given, PICTURES, LinearHost(), run, Nobody(cancel_after=4), {})
    result = trainer.train(given, PICTURES, LinearHost(), RunFolder(run.path), Nobody(), {})
    assert result.losses == whole.losses and all(
        torch.equal(result.state[key], whole.state[key]) for key in whole.state
    )


def restoring(last=20):
    return recipe(
        steps=40 + last,
        optimizer=replace(recipe().optimizer, learning_rate=0.01),
        turbo=replace(SMALL, keep="restore", restore_steps=last, restore_prompts=("x",)),
    )


def test_the_last_steps_restore_turbo_where_nothing_names_the_concept(tmp_path):
    """Prompts that name it follow the LoRA as it was learnt, unrelated ones clean turbo.

    Here one linear map is both, and goes where their shares pull it to.
    """
    given = restoring(200)
    taught, _, _, _ = go(tmp_path, replace(given, steps=40, turbo=SMALL))
    result, run, _, _ = go(tmp_path, given)
    kept = load_file(run.learnt)
    assert result.losses[:40] == taught.losses and all(
        torch.equal(kept[key], taught.state[key]) for key in taught.state
    )
    found = {event["step"]: event["deviation"] for event in readings(run)}
    assert (phases.NAMED - 0.1) * found[40] < found[240] < (phases.NAMED + 0.1) * found[40]
    assert len(notes(run, "The pictures are learnt")) == 1
    rates = [event["lr"] for event in runlog.read_events(run.events) if "loss" in event]
    assert (
        rates[39] == rates[40] == pytest.approx(0.01)
        and rates[140] == pytest.approx(0.005)
        and rates[239] == pytest.approx(0.01 / 200)
    )


def test_a_restoring_steps_loss_is_its_mean_square_difference(tmp_path):
    given = restoring()
    _, run, host, _ = go(tmp_path, given)
    first = [event for event in runlog.read_events(run.events) if "loss" in event][40]
    kept = load_file(run.learnt)
    A, B = (kept[f"diffusion_model.layers.0.feed_forward.w1.lora_{side}.weight"] for side in "AB")
    weight = host.linear.weight.detach()
    changed = weight + given.network.alpha / given.network.rank * B @ A
    captions = len(PICTURES.captions().texts)
    numbers = tuple(range(captions + 8, captions + 32))
    clean = health.walk(Z_IMAGE, linear(weight), numbers, (8, 8), given.seed, host.device)
    states, _, own, _ = health.anchors(clean, given.seed, 40, "clean")
    apart = (linear(changed)(states, None, None) - own).square().mean().item()  # where it is named there is none yet
    assert first["loss"] == pytest.approx((1 - phases.NAMED) * apart, rel=1e-4)


@pytest.mark.parametrize("at", [30, 40, 47])
def test_a_restoring_run_that_was_cut_off_goes_on_to_the_same_bits(tmp_path, at):
    given = restoring()
    whole, _, _, _ = go(tmp_path, given)
    run = RunFolder.new(tmp_path, given)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(given, PICTURES, LinearHost(), run, Nobody(cancel_after=at), {})
    again = RunFolder.new(tmp_path, given)
    again.adopt(run.checkpoint_files()[0])
    for folder in (run, again):  # taken up, and begun anew from its checkpoint
        result = trainer.train(given, PICTURES, LinearHost(), RunFolder(folder.path), Nobody(), {})
        assert result.losses == whole.losses and all(
            torch.equal(result.state[key], whole.state[key]) for key in whole.state
        )


def continued(tmp_path, run, given):
    """A new run that goes on where another one ended. Returns (result, run folder)."""
    again = RunFolder.new(tmp_path, given)
    again.adopt(run.checkpoint_files()[0])
    return trainer.train(given, PICTURES, LinearHost(), again, Nobody(), {}), again


def test_a_run_that_was_not_restored_is_restored_by_going_on_from_it(tmp_path):
    free, run, _, _ = go(tmp_path, replace(restoring(), steps=40, turbo=SMALL))
    result, again = continued(tmp_path, run, replace(restoring(30), steps=60))  # pictures should have ended at 30
    kept = load_file(again.learnt)
    assert result.steps == 60 and all(torch.equal(kept[key], tensor) for key, tensor in free.state.items())
    assert len(notes(again, "the last 30 of 60 steps restore turbo, and 40 are done")) == 1
    assert readings(again)[-1]["deviation"] < readings(run)[-1]["deviation"]


def test_more_steps_for_a_restored_run_restore_further_what_was_taught(tmp_path):
    _, run, _, _ = go(tmp_path, restoring())
    result, again = continued(tmp_path, run, replace(restoring(), steps=80))
    assert result.steps == 80 and again.learnt.read_bytes() == run.learnt.read_bytes()
    assert len(notes(again, "No pictures are trained in what is left")) == 1


def test_pictures_behind_restoring_are_no_explosion(tmp_path):
    """Restoring makes something else small: losses are compared with their own kind only."""
    _, run, _, _ = go(tmp_path, restoring(110))
    result, again = continued(tmp_path, run, replace(restoring(20), steps=400))
    restored, pictures = result.losses[100:150], result.losses[200:250]
    assert sum(pictures) > EXPLOSION * sum(restored), "this test needs losses that far apart"
    assert result.steps == 400 and not notes(again, "Going back") and not notes(again, "No pictures")


def test_a_model_that_is_no_turbo_cannot_be_restored(tmp_path):
    host = LinearHost()
    host.turbo = False
    with pytest.raises(ZTurboError, match="preview_model"):
        trainer.train(restoring(), PICTURES, host, RunFolder.new(tmp_path, restoring()), Nobody(), {})


def test_stop_above_ends_the_run_with_the_last_healthy_lora(tmp_path):
    free, free_run, _, _ = go(tmp_path, recipe(steps=40, turbo=SMALL))
    limit = readings(free_run)[3]["gauge"]  # of step 20
    given = recipe(steps=40, turbo=replace(SMALL, stop_above=limit))
    result, run, _, control = go(tmp_path, given)
    assert result.steps == 20 and runfolder.steps_of(run.lora) == runfolder.steps_of(run.healthy) == 20
    assert len(notes(run, "training ends with the LoRA of step 20")) == 1 and any(
        "above" in text for text in control.said
    )
    short, _, _, _ = go(tmp_path, replace(given, steps=20, turbo=SMALL))
    assert all(torch.equal(load_file(run.lora)[key], tensor) for key, tensor in short.state.items())
    again = trainer.train(given, PICTURES, LinearHost(), RunFolder(run.path), Stopped(run), {})
    assert again.steps == 20  # a stopped run hands on what it has


class Stopped(Nobody):
    def __init__(self, run):
        super().__init__()
        self.run = run

    @property
    def stop_requested(self):
        return self.run.stop.exists()


def test_stop_above_in_the_first_reading_keeps_what_there_is(tmp_path):
    result, run, _, _ = go(tmp_path, recipe(steps=40, turbo=replace(SMALL, stop_above=1e-6)))
    assert (
        result.steps == 5
        and not run.healthy.exists()
        and len(notes(run, "no earlier checkpoint within the limit")) == 1
    )


def test_going_back_from_an_explosion_forgets_a_healthy_lora_that_is_undone(tmp_path):
    slow = replace(recipe().optimizer, learning_rate=1e-5)  # always healthy
    given = recipe(steps=40, optimizer=slow, turbo=replace(SMALL, every=1), saving=replace(recipe().saving, every=20))
    host, run, seen = LinearHost(), RunFolder.new(tmp_path, given), []
    host.fail_at = (31,)  # the loss of step 31 is no number

    class Watching(Nobody):
        def step(self, event):
            super().step(event)
            # it is written while training goes on
            until(lambda: runfolder.steps_of(run.healthy) == event["step"] - 1, 0.5)
            seen.append((event["step"], runfolder.steps_of(run.healthy)))

    trainer.train(given, PICTURES, host, run, Watching(), {})
    assert (30, 29) in seen and seen[30] == (21, 0) and seen[31] == (22, 21)  # a reading follows its step


def test_a_worn_run_says_which_lora_was_healthy(tmp_path):
    pace = recipe().optimizer
    given = recipe(steps=100, optimizer=replace(pace, learning_rate=0.003), turbo=SMALL)
    _, run, _, _ = go(tmp_path, given)
    healthy = [event["step"] for event in readings(run) if event["gauge"] <= health.HEALTHY]
    assert 0 < healthy[-1] < 100 and runfolder.steps_of(run.healthy) == healthy[-1]
    assert f"The LoRA of step {healthy[-1]}" in notes(run, "Turbo is worn")[0]["text"]


def test_a_run_that_was_never_healthy_says_that_turbo_is_worn(tmp_path):
    given = recipe(steps=12, optimizer=replace(recipe().optimizer, learning_rate=0.5), turbo=SMALL)
    _, run, _, _ = go(tmp_path, given)
    assert (
        all(event["gauge"] > health.HEALTHY for event in readings(run))
        and len(notes(run, "Turbo is worn")) == 1
        and not run.healthy.exists()
    )


def test_a_run_that_ends_before_it_is_restored_says_so(tmp_path):
    _, run, _, _ = go(tmp_path, restoring(), control=Nobody(stop_after=20))
    assert len(notes(run, "ended at step 20 of 60, before turbo was restored")) == 1


@pytest.mark.parametrize("keep, at", [("guard", 0), ("restore", 40)])
def test_cancel_is_noticed_while_paths_are_walked(tmp_path, keep, at):
    given = replace(restoring(), turbo=replace(restoring().turbo, keep=keep))
    host, run = LinearHost(), RunFolder.new(tmp_path, given)

    class Cancelling(Nobody):
        def check(self):
            self.asked = getattr(self, "asked", 0) + (self.steps == at)
            if self.asked > 20:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer.train(given, PICTURES, host, run, Cancelling(), {})
    assert len([event for event in runlog.read_events(run.events) if "loss" in event]) == at


def test_what_is_probably_not_meant_with_restore_is_said(tmp_path):
    named = replace(restoring().turbo, prompts=("a",) * 9 + ("a zap",), restore_prompts=("zap", "a dog"))
    said = turbo.doubts(replace(restoring(), turbo=named), "zap")
    assert (
        len(said) == 2
        and "1 of the unrelated prompts" in said[0]
        and "a zap" in said[0]
        and "1 of restore_prompts" in said[1]
        and "a dog" in said[1]
    )
    assert turbo.doubts(recipe(), "") == turbo.doubts(restoring(), "x") == []
    _, run, _, _ = go(tmp_path, replace(restoring(), turbo=replace(restoring().turbo, restore_prompts=())))
    assert len(notes(run, "there is no trigger word")) == 1


@pytest.mark.parametrize("content", ["gone", "empty", "cut off", "of another run"])
def test_a_lost_or_damaged_learnt_lora_says_where_to_go_on(tmp_path, content):
    run = RunFolder.new(tmp_path, restoring())
    with pytest.raises(KeyboardInterrupt):
        trainer.train(restoring(), PICTURES, LinearHost(), run, Nobody(cancel_after=47), {})
    other = {key.replace("w1", "w2"): tensor for key, tensor in load_file(run.learnt).items()}
    whole = run.learnt.read_bytes()
    run.learnt.unlink()
    if content == "empty":
        save_file({}, run.learnt)
    elif content == "cut off":
        run.learnt.write_bytes(whole[:-8])
    elif content == "of another run":
        save_file(other, run.learnt)
    with pytest.raises(ZTurboError, match="Set resume to a checkpoint from before"):
        trainer.train(restoring(), PICTURES, LinearHost(), RunFolder(run.path), Nobody(), {})


def test_where_another_model_trains_there_is_no_gauge_and_no_stop_rule(tmp_path):
    host = LinearHost()
    host.turbo = False
    _, run, _, _ = go(tmp_path, recipe(steps=12, turbo=SMALL), host)
    assert readings(run) == []
    with pytest.raises(ZTurboError, match="stop_above is 0.5, but the model that trains is not turbo"):
        go(tmp_path, recipe(steps=12, turbo=replace(SMALL, stop_above=0.5)), host)


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        (dict(keep="both"), "off, guard, restore"),
        (dict(keep="restore", restore_steps=2000), "nothing is left"),
        (dict(keep="restore", restore_steps=0), "restore_steps"),
        (dict(keep="restore", stop_above=0.5), "stop_above"),
        (dict(keep="restore", prompts=("a",) * 8), "more than 8"),
        (dict(size=2048), "64 to 1024"),
        (dict(weight=0.0), "guard_weight"),
        (dict(interval=0), "guard_interval"),
        (dict(every=-1), "gauge_every"),
        (dict(stop_above=1.5), "stop_above"),
        (dict(size=100), "multiple of 16"),
        (dict(stop_above=0.5, every=0), "gauge_every above 0"),
        (dict(keep="guard", prompts=("a",) * 8), "more than 8"),
    ],
)
def test_what_cannot_be_gets_a_sentence(wrong, word):
    with pytest.raises(ZTurboError, match=word):
        Recipe(turbo=Turbo(**wrong))
