"""An encoder whose routing is known: sub-token 0 goes by colour or word, sub-token 1 by place.

Width 8, two blocks, two sub-tokens, four experts, top 2. Attention and experts add nothing, so both blocks see the
embedding; block 1 numbers its experts the other way round. Axes 0 to 2 hold a patch's red, green and blue, axis 3 the
class token, axes 4 to 7 the quarter of the picture (2, and 1 on the next axis).
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mhmoe_vl.config import EncoderConfig
from mhmoe_vl.data.text import create_text_tokenizer
from mhmoe_vl.models.encoder import Encoder
from mhmoe_vl.models.factory import build_encoder

SIDE, PATCH, GRID = 32, 8, 4
RGB = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
CHANNEL = {"red": 0, "green": 1, "blue": 2}
WORD, DOG = (0, 1), (2, 1)
"""First and second axis of sub-token 0 of every text token, and of "dog"."""


def known_encoder(**changes) -> Encoder:
    """The encoder; ``changes`` go to its configuration."""
    ffn = {"kind": "mh_moe", "num_experts": 4, "hidden_dim": 4, "top_k": 2, "num_subtokens": 2}
    sizes = {"embed_dim": 8, "depth": 2, "num_heads": 1, "img_size": SIDE, "patch_size": PATCH, "moe_every": 1}
    values = {**sizes, "vocab_size": 49410, "max_text_len": 8, "ffn": ffn, **changes}
    encoder = build_encoder(EncoderConfig.model_validate(values))
    with torch.no_grad():
        _set(encoder)
    return encoder.eval()


def _set(encoder: Encoder) -> None:
    for name, value in encoder.named_parameters():
        if "norm" not in name:
            value.zero_()
    image, text = encoder.image_embed, encoder.text_embed
    for channel in range(3):
        image.proj.weight[channel, channel] = 1 / PATCH**2
    image.cls_token[0, 0, [3, 0, 4, 5]] = torch.tensor([2.0, 1.0, 2.0, 1.0])
    for n in range(GRID**2):
        first, second = quarter_axes(*divmod(n, GRID))
        image.pos_embed[0, 1 + n, 4 + first], image.pos_embed[0, 1 + n, 4 + second] = 2, 1
    (dog,) = create_text_tokenizer("bpe").encode("dog")[1:-1]
    for rows, (first, second) in ((slice(None), WORD), (dog, DOG)):
        text.tokens.weight[rows] = 0
        text.tokens.weight[rows, first], text.tokens.weight[rows, second] = 2, 1
        text.tokens.weight[rows, 4 + first], text.tokens.weight[rows, 4 + second] = 2, 1
    for block, layer in enumerate(encoder.blocks):
        for pool in layer.ffn.values():
            pool.head_proj.weight.copy_(torch.eye(8))
            pool.routed.router.weight.copy_(torch.eye(4) if block == 0 else torch.eye(4).flip(0))


def quarter_axes(row: int, column: int) -> tuple[int, int]:
    """First and second axis of sub-token 1 of a patch."""
    quarter = 2 * (row // 2) + column // 2
    return quarter, (quarter + 1) % 4


def known_choices(colors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the patches of a picture must do: experts (blocks, 16, sub-tokens, 2) and gates alike, from the axes."""
    experts, gates = np.zeros((2, GRID**2, 2, 2), int), np.zeros((2, GRID**2, 2, 2))
    for n, color in enumerate(colors.ravel()):
        axes = np.full(8, 0.0)
        axes[:3] = -1
        axes[CHANNEL[color]] = 1
        first, second = quarter_axes(*divmod(n, GRID))
        axes[4 + first], axes[4 + second] = 2, 1
        axes = (axes - axes.mean()) / np.sqrt(axes.var() + 1e-5)
        wanted = ((CHANNEL[color], 3), (first, second))
        for sub, pair in enumerate(wanted):
            weights = np.exp(axes[[4 * sub + axis for axis in pair]])
            for block in range(2):
                experts[block, n, sub] = [3 - axis if block else axis for axis in pair]
                gates[block, n, sub] = weights / weights.sum()
    return experts, gates


def picture(colors: np.ndarray) -> bytes:
    """A PNG with a patch of each colour."""
    pixels = np.array([[RGB[color] for color in row] for row in colors], np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels.repeat(PATCH, 0).repeat(PATCH, 1)).save(file, "png")
    return file.getvalue()


def drawn_colors(seed: int = 0) -> np.ndarray:
    """Names of colours (4, 4), drawn by ``seed``."""
    return np.random.default_rng(seed).choice(list(RGB), size=(GRID, GRID))


def write_run(folder: Path, **changes) -> Path:
    """The encoder saved as a folder, with two pictures beside it in ``pictures/``."""
    known_encoder(**changes).save_pretrained(folder / "saved")
    (folder / "pictures").mkdir()
    for number in range(2):
        (folder / "pictures" / f"{number}.png").write_bytes(picture(drawn_colors(number)))
    return folder / "saved"
