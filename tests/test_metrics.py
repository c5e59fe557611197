import math

import numpy as np
import pytest
import torch

from diffusers_ext.metrics import psnr, ssim


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


@pytest.mark.parametrize("measure", [psnr, ssim])
def test_broadcastable_shapes_are_refused(measure):
    with pytest.raises(ValueError, match=r"images \(1, 1, 16, 16\) and reference \(1, 3, 16, 16\) must both"):
        measure(torch.zeros(1, 1, 16, 16), torch.zeros(1, 3, 16, 16))
