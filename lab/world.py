"""The drawn world as tensors: latents and caption features, in batches of one shape; sampling with the bare model."""

import random
from dataclasses import dataclass

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from . import pictures
from .setup import TINY, WEIGHTS, WORK, log

CAPTION_TOKENS = 32  # every caption of the drawn world, template included, fits in one padding block
SIGMAS = (1.0, 0.954545, 0.9, 0.833333, 0.75, 0.642857, 0.5, 0.3, 0.0)  # simple, 8 steps, shift 3


@dataclass
class World:
    latents: dict[tuple[int, int], torch.Tensor]  # (H, W) of the latent -> [N, 16, H, W]
    caption_index: dict[tuple[int, int], torch.Tensor]  # (H, W) -> [N] rows of `features`
    features: torch.Tensor  # [captions + 1, 32, cap_feat_dim]; the last row is the empty caption
    lengths: torch.Tensor  # [captions + 1] tokens in front of the padding

    def batch(self, count: int, generator: torch.Generator, drop: float = 0.0):
        """(latents [count, 16, H, W], rows of `features` [count]) of one random shape.

        Captions are emptied with chance `drop`.
        """
        shape = list(self.latents)[torch.randint(len(self.latents), (1,), generator=generator).item()]
        pick = torch.randint(len(self.latents[shape]), (count,), generator=generator)
        rows = self.caption_index[shape][pick]
        empty = torch.rand(count, generator=generator) < drop
        return self.latents[shape][pick].float(), torch.where(empty, len(self.features) - 1, rows)


def caption_features(clip, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of ComfyUI's own CLIP, padded with zeros to [N, 32, C], and their lengths [N]."""
    rows, lengths = [], []
    for caption in captions:
        feature = clip.encode_from_tokens_scheduled(clip.tokenize(caption))[0][0].float()
        lengths.append(feature.shape[1])
        rows.append(torch.nn.functional.pad(feature[0], (0, 0, 0, CAPTION_TOKENS - feature.shape[1])))
    return torch.stack(rows), torch.tensor(lengths)


def refine(dit, features: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """`refine_caption` for a batch of unequal lengths inside one padding block: [B, 32, C] -> [B, 32, dim]."""
    from zturbo.hosts.comfy_forward import OPTIONS

    tokens = dit.cap_embedder(features)
    padding = torch.arange(CAPTION_TOKENS, device=features.device)[None] >= lengths[:, None].to(features.device)
    tokens = torch.where(padding[..., None], dit.cap_pad_token.to(tokens.dtype), tokens)
    _, (freqs,), _ = dit.embed_cap(features, device=features.device, dtype=features.dtype)
    for layer in dit.context_refiner:
        tokens = layer(tokens, None, freqs, transformer_options=OPTIONS)
    return tokens


def encode_pictures(taesd, images: torch.Tensor, device) -> torch.Tensor:
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        return taesd.taesd_encoder(images.to(device).float().div(255)).float().cpu()


def load_autoencoder(device):
    from comfy.taesd.taesd import TAESD

    taesd = TAESD(latent_channels=16)
    taesd.load_state_dict({key: value.float() for key, value in load_file(TINY / "vae.safetensors").items()})
    return taesd.to(device)


def load_turbo(device):
    """NextDiT with the bundled turbo's weights, frozen, fp32."""
    return load_dit(TINY / "z_image_turbo_tiny.safetensors", device)


def load_teacher(device):
    """NextDiT with the undistilled teacher's weights, frozen, fp32."""
    return load_dit(WEIGHTS / "teacher.safetensors", device)


def load_dit(path, device):
    from zturbo.hosts import comfy_tiny

    dit = comfy_tiny.build(torch.float32, device).diffusion_model.requires_grad_(False)
    dit.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return dit


def build(count: int, seed: int, device) -> World:
    """`count` drawn pictures: half at the wide sizes, half at the narrow ones; cached in lab/work."""
    from zturbo.hosts import comfy_tiny

    names = pictures.captions()
    features, lengths = caption_features(comfy_tiny.load_clip(), [*names, ""])
    path = WORK / f"world_{count}_{seed}.safetensors"
    if not path.is_file():
        draw_world(path, names, count, seed, device)
    stored = load_file(path)
    shapes = sorted({tuple(int(n) for n in key.split(".")[1:]) for key in stored})
    latents = {shape: stored[f"latents.{shape[0]}.{shape[1]}"] for shape in shapes}
    index = {shape: stored[f"captions.{shape[0]}.{shape[1]}"] for shape in shapes}
    return World(latents, index, features, lengths)


def draw_world(path, names: list[str], count: int, seed: int, device):
    rng, taesd, stored = random.Random(seed), load_autoencoder(device), {}
    sizes = pictures.WIDE + pictures.NARROW
    for number, size in enumerate(sizes):
        rows = [rng.randrange(len(names)) for _ in range(count // len(sizes))]
        drawn = np.stack([np.asarray(pictures.draw(names[row], size, rng)) for row in rows])
        images = torch.from_numpy(drawn).permute(0, 3, 1, 2)
        latents = torch.cat([encode_pictures(taesd, chunk, device) for chunk in images.split(32)])
        key = f"{size[1] // 8}.{size[0] // 8}"
        stored[f"latents.{key}"], stored[f"captions.{key}"] = latents.half().contiguous(), torch.tensor(rows)
        log.info("drawn and encoded size %d of %d, latent std %.3f", number + 1, len(sizes), latents.std().item())
    WORK.mkdir(exist_ok=True)
    save_file(stored, path)


def guided(dit, x, sigma, caption, empty, scale: float):
    """Velocity with classifier-free guidance (scale 1: none). caption, empty: refined tokens [B, 32, dim]."""
    from zturbo.hosts.comfy_forward import velocity

    sigma = torch.full((len(x),), sigma, device=x.device)
    if scale == 1.0:
        return velocity(dit, x, sigma, caption).float()
    both = velocity(dit, torch.cat((x, x)), torch.cat((sigma, sigma)), torch.cat((caption, empty))).float()
    with_caption, without = both.chunk(2)
    return without + scale * (with_caption - without)


@torch.no_grad()
def sample(dit, noise, caption, empty=None, sigmas=SIGMAS, scale=1.0, substeps=1, path=None):
    """Euler over `sigmas`, each interval in `substeps` equal parts. Appends the state at each of `sigmas` to `path`."""
    x = noise
    for high, low in zip(sigmas, sigmas[1:]):
        if path is not None:
            path.append(x)
        for part in range(substeps):
            here = high + (low - high) * part / substeps
            with torch.autocast(x.device.type, torch.bfloat16):
                v = guided(dit, x, here, caption, empty, scale)
            x = x + v * ((low - high) / substeps)
    if path is not None:
        path.append(x)
    return x


def contact_sheet(latents: torch.Tensor, taesd, path, columns: int = 8):
    """Decode latents [N, 16, H, W] of one shape into one PNG."""
    from PIL import Image

    with torch.no_grad():
        images = taesd.taesd_decoder(latents.to(next(taesd.parameters()).device)).clamp(0, 1).cpu()
    n, _, height, width = images.shape
    rows = -(-n // columns)
    sheet = torch.ones(3, rows * height, columns * width)
    for i, image in enumerate(images):
        y, x = i // columns * height, i % columns * width
        sheet[:, y : y + height, x : x + width] = image
    Image.fromarray(sheet.mul(255).round().byte().permute(1, 2, 0).numpy()).save(path)
