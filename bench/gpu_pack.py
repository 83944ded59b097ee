"""Packs `bench gpu` for a machine with a card and Python 3.12 with PyTorch, but without a package index.

One archive, small enough to be carried: ComfyUI's code without its models, this project as it was committed, and the
packages that such a machine mostly lacks, in the versions of the environment that packs. Beside it start.py, which
unpacks and runs it.
"""

import importlib.metadata
import io
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from bench.gpu_start import ARCHIVE

ROOT = Path(__file__).resolve().parent.parent
MOST = 64e6  # bytes of the archive
PACKAGES = (
    "comfy-kitchen", "comfy-aimdo", "torchsde", "trampoline", "diffusers", "simpleeval", "blake3", "alembic", "Mako",
    "SQLAlchemy", "pydantic", "pydantic-core", "annotated-types", "typing-inspection", "pydantic-settings",
    "python-dotenv", "spandrel", "kornia", "kornia-rs", "importlib-metadata", "greenlet", "pytest", "pluggy",
    "iniconfig",
)  # fmt: skip
GLIBC = ("1", "2014", "_2_17", "_2_24", "_2_27", "_2_28", "_2_31", "_2_34")  # pip takes none but the ones it is told
NOT_OURS = ("lab", "docs")
NOT_COMFYUIS = {
    ".git", ".ci", ".github", "blueprints", "comfy_api_nodes", "custom_nodes", "tests", "tests-unit", "models", "user",
    "output", "input", "temp",
}  # fmt: skip
EMPTY = ("input", "output", "temp", "models", "user", "custom_nodes")  # that ComfyUI expects
NOT_USED = "comfy_kitchen/backends/hip/_C"  # AMD's part


def prepare(folder: Path, comfyui: Path, as_json: bool) -> int:
    """Write the archive and start.py into a folder that git ignores. Ends with a sentence where that cannot be."""
    folder = folder.absolute()
    check(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="zturbo-pack-") as work:
        site = packages(Path(work))
        with tarfile.open(folder / ARCHIVE, "w:xz", preset=3) as packed:
            packed.add(site, "site")
            add_comfyui(packed, comfyui)
            add_project(packed)
    shutil.copyfile(ROOT / "bench" / "gpu_start.py", folder / "start.py")
    size = (folder / ARCHIVE).stat().st_size
    if size > MOST:
        raise SystemExit(f"bench gpu: the archive has {size / 1e6:.1f} MB; it may have {MOST / 1e6:.0f}.")
    print(f"{folder / ARCHIVE}: {size / 1e6:.1f} MB. Where the card is: python3 {folder.name}/start.py", flush=True)
    if as_json:
        print(json.dumps({"archive": str(folder / ARCHIVE), "bytes": size}))
    return 0


def check(folder: Path):
    ignored = subprocess.run(["git", "check-ignore", "-q", str(folder)], cwd=ROOT, capture_output=True).returncode == 0
    if folder.is_relative_to(ROOT) and not ignored:
        raise SystemExit(f"bench gpu: git does not ignore {folder}. Give one below build/, or outside the project.")
    if subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True).stdout:
        print("Only what is committed is packed; this checkout has more.", flush=True)


def packages(work: Path) -> Path:
    """A folder of unpacked wheels for Python 3.12 on Linux."""
    wheels, site = work / "wheels", work / "site"
    wanted = [f"{name}=={importlib.metadata.version(name)}" for name in PACKAGES]
    platforms = [f"--platform=manylinux{version}_x86_64" for version in GLIBC]
    only = ["--no-deps", "--only-binary=:all:", "--python-version=3.12", "--implementation=cp", *platforms]
    pip = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, *only, "-d", str(wheels), *wanted], check=True)
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as packed:
            packed.extractall(site, [name for name in packed.namelist() if not name.startswith(NOT_USED)])
    (site / "av").mkdir()
    shutil.copyfile(ROOT / "bench" / "gpu_av.py", site / "av" / "__init__.py")
    return site


def add_comfyui(packed: tarfile.TarFile, comfyui: Path):
    def wanted(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
        parts = Path(info.name).parts
        return None if "__pycache__" in parts or parts[1:2] and parts[1] in NOT_COMFYUIS else info

    packed.add(comfyui, "ComfyUI", filter=wanted)
    for name in EMPTY:
        empty = tarfile.TarInfo(f"ComfyUI/{name}")
        empty.type, empty.mode = tarfile.DIRTYPE, 0o755
        packed.addfile(empty)


def add_project(packed: tarfile.TarFile):
    """What is committed."""
    archived = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archived)) as own:
        for member in own:
            if Path(member.name).parts[0] not in NOT_OURS:
                file = own.extractfile(member) if member.isfile() else None
                member.name = f"pack/{member.name}"
                packed.addfile(member, file)
