"""Recipes out of ai-toolkit's jobs and kohya's TOML: what is meant there is meant here, or a line says why not."""

import builtins
import copy
import json
import math
import shutil

import pytest
import torch
import yaml

from zturbo import flow, importing, lycoris, recipefile
from zturbo.errors import ZTurboError
from zturbo.hosts import diffusers_tiny
from zturbo.importing import kohya, kohya_prompts, shared
from zturbo.importing.shared import Drawn

ADAPTER = "zimage_turbo_training_adapter_v2.safetensors"
JOB = yaml.safe_load(
    """
job: extension
config:
  name: my_cat_v1
  process:
    - type: diffusion_trainer
      training_folder: /workspace/output
      device: cuda
      trigger_word: zvkcat
      performance_log_every: 10
      network: {type: lora, linear: 32, linear_alpha: 32, conv: 16, conv_alpha: 16, lokr_full_rank: true}
      save: {dtype: bf16, save_every: 200, max_step_saves_to_keep: 4, save_format: diffusers, push_to_hub: false}
      datasets:
        - folder_path: pics
          mask_path: null
          mask_min_value: 0.1
          default_caption: ""
          caption_ext: txt
          caption_dropout_rate: 0.1
          cache_latents_to_disk: true
          is_reg: false
          network_weight: 1
          resolution: [512, 768, 1024]
          shrink_video_to_frames: true
          num_frames: 1
          flip_x: true
          num_repeats: 1
      train:
        batch_size: 2
        steps: 3000
        gradient_accumulation: 1
        train_unet: true
        train_text_encoder: false
        gradient_checkpointing: true
        noise_scheduler: flowmatch
        optimizer: adamw8bit
        timestep_type: weighted
        content_or_style: balanced
        optimizer_params: {weight_decay: 1e-4}
        lr: 1e-4
        ema_config: {use_ema: true, ema_decay: 0.99}
        dtype: bf16
        loss_type: mse
      logging: {log_every: 1, use_ui_logger: true}
      model:
        name_or_path: Tongyi-MAI/Z-Image-Turbo
        quantize: true
        qtype: qfloat8
        arch: "zimage:turbo"
        low_vram: true
        model_kwargs: {}
        assistant_lora_path: ostris/zimage_turbo_training_adapter/zimage_turbo_training_adapter_v2.safetensors
      sample:
        sampler: flowmatch
        sample_every: 250
        width: 1024
        height: 1000
        samples:
          - prompt: "[trigger] on a beach"
          - {prompt: "a photo of [trigger]", seed: 7, width: 768}
        neg: ""
        seed: 42
        walk_seed: true
        guidance_scale: 1
        sample_steps: 9
meta: {name: "[name]", version: '1.0'}
"""
)
TRAINING = """
dit = "z_image_turbo_bf16.safetensors"
vae = "ae.safetensors"
text_encoder = "qwen_3_4b.safetensors"
dataset_config = "set.toml"

[network]
network_module = "networks.lora_zimage"
network_dim = 32
network_alpha = 16
base_weights = ["zimage_turbo_training_adapter_v2.safetensors"]
base_weights_multiplier = [0.8]

[training]
timestep_sampling = "shift"
discrete_flow_shift = 2.0
weighting_scheme = "none"
optimizer_type = "adamw8bit"
learning_rate = 1e-4
gradient_checkpointing = true
gradient_accumulation_steps = 2
max_train_epochs = 16
save_every_n_epochs = 2
save_last_n_epochs = 8
sample_every_n_steps = 100
seed = 42
sdpa = true
mixed_precision = "bf16"
fp8_base = true
output_name = "my cat"
output_dir = "out"
save_precision = "fp16"
"""
MUSUBI_SET = """
[general]
resolution = [1024, 768]
caption_extension = ".txt"
batch_size = 2
enable_bucket = true
bucket_no_upscale = true

[[datasets]]
image_directory = "pics"
cache_directory = "cache"
num_repeats = 3
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with 16 pictures and a dataset file in it, and the working folder elsewhere."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    shutil.copytree(diffusers_tiny.PICTURES, tmp_path / "pics")
    (tmp_path / "set.toml").write_text(MUSUBI_SET)
    return tmp_path


def job(place, **changes):
    """The recipe and lines of the job with `train_lr=1` for config.process[0].train.lr; None takes a setting away."""
    given = copy.deepcopy(JOB)
    process = given["config"]["process"][0]
    for key, value in changes.items():
        section, _, name = key.partition("_")
        if section == "job":
            process[name] = value
        elif section == "set":
            process["datasets"][0][name] = value
        else:
            process[section][name] = value
    (place / "job.yaml").write_text(yaml.safe_dump(given))
    return importing.read(place / "job.yaml")


def training(place, text=TRAINING, **changes):
    """Of the training file, with other values; None takes one away."""
    for key, value in changes.items():
        lines = [line for line in text.split("\n") if not line.startswith(f"{key} =")]
        text = "\n".join(([] if value is None else [f"{key} = {json.dumps(value)}"]) + lines)
    (place / "train.toml").write_text(text)
    return importing.read(place / "train.toml")


def said(found, name) -> str:
    """The one line that names a setting of theirs, or of ours."""
    lines = [one.spelled() for one in found.lines if name in f"{one.theirs} {one.ours}".replace(",", "").split()]
    assert len(lines) == 1, (name, lines)
    return lines[0]


def refused(place, words, path="job.yaml"):
    with pytest.raises(ZTurboError) as error:
        importing.read(place / path)
    assert all(word in str(error.value) for word in words), error.value


def test_a_job_of_the_reference_trainer_is_the_same_run_here(place):
    found = job(place)
    given = found.recipe
    assert found.trainer == "ai-toolkit" and recipefile.from_toml(recipefile.to_toml(given)) == given
    assert (given.name, given.steps, given.batch_size) == ("my_cat_v1", 3000, 2)
    assert (given.network.rank, given.network.alpha, given.network.kind, given.network.targets) == (
        32,
        32.0,
        "lora",
        "",
    )
    options = given.optimizer
    assert (options.name, options.learning_rate, options.weight_decay, options.ema) == ("adamw8bit", 1e-4, 1e-4, 0.99)
    assert given.timesteps.density == "weighted" and given.loss.kind == "mse" and given.loss.weighting == "auto"
    assert given.compute.checkpointing and given.compute.dtype == "bf16"
    assert (given.saving.every, given.saving.keep, given.saving.dtype) == (200, 4, "bf16")
    assert given.inputs.pictures == str((place / "pics").resolve()) and given.inputs.resolutions == "512, 768, 1024"
    assert given.inputs.trigger == "zvkcat" and given.inputs.adapter == ADAPTER and given.inputs.model == ""
    assert given.data.caption_dropout == 0.1 and given.data.flip and given.data.outside == 0.1
    previews = given.previews
    assert previews.prompts == ("[trigger] on a beach", "a photo of [trigger]")
    assert (previews.every, previews.width, previews.height, previews.seed) == (250, 1024, 992, 42)


def test_every_setting_of_a_job_has_a_line(place):
    found = job(place)
    told = " ".join(f"{line.theirs} " for line in found.lines)
    process = JOB["config"]["process"][0]
    for section in ("network", "save", "train", "model", "sample"):
        for key, value in process[section].items():
            if key not in (
                "ema_config",
                "optimizer_params",
                "content_or_style",
                "gradient_accumulation",
                "lokr_full_rank",
            ):
                assert f"{key} " in told or f"{key}," in told, (section, key, value)
    assert said(found, "model.quantize").startswith("left out  model.quantize True: the file decides")
    assert said(found, "sample.height").startswith("changed") and "multiple of 16" in said(found, "sample.height")
    assert "needs the package bitsandbytes" in said(found, "train.optimizer")
    assert "nothing is there from here" in said(found, "inputs.adapter")
    assert "all previews have one seed here" in [line for line in found.lines if "seed 7" in line.theirs][0].why
    off = found.lines[-1]
    assert off.how == "off" and "train.train_text_encoder" in off.theirs


def test_json_is_read_as_yaml_is(place):
    (place / "job.json").write_text(json.dumps(JOB))
    assert importing.read(place / "job.json").recipe == job(place).recipe


@pytest.mark.parametrize("name", ["model", "adapter"])
def test_files_that_are_there_are_whole_paths(place, name):
    (place / "models").mkdir()
    (place / "models" / ADAPTER).write_bytes(b"")
    key = {"model": "model_name_or_path", "adapter": "model_assistant_lora_path"}[name]
    given = job(place, **{key: f"models/{ADAPTER}"}).recipe.inputs
    assert getattr(given, name) == str((place / "models" / ADAPTER).resolve())


def test_what_a_job_leaves_out_is_that_trainers_default(place):
    train = {"steps": None, "lr": None, "optimizer": None, "optimizer_params": None, "timestep_type": None}
    changes = {f"train_{key}": value for key, value in train.items()}
    found = job(place, network_linear=None, network_linear_alpha=None, set_resolution=None, **changes)
    given = found.recipe
    assert (given.steps, given.network.rank, given.optimizer.learning_rate) == (1000, 4, 1e-6)
    assert given.optimizer.name == "adamw" and given.optimizer.weight_decay == 0.01
    assert given.timesteps.density == "sigmoid" and given.inputs.resolutions == "512"
    assert said(found, "train.lr").startswith("default")


def test_alpha_is_the_rank_whatever_a_job_says(place):
    """As the reference trainer's network does for transformers, whose files have no alpha."""
    found = job(place, network_linear_alpha=1)
    assert found.recipe.network.alpha == 32 and said(found, "network.linear_alpha").startswith("changed")


