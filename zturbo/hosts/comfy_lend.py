"""Weights of core's modules, lent to training as the modules' own forwards would get them."""

from contextlib import AbstractContextManager, contextmanager, nullcontext
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
            context, weight, bias = borrow(module, x)
        try:
            yield lent(weight), None if bias is None else lent(bias)
        finally:
            context.__exit__(None, None, None)  # gives pins and streams back, and touches no tensor

    return fetch


def borrow(
    module: torch.nn.Module, x: torch.Tensor
) -> tuple[AbstractContextManager, torch.Tensor, torch.Tensor | None]:
    """(what gives them back when it is left, weight, bias) of a module for an input like x."""
    own = getattr(module, "cast_bias_weight", None)  # the GGUF loaders' Linears bring one
    if own is not None:
        weight, bias = own(x)[:2]
        return nullcontext(), weight, bias
    if not hasattr(module, "weight_function"):
        bias = getattr(module, "bias", None)
        return nullcontext(), module.weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    context = comfy.ops.CastBiasWeightContext(module, x, offloadable=True)
    weight, bias = context.__enter__()
    try:
        if isinstance(weight, comfy.quant_ops.QuantizedTensor):
            weight = weight.dequantize().to(x.dtype)
        smoothing = getattr(module, "pre_quant_scale", None)  # core multiplies the input by it; here the columns are
        return context, weight if smoothing is None else weight * smoothing.to(weight), bias
    except BaseException:
        context.__exit__(None, None, None)
        raise


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
