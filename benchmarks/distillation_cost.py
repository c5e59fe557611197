"""What a step of distillation costs in memory and time: called by `distillation.py`.

memory: a network of the size of Stable Diffusion 1.5 with random weights, which memory does not know from trained ones. In a process
of its own each, DMD2 with student and fake score as LoRAs on the teacher, and the teacher alone: one pass forwards and backwards.
time: rounds of `training/train_dmd.py` on the demo model, and the passes that a round consists of, measured one by one.
"""

import multiprocessing
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import MODEL, ROOT, peak_memory, timed
from diffusers import UNet2DConditionModel

from diffusers_ext.training.distillation.families import StableDiffusion
from diffusers_ext.training.distillation.matching import MatchingBatch, MatchingNetworks, fake_loss, student_loss
from diffusers_ext.training.distillation.parameterization import NoiseSchedule
from diffusers_ext.training.distillation.teachers import Teacher


# as in the repository of Stable Diffusion 1.5, at half its side
SIZE = {"sample_size": 32, "cross_attention_dim": 768, "block_out_channels": (320, 640, 1280, 1280)}
SIDE, RANKS, BATCH = 32, (16, 64), 1
ROUNDS, REPEATS, DEMO_BATCH, RATIO = (1, 4), 2, 32, 5


class RandomTeacher:
    """A teacher of random weights: what the losses ask of `Teacher`."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.family = StableDiffusion()
        self.unet = UNet2DConditionModel(**SIZE, attention_head_dim=8).requires_grad_(False).eval()
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        self.schedule = NoiseSchedule("epsilon", (1 - betas).cumprod(0))
        self.empty = torch.zeros(1, 77, 768)

    def predictions(
        self, sample: torch.Tensor, timesteps: torch.Tensor, words: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        both = torch.cat([words, self.empty.expand_as(words)])
        conditional, unconditional = self.unet(sample.repeat(2, 1, 1, 1), timesteps.repeat(2), both).sample.chunk(2)
        return conditional, unconditional


def draw(count: int, side: int, words: torch.Tensor) -> MatchingBatch:
    path, noise = torch.randn(1, count, 4, side, side), torch.randn(count, 4, side, side)
    return MatchingBatch(words, path, 0, noise, torch.rand(count))


def peak_of(rank: int | None) -> dict[str, float]:
    """Megabytes above the bare process, of the teacher alone or of DMD2 with adapters of this rank."""
    teachers: list[Any] = []
    torch.set_num_threads(1)

    def alone() -> None:
        teachers.append(RandomTeacher())
        sample = torch.randn(BATCH, 4, SIDE, SIDE, requires_grad=True)
        output = teachers[0].unet(sample, torch.tensor([500]), torch.randn(BATCH, 77, 768)).sample
        output.square().mean().backward()

    def dmd2() -> None:
        teachers.append(RandomTeacher())
        networks = MatchingNetworks(teachers[0], 1, rank)
        players = networks.players(1e-4, 1e-4, 1)
        named = dict(networks.named_parameters())
        optimizers = [torch.optim.AdamW([named[name] for name in sorted(each.names)]) for each in players.values()]
        batch = draw(BATCH, SIDE, torch.randn(BATCH, 77, 768))
        for _ in range(2):
            for optimizer, loss_of in zip(
                optimizers,
                (lambda: fake_loss(networks, batch), lambda: student_loss(networks, teachers[0], batch, 7.5)),
            ):
                loss_of().backward()
                optimizer.step()
                networks.zero_grad(set_to_none=True)

    peak = peak_memory(dmd2 if rank else alone)
    own = (value for name, value in teachers[0].unet.named_parameters() if "lora" not in name)
    weights = sum(value.numel() * value.element_size() for value in own) / 2**20
    return {"peak_megabytes": peak or float("nan"), "weights_megabytes": round(weights, 1)}


def memory() -> dict[str, Any]:
    """Peaks of the teacher alone and by rank, and their ratios."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        alone = pool.apply(peak_of, (None,))
        found = {rank: pool.apply(peak_of, (rank,)) for rank in RANKS}
    ranks = {
        str(rank): {**row, "ratio": round(row["peak_megabytes"] / alone["peak_megabytes"], 3)}
        for rank, row in found.items()
    }
    return {"teacher": alone, "ranks": ranks}