@pytest.mark.parametrize(
    ("theirs", "ours", "rate"),
    [
        ("adamw", "adamw", 1e-4),
        ("adam8bit", "adamw8bit", 1e-4),
        ("adafactor", "adafactor", 1e-4),
        ("prodigy", "prodigy", 1.0),
        ("prodigy8bit", "prodigy", 1.0),
        ("lion", "lion", 1e-4),
        ("dadaptation", "prodigy", 1.0),
        ("automagic", "adamw", 1e-4),
    ],
)
def test_optimizers_by_name(place, theirs, ours, rate):
    found = job(place, train_optimizer=theirs)
    assert (found.recipe.optimizer.name, found.recipe.optimizer.learning_rate) == (ours, rate)
    changed = [line.how for line in found.lines if line.ours.startswith("optimizer.name")] == ["changed"]
    assert changed == (theirs in ("adam8bit", "prodigy8bit", "dadaptation", "automagic"))


def test_legacy_accumulation_counts_batches_and_the_other_steps(place):
    old = job(place, train_gradient_accumulation_steps=4, train_gradient_accumulation=None).recipe
    assert (old.steps, old.optimizer.accumulation, old.saving.every, old.previews.every) == (750, 4, 50, 63)
    new = job(place, train_gradient_accumulation=4).recipe
    assert (new.steps, new.optimizer.accumulation, new.saving.every) == (3000, 4, 200)
    assert "no step is as long as an epoch" in said(
        job(place, train_gradient_accumulation_steps=-1), "train.gradient_accumulation_steps"
    )


