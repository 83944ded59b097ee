"""A model family: what of a rectified-flow model is its own, and not flow matching's.

The trainer, the gauge and the dataset read this description; a host brings the model itself. Another family is another
`Family` here and another host in `hosts/`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from . import flow


@dataclass(frozen=True)
class Family:
    """name: as sentences say it. architecture, base_version: as LoRA files say it (modelspec, kohya).

    Latents are [B, channels, H / reduction, W / reduction] for H x W pixels, and a token covers patch x patch of them.
    shift, steps: of the noise levels that its turbo samples with. trained: prefixes of the module names whose Linears
    a run trains; blocks: of those that LoRA files may reach. groups: what people call modules in `targets` -> glob.
    """

    name: str
    architecture: str
    base_version: str
    channels: int
    reduction: int = 8
    patch: int = 2
    shift: float = 3.0
    steps: int = 8
    trained: tuple[str, ...] = ("layers.",)
    blocks: tuple[str, ...] = ("layers.",)
    groups: Mapping[str, str] = field(default_factory=dict)

    def latent(self, batch: int, width: int, height: int) -> tuple[int, int, int, int]:
        """The shape of latents of pictures of so many pixels."""
        return batch, self.channels, height // self.reduction, width // self.reduction

    @property
    def grain(self) -> int:
        """Pixels: a picture's sides are multiples of it."""
        return self.reduction * self.patch

    def sigmas(self) -> torch.Tensor:
        """[steps + 1] noise levels from 1 to 0 that its turbo samples with."""
        return flow.sampling_sigmas(self.steps, self.shift)


Z_IMAGE = Family(
    name="Z-Image",
    architecture="z-image-turbo/lora",
    base_version="zimage",
    channels=16,
    trained=("layers.",),
    blocks=("layers.", "noise_refiner.", "context_refiner."),
    groups={"attention": "*.attention.*", "feed_forward": "*.feed_forward.*", "adaln": "*.adaLN_modulation.*"},
)
