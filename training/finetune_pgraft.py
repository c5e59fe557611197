#!/usr/bin/env python
"""Fine-tunes the early steps of a text-to-image pipeline on its own samples that a reward accepts (P-GRAFT).

    accelerate launch training/finetune_pgraft.py --pretrained_teacher_model pipelines/emoji-scenes-64 \
        --dataset_name emoji-scenes --objects demo --reward pipelines/emoji-scenes-judge --teacher_guidance_scale 3 \
        --output_dir runs/pgraft --resume_from_checkpoint latest

The output folder loads with `StableDiffusionPipeline.from_pretrained(output_dir)`; its card has the lines that run the
base network at the late steps, as the method wants it. See training/README.md.
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
    positive,
    positive_int,
    share,
)
from diffusers_ext.training.data import make_source
from diffusers_ext.training.distillation.accepted import AcceptedSamples, mean_reward, switching
from diffusers_ext.training.distillation.pgraft import switch_timestep, tuned_timesteps
from diffusers_ext.training.distillation.rewards import REWARDS, make_reward
from diffusers_ext.training.distillation.teachers import DistilledUNet, Teacher, save_base_unet, save_student
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
    group = parser.add_argument_group("samples")
    group.add_argument("--pretrained_teacher_model", required=True, help="Folder or Hub id of the pipeline.")
    group.add_argument(
        "--reward",
        required=True,
        help=f"What to prefer: {', '.join(REWARDS)}, or folder or Hub id of an AttributeJudge.",
    )
    group.add_argument("--num_prompts", type=positive_int, default=1000, help="Captions to sample pictures of.")
    group.add_argument("--samples_per_prompt", type=positive_int, default=8)
    group.add_argument(
        "--keep", type=positive_int, help="Best samples of each prompt to train on. Default: a quarter."
    )
    group.add_argument(
        "--temperature", type=positive,
        help="Instead of --keep: accept a sample with probability exp((reward - the prompt's best) / temperature).",
    )  # fmt: skip
    group.add_argument(
        "--teacher_steps",
        type=positive_int,
        default=20,
        help="Steps of the teacher's own scheduler, and of validation.",
    )
    group.add_argument("--teacher_guidance_scale", type=positive, default=7.5, help="1 is no guidance.")
    group = parser.add_argument_group("fine-tuning")
    group.add_argument("--use_lora", action="store_true", help="Train a LoRA on the teacher, not a copy of it.")
    group.add_argument("--lora_rank", type=positive_int, default=64)
    group.add_argument(
        "--tuned_share", type=share, default=0.25,
        help="Share of the timesteps, from the noise, that is trained and later sampled by the student; 1 is GRAFT.",
    )  # fmt: skip
    group.add_argument("--proportion_empty_prompts", type=share, default=0.1, help="For classifier-free guidance.")
    group = parser.add_argument_group("validation and export")
    group.add_argument("--validation_prompts", nargs="+", help="Default: captions that are never trained on.")
    group.add_argument("--export_dtype", choices=("fp32", "fp16"), default="fp32")
    args = check_arguments(parser, parser.parse_args(input_args))
    if args.keep is not None and args.temperature is not None:
        parser.error("--keep and --temperature are two ways to choose samples; leave one out")
    if args.keep is None and args.temperature is None:
        args.keep = max(1, args.samples_per_prompt // 4)
    if args.samples_per_prompt < 2 or (args.keep or 0) >= args.samples_per_prompt:
        parser.error(
            f"--samples_per_prompt {args.samples_per_prompt} with --keep {args.keep} rejects nothing; sample more, or "
            f"keep fewer"
        )
    if args.tuned_share <= 0.0:
        parser.error("--tuned_share 0 trains nothing; give a share above 0, for example 0.25")
    if args.learning_rate is None:
        args.learning_rate = 1e-4 if args.use_lora else 1e-5
    return args


def main(args: argparse.Namespace) -> None:
    accelerator = make_accelerator(args)
    device = accelerator.device
    source = make_source(args, device)
    reward = make_reward(args.reward, device)
    teacher = Teacher(args.pretrained_teacher_model, device)
    train_timesteps, scheduler = teacher.schedule.num_train_timesteps, teacher.pipeline.scheduler
    switch = switch_timestep(args.tuned_share, train_timesteps)
    scheduler.set_timesteps(args.teacher_steps)
    if float(scheduler.timesteps[0]) < switch:
        raise ValueError(
            f"tuned_share={args.tuned_share:g} tunes timesteps from {switch}, and the {args.teacher_steps} "
            f"teacher_steps begin at {float(scheduler.timesteps[0]):g}, below it; raise either"
        )
    # faster, and the same to the bit whether the student is this network or a copy of it
    teacher.unet.to(memory_format=torch.channels_last)
    samples = AcceptedSamples(args, source, teacher, reward)
    prompts_held_out = source.captions(source.draw(0, VALIDATION_ITEMS, "held_out"))
    call = {
        "num_inference_steps": args.teacher_steps, "guidance_scale": args.teacher_guidance_scale,
        "height": args.resolution, "width": args.resolution,
    }  # fmt: skip
    before = mean_reward(teacher.pipeline, reward, prompts_held_out, args.seed, **call)
    student = DistilledUNet(teacher, args.lora_rank if args.use_lora else None, None, args.seed)
    # before the samples, which take long: it may refuse to begin
    trainer = Trainer(args, accelerator, student)
    samples.prepare(accelerator)
    total, empty = trainer.global_batch_size, teacher.tokens([""])

    def make_batches(step: int) -> list[Any]:
        clean, input_ids = samples.draw(step, total)
        emptied = torch.rand(total, generator=stream(args.seed, step, "empty-prompts")) < args.proportion_empty_prompts
        input_ids = torch.where(emptied[:, None], empty, input_ids)
        uniform = stratified_uniform(total, stream(args.seed, step, "times"))
        timesteps = tuned_timesteps(uniform, switch, train_timesteps)
        noise = torch.randn(clean.shape, generator=stream(args.seed, step, "noise"))
        return [(clean[rows], noise[rows], input_ids[rows], timesteps[rows]) for rows in trainer.own_rows()]

    def loss_of(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        clean, noise, input_ids, timesteps = (part.to(device) for part in batch)
        sample = teacher.schedule.noisy(clean, noise, timesteps).contiguous(memory_format=torch.channels_last)
        prediction = model(sample, timesteps, teacher.embeddings(input_ids))
        return torch.nn.functional.mse_loss(prediction.float(), teacher.schedule.target(clean, noise, timesteps))

    prompts = list(args.validation_prompts or prompts_held_out[:24])

    def validate(step: int) -> tuple[dict[str, float], Any]:
        tuned = student.plain_unet()
        pipeline = teacher.student_pipeline(tuned, scheduler)
        switched = {**call, "callback_on_step_end": switching(tuned, teacher.unet, switch)}
        metrics = {"reward": mean_reward(pipeline, reward, prompts_held_out, args.seed, **switched)}
        return metrics, sample_sheet(pipeline, prompts, args.seed, **switched)

    trainer.fit(make_batches, loss_of, validate)
    after = trainer.validate(validate)

    def write(folder: Path) -> None:
        save_student(teacher, student, scheduler, folder, args.export_dtype)
        if switch:
            save_base_unet(teacher, student, folder, args.export_dtype)
        write_model_card(folder, args, trainer, samples, prompts, switch, before, after["reward"])

    finish_run(trainer, write)


SNIPPETS = {
    "start": 'pipe = StableDiffusionPipeline.from_pretrained("{name}")\n',
    "full": """\
