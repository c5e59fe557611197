"""`diffusers-ext demo`: the sheets of pictures by the models of this project."""

import argparse
from pathlib import Path
from typing import Any

from .common import common_options, quieten


def demo(options: argparse.Namespace) -> None:
    """Runs `diffusers-ext demo`: edits, and unless another model was named, restorations, steered samples and a student's."""
    quieten(options.debug)
    from ..demos.distillation import run_distillation_demo
    from ..demos.editing import run_demo
    from ..demos.restoration import run_restoration_demo
    from ..demos.steering import run_steering_demo

    reports = [run_demo(options.output, model=options.model, steps=options.steps, device=options.device)]
    if options.model is None:
        reports.append(run_restoration_demo(options.output, device=options.device))
        reports.append(run_steering_demo(options.output, device=options.device))
        reports.append(run_distillation_demo(options.output, device=options.device))
    for report in reports:
        print(f"{report['sheet']}  {report['seconds']:.0f} s, {report['network_evaluations']} network evaluations")


def add(commands: Any) -> None:
    """Adds `diffusers-ext demo` to the commands of the parser."""
    shows = commands.add_parser(
        "demo",
        help="draw the demo sheets",
        description="Edits, restores, steers and samples a few pictures with the models of this project and lays them out "
        "as sheets.",
        allow_abbrev=False,
    )
    shows.add_argument("--output", type=Path, default=Path("demo"), metavar="FOLDER", help="default: %(default)s")
    common_options(shows, steps=40, what="steps of inversion and of sampling")
    shows.set_defaults(run=demo)
