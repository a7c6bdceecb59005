"""Other libraries' layers of experts, one adapter a file, for who has them installed.

An adapter is a function ``build(layer, size, device)``: it makes the library's module with the router and the experts
of ``layer``, and wraps it as a *mixer*, rows (T, d) -> (rows, balance loss or none), which remembers as ``experts`` and
``kept`` (T, K) what it chose, and names its weights by ``weights(of)``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from . import megablocks, scattermoe, torchscale, transformers
from .base import NotHere

OPPONENTS: dict[str, Callable[..., nn.Module]] = {
    "torchscale": partial(torchscale.build, with_tutel=False),
    "torchscale_tutel": partial(torchscale.build, with_tutel=True),
    "transformers": transformers.build,
    "scattermoe": scattermoe.build,
    "megablocks": megablocks.build,
}


def build_opponent(name: str, *given: Any) -> nn.Module:
    """The mixer of an opponent.

    Raises:
        NotHere: its library is missing, needs another device, or does not work here.
    """
    try:
        return OPPONENTS[name](*given)
    except NotHere:
        raise
    except Exception as error:  # another version may fail in any way, and the other contenders can still be timed
        raise NotHere(f"{type(error).__name__}: {str(error)[:200]}") from error


__all__ = ["OPPONENTS", "NotHere", "build_opponent"]
