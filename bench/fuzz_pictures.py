"""Damaged pictures. Kinds for `bench fuzz`."""

import io
import random
import struct
import zlib
from functools import cache

import numpy as np
from PIL import Image

from bench.fuzz_damage import damage
from bench.fuzz_watch import Damaged, Place
from zturbo import dataset, picturefile
from zturbo.errors import ZTurboError
from zturbo.hosts import comfy_paths
from zturbo.recipe import MASKS, Data

TRIGGER = "zvk"
FORMATS = {"PNG": "RGB", "JPEG": "RGB", "WEBP": "RGB", "GIF": "P", "TIFF": "RGB", "BMP": "RGB", "AVIF": "RGB"}
SIDES = (80, 48)  # pixels


@cache
def pixels() -> np.ndarray:
    """[48, 80, 3] uint8: smooth, with an edge."""
    y, x = np.mgrid[: SIDES[1], : SIDES[0]]
    return np.stack((x * 3, y * 5, (x > 40) * 200), -1).astype(np.uint8)


@cache
def encoded(kind: str, variant: int = 0) -> bytes:
    """The picture as a file of this format; variants: animated, compressed otherwise, with EXIF."""
    image, content = Image.fromarray(pixels()).convert(FORMATS[kind]), io.BytesIO()
    options: dict = {}
    if variant == 1 and kind in ("GIF", "WEBP", "TIFF", "PNG"):
        options = {"save_all": True, "append_images": [image.transpose(Image.Transpose.ROTATE_180)]}
    elif variant == 2:
        exif = Image.Exif()
        exif[0x0112], exif[0x010E] = 6, "x" * 40
        options = {"exif": exif} if kind not in ("GIF", "BMP") else {}
    elif variant == 3:
        options = {"JPEG": {"progressive": True}, "TIFF": {"compression": "tiff_lzw"}, "WEBP": {"lossless": True}}.get(
            kind, {}
        )
    image.save(content, kind, **options)
    return content.getvalue()


