#!/usr/bin/env python
"""Measures how well a flow in the layout of Stable Diffusion knows its data at each level, and saves a FLAIR scheduler that knows it.

    python training/calibrate_flow.py --pretrained_model pipelines/emoji-scenes-flow \
        --dataset_name emoji-scenes --objects demo --output_dir runs/flair

The output folder loads with `FLAIRScheduler.from_pretrained(output_dir)`. Pictures are held-out ones of the set, with their captions.
"""

import argparse
from pathlib import Path

import torch

from diffusers_ext import FLAIRScheduler, FlowChefPipeline
from diffusers_ext.steering import velocity_errors
from diffusers_ext.training.arguments import add_data_arguments, check_arguments, positive_int
from diffusers_ext.training.data import make_source


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data_arguments(parser)
    parser.add_argument("--pretrained_model", required=True, help="Folder or Hub id of the pipeline.")
    parser.add_argument("--output_dir", required=True, help="Folder of the scheduler.")
    parser.add_argument("--levels", type=positive_int, default=100, help="Equally spaced levels from 1 to 0.")
    parser.add_argument(
        "--num_pictures", type=positive_int, default=64, help="Pictures, with new noise at each level."
    )
    parser.add_argument("--batch_size", type=positive_int, default=16, help="Pictures a forward pass.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    args = check_arguments(parser, parser.parse_args(input_args))
    if args.levels < 2:
        parser.error(f"--levels {args.levels} is no table; give at least 2")
    return args


def main(args: argparse.Namespace) -> None:
    device = torch.device(args.device)
    pipe = FlowChefPipeline.from_pretrained(args.pretrained_model).to(device)
    source = make_source(args, device)
    items = source.draw(0, args.num_pictures, "held_out")
    with torch.no_grad():
        latents = pipe.encode_pictures(source.images(items))
        embeds, _ = pipe.encode_prompt(source.captions(items), device, 1, False)

        def velocity(states: torch.Tensor, level: float) -> torch.Tensor:
            parts = zip(states.split(args.batch_size), embeds.split(args.batch_size), strict=True)
            return torch.cat([pipe.velocity(state, level, words) for state, words in parts])

        errors = velocity_errors(velocity, latents, args.levels, torch.Generator(device).manual_seed(args.seed))
    scheduler = FLAIRScheduler.from_config(
        pipe.scheduler.config, velocity_errors=[round(error, 6) for error in errors]
    )
    scheduler.save_pretrained(args.output_dir)
    print(
        f"{Path(args.output_dir) / scheduler.config_name}: {errors[0]:.3f} at level 1, least {min(errors):.3f}, {errors[-1]:.3f} at 0"
    )


if __name__ == "__main__":
    main(parse_args())
