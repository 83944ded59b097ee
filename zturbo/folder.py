"""What lies in a folder of pictures: which files are pictures, with which caption, mask and repeats, and what is left out, and why."""

import csv
import json
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from . import words
from .errors import DatasetError, readable
from .picturefile import PICTURES

CAPTIONS = (".txt", ".caption", ".json")
METADATA = ("metadata.jsonl", "metadata.csv")
FILES = ("file_name", "image_path", "image", "file", "path")  # what a row calls its picture, and
TEXTS = ("text", "caption", "prompt", "tags")  # its caption
MASKS = (".mask", "-masklabel")  # how a mask's name ends, before its ending: cat.mask.png, cat-masklabel.png beside cat.jpg
MASKS_TOO = ("_mask", "-mask")  # the same, where the picture itself is there
MASK_FOLDERS = ("mask", "masks")  # masks/cat.png beside cat.jpg
CONDITION = "-condlabel"  # a picture that another trainer shows beside its own
SYSTEM = {  # folders that systems make for themselves, small pictures of all others among it
    "@eadir", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "$recycle.bin", "recycler", "system volume information", "lost+found", "__macosx", "__pycache__",
}  # fmt: skip
SYSTEM_FILES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "picasa.ini"}
REPEATS = re.compile(r"(\d+)_(.*)", re.DOTALL)  # 10_name: ten times
DOUBTED = 200  # repeats: more is no one's wish
MOST = 9999  # repeats: a longer number is a date
LISTED = 3  # names in a note


@dataclass(frozen=True)
class Row:
    """What a `metadata.jsonl` says of a picture. file: as it is called there. caption_dropout: its own, 0 to 1."""

    file: str = ""
    caption: str = ""
    caption_dropout: float | None = None


@dataclass(frozen=True)
class Found:
    """A picture and what belongs to it. name: its path in the folder. captions: text files. words: of its folder's name behind the number (`10_zvk cat`)."""

    path: Path
    name: str
    captions: tuple[Path, ...]
    row: Row
    mask: Path | None
    repeats: int
    words: str

    def caption(self, old: list[Path]) -> str:
        """What the first of its text files that says something says, else its line in metadata.jsonl. Raises DatasetError."""
        return next(filter(None, (_caption_in(path, old) for path in self.captions)), self.row.caption)


def _caption_in(path: Path, old: list[Path]) -> str:
    """What a text file says, or the caption in a JSON file; nothing where that holds none. Raises DatasetError."""
    text = words.read(path, old).strip()
    if path.suffix.lower() != ".json":
        return text
    with suppress(ValueError, RecursionError):
        return caption_of(json.loads(text))
    return ""


def caption_of(row) -> str:
    """Of a row or a JSON file: the first of its texts that says something, a list of tags with commas between."""
    for name in TEXTS:
        value = row.get(name) if isinstance(row, dict) else None
        if isinstance(value, list) and all(isinstance(tag, str) for tag in value):
            value = ", ".join(value)
        if value is not None and not isinstance(value, str):
            raise ValueError(f"its {name} is no text")
        if value and value.strip():
            return value.strip()
    return ""


@dataclass
class Listing:
    """A folder that was looked through. notes: what is used in a way that one might not expect, or not at all; a line each kind. old: text files that are no UTF-8."""

    pictures: list[Found] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    old: list[Path] = field(default_factory=list)

    def note(self, files: Iterable[str | Path], what: str, behind: str = ""):
        """A line `3 {what}: a, b, c{behind}.`, where there are some."""
        names = [readable(file if isinstance(file, str) else file.name) for file in files]
        if names:
            more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
            self.notes.append(f"{len(names)} {what}: {', '.join(names[:LISTED])}{more}{behind}.")


def fold(path: Path | str) -> str:
    """One spelling for what people call the same name: letter case, and how an accent is composed (macOS takes it apart)."""
    return unicodedata.normalize("NFC", str(path)).casefold()


def stem_of(path: Path) -> str:
    return fold(path.with_suffix(""))


