"""A folder of pictures and captions, as the trainer wants it: checked, captioned, fitted to buckets."""

import contextlib
import gc
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image, ImageOps

from . import files
from .buckets import SMALLEST, bucket, cropped_share
from .cache import Cache
from .captions import Captions, apply_trigger, need_words, one_line, tag_orders
from .errors import DatasetError
from .family import Z_IMAGE, Family
from .folder import DOUBTED, Found, Listing, look_through
from .known import Known
from .picturefile import has_transparency, load_mask, load_picture, on_white
from .recipe import Data

CHOICE = re.compile(r"\{[^{}]*\|[^{}]*\}")
# how a file becomes pixels: a higher number where that is another way, here or in picturefile
READING = (1, PIL.__version__)
CROPPED = 20  # most cropped pictures that a report names
DEFAULTS = Data()


@dataclass(frozen=True)
class Item:
    """One picture.

    source: a file, or a uint8 array [H, W, 3] that came through the graph. size: bucket, (width, height).
    """

    name: str
    source: Path | np.ndarray
    caption: str
    size: tuple[int, int]
    cropped: float = 0.0  # share of the picture's area that the bucket cuts away, 0 to 1
    repeats: int = 1  # times that it is shown in an epoch
    regularisation: bool = False  # a picture of the kind at large, shown so that it is not forgotten
    dropout: float | None = None  # its own caption dropout, 0 to 1; None: the dataset's
    mask_file: Path | None = None  # white: what counts; the picture itself where its transparency is the mask
    content: str = ""  # sha256 of the file or the array; copies are held out together
    mask_content: str = ""  # sha256 of the mask's file

    @property
    def key(self) -> tuple:
        """All that `pixels` are a function of, for the cache."""
        assert self.content, "an item of a dataset knows its content"
        return "picture", READING, self.content, self.size

    def pixels(self, mirrored: bool = False) -> np.ndarray:
        """[H, W, 3] float32 in 0..1, resized and centre-cropped to the bucket.

        Raises DatasetError for a file that is not what it was when the folder was read.
        """
        image = load_picture(self.source) if isinstance(self.source, Path) else Image.fromarray(self.source)
        _need_unchanged(self.source, self.content)
        image = ImageOps.fit(image, self.size, Image.Resampling.LANCZOS)
        return np.asarray(ImageOps.mirror(image) if mirrored else image, dtype=np.float32) / 255.0

    def mask(self, outside: float, reduction: int = Z_IMAGE.reduction) -> torch.Tensor | None:
        """[1, H / reduction, W / reduction] weights of the loss, of mean 1. None without a mask.

        They are `outside` where the mask is black against 1 where it is white. Raises DatasetError as `pixels` does.
        """
        if self.mask_file is None:
            return None
        mask = load_mask(self.mask_file, self.mask_file == self.source)
        _need_unchanged(self.mask_file, self.mask_content)
        fitted = ImageOps.fit(mask, self.size, Image.Resampling.LANCZOS)
        small = fitted.resize((self.size[0] // reduction, self.size[1] // reduction), Image.Resampling.BOX)
        weight = outside + (1 - outside) * torch.from_numpy(np.asarray(small, dtype=np.float32) / 255.0)[None]
        return weight / weight.mean().clamp_min(1e-6)


@dataclass(frozen=True)
class Dataset:
    """Pictures ready to train on, and what a person should know about them."""

    items: tuple[Item, ...]
    trigger: str = ""
    options: Data = DEFAULTS
    notes: tuple[str, ...] = field(default=())
    folder: str = ""  # that the pictures came from; empty: through the graph
    resolutions: tuple[int, ...] = ()  # pixels, as asked for
    regularisation: str = ""  # folder of the regularisation pictures

    def buckets(self) -> dict[tuple[int, int], int]:
        """(width, height) -> number of pictures."""
        counts: dict[tuple[int, int], int] = {}
        for item in self.items:
            counts[item.size] = counts.get(item.size, 0) + 1
        return dict(sorted(counts.items()))

    def held_out(self) -> set[int]:
        """Numbers of the pictures that are only looked at: the validation share, a function of the names.

        At least one where there is a share. Copies of one picture stay together.
        """
        if not self.options.validation:
            return set()
        groups: dict[str, set[str]] = {}
        for item in self.items:
            if not item.regularisation:
                groups.setdefault(item.content if self.folder else item.name, set()).add(item.name)
        total = sum(map(len, groups.values()))
        count = min(max(1, round(self.options.validation * total)), total - 1)
        chosen: set[str] = set()
        for copies in sorted(groups.values(), key=_first_hash):
            if len(chosen) < count and len(chosen) + len(copies) < total:
                chosen |= copies
        return {number for number, item in enumerate(self.items) if item.name in chosen and not item.regularisation}

    def dropout(self, number: int) -> float:
        """Chance that picture `number` is shown with its caption dropped."""
        item = self.items[number]
        if item.regularisation:
            return 0.0
        return self.options.caption_dropout if item.dropout is None else item.dropout

    def captions(self) -> Captions:
        """Every caption that training may show."""
        return self._captions

    @cached_property
    def _captions(self) -> Captions:
        shown = [self._variants(item.caption) for item in self.items]
        dropped = (self.trigger,) if any(self.dropout(number) for number in range(len(self.items))) else ()
        texts = sorted({text for variants in (*shown, dropped) for text in variants})
        number = {text: n for n, text in enumerate(texts)}
        return Captions(
            tuple(texts),
            tuple(tuple(number[text] for text in variants) for variants in shown),
            number[self.trigger] if dropped else None,
        )

    def _variants(self, caption: str) -> tuple[str, ...]:
        return tag_orders(caption, self.options.keep_tags) if self.options.shuffle_tags else (caption,)

    def digest(self) -> str:
        """sha256 over what is trained on: trigger word, captions, sizes, and the content of the pictures."""
        total = hashlib.sha256(self.trigger.encode())
        for item in self.items:
            shown = item.size, item.repeats, item.regularisation, item.dropout
            total.update(repr((item.caption, *shown, item.content, item.mask_content)).encode())
        return total.hexdigest()[:32]

    def doubt(self) -> str:
        """What is probably not meant, or nothing."""
        doubted = [item for item in self.items if item.repeats > DOUBTED]
        return _often(max(doubted, key=lambda item: item.repeats)) if doubted else ""

    def report(self) -> str:
        """What a person should know before training.

        How many pictures, how large, what is cut away, what is special, what is not used.
        """
        buckets = ", ".join(f"{w}x{h}: {n}" for (w, h), n in self.buckets().items())
        held_out = self.held_out()
        shown = sum(item.repeats for number, item in enumerate(self.items) if number not in held_out)
        pictures = len({(item.name, item.regularisation) for item in self.items})
        lines = [f"{pictures} {'picture' if pictures == 1 else 'pictures'}, {shown} an epoch. Buckets: {buckets}."]
        special = {
            "masked": sum(item.mask_file is not None for item in self.items),
            "for regularisation": sum(item.regularisation for item in self.items),
            "held out for validation": len(held_out),
        }
        if any(special.values()):
            lines.append(", ".join(f"{count} {what}" for what, count in special.items() if count) + ".")
        return "\n".join([*lines, self._cropped(), *self.notes])

    def _cropped(self) -> str:
        cropped = sorted((item for item in self.items if item.cropped >= 0.005), key=lambda item: -item.cropped)
        if not cropped:
            return "Nothing is cropped."
        more = f" and {len(cropped) - CROPPED} more" if len(cropped) > CROPPED else ""
        return f"Cropped: {', '.join(f'{item.name} {item.cropped:.0%}' for item in cropped[:CROPPED])}{more}."


def _first_hash(names: set[str]) -> bytes:
    return min(hashlib.sha256(name.encode()).digest() for name in names)


Shape = tuple[int, ...]


@dataclass(frozen=True)
class Encoded:
    """What a host makes of a dataset, on the CPU.

    latents: one a picture, [V, C, h, w] fp32 in model space: as it is and, where flips are asked for, mirrored.
    known: their shapes, where they are read from the disk when a step needs them.
    """

    latents: Sequence[torch.Tensor]
    known: Sequence[Shape] = ()

    @cached_property
    def shapes(self) -> list[Shape]:
        """One a picture."""
        return list(self.known or (tuple(views.shape) for views in self.latents))


def latent_keys(
    cache: Cache, autoencoder: str, item: Item, flip: bool, encode: Callable[[np.ndarray], torch.Tensor]
) -> tuple[str, ...]:
    """Of a picture's latents in the cache: as it is and, where flips are asked for, mirrored.

    autoencoder: tells autoencoders apart. encode: of pixels [H, W, 3].
    """

    def need(mirrored: bool) -> str:
        return cache.need(("latent", autoencoder, *item.key, mirrored), lambda: encode(item.pixels(mirrored)))

    return (need(False), need(True)) if flip else (need(False),)


def encoded_shapes(dataset: Dataset, latents: Sequence[torch.Tensor]) -> list[Shape]:
    """Of all latents. Those of one bucket have one shape, so a picture of each is looked at."""
    firsts = {item.size: number for number, item in reversed(list(enumerate(dataset.items)))}
    shapes = {size: tuple(latents[number].shape) for size, number in firsts.items()}
    return [shapes[item.size] for item in dataset.items]


def find_mask(picture: Found, size: tuple[int, int], masks: str, known: Known) -> Path | None:
    """Where the mask of a picture of this size is: a file, or the picture itself.

    Raises DatasetError for a mask of another shape.
    """
    if masks == "off":
        return None
    if (file := picture.mask) is not None:
        width, height = known.get(file, "mask", lambda: list(load_mask(file).size))
        if abs(width * size[1] - height * size[0]) > 0.02 * width * size[1]:
            raise DatasetError(_mask_of_another_shape(file.name, (width, height), size))
        return file
    if masks == "files and alpha" and known.get(picture.path, "transparent", lambda: _lets_through(picture.path)):
        return picture.path
    return None


def _lets_through(path: Path) -> bool:
    """Is some of a picture transparent? Raises DatasetError."""
    return has_transparency(path) and bool(np.asarray(load_mask(path, alpha=True)).min() < 255)


def _need_unchanged(source: Path | np.ndarray, content: str):
    """Raise DatasetError for a file that has another content by now."""
    if isinstance(source, Path) and content and files.sha256(source) != content:
        raise DatasetError(_changed(source.name))


@dataclass(frozen=True)
class Way:
    """How folders are read. cache: where it is kept what was read of files."""

    resolutions: tuple[int, ...]
    options: Data
    family: Family
    cache: Path | None


def from_folder(
    folder: str | os.PathLike,
    resolutions: tuple[int, ...],
    trigger: str = "",
    options: Data = DEFAULTS,
    regularisation: str | os.PathLike | None = None,
    family: Family = Z_IMAGE,
    cache: Path | None = None,
) -> Dataset:
    """Every picture of a folder and of its sub-folders, with its caption and mask.

    Those of a regularisation folder are beside them, without the trigger word. cache: a folder in which it is kept what
    was read of files; of those that have not changed nothing is read then but the times. Raises DatasetError, naming
    the files, for an empty folder, pictures or captions that cannot be read or are too small, and pictures left without
    any words.
    """
    trigger = one_line(trigger)
    beside = None if regularisation is None else Path(regularisation)
    way = Way(resolutions, options, family, cache if options.cache else None)
    items, notes = _read_folder(Path(folder), way, trigger, beside)
    more: list[Item] = []
    if beside is not None:
        more, more_notes = _read_folder(beside, way, regularisation=True)
        need_words(more)
        notes += more_notes
    need_words(items)
    apart = "" if regularisation is None else str(regularisation)
    return Dataset((*items, *more), trigger, options, tuple(notes), str(folder), resolutions, apart)


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Python's garbage collector rests. It is set off by every new object, and looks at all that stay each time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@uncollected()
def _read_folder(
    folder: Path, way: Way, trigger: str = "", but: Path | None = None, regularisation: bool = False
) -> tuple[list[Item], list[str]]:
    """Items and notes of a folder; what lies in `but` is left alone."""
    listing, known = look_through(folder, but), Known(way.cache, folder)
    firsts, items, faults, from_json = [], [], [], []
    for picture in listing.pictures:
        try:
            caption, is_json = picture.caption(listing.old, known)
            if is_json and picture.json is not None:
                from_json.append((picture.json, caption))
            one = _item(picture, way.options, known, apply_trigger(caption, trigger) or picture.words)
            if regularisation:
                one = replace(one, name=f"{folder.name}/{one.name}", regularisation=True)
            firsts.append(one)
            items += _fitted(one, way.resolutions, way.options.upscale, way.family.grain)
        except DatasetError as error:
            faults.append(str(error))
    known.save()
    if faults:
        raise DatasetError(f"{len(faults)} of {len(listing.pictures)} pictures cannot be used. " + " ".join(faults[:5]))
    _note(listing, firsts, from_json, way.options)
    return items, listing.notes


def _item(picture: Found, options: Data, known: Known, caption: str) -> Item:
    """A picture of a folder, its size still its own. Raises DatasetError for what cannot be read."""
    width, height = known.get(picture.path, "size", lambda: list(load_picture(picture.path).size))
    mask = find_mask(picture, (width, height), options.masks, known)
    return Item(
        picture.name,
        picture.path,
        caption,
        (width, height),
        repeats=picture.repeats,
        dropout=picture.row.caption_dropout,
        mask_file=mask,
        content=known.sha256(picture.path),
        mask_content="" if mask is None else known.sha256(mask),
    )


def _note(listing: Listing, firsts: list[Item], from_json: list[tuple[Path, str]], options: Data):
    """Note what is used in a way that one might not expect. firsts: an item for each picture."""
    seen: dict[str, str] = {}
    copies = (item.name for item in firsts if seen.setdefault(item.content, item.name) != item.name)
    choices = (item.name for item in firsts if "|||" in item.caption or CHOICE.search(item.caption))
    of_folder = (one.name for one, item in zip(listing.pictures, firsts) if item.caption == one.words != "")
    listing.note(copies, "pictures are copies of another")
    listing.note((path for path, caption in from_json if caption), "captions are from JSON files")
    listing.note((path for path, caption in from_json if not caption), "JSON files hold no caption and are not used")
    listing.note(choices, "captions have ||| or {a|b} in them, which is trained as it stands")
    listing.note(of_folder, "pictures have the words of their folder's name as caption")
    if options.masks == "off":
        listing.note((one.mask for one in listing.pictures if one.mask), "masks are not used, as masks is off")
    listing.note(listing.old, "texts are no UTF-8 and were read as Windows-1252", ". See whether the letters are right")


def from_arrays(
    images: list[np.ndarray],
    captions: list[str],
    resolutions: tuple[int, ...],
    trigger: str = "",
    options: Data = DEFAULTS,
    family: Family = Z_IMAGE,
) -> Dataset:
    """Pictures [H, W, 1, 3 or 4] uint8 that came through the graph, with one caption each or one for all.

    Raises DatasetError.
    """
    captions, trigger = captions or [""], one_line(trigger)
    if len(captions) not in (1, len(images)):
        raise DatasetError(_pictures_and_captions(len(images), len(captions)))
    captions = captions * len(images) if len(captions) == 1 else captions
    items = []
    for number, (given, caption) in enumerate(zip(images, captions)):
        image = of_three(given)
        size = image.shape[1], image.shape[0]
        content = hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest()
        one = Item(f"picture {number + 1}", image, apply_trigger(caption, trigger), size, content=content)
        items += _fitted(one, resolutions, options.upscale, family.grain)
    if not items:
        raise DatasetError("No pictures came in. Connect pictures or give a folder.")
    need_words(items)
    return Dataset(tuple(items), trigger, options)


def of_three(image: np.ndarray) -> np.ndarray:
    """[H, W, 3] of an array of one, three or four channels: gray three times, transparency laid on white.

    Raises DatasetError.
    """
    channels = image.shape[2] if image.ndim == 3 else 0
    if channels not in (1, 3, 4):
        raise DatasetError(_no_picture_of_that_shape(image.shape))
    if channels == 1:
        return np.repeat(image, 3, 2)
    return np.asarray(on_white(Image.fromarray(image, "RGBA"))) if channels == 4 else image


def _fitted(item: Item, resolutions: tuple[int, ...], upscale: bool, grain: int) -> list[Item]:
    """A picture (whose size is still its own) at each resolution; those that come out alike fall together.

    Raises DatasetError for one that is too small.
    """
    try:
        sizes = dict.fromkeys(bucket(*item.size, resolution, upscale, grain) for resolution in sorted(resolutions))
    except ValueError as error:
        needed = f"at least {SMALLEST} pixels a side are needed"
        raise DatasetError(f"{item.name}: {error}; {needed}. Use a larger picture.") from error
    return [replace(item, size=size, cropped=cropped_share(*item.size, size)) for size in sizes]


# What is said of pictures


def _often(item: Item) -> str:
    return (
        f"{item.name} is shown {item.repeats:,} times an epoch, as the number in its folder's name says. "
        "If that is a date, rename the folder."
    )


def _changed(file: str) -> str:
    return f"{file} was changed while it was used. Queue again, so that it is read anew."


def _mask_of_another_shape(mask: str, size: tuple[int, int], of_picture: tuple[int, int]) -> str:
    (w, h), (width, height) = size, of_picture
    return f"The mask {mask} is {w}x{h}, its picture {width}x{height}: another shape. Make them alike."


def _pictures_and_captions(pictures: int, captions: int) -> str:
    return (
        f"There are {pictures} pictures and {captions} captions. "
        "Give one caption a picture, one a line, or a single one for all."
    )


def _no_picture_of_that_shape(shape: tuple[int, ...]) -> str:
    return f"A picture came in as an array of the shape {shape}; it must be height, width and 1, 3 or 4 channels."
