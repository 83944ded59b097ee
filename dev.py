#!/usr/bin/env python3
"""Everything a developer, or a curious artist, runs from the command line. Standard library only.

    python dev.py demo               train a LoRA on the bundled tiny model in a real ComfyUI, draw with it at 8 steps
    python dev.py test [tier ...]    the tests: unit schema headless workflows card comfy ui (all when none is named)
    python dev.py bench NAME         a side-by-side measurement
    python dev.py lab NAME           a stage of how the tiny turbo model was made
    python dev.py comfyui            start a ComfyUI with this pack in place, and print its address

ComfyUI is looked for in this order: --comfyui or COMFYUI_PATH, the install this folder sits in
(custom_nodes/..), ~/comfy/ComfyUI, and a checkout of its own, which is cloned when there is no other.
Python packages go into an environment of its own in a cache folder (ZTURBO_CACHE); no install's
environment, models or outputs are touched.
"""

import argparse
import contextlib
import hashlib
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path

ROOT = Path(__file__).resolve().parent
PACK = "zimage-turbo-lora"
COMFYUI_TAG = "v0.33.0"
COMFYUI_URL = "https://github.com/comfyanonymous/ComfyUI"
TORCH = ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")  # a trio that fits together
TIERS = ("ui", "card", "comfy", "headless", "workflows", "schema", "unit")  # the slow ones first: two run side by side
DEMO_PROMPTS = (
    "a large zsmile on a blue background",
    "a large zsmile on a green background",
    "a large red square on a white background",
)
START_SECONDS = 300
# glibc gives blocks back to the system after each use; kept, they make a step on a CPU half as long. Above 32 MB (a
# weight of the real model as it is computed with) they are given back all the same: kept, they would tear holes into
# the heap
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": "33554432",
    "MALLOC_TRIM_THRESHOLD_": "4000000000",
    "MALLOC_TOP_PAD_": "67108864",
}


class Stop(SystemExit):
    """Ends the program with a sentence."""

    def __init__(self, sentence: str):
        super().__init__(f"dev.py: {sentence}")


def say(text: str):
    print(text, file=sys.stderr, flush=True)


def cache() -> Path:
    """The cache folder: ZTURBO_CACHE, else where the system keeps caches."""
    if os.environ.get("ZTURBO_CACHE"):
        return Path(os.environ["ZTURBO_CACHE"]).expanduser()
    if platform.system() == "Windows":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / PACK
    if platform.system() == "Darwin":
        return Path.home() / "Library" / "Caches" / PACK
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / PACK


# ComfyUI


def is_comfyui(path: Path) -> bool:
    return (path / "main.py").is_file() and (path / "comfy" / "sd.py").is_file()


def find_comfyui(given: str | None) -> Path:
    """The ComfyUI to use, cloned when there is none. Ends with a sentence when it cannot be had."""
    named = given or os.environ.get("COMFYUI_PATH")
    if named:
        if is_comfyui(Path(named)):
            return Path(named).resolve()
        raise Stop(
            f"{named} is not a ComfyUI folder (no main.py and comfy/ in it). Give the folder that holds main.py."
        )
    own = cache() / f"ComfyUI-{COMFYUI_TAG}"
    around = ROOT.parents[1] if ROOT.parent.name == "custom_nodes" else None
    for place in (around, Path.home() / "comfy" / "ComfyUI", own):
        if place and is_comfyui(place):
            return place.resolve()
    return clone_comfyui(own)


