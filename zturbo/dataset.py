"""A folder of pictures and captions, as the trainer wants it: checked, captioned, fitted to buckets."""

import hashlib
import json
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from . import flow
from .errors import DatasetError
from .recipe import Data

PICTURES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif")
CAPTIONS = (".txt", ".caption")
METADATA = "metadata.jsonl"
ORDERS = 8  # of shuffled tags, for each caption: each is encoded once
PLACE = "[trigger]"  # where the trigger word goes in a caption
GRAIN = 16  # pixels: latents are an eighth, and NextDiT takes patches of two
SMALLEST = 32  # pixels on the shorter side


@dataclass(frozen=True)
class Item:
    """One picture. source: a file, or a uint8 array [H, W, 3] that came through the graph. size: bucket, (width, height)."""

    name: str
    source: Path | np.ndarray
    caption: str
    size: tuple[int, int]
    cropped: float  # share of the picture's area that the bucket cuts away, 0 to 1
    repeats: int = 1  # times that it is shown in an epoch

    def pixels(self) -> np.ndarray:
        """[H, W, 3] float32 in 0..1, resized and centre-cropped to the bucket."""
        image = load_picture(self.source) if isinstance(self.source, Path) else Image.fromarray(self.source)
        fitted = ImageOps.fit(image, self.size, Image.Resampling.LANCZOS)
        return np.asarray(fitted, dtype=np.float32) / 255.0


@dataclass(frozen=True)
class Dataset:
    """Pictures ready to train on, and what a person should know about them."""

    items: tuple[Item, ...]
    trigger: str = ""
    options: Data = Data()
    notes: tuple[str, ...] = field(default=())

    def buckets(self) -> dict[tuple[int, int], int]:
        """(width, height) -> number of pictures."""
        counts: dict[tuple[int, int], int] = {}
        for item in self.items:
            counts[item.size] = counts.get(item.size, 0) + 1
        return dict(sorted(counts.items()))

    def captions(self) -> "Captions":
        """Every caption that training may show."""
        options = self.options
        shown = [tag_orders(item.caption, options.keep_tags) if options.shuffle_tags else (item.caption,) for item in self.items]
        dropped = (self.trigger,) if options.caption_dropout else ()
        texts = sorted({text for variants in (*shown, dropped) for text in variants})
        number = {text: n for n, text in enumerate(texts)}
        return Captions(tuple(texts), tuple(tuple(number[text] for text in variants) for variants in shown), number[self.trigger] if dropped else None)

    def digest(self) -> str:
        """sha256 over what is trained on: captions, sizes, and the bytes of the pictures."""
        total = hashlib.sha256()
        for item in self.items:
            total.update(repr((item.caption, item.size, item.repeats)).encode())
            total.update(item.source.read_bytes() if isinstance(item.source, Path) else item.source.tobytes())
        return total.hexdigest()[:32]

    def report(self) -> str:
        buckets = ", ".join(f"{w}x{h}: {n}" for (w, h), n in self.buckets().items())
        shown = sum(item.repeats for item in self.items)
        worst = max(self.items, key=lambda item: item.cropped)
        lines = [f"{len(self.items)} pictures, {shown} an epoch. Buckets: {buckets}.", f"Most cropped: {worst.name}, {worst.cropped:.0%} of its area."]
        return "\n".join([*lines, *self.notes])


@dataclass(frozen=True)
class Captions:
    """texts: all that there are. of: for each picture the numbers of the texts it may be shown with. dropped: number of the text that stands in for a dropped caption."""

    texts: tuple[str, ...]
    of: tuple[tuple[int, ...], ...]
    dropped: int | None


@dataclass(frozen=True)
class Encoded:
    """What a host makes of a dataset, on the CPU.

    latents: one a picture, [V, 16, h, w] fp32 in model space: as it is and, where flips are asked for, mirrored.
    lengths: of each caption text, in tokens as the model's layers see them (padded).
    """

    latents: list[torch.Tensor]
    lengths: list[int]


def tag_orders(caption: str, keep: int) -> tuple[str, ...]:
    """The caption and up to seven other orders of its tags, the first `keep` in front; a function of the caption alone."""
    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    front, rest = tags[:keep], tags[keep:]
    orders = [", ".join(tags)]
    for n in range(ORDERS - 1):
        mixed = [rest[i] for i in torch.randperm(len(rest), generator=flow.generator("tags", caption, n)).tolist()]
        orders.append(", ".join([*front, *mixed]))
    return tuple(dict.fromkeys(orders))


