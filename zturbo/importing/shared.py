"""What both kinds of files say in the same words: optimizers, names, paths, sides, preview prompts."""

import contextlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .. import lycoris
from ..errors import ZTurboError
from ..filenames import bad_name
from .record import CHANGED, TAKEN, Moved, Theirs, brief, unique

GRAIN = 16  # pixels
# their name, in small letters and without what a package is called -> ours
OPTIMIZERS = {
    **dict.fromkeys(("adamw", "adam", "pagedadamw"), "adamw"),
    **dict.fromkeys(("adamw8bit", "adam8bit", "adamw8", "adam8", "pagedadamw8bit"), "adamw8bit"),
    "adafactor": "adafactor",
    **dict.fromkeys(("prodigy", "prodigy8bit", "prodigyopt"), "prodigy"),
    **dict.fromkeys(("adamwschedulefree", "radamschedulefree", "prodigyplusschedulefree"), "schedule_free"),
    **dict.fromkeys(("lion", "lion8bit", "pagedlion8bit"), "lion"),
    "came": "came",
    "muon": "muon",
}
ALIKE = {"adamw", "adamw8bit", "adafactor", "prodigy", "lion", "came", "muon", "prodigyopt", "adamwschedulefree"}
DECAY = ("adamw", "adamw8bit", "pagedadamw", "pagedadamw8bit")  # by 0.01 unless a file says else
PACKAGE = {"adamw8bit": "bitsandbytes"} | dict.fromkeys(
    ("adafactor", "prodigy", "schedule_free", "lion", "came"), "pytorch-optimizer"
)
LARGEST_FACTOR = 1024  # of a LoKr; more than the root of every width
WIDTHS = (3840, 10240, 256, 15360)  # of Z-Image's Linears
OWN_RATE = 0.1  # an optimizer that finds its own rate takes a smaller one as 1, as ai-toolkit does


@dataclass(frozen=True)
class Drawn:
    """A prompt with what else stands beside it; None: nothing."""

    prompt: str
    width: int | None = None
    height: int | None = None
    seed: int | None = None


def optimizer(moved: Moved, said: str, name: str, decay: float | None):
    """said: their setting as a line has it; name: the optimizer's there; decay: weight decay, None: not given."""
    plain = name.rsplit(".", 1)[-1].lower().replace("_", "").replace("-", "")
    ours = OPTIMIZERS.get(plain)
    if ours is None:
        ours = "prodigy" if plain.startswith("dadapt") else "adamw"
        why = "which finds its own rate, too" if ours == "prodigy" else "look at learning_rate, which was chosen for it"
        moved.put("optimizer.name", ours, said, f"there is no such optimizer here; {ours}, {why}")
    else:
        needs = f"needs the package {PACKAGE[ours]}" if ours in PACKAGE else ""
        near = "" if plain in ALIKE else "the nearest that there is here"
        moved.put("optimizer.name", ours, said, "; ".join(filter(None, (near, needs))), "" if near else TAKEN)
    if decay is None and plain in DECAY:
        moved.default("optimizer.weight_decay", 0.01, "weight_decay")
    if ours == "prodigy" and moved.values.get("optimizer.learning_rate", 0) < OWN_RATE:
        had = f"learning rate {moved.values.get('optimizer.learning_rate', 0):g}"
        moved.put("optimizer.learning_rate", 1.0, had, "prodigy finds its own rate and takes this as a factor on it")


def run_name(moved: Moved, said: str, name: str):
    """The nearest name that every system takes for a folder."""
    if not bad_name(name):
        moved.put("name", name, said)
        return
    mended = re.sub(r"[^\w .-]+", "_", name)[:80].strip(" ._-")
    mended = "my_lora" if bad_name(mended) else mended
    moved.put("name", mended, said, "the other cannot be a folder's name on every system")


def place(moved: Moved, ours: str, said: str, text: str, near: Path):
    """A path, whole where something is there, else as it is written, which training then says."""
    found = there(text, near)
    if found is not None:
        moved.put(ours, str(found), said, how=TAKEN)
    else:
        moved.put(ours, text, said, "nothing is there from here; set it, or give the option", TAKEN)


