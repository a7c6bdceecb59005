"""Keys and values of what attention has seen, so that a text can grow without encoding its beginning again."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .multiway import Streams


class KeyValueCache:
    """Keys and values of images and texts, ``(B, H, N, head_dim)`` per attention layer and modality.

    Start with an empty one; every call of the encoder that is given it adds the keys and values of its tokens. An image
    is kept once, however many texts :meth:`select` lets go on from it: what they see is made layer by layer.
    """

    def __init__(self) -> None:
        self._layers: dict[nn.Module, tuple[Streams, Streams]] = {}
        self._image_rows: Tensor | None = None  # which of the kept images a sample has; none while each has its own

    @property
    def num_images(self) -> int:
        """Images that the samples have, each its own."""
        return self._shape("image")[0] if self._image_rows is None else len(self._image_rows)

    @property
    def text_length(self) -> int:
        """Tokens it holds of every text."""
        return self._shape("text")[2]

    def extend(self, layer: nn.Module, keys: Streams, values: Streams) -> tuple[Streams, Streams]:
        """Add the keys and values of new tokens in ``layer``; returns those of all tokens so far."""
        if layer in self._layers:
            keys, values = (
                {name: torch.cat([old[name], x], dim=2) if x.shape[2] else old[name] for name, x in new.items()}
                for old, new in zip(self._layers[layer], (keys, values), strict=True)
            )
        self._layers[layer] = keys, values
        return self._by_sample(keys), self._by_sample(values)

    def cut_text(self, length: int) -> None:
        """Keep the first ``length`` tokens of every text."""
        for streams in self._all_streams():
            streams["text"] = streams["text"][:, :, :length]

    def select(self, index: Tensor) -> None:
        """Sample ``i`` becomes what sample ``index[i]`` was, for any number of them; every text must be a pair's."""
        for streams in self._all_streams():
            streams["text"] = streams["text"].index_select(0, index)
        self._image_rows = index if self._image_rows is None else self._image_rows[index]

    def _by_sample(self, streams: Streams) -> Streams:
        if self._image_rows is None:
            return streams
        return streams | {"image": streams["image"].index_select(0, self._image_rows)}

    def _shape(self, name: str) -> torch.Size:
        found = [streams[name].shape for streams in self._all_streams() if name in streams]
        return found[0] if found else torch.Size((0, 0, 0, 0))

    def _all_streams(self) -> list[Streams]:
        return [streams for pair in self._layers.values() for streams in pair]
