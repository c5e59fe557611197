"""`make upstream CHECKOUT=path`: the suites of diffusers against our classes, and what the runner says to wrong calls."""

import os
from pathlib import Path

import pytest

from . import run_upstream


@pytest.mark.upstream
@pytest.mark.timeout(3600)
def test_the_suites_of_diffusers_pass_on_our_classes() -> None:
    if "DIFFUSERS_CHECKOUT" not in os.environ:
        pytest.skip("DIFFUSERS_CHECKOUT does not name a checkout of diffusers")
    assert run_upstream.main(["--checkout", os.environ["DIFFUSERS_CHECKOUT"]]) == 0


def test_a_folder_that_is_no_checkout_is_refused_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_upstream.main(["--checkout", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert str(tmp_path) in message and "tests/schedulers/test_schedulers.py" in message


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in run_upstream.NEEDED_FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(run_upstream, "NEEDED_MODULES", ("torch", "no_such_module"))
    assert run_upstream.problem(tmp_path) == "the suites need no_such_module; run pip install no-such-module"
