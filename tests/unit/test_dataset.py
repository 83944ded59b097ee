"""Real picture files, the odd ones too, through Pillow."""

import numpy as np
import pytest
from PIL import Image

from zturbo import buckets, captions, dataset
from zturbo.errors import DatasetError
from zturbo.recipe import Data


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
    return dataset.from_folder(folder, (128,)).items[0]


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
        dataset.from_folder(tmp_path, (128,))
    assert "3 of 4 pictures cannot be used" in str(error.value)
    for name in ("cut.png", "text.jpg", "dot.png", "at least 32 pixels"):
        assert name in str(error.value)


def test_empty_and_missing_folders_get_a_sentence(tmp_path):
    with pytest.raises(DatasetError, match="has no pictures"):
        dataset.from_folder(tmp_path, (128,))
    with pytest.raises(DatasetError, match="does not exist"):
        dataset.from_folder(tmp_path / "nowhere", (128,))


def test_pictures_without_words_need_a_trigger(tmp_path):
    save(tmp_path, "a.png", left_red(), caption=None)
    save(tmp_path, "b.png", left_red(), caption="  \n")
    with pytest.raises(DatasetError, match="2 of 2 pictures have no caption.*a.png"):
        dataset.from_folder(tmp_path, (128,))
    assert {item.caption for item in dataset.from_folder(tmp_path, (128,), "zvk").items} == {"zvk"}


def test_a_caption_without_picture_is_reported_not_fatal(tmp_path):
    save(tmp_path, "a.png", left_red())
    (tmp_path / "lost.txt").write_text("nobody")
    assert "lost.txt" in dataset.from_folder(tmp_path, (128,)).report()


def test_a_place_for_a_trigger_needs_one(tmp_path):
    save(tmp_path, "a.png", left_red(), caption="a [trigger] here")
    with pytest.raises(DatasetError, match=r"\[trigger\].*no trigger word"):
        dataset.from_folder(tmp_path, (128,))


@pytest.mark.parametrize(
    "caption, expected",
    [
        ("a [trigger] here", "a zvk here"),
        ("a dog", "zvk, a dog"),
        ("", "zvk"),
        ("my ZVK dog", "my ZVK dog"),
        ("fuzzvks", "zvk, fuzzvks"),
    ],
)
def test_trigger(caption, expected):
    assert captions.apply_trigger(caption, "zvk") == expected


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
    size = buckets.bucket(*given, resolution)
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
    assert [i.caption for i in dataset.from_arrays(images, ["a", "b", "c"], (64,)).items] == ["a", "b", "c"]
    assert [i.caption for i in dataset.from_arrays(images, ["a"], (64,)).items] == ["a"] * 3
    with pytest.raises(DatasetError, match="3 pictures and 2 captions"):
        dataset.from_arrays(images, ["a", "b"], (64,))


def test_sub_folders_with_repeats_and_metadata(tmp_path):
    for folder in ("10_cat", "plain", "3_x/deep"):
        (tmp_path / folder).mkdir(parents=True)
    save(tmp_path / "10_cat", "a.png", left_red(), caption="from the text file")
    save(tmp_path / "10_cat", "b.png", left_red(), caption=None)
    save(tmp_path / "plain", "c.png", left_red(), caption=None)
    save(tmp_path / "3_x/deep", "d.png", left_red(), caption="deep")
    (tmp_path / "10_cat" / "metadata.jsonl").write_text(
        '{"file_name": "a.png", "text": "not this"}\n\n'
        '{"file_name": "b.png", "text": "listed"}\n'
        '{"file_name": "gone.png", "text": "x"}\n'
    )
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "plain/c.png", "caption": "from above"}\n')
    found = dataset.from_folder(tmp_path, (128,))
    assert {(item.name.replace("\\", "/"), item.caption, item.repeats) for item in found.items} == {
        ("10_cat/a.png", "from the text file", 10),
        ("10_cat/b.png", "listed", 10),
        ("plain/c.png", "from above", 1),
        ("3_x/deep/d.png", "deep", 3),
    }
    assert (
        "1 rows of metadata name pictures that are not there: gone.png" in found.report()
        and "4 pictures, 24 an epoch" in found.report()
    )


@pytest.mark.parametrize("line", ["no json", '["a"]', '{"text": "x"}', '{"file_name": "a.png", "text": 3}'])
def test_a_metadata_line_that_is_none_is_named(tmp_path, line):
    save(tmp_path, "a.png", left_red())
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "fine"}\n' + line)
    with pytest.raises(DatasetError, match="Line 2 of metadata.jsonl"):
        dataset.from_folder(tmp_path, (128,))


def test_several_resolutions_where_the_picture_is_large_enough(tmp_path):
    save(tmp_path, "big.png", left_red(400, 200))
    save(tmp_path, "small.png", left_red(64, 64))
    found = dataset.from_folder(tmp_path, (128, 256))
    assert sorted(item.size for item in found.items) == [(64, 64), (176, 96), (368, 176)]
    assert buckets.read_sides(" 512, 768,") == (512, 768) and buckets.read_sides("") == ()
    for wrong in ("512px", "12", "1e3", "-512"):
        with pytest.raises(DatasetError, match="is no resolution"):
            buckets.read_sides(wrong)


def test_orders_of_tags_keep_the_first_and_lose_none():
    orders = captions.tag_orders("zvk, red, round, small, old", 1)
    assert orders[0] == "zvk, red, round, small, old" and 4 <= len(orders) == len(set(orders)) <= captions.ORDERS
    assert all(
        order.split(", ")[0] == "zvk" and sorted(order.split(", ")) == sorted(orders[0].split(", ")) for order in orders
    )
    assert orders == captions.tag_orders("zvk, red, round, small, old", 1)
    assert captions.tag_orders("one sentence without a list", 1) == ("one sentence without a list",)


