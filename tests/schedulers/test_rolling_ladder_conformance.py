"""The conformance suite on the rolling scheduler: with all frames at one level it is a scheduler like any other."""

from typing import Any

import pytest

from diffusers_ext.schedulers import RollingLadderScheduler
from tests.conformance.schedulers import DONOR_CONFIG, SchedulerConformance


# One rung, so that every number of steps is allowed.
ONE_RUNG = {**DONOR_CONFIG, "window_length": 3, "ladder_step": 3}


class RollingConformance(SchedulerConformance):
    __test__ = False
    scheduler_class = RollingLadderScheduler

    def pipeline_with(self) -> tuple[Any, dict[str, Any]]:
        pipeline, inputs = super().pipeline_with()
        config = pipeline.scheduler.config
        pipeline.scheduler = RollingLadderScheduler.from_config(config, window_length=1, ladder_step=1)
        return pipeline, inputs

    @pytest.mark.slow  # the class below shows it in every run
    def test_a_fresh_process_loads_it(self, tmp_path: Any) -> None:
        super().test_a_fresh_process_loads_it(tmp_path)


class TestSecondOrder(RollingConformance):
    __test__ = True
    config = ONE_RUNG

    def test_a_fresh_process_loads_it(self, tmp_path: Any) -> None:
        SchedulerConformance.test_a_fresh_process_loads_it(self, tmp_path)


class TestDDIM(RollingConformance):
    __test__ = True
    config = {**ONE_RUNG, "base": "ddim", "beta_end": 0.02}


class TestDDPM(RollingConformance):
    __test__ = True
    config = {**ONE_RUNG, "base": "ddpm"}
    deterministic = False
