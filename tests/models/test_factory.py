from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from mhmoe_vl.config import EncoderConfig, ParityConfig, dump, load, read_yaml, run_config, validate
from mhmoe_vl.errors import CheckpointError, ConfigError
from mhmoe_vl.models.classifier import ImageClassifier
from mhmoe_vl.models.encoder import Encoder
from mhmoe_vl.models.factory import (
    build_encoder,
    create_model,
    list_models,
    load_encoder_weights,
    load_pretrained,
    model_config,
)
from mhmoe_vl.nn.embed import resize_positions

CONFIGS = Path(__file__).parents[2] / "configs" / "model"
TINY = {
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 2,
    "img_size": (8, 16),
    "patch_size": 4,
    "vocab_size": 30,
    "max_text_len": 10,
    "ffn": {"kind": "moe", "num_experts": 2, "hidden_dim": 8},
}


# ------------------------------------------------------------------------------------------- names
def test_names():
    assert len(list_models()) == 15
    assert list_models("mhmoe_*") == [
        "mhmoe_base_patch16_224",
        "mhmoe_giant_patch14_224",
        "mhmoe_large_patch16_224",
        "mhmoe_small_patch16_224",
        "mhmoe_tiny_patch16_224",
    ]


@pytest.mark.parametrize("name", list_models())
def test_every_name_has_its_file(name):
    family, size, *_ = name.split("_")
    section = read_yaml(CONFIGS / f"{family}_{size}.yaml")
    assert list(section) == ["encoder"]
    assert validate(EncoderConfig, section["encoder"]) == model_config(name)


def test_every_file_has_its_name():
    assert len(list(CONFIGS.glob("*.yaml"))) == len(list_models())


@pytest.mark.parametrize("name", list_models())
def test_every_name_builds(name):
    with torch.device("meta"):
        encoder = create_model(name, depth=2)
    assert isinstance(encoder, Encoder)
    assert bool(encoder.moe_names) == (not name.startswith("beit3"))


def test_expert_parameters_are_the_published_ones():
    # MH-MoE, arXiv 2404.15045, table 11: 8 experts in 6 layers hold 227 M parameters (X-MoE) and 213 M (MH-MoE).
    for name, published in (("xmoe_base_patch16_224", 227e6), ("mhmoe_base_patch16_224", 213e6)):
        with torch.device("meta"):
            encoder = create_model(name)
        experts = sum(p.numel() for n, p in encoder.named_parameters() if ".experts." in n)
        assert experts == pytest.approx(published, abs=0.7e6)
        # Table 9: an expert embedding of 16 numbers, 16 / h with h sub-tokens.
        [dim] = {p.shape[1] for n, p in encoder.named_parameters() if n.endswith("router.embedding")}
        assert dim == (4 if name.startswith("mhmoe") else 16)


def test_unknown_names_are_told_the_nearest():
    with pytest.raises(
        ConfigError, match=r"model 'mhmoe_bas_patch16_224' is not known \(nearest: mhmoe_base_patch16_22"
    ):
        create_model("mhmoe_bas_patch16_224")
    with pytest.raises(ConfigError, match=r"drop_pth is not an option .did you mean 'drop_path'"):
        create_model("mhmoe_tiny_patch16_224", drop_pth=0.1)
    with pytest.raises(ConfigError, match="pretrained: no weights are hosted for beit3_base_patch16_224"):
        create_model("beit3_base_patch16_224", pretrained=True)


def test_overrides_reach_into_sections():
    config = model_config("mhmoe_tiny_patch16_224", ffn={"num_experts": 3}, img_size=(32, 48))
    assert (config.ffn.num_experts, config.ffn.num_subtokens, config.img_size) == (3, 4, (32, 48))
    assert model_config("mhmoe_tiny_patch16_224", ffn={"kind": "dense"}).ffn.kind == "dense"


