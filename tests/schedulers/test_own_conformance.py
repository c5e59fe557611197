"""The conformance suite on every scheduler of this package."""

from typing import Any

import pytest
import torch

from diffusers_ext.schedulers import (
    AdaptiveAdamsScheduler,
    BDIADDIMInverseScheduler,
    BDIADDIMScheduler,
    CTMScheduler,
    EVODiffScheduler,
    GHVBScheduler,
    HeavyBallDPMSolverMultistepScheduler,
    HeavyBallUniPCMultistepScheduler,
)
from tests.conformance.schedulers import DONOR_CONFIG, SchedulerConformance


class TestGHVBScheduler(SchedulerConformance):
    scheduler_class = GHVBScheduler
    config = {**DONOR_CONFIG, "solver_order": 3, "damping": 0.7, "use_karras_sigmas": False}


class WithoutProcess(SchedulerConformance):
    __test__ = False

    @pytest.mark.slow  # the class above shows it in every run
    def test_a_fresh_process_loads_it(self, tmp_path: Any) -> None:
        super().test_a_fresh_process_loads_it(tmp_path)


class TestGHVBSchedulerOnKarrasNodes(WithoutProcess):
    __test__ = True
    scheduler_class = GHVBScheduler
    config = {**DONOR_CONFIG, "momentum_type": "nesterov", "variable_step": True}


class TestHeavyBallDPMSolverMultistepScheduler(WithoutProcess):
    __test__ = True
    scheduler_class = HeavyBallDPMSolverMultistepScheduler
    config = {**DONOR_CONFIG, "damping": 0.7, "solver_order": 3}


class TestHeavyBallUniPCMultistepScheduler(WithoutProcess):
    __test__ = True
    scheduler_class = HeavyBallUniPCMultistepScheduler
    config = {**DONOR_CONFIG, "damping": 0.7}


class TestAdaptiveAdamsScheduler(WithoutProcess):
    __test__ = True
    scheduler_class = AdaptiveAdamsScheduler
    config = {**DONOR_CONFIG, "use_karras_sigmas": False}


class TestAdaptiveAdamsSchedulerWithOnePower(WithoutProcess):
    __test__ = True
    scheduler_class = AdaptiveAdamsScheduler
    config = {**DONOR_CONFIG, "basis_power": 0.5, "use_karras_sigmas": False, "use_lu_lambdas": True}


class TestEVODiffScheduler(WithoutProcess):
    __test__ = True
    scheduler_class = EVODiffScheduler
    config = {**DONOR_CONFIG, "per_channel_stats": False}
    not_applicable = {
        "test_a_step_leads_to_the_next_entry_of_timesteps": (
            "it follows a straight trajectory only where its weights are 1; levels are tested in test_evodiff.py"
        ),
    }


class TestBDIADDIMScheduler(WithoutProcess):
    __test__ = True
    scheduler_class = BDIADDIMScheduler
    config = {**DONOR_CONFIG, "gamma": 0.3, "set_alpha_to_one": False}


class TestCTMScheduler(WithoutProcess):
    __test__ = True
    scheduler_class = CTMScheduler
    config = {**DONOR_CONFIG, "final_sigmas_type": "sigma_min"}


class TestCTMSchedulerWithNoise(WithoutProcess):
    __test__ = True
    scheduler_class = CTMScheduler
    config = {**DONOR_CONFIG, "gamma": 0.4}
    deterministic = False


class TestBDIADDIMInverseScheduler(WithoutProcess):
    __test__ = True
    scheduler_class = BDIADDIMInverseScheduler
    config = {**DONOR_CONFIG, "gamma": 0.95, "set_alpha_to_one": False, "steps_offset": 1}
    num_inference_steps = 6
    not_applicable = {
        "test_public_api_is_complete": "timesteps ascend",
        "test_a_step_leads_to_the_next_entry_of_timesteps": "timesteps ascend",
        "test_a_pipeline_saves_and_loads_it": "it adds noise; no pipeline samples with it",
        "test_a_fresh_process_loads_it": "it adds noise; no pipeline samples with it",
    }

    def model(self, sample: torch.Tensor, timestep: Any) -> torch.Tensor:
        # Small: the way into the noise amplifies whatever the network says.
        return 0.05 * torch.sin(sample.float() + 0.001 * float(timestep)).to(sample.dtype)


@pytest.mark.parametrize(
    "cls", [GHVBScheduler, AdaptiveAdamsScheduler, BDIADDIMScheduler, CTMScheduler], ids=lambda cls: cls.__name__
)
def test_flow_levels_are_walked_in_order(cls: Any) -> None:
    # With the true velocity of a straight path every solver of the trajectory stays on it, and ends at the picture.
    scheduler = cls(prediction_type="flow_prediction", flow_shift=3.0)
    scheduler.set_timesteps(8)
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(2, 3, 8, 8, generator=generator) for _ in range(2))
    sample = noise
    for number, timestep in enumerate(scheduler.timesteps):
        torch.testing.assert_close(scheduler.scale_noise(clean, timestep, noise), sample, rtol=1e-3, atol=5e-3)
        sample = scheduler.step(noise - clean, timestep, sample).prev_sample
        assert scheduler.step_index == number + 1
    torch.testing.assert_close(sample, clean, rtol=1e-3, atol=1e-3)
