"""Multi-Head Mixture-of-Experts: the layer of arXiv 2404.15045 (paper 1) and arXiv 2411.16205 (paper 2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError
from .feed_forward import Activation, FFNOutput
from .moe import BalanceShare, RoutedExperts, SparseLayer
from .router import DEFAULT_ROUTER


class MultiHeadMoE(SparseLayer):
    """Every token is cut into ``num_subtokens`` pieces, each routed to experts of its own, and put together again.

    ====================  =========================================================  ===========  =======
    step                  formula                                                    paper 1      paper 2
    ====================  =========================================================  ===========  =======
    head layer            x^ = x W_head + b                                          Eq. 2        Eq. 1
    split                 (N, D) -> (N, S, D/S); sub-tokens of a token adjacent      Eq. 3
    route                 g = softmax over all E experts of x e_p; top k             Eq. 4        Eq. 2
    experts               o = sum over the chosen p of g_p f_p(x)                    Eq. 5        Eq. 3
    merge                 (N, S, D/S) -> (N, D)                                      Eq. 6
    merge layer           y = o W_merge + b                                          Eq. 7        Eq. 4
    ====================  =========================================================  ===========  =======

    (Equation numbers of paper 1 are those of its NeurIPS version.) Where the sources differ, and our default:

    * Paper 1 adds the sub-token to its experts' sum; the released code and paper 2 do not. Off by default
      (``subtoken_residual``).
    * The equations and the released code mix with raw gates. We renormalise over the chosen experts
      (``normalize_gates``; ``top_k`` 1 keeps raw gates).
    * The released code drops what exceeds an even share of the sub-tokens; the papers name no capacity. We drop nothing
      (``capacity_factor``).
    * For X-MoE's router paper and released code differ: see :class:`~mhmoe_vl.nn.router.CosineRouter`.
    * Paper 1's experts are 4 D wide inside, which costs about four times an MoE of whole tokens; paper 2 narrows them
      to equal cost. ``hidden_dim`` None means 4 ``dim``.

    ``conv_kernel`` replaces head and merge layer by a convolution over the tokens of each sample (NeurIPS appendix E)
    and its transpose, cropped back to the number of tokens. The paper states neither padding nor alignment; here
    windows of ``conv_kernel`` tokens start every ``conv_stride``, N tokens give ceil(N / stride) positions, what lies
    outside is zero, and so is padding. A position is padding when all ``conv_stride`` tokens of its own are.

    Args:
        dim: width of a token.
        num_subtokens: pieces per token, h in the papers; 1 is an MoE between two linear layers.
        head_layers: linear layers before the split, ReLU between them; 0 leaves them out (the paper's ablation).
        merge_layers: the same after the merge.
        subtoken_residual: add each sub-token to its experts' sum.
        conv_kernel: tokens under one window; None means linear layers.
        conv_stride: tokens from one window to the next, at most ``conv_kernel``.
        Others: see :class:`~mhmoe_vl.nn.moe.MoE`. Shared experts see the whole token, beside head and merge layer.

    Raises:
        ConfigError: values that do not fit each other.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_subtokens: int = 4,
        head_layers: int = 1,
        merge_layers: int = 1,
        subtoken_residual: bool = False,
        conv_kernel: int | None = None,
        conv_stride: int = 1,
        num_experts: int = 8,
        hidden_dim: int | None = None,
        top_k: int = 2,
        activation: Activation = "gelu",
        bias: bool = True,
        router: Mapping[str, Any] = DEFAULT_ROUTER,
        normalize_gates: bool = True,
        num_shared_experts: int = 0,
        shared_hidden_dim: int | None = None,
        capacity_factor: float | None = None,
        balance_share: BalanceShare = "first",
        balance_per_modality: bool = False,
        balance_bias_rate: float = 0.0,
    ) -> None:
        super().__init__()
        _check(dim, num_subtokens, head_layers, merge_layers, conv_kernel, conv_stride)
        hidden_dim = hidden_dim or 4 * dim
        self.num_subtokens, self.conv_kernel, self.conv_stride = num_subtokens, conv_kernel, conv_stride
        if conv_kernel is None:
            self.head_proj = _linear_layers(dim, head_layers)
            self.merge_proj = _linear_layers(dim, merge_layers)
        else:
            self.head_proj = nn.Conv1d(dim, dim, conv_kernel, conv_stride)
            self.merge_proj = nn.ConvTranspose1d(dim, dim, conv_kernel, conv_stride)
        self.routed = RoutedExperts(
            dim // num_subtokens,
            num_experts=num_experts,
            hidden_dim=hidden_dim,
            top_k=top_k,
            activation=activation,
            bias=bias,
            router=router,
            normalize_gates=normalize_gates,
            capacity_factor=capacity_factor,
            balance_share=balance_share,
            balance_per_modality=balance_per_modality,
            balance_bias_rate=balance_bias_rate,
            residual=subtoken_residual,
        )
        self._build_shared(dim, num_shared_experts, shared_hidden_dim or hidden_dim, activation, bias)
        self._init_weights()

    def _init_weights(self) -> None:
        """Paper 1 appendix D: head weights Xavier-uniform with gain 1/sqrt(2), merge weights with gain 1, merge biases
        0; head biases as the framework makes them."""
        for layer in _weighted(self.head_proj):
            nn.init.xavier_uniform_(layer.weight, gain=2**-0.5)
        for layer in _weighted(self.merge_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward_streams(
        self,
        xs: Sequence[Tensor],
        paddings: Sequence[Tensor | None] | None = None,
        *,
        return_routing: bool = False,
    ) -> FFNOutput:
        """See :class:`~mhmoe_vl.nn.feed_forward.FFNLayer`. What stands at padding is of no use."""
        paddings = paddings or [None] * len(xs)
        heads = [self._head(x, padding) for x, padding in zip(xs, paddings, strict=True)]  # Eq. 2: x W_head
        subtokens = [x.unflatten(-1, (self.num_subtokens, -1)) for x, _ in heads]  # Eq. 3: split
        mixed = self.routed(subtokens, [p for _, p in heads], return_routing=return_routing)  # Eqs. 4-5: route, mix
        merged = [y.flatten(-2) for y in mixed.x]  # Eq. 6: merge
        outputs = [self._merge(y, x.shape[-2]) for y, x in zip(merged, xs, strict=True)]  # Eq. 7: o W_merge
        return mixed._replace(x=[self.add_shared(y, x) for y, x in zip(outputs, xs, strict=True)])

    def _head(self, x: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The head layer, and the padding of what it returns."""
        if self.conv_kernel is None:
            return self.head_proj(x), padding
        left, right, fill = self._margins(x.shape[-2])
        if padding is None and x.shape[-2] == 0:
            padding = x.new_zeros(x.shape[:-1], dtype=torch.bool)
        if padding is not None:
            x = x.masked_fill(padding.unsqueeze(-1), 0)
            padding = F.pad(padding, (0, fill), value=True).unflatten(-1, (-1, self.conv_stride)).all(-1)
        return self.head_proj(F.pad(x.mT, (left, right))).mT, padding

    def _merge(self, y: Tensor, num_tokens: int) -> Tensor:
        """The merge layer."""
        if self.conv_kernel is None:
            return self.merge_proj(y)
        left, _, _ = self._margins(num_tokens)
        return self.merge_proj(y.mT).mT[..., left : left + num_tokens, :]

    def _margins(self, num_tokens: int) -> tuple[int, int, int]:
        """Zeros before and after the tokens under the windows, and tokens missing in the last stride. Without tokens
        there is one position all the same, for the convolutions refuse none; it is padding."""
        fill = -num_tokens % self.conv_stride if num_tokens else self.conv_stride
        left = (self.conv_kernel - self.conv_stride) // 2
        return left, self.conv_kernel - self.conv_stride - left + fill, fill

    def extra_repr(self) -> str:
        return f"num_subtokens={self.num_subtokens}"


def _check(
    dim: int, num_subtokens: int, head_layers: int, merge_layers: int, conv_kernel: int | None, conv_stride: int
) -> None:
    if num_subtokens < 1 or dim % num_subtokens:
        raise ConfigError(f"ffn: num_subtokens {num_subtokens} does not divide the width {dim} (choose a divisor)")
    for name, layers in (("head_layers", head_layers), ("merge_layers", merge_layers)):
        if not 0 <= layers <= 3:
            raise ConfigError(f"ffn: {name} {layers} is out of range (choose 0 to 3)")
        if conv_kernel is not None and layers != 1:
            raise ConfigError(f"ffn: {name} {layers} does not go with conv_kernel {conv_kernel} (leave {name} at 1)")
    if conv_kernel is None and conv_stride != 1:
        raise ConfigError(f"ffn: conv_stride {conv_stride} without conv_kernel (set conv_kernel or remove conv_stride)")
    if conv_kernel is not None and conv_stride > conv_kernel:
        raise ConfigError(f"ffn: conv_stride {conv_stride} skips tokens: over conv_kernel {conv_kernel} (lower it)")


def _linear_layers(dim: int, count: int) -> nn.Module:
    """``count`` linear layers D -> D with ReLU between them."""
    layers: list[nn.Module] = []
    for number in range(count):
        layers += [nn.ReLU()] * (number > 0) + [nn.Linear(dim, dim)]
    return layers[0] if count == 1 else nn.Sequential(*layers)


def _weighted(module: nn.Module) -> list[nn.Module]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear | nn.Conv1d | nn.ConvTranspose1d)]
