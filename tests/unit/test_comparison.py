"""The grid of Compare LoRAs: its columns, its labels, its pictures in their places."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parent))
from test_trainer import go, recipe

from zturbo import comparison
from zturbo.comparison import Column
from zturbo.errors import ZTurboError
from zturbo.recipe import Saving
from zturbo.runs import Runs


def test_strengths_are_read_as_people_write_them():
    assert comparison.read_strengths(" 1 ") == (1.0,)
    assert comparison.read_strengths("0.6,0.8, 1,0.8,") == (0.6, 0.8, 1.0)
    assert comparison.read_strengths("-1; 2") == (-1.0, 2.0)
    for wrong in ("0,5", "-0,85"):  # as much of Europe writes a half
        with pytest.raises(ZTurboError, match=r"are two, -?0 and \d+. For one write -?0\.\d"):
            comparison.read_strengths(wrong)
    assert comparison.read_strengths("0, 5") == (0.0, 5.0)
    for wrong in ("", "strong", "nan", "1, inf", "11", "0.5 0.6"):
        with pytest.raises(ZTurboError, match="strengths is"):
            comparison.read_strengths(wrong)


def test_columns_stand_from_left_to_right_and_nonsense_gets_a_sentence():
    assert comparison.columns(["a", "b"], (0.5, 1.0), True, 2, (64, 64)) == [
        Column("", 0.0), Column("a", 0.5), Column("a", 1.0), Column("b", 0.5), Column("b", 1.0),
    ]  # fmt: skip
    assert [one.label for one in comparison.columns(["a/b"], (1.0,), True, 1, (64, 64))] == ["without", "a/b at 1"]
    for given, sentence in (
        (([], (1.0,), True, 1, (64, 64)), "nothing to compare"),
        ((["a"], (1.0,), True, 0, (64, 64)), "no prompts"),
        ((["a"] * 20, (1.0,) * 5, False, 6, (64, 64)), "600 pictures; of 64x64 pixels at most 500"),
        ((["a"] * 20, (1.0,) * 5, False, 2, (1024, 1024)), "200 pictures; of 1024x1024 pixels at most 122"),
        ((["a"], (1.0,), False, 2, (1000, 1024)), "multiples of 16"),
    ):
        with pytest.raises(ZTurboError, match=sentence):
            comparison.columns(*given)


@pytest.mark.parametrize("side", [64, 128, 512])
def test_pictures_are_in_their_places_and_labels_beside_them(side):
    rows = [[np.full((side, side, 3), 40 * y + 10 * x + 5, np.uint8) for x in range(3)] for y in range(2)]
    across = ["without", "a_very_long_name_of_a_lora/with_a_folder at 0.85", "素描 at 1"]
    made = comparison.grid(rows, across, ["a large red star on a white background, seen from afar", "星"])[0]
    pixels = (made * 255).round().to(torch.uint8)
    height, width = pixels.shape[:2]
    gap = max(2, side // 128)
    left, top = width - 3 * (side + gap), height - 2 * (side + gap)
    assert left >= 90 and top > 0
    for y in range(2):
        for x in range(3):
            piece = pixels[top + y * (side + gap) :, left + x * (side + gap) :][:side, :side]
            assert piece.unique().tolist() == [40 * y + 10 * x + 5]
    paper = pixels[-1, 0]
    assert all((pixels[:top, left + x * (side + gap) :][:, :side] != paper).any() for x in range(3))
    assert all((pixels[top + y * (side + gap) :, :left][:side] != paper).any() for y in range(2))


def test_a_runs_loras_by_their_names(tmp_path):
    _, run, _, _ = go(tmp_path, recipe(steps=6, saving=Saving(every=2, keep=5)))
    runs, name = Runs(tmp_path), run.path.name
    steps = [f"{name}/step_{step:06d}" for step in (2, 4, 6)]
    assert [one for one, _ in runs.loras(f"{name}/all")] == steps
    assert runs.loras(name) == runs.loras(f"{name}/newest") == [(f"{name}/newest", run.lora)]
    assert runs.loras(steps[1]) == [(steps[1], run.checkpoints / "step_000004.safetensors")]
    run.checkpoint_files()[0].unlink()
    assert [one for one, _ in runs.loras(f"{name}/all")] == [*steps[:2], f"{name}/newest"]
    for wrong, sentence in (
        ("nobody", "no run 'nobody'"),
        ("../x", "no run"),
        (f"{name}/step_000005", "has no step_000005; it has step_000002, step_000004, newest"),
        (f"{name}/healthy", "has no healthy"),
        (f"{name}/lora", "has no lora"),
    ):
        with pytest.raises(ZTurboError, match=sentence):
            runs.loras(wrong)
