"""import: a recipe out of another trainer's settings."""

import dataclasses
import json
from pathlib import Path

from .. import files, recipefile
from ..errors import ZTurboError, readable
from ..importing import Imported, read

IMPORT = "a recipe out of another trainer's settings, with a line for each of them; trains nothing"
CONFIG = "ai-toolkit's job (.yaml, .json), or the training or dataset file of sd-scripts or musubi-tuner (.toml)"
DATASET = "sd-scripts' or musubi-tuner's dataset file, where the training file does not name it"
NEEDED = ("model", "text_encoder", "vae", "adapter", "pictures")


def add(commands):
    from . import command

    one = command(commands, "import", run_import, IMPORT)
    one.add_argument("config", type=Path, metavar="CONFIG", help=CONFIG)
    one.add_argument("--dataset", type=Path, metavar="FILE", help=DATASET)
    one.add_argument("--output", type=Path, default=Path("recipe.toml"), metavar="FILE", help="the recipe")
    one.add_argument("--overwrite", action="store_true", help="replace the recipe if it is there")


def run_import(args) -> int:
    if args.output.suffix.lower() != ".toml":
        raise ZTurboError(f"{args.output} does not end in .toml. Give such a name.")
    if args.output.exists() and not args.overwrite:
        raise ZTurboError(f"{args.output} is there already. Give another name with --output, or --overwrite.")
    found = read(args.config, args.dataset)
    try:
        files.write(args.output, recipefile.to_toml(found.recipe).encode())
    except OSError as error:
        why = f"{error.strerror or error}. {files.advice(error)}"
        raise ZTurboError(f"{args.output} cannot be written: {why}") from error
    print(told(found, args.output) if args.json else spelled(found, args.output))
    return 0


def told(found: Imported, output: Path) -> str:
    lines = [dataclasses.asdict(line) for line in found.lines]
    return json.dumps({"recipe": str(output), "trainer": found.trainer, "settings": lines}, ensure_ascii=False)


def spelled(found: Imported, output: Path) -> str:
    lines = [readable(line.spelled()) for line in found.lines]
    missing = [name for name in NEEDED if not getattr(found.recipe.inputs, name)]
    options = " ".join(f"--{name.replace('_', '-')} …" for name in missing)
    begin = f"python -m zturbo plan {output}" + (f" {options}" if options else "")
    return "\n".join([*lines, f"Written: {output}. Look at it with: {begin}"])
