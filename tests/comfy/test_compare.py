"""Compare LoRAs: what it draws is what core draws with the same files, and a checkpoint is the LoRA that it became."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

sys.path.append(str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1]))
import prompts
from test_server import PROMPT, drawn_by_core, failure, newest_run

import dev
from zturbo import dataset, lorafile, trainer
from zturbo.hosts import comfy_adapter, comfy_compare, comfy_draw, comfy_paths
from zturbo.hosts.comfy import ComfyHost
from zturbo.recipe import Compute, Network, Optimizer, Previews, Recipe, Saving
from zturbo.roles import Unattended
from zturbo.runfolder import RunFolder


def compare(**changes) -> dict:
    settings = {
        "loras": "", "prompts": PROMPT, "strengths": "1", "without": True, "width": 64, "height": 64, "seed": 3,
        "steps": 8, "sampler": "euler", "model": ["load", 0], "clip": ["load", 1], "vae": ["load", 2],
    }  # fmt: skip
    return prompts.node("ZTurboCompare", **settings | changes)


def files_of(server, outputs: dict, node: str) -> list[Path]:
    return [server.base / "output" / one["subfolder"] / one["filename"] for one in outputs[node]["images"]]


def test_checkpoints_strengths_and_prompts_in_one_grid_as_core_draws_them(server):
    graph = prompts.training(name="grid", steps=4)
    graph["saving"] = prompts.node("ZTurboSavingOptions", every=2, keep=3, dtype="bf16")
    graph["train"]["inputs"]["saving_options"] = ["saving", 0]
    graph["keep"] = prompts.node("ZTurboSaveLoRA", lora=["train", 0], name="grid", dtype="bf16", overwrite=True)
    server.run(graph)
    run = newest_run(server, "grid").name
    two = f"{PROMPT}\na small green square on a pink background"
    asked = {
        "load": prompts.load(),
        "on": prompts.adapter(["load", 0]),
        "compare": compare(loras=f"{run}/all\ngrid\n{run}/newest", prompts=two, strengths="0.5, 1", model=["on", 0]),
    }
    asked["one_by_one"] = prompts.save_image(["compare", 1], "compare/one")
    asked["grid"] = prompts.save_image(["compare", 0], "compare/grid")
    outputs = server.run(asked)
    pictures = [path.read_bytes() for path in files_of(server, outputs, "one_by_one")]
    columns = 1 + 2 * 4  # without; step 2, step 4, the saved file and the run's newest, each at two strengths
    assert len(pictures) == 2 * columns
    # the adapter is off, and with the file core's own nodes draw the same picture
    assert pictures[6] == drawn_by_core(server, "grid")
    # step 4 is the saved LoRA, and the newest one of the run
    assert pictures[4] == pictures[6] == pictures[8] and pictures[3] == pictures[5] == pictures[7]
    assert len({*pictures[:5], *pictures[columns : columns + 5]}) == 10
    text = outputs["compare"]["text"][0]
    assert f"column 2: {run}/step_000002 at 0.5" in text and "row 2: a small green square" in text
    assert "column 6: grid at 0.5\n" in text and f"column 8: {run}/newest at 0.5\n" in text
    grid = np.asarray(Image.open(files_of(server, outputs, "grid")[0]))
    assert grid.shape[0] > 2 * 64 and grid.shape[1] > columns * 64
    assert (
        grid[-2 * 66 :][:64, -66:][:, :64] == np.asarray(Image.open(files_of(server, outputs, "one_by_one")[8]))
    ).all()


def test_what_the_trainer_hands_on_comes_first(server):
    graph = prompts.training(name="handed", steps=2)
    graph["compare"] = compare(lora=["train", 0], without=False)
    graph["pictures"] = prompts.save_image(["compare", 1], "compare/handed")
    graph["keep"] = prompts.node("ZTurboSaveLoRA", lora=["train", 0], name="handed", dtype="bf16", overwrite=True)
    outputs = server.run(graph)
    (picture,) = files_of(server, outputs, "pictures")
    assert picture.read_bytes() == drawn_by_core(server, "handed")
    assert outputs["compare"]["text"][0].startswith("column 1: LoRA at 1\nrow 1:")


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"loras": ""}, "nothing to compare"),
        ({"loras": "nobody.safetensors"}, "There is no LoRA 'nobody.safetensors'"),
        ({"loras": "nobody/all"}, "no run 'nobody'"),
        ({"loras": "../../etc"}, "no run '..'"),
        ({"loras": "x", "strengths": "much"}, "strengths is 'much'"),
        ({"loras": "x", "prompts": " \n"}, "no prompts"),
        ({"loras": "x", "width": 72}, "72x64"),
        ({"loras": "x", "width": 4096, "height": 4096, "prompts": "a\nb\nc\nd"}, "of 4096x4096 pixels at most 7"),
    ],
)
def test_bad_input_gets_a_sentence(server, changes, sentence):
    assert sentence in failure(server, {"load": prompts.load(), "compare": compare(**changes)})


def test_names_are_told_apart(server):
    """A file called as what is connected, a folder called as runs' own, a run of that name."""
    loras = server.base / "models" / "loras"
    (loras / "checkpoints").mkdir(exist_ok=True)
    tiny = dev.ROOT / "models" / "tiny" / "z_image_turbo_tiny_adapter.safetensors"
    for place in (loras / "LoRA.safetensors", loras / "checkpoints" / "mine.safetensors"):
        place.write_bytes(tiny.read_bytes())
    server.run(prompts.training(name="checkpoints", steps=2, preview_prompts=""))
    graph = prompts.training(name="named", steps=2, preview_prompts="")
    graph["compare"] = compare(lora=["train", 0], loras="LoRA\ncheckpoints/mine\ncheckpoints/all", strengths="1")
    text = server.run(graph)["compare"]["text"][0]
    assert [line.split(": ")[1] for line in text.splitlines() if line.startswith("column")] == [
        "without", "LoRA at 1", "LoRA.safetensors at 1", "checkpoints/mine at 1", "checkpoints/step_000002 at 1",
    ]  # fmt: skip


