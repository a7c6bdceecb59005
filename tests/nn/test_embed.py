from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mhmoe_vl.errors import ConfigError
from mhmoe_vl.nn.embed import ImageEmbedding, TextEmbedding, resize_positions


def image_embedding(img_size=(4, 6)):
    torch.manual_seed(0)
    return ImageEmbedding(5, img_size=img_size, patch_size=2).double()


def test_tokens_are_projected_patches_in_reading_order_with_positions():
    embed = image_embedding()
    image = torch.randn(1, 3, 4, 6).double()
    tokens = embed(image)
    assert tokens.shape == (1, 1 + 2 * 3, 5)
    for row in range(2):
        for column in range(3):
            pixels = image[0, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten()
            index = 1 + 3 * row + column
            want = embed.proj.weight.flatten(1) @ pixels + embed.proj.bias + embed.pos_embed[0, index]
            torch.testing.assert_close(tokens[0, index], want)
    torch.testing.assert_close(tokens[0, 0], embed.cls_token[0, 0] + embed.pos_embed[0, 0])


def test_a_masked_patch_is_the_mask_token_plus_its_position():
    embed = image_embedding()
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[1, 4] = True
    image = torch.randn(2, 3, 4, 6).double()
    plain, masked = embed(image), embed(image, mask)
    torch.testing.assert_close(masked[1, 5], embed.mask_token[0, 0] + embed.pos_embed[0, 5])
    keep = torch.ones(2, 7, dtype=torch.bool)
    keep[1, 5] = False
    assert torch.equal(plain[keep], masked[keep])


def test_positions_of_another_size_are_a_bicubic_resize_of_the_grid():
    positions = torch.randn(1, 1 + 4 * 4, 3)
    resized = resize_positions(positions, (6, 5), (4, 4))
    grid = positions[0, 1:].reshape(4, 4, 3).permute(2, 0, 1)[None]
    want = F.interpolate(grid, size=(6, 5), mode="bicubic", antialias=True)[0].permute(1, 2, 0).reshape(30, 3)
    torch.testing.assert_close(resized[0, 1:], want)
    assert torch.equal(resized[0, 0], positions[0, 0])
    assert resize_positions(positions, (4, 4), (4, 4)) is positions


def test_equal_numbers_of_patches_in_another_shape_are_resized_too():
    positions = torch.randn(1, 1 + 2 * 8, 3)
    assert not torch.equal(resize_positions(positions, (4, 4), (2, 8)), positions)


def test_non_square_images_of_any_size():
    assert image_embedding((4, 4))(torch.randn(2, 3, 6, 10).double()).shape == (2, 1 + 15, 5)


def test_image_sizes_are_whole_patches():
    with pytest.raises(ConfigError, match="img_size: 5 x 6 pixels are not whole patches of 2"):
        ImageEmbedding(5, img_size=(5, 6), patch_size=2)


def test_text_tokens_are_rows_plus_positions_and_padding_is_zero():
    torch.manual_seed(0)
    embed = TextEmbedding(5, vocab_size=7, max_text_len=4)
    text = torch.tensor([[6, 0, 3]])
    tokens = embed(text, torch.tensor([[False, False, True]]))
    torch.testing.assert_close(tokens[0, 1], embed.tokens.weight[0] + embed.pos_embed[0, 1])
    assert not tokens[0, 2].any()
    torch.testing.assert_close(embed(text)[0, 2], embed.tokens.weight[3] + embed.pos_embed[0, 2])
    torch.testing.assert_close(embed(text[:, 1:], start=1), embed(text)[:, 1:])


def test_text_longer_than_the_positions_is_refused():
    with pytest.raises(ConfigError, match="a text of 5 tokens for 4 positions"):
        TextEmbedding(5, vocab_size=7, max_text_len=4)(torch.zeros(1, 2, dtype=torch.long), start=3)


def test_embeddings_start_small():
    torch.manual_seed(0)
    image, text = ImageEmbedding(64, img_size=(32, 32), patch_size=4), TextEmbedding(64, vocab_size=99, max_text_len=9)
    for parameter in (image.pos_embed, image.proj.weight, text.tokens.weight, text.pos_embed):
        assert parameter.std().item() == pytest.approx(0.02, rel=0.1)
