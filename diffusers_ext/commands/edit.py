"""`diffusers-ext edit`: a picture edited by words."""

import argparse
import time
from collections.abc import Sequence
from typing import Any

from ..imaging import fit_square, open_image
from ..reports import save_image, versions
from .common import common_options, output_paths, picture_options, quieten, stem_of, write_report


# Names of `diffusers_ext.guidance.PRESETS`, here too so that `--help` does not have to import torch.
PRESETS = ("edit", "stylize")
# The names of `diffusers_ext.inversion.INVERSIONS` as words of a command line, after the method with a pipeline of its
# own.
METHODS = (
    "guide-and-rescale", "direct", "null-text", "negative-prompt", "edit-friendly", "bdia", "fixed-point", "ddim",
)  # fmt: skip
# Options of `edit` that say nothing to prompt-to-prompt on an inverted picture.
ONLY_GUIDED = ("preset", "rescale_range", "guidance_end", "alignment")


def edit(options: argparse.Namespace) -> None:
    """Runs `diffusers-ext edit`: one picture, one or more prompts, one inversion."""
    image = open_image(options.picture)
    outputs = output_paths(options.output, options.picture, "edited", len(options.prompt))

    guided = options.method == METHODS[0]
    for name in () if guided else ONLY_GUIDED:
        if getattr(options, name) is not None:
            raise ValueError(
                f"--{name.replace('_', '-')} has no effect with --method {options.method}; leave it out, or use "
                f"--method {METHODS[0]}"
            )

    quieten(options.debug)
    from .. import GuideAndRescalePipeline, NullTextInversionPipeline
    from ..hub import load_pipeline, native_size, resolve_model

    model = resolve_model(options.model)
    kind: Any = GuideAndRescalePipeline if guided else NullTextInversionPipeline
    pipe = load_pipeline(kind, model, revision=options.revision, device=options.device)
    # None lets tqdm decide: a bar on a terminal, nothing in a log.
    pipe.set_progress_bar_config(disable=True if options.json else None)
    size = native_size(pipe)
    settings: dict[str, Any] = {
        "source_prompt": options.source,
        "prompt": options.prompt,
        "num_inference_steps": options.steps,
        "guidance_scale": options.guidance_scale,
    }
    settings |= _guided_settings(options) if guided else _inverted_settings(options)

    start = time.perf_counter()
    beside = {} if guided else _beside_inversion(pipe, [options.source, *options.prompt])
    result: Any = pipe(image=fit_square(image, size), **settings, **beside)
    seconds = time.perf_counter() - start
    for picture, path in zip(result.images, outputs, strict=True):
        save_image(picture, path)
    report = {
        "picture": str(options.picture),
        "picture_size": list(image.size),
        "edited_size": [size, size],
        "outputs": [str(path) for path in outputs],
        "model": model,
        "revision": options.revision,
        "method": options.method,
        **settings,
        **({} if guided else {"controller": type(beside["controller"]).__name__, "seed": 0}),
        "device": str(pipe.device),
        "seconds": round(seconds, 3),
        "network_evaluations": result.network_evaluations,
        "versions": versions(),
    }
    write_report(
        report, stem_of(options.output, options.picture, "edited"), dict(zip(outputs, options.prompt)), options.json
    )


def _guided_settings(options: argparse.Namespace) -> dict[str, Any]:
    from ..guidance import PRESETS as SETTINGS

    preset = SETTINGS[options.preset or "edit"]
    return {
        "preset": options.preset or "edit",
        "rescale_range": tuple(options.rescale_range or preset.rescale_range),
        "guidance_end": preset.guidance_end if options.guidance_end is None else options.guidance_end,
        "alignment": options.alignment or "matched",
    }


def _inverted_settings(options: argparse.Namespace) -> dict[str, Any]:
    from ..batching.capabilities import inversion_settings

    return inversion_settings(options.method, options.steps)


def _beside_inversion(pipe: Any, prompts: Sequence[str]) -> dict[str, Any]:
    """A controller of attention, and where noise comes from if the method draws any."""
    import torch

    from ..attention import controller_for

    return {"controller": controller_for(pipe.tokenizer, prompts), "generator": torch.Generator().manual_seed(0)}


def add(commands: Any) -> None:
    """Adds `diffusers-ext edit` to the commands of the parser."""
    edits = commands.add_parser(
        "edit",
        help="edit a picture by words",
        description="Edits a picture by words, with Guide-and-Rescale or with prompt-to-prompt on an inverted "
        "picture. The largest centred square of the picture is scaled to the size the model was trained on. Beside "
        "the result a JSON file keeps every setting.",
        allow_abbrev=False,
    )
    picture_options(edits, "edited")
    edits.add_argument("--source", required=True, metavar="TEXT", help="what the picture shows")
    edits.add_argument(
        "--prompt",
        required=True,
        action="append",
        metavar="TEXT",
        help="what it shall show; given several times, several pictures are made from one inversion",
    )
    edits.add_argument(
        "--method",
        choices=METHODS,
        default=METHODS[0],
        help="guide-and-rescale, or the inversion under prompt-to-prompt, of which direct is the one to begin with "
        "(default: %(default)s)",
    )
    edits.add_argument(
        "--preset",
        choices=PRESETS,
        help="edit: change what the prompt says, keep the rest; stylize: repaint all, keep the layout (default: edit)",
    )
    edits.add_argument(
        "--guidance-scale", type=float, default=7.5, metavar="W", help="pull towards the prompt (default: %(default)s)"
    )
    edits.add_argument(
        "--rescale-range",
        type=float,
        nargs=2,
        metavar=("LO", "HI"),
        help="bounds of the norm of what keeps the picture, relative to the pull (edit: 0.33 3.0, stylize: 1.5 1.5)",
    )
    edits.add_argument(
        "--guidance-end",
        type=float,
        metavar="F",
        help="share of the steps that keep the picture (edit: 0.6, stylize: 0.5)",
    )
    edits.add_argument(
        "--alignment",
        choices=("matched", "official"),
        help="inversion that retraces sampling, or that of the authors' code (default: matched)",
    )
    common_options(edits, steps=50, what="steps of inversion and of sampling")
    edits.set_defaults(run=edit)
