"""What can be done from the page beside training: pause, cancel, the runs tab, notices at nodes."""

import json
import sys
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parent))
from browser import Canvas  # noqa: E402
from conftest import ROOT  # noqa: E402

DEMO, SAMPLE = (ROOT / "workflows" / f"{name}.json" for name in ("tiny_demo", "sample_8_steps"))


@pytest.fixture
def demo(canvas, tmp_path):
    """The demo on the canvas, with a run's name of its own: (canvas, name)."""
    canvas.drop(DEMO)
    name = "studio_" + tmp_path.name.replace("-", "_")[-20:].strip("_[]")
    for widget, value in (("name", name), ("steps", 400), ("preview_every", 8)):
        canvas.widget("ZTurboTrainLoRA", widget, value)
    canvas.widget("ZTurboHealthOptions", "gauge_every", 5)
    return canvas, name


def count_of(canvas) -> int:
    found = canvas.status().split("at step ") if "at step " in canvas.status() else canvas.status().split("Step ")
    return int(found[1].split()[0])


def test_pause_go_on_compare_previews_and_cancel(demo, server):
    canvas, name = demo
    canvas.run()
    canvas.wait_step(10)
    canvas.press(".zturbo-pause")
    canvas.wait_status("Paused")
    canvas.page.wait_for_timeout(2500)  # the curve is drawn once a second
    points = canvas.curve()
    canvas.page.wait_for_timeout(1000)
    assert canvas.curve() == points and canvas.text(".zturbo-pause") == "Go on"
    canvas.press(".zturbo-pause")
    canvas.wait_step(26)
    canvas.wait_preview()
    assert "learning rate 0.0" in canvas.text(".zturbo-facts") and "GB in use" in canvas.text(".zturbo-facts")
    # an earlier step beside the newest, under a slider; then enlarged, with the arrow keys from step to step
    canvas.page.locator(".zturbo-before-step").first.select_option("8")
    assert canvas.page.locator(".zturbo-slider").first.is_visible()
    assert canvas.text(".zturbo-pair figcaption").startswith("step 8 | step ")
    canvas.press(".zturbo-panel .zturbo-frame")
    canvas.page.wait_for_selector(".zturbo-dialog[open]")
    canvas.shot(f"enlarged_{name}")
    canvas.page.keyboard.press("ArrowLeft")
    canvas.page.keyboard.press("Escape")
    canvas.page.wait_for_selector(".zturbo-dialog", state="detached")
    canvas.press(".zturbo-cancel")
    canvas.press(".zturbo-cancel")  # a double click cancels nothing
    assert canvas.text(".zturbo-cancel") == "Really cancel?"
    canvas.page.wait_for_timeout(600)
    canvas.press(".zturbo-cancel")
    canvas.wait_status("Cancelled at step")
    canvas.shot(f"cancelled_{name}")
    deadline = time.monotonic() + 30
    while server.get("/queue")["queue_running"] and time.monotonic() < deadline:
        time.sleep(0.2)
    assert (server.base / "output" / "zturbo" / name / "lora.safetensors").is_file()
    assert canvas.ours == []


