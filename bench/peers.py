"""The work that `bench step` and `bench memory` give to every contender, and the contenders.

The work: optimizer steps of a Z-Image of width 768 with 8 layers and random weights, one processor core, 512 tokens of
picture and 64 of caption, a LoRA of rank 16 on the layers' seven Linears, AdamW, batch 1. What is no part of a step (a
preview, the gauge, saving) is off.

A contender is opened once and gives a function that takes a turn: some steps to warm up, and then STEPS steps, whose
seconds are returned. They are the processor's (`clock`), of all threads of the process: on a core of its own a step
takes as long by a clock on the wall, and where other programs want the core, these numbers stay.
"""

import gc
import importlib
import importlib.util
import logging
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F

from bench.gpu_files import FULL
from lab.setup import ROOT, cores, use_comfy

CONFIG = FULL | {"dim": 768, "n_heads": 6, "n_kv_heads": 6, "n_layers": 8, "cap_feat_dim": 64}  # of the tiny encoder
CAPTION = (
    "a photograph of a small red house at the end of a long road in the evening, the lamps are lit, snow lies on the "
    "roof, a black cat sits at the gate, behind it there are tall trees and low hills under a clear sky"
)
TEXT_TOKENS = 64  # of the caption, padded
WARM, STEPS = 1, 2
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PACK = "zimage_turbo_lora_pack"
MAX_NORM = 1.0  # gradients are clipped to it, as diffusers' own training scripts do
Turn = Callable[[], list[float]]
clock = time.process_time


def one_core():
    """To be called before anything of comfy is imported: no card, one thread."""
    use_comfy()
    from comfy.cli_args import args

    args.cpu, args.use_pytorch_cross_attention = True, True  # the attention that core takes on a card; it is the faster
    logging.getLogger().setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "In CPU autocast")  # core's trainer asks for one in fp32
    torch.set_num_threads(1)
    import comfy.utils

    comfy.utils.PROGRESS_BAR_ENABLED = False
    sys.path = [path for path in sys.path if path]  # the working folder's nodes/ would hide ComfyUI's nodes.py
    sys.path.append(str(ROOT / "tests" / "comfy"))  # diffusers_twin


