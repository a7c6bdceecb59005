from __future__ import annotations

import torch
from torch import nn

from mhmoe_vl.nn.cache import KeyValueCache


def streams(num_images, image_tokens, num_texts, text_tokens):
    return {"image": torch.randn(num_images, 2, image_tokens, 3), "text": torch.randn(num_texts, 2, text_tokens, 3)}


def test_an_empty_cache_holds_nothing():
    cache = KeyValueCache()
    assert (cache.num_images, cache.text_length) == (0, 0)


def test_new_tokens_stand_behind_the_old_ones_of_their_layer():
    cache, layers = KeyValueCache(), [nn.Identity(), nn.Identity()]
    first = [(streams(2, 5, 2, 3), streams(2, 5, 2, 3)) for _ in layers]
    second = [(streams(2, 0, 2, 1), streams(2, 0, 2, 1)) for _ in layers]
    for layer, given in zip(layers, first, strict=True):
        assert cache.extend(layer, *given) == given
    for layer, old, new in zip(layers, first, second, strict=True):
        for found, before, added in zip(cache.extend(layer, *new), old, new, strict=True):
            assert torch.equal(found["image"], before["image"])
            assert torch.equal(found["text"], torch.cat([before["text"], added["text"]], dim=2))
    assert (cache.num_images, cache.text_length) == (2, 4)


def test_text_is_cut_and_samples_are_chosen():
    cache, layer = KeyValueCache(), nn.Identity()
    keys, values = streams(3, 5, 3, 4), streams(3, 5, 3, 4)
    cache.extend(layer, dict(keys), dict(values))
    cache.cut_text(2)
    cache.select(torch.tensor([2, 2, 0, 1]))
    assert (cache.num_images, cache.text_length) == (4, 2)
    for found, old in zip(cache.extend(layer, streams(4, 0, 4, 0), streams(4, 0, 4, 0)), (keys, values), strict=True):
        assert torch.equal(found["image"], old["image"][[2, 2, 0, 1]])
        assert torch.equal(found["text"], old["text"][[2, 2, 0, 1], :, :2])


def test_an_image_is_kept_once_for_all_its_texts():
    """Beams of an image share its keys: one copy a layer, not one a beam."""
    cache, layer = KeyValueCache(), nn.Identity()
    keys, values = streams(2, 5, 2, 1), streams(2, 5, 2, 1)
    cache.extend(layer, keys, values)
    kept = keys["image"].data_ptr()
    for index in ([0, 0, 0, 1, 1, 1], [2, 0, 1, 5, 5, 3]):
        cache.select(torch.tensor(index))
        found, _ = cache.extend(layer, streams(6, 0, 6, 1), streams(6, 0, 6, 1))
        assert torch.equal(found["image"], keys["image"][[0, 0, 0, 1, 1, 1]])
        assert [s["image"].shape[0] for s in cache._all_streams()] == [2, 2]
    assert cache._layers[layer][0]["image"].data_ptr() == kept


def test_a_text_alone_has_no_image_to_hold():
    cache = KeyValueCache()
    cache.extend(nn.Identity(), {"text": torch.randn(1, 2, 4, 3)}, {"text": torch.randn(1, 2, 4, 3)})
    assert (cache.num_images, cache.text_length) == (0, 4)
