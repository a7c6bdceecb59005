from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mhmoe_vl.config import EncoderConfig, validate
from mhmoe_vl.errors import ConfigError
from mhmoe_vl.models.factory import build_encoder
from mhmoe_vl.models.generation import generate

BOS, PAD, EOS, MASK = 0, 1, 2, 6
WORDS = (3, 4, 5)
IDS = {"bos_id": BOS, "eos_id": EOS, "mask_id": MASK, "forbidden_ids": [PAD]}
FFNS = {
    "dense": {"kind": "dense"},
    "moe": {"kind": "moe", "num_experts": 4, "hidden_dim": 10, "top_k": 2},
    "mh_moe": {"kind": "mh_moe", "num_experts": 4, "hidden_dim": 10, "num_subtokens": 2},
}
every_ffn = pytest.mark.parametrize("ffn", FFNS)


def make(ffn="dense", vocab_size=7, seed=0):
    """An encoder in evaluation mode and a head, weights large enough to have opinions."""
    torch.manual_seed(seed)
    config = {
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 2,
        "img_size": 8,
        "patch_size": 4,
        "vocab_size": vocab_size,
        "max_text_len": 10,
        "ffn": FFNS[ffn],
    }
    encoder = build_encoder(validate(EncoderConfig, config)).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    head = nn.Linear(24, vocab_size).requires_grad_(False)
    head.weight.mul_(4)
    return encoder, head


def pictures(count=5):
    return 3 * torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def uncached(encoder, head, picture, words):
    """Logits of what follows ``words``, the whole text encoded."""
    text = torch.tensor([[BOS, *words, MASK]])
    return head(encoder(picture[None], text, causal_text=True).text[0, -1])


def log_prob(encoder, head, picture, words):
    """Log-probability of ``words`` and the end after them."""
    chosen = [*words, EOS]
    logits = [uncached(encoder, head, picture, words[:i]) for i in range(len(chosen))]
    return sum(row.log_softmax(-1)[token].item() for row, token in zip(logits, chosen, strict=True))


class Recorder(nn.Module):
    """A head that remembers what it saw and gave."""

    def __init__(self, head):
        super().__init__()
        self.head, self.inputs, self.outputs = head, [], []

    def forward(self, x):
        self.inputs.append(x)
        self.outputs.append(self.head(x))
        return self.outputs[-1]


# --------------------------------------------------------------------------------------------- greedy
@every_ffn
def test_every_step_gives_the_logits_of_the_whole_text(ffn):
    encoder, head = make(ffn, vocab_size=30)
    head.bias[EOS] = -100  # nothing ends before it must
    seen = Recorder(head)
    texts = generate(encoder, seen, pictures(), **IDS, max_len=10)
    assert [len(text) for text in texts] == [8] * 5 and len(seen.outputs) == 8
    assert len({tuple(text) for text in texts}) > 1
    for step, logits in enumerate(seen.outputs):
        for row, picture, text in zip(logits, pictures(), texts, strict=True):
            want = uncached(encoder, head, picture, text[:step])
            torch.testing.assert_close(row, want, rtol=0, atol=1e-5)


@every_ffn
def test_greedy_equals_a_plain_argmax_loop(ffn):
    encoder, head = make(ffn, vocab_size=30)
    head.bias[EOS] = 3.0
    texts = generate(encoder, head, pictures(), **IDS, max_len=10)
    assert len({len(text) for text in texts}) > 1
    for text, picture in zip(texts, pictures(), strict=True):
        want = []
        while len(want) < 8:
            logits = uncached(encoder, head, picture, want)
            logits[[BOS, PAD, MASK]] = -torch.inf
            if logits.argmax() == EOS:
                break
            want.append(logits.argmax().item())
        assert text == want


def test_only_the_mask_is_scored_and_only_new_tokens_are_encoded():
    encoder, head = make()
    head.bias[EOS] = -100
    seen, shapes = Recorder(head), []
    encoder.blocks[0].register_forward_pre_hook(
        lambda _, args: shapes.append({name: tuple(x.shape[:2]) for name, x in args[0].items()})
    )
    generate(encoder, seen, pictures(3), **IDS, max_len=6)
    assert [tuple(x.shape) for x in seen.inputs] == [(3, 24)] * 4
    assert shapes == [{"image": (3, 5), "text": (3, 2)}] + [{"image": (3, 0), "text": (3, 2)}] * 3


@pytest.mark.parametrize("num_beams", [1, 3])
def test_special_tokens_are_never_written(num_beams):
    encoder, head = make()
    head.bias[[BOS, PAD, MASK]] = 100.0
    texts = generate(encoder, head, pictures(), **IDS, max_len=8, num_beams=num_beams)
    assert set(itertools.chain(*texts)) <= set(WORDS)
    # The end may be named among them, as in a tokenizer's list of special ids, and yet ends texts.
    ids = IDS | {"forbidden_ids": [BOS, PAD, EOS]}
    assert generate(encoder, head, pictures(), **ids, max_len=8, num_beams=num_beams) == texts


