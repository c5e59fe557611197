#!/usr/bin/env python
"""Trains a rolling diffusion model on recorded sequences, and saves it as a `RollingLadderPipeline`.

    accelerate launch training/train_rolling.py --train_data_dir data/daphnet --ladder_curriculum 1 2 4 \
        --output_dir runs/rolling --resume_from_checkpoint latest

The folder of the data holds recordings and a `sequences.json`; frames are generated, each from its condition. The output folder loads
with `RollingLadderPipeline.from_pretrained(output_dir)` and streams in the units of the recording. See training/README.md and
docs/rolling.md.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from diffusers_ext import RollingLadderPipeline, RollingLadderScheduler, RollingTransformer1DModel
from diffusers_ext.pipelines.frame_units import ChannelUnits
from diffusers_ext.sequence_metrics import jitter_ratio, r_squared, seam_ratio
from diffusers_ext.training.arguments import (
    add_training_arguments,
    check_output_dir,
    count,
    not_negative,
    positive,
    positive_int,
    share,
)
from diffusers_ext.training.export import finish_run, write_card
from diffusers_ext.training.plots import line_panels
from diffusers_ext.training.rolling import (
    LARGEST_INERTIA,
    check_curriculum,
    check_lookaheads,
    context_of_step,
    curriculum_stage,
    inertial_loss,
    known_conditions,
    ladder_timesteps,
    ladders_of_windows,
    rolling_target,
)
from diffusers_ext.training.sequences import Segment, SequenceFolder, WindowSource
from diffusers_ext.training.streams import stream
from diffusers_ext.training.trainer import Trainer, make_accelerator


PREDICTION_TYPES = ("sample", "v_prediction", "flow_prediction")
MODES = ("mixed", "ladder", "rolling", "init", "independent")
# Frames and channels of the validation plot.
SHOWN_FRAMES, SHOWN_CHANNELS = 256, 6


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    group = parser.add_argument_group("data")
    group.add_argument("--train_data_dir", required=True, help="Folder of recordings with sequences.json.")
    group.add_argument(
        "--dataloader_num_workers", type=int, choices=(0, 1), default=1,
        help="1 prepares batches ahead in a background thread, 0 when they are needed. The batches are the same.",
    )  # fmt: skip
    group.add_argument(
        "--condition_noise", type=not_negative, default=0.0,
        help="Standard deviation of noise on the normalised condition: against learning short recordings by heart.",
    )  # fmt: skip
    group.add_argument(
        "--amplitude_jitter", type=not_negative, default=0.0,
        help="Windows with their conditions are scaled by exp(this times a normal number), for the same reason.",
    )  # fmt: skip
    add_training_arguments(parser, learning_rate=1e-3, train_batch_size=32, adam_weight_decay=0.05)
    group = parser.add_argument_group("model")
    group.add_argument("--pretrained_model_name_or_path", help="Folder or Hub id of a pipeline to fine-tune.")
    group.add_argument("--num_layers", type=positive_int, default=4)
    group.add_argument("--num_attention_heads", type=positive_int, default=4)
    group.add_argument("--attention_head_dim", type=positive_int, default=32)
    group.add_argument("--causal", action="store_true", help="Frames see only frames before them.")
    group = parser.add_argument_group("process")
    group.add_argument("--window_length", type=positive_int, default=32, help="Frames that are denoised together.")
    group.add_argument("--context_length", type=count, default=16, help="Emitted frames that stand before them.")
    group.add_argument(
        "--context_timestep", type=not_negative, help="Timestep of the context; 0 is a trace of noise, default none."
    )
    group.add_argument("--num_train_timesteps", type=positive_int, default=1000)
    group.add_argument(
        "--prediction_type", choices=PREDICTION_TYPES, default="flow_prediction",
        help="What the network answers and is judged by; all but the last on the cosine process.",
    )  # fmt: skip
    group.add_argument(
        "--flow_shift", type=positive, default=1.0,
        help="Below 1 moves the levels of a flow model towards data: fine motion then survives few evaluations.",
    )  # fmt: skip
    group = parser.add_argument_group("objective")
    group.add_argument(
        "--ladder_curriculum", type=positive_int, nargs="+", default=[1],
        help="Ladder steps in turn, for equal parts of the run; the last one is saved.",
    )  # fmt: skip
    group.add_argument("--replay_share", type=share, default=0.5, help="Share of windows with an earlier ladder.")
    group.add_argument("--timestep_mode", choices=MODES, default="mixed")
    group.add_argument("--init_share", type=share, default=0.1, help="mixed: share of windows in the warm-up.")
    group.add_argument(
        "--short_context_share", type=share, default=0.2,
        help="Share of steps with less context than there is, half of them with none and half of those in the warm-up.",
    )  # fmt: skip
    group.add_argument("--inertia_weight", type=share, default=0.0, help="Of the inertial loss, up to 0.5.")
    group.add_argument(
        "--lookahead", type=positive_int, nargs="+", metavar="FRAMES",
        help="Frames of the window, from its first, that have their condition; of several one is drawn for each window, and the "
        "first is validated. For streams with this lookahead; default the whole window.",
    )  # fmt: skip
    group.add_argument("--condition_dropout", type=share, default=0.1, help="Share of windows without condition.")
    group = parser.add_argument_group("validation and export")
    group.add_argument("--num_validation_frames", type=positive_int, default=512)
    group.add_argument("--num_validation_samples", type=positive_int, default=8)
    group.add_argument(
        "--validation_ladders", type=positive_int, nargs="+", help="Ladder steps; default those of the curriculum."
    )
    group.add_argument("--export_dtype", choices=("fp32", "fp16"), default="fp32")
    args = parser.parse_args(input_args)
    check_output_dir(parser, args)
    if not Path(args.train_data_dir).is_dir():
        parser.error(f"--train_data_dir {args.train_data_dir} does not exist; give a folder with sequences.json")
    if args.flow_shift != 1.0 and args.prediction_type != "flow_prediction":
        parser.error(f"--flow_shift is of flow models; leave it out with --prediction_type {args.prediction_type}")
    if args.inertia_weight > LARGEST_INERTIA:
        parser.error(
            f"--inertia_weight {args.inertia_weight} is more than {LARGEST_INERTIA}; the loss would be negative"
        )
    args.validation_ladders = args.validation_ladders or list(args.ladder_curriculum)
    try:
        check_curriculum(args.ladder_curriculum, args.window_length)
        check_lookaheads(args.lookahead, max(*args.ladder_curriculum, *args.validation_ladders), args.window_length)
        make_schedulers(args, args.validation_ladders)
    except ValueError as error:
        parser.error(str(error))
    return args


def make_schedulers(args: argparse.Namespace, ladders: list[int]) -> dict[int, RollingLadderScheduler]:
    """A scheduler a ladder."""
    time = args.context_timestep
    if time is not None and args.prediction_type != "flow_prediction" and time.is_integer():
        time = int(time)
    return {
        ladder: RollingLadderScheduler(
            num_train_timesteps=args.num_train_timesteps,
            beta_schedule="cosine",
            prediction_type=args.prediction_type,
            flow_shift=args.flow_shift,
            window_length=args.window_length,
            ladder_step=ladder,
            context_length=args.context_length,
            context_timestep=time,
        )
        for ladder in ladders
    }


def load_network(args: argparse.Namespace, data: SequenceFolder) -> RollingTransformer1DModel:
    """The network, trained or new; a trained one keeps the units that it was trained in."""
    if args.pretrained_model_name_or_path:
        network = RollingLadderPipeline.from_pretrained(args.pretrained_model_name_or_path).transformer.float()
        for name, found in (("in_channels", data.frame_names), ("condition_channels", data.condition_names)):
            if network.config[name] != len(found):
                raise ValueError(
                    f"the pretrained network has {name}={network.config[name]}, the data {len(found)}; leave out "
                    "--pretrained_model_name_or_path"
                )
        return network
    torch.manual_seed(args.seed)
    return RollingTransformer1DModel(
        in_channels=len(data.frame_names),
        condition_channels=len(data.condition_names),
        num_layers=args.num_layers,
        num_attention_heads=args.num_attention_heads,
        attention_head_dim=args.attention_head_dim,
        causal=args.causal,
        **data.statistics(),
    )


def main(args: argparse.Namespace) -> None:
    accelerator = make_accelerator(args)
    device = accelerator.device
    data = SequenceFolder(args.train_data_dir)
    if args.lookahead and not data.condition_names:
        raise ValueError(
            f"lookahead={args.lookahead} is of conditions, of which {args.train_data_dir} has none; leave it out"
        )
    network = load_network(args, data)
    schedulers = make_schedulers(args, args.ladder_curriculum)
    saved = schedulers[args.ladder_curriculum[-1]]
    segments = [normalised(part, network) for part in data.segments["train"]]
    windows = WindowSource(segments, args.seed, args.context_length + args.window_length)
    if args.torch_compile:
        network.compile()
    trainer = Trainer(args, accelerator, network)
    total = trainer.global_batch_size
    context_time = saved.clean_timestep if saved.config.context_timestep is None else saved.config.context_timestep

    def make_batches(step: int) -> list[Any]:
        context = context_of_step(args.seed, step, args.context_length, args.short_context_share)
        clean, condition = (
            None if part is None else part[:, args.context_length - context :] for part in windows.draw(step, total)
        )
        stage = curriculum_stage(step, args.max_train_steps, len(args.ladder_curriculum))
        ladders = ladders_of_windows(
            total, args.ladder_curriculum, stage, args.replay_share, stream(args.seed, step, "ladders")
        )
        init_share = args.init_share if context or not args.context_length else max(args.init_share, 0.5)
        times = ladder_timesteps(
            schedulers, ladders, args.timestep_mode, init_share, stream(args.seed, step, "timesteps")
        )
        times = torch.cat([torch.full((total, context), context_time, dtype=times.dtype), times], 1)
        if args.amplitude_jitter:
            scale = torch.randn(total, 1, 1, generator=stream(args.seed, step, "amplitudes"))
            scale = (args.amplitude_jitter * scale).exp()
            clean, condition = scale * clean, None if condition is None else scale * condition
        noise = torch.randn(clean.shape, generator=stream(args.seed, step, "noise"))
        sample = saved.add_noise(clean, noise, times)
        target = rolling_target(saved, clean, noise, times)[:, context:]
        parts: dict[str, torch.Tensor] = {"sample": sample, "timestep": times}
        if condition is not None:
            if args.condition_noise:
                extra = torch.randn(condition.shape, generator=stream(args.seed, step, "condition-noise"))
                condition = condition + args.condition_noise * extra
            kept = torch.rand(total, 1, generator=stream(args.seed, step, "dropout")) >= args.condition_dropout
            known = known_conditions(
                total, context, args.window_length, args.lookahead, stream(args.seed, step, "lookahead")
            )
            parts |= {"condition": condition, "condition_mask": kept & known}
        return [({name: part[rows] for name, part in parts.items()}, target[rows]) for rows in trainer.own_rows()]

    def loss_of(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        parts, target = batch
        target = target.to(device)
        context = parts["sample"].shape[1] - target.shape[1]
        inputs = {name: part.to(device) for name, part in parts.items()}
        answer = model(**inputs, num_context=context, return_dict=False)[0]
        return inertial_loss(answer[:, context:], target, args.inertia_weight)

    held_out = data.segments["test"] or data.segments["train"]
    recording = max(held_out, key=lambda part: len(part.frames))

    def validate(step: int) -> tuple[dict[str, float], Image.Image]:
        return validated(args, network, recording, data.frame_names)

    # what cannot be measured shall not be found out at the end
    measured(recording.frames[None, : args.num_validation_frames], recording, args.validation_ladders)
    trainer.fit(make_batches, loss_of, validate)
    metrics = trainer.validate(validate)

    def write(folder: Path) -> None:
        save_pipeline(network, saved, folder, args.export_dtype)
        write_model_card(folder, args, trainer, data, metrics)

    finish_run(trainer, write)


def normalised(part: Segment, network: RollingTransformer1DModel) -> Segment:
    """A segment as the network sees it."""
    frames, condition = (ChannelUnits.of(network.config, name) for name in ("frame", "condition"))
    return Segment(frames.inward(part.frames), None if part.condition is None else condition.inward(part.condition))


def validated(
    args: argparse.Namespace, network: RollingTransformer1DModel, recording: Segment, names: list[str]
) -> tuple[dict[str, float], Image.Image]:
    """Streams a held-out recording with each ladder, one evaluation a roll; measures, and a picture of the last."""
    length = min(len(recording.frames), args.num_validation_frames)
    truth, condition = recording.frames[:length], recording.condition
    metrics: dict[str, float] = {}
    for ladder, scheduler in make_schedulers(args, args.validation_ladders).items():
        pipeline = RollingLadderPipeline(network, scheduler)
        pipeline.set_progress_bar_config(disable=True)
        frames = pipeline(
            None if condition is None else condition[None, :length].expand(args.num_validation_samples, -1, -1),
            num_frames=length,
            num_inference_steps=args.window_length // ladder,
            batch_size=args.num_validation_samples,
            generator=stream(args.seed, 0, "validation-samples"),
            lookahead=args.lookahead[0] if args.lookahead and condition is not None else None,
        ).frames.cpu()
        metrics |= measured(frames, recording, [ladder])
    lines = [("recording", "#999999", truth), (f"streamed, ladder of {ladder}", "#c0392b", frames[0])]
    shown = [(name, colour, line[:SHOWN_FRAMES]) for name, colour, line in lines]
    return metrics, line_panels(names[:SHOWN_CHANNELS], shown)


def measured(frames: torch.Tensor, recording: Segment, ladders: list[int]) -> dict[str, float]:
    """Figures of samples `(samples, frames, channels)` of the beginning of a recording, under each ladder's name.

    Raises:
        ValueError: If the recording is too short or at rest there.
    """
    truth, metrics = recording.frames[: frames.shape[1]], {}
    try:
        for ladder in ladders:
            if recording.condition is not None:
                metrics[f"r2_of_mean_{ladder}"] = r_squared(frames.mean(0), truth)
                metrics[f"r2_{ladder}"] = r_squared(frames, truth)
            metrics[f"jitter_{ladder}"] = jitter_ratio(frames, truth)
            if ladder > 1:
                metrics[f"seam_{ladder}"] = seam_ratio(frames, ladder)
    except ValueError as error:
        raise ValueError(
            f"the first {len(truth)} test rows cannot be measured: {error}; give other rows, or more with --num_validation_frames"
        ) from error
    return metrics


def save_pipeline(
    network: RollingTransformer1DModel, scheduler: RollingLadderScheduler, folder: Path, dtype: str
) -> None:
    """Writes the pipeline; half precision from a copy, because the network itself may still be trained."""
    if dtype == "fp16":
        half = RollingTransformer1DModel.from_config(network.config)
        half.load_state_dict(network.state_dict())
        network = half.half()
    RollingLadderPipeline(network, scheduler).save_pretrained(folder)


def write_model_card(
    folder: Path, args: argparse.Namespace, trainer: Trainer, data: SequenceFolder, metrics: dict[str, float]
) -> None:
    columns = {"R2 of the mean": "r2_of_mean", "R2": "r2", "jitter": "jitter", "seam": "seam"}
    lines = [f"| ladder | {' | '.join(columns)} |", "| --- " * (len(columns) + 1) + "|"]
    for ladder in args.validation_ladders:
        values = (metrics.get(f"{key}_{ladder}") for key in columns.values())
        lines.append(f"| {ladder} | {' | '.join('-' if value is None else f'{value:.3f}' for value in values)} |")
    names = f"{', '.join(data.frame_names)} from {', '.join(data.condition_names) or 'nothing'}"
    call = "condition" if data.condition_names else "num_frames=100"
    if args.lookahead and data.condition_names:
        call += f", lookahead={args.lookahead[0]}"
    description = (
        f"A rolling diffusion model that streams {names}, frame by frame, in windows of {args.window_length} frames after "
        f"{args.context_length} of context. Trained with `training/train_rolling.py` on "
        f"{trainer.step * trainer.global_batch_size:,} windows.\n\n![samples](samples.png)\n\n"
        f"Held-out rows, {args.num_validation_samples} samples, one evaluation a roll:\n\n" + "\n".join(lines) + "\n\n"
        f"```python\nfrom diffusers_ext import RollingLadderPipeline\n\n"
        f'pipe = RollingLadderPipeline.from_pretrained("{args.hub_model_id or Path(args.output_dir).name}")\n'
        f"for frames in pipe.stream({call}):\n    print(frames)\n```"
    )
    tags = ["diffusers", "diffusers-ext", "rolling-diffusion", "time-series"]
    write_card(folder, Path(args.output_dir).name, description, args, tags)


if __name__ == "__main__":
    main(parse_args())
