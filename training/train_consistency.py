#!/usr/bin/env python
"""Distils a text-to-image model of many steps into one of one to eight, by consistency, and saves a stock pipeline.

    accelerate launch training/train_consistency.py --method lcm --pretrained_teacher_model pipelines/emoji-scenes-64 \
        --dataset_name emoji-scenes --objects demo --output_dir runs/lcm --resume_from_checkpoint latest

The output folder loads with `StableDiffusionPipeline.from_pretrained(output_dir)`. See training/README.md.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch.func import functional_call

from diffusers_ext.training.arguments import (
    add_data_arguments,
    add_training_arguments,
    check_arguments,
    count,
    not_negative,
    positive,
    positive_int,
    share,
)
from diffusers_ext.training.data import make_source
from diffusers_ext.training.distillation.lcm import lcm_loss
from diffusers_ext.training.distillation.stable_diffusion import (
    LatentConsistencyStudent,
    Teacher,
    few_step_scheduler,
    save_student,
)
from diffusers_ext.training.export import finish_run, picture_grid, write_card
from diffusers_ext.training.latents import make_latents
from diffusers_ext.training.objectives import stratified_uniform
from diffusers_ext.training.streams import stream
from diffusers_ext.training.trainer import Trainer, make_accelerator


VALIDATION_ITEMS = 32


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data_arguments(parser)
    add_training_arguments(
        parser, learning_rate=None, lr_scheduler="constant", use_ema=None, ema_decay=0.95, adam_beta2=0.999
    )
    group = parser.add_argument_group("distillation")
    group.add_argument("--method", choices=("lcm",), default="lcm", help="lcm: latent consistency distillation.")
    group.add_argument("--pretrained_teacher_model", required=True, help="Folder or Hub id of the pipeline.")
    group.add_argument("--use_lora", action="store_true", help="Train a LoRA on the teacher, not a copy of it.")
    group.add_argument("--lora_rank", type=positive_int, default=64)
    group.add_argument(
        "--unet_time_cond_proj_dim", type=positive_int, default=256, help="Width of the guidance embedding."
    )
    group.add_argument("--num_ddim_timesteps", type=positive_int, default=50, help="Steps of the teacher's solver.")
    group.add_argument("--w_min", type=not_negative, default=5.0, help="Least guidance; guidance_scale is w + 1.")
    group.add_argument("--w_max", type=not_negative, default=15.0, help="Most guidance.")
    group.add_argument("--huber_c", type=positive, default=0.001)
    group.add_argument("--timestep_scaling_factor", type=positive, default=10.0)
    group.add_argument("--proportion_empty_prompts", type=share, default=0.0)
    group.add_argument(
        "--cache_latents", type=count, default=0, help="Encode this many pictures once instead of new ones every step."
    )
    group = parser.add_argument_group("validation and export")
    group.add_argument("--validation_prompts", nargs="+", help="Default: captions that are never trained on.")
    group.add_argument("--num_inference_steps", type=positive_int, default=4)
    group.add_argument("--export_dtype", choices=("fp32", "fp16"), default="fp32")
    args = check_arguments(parser, parser.parse_args(input_args))
    if args.w_min > args.w_max:
        parser.error(f"--w_min {args.w_min:g} is above --w_max {args.w_max:g}; exchange them")
    if args.num_inference_steps > args.num_ddim_timesteps:
        parser.error(
            f"--num_inference_steps {args.num_inference_steps} is more than the {args.num_ddim_timesteps} of "
            f"--num_ddim_timesteps; choose fewer"
        )
    if args.learning_rate is None:
        args.learning_rate = 1e-4 if args.use_lora else 1e-5
    if args.use_ema is None:
        # a LoRA is its own target (LCM-LoRA), a full copy has its moving average (LCM)
        args.use_ema = not args.use_lora
    return args


def main(args: argparse.Namespace) -> None:
    accelerator = make_accelerator(args)
    device = accelerator.device
    source = make_source(args, device)
    teacher = Teacher(args.pretrained_teacher_model, device)
    scheduler = few_step_scheduler(teacher, args.num_ddim_timesteps, args.timestep_scaling_factor)
    student = LatentConsistencyStudent(
        teacher, args.lora_rank if args.use_lora else None, args.unet_time_cond_proj_dim, args.seed
    )
    trainer = Trainer(args, accelerator, student)
    total = trainer.global_batch_size
    data = make_latents(args, source, teacher.pipeline.vae, teacher.encode, accelerator)

    def drawn(latents: torch.Tensor, step: int, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Noise, solver steps and guidance of a batch."""
        noise = torch.randn(latents.shape, generator=stream(args.seed, step, f"{name}noise"))
        uniform = stratified_uniform(len(latents), stream(args.seed, step, f"{name}timesteps"))
        rows = (uniform * args.num_ddim_timesteps).long().clamp(max=args.num_ddim_timesteps - 1)
        w = torch.rand(len(latents), generator=stream(args.seed, step, f"{name}guidance"))
        return noise, rows, args.w_min + w * (args.w_max - args.w_min)

    def make_batches(step: int) -> list[Any]:
        items, keys = data.draw(step, total)
        captions = source.captions(items, step)
        emptied = torch.rand(total, generator=stream(args.seed, step, "empty-prompts")) < args.proportion_empty_prompts
        prompts = ["" if empty else caption for empty, caption in zip(emptied.tolist(), captions)]
        shape = (total, *latent_shape)
        draws = drawn(torch.empty(shape), step, "")
        return [
            (data.latents(keys[rows]), teacher.tokens(prompts[rows]), *(part[rows] for part in draws))
            for rows in trainer.own_rows()
        ]

    def loss_of(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        latents, input_ids, noise, rows, w = (part.to(device) for part in batch)
        words = teacher.embeddings(input_ids)
        averaged = trainer.average.state_dict() if trainer.average else {}

        def target(sample: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
            return functional_call(trainer.module, averaged, (sample, timesteps, words, w))

        return lcm_loss(
            teacher.schedule, lambda sample, timesteps: model(sample, timesteps, words, w), target,
            lambda sample, timesteps: teacher.predictions(sample, timesteps, words), latents, noise, rows, w,
            args.num_ddim_timesteps, args.huber_c, args.timestep_scaling_factor,
        )  # fmt: skip

    held_out = source.draw(0, VALIDATION_ITEMS, "held_out")
    captions = source.captions(held_out)
    prompts = list(args.validation_prompts or captions[:24])
    clean = teacher.encode(source.images(held_out))
    latent_shape = clean.shape[1:]
    fixed = (clean, teacher.tokens(captions), *drawn(clean, 0, "validation-"))
    # a LoRA learns the mean of all guidance; a full copy is told which one is wanted
    guidance_scale = 1.0 if args.use_lora else 1.0 + 0.5 * (args.w_min + args.w_max)

    def sample(pipeline: StableDiffusionPipeline) -> torch.Tensor:
        return pipeline(
            prompts, num_inference_steps=args.num_inference_steps, guidance_scale=guidance_scale,
            generator=stream(args.seed, 0, "validation-samples"), output_type="pt",
            height=args.resolution, width=args.resolution,
        ).images  # fmt: skip

    def validate(step: int) -> tuple[dict[str, float], Any]:
        loss = loss_of(trainer.module, fixed)
        with student.active():
            pictures = sample(teacher.student_pipeline(student.unet, scheduler))
        return {"validation_loss": float(loss)}, picture_grid(pictures * 2.0 - 1.0, columns=min(8, len(prompts)))

    trainer.fit(make_batches, loss_of, validate)
    metrics = trainer.validate(validate)

    def write(folder: Path) -> None:
        save_student(teacher, student, scheduler, folder, args.export_dtype)
        write_model_card(folder, args, trainer, prompts, guidance_scale, metrics)

    finish_run(trainer, write)


def write_model_card(
    folder: Path,
    args: argparse.Namespace,
    trainer: Trainer,
    prompts: list[str],
    scale: float,
    metrics: dict[str, float],
) -> None:
    name = args.hub_model_id or Path(args.output_dir).name
    teacher = Path(args.pretrained_teacher_model).name
    scales = f"{args.w_min + 1:g} to {args.w_max + 1:g}" if args.w_min < args.w_max else f"{args.w_min + 1:g}"
    guidance = (
        f"Guidance of {scales} is part of the weights: `guidance_scale=1`. "
        "`pytorch_lora_weights.safetensors` is the same as an adapter, for `load_lora_weights` on the teacher with an "
        "`LCMScheduler`."
        if args.use_lora
        else f"`guidance_scale` is an input of the network and costs no second pass; it was trained on {scales}."
    )
    description = (
        f"`{teacher}` distilled to {args.num_inference_steps} steps by latent consistency with "
        f"`training/train_consistency.py`, on {trainer.step * trainer.global_batch_size:,} samples. {guidance} "
        f"Consistency loss on captions never trained on: {metrics['validation_loss']:.4f}.\n\n"
        f"![samples](samples.png)\n\nFirst row: {'; '.join(prompts[:8])}.\n\n"
        "```python\nfrom diffusers import StableDiffusionPipeline\n\n"
        f'pipe = StableDiffusionPipeline.from_pretrained("{name}")\n'
        f'image = pipe("{prompts[0]}", num_inference_steps={args.num_inference_steps}, guidance_scale={scale:g}).images[0]\n'
        "```"
    )
    tags = ["diffusers", "text-to-image", "stable-diffusion", "lcm", "diffusers-ext", *(["lora"] * args.use_lora)]
    write_card(folder, Path(args.output_dir).name, description, args, tags)


if __name__ == "__main__":
    main(parse_args())
