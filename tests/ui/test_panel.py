"""The shipped demo workflow on the real frontend in a real browser.

It loads clean, runs, shows, survives a reload, stops.
"""

import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parent))
from behind_a_path import proxied  # noqa: E402
from browser import READY, Canvas  # noqa: E402
from conftest import ROOT  # noqa: E402

STEPS = 400
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
    canvas.wait_curve(101)
    canvas.wait_curve(4 if whole else 1, 4)
    assert canvas.line(4) == (4 if whole else 1)  # readings of the gauge
    assert canvas.ours == []


def test_from_run_to_a_run_that_goes_on(canvas, server, tmp_path):
    """Drop, Run, curve and previews, a reload in mid-run, Save now, Stop and keep, the picture, the runs tab, Go on."""
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
    for points, line in ((2, 4), (10, 0), (3, 3)):
        canvas.wait_curve(points, line)
    assert "Turbo wear 0." in canvas.text(".zturbo-gauge")
    assert "LoRA of rank 8: " in canvas.page.locator(".zturbo-notice").first.get_attribute("title")
    canvas.page.wait_for_timeout(3000)  # the frontend keeps the open workflow for a reload
    canvas.open()
    canvas.page.wait_for_function(
        "() => window.app.graph.nodes.some((n) => n.type === 'ZTurboTrainLoRA')", timeout=READY
    )
    canvas.wait_step(13)
    canvas.wait_preview()
    for points, line in ((2, 4), (12, 0), (4, 3)):  # also what ran before the reload
        canvas.wait_curve(points, line)
    assert "Turbo wear 0." in canvas.text(".zturbo-gauge")
    assert "De-distill adapter" in canvas.text(".zturbo-adapter")
    assert "LoRA of rank 8" in canvas.page.locator(".zturbo-notice").first.get_attribute("title")
    canvas.press(".zturbo-save")
    checkpoints = server.base / "output" / "zturbo" / name / "checkpoints"
    deadline = time.monotonic() + 60
    while not list(checkpoints.glob("step_*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert list(checkpoints.glob("step_*.safetensors"))
    canvas.press(".zturbo-stop")
    canvas.wait_status("Stopped, LoRA kept")
    entry = server.wait(server.get("/queue")["queue_running"][0][1])
    assert entry["status"]["status_str"] == "success"
    assert any(image["type"] == "output" for output in entry["outputs"].values() for image in output.get("images", []))
    step = int(canvas.status().split("at step ")[1].split()[0])
    assert 12 <= step < STEPS
    # the nodes behind have drawn with it, and their picture is on the canvas
    canvas.page.wait_for_function(
        "() => window.app.graph.nodes.filter((n) => ['SaveImage', 'ZTurboCompare'].includes(n.type))"
        ".every((n) => n.imgs?.length || document.querySelector(`[data-node-id='${n.id}'] img`))"
    )
    canvas.shot(f"stopped_{name}")
    card = canvas.open_runs(name)
    canvas.page.locator(f"{card} .zturbo-go-on").click()
    canvas.page.wait_for_function(
        "(name) => window.app.graph.nodes.find((n) => n.type === 'ZTurboTrainLoRA')"
        ".widgets.find((w) => w.name === 'resume').value === name",
        arg=name,
    )
    canvas.run()
    canvas.wait_step(step + 3)
    canvas.wait_curve(step + 3)  # from the first step of the first run
    canvas.shot(f"goes_on_{name}")
    canvas.press(".zturbo-stop")
    canvas.wait_status("Stopped, LoRA kept")
    assert (server.base / "output" / "zturbo" / f"{name}_2" / "lora.safetensors").is_file()
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
            canvas.press(".zturbo-save")
            canvas.page.wait_for_timeout(3000)  # the frontend keeps the open workflow for a reload
            canvas.open()
            canvas.page.wait_for_function(
                "() => window.app.graph.nodes.some((n) => n.type === 'ZTurboTrainLoRA')", timeout=READY
            )
            canvas.wait_step(7)
            canvas.wait_preview()
            canvas.press(".zturbo-stop")
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
