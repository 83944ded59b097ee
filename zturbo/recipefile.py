"""A recipe as TOML, which lies in its run's folder and which the command line takes."""

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path

from .errors import ZTurboError
from .recipe import Recipe
from .settings import names, shown, writable


def to_toml(recipe) -> str:
    """The recipe as TOML 1.0; sections are the nested dataclasses."""
    values = dataclasses.asdict(recipe)
    plain = [f"{key} = {_toml(value)}" for key, value in values.items() if not isinstance(value, dict)]
    for section, body in values.items():
        if isinstance(body, dict):
            plain += ["", f"[{section}]", *(f"{key} = {_toml(value)}" for key, value in body.items())]
    return "\n".join(plain) + "\n"


def _toml(value) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, (bool, str)):
        # JSON's escapes are TOML's, which has one more
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


def read(path: Path, given: Sequence[str] = ()) -> Recipe:
    """The recipe in a file, with settings as `with_settings` takes them. Raises ZTurboError."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows' editors put a mark in front
    except (OSError, UnicodeDecodeError) as error:
        raise ZTurboError(
            f"The recipe {path.name} cannot be read as UTF-8 text ({error}). Take the recipe.toml of a run."
        ) from error
    return with_settings(text, given)


def from_toml(text: str, kind=Recipe):
    """The recipe that `to_toml` wrote. Raises ZTurboError for what is no TOML, an unknown key, and a value that is not
    allowed."""
    return with_settings(text, (), kind)


def with_settings(text: str, given: Sequence[str], kind=Recipe):
    """A recipe's TOML with settings of the form `steps=500` or `optimizer.learning_rate=2e-4`; what is no TOML value is
    text. Raises ZTurboError."""
    values = read_toml(text, "The recipe", "Mend that line, or take the recipe.toml of a run.")
    for one in given:
        put(values, one)
    return from_values(values, kind)


def from_values(values: dict, kind=Recipe):
    """A recipe of values as TOML gives them. Raises ZTurboError."""
    try:
        return _build(kind, values, "")
    except ZTurboError as error:
        raise ZTurboError(by_key(str(error), kind)) from error


def put(values: dict, given: str):
    """Put one setting, KEY=VALUE, into a recipe's values. Raises ZTurboError."""
    key, equals, value = given.partition("=")
    *sections, name = key.strip().split(".")
    if not equals or not all((*sections, name)):
        raise ZTurboError(f"{given!r} is no setting. Write KEY=VALUE, as steps=500 or optimizer.learning_rate=2e-4.")
    place = values
    for section in sections:
        place = place.setdefault(section, {})
        if not isinstance(place, dict):
            raise ZTurboError(f"{given!r}: {section} is no section.")
    try:
        place[name] = read_toml(f"value = {value.strip()}", "", "")["value"]
    except ZTurboError:
        place[name] = value.strip()


def read_toml(text: str, what: str, advice: str) -> dict:
    try:
        import tomllib  # Python 3.11
    except ModuleNotFoundError:
        try:
            import tomli as tomllib  # type: ignore[no-redef]
        except ModuleNotFoundError as error:
            raise ZTurboError("Reading a recipe needs Python 3.11, or the package tomli: pip install tomli.") from error
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        path = (
            " A Windows path stands in single quotes, or is written with /."
            if re.search(r'"[A-Za-z]:\\|"\\\\', text)
            else ""
        )
        raise ZTurboError(f"{what} is not TOML ({error}). {advice}{path}") from error


def _build(kind, values: dict, where: str):
    known = {field.name: field.type for field in dataclasses.fields(kind)}
    for key in values:
        if key not in known:
            raise ZTurboError(
                f"The recipe has an unknown key {where + key!r}, which is {shown(values[key])}. "
                f"Known here: {', '.join(known)}."
            )
    built = {}
    for key, value in values.items():
        if isinstance(value, dict) and dataclasses.is_dataclass(known[key]):
            built[key] = _build(known[key], value, f"{where}{key}.")
        elif isinstance(value, int) and not isinstance(value, bool) and known[key] is float and writable(value):
            built[key] = float(value)
        else:
            built[key] = tuple(value) if isinstance(value, list) else value
    return kind(**built)


def by_key(sentence: str, kind=Recipe) -> str:
    """The sentence with settings called by their keys in the file."""
    given = kind()
    first, _, rest = sentence.partition(" ")
    head = names(given).get(first, first) if rest.startswith("is ") else first
    known = {name: key for name, key in names(given, ("name", "input")).items() if "_" in name}
    return re.sub(r"(?<![\w.'])(" + "|".join(known) + r")\b(?!')", lambda found: known[found[0]], f"{head} {rest}")
