"""A set of pictures drawn for training: which prompt, size and noise each has, and the folder that they are streamed to.

Picture `n` is a function of (settings, n), so a set that was cut off goes on, or grows, to the same files.
"""

import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, PngImagePlugin

from . import files, flow
from .errors import ZTurboError

SETTINGS, MANIFEST = "set.json", "pictures.jsonl"
MOST = 100_000  # pictures
CHOICE = re.compile(r"\{([^{}]*)\}")
WILDCARD = re.compile(r"__([\w./ -]+?)__")


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
    """Every setting of a set. prompts: templates; wildcards: lines by the wildcard's name; sizes: (width, height) in pixels."""

    prompts: tuple[str, ...]
    wildcards: Mapping[str, tuple[str, ...]]
    sizes: tuple[tuple[int, int], ...]
    seed: int
    count: int

    def __post_init__(self):
        if not self.prompts:
            raise ZTurboError("There are no prompts. Write some, one a line, or choose a prompt file.")
        if not 1 <= self.count <= MOST:
            raise ZTurboError(f"count is {self.count}; it must be from 1 to {MOST}.")
        for template in self.prompts:  # what is wrong with one is said before the first picture
            expand(template, self.wildcards, torch.Generator().manual_seed(0))

    def picture(self, number: int) -> Picture:
        """Templates take turns; the rest is drawn from (seed, number)."""
        random = flow.generator(self.seed, "set", number)
        prompt = expand(self.prompts[number % len(self.prompts)], self.wildcards, random)
        width, height = self.sizes[pick(len(self.sizes), random)]
        return Picture(number, prompt, width, height, int(torch.randint(2**53, (), generator=random)))

    def settings(self) -> dict:
        """All but the count, which may grow, as JSON gives it back."""
        return json.loads(json.dumps({"prompts": self.prompts, "wildcards": dict(self.wildcards), "sizes": self.sizes, "seed": self.seed}))


def pick(count: int, random: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=random))


def expand(template: str, wildcards: Mapping[str, tuple[str, ...]], random: torch.Generator) -> str:
    """A prompt: `{a|b}` becomes a or b, `__name__` a line of that wildcard, in which both may stand again. Raises ZTurboError."""
    text = template
    for _ in range(1000):
        if found := CHOICE.search(text):
            options = found[1].split("|")
            text = text[: found.start()] + options[pick(len(options), random)] + text[found.end() :]
        elif found := WILDCARD.search(text):
            if found[1] not in wildcards:
                raise ZTurboError(f"The prompt {template!r} asks for the wildcard __{found[1]}__, and there is none. Put {found[1]}.txt, with one choice a line, into ComfyUI's input/wildcards.")
            lines = wildcards[found[1]]
            text = text[: found.start()] + lines[pick(len(lines), random)] + text[found.end() :]
        else:
            return " ".join(text.split())
    raise ZTurboError(f"The prompt {template!r} never ends: a wildcard in it leads back to itself.")


def asked_wildcards(texts) -> set[str]:
    return {name for text in texts for name in WILDCARD.findall(text)}


def read_sizes(text: str) -> tuple[tuple[int, int], ...]:
    """`1024x1024, 832x1216` as (width, height) in pixels. Raises ZTurboError."""
    sizes = []
    for part in filter(None, (part.strip() for part in re.split(r"[,\n]", text))):
        found = re.fullmatch(r"([0-9]{2,4})\s*[xX×]\s*([0-9]{2,4})", part)
        size = (int(found[1]), int(found[2])) if found else (0, 0)
        if not all(64 <= side <= 4096 and side % 16 == 0 for side in size):
            raise ZTurboError(f"{part!r} is no size. Write width x height in pixels, multiples of 16 from 64 to 4096, for example 1024x1024, 832x1216.")
        sizes.append(size)
    if not sizes:
        raise ZTurboError("There are no sizes. Write some, for example 1024x1024, 832x1216, 1216x832.")
    return tuple(sizes)


class PictureSet:
    """The folder of a set: NNNNNN.png with NNNNNN.txt beside, the settings, and a list of all pictures."""

    def __init__(self, folder: Path, plan: Plan):
        """Make the folder, or take it up again. Raises ZTurboError for one that was begun with other settings, or cannot be written."""
        self.folder, self.plan = folder, plan
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if (folder / SETTINGS).exists():
                self._check()
            elif any(folder.iterdir()):
                raise ZTurboError(f"The folder {folder.name} is there already and is no set of this node. Choose another name.")
            else:
                files.write(folder / SETTINGS, json.dumps(plan.settings(), indent=1).encode())
        except OSError as error:
            raise ZTurboError(f"The folder {folder} cannot be written: {error.strerror}. {files.advice(error)}") from error

    def _check(self):
        try:
            before = json.loads((self.folder / SETTINGS).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ZTurboError(f"{self.folder.name}/{SETTINGS} cannot be read ({error}). Choose another name, or delete the folder.") from error
        now = self.plan.settings()
        if other := [key for key in now if not isinstance(before, dict) or before.get(key) != now[key]]:
            raise ZTurboError(f"The set {self.folder.name} was begun with other {', '.join(other)}. Choose another name for a new set, or give it what it had.")

    def missing(self) -> Iterator[Picture]:
        """The pictures that are not there, in order. A caption is written last, so where it is, its picture is."""
        for number in range(self.plan.count):
            if not (self.folder / f"{number:06d}.txt").is_file() or not (self.folder / f"{number:06d}.png").is_file():
                yield self.plan.picture(number)

    def write(self, picture: Picture, pixels: np.ndarray):
        """Keep a picture [H, W, 3] uint8, with its prompt and seed in the file. Raises ZTurboError when the disk refuses."""
        words = PngImagePlugin.PngInfo()
        words.add_text("zturbo.picture", json.dumps(asdict(picture)))
        content = io.BytesIO()
        Image.fromarray(pixels).save(content, format="PNG", compress_level=4, pnginfo=words)
        try:
            files.write(self.folder / f"{picture.name}.png", content.getvalue())
            files.write(self.folder / f"{picture.name}.txt", picture.prompt.encode())
        except OSError as error:
            raise ZTurboError(f"The picture {picture.name}.png cannot be written: {error.strerror}. {files.advice(error)} Press Run again: the set goes on where it was.") from error

    def write_list(self):
        """Write the list of all pictures: file, prompt, size, seed."""
        lines = [json.dumps({"file": f"{n:06d}.png", **asdict(self.plan.picture(n))}) for n in range(self.plan.count) if (self.folder / f"{n:06d}.txt").is_file()]
        try:
            files.write(self.folder / MANIFEST, ("\n".join(lines) + "\n").encode())
        except OSError as error:
            raise ZTurboError(f"{MANIFEST} cannot be written: {error.strerror}. {files.advice(error)}") from error

    def newest(self, count: int) -> list[Image.Image]:
        """The last pictures that are there."""
        found = [self.folder / f"{n:06d}.png" for n in reversed(range(self.plan.count)) if (self.folder / f"{n:06d}.txt").is_file()]
        pictures = []
        for path in reversed(found[:count]):
            with Image.open(path) as picture:
                pictures.append(picture.convert("RGB"))
        return pictures
