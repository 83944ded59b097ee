"""`bench gpu` at the tiny size on whatever device is here: every part runs, and what it says of the pack is true."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import gpu, gpu_tests

ROOT = Path(__file__).resolve().parents[2]
RUN = "import sys, bench.gpu as room; sys.exit(room.main(sys.argv[1:]))"


@pytest.fixture(scope="module")
def facts(comfyui, tmp_path_factory) -> dict:
    """What one command writes and prints last, as `dev.py bench gpu --tiny --json` starts it."""
    out = tmp_path_factory.mktemp("gpu") / "facts.json"
    env = {**os.environ, "COMFYUI_PATH": str(comfyui), "PYTHONPATH": os.pathsep.join([str(comfyui), str(ROOT)])}
    command = [sys.executable, "-c", RUN, "--tiny", "--json", "--out", str(out), "--seconds", "3000"]
    ended = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    written = json.loads(out.read_text(encoding="utf-8"))
    assert written == json.loads(ended.stdout.splitlines()[-1])
    return written


def test_every_part_ended_and_none_failed(facts):
    assert {part.name for part in gpu.PARTS} <= {key.split(".")[0] for key in facts}
    assert [key for key in facts if key.endswith((".failed", ".skipped"))] == []
    assert facts["tests"]["passed"] > 0 and not facts["tests"]["failed"]
    assert "not reached" not in json.dumps(facts) and '"failed": "' not in json.dumps(facts)


def test_the_same_run_gives_the_same_bits_and_so_does_a_resumed_one(facts):
    answers = (".repeatable", ".resume_same_bits")
    said = [key.rpartition(".") for key in facts if key.startswith("runs.") and key.endswith(answers)]
    assert {last for _, _, last in said} == {"repeatable", "resume_same_bits"}
    for setting, _, last in said:
        assert facts[f"{setting}.{last}"] is True or setting == "runs.fast"
        runs = {name: facts[f"{setting}.{name}"] for name in ("first", "second", "cut", "resumed")}
        assert [len(run["steps"]) for run in runs.values()] == [6, 6, 4, 2]
        assert runs["cut"]["how"] == "cancelled" and "sha256" not in runs["cut"]
        assert all(runs[name]["keys"] == 48 for name in ("first", "second", "resumed"))  # 3 layers, 8 matrices, A and B
    assert facts["static.repeatable"] is True


def test_weights_are_clean_with_and_without_dynamic_vram(facts):
    assert facts["runs.clean_weights"] is True and facts["static.clean_weights"] is True
    assert facts["static.dynamic_vram"] is False


def test_a_step_is_timed_in_every_way_beside_its_peers(facts):
    for word in ("checkpointing", "without_checkpointing"):
        timed = facts[f"speed.128.{word}"]
        for name in ("merged", "branch", "diffusers_peft"):
            assert 0 < timed[name]["s"]["min"] <= timed[name]["s"]["median"] <= timed[name]["s"]["max"]
        ratio = timed["merged"]["ratio_to_diffusers_peft"]
        assert ratio["min"] <= ratio["median"] <= ratio["max"] and ratio["of"] == timed["merged"]["s"]["of"]
        assert {"merged", "branch"} <= facts[f"fp8.128.{word}"].keys()
    assert facts["core.128.plain"]["s"]["median"] > 0 and facts["core.128.bypass"]["s"]["median"] > 0
    assert facts["static.step"]["trains"] and facts["draws.with_lora_s"]["again"] > 0


def test_small_memory_and_the_profile_are_looked_at(facts):
    limited = {key: value for key, value in facts.items() if key.startswith("limits.") and isinstance(value, dict)}
    assert {key.split(".")[2] for key in limited} == {"bf16", "fp8"} and all(one["trains"] for one in limited.values())
    assert len(facts["profile.128.costs"]["largest"]) == 10


def test_what_pytest_printed_is_counted_by_name():
    said = """card/test_a.py::test_one PASSED [ 25%]
card/test_a.py::test_two[bf16 x] FAILED [ 50%]
card/test_a.py::test_three SKIPPED (no card) [ 75%]
card/test_b.py::test_four ERROR [100%]
FAILED card/test_a.py::test_two[bf16 x] - AssertionError: other bits
ERROR card/test_b.py::test_four - RuntimeError: no
"""
    found = gpu_tests.facts(said)
    assert [found[how] for how in ("passed", "failed", "error", "skipped")] == [1, 1, 1, 1]
    assert found["failing"] == {
        "card/test_a.py::test_two[bf16 x]": "AssertionError: other bits",
        "card/test_b.py::test_four": "RuntimeError: no",
    }
