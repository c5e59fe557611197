"""Each way of distilling on eight Gaussians, three seeds at once; called by `distillation.py`.

Settings were chosen on seed 100 before seeds 0, 1 and 2 were drawn; `TRIED` says how many.
"""

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import EDMDPMSolverMultistepScheduler
from eight_gaussians import (
    SIGMA_DATA,
    SIGMA_MAX,
    SIGMA_MIN,
    EDMDenoisers,
    Perceptrons,
    draw_data,
    falling,
    measure,
    per_seed,
    sample_ode,
    train,
    update_average,
)

from diffusers_ext.training.distillation.consistency import karras_levels
from diffusers_ext.training.distillation.ctm import draw_levels, heun_step, jump, trajectory_pair
from diffusers_ext.training.distillation.dmd import dmd_gradient, surrogate_loss
from diffusers_ext.training.distillation.f_divergence import DensityRatioWeights
from diffusers_ext.training.distillation.flow_pairs import euler_path, even_levels
from diffusers_ext.training.distillation.gan import discriminator_loss, generator_loss
from diffusers_ext.training.distillation.reflow import exponential_times, interpolate, straightness


SEEDS = (0, 1, 2)
TRIED = 6
TEACHER = {"steps": 12_000, "batch": 512, "learning_rate": 2e-3}
MATCHING = {"steps": 5_000, "batch": 256, "learning_rate": 2e-3, "ratio": 5, "average": 0.99}
GAN_WEIGHT, DISCRIMINATOR_WEIGHT = 3e-3, 1e-2
TRAJECTORY = {"steps": 6_000, "batch": 256, "learning_rate": 1e-3, "average": 0.99, "levels": 40}
REFLOW = {"steps": 8_000, "batch": 512, "learning_rate": 2e-3, "pairs": 65_536, "teacher_steps": 30}

# (noise, generator) -> samples, by network evaluations
Samplers = dict[int, Callable[[torch.Tensor, torch.Generator], torch.Tensor]]


