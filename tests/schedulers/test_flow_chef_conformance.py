"""The conformance suite on the schedulers that steer flow models."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel

from diffusers_ext.schedulers import (
    FLAIRScheduler,
    FlowChefDPMSolverMultistepScheduler,
    FlowChefHeunScheduler,
    FlowChefLCMScheduler,
    FlowChefScheduler,
    FlowChefUniPCMultistepScheduler,
)
from tests.conformance.schedulers import SchedulerConformance
from tests.helpers.tiny_models import _text_config, tiny_tokenizer

from .tiny_flow_pipelines import WIDTH, call_of, tiny_sd3


NO_BETAS = "flow models have no betas"
UNSEEDED = "its noise is the global generator's, which a call of a pipeline does not seed"


def whole_sd3() -> StableDiffusion3Pipeline:
    """The tiny SD3 pipeline with all the parts that a saved one must have, though prompts are given as embeddings."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        readers = [CLIPTextModelWithProjection(_text_config()).eval() for _ in range(2)]
        longer = T5EncoderModel(
            T5Config(vocab_size=514, d_model=WIDTH, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
        ).eval()
    small = tiny_sd3()
    pipeline = StableDiffusion3Pipeline(
        transformer=small.transformer, scheduler=small.scheduler, vae=small.vae, text_encoder=readers[0],
        text_encoder_2=readers[1], text_encoder_3=longer, tokenizer=tiny_tokenizer(), tokenizer_2=tiny_tokenizer(),
        tokenizer_3=tiny_tokenizer(),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class FlowConformance(SchedulerConformance):
    """The suite where the model predicts a velocity, and samples need no scaling."""

    __test__ = False
    donor_classes = ()  # they are schedulers of diffusion models
    not_applicable = {"test_trained_betas_survive_a_round_trip": NO_BETAS}

    def pipeline_with(self) -> tuple[Any, dict[str, Any]]:
        pipeline = whole_sd3()
        pipeline.scheduler = self.scheduler_class.from_config(pipeline.scheduler.config)
        inputs = call_of(pipeline)
        inputs.pop("generator")
        return pipeline, inputs

    def states(self, scheduler: Any, sample: torch.Tensor, timesteps: Any = None) -> Iterator[torch.Tensor]:
        torch.manual_seed(7)  # some draw noise, and not all take a generator
        for timestep in scheduler.timesteps if timesteps is None else timesteps:
            sample = self.step(scheduler, self.model(sample, timestep), timestep, sample).prev_sample
            yield sample

    def first_step(self, scheduler: Any, sample: torch.Tensor, **kwargs: Any) -> Any:
        torch.manual_seed(7)
        timestep = scheduler.timesteps[0]
        return self.step(scheduler, self.model(sample, timestep), timestep, sample, **kwargs)

    def test_public_api_is_complete(self) -> None:
        cls, scheduler = self.scheduler_class, self.build()
        assert cls.__name__.endswith("Scheduler") and cls.config_name == "scheduler_config.json"
        for name in ("set_timesteps", "step", "set_begin_index", "set_objective", *self.ways_to_add_noise()):
            assert callable(getattr(scheduler, name, None)), f"the method {name} is missing"
        assert len(scheduler) == scheduler.config.num_train_timesteps
        self.ready(scheduler)
        order = scheduler.order
        assert len(scheduler.timesteps) == self.num_inference_steps * order - (order - 1)
        assert (scheduler.timesteps.diff() <= 0).all()

    def ways_to_add_noise(self) -> tuple[str, ...]:
        return ("scale_noise",)

    @pytest.mark.filterwarnings("ignore::FutureWarning")
    def test_half_precision_goes_in_and_comes_out(self) -> None:
        for dtype, tolerance in ((torch.float16, 2e-2), (torch.bfloat16, 1e-1)):
            sample = self.sample(dtype=dtype)
            pairs = zip(self.states(self.ready(), sample), self.states(self.ready(), sample.float()), strict=True)
            for state, exact in list(pairs) if self.deterministic else []:
                assert state.dtype == dtype
                assert (state.float() - exact).abs().max() < tolerance * exact.abs().max()
            assert self.first_step(self.ready(), sample).prev_sample.dtype == dtype

    def test_a_step_leads_to_the_next_entry_of_timesteps(self) -> None:
        if not self.deterministic:
            pytest.skip("the scheduler adds noise of its own, so it does not follow a given trajectory")
        clean, noise = self.sample(1), self.sample(2)
        scheduler = self.ready()
        sample = noise
        for index, timestep in enumerate(scheduler.timesteps):
            level = scheduler.sigmas[index]
            if index:
                torch.testing.assert_close(sample, (1 - level) * clean + level * noise, rtol=1e-3, atol=1e-3)
            else:
                sample = (1 - level) * clean + level * noise
            sample = self.step(scheduler, noise - clean, timestep, sample).prev_sample
        torch.testing.assert_close(sample, clean, rtol=1e-3, atol=1e-3)

    @pytest.mark.slow  # the class below shows it in every run
    def test_a_fresh_process_loads_it(self, tmp_path: Path) -> None:
        super().test_a_fresh_process_loads_it(tmp_path)


class TestFlowChefScheduler(FlowConformance):
    __test__ = True
    scheduler_class = FlowChefScheduler
    config = {"shift": 3.0, "learning_rate": 0.5, "data_step": "grad", "steer_stop": 0.8}
    known_failures = {
        "test_timesteps_may_be_int_float_or_tensor": "its parent refuses whole numbers, lest they be loop counters"
    }

    def test_a_fresh_process_loads_it(self, tmp_path: Path) -> None:
        SchedulerConformance.test_a_fresh_process_loads_it(self, tmp_path)


class TestFLAIRScheduler(FlowConformance):
    __test__ = True
    scheduler_class = FLAIRScheduler
    config = {"shift": 3.0, "data_step": "prox", "velocity_errors": [0.5, 0.2, 1.0]}
    known_failures = TestFlowChefScheduler.known_failures


class TestFlowChefHeunScheduler(FlowConformance):
    __test__ = True
    scheduler_class = FlowChefHeunScheduler
    config = {"shift": 3.0, "renoise": 0.5}
    known_failures = TestFlowChefScheduler.known_failures
    not_applicable = {
        **FlowConformance.not_applicable,
        "test_add_noise_treats_every_sample_with_its_own_timestep": "its parent takes one timestep for all",
    }


class TestFlowChefLCMScheduler(FlowConformance):
    __test__ = True
    scheduler_class = FlowChefLCMScheduler
    config = {"shift": 3.0, "optimization_steps": 2}
    known_failures = TestFlowChefScheduler.known_failures
    not_applicable = {
        **FlowConformance.not_applicable,
        "test_a_pipeline_saves_and_loads_it": UNSEEDED,
        "test_a_fresh_process_loads_it": UNSEEDED,
    }
    deterministic = False


class MultistepConformance(FlowConformance):
    not_applicable = {
        "test_config_survives_a_switch_to_every_compatible_class_and_back": (
            "others take back their own default, noise prediction, which is refused: see test_swap.py"
        )
    }

    def ways_to_add_noise(self) -> tuple[str, ...]:
        return ("add_noise", "scale_model_input")


class TestFlowChefDPMSolverMultistepScheduler(MultistepConformance):
    __test__ = True
    scheduler_class = FlowChefDPMSolverMultistepScheduler
    config = {"flow_shift": 3.0, "solver_order": 3, "learning_rate": 0.5}


class TestFlowChefUniPCMultistepScheduler(MultistepConformance):
    __test__ = True
    scheduler_class = FlowChefUniPCMultistepScheduler
    config = {"flow_shift": 3.0, "data_step": "project"}


@pytest.mark.parametrize("cls", [FlowChefScheduler, FlowChefLCMScheduler], ids=lambda cls: cls.__name__)
def test_the_config_of_a_stock_scheduler_gives_the_same_levels(cls: Any) -> None:
    for config in ({"shift": 3.0}, {"use_karras_sigmas": True}, {"shift_terminal": 0.1}):
        stock = FlowMatchEulerDiscreteScheduler(**config)
        ours = cls.from_config(stock.config)
        for scheduler in (stock, ours):
            scheduler.set_timesteps(7)
        assert torch.equal(stock.sigmas, ours.sigmas)