def machine() -> dict[str, object]:
    """What the numbers were measured on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.processor()
    return {"processor": processor, "cores": cores(), "threads": torch.get_num_threads(), "torch": torch.__version__}


def build_model(dtype: torch.dtype, disable_dynamic: bool = False):
    """MODEL with random weights, always the same."""
    import comfy.model_management as mm
    import comfy.model_patcher
    import comfy.supported_models

    from bench.full import fill

    kind = comfy.supported_models.ZImage(dict(CONFIG))
    kind.set_inference_dtype(dtype, None)
    generator = torch.Generator().manual_seed(0)
    model = kind.get_model({}, "", device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fill(name, parameter, generator)
    made = comfy.model_patcher.ModelPatcher(model, mm.get_torch_device(), mm.unet_offload_device())
    made.cached_patcher_init = (build_model, (dtype,))  # core's trainer makes a copy of its own
    return made


@dataclass(frozen=True)
class Work:
    """width, height: pixels. rank: of the LoRA; the other numbers are those of the module's first lines."""

    dtype: str = "fp32"
    width: int = 256
    height: int = 512
    rank: int = 16

    @cached_property
    def model(self):
        with torch.inference_mode():  # as a loader node runs
            return build_model(DTYPES[self.dtype])

    @cached_property
    def clip(self):
        from zturbo.hosts import comfy_tiny

        with torch.inference_mode():
            return comfy_tiny.load_clip()

    @cached_property
    def vae(self):
        from zturbo.hosts import comfy_load, comfy_tiny

        with torch.inference_mode():
            return comfy_load.load_vae(comfy_tiny.VAE)

    @cached_property
    def features(self) -> torch.Tensor:
        """[1, L, cap_feat_dim] of the caption."""
        from zturbo.hosts import comfy_draw
        from zturbo.memory import padded

        with torch.inference_mode():
            found = comfy_draw.encode_prompt(self.clip, CAPTION)[0][0]
        assert padded(found.shape[1]) == TEXT_TOKENS, found.shape
        return found.clone().float()

    @property
    def image_tokens(self) -> int:
        return self.width * self.height // 256

    def latents(self, seed: int, count: int = 1) -> torch.Tensor:
        """[count, 16, height / 8, width / 8] drawn by chance, in model space."""
        shape = (count, 16, self.height // 8, self.width // 8)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    def pictures(self, dataset_module):
        """Four pictures of one size and one caption, made by the given `zturbo.dataset`."""
        shape = (4, self.height, self.width, 3)
        chance = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
        side = round((self.width * self.height) ** 0.5)
        always = dataset_module.Data(caption_dropout=0.0)
        made = dataset_module.from_arrays(list(chance.numpy()), [CAPTION], (side,), options=always)
        assert set(made.buckets()) == {(self.width, self.height)}, made.buckets()
        return made

    def adapted(self):
        """The MODEL with a random adapter of rank 16 on it, at +1."""
        from bench.full import with_adapter

        with torch.inference_mode():
            return with_adapter(self.model)

    def recipe(self, checkpointing=False, batch=1, way="auto", steps=1000, save_every=10**5):
        from zturbo.recipe import Compute, Network, Recipe, Saving, Turbo

        network = Network(self.rank, float(self.rank))
        compute = Compute(self.dtype, checkpointing, way, keep_layers=0)
        beside = {"turbo": Turbo(every=0), "saving": Saving(save_every)}
        return Recipe(steps=steps, batch_size=batch, network=network, compute=compute, **beside)


def timed(step: Callable[[], object], warm: int = WARM) -> list[float]:
    """Seconds of each of STEPS steps, behind those that warm up."""
    seconds = []
    for _ in range(warm + STEPS):
        started = clock()
        step()
        seconds.append(clock() - started)
    return seconds[warm:]


@contextmanager
def ticking() -> Iterator[list[tuple[int, float]]]:
    """(step, when) of each tick of ComfyUI's progress bar while open: a trainer's steps, as its screen sees them."""
    import comfy.utils

    ticks: list[tuple[int, float]] = []
    before = comfy.utils.PROGRESS_BAR_HOOK
    comfy.utils.set_progress_bar_global_hook(lambda value, *_, **__: ticks.append((value, clock())))
    try:
        yield ticks
    finally:
        comfy.utils.set_progress_bar_global_hook(before)


def gaps(ticks: list[tuple[int, float]], warm: int) -> list[float]:
    """Seconds of each step behind the first `warm`."""
    late = [tick for tick in ticks if tick[0] >= warm]
    return [(b[1] - a[1]) / (b[0] - a[0]) for a, b in zip(late, late[1:])]


# Ours


class Loop:
    """Our step, called in a plain loop. adapter: branch or merged; a random one of rank 16 is on the MODEL then."""

    def __init__(self, work: Work, checkpointing: bool = False, batch: int = 1, adapter: str = ""):
        from zturbo import dataset, lowrank, network, optimizers
        from zturbo.batches import pictures_of
        from zturbo.hosts.comfy import ComfyHost
        from zturbo.objectives import FlowMatching
        from zturbo.plan import Phase
        from zturbo.state import State

        recipe = self.recipe = work.recipe(checkpointing, batch, adapter or "auto")
        model = work.adapted() if adapter else work.model
        self.host = ComfyHost(model, work.clip, work.vae, recipe)
        pictures = pictures_of(recipe, work.pictures(dataset), self.host)
        lora = network.create(self.host.targets, recipe.network, 0, norms=self.host.norms)
        self.state = State(lora, optimizers.build(recipe.optimizer, lowrank.parameters(lora)))
        self.phase = Phase(FlowMatching(recipe, pictures, self.host), lambda step: recipe.optimizer.learning_rate)
        self.trained = lowrank.count(lora)

    def __call__(self) -> list[float]:
        from zturbo.objectives import Split
        from zturbo.step import optimizer_step

        with self.host.training(self.state.lora) as velocity:
            return timed(lambda: optimizer_step(self.recipe.optimizer, self.phase, self.state, velocity, Split()))


class Node:
    """Our node, run as ComfyUI runs it, a new run each turn. Seconds from step to step, with all that lies between.

    logged: seconds on the wall of the same steps, as the run's own log has them.
    """

    WARM = 2

    def __init__(self, work: Work, checkpointing: bool = False):
        train, recipe = pack_module("nodes.train"), pack_module("zturbo.recipe")
        start_server_object()
        shape = train.ZTurboTrainLoRA.define_schema()
        values = {one.id: getattr(one, "default", None) for one in shape.inputs if not getattr(one, "optional", False)}
        values |= {"model": work.model, "clip": work.clip, "vae": work.vae}
        values |= {"dataset": work.pictures(pack_module("zturbo.dataset")), "name": "bench", "resume": "new"}
        values |= {"rank": work.rank, "alpha": float(work.rank), "steps": self.WARM + STEPS}
        values |= {"compute_dtype": work.dtype, "gradient_checkpointing": checkpointing, "keep_layers": 0}
        self.values = values | {"health_options": recipe.Turbo(every=0), "saving_options": recipe.Saving(10**5)}
        hidden = {"hidden_inputs": {pack_module("nodes.train").io.Hidden.unique_id: "1"}}
        self.node = train.ZTurboTrainLoRA.PREPARE_CLASS_CLONE(hidden)
        self.logged: list[float] = []

    def __call__(self) -> list[float]:
        import folder_paths

        read_events = pack_module("zturbo.runlog").read_events
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode(), ticking() as ticks:
            folder_paths.set_output_directory(folder)
            path = Path(self.node.execute(**self.values).args[3])
            events = [event for event in read_events(path.parent / "events.jsonl") if "loss" in event]
        self.logged = [event["seconds"] for event in events[self.WARM :]]
        return gaps(ticks, self.WARM)


def pack_module(name: str):
    """A module of the pack imported as ComfyUI imports it, as a package of another name."""
    if PACK not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        sys.modules[PACK] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[PACK])
    return importlib.import_module(f"{PACK}.{name}")


