#!/usr/bin/env python
"""Trains a restoration model of mean-reverting diffusion, and saves it as an `MRRestorationPipeline`.

    accelerate launch training/train_mr_restoration.py --dataset_name emoji-scenes --photograph_share 0.6 \
        --output_dir runs/mr --resume_from_checkpoint latest

Degraded pictures are made on the fly (`--degradations`), or given in a second column of `metadata.jsonl` (`--degraded_column`). The
output folder loads with `MRRestorationPipeline.from_pretrained(output_dir)`. See training/README.md and docs/mean_reverting.md.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from diffusers_ext.data.degradations import DEGRADATIONS
from diffusers_ext.metrics import psnr, ssim
from diffusers_ext.models import RestorationUNet2DModel
from diffusers_ext.pipelines import MRRestorationPipeline
from diffusers_ext.schedulers import MRScheduler
from diffusers_ext.schedulers.mean_reverting_solvers import PREDICTION_TYPES
from diffusers_ext.training.arguments import (
    add_data_arguments,
    add_training_arguments,
    check_arguments,
    positive,
    positive_int,
    share,
)
from diffusers_ext.training.data import make_source
from diffusers_ext.training.export import finish_run, picture_grid, write_card
from diffusers_ext.training.objectives import stratified_uniform
from diffusers_ext.training.restoration import (
    LOSS_TARGETS,
    LOSS_TYPES,
    make_pairs,
    new_restoration_unet,
    restoration_loss,
    training_timesteps,
)
from diffusers_ext.training.streams import stream
from diffusers_ext.training.trainer import Trainer, make_accelerator


SHOWN = 8


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data_arguments(parser)
    add_training_arguments(parser, learning_rate=5e-4, train_batch_size=8, adam_weight_decay=0.0, ema_decay=0.999)
    group = parser.add_argument_group("pairs")
    group.add_argument(
        "--degradations", nargs="+", choices=tuple(DEGRADATIONS), metavar="NAME",
        help=f"How pictures are degraded, one way each; default all of {', '.join(DEGRADATIONS)}.",
    )  # fmt: skip
    group.add_argument("--degraded_column", help="Key of the degraded picture's path in metadata.jsonl, instead.")
    group.add_argument(
        "--photograph_share", type=share, default=0.0, help="Share of crops of the photographs in scikit-image."
    )
    group = parser.add_argument_group("model")
    group.add_argument("--pretrained_model_name_or_path", help="Folder or Hub id of a pipeline to fine-tune.")
    group.add_argument(
        "--unet_channels", type=positive_int, nargs="+", default=[24, 48, 96], help="Width of each level."
    )
    group.add_argument(
        "--layers_per_block", type=positive_int, nargs="+", default=[1, 1, 2],
        help="Blocks of each level, on the way down and up; one number is for all.",
    )  # fmt: skip
    group = parser.add_argument_group("objective")
    group.add_argument("--prediction_type", choices=PREDICTION_TYPES, default="v_prediction")
    group.add_argument("--loss_target", choices=LOSS_TARGETS, default="target")
    group.add_argument("--loss_type", choices=LOSS_TYPES, default="l2")
    group.add_argument("--snr_gamma", type=positive, help="min-SNR weighting; 5 is usual.")
    group.add_argument(
        "--start_share", type=share, default=0.0,
        help="Share of a batch at the last timestep, where the degraded picture alone says what to do; about 0.5 if training "
        "is short. Timesteps are even otherwise.",
    )  # fmt: skip
    group.add_argument(
        "--sigma_inf", type=positive, default=10 / 255,
        help="Standard deviation of pure noise; the size of what degradation changes, typically a few hundredths.",
    )  # fmt: skip
    group.add_argument("--num_train_timesteps", type=positive_int, default=100)
    group.add_argument("--theta_schedule", choices=("cosine", "linear", "constant"), default="cosine")
    group = parser.add_argument_group("validation and export")
    group.add_argument("--num_validation_images", type=positive_int, default=32)
    group.add_argument("--validation_nfes", type=positive_int, nargs="+", default=[5, 10, 20])
    group.add_argument("--export_dtype", choices=("fp32", "fp16"), default="fp32")
    args = check_arguments(parser, parser.parse_args(input_args))
    if args.degraded_column and not args.train_data_dir:
        parser.error("--degraded_column names a column of metadata.jsonl; give its folder with --train_data_dir")
    if args.degraded_column and (args.degradations or args.photograph_share):
        parser.error("--degraded_column gives the degraded pictures; leave out --degradations and --photograph_share")
    if args.loss_target == "optimum" and (args.prediction_type != "epsilon" or args.snr_gamma):
        parser.error("--loss_target optimum is defined for --prediction_type epsilon without --snr_gamma")
    if args.start_share == 1.0:
        parser.error("--start_share 1 leaves no other timestep; give less")
    if args.loss_target == "clean" and args.snr_gamma:
        parser.error("--loss_target clean has weights of its own; leave out --snr_gamma")
    if max(args.validation_nfes) > args.num_train_timesteps:
        parser.error(
            f"--validation_nfes {max(args.validation_nfes)} is more than --num_train_timesteps {args.num_train_timesteps}"
        )
    return args


def load_parts(args: argparse.Namespace) -> tuple[RestorationUNet2DModel, MRScheduler]:
    """UNet and scheduler, trained or new."""
    if args.pretrained_model_name_or_path:
        pipeline = MRRestorationPipeline.from_pretrained(args.pretrained_model_name_or_path)
        return pipeline.unet.float(), pipeline.scheduler
    torch.manual_seed(args.seed)
    unet = new_restoration_unet(
        tuple(args.unet_channels),
        tuple(args.layers_per_block) if len(args.layers_per_block) > 1 else args.layers_per_block[0],
        output_scale=args.sigma_inf if args.prediction_type == "v_prediction" else 1.0,
    )
    scheduler = MRScheduler(
        num_train_timesteps=args.num_train_timesteps,
        theta_schedule=args.theta_schedule,
        sigma_inf=args.sigma_inf,
        prediction_type=args.prediction_type,
    )
    return unet, scheduler


def main(args: argparse.Namespace) -> None:
    accelerator = make_accelerator(args)
    device = accelerator.device
    unet, scheduler = load_parts(args)
    pairs = make_pairs(args, make_source(args, torch.device("cpu"), captions=False))
    if args.torch_compile:
        unet.compile()
    trainer = Trainer(args, accelerator, unet)
    total, steps_of_process = trainer.global_batch_size, scheduler.config.num_train_timesteps

    def make_batches(step: int) -> list[Any]:
        clean, mean, _ = pairs.draw(step, total)
        uniform = stratified_uniform(total, stream(args.seed, step, "timesteps"))
        timesteps = training_timesteps(uniform, steps_of_process, args.start_share)
        noise = torch.randn(clean.shape, generator=stream(args.seed, step, "noise"))
        sample = scheduler.add_noise(clean, noise, timesteps, mean)
        return [tuple(part[rows] for part in (sample, clean, noise, timesteps, mean)) for rows in trainer.own_rows()]

    def loss_of(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        sample, clean, noise, timesteps, mean = (part.to(device) for part in batch)
        seen = scheduler.model_input(sample, mean).contiguous(memory_format=torch.channels_last)
        answer = model(seen, timesteps.float(), return_dict=False)[0]
        return restoration_loss(
            scheduler, answer, sample, clean, noise, timesteps, mean, args.loss_target, args.loss_type, args.snr_gamma
        )

    pipeline = MRRestorationPipeline(unet, MRScheduler.from_config(scheduler.config))
    pipeline.set_progress_bar_config(disable=True)
    clean, degraded, _ = pairs.draw(0, args.num_validation_images, "held_out")

    def validate(step: int) -> tuple[dict[str, float], Any]:
        metrics = {"psnr_degraded": mean_of(psnr(degraded * 2 - 1, clean * 2 - 1))}
        rows = [degraded[:SHOWN]]
        for count in args.validation_nfes:
            restored = pipeline(
                degraded, count, generator=stream(args.seed, 0, "validation-samples"), output_type="pt"
            ).images.cpu()
            metrics[f"psnr_{count}"] = mean_of(psnr(restored * 2 - 1, clean * 2 - 1))
            if args.resolution >= 11:  # the window of SSIM
                metrics[f"ssim_{count}"] = mean_of(ssim(restored * 2 - 1, clean * 2 - 1))
            rows.append(restored[:SHOWN])
        grid = picture_grid(torch.cat([*rows, clean[:SHOWN]]) * 2 - 1, columns=min(SHOWN, len(clean)))
        return metrics, grid

    trainer.fit(make_batches, loss_of, validate)
    metrics = trainer.validate(validate)

    def write(folder: Path) -> None:
        save_pipeline(pipeline, folder, args.export_dtype)
        write_model_card(folder, args, trainer, metrics)

    finish_run(trainer, write)


def mean_of(values: torch.Tensor) -> float:
    """The mean, of pictures that are not restored exactly."""
    return float(values[values.isfinite()].mean())


def save_pipeline(pipeline: MRRestorationPipeline, folder: Path, dtype: str) -> None:
    """Writes the pipeline; half precision from a copy, because the network itself may still be trained."""
    if dtype == "fp32":
        pipeline.save_pretrained(folder)
        return
    half = type(pipeline.unet).from_config(pipeline.unet.config)
    half.load_state_dict(pipeline.unet.state_dict())
    MRRestorationPipeline(half.half(), pipeline.scheduler).save_pretrained(folder)


def write_model_card(folder: Path, args: argparse.Namespace, trainer: Trainer, metrics: dict[str, float]) -> None:
    figures = "\n".join(
        f"| {count} | {metrics[f'psnr_{count}']:.2f} | {metrics.get(f'ssim_{count}', float('nan')):.4f} |"
        for count in args.validation_nfes
    )
    kinds = "given pairs" if args.degraded_column else ", ".join(args.degradations or DEGRADATIONS)
    description = (
        f"A restoration model of mean-reverting diffusion for pictures of any size, trained with "
        f"`training/train_mr_restoration.py` on {trainer.step * trainer.global_batch_size:,} crops of {args.resolution} x "
        f"{args.resolution} pixels ({kinds}).\n\n![samples](samples.png)\n\nRows: degraded, restored in "
        f"{', '.join(map(str, args.validation_nfes))} network evaluations, clean. On {args.num_validation_images} pictures never "
        f"trained on (degraded: {metrics['psnr_degraded']:.2f} dB):\n\n| evaluations | PSNR (dB) | SSIM |\n| --- | --- | --- |\n"
        f"{figures}\n\n```python\nfrom diffusers_ext import MRRestorationPipeline\n\n"
        f'pipe = MRRestorationPipeline.from_pretrained("{args.hub_model_id or Path(args.output_dir).name}")\n'
        f"restored = pipe(picture, num_inference_steps=5).images[0]\n```"
    )
    tags = ["diffusers", "image-restoration", "image-to-image", "diffusers-ext"]
    write_card(folder, Path(args.output_dir).name, description, args, tags)


if __name__ == "__main__":
    main(parse_args())
