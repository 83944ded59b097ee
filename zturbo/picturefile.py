"""Picture files: what they really hold, and how they are read."""

import importlib
import io
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageCms, ImageFile, ImageOps, UnidentifiedImageError

from .errors import DatasetError

PICTURES = (
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif",
    ".avif", ".heic", ".heif", ".hif", ".jxl",
)  # fmt: skip
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")  # Pillow knows more, and runs programs for some (EPS)
PLUGINS = {
    "HEIF": ("HEIC", "pillow_heif", "pillow-heif"),
    "JXL": ("JPEG XL", "pillow_jxl", "pillow-jxl-plugin"),
    "AVIF": ("AVIF", "pillow_avif", "pillow-avif-plugin"),
}  # Pillow's format -> its name, module, package; newer Pillows read AVIF themselves
T = TypeVar("T")
LABELS = 8  # gray: a mask that has no lighter one holds numbers of labels
LARGEST = 120_000_000  # pixels of a picture
PNG = b"\x89PNG\r\n\x1a\n"
WORDS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")  # chunks of a PNG that are no pixels
UPRIGHT = (b"XML:com.adobe.xmp", b"Raw profile type exif")  # texts that may say which side is up
JXL_HEAD = 65536  # bytes in which the size of a JPEG XL stands
LONGEST_TEXT = 1_000_000  # bytes of such a text, or of a colour profile: Pillow takes no more
KINDS = (  # how a file begins -> what it is
    (PNG, "PNG"), (b"\xff\xd8\xff", "JPEG"), (b"GIF8", "GIF"), (b"BM", "BMP"), (b"II*\0", "TIFF"), (b"MM\0*", "TIFF"),
    (b"\xff\x0a", "JXL"), (b"\0\0\0\x0cJXL \r\n\x87\n", "JXL"), (b"\0\0\0\x0cjP  ", "a JPEG 2000 picture"),
    (b"8BPS", "a Photoshop file"), (b"gimp xcf", "a GIMP file"), (b"\x1aE\xdf\xa3", "a film (Matroska or WebM)"),
    (b"%PDF", "a PDF"), (b"%!PS", "a PostScript file"), (b"PK\x03\x04", "a zip archive"),
    (b"version https://git-lfs", "a pointer of Git LFS, not the picture itself"), (b"<svg", "an SVG drawing"),
    (b"<?xml", "an XML text"), (b"<!doctype html", "a web page"), (b"<html", "a web page"),
)  # fmt: skip


def inside(path: Path) -> str:
    """What a file is by its first bytes, whatever it is called.

    A format of Pillow's, or words for people; nothing where that is not known.
    """
    with suppress(OSError), open(path, "rb") as file:
        head = file.read(512)
        if not head:
            return "an empty file"
        if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
            return "WEBP"
        if head[4:8] == b"ftyp":
            return _by_brands(head[8 : min(len(head), max(16, int.from_bytes(head[:4], "big")))])
        start = head.lstrip().lower()
        return next((kind for begin, kind in KINDS if head.startswith(begin) or start.startswith(begin.lower())), "")
    return ""


def _by_brands(brands: bytes) -> str:
    """What a container of MP4's kind holds."""
    if b"avif" in brands or b"avis" in brands:
        return "AVIF"
    is_heif = any(brand in brands for brand in (b"hei", b"hev", b"mif1", b"msf1"))
    return "HEIF" if is_heif else "a film (MP4 or MOV)"


def can_read(kind: str) -> bool:
    """Is this a format of Pillow's own here, or one whose plug-in is installed?"""
    Image.init()
    if kind in PLUGINS and kind not in Image.OPEN:
        with suppress(ImportError):
            plugin = importlib.import_module(PLUGINS[kind][1])  # pillow_jxl registers itself
            if hasattr(plugin, "register_heif_opener"):
                plugin.register_heif_opener()
    return kind in Image.OPEN


def load_picture(path: Path) -> Image.Image:
    """An RGB picture, turned as its EXIF says; of a film the first frame.

    16 bits are scaled to 8, CMYK is converted, transparency laid on white. Raises DatasetError for what Pillow cannot
    read whole.
    """
    return _load(path, path.name, to_rgb)