def there(text: str, near: Path) -> Path | None:
    """What a path leads to, seen from the file's folder, then from here. None: to nothing."""
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        path = Path(text).expanduser()
        for at in (near / path, path):
            if at.exists():
                return at.resolve()
    return None


def side(value, name: str) -> int:
    """Pixels of a square of that area, of a side or of [width, height]. Raises ZTurboError."""
    words = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
    try:
        sides = [float(word) for word in words if not isinstance(word, bool)]
        area = sides[0] * sides[-1]
        if len(sides) not in (1, 2) or not 64 <= (found := round(math.sqrt(area))) <= 4096:
            raise ValueError
    except (TypeError, ValueError, IndexError, OverflowError) as error:
        raise ZTurboError(f"{name} is {brief(value)}; it must be a side in pixels from 64 to 4096, or two.") from error
    return found


def previews(moved: Moved, said: str, drawn: list[Drawn]):
    """One size and one seed for all: what the file says of all, else those of the first prompt that has some."""
    moved.put("previews.prompts", tuple(one.prompt for one in drawn), said)
    for name in ("width", "height", "seed"):
        values = unique(getattr(one, name) for one in drawn if getattr(one, name) is not None)
        if values and f"previews.{name}" not in moved.values:
            _first(moved, said, name, values.pop(0))
        if values and values != [moved.values.get(f"previews.{name}")]:
            moved.leave(f"{said}, {name} {', '.join(map(str, values))}", f"all previews have one {name} here")


def _first(moved: Moved, said: str, name: str, value: int):
    if name == "seed":
        seed(moved, value, f"{said}, seed {value}")
    else:
        pixels(moved, f"previews.{name}", value, f"{said}, {name} {value}")


def seed(moved: Moved, value: int, said: str):
    """Of the previews."""
    if value < 0:
        moved.leave(said, "drawn anew each time there; here previews keep their noise, so that they compare")
    else:
        moved.put("previews.seed", value, said)


def pixels(moved: Moved, ours: str, value: int, said: str):
    """The nearest multiple of 16."""
    near = min(8192, max(GRAIN, round(value / GRAIN) * GRAIN))
    moved.put(ours, near, said, "" if near == value else "the nearest multiple of 16")


def noise_levels(moved: Moved, said: str, low: float, high: float):
    """Of sigma, where they are not all."""
    if (low, high) != (0, 1):
        for key, value in (("timesteps.min_sigma", low), ("timesteps.max_sigma", high)):
            moved.put(key, round(value, 4), said)


def keyed(texts: list[str]) -> dict[str, str]:
    """`["key=value", …]`, as kohya's programs take options for options."""
    pairs = (text.partition("=") for text in texts)
    return {key.strip(): value.strip().strip("'\"") for key, equals, value in pairs if equals}


def network_kind(moved: Moved, said: str, kind: str, rank: int, factor: int | None, whole: bool):
    """lora, dora, lokr, loha. factor: LoKr's, below 1 as large as can be; whole: both of its matrices are."""
    if kind != "lora":
        moved.put("network.kind", kind, said)
    if kind != "lokr":
        return
    factor = -1 if factor is None else factor
    if factor >= 1:
        moved.put("network.factor", factor, f"{said}, factor {factor}")
    else:
        moved.put("network.factor", LARGEST_FACTOR, f"{said}, factor {factor}", "as large as can be, as there", CHANGED)
    if whole:
        least = whole_rank(moved.values["network.factor"])
        why = "the least rank at which LoKr's second matrix is whole, as there; alpha has no effect then"
        moved.put("network.rank", max(rank, least), f"{said}, full rank", why)
        moved.put("network.alpha", float(max(rank, least)), f"{said}, full rank", why)


def whole_rank(factor: int) -> int:
    """The least rank at which the second matrix of a LoKr is whole in every Linear. See `lycoris.create_lokr`."""
    return -(-max(lycoris.split(width, factor)[1] for width in WIDTHS) // 2)


def noise(moved: Moved, source: Theirs, keys: Mapping[str, str]):
    """What shapes the noise itself, where it is on."""
    for key, why in keys.items():
        value = source.raw(key)
        if value not in (None, False, 0):
            moved.leave(source.said(key), why)
