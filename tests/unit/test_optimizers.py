"""Optimizers by name, the learning rate's course, accumulation, the moving average."""

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent))
from test_resume import PowerCut, final, logged, same, train
from test_trainer import Nobody, go, recipe

from zturbo import checkpoint, lorafile, optimizers
from zturbo.errors import TrainingError
from zturbo.recipe import OPTIMIZERS, Loss, Optimizer, Saving, Timesteps
from zturbo.runfolder import RunFolder
from zturbo.state import State

RATES = {"prodigy": 1.0, "lion": 3e-3}


def options(name, **changes):
    return Optimizer(name, RATES.get(name, 1e-2), **changes)


def there(name):
    try:
        optimizers.build(options(name), [torch.nn.Parameter(torch.zeros(2, 3))])
        return True
    except TrainingError as error:
        assert "needs the package" in str(error)
        return False


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_learns_and_resumes_to_the_bit(name, tmp_path):
    if not there(name):
        pytest.skip(f"{name} needs a package of its own")
    given = recipe(steps=120, optimizer=options(name, schedule="cosine", warmup=5), saving=Saving(50, 2, "fp32"))
    whole = RunFolder.new(tmp_path / "whole", given)
    result = train(whole, given)
    assert sum(result.losses[-20:]) < sum(result.losses[:20])
    run = RunFolder.new(tmp_path / "cut", given)
    for at in (31, 77):
        with pytest.raises(KeyboardInterrupt):
            train(RunFolder(run.path), given, Nobody(cancel_after=at))
    train(RunFolder(run.path), given)
    assert same(final(run), final(whole)) and logged(run) == logged(whole)
    assert run.lora.read_bytes() == whole.lora.read_bytes()


def test_tables_that_optimizer_states_share_are_saved_for_each(tmp_path):
    """8-bit Adam keeps one table for all of its large tensors.

    A file of tensors that share memory is refused by safetensors.
    """
    if not there("adamw8bit"):
        pytest.skip("adamw8bit needs bitsandbytes")
    weights, again = ([torch.nn.Parameter(torch.ones(64, 96)) for _ in range(2)] for _ in range(2))
    states = [State({}, optimizers.build(options("adamw8bit"), some)) for some in (weights, again)]

    def step(state, some):
        for one in some:
            one.grad = torch.linspace(-1, 1, one.numel()).view_as(one)
        state.optimizer.step()

    step(states[0], weights)
    checkpoint.write(tmp_path / "step_000001.safetensors", states[0].copied())
    states[1].take(*checkpoint.read(tmp_path / "step_000001.safetensors"))
    for one, other in zip(again, weights):
        one.data.copy_(other.data)
    for state, some in zip(states, (weights, again)):
        step(state, some)
    assert all(torch.equal(one, other) for one, other in zip(weights, again)) and not torch.equal(
        weights[0], torch.ones(64, 96)
    )


def test_a_missing_library_gets_the_command_that_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(TrainingError, match="pip install pytorch-optimizer"):
        optimizers.build(options("lion"), [])


def test_schedule_free_previews_change_nothing(tmp_path):
    if not there("schedule_free"):
        pytest.skip("schedule_free needs pytorch-optimizer")
    plain = go(tmp_path, recipe(optimizer=options("schedule_free")))[0]
    often = go(tmp_path, recipe(optimizer=options("schedule_free"), saving=Saving(1, 1, "fp32")))[0]
    assert plain.losses == often.losses and all(torch.equal(plain.state[key], often.state[key]) for key in plain.state)


@pytest.mark.parametrize(
    "given, at, expected",
    [
        (Optimizer(learning_rate=2.0), 50, 2.0),
        (Optimizer(learning_rate=2.0, warmup=10), 0, 0.2),
        (Optimizer(learning_rate=2.0, warmup=10), 9, 2.0),
        (Optimizer(learning_rate=2.0, schedule="linear"), 25, 1.5),
        (Optimizer(learning_rate=2.0, schedule="cosine"), 50, 1.0),
        (Optimizer(learning_rate=2.0, schedule="cosine"), 25, 1 + math.cos(math.pi / 4)),
        (Optimizer(learning_rate=2.0, schedule="cosine", warmup=20), 60, 1.0),
        (Optimizer(learning_rate=2.0, schedule="cosine_restarts", restarts=4), 25, 2.0),
        (Optimizer(learning_rate=2.0, schedule="cosine_restarts", restarts=2), 75, 1.0),
        (Optimizer(learning_rate=2.0, decay=20), 79, 2.0),
        (Optimizer(learning_rate=2.0, decay=20), 90, 1.0),
        (Optimizer(learning_rate=2.0, decay=20), 99, 0.1),
    ],
)
def test_the_learning_rates_course_over_100_steps(given, at, expected):
    assert optimizers.learning_rate(given, at, 100) == pytest.approx(expected)