def clone_comfyui(to: Path) -> Path:
    say(f"No ComfyUI found; cloning {COMFYUI_TAG} to {to} …")
    to.parent.mkdir(parents=True, exist_ok=True)
    partial = to.with_name(to.name + f".{os.getpid()}.part")
    command = ["git", "clone", "--quiet", "--depth", "1", "--branch", COMFYUI_TAG, COMFYUI_URL, str(partial)]
    try:
        subprocess.run(command, check=True, env={**os.environ, "GIT_TERMINAL_PROMPT": "0"}, timeout=900)
        partial.rename(to)
    except (OSError, subprocess.SubprocessError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        ended = isinstance(error, subprocess.CalledProcessError)
        raise Stop(not_cloned(f"git ended with {error.returncode}" if ended else str(error))) from None
    return to


def not_cloned(reason: str) -> str:
    return (
        f"ComfyUI {COMFYUI_TAG} cannot be cloned from {COMFYUI_URL} ({reason}). "
        "Give a ComfyUI with --comfyui FOLDER or COMFYUI_PATH, or put one at ~/comfy/ComfyUI."
    )


def comfyui_version(comfyui: Path) -> str:
    return (comfyui / "comfyui_version.py").read_text(encoding="utf-8").split('"')[-2]


# Environment


def environment(comfyui: Path | None) -> Path:
    """Python of an environment with what is pinned; made once, and again when a pin changes."""
    wanted = [ROOT / "requirements.txt", ROOT / "requirements-dev.txt"]
    if comfyui:
        wanted.insert(0, comfyui / "requirements.txt")
    pinned = "\n".join([platform.python_version(), *TORCH, *(path.read_text(encoding="utf-8") for path in wanted)])
    folder = cache() / f"env-{hashlib.sha256(pinned.encode()).hexdigest()[:16]}"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if (folder / "complete").is_file():
        return python
    say(f"Making the Python environment {folder} (about 6 GB and 5 minutes, once) …")
    shutil.rmtree(folder, ignore_errors=True)
    constraints = folder / "constraints.txt"
    try:
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        constraints.write_text("\n".join(TORCH), encoding="utf-8")
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, *TORCH], check=True, stdout=sys.stderr)
        subprocess.run(
            [*install, "-c", str(constraints), *(part for path in wanted for part in ("-r", str(path)))],
            check=True,
            stdout=sys.stderr,
        )
    except subprocess.CalledProcessError as error:
        said = f"{' '.join(error.cmd[:6])} … ended with {error.returncode}"
        raise Stop(
            f"the Python environment cannot be made: {said}. "
            "Look above for pip's reason; a package index must be reachable."
        ) from None
    (folder / "complete").write_text(pinned, encoding="utf-8")
    return python


def has_nvidia() -> bool:
    return (
        shutil.which("nvidia-smi") is not None
        and subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0
    )


# A running ComfyUI


def make_base(base: Path) -> Path:
    """A base directory for ComfyUI with this pack linked into its custom_nodes."""
    for name in (
        "custom_nodes",
        "input",
        "output",
        "user",
        "temp",
        *(f"models/{kind}" for kind in ("diffusion_models", "text_encoders", "vae", "loras")),
    ):
        (base / name).mkdir(parents=True, exist_ok=True)
    link = base / "custom_nodes" / PACK
    if os.path.lexists(link) and link.resolve() != ROOT:  # made from another checkout
        link.rmdir() if os.name == "nt" else link.unlink()
    if not os.path.lexists(link):
        if os.name == "nt":  # a junction needs no right to make links
            subprocess.run(["cmd", "/c", "mklink", "/J", str(link), str(ROOT)], check=True, capture_output=True)
        else:
            link.symlink_to(ROOT, target_is_directory=True)
    return base


