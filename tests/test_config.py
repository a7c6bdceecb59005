"""Configuration files, overrides and the messages for what is wrong in them."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from mhmoe_vl import config
from mhmoe_vl.errors import ConfigError, one_line

ROOT = Path(__file__).parents[1]
TEXTS = {"task": {"kind": "masked_modeling", "texts": {"train": "a.tar"}}}


def load(tmp_path, text, *overrides):
    (tmp_path / "a.yaml").write_text(text)
    return config.load(config.RunConfig, [tmp_path / "a.yaml"], list(overrides))


BASE = "task: {kind: masked_modeling, texts: {train: a.tar}}\n"


def test_defaults_files_and_options_in_order_of_precedence(tmp_path):
    (tmp_path / "b.yaml").write_text("optim: {lr: 3e-4}\n")
    (tmp_path / "a.yaml").write_text(BASE + "optim: {lr: 1, weight_decay: 0.5}\n")
    settings = config.load(config.RunConfig, [tmp_path / "a.yaml", tmp_path / "b.yaml"], ["--optim.min_lr=1E-7"])
    assert (settings.optim.lr, settings.optim.weight_decay, settings.optim.min_lr) == (3e-4, 0.5, 1e-7)
    assert settings.optim.schedule == "cosine"


def test_another_kind_replaces_a_section_whole(tmp_path):
    settings = load(
        tmp_path, BASE + "encoder: {ffn: {kind: mh_moe, num_subtokens: 2}}\n", "--encoder.ffn.kind", "dense"
    )
    assert settings.encoder.ffn == config.DenseConfig()


def test_dump_reads_back_equal(tmp_path):
    settings = load(tmp_path, BASE + "encoder: {ffn: {kind: mh_moe, router: {kind: cosine}}, img_size: [224, 96]}\n")
    (tmp_path / "b.yaml").write_text(config.dump(settings))
    assert config.load(config.RunConfig, [tmp_path / "b.yaml"]) == settings


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("optim: {lrr: 1}", [], "optim.lrr is not an option (did you mean 'lr'?)"),
        ("encoder: {ffn: {kind: mh_moe, heads: 8}}", [], "did you mean 'num_subtokens'?"),
        ("encoder: {ffn: {kind: mh_moe, num_heads: 8}}", [], "did you mean 'num_subtokens'?"),
        ("optim: {lr: fast}", [], "optim.lr: input should be a valid number"),
        ("optim: {lr: -1}", [], "got -1"),
        ("optim: {lr: .nan}", [], "optim.lr: input should be"),
        ("optim: {betas: [0.9, 2]}", [], "optim.betas.1"),
        ("train: {tensorboard: no}", [], "train.tensorboard: input should be a valid boolean"),
        ("train: {steps: 3}\ntrain: {steps: 4}", [], "a.yaml:3: 'train' stands twice"),
        ("train: !!python/object:os.system {}", [], "refused"),
        ("train: {steps: [", [], "not readable as YAML"),
        ("- 1", [], "not readable as YAML"),
        ("", ["--train.step", "3"], "train.step is not an option (did you mean 'steps'?)"),
        ("", ["--train.steps"], "--train.steps needs a value"),
        ("", ["train.steps", "3"], "'train.steps' is not an option"),
        ("encoder: {ffn: {kind: mh}}", [], "'dense', 'moe', 'mh_moe'"),
        ("task: {kind: masked_modeling, texts: {}}", [], "stands twice"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path, text, options, expected):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, BASE + text, *options)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "place"),
    [
        ([], "a.yaml: optim.lr"),
        (["--optim.lr", "fast"], "command line: optim.lr"),
        (["--optim.betas", "[0.9, 2]", "--optim.lr", "1"], "command line: optim.betas.1"),
        (["--optim.lr", "1", "--train.step", "3"], "command line: train.step "),
    ],
)
def test_the_place_of_a_mistake_is_named(tmp_path, options, place):
    with pytest.raises(ConfigError, match=place):
        load(tmp_path, BASE + "optim: {lr: -1}", *options)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: No such file"):
        config.load(config.RunConfig, [tmp_path / "none.yaml"])


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: str(p.relative_to(ROOT)))
def test_shipped_files_are_valid_and_say_what_they_are(path):
    text = path.read_text()
    assert text.startswith("# ")
    values = config.read_yaml(path)
    if "task" in values:
        config.validate(config.RunConfig, values, str(path))
    else:
        config.validate(config.RunConfig, values | TEXTS, str(path))


def test_help_lists_every_field():
    def leaves(model, prefix):
        for name, field in model.model_fields.items():
            choices = config.variants(field.annotation)
            if choices:
                for choice in choices:
                    yield from leaves(choice, f"{prefix}{name}.")
            elif name != "kind":
                yield f"--{prefix}{name} "

    def nameless(model, prefix):
        for name, field in model.model_fields.items():
            choices = config.variants(field.annotation)
            for choice in choices:
                yield from nameless(choice, f"{prefix}{name}.")
            if not choices and name != "kind" and not field.description:
                yield prefix + name

    text = config.describe(config.RunConfig)
    assert not list(nameless(config.RunConfig, ""))
    missing = [leaf for leaf in leaves(config.RunConfig, "") if leaf not in text]
    assert not missing


def test_every_field_of_a_class_is_an_argument_of_its_constructor():
    from mhmoe_vl.data.scale_jitter import ScaleJitter
    from mhmoe_vl.data.transforms import ImageTransform
    from mhmoe_vl.models.detector import Detector
    from mhmoe_vl.models.encoder import Encoder
    from mhmoe_vl.models.visual_tokenizer import VisualTokenizer
    from mhmoe_vl.tasks.imagenet import ImageNet
    from mhmoe_vl.tasks.masked_modeling import MaskedModeling

    policy = set(config.PolicyConfig.model_fields) - set(config.AugmentConfig.model_fields)
    pairs = {
        Encoder: (config.EncoderConfig, set()),
        ImageTransform: (config.AugmentConfig, {"img_size", "second_size", "train", "whole", "crop_pct"} | policy),
        VisualTokenizer: (config.VisualTokenizerConfig, set()),
        ScaleJitter: (config.ScaleJitterConfig, {"img_size", "train"}),
        Detector: (config.DetectorConfig, {"in_dim", "num_classes", "patch_size"}),
        MaskedModeling: (config.MaskedModelingConfig, {"inputs", "seed", "accumulate"}),
        ImageNet: (config.ImageNetConfig, {"inputs", "seed", "accumulate"}),
    }
    for built, (section, more) in pairs.items():
        arguments = set(inspect.signature(built).parameters)
        assert arguments == set(section.model_fields) - {"kind"} | more, built.__name__


def test_yaml_reads_scientific_numbers_and_refuses_words_as_booleans():
    assert config.parse_overrides(["--a.b", "3e-4", "--a.c", "1E5", "--a.d", "on", "--a.e=true", "--a.f", "none"]) == {
        "a": {"b": 3e-4, "c": 1e5, "d": "on", "e": True, "f": None}
    }


def test_one_line_hides_control_characters_and_cuts():
    assert one_line("a\x1b]0;b\nc") == "a\\x1b]0;b\\nc"
    assert len(one_line("x" * 1000)) == 300


def test_what_an_option_may_not_hold_is_named_by_the_option():
    with pytest.raises(ConfigError, match=r"^--seed:1: alias '\*x' is refused"):
        config.parse_overrides(["--seed", "*x"])
