from __future__ import annotations

import pytest
import timm.optim
import torch
import torch.nn.functional as F
from torch import nn

from mhmoe_vl.models.classifier import ImageClassifier
from mhmoe_vl.models.factory import create_model


@pytest.fixture
def classifier():
    torch.manual_seed(0)
    return create_model("mhmoe_tiny_patch16_224", num_classes=5, img_size=(32, 48), depth=2).eval()


def test_logits_read_the_mean_of_the_patch_tokens(classifier):
    images = torch.randn(2, 3, 32, 48)
    tokens = classifier.forward_features(images)
    assert tokens.shape == (2, 1 + 6, 192)
    pooled = F.layer_norm(tokens[:, 1:].mean(1), (192,))
    torch.testing.assert_close(classifier.forward_head(tokens, pre_logits=True), pooled)
    torch.testing.assert_close(classifier(images), classifier.get_classifier()(pooled))


def test_has_one_branch_and_no_final_norm(classifier):
    assert isinstance(classifier, ImageClassifier)
    assert classifier.encoder.modalities == ("image",) and isinstance(classifier.encoder.norm, nn.Identity)


def test_reset_classifier(classifier):
    images = torch.randn(1, 3, 32, 48)
    classifier.reset_classifier(7)
    assert classifier(images).shape == (1, 7) and classifier.num_classes == 7
    classifier.reset_classifier(0)
    assert classifier(images).shape == (1, classifier.num_features)


def test_timm_reads_the_input_it_expects(classifier):
    data = timm.data.resolve_data_config(model=classifier)
    assert data["input_size"] == (3, 32, 48) and data["mean"] == (0.5, 0.5, 0.5) and data["crop_pct"] == 1.0


def test_timm_optimizer_covers_every_parameter_with_layer_decay(classifier):
    groups = timm.optim.param_groups_layer_decay(classifier, 0.05, classifier.no_weight_decay(), layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert set(scale) == {id(p) for p in classifier.parameters()}
    blocks = [{scale[id(p)] for p in block.parameters()} for block in classifier.encoder.blocks]
    assert blocks == [{0.25}, {0.5}]
    assert scale[id(classifier.encoder.image_embed.proj.weight)] == 0.125
    assert scale[id(classifier.head.weight)] == 1
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert id(classifier.encoder.image_embed.pos_embed) not in decayed and id(classifier.head.weight) in decayed


def test_intermediates_and_checkpointing_reach_the_encoder(classifier):
    images = torch.randn(1, 3, 32, 48)
    [last] = classifier.forward_intermediates(images, 1, intermediates_only=True)
    assert last.shape == (1, 192, 2, 3)
    classifier.set_grad_checkpointing()
    assert classifier.encoder.grad_checkpointing
