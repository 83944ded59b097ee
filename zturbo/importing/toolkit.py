"""ai-toolkit's jobs (github.com/ostris/ai-toolkit at 27a03a9): names and defaults of `toolkit/config_modules.py`."""

from pathlib import Path

from ..errors import ZTurboError
from . import reasons, sets, shared
from .kohya_prompts import of_line
from .record import LEFT, TAKEN, Line, Moved, Theirs, brief
from .sets import PictureSet
from .shared import Drawn

TRAINERS = ("sd_trainer", "diffusion_trainer", "ui_trainer")
Z_IMAGE = "zimage"
OTHER_FLAGS = ("is_flux", "is_xl", "is_v2", "is_v3", "is_lumina2", "is_pixart", "is_auraflow", "is_ssd", "is_vega")
DENSITIES = {"linear": "linear", "sigmoid": "sigmoid", "weighted": "weighted", "shift": "shift"}
NEAR = {
    "flux_shift": ("shift", "its shift changes with a picture's size; here it is 3, as turbo draws"),
    "lumina2_shift": ("shift", "its shift changes with a picture's size; here it is 3, as turbo draws"),
    "lognorm_blend": ("sigmoid", "the nearest that there is here"),
}
ELSEWHERE = "no noise levels are chosen so here; the default, weighted, is that trainer's for turbo"
SCHEDULES = {
    "constant": ("constant", ""),
    "constant_with_warmup": ("constant", ""),
    "cosine": ("cosine", ""),
    "cosine_with_restarts": ("cosine", "unless told else, it restarts once there, which is a plain cosine"),
}
LOSSES = {
    "mse": ("mse", ""),
    "pseudo_huber": ("huber", "huber itself, with a bend at huber_delta"),
    "mae": ("huber", "the nearest that there is here: straight for large errors"),
}
DTYPES = {
    **dict.fromkeys(("bf16", "bfloat16"), "bf16"),
    **dict.fromkeys(("fp16", "float16"), "fp16"),
    **dict.fromkeys(("fp32", "float32", "float"), "fp32"),
}


def is_job(values) -> bool:
    return isinstance(values, dict) and "config" in values and "job" in values


def import_job(values: dict, near: Path) -> Moved:
    """near: the folder that the file lies in. Raises ZTurboError for what is no LoRA training of Z-Image."""
    moved, top = Moved(), Theirs(values)
    top.seen |= {"job", "meta"}
    config = top.section("config")
    name = config.text("name") or ""
    job = only_process(config, name)
    model = job.section("model")
    need_z_image(moved, model)
    shared.run_name(moved, f"config.name {brief(name)}", name)
    _network(moved, job.section("network"), near)
    per_step = _training(moved, job, job.section("train"))
    _saving(moved, job.section("save"), per_step)
    _pictures(moved, job, near)
    _samples(moved, job, job.section("sample"), per_step)
    _model(moved, model, near)
    job.section("logging")
    moved.rest(top, reasons.TOOLKIT)
    return moved


def only_process(config: Theirs, name: str) -> Theirs:
    """The one training in a job. Raises ZTurboError for several, for none, and for another kind."""
    found = [Theirs(one.values, "", name) for one in config.sections("process")]
    config.parts.clear()
    if len(found) != 1:
        kinds = ", ".join(brief(one.values.get("type")) for one in found) or "none"
        raise ZTurboError(
            f"The job {brief(name)} has {len(found)} processes ({kinds}), and a recipe is one training. "
            "Leave one in config.process, and import each by itself."
        )
    job = found[0]
    kind = job.text("type")
    if kind not in TRAINERS:
        raise ZTurboError(
            f"The job {brief(name)} is of type {brief(kind)}, which trains no LoRA on pictures. "
            f"Give a job of type {' or '.join(TRAINERS[:2])}."
        )
    if job.values.get("network") is None:
        raise ZTurboError(
            f"The job {brief(name)} has no network: it trains the whole model, and this pack trains LoRAs. "
            "Give its process a network of type lora."
        )
    config.parts.append(job)
    return job


def need_z_image(moved: Moved, model: Theirs):
    """Raises ZTurboError for a model of another kind, with what was found."""
    arch, name = model.text("arch") or "", model.text("name_or_path") or ""
    flags = [flag for flag in OTHER_FLAGS if model.flag(flag)]
    kind = arch.split(":")[0].lower()
    if kind == Z_IMAGE or (not kind and not flags and looks_like_z_image(name)):
        moved.lines.append(Line(TAKEN, model.said("arch") or model.said("name_or_path"), why="Z-Image"))
        return
    found = ", ".join(filter(None, (model.said("arch", "name_or_path"), *(f"{flag} true" for flag in flags))))
    raise ZTurboError(
        f"This job is for another model than Z-Image ({found or 'no model is named'}). "
        "Give a job whose model.arch is zimage:turbo."
    )