def free_port() -> int:
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A ComfyUI in a process of its own. Use as a context manager."""

    def __init__(self, comfyui: Path, python: Path, base: Path, *extra: str):
        self.base, self.port = make_base(base), free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.log = base / "comfyui.log"
        device = () if has_nvidia() else ("--cpu",)
        places = ("--base-directory", str(base), "--port", str(self.port), "--database-url", "sqlite:///:memory:")
        self.command = [str(python), str(comfyui / "main.py"), *device, *places, "--disable-auto-launch", *extra]
        self.comfyui = comfyui

    def __enter__(self) -> "Server":
        self.client = str(uuid.uuid4())
        self.file = open(self.log, "a", encoding="utf-8")
        clean = {**KEEP_MEMORY, **{key: value for key, value in os.environ.items() if key != "PYTHONPATH"}}
        self.process = subprocess.Popen(
            self.command, cwd=self.base, stdout=self.file, stderr=subprocess.STDOUT, env=clean
        )
        try:
            self.wait_until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.file.close()

    def wait_until_ready(self):
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise Stop(
                    f"ComfyUI ended while starting. The last lines of {self.log}:\n"
                    + "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
                )
            try:
                self.get("/system_stats")
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.3)
        raise Stop(f"ComfyUI did not answer within {START_SECONDS} s; its log is {self.log}.")

    def get(self, path: str):
        with urllib.request.urlopen(self.address + path, timeout=60) as answer:
            return json.load(answer)

    def post(self, path: str, body: dict):
        request = urllib.request.Request(
            self.address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            raise Stop(f"ComfyUI refused {path}: {error.read().decode(errors='replace')[:2000]}") from None
        return json.loads(text) if text else None

    def queue(self, prompt: dict) -> str:
        """Queue an API-format prompt. Returns its id."""
        return self.post("/prompt", {"prompt": prompt, "client_id": self.client})["prompt_id"]

    def wait(self, prompt_id: str, seconds: float = 1200) -> dict:
        """The history entry of a prompt once it has ended, well or not."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise Stop(f"ComfyUI died; its log is {self.log}.")
            history = self.get(f"/history/{prompt_id}")
            if prompt_id in history:
                return history[prompt_id]
            time.sleep(0.2)
        raise Stop(f"The prompt did not end within {seconds} s; ComfyUI's log is {self.log}.")

    def run(self, prompt: dict, seconds: float = 1200) -> dict:
        """Queue, wait, and return the outputs by node id. Ends with ComfyUI's own message when a node failed."""
        entry = self.wait(self.queue(prompt), seconds)
        failure = error_message(entry)
        if failure:
            raise Stop(f"a node failed: {failure}")
        return entry["outputs"]


def error_message(entry: dict) -> str | None:
    """What a failed or interrupted prompt said, or None."""
    for kind, data in entry["status"]["messages"]:
        if kind == "execution_error":
            return f"{data['node_type']}: {data['exception_message'].strip()}"
        if kind == "execution_interrupted":
            return "interrupted"
    return None


def to_prompt(workflow: dict, object_info: dict) -> dict:
    """A workflow as saved by the canvas -> the API format that the server runs.

    Notes, muted and bypassed nodes are left out.
    """
    nodes = {node["id"]: node for node in workflow["nodes"]}
    links = {link[0]: link for link in workflow["links"]}

    def source(number: int) -> list:
        """[node id, output] that feeds a link, as the canvas sees it.

        A bypassed node (mode 4) is seen through: by its first input of the same type.
        """
        _, origin, slot, _, _, kind = links[number][:6]
        if nodes[origin].get("mode", 0) != 4:
            return [str(origin), slot]
        alike = [entry.get("link") for entry in nodes[origin]["inputs"] if entry["type"] == kind]
        return source(next(link for link in alike if link is not None))

    prompt = {}
    for node in workflow["nodes"]:
        info = object_info.get(node["type"])
        if info is None or node.get("mode", 0) in (2, 4):
            if info is None and node["type"] not in ("Note", "MarkdownNote"):
                raise Stop(f"The workflow needs the node {node['type']}, which this ComfyUI does not have.")
            continue
        linked = {slot["name"]: source(slot["link"]) for slot in node.get("inputs", []) if slot.get("link") is not None}
        values, inputs = list(node.get("widgets_values") or []), {}
        for name, spec in {**info["input"].get("required", {}), **info["input"].get("optional", {})}.items():
            if is_widget(spec):
                value = values.pop(0) if values else spec[1].get("default")
                if len(spec) > 1 and spec[1].get("control_after_generate"):
                    values.pop(0)
                inputs[name] = value
            if name in linked:
                inputs[name] = linked[name]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def is_widget(spec: list) -> bool:
    options = spec[1] if len(spec) > 1 else {}
    return (isinstance(spec[0], list) or spec[0] in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")) and not options.get(
        "forceInput"
    )


# Commands


