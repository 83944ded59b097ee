"""What lies in a folder of pictures: which files are pictures, with which caption, mask and repeats, and what is left out, and why."""

import os
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from . import maskfiles, rows, words
from .errors import DatasetError, readable
from .picturefile import PICTURES
from .rows import Row
from .words import Names, fold

CAPTIONS = (".txt", ".caption")
JSON = ".json"
SYSTEM = {  # folders that systems make for themselves, small pictures of all others among it
    "@eadir", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "$recycle.bin", "recycler", "system volume information", "lost+found", "__macosx", "__pycache__",
}  # fmt: skip
SYSTEM_FILES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "picasa.ini"}
REPEATS = re.compile(r"(\d+)_(.*)", re.DOTALL)  # 10_name: ten times
DOUBTED = 200  # repeats: more is no one's wish
MOST = 9999  # repeats: a longer number is a date
LISTED = 3  # names in a note
LONGEST = 80  # letters of a name in a note


@dataclass(frozen=True)
class Found:
    """A picture and what belongs to it. name: its path in the folder. captions: text files, the first first; json: one that may hold a caption. words: of its folder's name behind the number (`10_zvk cat`)."""

    path: Path
    name: str
    captions: tuple[Path, ...]
    row: Row
    json: Path | None
    mask: Path | None
    repeats: int
    words: str

    def caption(self, old: dict[Path, None]) -> tuple[str, bool]:
        """(what the first of its text files, its row and its JSON file that says something says, does it come from the last). Raises DatasetError."""
        text = next(filter(None, (words.read(path, old).strip() for path in self.captions)), self.row.caption)
        if text or self.json is None:
            return text, False
        return rows.in_json(self.json, old), True


@dataclass
class Listing:
    """A folder that was looked through. notes: what is used in a way that one might not expect, or not at all; a line each kind. old: text files that are no UTF-8."""

    pictures: list[Found] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    old: dict[Path, None] = field(default_factory=dict)

    def note(self, files: Iterable[str | Path], what: str, behind: str = ""):
        """A line `3 {what}: a, b, c{behind}.`, where there are some."""
        names = [readable(file if isinstance(file, str) else file.name) for file in files]
        if names:
            more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
            listed = ", ".join(name if len(name) <= LONGEST else f"{name[:LONGEST]}…" for name in names[:LISTED])
            self.notes.append(f"{len(names)} {what}: {listed}{more}{behind}.")


def look_through(folder: Path, but: Path | None = None) -> Listing:
    """Every picture of a folder and its sub-folders, links followed. What lies in `but` is left alone. Raises DatasetError for a folder that is not there or has no pictures."""
    if not folder.is_dir():
        raise DatasetError(
            f"The folder {folder} does not exist. Put 10 to 30 pictures into a folder and give its name; in a graph it lies in the input folder."
        )
    found = Listing()
    files = all_files(folder, but, found)
    pictures = [path for path in files if path.suffix.lower() in PICTURES]
    masks = maskfiles.find(folder, pictures)
    for some, what in maskfiles.lines(masks):
        found.note(some, what)
    used = [path for path in pictures if path not in masks.left_out]
    beside = _beside(files, used, found)
    by_picture, absent, by_end = rows.by_picture(
        [file for file in files if fold(file.name) in rows.NAMES], pictures, found.old
    )
    found.note(absent, "rows of metadata name pictures that are not there")
    found.note(by_end, "rows of metadata name another place and were matched by the end of it")
    for path in used:
        repeats, behind = repeats_of(path.parent, folder)
        name = readable(str(path.relative_to(folder)))
        texts, json = beside[path]
        found.pictures.append(
            Found(path, name, texts, by_picture.get(path, Row()), json, masks.of.get(path), repeats, behind)
        )
    found.note(
        (one.name for one in found.pictures if not one.repeats),
        "pictures lie in folders whose name says 0 times and are left out",
    )
    found.pictures = [one for one in found.pictures if one.repeats]
    taken = {one.json for one in found.pictures}
    found.note(
        (path for path in files if not _is_read(path) and path not in taken),
        "files are not read",
        f". Pictures end in {', '.join(PICTURES)}",
    )
    _doubts(folder, found)
    _need_one_set(folder, found)
    if not found.pictures:
        raise DatasetError(
            " ".join(
                [
                    f"The folder {folder} has no pictures ({', '.join(PICTURES)}). Put 10 to 30 pictures into it.",
                    *found.notes,
                ]
            )
        )
    return found


def _is_read(path: Path) -> bool:
    return path.suffix.lower() in (*PICTURES, *CAPTIONS) or fold(path.name) in rows.NAMES