def trained(place: Place, options: Data = Data(), sides: tuple[int, ...] = (64,)) -> dataset.Dataset:  # noqa: B008
    """The dataset in input/set, with everything that training looks at looked at."""
    found = dataset.from_folder(comfy_paths.dataset_folder("set"), sides, TRIGGER, options)
    assert found.items
    for item in found.items:
        shown = item.pixels()
        assert shown.shape == (item.size[1], item.size[0], 3) and shown.dtype == np.float32, (
            f"{shown.shape} {shown.dtype}"
        )
        assert np.isfinite(shown).all() and shown.min() >= 0 and shown.max() <= 1, (
            f"values from {shown.min()} to {shown.max()}"
        )
        assert min(item.size) >= 32 and not any(side % 16 for side in item.size), f"bucket {item.size}"
        assert TRIGGER in item.caption and "\x00" not in item.caption and item.caption.encode("utf-8"), item.caption
        mask = item.mask(options.outside)
        assert mask is None or (
            mask.shape == (1, item.size[1] // 8, item.size[0] // 8)
            and mask.isfinite().all()
            and abs(mask.mean() - 1) < 1e-3
        ), "mask"
    assert found.report() and found.captions().texts and len(found.digest()) == 32
    return found


def must(place: Place, options: Data = Data()) -> dataset.Dataset:  # noqa: B008
    """The same where there is nothing to refuse."""
    try:
        return trained(place, options)
    except ZTurboError as error:
        raise AssertionError(f"a good folder was refused: {error}") from error


def folder(place: Place, name: str, content: bytes, caption: str | None = "a thing"):
    (place.input / "set").mkdir(exist_ok=True)
    path = place.input / "set" / name
    path.write_bytes(content)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


# Pictures


def picture_bytes(rng: random.Random, place: Place) -> Damaged:
    """A picture file, damaged anywhere."""
    kind = rng.choice(list(FORMATS))
    variant = rng.randrange(4)
    what, content = damage(encoded(kind, variant), rng)
    name = "a" + rng.choice(picturefile.PICTURES)
    folder(place, name, content)
    if rng.random() < 0.2:
        folder(place, "a.mask.png", damage(encoded("PNG"), rng)[1], None)
    options = Data(masks=rng.choice(MASKS), flip=rng.random() < 0.5, upscale=rng.random() < 0.5)
    return Damaged(f"{what} of {kind} {variant} as {name}", lambda: trained(place, options))


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, bits: int, color: int, content: bytes, *more: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


@cache
def bomb(side: int) -> bytes:
    """A PNG of nothing but black, a small file and a very large picture."""
    squeezer = zlib.compressobj(9)
    row = bytes(1 + (side + 7) // 8)
    return png(side, side, 1, 0, squeezer.compress(row * side) + squeezer.flush())


def patched(content: bytes, at: int, how: str, *numbers: int) -> bytes:
    raw = struct.pack(how, *numbers)
    return content[:at] + raw + content[at + len(raw) :]


def exif(rng: random.Random) -> bytes:
    if rng.random() < 0.5:
        return rng.randbytes(rng.choice((0, 4, 30)))
    return b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01" + rng.randbytes(6) + b"\0\0\0\0"


def picture_header(rng: random.Random, place: Place) -> Damaged:
    """A header that promises what the file does not have, or another format behind a picture's name."""
    large = rng.choice((
        (0, 0), (1, 1), (65535, 65535), (30000, 3), (3, 30000), (10**5, 10**5), (2**31 - 1, 2**31 - 1),
        (12000, 12000), (16000, 11000), (31, 31), (80, 47),
    ))  # fmt: skip
    jpeg, webp = encoded("JPEG"), encoded("WEBP", 3)
    sof = jpeg.index(b"\xff\xc0") + 5
    huge_text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(80_000_000)))
    profile = chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(80_000_000)))
    black = zlib.compress(bytes(65 * 64))
    canvas = (b"WEBPVP8X", struct.pack("<I", 10), b"\2\0\0\0", b"\xff\x3f\0" * 2)
    cases = {
        "png": lambda: png(*large, rng.choice((1, 8, 16, 3)), rng.choice((0, 2, 3, 6, 9)), zlib.compress(bytes(1000))),
        "bomb": lambda: bomb(rng.choice((9000, 14000, 20000, 60000))) if rng.random() < 0.3 else encoded("PNG"),
        "bmp": lambda: patched(encoded("BMP"), 18, "<ii", large[0] % 2**31, rng.choice((1, -1)) * (large[1] % 2**31)),
        "gif": lambda: patched(encoded("GIF"), 6, "<HH", min(large[0], 65535), min(large[1], 65535)),
        "jpeg": lambda: patched(jpeg, sof, ">HH", min(large[1], 65535), min(large[0], 65535)),
        "webp": lambda: patched(webp, 21, "<I", rng.randrange(2**32)),
        "webp canvas": lambda: b"".join((b"RIFF", struct.pack("<I", len(webp) + 10), *canvas, webp[12:])),
        "text bomb": lambda: png(64, 64, 8, 0, black, huge_text),
        "profile bomb": lambda: png(64, 64, 8, 0, black, profile),
        "exif": lambda: png(64, 64, 8, 0, black, chunk(b"eXIf", exif(rng))),
        "eps": lambda: (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n(x) (w) file\nshowpage\n%%EOF\n"
        ),
        "svg": lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "xbm": lambda: b"#define a_width 64\n#define a_height 64\nstatic char a_bits[] = {" + b"0x00, " * 512 + b"};",
        "ppm": lambda: b"P6 64 64 255\n" + bytes(64 * 64 * 3),
        "pcd": lambda: bytes(2048) + b"PCD_" + bytes(800_000),
        "tiff strips": lambda: encoded("TIFF").replace(
            struct.pack("<HHII", 0x0111, 4, 1, 8), struct.pack("<HHII", 0x0111, 4, 1, rng.randrange(2**32))
        ),
    }
    what = rng.choice(list(cases))
    folder(place, "a" + rng.choice((".png", ".jpg", ".gif", ".tif", ".webp")), cases[what]())
    return Damaged(f"{what} {large}", lambda: trained(place, Data(masks="files and alpha")))


