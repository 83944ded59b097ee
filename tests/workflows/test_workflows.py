"""The shipped workflows: whole as files, and each runs through the real server.

The tiny model is in the big one's place.
"""

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1]))
import prompts
from PIL import Image

import dev

FOLDER = Path(__file__).resolve().parents[2] / "workflows"
NAMES = [
    "adapter_plus_zero_minus",
    "compare_checkpoints",
    "convert_lora",
    "extract_adapter",
    "health_report",
    "make_adapter",
    "resume_or_extend",
    "sample_8_steps",
    "tiny_demo",
    "train_lora",
    "train_lora.app",
    "train_lora_12gb",
    "train_lora_16gb",
    "train_lora_minus_one",
    "train_lora_options",
]
ADAPTER = "zimage_turbo_training_adapter_v2.safetensors"
SMALL = {
    "width": 64,
    "height": 64,
    "preview_width": 64,
    "preview_height": 64,
    "resolution": 128,
    "steps": 3,
    "preview_every": 2,
    "folder": "bundled: smiley",
    "batch_size": 1,
    "size": 64,
    "count": 6,
    "sizes": "128x128, 80x80",
    "cfg": 2.0,
}
RUN = "my_lora"  # that two of them go on from and compare


def load(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def test_the_folder_holds_exactly_these_with_thumbnails():
    assert sorted(path.stem for path in FOLDER.glob("*.json")) == NAMES
    for name in NAMES:
        with Image.open(FOLDER / f"{name}.jpg") as thumbnail:
            assert min(thumbnail.size) >= 256


@pytest.mark.parametrize("name", NAMES)
def test_they_are_what_the_lab_writes(server, name):
    """`python dev.py lab graphs` has been run since the nodes were changed."""
    from lab import graphs

    assert sorted(graphs.GRAPHS) == NAMES
    written = (FOLDER / f"{name}.json").read_text(encoding="utf-8")
    assert written == graphs.made(server.get("/object_info"), name)


def test_the_blueprints_are_what_the_lab_writes(server):
    from lab import graphs

    found = {path.stem: path.read_text(encoding="utf-8") for path in (dev.ROOT / "subgraphs").iterdir()}
    info = server.get("/object_info")
    assert found == {graphs.TITLES[name]: graphs.made(info, name) for name in graphs.BLUEPRINTS}
    served = [one["name"] for one in server.get("/global_subgraphs").values() if one["source"] == "custom_node"]
    assert served == ["Train on my pictures"]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_lies_on_another_and_groups_hold_their_nodes(name):
    """From left to right: a wire's end is never left of the group in which it begins."""
    workflow = load(name)
    boxes = {node["id"]: (*node["pos"], *node["size"]) for node in workflow["nodes"]}
    for number, (x, y, width, height) in boxes.items():
        for other, (left, top, wide, high) in boxes.items():
            apart = x + width <= left or left + wide <= x or y + height + 30 <= top or top + high + 30 <= y
            assert number >= other or apart, (number, other)
    groups = {}
    for number, group in enumerate(workflow["groups"]):
        left, top, wide, high = group["bounding"]
        for one, (x, y, width, height) in boxes.items():
            if left <= x and top <= y - 30 and x + width <= left + wide and y + height <= top + high:
                groups[one] = number
    notes = {node["id"] for node in workflow["nodes"] if node["type"] == "MarkdownNote"}
    assert groups.keys() == boxes.keys() - notes
    for _, source, _, target, _, _ in workflow["links"]:
        begins = workflow["groups"][groups[source]]["bounding"][0]
        assert begins <= workflow["groups"][groups[target]]["bounding"][0]


@pytest.mark.parametrize("name", NAMES)
def test_links_join_what_they_say_and_there_is_a_note(name):
    workflow = load(name)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for number, source, slot, target, place, kind in workflow["links"]:
        assert nodes[source]["outputs"][slot]["type"] == kind and number in nodes[source]["outputs"][slot]["links"]
        assert nodes[target]["inputs"][place]["link"] == number
    assert any(node["type"] == "MarkdownNote" and len(node["widgets_values"][0]) > 100 for node in nodes.values())


@pytest.mark.parametrize("name", [name for name in NAMES if name != "tiny_demo"])
def test_the_frontend_can_offer_every_download(name):
    """Each file that a loader names has its link and folder in properties.models."""
    for node in load(name)["nodes"]:
        wanted = [
            value
            for value in node.get("widgets_values") or []
            if isinstance(value, str) and value.endswith(".safetensors") and value != "my_lora.safetensors"
        ]
        offered = {model["name"]: model for model in node["properties"].get("models", [])}
        assert set(wanted) == set(offered), node["type"]
        for model in offered.values():
            assert (
                model["url"].startswith("https://huggingface.co/")
                and model["url"].endswith(model["name"])
                and model["directory"]
            )


def test_every_node_of_the_pack_is_in_a_workflow():
    used = {node["type"] for name in NAMES for node in load(name)["nodes"]}
    ours = {path.stem for path in (dev.ROOT / "js" / "docs").glob("*.md")}
    assert len(ours) == 18 and ours <= used


def run_small(server, name: str, seed: int = 0) -> list[dict]:
    """Run a shipped workflow with the tiny model in the big one's place, small and short.

    Returns the pictures that it saved.
    """
    for file in (ADAPTER, "my_lora.safetensors"):
        (server.base / "models" / "loras" / file).write_bytes(
            (dev.ROOT / "models" / "tiny" / "z_image_turbo_tiny_adapter.safetensors").read_bytes()
        )
    if name in ("compare_checkpoints", "resume_or_extend") and not (server.base / "output" / "zturbo" / RUN).exists():
        server.run(prompts.training(name=RUN, steps=2, rank=16, alpha=16.0, preview_prompts=""))
    prompt = dev.to_prompt(load(name), server.get("/object_info"))
    loader = next(number for number, node in prompt.items() if node["class_type"] == "ZTurboLoadModel")
    for node in prompt.values():
        inputs = node["inputs"]
        inputs.update(
            {
                key: value
                for key, value in SMALL.items()
                if key in inputs
                and not isinstance(inputs[key], list)
                and not (key == "steps" and node["class_type"] != "ZTurboTrainLoRA")
            }
        )
        if node["class_type"] == "ZTurboLoadModel":
            inputs.update(diffusion_model=prompts.TINY, text_encoder="auto", vae="auto")
        if node["class_type"] == "ZTurboTrainLoRA":
            inputs.update(name=name, seed=seed)
        if node["class_type"] == "UNETLoader":  # an undistilled model: the tiny one with its adapter on
            node.update(prompts.adapter([loader, 0]))
    outputs = server.run(prompt)
    return [image for output in outputs.values() for image in output.get("images", []) if image["type"] == "output"]


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_on_the_real_server(server, name):
    pictures = run_small(server, name)
    assert len(pictures) == {"adapter_plus_zero_minus": 3, "health_report": 2}.get(name, 1)
