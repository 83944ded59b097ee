"""What lies in a folder of pictures: which files are pictures, with which caption, mask and repeats.

What is left out is told, and why.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from . import maskfiles, rows, words
from .errors import DatasetError, readable
from .known import Known
from .picturefile import PICTURES
from .rows import Row
from .words import Names, fold

CAPTIONS = (".txt", ".caption")
JSON = ".json"
SYSTEM = {  # folders that systems make for themselves, small pictures of all others among it
    "@eadir", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "$recycle.bin", "recycler",
    "system volume information", "lost+found", "__macosx", "__pycache__",
}  # fmt: skip
NO_ROW = Row()
SYSTEM_FILES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "picasa.ini"}
REPEATS = re.compile(r"(\d+)_(.*)", re.DOTALL)  # 10_name: ten times
DOUBTED = 200  # repeats: more is no one's wish
MOST = 9999  # repeats: a longer number is a date
LISTED = 3  # names in a note
LONGEST = 80  # letters of a name in a note


@dataclass(frozen=True)
class Found:
    """A picture and what belongs to it.

    name: its path in the folder. captions: text files, the first first; json: one that may hold a caption. words: of
    its folder's name behind the number (`10_zvk cat`).
    """

    path: Path
    name: str
    captions: tuple[Path, ...]
    row: Row
    json: Path | None
    mask: Path | None
    repeats: int
    words: str

    def caption(self, old: dict[Path, None], known: Known) -> tuple[str, bool]:
        """(the caption, does it come from the JSON file): of the first that says something. Raises DatasetError.

        The text files come first, then the row, then the JSON file.
        """
        text = next(filter(None, (_words(path, old, known) for path in self.captions)), self.row.caption)
        if text or self.json is None:
            return text, False
        return rows.in_json(self.json, old), True


@dataclass
class Listing:
    """A folder that was looked through.

    notes: what is used in a way that one might not expect, or not at all; a line each kind. old: text files that are no
    UTF-8.
    """

    pictures: list[Found] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    old: dict[Path, None] = field(default_factory=dict)

    def note(self, files: Iterable[str | Path], what: str, behind: str = ""):
        """A line `3 {what}: a, b, c{behind}.`, where there are some."""
        names = [readable(file if isinstance(file, str) else file.name) for file in files]
        if names:
            more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
            listed = ", ".join(map(_short, names[:LISTED]))
            self.notes.append(f"{len(names)} {what}: {listed}{more}{behind}.")


def _words(path: Path, old: dict[Path, None], known: Known) -> str:
    """Of a text file. See `words.read`."""

    def read() -> list:
        was_old: dict[Path, None] = {}
        return [words.read(path, was_old).strip(), bool(was_old)]

    text, is_old = known.get(path, "text", read)
    if is_old:
        old[path] = None
    return text


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else f"{name[:LONGEST]}…"


def look_through(folder: Path, but: Path | None = None) -> Listing:
    """Every picture of a folder and its sub-folders, links followed. What lies in `but` is left alone.

    Raises DatasetError for a folder that is not there or has no pictures.
    """
    if not folder.is_dir():
        raise DatasetError(_no_folder(folder))
    found = Listing()
    files = all_files(folder, but, found)
    endings = [words.ending(path) for path in files]
    pictures = [path for path, ending in zip(files, endings) if ending in PICTURES]
    texts = [path for path, ending in zip(files, endings) if ending in (*CAPTIONS, JSON)]
    masks = maskfiles.find(folder, pictures)
    for some, what in maskfiles.lines(masks):
        found.note(some, what)
    used = [path for path in pictures if path not in masks.left_out] if masks.left_out else pictures
    beside = _beside(texts, used, found)
    rest = [path for path, ending in zip(files, endings) if ending not in (*PICTURES, *CAPTIONS)]
    metadata = [file for file in rest if fold(file.name) in rows.NAMES]
    by_picture, absent, by_end = rows.by_picture(metadata, pictures, found.old)
    found.note(absent, "rows of metadata name pictures that are not there")
    found.note(by_end, "rows of metadata name another place and were matched by the end of it")
    places: dict[str, tuple[str, tuple[int, str]]] = {}
    for path in used:
        parent = os.path.dirname(path)
        if parent not in places:
            places[parent] = _place(Path(parent), folder)
        within, (repeats, behind) = places[parent]
        name, row, mask = readable(os.path.join(within, path.name)), by_picture.get(path, NO_ROW), masks.of.get(path)
        captions, json = beside[path]
        found.pictures.append(Found(path, name, captions, row, json, mask, repeats, behind))
    never = [one.name for one in found.pictures if not one.repeats]
    found.note(never, "pictures lie in folders whose name says 0 times and are left out")
    found.pictures = [one for one in found.pictures if one.repeats]
    taken = {one.json for one in found.pictures}
    unread = [path for path in rest if path not in metadata and path not in taken]
    found.note(unread, "files are not read", f". Pictures end in {', '.join(PICTURES)}")
    _doubts(folder, found)
    _need_one_set(folder, found)
    if not found.pictures:
        raise DatasetError(" ".join([_no_pictures(folder), *found.notes]))
    return found


def all_files(folder: Path, but: Path | None = None, found: Listing | None = None) -> list[Path]:
    """Those that count, in the order of their paths, without those in `but`.

    Each real folder once, itself before a link to it, so that links in a circle end. What is left out is noted, and
    what lies elsewhere.
    """
    walk, seen = _Walk(folder, os.path.realpath(folder), [folder]), set()
    apart = "" if but is None else os.path.realpath(but)
    while walk.todo or walk.links:
        here = walk.todo.pop() if walk.todo else walk.links.pop(0)
        real = os.path.realpath(here)
        if real == apart and here != folder:
            continue
        if real in seen:
            walk.again.append(here)
            continue
        seen.add(real)
        walk.open(here)
    walk.tell(found or Listing())
    return sorted(walk.files, key=lambda path: os.path.normcase(path).split(os.sep))


@dataclass
class _Walk:
    """A way through a folder and its sub-folders.

    root: the folder without links. todo: folders that are still to be opened; links: those that links lead to, last.
    """

    folder: Path
    root: str
    todo: list[Path]
    links: list[Path] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    system: list[Path] = field(default_factory=list)
    hidden: list[Path] = field(default_factory=list)
    nowhere: list[Path] = field(default_factory=list)
    again: list[Path] = field(default_factory=list)
    closed: list[Path] = field(default_factory=list)
    elsewhere: list[Path] = field(default_factory=list)

    def open(self, here: Path):
        try:
            with os.scandir(here) as scanned:
                entries = sorted(scanned, key=lambda entry: entry.name)
        except OSError:
            self.closed.append(here)
            return
        for entry in entries:
            path = here / entry.name
            self._kind(entry).append(path)
            if entry.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(self.root):
                self.elsewhere.append(path)

    def _kind(self, entry: os.DirEntry) -> list[Path]:
        """The list where an entry belongs."""
        has_dot, name = entry.name.startswith("."), fold(entry.name)
        if _is(entry.is_dir):
            if has_dot or name in SYSTEM:
                return self.system
            return self.links if entry.is_symlink() else self.todo
        if has_dot or name in SYSTEM_FILES:
            return self.hidden
        return self.files if _is(entry.is_file) else self.nowhere

    def tell(self, found: Listing):
        outside = [path for path in self.elsewhere if path not in self.nowhere]
        for some, what in (
            (self.system, "folders are hidden or a system's own and are left out"),
            (self.hidden, "files are hidden or a system's own and are left out"),
            (self.nowhere, "links lead to no file and are left out"),
            (self.again, "folders are links to one that is read already and are left out"),
            (self.closed, "folders cannot be opened and are left out"),
            (outside, "links lead out of the folder and are followed"),
        ):
            found.note(sorted(path.relative_to(self.folder).as_posix() for path in some), what)


def _is(ask) -> bool:
    """What an entry of a folder says of where it leads; no for links in a circle."""
    try:
        return ask()
    except OSError:
        return False


def _beside(texts: list[Path], used: list[Path], found: Listing) -> dict[Path, tuple[tuple[Path, ...], Path | None]]:
    """Picture -> (the text files that may be its caption, its JSON file), in any letter case.

    The text files in this order: cat.txt, cat.caption, cat.jpg.txt, cat.jpg.caption. texts: those and JSON files.
    """
    there = Names()
    for path in texts:
        there.add(words.stem(path) + words.ending(path), path)

    def of(ways: list[tuple[str, str]], endings: tuple[str, ...]) -> list[Path]:
        names = [(way + ending, folded + ending) for way, folded in ways for ending in endings]
        return [found[0] for name, folded in names if (found := there.find(name, folded))]

    has_json = any(words.ending(path) == JSON for path in texts)
    beside: dict[Path, tuple[tuple[Path, ...], Path | None]] = {}
    stems = list(map(words.stem, used))
    for picture, stem in zip(used, stems):
        ways = [(way, fold(way)) for way in (stem, str(picture))]
        beside[picture] = tuple(of(ways, CAPTIONS)), next(iter(of(ways, (JSON,))), None) if has_json else None
    taken = {path for captions, _ in beside.values() for path in captions}
    lonely = [path for path in texts if path not in taken and words.ending(path) in CAPTIONS]
    found.note(lonely, "captions have no picture and are not used")
    alike = Counter(stems)
    twins = [path for path, stem in zip(used, stems) if alike[stem] > 1]
    found.note(twins, "pictures have the name of another with another ending, and its caption")
    return beside


def _place(folder: Path, root: Path) -> tuple[str, tuple[int, str]]:
    """(a folder's way from the root, see `repeats_of`)."""
    way = str(folder.relative_to(root))
    return "" if way == "." else way, repeats_of(folder, root)


def repeats_of(folder: Path, root: Path) -> tuple[int, str]:
    """(times that the pictures of a folder are shown in an epoch, the words behind).

    `10_zvk cat` means ten times; the nearest such folder below `root` counts. Of `root` itself only the words do.
    """
    for place in (folder, *folder.parents):
        named = REPEATS.match(place.name)
        if place == root:
            return 1, named[2].strip() if named and int(named[1]) <= DOUBTED else ""
        if named and int(named[1]) <= MOST:
            return int(named[1]), named[2].strip()
    return 1, ""


def _need_one_set(folder: Path, found: Listing):
    """Raise DatasetError for the project folder of kohya's trainer.

    There pictures and regularisation pictures lie side by side.
    """
    first = {fold(parts[0]) for parts in _ways(folder, found) if parts}
    if "img" in first and (beside := first & {"reg", "regularization", "regularisation"}):
        raise DatasetError(_two_sets(folder.name, next(iter(beside))))


def _ways(folder: Path, found: Listing) -> list[tuple[str, ...]]:
    """The folders that lead to pictures, each way once."""
    return [parent.relative_to(folder).parts for parent in dict.fromkeys(one.path.parent for one in found.pictures)]


def _doubts(folder: Path, found: Listing):
    """What names of folders say that may not be meant."""
    if named := REPEATS.match(folder.name):
        found.notes.append(_own_number(folder.name, named[1]))
    often = {one.path.parent.name: one.repeats for one in found.pictures if one.repeats > DOUBTED}
    found.notes += [_often(name, repeats) for name, repeats in often.items()]
    below = {part for parts in _ways(folder, found) for part in parts}
    dates = [part for part in below if (named := REPEATS.match(part)) and int(named[1]) > MOST]
    found.note(sorted(dates), "folders have a number of more than four digits, which does not count as repeats")


# What is said of a folder


def _no_folder(folder: Path) -> str:
    return (
        f"The folder {folder} does not exist. "
        "Put 10 to 30 pictures into a folder and give its name; in a graph it lies in the input folder."
    )


def _no_pictures(folder: Path) -> str:
    return f"The folder {folder} has no pictures ({', '.join(PICTURES)}). Put 10 to 30 pictures into it."


def _two_sets(folder: str, apart: str) -> str:
    return (
        f"The folder {folder} has pictures in img and in {apart}, which would all be taught. "
        f"Give {folder}/img as folder and {folder}/{apart} as regularisation_folder."
    )


def _own_number(folder: str, number: str) -> str:
    return (
        f"The number in the name of the folder itself ({folder}) does not count: "
        f"repeats are those of sub-folders, {number}_name."
    )


def _often(folder: str, repeats: int) -> str:
    return (
        f"The folder {folder} shows each of its pictures {repeats:,} times an epoch. "
        f"If its number is a date, rename the folder: {DOUBTED} is a lot."
    )
