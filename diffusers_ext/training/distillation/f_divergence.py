r"""One-step diffusion models with f-divergence distribution matching (Xu et al. 2025, arXiv 2502.15681).

For D_f(p || q) = int q f(p / q) the gradient of distribution matching gets a weight for each sample,
    grad = -E_q[ h(r) (score_real - score_fake) dG/dtheta ],     h(r) = r^2 f''(r),     r = p_t / q_t,
with r = exp(logit) of a discriminator between noisy real and noisy generated samples:
    rkl   -ln r                                 1            reverse KL: DMD itself
    kl    r ln r                                r            forward KL: covers all modes
    js    r ln r - (1 + r) ln((1 + r) / 2)      r / (1 + r)  Jensen-Shannon, twice
    sf    (1 + r) ln((1 + r) / (2 r))           1 / (1 + r)  softened reverse KL
    sh    4 (1 - sqrt r)                        sqrt r       squared Hellinger
    jf    (r - 1) ln r                          1 + r        Jeffreys
    neyman  (1 - r)^2 / (2 r)                   1 / r
The ratio is clipped, divided by its mean at similar noise levels, where the discriminator is biased alike, and h by its mean
over the whole batch: it redistributes and does not change the step size.
"""

from collections.abc import Callable, Mapping

import torch

from .checks import check_levels, check_range, check_word


_WEIGHTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "rkl": torch.ones_like,
    "kl": lambda r: r,
    "js": lambda r: r / (1.0 + r),
    "sf": lambda r: 1.0 / (1.0 + r),
    "sh": torch.sqrt,
    "jf": lambda r: 1.0 + r,
    "neyman": lambda r: 1.0 / r,
}
F_DIVERGENCES = tuple(_WEIGHTS)

# Sum over all processes; the identity where there is one.
AllReduce = Callable[[torch.Tensor], torch.Tensor]


def f_weight(divergence: str, ratio: torch.Tensor) -> torch.Tensor:
    """h(r) = r^2 f''(r).

    Args:
        divergence: "rkl", "kl", "js", "sf", "sh", "jf" or "neyman".
        ratio: Density ratios p / q of any shape, above 0.

    Returns:
        Weights of that shape, above 0.

    Raises:
        ValueError: For an unknown divergence.

    Example:
        >>> f_weight("js", torch.tensor([1.0, 3.0])).tolist()
        [0.5, 0.75]
    """
    check_word("divergence", divergence, F_DIVERGENCES)
    return _WEIGHTS[divergence](ratio)


class DensityRatioWeights:
    """From logits of a discriminator to the weights of an f-divergence; remembers the mean ratio at each noise level.

    Args:
        divergence: See `f_weight`.
        bins: Intervals of equal length of the noise level in [0, 1], 1 or more.
        ema_rate: Share of the remembered mean ratio that is kept in an update, in [0, 1); 0 uses the batch alone.
        ratio_range: Lowest and highest ratio, above 0.
        all_reduce: Sums a tensor over all processes, so that their number does not change the weights.

    Raises:
        ValueError: For arguments out of range.

    Example:
        >>> weights = DensityRatioWeights("kl", bins=1)
        >>> weights(torch.tensor([0.0, 0.0]), torch.tensor([0.1, 0.9])).tolist()
        [1.0, 1.0]
    """

    LOGIT_LIMIT = 10.0

    def __init__(
        self,
        divergence: str = "js",
        bins: int = 10,
        ema_rate: float = 0.0,
        ratio_range: tuple[float, float] = (0.1, 20.0),
        all_reduce: AllReduce | None = None,
    ):
        check_word("divergence", divergence, F_DIVERGENCES)
        check_range("bins", bins, 1)
        check_range("ema_rate", ema_rate, 0.0, 1.0, below=True)
        check_range("ratio_range", ratio_range[0], 0.0, ratio_range[1], above=True)
        self.divergence = divergence
        self.ema_rate = ema_rate
        self.ratio_range = ratio_range
        self.all_reduce = all_reduce or (lambda tensor: tensor)
        # NaN: no sample of this noise level yet
        self._means = torch.full((int(bins),), torch.nan, dtype=torch.float64)

    @torch.no_grad()
    def __call__(self, logits: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """Weights of a batch, with mean 1 over all processes.

        Args:
            logits: Logits of "real" for each generated noisy sample, (n,) or (n, heads), of which the mean is taken.
            times: Noise level of each sample in [0, 1], (n,).

        Returns:
            (n,), without graph, in float32.

        Raises:
            ValueError: For shapes that do not fit, levels outside [0, 1] or logits that are not numbers.
        """
        check_levels(logits, times=times)
        if not logits.numel() or not bool(torch.isfinite(logits).all()):
            raise ValueError("logits are empty or not finite; the discriminator has diverged, lower its learning rate")
        if not (0.0 <= float(times.min()) and float(times.max()) <= 1.0):
            raise ValueError(f"times reach from {float(times.min()):g} to {float(times.max()):g}; give them in [0, 1]")
        logit = logits.double().reshape(len(logits), -1).mean(1).clamp(-self.LOGIT_LIMIT, self.LOGIT_LIMIT)
        ratio = logit.exp().clamp(*self.ratio_range)
        ratio = ratio / self._update(ratio, times.double()).to(ratio)
        weight = f_weight(self.divergence, ratio)
        total = self.all_reduce(torch.stack([weight.sum(), weight.new_tensor(float(len(weight)))]))
        return (weight * total[1] / total[0]).float()

    def _update(self, ratio: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        count = len(self._means)
        bins = (times * count).long().clamp(max=count - 1)
        table = torch.zeros(2, count, dtype=torch.float64, device=ratio.device)
        table[0].index_add_(0, bins, ratio)
        table[1].index_add_(0, bins, torch.ones_like(ratio))
        sums, hits = self.all_reduce(table).cpu()
        now = sums / hits
        kept = torch.where(self._means.isnan(), now, torch.lerp(now, self._means, self.ema_rate))
        self._means = torch.where(hits > 0, kept, self._means)
        return self._means[bins.cpu()]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The mean ratio at each noise level, to be saved with the networks."""
        return {"means": self._means.clone()}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Takes over what `state_dict` gave.

        Raises:
            ValueError: If it has another number of bins.
        """
        means = state.get("means")
        if means is None or means.shape != self._means.shape:
            found = "nothing" if means is None else f"{len(means)} bins"
            raise ValueError(f"the saved density ratios have {found}, not {len(self._means)} bins; set bins alike")
        self._means = means.to(self._means).clone()
