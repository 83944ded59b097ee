"""Folders of pictures as people, their systems and other trainers leave them."""

import io
import os
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from zturbo import dataset, picturefile
from zturbo.captions import apply_trigger, tag_orders
from zturbo.errors import DatasetError
from zturbo.recipe import Data

links = pytest.mark.skipif(os.name == "nt", reason="Windows lets only administrators make links")


def put(root, **files):
    """a_png=None makes a picture a.png; text and bytes are written as they are; __ is a slash."""
    for name, content in files.items():
        path = root / name.replace("__", "/")
        path = path.with_name(".".join(path.name.rsplit("_", 1)))
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            Image.new("RGB", (64, 48), (9, 9, 9)).save(path.with_suffix(".png"))
            path.with_suffix(".png").rename(path)
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)


def named(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 48), (9, 9, 9)).save(root / name, "PNG")


def read(root, trigger="", **options):
    return dataset.from_folder(root, (64,), trigger, Data(**options))


def captions(found) -> dict[str, str]:
    return {item.name.replace("\\", "/"): item.caption for item in found.items}


# Pictures


def png_with(*texts) -> bytes:
    """A red PNG with texts in front of its pixels, long ones compressed."""
    content, info = io.BytesIO(), PngImagePlugin.PngInfo()
    for kind, key, text in texts:
        if kind == "iTXt":
            info.add_itxt(key, text, zip=len(text) > 10_000)
        else:
            info.add_text(key, text, zip=kind == "zTXt")
    Image.new("RGB", (64, 48), "red").save(content, "PNG", pnginfo=info)
    return content.getvalue()


WORKFLOW = '{"nodes": "' + "x" * 3_000_000 + '"}'


@pytest.mark.parametrize(
    "kind, key",
    [
        ("zTXt", "workflow"),
        ("iTXt", "workflow"),
        ("tEXt", "prompt"),
        ("iTXt", "XML:com.adobe.xmp"),
        ("zTXt", "Raw profile type exif"),
    ],
)
def test_a_picture_with_a_long_text_in_it_is_read(tmp_path, kind, key):
    (tmp_path / "a.png").write_bytes(png_with((kind, key, WORKFLOW), ("zTXt", "prompt", WORKFLOW)))
    (item,) = read(tmp_path, "zvk").items
    assert item.pixels()[..., 0].min() == 1 and item.pixels()[..., 1].max() == 0


def test_a_picture_with_a_very_large_colour_profile_is_read(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes() + bytes(3_000_000)
    Image.new("RGB", (64, 48), "red").save(tmp_path / "a.png", icc_profile=profile)
    assert read(tmp_path, "zvk").items[0].pixels()[..., 0].min() == 1


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "tif"])
def test_colours_of_another_profile_are_brought_to_srgb(tmp_path, ending):
    """A profile whose red and blue are exchanged: made of Pillow's sRGB, by its tags."""
    raw = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    tags = {bytes(raw[at : at + 4]): at for at in range(132, 132 + 12 * int.from_bytes(raw[128:132], "big"), 12)}
    red, blue = tags[b"rXYZ"], tags[b"bXYZ"]
    raw[red : red + 4], raw[blue : blue + 4] = b"bXYZ", b"rXYZ"
    raw = bytes(raw).replace("sRGB".encode("utf-16-be"), "xBGR".encode("utf-16-be")).replace(b"sRGB", b"xBGR")
    Image.new("RGB", (64, 48), (200, 30, 90)).save(tmp_path / f"a.{ending}", icc_profile=raw)
    assert np.abs(read(tmp_path, "zvk").items[0].pixels()[20, 20] * 255 - (90, 30, 200)).max() < 6
    for profile in (ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), b"broken", raw[:200]):
        Image.new("RGB", (64, 48), (200, 30, 90)).save(tmp_path / f"a.{ending}", icc_profile=profile)
        assert np.abs(read(tmp_path, "zvk").items[0].pixels()[20, 20] * 255 - (200, 30, 90)).max() < 6


def test_texts_behind_the_pixels_too(tmp_path):
    whole, text = png_with(), b"zTXtworkflow\0\0" + zlib.compress(WORKFLOW.encode())
    chunk = (len(text) - 4).to_bytes(4, "big") + text + zlib.crc32(text).to_bytes(4, "big")
    (tmp_path / "a.png").write_bytes(whole[:-12] + chunk + whole[-12:])
    assert read(tmp_path, "zvk").items[0].size == (64, 48)


