"""Stage 1: the small autoencoder (TAESD's form, 16 channels, f8), trained on drawn clutter and photographs.

Its latents are the space that Flux's VAE has after `process_latent_in`: about unit variance. The file
carries Flux's scale and shift, so ComfyUI's Flux latent format maps them there and back.
"""

import argparse
import random
import time

import numpy as np
import skimage.data
import torch
from safetensors.torch import load_file, save_file

from . import pictures
from .setup import TINY, WORK, log, use_comfy

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "retina", "motorcycle")
SIDE = 64


def load_photographs() -> list[np.ndarray]:
    images = [getattr(skimage.data, name)() for name in PHOTOGRAPHS if name != "motorcycle"]
    return [image[::step, ::step] for image in images for step in (1, 2)]


def crop(images: list[np.ndarray], rng: random.Random) -> np.ndarray:
    image = rng.choice([i for i in images if min(i.shape[:2]) >= SIDE])
    y, x = rng.randint(0, image.shape[0] - SIDE), rng.randint(0, image.shape[1] - SIDE)
    return image[y : y + SIDE, x : x + SIDE]


def picture_bank(count: int, seed: int) -> torch.Tensor:
    """[count, 3, 64, 64] uint8: half of the drawn world, a quarter clutter, a quarter photographs."""
    rng = random.Random(seed)
    photographs, captions = load_photographs(), pictures.captions()
    bank = []
    for i in range(count):
        if i % 4 == 0:
            bank.append(crop(photographs, rng))
        elif i % 4 == 1:
            bank.append(np.asarray(pictures.draw_anything((SIDE, SIDE), rng)))
        else:  # a crop out of a 128-pixel picture: the edges that the model will see
            if i % 8:
                whole = pictures.draw(rng.choice(captions), (128, 128), rng)
            else:
                whole = pictures.draw_smiley((128, 128), "blue", rng)
            bank.append(crop([np.asarray(whole)], rng))
    return torch.from_numpy(np.stack(bank)).permute(0, 3, 1, 2).contiguous()


def initialise(model):
    """Comfy's layers skip initialisation.

    Residual branches start small, so that the deep plain stack trains from the start.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu" if ".conv." in name else "linear")
            if name.endswith("conv.4"):
                module.weight.data *= 0.2
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)


def main(argv: list[str]):
    parser = argparse.ArgumentParser(prog="lab autoencoder")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--decoder-only",
        action="store_true",
        help="go on from the bundled file with the encoder, and so all latents, as they are",
    )
    args = parser.parse_args(argv)
    device = use_comfy()
    from comfy.taesd.taesd import TAESD

    torch.manual_seed(args.seed)
    model = TAESD(latent_channels=16).to(device, memory_format=torch.channels_last)
    initialise(model)
    if args.decoder_only:
        model.load_state_dict({key: value.float() for key, value in load_file(TINY / "vae.safetensors").items()})
    encoder, decoder = model.taesd_encoder, model.taesd_decoder
    bank = picture_bank(4096, args.seed)
    optimizer = torch.optim.AdamW(
        [*decoder.parameters()] if args.decoder_only else [*encoder.parameters(), *decoder.parameters()],
        lr=1e-3,
        weight_decay=0,
        betas=(0.9, 0.99),
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, args.steps, pct_start=0.05)
    started = time.time()
    for step in range(args.steps):
        images = (
            bank[torch.randint(len(bank), (args.batch,))]
            .to(device)
            .float()
            .div(255)
            .contiguous(memory_format=torch.channels_last)
        )
        with torch.autocast(device.type, torch.bfloat16):
            with torch.set_grad_enabled(not args.decoder_only):
                latents = encoder(images)
            noisy = latents.float() + 0.05 * torch.randn(latents.shape, device=device)
            decoded = decoder(noisy)
        latents, error = latents.float(), decoded.float() - images
        spread = latents.mean((0, 2, 3)).square().mean() + (latents.std((0, 2, 3)) - 1).square().mean()
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        loss = error.abs().mean() + 2 * error.square().mean() + edges + 0.01 * spread
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % 50 == 0 or step + 1 == args.steps:
            psnr = -10 * error.square().mean().log10().item()
            log.info(
                "autoencoder step %d loss %.4f psnr %.1f latent std %.3f, %.0f s",
                step,
                loss.item(),
                psnr,
                latents.std().item(),
                time.time() - started,
            )
        if step % 250 == 249 or step + 1 == args.steps:
            export(model)


def export(model):
    """Half precision, with Flux's latent scale and shift, the form that core's VAE loader reads."""
    WORK.mkdir(exist_ok=True)
    TINY.mkdir(parents=True, exist_ok=True)
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    state["vae_scale"], state["vae_shift"] = torch.tensor(0.3611), torch.tensor(0.1159)
    half = {key: value.half() if value.ndim else value for key, value in state.items()}
    save_file(half, TINY / "vae.safetensors", metadata={"format": "pt"})
