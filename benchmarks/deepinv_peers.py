"""The posterior samplers of deepinv on the problems of `steering.py`: `python benchmarks/deepinv_peers.py`.

deepinv (https://deepinv.github.io) is no dependency. It imports torchvision, so that it needs an environment of its own beside PyTorch for
the CPU; both from one index fit each other:

    python -m venv deepinv-env
    deepinv-env/bin/pip install --index-url https://download.pytorch.org/whl/cpu torch==2.8.0 torchvision==0.23.0
    deepinv-env/bin/pip install deepinv==0.5.0 -e .
    deepinv-env/bin/python benchmarks/deepinv_peers.py

The operators are ours with `deepinv.physics.LinearPhysics` around them, the flow is the analytic one, 30 evaluations a sample: 29 steps of
Euler's method on the probability-flow equation from t = 0.99 to 0.001, and the denoising that deepinv ends with. Writes
`benchmarks/results/steering_deepinv.json`; `steering.py --page-only` brings it into `docs/flowchef.md`.
"""

import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from common import write_result

from tests.analytic.steering import NOISE_STD, PICTURES, SAMPLES, SHAPE, Task, picture_flow, tasks


try:
    import deepinv
    from deepinv import sampling
except ImportError as error:
    raise SystemExit(f"deepinv cannot be imported ({error}); see the head of this file for an environment") from error


EVALUATIONS = 30


class FlowDenoiser(deepinv.models.Denoiser):
    """E[x0 | x0 + sigma n], from the flow at t = sigma / (1 + sigma)."""

    def forward(self, x: torch.Tensor, sigma: Any, **kwargs: Any) -> torch.Tensor:
        level = float(torch.as_tensor(sigma).flatten()[0])
        level = level / (1 + level)
        return picture_flow().clean((1 - level) * x, level).to(x.dtype)


# what a row is called -> makes the term of the data, of which the better settings by PSNR are reported, and passes backwards a step
TERMS: Mapping[str, tuple[list[Any], str]] = {
    "DPS": ([lambda weight=weight: sampling.DPSDataFidelity(weight=weight) for weight in (1.0, 10.0)], "1"),
    "DPS, annealed": ([lambda: sampling.DPSDataFidelity(guidance="annealed")], "1"),
    "ALD": ([sampling.ALDDataFidelity], "0"),
    "PiGDM": ([lambda count=count: sampling.PiGDMDataFidelity(cg_max_iter=count) for count in (3, 50)], "1"),
    "MomentMatching": ([lambda count=count: sampling.MomentMatchingDataFidelity(cg_max_iter=count) for count in (3, 50)], "4 or more"),
}  # fmt: skip


def posterior_samples(task: Task, term: Any) -> torch.Tensor:
    """Samples (PICTURES * SAMPLES, *SHAPE)."""
    physics = deepinv.physics.LinearPhysics(
        A=lambda x, **_: task.operator.A(x),
        A_adjoint=lambda y, **_: task.operator.adjoint(y),
        noise_model=deepinv.physics.GaussianNoise(NOISE_STD),
    )
    times = torch.linspace(0.99, 1e-3, EVALUATIONS)
    sampler = sampling.PosteriorDiffusion(
        data_fidelity=term, denoiser=FlowDenoiser(), sde=sampling.FlowMatching(dtype=torch.float32),
        solver=sampling.EulerSolver(timesteps=times, rng=torch.Generator()), dtype=torch.float32, minus_one_one=False,
    )  # fmt: skip
    return sampler(task.repeated, physics, x_init=(PICTURES * SAMPLES, *SHAPE), seed=2).detach()


def main() -> None:
    torch.set_num_threads(1)
    figures: dict[str, Any] = {}
    for name, (makers, backward) in TERMS.items():
        runs, began = [], time.perf_counter()
        for make in makers:
            runs.append({title: task.quality(posterior_samples(task, make())) for title, task in tasks().items()})
        scores = [sum(max(quality.psnr, 0.0) for quality in one.values()) for one in runs]
        best = runs[scores.index(max(scores))]
        cells = {title: asdict(quality) for title, quality in best.items()}
        figures[name] = {"backward": backward, "tried": len(makers), "tasks": cells}
        print(name, {k: {m: round(v, 3) for m, v in one.items()} for k, one in cells.items()}, flush=True)
        print(f"{time.perf_counter() - began:.0f} s", flush=True)
    write_result("steering_deepinv", {"version": deepinv.__version__, "rows": figures})


if __name__ == "__main__":
    main()
