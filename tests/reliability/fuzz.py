"""Seeded random calls of everything that the registry lists, and what comes of each.

Every draw is a pure function of (subject, number, seed), so that a line of a report can be repeated:
`python -m tests.reliability.fuzz --only FeatureEnergy --replay 8`.
"""

import argparse
import inspect
import json
import random
import sys
import time
import warnings
from collections.abc import Mapping
from typing import Any

import diffusers
import torch

from .functions import FUNCTIONS
from .outcomes import LIBRARY, OK, REFUSED, Tally, classify
from .registry import SCHEDULERS, STEP_ARGUMENTS, STOCK_SCHEDULERS, Argument, Function, Made
from .sandbox import sandbox, scratch


SHARE_OF_MODELS = 0.15  # of the draws go to subjects that run a network
SHARE_OF_SCHEDULERS = 0.6  # of the draws, once there are any
TRAINED_STEPS = 1000
SPACINGS = ("linspace", "leading", "trailing", "trailling")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction", "epsilonn")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SHAPES = ((1, 4, 8, 8), (2, 4, 5, 7), (1, 1, 1, 1), (3, 4, 8), (0, 4, 8, 8), (2, 3, 2, 4, 4))

Classes = Mapping[str, tuple[type, Mapping[str, Any]]]


def fuzz_functions(draws: int, seed: int = 0, only: str | None = None) -> dict[str, Tally]:
    """`draws` draws over all functions, fewer for those that run a network. Call it in a sandbox."""
    scratch()
    chosen = [subject for subject in FUNCTIONS if only is None or subject.name == only]
    heavy = [subject for subject in chosen if subject.is_model]
    light = [subject for subject in chosen if not subject.is_model]
    to_heavy = draws if not light else round(draws * SHARE_OF_MODELS) if heavy else 0
    counts = _shares(heavy, to_heavy) | _shares(light, draws - to_heavy)
    tallies = {}
    for subject in chosen:
        tally = tallies[subject.name] = Tally()
        for number in range(counts[subject.name]):
            outcome, description = run_draw(subject, number, seed)
            tally.add(outcome, f"{subject.name} #{number} {description}")
    return tallies