def test_which_side_is_up_may_stand_in_a_text(tmp_path):
    xmp = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    (tmp_path / "a.png").write_bytes(png_with(("iTXt", "XML:com.adobe.xmp", xmp), ("zTXt", "workflow", WORKFLOW)))
    assert read(tmp_path, "zvk").items[0].size == (48, 64)


def test_a_picture_bomb_stays_refused(tmp_path):
    Image.new("1", (12000, 12000)).save(tmp_path / "a.png")
    with pytest.raises(DatasetError, match="12000x12000 pixels, more than"):
        read(tmp_path, "zvk")


@pytest.mark.parametrize("name", ["a.avif", "a.jpg", "a.png", "A.AVIF"])
def test_avif_is_read_whatever_it_is_called(tmp_path, name):
    Image.new("RGB", (64, 48), "red").save(tmp_path / name, "AVIF")
    assert read(tmp_path, "zvk").items[0].pixels()[..., 0].mean() > 0.9


def phone_picture(kind: str) -> bytes:
    content = io.BytesIO()
    assert picturefile.can_read(kind)
    Image.new("RGB", (64, 48), "red").save(content, kind)
    return content.getvalue()


@pytest.mark.parametrize("size", [(64, 48), (64, 64), (70, 31), (2000, 1500), (320, 200), (257, 9000)])
def test_a_large_jpeg_xl_is_refused_by_its_header(tmp_path, monkeypatch, size):
    assert picturefile.can_read("JXL")
    Image.new("RGB", size).save(tmp_path / "a.jxl", "JXL")
    assert picturefile.jxl_size(tmp_path / "a.jxl") == size
    raw = (tmp_path / "a.jxl").read_bytes()
    if raw.startswith(b"\xff\x0a"):  # in a container, too
        boxes = (
            b"\0\0\0\x0cJXL \r\n\x87\n"
            + b"\0\0\0\x14ftypjxl \0\0\0\0jxl "
            + (len(raw) + 8).to_bytes(4, "big")
            + b"jxlc"
            + raw
        )
        (tmp_path / "a.jxl").write_bytes(boxes)
        assert picturefile.jxl_size(tmp_path / "a.jxl") == size
    monkeypatch.setattr(picturefile, "LARGEST", 1000)
    monkeypatch.setattr(Image, "open", None)
    with pytest.raises(DatasetError, match=f"{size[0]}x{size[1]} pixels, more than"):
        read(tmp_path, "zvk")


@pytest.mark.parametrize(
    "kind, module, said",
    [
        ("HEIF", "pillow_heif", "HEIC inside.*pip install pillow-heif"),
        ("JXL", "pillow_jxl", "JPEG XL inside.*pip install pillow-jxl-plugin"),
        ("AVIF", "pillow_avif", "AVIF inside.*pip install pillow-avif-plugin"),
    ],
)
@pytest.mark.parametrize("name", ["a.heic", "a.jxl", "a.jpg"])
def test_heic_and_jxl_with_and_without_their_plug_in(tmp_path, monkeypatch, kind, module, said, name):
    (tmp_path / name).write_bytes(phone_picture(kind))
    assert read(tmp_path, "zvk").items[0].pixels()[..., 0].mean() > 0.9
    monkeypatch.delitem(Image.OPEN, kind)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DatasetError, match=f"{name} cannot be read as a picture .*{said}"):
        read(tmp_path, "zvk")


@pytest.mark.parametrize(
    "content, said",
    [
        (b"", "an empty file"), (b"\0\0\0\x18ftypisom\0\0\2\0", "a film"), (b"8BPS\0\1", "a Photoshop file"),
        (b"<!DOCTYPE html><title>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"), (b"\n <SVG width=", "an SVG"),
        (b"just words", "no kind of picture"),
    ],
)  # fmt: skip
def test_what_is_no_picture_is_named(tmp_path, content, said):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(DatasetError, match=f"a.jpg cannot be read as a picture .*{said}"):
        read(tmp_path, "zvk")


# Masks


