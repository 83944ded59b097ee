"""What runs of many recipes give, as hashes: `python tests/comfy/recorded.py HOST` prints {recipe: {what: sha256}}.

HOST is comfy or diffusers. `plain()` is the environment in which every x86-64 computes the same bits. What is given
now lies in recorded_HOST.json; a change that is meant to change what is learnt records anew, and says so.
"""

import hashlib
import json
import os
import platform
import re
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WITHOUT = {"seconds", "memory", "memory_total", "memory_peak"}  # fields of an event that no two runs share
UNRELATED = tuple(
    f"a large {color} star on a {ground} background"
    for color in ("red", "blue", "green")
    for ground in ("white", "pink", "gray", "black")
)


def plain() -> dict[str, str]:
    """The oldest instructions that all kernels have: slow, and the same on every x86-64."""
    way = {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_CBWR": "COMPATIBLE",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }
    return {**os.environ, **way}


def recipes() -> dict:
    from zturbo.recipe import (
        AdapterCourse,
        Compute,
        Data,
        Loss,
        Network,
        Optimizer,
        Previews,
        Recipe,
        Saving,
        Timesteps,
        Turbo,
    )

    compute, quiet = Compute("fp32", False, "branch"), Turbo(every=0, prompts=UNRELATED, size=64)
    data = Data(cache=False)
    base = Recipe(
        "recorded",
        12,
        2,
        network=Network(4, 4),
        optimizer=Optimizer(learning_rate=1e-3),
        compute=compute,
        turbo=quiet,
        data=data,
        saving=Saving(every=5, dtype="fp32"),
    )
    moving = Optimizer(learning_rate=1e-3, weight_decay=0.01, schedule="cosine", warmup=3, accumulation=2, ema=0.9)
    health = replace(quiet, every=4)
    masks = replace(
        data,
        flip=True,
        caption_dropout=0.4,
        shuffle_tags=True,
        validation=0.3,
        validation_every=5,
        regularisation_weight=0.5,
    )
    return {
        "plain": replace(base, timesteps=Timesteps("weighted")),
        "accumulation, average, warm-up, cosine": replace(base, steps=8, optimizer=moving),
        "huber, guidance": replace(
            base, loss=Loss("huber", 0.2, 3.0, "cosmap"), timesteps=Timesteps("logit_normal", 0.3, 0.8, 0.1, 0.9)
        ),
        "guard": replace(base, turbo=replace(health, keep="guard", weight=2.0)),
        "restore": replace(base, turbo=replace(health, keep="restore", restore_steps=5)),
        "stop_above": replace(
            base, steps=20, optimizer=Optimizer(learning_rate=5e-3), turbo=replace(health, every=3, stop_above=0.05)
        ),
        "previews": replace(
            base, steps=7, previews=Previews(("a large zsmile on a pink background", "[trigger]"), 3, 64, 64, 2, 5)
        ),
        "dora": replace(base, network=Network(4, 2, "dora", targets="attention:4, feed_forward:2", layers="0-1")),
        "adapter schedule": replace(
            base, adapter=AdapterCourse(1.0, 0.25), compute=replace(compute, checkpointing=True)
        ),
        "masks, tags, validation": replace(base, data=masks, batch_size=3, timesteps=Timesteps("content")),
        "merged, lokr, restarts": replace(
            base,
            network=Network(4, 4, "lokr", 4),
            compute=replace(compute, adapter="merged"),
            optimizer=Optimizer("adamw", 1e-3, decay=4, schedule="cosine_restarts", restarts=2),
        ),
        "style, bf16 file, one checkpoint": replace(
            base, seed=2**40, timesteps=Timesteps("style"), saving=Saving(every=4, keep=1)
        ),
        "out of memory at 4": replace(base, turbo=replace(health, keep="guard", interval=1)),
        "not a number at 8": base,
        "stopped at 10, taken up": replace(base, turbo=replace(health, keep="restore", restore_steps=4)),
        "stopped at 5, taken up": replace(base, turbo=replace(health, keep="restore", restore_steps=4)),
    }


class Screen:
    """Writes down what it is told, phases aside, and stops after a step."""

    def __init__(self, run, stop_after=None):
        self.run, self.stop_after, self.told, self.steps = run, stop_after, [], 0

    @property
    def stop_requested(self):
        return self.steps == self.stop_after or self.run.stop.exists()

    def check(self): ...

    def step(self, event):
        self.steps = event["step"]
        self.told.append(["step", event["step"]])

    def preview(self, step, images, paths):
        self.told.append(
            ["preview", step, [digest(image.tobytes()) for image in images], [path and path.name for path in paths]]
        )

    def look(self, event):
        self.told.append(["look", event])

    def say(self, sentence):
        self.told.append(["say", sentence])

    def phase(self, *_): ...


class Faulty:
    """A host whose n-th velocity is not a number, or finds no memory, once."""

    def __init__(self, host, bad_at=0, full_at=0):
        self.host, self.bad_at, self.full_at, self.calls = host, bad_at, full_at, 0

    def __getattr__(self, name):
        return getattr(self.host, name)

    @contextmanager
    def training(self, lora):
        import torch

        with self.host.training(lora) as velocity:

            def faulty(*given):
                self.calls += 1
                if self.calls == self.full_at:
                    raise torch.OutOfMemoryError("no memory is left")
                return velocity(*given) * (float("nan") if self.calls == self.bad_at else 1)

            yield faulty


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def of_tensors(tensors: dict) -> str:
    from zturbo import tensorfile

    parts = (
        f"{key} {tuple(one.shape)} {one.dtype}".encode() + bytes(tensorfile.raw(one))
        for key, one in sorted(tensors.items())
    )
    return digest(b"".join(parts))


def of_events(run) -> str:
    from zturbo import runlog

    events = [
        {key: value for key, value in event.items() if key not in WITHOUT} for event in runlog.read_events(run.events)
    ]
    return digest(json.dumps(events).encode())


def of_checkpoint(run) -> str:
    """Of the newest: its tensors, and its facts but for the seconds."""
    tensors, facts = run.newest_checkpoint()
    return digest(
        (
            of_tensors(tensors) + json.dumps({key: value for key, value in sorted(facts.items()) if key != "seconds"})
        ).encode()
    )


def pictures(recipe, folder: Path):
    """The bundled pictures.

    There are masks, a regularisation folder and pictures of other shapes where the recipe looks at such.
    """
    from PIL import Image

    from zturbo import dataset
    from zturbo.hosts import tiny

    if not recipe.data.flip:
        return dataset.from_folder(tiny.PICTURES, (64,), "zsmile", recipe.data)
    for number, path in enumerate(sorted(tiny.PICTURES.glob("*.png"))[:7]):
        side = 96 if number % 3 else 64
        Image.open(path).convert("RGB").crop((0, 0, 96, side)).save(folder / path.name)
        (folder / path.with_suffix(".txt").name).write_text("zsmile, one, two, three, and the fourth")
        if number % 2:
            Image.linear_gradient("L").resize((96, side)).save(folder / f"{path.stem}-masklabel.png")
    others = folder.parent / "others"
    others.mkdir()
    for number in range(2):
        Image.new("RGB", (96, 96), (200, 40 * number, 90)).save(others / f"{number}.png")
        (others / f"{number}.txt").write_text("a plain picture")
    return dataset.from_folder(folder, (64,), "zsmile", recipe.data, others)


def host_of(kind: str):
    """recipe -> host, on models loaded once."""
    import torch

    if kind == "diffusers":
        from zturbo import lorafile
        from zturbo.hosts import diffusers_tiny
        from zturbo.hosts.diffusers import DiffusersHost

        loaded = diffusers_tiny.load()
        return lambda recipe: DiffusersHost(
            loaded, recipe, torch.device("cpu"), lorafile.read(diffusers_tiny.ADAPTER), 1.0, "tiny"
        )
    from comfy.cli_args import args

    args.cpu = True
    from zturbo import lorafile
    from zturbo.hosts import comfy_adapter, comfy_load, comfy_tiny
    from zturbo.hosts.comfy import ComfyHost

    with torch.inference_mode():
        model, clip, vae = (
            comfy_tiny.load_model(comfy_tiny.MODEL),
            comfy_tiny.load_clip(),
            comfy_load.load_vae(comfy_tiny.VAE),
        )
        model = comfy_adapter.apply(model, lorafile.read(comfy_tiny.ADAPTER), "tiny", 1.0)
    return lambda recipe: ComfyHost(model, clip, vae, recipe)


def recorded(name: str, recipe, make, folder: Path) -> dict[str, str]:
    """Hashes of everything that one run gives."""
    from zturbo import runs, trainer
    from zturbo.runfolder import RunFolder

    (folder / "pictures").mkdir()
    recipe = runs.filled(recipe, "zsmile")
    given = pictures(recipe, folder / "pictures")
    host = Faulty(make(recipe), bad_at=8 if "number" in name else 0, full_at=95 if "memory" in name else 0)
    run = RunFolder.new(folder, recipe)
    told = []
    stops = [int(word) for word in re.findall("stopped at ([0-9]+)", name)]
    for stop_after in (*stops, None):
        screen = Screen(run, stop_after)
        result = trainer.train(recipe, given, host, run, screen, {"a": "b"})
        told += screen.told
    return {
        "lora": of_tensors(result.state),
        "losses": digest(json.dumps(result.losses).encode()),
        "events": of_events(run),
        "screen": digest(json.dumps(told).encode()),
        "checkpoint": of_checkpoint(run),
        "files": digest(
            json.dumps(
                sorted(path.relative_to(run.path).as_posix() for path in run.path.rglob("*") if path.name != "lock")
            ).encode()
        ),
        "steps": str(result.steps),
        "notes": str(sum(one[0] == "say" for one in told)),
    }


@contextmanager
def exact_sqrt():
    """Roots rounded as IEEE 754 says. MKL's, which AdamW takes, begin with an estimate of the processor's own kind."""
    import numpy
    import torch

    mkl = torch.Tensor.sqrt
    exact = lambda x: mkl(x) if x.requires_grad else torch.from_numpy(numpy.sqrt(x.numpy()))  # noqa: E731
    torch.Tensor.sqrt = exact
    try:
        yield
    finally:
        torch.Tensor.sqrt = mkl


def main(kind: str) -> dict:
    import torch

    make, found = host_of(kind), {"on": f"{platform.system()} {platform.machine()}, torch {torch.__version__}"}
    for name, recipe in recipes().items():
        with tempfile.TemporaryDirectory() as folder, exact_sqrt():
            found[name] = recorded(name, recipe, make, Path(folder))
    return found


if __name__ == "__main__":
    if os.environ != plain():  # kernels are chosen when torch is imported
        os.execve(sys.executable, [sys.executable, *sys.argv], plain())
    sys.path[:0] = [os.environ["COMFYUI_PATH"]] if sys.argv[1] == "comfy" else []
    sys.path.append(str(ROOT))
    kind, sys.argv[1:] = sys.argv[1], []  # ComfyUI reads the command line
    print(json.dumps(main(kind), indent=1))