@pytest.mark.parametrize(
    ("kind", "balance", "density", "weighting"),
    [
        ("weighted", "balanced", "weighted", "auto"),
        ("linear", "balanced", "linear", "auto"),
        ("sigmoid", "balanced", "sigmoid", "auto"),
        ("shift", "balanced", "shift", "auto"),
        ("flux_shift", "balanced", "shift", "auto"),
        ("lognorm_blend", "balanced", "sigmoid", "auto"),
        ("one_step", "balanced", "weighted", "auto"),
        ("weighted", "content", "content", "weighted"),
        ("linear", "style", "style", "auto"),
        ("sigmoid", "style", "style", "auto"),
    ],
)
def test_noise_levels_of_a_job(place, kind, balance, density, weighting):
    found = job(place, train_timestep_type=kind, train_content_or_style=balance)
    assert (found.recipe.timesteps.density, found.recipe.loss.weighting) == (density, weighting)
    same = kind in ("weighted", "linear", "shift") or (kind, balance) == ("sigmoid", "balanced")
    assert (said(found, "train.timestep_type").split()[0] == "taken") == same


def test_the_range_of_steps_is_one_of_sigma(place):
    """Index 0 is noise."""
    given = job(place, train_min_denoising_steps=200, train_max_denoising_steps=700).recipe.timesteps
    assert (given.min_sigma, given.max_sigma) == (0.3, 0.8)
    given = job(place, train_min_denoising_steps=0, train_max_denoising_steps=999).recipe.timesteps
    assert (given.min_sigma, given.max_sigma) == (0, 1)


def test_the_learning_rates_course_of_a_job(place):
    def of(name, **more):
        return job(place, train_lr_scheduler=name, train_lr_scheduler_params=more).recipe.optimizer

    assert (of("cosine").schedule, of("cosine_with_restarts").schedule) == ("cosine", "cosine")
    warm = of("constant_with_warmup", num_warmup_steps=50)
    assert (warm.schedule, warm.warmup) == ("constant", 50) and of("constant_with_warmup").warmup == 1000
    assert of("linear", start_factor=1.0, end_factor=0.01).schedule == "linear"
    assert of("linear").schedule == of("step").schedule == "constant"


def test_loss_guidance_and_noise_of_a_job(place):
    found = job(place, train_loss_type="mae", train_do_differential_guidance=True, train_noise_offset=0.05)
    assert found.recipe.loss.kind == "huber" and found.recipe.loss.guidance == 3.0
    assert said(found, "train.noise_offset") == (
        "left out  train.noise_offset 0.05: there is no noise offset here; the velocity is learnt from plain noise"
    )
    found = job(place, train_loss_type="wavelet", train_differential_guidance_scale=2.0, train_dtype="fp16")
    assert found.recipe.loss.kind == "mse" and found.recipe.loss.guidance == 0 and found.recipe.compute.dtype == "bf16"
    assert "is off" in said(found, "train.differential_guidance_scale")
    assert job(place, train_dtype="float32").recipe.compute.dtype == "fp32"


def test_a_lokr_of_a_job_has_the_same_matrices(place):
    """Full rank: its second matrix is whole, which at a width of 3840 and the largest factor is 64 x 64."""
    given = job(place, network_type="lokr", network_lokr_factor=-1).recipe.network
    made = lycoris.create_lokr("x", 3840, 10240, given.rank, given.alpha, given.factor, 0)
    assert given.kind == "lokr" and made.w1.shape == (60, 80) and [tuple(w.shape) for w in made.w2] == [(64, 128)]
    given = job(place, network_type="lokr", network_lokr_factor=8).recipe.network
    assert given.factor == 8 and len(lycoris.create_lokr("x", 15360, 256, given.rank, 1.0, 8, 0).w2) == 1
    given = job(place, network_type="lokr", network_lokr_factor=8, network_lokr_full_rank=False).recipe.network
    assert (given.rank, given.factor) == (32, 8)
    assert "no convolutions" in said(job(place, network_type="locon"), "network.type")


