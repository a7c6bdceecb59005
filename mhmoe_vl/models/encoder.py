"""BEiT-3's multiway Transformer over images, texts and image-text pairs, with layers of experts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..checks import check_blocks
from ..errors import ConfigError
from ..nn.block import Block
from ..nn.cache import KeyValueCache
from ..nn.embed import ImageEmbedding, TextEmbedding
from ..nn.feed_forward import FFNLayer, FFNOutput
from ..nn.multiway import MODALITIES, Multiway, Streams
from ..nn.router import Routing, RoutingStats
from ..nn.windows import Windows


class EncoderOutput(NamedTuple):
    """What :class:`Encoder` returns.

    Attributes:
        image: ``(I, 1 + P, D)``, class token first, or none.
        text: ``(T, L, D)``, or none.
        aux_losses: ``balance_loss`` and ``z_loss``, each the mean over all pools of experts; empty when dense.
        stats: one per pool, in the order of :attr:`Encoder.moe_names`.
        routing: one per pool, when asked for.
    """

    image: Tensor | None
    text: Tensor | None
    aux_losses: dict[str, Tensor]
    stats: list[RoutingStats]
    routing: list[Routing] | None


class Encoder(nn.Module, PyTorchModelHubMixin, library_name="mhmoe_vl", tags=["vision-language", "mixture-of-experts"]):
    """Pre-norm multiway Transformer with sub-LN (BEiT-3, Wang et al. 2022; Magneto, Wang et al. 2022).

    Image and text tokens stay separate tensors; the attention of a pair sees both. Block ``i`` (from 0) carries
    ``ffn`` where ``(i + 1) % moe_every == 0``, the others ``dense_ffn``; a dense ``ffn`` stands in every block.
    Value, output and feed-forward matrices start Xavier-normal times ``sqrt(ln(2 * depth))`` where a sub-LN follows,
    embeddings normal with 0.02; experts and routers keep their layer's own initialisation.

    Args:
        embed_dim: token width D.
        depth: blocks.
        num_heads: attention heads.
        img_size: pixels, or (height, width), that image positions are stored for; others are resized to.
        patch_size: side of a patch in pixels.
        vocab_size: rows of the text embedding.
        max_text_len: text positions.
        modalities: branches to build, of ``image`` and ``text``.
        multiway: ``decoupled`` (norms, attention and feed-forward layers per modality), ``shared_attention``
            (feed-forward layers per modality) or ``shared``.
        vl_ffn_layers: top blocks with one more feed-forward layer for pairs (``shared_attention``).
        ffn: ``kind`` and options of the feed-forward layer under study.
        dense_ffn: the same for the blocks without experts.
        moe_every: distance of blocks with experts.
        expert_pool: ``joint`` or ``per_modality`` pools of experts.
        attention_sub_ln: LayerNorm before the attention's output projection.
        drop_path: largest rate, growing linearly with depth.
        dropout: rate on embeddings and on the output of every sub-layer.
        final_norm: LayerNorm after the last block.
        norm_eps: epsilon of every LayerNorm.
        grad_checkpointing: recompute blocks in the backward pass to save memory.

    Attributes:
        moe_names: pools of experts, ``blocks.<i>.<joint | image | text | pair>``. Stream 0 of a pool that several
            modalities pass is the first of ``modalities``.

    Raises:
        ConfigError: options that do not fit each other.
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        depth: int,
        num_heads: int,
        img_size: int | Sequence[int],
        patch_size: int,
        vocab_size: int,
        max_text_len: int,
        modalities: Sequence[str],
        multiway: str,
        vl_ffn_layers: int,
        ffn: Mapping[str, Any],
        dense_ffn: Mapping[str, Any],
        moe_every: int,
        expert_pool: str,
        attention_sub_ln: bool,
        drop_path: float,
        dropout: float,
        final_norm: bool,
        norm_eps: float,
        grad_checkpointing: bool,
    ) -> None:
        super().__init__()
        sparse = ffn["kind"] != "dense"
        check_blocks(
            modalities=modalities,
            multiway=multiway,
            vl_ffn_layers=vl_ffn_layers,
            depth=depth,
            sparse=sparse,
            moe_every=moe_every,
            expert_pool=expert_pool,
        )
        self.embed_dim = embed_dim
        self.num_features = embed_dim
        self.vocab_size = vocab_size
        self.max_text_len = max_text_len
        self.patch_size = patch_size
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        self.modalities = tuple(name for name in MODALITIES if name in modalities)
        self.norm_eps = norm_eps
        self.grad_checkpointing = grad_checkpointing
        self._mixes_tokens = ffn.get("conv_kernel") not in (None, 1)

        if "image" in self.modalities:
            self.image_embed = ImageEmbedding(embed_dim, img_size=self.img_size, patch_size=patch_size)
        if "text" in self.modalities:
            self.text_embed = TextEmbedding(embed_dim, vocab_size=vocab_size, max_text_len=max_text_len)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList()
        for index in range(depth):
            has_experts = sparse and (index + 1) % moe_every == 0
            self.blocks.append(
                Block(
                    embed_dim,
                    num_heads=num_heads,
                    modalities=self.modalities,
                    shared=multiway != "decoupled",
                    attention_sub_ln=attention_sub_ln,
                    ffn=ffn if has_experts or not sparse else dense_ffn,
                    joint_ffn=multiway == "shared" or (has_experts and expert_pool == "joint"),
                    pair_ffn=index >= depth - vl_ffn_layers,
                    dropout=dropout,
                    drop_path=drop_path * index / max(depth - 1, 1),
                    norm_eps=norm_eps,
                    init_gain=math.sqrt(math.log(2 * depth)),
                )
            )
        self.moe_names = [
            f"blocks.{index}.{pool}"
            for index in range(depth if sparse else 0)
            if (index + 1) % moe_every == 0
            for pool in self.blocks[index].ffn
        ]
        norm = partial(nn.LayerNorm, embed_dim, norm_eps)
        self.norm = Multiway(norm, self.modalities, shared=multiway != "decoupled") if final_norm else nn.Identity()

    # ---------------------------------------------------------------------------------------- forward
    def forward(
        self,
        images: Tensor | None = None,
        text: Tensor | None = None,
        *,
        text_padding: Tensor | None = None,
        image_mask: Tensor | None = None,
        num_pairs: int | None = None,
        return_routing: bool = False,
        causal_text: bool = False,
        cache: KeyValueCache | None = None,
    ) -> EncoderOutput:
        """Features of images, of texts, and of pairs that see each other, in one batch.

        Args:
            images: ``(I, 3, H, W)``, normalised; H and W any multiples of the patch size.
            text: ``(T, L)`` int64 ids.
            text_padding: ``(T, L)`` bool, True = padding; its features mean nothing.
            image_mask: ``(I, P)`` bool, patches that the mask token replaces.
            num_pairs: the last ``num_pairs`` images belong, in order, to the last ``num_pairs`` texts; the others
                stand alone. Default: all, when both are given.
            return_routing: also return where every row of every pool of experts went.
            causal_text: BEiT-3's mask for captioning: images see no text, and a text token sees the image of its
                pair, the tokens before it and itself.
            cache: to encode texts piece by piece, in evaluation; implies ``causal_text``. The first call takes images
                and the first tokens of their texts, later ones the tokens that follow; features of those alone return.

        Raises:
            ConfigError: inputs for a branch that was not built, or that do not fit each other; ``causal_text`` with
                layers of experts that convolve over tokens.
        """
        causal_text = causal_text or cache is not None
        self._check_causal(causal_text, images, text_padding, cache)
        num_cached, start = (0, 0) if cache is None else (cache.num_images, cache.text_length)
        num_pairs = self._count_pairs(images, text, num_pairs, num_cached)
        xs, paddings = self._embed(images, text, text_padding, image_mask, num_cached, start)
        pools: list[FFNOutput] = []
        for block in self.blocks:
            xs, found = self._run(block, xs, paddings, num_pairs, return_routing, causal_text, cache)
            pools += found
        given = {name for name, value in (("image", images), ("text", text)) if value is not None}
        return self._output(xs, given, pools, return_routing)

    def forward_map(
        self,
        images: Tensor,
        *,
        padding: Tensor | None = None,
        window_size: int | None = None,
        num_global_blocks: int = 4,
    ) -> EncoderOutput:
        """Features of patches for detection: no class token, attention in windows, padding that nothing sees.

        An image padded on the right and below has the features of the image alone: positions count from the upper
        left corner, padding is neither attended to nor routed.

        Args:
            images: ``(I, 3, H, W)``, normalised; H and W multiples of the patch size, at most ``img_size``.
            padding: ``(I, P)`` bool, True = patches without any of the image; their features mean nothing.
            window_size: patches to a side of the windows that blocks attend in; none lets every block see all.
            num_global_blocks: evenly spaced blocks, the last one among them, that see all the same.

        Returns:
            ``image (I, P, D)``, row by row.

        Raises:
            ConfigError: images are larger than there are positions, or layers of experts convolve over tokens, which
                would take the end of one row of patches and the start of the next for neighbours.
        """
        self._count_pairs(images, None, None)
        if self._mixes_tokens:
            raise ConfigError("ffn: conv_kernel reads tokens in a row, a map is none (remove it for detection)")
        xs, _ = self._embed(None, None, None, None)
        xs["image"] = self.dropout(self.image_embed.patches(images))
        paddings = {} if padding is None else {"image": padding}
        windows = None
        if window_size is not None:
            windows = Windows(self.image_embed.grid_of(*images.shape[-2:]), window_size)
        seeing_all = {(i + 1) * len(self.blocks) // num_global_blocks - 1 for i in range(num_global_blocks)}
        pools: list[FFNOutput] = []
        for index, block in enumerate(self.blocks):
            here = None if index in seeing_all else windows
            xs, found = self._run(block, xs, paddings, 0, False, False, None, here)
            pools += found
        return self._output(xs, {"image"}, pools)

    def _output(
        self, xs: Streams, given: set[str], pools: list[FFNOutput], return_routing: bool = False
    ) -> EncoderOutput:
        xs = self.norm(xs)
        for name in [name for name in xs if name not in given]:
            # The sum of an empty tensor: an exact zero, through which the branch's parameters get zero gradients.
            xs = {other: x + xs[name].sum() for other, x in xs.items()}
        names = pools[0].aux_losses if pools else ()
        return EncoderOutput(
            image=xs["image"] if "image" in given else None,
            text=xs["text"] if "text" in given else None,
            aux_losses={name: torch.stack([pool.aux_losses[name] for pool in pools]).mean() for name in names},
            stats=[pool.stats for pool in pools],
            routing=[pool.routing for pool in pools] if return_routing else None,
        )

    def forward_features(self, images: Tensor) -> Tensor:
        """Image tokens ``(I, 1 + P, D)`` after the last block, class token first (timm's method)."""
        return self(images).image

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | Sequence[int] | None = None,
        *,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Image features after chosen blocks (timm's method).

        Args:
            images: ``(I, 3, H, W)``, normalised.
            indices: blocks to take: all when none, the last n for a number n.
            return_prefix_tokens: return tuples of the map and the class token ``(I, 1, D)``.
            norm: pass what is taken through the final norm too.
            stop_early: do not compute blocks above the last one taken.
            output_fmt: ``NCHW`` maps ``(I, D, H/p, W/p)`` or ``NLC`` tokens ``(I, P, D)``.
            intermediates_only: return the list alone, not (final tokens, list).
        """
        take = _block_indices(len(self.blocks), indices)
        self._count_pairs(images, None, None)
        xs, paddings = self._embed(images, None, None, None)
        taken: list[Tensor] = []
        for index, block in enumerate(self.blocks[: max(take) + 1] if stop_early else self.blocks):
            xs, _ = self._run(block, xs, paddings, 0, False)
            if index in take:
                taken.append(self.norm(xs)["image"] if norm else xs["image"])
        maps = [tokens[:, 1:] for tokens in taken]
        if output_fmt == "NCHW":
            rows = images.shape[-2] // self.patch_size
            maps = [tokens.unflatten(1, (rows, -1)).permute(0, 3, 1, 2).contiguous() for tokens in maps]
        if return_prefix_tokens:
            maps = list(zip(maps, [tokens[:, :1] for tokens in taken], strict=True))
        return maps if intermediates_only else (self.norm(xs)["image"], maps)

    def _check_causal(
        self, causal_text: bool, images: Tensor | None, text_padding: Tensor | None, cache: KeyValueCache | None
    ) -> None:
        if causal_text and self._mixes_tokens:
            raise ConfigError("ffn: conv_kernel lets a text see what comes later, no captioning with it (remove it)")
        if cache is None:
            return
        if images is not None and cache.num_images:
            raise ConfigError(f"images: given again, but the cache holds {cache.num_images} (give text alone)")
        if text_padding is not None:
            raise ConfigError("text_padding: texts in a cache have none (decode texts of equal length)")

    def _run(self, block: Block, *inputs: Any) -> tuple[Streams, list[FFNOutput]]:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def _embed(
        self,
        images: Tensor | None,
        text: Tensor | None,
        text_padding: Tensor | None,
        image_mask: Tensor | None,
        num_cached: int = 0,
        start: int = 0,
    ) -> tuple[Streams, Streams]:
        """Tokens of every branch; one that the batch has nothing for gets an empty tensor, and so do the
        ``num_cached`` images of which nothing is left to encode. Texts begin at position ``start``."""
        xs: Streams = {}
        if num_cached:
            xs["image"] = self.image_embed.pos_embed.new_zeros(num_cached, 0, self.embed_dim)
        elif "image" in self.modalities:
            if images is None:
                images = self.image_embed.pos_embed.new_zeros(0, 3, *self.img_size)
                image_mask = torch.zeros(0, 1, dtype=torch.bool, device=images.device)
            xs["image"] = self.dropout(self.image_embed(images, image_mask))
        if "text" in self.modalities:
            if text is None:
                text = torch.zeros(0, 1, dtype=torch.long, device=self.text_embed.pos_embed.device)
            xs["text"] = self.dropout(self.text_embed(text, text_padding, start=start))
        return xs, {} if text_padding is None else {"text": text_padding}

    def _count_pairs(
        self, images: Tensor | None, text: Tensor | None, num_pairs: int | None, num_cached: int = 0
    ) -> int:
        for name, value in (("image", images), ("text", text)):
            if value is not None and name not in self.modalities:
                raise ConfigError(f"modalities: {', '.join(self.modalities)} only, got {name} (build the branch)")
        num_images, num_texts = (0 if value is None else len(value) for value in (images, text))
        num_images += num_cached
        if num_pairs is None:
            together = (images is not None or num_cached) and text is not None
            if together and num_images != num_texts:
                raise ConfigError(f"num_pairs: not given for {num_images} images and {num_texts} texts (say how many)")
            num_pairs = num_images if together else 0
        if not 0 <= num_pairs <= min(num_images, num_texts):
            raise ConfigError(f"num_pairs: {num_pairs} of {num_images} images and {num_texts} texts (give fewer)")
        return num_pairs

    # --------------------------------------------------------------------------------------- training
    def no_weight_decay(self) -> set[str]:
        """Parameters not to shrink: embeddings, positions, class and mask token, and what layers of experts name."""
        embeddings = ("pos_embed", "cls_token", "mask_token", "text_embed.tokens.weight")
        names = {name for name, _ in self.named_parameters() if name.endswith(embeddings)}
        for place, layer in self.named_modules():
            if isinstance(layer, FFNLayer):
                names |= {f"{place}.{name}" for name in layer.no_weight_decay()}
        return names

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Name patterns of the stem, the blocks and the final norm, for timm's layer-wise learning rates."""
        blocks = r"^blocks\.(\d+)" if coarse else [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^image_embed|^text_embed", "blocks": blocks}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, *, strict: bool = True, **options: Any) -> Encoder:
        """The encoder that :meth:`save_pretrained` wrote to a folder or hub repository.

        Args:
            pretrained_model_name_or_path: folder, or repository on the Hugging Face hub.
            strict: refuse weights that do not fit exactly.
            options: huggingface_hub's, or constructor arguments to change.
        """
        return super().from_pretrained(pretrained_model_name_or_path, strict=strict, **options)


def _block_indices(depth: int, indices: int | Sequence[int] | None) -> list[int]:
    """timm's way to name blocks: none for all, n for the last n, or numbers that count from the end if negative."""
    if indices is None or isinstance(indices, int):
        indices = range(-(depth if indices is None else indices), 0)
    if not indices or not all(-depth <= index < depth for index in indices):
        raise ConfigError(f"indices: {list(indices)} of {depth} blocks (choose from 0 to {depth - 1})")
    return sorted(index % depth for index in indices)
