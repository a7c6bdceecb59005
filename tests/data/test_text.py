"""Text tokenizers: ids, round trips, and the conventions of the models they come from."""

from __future__ import annotations

import builtins
import socket
from pathlib import Path

import pytest
import torch

from mhmoe_vl.data.text import BPETokenizer, SentencePieceTokenizer, create_text_tokenizer
from mhmoe_vl.errors import ConfigError

TEXTS = ["a photo of a cat.", "two dogs, 3 balls!", "你好 мир", "naïve café", "x" * 300]


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    return create_text_tokenizer(kind="bpe")


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("spm")
    lines = [f"a photo of {n} {what} near the {x}" for n in range(20) for what in ("cats", "dogs") for x in "xyz"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(folder / "toy"), vocab_size=32, minloglevel=2
    )
    return folder / "toy.model"


@pytest.fixture(scope="module")
def pieces(model_file: Path) -> SentencePieceTokenizer:
    return create_text_tokenizer(kind="sentencepiece", path=model_file)


# -------------------------------------------------------------------------------------------------- bpe
def test_bpe_has_clips_ids(bpe: BPETokenizer) -> None:
    import open_clip

    assert bpe.encode("a photo of a cat") == [49406, 320, 1125, 539, 320, 2368, 49407]
    for text in TEXTS:
        expected = open_clip.tokenize([text], context_length=400)[0]
        ids = bpe.encode(text)
        assert torch.equal(expected[: len(ids)], torch.tensor(ids)) and not expected[len(ids) :].any()
    assert (bpe.bos_id, bpe.eos_id, bpe.mask_id, bpe.pad_id, bpe.vocab_size) == (49406, 49407, 49408, 49409, 49410)


def test_bpe_round_trips(bpe: BPETokenizer) -> None:
    assert [bpe.decode(bpe.encode(text)) for text in TEXTS[2:]] == TEXTS[2:]
    assert bpe.decode(bpe.encode("A Cat.")) == "a cat ."
    ids = bpe.encode("two dogs")
    assert bpe.decode([*ids[:2], bpe.mask_id, *ids[2:], bpe.pad_id]) == "two <mask> dogs"
    assert bpe.pieces(ids) == ["<start_of_text>", "two ", "dogs ", "<end_of_text>"]
    assert "".join(bpe.pieces(bpe.encode("unbelievably good")[1:-1])) == "unbelievably good "


def test_text_cannot_name_special_pieces(bpe: BPETokenizer) -> None:
    for text in ("<start_of_text>", "a <end_of_text> b", "<mask> <pad>", "<START_OF_TEXT>"):
        ids = bpe.encode(text)
        assert not bpe.special_ids & set(ids[1:-1]) and bpe.mask_id not in ids


def test_bpe_cache_stays_small(bpe: BPETokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mhmoe_vl.data.text.MAX_CACHED_WORDS", 10)
    before = bpe.encode("one two three <end_of_text>")
    for number in range(100):
        bpe.encode(f"word{chr(97 + number % 26)}{chr(97 + number // 26)}")
    assert len(bpe._bpe.cache) < 15
    assert bpe.encode("one two three <end_of_text>") == before


def test_bpe_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("network used")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert BPETokenizer().vocab_size == 49410


# ------------------------------------------------------------------------------------------- sentencepiece
def test_sentencepiece_ids_are_fairseqs(pieces: SentencePieceTokenizer, model_file: Path) -> None:
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    text = "a photo of 3 cats ☃"
    raw = model.encode(text)
    assert 0 in raw  # the snowman is unknown
    assert pieces.encode(text) == [0, *[number + 1 if number else 3 for number in raw], 2]
    assert (pieces.bos_id, pieces.pad_id, pieces.eos_id, pieces.unk_id) == (0, 1, 2, 3)
    assert (pieces.mask_id, pieces.vocab_size) == (33, 34)
    assert max(pieces.encode("a b c x y z 0 1 2 3 4 5 6 7 8 9")) < pieces.mask_id


def test_sentencepiece_round_trips(pieces: SentencePieceTokenizer) -> None:
    text = "a photo of 12 dogs near the x"
    ids = pieces.encode(text)
    assert pieces.decode(ids) == text
    assert "".join(pieces.pieces(ids)[1:-1]) == " " + text
    assert pieces.pieces([0, 1, 2, 3, pieces.mask_id]) == ["<s>", "<pad>", "</s>", "<unk>", " <mask>"]
    front, back = pieces.encode("a photo")[:-1], pieces.encode("dogs")[1:]
    assert pieces.decode([*front, pieces.mask_id, *back, 1, 1]) == "a photo <mask> dogs"


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_texts_are_cut_between_begin_and_end(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue("bpe" if kind == "bpe" else "pieces")
    ids = tokenizer.encode("a photo of 12 dogs near the x")
    assert tokenizer.encode("a photo of 12 dogs near the x", max_tokens=6) == [*ids[:5], ids[-1]]
    assert tokenizer.encode("a photo of 12 dogs near the x", max_tokens=len(ids)) == ids
    assert tokenizer.encode("") == [tokenizer.bos_id, tokenizer.eos_id]


def test_unusable_models_are_refused(tmp_path: Path, model_file: Path) -> None:
    import sentencepiece

    (tmp_path / "bad.model").write_bytes(b"not a model")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d e f"] * 10),
        model_prefix=str(tmp_path / "padded"),
        vocab_size=12,
        pad_id=0,
        unk_id=1,
        bos_id=2,
        eos_id=3,
        minloglevel=2,
    )
    for name, what in [
        ("none.model", "none.model: No such file"),
        ("bad.model", "bad.model: not a SentencePiece model"),
        ("padded.model", r"<unk> <s> </s> have numbers \(1, 2, 3\)"),
    ]:
        with pytest.raises(ConfigError, match=what) as caught:
            create_text_tokenizer(kind="sentencepiece", path=tmp_path / name)
        assert "\n" not in str(caught.value)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, model_file: Path) -> None:
    real = builtins.__import__

    def without(name: str, *args: object, **options: object) -> object:
        if name == "sentencepiece":
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"pip install 'mhmoe-vl\[multilingual\]'"):
        create_text_tokenizer(kind="sentencepiece", path=model_file)


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(ConfigError, match="kind 'words' with path None"):
        create_text_tokenizer(kind="words")