def looks_like_z_image(name: str) -> bool:
    plain = "".join(letter for letter in name.lower() if letter.isalnum())
    return "zimage" in plain and "l2p" not in plain


def _network(moved: Moved, network: Theirs, near: Path):
    kind = (network.text("type") or "lora").lower()
    ranks = [network.whole(key) for key in ("rank", "linear")]
    rank = next((one for one in ranks if one is not None), 4)
    moved.put("network.rank", rank, network.said("rank", "linear") or "network.linear (not in the file)")
    alpha = [network.number(key) for key in ("linear_alpha", "alpha")]
    given = next((one for one in alpha if one is not None), 1.0)
    why = "" if given == rank else "that trainer takes alpha as high as the rank for this model, whatever it says"
    moved.put("network.alpha", float(rank), network.said("linear_alpha", "alpha") or "network.linear_alpha", why)
    if kind not in ("lora", "locon", "dora", "lokr"):
        raise ZTurboError(f"network.type is {brief(kind)}; here there are lora, dora, lokr and loha.")
    if kind == "locon":
        moved.leave(network.said("type"), "Z-Image has no convolutions to train, so this is lora")
    whole = network.flag("lokr_full_rank") is not False and kind == "lokr"
    factor = network.whole("lokr_factor")
    shared.network_kind(moved, network.said("type"), "lora" if kind == "locon" else kind, rank, factor, whole)
    if start := network.text("pretrained_lora_path"):
        shared.place(moved, "network.start", network.said("pretrained_lora_path"), start, near)
    _targets(moved, network.section("network_kwargs"))


def _targets(moved: Moved, more: Theirs):
    """Parts by what their names contain."""
    only, but = more.texts("only_if_contains"), more.texts("ignore_if_contains")
    patterns = [pattern_of(word) for word in only] or (["*"] if but else [])
    patterns += [f"{pattern_of(word)}:0" for word in but]
    if patterns:
        said = more.said("only_if_contains", "ignore_if_contains")
        moved.put("network.targets", ", ".join(patterns), said, "as patterns; :0 is not trained")


def pattern_of(word: str) -> str:
    plain = word.replace("$$", ".").removeprefix("transformer.").removeprefix("diffusion_model.")
    return f"*{''.join(letter for letter in plain if letter.isalnum() or letter in '._-')}*"


def _training(moved: Moved, job: Theirs, train: Theirs) -> int:
    """How many of that trainer's steps are one here."""
    per_step = _steps(moved, train)
    moved.take(train, "batch_size", "batch_size", "whole")
    moved.take(job, "training_seed", "seed", "whole")
    unet = "unet_lr" if train.number("unet_lr") is not None else "lr"
    train.seen.add("lr")
    moved.take(train, unet, "optimizer.learning_rate", "number", 1e-6)
    more = train.section("optimizer_params")
    moved.take(more, "weight_decay", "optimizer.weight_decay", "number")
    name = train.text("optimizer") or "adamw"
    shared.optimizer(moved, train.said("optimizer") or "train.optimizer", name, more.number("weight_decay"))
    moved.take(train, "max_grad_norm", "optimizer.max_grad_norm", "number")
    _schedule(moved, train)
    _average(moved, train.section("ema_config"))
    _timesteps(moved, train)
    _loss(moved, train)
    moved.take(train, "reg_weight", "data.regularisation_weight", "number")
    moved.take(train, "gradient_checkpointing", "compute.checkpointing", "flag")
    dtype = DTYPES.get(train.text("dtype") or "")
    if train.text("dtype") is None:
        moved.leave("train.dtype (not in the file)", "fp32 is that trainer's default; here the model computes in bf16")
    elif dtype == "fp16":
        moved.put("compute.dtype", "bf16", train.said("dtype"), "Z-Image's activations leave fp16's range")
    elif dtype:
        moved.put("compute.dtype", dtype, train.said("dtype"))
    shared.noise(moved, train, reasons.TOOLKIT_NOISE)
    return per_step


