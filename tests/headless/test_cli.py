"""The command line, without ComfyUI.

It can train, stop, resume, sample, inspect, convert and plan, and says what is wrong with bad recipes.
"""

import importlib.metadata
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers", reason="needs diffusers: run `python dev.py test`, which brings it")

from zturbo import cli, filenames, keeping, recipefile, runfolder, runlog
from zturbo.cli import training
from zturbo.hosts import diffusers_tiny
from zturbo.lowrank import Target
from zturbo.recipe import Compute, Network, Recipe

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """
name = "cat"
steps = 12
batch_size = 2

[network]
rank = 4
alpha = 4.0

[optimizer]
learning_rate = 1e-3

[compute]
dtype = "fp32"
checkpointing = false

[turbo]
every = 0

[saving]
every = 3

[inputs]
model = "tiny"
adapter = "tiny"
pictures = "PICTURES"
trigger = "zsmile"
resolutions = "128"
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.toml").write_text(RECIPE.replace("PICTURES", diffusers_tiny.PICTURES.as_posix()))
    return tmp_path


def lines(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]


def run(*arguments: str) -> int:
    return cli.main([*arguments, "--host", "diffusers", "--json"])


def losses(path: Path) -> list[float]:
    return [event["loss"] for event in runlog.read_events(path / "events.jsonl") if "loss" in event]


def test_a_recipe_is_trained_drawn_with_and_repeats(folder, capsys):
    assert run("train", "recipe.toml") == 0
    told = lines(capsys)
    first = folder / "zturbo_runs" / "cat"
    assert (
        told[0]["event"] == "start"
        and sum(line["event"] == "step" for line in told) == 12
        and told[-1]
        == {"event": "end", "how": "finished", "saved": 12, "lora": str(Path("zturbo_runs/cat/lora.safetensors"))}
    )
    assert run("train", str(first / "recipe.toml"), "--set", "name=again") == 0  # the run's own recipe, inputs and all
    again = folder / "zturbo_runs" / "again"
    one, two = load_file(first / "lora.safetensors"), load_file(again / "lora.safetensors")
    assert losses(first) == losses(again) and all(torch.equal(one[key], two[key]) for key in one)
    capsys.readouterr()
    assert (
        run(
            "sample",
            "--model",
            "tiny",
            "--lora",
            str(first / "lora.safetensors"),
            "--before",
            "--size",
            "64x96",
            "--prompt",
            "a red star",
            "--prompt",
            "a large zsmile on a blue background",
        )
        == 0
    )
    pictures = lines(capsys)[0]["images"]
    assert len(pictures) == 2
    for picture in pictures:
        with Image.open(picture) as image:
            assert (
                image.size == (128, 96)
                and image.crop((0, 0, 64, 96)).tobytes() != image.crop((64, 0, 128, 96)).tobytes()
            )


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "zturbo",
        "train",
        "recipe.toml",
        "--set",
        "steps=200",
        "--host",
        "diffusers",
        *arguments,
    ]
    return subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_step(folder: Path, step: int, worker: subprocess.Popen):
    deadline = time.monotonic() + 120
    while len(losses(folder)) < step:
        assert worker.poll() is None and time.monotonic() < deadline, worker.stderr.read()
        time.sleep(0.02)


def test_ctrl_c_stops_and_keeps_and_a_killed_run_goes_on_to_the_same_bits(folder):
    worker, run_folder = start(folder), folder / "zturbo_runs" / "cat"
    wait_for_step(run_folder, 4, worker)
    worker.kill()
    worker.wait()
    reached = len(losses(run_folder))
    worker = start(folder)
    wait_for_step(run_folder, reached + 3, worker)
    worker.send_signal(signal.SIGINT)
    out, _ = worker.communicate(timeout=60)
    assert worker.returncode == 3 and str(Path("zturbo_runs/cat/lora.safetensors")) in out
    done = len(losses(run_folder))
    assert reached < done < 200 and runlog.how_ended(run_folder) == "stopped"
    assert run("train", "recipe.toml", "--set", f"steps={done}", "--set", "name=whole") == 0
    one, two = (
        load_file(run_folder / "lora.safetensors"),
        load_file(folder / "zturbo_runs" / "whole" / "lora.safetensors"),
    )
    assert losses(run_folder) == losses(folder / "zturbo_runs" / "whole") and all(
        torch.equal(one[key], two[key]) for key in one
    )


def test_resume_goes_on_with_a_stopped_run(folder, capsys):
    assert run("train", "recipe.toml", "--set", "steps=9") == 0
    path = folder / "zturbo_runs" / "cat"
    runfolder.request(path, runfolder.STOP)
    capsys.readouterr()
    assert run("resume", str(path)) == 0
    assert lines(capsys)[-1]["how"] == "finished" and not (path / "stop").exists()
    assert run("resume", str(folder)) == 1 and "no run folder" in lines(capsys)[-1]["error"]


def test_resume_takes_up_the_run_that_is_named_and_no_other(folder, capsys):
    for _ in range(2):
        assert run("train", "recipe.toml", "--set", "steps=4", "--resume", "new") == 0
    first = (folder / "zturbo_runs" / "cat").rename(folder / "zturbo_runs" / "kept")
    capsys.readouterr()
    assert run("resume", str(first)) == 0
    assert lines(capsys)[0]["run"] == str(first)
    settings = first / "recipe.toml"
    settings.write_text(settings.read_text().replace("seed = 0", "seed = 1", 1))
    before = sorted(first.parent.iterdir())
    assert run("resume", str(first)) == 1
    assert (
        "cannot go on: it had other settings (seed)" in lines(capsys)[-1]["error"]
        and sorted(first.parent.iterdir()) == before
    )


def test_a_run_that_was_stopped_says_how_to_go_on(folder, capsys):
    assert run("train", "recipe.toml") == 0
    path = folder / "zturbo_runs" / "cat"
    runfolder.request(path, runfolder.STOP)
    runfolder.RunFolder(path).event(event="end", how="stopped", saved=12)
    capsys.readouterr()
    assert run("train", "recipe.toml") == 0
    assert any("was stopped at step 12, and hands on what it has" in line.get("text", "") for line in lines(capsys))


def test_a_run_that_another_process_trains_is_left_alone(folder, capsys):
    assert run("train", "recipe.toml") == 0
    path = folder / "zturbo_runs" / "cat"
    other = runfolder.RunFolder(path)
    assert other.take() and runfolder.RunFolder(path).is_live()
    before = (path / "events.jsonl").read_bytes()
    runfolder.request(path, runfolder.STOP)
    capsys.readouterr()
    assert run("resume", str(path)) == 1 and "being trained right now" in lines(capsys)[-1]["error"]
    assert (path / "stop").exists() and (path / "events.jsonl").read_bytes() == before
    assert run("train", "recipe.toml") == 0 and lines(capsys)[0]["run"] == str(Path("zturbo_runs/cat_2"))
    other.release()
    assert not runfolder.RunFolder(path).is_live()


def test_a_lora_without_its_checkpoints_is_not_written_over(folder, capsys):
    assert run("train", "recipe.toml") == 0
    path = folder / "zturbo_runs" / "cat"
    shutil.rmtree(path / "checkpoints")
    before = (path / "lora.safetensors").read_bytes()
    capsys.readouterr()
    assert run("resume", str(path)) == 1 and "no checkpoint to go on from" in lines(capsys)[-1]["error"]
    assert run("train", "recipe.toml") == 0
    told = lines(capsys)
    assert told[0]["run"] == str(Path("zturbo_runs/cat_2")) and any(
        "A new run begins: cat has no checkpoint" in line.get("text", "") for line in told
    )
    assert (path / "lora.safetensors").read_bytes() == before


def test_a_second_ctrl_c_ends_at_once_and_says_what_is_kept(folder):
    worker, run_folder = (
        start(folder, "--set", "previews.prompts=['a']", "--set", "previews.every=0"),
        folder / "zturbo_runs" / "cat",
    )
    wait_for_step(run_folder, 4, worker)
    for _ in range(2):
        worker.send_signal(signal.SIGINT)
        time.sleep(0.2)
    _, told = worker.communicate(timeout=60)
    assert worker.returncode in (3, 130) and (
        worker.returncode == 3 or "is saved as" in told and "Traceback" not in told
    )


def test_a_run_goes_on_when_nobody_reads_what_it_prints(folder):
    command = f"{shlex.quote(sys.executable)} -m zturbo train recipe.toml --host diffusers --json | head -n 2"
    told = subprocess.run(
        command, shell=True, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert len(told.stdout.splitlines()) == 2 and "Traceback" not in told.stderr
    assert runlog.how_ended(folder / "zturbo_runs" / "cat") == "finished"


def test_a_recipe_may_come_from_windows_and_not_from_elsewhere(folder, capsys):
    text = (folder / "recipe.toml").read_text()
    (folder / "recipe.toml").write_text("\ufeff" + text)
    assert run("plan", "recipe.toml") == 0
    (folder / "recipe.toml").write_bytes(text.replace("cat", "kätzchen").encode("latin-1"))
    capsys.readouterr()
    assert run("plan", "recipe.toml") == 1 and "UTF-8" in lines(capsys)[-1]["error"]


def test_plan_needs_no_text_encoder(folder, capsys):
    (folder / "recipe.toml").write_text(
        (folder / "recipe.toml").read_text().replace('model = "tiny"', f'model = "{diffusers_tiny.MODEL.as_posix()}"')
    )
    assert run("plan", "recipe.toml") == 0 and lines(capsys)[0]["steps"] == 12
    assert run("train", "recipe.toml") == 1 and "inputs.text_encoder is empty" in lines(capsys)[-1]["error"]


def test_an_old_library_gets_the_command_that_brings_a_new_one(folder, capsys, monkeypatch):
    monkeypatch.setattr(
        importlib.metadata, "version", lambda package: {"diffusers": "0.36.dev0", "transformers": "4.57.3"}[package]
    )
    assert run("train", "recipe.toml") == 1
    told = lines(capsys)[-1]["error"]
    assert (
        "transformers 4.57.3" in told
        and "pip install" in told
        and "'transformers>=5.0'" in told
        and "diffusers 0" not in told
    )


def test_plan_counts_and_starts_nothing(folder, capsys):
    assert run("plan", "recipe.toml") == 0
    facts = lines(capsys)[0]
    assert (
        facts["steps"] == 12
        and facts["buckets"] == {"112x144": 4, "128x128": 8, "144x112": 4}
        and facts["batches_per_epoch"] == 8
        and facts["epochs"] == 1.5
        and 0 < facts["least_step_mb"] < facts["step_mb"]
    )
    assert run("plan", "recipe.toml", "--set", "batch_size=1") == 0
    alone = lines(capsys)[0]
    assert alone["least_step_mb"] == facts["least_step_mb"] <= alone["step_mb"] < facts["step_mb"]
    assert run("train", "recipe.toml", "--set", "steps=1") == 0
    state = load_file(folder / "zturbo_runs" / "cat" / "lora.safetensors")
    assert (
        facts["trained_numbers"] == sum(tensor.numel() for tensor in state.values())
        and f"in {len(state) // 2} places" in facts["network"]
    )


@pytest.mark.parametrize("fast", [True, False])
def test_plan_tells_the_real_models_step(fast):
    """Of the widths in its layers, not of the time's Linear, which comes first in a file."""
    names = {"adaLN_modulation.0": (256, 4 * 3840), "feed_forward.w1": (3840, 10240), "feed_forward.w2": (10240, 3840)}
    layers = [Target(f"layers.{n}.{name}", *size, ()) for n in range(30) for name, size in names.items()]
    given = Recipe(network=Network(16, 16.0), compute=Compute("bf16"))
    whole, least = training.step_bytes(given, layers, 4224, fast)
    if fast:
        sizes = keeping.Sizes(30, 3840, 10240, 30, 7 * 16, 2)
        assert (whole, least) == (keeping.plan(sizes, 4224, 0, 30).bytes, keeping.plan(sizes, 4224, 0, 0).bytes)
    assert 10e9 < whole < 40e9 and 1e9 < least < 3e9


