"""The suite itself under test: a sound scheduler passes all of it, and each planted fault is caught by its check."""

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from diffusers.configuration_utils import register_to_config

from .base import Conformance
from .reference_scheduler import ReferenceScheduler, ReferenceSchedulerOutput, SchedulerMixin  # noqa: F401
from .schedulers import DONOR_CONFIG, SchedulerConformance


CONFIG = {**DONOR_CONFIG, "prediction_type": "epsilon", "timestep_spacing": "leading"}
DECLARED = inspect.signature(ReferenceScheduler.__init__).parameters


class TestReferenceScheduler(SchedulerConformance):
    scheduler_class = ReferenceScheduler
    config = CONFIG
    fresh_imports = ("tests.conformance.reference_scheduler",)


def planted(fault: str, **namespace: Any) -> type:
    """The reference scheduler with the members of `namespace` in place of its own, and `Scheduler` in its name."""
    return type(f"{fault}Scheduler", (ReferenceScheduler,), {"__module__": __name__, **namespace})


def constructor(change: Callable[[dict[str, Any]], dict[str, Any]], **defaults: Any) -> Callable[..., None]:
    """A registered constructor with all arguments of the parent, that hands `change(arguments)` on to the parent's."""

    def __init__(self: Any, **arguments: Any) -> None:
        ReferenceScheduler.__init__(self, **change(arguments))

    __init__.__signature__ = inspect.Signature(
        [
            parameter.replace(default=defaults[name]) if name in defaults else parameter
            for name, parameter in DECLARED.items()
        ]
    )
    return register_to_config(__init__)


def changed_step(change: Callable[[Any, Any, bool], Any]) -> Callable[..., Any]:
    """A `step` that returns `change(scheduler, output of the parent, return_dict)`."""

    def step(self: Any, model_output: Any, timestep: Any, sample: Any, return_dict: bool = True) -> Any:
        return change(self, ReferenceScheduler.step(self, model_output, timestep, sample), return_dict)

    return step


def pack(output: Any, return_dict: bool, **values: Any) -> Any:
    changed = ReferenceSchedulerOutput(**{**output, **values})
    return changed if return_dict else changed.to_tuple()


class SwallowsKeywordsScheduler(ReferenceScheduler):
    @register_to_config
    def __init__(self, damping: float = 0.5, **kwargs: Any) -> None:
        super().__init__(**kwargs)


class DeclaresFewerArgumentsScheduler(ReferenceScheduler):
    @register_to_config
    def __init__(self, num_train_timesteps: int = 1000, damping: float = 0.5) -> None:
        super().__init__(num_train_timesteps=num_train_timesteps)


class ChangesADefaultScheduler(ReferenceScheduler):
    # The parent's constructor is decorated too and writes its own default over this one.
    __init__ = constructor(lambda given: {**given, "steps_offset": 0}, steps_offset=1)


class ForgetsTrainedBetasScheduler(ReferenceScheduler):
    __init__ = constructor(lambda given: {**given, "trained_betas": None})


class HalvesAnArgumentScheduler(ReferenceScheduler):
    __init__ = constructor(lambda given: {**given, "beta_start": given.get("beta_start", 0.0001) / 2})


