"""Who has no mouse, needs large letters, or a light theme: everything of ours can be reached, fits, and can be read."""

import json
import shutil
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parent))
from browser import RUNS, Canvas  # noqa: E402
from conftest import ROOT  # noqa: E402

DEMO = ROOT / "workflows" / "tiny_demo.json"
SMILEY = ROOT / "models" / "tiny" / "smiley"
OURS = ".zturbo-panel, .zturbo-runs, .zturbo-dialog[open], .zturbo-warning"
SCRIPT = Path(__file__).with_name("reach.js").read_text(encoding="utf-8").strip().removesuffix(";")


def ask(canvas, what: str, *given):
    """What reach.js finds."""
    return canvas.page.evaluate(f"(given) => ({SCRIPT}).{what}(...given)", list(given))


@pytest.fixture(scope="module")
def folder(server):
    """Pictures with something to say of each kind."""
    place = server.base / "input" / "reach"
    shutil.copytree(SMILEY, place, dirs_exist_ok=True)
    (place / "smiley_01.txt").unlink()
    (place / "smiley_02.txt").write_text("a plain one")
    (place / "broken.png").write_bytes(b"nothing")
    return "reach"


def trained(canvas, name: str):
    """A short run on the canvas, with previews and readings, up to its end."""
    canvas.drop(DEMO)
    for widget, value in (("name", name), ("steps", 12), ("preview_every", 4)):
        canvas.widget("ZTurboTrainLoRA", widget, value)
    canvas.widget("ZTurboHealthOptions", "gauge_every", 4)
    canvas.run()
    canvas.wait_status("Finished at step 12")
    canvas.wait_preview()


def open_pictures(canvas, folder):
    canvas.widget("ZTurboImageDataset", "folder", folder)
    canvas.open_pictures()


@pytest.mark.parametrize("theme", ["dark", "light"])
def test_everything_can_be_read(browser, server, folder, theme):
    canvas = Canvas(browser, server, True)
    try:
        server.post("/settings", {"Comfy.ColorPalette": theme})
        canvas.open()
        trained(canvas, f"read_{theme}")
        canvas.page.locator(".zturbo-before-step").first.select_option("4")
        canvas.page.evaluate("() => window.app.graph.add(LiteGraph.createNode('ZTurboDeDistillAdapter'))")
        canvas.open_runs()
        open_pictures(canvas, folder)
        canvas.shot(f"reach_{theme}")
        found = ask(canvas, "contrasts", OURS)
        assert len(found) > 80
        faint = [entry for entry in found if entry[2] < (3 if entry[3] else 4.5)]
        assert faint == []
        assert canvas.ours == []
    finally:
        server.post("/settings", {"Comfy.ColorPalette": "dark"})
        canvas.context.close()


def test_at_200_percent_nothing_is_cut(browser, server, folder):
    """A screen of 1600 x 1000 at 200 % has room for 800 x 500."""
    canvas = Canvas(browser, server, True)
    try:
        canvas.page.set_viewport_size({"width": 800, "height": 500})
        trained(canvas, "large_letters")
        canvas.page.locator(".zturbo-before-step").first.select_option("4")
        assert ask(canvas, "overflows", ".zturbo-panel") == []
        canvas.open_runs()
        assert ask(canvas, "overflows", ".zturbo-runs") == []
        open_pictures(canvas, folder)
        canvas.shot("reach_200")
        assert ask(canvas, "overflows", ".zturbo-dialog[open]") == []
        box = canvas.page.locator(".zturbo-album").bounding_box()
        assert box["x"] >= 0 and box["y"] >= 0 and box["x"] + box["width"] <= 800 and box["y"] + box["height"] <= 500
        assert canvas.page.locator(".zturbo-album textarea").first.is_visible()
    finally:
        canvas.context.close()


def tabbed(canvas, times: int) -> list[tuple]:
    """Where the focus goes with each Tab."""
    found = []
    for _ in range(times):
        canvas.page.keyboard.press("Tab")
        found.append(tuple(ask(canvas, "focus")))
    return found