def load_mask(path: Path, alpha: bool = False) -> Image.Image:
    """A gray picture, white where the loss counts: a mask file, or the transparency of the picture itself.

    Raises DatasetError, also where nothing would count.
    """
    mask = _load(path, f"The mask {path.name}", alpha_of if alpha else to_mask)
    if not np.asarray(mask).any():
        raise DatasetError(_nothing_counts(path.name, alpha))
    return mask


def alpha_of(image: Image.Image) -> Image.Image:
    return image.convert("RGBA").getchannel("A")


def to_mask(image: Image.Image) -> Image.Image:
    """Gray as it is, on black where it is transparent; 16 bits scaled to 8.

    Labels (0 and 1, or a palette of colours on its darkest) become black and white. Where the colours say nothing,
    transparency is the mask.
    """
    if transparent(image) and np.asarray(alpha_of(image)).min() < 255:
        rgba = np.asarray(image.convert("RGBA")).astype(np.uint16)
        gray, alpha = rgba[..., 0], rgba[..., 3]
        is_gray = (rgba[..., :1] == rgba[..., 1:3])[alpha > 0].all()
        return Image.fromarray((gray * alpha // 255 if is_gray and gray.min() < gray.max() else alpha).astype(np.uint8))
    if image.mode == "P":
        colours = np.asarray(image.convert("RGB")).astype(int)
        first = colours[np.asarray(image) == 0]
        if (colours[..., :1] != colours[..., 1:]).any() and len(first) and first[0].sum() == colours.sum(-1).min():
            return Image.fromarray((np.asarray(image) > 0).astype(np.uint8) * 255)
    values = np.asarray(flat(image).convert("RGB").convert("L"))
    return Image.fromarray((values > 0).astype(np.uint8) * 255 if values.max() <= LABELS else values)


def has_transparency(path: Path) -> bool:
    """Does its header say so? Raises DatasetError."""
    return _load(path, path.name, transparent, pixels=False)


def transparent(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info


@contextmanager
def whole_only() -> Iterator[None]:
    """While open, Pillow refuses pictures that are cut off.

    Some packs tell it, for good and for everyone, to fill them with gray.
    """
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def open_picture(path: Path) -> Image.Image:
    """The file's header, of a size that fits into memory. Raises ValueError, and what Pillow raises."""
    kind = inside(path)
    if kind == "JXL":
        _refuse_large(*jxl_size(path))  # its plug-in makes the whole picture at once
    formats = (*FORMATS, kind) if kind in PLUGINS and can_read(kind) else FORMATS
    opened = Image.open(io.BytesIO(without_words(path)) if kind == "PNG" else path, formats=formats)
    try:
        _refuse_large(*opened.size)
    except ValueError:
        opened.close()
        raise
    return opened


def _refuse_large(width: int, height: int):
    if width * height > LARGEST:
        raise ValueError(f"it has {width}x{height} pixels, more than {LARGEST:,}")


def jxl_size(path: Path) -> tuple[int, int]:
    """(width, height) by the header of a JPEG XL file, bare or in a container (ISO/IEC 18181-1 and -2).

    Raises ValueError where there is none.
    """
    with open(path, "rb") as file:
        raw = file.read(JXL_HEAD)
    if not raw.startswith(b"\xff\x0a"):
        # a part begins with its number
        starts = [at + skip for name, skip in ((b"jxlc", 4), (b"jxlp", 8)) if (at := raw.find(name)) >= 0]
        raw = raw[min(starts) :] if starts else b""
    if not raw.startswith(b"\xff\x0a"):
        raise ValueError("its size is not at its beginning")
    bits = int.from_bytes(raw[2:34], "little")

    def take(count: int) -> int:
        nonlocal bits
        value, bits = bits & ((1 << count) - 1), bits >> count
        return value

    def side(small: int) -> int:
        return (take(5) + 1) * 8 if small else take((9, 13, 18, 30)[take(2)]) + 1

    small = take(1)
    height, ratio = side(small), take(3)
    across, down = ((0, 1), (1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))[ratio]
    return (height * across // down if ratio else side(small)), height


def without_words(path: Path) -> bytes:
    """A PNG without its texts, which Pillow refuses where they are long: ComfyUI writes whole workflows there.

    What may say which side is up stays, and the colour profile.
    """
    raw = path.read_bytes()
    kept, at = [PNG], len(PNG)
    while at < len(raw):
        length, kind = struct.unpack_from(">I4s", raw, at) if at + 8 <= len(raw) else (len(raw), b"")
        end = at + 12 + length
        if kind not in WORDS or _is_wanted(kind, raw[at + 8 : end - 4]):
            kept.append(raw[at:end])
        at = end
    return b"".join(kept)


def _is_wanted(kind: bytes, text: bytes) -> bool:
    """Is it a colour profile or a text that may say which side is up, and no longer than Pillow takes?"""
    keyword, _, rest = text.partition(b"\0")
    if (kind != b"iCCP" and keyword not in UPRIGHT) or len(text) > LONGEST_TEXT:
        return False
    compressed = kind in (b"zTXt", b"iCCP") or (kind == b"iTXt" and rest[:1] == b"\1")
    packed = rest[1:] if kind in (b"zTXt", b"iCCP") else rest[2:].split(b"\0", 2)[-1]
    try:
        return not compressed or len(zlib.decompressobj().decompress(packed, LONGEST_TEXT)) < LONGEST_TEXT
    except zlib.error:
        return False


def _load(path: Path, called: str, convert: Callable[[Image.Image], T], pixels: bool = True) -> T:
    """The first picture of a file, whole, turned as its EXIF says and converted; or only its header.

    Raises DatasetError, which names it as `called`.
    """
    try:
        with whole_only(), open_picture(path) as opened:
            if not pixels:
                return convert(opened)
            opened.seek(0)
            opened.load()
            return convert(ImageOps.exif_transpose(opened))
    except Exception as error:  # Pillow's readers raise whatever their parts do
        raise DatasetError(f"{called} cannot be read as a picture ({_why(path, error)}") from error


def _nothing_counts(file: str, alpha: bool) -> str:
    called = f"The picture {file} is transparent" if alpha else f"The mask {file} is black"
    return f"{called} all over: nothing of the picture would count. Paint white what counts, or take the mask away."


def _why(path: Path, error: Exception) -> str:
    """The rest of the sentence: what it is instead, or what Pillow said; and what to do."""
    kind = inside(path)
    if kind in PLUGINS and not can_read(kind):
        name, _, package = PLUGINS[kind]
        return (
            f"it is {name} inside, which needs a package: run `python -m pip install {package}` with ComfyUI's Python "
            "and start ComfyUI anew, or save the picture as PNG or JPEG)."
        )
    if kind and kind not in FORMATS and kind not in PLUGINS:
        return f"it is {kind}). Put the picture itself there as PNG or JPEG, or take it out of the folder."
    if isinstance(error, UnidentifiedImageError):
        return "no kind of picture that is known). Repair it or take it out of the folder."
    return f"{error or type(error).__name__}). Repair it or take it out of the folder."


def to_rgb(image: Image.Image) -> Image.Image:
    image = in_srgb(image.convert("RGBA") if transparent(image) else flat(image))
    return on_white(image) if image.mode == "RGBA" else image.convert("RGB")


def flat(image: Image.Image) -> Image.Image:
    """Of 8 bits, and without a palette. Raises ValueError for numbers that are none."""
    if not image.mode.startswith(("I", "F")):
        return image.convert("RGB") if image.mode == "P" else image
    deep = np.asarray(image).astype(np.float32)
    if not np.isfinite(deep).all():
        raise ValueError("it holds numbers that are not finite")
    if image.mode.startswith("I;16") or deep.max() > 255:
        top = 65535.0
    else:
        top = 1.0 if image.mode == "F" and deep.max() <= 1 else 255.0
    return Image.fromarray((deep * (255.0 / top)).round().clip(0, 255).astype(np.uint8))


def on_white(image: Image.Image) -> Image.Image:
    """An RGBA picture as RGB, its transparency laid on white."""
    return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")


def in_srgb(image: Image.Image) -> Image.Image:
    """The colours that its profile means, in sRGB, which the model was trained on.

    As it is where the profile is sRGB, broken, or of another kind of picture.
    """
    raw = image.info.get("icc_profile")
    if not raw or image.mode not in ("RGB", "RGBA", "L", "CMYK"):
        return image
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(raw))
        if "srgb" in ImageCms.getProfileDescription(profile).lower():
            return image
        mode = "RGBA" if image.mode == "RGBA" else "RGB"
        intent, flags = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
        srgb = ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, profile, srgb, intent, mode, flags=flags) or image
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return image
