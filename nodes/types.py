"""Types and names that the nodes share."""

import folder_paths
from comfy_api.latest import io

from ..zturbo.errors import ZTurboError
from ..zturbo.hosts import comfy_load

CATEGORY = "Z-Image Turbo"
CONNECTED = "the one connected"  # of a file list: what comes in by a wire
UNWIRED = "unwired"  # an input that validate_inputs does not get, since nothing is connected
LoraModel = io.Custom("LORA_MODEL")
LossMap = io.Custom("LOSS_MAP")
TrainingSet = io.Custom("ZTURBO_DATASET")
NetworkOptions = io.Custom("ZTURBO_NETWORK_OPTIONS")
OptimizerOptions = io.Custom("ZTURBO_OPTIMIZER_OPTIONS")
LossOptions = io.Custom("ZTURBO_LOSS_OPTIONS")
SavingOptions = io.Custom("ZTURBO_SAVING_OPTIONS")
AdapterSchedule = io.Custom("ZTURBO_ADAPTER_SCHEDULE")
HealthOptions = io.Custom("ZTURBO_HEALTH_OPTIONS")


def need_one(file: str, lora: dict | None, what: str):
    """Raises ZTurboError unless a LoRA comes in one way only: chosen as a file, or wired."""
    if (file == CONNECTED) == (lora is None):
        raise ZTurboError(
            f"Choose {what}: connect one to lora and set the file to '{CONNECTED}', or choose a file and connect none."
        )


def fingerprint_of(file: str | None, *others: str) -> str:
    """Of a LoRA in models/loras, for a node's fingerprint_inputs. others: choices that are no file.

    file: None where it comes from another node.
    """
    return "" if file in (None, *others) else comfy_load.fingerprint(folder_paths.get_full_path("loras", file))


def one_way(file: str | None, lora, what: str, bundled: tuple[str, ...] = ()) -> bool | str:
    """The same for a node's validate_inputs, before anything runs. lora: None where it is wired, UNWIRED where not;
    file: None where it comes from another node."""
    if file is None:
        return True
    if file not in (CONNECTED, *bundled) and folder_paths.get_full_path("loras", file) is None:
        return f"There is no {file!r} in models/loras."
    try:
        need_one(file, None if lora == UNWIRED else {}, what)
        return True
    except ZTurboError as error:
        return str(error)
