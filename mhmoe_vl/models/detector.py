"""ViTDet's way from a plain map of features to boxes and masks (Li et al. 2022), on torchvision's R-CNN parts.

Pictures of a batch may differ in size. Each one's map is cut out of the padded batch before anything here convolves
over it, so a picture has the same detections in any batch, and its losses are those that torchvision computes for it
alone.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import LevelMapper

from ..errors import ConfigError
from .cascade import CascadeRoIHeads

STRIDES = (4, 8, 16, 32)
"""Pixels from cell to cell of the pyramid's levels."""
COARSEST = 64
"""Stride of one more level, a thinned out copy of the last, which only proposals are made on."""
ASPECT_RATIOS = (0.5, 1.0, 2.0)
BOX_POOL, MASK_POOL, SAMPLING_RATIO = 7, 14, 2
LOSSES = {
    "loss_objectness": "objectness",
    "loss_rpn_box_reg": "proposals",
    "loss_classifier": "classes",
    "loss_box_reg": "boxes",
    "loss_mask": "masks",
}
"""torchvision's names of the losses, and ours."""

Target = Mapping[str, Tensor]
"""``boxes (n, 4)`` as x1, y1, x2, y2 in pixels, ``labels (n,)`` from 1, perhaps ``masks (n, h, w)`` of 0 and 1."""


