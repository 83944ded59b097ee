"""Real picture files, the odd ones too, through Pillow."""

import numpy as np
import pytest
from PIL import Image

from zturbo import dataset
from zturbo.errors import DatasetError


def save(folder, name, image, caption="a thing", **options):
    image.save(folder / name, **options)
    if caption is not None:
        (folder / name).with_suffix(".txt").write_text(caption, encoding="utf-8")


def left_red(width=160, height=80):
    """Left half red, right half blue."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2, 0] = 255
    pixels[:, width // 2 :, 2] = 255
    return Image.fromarray(pixels)


def one(folder):
    return dataset.from_folder(folder, 128).items[0]


def test_sixteen_bit_is_scaled_and_not_cut(tmp_path):
    save(tmp_path, "a.png", Image.fromarray(np.full((64, 64), 32768, np.uint16)))
    assert one(tmp_path).pixels().mean() == pytest.approx(0.5, abs=0.01)


def test_cmyk_becomes_rgb(tmp_path):
    save(tmp_path, "a.jpg", Image.new("CMYK", (64, 64), (0, 255, 255, 0)))
    red, green, blue = one(tmp_path).pixels().mean((0, 1))
    assert red > 0.9 and green < 0.2 and blue < 0.2


def test_transparency_is_laid_on_white(tmp_path):
    save(tmp_path, "a.png", Image.new("RGBA", (64, 64), (255, 0, 0, 0)))
    assert one(tmp_path).pixels().min() == 1.0


def test_exif_rotation_is_followed(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned 90 degrees clockwise: left becomes top
    save(tmp_path, "a.png", left_red(), exif=exif)
    item = one(tmp_path)
    assert item.size[0] < item.size[1]
    assert item.pixels()[4, :, 0].mean() > 0.9 and item.pixels()[-4, :, 2].mean() > 0.9


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (64, 64), color) for color in ("red", "blue")]
    save(tmp_path, "a.gif", frames[0], save_all=True, append_images=frames[1:])
    assert one(tmp_path).pixels()[..., 0].mean() > 0.9


def test_unreadable_and_tiny_pictures_are_named_before_the_run(tmp_path):
    save(tmp_path, "good.png", left_red())
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("no picture")
    save(tmp_path, "dot.png", Image.new("RGB", (20, 20)))
    with pytest.raises(DatasetError) as error:
        dataset.from_folder(tmp_path, 128)
    assert "3 of 4 pictures cannot be used" in str(error.value)
    for name in ("cut.png", "text.jpg", "dot.png", "at least 32 pixels"):
        assert name in str(error.value)


def test_empty_and_missing_folders_get_a_sentence(tmp_path):
    with pytest.raises(DatasetError, match="has no pictures"):
        dataset.from_folder(tmp_path, 128)
    with pytest.raises(DatasetError, match="does not exist"):
        dataset.from_folder(tmp_path / "nowhere", 128)


def test_pictures_without_words_need_a_trigger(tmp_path):
    save(tmp_path, "a.png", left_red(), caption=None)
    save(tmp_path, "b.png", left_red(), caption="  \n")
    with pytest.raises(DatasetError, match="2 of 2 pictures have no caption.*a.png"):
        dataset.from_folder(tmp_path, 128)
    assert {item.caption for item in dataset.from_folder(tmp_path, 128, "zvk").items} == {"zvk"}


def test_a_caption_without_picture_is_reported_not_fatal(tmp_path):
    save(tmp_path, "a.png", left_red())
    (tmp_path / "lost.txt").write_text("nobody")
    assert "lost.txt" in dataset.from_folder(tmp_path, 128).report()


def test_files_that_are_not_read_are_named(tmp_path):
    save(tmp_path, "a.png", left_red())
    (tmp_path / "b.heic").write_bytes(b"a phone's picture")
    assert "1 files are not read: b.heic" in dataset.from_folder(tmp_path, 128).report()


def test_a_place_for_a_trigger_needs_one(tmp_path):
    save(tmp_path, "a.png", left_red(), caption="a [trigger] here")
    with pytest.raises(DatasetError, match=r"\[trigger\].*no trigger word"):
        dataset.from_folder(tmp_path, 128)


def test_a_caption_that_is_no_text_is_named(tmp_path):
    save(tmp_path, "a.png", left_red(), caption=None)
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00bad")
    with pytest.raises(DatasetError, match="a.txt cannot be read as UTF-8"):
        dataset.from_folder(tmp_path, 128)


@pytest.mark.parametrize(
    "caption, expected",
    [("a [trigger] here", "a zvk here"), ("a dog", "zvk, a dog"), ("", "zvk"), ("my ZVK dog", "my ZVK dog"), ("fuzzvks", "zvk, fuzzvks")],
)
def test_trigger(caption, expected):
    assert dataset.apply_trigger(caption, "zvk") == expected


@pytest.mark.parametrize(
    "given, resolution, expected",
    [
        ((1000, 1000), 512, (512, 512)),
        ((1920, 1080), 512, (688, 384)),  # 16:9 at an area of 512 x 512
        ((300, 200), 1024, (288, 192)),  # never enlarged, down to multiples of 16
        ((64, 64), 1024, (64, 64)),
    ],
)
def test_buckets_keep_shape_and_area_and_never_enlarge(given, resolution, expected):
    size = dataset.bucket(*given, resolution)
    assert size == expected
    assert all(side % 16 == 0 for side in size)


def test_pixels_are_the_bucket_in_zero_to_one(tmp_path):
    save(tmp_path, "a.png", left_red(300, 200))
    item = one(tmp_path)
    pixels = item.pixels()
    assert pixels.shape == (item.size[1], item.size[0], 3) and pixels.dtype == np.float32
    assert pixels.min() >= 0 and pixels.max() <= 1


def test_arrays_take_one_caption_each_or_one_for_all():
    images = [np.zeros((64, 64, 3), np.uint8)] * 3
    assert [i.caption for i in dataset.from_arrays(images, ["a", "b", "c"], 64).items] == ["a", "b", "c"]
    assert [i.caption for i in dataset.from_arrays(images, ["a"], 64).items] == ["a"] * 3
    with pytest.raises(DatasetError, match="3 pictures and 2 captions"):
        dataset.from_arrays(images, ["a", "b"], 64)
