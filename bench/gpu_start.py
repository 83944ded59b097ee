"""`bench gpu` on a machine without a package index, from the archive beside this file.

    python3 FOLDER/start.py [options of bench gpu]

Needs Python 3.12 and PyTorch with CUDA, and what machines with PyTorch mostly have (NEEDS). Everything is unpacked into
a temporary folder, which is removed at the end. Facts go to gpu.json in the working directory, or to --out FILE.
Standard library only.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ARCHIVE = "bench.tar.xz"
NEEDS = (
    "torch", "torchvision", "torchaudio", "numpy", "scipy", "transformers", "tokenizers", "sentencepiece",
    "safetensors", "peft", "accelerate", "einops", "aiohttp", "yarl", "yaml", "PIL", "tqdm", "psutil", "filelock",
    "requests",
)  # fmt: skip
RUN = "import sys, bench.gpu as room; sys.exit(room.main(sys.argv[1:]))"


def start(argv: list[str]) -> int:
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if sys.version_info[:2] != (3, 12) or missing:
        lacks = f"lacks {', '.join(missing)}" if missing else f"is {sys.version_info[0]}.{sys.version_info[1]}"
        raise SystemExit(f"start.py: this Python {lacks}; take one of version 3.12 with these packages.")
    out = [] if any(word.split("=")[0] == "--out" for word in argv) else ["--out", str(Path.cwd() / "gpu.json")]
    place = Path(tempfile.mkdtemp(prefix="zturbo-bench-"))
    try:
        with tarfile.open(Path(__file__).resolve().parent / ARCHIVE) as packed:
            packed.extractall(place, filter="data")
        comfyui, paths = place / "ComfyUI", [place / "ComfyUI", place / "pack", place / "site"]
        found = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
        env = {"COMFYUI_PATH": str(comfyui), "PYTHONPATH": os.pathsep.join([*map(str, paths), *found])}
        return subprocess.run([sys.executable, "-P", "-c", RUN, *argv, *out], env={**os.environ, **env}).returncode
    finally:
        shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(start(sys.argv[1:]))
