"""The pictures of README and help pages: the real page in a real browser, with the tiny model at work in it.

docs/pictures has those of the README, js/docs/images one of each node in a shipped workflow.
"""

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

import dev

from .graph import DOWNLOADS
from .setup import ROOT, TINY, log
from .workflows import WORKFLOWS

sys.path.append(str(ROOT / "tests"))
PAGES, HELP = ROOT / "docs" / "pictures", ROOT / "js" / "docs" / "images"
# which workflow shows a node best
SHOWN = {
    "ZTurboLoadModel": "train_lora",
    "ZTurboDeDistillAdapter": "adapter_plus_zero_minus",
    "ZTurboImageDataset": "tiny_demo",
    "ZTurboTrainLoRA": "tiny_demo",
    "ZTurboSaveLoRA": "train_lora",
    "ZTurboCompare": "tiny_demo",
    "ZTurboNetworkOptions": "train_lora_options",
    "ZTurboOptimizerOptions": "train_lora_options",
    "ZTurboLossOptions": "train_lora_options",
    "ZTurboSavingOptions": "train_lora_options",
    "ZTurboAdapterSchedule": "train_lora_options",
    "ZTurboHealthOptions": "train_lora_options",
    "ZTurboSampler": "sample_8_steps",
    "ZTurboHealth": "health_report",
    "ZTurboConvertLoRA": "convert_lora",
    "ZTurboGenerateSet": "make_adapter",
    "ZTurboExtractAdapter": "extract_adapter",
    "ZTurboCheckAdapter": "extract_adapter",
}
STEPS = 400
WIDTH = 760  # pixels of a help page's picture, at most
MARGIN = 60  # pixels around a node: its wires are seen
LOOK_AT = """([type, margin]) => {
    const canvas = window.app.canvas;
    const node = window.app.graph.nodes.find((n) => n.type === type);
    const scale = Math.min(1, 960 / (node.size[1] + 2 * margin));
    canvas.ds.scale = scale;
    canvas.ds.offset = [440 / scale - node.pos[0] + margin, 130 / scale - node.pos[1] + margin];
    canvas.setDirty(true, true);
    canvas.deselectAll?.();
}"""


def main(argv: list[str]):
    """argv: nodes whose pictures are wanted; none: all, and the README's."""
    from ui.browser import Canvas, chromium

    PAGES.mkdir(parents=True, exist_ok=True)
    HELP.mkdir(parents=True, exist_ok=True)
    base = Path(tempfile.mkdtemp(prefix="screenshots-"))
    with dev.Server(dev.find_comfyui(None), Path(sys.executable), base) as server:
        stand_in(base)
        browsers = chromium()
        canvas = Canvas(next(browsers), server, True)
        canvas.page.set_viewport_size({"width": 1600, "height": 1200})
        demo(canvas, server)
        for workflow in dict.fromkeys(sorted(SHOWN.values(), key=lambda name: name != "tiny_demo")):
            if workflow != "tiny_demo":
                canvas.drop(WORKFLOWS / f"{workflow}.json")
                canvas.page.wait_for_timeout(1500)
            for node, place in SHOWN.items():
                if place == workflow and node in (argv or SHOWN):
                    one_node(canvas.page, node)
        if not argv:
            pages(canvas, server)
        browsers.close()


def stand_in(base: Path):
    """Files by the names that the workflows ask for, so that no node shows an error."""
    tiny = {"diffusion_models": "z_image_turbo_tiny", "loras": "z_image_turbo_tiny_adapter"}
    for file, (folder, _) in DOWNLOADS.items():
        source = TINY / f"{tiny.get(folder, 'vae')}.safetensors"
        (base / "models" / folder / file).write_bytes(source.read_bytes())
    (base / "models" / "loras" / "my_lora.safetensors").write_bytes(
        (TINY / "z_image_turbo_tiny_adapter.safetensors").read_bytes()
    )


def demo(canvas, server):
    """The demo, trained and drawn, on the canvas."""
    canvas.drop(WORKFLOWS / "tiny_demo.json")
    canvas.widget("ZTurboTrainLoRA", "steps", STEPS)
    canvas.widget("ZTurboTrainLoRA", "preview_every", 50)
    canvas.widget("ZTurboHealthOptions", "gauge_every", 50)
    canvas.run()
    canvas.wait_step(STEPS // 2)
    canvas.page.evaluate(LOOK_AT, ["ZTurboTrainLoRA", MARGIN])
    canvas.wait_preview()
    canvas.page.wait_for_timeout(800)
    save(canvas.page.screenshot(), PAGES / "training.jpg", 1200)
    canvas.wait_status("Finished")
    queue = server.get("/queue")["queue_running"]
    if queue:
        server.wait(queue[0][1])
    canvas.page.wait_for_timeout(2000)


def one_node(page, node: str):
    page.evaluate(LOOK_AT, [node, MARGIN])
    page.wait_for_timeout(900)
    number = page.evaluate("(type) => window.app.graph.nodes.find((n) => n.type === type).id", node)
    box = page.locator(f"[data-node-id='{number}']").bounding_box()
    clip = {
        "x": max(0, box["x"] - MARGIN), "y": max(0, box["y"] - MARGIN // 2),
        "width": box["width"] + 2 * MARGIN, "height": box["height"] + MARGIN,
    }  # fmt: skip
    save(page.screenshot(clip=clip), HELP / f"{node}.jpg", WIDTH)


def pages(canvas, server):
    """The runs tab, a dataset's pictures, the form."""
    page = canvas.page
    canvas.drop(WORKFLOWS / "tiny_demo.json")
    canvas.open_pictures()
    page.wait_for_timeout(1500)
    save(page.screenshot(), PAGES / "pictures.jpg", 1200)
    page.keyboard.press("Escape")
    canvas.open_runs()
    page.wait_for_timeout(1500)
    save(page.screenshot(), PAGES / "runs.jpg", 1200)


def save(content: bytes, path: Path, width: int):
    """As JPEG, at most `width` pixels wide."""
    picture = Image.open(io.BytesIO(content)).convert("RGB")
    if picture.width > width:
        picture = picture.resize((width, picture.height * width // picture.width), Image.Resampling.LANCZOS)
    picture.save(path, quality=82, optimize=True)
    log.info("%s %dx%d", path.relative_to(ROOT), *picture.size)
