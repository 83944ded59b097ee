"""A dataset's folder to look at: each picture with its crop, its caption and what may not be meant.

Captions are written here, too.
"""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from . import files, words
from .buckets import SMALLEST, bucket, cropped_share
from .captions import apply_trigger, one_line
from .dataset import find_mask
from .errors import CaptionChangedError, DatasetError, ZTurboError
from .folder import Found, Listing, look_through
from .known import Known
from .picturefile import load_picture

PAGE = 60  # pictures that are sent at once
COMPARED = 3000  # pictures of which the alike are looked for; it takes their number's square
LONGEST = 20_000  # letters of a caption
CROPPED = 0.15  # share of a picture that is cut away, from which on it is said
ENOUGH = 0.9  # share of the area asked for, from which on a picture is not small
HASH, COLOURS = 8, 4  # sides of the small pictures that tell pictures apart
NEAR_BITS, NEAR_COLOURS = 6, 8.0  # most differing bits of 64, and mean difference of colours of 255
# what may not be meant
BROKEN, SMALL, CUT, ALIKE, SILENT, NO_TRIGGER = PROBLEMS = ("broken", "small", "cropped", "alike", "silent", "trigger")


@dataclass(frozen=True)
class Asked:
    """How a dataset reads its folder. resolutions: pixels."""

    resolutions: tuple[int, ...]
    trigger: str = ""
    upscale: bool = False
    masks: str = "files"


@dataclass
class Picture:
    """One of the folder. size: (width, height), zeros of one that cannot be read; sizes: that it is trained at.

    caption: as written; trained: with the trigger word. alike: names. sentence: why it cannot be used.
    """

    name: str
    time: int  # seconds since 1970, of the file's last change
    repeats: int
    caption: str = ""
    trained: str = ""
    size: tuple[int, int] = (0, 0)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    mask: bool = False
    alike: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    sentence: str = ""


class Album:
    """The pictures of a folder. Raises DatasetError as a dataset does.

    cache: where it is kept what was read of them.
    """

    def __init__(self, folder: Path, cache: Path | None = None):
        self.folder, self.cache = folder, cache
        self.listing: Listing = look_through(folder)
        self.by_name = {one.name: one for one in self.listing.pictures}
        self.names = Counter(one.name for one in self.listing.pictures)

    def pictures(self, asked: Asked) -> list[Picture]:
        """All of them, in their order."""
        known, prints = Known(self.cache, self.folder), []
        found = []
        for one in self.listing.pictures:
            picture, seen = _looked_at(one, asked, self.listing, known)
            found.append(picture)
            prints.append(seen)
        known.save()
        _note_alike(found, prints)
        for picture in found:
            picture.problems = _problems(picture, asked)
        return found

    def thumbnail(self, name: str, side: int) -> Image.Image:
        """Of at most `side` pixels, the whole picture. Raises DatasetError."""
        picture = load_picture(self.found(name).path)
        picture.thumbnail((side, side))
        return picture

    def found(self, name: str) -> Found:
        """Raises DatasetError."""
        if name not in self.by_name:
            raise DatasetError(f"There is no picture {name[:200]!r} in {self.folder.name}. Look at the folder anew.")
        if self.names[name] > 1:  # names are shown with plain spaces, and without what cannot be printed
            raise DatasetError(f"{self.names[name]} files look as if they were called {name!r}. Rename them.")
        return self.by_name[name]

    def write(self, name: str, caption: str, was: str):
        """Write a picture's caption into its text file, whole or not at all. was: what its person saw there.

        Raises CaptionChangedError where it is something else by now, DatasetError for what is no text and where a
        link leads out.
        """
        one, root = self.found(name), os.path.realpath(self.folder)
        # the text file that counts first; where it has none, the one of its name that will
        path = one.captions[0] if one.captions else one.path.with_suffix(".txt")
        if len(caption) > LONGEST or "\0" in caption or not words.is_text(caption):
            raise DatasetError(f"A caption is text of at most {LONGEST:,} letters; this is none.")
        if not Path(os.path.realpath(path)).is_relative_to(root):
            raise DatasetError(f"{path.name} lies behind a link out of {self.folder.name}. Write it where it lies.")
        known = Known(None, self.folder)
        now = _caption(one, self.listing, known)
        if now != was.strip():
            raise CaptionChangedError(f"The caption of {name} was changed meanwhile: it is {now[:300]!r} now.", now)
        if not caption.strip() and (next_one := _caption(replace(one, captions=one.captions[1:]), self.listing, known)):
            raise DatasetError(
                f"{name} has another caption behind this one ({next_one[:100]!r}, in a .caption file, a row of "
                "metadata or a JSON file), which would count then. Take that away first."
            )
        try:
            files.write(path, f"{caption.strip()}\n".encode())
        except OSError as error:
            raise DatasetError(f"{path.name} cannot be written: {error.strerror}. {files.advice(error)}") from error


