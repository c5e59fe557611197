#!/usr/bin/env python
"""Distils a text-to-image model of many steps into one of one to four, by distribution matching, and saves a stock pipeline.

    accelerate launch training/train_dmd.py --method dmd2 --pretrained_teacher_model pipelines/emoji-scenes-64 --use_lora \
        --dataset_name emoji-scenes --objects demo --real_guidance_scale 4 --output_dir runs/dmd --resume_from_checkpoint latest

The output folder loads with `DiffusionPipeline.from_pretrained(output_dir)`. See training/README.md.
"""

import argparse
from pathlib import Path
from typing import Any

from diffusers_ext.training.alternating import AlternatingTrainer
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
from diffusers_ext.training.data import FolderSource, make_source
from diffusers_ext.training.distillation.f_divergence import F_DIVERGENCES, DensityRatioWeights
from diffusers_ext.training.distillation.families import FAMILIES, UNETS
from diffusers_ext.training.distillation.matching import FAKE, MatchingNetworks
from diffusers_ext.training.distillation.matching_methods import make_matching_method
from diffusers_ext.training.distillation.teachers import STUDENT, Teacher, begin_at, save_student
from diffusers_ext.training.export import finish_run, sample_sheet, write_card
from diffusers_ext.training.latents import FreshLatents, make_latents
from diffusers_ext.training.streams import stream_seed
from diffusers_ext.training.trainer import make_accelerator


# the options that not all methods have alike, with their defaults there
COMMON: dict[str, Any] = {
    "backward_simulation": True, "cache_latents": 0, "gan_weight": 1e-3, "discriminator_weight": 1e-2, "real_guidance_scale": 7.5,
    "fake_update_ratio": 5, "max_grad_norm": 10.0, "ema_decay": 0.99, "num_denoising_steps": 4,
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "dmd2": COMMON,
    "fdistill": {**COMMON, "divergence": "js", "ratio_bins": 10},
    "cdm": {
        "longest_schedule": 28, "fake_pull": 1e-3, "real_guidance_scale": 8.0, "fake_update_ratio": 2,
        "max_grad_norm": 1.0, "ema_decay": 0.999, "num_denoising_steps": 4,
    },
    "rdmd": {
        "source_data_dir": None, "transport_lambda": 0.25, "real_guidance_scale": 7.5, "fake_update_ratio": 5,
        "max_grad_norm": 10.0, "ema_decay": 0.99, "num_denoising_steps": 2,
    },
}  # fmt: skip
NAMES = {"dmd2": "DMD2", "fdistill": "f-distill", "cdm": "CDM", "rdmd": "RDMD"}
# 1 / steps, as a strength, times steps is 1 again only where decimals are exact
TRANSLATION_STEPS = (2, 4, 5, 8, 10)


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data_arguments(parser)
    add_training_arguments(
        parser, learning_rate=None, lr_scheduler="constant", max_grad_norm=None, adam_beta2=0.999, ema_decay=None
    )
    group = parser.add_argument_group("distillation")
    group.add_argument(
        "--method", choices=tuple(OPTIONS), default="dmd2",
        help="dmd2: reverse KL; fdistill: --divergence, weighed by the discriminator; cdm: flows, on a schedule that changes; "
        "rdmd: translates pictures of --source_data_dir.",
    )  # fmt: skip
    group.add_argument("--pretrained_teacher_model", required=True, help="Folder or Hub id of the pipeline.")
    group.add_argument(
        "--use_lora", action="store_true", help="Student and fake score are LoRAs on the teacher itself."
    )
    group.add_argument("--lora_rank", type=positive_int, default=64)
    group.add_argument(
        "--pretrained_student_model",
        help="Folder or Hub id of a pipeline whose UNet the student starts at. Default: the teacher.",
    )
    group.add_argument(
        "--num_denoising_steps", type=positive_int,
        help="Steps of the student, default 4. rdmd: the translator is the last of so many, default 2.",
    )  # fmt: skip
    group.add_argument(
        "--real_guidance_scale", type=positive, help="Guidance of the teacher. Default: 7.5, for cdm 8."
    )
    group.add_argument("--fake_update_ratio", type=positive_int, help="Steps of the fake score for one.")
    group.add_argument("--fake_learning_rate", type=positive, help="Default: --learning_rate, for cdm half of it.")
    group.add_argument(
        "--cache_latents", type=count, help="Encode this many pictures once instead of new ones every step."
    )
    group = parser.add_argument_group("distillation by --method dmd2 or fdistill")
    group.add_argument(
        "--backward_simulation", action=argparse.BooleanOptionalAction,
        help="Train on the student's own paths (default); without it, on noised pictures.",
    )  # fmt: skip
    group.add_argument("--gan_weight", type=not_negative, help="0 trains without discriminator.")
    group.add_argument("--discriminator_weight", type=positive)
    group.add_argument("--divergence", choices=F_DIVERGENCES, help="fdistill only.")
    group.add_argument(
        "--ratio_bins", type=positive_int, help="fdistill: noise levels whose density ratios are compared."
    )
    group = parser.add_argument_group("distillation by --method cdm")
    group.add_argument("--longest_schedule", type=positive_int, help="Most steps of the student's walks in training.")
    group.add_argument("--fake_pull", type=share, help="How far each step takes the fake score to the student.")
    group = parser.add_argument_group("distillation by --method rdmd")
    group.add_argument("--source_data_dir", help="Folder of pictures to translate, with metadata.jsonl.")
    group.add_argument("--transport_lambda", type=not_negative, help="Cost of moving a picture; 0 moves it freely.")
    group = parser.add_argument_group("validation and export")
    group.add_argument("--validation_prompts", nargs="+", help="Default: captions that are never trained on.")
    group.add_argument("--export_dtype", choices=("fp32", "fp16"), default="fp32")
    args = check_arguments(parser, parser.parse_args(input_args))
    settle_options(parser, args, OPTIONS)
    if args.pretrained_student_model and args.use_lora:
        parser.error(
            f"--pretrained_student_model {args.pretrained_student_model} needs weights of its own, which --use_lora does not train; leave "
            f"one of them out"
        )
    if args.method == "fdistill" and not args.gan_weight:
        parser.error("--method fdistill reads density ratios from the discriminator; give a --gan_weight above 0")
    if args.num_denoising_steps > 100:
        parser.error(f"--num_denoising_steps {args.num_denoising_steps} is no distillation; choose 1 to 8")
    if args.method == "cdm" and args.real_guidance_scale < 1.0:
        parser.error(
            f"--real_guidance_scale {args.real_guidance_scale:g} is below 1, which is no guidance; choose more"
        )
    if args.method == "rdmd" and not Path(args.source_data_dir or "").joinpath("metadata.jsonl").is_file():
        parser.error(
            f"--source_data_dir {args.source_data_dir} is no folder with metadata.jsonl; --method rdmd needs one"
        )
    if args.method == "rdmd" and args.num_denoising_steps not in TRANSLATION_STEPS:
        steps = ", ".join(map(str, TRANSLATION_STEPS))
        parser.error(f"--num_denoising_steps {args.num_denoising_steps} is no strength of rdmd; choose one of {steps}")
    if args.learning_rate is None:
        args.learning_rate = 5e-5 if args.use_lora else 1e-5
    if args.fake_learning_rate is None:
        args.fake_learning_rate = args.learning_rate * (0.5 if args.method == "cdm" else 1.0)
    return args


