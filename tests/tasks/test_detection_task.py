"""Detection from files to official scores: what a run leaves behind, odd pictures, and bad ones."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_finetune import annotated, finetune, log, settings, write_detection
from tiny_world import write_settings

from mhmoe_vl import cli, commands, config
from mhmoe_vl.data.loader import sample_rng
from mhmoe_vl.errors import ConfigError, DataError
from mhmoe_vl.models.factory import build_encoder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run of 70 steps; its configuration stands beside it, and the data in ``world``."""
    folder = tmp_path_factory.mktemp("detection")
    (folder / "world").mkdir()
    world = write_detection(folder / "world")
    values = settings("detection", world, folder / "run", test=annotated("val.json", "val"))
    values["optim"]["lr"] = 2e-3
    values["train"]["steps"] = 70
    assert finetune("detection", "--config", write_settings(folder / "c.yaml", values)) == 0
    return folder / "run"


def task(world: Path, **fields):
    values = settings("detection", world, Path("out"), **fields)
    return cli.build_task(config.validate(config.run_config("detection"), values))


# ------------------------------------------------------------------------------------------ whole runs
@pytest.mark.slow
def test_a_run_learns_and_leaves_official_files(run, tmp_path):
    lines = log(run)
    assert {"loss/objectness", "loss/proposals", "loss/classes", "loss/boxes", "loss/masks"} <= lines[1].keys()
    assert lines[1]["balance_loss"] > 0
    last = [line for line in lines if line["split"] == "val"][-1]
    assert last["box/AP50"] > 0.3 and last["mask/AP50"] > 0.3
    names = {"bbox": "box", "segm": "mask"}
    for iou_type, kind in names.items():
        files = ["--predictions", run / f"predictions/detections_{iou_type}_results.json"]
        files += ["--annotations", run.parent / "world/val.json", "--json", tmp_path / "scores.json"]
        assert commands.main(["score", "coco", "--check", "--iou-type", iou_type, *map(str, files)]) == 0
        found = json.loads((tmp_path / "scores.json").read_text())
        assert {f"{kind}/{name}": value for name, value in found.items() if value >= 0} == {
            name: value for name, value in last.items() if name.startswith(kind)
        }


@pytest.mark.slow
def test_what_was_left_out_and_the_categories_are_recorded(run):
    assert json.loads((run / "recorded/categories.json").read_text()) == [
        {"id": 3, "name": "red"}, {"id": 90, "name": "blue"},
    ]  # fmt: skip
    objects = json.loads((run / "recorded/objects.json").read_text())
    assert objects == {"pictures": 16, "objects": 24, "pictures without objects": 0}


@pytest.mark.slow
def test_the_report_shows_pictures_with_boxes_and_curves(run):
    page = (run / "report.html").read_text()
    assert page.count('<div class="card">\n<div class="pictures">') == 6
    assert page.count('src="data:image/jpeg;base64,') == 12
    assert "Precision of boxes" in page and "Precision of masks" in page and "IoU 0.75" in page
    with Image.open(run / "gallery/000-1.jpg") as drawn:
        assert drawn.size == (36, 48)


@pytest.mark.slow
def test_a_run_is_evaluated_and_a_test_split_predicted_without_training_files(run, capsys):
    copy = run.parent / "elsewhere"
    shutil.copytree(run.parent / "world", copy)
    shutil.rmtree(copy / "train")
    (copy / "train.json").unlink()
    value = json.loads((copy / "val.json").read_text())
    del value["annotations"]
    (copy / "test.json").write_text(json.dumps(value))
    moved = ["--task.data_dir", copy, "--task.test.annotations", "test.json"]
    assert finetune("detection", "--eval", run, *moved) == 0
    last = [line for line in log(run) if line["split"] == "val"][-1]
    assert f"{'box/AP50':32} {last['box/AP50']:.6g}" in capsys.readouterr().out
    assert finetune("detection", "--eval", run, "--split", "test", *moved) == 0
    entries = json.loads((run / "predictions/test/detections_segm_results.json").read_text())
    assert {entry["image_id"] for entry in entries} <= {100 * number for number in range(1, 7)}
    assert "box/AP" not in capsys.readouterr().out


