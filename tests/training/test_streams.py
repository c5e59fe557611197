import pytest
import torch

from diffusers_ext.training.streams import epoch_rows, stream, stream_seed


def test_equal_coordinates_give_equal_draws():
    first, again = (torch.randn(5, generator=stream(3, 7, "noise")) for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize("other", [(4, 7, "noise", 0), (3, 8, "noise", 0), (3, 7, "crops", 0), (3, 7, "noise", 1)])
def test_any_other_coordinate_gives_another_draw(other: tuple[int, int, str, int]):
    assert stream_seed(3, 7, "noise", 0) != stream_seed(*other)


def test_seeds_do_not_depend_on_the_process_or_platform():
    # of `printf "0|noise|1|0" | b2sum -l 64` = f57306f2fce1dbf0, read as a little-endian number and halved
    assert stream_seed(0, 1, "noise") == 0xF0DBE1FCF20673F5 >> 1


def test_coordinates_cannot_be_confused_with_each_other():
    assert stream_seed(1, 23, "noise") != stream_seed(12, 3, "noise")


def test_draws_leave_global_random_state_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    torch.rand(9, generator=stream(0, 0, "noise"))
    assert torch.equal(torch.rand(1), expected)


def test_each_epoch_holds_every_item_once():
    rows = epoch_rows(seed=0, start=0, count=30, length=10)
    for epoch in rows.reshape(3, 10):
        assert sorted(epoch.tolist()) == list(range(10))
    assert rows[:10].tolist() != rows[10:20].tolist()


def test_rows_do_not_depend_on_where_reading_starts():
    whole = epoch_rows(seed=5, start=0, count=40, length=7)
    pieces = torch.cat([epoch_rows(seed=5, start=start, count=5, length=7) for start in range(0, 40, 5)])
    assert torch.equal(whole, pieces)
