"""A run's event log, and what panel, plots and resume read from it: a JSON object a line.

`RunFolder.event` appends to it. A line that was cut off, or that somebody damaged, is left out in reading.
"""

import json
import re
from pathlib import Path

EVENTS, PREVIEWS = "events.jsonl", "previews"
STEP = ("step", "loss", "lr", "seconds", "memory")  # of a step's event, what a panel draws
PREVIEW = re.compile(r"step_([0-9]{6,9})_([0-9]{1,4})\.png")


def read_events(path: Path) -> list[dict]:
    """The events of a run, oldest first; a line that was cut off or is damaged is left out."""
    if not path.is_file():
        return []
    found = map(_event, path.read_bytes().split(b"\n"))
    return [event for event in found if event is not None]


def lines(events: list[dict]) -> bytes:
    return "".join(json.dumps(event) + "\n" for event in events).encode()


def _event(line: bytes) -> dict | None:
    """The event of a line, or None where it is none."""
    try:
        event = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(event, dict) or not all(key not in FIELDS or FIELDS[key](value) for key, value in event.items()):
        return None
    needed = NEEDED.get(event.get("event"), ()) + (("step", "seconds") if "loss" in event else ())
    return event if all(key in event for key in needed) else None


def _is_count(value) -> bool:
    return type(value) is int


def _is_number(value) -> bool:
    return type(value) in (int, float) and abs(value) < float("inf")


def _is_text(value) -> bool:
    return value is None or isinstance(value, str)


# What others rely on in an event: kinds of fields, and the fields that a kind of event must have
FIELDS = {
    **dict.fromkeys(("loss", "seconds", "trained", "held_out", "gauge"), _is_number),
    **dict.fromkeys(("step", "total", "saved"), _is_count),
    **dict.fromkeys(("event", "text", "how", "inputs", "adapter", "source"), _is_text),
    "teaches": lambda value: isinstance(value, dict),
}
NEEDED: dict[str | None, tuple[str, ...]] = {
    "note": ("text",),
    "end": ("how",),
    "validation": ("step", "held_out", "trained"),
    "health": ("step", "gauge"),
}


def how_ended(folder: Path) -> str | None:
    """finished, stopped, cancelled or failed; None for a run that is under way or died."""
    return end_of(read_events(folder / EVENTS)).get("how")


def end_of(events: list[dict]) -> dict:
    """The end event of what was begun last; nothing where there is none yet."""
    last: dict = next((event for event in reversed(events) if event.get("event") in ("start", "end")), {})
    return last if last.get("event") == "end" else {}


def last_step(events: list[dict]) -> int:
    return max((event["step"] for event in events if "loss" in event), default=0)


def start_of(folder: Path) -> dict:
    """The newest start event: what the run was last begun or taken up with."""
    return newest_start(read_events(folder / EVENTS))


def newest_start(events: list[dict]) -> dict:
    return next((event for event in reversed(events) if event.get("event") == "start"), {})


def summary(folder: Path, points: int) -> dict:
    """What the panel needs to redraw a run, with its curve in at most `points` points."""
    events = read_events(folder / EVENTS)
    steps = [{key: event[key] for key in STEP if _is_number(event.get(key))} for event in events if "loss" in event]
    start = newest_start(events)
    end = end_of(events)
    thin = max(1, -(-len(steps) // points))
    return {
        "run": folder.name,
        "total": start.get("total", 0),
        "adapter": start.get("adapter", ""),
        "steps": steps[::-thin][::-1],  # from the newest on, which always stays
        "looks": [
            {key: event[key] for key in ("event", *NEEDED[event["event"]])}
            for event in events
            if event.get("event") in ("validation", "health")
        ],
        "notes": [event["text"] for event in events if event.get("event") == "note"],
        "previews": previews(folder, last_step(events)),
        "how": end.get("how"),
        "saved": end.get("saved", 0),
    }


def previews(folder: Path, last: int) -> list[dict]:
    """Of each step that has some: step, files (in the order of the prompts), time (when the first was drawn).

    last: the run's step; what lies behind it is undone.
    """
    named = [found for path in (folder / PREVIEWS).glob("step_*.png") if (found := PREVIEW.fullmatch(path.name))]
    shown: dict[int, list[str]] = {}
    for name in sorted(named, key=lambda name: (int(name[1]), int(name[2]))):
        if int(name[1]) <= last:
            shown.setdefault(int(name[1]), []).append(name[0])
    place = folder / PREVIEWS
    return [
        {"step": step, "files": files, "time": int((place / files[0]).stat().st_mtime)} for step, files in shown.items()
    ]
