"""The visual tokenizer's task: targets, losses, records and scores by hand, and that it learns."""

from __future__ import annotations

import io
import json

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from mhmoe_vl import config, distributed
from mhmoe_vl.data.writing import write_shard
from mhmoe_vl.errors import ConfigError
from mhmoe_vl.models.visual_tokenizer import load_visual_tokenizer
from mhmoe_vl.tasks.visual_tokenizer import VisualTokenizerTask
from mhmoe_vl.train.optim import param_groups

CPU = torch.device("cpu")
SIZES = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 1,
    "num_heads": 2,
    "decoder_embed_dim": 32,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
    "num_codes": 16,
    "code_dim": 8,
    "target_dim": 192,
    "ema_decay": 0.9,
    "revive_after": 10,
}


COLORS = np.random.default_rng(1).integers(256, size=(24, 3))


def blocks(rng) -> bytes:
    """A PNG of 4 x 4 blocks, each in one of 24 colours."""
    pixels = COLORS[rng.integers(24, size=(4, 4))].repeat(8, 0).repeat(8, 1).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    for name, count in (("train", 48), ("val", 11)):
        (folder / name).mkdir()
        write_shard(folder / name / "a.tar", [(f"{i:03d}", {"png": blocks(rng)}) for i in range(count)])
    return folder


def make_task(shards, accumulate=1, **changes):
    section = {
        "kind": "visual_tokenizer",
        "model": SIZES | changes.pop("model", {}),
        "data_dir": str(shards),
        "images": {"train": "train", "val": "val", "batch_size": 8},
        "augment": {"min_crop": 1.0, "flip": 0.0, "color_jitter": 0.0},
    }
    settings = config.validate(config.VisualTokenizerTaskConfig, section | changes).model_dump(exclude={"kind"})
    return VisualTokenizerTask(None, seed=0, accumulate=accumulate, **settings)


def train(task, model, steps):
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    dataset = task.dataset("train")
    for step in range(steps):
        [batch] = dataset[step]
        batch = task.prepare(batch, CPU)
        targets = task.num_targets(batch)
        loss = sum(value / targets[name] for name, value in task.loss(model(batch), batch).items())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def evaluate(task, model):
    model.eval()
    with torch.no_grad():
        batches = [task.prepare(batch, CPU) for batch in task.dataset("val")]
        return [record for batch in batches for record in task.predict(model, batch)]


def test_it_learns_far_more_than_the_mean_colour_and_uses_its_codes(shards):
    task = make_task(shards)
    torch.manual_seed(0)
    model = task.model(None)
    before = task.score(evaluate(task, model))
    train(task, model.train(), 80)
    scores, baseline = task.score(evaluate(task, model)), task.baselines(CPU)
    assert before["reconstruction_loss"] > 0.5 * baseline["reconstruction_loss"]
    assert scores["reconstruction_loss"] < 0.25 * baseline["reconstruction_loss"]
    assert scores["codebook_usage"] > 0.5 and scores["code_perplexity"] > 8
    assert task.metric in scores and not task.higher_is_better


def test_loss_terms_are_sums_over_patches(shards):
    task = make_task(shards, model={"commitment_weight": 0.5})
    model = task.model(None).eval()
    [batch] = task.dataset("train")[0]
    batch = task.prepare(batch, CPU)
    with torch.no_grad():
        output = model(batch)
        unit = torch.nn.functional.normalize(model.tokenizer._encode(batch.images), dim=-1)
    loss = task.loss(output, batch)
    assert task.num_targets(batch) == {"reconstruction": 8 * 16, "commitment": 8 * 16}
    assert batch.images.min() >= 0 and batch.images.max() <= 1 and batch.targets.shape == (8, 16, 192)
    squares = (output.values["reconstruction"] - batch.targets) ** 2
    assert loss["reconstruction"].item() == pytest.approx(squares.sum().item() / 192, rel=1e-5)
    distance = (unit - model.tokenizer.codebook.weight[output.values["tokens"]]) ** 2
    assert loss["commitment"].item() == pytest.approx(0.5 * distance.mean(-1).sum().item(), rel=1e-5)


def test_parts_of_a_step_add_up_to_the_step(shards):
    [whole] = make_task(shards).dataset("train")[3]
    parts = make_task(shards, accumulate=3).dataset("train")[3]
    assert [i for part in parts for i in part.ids] == whole.ids and len(whole) == 8
    assert torch.equal(torch.cat([part.images for part in parts]), whole.images)


def test_score_counts_codes_over_all_records(shards):
    task = make_task(shards)
    records = [{"id": "0", "loss": 1.0, "codes": [0, 0, 3, 3]}, {"id": "1", "loss": 2.0, "codes": [0, 0, 7, 8]}]
    scores = task.score(records)
    # Frequencies 1/2, 1/4, 1/8, 1/8: entropy 1.75 bits; 4 of 16 codes.
    assert scores == pytest.approx({"reconstruction_loss": 1.5, "codebook_usage": 0.25, "code_perplexity": 2**1.75})
    assert task.score([]) == {}


