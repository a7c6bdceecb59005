"""Every fine-tuning tool starts from scratch, from a pre-training run, and from a published file, with every kind of
encoder and at another picture size; and the shipped recipes are the published ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_finetune import ENCODER, WORLDS, finetune, settings
from tiny_world import settings as pretrain_settings
from tiny_world import write_settings, write_world

from mhmoe_vl import config
from mhmoe_vl.config import EncoderConfig, validate
from mhmoe_vl.models.convert import to_published
from mhmoe_vl.models.factory import build_encoder
from mhmoe_vl.nn.embed import resize_positions

CONFIGS = Path(__file__).parents[2] / "configs/finetune"
FFNS = {
    "dense": {"kind": "dense", "hidden_dim": 64, "sub_ln": True},
    "xmoe": {"kind": "moe", "num_experts": 4, "hidden_dim": 32, "top_k": 1, "router": {"kind": "cosine", "dim": 8}},
    "mh_moe": ENCODER["ffn"],
}
STARTS = ("none", *FFNS, "published")


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    return {kind: write(tmp_path_factory.mktemp(kind)) for kind, write in WORLDS.items()}


@pytest.fixture(scope="module")
def starts(tmp_path_factory) -> dict[str, Path]:
    """What to start from: a pre-training run of each kind of encoder, and a file in the published form."""
    folder = tmp_path_factory.mktemp("starts")
    world, found = write_world(folder / "world"), {}
    for name, ffn in FFNS.items():
        found[name] = folder / name
        values = pretrain_settings(world, found[name], encoder={"ffn": ffn}, train={"steps": 1, "eval_every": 0})
        assert finetune("masked_modeling", "--config", write_settings(folder / f"{name}.yaml", values)) == 0
    torch.manual_seed(1)
    encoder = build_encoder(validate(EncoderConfig, ENCODER | {"ffn": FFNS["dense"]}))
    weights = to_published({f"encoder.{name}": value for name, value in encoder.state_dict().items()})
    found["published"] = folder / "beit3.safetensors"
    save_file(weights, found["published"])
    return found


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("kind", list(WORLDS))
def test_every_tool_starts_from_everything_with_every_encoder(worlds, starts, tmp_path, kind, start):
    """Pictures of 48 pixels, where pre-training had 32: image positions are resized."""
    values = settings(kind, worlds[kind], tmp_path / "run")
    values["encoder"] = ENCODER | {"img_size": 48, "ffn": FFNS.get(start, FFNS["dense"])}
    values["train"] |= {"steps": 1, "eval_every": 0}
    values["optim"] = {"lr": 1e-30, "warmup_steps": 0}
    file = write_settings(tmp_path / "c.yaml", values)
    assert finetune(kind, "--config", file, "--init_from", starts.get(start, "none")) == 0
    weights = load_file(tmp_path / "run/checkpoints/last/model.safetensors")
    positions = weights["encoder.image_embed.pos_embed"]
    assert positions.shape == (1, 37, 32)
    if start in FFNS:
        saved = load_file(starts[start] / "checkpoints/last/model.safetensors")
        assert torch.equal(positions, resize_positions(saved["encoder.image_embed.pos_embed"], (6, 6), (4, 4)))
        heads = {name for name in weights if name in saved and not name.startswith("encoder.")}
        assert heads == ({"mlm_head.weight", "mlm_head.bias"} if kind == "captioning" else set())
        same = [name for name in weights if name in saved and name != "encoder.image_embed.pos_embed"]
        assert len(same) > 30 and all(torch.equal(weights[name], saved[name]) for name in same)
    if start == "published":
        torch.manual_seed(1)
        first = build_encoder(validate(EncoderConfig, ENCODER | {"ffn": FFNS["dense"]})).state_dict()
        same = [name for name in first if name != "image_embed.pos_embed" and f"encoder.{name}" in weights]
        assert len(same) > 60 and all(torch.equal(weights[f"encoder.{name}"], first[name]) for name in same)


PUBLISHED = {  # px, peak, warm-up and all epochs, batch, weight decay, drop path, layer decay, head factor
    "vqa_base": (480, 3e-5, 1, 10, 128, 0.01, 0.1, 1.0, 20.0),
    "vqa_large": (480, 2e-5, 1, 10, 128, 0.01, 0.15, 1.0, 20.0),
    "nlvr2_base": (224, 7e-4, 5, 20, 256, 0.2, 0.2, 0.65, 1.0),
    "nlvr2_large": (224, 3e-4, 5, 20, 256, 0.2, 0.2, 0.85, 1.0),
    "captioning_base": (480, 4e-5, 1, 10, 256, 0.05, 0.1, 1.0, 1.0),
    "captioning_large": (480, 8e-6, 1, 10, 256, 0.05, 0.1, 1.0, 1.0),
}
EXAMPLES = {"vqa": 652_000, "nlvr2": 86_373, "captioning": 566_747}
"""To train on: VQA v2's questions with a listed answer but those of 1,000 pictures (about), NLVR2's sentences, captions
of Karpathy's train and restval."""


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_the_recipes_are_the_published_ones(name):
    kind, _, size = name.partition("_")
    run = config.load(config.run_config(kind), [CONFIGS / f"{name}.yaml"], [])
    epoch = EXAMPLES[kind] / run.task.batch_size
    px, lr, warmup, epochs, batch, decay, drop_path, layer_decay, head = PUBLISHED[name]
    assert (run.encoder.img_size, run.optim.lr, run.task.batch_size) == (px, lr, batch)
    assert (run.optim.weight_decay, run.encoder.drop_path) == (decay, drop_path)
    assert (run.optim.layer_decay, run.optim.head_lr_factor, run.optim.schedule) == (layer_decay, head, "cosine")
    assert run.optim.warmup_steps == pytest.approx(warmup * epoch, rel=0.01)
    assert run.train.steps == pytest.approx(epochs * epoch, rel=0.01)
    assert (run.encoder.embed_dim, run.encoder.depth) == {"base": (768, 12), "large": (1024, 24)}[size]
    assert run.encoder.ffn.kind == "dense" and run.encoder.final_norm == (kind != "vqa")
    assert (run.task.augment.rand_augment_ops, run.task.augment.rand_augment_magnitude) == (2, 7)
    assert list(run.optim.betas) == [0.9, 0.98 if kind == "vqa" else 0.999]
    if kind == "captioning":
        task = run.task
        assert (task.mask_ratio, task.label_smoothing, task.max_text_len) == (0.7, 0.1, 32)
        assert (task.drop_worst_ratio, task.drop_worst_after) == (0.2, 12_000)
        assert (task.num_beams, task.length_penalty) == (3, 0.6)
    if kind == "vqa":
        assert (run.task.min_answer_count, run.task.val_images) == (9, 1000)
    header = (CONFIGS / f"{name}.yaml").read_text().splitlines()
    for line, word in enumerate(("Command:", "Recipe:")):
        assert header[1 + line].startswith(f"# {word}")
    assert any(line.startswith("# Hardware:") for line in header) and "# Not yet run at full size." in header


