"""gamma against its definition, its limits, and the authors' values."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusers_ext.guidance import NormRescaler, rescale_factor, sample_norm


norms = st.floats(min_value=0.0, max_value=1e10, width=32)
bounds = st.tuples(st.floats(0.0, 5.0, width=32), st.floats(0.0, 5.0, width=32)).map(sorted)


@given(guidance=norms, reference=st.floats(2.0**-30, 2.0**30, width=32), bounds=bounds)
def test_the_scaled_norm_lies_between_the_bounds(guidance, reference, bounds):
    gamma = rescale_factor(torch.tensor([guidance]), torch.tensor([reference]), *bounds)
    assert math.isfinite(gamma.item())
    if guidance > 1e-20:
        ratio = gamma.item() * guidance / reference
        assert bounds[0] * (1 - 1e-4) <= ratio <= bounds[1] * (1 + 1e-4)
    elif guidance == 0:
        assert gamma.item() == 1.0


def test_a_ratio_between_the_bounds_is_left_alone():
    gamma, guidance, reference = NormRescaler(0.33, 3.0)(torch.full((2, 4), 2.0), torch.ones(2, 4))
    assert gamma.tolist() == [1.0, 1.0] and guidance.tolist() == [4.0, 4.0] and reference.tolist() == [2.0, 2.0]


def test_no_gradient_gives_one_and_no_reference_counts_as_equal():
    zero, one = torch.zeros(1), torch.ones(1)
    assert rescale_factor(zero, one, 0.33, 3.0).item() == 1.0
    assert rescale_factor(zero, zero, 1.5, 1.5).item() == 1.0
    assert rescale_factor(one, zero, 0.33, 3.0).item() == 1.0
    assert rescale_factor(one, zero, 1.5, 1.5).item() == 1.5


def test_open_bounds_change_nothing():
    gamma, _, _ = NormRescaler(0, float("inf"))(torch.randn(5, 4, 8, 8) * 1e6, torch.randn(5, 4, 8, 8))
    assert gamma.tolist() == [1.0] * 5


def test_samples_do_not_see_each_other():
    sizes = torch.tensor([1e-3, 1.0, 9.0, 1e3]).view(4, 1, 1, 1)
    guidance, reference = torch.randn(4, 4, 8, 8) * sizes, torch.randn(4, 4, 8, 8)
    rescale = NormRescaler()
    alone = torch.cat([rescale(guidance[i : i + 1], reference[i : i + 1])[0] for i in range(4)])
    torch.testing.assert_close(rescale(guidance, reference)[0], alone)


def test_norms_are_float32_also_in_half_precision():
    # The sum of squares is 2.6e6, far beyond the largest float16.
    norm = sample_norm(torch.full((1, 4, 8, 8), 100.0, dtype=torch.float16))
    assert norm.dtype == torch.float32 and norm.item() == 1600.0


@pytest.mark.parametrize("name", ["nonstyle", "nonstyle_weak"])
def test_gamma_from_the_recorded_norms_is_that_of_the_authors(golden, name):
    file = golden(f"editing/guide_and_rescale_{name}.npz")
    guided = slice(1, 6)
    gamma = rescale_factor(file.tensor("norm_other")[guided], file.tensor("norm_cfg")[guided], 0.33, 3.0)
    torch.testing.assert_close(gamma, file.tensor("scale_other")[guided], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "bounds", [(3.0, 0.33), (-1, 1), (float("nan"), 1), (float("inf"), float("inf")), ("a", 1), (True, 2)]
)
def test_wrong_bounds_are_refused(bounds):
    with pytest.raises(ValueError, match="rescale_range"):
        NormRescaler(*bounds)
