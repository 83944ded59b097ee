"""Damaged prompts, wildcards, sizes and folders of picture sets. Kinds for `bench fuzz`."""

import os
import random
import re

import numpy as np

from bench.fuzz_damage import STRINGS, damage
from bench.fuzz_names import link, trick
from bench.fuzz_watch import Damaged, Place, inside
from zturbo import pictureset
from zturbo.hosts import comfy_generate, comfy_paths
from zturbo.pictureset import PictureSet, Plan
from zturbo.words import is_text

PIECES = (
    "a cat",
    "{",
    "}",
    "|",
    "{a|b}",
    "{{a|b}|c}",
    "__",
    "___",
    "__more__",
    "__deep/er__",
    "__loop__",
    "__../../secret__",
    "__nowhere__",
    "_{_|_}more__",
    "[trigger]",
    "\n",
    "#",
    "é",
    *STRINGS,
)
SIZES = (
    "64x64",
    "1024x1024",
    "96 X 64",
    "64×64",
    "100x100",
    "x",
    "64x",
    "-64x64",
    "0x0",
    "4096x4096",
    "4112x64",
    "64x64x64",
    "٦٤x64",
    "9" * 5000 + "x64",
    ",",
    " ",
    "\n",
    *STRINGS,
)
LINES = ("a red {cat|dog}\n__more__, at night\n# not this\n\n", "猫\r\nein Kätzchen\r\n", "a cat")


def wildcards(place: Place):
    for name, text in (
        ("more", "a bird\nsome __deep/er__ {water|sand}\n"),
        ("deep/er", "blue\n"),
        ("loop", "__loop__ more\n"),
    ):
        path = place.input / "wildcards" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def plan(templates: tuple[str, ...], sizes: str = "64x64, 96x64", count: int = 5) -> Plan:
    """As the node makes it."""
    return Plan(templates, comfy_generate.wildcards(templates), pictureset.read_sizes(sizes), 0, count)


def whole(made: Plan):
    """Every picture of a plan that was taken can be drawn and captioned."""
    for picture in (made.picture(number) for number in range(made.count)):
        assert (
            picture.prompt.strip()
            and is_text(picture.prompt)
            and not re.search(r"\{[^{}]*\|[^{}]*\}", picture.prompt)
            and "\0" not in picture.prompt
        ), picture.prompt[:80]
        assert (
            picture.width % 16 == picture.height % 16 == 0
            and 64 <= min(picture.width, picture.height) <= max(picture.width, picture.height) <= 4096
        )


def set_prompts(rng: random.Random, place: Place) -> Damaged:
    """Prompts with braces and wildcards that do not fit, and sizes that are none."""
    wildcards(place)
    templates = tuple(
        line for line in "".join(rng.choice(PIECES) for _ in range(rng.randrange(1, 8))).splitlines() if line.strip()
    )
    sizes = ", ".join(rng.choice(SIZES) for _ in range(rng.randrange(1, 4))) if rng.random() < 0.5 else "64x64"
    return Damaged(f"{templates!r:.60} {sizes!r:.40}", lambda: whole(plan(templates, sizes)))


def set_files(rng: random.Random, place: Place) -> Damaged:
    """A prompt file or a wildcard that is damaged, a link, a folder, or elsewhere."""
    wildcards(place)
    what = rng.choice(("prompts", "prompts", "wildcard", "link", "folder", "name"))
    more, raw = damage(rng.choice(LINES).encode(), rng)
    name = trick(rng) if what == "name" else "prompts.txt"
    path = place.input / ("wildcards/more.txt" if what == "wildcard" else "prompts.txt")
    if what == "link":
        (place.drive / "prompts.txt").write_bytes(rng.choice(LINES).encode())
        link(path, place.drive / "prompts.txt")
    elif what == "folder":
        path.mkdir()
    else:
        path.write_bytes(raw)

    def feed():
        comfy_generate.changed(name)
        templates = ("a __more__",) if what == "wildcard" else comfy_generate.read_prompts(name)
        made = plan(templates)
        assert what != "folder" and not any("canary" in line for line in made.prompts)
        whole(made)

    return Damaged(f"{what} {more if what in ('prompts', 'wildcard') else repr(name)[:60]}", feed)


def set_folders(rng: random.Random, place: Place) -> Damaged:
    """A set's folder that is not as it was written.

    Its settings are damaged, it holds links, it is the owner's link itself, or it has an odd name.
    """
    what = rng.choice(("settings", "settings", "links", "folder link", "sets link", "name", "settings folder"))
    name = trick(rng).strip() if what == "name" else "mine"
    home, mine = place.output / comfy_paths.SETS, Plan(("a cat",), {}, ((64, 64),), 0, 2)
    more = ""
    if what in ("settings", "links", "settings folder"):
        begun = PictureSet(home / "mine", mine)
        begun.write(mine.picture(0), np.zeros((64, 64, 3), np.uint8))
        settings = home / "mine" / pictureset.SETTINGS
        if what == "settings":
            more, raw = damage(settings.read_bytes(), rng)
            settings.write_bytes(raw)
        elif what == "settings folder":
            settings.unlink()
            settings.mkdir()
        else:
            for file in ("000001.png", "000001.txt", "000001.png.part", pictureset.MANIFEST):
                link(home / "mine" / file, place.outside / "secret.txt")
    elif what == "folder link":
        link(home / "mine", place.drive)
    elif what == "sets link":
        link(home, place.drive)

    def feed():
        made = PictureSet(comfy_paths.set_folder(name), mine)
        assert (
            inside(os.path.realpath(made.folder), (str(place.output), str(place.drive))) and what != "settings folder"
        )
        for picture in made.missing():
            made.write(picture, np.zeros((64, 64, 3), np.uint8))
        made.write_list()
        assert made.there() == [0, 1] and [one.size for one in made.newest(2)] == [(64, 64)] * 2

    return Damaged(f"{what} {name[:40]!r} {more}", feed)


KINDS = [set_prompts, set_files, set_folders]
