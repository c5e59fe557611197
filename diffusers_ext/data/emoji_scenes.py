"""Emoji scenes: captioned pictures composed from recolourable drawings, unlimited and deterministic.

A scene is one drawing (object x colour x vendor) on a background (colour x pattern). What the caption says is a label;
what it does not say (position, size, angle, flip, shade, period and phase of the pattern) is *nuisance*. Two scenes with
equal nuisance that differ in one label are an edit pair whose ground truth is known to the pixel.

The compositor is a handful of batched tensor operations (one `grid_sample` of the sprites, an analytic background), so
the same function serves training on a CPU or a GPU, tests, evaluation and demos.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
import torch.nn.functional as F

from .sprites import SHEETS, SpriteSheet, hue_cluster, recolour, recolourable, rgb_to_hsv
from .words import BACKGROUNDS, FAMILIES, OBJECT_COLOURS, OBJECTS, PATTERNS, article


NATIVE = "native"  # colour label of a drawing left as the vendor painted it; never spoken in a caption
SUPERSAMPLING = 2  # scenes are drawn this many times larger and averaged down
HELD_OUT_SHARE = 20  # one in twenty (object, colour, background) triples is never trained on
NATIVE_SHARE = 0.2  # share of scenes that show a recolourable drawing in the vendor's own colours
# range of each nuisance variable, drawn uniformly; positions and sizes in shares of the picture's side, angles in degrees
NUISANCE = {
    "x": (0.42, 0.58),
    "y": (0.42, 0.58),
    "size": (0.58, 0.82),
    "angle": (-10.0, 10.0),
    "flip": (0.0, 1.0),
    "shade": (-1.0, 1.0),
    "direction": (0.0, 180.0),
    "period": (0.22, 0.34),
    "phase": (0.0, 1.0),
}
SPLITS = ("train", "held_out", "all")


@dataclass(frozen=True)
class Scenes:
    """Labels (long tensors) and nuisance (float tensors) of n scenes, each of shape (n,)."""

    object: torch.Tensor
    vendor: torch.Tensor
    colour: torch.Tensor
    background: torch.Tensor
    pattern: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor
    size: torch.Tensor
    angle: torch.Tensor
    flip: torch.Tensor
    shade: torch.Tensor
    direction: torch.Tensor
    period: torch.Tensor
    phase: torch.Tensor

    def __len__(self) -> int:
        return len(self.object)

    def __getitem__(self, rows: slice | torch.Tensor) -> "Scenes":
        return Scenes(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def to(self, device: str | torch.device) -> "Scenes":
        return Scenes(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    def replace(self, **labels: torch.Tensor) -> "Scenes":
        """The same scenes with some labels exchanged."""
        return replace(self, **labels)


@dataclass(frozen=True)
class EditPairs:
    """n pictures before and after one attribute changed.

    Args:
        kind: What changed.
        source: Pictures before, (n, 3, R, R) in [-1, 1].
        target: Pictures after, as `source`.
        mask: (n, 1, R, R) in [0, 1]; where it is 0 the two agree.
        source_prompts: Captions before.
        target_prompts: Captions after.
        source_scenes: Labels and nuisance before.
        target_scenes: Labels and nuisance after.
    """

    kind: str
    source: torch.Tensor
    target: torch.Tensor
    mask: torch.Tensor
    source_prompts: list[str]
    target_prompts: list[str]
    source_scenes: Scenes
    target_scenes: Scenes


class EmojiScenes:
    """Draws emoji scenes.

    Args:
        sheets: Drawings of one or more vendors; default the shipped Noto sheet. A name ("noto", "twemoji", "fluent",
            "fxemoji") stands for the shipped sheet of that vendor.
        resolution: Side of the square pictures in pixels, an even number, 8 or more.
        objects: Words of the objects to draw; default all that every sheet has.
        colours: Whether drawings are also shown recoloured. Only drawings whose dominant colour covers more than a
            third of their surface are.

    Raises:
        ValueError: For an unknown vendor or object, or an unusable resolution.

    Example:
        >>> scenes = EmojiScenes(objects=["apple", "star"])
        >>> drawn = scenes.sample(4, seed=0)
        >>> images, masks = scenes.render(drawn)
        >>> images.shape, len(scenes.captions(drawn))
        (torch.Size([4, 3, 64, 64]), 4)
    """

    def __init__(
        self,
        sheets: str | SpriteSheet | Sequence[str | SpriteSheet] | None = None,
        resolution: int = 64,
        objects: Sequence[str] | None = None,
        colours: bool = True,
    ):
        if not isinstance(resolution, int) or resolution < 8 or resolution % 2:
            raise ValueError(f"resolution={resolution!r} must be an even number of pixels, 8 or more")
        if sheets is not None and not isinstance(sheets, (str, SpriteSheet, Sequence)):
            raise ValueError(f"sheets={sheets!r} must be a vendor's name, a SpriteSheet, or a list of them")
        if objects is not None and (isinstance(objects, str) or not isinstance(objects, Sequence)):
            raise ValueError(f"objects={objects!r} must be a list of words, for example ['apple', 'star']")
        if sheets is None or isinstance(sheets, (str, SpriteSheet)):
            loaded = [_sheet(sheets)]
        else:
            loaded = [_sheet(sheet) for sheet in sheets]
        if not loaded:
            raise ValueError("sheets=[] holds no vendor; name at least one, for example 'noto'")
        known = [word for word in OBJECTS.values() if all(word in sheet.objects() for sheet in loaded)]
        unknown = [word for word in objects or () if word not in known]
        if unknown:
            raise ValueError(f"objects={unknown} are not drawn by every vendor; use some of {', '.join(known)}")
        self.resolution = resolution
        self.vendor_names = tuple(sheet.vendor for sheet in loaded)
        self.object_names = tuple(objects) if objects else tuple(known)
        self.colour_names = (NATIVE, *(OBJECT_COLOURS if colours else ()))
        self.background_names = tuple(BACKGROUNDS)
        self.pattern_names = PATTERNS
        slugs = {word: slug for slug, word in OBJECTS.items()}
        drawings = [[sheet.sprites[slugs[word]] for word in self.object_names] for sheet in loaded]
        self._sprites, coloured, native_colour = _paint(drawings, self.colour_names)
        self.native_colours = tuple(native_colour)  # the palette's name of what each drawing has by itself
        self._weights = _label_weights(
            self.object_names, self.colour_names, self.background_names, coloured, native_colour
        )

    def number(self, label: str, word: str) -> int:
        """The number that stands for a word in `Scenes`.

        Args:
            label (`str`): `"object"`, `"colour"`, `"background"`, `"pattern"` or `"vendor"`.
            word (`str`): One of its words.

        Raises:
            ValueError: If the word is not drawn here.
        """
        known = getattr(self, f"{label}_names")
        if word not in known:
            raise ValueError(f"{label}={word!r} is not drawn here; use one of {', '.join(known)}")
        return known.index(word)

    def sample(self, n: int, seed: int = 0, split: str = "train") -> Scenes:
        """n scenes, a pure function of (n, seed, split).

        Args:
            n: Number of scenes, 0 or more.
            seed: Any integer.
            split: "train", "held_out" (the triples of object, colour and background never trained on) or "all".

        Raises:
            ValueError: For a negative or fractional `n`, an unknown split, or one that is empty for these objects.
        """
        _check_count(n)
        if split not in SPLITS:
            raise ValueError(f"split={split!r} is unknown; use one of {', '.join(SPLITS)}")
        generator = torch.Generator().manual_seed(_seed(seed))
        weights = self._weights["train"] + self._weights["held_out"] if split == "all" else self._weights[split]
        if not weights.any():
            raise ValueError(
                f"split={split!r} is empty for objects={list(self.object_names)}; add objects or use 'all'"
            )
        flat = torch.zeros(0, dtype=torch.long)
        if n:
            flat = torch.multinomial(weights.flatten(), n, replacement=True, generator=generator)
        n_colours, n_backgrounds = weights.shape[1:]
        vendor = torch.randint(len(self.vendor_names), (n,), generator=generator)
        pattern = torch.randint(len(self.pattern_names), (n,), generator=generator)
        noise = torch.rand(len(NUISANCE), n, generator=generator)
        nuisance = {name: low + (high - low) * u for (name, (low, high)), u in zip(NUISANCE.items(), noise)}
        nuisance["flip"] = nuisance["flip"].round()
        return Scenes(
            object=flat // (n_colours * n_backgrounds),
            colour=flat // n_backgrounds % n_colours,
            background=flat % n_backgrounds,
            vendor=vendor,
            pattern=pattern,
            **nuisance,
        )

    def render(self, scenes: Scenes, device: str | torch.device = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
        """Pictures (n, 3, R, R) in [-1, 1] and object masks (n, 1, R, R) in [0, 1], float32 on `device`."""
        scenes = scenes.to(device)
        picked = self._sprites.to(device)[scenes.vendor, scenes.object, scenes.colour].float() / 255.0
        return compose(picked, scenes, self.resolution)

    def captions(self, scenes: Scenes, drop: bool = False, seed: int = 0) -> list[str]:
        """One sentence a scene: "a blue star on a pink striped background".

        With several vendors the hand is named ("in noto style"). With `drop` each caption loses its background with
        probability .1 and its style with .5, drawn from `seed`, so that a model learns partial prompts.
        """
        n = len(scenes)
        chance = np.random.default_rng(_seed(seed)).random((n, 2)) if drop else np.ones((n, 2))
        names = ("object", "colour", "background", "pattern", "vendor")
        labels = zip(*(getattr(scenes, name).tolist() for name in names))
        return [
            self._caption(o, c, b, p, v, with_background=background >= 0.1, with_style=style >= 0.5)
            for (o, c, b, p, v), (background, style) in zip(labels, chance)
        ]

    def _caption(
        self,
        object: int,
        colour: int,
        background: int,
        pattern: int,
        vendor: int,
        with_background: bool,
        with_style: bool,
    ) -> str:
        words = [self.object_names[object]]
        if colour:
            words.insert(0, self.colour_names[colour])
        words.insert(0, article(words[0]))
        if with_style and len(self.vendor_names) > 1:
            words += ["in", self.vendor_names[vendor], "style"]
        if with_background:
            words += ["on", _place(background, pattern)]
        return " ".join(words)

    def edit_pairs(self, kind: str, n: int, seed: int = 0, split: str = "all") -> EditPairs:
        """n ground-truth edits: the nuisance stays, one attribute changes.

        Args:
            kind: "colour", "background", "pattern", "object", or "vendor" where several sheets are loaded.
            n: Number of pairs.
            seed: Any integer; equal seeds give equal pairs.
            split: As in `sample`; it constrains the source scenes.

        Raises:
            ValueError: For an unknown kind, or one of which this set has fewer than two values.
        """
        sizes = {
            "colour": len(self.colour_names),
            "background": len(self.background_names),
            "pattern": len(self.pattern_names),
            "object": len(self.object_names),
            "vendor": len(self.vendor_names),
        }
        if not isinstance(kind, str) or kind not in sizes:
            raise ValueError(f"kind={kind!r} is unknown; use one of {', '.join(sizes)}")
        _check_count(n)
        first = 1 if kind == "colour" else 0  # "to its native colour" cannot be said in words
        if sizes[kind] - first < 2:
            raise ValueError(f"kind={kind!r} needs two values to swap, this set has {sizes[kind] - first}")
        source = self.sample(8 * n + 64, seed, split)
        old = getattr(source, kind)
        generator = torch.Generator().manual_seed(_seed(_seed(seed) + 7919))
        new = torch.randint(first, sizes[kind], old.shape, generator=generator)
        target = source.replace(**{kind: new})
        possible = (self._weights["train"] + self._weights["held_out"]) > 0
        allowed = (old != new) & (old >= first) & possible[target.object, target.colour, target.background]
        rows = allowed.nonzero().flatten()[:n]
        if len(rows) < n:
            raise ValueError(f"n={n} pairs of kind {kind!r} could not be drawn; ask for fewer or add objects")
        source, target = source[rows], target[rows]
        (before, inside), (after, also_inside) = self.render(source), self.render(target)
        union = torch.maximum(inside, also_inside)
        mask = 1.0 - torch.minimum(inside, also_inside) if kind in ("background", "pattern") else union
        return EditPairs(kind, before, after, mask, self.captions(source), self.captions(target), source, target)


def vendor_pairs(
    family: str, n: int, sheet: str | SpriteSheet | None = None, resolution: int = 64, seed: int = 0
) -> EditPairs:
    """n edits whose ground truth the vendor drew: members of one aligned family exchanged in the same scene.

    Args:
        family: "hearts", "skin_tone", "hair", "expression" or "clock".
        n: Number of pairs.
        sheet: Sheet or shipped vendor name; default Noto.
        resolution: Side of the pictures in pixels.
        seed: Any integer.

    Raises:
        ValueError: For an unknown family, or one that the vendor did not draw.
    """
    if not isinstance(family, str) or family not in FAMILIES:
        raise ValueError(f"family={family!r} is unknown; use one of {', '.join(FAMILIES)}")
    _check_count(n)
    sheet = _sheet(sheet)
    groups = [[member for member in group if member[0] in sheet.sprites] for group in FAMILIES[family]]
    groups = [group for group in groups if len(group) > 1]
    if not groups:
        raise ValueError(f"family={family!r} is not drawn by {sheet.vendor}; use another vendor or family")
    backdrop = EmojiScenes(sheet, resolution, objects=sheet.objects()[:2], colours=False).sample(n, seed, "all")
    rng = np.random.default_rng(_seed(seed))
    chosen = []
    for _ in range(n):
        group = groups[rng.integers(len(groups))]
        chosen.append([group[i] for i in rng.choice(len(group), 2, replace=False)])
    places = [_place(b, p) for b, p in zip(backdrop.background.tolist(), backdrop.pattern.tolist())]
    drawn, prompts = [], []
    for side in range(2):
        sprites = [sheet.sprites[pair[side][0]] for pair in chosen]
        stack = torch.from_numpy(np.stack(sprites)) if sprites else torch.zeros(0, 96, 96, 4)
        drawn.append(compose(stack.float() / 255.0, backdrop, resolution))
        prompts.append([f"{article(pair[side][1])} {pair[side][1]} on {place}" for pair, place in zip(chosen, places)])
    (before, inside), (after, also_inside) = drawn
    union = torch.maximum(inside, also_inside)
    return EditPairs(family, before, after, union, prompts[0], prompts[1], backdrop, backdrop)


def compose(sprites: torch.Tensor, scenes: Scenes, resolution: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws sprites (n, 96, 96, 4), straight alpha in [0, 1], into their scenes.

    Returns:
        Pictures (n, 3, R, R) in [-1, 1] and masks (n, 1, R, R) in [0, 1].
    """
    side = resolution * SUPERSAMPLING
    centre = (torch.arange(side, device=sprites.device, dtype=torch.float32) + 0.5) / side
    v, u = (axis[None] for axis in torch.meshgrid(centre, centre, indexing="ij"))
    background = _background(scenes, u, v)

    def per_scene(value: torch.Tensor) -> torch.Tensor:
        return value.float()[:, None, None]

    # inverse map: where in the upright sprite ([-1, 1] squared) does a pixel of the picture lie
    turn = torch.deg2rad(per_scene(scenes.angle))
    du, dv = u - per_scene(scenes.x), v - per_scene(scenes.y)
    across = (torch.cos(turn) * du + torch.sin(turn) * dv) * 2.0 / per_scene(scenes.size)
    down = (-torch.sin(turn) * du + torch.cos(turn) * dv) * 2.0 / per_scene(scenes.size)
    across = torch.where(per_scene(scenes.flip) > 0.5, -across, across)
    alpha = sprites[..., 3:]
    premultiplied = torch.cat([sprites[..., :3] * alpha, alpha], -1).permute(0, 3, 1, 2)
    layer = F.grid_sample(premultiplied, torch.stack([across, down], -1), padding_mode="zeros", align_corners=False)
    picture = layer[:, :3] + (1.0 - layer[:, 3:]) * background
    small = F.avg_pool2d(torch.cat([picture, layer[:, 3:]], 1), SUPERSAMPLING)
    return (small[:, :3] * 2.0 - 1.0).clamp(-1.0, 1.0), small[:, 3:].clamp(0.0, 1.0)