def picture_modes(rng: random.Random, place: Place) -> Damaged:
    """A whole picture of an odd mode, which must come out as a person sees it."""
    level = rng.choice((0, 60, 128, 200, 255))
    flat = np.full((64, 96), level, np.uint8)
    shade = level / 255
    clear = {"transparency": 0}
    cases = {
        "1": lambda: (Image.fromarray((flat > 127).astype(np.uint8) * 255).convert("1"), "png", {}, float(level > 127)),
        "L": lambda: (Image.fromarray(flat), rng.choice(("png", "jpg", "tif", "bmp", "gif")), {}, shade),
        "P": lambda: (Image.fromarray(flat).convert("P"), rng.choice(("png", "gif", "bmp")), {}, shade),
        "P clear": lambda: (Image.new("P", (96, 64), 0), "png", clear, 1.0),
        "LA": lambda: (Image.merge("LA", (Image.fromarray(flat), Image.new("L", (96, 64), 0))), "png", {}, 1.0),
        "RGBA": lambda: (
            Image.merge("RGBA", (*[Image.fromarray(flat)] * 3, Image.new("L", (96, 64), 51))),
            rng.choice(("png", "tif", "webp")),
            {},
            0.2 * shade + 0.8,
        ),
        "CMYK": lambda: (
            Image.merge("CMYK", (*[Image.new("L", (96, 64), 0)] * 3, Image.fromarray(255 - flat))),
            rng.choice(("jpg", "tif")),
            {},
            shade,
        ),
        "YCbCr": lambda: (
            Image.fromarray(np.stack((flat,) * 3, -1)).convert("YCbCr"),
            rng.choice(("jpg", "tif")),
            {},
            shade,
        ),
        "LAB": lambda: (Image.new("LAB", (96, 64), (level, 128, 128)), "tif", {}, None),
        "I;16": lambda: (
            Image.fromarray(np.full((64, 96), level * 257, np.uint16)),
            rng.choice(("png", "tif")),
            {},
            shade,
        ),
        "I;16 dark": lambda: (
            Image.fromarray(np.full((64, 96), level, np.uint16)),
            rng.choice(("png", "tif")),
            {},
            level / 65535,
        ),
        "I": lambda: (Image.fromarray(np.full((64, 96), level * 257, np.int32)), "tif", {}, None),
        "F 255": lambda: (
            Image.fromarray(np.full((64, 96), level, np.float32)),
            "tif",
            {},
            shade if level > 1 else None,
        ),
        "F 1": lambda: (Image.fromarray(np.full((64, 96), shade, np.float32)), "tif", {}, shade),
        "F nan": lambda: (
            Image.fromarray(
                np.where(np.arange(96) == 3, rng.choice((np.nan, np.inf, -np.inf)), flat).astype(np.float32)
            ),
            "tif",
            {},
            "refused",
        ),
        "film": lambda: (
            Image.fromarray(flat),
            rng.choice(("gif", "webp", "tif", "png")),
            {"save_all": True, "append_images": [Image.fromarray(255 - flat)]},
            shade,
        ),
        "thin": lambda: (
            Image.new("RGB", rng.choice(((3000, 40), (33, 900), (20, 20), (1, 1), (32, 31)))),
            "png",
            {},
            None,
        ),
    }
    what = rng.choice(list(cases))
    image, ending, options, expected = cases[what]()
    content = io.BytesIO()
    image.save(content, {"jpg": "JPEG", "tif": "TIFF"}.get(ending, ending.upper()), **options)
    folder(place, f"a.{ending}", content.getvalue())

    def feed():
        found = must(place) if isinstance(expected, float) else trained(place)
        assert expected != "refused", "numbers that are not finite were taken"
        assert expected is None or abs(float(found.items[0].pixels().mean()) - expected) < 0.02, (
            f"{found.items[0].pixels().mean():.3f} instead of {expected:.3f}"
        )

    return Damaged(f"{what} at {level} as {ending}", feed)


KINDS = [picture_bytes, picture_header, picture_modes]