def look_through(folder: Path, but: Path | None = None) -> Listing:
    """Every picture of a folder and its sub-folders, links followed. What lies in `but` is left alone. Raises DatasetError for a folder that is not there or has no pictures."""
    if not folder.is_dir():
        raise DatasetError(f"The folder {folder} does not exist. Put 10 to 30 pictures into a folder and give its name; in a graph it lies in the input folder.")
    found = Listing()
    files = all_files(folder, but, found)
    pictures = [path for path in files if path.suffix.lower() in PICTURES]
    masks = _masks(folder, pictures, found)
    used = [path for path in pictures if path not in masks.left_out]
    captions = _captions(files, used, found)
    rows = _rows(files, pictures, found)
    for path in used:
        repeats, behind = repeats_of(path.parent, folder)
        name = readable(str(path.relative_to(folder)))
        found.pictures.append(Found(path, name, captions[path], rows.get(fold(path), Row()), masks.of.get(path), repeats, behind))
    found.note((one.name for one in found.pictures if not one.repeats), "pictures lie in folders whose name says 0 times and are left out")
    found.pictures = [one for one in found.pictures if one.repeats]
    found.note((path for path in files if path.suffix.lower() not in (*PICTURES, *CAPTIONS) and fold(path.name) not in METADATA), "files are not read", f". Pictures end in {', '.join(PICTURES)}")
    _doubts(folder, found)
    _need_one_set(folder, found)
    if not found.pictures:
        raise DatasetError(" ".join([f"The folder {folder} has no pictures ({', '.join(PICTURES)}). Put 10 to 30 pictures into it.", *found.notes]))
    return found


def all_files(folder: Path, but: Path | None = None, found: Listing | None = None) -> list[Path]:
    """Those that count, in the order of their paths, without those in `but`; each real folder once, so that links in a circle end. What is left out is noted."""
    found = found or Listing()
    files: list[Path] = []
    seen, apart = set(), "" if but is None else os.path.realpath(but)
    system, hidden, nowhere, again = [], [], [], []
    for place, folders, names in os.walk(folder, followlinks=True):
        here, real = Path(place), os.path.realpath(place)
        if real == apart and here != folder:
            folders.clear()
            continue
        if real in seen:
            again.append(here.relative_to(folder).as_posix())
            folders.clear()
            continue
        seen.add(real)
        left = [name for name in folders if name.startswith(".") or fold(name) in SYSTEM]
        system += [(here / name).relative_to(folder).as_posix() for name in left]
        folders[:] = sorted(set(folders) - set(left))
        for name in names:
            if name.startswith(".") or fold(name) in SYSTEM_FILES:
                hidden.append(name)
            elif (here / name).is_file():
                files.append(here / name)
            else:
                nowhere.append(name)
    found.note(sorted(system), "folders are hidden or a system's own and are left out")
    found.note(sorted(hidden), "files are hidden or a system's own and are left out")
    found.note(sorted(nowhere), "links lead to no file and are left out")
    found.note(sorted(again), "folders are links to one that is read already and are left out")
    return sorted(files)


@dataclass
class _Masks:
    of: dict[Path, Path]
    left_out: set[Path]  # of the pictures: masks, and what another trainer keeps beside


def _masks(folder: Path, pictures: list[Path], found: Listing) -> _Masks:
    """Which pictures are masks, and whose."""
    by_stem: dict[str, list[Path]] = defaultdict(list)
    beside: dict[str, list[Path]] = defaultdict(list)  # as masks/sub/cat would be found from images/sub/cat and sub/cat
    for path in pictures:
        by_stem[stem_of(path)].append(path)
        if not _mask_folders(folder, path):
            for place in _without_one_folder(folder, path):
                beside[place].append(path)
    masks, lonely, left_out, second = _Masks({}, set()), [], [], []
    for path in pictures:
        stem = stem_of(path)
        sure = next((end for end in MASKS if stem.endswith(end)), "")
        end = sure or next((end for end in MASKS_TOO if stem.endswith(end) and stem.removesuffix(end) in by_stem), "")
        owners = by_stem.get(stem.removesuffix(end), []) if end else next((beside[place] for place in _mask_folders(folder, path) if place in beside), [])
        if stem.endswith(CONDITION) and stem.removesuffix(CONDITION) in by_stem:
            left_out.append(path)
        elif sure or owners:
            masks.left_out.add(path)
            lonely += [] if owners else [path]
            for picture in owners:
                second += [path] if picture in masks.of else []
                masks.of.setdefault(picture, path)
    masks.left_out.update(left_out)
    found.note(lonely, "masks have no picture and are not used")
    found.note(second, "masks are a second one for their picture and are not used")
    found.note(left_out, f"pictures ({CONDITION}) are what another trainer shows beside the picture and are left out")
    twins = [path for same in by_stem.values() for path in [path for path in same if path not in masks.left_out][1:]]
    found.note(twins, "pictures have the name of another with another ending, and its caption")
    return masks


def _mask_folders(folder: Path, path: Path) -> list[str]:
    """Where the picture of a file in a folder `masks` would be: its place without that folder, or with another in its stead. Nothing for a file in no such folder."""
    parts = Path(stem_of(path.relative_to(folder))).parts
    return ["/".join(parts[:n] + parts[n + 1 :]) for n, part in enumerate(parts[:-1]) if part in MASK_FOLDERS]


def _without_one_folder(folder: Path, path: Path) -> list[str]:
    """Its place in the dataset, whole and with each of its folders taken out."""
    parts = Path(stem_of(path.relative_to(folder))).parts
    return ["/".join(parts), *("/".join(parts[:n] + parts[n + 1 :]) for n in range(len(parts) - 1))]


