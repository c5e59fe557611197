"""Twenty checks that a scheduler must pass to be used wherever diffusers uses one of its own.

The first ten are those of diffusers' own common scheduler tests, written anew. The next eight cover what those leave
out and users meet: conversion from other classes, copies, number types, half precision, mid-schedule starts, saving
inside a pipeline and reloading elsewhere. The last two catch the faults that are hardest to see in a picture: state that
outlives `set_timesteps`, and a previous timestep that is computed instead of looked up.

To put a scheduler under test:

    class TestMyScheduler(SchedulerConformance):
        scheduler_class = MyScheduler
        config = {"beta_schedule": "scaled_linear", "my_option": 0.3}
"""

import copy
import inspect
import pickle
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from diffusers.configuration_utils import ConfigMixin
from diffusers.utils import logging

from tests.helpers.fresh_process import assert_reloads_equal
from tests.helpers.placement import in_own_memory
from tests.helpers.tiny_models import tiny_stable_diffusion

from .base import Conformance, attempt


DONOR_CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PIPELINE_INPUTS = {"prompt": "a red heart", "num_inference_steps": 4, "output_type": "np"}
STATE_TENSORS = ("betas", "alphas", "alphas_cumprod", "sigmas", "timesteps")


class SchedulerConformance(Conformance):
    """The checks. A subclass sets the class attributes.

    Args:
        scheduler_class (`type`):
            The scheduler.
        config (`dict[str, Any]`):
            Constructor arguments; at least one of the scheduler's arguments must be left at its default.
        num_inference_steps (`int`, defaults to 10):
            Length of the runs, at least 6.
        sample_shape (`tuple[int, ...]`, defaults to (2, 3, 8, 8)):
            Shape of a batch of samples, at least two of them.
        step_kwargs (`dict[str, Any]`):
            Further arguments of `step`; a seeded `generator` is passed to those that take one.
        deterministic (`bool`, defaults to `True`):
            Whether `step` follows an ordinary differential equation, so that a straight trajectory is followed exactly.
        schedule_attributes (`tuple[str, ...]`, defaults to `("alphas_cumprod",)`):
            Tensors that must be equal to those of a donor after `from_config`.
        donor_classes (`tuple[type, ...]`):
            Classes whose configuration users hand over: `X.from_config(pipe.scheduler.config)`.
        spacings (`tuple[str, ...]`):
            Values of `timestep_spacing` that are tried where the constructor has that argument.
        fresh_imports (`tuple[str, ...]`, defaults to `("diffusers_ext",)`):
            All that the fresh process imports before it reloads the scheduler.
    """

    scheduler_class: ClassVar[type]
    config: ClassVar[dict[str, Any]] = {}
    num_inference_steps: ClassVar[int] = 10
    sample_shape: ClassVar[tuple[int, ...]] = (2, 3, 8, 8)
    step_kwargs: ClassVar[dict[str, Any]] = {}
    deterministic: ClassVar[bool] = True
    schedule_attributes: ClassVar[tuple[str, ...]] = ("alphas_cumprod",)
    donor_classes: ClassVar[tuple[type, ...]] = (DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler)
    spacings: ClassVar[tuple[str, ...]] = ("leading", "trailing", "linspace")
    fresh_imports: ClassVar[tuple[str, ...]] = ("diffusers_ext",)

    # -- what a subclass may override -----------------------------------------------------------------------------

    def build(self, **overrides: Any) -> Any:
        """A new scheduler."""
        return self.scheduler_class(**{**self.config, **overrides})

    def model(self, sample: torch.Tensor, timestep: Any) -> torch.Tensor:
        """The stand-in for a network: smooth, bounded, and different at each timestep."""
        return 0.3 * torch.sin(sample.float() + 0.001 * float(timestep)).to(sample.dtype)

    def pipeline_with(self) -> tuple[Any, dict[str, Any]]:
        """A pipeline that uses the scheduler, and the arguments of a call (values that JSON can hold)."""
        pipeline = tiny_stable_diffusion()
        pipeline.scheduler = self.scheduler_class.from_config(pipeline.scheduler.config)
        return pipeline, dict(PIPELINE_INPUTS)

    def noised(
        self, scheduler: Any, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """`clean` with `noise` at `timesteps` (one per sample)."""
        if hasattr(scheduler, "add_noise"):
            return scheduler.add_noise(clean, noise, timesteps)
        return scheduler.scale_noise(clean, timesteps, noise)

    # -- shared by the checks -------------------------------------------------------------------------------------

    def sample(self, seed: int = 0, dtype: torch.dtype = torch.float32, shape: Sequence[int] = ()) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(*(shape or self.sample_shape), generator=generator).to(dtype)

    def ready(self, scheduler: Any = None, steps: int | None = None) -> Any:
        scheduler = self.build() if scheduler is None else scheduler
        scheduler.set_timesteps(steps or self.num_inference_steps)
        return scheduler

    def step(self, scheduler: Any, output: torch.Tensor, timestep: Any, sample: torch.Tensor, **kwargs: Any) -> Any:
        kwargs = {**self.step_kwargs, **kwargs}
        if "generator" in inspect.signature(scheduler.step).parameters:
            kwargs.setdefault("generator", torch.Generator().manual_seed(7))
        return scheduler.step(output, timestep, sample, **kwargs)

    def states(self, scheduler: Any, sample: torch.Tensor, timesteps: Any = None) -> Iterator[torch.Tensor]:
        """The state after each step of a run over `timesteps` (the scheduler's own by default)."""
        for timestep in scheduler.timesteps if timesteps is None else timesteps:
            scaled = scheduler.scale_model_input(sample, timestep)
            sample = self.step(scheduler, self.model(scaled, timestep), timestep, sample).prev_sample
            yield sample

    def run(self, scheduler: Any, sample: torch.Tensor, timesteps: Any = None) -> torch.Tensor:
        return list(self.states(scheduler, sample, timesteps))[-1]

    def first_step(self, scheduler: Any, sample: torch.Tensor, **kwargs: Any) -> Any:
        timestep = scheduler.timesteps[0]
        scaled = scheduler.scale_model_input(sample, timestep)
        return self.step(scheduler, self.model(scaled, timestep), timestep, sample, **kwargs)

    @staticmethod
    def values(scheduler: Any) -> dict[str, Any]:
        """The configuration without the note of which arguments were left at their defaults."""
        return {key: value for key, value in scheduler.config.items() if key != "_use_default_values"}

    # -- the ten of diffusers -------------------------------------------------------------------------------------

    def test_saved_and_loaded_scheduler_steps_identically(self, tmp_path: Path) -> None:
        scheduler = self.build()
        scheduler.save_pretrained(tmp_path)
        loaded = self.scheduler_class.from_pretrained(tmp_path)
        there, here = self.run(self.ready(loaded), self.sample()), self.run(self.ready(scheduler), self.sample())
        assert torch.equal(there, here), "a saved and reloaded scheduler takes other steps"

    def test_config_survives_a_switch_to_every_compatible_class_and_back(self) -> None:
        scheduler = self.build()
        logging.disable_default_handler()
        try:
            for other in scheduler.compatibles:
                if not issubclass(other, ConfigMixin):
                    continue  # a placeholder of a class whose optional backend is not installed
                switched = attempt(f"{other.__name__}.from_config", other.from_config, scheduler.config)
                back = self.scheduler_class.from_config(switched.config)
                for key, value in self.values(scheduler).items():
                    returned = back.config[key]
                    assert returned == value, f"{key}={value!r} came back from {other.__name__} as {returned!r}"
        finally:
            logging.enable_default_handler()

    def test_saved_and_loaded_config_is_equal(self, tmp_path: Path) -> None:
        scheduler = self.build()
        scheduler.save_pretrained(tmp_path)
        loaded = self.scheduler_class.from_pretrained(tmp_path)
        assert self.values(loaded) == self.values(scheduler)
        declared = set(inspect.signature(self.scheduler_class.__init__).parameters) - {"self", "kwargs"}
        missing = declared - set(loaded.config)
        assert not missing, f"{sorted(missing)} are arguments but not in the saved configuration"

    def test_step_keeps_the_shape(self) -> None:
        for shape in (self.sample_shape, (1, *self.sample_shape[1:-1], self.sample_shape[-1] + 2)):
            scheduler, sample = self.ready(), self.sample(shape=shape)
            for state in self.states(scheduler, sample, scheduler.timesteps[:2]):
                assert state.shape == sample.shape, f"a step turned shape {tuple(shape)} into {tuple(state.shape)}"

    def test_tuple_and_dict_outputs_are_equal(self) -> None:
        output = self.first_step(self.ready(), self.sample())
        values = self.first_step(self.ready(), self.sample(), return_dict=False)
        assert isinstance(values, tuple), f"return_dict=False gave {type(values).__name__}"
        assert torch.equal(values[0], output.prev_sample), "the first entry of the tuple is not prev_sample"
        for name, expected, value in zip(output.keys(), output.values(), values, strict=False):
            assert torch.equal(expected, value), f"the tuple has another {name}"

    def test_public_api_is_complete(self) -> None:
        cls, scheduler = self.scheduler_class, self.build()
        assert cls.__name__.endswith("Scheduler"), "pipelines and push_to_hub know schedulers by the end of the name"
        assert hasattr(sys.modules[cls.__module__], "SchedulerMixin"), (
            f"{cls.__module__} lacks the name SchedulerMixin: pipelines saved with {cls.__name__} cannot be loaded"
        )
        assert cls.config_name == "scheduler_config.json"
        order = getattr(scheduler, "order", None)
        assert isinstance(order, int) and order >= 1, f"order={order!r} is not a positive int"
        for name in ("set_timesteps", "step", "scale_model_input", "add_noise"):
            assert callable(getattr(scheduler, name, None)), f"the method {name} is missing"
        assert len(scheduler) == scheduler.config.num_train_timesteps
        assert float(scheduler.init_noise_sigma) > 0, "init_noise_sigma is not positive"
        assert scheduler.timesteps.ndim == 1, "timesteps do not exist before set_timesteps"
        self.ready(scheduler)
        assert (scheduler.timesteps.diff() <= 0).all(), "timesteps do not descend"
        assert len(scheduler.timesteps) == self.num_inference_steps * order - (order - 1), (
            f"{self.num_inference_steps} steps of order {order} have {len(scheduler.timesteps)} timesteps"
        )
        scaled = scheduler.scale_model_input(self.sample(), scheduler.timesteps[0])
        assert scaled.shape == self.sample_shape, "scale_model_input changes the shape"

    def test_add_noise_treats_every_sample_with_its_own_timestep(self) -> None:
        clean, noise = self.sample(1), self.sample(2)
        untouched, ready = self.build(), self.ready()
        for scheduler in (untouched, ready):  # training starts without set_timesteps
            first, last = scheduler.timesteps[0], scheduler.timesteps[len(scheduler.timesteps) // 2]
            timesteps = torch.stack([first, last, *[last] * (len(clean) - 2)])
            noised = self.noised(scheduler, clean, noise, timesteps)
            assert noised.shape == clean.shape and noised.dtype == clean.dtype
            assert torch.isfinite(noised).all(), "add_noise gives values that are not finite"
            for i in range(2):
                alone = self.noised(scheduler, clean[i : i + 1], noise[i : i + 1], timesteps[i : i + 1])
                torch.testing.assert_close(noised[i : i + 1], alone, msg="add_noise mixes the timesteps of a batch")
            assert not torch.equal(noised[:1], self.noised(scheduler, clean[:1], noise[:1], timesteps[1:2]))

    def test_constructor_takes_no_undeclared_arguments(self) -> None:
        parameters = inspect.signature(self.scheduler_class.__init__).parameters.values()
        open_ended = [str(parameter) for parameter in parameters if parameter.kind is parameter.VAR_KEYWORD]
        deprecated = getattr(self.scheduler_class, "_deprecated_kwargs", [])
        assert bool(open_ended) == bool(deprecated), (
            f"the constructor takes {open_ended or 'no **kwargs'} but _deprecated_kwargs={deprecated}: arguments "
            "would be swallowed without effect"
        )
        assert not any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters)

    def test_trained_betas_survive_a_round_trip(self, tmp_path: Path) -> None:
        scheduler = self.build(trained_betas=[0.1, 0.3])
        scheduler.save_pretrained(tmp_path)
        loaded = self.scheduler_class.from_pretrained(tmp_path)
        assert torch.equal(loaded.betas, scheduler.betas)
        torch.testing.assert_close(loaded.betas, torch.tensor([0.1, 0.3]), msg="trained_betas are not used")

    def test_config_attributes_warn_and_unknown_ones_raise(self) -> None:
        scheduler = self.build()
        name = next(key for key in self.values(scheduler) if not key.startswith("_") and key not in vars(scheduler))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert getattr(scheduler, name) == scheduler.config[name]
        assert FutureWarning in [warning.category for warning in caught], f"reading .{name} gives no FutureWarning"
        try:
            _ = scheduler.does_not_exist
            message = None
        except AttributeError as error:
            message = str(error)
        assert message == f"'{self.scheduler_class.__name__}' object has no attribute 'does_not_exist'"

    # -- eight that users need -------------------------------------------------------------------------------------

    def test_from_config_of_another_class_gives_the_same_schedule(self) -> None:
        for parent in self.scheduler_class.__mro__[1:]:
            if issubclass(parent, ConfigMixin) and "__init__" in vars(parent):
                wanted = set(inspect.signature(parent.__init__).parameters) - {"kwargs"}
                missing = wanted - set(inspect.signature(self.scheduler_class.__init__).parameters)
                assert not missing, f"arguments of {parent.__name__} that are not declared: {sorted(missing)}"
        for donor_class in self.donor_classes:
            donor = donor_class(**DONOR_CONFIG)
            scheduler = self.scheduler_class.from_config(donor.config)
            for name in self.schedule_attributes:
                assert torch.equal(getattr(scheduler, name), getattr(donor, name)), (
                    f"{name} differs after from_config of {donor_class.__name__}: its configuration is shown but not used"
                )

    def test_keyword_arguments_are_kept_as_given_and_as_declared(self) -> None:
        scheduler = self.build()
        for name, parameter in inspect.signature(self.scheduler_class.__init__).parameters.items():
            if name in self.config:
                kept = scheduler.config[name]
                assert kept == self.config[name], f"{name} was given as {self.config[name]!r} and is {kept!r}"
            elif parameter.default is not inspect.Parameter.empty:
                assert scheduler.config[name] == parameter.default, (
                    f"{name} is declared with default {parameter.default!r} and is {scheduler.config[name]!r}"
                )
        again = self.scheduler_class.from_config(scheduler.config)
        assert self.values(again) == self.values(scheduler)
        for name in STATE_TENSORS:
            if hasattr(scheduler, name):
                assert torch.equal(getattr(again, name), getattr(scheduler, name)), f"{name} differs after from_config"

    def test_copies_can_be_interleaved(self) -> None:
        starts = [self.sample(0), self.sample(1)]
        alone = [list(self.states(self.ready(), start)) for start in starts]
        original = self.ready()
        schedulers = [copy.deepcopy(original), pickle.loads(pickle.dumps(original))]
        runs = [self.states(scheduler, start) for scheduler, start in zip(schedulers, starts, strict=True)]
        for number, states in enumerate(zip(*runs, strict=True)):
            for which, state in enumerate(states):
                assert torch.equal(state, alone[which][number]), f"copies influence each other at step {number}"

    def test_timesteps_may_be_int_float_or_tensor(self) -> None:
        scheduler = self.ready()
        given = scheduler.timesteps
        if given.is_floating_point():
            whole = [float(t).is_integer() for t in given]
            given = given if all(whole) else given[: whole.index(False)]
        assert len(given), "none of the timesteps is a whole number"
        expected = self.run(scheduler, self.sample(), given)
        for kind in (int, float, torch.tensor):
            timesteps = [kind(t.item()) for t in given]
            actual = attempt(f"timesteps given as {kind.__name__}", self.run, self.ready(), self.sample(), timesteps)
            assert torch.equal(actual, expected), f"timesteps given as {kind.__name__} change the result"

    def test_half_precision_goes_in_and_comes_out(self) -> None:
        for dtype, tolerance in ((torch.float16, 2e-2), (torch.bfloat16, 1e-1)):
            scheduler, sample = self.ready(), self.sample(dtype=dtype)
            assert scheduler.scale_model_input(sample, scheduler.timesteps[0]).dtype == dtype
            at_first = scheduler.timesteps[:1].repeat(len(sample))
            assert self.noised(self.ready(), sample, sample, at_first).dtype == dtype, f"add_noise leaves {dtype}"
            for state, exact in zip(
                self.states(scheduler, sample), self.states(self.ready(), sample.float()), strict=True
            ):
                assert state.dtype == dtype, f"a step turned {dtype} into {state.dtype}"
                assert torch.isfinite(state).all(), f"values that are not finite in {dtype}"
                error = (state.float() - exact).abs().max() / exact.abs().max()
                assert error < tolerance, f"{dtype} strays from float32 by {error:.1%}"

    def test_a_run_may_begin_in_the_middle(self) -> None:
        start = self.build().order * (self.num_inference_steps // 2)
        looked_up, told = self.ready(), self.ready()
        timesteps = told.timesteps[start:]
        if hasattr(told, "step_index") or hasattr(told, "set_begin_index"):
            assert hasattr(told, "set_begin_index"), "a scheduler that counts steps needs set_begin_index"
            told.set_begin_index(start)
            assert told.begin_index == start, f"begin_index is {told.begin_index!r} after set_begin_index({start})"
        runs = zip(
            self.states(looked_up, self.sample(), timesteps), self.states(told, self.sample(), timesteps), strict=True
        )
        for number, (first, second) in enumerate(runs):
            assert torch.equal(first, second), f"begin_index changes step {number}"
            if hasattr(told, "step_index"):
                assert told.step_index == start + number + 1, f"step_index is {told.step_index} after step {number}"
        self.ready(told)
        assert getattr(told, "begin_index", None) is None, "set_timesteps does not forget begin_index"
        assert torch.equal(self.run(told, self.sample()), self.run(self.ready(), self.sample()))

    def test_a_pipeline_saves_and_loads_it(self, tmp_path: Path) -> None:
        pipeline, inputs = self.pipeline_with()
        pipeline.save_pretrained(tmp_path)
        loaded = in_own_memory(attempt("from_pretrained", type(pipeline).from_pretrained, tmp_path))
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded.scheduler) is self.scheduler_class, f"reloaded as {type(loaded.scheduler).__name__}"
        here, there = (
            pipe(**inputs, generator=torch.Generator().manual_seed(0), return_dict=False)[0]
            for pipe in (pipeline, loaded)
        )
        assert (here == there).all(), "the reloaded pipeline paints another picture"

    def test_a_fresh_process_loads_it(self, tmp_path: Path) -> None:
        pipeline, inputs = self.pipeline_with()
        assert_reloads_equal(pipeline, tmp_path, inputs, imports=self.fresh_imports)

    # -- two that no picture shows ---------------------------------------------------------------------------------

    def test_set_timesteps_forgets_the_run_before(self) -> None:
        scheduler = self.ready()
        expected = self.run(scheduler, self.sample())
        assert torch.equal(self.run(self.ready(scheduler), self.sample()), expected), "a second run differs"
        for count, stop in ((self.num_inference_steps, 3), (self.num_inference_steps + 2, 5)):
            self.ready(scheduler, count)
            self.run(scheduler, self.sample(5), scheduler.timesteps[:stop])
            again = self.run(self.ready(scheduler), self.sample())
            assert torch.equal(again, expected), f"a run that was left after {stop} steps leaves traces in the next"

    def test_a_step_leads_to_the_next_entry_of_timesteps(self) -> None:
        # With the true noise as model output, every deterministic solver stays on the line between picture and noise.
        if not self.deterministic:
            pytest.skip("the scheduler adds noise of its own, so it does not follow a given trajectory")
        clean, noise = self.sample(1).clamp(-1, 1), self.sample(2)
        declared = inspect.signature(self.scheduler_class.__init__).parameters
        for spacing in self.spacings if "timestep_spacing" in declared else (None,):
            overrides = {} if spacing is None else {"timestep_spacing": spacing}
            for steps in (self.num_inference_steps, 7):
                scheduler, ruler = (self.ready(self.build(**overrides), steps) for _ in range(2))
                points = [
                    self.noised(ruler, clean, noise, t.repeat(len(clean)))
                    for t in scheduler.timesteps.unique().flip(0)
                ]
                assert len(points) == len(scheduler.timesteps), (
                    "a repeated timestep: override this check for the class"
                )
                sample = points[0]
                for number, timestep in enumerate(scheduler.timesteps[:-1]):
                    scheduler.scale_model_input(sample, timestep)
                    sample = self.step(scheduler, noise, timestep, sample).prev_sample
                    error = ((sample - points[number + 1]).abs().max() / points[number + 1].abs().max()).item()
                    assert error < 1e-3, (
                        f"timestep_spacing={spacing!r}, {steps} steps: step {number} does not lead to timestep "
                        f"{scheduler.timesteps[number + 1].item():g} (relative error {error:.1e})"
                    )
