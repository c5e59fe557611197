"""A flow model of pictures of 8 pixels whose velocity and posteriors are known, and three inverse problems on it.

x0 ~ sum_k w_k N(m_k, F^T diag(l) F) with F the orthonormal two-dimensional cosine transform of each channel. With x_t = (1 - t) x0 +
t eps and S = (1 - t)^2 l + t^2, in the space of the transform,

    E[x0 | x_t, k] = m_k + (1 - t) l / S (x_t - (1 - t) m_k),   v(x_t) = (x_t - sum_k r_k E[x0 | x_t, k]) / t

with responsibilities r_k of the mixture. For y = A x0 + s n the posterior is a mixture again, with S_y = A C A^T + s^2 and

    E[x0 | y, k] = m_k + C A^T S_y^-1 (y - A m_k)

The mixture is that of the reference vectors in `tests/golden/steering/`.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from diffusers_ext.schedulers import FlowChefScheduler
from diffusers_ext.steering import GaussianBlur, InpaintMask, LinearOperator, MeasurementObjective, SuperResolution
from tests.helpers.golden import golden


SHAPE = (3, 8, 8)
NOISE_STD = 0.05
PICTURES, SAMPLES = 16, 16  # of a task: pictures, and samples for each
# the reference run of the authors' pixel code: eta 0.5, the last of 30 steps free
OFFICIAL = {"data_step": "grad", "learning_rate": 0.5, "renoise": 0.0, "steer_stop": 29 / 30}


def cosine_transform(size: int) -> torch.Tensor:
    """The orthonormal cosine transform (DCT-II), shape (size, size)."""
    place = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi * (2 * place[None] + 1) * place[:, None] / (2 * size)) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


class PictureFlow:
    """The mixture."""

    def __init__(self) -> None:
        data = golden("steering/pixel_inpaint_box4.npz")
        self.means, self.variances = data.tensor("prior_means"), data.tensor("prior_eigvals_dct")
        self.log_weights = data.tensor("prior_logw")
        self.transform = cosine_transform(SHAPE[-1])

    def clean(self, state: torch.Tensor, level: float) -> torch.Tensor:
        """E[x0 | x_t], float64, shape (batch, 3, 8, 8)."""
        spread = (1 - level) ** 2 * self.variances + level**2
        offset = self.transform @ (state.double()[:, None] - (1 - level) * self.means) @ self.transform.mT
        shares = (self.log_weights - 0.5 * (offset.square() / spread).flatten(2).sum(2)).softmax(1)
        parts = (1 - level) * self.variances / spread * offset
        return torch.einsum("bk,bkchw->bchw", shares, self.means + self.transform.mT @ parts @ self.transform)

    def velocity(self, state: torch.Tensor, level: float) -> torch.Tensor:
        """v(x_t) in the dtype of the state."""
        return ((state.double() - self.clean(state, level)) / level).to(state.dtype)

    def sample(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Pictures, float64."""
        which = torch.multinomial(self.log_weights.exp(), count, replacement=True, generator=generator)
        noise = torch.randn(count, *SHAPE, dtype=torch.float64, generator=generator)
        return self.means[which] + self.transform.mT @ (self.variances.sqrt() * noise) @ self.transform

    def posterior_mean(self, operator: LinearOperator, measurement: torch.Tensor, noise_std: float) -> torch.Tensor:
        """E[x0 | y], float64, shape (batch, 3, 8, 8)."""
        size = math.prod(SHAPE)
        matrix = operator.A(torch.eye(size, dtype=torch.float64).reshape(size, *SHAPE)).flatten(1).mT
        known = matrix.abs().sum(1) > 0
        matrix = matrix[known]
        basis = torch.block_diag(*[torch.kron(self.transform, self.transform)] * SHAPE[0])
        covariance = basis.mT @ (self.variances.reshape(-1, 1) * basis)
        spread = matrix @ covariance @ matrix.mT + noise_std**2 * torch.eye(len(matrix), dtype=torch.float64)
        offset = measurement.double().flatten(1)[:, None, known] - self.means.flatten(1) @ matrix.mT
        solved = torch.linalg.solve(spread, offset.mT).mT
        shares = (self.log_weights - 0.5 * (offset * solved).sum(-1)).softmax(1)
        parts = self.means.flatten(1) + solved @ (matrix @ covariance)
        return torch.einsum("bk,bkn->bn", shares, parts).reshape(-1, *SHAPE)


