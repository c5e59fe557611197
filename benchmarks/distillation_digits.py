"""Ways of distilling on 8x8 digits with classes and guidance; called by `distillation.py`.

One teacher of v-prediction for all; students begin at its weights and are told the digit. Settings were chosen on seed 100 before the seeds
0, 1 and 2 were drawn; `TRIED` says how many.
"""

import copy
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, LCMScheduler, UniPCMultistepScheduler
from digits import (
    CLASSES,
    NO_CLASS,
    SIDE,
    DigitNetwork,
    Digits,
    DigitTeacher,
    Flow,
    Measures,
    load_digits,
    train_classifier,
)
from eight_gaussians import falling, train, update_average
from safetensors.torch import load_file, save_file

from diffusers_ext.training.distillation.flow_pairs import euler_path, even_levels
from diffusers_ext.training.distillation.guidance import guided_trajectory, relative_error
from diffusers_ext.training.distillation.lcm import lcm_loss
from diffusers_ext.training.distillation.matching import MatchingBatch, MatchingNetworks, fake_loss, student_loss
from diffusers_ext.training.distillation.parameterization import NoiseSchedule
from diffusers_ext.training.distillation.reflow import exponential_times, interpolate, reflow_loss, straightness


SEEDS = (0, 1, 2)
OF_ONE_SEED = ("DMD2", "AGD", "AGD, noised pictures")
TRIED = 4
COUNT, NOISE_SEED, PART = 2_048, 12_345, 256
GUIDANCE = 2.0
TEACHER = {"steps": 2_400, "batch": 128, "learning_rate": 1.5e-3, "average": 0.998, "dropped": 0.1}
LCM = {"steps": 350, "batch": 128, "learning_rate": 5e-4, "average": 0.95}
MATCHING = {"steps": 200, "batch": 64, "learning_rate": 3e-4, "fake_learning_rate": 5e-4, "ratio": 3, "average": 0.98}
REFLOW = {"steps": 600, "batch": 128, "learning_rate": 1e-3, "average": 0.99, "pairs": 4_096, "teacher_steps": 10}
AGD = {
    "steps": 500,
    "batch": 128,
    "learning_rate": 1e-3,
    "average": 0.99,
    "runs": 1_024,
    "teacher_steps": 10,
    "scales": (1.0, 5.0),
}
SCALES, HELD_OUT_RUNS = (2.0, 4.0), 256
METHODS = ("teacher", "LCM", "DMD2", "ReFlow", "AGD", "AGD, noised pictures")

SCHEDULER = DDIMScheduler(
    prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing", set_alpha_to_one=True
)
SCHEDULE = NoiseSchedule.from_scheduler(SCHEDULER)
# (noise, labels, generator) -> samples
Sampler = Callable[[torch.Tensor, torch.Tensor, torch.Generator], torch.Tensor]


def labels_of(count: int) -> torch.Tensor:
    """Equally many of each digit."""
    return torch.arange(count) % CLASSES


def solver(name: str) -> Any:
    """A scheduler of diffusers for the teacher."""
    if name == "DPM++ 2M":
        return DPMSolverMultistepScheduler.from_config(SCHEDULER.config, solver_order=2)
    return {"DDIM": DDIMScheduler, "UniPC": UniPCMultistepScheduler}[name].from_config(SCHEDULER.config)


@torch.no_grad()
def follow(
    scheduler: Any,
    steps: int,
    predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    noise: torch.Tensor,
    **options: Any,
) -> torch.Tensor:
    """Samples by a scheduler of diffusers; `options` go to its `step`."""
    scheduler.set_timesteps(steps)
    sample = noise
    for timestep in scheduler.timesteps:
        prediction = predict(sample, timestep.expand(len(sample)))
        sample = scheduler.step(prediction, timestep, sample, **options).prev_sample
    return sample


def solve(teacher: DigitTeacher, name: str, steps: int, scale: float | torch.Tensor = GUIDANCE) -> Sampler:
    """The teacher's sampler."""

    def sample(noise: torch.Tensor, labels: torch.Tensor, _: torch.Generator) -> torch.Tensor:
        return follow(solver(name), steps, lambda x, t: teacher.guided(x, t, labels, scale), noise)

    return sample


