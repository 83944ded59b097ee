"""Damaged recipes and event logs. Kinds for `bench fuzz`."""

import dataclasses
import json
import random

import tomllib

from bench.fuzz_damage import STRINGS, damage, value
from bench.fuzz_tensors import TARGETS
from bench.fuzz_watch import Damaged, Place
from zturbo import buckets, network, recipefile, runfolder, runlog, runs
from zturbo.errors import ZTurboError
from zturbo.recipe import Loss, Network, Previews, Recipe, Timesteps
from zturbo.runfolder import RunFolder

RECIPES = (
    Recipe(),
    Recipe("my cat", 7, 2, 2**63, network=Network(4, 2.5), previews=Previews(('say "hi"\nü', "two"), 5, 64, 64)),
    Recipe("a.b", timesteps=Timesteps("logit_normal", 0.5, 2.0, 0.1, 0.9), loss=Loss("huber", 0.2, 3.0)),
)
VALUES = (
    "-1", "0", "1", "1.0", "0.5", "-0.5", "1e400", "nan", "inf", "-inf", "true", "false", '""', '"3"', '"auto"',
    '"x\\u0000"', '"\\u202e"', "[]", "[1, 2]", '["a", 3]', "[[]]", "{}", "{a = 1}", "{rank = 4}",
    "18446744073709551616", "9" * 4000, "9" * 5000, "0x" + "f" * 6000, "1979-05-27", "07:32:00", "1e999999",
    "'''a\nb'''", '"' + "x" * 5000 + '"', '"CON"', '"nul.txt"', '"../x"', '"a "', '"lora"', '"merged"',
)  # fmt: skip


def survives(given: Recipe):
    """A recipe that was taken is whole: right types everywhere, and the same after being written and read."""
    assert recipefile.from_toml(recipefile.to_toml(given)) == given, "it does not survive its own TOML"
    for field in dataclasses.fields(Recipe):
        section = getattr(given, field.name)
        typed = (
            [(one.type, getattr(section, one.name)) for one in dataclasses.fields(section)]
            if dataclasses.is_dataclass(section)
            else [(field.type, section)]
        )
        for kind, held in typed:
            plain = {int: int, float: float, str: str, bool: bool}.get(kind, tuple)
            assert type(held) is plain, f"{field.name} holds {held!r}"
            assert plain is not float or abs(held) < float("inf"), f"{field.name} holds {held}"
            assert plain is not tuple or all(isinstance(word, str) for word in held), f"{field.name} holds {held!r}"


def same_values(given: Recipe, values: dict, where: str = ""):
    """Every value of the TOML, as another reader reads it, stands in the recipe."""
    for key, held in values.items():
        mine = getattr(given, key)
        if isinstance(held, dict):
            same_values(mine, held, f"{where}{key}.")
        else:
            assert mine == (tuple(held) if isinstance(held, list) else held), f"{where}{key} is {mine!r}"


def recipe_bytes(rng: random.Random, place: Place) -> Damaged:
    """A recipe.toml, damaged anywhere."""
    what, raw = damage(recipefile.to_toml(rng.choice(RECIPES)).encode(), rng)
    run = RunFolder.new(place.runs, Recipe("run"))
    path = run.path / runfolder.RECIPE
    path.write_bytes(raw)

    def feed():
        assert isinstance(runs.name_of(run.path), str)
        given = recipefile.read(path)
        survives(given)
        same_values(given, tomllib.loads(path.read_text(encoding="utf-8-sig")))  # line ends as any system writes them

    return Damaged(f"{what}: {raw[:60]!r}", feed)