def test_parts_by_what_their_names_contain(place):
    more = {"only_if_contains": ["transformer.layers.3.attention"], "ignore_if_contains": ["to_v"]}
    given = job(place, network_network_kwargs=more).recipe.network
    assert given.targets == "*layers.3.attention*, *to_v*:0"
    assert job(place, network_network_kwargs={"ignore_if_contains": ["adaLN"]}).recipe.network.targets == "*, *adaLN*:0"
    found = job(place, network_pretrained_lora_path="old.safetensors")
    assert found.recipe.network.start == "old.safetensors" and "nothing is there" in said(found, "network.start")


def test_several_sets_of_a_job(place):
    """One folder in several sizes is one folder; two folders are for the person to lay together."""
    first = JOB["config"]["process"][0]["datasets"][0]
    sizes = [{**first, "resolution": 512}, {**first, "resolution": 1024, "caption_dropout_rate": 0.2}]
    found = job(place, job_datasets=sizes)
    assert found.recipe.inputs.resolutions == "512, 1024" and found.recipe.data.caption_dropout == 0.1
    assert "that of the first set" in said(found, "datasets[0].caption_dropout_rate")
    shutil.copytree(place / "pics", place / "more")
    beside = {"folder_path": "more", "is_reg": True, "resolution": 512, "num_repeats": 2}
    found = job(place, job_datasets=[first, beside])
    assert found.recipe.inputs.regularisation == str((place / "more").resolve())
    assert any("sub-folder named 2_" in line.why for line in found.lines)
    found = job(place, job_datasets=[first, {"folder_path": "more", "alpha_mask": True, "trigger_word": "zother"}])
    assert found.recipe.inputs.pictures == "" and found.recipe.data.masks == "files and alpha"
    assert any("sub-folders" in line.why for line in found.lines) and "the first" in said(found, "trigger_word")
    assert any("give it with --pictures" in line.why for line in job(place, job_datasets=[]).lines)


def test_no_previews_where_a_job_draws_none(place):
    found = job(place, train_disable_sampling=True)
    assert found.recipe.previews.prompts == () and "as there" in said(found, "train.disable_sampling")
    found = job(place, sample_samples=None, sample_prompts=["a [name]", "b"], sample_width=None)
    assert found.recipe.previews.prompts == ("a my_cat_v1", "b")


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (
            {"arch": "zimage:deturbo", "name_or_path": "ostris/Z-Image-De-Turbo"},
            "an undistilled model needs no adapter",
        ),
        ({"arch": "zimage", "name_or_path": "Tongyi-MAI/Z-Image"}, "preview_model"),
        ({"name_or_path": "Tongyi-MAI/Z-Image-Turbo"}, "turbo wears off sooner"),
    ],
)
def test_no_adapter_is_said(place, model, words):
    found = job(place, job_model=model)
    assert found.recipe.inputs.adapter == "" and words in said(found, "model.assistant_lora_path")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"job_model": {"arch": "flux", "name_or_path": "black-forest-labs/FLUX.1-dev"}},
            ("another model", "FLUX.1-dev"),
        ),
        ({"job_model": {"name_or_path": "x/Z-Image-Turbo", "is_flux": True}}, ("another model", "is_flux true")),
        ({"job_model": {"arch": "zimage_l2p", "name_or_path": "x"}}, ("another model", "zimage_l2p")),
        ({"job_model": {}}, ("another model", "no model is named")),
        ({"job_type": "concept_slider"}, ("'concept_slider'", "trains no LoRA")),
        ({"job_network": None}, ("has no network", "whole model")),
        ({"network_type": "lorm"}, ("network.type", "'lorm'")),
        ({"train_steps": "many"}, ("train.steps is 'many'", "a number")),
        ({"train_steps": 10.5}, ("train.steps is 10.5", "a whole number")),
        ({"train_steps": -3}, ("makes no recipe", "steps is -3")),
        ({"train_gradient_checkpointing": "perhaps"}, ("'perhaps'", "true or false")),
        ({"train_optimizer": ["adamw"]}, ("train.optimizer", "must be text")),
        ({"job_train": "fast"}, ("train is 'fast'", "a section")),
        ({"job_datasets": "pics"}, ("datasets is 'pics'", "a list of sections")),
        ({"set_resolution": "large"}, ("datasets[0].resolution is 'large'", "64 to 4096")),
        ({"sample_prompts": [{"a": 1}]}, ("sample.prompts", "a list of texts")),
    ],
)
def test_a_job_that_is_none_of_ours_gets_a_sentence(place, changes, words):
    with pytest.raises(ZTurboError) as error:
        job(place, **changes)
    assert all(word in str(error.value) for word in words), error.value


