"""Picture sets with known ground truth, drawn on the fly: what training, tests, benchmarks and demos share."""

from .emoji_scenes import EditPairs, EmojiScenes, Scenes, vendor_pairs
from .sprites import SpriteSheet
from .words import DEMO_OBJECTS


__all__ = ["DEMO_OBJECTS", "EditPairs", "EmojiScenes", "Scenes", "SpriteSheet", "vendor_pairs"]
