"""What prompt-to-prompt does to attention maps: tensors in, tensors out.

Prompt-to-Prompt, 2022, arXiv 2208.01626. A is the source's cross-attention map, `(heads, positions, L)`; those of the
targets are `(targets, heads, positions, L)`:

    replace     A M                              M from `replacement_mapper`
    refine      A[:, m(j)] or the target's own   m from `refinement_mapper`
    reweight    c_j A[:, j]                      c from `equalizer`; rows are not brought back to a sum of 1
    local blend z <- z where mask else z_src     mask from the maps of chosen words, see [`soft_mask`]

Maps of a UNet come in the sizes that halving the latents gives. Sizes are told apart by their number of positions, so
nothing here depends on one resolution or a square picture.
"""

import torch
import torch.nn.functional as F


def map_sizes(height: int, width: int) -> list[tuple[int, int]]:
    """Heights and widths of the attention maps of a UNet, from the latents' own downwards.

    Args:
        height (`int`): Height of the latents.
        width (`int`): Width of the latents.

    Returns:
        `list[tuple[int, int]]`: Entry k is halved k times, rounded up, down to `(1, 1)`. No two have the same product.

    Example:
        ```python
        from diffusers_ext.attention import map_sizes

        assert map_sizes(9, 4) == [(9, 4), (5, 2), (3, 1), (2, 1), (1, 1)]
        ```
    """
    sizes = [(height, width)]
    while sizes[-1] != (1, 1):
        height, width = sizes[-1]
        sizes.append(((height + 1) // 2, (width + 1) // 2))
    return sizes


def replace_words(source: torch.Tensor, mapper: torch.Tensor) -> torch.Tensor:
    """The source's map with its columns carried over to each target.

    Args:
        source (`torch.Tensor` of shape `(heads, positions, L)`): A.
        mapper (`torch.Tensor` of shape `(targets, L, L)`): M.

    Returns:
        `torch.Tensor` of shape `(targets, heads, positions, L)`: A M.
    """
    return torch.einsum("hpw,twn->thpn", source, mapper.to(source))


def refine_words(source: torch.Tensor, own: torch.Tensor, mapper: torch.Tensor, aligned: torch.Tensor) -> torch.Tensor:
    """The source's map where a token has a partner, the target's own map elsewhere.

    Args:
        source (`torch.Tensor` of shape `(heads, positions, L)`): A.
        own (`torch.Tensor` of shape `(targets, heads, positions, L)`): The targets' maps; or `(1, ...)` for all.
        mapper (`torch.Tensor` of shape `(targets, L)`):
            Partners, int64; what stands where there is none does not matter.
        aligned (`torch.Tensor` of shape `(targets, L)`): Whether there is one, bool.

    Returns:
        `torch.Tensor` of shape `(targets, heads, positions, L)`: The refined maps.
    """
    gathered = source[..., mapper.to(source.device)].movedim(-2, 0)
    return torch.where(aligned.to(source.device)[:, None, None], gathered, own)


def reweight_words(maps: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Maps with the attention to each token multiplied.

    Args:
        maps (`torch.Tensor` of shape `(targets, heads, positions, L)`): Maps; or `(1, ...)` for all targets.
        factors (`torch.Tensor` of shape `(targets, L)`): c.

    Returns:
        `torch.Tensor` of shape `(targets, heads, positions, L)`: The products, not normalised.
    """
    return maps * factors.to(maps)[:, None, None]


def in_window(edited: torch.Tensor, own: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
    """The edited maps for the tokens whose window is open, the targets' own for the others.

    Args:
        edited (`torch.Tensor` of shape `(targets, heads, positions, L)`): Edited maps.
        own (`torch.Tensor`): The targets' own, the same shape.
        active (`torch.Tensor` of shape `(targets, L)`): One row of `word_schedule`, bool.

    Returns:
        `torch.Tensor`: The same shape.
    """
    return torch.where(active.to(own.device)[:, None, None], edited, own)


def word_attention(maps: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """How much each position attends to chosen words: summed over tokens, averaged over heads.

    Args:
        maps (`torch.Tensor` of shape `(prompts, heads, positions, L)`): Maps.
        words (`torch.Tensor` of shape `(prompts, L)`): 1 for chosen tokens, 0 for others.

    Returns:
        `torch.Tensor` of shape `(prompts, positions)`: Attention.
    """
    return torch.einsum("nhpw,nw->np", maps, words.to(maps)) / maps.shape[1]


def soft_mask(attention: torch.Tensor, size: tuple[int, int], widen: bool) -> torch.Tensor:
    """Attention to words as a picture of the latents' size whose largest value is 1.

    Args:
        attention (`torch.Tensor` of shape `(prompts, height, width)`): Summed over layers and steps.
        size (`tuple[int, int]`): Height and width of the latents.
        widen (`bool`): Whether each position takes the largest value of its 3 x 3 neighbourhood.

    Returns:
        `torch.Tensor` of shape `(prompts, 1, *size)`: Values in [0, 1]; all 0 where nothing was attended to.
    """
    picture = attention[:, None]
    if widen:
        picture = F.max_pool2d(picture, 3, stride=1, padding=1)
    picture = F.interpolate(picture, size)
    largest = picture.amax(dim=(2, 3), keepdim=True)
    return picture / largest.clamp_min(torch.finfo(picture.dtype).tiny)


def above_in_either(soft: torch.Tensor, threshold: float) -> torch.Tensor:
    """Where a prompt's own mask or the source's is above a threshold.

    Args:
        soft (`torch.Tensor` of shape `(prompts, 1, height, width)`): From [`soft_mask`], the source first.
        threshold (`float`): Between 0 and 1.

    Returns:
        `torch.Tensor`: The same shape, bool.
    """
    mask = soft > threshold
    return mask | mask[:1]


def keep_source_outside(latents: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Puts the source where the mask is not.

    Args:
        latents (`torch.Tensor` of shape `(prompts, channels, height, width)`): The source's latents first.
        mask (`torch.Tensor` of shape `(prompts, 1, height, width)`): Where the edits may differ, bool.

    Returns:
        `torch.Tensor`: The same shape; outside the mask the source's values themselves, bit for bit.
    """
    return torch.where(mask, latents, latents[:1])
