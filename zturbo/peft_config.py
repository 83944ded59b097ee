"""The scales that PEFT keeps out of its tensors.

They stand in adapter_config.json, or in the header of a file that diffusers saved.
"""

import json
import math
import re
from pathlib import Path

from .errors import LoraFileError

BESIDE = "adapter_config.json"
HEADER = "lora_adapter_metadata"
LARGEST = 10**6  # of a rank or an alpha
MISSING = f"PEFT keeps the scale in {BESIDE}, which is not beside the file: 1 is assumed."
LONGEST_PATTERN = 500  # characters


def find(path: Path, metadata: dict[str, str], peft: bool) -> dict | None:
    """The configuration that belongs to a file, if there is one.

    peft: its keys have PEFT's names. Raises LoraFileError for one that cannot be read.
    """
    beside = path.with_name(BESIDE)
    try:
        if HEADER in metadata:
            config = json.loads(metadata[HEADER])
        elif peft and beside.is_file():
            config = json.loads(beside.read_text(encoding="utf-8"))
        else:
            return None
    except (OSError, ValueError, RecursionError) as error:
        raise LoraFileError(_unreadable(path.name, error)) from error
    if not isinstance(config, dict):
        raise LoraFileError(f"The configuration of {path.name} is no table of settings. Copy {BESIDE} again.")
    return {key.removeprefix("transformer."): value for key, value in config.items()}


def scale(config: dict, name: str, rank: int, file: str) -> float:
    """alpha / rank of one module, as PEFT has it (peft 0.21, tuners/lora/layer.py and tuners/lycoris_utils.py).

    rank: used where the configuration has none. Raises LoraFileError for values that are no numbers.
    """
    r = _of(config.get("rank_pattern"), name, config.get("r", rank), file)
    alpha = _of(config.get("alpha_pattern"), name, config.get("lora_alpha", config.get("alpha", r)), file)
    if not all(isinstance(value, (int, float)) and abs(value) <= LARGEST for value in (r, alpha)) or r < 1:
        raise LoraFileError(_no_scale(file, name, r, alpha))
    return alpha / (math.sqrt(r) if config.get("use_rslora") else r)


def _of(patterns, name: str, otherwise, file: str):
    """What a pattern table says for a module. Raises LoraFileError.

    Its keys are names' ends, or regular expressions for them.
    """
    if not isinstance(patterns or {}, dict):
        raise LoraFileError(_no_table(file, patterns))
    for pattern, value in (patterns or {}).items():
        if _could_take_for_ever(pattern):
            raise LoraFileError(_too_involved(file, pattern))
        try:
            if re.fullmatch(rf"(.*\.)?({pattern})", name):
                return value
        except (re.error, RecursionError, OverflowError):
            continue
    return otherwise


def _could_take_for_ever(pattern: str) -> bool:
    if len(pattern) > LONGEST_PATTERN:
        return True
    return bool(re.search(r"\)[*+?{]|\\[1-9]", pattern)) or len(re.findall(r"[*+{]", pattern)) > 3


# What is said of a configuration


def _unreadable(file: str, error: Exception) -> str:
    return f"The configuration of {file} ({BESIDE}, or the header's {HEADER}) cannot be read: {error}. Copy it again."


def _no_scale(file: str, part: str, rank, alpha) -> str:
    return (
        f"The configuration of {file} says rank {rank!r} and alpha {alpha!r} for {part}; "
        f"both must be numbers up to {LARGEST:,}, the rank above 0."
    )


def _no_table(file: str, patterns) -> str:
    return f"The configuration of {file} has {patterns!r:.80} for a table of patterns. Copy {BESIDE} again."


def _too_involved(file: str, pattern: str) -> str:
    return (
        f"The configuration of {file} has the pattern {pattern!r:.80}, which is too involved. Write the modules' names."
    )