def test_weight_decay_and_clipping_are_those_of_the_recipe(tmp_path):
    """AdamW's second step from zero gradients' start.

    With decay d at rate r every weight is (1 - r d) times what it is without; a tiny clip leaves Adam's steps, and the
    logged norm, alone.
    """
    plain, decayed = (
        go(tmp_path, recipe(steps=1, optimizer=Optimizer(learning_rate=1e-2, weight_decay=decay)))[0].state
        for decay in (0.0, 0.5)
    )
    first = lorafile.parse(plain)[0]["layers.0.feed_forward.w1"].A
    start = go(tmp_path, recipe(steps=1, optimizer=Optimizer(learning_rate=1e-30)))[0].state
    start = lorafile.parse(start)[0]["layers.0.feed_forward.w1"].A
    moved = lorafile.parse(decayed)[0]["layers.0.feed_forward.w1"].A
    assert torch.allclose(moved, first - 1e-2 * 0.5 * start, atol=1e-7) and not torch.allclose(moved, first, atol=1e-4)
    clipped, free = (
        go(tmp_path, recipe(steps=30, optimizer=Optimizer(learning_rate=1e-2, max_grad_norm=norm)))[0]
        for norm in (1e-9, 0.0)
    )
    # gradients near Adam's epsilon hardly move it
    assert clipped.losses[0] == free.losses[0] and clipped.losses[-1] > free.losses[-1]


def test_two_batches_of_two_are_one_of_four(tmp_path):
    """Same pictures, mean of means: the first step's loss and gradient agree up to what noise each place draws."""
    single = recipe(steps=1, batch_size=1, optimizer=Optimizer(learning_rate=1e-2))
    both = recipe(steps=1, batch_size=1, optimizer=Optimizer(learning_rate=1e-2, accumulation=3))
    accumulated, _, host, _ = go(tmp_path, both)
    assert len(host.seen) == 3
    # three steps that hardly move
    longer = go(tmp_path, recipe(steps=3, batch_size=1, optimizer=Optimizer(learning_rate=1e-12)))[0]
    assert accumulated.losses[0] == pytest.approx(sum(longer.losses) / 3, rel=1e-5)
    assert go(tmp_path, single)[0].losses[0] == pytest.approx(longer.losses[0], rel=1e-6)


def test_the_moving_average_is_what_is_saved(tmp_path):
    """mean <- e * mean + (1 - e) * LoRA with e = min(ema, (1 + n) / (10 + n)) at step n.

    The LoRAs are those that checkpoints hold.
    """
    given = recipe(steps=5, optimizer=Optimizer(learning_rate=1e-2, ema=0.3), saving=Saving(1, 9, "fp32"))
    result, run, _, _ = go(tmp_path, given)
    raw = go(tmp_path, recipe(steps=5, optimizer=Optimizer(learning_rate=1e-2), saving=Saving(1, 9, "fp32")))[1]
    from zturbo import checkpoint

    name = "layers.0.feed_forward.w1"
    mean = torch.zeros(16, 16)
    for n, file in enumerate(sorted(raw.checkpoint_files())):
        keep = min(0.3, (1 + n) / (10 + n))
        mean = keep * mean + (1 - keep) * checkpoint.read(file)[0][f"lora.{name}.lora_B.weight"]
    assert torch.allclose(lorafile.parse(result.state)[0][name].B, mean, atol=1e-7)
    assert result.losses == go(tmp_path, recipe(steps=5, optimizer=Optimizer(learning_rate=1e-2)))[0].losses


def test_the_moving_average_survives_a_power_cut(tmp_path):
    given = recipe(steps=9, optimizer=Optimizer(learning_rate=1e-2, ema=0.9), saving=Saving(4, 2, "fp32"))
    whole = RunFolder.new(tmp_path / "whole", given)
    train(whole, given)

    class Cut(Nobody):
        def check(self):
            if self.steps == 6:
                raise PowerCut

    run = RunFolder.new(tmp_path / "cut", given)
    with pytest.raises(PowerCut):
        train(run, given, Cut())
    train(RunFolder(run.path), given)
    assert same(final(run), final(whole))


def test_sigma_stays_in_its_range_and_huber_and_guidance_change_the_loss(tmp_path):
    plain = go(tmp_path, recipe(steps=20))[1]
    narrow = go(tmp_path, recipe(steps=20, timesteps=Timesteps("sigmoid", min_sigma=0.4, max_sigma=0.5)))[1]
    assert all(0.4 <= event["sigma"] <= 0.5 for event in logged(narrow)) and not all(
        0.4 <= event["sigma"] <= 0.5 for event in logged(plain)
    )
    first = [
        logged(go(tmp_path, recipe(steps=1, loss=loss))[1])[0]["loss"]
        for loss in (Loss(), Loss("huber", 0.1), Loss("huber", 1e3), Loss(guidance=3.0))
    ]
    assert (
        first[1] < first[0]
        and first[2] == pytest.approx(first[0])
        and first[3] == pytest.approx(9 * first[0], rel=1e-5)
    )