@pytest.mark.parametrize("kind", ["dora", "lokr", "loha"])
def test_plan_counts_every_network_as_it_is_trained(folder, capsys, kind):
    assert run("plan", "recipe.toml", "--set", f"network.kind={kind}") == 0
    facts = lines(capsys)[0]
    assert run("train", "recipe.toml", "--set", "steps=1", "--set", f"network.kind={kind}") == 0
    notes = [
        event["text"]
        for event in runlog.read_events(folder / "zturbo_runs" / "cat" / "events.jsonl")
        if event.get("event") == "note"
    ]
    assert facts["network"] in notes and f"{facts['trained_numbers']:,} numbers" in facts["network"]


def test_plan_refuses_what_does_not_fit(folder, capsys):
    save_file(
        {
            "layers.0.attention.to_q.lora_A.weight": torch.zeros(2, 64),
            "layers.0.attention.to_q.lora_B.weight": torch.zeros(64, 2),
        },
        folder / "other.safetensors",
    )
    assert run("plan", "recipe.toml", "--adapter", "other.safetensors") == 1
    assert "other.safetensors" in lines(capsys)[-1]["error"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("steps = 12", "stepps = 12"), ("stepps", "steps")),
        (("steps = 12", 'steps = "many"'), ("steps", "'many'", "whole number")),
        (("steps = 12", "steps = 0"), ("steps", "0", "at least 1")),
        (("steps = 12", "steps = ["), ("TOML",)),
        (("rank = 4", "rnk = 4"), ("network.rnk", "rank")),
        (('trigger = "zsmile"', "trigger = 3"), ("inputs.trigger", "3", "text")),
        (('pictures = "', 'pictures = "/nowhere'), ("inputs.pictures", "/nowhere", "nothing is there")),
        (
            ('model = "tiny"', 'model = "/nowhere.safetensors"\ntext_encoder = "a"\nvae = "b"'),
            ("inputs.model", "/nowhere.safetensors"),
        ),
        (('model = "tiny"', ""), ("inputs.model", "--model")),
        (("every = 0", 'every = 0\nkeep = "restore"\nstop_above = 0.5'), ("stop_above",)),
        (('resolutions = "128"', 'resolutions = "12x"'), ("12x",)),
        (('resolutions = "128"', 'resolutions = ""'), ("inputs.resolutions", "--resolutions")),
        (
            ('model = "tiny"', f'model = "{"x" * 300}"\ntext_encoder = "a"\nvae = "b"'),
            ("inputs.model", "nothing is there"),
        ),
        (("rank = 4", 'rank = 4\ntargets = "nonsense"'), ("nonsense", "feed_forward.w1")),
        (("rank = 4", 'rank = 4\nlayers = "99"'), ("layers", "99")),
        (("rank = 4", 'rank = 4\nstart = "/nowhere.safetensors"'), ("/nowhere.safetensors", "network.start")),
        (("steps = 12", "steps = 12\npreviews.width = 100"), ("previews.width", "100", "multiple of 16")),
        (("steps = 12", 'steps = 12\npreviews.sampler = "foo"'), ("previews.sampler", "foo", "euler")),
    ],
)
def test_a_bad_recipe_gets_a_sentence_and_nothing_is_started(folder, capsys, change, words):
    text = (folder / "recipe.toml").read_text()
    assert change[0] in text
    (folder / "recipe.toml").write_text(text.replace(*change))
    assert run("train", "recipe.toml") == 1
    told = lines(capsys)[-1]["error"]
    assert all(word in told for word in words), told
    left = [path for path in (folder / "zturbo_runs").rglob("*") if not path.name.endswith(".files.json")]
    assert [path.name for path in left] in ([], [".cache"])  # no run; what its pictures are may be known


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("steps", "KEY=VALUE"),
        ("name.x=1", "no section"),
        ("optimizer.rate=1", "optimizer.rate"),
        ("seed=-1", "at least 0"),
    ],
)
def test_bad_settings_get_a_sentence(folder, capsys, setting, words):
    assert run("plan", "recipe.toml", "--set", setting) == 1 and words in lines(capsys)[-1]["error"]


