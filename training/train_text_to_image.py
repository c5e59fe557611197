#!/usr/bin/env python
"""Trains a small text-to-image latent diffusion model from scratch, or fine-tunes one, and saves a stock pipeline.

    accelerate launch training/train_text_to_image.py --dataset_name emoji-scenes --objects demo \
        --pretrained_vae runs/vae --cache_latents 60000 --output_dir runs/t2i --resume_from_checkpoint latest

The output folder loads with `StableDiffusionPipeline.from_pretrained(output_dir)`. See training/README.md.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from diffusers_ext.training.arguments import (
    add_data_arguments,
    add_training_arguments,
    check_arguments,
    count,
    positive,
    positive_int,
    share,
)
from diffusers_ext.training.coupling import COUPLINGS, couple, draw_noise
from diffusers_ext.training.data import make_source
from diffusers_ext.training.export import finish_run, sample_sheet, save_pipeline, write_card
from diffusers_ext.training.latents import encoder_of, make_latents
from diffusers_ext.training.objectives import (
    PREDICTION_TYPES,
    min_snr_weights,
    noisy,
    stratified_uniform,
    target,
    weighted_mse,
)
from diffusers_ext.training.streams import stream
from diffusers_ext.training.text_to_image import (
    Denoising,
    assemble,
    new_text_encoder,
    new_unet,
    noise_levels,
    token_ids,
)
from diffusers_ext.training.tokenizer import train_tokenizer
from diffusers_ext.training.trainer import Trainer, make_accelerator


VALIDATION_ITEMS = 128
VALIDATION_BATCH = 32


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data_arguments(parser)
    add_training_arguments(parser)
    group = parser.add_argument_group("model")
    group.add_argument("--pretrained_model_name_or_path", help="Folder or Hub id of a pipeline to fine-tune.")
    group.add_argument("--pretrained_vae", help="Folder or Hub id of the frozen AutoencoderKL (or of a pipeline).")
    group.add_argument(
        "--unet_channels", type=positive_int, nargs="+", default=[64, 96, 128], help="Width of each level."
    )
    group.add_argument("--layers_per_block", type=positive_int, default=1)
    group.add_argument("--attention_heads", type=positive_int, default=4)
    group.add_argument("--norm_num_groups", type=positive_int, default=16)
    group.add_argument("--text_width", type=positive_int, default=128)
    group.add_argument("--text_layers", type=positive_int, default=2)
    group.add_argument("--max_tokens", type=positive_int, default=24, help="Length of a prompt with start and end.")
    group.add_argument(
        "--train_text_encoder", action=argparse.BooleanOptionalAction,
        help="Default: yes from scratch, no when fine-tuning.",
    )  # fmt: skip
    group = parser.add_argument_group("objective")
    group.add_argument("--prediction_type", choices=PREDICTION_TYPES, default="epsilon")
    group.add_argument("--snr_gamma", type=positive, help="min-SNR weighting; 5 is usual.")
    group.add_argument("--noise_coupling", choices=COUPLINGS, default="none")
    group.add_argument("--proportion_empty_prompts", type=share, default=0.1, help="For classifier-free guidance.")
    group.add_argument(
        "--cache_latents", type=count, default=0, help="Encode this many pictures once instead of new ones every step."
    )
    group = parser.add_argument_group("validation and export")
    group.add_argument("--validation_prompts", nargs="+", help="Default: captions that are never trained on.")
    group.add_argument("--num_inference_steps", type=positive_int, default=25)
    group.add_argument("--guidance_scale", type=positive, default=4.0)
    group.add_argument("--export_dtype", choices=("fp32", "fp16"), default="fp32")
    args = check_arguments(parser, parser.parse_args(input_args))
    if not args.pretrained_vae and not args.pretrained_model_name_or_path:
        parser.error(
            "give the frozen autoencoder with --pretrained_vae, or a pipeline with --pretrained_model_name_or_path"
        )
    if args.snr_gamma and args.prediction_type == "flow":
        parser.error("--snr_gamma is not defined for --prediction_type flow; leave it out")
    if args.train_text_encoder is None:
        args.train_text_encoder = args.pretrained_model_name_or_path is None
    return args


def load_parts(
    args: argparse.Namespace, vocabulary: list[str]
) -> tuple[AutoencoderKL, UNet2DConditionModel, CLIPTextModel, CLIPTokenizer]:
    """Autoencoder, UNet, text encoder and tokenizer, trained or new."""
    name = args.pretrained_vae or args.pretrained_model_name_or_path
    subfolder = "vae" if not args.pretrained_vae or (Path(name) / "vae").is_dir() else None
    vae = AutoencoderKL.from_pretrained(name, subfolder=subfolder, use_safetensors=True).float()
    if args.pretrained_model_name_or_path:
        name = args.pretrained_model_name_or_path
        # the newest revision of a name that its user chose; no code comes with it
        unet = UNet2DConditionModel.from_pretrained(name, subfolder="unet", use_safetensors=True).float()
        text = CLIPTextModel.from_pretrained(name, subfolder="text_encoder", use_safetensors=True).float()  # nosec B615
        return vae, unet, text, CLIPTokenizer.from_pretrained(name, subfolder="tokenizer")  # nosec B615
    tokenizer = train_tokenizer(vocabulary, args.max_tokens)
    torch.manual_seed(args.seed)
    text_encoder = new_text_encoder(tokenizer, args.text_width, args.text_layers, args.attention_heads)
    side = args.resolution // 2 ** (len(vae.config.block_out_channels) - 1)
    unet = new_unet(
        tuple(args.unet_channels), vae.config.latent_channels, side, args.text_width,
        args.layers_per_block, args.attention_heads, args.norm_num_groups,
    )  # fmt: skip
    return vae, unet, text_encoder, tokenizer


def main(args: argparse.Namespace) -> None:
    accelerator = make_accelerator(args)
    device = accelerator.device
    source = make_source(args, device)
    vae, unet, text_encoder, tokenizer = load_parts(args, source.vocabulary())
    vae.to(device, memory_format=torch.channels_last).requires_grad_(False).eval()
    text_encoder.requires_grad_(args.train_text_encoder)
    if args.torch_compile:
        unet.compile()
    trainer = Trainer(args, accelerator, Denoising(unet, text_encoder))
    total = trainer.global_batch_size
    encode = encoder_of(vae)
    data = make_latents(args, source, vae, encode, accelerator)

    def make_batches(step: int) -> list[Any]:
        items, keys = data.draw(step, total)
        captions = source.captions(items, step)
        emptied = torch.rand(total, generator=stream(args.seed, step, "empty-prompts")) < args.proportion_empty_prompts
        prompts = ["" if empty else caption for empty, caption in zip(emptied.tolist(), captions)]
        uniform = stratified_uniform(total, stream(args.seed, step, "timesteps"))
        shape = (total, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
        noise = draw_noise(args.noise_coupling, shape, stream(args.seed, step, "noise"))
        return [
            (data.latents(keys[rows]), noise[rows], uniform[rows], token_ids(tokenizer, prompts[rows]))
            for rows in trainer.own_rows()
        ]

    def loss_of(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        latents, noise, uniform, input_ids = batch
        timesteps, signal, spread = (level.to(device) for level in noise_levels(args.prediction_type, uniform))
        latents, noise, input_ids = latents.to(device), noise.to(device), input_ids.to(device)
        noise = couple(args.noise_coupling, latents, noise)
        sample = noisy(latents, noise, signal, spread).contiguous(memory_format=torch.channels_last)
        prediction = model(sample, timesteps, input_ids)
        wanted = target(args.prediction_type, latents, noise, signal, spread)
        return weighted_mse(prediction, wanted, min_snr_weights(args.prediction_type, signal, spread, args.snr_gamma))

    pipeline = assemble(vae, unet, text_encoder, tokenizer, args.prediction_type)
    held_out = source.draw(0, VALIDATION_ITEMS, "held_out")
    captions = source.captions(held_out)
    prompts = args.validation_prompts or captions[:24]
    slices = [slice(first, first + VALIDATION_BATCH) for first in range(0, VALIDATION_ITEMS, VALIDATION_BATCH)]
    clean = torch.cat([encode(source.images(held_out[rows])) for rows in slices])
    generator = stream(args.seed, 0, "validation")
    fixed = (
        clean,
        draw_noise(args.noise_coupling, clean.shape, generator),
        stratified_uniform(len(clean), generator),
        token_ids(tokenizer, captions),
    )

    def validate(step: int) -> tuple[dict[str, float], Any]:
        losses = [loss_of(trainer.module, [part[rows] for part in fixed]) for rows in slices]
        sheet = sample_sheet(
            pipeline, prompts, args.seed, num_inference_steps=args.num_inference_steps, guidance_scale=args.guidance_scale
        )  # fmt: skip
        return {"validation_loss": float(torch.stack(losses).mean())}, sheet

    trainer.fit(make_batches, loss_of, validate)
    metrics = trainer.validate(validate)

    def write(folder: Path) -> None:
        save_pipeline(pipeline, folder, args.export_dtype)
        write_model_card(folder, args, trainer, list(prompts), metrics)

    finish_run(trainer, write)


def write_model_card(
    folder: Path, args: argparse.Namespace, trainer: Trainer, prompts: list[str], metrics: dict[str, float]
) -> None:
    shown = "; ".join(prompts[:8])
    description = (
        f"A text-to-image latent diffusion model of {args.resolution} x {args.resolution} pixels, trained with "
        f"`training/train_text_to_image.py` on {trainer.step * trainer.global_batch_size:,} samples "
        f"(objective: {args.prediction_type}). Loss on captions never trained on: {metrics['validation_loss']:.4f}.\n\n"
        f"![samples](samples.png)\n\nFirst row: {shown}.\n\n"
        "```python\nfrom diffusers import StableDiffusionPipeline\n\n"
        f'pipe = StableDiffusionPipeline.from_pretrained("{args.hub_model_id or Path(args.output_dir).name}")\n'
        f'image = pipe("{prompts[0]}", num_inference_steps={args.num_inference_steps}, '
        f"guidance_scale={args.guidance_scale}).images[0]\n```"
    )
    tags = ["diffusers", "text-to-image", "stable-diffusion", "diffusers-ext"]
    write_card(folder, Path(args.output_dir).name, description, args, tags)


if __name__ == "__main__":
    main(parse_args())
