import math

import numpy as np
import pytest
import torch

from diffusers_ext.metrics import (
    COCO_MEANS,
    COCO_STANDARD_DEVIATIONS,
    coverage,
    frechet_distance,
    gmsd,
    magnitude_score,
    psnr,
    sliced_wasserstein,
    ssim,
)


def test_psnr_of_a_constant_error_is_its_closed_form():
    reference = torch.rand(2, 3, 16, 16) * 0.5
    expected = torch.full((2,), -20 * math.log10(0.05)).double()
    assert torch.allclose(psnr(reference + 0.1, reference), expected, atol=1e-4)
    assert torch.isinf(psnr(reference, reference)).all()


def test_a_mask_leaves_out_what_it_does_not_cover():
    reference = torch.zeros(1, 3, 8, 8)
    images = reference.clone()
    images[..., 4:] = 0.5
    left = torch.zeros(1, 1, 8, 8)
    left[..., :4] = 1
    assert torch.isinf(psnr(images, reference, left)).all()
    assert psnr(images, reference, 1 - left).item() == pytest.approx(-20 * math.log10(0.25))


def test_ssim_agrees_with_a_direct_evaluation_of_its_definition():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, 1, 1, 13, 12, generator=generator, dtype=torch.float64)
    a, b = x[0, 0].numpy(), y[0, 0].numpy()
    ramp = np.exp(-0.5 * ((np.arange(11) - 5) / 1.5) ** 2)
    window = np.outer(ramp, ramp) / ramp.sum() ** 2
    values = []
    for i in range(3):
        for j in range(2):
            p, q = a[i : i + 11, j : j + 11], b[i : i + 11, j : j + 11]
            mp, mq = (window * p).sum(), (window * q).sum()
            vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
            cov = (window * (p - mp) * (q - mq)).sum()
            values.append((2 * mp * mq + 1e-4) * (2 * cov + 9e-4) / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))
    assert ssim(x * 2 - 1, y * 2 - 1).item() == pytest.approx(np.mean(values), abs=1e-12)
    assert ssim(x, x).item() == pytest.approx(1.0)


def test_ssim_under_a_mask_is_the_mean_over_the_windows_centred_there():
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.rand(1, 3, 24, 24, generator=generator) * 2 - 1 for _ in range(2))
    everywhere = torch.ones(1, 1, 24, 24)
    assert torch.allclose(ssim(x, y, everywhere), ssim(x, y))
    # one window: the value of the picture cut to it
    one = torch.zeros(1, 1, 24, 24)
    one[..., 9, 13] = 1
    assert torch.allclose(ssim(x, y, one), ssim(x[..., 4:15, 8:19], y[..., 4:15, 8:19]))
    halves = [torch.where(torch.arange(24) < 12, a, 1 - a).expand(1, 1, 24, 24) for a in (0.0, 1.0)]
    assert torch.allclose(sum(ssim(x, y, half) for half in halves) / 2, ssim(x, y))


def test_ssim_without_a_window_in_the_mask_is_nan():
    x = torch.zeros(1, 3, 24, 24)
    corner = torch.zeros(1, 1, 24, 24)
    corner[..., :5, :5] = 1
    assert ssim(x, x, corner).isnan().all()


@pytest.mark.parametrize("measure", [psnr, ssim])
def test_broadcastable_shapes_are_refused(measure):
    with pytest.raises(ValueError, match=r"images \(1, 1, 16, 16\) and reference \(1, 3, 16, 16\) must both"):
        measure(torch.zeros(1, 1, 16, 16), torch.zeros(1, 3, 16, 16))


