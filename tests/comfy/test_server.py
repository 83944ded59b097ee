"""The nodes through a real ComfyUI server: laws 1 to 3, real photographs, Stop, Cancel, and bad input."""

import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

sys.path.append(str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1]))
import diffusers_twin
import prompts

import dev
from zturbo import lorafile, recipe, recipefile, runlog
from zturbo.hosts import comfy_draw, comfy_tiny

PROMPT = "a large zsmile on a blue background"


def picture_files(server, outputs, node) -> list[bytes]:
    return [
        (server.base / "output" / image["subfolder"] / image["filename"]).read_bytes()
        for image in outputs[node]["images"]
    ]


def newest_run(server, name) -> Path:
    return max((server.base / "output" / "zturbo").glob(f"{name}*"), key=lambda path: path.stat().st_mtime_ns)


def events(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def failure(server, prompt) -> str:
    try:
        message = dev.error_message(server.wait(server.queue(prompt)))
    except dev.Stop as refusal:  # before anything ran
        message = str(refusal)
    assert message, "the prompt ran although it should not have"
    return message


def train_and_save(server, name: str, **changes) -> Path:
    """Run folder of a training whose LoRA is saved in models/loras under its name."""
    graph = prompts.training(name=name, **changes)
    graph["save"] = prompts.node("ZTurboSaveLoRA", lora=["train", 0], name=name, dtype="bf16", overwrite=True)
    server.run(graph)
    return newest_run(server, name)


def drawn_by_core(server, lora: str) -> bytes:
    """PNG of a LoRA file by core's own nodes.

    These are CLIPTextEncode, LoraLoaderModelOnly, EmptySD3LatentImage, KSampler, VAEDecode, SaveImage.
    """
    core = {
        "load": prompts.load(),
        "lora": prompts.node(
            "LoraLoaderModelOnly", model=["load", 0], lora_name=f"{lora}.safetensors", strength_model=1.0
        ),
        "text": prompts.node("CLIPTextEncode", clip=["load", 1], text=PROMPT),
        "none": prompts.node("ConditioningZeroOut", conditioning=["text", 0]),
        "empty": prompts.node("EmptySD3LatentImage", width=64, height=64, batch_size=1),
        "sample": prompts.node(
            "KSampler",
            model=["lora", 0],
            seed=3,
            steps=8,
            cfg=1.0,
            sampler_name="euler",
            scheduler="simple",
            positive=["text", 0],
            negative=["none", 0],
            latent_image=["empty", 0],
            denoise=1.0,
        ),
        "decode": prompts.node("VAEDecode", samples=["sample", 0], vae=["load", 2]),
        "save": prompts.save_image(["decode", 0]),
    }
    (drawn,) = picture_files(server, server.run(core), "save")
    return drawn


def test_last_preview_is_what_cores_own_nodes_draw_from_the_saved_file(server):
    """Law 3, to the byte."""
    run = train_and_save(server, "truth", preview_every=2)
    preview = sorted((run / "previews").glob("*.png"))[-1]
    assert preview.name == "step_000004_0.png"
    assert preview.read_bytes() == drawn_by_core(server, "truth")
    first = sorted((run / "previews").glob("*.png"))[0]
    assert first.read_bytes() != preview.read_bytes()
    thumbnail = lorafile.read(server.base / "models" / "loras" / "truth.safetensors").metadata["modelspec.thumbnail"]
    assert thumbnail == lorafile.thumbnail([np.asarray(Image.open(preview))])[
        "modelspec.thumbnail"
    ] and thumbnail.startswith("data:image/jpeg;base64,")


@pytest.mark.parametrize(
    "kind, part", [("lora", "lora_A.weight"), ("dora", "dora_scale"), ("lokr", "lokr_w1"), ("loha", "hada_w1_a")]
)
def test_every_network_trains_and_draws_what_core_draws(server, kind, part):
    graph = prompts.training(name=kind, steps=6, alpha=2.0)
    graph["network"] = prompts.node(
        "ZTurboNetworkOptions",
        kind=kind,
        factor=4,
        targets="attention:2, feed_forward",
        layers="1-2",
        start_from="nothing",
    )
    graph["train"]["inputs"]["network_options"] = ["network", 0]
    graph["save"] = prompts.node(
        "ZTurboSaveLoRA", lora=["train", 0], name=f"network_{kind}", dtype="fp32", overwrite=True
    )
    server.run(graph)
    run = newest_run(server, kind)
    assert recipefile.read(run / "recipe.toml").network == recipe.Network(
        4, 2.0, kind, 4, "attention:2, feed_forward", "1-2"
    )
    losses = [event["loss"] for event in events(run) if "loss" in event]
    assert len(losses) == 6 and all(np.isfinite(losses))
    saved = load_file(server.base / "models" / "loras" / f"network_{kind}.safetensors")
    assert sum(key.endswith(part) for key in saved) == 2 * 7 and not any(
        "layers.0." in key or "adaLN" in key for key in saved
    )
    (preview,) = (run / "previews").glob("*.png")
    assert preview.read_bytes() == drawn_by_core(server, f"network_{kind}")
    form = {"lora": "LoRA", "dora": "DoRA", "lokr": "LoKr", "loha": "LoHa"}[kind]
    assert any(event.get("text", "").startswith(f"{form} of rank") for event in events(run))


def test_convert_lora_reads_kohya_and_draws_what_the_lora_itself_draws(server):
    """Core does not read these names for Z-Image.

    The written file, and the LORA_MODEL handed on, give the pictures of the LoRA itself.
    """
    ours = lorafile.read(comfy_tiny.ADAPTER).factors
    kohya = {
        f"lora_unet_{name.replace('.', '_')}.{kind}": tensor
        for name, one in ours.items()
        for kind, tensor in (("lora_down.weight", one.A), ("lora_up.weight", one.B))
    }
    loras = server.base / "models" / "loras"
    save_file({key: tensor.clone() for key, tensor in kohya.items()}, loras / "kohya.safetensors")
    lorafile.write(loras / "native.safetensors", lorafile.state_dict(ours, torch.bfloat16), {})

    def convert(rank):
        return prompts.node(
            "ZTurboConvertLoRA",
            file="kohya.safetensors",
            name="foreign/converted",
            rank=rank,
            dtype="bf16",
            overwrite=False,
        )

    graph = {
        "load": prompts.load(),
        "convert": convert(0),
        "sample": prompts.sample(["lora", 0], prompt=PROMPT),
        "save": prompts.save_image(["sample", 0]),
    }
    graph["lora"] = prompts.node(
        "LoraModelLoader", model=["load", 0], lora=["convert", 0], strength_model=1.0, bypass=False
    )
    outputs = server.run(graph)
    (text,) = outputs["convert"]["text"]
    assert (
        "lora_unet_… (kohya, musubi-tuner), 24 matrices" in text
        and "none: the same numbers" in text
        and "Saved converted.safetensors" in text
    )
    native = drawn_by_core(server, "native")
    assert (
        native
        == drawn_by_core(server, "foreign/converted")
        == picture_files(server, outputs, "save")[0]
        != drawn_by_core(server, "kohya")
    )
    graph["convert"] = convert(2)
    (text,) = server.run(graph)["convert"]["text"]
    assert "rank 2, bf16" in text and "of the whole" in text and "Saved converted_2.safetensors" in text
    assert lorafile.read(loras / "foreign" / "converted_2.safetensors").ranks == [2]
    graph["convert"]["inputs"]["name"] = "../evil"
    assert "cannot be a LoRA file's" in failure(server, graph)


def test_a_run_starts_from_a_lora_of_another_trainer(server):
    """A kohya file (lora_down, lora_up, alpha, flat names): the first loss is that LoRA's."""
    run = train_and_save(server, "begin_half", steps=5, preview_prompts="", learning_rate=1e-2)
    ours = lorafile.read(run / "lora.safetensors")
    kohya = {}
    for name, one in ours.factors.items():
        flat = "lora_unet_" + name.replace(".", "_")
        kohya |= {
            f"{flat}.lora_down.weight": one.A * 2,
            f"{flat}.lora_up.weight": one.B.clone(),
            f"{flat}.alpha": torch.tensor(one.rank / 2),
        }
    save_file(kohya, server.base / "models" / "loras" / "kohya.safetensors")
    first = {}
    for start in ("nothing", "kohya.safetensors"):
        graph = prompts.training(name="second_half", steps=2, preview_prompts="", rank=6, alpha=6.0, learning_rate=1e-2)
        graph["network"] = prompts.node(
            "ZTurboNetworkOptions", kind="lora", factor=8, targets="", layers="", start_from=start
        )
        graph["train"]["inputs"]["network_options"] = ["network", 0]
        server.run(graph)
        run = newest_run(server, "second_half")
        assert recipefile.read(run / "recipe.toml").network.start == ("" if start == "nothing" else start)
        first[start] = next(event["loss"] for event in events(run) if "loss" in event)
    assert first["kohya.safetensors"] != first["nothing"]
    graph["network"]["inputs"]["targets"] = "attention"
    assert "parts that this run does not train" in failure(server, graph)


def test_every_picture_option_reaches_the_run(server):
    folder = server.base / "input" / "options"
    for name in ("mine/a", "mine/b", "mine/c", "any/d"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(ord(name[-1])).integers(0, 255, (96, 64, 3), np.uint8)).save(
            folder / f"{name}.png"
        )
    (folder / "any" / "d.txt").write_text("a thing")
    mask = np.zeros((96, 64), np.uint8)
    mask[:48] = 255
    Image.fromarray(mask).save(folder / "mine" / "a.mask.png")
    graph = prompts.training(name="pictures", steps=4, preview_prompts="", batch_size=1)
    graph["dataset"] = prompts.dataset("options/mine", "zvk", 128)
    graph["dataset"]["inputs"] |= {
        "upscale": True,
        "masks": "files and alpha",
        "outside": 0.2,
        "regularisation_folder": "options/any",
        "regularisation_weight": 0.5,
    }
    graph["dataset"]["inputs"] |= {"validation": 0.34, "validation_every": 2, "cache": False}
    kept = sorted((server.base / "output" / "zturbo").glob(".cache/*"))
    server.run(graph)
    run = newest_run(server, "pictures")
    assert recipefile.read(run / "recipe.toml").data == recipe.Data(
        0.0, False, 1, False, True, "files and alpha", 0.2, 0.5, 0.34, 2, False
    )
    assert [event["step"] for event in events(run) if event.get("event") == "validation"] == [0, 2, 4]
    assert all(event["memory"] > 0 for event in events(run) if "loss" in event)
    assert sorted((server.base / "output" / "zturbo").glob(".cache/*")) == kept
    graph["dataset"]["inputs"]["cache"] = True
    graph["train"]["inputs"]["name"] = "pictures_cached"
    server.run(graph)
    now = set((server.base / "output" / "zturbo").glob(".cache/*")) - set(kept)
    # what is known of each folder's files, once they are not too young
    known = {path for path in now if path.name.endswith(".files.json")}
    assert len(known) <= 2 and len(now - known) == 4 + 2, sorted(path.name for path in now)
    again = newest_run(server, "pictures_cached")
    assert [event["loss"] for event in events(again) if "loss" in event] == [
        event["loss"] for event in events(run) if "loss" in event
    ]


def test_clean_and_minus_one_wirings_give_byte_identical_pngs(server):
    graph = prompts.training(name="wirings", preview_prompts="")
    graph |= {
        "clean": prompts.node(
            "LoraModelLoader", model=["load", 0], lora=["train", 0], strength_model=1.0, bypass=False
        ),
        "on": prompts.node(
            "LoraModelLoader", model=["adapter", 0], lora=["train", 0], strength_model=1.0, bypass=False
        ),
        "off": prompts.adapter(["on", 0], "-1 restore"),
        "a": prompts.sample(["clean", 0]),
        "b": prompts.sample(["off", 0]),
        "c": prompts.sample(["on", 0]),
        "save_a": prompts.save_image(["a", 0]),
        "save_b": prompts.save_image(["b", 0]),
        "save_c": prompts.save_image(["c", 0]),
    }
    outputs = server.run(graph)
    clean, restored, still_on = (picture_files(server, outputs, f"save_{letter}") for letter in "abc")
    assert clean == restored and clean != still_on
    assert "carries the de-distill adapter" in outputs["c"]["text"][0] and outputs["a"]["text"] == [
        "8 steps, no de-distill adapter on the model."
    ]


def test_real_photographs_train_and_the_file_serves_core_and_diffusers(server, tiny, caplog):
    """Photographs of several sizes and shapes with caption files; the LoRA loads everywhere and means the same."""
    data = pytest.importorskip("skimage.data")
    folder = server.base / "input" / "photographs"
    folder.mkdir()
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        photograph = Image.fromarray(getattr(data, name)())
        photograph.save(folder / f"{name}.jpg")
        (folder / f"{name}.txt").write_text(f"a photo of {name}", encoding="utf-8")
    graph = prompts.training(name="photographs", steps=6, preview_prompts="")
    graph["dataset"] = prompts.dataset("photographs", "zphoto", 128)
    outputs = server.run(graph)
    assert outputs["dataset"]["images"]
    run = newest_run(server, "photographs")
    losses = [event["loss"] for event in events(run) if "loss" in event]
    assert len(losses) == 6 and all(np.isfinite(losses))
    state = load_file(run / "lora.safetensors")
    model, clip, _ = tiny
    patched = comfy_draw.with_lora(model, state)
    assert "not loaded" not in caplog.text.lower()
    assert sum(map(len, patched.patches.values())) == len(state) // 2
    x, sigma = torch.randn(1, 16, 12, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([0.6])
    with torch.inference_mode():
        features = comfy_draw.encode_prompt(clip, "a photo of chelsea")[0][0]
        import comfy.model_management

        comfy.model_management.load_models_gpu([patched])
        by_core = patched.model.diffusion_model(x, sigma, features, None).clone()
        comfy.model_management.unload_model_and_clones(patched)
    twin = diffusers_twin.build(model.model.diffusion_model, comfy_tiny.config()["unet_config"])
    diffusers_twin.load_lora(twin, state)
    assert sum("lora_" in name for name, _ in twin.named_parameters()) == len(state)
    with torch.no_grad():
        by_diffusers = diffusers_twin.velocity(twin.float(), x, sigma, [features[0].clone()])
    assert ((by_core - by_diffusers).norm() / by_diffusers.norm()).item() < 1e-4


def wait_for_step(server, name, step, seconds=300) -> Path:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        runs = [path for path in (server.base / "output" / "zturbo").glob(name) if (path / "events.jsonl").is_file()]
        if runs and any(event.get("step", 0) >= step for event in events(runs[0])):
            return runs[0]
        time.sleep(0.1)
    raise AssertionError(f"step {step} was not reached")


def test_stop_and_keep_lets_the_nodes_behind_finish(server):
    graph = prompts.training(name="stopped", steps=5000, preview_prompts="")
    graph |= {
        "lora": prompts.node("LoraModelLoader", model=["load", 0], lora=["train", 0], strength_model=1.0, bypass=False),
        "sample": prompts.sample(["lora", 0]),
        "save": prompts.save_image(["sample", 0]),
    }
    prompt_id = server.queue(graph)
    run = wait_for_step(server, "stopped", 3)
    assert server.get("/zturbo/run?name=stopped")["total"] == 5000
    assert server.post("/zturbo/stop", {"run": run.name}) == {"run": run.name}
    entry = server.wait(prompt_id)
    assert dev.error_message(entry) is None and entry["outputs"]["save"]["images"]
    done = [event for event in events(run) if "loss" in event]
    assert 3 <= len(done) < 5000 and events(run)[-1] == {"event": "end", "how": "stopped", "saved": len(done)}
    assert server.get("/zturbo/run?name=stopped")["how"] == "stopped"
    graph["sample"]["inputs"]["prompt"] = "another picture with the LoRA that was kept"
    assert server.run(graph)["save"]["images"]
    assert len(list((server.base / "output" / "zturbo").glob("stopped*"))) == 1  # it did not train again
    summary = runlog.summary(run, 2000)
    assert summary["how"] == "stopped" and len(summary["steps"]) == len(done)


def test_a_name_from_another_node_trains_once(server):
    graph = prompts.training(preview_prompts="")
    graph["words"] = prompts.node("PrimitiveString", value="linked")
    graph["train"]["inputs"]["name"] = ["words", 0]
    graph["sample"] = prompts.sample(["load", 0])
    graph["picture"] = prompts.save_image(["sample", 0])
    for seed in (1, 2):
        graph["sample"]["inputs"]["seed"] = seed
        server.run(graph)
    assert [path.name for path in (server.base / "output" / "zturbo").glob("linked*")] == ["linked"]


def test_a_run_whose_process_died_is_told_from_a_live_one(server):
    graph = prompts.training(name="died", preview_prompts="")
    server.run(graph)
    run = newest_run(server, "died")
    assert server.get("/zturbo/run?name=died")["how"] == "finished"
    whole = (run / "events.jsonl").read_text().splitlines()
    (run / "events.jsonl").write_text("\n".join(whole[:-1]) + "\n")
    assert server.get("/zturbo/run?name=died")["how"] == "died"


def test_options_reach_the_run_and_its_file(server):
    graph = prompts.training(name="options", steps=9, preview_prompts="", timesteps="logit_normal")
    graph["optimizer"] = prompts.node(
        "ZTurboOptimizerOptions",
        optimizer="muon",
        weight_decay=0.01,
        max_grad_norm=0.5,
        schedule="linear",
        warmup=2,
        restarts=1,
        decay=3,
        accumulation=2,
        ema=0.5,
    )
    graph["loss"] = prompts.node(
        "ZTurboLossOptions",
        mean=0.3,
        std=0.8,
        min_sigma=0.2,
        max_sigma=0.9,
        loss="huber",
        huber_delta=0.2,
        guidance=2.0,
        weighting="x0",
    )
    graph["saving"] = prompts.node("ZTurboSavingOptions", every=2, keep=3, dtype="fp32")
    graph["schedule"] = prompts.node("ZTurboAdapterSchedule", start=1.2, end=0.4)
    graph["train"]["inputs"] |= {
        "optimizer_options": ["optimizer", 0],
        "loss_options": ["loss", 0],
        "saving_options": ["saving", 0],
        "adapter_schedule": ["schedule", 0],
    }
    graph["dataset"]["inputs"] |= {
        "caption_dropout": 0.5,
        "shuffle_tags": True,
        "keep_tags": 2,
        "flip": True,
        "more_resolutions": "96",
    }
    server.run(graph)
    run = newest_run(server, "options")
    written = recipefile.read(run / "recipe.toml")
    assert written.optimizer == recipe.Optimizer("muon", 2e-3, 0.01, 0.5, "linear", 2, 1, 3, 2, 0.5)
    assert written.timesteps == recipe.Timesteps("logit_normal", 0.3, 0.8, 0.2, 0.9) and written.loss == recipe.Loss(
        "huber", 0.2, 2.0, "x0"
    )
    assert written.adapter == recipe.AdapterCourse(1.2, 0.4)
    assert written.saving == recipe.Saving(2, 3, "fp32") and written.data == recipe.Data(0.5, True, 2, True)
    file = lorafile.read(run / "lora.safetensors")
    assert file.dtypes == ["float32"] and "[optimizer]" in file.metadata["zturbo.recipe"]
    assert sorted(path.stem for path in (run / "checkpoints").iterdir()) == [
        "step_000006",
        "step_000008",
        "step_000009",
    ]
    assert all(0.2 <= event["sigma"] <= 0.9 for event in events(run) if "sigma" in event)


def test_cancelled_and_queued_again_is_the_run_that_was_never_cancelled(server):
    settings = dict(steps=300, preview_prompts="", learning_rate=1e-3)
    whole, cut = prompts.training(name="uncut", **settings), prompts.training(name="cut", **settings)
    server.run(whole)
    for at in (40, 120):
        prompt_id = server.queue(cut)
        run = wait_for_step(server, "cut", at)
        server.post("/interrupt", {})
        assert dev.error_message(server.wait(prompt_id)) == "interrupted"
    server.run(cut)
    assert [path.name for path in (server.base / "output" / "zturbo").glob("cut*")] == ["cut"]
    other = newest_run(server, "uncut")
    bits, same = load_file(run / "lora.safetensors"), load_file(other / "lora.safetensors")
    assert all(torch.equal(bits[key], same[key]) for key in same)
    assert [(e["step"], e["loss"]) for e in events(run) if "loss" in e] == [
        (e["step"], e["loss"]) for e in events(other) if "loss" in e
    ]


def test_other_previews_go_on_with_a_cut_run_and_other_settings_say_why_not(server):
    settings = dict(steps=300, learning_rate=1e-3, preview_prompts="")
    prompt_id = server.queue(prompts.training(name="again", **settings))
    run = wait_for_step(server, "again", 30)
    server.post("/interrupt", {})
    assert dev.error_message(server.wait(prompt_id)) == "interrupted"
    at = max(event["step"] for event in events(run) if "loss" in event)
    graph = prompts.training(name="again", **{**settings, "preview_prompts": PROMPT, "preview_every": 150})
    graph["saving"] = prompts.node("ZTurboSavingOptions", every=100, keep=1, dtype="fp32")
    graph["train"]["inputs"]["saving_options"] = ["saving", 0]
    prompt_id = server.queue(graph)
    wait_for_step(server, "again", at + 5)
    server.post("/interrupt", {})
    server.wait(prompt_id)
    assert [path.name for path in (server.base / "output" / "zturbo").glob("again*")] == ["again"] and recipefile.read(
        run / "recipe.toml"
    ).previews.prompts == (PROMPT,)
    server.run(prompts.training(name="again", **{**settings, "steps": 3, "learning_rate": 2e-3}))
    other = server.base / "output" / "zturbo" / "again_2"
    (note,) = [event["text"] for event in events(other) if "which was cut off" in event.get("text", "")]
    assert "other settings (optimizer.learning_rate, steps)" in note


@pytest.mark.parametrize("log", [None, "", '{"event": "start", "total": 4, "tea'])
def test_the_folder_of_a_run_that_was_cut_off_before_its_first_step_is_taken_up(server, log):
    """As a process leaves it that died there: nobody's settings have changed, and nothing says so."""
    name = f"unborn_{'x' if log is None else len(log)}"
    folder = server.base / "output" / "zturbo" / name
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "recipe.toml.part").write_text('name = "unb')
    if log is not None:
        (folder / "events.jsonl").write_text(log)
    server.run(prompts.training(name=name, steps=2, preview_prompts=""))
    assert [path.name for path in folder.parent.glob(f"{name}*")] == [name]
    assert [event["step"] for event in runlog.read_events(folder / "events.jsonl") if "loss" in event] == [1, 2]
    assert not [
        event for event in runlog.read_events(folder / "events.jsonl") if "A new run begins" in event.get("text", "")
    ]
    assert recipefile.read(folder / "recipe.toml").name == name and runlog.how_ended(folder) == "finished"


def test_a_continued_run_that_is_cut_off_goes_on_and_shows_its_own_total(server):
    settings = dict(preview_prompts="", learning_rate=1e-3)
    server.run(prompts.training(name="base", steps=6, **settings))
    longer = prompts.training(name="stretched", steps=300, resume="base", **settings)
    prompt_id = server.queue(longer)
    run = wait_for_step(server, "stretched", 30)
    server.post("/interrupt", {})
    server.wait(prompt_id)
    assert server.get("/zturbo/run?name=stretched")["total"] == 300
    prompt_id = server.queue(longer)
    deadline = time.monotonic() + 60
    while sum(event.get("event") == "start" for event in events(run)) < 3 and time.monotonic() < deadline:
        time.sleep(0.1)
    server.post("/interrupt", {})
    server.wait(prompt_id)
    assert [path.name for path in (server.base / "output" / "zturbo").glob("stretched*")] == ["stretched"]
    starts = [event for event in events(run) if event.get("event") == "start"]
    assert [start["source"] for start in starts] == ["", "base/step_000006", "base/step_000006"]


def test_resume_new_and_from_a_named_checkpoint(server):
    settings = dict(preview_prompts="", learning_rate=1e-3)
    server.run(prompts.training(name="first", steps=6, **settings))
    server.run(prompts.training(name="first", steps=6, seed=0, resume="new", **settings))
    folders = server.base / "output" / "zturbo"
    assert sorted(path.name for path in folders.glob("first*")) == ["first", "first_2"]
    server.run(prompts.training(name="longer", steps=10, resume="first_2", **settings))
    assert [event["step"] for event in events(folders / "longer") if "loss" in event] == list(range(1, 11))
    server.run(prompts.training(name="from_nothing", steps=10, resume="new", **settings))
    ours, theirs = (load_file(folders / name / "lora.safetensors") for name in ("longer", "from_nothing"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert "no run 'nobody'" in failure(server, prompts.training(name="x", resume="nobody", **settings))
    assert "has no checkpoint 'step_000099'" in failure(
        server, prompts.training(name="x", resume="first/step_000099", **settings)
    )


def test_cancel_saves_what_was_learnt_and_leaves_the_model_clean(server):
    before = picture_files(
        server,
        server.run(
            {"load": prompts.load(), "sample": prompts.sample(["load", 0]), "save": prompts.save_image(["sample", 0])}
        ),
        "save",
    )
    prompt_id = server.queue(prompts.training(name="cancelled", steps=5000, preview_prompts=""))
    run = wait_for_step(server, "cancelled", 2)
    server.post("/interrupt", {})
    assert dev.error_message(server.wait(prompt_id)) == "interrupted"
    assert len(lorafile.read(run / "lora.safetensors").factors) == 24 and events(run)[-1]["how"] == "cancelled"
    after = picture_files(
        server,
        server.run(
            {
                "load": prompts.load(),
                "sample": prompts.sample(["load", 0]),
                "save": prompts.save_image(["sample", 0], "test/after"),
            }
        ),
        "save",
    )
    assert before == after


def test_save_lora_counts_up_and_keeps_the_metadata(server):
    graph = prompts.training(name="saved", preview_prompts="")
    for dtype, overwrite in (("bf16", False), ("fp32", False), ("fp16", True)):
        graph["save"] = prompts.node(
            "ZTurboSaveLoRA", lora=["train", 0], name="sub/saved", dtype=dtype, overwrite=overwrite
        )
        server.run(graph)
    folder = server.base / "models" / "loras" / "sub"
    assert sorted(path.name for path in folder.iterdir()) == ["saved.safetensors", "saved_2.safetensors"]
    file = lorafile.read(folder / "saved.safetensors")
    assert file.metadata["ss_network_dim"] == "4" and "learning_rate = 0.002" in file.metadata["zturbo.recipe"]
    assert file.metadata["zturbo.adapter_strength"] == "1" and file.dtypes == ["float16"]
    assert not any(str(server.base) in value or str(dev.ROOT) in value for value in file.metadata.values())


@pytest.mark.parametrize("change, sentence", [
    (lambda g: g.update(dataset=prompts.dataset("nowhere")), "does not exist"),
    (lambda g: g.update(dataset=prompts.dataset("../../etc")), "not inside ComfyUI's input or output folder"),
    (lambda g: g.update(dataset=prompts.dataset("/etc")), "not inside ComfyUI's input or output folder"),
    (lambda g: g["train"]["inputs"].update(name="../evil"), "cannot be a file name"),
    (lambda g: g["dataset"]["inputs"].update(trigger=""), "no trigger word"),
    (lambda g: g.update(adapter=prompts.adapter(["load", 0], "-1 restore")), "carries no adapter"),
])  # fmt: skip
def test_bad_input_gets_a_sentence(server, change, sentence):
    graph = prompts.training(name="bad", preview_prompts="")
    change(graph)
    assert sentence in failure(server, graph)


def test_a_bad_name_of_the_lora_is_said_before_training(server):
    graph = prompts.training(name="named", preview_prompts="")
    graph["save"] = prompts.node("ZTurboSaveLoRA", lora=["train", 0], name="../evil", dtype="bf16", overwrite=False)
    answer = server.post("/prompt", {"prompt": graph, "client_id": server.client})
    assert "cannot be a LoRA file's" in json.dumps(answer["node_errors"]["save"])
    server.wait(answer["prompt_id"])


def test_a_loss_that_is_no_number_ends_the_run_with_a_sentence(server):
    """A broken LoRA on the base model is the shortest way to one."""
    state = load_file(comfy_tiny.ADAPTER)
    save_file(
        {key: value * float("inf") for key, value in state.items()},
        server.base / "models" / "loras" / "broken.safetensors",
    )
    graph = prompts.training(name="nan", preview_prompts="")
    graph["broken"] = prompts.node(
        "LoraLoaderModelOnly", model=["adapter", 0], lora_name="broken.safetensors", strength_model=1.0
    )
    graph["train"]["inputs"]["model"] = ["broken", 0]
    message = failure(server, graph)
    assert "The loss became nan and its gradient nan at step 1" in message and "Nothing had been learnt yet" in message
    assert events(newest_run(server, "nan"))[-1]["how"] == "failed"


def test_wrong_files_get_a_sentence(server):
    models = server.base / "models"
    save_file(
        {
            "diffusion_model.layers.0.attention.to_q.lora_A.weight": torch.zeros(4, 3840),
            "diffusion_model.layers.0.attention.to_q.lora_B.weight": torch.zeros(3840, 4),
        },
        models / "loras" / "big.safetensors",
    )
    (models / "loras" / "cut.safetensors").write_bytes(comfy_tiny.ADAPTER.read_bytes()[:5000])
    (models / "diffusion_models" / "lora.safetensors").write_bytes(comfy_tiny.ADAPTER.read_bytes())
    for folder in ("diffusion_models", "text_encoders", "vae"):
        (models / folder / "vae.safetensors").write_bytes(comfy_tiny.VAE.read_bytes())

    def with_adapter(name):
        return failure(
            server,
            {
                "load": prompts.load(),
                "adapter": prompts.adapter(["load", 0], name=name),
                "sample": prompts.sample(["adapter", 0]),
                "save": prompts.save_image(["sample", 0]),
            },
        )

    def with_model(name):
        graph = {
            "load": prompts.load(),
            "sample": prompts.sample(["load", 0]),
            "save": prompts.save_image(["sample", 0]),
        }
        graph["load"]["inputs"] |= {
            "diffusion_model": name,
            "text_encoder": "vae.safetensors",
            "vae": "vae.safetensors",
        }
        return failure(server, graph)

    assert "big.safetensors does not fit this model: 0 of its 1 matrices do" in with_adapter("big.safetensors")
    assert "cut.safetensors cannot be read: it is cut off within its header" in with_adapter("cut.safetensors")
    assert "lora.safetensors is a LoRA or adapter" in with_model("lora.safetensors")
    assert "vae.safetensors is a VAE. Choose Z-Image-Turbo" in with_model("vae.safetensors")
