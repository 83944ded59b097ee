"""sample: pictures with a LoRA at turbo speed, as previews are drawn."""

import json
import math
import re
from pathlib import Path

import numpy as np
from PIL import Image

from .. import lorafile, loraforms
from ..errors import ZTurboError
from ..recipe import Compute, Inputs, Previews, Recipe, Turbo
from . import hosts


def add(commands):
    from . import command

    sample = command(commands, "sample", run_sample, "draw with the turbo model and a LoRA")
    sample.add_argument(
        "--prompt", action="append", required=True, help="what to draw; more than once for more pictures"
    )
    sample.add_argument("--lora", type=Path, metavar="FILE", help="a LoRA of any dialect; without one, plain turbo")
    sample.add_argument(
        "--before", action="store_true", help="beside each picture the same without the LoRA, on the left"
    )
    sample.add_argument("--strength", type=float, default=1.0, help="of the LoRA")
    sample.add_argument("--size", default="1024x1024", metavar="WxH", help="pixels, multiples of 16")
    sample.add_argument("--steps", type=int, default=8, help="turbo is distilled to 8")
    sample.add_argument("--seed", type=int, default=0, help="picks the noise")
    sample.add_argument(
        "--out", type=Path, default=Path("zturbo_pictures"), metavar="FOLDER", help="where the pictures go, as PNG"
    )
    hosts.add_options(sample, but=("adapter",))


def run_sample(args) -> int:
    size = re.fullmatch(r"([1-9]\d{1,3})x([1-9]\d{1,3})", args.size)
    if size is None or any(int(side) % 16 for side in size.groups()):
        raise ZTurboError(f"--size is {args.size!r}; write WIDTHxHEIGHT in multiples of 16, as 1024x1024.")
    width, height = map(int, size.groups())
    if not math.isfinite(args.strength):
        raise ZTurboError(f"--strength is {args.strength}; give a number, usually from 0 to 1.5.")
    previews = Previews(tuple(args.prompt), 0, width, height, args.steps, args.seed)
    try:
        given = Recipe(
            previews=previews,
            compute=Compute("fp32" if args.model == hosts.TINY else "bf16", False),
            turbo=Turbo(every=0),
            inputs=hosts.given(Inputs(), args),
        )
    except ZTurboError as error:
        raise ZTurboError(str(error).replace("preview_", "--")) from error
    hosts.need(given.inputs)
    file = lora_file(args.lora)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        said = f"The folder {args.out} cannot be made: {error.strerror}. Give another one with --out."
        raise ZTurboError(said) from error
    host = hosts.open_host(hosts.choose(args, given.inputs), given, args, None)
    state = {}
    if file is not None:
        lorafile.check_fit(file.factors, host.drawable, args.lora.name)
        scaled = {name: loraforms.scaled(one, args.strength) for name, one in file.factors.items()}
        state = lorafile.state_dict(scaled, lorafile.DTYPES["fp32"])
    host.encode_prompts()
    first, files = next_number(args.out), []
    images = host.draw(state)
    if args.before:
        images = [np.concatenate(pair, axis=1) for pair in zip(host.draw({}), images)]
    for number, image in enumerate(images):
        files.append(args.out / f"picture_{first + number:04d}.png")
        Image.fromarray(image).save(files[-1])
    print(json.dumps({"images": [str(file) for file in files]}) if args.json else "\n".join(map(str, files)))
    return 0


def lora_file(path: Path | None) -> lorafile.LoraFile | None:
    """None where none is asked for. Raises LoraFileError unless all of it is understood."""
    if path is None:
        return None
    if not path.is_file():
        raise ZTurboError(f"There is no LoRA {path}.")
    file = lorafile.read(path)
    lorafile.need_all(file.factors, list(file.leftover), path.name)
    return file


def next_number(folder: Path) -> int:
    """Behind the highest of the pictures that are there."""
    numbers = [path.stem.removeprefix("picture_") for path in folder.glob("picture_*.png")]
    return 1 + max((int(number) for number in numbers if number.isdecimal()), default=-1)
