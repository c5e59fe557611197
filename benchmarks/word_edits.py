"""Prompt-to-prompt on pictures inverted in four ways, side by side, on edits whose truth is known.

    python benchmarks/word_edits.py            # three minutes on one core; writes docs/images/word_edits.png and the table beside it

The demo model, 20 steps, guidance 3.5. Half of the pairs change a colour, half a background. Controllers hold the source's
attention over .6 of the steps. Kept: PSNR of what the edit should leave alone, to the source. Right: share of results that the judge of the
benchmarks reads as the true edit. The sheet shows the first two pairs of each kind, the table all of them.
"""

import argparse
import json
from typing import Any

import torch
from common import ROOT, load_judge, share, write_result
from editing import common_scenes, make_task
from editing_measures import Task, against_source, against_truth, mean_and_error, verdict
from page import table, write_between

from diffusers_ext import LocalBlend, NullTextInversionPipeline
from diffusers_ext.attention import controller_for
from diffusers_ext.hub import load_pipeline
from diffusers_ext.imaging import to_pil
from diffusers_ext.reports import save_image
from diffusers_ext.sheets import Tile, contact_sheet


KINDS = ("colour", "background")
STEPS, GUIDANCE_SCALE, SHARE, SEED, SHOWN = 20, 3.5, 0.6, 4242, 2
PAGE, PICTURE = ROOT / "docs" / "prompt_to_prompt.md", ROOT / "docs" / "images" / "word_edits.png"
BEGIN, END = "<!-- edits: begin -->", "<!-- edits: end -->"
# Column, method of inversion, whether a controller carries the attention over.
COLUMNS: tuple[tuple[str, str, bool], ...] = (
    ("DDIM, no controller", "ddim", False),
    ("DDIM", "ddim", True),
    ("negative prompt", "negative_prompt", True),
    ("null text", "null_text", True),
    ("direct", "direct", True),
)
BLENDED = "direct, local blend"


def edits(pipe: NullTextInversionPipeline, picture: torch.Tensor, source: str, target: str) -> dict[str, torch.Tensor]:
    """Every column of one picture (3, H, W) in [-1, 1]."""
    prompts, results = [source, target], {}
    inversions: dict[str, Any] = {}
    for column, method, controlled in COLUMNS:
        if method not in inversions:
            scale = GUIDANCE_SCALE if method == "null_text" else None
            inversions[method] = pipe.invert(
                picture / 2 + 0.5, source, method, num_inference_steps=STEPS, guidance_scale=scale
            )
        controller = controller_for(pipe.tokenizer, prompts, cross_replace_steps=SHARE) if controlled else None
        results[column] = edit(pipe, target, inversions[method], controller)
    blend = LocalBlend(pipe.tokenizer, prompts, [changed_word(source, target)] * 2)
    controller = controller_for(pipe.tokenizer, prompts, cross_replace_steps=SHARE, local_blend=blend)
    results[BLENDED] = edit(pipe, target, inversions["direct"], controller)
    return results


def edit(pipe: NullTextInversionPipeline, target: str, inversion: Any, controller: Any) -> torch.Tensor:
    output: Any = pipe(
        target, inversion=inversion, controller=controller, guidance_scale=GUIDANCE_SCALE, output_type="pt"
    )
    return output.images[0].cpu() * 2 - 1


def changed_word(source: str, target: str) -> str:
    """What the edit is about: captions read "a red guitar on a white dotted background"."""
    (thing, place), (other, _) = (caption.split(" on ", 1) for caption in (source, target))
    return thing.split()[-1] if thing != other else place.split()[-1]


def measured(found: torch.Tensor, task: Task, judge: Any) -> dict[str, float]:
    read = verdict(judge.read(found), task.wanted, task.changes, common_scenes())
    kept = against_source(found, task.pairs.source, task.pairs.mask)["psnr_outside"]
    return {
        "psnr_outside": round(mean_and_error(kept)[0], 2),
        "psnr": round(mean_and_error(against_truth(found, task.pairs.target)["psnr"])[0], 2),
        "reached": share(torch.tensor(read["reached"])),
        "success": share(torch.tensor(read["success"])),
    }


def page(result: dict[str, Any]) -> str:
    header = ["", *(f"{kind}: {name}" for kind in KINDS for name in ("kept (dB)", "to the truth (dB)", "right"))]
    lines = [
        [column]
        + [
            cell
            for kind in KINDS
            for row in [result["edits"][kind][column]]
            for cell in (f"{row['psnr_outside']:.1f}", f"{row['psnr']:.1f}", f"{row['success']:.0%}")
        ]
        for column in result["edits"][KINDS[0]]
    ]
    return table(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=8, help="pairs of each kind")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipe = load_pipeline(NullTextInversionPipeline, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    judge = load_judge(common_scenes())
    rows, result = [], {}
    for kind in KINDS:
        task = make_task(f"noto {kind}", args.count, SEED)
        pairs, found = task.pairs, []
        for i in range(args.count):
            found.append(edits(pipe, pairs.source[i], pairs.source_prompts[i], pairs.target_prompts[i]))
            if i < SHOWN:
                tiles = [Tile(to_pil(pairs.source[i]), pairs.source_prompts[i])]
                tiles += [Tile(to_pil(edited)) for edited in found[-1].values()]
                words = pairs.target_prompts[i]
                rows.append([*tiles, Tile(to_pil(pairs.target[i]), words, compare=pairs.source_prompts[i])])
        columns = {column: torch.stack([edited[column] for edited in found]) for column in found[0]}
        result[kind] = {column: measured(pictures, task, judge) for column, pictures in columns.items()}
        print(json.dumps(result[kind]), flush=True)
    sheet = contact_sheet(rows, columns=["source", *result[KINDS[0]], "true edit"], tile=128)
    save_image(sheet, PICTURE)
    settings = {"steps": STEPS, "guidance_scale": GUIDANCE_SCALE, "cross_replace_steps": SHARE, "pairs": args.count}
    kept = {"settings": settings, "edits": result}
    write_result("word_edits", kept)
    write_between(PAGE, BEGIN, END, page(kept))


if __name__ == "__main__":
    main()
