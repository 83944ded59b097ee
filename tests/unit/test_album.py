"""A dataset's folder to look at: what may not be meant is found, and captions are written whole."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zturbo import album
from zturbo.album import Album, Asked
from zturbo.errors import DatasetError

SMILEY = Path(__file__).resolve().parents[2] / "models" / "tiny" / "smiley"
ASKED = Asked((128,), "zvk")


def photograph(seed: int, width: int = 640, height: int = 480) -> Image.Image:
    """Soft shapes of many colours."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path):
    for number in range(4):
        photograph(number).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(f"zvk number {number}\n")
    return tmp_path


def looked_at(folder, asked=ASKED) -> dict[str, album.Picture]:
    return {one.name: one for one in Album(folder).pictures(asked)}


def test_a_good_folder_has_nothing_to_say(folder):
    found = looked_at(folder)
    assert all(one.problems == [] for one in found.values())
    one = found["2.png"]
    assert (one.size, one.sizes, one.caption, one.trained) == ((640, 480), [(144, 112)], "zvk number 2", "zvk number 2")
    assert not any(one.problems for one in looked_at(SMILEY, Asked((128,), "zsmile")).values())


def test_what_may_not_be_meant_is_found(folder):
    photograph(1).resize((400, 300)).save(folder / "copy.jpg", quality=60)  # the second one, made small and worse
    photograph(9, 100, 90).save(folder / "small.png")
    photograph(8, 600, 200).resize((1000, 130)).save(folder / "wide.png")
    (folder / "wide.txt").write_text("a wide one")
    (folder / "broken.png").write_bytes(b"GIF8 of nothing")
    (folder / "3.txt").write_text("")
    found = looked_at(folder)
    assert {name: one.problems for name, one in found.items() if one.problems} == {
        "1.png": ["alike"],
        "copy.jpg": ["alike", "silent"],
        "small.png": ["small", "silent"],
        "wide.png": ["trigger"],
        "broken.png": ["broken"],
        "3.png": ["silent"],
    }
    assert found["copy.jpg"].alike == ["1.png"] and found["1.png"].alike == ["copy.jpg"]
    assert "cannot be read as a picture" in found["broken.png"].sentence
    assert found["3.png"].trained == "zvk" and found["wide.png"].trained == "zvk, a wide one"


def test_what_is_cut_away_is_said():
    picture = album.Picture("a", 0, 1, "a", "a", (150, 33), [(144, 32)])
    assert album._problems(picture, Asked((16,))) == []
    picture.sizes = [(64, 32)]
    assert album._problems(picture, Asked((16,))) == ["cropped"]


def test_photographs_of_one_place_are_not_alike_and_worse_copies_are(tmp_path):
    """As perceptual hashes are known to be wrong: plain grounds, turned and mirrored pictures, other colours."""
    base = photograph(5)
    for name, one in {
        "base": base,
        "jpeg": base,
        "half": base.resize((320, 240)),
        "mirrored": base.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        "turned": base.rotate(90, expand=True),
        "red": Image.merge(
            "RGB", [band.point(lambda v, k=k: int(v * k)) for band, k in zip(base.split(), (1, 0.4, 0.4))]
        ),
        "plain": Image.new("RGB", (640, 480), (250, 250, 250)),
        "plain blue": Image.new("RGB", (640, 480), (20, 20, 250)),
    }.items():
        one.save(tmp_path / f"{name}.{'jpg' if name == 'jpeg' else 'png'}", quality=40)
    found = looked_at(tmp_path, Asked((128,)))
    alike = {name: sorted(one.alike) for name, one in found.items() if one.alike}
    assert alike == {
        "base.png": ["half.png", "jpeg.jpg"],
        "half.png": ["base.png", "jpeg.jpg"],
        "jpeg.jpg": ["base.png", "half.png"],
    }


def test_pages_are_cut_and_sieved(folder):
    (folder / "0.txt").unlink()
    pictures = Album(folder).pictures(ASKED)
    whole = album.page(pictures, "", 0)
    assert (whole["total"], whole["wanted"], whole["counts"]["silent"]) == (4, 4, 1)
    assert [one["name"] for one in album.page(pictures, "silent", 0)["pictures"]] == ["0.png"]
    assert [one["name"] for one in album.page(pictures, "any", 0)["pictures"]] == ["0.png"]
    assert album.page(pictures, "broken", 5)["pictures"] == []
    many = [album.Picture(str(n), 0, 1) for n in range(2 * album.PAGE + 1)]
    last = album.page(many, "", 10**6)
    assert last["first"] == 2 * album.PAGE and [one["name"] for one in last["pictures"]] == [str(2 * album.PAGE)]


