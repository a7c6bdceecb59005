from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import checkpoint_filter_fn

from mhmoe_vl.config import EncoderConfig
from mhmoe_vl.errors import CheckpointError
from mhmoe_vl.models.convert import from_published, to_published
from mhmoe_vl.models.factory import build_encoder, create_model, load_encoder_weights


def prefixed(encoder):
    return {f"encoder.{name}": value for name, value in encoder.state_dict().items()}


def published_size(weights):
    return sum(value.numel() for value in weights.values())


# ------------------------------------------------------------------------------------------ counts
def vqa_head(dim):
    """Pooler (LN, linear), linear to twice the width, LN, linear to 3,129 answers."""
    return 2 * dim + dim * (dim + 1) + 2 * dim * (dim + 1) + 4 * dim + 3129 * (2 * dim + 1)


def nlvr2_head(dim):
    """LN over four features, linear to two, LN, linear to 2 labels."""
    return 8 * dim + 2 * dim * (4 * dim + 1) + 4 * dim + 2 * (2 * dim + 1)


COUNTS = [  # size, encoder options, parameters of heads by width, published total
    ("base", {}, lambda dim: 0, 220_987_392),
    ("base", {}, lambda dim: 2 * dim * dim + 1, 222_167_041),  # image-text contrast
    ("base", {}, lambda dim: (64010 + 8192) * (dim + 1), 276_510_730),  # pre-trained
    ("base", {"img_size": 480}, lambda dim: 64010 * (dim + 1), 270_751_754),  # captioning
    ("base", {"img_size": 480, "final_norm": False}, vqa_head, 228_110_649),
    ("base", {}, nlvr2_head, 225_719_810),
    ("large", {}, lambda dim: 2 * dim * dim + 1, 674_799_617),
    ("large", {}, lambda dim: (64010 + 8192) * (dim + 1), 746_709_514),
    ("large", {"img_size": 480}, lambda dim: 64010 * (dim + 1), 739_033_610),
    ("large", {"img_size": 480, "final_norm": False}, vqa_head, 682_985_529),
    ("large", {}, nlvr2_head, 681_109_506),
]


@pytest.mark.parametrize(("size", "options", "heads", "total"), COUNTS)
def test_parameter_counts_are_the_published_ones(size, options, heads, total):
    with torch.device("meta"):
        encoder = create_model(f"beit3_{size}_patch16_224", **options)
    dim = encoder.embed_dim
    assert published_size(to_published(prefixed(encoder))) + heads(dim) == total
    unused_position_rows = 4 * dim
    assert sum(p.numel() for p in encoder.parameters()) == total - heads(dim) - unused_position_rows


@pytest.mark.parametrize(("size", "total"), [("base", 86_662_120), ("large", 304_575_464)])
def test_parameter_counts_of_the_imagenet_form(size, total):
    with torch.device("meta"):
        model = create_model(f"beit3_{size}_patch16_224", num_classes=1000)
    assert published_size(to_published(model.state_dict())) == total


# ------------------------------------------------------------------------------------------- names
def test_published_names_round_trip(data_dir):
    published = load_file(data_dir / "beit3_small" / "model.safetensors")
    encoder = build_encoder(
        EncoderConfig(embed_dim=96, depth=2, num_heads=6, img_size=32, patch_size=8, vocab_size=150, max_text_len=38)
    )
    ours = from_published(published)
    assert {name: value.shape for name, value in ours.items()} == {
        name: value.shape for name, value in prefixed(encoder).items()
    }
    back = to_published(ours)
    assert list(back) == list(published)
    for name, value in published.items():
        rows = slice(2, None) if "embed_positions" in name else slice(None)
        assert torch.equal(back[name][rows], value[rows]), name
        assert back[name].shape == value.shape


def test_heads_keep_their_names():
    heads = {"mlm_head.weight": torch.ones(3, 2), "fc_norm.bias": torch.ones(2)}
    assert from_published(heads) == heads and to_published(heads) == heads


@pytest.mark.parametrize("name", ["beit3.encoder.layers.0.moe.gate.weight", "beit3.unheard"])
def test_unknown_published_names_are_refused(name):
    with pytest.raises(CheckpointError, match=f"weights.pth: {name} has no counterpart"):
        from_published({name: torch.zeros(1)}, "weights.pth")


def test_experts_have_no_published_names():
    with torch.device("meta"):
        encoder = create_model("mhmoe_tiny_patch16_224")
    with pytest.raises(CheckpointError, match=r"encoder\.blocks\.1\.ffn\.joint\S+ has no counterpart"):
        to_published(prefixed(encoder))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_loads_published_files_and_resizes_positions(tmp_path, data_dir, suffix):
    published = load_file(data_dir / "beit3_small" / "model.safetensors")
    file = tmp_path / f"beit3{suffix}"
    if suffix == ".pth":
        torch.save({"model": published}, file)
    else:
        save_file(published, file)
    config = EncoderConfig(
        embed_dim=96, depth=2, num_heads=6, img_size=(48, 32), patch_size=8, vocab_size=150, max_text_len=38
    )
    encoder = build_encoder(config).double()
    load_encoder_weights(encoder, file)
    same_size = build_encoder(config.model_copy(update={"img_size": 32})).double()
    load_encoder_weights(same_size, file)
    images = torch.randn(1, 3, 48, 32).double()
    torch.testing.assert_close(encoder(images).image, same_size(images).image)
    assert torch.equal(encoder.text_embed.pos_embed[0], published["beit3.encoder.embed_positions.B.weight"][2:])


# -------------------------------------------------------------------------------------------- timm
def compare_with_timm(img_size, atol, **size):
    """Random weights, exported under published names, through timm's own loader of BEiT-3 files."""
    torch.manual_seed(0)
    ours = create_model("beit3_base_patch16_224", num_classes=10, vocab_size=8, max_text_len=8, **size).eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    options = {name: size[name] for name in ("embed_dim", "depth", "num_heads") if name in size}
    theirs = timm.create_model("beit3_base_patch16_224", num_classes=10, img_size=img_size, **options).eval()
    theirs.load_state_dict(checkpoint_filter_fn(to_published(ours.state_dict()), theirs))
    images = torch.randn(2, 3, img_size, img_size)
    with torch.no_grad():
        tokens = ours.forward_features(images)
        torch.testing.assert_close(tokens, theirs.forward_features(images), rtol=1e-5, atol=atol)
        pooled = ours.forward_head(tokens, pre_logits=True)
        torch.testing.assert_close(
            pooled, theirs.forward_head(theirs.forward_features(images), pre_logits=True), rtol=0, atol=1e-5
        )
        torch.testing.assert_close(ours(images), theirs(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("img_size", [224, 384])
def test_image_branch_equals_timms_beit3(img_size):
    small = {"embed_dim": 48, "depth": 2, "num_heads": 4}
    ffn = {"kind": "dense", "hidden_dim": 192, "sub_ln": True}
    compare_with_timm(img_size, atol=1e-5, **small, ffn=ffn)


@pytest.mark.slow
@pytest.mark.parametrize("img_size", [224, 384])
def test_base_size_image_branch_equals_timms_beit3(img_size):
    compare_with_timm(img_size, atol=1e-5)
