"""Texts for images, one token at a time, as BEiT-3 writes captions.

The text so far and a mask token go in, and the head reads at the mask what comes next. Keys and values of the image
and the text stay in a cache; those of the mask are cut off again. So after the first call only (newest token, mask) is
encoded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError
from ..nn.cache import KeyValueCache
from .encoder import Encoder


@torch.no_grad()
def generate(
    encoder: Encoder,
    head: Callable[[Tensor], Tensor],
    images: Tensor,
    *,
    bos_id: int,
    eos_id: int,
    mask_id: int,
    max_len: int,
    num_beams: int = 1,
    length_penalty: float = 0.6,
    forbidden_ids: Sequence[int] = (),
) -> list[list[int]]:
    """The ids of one text per image, begin and end left out.

    With one beam every token is the likeliest one. With more, the text is the one of the largest score, sum of
    log-probabilities / length ** ``length_penalty``, that beam search finds; both count the end token. A text of
    ``max_len`` - 1 ids can only end. Put encoder and head in evaluation mode first.

    Args:
        encoder: with both branches.
        head: text features ``(B, D)`` to logits ``(B, V)``.
        images: ``(B, 3, H, W)``, normalised.
        bos_id, eos_id, mask_id: begin, end, mask; begin and mask are never written.
        max_len: most ids of a text, begin and end included.
        num_beams: unfinished texts that are followed up per image.
        length_penalty: 0 favours short texts, larger values favour longer ones.
        forbidden_ids: further ids that are never written, such as padding; the end is allowed even if it is here.

    Raises:
        ConfigError: ``max_len`` is below 2 or above the encoder's text positions.
    """
    if not 2 <= max_len <= encoder.max_text_len:
        raise ConfigError(f"max_len: {max_len} (choose 2 to {encoder.max_text_len}, the encoder's text positions)")
    writer = _Writer(encoder, head, images, mask_id, {bos_id, mask_id, *forbidden_ids} - {eos_id})
    begin = torch.full((len(images),), bos_id, device=images.device)
    if num_beams == 1:
        texts = _greedy(writer, begin, eos_id, max_len)
    else:
        texts = _beam_search(writer, begin, eos_id, max_len, num_beams, length_penalty)
    return [list(takewhile(lambda token: token != eos_id, text)) for text in texts.tolist()]


class _Writer:
    """Texts that grow by one token at a time, and what may come next."""

    def __init__(
        self, encoder: Encoder, head: Callable[[Tensor], Tensor], images: Tensor, mask_id: int, forbidden: set[int]
    ) -> None:
        self.encoder, self.head, self.images, self.mask_id = encoder, head, images, mask_id
        self.forbidden = torch.tensor(sorted(forbidden), device=images.device)
        self.cache = KeyValueCache()

    def append(self, tokens: Tensor) -> Tensor:
        """Put ``tokens`` ``(T,)`` behind the texts; log-probabilities ``(T, V)`` of what follows them."""
        images, self.images = self.images, None
        text = torch.stack([tokens, torch.full_like(tokens, self.mask_id)], dim=1)
        features = self.encoder(images, text, cache=self.cache).text
        self.cache.cut_text(self.cache.text_length - 1)
        return self.head(features[:, 1]).float().log_softmax(-1).index_fill(1, self.forbidden, -torch.inf)


def _greedy(writer: _Writer, begin: Tensor, eos_id: int, max_len: int) -> Tensor:
    """``(B, max_len - 2)`` ids or fewer; what stands behind an end token means nothing."""
    texts = begin[:, None]
    for _ in range(max_len - 2):
        chosen = writer.append(texts[:, -1]).argmax(-1)
        texts = torch.cat([texts, chosen[:, None]], dim=1)
        if (texts[:, 1:] == eos_id).any(1).all():
            break
    return texts[:, 1:]


def _beam_search(
    writer: _Writer, begin: Tensor, eos_id: int, max_len: int, num_beams: int, length_penalty: float
) -> Tensor:
    """``(B, max_len - 1)`` ids, end tokens last.

    Every text that is followed up may end at every step. Only the best that ended is kept, since only that is returned.
    Texts are rows, those of an image adjacent.
    """
    texts = begin[:, None]
    totals = torch.zeros(len(begin), 1, device=begin.device)
    best_scores = torch.full_like(totals[:, 0], -torch.inf)
    best_texts = begin.new_full((len(begin), max_len), eos_id)
    for length in range(1, max_len):
        log_probs = totals[..., None] + writer.append(texts[:, -1]).unflatten(0, totals.shape)
        num_rows, vocab_size = log_probs.shape[1:]
        first_rows = torch.arange(0, len(texts), num_rows, device=begin.device)

        scores, row = (log_probs[..., eos_id] / length**length_penalty).max(1)
        ended = F.pad(texts[first_rows + row], (0, max_len - length), value=eos_id)
        best_texts = torch.where((scores > best_scores)[:, None], ended, best_texts)
        best_scores = torch.maximum(scores, best_scores)

        log_probs[..., eos_id] = -torch.inf
        totals, chosen = log_probs.flatten(1).topk(min(num_beams, num_rows * vocab_size))
        # What comes can only lower a total, and divide it by the power of a length from the next one to the longest.
        reachable = totals[:, 0] / max((length + 1) ** length_penalty, (max_len - 1) ** length_penalty)
        if length == max_len - 1 or (best_scores >= reachable).all():
            break
        rows = (first_rows[:, None] + chosen // vocab_size).flatten()
        texts = torch.cat([texts[rows], (chosen % vocab_size).view(-1, 1)], dim=1)
        writer.cache.select(rows)
    return best_texts[:, 1:]
