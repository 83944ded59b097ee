"""Parts that time one forward and backward: the pack, diffusers with PEFT, core's TrainLoraNode, on the same work."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import comfy.model_management
import comfy.utils
import torch

from bench.gpu_files import RANK
from bench.gpu_place import GB, TOKENS, Place, spread
from zturbo import lowrank, network
from zturbo.hosts import comfy_adapter

Step = Callable[[int], None]  # takes the side of the picture in pixels
WARM = 2
CORE_STEPS = 8
KEPT = 30e9  # bytes that a step at 1024 keeps for its backward without checkpointing, roughly
PEFT_TARGETS = r"layers\.\d+\..*(to_q|to_k|to_v|to_out\.0|w1|w2|w3|adaLN_modulation\.0)"
TWIN = (
    "in_channels", "dim", "n_layers", "n_refiner_layers", "n_heads", "n_kv_heads", "qk_norm", "cap_feat_dim",
    "rope_theta", "axes_dims", "axes_lens",
)  # fmt: skip


@contextmanager
def ours(place: Place, dtype: str, way: str, checkpointing: bool, number: int = 0) -> Iterator[Step]:
    """A step of the pack. Features are set by hand, so that speed does not hang on the text encoder."""
    host = place.host(place.recipe(way, checkpointing), dtype, number)
    host.features = [torch.randn(1, TOKENS, place.config()["cap_feat_dim"])]
    host.image_tokens = (place.sides[-1] // 16) ** 2
    lora = network.create(host.targets, host.recipe.network, 0, place.device)
    with host.training(lora) as velocity:
        parameters = lowrank.parameters(lora)

        def step(side: int):
            x, sigma = torch.randn(1, 16, side // 8, side // 8, device=place.device), torch.rand(1, device=place.device)
            velocity(x, sigma, (0,)).square().mean().backward()
            for parameter in parameters:
                parameter.grad = None

        step.room = room(host)
        step.parameters = parameters
        yield step


def room(host) -> dict[str, float]:
    """What the host plans for the activations of a step, which is more for the largest picture."""
    steps = getattr(host, "steps", None)
    return {} if steps is None or steps.keeping is None else {"planned_gb": round(steps.keeping.bytes / GB, 2)}


@contextmanager
def peft(place: Place, checkpointing: bool) -> Iterator[Step]:
    """A step of diffusers' Z-Image with PEFT under autocast, random weights."""
    twin = build_twin(place)
    parameters = [parameter for parameter in twin.parameters() if parameter.requires_grad]
    if checkpointing:
        twin.train()
        twin.enable_gradient_checkpointing()

    def step(side: int):
        options = {"device": place.device, "dtype": place.dtype}
        x, sigma = torch.randn(16, 1, side // 8, side // 8, **options), torch.rand(1, device=place.device)
        caption = torch.randn(TOKENS, place.config()["cap_feat_dim"], **options)
        with torch.autocast(place.device.type, torch.bfloat16, enabled=place.card):
            out = twin([x], sigma, [caption], return_dict=False)[0][0]
        out.float().square().mean().backward()
        for parameter in parameters:
            parameter.grad = None

    yield step


def build_twin(place: Place):
    from diffusers import ZImageTransformer2DModel
    from peft import LoraConfig

    config = place.config()
    before = torch.get_default_dtype()
    torch.set_default_dtype(place.dtype)
    try:
        with torch.device(place.device):
            twin = ZImageTransformer2DModel(**{name: config[name] for name in TWIN}, t_scale=config["time_scale"])
    finally:
        torch.set_default_dtype(before)
    twin.requires_grad_(False)
    twin.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=PEFT_TARGETS))
    for parameter in twin.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return twin