def names(found) -> list[str]:
    return [entry[0].split()[-1] if entry[0] else entry[1] for entry in found]


def test_the_panel_is_worked_by_keys_alone(browser, server):
    canvas = Canvas(browser, server, True)
    try:
        canvas.drop(DEMO)
        for widget, value in (("name", "by_keys"), ("steps", 400), ("preview_every", 8)):
            canvas.widget("ZTurboTrainLoRA", widget, value)
        canvas.run()
        canvas.wait_step(18)
        canvas.wait_preview()
        canvas.page.locator(".zturbo-stop").first.focus()
        way = tabbed(canvas, 14)
        assert names(way)[:3] == ["zturbo-save", "zturbo-pause", "zturbo-cancel"]
        assert {"svg", "zturbo-frame", "zturbo-before-step", "zturbo-thumb"} <= set(names(way))
        assert all(entry[2] != "none" for entry in way if entry[0].startswith("zturbo"))
        canvas.page.locator(".zturbo-pause").first.focus()
        canvas.page.keyboard.press("Enter")
        canvas.wait_status("Paused")
        canvas.page.locator(".zturbo-panel .zturbo-chart svg").first.focus()
        for key in ("ArrowLeft", "+", "PageUp", "0"):
            canvas.page.keyboard.press(key)
        assert "step" in canvas.text(".zturbo-readout")
        assert "Curves of the run" in canvas.page.locator(".zturbo-panel .zturbo-chart svg").first.get_attribute(
            "aria-label"
        )
        canvas.page.locator(".zturbo-panel .zturbo-frame").first.focus()
        canvas.page.keyboard.press("Enter")
        canvas.page.wait_for_selector(".zturbo-dialog[open]")
        canvas.page.keyboard.press("ArrowLeft")
        canvas.page.keyboard.press("Escape")
        canvas.page.wait_for_selector(".zturbo-dialog", state="detached")
        canvas.page.locator(".zturbo-pause").first.focus()
        canvas.page.keyboard.press("Space")
        canvas.wait_step(20)
        canvas.page.locator(".zturbo-stop").first.focus()
        canvas.page.keyboard.press("Enter")
        canvas.wait_status("Stopped, LoRA kept")
        assert canvas.ours == []
    finally:
        canvas.context.close()