def noisy(clean: torch.Tensor, sigma: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return clean + sigma[..., None] * torch.randn(clean.shape, generator=generator)


def denoising_loss(
    network: EDMDenoisers, clean: torch.Tensor, sigma: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    weight = (sigma.square() + SIGMA_DATA**2) / (sigma * SIGMA_DATA).square()
    return per_seed(weight[..., None] * (network(noisy(clean, sigma, generator), sigma) - clean).square())


def train_teacher(seeds: tuple[int, ...]) -> EDMDenoisers:
    teacher = EDMDenoisers(seeds)
    generator = torch.Generator().manual_seed(1_000 + seeds[0])
    shape = (len(seeds), TEACHER["batch"])

    def loss_of(step: int) -> torch.Tensor:
        sigma = (1.4 * torch.randn(shape, generator=generator) - 0.3).exp().clamp(SIGMA_MIN, SIGMA_MAX)
        return denoising_loss(teacher, draw_data(shape, generator), sigma, generator)

    train(list(teacher.parameters()), TEACHER["steps"], loss_of, TEACHER["learning_rate"])
    return teacher.requires_grad_(False)


def match(teacher: EDMDenoisers, seeds: tuple[int, ...], divergence: str | None = None, ratio: int = 5) -> Samplers:
    """One step by DMD2 without discriminator; with a divergence, by f-distill."""
    student, fake, average = (copy.deepcopy(teacher) for _ in range(3))
    critic = Perceptrons(seeds, outputs=1, name="critic")
    weights = [DensityRatioWeights(divergence) for _ in seeds] if divergence else []
    rates, generator = MATCHING["learning_rate"], torch.Generator().manual_seed(2_000 + seeds[0])
    optimizers = [
        torch.optim.Adam(parameters, lr=rates, betas=(0.0, 0.99))
        for parameters in (
            student.requires_grad_(True).parameters(),
            [*fake.requires_grad_(True).parameters(), *critic.parameters()],
        )
    ]
    grid = karras_levels(1_000, SIGMA_MIN, SIGMA_MAX).float()
    shape = (len(seeds), MATCHING["batch"])

    def generate() -> torch.Tensor:
        return one_step(student, torch.randn((*shape, 2), generator=generator))

    def judge(samples: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        scale = (sigma.square() + SIGMA_DATA**2).sqrt()[..., None]
        return critic(samples / scale, sigma.log() / 4)[..., 0]

    def fake_turn() -> torch.Tensor:
        with torch.no_grad():
            made = generate()
        sigma = grid[torch.randint(len(grid), shape, generator=generator)]
        loss = denoising_loss(fake, made, sigma, generator)
        if not divergence:
            return loss
        real = judge(noisy(draw_data(shape, generator), sigma, generator), sigma)
        logits = judge(noisy(made, sigma, generator), sigma)
        return (
            loss + DISCRIMINATOR_WEIGHT * torch.stack([discriminator_loss(*each) for each in zip(real, logits)]).sum()
        )

    def student_turn() -> torch.Tensor:
        clean = generate()
        place = 0.02 + 0.96 * torch.rand(shape, generator=generator)
        sigma = grid[(place * len(grid)).long()]
        at = noisy(clean, sigma, generator)
        with torch.no_grad():
            real, made = teacher(at, sigma), fake(at, sigma)
        logits = judge(at, sigma) if divergence else None
        loss = torch.zeros(())
        for i in range(len(seeds)):
            weight = None if logits is None else weights[i](logits[i].detach(), place[i])
            loss = loss + surrogate_loss(clean[i], dmd_gradient(clean[i], real[i], made[i], weight=weight))
            if logits is not None:
                loss = loss + GAN_WEIGHT * generator_loss(logits[i])
        return loss

    for step in range(MATCHING["steps"]):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rates * falling(step, MATCHING["steps"])
        for turn in [fake_turn] * ratio + [student_turn]:
            optimizer = optimizers[turn is fake_turn]
            loss = turn()
            for each in optimizers:
                each.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        update_average(average, student, MATCHING["average"])
    return {1: lambda noise, _: one_step(average, noise)}


def one_step(network: EDMDenoisers, noise: torch.Tensor) -> torch.Tensor:
    return network(noise * SIGMA_MAX, noise.new_full(noise.shape[:2], SIGMA_MAX))


def learn_trajectories(teacher: EDMDenoisers, seeds: tuple[int, ...]) -> Samplers:
    """CTM with its denoising loss, without its discriminator."""
    student, target = EDMDenoisers(seeds, jumps=True), EDMDenoisers(seeds, jumps=True)
    for network in (student, target):
        begin_at(network, teacher)
    generator = torch.Generator().manual_seed(3_000 + seeds[0])
    grid = karras_levels(TRAJECTORY["levels"], SIGMA_MIN, SIGMA_MAX).float()
    shape = (len(seeds), TRAJECTORY["batch"])

    def jump_of(network: EDMDenoisers):
        def move(sample: torch.Tensor, level: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
            parts = (sample.reshape(*shape, 2), level.reshape(shape), wanted.reshape(shape))
            return jump(sample, network(*parts).flatten(0, 1), level, wanted)

        return move

    def denoise(sample: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        return teacher(sample.reshape(*shape, 2), level.reshape(shape)).flatten(0, 1)

    def loss_of(step: int) -> torch.Tensor:
        update_average(target, student, TRAJECTORY["average"])
        level, middle, wanted = draw_levels(grid, shape[0] * shape[1], generator)
        clean = draw_data(shape, generator)
        sample = noisy(clean, level.reshape(shape), generator).flatten(0, 1)
        pair = trajectory_pair(
            jump_of(student), jump_of(target), lambda x, t, u: heun_step(x, t, u, denoise), sample, level, middle, wanted
        )  # fmt: skip
        # a squared distance, for points of the plane
        consistent = (pair[0] - pair[1]).square().reshape(*shape, 2)
        sigma = (1.4 * torch.randn(shape, generator=generator) - 0.3).exp().clamp(SIGMA_MIN, SIGMA_MAX)
        return per_seed(consistent) / SIGMA_DATA**2 + 0.1 * denoising_loss(student, clean, sigma, generator)

    target.requires_grad_(False)
    train(list(student.parameters()), TRAJECTORY["steps"], loss_of, TRAJECTORY["learning_rate"])

    def sampler(steps: int):
        levels = [*karras_levels(steps + 1, SIGMA_MIN, SIGMA_MAX).flip(0).float().tolist()[:-1], 0.0]

        def sample(noise: torch.Tensor, _: torch.Generator) -> torch.Tensor:
            samples = noise * SIGMA_MAX
            for now, after in zip(levels, levels[1:]):
                at, to = (samples.new_full(samples.shape[:2], value) for value in (now, after))
                flat = jump(samples.flatten(0, 1), target(samples, at, to).flatten(0, 1), at.flatten(), to.flatten())
                samples = flat.reshape(samples.shape)
            return samples

        return sample

    return {steps: sampler(steps) for steps in (1, 2, 4)}


@torch.no_grad()
def begin_at(network: EDMDenoisers, teacher: EDMDenoisers) -> None:
    """Starts a network of two levels at the teacher: what it is told of the second one counts for nothing yet."""
    own = network.network.first.weight
    old = teacher.network.first.weight
    phases = (old.shape[1] - 2) // 2
    own.zero_()
    own[:, :2] = old[:, :2]
    # sines of both levels, then cosines of both
    own[:, 2 : 2 + phases] = old[:, 2 : 2 + phases]
    own[:, 2 + 2 * phases : 2 + 3 * phases] = old[:, 2 + phases :]
    state = teacher.network.state_dict()
    state["first.weight"] = own
    network.network.load_state_dict(state)


def straighten(teacher: EDMDenoisers, seeds: tuple[int, ...]) -> tuple[Samplers, dict[str, list[float]]]:
    """ReFlow on pairs of the teacher's ODE, and S of the teacher, as a flow, and of the student."""
    generator = torch.Generator().manual_seed(4_000 + seeds[0])
    noise = torch.randn((len(seeds), REFLOW["pairs"], 2), generator=generator)
    clean = sample_ode(teacher, noise, REFLOW["teacher_steps"], heun=True)
    student = Perceptrons(seeds, name="flow")
    shape = (len(seeds), REFLOW["batch"])
    rows = torch.arange(len(seeds))[:, None]

    def velocity(samples: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return student(samples, 4 * sigma)

    def loss_of(step: int) -> torch.Tensor:
        chosen = torch.randint(REFLOW["pairs"], shape, generator=generator)
        sigma = exponential_times(torch.rand(shape, generator=generator))
        parts = clean[rows, chosen].flatten(0, 1), noise[rows, chosen].flatten(0, 1), sigma.flatten()
        sample, wanted = (part.reshape(*shape, 2) for part in interpolate(*parts))
        return per_seed((velocity(sample, sigma) - wanted).square())

    train(list(student.parameters()), REFLOW["steps"], loss_of, REFLOW["learning_rate"])

    def follow(flow, start: torch.Tensor, steps: int):
        return euler_path(lambda x, t: flow(x, (t / 1000).expand(x.shape[1], -1).T), start, *even_levels(steps))

    def teacher_flow(samples: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """v = (x - D) / level of the teacher on x = (1 - level) x_0 + level eps; beyond its highest level, as there."""
        sigma = (level / (1.0 - level).clamp(min=1e-6)).clamp(max=SIGMA_MAX)
        at = samples / (1.0 - level).clamp(min=1.0 / (1.0 + SIGMA_MAX))[..., None]
        return (samples - teacher(at, sigma.clamp(min=SIGMA_MIN))) / level[..., None]

    start = torch.randn((len(seeds), 8_192, 2), generator=generator)
    bends: dict[str, list[float]] = {}
    with torch.no_grad():
        for name, flow in (("teacher", teacher_flow), ("student", velocity)):
            ends, used = follow(flow, start, 50)
            bends[name] = [float(straightness(used[:, i], ends[i], start[i])) for i in range(len(seeds))]
    samplers: Samplers = {
        steps: lambda noise, _, steps=steps: torch.no_grad()(follow)(velocity, noise, steps)[0] for steps in (1, 2, 4)
    }
    return samplers, bends


def multistep(teacher: EDMDenoisers, steps: int):
    """DPM-Solver++ 2M of diffusers on the teacher."""

    @torch.no_grad()
    def sample(noise: torch.Tensor, _: torch.Generator) -> torch.Tensor:
        scheduler = EDMDPMSolverMultistepScheduler(
            sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX, sigma_data=SIGMA_DATA, final_sigmas_type="zero"
        )
        scheduler.set_timesteps(steps)
        samples = noise * scheduler.init_noise_sigma
        for sigma, timestep in zip(scheduler.sigmas, scheduler.timesteps):
            given = (
                samples / (sigma**2 + SIGMA_DATA**2) ** 0.5
            )  # what the scheduler's preconditioning takes away again
            level = samples.new_full(samples.shape[:2], float(sigma))
            output = teacher.network(given, level.log() / 4)
            samples = scheduler.step(output, timestep, samples).prev_sample
        return samples

    return sample


METHODS = ("teacher", "DMD2", "DMD2, ratio 1", "f-distill, js", "CTM", "ReFlow")


def run(earlier: dict[str, Any], methods: Sequence[str] = METHODS) -> dict[str, Any]:
    """Trains and measures, and returns the figures: rows by method and evaluations, with seconds of the processor.

    Args:
        earlier: What an earlier run returned; its rows of other methods are kept.
        methods: Which; the teacher is always trained.
    """
    seeds, rows = SEEDS, dict(earlier.get("rows", {}))
    result: dict[str, Any] = {**earlier, "rows": rows}

    def add(name: str, samplers: Samplers, seconds: float) -> None:
        for evaluations, sampler in samplers.items():
            figures = measure(torch.no_grad()(sampler), len(seeds))
            rows[f"{name}, {evaluations}"] = {**figures, "training_seconds": round(seconds, 1)}
            print(name, evaluations, {key: [round(v, 4) for v in value] for key, value in figures.items()}, flush=True)

    def timed(call: Callable[[], Any]) -> tuple[Any, float]:
        began = time.process_time()
        made = call()
        return made, time.process_time() - began

    teacher, seconds = timed(lambda: train_teacher(seeds))
    if "teacher" in methods:
        add("data", {0: lambda noise, generator: draw_data(noise.shape[:2], generator)}, 0.0)
        add("teacher, Euler", {n: lambda z, _, n=n: sample_ode(teacher, z, n) for n in (1, 2, 4, 10, 20)}, seconds)
        heun = {2 * n - 1: lambda z, _, n=n: sample_ode(teacher, z, n, heun=True) for n in (10, 20)}
        add("teacher, Heun", heun, seconds)
        add("teacher, DPM++ 2M", {n: multistep(teacher, n) for n in (2, 4, 10, 20)}, seconds)
    for name, options in {"DMD2": {}, "DMD2, ratio 1": {"ratio": 1}, "f-distill, js": {"divergence": "js"}}.items():
        if name in methods:
            add(name, *timed(lambda options=options: match(teacher, seeds, **options)))
    if "CTM" in methods:
        add("CTM", *timed(lambda: learn_trajectories(teacher, seeds)))
    if "ReFlow" in methods:
        (samplers, result["straightness"]), seconds = timed(lambda: straighten(teacher, seeds))
        add("ReFlow", samplers, seconds)
    result["settings"] = {
        "seeds": seeds, "tried": TRIED, "teacher": TEACHER, "matching": MATCHING, "trajectory": TRAJECTORY, "reflow": REFLOW
    }  # fmt: skip
    return result