def test_magnitude_score_is_the_mean_of_the_peaks_that_reach_the_threshold():
    means, deviations = torch.tensor(COCO_MEANS), torch.tensor(COCO_STANDARD_DEVIATIONS)
    latents = means[:, None, None].repeat(2, 1, 9, 8)  # the ninth row fills no patch
    latents[0, 1, 2, 3] -= 5 * deviations[1]
    latents[0, 2, 3, 3] += 4 * deviations[2]  # in the same patch, smaller
    latents[0, 0, 5, 5] += 2.9 * deviations[0]  # below the threshold
    latents[0, 3, 8, 0] += 100 * deviations[3]  # in the row that fills no patch
    latents[1, 3, 7, 7] += 3.5 * deviations[3]
    assert torch.allclose(magnitude_score(latents), torch.tensor([5 / 4, 3.5 / 4]).double(), atol=1e-5)


def test_magnitude_score_of_gaussian_latents_is_its_expectation():
    # The largest of 64 absolute normal values: E[m; m >= 3] by numerical integration of its distribution.
    grid = torch.linspace(3.0, 9.0, 20001, dtype=torch.float64)
    share_below = torch.special.erf(grid / math.sqrt(2)) ** 64
    expected = 3.0 * (1 - share_below[0]) + torch.trapezoid(1 - share_below, grid)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(64, 4, 64, 64, generator=generator) * torch.tensor(COCO_STANDARD_DEVIATIONS)[:, None, None]
    latents += torch.tensor(COCO_MEANS)[:, None, None]
    assert magnitude_score(latents).mean().item() == pytest.approx(expected.item(), rel=0.03)


def test_sliced_wasserstein_of_a_moved_set_is_its_closed_form():
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(50, 4, 5, generator=generator)
    move = torch.randn(4, 5, generator=generator)
    expected = move.double().norm().item() / math.sqrt(20)
    assert sliced_wasserstein(samples, samples + move, 20_000).item() == pytest.approx(expected, rel=0.02)
    assert sliced_wasserstein(samples, samples[torch.randperm(50)]).item() == pytest.approx(0, abs=1e-12)


def test_sliced_wasserstein_of_gaussians_is_the_difference_of_their_spreads():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(20_000, 2, generator=generator), 3 * torch.randn(15_000, 2, generator=generator)
    assert sliced_wasserstein(first, second, 64).item() == pytest.approx(2.0, rel=0.03)
    # In one dimension nothing is random: the distance is that of the sorted values.
    assert sliced_wasserstein(torch.tensor([[0.0], [4.0]]), torch.tensor([[1.0], [1.0]])).item() == pytest.approx(
        math.sqrt(5)
    )


def test_measures_of_sets_and_latents_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="latents of shape"):
        magnitude_score(torch.zeros(1, 4, 3, 8))
    with pytest.raises(ValueError, match="one number for each of the 3 channels"):
        magnitude_score(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="samples"):
        sliced_wasserstein(torch.zeros(3, 2), torch.zeros(3, 3))
    with pytest.raises(ValueError, match="projections=0"):
        sliced_wasserstein(torch.zeros(3, 2), torch.zeros(3, 2), 0)


def test_gmsd_of_a_ramp_has_its_closed_form():
    # A ramp, and the same ramp that stops in the middle. Of means of two pixels, over two of them: 4 / 64, and 0 in the right half.
    ramp = torch.arange(64.0).expand(1, 3, 64, 64) / 64 * 2 - 1
    stopped = ramp.clone()
    stopped[..., 32:] = stopped[..., 31:32]
    kept = torch.tensor([4.0] * 14 + [2.5, 0.5] + [0.0] * 14, dtype=torch.float64) / 64
    slope, c = 4 / 64, 170 / 255**2
    similarity = (2 * slope * kept + c) / (slope**2 + kept**2 + c)
    assert gmsd(stopped, ramp).item() == pytest.approx(similarity.std(correction=0).item(), rel=1e-9)


