"""The command `diffusers-ext`: edits a picture by words, restores a degraded one, steers a flow model to one, draws the
demo sheets, or publishes.

What a user can do wrong ends in one sentence on standard error and exit code 2; `--debug` shows where it came from.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from . import __version__
from .imaging import FORMATS, fit_square, open_image
from .reports import check_image_suffix, save_image, versions, write_json


# Names of `diffusers_ext.guidance.PRESETS`, here too so that `--help` does not have to import torch.
PRESETS = ("edit", "stylize")
# The names of `diffusers_ext.inversion.INVERSIONS` as words of a command line, after the method with a pipeline of its own.
METHODS = (
    "guide-and-rescale", "direct", "null-text", "negative-prompt", "edit-friendly", "bdia", "fixed-point", "ddim",
)  # fmt: skip
# Names of `diffusers_ext.steering_tasks.TASKS`.
TASKS = ("inpaint", "edit", "upscale", "deblur")
TASK_OPTIONS = {
    "inpaint": (), "edit": ("source", "source_stop"), "upscale": ("factor", "noise_std"), "deblur": ("blur", "noise_std"),
}  # fmt: skip
# Options of `edit` that say nothing to prompt-to-prompt on an inverted picture.
ONLY_GUIDED = ("preset", "rescale_range", "guidance_end", "alignment")


class _Parser(argparse.ArgumentParser):
    """One sentence for a wrong call; argparse would print the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        arguments (`Sequence[str]`, *optional*): The words after the command's name; those of the process by default.

    Returns:
        `int`: 0 if all is well, 2 if the user can cure what is wrong, 1 for anything else, 130 after an interrupt.
    """
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except KeyboardInterrupt:
        print("diffusers-ext: interrupted; nothing more was written", file=sys.stderr)
        return 130
    except (OSError, ValueError, TypeError) as error:
        if options.debug:
            raise
        print(f"diffusers-ext: {_sentence(error)}", file=sys.stderr)
        return 2
    except Exception as error:
        if options.debug:
            raise
        if "out of memory" in str(error):
            print("diffusers-ext: the device ran out of memory; use a smaller model or --device cpu", file=sys.stderr)
            return 2
        kind = type(error).__name__
        print(f"diffusers-ext: unexpected {kind}: {_sentence(error)}; --debug shows the trace", file=sys.stderr)
        return 1
    return 0


def edit(options: argparse.Namespace) -> None:
    """Runs `diffusers-ext edit`: one picture, one or more prompts, one inversion."""
    image = open_image(options.picture)
    outputs = _output_paths(options.output, options.picture, "edited", len(options.prompt))

    guided = options.method == METHODS[0]
    for name in () if guided else ONLY_GUIDED:
        if getattr(options, name) is not None:
            raise ValueError(
                f"--{name.replace('_', '-')} has no effect with --method {options.method}; leave it out, or use "
                f"--method {METHODS[0]}"
            )

    _quieten(options.debug)
    from . import GuideAndRescalePipeline, NullTextInversionPipeline
    from .hub import load_pipeline, native_size, resolve_model

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
    _report(report, _stem(options.output, options.picture, "edited"), dict(zip(outputs, options.prompt)), options.json)


def _guided_settings(options: argparse.Namespace) -> dict[str, Any]:
    from .guidance import PRESETS as SETTINGS

    preset = SETTINGS[options.preset or "edit"]
    return {
        "preset": options.preset or "edit",
        "rescale_range": tuple(options.rescale_range or preset.rescale_range),
        "guidance_end": preset.guidance_end if options.guidance_end is None else options.guidance_end,
        "alignment": options.alignment or "matched",
    }


def _inverted_settings(options: argparse.Namespace) -> dict[str, Any]:
    method = options.method.replace("-", "_")
    # With attention from the source the authors skip 12 of 100.
    return {"inversion_method": method, "skip": round(0.12 * options.steps) if method == "edit_friendly" else 0}


def _beside_inversion(pipe: Any, prompts: Sequence[str]) -> dict[str, Any]:
    """A controller of attention, and where noise comes from if the method draws any."""
    import torch

    from .attention import controller_for

    return {"controller": controller_for(pipe.tokenizer, prompts), "generator": torch.Generator().manual_seed(0)}


def restore(options: argparse.Namespace) -> None:
    """Runs `diffusers-ext restore`: one degraded picture, restored at its own size."""
    image = open_image(options.picture)
    (output,) = _output_paths(options.output, options.picture, "restored", 1)

    _quieten(options.debug)
    import torch

    from . import MRRestorationPipeline
    from .hub import RESTORATION_MODEL_NAME, load_pipeline, resolve_model

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
    _report(report, _stem(options.output, options.picture, "restored"), {output: "restored"}, options.json)


def steer(options: argparse.Namespace) -> None:
    """Runs `diffusers-ext steer`: one picture, sampled anew with a flow model that is steered to it."""
    image = open_image(options.picture)
    mask = open_image(options.mask) if options.mask else None
    (output,) = _output_paths(options.output, options.picture, "steered", 1)

    _quieten(options.debug)
    import torch

    from . import FlowChefPipeline
    from .hub import FLOW_MODEL_NAME, load_pipeline, native_size, resolve_model
    from .steering_tasks import EDIT_GUIDANCE_SCALE, GUIDANCE_SCALE, task_arguments

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
    _report(report, _stem(options.output, options.picture, "steered"), {output: options.prompt}, options.json)


def demo(options: argparse.Namespace) -> None:
    """Runs `diffusers-ext demo`: edits, and unless another model was named, restorations and steered samples."""
    _quieten(options.debug)
    from .demo import run_demo
    from .demo_restoration import run_restoration_demo
    from .demo_steering import run_steering_demo

    reports = [run_demo(options.output, model=options.model, steps=options.steps, device=options.device)]
    if options.model is None:
        reports.append(run_restoration_demo(options.output, device=options.device))
        reports.append(run_steering_demo(options.output, device=options.device))
    for report in reports:
        print(f"{report['sheet']}  {report['seconds']:.0f} s, {report['network_evaluations']} network evaluations")


def publish(options: argparse.Namespace) -> None:
    """Runs `diffusers-ext publish`: a folder becomes a Hub repository, or with `--dry-run` is only checked."""
    _quieten(options.debug)
    from .publishable import check_publishable
    from .publishing import check_repo_id, publish

    check_repo_id(options.repo_id)
    checked = check_publishable(options.folder, space=options.space)
    for remark in checked.remarks:
        print(f"remark: {remark}", file=sys.stderr)
    if options.dry_run:
        for name, size in checked.sizes.items():
            print(f"{size:>14,}  {name}")
        print(f"{checked.total:>14,}  bytes as {checked.kind} {options.repo_id}; nothing was sent")
        return
    done = publish(checked.folder, options.repo_id, space=options.space, private=options.private, prune=options.prune)
    print(f"{done.url}  {'published' if done.changed else 'unchanged'} at {done.commit}")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="diffusers-ext", description="Methods for diffusers, from the command line.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"diffusers-ext {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")

    edits = commands.add_parser(
        "edit",
        help="edit a picture by words",
        description="Edits a picture by words, with Guide-and-Rescale or with prompt-to-prompt on an inverted picture. The "
        "largest centred square of the picture is scaled to the size the model was trained on. Beside the result a JSON file "
        "keeps every setting.",
        allow_abbrev=False,
    )
    _picture(edits, "edited")
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
    _common(edits, steps=50, what="steps of inversion and of sampling")
    edits.set_defaults(run=edit)

    restores = commands.add_parser(
        "restore",
        help="restore a degraded picture",
        description="Restores a picture (blur, noise, rain, scratches, darkness, JPEG) at its own size by mean-reverting "
        "diffusion. Beside the result a JSON file keeps every setting.",
        allow_abbrev=False,
    )
    _picture(restores, "restored")
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
        help="size of the start noise, from 0, smooth and without chance, to 1, a sample with fine texture (default: %(default)s)",
    )
    _common(restores, steps=5, what="network evaluations", model="the restoration model")
    restores.set_defaults(run=restore)

    steers = commands.add_parser(
        "steer",
        help="inpaint, edit, enlarge or sharpen with a flow model",
        description="Samples a picture with a flow model that is steered to the picture given. Its largest centred square is scaled "
        "to the size the model was trained on, for upscale to that size divided by the factor. Beside the result a JSON file keeps "
        "every setting.",
        allow_abbrev=False,
    )
    _picture(steers, "steered")
    steers.add_argument(
        "--task", choices=TASKS, required=True,
        help="inpaint: paint the white part of the mask; edit: the same, led from --source to --prompt; upscale and deblur: the "
        "picture is a small or a blurred one",
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
        help="noise of the picture, whose values are from -1 to 1; rather too large than too small (default: %(default)s)",
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
    _common(steers, steps=30, what="steps of sampling", model="the demo flow model")
    steers.set_defaults(run=steer)

    shows = commands.add_parser(
        "demo",
        help="draw the demo sheets",
        description="Edits, restores and steers a few pictures with the models of this project and lays them out as sheets.",
        allow_abbrev=False,
    )
    shows.add_argument("--output", type=Path, default=Path("demo"), metavar="FOLDER", help="default: %(default)s")
    _common(shows, steps=40, what="steps of inversion and of sampling")
    shows.set_defaults(run=demo)

    publishes = commands.add_parser(
        "publish",
        help="put a folder on the Hub",
        description="Checks a folder (card, licence, model_index.json, safetensors, sizes, stray files), creates the Hub "
        "repository if there is none, and makes it hold exactly these files, in one commit. It may be run again at any time.",
        allow_abbrev=False,
    )
    publishes.add_argument("folder", metavar="FOLDER", type=Path, help="such as pipelines/emoji-scenes-64")
    publishes.add_argument("--repo-id", required=True, metavar="OWNER/NAME", help="the repository")
    publishes.add_argument("--space", action="store_true", help="it is a Gradio Space")
    publishes.add_argument("--private", action="store_true", help="make it private if it is created")
    publishes.add_argument("--prune", action="store_true", help="remove files of the repository that FOLDER lacks")
    publishes.add_argument("--dry-run", action="store_true", help="only check, and list what would be sent")
    publishes.add_argument("--debug", action="store_true", help="show the trace of an error")
    publishes.set_defaults(run=publish)
    return parser


def _picture(parser: argparse.ArgumentParser, becomes: str) -> None:
    parser.add_argument("picture", metavar="PICTURE", type=Path, help=f"a picture file ({', '.join(FORMATS)})")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help=f"where to write (default: <picture>-{becomes}.png)"
    )
    parser.add_argument("--json", action="store_true", help="also print the settings as JSON, and nothing else")
    parser.add_argument("--revision", metavar="SHA", help="branch, tag or commit of a Hub model")


def _common(parser: argparse.ArgumentParser, steps: int, what: str, model: str = "the demo model") -> None:
    parser.add_argument("--model", metavar="PATH_OR_ID", help=f"folder or Hub id (default: {model})")
    parser.add_argument("--steps", type=int, default=steps, help=f"{what} (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best one present)")
    parser.add_argument("--debug", action="store_true", help="show the trace of an error and the libraries' warnings")


def _report(report: dict[str, Any], stem: Path, written: dict[Path, str], as_json: bool) -> None:
    """Writes the settings beside the pictures, and says what was written."""
    settings_path = stem.with_name(f"{stem.name}.json")
    write_json(report, settings_path)
    if as_json:
        print(json.dumps(report, indent=2))
        return
    for path, words in written.items():
        print(f"{path}  {words}")
    print(f"{settings_path}  {report['seconds']:.1f} s, {report['network_evaluations']} network evaluations")


def _stem(output: Path | None, picture: Path, becomes: str) -> Path:
    return output.with_suffix("") if output else Path(f"{picture.stem}-{becomes}")


def _output_paths(output: Path | None, picture: Path, becomes: str, count: int) -> list[Path]:
    """Found wrong now, a name costs nothing; found wrong after the work, it costs the work."""
    if output:
        check_image_suffix(output, "--output")
    suffix = output.suffix if output else ".png"
    stem = _stem(output, picture, becomes)
    names = [""] if count == 1 else [f"-{i}" for i in range(1, count + 1)]
    paths = [stem.with_name(f"{stem.name}{name}{suffix}") for name in names]
    for path in paths:
        if path.is_dir():
            raise ValueError(f"--output={str(path)!r} is a folder; name a file")
        if path.exists() and path.samefile(picture):
            raise ValueError(f"--output={str(path)!r} is the picture itself; give another name")
    stem.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(stem.parent, os.W_OK):
        raise ValueError(f"--output={str(paths[0])!r} cannot be written: the folder is not open to you")
    return paths


def _quieten(debug: bool) -> None:
    """The libraries' hints are for programmers; on a terminal they would bury the one sentence that matters.

    Some are printed on import, so this comes before ours of the pipelines.
    """
    if debug:
        return
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def _sentence(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