@pytest.mark.parametrize(
    "mask",
    [
        "a.mask.png",
        "a-masklabel.png",
        "a.MASK.PNG",
        "A.Mask.png",
        "a_mask.png",
        "a-mask.webp",
        "masks/a.png",
        "Mask/A.JPG",
        "a-MaskLabel.PNG",
    ],
)
def test_masks_by_their_names(tmp_path, mask):
    named(tmp_path, "a.png", mask)
    found = read(tmp_path, "zvk")
    assert list(captions(found)) == ["a.png"] and found.items[0].mask_file == tmp_path / mask
    off = read(tmp_path, "zvk", masks="off")
    assert list(captions(off)) == ["a.png"] and "1 masks are not used, as masks is off: " in off.report()


def test_a_name_that_only_sounds_like_a_masks_is_a_picture(tmp_path):
    named(tmp_path, "gas_mask.png", "masks/venice.png", "mask.png")
    assert set(captions(read(tmp_path, "zvk"))) == {"gas_mask.png", "masks/venice.png", "mask.png"}


def test_masks_that_are_lonely_or_too_many_and_what_lies_beside_for_others(tmp_path):
    named(tmp_path, "a.png", "a.mask.png", "a-masklabel.png", "gone-masklabel.png", "a-condlabel.png")
    found = read(tmp_path, "zvk")
    assert list(captions(found)) == ["a.png"]
    for line in (
        "1 masks have no picture and are not used: gone-masklabel.png.",
        "1 masks are a second one for their picture and are not used: a.mask.png.",
        "(-condlabel) are what another trainer shows",
    ):
        assert line in found.report()


def masked(root, mask: Image.Image, **options) -> np.ndarray:
    """The weights of a picture with this mask, [6, 8]."""
    named(root, "a.png")
    mask.save(root / "a.mask.png")
    return read(root, "zvk", **options).items[0].mask(0.0)[0].numpy()


def halves(left, right, mode) -> Image.Image:
    image = Image.new(mode, (64, 48), right)
    image.paste(left, (0, 0, 32, 48))
    return image


def voc() -> Image.Image:
    image = halves(1, 0, "P")
    image.putpalette([0, 0, 0, 128, 0, 0])
    return image


def painted() -> Image.Image:
    """White on a clear layer, in a palette."""
    image = halves(1, 0, "P")
    image.putpalette([0, 0, 0, 255, 255, 255])
    image.info["transparency"] = 0
    return image


def tinted() -> Image.Image:
    """A palette whose first colour is the light one."""
    image = halves(0, 1, "P")
    image.putpalette([255, 255, 250, 0, 0, 0])
    return image


@pytest.mark.parametrize(
    "mask",
    [
        halves(255, 0, "L"), halves(1, 0, "L"), halves(1, 0, "1"), voc(),
        halves((255, 255, 255, 255), (255, 255, 255, 0), "RGBA"), halves((0, 0, 0, 255), (0, 0, 0, 0), "RGBA"),
        halves((90, 10, 20, 255), (1, 2, 3, 0), "RGBA"), halves((255, 255, 255, 255), (0, 0, 0, 0), "RGBA"),
        halves((255, 255), (0, 0), "LA"), painted(), tinted(),
        halves(2, 0, "L"), halves((255, 255), (255, 0), "LA"),
        Image.fromarray(np.repeat([[65535] * 32 + [0] * 32], 48, 0).astype(np.uint16)),
    ],
)  # fmt: skip
def test_masks_of_every_making_say_the_same(tmp_path, mask):
    weight = masked(tmp_path, mask)
    assert weight[:, :4].min() == pytest.approx(2) and weight[:, 4:].max() == 0


def test_a_half_in_16_bits_is_a_half(tmp_path):
    weight = masked(tmp_path, Image.fromarray(np.repeat([[65535] * 32 + [32896] * 32], 48, 0).astype(np.uint16)))
    assert weight[0, -1] / weight[0, 0] == pytest.approx(0.5, abs=0.01)


def test_a_mask_that_lets_nothing_count_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="The mask a.mask.png is black all over: nothing of the picture would count"):
        masked(tmp_path, Image.new("L", (64, 48)))
    (tmp_path / "a.mask.png").unlink()
    Image.new("RGBA", (64, 48)).save(tmp_path / "a.png")
    with pytest.raises(DatasetError, match="a.png is transparent all over"):
        read(tmp_path, "zvk", masks="files and alpha")


def test_a_black_mask_with_a_whole_alpha_is_black(tmp_path):
    with pytest.raises(DatasetError, match="black all over"):
        masked(tmp_path, Image.new("RGBA", (64, 48), (0, 0, 0, 255)))


