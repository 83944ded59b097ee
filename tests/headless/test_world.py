"""A run that many processes train together: the weights of one process, the same bits after a kill, one end for all.

Most processes here are forks of this one, which need not load PyTorch again; the last tests start the real launchers.
"""

import functools
import importlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers: run `python dev.py test`, which brings it")
pytest.importorskip("accelerate", reason="needs accelerate: run `python dev.py test`, which brings it")
if not hasattr(os, "fork"):
    pytest.skip("processes are made by fork, which Windows has not", allow_module_level=True)

from zturbo import checkpoint, cli, runfolder, runlog, step, trainer, world
from zturbo.hosts import diffusers, diffusers_tiny

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """
name = "cat"
steps = 6
batch_size = 3

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
size = 64
prompts = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"]

[saving]
every = 2

[inputs]
model = "tiny"
adapter = "tiny"
pictures = "PICTURES"
trigger = "zsmile"
resolutions = "64"
"""
# short batches (16 pictures in three shapes), accumulation, the moving average, mirrored and held-out pictures, dropped
# captions, the guard on every second step, readings of the gauge
EVERYTHING = (
    "optimizer.accumulation=2",
    "optimizer.ema=0.9",
    "data.flip=true",
    "data.validation=0.2",
    "data.validation_every=4",
    "data.caption_dropout=0.2",
    'turbo.keep="guard"',
    "turbo.every=2",
    "steps=4",
)
IDLE = ("batch_size=1", "steps=3")
RESTORED = ("steps=6", "optimizer.ema=0.9", 'turbo.keep="restore"', "turbo.restore_steps=3")
# Of weights up to 0.09. The sums are the same in another order, and AdamW divides by the gradients' own size: one
# process that takes one picture at a time is as far from one that takes all at once (2e-5)
TOLERANCE = 5e-5


@pytest.fixture(scope="module")
def encoded(tmp_path_factory) -> Iterator[Path]:
    """Pictures and texts in the cache, the packages and the tiny model loaded, once for all forks."""
    place = tmp_path_factory.mktemp("encoded")
    (place / "recipe.toml").write_text(RECIPE.replace("PICTURES", diffusers_tiny.PICTURES.as_posix()))
    words = ["train", str(place / "recipe.toml"), "--host", "diffusers", "--runs", str(place / "runs")]
    importlib.import_module("accelerate")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(diffusers_tiny, "load", functools.cache(diffusers_tiny.load))
        assert cli.main([*words, *settings("steps=1", "data.flip=true", 'turbo.keep="guard"')]) == 0
        yield place / "runs" / ".cache"


@pytest.fixture
def folder(tmp_path, monkeypatch, encoded):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(encoded, tmp_path / "zturbo_runs" / ".cache")
    (tmp_path / "recipe.toml").write_text(RECIPE.replace("PICTURES", diffusers_tiny.PICTURES.as_posix()))
    return tmp_path


def settings(*given: str) -> list[str]:
    return [word for one in given for word in ("--set", one)]