def demo(args) -> int:
    """Train on the bundled tiny model with workflows/tiny_demo.json, before and after side by side."""
    try:
        comfyui = find_comfyui(args.comfyui)
    except Stop as reason:
        if args.comfyui or os.environ.get("COMFYUI_PATH"):
            raise
        return headless_demo(str(reason), args)
    python = environment(comfyui)
    workflow = json.loads((ROOT / "workflows" / "tiny_demo.json").read_text(encoding="utf-8"))
    base = cache() / "demo" / time.strftime("%Y%m%d-%H%M%S")
    say(f"Starting ComfyUI {comfyui_version(comfyui)} from {comfyui} …")
    with Server(comfyui, python, base) as server:
        prompt = to_prompt(workflow, server.get("/object_info"))
        trainers = [node["inputs"] for node in prompt.values() if node["class_type"] == "ZTurboTrainLoRA"]
        say(f"Training a LoRA for {trainers[0]['steps']} steps and drawing before and after, in ComfyUI …")
        started = time.monotonic()
        outputs = server.run(prompt)
        seconds = time.monotonic() - started
    images = [
        str(base / "output" / image["subfolder"] / image["filename"])
        for output in outputs.values()
        for image in output.get("images", [])
        if image["type"] == "output"
    ]
    lora = max((base / "models" / "loras").rglob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
    events = [
        json.loads(line)
        for line in next((base / "output" / "zturbo").glob("*/events.jsonl")).read_text(encoding="utf-8").splitlines()
    ]
    paces = sorted(event["seconds"] for event in events if "seconds" in event)
    print(f"Done in {seconds:.0f} s.\nThe LoRA:     {lora}")
    for image in images:
        print(f"The pictures: {image}")
    print("Left: turbo without the LoRA. Right: with it. Same noise, 8 steps; a prompt a row.")
    if args.json:
        facts = {
            "lora": str(lora),
            "images": images,
            "steps": len(paces),
            "seconds_per_step": round(sum(paces) / len(paces), 4),
            "comfyui": comfyui_version(comfyui),
        }
        print(json.dumps(facts))
    return 0


def headless_demo(reason: str, args) -> int:
    """The demo's job without ComfyUI: the same recipe on diffusers' code."""
    say(f"{reason}\nThe same job runs without ComfyUI now, on diffusers' code.")
    python, base = environment(None), cache() / "demo" / time.strftime("%Y%m%d-%H%M%S")
    started = time.monotonic()
    zturbo(python, "train", "models/tiny/demo.toml", "--host", "diffusers", "--runs", str(base / "runs"))
    run = next((base / "runs").glob("smiley*"))
    prompts = [word for prompt in DEMO_PROMPTS for word in ("--prompt", prompt)]
    what = ("--model", "tiny", "--lora", str(run / "lora.safetensors"), "--before")
    how = ("--host", "diffusers", "--size", "128x128", "--seed", "42", "--out", str(base / "pictures"))
    zturbo(python, "sample", *what, *how, *prompts)
    images = [str(path) for path in sorted((base / "pictures").glob("*.png"))]
    events = map(json.loads, (run / "events.jsonl").read_text(encoding="utf-8").splitlines())
    paces = [event["seconds"] for event in events if "loss" in event]
    print(f"Done in {time.monotonic() - started:.0f} s.\nThe LoRA:     {run / 'lora.safetensors'}")
    for image in images:
        print(f"The pictures: {image}")
    print("Left: turbo without the LoRA. Right: with it. Same noise, 8 steps; a prompt a row.")
    if args.json:
        facts = {
            "lora": str(run / "lora.safetensors"),
            "images": images,
            "steps": len(paces),
            "seconds_per_step": round(sum(paces) / len(paces), 4),
            "comfyui": None,
        }
        print(json.dumps(facts))
    return 0


def zturbo(python: Path, *arguments: str):
    """The pack's own command line. Ends with a sentence when it does."""
    if run_python(python, ["-m", "zturbo", *arguments], {}):
        raise Stop(f"python -m zturbo {arguments[0]} failed; its reason is above.")


def test(args) -> int:
    """Run pytest on the named tiers. Without ComfyUI, what needs it is skipped with a sentence, unless --require."""
    unknown = [tier for tier in args.tiers if tier not in TIERS]
    if unknown:
        raise Stop(f"there is no test tier {unknown[0]!r}; choose from {', '.join(TIERS)}.")
    try:
        comfyui = find_comfyui(args.comfyui)
    except Stop as reason:
        if args.require:
            raise
        say(str(reason))
        comfyui = None
    python = environment(comfyui)
    variables = {"COMFYUI_PATH": str(comfyui) if comfyui else "", "ZTURBO_REQUIRE": "1" if args.require else ""}
    folders = [str(ROOT / "tests" / tier) for tier in args.tiers or TIERS]
    alone = args.rest or has_nvidia() or (os.cpu_count() or 1) < 2  # a card is shared by none
    workers = [] if alone else ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]
    if workers:
        variables |= {"OMP_NUM_THREADS": str((os.cpu_count() or 2) // 2), "OMP_WAIT_POLICY": "PASSIVE"}
    tests = ROOT / "tests"
    pytest = ["-m", "pytest", "--rootdir", str(tests), "-c", str(tests / "pytest.ini")]
    return run_python(python, [*pytest, *workers, *folders, *args.rest], variables)


def bench(args) -> int:
    return run_room("bench", args)


def lab(args) -> int:
    return run_room("lab", args)


def run_room(room: str, args) -> int:
    """Run `main(argv)` of a module in bench/ or lab/ with ComfyUI on the path."""
    names = sorted(path.stem for path in (ROOT / room).glob("*.py") if "def main(" in path.read_text(encoding="utf-8"))
    if args.name not in names:
        raise Stop(f"there is no {room} {args.name!r}; choose from {', '.join(names)}.")
    comfyui = find_comfyui(args.comfyui)
    variables = {"PYTHONPATH": os.pathsep.join([str(comfyui), str(ROOT)]), "COMFYUI_PATH": str(comfyui)}
    start = f"import sys, {room}.{args.name} as room; sys.exit(room.main(sys.argv[1:]))"
    rest = [*args.rest, *(["--json"] if args.json else [])]
    return run_python(environment(comfyui), ["-c", start, *rest], variables)


def run_python(python: Path, arguments: list[str], variables: dict[str, str]) -> int:
    return subprocess.run(
        [str(python), *arguments], cwd=ROOT, env={**KEEP_MEMORY, **os.environ, **variables}
    ).returncode


def comfyui(args) -> int:
    """Start ComfyUI with the pack in place, until Ctrl-C."""
    folder = find_comfyui(args.comfyui)
    with Server(folder, environment(folder), cache() / "comfyui") as server:
        print(f"ComfyUI {comfyui_version(folder)} with this pack: {server.address}")
        print(f"Its folders: {server.base}\nCtrl-C ends it.", flush=True)
        try:
            return server.process.wait()
        except KeyboardInterrupt:
            return 0


def main() -> int:
    argv, for_pytest = split_pytest(sys.argv[1:])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for command, needs in ((demo, ""), (test, "tiers"), (bench, "name"), (lab, "name"), (comfyui, "")):
        sub = commands.add_parser(
            command.__name__,
            help=(command.__doc__ or "").splitlines()[0] if command.__doc__ else None,
            allow_abbrev=False,
        )
        sub.set_defaults(run=command)
        sub.add_argument("--comfyui", help="the ComfyUI folder to use")
        if command is test:
            sub.add_argument("tiers", nargs="*")
            sub.add_argument("--require", action="store_true", help="a missing ComfyUI or browser is a failure")
        else:
            sub.add_argument("--json", action="store_true", help="the last line printed is one JSON object")
        if needs == "name":
            sub.add_argument("name")
    args, rest = parser.parse_known_args(argv)
    if rest and args.command in ("demo", "comfyui"):
        parser.error(f"unknown arguments: {' '.join(rest)}")
    args.rest = [*rest, *for_pytest]
    return args.run(args)


def split_pytest(argv: list[str]) -> tuple[list[str], list[str]]:
    """`test`: everything from the first option that is not dev.py's own goes to pytest."""
    for i, word in enumerate(argv):
        if (
            argv[0] == "test"
            and word.startswith("-")
            and word.split("=")[0] not in ("--comfyui", "--require", "-h", "--help")
        ):
            return argv[:i], argv[i:]
    return argv, []


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
