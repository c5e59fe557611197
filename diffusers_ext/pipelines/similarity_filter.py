"""Leaves out pictures of a stream that hardly differ from the last one that was let through.

The stochastic similarity filter of StreamDiffusion, 2023, arXiv 2312.12491: a picture is left out with the probability
1 - (1 - c) / (1 - threshold) with c the cosine of the two pictures, so that a still scene is looked at now and then, and how often
changes smoothly with how much moves.
"""

import torch

from ..schedulers.residual_guidance import skip_probability
from .inputs import checked_number, checked_steps


class SimilarityFilter:
    """Decides which pictures of a stream need not be computed.

    Args:
        threshold (`float`, *optional*, defaults to 0.98): Cosine similarity, from 0 and below 1, at and below which every picture is
            computed. Lower leaves out more.
        max_skips (`int`, *optional*, defaults to 10): Most pictures left out in a row.
        generator (`torch.Generator`, *optional*): Source of the draws. Each stream starts from the state that it has here, so that
            streams repeat; without it the global generator of torch is drawn from.

    Raises:
        ValueError: If a number is out of range.
        TypeError: If `generator` is not one.

    Example:
        ```python
        import torch
        from diffusers_ext.pipelines import SimilarityFilter

        still = SimilarityFilter(generator=torch.Generator().manual_seed(0))
        picture = torch.rand(1, 3, 8, 8)
        assert not still.skips(picture)  # the first one never
        still.passed(picture)
        assert still.skips(picture)
        ```
    """

    def __init__(self, threshold: float = 0.98, max_skips: int = 10, generator: torch.Generator | None = None) -> None:
        self.threshold = checked_number(threshold, "threshold", 0.0, 1.0)
        if self.threshold == 1.0:
            raise ValueError("threshold=1 leaves no room for a picture to be left out; give less, such as 0.98")
        self.max_skips = checked_steps(max_skips, "max_skips")
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator={generator!r} is not a torch.Generator; give one, or leave it out")
        self._generator = None if generator is None else generator.clone_state()
        self._last: torch.Tensor | None = None
        self._skipped = 0

    def fresh(self) -> "SimilarityFilter":
        """The same filter before its first picture, with its own draws."""
        return SimilarityFilter(self.threshold, self.max_skips, self._generator)

    def skips(self, picture: torch.Tensor) -> bool:
        """Whether a picture need not be computed; to be followed by `skipped` or `passed` once that is done."""
        last = self._last
        if last is None or last.shape != picture.shape or self._skipped >= self.max_skips:
            return False
        similarity = float(torch.cosine_similarity(last.flatten().double(), picture.flatten().double(), dim=0))
        device = "cpu" if self._generator is None else self._generator.device
        draw = float(torch.rand((), generator=self._generator, device=device))
        return draw < skip_probability(similarity, self.threshold)

    def passed(self, picture: torch.Tensor) -> None:
        """Notes that a picture was let through: the next ones are compared with it."""
        self._last, self._skipped = picture.clone(), 0

    def skipped(self) -> None:
        """Notes that a picture was left out."""
        self._skipped += 1
