"""`diffusers-ext steer`: a sample of a flow model, steered to a picture."""

import argparse
import time
from pathlib import Path
from typing import Any

from ..imaging import open_image
from ..reports import save_image, versions
from .common import common_options, output_paths, picture_options, quieten, stem_of, write_report


# Names of `diffusers_ext.steering_tasks.TASKS`.
TASKS = ("inpaint", "edit", "upscale", "deblur")
TASK_OPTIONS = {
    "inpaint": (), "edit": ("source", "source_stop"),
    "upscale": ("factor", "noise_std"), "deblur": ("blur", "noise_std"),
}  # fmt: skip


def steer(options: argparse.Namespace) -> None:
    """Runs `diffusers-ext steer`: one picture, sampled anew with a flow model that is steered to it."""
    image = open_image(options.picture)
    mask = open_image(options.mask) if options.mask else None
    (output,) = output_paths(options.output, options.picture, "steered", 1)

    quieten(options.debug)
    import torch

    from .. import FlowChefPipeline
    from ..hub import FLOW_MODEL_NAME, load_pipeline, native_size, resolve_model
    from ..steering_tasks import EDIT_GUIDANCE_SCALE, GUIDANCE_SCALE, task_arguments

    model = resolve_model(options.model, FLOW_MODEL_NAME)
    pipe = load_pipeline(FlowChefPipeline, model, revision=options.revision, device=options.device)
    pipe.set_progress_bar_config(disable=True if options.json else None)
    size = native_size(pipe)
    task = {"source": options.source, "factor": options.factor, "blur": options.blur, "noise_std": options.noise_std,
            "source_stop": options.source_stop}  # fmt: skip
    arguments = task_arguments(options.task, image, size, mask=mask, **task)
    usual = EDIT_GUIDANCE_SCALE if options.task == "edit" else GUIDANCE_SCALE
    guidance_scale = usual if options.guidance_scale is None else options.guidance_scale
    settings = {
        "prompt": options.prompt,
        "num_inference_steps": options.steps,
        "guidance_scale": guidance_scale,
        "steering_kwargs": {"solver": options.solver},
    }
    start = time.perf_counter()
    result: Any = pipe(**arguments, **settings, generator=torch.Generator().manual_seed(options.seed))
    seconds = time.perf_counter() - start
    save_image(result.images[0], output)
    report = {
        "picture": str(options.picture),
        "picture_size": list(image.size),
        "mask": str(options.mask) if options.mask else None,
        "steered_size": [size, size],
        "outputs": [str(output)],
        "model": model,
        "revision": options.revision,
        "task": options.task,
        **{name: value for name, value in task.items() if name in TASK_OPTIONS[options.task]},
        **settings,
        "seed": options.seed,
        "device": str(pipe.device),
        "seconds": round(seconds, 3),
        "network_evaluations": options.steps * (2 if guidance_scale > 1 else 1),
        "versions": versions(),
    }
    write_report(report, stem_of(options.output, options.picture, "steered"), {output: options.prompt}, options.json)


def add(commands: Any) -> None:
    """Adds `diffusers-ext steer` to the commands of the parser."""
    steers = commands.add_parser(
        "steer",
        help="inpaint, edit, enlarge or sharpen with a flow model",
        description="Samples a picture with a flow model that is steered to the picture given. Its largest centred "
        "square is scaled to the size the model was trained on, for upscale to that size divided by the factor. "
        "Beside the result a JSON file keeps every setting.",
        allow_abbrev=False,
    )
    picture_options(steers, "steered")
    steers.add_argument(
        "--task", choices=TASKS, required=True,
        help="inpaint: paint the white part of the mask; edit: the same, led from --source to --prompt; upscale and "
        "deblur: the picture is a small or a blurred one",
    )  # fmt: skip
    steers.add_argument("--prompt", required=True, metavar="TEXT", help="what the result shows")
    steers.add_argument("--mask", type=Path, metavar="FILE", help="white where it is to be painted (inpaint, edit)")
    steers.add_argument("--source", metavar="TEXT", help="what the picture shows (edit)")
    steers.add_argument(
        "--source-stop", type=float, default=0.0, metavar="F",
        help="share of the steps that hold the whole picture (edit; default: %(default)s)",
    )  # fmt: skip
    steers.add_argument(
        "--factor", type=int, default=4, help="sides become so many times longer (upscale; default: %(default)s)"
    )
    steers.add_argument(
        "--blur",
        type=float,
        default=2.0,
        metavar="PIXELS",
        help="standard deviation of the blur (deblur; default: %(default)s)",
    )
    steers.add_argument(
        "--noise-std", type=float, default=0.05, metavar="S",
        help="noise of the picture, whose values are from -1 to 1; rather too large than too small (default: "
        "%(default)s)",
    )  # fmt: skip
    steers.add_argument(
        "--solver",
        choices=("flowchef", "flair"),
        default="flowchef",
        help="steer a sample, or optimise one (default: %(default)s)",
    )
    steers.add_argument(
        "--guidance-scale", type=float, metavar="W", help="pull towards the prompt (default: 3, or 1.5 to edit)"
    )
    steers.add_argument("--seed", type=int, default=0, help="of the noise it starts from (default: %(default)s)")
    common_options(steers, steps=30, what="steps of sampling", model="the demo flow model")
    steers.set_defaults(run=steer)