def test_a_run_is_found_in_the_runs_tab_and_goes_on(demo, server):
    canvas, name = demo
    canvas.widget("ZTurboTrainLoRA", "steps", 24)
    canvas.run()
    canvas.wait_status("Finished at step 24")
    card = canvas.open_runs(name)
    assert "Finished · step 24 of 24" in canvas.text(f"{card} .zturbo-open")
    canvas.page.wait_for_selector(f"{card} .zturbo-detail pre", state="attached")
    assert "steps = 24" in canvas.text(f"{card} .zturbo-detail pre")
    canvas.shot(f"runs_{name}")
    # its LoRA on the canvas
    canvas.page.locator(f"{card} .zturbo-use").click()
    canvas.page.wait_for_function(
        "(file) => window.app.graph.nodes.some((n) => n.type === 'LoraLoaderModelOnly' && "
        "n.widgets.some((w) => w.value === file))",
        arg=f"{name}.safetensors",
    )
    assert (server.base / "models" / "loras" / f"{name}.safetensors").is_file()
    # it goes on as a new run, and so does its curve
    canvas.page.locator(f"{card} .zturbo-go-on").click()
    canvas.page.wait_for_function(
        "(name) => { const n = window.app.graph.nodes.find((n) => n.type === 'ZTurboTrainLoRA'); "
        "const of = (w) => n.widgets.find((one) => one.name === w).value; "
        "return of('resume') === name && of('steps') === 48; }",
        arg=name,
    )
    canvas.run()
    canvas.wait_step(26)
    canvas.wait_curve(26)
    assert "of 48" in canvas.status()
    canvas.press(".zturbo-stop")
    canvas.wait_status("Stopped, LoRA kept at step")
    canvas.page.wait_for_selector(f".zturbo-card[data-run='{name}_2']")
    # and beside the first one
    for run in (name, f"{name}_2"):
        canvas.page.locator(f".zturbo-card[data-run='{run}'] .zturbo-choose").check()
    canvas.page.wait_for_function("() => document.querySelectorAll('.zturbo-compared polyline').length === 2")
    canvas.shot(f"compared_{name}")
    # deleting asks once more
    canvas.page.locator(f".zturbo-card[data-run='{name}_2'] .zturbo-open").click()
    delete = canvas.page.locator(f".zturbo-card[data-run='{name}_2'] .zturbo-delete")
    for text in ("Delete", "Really delete?"):
        assert delete.text_content() == text
        delete.click()
        canvas.page.wait_for_timeout(600)
    canvas.page.wait_for_selector(f".zturbo-card[data-run='{name}_2']", state="detached")
    assert not (server.base / "output" / "zturbo" / f"{name}_2").exists()
    assert canvas.ours == []


SEND = """([kind, more]) => {
    const node = String(window.app.graph.nodes.find((n) => n.type === 'ZTurboTrainLoRA').id);
    const detail = { node, run: 'told', total: 100, phase: 'training', ...more };
    window.app.api.dispatchEvent(new CustomEvent(`zturbo.${kind}`, { detail }));
}"""


def test_what_waits_to_be_said_is_not_said_over_what_came_since(canvas):
    """Steps are said once a second; a phase, or the end, that comes in between stays."""
    canvas.drop(DEMO)
    canvas.widget("ZTurboTrainLoRA", "name", "told")

    def send(kind, **more):
        canvas.page.evaluate(SEND, [kind, more])

    def steps(first):
        return [{"step": n, "loss": 0.5, "lr": 1e-3, "seconds": 0.02, "memory": 1.0} for n in range(first, first + 5)]

    send("start", adapter="")
    send("steps", steps=steps(1))
    send("steps", steps=steps(6))
    send("phase", phase="drawing", done=0, of=1)
    canvas.page.wait_for_timeout(2500)
    assert canvas.status().startswith("Drawing previews")
    canvas.wait_curve(10)  # the steps are in the curve all the same
    send("phase", phase="training", done=10, of=100)
    assert canvas.status().startswith("Step 10 of 100")
    send("steps", steps=steps(11))
    send("end", how="stopped", saved=15)
    canvas.page.wait_for_timeout(2500)
    assert canvas.status() == "Stopped, LoRA kept at step 15 of 100."
    canvas.wait_curve(15)
    assert canvas.ours == []


def test_a_long_run_keeps_the_beginning_of_its_curve(canvas):
    canvas.drop(DEMO)
    canvas.widget("ZTurboTrainLoRA", "name", "told")
    canvas.page.evaluate(SEND, ["start", {"adapter": "", "total": 10_000}])
    for first in range(1, 10_000, 500):
        steps = [
            {"step": n, "loss": 0.5 + 0.1 * (n % 7), "lr": 1e-3, "seconds": 0.02} for n in range(first, first + 500)
        ]
        canvas.page.evaluate(SEND, ["steps", {"steps": steps, "total": 10_000}])
    canvas.page.wait_for_timeout(2500)
    drawn = canvas.page.locator(".zturbo-panel .zturbo-line-loss").get_attribute("points").split()
    across = [float(point.partition(",")[0]) for point in drawn]
    assert 44 <= across[0] < 46  # the left edge of the curves
    assert max(right - left for left, right in zip(across, across[1:])) < 4  # pixels