def test_timm_finds_our_names_and_keeps_its_own():
    assert set(list_models()) <= set(timm.list_models("*_patch1*"))
    model = timm.create_model("mhmoe_tiny_patch16_224", num_classes=7, img_size=32, drop_path_rate=0.2, depth=2)
    assert isinstance(model, ImageClassifier) and model(torch.randn(1, 3, 32, 32)).shape == (1, 7)
    assert model.encoder.blocks[1].drop_path.rate == 0.2
    with torch.device("meta"):
        theirs = timm.create_model("beit3_base_patch16_224")
    assert type(theirs).__name__ == "VisionTransformer"


def test_parity_is_solved():
    config = validate(EncoderConfig, TINY | {"ffn": {"kind": "moe", "hidden_dim": "parity", "top_k": 2}})
    encoder = build_encoder(config, ParityConfig(num_experts=8, hidden_dim=32))
    assert encoder.blocks[1].ffn["joint"](torch.zeros(1, 24)).x.shape == (1, 24)
    with pytest.raises(ConfigError, match="parity"):
        build_encoder(config)


# ------------------------------------------------------------------------------------- run folders
def save_run(folder, places=("last",), **overrides):
    """A run folder as training leaves it; every checkpoint's weights are filled with another number."""
    config = validate(EncoderConfig, TINY | overrides)
    task = {"kind": "masked_modeling", "texts": {"train": "texts"}}
    run = validate(run_config("masked_modeling"), {"encoder": config.model_dump(), "task": task})
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(dump(run))
    torch.manual_seed(0)
    encoder = build_encoder(config)
    for number, place in enumerate(places):
        weights = {f"encoder.{k}": v + number for k, v in encoder.state_dict().items()}
        target = folder / "checkpoints" / place
        target.mkdir(parents=True)
        save_file(weights | {"mlm_head.bias": torch.zeros(30)}, target / "model.safetensors")
    return encoder


def assert_equal_weights(got, want, plus=0):
    for name, value in want.state_dict().items():
        assert torch.equal(got.state_dict()[name], value + plus), name


def test_load_pretrained_takes_the_best_checkpoint_else_the_last(tmp_path):
    encoder = save_run(tmp_path / "a", ("last",))
    assert_equal_weights(load_pretrained(tmp_path / "a"), encoder)
    encoder = save_run(tmp_path / "b", ("last", "best", "step-00000010"))
    assert_equal_weights(load_pretrained(tmp_path / "b"), encoder, plus=1)
    assert_equal_weights(load_pretrained(tmp_path / "b" / "checkpoints" / "step-00000010"), encoder, plus=2)


@pytest.mark.parametrize("place", ["best", "last", "step-00000010"])
def test_the_moving_average_is_taken_where_one_was_kept(tmp_path, place):
    encoder = save_run(tmp_path / "run", (place,), img_size=(8, 32))
    checkpoint = tmp_path / "run" / "checkpoints" / place
    average = {f"encoder.{name}": value + 0.5 for name, value in encoder.state_dict().items()}
    save_file(average, checkpoint / "ema.safetensors")
    source = checkpoint if place.startswith("step") else tmp_path / "run"
    assert_equal_weights(load_pretrained(source), encoder, plus=0.5)
    size = {name: value for name, value in TINY.items() if name != "ffn"} | {"dense_ffn": {"hidden_dim": 96}}
    options = size | {"ffn": {"num_experts": 2, "hidden_dim": 8, "router": {"kind": "linear"}}, "img_size": (8, 32)}
    assert_equal_weights(create_model("xmoe_tiny_patch16_224", source, **options), encoder, plus=0.5)
    square = build_encoder(validate(EncoderConfig, TINY | {"img_size": 16}))
    load_encoder_weights(square, source)  # the average's positions are resized by the run's own grid
    want = resize_positions(encoder.image_embed.pos_embed + 0.5, (4, 4), (2, 8))
    torch.testing.assert_close(square.image_embed.pos_embed, want)


def test_the_best_weights_go_before_the_last_average(tmp_path):
    encoder = save_run(tmp_path / "run", ("best", "last"))
    save_file(
        {f"encoder.{name}": value + 2 for name, value in encoder.state_dict().items()},
        tmp_path / "run" / "checkpoints" / "last" / "ema.safetensors",
    )
    assert_equal_weights(load_pretrained(tmp_path / "run"), encoder)


