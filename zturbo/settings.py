"""A setting: default, what it may be and what it means, said once, where its field stands.

Checks, the recipe's file, the table in docs/features.md, the nodes' inputs and their tooltips are all made of that.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .errors import ZTurboError
from .words import is_text

KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
STEPS = (0, 100000)  # in a node's widget
SEEDS = (0, 0xFFFFFFFFFFFFFFFF)


@dataclass(frozen=True)
class Setting:
    """What a field may be, and what people read of it."""

    sentence: str  # what it does, what is usual, what it costs: the tooltip
    low: float | None = None  # the least that a recipe may have
    high: float | None = None  # and the most
    above: float | None = None  # it is more than this
    multiple: int | None = None  # it is a multiple of this
    off: int | None = None  # a value that is allowed beside the range
    choices: tuple[str, ...] = ()
    unit: str = ""
    name: str = ""  # what sentences call it, where that is not its field's name
    input: str = ""  # what its node calls it, where that is not this name
    widget: tuple[float, float] | None = None  # least and most in its node, where the recipe's range is wider
    step: float | None = None  # of the node's widget, as is
    round: bool | None = None  # False: the widget rounds no value to its step

    @property
    def allowed(self) -> str:
        """The range, in words that go on from "it must be"; empty: there is none."""
        words = ""
        if self.above is not None:
            words = f"a number above {self.above}"
        elif self.high is not None:
            words = f"from {self.low} to {self.high}"
        elif self.low is not None:
            words = f"at least {self.low}"
        if self.multiple is not None:
            words = f"a multiple of {self.multiple} {words}"
        return words if self.off is None else f"{self.off}, or {words}"

    @property
    def bounds(self) -> tuple[float, float]:
        """Least and most in a node's widget."""
        low, high = self.widget or (self.low, self.high)
        assert low is not None and high is not None, "a number that a node shows needs widget=(least, most)"
        return low, high

    def allows(self, value) -> bool:
        """Is a value of the field's type in the range?"""
        if self.off is not None and value == self.off:
            return True
        return (
            (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
            and (self.multiple is None or value % self.multiple == 0)
        )


def setting(default, sentence: str, **rules) -> Any:
    """A dataclass's field for a setting. rules: as the fields of `Setting`."""
    return dataclasses.field(default=default, metadata={"setting": Setting(sentence, **rules)})


def each(kind) -> Iterator[tuple[dataclasses.Field, Setting]]:
    """The settings of a dataclass or of one of its objects, with their names filled in; not those of its sections."""
    for field in dataclasses.fields(kind):
        if not dataclasses.is_dataclass(field.type):
            found = field.metadata["setting"]
            name = found.name or field.name
            yield field, dataclasses.replace(found, name=name, input=found.input or name)


def sections(settings) -> Iterator[tuple[str, Any]]:
    """(what stands in front of its keys, object): the settings themselves and their sections. Raises ZTurboError."""
    yield "", settings
    for field in dataclasses.fields(settings):
        if dataclasses.is_dataclass(field.type):
            value = getattr(settings, field.name)
            if type(value) is not field.type:
                raise ZTurboError(
                    f"{field.name} is {shown(value)}; it must be a section, [{field.name}], with keys of its own."
                )
            yield f"{field.name}.", value


def flat(settings) -> dict[str, Any]:
    """Dotted key -> value, over all sections."""
    return {
        where + field.name: getattr(part, field.name) for where, part in sections(settings) for field, _ in each(part)
    }


def names(settings, of: tuple[str, ...] = ("name",)) -> dict[str, str]:
    """What sentences call a setting -> its dotted key. Of two with one name it is the first; the other has no range."""
    found: dict[str, str] = {}
    for where, part in sections(settings):
        for field, known in each(part):
            for attribute in of:
                found.setdefault(getattr(known, attribute), where + field.name)
    return found


def check(settings):
    """Raise ZTurboError for a value that its field does not allow: for one of another type before one out of range."""
    for where, part in sections(settings):
        for field, _ in each(part):
            check_type(where + field.name, field.type, getattr(part, field.name))
    for _, part in sections(settings):
        for field, known in each(part):
            check_range(known, getattr(part, field.name))


def check_type(key: str, kind, value):
    """Raise ZTurboError for a value of another type, and for a number or a text that no file can hold."""
    if kind not in KINDS:
        if not (isinstance(value, (tuple, list)) and all(isinstance(word, str) for word in value)):
            raise ZTurboError(f"{key} is {shown(value)}; it must be a list of texts.")
    elif not isinstance(value, (int, float) if kind is float else kind) or (
        isinstance(value, bool) and kind is not bool
    ):
        raise ZTurboError(f"{key} is {shown(value)}; it must be {KINDS[kind]}.")
    elif isinstance(value, (int, float)) and not writable(value):
        raise ZTurboError(f"{key} is {shown(value)}; it must be {KINDS[kind]} of at most 64 bits, and finite.")
    for text in (value,) if kind is str else value if kind not in KINDS else ():
        if not is_text(text):
            raise ZTurboError(f"{key} is {shown(text)}; it has half a character in it (a cut emoji). Write it anew.")


def check_range(known: Setting, value):
    """Raise ZTurboError for a value of the right type that is out of range, or none of the choices."""
    if known.choices and value not in known.choices:
        raise ZTurboError(f"{known.name} is {value!r}; choose one of {', '.join(known.choices)}.")
    if not known.allows(value):
        raise ZTurboError(f"{known.name} is {value}; it must be {known.allowed}.")


def writable(number: float) -> bool:
    """Can a file hold it?"""
    return math.isfinite(number) if isinstance(number, float) else abs(number) < 2**64


def shown(value) -> str:
    """A value as a sentence quotes it."""
    try:
        return repr(value)
    except ValueError:  # Python writes no number of more than 4300 digits
        return "a number of thousands of digits"
