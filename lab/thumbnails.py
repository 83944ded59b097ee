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
TEMPLATE = "a {small|large} {red|orange|yellow|green|purple} {circle|square|triangle|star|ring|cross} on a {white|gray|blue|pink|black} background"
TINY_ADAPTER = {"adapter": "tiny (bundled)", "direction": "+1 de-distill", "strength": 1.0, "checkpoint_has_adapter": False}
PROMPT = "a large red star on a white background"
HEIGHT = 256  # pixels


def with_tiny(prompt: dict, demo: dict, concept: bool) -> dict:
    """The prompt for the big model, asked of the tiny one with the demo's settings. concept: draw what the LoRA learns."""
    settings = {node["class_type"]: {k: v for k, v in node["inputs"].items() if not isinstance(v, list)} for node in reversed(list(demo.values()))}
    unrelated = "\n".join(settings["ZTurboHealthOptions"]["prompts"].splitlines()[:6])
    settings["ZTurboHealth"] = settings["ZTurboCheckAdapter"] = {"size": 128, "prompts": unrelated}
    for node in prompt.values():
        kind, inputs = node["class_type"], node["inputs"]
        if kind in ("ZTurboLoadModel", "ZTurboImageDataset", "ZTurboTrainLoRA", "ZTurboHealth", "ZTurboCheckAdapter"):
            inputs.update({key: value for key, value in settings[kind].items() if not isinstance(inputs.get(key), list)})
        if kind == "ZTurboSampler":
            inputs.update(width=128, height=128, prompt=settings[kind]["prompt"] if concept else PROMPT)
        if kind == "UNETLoader":  # an undistilled model: the tiny one with its adapter on
            node.update(class_type="ZTurboDeDistillAdapter", inputs={"model": ["1", 0], **TINY_ADAPTER})
    return prompt


def own_adapter(prompt: dict) -> dict:
    """The workflow make_adapter in the tiny model's measures."""
    for node in prompt.values():
        if node["class_type"] == "ZTurboGenerateSet":
            node["inputs"].update(count=512, prompts=TEMPLATE, sizes="128x128, 112x144, 144x112, 80x80")
        if node["class_type"] == "ZTurboImageDataset":
            node["inputs"].update(trigger="", caption_dropout=0.0)
        if node["class_type"] == "ZTurboTrainLoRA":
            node["inputs"].update(name="my_adapter", steps=1200, learning_rate=3e-4, rank=8, alpha=8.0, batch_size=8, keep_turbo="off", preview_prompts=PROMPT, preview_every=0)
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
            if path.stem == "make_adapter":
                prompt = own_adapter(prompt)
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
