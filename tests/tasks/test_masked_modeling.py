"""The pre-training task: what is hidden, what is scored, against counts made by hand and in the slow way."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_world import COUNTS, settings, write_world

from mhmoe_vl import config
from mhmoe_vl.cli import build_task
from mhmoe_vl.data.sample import BadSample, Sample
from mhmoe_vl.data.shards import ShardSet
from mhmoe_vl.errors import ConfigError
from mhmoe_vl.models.factory import build_encoder

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


def make(world, **changes):
    values = config.validate(config.RunConfig, settings(world, world / "run", **changes))
    torch.manual_seed(0)
    task = build_task(values)
    return task, task.model(build_encoder(values.encoder))


def test_hidden_pieces_are_replaced_and_remembered(world):
    task, _ = make(world)
    [batch] = task.dataset("train")[0]
    assert (len(batch.images), len(batch.text), batch.num_pairs, len(batch)) == (8, 8, 4, 12)
    flat = batch.text.flatten()
    assert (flat[batch.text_positions] == task.tokenizer.mask_id).all()
    assert (flat == task.tokenizer.mask_id).sum() == len(batch.text_positions)
    restored = flat.index_copy(0, batch.text_positions, batch.text_targets).view_as(batch.text)
    for row, padding in zip(restored, batch.text_padding, strict=True):
        assert "half beside a" in task.tokenizer.decode(row[~padding].tolist()).lower()
    assert batch.image_mask.sum(1).tolist() == [round(0.4 * 16)] * 8
    assert batch.image_positions.tolist() == batch.image_mask.flatten().nonzero().flatten().tolist()


def test_shares_of_hidden_text(world):
    task, _ = make(world)
    [batch] = task.dataset("train")[0]
    # "a red half beside a blue half" is 7 pieces: 30 % of them in texts, half of them in pairs.
    assert task.num_targets(batch) == {"images": 24, "texts": 8, "pairs_image": 24, "pairs_text": 16}


def test_loss_is_the_cross_entropy_at_hidden_positions_by_stream(world):
    task, model = make(world)
    [raw] = task.dataset("train")[0]
    batch = task.prepare(raw, CPU)
    losses = task.loss(model(batch), batch)

    features = model.encoder(
        batch.images, batch.text, text_padding=batch.text_padding, image_mask=batch.image_mask, num_pairs=4
    )
    codes = task.visual_tokenizer.tokenize(
        batch.tokenizer_images.float() / 255 if batch.tokenizer_images is not None else None
    )
    wanted = {"images": 0.0, "pairs_image": 0.0, "texts": 0.0, "pairs_text": 0.0}
    scores = model.mim_head(features.image[:, 1:]).log_softmax(-1)
    for row in range(8):
        for patch in range(16):
            if batch.image_mask[row, patch]:
                wanted["images" if row < 4 else "pairs_image"] -= scores[row, patch, codes[row, patch]].item()
    scores = model.mlm_head(features.text).log_softmax(-1)
    for position, target in zip(batch.text_positions.tolist(), batch.text_targets.tolist(), strict=True):
        row, token = divmod(position, batch.text.shape[1])
        wanted["texts" if row < 4 else "pairs_text"] -= scores[row, token, target].item()
    assert {name: value.item() for name, value in losses.items()} == pytest.approx(wanted, rel=1e-5)


def test_predictions_do_not_depend_on_the_batch(world):
    task, model = make(world)
    model.eval()

    def score(batch_size):
        for given in task.streams.values():
            given["batch_size"] = batch_size
        records = [r for b in task.dataset("val") for r in task.predict(model, task.prepare(b, CPU))]
        assert len({r["id"] for r in records}) == len(records) == 3 * COUNTS["val"]
        return task.score(records)

    with torch.no_grad():
        one, many = score(1), score(5)
    assert one == pytest.approx(many, rel=1e-5)
    assert set(one) == {
        "perplexity", "accuracy",
        *(f"{kind}/{term}" for kind in ("perplexity", "accuracy") for term in task.terms),
    }  # fmt: skip


def test_score_by_hand(world):
    task, _ = make(world)
    records = [
        {"id": "a", "terms": {"images": [2.0, 1, 4], "pairs_text": [3.0, 0, 1]}},
        {"id": "b", "terms": {"images": [4.0, 1, 2]}},
    ]
    scores = task.score(records)
    assert scores["perplexity/images"] == pytest.approx(math.exp(6 / 6))
    assert scores["perplexity/pairs_text"] == pytest.approx(math.exp(3))
    assert scores["perplexity"] == pytest.approx(math.exp((1 + 3) / 2))
    assert scores["accuracy/images"] == pytest.approx(2 / 6)
    assert scores["accuracy"] == pytest.approx(2 / 7)


def test_baseline_is_the_frequency_in_the_training_texts(world):
    task, _ = make(world, task={"images": None, "pairs": None})
    counts = Counter()
    for sample in ShardSet([str(world / "texts/train/a.tar")]):
        counts.update(task.tokenizer.encode(sample.text())[1:-1])
    total = sum(counts.values()) + 0.01 * task.tokenizer.vocab_size
    losses = []
    for batch in task.dataset("val"):
        losses += [-math.log((counts[i] + 0.01) / total) for i in batch.text_targets.tolist()]
    assert task.baselines(CPU)["perplexity/texts"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-6)


def test_validation_masks_are_fixed_and_training_masks_follow_the_seed(world):
    first, other = make(world)[0], make(world, seed=1)[0]
    for one, two in zip(first.dataset("val"), other.dataset("val"), strict=True):
        assert torch.equal(
            one.text if one.text is not None else one.image_mask, two.text if two.text is not None else two.image_mask
        )
    assert torch.equal(first.dataset("train")[3][0].text, make(world)[0].dataset("train")[3][0].text)
    assert not torch.equal(first.dataset("train")[3][0].image_mask, other.dataset("train")[3][0].image_mask)


@pytest.mark.parametrize("kept", [("images",), ("texts",), ("pairs",), ("images", "texts")])
def test_any_stream_may_be_absent(world, kept):
    task, model = make(world, task={name: None for name in ("images", "texts", "pairs") if name not in kept})
    [batch] = task.dataset("train")[0]
    batch = task.prepare(batch, CPU)
    losses = task.loss(model(batch), batch)
    wanted = {"images": {"images"}, "texts": {"texts"}, "pairs": {"pairs_image", "pairs_text"}}
    assert set(losses) == set().union(*(wanted[name] for name in kept))
    sum(losses.values()).backward()
    assert set(task.score([r for b in task.dataset("val") for r in task.predict(model, task.prepare(b, CPU))]))


def test_captions_come_from_json_when_it_has_them():
    def sample(**members):
        return Sample("k", {name: value.encode() for name, value in members.items()}, "s.tar", 0)

    assert sample(txt="a dog", json='{"captions": [" a ", "", "b"]}').captions() == ["a", "b"]
    assert sample(txt="a dog", json='{"width": 3}').captions() == ["a dog"]
    assert sample(txt="a dog").captions() == ["a dog"]
    for bad in (sample(txt=" "), sample(json='{"captions": [""]}', txt="x"), sample(cls="1")):
        with pytest.raises(BadSample, match=r"s\.tar"):
            bad.captions()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": {"images": None, "texts": None, "pairs": None}}, "no data"),
        ({"task": {"visual_tokenizer": None}}, "task.visual_tokenizer: not set"),
        ({"encoder": {"vocab_size": 1000}}, "1000 rows for a tokenizer of 49410"),
        ({"encoder": {"img_size": 64}}, "codes 4 x 4 patches, the encoder sees 8 x 8"),
    ],
)
def test_what_does_not_fit_is_found_before_training(world, changes, message):
    with pytest.raises(ConfigError) as caught:
        make(world, **changes)
    assert message in str(caught.value)


def test_the_head_scores_masked_positions_only(world):
    task, model = make(world)
    [batch] = task.dataset("train")[0]
    output = model(task.prepare(batch, CPU))
    assert output.values["text_logits"].shape == (24, 49410)
    assert output.values["image_logits"].shape == (48, 16)
    assert set(output.stats) == {"blocks.1.joint"}
    assert F.softmax(output.values["image_logits"], -1).sum().item() == pytest.approx(48, rel=1e-4)
