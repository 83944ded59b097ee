"""Sets of pictures drawn for training: prompts, sizes, and a folder that goes on where it was."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from zturbo.errors import ZTurboError
from zturbo.pictureset import MANIFEST, PictureSet, Plan, expand, read_sizes

PLAN = Plan(
    ("a {red|blue} __animal__", "a plain {one|{two|three}}"),
    {"animal": ("cat", "{small|big} dog")},
    ((64, 64), (96, 64)),
    5,
    40,
)


def random(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn(picture) -> np.ndarray:
    return np.full((picture.height, picture.width, 3), picture.number, np.uint8)


def filled(folder, plan, most=10**6) -> PictureSet:
    made = PictureSet(folder, plan)
    for picture in made.missing()[:most]:
        made.write(picture, drawn(picture))
    made.write_list()
    return made


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_choices_and_wildcards_stand_inside_each_other():
    found = {expand(PLAN.prompts[0], PLAN.wildcards, random(seed)) for seed in range(200)}
    assert found == {f"a {color} {animal}" for color in ("red", "blue") for animal in ("cat", "small dog", "big dog")}
    assert {expand(PLAN.prompts[1], {}, random(seed)) for seed in range(100)} == {
        "a plain one",
        "a plain two",
        "a plain three",
    }
    assert expand("  just   words ", {}, random()) == "just words"


@pytest.mark.parametrize(
    ("template", "wildcards", "words"),
    [
        ("a __bird__", {}, "bird.txt"),
        ("a {cat|cat|cat|cat|cat|cat|__bird__}", {}, "bird.txt"),
        ("a __animal__", {"animal": ("cat", "cat", "cat", "cat", "__bird__")}, "bird.txt"),
        ("a __{bird|bird}__", {}, "bird.txt"),
        ("__a__", {"a": ("__b__",), "b": ("__a__",)}, "never ends"),
        ("a __more__", {"more": ("x" * 4000 + "__more__",)}, "10,000 characters"),
        ("{|}", {}, "without a word"),
        ("half a \ud83d", {}, "half a character"),
        ("__a__", {"a": ("a \0",)}, "zero"),
    ],
)
def test_a_template_that_leads_nowhere_is_said_before_the_first_picture(template, wildcards, words):
    with pytest.raises(ZTurboError, match=words):
        Plan((template,), wildcards, ((64, 64),), 0, 1)


def test_sizes():
    assert read_sizes("1024x1024, 832 X 1216\n64×80,") == ((1024, 1024), (832, 1216), (64, 80))
    for text in ("", "big", "100x100", "48x64", "64x8192", "64x64x64", "1024"):
        with pytest.raises(ZTurboError, match="multiples of 16|no sizes"):
            read_sizes(text)


def test_a_picture_is_a_function_of_settings_and_number():
    first, again, other = (
        [plan.picture(n) for n in range(40)] for plan in (PLAN, replace(PLAN, count=100), replace(PLAN, seed=6))
    )
    assert (
        first == again
        and len({picture.seed for picture in first}) == 40
        and {(p.width, p.height) for p in first} == set(PLAN.sizes)
    )
    assert all(a != b for a, b in zip(first, other))
    assert [picture.prompt.startswith("a plain") for picture in first] == [False, True] * 20  # templates take turns


def test_a_set_that_was_cut_off_goes_on_and_grows_to_the_same_files(tmp_path):
    filled(tmp_path / "whole", PLAN)
    cut = filled(tmp_path / "cut", replace(PLAN, count=15), most=7)
    (cut.folder / "000003.txt").unlink()  # a picture without its caption was being written
    (cut.folder / "000005.png.part").write_bytes(b"half")
    assert [picture.number for picture in PictureSet(cut.folder, replace(PLAN, count=15)).missing()] == [
        3,
        *range(7, 15),
    ]
    filled(cut.folder, PLAN)
    (cut.folder / "000005.png.part").unlink()
    assert contents(cut.folder) == contents(tmp_path / "whole") and PictureSet(cut.folder, PLAN).missing() == []
    filled(cut.folder, replace(PLAN, count=3))
    assert contents(cut.folder) == contents(tmp_path / "whole")  # a smaller count takes nothing away


def test_picture_caption_and_list_agree(tmp_path):
    made = filled(tmp_path / "set", PLAN)
    lines = [json.loads(line) for line in (made.folder / MANIFEST).read_text().splitlines()]
    assert len(lines) == 40
    for line in lines:
        picture = PLAN.picture(line["number"])
        with Image.open(made.folder / line["file"]) as image:
            assert image.size == (line["width"], line["height"]) == (picture.width, picture.height)
            assert json.loads(image.text["zturbo.picture"])["seed"] == line["seed"] == picture.seed
        assert (made.folder / f"{picture.name}.txt").read_text() == line["prompt"] == picture.prompt
    assert [image.getpixel((0, 0))[0] for image in made.newest(3)] == [37, 38, 39]


def test_other_settings_are_refused_by_name_and_a_strange_folder_too(tmp_path):
    filled(tmp_path / "set", PLAN, 1)
    with pytest.raises(ZTurboError, match="other sizes, seed"):
        PictureSet(tmp_path / "set", replace(PLAN, seed=1, sizes=((64, 64),)))
    with pytest.raises(ZTurboError, match="other models"):
        PictureSet(tmp_path / "set", replace(PLAN, models="fp8"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "holiday.png").write_bytes(b"")
    with pytest.raises(ZTurboError, match="is no set"):
        PictureSet(tmp_path / "mine", PLAN)
    for broken in ("{", "[" * 100_000, "\udcff"):
        (tmp_path / "set" / "set.json").write_text(broken, errors="surrogateescape")
        with pytest.raises(ZTurboError, match="cannot be read"):
            PictureSet(tmp_path / "set", PLAN)


def test_settings_may_change_while_no_picture_is_there(tmp_path):
    PictureSet(tmp_path / "set", PLAN)
    filled(tmp_path / "set", replace(PLAN, seed=6), 1)
    with pytest.raises(ZTurboError, match="other seed"):
        PictureSet(tmp_path / "set", PLAN)


@pytest.mark.skipif(os.name == "nt", reason="links are Unix's")
def test_a_link_in_the_place_of_a_picture_is_none(tmp_path):
    (tmp_path / "secret.png").write_bytes(b"a canary")
    made = PictureSet(tmp_path / "set", replace(PLAN, count=1))
    for name in ("000000.png", "000000.txt"):
        (made.folder / name).symlink_to(tmp_path / "secret.png")
    assert made.there() == [] and made.newest(1) == []
    made.write(made.missing()[0], drawn(made.plan.picture(0)))
    assert made.there() == [0] and (tmp_path / "secret.png").read_bytes() == b"a canary"


@pytest.mark.parametrize("changes", [{"prompts": ()}, {"count": 0}, {"count": 10**6}])
def test_a_plan_that_cannot_be_gets_a_sentence(changes):
    with pytest.raises(ZTurboError):
        replace(PLAN, **changes)


@pytest.mark.parametrize(
    "prompt",
    [
        "{2::red|blue} car",
        "{red|0.5::blue} car",
        "{2$$red|blue|green}",
        "{1-2$$red|blue}",
        "${c=red} car",
        "a __colors/*__ car",
    ],
)
def test_other_programs_way_of_choices_is_named(prompt):
    with pytest.raises(ZTurboError, match="another program's way"):
        Plan((prompt,), {}, ((64, 64),), 0, 1)


def test_braces_without_a_choice_stay():
    prompt = '{"subject": "a cat", "light": "soft"}'
    assert Plan((prompt,), {}, ((64, 64),), 0, 1).picture(0).prompt == prompt
