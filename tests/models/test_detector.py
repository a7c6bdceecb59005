"""The detector: its pyramid, torchvision's own models on the same weights, and pictures alone and in padded batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator

from mhmoe_vl import config
from mhmoe_vl.errors import ConfigError
from mhmoe_vl.models.cascade import CascadeRoIHeads
from mhmoe_vl.models.detector import Detector, ExactAnchors, FeaturePyramid
from mhmoe_vl.models.encoder import Encoder
from mhmoe_vl.models.factory import build_encoder
from mhmoe_vl.tasks.detection import DetectionModel
from mhmoe_vl.tasks.detection_batch import collate

SLIM = {
    "dim": 16, "masks": True, "cascade": False, "anchor_scale": 4, "proposal_convs": 1, "box_convs": 1,
    "box_fc_dim": 32, "mask_convs": 1, "num_proposals": 50, "proposal_samples": 64, "roi_samples": 32,
    "score_threshold": 0.0, "nms_threshold": 0.5, "max_detections": 20,
}  # fmt: skip
FFNS = {
    "dense": {"kind": "dense"},
    "smoe": {"kind": "moe", "num_experts": 4, "hidden_dim": 32},
    "xmoe": {"kind": "moe", "num_experts": 4, "hidden_dim": 32, "router": {"kind": "cosine"}},
    "mh_moe": {"kind": "mh_moe", "num_experts": 4, "hidden_dim": 16, "num_subtokens": 4},
}


def encoder(ffn: str = "mh_moe", **options) -> Encoder:
    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 96, "patch_size": 16}
    values = {**sizes, "modalities": ["image"], "ffn": FFNS[ffn], **options}
    return build_encoder(config.validate(config.EncoderConfig, values))


def detector(**options) -> Detector:
    torch.manual_seed(0)
    return Detector(32, num_classes=3, patch_size=16, **SLIM | options)


def model(ffn: str = "mh_moe", window_size: int | None = 2, **options) -> DetectionModel:
    torch.manual_seed(0)
    kinds = {5: "a", 9: "b", 40: "c"}
    attention = {"window_size": window_size, "num_global_blocks": 1}
    return DetectionModel(encoder(ffn), categories=kinds, detector=SLIM | options, **attention)


def example(height: int, width: int, seed: int) -> dict:
    """A picture of noise with two objects, the second in its lower right corner."""
    torch.manual_seed(seed)
    boxes = torch.tensor([[2.0, 3, 20, 24], [width - 18, height - 12, width, height]])
    masks = torch.zeros(2, height, width, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    target = {"boxes": boxes, "labels": torch.tensor([1, 3]), "masks": masks}
    return {"image": image, "target": target, "seed": seed, "record": {"id": seed}}


def batch(*examples, dtype: torch.dtype = torch.float32):
    prepared = collate(list(examples), patch_size=16).prepared(torch.device("cpu"))
    return replace(prepared, images=prepared.images.to(dtype))


# ---------------------------------------------------------------------------------------------- parts
@pytest.mark.parametrize(("patch_size", "cells"), [(4, (20, 13)), (8, (10, 7)), (16, (5, 4)), (32, (3, 2))])
def test_levels_have_strides_4_to_32(patch_size, cells):
    torch.manual_seed(0)
    levels = FeaturePyramid(32, dim=8, patch_size=patch_size)(torch.randn(1, 32, *cells))
    fine = [side * patch_size // 4 for side in cells]
    wanted = [(1, 8, *(-(-side // 2**i) for side in fine)) for i in range(5)]
    assert [tuple(level.shape) for level in levels.values()] == wanted
    assert list(levels) == ["0", "1", "2", "3", "pool"]


def test_a_pyramid_needs_strides_that_fall_on_each_other():
    with pytest.raises(ConfigError, match="patch_size: 14"):
        FeaturePyramid(32, dim=8, patch_size=14)


def test_anchors_stand_at_exact_strides_where_sizes_do_not_divide():
    maps = [torch.zeros(1, 1, side, side) for side in (20, 10, 5, 3, 2)]  # of a picture of 80 px
    sizes = [(4 * stride,) for stride in (4, 8, 16, 32, 64)]
    image = type("Images", (), {"image_sizes": [(80, 80)]})
    [anchors] = ExactAnchors(sizes, ((1.0,),) * 5)(image, maps)
    last = anchors[-4:]
    assert ((last[:, :2] + last[:, 2:]) / 2).tolist() == [[0, 0], [64, 0], [0, 64], [64, 64]]
    assert (last[0, 2] - last[0, 0]).item() == 256


class Backbone(nn.Module):
    """The pyramid as torchvision's models expect a backbone."""

    def __init__(self, pyramid: FeaturePyramid) -> None:
        super().__init__()
        self.pyramid, self.out_channels = pyramid, SLIM["dim"]

    def forward(self, x):
        return self.pyramid(nn.functional.avg_pool2d(x, 16).repeat(1, 11, 1, 1)[:, :32])


