"""Types and names that the nodes share."""

from comfy_api.latest import io

CATEGORY = "Z-Image Turbo"
TINY = "tiny (bundled)"
LoraModel = io.Custom("LORA_MODEL")
LossMap = io.Custom("LOSS_MAP")
TrainingSet = io.Custom("ZTURBO_DATASET")
