"""A slice of `bench fuzz`, and what it found, as plain cases through ComfyUI's folders."""

import os
import random
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

sys.path.append(str(Path(__file__).resolve().parents[2]))
from bench import fuzz
from bench.fuzz_watch import Damaged, Watch
from zturbo import dataset, files, runfolder
from zturbo.errors import DatasetError, ModelError, ZTurboError
from zturbo.hosts import comfy_load, comfy_paths
from zturbo.recipe import Recipe
from zturbo.runfolder import RunFolder


@pytest.fixture
def place():
    with fuzz.comfy_folders() as place:
        yield place


def test_a_slice_of_all_kinds():
    ended = list(fuzz.run(range(200), seed=20))
    assert [str(one) for one in ended if one.verdict == "other"] == []
    assert {one.kind for one in ended} == {kind.__name__ for kind in fuzz.kinds()}
    counts = Counter(one.verdict for one in ended)
    assert counts["sentence"] > 50 and counts["correct"] > 30


def test_an_input_is_the_same_again(place):
    kind = fuzz.kinds()[0]
    said = [kind(random.Random("0 5"), place).what for _ in range(2)]
    assert said[0] == said[1]


def test_the_watch_sees_what_must_not_be(place, monkeypatch):
    """Without this, `other: 0` would mean nothing."""
    monkeypatch.setattr(fuzz, "SECONDS", 0.2)
    watch = Watch(place)
    link = place.input / "link"
    link.symlink_to(place.outside / "secret.txt")

    def wrong():
        raise AssertionError("wrong result")

    def sentence(said):
        raise ZTurboError(said)

    faults = {
        "wrong result": wrong,
        "division": lambda: 1 // 0,
        "secret.txt": lambda: (place.base / "secret.txt").read_text(),
        "link": link.read_text,
        "passwd": lambda: Path("/etc/passwd").read_text(),
        "mkdir": lambda: (place.base / "new").mkdir(),
        "os.rename": lambda: os.rename(place.base / "new", place.base / "newer"),
        "os.rmdir": lambda: (place.base / "newer").rmdir(),
        "loras2": lambda: os.listdir(place.base / "models" / "loras2"),
        "Popen": lambda: os.spawnlp(os.P_WAIT, "true", "true") or __import__("subprocess").run(["true"]),
        "no end": lambda: time.sleep(3),
        "x": lambda: sentence("x"),
    }
    for words, feed in faults.items():
        verdict, said = fuzz.judge(Damaged("", feed), watch)
        assert verdict == "other" and words in said, (words, verdict, said)
    assert fuzz.judge(Damaged("", (place.input / "fine").touch), watch) == ("correct", "")
    assert fuzz.judge(Damaged("", lambda: sentence("That is no picture.")), watch)[0] == "sentence"


# What it found


@pytest.mark.parametrize("name", ["a\x00b", "\ud800", "x" * 5000, "a/" * 3000, "loop"])
def test_names_that_no_disk_can_hold(place, name):
    (place.input / "loop").symlink_to(place.input / "loop")
    with pytest.raises(DatasetError, match="cannot be the name of a folder|is not inside|does not exist"):
        dataset.from_folder(comfy_paths.dataset_folder(name), (64,), "zvk")


def test_a_run_named_with_a_digit_that_is_no_number(place):
    (place.runs / "cat_²").mkdir(parents=True)
    assert comfy_paths.runs().named("cat") == []


def test_a_run_with_links_in_it_is_no_run(place):
    run = RunFolder.new(place.runs, Recipe("cat"))
    assert comfy_paths.runs().folder("cat") == run.path
    (run.path / "stop").symlink_to(place.outside / "new")
    runfolder.request_stop(run.path)
    assert comfy_paths.runs().folder("cat") is None and comfy_paths.runs().named("cat") == [] and not (place.outside / "new").exists()
    with pytest.raises(ZTurboError, match="without links"):
        comfy_paths.runs().checkpoint("cat")


def test_a_lora_is_not_saved_through_a_link(place):
    (place.loras / "sub").symlink_to(place.outside)
    with pytest.raises(ZTurboError, match="a link that leads out of"):
        comfy_paths.lora_path("sub/x", False)
    (place.loras / "x.safetensors.part").symlink_to(place.outside / "secret.txt")
    files.write(place.loras / "x.safetensors", b"x")
    assert (place.outside / "secret.txt").read_text() == "a canary\n" and (place.loras / "x.safetensors").read_bytes() == b"x"


@pytest.mark.parametrize("name", ["b.png", "a.txt", "metadata.jsonl", "a.mask.png"])
def test_what_a_link_in_the_pictures_leads_to_is_not_read(place, name):
    (place.input / "set").mkdir()
    Image.new("RGB", (64, 64)).save(place.input / "set" / "a.png")
    (place.input / "set" / name).symlink_to(place.outside / "secret.txt")
    with pytest.raises(DatasetError, match=f"lead out of the folder set .*{name}"):
        dataset.from_folder(comfy_paths.dataset_folder("set"), (64,), "zvk")


def test_pickles_are_not_opened(place):
    torch.save({"a": torch.ones(1)}, place.temp / "m.pt")
    for load in (comfy_load.load_model, comfy_load.load_clip, comfy_load.load_vae):
        with pytest.raises(ModelError, match="m.pt is no safetensors file"):
            load(place.temp / "m.pt")


def test_a_file_that_is_no_text_encoder_is_not_taken_for_one(place):
    """Core would build SD1's with random weights."""
    save_file({"foo": torch.ones(3)}, place.temp / "m.safetensors")
    with pytest.raises(ModelError, match="m.safetensors is no text encoder of Z-Image"):
        comfy_load.load_clip(place.temp / "m.safetensors")