@pytest.mark.parametrize("num_beams", [1, 3])
def test_the_shortest_and_longest_texts(num_beams):
    encoder, head = make()
    assert generate(encoder, head, pictures(2), **IDS, max_len=2, num_beams=num_beams) == [[], []]
    head.bias[EOS] = -100
    texts = generate(encoder, head, pictures(2), **IDS, max_len=10, num_beams=num_beams, length_penalty=2.0)
    assert [len(text) for text in texts] == [8, 8]
    for max_len in (1, 11):
        with pytest.raises(ConfigError, match=f"max_len: {max_len} .choose 2 to 10"):
            generate(encoder, head, pictures(2), **IDS, max_len=max_len, num_beams=num_beams)


@every_ffn
@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_batch_gives_what_one_picture_at_a_time_gives(ffn, num_beams):
    encoder, head = make(ffn, vocab_size=30)
    head.bias[EOS] = 3.0
    options = IDS | {"max_len": 10, "num_beams": num_beams, "length_penalty": 0.6}
    together = generate(encoder, head, pictures(8), **options)
    assert len({len(text) for text in together}) > 1
    assert together == [generate(encoder, head, picture[None], **options)[0] for picture in pictures(8)]


# ---------------------------------------------------------------------------------------- beam search
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 0.6, 2.0])
def test_enough_beams_find_the_best_of_all_texts(length_penalty):
    every_text = [words for length in range(4) for words in itertools.product(WORDS, repeat=length)]
    lengths = set()
    for seed in range(3):
        encoder, head = make("mh_moe", seed=seed)
        for picture in pictures(2):

            def score(words, encoder=encoder, head=head, picture=picture):
                return log_prob(encoder, head, picture, words) / (len(words) + 1) ** length_penalty

            options = {"max_len": 5, "num_beams": 27, "length_penalty": length_penalty}
            [found] = generate(encoder, head, picture[None], **IDS, **options)
            assert found == list(max(every_text, key=score))
            lengths.add(len(found))
    assert length_penalty != 0.6 or len(lengths) > 1


def slow_beam_search(encoder, head, picture, *, max_len, num_beams, length_penalty):
    """Beam search without a cache, without stopping early, one text at a time."""
    live, ended = [((), 0.0)], []
    for length in range(1, max_len):
        candidates = []
        for words, total in live:
            log_probs = uncached(encoder, head, picture, words).log_softmax(-1).tolist()
            ended.append(((total + log_probs[EOS]) / length**length_penalty, words))
            candidates += [((*words, w), total + p) for w, p in enumerate(log_probs) if w not in (BOS, PAD, EOS, MASK)]
        live = sorted(candidates, key=lambda candidate: -candidate[1])[:num_beams]
    return list(max(ended)[1])


@every_ffn
@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_beam_search_equals_a_slow_one(ffn, length_penalty):
    encoder, head = make(ffn, vocab_size=12)
    options = {"max_len": 6, "num_beams": 3, "length_penalty": length_penalty}
    texts = generate(encoder, head, pictures(4), **IDS, **options)
    assert texts == [slow_beam_search(encoder, head, picture, **options) for picture in pictures(4)]


A, B = 3, 4
BIGRAMS = {BOS: {EOS: 0.4, A: 0.6}, A: {EOS: 0.55, B: 0.45}, B: {EOS: 1.0}}


class Bigrams:
    """In place of an encoder and a head: what follows depends on the token before alone."""

    max_text_len = 10
    calls = 0

    def __call__(self, images, text, *, cache):
        self.calls += 1
        return SimpleNamespace(text=text[:, :1].expand(-1, 2))  # at the mask: the token before it

    def head(self, tokens):
        table = torch.full((7, 7), -torch.inf)
        table[:, EOS] = 0.0
        for before, shares in BIGRAMS.items():
            for after, share in shares.items():
                table[before, after] = math.log(share)
        return table[tokens]


@pytest.mark.parametrize(
    ("length_penalty", "text"),
    [
        # log-probabilities: end at once -0.916, A -1.109 (2 tokens), A B -1.309 (3 tokens)
        (0.0, []),
        (0.2, []),  # -0.916, -0.965, -1.051
        (0.35, [A]),  # -0.916, -0.870, -0.891
        (0.6, [A, B]),  # -0.916, -0.732, -0.677
    ],
)
def test_the_length_penalty_chooses_by_hand_worked_scores(length_penalty, text):
    model = Bigrams()
    options = IDS | {"max_len": 10, "num_beams": 2, "length_penalty": length_penalty}
    assert generate(model, model.head, torch.zeros(2, 3, 1, 1), **options) == [text] * 2


def test_greedy_follows_the_likeliest_token():
    model = Bigrams()
    assert generate(model, model.head, torch.zeros(1, 3, 1, 1), **IDS, max_len=10) == [[A]]


def test_the_search_stops_once_nothing_better_can_come():
    # With penalty 0.2 what goes on from A B has no chance at all, but A and A B must be looked at:
    # A alone could reach log 0.6 / 9 ** 0.2 = -0.329, A B log 0.27 / 9 ** 0.2 = -0.844, both above -0.916.
    model = Bigrams()
    generate(model, model.head, torch.zeros(1, 3, 1, 1), **IDS, max_len=10, num_beams=2, length_penalty=0.2)
    assert model.calls == 3
    # With penalty 0, A B (-1.309) is hopeless as soon as it is there.
    model.calls = 0
    generate(model, model.head, torch.zeros(1, 3, 1, 1), **IDS, max_len=10, num_beams=2, length_penalty=0.0)
    assert model.calls == 2