def _background(scenes: Scenes, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """(n, 3, H, W) in [0, 1]: a shade of the named colour, with its pattern in a lighter or darker shade."""
    base = torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32, device=u.device)[scenes.background]
    value = (base[:, 2] * (1.0 + 0.06 * scenes.shade.float())).clamp(0.0, 1.0)
    ground = _rgb(base[:, 0], base[:, 1], value)
    # pale colours get a darker figure, all others a lighter one
    pale = (base[:, 1:2] < 0.4) & (base[:, 2:] > 0.9)
    figure = torch.where(pale, 0.78 * ground, 0.62 * ground + 0.38)
    angle = torch.deg2rad(scenes.direction.float())[:, None, None]
    period = scenes.period.float()[:, None, None]
    p = (torch.cos(angle) * u + torch.sin(angle) * v) / period + scenes.phase.float()[:, None, None]
    q = (-torch.sin(angle) * u + torch.cos(angle) * v) / period
    stripes = (p % 1.0 < 0.5).float()
    dots = ((p % 1.0 - 0.5) ** 2 + (q % 1.0 - 0.5) ** 2 < 0.32**2).float()
    checks = ((p % 1.0 < 0.5) ^ (q % 1.0 < 0.5)).float()
    plain = 0.35 * (torch.cos(angle) * (u - 0.5) + torch.sin(angle) * (v - 0.5) + 0.5)  # a faint gradient
    options = torch.stack([plain, stripes, dots, checks], 1)
    amount = options[torch.arange(len(scenes), device=u.device), scenes.pattern][:, None]
    return ground[:, :, None, None] * (1.0 - amount) + figure[:, :, None, None] * amount


