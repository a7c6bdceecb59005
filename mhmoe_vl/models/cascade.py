"""Cascade R-CNN's box heads on torchvision's: each stage starts from the boxes of the one before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference, maskrcnn_loss
from torchvision.ops import clip_boxes_to_image

OVERLAPS = (0.5, 0.6, 0.7)
"""Overlap (IoU) from which a box counts as an object, by stage."""
WEIGHTS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))
"""Factors of the regression targets, by stage."""


class StagePredictor(nn.Module):
    """Class logits, and one box for all classes.

    Args:
        in_dim: width of the features.
        num_classes: outputs, the background included.
    """

    def __init__(self, in_dim: int, num_classes: int) -> None:
        super().__init__()
        self.cls_score = nn.Linear(in_dim, num_classes)
        self.bbox_pred = nn.Linear(in_dim, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``(n, num_classes)`` and ``(n, 4)``."""
        return self.cls_score(x), self.bbox_pred(x)


class CascadeRoIHeads(RoIHeads):
    """Three box heads in a row (Cai and Vasconcelos 2018), and torchvision's mask head.

    Proposals are sampled once; later stages learn on the boxes that the stage before made of them, matched anew with a
    higher overlap. Gradients into the features are divided by the number of stages. Scores are the mean of the
    stages', boxes the last one's. Masks are learnt on the first proposals and predicted for the last boxes.

    Args:
        box_roi_pool: reads features of boxes, all levels together.
        make_head: builds a stage's head.
        head_dim: its width.
        num_classes: the background included.
        others: torchvision's arguments of sampling, inference and masks.
    """

    def __init__(
        self,
        box_roi_pool: nn.Module,
        make_head: Callable[[], nn.Module],
        head_dim: int,
        num_classes: int,
        **others: Any,
    ) -> None:
        overlaps = {"fg_iou_thresh": OVERLAPS[0], "bg_iou_thresh": OVERLAPS[0], "bbox_reg_weights": WEIGHTS[-1]}
        super().__init__(box_roi_pool, None, None, **overlaps, **others)
        self.box_heads = nn.ModuleList(make_head() for _ in OVERLAPS)
        self.box_predictors = nn.ModuleList(StagePredictor(head_dim, num_classes) for _ in OVERLAPS)
        self.matchers = [Matcher(overlap, overlap, allow_low_quality_matches=False) for overlap in OVERLAPS]
        self.coders = [BoxCoder(weights) for weights in WEIGHTS]

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Detections and losses as torchvision's heads give them."""
        if self.training:
            proposals, matched, labels, _ = self.select_training_samples(proposals, targets)
            losses = self._box_losses(features, proposals, image_shapes, targets)
            if self.has_mask():
                losses["loss_mask"] = self._mask_loss(features, proposals, image_shapes, targets, matched, labels)
            return [], losses
        found = self._detections(features, proposals, image_shapes)
        if self.has_mask():
            logits = self._mask_logits(features, [result["boxes"] for result in found], image_shapes)
            for result, masks in zip(found, maskrcnn_inference(logits, [r["labels"] for r in found]), strict=True):
                result["masks"] = masks
        return found, {}

    def _stage(
        self, stage: int, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        pooled = self.box_roi_pool(features, boxes, image_shapes)
        if pooled.requires_grad:
            pooled.register_hook(lambda gradient: gradient / len(OVERLAPS))
        return self.box_predictors[stage](self.box_heads[stage](pooled))

    def _refined(self, stage: int, deltas: Tensor, boxes: list[Tensor], shapes: list[tuple[int, int]]) -> list[Tensor]:
        decoded = self.coders[stage].decode(deltas.detach(), boxes)[:, 0].split([len(part) for part in boxes])
        return [clip_boxes_to_image(part, shape) for part, shape in zip(decoded, shapes, strict=True)]

    # -------------------------------------------------------------------------------------- training
    def _box_losses(
        self,
        features: dict[str, Tensor],
        boxes: list[Tensor],
        shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        """Cross-entropy and smooth L1 of each stage, summed over stages."""
        classes, places = [], []
        for stage, matcher in enumerate(self.matchers):
            self.proposal_matcher = matcher
            goals = [target["boxes"].to(boxes[0].dtype) for target in targets]
            matched, labels = self.assign_targets_to_proposals(boxes, goals, [t["labels"] for t in targets])
            logits, deltas = self._stage(stage, features, boxes, shapes)
            labels = torch.cat(labels)
            matches = [g[m] if len(g) else part for g, m, part in zip(goals, matched, boxes, strict=True)]
            wanted = torch.cat(self.coders[stage].encode(matches, boxes))
            objects = torch.where(labels > 0)[0]
            classes.append(F.cross_entropy(logits, labels))
            loss = F.smooth_l1_loss(deltas[objects], wanted[objects], beta=1 / 9, reduction="sum")
            places.append(loss / labels.numel())
            boxes = self._refined(stage, deltas, boxes, shapes)
        self.proposal_matcher = self.matchers[0]
        return {"loss_classifier": torch.stack(classes).sum(), "loss_box_reg": torch.stack(places).sum()}

    def _mask_loss(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]],
        matched: list[Tensor],
        labels: list[Tensor],
    ) -> Tensor:
        objects = [torch.where(part > 0)[0] for part in labels]
        boxes = [part[chosen] for part, chosen in zip(proposals, objects, strict=True)]
        matched = [part[chosen] for part, chosen in zip(matched, objects, strict=True)]
        logits = self._mask_logits(features, boxes, shapes)
        return maskrcnn_loss(logits, boxes, [t["masks"] for t in targets], [t["labels"] for t in targets], matched)

    def _mask_logits(self, features: dict[str, Tensor], boxes: list[Tensor], shapes: list[tuple[int, int]]) -> Tensor:
        return self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes, shapes)))

    # ------------------------------------------------------------------------------------- inference
    def _detections(
        self, features: dict[str, Tensor], boxes: list[Tensor], shapes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        logits, deltas = self._stage(0, features, boxes, shapes)
        scores = [logits.to(boxes[0].dtype).softmax(dim=-1)]
        for stage in range(1, len(OVERLAPS)):
            boxes = self._refined(stage - 1, deltas, boxes, shapes)
            logits, deltas = self._stage(stage, features, boxes, shapes)
            scores.append(logits.to(boxes[0].dtype).softmax(dim=-1))
        # Logarithms of mean scores: torchvision's own steps take their softmax, which gives the means back.
        logits = torch.stack(scores).mean(dim=0).log()
        every_class = deltas.repeat(1, logits.shape[1])
        found = self.postprocess_detections(logits, every_class, boxes, shapes)
        return [dict(zip(("boxes", "scores", "labels"), parts, strict=True)) for parts in zip(*found, strict=True)]
