"""Other trainers' settings, damaged. Kinds for `bench fuzz`."""

import json
import random

import yaml

from bench.fuzz_damage import STRINGS, damage
from bench.fuzz_text import survives
from bench.fuzz_watch import Damaged, Place
from zturbo import importing

JOB = {
    "job": "extension",
    "config": {
        "name": "cat",
        "process": [
            {
                "type": "sd_trainer",
                "trigger_word": "zvk",
                "network": {"type": "lora", "linear": 16, "linear_alpha": 16, "network_kwargs": {}},
                "save": {"save_every": 250, "max_step_saves_to_keep": 4, "dtype": "bf16"},
                "datasets": [{"folder_path": "pics", "resolution": [512, 768], "caption_dropout_rate": 0.05}],
                "train": {"steps": 500, "lr": "1e-4", "optimizer": "adamw8bit", "batch_size": 1, "dtype": "bf16"},
                "model": {"arch": "zimage:turbo", "name_or_path": "x", "assistant_lora_path": "a/b.safetensors"},
                "sample": {"sample_every": 250, "width": 1024, "seed": 42, "prompts": ["a [trigger]"]},
            }
        ],
    },
}
TRAINING = """
dit = "z_image_turbo.safetensors"
network_module = "networks.lora_zimage"
network_dim = 32
network_args = ["factor=4"]
timestep_sampling = "shift"
discrete_flow_shift = 2.0
optimizer_type = "adamw8bit"
optimizer_args = ["weight_decay=0.1"]
learning_rate = 1e-4
max_train_steps = 100
save_every_n_epochs = 1
[general]
resolution = [960, 544]
batch_size = 2
[[datasets]]
image_directory = "pics"
num_repeats = 3
"""
VALUES = (
    None,
    True,
    -1,
    0,
    2**70,
    1e308,
    "1e400",
    "nan",
    [],
    {},
    [[]],
    [1, 2],
    {"a": 1},
    "x" * 5000,
    "../../etc/passwd",
)


def fed(place: Place, name: str, raw: bytes, what: str) -> Damaged:
    path = place.input / name
    path.write_bytes(raw)
    return Damaged(what, lambda: survives(importing.read(path).recipe))


def settings_bytes(rng: random.Random, place: Place) -> Damaged:
    """A file of another trainer, damaged anywhere."""
    texts = {"job.yaml": yaml.safe_dump(JOB), "job.json": json.dumps(JOB), "train.toml": TRAINING}
    name = rng.choice(sorted(texts))
    what, raw = damage(texts[name].encode(), rng)
    return fed(place, name, raw, f"{name}, {what}")


def settings_values(rng: random.Random, place: Place) -> Damaged:
    """A job in which one setting, anywhere, has another value."""
    job = json.loads(json.dumps(JOB))
    places: list[tuple[dict | list, str | int]] = []
    waiting: list[dict | list] = [job]
    while waiting:
        one = waiting.pop()
        keys = list(one) if isinstance(one, dict) else list(range(len(one)))
        places += [(one, key) for key in keys]
        waiting += [one[key] for key in keys if isinstance(one[key], (dict, list))]
    where, key = rng.choice(places)
    where[key] = rng.choice((*VALUES, *STRINGS))
    text = json.dumps(job)
    return fed(place, "job.json", text.encode("utf-8", "surrogatepass"), f"{key!r} is {str(where[key])[:60]!r}")


KINDS = [settings_bytes, settings_values]
