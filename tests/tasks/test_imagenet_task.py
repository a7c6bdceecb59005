"""Classification: a tiny run from end to end, in folders and in shards, and what it must refuse."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_finetune import ENCODER, finetune, settings, write_imagenet
from tiny_world import COLORS, write_settings, write_world
from tiny_world import settings as pretraining
from torch.nn import functional as F

from mhmoe_vl import cli
from mhmoe_vl.config import EncoderConfig, RunConfig, validate
from mhmoe_vl.data.loader import step_loader
from mhmoe_vl.data.mixing import Mix
from mhmoe_vl.data.writing import write_shard
from mhmoe_vl.errors import CheckpointError
from mhmoe_vl.models.factory import build_encoder, load_pretrained
from mhmoe_vl.models.heads import ClassNames
from mhmoe_vl.tasks.base import ModelOutput
from mhmoe_vl.tasks.imagenet import ImageNetModel, LabelledBatch

ROOT = Path(__file__).parents[2]
SHARDS = {"train": "shards/train", "val": "shards/val", "classes": "classes.json"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The same pictures in class folders and in shards."""
    folder = write_imagenet(tmp_path_factory.mktemp("imagenet"))
    classes = sorted(COLORS)
    for split in ("train", "val"):
        (folder / "shards" / split).mkdir(parents=True)
        files = [
            (label, path) for label, name in enumerate(classes) for path in sorted((folder / split / name).iterdir())
        ]
        samples = [(f"{i:03d}", {"jpg": path.read_bytes(), "cls": str(label)}) for i, (label, path) in enumerate(files)]
        write_shard(folder / "shards" / split / "0.tar", samples)
    (folder / "classes.json").write_text(json.dumps(classes))
    return folder


