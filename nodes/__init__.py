"""The nodes: schema, unpack, call zturbo, wrap."""

from comfy_api.latest import ComfyExtension, io

from . import routes
from .compare import ZTurboCompare
from .convert import ZTurboConvertLoRA
from .dataset import ZTurboImageDataset
from .health import ZTurboHealth
from .make_adapter import ZTurboCheckAdapter, ZTurboExtractAdapter, ZTurboGenerateSet
from .model import ZTurboDeDistillAdapter, ZTurboLoadModel
from .options import (
    ZTurboAdapterSchedule,
    ZTurboHealthOptions,
    ZTurboLossOptions,
    ZTurboNetworkOptions,
    ZTurboOptimizerOptions,
    ZTurboSavingOptions,
)
from .sample import ZTurboSampler
from .save import ZTurboSaveLoRA
from .train import ZTurboTrainLoRA

NODES: list[type[io.ComfyNode]] = [
    ZTurboLoadModel,
    ZTurboDeDistillAdapter,
    ZTurboImageDataset,
    ZTurboTrainLoRA,
    ZTurboNetworkOptions,
    ZTurboOptimizerOptions,
    ZTurboLossOptions,
    ZTurboSavingOptions,
    ZTurboAdapterSchedule,
    ZTurboHealthOptions,
    ZTurboSampler,
    ZTurboSaveLoRA,
    ZTurboConvertLoRA,
    ZTurboHealth,
    ZTurboCompare,
    ZTurboGenerateSet,
    ZTurboExtractAdapter,
    ZTurboCheckAdapter,
]


class ZTurboExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


def extension() -> ZTurboExtension:
    routes.register()
    return ZTurboExtension()
