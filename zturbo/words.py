"""Text files as people's editors write them."""

import codecs
import os
import re
import unicodedata
from collections import defaultdict
from functools import lru_cache
from pathlib import Path

from .errors import DatasetError

USUAL = 2**14  # bytes of a caption, at most
LONGEST = 10_000_000  # bytes of a caption or of all captions in one file
MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
OLD = "cp1252"  # of Western Windows, for what is no UTF-8
BLANKS = "\t\n\r\f\v"
LETTER = "[^\\x00-\\x7f‘’“”‚„‹›«»–—…•·°©®™€£§¿¡\\u00a0]"  # beyond ASCII, and no sign of Western writing
FOREIGN = re.compile(LETTER + "{4}")  # no Western word: what another writing's code page looks like

# writing without spaces, or with endings grown on
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u9fff\uac00-\ud7a3\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
PLACE = re.compile(r"\[trigger\]", re.IGNORECASE)  # where the trigger word goes in a text


def is_text(text: str) -> bool:
    """Can it be written into a file? Half of a surrogate pair cannot."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def has_word(text: str, word: str) -> bool:
    """Does the word stand in a text by itself, in any letter case?

    In writing without spaces it stands wherever it occurs.
    """
    return _alone(word).search(text) is not None


@lru_cache(64)
def _alone(word: str) -> re.Pattern[str]:
    letter = rf"[^\W{UNSPACED}]"
    before = "" if re.match(f"[{UNSPACED}]", word) else f"(?<!{letter})"
    behind = "" if re.search(f"[{UNSPACED}]$", word) else f"(?!{letter})"
    return re.compile(before + re.escape(word) + behind, re.IGNORECASE)


def filled(text: str, word: str) -> str:
    """With the trigger word where `[trigger]` stands."""
    return PLACE.sub(lambda _: word, text) if word else text


def fold(path: Path | str) -> str:
    """One spelling for what people call the same name.

    It makes one of letter case, and of how an accent is composed (macOS takes it apart).
    """
    text = str(path)
    return text.lower() if text.isascii() else unicodedata.normalize("NFC", text).casefold()


def stem(path: Path) -> str:
    """A file's whole path without its ending."""
    return os.path.splitext(path)[0]


def ending(path: Path) -> str:
    """A file's ending with its dot, in small letters."""
    return os.path.splitext(path)[1].lower()


class Names:
    """Files by name, as it is spelled and else in any letter case."""

    def __init__(self) -> None:
        self.spelled: dict[str, list[Path]] = defaultdict(list)
        self.folded: dict[str, list[Path]] = defaultdict(list)

    def add(self, name: str, path: Path):
        self.spelled[name].append(path)
        self.folded[fold(name)].append(path)

    def find(self, name: str, folded: str | None = None) -> list[Path]:
        """folded: the name as `fold` gives it, where that is known."""
        return self.spelled.get(name) or self.folded.get(fold(name) if folded is None else folded, [])


def read(path: Path, old: dict[Path, None] | None = None) -> str:
    """A text file: UTF-8, or what its mark says (UTF-16, UTF-32), else Windows-1252.

    A file that was read as the last is added to `old`. Raises DatasetError for other code pages, and for what is no
    text (UTF-16 without a mark reads as UTF-8 full of zeros).
    """
    try:
        with open(path, "rb") as file:
            raw = file.read(USUAL)  # room for the longest takes longer to make than a caption to read
            if len(raw) == USUAL:
                raw += file.read(LONGEST + 1 - USUAL)
        if len(raw) > LONGEST:
            raise DatasetError(_too_long(path.name))
        text, is_old = _decode(raw)
    except (UnicodeDecodeError, OSError) as error:
        raise DatasetError(f"{path.name} cannot be read as text ({error}). Save it as UTF-8.") from error
    if "\0" in text or (is_old and any(c < " " and c not in BLANKS for c in text)):
        raise DatasetError(_no_text(path.name, "zeros" if "\0" in text else "signs that no text has"))
    if is_old and (FOREIGN.search(text) or 2 * len(re.findall(LETTER, text)) > max(6, len(text))):
        raise DatasetError(_unknown_code_page(path.name))
    if is_old and old is not None:
        old[path] = None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _too_long(file: str) -> str:
    return f"{file} is no text: it is longer than {LONGEST:,} bytes. Take it out of the folder."


def _no_text(file: str, has: str) -> str:
    return f"{file} is no text: it has {has} in it. Save it as UTF-8, or take it out of the folder."


def _unknown_code_page(file: str) -> str:
    return (
        f"{file} is no UTF-8, and in a code page that cannot be told "
        "(GBK, Big5, Shift-JIS, a Central European or Cyrillic one?). Save it as UTF-8."
    )


def _decode(raw: bytes) -> tuple[str, bool]:
    """(the text, is it Windows-1252)."""
    if raw.startswith(tuple(MARKS)):
        encoding = next(encoding for mark, encoding in MARKS.items() if raw.startswith(mark))
        return raw.decode(encoding), False
    try:
        return raw.decode(), False
    except UnicodeDecodeError:
        return raw.decode(OLD), True