def test_several_jobs_or_processes_are_named_and_refused(place):
    two = copy.deepcopy(JOB)
    two["config"]["process"] *= 2
    (place / "job.yaml").write_text(yaml.safe_dump(two))
    refused(place, ("2 processes", "'diffusion_trainer', 'diffusion_trainer'", "import each by itself"))
    other = {**JOB, "config": {**JOB["config"], "name": "dog"}}
    (place / "job.yaml").write_text(yaml.safe_dump_all([JOB, other]))
    refused(place, ("2 jobs", "'my_cat_v1', 'dog'", "file of its own"))
    (place / "job.yaml").write_text(yaml.safe_dump({"job": "extension", "config": {"name": "x", "process": []}}))
    refused(place, ("0 processes", "none"))


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.yaml", "job: !!python/object/apply:os.system ['touch hacked']", ("not plain YAML", "python")),
        ("a.yaml", "job: [", ("not plain YAML",)),
        ("a.yaml", "when: 2024-99-99", ("not plain YAML",)),
        ("a.yaml", "a: " + "[" * 5000, ("not plain YAML",)),
        ("a.yaml", "- 1", ("no settings with names",)),
        ("a.yaml", "", ("no settings with names",)),
        ("a.json", "{", ("not JSON",)),
        ("a.toml", "= 3", ("not TOML",)),
        ("a.toml", "lr = 3", ("no trainer's settings", "it has lr")),
        ("a.toml", recipefile.to_toml(recipefile.from_toml("")), ("recipe of this pack already",)),
        ("a.txt", "x", ("ends in .txt", "ai-toolkit")),
        ("a.toml", "[[datasets]]\n[general]\nresolution = 3\n", ("resolution is 3", "64 to 4096")),
        ("a.toml", "datasets = []\n", ("no [[datasets]]",)),
        ("a.yaml", "a: &a\n  b: *a\n", ("no trainer's settings",)),
    ],
)
def test_files_of_another_kind_get_a_sentence_and_run_nothing(place, name, text, words):
    (place / name).write_text(text)
    refused(place, words, name)
    assert not list(place.rglob("hacked"))


