import sys

import pytest
import torch
from common import peak_memory, share, summary, timed


def test_summary_is_mean_median_and_quantiles():
    assert summary(range(101)) == {"mean": 50.0, "median": 50.0, "q05": 5.0, "q95": 95.0}


def test_share_counts_flags():
    assert share(torch.tensor([True, False, False, True])) == 0.5


def test_time_passes():
    assert timed(lambda: sum(range(200_000))) > 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells the peak of a resident set")
def test_the_peak_of_a_call_is_seen_although_it_is_freed_again():
    if torch.cuda.is_available():
        pytest.skip("counts what is allocated on the GPU")

    def call() -> None:
        torch.ones(40 * 2**20 // 4).add_(1.0)

    assert 36 < peak_memory(call) < 80
    assert peak_memory(lambda: None) < 8
