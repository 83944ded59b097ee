"""The workflows' thumbnails: what each shipped workflow draws, with the tiny model in the big one's place."""

import json
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image

import dev

from .setup import ROOT, TINY, log

WORKFLOWS = ROOT / "workflows"
ADAPTER = "zimage_turbo_training_adapter_v2.safetensors"
TINY_ADAPTER = {"adapter": "tiny (bundled)", "direction": "+1 de-distill", "strength": 1.0, "checkpoint_has_adapter": False}
PROMPT = "a large red star on a white background"
CHECKED = "\n".join((PROMPT, "a large blue cross on a pink background", "a large green ring on a gray background", "a large white square on a black background"))
HEIGHT = 256  # pixels


def with_tiny(prompt: dict, demo: dict, concept: bool) -> dict:
    """The prompt for the big model, asked of the tiny one with the demo's settings. concept: draw what the LoRA learns."""
    settings = {node["class_type"]: {k: v for k, v in node["inputs"].items() if not isinstance(v, list)} for node in reversed(list(demo.values()))}
    for node in prompt.values():
        kind, inputs = node["class_type"], node["inputs"]
        if kind in ("ZTurboLoadModel", "ZTurboImageDataset", "ZTurboTrainLoRA"):
            inputs.update(settings[kind])
        if kind == "ZTurboSampler":
            inputs.update(width=128, height=128, prompt=settings[kind]["prompt"] if concept else PROMPT)
        if kind == "UNETLoader":  # an undistilled model: the tiny one with its adapter on
            node.update(class_type="ZTurboDeDistillAdapter", inputs={"model": ["1", 0], **TINY_ADAPTER})
        if kind == "ZTurboCheckAdapter":
            inputs.update(size=128, prompts=CHECKED)
    if any(node["class_type"] == "ZTurboGenerateSet" for node in prompt.values()):  # the bundled adapter instead: training one takes a quarter of an hour
        prompt = {name: node for name, node in prompt.items() if node["class_type"] in ("ZTurboLoadModel", "ZTurboCheckAdapter", "SaveImage")}
        for node in prompt.values():
            if node["class_type"] == "ZTurboCheckAdapter":
                del node["inputs"]["lora"]
                node["inputs"]["adapter"] = TINY_ADAPTER["adapter"]
    return prompt


def read(name: str, info: dict) -> dict:
    return dev.to_prompt(json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8")), info)


def main(argv: list[str]):
    """argv: names of workflows; none: all."""
    wanted = argv or [path.stem for path in WORKFLOWS.glob("*.json")]
    comfyui = dev.find_comfyui(None)
    base = Path(tempfile.mkdtemp(prefix="thumbnails-"))
    with dev.Server(comfyui, Path(sys.executable), base) as server:
        info = server.get("/object_info")
        demo = read("tiny_demo", info)
        (base / "models" / "loras" / ADAPTER).write_bytes((TINY / "z_image_turbo_tiny_adapter.safetensors").read_bytes())
        for path in sorted(WORKFLOWS.glob("*.json"), key=lambda path: path.stem != "tiny_demo"):  # first: its LoRA is another's file
            if path.stem not in (*wanted, "tiny_demo"):
                continue
            prompt = read(path.stem, info)
            if path.stem != "tiny_demo":
                prompt = with_tiny(prompt, demo, concept=path.stem.startswith(("train", "convert")))
            outputs = server.run(prompt)
            if path.stem == "tiny_demo":
                shutil.copy(base / "models" / "loras" / "smiley.safetensors", base / "models" / "loras" / "my_lora.safetensors")
            if path.stem not in wanted:
                continue
            files = [base / "output" / i["subfolder"] / i["filename"] for o in outputs.values() for i in o.get("images", []) if i["type"] == "output"]
            beside([Image.open(file).convert("RGB") for file in files]).save(path.with_suffix(".jpg"), quality=85)
            log.info("%s: %d pictures", path.stem, len(files))


def beside(images: list[Image.Image]) -> Image.Image:
    """All pictures in a row, at one height."""
    scaled = [image.resize((image.width * HEIGHT // image.height, HEIGHT), Image.Resampling.LANCZOS) for image in images]
    row = Image.new("RGB", (sum(image.width for image in scaled), HEIGHT))
    x = 0
    for image in scaled:
        row.paste(image, (x, 0))
        x += image.width
    return row
