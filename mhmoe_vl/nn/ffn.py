"""The table of feed-forward variants."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

from ..errors import ConfigError
from .feed_forward import FeedForward, FFNLayer, FFNOutput
from .mh_moe import MultiHeadMoE
from .moe import MoE

__all__ = ["FFN_VARIANTS", "FFNLayer", "FFNOutput", "build_ffn"]

FFN_VARIANTS: dict[str, type[FFNLayer]] = {"dense": FeedForward, "moe": MoE, "mh_moe": MultiHeadMoE}
"""Layer classes by ``ffn.kind``."""


def build_ffn(dim: int, *, kind: str, **options: Any) -> FFNLayer:
    """The feed-forward layer named ``kind`` for tokens ``dim`` wide.

    Args:
        dim: width of a token.
        kind: a key of :data:`FFN_VARIANTS`.
        options: the constructor's keyword arguments.

    Raises:
        ConfigError: unknown kind or option, or values that do not fit each other.
    """
    if kind not in FFN_VARIANTS:
        raise ConfigError(f"ffn: kind {kind!r} is unknown (choose from {', '.join(FFN_VARIANTS)})")
    known = set(inspect.signature(FFN_VARIANTS[kind]).parameters) - {"dim"}
    for name in options:
        if name in ("heads", "num_heads") and "num_subtokens" in known:
            raise ConfigError(f"ffn: {name} is not an option of {kind} (pieces of a token are num_subtokens)")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            remedy = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(known))}"
            raise ConfigError(f"ffn: {name} is not an option of {kind} ({remedy})")
    return FFN_VARIANTS[kind](dim, **options)
