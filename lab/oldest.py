"""Which versions of ComfyUI the pack runs in: each is started with the pack, and does the main job once.

    python dev.py lab oldest FOLDER ...

It uses the environment that dev.py made. A version with requirements of its own is asked by another Python: --python.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from PIL import Image

import dev

sys.path.append(str(dev.ROOT / "tests"))
import prompts


def main(argv: list[str]) -> int:
    """0 where all of them do it."""
    parser = argparse.ArgumentParser(prog="lab oldest")
    parser.add_argument("folders", nargs="+", type=Path, help="checkouts of ComfyUI")
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="what ComfyUI is started with")
    parser.add_argument("--pack", type=Path, default=dev.ROOT, help="the pack's folder, such as what a zip held")
    args = parser.parse_args(argv)
    dev.ROOT = args.pack.resolve()  # what dev.Server puts into custom_nodes
    failed = 0
    for folder in args.folders:
        try:
            said = smoke(folder.resolve(), args.python)
        except (dev.Stop, AssertionError, OSError) as error:
            failed, said = failed + 1, f"no: {error}"
        print(f"{dev.comfyui_version(folder)}: {said}", flush=True)
    return 1 if failed else 0


def smoke(comfyui: Path, python: Path) -> str:
    """What was seen. Raises where a node is missing, a part is not served, or the job is not done."""
    base = Path(tempfile.mkdtemp(prefix="oldest-"))
    with dev.Server(comfyui, python, base, "--disable-metadata") as server:
        known = server.get("/object_info")
        ours = sorted(path.stem for path in (dev.ROOT / "js" / "docs").glob("ZTurbo*.md"))
        missing = [name for name in ours if name not in known]
        assert ours and not missing, f"nodes that are missing: {', '.join(missing)}"
        served = parts(server)
        outputs = server.run(job())
    first, *others = [pictures(base, outputs[name]) for name in ("by core", "by the sampler", "by Compare LoRAs")]
    assert all(other == first for other in others), f"the pictures in {base / 'output'} are not alike"
    assert (base / "models" / "loras" / "oldest.safetensors").is_file(), "no LoRA was saved"
    return f"{len(ours)} nodes, {served}; trained, saved, and drawn alike by core, the sampler and Compare LoRAs"


def parts(server: dev.Server) -> str:
    """The pack's other parts, asked for as ComfyUI's page does. Raises where one is not served."""
    texts, blueprints = server.get("/i18n").values(), server.get("/global_subgraphs").values()
    served = {
        "workflows": server.get("/api/workflow_templates").get(dev.PACK, []),
        "locales": [one for one in texts if "zturbo" in one],
        "subgraphs": [one for one in blueprints if dev.PACK in one["info"]["node_pack"]],
    }
    for room, found in served.items():
        there = len(list((dev.ROOT / room).glob("*" if room == "locales" else "*.json")))
        assert len(found) == there, f"of {there} in {room}/ {len(found)} are served"
    return ", ".join(f"{len(found)} {room}" for room, found in served.items())


def pictures(base: Path, output: dict) -> list[bytes]:
    """The pixels of what was saved."""
    files = [base / "output" / image["subfolder"] / image["filename"] for image in output["images"]]
    return [Image.open(file).convert("RGB").tobytes() for file in files]


def job() -> dict:
    """Train four steps, save; the LoRA drawn by core's own nodes, by the sampler and by Compare LoRAs."""
    node, clip, vae, prompt = prompts.node, ["load", 1], ["load", 2], "a large zsmile on a blue background"
    drawing = {"seed": 3, "steps": 8}
    compared = {"loras": "", "prompts": prompt, "strengths": "1", "without": False, "width": 64, "height": 64}
    return prompts.training(name="oldest") | {
        "save": node("ZTurboSaveLoRA", lora=["train", 0], name="oldest", dtype="bf16", overwrite=True),
        "lora": node("LoraModelLoader", model=["load", 0], lora=["train", 0], strength_model=1.0, bypass=False),
        "text": node("CLIPTextEncode", clip=clip, text=prompt),
        "none": node("ConditioningZeroOut", conditioning=["text", 0]),
        "empty": node("EmptySD3LatentImage", width=64, height=64, batch_size=1),
        "sample": node(
            "KSampler",
            **({"model": ["lora", 0], "positive": ["text", 0], "negative": ["none", 0], "latent_image": ["empty", 0]}),
            **({"cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0} | drawing),
        ),
        "decode": node("VAEDecode", samples=["sample", 0], vae=vae),
        "by core": prompts.save_image(["decode", 0]),
        "ours": prompts.sample(["lora", 0], prompt=prompt),
        "by the sampler": prompts.save_image(["ours", 0]),
        "compare": node(
            "ZTurboCompare",
            **(compared | drawing | {"sampler": "euler"}),
            **{"model": ["load", 0], "clip": clip, "vae": vae, "lora": ["train", 0]},
        ),
        "by Compare LoRAs": prompts.save_image(["compare", 1]),
    }