class FeaturePyramid(nn.ModuleList):
    """ViTDet's simple feature pyramid: maps of strides 4, 8, 16 and 32, each made from the one map that comes in.

    Finer maps by 2 x 2 deconvolutions (LayerNorm and GELU between two), coarser ones by max-pooling, then 1 x 1 and
    3 x 3 convolutions, each with a LayerNorm.

    Args:
        in_dim: width of the map.
        dim: width of the levels.
        patch_size: pixels from cell to cell of the map.

    Raises:
        ConfigError: the patch size is not 4, 8, 16 or 32, so that levels would not fall on each other.
    """

    def __init__(self, in_dim: int, *, dim: int, patch_size: int) -> None:
        if patch_size not in STRIDES:
            raise ConfigError(f"encoder.patch_size: {patch_size} gives no pyramid (choose 4, 8, 16 or 32)")
        super().__init__(_level(in_dim, dim, int(math.log2(patch_size // STRIDES[0])) - i) for i in range(len(STRIDES)))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Levels ``(1, dim, h, w)`` of ``(1, in_dim, h, w)`` by name, finest first; the last is for proposals alone."""
        levels = {str(number): level(x).to(x.dtype) for number, level in enumerate(self)}
        return levels | {"pool": levels[str(len(self) - 1)][:, :, ::2, ::2]}


def _level(in_dim: int, dim: int, doublings: int) -> nn.Sequential:
    """A level ``2 ** doublings`` times as fine as the map."""
    layers: list[nn.Module] = []
    for number in range(doublings):
        layers += [LayerNorm2d(in_dim), nn.GELU()] if number else []
        layers.append(nn.ConvTranspose2d(in_dim, in_dim // 2, 2, 2))
        in_dim //= 2
    if doublings < 0:
        layers.append(nn.MaxPool2d(2**-doublings, ceil_mode=True))
    layers += [nn.Conv2d(in_dim, dim, 1, bias=False), LayerNorm2d(dim)]
    return nn.Sequential(*layers, nn.Conv2d(dim, dim, 3, padding=1, bias=False), LayerNorm2d(dim))


class ExactAnchors(AnchorGenerator):
    """torchvision's anchors at the pyramid's own strides, which it would else guess from sizes that need not divide."""

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """The anchors of every image, all levels in a row."""
        device = feature_maps[0].device
        self.set_cell_anchors(torch.float32, device)
        strides = [[torch.tensor(stride, device=device)] * 2 for stride in (*STRIDES, COARSEST)]
        anchors = torch.cat(self.grid_anchors([level.shape[-2:] for level in feature_maps], strides))
        return [anchors] * len(image_list.image_sizes)


class Detector(nn.Module):
    """Boxes and masks from maps of features: pyramid, region proposals, box and mask heads.

    Faster R-CNN (Ren et al. 2015), with ``masks`` Mask R-CNN (He et al. 2017), with ``cascade`` their cascades (Cai and
    Vasconcelos 2018). The defaults of the configuration are ViTDet's: two hidden convolutions for proposals, four in
    the box head before one linear layer, four in the mask head, LayerNorm in all of them.

    Args:
        in_dim: width of the maps.
        num_classes: kinds of objects, the background not counted.
        patch_size: pixels from cell to cell of the maps.
        dim: width of pyramid and heads.
        masks: predict masks too.
        cascade: refine boxes in three stages.
        anchor_scale: side of a square anchor, in strides of its level; also moves which level a box is read from.
        proposal_convs, box_convs, mask_convs: hidden 3 x 3 convolutions of each head.
        box_fc_dim: width of the box head's linear layer.
        num_proposals: most proposals per picture.
        proposal_samples, roi_samples: anchors and proposals per picture that losses are computed on.
        score_threshold: lowest score of a detection.
        nms_threshold: overlap (IoU) from which the lower of two detections of a class is left out.
        max_detections: most detections per picture.
    """

    def __init__(
        self,
        in_dim: int,
        *,
        num_classes: int,
        patch_size: int,
        dim: int,
        masks: bool,
        cascade: bool,
        anchor_scale: int,
        proposal_convs: int,
        box_convs: int,
        box_fc_dim: int,
        mask_convs: int,
        num_proposals: int,
        proposal_samples: int,
        roi_samples: int,
        score_threshold: float,
        nms_threshold: float,
        max_detections: int,
    ) -> None:
        super().__init__()
        self.pyramid = FeaturePyramid(in_dim, dim=dim, patch_size=patch_size)
        sizes = [(anchor_scale * stride,) for stride in (*STRIDES, COARSEST)]
        self.rpn = RegionProposalNetwork(
            ExactAnchors(sizes, (ASPECT_RATIOS,) * len(sizes)),
            RPNHead(dim, len(ASPECT_RATIOS), conv_depth=proposal_convs),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=proposal_samples,
            positive_fraction=0.5,
            pre_nms_top_n={"training": 2 * num_proposals, "testing": num_proposals},
            post_nms_top_n={"training": num_proposals, "testing": num_proposals},
            nms_thresh=0.7,
        )
        head = partial(
            FastRCNNConvFCHead, (dim, BOX_POOL, BOX_POOL), [dim] * box_convs, [box_fc_dim], norm_layer=LayerNorm2d
        )
        pool = partial(_roi_pool, canonical_scale=28 * anchor_scale)
        options = {
            "batch_size_per_image": roi_samples,
            "positive_fraction": 0.25,
            "score_thresh": score_threshold,
            "nms_thresh": nms_threshold,
            "detections_per_img": max_detections,
        }
        if masks:
            options["mask_roi_pool"] = pool(MASK_POOL)
            options["mask_head"] = MaskRCNNHeads(dim, [dim] * mask_convs, 1, norm_layer=LayerNorm2d)
            options["mask_predictor"] = MaskRCNNPredictor(dim, dim, 1 + num_classes)
        if cascade:
            self.roi_heads = CascadeRoIHeads(pool(BOX_POOL), head, box_fc_dim, 1 + num_classes, **options)
        else:
            predictor = FastRCNNPredictor(box_fc_dim, 1 + num_classes)
            options |= {"fg_iou_thresh": 0.5, "bg_iou_thresh": 0.5, "bbox_reg_weights": None}
            self.roi_heads = RoIHeads(pool(BOX_POOL), head(), predictor, **options)

    def losses(
        self, maps: Sequence[Tensor], sizes: Sequence[tuple[int, int]], targets: Sequence[Target], seeds: Sequence[int]
    ) -> dict[str, Tensor]:
        """torchvision's losses of every picture, each a mean over what was sampled in it, summed over pictures.

        Args:
            maps: ``(in_dim, rows, columns)`` of each picture, one at least.
            sizes: height and width of each in pixels.
            targets: what there is to find.
            seeds: what to sample in each picture depends on its seed alone.
        """
        found = []
        for number, (x, size) in enumerate(zip(maps, sizes, strict=True)):
            with _seeded(seeds[number], x.device):
                found.append(self._run(x, size, [dict(targets[number])])[1])
        return {ours: torch.stack([f[name] for f in found]).sum() for name, ours in LOSSES.items() if name in found[0]}

    def detect(self, maps: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> list[dict[str, Tensor]]:
        """Of each picture ``boxes (n, 4)`` as x1, y1, x2, y2, ``labels`` from 1, ``scores``, perhaps ``masks`` of shape
        ``(n, 1, 28, 28)``, the best first; arguments as for :meth:`losses`."""
        return [self._run(x, size, None)[0][0] for x, size in zip(maps, sizes, strict=True)]

    def _run(self, x: Tensor, size: tuple[int, int], targets: list[dict[str, Tensor]] | None) -> tuple[Any, Any]:
        """torchvision's detections and losses of one picture."""
        levels = self.pyramid(x[None])
        proposals, first = self.rpn(ImageList(x[None], [size]), levels, targets)
        detections, second = self.roi_heads(levels, proposals, [size], targets)
        return detections, first | second


def _roi_pool(output_size: int, *, canonical_scale: int) -> MultiScaleRoIAlign:
    """RoIAlign that knows the strides of the levels, which torchvision guesses from the first picture it sees."""
    names = [str(number) for number in range(len(STRIDES))]
    pool = MultiScaleRoIAlign(names, output_size, SAMPLING_RATIO)
    exponents = [int(math.log2(stride)) for stride in STRIDES]
    pool.scales = [1 / stride for stride in STRIDES]
    pool.map_levels = LevelMapper(exponents[0], exponents[-1], canonical_scale)
    return pool


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, torch's generators start from ``seed``; afterwards they are as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
