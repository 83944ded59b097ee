"""The trainer's host inside ComfyUI: it trains on the MODEL that came in, in this process.

It draws with core's sampler.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import comfy.model_management
import comfy.ops
import comfy.quant_ops
import numpy as np
import torch

from .. import lorafile, lowrank, memory, network, turbo
from ..cache import Cache, Lazy
from ..captions import Captions
from ..dataset import Dataset, Encoded, encoded_shapes, latent_keys
from ..errors import ModelError
from ..family import Z_IMAGE
from ..lowrank import Difference, Factors, Target
from ..recipe import Recipe
from ..roles import Progress, counter, quiet, watched
from . import (
    comfy_adapter,
    comfy_added,
    comfy_cache,
    comfy_draw,
    comfy_forward,
    comfy_lend,
    comfy_memory,
    comfy_needs,
    comfy_steps,
    devices,
)
from .comfy_mode import core_mode

log = logging.getLogger("zturbo")
REFINED = 2**30  # bytes of captions as the layers see them, of which the newest stay
FULL = (torch.float32, torch.bfloat16, torch.float16)
STRAIGHT = (
    "There is no de-distill adapter on the model: training straight on turbo soon wears its 8 steps off. "
    "Put De-Distill Adapter (+1) in front, or connect the turbo model as preview_model if this one is undistilled."
)
NO_SCHEDULE = "The adapter schedule has no effect: there is no adapter on the model."


class ComfyHost:
    """See `runs.Host`. The MODELs that come in are never changed: work is done on clones, and weights are put back.

    cache: folder of encoded latents and texts. lora_file: where the LoRA to start from lies, by its name.
    """

    family = Z_IMAGE

    def __init__(
        self,
        model,
        clip,
        vae,
        recipe: Recipe,
        preview_model=None,
        cache: Path | None = None,
        lora_file: Callable[[str], Path] = network.start_file,
    ):
        self.recipe, self.lora_file = recipe, lora_file
        self.clip, self.vae = clip, vae
        self.others = [one.patcher for one in (clip, vae) if one is not None]
        self.dit = comfy_adapter.diffusion_model(model)
        comfy_added.refuse(model, "training")
        comfy_added.refuse_hooks(clip)
        self.device = model.load_device
        self.dtype, self.dtype_note = devices.compute_dtype(recipe.compute.dtype, self.device)
        # where a LoRA can be drawn with; a run trains those of the layers
        self.drawable = comfy_adapter.targets(self.dit, ("",))
        self.targets = comfy_adapter.targets(self.dit, self.family.trained)
        self.tag = comfy_adapter.carried(model)
        self.given = model
        self.carry(choose_way(model, "branch" if recipe.beside else recipe.compute.adapter))
        self.straight = preview_model is None and (self.tag is None or self.tag.net == 0)
        self.preview_model = comfy_adapter.clean(model if preview_model is None else preview_model)
        comfy_adapter.diffusion_model(self.preview_model)
        self.turbo = preview_model is None or comfy_adapter.alike(self.preview_model, comfy_adapter.clean(model))
        self.features: Sequence[torch.Tensor] = []  # one a caption, then one an unrelated prompt
        self.longest = 0  # tokens of them
        # `features` as the layers see them, with and without the adapter, once they were needed
        self.captions: dict[tuple[int, float], torch.Tensor] = {}
        self.refined = 0  # bytes of them
        self.image_tokens = 0  # of the largest picture
        self.cache = Cache(cache if recipe.data.cache else None)
        # layers that keep everything for their backward; None: as many as fit
        self.whole = None if recipe.compute.keep_layers < 0 else recipe.compute.keep_layers
        if not recipe.compute.checkpointing:
            self.whole = len(self.dit.layers)
        self.at_once: int | None = None  # `Steps.decide` does, where no checkpoint says it
        self.steps = comfy_steps.Steps(self)
        self.prompts: list = []
        devices.begin_counting(self.device)

    def carry(self, way: str):
        """Carry the adapter as a branch, or merged into the weights."""
        self.way = way
        self.model = comfy_adapter.without_adapter(self.given) if way == "branch" else self.given.clone()

    def warning(self) -> str:
        """What about the wiring is probably not meant, or nothing."""
        return " ".join(filter(None, (self.dtype_note, self._wiring(), comfy_added.steering(self.given))))

    def _wiring(self) -> str:
        if self.straight:
            return STRAIGHT
        return NO_SCHEDULE if self.tag is None and self.recipe.adapter.changes else ""

    def digest(self) -> str:
        """Tells models apart at a glance.

        By some numbers of each weight, by the adapter, by what else is patched on, and by the LoRA to start from.
        """
        carried = None if self.tag is None else (self.tag.sha256, self.tag.net)
        dtypes = [str(module.weight.dtype) for module in comfy_adapter.linears(self.dit).values()]
        start = "" if not self.recipe.network.start else lorafile.read(self.lora_file(self.recipe.network.start)).sha256
        return comfy_cache.fingerprint(comfy_adapter.without_adapter(self.given), (carried, dtypes, start))[:32]

    def describe(self) -> str:
        """One line for the log: what training runs on."""
        course, promise = self.recipe.adapter, devices.promise(self.device, self.recipe.compute.repeat)
        if self.tag is None or self.tag.net == 0:
            return f"No de-distill adapter on the model: training straight on it. {promise}"
        fades = f", times {course.start:g} at the first step and {course.end:g} at the last" if course.changes else ""
        return f"De-distill adapter {self.tag.file} at {self.tag.net:+g}{fades}, carried as {self.way}. {promise}"

    def adapter_facts(self) -> dict[str, str]:
        """See `runs.Host.adapter_facts`."""
        if self.tag is None:
            return {}
        return {"zturbo.adapter_sha256": self.tag.sha256, "zturbo.adapter_strength": f"{self.tag.net:g}"}

    def encode(self, dataset: Dataset, captions: Captions, progress: Progress = quiet) -> Encoded:
        """See `roles.Host.encode`."""
        texts = (*captions.texts, *turbo.texts(self.recipe, dataset.trigger, self.turbo))
        self.encode_texts(texts, counter(progress, len(texts)))
        self.encode_prompts()
        autoencoder, keys = comfy_cache.of_vae(self.vae), []
        for item in watched(dataset.items, progress):
            keys.append(latent_keys(self.cache, autoencoder, item, dataset.options.flip, self._latent))
        latents = Lazy(len(keys), lambda number: self._views(keys[number]))
        shapes = encoded_shapes(dataset, latents)
        self.cache.tidy()
        log.info("%s", self.cache.report())
        watched_area = (self.recipe.turbo.size // self.family.reduction) ** 2
        area = max(watched_area, *(shape[2] * shape[3] for shape in set(shapes)))
        self.image_tokens = area // self.dit.patch_size**2
        return Encoded(latents, shapes)

    def encode_prompts(self):
        """Of the previews."""
        with core_mode():
            self.prompts = [comfy_draw.encode_prompt(self.clip, prompt) for prompt in self.recipe.previews.prompts]

    def encode_texts(self, texts: Iterable[str], told: Callable[[], None] = lambda: None):
        """Give the texts numbers, in their order from 0. told: called before each."""
        self.captions, self.refined, keys = {}, 0, []
        text_encoder = comfy_cache.of_clip(self.clip)
        for text in texts:
            told()
            keys.append(self.cache.need(("features", text_encoder, text), partial(self._encoded, text)))
            if len(keys) == 1:
                self._features(keys[0])  # says at once what is wrong with the text encoder
        self.features = Lazy(len(keys), lambda number: self._features(keys[number]))
        self.longest = self._features(max(keys, key=self.cache.size_of)).shape[1]

    def _views(self, keys: tuple[str, ...]) -> torch.Tensor:
        latents = [self.cache.read(key) for key in keys]
        if latents[0].shape[0] != self.dit.in_channels:
            given, needed = latents[0].shape[0], self.dit.in_channels
            raise ModelError(
                f"The VAE gives {given} channels; Z-Image needs {needed}. Load Z-Image's VAE (ae.safetensors)."
            )
        return self.model.model.process_latent_in(torch.stack(latents)).float()

    def _latent(self, pixels: np.ndarray) -> torch.Tensor:
        with core_mode():
            return self.vae.encode(torch.from_numpy(pixels)[None])[0]

    def _features(self, key: str) -> torch.Tensor:
        features = self.cache.read(key)
        width = self.dit.cap_embedder[1].in_features
        if features.shape[-1] != width:
            raise ModelError(
                f"The text encoder gives {features.shape[-1]} numbers a token; this Z-Image needs {width}. "
                "Load its own text encoder (qwen_3_4b.safetensors)."
            )
        return features.float()

    def _encoded(self, text: str) -> torch.Tensor:
        with core_mode():
            return comfy_draw.encode_prompt(self.clip, text)[0][0]

    def start(self) -> dict[str, Difference] | None:
        """See `roles.Host.start`."""
        name = self.recipe.network.start
        return network.read_start(self.lora_file(name), self.targets) if name else None

    def norms(self, targets: list[Target]) -> dict[str, torch.Tensor]:
        """See `roles.Host.norms`."""
        like = torch.zeros(1, device=self.device, dtype=self.dtype)
        with self._loaded(0) as linears:
            return {
                part.name: lowrank.column_norms(None, linears[target.module][1], part.rows, like).cpu()
                for target in targets
                for part in target.parts
            }

    def out_of_memory(self, error: Exception) -> bool:
        """See `roles.Host.out_of_memory`."""
        return comfy.model_management.is_oom(error)

    @property
    def frugal(self) -> bool:
        """See `roles.Host.frugal`."""
        return self.steps.recomputes and memory.one_by_one(self.recipe, self.at_once)

    def told(self) -> list[str]:
        """See `roles.Host.told`."""
        return self.steps.told()

    def save_memory(self) -> str:
        """See `roles.Host.save_memory`."""
        comfy.model_management.soft_empty_cache()
        if not self.steps.recomputes:
            self.whole = 0
            return memory.RECOMPUTING
        self.at_once = memory.fewer(self.recipe, self.at_once)
        return memory.at_a_time(self.at_once)

    def memory(self) -> dict[str, float]:
        """See `roles.Host.memory`."""
        return devices.memory_facts(self.device)

    @contextmanager
    def training(self, lora: dict[str, Difference]):
        """See `roles.Host.training`. The model is loaded through ComfyUI's memory manager.

        No weight, forward or flag is left changed.
        """
        branches: lowrank.Branches = [{}, lora]
        strengths = self._strengths()
        before = comfy.model_management.in_training
        with ExitStack() as stack:
            self.steps.decide(lora)
            linears = stack.enter_context(self._loaded(self.steps.room(lora)))
            stack.callback(setattr, comfy.model_management, "in_training", before)
            comfy.model_management.in_training = True
            stack.enter_context(devices.repeatable(self.device, self.recipe.compute.repeat))
            branches[0] = strengths(1.0)
            stack.enter_context(lowrank.attached(linears, comfy_adapter.targets(self.dit), branches))
            stack.enter_context(comfy_lend.normal_norms(self.dit))
            stack.callback(self.steps.end)
            self.steps.begin(linears, lora)

            def velocity(
                x: torch.Tensor, sigma: torch.Tensor, numbers: tuple[int, ...], factor: float = 1.0
            ) -> torch.Tensor:
                branches[0] = strengths(factor)
                return self._velocity(x, sigma, numbers, branches[0], self._captions(numbers, factor))

            yield velocity

    def tokens(self, at_once: int | None) -> int:
        """That go through the model together, of the largest picture and the longest caption. at_once: pictures."""
        caption = memory.padded(self.longest or max(features.shape[1] for features in self.features))
        guarded = memory.padded((self.recipe.turbo.size or turbo.LARGEST) ** 2 // self.family.grain**2)
        return memory.together(self.recipe, caption + memory.padded(self.image_tokens), caption + guarded, at_once)

    def _strengths(self) -> Callable[[float], dict[str, Factors]]:
        """The branch that brings the adapter to a factor of its strength.

        Beside clean weights it is all of the adapter, beside merged ones the difference.
        """
        tag = self.tag
        if tag is None:
            nothing: dict[str, Factors] = {}
            return lambda factor: nothing
        there = tag.baked if self.way == "branch" else tag.net
        unit: dict[str, Factors] = {}

        def at(factor: float) -> dict[str, Factors]:
            strength = factor * tag.net - there
            if strength and not unit:
                unit.update(scaled(tag.factors, 1.0, self.device, self.dtype))
            return {name: replace(one, scale=one.scale * strength) for name, one in unit.items()} if strength else {}

        return lru_cache(2)(at)  # on and off; a schedule's strength is another at each step

    def _captions(self, numbers: tuple[int, ...], factor: float) -> dict[int, torch.Tensor]:
        """Refined captions at a factor on the adapter, which may reach into their refiner."""
        reaches = self.tag is not None and any(name.startswith("context_refiner.") for name in self.tag.factors)
        place = factor if reaches else 1.0
        found = self.captions if place in (0.0, 1.0) else {}
        for number in set(numbers):
            if (number, place) not in found:
                with torch.no_grad():
                    found[number, place] = self._refined(number)
                self.refined += found[number, place].nbytes if found is self.captions else 0
        chosen = {number: found[number, place] for number in set(numbers)}
        while self.refined > REFINED:
            self.refined -= self.captions.pop(next(iter(self.captions))).nbytes
        return chosen

    @contextmanager
    def _loaded(self, beside: int):
        """While open the model is loaded, and text encoder and VAE are not: {name: (Linear, fetch)}.

        beside: bytes to keep free beside the weights.
        """
        with ExitStack() as stack:
            with core_mode():
                for other in self.others:
                    comfy.model_management.unload_model_and_clones(other)
                stack.callback(release, self.model)
                comfy.model_management.load_models_gpu([self.model], memory_required=beside)
            yield comfy_lend.fetchers(self.dit)

    def _refined(self, number: int) -> torch.Tensor:
        return comfy_forward.refine_caption(self.dit, self.features[number].to(self.device, self.dtype)).cpu()

    def _velocity(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        numbers: tuple[int, ...],
        adapter: dict[str, Factors],
        captions: dict[int, torch.Tensor],
    ) -> torch.Tensor:
        """Captions of other lengths go through apart: NextDiT has no caption mask."""
        by_length: dict[int, list[int]] = {}
        for row, number in enumerate(numbers):
            by_length.setdefault(captions[number].shape[1], []).append(row)
        outputs, order = [], []
        for rows in by_length.values():
            caption = torch.cat([captions[numbers[row]] for row in rows]).to(self.device)
            some = slice(None) if len(by_length) == 1 else rows
            some_x = x[some].to(self.dtype)
            outputs.append(self.steps.velocity(some_x, sigma[some].float(), caption, adapter).float())
            order += rows
        return (
            outputs[0] if len(outputs) == 1 else torch.cat(outputs)[torch.argsort(torch.tensor(order)).to(self.device)]
        )

    def foresee(self, dataset: Dataset):
        """See `runs.Host.foresee`."""
        for other in self.others:
            comfy_memory.to_file(other)
        comfy_needs.foresee(self, dataset)

    def draw(self, state: dict[str, torch.Tensor], progress: Progress = quiet) -> list[np.ndarray]:
        """See `roles.Host.draw`."""
        previews = self.recipe.previews
        with core_mode(), ExitStack() as stack:
            model = comfy_draw.with_lora(self.preview_model, state)
            stack.callback(release, model)
            how = comfy_draw.Drawing(previews.width, previews.height, previews.steps, previews.seed, previews.sampler)
            drawn = comfy_draw.draw(model, self.vae, watched(self.prompts, progress), how)
            return [comfy_draw.to_bytes(image) for image in drawn]


def choose_way(model, wish: str) -> str:
    """How the adapter is carried in training: what the recipe says, or by the weights' dtype and free memory."""
    tag = comfy_adapter.carried(model)
    if tag is None or tag.strength == 0:
        return "merged"  # nothing to carry
    if wish != "auto":
        return wish
    weights = [
        module.weight for module in comfy_adapter.linears(comfy_adapter.diffusion_model(model), Z_IMAGE.blocks).values()
    ]
    if any(weight.dtype not in FULL or isinstance(weight, comfy.quant_ops.QuantizedTensor) for weight in weights):
        return "branch"  # exact: quantised weights would round the adapter away
    if 1.25 * model.model_size() > comfy.model_management.get_total_memory(model.load_device):
        return "branch"  # weights that come and go would be patched anew at each use
    backup = sum(weight.nbytes for weight in weights)  # patching keeps the clean weights aside
    return "merged" if comfy.model_management.get_free_memory(torch.device("cpu")) > 2 * backup else "branch"


def scaled(factors: dict[str, Factors], strength: float, device, dtype) -> dict[str, Factors]:
    """The adapter's factors at a strength, frozen, on the device in compute dtype."""
    return {
        name: Factors(f.A.to(device, dtype, copy=True), f.B.to(device, dtype, copy=True), f.scale * strength)
        for name, f in factors.items()
    }


def release(model):
    """Take a MODEL and its clones off the device and put the clean weights back."""
    with core_mode():
        comfy.model_management.unload_model_and_clones(model)
        if model.model.current_weight_patches_uuid is not None:
            model.unpatch_model(model.offload_device)
