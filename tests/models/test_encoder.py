from __future__ import annotations

import inspect

import pytest
import torch
from safetensors.torch import load_file

from mhmoe_vl.config import EncoderConfig, validate
from mhmoe_vl.errors import ConfigError
from mhmoe_vl.models.encoder import Encoder
from mhmoe_vl.models.factory import build_encoder, load_encoder_weights
from mhmoe_vl.nn.cache import KeyValueCache
from mhmoe_vl.parity import count_encoder, total

SMALL = {
    "embed_dim": 24,
    "depth": 4,
    "num_heads": 2,
    "img_size": 16,
    "patch_size": 4,
    "vocab_size": 30,
    "max_text_len": 10,
}
EXPERTS = {"kind": "mh_moe", "num_experts": 4, "hidden_dim": 10, "num_subtokens": 2}
VARIANTS = {
    "dense": {},
    "joint": {"ffn": EXPERTS},
    "per_modality": {"ffn": EXPERTS, "expert_pool": "per_modality"},
    "x_moe": {"ffn": {"kind": "moe", "num_experts": 4, "hidden_dim": 10, "router": {"kind": "cosine"}}},
    "shared_attention": {"multiway": "shared_attention", "vl_ffn_layers": 2},
    "shared_attention_experts": {"multiway": "shared_attention", "vl_ffn_layers": 1, "ffn": EXPERTS},
    "shared": {"multiway": "shared", "ffn": EXPERTS},
    "plain": {"attention_sub_ln": False, "final_norm": False, "ffn": {"kind": "dense"}},
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def make(seed=0, **overrides) -> Encoder:
    torch.manual_seed(seed)
    encoder = build_encoder(validate(EncoderConfig, SMALL | overrides)).double()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return encoder


def inputs(images=3, texts=4, size=(16, 16)):
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randn(images, 3, *size, generator=generator).double()
    text = torch.randint(0, 30, (texts, 7), generator=generator)
    padding = torch.zeros(texts, 7, dtype=torch.bool)
    padding[1, 4:] = True
    padding[-1, 5:] = True
    return pixels, text, padding


# ------------------------------------------------------------------------- against the released code
@pytest.fixture(scope="module")
def released(data_dir):
    encoder = build_encoder(
        EncoderConfig(embed_dim=96, depth=2, num_heads=6, img_size=32, patch_size=8, vocab_size=150, max_text_len=38)
    )
    load_encoder_weights(encoder.double().eval(), data_dir / "beit3_small" / "model.safetensors")
    return encoder, load_file(data_dir / "beit3_small" / "cases.safetensors")


@pytest.mark.parametrize("train", [False, True])
def test_features_equal_torchscales(released, train):
    encoder, case = released
    keep = ~case["text_padding"]
    with torch.set_grad_enabled(train):
        pair = encoder(case["image"], case["text"], text_padding=case["text_padding"])
        vision = encoder(case["image"]).image
        language = encoder(text=case["text"], text_padding=case["text_padding"]).text
    num_image = pair.image.shape[1]
    torch.testing.assert_close(pair.image, case["pair"][:, :num_image], rtol=0, atol=1e-6)
    torch.testing.assert_close(pair.text[keep], case["pair"][:, num_image:][keep], rtol=0, atol=1e-6)
    torch.testing.assert_close(vision, case["vision"], rtol=0, atol=1e-6)
    torch.testing.assert_close(language[keep], case["language"][keep], rtol=0, atol=1e-6)


# ---------------------------------------------------------------------------------- mixed batches
@every_variant
def test_a_mixed_batch_equals_separate_runs(variant):
    encoder = make(**VARIANTS[variant]).eval()
    pixels, text, padding = inputs(images=3, texts=4)
    with torch.no_grad():
        mixed = encoder(pixels, text, text_padding=padding, num_pairs=2)
        image = encoder(pixels[:1]).image
        alone = encoder(text=text[:2], text_padding=padding[:2]).text
        pair = encoder(pixels[1:], text[2:], text_padding=padding[2:])
    torch.testing.assert_close(mixed.image, torch.cat([image, pair.image]))
    keep = ~padding
    torch.testing.assert_close(mixed.text[keep], torch.cat([alone, pair.text])[keep])


@every_variant
def test_what_stands_at_padding_does_not_matter(variant):
    encoder = make(**VARIANTS[variant]).eval()
    pixels, text, padding = inputs()
    with torch.no_grad():
        first = encoder(pixels, text, text_padding=padding, num_pairs=2)
        second = encoder(pixels, torch.where(padding, 29 - text, text), text_padding=padding, num_pairs=2)
    torch.testing.assert_close(first.image, second.image)
    torch.testing.assert_close(first.text[~padding], second.text[~padding])
    torch.testing.assert_close(first.aux_losses, second.aux_losses)


@every_variant
def test_pairs_see_each_other_and_others_do_not(variant):
    encoder = make(**VARIANTS[variant]).eval()
    pixels, text, _ = inputs()
    with torch.no_grad():
        before = encoder(pixels, text, num_pairs=2)
        after = encoder(pixels, torch.where(torch.arange(4)[:, None] == 3, (text + 1) % 30, text), num_pairs=2)
    changed = [not torch.equal(a, b) for a, b in zip(before.image, after.image, strict=True)]
    assert changed == [False, False, True]


@pytest.mark.parametrize("variant", ["dense", "joint", "per_modality", "shared_attention_experts"])
@pytest.mark.parametrize("given", ["image", "text"])
def test_an_absent_modality_gets_zero_gradients(variant, given):
    encoder = make(**VARIANTS[variant]).train()
    pixels, text, padding = inputs()
    output = encoder(pixels) if given == "image" else encoder(text=text, text_padding=padding)
    assert (output.text is None, output.image is None) == (given == "image", given == "text")
    (getattr(output, given).square().sum() + sum(output.aux_losses.values())).backward()
    absent = {"image": "text", "text": "image"}[given]
    found = 0
    for name, parameter in encoder.named_parameters():
        if name != "image_embed.mask_token":
            assert parameter.grad is not None, name
        if f".{absent}." in name or name.startswith(absent):
            assert not parameter.grad.any(), name
            found += 1
    assert found and len(output.stats) == len(encoder.moe_names)


def test_image_and_text_only_encoders_hold_one_branch():
    both = make(ffn=EXPERTS)
    pixels, text, padding = inputs()
    for only, call in (("image", {"images": pixels}), ("text", {"text": text, "text_padding": padding})):
        encoder = make(ffn=EXPERTS, modalities=(only,))
        assert set(encoder.state_dict()) < set(both.state_dict())
        assert not any(other in name for name in encoder.state_dict() for other in {"image", "text"} - {only})
        encoder.load_state_dict({k: v for k, v in both.state_dict().items() if k in encoder.state_dict()})
        torch.testing.assert_close(getattr(encoder(**call), only), getattr(both(**call), only))


# ------------------------------------------------------------------------------------- causal text
@every_variant
def test_causal_text_sees_earlier_tokens_and_its_image(variant):
    encoder = make(**VARIANTS[variant]).eval()
    pixels, text, _ = inputs()
    changed_text = text.clone()
    changed_text[[0, 3], 4] = (text[[0, 3], 4] + 1) % 30
    changed_pixels = pixels.clone()
    changed_pixels[[0, 1]] += 1  # picture 0 stands alone, picture 1 belongs to text 2

    def features(pixels, text):
        with torch.no_grad():
            return encoder(pixels, text, num_pairs=2, causal_text=True)

    first, after_text, after_pixels = (
        features(pixels, text),
        features(pixels, changed_text),
        features(changed_pixels, text),
    )
    assert torch.equal(first.image, after_text.image)
    text_changes = (first.text != after_text.text).any(-1)
    assert text_changes.nonzero().tolist() == [[i, position] for i in (0, 3) for position in (4, 5, 6)]
    assert (first.image != after_pixels.image).any(-1).all(-1).tolist() == [True, True, False]
    assert torch.equal(first.text[[0, 1, 3]], after_pixels.text[[0, 1, 3]])
    assert (first.text[2] != after_pixels.text[2]).any(-1).all()


@every_variant
def test_a_mixed_batch_of_causal_texts_equals_separate_runs(variant):
    encoder = make(**VARIANTS[variant]).eval()
    pixels, text, padding = inputs(images=3, texts=4)
    with torch.no_grad():
        mixed = encoder(pixels, text, text_padding=padding, num_pairs=2, causal_text=True)
        image = encoder(pixels[:1]).image
        alone = [encoder(text=text[i : i + 1, :n], causal_text=True).text for i, n in enumerate((7, 4))]
        pair = [encoder(pixels[i - 1 :][:1], text[i : i + 1, :n], causal_text=True) for i, n in ((2, 7), (3, 5))]
    torch.testing.assert_close(mixed.image, torch.cat([image, *(one.image for one in pair)]))
    for got, want in zip(mixed.text, [*alone, *(one.text for one in pair)], strict=True):
        torch.testing.assert_close(got[: want.shape[1]], want[0])


@pytest.mark.parametrize("variant", ["dense", "per_modality", "shared_attention_experts"])
def test_checkpointing_gives_the_same_gradients_of_causal_text(variant):
    gradients = []
    for enable in (False, True):
        encoder = make(**VARIANTS[variant], grad_checkpointing=enable).train()
        pixels, text, padding = inputs()
        output = encoder(pixels, text, text_padding=padding, num_pairs=2, causal_text=True)
        output.text[~padding].square().sum().backward()
        gradients.append({name: p.grad for name, p in encoder.named_parameters() if p.grad is not None})
    torch.testing.assert_close(gradients[0], gradients[1])


@every_variant
def test_texts_encoded_piece_by_piece_equal_whole_ones(variant):
    encoder, cache = make(**VARIANTS[variant]).eval(), KeyValueCache()
    pixels, text, _ = inputs(images=3, texts=4)
    with torch.no_grad():
        whole = encoder(pixels, text, num_pairs=2, causal_text=True)
        first = encoder(pixels, text[:, :3], num_pairs=2, cache=cache)
        later = [encoder(text=text[:, a:b], num_pairs=2, cache=cache, return_routing=True) for a, b in ((3, 4), (4, 7))]
    torch.testing.assert_close(first.image, whole.image)
    assert [output.image for output in later] == [None, None]
    torch.testing.assert_close(torch.cat([first.text, *(output.text for output in later)], dim=1), whole.text)


def test_texts_without_images_are_encoded_piece_by_piece_too():
    text = inputs()[1]
    for modalities in (("image", "text"), ("text",)):
        encoder, cache = make(ffn=EXPERTS, modalities=modalities).eval(), KeyValueCache()
        with torch.no_grad():
            pieces = [encoder(text=piece, cache=cache).text for piece in text.split(3, dim=1)]
            whole = encoder(text=text, causal_text=True).text
        torch.testing.assert_close(torch.cat(pieces, dim=1), whole)


@pytest.mark.parametrize("variant", ["dense", "joint", "shared_attention_experts"])
def test_cached_texts_can_be_cut_chosen_and_repeated(variant):
    encoder, cache = make(**VARIANTS[variant]).eval(), KeyValueCache()
    pixels, text, _ = inputs(images=3, texts=3)
    chosen = torch.tensor([2, 0, 0, 1])
    with torch.no_grad():
        encoder(pixels, text[:, :5], cache=cache)
        cache.cut_text(4)
        cache.select(chosen)
        got = encoder(text=text[chosen, 5:], cache=cache).text
        whole = encoder(pixels[chosen], torch.cat([text[chosen, :4], text[chosen, 5:]], dim=1), causal_text=True).text
    torch.testing.assert_close(got, whole[:, 4:])


# --------------------------------------------------------------------------------- layers of experts
def test_every_second_block_has_experts():
    encoder = make(ffn=EXPERTS, depth=5)
    assert [type(block.ffn["joint" if "joint" in block.ffn else "image"]).__name__ for block in encoder.blocks] == [
        "FeedForward",
        "MultiHeadMoE",
        "FeedForward",
        "MultiHeadMoE",
        "FeedForward",
    ]
    assert encoder.moe_names == ["blocks.1.joint", "blocks.3.joint"]
    assert make(ffn=EXPERTS, moe_every=3).moe_names == ["blocks.2.joint"]
    assert make(ffn=EXPERTS, expert_pool="per_modality", moe_every=4).moe_names == ["blocks.3.image", "blocks.3.text"]
    pools = make(**VARIANTS["shared_attention_experts"]).moe_names
    assert pools == ["blocks.1.joint", "blocks.3.joint", "blocks.3.pair"]
    assert make().moe_names == []


@pytest.mark.parametrize("variant", ["joint", "per_modality", "shared_attention_experts"])
def test_aux_losses_are_means_over_pools_and_stats_follow_the_names(variant):
    encoder = make(**VARIANTS[variant]).eval()
    seen = {}
    for name in encoder.moe_names:
        _, index, pool = name.split(".")
        layer = encoder.blocks[int(index)].ffn[pool]
        forward_streams = layer.forward_streams

        def record(*args, _name=name, _call=forward_streams, **options):
            seen[_name] = _call(*args, **options)
            return seen[_name]

        layer.forward_streams = record
    pixels, text, padding = inputs()
    output = encoder(pixels, text, text_padding=padding, num_pairs=2, return_routing=True)
    assert list(seen) == encoder.moe_names
    for loss, value in output.aux_losses.items():
        mean = sum(found.aux_losses[loss] for found in seen.values()) / len(seen)
        torch.testing.assert_close(value, mean)
    for name, stats, routing in zip(encoder.moe_names, output.stats, output.routing, strict=True):
        assert torch.equal(stats.load, seen[name].stats.load)
        assert routing is seen[name].routing
    rows = sum(int(stats.num_rows) for stats in output.stats[-len(encoder.blocks[3].ffn) :])
    assert rows == 2 * (3 * 17 + int((~padding).sum()))


def test_dense_encoders_return_no_losses():
    output = make()(inputs()[0])
    assert output.aux_losses == {} and output.stats == [] and output.routing is None


# ----------------------------------------------------------------------------------------- training
@pytest.mark.parametrize("variant", ["dense", "per_modality", "shared_attention_experts"])
def test_checkpointing_gives_the_same_gradients(variant):
    gradients = []
    for enable in (False, True):
        encoder = make(**VARIANTS[variant], drop_path=0.3, dropout=0.1).train()
        encoder.set_grad_checkpointing(enable)
        pixels, text, padding = inputs()
        torch.manual_seed(5)
        output = encoder(pixels, text, text_padding=padding, num_pairs=2)
        (output.image.square().sum() + output.text[~padding].sum() + sum(output.aux_losses.values())).backward()
        gradients.append({name: p.grad for name, p in encoder.named_parameters() if p.grad is not None})
    torch.testing.assert_close(gradients[0], gradients[1])


def test_checkpointing_keeps_fewer_tensors():
    kept = []
    for enable in (False, True):
        encoder = make(grad_checkpointing=enable)
        count = 0

        def pack(tensor):
            nonlocal count
            count += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            encoder(inputs()[0])
        kept.append(count)
    assert kept[1] < kept[0] / 3


def test_initial_gain_grows_with_depth_and_drop_path_along_it():
    torch.manual_seed(0)
    encoder = build_encoder(EncoderConfig(vocab_size=9, max_text_len=9, drop_path=0.5))
    gain = torch.tensor(12.0).log().sqrt()  # sqrt(ln(2 * 6 blocks))
    xavier = (2 / (192 + 768)) ** 0.5
    std = torch.stack([block.ffn["text"].fc1.weight.std() for block in encoder.blocks])
    torch.testing.assert_close(std, (gain * xavier).expand(6), rtol=0.02, atol=0)
    assert [block.drop_path.rate for block in encoder.blocks] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])


