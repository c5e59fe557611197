#!/usr/bin/env python
"""Distils both passes of classifier-free guidance into one, at the same number of steps, and saves a stock pipeline.

    accelerate launch training/train_guidance_distillation.py --pretrained_teacher_model pipelines/emoji-scenes-64 \
        --dataset_name emoji-scenes --objects demo --use_lora --output_dir runs/agd --resume_from_checkpoint latest

The output folder loads with `DiffusionPipeline.from_pretrained(output_dir)`. See training/README.md.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from diffusers_ext.training.arguments import (
    add_data_arguments,
    add_training_arguments,
    check_arguments,
    positive,
    positive_int,
)
from diffusers_ext.training.data import make_source
from diffusers_ext.training.distillation.families import UNETS
from diffusers_ext.training.distillation.guidance import relative_error
from diffusers_ext.training.distillation.guided_points import GuidanceStudent, PointBatch, make_points
from diffusers_ext.training.distillation.teachers import Teacher
from diffusers_ext.training.export import finish_run, sample_sheet, save_pipeline, write_card
from diffusers_ext.training.streams import epoch_rows
from diffusers_ext.training.trainer import Trainer, make_accelerator


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data_arguments(parser)
    add_training_arguments(parser, learning_rate=None, train_batch_size=64, max_train_steps=5000, adam_beta2=0.999)
    group = parser.add_argument_group("distillation")
    group.add_argument("--pretrained_teacher_model", required=True, help="Folder or Hub id of the pipeline.")
    group.add_argument(
        "--use_lora", action="store_true", help="Train a LoRA and the input's projection, not a copy of the teacher."
    )
    group.add_argument("--lora_rank", type=positive_int, default=64)
    group.add_argument(
        "--unet_time_cond_proj_dim", type=positive_int, default=256, help="Width of the guidance embedding."
    )
    group.add_argument("--num_trajectories", type=positive_int, default=1000, help="Guided runs to learn from.")
    group.add_argument(
        "--trajectory_steps", type=positive_int, default=20, help="Steps of a run; sample with as many afterwards."
    )
    group.add_argument(
        "--w_min", type=positive, default=1.0, help="Least guidance_scale of the runs, as the pipeline has it."
    )
    group.add_argument("--w_max", type=positive, default=12.0, help="Most guidance_scale.")
    group = parser.add_argument_group("validation and export")
    group.add_argument("--validation_prompts", nargs="+", help="Default: captions that are never trained on.")
    group.add_argument("--export_dtype", choices=("fp32", "fp16"), default="fp32")
    args = check_arguments(parser, parser.parse_args(input_args))
    if args.w_min < 1.0:
        parser.error(f"--w_min {args.w_min:g} is a guidance_scale that pipelines do not apply; give 1 or more")
    if args.w_min > args.w_max:
        parser.error(f"--w_min {args.w_min:g} is above --w_max {args.w_max:g}; exchange them")
    if args.unet_time_cond_proj_dim < 4:
        parser.error(f"--unet_time_cond_proj_dim {args.unet_time_cond_proj_dim} holds no waves; give 4 or more")
    if args.learning_rate is None:
        args.learning_rate = 1e-4 if args.use_lora else 1e-5
    return args


def main(args: argparse.Namespace) -> None:
    accelerator = make_accelerator(args)
    device = accelerator.device
    source = make_source(args, device)
    teacher = Teacher(args.pretrained_teacher_model, device, UNETS, args.resolution)
    points = make_points(args, teacher, source, accelerator)
    student = GuidanceStudent(
        teacher, args.lora_rank if args.use_lora else None, args.unet_time_cond_proj_dim, args.seed
    )
    trainer = Trainer(args, accelerator, student)
    total = trainer.global_batch_size

    def make_batches(step: int) -> list[PointBatch]:
        keys = epoch_rows(args.seed, step * total, total, len(points), "points")
        return [points[keys[rows]] for rows in trainer.own_rows()]

    def predictions(model: torch.nn.Module, batch: PointBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """What the student says and what it should say."""
        batch = PointBatch(*(part.to(device) for part in batch))
        words = teacher.embeddings(batch.input_ids)
        # the pipelines tell guidance_scale - 1
        return model(batch.sample, batch.timesteps, words, batch.scale - 1.0), batch.guided

    def loss_of(model: torch.nn.Module, batch: PointBatch) -> torch.Tensor:
        return torch.nn.functional.mse_loss(*predictions(model, batch))

    @torch.no_grad()
    def error_of(model: torch.nn.Module, batch: PointBatch) -> float:
        size = args.train_batch_size
        parts = [predictions(model, batch.rows(slice(i, i + size))) for i in range(0, len(batch.sample), size)]
        said, wanted = (torch.cat(side) for side in zip(*parts))
        return float(relative_error(said, wanted))

    def unguided(sample: torch.Tensor, timesteps: torch.Tensor, words: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return teacher.denoise(sample, timesteps, words)

    held_out = points.held_out()
    prompts = list(args.validation_prompts or source.captions(source.draw(0, 24, "held_out")))
    scale = 0.5 * (args.w_min + args.w_max)

    def validate(step: int) -> tuple[dict[str, float], Any]:
        error = error_of(trainer.module, held_out)
        with student.active():
            sheet = sample_sheet(
                teacher.student_pipeline(student.unet, teacher.pipeline.scheduler), prompts, args.seed,
                num_inference_steps=args.trajectory_steps, guidance_scale=scale, height=args.resolution,
                width=args.resolution,
            )  # fmt: skip
        return {"relative_error": error}, sheet

    trainer.fit(make_batches, loss_of, validate)
    metrics = trainer.validate(validate)

    def write(folder: Path) -> None:
        errors = metrics["relative_error"], error_of(unguided, held_out)
        pipeline = teacher.student_pipeline(student.plain_unet(), teacher.pipeline.scheduler)
        save_pipeline(pipeline, folder, args.export_dtype)
        write_model_card(folder, args, trainer, teacher, prompts, scale, *errors)

    finish_run(trainer, write)


def write_model_card(
    folder: Path,
    args: argparse.Namespace,
    trainer: Trainer,
    teacher: Teacher,
    prompts: list[str],
    scale: float,
    error: float,
    before: float,
) -> None:
    name, steps = args.hub_model_id or Path(args.output_dir).name, args.trajectory_steps
    family = teacher.family.pipeline_class.__name__
    description = (
        f"`{Path(args.pretrained_teacher_model).name}` with guidance in one pass instead of two, by guidance distillation "
        f"with `training/train_guidance_distillation.py`, on {trainer.step * trainer.global_batch_size:,} points of "
        f"{args.num_trajectories:,} guided runs. `guidance_scale` is an input of the network; it was trained on "
        f"{args.w_min:g} to {args.w_max:g}, with {steps} steps and the scheduler of this folder. "
        f"A negative prompt is not read.\n\nRelative squared error of its predictions on guided runs never trained on: "
        f"{100 * error:.2f} %; without guidance the teacher is {100 * before:.2f} % off.\n\n"
        f"![samples](samples.png)\n\nFirst row: {'; '.join(prompts[:8])}.\n\n"
        f"```python\nfrom diffusers import {family}\n\n"
        f'pipe = {family}.from_pretrained("{name}")\n'
        f'image = pipe("{prompts[0]}", num_inference_steps={steps}, guidance_scale={scale:g}).images[0]\n```'
    )
    tags = ["diffusers", "text-to-image", teacher.family.tag, "guidance-distillation", "diffusers-ext"]
    write_card(folder, Path(args.output_dir).name, description, args, [*tags, *(["lora"] * args.use_lora)])


if __name__ == "__main__":
    main(parse_args())
