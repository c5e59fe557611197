"""Configs of the flow-matching schedulers of diffusers, and what they mean for a scheduler that knows flow models among others."""

from typing import Any


def is_flow_config(config: Any) -> bool:
    """Whether a config is one of the flow-matching schedulers of diffusers, which do not say so themselves."""
    return hasattr(config, "get") and "shift" in config and "beta_schedule" not in config


def translated_flow_config(config: Any) -> dict[str, Any]:
    """Settings of ours that say what the config of a flow-matching scheduler of diffusers means.

    Raises:
        ValueError: If it asks for something that has no counterpart here.
    """
    for name in ("invert_sigmas", "stochastic_sampling"):
        if config.get(name):
            raise ValueError(
                f"{name}=True of this flow-matching scheduler has no counterpart here; use one of diffusers"
            )
    return {"prediction_type": "flow_prediction", "flow_shift": config.get("shift", 1.0)}


def translated_multistep_config(config: Any) -> dict[str, Any]:
    """Settings of a flow-matching scheduler that say what the config of a DPM-Solver or UniPC scheduler means.

    Raises:
        ValueError: If it is the config of a diffusion model.
    """
    if not hasattr(config, "get") or "use_flow_sigmas" not in config or "shift" in config:
        return {}
    kind = config.get("prediction_type")
    if not config["use_flow_sigmas"] or kind != "flow_prediction":
        raise ValueError(
            f"prediction_type={kind!r}, use_flow_sigmas={config['use_flow_sigmas']!r}: this config is not one of a flow model; use "
            "one with prediction_type='flow_prediction' and use_flow_sigmas=True"
        )
    return {"shift": config.get("flow_shift", 1.0)}


class FlowConfigMixin:
    """For schedulers with `prediction_type="flow_prediction"` and a `flow_shift`."""

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As in diffusers; the config of a flow-matching scheduler is understood as well.

        Args:
            config (`dict`): A config, for example `pipe.scheduler.config`.
            return_unused_kwargs (`bool`, *optional*, defaults to `False`): Whether to return the arguments left over too.
            **kwargs: Settings that replace those of the config.

        Returns:
            The scheduler, or a pair of it and the unused arguments.
        """
        if is_flow_config(config):
            kwargs = translated_flow_config(config) | kwargs
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)  # type: ignore[misc]


class FlowMatchConfigMixin:
    """For flow-matching schedulers: the other way round."""

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As in diffusers; the config of a DPM-Solver or UniPC scheduler with flow sigmas is understood as well."""
        if translated := translated_multistep_config(config):
            known = cls._get_init_keys(cls)  # type: ignore[attr-defined]
            config = {name: value for name, value in config.items() if name in known} | translated
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)  # type: ignore[misc]