def test_torchvisions_own_model_gives_the_same_losses_and_detections():
    """Of 128 px all strides divide, so what torchvision guesses of anchors and levels is right."""
    ours = detector(anchor_scale=8)
    sizes = tuple((8 * stride,) for stride in (4, 8, 16, 32, 64))
    theirs = MaskRCNN(
        Backbone(ours.pyramid),
        rpn_anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5),
        rpn_head=ours.rpn.head,
        box_head=ours.roi_heads.box_head,
        box_predictor=ours.roi_heads.box_predictor,
        mask_head=ours.roi_heads.mask_head,
        mask_predictor=ours.roi_heads.mask_predictor,
        min_size=128, max_size=128, image_mean=[0] * 3, image_std=[1] * 3, size_divisible=128,
        rpn_pre_nms_top_n_train=100, rpn_pre_nms_top_n_test=50, rpn_post_nms_top_n_train=50,
        rpn_post_nms_top_n_test=50, rpn_batch_size_per_image=64, box_batch_size_per_image=32, box_score_thresh=0.0,
        box_detections_per_img=20,
    )  # fmt: skip
    theirs.transform.torch_choice = lambda sizes: sizes[0]  # by lot, which would take a draw before ours
    found = example(128, 128, 3)
    image = found["image"] / 255
    x = Backbone.forward(theirs.backbone, image[None])
    maps = [nn.functional.avg_pool2d(image[None], 16).repeat(1, 11, 1, 1)[0, :32]]
    assert all(torch.equal(a, b) for a, b in zip(x.values(), ours.pyramid(maps[0][None]).values(), strict=True))
    mine = ours.losses(maps, [(128, 128)], [found["target"]], [7])
    torch.manual_seed(7)
    other = theirs([image], [found["target"]])
    names = {"loss_objectness": "objectness", "loss_rpn_box_reg": "proposals", "loss_classifier": "classes"}
    for name, value in other.items():
        assert mine[names.get(name, {"loss_box_reg": "boxes", "loss_mask": "masks"}.get(name))].item() == value.item()
    with torch.no_grad():
        [mine], [other] = ours.eval().detect(maps, [(128, 128)]), theirs.eval()([image])
    assert len(mine["boxes"]) == 20
    assert all(torch.equal(mine[name], other[name]) for name in ("boxes", "labels", "scores"))


# ----------------------------------------------------------------------------------------- padding
@pytest.mark.parametrize("ffn", FFNS)
@pytest.mark.parametrize("cascade", [False, True])
def test_a_picture_in_a_padded_batch_is_found_as_it_is_alone(ffn, cascade):
    examples = [example(37, 90, 1), example(96, 41, 2), example(96, 96, 3), example(16, 16, 4)]
    net = model(ffn, cascade=cascade).double().eval()
    with torch.no_grad():
        together = net.detect(batch(*examples, dtype=torch.float64))
        for whole, single in zip(together, examples, strict=True):
            [alone] = net.detect(batch(single, dtype=torch.float64))
            assert len(alone["boxes"]) > 5
            for name, value in alone.items():
                assert torch.allclose(whole[name].float(), value.float(), atol=1e-4), name


def test_the_losses_of_a_padded_batch_are_the_sum_of_those_alone():
    examples = [example(37, 90, 1), example(96, 41, 2), example(64, 64, 3)]
    net = model("dense").train()
    together = net(batch(*examples)).values
    alone = [net(batch(single)).values for single in examples]
    assert set(together) == {"objectness", "proposals", "classes", "boxes", "masks"}
    for name, value in together.items():
        assert value.item() == pytest.approx(sum(part[name].item() for part in alone), rel=1e-4)


def test_padding_is_neither_routed_nor_seen():
    net = encoder(depth=4)
    images = torch.randn(1, 3, 96, 96)
    padding = torch.zeros(1, 6, 6, dtype=torch.bool)
    padding[:, 4:], padding[:, :, 3:] = True, True
    with torch.no_grad():
        for window_size in (None, 1, 2, 4, 7):
            options = {"window_size": window_size, "num_global_blocks": 2}
            alone = net.forward_map(images[:, :, :64, :48], **options)
            padded = net.forward_map(images, padding=padding.flatten(1), **options)
            ours = padded.image.unflatten(1, (6, 6))[:, :4, :3].flatten(1, 2)
            assert torch.allclose(ours, alone.image, atol=1e-5)
            assert torch.allclose(padded.aux_losses["balance_loss"], alone.aux_losses["balance_loss"], atol=1e-5)


def test_only_global_blocks_see_beyond_their_window():
    net = encoder("dense", depth=4)
    images = torch.randn(1, 3, 64, 64)
    changed = images.clone()
    changed[:, :, 48:, 48:] += 1  # the last patch
    with torch.no_grad():
        for blocks, reaches in ((0, False), (1, True)):
            options = {"window_size": 2, "num_global_blocks": blocks}
            first, second = (net.forward_map(x, **options).image[0, 0] for x in (images, changed))
            assert torch.equal(first, second) != reaches