def test_gmsd_is_zero_for_equal_pictures_and_grows_with_blur():
    generator = torch.Generator().manual_seed(0)
    reference = torch.rand(2, 3, 32, 32, generator=generator) * 2 - 1
    assert gmsd(reference, reference).tolist() == [0.0, 0.0]
    less, more = (torch.nn.functional.avg_pool2d(reference, k, 1, k // 2) for k in (3, 7))
    assert bool((gmsd(more, reference) > gmsd(less, reference)).all() and (gmsd(less, reference) > 0.01).all())
    with pytest.raises(ValueError, match="give three channels"):
        gmsd(reference[:, :1], reference[:, :1])


def test_frechet_distance_is_that_of_scipy_s_matrix_root():
    linalg = pytest.importorskip("scipy.linalg")
    generator = torch.Generator().manual_seed(5)
    first = (
        torch.randn(60, 4, generator=generator, dtype=torch.float64) @ torch.randn(4, 4, generator=generator).double()
    )
    second = torch.randn(90, 4, generator=generator, dtype=torch.float64) + 0.5
    one, two = (np.cov(value.numpy(), rowvar=False) for value in (first, second))
    moved = ((first.mean(0) - second.mean(0)) ** 2).sum().item()
    expected = moved + np.trace(one + two - 2 * linalg.sqrtm(one @ two).real)
    assert frechet_distance(first, second).item() == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(second, first).item() == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_of_one_dimension_is_that_of_means_and_deviations():
    first, second = torch.tensor([[0.0], [2.0]]), torch.tensor([[5.0], [5.0]])
    assert frechet_distance(first, second).item() == pytest.approx(16 + 2)
    assert frechet_distance(first, first).item() == pytest.approx(0, abs=1e-12)


def test_frechet_distance_refuses_sets_that_do_not_fit():
    for wrong in (torch.zeros(3, 2), torch.zeros(3, 3, 1), torch.zeros(1, 3)):
        with pytest.raises(ValueError, match="features"):
            frechet_distance(wrong, torch.zeros(4, 3))


def test_coverage_counts_the_points_whose_ball_holds_a_sample():
    line = torch.arange(10.0)[:, None]
    assert coverage(line, line, 1).item() == 1.0
    assert coverage(line[:1], line, 1).item() == pytest.approx(0.2)
    # balls of the second neighbour: 2 at the ends, 1 inside; a sample on the edge counts
    assert coverage(torch.tensor([[2.0], [50.0]]), line, 2).item() == pytest.approx(0.4)
    assert coverage(torch.tensor([[2.5]]), line, 1).item() == pytest.approx(0.2)
    assert coverage(line + 100.0, line, 5).item() == 0.0


def test_coverage_of_two_sets_of_one_distribution_is_that_of_the_paper():
    # a ball of the k-th neighbour holds none of n samples with probability prod_{i<k} (m - 1 - i) / (n + m - 1 - i)
    generator = torch.Generator().manual_seed(0)
    n = m = 1_500
    for k in (1, 3):
        missed = math.prod((m - 1 - i) / (n + m - 1 - i) for i in range(k))
        sets = torch.randn(2, n, 4, generator=generator, dtype=torch.float64)
        assert coverage(*sets, k).item() == pytest.approx(1.0 - missed, abs=0.03)


def test_coverage_falls_with_a_mode_that_is_left_out():
    generator = torch.Generator().manual_seed(1)
    both = torch.randn(400, 2, generator=generator) + torch.tensor([[0.0, 0.0], [50.0, 0.0]]).repeat(200, 1)
    assert coverage(both[::2].repeat(2, 1), both).item() == pytest.approx(0.5)


def test_coverage_refuses_what_does_not_fit():
    points = torch.zeros(5, 2)
    with pytest.raises(ValueError, match=r"samples \(5, 3\) and reference \(5, 2\) must be"):
        coverage(torch.zeros(5, 3), points)
    with pytest.raises(ValueError, match="neighbours=5 is out of range; use an int from 1 to 4"):
        coverage(points, points, 5)
    with pytest.raises(ValueError, match="neighbours=True"):
        coverage(points, points, True)