def test_inspect_and_convert(folder, capsys):
    state, rank = {}, 4
    for letter in "qkv":  # kohya's names
        stem = f"lora_unet_layers_0_attention_to_{letter}"
        state |= {
            f"{stem}.lora_down.weight": torch.randn(rank, 256),
            f"{stem}.lora_up.weight": torch.randn(256, rank),
            f"{stem}.alpha": torch.tensor(2.0),
        }
    save_file(state, folder / "kohya.safetensors", metadata={"ss_network_dim": "4"})
    assert cli.main(["inspect", "kohya.safetensors", "--json"]) == 0
    facts = lines(capsys)[0]
    delta = (
        0.5
        * state["lora_unet_layers_0_attention_to_q.lora_up.weight"]
        @ state["lora_unet_layers_0_attention_to_q.lora_down.weight"]
    )
    assert (
        facts["rank"] == [4]
        and facts["dtype"] == ["float32"]
        and facts["targets"] == ["attention.to_k", "attention.to_q", "attention.to_v"]
        and facts["metadata"]["ss_network_dim"] == "4"
    )
    assert facts["parts"]["layers.0.attention.to_q"]["norm"] == pytest.approx(delta.norm().item(), rel=1e-5)
    assert cli.main(["convert", "kohya.safetensors", "ours.safetensors", "--dtype", "fp32"]) == 0
    made = load_file(folder / "ours.safetensors")
    assert torch.equal(
        made["diffusion_model.layers.0.attention.to_k.lora_B.weight"],
        state["lora_unet_layers_0_attention_to_k.lora_up.weight"],
    )
    capsys.readouterr()
    place = "diffusion_model.layers.29.feed_forward.w1"
    save_file(
        {f"{place}.lora_A.weight": torch.zeros(2, 256), f"{place}.lora_B.weight": torch.zeros(768, 2)},
        folder / "elsewhere.safetensors",
    )
    draw = ["sample", "--model", "tiny", "--prompt", "x", "--host", "diffusers"]
    for bad, words in (
        ([*draw, "--lora", "elsewhere.safetensors"], "does not fit this model"),
        ([*draw, "--out", "kohya.safetensors"], "--out"),
        ([*draw, "--size", "00x16"], "--size is '00x16'"),
        ([*draw, "--strength", "nan"], "--strength is nan"),
        (["convert", "kohya.safetensors", "ours.safetensors"], "--overwrite"),
        (["convert", "kohya.safetensors", "ours.bin"], ".safetensors"),
        (["inspect", "none.safetensors"], "no file"),
        (["inspect", "recipe.toml"], "recipe.toml"),
        (["sample", "--model", "tiny", "--prompt", "x", "--size", "100x100"], "multiples of 16"),
        (["sample", "--model", "tiny", "--prompt", "x", "--size", "128x128", "--steps", "0"], "--steps is 0"),
        (["plan", "none.toml"], "no recipe"),
    ):
        assert cli.main([*bad, "--json"]) == 1 and words in lines(capsys)[-1]["error"], bad


