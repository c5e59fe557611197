#!/usr/bin/env python
"""Distils a text-to-image model of many steps into one of one to eight, by consistency, and saves a stock pipeline.

    accelerate launch training/train_consistency.py --method lcm --pretrained_teacher_model pipelines/emoji-scenes-64 \
        --dataset_name emoji-scenes --objects demo --output_dir runs/lcm --resume_from_checkpoint latest

The output folder loads with `DiffusionPipeline.from_pretrained(output_dir)`. See training/README.md.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch.func import functional_call

from diffusers_ext.training.arguments import (
    add_data_arguments,
    add_training_arguments,
    check_arguments,
    count,
    not_negative,
    positive,
    positive_int,
    settle_options,
    share,
)
from diffusers_ext.training.coupling import COUPLINGS
from diffusers_ext.training.data import make_source
from diffusers_ext.training.distillation.families import UNETS
from diffusers_ext.training.distillation.methods import (
    ConsistencyMethod,
    ConsistencyTrajectory,
    LatentConsistencyDistillation,
    LatentConsistencyTraining,
)
from diffusers_ext.training.distillation.slct import CONSISTENCY_DISTANCES
from diffusers_ext.training.distillation.teachers import (
    DistilledUNet,
    Teacher,
    few_step_scheduler,
    save_student,
)
from diffusers_ext.training.export import finish_run, sample_sheet, write_card
from diffusers_ext.training.latents import make_latents
from diffusers_ext.training.streams import stream
from diffusers_ext.training.trainer import Trainer, make_accelerator


VALIDATION_ITEMS = 32
# the options that only some methods have, with their defaults there
OPTIONS: dict[str, dict[str, Any]] = {
    "lcm": {"w_min": 5.0, "w_max": 15.0, "huber_c": 0.001, "unet_time_cond_proj_dim": 256, "ema_decay": 0.95},
    "slct": {
        "distance": "cauchy", "start_levels": 10, "end_levels": 640, "noise_coupling": "optimal_transport",
        "ema_decay": 0.999,
    },
    "ctm": {
        "w_min": 6.5, "w_max": 6.5, "huber_c": 0.001, "unet_time_cond_proj_dim": 256, "denoising_weight": 1.0,
        "ema_decay": 0.999,
    },
}  # fmt: skip
NAMES = {"lcm": "latent consistency", "slct": "latent consistency training", "ctm": "consistency trajectories"}


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data_arguments(parser)
    add_training_arguments(
        parser, learning_rate=None, lr_scheduler="constant", use_ema=None, ema_decay=None, adam_beta2=0.999
    )
    group = parser.add_argument_group("distillation")
    group.add_argument(
        "--method", choices=tuple(OPTIONS), default="lcm",
        help="lcm: latent consistency distillation; slct: latent consistency training, without a solver; ctm: jumps between any two levels.",
    )  # fmt: skip
    group.add_argument("--pretrained_teacher_model", required=True, help="Folder or Hub id of the pipeline.")
    group.add_argument("--use_lora", action="store_true", help="Train a LoRA on the teacher, not a copy of it.")
    group.add_argument("--lora_rank", type=positive_int, default=64)
    group.add_argument(
        "--num_ddim_timesteps", type=positive_int, default=50,
        help="Steps of the teacher's solver; the sampler's are among them.",
    )  # fmt: skip
    group.add_argument("--timestep_scaling_factor", type=positive, default=10.0)
    group.add_argument("--proportion_empty_prompts", type=share, default=0.0)
    group.add_argument(
        "--cache_latents", type=count, default=0, help="Encode this many pictures once instead of new ones every step."
    )
    group = parser.add_argument_group("distillation by --method lcm or ctm")
    group.add_argument("--w_min", type=not_negative, help="Least guidance; guidance_scale is w + 1.")
    group.add_argument("--w_max", type=not_negative, help="Most guidance; for ctm the same.")
    group.add_argument("--huber_c", type=positive)
    group.add_argument("--unet_time_cond_proj_dim", type=positive_int, help="Width of the guidance embedding.")
    group.add_argument("--denoising_weight", type=not_negative, help="ctm: weight of the loss of the denoiser.")
    group = parser.add_argument_group("distillation by --method slct")
    group.add_argument("--distance", choices=CONSISTENCY_DISTANCES)
    group.add_argument("--start_levels", type=positive_int, help="Intervals between noise levels at the start.")
    group.add_argument("--end_levels", type=positive_int, help="Intervals at the end; doubled on the way there.")
    group.add_argument("--noise_coupling", choices=COUPLINGS, help="Which noise goes with which picture.")
    group = parser.add_argument_group("validation and export")
    group.add_argument("--validation_prompts", nargs="+", help="Default: captions that are never trained on.")
    group.add_argument("--num_inference_steps", type=positive_int, default=4)
    group.add_argument("--export_dtype", choices=("fp32", "fp16"), default="fp32")
    args = check_arguments(parser, parser.parse_args(input_args))
    settle_options(parser, args, OPTIONS)
    if args.method != "slct" and args.w_min > args.w_max:
        parser.error(f"--w_min {args.w_min:g} is above --w_max {args.w_max:g}; exchange them")
    if args.method == "slct" and args.start_levels > args.end_levels:
        parser.error(f"--start_levels {args.start_levels} is above --end_levels {args.end_levels}; exchange them")
    if args.method == "ctm" and args.w_min < args.w_max:
        parser.error(
            f"--w_min {args.w_min:g} --w_max {args.w_max:g}: --method ctm builds one guidance in; give it twice"
        )
    if args.method == "ctm" and args.use_lora:
        parser.error("--use_lora has no input for the level that a jump ends at; leave it out with --method ctm")
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


def make_method(args: argparse.Namespace, teacher: Teacher) -> ConsistencyMethod:
    if args.method == "lcm":
        return LatentConsistencyDistillation(
            teacher, args.seed, args.w_min, args.w_max, args.num_ddim_timesteps, args.huber_c, args.timestep_scaling_factor
        )  # fmt: skip
    if args.method == "slct":
        return LatentConsistencyTraining(
            teacher, args.seed, args.max_train_steps, args.start_levels, args.end_levels, args.distance,
            args.noise_coupling, args.timestep_scaling_factor,
        )  # fmt: skip
    return ConsistencyTrajectory(
        teacher, args.seed, args.w_min, args.num_ddim_timesteps, args.huber_c, args.denoising_weight
    )


def main(args: argparse.Namespace) -> None:
    accelerator = make_accelerator(args)
    device = accelerator.device
    source = make_source(args, device)
    teacher = Teacher(args.pretrained_teacher_model, device, UNETS, args.resolution)
    scheduler = few_step_scheduler(teacher, args.num_ddim_timesteps, args.timestep_scaling_factor)
    student = DistilledUNet(
        teacher, args.lora_rank if args.use_lora else None, args.unet_time_cond_proj_dim, args.seed
    )
    trainer = Trainer(args, accelerator, student)
    total, method = trainer.global_batch_size, make_method(args, teacher)
    data = make_latents(args, source, teacher.pipeline.vae, teacher.encode, accelerator)

    def make_batches(step: int) -> list[Any]:
        items, keys = data.draw(step, total)
        captions = source.captions(items, step)
        emptied = torch.rand(total, generator=stream(args.seed, step, "empty-prompts")) < args.proportion_empty_prompts
        prompts = ["" if empty else caption for empty, caption in zip(emptied.tolist(), captions)]
        draws = method.draws((total, *latent_shape), step)
        return [
            (data.latents(keys[rows]), teacher.tokens(prompts[rows]), *(part[rows] for part in draws))
            for rows in trainer.own_rows()
        ]

    def loss_of(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        latents, input_ids, *draws = (part.to(device) for part in batch)
        if trainer.average and method.averaged_target:
            weights = trainer.average.state_dict()
        else:
            weights = {name: value.detach() for name, value in trainer.module.named_parameters()}

        def target(*inputs: Any) -> torch.Tensor:
            return functional_call(trainer.module, weights, inputs)

        return method.loss(model, target, latents, teacher.embeddings(input_ids), *draws)

    held_out = source.draw(0, VALIDATION_ITEMS, "held_out")
    captions = source.captions(held_out)
    prompts = list(args.validation_prompts or captions[:24])
    clean = teacher.encode(source.images(held_out))
    latent_shape = clean.shape[1:]
    # slct: at the levels of the end, so that values of one run can be compared
    fixed = (clean, teacher.tokens(captions), *method.draws(clean.shape, args.max_train_steps, "validation-"))
    # only a full copy by lcm is told the guidance
    guidance_scale = 1.0 + 0.5 * (args.w_min + args.w_max) if args.method == "lcm" and not args.use_lora else 1.0

    def validate(step: int) -> tuple[dict[str, float], Any]:
        loss = loss_of(trainer.module, fixed)
        with student.active():
            sheet = sample_sheet(
                teacher.student_pipeline(student.unet, scheduler), prompts, args.seed, guidance_scale=guidance_scale,
                num_inference_steps=args.num_inference_steps, height=args.resolution, width=args.resolution,
            )  # fmt: skip
        return {"validation_loss": float(loss)}, sheet

    trainer.fit(make_batches, loss_of, validate)
    metrics = trainer.validate(validate)

    def write(folder: Path) -> None:
        save_student(teacher, student, scheduler, folder, args.export_dtype)
        write_model_card(folder, args, trainer, teacher, prompts, guidance_scale, metrics)

    finish_run(trainer, write)


def guidance_note(args: argparse.Namespace, family: str) -> str:
    bounds = [] if args.method == "slct" else sorted({args.w_min + 1, args.w_max + 1})
    scales = " to ".join(f"{bound:g}" for bound in bounds)
    if args.method == "slct":
        note = "It was trained without guidance: `guidance_scale=1`; more costs a second pass."
    elif args.method == "ctm":
        note = (
            f"Guidance of {scales} is part of the weights: `guidance_scale=1`, which tells the network to jump to the clean end"
            + ("; `diffusers_ext.CTMPipeline` tells it any level." if family == "StableDiffusionPipeline" else ".")
        )
    elif args.use_lora:
        note = f"Guidance of {scales} is part of the weights: `guidance_scale=1`."
    else:
        note = f"`guidance_scale` is an input of the network and costs no second pass; it was trained on {scales}."
    lora = " `pytorch_lora_weights.safetensors` is the same as an adapter, for the teacher with an `LCMScheduler`."
    return note + lora * args.use_lora


def write_model_card(
    folder: Path,
    args: argparse.Namespace,
    trainer: Trainer,
    teacher: Teacher,
    prompts: list[str],
    scale: float,
    metrics: dict[str, float],
) -> None:
    name, family = args.hub_model_id or Path(args.output_dir).name, teacher.family.pipeline_class.__name__
    description = (
        f"`{Path(args.pretrained_teacher_model).name}` distilled to {args.num_inference_steps} steps by {NAMES[args.method]} with "
        f"`training/train_consistency.py`, on {trainer.step * trainer.global_batch_size:,} samples. "
        f"{guidance_note(args, family)} "
        f"Loss on captions never trained on: {metrics['validation_loss']:.4f}.\n\n"
        f"![samples](samples.png)\n\nFirst row: {'; '.join(prompts[:8])}.\n\n"
        f"```python\nfrom diffusers import {family}\n\n"
        f'pipe = {family}.from_pretrained("{name}")\n'
        f'image = pipe("{prompts[0]}", num_inference_steps={args.num_inference_steps}, guidance_scale={scale:g}).images[0]\n'
        "```"
    )
    tags = ["diffusers", "text-to-image", teacher.family.tag, args.method, "diffusers-ext"] + ["lora"] * args.use_lora
    write_card(folder, Path(args.output_dir).name, description, args, tags)


if __name__ == "__main__":
    main(parse_args())