tuned, base = pipe.unet, UNet2DConditionModel.from_pretrained("{name}", subfolder="base_unet")


def switch(pipe, step, timestep, tensors):
    left = pipe.scheduler.timesteps[step + 1 :]
    pipe.unet = base if len(left) and left[0] < {switch} else tuned
    return tensors


""",
    "lora": """\
pipe.unet = UNet2DConditionModel.from_pretrained("{name}", subfolder="base_unet")
pipe.load_lora_weights("{name}")


def switch(pipe, step, timestep, tensors):
    left = pipe.scheduler.timesteps[step + 1 :]
    if len(left) and left[0] < {switch}:
        pipe.disable_lora()
    else:
        pipe.enable_lora()
    return tensors


""",
}


def write_model_card(
    folder: Path,
    args: argparse.Namespace,
    trainer: Trainer,
    samples: AcceptedSamples,
    prompts: list[str],
    switch: int,
    before: float,
    after: float,
) -> None:
    teacher, reward = Path(args.pretrained_teacher_model).name, Path(args.reward).name
    made = args.num_prompts * args.samples_per_prompt
    kept, every = samples.mean_rewards()
    tuned = (
        f"at timesteps of {switch} or more. It is meant for these alone: below, the network that it was made of goes "
        f"on, which is in `base_unet/`. A call without `callback_on_step_end` samples all steps with the tuned one."
        if switch
        else "at all timesteps (GRAFT)."
    )
    snippet = (SNIPPETS["lora" if args.use_lora else "full"] if switch else "").join((SNIPPETS["start"], ""))
    snippet = snippet.format(name=args.hub_model_id or Path(args.output_dir).name, switch=switch)
    classes = "StableDiffusionPipeline" + ", UNet2DConditionModel" * bool(switch)
    adapter = " `pytorch_lora_weights.safetensors` is the tuned part alone, an adapter on the base." * args.use_lora
    description = (
        f"`{teacher}` fine-tuned by P-GRAFT with `training/finetune_pgraft.py`, on {len(samples):,} of {made:,} of "
        f"its own samples that the reward `{reward}` accepts, {tuned}{adapter}\n\n"
        f"| mean reward `{reward}` | |\n| --- | --- |\n"
        f"| all samples that were made | {every:.4f} |\n| those trained on | {kept:.4f} |\n"
        f"| `{teacher}`, {VALIDATION_ITEMS} captions never trained on | {before:.4f} |\n"
        f"| this model{f', switched at {switch}' * bool(switch)}, the same captions and noise | {after:.4f} |\n\n"
        f"![samples](samples.png)\n\nFirst row: {'; '.join(prompts[:8])}.\n\n"
        f"```python\nfrom diffusers import {classes}\n\n{snippet}"
        f'image = pipe(\n    "{prompts[0]}", num_inference_steps={args.teacher_steps}, '
        f"guidance_scale={args.teacher_guidance_scale:g}{', callback_on_step_end=switch' * bool(switch)}\n"
        f").images[0]\n```"
    )
    tags = ["diffusers", "text-to-image", "stable-diffusion", "p-graft", "diffusers-ext"]
    write_card(folder, Path(args.output_dir).name, description, args, [*tags, *(["lora"] * args.use_lora)])


if __name__ == "__main__":
    main(parse_args())