def test_the_adapter_is_inspected(capsys):
    assert cli.main(["inspect", str(diffusers_tiny.ADAPTER), "--parts"]) == 0
    told = capsys.readouterr().out
    assert "rank      8" in told and "layers.0.attention.to_q: LoRA of rank 8, 256 x 256" in told


def test_help_reads_like_a_manual(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    told = capsys.readouterr().out
    assert (
        ended.value.code == 0
        and "examples:" in told
        and "Ctrl-C" in told
        and all(name in told for name in ("train", "resume", "sample", "inspect", "convert", "plan"))
    )


def test_the_demos_recipe_is_whole():
    given = recipefile.read(ROOT / "models" / "tiny" / "demo.toml")
    assert given.inputs.model == "tiny" and given.turbo.guarded and (ROOT / given.inputs.pictures).is_dir()


def test_the_package_installs_and_brings_its_tokenizer(tmp_path):
    """What setuptools, and so pip, makes of the folder: the package alone, no models."""
    source = tmp_path / "source"
    shutil.copytree(ROOT / "zturbo", source / "zturbo", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, source)
    build = [
        sys.executable,
        "-c",
        "from setuptools import setup; setup()",
        "build",
        "--build-lib",
        str(tmp_path / "there"),
    ]
    subprocess.run(build, cwd=source, check=True, capture_output=True)
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["zturbo"]
    code = (
        "from zturbo.hosts import diffusers_load as d; "
        "print(d.__file__, d.bundled_tokenizer().decode(d.bundled_tokenizer().encode('zsmile')))"
    )
    told = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "there")},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert str(tmp_path / "there") in told and told.endswith("zsmile\n")


