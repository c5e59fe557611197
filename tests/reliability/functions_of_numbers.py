"""Measures and weights under the fuzzer: functions of tensors and numbers that touch no file and no model."""

import torch

from diffusers_ext.metrics import coverage, frechet_distance, gmsd, magnitude_score, psnr, sliced_wasserstein, ssim
from diffusers_ext.schedulers.adams_bashforth import ghvb_weights, stability_limit
from diffusers_ext.sequence_metrics import jitter_ratio, power_spectrum, r_squared, seam_ratio, spectrum_error

from .registry import INF, NAN, Argument, Function, Made
from .values import NOT_COUNTS, NOT_NUMBERS


def _pictures(*shape: int) -> Made:
    return Made(f"<pictures {shape}>", lambda rng: 2.0 * torch.rand(*shape) - 1.0)


NOT_TENSORS = (None, 5, "x", [], [[1.0]], {}, object)
IMAGES = Argument(
    good=[_pictures(2, 3, 16, 16)],
    bad=[
        *NOT_TENSORS, torch.zeros(3, 16, 16), torch.zeros(2, 3, 16, 15), torch.zeros(0, 3, 16, 16),
        torch.full((2, 3, 16, 16), NAN), torch.full((2, 3, 16, 16), INF), torch.zeros(2, 3, 16, 16, dtype=torch.uint8),
    ],
)  # fmt: skip
# of another wrong shape, since two wrong ones may be equal
REFERENCES = Argument(good=IMAGES.good, bad=[*NOT_TENSORS, torch.zeros(2, 3, 15, 16), torch.full((2, 3, 16, 16), NAN)])
MASKS = Argument(
    good=[None, torch.ones(2, 1, 16, 16)],
    bad=[
        5,
        "x",
        [],
        object,
        torch.ones(2, 1, 8, 8),
        torch.ones(16, 16),
        torch.full((2, 1, 16, 16), NAN),
        torch.ones(2, 1, 16, 16).bool(),
    ],
)
LATENTS = Argument(
    good=[_pictures(2, 4, 8, 8), _pictures(1, 4, 5, 4)],
    bad=[
        *NOT_TENSORS,
        torch.zeros(2, 4, 3, 8),
        torch.zeros(2, 3, 8, 8),
        torch.zeros(4),
        torch.full((1, 4, 8, 8), NAN),
    ],
)
POINTS = Argument(
    good=[_pictures(5, 3), _pictures(9, 3)],
    bad=[
        *NOT_TENSORS,
        torch.zeros(5),
        torch.zeros(5, 2),
        torch.zeros(0, 3),
        torch.full((5, 3), NAN),
        torch.zeros(5, 3).long(),
    ],
)
SEQUENCES = Argument(
    good=[_pictures(2, 40, 3), _pictures(40, 3)],
    bad=[
        *NOT_TENSORS,
        torch.zeros(40),
        torch.zeros(1, 2, 40, 3),
        torch.zeros(0, 40, 3),
        torch.zeros(2, 3),
        torch.full((40, 3), NAN),
        torch.full((40, 3), INF),
        torch.zeros(40, 3).long(),
    ],
)
RECORDINGS = Argument(
    good=[_pictures(40, 3)], bad=[*NOT_TENSORS, torch.zeros(40, 3), torch.ones(39, 3), torch.full((40, 3), NAN)]
)
WINDOWS = Argument(good=[4, 8, 40], bad=[*NOT_COUNTS, 7, 42])
ORDERS = Argument(good=[1, 2, 4, 8], bad=[*NOT_COUNTS, 9])
DAMPINGS = Argument(good=[1.0, 0.5, 1, 0.01], bad=[*NOT_NUMBERS, 0, -0.5, 1.01, True])

FUNCTIONS_OF_NUMBERS: tuple[Function, ...] = (
    Function("psnr", psnr, {"images": IMAGES, "reference": REFERENCES, "mask": MASKS}),
    Function("ssim", ssim, {"images": IMAGES, "reference": REFERENCES, "mask": MASKS}),
    Function("gmsd", gmsd, {"images": IMAGES, "reference": REFERENCES}),
    Function("magnitude_score", magnitude_score, {
        "latents": LATENTS,
        "means": Argument(good=[(0.0,) * 4, [1, 2, 3, 4]], bad=[None, 5, "abcd", (), (0.0,) * 3, (NAN,) * 4, [[0.0]] * 4, object]),
        "standard_deviations": Argument(good=[(1.0,) * 4], bad=[None, 5, "abcd", (), (0.0,) * 4, (-1.0,) * 4, (NAN,) * 4, object]),
        "threshold": Argument(good=[3.0, 0, 100], bad=[*NOT_NUMBERS, -1.0, True]),
    }),
    Function("sliced_wasserstein", sliced_wasserstein, {
        "samples": POINTS, "reference": POINTS,
        "projections": Argument(good=[1, 16], bad=[value for value in NOT_COUNTS if value not in (2**31, 10**30)]),
        "generator": Argument(good=[None, torch.Generator()], bad=[5, "x", [], object]),
    }),
    Function("coverage", coverage, {
        "samples": POINTS, "reference": POINTS,
        "neighbours": Argument(good=[1, 4], bad=[*NOT_COUNTS, 9]),
    }),
    Function("frechet_distance", frechet_distance, {"features": POINTS, "reference": POINTS}),
    Function("r_squared", r_squared, {"samples": SEQUENCES, "recording": RECORDINGS}),
    Function("jitter_ratio", jitter_ratio, {"samples": SEQUENCES, "recording": RECORDINGS}),
    Function("seam_ratio", seam_ratio, {
        "samples": SEQUENCES, "chunk": Argument(good=[2, 4, 39], bad=[*NOT_COUNTS, 1, 40]),
        "first": Argument(good=[0, 1, -3, 10**30], bad=[*NOT_NUMBERS, 0.5, True]),
    }),
    Function("power_spectrum", power_spectrum, {"samples": SEQUENCES, "window": WINDOWS}),
    Function("spectrum_error", spectrum_error, {"samples": SEQUENCES, "recording": RECORDINGS, "window": WINDOWS}),
    Function("ghvb_weights", ghvb_weights, {"order": ORDERS, "damping": DAMPINGS}),
    Function("stability_limit", stability_limit, {
        "order": ORDERS, "damping": DAMPINGS,
        "momentum_type": Argument(good=["ghvb", "hb", "none"], bad=["nesterov", "GHVB", "", None, 5, [], object]),
    }),
)  # fmt: skip
