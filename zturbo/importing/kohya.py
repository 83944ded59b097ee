"""The TOML of kohya's programs: musubi-tuner (github.com/kohya-ss/musubi-tuner at 30c658c), sd-scripts (at 48d368f).

Sections of a training file count for nothing there, so they are laid together here. Names and defaults are those of
musubi-tuner's `training/parser_common.py`, where sd-scripts has no others.
"""

import math
from collections.abc import Mapping
from pathlib import Path

from ..errors import ZTurboError
from . import kohya_sets, reasons, sets, shared
from .kohya_prompts import read_prompts
from .record import LEFT, OFF, TAKEN, Line, Moved, Theirs, brief
from .sets import PictureSet
from .toolkit import DTYPES, looks_like_z_image

ANY_MODEL = ("lycoris.kohya", "networks.loha", "networks.lokr")
OF_OTHERS = {"networks.lora": "Stable Diffusion in sd-scripts, HunyuanVideo in musubi-tuner"}
MODELS = ("dit", "pretrained_model_name_or_path")
FOREIGN_NAMES = (
    "flux",
    "sdxl",
    "sd_xl",
    "sd3",
    "wan2",
    "wan_2",
    "qwen",
    "hunyuan",
    "framepack",
    "lumina",
    "stable-diff",
)
FOREIGN_KEYS = ("clip_l", "clip_g", "t5xxl", "t5", "task", "text_encoder1", "v_parameterization", "v2", "gemma2")
SHIFT = 3.0  # of the density of that name
ALGORITHMS = {"lora": "lora", "locon": "lora", "loha": "loha", "lokr": "lokr"}
MUSUBI_PARTS = "attention, feed_forward"  # it trains no modulation
SCHEDULES = {
    "constant": "constant",
    "constant_with_warmup": "constant",
    "linear": "linear",
    "cosine": "cosine",
    "cosine_with_restarts": "cosine_restarts",
}


def is_training(values: Mapping) -> bool:
    flat = together(values)
    return any(key in flat for key in ("network_module", "network_dim", "dataset_config", "train_data_dir", "dit"))


def together(values: Mapping) -> dict:
    """A training file without its sections, as kohya's programs read it."""
    flat: dict = {}
    for key, value in values.items():
        if key not in ("datasets", "general"):
            flat |= value if isinstance(value, dict) else {key: value}
    return flat


def import_training(values: Mapping, pictures: dict | None, near: Path) -> Moved:
    """pictures: the dataset file's settings, where it was found; near: the folder that the file lies in.

    Raises ZTurboError for a training of another model.
    """
    moved, source = Moved(), Theirs(together(values))
    need_z_image(moved, source)
    name = source.text("output_name")
    if name:
        shared.run_name(moved, source.said("output_name"), name)
    _network(moved, source, near)
    found = kohya_sets.of_training(source, pictures)
    if source.text("dataset_config") and pictures is None:
        moved.leave(source.said("dataset_config"), "nothing is there from here; give it with --dataset")
    sets.join(moved, found, near)
    epoch = _steps(moved, source, sets.counted(found, near))
    _optimizer(moved, source)
    _timesteps(moved, source)
    _loss(moved, source)
    _saving(moved, source, epoch)
    _samples(moved, source, near, epoch)
    _model(moved, source, near)
    shared.noise(moved, source, reasons.KOHYA_NOISE)
    _rest(moved, source, found)
    return moved


def import_pictures(values: Mapping, near: Path) -> Moved:
    """A dataset file alone."""
    moved = Moved()
    found = kohya_sets.of_dataset(values, {})
    sets.join(moved, found, near)
    why = "the file is of pictures only; everything else is as in this pack's Train LoRA"
    moved.lines.append(Line(LEFT, "training", why=why))
    _rest(moved, Theirs({}), found)
    return moved


def _rest(moved: Moved, source: Theirs, found: list[PictureSet]):
    for one in found:
        source.parts.append(one.source)
    moved.rest(source, reasons.KOHYA)
    seen, lines = set(), []  # what all sets have from [general] is said once
    for line in moved.lines:
        plain = line.theirs.split("].")[-1] if line.how in (LEFT, OFF) else line
        if plain not in seen:
            lines.append(line)
        seen.add(plain)
    moved.lines = lines


