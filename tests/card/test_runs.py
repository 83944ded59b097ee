"""Whole runs on a card: several in one session, cancelled and taken up, with others' work between.

The laws hold as on a CPU.
"""

import shutil
from dataclasses import replace

import comfy.model_management
import comfy.sample
import comfy.sd
import pytest
import torch
from cards import load_tiny, opened
from safetensors.torch import load_file
from test_clean_weights import STAGES, Boom
from test_host import de_distilled, fingerprint

from zturbo import dataset, lorafile
from zturbo.hosts import (
    comfy_blocks,
    comfy_cache,
    comfy_check,
    comfy_draw,
    comfy_health,
    comfy_paths,
    comfy_run,
    comfy_tiny,
    comfy_weights,
)
from zturbo.recipe import Compute, Network, Previews, Recipe, Saving, Turbo
from zturbo.runs import Runs
from zturbo.stack import Stack

PROMPT = "a large zsmile on a blue background"


def recipe(way="branch", **changes):
    previews = Previews((PROMPT,), 2, 64, 64, seed=1)
    given = Recipe(
        steps=4,
        batch_size=2,
        network=Network(4, 4),
        compute=Compute("fp32", True, way),
        previews=previews,
        saving=Saving(2),
        turbo=Turbo(every=0),
    )
    return replace(given, **changes)


