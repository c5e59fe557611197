#!/usr/bin/env python
"""Straightens a text-to-image flow by ReFlow, so that one to four Euler steps suffice, and saves a stock pipeline.

    accelerate launch training/train_reflow.py --pretrained_teacher_model pipelines/emoji-scenes-flow \
        --dataset_name emoji-scenes --objects demo --output_dir runs/reflow --resume_from_checkpoint latest

The output folder loads with `DiffusionPipeline.from_pretrained(output_dir)`. See training/README.md.
"""

import argparse
import logging
from pathlib import Path
from typing import Any

import torch

from diffusers_ext.training.arguments import (
    add_data_arguments,
    add_training_arguments,
    check_arguments,
    not_negative,
    positive,
    positive_int,
    share,
)
from diffusers_ext.training.data import make_source
from diffusers_ext.training.distillation.families import FAMILIES
from diffusers_ext.training.distillation.flow_pairs import (
    FlowPairs,
    euler_scheduler,
    guided_velocity,
    measure_flow,
    solver_levels,
)
from diffusers_ext.training.distillation.reflow import exponential_times, interpolate, reflow_loss
from diffusers_ext.training.distillation.teachers import DistilledUNet, Teacher, begin_at, save_student
from diffusers_ext.training.export import finish_run, sample_sheet, write_card
from diffusers_ext.training.objectives import stratified_uniform
from diffusers_ext.training.streams import stream
from diffusers_ext.training.trainer import Trainer, make_accelerator


logger = logging.getLogger(__name__)

VALIDATION_ITEMS = 32


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data_arguments(parser)
    add_training_arguments(parser, learning_rate=None, adam_beta2=0.999)
    group = parser.add_argument_group("pairs")
    group.add_argument("--pretrained_teacher_model", required=True, help="Folder or Hub id of the pipeline, a flow.")
    group.add_argument("--num_pairs", type=positive_int, default=20000, help="Paths of the teacher to learn from.")
    group.add_argument("--teacher_steps", type=positive_int, default=25, help="Euler steps of a path.")
    group.add_argument(
        "--teacher_guidance_scale", type=positive, default=3.0, help="Built into the student; 1 is no guidance."
    )
    group.add_argument(
        "--inverted_share", type=share,
        help="Share of pairs of real pictures, inverted by the teacher. Default: 0.05 without guidance, with guidance 0.",
    )  # fmt: skip
    group = parser.add_argument_group("distillation")
    group.add_argument("--use_lora", action="store_true", help="Train a LoRA on the teacher, not a copy of it.")
    group.add_argument("--lora_rank", type=positive_int, default=64)
    group.add_argument(
        "--pretrained_student_model",
        help="Folder or Hub id of a pipeline whose UNet the student starts at. Default: the teacher.",
    )
    group.add_argument("--time_density", choices=("exponential", "uniform"), default="exponential")
    group.add_argument("--time_base", type=positive, default=10.0, help="exponential: noise is so much more frequent.")
    group.add_argument(
        "--normalize_loss", action=argparse.BooleanOptionalAction, default=True,
        help="Divide each sample's loss by its own value; the loss in the log is then 1.",
    )  # fmt: skip
    group.add_argument("--high_pass", type=not_negative, default=0.0, help="How much more fine structure counts.")
    group = parser.add_argument_group("validation and export")
    group.add_argument("--validation_prompts", nargs="+", help="Default: captions that are never trained on.")
    group.add_argument("--num_inference_steps", type=positive_int, default=2)
    group.add_argument("--export_dtype", choices=("fp32", "fp16"), default="fp32")
    args = check_arguments(parser, parser.parse_args(input_args))
    if args.num_inference_steps > args.teacher_steps:
        parser.error(
            f"--num_inference_steps {args.num_inference_steps} is more than the {args.teacher_steps} of --teacher_steps; "
            f"choose fewer"
        )
    if args.time_base <= 1.0:
        parser.error(f"--time_base {args.time_base:g} must be above 1; for even times give --time_density uniform")
    if args.pretrained_student_model and args.use_lora:
        parser.error(
            f"--pretrained_student_model {args.pretrained_student_model} needs weights of its own, which --use_lora does not train; leave "
            f"one of them out"
        )
    guided = args.teacher_guidance_scale != 1.0
    if args.inverted_share is None:
        args.inverted_share = 0.0 if guided else 0.05
    if args.inverted_share and guided:
        parser.error(
            f"--inverted_share {args.inverted_share:g} needs --teacher_guidance_scale 1, because real pictures are no samples "
            f"of a guided flow; set either"
        )
    if args.learning_rate is None:
        args.learning_rate = 1e-4 if args.use_lora else 5e-5
    return args