def test_what_was_read_is_kept_and_read_again_when_it_changes(folder, tmp_path_factory, monkeypatch):
    cache = tmp_path_factory.mktemp("cache")
    for path in folder.iterdir():
        os.utime(path, (1, 1))
    monkeypatch.setattr("zturbo.known.FRESH", -1e12)
    before = [vars(one) for one in Album(folder, cache).pictures(ASKED)]
    monkeypatch.setattr(album, "load_picture", lambda path: pytest.fail("it is known"))
    assert [vars(one) for one in Album(folder, cache).pictures(ASKED)] == before


def test_a_caption_is_written_where_it_counts(folder):
    def caption(name):
        return looked_at(folder)[name].caption

    Album(folder).write("1.png", " zvk, reading\n", "zvk number 1")
    assert (folder / "1.txt").read_bytes() == b"zvk, reading\n" and caption("1.png") == "zvk, reading"
    (folder / "2.txt").rename(folder / "2.caption")
    Album(folder).write("2.png", "zvk, 素描", "zvk number 2")
    assert not (folder / "2.txt").exists() and caption("2.png") == "zvk, 素描"
    photograph(4).save(folder / "new.photo.png")
    Album(folder).write("new.photo.png", "zvk, new", "")
    assert (folder / "new.photo.txt").read_text() == "zvk, new\n" and caption("new.photo.png") == "zvk, new"
    (folder / "3.txt").write_bytes("zvk größer".encode("cp1252"))
    Album(folder).write("3.png", "zvk größer gemacht", "zvk größer")
    assert (folder / "3.txt").read_text(encoding="utf-8") == "zvk größer gemacht\n"
    assert sorted(path.suffix for path in folder.iterdir()).count(".part") == 0


def test_a_caption_that_another_stands_behind_is_not_emptied(folder):
    """It would count then, and the page would say that there is none."""
    (folder / "1.caption").write_text("behind")
    (folder / "2.txt").unlink()
    (folder / "metadata.jsonl").write_text('{"file_name": "2.png", "text": "from a row"}\n')
    for name, was in (("1.png", "zvk number 1"), ("2.png", "from a row")):
        with pytest.raises(DatasetError, match="has another caption behind this one|from a row"):
            Album(folder).write(name, " ", was)
    Album(folder).write("2.png", "my own", "from a row")
    assert looked_at(folder)["2.png"].caption == "my own"
    Album(folder).write("3.png", "", "zvk number 3")
    assert looked_at(folder)["3.png"].problems == ["silent"]


def test_files_that_look_alike_by_name_are_not_mixed_up(folder):
    for name in ("a b.png", "a\u00a0b.png"):
        photograph(len(name)).save(folder / name)
    with pytest.raises(DatasetError, match="2 files look as if they were called 'a b.png'"):
        Album(folder).write("a b.png", "new", "")


def test_what_must_not_be_written_is_refused_and_nothing_changes(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    photograph(6).save(outside / "there.png")
    (folder / "linked").symlink_to(outside)
    (folder / "secret.txt").write_text("not a caption")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for name, caption, was, sentence in (
        ("1.png", "new", "something else", "was changed meanwhile: it is 'zvk number 1' now"),
        ("../1.png", "new", "", "There is no picture"),
        ("secret.txt", "new", "not a caption", "There is no picture"),
        ("1.png", "x" * 20_001, "zvk number 1", "at most 20,000 letters"),
        ("1.png", "a\0b", "zvk number 1", "this is none"),
        ("1.png", "a\ud83d", "zvk number 1", "this is none"),
        (os.path.join("linked", "there.png"), "new", "", "behind a link out of"),
    ):
        with pytest.raises(DatasetError, match=sentence):
            Album(folder).write(name, caption, was)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert list(outside.iterdir()) == [outside / "there.png"]


def test_a_disk_that_refuses_is_said(folder):
    (folder / "1.txt").unlink()
    (folder / "1.txt").mkdir()
    with pytest.raises(DatasetError, match="1.txt cannot be written"):
        Album(folder).write("1.png", "new", "")


def test_a_thumbnail_is_the_whole_picture(folder):
    assert Album(folder).thumbnail("1.png", 320).size == (320, 240)
    shutil.rmtree(folder)
    with pytest.raises(DatasetError):
        Album(folder)
