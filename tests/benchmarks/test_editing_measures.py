import math

import pytest
import torch
from editing import chosen, hand_scenes, make_task
from editing_measures import (
    against_source,
    against_truth,
    best_mixture,
    hearts,
    labels_of,
    mean_and_error,
    outside_only,
    paired_difference,
    pareto_front,
    places,
    summary_of,
    swapped,
    verdict,
)
from editing_methods import METHODS, OURS, PEERS, SETTINGS
from hypothesis import given
from hypothesis import strategies as st

from diffusers_ext.data import DEMO_OBJECTS, EmojiScenes


@pytest.fixture(scope="module")
def common() -> EmojiScenes:
    return EmojiScenes(objects=DEMO_OBJECTS)


def pictures(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    source = torch.rand(2, 3, 32, 32, generator=generator) * 2 - 1
    mask = torch.zeros(2, 1, 32, 32)
    mask[:, :, 10:20, 12:24] = 1
    return source, mask


def test_what_changes_inside_the_mask_does_not_count_against_preservation():
    source, mask = pictures()
    edited = torch.where(mask > 0, -source, source)
    found = against_source(edited, source, mask)
    assert found["psnr_outside"] == [math.inf, math.inf]
    assert found["ssim_outside"] == pytest.approx([1.0, 1.0])


def test_an_error_outside_the_mask_is_counted_over_the_outside_alone():
    source, mask = pictures()
    source = source * 0.5
    edited = source + 0.1 * (mask == 0)
    # mean squared error .01 where it counts, peak to peak 2
    assert against_source(edited, source, mask)["psnr_outside"] == pytest.approx([10 * math.log10(4 / 0.01)] * 2)


def test_a_soft_edge_belongs_to_the_edit():
    source, mask = pictures()
    mask[:, :, 9] = 0.25
    edited = source.clone()
    edited[:, :, 9] = 1.0
    assert torch.equal(outside_only(edited, source, mask)[:, :, 10:], source[:, :, 10:])
    assert torch.equal(outside_only(edited, source, mask)[:, :, 9], source[:, :, 9])


def test_the_truth_itself_is_at_no_distance_from_the_truth():
    source, _ = pictures()
    assert against_truth(source, source) == {"psnr": [math.inf] * 2, "ssim": pytest.approx([1.0] * 2)}


def test_mean_and_error_are_those_of_the_textbook():
    assert mean_and_error([1.0, 2.0, 3.0, 4.0]) == (2.5, pytest.approx(math.sqrt(5 / 3 / 4)))


def test_pictures_that_a_measure_does_not_apply_to_are_left_out():
    assert mean_and_error([1.0, math.nan, 3.0])[0] == 2.0
    assert math.isnan(mean_and_error([math.nan])[0])


def test_a_paired_difference_does_not_see_what_pictures_have_in_common():
    hard_and_easy = [10.0, 20.0, 30.0]
    mean, error = paired_difference([value + 1.0 for value in hard_and_easy], hard_and_easy)
    assert (mean, error) == (1.0, 0.0)


def test_a_share_is_the_mean_of_its_flags():
    assert summary_of({"success": [True, True, False, True]})["success"]["mean"] == 0.75


def test_the_best_mixture_of_two_settings_lies_between_them():
    points = [(0.5, 30.0), (0.9, 20.0)]
    assert best_mixture(points, 0.7) == pytest.approx(25.0)
    assert best_mixture(points, 0.9) == pytest.approx(20.0)
    assert best_mixture(points, 0.2) == pytest.approx(30.0)


def test_a_success_that_no_setting_reaches_has_no_mixture():
    assert best_mixture([(0.5, 30.0), (0.9, 20.0)], 0.91) is None


def test_a_setting_worse_in_both_respects_changes_no_mixture():
    points = [(0.5, 30.0), (0.9, 20.0)]
    for success in (0.3, 0.6, 0.8, 0.9):
        assert best_mixture([*points, (0.6, 15.0)], success) == best_mixture(points, success)


def test_the_hull_passes_over_a_setting_that_sags_below_it():
    assert best_mixture([(0.4, 30.0), (0.6, 21.0), (0.8, 20.0)], 0.6) == pytest.approx(25.0)


def test_an_edit_succeeds_when_the_wanted_value_is_read_and_the_rest_as_before(common):
    wanted = {name: torch.tensor([1, 1, 1]) for name in ("object", "colour", "background", "pattern")}
    read = {name: value.clone() for name, value in wanted.items()}
    read["background"][1] = 3  # something else changed
    read["colour"][2] = 4  # the wanted value was not reached
    assert verdict(read, wanted, "colour", common) == {
        "reached": [True, True, False],
        "success": [True, False, False],
    }


def test_red_and_in_its_own_red_are_one_colour(common):
    heart, red = common.object_names.index("heart"), common.colour_names.index("red")
    assert common.native_colours[heart] == "red"
    wanted = {"object": torch.tensor([heart]), "background": torch.tensor([2]), "pattern": torch.tensor([0])}
    for said, seen in ((red, 0), (0, red), (0, 0)):
        read = {**wanted, "colour": torch.tensor([seen])}
        assert verdict(read, {**wanted, "colour": torch.tensor([said])}, "colour", common)["success"] == [True]
    blue = {**wanted, "colour": torch.tensor([common.colour_names.index("blue")])}
    assert verdict(blue, {**wanted, "colour": torch.tensor([0])}, "colour", common)["success"] == [False]


def test_objects_of_another_hand_are_read_in_the_common_vocabulary(common):
    own = hand_scenes("fxemoji")
    assert len(own.object_names) < len(common.object_names)
    assert [common.object_names[place] for place in places(own, common)] == list(own.object_names)
    drawn = own.sample(20, 3, "all")
    words = [common.object_names[label] for label in labels_of(drawn, own, common)["object"]]
    assert all(word in caption for word, caption in zip(words, own.captions(drawn), strict=True))


def test_hearts_are_asked_for_in_words_that_the_model_has(common):
    task = hearts(12, 5, "noto", common)
    assert len(task.pairs.source) == 12 and task.changes == "colour"
    for row, prompt in enumerate(task.pairs.target_prompts):
        colour = common.colour_names[task.wanted["colour"][row]]
        ground = common.background_names[task.wanted["background"][row]]
        assert prompt.split()[1:4] == [colour, "heart", "on"] and ground in prompt and colour != ground
    outside = (task.pairs.mask == 0).expand_as(task.pairs.source)
    assert torch.equal(task.pairs.source[outside], task.pairs.target[outside])
    assert not torch.equal(task.pairs.source, task.pairs.target)


def test_a_task_is_a_pure_function_of_its_name_and_seed():
    first, again = (make_task("fxemoji background", 3, 9) for _ in range(2))
    assert torch.equal(first.pairs.source, again.pairs.source)
    assert first.pairs.target_prompts == again.pairs.target_prompts


def test_main_settings_of_every_task_are_measured_before_any_other():
    tasks = ["noto colour", "noto hearts"]
    plan = chosen(True, tasks)
    mains = [setting.main for _, setting in plan]
    assert mains == sorted(mains, reverse=True)
    assert {task for task, setting in plan if setting.main} == set(tasks)
    # hearts are measured in the main settings only
    assert all(task == "noto colour" for task, setting in plan if not setting.main)
    assert chosen(False, tasks) == plan[: sum(mains)]


def test_methods_have_one_main_setting_unless_a_part_of_the_pairs_is_all_they_have():
    for method in METHODS:
        own = [setting for setting in SETTINGS if setting.method == method]
        assert sum(setting.main for setting in own) == any(setting.pairs is None for setting in own)
        assert not any(setting.main and setting.pairs is not None for setting in own)
    assert len({setting.name for setting in SETTINGS}) == len(SETTINGS)
    assert {*OURS, *PEERS} == set(METHODS) and not {*OURS} & {*PEERS}


def test_the_front_is_what_no_point_beats_in_both():
    points = {"a": (0.5, 30.0), "b": (0.8, 25.0), "under b": (0.8, 24.0), "left of b": (0.7, 25.0), "c": (0.9, 20.0)}
    assert pareto_front(points) == ["a", "b", "c"]
    # Equal points do not beat each other; a single one, and none, are their own front.
    assert pareto_front({"x": (0.5, 1.0), "w": (0.5, 1.0)}) == ["w", "x"]
    assert pareto_front({"x": (0.5, 1.0)}) == ["x"] and pareto_front({}) == []


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12))
def test_every_point_is_on_the_front_or_beaten_by_one_that_is(pairs):
    points = {str(number): (float(s), float(p)) for number, (s, p) in enumerate(pairs)}
    front = pareto_front(points)
    for name, (s, p) in points.items():
        others = [points[other] for other in front]
        assert (name in front) == (not any(a >= s and b >= p and (a, b) != (s, p) for a, b in others))
    steps = [points[name] for name in front]
    assert steps == sorted(steps, key=lambda point: (point[0], -point[1]))


def test_success_at_equal_preservation_is_the_same_mixture_seen_from_the_other_axis():
    points = [(0.5, 30.0), (0.9, 20.0)]
    assert swapped(points) == [(30.0, 0.5), (20.0, 0.9)]
    # Halfway between two settings one is chosen by a fair coin: .7 and 25 dB.
    assert best_mixture(points, 0.7) == pytest.approx(25.0)
    assert best_mixture(swapped(points), 25.0) == pytest.approx(0.7)
    assert best_mixture(swapped(points), 10.0) == 0.9
    assert best_mixture(swapped(points), 30.1) is None


def test_the_first_pairs_of_a_task_are_those_of_a_smaller_one():
    task = make_task("noto colour", 4, 9)
    part = task.first(2)
    assert torch.equal(part.pairs.source, task.pairs.source[:2]) and torch.equal(part.pairs.mask, task.pairs.mask[:2])
    assert part.pairs.target_prompts == task.pairs.target_prompts[:2] and part.name == task.name
    assert {name: len(labels) for name, labels in part.wanted.items()} == dict.fromkeys(task.wanted, 2)
    assert len(part.pairs.source_scenes.object) == 2