def bucket(width: int, height: int, resolution: int) -> tuple[int, int]:
    """The size to train at: the picture's aspect ratio at an area of resolution², multiples of 16, never enlarged.

    Raises ValueError when the shorter side would fall under 32 pixels.
    """
    scale = min(1.0, resolution / math.sqrt(width * height))
    fit = lambda side: max(GRAIN, round(side * scale / GRAIN) * GRAIN)  # noqa: E731
    size = fit(width), fit(height)
    size = tuple(min(s, side // GRAIN * GRAIN) for s, side in zip(size, (width, height)))
    if min(size) < SMALLEST:
        raise ValueError(f"{width}x{height} pixels is too small")
    return size


def cropped_share(width: int, height: int, size: tuple[int, int]) -> float:
    """Share of the area that a centre crop to size's aspect ratio cuts away."""
    have, want = width / height, size[0] / size[1]
    return 1 - min(have, want) / max(have, want)


def load_picture(path: Path) -> Image.Image:
    """An RGB picture: turned as its EXIF says, 16 bits scaled to 8, CMYK converted, transparency laid on white, first frame of a film.

    Raises DatasetError for what Pillow cannot read whole.
    """
    try:
        with Image.open(path) as opened:
            opened.seek(0)
            opened.load()
            image = ImageOps.exif_transpose(opened)
            return to_rgb(image)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DatasetError(f"{path.name} cannot be read as a picture ({error}). Repair it or take it out of the folder.") from error


def to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):  # 16-bit gray
        deep = np.asarray(image).astype(np.float64)
        top = 65535.0 if deep.max() > 255 else 255.0
        return Image.fromarray((deep / top * 255).round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(ground, image).convert("RGB")
    return image.convert("RGB")


def apply_trigger(caption: str, trigger: str) -> str:
    """The trigger word where `[trigger]` stands, else in front, unless the caption already has it."""
    if not trigger:
        return caption.strip()
    if PLACE in caption:
        return caption.replace(PLACE, trigger).strip()
    if re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption, re.IGNORECASE):
        return caption.strip()
    return f"{trigger}, {caption.strip()}" if caption.strip() else trigger


def read_caption(picture: Path) -> str:
    """The text beside a picture (`.txt`, then `.caption`), or nothing. Raises DatasetError for what is not UTF-8 text."""
    for ending in CAPTIONS:
        path = picture.with_suffix(ending)
        if path.is_file():
            try:
                return path.read_text(encoding="utf-8-sig").strip()
            except (UnicodeDecodeError, OSError) as error:
                raise DatasetError(f"The caption {path.name} cannot be read as UTF-8 text ({error}). Save it as UTF-8.") from error
    return ""


def from_folder(folder: str | os.PathLike, resolutions: tuple[int, ...], trigger: str = "", options: Data = Data()) -> Dataset:  # noqa: B008
    """Every picture of a folder and of its sub-folders, with its caption.

    Captions come from a text file of the same name, or from a `metadata.jsonl` (Hugging Face's imagefolder:
    file_name, and text or caption). A sub-folder named `10_name` is shown ten times an epoch. resolutions: sides in
    pixels of the squares whose areas the buckets have; each picture is trained at each of them that it is large
    enough for, and at the smallest at any rate. Raises DatasetError, naming the files, for no pictures, pictures that
    cannot be read or are too small, and pictures left without any words.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DatasetError(f"The folder {folder} does not exist. Put 10 to 30 pictures into a folder inside ComfyUI's input folder and give its name.")
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts))
    pictures = [path for path in files if path.suffix.lower() in PICTURES]
    if not pictures:
        raise DatasetError(f"The folder {folder} has no pictures ({', '.join(PICTURES)}). Put 10 to 30 pictures into it.")
    items, faults, notes = [], [], []
    listed = {path: text for file in files if file.name == METADATA for path, text in read_metadata(file).items()}
    for path in pictures:
        try:
            caption = apply_trigger(read_caption(path) or listed.get(path, ""), trigger)
            size, repeats = load_picture(path).size, repeats_of(path.parent, folder)
            items += _items(str(path.relative_to(folder)), path, size, caption, resolutions, repeats)
        except DatasetError as error:
            faults.append(str(error))
    if faults:
        raise DatasetError(f"{len(faults)} of {len(pictures)} pictures cannot be used. " + " ".join(faults[:5]))
    _need_words(items)
    stems = {path.with_suffix("") for path in pictures}
    lonely = [path.name for path in files if path.suffix.lower() in CAPTIONS and path.with_suffix("") not in stems]
    if lonely:
        notes.append(f"{len(lonely)} captions have no picture and are not used: {', '.join(lonely[:3])}.")
    absent = [path.name for path in listed if path not in pictures]
    if absent:
        notes.append(f"{len(absent)} pictures of {METADATA} are not there: {', '.join(absent[:3])}.")
    strange = [path.name for path in files if path.suffix.lower() not in PICTURES + CAPTIONS and path.name != METADATA]
    if strange:
        notes.append(f"{len(strange)} files are not read: {', '.join(strange[:3])}. Pictures end in {', '.join(PICTURES)}.")
    return Dataset(tuple(items), trigger, options, tuple(notes))


def read_sides(text: str) -> tuple[int, ...]:
    """Resolutions, in pixels, with commas between. Raises DatasetError."""
    sides = []
    for word in filter(None, (part.strip() for part in text.split(","))):
        if not word.isdecimal() or not 64 <= int(word) <= 4096:
            raise DatasetError(f"{word!r} is no resolution. Give whole numbers of pixels from 64 to 4096 with commas between, for example 512, 768.")
        sides.append(int(word))
    return tuple(sides)


def repeats_of(folder: Path, root: Path) -> int:
    """`10_name` means ten times; the nearest such folder counts, the given one included."""
    for place in (folder, *folder.parents):
        found = re.match(r"(\d{1,4})_", place.name)
        if found and int(found[1]) > 0:
            return int(found[1])
        if place == root:
            break
    return 1


def read_metadata(file: Path) -> dict[Path, str]:
    """Captions of a `metadata.jsonl` by picture. Raises DatasetError, naming the line, for what is not that."""
    captions = {}
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (UnicodeDecodeError, OSError) as error:
        raise DatasetError(f"{file.name} cannot be read as UTF-8 text ({error}).") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text = row.get("text", row.get("caption", ""))
            captions[file.parent / row["file_name"]] = text.strip()
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise DatasetError(f'Line {number} of {file.name} is not {{"file_name": …, "text": …}} in JSON ({error}). Mend or delete the line.') from error
    return captions


def from_arrays(images: list[np.ndarray], captions: list[str], resolutions: tuple[int, ...], trigger: str = "", options: Data = Data()) -> Dataset:  # noqa: B008
    """Pictures [H, W, 3] uint8 that came through the graph, with one caption each or one for all. Raises DatasetError."""
    captions = captions or [""]
    if len(captions) not in (1, len(images)):
        raise DatasetError(f"There are {len(images)} pictures and {len(captions)} captions. Give one caption a picture, one a line, or a single one for all.")
    captions = captions * len(images) if len(captions) == 1 else captions
    items = []
    for number, (image, caption) in enumerate(zip(images, captions)):
        items += _items(f"picture {number + 1}", image, (image.shape[1], image.shape[0]), apply_trigger(caption, trigger), resolutions, 1)
    if not items:
        raise DatasetError("No pictures came in. Connect pictures or give a folder.")
    _need_words(items)
    return Dataset(tuple(items), trigger, options)


def _items(name: str, source, size: tuple[int, int], caption: str, resolutions: tuple[int, ...], repeats: int) -> list[Item]:
    """One picture at each resolution; those for which it would have to be enlarged fall together."""
    items = {item.size: item for item in (_item(name, source, size, caption, resolution, repeats) for resolution in sorted(resolutions))}
    return list(items.values())


def _item(name: str, source, size: tuple[int, int], caption: str, resolution: int, repeats: int) -> Item:
    try:
        fitted = bucket(*size, resolution)
    except ValueError as error:
        raise DatasetError(f"{name}: {error}; at least {SMALLEST} pixels a side are needed. Use a larger picture.") from error
    return Item(name, source, caption, fitted, cropped_share(*size, fitted), repeats)


def _need_words(items: list[Item]):
    open_place = [item.name for item in items if PLACE in item.caption]
    if open_place:
        raise DatasetError(f"{len(open_place)} captions have {PLACE} in them (for example that of {open_place[0]}), but there is no trigger word. Set one.")
    silent = [item.name for item in items if not item.caption]
    if silent:
        raise DatasetError(
            f"{len(silent)} of {len(items)} pictures have no caption (for example {', '.join(silent[:3])}). Set a trigger word, or write a .txt file with the same name beside each picture."
        )
