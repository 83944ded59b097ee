"""What is known of picture files: nothing is read of what has not changed, and everything of what has."""

import os

import numpy as np
import pytest
from PIL import Image

from zturbo import dataset, known
from zturbo.errors import DatasetError
from zturbo.recipe import Data

OLD = 10**18  # nanoseconds, years ago


@pytest.fixture(autouse=True)
def settled(monkeypatch):
    """Files of this moment count as old."""
    monkeypatch.setattr(known, "FRESH", -60e9)


@pytest.fixture
def decoded(monkeypatch) -> list:
    """Names of the files that were decoded or hashed."""
    seen: list = []
    for name in ("load_picture", "load_mask", "has_transparency"):
        real = getattr(dataset, name)
        monkeypatch.setattr(
            dataset,
            name,
            lambda path, *more, real=real, **beside: (seen.append(path.name), real(path, *more, **beside))[1],
        )
    real_sum = known.files.sha256
    monkeypatch.setattr(known.files, "sha256", lambda path: (seen.append(path.name), real_sum(path))[1])
    return seen


def picture(path, shade, size=(64, 64), mode="RGB"):
    Image.new(mode, size, (shade, 0, 0, 128)[: len(mode)]).save(path)


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "set"
    place.mkdir()
    picture(place / "a.png", 10)
    picture(place / "b.png", 20, mode="RGBA")
    picture(place / "c.png", 30, (64, 96))
    Image.new("L", (64, 96), 200).save(place / "c.mask.png")
    return place


def read(folder, place, **options):
    return dataset.from_folder(folder, (64,), "zvk", Data(**options), cache=place)


@pytest.mark.parametrize("masks", ["off", "files", "files and alpha"])
def test_a_folder_that_has_not_changed_is_not_decoded_and_read_alike(tmp_path, folder, decoded, masks):
    first = read(folder, tmp_path / "cache", masks=masks)
    assert {"a.png", "b.png", "c.png"} <= set(decoded)
    decoded.clear()
    again = read(folder, tmp_path / "cache", masks=masks)
    assert decoded == [] and again == first and again.digest() == first.digest()
    assert read(folder, None, masks=masks) == first and "a.png" in decoded
    decoded.clear()
    assert read(folder, tmp_path / "cache", masks=masks, cache=False).items == first.items and "a.png" in decoded


@pytest.mark.parametrize("keeps_time", [False, True])
def test_a_file_that_was_changed_is_read_anew(tmp_path, folder, decoded, keeps_time):
    """Also one of the same size whose time was set back, as copying with times does."""
    raw = [np.full((64, 64, 3), shade, np.uint8) for shade in (10, 90)]
    for number in range(2):
        Image.fromarray(raw[number]).save(tmp_path / f"{number}.bmp")
    contents = [(tmp_path / f"{number}.bmp").read_bytes() for number in range(2)]
    assert len(contents[0]) == len(contents[1])
    file = folder / "d.bmp"
    file.write_bytes(contents[0])
    os.utime(file, ns=(OLD, OLD))
    before = read(folder, tmp_path / "cache")
    decoded.clear()
    file.write_bytes(contents[1])
    if keeps_time:
        os.utime(file, ns=(OLD, OLD))
    after = read(folder, tmp_path / "cache")
    assert set(decoded) == {"d.bmp"}
    one, other = (next(item for item in made.items if item.name == "d.bmp") for made in (before, after))
    assert one.content != other.content and one.key != other.key and before.digest() != after.digest()
    assert [item for item in before.items if item != one] == [item for item in after.items if item != other]


def test_a_young_file_is_not_taken_for_unchanged(tmp_path, folder, decoded, monkeypatch):
    monkeypatch.setattr(known, "FRESH", 60e9)
    read(folder, tmp_path / "cache")
    decoded.clear()
    read(folder, tmp_path / "cache")
    assert {"a.png", "b.png", "c.png"} <= set(decoded)


@pytest.mark.parametrize("harm", ["flip", "cut", "empty", "other", "folder"])
def test_what_is_known_is_read_anew_where_it_is_damaged(tmp_path, folder, decoded, harm):
    first = read(folder, tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    content = bytearray(file.read_bytes())
    content[content.index(b"64")] ^= 1  # a width
    harmed = {"flip": bytes(content), "cut": bytes(content[:-9]), "empty": b"", "other": b"1 0\n{}"}
    if harm == "folder":
        file.unlink()
        file.mkdir()
    else:
        file.write_bytes(harmed[harm])
    decoded.clear()
    assert read(folder, tmp_path / "cache") == first and "a.png" in decoded


def test_a_picture_that_changes_while_it_is_used_is_not_taken_for_what_it_was(tmp_path, folder):
    made = read(folder, tmp_path / "cache", masks="files")
    plain, masked = (next(item for item in made.items if item.name == name) for name in ("a.png", "c.png"))
    picture(folder / "a.png", 11)
    with pytest.raises(DatasetError, match=r"a\.png was changed while it was used\. Queue again"):
        plain.pixels()
    assert masked.mask(0.1) is not None
    Image.new("L", (64, 96), 100).save(folder / "c.mask.png")
    with pytest.raises(DatasetError, match=r"c\.mask\.png was changed"):
        masked.mask(0.1)
