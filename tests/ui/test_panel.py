"""The shipped demo workflow on the real frontend in a real browser.

It loads clean, runs, shows, survives a reload, stops.
"""

import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parent))
from behind_a_path import proxied  # noqa: E402
from conftest import ROOT, missing  # noqa: E402

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
READY = 120_000  # ms; a first start of the frontend on a busy machine
STEPS = 400


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = os.environ.get("CHROMIUM") or next(
        (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
    )
    if chromium is None:
        missing("needs a browser: install chromium or Chrome, or set CHROMIUM to one")
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield running
        running.close()


class Canvas:
    """The ComfyUI frontend in a page, with what its console said about our files."""

    def __init__(self, browser, server, vue: bool, address: str = ""):
        self.context = browser.new_context(viewport={"width": 1600, "height": 1000})
        self.page = self.context.new_page()
        self.address, self.ours = address or server.address, []
        self.page.on(
            "console",
            lambda message: self.note(
                f"{message.type}: {message.text} {message.location.get('url', '')}", message.type
            ),
        )
        self.page.on("pageerror", lambda error: self.note(str(error.stack or error), "error"))
        server.post(
            "/settings",
            {"Comfy.VueNodes.Enabled": vue, "Comfy.TutorialCompleted": True, "Comfy.Workflow.Persist": True},
        )
        self.open()

    def note(self, text: str, kind: str):
        if kind in ("error", "warning") and ("zimage-turbo-lora" in text or "zturbo" in text.lower()):
            self.ours.append(text)

    def open(self):
        self.page.goto(self.address, wait_until="domcontentloaded")
        self.page.wait_for_function(
            "() => window.app?.graph && window.app?.extensionManager && !document.querySelector('#splash-loader')",
            timeout=READY,
        )
        self.page.wait_for_function(
            "() => window.app.canvas && window.app.extensions?.some((e) => e.name === 'zturbo.TrainPanel')",
            timeout=READY,
        )

    def drop(self, path: Path):
        """Drop a workflow file on the canvas, as from the file manager; wait until its nodes are there."""
        text = path.read_text(encoding="utf-8")
        script = (
            "([text, name]) => { const data = new DataTransfer(); "
            "data.items.add(new File([text], name, { type: 'application/json' })); return data; }"
        )
        data = self.page.evaluate_handle(script, [text, path.name])
        self.page.dispatch_event("#graph-canvas", "drop", {"dataTransfer": data, "clientX": 800, "clientY": 500})
        ids = sorted(str(node["id"]) for node in json.loads(text)["nodes"])
        self.page.wait_for_function(
            "(ids) => JSON.stringify(window.app.graph.nodes.map((n) => String(n.id)).sort()) === JSON.stringify(ids)",
            arg=ids,
            timeout=READY,
        )

    def widget(self, node: str, name: str, value):
        self.page.evaluate(
            "([type, name, value]) => { const n = window.app.graph.nodes.find((n) => n.type === type); "
            "n.widgets.find((w) => w.name === name).value = value; }",
            [node, name, value],
        )

    def missing_nodes(self) -> list[str]:
        return self.page.evaluate(
            "() => window.app.graph.nodes.filter((n) => !(n.type in LiteGraph.registered_node_types))"
            ".map((n) => n.type)"
        )

    def run(self):
        # The frontend's own veil over a drop sometimes stays when loading is done at once: its fading never ends.
        self.page.evaluate(
            "() => document.querySelectorAll('.p-blockui-mask-document').forEach((veil) => veil.remove())"
        )
        self.page.get_by_test_id("queue-button").first.click()

    def status(self) -> str:
        return self.page.locator(".zturbo-status").first.text_content() or ""

    def note_statuses(self):
        """Write down all that the status line says from now on."""
        self.page.evaluate(
            """() => {
                const line = document.querySelector('.zturbo-status');
                window.statuses = [];
                const note = () => window.statuses.push(line.textContent);
                new MutationObserver(note).observe(line, { childList: true, characterData: true, subtree: true });
            }"""
        )

    def statuses(self) -> list[str]:
        return self.page.evaluate("() => window.statuses")

    def wait_status(self, text: str, seconds: int = 300):
        self.page.wait_for_function(
            "(text) => document.querySelector('.zturbo-status')?.textContent.includes(text)",
            arg=text,
            timeout=seconds * 1000,
        )

    def wait_step(self, step: int, seconds: int = 300):
        script = (
            "(step) => Number(document.querySelector('.zturbo-status')"
            "?.textContent.match(/Step (\\d+)/)?.[1] ?? 0) >= step"
        )
        self.page.wait_for_function(script, arg=step, timeout=seconds * 1000)

    def wait_preview(self, seconds: int = 300):
        self.page.wait_for_function(
            "() => { const i = document.querySelector('.zturbo-previews img'); "
            "return i && i.complete && i.naturalWidth > 0; }",
            timeout=seconds * 1000,
        )

    def line(self, number: int) -> int:
        """Points of a drawn line."""
        return self.page.evaluate(
            "(n) => (document.querySelectorAll('.zturbo-panel polyline')[n]?.getAttribute('points') ?? '')"
            ".split(' ').filter(Boolean).length",
            number,
        )

    def curve(self) -> int:
        return self.line(0)

    def looks(self) -> int:
        """Points of the held-out pictures' losses."""
        return self.line(3)


@pytest.fixture(params=[False, True], ids=["classic", "nodes2"])
def canvas(browser, server, request):
    made = Canvas(browser, server, request.param)
    yield made
    made.context.close()


DEMO = ROOT / "workflows" / "tiny_demo.json"


def test_the_dropped_demo_runs_to_its_end(canvas, server, request):
    """The file as it is shipped, all its steps; in the second frontend a quarter of them.

    The name is another one each time, or the server would hand on what it has.
    """
    whole = request.node.callspec.id == "classic"
    canvas.drop(DEMO)
    assert canvas.missing_nodes() == []
    canvas.widget("ZTurboTrainLoRA", "name", f"whole_{request.node.callspec.id}")
    if not whole:
        canvas.widget("ZTurboTrainLoRA", "steps", 250)
    canvas.note_statuses()
    canvas.run()
    canvas.wait_step(1)
    entry = server.wait(server.get("/queue")["queue_running"][0][1])
    assert entry["status"]["status_str"] == "success"
    canvas.wait_status("Finished")
    canvas.wait_preview()
    said = canvas.statuses()
    for words in ("Preparing pictures and captions", "Walking turbo's paths", "Step ", "Drawing previews", "Saving"):
        assert any(one.startswith(words) for one in said), words
    assert canvas.curve() > 100 and canvas.line(4) == (4 if whole else 1)  # readings of the gauge
    assert canvas.ours == []


def test_the_panel_survives_a_reload_and_stop_keeps(canvas, server, tmp_path):
    canvas.drop(DEMO)
    name = "panel_" + tmp_path.name.replace("-", "_")[-20:].strip("_[]")
    for widget, value in (("name", name), ("steps", STEPS), ("preview_every", 10)):
        canvas.widget("ZTurboTrainLoRA", widget, value)
    for widget, value in (("validation", 0.2), ("validation_every", 4)):
        canvas.widget("ZTurboImageDataset", widget, value)
    canvas.widget("ZTurboHealthOptions", "gauge_every", 5)
    canvas.run()
    canvas.wait_step(12)
    canvas.wait_preview()
    assert canvas.line(4) >= 2 and "Turbo wear 0." in canvas.page.locator(".zturbo-gauge").first.text_content()
    assert canvas.curve() >= 10 and canvas.looks() >= 3
    assert "LoRA of rank 8: " in canvas.page.locator(".zturbo-notice").first.get_attribute("title")
    canvas.page.wait_for_timeout(3000)  # the frontend keeps the open workflow for a reload
    canvas.open()
    canvas.page.wait_for_function(
        "() => window.app.graph.nodes.some((n) => n.type === 'ZTurboTrainLoRA')", timeout=READY
    )
    canvas.wait_step(13)
    canvas.wait_preview()
    assert canvas.line(4) >= 2 and "Turbo wear 0." in canvas.page.locator(".zturbo-gauge").first.text_content()
    assert canvas.curve() >= 12 and canvas.looks() >= 4  # also what ran before the reload
    assert "De-distill adapter" in canvas.page.locator(".zturbo-line").first.text_content()
    assert "LoRA of rank 8" in canvas.page.locator(".zturbo-notice").first.get_attribute("title")
    canvas.page.locator(".zturbo-save").first.evaluate("(button) => button.click()")
    checkpoints = server.base / "output" / "zturbo" / name / "checkpoints"
    deadline = time.monotonic() + 60
    while not list(checkpoints.glob("step_*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert list(checkpoints.glob("step_*.safetensors"))
    canvas.page.locator(".zturbo-stop").first.evaluate("(button) => button.click()")
    canvas.wait_status("Stopped, LoRA kept")
    entry = server.wait(server.get("/queue")["queue_running"][0][1])
    assert entry["status"]["status_str"] == "success"
    assert any(image["type"] == "output" for output in entry["outputs"].values() for image in output.get("images", []))
    step = int(canvas.status().split("at step ")[1].split()[0])
    assert 12 <= step < STEPS
    assert canvas.ours == []


def test_the_panel_works_where_comfyui_lies_under_a_path(browser, server):
    """Everything that it asks for goes through the proxy's path.

    That is its own modules, events, previews, and the wishes of its buttons.
    """
    with proxied(server.address) as proxy:
        canvas = Canvas(browser, server, False, proxy.address)
        try:
            canvas.drop(DEMO)
            for widget, value in (("name", "under_a_path"), ("steps", STEPS), ("preview_every", 5)):
                canvas.widget("ZTurboTrainLoRA", widget, value)
            canvas.run()
            canvas.wait_step(6)
            canvas.wait_preview()
            canvas.page.locator(".zturbo-save").first.evaluate("(button) => button.click()")
            canvas.page.wait_for_timeout(3000)  # the frontend keeps the open workflow for a reload
            canvas.open()
            canvas.page.wait_for_function(
                "() => window.app.graph.nodes.some((n) => n.type === 'ZTurboTrainLoRA')", timeout=READY
            )
            canvas.wait_step(7)
            canvas.wait_preview()
            canvas.page.locator(".zturbo-stop").first.evaluate("(button) => button.click()")
            canvas.wait_status("Stopped, LoRA kept")
            queue = server.get("/queue")["queue_running"]
            assert not queue or server.wait(queue[0][1])["status"]["status_str"] == "success"
        finally:
            canvas.context.close()
    assert canvas.ours == [] and not [path for path in proxy.strays if "zturbo" in path or "scripts" in path]


def test_every_shipped_workflow_opens_with_no_missing_node(canvas):
    for path in sorted((ROOT / "workflows").glob("*.json")):
        canvas.drop(path)
        assert canvas.missing_nodes() == [], path.name
    assert canvas.ours == []