def test_a_mask_is_of_one_picture_alone(tmp_path):
    """Numbered files are the rule: what could be of several is said, and the exact place wins."""
    named(tmp_path, "10_cat/001.png", "10_dog/001.png", "masks/001.png")
    found = read(tmp_path, "zvk")
    assert [item.mask_file for item in found.items] == [None, None]
    assert "1 masks fit pictures in several folders and are not used: 001.png" in found.report()
    named(tmp_path, "001.png")
    assert {item.name for item in read(tmp_path, "zvk").items if item.mask_file} == {"001.png"}


def test_a_mask_folder_is_one_as_a_whole_and_said(tmp_path):
    named(
        tmp_path,
        "images/1.png",
        "images/2.png",
        "masks/1.png",
        "masks/2_mask.png",
        "masks/3.png",
        "portrait.png",
        "portrait_mask.png",
    )
    found = read(tmp_path, "zvk")
    assert {name: item.mask_file is not None for name, item in zip(captions(found), found.items)} == {
        "images/1.png": True,
        "images/2.png": True,
        "portrait.png": True,
    }
    assert (
        "3 pictures are taken for masks by their names: portrait_mask.png, 1.png, 2_mask.png." in found.report()
        and "1 masks have no picture and are not used: 3.png." in found.report()
    )


@pytest.mark.skipif(sys.platform != "linux", reason="other systems' disks know no letter case")
def test_names_that_differ_in_letter_case_alone_are_told_apart(tmp_path):
    named(tmp_path, "A.png", "a.png", "A.mask.png", "a.mask.png")
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "A.png", "text": "large"}\n{"file_name": "a.png", "text": "small"}'
    )
    found = read(tmp_path)
    assert {item.name: (item.caption, item.mask_file.name) for item in found.items} == {
        "A.png": ("large", "A.mask.png"),
        "a.png": ("small", "a.mask.png"),
    }
    assert "second one" not in found.report() and "another ending" not in found.report()


@pytest.mark.parametrize(
    "picture, mask",
    [
        ("images/a.png", "masks/a.png"),
        ("images/x/a.jpg", "masks/x/a.png"),
        ("x/a.png", "x/mask/a.png"),
        ("10_cat/a.png", "Masks/a.png"),
    ],
)
def test_masks_in_a_folder_of_their_own(tmp_path, picture, mask):
    named(tmp_path, picture, mask)
    found = read(tmp_path, "zvk")
    assert list(captions(found)) == [picture] and found.items[0].mask_file == tmp_path / mask


# Captions


@pytest.mark.parametrize(
    "picture, caption",
    [
        ("IMG_1.JPG", "IMG_1.TXT"),
        ("IMG_1.JPG", "img_1.txt"),
        ("a.png", "a.Caption"),
        ("a.png", "a.png.txt"),
        ("e\u0301.png", "\u00e9.txt"),
        ("\u00e9.png", "e\u0301.txt"),
    ],
)
def test_captions_in_any_letter_case_and_spelling(tmp_path, picture, caption):
    named(tmp_path, picture)
    (tmp_path / caption).write_text("here", encoding="utf-8")
    found = read(tmp_path)
    assert list(captions(found).values()) == ["here"] and "captions have no picture" not in found.report()


def test_which_caption_counts_where_there_are_several(tmp_path):
    named(tmp_path, "a.png", "A.jpg", "b.png", "c.png")
    for name, text in {
        "a.txt": "small",
        "A.txt": "large",
        "b.txt": " \n",
        "b.caption": "second",
        "c.txt": "own",
        "metadata.jsonl": '{"file_name": "c.png", "text": "listed"}',
    }.items():
        (tmp_path / name).write_text(text)
    assert captions(read(tmp_path)) == {"a.png": "small", "A.jpg": "large", "b.png": "second", "c.png": "own"}


@pytest.mark.parametrize("name", ["sub\\\\A.PNG", "./sub/a.png", "sub/../sub/a.png"])
def test_rows_find_their_picture(tmp_path, name):
    named(tmp_path, "sub/a.png")
    (tmp_path / "Metadata.JSONL").write_text(f'{{"file_name": "{name}", "text": "listed"}}')
    assert captions(read(tmp_path)) == {"sub/a.png": "listed"}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_captions_with_a_mark(tmp_path, encoding):
    named(tmp_path, "a.png")
    mark = b"\xfe\xff" if encoding == "utf-16-be" else b""
    (tmp_path / "a.txt").write_bytes(mark + "Café 猫\r\n".encode(encoding))
    found = read(tmp_path)
    assert captions(found) == {"a.png": "Café 猫"} and "Windows-1252" not in found.report()


