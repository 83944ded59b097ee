"""The shipped workflows, asked of the bundled tiny model in the big one's place."""

import json

import dev

from .setup import ROOT

WORKFLOWS = ROOT / "workflows"
TINY_ADAPTER = {
    "adapter": "tiny (bundled)",
    "direction": "+1 de-distill",
    "strength": 1.0,
    "checkpoint_has_adapter": False,
}
PROMPT = "a large red star on a white background"
CAPTIONS = (
    "a {small|large} {red|orange|yellow|green|purple} {circle|square|triangle|star|ring|cross} "
    "on a {white|gray|blue|pink|black} background"
)
OWN_ADAPTER = {
    "ZTurboGenerateSet": {"prompts": CAPTIONS, "sizes": "128x128, 112x144, 144x112, 80x80"},
    "ZTurboImageDataset": {"trigger": "", "caption_dropout": 0.0, "resolution": 128},
    "ZTurboTrainLoRA": {
        "name": "my_adapter",
        "learning_rate": 3e-4,
        "rank": 8,
        "alpha": 8.0,
        "batch_size": 8,
        "keep_turbo": "off",
        "preview_prompts": "",
        "preview_every": 0,
    },
}


def with_tiny(prompt: dict, demo: dict, concept: bool) -> dict:
    """The prompt for the big model, asked of the tiny one with the demo's settings.

    concept: draw what the LoRA learns.
    """
    settings = {
        node["class_type"]: {k: v for k, v in node["inputs"].items() if not isinstance(v, list)}
        for node in reversed(list(demo.values()))
    }
    unrelated = "\n".join(settings["ZTurboHealthOptions"]["prompts"].splitlines()[:6])
    settings["ZTurboHealth"] = settings["ZTurboCheckAdapter"] = {"size": 128, "prompts": unrelated}
    draws = {"width": 128, "height": 128}
    compared = {**draws, "prompts": settings["ZTurboCompare"]["prompts"]}
    loader = next(number for number, node in prompt.items() if node["class_type"] == "ZTurboLoadModel")
    for node in prompt.values():
        kind, inputs = node["class_type"], node["inputs"]
        resume, steps = inputs.get("resume"), inputs.get("steps", 0)
        if kind in ("ZTurboLoadModel", "ZTurboImageDataset", "ZTurboTrainLoRA", "ZTurboHealth", "ZTurboCheckAdapter"):
            inputs.update(
                {key: value for key, value in settings[kind].items() if not isinstance(inputs.get(key), list)}
            )
        if kind == "ZTurboSampler":
            inputs.update(draws, prompt=compared["prompts"].splitlines()[0] if concept else PROMPT)
        if kind == "ZTurboCompare":
            inputs.update(compared)
        if "adapter_schedule" in inputs:  # the guard wants the whole adapter
            inputs["keep_turbo"] = "off"
        if resume not in (None, "auto"):  # a run that goes on
            inputs.update(resume=resume, steps=steps // 2)
        if kind == "UNETLoader":  # an undistilled model: the tiny one with its adapter on
            node.update(class_type="ZTurboDeDistillAdapter", inputs={"model": [loader, 0], **TINY_ADAPTER})
    return prompt


def read(name: str, info: dict) -> dict:
    return dev.to_prompt(json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8")), info)


def making_adapter(prompt: dict, pictures: int = 512, steps: int = 1200) -> dict:
    """The workflow make_adapter with what its note says of the tiny model."""
    for node in prompt.values():
        node["inputs"].update(OWN_ADAPTER.get(node["class_type"], {}))
        if node["class_type"] == "ZTurboGenerateSet":
            node["inputs"]["count"] = pictures
        if node["class_type"] == "ZTurboTrainLoRA":
            node["inputs"]["steps"] = steps
    return prompt