def test_a_form_whose_name_is_wired_shows_its_own_run_after_a_reload(browser, server):
    canvas = Canvas(browser, server, True)
    try:
        canvas.drop(ROOT / "workflows" / "train_lora.app.json")
        demo = json.loads(DEMO.read_text(encoding="utf-8"))
        for kind in ("ZTurboLoadModel", "ZTurboDeDistillAdapter", "ZTurboImageDataset", "ZTurboTrainLoRA"):
            node = next(node for node in demo["nodes"] if node["type"] == kind)
            names = [slot["name"] for slot in node["inputs"] if "widget" in slot]
            for name, value in zip(names, node["widgets_values"]):
                canvas.widget(kind, name, value)
        canvas.widget("PrimitiveString", "value", "by_form")
        canvas.widget("ZTurboTrainLoRA", "steps", 300)
        canvas.run_form()
        canvas.wait_step(12)
        canvas.page.wait_for_timeout(3000)  # the frontend keeps the open workflow for a reload
        canvas.open()
        canvas.page.wait_for_function("() => window.app.graph.nodes.some((n) => n.type === 'ZTurboTrainLoRA')")
        canvas.wait_step(13)
        canvas.wait_curve(12)  # also what ran before the reload
        assert canvas.page.locator(".zturbo-panel").bounding_box()["height"] > 300  # a form gives it what it asks for
        canvas.shot("form")
        canvas.press(".zturbo-stop")
        canvas.wait_status("Stopped, LoRA kept")
        assert (server.base / "output" / "zturbo" / "by_form" / "lora.safetensors").is_file()
        assert canvas.ours == []
    finally:
        canvas.context.close()


def link(canvas, before: str, slot: int, behind: str, name: str):
    canvas.page.evaluate(
        "([before, slot, behind, name]) => { const of = (type) => window.app.graph.nodes.find((n) => n.type === type); "
        "const to = of(behind); of(before).connect(slot, to, to.inputs.findIndex((i) => i.name === name)); }",
        [before, slot, behind, name],
    )


def test_a_notice_stands_at_a_node_that_is_wired_wrong_until_it_is_mended_or_dismissed(canvas):
    canvas.drop(SAMPLE)
    canvas.page.wait_for_timeout(1500)
    assert canvas.page.locator(".zturbo-warning").count() == 0
    canvas.page.evaluate("() => window.app.graph.add(LiteGraph.createNode('ZTurboDeDistillAdapter'))")
    before = canvas.page.evaluate(
        "() => { const n = window.app.graph.nodes.find((n) => n.type === 'ZTurboSampler'); "
        "const i = n.inputs.find((i) => i.name === 'model'); const l = window.app.graph.links.get(i.link); "
        "return [window.app.graph.getNodeById(l.origin_id).type, l.origin_slot]; }"
    )
    link(canvas, before[0], before[1], "ZTurboDeDistillAdapter", "model")
    link(canvas, "ZTurboDeDistillAdapter", 0, "ZTurboSampler", "model")
    warning = canvas.page.locator(".zturbo-warning", has_text="still on this model")
    warning.wait_for()
    canvas.shot(f"notice_{'vue' if canvas.vue else 'classic'}")
    warning.locator("button").evaluate("(button) => button.click()")
    warning.wait_for(state="detached")
    canvas.page.wait_for_timeout(1500)
    assert warning.count() == 0
    canvas.widget("ZTurboDeDistillAdapter", "direction", "-1 restore")
    canvas.page.locator(".zturbo-warning", has_text="no de-distill adapter on this model to take away").wait_for()
    canvas.widget("ZTurboDeDistillAdapter", "direction", "+1 de-distill")
    warning.wait_for()  # it is said again, as it was right in between
    assert canvas.ours == []