@pytest.fixture(scope="session")
def encoded(tmp_path_factory):
    """Pictures and captions are encoded once; what this costs on a card is in the first run."""
    return tmp_path_factory.mktemp("encoded")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Four of the bundled ones."""
    folder = tmp_path_factory.mktemp("pictures")
    for path in sorted(comfy_tiny.PICTURES.iterdir())[:8]:
        shutil.copy(path, folder)
    return dataset.from_folder(folder, (128,), "zsmile")


@pytest.fixture
def train(tmp_path, monkeypatch, encoded, pictures):
    """train(tiny, recipe, resume) into tmp_path, without a frontend to send events to."""
    monkeypatch.setattr(comfy_paths, "runs", lambda: Runs(tmp_path))
    monkeypatch.setattr(Runs, "cache", encoded)
    monkeypatch.setattr(comfy_run, "_send", lambda event, data: None)

    def run(tiny, given, resume="new"):
        with torch.inference_mode():  # as core calls nodes
            return comfy_run.train(given, pictures, comfy_run.Models(de_distilled(tiny[0]), *tiny[1:]), "1", resume)

    return run


def drawn(tiny, lora) -> torch.Tensor:
    with torch.inference_mode():
        model, clip, vae = tiny
        patched = comfy_draw.with_lora(model, lora)
        how = comfy_draw.Drawing(64, 64, 8, 1, "euler")
        return next(iter(comfy_draw.draw(patched, vae, [comfy_draw.encode_prompt(clip, PROMPT)], how)))


def same_lora(one, other) -> bool:
    ones, others = load_file(one.path), load_file(other.path)
    if one.path == other.path or ones.keys() != others.keys():
        return False
    return all(torch.equal(a, b) for a, b in zip(ones.values(), others.values(), strict=True))


@pytest.mark.parametrize("way, fit", [("branch", 1 / 3), ("merged", 1.0), ("merged", 1 / 3)])
def test_three_runs_in_one_session_with_other_work_between(train, card, tiny, way, fit):
    """The same LoRA three times; the same picture and the same weights before and after.

    The weights can be looked at at any time.
    """
    card.fit(fit, eager=True)
    before, look, picture = fingerprint(tiny[0]), comfy_cache.fingerprint(tiny[0], ()), drawn(tiny, {})
    runs = []
    for _ in range(3):
        runs.append(train(tiny, recipe(way)))
        assert comfy_cache.fingerprint(tiny[0], ()) == look
        assert torch.equal(drawn(tiny, {}), picture)
        assert fingerprint(tiny[0]) == before
    assert same_lora(runs[0], runs[1]) and same_lora(runs[0], runs[2])
    assert not torch.equal(drawn(tiny, load_file(runs[0].path)), picture)


@pytest.fixture
def whole(train):
    """A run where everything fits, before the card of the test is there."""
    with opened("plain"):
        return train(load_tiny(), recipe())


def test_a_run_is_to_the_bit_that_of_a_card_where_everything_fits(whole, train, card, tiny):
    card.fit(0.0, eager=True)
    assert same_lora(train(tiny, recipe()), whole)


@pytest.mark.parametrize("way", ["branch", "merged"])
def test_cancelled_and_taken_up_to_the_same_bits(train, card, tiny, way, monkeypatch):
    before, whole = fingerprint(tiny[0]), train(tiny, recipe(way, name="whole"))
    calls, backward = [], torch.Tensor.backward

    def cancel(*given, **options):
        calls.append(1)
        if len(calls) == 3:
            raise comfy.model_management.InterruptProcessingException
        backward(*given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", cancel)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            train(tiny, recipe(way, name="cut"), "auto")
    assert fingerprint(tiny[0]) == before
    assert same_lora(train(tiny, recipe(way, name="cut"), "auto"), whole)


def test_the_last_preview_is_what_core_draws_from_the_file(train, card, tiny):
    trained = train(tiny, recipe(saving=Saving(2, dtype="fp32")))
    assert torch.equal(comfy_run._images([comfy_draw.to_bytes(drawn(tiny, load_file(trained.path)))]), trained.images)


@pytest.mark.parametrize("keep", ["guard", "restore"])
def test_guard_and_restore(train, card, tiny, keep):
    before = fingerprint(tiny[0])
    given = recipe(turbo=Turbo(keep=keep, every=2, restore_steps=2, size=64, prompts=Turbo().prompts[:10]))
    runs = [train(tiny, given) for _ in range(2)]
    assert same_lora(*runs) and fingerprint(tiny[0]) == before


@pytest.mark.parametrize(
    "place, name", STAGES, ids=[f"{place.__name__.split('.')[-1]}.{name}" for place, name in STAGES]
)
def test_after_an_error_in_any_stage_the_next_run_is_right(train, card, tiny, place, name, monkeypatch):
    before = fingerprint(tiny[0])

    def explode(*given, **options):
        raise Boom(name)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, explode)
        patch.setattr(Runs, "cache", None)  # nothing is found there: everything is encoded
        with pytest.raises(Boom):
            train(tiny, recipe("merged"))
    assert fingerprint(tiny[0]) == before and comfy.model_management.in_training is False
    assert not any("forward" in module.__dict__ for module in tiny[0].model.diffusion_model.modules())
    assert train(tiny, recipe("merged")).steps == 4


@pytest.mark.parametrize(
    "place, name",
    [
        (torch.Tensor, "backward"),
        (torch.optim.AdamW, "step"),
        (comfy_blocks.Fast, "velocity"),
        (comfy_blocks.Fast, "embedded"),
        (Stack, "forward"),
        (Stack, "learn"),
        (Stack, "through"),
    ],
)
def test_weights_that_are_taken_away_at_the_worst_moment(train, card, tiny, place, name, monkeypatch):
    """In front of the backward, the optimizer's step, the forward, each layer: the same LoRA."""
    whole, original = train(tiny, recipe()), getattr(place, name)

    def evict(*given, **options):
        card.evict()
        return original(*given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, evict)
        assert same_lora(train(tiny, recipe()), whole)


def test_every_other_look_at_a_model_works_behind_a_run(train, card, tiny):
    """Turbo Health, Check Adapter, Extract Adapter, on the MODEL that was trained on."""
    before = fingerprint(tiny[0])
    lora = train(tiny, recipe()).path
    with torch.inference_mode():
        report = comfy_health.report(*tiny, lora, (PROMPT,), 64, 0)
        trial = comfy_check.Trial((PROMPT,), 64, 0, 4, 2.0)
        checked = comfy_check.check(*tiny, lorafile.read(comfy_tiny.ADAPTER), "tiny", trial, "1")
        extracted = comfy_weights.extracted(de_distilled(tiny[0]), tiny[0], 4, "1")
    assert 0 <= report.gauge <= 1 and checked.pictures.shape == (1, 192, 64, 3)
    adapter = lorafile.read(comfy_tiny.ADAPTER).factors
    found = extracted.factors["layers.0.attention.to_q"].delta()
    assert (found - adapter["layers.0.attention.to_q"].delta()).norm() < 0.5 * found.norm()
    assert fingerprint(tiny[0]) == before
