"""The examples in CONTRIBUTING.md fit the code as it is, and do what they say."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
EXAMPLES = {
    title: diff for title, diff in re.findall(r"^### (.+?)\n.*?^```diff\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
}
# What a run with the change has in its log
TRAIN = """
import json, sys
from pathlib import Path

sys.path[:0] = [sys.argv[1], sys.argv[2]]
from dataclasses import replace
from test_trainer import PICTURES, LinearHost, Nobody, recipe
from zturbo import memory, recipefile, runfolder, runlog, trainer
from zturbo.recipe import Optimizer
from zturbo.runfolder import RunFolder

name, folder = sys.argv[3:]
given = replace(recipe(), steps=20)
if name == "A setting":
    given = replace(given, loss=replace(given.loss, noise_offset=0.5))
    assert recipefile.from_toml(recipefile.to_toml(given)) == given
if name == "An optimizer":
    given = replace(given, optimizer=Optimizer("nadam", 1e-2))
    assert memory.lora(given, 10).size > 0
run = RunFolder.new(Path(folder), given)
result = trainer.train(given, PICTURES, LinearHost(), run, Nobody(), {})
print(json.dumps({"losses": result.losses, "events": runlog.read_events(run.events)}))
"""


def applied(diff: str, root: Path):
    """The change made under a folder. Each hunk must fit in one place."""
    for file, body in re.findall(r"^--- (\S+)\n(.*?)(?=^--- |\Z)", diff, re.MULTILINE | re.DOTALL):
        path = root / file
        text = path.read_text(encoding="utf-8")
        for hunk in body.split("@@\n"):
            lines = hunk.splitlines(keepends=True)
            before = "".join(line[1:] for line in lines if line[0] in " -")
            after = "".join(line[1:] for line in lines if line[0] in " +")
            assert text.count(before) == 1, f"{file}: {before!r} is there {text.count(before)} times"
            text = text.replace(before, after)
        path.write_text(text, encoding="utf-8")
        compile(text, str(path), "exec")


def run(root: Path, name: str, folder: Path) -> dict:
    command = [sys.executable, "-c", TRAIN, str(root), str(ROOT / "tests" / "unit"), name, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_there_is_one_of_each():
    assert list(EXAMPLES) == ["A setting", "An optimizer", "An objective", "A hook"]


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_fits_and_trains(tmp_path, name):
    for room in ("zturbo", "nodes"):
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    plain = run(tmp_path, "as it is", tmp_path / "before")
    applied(EXAMPLES[name], tmp_path)
    changed = run(tmp_path, name, tmp_path / "after")
    if name in ("A setting", "An optimizer", "An objective"):
        assert changed["losses"][1:] != plain["losses"][1:]
    if name == "An objective":
        assert ["consistency" in one for one in changed["events"] if "loss" in one] == [True, False] * 10
    if name == "A hook":
        assert changed["losses"] == plain["losses"]
        assert [one["step"] for one in changed["events"] if one.get("event") == "length"] == [10, 20]


def test_the_files_that_the_page_names_are_there():
    named = set(re.findall(r"`((?:zturbo|nodes|js|tests)/[\w/.]+\.(?:py|js))`", PAGE))
    assert len(named) > 20
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []
