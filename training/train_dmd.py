#!/usr/bin/env python
"""Distils a text-to-image model of many steps into one of one to four, by distribution matching, and saves a stock pipeline.

    accelerate launch training/train_dmd.py --method dmd2 --pretrained_teacher_model pipelines/emoji-scenes-64 --use_lora \
        --dataset_name emoji-scenes --objects demo --real_guidance_scale 4 --output_dir runs/dmd --resume_from_checkpoint latest

The output folder loads with `StableDiffusionPipeline.from_pretrained(output_dir)`. See training/README.md.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from diffusers_ext.training.alternating import AlternatingTrainer
from diffusers_ext.training.arguments import (
    add_data_arguments,
    add_training_arguments,
    check_arguments,
    count,
    not_negative,
    positive,
    positive_int,
)
from diffusers_ext.training.data import make_source
from diffusers_ext.training.distillation.f_divergence import F_DIVERGENCES, DensityRatioWeights
from diffusers_ext.training.distillation.matching import (
    FAKE,
    MatchingBatch,
    MatchingNetworks,
    fake_loss,
    student_loss,
)
from diffusers_ext.training.distillation.stable_diffusion import STUDENT, Teacher, few_step_scheduler, save_student
from diffusers_ext.training.export import finish_run, picture_grid, write_card
from diffusers_ext.training.latents import make_latents
from diffusers_ext.training.objectives import stratified_uniform
from diffusers_ext.training.streams import stream
from diffusers_ext.training.trainer import make_accelerator


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data_arguments(parser)
    add_training_arguments(
        parser, learning_rate=None, lr_scheduler="constant", max_grad_norm=10.0, adam_beta2=0.999, ema_decay=0.99
    )
    group = parser.add_argument_group("distillation")
    group.add_argument(
        "--method", choices=("dmd2", "fdistill"), default="dmd2",
        help="dmd2: reverse KL; fdistill: --divergence, weighed by the discriminator.",
    )  # fmt: skip
    group.add_argument("--pretrained_teacher_model", required=True, help="Folder or Hub id of the pipeline.")
    group.add_argument(
        "--use_lora", action="store_true", help="Student and fake score are LoRAs on the teacher itself."
    )
    group.add_argument("--lora_rank", type=positive_int, default=64)
    group.add_argument("--num_denoising_steps", type=positive_int, default=4, help="Steps of the student.")
    group.add_argument(
        "--backward_simulation", action=argparse.BooleanOptionalAction, default=True,
        help="Train on the student's own paths; without it, on noised pictures.",
    )  # fmt: skip
    group.add_argument("--real_guidance_scale", type=positive, default=7.5, help="Guidance of the teacher.")
    group.add_argument("--fake_update_ratio", type=positive_int, default=5, help="Steps of the fake score for one.")
    group.add_argument("--fake_learning_rate", type=positive, help="Default: --learning_rate.")
    group.add_argument("--gan_weight", type=not_negative, default=1e-3, help="0 trains without discriminator.")
    group.add_argument("--discriminator_weight", type=positive, default=1e-2)
    group.add_argument("--divergence", choices=F_DIVERGENCES, default="js")
    group.add_argument(
        "--ratio_bins", type=positive_int, default=10, help="Noise levels whose density ratios are compared."
    )
    group.add_argument(
        "--cache_latents", type=count, default=0, help="Encode this many pictures once instead of new ones every step."
    )
    group = parser.add_argument_group("validation and export")
    group.add_argument("--validation_prompts", nargs="+", help="Default: captions that are never trained on.")
    group.add_argument("--export_dtype", choices=("fp32", "fp16"), default="fp32")
    args = check_arguments(parser, parser.parse_args(input_args))
    if args.method == "fdistill" and not args.gan_weight:
        parser.error("--method fdistill reads density ratios from the discriminator; give a --gan_weight above 0")
    if args.num_denoising_steps > 100:
        parser.error(f"--num_denoising_steps {args.num_denoising_steps} is no distillation; choose 1 to 8")
    if args.learning_rate is None:
        args.learning_rate = 5e-5 if args.use_lora else 1e-5
    if args.fake_learning_rate is None:
        args.fake_learning_rate = args.learning_rate
    return args


def main(args: argparse.Namespace) -> None:
    accelerator = make_accelerator(args)
    device = accelerator.device
    source = make_source(args, device)
    teacher = Teacher(args.pretrained_teacher_model, device)
    # with as many original steps as it takes, the stock scheduler has the student's timesteps
    scheduler = few_step_scheduler(teacher, args.num_denoising_steps, 10.0)
    networks = MatchingNetworks(
        teacher, args.num_denoising_steps, args.lora_rank if args.use_lora else None, bool(args.gan_weight),
        args.backward_simulation, args.seed,
    )  # fmt: skip
    weights = None
    if args.method == "fdistill":
        weights = DensityRatioWeights(
            args.divergence, args.ratio_bins, all_reduce=lambda tensor: accelerator.reduce(tensor, "sum")
        )
    trainer = AlternatingTrainer(
        args, accelerator, networks,
        networks.players(args.learning_rate, args.fake_learning_rate, args.fake_update_ratio),
        {"density_ratios": weights} if weights else None,
    )  # fmt: skip
    total, a_round = trainer.global_batch_size, args.fake_update_ratio + 1
    data = make_latents(args, source, teacher.pipeline.vae, teacher.encode, accelerator)
    with_pictures = bool(args.gan_weight) or not args.backward_simulation
    latent_shape = teacher.encode(source.images(source.draw(0, 1, "held_out"))).shape[1:]
    shape = (total, *latent_shape)

    def turn(step: int) -> list[Any]:
        """Batches of one optimiser step of one player; steps of all players are counted together."""
        items, keys = data.draw(step, total)
        prompts = source.captions(items, step)
        path = torch.randn(
            (args.num_denoising_steps, *shape), generator=stream(args.seed, step, "path"), dtype=torch.float32
        )
        last = int(torch.randint(args.num_denoising_steps, (), generator=stream(args.seed, step, "last")))
        noise, real_noise = torch.randn((2, *shape), generator=stream(args.seed, step, "noise"))
        uniform = stratified_uniform(total, stream(args.seed, step, "timesteps"))
        return [
            (
                teacher.tokens(prompts[rows]), path[:, rows], last, noise[rows], uniform[rows],
                data.latents(keys[rows]) if with_pictures else None, real_noise[rows],
            )
            for rows in trainer.own_rows()
        ]  # fmt: skip

    def make_batches(step: int) -> dict[str, list[Any]]:
        turns = [turn(step * a_round + i) for i in range(a_round)]
        return {FAKE: turns[:-1], STUDENT: turns[-1:]}

    def on_device(batch: Any) -> MatchingBatch:
        input_ids, *parts = (part.to(device) if isinstance(part, torch.Tensor) else part for part in batch)
        return MatchingBatch(teacher.embeddings(input_ids), *parts)

    losses = {
        FAKE: lambda module, batch: fake_loss(module, on_device(batch), args.discriminator_weight),
        STUDENT: lambda module, batch: student_loss(
            module, teacher, on_device(batch), args.real_guidance_scale, args.gan_weight, weights
        ),
    }
    prompts = list(args.validation_prompts or source.captions(source.draw(0, 24, "held_out")))

    def validate(step: int) -> tuple[dict[str, float], Any]:
        with networks.active(STUDENT):
            pictures = teacher.student_pipeline(networks.student, scheduler)(
                prompts, num_inference_steps=args.num_denoising_steps, guidance_scale=1.0, output_type="pt",
                generator=stream(args.seed, 0, "validation-samples"), height=args.resolution, width=args.resolution,
            ).images  # fmt: skip
        return {}, picture_grid(pictures * 2.0 - 1.0, columns=min(8, len(prompts)))

    trainer.fit(make_batches, losses, validate)
    trainer.validate(validate)

    def write(folder: Path) -> None:
        save_student(teacher, networks, scheduler, folder, args.export_dtype)
        write_model_card(folder, args, trainer, prompts)

    finish_run(trainer, write)


def write_model_card(folder: Path, args: argparse.Namespace, trainer: AlternatingTrainer, prompts: list[str]) -> None:
    method = "DMD2" if args.method == "dmd2" else f"f-distill ({args.divergence})"
    adapter = (
        "\n\n`pytorch_lora_weights.safetensors` is the same as an adapter, for `load_lora_weights` on the teacher with the "
        "`LCMScheduler` of this folder."
    )
    description = (
        f"`{Path(args.pretrained_teacher_model).name}` distilled to {args.num_denoising_steps} steps by {method} with "
        f"`training/train_dmd.py`, {trainer.step:,} steps of the student on {trainer.global_batch_size} samples each. Guidance "
        f"of {args.real_guidance_scale:g} is part of the weights: `guidance_scale=1`.{adapter if args.use_lora else ''}\n\n"
        f"![samples](samples.png)\n\nFirst row: {'; '.join(prompts[:8])}.\n\n"
        "```python\nfrom diffusers import StableDiffusionPipeline\n\n"
        f'pipe = StableDiffusionPipeline.from_pretrained("{args.hub_model_id or Path(args.output_dir).name}")\n'
        f'image = pipe("{prompts[0]}", num_inference_steps={args.num_denoising_steps}, guidance_scale=1).images[0]\n```'
    )
    tags = ["diffusers", "text-to-image", "stable-diffusion", "dmd", "diffusers-ext", *(["lora"] * args.use_lora)]
    write_card(folder, Path(args.output_dir).name, description, args, tags)


if __name__ == "__main__":
    main(parse_args())