def main(args: argparse.Namespace) -> None:
    accelerator = make_accelerator(args)
    device = accelerator.device
    source = make_source(args, device)
    families = UNETS if args.method == "rdmd" else FAMILIES
    teacher = Teacher(args.pretrained_teacher_model, device, families, args.resolution, args.real_guidance_scale)
    weights = None
    if args.method == "fdistill":
        weights = DensityRatioWeights(
            args.divergence, args.ratio_bins, all_reduce=lambda tensor: accelerator.reduce(tensor, "sum")
        )
    method = make_matching_method(args, teacher, weights)
    networks = MatchingNetworks(
        teacher, args.num_denoising_steps, args.lora_rank if args.use_lora else None, bool(args.gan_weight),
        method.backward_simulation, args.seed, method.timesteps,
    )  # fmt: skip
    if args.pretrained_student_model:
        begin_at(networks.student, args.pretrained_student_model, teacher.family.part)
    trainer = AlternatingTrainer(
        args, accelerator, networks,
        networks.players(args.learning_rate, args.fake_learning_rate, args.fake_update_ratio, args.fake_pull or 0.0),
        {"density_ratios": weights} if weights else None,
    )  # fmt: skip
    total, a_round = trainer.global_batch_size, args.fake_update_ratio + 1
    data = make_latents(args, source, teacher.pipeline.vae, teacher.encode, accelerator)
    translated = None
    if args.source_data_dir:
        # another seed, so that pictures do not go with captions of equal rows
        seed = stream_seed(args.seed, 0, "translated")
        translated = FolderSource(
            args.source_data_dir, seed, args.resolution, args.image_column, None, device, args.strict
        )
    pictures = FreshLatents(translated, teacher.encode) if translated else data
    shape = (total, *teacher.encode(source.images(source.draw(0, 1, "held_out"))).shape[1:])

    def turn(step: int) -> list[Any]:
        """Batches of one optimiser step of one player; steps of all players are counted together."""
        items, keys = data.draw(step, total)
        prompts, draws = source.captions(items, step), method.draws(shape, step)
        if translated:
            _, keys = pictures.draw(step, total)
        return [
            (
                teacher.tokens(prompts[rows]), pictures.latents(keys[rows]) if method.needs_pictures else None,
                *(part[rows] for part in draws),
            )
            for rows in trainer.own_rows()
        ]  # fmt: skip

    def make_batches(step: int) -> dict[str, list[Any]]:
        turns = [turn(step * a_round + i) for i in range(a_round)]
        return {FAKE: turns[:-1], STUDENT: turns[-1:]}

    def on_device(batch: Any) -> tuple[Any, ...]:
        input_ids, *parts = (None if part is None else part.to(device) for part in batch)
        return teacher.embeddings(input_ids), *parts

    losses = {
        FAKE: lambda module, batch: method.fake_loss(module, *on_device(batch)),
        STUDENT: lambda module, batch: method.student_loss(module, *on_device(batch)),
    }
    prompts = list(args.validation_prompts or source.captions(source.draw(0, 24, "held_out")))

    keywords: dict[str, Any] = {"height": args.resolution, "width": args.resolution}
    if translated:
        prompts = prompts[:8]
        images = translated.images(translated.draw(0, len(prompts), "held_out")) * 0.5 + 0.5
        keywords = {"image": images, "strength": 1.0 / args.num_denoising_steps}

    def validate(step: int) -> tuple[dict[str, float], Any]:
        with networks.active(STUDENT):
            sheet = sample_sheet(
                teacher.student_pipeline(networks.student, method.scheduler, method.family), prompts, args.seed,
                keywords.get("image"), num_inference_steps=args.num_denoising_steps,
                guidance_scale=teacher.student_scale, **keywords,
            )  # fmt: skip
        return {}, sheet

    trainer.fit(make_batches, losses, validate)
    trainer.validate(validate)

    def write(folder: Path) -> None:
        save_student(teacher, networks, method.scheduler, folder, args.export_dtype, method.family)
        write_model_card(folder, args, trainer, prompts, method.family, teacher)

    finish_run(trainer, write)


