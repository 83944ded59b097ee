"""Exact resume: a run that is stopped anywhere and goes on is, to the bit, the run that never stopped."""

import json
import os
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.append(str(Path(__file__).parent))
from test_trainer import PICTURES, LinearHost, Nobody, recipe, until

from zturbo import checkpoint, files, lowrank, runfolder, runlog, session, trainer
from zturbo.errors import CheckpointError
from zturbo.recipe import Network, Optimizer, Previews, Saving
from zturbo.runfolder import RunFolder


class PowerCut(BaseException):
    """Nothing can be done after it: not even saving."""


def run_recipe(**changes):
    return recipe(**{"steps": 12, "saving": Saving(every=4, keep=2, dtype="fp32"), **changes})


def train(run, given, control=None):
    return trainer.train(given, PICTURES, LinearHost(), run, control or Nobody(), {})


def logged(run):
    """The log without what a clock says."""
    return [
        {key: value for key, value in event.items() if key != "seconds"}
        for event in runlog.read_events(run.events)
        if "loss" in event
    ]


def final(run):
    """Everything that the last checkpoint knows, except how long it took."""
    tensors, facts = checkpoint.read(run.checkpoint_files()[0])
    return tensors, {key: value for key, value in facts.items() if key != "seconds"}


def same(a, b):
    return a[0].keys() == b[0].keys() and all(torch.equal(a[0][key], b[0][key]) for key in a[0]) and a[1] == b[1]


@pytest.fixture
def whole(tmp_path):
    run = RunFolder.new(tmp_path / "whole", run_recipe())
    return train(run, run_recipe()), run


@pytest.mark.parametrize("at", range(1, 12))
def test_cancelled_at_any_step(whole, tmp_path, at):
    result, uncut = whole
    run = RunFolder.new(tmp_path, run_recipe())
    with pytest.raises(KeyboardInterrupt):
        train(run, run_recipe(), Nobody(cancel_after=at))
    again = train(RunFolder(run.path), run_recipe())
    assert again.losses == result.losses and all(
        torch.equal(again.state[key], result.state[key]) for key in result.state
    )
    assert same(final(run), final(uncut)) and logged(run) == logged(uncut)
    assert run.lora.read_bytes() == uncut.lora.read_bytes()


@pytest.mark.parametrize("at", range(1, 12))
def test_cut_off_without_a_chance_to_save(whole, tmp_path, at, monkeypatch):
    """What is left was written before: the checkpoint of step 4 or 8, or nothing; and a log that went on a little."""
    _, uncut = whole

    class Cut(Nobody):
        def step(self, event):
            super().step(event)
            if event["step"] == at:
                patch.setattr(RunFolder, "save", lambda *args: None)
                patch.setattr(RunFolder, "save_checkpoint", lambda *args: None)
                raise PowerCut

    run = RunFolder.new(tmp_path, run_recipe())
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        train(run, run_recipe(), Cut())
    with open(run.events, "a") as file:
        file.write('{"step": 99, "lo')  # torn in the middle of a line
    train(RunFolder(run.path), run_recipe())
    assert same(final(run), final(uncut)) and logged(run) == logged(uncut)


def test_a_step_that_was_cut_in_two_is_not_taken_for_whole(whole, tmp_path, monkeypatch):
    """An error inside the optimizer's step may have moved half of the weights: the checkpoint before counts."""
    _, uncut = whole
    steps, good = [], torch.optim.AdamW.step

    def breaks(self, *args, **kwargs):
        steps.append(1)
        if len(steps) == 7:
            self.param_groups[0]["params"][0].data += 1.0
            raise KeyboardInterrupt
        return good(self, *args, **kwargs)

    run = RunFolder.new(tmp_path, run_recipe())
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch.optim.AdamW, "step", breaks)
        train(run, run_recipe())
    assert [path.stem for path in run.checkpoint_files()] == ["step_000004"]
    train(RunFolder(run.path), run_recipe())
    assert same(final(run), final(uncut))


def test_cancelled_in_the_middle_of_a_forward_pass_loses_no_step(whole, tmp_path):
    """Core looks for Cancel inside the model too; the weights have not moved then."""
    _, uncut = whole

    class Interrupted(LinearHost):
        @contextmanager
        def training(self, lora):
            with super().training(lora) as velocity:

                def cancelled(*args):
                    if len(self.seen) == 6:
                        raise KeyboardInterrupt
                    return velocity(*args)

                yield cancelled

    run = RunFolder.new(tmp_path, run_recipe())
    with pytest.raises(KeyboardInterrupt):
        trainer.train(run_recipe(), PICTURES, Interrupted(), run, Nobody(), {})
    assert [path.stem for path in run.checkpoint_files()] == ["step_000006", "step_000004"]
    train(RunFolder(run.path), run_recipe())
    assert same(final(run), final(uncut)) and logged(run) == logged(uncut)


