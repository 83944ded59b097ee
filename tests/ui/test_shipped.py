"""Every shipped workflow, dropped on the canvas and run by its button on the bundled model, against recorded facts.

What comes out is written down in shipped.json: pictures by their sizes and by what they look like, files, and what
nodes say, without their numbers. ZTURBO_RECORD=1 writes it anew.
"""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.append(str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1] / "workflows"))
import prompts  # noqa: E402
from browser import Canvas  # noqa: E402
from conftest import ROOT  # noqa: E402
from test_workflows import ADAPTER, NAMES, RUN, SMALL  # noqa: E402

import dev  # noqa: E402
from zturbo import album  # noqa: E402

RECORDED = Path(__file__).with_name("shipped.json")
MINE = {"ZTurboLoadModel": {"diffusion_model": prompts.TINY, "text_encoder": "auto", "vae": "auto"}}
# most differing bits of 64, and mean difference of colours of 255: other processors round elsewise
BITS, COLOURS = 12, 8.0
SET = """([small, mine]) => {
    const all = (graph) => graph.nodes.flatMap((node) => (node.subgraph ? [node, ...all(node.subgraph)] : [node]));
    for (const node of all(window.app.graph))
        for (const widget of node.widgets ?? []) {
            const wanted = { ...small, ...(mine[node.type] ?? {}) };
            const steps = widget.name === "steps" && node.type !== "ZTurboTrainLoRA";
            if (widget.name in wanted && !steps) widget.value = wanted[widget.name];
        }
}"""
# Core's loader cannot read the tiny model, so an undistilled one is the tiny one with its adapter on.
INSTEAD = """(tiny) => {
    const graph = window.app.graph;
    const old = graph.nodes.find((n) => n.type === "UNETLoader");
    if (!old) return;
    const node = LiteGraph.createNode("ZTurboDeDistillAdapter");
    graph.add(node);
    node.widgets.find((w) => w.name === "adapter").value = tiny;
    graph.nodes.find((n) => n.type === "ZTurboLoadModel").connect(0, node, 0);
    for (const id of [...old.outputs[0].links]) {
        const link = graph.links.get(id);
        node.connect(0, graph.getNodeById(link.target_id), link.target_slot);
    }
    graph.remove(old);
}"""


@pytest.fixture(scope="module")
def lone(comfyui, tmp_path_factory):
    """A server of its own, with a run in `run`, aside."""
    with dev.Server(comfyui, Path(sys.executable), tmp_path_factory.mktemp("shipped")) as running:
        running.run(prompts.training(name=RUN, steps=2, rank=16, alpha=16.0, preview_prompts=""))
        shutil.move(running.base / "output" / "zturbo" / RUN, running.base / "run")
        begin_anew(running)
        yield running


@pytest.fixture(scope="module")
def page(browser, lone):
    """The page in Nodes 2.0."""
    canvas = Canvas(browser, lone, True)
    yield canvas
    canvas.context.close()


def begin_anew(server):
    """As after an install: an adapter, a LoRA and a run by the names that the workflows have, nothing remembered."""
    server.post("/free", {"unload_models": False, "free_memory": True})
    # ComfyUI looks at that only between two prompts, and sleeps through it where it comes while it tidies up
    server.run({"tick": {"class_type": "PreviewAny", "inputs": {"source": "between"}}})
    loras, output = server.base / "models" / "loras", server.base / "output"
    for place in (loras, output):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
    for file in (ADAPTER, "my_lora.safetensors"):
        shutil.copy(ROOT / "models" / "tiny" / "z_image_turbo_tiny_adapter.safetensors", loras / file)
    shutil.copytree(server.base / "run", output / "zturbo" / RUN)


def start(canvas, server, form: bool) -> str:
    """Press Run, in the graph or in the form; gives the prompt's id."""
    known = set(server.get("/history"))
    if form:
        canvas.run_form()
    else:
        canvas.run()
    for _ in range(300):
        queue = server.get("/queue")
        there = [entry[1] for entry in (*queue["queue_running"], *queue["queue_pending"])]
        if there or (there := sorted(set(server.get("/history")) - known)):
            return there[0]
        canvas.page.wait_for_timeout(100)
    raise AssertionError("nothing was queued")


def remembered(entry: dict) -> list[str]:
    """The nodes whose results ComfyUI had kept from a run before; it says nothing of what they show."""
    return next(data["nodes"] for kind, data in entry["status"]["messages"] if kind == "execution_cached")