def guidance_note(teacher: Teacher) -> str:
    where = "told to the network, as in training" if teacher.reads_guidance else "part of the weights"
    return f"{where}: `guidance_scale={teacher.student_scale:g}`"


def write_model_card(
    folder: Path,
    args: argparse.Namespace,
    trainer: AlternatingTrainer,
    prompts: list[str],
    kind: type[Any] | None,
    teacher: Teacher,
) -> None:
    family = (kind or teacher.family.pipeline_class).__name__
    method = NAMES[args.method] + (f" ({args.divergence})" if args.divergence else "")
    adapter = (
        "\n\n`pytorch_lora_weights.safetensors` is the same as an adapter, for `load_lora_weights` on the teacher with the "
        "scheduler of this folder."
    )
    steps, translates = args.num_denoising_steps, args.method == "rdmd"
    call = f'image = pipe("{prompts[0]}", num_inference_steps={steps}, guidance_scale={teacher.student_scale:g}).images[0]'
    legend = f"First row: {'; '.join(prompts[:8])}."
    imports = f"from diffusers import {family}\n" + "from diffusers.utils import load_image\n" * translates
    made = "a translator of one step" if translates else f"{steps} steps"
    if translates:
        call = (
            f'image = pipe("{prompts[0]}", image=load_image("picture.png"), strength={1 / steps:g}, num_inference_steps={steps}, '
            f"guidance_scale=1).images[0]  # a picture of {args.resolution} pixels"
        )
        legend = f"First row the pictures, second row their translations: {'; '.join(prompts)}."
    description = (
        f"`{Path(args.pretrained_teacher_model).name}` distilled to {made} by {method} with "
        f"`training/train_dmd.py`, {trainer.step:,} steps of the student on {trainer.global_batch_size} samples each. Guidance "
        f"of {args.real_guidance_scale:g} is {guidance_note(teacher)}.{adapter if args.use_lora else ''}\n\n"
        f"![samples](samples.png)\n\n{legend}\n\n"
        f"```python\n{imports}\n"
        f'pipe = {family}.from_pretrained("{args.hub_model_id or Path(args.output_dir).name}")\n'
        f"{call}\n```"
    )
    task = "image-to-image" if translates else "text-to-image"
    tags = ["diffusers", task, teacher.family.tag, args.method, "diffusers-ext", *(["lora"] * args.use_lora)]
    write_card(folder, Path(args.output_dir).name, description, args, tags)


if __name__ == "__main__":
    main(parse_args())
