import pytest
import torch

from diffusers_ext.data import EmojiScenes
from diffusers_ext.models import AttributeJudge
from diffusers_ext.training.distillation.rewards import (
    REWARDS,
    JudgedMatch,
    Reward,
    brightness,
    colourfulness,
    make_reward,
    named_labels,
)


SCENES = EmojiScenes(objects=["apple", "star", "cat face", "orange fruit"])
LABELS = {name: list(getattr(SCENES, f"{name}_names")) for name in ("object", "colour", "background", "pattern")}


def flat(*colours: tuple[float, float, float]) -> torch.Tensor:
    """Pictures of one colour each, given on 0 ... 255."""
    return (torch.tensor(colours) / 127.5 - 1.0)[:, :, None, None].expand(-1, -1, 4, 4)


def test_brightness_weighs_the_colours_as_bt_601_does():
    found = brightness(flat((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)), [""] * 4)
    torch.testing.assert_close(found, torch.tensor([0.299, 0.587, 0.114, 1.0]))


def test_colourfulness_of_plain_pictures_and_of_halves_is_its_closed_form():
    grey, red = flat((90, 90, 90), (255, 0, 0))
    # of one colour there are only means: rg = 255, yb = 127.5
    found = colourfulness(torch.stack([grey, red]), ["", ""])
    assert found.tolist() == pytest.approx([0.0, 0.3 * (255**2 + 127.5**2) ** 0.5], abs=1e-3)
    # half red, half grey: rg = 255 or 0, so deviation and mean are 127.5; yb the half of it
    half = torch.cat([red[:, :2], grey[:, :2]], 1)[None]
    size = (127.5**2 + 63.75**2) ** 0.5
    assert float(colourfulness(half, [""])) == pytest.approx(1.3 * size, rel=1e-5)


def test_captions_of_emoji_scenes_name_the_labels_of_their_scenes():
    scenes = SCENES.sample(300, seed=1)
    for row, caption in enumerate(SCENES.captions(scenes)):
        wanted = {name: int(getattr(scenes, name)[row]) for name in LABELS}
        if wanted["colour"] == 0:
            del wanted["colour"]  # the vendor's own colours are never spoken
        assert named_labels(caption, LABELS) == wanted, caption


@pytest.mark.parametrize(
    ("caption", "said"),
    [
        ("a star", {"object": "star"}),
        ("a red cat face", {"object": "cat face", "colour": "red"}),
        ("an orange fruit on a red background", {"object": "orange fruit", "background": "red", "pattern": "plain"}),
        ("a blue star on a dotted background", {"object": "star", "colour": "blue", "pattern": "dotted"}),
        ("a starfish in the sun", {}),
    ],
)
def test_what_a_caption_does_not_name_is_left_out(caption: str, said: dict[str, str]):
    assert named_labels(caption, LABELS) == {name: LABELS[name].index(word) for name, word in said.items()}


def judge_of(labels: dict[str, list[str]]) -> AttributeJudge:
    torch.manual_seed(0)
    return AttributeJudge(labels, channels=[4, 4])


def test_a_judge_rewards_with_the_mean_probability_of_the_named_labels():
    judge = judge_of(LABELS)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    chances = {name: logits.softmax(1) for name, logits in judge(images).items()}
    found = JudgedMatch(judge)(images, ["a red star", "an apple on a teal striped background"])
    apple, teal, striped = (LABELS[kind].index(word) for kind, word in (
        ("object", "apple"), ("background", "teal"), ("pattern", "striped")
    ))  # fmt: skip
    wanted = [
        (chances["object"][0, 1] + chances["colour"][0, LABELS["colour"].index("red")]) / 2,
        (chances["object"][1, apple] + chances["background"][1, teal] + chances["pattern"][1, striped]) / 3,
    ]
    torch.testing.assert_close(found, torch.stack(wanted).detach())


def test_pictures_of_another_size_are_judged_at_the_size_that_the_judge_was_trained_on():
    judge = JudgedMatch(judge_of(LABELS))
    small = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    large = torch.nn.functional.interpolate(small, (64, 64), mode="bilinear", antialias=True)
    torch.testing.assert_close(judge(small, ["a star"]), judge(large, ["a star"]))


def test_a_saved_judge_is_a_reward_and_other_models_are_not(tmp_path):
    judge = judge_of(LABELS)
    judge.save_pretrained(tmp_path / "judge")
    reward, images = make_reward(str(tmp_path / "judge")), torch.zeros(1, 3, 64, 64)
    assert torch.equal(reward(images, ["a star"]), JudgedMatch(judge)(images, ["a star"]))
    assert all(torch.equal(value, judge.state_dict()[name]) for name, value in reward.models[0].state_dict().items())
    config = (tmp_path / "judge" / "config.json").read_text()
    (tmp_path / "judge" / "config.json").write_text(config.replace("AttributeJudge", "UNet2DModel"))
    with pytest.raises(ValueError, match="is a UNet2DModel; give one of brightness, colourfulness, or the folder"):
        make_reward(str(tmp_path / "judge"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="reward='.*empty' cannot be loaded .*; give one of brightness"):
        make_reward(str(tmp_path / "empty"))


@pytest.mark.parametrize("name", REWARDS)
def test_a_built_in_reward_gives_a_finite_number_a_picture(name: str):
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = make_reward(name)(images, ["", "", ""])
    assert found.shape == (3,) and found.dtype == torch.float32 and len(set(found.tolist())) == 3


def test_wrong_calls_are_answered_in_one_sentence():
    with pytest.raises(ValueError, match=r"images have shape \(2, 3, 4, 4\) and there are 1 captions; give"):
        make_reward("brightness")(torch.zeros(2, 3, 4, 4), [""])
    with pytest.raises(ValueError, match="reward='broken' gives no finite number a picture; give another"):
        Reward("broken", lambda images, captions: images.mean((1, 2, 3)) * float("nan"))(torch.zeros(1, 3, 4, 4), [""])
    with pytest.raises(ValueError, match="the caption 'a cloud' names no label that the judge of --reward knows"):
        JudgedMatch(judge_of(LABELS))(torch.zeros(1, 3, 64, 64), ["a cloud"])