def _rgb(hue: torch.Tensor, saturation: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    k = (torch.tensor([5.0, 3.0, 1.0], device=hue.device) + hue[:, None] / 60.0) % 6.0
    return value[:, None] * (1.0 - saturation[:, None] * torch.minimum(k, 4.0 - k).clamp(0.0, 1.0))


def _place(background: int, pattern: int) -> str:
    words = [tuple(BACKGROUNDS)[background], *([PATTERNS[pattern]] if pattern else []), "background"]
    return " ".join([article(words[0]), *words])


def _seed(seed: int) -> int:
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        raise ValueError(f"seed={seed!r} must be a whole number")
    return int(seed) % 2**63


def _check_count(n: int) -> None:
    if not isinstance(n, int) or isinstance(n, bool) or n < 0:
        raise ValueError(f"n={n!r} must be a whole number, 0 or more")


def _sheet(sheet: str | SpriteSheet | None) -> SpriteSheet:
    if isinstance(sheet, SpriteSheet):
        return sheet
    shipped = sorted(path.stem for path in SHEETS.glob("*.json"))
    if sheet is not None and sheet not in shipped:
        raise ValueError(f"sheets={sheet!r} is not a shipped vendor; use one of {', '.join(shipped)} or a SpriteSheet")
    return SpriteSheet.load(SHEETS / f"{sheet}.json" if sheet else None)


def _paint(drawings: list[list[np.ndarray]], colours: Sequence[str]) -> tuple[torch.Tensor, np.ndarray, list[str]]:
    """All recoloured sprites (vendor, object, colour, 96, 96, 4) uint8, which objects are recolourable in every hand,
    and the palette's name for each object's native colour."""
    sprites = np.stack([[[d if c == NATIVE else recolour(d, c) for c in colours] for d in hand] for hand in drawings])
    coloured = np.array([all(recolourable(hand[i]) for hand in drawings) for i in range(len(drawings[0]))])
    return torch.from_numpy(sprites), coloured, [_named_colour(drawing) for drawing in drawings[0]]


def _named_colour(sprite: np.ndarray) -> str:
    cluster, hue = hue_cluster(sprite)
    saturation = rgb_to_hsv(sprite[cluster][:, :3] / 255.0)[:, 1].mean() if cluster.any() else 0.0
    if saturation < 0.15:
        return "gray"
    distance = {name: abs((hue - h + 180.0) % 360.0 - 180.0) for name, (h, s, _) in OBJECT_COLOURS.items() if s > 0.1}
    return min(distance, key=lambda name: distance[name])


def _label_weights(
    objects: Sequence[str],
    colours: Sequence[str],
    backgrounds: Sequence[str],
    coloured: np.ndarray,
    native_colour: Sequence[str],
) -> dict[str, torch.Tensor]:
    """Sampling weights (object, colour, background): no object on its own colour, held-out triples set apart."""
    weights = {split: torch.zeros(len(objects), len(colours), len(backgrounds)) for split in ("train", "held_out")}
    spoken = len(colours) - 1
    for i, word in enumerate(objects):
        for j, colour in enumerate(colours):
            if colour != NATIVE and not coloured[i]:
                continue
            shown = native_colour[i] if colour == NATIVE else colour
            share = 1.0
            if spoken and coloured[i]:
                share = NATIVE_SHARE if colour == NATIVE else (1.0 - NATIVE_SHARE) / spoken
            for k, background in enumerate(backgrounds):
                if shown != background:
                    split = "held_out" if is_held_out(word, colour, background) else "train"
                    weights[split][i, j, k] = share
    return weights


def is_held_out(word: str, colour: str, background: str) -> bool:
    """Whether a triple is kept out of training; a hash, so that the answer never depends on lists or order."""
    digest = hashlib.sha256(f"{word}|{colour}|{background}".encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_SHARE == 0