def all_files(folder: Path, but: Path | None = None, found: Listing | None = None) -> list[Path]:
    """Those that count, in the order of their paths, without those in `but`. Each real folder once, itself before a link to it, so that links in a circle end. What is left out is noted, and what lies elsewhere."""
    found = found or Listing()
    root, apart = os.path.realpath(folder), "" if but is None else os.path.realpath(but)
    files: list[Path] = []
    system, hidden, nowhere, again, closed, elsewhere = [], [], [], [], [], []
    todo, seen = [folder], set()
    links: list[Path] = []
    while todo or links:
        here = todo.pop() if todo else links.pop(0)
        real = os.path.realpath(here)
        if real == apart and here != folder:
            continue
        if real in seen:
            again.append(here)
            continue
        seen.add(real)
        try:
            with os.scandir(here) as scanned:
                entries = sorted(scanned, key=lambda entry: entry.name)
        except OSError:
            closed.append(here)
            continue
        for entry in entries:
            path, is_folder = here / entry.name, _is(entry.is_dir)
            if is_folder and (entry.name.startswith(".") or fold(entry.name) in SYSTEM):
                system.append(path)
            elif is_folder:
                (links if entry.is_symlink() else todo).append(path)
            elif entry.name.startswith(".") or fold(entry.name) in SYSTEM_FILES:
                hidden.append(path)
            elif _is(entry.is_file):
                files.append(path)
            else:
                nowhere.append(path)
            if entry.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(root):
                elsewhere.append(path)
    for some, what in (
        (system, "folders are hidden or a system's own and are left out"),
        (hidden, "files are hidden or a system's own and are left out"),
        (nowhere, "links lead to no file and are left out"),
        (again, "folders are links to one that is read already and are left out"),
        (closed, "folders cannot be opened and are left out"),
        ([path for path in elsewhere if path not in nowhere], "links lead out of the folder and are followed"),
    ):
        found.note(sorted(path.relative_to(folder).as_posix() for path in some), what)
    return sorted(files)


def _is(ask) -> bool:
    """What an entry of a folder says of where it leads; no for links in a circle."""
    try:
        return ask()
    except OSError:
        return False


def _beside(files: list[Path], used: list[Path], found: Listing) -> dict[Path, tuple[tuple[Path, ...], Path | None]]:
    """Picture -> (the text files that may be its caption, the first first: cat.txt, cat.caption, cat.jpg.txt, cat.jpg.caption; its JSON file); in any letter case."""
    there = Names()
    for path in files:
        if path.suffix.lower() in (*CAPTIONS, JSON):
            there.add(f"{path.with_suffix('')}{path.suffix.lower()}", path)

    def of(picture: Path, endings: tuple[str, ...]) -> list[Path]:
        names = [f"{stem}{ending}" for stem in (picture.with_suffix(""), picture) for ending in endings]
        return [found[0] for name in names if (found := there.find(name))]

    beside = {picture: (tuple(of(picture, CAPTIONS)), next(iter(of(picture, (JSON,))), None)) for picture in used}
    taken = {path for texts, _ in beside.values() for path in texts}
    found.note(
        (path for path in files if path.suffix.lower() in CAPTIONS and path not in taken),
        "captions have no picture and are not used",
    )
    alike: dict[str, int] = defaultdict(int)
    for picture in used:
        alike[str(picture.with_suffix(""))] += 1
    found.note(
        (path for path in used if alike[str(path.with_suffix(""))] > 1),
        "pictures have the name of another with another ending, and its caption",
    )
    return beside


def repeats_of(folder: Path, root: Path) -> tuple[int, str]:
    """(times that the pictures of a folder are shown in an epoch, the words behind). `10_zvk cat` means ten times; the nearest such folder below `root` counts. Of `root` itself only the words do."""
    for place in (folder, *folder.parents):
        named = REPEATS.match(place.name)
        if place == root:
            return 1, named[2].strip() if named and int(named[1]) <= DOUBTED else ""
        if named and int(named[1]) <= MOST:
            return int(named[1]), named[2].strip()
    return 1, ""


def _need_one_set(folder: Path, found: Listing):
    """Raise DatasetError for the project folder of kohya's trainer, where pictures and regularisation pictures lie side by side."""
    first = {fold(one.path.relative_to(folder).parts[0]) for one in found.pictures}
    if "img" in first and (beside := first & {"reg", "regularization", "regularisation"}):
        apart = next(iter(beside))
        raise DatasetError(
            f"The folder {folder.name} has pictures in img and in {apart}, which would all be taught. Give {folder.name}/img as folder and {folder.name}/{apart} as regularisation_folder."
        )


def _doubts(folder: Path, found: Listing):
    """What names of folders say that may not be meant."""
    if named := REPEATS.match(folder.name):
        found.notes.append(
            f"The number in the name of the folder itself ({folder.name}) does not count: repeats are those of sub-folders, {named[1]}_name."
        )
    often = {one.path.parent.name: one.repeats for one in found.pictures if one.repeats > DOUBTED}
    found.notes += [
        f"The folder {name} shows each of its pictures {repeats:,} times an epoch. If its number is a date, rename the folder: {DOUBTED} is a lot."
        for name, repeats in often.items()
    ]
    dates = {
        part
        for one in found.pictures
        for part in one.path.relative_to(folder).parts[:-1]
        if (named := REPEATS.match(part)) and int(named[1]) > MOST
    }
    found.note(sorted(dates), "folders have a number of more than four digits, which does not count as repeats")
