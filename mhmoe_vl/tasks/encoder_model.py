"""What all models made of an encoder and heads have in common."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..models.encoder import Encoder, EncoderOutput
from .base import ModelOutput


class EncoderModel(nn.Module):
    """An encoder with heads beside it.

    Args:
        encoder: gives features for images and texts.
    """

    find_unused_parameters = True  # branches and heads that a rank's batch has nothing for

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def output(self, values: dict[str, Tensor], features: EncoderOutput) -> ModelOutput:
        """``values`` with the losses and statistics of the encoder's experts."""
        return model_output(values, self.encoder, features)

    def no_weight_decay(self) -> set[str]:
        """Parameters that the optimizer should not shrink."""
        return {f"encoder.{name}" for name in self.encoder.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The encoder's layer groups, for layer-wise learning rates; the heads belong to the last one."""
        return {name: _below_encoder(group) for name, group in self.encoder.group_matcher(coarse).items()}


def model_output(values: dict[str, Tensor], encoder: Encoder, features: EncoderOutput) -> ModelOutput:
    """``values`` with the losses and statistics of the experts in ``encoder``, which gave ``features``."""
    return ModelOutput(values, features.aux_losses, dict(zip(encoder.moe_names, features.stats, strict=True)))


def _below_encoder(group: Any) -> Any:
    """timm's group patterns, anchored at ``encoder.`` instead of the start of the name."""
    if isinstance(group, str):
        return group.replace("^", r"^encoder\.")
    return type(group)(map(_below_encoder, group)) if isinstance(group, (list, tuple)) else group
