"""What a task is: data, model, loss, predictions, score. The engine knows tasks by this protocol only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn
from torch.utils.data import Dataset

from ..config import EncoderConfig

Record = dict[str, Any]
"""One prediction: JSON values under the official key names, with a unique ``id``."""

Batch = Any
"""A task's own batch: a dataclass with ``bad: dict[str, int]`` (samples left out, by reason)."""


class ModelOutput(NamedTuple):
    """What a task's model returns.

    Attributes:
        values: the task's own tensors, by name.
        aux_losses: ``balance_loss`` and ``z_loss`` of the encoder, combined over ranks; empty when dense.
        stats: ``RoutingStats`` by the name of the pool of experts.
    """

    values: dict[str, Tensor]
    aux_losses: dict[str, Tensor]
    stats: dict[str, Any]


class InputSpec(NamedTuple):
    """What data must look like to fit the encoder: pixels (height, width), pixels, tokens, rows, branches."""

    img_size: tuple[int, int]
    patch_size: int
    max_text_len: int
    vocab_size: int
    modalities: tuple[str, ...]

    @classmethod
    def of(cls, encoder: EncoderConfig) -> InputSpec:
        """The inputs of the encoder that ``encoder`` describes."""
        size = encoder.img_size if isinstance(encoder.img_size, tuple) else (encoder.img_size, encoder.img_size)
        return cls(size, encoder.patch_size, encoder.max_text_len, encoder.vocab_size, encoder.modalities)


class Task(Protocol):
    """A thing to learn. Everything that is particular to it lives in its file.

    Tasks inherit from this class; the methods that do something here are for the tasks that need them.

    Attributes:
        metric: key of :meth:`score` that selects the best checkpoint.
        higher_is_better: direction of that key.
    """

    metric: str
    higher_is_better: bool

    def dataset(self, split: str) -> Dataset | Iterable[Batch]:
        """``"train"``: maps a step number to the list of this rank's batches for that step (one per accumulated
        part). ``"val"``, and ``"test"`` where the task's section has one: iterable of this rank's share of the
        batches, every sample once over all ranks."""
        ...

    def model(self, encoder: nn.Module | None) -> nn.Module:
        """The module to train; ``forward(batch) -> ModelOutput``."""
        ...

    def prepare(self, batch: Batch, device: Any) -> Batch:
        """``batch`` on ``device``, pictures normalised, targets of frozen models filled in."""
        ...

    def num_targets(self, batch: Batch) -> dict[str, int]:
        """How many targets each term of :meth:`loss` sums over in this batch."""
        ...

    def loss(self, output: ModelOutput, batch: Batch) -> dict[str, Tensor]:
        """Each term *summed* over its targets. The engine divides by the targets of all ranks and parts."""
        ...

    def predict(self, model: nn.Module, batch: Batch) -> list[Record]:
        """One record per example, from a prepared batch."""
        ...

    def score(self, records: list[Record]) -> dict[str, float]:
        """Pure; called once, on the records of a whole split sorted by id. Empty when the split has no truth."""
        ...

    def baselines(self, device: Any) -> dict[str, float]:
        """Scores that need no model, under keys of :meth:`score`, to print beside the model's own."""
        ...

    def recorded(self) -> dict[str, str]:
        """What a run keeps of its data, by file name: lists of classes, the validation split. A run that goes on must
        find the same again."""
        return {}

    def restore(self, files: Mapping[str, str]) -> None:
        """Take what :meth:`recorded` gave when the run began, so that evaluation needs no training data."""

    def submission(self, records: list[Record]) -> dict[str, str]:
        """The predictions of a split in the benchmark's official format, text by file name."""
        return {}

    def gallery(self, records: list[Record]) -> list[dict[str, Any]]:
        """Predictions to show with their pictures: ``images`` (paths, or encoded pictures), ``caption``, ``right``
        (true, false or none), ``rows`` of name and value, ``bars`` of name and share."""
        return []

    def curves(self, records: list[Record]) -> list[dict[str, Any]]:
        """Figures of shares over shares: ``title``, ``note``, ``x`` (what the values run over, evenly from 0 to 1), and
        ``lines``, lists of values of 0 to 1 by name."""
        return []
