#!/usr/bin/env python
"""Trains the attribute judge of the benchmarks on ground-truth renderings.

    accelerate launch training/train_attribute_judge.py --dataset_name emoji-scenes --objects demo --output_dir runs/judge

The output folder loads with `AttributeJudge.from_pretrained(output_dir)`; its `metrics.json` states the accuracy on
renderings of held-out triples.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

from diffusers_ext.models import AttributeJudge
from diffusers_ext.models.attribute_judge import judge_loss
from diffusers_ext.training.arguments import add_data_arguments, add_training_arguments, check_arguments, positive_int
from diffusers_ext.training.data import EmojiSource
from diffusers_ext.training.export import finish_run, write_card
from diffusers_ext.training.streams import stream
from diffusers_ext.training.trainer import Trainer, make_accelerator


ATTRIBUTES = ("object", "colour", "background", "pattern")
VALIDATION_BATCH = 100


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data_arguments(parser)
    add_training_arguments(
        parser, learning_rate=2e-3, lr_scheduler="cosine", decay_fraction=1.0, train_batch_size=32, ema_decay=0.99,
        max_train_steps=1500, validation_steps=500,
    )  # fmt: skip
    parser.add_argument("--channels", type=positive_int, nargs="+", default=[32, 64, 96, 128])
    parser.add_argument("--num_validation_images", type=positive_int, default=1000)
    args = check_arguments(parser, parser.parse_args(input_args))
    if args.train_data_dir:
        parser.error("--train_data_dir has no labels to judge by; use --dataset_name emoji-scenes")
    return args


def soften(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Adds what a generated picture may have and a rendering has not: a little noise, blur and loss of contrast."""
    blur, contrast, noise = torch.rand(3, len(images), 1, 1, 1, generator=generator)
    grain = torch.randn(images.shape, generator=generator)
    blurred = F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    mixed = images + blur * (blurred - images)
    return ((0.85 + 0.15 * contrast) * mixed + 0.08 * noise * grain).clamp(-1.0, 1.0)


def main(args: argparse.Namespace) -> None:
    accelerator = make_accelerator(args)
    device = accelerator.device
    source = EmojiSource(args.seed, args.resolution, args.vendors, args.objects)
    torch.manual_seed(args.seed)
    labels = {name: list(getattr(source.scenes, f"{name}_names")) for name in ATTRIBUTES}
    judge = AttributeJudge(labels, list(args.channels))
    trainer = Trainer(args, accelerator, judge)

    def make_batches(step: int) -> list[Any]:
        items = source.draw(step, trainer.global_batch_size)
        batches = []
        for rows in trainer.own_rows():
            images = soften(source.images(items[rows]), stream(args.seed, step, f"soften-{rows.start}"))
            batches.append((images, {name: getattr(items[rows], name) for name in ATTRIBUTES}))
        return batches

    def loss_of(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        images, truth = batch
        logits = model(images.to(device, memory_format=torch.channels_last))
        return judge_loss(logits, {name: value.to(device) for name, value in truth.items()})

    held_out = source.draw(0, args.num_validation_images, "held_out")

    def validate(step: int) -> tuple[dict[str, float], Image.Image | None]:
        right = dict.fromkeys(ATTRIBUTES, 0)
        for first in range(0, args.num_validation_images, VALIDATION_BATCH):
            part = held_out[first : first + VALIDATION_BATCH]
            for name, value in judge.read(source.images(part).to(device)).items():
                right[name] += int((value.cpu() == getattr(part, name)).sum())
        return {f"{name}_accuracy": count / args.num_validation_images for name, count in right.items()}, None

    trainer.fit(make_batches, loss_of, validate)

    def write(folder: Path) -> None:
        save_model(folder, args, judge, {"steps": trainer.step, **validate(trainer.step)[0]})

    finish_run(trainer, write, with_samples=False)


def save_model(folder: Path, args: argparse.Namespace, judge: AttributeJudge, metrics: dict[str, float]) -> None:
    judge.save_pretrained(folder)
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    accuracy = ", ".join(f"{name} {metrics[f'{name}_accuracy']:.3f}" for name in ATTRIBUTES)
    description = f"Reads the attributes of emoji scenes. Accuracy on renderings of held-out triples: {accuracy}."
    write_card(folder, Path(args.output_dir).name, description, args, ["diffusers-ext"], license="apache-2.0")


if __name__ == "__main__":
    main(parse_args())