def test_captions_hold_every_text_once_and_the_trigger_for_dropped_ones():
    images = [np.zeros((64, 64, 3), np.uint8)] * 3
    plain = dataset.from_arrays(images, ["a, b", "a, b", "c"], (64,), "zvk", Data(caption_dropout=0.5)).captions()
    assert plain.texts == ("zvk", "zvk, a, b", "zvk, c") and plain.of == ((1,), (1,), (2,)) and plain.dropped == 0
    shuffled = dataset.from_arrays(
        images, ["a, b, c", "x", "y"], (64,), "zvk", Data(caption_dropout=0, shuffle_tags=True)
    ).captions()
    assert (
        len(shuffled.of[0]) > 3
        and shuffled.of[1:] == ((shuffled.texts.index("zvk, x"),), (shuffled.texts.index("zvk, y"),))
        and shuffled.dropped is None
    )


def picture(path, size=(64, 48), color=(9, 9, 9), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)


def test_a_mask_file_is_no_picture_and_weighs_its_own_with_mean_one(tmp_path):
    picture(tmp_path / "cat.png")
    mask = Image.new("L", (64, 48), 0)
    mask.paste(255, (0, 0, 32, 48))
    mask.save(tmp_path / "cat.mask.png")
    picture(tmp_path / "plain.png")
    found = dataset.from_folder(tmp_path, (64,), "zvk")
    assert [item.name for item in found.items] == ["cat.png", "plain.png"] and "1 masked" in found.report()
    weight = found.items[0].mask(0.1)
    assert (
        weight.shape == (1, 6, 8)
        and weight.mean().item() == pytest.approx(1)
        and (weight[0, :, 0] / weight[0, :, -1]).mean().item() == pytest.approx(10, rel=0.01)
    )
    assert found.items[1].mask(0.1) is None
    assert all(item.mask_file is None for item in dataset.from_folder(tmp_path, (64,), "zvk", Data(masks="off")).items)


def test_transparency_is_a_mask_where_asked_for(tmp_path):
    image = Image.new("RGBA", (64, 64), (200, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 64, 32))
    image.save(tmp_path / "a.png")
    picture(tmp_path / "whole.png", (64, 64), (1, 2, 3, 255), "RGBA")
    (masked, whole) = dataset.from_folder(tmp_path, (64,), "zvk", Data(masks="files and alpha")).items
    assert masked.mask(0.0)[0, 0].max() < 0.1 and masked.mask(0.0)[0, -1].min() > 1.9 and whole.mask_file is None
    assert dataset.from_folder(tmp_path, (64,), "zvk").items[0].mask_file is None


def test_a_mask_of_another_shape_or_without_a_picture_is_said(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "gone.mask.png")
    assert "1 masks have no picture" in dataset.from_folder(tmp_path, (64,), "zvk").report()
    picture(tmp_path / "a.mask.png", (64, 64))
    with pytest.raises(DatasetError, match=r"a\.mask\.png is 64x64, its picture 64x48"):
        dataset.from_folder(tmp_path, (64,), "zvk")


def test_regularisation_pictures_have_no_trigger_and_no_dropout(tmp_path):
    picture(tmp_path / "mine" / "a.png")
    picture(tmp_path / "any" / "b.png")
    (tmp_path / "any" / "b.txt").write_text("a cat")
    found = dataset.from_folder(tmp_path / "mine", (64,), "zvk", Data(caption_dropout=0.5), tmp_path / "any")
    assert [(item.caption, item.regularisation) for item in found.items] == [("zvk", False), ("a cat", True)]
    assert [found.dropout(n) for n in range(2)] == [0.5, 0.0] and "1 for regularisation" in found.report()


def test_a_picture_may_have_its_own_caption_dropout(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x", "caption_dropout": 0.9}\n')
    found = dataset.from_folder(tmp_path, (64,), "zvk")
    assert [found.dropout(n) for n in range(2)] == [0.9, 0.05]


def test_upscale_enlarges_only_where_asked(tmp_path):
    assert buckets.bucket(64, 48, 128) == (64, 48) and buckets.bucket(64, 48, 128, upscale=True) == (144, 112)
    picture(tmp_path / "a.png")
    assert dataset.from_folder(tmp_path, (128,), "zvk", Data(upscale=True)).items[0].pixels().shape == (112, 144, 3)


def test_held_out_is_a_share_of_the_pictures_by_name_at_every_resolution(tmp_path):
    for n in range(10):
        picture(tmp_path / f"{n}.png", (128, 128), (n, n, n))
    found = dataset.from_folder(tmp_path, (64, 96), "zvk", Data(validation=0.3))
    names = {found.items[n].name for n in found.held_out()}
    assert len(names) == 3 and len(found.held_out()) == 6
    assert found.held_out() == dataset.from_folder(tmp_path, (64, 96), "zvk", Data(validation=0.3)).held_out()
    assert dataset.from_folder(tmp_path, (64,), "zvk").held_out() == set()
    assert "6 held out for validation" in found.report()


def test_the_report_names_what_is_cropped_by_how_much(tmp_path):
    picture(tmp_path / "square.png", (64, 64))
    picture(tmp_path / "odd.png", (64, 60))
    assert "Cropped: odd.png 20%." in dataset.from_folder(tmp_path, (64,), "zvk").report()