def test_weight_decay_spares_embeddings_and_expert_biases():
    encoder = make(ffn=EXPERTS)
    spared = encoder.no_weight_decay()
    assert {"image_embed.pos_embed", "text_embed.pos_embed", "text_embed.tokens.weight"} < spared
    assert {"image_embed.cls_token", "image_embed.mask_token"} < spared
    parameters = dict(encoder.named_parameters())
    assert spared <= set(parameters)
    expert_biases = {n for n, p in parameters.items() if ".experts." in n and n.endswith("bias") and p.ndim == 2}
    assert expert_biases and expert_biases <= spared


def test_layer_groups_for_layer_decay():
    from timm.optim import param_groups_layer_decay

    encoder = make(ffn=EXPERTS)
    groups = param_groups_layer_decay(encoder, 0.05, encoder.no_weight_decay(), layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert set(scale) == {id(p) for p in encoder.parameters()}
    assert scale[id(encoder.image_embed.pos_embed)] == scale[id(encoder.text_embed.tokens.weight)] == 0.5**4
    for index, block in enumerate(encoder.blocks):
        assert {scale[id(p)] for p in block.parameters()} == {0.5 ** (3 - index)}
    assert scale[id(encoder.norm["image"].weight)] == 1


# ------------------------------------------------------------------------------------------- images
def test_other_image_sizes_also_not_square():
    encoder = make(img_size=(16, 24))
    assert encoder.image_embed.pos_embed.shape == (1, 1 + 4 * 6, 24)
    assert encoder(inputs(size=(8, 28))[0]).image.shape == (3, 1 + 2 * 7, 24)
    assert encoder.float()(inputs(size=(16, 24))[0].float()).image.shape == (3, 25, 24)


def test_forward_intermediates():
    encoder = make(ffn=EXPERTS).eval()
    pixels = inputs(size=(8, 16))[0]
    final = encoder.forward_features(pixels)
    maps = encoder.forward_intermediates(pixels, intermediates_only=True)
    assert [tuple(m.shape) for m in maps] == [(3, 24, 2, 4)] * 4
    out, last = encoder.forward_intermediates(pixels, [-1], norm=True, output_fmt="NLC", return_prefix_tokens=True)
    assert torch.equal(out, final)
    [(patches, prefix)] = last
    assert torch.equal(torch.cat([prefix, patches], dim=1), final)
    first = encoder.forward_intermediates(pixels, [0, 2], intermediates_only=True, stop_early=True)
    assert len(first) == 2 and torch.equal(first[1], maps[2])
    assert torch.equal(encoder.forward_intermediates(pixels, 1, intermediates_only=True)[0], maps[3])
    assert torch.equal(maps[2][1, :, 1, 3], encoder.forward_intermediates(pixels, [2], output_fmt="NLC")[1][0][1, 7])
    with pytest.raises(ConfigError, match="indices"):
        encoder.forward_intermediates(pixels, [4])


def test_masked_patches_are_not_seen():
    encoder = make()
    mask = torch.zeros(3, 16, dtype=torch.bool)
    mask[:, 5] = True
    pixels = inputs()[0]
    changed = pixels.clone()
    changed[:, :, 4:8, 4:8] = 7.0  # patch 5: row 1, column 1
    first, second = encoder(pixels, image_mask=mask).image, encoder(changed, image_mask=mask).image
    torch.testing.assert_close(first, second)
    assert not torch.allclose(encoder(pixels).image, encoder(changed).image)


# ------------------------------------------------------------------------------------- saved and hub
def test_save_pretrained_and_back(tmp_path):
    encoder = make(ffn=EXPERTS, img_size=(16, 24)).float().eval()
    encoder.save_pretrained(tmp_path)
    assert {"config.json", "model.safetensors"} <= {path.name for path in tmp_path.iterdir()}
    again = Encoder.from_pretrained(tmp_path).eval()
    pixels, text, padding = inputs(3, 3, (16, 24))
    with torch.no_grad():
        want = encoder(pixels.float(), text, text_padding=padding)
        got = again(pixels.float(), text, text_padding=padding)
    assert torch.equal(want.image, got.image) and torch.equal(want.text, got.text)
    with pytest.raises(RuntimeError, match=r"size mismatch|Missing key"):
        Encoder.from_pretrained(tmp_path, depth=5)


# ----------------------------------------------------------------------------------------- mistakes
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"embed_dim": 25}, "num_heads: 2 does not divide the width 25"),
        ({"img_size": 18}, "img_size: 18 x 18 pixels are not whole patches of 4"),
        ({"modalities": ()}, "modalities"),
        ({"vl_ffn_layers": 1}, "vl_ffn_layers: 1 needs multiway: shared_attention"),
        ({"vl_ffn_layers": 5, "multiway": "shared_attention"}, "vl_ffn_layers: 5 of 4 blocks"),
        ({"multiway": "shared", "expert_pool": "per_modality"}, "expert_pool: per_modality with multiway: shared"),
        ({"ffn": EXPERTS, "moe_every": 5}, "moe_every: 5 leaves no block of 4"),
    ],
)
def test_options_that_do_not_fit_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        build_encoder(validate(EncoderConfig, SMALL | overrides))


