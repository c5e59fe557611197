"""The measures of PIE-Bench, as the code of its authors computes them, so that figures can stand beside published ones.

With m the mask of the edit, x the source picture and y the edited one, in [0, 1]:

    outside the edit    x (1 - m) against y (1 - m), the whole frame: what is masked is black in both, and counts as equal
        psnr            -10 log10 of the mean squared error
        mse             times 10^4
        ssim            times 100
        lpips           times 1000; SqueezeNet, pictures in [-1, 1] (package `lpips`)
    structure           times 1000: mean squared difference of the self-similarity of DINO's keys, whole pictures
    clip                100 times the cosine of the picture's and the prompt's CLIP embeddings, not below 0
    clip edited         the same of y m

Two habits of their code are kept because they are in all published figures. A picture with a large mask gets better values
outside than the pixels there have by themselves. And DINO is given pixels of 0 to 255 that are normalised as if they were
in [0, 1], after scaling without a filter.
"""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from diffusers_ext.metrics import psnr, ssim


# Name -> (heading, what a value is multiplied by, whether higher is better), in the order of the authors' table.
MEASURES: dict[str, tuple[str, float, bool]] = {
    "structure": ("structure distance x1000", 1e3, False),
    "psnr": ("PSNR", 1.0, True),
    "lpips": ("LPIPS x1000", 1e3, False),
    "mse": ("MSE x10^4", 1e4, False),
    "ssim": ("SSIM x100", 1e2, True),
    "clip": ("CLIP", 1.0, True),
    "clip_edited": ("CLIP, edited part", 1.0, True),
}
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


class Measures:
    """What pictures are measured by.

    Args:
        dino: Folder or Hub id of a `ViTModel`, `"facebook/dino-vitb8"` for published figures; None leaves structure out.
        clip: Folder or Hub id of a `CLIPModel` with its processor, `"openai/clip-vit-large-patch14"` for published
            figures; None leaves CLIP out.
        device: Where the networks run.

    Attributes:
        left_out: Name of each measure that is left out -> why.
    """

    def __init__(self, dino: str | None = None, clip: str | None = None, device: str = "cpu") -> None:
        self.left_out: dict[str, str] = {}
        self.device = device
        self.dino = None if dino is None else StructureDistance(dino, device)
        self.clip = None if clip is None else ClipScore(clip, device)
        self.lpips = load_lpips(device)
        if self.dino is None:
            self.left_out["structure"] = "no --dino was given"
        if self.clip is None:
            self.left_out |= dict.fromkeys(("clip", "clip_edited"), "no --clip was given")
        if self.lpips is None:
            self.left_out["lpips"] = "the package `lpips` cannot be imported"

    @property
    def names(self) -> list[str]:
        return [name for name in MEASURES if name not in self.left_out]

    @torch.no_grad()
    def __call__(self, source: Image.Image, edited: Image.Image, mask: np.ndarray, prompt: str) -> dict[str, float]:
        """Every measure of one edit.

        Args:
            source: The picture.
            edited: The result, of the same size.
            mask: (height, width) of bool, true where the edit may change something.
            prompt: What the edit shall show.

        Returns:
            By name. NaN outside of a mask that covers everything, and inside of an empty one; infinite PSNR of equal pictures.
        """
        if source.size != edited.size or mask.shape != source.size[::-1]:
            raise ValueError(f"picture {source.size}, result {edited.size} and mask {mask.shape[::-1]} differ in size")
        x, y = pixels(source), pixels(edited)
        outside = torch.from_numpy(~mask).to(x)
        found = dict.fromkeys(("psnr", "mse", "ssim", "lpips"), math.nan)
        if outside.any():
            # -1 is black.
            bare_x, bare_y = ((picture + 1) * outside - 1 for picture in (x, y))
            found["psnr"] = float(psnr(bare_y, bare_x))
            found["mse"] = float(((bare_y - bare_x).double() / 2).square().mean())
            found["ssim"] = float(ssim(bare_y, bare_x))
            if self.lpips is not None:
                found["lpips"] = float(self.lpips(bare_y.to(self.device), bare_x.to(self.device)))
        if self.dino is not None:
            found["structure"] = self.dino(source, edited)
        if self.clip is not None:
            only = Image.fromarray(np.asarray(edited) * mask[..., None])
            found["clip"] = self.clip(edited, prompt)
            found["clip_edited"] = self.clip(only, prompt) if mask.any() else math.nan
        return {name: found[name] for name in self.names}