def killed_at(number: int, *arguments: str) -> bool:
    """Train in a process of its own that is killed at the `number`th thing that it does to its run folders.

    Was it? Not where the run ends before. Such things are a folder made, a file opened to write, a rename.
    """
    child = os.fork()
    if child:
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])
    done = 0

    def watch(event: str, given: tuple):
        nonlocal done
        if event in ("os.mkdir", "os.rename") or (
            event == "open" and given[2] & (os.O_WRONLY | os.O_RDWR | os.O_APPEND)
        ):
            done += "zturbo_runs" in str(given[0]) and ".cache" not in str(given[0])
            if done > number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    try:
        run("train", "recipe.toml", *arguments)
    finally:
        os._exit(0)


JOB = """
job: extension
config:
  name: imported_cat
  process:
    - type: sd_trainer
      trigger_word: zsmile
      network: {type: lora, linear: 4, linear_alpha: 4}
      save: {save_every: 2}
      datasets:
        - {folder_path: PICTURES, resolution: [128]}
      train: {steps: 3, lr: 1e-3, optimizer: adamw, timestep_type: weighted, noise_offset: 0.1}
      model: {arch: "zimage:turbo", name_or_path: Tongyi-MAI/Z-Image-Turbo, assistant_lora_path: x/adapter.safetensors}
"""