@pytest.mark.parametrize(("size", "drop_path", "layer_decay"), [("base", 0.1, 0.7), ("large", 0.4, 0.8)])
def test_the_recipes_are_vitdets(size, drop_path, layer_decay):
    path = Path(__file__).parents[2] / f"configs/finetune/detection_{size}.yaml"
    run = config.load(config.run_config("detection"), [path], [])
    assert (run.encoder.img_size, run.encoder.drop_path, run.optim.layer_decay) == (1024, drop_path, layer_decay)
    assert (run.task.batch_size, run.task.window_size, run.task.num_global_blocks) == (64, 14, 4)
    assert (run.task.augment.min_scale, run.task.augment.max_scale) == (0.1, 2.0)
    assert (run.optim.lr, run.optim.weight_decay, run.optim.warmup_steps) == (1e-4, 0.1, 250)
    assert (run.optim.schedule, list(run.optim.betas)) == ("steps", [0.9, 0.999])
    assert run.train.steps == pytest.approx(100 * 118_000 / 64, rel=0.01)
    heads = run.task.detector
    assert (heads.dim, heads.proposal_convs, heads.box_convs, heads.mask_convs) == (256, 2, 4, 4)
    assert "# Not yet run at full size." in path.read_text().splitlines()


# --------------------------------------------------------------------------------------------- files
def rewrite(path: Path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_odd_objects_are_counted_and_pictures_without_any_are_not_trained_on(tmp_path):
    world = write_detection(tmp_path)

    def change(value):
        value["annotations"][0]["iscrowd"] = 1
        value["annotations"][1]["bbox"][3] = 0
        value["annotations"][4]["bbox"][0] = -5
        value["annotations"] = [entry for entry in value["annotations"] if entry["image_id"] != 400]

    rewrite(world / "train.json", change)
    found = task(world)
    counts = json.loads(found.recorded()["objects.json"])
    assert counts == {
        "pictures": 14,
        "objects": 21,
        "pictures without objects": 2,
        "crowds": 1,
        "empty": 1,
        "clipped": 1,
    }
    assert {example.record.id for example in found.given} - {e.record.id for e in found.train} == {100, 400}


def test_validation_pictures_are_held_out_by_seed(tmp_path):
    world = write_detection(tmp_path)
    first, second = (task(world, val=None, val_fraction=0.25) for _ in range(2))
    assert (len(first.val), len(first.train)) == (4, 12)
    assert [e.key for e in second.val] == [e.key for e in first.val]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value["categories"][0].update(name="pink"), "val.json: categories: 2 categories, 2 in training"),
        (lambda value: value["categories"].append({"id": 4, "name": "x"}), "val.json: categories: 3 categories, 2 in"),
        (
            lambda value: value["annotations"][0].pop("segmentation"),
            r"val.json: annotations\[0\].segmentation: missing",
        ),
    ],
)
def test_files_of_different_sets_are_refused(tmp_path, change, message):
    world = write_detection(tmp_path)
    rewrite(world / "val.json", change)
    with pytest.raises(DataError, match=message):
        _ = task(world).val


def test_a_split_without_annotations_cannot_be_trained_on(tmp_path):
    world = write_detection(tmp_path)
    rewrite(world / "train.json", lambda value: value.pop("annotations"))
    with pytest.raises(DataError, match=r"train.json: annotations: missing"):
        _ = task(world).train


def test_an_encoder_without_images_is_refused(tmp_path):
    values = settings("detection", tmp_path, tmp_path)
    values["encoder"] = values["encoder"] | {"modalities": ["text"]}
    with pytest.raises(ConfigError, match=r"encoder.modalities: \['text'\]"):
        cli.build_task(config.validate(config.run_config("detection"), values))


