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
from zturbo import dataset, files, lorafile, runfolder
from zturbo.errors import DatasetError, ModelError, ZTurboError
from zturbo.hosts import comfy_generate, comfy_load, comfy_paths
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
    monkeypatch.setattr(fuzz, "SECONDS", 2)
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
        "no end": lambda: time.sleep(5),
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
    runfolder.request(run.path, runfolder.STOP)
    assert (
        comfy_paths.runs().folder("cat") is None
        and comfy_paths.runs().named("cat") == []
        and not (place.outside / "new").exists()
    )
    with pytest.raises(ZTurboError, match="without links"):
        comfy_paths.runs().checkpoint("cat")


# Links on the disk are the owner's; names are the workflow's (SECURITY.md)


def test_links_of_the_owner_are_followed(place):
    """All that a user may have on another drive.

    It is a dataset folder, pictures and captions in it, a run, a set, a prompt file and a folder of LoRAs.
    """
    for name in ("pictures", "run", "set", "loras"):
        (place.drive / name).mkdir()
    Image.new("RGB", (64, 64)).save(place.drive / "pictures" / "a.png")
    (place.drive / "pictures" / "a.txt").write_text("of the drive")
    (place.drive / "prompts.txt").write_text("a cat")
    for link, to in {
        "input/set": "pictures",
        "output/zturbo/run": "run",
        "output/zturbo_sets/mine": "set",
        "models/loras/sub": "loras",
        "input/prompts.txt": "prompts.txt",
    }.items():
        (place.base / link).parent.mkdir(parents=True, exist_ok=True)
        (place.base / link).symlink_to(place.drive / to)
    assert dataset.from_folder(comfy_paths.dataset_folder("set"), (64,), "zvk").items[0].caption == "zvk, of the drive"
    assert comfy_paths.runs().folder("run") == place.runs / "run" and comfy_generate.read_prompts("prompts.txt") == (
        "a cat",
    )
    assert comfy_paths.set_folder("mine").resolve() == place.drive / "set"
    path = lorafile.write(comfy_paths.lora_path("sub/x", False), {"a": torch.ones(1)}, {})
    assert path == place.loras / "sub" / "x.safetensors" and (place.drive / "loras" / "x.safetensors").is_file()
    for link in ("b.png", "b.txt"):
        (place.input / "mine").mkdir(exist_ok=True)
        (place.input / "mine" / link).symlink_to(place.drive / "pictures" / link.replace("b", "a"))
    assert dataset.from_folder(comfy_paths.dataset_folder("mine"), (64,), "").items[0].caption == "of the drive"
    before = comfy_paths.folder_fingerprint("set")
    (place.drive / "pictures" / "a.txt").write_text("another")
    assert comfy_paths.folder_fingerprint("set") != before


@pytest.mark.parametrize(
    "name",
    [
        "..",
        "../outside/pictures",
        "sub/../../outside",
        "/etc",
        "{outside}/pictures",
        "//etc",
        "..\\outside",
        "link/../../outside",
    ],
)
def test_folders_that_lead_out_are_refused_whatever_links_there_are(place, name):
    (place.input / "link").symlink_to(place.drive)
    (place.input / "..\\outside").mkdir()  # a name with a backslash in it is no way out here
    Image.new("RGB", (64, 64)).save(place.outside / "pictures" / "a.png")
    name = name.format(outside=place.outside)
    if name != "..\\outside":
        with pytest.raises(DatasetError, match="is not inside"):
            comfy_paths.dataset_folder(name)
    else:
        assert comfy_paths.dataset_folder(name) == place.input / "..\\outside"
    for ask in (comfy_paths.set_folder, lambda name: comfy_paths.lora_path(name, False)):
        with pytest.raises(ZTurboError, match="cannot be"):
            ask(name)


@pytest.mark.parametrize("name", ["../secret.txt", "{base}/secret.txt", "link/../../secret.txt", "//etc/passwd"])
def test_prompt_files_that_lead_out_are_refused(place, name):
    (place.input / "link").symlink_to(place.drive)
    with pytest.raises(ZTurboError, match="is not inside ComfyUI's input folder"):
        comfy_generate.read_prompts(name.format(base=place.base))


def test_a_link_in_a_files_place_is_replaced(place):
    for name in ("x.safetensors.part", "y.safetensors"):
        (place.loras / name).symlink_to(place.outside / "secret.txt")
    for name in "xy":
        files.write(place.loras / f"{name}.safetensors", b"x")
    assert (place.outside / "secret.txt").read_text() == "a canary\n" and (
        place.loras / "y.safetensors"
    ).read_bytes() == b"x"


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
