"""Several LoRA adapters on one frozen network, so that teacher, student and fake score cost the memory of one.

The teacher is the network with no adapter at work. Low-rank adaptation: Hu et al. 2021, arXiv 2106.09685.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from torch import nn


# all linear maps and convolutions of a UNet's blocks, those of LCM-LoRA; transformers have the first four and `ff`
TARGET_MODULES = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
    "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip


class SharedBase:
    """A frozen network with named adapters, of which one at a time, or none, is at work.

    Args:
        network: A model of diffusers; it is frozen and gets the adapters.
        names: Names of the adapters. The last projection of each starts at zero: they change nothing at first.
        rank: Rank of the adapters, 1 or more; their alpha is the same, which is a scale of 1.
        target_modules: Ends of the names of the layers that get one.
        seed: Seed of the initial weights; the global random state is not touched.

    Raises:
        ValueError: For a rank below 1, no or repeated names, or layers that the network does not have.

    Example:
        >>> from diffusers import UNet2DModel
        >>> unet = UNet2DModel(8, 1, 1, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
        ...                    down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
        >>> base = SharedBase(unet, ["student", "fake"], rank=2)
        >>> with base.using("fake"):
        ...     prediction = unet(torch.zeros(1, 1, 8, 8), 0).sample
    """

    def __init__(
        self,
        network: nn.Module,
        names: Sequence[str],
        rank: int = 64,
        target_modules: Sequence[str] = TARGET_MODULES,
        seed: int = 0,
    ):
        if rank < 1:
            raise ValueError(f"rank={rank} must be 1 or more")
        if not names or len(set(names)) != len(names) or any("." in name or not name for name in names):
            raise ValueError(f"names={list(names)} must be one or more different words without dots")
        ends = tuple(target_modules)
        if not any(name.endswith(ends) for name, _ in network.named_modules()):
            raise ValueError(f"target_modules={list(ends)} name no layer of {type(network).__name__}")
        network.requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for name in names:
                config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(ends), bias="none")
                with warnings.catch_warnings():
                    # several adapters on one network are what is wanted
                    warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
                    inject_adapter_in_model(config, network, name)
        self.network = network
        self.names = tuple(names)
        self._layers = [layer for layer in network.modules() if isinstance(layer, LoraLayer)]
        self._adapted = [
            value
            for layer in self._layers
            for kind in layer.adapter_layer_names
            for value in getattr(layer, kind).parameters()
        ]
        for value in self._adapted:
            value.requires_grad_(True)
        self._active: str | None = self.names[0]
        self._switch(None)

    def parameter_names(self, name: str, prefix: str = "") -> frozenset[str]:
        """Names of an adapter's parameters, with `prefix` in front, for a `Player`.

        Raises:
            ValueError: For a name that is no adapter.
        """
        self._check(name)
        own = {id(value) for value in self._adapted}
        return frozenset(
            prefix + key for key, value in self.network.named_parameters() if id(value) in own and f".{name}." in key
        )

    @contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """Within the block the adapter `name` is at work, with `None` none: the network is the teacher.

        A backward pass may follow outside the block, but not with gradient checkpointing, which would compute the forward pass
        again with another adapter.

        Raises:
            ValueError: For a name that is no adapter.
        """
        if name is not None:
            self._check(name)
        before = self._active
        self._switch(name)
        try:
            yield
        finally:
            self._switch(before)

    def state_dict(self, name: str) -> dict[str, torch.Tensor]:
        """Weights of one adapter in the format of `save_lora_weights`.

        Raises:
            ValueError: For a name that is no adapter.
        """
        self._check(name)
        state = get_peft_model_state_dict(self.network, adapter_name=name)
        # trained channels-last, which safetensors does not keep
        return {key: value.detach().contiguous() for key, value in state.items()}

    @torch.no_grad()
    def merged_state_dict(self, name: str | None) -> dict[str, torch.Tensor]:
        """Weights of a network without adapters that computes what this one does with an adapter, or with none.

        Args:
            name: An adapter; `None` for the frozen network itself.

        Raises:
            ValueError: For a name that is no adapter.
        """
        if name is not None:
            self._check(name)
        merged = {
            key.replace(".base_layer.", "."): value.detach().clone()
            for key, value in self.network.state_dict().items()
            if ".lora_" not in key
        }
        for key, layer in self.network.named_modules():
            if name is not None and isinstance(layer, LoraLayer):
                merged[f"{key}.weight"] += layer.get_delta_weight(name)  # type: ignore[attr-defined]
        return merged

    def _check(self, name: str) -> None:
        if name not in self.names:
            raise ValueError(f"adapter {name!r} is unknown; use one of {', '.join(self.names)}")

    def _switch(self, name: str | None) -> None:
        if name == self._active:
            return
        # peft also decides here who requires gradients, which is the trainer's business and would cut graphs already built
        flags = [value.requires_grad for value in self._adapted]
        for layer in self._layers:
            if name is None:
                layer.enable_adapters(False)
            else:
                if self._active is None:
                    layer.enable_adapters(True)
                layer.set_adapter(name)
        for value, flag in zip(self._adapted, flags):
            value.requires_grad_(flag)
        self._active = name