def test_another_trainers_job_is_imported_and_trained(folder, capsys):
    """What is not here is said, and given as options; the recipe is not written over."""
    (folder / "job.yaml").write_text(JOB.replace("PICTURES", diffusers_tiny.PICTURES.as_posix()))
    assert cli.main(["import", "job.yaml", "--output", "mine.toml"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert "taken     train.steps 3 -> steps 3" in told
    assert any(line.startswith("left out  train.noise_offset 0.1: there is no noise offset here") for line in told)
    assert told[-1].endswith("python -m zturbo plan mine.toml --model … --text-encoder … --vae …")
    assert cli.main(["import", "job.yaml", "--output", "mine.toml", "--json"]) == 1
    assert "there already" in lines(capsys)[-1]["error"]
    assert run("train", "mine.toml", "--model", "tiny") == 1
    assert "inputs.adapter is 'adapter.safetensors', and nothing is there" in lines(capsys)[-1]["error"]
    assert run("train", "mine.toml", "--model", "tiny", "--adapter", "tiny") == 0
    assert lines(capsys)[-1]["saved"] == 3
    assert cli.main(["import", "job.yaml", "--output", "mine.toml", "--overwrite", "--json"]) == 0
    facts = lines(capsys)[0]
    assert facts["trainer"] == "ai-toolkit" and {one["how"] for one in facts["settings"]} >= {"taken", "left out"}
    assert recipefile.read(folder / "mine.toml").name == "imported_cat"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("recipe.toml", "--output", "new.toml"), "recipe of this pack already"),
        (("nowhere.yaml",), "There is no file nowhere.yaml"),
        (("job.yaml", "--output", "new.txt"), "does not end in .toml"),
        (("job.yaml", "--output", "no/folder/new.toml"), "cannot be written"),
    ],
)
def test_an_import_that_cannot_be_gets_a_sentence(folder, capsys, arguments, words):
    (folder / "job.yaml").write_text(JOB)
    if "--output" not in arguments:
        arguments += ("--output", "new.toml")
    assert cli.main(["import", *arguments, "--json"]) == 1
    assert words in lines(capsys)[-1]["error"] and not (folder / "new.toml").exists()


NEWS = ("A new run begins",)


def what_was_said(path: Path) -> list[str]:
    return [
        event["text"] for event in runlog.read_events(path / "events.jsonl") if event.get("text", "").startswith(NEWS)
    ]