def test_captions_of_old_windows_are_read_and_named(tmp_path):
    named(tmp_path, "a.png", "b.png")
    (tmp_path / "a.txt").write_bytes("Café “au lait”".encode("cp1252"))
    (tmp_path / "b.txt").write_text("Café", encoding="utf-8")
    found = read(tmp_path)
    assert captions(found) == {"a.png": "Café “au lait”", "b.png": "Café"}
    assert (
        "1 texts are no UTF-8 and were read as Windows-1252: a.txt. See whether the letters are right."
        in found.report()
    )


@pytest.mark.parametrize(
    "text, encoding",
    [
        ("红色外套的女孩", "gbk"),
        ("一只红猫", "gbk"),
        ("猫が座っている", "shift-jis"),
        ("紅貓坐著", "big5"),
        ("рыжий кот", "cp1251"),
        ("zvk，红色外套", "gbk"),
    ],
)
def test_captions_of_another_code_page_are_not_taken_for_western_ones(tmp_path, text, encoding):
    named(tmp_path, "a.png")
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    with pytest.raises(DatasetError, match="a.txt .*Save it as UTF-8"):
        read(tmp_path, "zvk")


@pytest.mark.parametrize(
    "content", [b"\x89PNG\r\n\x1a\n\x01\x02", b"a\x81b", b"\xff\xfea\0b", "a cat".encode("utf-16-le")]
)
def test_what_is_no_text_is_no_caption(tmp_path, content):
    named(tmp_path, "a.png")
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DatasetError, match="a.txt (cannot be read as text|is no text)"):
        read(tmp_path)


@pytest.mark.parametrize("given, trigger", [(" zvk \n", "zvk"), (" ", ""), ("\n\t", ""), ("zvk\ncat", "zvk cat")])
def test_white_space_around_a_trigger_word_is_nothing(tmp_path, given, trigger):
    named(tmp_path, "a.png")
    image = np.zeros((64, 64, 3), np.uint8)
    if trigger:
        assert captions(read(tmp_path, given)) == {"a.png": trigger} and read(tmp_path, given).trigger == trigger
        assert dataset.from_arrays([image], [], (64,), given).items[0].caption == trigger
    else:
        for refused in (lambda: read(tmp_path, given), lambda: dataset.from_arrays([image], [given], (64,), given)):
            with pytest.raises(DatasetError, match="no caption"):
                refused()


@pytest.mark.parametrize(
    "caption, trigger, expected",
    [
        ("小明在公园里踢球", "小明", "小明在公园里踢球"), ("一只zvk猫", "zvk", "一只zvk猫"),
        ("まるちゃんが走る", "まるちゃん", "まるちゃんが走る"), ("a [Trigger] here", "zvk", "a zvk here"),
        ("[TRIGGER]", r"\1", r"\1"), ("fuzzvks", "zvk", "zvk, fuzzvks"), ("猫", "zvk", "zvk, 猫"),
    ],
)  # fmt: skip
def test_a_trigger_word_is_found_in_every_writing(caption, trigger, expected):
    assert apply_trigger(caption, trigger) == expected


def test_commas_of_chinese_writing_divide_tags():
    orders = tag_orders("小明，红色外套、公园, day", 1)
    assert (
        orders[0] == "小明, 红色外套, 公园, day"
        and len(orders) > 3
        and all(order.startswith("小明, ") for order in orders)
    )


@pytest.mark.parametrize(
    "content, caption",
    [
        ('{"caption": "a cat"}', "a cat"),
        ('{"tags": ["cat", "red"]}', "cat, red"),
        ('{"text": "", "prompt": "p"}', "p"),
        ('{"score": 3}', "zvk"),
        ("[1]", "zvk"),
        ("no json", "zvk"),
    ],
)
def test_captions_in_json_beside_a_picture(tmp_path, content, caption):
    named(tmp_path, "a.png")
    (tmp_path / "a.json").write_text(content)
    assert captions(read(tmp_path, "zvk"))["a.png"].removeprefix("zvk, ") == caption
    (tmp_path / "a.txt").write_text("its own")
    assert captions(read(tmp_path)) == {"a.png": "its own"}