def facts(server, outputs: dict, before: set[Path]) -> dict:
    """What has come out. Node ids are those of the file."""
    found: dict = {"nodes": {}, "files": sorted(str(path) for path in files(server) - before)}
    for number, output in sorted(outputs.items()):
        seen = []
        for image in output.get("images", []):
            place = server.base / image["type"] / image["subfolder"] / image["filename"]
            with Image.open(place) as picture:
                seen.append({"size": list(picture.size), "looks": album.fingerprint(picture)})
        texts = [re.sub(r"[-+]?\d[\d.,]*(e-?\d+)?", "#", text) for text in output.get("text", [])]
        if seen or texts:
            found["nodes"][number] = {"pictures": seen, "text": texts}
    return found


def files(server) -> set[Path]:
    places = [server.base / "models" / "loras", server.base / "output"]
    kept = [path for place in places for path in place.rglob("*") if path.is_file() and ".cache" not in path.parts]
    # a checkpoint more or less is a matter of what was there before
    return {path.relative_to(server.base) for path in kept if path.parent.name not in ("checkpoints", "previews")}


def apart(one: str, other: str) -> tuple[int, float]:
    """(bits, colours): how far two fingerprints differ."""
    raw = [np.frombuffer(bytes.fromhex(text), np.uint8) for text in (one, other)]
    bits = int(np.unpackbits(raw[0][: album.HASH] ^ raw[1][: album.HASH]).sum())
    return bits, float(np.abs(raw[0][album.HASH :].astype(int) - raw[1][album.HASH :]).mean())


@pytest.mark.parametrize("name", NAMES)
def test_it_gives_what_it_gave(page, lone, name):
    begin_anew(lone)
    page.drop(ROOT / "workflows" / f"{name}.json")
    assert page.missing_nodes() == []
    page.page.evaluate(INSTEAD, prompts.TINY)
    page.page.evaluate(SET, [SMALL, MINE])
    page.page.evaluate(
        "(name) => { for (const n of window.app.graph.nodes) if (n.type === 'ZTurboTrainLoRA') "
        "n.widgets.find((w) => w.name === 'name').value = name; }",
        f"shipped_{name.replace('.', '_')}",
    )
    before = files(lone)
    entry = lone.wait(start(page, lone, form=name.endswith(".app")))
    assert entry["status"]["status_str"] == "success", entry["status"]
    assert remembered(entry) == []
    page.page.wait_for_timeout(500)
    page.shot(f"shipped_{name}")
    found = facts(lone, entry["outputs"], before)
    known = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    if os.environ.get("ZTURBO_RECORD"):
        RECORDED.write_text(json.dumps({**known, name: found}, indent=1, sort_keys=True) + "\n")
        return
    wanted = known[name]
    assert found["files"] == wanted["files"]
    assert found["nodes"].keys() == wanted["nodes"].keys()
    for number, node in found["nodes"].items():
        other = wanted["nodes"][number]
        assert node["text"] == other["text"], number
        assert [one["size"] for one in node["pictures"]] == [one["size"] for one in other["pictures"]], number
        for one, two in zip(node["pictures"], other["pictures"]):
            bits, colours = apart(one["looks"], two["looks"])
            assert bits <= BITS and colours <= COLOURS, (number, bits, colours)
    # pictures of the graphs before, which begin_anew has taken away, are core's
    assert [text for text in page.ours if "/api/view?" not in text] == []


def test_the_blueprint_trains(page, lone):
    """One node with five things to fill in; its name is the run's and the LoRA's."""
    begin_anew(lone)
    page.drop(ROOT / "subgraphs" / "Train on my pictures.json")
    page.page.evaluate(SET, [SMALL, MINE | {"ZTurboDeDistillAdapter": {"adapter": prompts.TINY}}])
    page.page.evaluate(
        "(wanted) => window.app.graph.nodes[0].widgets.filter((w) => w.name in wanted)"
        ".forEach((w) => { w.value = wanted[w.name]; })",
        {"folder": "bundled: smiley", "trigger": "zsmile", "name": "by_blueprint", "steps": 3},
    )
    page.shot("blueprint")
    entry = lone.wait(start(page, lone, form=False))
    assert entry["status"]["status_str"] == "success", entry["status"]
    assert (lone.base / "models" / "loras" / "by_blueprint.safetensors").is_file()
    recipe = (lone.base / "output" / "zturbo" / "by_blueprint" / "recipe.toml").read_text(encoding="utf-8")
    assert "steps = 3" in recipe and 'trigger = "zsmile"' in recipe
    # pictures of the graphs before, which begin_anew has taken away, are core's
    assert [text for text in page.ours if "/api/view?" not in text] == []
