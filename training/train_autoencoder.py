#!/usr/bin/env python
"""Trains a small AutoencoderKL from scratch, or fine-tunes the decoder of one, and saves it in the stock layout.

    accelerate launch training/train_autoencoder.py --dataset_name emoji-scenes --objects demo --output_dir runs/vae \
        --max_train_steps 6000 --resume_from_checkpoint latest

The output folder loads with `AutoencoderKL.from_pretrained(output_dir)`. See training/README.md.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from diffusers_ext.metrics import psnr
from diffusers_ext.training.arguments import (
    add_data_arguments,
    add_training_arguments,
    check_arguments,
    not_negative,
    positive_int,
)
from diffusers_ext.training.autoencoding import (
    Autoencoding,
    new_autoencoder,
    normalise_latents,
    reconstruction_loss,
)
from diffusers_ext.training.data import Source, make_source
from diffusers_ext.training.export import finish_run, picture_grid, write_card
from diffusers_ext.training.streams import stream
from diffusers_ext.training.trainer import Trainer, make_accelerator


VALIDATION_BATCH = 50


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data_arguments(parser)
    add_training_arguments(
        parser, learning_rate=2e-3, lr_scheduler="cosine", decay_fraction=1.0, lr_end=0.03, train_batch_size=12,
        adam_weight_decay=0.0, ema_decay=0.999, max_train_steps=6000,
    )  # fmt: skip
    group = parser.add_argument_group("autoencoder")
    group.add_argument(
        "--pretrained_vae", help="Folder or Hub id of an AutoencoderKL (or of a pipeline) to start from."
    )
    group.add_argument(
        "--freeze_encoder", action="store_true", help="Train the decoder only; latents stay what they are."
    )
    group.add_argument("--block_out_channels", type=positive_int, nargs="+", default=[32, 64, 96])
    group.add_argument("--layers_per_block", type=positive_int, default=1)
    group.add_argument("--norm_num_groups", type=positive_int, default=2)
    group.add_argument("--latent_channels", type=positive_int, default=4)
    group.add_argument("--crop_size", type=positive_int, default=32, help="Side of the random crops trained on.")
    group.add_argument("--crops_per_image", type=positive_int, default=2)
    group.add_argument("--kl_weight", type=not_negative, default=2e-4)
    group.add_argument("--num_validation_images", type=positive_int, default=200)
    args = check_arguments(parser, parser.parse_args(input_args))
    factor = 2 ** (len(args.block_out_channels) - 1)
    if args.crop_size > args.resolution or args.crop_size % factor or args.resolution % factor:
        parser.error(
            f"--crop_size {args.crop_size} and --resolution {args.resolution} must be multiples of {factor}, "
            f"and a crop cannot be larger than the picture"
        )
    if args.freeze_encoder and not args.pretrained_vae:
        parser.error("--freeze_encoder keeps a trained encoder; give it with --pretrained_vae")
    return args


def load_autoencoder(args: argparse.Namespace) -> AutoencoderKL:
    if not args.pretrained_vae:
        torch.manual_seed(args.seed)
        return new_autoencoder(
            tuple(args.block_out_channels), args.layers_per_block, args.norm_num_groups, args.latent_channels
        )
    folder = Path(args.pretrained_vae)
    subfolder = "vae" if (folder / "vae").is_dir() else None
    vae = AutoencoderKL.from_pretrained(args.pretrained_vae, subfolder=subfolder, use_safetensors=True).float()
    if args.freeze_encoder:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    return vae


def random_crops(images: torch.Tensor, corners: torch.Tensor, size: int) -> torch.Tensor:
    """Crops (n k, 3, size, size) of images (n, 3, R, R) at corners (n, k, 2) in pixels."""
    crops = [image[:, y : y + size, x : x + size] for image, own in zip(images, corners.tolist()) for y, x in own]
    return torch.stack(crops).contiguous(memory_format=torch.channels_last)


def main(args: argparse.Namespace) -> None:
    accelerator = make_accelerator(args)
    source = make_source(args, accelerator.device, captions=False)
    vae = load_autoencoder(args)
    if args.torch_compile:
        vae.encoder.compile()
        vae.decoder.compile()
    trainer = Trainer(args, accelerator, Autoencoding(vae))
    total, n_crops = trainer.global_batch_size, args.crops_per_image
    side = args.crop_size // 2 ** (len(vae.config.block_out_channels) - 1)

    def make_batches(step: int) -> list[Any]:
        items = source.draw(step, total)
        room = args.resolution - args.crop_size + 1
        corners = torch.randint(room, (total, n_crops, 2), generator=stream(args.seed, step, "crops"))
        shape = (total, n_crops, vae.config.latent_channels, side, side)
        noise = torch.randn(shape, generator=stream(args.seed, step, "posterior"))
        return [
            (random_crops(source.images(items[rows]), corners[rows], args.crop_size), noise[rows].flatten(0, 1))
            for rows in trainer.own_rows()
        ]

    def loss_of(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        images, noise = batch
        restored, mean, logvar = model(images, noise.to(images.device))
        return reconstruction_loss(images, restored.float(), mean.float(), logvar.float(), args.kl_weight)

    held_out = source.draw(0, args.num_validation_images, "held_out")

    def validate(step: int) -> tuple[dict[str, float], Any]:
        values, shown = [], []
        for first in range(0, args.num_validation_images, VALIDATION_BATCH):
            images = source.images(held_out[first : first + VALIDATION_BATCH])
            restored = vae.decode(vae.encode(images).latent_dist.mode()).sample
            values.append(psnr(images, restored))
            shown = shown or [images[:12], restored[:12]]
        return {"psnr": float(torch.cat(values).mean())}, picture_grid(torch.cat(shown), columns=len(shown[0]))

    trainer.fit(make_batches, loss_of, validate)
    metrics: dict[str, Any] = dict(trainer.validate(validate))

    def write(folder: Path) -> None:
        metrics.update(steps=trainer.step, pictures=trainer.step * total, **latent_statistics(vae, source))
        if not args.freeze_encoder:  # a denoiser may already live in the latents of a frozen encoder
            normalise_latents(vae, torch.tensor(metrics["latent_mean"]), torch.tensor(metrics["latent_std"]))
        save_model(folder, args, vae, metrics)

    finish_run(trainer, write, with_samples=False)


def latent_statistics(vae: AutoencoderKL, source: Source, n_images: int = 1000) -> dict[str, Any]:
    """Mean and standard deviation of each latent channel on training pictures."""
    items = source.draw(0, n_images)
    modes = [
        vae.encode(source.images(items[first : first + VALIDATION_BATCH])).latent_dist.mode()
        for first in range(0, n_images, VALIDATION_BATCH)
    ]
    latents = torch.cat(modes).double().cpu()
    return {"latent_mean": latents.mean((0, 2, 3)).tolist(), "latent_std": latents.std((0, 2, 3)).tolist()}


def save_model(folder: Path, args: argparse.Namespace, vae: AutoencoderKL, metrics: dict[str, Any]) -> None:
    vae.save_pretrained(folder)
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    description = (
        f"An `AutoencoderKL` trained with `training/train_autoencoder.py`. Reconstructions of held-out pictures reach "
        f"{metrics['psnr']:.2f} dB PSNR. On training pictures its latent channels have the means "
        f"{[round(value, 3) for value in metrics['latent_mean']]} and standard deviations "
        f"{[round(value, 3) for value in metrics['latent_std']]}"
        + ("." if args.freeze_encoder else ", which are folded into its 1x1 convolutions: `scaling_factor` is 1.")
    )
    write_card(folder, Path(args.output_dir).name, description, args, ["diffusers", "autoencoder-kl", "diffusers-ext"])


if __name__ == "__main__":
    main(parse_args())