def start_server_object():
    """The object that nodes send their events to; nobody listens."""
    import asyncio

    from server import PromptServer

    if getattr(PromptServer, "instance", None) is None:
        PromptServer(asyncio.new_event_loop())


# Peers


class Core:
    """Core's TrainLoraNode at its defaults but for what the work says. It trains every module that has a weight."""

    WARM = 1

    def __init__(self, work: Work, **settings):
        from comfy_extras.nodes_train import TrainLoraNode

        self.node = TrainLoraNode
        values = {one.id: getattr(one, "default", None) for one in TrainLoraNode.define_schema().inputs}
        values |= {"model": work.model, "latents": {"samples": work.latents(3)}, "positive": [[work.features, {}]]}
        values |= {"rank": work.rank, "steps": self.WARM + STEPS, "existing_lora": "[None]"}
        values |= {"training_dtype": work.dtype, "lora_dtype": work.dtype}
        self.values = {name: [value] for name, value in (values | settings).items()}
        self.losses: list[float] = []

    def __call__(self) -> list[float]:
        import comfy.model_management

        with torch.inference_mode(), ticking() as ticks:
            self.losses = self.node.execute(**self.values).args[1]["loss"]
            comfy.model_management.unload_all_models()
        gc.collect()
        return gaps(ticks, self.WARM)