def need_z_image(moved: Moved, source: Theirs):
    """Raises ZTurboError for a training of another model, with what was found."""
    module = source.text("network_module") or ""
    plain = module.lower().replace("_", "")
    names = [source.values.get(key) for key in MODELS]
    named = next((name for name in names if isinstance(name, str)), "")
    file = named.replace("\\", "/").rsplit("/", 1)[-1]
    wrong = ""
    if module.startswith("networks.") and module not in ANY_MODEL and "zimage" not in plain:
        kind = OF_OTHERS.get(module, module.removeprefix("networks.").removeprefix("lora_"))
        wrong = f"{source.said('network_module')}, which is for {kind}"
    elif not looks_like_z_image(file) and any(word in file.lower() for word in FOREIGN_NAMES):
        wrong = source.said(*MODELS)
    elif keys := [key for key in FOREIGN_KEYS if source.values.get(key)]:
        wrong = source.said(*keys)
    if wrong:
        raise ZTurboError(
            f"This training is for another model than Z-Image ({wrong}). Give one whose network_module is "
            "networks.lora_zimage, or the dataset file alone: pictures are the same for every model."
        )
    sure = "zimage" in plain or looks_like_z_image(named)
    why = "Z-Image" if sure else "nothing in the file says which model it is for; it is taken for Z-Image"
    moved.lines.append(Line(TAKEN, source.said("network_module") or source.said(*MODELS) or "the file", why=why))


def _network(moved: Moved, source: Theirs, near: Path):
    module = source.text("network_module") or ""
    rank = source.whole("network_dim") or 4
    moved.put("network.rank", rank, source.said("network_dim") or "network_dim (not in the file)")
    alpha = source.number("network_alpha")
    alpha = 1.0 if alpha is None else alpha or float(rank)
    moved.put("network.alpha", alpha, source.said("network_alpha") or "network_alpha (not in the file, 1 there)")
    more = Theirs(shared.keyed(source.texts("network_args")), "network_args ")
    algorithm = (more.text("algo") or module.removeprefix("networks.")).lower()
    kind = ALGORITHMS.get(algorithm, "lora")
    kind = "dora" if more.flag("dora_wd") and kind == "lora" else kind
    said = more.said("algo", "dora_wd") or source.said("network_module") or "network_module"
    whole = bool(more.flag("full_matrix"))
    shared.network_kind(moved, said, kind, rank, more.whole("factor") if kind == "lokr" else None, whole)
    if algorithm not in ALGORITHMS and more.values.get("algo"):
        moved.leave(more.said("algo"), "there is no such network here; lora")
    if module.startswith("networks."):
        why = "it trains no modulation (adaln) unless told; empty trains all"
        moved.put("network.targets", MUSUBI_PARTS, source.said("network_module"), why, TAKEN)
    for key in ("exclude_patterns", "include_patterns"):
        if more.text(key):
            moved.leave(more.said(key), reasons.PATTERNS)
    if start := source.text("network_weights"):
        shared.place(moved, "network.start", source.said("network_weights"), start, near)
    moved.rest(more, {"loraplus_lr_ratio": "both of its matrices have one rate here"})


