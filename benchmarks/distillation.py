#!/usr/bin/env python
"""What distillation keeps: eight Gaussians, digits, the demo model and its students, and what a step costs in memory and time.

    python benchmarks/distillation.py                     # all parts, two hours on one core
    python benchmarks/distillation.py --parts demo page
    python benchmarks/distillation.py --parts digits page --keep runs/digits

toy: every method on eight Gaussians, three seeds. digits: classes and guidance on 8x8 pictures, three seeds. demo: the students in
`pipelines/` beside their teachers at equal and at more evaluations. memory and time: of a step of distillation. page: the tables of
docs/distillation.md.
"""

import argparse
from pathlib import Path

import distillation_cost
import distillation_demo
import distillation_digits
import distillation_page
import distillation_toy
import torch
from common import read_result, write_result


PARTS = ("toy", "digits", "demo", "memory", "time", "page")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument(
        "--methods", nargs="+", choices=distillation_toy.METHODS, default=distillation_toy.METHODS, help="of toy"
    )
    parser.add_argument(
        "--digits-methods",
        nargs="+",
        choices=distillation_digits.METHODS,
        default=distillation_digits.METHODS,
        help="of digits",
    )
    parser.add_argument(
        "--keep", type=Path, help="folder for the networks of digits, to go on from after an interruption"
    )
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = read_result("distillation")
    for part, measured in (
        ("toy", lambda: distillation_toy.run(result.get("toy", {}), options.methods)),
        (
            "digits",
            lambda: distillation_digits.run(result.get("digits", {}), options.digits_methods, folder=options.keep),
        ),
        ("demo", distillation_demo.run),
        ("memory", distillation_cost.memory),
        ("time", distillation_cost.time),
    ):
        if part in options.parts:
            result[part] = measured()
            write_result("distillation", result)
    if "page" in options.parts:
        distillation_page.write(result)


if __name__ == "__main__":
    main()