def _steps(moved: Moved, train: Theirs) -> int:
    steps = train.whole("steps")
    whole, old = train.whole("gradient_accumulation"), train.whole("gradient_accumulation_steps")
    if whole is not None and whole > 1:
        moved.put("optimizer.accumulation", whole, train.said("gradient_accumulation"))
    per_step = old if old is not None and old > 1 else 1
    if old is not None and old < 0:
        moved.leave(train.said("gradient_accumulation_steps"), "no step is as long as an epoch here")
    if per_step > 1:
        moved.put("optimizer.accumulation", per_step, train.said("gradient_accumulation_steps"))
    if steps is None:
        moved.default("steps", -(-1000 // per_step), "train.steps")
    else:
        why = f"there each batch counts, here each step of {per_step} batches" if per_step > 1 else ""
        moved.put("steps", -(-steps // per_step), train.said("steps"), why)
    return per_step


def _schedule(moved: Moved, train: Theirs):
    name, more = train.text("lr_scheduler"), train.section("lr_scheduler_params")
    warmup = more.whole("num_warmup_steps")
    if name == "constant_with_warmup" and warmup is None:
        moved.default("optimizer.warmup", 1000, "lr_scheduler_params.num_warmup_steps")
    elif warmup:
        moved.put("optimizer.warmup", warmup, more.said("num_warmup_steps"))
    if name is None:
        return
    if name == "linear" and (more.number("end_factor") or 1.0) < (more.number("start_factor") or 1 / 3):
        moved.put("optimizer.schedule", "linear", train.said("lr_scheduler"), "falls to 0 at the end")
    elif name in SCHEDULES:
        moved.put("optimizer.schedule", SCHEDULES[name][0], train.said("lr_scheduler"), SCHEDULES[name][1], TAKEN)
    else:
        moved.leave(train.said("lr_scheduler"), "there is no such course here; the rate stays constant")


def _average(moved: Moved, ema: Theirs):
    decay = ema.number("ema_decay")
    if ema.flag("use_ema"):
        moved.put("optimizer.ema", 0.999 if decay is None else decay, ema.said("ema_decay") or "ema_config.ema_decay")


def _timesteps(moved: Moved, train: Theirs):
    kind, balance = train.text("timestep_type"), train.text("content_or_style") or "balanced"
    said = train.said("timestep_type") or "train.timestep_type (not in the file, sigmoid there)"
    kind = kind or "sigmoid"
    if balance in ("content", "style"):
        both = kind == "linear"
        moved.put("timesteps.density", balance, train.said("content_or_style", *(["timestep_type"] if both else [])))
        if kind == "weighted":
            moved.put("loss.weighting", "weighted", said)
        elif not both:
            moved.leave(said, "content_or_style decides alone here")
    elif kind in DENSITIES:
        moved.put("timesteps.density", DENSITIES[kind], said)
    elif kind in NEAR:
        moved.put("timesteps.density", NEAR[kind][0], said, NEAR[kind][1])
    else:
        moved.leave(said, ELSEWHERE)
    first, last = train.whole("min_denoising_steps") or 0, train.whole("max_denoising_steps")
    low = 0.0 if last is None or last >= 999 else 1 - last / 1000
    shared.noise_levels(moved, train.said("min_denoising_steps", "max_denoising_steps"), low, 1 - first / 1000)


def _loss(moved: Moved, train: Theirs):
    kind = train.text("loss_type")
    if kind in LOSSES:
        moved.put("loss.kind", LOSSES[kind][0], train.said("loss_type"), LOSSES[kind][1])
    elif kind is not None:
        moved.leave(train.said("loss_type"), "there is no such loss here; mse")
    scale = train.number("differential_guidance_scale")
    if train.flag("do_differential_guidance"):
        said = train.said("do_differential_guidance", "differential_guidance_scale")
        moved.put("loss.guidance", 3.0 if scale is None else scale, said)
    elif scale is not None:
        train.seen.discard("differential_guidance_scale")


def _saving(moved: Moved, save: Theirs, per_step: int):
    every = save.whole("save_every")
    if every is not None:
        why = f"counted in steps of {per_step} batches" if per_step > 1 else ""
        moved.put("saving.every", -(-every // per_step), save.said("save_every"), why)
    moved.take(save, "max_step_saves_to_keep", "saving.keep", "whole")
    dtype = DTYPES.get(save.text("dtype") or "float16")
    if dtype:
        moved.put("saving.dtype", dtype, save.said("dtype") or "save.dtype (not in the file)")
    else:
        moved.leave(save.said("dtype"), "LoRAs are saved in bf16, fp16 or fp32")


def _pictures(moved: Moved, job: Theirs, near: Path):
    trigger, found = job.text("trigger_word"), []
    triggers = [trigger] if trigger else []
    for one in job.sections("datasets"):
        if own := one.text("trigger_word"):
            triggers.append(own)
        found.append(_set(one))
    if triggers:
        why = "one trigger word for all here: the first" if len(set(triggers)) > 1 else ""
        moved.put("inputs.trigger", triggers[0], f"trigger_word {', '.join(map(brief, triggers))}", why)
    sets.join(moved, found, near)


def _set(one: Theirs) -> PictureSet:
    where = one.where.rstrip(".")
    if one.values.get("num_frames") == 1:
        one.seen |= {"num_frames", "shrink_video_to_frames"}
    given = one.raw("resolution")
    given = given if isinstance(given, list) and given else [512 if given in (None, []) else given]
    sides = tuple(shared.side(value, f"{one.where}resolution") for value in given)
    folders = [one.text(key) for key in ("folder_path", "dataset_path")]
    repeats = one.whole("num_repeats") or 1
    found = PictureSet(where, next(filter(None, folders), ""), sides, one, repeats, bool(one.flag("is_reg")))
    dropout = one.number("caption_dropout_rate")
    said = one.said("caption_dropout_rate") or f"{where}.caption_dropout_rate (not in the file)"
    found.options["data.caption_dropout"] = (0.0 if dropout is None else dropout, said)
    for key, ours, kind in OPTIONS:
        value = getattr(one, kind)(key)
        if value is not None:
            found.options[ours] = (value, one.said(key))
    if one.flag("alpha_mask"):
        found.options["data.masks"] = ("files and alpha", one.said("alpha_mask"))
    if one.values.get("mask_path") is None:
        found.options.pop("data.outside", None)
    return found


OPTIONS = (
    ("shuffle_tokens", "data.shuffle_tags", "flag"),
    ("flip_x", "data.flip", "flag"),
    ("mask_min_value", "data.outside", "number"),
)


def _samples(moved: Moved, job: Theirs, sample: Theirs, per_step: int):
    drawn = [of_line(text) for text in sample.texts("prompts")]  # the same flags as kohya's stand behind prompts
    for one in sample.sections("samples"):
        if prompt := one.text("prompt"):
            by_flags = of_line(prompt)
            sides = (one.whole("width") or by_flags.width, one.whole("height") or by_flags.height)
            seed = one.whole("seed")
            drawn.append(Drawn(by_flags.prompt, *sides, by_flags.seed if seed is None else seed))
    every = sample.whole("sample_every")
    if every is not None:
        why = f"counted in steps of {per_step} batches" if per_step > 1 else ""
        moved.put("previews.every", -(-every // per_step), sample.said("sample_every"), why)
    for key in ("width", "height"):
        value = sample.whole(key)
        if value is not None:
            shared.pixels(moved, f"previews.{key}", value, sample.said(key))
    if (of_all := sample.whole("seed")) is not None:
        shared.seed(moved, of_all, sample.said("seed"))
    train = next(part for part in job.parts if part.where == "train.")
    if train.flag("disable_sampling"):
        moved.leave(train.said("disable_sampling"), "no previews, as there")
    elif drawn:
        shared.previews(moved, "sample.prompts" if sample.values.get("prompts") else "sample.samples", drawn)


def _model(moved: Moved, model: Theirs, near: Path):
    name = model.text("name_or_path") or ""
    local = shared.there(name, near) if name else None
    if local is not None:
        moved.put("inputs.model", str(local), model.said("name_or_path"))
    elif name:
        moved.leave(
            model.said("name_or_path"), "nothing is fetched; give the model, text encoder and VAE as files or a folder"
        )
    adapter = model.text("assistant_lora_path")
    if adapter:
        file = adapter if shared.there(adapter, near) else adapter.replace("\\", "/").rsplit("/", 1)[-1]
        shared.place(moved, "inputs.adapter", model.said("assistant_lora_path"), file, near)
    elif undistilled(f"{model.text('arch') or ''} {name}"):
        moved.lines.append(Line(LEFT, "model.assistant_lora_path (not in the file)", why=reasons.UNDISTILLED))
    else:
        moved.lines.append(Line(LEFT, "model.assistant_lora_path (not in the file)", why=reasons.STRAIGHT))


def undistilled(name: str) -> bool:
    plain = name.lower()
    return looks_like_z_image(plain) and ("turbo" not in plain or "deturbo" in plain.replace("-", "").replace("_", ""))
