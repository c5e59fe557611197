import pytest
import torch
from second_judge import STAGES, describe, feature_distance, fit_ridge, load_network, stage_features


def test_ridge_without_penalty_reproduces_labels_that_are_linear_in_the_features():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (60,), generator=generator)
    mixing = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    features = torch.nn.functional.one_hot(labels, 3).double() @ mixing + 7.0
    weights = fit_ridge(features, labels, 3, 1e-9)
    outputs = features @ weights[:-1] + weights[-1]
    assert torch.allclose(outputs, torch.nn.functional.one_hot(labels, 3).double(), atol=1e-5)


def test_ridge_with_a_boundless_penalty_gives_the_frequencies():
    labels = torch.tensor([0, 0, 0, 1])
    weights = fit_ridge(torch.randn(4, 2), labels, 2, 1e12)
    assert weights[:-1].abs().max() < 1e-9
    assert weights[-1].tolist() == pytest.approx([0.75, 0.25], abs=1e-9)


def test_one_feature_gives_the_slope_of_the_formula():
    x = torch.tensor([[-1.0], [0.0], [1.0]])
    # sum x y / (sum x^2 + n lambda) with y of class 1: (0, 0, 1) less its mean
    assert fit_ridge(x, torch.tensor([0, 0, 1]), 2, 0.5)[0, 1].item() == pytest.approx(1.0 / (2.0 + 3 * 0.5))


def test_feature_distance_is_that_of_directions_averaged_over_stages():
    along = torch.tensor([1.0, 0.0])[None, :, None, None].expand(1, 2, 3, 3)
    across = torch.tensor([0.0, 5.0])[None, :, None, None].expand(1, 2, 3, 3)
    assert feature_distance([along], [along * 9.0]).item() == pytest.approx(0.0, abs=1e-12)
    assert feature_distance([along], [across]).item() == pytest.approx(2.0)
    assert feature_distance([along], [-along]).item() == pytest.approx(4.0)
    assert feature_distance([along, along], [across, along]).item() == pytest.approx(1.0)


def test_the_description_of_a_picture_has_mean_and_spread_first():
    stage = torch.arange(16.0).view(1, 1, 4, 4)
    row = describe([stage])
    assert row[0, 0].item() == pytest.approx(7.5) and row[0, 1].item() == pytest.approx(stage.std().item())
    assert row[0, 2:].tolist() == stage.flatten().tolist()


@pytest.fixture(scope="module")
def network():
    pytest.importorskip("efficientnet_lite_pytorch", reason="the second judge comes with the extra `bench`")
    return load_network()


def test_features_come_in_stages_from_fine_to_coarse(network):
    sides = [stage.shape[-1] for stage in stage_features(network, torch.zeros(1, 3, 64, 64))]
    assert len(sides) == len(STAGES) and sides == sorted(sides, reverse=True) and sides[-1] < sides[0]


def test_a_greater_change_is_a_greater_distance(network):
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    noise = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    features = [stage_features(network, picture + amount * noise) for amount in (0.0, 0.1, 0.5)]
    distances = [feature_distance(features[0], other).item() for other in features]
    assert distances[0] == 0 and 0 < distances[1] < distances[2] < 4


def test_the_scale_is_that_of_the_training(network):
    """(x - 127) / 128 of bytes, so white is 1 and black -127/128."""
    seen = []
    handle = network._conv_stem.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    for value in (-1.0, 1.0):
        stage_features(network, torch.full((1, 3, 64, 64), value))
    handle.remove()
    assert [tensor.mean().item() for tensor in seen] == pytest.approx([-127 / 128, 1.0])
