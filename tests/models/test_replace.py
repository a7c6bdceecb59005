from __future__ import annotations

import copy
import logging
import warnings

import pytest
import safetensors.torch
import timm
import torch
from torch import nn

import mhmoe_vl
from mhmoe_vl.errors import ConfigError
from mhmoe_vl.models.replace import TensorFFN, collect_aux_losses, replace_mlps

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from open_clip.model import CLIP
    from open_clip.transformer import VisionTransformer

OPTIONS = {"num_experts": 4, "hidden_dim": 16, "num_subtokens": 2}


def timm_vit():
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=4, embed_dim=24, num_heads=3, num_classes=5
    )


def clip_tower():
    torch.manual_seed(0)
    return VisionTransformer(
        image_size=32, patch_size=8, width=24, layers=4, heads=3, mlp_ratio=4.0, output_dim=5, output_tokens=False
    )


def clip():
    torch.manual_seed(0)
    vision = {"layers": 3, "width": 24, "head_width": 8, "patch_size": 8, "image_size": 32}
    text = {"context_length": 7, "vocab_size": 30, "width": 16, "heads": 2, "layers": 2}
    return CLIP(8, vision, text)


MODELS = {"timm": timm_vit, "open_clip": clip_tower}
BLOCKS = {"timm": "blocks", "open_clip": "transformer.resblocks"}
images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
labels = torch.tensor([0, 1, 2, 3, 4, 0])


@pytest.fixture(params=MODELS)
def library(request):
    return request.param


def replaced(model):
    return [name for name, module in model.named_modules() if isinstance(module, TensorFFN)]


def mlps(model, library):
    return [block.mlp for block in model.get_submodule(BLOCKS[library])]


def test_every_second_block_is_replaced_in_place(library, caplog):
    model = MODELS[library]()
    with caplog.at_level(logging.INFO, "mhmoe_vl"):
        assert replace_mlps(model, every=2, **OPTIONS) is model
    assert replaced(model) == [f"{BLOCKS[library]}.{i}.mlp" for i in (1, 3)]
    assert "replaced 2 MLPs by mh_moe" in caplog.text
    # Given the same options, every=1 does the other two: a second call leaves what stands.
    before = [id(module) for module in mlps(model, library)]
    replace_mlps(model, every=1, **OPTIONS)
    after = [id(module) for module in mlps(model, library)]
    assert len(replaced(model)) == 4
    assert (after[1], after[3]) == (before[1], before[3])


def test_blocks_that_stay_compute_what_they_did(library):
    original = MODELS[library]().eval()
    model = replace_mlps(copy.deepcopy(original), every=2, **OPTIONS).eval()
    x = torch.randn(2, 5, 24)
    for old, new in zip(mlps(original, library)[::2], mlps(model, library)[::2], strict=True):
        torch.testing.assert_close(new(x), old(x), rtol=0, atol=0)
    kept = {name: p for name, p in original.named_parameters() if name in dict(model.named_parameters())}
    changed = [name for name, p in kept.items() if not torch.equal(p, model.get_parameter(name))]
    assert changed == []
    assert len(kept) == len(list(original.named_parameters())) - 2 * 4
    blocks = model.get_submodule(BLOCKS[library])
    old_blocks = original.get_submodule(BLOCKS[library])
    torch.testing.assert_close(blocks[0](x), old_blocks[0](x), rtol=0, atol=0)
    assert not torch.allclose(blocks[1](x), old_blocks[1](x))


def test_a_replaced_model_learns(library):
    model = replace_mlps(MODELS[library](), every=2, **OPTIONS).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    history = []
    for _ in range(25):
        with collect_aux_losses(model) as losses:
            loss = nn.functional.cross_entropy(model(images), labels)
        (loss + 0.01 * losses.balance_loss + 0.001 * losses.z_loss).backward()
        routers = [p.grad for name, p in model.named_parameters() if ".router." in name]
        assert len(routers) == 2
        assert all(grad.abs().sum() > 0 for grad in routers)
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.item())
    assert history[-1] < 0.6 * history[0]


@pytest.mark.parametrize("kind", ["moe", "mh_moe", "dense"])
def test_weights_survive_a_file(library, kind, tmp_path):
    options = {name: OPTIONS[name] for name in {"moe": ["num_experts"], "mh_moe": OPTIONS, "dense": []}[kind]}
    model = replace_mlps(MODELS[library](), kind=kind, **options).eval()
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    other = replace_mlps(MODELS[library](), kind=kind, **options).eval()
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    other.load_state_dict(safetensors.torch.load_file(tmp_path / "model.safetensors"))
    torch.testing.assert_close(other(images), model(images), rtol=0, atol=0)


