"""The same seed gives the same numbers in any process, and after saving and reloading."""

import json
import sys
from typing import Any

from diffusers_ext.data.emoji_scenes import EmojiScenes
from tests.helpers.fresh_process import digest
from tests.helpers.placement import in_own_memory

from .registry import PIPELINES


def digests(folder: str | None = None) -> dict[str, str]:
    """Digest of each subject's result; of pipelines loaded from `folder/<name>` instead of built if it is given."""
    found = {}
    for subject in PIPELINES:
        pipeline: Any = in_own_memory(subject.load(f"{folder}/{subject.name}")) if folder else subject.build()
        found[subject.name] = digest(subject.made(pipeline))
    scenes = EmojiScenes(resolution=16, objects=["apple", "star"])
    drawn = scenes.sample(4, seed=3)
    found["EmojiScenes"] = digest(scenes.render(drawn)[0])
    found["EmojiScenes.captions"] = "|".join(scenes.captions(drawn, drop=True, seed=3))
    return found


if __name__ == "__main__":
    json.dump({"built": digests(), "reloaded": digests(sys.argv[1])}, sys.stdout)