def test_a_test_split_without_labels_gets_the_official_file(worlds, tmp_path):
    world = worlds["nlvr2"]
    bare = [json.loads(line) for line in (world / "dev.json").read_text().splitlines()]
    for line in bare:
        line.pop("label")
    (world / "bare.json").write_text("".join(json.dumps(line) + "\n" for line in bare))
    values = settings("nlvr2", world, tmp_path / "run", test={"annotations": "bare.json", "images": "images"})
    values["train"] |= {"steps": 1}
    assert finetune("nlvr2", "--config", write_settings(tmp_path / "c.yaml", values)) == 0
    assert finetune("nlvr2", "--eval", tmp_path / "run", "--split", "test") == 0
    rows = (tmp_path / "run/predictions/test/nlvr2_predictions.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == sorted(line["identifier"] for line in bare)


def test_captions_of_flickr8k(worlds, tmp_path):
    world = worlds["captioning"]
    rows = "".join(f'{n:012d}.jpg,"A picture , number {n} ."\n' for n in range(20))
    (world / "captions.txt").write_text("image,caption\n" + rows)
    values = settings("captioning", world, tmp_path / "run", train={"annotations": "captions.txt", "images": "images"})
    values["train"] |= {"steps": 1}
    assert finetune("captioning", "--config", write_settings(tmp_path / "c.yaml", values)) == 0
    split = json.loads((tmp_path / "run/recorded/split.json").read_text())
    assert (split["training_examples"], split["validation_examples"]) == (16, 4)


def test_questions_without_a_listed_answer_count_in_validation_and_are_not_learnt_from(worlds, tmp_path):
    (tmp_path / "answers.json").write_text('["no", "yes"]')
    values = settings("vqa", worlds["vqa"], tmp_path / "run", answers=str(tmp_path / "answers.json"))
    values["train"] |= {"steps": 1}
    assert finetune("vqa", "--config", write_settings(tmp_path / "c.yaml", values)) == 0
    split = json.loads((tmp_path / "run/recorded/split.json").read_text())
    assert (split["training_examples"], split["validation_examples"]) == (24, 18)
    last = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert last["ceiling"] == pytest.approx(50) and last["accuracy/other"] == 0