def test_a_checkpoint_is_handed_on_by_a_run_that_ends_where_it_is(server):
    graph = prompts.training(name="chosen", steps=4, preview_prompts="")
    graph["saving"] = prompts.node("ZTurboSavingOptions", every=2, keep=3, dtype="bf16")
    graph["train"]["inputs"]["saving_options"] = ["saving", 0]
    server.run(graph)
    graph["train"]["inputs"] |= {"resume": "chosen/step_000002", "steps": 2}
    graph["compare"] = compare(lora=["train", 0], loras="chosen/step_000002\nchosen/newest", without=False)
    graph["pictures"] = prompts.save_image(["compare", 1], "compare/chosen")
    handed, checkpoint, newest = (path.read_bytes() for path in files_of(server, server.run(graph), "pictures"))
    assert handed == checkpoint != newest


def test_prompts_say_trigger_for_the_word_that_was_trained(server):
    graph = prompts.training(name="word", steps=2, preview_prompts="")
    graph["keep"] = prompts.node("ZTurboSaveLoRA", lora=["train", 0], name="word", dtype="bf16", overwrite=True)
    graph["compare"] = compare(lora=["train", 0], prompts="a large [trigger] on a blue background", without=False)
    assert "row 1: a large zsmile on a blue background" in server.run(graph)["compare"]["text"][0]
    for one in ("word.safetensors", "word/step_000002", "word/newest"):
        asked = {"load": prompts.load(), "compare": compare(loras=one, prompts="one [Trigger]", without=False)}
        assert "row 1: one zsmile" in server.run(asked)["compare"]["text"][0]
    tiny = dev.ROOT / "models" / "tiny" / "z_image_turbo_tiny_adapter.safetensors"
    (server.base / "models" / "loras" / "silent.safetensors").write_bytes(tiny.read_bytes())
    asked["compare"]["inputs"] |= {"loras": "silent", "prompts": "one [trigger]"}
    assert "A prompt says [trigger], and none of these LoRAs says" in failure(server, asked)


class Cut(Exception):
    pass


@pytest.mark.parametrize("after", [0, 2, 3])
def test_an_error_in_the_middle_leaves_the_model_clean(tiny, monkeypatch, after):
    model, clip, vae = tiny
    lora = lorafile.state_dict(comfy_tiny_adapter().factors, torch.float32)
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    decode, calls = comfy_draw.decode, []

    def cut(*given):
        calls.append(1)
        if len(calls) > after:
            raise Cut
        return decode(*given)

    monkeypatch.setattr(comfy_draw, "decode", cut)
    columns = [comfy_compare.Column("", 0.0), comfy_compare.Column("a", 1.0), comfy_compare.Column("a", 0.5)]
    how = comfy_draw.Drawing(64, 64, 2, 0, "euler")
    with torch.inference_mode(), pytest.raises(Cut):
        comfy_compare.compare((model, clip, vae), {"a": lora}, columns, ("a",) * 2, how, "1")
    after_it = model.model.state_dict()
    assert all(torch.equal(before[key], after_it[key]) for key in before) and model.patches == {}


def comfy_tiny_adapter():
    return lorafile.read(dev.ROOT / "models" / "tiny" / "z_image_turbo_tiny_adapter.safetensors")


KINDS = {
    "lora": {},
    "loha": {"network": Network(kind="loha", rank=2, alpha=2.0)},
    "average": {"optimizer": Optimizer(learning_rate=2e-3, ema=0.5)},
    "schedule_free": {"optimizer": Optimizer("schedule_free", learning_rate=2e-3)},
    "dora": {"network": Network(kind="dora", rank=4, alpha=2.0)},
    "lokr": {"network": Network(kind="lokr", rank=4, factor=4)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_the_lora_that_was_saved_with_it_and_the_model_stays_as_it_was(tiny, kind):
    model, clip, vae = tiny
    pictures = dataset.from_folder(comfy_paths.dataset_folder(comfy_paths.BUNDLED), (64,), "zsmile")
    recipe = Recipe(
        name=kind,
        steps=3,
        compute=Compute("fp32"),
        saving=Saving(every=2, keep=4),
        previews=Previews(every=0),
        **KINDS[kind],
    )
    with torch.inference_mode():
        run = RunFolder.new(comfy_paths.runs().root, recipe)
        with torch.inference_mode(False):
            trainer.train(recipe, pictures, ComfyHost(model, clip, vae, recipe), run, Unattended(), {})
        before = {name: value.clone() for name, value in model.model.state_dict().items()}
        found = comfy_compare.of_checkpoint(run.checkpoint_files()[0], model)
        saved = load_file(run.lora)
        assert run.checkpoint_files()[0].stem == "step_000003"
        assert found.keys() == saved.keys() and all(torch.equal(found[key], saved[key]) for key in saved)
        how = comfy_draw.Drawing(64, 64, 2, 0, "euler")
        columns = [comfy_compare.Column("", 0.0), comfy_compare.Column(f"{kind}/step_000002", 1.0)]
        comfy_compare.compare(
            (model, clip, vae), comfy_compare.given((f"{kind}/all",), None), columns, ("a",), how, "1"
        )
        after = model.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert comfy_adapter.carried(model) is None and model.patches == {}