@pytest.mark.skipif(
    not hasattr(os, "fork"), reason="a process that is killed at a chosen moment is made by fork, which Windows has not"
)
def test_a_run_that_is_killed_at_any_moment_before_its_first_step_is_taken_up_in_its_folder(folder):
    """Also with other settings, as nothing was learnt: until its start event is written.

    The bits are those of a run that was never cut off.
    """
    (folder / "recipe.toml").write_text((folder / "recipe.toml").read_text().replace("steps = 12", "steps = 1"))
    assert run("train", "recipe.toml", "--set", "name=whole") == 0
    moments, runs = 0, folder / "zturbo_runs"
    while killed_at(moments):
        left = {path.relative_to(runs).as_posix() for path in runs.rglob("*") if "cat" in path.parts}
        begun = bool(runlog.start_of(runs / "cat"))
        assert run("train", "recipe.toml", *(("--set", "batch_size=1") if moments % 2 and not begun else ())) == 0
        assert [path.name for path in runs.glob("cat*")] == ["cat"] and what_was_said(runs / "cat") == [], left
        if not moments % 2 or begun:
            assert losses(runs / "cat") == losses(runs / "whole")
        shutil.rmtree(runs / "cat")
        moments += 1
        if begun:
            break
    assert moments >= 6  # the folder, the recipe twice, two folders in it, the lock, the log


@pytest.mark.skipif(
    not hasattr(os, "fork"), reason="a process that is killed at a chosen moment is made by fork, which Windows has not"
)
def test_a_run_from_a_checkpoint_that_is_killed_before_its_first_step_is_taken_up_from_there(folder):
    assert run("train", "recipe.toml", "--set", "name=base", "--set", "steps=1") == 0
    more = ("--set", "steps=2", "--resume", "base/step_000001")
    assert run("train", "recipe.toml", "--set", "name=whole", *more) == 0
    moments, runs = 0, folder / "zturbo_runs"
    while killed_at(moments, *more):
        begun = (
            "total" in runlog.start_of(runs / "cat") and runlog.start_of(runs / "cat")["source"] == "base/step_000001"
        )
        assert run("train", "recipe.toml", *more) == 0
        assert (
            [path.name for path in runs.glob("cat*")] == ["cat"]
            and losses(runs / "cat") == losses(runs / "whole")
            and len(losses(runs / "cat")) == 2
        ), moments
        shutil.rmtree(runs / "cat")
        moments += 2
        if begun:
            break
    assert moments >= 8


@pytest.mark.parametrize(
    "left", ["nothing", "half a recipe", "an empty log", "half a start event", "a recipe and no more"]
)
def test_what_a_run_leaves_that_never_began_is_taken_up_by_train_and_resume(folder, capsys, left):
    cat = folder / "zturbo_runs" / "cat"
    cat.mkdir(parents=True)
    if left == "half a recipe":
        (cat / "recipe.toml.part").write_text('name = "ca')
    elif left != "nothing":
        assert run("train", "recipe.toml", "--set", "name=other", "--set", "steps=1") == 0
        shutil.copy(folder / "zturbo_runs" / "other" / "recipe.toml", cat)
        (cat / "recipe.toml").write_text(
            (cat / "recipe.toml").read_text().replace('"other"', '"cat"').replace("steps = 1", "steps = 4")
        )
    if left in ("an empty log", "half a start event"):
        (cat / "events.jsonl").write_text("" if left == "an empty log" else '{"event": "start", "total": 12, "tea')
    if left in ("nothing", "half a recipe"):
        assert run("resume", str(cat)) == 1 and "is no run folder" in lines(capsys)[-1]["error"]
        assert run("train", "recipe.toml", "--set", "steps=4") == 0
    else:
        assert run("resume", str(cat)) == 0
    assert len(losses(cat)) == 4 and runlog.start_of(cat)["teaches"] and what_was_said(cat) == []
    assert sorted(path.name for path in cat.parent.glob("cat*")) == ["cat"]