def recipe_values(rng: random.Random, place: Place) -> Damaged:
    """A recipe in which one key has another value, or is another key, or one section is a value."""
    given = rng.choice(RECIPES)
    values = dataclasses.asdict(given)
    sections = [key for key, held in values.items() if isinstance(held, dict)]
    section = rng.choice(["", "", *sections])
    key = rng.choice(list(values[section])) if section else rng.choice([key for key in values if key not in sections])
    new, way = (
        rng.choice(VALUES),
        rng.choice(("value", "value", "value", "value", "value", "key", "section", "table", "nested", "deep")),
    )
    lines = [line for line in recipefile.to_toml(given).split("\n") if line]
    at = lines.index(f"[{section}]") if section else -1
    spot = next(number for number in range(at + 1, len(lines)) if lines[number].startswith(f"{key} = "))
    if way == "value":
        lines[spot] = f"{key} = {new}"
    elif way == "key":
        key = rng.choice((key + "x", key.upper(), '""', '"\\u0000"', '"' + "k" * 4000 + '"', f"{key}.sub", "'\u202e'"))
        lines.insert(spot, f"{key} = {new}")
    elif way == "section":
        key = rng.choice(sections)
        lines = [f"{key} = {new}"]
    elif way == "table":
        lines = [f"[{key}]", "a = 1"]
    elif way == "nested":
        lines = [f"[{rng.choice(sections)}.{key}.more]", f"a = {new}"]
    else:
        deep = rng.choice((50, 900, 5000, 100_000))
        lines[spot] = f"{key} = " + rng.choice(
            ("[" * deep + "]" * deep, "{a=" * deep + "1" + "}" * deep, ".".join("a" * 20))
        )
    text = "\n".join(lines)

    def feed():
        try:
            taken = recipefile.from_toml(text)
        except ZTurboError as error:
            assert way != "value" or key in str(error) or "TOML" in str(error) or section and section in str(error), (
                f"the sentence does not name {key}: {error}"
            )
            raise
        survives(taken)
        same_values(taken, tomllib.loads(text))

    return Damaged(f"{way} {section}.{key[:40]} = {new[:60]}", feed)


def recipe_widgets(rng: random.Random, place: Place) -> Damaged:
    """A recipe made of what widgets and other nodes may give, and a run folder made of that."""
    given = rng.choice(RECIPES)
    section = rng.choice([None, *(one.name for one in dataclasses.fields(Recipe))])
    held = getattr(given, section) if section else given
    held = held if dataclasses.is_dataclass(held) else given
    key = rng.choice([one.name for one in dataclasses.fields(held)])
    old = getattr(held, key)
    alike = {
        str: lambda: rng.choice(STRINGS),
        int: lambda: rng.randrange(100),
        float: lambda: rng.random(),
        tuple: lambda: tuple(value(rng, 0) for _ in range(rng.randrange(3))),
    }
    new = alike[type(old)]() if type(old) in alike and rng.random() < 0.6 else value(rng)

    def feed():
        changed = dataclasses.replace(held, **{key: new})
        made = changed if held is given else dataclasses.replace(given, **{section: changed})
        run = RunFolder.new(place.runs, made)
        assert recipefile.read(run.path / runfolder.RECIPE) == made and runs.name_of(run.path) == made.name, (
            "it does not survive its own TOML"
        )

    return Damaged(f"{key} = {new!r:.80}", feed)


WORDS = (
    "512",
    "768",
    "0-9",
    "20",
    "attention",
    "feed_forward:8",
    "*.to_q:0",
    ":",
    "-",
    "5-",
    "-5",
    "9-3",
    "1025",
    "x:1025",
    "x:-1",
    "*:",
    "[",
    "[!",
    "*" * 200,
    "\u0663",
    "\u00b2",
    "9" * 5000,
    "0x10",
    "1e3",
    "64.0",
    "4097",
    *STRINGS,
)


def widget_texts(rng: random.Random, place: Place) -> Damaged:
    """Lists in one line, as people write them: resolutions, targets, layers."""
    text = rng.choice((",", ", ", ",,", ";")).join(rng.choice(WORDS) for _ in range(rng.choice((1, 1, 2, 3))))
    use = rng.choice((use_sides, use_targets, use_layers))
    return Damaged(f"{use.__name__} {text[:80]!r}", lambda: use(text))


def use_sides(text: str):
    assert all(64 <= side <= 4096 for side in buckets.read_sides(text))


def use_targets(text: str):
    chosen = network.trainable_modules(TARGETS, Network(targets=text))
    assert chosen and all(1 <= place.rank <= 1024 for place in chosen)