class KeepsAKnobOutOfTheConfigScheduler(ReferenceScheduler):
    # Arguments that begin with an underscore are not written to the configuration.
    config_of_the_suite = {"_knob": 0.9}
    step = changed_step(
        lambda self, output, return_dict: pack(output, return_dict, prev_sample=output.prev_sample * self.knob)
    )

    @register_to_config
    def __init__(self, _knob: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.knob = _knob


class AddsOneNoiseLevelScheduler(ReferenceScheduler):
    def add_noise(self, original_samples: Any, noise: Any, timesteps: Any) -> Any:
        return super().add_noise(original_samples, noise, timesteps[:1].expand(len(original_samples)))


class ComputesThePreviousTimestepScheduler(ReferenceScheduler):
    def _next_timestep(self, index: int) -> int | None:
        previous = int(self.timesteps[index]) - self.config.num_train_timesteps // self.num_inference_steps
        return previous if previous >= 0 else None


class TakesIntegersOnlyScheduler(ReferenceScheduler):
    def step(self, model_output: Any, timestep: Any, sample: Any, return_dict: bool = True) -> Any:
        _ = self.alphas_cumprod[timestep]
        return super().step(model_output, timestep, sample, return_dict)


class SharesItsHistoryScheduler(ReferenceScheduler):
    shared: list[Any] = []
    history = property(lambda self: self.shared, lambda self, value: self.shared.clear())


class IgnoresBeginIndexScheduler(ReferenceScheduler):
    begin_index = property(lambda self: None)


def silent(self: Any, name: str) -> Any:
    if name in self.__dict__.get("_internal_dict", {}):
        return self._internal_dict[name]
    raise AttributeError(name)


def without_order() -> type:
    members = {name: value for name, value in vars(ReferenceScheduler).items() if name not in ("order", "__dict__")}
    return type("LacksOrderScheduler", ReferenceScheduler.__bases__, members)


def in_a_module_without_the_mixin() -> type:
    module = sys.modules.setdefault("module_without_the_mixin", ModuleType("module_without_the_mixin"))
    module.HiddenScheduler = type("HiddenScheduler", (ReferenceScheduler,), {"__module__": module.__name__})
    return module.HiddenScheduler


# check -> the faults that it must catch
FAULTS: dict[str, list[type]] = {
    "test_saved_and_loaded_scheduler_steps_identically": [KeepsAKnobOutOfTheConfigScheduler],
    "test_config_survives_a_switch_to_every_compatible_class_and_back": [HalvesAnArgumentScheduler],
    "test_saved_and_loaded_config_is_equal": [planted("DropsFromConfig", ignore_for_config=["beta_end"])],
    "test_step_keeps_the_shape": [
        planted("FlattensShape", step=changed_step(
            lambda self, output, return_dict: pack(output, return_dict, prev_sample=output.prev_sample.flatten(1))))
    ],
    "test_tuple_and_dict_outputs_are_equal": [
        planted("SwapsTheTuple", step=changed_step(
            lambda self, output, return_dict: output if return_dict else output.to_tuple()[::-1])),
        planted("AlwaysGivesDicts", step=changed_step(lambda self, output, return_dict: output)),
    ],
    "test_public_api_is_complete": [
        without_order(),
        planted("LacksScaling", scale_model_input=None),
        planted("SkipsATimestep", set_timesteps=lambda self, count, device=None: ReferenceScheduler.set_timesteps(
            self, count - 1, device)),
    ],
    "test_add_noise_treats_every_sample_with_its_own_timestep": [AddsOneNoiseLevelScheduler],
    "test_constructor_takes_no_undeclared_arguments": [SwallowsKeywordsScheduler],
    "test_trained_betas_survive_a_round_trip": [ForgetsTrainedBetasScheduler],
    "test_config_attributes_warn_and_unknown_ones_raise": [planted("SilentAttributes", __getattr__=silent)],
    "test_from_config_of_another_class_gives_the_same_schedule": [
        DeclaresFewerArgumentsScheduler, SwallowsKeywordsScheduler, HalvesAnArgumentScheduler],
    "test_keyword_arguments_are_kept_as_given_and_as_declared": [ChangesADefaultScheduler],
    "test_copies_can_be_interleaved": [SharesItsHistoryScheduler],
    "test_timesteps_may_be_int_float_or_tensor": [TakesIntegersOnlyScheduler],
    "test_half_precision_goes_in_and_comes_out": [
        planted("ReturnsFloat32", step=changed_step(
            lambda self, output, return_dict: pack(output, return_dict, prev_sample=output.prev_sample.float()))),
        planted("OverflowsInHalf", scale_model_input=lambda self, sample, timestep=None: sample * 1e5 / 1e5),
    ],
    "test_a_run_may_begin_in_the_middle": [IgnoresBeginIndexScheduler],
    "test_a_pipeline_saves_and_loads_it": [in_a_module_without_the_mixin()],
    "test_a_fresh_process_loads_it": [planted("ImportedByNobody")],
    "test_set_timesteps_forgets_the_run_before": [planted("RemembersTheLastRun", _forget=lambda self: setattr(
        self, "_step_index", None) or setattr(self, "_begin_index", None))],
    "test_a_step_leads_to_the_next_entry_of_timesteps": [ComputesThePreviousTimestepScheduler],
}  # fmt: skip


def run_check(scheduler_class: type, check: str, folder: Path) -> None:
    """Runs one check of the suite on a class, outside of the collection of pytest."""
    config = {**CONFIG, **getattr(scheduler_class, "config_of_the_suite", {})}
    suite = type("Suite", (SchedulerConformance,), {"scheduler_class": scheduler_class, "config": config})()
    method = getattr(suite, check)
    method(**({"tmp_path": folder} if "tmp_path" in inspect.signature(method).parameters else {}))


@pytest.mark.parametrize(
    ("check", "fault"),
    [
        pytest.param(check, fault, id=f"{fault.__name__}-{check}")
        for check, faults in FAULTS.items()
        for fault in faults
    ],
)
def test_a_planted_fault_is_caught_by_its_check(check: str, fault: type, tmp_path: Path) -> None:
    with pytest.raises(AssertionError) as caught:
        run_check(fault, check, tmp_path)
    assert str(caught.value), f"{check} fails without a message"


def test_every_check_has_a_fault_that_it_catches() -> None:
    assert sorted(FAULTS) == SchedulerConformance.checks()
    assert len(FAULTS) == 20


def test_an_excuse_for_an_unknown_check_is_refused() -> None:
    with pytest.raises(TypeError, match="test_misspelt"):
        type("Excused", (SchedulerConformance,), {"known_failures": {"test_misspelt": "reason"}})


def test_an_excuse_stays_with_the_class_that_declared_it() -> None:
    class Suite(Conformance):
        def test_something(self) -> None:
            raise AssertionError("always")

    class Excused(Suite):
        known_failures = {"test_something": "a known fault"}

    assert [mark.name for mark in Excused.test_something.pytestmark] == ["xfail"]
    assert not hasattr(Suite.test_something, "pytestmark")