def test_losses_are_means_over_layers(library):
    model = replace_mlps(MODELS[library](), **OPTIONS).eval()
    layers = [module.ffn for module in model.modules() if isinstance(module, TensorFFN)]
    seen = {}
    handles = [
        layer.register_forward_hook(lambda module, args, output: seen.__setitem__(module, output.aux_losses))
        for layer in layers
    ]
    with collect_aux_losses(model) as losses:
        model(images)
    for handle in handles:
        handle.remove()
    for name in ("balance_loss", "z_loss"):
        expected = sum(seen[layer][name] for layer in layers) / 2
        torch.testing.assert_close(getattr(losses, name), expected)


def test_routing_comes_on_request(library):
    model = replace_mlps(MODELS[library](), top_k=2, **OPTIONS).eval()
    with collect_aux_losses(model) as losses:
        model(images)
    assert losses.routing == []
    with collect_aux_losses(model, routing=True) as losses:
        model(images)
    # 16 patches and the class token of six images, in two pieces each.
    assert [routing.experts.shape for routing in losses.routing] == [(6 * 17 * 2, 2)] * 2


def test_nothing_stays_on_the_modules(library):
    model = replace_mlps(MODELS[library](), **OPTIONS).eval()

    def state():
        return [
            (name, set(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks), len(m._forward_hooks_with_kwargs))
            for name, m in model.named_modules()
        ]

    before, expected = state(), model(images)
    with pytest.raises(ZeroDivisionError), collect_aux_losses(model, routing=True) as losses:
        torch.testing.assert_close(model(images), expected, rtol=0, atol=0)
        raise ZeroDivisionError
    assert state() == before
    number = len(losses.routing)
    model(images)
    assert len(losses.routing) == number


def test_both_towers_of_a_clip_model():
    model = replace_mlps(clip(), every=1, **OPTIONS).eval()
    assert len(replaced(model)) == 5
    text = torch.randint(1, 30, (6, 7))
    with collect_aux_losses(model, routing=True) as losses:
        model(images, text)
    assert len(losses.routing) == 5
    assert losses.balance_loss.item() > 0
    # Blocks are counted per tower: the second of three, the second of two.
    assert replaced(replace_mlps(clip(), every=2, **OPTIONS)) == [
        "visual.transformer.resblocks.1.mlp",
        "transformer.resblocks.1.mlp",
    ]


def test_sequence_first_towers_are_routed_batch_first():
    tower = clip_tower()
    for block in tower.transformer.resblocks:
        block.attn.batch_first = False
    tower.transformer.batch_first = False
    options = {**OPTIONS, "conv_kernel": 3}
    model = replace_mlps(tower, **options).eval()
    layer = model.transformer.resblocks[1].mlp
    x = torch.randn(2, 5, 24)
    # A convolution over tokens tells the axes apart.
    torch.testing.assert_close(layer(x.transpose(0, 1)).transpose(0, 1), layer.ffn(x).x)
    assert model(images).shape == (6, 5)


def test_swiglu_of_timm_is_found_and_pooling_heads_stay():
    options = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 3}
    eva = timm.create_model("eva02_tiny_patch14_224", **options)
    assert replaced(replace_mlps(eva, **OPTIONS)) == ["blocks.1.mlp"]
    siglip = timm.create_model("vit_base_patch16_siglip_224", **options)
    replace_mlps(siglip, every=1, **OPTIONS)
    assert replaced(siglip) == ["blocks.0.mlp", "blocks.1.mlp"]


def test_new_layers_take_the_dtype_and_mode_of_the_old_ones():
    model = replace_mlps(timm_vit().bfloat16().eval(), **OPTIONS)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(module.training for module in model.modules())


def test_dense_layers_have_no_losses():
    model = replace_mlps(timm_vit(), kind="dense")
    with collect_aux_losses(model) as losses:
        model(images)
    assert (float(losses.balance_loss), float(losses.z_loss)) == (0, 0)


def test_mistakes_name_the_remedy():
    with pytest.raises(ConfigError, match="ResNet: no MLP to replace in blocks 2, 4"):
        replace_mlps(timm.create_model("resnet10t"))
    with pytest.raises(ConfigError, match="every: 0"):
        replace_mlps(timm_vit(), every=0)
    with pytest.raises(ConfigError, match="holds no replaced layers"), collect_aux_losses(timm_vit()):
        pass
    model = replace_mlps(timm_vit(), **OPTIONS)
    with collect_aux_losses(model) as losses:
        pass
    with pytest.raises(ConfigError, match="balance_loss: no replaced layer has run"):
        losses.balance_loss.item()


def test_a_wrong_option_changes_nothing():
    model = timm_vit()
    with pytest.raises(ConfigError):
        replace_mlps(model, num_subtokens=5)
    with pytest.raises(ConfigError):
        replace_mlps(model, heads=2)
    assert replaced(model) == []


def test_names_are_exported():
    assert mhmoe_vl.replace_mlps is replace_mlps
    assert mhmoe_vl.collect_aux_losses is collect_aux_losses