def main(args: argparse.Namespace) -> None:
    accelerator = make_accelerator(args)
    device = accelerator.device
    source = make_source(args, device)
    teacher = Teacher(args.pretrained_teacher_model, device, FAMILIES, args.resolution, args.teacher_guidance_scale)
    scheduler = euler_scheduler(teacher)
    # faster, and the same to the bit whether the student is this network or a copy of it
    teacher.unet.to(memory_format=torch.channels_last)
    held_out = source.draw(0, VALIDATION_ITEMS, "held_out")
    latent_shape = teacher.encode(source.images(held_out[:1])).shape[1:]
    pairs = FlowPairs(args, source, teacher, scheduler, latent_shape)
    student = DistilledUNet(teacher, args.lora_rank if args.use_lora else None, None, args.seed)
    if args.pretrained_student_model:
        begin_at(student.unet, args.pretrained_student_model, teacher.family.part)
    # before the pairs, which take long: it may refuse to begin
    trainer = Trainer(args, accelerator, student)
    pairs.prepare(accelerator)
    total, train_timesteps = trainer.global_batch_size, teacher.schedule.num_train_timesteps

    def make_batches(step: int) -> list[Any]:
        clean, noise, input_ids = pairs.draw(step, total)
        sigma = stratified_uniform(total, stream(args.seed, step, "times"))
        if args.time_density == "exponential":
            sigma = exponential_times(sigma, args.time_base)
        return [(clean[rows], noise[rows], input_ids[rows], sigma[rows]) for rows in trainer.own_rows()]

    def loss_of(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        clean, noise, input_ids, sigma = (part.to(device) for part in batch)
        sample, velocity = interpolate(clean, noise, sigma)
        sample = sample.contiguous(memory_format=torch.channels_last)
        prediction = model(sample, sigma * train_timesteps, teacher.embeddings(input_ids))
        return reflow_loss(prediction, velocity, args.normalize_loss, args.high_pass)

    captions = source.captions(held_out)
    prompts = list(args.validation_prompts or captions[:24])
    words = teacher.embeddings(teacher.tokens(captions))
    noise = torch.randn((VALIDATION_ITEMS, *latent_shape), generator=stream(args.seed, 0, "validation-noise")).to(
        device
    )
    few = solver_levels(scheduler, args.num_inference_steps, teacher.family)
    before, wanted = measure_flow(
        guided_velocity(teacher, words, args.teacher_guidance_scale), noise, args.teacher_steps, few,
        num_train_timesteps=train_timesteps,
    )  # fmt: skip
    logger.info("teacher: %s", ", ".join(f"{name} {value:.4g}" for name, value in before.items()))

    def validate(step: int) -> tuple[dict[str, float], Any]:
        metrics, _ = measure_flow(
            lambda sample, timesteps: trainer.module(sample, timesteps, words), noise, args.teacher_steps, few, wanted,
            train_timesteps,
        )  # fmt: skip
        with student.active():
            sheet = sample_sheet(
                teacher.student_pipeline(student.unet, scheduler), prompts, args.seed,
                guidance_scale=teacher.student_scale, num_inference_steps=args.num_inference_steps,
                height=args.resolution, width=args.resolution,
            )  # fmt: skip
        return metrics, sheet

    trainer.fit(make_batches, loss_of, validate)
    after = trainer.validate(validate)

    def write(folder: Path) -> None:
        save_student(teacher, student, scheduler, folder, args.export_dtype)
        write_model_card(folder, args, trainer, teacher, prompts, before, after)

    finish_run(trainer, write)


def write_model_card(
    folder: Path,
    args: argparse.Namespace,
    trainer: Trainer,
    taught_by: Teacher,
    prompts: list[str],
    before: dict[str, float],
    after: dict[str, float],
) -> None:
    teacher, steps = Path(args.pretrained_teacher_model).name, args.num_inference_steps
    family, scale = taught_by.family.pipeline_class.__name__, f"guidance_scale={taught_by.student_scale:g}"
    built_in = (
        ""
        if args.teacher_guidance_scale == taught_by.student_scale
        else f"Guidance of {args.teacher_guidance_scale:g} is part of the weights: "
    )
    adapter = (
        " `pytorch_lora_weights.safetensors` is the same as an adapter, for `load_lora_weights` on the teacher with the "
        "scheduler of this folder."
    )
    description = (
        f"`{teacher}` straightened by ReFlow with `training/train_reflow.py`, on {args.num_pairs:,} paths of {args.teacher_steps} "
        f"Euler steps and {trainer.step * trainer.global_batch_size:,} samples of them. {built_in}sample it with "
        f"`{scale}`.{adapter if args.use_lora else ''}\n\n"
        f"| on {VALIDATION_ITEMS} noises and captions never trained on | `{teacher}` | this model |\n| --- | --- | --- |\n"
        f"| straightness S, 0 is straight | {before['straightness']:.4f} | {after['straightness']:.4f} |\n"
        f"| squared distance of {steps} Euler steps from {args.teacher_steps} of `{teacher}` | {before['few_step_error']:.4f} | "
        f"{after['few_step_error']:.4f} |\n\n"
        f"![samples](samples.png)\n\nFirst row: {'; '.join(prompts[:8])}.\n\n"
        f"```python\nfrom diffusers import {family}\n\n"
        f'pipe = {family}.from_pretrained("{args.hub_model_id or Path(args.output_dir).name}")\n'
        f'image = pipe("{prompts[0]}", num_inference_steps={steps}, {scale}).images[0]\n```'
    )
    tags = ["diffusers", "text-to-image", taught_by.family.tag, "rectified-flow", "reflow", "diffusers-ext"]
    write_card(folder, Path(args.output_dir).name, description, args, [*tags, *(["lora"] * args.use_lora)])


if __name__ == "__main__":
    main(parse_args())