def _captions(files: list[Path], used: list[Path], found: Listing) -> dict[Path, tuple[Path, ...]]:
    """Picture -> the text files that may be its caption, the first first: cat.txt, cat.caption, cat.jpg.txt, cat.jpg.caption; in any letter case."""
    there: dict[str, list[Path]] = defaultdict(list)
    for path in files:
        if path.suffix.lower() in CAPTIONS:
            there[fold(path)].append(path)
    of = {}
    for picture in used:
        names = [picture.with_suffix(ending) for ending in CAPTIONS] + [Path(f"{picture}{ending}") for ending in CAPTIONS]
        of[picture] = tuple(_nearest(there[fold(name)], name.stem) for name in names if fold(name) in there)
    taken = {path for texts in of.values() for path in texts}
    found.note((path for paths in there.values() for path in paths if path not in taken), "captions have no picture and are not used")
    return of


def _nearest(paths: list[Path], stem: str) -> Path:
    """Of files whose names differ in letter case alone, the one that is written as the picture is."""
    return next((path for path in paths if path.stem == stem), paths[0])


def repeats_of(folder: Path, root: Path) -> tuple[int, str]:
    """(times that the pictures of a folder are shown in an epoch, the words behind). `10_zvk cat` means ten times; the nearest such folder below `root` counts."""
    for place in (folder, *folder.parents):
        if place == root:
            named = REPEATS.match(place.name)
            return 1, named[2].strip() if named and int(named[1]) <= DOUBTED else ""
        if (named := REPEATS.match(place.name)) and int(named[1]) <= MOST:
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
        found.notes.append(f"The number in the name of the folder itself ({folder.name}) does not count: repeats are those of sub-folders, {named[1]}_name.")
    often = {one.path.parent.name: one.repeats for one in found.pictures if one.repeats > DOUBTED}
    found.notes += [f"The folder {name} shows each of its pictures {repeats:,} times an epoch. If its number is a date, rename the folder: {DOUBTED} is a lot." for name, repeats in often.items()]
    dates = {part for one in found.pictures for part in one.path.relative_to(folder).parts[:-1] if (named := REPEATS.match(part)) and int(named[1]) > MOST}
    found.note(sorted(dates), "folders have a number of more than four digits, which does not count as repeats")


def _rows(files: list[Path], pictures: list[Path], found: Listing) -> dict[str, Row]:
    """What all `metadata.jsonl` and `metadata.csv` say, by the folded path of each picture. Where a name leads nowhere, the longest end of it that does is taken."""
    there, rows = {fold(path) for path in pictures}, {}
    for file in (file for file in files if fold(file.name) in METADATA):
        absent = []
        for row in read_metadata(file, found.old):
            parts = row.file.split("/")
            places = (fold(os.path.normpath(file.parent / "/".join(parts[start:]))) for start in range(len(parts)))
            place = next((place for place in places if place in there), "")
            if place:
                rows[place] = row
            else:
                absent.append(row.file)
        found.note(absent, f"pictures of {file.name} are not there")
    return rows


def read_metadata(file: Path, old: list[Path] | None = None) -> list[Row]:
    """The rows of a `metadata.jsonl` (or one JSON list) or `metadata.csv`. Raises DatasetError, naming the line, for what is not that."""
    text = words.read(file, old)
    if file.suffix.lower() == ".csv":
        numbered: list = list(enumerate(csv.DictReader(text.splitlines()), 2))
    elif text.lstrip().startswith("[") and (listed := _json_list(text)) is not None:
        numbered = list(enumerate(listed, 1))
    else:
        numbered = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    rows = []
    for number, line in numbered:
        try:
            row = json.loads(line) if isinstance(line, str) else line
            dropout = row.get("caption_dropout") or None if file.suffix.lower() == ".csv" else row.get("caption_dropout")
            dropout = float(dropout) if isinstance(dropout, str) else dropout
            if dropout is not None and (isinstance(dropout, bool) or not 0 <= dropout <= 1):
                raise ValueError(f"caption_dropout is {dropout}, not from 0 to 1")
            caption = caption_of(row)
            if "\0" in caption:
                raise ValueError("the text has zeros in it")
            name = next((row[name] for name in FILES if row.get(name)), None)
            if not isinstance(name, str):
                raise ValueError(f"it names no picture ({', '.join(FILES)})")
            rows.append(Row(name.replace("\\", "/"), caption, dropout))
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise DatasetError(f'Line {number} of {file.name} is not {{"file_name": …, "text": …}} in JSON ({error}). Mend or delete the line.') from error
    return rows


def _json_list(text: str) -> list | None:
    with suppress(ValueError, RecursionError):
        return json.loads(text)
    return None