def _shares(subjects: list[Function], draws: int) -> dict[str, int]:
    # A subject with many arguments has more to get wrong.
    weights = {subject.name: len(subject.arguments) for subject in subjects}
    counts = {name: draws * weight // sum(weights.values()) for name, weight in weights.items()}
    for name in list(counts)[: draws - sum(counts.values())]:
        counts[name] += 1
    return counts


def run_draw(subject: Function, number: int, seed: int = 0) -> tuple[str, str]:
    """Makes one call; the outcome, and a line that describes it."""
    rng = random.Random(f"{seed}/{subject.name}/{number}")
    torch.manual_seed(rng.randrange(2**31))
    labels, arguments = draw(subject, rng)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcome, message = classify(lambda: subject.call(**arguments), arguments)
    shown = ", ".join(f"{name}={label}" for name, label in labels.items())
    return outcome, f"({shown}) -> {message[:400]}"


def draw(subject: Function, rng: random.Random) -> tuple[dict[str, str], dict[str, Any]]:
    """One call: up to three arguments vary among the good values, none to two of them are spoilt."""
    names = sorted(subject.arguments)
    spoilt = rng.sample(names, k=min(len(names), rng.choice([0, 1, 1, 1, 2])))
    varied = rng.sample(names, k=min(len(names), 3))
    labels, arguments = {}, {}
    for name, argument in subject.arguments.items():
        value = _value(argument, name in spoilt, name in varied, rng)
        arguments[name] = value.make(rng) if isinstance(value, Made) else value
        if name in spoilt or name in varied:
            labels[name] = value.label if isinstance(value, Made) else repr(value)[:60]
    return labels, arguments


def _value(argument: Argument, spoilt: bool, varied: bool, rng: random.Random) -> Any:
    if spoilt and argument.bad:
        return rng.choice(list(argument.bad))
    return rng.choice(list(argument.good)) if varied else argument.good[0]


# ---------------------------------------------------------------------------------------------------------------------
# Schedulers
# ---------------------------------------------------------------------------------------------------------------------


def fuzz_schedulers(classes: Classes, draws: int, package: str = LIBRARY, seed: int = 0) -> dict[str, Tally]:
    """Spacing x prediction type x steps (-1 to 2 T) x dtype x shape, and a few steps of each schedule."""
    tallies = {}
    for place, (name, (scheduler_class, settings)) in enumerate(classes.items()):
        tally = tallies[name] = Tally()
        # The rest of the division goes to the first classes, one each.
        for number in range(draws // len(classes) + (place < draws % len(classes))):
            rng = random.Random(f"{seed}/{name}/{number}")
            torch.manual_seed(rng.randrange(2**31))
            arguments = _scheduler_draw(rng)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                outcome, message = classify(
                    lambda: _walk(scheduler_class, settings, **arguments), arguments, package=package
                )
            tally.add(outcome, f"{name} #{number} {arguments} -> {message[:300]}")
    return tallies


def _scheduler_draw(rng: random.Random) -> dict[str, Any]:
    t = TRAINED_STEPS
    steps = rng.choice([-1, 0, 1, 2, 3, 10, 50, t - 1, t, t + 1, 2 * t, None])
    return {
        "timestep_spacing": rng.choice(SPACINGS),
        "prediction_type": rng.choice(PREDICTION_TYPES),
        "num_inference_steps": rng.randrange(1, 60) if steps is None else steps,
        "dtype": rng.choice(DTYPES),
        "sample": rng.choice(SHAPES),
    }


def _walk(
    scheduler_class: type,
    settings: Mapping[str, Any],
    timestep_spacing: str,
    prediction_type: str,
    num_inference_steps: int,
    dtype: torch.dtype,
    sample: tuple[int, ...],
) -> Any:
    known = inspect.signature(scheduler_class).parameters
    wanted = {"timestep_spacing": timestep_spacing, "prediction_type": prediction_type}
    scheduler: Any = scheduler_class(**{**settings, **{k: v for k, v in wanted.items() if k in known}})
    scheduler.set_timesteps(num_inference_steps)
    if len(scheduler.timesteps) == 0:
        return []
    latents = torch.randn(sample).to(dtype)
    if latents.numel() == 0:
        # Nothing in, nothing out: that is not an answer that was swallowed.
        return [scheduler.timesteps]
    for timestep in scheduler.timesteps[:6]:
        scaled = scheduler.scale_model_input(latents, timestep) if hasattr(scheduler, "scale_model_input") else latents
        further = STEP_ARGUMENTS.get(scheduler_class.__name__, lambda sample: {})(latents)
        latents = scheduler.step(0.1 * scaled, timestep, latents, **further).prev_sample
    return latents


def stock_classes() -> Classes:
    return {name: (getattr(diffusers, name), {}) for name in STOCK_SCHEDULERS}


def own_classes() -> Classes:
    import diffusers_ext

    return {name: (getattr(diffusers_ext.schedulers, name), settings) for name, settings in SCHEDULERS.items()}


def fuzz_all(draws: int, seed: int = 0) -> dict[str, Tally]:
    """`draws` calls of everything that is ours. Call it in a sandbox."""
    own = own_classes()
    scheduler_draws = round(draws * SHARE_OF_SCHEDULERS) if own else 0
    tallies = fuzz_functions(draws - scheduler_draws, seed)
    runs = fuzz_schedulers(own, scheduler_draws, seed=seed) if own else {}
    # A class may be among the functions too, for its constructor.
    return tallies | {f"{name}, steps": tally for name, tally in runs.items()}


def summed(tallies: Mapping[str, Tally]) -> Tally:
    total = Tally()
    for tally in tallies.values():
        total.merge(tally)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="name of one function")
    parser.add_argument("--replay", type=int, help="number of one draw of --only")
    args = parser.parse_args()
    with sandbox():
        if args.replay is not None:
            subject = next(subject for subject in FUNCTIONS if subject.name == args.only)
            print(*run_draw(subject, args.replay, args.seed))
            return
        started = time.perf_counter()
        if args.only:
            tallies = fuzz_functions(args.draws, args.seed, args.only)
        else:
            tallies = fuzz_all(args.draws, args.seed)
        seconds = time.perf_counter() - started
    for name, tally in tallies.items():
        print(f"{name:45} {json.dumps(tally.as_dict())}")
        print(*(f"    {fault}" for fault in tally.faults), sep="\n")
    total = summed(tallies)
    print(f"{total.total} draws, {seconds:.0f} s: {json.dumps(total.as_dict())}")
    sys.exit(0 if set(total.counts) <= {OK, REFUSED} else 1)


if __name__ == "__main__":
    main()
