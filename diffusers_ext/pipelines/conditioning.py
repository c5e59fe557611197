"""From prompts to the keyword arguments of the network, for Stable Diffusion 1.x and 2.x, and for SDXL.

Prompts are encoded one by one: a batch rounds differently, and guidance amplifies that (see `guidance/guided_step.py`).
"""

from collections.abc import Sequence
from typing import Any

import torch

from ..guidance import Condition, join_conditions
from .inputs import check_text_to_image


class ConditioningMixin:
    """Conditions for the networks of Stable Diffusion 1.x and 2.x; put it before the pipeline class."""

    # Given by the pipeline class.
    vae: Any
    unet: Any
    image_encoder: Any
    _execution_device: torch.device
    encode_prompt: Any
    get_guidance_scale_embedding: Any
    prepare_ip_adapter_image_embeds: Any

    _needed_components: tuple[str, ...] = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
    _text_encoders: tuple[str, ...] = ("text_encoder",)

    def _check_networks(self) -> None:
        check_text_to_image(self.unet, self.vae)

    def _check_model(self) -> None:
        for name in self._needed_components:
            if getattr(self, name, None) is None:
                raise ValueError(f"this pipeline has no {name}; load it with all its components")
        self._check_networks()

    @property
    def _is_guidance_distilled(self) -> bool:
        """Whether the network takes the guidance scale as an input, as those distilled with latent consistency do."""
        return getattr(self.unet.config, "time_cond_proj_dim", None) is not None

    def _encoded(self, prompt: str, image_size: Sequence[int], lora_scale: float | None) -> dict[str, Any]:
        """The condition of one prompt."""
        embeds, _ = self.encode_prompt([prompt], self._execution_device, 1, False, lora_scale=lora_scale)
        return {"encoder_hidden_states": embeds}

    def _without_words(self, condition: dict[str, Any]) -> dict[str, Any]:
        """What stands for no negative prompt, from the condition of the empty one."""
        return condition

    def _condition(
        self,
        prompts: Sequence[str],
        image_size: Sequence[int],
        lora_scale: float | None = None,
        image_embeds: list[torch.Tensor] | None = None,
        guidance_scale: float = 1.0,
        no_words: bool = False,
    ) -> Condition:
        """The condition of a batch.

        Args:
            prompts (list of `str`): One for each sample.
            image_size (`[height, width]`): Of the pictures, in pixels.
            lora_scale (`float`, *optional*): Scale of LoRA layers in the text encoders.
            image_embeds (list of `torch.Tensor`, *optional*): Of the IP-Adapters, each `(batch, ...)`.
            guidance_scale (`float`, *optional*, defaults to 1.0): For a network that takes it as an input.
            no_words (`bool`, *optional*, defaults to `False`): Whether `""` stands for no negative prompt at all.

        Returns:
            `dict`: Keyword arguments of the network.
        """
        encoded = {prompt: self._encoded(prompt, image_size, lora_scale) for prompt in dict.fromkeys(prompts)}
        if no_words:
            encoded = {prompt: self._without_words(condition) for prompt, condition in encoded.items()}
        condition = dict(join_conditions([encoded[prompt] for prompt in prompts]))
        if image_embeds is not None:
            condition["added_cond_kwargs"] = {**condition.get("added_cond_kwargs", {}), "image_embeds": image_embeds}
        if self._is_guidance_distilled:
            scales = torch.full((len(prompts),), guidance_scale - 1.0)
            embedding = self.get_guidance_scale_embedding(scales, self.unet.config.time_cond_proj_dim)
            condition["timestep_cond"] = embedding.to(self._execution_device, self.unet.dtype)
        return condition

    def _image_prompts(
        self, image: Any, embeds: Any, batch_size: int
    ) -> tuple[list[torch.Tensor] | None, list[torch.Tensor] | None]:
        """Embeddings of the IP-Adapters for `batch_size` samples: with the picture prompt, and without one.

        Both are None if no IP-Adapter is loaded. Without `image` and `embeds` the first is as the second.
        """
        if getattr(self.unet.config, "encoder_hid_dim_type", None) != "ip_image_proj":
            for name, value in (("ip_adapter_image", image), ("ip_adapter_image_embeds", embeds)):
                if value is not None:
                    shape = getattr(value, "shape", None)
                    kind = type(value).__name__ if shape is None else f"{type(value).__name__} of shape {tuple(shape)}"
                    shown = repr(value) if isinstance(value, (str, int, float)) else f"a {kind}"
                    raise ValueError(
                        f"{name} is {shown}, but no IP-Adapter is loaded; call load_ip_adapter() first, or leave it out"
                    )
            return None, None
        given = image is not None or embeds is not None
        if image is not None and embeds is not None:
            raise ValueError("ip_adapter_image and ip_adapter_image_embeds are both given; give one of them")
        if embeds is None and getattr(self, "image_encoder", None) is None:
            raise ValueError(
                "an IP-Adapter is loaded, but no image_encoder; load one, give ip_adapter_image_embeds, or call "
                "unload_ip_adapter()"
            )
        adapters = len(self.unet.encoder_hid_proj.image_projection_layers)
        if not given:
            # Only the half without a picture is used; its form depends on the kind of adapter, which diffusers knows.
            image = [torch.zeros(1, 3, 8, 8)] * adapters
        elif embeds is not None and (
            not isinstance(embeds, list)
            or len(embeds) != adapters
            or not all(isinstance(item, torch.Tensor) and item.ndim in (3, 4) and len(item) == 2 for item in embeds)
        ):
            raise ValueError(
                f"ip_adapter_image_embeds must be a list of {adapters} tensors, one an IP-Adapter, of shape (2, 1, width): "
                "without and with the picture"
            )
        both = self.prepare_ip_adapter_image_embeds(image, embeds, self._execution_device, batch_size, True)
        without, with_picture = zip(*(item.to(self.unet.dtype).chunk(2) for item in both), strict=True)
        return list(with_picture if given else without), list(without)


class SDXLConditioningMixin(ConditioningMixin):
    """Conditions for the network of SDXL: two text encoders, a pooled embedding, and the sizes of the picture."""

    text_encoder_2: Any
    config: Any
    _get_add_time_ids: Any

    _needed_components = (
        "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "scheduler",
    )  # fmt: skip
    _text_encoders = ("text_encoder", "text_encoder_2")

    def _check_networks(self) -> None:
        check_text_to_image(self.unet, self.vae, addition_embed_type="text_time")

    def _encoded(self, prompt: str, image_size: Sequence[int], lora_scale: float | None) -> dict[str, Any]:
        device = self._execution_device
        embeds, _, pooled, _ = self.encode_prompt(
            [prompt], device=device, num_images_per_prompt=1, do_classifier_free_guidance=False, lora_scale=lora_scale
        )
        size = tuple(image_size)
        width = self.text_encoder_2.config.projection_dim
        time_ids = self._get_add_time_ids(size, (0, 0), size, embeds.dtype, text_encoder_projection_dim=width)
        return {
            "encoder_hidden_states": embeds,
            "added_cond_kwargs": {"text_embeds": pooled, "time_ids": time_ids.to(device)},
        }

    def _without_words(self, condition: dict[str, Any]) -> dict[str, Any]:
        if not self.config.force_zeros_for_empty_prompt:
            return condition
        added = condition["added_cond_kwargs"]
        return {
            "encoder_hidden_states": torch.zeros_like(condition["encoder_hidden_states"]),
            "added_cond_kwargs": {**added, "text_embeds": torch.zeros_like(added["text_embeds"])},
        }