@pytest.mark.parametrize(
    "name, content",
    [
        ("metadata.jsonl", '{"image_path": "a.png", "caption": "x"}'),
        ("metadata.jsonl", '{"file_name": "a.png", "text": "", "caption": "x"}'),
        ("metadata.jsonl", '{"file_name": "a.png", "text": ["x"]}'),
        ("metadata.jsonl", '{"file_name": "a.png", "text": null, "prompt": "x"}'),
        ("metadata.jsonl", '[{"file_name": "a.png", "text": "x"}]'), ("metadata.csv", "file_name,text\na.png,x\n"),
        ("metadata.jsonl", '{"file_name": "D:\\\\set\\\\A.png", "text": "x"}'),
        ("metadata.jsonl", '{"file_name": "train/a.png", "text": "x"}'),
        ("metadata.csv", 'image,caption,caption_dropout\n"a.png","x",0.5\n'),
    ],
)  # fmt: skip
def test_rows_as_other_trainers_write_them(tmp_path, name, content):
    named(tmp_path, "a.png")
    (tmp_path / name).write_text(content)
    found = read(tmp_path)
    assert captions(found) == {"a.png": "x"} and "not there" not in found.report()


def test_rows_of_another_place_are_matched_by_their_end_only_where_it_is_clear(tmp_path):
    named(tmp_path, "001.png", "002.png", "003.png")
    rows = {"001.png": "right", "y/001.png": "of y", "x/002.png": "of x", "z/002.png": "of z", "far/003.png": "three"}
    (tmp_path / "metadata.jsonl").write_text(
        "\n".join(f'{{"file_name": "{name}", "text": "{text}"}}' for name, text in rows.items())
    )
    found = read(tmp_path, "zvk")
    assert captions(found) == {"001.png": "zvk, right", "002.png": "zvk", "003.png": "zvk, three"}
    assert (
        "3 rows of metadata name pictures that are not there" in found.report()
        and "1 rows of metadata name another place and were matched by the end of it: far/003.png" in found.report()
    )


@pytest.mark.parametrize(
    "content, caption",
    [
        ('file_name,text\na.png,"first\nsecond"\n', "first\nsecond"),
        ("file_name,text\na.png,x\u2028y\n", "x\u2028y"),
        ("file_name, text\na.png, x\n", "x"),
        ("file_name;text;caption_dropout\na.png;x;0,5\n", "x"),
        ("image\tcaption\na.png\tx\n", "x"),
    ],
)
def test_tables_as_programs_write_them(tmp_path, content, caption):
    named(tmp_path, "a.png")
    (tmp_path / "metadata.csv").write_text(content, encoding="utf-8", newline="")
    assert captions(read(tmp_path)) == {"a.png": caption}


@pytest.mark.parametrize(
    "content, said",
    [
        ("a.png,hello\n", "the first line names no"),
        ("file_name,x\na.png,y\n", "the first line names no"),
        ("file_name,text\na.png," + "x" * 140_000, "field larger"),
        ("text,file_name\nx,\n", "names no picture"),
    ],
)
def test_a_table_that_is_none_is_named(tmp_path, content, said):
    named(tmp_path, "a.png")
    (tmp_path / "metadata.csv").write_text(content)
    with pytest.raises(DatasetError, match=f"of metadata.csv is not a row with file_name and text .*{said}"):
        read(tmp_path, "zvk")


def test_where_a_caption_came_from_is_said(tmp_path):
    named(tmp_path, "a.png", "b.png", "c.png")
    for name, text in {
        "a.json": '{"prompt": "masterpiece"}',
        "b.json": '{"prompt": {"x": 1}, "tags": "cat"}',
        "c.json": '{"tags": {"cat": 0.9}}',
        "metadata.jsonl": '{"file_name": "a.png", "text": "my own"}',
    }.items():
        (tmp_path / name).write_text(text)
    found = read(tmp_path, "zvk")
    assert captions(found) == {"a.png": "zvk, my own", "b.png": "zvk, cat", "c.png": "zvk"}
    assert (
        "1 captions are from JSON files: b.json." in found.report()
        and "1 JSON files hold no caption and are not used: c.json." in found.report()
    )