def command(*given: str) -> list[str]:
    return ["train", "recipe.toml", "--host", "diffusers", "--device", "cpu", "--json", *settings(*given)]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(size: int, *given: str, before: Callable[[int], None] | None = None, wait: float = 2) -> list[int]:
    """Process ids of a world of forks. What each prints is in rank_N.txt. before: called in each, with its rank."""
    places = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    children = []
    for rank in range(size):
        child = os.fork()
        if child:
            children.append(child)
            continue
        code = 99
        try:
            out = os.open(f"rank_{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1)
            os.dup2(out, 2)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
            os.environ.update(places, RANK=str(rank), LOCAL_RANK=str(rank))
            if before is not None:
                before(rank)
            code = cli.main([*command(*given), "--wait", str(wait)])
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return children


def codes(children: list[int]) -> list[int]:
    """How they ended: exit codes, or signals as negative numbers."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def together(size: int, *given: str, before: Callable[[int], None] | None = None) -> list[int]:
    return codes(start(size, *given, before=before))


def said(rank: int) -> str:
    return Path(f"rank_{rank}.txt").read_text()


def learnt(name: str) -> dict[str, torch.Tensor]:
    return checkpoint.read(runfolder.RunFolder(Path("zturbo_runs") / name).checkpoint_files()[0])[0]


def events(name: str) -> list[dict]:
    return runlog.read_events(Path("zturbo_runs") / name / "events.jsonl")


def losses(name: str) -> list[float]:
    return [event["loss"] for event in events(name) if "loss" in event]


def worst(a: str, b: str) -> float:
    """The largest difference between weights (and moving averages) of two runs."""
    one, other = learnt(a), learnt(b)
    assert one.keys() == other.keys()
    return max((one[key] - other[key]).abs().max().item() for key in one if key.startswith(("lora.", "average.")))


def same(a: str, b: str):
    """The same weights, optimizer's state, losses and readings, to the bit."""
    one, other = learnt(a), learnt(b)
    assert one.keys() == other.keys() and all(one[key].equal(other[key]) for key in one)
    looks = [
        [
            (event["step"], event.get("loss"), event.get("gauge"))
            for event in events(name)
            if "loss" in event or "gauge" in event
        ]
        for name in (a, b)
    ]
    assert looks[0] == looks[1]


def wait_for_step(name: str, number: int, child: int | None = None):
    deadline = time.monotonic() + 120
    while len(losses(name)) < number:
        assert time.monotonic() < deadline, said(0)
        time.sleep(0.01)


def one_picture_at_a_time(given: tuple[str, ...]):
    """The run `small` of one process, whose pictures go through the model one by one."""
    plain = diffusers.DiffusersHost.__init__

    def begun(self, *given, **more):
        plain(self, *given, **more)
        self.at_once = 1

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(diffusers.DiffusersHost, "__init__", begun)
        assert cli.main(command("name=small", *given)) == 0


@pytest.mark.parametrize(("given", "sizes"), [(EVERYTHING, (2, 4)), (IDLE, (2,)), (RESTORED, (2,))])
def test_processes_learn_what_one_does(folder, given, sizes):
    assert cli.main(command("name=one", *given)) == 0
    one_picture_at_a_time(given)
    assert worst("one", "small") < TOLERANCE
    for size in sizes:
        name = f"world{size}"
        assert together(size, f"name={name}", *given) == [0] * size, said(0)
        assert worst("one", name) < TOLERANCE
        assert losses(name) == pytest.approx(losses("one"), rel=1e-5, abs=1e-7)
        for kind in ("sigma", "guard", "gauge", "held_out", "grad_norm"):
            read = [[event[kind] for event in events(run) if kind in event] for run in ("one", name)]
            assert read[0] == pytest.approx(read[1], rel=1e-4, abs=1e-4)
        assert [said(rank) for rank in range(1, size)] == [""] * (size - 1)  # one screen
    print({name: (worst("one", name), worst("small", name)) for name in ("small", *(f"world{n}" for n in sizes))})
    if 4 in sizes:  # each has one row at most, as `small` has at a time: what differs is the order of adding up
        assert worst("small", "world4") < TOLERANCE / 10


class Failing:
    """Makes the `number`th forward pass of one process fail."""

    def __init__(self, rank: int, number: int, error: Exception):
        self.rank, self.number, self.error = rank, number, error

    def __call__(self, rank: int):
        if rank != self.rank:
            return
        plain = diffusers.DiffusersHost._velocity

        def velocity(host, *given):
            self.number -= 1
            if self.number == 0:
                raise self.error
            return plain(host, *given)

        diffusers.DiffusersHost._velocity = velocity


@pytest.mark.parametrize("rank", [0, 1])
def test_memory_that_runs_out_in_one_process_is_answered_by_all(folder, rank):
    assert cli.main(command("name=whole")) == 0
    assert together(2, before=Failing(rank, 3, torch.OutOfMemoryError("none left"))) == [0, 0], said(0)
    assert any("There was not enough memory at step 3" in event.get("text", "") for event in events("cat"))
    assert len(losses("cat")) == 6 and worst("cat", "whole") < TOLERANCE


def test_a_process_that_fails_ends_all_with_its_sentence(folder):
    assert together(2, before=Failing(1, 4, ValueError("the card is on fire"))) == [1, 1]
    told = json.loads(said(0).splitlines()[-1])["error"]
    assert "Process 1 of 2 (counted from 0) ended" in told and "the card is on fire" in told and said(1) == ""
    assert re.search("The LoRA of step [1-5] is saved", told) and runlog.how_ended(Path("zturbo_runs/cat")) == "failed"


def test_a_loss_that_is_no_number_sends_all_processes_back(folder):
    def before(rank: int):
        plain, done = step.backward, []

        def backward(*given, **more):
            done.append(None)
            for loss, sigmas in plain(*given, **more):
                yield loss * (float("nan") if rank == 1 and len(done) == 5 else 1), sigmas

        step.backward = backward

    assert together(2, "batch_size=4", before=before) == [0, 0], said(0)
    assert len(losses("cat")) == 6
    assert any("Going back to step 2 with half the learning rate" in event.get("text", "") for event in events("cat"))


def test_stop_and_keep_stops_all_processes_after_the_same_step(folder):
    children = start(2, "steps=500")
    wait_for_step("cat", 2)
    runfolder.request(Path("zturbo_runs/cat"), runfolder.STOP)
    assert codes(children) == [0, 0]
    assert runlog.how_ended(Path("zturbo_runs/cat")) == "stopped" and len(learnt("cat")["losses"]) == len(losses("cat"))


def test_a_gauge_above_its_limit_sends_all_processes_back_and_ends_the_run(folder):
    def before(rank: int):
        from zturbo import turbo

        def read(references, velocity, step, device):  # processes read differently; the first one's counts
            return {"event": "health", "step": step, "gauge": 0.05 if step < 4 or rank else 0.9, "deviation": 0.1}

        turbo.References.read = read

    assert together(2, "turbo.every=2", "turbo.stop_above=0.5", before=before) == [0, 0], said(0)
    assert any("training ends with the LoRA of step 2" in event.get("text", "") for event in events("cat"))
    assert len(losses("cat")) == 2


def test_processes_that_were_given_different_things_do_not_begin(folder):
    def before(rank: int):
        if rank == 1:
            path = Path("recipe.toml")
            cli.training.recipe_of = lambda args, plain=cli.training.recipe_of: plain(args)
            text = path.read_text().replace("1e-3", "2e-3")
            Path("other.toml").write_text(text)
            cli.main = lambda words, plain=cli.main: plain([w.replace("recipe.toml", "other.toml") for w in words])

    assert together(2, before=before) == [1, 1]
    assert "Process 1 of 2 (counted from 0) was given other settings" in said(0)
    assert list(Path("zturbo_runs").glob("cat*")) == []


def kill(child: int):
    os.kill(child, signal.SIGKILL)


def unhurried(rank: int):
    """Steps that take long enough to be killed in."""
    plain = trainer.step

    def step(*given):
        plain(*given)
        time.sleep(1)

    trainer.step = step


def test_processes_that_are_killed_at_any_moment_go_on_to_the_same_bits(folder):
    """The first one, the other, and both; while pictures are learnt and while turbo is restored."""
    assert together(2, "name=whole", *RESTORED) == [0, 0], said(0)
    for number, victims in enumerate([(1,), (0,), (0, 1)]):
        children = start(2, *RESTORED, before=unhurried)
        wait_for_step("cat", 2 * number + 1)
        time.sleep(0.1 * number)
        for one in victims:
            kill(children[one])
        ended = codes(children)
        assert [ended[one] for one in victims] == [-signal.SIGKILL] * len(victims)
        for left in {0, 1} - set(victims):
            assert ended[left] == 1
            told = json.loads(said(left).splitlines()[-1])["error"]
            assert f"Process {victims[0]} of 2 (counted from 0) is gone" in told and "the same command again" in told
    assert together(2, *RESTORED) == [0, 0], said(0)
    assert [path.name for path in sorted(Path("zturbo_runs").glob("cat*"))] == ["cat"]
    same("whole", "cat")


def test_a_process_that_stands_still_is_named_after_a_while(folder):
    children = start(2, "steps=500", wait=0.05)
    wait_for_step("cat", 2)
    os.kill(children[1], signal.SIGSTOP)
    assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == 1
    kill(children[1])
    os.waitpid(children[1], 0)
    assert "Process 1 of 2 (counted from 0) is gone" in said(0)


def launched(launcher: list[str], *given: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, "-m", "zturbo", *command(*given)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def children_of(process: int) -> list[int]:
    path = Path(f"/proc/{process}/task/{process}/children")
    return [int(number) for number in path.read_text().split()] if path.is_file() else []


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="processes are found by Linux' /proc")
def test_torchrun_and_accelerate_launch_start_a_run_and_go_on_with_it(folder):
    given = ("steps=60",)
    assert together(2, "name=whole", *given) == [0, 0]
    torchrun = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    running = launched(torchrun, *given)
    wait_for_step("cat", 3)
    first, second = children_of(running.pid)
    assert b"RANK=1\0" in Path(f"/proc/{second}/environ").read_bytes()
    kill(second)
    out, err = running.communicate(timeout=60)
    assert running.returncode != 0 and "Process 1 of 2 (counted from 0) is gone" in out, err
    assert 3 <= len(learnt("cat")["losses"]) < 60
    accelerate = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    running = launched([*accelerate, "--mixed_precision", "no", "--main_process_port", str(free_port())], *given)
    out, err = running.communicate(timeout=120)
    assert running.returncode == 0, err
    assert json.loads(out.splitlines()[-1])["how"] == "finished" and "Traceback" not in err
    same("whole", "cat")


def test_what_a_launcher_needs_is_said(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(world.ZTurboError, match="RANK None .* `torchrun`"):
        world.open_world()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(world.ZTurboError, match=re.escape("pip install accelerate")):
        world.open_world()
