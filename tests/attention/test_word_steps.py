"""When and how strongly words are edited."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusers_ext.attention import equalizer, word_indices, word_schedule
from diffusers_ext.attention.word_steps import checked_window, window_bounds
from tests.attention.test_alignment import GOLDEN, REFINE, REPLACE, SOURCE, TOKENIZER


def test_a_share_of_the_steps_is_that_of_the_authors():
    schedule = word_schedule(TOKENIZER, [SOURCE, REPLACE], 10, 0.4)
    assert torch.equal(schedule.float(), GOLDEN.tensor("alpha_time_words_04")[:, :, 0, 0])


def test_shares_by_word_are_those_of_the_authors():
    schedule = word_schedule(TOKENIZER, [SOURCE, REPLACE], 10, {"default_": 0.8, "dog": (0.0, 0.4)})
    assert torch.equal(schedule.float(), GOLDEN.tensor("alpha_time_words_mixed")[:, :, 0, 0])


def test_factors_are_those_of_the_authors():
    assert torch.equal(equalizer(TOKENIZER, [SOURCE, REFINE], {"blue": 4}), GOLDEN.tensor("equalizer"))


@given(st.integers(1, 200), st.integers(0, 200))
def test_a_share_that_is_a_whole_number_of_steps_is_that_number(count, rows):
    rows = min(rows, count)
    assert window_bounds((0.0, rows / count), count) == (0, rows)


@given(st.integers(1, 60), st.floats(0, 1), st.floats(0, 1))
def test_a_window_is_open_between_its_bounds_and_nowhere_else(steps, one, other):
    window = min(one, other), max(one, other)
    schedule = word_schedule(TOKENIZER, ["a cat", "a dog"], steps, window)
    start, end = window_bounds(window, steps + 1)
    open_rows = schedule.all(2).all(1)
    assert torch.equal(open_rows, schedule.any(2).any(1))
    assert open_rows.nonzero().flatten().tolist() == list(range(start, end))


def test_a_word_counts_only_in_targets_that_have_it_and_others_are_edited_in_all_steps():
    schedule = word_schedule(TOKENIZER, ["a cat", "a dog", "a zebra"], 4, {"zebra": 0.0})
    columns = word_indices(TOKENIZER, "a zebra", "zebra")
    assert bool(schedule[:, 0].all()) and not schedule[:, 1, columns].any()
    assert int(schedule[:, 1].sum()) == 5 * (77 - len(columns))


def test_factors_are_for_every_target_that_has_the_word_or_for_one():
    prompts = ["a cat", "a red cat", "a red red hat"]
    shared = equalizer(TOKENIZER, prompts, {"red": 2.0, "hat": 0})
    assert shared[0, 2] == 2 and shared[1, [2, 3, 4]].tolist() == [2, 2, 0] and shared[0, 3] == 1
    single = equalizer(TOKENIZER, prompts, [{}, {"red": -1.5}])
    assert torch.equal(single[0], torch.ones(77)) and single[1, 2] == -1.5


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (1.5, "cross_replace_steps=1.5 is not a share"),
        (-0.1, "cross_replace_steps=-0.1"),
        (float("nan"), "cross_replace_steps=nan"),
        ("0.4", "cross_replace_steps='0.4'"),
        (True, "cross_replace_steps=True"),
        (None, "cross_replace_steps=None"),
        ((0.5, 0.2), "ends before it starts"),
        ((0.1, 0.2, 0.3), r"\(start, end\)"),
        ({"dog": 2}, r"cross_replace_steps\['dog'\]=2"),
        ({"default_": "x"}, "cross_replace_steps='x'"),
        ({}, "names no word"),
        (10**400, "cross_replace_steps=1000"),
        ({"cow": 0.5}, "'cow', which is in no target; their words are 'a', 'dog'"),
        ({3: 0.5}, "names 3"),
    ],
)
def test_wrong_shares_are_named(steps, message):
    with pytest.raises(ValueError, match=message):
        word_schedule(TOKENIZER, ["a cat", "a dog"], 10, steps)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "names no word"),
        ({"dog": float("inf")}, r"weights\['dog'\]=inf"),
        ({"dog": "4"}, r"weights\['dog'\]='4'"),
        ({"cat": 2.0}, "'cat', which is in no target"),
        ([{"dog": 2.0}, {}], "2 dicts for 1 targets"),
        ([{"cat": 2.0}], "'cat', which is in no target"),
        ([2.0], "not a dict of factors"),
        (None, "weights=None"),
    ],
)
def test_wrong_factors_are_named(weights, message):
    with pytest.raises(ValueError, match=message):
        equalizer(TOKENIZER, ["a cat", "a dog"], weights)


def test_a_number_is_the_end_of_a_window_from_the_first_step_on():
    assert checked_window(1, "x") == (0.0, 1.0) and checked_window([0.2, 0.2], "x") == (0.2, 0.2)
