"""The trainer's host without ComfyUI: trains on diffusers' Z-Image and draws with diffusers' own scheduler."""

import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import lorafile, lowrank, memory, network, turbo
from ..cache import Cache, Lazy
from ..captions import Captions
from ..dataset import Dataset, Encoded, encoded_shapes, latent_keys
from ..errors import LoraFileError, ModelError
from ..family import Z_IMAGE
from ..lorafile import LoraFile
from ..lowrank import Difference, Factors, Target
from ..memory import Need
from ..recipe import Recipe
from ..roles import Progress, counter, quiet, watched
from . import devices, room
from .diffusers_load import Loaded

log = logging.getLogger("zturbo")

SAMPLES = 64  # numbers of each tensor
STRAIGHT = (
    "There is no de-distill adapter: training straight on turbo soon wears its 8 steps off. Name one with adapter."
)


class DiffusersHost:
    """See `runs.Host`.

    adapter: the de-distill adapter's file and its strength, or None for training straight on the model.
    """

    family = Z_IMAGE
    turbo = True

    def __init__(
        self,
        loaded: Loaded,
        recipe: Recipe,
        device: torch.device,
        adapter: LoraFile | None = None,
        strength: float = 1.0,
        file: str = "",
        cache: Path | None = None,
    ):
        self.recipe, self.loaded, self.device = recipe, loaded, device
        self.dit = loaded.transformer
        self.dtype, self.dtype_note = devices.compute_dtype(recipe.compute.dtype, device)
        self.drawable = targets(self.dit)  # where a LoRA can be drawn with; a run trains those of the layers
        self.targets = targets(self.dit, self.family.trained)
        self.adapter, self.strength, self.file = check(adapter, self.drawable, file), strength, file
        self.sha256 = "" if adapter is None else adapter.sha256
        self.carry("merged" if recipe.compute.adapter == "merged" else "branch")
        self.features: Sequence[torch.Tensor] = []  # one a caption, then one an unrelated prompt
        self.prompts: list[torch.Tensor] = []
        self.cache = Cache(cache if recipe.data.cache else None)
        devices.begin_counting(device)
        self.at_once: int | None = None
        self.recompute(recipe.compute.checkpointing)

    def carry(self, way: str):
        """See `runs.Host.carry`."""
        self.way = way if self.adapter and not self.recipe.beside else "branch"

    def recompute(self, wish: bool):
        (self.dit.enable_gradient_checkpointing if wish else self.dit.disable_gradient_checkpointing)()

    def warning(self) -> str:
        """See `runs.Host.warning`."""
        return " ".join(filter(None, (self.dtype_note, "" if self.adapter else STRAIGHT)))

    def describe(self) -> str:
        """See `runs.Host.describe`."""
        promise = devices.promise(self.device, self.recipe.compute.repeat)
        if not self.adapter:
            return f"No de-distill adapter: training straight on the model. {promise}"
        return f"De-distill adapter {self.file} at {self.strength:+g}, carried as {self.way}. {promise}"

    def foresee(self, dataset: Dataset):
        """See `runs.Host.foresee`."""
        pixels = max(width * height for width, height in dataset.buckets())
        picture = memory.tokens(pixels, max(dataset.captions().texts, key=len))
        config, size, numbers = self.dit.config, self.dtype.itemsize, network.count(self.targets, self.recipe.network)
        needs = [
            memory.lora(self.recipe, numbers),
            memory.activations(
                memory.together(self.recipe, picture, picture, 1), config.dim, config.n_layers, size, True
            ),
        ]
        if devices.shares_main_memory(self.device):
            needs.append(memory.copy(self.recipe, numbers))
        else:  # here they lie on the card as a whole
            needs.append(Need("the model", sum(parameter.nbytes for parameter in self.dit.parameters())))
        room.check(self.device, needs, [], 0)

    def digest(self) -> str:
        """See `runs.Host.digest`: by some numbers of each weight."""
        start = self.recipe.network.start and lorafile.read(network.start_file(self.recipe.network.start)).sha256
        total = hashlib.sha256(repr((self.device.type, self.strength, start)).encode())
        named = {
            **self.dit.state_dict(),
            **{f"{name}.{key}": tensor for name, one in self.adapter.items() for key, tensor in one.tensors.items()},
        }
        for name, tensor in sorted(named.items()):
            add(total, name, tensor)
        return total.hexdigest()[:32]

    def adapter_facts(self) -> dict[str, str]:
        """See `runs.Host.adapter_facts`."""
        return (
            {"zturbo.adapter_sha256": self.sha256, "zturbo.adapter_strength": f"{self.strength:g}"}
            if self.adapter
            else {}
        )

    def encode(self, dataset: Dataset, captions: Captions, progress: Progress = quiet) -> Encoded:
        """See `roles.Host.encode`."""
        texts = (*captions.texts, *turbo.texts(self.recipe, dataset.trigger, self.turbo))
        with moved(self.loaded.text_encoder.module, self.device):
            self.encode_texts(texts, counter(progress, len(texts)))
            self.encode_prompts()
        autoencoder, keys = self.loaded.autoencoder, []
        with moved(autoencoder.module, self.device):
            for item in watched(dataset.items, progress):
                name = self._key(autoencoder.module)
                keys.append(latent_keys(self.cache, name, item, dataset.options.flip, self._latent))
        latents = Lazy(len(keys), lambda number: torch.cat([self.cache.read(key) for key in keys[number]]))
        shapes = encoded_shapes(dataset, latents)
        self.cache.tidy()
        log.info("%s", self.cache.report())
        return Encoded(latents, shapes)

    def encode_prompts(self):
        """Of the previews."""
        with moved(self.loaded.text_encoder.module, self.device):
            self.prompts = [self._features(self._need(prompt)) for prompt in self.recipe.previews.prompts]

    def encode_texts(self, texts: Iterable[str], told: Callable[[], None] = lambda: None):
        """Give the texts numbers, in their order from 0. told: called before each."""
        keys = []
        for text in texts:
            told()
            keys.append(self._need(text))
            if len(keys) == 1:
                self._features(keys[0])  # says at once what is wrong with the text encoder
        self.features = Lazy(len(keys), lambda number: self._features(keys[number]))

    def _latent(self, pixels: np.ndarray) -> torch.Tensor:
        return self.loaded.autoencoder.encode(torch.from_numpy(pixels)[None])  # BHWC

    def _need(self, text: str) -> str:
        """Of a text's features in the cache."""
        encoder = self.loaded.text_encoder
        return self.cache.need(("features", self._key(encoder.module), text), lambda: encoder.encode(text))

    def _features(self, key: str) -> torch.Tensor:
        features = self.cache.read(key)
        width = self.dit.config["cap_feat_dim"]
        if features.shape[-1] != width:
            raise ModelError(
                f"The text encoder gives {features.shape[-1]} numbers a token; this Z-Image needs {width}. "
                "Load its own text encoder (Qwen3-4B)."
            )
        return features

    @lru_cache(4)
    def _key(self, module) -> str:
        """Tells text encoders and autoencoders apart, for the cache."""
        import diffusers
        import transformers

        total = hashlib.sha256(repr((diffusers.__version__, transformers.__version__, self.device.type)).encode())
        for name, tensor in sorted(module.state_dict().items()):
            add(total, name, tensor)
        return total.hexdigest()

    def start(self) -> dict[str, Difference] | None:
        """See `roles.Host.start`."""
        name = self.recipe.network.start
        return network.read_start(network.start_file(name), self.targets) if name else None

    def norms(self, targets: list[Target]) -> dict[str, torch.Tensor]:
        """See `roles.Host.norms`."""
        like = torch.zeros(1, dtype=self.dtype)
        linears = fetchers(self.dit)
        return {
            part.name: lowrank.column_norms(None, linears[target.module][1], part.rows, like).cpu()
            for target in targets
            for part in target.parts
        }

    def out_of_memory(self, error: Exception) -> bool:
        """See `roles.Host.out_of_memory`."""
        return isinstance(error, torch.OutOfMemoryError)

    @property
    def frugal(self) -> bool:
        """See `roles.Host.frugal`."""
        return self.dit.is_gradient_checkpointing and memory.one_by_one(self.recipe, self.at_once)

    def told(self) -> list[str]:
        """See `roles.Host.told`."""
        return []

    def save_memory(self) -> str:
        """See `roles.Host.save_memory`."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if not self.dit.is_gradient_checkpointing:
            self.recompute(True)
            return memory.RECOMPUTING
        self.at_once = memory.fewer(self.recipe, self.at_once)
        return memory.at_a_time(self.at_once)

    def memory(self) -> dict[str, float]:
        """See `roles.Host.memory`."""
        return devices.memory_facts(self.device)

    @contextmanager
    def training(self, lora: dict[str, Difference]):
        """See `roles.Host.training`. Leaves no weight and no forward changed."""
        branches: lowrank.Branches = [{}, lora]
        with ExitStack() as stack:
            stack.enter_context(devices.repeatable(self.device, self.recipe.compute.repeat))
            stack.enter_context(moved(self.dit, self.device))
            if self.way == "merged":
                stack.enter_context(merged(self.dit, self.adapter, self.strength))
            strengths = self._strengths()
            stack.enter_context(lowrank.attached(fetchers(self.dit), targets(self.dit), branches))
            self.dit.train()  # what diffusers asks for to recompute; there is no dropout in it
            stack.callback(self.dit.eval)

            def velocity(
                x: torch.Tensor, sigma: torch.Tensor, numbers: tuple[int, ...], factor: float = 1.0
            ) -> torch.Tensor:
                branches[0] = strengths(factor)
                return self._velocity(x, sigma, [self.features[number] for number in numbers])

            yield velocity

    def _strengths(self) -> Callable[[float], dict[str, Factors]]:
        """The branch that brings the adapter to a factor of its strength.

        Beside clean weights it is all of the adapter, beside merged ones the difference.
        """
        there = self.strength if self.way == "merged" else 0.0
        unit = {
            name: replace(one, A=one.A.to(self.device, self.dtype), B=one.B.to(self.device, self.dtype))
            for name, one in self.adapter.items()
        }

        def at(factor: float) -> dict[str, Factors]:
            strength = factor * self.strength - there
            return {name: replace(one, scale=one.scale * strength) for name, one in unit.items()} if strength else {}

        return lru_cache(2)(at)  # on and off; a schedule's strength is another at each step

    def _velocity(self, x: torch.Tensor, sigma: torch.Tensor, captions: list[torch.Tensor]) -> torch.Tensor:
        """v = eps - x0 at x [B, 16, H, W]: diffusers gives -v at time 1 - sigma."""
        pictures = [picture[:, None] for picture in x.to(self.dtype)]
        texts = [caption[0].to(self.device, self.dtype) for caption in captions]
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != self.dit.dtype):
            found = self.dit(pictures, 1 - sigma.float(), texts, return_dict=False)[0]
        return -torch.stack([picture[:, 0] for picture in found]).float()

    def draw(self, state: dict[str, torch.Tensor], progress: Progress = quiet) -> list[np.ndarray]:
        """See `roles.Host.draw`: diffusers' scheduler, the LoRA beside the clean weights.

        The noise is ComfyUI's of the same seed.
        """
        wish = self.recipe.previews
        shape = self.family.latent(1, wish.width, wish.height)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(wish.seed))
        lora = lorafile.on_device(lorafile.parse(state)[0], self.device)
        with torch.no_grad(), moved(self.dit, self.device), lowrank.attached(fetchers(self.dit), self.drawable, [lora]):
            latents = [
                self._sample(noise.to(self.device), prompt, wish.steps) for prompt in watched(self.prompts, progress)
            ]
        with moved(self.loaded.autoencoder.module, self.device):
            return [
                np.clip(255.0 * self.loaded.autoencoder.decode(one)[0].numpy(), 0, 255).astype(np.uint8)
                for one in latents
            ]

    def _sample(self, x: torch.Tensor, caption: torch.Tensor, steps: int) -> torch.Tensor:
        from diffusers import FlowMatchEulerDiscreteScheduler

        scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=self.family.shift)
        scheduler.sigma_min = 0.0  # as diffusers' own Z-Image pipeline has it
        scheduler.set_timesteps(steps + 1, device=self.device)  # its last step goes from 0 to 0
        for time, sigma in zip(scheduler.timesteps[:-1], scheduler.sigmas):
            x = scheduler.step(self._velocity(x, sigma.expand(len(x)), [caption]), time, x, return_dict=False)[0]
        return x


def targets(dit, blocks: tuple[str, ...] = Z_IMAGE.blocks) -> list[Target]:
    """Every Linear of the blocks with the LoRA that lives on it."""
    return [
        lorafile.module_targets(name, module.in_features, module.out_features)
        for name, module in linears(dit).items()
        if name.startswith(blocks)
    ]


def linears(dit) -> dict[str, torch.nn.Linear]:
    return {name: module for name, module in dit.named_modules() if isinstance(module, torch.nn.Linear)}


def fetchers(dit) -> dict[str, tuple[torch.nn.Linear, lowrank.Fetch]]:
    """Name -> (Linear, fetch), for the Linears of the blocks."""
    return {name: (module, fetcher(module)) for name, module in linears(dit).items() if name.startswith(Z_IMAGE.blocks)}


def fetcher(module: torch.nn.Linear) -> lowrank.Fetch:
    @contextmanager
    def fetch(x: torch.Tensor):
        yield module.weight.to(x.dtype), None if module.bias is None else module.bias.to(x.dtype)

    return fetch


def check(adapter: LoraFile | None, places: list[Target], file: str) -> dict[str, Factors]:
    """The adapter's factors. Raises LoraFileError unless every key has its place in the model, as plain LoRA."""
    if adapter is None:
        return {}
    lorafile.need_all(adapter.factors, list(adapter.leftover), file)
    lorafile.check_fit(adapter.factors, places, file)
    plain = lowrank.plain(adapter.factors)
    if len(plain) < len(adapter.factors):
        raise LoraFileError(
            f"{file} is no plain LoRA (it has DoRA, LoKr or LoHa parts). "
            "The de-distill adapter is one: choose its file."
        )
    return plain


@contextmanager
def merged(dit, factors: dict[str, Factors], strength: float):
    """The adapter in the weights while the context lasts; then the weights of before, bit for bit."""
    there = linears(dit)
    before = {name: there[name].weight.detach().clone().cpu() for name in factors}
    try:
        with torch.no_grad():
            for name, one in factors.items():
                weight = there[name].weight
                weight.copy_(weight.float() + strength * one.delta().to(weight.device))
        yield
    finally:
        with torch.no_grad():
            for name, weight in before.items():
                there[name].weight.copy_(weight)


@contextmanager
def moved(module: torch.nn.Module, device: torch.device):
    """On the device while the context lasts; then on the CPU again, where that is another."""
    module.to(device)
    try:
        yield
    finally:
        if device.type != "cpu":
            module.to("cpu")


def add(total, name: str, tensor: torch.Tensor):
    total.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
    numbers = tensor.detach().reshape(-1)
    total.update(numbers[:: max(1, numbers.numel() // SAMPLES)][:SAMPLES].float().cpu().numpy().tobytes())
