"""A set of pictures drawn for training: which prompt, size and noise each has, and the folder that they lie in.

Picture `n` is a function of (settings, n), so a set that was cut off goes on, or grows, to the same files.
"""

import io
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from PIL import Image, PngImagePlugin

from . import files, flow
from .errors import ZTurboError
from .picturefile import load_picture
from .words import is_text

SETTINGS, MANIFEST = "set.json", "pictures.jsonl"
MOST = 100_000  # pictures
CHOICE = re.compile(r"\{([^{}]*\|[^{}]*)\}")
# weights, counts, variables and patterns of other programs
FOREIGN = re.compile(r"\{\s*[\d.]+::|\|\s*[\d.]+::|\{\s*[\d-]+\$\$|\$\{|__[\w./ -]*\*[\w./* -]*__")
WILDCARD = re.compile(r"__([\w./ -]+?)__")
MOST_CHOICES = 1000  # made in one prompt
LONGEST = 10_000  # characters of a prompt
CAPTION = re.compile(r"[0-9]{6}\.txt")


@dataclass(frozen=True)
class Picture:
    """One of the set. seed: of the noise."""

    number: int
    prompt: str
    width: int
    height: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.number:06d}"


@dataclass(frozen=True)
class Plan:
    """Every setting of a set.

    prompts: templates; wildcards: lines by the wildcard's name; sizes: (width, height) in pixels; models: a digest of
    what draws it.
    """

    prompts: tuple[str, ...]
    wildcards: Mapping[str, tuple[str, ...]]
    sizes: tuple[tuple[int, int], ...]
    seed: int
    count: int
    models: str = ""

    def __post_init__(self):
        if not self.prompts:
            raise ZTurboError("There are no prompts. Write some, one a line, or choose a prompt file.")
        if not 1 <= self.count <= MOST:
            raise ZTurboError(f"count is {self.count}; it must be from 1 to {MOST}.")
        texts = [*self.prompts, *(line for lines in self.wildcards.values() for line in lines)]
        if broken := next((text for text in texts if not is_text(text) or "\0" in text), ""):
            raise ZTurboError(_half_a_character(broken))
        if other := next((found[0] for text in texts if (found := FOREIGN.search(text))), ""):
            raise ZTurboError(_another_way(other))
        if missing := sorted(asked_wildcards(texts) - self.wildcards.keys()):
            no_wildcard(missing[0])
        for template in self.prompts:  # what is wrong with one is said before the first picture
            expand(template, self.wildcards, flow.generator("check"))

    def picture(self, number: int) -> Picture:
        """Templates take turns; the rest is drawn from (seed, number)."""
        random = flow.generator(self.seed, "set", number)
        prompt = expand(self.prompts[number % len(self.prompts)], self.wildcards, random)
        width, height = self.sizes[pick(len(self.sizes), random)]
        return Picture(number, prompt, width, height, int(torch.randint(2**53, (), generator=random)))

    def settings(self) -> dict:
        """All but the count, which may grow, as JSON gives it back."""
        settings = {
            "prompts": self.prompts,
            "wildcards": dict(self.wildcards),
            "sizes": self.sizes,
            "seed": self.seed,
            "models": self.models,
        }
        return json.loads(json.dumps(settings))


def pick(count: int, random: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=random))


def expand(template: str, wildcards: Mapping[str, tuple[str, ...]], random: torch.Generator) -> str:
    """A prompt: `{a|b}` becomes a or b, `__name__` a line of that wildcard, in which both may stand again.

    Braces without a choice stay. Raises ZTurboError.
    """
    text = template
    for _ in range(MOST_CHOICES):
        if found := CHOICE.search(text):
            options = found[1].split("|")
            text = text[: found.start()] + options[pick(len(options), random)] + text[found.end() :]
        elif found := WILDCARD.search(text):
            lines = wildcards.get(found[1]) or no_wildcard(found[1])
            text = text[: found.start()] + lines[pick(len(lines), random)] + text[found.end() :]
        elif words := " ".join(text.split()):
            return words
        else:
            raise ZTurboError(_without_a_word(template))
        if len(text) > LONGEST:
            break
    raise ZTurboError(_never_ends(template))


def no_wildcard(name: str) -> NoReturn:
    raise ZTurboError(_no_wildcard(name))


def asked_wildcards(texts) -> set[str]:
    return {name for text in texts for name in WILDCARD.findall(text)}


def read_sizes(text: str) -> tuple[tuple[int, int], ...]:
    """`1024x1024, 832x1216` as (width, height) in pixels. Raises ZTurboError."""
    sizes = []
    for part in filter(None, (part.strip() for part in re.split(r"[,\n]", text))):
        found = re.fullmatch(r"([0-9]{2,4})\s*[xX×]\s*([0-9]{2,4})", part)
        size = (int(found[1]), int(found[2])) if found else (0, 0)
        if not all(64 <= side <= 4096 and side % 16 == 0 for side in size):
            raise ZTurboError(_no_size(part))
        sizes.append(size)
    if not sizes:
        raise ZTurboError("There are no sizes. Write some, for example 1024x1024, 832x1216, 1216x832.")
    return tuple(sizes)