@dataclass
class Rate:
    """What the arithmetic of a step would take at the device's measured rate."""

    flops: float  # of bf16 matrix products, a second
    weights: int  # in matrices of the layers that see every token

    def share(self, side: int, checkpointing: bool, seconds: float) -> float:
        """Forward and the backward to x; with checkpointing forward twice. Attention is not counted."""
        tokens = (side // 16) ** 2 + TOKENS
        return round(2 * self.weights * tokens * (3 if checkpointing else 2) / seconds / self.flops, 3)


def rate(place: Place) -> Rate:
    rows, inner, columns = (4224, 3840, 10240) if place.card else (256, 256, 256)
    a, b = (torch.randn(shape, device=place.device, dtype=place.dtype) for shape in ((rows, inner), (inner, columns)))
    times = [place.seconds(lambda: [a @ b for _ in range(20)]) / 20 for _ in range(WARM + place.rounds)][WARM:]
    flops = 2 * rows * inner * columns / statistics.median(times)
    place.note("matmul_tflops", round(flops / 1e12, 3))
    layers = comfy_adapter.targets(place.model().model.diffusion_model, ("layers.",))
    return Rate(flops, sum(t.in_features * t.out_features for t in layers if "adaLN" not in t.module))


class Race:
    """Contenders that are in memory together and take turns, or stand there alone one after another."""

    def __init__(self, place: Place, contenders: dict[str, Callable], together: bool):
        self.place, self.contenders, self.together = place, contenders, together
        self.times: dict[tuple[str, int], list[float]] = {}
        self.memory: dict[tuple[str, int], dict] = {}
        self.failed: dict[tuple[str, int], str] = {}

    def run(self):
        with ExitStack() as stack:
            steps: dict[str, Step] = {}
            for name in self.contenders:
                try:
                    steps[name] = self.enter(name, stack)
                except Exception as error:
                    self.fail(name, self.place.sides, error)
                if not self.together:
                    self.rounds(steps)
                    steps = {}
                    stack.close()
                    self.place.sweep()
            self.rounds(steps)
        self.place.sweep()

    def fail(self, name: str, sides, error: Exception):
        said = f"{type(error).__name__}: {str(error)[:300]}"
        self.failed.update({(name, side): said for side in sides if (name, side) not in self.failed})

    def enter(self, name: str, stack: ExitStack) -> Step:
        """Warm up, each side with its own memory: what PyTorch allocates for a step, and the card for all of it."""
        self.place.sweep()
        others = self.place.card_gb()
        step = stack.enter_context(self.contenders[name]())
        for side in self.place.sides:
            self.place.sweep()
            kept = torch.cuda.memory_allocated(self.place.device) / GB if self.place.card else 0.0
            try:
                with self.place.memory() as memory:
                    for _ in range(WARM):
                        self.place.seconds(partial(step, side))
            except Exception as error:
                self.fail(name, (side,), error)
                continue
            own = {"step_gb": memory.get("torch_gb", 0.0) - kept, "own_gb": memory["card_gb"] - others}
            own = {word: round(value, 2) for word, value in own.items()}
            self.memory[name, side] = {**own, **memory, **getattr(step, "room", {})}
        return step

    def rounds(self, steps: dict[str, Step]):
        """In turn, side by side; at least one round, however little time is left."""
        for side in self.place.sides:
            racing = {name: step for name, step in steps.items() if (name, side) not in self.failed}
            for turn in range(self.place.rounds):
                if turn and time.monotonic() > self.place.until:
                    break
                for name, step in racing.items():
                    self.times.setdefault((name, side), []).append(self.place.seconds(partial(step, side)))

    def facts(self, side: int, checkpointing: bool, limit: Rate) -> dict:
        """By contender; ratios are those of the same round."""
        found: dict = {"order": "in turn, a step of each" if self.together else "one after another"}
        for name in self.contenders:
            times = self.times.get((name, side))
            if times is None:
                found[name] = {"failed": self.failed.get((name, side), "not measured")}
                continue
            found[name] = {"s": spread(times), **self.memory.get((name, side), {})}
            found[name]["share_of_matmul_rate"] = limit.share(side, checkpointing, statistics.median(times))
            peer = self.times.get(("diffusers_peft", side))
            if peer and name != "diffusers_peft":
                found[name]["ratio_to_diffusers_peft"] = spread([a / b for a, b in zip(times, peer)], 3)
        return found


def fits_together(place: Place, dtype: str, contenders: int) -> bool:
    """All models, and what the largest step keeps."""
    total = comfy.model_management.get_total_memory(place.device)
    return place.tiny or total > contenders * place.model(dtype).model_size() + KEPT


def race(place: Place, dtype: str, peer: bool):
    limit = rate(place)
    place.note("weights", str(place.model(dtype).model_dtype()))
    for checkpointing in (True, False):
        word = "checkpointing" if checkpointing else "without_checkpointing"
        if place.left(8 if place.card else 2, word):
            contenders = contend(place, dtype, checkpointing, peer)
            running = Race(place, contenders, fits_together(place, dtype, len(contenders)))
            running.run()
            for side in place.sides:
                place.note(f"{side}.{word}", running.facts(side, checkpointing, limit))


def contend(place: Place, dtype: str, checkpointing: bool, peer: bool) -> dict[str, Callable]:
    """Ways to open a step, by name. Each of ours has a model of its own, since merging changes the weights."""
    found: dict[str, Callable] = {
        "merged": partial(ours, place, dtype, "merged", checkpointing, 0),
        "branch": partial(ours, place, dtype, "branch", checkpointing, 1),
    }
    return {**found, "diffusers_peft": partial(peft, place, checkpointing)} if peer else found


def speed(place: Place):
    """bf16: the pack both ways and diffusers with PEFT, with and without checkpointing, at every side."""
    race(place, "bf16", peer=True)


def fp8(place: Place):
    """The same on float8_e4m3fn weights."""
    race(place, "fp8", peer=False)


def one(place: Place, key: str, dtype: str, way: str, checkpointing: bool, side: int, optimizer: bool = False) -> None:
    """A fact on one kind of step, alone in memory."""
    times = []
    with place.memory() as memory, ours(place, dtype, way, checkpointing) as step:
        adam = torch.optim.AdamW(step.parameters) if optimizer else None
        for turn in range(WARM + 3):
            seconds = place.seconds(lambda: whole_step(step, side, adam))
            if turn >= WARM:
                times.append(seconds)
    place.note(key, {"trains": True, "s": spread(times), **memory, **step.room})


def whole_step(step: Step, side: int, adam):
    step(side)
    if adam is not None:
        adam.step()


def core(place: Place):
    """Core's TrainLoraNode, plain and in bypass mode; its steps hold one of AdamW, and it is alone in memory."""
    place.note("order", "one after another, after the part speed; each step with its AdamW step")
    for side in reversed(place.sides):
        for bypass in (False, True):
            key = f"{side}.{'bypass' if bypass else 'plain'}"
            if place.left(6 if place.card else 1, key):
                with place.attempt(key):
                    place.note(key, core_steps(place, side, bypass))
                place.rest()


def core_steps(place: Place, side: int, bypass: bool) -> dict:
    from comfy_extras.nodes_train import TrainLoraNode

    ticks: list[tuple[int, float]] = []
    before = comfy.utils.PROGRESS_BAR_HOOK
    comfy.utils.set_progress_bar_global_hook(lambda value, *_, **__: ticks.append((value, time.perf_counter())))
    try:
        with place.memory() as memory, torch.inference_mode():
            TrainLoraNode.execute(**{name: [value] for name, value in core_inputs(place, side, bypass).items()})
    finally:
        comfy.utils.set_progress_bar_global_hook(before)
    late = [tick for tick in ticks if tick[0] > WARM]  # ComfyUI leaves ticks out that come soon after another
    gaps = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in zip(late, late[1:])]
    return {"s": spread(gaps), **memory}


def core_inputs(place: Place, side: int, bypass: bool) -> dict:
    """Of the node: rank 16, batch 1, checkpointing."""
    caption = torch.randn(1, TOKENS, place.config()["cap_feat_dim"])
    fixed = {"batch_size": 1, "steps": CORE_STEPS, "grad_accumulation_steps": 1, "learning_rate": 1e-4, "rank": RANK}
    fixed |= {"optimizer": "AdamW", "loss_function": "MSE", "seed": 0}
    fixed |= {"training_dtype": place.compute, "lora_dtype": place.compute}
    fixed |= {"quantized_backward": False, "algorithm": "LoRA", "gradient_checkpointing": True, "checkpoint_depth": 1}
    fixed |= {"offloading": False, "existing_lora": "[None]", "bucket_mode": False, "bypass_mode": bypass}
    latents = {"samples": torch.randn(1, 16, side // 8, side // 8)}
    return fixed | {"model": place.model(), "latents": latents, "positive": [[caption, {}]]}
