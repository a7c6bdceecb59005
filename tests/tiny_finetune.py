"""Fine-tuning runs that take seconds: one-coloured pictures with questions, statements, captions and classes, and
pictures with coloured boxes, in the official formats."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_world import COLORS

from mhmoe_vl import cli

ENCODER = {
    "embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 8, "vocab_size": 49410,
    "max_text_len": 16, "ffn": {"kind": "mh_moe", "num_experts": 4, "hidden_dim": 16, "top_k": 2, "num_subtokens": 4},
}  # fmt: skip


def picture(color: str) -> bytes:
    """A picture of one colour."""
    return _encoded(np.full((32, 40, 3), COLORS[color], np.uint8))


def boxes(colors: list[str]) -> bytes:
    """A picture as NLVR draws them: three boxes of 100 px, 50 px apart."""
    pixels = np.full((100, 400, 3), 128, np.uint8)
    for number, color in enumerate(colors):
        pixels[:, number * 150 : number * 150 + 100] = COLORS[color]
    return _encoded(pixels)


def _encoded(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def write_vqa(folder: Path) -> Path:
    """Two questions a picture: 24 pictures in train, 9 in val."""
    for split, count in (("train", 24), ("val", 9)):
        questions, annotations = [], []
        images = folder / "images" / split
        images.mkdir(parents=True)
        for number in range(1, count + 1):
            color = list(COLORS)[number % len(COLORS)]
            (images / f"COCO_{split}_{number:012d}.jpg").write_bytes(picture(color))
            asked = {"What color is it?": ("other", color), "Is it red?": ("yes/no", "yes" if color == "red" else "no")}
            for place, (question, (kind, answer)) in enumerate(asked.items()):
                ids = {"question_id": number * 1000 + place, "image_id": number}
                questions.append({**ids, "question": question})
                given = [{"answer": answer} for _ in range(9)] + [{"answer": "dunno"}]
                about = {"question_type": question.split()[0].lower(), "answer_type": kind}
                annotations.append({**ids, **about, "multiple_choice_answer": answer, "answers": given})
        (folder / f"{split}_q.json").write_text(json.dumps({"data_subtype": split, "questions": questions}))
        (folder / f"{split}_a.json").write_text(json.dumps({"annotations": annotations}))
    return folder


def write_nlvr2(folder: Path) -> Path:
    """Sentences "the left one is <colour>" with four picture pairs each, half of them true; and drawn boxes."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    (folder / "drawn").mkdir()
    for split, count in (("train", 24), ("dev", 8)):
        lines = []
        for sentence in range(count):
            color, other = (list(COLORS)[(sentence + i) % 2] for i in (0, 1))
            for pair in range(4):
                left = color if pair < 2 else other
                for side, shown in enumerate((left, str(rng.choice(list(COLORS))))):
                    name = f"{split}-{sentence}-{pair}-img{side}.png"
                    (folder / "images" / name).write_bytes(picture(shown))
                about = {"sentence": f"the left one is {color}", "label": str(pair < 2)}
                lines.append({"identifier": f"{split}-{sentence}-{pair}-0", **about})
        (folder / f"{split}.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    drawn = [{"identifier": f"{n}-0", "sentence": "a blue box", "label": "true"} for n in range(8)]
    (folder / "drawn.json").write_text("".join(json.dumps(line) + "\n" for line in drawn))
    for number in range(8):
        (folder / "drawn" / f"dev-{number}-0-0.png").write_bytes(boxes(["red", "blue", "green"]))
    return folder


def write_captions(folder: Path) -> Path:
    """40 pictures with two captions each, in COCO's and in Karpathy's form."""
    (folder / "images").mkdir()
    images, annotations, listed = [], [], []
    for number in range(40):
        color, name = list(COLORS)[number % len(COLORS)], f"{number:012d}.jpg"
        (folder / "images" / name).write_bytes(picture(color))
        texts = [f"a {color} picture", f"the {color} one is here"]
        images.append({"id": number, "file_name": name})
        annotations += [{"id": 2 * number + i, "image_id": number, "caption": text} for i, text in enumerate(texts)]
        split = "test" if number >= 36 else "val" if number >= 28 else "restval" if number >= 24 else "train"
        about = {"filename": name, "filepath": "images", "cocoid": number, "imgid": number, "split": split}
        listed.append(about | {"sentences": [{"raw": text} for text in texts]})
    (folder / "coco.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    (folder / "dataset_coco.json").write_text(json.dumps({"images": listed, "dataset": "coco"}))
    return folder


def write_imagenet(folder: Path) -> Path:
    """Class folders of the four colours: six pictures each in train, three in val."""
    for split, count in (("train", 6), ("val", 3)):
        for color in COLORS:
            (folder / split / color).mkdir(parents=True)
            for number in range(count):
                (folder / split / color / f"{number}.JPEG").write_bytes(picture(color))  # PNG inside, as in ImageNet
    return folder


def write_detection(folder: Path) -> Path:
    """Pictures of two sizes with one or two coloured boxes, of sparse category ids: 16 in train, 6 in val."""
    rng = np.random.default_rng(0)
    kinds = {3: "red", 90: "blue"}
    for split, count in (("train", 16), ("val", 6)):
        (folder / split).mkdir()
        images, annotations = [], []
        for number in range(1, count + 1):
            height, width = ((32, 40), (48, 36))[number % 2]
            pixels = np.full((height, width, 3), 128, np.uint8)
            for place in range(1 + number % 2):
                x, y = int(rng.integers(2, width // 2 - 13)) + place * width // 2, int(rng.integers(2, height - 16))
                w, h = (int(side) for side in rng.integers(9, 13, 2))
                kind = (3, 90)[(number + place) % 2]
                pixels[y : y + h, x : x + w] = COLORS[kinds[kind]]
                corners = [[x, y, x + w, y, x + w, y + h, x, y + h]]
                ids = {"id": len(annotations) + 1, "image_id": number * 100, "category_id": kind, "iscrowd": 0}
                annotations.append({**ids, "bbox": [x, y, w, h], "area": w * h, "segmentation": corners})
            (folder / split / f"{number:03d}.png").write_bytes(_encoded(pixels))
            images.append({"id": number * 100, "file_name": f"{number:03d}.png", "width": width, "height": height})
        categories = [{"id": number, "name": name} for number, name in kinds.items()]
        coco = {"images": images, "annotations": annotations, "categories": categories}
        (folder / f"{split}.json").write_text(json.dumps(coco))
    return folder


def questions(split: str) -> dict[str, str]:
    """The section of a split of :func:`write_vqa`."""
    return {"questions": f"{split}_q.json", "annotations": f"{split}_a.json", "images": f"images/{split}"}


def annotated(name: str, images: str = "images") -> dict[str, str]:
    """The section of an annotation file of the other two worlds."""
    return {"annotations": name, "images": images}


DETECTOR = {
    "dim": 16, "anchor_scale": 3, "proposal_convs": 1, "box_convs": 0, "box_fc_dim": 32, "mask_convs": 1,
    "num_proposals": 32, "proposal_samples": 32, "roi_samples": 16,
}  # fmt: skip
WORLDS = {
    "vqa": write_vqa, "nlvr2": write_nlvr2, "captioning": write_captions, "imagenet": write_imagenet,
    "detection": write_detection,
}  # fmt: skip
CROP = {"min_crop": 1.0, "flip": 0.0, "color_jitter": 0.0}
PAIRS = {"augment": CROP, "max_text_len": 12}
LR = {"detection": 1e-6}
"""Proposals are taken by the rank of their scores, which rounding exchanges where they are close: runs on one and two
processes are alike as long as weights are. Each step then tests data, sampling and sums by itself."""
TASKS = {
    "vqa": {
        **PAIRS, "train": questions("train"), "val": questions("val"),
        "test": {"questions": "val_q.json", "images": "images/val"}, "min_answer_count": 3, "batch_size": 8,
    },
    "nlvr2": {**PAIRS, "train": annotated("train.json"), "val": annotated("dev.json"), "batch_size": 16},
    "captioning": {**PAIRS, "train": annotated("coco.json"), "val_fraction": 0.2, "batch_size": 16, "num_beams": 2},
    "imagenet": {"augment": CROP, "val": "val", "batch_size": 8, "mixup": 0.8, "cutmix": 1.0},
    "detection": {
        "train": annotated("train.json", "train"), "val": annotated("val.json", "val"), "batch_size": 4,
        "augment": {"min_scale": 0.8, "max_scale": 1.2, "flip": 0.5}, "window_size": 2, "num_global_blocks": 1,
        "detector": DETECTOR,
    },
}  # fmt: skip


def settings(kind: str, world: Path, out: Path, **task) -> dict:
    """A configuration of a task on its world; ``task`` replaces fields of its section."""
    return {
        "output_dir": str(out),
        "encoder": ENCODER,
        "task": {"kind": kind, "data_dir": str(world), **TASKS[kind], **task},
        "optim": {"lr": LR.get(kind, 5e-3), "warmup_steps": 2},
        "train": {
            "steps": 60, "log_every": 20, "num_workers": 0, "threads": 1, "precision": "float32", "device": "cpu",
        },
    }  # fmt: skip


def finetune(kind: str, *arguments: object) -> int:
    """The exit code of the task's tool."""
    with pytest.raises(SystemExit) as stopped:
        cli.run(kind, "", "", list(map(str, arguments)))
    return stopped.value.code


def log(run: Path) -> list[dict]:
    """The lines of a run's log without times."""
    times = ("time", "samples_per_s", "images_per_s", "step_seconds", "memory_mb")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in times} for line in lines]