class StructureDistance:
    """How differently two pictures are built: self-similarity of the keys in the last layer of a DINO ViT.

    Splicing ViT Features for Semantic Appearance Transfer, 2022, arXiv 2201.00424.

    Args:
        model: Folder or Hub id of a `ViTModel`.
        device: Where it runs.

    Raises:
        ValueError: If the network has no keys of its own.
    """

    def __init__(self, model: str, device: str = "cpu") -> None:
        from transformers import ViTModel

        self.vit = ViTModel.from_pretrained(model, add_pooling_layer=False).to(device).eval()
        self.side, self.device = int(self.vit.config.image_size), device
        layers = [layer for name, layer in self.vit.named_modules() if name.split(".")[-1] in ("k_proj", "key")]
        if not layers:
            raise ValueError(f"dino={model!r} has no layer that makes keys; give a ViT such as facebook/dino-vitb8")
        self.layer = layers[-1]

    def self_similarity(self, picture: Image.Image) -> torch.Tensor:
        """Cosines between the keys of all tokens, the class token's too: (tokens, tokens)."""
        values = (
            torch.from_numpy(np.asarray(picture.convert("RGB"), np.float32)).permute(2, 0, 1)[None].to(self.device)
        )
        values = F.interpolate(values, (self.side, self.side), mode="bilinear", align_corners=False)
        mean, std = (torch.tensor(part, device=self.device)[:, None, None] for part in (_MEAN, _STD))
        kept: list[torch.Tensor] = []
        handle = self.layer.register_forward_hook(lambda layer, given, keys: kept.append(keys[0]))
        try:
            self.vit((values - mean) / std)
        finally:
            handle.remove()
        keys = F.normalize(kept[0], dim=-1, eps=1e-8)
        return keys @ keys.mT

    @torch.no_grad()
    def __call__(self, source: Image.Image, edited: Image.Image) -> float:
        return float((self.self_similarity(edited) - self.self_similarity(source)).square().mean())


class ClipScore:
    """100 times the cosine of a picture's and a text's CLIP embeddings, not below 0 (CLIPScore, 2021, arXiv 2104.08718).

    Args:
        model: Folder or Hub id of a `CLIPModel` with its processor.
        device: Where it runs.
    """

    def __init__(self, model: str, device: str = "cpu") -> None:
        from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

        self.model = CLIPModel.from_pretrained(model).to(device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.processor = CLIPImageProcessor.from_pretrained(model)
        self.device = device

    @torch.no_grad()
    def __call__(self, picture: Image.Image, text: str) -> float:
        length = self.model.config.text_config.max_position_embeddings
        words = self.tokenizer([text], return_tensors="pt", truncation=True, max_length=length).to(self.device)
        values = self.processor(images=[picture.convert("RGB")], return_tensors="pt").pixel_values.to(self.device)
        output = self.model(input_ids=words.input_ids, attention_mask=words.attention_mask, pixel_values=values)
        return max(100.0 * float(F.cosine_similarity(output.image_embeds, output.text_embeds)), 0.0)


def load_lpips(device: str = "cpu") -> Any | None:
    """LPIPS with SqueezeNet, or None where the package `lpips` cannot be imported."""
    try:
        import lpips
    except ImportError:
        return None
    return lpips.LPIPS(net="squeeze", verbose=False).to(device).eval()


def pixels(picture: Image.Image) -> torch.Tensor:
    """(1, 3, height, width) in [-1, 1]."""
    values = torch.from_numpy(np.asarray(picture.convert("RGB"), np.float32)).permute(2, 0, 1)[None]
    return values / 127.5 - 1.0