def test_a_rank_without_pictures_has_no_terms_and_zero_gradients(tmp_path):
    found = task(write_detection(tmp_path))
    values = settings("detection", tmp_path, tmp_path)["encoder"]
    model = found.model(build_encoder(config.validate(config.EncoderConfig, values)))
    nothing = found.prepare(found.collate([]), torch.device("cpu"))
    output = model(nothing)
    assert found.loss(output, nothing) == {}
    assert set(found.num_targets(nothing).values()) == {0}
    sum(value.sum() for value in output.values.values()).backward()
    gradients = [p.grad for p in model.encoder.blocks.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


# ------------------------------------------------------------------------------------------ pictures
def encoded(pixels: np.ndarray, kind: str, **options) -> bytes:
    file = io.BytesIO()
    picture = Image.fromarray(pixels)
    if kind == "cmyk":
        picture.convert("CMYK").save(file, "JPEG", quality=95)
    elif kind == "grey":
        picture.convert("L").save(file, "PNG")
    elif kind == "16-bit":
        Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257).save(file, "PNG")
    elif kind == "animated":
        others = [Image.fromarray(255 - pixels)]
        picture.save(file, "WEBP", save_all=True, append_images=others, lossless=True)
    elif kind == "rotated":
        exif = Image.Exif()
        exif[0x0112] = 6  # stored lying on its left side
        picture.transpose(Image.Transpose.ROTATE_90).save(file, "JPEG", quality=95, exif=exif)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["cmyk", "grey", "16-bit", "animated", "rotated"])
def test_odd_pictures_are_read_upright_as_their_annotations_say(tmp_path, kind):
    world = write_detection(tmp_path)
    pixels = np.full((48, 36, 3), 40, np.uint8)
    pixels[:10, :10] = 230
    (world / "train/001.png").write_bytes(encoded(pixels, kind))
    found = task(world)
    transform = found.transform(train=False)
    image = transform(found.given[0], sample_rng(0, 0, 0))["image"]
    assert image.shape == (3, 32, 24)
    assert image[:, 1:5, 1:5].float().mean() == pytest.approx(230, abs=12)
    assert image[:, 12:, 12:].float().mean() == pytest.approx(40, abs=12)


@pytest.mark.parametrize("kind", ["missing", "truncated", "other size", "lying"])
def test_bad_pictures_are_counted_in_training_and_end_an_evaluation(tmp_path, kind, capsys):
    world = write_detection(tmp_path)
    for path in (world / "train/003.png", world / "val/003.png"):
        data = path.read_bytes()
        if kind == "missing":
            path.unlink()
        elif kind == "truncated":
            path.write_bytes(data[: len(data) // 2])
        else:
            size = (30, 40) if kind == "other size" else (48, 36)
            Image.new("RGB", size).save(path)
    reason = {"missing": "missing image", "truncated": "image"}.get(kind, "picture size")
    found = task(world)
    bad = sum((part.bad.get(reason, 0) for step in range(8) for part in found.dataset("train")[step]), 0)
    assert bad == 2  # in eight steps of four every picture comes twice
    with pytest.raises(DataError) as caught:
        _ = list(found.dataset("val"))
    message = str(caught.value)
    assert "003.png" in message and "val.json" in message and "\n" not in message
    if kind == "lying":
        assert "48 x 36 pixels, 36 x 48 in the annotations" in message


def test_examples_hold_what_the_annotations_say(tmp_path):
    found = task(write_detection(tmp_path), augment={"min_scale": 1.0, "max_scale": 1.0, "flip": 0.0})
    transform = found.transform(train=True)
    for example in found.given[:4]:
        made = transform(example, sample_rng(0, 0, 0))
        factor = 32 / max(example.record.height, example.record.width)
        for instance, box, label, mask in zip(example.record.instances, *made["target"].values(), strict=True):
            x, y, width, height = instance.box
            wanted = torch.tensor([x, y, x + width, y + height]) * factor
            assert torch.allclose(box, wanted, atol=0.5)
            assert label.item() == {3: 1, 90: 2}[instance.category_id]
            assert mask.sum().item() == pytest.approx(width * height * factor**2, rel=0.25)
