"""Visual tokenizer (VQ-KD, BEiT v2): turns each patch of a picture into one code of a learned codebook.

A ViT encoder describes every patch, the nearest code replaces the description, and a small ViT decoder
must tell from the codes alone what a teacher says about the patches.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.models.beit import Beit
from torch import Tensor, nn

from .. import config
from ..distributed import all_reduce_sum, rank
from ..errors import CheckpointError, ConfigError, one_line
from .convert_vqkd import from_published, read_weights, sizes_of

KMEANS_ITERATIONS = 10
RUN_PREFIX = "tokenizer."
"""what stands before a tokenizer's parameter names in the checkpoint of a training run"""
_PARTS = ("ema", "model")  # the moving average of the weights first, where one was kept


class Codebook(nn.Module):
    """Unit vectors, looked up by cosine and moved by averages instead of gradients.

    For rows ``z`` (L2-normalised here) and codes ``v``: ``token = argmax_k <z, v_k>``. In training the codes
    start from k-means on the first rows and then follow ``v_k <- l2(decay * v_k + (1 - decay) * l2(sum of the
    rows that chose k))``; a code without rows stays, and after ``revive_after`` calls without rows it is
    replaced by a row of the batch, drawn with probability proportional to its distance from its code. Statistics are
    sums over ranks and draws are rank 0's, so all ranks hold the same codes. All state is in buffers.

    Args:
        num_codes: number of codes K.
        code_dim: width of a code.
        ema_decay: of the moving average, in [0, 1].
        revive_after: training calls without use after which a code is replaced; 0 never.
    """

    def __init__(self, num_codes: int, *, code_dim: int, ema_decay: float, revive_after: int) -> None:
        super().__init__()
        self.ema_decay = ema_decay
        self.revive_after = revive_after
        self.register_buffer("weight", F.normalize(torch.randn(num_codes, code_dim), dim=-1))
        self.register_buffer("unused_steps", torch.zeros(num_codes, dtype=torch.int64))
        self.register_buffer("initialized", torch.tensor(False))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes of ``z``, with the straight-through gradient, and the codebook's own learning when training.

        Args:
            z: (..., code_dim), any scale.

        Returns:
            tokens (...) int64; codes (..., code_dim) whose gradient goes to ``z`` unchanged; squared distance
            between normalised row and code, averaged over code_dim, (...), with gradient to ``z`` only.
        """
        with torch.autocast(z.device.type, enabled=False):  # neighbours decided in bfloat16 would be other ones
            z = F.normalize(z.float(), dim=-1)
            rows = z.detach().flatten(0, -2)
            finite = rows.isfinite().all(-1)  # a step that overflowed must not spoil the codes
            if self.training and not self.initialized:
                self._start(rows[finite])
            tokens = self._nearest(rows)
            codes = self.weight[tokens].view_as(z)
            if self.training:
                self._update(rows[finite], tokens[finite])
            distance = (z - codes).square().mean(-1)
            return tokens.view(z.shape[:-1]), z + (codes - z).detach(), distance

    def assign(self, z: Tensor) -> Tensor:
        """Tokens (...) int64 of ``z`` (..., code_dim); never changes the codebook."""
        with torch.autocast(z.device.type, enabled=False):
            rows = F.normalize(z.detach().float(), dim=-1).flatten(0, -2)
            return self._nearest(rows).view(z.shape[:-1])

    def _nearest(self, rows: Tensor) -> Tensor:
        return (rows @ self.weight.T).argmax(-1)

    @torch.no_grad()
    def _start(self, rows: Tensor) -> None:
        """k-means by cosine, from randomly drawn rows."""
        self.weight.copy_(self._draw(rows, torch.ones_like(rows[:, 0]), replacement=False))
        for _ in range(KMEANS_ITERATIONS):
            self.weight.copy_(self._means(rows, self._nearest(rows))[0])
        self.initialized.fill_(True)

    @torch.no_grad()
    def _update(self, rows: Tensor, tokens: Tensor) -> None:
        means, used = self._means(rows, tokens)
        moved = F.normalize(torch.lerp(means, self.weight, self.ema_decay), dim=-1)
        errors = 1 - (rows * self.weight[tokens]).sum(-1)
        self.weight.copy_(torch.where(used[:, None], moved, self.weight))
        self.unused_steps.add_(1).masked_fill_(used, 0)
        if self.revive_after:
            dead = self.unused_steps >= self.revive_after
            fresh = self._draw(rows, errors.clamp_min(1e-6), replacement=True)
            self.weight.copy_(torch.where(dead[:, None], fresh, self.weight))
            self.unused_steps.masked_fill_(dead, 0)

    def _means(self, rows: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Mean direction of each code's rows over all ranks (the code itself without rows), and which have rows."""
        counts = all_reduce_sum(torch.bincount(tokens, minlength=len(self.weight)).float())
        sums = all_reduce_sum(torch.zeros_like(self.weight).index_add_(0, tokens, rows))
        used = counts > 0
        return torch.where(used[:, None], F.normalize(sums, dim=-1), self.weight), used

    def _draw(self, rows: Tensor, weights: Tensor, *, replacement: bool) -> Tensor:
        """As many of rank 0's rows as there are codes, drawn by ``weights``; the same on all ranks."""
        num_codes = len(self.weight)
        if len(rows):
            chosen = torch.multinomial(weights, num_codes, replacement=replacement or len(rows) < num_codes)
            drawn = rows[chosen]
        else:
            drawn = self.weight
        return all_reduce_sum(drawn if rank() == 0 else torch.zeros_like(drawn))


