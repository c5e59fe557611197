"""Command-line arguments that the training scripts share; names as in the diffusers examples."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..data import DEMO_OBJECTS


DATASETS = ("emoji-scenes",)


def positive_int(text: str) -> int:
    """A whole number of 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number, 1 or more")
    return value


def count(text: str) -> int:
    """A whole number of 0 or more."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number, 0 or more")
    return value


def positive(text: str) -> float:
    """A number above 0."""
    value = float(text)
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be a number above 0")
    return value


def not_negative(text: str) -> float:
    """A number of 0 or more."""
    value = float(text)
    if not 0.0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be a number, 0 or more")
    return value


def share(text: str) -> float:
    """A number from 0 to 1."""
    value = float(text)
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text} must lie between 0 and 1")
    return value


def decay(text: str) -> float:
    """A number from 0 up to, but not, 1."""
    value = float(text)
    if not 0.0 <= value < 1.0:
        raise argparse.ArgumentTypeError(f"{text} must be at least 0 and less than 1")
    return value


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Which pictures to train on."""
    group = parser.add_argument_group("data")
    group.add_argument("--dataset_name", choices=DATASETS, help="Picture set that is composed on the fly.")
    group.add_argument("--train_data_dir", help="Folder of pictures with metadata.jsonl, instead of --dataset_name.")
    group.add_argument("--image_column", default="file_name", help="Key of the picture's path in metadata.jsonl.")
    group.add_argument("--caption_column", default="text", help="Key of the caption in metadata.jsonl.")
    group.add_argument(
        "--strict",
        action="store_true",
        help="Refuse a picture that cannot be read; default: leave it out with a warning.",
    )
    group.add_argument("--vendors", nargs="+", metavar="NAME", help="emoji-scenes: hands to draw with.")
    group.add_argument(
        "--objects",
        nargs="+",
        metavar="WORD",
        help="emoji-scenes: objects to draw, 'demo' for the 24 of the demo model.",
    )
    group.add_argument("--resolution", type=positive_int, default=64, help="Side of the pictures in pixels.")
    group.add_argument(
        "--dataloader_num_workers", type=int, choices=(0, 1), default=1,
        help="1 composes batches ahead in a background thread, 0 when they are needed. The batches are the same.",
    )  # fmt: skip


def add_training_arguments(parser: argparse.ArgumentParser, **defaults: object) -> None:
    """How to optimise, save and report. `defaults` replaces the defaults below."""
    group = parser.add_argument_group("training")
    group.add_argument(
        "--output_dir", required=True, help="Folder of the run: checkpoints, log and the trained model."
    )
    group.add_argument("--seed", type=int, default=0)
    group.add_argument(
        "--train_batch_size", type=positive_int, default=16, help="Pictures a process and forward pass."
    )
    group.add_argument("--gradient_accumulation_steps", type=positive_int, default=1)
    group.add_argument("--max_train_steps", type=positive_int, default=1000, help="Optimiser steps in all.")
    group.add_argument(
        "--max_train_seconds", type=positive, help="Stop after this time with a checkpoint; resume to go on."
    )
    group.add_argument("--learning_rate", type=positive, default=8e-4)
    group.add_argument("--lr_scheduler", choices=("constant", "linear", "cosine"), default="linear")
    group.add_argument("--lr_warmup_steps", type=count, default=100)
    group.add_argument(
        "--decay_fraction", type=share, default=0.3, help="Share of the steps, at the end, in which the rate decays."
    )
    group.add_argument("--lr_end", type=share, default=0.0, help="Rate at the last step as a share of the full rate.")
    group.add_argument("--adam_beta1", type=decay, default=0.9)
    group.add_argument("--adam_beta2", type=decay, default=0.99)
    group.add_argument("--adam_weight_decay", type=not_negative, default=1e-2)
    group.add_argument("--adam_epsilon", type=positive, default=1e-8)
    group.add_argument("--max_grad_norm", type=positive, default=1.0)
    group.add_argument(
        "--use_ema",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Average the weights; the average is saved.",
    )
    group.add_argument("--ema_decay", type=decay, default=0.998)
    group.add_argument("--mixed_precision", choices=("no", "bf16"), default="no")
    group.add_argument("--torch_compile", action="store_true", help="Compile the network; a minute more at the start.")
    group.add_argument("--num_threads", type=positive_int, help="CPU threads a process.")

    group = parser.add_argument_group("checkpoints and reports")
    group.add_argument("--checkpointing_steps", type=positive_int, default=500)
    group.add_argument("--checkpoints_total_limit", type=positive_int, default=2)
    group.add_argument("--resume_from_checkpoint", help="'latest', a checkpoint folder, or its name in --output_dir.")
    group.add_argument("--validation_steps", type=count, default=1000, help="0 validates only at the end.")
    group.add_argument("--logging_steps", type=positive_int, default=50)
    group.add_argument("--report_to", choices=("tensorboard", "none"), default="tensorboard")
    group.add_argument("--logging_dir", default="logs", help="Folder in --output_dir for the reports.")
    group.add_argument("--push_to_hub", action="store_true")
    group.add_argument("--hub_model_id", help="Repository; default the name of --output_dir.")
    group.add_argument("--hub_token", help="Default: the token of `hf auth login`.")
    parser.set_defaults(**defaults)


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """Refuses combinations that cannot be meant, with one sentence and exit code 2."""
    if (args.dataset_name is None) == (args.train_data_dir is None):
        parser.error("give exactly one of --dataset_name and --train_data_dir")
    if args.train_data_dir and (args.vendors or args.objects):
        parser.error(
            "--vendors and --objects belong to --dataset_name emoji-scenes; leave them out with --train_data_dir"
        )
    if args.train_data_dir and not Path(args.train_data_dir).is_dir():
        parser.error(f"--train_data_dir {args.train_data_dir} does not exist; give a folder with metadata.jsonl")
    check_output_dir(parser, args)
    if args.objects == ["demo"]:
        args.objects = list(DEMO_OBJECTS)
    return args


def settle_options(
    parser: argparse.ArgumentParser, args: argparse.Namespace, options: Mapping[str, Mapping[str, Any]]
) -> None:
    """Refuses options of other methods than `args.method`, with one sentence and exit code 2, and fills in its defaults.

    Args:
        parser: Reports what is wrong.
        args: With a `method`; of the options it does not name, each is `None` where it was not given.
        options: By method, the options that not all methods have alike, with their defaults there.
    """
    own = options[args.method]
    for name in sorted({name for others in options.values() for name in others}):
        if name not in own and getattr(args, name) is not None:
            parser.error(f"--{name} is no option of --method {args.method}; leave it out")
        if getattr(args, name) is None:
            setattr(args, name, own.get(name))


def check_output_dir(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuses a file in the place of the run's folder, with one sentence and exit code 2."""
    if Path(args.output_dir).is_file():
        parser.error(f"--output_dir {args.output_dir} is a file; give a folder")


def recorded(args: argparse.Namespace) -> dict[str, object]:
    """The arguments as they may be stored: without secrets, and without what names this machine."""
    hidden = ("hub_token", "output_dir", "resume_from_checkpoint")
    return {name: value for name, value in sorted(vars(args).items()) if name not in hidden}
