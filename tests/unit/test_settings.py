"""A setting that is added at its field alone is checked, written, read, said by its key and shown on a node."""

import importlib
from dataclasses import dataclass, field

import pytest

from zturbo import recipefile
from zturbo.errors import ZTurboError
from zturbo.recipe import Optimizer, Recipe
from zturbo.settings import setting


@dataclass(frozen=True)
class Spinning(Optimizer):
    spin: float = setting(
        0.5, "Turns a step. Usual: 0.5.", low=0, high=3, unit="turns", name="optimizer_spin", widget=(0, 2), step=0.25
    )
    way: str = setting("left", "Which way round.", choices=("left", "right"))
    stops: tuple[str, ...] = setting(("a", "b"), "Where it stops, one a line.")


@dataclass(frozen=True)
class Wider(Recipe):
    optimizer: Spinning = field(default_factory=Spinning)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"spin": 3.5}, "optimizer_spin is 3.5; it must be from 0 to 3."),
        ({"spin": "fast"}, "optimizer.spin is 'fast'; it must be a number."),
        ({"spin": float("nan")}, "optimizer.spin is nan; it must be a number of at most 64 bits, and finite."),
        ({"way": "up"}, "way is 'up'; choose one of left, right."),
        ({"stops": "a"}, "optimizer.stops is 'a'; it must be a list of texts."),
        ({"stops": ("\ud83d",)}, "optimizer.stops is '\\ud83d'; it has half a character in it"),
    ],
)
def test_it_is_checked(given, sentence):
    with pytest.raises(ZTurboError) as error:
        Wider(optimizer=Spinning(**given))
    assert str(error.value).startswith(sentence)


def test_it_is_in_the_recipes_file():
    given = Wider(steps=9, optimizer=Spinning(spin=2.5, way="right", stops=("c",)))
    text = recipefile.to_toml(given)
    assert 'spin = 2.5\nway = "right"\nstops = ["c"]\n' in text
    assert recipefile.from_toml(text, Wider) == given
    with pytest.raises(ZTurboError, match="^optimizer.spin is 4.0; it must be from 0 to 3.$"):
        recipefile.with_settings(text, ["optimizer.spin=4"], Wider)


@pytest.mark.parametrize(
    ("rules", "good", "bad", "words"),
    [
        ({"low": 1}, (1, 2**40), (0, -1), "at least 1"),
        ({"above": 0}, (1e-9, 5), (0, -1), "a number above 0"),
        ({"low": 0, "high": 0.5}, (0, 0.5), (-0.1, 0.51), "from 0 to 0.5"),
        ({"low": 16, "high": 64, "multiple": 16}, (16, 48), (0, 17, 80), "a multiple of 16 from 16 to 64"),
        (
            {"low": 32, "high": 64, "multiple": 16, "off": 0},
            (0, 48),
            (16, 33, 80),
            "0, or a multiple of 16 from 32 to 64",
        ),
    ],
)
def test_ranges_and_their_words(rules, good, bad, words):
    @dataclass(frozen=True)
    class One:
        size: float = setting(good[0], "A size.", **rules)

    known = One.__dataclass_fields__["size"].metadata["setting"]
    assert all(map(known.allows, good)) and not any(map(known.allows, bad)) and known.allowed == words


def test_it_is_an_input_and_its_value_comes_back(pack, schemas):
    inputs = importlib.import_module(f"{pack.__name__}.nodes.inputs")
    spin, way, stops = inputs.of(Spinning, "spin", "way", "stops")
    assert (spin.id, spin.get_io_type(), spin.tooltip) == ("optimizer_spin", "FLOAT", "Turns a step. Usual: 0.5.")
    assert (spin.default, spin.min, spin.max, spin.step) == (0.5, 0.0, 2.0, 0.25)
    assert (way.id, way.get_io_type(), way.default, way.options) == ("way", "COMBO", "left", ["left", "right"])
    assert (stops.id, stops.get_io_type(), stops.default, stops.multiline) == ("stops", "STRING", "a\nb", True)
    given = {"optimizer_spin": 1.25, "stops": " c \n\nd", "model": "another input"}
    assert inputs.values(Spinning, given) == {"spin": 1.25, "stops": ("c", "d")}
