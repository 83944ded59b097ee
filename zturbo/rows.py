"""Captions in rows and in JSON, as several trainers write them.

They stand in `metadata.jsonl`, in `metadata.csv`, and in a `cat.json` beside `cat.jpg`.
"""

import csv
import io
import json
import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from . import words
from .errors import DatasetError
from .words import Names

NAMES = ("metadata.jsonl", "metadata.csv")
FILES = ("file_name", "image_path", "image", "file", "path")  # what a row calls its picture, and
TEXTS = ("text", "caption", "prompt", "tags")  # its caption
DEEPEST = 32  # folders of a path whose ends are tried


@dataclass(frozen=True)
class Row:
    """What a row says of a picture. file: as it is called there. caption_dropout: its own, 0 to 1."""

    file: str = ""
    caption: str = ""
    caption_dropout: float | None = None


def caption_of(row) -> str:
    """The first of a row's texts that says something; a list of tags with commas between.

    What is no text is passed over. Raises ValueError for zeros in it.
    """
    for name in TEXTS:
        value = row.get(name) if isinstance(row, dict) else None
        if isinstance(value, list) and all(isinstance(tag, str) for tag in value):
            value = ", ".join(value)
        if isinstance(value, str) and value.strip():
            if "\0" in value:
                raise ValueError("the text has zeros in it")
            return value.strip()
    return ""


def in_json(path: Path, old: dict[Path, None]) -> str:
    """The caption in a JSON file beside a picture; nothing where it holds none.

    Raises DatasetError for what is no text.
    """
    with suppress(ValueError, RecursionError):
        return caption_of(json.loads(words.read(path, old)))
    return ""


def read(file: Path, old: dict[Path, None]) -> list[Row]:
    """The rows of a `metadata.jsonl` (or of one JSON list in it) or a `metadata.csv`.

    Raises DatasetError, naming the line, for what is not that.
    """
    text, is_csv = words.read(file, old), file.suffix.lower() == ".csv"
    like = f"a row with {FILES[0]} and {TEXTS[0]}" if is_csv else f'{{"{FILES[0]}": …, "{TEXTS[0]}": …}} in JSON'
    rows, line = [], 1
    try:
        for number, row in _of_csv(text) if is_csv else _of_json(text):
            line = number
            rows.append(_row(json.loads(row) if isinstance(row, str) else row))
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError, csv.Error) as error:
        at = line + isinstance(error, csv.Error)
        said = f"Line {at} of {file.name} is not {like} ({error}). Mend or delete the line."
        raise DatasetError(said) from error
    return rows


def _row(row) -> Row:
    name = next((row[name] for name in FILES if row.get(name)), None)
    if not isinstance(name, str):
        raise ValueError(f"it names no picture ({', '.join(FILES)})")
    dropout = row.get("caption_dropout")
    if isinstance(dropout, str):
        dropout = float(dropout.replace(",", ".")) if dropout.strip() else None
    if dropout is not None and (isinstance(dropout, bool) or not 0 <= dropout <= 1):
        raise ValueError(f"caption_dropout is {dropout}, not from 0 to 1")
    for key in TEXTS[:2]:
        if row.get(key) is not None and not isinstance(row[key], (str, list)):
            raise ValueError(f"its {key} is no text")
    return Row(name.replace("\\", "/"), caption_of(row), dropout)


def _of_json(text: str) -> Iterator[tuple[int, object]]:
    """(number, row): of one JSON list, or line by line as it is written."""
    if text.lstrip().startswith("[{"):
        with suppress(ValueError, RecursionError):
            yield from enumerate(json.loads(text), 1)
            return
    yield from ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())


def _of_csv(text: str) -> Iterator[tuple[int, object]]:
    header = text.split("\n", 1)[0]
    table = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=header.count))
    names = [name.strip() for name in next(table, [])]
    if not set(names) & set(FILES) or not set(names) & set(TEXTS):
        raise ValueError(f"the first line names no {' or '.join(FILES)} and {' or '.join(TEXTS)}")
    yield from ((table.line_num, dict(zip(names, row))) for row in table if any(row))


def by_picture(
    files: list[Path], pictures: list[Path], old: dict[Path, None]
) -> tuple[dict[Path, Row], list[str], list[str]]:
    """(picture -> its row, names that lead nowhere, names of another place that were matched by their end).

    Letter case counts only between pictures that differ in nothing else.
    """
    names = Names()
    for path in pictures if files else ():
        names.add(os.path.normpath(path), path)

    def there(place: str) -> Path | None:
        alike = names.find(os.path.normpath(place))
        return alike[0] if len(alike) == 1 else None

    found: dict[Path, Row] = {}
    rest: list[tuple[Path, Row]] = []
    for file in files:
        for row in read(file, old):
            if exact := there(f"{file.parent}/{row.file}"):
                found[exact] = row
            else:
                rest.append((file, row))
    claims: dict[Path, list[Row]] = defaultdict(list)
    absent = []
    for file, row in rest:
        parts = row.file.split("/")[-DEEPEST:]
        ends_of_it = ("/".join((str(file.parent), *parts[start:])) for start in range(1, len(parts)))
        end = next(filter(None, map(there, ends_of_it)), None)
        if end is None or end in found:
            absent.append(row.file)
        else:
            claims[end].append(row)
    absent += [row.file for rows in claims.values() if len(rows) > 1 for row in rows]
    ends = {picture: rows[0] for picture, rows in claims.items() if len(rows) == 1}
    return found | ends, absent, [row.file for row in ends.values()]