def test_load_pretrained_for_another_image_size_and_one_branch(tmp_path):
    encoder = save_run(tmp_path / "run").eval()
    images = torch.randn(2, 3, 16, 16)
    larger = load_pretrained(tmp_path / "run", img_size=16, modalities=("image",)).eval()
    assert larger.image_embed.pos_embed.shape == (1, 17, 24)
    torch.testing.assert_close(larger(images).image, encoder(images).image)


@pytest.mark.parametrize("kind", ["run", "checkpoint", "file", "saved"])
def test_positions_that_are_not_square_are_resized_by_their_own_grid(tmp_path, kind):
    encoder = save_run(tmp_path / "run", img_size=(8, 32))  # 2 x 8 patches, as many as 4 x 4
    encoder.save_pretrained(tmp_path / "saved")
    checkpoint = tmp_path / "run" / "checkpoints" / "last"
    source = {"run": tmp_path / "run", "checkpoint": checkpoint, "file": checkpoint / "model.safetensors"}
    square = build_encoder(validate(EncoderConfig, TINY | {"img_size": 16}))
    load_encoder_weights(square, source.get(kind, tmp_path / "saved"))
    want = resize_positions(encoder.image_embed.pos_embed, (4, 4), (2, 8))
    torch.testing.assert_close(square.image_embed.pos_embed, want)
    assert not torch.equal(want, encoder.image_embed.pos_embed)


def test_named_models_load_run_folders_and_saved_encoders(tmp_path):
    tiny = {key: value for key, value in TINY.items() if key != "ffn"} | {"dense_ffn": {"hidden_dim": 16}}
    ffn = {"num_experts": 2, "hidden_dim": 8}
    encoder = create_model("xmoe_tiny_patch16_224", ffn=ffn, **tiny)
    encoder.save_pretrained(tmp_path)
    assert_equal_weights(create_model("xmoe_tiny_patch16_224", tmp_path, ffn=ffn, **tiny), encoder)
    with_head = create_model("xmoe_tiny_patch16_224", tmp_path, num_classes=3, ffn=ffn, **tiny)
    assert torch.equal(with_head.encoder.image_embed.pos_embed, encoder.image_embed.pos_embed)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere: config\.yaml is missing"):
        load_pretrained(tmp_path / "nowhere")
    save_run(tmp_path / "run", ())
    with pytest.raises(CheckpointError, match=r"run: no model\.safetensors in it or its checkpoints"):
        load_pretrained(tmp_path / "run")


def test_weights_that_do_not_fit_are_listed_with_both_shapes(tmp_path):
    save_run(tmp_path / "run")
    config = validate(EncoderConfig, TINY | {"vocab_size": 31, "depth": 3})
    with pytest.raises(CheckpointError) as error:
        load_encoder_weights(build_encoder(config), tmp_path / "run")
    message = str(error.value)
    # The token table and, per modality of a block: 4 projections, 3 norms, fc1, ffn_norm and fc2, 2 tensors each.
    assert (
        "model.safetensors: 41 weights do not fit: blocks.2.attn.inner_norm.image.bias: absent in the file" in message
    )
    assert "; and 36 more" in message and "\n" not in message
    config = validate(EncoderConfig, TINY | {"vocab_size": 31})
    with pytest.raises(
        CheckpointError, match=r"text_embed\.tokens\.weight: 30 x 24 in the file, 31 x 24 in the encoder"
    ):
        load_encoder_weights(build_encoder(config), tmp_path / "run")
    shallow = validate(EncoderConfig, TINY | {"depth": 1, "ffn": {"kind": "dense", "sub_ln": True}})
    with pytest.raises(CheckpointError, match=r"blocks\.1\.attn\.k_proj\.image\.bias: 24 in the file, absent in the"):
        load_encoder_weights(build_encoder(shallow), tmp_path / "run")


def test_config_of_a_run_reads_back(tmp_path):
    save_run(tmp_path)
    assert load(run_config("masked_modeling"), [tmp_path / "config.yaml"]).encoder.embed_dim == 24
