"""Teachers: the pixel targets by hand, open_clip's patch features by another path through the same tower."""

from __future__ import annotations

import json

import open_clip
import pytest
import torch
import torch.nn.functional as F

from mhmoe_vl.errors import ConfigError
from mhmoe_vl.models.teachers import create_teacher

TEXT = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16}


@pytest.fixture
def models(tmp_path):
    """Names of a tiny ViT and a tiny convolutional model that open_clip builds with random weights."""
    for name, vision in (("mhmoe-test-vit", VIT), ("mhmoe-test-resnet", RESNET)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"embed_dim": 24, "vision_cfg": vision, "text_cfg": TEXT}))
    open_clip.add_model_config(tmp_path)
    return "mhmoe-test-vit", "mhmoe-test-resnet"


def clip_teacher(model, **changes):
    options = {"img_size": 48, "patch_size": 8, "kind": "open_clip", "model": model, "pretrained": None}
    return create_teacher(**options | changes)


def test_pixel_targets_are_the_patches_in_minus_one_to_one():
    images = torch.rand(2, 3, 8, 8)
    teacher = create_teacher(8, patch_size=4, kind="pixels")
    targets = teacher(images)
    assert teacher.target_dim == 48 and targets.shape == (2, 4, 48)
    for patch, (y, x) in enumerate([(0, 0), (0, 4), (4, 0), (4, 4)]):
        torch.testing.assert_close(targets[:, patch].view(2, 3, 4, 4), images[:, :, y : y + 4, x : x + 4] * 2 - 1)


def test_pixel_error_is_the_mean_square():
    teacher = create_teacher(4, patch_size=2, kind="pixels")
    error = teacher.error(torch.tensor([[[1.0, 0.0], [0.0, 0.0]]]), torch.tensor([[[0.0, 0.0], [3.0, 4.0]]]))
    torch.testing.assert_close(error, torch.tensor([[0.5, 12.5]]))


def test_open_clip_targets_are_the_projected_patch_features(models):
    teacher = clip_teacher(models[0])
    tower, images = teacher.tower, torch.rand(2, 3, 48, 48)
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(3, 1, 1)
    std = torch.tensor(open_clip.OPENAI_DATASET_STD).view(3, 1, 1)
    last = tower.forward_intermediates(
        (images - mean) / std, indices=1, normalize_intermediates=True, intermediates_only=True, output_fmt="NLC"
    )["image_intermediates"][0]
    expected = F.normalize(last @ tower.proj, dim=-1)
    torch.testing.assert_close(teacher(images), expected)
    assert expected.shape == (2, 36, 24) and teacher.target_dim == 24
    assert not teacher(images).requires_grad and not any(p.requires_grad for p in teacher.parameters())


def test_open_clip_error_is_one_minus_cosine(models):
    reconstruction, targets = torch.tensor([[[3.0, 0.0], [0.0, -2.0]]]), torch.tensor([[[0.6, 0.8], [0.0, 1.0]]])
    error = clip_teacher(models[0]).error(reconstruction, targets)
    torch.testing.assert_close(error, torch.tensor([[0.4, 2.0]]))


def test_a_random_teacher_is_always_the_same_and_draws_nothing(models):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second = clip_teacher(models[0]), clip_teacher(models[0])
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_local_checkpoint_is_loaded(models, tmp_path):
    model = open_clip.create_model(models[0], force_image_size=48)
    torch.save(model.state_dict(), tmp_path / "clip.pt")
    teacher = clip_teacher(models[0], pretrained=str(tmp_path / "clip.pt"))
    assert torch.equal(teacher.tower.proj, model.visual.proj)


def test_teachers_that_do_not_fit_are_refused_in_one_line(models, tmp_path):
    vit, resnet = models
    for changes, expected in (
        ({"patch_size": 16}, "set task.model.patch_size to 8"),
        ({"model": resnet}, "no plain ViT tower"),
        ({"model": "no-such-model"}, "'no-such-model'"),
        ({"pretrained": str(tmp_path / "absent.pt")}, "absent.pt"),
    ):
        with pytest.raises(ConfigError) as error:
            clip_teacher(**{"model": vit} | changes)
        assert expected in str(error.value) and "\n" not in str(error.value)


def test_weights_of_another_activation_are_refused(models, tmp_path, monkeypatch):
    tags = {"quick": {"url": "absent", "quick_gelu": True}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, models[0], tags)
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: str(tmp_path / "absent.pt"))
    with pytest.raises(ConfigError, match="QuickGELU mismatch"):
        clip_teacher(models[0], pretrained="quick")
