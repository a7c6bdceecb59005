"""Multi-Head Mixture-of-Experts for vision and language, in PyTorch.

The names below are loaded on first use, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "build_ffn": "nn.ffn",
    "MultiHeadMoE": "nn.mh_moe",
    "MoE": "nn.moe",
    "Encoder": "models.encoder",
    "create_model": "models.factory",
    "list_models": "models.factory",
    "load_pretrained": "models.factory",
    "replace_mlps": "models.replace",
    "collect_aux_losses": "models.replace",
    "trace_routing": "analysis.trace",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