def test_what_is_trained_as_it_stands_is_said(tmp_path):
    named(tmp_path, "a.png", "b.png", "c.png")
    for name, text in {"a": "zvk ||| red", "b": "a {red|blue} cat", "c": "a {plain} cat"}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    assert (
        "2 captions have ||| or {a|b} in them, which is trained as it stands: a.png, b.png." in read(tmp_path).report()
    )


def test_copies_of_a_picture_are_said_and_held_out_together(tmp_path):
    for name in "abcdef":
        Image.new("RGB", (64, 48), (ord(name), 0, 0)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name} (1).png").write_bytes((tmp_path / f"{name}.png").read_bytes())
    found = read(tmp_path, "zvk", validation=0.3)
    out = {found.items[n].name[0] for n in found.held_out()}
    assert "6 pictures are copies of another" in found.report() and len(out) == 2 and len(found.held_out()) == 4


def test_pictures_from_the_graph_of_any_channels_and_sizes():
    gray, clear = np.full((64, 64, 1), 9, np.uint8), np.zeros((48, 64, 4), np.uint8)
    found = dataset.from_arrays([gray, clear], ["x"], (64,))
    assert [item.pixels().shape for item in found.items] == [(64, 64, 3), (48, 64, 3)] and found.items[
        1
    ].pixels().min() == 1
    with pytest.raises(DatasetError, match="must be height, width and 1, 3 or 4 channels"):
        dataset.from_arrays([np.zeros((8, 8, 2), np.uint8)], ["x"], (64,))


# Folders


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_a_name_that_is_no_text_is_shown_with_escapes(tmp_path):
    named(tmp_path, "a.png")
    (tmp_path / "a.png").rename(os.fsdecode(os.fsencode(tmp_path) + b"/\xc3\xa9\xff.png"))
    found = read(tmp_path, "zvk", validation=0.5)
    assert "udcff" in found.items[0].name and found.report().encode() and found.held_out() == set()


def test_kohyas_project_folder_is_not_taught_with_its_regularisation(tmp_path):
    named(tmp_path, "proj/img/10_zvk cat/a.png", "proj/reg/1_cat/b.png")
    with pytest.raises(DatasetError, match="Give proj/img as folder and proj/reg as regularisation_folder"):
        read(tmp_path / "proj", "zvk")
    for folder, regularisation in (("img", "reg"), ("img/10_zvk cat", "reg/1_cat")):
        found = dataset.from_folder(tmp_path / "proj" / folder, (64,), "", Data(), tmp_path / "proj" / regularisation)
        assert [(item.caption, item.regularisation) for item in found.items] == [("zvk cat", False), ("cat", True)]


def test_what_systems_keep_for_themselves_is_left_out_and_said(tmp_path):
    named(
        tmp_path,
        "a.png",
        "@eaDir/a.jpg/SYNOPHOTO_THUMB_M.jpg",
        ".ipynb_checkpoints/a-checkpoint.png",
        "__MACOSX/._a.png",
        "#recycle/old.png",
        "$RECYCLE.BIN/x.png",
        "sub/.thumbnails/a.png",
        "._a.png",
    )
    put(tmp_path, Thumbs_db="x", desktop_ini="x")
    found = read(tmp_path, "zvk")
    assert list(captions(found)) == ["a.png"]
    names = "#recycle, $RECYCLE.BIN, .ipynb_checkpoints and 3 more"
    assert f"6 folders are hidden or a system's own and are left out: {names}." in found.report()
    assert "3 files are hidden or a system's own and are left out: ._a.png, Thumbs.db, desktop.ini." in found.report()
    assert "are not read" not in found.report()


def repeats(root) -> dict[str, int]:
    return {item.name.replace("\\", "/"): item.repeats for item in read(root, "zvk").items}


def test_the_number_of_the_folder_itself_never_counts(tmp_path):
    root = tmp_path / "2024_holiday"
    named(
        root,
        "a.png",
        "10_beach/b.png",
        "10_beach/deep/c.png",
        "2_x/3_y/d.png",
        "0_not/e.png",
        "20240101_trip/f.png",
        "1.5_x/g.png",
    )
    assert repeats(root) == {
        "a.png": 1,
        "10_beach/b.png": 10,
        "10_beach/deep/c.png": 10,
        "2_x/3_y/d.png": 3,
        "20240101_trip/f.png": 1,
        "1.5_x/g.png": 1,
    }
    report = read(root, "zvk").report()
    for line in (
        "The number in the name of the folder itself (2024_holiday) does not count",
        "1 pictures lie in folders whose name says 0 times and are left out: 0_not/e.png",
        "1 folders have a number of more than four digits, which does not count as repeats: 20240101_trip.",
    ):
        assert line in report.replace("\\", "/")


