"""`diffusers-ext restore`: a degraded picture restored."""

import argparse
import time
from typing import Any

from ..imaging import open_image
from ..reports import save_image, versions
from .common import common_options, output_paths, picture_options, quieten, stem_of, write_report


def restore(options: argparse.Namespace) -> None:
    """Runs `diffusers-ext restore`: one degraded picture, restored at its own size."""
    image = open_image(options.picture)
    (output,) = output_paths(options.output, options.picture, "restored", 1)

    quieten(options.debug)
    import torch

    from .. import MRRestorationPipeline
    from ..hub import RESTORATION_MODEL_NAME, load_pipeline, resolve_model

    model = resolve_model(options.model, RESTORATION_MODEL_NAME)
    pipe = load_pipeline(MRRestorationPipeline, model, revision=options.revision, device=options.device)
    pipe.set_progress_bar_config(disable=True if options.json else None)
    start = time.perf_counter()
    result: Any = pipe(
        image,
        num_inference_steps=options.steps,
        strength=options.strength,
        noise_scale=options.noise_scale,
        generator=torch.Generator().manual_seed(options.seed),
    )
    seconds = time.perf_counter() - start
    save_image(result.images[0], output)
    report = {
        "picture": str(options.picture),
        "picture_size": list(image.size),
        "outputs": [str(output)],
        "model": model,
        "revision": options.revision,
        "num_inference_steps": options.steps,
        "strength": options.strength,
        "noise_scale": options.noise_scale,
        "seed": options.seed,
        "device": str(pipe.device),
        "seconds": round(seconds, 3),
        "network_evaluations": result.network_evaluations,
        "versions": versions(),
    }
    write_report(report, stem_of(options.output, options.picture, "restored"), {output: "restored"}, options.json)


def add(commands: Any) -> None:
    """Adds `diffusers-ext restore` to the commands of the parser."""
    restores = commands.add_parser(
        "restore",
        help="restore a degraded picture",
        description="Restores a picture (blur, noise, rain, scratches, darkness, JPEG) at its own size by "
        "mean-reverting diffusion. Beside the result a JSON file keeps every setting.",
        allow_abbrev=False,
    )
    picture_options(restores, "restored")
    restores.add_argument("--seed", type=int, default=0, help="of the noise it starts from (default: %(default)s)")
    restores.add_argument(
        "--strength",
        type=float,
        default=1.0,
        metavar="F",
        help="share of the process that is run; less keeps more of the picture (default: %(default)s)",
    )
    restores.add_argument(
        "--noise-scale",
        type=float,
        default=0.0,
        metavar="F",
        help="size of the start noise, from 0, smooth and without chance, to 1, a sample with fine texture (default: "
        "%(default)s)",
    )
    common_options(restores, steps=5, what="network evaluations", model="the restoration model")
    restores.set_defaults(run=restore)