def train_averaged(
    network: DigitNetwork, settings: dict[str, Any], loss_of: Callable[[DigitNetwork], torch.Tensor]
) -> DigitNetwork:
    """Trains a network and returns its moving average."""
    average = copy.deepcopy(network).requires_grad_(False)

    def step_loss(_: int) -> torch.Tensor:
        update_average(average, network, settings["average"])
        return loss_of(average)

    train(list(network.requires_grad_(True).parameters()), settings["steps"], step_loss, settings["learning_rate"])
    update_average(average, network, settings["average"])
    return average


def train_teacher(digits: Digits) -> DigitNetwork:
    network, generator = DigitNetwork(), torch.Generator().manual_seed(1_000)

    def loss_of(_: DigitNetwork) -> torch.Tensor:
        clean, labels = digits.draw(TEACHER["batch"], generator)
        dropped = torch.rand(labels.shape, generator=generator) < TEACHER["dropped"]
        timesteps = torch.randint(SCHEDULE.num_train_timesteps, labels.shape, generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        prediction = network(
            SCHEDULE.noisy(clean, noise, timesteps), timesteps, labels.masked_fill(dropped, NO_CLASS)
        ).sample
        return (prediction - SCHEDULE.target(clean, noise, timesteps)).square().mean()

    return train_averaged(network, TEACHER, loss_of)


def learn_consistency(teacher: DigitTeacher, digits: Digits, seed: int) -> DigitNetwork:
    """LCM with one guidance built in."""
    student, generator = copy.deepcopy(teacher.unet), torch.Generator().manual_seed(2_000 + seed)

    def loss_of(target: DigitNetwork) -> torch.Tensor:
        clean, labels = digits.draw(LCM["batch"], generator)
        return lcm_loss(
            SCHEDULE,
            lambda x, t: student(x, t, labels).sample,
            lambda x, t: target(x, t, labels).sample,
            lambda x, t: teacher.predictions(x, t, labels),
            clean,
            torch.randn(clean.shape, generator=generator),
            torch.randint(50, labels.shape, generator=generator),
            torch.full(labels.shape, GUIDANCE - 1.0),
        )

    return train_averaged(student, LCM, loss_of)


def match(teacher: DigitTeacher, seed: int) -> DigitNetwork:
    """DMD2 of one step without discriminator, which sees no picture."""
    networks, generator = MatchingNetworks(teacher, 1, None), torch.Generator().manual_seed(3_000 + seed)
    average = copy.deepcopy(networks.student).requires_grad_(False)
    rates = {"fake": MATCHING["fake_learning_rate"], "student": MATCHING["learning_rate"]}
    players = {"fake": networks.fake, "student": networks.student}
    optimizers = {name: torch.optim.Adam(players[name].parameters(), betas=(0.0, 0.99)) for name in players}
    shape = (MATCHING["batch"], 1, SIDE, SIDE)
    for step in range(MATCHING["steps"]):
        for name in ["fake"] * MATCHING["ratio"] + ["student"]:
            batch = MatchingBatch(
                words=torch.randint(CLASSES, shape[:1], generator=generator),
                path=torch.randn((1, *shape), generator=generator),
                last=0,
                noise=torch.randn(shape, generator=generator),
                uniform=torch.rand(shape[:1], generator=generator),
            )
            loss = fake_loss(networks, batch) if name == "fake" else student_loss(networks, teacher, batch, GUIDANCE)
            networks.zero_grad(set_to_none=True)
            loss.backward()
            optimizers[name].param_groups[0]["lr"] = rates[name] * falling(step, MATCHING["steps"])
            optimizers[name].step()
        update_average(average, networks.student, MATCHING["average"])
    return average


def draw_pairs(teacher: DigitTeacher, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noise, the guided teacher's samples of it, and their labels."""
    noise, labels = torch.randn((REFLOW["pairs"], 1, SIDE, SIDE), generator=generator), labels_of(REFLOW["pairs"])
    parts = zip(noise.split(PART), labels.split(PART))
    sampled = [solve(teacher, "DPM++ 2M", REFLOW["teacher_steps"])(*part, generator) for part in parts]
    return noise, torch.cat(sampled), labels


def straighten(teacher: DigitTeacher, seed: int) -> DigitNetwork:
    """ReFlow of the guided teacher, whose network it goes on with as a flow."""
    student, flow, generator = copy.deepcopy(teacher.unet), Flow(SCHEDULE), torch.Generator().manual_seed(5_000 + seed)
    pairs = draw_pairs(teacher, generator)

    def loss_of(_: DigitNetwork) -> torch.Tensor:
        rows = torch.randint(REFLOW["pairs"], (REFLOW["batch"],), generator=generator)
        noise, clean, labels = (part[rows] for part in pairs)
        sigma = exponential_times(torch.rand(rows.shape, generator=generator))
        sample, wanted = interpolate(clean, noise, sigma)
        return reflow_loss(flow(lambda x, t: student(x, t, labels).sample, sample, sigma), wanted)

    return train_averaged(student, REFLOW, loss_of)


def velocity_of(network: Any, labels: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The velocity of a student, or of the guided teacher, as `euler_path` asks for it."""
    flow = Flow(SCHEDULE)

    def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        if isinstance(network, DigitTeacher):
            return network.guided(x, t, labels, GUIDANCE)
        return network(x, t, labels).sample

    return torch.no_grad()(lambda sample, timesteps: flow(predict, sample, timesteps / 1000.0))


def bend(network: Any) -> float:
    """S of a flow along its own paths of 25 steps."""
    start = torch.randn((512, 1, SIDE, SIDE), generator=torch.Generator().manual_seed(6_000))
    ends, used = euler_path(velocity_of(network, labels_of(512)), start, *even_levels(25))
    return round(float(straightness(used, ends, start)), 6)


# samples, timesteps, labels, scales and the guided prediction, of each point (n, ...)
Points = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def run_points(teacher: DigitTeacher, count: int, scale: torch.Tensor, generator: torch.Generator) -> Points:
    """All points of guided runs from fresh noise."""
    labels = torch.randint(CLASSES, (count,), generator=generator)
    noise = torch.randn((count, 1, SIDE, SIDE), generator=generator)

    def denoise(sample: torch.Tensor, timestep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return teacher.predictions(sample, timestep.expand(count), labels)

    points = list(guided_trajectory(solver("DPM++ 2M"), denoise, noise, scale, AGD["teacher_steps"]))
    parts = [(point.sample, point.timestep.expand(count), labels, scale, point.guided) for point in points]
    return tuple(torch.cat(part) for part in zip(*parts))


def noised_points(teacher: DigitTeacher, digits: Digits, scale: torch.Tensor, generator: torch.Generator) -> Points:
    """As many points of pictures with noise, at the same timesteps."""
    scheduler, parts = solver("DPM++ 2M"), []
    scheduler.set_timesteps(AGD["teacher_steps"])
    for timestep in scheduler.timesteps:
        clean, labels = digits.draw(len(scale), generator)
        timesteps = timestep.expand(len(scale))
        sample = SCHEDULE.noisy(clean, torch.randn(clean.shape, generator=generator), timesteps)
        parts.append((sample, timesteps, labels, scale, teacher.guided(sample, timesteps, labels, scale)))
    return tuple(torch.cat(part) for part in zip(*parts))


def learn_guidance(teacher: DigitTeacher, digits: Digits, seed: int, noised: bool) -> DigitNetwork:
    """AGD: the guided prediction in one pass, at points of guided runs or of noised pictures."""
    student, generator = copy.deepcopy(teacher.unet), torch.Generator().manual_seed(7_000 + seed)
    low, high = AGD["scales"]
    scale = low + (high - low) * torch.rand(AGD["runs"], generator=generator)
    points = (
        noised_points(teacher, digits, scale, generator)
        if noised
        else run_points(teacher, AGD["runs"], scale, generator)
    )

    def loss_of(_: DigitNetwork) -> torch.Tensor:
        rows = torch.randint(len(points[0]), (AGD["batch"],), generator=generator)
        sample, timesteps, labels, scales, wanted = (part[rows] for part in points)
        return (student(sample, timesteps, labels, scales).sample - wanted).square().mean()

    return train_averaged(student, AGD, loss_of)


@torch.no_grad()
def guidance_error(teacher: DigitTeacher, student: DigitNetwork | None, scale: float) -> float:
    """Relative squared error of one pass on guided runs from fresh noise; without a student, of the teacher without guidance."""
    generator = torch.Generator().manual_seed(8_000)
    scales = torch.full((HELD_OUT_RUNS,), scale)
    *inputs, wanted = run_points(teacher, HELD_OUT_RUNS, scales, generator)
    made = teacher.unet(*inputs[:3]).sample if student is None else student(*inputs).sample
    return round(float(relative_error(made, wanted)), 5)


def samplers_of(method: str, network: DigitNetwork) -> dict[tuple[str, int], Sampler]:
    """How a student samples, by what is added to its name and by evaluations."""
    if method == "LCM":

        def jumps(steps: int) -> Sampler:
            def sample(noise: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
                scheduler = LCMScheduler.from_config(SCHEDULER.config, original_inference_steps=50)
                return follow(scheduler, steps, lambda x, t: network(x, t, labels).sample, noise, generator=generator)

            return sample

        return {("", steps): jumps(steps) for steps in (1, 2, 4)}
    if method == "DMD2":

        def once(noise: torch.Tensor, labels: torch.Tensor, _: torch.Generator) -> torch.Tensor:
            last = torch.full(labels.shape, SCHEDULE.num_train_timesteps - 1)
            return SCHEDULE.clean(network(noise, last, labels).sample, noise, last).float()

        return {("", 1): once}
    if method == "ReFlow":
        return {
            ("", steps): lambda noise, labels, _, steps=steps: euler_path(
                velocity_of(network, labels), noise, *even_levels(steps)
            )[0]
            for steps in (1, 2, 4)
        }

    def told(scale: float) -> Sampler:
        def sample(noise: torch.Tensor, labels: torch.Tensor, _: torch.Generator) -> torch.Tensor:
            scales = torch.full(labels.shape, scale)
            return follow(
                solver("DPM++ 2M"), AGD["teacher_steps"], lambda x, t: network(x, t, labels, scales).sample, noise
            )

        return sample

    return {
        ("" if scale == GUIDANCE else f", guidance {scale:g}", AGD["teacher_steps"]): told(scale) for scale in SCALES
    }


def teacher_samplers(teacher: DigitTeacher) -> dict[tuple[str, int], Sampler]:
    """By name and evaluations: two a step, but one without guidance."""
    found = {
        (f"teacher, {name}", 2 * steps): solve(teacher, name, steps)
        for name in ("DDIM", "DPM++ 2M", "UniPC")
        for steps in (1, 2, 4, 10, 20)
    }
    found |= {("teacher without guidance, DPM++ 2M", n): solve(teacher, "DPM++ 2M", n, 1.0) for n in (1, 2, 4, 20)}
    found[("teacher, DPM++ 2M, guidance 4", 20)] = solve(teacher, "DPM++ 2M", 10, 4.0)
    return found


class Keeper:
    """Trains networks, or loads those that an earlier run trained into the same folder.

    Args:
        folder: Where they are kept; `None` keeps nothing.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder

    def get(self, name: str, make: Callable[[], DigitNetwork]) -> tuple[DigitNetwork, float]:
        """A network and the seconds of its training."""
        path = (
            None if self.folder is None else self.folder / f"{name.replace(', ', '-').replace(' ', '-')}.safetensors"
        )
        if path is not None and path.with_suffix(".json").is_file():
            network = DigitNetwork()
            network.load_state_dict(load_file(path))
            return network.requires_grad_(False), float(json.loads(path.with_suffix(".json").read_text()))
        began = time.process_time()
        network = make()
        seconds = time.process_time() - began
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(network.state_dict(), path)
            path.with_suffix(".json").write_text(json.dumps(seconds))
        return network, seconds


def run(
    earlier: dict[str, Any],
    methods: Sequence[str] = METHODS,
    seeds: Sequence[int] = SEEDS,
    folder: Path | None = None,
) -> dict[str, Any]:
    """Trains and measures, and returns the figures: rows by sampler and evaluations, a list over seeds of each figure.

    Args:
        earlier: What an earlier run returned; its rows of other methods are kept.
        methods: Which.
        seeds: Of the students; those of `OF_ONE_SEED` take the first, and the teacher has one of its own.
        folder: Keeps trained networks, to go on from after an interruption.
    """
    digits, keeper = load_digits(), Keeper(folder)
    classifier = train_classifier(digits)
    measures = Measures(digits, classifier)
    rows: dict[str, Any] = dict(earlier.get("rows", {}))
    result: dict[str, Any] = {**earlier, "classifier_accuracy": measures.accuracy, "rows": rows}
    print("classifier", measures.accuracy, flush=True)
    network, seconds = keeper.get("teacher", lambda: train_teacher(digits))
    teacher = DigitTeacher(network, SCHEDULE)
    noise = torch.randn((COUNT, 1, SIDE, SIDE), generator=torch.Generator().manual_seed(NOISE_SEED))
    labels = labels_of(COUNT)

    def measure(name: str, evaluations: int, networks: Sequence[Sampler], spent: float) -> None:
        figures, speeds = [], []
        for sampler in networks:
            generator = torch.Generator().manual_seed(NOISE_SEED + 1)
            began = time.process_time()
            parts = zip(noise.split(PART), labels.split(PART))
            samples = torch.cat([sampler(*part, generator) for part in parts])
            speeds.append(COUNT / (time.process_time() - began))
            figures.append(measures(samples.clamp(-1.0, 1.0), labels))
        row: dict[str, Any] = {key: [each[key] for each in figures] for key in figures[0]}
        row |= {"training_seconds": round(spent, 1), "pictures_per_second": round(sum(speeds) / len(speeds), 1)}
        rows[f"{name}, {evaluations}"] = row
        print(name, evaluations, row, flush=True)

    if "teacher" in methods:
        floor = measures(digits.pictures, digits.labels)
        rows["other pictures, 0"] = {key: [value] for key, value in floor.items()}
        print("other pictures", floor, flush=True)
        for (name, evaluations), sampler in teacher_samplers(teacher).items():
            measure(name, evaluations, [sampler], seconds)
        result.setdefault("straightness", {})["teacher"] = [bend(teacher)]
        result.setdefault("guidance", {})["teacher without guidance"] = {
            f"{scale:g}": [guidance_error(teacher, None, scale)] for scale in SCALES
        }

    makers: dict[str, Callable[[int], DigitNetwork]] = {
        "LCM": lambda seed: learn_consistency(teacher, digits, seed),
        "DMD2": lambda seed: match(teacher, seed),
        "ReFlow": lambda seed: straighten(teacher, seed),
        "AGD": lambda seed: learn_guidance(teacher, digits, seed, noised=False),
        "AGD, noised pictures": lambda seed: learn_guidance(teacher, digits, seed, noised=True),
    }
    for method, make in makers.items():
        if method not in methods:
            continue
        own = seeds[:1] if method in OF_ONE_SEED else seeds
        trained = [keeper.get(f"{method}, {seed}", lambda seed=seed, make=make: make(seed)) for seed in own]
        spent = sum(each[1] for each in trained) / len(trained)
        by_seed = [samplers_of(method, each[0]) for each in trained]
        for added, evaluations in by_seed[0]:
            measure(f"{method}{added}", evaluations, [each[added, evaluations] for each in by_seed], spent)
        if method == "ReFlow":
            result.setdefault("straightness", {})["student"] = [bend(each[0]) for each in trained]
        if method.startswith("AGD"):
            result.setdefault("guidance", {})[method] = {
                f"{scale:g}": [guidance_error(teacher, each[0], scale) for each in trained] for scale in SCALES
            }
    # in the order of the methods, whichever ran last
    place = {name: max(METHODS.index(each) if name.startswith(each) else 0 for each in METHODS) for name in rows}
    result["rows"] = dict(sorted(rows.items(), key=lambda item: place[item[0]]))
    result["settings"] = {
        "seeds": list(seeds), "of_one_seed": OF_ONE_SEED, "tried": TRIED, "count": COUNT, "held_out": len(digits.held_out),
        "guidance": GUIDANCE, "teacher": TEACHER, "LCM": LCM, "DMD2": MATCHING, "ReFlow": REFLOW, "AGD": AGD,
    }  # fmt: skip
    return result