class Peft:
    """diffusers' Z-Image with PEFT's LoRA and AdamW, under autocast where the work is in bf16."""

    def __init__(self, work: Work, checkpointing: bool = False):
        import diffusers_twin
        from peft import LoraConfig

        from bench.gpu_speed import PEFT_TARGETS

        self.velocity, self.dtype = diffusers_twin.velocity, DTYPES[work.dtype]
        twin = self.twin = diffusers_twin.build(work.model.model.diffusion_model, CONFIG)
        for parameter in twin.parameters():
            parameter.data = parameter.data.to(self.dtype)
        twin.add_adapter(LoraConfig(r=work.rank, lora_alpha=work.rank, target_modules=PEFT_TARGETS))
        self.parameters = [one for one in twin.parameters() if one.requires_grad]
        for parameter in self.parameters:
            parameter.data = parameter.data.float()
        twin.train()
        if checkpointing:
            twin.enable_gradient_checkpointing()
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4)
        self.x0, self.caption = work.latents(3), work.features[0].to(self.dtype)
        self.trained = sum(one.numel() for one in self.parameters)

    def loss(self, x0: torch.Tensor, eps: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        level = sigma.view(-1, 1, 1, 1)
        x = ((1 - level) * x0 + level * eps).to(self.dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            v = self.velocity(self.twin, x, sigma, [self.caption] * len(x))
        return F.mse_loss(v.float(), eps - x0)

    def step(self):
        self.loss(self.x0, torch.randn_like(self.x0), torch.rand(1)).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, MAX_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def __call__(self) -> list[float]:
        return timed(self.step)


class Floor:
    """The frozen model's matrix products and attention alone, forward and to the inputs: what a step cannot do without.

    No LoRA, no norms, no elementwise work. The refiner of the picture goes forward only, the caption's is done once;
    nothing in front of the first layer and no modulation needs a gradient.
    """

    def __init__(self, work: Work):
        dtype, dim, inner = DTYPES[work.dtype], CONFIG["dim"], CONFIG["dim"] * 8 // 3
        self.heads, self.dtype = CONFIG["n_heads"], dtype
        self.image = torch.randn(1, work.image_tokens, dim, dtype=dtype)
        self.tokens = torch.randn(1, work.image_tokens + TEXT_TOKENS, dim, dtype=dtype)
        self.time = torch.randn(1, 256, dtype=dtype)
        shapes = {"adaLN": (4 * dim, 256), "qkv": (3 * dim, dim), "out": (dim, dim)}
        shapes |= {"w1": (inner, dim), "w3": (inner, dim), "w2": (dim, inner)}
        blocks = CONFIG["n_layers"] + CONFIG["n_refiner_layers"]
        self.weights = [
            {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()} for _ in range(blocks)
        ]

    def attention(self, tokens: torch.Tensor, weights: dict, needs_grad: bool):
        """(q, k and v [1, heads, L, d], what attention makes of them)."""
        qkv = F.linear(tokens, weights["qkv"]).view(*tokens.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        inputs = [one.detach().requires_grad_(needs_grad) for one in qkv]
        return inputs, F.scaled_dot_product_attention(*inputs)

    def forward(self, tokens: torch.Tensor, weights: dict, needs_grad: bool):
        F.linear(self.time, weights["adaLN"])
        kept = self.attention(tokens, weights, needs_grad)
        F.linear(kept[1].detach().transpose(1, 2).flatten(2), weights["out"])
        hidden = F.linear(tokens, weights["w1"])
        F.linear(tokens, weights["w3"])
        F.linear(hidden, weights["w2"])
        return kept

    def backward(self, grad: torch.Tensor, weights: dict, kept, first: bool):
        hidden = grad @ weights["w2"]
        hidden @ weights["w1"], hidden @ weights["w3"]
        inputs, output = kept
        grad_output = (grad @ weights["out"]).view(*grad.shape[:2], self.heads, -1).transpose(1, 2)
        grads = torch.autograd.grad(output, inputs, grad_output)
        if not first:
            torch.stack(grads, 2).transpose(1, 3).flatten(2) @ weights["qkv"]

    def step(self):
        refiners = CONFIG["n_refiner_layers"]
        for weights in self.weights[:refiners]:
            self.forward(self.image, weights, False)
        layers = self.weights[refiners:]
        kept = [self.forward(self.tokens, weights, True) for weights in layers]
        for number in reversed(range(len(layers))):
            self.backward(self.tokens, layers[number], kept[number], number == 0)

    def __call__(self) -> list[float]:
        return timed(self.step)


CONTENDERS: dict[str, Callable[[Work], Turn]] = {
    "ours": Node,
    "loop": Loop,
    "ours_checkpointed": lambda work: Loop(work, checkpointing=True),
    "branch": lambda work: Loop(work, adapter="branch"),
    "batch4": lambda work: Loop(work, batch=4),
    "core_default": Core,
    "core_best": lambda work: Core(work, bypass_mode=True, gradient_checkpointing=False),
    "peft": Peft,
    "peft_checkpointed": lambda work: Peft(work, checkpointing=True),
    "floor": Floor,
}
