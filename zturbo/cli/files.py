"""inspect and convert: LoRA and adapter files of every dialect."""

import json
import math
from pathlib import Path

from .. import convert, lorafile, network
from ..errors import LoraFileError, ZTurboError, readable
from . import headers

INSPECT = "what a LoRA or adapter file holds: names, rank, targets, dtype, norms, metadata"
CONVERT = "another trainer's file in the form that everything reads"
MODEL = (
    "only for a DoRA with a length for each output row: the model that it was trained on, "
    "a safetensors file or a folder of them"
)


def add(commands):
    from . import command

    inspect = command(commands, "inspect", run_inspect, INSPECT)
    inspect.add_argument("file", type=Path)
    inspect.add_argument("--parts", action="store_true", help="each part with its rank and norm")
    conversion = command(commands, "convert", run_convert, CONVERT)
    conversion.add_argument("source", type=Path, metavar="IN")
    conversion.add_argument("target", type=Path, metavar="OUT")
    conversion.add_argument("--rank", type=int, default=0, help="of the new file, by exact SVD; 0: as it is")
    conversion.add_argument("--dtype", choices=tuple(lorafile.DTYPES), default="bf16", help="of its numbers")
    conversion.add_argument("--model", type=Path, metavar="PATH", help=MODEL)
    conversion.add_argument("--overwrite", action="store_true", help="replace OUT if it is there")


def need(path: Path):
    if not path.is_file():
        raise LoraFileError(f"There is no file {path}.")


def inspected(path: Path) -> dict:
    """Facts of a file. norms: Frobenius, of what each part adds to its weight."""
    need(path)
    file = lorafile.read(path)
    norms = {name: one.delta().norm().item() for name, one in file.factors.items()}
    parts = {
        name: {"form": network.form(one), "rank": one.rank, "shape": list(one.shape), "norm": number(norms[name])}
        for name, one in sorted(file.factors.items())
    }
    return {
        "file": path.name,
        "mb": round(path.stat().st_size / 1e6, 3),
        "sha256": file.sha256,
        "names": file.dialect,
        "forms": sorted({network.form(one) for one in file.factors.values()}),
        "parts": parts,
        "rank": file.ranks,
        "dtype": file.dtypes,
        "targets": sorted({name.split(".", 2)[2] if name.count(".") > 1 else name for name in file.factors}),
        "layers": len({tuple(name.split(".")[:2]) for name in file.factors}),
        "norm": number(sum(norm**2 for norm in norms.values()) ** 0.5),
        "leftover": list(file.leftover),
        "notes": list(file.notes),
        "metadata": {key: value for key, value in file.metadata.items() if not value.startswith("data:")},
    }


def number(norm: float) -> float | None:
    """None for what is none, for which JSON has no word."""
    return round(norm, 6) if math.isfinite(norm) else None


def run_inspect(args) -> int:
    facts = inspected(args.file)
    if args.json:
        print(json.dumps(facts, ensure_ascii=False))
        return 0
    parts, metadata = facts.pop("parts"), facts.pop("metadata")
    for key, value in facts.items():
        if value not in ([], ""):
            print(f"{key:9} {', '.join(map(str, value)) if isinstance(value, list) else value}")
    print(f"{'parts':9} {len(parts)}")
    for name, one in parts.items() if args.parts else ():
        out, width = one["shape"]
        print(f"  {name}: {one['form']} of rank {one['rank']}, {out} x {width}, norm {one['norm']}")
    for key, value in sorted(metadata.items()):
        print(readable(f"{key}: {value if len(value) <= 200 else value[:200] + ' …'}"))
    return 0


def run_convert(args) -> int:
    need(args.source)
    if args.target.suffix != ".safetensors":
        raise ZTurboError(f"{args.target} does not end in .safetensors. Give such a name.")
    if args.target.exists() and not args.overwrite:
        raise ZTurboError(f"{args.target} is there already. Give another name, or --overwrite.")
    if not 0 <= args.rank <= 1024:
        raise ZTurboError(f"--rank is {args.rank}; it must be 0 (as it is) or up to 1024.")
    weights = None if args.model is None else headers.weights(args.model)
    made = convert.convert(args.source, args.rank, args.dtype, weights)
    lorafile.write(args.target, made.state, made.state.metadata)
    said = {"lora": str(args.target), "report": made.report}
    print(json.dumps(said) if args.json else f"{made.report}\n{args.target}")
    return 0
