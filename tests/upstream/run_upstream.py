"""Runs the test suites of diffusers, from a checkout of its repository, against our classes.

    git clone --depth 1 https://github.com/huggingface/diffusers
    pip install parameterized requests requests-mock torchsde
    python tests/upstream/run_upstream.py --checkout diffusers

`make upstream CHECKOUT=diffusers` does the same. The suites come from the checkout, the library under them is the
installed one, so take a checkout of about the same version. Arguments after `--` go to pytest, such as `-- -k scheduler`.

The suites are not part of the installed package and not copied here; what they check that we hold to be essential is
written anew in `tests/conformance/`. This is the alarm for what changes there.
"""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path


TESTS = Path(__file__).resolve().parents[1]
NEEDED_FILES = ("tests/schedulers/test_schedulers.py", "tests/pipelines/testing_utils/common.py")
NEEDED_MODULES = ("parameterized", "requests", "requests_mock", "torchsde")


def problem(checkout: Path) -> str | None:
    """Why the suites cannot be run, in one sentence; `None` if they can."""
    missing = [name for name in NEEDED_FILES if not (checkout / name).is_file()]
    if missing:
        return f"--checkout {checkout} is not a checkout of diffusers: it has no {missing[0]}"
    absent = [name for name in NEEDED_MODULES if importlib.util.find_spec(name) is None]
    if absent:
        return f"the suites need {', '.join(absent)}; run pip install {' '.join(absent).replace('_', '-')}"
    return None


def run(checkout: Path, pytest_arguments: Sequence[str] = ()) -> int:
    """Runs the suites in a process of their own and gives the exit status of pytest."""
    # The checkout comes first, so that `tests` is its package and not ours.
    paths = [checkout, TESTS / "conformance", TESTS / "helpers", TESTS.parent]
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*map(str, paths), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "HF_HUB_OFFLINE": "1",
    }
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(TESTS / "upstream" / "subjects.py", Path(folder) / "test_subjects.py")
        (Path(folder) / "pytest.ini").write_text("[pytest]\n")
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-rfEs",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:warnings",
            *pytest_arguments,
            ".",
        ]
        return subprocess.run(command, cwd=folder, env=variables).returncode


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; exit status 2 if the suites cannot be run, else that of pytest."""
    parser = argparse.ArgumentParser(description="Runs diffusers' own test suites against our classes.")
    parser.add_argument("--checkout", type=Path, required=True, help="folder of a checkout of diffusers")
    parser.add_argument("pytest_arguments", nargs="*", help="passed to pytest, after --")
    options = parser.parse_args(arguments)
    checkout = options.checkout.resolve()
    if reason := problem(checkout):
        print(reason, file=sys.stderr)
        return 2
    return run(checkout, options.pytest_arguments)


if __name__ == "__main__":
    sys.exit(main())
