"""The conformance suite on the schedulers of restoration models."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusers_ext.schedulers import MeanRevertingAdapter, MRScheduler, ResfusionScheduler
from tests.conformance.schedulers import SchedulerConformance
from tests.helpers.tiny_restoration import tiny_restoration


MEAN = 0.5 + 0.2 * torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(11))
OTHER_PROCESS = "the process is not given by betas, so there is no config of another class to convert"


class RestorationConformance(SchedulerConformance):
    """The suite, with a mean in every step and a restoration pipeline."""

    __test__ = False
    donor_classes = ()
    not_applicable = {
        "test_trained_betas_survive_a_round_trip": OTHER_PROCESS,
        "test_from_config_of_another_class_gives_the_same_schedule": OTHER_PROCESS,
    }

    def step(self, scheduler: Any, output: torch.Tensor, timestep: Any, sample: torch.Tensor, **kwargs: Any) -> Any:
        return super().step(scheduler, output, timestep, sample, mean=self.mean_for(sample), **kwargs)

    def noised(
        self, scheduler: Any, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        return scheduler.add_noise(clean, noise, timesteps, mean=self.mean_for(clean))

    @staticmethod
    def mean_for(sample: torch.Tensor) -> torch.Tensor:
        # the same for every sample, because the suite also runs samples of a batch alone
        return MEAN.expand_as(sample) if sample.shape[1:] == MEAN.shape[1:] else torch.full_like(sample, 0.5)

    def pipeline_with(self) -> tuple[Any, dict[str, Any]]:
        picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        steps = len(self.ready().timesteps) if self.scheduler_class is ResfusionScheduler else 4
        inputs = {"image": picture, "num_inference_steps": steps, "output_type": "np"}
        return tiny_restoration(self.build()), inputs

    @pytest.mark.slow  # the first class below shows it in every run
    def test_a_fresh_process_loads_it(self, tmp_path: Path) -> None:
        super().test_a_fresh_process_loads_it(tmp_path)


class TestMRScheduler(RestorationConformance):
    __test__ = True
    scheduler_class = MRScheduler
    config = {"sigma_inf": 0.3, "solver_order": 3}
    spacings = ("leading", "trailing", "linspace", "karras-n", "karras-t", "linear-lambda")

    def test_a_fresh_process_loads_it(self, tmp_path: Path) -> None:
        SchedulerConformance.test_a_fresh_process_loads_it(self, tmp_path)


class TestMRSchedulerOnNoise(RestorationConformance):
    __test__ = True
    scheduler_class = MRScheduler
    config = {"algorithm_type": "ode-n", "theta_schedule": "linear", "num_train_timesteps": 60}


class TestMRSchedulerWithNoise(RestorationConformance):
    __test__ = True
    scheduler_class = MRScheduler
    config = {"algorithm_type": "sde-d", "timestep_spacing": "linear-lambda", "zero_start": False}
    deterministic = False

    def test_timesteps_may_be_int_float_or_tensor(self) -> None:
        pytest.skip("none of these timesteps but the first is a whole number; the classes above show it")


class TestPosteriorSampling(RestorationConformance):
    __test__ = True
    scheduler_class = MRScheduler
    config = {"algorithm_type": "posterior", "prediction_type": "sample"}
    deterministic = False


class TestEulerMaruyama(RestorationConformance):
    __test__ = True
    scheduler_class = MRScheduler
    config = {"algorithm_type": "euler-maruyama", "theta_schedule": "constant", "prediction_type": "epsilon"}
    deterministic = False


class AdapterConformance(RestorationConformance):
    __test__ = False
    scheduler_class = MeanRevertingAdapter

    def test_public_api_is_complete(self) -> None:
        # Only the last part of the name is different from what the suite asks of a scheduler.
        named = type(
            "MeanRevertingAdapterScheduler", (MeanRevertingAdapter,), {"__module__": MeanRevertingAdapter.__module__}
        )
        suite = type(self)()
        suite.scheduler_class = named
        SchedulerConformance.test_public_api_is_complete(suite)


class TestAdapterOfDPMSolver(AdapterConformance):
    __test__ = True
    config = {"scheduler_class": "DPMSolverMultistepScheduler", "scheduler_config": {"solver_order": 2}}


class TestAdapterOfUniPC(AdapterConformance):
    __test__ = True
    config = {"scheduler_class": "UniPCMultistepScheduler"}


class TestAdapterOfDDIM(AdapterConformance):
    __test__ = True
    config = {"scheduler_class": "DDIMScheduler"}
    known_failures = {
        "test_a_step_leads_to_the_next_entry_of_timesteps": "DDIM of diffusers computes the next timestep, in whole parts of T"
    }


class TestAdapterOfHeun(AdapterConformance):
    """Heun keeps its samples in another scale, which the adapter can only undo with the mean."""

    __test__ = True
    config = {"scheduler_class": "HeunDiscreteScheduler"}
    not_applicable = {
        "test_a_step_leads_to_the_next_entry_of_timesteps": "its timesteps come twice, and its samples are scaled"
    }

    def ready(self, scheduler: Any = None, steps: int | None = None) -> Any:
        scheduler = super().ready(scheduler, steps)
        scheduler.set_mean(self.mean_for(self.sample()))
        return scheduler

    def states(self, scheduler: Any, sample: torch.Tensor, timesteps: Any = None) -> Iterator[torch.Tensor]:
        for timestep in scheduler.timesteps if timesteps is None else timesteps:
            scaled = scheduler.scale_model_input(sample, timestep, self.mean_for(sample))
            sample = self.step(scheduler, self.model(scaled, timestep), timestep, sample).prev_sample
            yield sample


class TestResfusionScheduler(RestorationConformance):
    __test__ = True
    scheduler_class = ResfusionScheduler
    config = {"num_train_timesteps": 50}
    deterministic = False
    num_inference_steps = 19

    def ready(self, scheduler: Any = None, steps: int | None = None) -> Any:
        # the number of steps is that of the schedule
        scheduler = self.build() if scheduler is None else scheduler
        scheduler.set_timesteps()
        return scheduler


class TestResfusionSchedulerOnResiduals(TestResfusionScheduler):
    config = {"num_train_timesteps": 50, "prediction_type": "residual", "clip_sample": False}