@dataclass(frozen=True)
class Quality:
    """How good samples of a task are.

    Attributes:
        psnr (`float`): Of a sample against the truth, mean over all, for a range of 2.
        mean_error (`float`): Root mean square distance of the samples' mean from that of the posterior.
        residual (`float`): Root mean square of A x - y, in units of the noise.
    """

    psnr: float
    mean_error: float
    residual: float


@dataclass(frozen=True)
class Task:
    """An inverse problem: pictures, their measurements, and the exact posterior means."""

    operator: LinearOperator
    truth: torch.Tensor
    measurement: torch.Tensor
    posterior_mean: torch.Tensor

    @property
    def repeated(self) -> torch.Tensor:
        """The measurement of every sample, float32."""
        return self.measurement.repeat_interleave(SAMPLES, 0).float()

    def quality(self, samples: torch.Tensor) -> Quality:
        """Of samples in the order of `repeated`."""
        grouped = samples.double().reshape(PICTURES, SAMPLES, *SHAPE)
        errors = (grouped - self.truth[:, None]).square().flatten(2).mean(2)
        residual = self.operator.A(grouped) - self.measurement[:, None]
        if isinstance(self.operator, InpaintMask):
            residual = residual[..., self.operator.mask > 0]
        return Quality(
            psnr=float((10 * torch.log10(4 / errors)).mean()),
            mean_error=float((grouped.mean(1) - self.posterior_mean).square().mean().sqrt()),
            residual=float(residual.square().mean().sqrt()) / NOISE_STD,
        )


def box_mask() -> torch.Tensor:
    """1 but for the four by four pixels in the middle."""
    mask = torch.ones(SHAPE[1:], dtype=torch.float64)
    mask[2:6, 2:6] = 0
    return mask


@cache
def picture_flow() -> PictureFlow:
    return PictureFlow()


@cache
def tasks() -> dict[str, Task]:
    """Inpainting of a box, doubling of the resolution, and deblurring, on the same pictures."""
    flow, generator = picture_flow(), torch.Generator().manual_seed(0)
    truth, found = flow.sample(PICTURES, generator), {}
    operators: dict[str, LinearOperator] = {
        "inpainting": InpaintMask(box_mask()),
        "super-resolution": SuperResolution(2),
        "deblurring": GaussianBlur(5, 1.0, padding="zeros"),
    }
    for name, operator in operators.items():
        clean = operator.A(truth)
        noise = NOISE_STD * torch.randn(clean.shape, dtype=torch.float64, generator=generator)
        measurement = clean + (operator.A(noise) if isinstance(operator, InpaintMask) else noise)
        found[name] = Task(operator, truth, measurement, flow.posterior_mean(operator, measurement, NOISE_STD))
    return found


def run(scheduler: Any, steps: int, start: torch.Tensor, **arguments: Any) -> torch.Tensor:
    """A run of a scheduler on the flow."""
    flow = picture_flow()
    scheduler.set_timesteps(steps)
    state = start
    for index, timestep in enumerate(scheduler.timesteps):
        velocity = flow.velocity(state, float(scheduler.sigmas[index]))
        state = scheduler.step(velocity, timestep, state, **arguments).prev_sample
    return state


def steered(
    scheduler: Any, operator: LinearOperator, measurement: torch.Tensor, start: torch.Tensor, steps: int
) -> torch.Tensor:
    """A run of a scheduler towards a measurement."""
    objective = MeasurementObjective(operator, measurement, noise_std=NOISE_STD)
    scheduler.set_objective(objective, generator=torch.Generator().manual_seed(2))
    return run(scheduler, steps, start)


@cache
def quality(
    name: str, cls: type = FlowChefScheduler, steps: int = 30, settings: tuple[tuple[str, Any], ...] = ()
) -> Quality:
    """Of a scheduler class with settings, in a task."""
    task = tasks()[name]
    return task.quality(steered(cls(**dict(settings)), task.operator, task.repeated, start_noise(), steps))


def start_noise(seed: int = 1) -> torch.Tensor:
    """One start for each sample of a task."""
    return torch.randn(PICTURES * SAMPLES, *SHAPE, generator=torch.Generator().manual_seed(seed))