def configured(folder, world, **task):
    return write_settings(folder / "c.yaml", settings("imagenet", world, folder / "run", **task))


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    values = settings("imagenet", world, out / "run", augment={"min_crop": 0.5, "flip": 0.5, "policy": "rand-m3"})
    values["train"]["ema_decay"] = 0.9
    assert finetune("imagenet", "--config", write_settings(out / "c.yaml", values)) == 0
    return out / "run"


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ------------------------------------------------------------------------------------------------ runs
def test_it_learns_and_writes_what_it_predicts(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["top1/baseline"] == 25 and summary["top5/baseline"] == 100
    assert summary["top1/after"] > 90 and summary["top5/after"] == 100
    assert json.loads((finished / "recorded/classes.json").read_text()) == sorted(COLORS)
    found = records(finished / "predictions/val_step-00000060.jsonl")
    assert [r["id"] for r in found] == sorted(f"{color}/{n}.JPEG" for color in COLORS for n in range(3))
    right = sum(r["prediction"] == r["id"].partition("/")[0] for r in found)
    assert summary["top1/after"] == pytest.approx(100 * right / 12)
    for record in found:
        names, shares = zip(*record["candidates"], strict=True)
        assert set(names) == set(COLORS) and names[0] == record["prediction"]
        assert sorted(shares, reverse=True) == list(shares) and sum(shares) == pytest.approx(1, abs=1e-5)


def test_the_table_of_predictions(finished):
    rows = list(csv.DictReader((finished / "predictions/imagenet_predictions.csv").read_text().splitlines()))
    assert len(rows) == 12 and all(row["label"] == row["id"].partition("/")[0] for row in rows)
    best = max(line.get("top1", 0) for line in records(finished / "metrics.jsonl"))
    assert 100 * sum(row["class1"] == row["label"] for row in rows) / 12 == pytest.approx(best)
    assert all(0 <= float(row["probability4"]) <= float(row["probability1"]) <= 1 for row in rows)


def test_shards_give_what_folders_give(world, tmp_path):
    for name, task in (("folders", {}), ("shards", SHARDS)):
        config = configured(tmp_path, world, mixup=0.0, **task)
        assert finetune("imagenet", "--config", config, "--train.steps", 3, "--output_dir", tmp_path / name) == 0
    found = [records(tmp_path / name / "predictions/val_step-00000003.jsonl") for name in ("folders", "shards")]
    for name in ("label", "prediction", "candidates"):
        assert [record[name] for record in found[0]] == [record[name] for record in found[1]]
    assert found[1][0]["id"] == 0 and found[1][0]["image"].endswith("shards/val/0.tar:000")


def test_the_report_shows_pictures_of_folders_and_of_shards(finished, world, tmp_path):
    config = configured(tmp_path, world, **SHARDS | {"val": None, "val_fraction": 0.25})
    assert finetune("imagenet", "--config", config, "--train.steps", 1) == 0
    for run, count in ((finished, 12), (tmp_path / "run", 6)):
        cards = json.loads((run / "gallery.json").read_text())
        assert len(cards) == count and all((run / name).is_file() for card in cards for name in card["images"])
        assert all(len(card["images"]) == 1 and len(card["bars"]) == 4 for card in cards)
        assert "data:image/jpeg" in (run / "report.html").read_text()


def test_pictures_held_out_of_training(world, tmp_path):
    config = configured(tmp_path, world, val=None, val_fraction=0.25)
    assert finetune("imagenet", "--config", config, "--train.steps", 1) == 0
    split = json.loads((tmp_path / "run/recorded/split.json").read_text())
    assert (split["training_examples"], split["validation_examples"]) == (18, 6)
    found = records(tmp_path / "run/predictions/val_step-00000001.jsonl")
    assert [r["id"] for r in found] == split["validation"]
    task = cli.build_task(validate(RunConfig, settings("imagenet", world, tmp_path, val=None, val_fraction=0.25)))
    assert not {e.key for e in task.train} & set(split["validation"])


def test_evaluation_alone_and_at_another_size(finished, world, capsys):
    printed = {}
    for options in ([], ["--task.test_size", 48], ["--task.test_size", "[32, 64]", "--task.crop_pct", 0.9]):
        assert finetune("imagenet", "--eval", finished, *options) == 0
        printed[str(options)] = float(capsys.readouterr().out.split()[1])
    best = max(line.get("top1", 0) for line in records(finished / "metrics.jsonl"))
    assert printed["[]"] == pytest.approx(best, rel=1e-5)
    assert min(printed.values()) > 90  # one-coloured pictures are as easy at any size
    moved = ["--task.train", "gone", "--task.val", world / "train"]
    assert finetune("imagenet", "--eval", finished, *moved) == 0
    assert len(records(finished / "predictions/val/records.jsonl")) == 24


def test_positions_are_resized_for_another_size():
    torch.manual_seed(0)
    model = ImageNetModel(build_encoder(validate(EncoderConfig, ENCODER)), ["a", "b"]).eval()
    large = build_encoder(validate(EncoderConfig, ENCODER | {"img_size": 48}))
    weights = model.encoder.state_dict()
    embed = model.encoder.image_embed
    grid = embed.pos_embed[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    moved = F.interpolate(grid, (6, 6), mode="bicubic", antialias=True, align_corners=False).permute(0, 2, 3, 1)
    weights["image_embed.pos_embed"] = torch.cat([embed.pos_embed[:, :1], moved.flatten(1, 2)], 1)
    large.load_state_dict(weights)
    images = torch.randn(2, 3, 48, 48)
    batch = LabelledBatch(images, torch.zeros(2), torch.arange(2), [])
    tokens = large(images).image[:, 1:].mean(1)
    torch.testing.assert_close(model(batch).values["logits"], model.head(model.fc_norm(tokens)), rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------- beginnings
@pytest.mark.parametrize("change", [{}, {"multiway": "shared_attention", "vl_ffn_layers": 1}])
def test_a_pre_training_run_gives_its_image_branch(world, tmp_path, change):
    made = write_world(tmp_path / "world")
    values = pretraining(made, tmp_path / "pretrained", train={"steps": 1}, encoder=change)
    with pytest.raises(SystemExit) as stopped:
        cli.run("masked_modeling", "", "", ["--config", str(write_settings(tmp_path / "p.yaml", values))])
    assert stopped.value.code == 0
    values = settings("imagenet", world, tmp_path / "run")
    alone = {
        "modalities": ["image"],
        "final_norm": False,
        "img_size": 48,
        "multiway": change.get("multiway", "decoupled"),
    }
    values["encoder"] = values["encoder"] | alone
    values["init_from"] = str(tmp_path / "pretrained")
    settled = validate(RunConfig, values)
    model = cli._model(settled, cli.build_task(settled), settled.init_from)
    given = load_pretrained(tmp_path / "pretrained", img_size=48).eval()
    images = torch.randn(2, 3, 48, 48)
    wanted = given.forward_intermediates(images, 1, output_fmt="NLC", intermediates_only=True)[0]
    got = model.eval().encoder(images).image[:, 1:]
    torch.testing.assert_close(got, wanted)
    assert finetune("imagenet", "--config", write_settings(tmp_path / "c.yaml", values), "--train.steps", 1) == 0


@pytest.mark.parametrize("ffn", [{"kind": "dense"}, {"kind": "moe"}, {"kind": "moe", "router": {"kind": "cosine"}}])
def test_other_layers_train_too(world, tmp_path, ffn):
    values = settings("imagenet", world, tmp_path / "run")
    values["encoder"] = values["encoder"] | {"ffn": ffn, "modalities": ["image"]}
    assert finetune("imagenet", "--config", write_settings(tmp_path / "c.yaml", values), "--train.steps", 2) == 0


def test_a_published_file_gives_encoder_and_features(world, data_dir):
    sizes = {
        "embed_dim": 96, "depth": 2, "num_heads": 6, "img_size": 32, "patch_size": 8, "modalities": ["image"],
        "final_norm": False, "ffn": {"kind": "dense", "sub_ln": True},
    }  # fmt: skip
    values = settings("imagenet", world, world / "unused") | {"encoder": sizes}
    settled = validate(RunConfig, values)
    model = cli._model(settled, cli.build_task(settled), str(data_dir / "beit3_small" / "model.safetensors"))
    start = cli._model(settled, cli.build_task(settled), None)
    same = [n for n, value in model.state_dict().items() if torch.equal(value, start.state_dict()[n])]
    assert {n for n in same if n.startswith("encoder.")} == set()
    assert {n for n in same if not n.startswith("encoder.")} >= {"head.weight", "classes.names"}


# ------------------------------------------------------------------------------------------ arithmetic
def test_smoothed_loss_is_torchs(world, tmp_path):
    task = cli.build_task(validate(RunConfig, settings("imagenet", world, tmp_path, label_smoothing=0.2)))
    logits, labels = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 1])
    output = ModelOutput({"logits": logits}, {}, {})
    batch = LabelledBatch(torch.zeros(5, 3, 8, 8), labels, torch.tensor([1, 0, 3, 2, 4]), [{}] * 5)
    wanted = F.cross_entropy(logits, labels, label_smoothing=0.2, reduction="sum")
    torch.testing.assert_close(task.loss(output, batch)["class"], wanted)
    mixed = LabelledBatch(batch.images, labels, batch.mates, batch.records, Mix(0.7, None))
    own = F.one_hot(labels, 4).float()
    targets = (0.7 * own + 0.3 * own[batch.mates]) * 0.8 + 0.2 / 4
    torch.testing.assert_close(task.loss(output, mixed)["class"], F.cross_entropy(logits, targets, reduction="sum"))


def test_scores_by_hand(world, tmp_path):
    task = cli.build_task(validate(RunConfig, settings("imagenet", world, tmp_path)))
    given = [("a", "abcde"), ("b", "abcde"), ("f", "abcde"), ("e", "eabcd")]
    made = [{"label": t, "prediction": n[0], "candidates": [[c, 0.2] for c in n]} for t, n in given]
    assert task.score(made) == {"top1": 50.0, "top5": 75.0}
    assert task.score([]) == {}


def test_batches_do_not_depend_on_workers(world, tmp_path):
    augment = {"min_crop": 0.3, "flip": 0.5, "policy": "rand-m9-mstd0.5-inc1", "erase_prob": 0.5}
    task = cli.build_task(validate(RunConfig, settings("imagenet", world, tmp_path, augment=augment)))
    runs = [list(step_loader(task.dataset("train"), 2, 6, workers)) for workers in (0, 1, 2)]
    for others in runs[1:]:
        for [ours], [theirs] in zip(runs[0], others, strict=True):
            assert torch.equal(ours.images, theirs.images) and ours.records == theirs.records
            assert ours.mix == theirs.mix and torch.equal(ours.mates, theirs.mates)
    assert len({parts[0].images.numpy().tobytes() for parts in runs[0]}) == 4


def test_pictures_are_normalised_as_asked(world, tmp_path):
    values = settings("imagenet", world, tmp_path, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    task = cli.build_task(validate(RunConfig, values))
    batch = task.prepare(task.dataset("val")[0], torch.device("cpu"))
    red, green, blue = (value / 255 for value in COLORS[batch.records[0]["label"]])
    wanted = torch.tensor([(red - 0.485) / 0.229, (green - 0.456) / 0.224, (blue - 0.406) / 0.225])
    torch.testing.assert_close(batch.images[0].mean((1, 2)), wanted, rtol=0, atol=0.02)


# -------------------------------------------------------------------------------------------- class lists
def test_another_order_of_classes_is_refused_by_its_first_difference(finished, world, tmp_path, capsys):
    names = sorted(COLORS)
    (tmp_path / "classes.json").write_text(json.dumps([names[0], names[2], names[1], names[3]]))
    config = configured(tmp_path, world, classes=str(tmp_path / "classes.json"))
    assert finetune("imagenet", "--config", config, "--init_from", finished) == 2
    error = capsys.readouterr().err
    assert f"class 1 is {names[1]!r} in the weights and {names[2]!r} in the data; 2 classes differ" in error
    assert error.count("\n") == 1


def test_a_run_that_goes_on_must_find_its_classes_again(world, tmp_path, capsys):
    shutil.copytree(world, tmp_path / "world")
    config = configured(tmp_path, tmp_path / "world")
    assert finetune("imagenet", "--config", config, "--train.steps", 1) == 0
    for split in ("train", "val"):
        os.rename(tmp_path / "world" / split / "green", tmp_path / "world" / split / "emerald")
    assert finetune("imagenet", "--config", config, "--train.steps", 2) == 2
    error = capsys.readouterr().err
    assert 'recorded/classes.json: the data now give another one: line 3: "green" in the run, "emerald" now' in error


def test_a_head_for_more_classes_starts_anew(finished, world, tmp_path):
    shutil.copytree(world, tmp_path / "world")
    for split in ("train", "val"):
        shutil.copytree(tmp_path / "world" / split / "red", tmp_path / "world" / split / "white")
    settled = validate(RunConfig, settings("imagenet", tmp_path / "world", tmp_path / "run"))
    model = cli._model(settled, cli.build_task(settled), str(finished))
    assert model.head.weight.shape == (5, 32)


def test_class_names_know_their_own():
    ours = ClassNames(["cat", "ä" * 100, "dog"])
    ours.load_state_dict(ClassNames(["cat", "ä" * 100, "dog"]).state_dict())
    with pytest.raises(
        CheckpointError, match=r"class 2 is 'do' in the weights and 'dog' in the data; 1 classes differ"
    ):
        ours.load_state_dict(ClassNames(["cat", "ä" * 100, "do"]).state_dict())


# ------------------------------------------------------------------------------------------------ mistakes
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": "nowhere"}, "nowhere: no such shard or folder"),
        ({"train": "."}, "shards: no picture in it (add some, or leave the class out)"),
        ({"val": "shards"}, "shards: class 'train' (and 1 more) is not among the 4 classes"),
        ({"val": "train/red"}, "no class folder and no *.tar in it"),
        ({"train": "shards/train"}, "task.classes: not set, and shards do not name their classes"),
        ({"classes": "none.json"}, "none.json: No such file"),
        ({"classes": 4}, "is not among the 4 classes"),
        ({"batch_size": 7}, "task.batch_size: 7 is no multiple of 2"),
        ({"test_size": 30}, "task.test_size: [30, 30] with encoder.patch_size 8"),
        ({"augment": {"policy": "rand"}}, "task.augment.policy: 'rand' is no RandAugment of timm"),
        ({"val": None, "val_fraction": 0.99}, "24 of 24 groups to hold out"),
        ({"mean": [0.5, 0.5]}, "task.mean"),
        (SHARDS | {"classes": 2}, "shards/val/0.tar:006: member cls is '2' (a class is a number of 0 to 1"),
    ],
)
def test_mistakes_are_one_line_before_training(world, tmp_path, capsys, change, message):
    assert finetune("imagenet", "--config", configured(tmp_path, world, **change)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("error: ")
    assert not (tmp_path / "run" / "checkpoints").exists()


# ------------------------------------------------------------------------------------------- odd pictures
def encoded(form: str, image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def red(mode: str = "RGB") -> Image.Image:
    return Image.new("RGB", (40, 32), COLORS["red"]).convert(mode)


def odd_pictures() -> dict[str, bytes]:
    """Pictures that real folders hold, in spite of their names."""
    turned = Image.Exif()
    turned[0x0112] = 6
    sixteen = Image.fromarray(np.full((32, 40), 40_000, np.uint16))
    frames = [red(), Image.new("RGB", (40, 32))]
    return {
        "cmyk.JPEG": encoded("JPEG", red("CMYK")),
        "png.JPEG": encoded("PNG", red()),
        "grey.jpg": encoded("JPEG", red("L")),
        "sixteen.png": encoded("PNG", sixteen),
        "animated.webp": encoded("WEBP", frames[0], save_all=True, append_images=frames[1:], lossless=True),
        "turned.JPG": encoded("JPEG", red(), exif=turned),
        "alpha.png": encoded("PNG", red("RGBA")),
    }


def bad_pictures() -> dict[str, bytes]:
    """Pictures that cannot be read."""
    return {
        "empty.JPEG": b"",
        "cut.JPEG": encoded("JPEG", red())[:200],
        "page.jpg": b"<html>not found</html>",
        "animated.gif": encoded("GIF", red()),
        "map.bmp": encoded("BMP", red()),
    }


def with_pictures(world, folder, split, pictures):
    shutil.copytree(world, folder / "world")
    for name, data in pictures.items():
        (folder / "world" / split / "red" / name).write_bytes(data)
    return folder / "world"


def test_odd_pictures_are_read_in_training_and_evaluation(world, tmp_path):
    made = with_pictures(with_pictures(world, tmp_path / "a", "train", odd_pictures()), tmp_path, "val", odd_pictures())
    config = configured(tmp_path, made)
    assert finetune("imagenet", "--config", config, "--train.steps", 5, "--train.log_every", 1) == 0
    assert not [line for line in records(tmp_path / "run/metrics.jsonl") if any("bad/" in name for name in line)]
    found = records(tmp_path / "run/predictions/val_step-00000005.jsonl")
    assert {f"red/{name}" for name in odd_pictures()} < {record["id"] for record in found}
    task = cli.build_task(validate(RunConfig, settings("imagenet", made, tmp_path)))
    means = {
        r["id"]: x.float().mean((1, 2)) for b in task.dataset("val") for x, r in zip(b.images, b.records, strict=True)
    }
    for name in ("png.JPEG", "animated.webp", "turned.JPG", "alpha.png"):
        assert (means[f"red/{name}"] - torch.tensor(COLORS["red"])).abs().max() < 3, name
    assert (means["red/sixteen.png"] - 40_000 / 257).abs().max() < 1


def test_bad_pictures_are_counted_in_training(world, tmp_path):
    config = configured(tmp_path, with_pictures(world, tmp_path, "train", bad_pictures()))
    assert finetune("imagenet", "--config", config, "--train.steps", 4, "--train.log_every", 1) == 0
    assert records(tmp_path / "run/metrics.jsonl")[-2]["bad/image"] == 5  # 4 steps of 8 are one epoch and some


@pytest.mark.parametrize("name", list(bad_pictures()))
def test_a_bad_picture_ends_an_evaluation(world, tmp_path, capsys, name):
    made = with_pictures(world, tmp_path, "val", {name: bad_pictures()[name]})
    assert finetune("imagenet", "--config", configured(tmp_path, made)) == 2
    error = capsys.readouterr().err
    assert f"val: red/{name}: " in error and " picture" in error and error.count("\n") == 1


def test_bad_classes_in_shards_are_counted_in_training_and_end_an_evaluation(world, tmp_path, capsys):
    shutil.copytree(world, tmp_path / "world")
    for split, classes in (("train", ["0", "1", "7", "cat"] * 4), ("val", ["0", "1", "2", "4"])):
        samples = [(f"{i}", {"jpg": encoded("PNG", red()), "cls": name}) for i, name in enumerate(classes)]
        write_shard(tmp_path / "world" / "shards" / split / "0.tar", samples)
    config = configured(tmp_path, tmp_path / "world", **SHARDS | {"val": "val"})
    assert finetune("imagenet", "--config", config, "--train.steps", 2, "--train.log_every", 1) == 0
    assert records(tmp_path / "run/metrics.jsonl")[-2]["bad/class"] == 8
    options = ["--task.val", "shards/val", "--output_dir", tmp_path / "other"]
    assert finetune("imagenet", "--config", config, *options) == 2
    assert "shards/val/0.tar:3: member cls is '4' (a class is a number of 0 to 3" in capsys.readouterr().err


def test_the_real_layout(data_dir):
    files = [ROOT / "configs/finetune/imagenet_samples_tiny.yaml"]
    options = ["--task.data_dir", str(data_dir / "imagenet_1k_samples")]
    task = cli.build_task(cli._settings("imagenet", files, None, options))
    assert len(task.classes) == len(task.train) == 1000 and task.classes[0] == "n01440764"
    [batch] = task.dataset("train")[0]
    assert batch.images.shape[1:] == (3, 224, 224) and not batch.bad and len(batch) == len(batch.images) > 1


def test_an_encoder_without_images_is_refused(world, tmp_path, capsys):
    assert finetune("imagenet", "--config", configured(tmp_path, world), "--encoder.modalities", "[text]") == 2
    assert "encoder.modalities: ['text'] (this task needs image)" in capsys.readouterr().err
