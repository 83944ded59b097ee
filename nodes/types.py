"""Types and names that the nodes share."""

from comfy_api.latest import io

CATEGORY = "Z-Image Turbo"
CONNECTED = "the one connected"  # of a file list: what comes in by a wire
LoraModel = io.Custom("LORA_MODEL")
LossMap = io.Custom("LOSS_MAP")
TrainingSet = io.Custom("ZTURBO_DATASET")
NetworkOptions = io.Custom("ZTURBO_NETWORK_OPTIONS")
OptimizerOptions = io.Custom("ZTURBO_OPTIMIZER_OPTIONS")
LossOptions = io.Custom("ZTURBO_LOSS_OPTIONS")
SavingOptions = io.Custom("ZTURBO_SAVING_OPTIONS")
AdapterSchedule = io.Custom("ZTURBO_ADAPTER_SCHEDULE")
HealthOptions = io.Custom("ZTURBO_HEALTH_OPTIONS")
