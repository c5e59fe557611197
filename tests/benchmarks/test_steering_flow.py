"""Tasks of the restoration of scenes, and the figures that their table has."""

import pytest
import torch
from steering_flow import METHODS, SIDE, TASKS, Task, cell, sample, scenery


def pictures() -> torch.Tensor:
    return torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_the_plain_repair_is_a_picture_near_the_true_one(task: Task) -> None:
    truth = torch.full((2, 3, SIDE, SIDE), 0.5)
    repaired = task.repair(task.spoil(truth, torch.Generator().manual_seed(0)))
    assert repaired.shape == truth.shape and (repaired - truth).abs().mean() < 0.05


@pytest.mark.parametrize("task", [task for task in TASKS if task.hole is not None], ids=lambda task: task.name)
def test_nothing_of_what_is_missing_reaches_a_method(task: Task) -> None:
    truth, hole = pictures(), task.hole
    other = torch.where(hole > 0, -truth, truth)
    first, second = (task.arguments(task.spoil(of, torch.Generator())) for of in (truth, other))
    assert torch.equal(first["image"], second["image"])
    # white, which is 1 in [-1, 1], is painted
    assert torch.equal(first["mask_image"] > 0, hole > 0)
    assert torch.equal(first["image"] * (1 - hole), truth * (1 - hole))


def test_scenes_are_held_out_and_every_method_is_asked_as_often() -> None:
    assert scenery(3, 1, "held_out").captions != scenery(3, 1, "train").captions
    for settings in METHODS.values():
        assert not {"num_inference_steps", "guidance_scale"} & {name for one in settings for name in one}


def test_pictures_of_a_call_have_their_own_measurements_and_shared_settings() -> None:
    scenes, calls = scenery(5, 1, "held_out"), []

    class Pipe:
        def __call__(self, prompts, **arguments):
            calls.append((prompts, arguments))
            return type("Result", (), {"images": arguments["measurement"] / 2 + 0.5})

    measured = pictures()[:1].expand(5, -1, -1, -1) * torch.arange(1, 6).reshape(5, 1, 1, 1) / 5
    mask = torch.ones(1, 1, SIDE, SIDE)
    found = sample(Pipe(), scenes, 2, {"measurement": measured, "mask_image": mask})
    assert [prompts for prompts, _ in calls] == [scenes.captions[:2], scenes.captions[2:4], scenes.captions[4:]]
    assert all(arguments["mask_image"] is mask for _, arguments in calls)
    torch.testing.assert_close(found, measured)


def test_a_cell_has_means_medians_and_the_share_that_failed() -> None:
    row = {"psnr": {"mean": 20.04, "median": 21.0}, "ssim": {"mean": 0.8, "median": 0.849}, "failed": 0.25}
    assert cell(row) == "20.0 (21.0) / 0.80 (0.85) / 25 %"
