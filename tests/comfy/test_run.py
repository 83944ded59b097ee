"""A run inside ComfyUI that ends badly: a sentence, and what was learnt is on the disk."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent))
from test_clean_weights import recipe
from test_host import de_distilled, fingerprint, pictures

from zturbo import lorafile, runlog
from zturbo.errors import TrainingError, ZTurboError
from zturbo.hosts import comfy_needs, comfy_paths, comfy_run
from zturbo.runs import Runs


@pytest.fixture
def run(tiny, tmp_path, monkeypatch):
    """Train four steps into tmp_path, without a frontend to send events to."""
    monkeypatch.setattr(comfy_paths, "runs", lambda: Runs(tmp_path))
    monkeypatch.setattr(comfy_run, "_send", lambda event, data: None)
    model, clip, vae = tiny
    return lambda way="merged", resume="auto": comfy_run.train(
        recipe(way), pictures(), comfy_run.Models(de_distilled(model), clip, vae), "1", resume
    )


@pytest.mark.parametrize("at, kept", [(1, "Nothing had been learnt yet."), (4, "The LoRA of step 3 is saved as")])
def test_out_of_memory_says_what_to_lower_and_where_the_lora_is(run, tiny, tmp_path, monkeypatch, at, kept):
    before, calls, backward = fingerprint(tiny[0]), [], torch.Tensor.backward

    def short_of_memory(*args, **kwargs):
        calls.append(1)
        if len(calls) >= at:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        backward(*args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "backward", short_of_memory)
    with pytest.raises(TrainingError, match="not enough memory") as error:
        run()
    assert kept in str(error.value) and "resolution" in str(error.value)
    assert len(calls) == at + 2  # with gradient checkpointing, and one picture at a time
    assert fingerprint(tiny[0]) == before
    folder = tmp_path / recipe("merged").name
    assert runlog.summary(folder, 10)["how"] == "failed"
    assert (folder / "lora.safetensors").is_file() == (at > 1)
    if at > 1:
        assert len(lorafile.read(folder / "lora.safetensors").factors) == 24


@pytest.mark.parametrize("often, how", [(1, "gradient checkpointing"), (2, "one picture at a time")])
def test_memory_that_runs_out_costs_time_only(run, tmp_path, monkeypatch, often, how):
    calls, backward = [], torch.Tensor.backward

    def short_of_memory(*args, **kwargs):
        calls.append(1)
        if 3 <= len(calls) < 3 + often:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        backward(*args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "backward", short_of_memory)
    trained = run()
    assert trained.steps == 4 and len(calls) == 2 + often + 2 * often  # two pictures, in the end one at a time
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    whole = run(resume="new")
    assert trained.path != whole.path and trained.losses == pytest.approx(whole.losses, rel=1e-4)
    folder = tmp_path / recipe("merged").name
    assert any(f"It goes on with {how}," in note for note in runlog.summary(folder, 10)["notes"])


def test_a_batch_that_has_no_room_goes_through_in_parts(run, tmp_path, monkeypatch):
    whole = run()
    folder, sums = tmp_path / recipe("merged").name, comfy_needs.at_least
    monkeypatch.setattr(comfy_needs, "at_least", lambda host, lora, at_once, *more, **fast: 0 if at_once == 1 else 1e18)
    small = run(resume="new")
    monkeypatch.setattr(comfy_needs, "at_least", sums)
    notes = runlog.summary(folder.with_name(folder.name + "_2"), 10)["notes"]
    assert any(
        note.startswith("Memory: one picture at a time through the model, as there is no room for 2") for note in notes
    )
    assert not any("not enough" in note for note in notes)
    assert small.losses == pytest.approx(whole.losses, rel=1e-4)


def test_an_output_folder_that_cannot_be_made_is_said_before_anything_is_trained(run, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(comfy_paths, "runs", lambda: Runs(tmp_path / "file"))
    with pytest.raises(ZTurboError, match="cannot be made"):
        run()


def test_a_disk_that_is_full_from_the_start_is_said_before_anything_is_trained(run, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ZTurboError, match="No space left on device"):
        run()