def _caption(one: Found, listing: Listing, known: Known) -> str:
    return one.caption(listing.old, known)[0].replace("\r\n", "\n").strip()


def _looked_at(one: Found, asked: Asked, listing: Listing, known: Known) -> tuple[Picture, str]:
    """(a picture without its problems, what it looks like: see `fingerprint`; nothing of one that cannot be read)."""
    picture = Picture(one.name, _time(one.path), one.repeats)
    image: list[Image.Image] = []

    def opened() -> Image.Image:
        if not image:
            image.append(load_picture(one.path))
        return image[0]

    try:
        picture.caption = _caption(one, listing, known)
        picture.trained = apply_trigger(picture.caption, one_line(asked.trigger)) or one.words
        width, height = known.get(one.path, "size", lambda: list(opened().size))
        seen = known.get(one.path, "looks", lambda: fingerprint(opened()))
        picture.size = width, height
        picture.mask = find_mask(one, picture.size, asked.masks, known) is not None
        picture.sizes = _sizes(picture.size, asked)
        return picture, seen
    except (ZTurboError, OSError) as error:
        picture.sentence = str(error)
        return picture, ""


def _time(path: Path) -> int:
    try:
        return int(path.stat().st_mtime)
    except OSError:
        return 0


def _sizes(size: tuple[int, int], asked: Asked) -> list[tuple[int, int]]:
    """Raises DatasetError."""
    try:
        return list(dict.fromkeys(bucket(*size, one, asked.upscale) for one in sorted(asked.resolutions)))
    except ValueError as error:
        raise DatasetError(f"{error}: at least {SMALLEST} pixels a side are needed. Use a larger one.") from error


def _problems(picture: Picture, asked: Asked) -> list[str]:
    trigger, caption = one_line(asked.trigger), picture.caption
    has_trigger = bool(words.PLACE.search(caption)) or words.has_word(caption, trigger)
    is_read = bool(picture.sizes)
    said = {
        BROKEN: bool(picture.sentence),
        SMALL: is_read and picture.size[0] * picture.size[1] < ENOUGH * min(asked.resolutions) ** 2,
        CUT: is_read and cropped_share(*picture.size, picture.sizes[-1]) > CROPPED,
        ALIKE: bool(picture.alike),
        SILENT: not picture.sentence and not caption,
        NO_TRIGGER: bool(trigger and caption) and not has_trigger,
    }
    return [problem for problem in PROBLEMS if said[problem]]


def fingerprint(picture: Image.Image) -> str:
    """A perceptual hash, as hexadecimals: whether brightness falls from each place to its neighbour (64 bits), and the
    colours of a small picture of 4 x 4."""
    gray = np.asarray(picture.convert("L").resize((HASH + 1, HASH), Image.Resampling.BOX), np.int16)
    bits = np.packbits(gray[:, 1:] < gray[:, :-1]).tobytes()
    colours = np.asarray(picture.convert("RGB").resize((COLOURS, COLOURS), Image.Resampling.BOX), np.uint8)
    return (bits + colours.tobytes()).hex()


def _note_alike(pictures: Sequence[Picture], prints: Sequence[str]):
    """Name to each picture those that look the same. Of very many none is."""
    whole = [number for number, seen in enumerate(prints) if seen]
    if len(whole) > COMPARED or len(whole) < 2:
        return
    raw = np.stack([np.frombuffer(bytes.fromhex(prints[number]), np.uint8) for number in whole])
    bits, colours = np.unpackbits(raw[:, :HASH], axis=1).astype(np.int16), raw[:, HASH:].astype(np.int16)
    for place, number in enumerate(whole[:-1]):
        behind = slice(place + 1, None)
        apart = np.abs(bits[behind] - bits[place]).sum(1)
        near = np.abs(colours[behind] - colours[place]).mean(1)
        for other in np.flatnonzero((apart <= NEAR_BITS) & (near <= NEAR_COLOURS)):
            twin = whole[place + 1 + int(other)]
            pictures[number].alike.append(pictures[twin].name)
            pictures[twin].alike.append(pictures[number].name)


def page(pictures: Sequence[Picture], only: str, first: int) -> dict:
    """Those from number `first` on that have the problem `only` ("any" for one of them; empty: all), for the page.

    counts: how many have each problem.
    """
    counts = {problem: sum(problem in one.problems for one in pictures) for problem in PROBLEMS}
    wanted = [one for one in pictures if only in ("", *one.problems) or (only == "any" and one.problems)]
    first = max(0, min(first, len(wanted) - 1)) // PAGE * PAGE
    shown = [{**vars(one)} for one in wanted[first : first + PAGE]]
    return {"total": len(pictures), "wanted": len(wanted), "first": first, "counts": counts, "pictures": shown}
