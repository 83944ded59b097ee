"""docs/features.md: every setting of a recipe, with its node, its default and a test that would fail without it."""

import os
import re
from pathlib import Path

import pytest

from zturbo import settings
from zturbo.recipe import Recipe
from zturbo.settings import flat

ROOT = Path(__file__).resolve().parents[2]
FEATURES = ROOT / "docs" / "features.md"
HEAD = "| setting | node | input | default | unit | range | what it does | test |\n|---|---|---|---|---|---|---|---|\n"
ROW = re.compile(
    r"^\| `(?P<field>[\w.]+)` \| (?P<node>\w+) \| `(?P<input>\w+)` \| (?P<default>.*?) \| (?P<unit>.*?) "
    r"\| (?P<range>.*?) \| (?P<sentence>.*) \| `(?P<test>[\w/.]+::\w+)` \|$",
    re.MULTILINE,
)
ADAPTER_ROW = re.compile(
    r"^\| (?P<node>\w+) \| `(?P<input>\w+)` \| (?P<default>.*?) \| `(?P<test>[\w/.]+::\w+)` \|$", re.MULTILINE
)
ADAPTER_NODES = ("ZTurboGenerateSet", "ZTurboExtractAdapter", "ZTurboCheckAdapter")
LONG = {
    ("ZTurboGenerateSet", "prompts"): "two lines",
    ("ZTurboGenerateSet", "sizes"): "eight sizes",
    ("ZTurboCheckAdapter", "prompts"): "four lines",
}
PAGE = FEATURES.read_text(encoding="utf-8")


def rows() -> dict[str, dict]:
    return {row["field"]: row.groupdict() for row in ROW.finditer(PAGE)}


def adapter_rows() -> dict[tuple[str, str], dict]:
    return {(row["node"], row["input"]): row.groupdict() for row in ADAPTER_ROW.finditer(PAGE)}


# the node has a word for what is empty in the recipe, or text for a list; and what the table says, where that is too
# long for it
WORDED = {"previews.prompts": "", "turbo.restore_prompts": "", "network.start": "", "turbo.prompts": "32 prompts"}
# set by the pack itself, the same for everyone
FIXED = {"previews.steps", "previews.sampler", *(name for name in flat(Recipe()) if name.startswith("inputs."))}


def known() -> dict[str, settings.Setting]:
    """Dotted key -> setting, of those that a node shows."""
    return {
        where + field.name: setting
        for where, part in settings.sections(Recipe())
        for field, setting in settings.each(part)
        if where + field.name not in FIXED
    }


def table(schemas) -> str:
    """The table of all settings, made of their fields and of the schemas. Only a setting's test is written by hand."""
    tests, lines = {field: row["test"] for field, row in rows().items()}, []
    for field, setting in known().items():
        node, given = next(
            (node, given)
            for node, schema in schemas.items()
            for given in schema.inputs
            if (given.id, given.tooltip) == (setting.input, setting.sentence)
        )
        what = re.sub(r"([|*])", r"\\\1", setting.sentence)
        bounds = (
            ", ".join(setting.choices)
            or setting.allowed
            or ("from {} to {}".format(*setting.bounds) if setting.widget else "")
        )
        default = WORDED.get(field) or repr(given.default)
        lines.append(
            f"| `{field}` | {node} | `{given.id}` | {default} | {setting.unit} | {bounds} | {what} "
            f"| `{tests.get(field, 'none')}` |\n"
        )
    return HEAD + "".join(lines)


def test_the_table_is_generated_from_the_settings(schemas):
    """After a change: ZTURBO_WRITE_LOCALES=1 python dev.py test schema; a new row's test is then filled in by hand."""
    begin, end = PAGE.index("| setting |"), PAGE.index("\n\n## Making an adapter") + 1
    fresh = PAGE[:begin] + table(schemas) + PAGE[end:]
    if os.environ.get("ZTURBO_WRITE_LOCALES"):
        FEATURES.write_text(fresh, encoding="utf-8")
    assert FEATURES.read_text(encoding="utf-8") == fresh


def test_every_setting_is_in_the_table_and_nothing_else():
    assert set(rows()) == set(known())


def test_no_two_settings_have_one_input():
    """`inputs.values` finds a node's settings by these ids."""
    found = [setting.input for setting in known().values()]
    assert len(found) == len(set(found))


@pytest.mark.parametrize(
    "row", [*rows().values(), *adapter_rows().values()], ids=lambda row: f"{row['node']}.{row['input']}"
)
def test_its_test_exists(row):
    path, name = row["test"].split("::")
    assert f"def {name}(" in (ROOT / "tests" / path).read_text(encoding="utf-8")


def test_node_input_and_default_are_those_of_the_schemas(schemas):
    defaults = flat(Recipe())
    for field, row in rows().items():
        given = next(i for i in schemas[row["node"]].inputs if i.id == row["input"])
        assert row["default"] == (WORDED.get(field) or repr(given.default)), field
        assert field in WORDED or given.default == defaults[field], field


def test_every_input_of_the_nodes_that_make_an_adapter_is_in_the_table(schemas):
    inputs = {
        (node, given.id): getattr(given, "default", None) for node in ADAPTER_NODES for given in schemas[node].inputs
    }
    asked = {place: default for place, default in inputs.items() if default is not None}
    assert set(adapter_rows()) == set(asked)
    for place, row in adapter_rows().items():
        assert row["default"] == LONG.get(place, repr(asked[place])), place
