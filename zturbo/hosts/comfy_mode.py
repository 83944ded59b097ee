"""Core works under inference mode, training cannot. What crosses from the one to the other goes through here.

A weight made under inference mode and moved outside of it (`Module.to`) becomes a tensor that has lost its
version counter: every view of it fails from then on, for this pack and for everything else in the session.
On a CPU nothing is moved, so nothing fails there. So whatever makes core load, move, cast or encode is done
in core's own mode, and training sees its weights through `lent`.
"""

import torch

core_mode = torch.inference_mode


def lent(tensor: torch.Tensor) -> torch.Tensor:
    """An ordinary tensor on the same memory, which autograd can save and view; read only.

    Not a copy, but on DirectML, whose tensors show no memory.
    """
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            return lent(tensor)
    if tensor.device.type == "privateuseone":
        return tensor.detach().clone()
    seen = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return seen.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
