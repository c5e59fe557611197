"""`diffusers-ext batch`: a folder of pictures or a list of jobs, on one process or many."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from .common import quieten
from .edit import METHODS


# Names of `diffusers_ext.batching.run.DTYPES`.
DTYPES = ("float32", "float16", "bfloat16")
SOME_FAILED = 3
WHAT = {
    "edit": "edit pictures by words; a job has file, source_prompt and prompt",
    "restore": "restore degraded pictures; a job has file",
    "steer": "inpaint, edit, enlarge or sharpen with a flow model; a job has file, task and prompt, and mask where "
    "the task needs one",
    "sample": "draw pictures from words with any text-to-image model; a job has name and prompt",
}
MODELS = {"restore": "the restoration model", "steer": "the demo flow model"}


def batch(options: argparse.Namespace) -> int:
    """Runs `diffusers-ext batch`: what is not done yet; 3 if some jobs failed."""
    settings = dict(_setting(text) for text in options.set)
    quieten(options.debug)
    import torch

    from ..batching import run_batch

    report = run_batch(
        options.capability,
        options.output,
        options.input,
        spec=options.spec,
        settings=settings,
        model=options.model,
        revision=options.revision,
        dtype=options.dtype,
        device=options.device,
        seed=options.seed,
        threads=options.threads,
        **({"method": options.method} if options.capability == "edit" else {}),
    )
    if report.is_main:
        print(f"{options.output}  {report.done} done, {report.skipped} were there, {len(report.failed)} failed")
        if report.failed:
            print(f"what failed is listed in {options.output / 'failures.jsonl'}", file=sys.stderr)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return SOME_FAILED if report.failed else 0


def add(commands: Any) -> None:
    """Adds `diffusers-ext batch` to the commands of the parser."""
    batches = commands.add_parser(
        "batch",
        help="do one of these with many pictures, on any number of processes",
        description="Edits, restores, steers or samples many pictures. Beside each output a JSON file keeps its "
        "settings; the same command again does only what is missing or has changed. Under `accelerate launch -m "
        "diffusers_ext.cli batch ...` the processes share the work, and give the same pictures as one.",
        allow_abbrev=False,
    )
    capabilities = batches.add_subparsers(required=True, metavar="CAPABILITY", dest="capability")
    for name, words in WHAT.items():
        _capability(capabilities, name, words)


def _capability(capabilities: Any, name: str, words: str) -> None:
    parser = capabilities.add_parser(
        name, help=words, description=f"{words[0].upper()}{words[1:]}.", allow_abbrev=False
    )
    pictures = name != "sample"
    if pictures:
        parser.add_argument("input", metavar="INPUT_FOLDER", type=Path, help="the pictures")
    parser.add_argument(
        "output", metavar="OUTPUT_FOLDER", type=Path, help="where to write: new, empty, or of an earlier run"
    )
    parser.add_argument(
        "--spec",
        type=Path,
        metavar="FILE",
        required=not pictures,
        help="the jobs, a JSON object a line: file (in the folder), name (of the output), seed, arguments of the "
        "pipeline" + (" (default: every picture of the folder)" if pictures else ""),
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an argument of the pipeline for all jobs that do not say otherwise, such as num_inference_steps=20; "
        "may be repeated",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="jobs without a seed draw theirs from this and their file (default: 0)"
    )
    if name == "edit":
        parser.add_argument("--method", choices=METHODS, default=METHODS[0], help="as for edit (default: %(default)s)")
    parser.add_argument(
        "--model", metavar="PATH_OR_ID", help=f"folder or Hub id (default: {MODELS.get(name, 'the demo model')})"
    )
    parser.add_argument("--revision", metavar="SHA", help="branch, tag or commit of a Hub model")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="precision (default: %(default)s)")
    parser.add_argument(
        "--device", help="cpu, cuda, cuda:1, mps (default: the best one present, one for each process)"
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        metavar="N",
        help="of each process on a CPU; another number may change the last bits of a picture (default: %(default)s)",
    )
    parser.add_argument("--debug", action="store_true", help="show the trace of an error and the libraries' warnings")
    parser.set_defaults(run=batch, **({} if pictures else {"input": None}))


def _setting(text: str) -> tuple[str, Any]:
    """`KEY=VALUE`, where the value is JSON if it can be read as that, and else the text itself."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ValueError(f"--set {text!r} is not KEY=VALUE, such as num_inference_steps=20")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value