def test_records_do_not_depend_on_the_number_of_ranks(shards, monkeypatch):
    task = make_task(shards)
    torch.manual_seed(0)
    model = task.model(None)
    alone = evaluate(task, model)
    assert len({record["id"] for record in alone}) == 11 and len(alone[0]["codes"]) == 16
    assert json.loads(json.dumps(alone)) == alone
    together = []
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        together += evaluate(task, model)
    together.sort(key=lambda record: record["id"])
    assert [r["codes"] for r in together] == [r["codes"] for r in alone]
    assert task.score(together) == pytest.approx(task.score(alone), rel=1e-6)


def test_predicted_loss_is_the_pictures_mean_over_patches(shards):
    task = make_task(shards)
    torch.manual_seed(0)
    model = task.model(None).eval()
    batch = task.prepare(next(iter(task.dataset("val"))), CPU)
    output = model(batch)
    for row, record in enumerate(task.predict(model, batch)):
        assert record["id"] == batch.ids[row]
        assert record["codes"] == output.values["tokens"][row].tolist()
        error = (output.values["reconstruction"][row] - batch.targets[row]).square().mean().item()
        assert record["loss"] == pytest.approx(error, rel=1e-5)


def test_the_baseline_is_the_error_of_the_mean_patch(shards):
    task = make_task(shards)
    targets = torch.cat([task.prepare(batch, CPU).targets for batch in task.dataset("val")]).flatten(0, 1)
    expected = targets.var(0, correction=0).mean().item()
    assert task.baselines(CPU) == pytest.approx({"reconstruction_loss": expected}, rel=1e-5)


def test_an_open_clip_teacher_gives_cosines(shards, tmp_path):
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
    (tmp_path / "mhmoe-task-vit.json").write_text(json.dumps({"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(tmp_path)
    teacher = {"kind": "open_clip", "model": "mhmoe-task-vit"}
    task = make_task(shards, teacher=teacher, model={"target_dim": 24})
    torch.manual_seed(0)
    model = task.model(None).train()
    train(task, model, 30)
    scores, baseline = task.score(evaluate(task, model)), task.baselines(CPU)
    targets = torch.cat([task.prepare(batch, CPU).targets for batch in task.dataset("val")]).flatten(0, 1)
    assert baseline["reconstruction_loss"] == pytest.approx(1 - targets.mean(0).norm().item(), rel=1e-4)
    assert 0 <= scores["reconstruction_loss"] < baseline["reconstruction_loss"]
    with pytest.raises(ConfigError, match="set it to 24"):
        make_task(shards, teacher=teacher)


def test_a_trained_model_is_read_back_from_its_run_folder(shards, tmp_path):
    task = make_task(shards)
    torch.manual_seed(0)
    model = task.model(None).train()
    train(task, model, 2)
    section = {"kind": "visual_tokenizer", "model": SIZES, "images": {"train": "train"}}
    (tmp_path / "config.yaml").write_text(config.dump(config.validate(config.RunConfig, {"task": section})))
    (tmp_path / "checkpoints" / "last").mkdir(parents=True)
    save_file(model.state_dict(), tmp_path / "checkpoints" / "last" / "model.safetensors")
    images = torch.rand(3, 3, 32, 32)
    assert torch.equal(load_visual_tokenizer(tmp_path).tokenize(images), model.eval().tokenizer.tokenize(images))


def test_positions_and_class_tokens_are_spared_from_weight_decay(shards):
    model = make_task(shards).model(None)
    spared, _ = (group["params"] for group in param_groups(model, config.OptimConfig()))
    names = {name for name, parameter in model.named_parameters() if any(parameter is p for p in spared)}
    expected = {f"tokenizer.{vit}.{name}" for vit in ("encoder", "decoder") for name in ("pos_embed", "cls_token")}
    assert expected <= names and all(name in expected or name.endswith(("bias", "weight")) for name in names)


def test_a_batch_whose_samples_were_all_bad_has_zero_loss(shards):
    task = make_task(shards)
    model = task.model(None).train()
    batch = task.prepare(task.collate([]), CPU)
    loss = sum(task.loss(model(batch), batch).values())
    loss.backward()
    assert loss.item() == 0 and set(task.num_targets(batch).values()) == {0}


def test_without_validation_shards_there_is_nothing_to_score(shards):
    task = make_task(shards, images={"train": "train", "batch_size": 8})
    assert list(task.dataset("val")) == [] and task.baselines(CPU) == {}


def test_a_width_that_is_not_the_teachers_is_refused(shards):
    with pytest.raises(ConfigError, match=r"task\.model\.target_dim: 512.*set it to 192"):
        make_task(shards, model={"target_dim": 512})