def test_a_missing_file_a_huge_one_and_a_missing_package(place, monkeypatch):
    refused(place, ("There is no file", "nowhere.yaml"), "nowhere.yaml")
    (place / "huge.yaml").write_bytes(b" " * 5_000_000)
    refused(place, ("5 MB",), "huge.yaml")
    job(place)
    with pytest.raises(ZTurboError, match="Leave --dataset out"):
        importing.read(place / "job.yaml", place / "set.toml")
    real = builtins.__import__

    def without(name, *more, **options):
        if name == "yaml":
            raise ModuleNotFoundError(name=name)
        return real(name, *more, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    refused(place, ("PyYAML", "pip install pyyaml", "JSON"))


def test_a_training_of_musubi_is_the_same_run_here(place):
    """16 pictures three times, in batches of 2 with 2 to a step: 12 steps an epoch."""
    found = training(place)
    given = found.recipe
    assert found.trainer == "kohya" and recipefile.from_toml(recipefile.to_toml(given)) == given
    assert (given.name, given.steps, given.batch_size, given.seed) == ("my cat", 16 * 12, 2, 42)
    assert (given.network.rank, given.network.alpha, given.network.targets) == (32, 16.0, "attention, feed_forward")
    options = given.optimizer
    assert (options.name, options.learning_rate, options.weight_decay) == ("adamw8bit", 1e-4, 0.01)
    assert options.accumulation == 2 and given.compute.checkpointing and given.compute.dtype == "bf16"
    assert (given.timesteps.density, given.timesteps.mean, given.timesteps.std) == ("logit_normal", 0.6931, 1.0)
    assert (given.saving.every, given.saving.keep, given.saving.dtype) == (
        24,
        4,
        "fp16",
    ) and given.previews.every == 100
    inputs = given.inputs
    assert inputs.pictures == str((place / "pics").resolve()) and inputs.resolutions == str(
        round(math.sqrt(1024 * 768))
    )
    assert (inputs.model, inputs.vae) == ("z_image_turbo_bf16.safetensors", "ae.safetensors")
    assert (
        inputs.text_encoder == "qwen_3_4b.safetensors" and inputs.adapter == ADAPTER and inputs.adapter_strength == 0.8
    )
    assert given.data.caption_dropout == 0 and not given.data.upscale
    assert "an epoch of 48 pictures is 12 steps" in said(found, "max_train_epochs")
    assert said(found, "fp8_base").startswith("left out  fp8_base True: the file decides")


def test_epochs_without_pictures_are_said(place):
    shutil.rmtree(place / "pics")
    found = training(place)
    assert found.recipe.steps == 2000 and "not there to be counted" in said(found, "max_train_epochs")
    assert "not there to be counted" in said(found, "save_every_n_epochs")
    assert training(place, max_train_steps=500).recipe.steps == 500
    (place / "set.toml").unlink()
    found = training(place, max_train_epochs=None)
    assert found.recipe.steps == 1600 and "give it with --dataset" in said(found, "dataset_config")


def test_the_dataset_file_may_be_named_or_lie_in_the_training_file(place):
    (place / "set.toml").rename(place / "other.toml")
    (place / "train.toml").write_text(TRAINING)
    given = importing.read(place / "train.toml", place / "other.toml").recipe
    assert given == training(place, TRAINING + MUSUBI_SET).recipe and given.steps == 192


def test_a_dataset_file_alone_is_a_recipe_of_its_pictures(place):
    found = importing.read(place / "set.toml")
    assert found.recipe.inputs.pictures and found.recipe.batch_size == 2 and found.recipe.steps == 2000
    assert any("pictures only" in line.why for line in found.lines)


SHIFTED = [
    # what stands in the file, and their noise level out of z ~ N(0, 1) and u ~ U(0, 1)
    ({"timestep_sampling": "uniform"}, lambda z, u: u),
    ({"timestep_sampling": "sigmoid"}, lambda z, u: torch.sigmoid(z)),
    ({"timestep_sampling": "sigmoid", "sigmoid_scale": 0.5}, lambda z, u: torch.sigmoid(0.5 * z)),
    ({"timestep_sampling": "shift", "discrete_flow_shift": 2.0}, lambda z, u: flow.shift_sigma(torch.sigmoid(z), 2.0)),
    (
        {"timestep_sampling": "logsnr", "logit_mean": -6.0, "logit_std": 2.0},
        lambda z, u: torch.sigmoid(-(-6.0 + 2.0 * z) / 2),
    ),
    ({"timestep_sampling": "sigma", "discrete_flow_shift": 1.0}, lambda z, u: 1 - u),
    ({"timestep_sampling": "sigma", "discrete_flow_shift": 3.0}, lambda z, u: flow.shift_sigma(1 - u, 3.0)),
    (
        {
            "timestep_sampling": "sigma",
            "weighting_scheme": "logit_normal",
            "logit_mean": 0.5,
            "discrete_flow_shift": 2.0,
        },
        lambda z, u: flow.shift_sigma(1 - torch.sigmoid(0.5 + z), 2.0),
    ),
]


@pytest.mark.parametrize(("settings", "theirs"), SHIFTED)
def test_noise_levels_of_musubi_are_drawn_alike(place, settings, theirs):
    """Quantiles of theirs, written out, and of ours."""
    given = training(place, **{"discrete_flow_shift": None, "weighting_scheme": None, **settings}).recipe.timesteps
    random = flow.generator(0)
    z, u = torch.randn(40000, generator=random), torch.rand(40000, generator=random)
    ours = flow.sample_sigma(given.density, 40000, flow.generator(1), 3.0, given.mean, given.std)
    at = torch.linspace(0.05, 0.95, 7)
    assert torch.allclose(ours.quantile(at), theirs(z, u).quantile(at), atol=0.015)


@pytest.mark.parametrize(
    ("settings", "density", "words"),
    [
        ({"timestep_sampling": "flux_shift"}, "weighted", "no noise levels are chosen so"),
        ({"timestep_sampling": "sigma", "discrete_flow_shift": 5.0}, "shift", "and no other"),
        ({"timestep_sampling": None, "discrete_flow_shift": None}, "linear", ""),
    ],
)
def test_noise_levels_that_are_not_here_are_said(place, settings, density, words):
    found = training(place, **settings)
    assert found.recipe.timesteps.density == density
    assert any(words in line.why for line in found.lines)


def test_ranges_and_weights_of_noise_levels(place):
    given = training(place, min_timestep=200, max_timestep=900, weighting_scheme="cosmap").recipe
    assert (given.timesteps.min_sigma, given.timesteps.max_sigma, given.loss.weighting) == (0.2, 0.9, "cosmap")
    given = training(place, timestep_sampling="sigma", min_timestep=200, max_timestep=900).recipe.timesteps
    assert (given.min_sigma, given.max_sigma) == (0.1, 0.8)  # there they count from the noise
    assert "not weighed so" in said(training(place, weighting_scheme="sigma_sqrt"), "weighting_scheme")


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("AdamW", "adamw"),
        ("PagedAdamW8bit", "adamw8bit"),
        ("prodigyopt.Prodigy", "prodigy"),
        ("prodigyplus.ProdigyPlusScheduleFree", "schedule_free"),
        ("schedulefree.AdamWScheduleFree", "schedule_free"),
        ("pytorch_optimizer.CAME", "came"),
        ("Lion8bit", "lion"),
        ("DAdaptAdam", "prodigy"),
        ("SGDNesterov", "adamw"),
        ("Adafactor", "adafactor"),
    ],
)
def test_optimizers_of_kohya(place, theirs, ours):
    given = training(place, optimizer_type=theirs, optimizer_args=["weight_decay=0.05", "betas=(0.9,0.99)"])
    assert given.recipe.optimizer.name == ours and given.recipe.optimizer.weight_decay == 0.05
    assert "nothing here is set by it" in said(given, "betas")
    assert any("rate of its own" in line.why for line in given.lines) == (theirs == "Adafactor")


