"""Object detection and instance segmentation: ViTDet's recipe on COCO's files, scored by pycocotools.

Plain encoder, feature pyramid from its last map, torchvision's R-CNN heads. The pictures of a batch need not be of one
size; each one's losses and detections are those that it has alone.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import clip_boxes_to_image

from ..data import rle
from ..data.annotated import Example, held_out
from ..data.coco import CocoSplit, Picture, examples_of, official, read_instances, trainable
from ..data.scale_jitter import ScaleJitter
from ..data.transforms import decode_image
from ..errors import ConfigError, DataError
from ..metrics.coco_ap import EVALUATOR, CocoScores, score_coco
from ..models.detector import Detector
from ..models.encoder import Encoder, EncoderOutput
from ..models.heads import ClassList
from . import detection_gallery
from .annotated_task import AnnotatedTask
from .base import InputSpec, ModelOutput, Record
from .detection_batch import DetectionBatch, collate, map_sizes
from .encoder_model import EncoderModel

CATEGORIES_FILE, OBJECTS_FILE = "categories.json", "objects.json"
IOU_TYPES = {"box": "bbox", "mask": "segm"}
"""Our names of what is scored, and COCO's."""
CURVES = {"box": "Precision of boxes", "mask": "Precision of masks"}


class DetectionModel(EncoderModel):
    """Encoder and detector.

    Args:
        encoder: with an image branch.
        categories: names by id.
        window_size: patches to a side of the windows that blocks attend in, or none.
        num_global_blocks: blocks that see the whole map all the same.
        detector: options of :class:`~..models.detector.Detector`.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        categories: Mapping[int, str],
        window_size: int | None,
        num_global_blocks: int,
        detector: Mapping[str, Any],
    ) -> None:
        super().__init__(encoder)
        self.window_size, self.num_global_blocks = window_size, num_global_blocks
        sizes = {"num_classes": len(categories), "patch_size": encoder.patch_size}
        self.detector = Detector(encoder.embed_dim, **sizes, **detector)
        sha256 = hashlib.sha256(_categories_text(categories).encode()).hexdigest()
        self.categories = ClassList(sha256, layer="detector.roi_heads")

    def forward(self, batch: DetectionBatch) -> ModelOutput:
        """The losses, summed over pictures."""
        maps, features = self._maps(batch)
        if not maps:
            return self.output({"nothing": features.image.sum()}, features)
        return self.output(self.detector.losses(maps, batch.sizes, batch.targets, batch.seeds), features)

    def detect(self, batch: DetectionBatch) -> list[dict[str, Tensor]]:
        """What is found in every picture; see :meth:`Detector.detect`."""
        return self.detector.detect(self._maps(batch)[0], batch.sizes)

    def _maps(self, batch: DetectionBatch) -> tuple[list[Tensor], EncoderOutput]:
        """Of every picture the map of what is in it, and all that the encoder gave."""
        padding = batch.padding(self.encoder.patch_size)
        features = self.encoder.forward_map(
            batch.images,
            padding=None if padding is None else padding.flatten(1),
            window_size=self.window_size,
            num_global_blocks=self.num_global_blocks,
        )
        columns = batch.images.shape[3] // self.encoder.patch_size
        maps = features.image.unflatten(1, (-1, columns)).permute(0, 3, 1, 2)
        ends = map_sizes(batch.sizes, self.encoder.patch_size)
        return [x[:, :height, :width] for x, (height, width) in zip(maps, ends, strict=True)], features


class Detection(AnnotatedTask):
    """The task; see the module's docstring.

    Args:
        inputs: sizes that the encoder expects.
        val_fraction: share of the pictures of train that validate, while ``val`` is not set.
        augment: of training pictures, see :class:`~..data.scale_jitter.ScaleJitter`.
        window_size, num_global_blocks, detector: see :class:`DetectionModel`.
        others: see :class:`AnnotatedTask`.

    Raises:
        ConfigError: the encoder has no image branch.
    """

    metric = "box/AP"

    def __init__(
        self,
        inputs: InputSpec,
        *,
        val_fraction: float,
        augment: Mapping[str, Any],
        window_size: int | None,
        num_global_blocks: int,
        detector: Mapping[str, Any],
        **others: Any,
    ) -> None:
        super().__init__(inputs, **others)
        self.val_fraction, self.augment, self.detector = val_fraction, augment, detector
        self.kinds = IOU_TYPES if detector["masks"] else {"box": "bbox"}
        self._instances: dict[str, CocoSplit] = {}
        self.attention = {"window_size": window_size, "num_global_blocks": num_global_blocks}
        if "image" not in inputs.modalities:
            raise ConfigError(f"encoder.modalities: {list(inputs.modalities)} (this task needs image)")

    # ------------------------------------------------------------------------------------------ data
    def file(self, split: str) -> Path:
        """The annotations of a split."""
        return self.data_dir / self.files[split]["annotations"]

    def instances(self, split: str) -> CocoSplit:
        """What they say; read once."""
        if split not in self._instances:
            self._instances[split] = read_instances(self.file(split), masks=self.detector["masks"])
        return self._instances[split]

    @cached_property
    def categories(self) -> dict[int, str]:
        """Names by id, in the order of the labels 1, 2, ...: of the training files, or of the run that is evaluated."""
        if self.kept:
            return {entry["id"]: entry["name"] for entry in json.loads(self.kept[CATEGORIES_FILE])}
        return self.instances("train").categories

    def read(self, split: str) -> list[Example]:
        path, found = self.file(split), self.instances(split)
        if split == "train" and found.pictures[0].instances is None:
            raise DataError(f"{path}: annotations: missing (train on a split that has them)")
        if found.categories != self.categories:
            counts = f"{len(found.categories)} categories, {len(self.categories)} in training"
            raise DataError(f"{path}: categories: {counts}, or other names or ids (give the files of one set)")
        return examples_of(found, path, self.folders(split))

    def group(self, example: Example) -> int:
        return example.record.id

    def choose_validation(self) -> set[int]:
        return held_out(map(self.group, self.given), seed=self.seed, fraction=self.val_fraction)

    @cached_property
    def train(self) -> list[Example]:
        """Pictures with something to learn from."""
        found = [example for example in self.remaining if trainable(example.record)[0]]
        if not found:
            raise DataError(f"{self.files['train']['annotations']}: no picture with an object (check the file)")
        return found

    def transform(self, *, train: bool) -> _Examples:
        labels = {number: label for label, number in enumerate(self.categories, 1)}
        jitter = ScaleJitter(self.inputs.img_size, train=train, **self.augment)
        return _Examples(jitter, labels, masks=self.detector["masks"], train=train)

    @property
    def collate(self) -> Callable[[list[dict[str, Any]]], DetectionBatch]:
        return partial(collate, patch_size=self.inputs.patch_size)

    def recorded(self) -> dict[str, str]:
        """The categories, and what of the training objects was clipped or left out, too."""
        counts: Counter[str] = Counter({"pictures": len(self.train)})
        for example in self.remaining:
            kept, odd = trainable(example.record)
            counts.update(odd, objects=len(kept), **{"pictures without objects": not kept})
        texts = {CATEGORIES_FILE: _categories_text(self.categories), OBJECTS_FILE: json.dumps(counts, indent=0) + "\n"}
        return texts | super().recorded()

    # ----------------------------------------------------------------------------------------- model
    def model(self, encoder: Encoder) -> DetectionModel:
        return DetectionModel(encoder, categories=self.categories, detector=self.detector, **self.attention)

    def num_targets(self, batch: DetectionBatch) -> dict[str, int]:
        """Pictures; for masks those with objects."""
        counts = dict.fromkeys(("objectness", "proposals", "classes", "boxes"), len(batch))
        with_objects = sum(len(target["labels"]) > 0 for target in batch.targets)
        return counts | ({"masks": with_objects} if self.detector["masks"] else {})

    def loss(self, output: ModelOutput, batch: DetectionBatch) -> dict[str, Tensor]:
        """torchvision's losses of each picture, summed over pictures; no terms without pictures."""
        return output.values if len(batch) else {}

    # ------------------------------------------------------------------------------------ evaluation
    def predict(self, model: DetectionModel, batch: DetectionBatch) -> list[Record]:
        """Per picture: its detections in COCO's form, and the truth where there is one."""
        numbers = list(self.categories)
        found = zip(batch.records, batch.sizes, model.detect(batch), strict=True)
        return [record | {"detections": _detections(result, size, record, numbers)} for record, size, result in found]

    def scores(self, records: list[Record]) -> dict[str, CocoScores]:
        """What pycocotools finds for ``box`` and ``mask``; nothing for a split without annotations."""
        if not records or any(record["truth"] is None for record in records):
            return {}
        images = [(record["id"], record["width"], record["height"]) for record in records]
        truth = [entry | {"image_id": record["id"]} for record in records for entry in record["truth"]]
        found = [entry | {"image_id": record["id"]} for record in records for entry in record["detections"]]
        return {name: score_coco(images, self.categories, truth, found, kind) for name, kind in self.kinds.items()}

    def score(self, records: list[Record]) -> dict[str, float]:
        """COCO's twelve numbers as ``box/AP`` and so on, and for masks as ``mask/AP`` and so on; without those of sizes
        that no object has."""
        scores = self.scores(records)
        return {f"{kind}/{name}": v for kind, found in scores.items() for name, v in found.values.items() if v >= 0}

    def baselines(self, device: torch.device) -> dict[str, float]:
        """None: nothing can be found without looking."""
        return {}

    def gallery(self, records: list[Record]) -> list[dict[str, Any]]:
        """Pictures with what was found in them beside what is there."""
        return detection_gallery.cards(records, self.categories)

    def curves(self, records: list[Record]) -> list[dict[str, Any]]:
        """Precision over recall at three overlaps, mean over categories."""
        note = f"over recall, mean over categories ({EVALUATOR})"
        return [
            {"title": CURVES[kind], "note": note, "x": "recall", "lines": scores.curves}
            for kind, scores in self.scores(records).items()
            if scores.curves
        ]

    def submission(self, records: list[Record]) -> dict[str, str]:
        """The files that the evaluation server takes: of boxes, and of masks."""
        files = {}
        for kind in self.kinds.values():
            place = "bbox" if kind == "bbox" else "segmentation"
            entries = [
                {"image_id": record["id"]} | {name: entry[name] for name in ("category_id", place, "score")}
                for record in records
                for entry in record["detections"]
            ]
            files[f"detections_{kind}_results.json"] = json.dumps(entries) + "\n"
        return files