@pytest.mark.parametrize(
    "damage, said",
    [(lambda b: b[:-100], "cannot be read"), (lambda b: b[:-9] + bytes([b[-9] ^ 1]) + b[-8:], "checksum")],
)
def test_a_damaged_checkpoint_is_passed_over(whole, tmp_path, caplog, damage, said):
    _, uncut = whole
    run = RunFolder.new(tmp_path, run_recipe())
    with pytest.raises(KeyboardInterrupt):
        train(run, run_recipe(), Nobody(cancel_after=10))
    newest = run.checkpoint_files()[0]
    newest.write_bytes(damage(newest.read_bytes()))
    train(RunFolder(run.path), run_recipe())
    assert said in caplog.text and same(final(run), final(uncut))


def test_where_no_checkpoint_is_whole_nothing_is_written_over(tmp_path):
    run = RunFolder.new(tmp_path, run_recipe())
    with pytest.raises(KeyboardInterrupt):
        train(run, run_recipe(), Nobody(cancel_after=10))
    for path in run.checkpoint_files():
        path.write_bytes(path.read_bytes()[:-100])
    before = run.lora.read_bytes(), run.events.read_bytes()
    with pytest.raises(CheckpointError, match="To begin anew, set resume to new"):
        train(RunFolder(run.path), run_recipe())
    assert (run.lora.read_bytes(), run.events.read_bytes()) == before


def test_more_steps_after_the_end_are_the_longer_run(whole, tmp_path):
    _, short = whole
    long = RunFolder.new(tmp_path / "long", run_recipe(steps=20))
    train(long, run_recipe(steps=20))
    more = RunFolder.new(tmp_path / "more", run_recipe(steps=20))
    more.adopt(short.checkpoint_files()[0])
    train(more, run_recipe(steps=20))
    assert same(final(more), final(long)) and logged(more) == logged(long)


def test_a_finished_run_hands_on_what_it_has(whole):
    result, run = whole
    before = run.lora.stat().st_mtime_ns, logged(run)
    again = train(RunFolder(run.path), run_recipe())
    assert again.losses == result.losses and all(
        torch.equal(again.state[key], result.state[key]) for key in result.state
    )
    assert logged(run) == before[1]


def test_the_newest_two_are_kept_and_an_old_one_goes_only_after_the_new_one_is_there(tmp_path, monkeypatch):
    run = RunFolder.new(tmp_path, run_recipe(steps=20))
    seen, unlink = [], Path.unlink

    def watched(path, **options):
        if path.parent == run.checkpoints and path.suffix == ".safetensors":
            seen.append(
                (path.stem, [checkpoint.read(file) and file.stem for file in run.checkpoint_files() if file != path])
            )
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", watched)
    train(run, run_recipe(steps=20))
    assert [path.stem for path in run.checkpoint_files()] == ["step_000020", "step_000016"]
    assert seen[0] == ("step_000004", ["step_000012", "step_000008"]) and len(seen) == 3


def test_a_checkpoint_that_does_not_read_back_leaves_the_old_ones(tmp_path, monkeypatch, caplog):
    run, good = RunFolder.new(tmp_path, run_recipe(steps=16)), files.sha256
    monkeypatch.setattr(
        files, "sha256", lambda path: "another" if path.stem in ("step_000012", "step_000016") else good(path)
    )
    train(run, run_recipe(steps=16))
    assert "does not read back" in caplog.text
    assert {"step_000004", "step_000008"} <= {path.stem for path in run.checkpoint_files()}


def test_save_now(tmp_path):
    class Wishing(Nobody):
        def step(self, event):
            super().step(event)
            if event["step"] == 5:
                runfolder.request(run.path, runfolder.SAVE)
            if event["step"] == 6:
                until(lambda: len(run.checkpoint_files()) == 2)  # written while training goes on
                self.there = [path.stem for path in run.checkpoint_files()]

    run, control = RunFolder.new(tmp_path, run_recipe()), Wishing()
    train(run, run_recipe(), control)
    assert control.there == ["step_000005", "step_000004"] and not run.save_now.exists()


def test_another_runs_checkpoint_is_refused_with_a_sentence(whole, tmp_path):
    _, run = whole
    other = RunFolder.new(tmp_path, run_recipe(network=Network(4, 4)))
    other.adopt(run.checkpoint_files()[0])
    with pytest.raises(CheckpointError, match="of another LoRA"):
        train(other, run_recipe(network=Network(4, 4)))