def test_runs_and_pictures_are_worked_by_keys_alone(browser, server, folder):
    canvas = Canvas(browser, server, True)
    try:
        trained(canvas, "keys_runs")
        canvas.page.locator(RUNS).first.focus()
        canvas.page.keyboard.press("Enter")
        card = ".zturbo-card[data-run='keys_runs']"
        canvas.page.wait_for_selector(card)
        canvas.page.locator(f"{card} .zturbo-choose").focus()
        canvas.page.keyboard.press("Tab")
        assert ask(canvas, "focus")[0] == "zturbo-open"
        canvas.page.keyboard.press("Enter")
        canvas.page.wait_for_selector(f"{card} .zturbo-detail polyline")
        canvas.page.locator(f"{card} .zturbo-open").focus()
        assert names(tabbed(canvas, 4)) == ["zturbo-from", "zturbo-go-on", "zturbo-use", "zturbo-graph"]
        canvas.page.locator(".zturbo-refresh").focus()
        canvas.page.keyboard.press("Enter")
        canvas.page.wait_for_timeout(500)
        assert ask(canvas, "focus")[0].endswith("zturbo-refresh")  # it keeps the focus
        # the dialog: a caption is written, saved, and Escape closes it
        canvas.widget("ZTurboImageDataset", "folder", folder)
        button = canvas.page.get_by_role("button", name="Look at the pictures")
        button.first.focus()
        canvas.page.keyboard.press("Enter")
        canvas.page.wait_for_selector(".zturbo-picture textarea")
        text = canvas.page.locator(".zturbo-picture[data-name='smiley_03.png'] textarea")
        text.focus()
        canvas.page.keyboard.press("End")
        canvas.page.keyboard.type(", by keys")
        canvas.page.keyboard.press("Control+Enter")
        canvas.page.wait_for_function(
            "() => document.querySelector(\"[data-name='smiley_03.png'] [role=status]\").textContent === 'Saved.'"
        )
        canvas.page.keyboard.type(", and Escape")
        canvas.page.keyboard.press("Escape")  # it is saved first
        canvas.page.wait_for_selector(".zturbo-album", state="detached")
        written = (server.base / "input" / folder / "smiley_03.txt").read_text()
        assert written.endswith(", by keys, and Escape\n")
        button.first.focus()
        canvas.page.keyboard.press("Enter")
        canvas.page.wait_for_selector(".zturbo-picture textarea")
        for _ in range(3):
            assert canvas.page.evaluate(
                "() => document.querySelector('.zturbo-album').contains(document.activeElement)"
            )
            canvas.page.keyboard.press("Tab")
        canvas.page.locator(".zturbo-only").select_option("silent")
        canvas.page.wait_for_function("() => document.querySelectorAll('.zturbo-picture').length === 1")
        canvas.page.keyboard.press("Escape")
        canvas.page.wait_for_selector(".zturbo-album", state="detached")
        assert canvas.ours == []
        # Close writes what is being typed; what cannot be written stays, until it is closed once more
        for wish, refused in (("typed last", False), ("typed against", True)):
            open_pictures(canvas, folder)
            canvas.page.locator(".zturbo-picture[data-name='smiley_05.png'] textarea").fill(wish)
            if refused:
                (server.base / "input" / folder / "smiley_05.txt").write_text("of another")
            canvas.page.locator(".zturbo-close").click()
            if refused:
                canvas.page.locator(".zturbo-album", has_text="Some captions are not saved").wait_for()
                assert "was changed meanwhile" in canvas.text("[data-name='smiley_05.png'] [role=status]")
                canvas.page.locator(".zturbo-close").click()
            canvas.page.wait_for_selector(".zturbo-album", state="detached")
        assert (server.base / "input" / folder / "smiley_05.txt").read_text() == "of another"
        # or one of the two texts is taken, by keys, too
        for wish, choice, kept in (("mine", "theirs", "for theirs"), ("mine after all", "mine", "mine after all")):
            open_pictures(canvas, folder)
            text = canvas.page.locator(".zturbo-picture[data-name='smiley_05.png'] textarea")
            text.fill(wish)
            (server.base / "input" / folder / "smiley_05.txt").write_text(f"for {choice}")
            text.press("Control+Enter")
            button = canvas.page.locator(f"[data-name='smiley_05.png'] .zturbo-{choice}")
            button.wait_for()
            button.press("Enter")
            canvas.page.locator("[data-name='smiley_05.png'] .zturbo-mine").wait_for(state="hidden")
            assert text.input_value() == kept
            assert text.evaluate("(text) => document.activeElement === text")  # ComfyUI's own keys rest
            canvas.page.keyboard.press("Escape")
            canvas.page.wait_for_selector(".zturbo-album", state="detached")
            assert (server.base / "input" / folder / "smiley_05.txt").read_text().strip() == kept
    finally:
        canvas.context.close()


def test_the_pages_texts_are_those_of_the_chosen_language(browser, server):
    canvas = Canvas(browser, server, True)
    try:
        server.post("/settings", {"Comfy.Locale": "ja"})
        canvas.open()
        canvas.drop(DEMO)
        texts = json.loads((ROOT / "locales" / "ja" / "main.json").read_text(encoding="utf-8"))["zturbo"]
        canvas.page.wait_for_function(
            "(text) => document.querySelector('.zturbo-stop')?.textContent === text", arg=texts["panel"]["stop"]
        )
        nodes = json.loads((ROOT / "locales" / "ja" / "nodeDefs.json").read_text(encoding="utf-8"))
        names = [nodes[node]["display_name"] for node in ("ZTurboTrainLoRA", "ZTurboCompare", "ZTurboImageDataset")]
        shown = canvas.page.locator("[data-node-id]").all_text_contents()
        assert all(any(name in text for text in shown) for name in names)
        canvas.shot("japanese")
    finally:
        server.post("/settings", {"Comfy.Locale": "en"})
        canvas.context.close()
