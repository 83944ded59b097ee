"""The trainer's host inside ComfyUI: trains on the MODEL that came in, in this process, and draws with core's sampler."""

import hashlib
import logging
from contextlib import ExitStack, contextmanager

import comfy.model_management
import comfy.ops
import comfy.quant_ops
import numpy as np
import torch
import torch.nn.functional as F
import torch.utils.checkpoint

from .. import lowrank
from ..dataset import Captions, Dataset, Encoded
from ..errors import ModelError
from ..lowrank import Factors
from ..recipe import Recipe
from . import comfy_adapter, comfy_draw, comfy_forward

log = logging.getLogger("zturbo")
COMPUTE = {"bf16": torch.bfloat16, "fp32": torch.float32}
FULL = (torch.float32, torch.bfloat16, torch.float16)


class ComfyHost:
    """See `trainer.Host`. The MODELs that come in are never changed: work is done on clones, and weights are put back."""

    def __init__(self, model, clip, vae, recipe: Recipe, preview_model=None):
        self.recipe = recipe
        self.clip, self.vae = clip, vae
        self.dit = comfy_adapter.diffusion_model(model)
        self.device = model.load_device
        self.dtype = COMPUTE[recipe.compute.dtype]
        self.targets = comfy_adapter.targets(self.dit, ("layers.",))
        self.tag = comfy_adapter.carried(model)
        self.way = choose_way(model, recipe.compute.adapter)
        self.model = comfy_adapter.without_adapter(model) if self.way == "branch" else model.clone()
        self.preview_model = comfy_adapter.clean(model if preview_model is None else preview_model)
        comfy_adapter.diffusion_model(self.preview_model)
        self.features: list[torch.Tensor] = []  # one a caption
        self.captions: list[torch.Tensor] = []  # `features` as the layers see them, once they were needed
        self.image_tokens = 0  # of the largest picture
        self.prompts: list = []

    def digest(self) -> str:
        """Tells models apart at a glance: by dtypes, norms and biases, which no LoRA patches, by the adapter, and by a corner of what else is patched on."""
        carried = None if self.tag is None else (self.tag.sha256, self.tag.net, self.way)
        dtypes = [str(module.weight.dtype) for module in comfy_adapter.linears(self.dit).values()]
        total = hashlib.sha256(repr((carried, dtypes)).encode())
        for key, entries in sorted(self.model.patches.items(), key=lambda item: str(item[0])):
            for strength, patch, *_ in entries:
                total.update(repr((str(key), strength)).encode())
                for tensor in getattr(patch, "weights", ()):
                    if isinstance(tensor, torch.Tensor):
                        total.update(tensor.detach().reshape(-1)[:64].float().cpu().numpy().tobytes())
        for name, parameter in sorted(self.dit.named_parameters()):
            if parameter.ndim == 1:
                total.update(name.encode() + parameter.detach().float().cpu().numpy().tobytes())
        return total.hexdigest()[:32]

    def describe(self) -> str:
        """One line for the log: what training runs on."""
        if self.tag is None or self.tag.net == 0:
            return "No de-distill adapter on the model: training straight on it."
        return f"De-distill adapter {self.tag.file} at {self.tag.net:+g}, carried as {self.way}."

    def encode(self, dataset: Dataset, captions: Captions) -> Encoded:
        """See `trainer.Host.encode`."""
        with torch.no_grad():
            self.features = [self._features(text) for text in captions.texts]
            self.prompts = [comfy_draw.encode_prompt(self.clip, prompt) for prompt in self.recipe.previews.prompts]
            latents = [self._views(item.pixels(), dataset.options.flip) for item in dataset.items]
        self.image_tokens = max(views.shape[2] * views.shape[3] for views in latents) // self.dit.patch_size**2
        block = self.dit.pad_tokens_multiple
        return Encoded(latents, [-(-features.shape[1] // block) * block for features in self.features])

    def _views(self, pixels: np.ndarray, flip: bool) -> torch.Tensor:
        views = [pixels, np.ascontiguousarray(pixels[:, ::-1])] if flip else [pixels]
        return torch.stack([self._latent(view) for view in views])

    def _latent(self, pixels: np.ndarray) -> torch.Tensor:
        latent = self.vae.encode(torch.from_numpy(pixels)[None])
        if latent.shape[1] != self.dit.in_channels:
            raise ModelError(f"The VAE gives {latent.shape[1]} channels; Z-Image needs {self.dit.in_channels}. Load Z-Image's VAE (ae.safetensors).")
        return self.model.model.process_latent_in(latent)[0].float().cpu().clone()

    def _features(self, caption: str) -> torch.Tensor:
        features = comfy_draw.encode_prompt(self.clip, caption)[0][0]
        width = self.dit.cap_embedder[1].in_features
        if features.shape[-1] != width:
            raise ModelError(f"The text encoder gives {features.shape[-1]} numbers a token; this Z-Image needs {width}. Load its own text encoder (qwen_3_4b.safetensors).")
        return features.float().cpu().clone()

    @contextmanager
    def training(self, lora: dict[str, Factors]):
        """See `trainer.Host.training`. Loads through ComfyUI's memory manager; leaves no weight, forward or flag changed."""
        branches = [lora]
        if self.way == "branch" and self.tag is not None and self.tag.strength != 0:
            branches.insert(0, scaled(self.tag.factors, self.tag.strength, self.device, self.dtype))
        before = comfy.model_management.in_training
        with ExitStack() as stack:
            stack.callback(release, self.model)
            comfy.model_management.load_models_gpu([self.model], memory_required=self._room())
            stack.callback(setattr, comfy.model_management, "in_training", before)
            comfy.model_management.in_training = True
            covered = {name: (module, fetcher(module)) for name, module in comfy_adapter.linears(self.dit).items()}
            stack.enter_context(lowrank.attached(covered, comfy_adapter.targets(self.dit), branches))
            stack.enter_context(normal_norms(self.dit))
            if not self.captions:
                with torch.no_grad():
                    self.captions = [comfy_forward.refine_caption(self.dit, f.to(self.device, self.dtype)).cpu() for f in self.features]
            yield self._velocity

    def _velocity(self, x: torch.Tensor, sigma: torch.Tensor, numbers: tuple[int, ...]) -> torch.Tensor:
        caption = torch.cat([self.captions[n] for n in numbers]).to(self.device)
        run_layer = checkpointed if self.recipe.compute.checkpointing else None
        return comfy_forward.velocity(self.dit, x.to(self.dtype), sigma.float(), caption, run_layer).float()

    def _room(self) -> int:
        """Bytes that a step may need beside the weights, so that the memory manager keeps them free. A rough upper guess."""
        tokens = max(f.shape[1] for f in self.features) + self.image_tokens
        layers = 4 if self.recipe.compute.checkpointing else len(self.dit.layers)
        trained = lowrank.parameter_count(self.targets, self.recipe.network.rank)
        return int(self.recipe.batch_size * tokens * self.dit.dim * 2 * 24 * layers) + 16 * trained  # fp32: weight, gradient, two moments

    def draw(self, state: dict[str, torch.Tensor]) -> list[np.ndarray]:
        """See `trainer.Host.draw`."""
        previews = self.recipe.previews
        with torch.inference_mode(), ExitStack() as stack:
            model = comfy_draw.with_lora(self.preview_model, state)
            stack.callback(release, model)
            images = []
            for prompt in self.prompts:
                latents = comfy_draw.sample(model, prompt, previews.width, previews.height, previews.steps, previews.seed, previews.sampler)
                images += [comfy_draw.to_bytes(image) for image in comfy_draw.decode(self.vae, latents)]
        return images


def choose_way(model, wish: str) -> str:
    """How the adapter is carried in training: what the recipe says, or by the weights' dtype and free memory."""
    tag = comfy_adapter.carried(model)
    if tag is None or tag.strength == 0:
        return "merged"  # nothing to carry
    if wish != "auto":
        return wish
    weights = [module.weight for module in comfy_adapter.linears(comfy_adapter.diffusion_model(model), comfy_adapter.BLOCKS).values()]
    if any(weight.dtype not in FULL or isinstance(weight, comfy.quant_ops.QuantizedTensor) for weight in weights):
        return "branch"  # exact: quantised weights would round the adapter away
    if 1.25 * model.model_size() > comfy.model_management.get_total_memory(model.load_device):
        return "branch"  # weights that come and go would be patched anew at each use
    backup = sum(weight.nbytes for weight in weights)  # patching keeps the clean weights aside
    return "merged" if comfy.model_management.get_free_memory(torch.device("cpu")) > 2 * backup else "branch"


def scaled(factors: dict[str, Factors], strength: float, device, dtype) -> dict[str, Factors]:
    """The adapter's factors at a strength, frozen, on the device in compute dtype."""
    return {name: Factors(f.A.to(device, dtype, copy=True), f.B.to(device, dtype, copy=True), f.scale * strength) for name, f in factors.items()}


def fetcher(module: torch.nn.Module) -> lowrank.Fetch:
    """Lends weight and bias of a Linear or norm as its own forward would get them: moved, cast, dequantised, patched."""

    own = getattr(module, "cast_bias_weight", None)  # the GGUF loaders' Linears bring one

    @contextmanager
    def fetch(x: torch.Tensor):
        if own is not None:
            yield own(x)[:2]
        elif not hasattr(module, "weight_function"):
            yield module.weight.to(x.dtype), None if module.bias is None else module.bias.to(x.dtype)
        else:
            with comfy.ops.CastBiasWeightContext(module, x, offloadable=True) as (weight, bias):
                if isinstance(weight, comfy.quant_ops.QuantizedTensor):
                    weight = weight.dequantize().to(x.dtype)
                smoothing = getattr(module, "pre_quant_scale", None)  # core multiplies the input by it; here the columns are
                yield (weight if smoothing is None else weight * smoothing.to(weight)), bias

    return fetch


def normal_norms(dit):
    """RMSNorms that autograd can save, while the context lasts: weights made under inference mode are copied at each use (they are small)."""
    return lowrank.covered((module, _norm_forward(module, fetcher(module))) for module in dit.modules() if isinstance(module, torch.nn.RMSNorm))


def _norm_forward(module, fetch):
    def forward(x: torch.Tensor) -> torch.Tensor:
        with fetch(x) as (weight, _):
            return F.rms_norm(x, module.normalized_shape, weight.clone(), module.eps)

    return forward


def checkpointed(layer, *args, **options):
    """Run a layer, keep only its input, and run it again in backward."""
    return torch.utils.checkpoint.checkpoint(layer, *args, use_reentrant=False, preserve_rng_state=False, **options)


def release(model):
    """Take a MODEL and its clones off the device and put the clean weights back."""
    comfy.model_management.unload_model_and_clones(model)
    if model.model.current_weight_patches_uuid is not None:
        model.unpatch_model(model.offload_device)