def test_positions_are_taken_from_the_upper_left_corner():
    net = encoder("dense")
    tokens = net.image_embed.patches(torch.zeros(1, 3, 32, 48)) - net.image_embed.proj.bias
    wanted = net.image_embed.pos_embed[0, 1:].reshape(6, 6, 32)[:2, :3].flatten(0, 1)
    assert torch.allclose(tokens[0], wanted, atol=1e-6)
    with pytest.raises(ConfigError, match="img_size: 96 x 96 pixels, got images of"):
        net.forward_map(torch.zeros(1, 3, 112, 96))


def test_experts_that_convolve_over_tokens_are_refused(monkeypatch):
    monkeypatch.setitem(FFNS, "conv", FFNS["mh_moe"] | {"conv_kernel": 3})
    with pytest.raises(ConfigError, match="conv_kernel"):
        encoder("conv").forward_map(torch.zeros(1, 3, 32, 32))


# ---------------------------------------------------------------------------------------- edge cases
def test_a_batch_without_pictures_or_objects_has_finite_losses_and_gradients():
    nothing = example(48, 48, 1)
    nothing["target"] = {name: value[:0] for name, value in nothing["target"].items()}
    for cascade in (False, True):
        net = model(cascade=cascade).train()
        values = net(batch(nothing)).values
        assert values["masks"].item() == values["boxes"].item() == 0
        assert all(torch.isfinite(value) for value in values.values())
        sum(values.values()).backward()
        empty = net(batch())
        assert [value.item() for value in empty.values.values()] == [0]
        assert empty.values["nothing"].requires_grad
        with torch.no_grad():
            assert net.eval().detect(batch()) == []


def test_boxes_alone_need_no_masks():
    net = model(masks=False).train()
    found = example(48, 48, 1)
    del found["target"]["masks"]
    assert set(net(batch(found)).values) == {"objectness", "proposals", "classes", "boxes"}
    with torch.no_grad():
        assert set(net.eval().detect(batch(found))[0]) == {"boxes", "labels", "scores"}


# ------------------------------------------------------------------------------------------- cascade
def test_stages_refine_boxes_and_their_scores_are_averaged():
    """Heads that say constants: each stage moves boxes right by 0.1 of their width, scores differ by stage."""
    heads = detector(cascade=True, masks=False).eval().roi_heads
    assert isinstance(heads, CascadeRoIHeads)
    for stage, predictor in enumerate(heads.box_predictors):
        for parameter in predictor.parameters():
            nn.init.zeros_(parameter)
        predictor.bbox_pred.bias.data[0] = 0.1 * heads.coders[stage].weights[0]
        predictor.cls_score.bias.data[:] = torch.tensor([0.0, float(stage), 0.0, -50.0])
    levels = {str(i): torch.zeros(1, 16, 24 // 2**i, 24 // 2**i) for i in range(4)}
    with torch.no_grad():
        [found], _ = heads(levels, [torch.tensor([[10.0, 20, 30, 60]])], [(96, 96)])
    wanted = torch.stack([torch.tensor([0.0, s, 0, -50]).softmax(0) for s in (0.0, 1.0, 2.0)]).mean(0)
    assert torch.allclose(found["boxes"][:2], torch.tensor([[16.0, 20, 36, 60]] * 2), atol=1e-4)
    assert found["labels"][:2].tolist() == [1, 2]
    assert torch.allclose(found["scores"][:2], wanted[1:3], atol=1e-6)


def test_later_stages_ask_for_more_overlap():
    """A box of overlap 0.55: an object to the first stage alone, whose loss is then not that of the background."""
    heads = detector(cascade=True, masks=False).train().roi_heads
    for predictor in heads.box_predictors:
        for parameter in predictor.parameters():
            nn.init.zeros_(parameter)
    seen = []
    original = heads.assign_targets_to_proposals
    heads.assign_targets_to_proposals = lambda *arguments: seen.append(original(*arguments)) or seen[-1]
    levels = {str(i): torch.zeros(1, 16, 24 // 2**i, 24 // 2**i) for i in range(4)}
    target = {"boxes": torch.tensor([[0.0, 0, 40, 40]]), "labels": torch.tensor([2])}
    proposals = [torch.tensor([[0.0, 0, 40, 22]])]
    _, losses = heads(levels, proposals, [(96, 96)], [target])
    labels = [[sorted(part.tolist()) for part in found[1]] for found in seen]
    assert labels == [[[2, 2]], [[2, 2]], [[0, 2]], [[0, 2]]]  # sampling, then the stages; the truth is added
    assert losses["loss_classifier"].item() == pytest.approx(3 * torch.log(torch.tensor(4.0)).item())


def test_features_get_the_mean_of_the_stages_gradients():
    heads = detector(cascade=True, masks=False).train().roi_heads
    pooled = torch.ones(2, 16, 7, 7)
    gradients = []
    for divide in (True, False):
        x = pooled.clone().requires_grad_()
        heads.box_roi_pool.forward = lambda *_, x=x: x * 1.0
        logits, _ = heads._stage(0, {}, [], []) if divide else heads.box_predictors[0](heads.box_heads[0](x * 1.0))
        logits.sum().backward()
        gradients.append(x.grad)
    assert torch.allclose(3 * gradients[0], gradients[1], atol=1e-6)
