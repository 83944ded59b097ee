"""Damaged checkpoints. Kinds for `bench fuzz`."""

import json
import random
from functools import cache

import torch
from safetensors.torch import load, save

from bench.fuzz_damage import damage, value
from bench.fuzz_tensors import TARGETS, bad_tensor, split
from bench.fuzz_watch import Damaged, Place
from zturbo import checkpoint, network
from zturbo.errors import TrainingError, ZTurboError
from zturbo.recipe import Network, Recipe
from zturbo.runfolder import RunFolder
from zturbo.state import State


def fresh(rank: int = 2) -> State:
    """A run at its beginning."""
    lora = network.create(TARGETS, Network(rank, rank), 0)
    return State(lora, torch.optim.AdamW([tensor for one in lora.values() for tensor in one.tensors.values()], lr=1e-3))


@cache
def whole_checkpoint(step: int, rank: int = 2) -> bytes:
    """Of a run after `step` steps."""
    state = fresh(rank)
    for number in range(step):
        for group in state.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.full_like(parameter, 1.0 + number)
        state.optimizer.step()
        state.losses.append(1.0 / (1 + number))
    return b"".join(state.copied().pieces())


def run_with(place: Place, newest: bytes) -> RunFolder:
    """A run folder with a whole checkpoint of step 1 and this one of step 2."""
    run = RunFolder.new(place.runs, Recipe(name="run"))
    (run.checkpoints / "step_000001.safetensors").write_bytes(whole_checkpoint(1))
    (run.checkpoints / "step_000002.safetensors").write_bytes(newest)
    return run


def go_on(run: RunFolder):
    """Go on from the newest whole checkpoint: it must be the older one, or the newer one with all that stands in it."""
    found = run.newest_checkpoint()
    assert found is not None, "the older checkpoint was not found"
    state = fresh()
    take(state, found)
    assert mark(b"".join(state.copied().pieces())) in [
        mark(raw) for raw in (whole_checkpoint(1), whole_checkpoint(2))
    ], "the state is neither of the two"


def mark(raw: bytes) -> str:
    """The checksum over all of a checkpoint."""
    return split(raw)[0]["__metadata__"]["sha256"]


def take(state: State, found: tuple):
    before = mark(b"".join(state.copied().pieces()))
    try:
        state.take(*found)
    except ZTurboError:
        assert mark(b"".join(state.copied().pieces())) == before, "a refused checkpoint left traces"
        raise


def checkpoint_bytes(rng: random.Random, place: Place) -> Damaged:
    """The newest checkpoint, damaged anywhere: the older one counts."""
    what, raw = damage(whole_checkpoint(2), rng)
    run = run_with(place, raw)
    if rng.random() < 0.2:
        (
            run.checkpoints
            / rng.choice(
                ("step_x.safetensors", "step_.safetensors", "step_999999.safetensors", "step_²²²²²².safetensors")
            )
        ).mkdir()
    return Damaged(what, lambda: (go_on(run), run.forget_checkpoints(1)))


def checkpoint_facts(rng: random.Random, place: Place) -> Damaged:
    """A checkpoint of another kind, whole by its checksum."""
    raw = whole_checkpoint(2)
    tensors, facts = load(raw), split(raw)[0]["__metadata__"]
    facts.pop("sha256")
    what = rng.choice(
        ("fact", "fact", "missing", "losses", "optimizer", "optimizer value", "tensor", "rank", "lost tensor")
    )
    if what == "fact":
        key = rng.choice(list(facts))
        facts[key] = rng.choice(
            (
                "",
                "x",
                "-1",
                "nan",
                "inf",
                "1e999",
                "null",
                "[]",
                "{}",
                "3.5",
                "[" * 100_000,
                "1" * 5000,
                '{"dict": 3}',
                '{"list": null, "tuple": 1}',
                '{"tensor": "gone"}',
                '{"tensor": []}',
                '{"value": 3}',
            )
        )
        what += f" {key}={facts[key][:30]}"
    elif what == "missing":
        facts.pop(rng.choice(list(facts)))
    elif what == "losses":
        tensors["losses"] = rng.choice(
            (
                torch.tensor(1.0),
                torch.ones(2, 2),
                torch.tensor([1, 2]),
                torch.tensor([float("nan")] * 2),
                torch.ones(0),
                torch.tensor([True]),
                torch.ones(2, dtype=torch.complex64),
            )
        )
        what += f" {tensors['losses']}"
    elif what == "optimizer":
        facts["optimizer"] = facts["optimizer"].replace(
            *rng.choice(
                (
                    ("exp_avg", "other"),
                    ("param_groups", "groups"),
                    ("state", "stat"),
                    ('"lr"', '"rl"'),
                    ("tensor", "tensr"),
                    ("[[0,", "[[99,"),
                )
            ),
            1,
        )
    elif what == "optimizer value":
        facts["optimizer"] = json.dumps(value(rng, 3))
    elif what == "tensor":
        key = rng.choice(list(tensors))
        more, tensors[key] = bad_tensor(rng, tensors[key])
        what += f" {key} {more}"
    elif what == "rank":
        tensors, facts = load(whole_checkpoint(1, 4)), split(whole_checkpoint(1, 4))[0]["__metadata__"]
        facts.pop("sha256")
    elif what == "lost tensor":
        tensors.pop(rng.choice(list(tensors)))
    newest = save(tensors, {**facts, "sha256": checkpoint._sha256(tensors, facts)})
    run = run_with(place, newest)

    def feed():
        go_on_or_refuse(run, tensors)

    return Damaged(what, feed)


def go_on_or_refuse(run: RunFolder, tensors: dict[str, torch.Tensor]):
    """Refused without a trace, or taken, and then another step can be taken from there.

    The shapes of an optimizer's own tensors are its own matter: where it refuses them in its step, the run ends with a
    sentence around that.
    """
    state = fresh()
    take(state, run.newest_checkpoint())
    assert "losses" in tensors and state.losses == tensors["losses"].tolist() or state.losses == [1.0], (
        "the losses are others"
    )
    assert state.step in (1, 2) and all(isinstance(loss, float) for loss in state.losses), (
        f"the losses are {state.losses}"
    )
    assert state.seconds >= 0 and state.rollbacks >= 0
    b"".join(state.copied().pieces())
    for group in state.optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    try:
        state.optimizer.step()
    except Exception as error:  # as the host does around a run
        raise TrainingError(f"Training ended with {type(error).__name__}: {error}. What was learnt is kept.") from error


KINDS = [checkpoint_bytes, checkpoint_facts]