def test_a_number_that_makes_an_epoch_absurd_is_doubted(tmp_path):
    named(tmp_path, "2024_trip/a.png", "40_cat/b.png")
    found = read(tmp_path, "zvk")
    assert repeats(tmp_path) == {"2024_trip/a.png": 2024, "40_cat/b.png": 40}
    assert (
        "The folder 2024_trip shows each of its pictures 2,024 times an epoch." in found.report()
        and "40_cat shows" not in found.report()
    )
    assert (
        "is shown 2,024 times an epoch" in found.doubt()
        and not dataset.from_folder(tmp_path / "40_cat", (64,), "zvk").doubt()
    )


def test_the_words_of_a_folder_are_the_caption_where_there_is_no_other(tmp_path):
    named(tmp_path, "10_zvk cat/a.png", "10_zvk cat/b.png")
    (tmp_path / "10_zvk cat" / "b.txt").write_text("b")
    found = read(tmp_path)
    assert [item.caption for item in found.items] == ["zvk cat", "b"]
    assert "1 pictures have the words of their folder's name as caption" in found.report()
    assert [item.caption for item in read(tmp_path, "zvk").items] == ["zvk", "zvk, b"]


@links
def test_of_two_ways_to_a_folder_the_folder_itself_counts(tmp_path):
    named(tmp_path, "10_cat/a.png")
    for name in ("01link", "0_all"):
        (tmp_path / name).symlink_to(tmp_path / "10_cat", target_is_directory=True)
    assert (
        repeats(tmp_path) == {"10_cat/a.png": 10}
        and "2 folders are links to one that is read already and are left out: 01link, 0_all."
        in read(tmp_path, "zvk").report()
    )


def test_a_folder_that_cannot_be_opened_is_said(tmp_path, monkeypatch):
    named(tmp_path, "a.png", "closed/b.png")
    scandir = os.scandir

    def refused(place):
        if str(place).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return scandir(place)

    monkeypatch.setattr(os, "scandir", refused)
    assert "1 folders cannot be opened and are left out: closed." in read(tmp_path, "zvk").report()


@links
def test_links_are_followed_and_end(tmp_path):
    """As a mounted drive, or a snapshot of Hugging Face, whose files are links."""
    named(tmp_path / "drive", "a.png", "b.png", "more/c.png")
    (tmp_path / "drive" / "a.txt").write_text("a caption there")
    root = tmp_path / "set"
    root.mkdir()
    (root / "linked").symlink_to(tmp_path / "drive" / "more", target_is_directory=True)
    (root / "a.png").symlink_to(tmp_path / "drive" / "a.png")
    (root / "a.txt").symlink_to(tmp_path / "drive" / "a.txt")
    (root / "again").symlink_to(root, target_is_directory=True)
    (root / "gone.png").symlink_to(tmp_path / "nowhere.png")
    found = read(root, "zvk")
    assert captions(found) == {"a.png": "zvk, a caption there", "linked/c.png": "zvk"}
    assert "3 links lead out of the folder and are followed: a.png, a.txt, linked." in found.report()
    assert (
        "1 links lead to no file and are left out: gone.png." in found.report()
        and "1 folders are links to one that is read already and are left out: again." in found.report()
    )
    (tmp_path / "whole").symlink_to(tmp_path / "drive", target_is_directory=True)
    assert len(read(tmp_path / "whole", "zvk").items) == 3


def test_every_file_that_is_left_out_is_said_one_line_each_kind(tmp_path):
    named(tmp_path, "a.png", "gone.mask.png", "a.psd")
    put(tmp_path, lost_txt="x", other_txt="x", b_mp4="x", metadata_jsonl='{"file_name": "Gone.png", "text": "x"}')
    notes = read(tmp_path, "zvk").notes
    assert sorted(note.split(":")[0] for note in notes) == [
        "1 masks have no picture and are not used",
        "1 rows of metadata name pictures that are not there",
        "2 captions have no picture and are not used",
        "2 files are not read",
    ]
    assert "Gone.png" in " ".join(notes)
