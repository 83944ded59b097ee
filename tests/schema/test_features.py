"""docs/features.md: every setting of a recipe, with its node, its default and a test that would fail without it."""

import re
from pathlib import Path

import pytest

from zturbo.recipe import Recipe, flat

ROOT = Path(__file__).resolve().parents[2]
ROW = re.compile(r"^\| `(?P<field>[\w.]+)` \| (?P<node>\w+) \| `(?P<input>\w+)` \| (?P<default>.*?) \| `(?P<test>[\w/.]+::\w+)` \|$", re.MULTILINE)


def rows() -> dict[str, dict]:
    return {row["field"]: row.groupdict() for row in ROW.finditer((ROOT / "docs" / "features.md").read_text(encoding="utf-8"))}


# the node has a word for what is empty in the recipe, or text for a list; and what the table says, where that is too long for it
WORDED = {"previews.prompts": "", "network.start": "", "turbo.prompts": "32 prompts"}
# set by the pack itself, the same for everyone
FIXED = {"previews.steps", "previews.sampler"}


def test_every_setting_is_in_the_table_and_nothing_else():
    assert set(rows()) == set(flat(Recipe())) - FIXED


@pytest.mark.parametrize("field", sorted(rows()))
def test_its_test_exists(field):
    path, name = rows()[field]["test"].split("::")
    assert f"def {name}(" in (ROOT / "tests" / path).read_text(encoding="utf-8")


def test_node_input_and_default_are_those_of_the_schemas(schemas):
    defaults = flat(Recipe())
    for field, row in rows().items():
        given = next(i for i in schemas[row["node"]].inputs if i.id == row["input"])
        assert row["default"] == (WORDED.get(field) or repr(given.default)), field
        assert field in WORDED or given.default == defaults[field], field