@pytest.mark.parametrize("content", [b"", b"x" * 8, b"\xff" * 64, json.dumps({}).encode(), os.urandom(4096)])
def test_what_is_no_checkpoint_gets_a_sentence(tmp_path, content):
    (tmp_path / "step_000001.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError):
        checkpoint.read(tmp_path / "step_000001.safetensors")


def test_a_file_has_the_same_bytes_each_time(tmp_path):
    state, words = {"b": torch.arange(3.0), "a": torch.ones(2)}, {f"key {n}": f'wörd {n} / \\ " \n' for n in range(20)}
    from safetensors import safe_open
    from safetensors.torch import load_file

    from zturbo import lorafile

    made = {lorafile.write(tmp_path / f"{n}.safetensors", state, words).read_bytes() for n in range(8)}
    assert len(made) == 1
    assert all(torch.equal(load_file(tmp_path / "0.safetensors")[key], state[key]) for key in state)
    with safe_open(tmp_path / "0.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt", **words}


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"optimizer": Optimizer(name="lion")}, "another optimizer class: it has AdamW, this run Lion"),
        ({"optimizer": Optimizer(ema=0.9)}, "another moving average"),
        ({"network": Network(4, 8)}, "another scale"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused_by_name(whole, tmp_path, changes, words):
    run = RunFolder.new(tmp_path, run_recipe())
    run.adopt(whole[1].checkpoint_files()[0])
    with pytest.raises(CheckpointError, match=words):
        train(run, run_recipe(**changes))


def test_a_continued_run_has_its_own_weight_decay(whole, tmp_path):
    run = RunFolder.new(tmp_path, run_recipe())
    run.adopt(whole[1].checkpoint_files()[0])
    longer = {"steps": 20}
    plain = train(run, run_recipe(**longer))
    run = RunFolder.new(tmp_path, run_recipe())
    run.adopt(whole[1].checkpoint_files()[0])
    decayed = train(run, run_recipe(**longer, optimizer=Optimizer(learning_rate=1e-2, weight_decay=0.5)))
    norm = lambda result: sum(tensor.norm().item() for tensor in result.state.values())  # noqa: E731
    assert norm(decayed) < 0.98 * norm(plain)


def test_an_opened_folder_knows_what_its_lora_has_learnt(whole):
    assert RunFolder(whole[1].path).saved_steps == 12 and RunFolder(whole[1].path / "nowhere").saved_steps == 0


def test_validation_looks_at_the_moving_average_and_changes_nothing(whole):
    result, run = whole
    state = session.begin(
        run_recipe(optimizer=Optimizer(learning_rate=1e-2, ema=0.9)),
        LinearHost(),
        RunFolder.new(run.path.parent, run_recipe(name="x")),
    )
    for tensor in lowrank.parameters(state.ema):
        tensor.fill_(0.25)
    before = [tensor.detach().clone() for tensor in lowrank.parameters(state.lora)]
    with state.as_exported():
        assert all((tensor == 0.25).all() for tensor in lowrank.parameters(state.lora))
    assert all(torch.equal(tensor, old) for tensor, old in zip(lowrank.parameters(state.lora), before))


def test_training_goes_on_while_a_checkpoint_is_written_and_the_next_one_waits(tmp_path, monkeypatch):
    """A disk takes its time: steps 5 to 7 are done meanwhile, and the files are those of a run that never waited."""
    run, slow, write, meanwhile = RunFolder.new(tmp_path, run_recipe(steps=12)), threading.Event(), checkpoint.write, []

    def held_up(path, copy):
        if path.stem == "step_000004":
            slow.wait(10)
        write(path, copy)

    class Watching(Nobody):
        def step(self, event):
            super().step(event)
            meanwhile.append((event["step"], [path.stem for path in run.checkpoint_files()]))
            if event["step"] == 7:
                slow.set()

    monkeypatch.setattr(checkpoint, "write", held_up)
    trainer.train(run_recipe(steps=12), PICTURES, LinearHost(), run, Watching(), {})
    assert [steps for step, steps in meanwhile if step in (5, 6, 7)] == [[], [], []]
    monkeypatch.setattr(checkpoint, "write", write)
    other = RunFolder.new(tmp_path, run_recipe(steps=12))
    trainer.train(run_recipe(steps=12), PICTURES, LinearHost(), other, Nobody(), {})
    names = [path.stem for path in run.checkpoint_files()]
    assert names == [path.stem for path in other.checkpoint_files()] and "step_000008" in names
    assert run.lora.read_bytes() == other.lora.read_bytes()


def test_what_goes_wrong_while_a_checkpoint_is_written_ends_the_run_and_keeps_the_lora(tmp_path, monkeypatch):
    run = RunFolder.new(tmp_path, run_recipe(steps=12))
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(RunFolder, "save_checkpoint", lambda *given: 1 / 0)
        trainer.train(run_recipe(steps=12), PICTURES, LinearHost(), run, Nobody(), {})
    assert runfolder.steps_of(run.lora) >= 4 and not run.checkpoint_files()
    assert set(load_file(run.lora)) == {f"diffusion_model.layers.0.feed_forward.w1.lora_{half}.weight" for half in "AB"}


def test_a_checkpoint_that_the_disk_refused_last_is_told_also_when_there_are_previews(tmp_path, monkeypatch):
    run, control, write = RunFolder.new(tmp_path, run_recipe()), Nobody(), checkpoint.write
    told = []
    control.say = told.append

    def refused(path, copy):
        if copy.step == 12:
            raise CheckpointError("The disk is full.")
        write(path, copy)

    monkeypatch.setattr(checkpoint, "write", refused)
    given = run_recipe(previews=Previews(("a",), 0))
    trainer.train(given, PICTURES, LinearHost(), run, control, {})
    assert [sentence for sentence in told if "The disk is full." in sentence] and run.saved_steps == 12
