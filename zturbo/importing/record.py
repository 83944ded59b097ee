"""What is asked of another trainer's settings, and what is written down of the answers."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .. import settings
from ..errors import ZTurboError
from ..recipe import Recipe
from .reasons import NEUTRAL

TAKEN, CHANGED, DEFAULT, LEFT, OFF = "taken", "changed", "default", "left out", "off"
LONGEST = 120  # letters of a value in a line
UNKNOWN = "nothing here is set by it"
OURS = settings.flat(Recipe())


@dataclass(frozen=True)
class Line:
    """What became of one setting. how: taken, changed, default (that trainer's own, not in the file), left out, off."""

    how: str
    theirs: str
    ours: str = ""
    why: str = ""

    def spelled(self) -> str:
        moved = f"{self.theirs} -> {self.ours}" if self.ours else self.theirs
        return f"{self.how:9} {moved}{f': {self.why}' if self.why else ''}"


class Theirs:
    """Settings of another trainer. What nobody asks for is left over.

    values: names -> values, null is as if it were not there; where: what stands in front of the names in a line.
    """

    def __init__(self, values: Mapping[str, Any], where: str = "", name: str = ""):
        self.values, self.where, self.config = values, where, name
        self.seen: set[str] = set()
        self.parts: list[Theirs] = []

    def raw(self, key: str) -> Any:
        """As it stands in the file; None: not there."""
        self.seen.add(key)
        return self.values.get(key)

    def section(self, key: str) -> "Theirs":
        """Empty where it is not there. Raises ZTurboError for what is none."""
        value = self.raw(key)
        if value is not None and not isinstance(value, dict):
            raise ZTurboError(f"{self.where}{key} is {brief(value)}; it must be a section with settings of its own.")
        return self.add(value or {}, f"{self.where}{key}.")

    def sections(self, key: str) -> list["Theirs"]:
        """Of a list of them. Raises ZTurboError for what is none."""
        value = self.raw(key) or []
        if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
            raise ZTurboError(f"{self.where}{key} is {brief(value)}; it must be a list of sections.")
        return [self.add(one, f"{self.where}{key}[{number}].") for number, one in enumerate(value)]

    def add(self, values: dict, where: str) -> "Theirs":
        self.parts.append(Theirs(values, where, self.config))
        return self.parts[-1]

    def number(self, key: str) -> float | None:
        """Also one that is written as text: YAML takes 1e-4 for text. Raises ZTurboError."""
        value = self.raw(key)
        if value is None or value == "":
            return None
        try:
            found = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            found = math.nan
        if not math.isfinite(found):
            raise ZTurboError(f"{self.where}{key} is {brief(value)}; it must be a number.")
        return found

    def whole(self, key: str) -> int | None:
        found = self.number(key)
        if found is not None and found != int(found):
            raise ZTurboError(f"{self.where}{key} is {brief(self.values[key])}; it must be a whole number.")
        return None if found is None else int(found)

    def flag(self, key: str) -> bool | None:
        value = self.raw(key)
        if value is None or isinstance(value, bool):
            return value
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False, "": False}
        if str(value).strip().lower() not in words:
            raise ZTurboError(f"{self.where}{key} is {brief(value)}; it must be true or false.")
        return words[str(value).strip().lower()]

    def text(self, key: str) -> str | None:
        """With the job's name where `[name]` stands. Empty counts as not there. Raises ZTurboError."""
        value = self.raw(key)
        if value is not None and not isinstance(value, (str, int, float)):
            raise ZTurboError(f"{self.where}{key} is {brief(value)}; it must be text.")
        return None if value is None or value == "" else self.named(str(value))

    def named(self, text: str) -> str:
        return text.replace("[name]", self.config) if self.config else text

    def texts(self, key: str) -> list[str]:
        """Of a list, or of one text alone. Raises ZTurboError."""
        value = self.raw(key)
        listed = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(one, (str, int, float)) for one in listed):
            raise ZTurboError(f"{self.where}{key} is {brief(value)}; it must be a list of texts.")
        return [self.named(str(one)) for one in listed]

    def said(self, *keys: str) -> str:
        """Names with values, as a line has them."""
        return ", ".join(
            f"{self.where}{key} {brief(self.values[key])}" for key in keys if self.values.get(key) is not None
        )

    def left(self) -> Iterator[tuple[str, str, Any]]:
        """(name, name with what stands in front, value) of all that nobody has asked for."""
        for key, value in self.values.items():
            if key not in self.seen and value is not None:
                yield str(key), f"{self.where}{key}", value
        for part in self.parts:
            yield from part.left()


class Moved:
    """Settings of a recipe, dotted key -> value, and a line for each that was looked at."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.lines: list[Line] = []

    def put(self, key: str, value: Any, theirs: str, why: str = "", how: str = ""):
        """how: taken, or changed where there is a why."""
        self.values[key] = value
        self.lines.append(Line(how or (CHANGED if why else TAKEN), theirs, f"{key} {brief(value)}", why))

    def leave(self, theirs: str, why: str):
        if theirs:
            self.lines.append(Line(LEFT, theirs, why=why))

    def take(self, source: Theirs, key: str, ours: str, kind: str, default: Any = None):
        """A setting that both have. kind: number, whole, flag or text; default: that trainer's."""
        value = getattr(source, kind)(key)
        if value is not None:
            self.put(ours, value, source.said(key))
        elif default is not None:
            self.default(ours, default, f"{source.where}{key}")

    def default(self, ours: str, value: Any, key: str):
        """What the file leaves out is that trainer's default."""
        if value == OURS[ours]:
            return
        self.put(ours, value, f"{key} (not in the file)", f"{brief(value)} is that trainer's default", DEFAULT)

    def rest(self, source: Theirs, reasons: Mapping[str, str]):
        """Lines for what nobody has asked for. reasons: name -> why it has no counterpart."""
        off, told = [], set()
        for key, name, value in source.left():
            if value in (False, 0, "", [], {}) or value == NEUTRAL.get(key):
                off.append(name)
            elif (key, line := f"{name} {brief(value)}") not in told:
                told.add((key, line))
                self.leave(line, reasons.get(key, UNKNOWN))
        if off:
            self.lines.append(Line(OFF, ", ".join(dict.fromkeys(off)), why="off there, so nothing is missing here"))


def brief(value: Any) -> str:
    """A value as a line quotes it, whatever a file made of it."""
    if isinstance(value, dict):
        return "{…}" if value else "{}"
    if isinstance(value, (list, tuple)):
        some = [brief(one) for one in value[:6] if not isinstance(one, (list, tuple))]
        return f"[{', '.join(some)}{', …' if len(some) < len(value) else ''}]"
    shown = settings.shown(value)
    return shown if len(shown) <= LONGEST else f"{shown[:LONGEST]}…"


def nested(values: Mapping[str, Any]) -> dict:
    """Dotted keys as sections."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        place = found
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = list(value) if isinstance(value, tuple) else value
    return found


def unique(values: Iterable) -> list:
    """Each once, in their order."""
    return list(dict.fromkeys(values))
