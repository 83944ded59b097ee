"""The ComfyUI frontend in a real browser, classic and with Nodes 2.0."""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1]))
from conftest import ROOT, missing  # noqa: E402

SHOTS = ROOT / "build" / "screenshots"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
RUNS = "[aria-label='LoRA runs: curves, previews, checkpoints']"  # the tab's button
READY = 120_000  # ms; a first start of the frontend on a busy machine


def chromium() -> Iterator:
    """The browser, headless."""
    sync_api = pytest.importorskip("playwright.sync_api")
    program = os.environ.get("CHROMIUM") or next(
        (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
    )
    if program is None:
        missing("needs a browser: install chromium or Chrome, or set CHROMIUM to one")
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=program, args=FLAGS)
        yield running
        running.close()


class Canvas:
    """The ComfyUI frontend in a page, with what its console said about our files."""

    def __init__(self, browser, server, vue: bool, address: str = ""):
        self.context = browser.new_context(viewport={"width": 1600, "height": 1000})
        self.page = self.context.new_page()
        self.address, self.ours, self.vue = address or server.address, [], vue
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

    def unveil(self):
        # The frontend's own veil over a drop sometimes stays when loading is done at once: its fading never ends.
        self.page.evaluate(
            "() => document.querySelectorAll('.p-blockui-mask-document').forEach((veil) => veil.remove())"
        )

    def run(self):
        self.unveil()
        self.page.get_by_test_id("queue-button").first.click()

    def run_form(self):
        """Press Run of a workflow that is open as an App."""
        self.unveil()
        skip = self.page.get_by_text("Skip", exact=True)  # ComfyUI's own tour of Apps
        if skip.count():
            skip.first.click()
        self.page.get_by_role("button", name="Run", exact=True).last.click()

    def open_runs(self, run: str = "") -> str:
        """Open the tab of runs and one of them, the newest unless another is said; gives its card's selector."""
        card = f".zturbo-card[data-run='{run}']" if run else ".zturbo-card"
        self.page.locator(RUNS).first.click()
        self.page.locator(f"{card} .zturbo-open").first.click()
        self.page.wait_for_selector(f"{card} .zturbo-detail polyline")
        return card

    def open_pictures(self):
        """Open the dialog of the dataset node that is there."""
        self.page.evaluate(
            "() => window.app.graph.nodes.find((n) => n.type === 'ZTurboImageDataset')"
            ".widgets.find((w) => w.type === 'button').callback()"
        )
        self.page.wait_for_selector(".zturbo-picture")

    def press(self, selector: str, number: int = 0):
        """Press a button of ours, wherever the canvas has it."""
        self.page.locator(selector).nth(number).evaluate("(button) => button.click()")

    def text(self, selector: str) -> str:
        return self.page.locator(selector).first.text_content() or ""

    def shot(self, name: str):
        """A screenshot for people to look at, kept in build/screenshots."""
        SHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SHOTS / f"{name}.png")

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
            "() => { const i = document.querySelector('.zturbo-panel .zturbo-now'); "
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

    def wait_curve(self, points: int, number: int = 0, seconds: int = 60):
        """Until a line has at least so many points: it is drawn once a second at most."""
        script = (
            "([n, points]) => (document.querySelectorAll('.zturbo-panel polyline')[n]?.getAttribute('points') ?? '')"
            ".split(' ').filter(Boolean).length >= points"
        )
        self.page.wait_for_function(script, arg=[number, points], timeout=seconds * 1000)

    def curve(self) -> int:
        return self.line(0)
