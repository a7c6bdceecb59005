"""Multi-Head Mixture-of-Experts: the layer of arXiv 2404.15045 (paper 1) and arXiv 2411.16205 (paper 2).

Where the sources differ, and what is our default (equation numbers of paper 1 are those of its NeurIPS version):

* Paper 1 adds the sub-token to its experts' sum; the released code and paper 2 do not. Off (``subtoken_residual``).
* The equations and the released code mix with raw gates. We renormalise over the chosen experts (``normalize_gates``;
  ``top_k`` 1 keeps raw gates).
* The released code drops what exceeds an even share of the sub-tokens; the papers name no capacity. We drop nothing
  (``capacity_factor``).
* For X-MoE's router paper and released code differ: see :class:`~mhmoe_vl.nn.router.CosineRouter`.
* Paper 1's experts are 4 D wide inside, which costs about four times an MoE of whole tokens; paper 2 narrows them to
  equal cost. ``hidden_dim`` None means 4 D.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..checks import check_splitting, inner_width
from .conv_split import ConvHead, ConvMerge, hide_padding
from .feed_forward import Activation, FFNOutput
from .moe import BalanceShare, RoutedExperts, SparseLayer
from .router import DEFAULT_ROUTER


class MultiHeadMoE(SparseLayer):
    """Every token is cut into ``num_subtokens`` pieces, each routed to experts of its own, and put together again.

    ============  ====================================================  ===========  =======
    step          formula                                               paper 1      paper 2
    ============  ====================================================  ===========  =======
    head layer    x^ = x W_head + b                                     Eq. 2        Eq. 1
    split         (N, D) -> (N, S, D/S); sub-tokens of a token adjacent Eq. 3
    route         g = softmax over all E experts of x e_p; top k        Eq. 4        Eq. 2
    experts       o = sum over the chosen p of g_p f_p(x)               Eq. 5        Eq. 3
    merge         (N, S, D/S) -> (N, D)                                 Eq. 6
    merge layer   y = o W_merge + b                                     Eq. 7        Eq. 4
    ============  ====================================================  ===========  =======

    Args:
        dim: width D of a token.
        num_subtokens: pieces per token, h in the papers; 1 is an MoE between two linear layers.
        head_layers, merge_layers: linear layers with ReLU between them; 0 leaves them out (the paper's ablations).
        subtoken_residual: add each sub-token to its experts' sum.
        conv_kernel, conv_stride: convolutions instead, see :mod:`~mhmoe_vl.nn.conv_split`; None means linear layers.
        Others: see :class:`~mhmoe_vl.nn.moe.MoE`. Shared experts see the whole token, beside head and merge layer.

    Raises:
        ConfigError: values that are impossible or do not fit each other.
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
        check_splitting(dim, num_subtokens, head_layers, merge_layers, conv_kernel, conv_stride)
        self.num_subtokens, self.window = num_subtokens, (conv_kernel or 1, conv_stride)
        if conv_kernel is None:
            self.head_proj, self.merge_proj = _linear_layers(dim, head_layers), _linear_layers(dim, merge_layers)
        else:
            self.head_proj, self.merge_proj = ConvHead(dim, *self.window), ConvMerge(dim, *self.window)
        self.routed = RoutedExperts(
            dim // num_subtokens,
            num_experts=num_experts,
            hidden_dim=inner_width(dim, hidden_dim),
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
        self._build_shared(dim, num_shared_experts, shared_hidden_dim, activation, bias)
        _init_weights(self.head_proj, self.merge_proj)

    def forward_streams(
        self,
        xs: Sequence[Tensor],
        paddings: Sequence[Tensor | None] | None = None,
        *,
        return_routing: bool = False,
    ) -> FFNOutput:
        """See :class:`~mhmoe_vl.nn.feed_forward.FFNLayer`. What stands at padding is of no use."""
        seen, paddings = hide_padding(xs, paddings or [None] * len(xs), *self.window)
        heads = [self.head_proj(x) for x in seen]  # Eq. 2: x W_head
        subtokens = [x.unflatten(-1, (self.num_subtokens, -1)) for x in heads]  # Eq. 3: split
        mixed = self.routed(subtokens, paddings, return_routing=return_routing)  # Eqs. 4-5: route, mix
        merged = [y.flatten(-2) for y in mixed.x]  # Eq. 6: merge
        outputs = [self.merge_proj(y)[..., : x.shape[-2], :] for y, x in zip(merged, xs, strict=True)]  # Eq. 7
        return FFNOutput([self.add_shared(y, x) for y, x in zip(outputs, xs, strict=True)], *mixed[1:])

    def extra_repr(self) -> str:
        return f"num_subtokens={self.num_subtokens}"


def _linear_layers(dim: int, count: int) -> nn.Module:
    """``count`` linear layers D -> D with ReLU between them."""
    layers: list[nn.Module] = []
    for number in range(count):
        layers += [nn.ReLU()] * (number > 0) + [nn.Linear(dim, dim)]
    return layers[0] if count == 1 else nn.Sequential(*layers)


def _init_weights(head_proj: nn.Module, merge_proj: nn.Module) -> None:
    """Paper 1 appendix D: head weights Xavier-uniform with gain 1/sqrt(2), merge weights with gain 1, merge biases 0;
    head biases as the framework makes them."""
    for layer in _weighted(head_proj):
        nn.init.xavier_uniform_(layer.weight, gain=2**-0.5)
    for layer in _weighted(merge_proj):
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)


def _weighted(module: nn.Module) -> list[nn.Module]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear | nn.Conv1d | nn.ConvTranspose1d)]
