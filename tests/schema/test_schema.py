"""Every node has what a user sees of it: id, name, tooltips, help page, locale entry, a place in a workflow."""

import json
import os
import re

import pytest
from PIL import Image

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
IDS = [
    "ZTurboAdapterSchedule",
    "ZTurboCheckAdapter",
    "ZTurboCompare",
    "ZTurboConvertLoRA",
    "ZTurboDeDistillAdapter",
    "ZTurboExtractAdapter",
    "ZTurboGenerateSet",
    "ZTurboHealth",
    "ZTurboHealthOptions",
    "ZTurboImageDataset",
    "ZTurboLoadModel",
    "ZTurboLossOptions",
    "ZTurboNetworkOptions",
    "ZTurboOptimizerOptions",
    "ZTurboSampler",
    "ZTurboSaveLoRA",
    "ZTurboSavingOptions",
    "ZTurboTrainLoRA",
]
LOCALE = os.path.join(ROOT, "locales", "en", "nodeDefs.json")


def read(*parts) -> str:
    with open(os.path.join(ROOT, *parts), encoding="utf-8") as file:
        return file.read()


def test_ids_are_the_permanent_ones(schemas):
    assert sorted(schemas) == IDS
    assert {schema.category for schema in schemas.values()} == {"Z-Image Turbo"}


@pytest.mark.parametrize("node", IDS)
def test_description_tooltips_and_help(schemas, node):
    schema = schemas[node]
    assert len(schema.description) > 40
    help_page = read("js", "docs", f"{node}.md")
    for field in schema.inputs:
        assert field.tooltip and len(field.tooltip) > 15, f"{node}.{field.id} has no tooltip"
        # the plain wires, and what the text says in other words
        if field.id not in ("model", "clip", "vae", "prompt", "direction"):
            assert field.id in help_page, f"{field.id} is not in js/docs/{node}.md"


@pytest.mark.parametrize("node", IDS)
def test_every_number_has_a_range_and_its_default_is_inside(schemas, node):
    for field in schemas[node].inputs:
        if hasattr(field, "min") and field.min is not None:
            assert field.max is not None and field.min <= field.default <= field.max, f"{node}.{field.id}"


def locale_of(schemas) -> dict:
    entries = {}
    for node in sorted(schemas):
        schema = schemas[node]
        inputs = {field.id: {"name": field.id, "tooltip": field.tooltip} for field in schema.inputs}
        outputs = {str(place): {"name": output.display_name} for place, output in enumerate(schema.outputs)}
        entries[node] = {
            "display_name": schema.display_name,
            "description": schema.description,
            "inputs": inputs,
            "outputs": outputs,
        }
    return entries


def test_locale_is_generated_from_the_schemas(schemas):
    """After a change: ZTURBO_WRITE_LOCALES=1 python dev.py test schema."""
    fresh = json.dumps(locale_of(schemas), indent=2, ensure_ascii=False) + "\n"
    if os.environ.get("ZTURBO_WRITE_LOCALES"):
        os.makedirs(os.path.dirname(LOCALE), exist_ok=True)
        with open(LOCALE, "w", encoding="utf-8") as file:
            file.write(fresh)
    assert read("locales", "en", "nodeDefs.json") == fresh


@pytest.mark.parametrize("node", IDS)
def test_its_help_page_has_a_picture_and_an_example_graph_that_has_the_node(node):
    page = read("js", "docs", f"{node}.md")
    (workflow,) = re.findall(r"^Example graph: the workflow \*([\w.]+)\*\.", page, re.MULTILINE)
    assert node in {one["type"] for one in json.loads(read("workflows", f"{workflow}.json"))["nodes"]}
    assert f"(images/{node}.jpg)" in page
    with Image.open(os.path.join(ROOT, "js", "docs", "images", f"{node}.jpg")) as picture:
        assert 300 <= picture.width <= 760 and picture.height > 150
