"""Sets of pictures, of which others take many with settings of their own, and a recipe one folder."""

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import folder
from ..errors import DatasetError
from .record import TAKEN, Moved, Theirs, brief, unique
from .shared import there

ONE_FOLDER = (
    "there is one folder here: put these into it as sub-folders (10_cats shows each picture ten times an epoch), and "
    "give it with --pictures"
)
NO_FOLDER = "no folder of pictures is named; give it with --pictures"
ALIKE = "of one folder, repeats only make an epoch longer"
REPEATED = "put the pictures into a sub-folder named {count}_…"


@dataclass
class PictureSet:
    """One of them.

    name: as lines call it; sides: in pixels; source: all that it says; beside: for regularisation; options: what is one
    for all sets here, as a recipe's dotted keys -> (value, said).
    """

    name: str
    folder: str
    sides: tuple[int, ...]
    source: Theirs
    repeats: int = 1
    beside: bool = False
    options: dict[str, tuple[Any, str]] = field(default_factory=dict)

    @property
    def said(self) -> str:
        return f"{self.name} {brief(self.folder)}"


def join(moved: Moved, sets: list[PictureSet], near: Path):
    """One folder, its resolutions, and one setting for all."""
    for ours, beside in (("inputs.pictures", False), ("inputs.regularisation", True)):
        chosen = [one for one in sets if one.beside == beside]
        _folders(moved, ours, chosen, near)
        for one in chosen:
            if one.repeats != 1:
                alone = len(unique(other.folder for other in sets)) == 1
                why = ALIKE if alone else REPEATED.format(count=one.repeats)
                moved.leave(f"{one.name} repeats {one.repeats}", why)
    own = [one for one in sets if not one.beside]
    sides = unique(number for one in own for number in one.sides)
    if sides:
        said = ", ".join(unique(f"{one.name} {brief(list(one.sides))}" for one in own))
        moved.put("inputs.resolutions", ", ".join(map(str, sides)), said)
    _options(moved, own)


def _folders(moved: Moved, ours: str, sets: list[PictureSet], near: Path):
    folders = unique(one.folder for one in sets if one.folder)
    if len(folders) == 1:
        found = there(folders[0], near)
        why = "" if found else "nothing is there from here; give the folder when you train"
        moved.put(ours, str(found or folders[0]), sets[0].said, why, TAKEN)
    elif folders:
        moved.leave(", ".join(one.said for one in sets), ONE_FOLDER)
    elif ours == "inputs.pictures":
        moved.leave("pictures", NO_FOLDER)


def _options(moved: Moved, sets: list[PictureSet]):
    for key in unique(key for one in sets for key in one.options):
        values = [one.options[key] for one in sets if key in one.options]
        value, said = values[0]
        mixed = len(unique(brief(other) for other, _ in values)) > 1
        if mixed or value is not None:
            moved.put(key, value, said, "one for all pictures here: that of the first set" if mixed else "")


def counted(sets: list[PictureSet], near: Path) -> int | None:
    """Pictures of an epoch as kohya counts one: at each resolution, repeated, and as many for regularisation.

    None: a folder is not there.
    """
    total, beside = 0, False
    for one in sets:
        if one.beside:
            beside = True
            continue
        place = there(one.folder, near) if one.folder else None
        found = None
        if place is not None:
            with contextlib.suppress(DatasetError, OSError):
                found = sum(picture.repeats for picture in folder.look_through(place).pictures)
        if not found:
            return None
        total += found * one.repeats * max(1, len(one.sides))
    return (2 * total if beside else total) or None
