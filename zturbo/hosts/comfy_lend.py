"""Weights of core's modules, lent to training as the modules' own forwards would get them."""

from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from typing import Any

import comfy.ops
import comfy.quant_ops
import torch
import torch.nn.functional as F

from .. import lowrank
from . import comfy_adapter
from .comfy_mode import core_mode, lent


def fetcher(module: torch.nn.Module) -> lowrank.Fetch:
    """Lends weight and bias of a Linear or norm as its own forward gets them: moved, cast, dequantised, patched."""

    @contextmanager
    def fetch(x: torch.Tensor):
        with core_mode():
            give_back, weight, bias = borrow(module, x)
        try:
            yield lent(weight), None if bias is None else lent(bias)
        finally:
            give_back()  # pins and streams; it touches no tensor

    return fetch


def borrow(module: torch.nn.Module, x: torch.Tensor) -> tuple[Callable[[], None], torch.Tensor, torch.Tensor | None]:
    """(what gives them back, weight, bias) of a module for an input like x."""
    own = getattr(module, "cast_bias_weight", None)  # the GGUF loaders' Linears bring one
    if own is not None:
        weight, bias = own(x)[:2]
        return nothing, weight, bias
    if not hasattr(module, "weight_function"):
        bias = getattr(module, "bias", None)
        return nothing, module.weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    weight, bias, offload = comfy.ops.cast_bias_weight(module, x, offloadable=True)
    give_back = nothing if offload is None else partial(comfy.ops.uncast_bias_weight, module, weight, bias, offload)
    try:
        if isinstance(weight, comfy.quant_ops.QuantizedTensor):
            weight = weight.dequantize().to(x.dtype)
        smoothing = getattr(module, "pre_quant_scale", None)  # core multiplies the input by it; here the columns are
        return give_back, weight if smoothing is None else weight * smoothing.to(weight), bias
    except BaseException:
        give_back()
        raise


def nothing():
    """What gives back a weight that was not borrowed from anywhere."""


def fetchers(dit) -> dict[str, tuple[Any, lowrank.Fetch]]:
    """Name -> (Linear, fetch), for all Linears."""
    return {name: (module, fetcher(module)) for name, module in comfy_adapter.linears(dit).items()}


def normal_norms(dit):
    """RMSNorms that autograd can save, while the context lasts.

    Weights made under inference mode are copied at each use (they are small).
    """
    return lowrank.covered(
        (module, _norm_forward(module, fetcher(module)))
        for module in dit.modules()
        if isinstance(module, torch.nn.RMSNorm)
    )


def _norm_forward(module, fetch):
    def forward(x: torch.Tensor) -> torch.Tensor:
        with fetch(x) as (weight, _):
            return F.rms_norm(x, module.normalized_shape, weight.clone(), module.eps)

    return forward
