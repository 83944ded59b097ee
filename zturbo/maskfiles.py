"""Which pictures of a folder are masks, and whose: `cat.mask.png` and its kin beside `cat.jpg`, or `masks/cat.png`."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from . import words
from .words import Names, fold

ENDS = (".mask", "-masklabel")  # of a mask's name, before its ending
LOOSE_ENDS = ("_mask", "-mask")  # the same, where the picture itself is there
FOLDERS = ("mask", "masks")
CONDITION = "-condlabel"  # a picture that another trainer shows beside its own
ALL_ENDS = (*ENDS, *LOOSE_ENDS, CONDITION)
MARKS = ("mask", CONDITION)  # one of them is in every name that counts here
ANY = "*"  # a folder in the place of `masks`


@dataclass
class Masks:
    """The masks of a folder, and what is no picture to train on.

    of: picture -> its mask. left_out: masks, and what another trainer keeps beside. By what may be said of them:
    loose: taken for masks by a name that might be a picture's; lonely: without a picture; several: that fit pictures in
    several folders; second: of one picture; condition.
    """

    of: dict[Path, Path] = field(default_factory=dict)
    loose: list[Path] = field(default_factory=list)
    lonely: list[Path] = field(default_factory=list)
    several: list[Path] = field(default_factory=list)
    second: list[Path] = field(default_factory=list)
    condition: list[Path] = field(default_factory=list)
    left_out: set[Path] = field(default_factory=set)

    def take(self, mask: Path, owners: list[Path]):
        self.left_out.add(mask)
        if any(picture in self.of for picture in owners):
            self.second.append(mask)
        for picture in owners:
            self.of.setdefault(picture, mask)


def find(folder: Path, pictures: list[Path]) -> Masks:
    """All masks among the pictures of a folder and its sub-folders."""
    if not any(mark in name for name in map(fold, pictures) for mark in MARKS):
        return Masks()
    stems, beside, found = Names(), Names(), Masks()
    for path in pictures:
        stems.add(words.stem(path), path)
        if not _ways(folder, path):
            parts = _parts(folder, path)
            for n in range(len(parts) - 1):
                beside.add("/".join((*parts[:n], ANY, *parts[n + 1 :])), path)
    unclear: list[Path] = []
    for path in pictures:
        stem = words.stem(path)
        end = _end(fold(stem))
        owners = [other for other in stems.find(stem[: len(stem) - len(end)]) if other != path] if end else []
        if end == CONDITION and owners:
            found.condition.append(path)
            found.left_out.add(path)
        elif owners:
            found.take(path, owners)
            found.loose += [path] if end in LOOSE_ENDS else []
        elif _ways(folder, path):
            unclear.append(path)
        elif end in ENDS:
            found.lonely.append(path)
            found.left_out.add(path)
    _in_folders(folder, unclear, stems, beside, found)
    return found


def _end(stem: str) -> str:
    """Which of the ends of masks' names it has, or nothing."""
    return next((end for end in ALL_ENDS if stem.endswith(end)), "") if stem.endswith(ALL_ENDS) else ""


def _in_folders(folder: Path, unclear: list[Path], stems: Names, beside: Names, found: Masks):
    """Find the masks among what lies in folders `masks`.

    Such a file is a mask where a picture fits; and where none does, but one fits another in that folder.
    """
    served, left = set(), []
    for path in unclear:
        exact = next((owners for way, _ in _ways(folder, path) if (owners := stems.find(str(folder / way)))), [])
        others = next((owners for _, way in _ways(folder, path) if (owners := beside.find(way))), [])
        owners = [other for other in exact or others if other != path]
        if not exact and len({other.parent for other in owners}) > 1:
            found.several.append(path)
            found.left_out.add(path)
        elif owners:
            found.take(path, owners)
            found.loose.append(path)
            served.add(path.parent)
        else:
            left.append(path)
    lonely = [path for path in left if path.parent in served or fold(path.stem).endswith(ENDS)]
    found.lonely += lonely
    found.left_out.update(lonely)


def _parts(folder: Path, path: Path) -> tuple[str, ...]:
    return *_folders(folder, os.path.dirname(path))[0], path.stem


@lru_cache(1024)
def _folders(folder: Path, parent: str) -> tuple[tuple[str, ...], bool]:
    """(the folders that lead from one to the other, is one of them called as `FOLDERS` are?)."""
    parts = Path(parent).relative_to(folder).parts
    return parts, any(fold(part) in FOLDERS for part in parts)


def _ways(folder: Path, path: Path) -> list[tuple[str, str]]:
    """Where the picture of a file in a folder `masks` would be: (its way without that folder, with any other there).

    Nothing for a file in no such folder.
    """
    if not _folders(folder, os.path.dirname(path))[1]:
        return []
    *folders, last = _parts(folder, path)
    names = [last, *(last[: len(last) - len(end)] for end in (*ENDS, *LOOSE_ENDS) if fold(last).endswith(end))]
    ways = []
    for n, part in enumerate(folders):
        if fold(part) in FOLDERS:
            before, behind = folders[:n], folders[n + 1 :]
            ways += [("/".join((*before, *behind, name)), "/".join((*before, ANY, *behind, name))) for name in names]
    return ways


def lines(masks: Masks) -> Iterator[tuple[list[Path], str]]:
    """What a report says of them: (files, words)."""
    yield masks.loose, "pictures are taken for masks by their names"
    yield masks.lonely, "masks have no picture and are not used"
    yield masks.several, "masks fit pictures in several folders and are not used"
    yield masks.second, "masks are a second one for their picture and are not used"
    yield masks.condition, f"pictures ({CONDITION}) are what another trainer shows beside the picture and are left out"