class VisualTokenizerOutput(NamedTuple):
    """What :class:`VisualTokenizer` returns.

    Attributes:
        tokens: (B, P) int64.
        reconstruction: (B, P, target_dim), the decoder's guess of the teacher's features.
        commitment_loss: (B, P), commitment_weight times the mean squared distance between normalised row and code.
    """

    tokens: Tensor
    reconstruction: Tensor
    commitment_loss: Tensor


class VisualTokenizer(nn.Module):
    """VQ-KD (BEiT v2, section 2.1): ViT encoder, codebook of unit vectors, ViT decoder.

    Both ViTs are timm's ``Beit`` with absolute positions, and both heads are ``Linear, tanh, Linear``.

    Args:
        img_size: side of the square picture, pixels.
        patch_size: side of a patch, pixels.
        embed_dim, depth, num_heads: of the encoder.
        decoder_embed_dim, decoder_depth, decoder_num_heads: of the decoder.
        num_codes, code_dim, ema_decay, revive_after: of the :class:`Codebook`.
        target_dim: width of the teacher's features.
        commitment_weight: factor of the commitment loss (the paper's beta).

    Raises:
        ConfigError: patches do not tile the picture, or attention heads do not divide a width.
    """

    def __init__(
        self,
        img_size: int,
        *,
        patch_size: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        decoder_embed_dim: int,
        decoder_depth: int,
        decoder_num_heads: int,
        num_codes: int,
        code_dim: int,
        target_dim: int,
        ema_decay: float,
        commitment_weight: float,
        revive_after: int,
    ) -> None:
        super().__init__()
        _check_divides("patch_size", patch_size, "img_size", img_size)
        _check_divides("num_heads", num_heads, "embed_dim", embed_dim)
        _check_divides("decoder_num_heads", decoder_num_heads, "decoder_embed_dim", decoder_embed_dim)
        self.img_size = img_size
        self.patch_size = patch_size
        self.grid_size = img_size // patch_size
        self.commitment_weight = commitment_weight
        self.encoder = _vit(img_size, patch_size, 3, embed_dim, depth, num_heads)
        self.encoder_head = _head(embed_dim, code_dim)
        self.codebook = Codebook(num_codes, code_dim=code_dim, ema_decay=ema_decay, revive_after=revive_after)
        self.decoder = _vit(self.grid_size, 1, code_dim, decoder_embed_dim, decoder_depth, decoder_num_heads)
        self.decoder_head = _head(decoder_embed_dim, target_dim)

    @property
    def num_codes(self) -> int:
        """Number of codes; tokens are smaller."""
        return len(self.codebook.weight)

    def forward(self, images: Tensor) -> VisualTokenizerOutput:
        """Tokens, reconstruction and commitment loss of ``images`` (B, 3, img_size, img_size) in [0, 1]."""
        tokens, codes, distance = self.codebook(self._encode(images))
        return VisualTokenizerOutput(tokens, self.decode(codes), self.commitment_weight * distance)

    @torch.no_grad()
    def tokenize(self, images: Tensor) -> Tensor:
        """Tokens (B, P) int64, patches row by row, of ``images`` (B, 3, img_size, img_size) in [0, 1]."""
        return self.codebook.assign(self._encode(images))

    def decode(self, codes: Tensor) -> Tensor:
        """Reconstruction (B, P, target_dim) from code vectors (B, P, code_dim)."""
        grid = codes.transpose(1, 2).unflatten(2, (self.grid_size, self.grid_size))
        return self.decoder_head(_patch_features(self.decoder, grid))

    def _encode(self, images: Tensor) -> Tensor:
        return self.encoder_head(_patch_features(self.encoder, images * 2 - 1))


