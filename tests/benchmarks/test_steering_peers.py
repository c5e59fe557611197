"""Neighbours of FlowChef on white noise, whose posterior under an inpainting is known: the measured pixels, and noise elsewhere."""

from typing import Any

import pytest
import torch
from steering_peers import PEERS, dps, levels

from diffusers_ext.steering import InpaintMask, MeasurementObjective


KEEP = torch.ones(8, 8).tril()
NOISE_STD = 0.1


class WhiteFlow:
    """v = x (2 t - 1) / (t^2 + (1 - t)^2)."""

    def __init__(self) -> None:
        self.calls = 0

    def velocity(self, state: torch.Tensor, level: float) -> torch.Tensor:
        self.calls += 1
        return state * (2 * level - 1) / (level**2 + (1 - level) ** 2)


def problem(count: int = 256) -> tuple[MeasurementObjective, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    measured = torch.randn(1, 1, 8, 8, generator=generator)
    start = torch.randn(count, 1, 8, 8, generator=generator)
    return MeasurementObjective(InpaintMask(KEEP), KEEP * measured, noise_std=NOISE_STD), measured, start


@pytest.mark.parametrize("name", PEERS)
def test_measured_pixels_are_met_with_no_more_evaluations_than_allowed(name: str) -> None:
    objective, measured, start = problem()
    for setting in PEERS[name].settings:
        flow = WhiteFlow()
        found = PEERS[name].run(flow, objective, start, 30, torch.Generator().manual_seed(1), setting)
        assert flow.calls <= 30 and found.shape == start.shape
        free = ((found - measured) * (1 - KEEP)).square().mean() / (1 - KEEP).mean()
        kept = ((found - measured) * KEEP).square().mean() / KEEP.mean()
        assert float(kept) < 0.5 * float(free)


def test_pigdm_samples_the_posterior_of_white_noise() -> None:
    # Everything is linear and Gaussian here, so that its assumption is the truth.
    objective, measured, start = problem(2000)
    found = PEERS["PiGDM (OT-ODE)"].run(WhiteFlow(), objective, start, 300, torch.Generator(), 0.005)
    gain = 1 / (1 + NOISE_STD**2)
    torch.testing.assert_close(found.mean(0) * KEEP, gain * (measured * KEEP)[0], rtol=0, atol=0.05)
    spread = found.std(0)[0]
    assert abs(float(spread[KEEP > 0].mean()) - NOISE_STD * gain**0.5) < 0.03
    assert abs(float(spread[KEEP == 0].mean()) - 1) < 0.05


def test_dps_takes_the_whole_gradient() -> None:
    objective, measured, start = problem(2)
    flow, rate = WhiteFlow(), 0.3
    found = dps(flow, objective, start, 1, torch.Generator(), rate)
    # one step from t = 1, where x0 = x - x = 0 whatever x: the whole gradient is 0, and the skipped one would not be
    torch.testing.assert_close(found, start - flow.velocity(start, 1.0))
    assert levels(1) == [1.0, 0.0] and float(objective.grad(torch.zeros_like(start)).abs().max()) > 0


def test_each_peer_names_its_passes_backwards() -> None:
    for peer in PEERS.values():
        backward: list[Any] = []

        class Counting(WhiteFlow):
            def velocity(self, state: torch.Tensor, level: float) -> torch.Tensor:
                if state.requires_grad:
                    backward.append(level)  # noqa: B023
                return super().velocity(state, level)

        objective, _, start = problem(1)
        peer.run(Counting(), objective, start, 5, torch.Generator().manual_seed(1), peer.settings[0])
        assert len(backward) == 5 * peer.backward
