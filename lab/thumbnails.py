"""The workflows' thumbnails: what each shipped workflow draws, with the tiny model in the big one's place."""

import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image

import dev

from .setup import TINY, log
from .workflows import WORKFLOWS, making_adapter, read, with_tiny

ADAPTER = "zimage_turbo_training_adapter_v2.safetensors"
HEIGHT = 400  # pixels


def main(argv: list[str]):
    """argv: names of workflows; none: all."""
    wanted = argv or [path.stem for path in WORKFLOWS.glob("*.json")]
    comfyui = dev.find_comfyui(None)
    base = Path(tempfile.mkdtemp(prefix="thumbnails-"))
    with dev.Server(comfyui, Path(sys.executable), base) as server:
        info = server.get("/object_info")
        demo = read("tiny_demo", info)
        (base / "models" / "loras" / ADAPTER).write_bytes(
            (TINY / "z_image_turbo_tiny_adapter.safetensors").read_bytes()
        )
        # first: its LoRA is another's file
        for path in sorted(WORKFLOWS.glob("*.json"), key=lambda path: path.stem != "tiny_demo"):
            if path.stem not in (*wanted, "tiny_demo"):
                continue
            prompt = read(path.stem, info)
            if path.stem != "tiny_demo":
                prompt = with_tiny(
                    prompt, demo, concept=path.stem.startswith(("train", "convert", "resume", "compare"))
                )
            if path.stem == "make_adapter":
                prompt = making_adapter(prompt)
            outputs = server.run(prompt)
            if path.stem == "tiny_demo":
                loras, runs = base / "models" / "loras", base / "output" / "zturbo"
                shutil.copy(loras / "smiley.safetensors", loras / "my_lora.safetensors")
                shutil.copytree(runs / "smiley", runs / "my_lora")
            if path.stem not in wanted:
                continue
            files = [
                base / "output" / i["subfolder"] / i["filename"]
                for o in outputs.values()
                for i in o.get("images", [])
                if i["type"] == "output"
            ]
            beside([Image.open(file).convert("RGB") for file in files]).save(path.with_suffix(".jpg"), quality=85)
            log.info("%s: %d pictures", path.stem, len(files))


def beside(images: list[Image.Image]) -> Image.Image:
    """All pictures in a row, at one height."""
    scaled = [
        image.resize((image.width * HEIGHT // image.height, HEIGHT), Image.Resampling.LANCZOS) for image in images
    ]
    row = Image.new("RGB", (sum(image.width for image in scaled), HEIGHT))
    x = 0
    for image in scaled:
        row.paste(image, (x, 0))
        x += image.width
    return row
