"""docs/first-lora.md is done as it stands there: each numbered sentence is an act, and all of them together a LoRA."""

import re
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1]))
from conftest import ROOT

PAGE = (ROOT / "docs" / "first-lora.md").read_text(encoding="utf-8")
STEPS = re.findall(r"^\d+\. (.*)$", PAGE, re.MULTILINE)
BUTTONS = {
    "Pause": ".zturbo-pause",
    "Go on": ".zturbo-pause",
    "Stop and keep": ".zturbo-stop",
    "Use its LoRA": ".zturbo-use",
}


class Reader:
    def __init__(self, canvas):
        self.canvas, self.run = canvas, ""

    def drop(self, file: str):
        self.canvas.drop(ROOT / file)
        assert self.canvas.missing_nodes() == []

    def set(self, widget: str, node: str, value: str):
        found = self.canvas.page.evaluate(
            "([title, name, value]) => { const n = window.app.graph.nodes.find((n) => n.title === title); "
            "const w = n.widgets.find((w) => w.name === name); w.value = typeof w.value === 'number' ? +value : value; "
            "return String(w.value); }",
            [node, widget, value],
        )
        assert found == value

    def press(self, name: str):
        if name == "Run":
            return self.canvas.run()
        button = self.canvas.page.locator(BUTTONS[name]).first
        assert button.text_content() == name
        button.evaluate("(button) => { if (button.disabled) throw new Error('it is disabled'); button.click(); }")

    def press_in(self, name: str, run: str):
        self.canvas.page.locator(f".zturbo-card[data-run='{run}'] .zturbo-detail button", has_text=name).click()

    def wait(self, text: str):
        step = re.fullmatch(r"Step (\d+)", text)
        self.canvas.wait_step(int(step[1])) if step else self.canvas.wait_status(text)

    def sidebar(self, title: str):
        self.canvas.page.get_by_role("button", name=title).first.click()

    def look(self, run: str):
        self.canvas.page.locator(f".zturbo-card[data-run='{run}'] .zturbo-open").click()
        self.canvas.page.wait_for_selector(f".zturbo-card[data-run='{run}'] .zturbo-detail polyline")


ACTS = {
    r"Drop `(.+?)` on the canvas": Reader.drop,
    r"Set \*(.+?)\* of \*\*(.+?)\*\* to `(.+?)`\.": Reader.set,
    r"Press \*\*(.+?)\*\* in the run `(.+?)`\.": Reader.press_in,
    r"Press \*\*(.+?)\*\*\.": Reader.press,
    r"Wait until the panel says `(.+?)`\.": Reader.wait,
    r"Open \*\*(.+?)\*\* in the sidebar\.": Reader.sidebar,
    r"Open the run `(.+?)`\.": Reader.look,
}


@pytest.mark.parametrize("canvas", [True], indirect=True, ids=["nodes2"])
def test_the_guide_to_a_first_lora_ends_with_one(canvas, server):
    reader = Reader(canvas)
    for number, sentence in enumerate(STEPS, 1):
        act, found = next((act, found) for form, act in ACTS.items() if (found := re.match(form, sentence)))
        act(reader, *found.groups())
        canvas.shot(f"guide_{number:02}")
    lora = server.base / re.search(r"`(models/loras/\S+)`", PAGE)[1]
    assert lora.is_file() and lora.stat().st_size > 10_000
    runs = server.base / "output" / "zturbo"
    assert (runs / "my_first_lora_2" / "lora.safetensors").is_file()
    assert canvas.ours == []
