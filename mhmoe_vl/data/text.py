"""Text tokenizers: open_clip's byte-pair encoding, and SentencePiece in BEiT-3's ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..errors import ConfigError, one_line

MAX_CACHED_WORDS = 2**18
MASK, PAD = "<mask>", "<pad>"


class TextTokenizer(Protocol):
    """Text to ids and back.

    Attributes:
        vocab_size: ids are below it.
        bos_id, eos_id, pad_id, mask_id: begin, end, padding, mask.
        special_ids: those that are never masked (begin, end, padding).
    """

    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int
    mask_id: int
    special_ids: frozenset[int]

    def encode(self, text: str, max_tokens: int | None = None) -> list[int]:
        """``[bos, ..., eos]``; the middle is cut at its end so that at most ``max_tokens`` ids remain."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text; begin, end and padding leave nothing, masked tokens read ``<mask>``."""
        ...

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """One display string per id; those of ordinary ids put together read as the text."""
        ...


def create_text_tokenizer(kind: str, path: str | Path | None = None) -> TextTokenizer:
    """The tokenizer that a configuration names.

    Args:
        kind: ``"bpe"`` (bundled with open_clip, needs no network) or ``"sentencepiece"``.
        path: the SentencePiece model file.

    Raises:
        ConfigError: unknown kind, the file is missing or no model, or sentencepiece is not installed.
    """
    if kind == "bpe":
        return BPETokenizer()
    if kind == "sentencepiece" and path is not None:
        return SentencePieceTokenizer(path)
    raise ConfigError(f"text_tokenizer: kind {kind!r} with path {path} (choose bpe, or sentencepiece with a path)")


def pad(texts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Ids ``(T, L)`` of texts, filled up to the longest one (at least 1), and where the filling is, bool."""
    length = max(1, *map(len, texts)) if texts else 1
    ids = torch.full((len(texts), length), pad_id, dtype=torch.int64)
    padding = torch.ones(len(texts), length, dtype=torch.bool)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.tensor(text, dtype=torch.int64)
        padding[row, : len(text)] = False
    return ids, padding


def _framed(ids: list[int], bos: int, eos: int, max_tokens: int | None) -> list[int]:
    if max_tokens is not None:
        ids = ids[: max(0, max_tokens - 2)]
    return [bos, *ids, eos]


class BPETokenizer:
    """CLIP's byte-pair encoding (49,408 ids, lower-cases) with ``<mask>`` = 49408 and ``<pad>`` = 49409 appended."""

    def __init__(self) -> None:
        from open_clip.tokenizer import SimpleTokenizer  # slow to import, and not needed for other tokenizers

        self._bpe = SimpleTokenizer()
        # Texts that spell out a special piece are letters like any others.
        self._bpe.cache.clear()
        self.bos_id, self.eos_id = self._bpe.sot_token_id, self._bpe.eot_token_id
        self.mask_id, self.pad_id = self._bpe.vocab_size, self._bpe.vocab_size + 1
        self.vocab_size = self._bpe.vocab_size + 2
        self.special_ids = frozenset((self.bos_id, self.eos_id, self.pad_id))

    def encode(self, text: str, max_tokens: int | None = None) -> list[int]:
        """See :class:`TextTokenizer`."""
        if len(self._bpe.cache) > MAX_CACHED_WORDS:
            self._bpe.cache.clear()
        return _framed(self._bpe.encode(text), self.bos_id, self.eos_id, max_tokens)

    def decode(self, ids: Sequence[int]) -> str:
        """See :class:`TextTokenizer`."""
        return b"".join(self._bytes(i) for i in ids if i not in self.special_ids).decode(errors="replace").strip()

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """See :class:`TextTokenizer`; a piece that ends a word ends in a space."""
        return [self._bytes(i).decode(errors="replace") for i in ids]

    def _bytes(self, token: int) -> bytes:
        if token in self.special_ids or token == self.mask_id:
            names = {self.mask_id: MASK + " ", self.pad_id: PAD}
            return names.get(token, self._bpe.decoder.get(token, "")).encode()
        piece = self._bpe.decoder[token]
        word_end = b" " if piece.endswith("</w>") else b""
        return bytes(self._bpe.byte_decoder[c] for c in piece.removesuffix("</w>")) + word_end


class SentencePieceTokenizer:
    """A SentencePiece model in the ids of fairseq, XLM-R and BEiT-3.

    ``<s>`` 0, ``<pad>`` 1, ``</s>`` 2, ``<unk>`` 3, every other piece its own number plus one, ``<mask>`` last: a
    model of 64,000 pieces gives 64,002 ids.

    Args:
        path: a ``.spm`` or ``.model`` file whose first pieces are ``<unk> <s> </s>`` (SentencePiece's default).

    Raises:
        ConfigError: sentencepiece is not installed, or the file is missing, no model, or orders its first pieces
            differently.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            raise ConfigError(f"{path}: needs sentencepiece (pip install 'mhmoe-vl[multilingual]')") from error
        self._model = SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(Path(path).read_bytes())
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror} (name a SentencePiece model file)") from error
        except RuntimeError as error:
            what = one_line(error, 100)
            raise ConfigError(f"{path}: not a SentencePiece model: {what} (name another file)") from error
        first = (self._model.unk_id(), self._model.bos_id(), self._model.eos_id())
        if first != (0, 1, 2):
            what = f"<unk> <s> </s> have numbers {first}, not (0, 1, 2)"
            raise ConfigError(f"{path}: {what} (train the model with SentencePiece's defaults)")
        self.bos_id, self.pad_id, self.eos_id, self.unk_id = 0, 1, 2, 3
        self.mask_id = len(self._model) + 1
        self.vocab_size = len(self._model) + 2
        self.special_ids = frozenset((self.bos_id, self.eos_id, self.pad_id))

    def encode(self, text: str, max_tokens: int | None = None) -> list[int]:
        """See :class:`TextTokenizer`."""
        ids = [self.unk_id if number == 0 else number + 1 for number in self._model.encode(text)]
        return _framed(ids, self.bos_id, self.eos_id, max_tokens)

    def decode(self, ids: Sequence[int]) -> str:
        """See :class:`TextTokenizer`."""
        runs: list[list[int]] = [[]]
        for i in ids:
            if i == self.mask_id:
                runs.append([])
            elif i not in self.special_ids:
                runs[-1].append(self._number(i))
        return f" {MASK} ".join(self._model.decode(run) for run in runs).strip()

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """See :class:`TextTokenizer`; a piece that begins a word begins with a space."""
        names = {self.bos_id: "<s>", self.pad_id: PAD, self.eos_id: "</s>", self.mask_id: " " + MASK}
        return [names.get(i) or self._model.id_to_piece(self._number(i)).replace("\u2581", " ") for i in ids]

    def _number(self, token: int) -> int:
        return 0 if token == self.unk_id else token - 1