class PictureSet:
    """The folder of a set: NNNNNN.png with NNNNNN.txt beside, the settings, and a list of all pictures."""

    def __init__(self, folder: Path, plan: Plan):
        """Make the folder, or take it up again.

        Raises ZTurboError for one that was begun with other settings, or cannot be written.
        """
        self.folder, self.plan = folder, plan
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if (folder / SETTINGS).exists():
                self._check()
            elif any(folder.iterdir()):
                raise ZTurboError(_no_set(folder.name))
            else:
                files.write(folder / SETTINGS, json.dumps(plan.settings(), indent=1).encode())
        except OSError as error:
            raise ZTurboError(_not_written(f"The folder {folder}", error)) from error

    def _check(self):
        try:
            before = json.loads((self.folder / SETTINGS).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ZTurboError(_unreadable(self.folder.name, error)) from error
        now = self.plan.settings()
        other = [key for key in now if not isinstance(before, dict) or before.get(key) != now[key]]
        if other and not self.there():
            files.write(self.folder / SETTINGS, json.dumps(now, indent=1).encode())
        elif other:
            raise ZTurboError(_other_settings(self.folder.name, other))

    def there(self) -> list[int]:
        """Numbers of the pictures that are there, in order, with their captions.

        A caption is written last, so it never stands for a picture that is not whole.
        """
        with os.scandir(self.folder) as entries:
            names = {entry.name for entry in entries if entry.is_file(follow_symlinks=False)}
        return sorted(int(name[:6]) for name in names if CAPTION.fullmatch(name) and f"{name[:6]}.png" in names)

    def missing(self) -> list[Picture]:
        """The pictures that are not there, in order."""
        there = set(self.there())
        return [self.plan.picture(number) for number in range(self.plan.count) if number not in there]

    def write(self, picture: Picture, pixels: np.ndarray):
        """Keep a picture [H, W, 3] uint8, with its prompt and seed in the file.

        Raises ZTurboError when the disk refuses.
        """
        words = PngImagePlugin.PngInfo()
        words.add_text("zturbo.picture", json.dumps(asdict(picture)))
        content = io.BytesIO()
        Image.fromarray(pixels).save(content, format="PNG", compress_level=4, pnginfo=words)
        try:
            files.write(self.folder / f"{picture.name}.png", content.getvalue())
            files.write(self.folder / f"{picture.name}.txt", picture.prompt.encode())
        except OSError as error:
            wrong = _not_written(f"The picture {picture.name}.png", error)
            raise ZTurboError(f"{wrong} Press Run again: the set goes on where it was.") from error

    def write_list(self):
        """Write the list of all pictures that are there: file, prompt, size, seed."""
        pictures = [self.plan.picture(number) for number in self.there()]
        lines = [json.dumps({"file": f"{picture.name}.png", **asdict(picture)}) for picture in pictures]
        try:
            files.write(self.folder / MANIFEST, ("\n".join(lines) + "\n").encode())
        except OSError as error:
            raise ZTurboError(_not_written(MANIFEST, error)) from error

    def newest(self, count: int) -> list[Image.Image]:
        """The last pictures that are there."""
        return [load_picture(self.folder / f"{number:06d}.png") for number in self.there()[-count:]]


# What is said of prompts, and of the folder


def _half_a_character(prompt: str) -> str:
    return f"The prompt {prompt[:100]!r} has a zero or half a character in it (a cut emoji). Write it anew."


def _another_way(found: str) -> str:
    return (
        f"The prompts have {found!r} in them, another program's way of weights, counts, variables or patterns, "
        "which is not understood here: only {a|b} and __name__ are. Write it so."
    )


def _without_a_word(template: str) -> str:
    return f"The prompt {template[:100]!r} can end up without a word. Leave one that is always there."


def _never_ends(template: str) -> str:
    return (
        f"The prompt {template[:100]!r} never ends, or has more than {LONGEST:,} characters: "
        "a wildcard in it may lead back to itself. Take that out."
    )


def _no_wildcard(name: str) -> str:
    return (
        f"The prompts ask for the wildcard __{name}__, and there is none. "
        f"Put {name}.txt, with one choice a line, into ComfyUI's input/wildcards."
    )


def _no_size(part: str) -> str:
    return (
        f"{part!r} is no size. "
        "Write width x height in pixels, multiples of 16 from 64 to 4096, for example 1024x1024, 832x1216."
    )


def _no_set(folder: str) -> str:
    return f"The folder {folder} is there already and is no set of this node. Choose another name."


def _unreadable(folder: str, error: Exception) -> str:
    return f"{folder}/{SETTINGS} cannot be read ({error}). Choose another name, or delete the folder."


def _other_settings(folder: str, other: list[str]) -> str:
    return (
        f"The set {folder} was begun with other {', '.join(other)}. "
        "Choose another name for a new set, or give it what it had."
    )


def _not_written(what: str, error: OSError) -> str:
    return f"{what} cannot be written: {error.strerror}. {files.advice(error)}"