@dataclass(frozen=True)
class _Examples:
    """From an annotated picture to an example."""

    jitter: ScaleJitter
    labels: Mapping[int, int]
    masks: bool
    train: bool

    def __call__(self, example: Example, rng: np.random.Generator) -> dict[str, Any]:
        picture: Picture = example.record
        image = example.pixels(decode_image)
        if image.shape[1:] != (picture.height, picture.width):
            what = f"{image.shape[2]} x {image.shape[1]} pixels, {picture.width} x {picture.height} in the annotations"
            raise example.bad("picture size", f"{example.pictures[0]}: {what}")
        objects = trainable(picture)[0] if self.train else []
        boxes = torch.tensor([instance.box for instance in objects], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        masks = None
        if self.masks:
            size = (picture.height, picture.width)
            decoded = [rle.decode(instance.segmentation, *size) for instance in objects]
            masks = torch.from_numpy(np.stack(decoded)) if decoded else torch.zeros(0, *size, dtype=torch.uint8)
        image, boxes, masks, kept = self.jitter(image, boxes, masks, rng)
        labels = torch.tensor([self.labels[instance.category_id] for instance in objects], dtype=torch.int64)[kept]
        target = {"boxes": boxes, "labels": labels} | ({} if masks is None else {"masks": masks})
        return {"image": image, "target": target, "seed": int(rng.integers(2**31)), "record": _record(example)}


def _record(example: Example) -> Record:
    picture: Picture = example.record
    known = {"id": picture.id, "image": str(example.pictures[0]), "width": picture.width, "height": picture.height}
    return known | {"truth": None if picture.instances is None else official(picture)}


def _detections(
    found: Mapping[str, Tensor], size: tuple[int, int], record: Record, numbers: list[int]
) -> list[dict[str, Any]]:
    """What was found in a picture of ``size``, in COCO's form and in the pixels of the picture's file."""
    height, width = record["height"], record["width"]
    factors = torch.tensor([width / size[1], height / size[0]], device=found["boxes"].device).repeat(2)
    boxes = clip_boxes_to_image(found["boxes"].float() * factors, (height, width))
    entries = []
    for i, (label, score) in enumerate(zip(found["labels"].tolist(), found["scores"].tolist(), strict=True)):
        left, top, right, bottom = boxes[i].tolist()
        box = [round(value, 2) for value in (left, top, right - left, bottom - top)]
        entry = {"category_id": numbers[label - 1], "bbox": box, "score": round(score, 6)}
        if "masks" in found:
            pasted = paste_masks_in_image(found["masks"][i : i + 1].float(), boxes[i : i + 1], (height, width))
            entry["segmentation"] = rle.encode((pasted[0, 0] > 0.5).cpu().numpy())
        entries.append(entry)
    return entries


def _categories_text(categories: Mapping[int, str]) -> str:
    return json.dumps([{"id": number, "name": name} for number, name in categories.items()], indent=0) + "\n"