def load_visual_tokenizer(path: str | Path, *, num_heads: int | None = None) -> VisualTokenizer:
    """A frozen tokenizer in evaluation mode, from a training run or a published checkpoint.

    Args:
        path: run folder (its best weights, or the last where there are no best), or a file with BEiT v2's key
            names: .safetensors, or .pth and the like, read without unpickling code. Sizes come from the shapes.
        num_heads: attention heads of a published checkpoint's encoder and decoder, which no shape shows;
            none means 64 wide ones.

    Raises:
        CheckpointError: the file is missing, unreadable, or not a visual tokenizer.
    """
    path = Path(path)
    try:
        if path.is_dir():
            options, state = _read_run(path)
        else:
            state = from_published(read_weights(path), path)
            options = sizes_of(state, num_heads=num_heads)
        tokenizer = VisualTokenizer(**options)
        tokenizer.load_state_dict(state)
    except (RuntimeError, ValueError) as error:
        problem = one_line(error, 160)
        raise CheckpointError(f"{path}: does not fit a visual tokenizer: {problem} (name another one)") from error
    return tokenizer.eval().requires_grad_(False)


def _read_run(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    file = folder / "config.yaml"
    section = config.read_yaml(file).get("task", {})
    options = config.validate(config.VisualTokenizerTaskConfig, section, f"{file}: task").model.model_dump()
    weights = [folder / "checkpoints" / step / f"{part}.safetensors" for step in ("best", "last") for part in _PARTS]
    state = read_weights(next((path for path in weights if path.exists()), weights[-1]))
    return options, {name.removeprefix(RUN_PREFIX): value for name, value in state.items()}


def _check_divides(part: str, small: int, whole: str, large: int) -> None:
    if large % small:
        raise ConfigError(f"{whole} {large} is not a multiple of {part} {small} (change one of them)")


def _vit(img_size: int, patch_size: int, channels: int, embed_dim: int, depth: int, num_heads: int) -> Beit:
    return Beit(
        img_size=img_size,
        patch_size=patch_size,
        in_chans=channels,
        num_classes=0,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )


def _head(dim: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, out_dim))


def _patch_features(vit: Beit, x: Tensor) -> Tensor:
    if not len(x):  # which timm's attention cannot reshape
        return x.new_empty(0, vit.patch_embed.num_patches, vit.embed_dim)
    for block in vit.blocks:  # on processors the plain product trains up to twice as fast as the fused one
        block.attn.fused_attn = x.device.type != "cpu"
    return vit.fc_norm(vit.forward_features(x)[:, 1:])