def test_a_log_that_lost_its_beginning_is_said_to_have_and_what_was_learnt_stays(folder, capsys):
    assert run("train", "recipe.toml", "--set", "steps=3") == 0
    cat = folder / "zturbo_runs" / "cat"
    log = (cat / "events.jsonl").read_text().splitlines(keepends=True)
    (cat / "events.jsonl").write_text("".join(['{"event": "sta\n', *(line for line in log[1:] if '"end"' not in line)]))
    before = (cat / "lora.safetensors").read_bytes()
    assert run("train", "recipe.toml", "--set", "steps=3") == 0
    (said,) = what_was_said(folder / "zturbo_runs" / "cat_2")
    assert said == "A new run begins: cat, which was cut off, has no log of what it was given."
    assert (cat / "lora.safetensors").read_bytes() == before
    assert run("resume", str(cat)) == 1
    said = (
        "The run cat cannot go on: it has no log of what it was given. "
        "Train a new run that goes on from its newest checkpoint (with cat in resume)."
    )
    assert said in lines(capsys)[-1]["error"]


def said_of(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "zturbo", *arguments]
    return subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT), **variables}, capture_output=True
    )


def test_a_console_without_every_letter_is_no_fault(folder):
    """As Windows' own, or its pipes."""
    (folder / "cats").mkdir()
    Image.new("RGB", (64, 64)).save(folder / "cats" / "猫.png")
    (folder / "cats" / "lost.txt").write_text("x")
    told = said_of(folder, "plan", "recipe.toml", "--pictures", "cats", PYTHONIOENCODING="cp1252")
    assert told.returncode == 0 and b"Traceback" not in told.stderr, told.stderr
    save_file(
        {
            "diffusion_model.layers.0.attention.to_q.lora_A.weight": torch.ones(1, 8),
            "diffusion_model.layers.0.attention.to_q.lora_B.weight": torch.ones(8, 1),
        },
        folder / "a.safetensors",
        {"猫": "猫"},
    )
    told = said_of(folder, "inspect", "a.safetensors", PYTHONIOENCODING="cp1252")
    assert told.returncode == 0 and b"\\u732b" in told.stdout


@pytest.mark.parametrize("pictures", ['"C:\\Users\\me\\pics"', '"D:\\new\\train"', '"\\\\server\\share"'])
def test_a_windows_path_in_double_quotes_is_named_as_the_reason(folder, pictures):
    (folder / "recipe.toml").write_text(f"[inputs]\npictures = {pictures}\n")
    told = said_of(folder, "plan", "recipe.toml")
    assert told.returncode == 1 and b"single quotes" in told.stderr, told.stderr


def test_a_tilde_is_the_home_folder(folder):
    shutil.copytree(diffusers_tiny.PICTURES, folder / "home" / "pics")
    told = said_of(
        folder,
        "plan",
        "recipe.toml",
        "--pictures",
        "~/pics",
        HOME=str(folder / "home"),
        USERPROFILE=str(folder / "home"),
    )
    assert told.returncode == 0, told.stderr


def test_comfyui_is_found_where_the_pack_is_a_link(tmp_path):
    """custom_nodes/pack leads to another drive."""
    (tmp_path / "ComfyUI" / "comfy").mkdir(parents=True)
    for name in ("main.py", "comfy/sd.py"):
        (tmp_path / "ComfyUI" / name).write_text("")
    (tmp_path / "ComfyUI" / "custom_nodes").mkdir()
    (tmp_path / "ComfyUI" / "custom_nodes" / "pack").symlink_to(ROOT, target_is_directory=True)
    code = "from zturbo.cli import hosts; print(hosts.find_comfyui(None))"
    variables = {key: value for key, value in os.environ.items() if key != "COMFYUI_PATH"}
    told = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**variables, "PYTHONPATH": str(tmp_path / "ComfyUI" / "custom_nodes" / "pack"), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert told.stdout.strip() == str(tmp_path / "ComfyUI"), told.stderr


@pytest.mark.parametrize("name", ["ผู้หญิง", "हिन्दी", "cafe\u0301"])
def test_names_in_writings_whose_vowels_are_signs_of_their_own(name):
    assert filenames.file_name(name) and not filenames.bad_name(name)
    assert not filenames.file_name("\u0301cafe") and not filenames.file_name("a\u200bb")