def test_courses_and_warm_up_of_kohya(place):
    def of(**settings):
        return training(place, max_train_epochs=None, max_train_steps=1000, **settings).recipe.optimizer

    warm = of(lr_scheduler="cosine_with_restarts", lr_scheduler_num_cycles=3, lr_warmup_steps=0.1)
    assert (warm.schedule, warm.restarts, warm.warmup) == ("cosine_restarts", 3, 100)
    assert of(lr_scheduler="constant_with_warmup", lr_warmup_steps=20).warmup == 20
    assert of(lr_scheduler="constant", lr_warmup_steps=20).warmup == 0
    assert of(lr_scheduler="polynomial").schedule == "constant" and of(unet_lr=3e-4).learning_rate == 3e-4


def test_losses_precision_and_saving_of_kohya(place):
    given = training(place, loss_type="smooth_l1", huber_c=0.2, mixed_precision="fp16", prior_loss_weight=0.5).recipe
    assert (given.loss.kind, given.loss.huber_delta, given.compute.dtype) == ("huber", 0.2, "bf16")
    assert given.data.regularisation_weight == 0.5
    given = training(place, mixed_precision="no", save_every_n_steps=50, save_last_n_steps=200, save_precision="float")
    assert (given.recipe.compute.dtype, given.recipe.saving.every, given.recipe.saving.keep) == ("fp32", 50, 4)
    assert given.recipe.saving.dtype == "fp32"
    found = training(place, loss_type="l1", save_precision="fp8", noise_offset=0.03)
    assert found.recipe.loss.kind == "mse" and found.recipe.saving.dtype == "bf16"
    assert "no noise offset" in said(found, "noise_offset") and "bf16, fp16 or fp32" in said(found, "save_precision")


@pytest.mark.parametrize(
    ("module", "arguments", "kind", "factor"),
    [
        ("networks.loha", [], "loha", 8),
        ("networks.lokr", ["factor=4"], "lokr", 4),
        ("networks.lokr", [], "lokr", shared.LARGEST_FACTOR),
        ("lycoris.kohya", ["algo=lokr", "factor=16", "full_matrix=True"], "lokr", 16),
        ("lycoris.kohya", ["algo=lora", "dora_wd=True"], "dora", 8),
        ("lycoris.kohya", ["algo=boft"], "lora", 8),
        ("lycoris.kohya", ["preset=attn-mlp"], "lora", 8),
    ],
)
def test_networks_of_kohya(place, module, arguments, kind, factor):
    found = training(place, network_module=module, network_args=arguments)
    network = found.recipe.network
    assert (network.kind, network.factor) == (kind, factor)
    assert network.targets == ("attention, feed_forward" if module.startswith("networks") else "")


def test_what_networks_of_kohya_have_beside(place):
    more = ["loraplus_lr_ratio=4", "exclude_patterns=[r'.*w1.*']", "verbose=True"]
    found = training(place, network_args=more, network_weights="old.safetensors", network_dim=None, network_alpha=None)
    assert (found.recipe.network.rank, found.recipe.network.alpha) == (4, 1.0)
    assert found.recipe.network.start == "old.safetensors" and "regular expressions" in said(found, "exclude_patterns")
    assert "one rate" in said(found, "loraplus_lr_ratio")
    found = training(place, base_weights=["style.safetensors", f"x/{ADAPTER}"], base_weights_multiplier=[1.0, 0.5])
    assert found.recipe.inputs.adapter == f"x/{ADAPTER}" and found.recipe.inputs.adapter_strength == 0.5
    assert any("one adapter is carried" in line.why for line in found.lines)
    found = training(place, base_weights=None, base_weights_multiplier=None)
    assert any("turbo wears off sooner" in line.why for line in found.lines)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"network_module": "networks.lora_flux"}, "flux"),
        ({"network_module": "networks.lora"}, "Stable Diffusion in sd-scripts, HunyuanVideo in musubi-tuner"),
        ({"network_module": "lycoris.kohya", "dit": "wan2.1_t2v_14B.safetensors"}, "wan2.1_t2v_14B"),
        ({"network_module": "lycoris.kohya", "dit": None, "t5xxl": "t5.safetensors"}, "t5xxl"),
    ],
)
def test_a_training_of_another_model_is_refused_with_what_was_found(place, changes, words):
    with pytest.raises(ZTurboError) as error:
        training(place, **changes)
    assert "another model than Z-Image" in str(error.value) and words in str(error.value)


def test_a_training_that_names_no_model_is_taken_for_z_image_and_says_so(place):
    found = training(place, network_module="lycoris.kohya", dit=None)
    assert "nothing in the file says which model" in found.lines[0].why


