"""Preview prompts of kohya's programs: lines with --w, --h and --d behind them, or the same as TOML or JSON."""

import json
import re
from pathlib import Path

from .. import recipefile, words
from ..errors import ZTurboError
from .record import Theirs
from .shared import Drawn

OPTION = re.compile(r"\s--(\w+)\s+(\d+)(?=\s|$)")
NAMES = {"w": "width", "h": "height", "d": "seed"}
TELL = "Give a text file with a prompt a line."


def read_prompts(file: Path) -> list[Drawn]:
    """Raises ZTurboError for a file that is none of these."""
    text = words.read(file)
    if file.suffix.lower() == ".toml":
        given = recipefile.read_toml(text, f"The prompts {file.name}", TELL).get("prompt")
        shared = given if isinstance(given, dict) else {}
        found = [{**shared, **one} for one in shared.get("subset", []) if isinstance(one, dict)]
    elif file.suffix.lower() == ".json":
        try:
            listed = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ZTurboError(f"The prompts {file.name} are no JSON ({error}). {TELL}") from error
        listed = listed if isinstance(listed, list) else []
        found = [one if isinstance(one, dict) else {"prompt": str(one)} for one in listed]
    else:
        return [of_line(line.strip()) for line in text.splitlines() if line.strip() and not line.startswith("#")]
    given_ones = [Theirs(one, f"{file.name}: ") for one in found]
    return [
        Drawn(one.text("prompt") or "", one.whole("width"), one.whole("height"), one.whole("seed"))
        for one in given_ones
        if one.values.get("prompt")
    ]


def of_line(line: str) -> Drawn:
    """`a cat --w 640 --h 480 --d 1 --s 20 --n blurred`"""
    given = {NAMES[name]: int(number) for name, number in OPTION.findall(line) if name in NAMES}
    return Drawn(re.split(r"\s--\w+\b", line, maxsplit=1)[0].strip(), **given)