def use_layers(text: str):
    chosen = network.trainable_modules(TARGETS, Network(layers=text))
    assert all(0 <= network.layer_of(one.part.name) <= 1 for one in chosen)


# Event logs


def log_of(rng: random.Random) -> list[str]:
    """A log as a run writes it."""
    events: list[dict] = [
        {"event": "start", "total": 9, "adapter": "x", "inputs": "abc", "teaches": {"steps": 9}, "source": ""}
    ]
    events += [{"step": step, "loss": 1 / step, "seconds": 0.5, "lr": 1e-4} for step in range(1, 8)]
    events += [
        {"event": "validation", "step": 4, "held_out": 0.5, "trained": 0.25},
        {"event": "note", "text": "ä note", "step": 5},
        {"event": "preview", "step": 5, "files": ["a.png"]},
        {"event": "end", "how": "cancelled", "saved": 4},
    ]
    return [json.dumps(event) for event in events]


def event_logs(rng: random.Random, place: Place) -> Damaged:
    """An events.jsonl with lines that are none; the others must all be there."""
    lines = log_of(rng)
    at = rng.randrange(len(lines))
    what = rng.choice(("damage", "line", "value", "lost key", "separator", "number"))
    event = json.loads(lines[at])
    if what == "line":
        lines.insert(
            at,
            rng.choice(
                (
                    "3",
                    "null",
                    "[]",
                    '"x"',
                    "{",
                    "}",
                    "[" * 100_000,
                    "\x00" * 50,
                    "{}",
                    "NaN",
                    "1" * 6000,
                    '{"step": NaN, "loss": Infinity, "seconds": 1}',
                    '{"a": "\\ud800"}',
                )
            ),
        )
    elif what in ("value", "number"):
        odd = (None, [], {}, "x", True, -1, float("nan"), float("inf"), 10**400)
        value = rng.choice(odd if what == "value" else STRINGS)
        event[rng.choice(list(event))] = value
        lines[at] = json.dumps(event)
    elif what == "lost key":
        event.pop(rng.choice(list(event)))
        lines[at] = json.dumps(event)
    elif what == "separator":
        lines[at] = json.dumps({**event, "text": "a\u2028b\x85c"}, ensure_ascii=False)
    raw = ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass")
    if what == "damage":
        more, raw = damage(raw, rng)
        what += " " + more
    run = RunFolder.new(place.runs, Recipe("run"))
    run.events.write_bytes(raw)
    (run.path / "previews" / "step_000005_0.png").touch()

    def feed():
        events = runlog.read_events(run.events)
        assert all(isinstance(event, dict) for event in events)
        kept = [parsed for parsed in map(plain, raw.split(b"\n")) if parsed is not None]
        assert all(event in events for event in kept), "events were lost"
        facts = runlog.summary(run.path, rng.choice((1, 2, 3, 2000)))
        json.dumps(facts, allow_nan=False).encode()
        assert isinstance(facts["total"], int) and all(
            isinstance(point["loss"], (int, float)) and isinstance(point["step"], int) for point in facts["steps"]
        )
        ends = (None, "finished", "stopped", "cancelled", "failed", *STRINGS)
        assert runlog.how_ended(run.path) in ends or what.startswith("damage")
        given, start = runs.Given({"steps": 9}, "abc", ""), runlog.start_of(run.path)
        assert given.same_as(start) in (True, False) and given.differs(start)
        run.rewind(3)
        assert all(event.get("step", 0) <= 3 for event in runlog.read_events(run.events))

    return Damaged(f"{what} {lines[at][:80]!r}", feed)


def plain(line: bytes) -> dict | None:
    """What a whole step line says, as another reader reads it."""
    try:
        found = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    good = (
        isinstance(found, dict)
        and type(found.get("step")) is int
        and all(type(found.get(key)) is float and abs(found[key]) < float("inf") for key in ("loss", "seconds"))
    )
    return found if good else None


KINDS = [recipe_bytes, recipe_values, recipe_widgets, widget_texts, event_logs]