def arguments(folder: Path, rounds: int, lora: bool) -> list[str]:
    return [
        f"--pretrained_teacher_model={MODEL}", "--dataset_name=emoji-scenes", "--objects=demo", "--method=dmd2", "--gan_weight=0",
        "--num_denoising_steps=1", f"--fake_update_ratio={RATIO}", f"--train_batch_size={DEMO_BATCH}", "--real_guidance_scale=3",
        f"--max_train_steps={rounds}", "--validation_steps=0", "--checkpointing_steps=1000000", "--report_to=none", "--num_threads=1",
        "--validation_prompts=a red star on a blue background", f"--output_dir={folder}", *(["--use_lora", "--lora_rank=16"] if lora else []),
    ]  # fmt: skip


def time() -> dict[str, Any]:
    """With LoRAs and in full."""
    return {"LoRA": step_time(True), "full": step_time(False)}


def step_time(lora: bool) -> dict[str, Any]:
    """Seconds of a round of the script, of its passes, and their ratio."""
    sys.path.insert(0, str(ROOT / "training"))
    import train_dmd

    def round_of_script() -> float:
        seconds = []
        for rounds in ROUNDS:
            with tempfile.TemporaryDirectory() as folder:
                args = train_dmd.parse_args(arguments(Path(folder) / "run", rounds, lora))
                seconds.append(timed(lambda: train_dmd.main(args)))  # noqa: B023
        return (seconds[1] - seconds[0]) / (ROUNDS[1] - ROUNDS[0])

    teacher = Teacher(str(MODEL))
    networks = MatchingNetworks(teacher, 1, 16 if lora else None)
    words = teacher.embeddings(teacher.tokens(["a red star on a blue background"])).expand(DEMO_BATCH, -1, -1)
    batch = draw(DEMO_BATCH, 16, words)
    timesteps = torch.full((DEMO_BATCH,), 500)

    def backward(loss: torch.Tensor) -> None:
        loss.backward()
        networks.zero_grad(set_to_none=True)

    def student_forward() -> None:
        with torch.no_grad():
            networks.generated(batch)

    def fake_forward() -> None:
        with torch.no_grad():
            networks.judge(batch.noise, timesteps, words)

    def teacher_forward() -> None:
        with torch.no_grad():
            teacher.predictions(batch.noise, timesteps, words)

    # what a round consists of, and how often
    parts = {
        "student forward": (RATIO, student_forward),
        "fake score forward and backward": (
            RATIO, lambda: backward(networks.judge(batch.noise, timesteps, words)[0].square().mean()),
        ),
        "student forward and backward": (1, lambda: backward(networks.generated(batch).square().mean())),
        "teacher, both passes": (1, teacher_forward),
        "fake score forward": (1, fake_forward),
    }  # fmt: skip
    rounds, sums, each = [], [], {name: [] for name in parts}
    for _ in range(REPEATS):
        for name, (_, call) in parts.items():
            each[name].append(statistics.median(timed(call) for _ in range(3)))
        sums.append(sum(count * each[name][-1] for name, (count, _) in parts.items()))
        rounds.append(round_of_script())
    ratios = [one / other for one, other in zip(rounds, sums)]
    return {
        "parts": {name: {"times": parts[name][0], "seconds": round(statistics.median(values), 4)} for name, values in each.items()},
        "round_seconds": round(statistics.median(rounds), 3),
        "sum_of_parts_seconds": round(statistics.median(sums), 3),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
    }  # fmt: skip
