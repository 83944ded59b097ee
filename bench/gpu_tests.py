"""The part of `bench gpu` that runs tests/card with pytest, on the real card where there is one."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent / "tests"
ENDED = re.compile(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", re.MULTILINE)
REASON = re.compile(r"^(?:FAILED|ERROR) (\S+::.+?) - (.+)$", re.MULTILINE)


def run(card: bool, tiny: bool, seconds: float) -> dict | str:
    """How many passed and failed, and which failed; or a sentence why there is nothing to run."""
    folder = TESTS / "card"
    if not folder.is_dir():
        return "skipped: there is no folder tests/card in this checkout"
    said, timed_out, code = pytest(folder, ["-k", "smoke"] if tiny else [], card, seconds)
    if code == 5:
        return "skipped: no test in tests/card has smoke in its name"
    return {**facts(said), "timed_out": timed_out}


def pytest(folder: Path, some: list[str], card: bool, seconds: float) -> tuple[str, bool, int | None]:
    """(what it printed, whether its time was up, exit code)"""
    command = [sys.executable, "-m", "pytest", "--rootdir", str(TESTS), "-c", str(TESTS / "pytest.ini"), str(folder)]
    command += ["-vv", "-p", "no:cacheprovider", *some]
    env = {**os.environ, **({"ZTURBO_CARD": "real"} if card else {})}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as printed:
        process = subprocess.Popen(command, env=env, stdout=printed, stderr=subprocess.STDOUT)
        try:
            code, timed_out = process.wait(seconds), False
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code, timed_out = None, True
        printed.seek(0)
        return printed.read(), timed_out, code


def facts(said: str) -> dict:
    ended = dict(ENDED.findall(said))
    reasons = dict(REASON.findall(said))
    failed = sorted(name for name, how in ended.items() if how in ("FAILED", "ERROR"))
    hows = ("PASSED", "FAILED", "ERROR", "SKIPPED")
    counts = {how.lower(): sum(one == how for one in ended.values()) for how in hows}
    found = {**counts, "failing": {name: reasons.get(name, "")[:300] for name in failed}}
    return found if ended else {**found, "said": said[-600:]}
