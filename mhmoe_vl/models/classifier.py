"""Image classifier with timm's interface: the encoder's image branch, pooled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .encoder import Encoder


class ImageClassifier(nn.Module):
    """Mean of the patch tokens (the class token left out), LayerNorm, linear layer (BEiT-3's ImageNet form).

    Routing statistics and auxiliary losses of experts are in what ``classifier.encoder(images)`` returns;
    :meth:`forward_head` takes its ``image`` tokens.

    Args:
        encoder: with an image branch, and no final norm (``fc_norm`` takes its place).
        num_classes: outputs; 0 gives the pooled features.
        drop_rate: dropout before the linear layer.

    Attributes:
        num_features: width of the pooled features.
        pretrained_cfg: what timm's data helpers read: input size, mean, standard deviation.
    """

    def __init__(self, encoder: Encoder, *, num_classes: int = 1000, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.encoder = encoder
        self.num_features = self.head_hidden_size = encoder.embed_dim
        self.fc_norm = nn.LayerNorm(encoder.embed_dim, eps=encoder.norm_eps)
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes)
        self.pretrained_cfg = {
            "url": "",
            "num_classes": num_classes,
            "input_size": (3, *encoder.img_size),
            "pool_size": None,
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "first_conv": "encoder.image_embed.proj",
            "classifier": "head",
        }

    @property
    def default_cfg(self) -> dict[str, Any]:
        """timm's older name of ``pretrained_cfg``."""
        return self.pretrained_cfg

    def forward_features(self, images: Tensor) -> Tensor:
        """Image tokens ``(B, 1 + P, D)``, class token first."""
        return self.encoder.forward_features(images)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits ``(B, num_classes)`` of image tokens, or with ``pre_logits`` the pooled features ``(B, D)``."""
        x = self.head_drop(self.fc_norm(x[:, 1:].mean(dim=1)))
        return x if pre_logits else self.head(x)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(B, num_classes)`` of images ``(B, 3, H, W)``."""
        return self.forward_head(self.forward_features(images))

    def forward_intermediates(self, images: Tensor, indices: Any = None, **options: Any) -> Any:
        """:meth:`Encoder.forward_intermediates`."""
        return self.encoder.forward_intermediates(images, indices, **options)

    def get_classifier(self) -> nn.Module:
        """The linear layer."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """A new linear layer for ``num_classes`` (0: none)."""
        self.num_classes = num_classes
        if num_classes == 0:
            self.head = nn.Identity()
            return
        self.head = nn.Linear(self.num_features, num_classes).to(self.fc_norm.weight)
        with torch.no_grad():
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def no_weight_decay(self) -> set[str]:
        """Parameters that the optimizer should not shrink."""
        return {f"encoder.{name}" for name in self.encoder.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Name patterns of the stem and the blocks for timm's layer-wise learning rates."""
        blocks = r"^encoder\.blocks\.(\d+)"
        return {
            "stem": r"^encoder\.image_embed",
            "blocks": blocks if coarse else [(blocks, None), (r"^fc_norm", (99999,))],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of keeping their activations."""
        self.encoder.set_grad_checkpointing(enable)
