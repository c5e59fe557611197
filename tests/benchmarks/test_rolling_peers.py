"""The queue of FIFO-Diffusion as a window of the rolling pipeline."""

import numpy as np
import pytest
import torch
from rolling_peers import FRAMES, PartitionedDenoiser, ladder, seam, stream_of

from tests.analytic.rolling import LinearDenoiser, ar1_correlations, covariance


CORRELATIONS = ar1_correlations(0.9, 64)
MADE = 60


def denoiser(window: int, frames: int, lookahead: str = "none") -> PartitionedDenoiser:
    return PartitionedDenoiser(MADE + window, CORRELATIONS.tolist(), frames, lookahead)


def test_a_queue_of_one_partition_is_a_ladder_of_one_without_context() -> None:
    plain = LinearDenoiser(MADE + FRAMES, CORRELATIONS.tolist())
    queue = stream_of(denoiser(FRAMES, FRAMES), "2m", FRAMES, 1, 0, 1, MADE)
    assert np.abs(queue - stream_of(plain, "2m", FRAMES, 1, 0, 1, MADE)).max() < 1e-12


@pytest.mark.parametrize("context", [0, 4])
def test_partitions_are_asked_one_by_one(context: int) -> None:
    sample = torch.randn(1, context + 8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    times = torch.cat([torch.full((context,), -1), torch.arange(100, 900, 100)])[None]
    plain = LinearDenoiser(3, CORRELATIONS.tolist())

    def asked(rows: list[int]) -> torch.Tensor:
        return plain(sample[:, rows], times[:, rows], return_dict=False)[0]

    def answer(lookahead: str) -> torch.Tensor:
        network = PartitionedDenoiser(3, CORRELATIONS.tolist(), 4, lookahead)
        return network(sample, times, num_context=context, return_dict=False)[0][:, context:]

    queue = [context + place for place in range(8)]
    apart = torch.cat([asked(queue[:4]), asked(queue[4:])], 1)
    torch.testing.assert_close(answer("none"), apart)
    # halves of four frames, each behind the two before it
    halves = [asked(queue[start - 2 : start + 2])[:, 2:] for start in (2, 4, 6)]
    copies = asked([queue[0], queue[0], queue[0], queue[1]])[:, 2:]
    torch.testing.assert_close(answer("copies"), torch.cat([copies, *halves], 1))
    emitted = asked(list(range(context + 2)))[:, context:]
    torch.testing.assert_close(answer("emitted"), torch.cat([emitted, *halves], 1))


def test_a_process_has_no_seam_and_independent_chunks_have_one() -> None:
    true = covariance(CORRELATIONS, 40)
    assert seam(true, 5) == pytest.approx(1.0)
    assert seam(np.kron(np.eye(8), true[:5, :5]), 5) == pytest.approx(2.0 / 0.2)


def test_a_ladder_is_the_stream_of_the_pipeline_itself() -> None:
    found = ladder("2m", CORRELATIONS, 5, 1, 5)
    assert found.shape == (40, 40) and np.trace(found) / 40 == pytest.approx(0.957, abs=1e-3)
