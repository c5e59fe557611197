r"""Distribution matching distillation (Yin et al. 2023, arXiv 2311.18828) and DMD2 (Yin et al. 2024, arXiv 2405.14867).

A generator x = G(z) is noised to x_t = a x + s eps; D_real and D_fake are the clean samples that the teacher and a network
trained on the generator's own output predict there. With the score (a D - x_t) / s^2 of each,
    d/dtheta KL(q_t || p_t) = E[ a (score_fake - score_real) dG/dtheta ] = E[ a^2 / s^2 (D_fake - D_real) dG/dtheta ].
Training uses the direction with a scale of its own, so that all noise levels count alike:
    g = (D_fake - D_real) / w,     w = mean |x - D_real| over each sample.
The loss 1/2 mean((x - stop(x - g))^2) has the value of no interest and the gradient g / numel.

Regularised distribution matching (RDMD) adds lambda E c(x_s, G(x_s)) for a generator that starts from a source sample x_s:
lambda -> 0 tends to the optimal transport map, lambda -> infinity to the identity. For N(a, s0^2) -> N(mu, tau^2) and a
linear generator the optimum is a formula (`gaussian_translator`).
"""

import math

import torch

from ..objectives import per_sample
from .checks import check_levels, check_range, check_same_shape, check_word
from .lcm import solver_timesteps


# dmd2: as its authors wrote it; epsilon: w + 1e-6 (FastGen); clamp: at least 0.1 (CDM)
NORMALIZERS = ("dmd2", "epsilon", "clamp")
_EPSILON, _FLOOR = 1e-6, 0.1


def kl_gradient(real: torch.Tensor, fake: torch.Tensor, signal: torch.Tensor, spread: torch.Tensor) -> torch.Tensor:
    """Gradient of KL(q_t || p_t) with respect to the generator's output, for one draw of the noise.

    Args:
        real: Clean samples predicted by the teacher (n, ...).
        fake: Clean samples predicted by the network of the generator's distribution, same shape.
        signal: Signal level a of each sample (n,).
        spread: Noise level s of each sample (n,), above 0.

    Returns:
        a^2 / s^2 (D_fake - D_real), (n, ...).
    """
    check_same_shape(real=real, fake=fake)
    check_levels(real, signal=signal, spread=spread)
    return (per_sample(signal, real) / per_sample(spread, real)).square() * (fake - real)


def normalizer_of(clean: torch.Tensor, real: torch.Tensor, kind: str = "dmd2") -> torch.Tensor:
    """Scale w of each sample, the mean distance of the generator's output from what the teacher makes of it.

    Args:
        clean: Output of the generator (n, ...).
        real: Clean samples predicted by the teacher, same shape.
        kind: "dmd2" is the mean itself, "epsilon" adds 1e-6, "clamp" keeps it at 0.1 or more.

    Returns:
        (n,) in float32 or better.
    """
    check_word("normalizer", kind, NORMALIZERS)
    check_same_shape(clean=clean, real=real)
    exact = torch.promote_types(clean.dtype, torch.float32)
    mean = (clean.detach().to(exact) - real.to(exact)).abs().flatten(1).mean(1)
    if kind == "clamp":
        return mean.clamp(min=_FLOOR)
    return mean + _EPSILON if kind == "epsilon" else mean


def dmd_gradient(
    clean: torch.Tensor,
    real: torch.Tensor,
    fake: torch.Tensor,
    normalizer: str = "dmd2",
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Normalised direction in which the generator's output is worse.

    Args:
        clean: Output of the generator (n, ...).
        real: Clean samples predicted by the teacher from noisy `clean`, same shape, with guidance if wanted.
        fake: Clean samples predicted by the fake-score network from the same noisy samples, without guidance.
        normalizer: See `normalizer_of`.
        weight: Weight of each sample (n,), e.g. of `f_weight`; `None` weighs all alike: reverse KL.

    Returns:
        g (n, ...), without graph. A sample on which generator and teacher agree to the bit has gradient 0.

    Raises:
        ValueError: For shapes that do not fit or an unknown normaliser.

    Example:
        >>> x, real, fake = torch.zeros(1, 2), torch.tensor([[1.0, -1.0]]), torch.zeros(1, 2)
        >>> dmd_gradient(x, real, fake).tolist()
        [[-1.0, 1.0]]
    """
    check_same_shape(clean=clean, real=real, fake=fake)
    scale = normalizer_of(clean, real, normalizer)
    difference = fake.detach().to(scale.dtype) - real.detach().to(scale.dtype)
    gradient = torch.nan_to_num(difference / per_sample(scale, difference), nan=0.0, posinf=0.0, neginf=0.0)
    if weight is not None:
        check_levels(clean, weight=weight)
        gradient = per_sample(weight.detach(), gradient) * gradient
    return gradient


def surrogate_loss(clean: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """A scalar whose gradient with respect to `clean` is `gradient / clean.numel()`.

    Args:
        clean: Output of the generator (n, ...), with its graph.
        gradient: From `dmd_gradient`, same shape.

    Returns:
        1/2 mean(gradient^2), a measure of how far the two networks are apart.
    """
    check_same_shape(clean=clean, gradient=gradient)
    clean = clean.to(gradient.dtype)
    return 0.5 * (clean - (clean - gradient).detach()).square().mean()


def few_step_timesteps(steps: int, num_train_timesteps: int = 1000) -> list[int]:
    """Timesteps of a generator of a few steps, from the noisiest on: those of `LCMScheduler` with as many original steps.

    Args:
        steps: Number of steps, from 1 to `num_train_timesteps`.
        num_train_timesteps: Length of the training schedule.

    Example:
        >>> few_step_timesteps(4)
        [999, 749, 499, 249]
    """
    check_range("num_denoising_steps", steps, 1, num_train_timesteps)
    return solver_timesteps(num_train_timesteps, steps).flip(0).tolist()


def transport_cost(source: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """Cost of moving each source sample to the generator's output: mean squared distance.

    Args:
        source: Source samples (n, ...), or features of them.
        output: What the generator made of them, same shape.

    Returns:
        (n,). It is a mean over the elements of a sample, as `surrogate_loss` is: their ratio does not depend on the size.
    """
    check_same_shape(source=source, output=output)
    return (output - source).square().flatten(1).mean(1)


def gaussian_translator(
    mean: float, deviation: float, wanted_mean: float, wanted_deviation: float, transport_lambda: float
) -> tuple[float, float]:
    """Minimiser of KL(G # N(a, s0^2) || N(mu, tau^2)) + lambda E (x - G(x))^2 over G(x) = m + b (x - a).

    Args:
        mean: a of the source.
        deviation: s0 of the source, above 0.
        wanted_mean: mu of the target.
        wanted_deviation: tau of the target, above 0.
        transport_lambda: lambda, 0 or more.

    Returns:
        m and b. At lambda = 0 the slope is tau / s0, the optimal transport map.
    """
    check_range("deviation", deviation, 0.0, above=True)
    check_range("wanted_deviation", wanted_deviation, 0.0, above=True)
    check_range("transport_lambda", transport_lambda, 0.0)
    precision = wanted_deviation**-2
    shift = (wanted_mean * precision + 2 * transport_lambda * mean) / (precision + 2 * transport_lambda)
    # s0^2 (1/tau^2 + 2 lambda) b^2 - 2 lambda s0^2 b - 1 = 0
    pull, quadratic = 2 * transport_lambda * deviation**2, deviation**2 * (precision + 2 * transport_lambda)
    return shift, (pull + math.sqrt(pull**2 + 4 * quadratic)) / (2 * quadratic)