@pytest.mark.parametrize(
    "overrides",
    [
        {"embed_dim": 25},
        {"img_size": 18},
        {"vl_ffn_layers": 1},
        {"multiway": "shared", "expert_pool": "per_modality"},
        {"ffn": EXPERTS, "moe_every": 5},
        {"ffn": EXPERTS | {"num_subtokens": 5}},
        {"ffn": EXPERTS | {"top_k": 5}},
        {"ffn": EXPERTS | {"conv_stride": 2}},
    ],
    ids=str,
)
def test_what_cannot_be_built_cannot_be_counted_either(overrides):
    config = validate(EncoderConfig, SMALL | overrides)
    messages = []
    for action in (build_encoder, count_encoder):
        with pytest.raises(ConfigError) as error:
            action(config)
        messages.append(str(error.value))
    assert messages[0] == messages[1] and "\n" not in messages[0]


def test_an_encoder_of_texts_does_not_ask_for_whole_patches():
    config = validate(EncoderConfig, SMALL | {"modalities": ("text",), "img_size": 18})
    parameters = sum(p.numel() for p in build_encoder(config).parameters())
    assert total(count_encoder(config, inputs="text")).parameters == parameters


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e, i, t: e(i, t), "num_pairs: not given for 3 images and 4 texts"),
        (lambda e, i, t: e(i, t, num_pairs=4), "num_pairs: 4 of 3 images and 4 texts"),
        (lambda e, i, t: e(i, num_pairs=1), "num_pairs: 1 of 3 images and 0 texts"),
        (lambda e, i, t: e(text=t.repeat(1, 2)), "max_text_len: a text of 14 tokens for 10 positions"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(call, message):
    with pytest.raises(ConfigError, match=message):
        call(make(), *inputs()[:2])


def test_convolutions_over_tokens_cannot_be_causal():
    pixels, text, _ = inputs(images=4)
    with pytest.raises(ConfigError, match="conv_kernel lets a text see what comes later"):
        make(ffn=EXPERTS | {"conv_kernel": 3})(pixels, text, causal_text=True)
    make(ffn=EXPERTS | {"conv_kernel": 1})(pixels, text, causal_text=True)


def test_what_a_cache_cannot_hold_is_refused():
    encoder, cache = make().eval(), KeyValueCache()
    pixels, text, padding = inputs(images=4)
    with pytest.raises(ConfigError, match="text_padding: texts in a cache have none"):
        encoder(pixels, text, text_padding=padding, cache=cache)
    encoder(pixels, text, cache=cache)
    with pytest.raises(ConfigError, match="images: given again, but the cache holds 4"):
        encoder(pixels, text, cache=cache)
    with pytest.raises(ConfigError, match="num_pairs: not given for 4 images and 2 texts"):
        encoder(text=text[:2], cache=cache)
    with pytest.raises(ConfigError, match="max_text_len: a text of 11 tokens for 10 positions"):
        encoder(text=text[:, :4], cache=cache)


def test_inputs_for_a_missing_branch_are_refused():
    with pytest.raises(ConfigError, match="modalities: image only, got text"):
        make(modalities=("image",))(text=inputs()[1])


def test_the_constructor_takes_the_fields_of_its_section():
    assert list(inspect.signature(Encoder.__init__).parameters)[1:] == list(EncoderConfig.model_fields)


def test_bfloat16_autocast_stays_near_float32():
    encoder = make(ffn={"kind": "dense"}).float().eval()
    pixels, text, padding = inputs()
    want = encoder(pixels.float(), text, text_padding=padding, num_pairs=2)
    for train in (False, True):
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(train):
            got = encoder(pixels.float(), text, text_padding=padding, num_pairs=2)
        torch.testing.assert_close(got.image, want.image, rtol=0, atol=0.1, check_dtype=False)