def _steps(moved: Moved, source: Theirs, pictures: int | None) -> int | None:
    """How many steps are an epoch; None: not known."""
    batch, together = moved.values.get("batch_size", 1), source.whole("gradient_accumulation_steps") or 1
    if together > 1:
        moved.put("optimizer.accumulation", together, source.said("gradient_accumulation_steps"))
    epoch = None if pictures is None else -(-pictures // (batch * together))
    steps, epochs = source.whole("max_train_steps"), source.whole("max_train_epochs")
    if epochs is None:
        if steps is None:
            moved.default("steps", 1600, "max_train_steps")
        else:
            moved.put("steps", steps, source.said("max_train_steps"))
    elif epoch is None:
        why = "steps are counted here, and the pictures of an epoch are not there to be counted; set steps"
        moved.leave(source.said("max_train_epochs"), why)
        if steps is not None:
            moved.put("steps", steps, source.said("max_train_steps"))
    else:
        why = f"an epoch of {pictures} pictures is {epoch} steps"
        why += "; a few more with several sizes of picture" if batch > 1 else ""
        moved.put("steps", epochs * epoch, source.said("max_train_epochs"), why)
    moved.take(source, "seed", "seed", "whole")
    return epoch


def _optimizer(moved: Moved, source: Theirs):
    rate = "unet_lr" if source.number("unet_lr") is not None else "learning_rate"
    source.seen.add("learning_rate")
    moved.take(source, rate, "optimizer.learning_rate", "number", 2e-6)
    more = Theirs(shared.keyed(source.texts("optimizer_args")), "optimizer_args ")
    moved.take(more, "weight_decay", "optimizer.weight_decay", "number")
    name = source.text("optimizer_type") or "AdamW"
    shared.optimizer(moved, source.said("optimizer_type") or "optimizer_type", name, more.number("weight_decay"))
    if moved.values["optimizer.name"] == "adafactor" and more.flag("relative_step") is not False:
        moved.leave("optimizer_args relative_step", "Adafactor is used with a rate of its own: set learning_rate")
    for key in ("scale_parameter", "warmup_init"):
        more.seen.add(key)
    moved.rest(more, {})
    moved.take(source, "max_grad_norm", "optimizer.max_grad_norm", "number")
    _schedule(moved, source)
    moved.take(source, "gradient_checkpointing", "compute.checkpointing", "flag")
    dtype = source.text("mixed_precision")
    if dtype == "fp16":
        moved.put("compute.dtype", "bf16", source.said("mixed_precision"), "Z-Image's activations leave fp16's range")
    elif dtype:
        moved.put("compute.dtype", "fp32" if dtype == "no" else "bf16", source.said("mixed_precision"))


def _schedule(moved: Moved, source: Theirs):
    name, warmup = source.text("lr_scheduler"), source.number("lr_warmup_steps")
    if name in SCHEDULES:
        moved.put("optimizer.schedule", SCHEDULES[name], source.said("lr_scheduler"))
    elif name is not None:
        moved.leave(source.said("lr_scheduler"), "there is no such course here; the rate stays constant")
    if name == "cosine_with_restarts":
        moved.take(source, "lr_scheduler_num_cycles", "optimizer.restarts", "whole")
    if not warmup:
        return
    if name in (None, "constant"):
        moved.leave(source.said("lr_warmup_steps"), "a constant rate has no warm-up there")
    elif warmup < 1:
        steps = int(warmup * moved.values.get("steps", 2000))
        moved.put("optimizer.warmup", steps, source.said("lr_warmup_steps"), "a share of the steps there")
    else:
        moved.put("optimizer.warmup", int(warmup), source.said("lr_warmup_steps"))


def _timesteps(moved: Moved, source: Theirs):
    scheme = source.text("weighting_scheme") or "none"
    kind, said = source.text("timestep_sampling") or "sigma", source.said("timestep_sampling", "discrete_flow_shift")
    kind = "logit_normal" if kind == "sigma" and scheme == "logit_normal" else kind
    said = said or "timestep_sampling (not in the file, sigma there)"
    shift, spread = source.number("discrete_flow_shift") or 1.0, source.number("sigmoid_scale") or 1.0
    mean, std = source.number("logit_mean") or 0.0, source.number("logit_std") or 1.0
    found = density(kind, shift, spread, (mean, std))
    if found is None:
        moved.leave(said, "no noise levels are chosen so here; the default, weighted, is ai-toolkit's for turbo")
    else:
        name, centre, width, why = found
        moved.put("timesteps.density", name, said, why)
        if name == "logit_normal":
            moved.put("timesteps.mean", round(centre, 4), said)
            moved.put("timesteps.std", width, said)
    if scheme == "cosmap":
        moved.put("loss.weighting", "cosmap", source.said("weighting_scheme"))
    elif scheme not in ("none", "logit_normal"):
        moved.leave(source.said("weighting_scheme"), "noise levels are not weighed so here")
    low, high = source.number("min_timestep") or 0.0, source.number("max_timestep")
    low, high = low / 1000, 1.0 if high is None else high / 1000
    if kind in ("sigma", "logit_normal"):  # there these two count from the noise
        low, high = 1 - high, 1 - low
    shared.noise_levels(moved, source.said("min_timestep", "max_timestep"), low, high)


def density(
    kind: str, shift: float, spread: float, logits: tuple[float, float]
) -> tuple[str, float, float, str] | None:
    """(ours, mean and std of logit_normal, what is not the same): their choice of noise levels. None: there is none.

    A shift moves the logit of a noise level by its logarithm, so a shifted sigmoid is a logit_normal of that mean.
    """
    mean, std = logits
    same = {
        "uniform": ("linear", 0.0, 1.0, ""),
        "sigmoid": ("sigmoid", 0.0, 1.0, "") if spread == 1 else ("logit_normal", 0.0, spread, ""),
        "shift": ("logit_normal", math.log(shift) if shift > 0 else 0.0, spread, ""),
        "logsnr": ("logit_normal", -mean / 2, std / 2, ""),
        "logit_normal": ("logit_normal", (math.log(shift) if shift > 0 else 0.0) - mean, std, ""),
    }
    if kind != "sigma":
        return same.get(kind)
    name = "linear" if shift < math.sqrt(SHIFT) else "shift"
    exact = shift in (1, SHIFT)
    return name, 0.0, 1.0, "" if exact else f"the shift is 1 in linear and {SHIFT:g} in shift, and no other"


def _loss(moved: Moved, source: Theirs):
    kind = source.text("loss_type")
    if kind in ("huber", "smooth_l1"):
        moved.put("loss.kind", "huber", source.said("loss_type"), "huber itself, with a bend at huber_delta")
        moved.take(source, "huber_c", "loss.huber_delta", "number")
    elif kind not in (None, "l2"):
        moved.leave(source.said("loss_type"), "there is no such loss here; mse")
    moved.take(source, "prior_loss_weight", "data.regularisation_weight", "number")


def _saving(moved: Moved, source: Theirs, epoch: int | None):
    every = _every(moved, source, "save", "saving.every", epoch)
    span = source.whole("save_last_n_steps")
    epochs, apart = source.whole("save_last_n_epochs"), source.whole("save_every_n_epochs") or 1
    if span is not None and every:
        moved.put("saving.keep", max(1, span // every), source.said("save_last_n_steps"), "checkpoints, not steps")
    elif epochs is not None:
        moved.put("saving.keep", max(1, epochs // apart), source.said("save_last_n_epochs"), "checkpoints, not epochs")
    dtype = source.text("save_precision")
    if dtype in DTYPES:
        moved.put("saving.dtype", DTYPES[dtype], source.said("save_precision"))
    elif dtype:
        moved.leave(source.said("save_precision"), "LoRAs are saved in bf16, fp16 or fp32")


def _every(moved: Moved, source: Theirs, what: str, ours: str, epoch: int | None) -> int | None:
    """Of steps, or of epochs where their pictures could be counted."""
    steps, epochs = source.whole(f"{what}_every_n_steps"), source.whole(f"{what}_every_n_epochs")
    if steps is not None:
        moved.put(ours, steps, source.said(f"{what}_every_n_steps"))
        return steps
    if epochs is None:
        return None
    said = source.said(f"{what}_every_n_epochs")
    if epoch is None:
        moved.leave(said, "steps are counted here, and the pictures of an epoch are not there to be counted")
        return None
    moved.put(ours, epochs * epoch, said, f"an epoch is {epoch} steps")
    return epochs * epoch


def _samples(moved: Moved, source: Theirs, near: Path, epoch: int | None):
    _every(moved, source, "sample", "previews.every", epoch)
    file = source.text("sample_prompts")
    if file is None:
        return
    place = shared.there(file, near)
    if place is None:
        moved.leave(source.said("sample_prompts"), "nothing is there from here; set previews.prompts")
        return
    drawn = read_prompts(place)
    if drawn:
        shared.previews(moved, source.said("sample_prompts"), drawn)
    moved.leave(f"{place.name}: steps, scales, negative prompts", reasons.PREVIEWED)


def _model(moved: Moved, source: Theirs, near: Path):
    for keys, ours in ((MODELS, "inputs.model"), (("vae",), "inputs.vae"), (("text_encoder",), "inputs.text_encoder")):
        for key in keys:
            if path := source.text(key):
                shared.place(moved, ours, source.said(key), path, near)
    files, strengths = source.texts("base_weights"), source.raw("base_weights_multiplier")
    if not files:
        name = str(source.values.get("dit") or "").lower()
        if "turbo" in name and "de_turbo" not in name and "deturbo" not in name:
            moved.lines.append(Line(LEFT, "base_weights (not in the file)", why=reasons.STRAIGHT))
        return
    chosen = next((number for number, file in enumerate(files) if "adapter" in file.lower()), 0)
    shared.place(moved, "inputs.adapter", f"base_weights {brief(files[chosen])}", files[chosen], near)
    strengths = strengths if isinstance(strengths, list) else [strengths]
    if chosen < len(strengths) and strengths[chosen] is not None:
        strength = Theirs({"multiplier": strengths[chosen]}, "base_weights_").number("multiplier")
        moved.put("inputs.adapter_strength", strength, f"base_weights_multiplier {brief(strengths[chosen])}")
    for file in files[:chosen] + files[chosen + 1 :]:
        moved.leave(
            f"base_weights {brief(file)}", "one adapter is carried here; merge other LoRAs into the model's file"
        )
