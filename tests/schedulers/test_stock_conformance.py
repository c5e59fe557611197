"""The conformance suite on schedulers of diffusers: what they pass, and what they honestly do not."""

from pathlib import Path

import pytest
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

from tests.conformance.schedulers import DONOR_CONFIG, SchedulerConformance


class TestDDIMScheduler(SchedulerConformance):
    scheduler_class = DDIMScheduler
    config = {**DONOR_CONFIG, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    known_failures = {
        "test_timesteps_may_be_int_float_or_tensor": "it indexes a tensor with the timestep, so 901.0 is an IndexError",
        "test_a_step_leads_to_the_next_entry_of_timesteps": "it takes timestep - 1000 // n for the next (issue 12633)",
    }

    @pytest.mark.slow  # the Euler class below shows it in every run
    def test_a_fresh_process_loads_it(self, tmp_path: Path) -> None:
        super().test_a_fresh_process_loads_it(tmp_path)


class TestEulerDiscreteScheduler(SchedulerConformance):
    scheduler_class = EulerDiscreteScheduler
    config = {**DONOR_CONFIG, "timestep_spacing": "leading", "steps_offset": 1}
    known_failures = {
        "test_timesteps_may_be_int_float_or_tensor": "it refuses whole numbers, lest they be loop counters"
    }


class TestDPMSolverMultistepScheduler(SchedulerConformance):
    scheduler_class = DPMSolverMultistepScheduler
    config = {**DONOR_CONFIG, "solver_order": 2, "use_karras_sigmas": False}

    @pytest.mark.slow  # the Euler class above shows it in every run
    def test_a_fresh_process_loads_it(self, tmp_path: Path) -> None:
        super().test_a_fresh_process_loads_it(tmp_path)