def test_sets_of_sd_scripts(place):
    """A subset counts before its dataset, that before general; regularisation doubles an epoch there."""
    shutil.copytree(place / "pics", place / "reg")
    (place / "set.toml").write_text(
        """
[general]
shuffle_caption = true
keep_tokens = 2
flip_aug = true

[[datasets]]
resolution = 512
batch_size = 4
keep_tokens = 3

  [[datasets.subsets]]
  image_dir = 'pics'
  class_tokens = 'zvk cat'
  num_repeats = 2
  caption_dropout_rate = 0.1

  [[datasets.subsets]]
  is_reg = true
  image_dir = 'reg'
"""
    )
    found = training(place)
    given = found.recipe
    assert given.data.shuffle_tags and given.data.keep_tags == 3 and given.data.flip and given.data.upscale
    assert given.data.caption_dropout == 0.1 and given.batch_size == 4 and given.inputs.resolutions == "512"
    assert given.inputs.regularisation == str((place / "reg").resolve())
    assert given.steps == 16 * (2 * 16 * 2) // (4 * 2)
    assert "trigger word" in said(found, "datasets[0].subsets[0].class_tokens")
    assert any("sub-folder named 2_" in line.why for line in found.lines)


def test_a_training_file_of_sd_scripts_that_names_its_folders(place):
    """10_cat is ten times there and here."""
    (place / "train").mkdir()
    (place / "pics").rename(place / "train" / "10_cat")
    text = 'train_data_dir = "train"\nresolution = "512,768"\ntrain_batch_size = 4\nmax_train_epochs = 2\n'
    found = training(place, text, network_module="lycoris.kohya", caption_extension=".txt", color_aug=True)
    assert found.recipe.steps == 2 * 160 // 4 and found.recipe.batch_size == 4
    assert found.recipe.inputs.resolutions == str(round(math.sqrt(512 * 768)))
    assert "encoded once" in said(found, "color_aug")


def test_captions_in_one_file_and_films(place):
    (place / "set.toml").write_text('[[datasets]]\nimage_jsonl_file = "pics/metadata.jsonl"\nresolution = 1024\n')
    assert importing.read(place / "set.toml").recipe.inputs.pictures == str((place / "pics").resolve())
    (place / "set.toml").write_text('[[datasets]]\nimage_jsonl_file = "rows.jsonl"\nresolution = 1024\n')
    found = importing.read(place / "set.toml")
    assert found.recipe.inputs.pictures == "" and "metadata.jsonl" in said(found, "datasets[0].image_jsonl_file")
    (place / "set.toml").write_text('[[datasets]]\nvideo_directory = "films"\nresolution = 512\n')
    assert "films are not trained on" in said(importing.read(place / "set.toml"), "datasets[0].video_directory")


def test_a_musubi_set_without_a_size_has_that_trainers(place):
    (place / "set.toml").write_text('[[datasets]]\nimage_directory = "pics"\n')
    assert importing.read(place / "set.toml").recipe.inputs.resolutions == str(round(math.sqrt(960 * 544)))


def test_preview_prompts_of_kohya(place):
    (place / "p.txt").write_text(
        "# no prompt\na cat, sitting --w 640 --h 488 --d 1 --s 20 --n blurred --l 4\n\na dog\n"
    )
    found = training(place, sample_prompts="p.txt")
    previews = found.recipe.previews
    assert previews.prompts == ("a cat, sitting", "a dog") and (previews.width, previews.height) == (640, 480)
    assert previews.seed == 1 and "nothing is there" in said(training(place, sample_prompts="q.txt"), "sample_prompts")
    (place / "p.toml").write_text(
        '[prompt]\nwidth = 512\n[[prompt.subset]]\nprompt = "a"\n[[prompt.subset]]\nprompt = "b"\n'
    )
    assert kohya_prompts.read_prompts(place / "p.toml") == [Drawn("a", 512), Drawn("b", 512)]
    (place / "p.json").write_text('["a", {"prompt": "b", "seed": 3}, {}]')
    assert kohya_prompts.read_prompts(place / "p.json") == [Drawn("a"), Drawn("b", None, None, 3)]
    (place / "p.json").write_text("[")
    with pytest.raises(ZTurboError, match="no JSON"):
        kohya_prompts.read_prompts(place / "p.json")


@pytest.mark.parametrize(("name", "ours"), [("my:cat/v1", "my_cat_v1"), ("con", "my_lora"), ("", "my_lora")])
def test_names_that_are_no_folders(place, name, ours):
    given = copy.deepcopy(JOB)
    given["config"]["name"] = name
    (place / "job.json").write_text(json.dumps(given))
    assert importing.read(place / "job.json").recipe.name == ours


def test_a_shift_is_a_logit_normal_of_its_logarithm():
    assert kohya.density("shift", 3.0, 1.0, (0.0, 1.0))[:3] == ("logit_normal", math.log(3), 1.0)
