"""Visual question answering: classification over a list of answers, scored by the official VQA accuracy.

As BEiT-3 does it: picture and question pass the encoder together, the pooled class token of the picture is scored
against every listed answer, and the targets are the accuracies that the answers would have (binary cross-entropy).
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.annotated import Example, held_out
from ..data.text import TextTokenizer
from ..data.transforms import ImageTransform
from ..data.vqa import Question, read_questions
from ..errors import ConfigError, DataError
from ..metrics.vqa_accuracy import score_vqa
from ..models.encoder import Encoder
from ..models.heads import ClassList, Pooler, answer_head
from .annotated_task import AnnotatedTask, listed
from .answers import AnswerVocabulary
from .base import InputSpec, ModelOutput, Record
from .encoder_model import EncoderModel
from .pair_batch import PairBatch, collate, read_text

NUM_CANDIDATES = 5
ANSWERS_FILE = "answers.json"


class VQAModel(EncoderModel):
    """Encoder, pooler, answer head.

    Args:
        encoder: without final norm in the published form; the pooler has its own.
        num_answers: outputs.
        sha256: of the list of answers.
    """

    def __init__(self, encoder: Encoder, *, num_answers: int, sha256: str) -> None:
        super().__init__(encoder)
        self.pooler = Pooler(encoder.embed_dim, norm_eps=encoder.norm_eps)
        self.head = answer_head(encoder.embed_dim, num_answers, norm_eps=encoder.norm_eps)
        self.answers = ClassList(sha256, layer="head.3")

    def forward(self, batch: PairBatch) -> ModelOutput:
        """``logits (B, A)``."""
        features = self.encoder(batch.images, batch.text, text_padding=batch.text_padding, num_pairs=len(batch))
        return self.output({"logits": self.head(self.pooler(features.image))}, features)


class VQA(AnnotatedTask):
    """The task; see the module's docstring.

    Args:
        inputs: sizes that the encoder expects.
        val_images: pictures to hold out for validation.
        answers: file with the list of answers; none builds it.
        min_answer_count: occurrences that an answer needs to be in a list that is built.
        others: see :class:`AnnotatedTask`.
    """

    metric = "accuracy"

    def __init__(
        self, inputs: InputSpec, *, val_images: int, answers: str | None, min_answer_count: int, **others: Any
    ) -> None:
        super().__init__(inputs, **others)
        self.val_images, self.answers, self.min_answer_count = val_images, answers, min_answer_count

    # ------------------------------------------------------------------------------------------ data
    def read(self, split: str) -> list[Example]:
        questions, annotations = (listed(self.files[split][name]) for name in ("questions", "annotations"))
        if split == "test" and not annotations:
            annotations = [None] * len(questions)
        if len(annotations) != len(questions):
            counts = f"{len(questions)} questions, {len(annotations)} annotations"
            raise ConfigError(f"task.{split}: files of {counts} (give one of each, in the same order)")
        folders = self.folders(split)
        found = [
            example
            for asked, answered in zip(questions, annotations, strict=True)
            for example in read_questions(self.data_dir / asked, answered and self.data_dir / answered, folders)
        ]
        twice = [key for key, count in Counter(example.key for example in found).items() if count > 1]
        if twice:
            raise DataError(f"task.{split}: question {twice[0]} stands in two files (give each file once)")
        return found

    def group(self, example: Example) -> int:
        return example.record.image_id

    def choose_validation(self) -> set[int]:
        return held_out(map(self.group, self.given), seed=self.seed, count=self.val_images)

    @cached_property
    def train(self) -> list[Example]:
        """Questions with a listed answer; the others would teach that nothing is right."""
        found = [e for e in self.remaining if self.vocabulary.targets(e.record.answers)]
        if not found:
            raise DataError(f"{self.files['train']['questions']}: no question has a listed answer (check task.answers)")
        return found

    @cached_property
    def vocabulary(self) -> AnswerVocabulary:
        """The list of answers: the run's own, a given one, or built from all annotations but the test split's."""
        if self.kept:
            return AnswerVocabulary(json.loads(self.kept[ANSWERS_FILE])["answers"])
        if self.answers is not None:
            return AnswerVocabulary.read(self.data_dir / self.answers)
        own = self.val if self.files["val"] is not None else []
        vocabulary = AnswerVocabulary.build((e.record.most_given for e in [*self.given, *own]), self.min_answer_count)
        if not len(vocabulary):
            raise DataError(
                f"{self.files['train']['annotations']}: no answer occurs {self.min_answer_count} times"
                " (lower task.min_answer_count, or give task.answers)"
            )
        return vocabulary

    def transform(self, pictures: ImageTransform, *, train: bool) -> _Examples:
        return _Examples(pictures, self.tokenizer, self.max_text_len, self.vocabulary)

    @property
    def collate(self) -> Callable[[list[dict[str, Any]]], PairBatch]:
        sizes = {"pad_id": self.tokenizer.pad_id, "img_size": self.inputs.img_size}
        return partial(_collate, num_answers=len(self.vocabulary), **sizes)

    def recorded(self) -> dict[str, str]:
        """The list of answers with its hash, too."""
        return {ANSWERS_FILE: self.vocabulary.to_json(), **super().recorded()}

    # ----------------------------------------------------------------------------------------- model
    def model(self, encoder: Encoder) -> VQAModel:
        return VQAModel(encoder, num_answers=len(self.vocabulary), sha256=self.vocabulary.sha256)

    def num_targets(self, batch: PairBatch) -> dict[str, int]:
        """Questions."""
        return {"answers": len(batch)}

    def loss(self, output: ModelOutput, batch: PairBatch) -> dict[str, Tensor]:
        """Binary cross-entropy summed over answers and questions."""
        logits = output.values["logits"].float()
        return {"answers": F.binary_cross_entropy_with_logits(logits, batch.targets, reduction="sum")}

    # ------------------------------------------------------------------------------------ evaluation
    def predict(self, model: nn.Module, batch: PairBatch) -> list[Record]:
        """Per question: the answer, and the best candidates with their scores."""
        scores = model(batch).values["logits"].float().sigmoid()
        best = scores.topk(min(NUM_CANDIDATES, scores.shape[1]))
        found = []
        for record, values, numbers in zip(batch.records, best.values.tolist(), best.indices.tolist(), strict=True):
            names = [self.vocabulary.answers[number] for number in numbers]
            candidates = [list(pair) for pair in zip(names, values, strict=True)]
            found.append({**record, "answer": names[0], "candidates": candidates})
        return found

    def score(self, records: list[Record]) -> dict[str, float]:
        """``accuracy`` in percent, over all questions and by answer type, and ``ceiling``, the most that the list of
        answers allows; nothing for a split without answers."""
        if not records or any(record["answers"] is None for record in records):
            return {}
        annotations = [r | {"answers": [{"answer": answer} for answer in r["answers"]]} for r in records]
        scores = score_vqa({r["question_id"]: r["answer"] for r in records}, annotations)
        ceiling = 100 * float(np.mean([self.vocabulary.ceiling(r["answers"]) for r in records]))
        by_type = {f"accuracy/{name}": value for name, value in scores.per_answer_type.items()}
        return {"accuracy": scores.overall, **by_type, "ceiling": ceiling}

    def baselines(self, device: torch.device) -> dict[str, float]:
        """Accuracy of always giving the most frequent training answer of the question's type."""
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for example in self.remaining:
            for name in (example.record.question_type, ""):
                counts[name][example.record.most_given] += 1
        best = {name: min(found, key=lambda a: (-found[a], a)) for name, found in counts.items()}
        records = [_record(e) for e in self.val]
        scores = self.score([r | {"answer": best.get(r["question_type"], best[""])} for r in records])
        return {name: value for name, value in scores.items() if name != "ceiling"}

    def gallery(self, records: list[Record]) -> list[dict[str, Any]]:
        """Questions with the best candidates as bars; right where most annotators gave the answer."""
        cards = []
        for record in records:
            given = Counter(record["answers"] or []).most_common(1)
            rows = [["true answer", given[0][0]]] if given else []
            right = self.score([record])["accuracy"] > 50 if given else None
            card = {"images": [record["image"]], "caption": record["question"], "right": right}
            cards.append({**card, "rows": [["answer", record["answer"]], *rows], "bars": record["candidates"]})
        return cards

    def submission(self, records: list[Record]) -> dict[str, str]:
        """The file that the evaluation server (EvalAI) takes."""
        answers = [{"question_id": r["question_id"], "answer": r["answer"]} for r in records]
        return {"vqa_results.json": json.dumps(answers, ensure_ascii=False) + "\n"}


@dataclass(frozen=True)
class _Examples:
    """From an annotated question to an example."""

    pictures: ImageTransform
    tokenizer: TextTokenizer
    max_len: int
    vocabulary: AnswerVocabulary

    def __call__(self, example: Example, rng: np.random.Generator) -> dict[str, Any]:
        question: Question = example.record
        return {
            "pictures": [example.pixels(self.pictures, rng)],
            **read_text(self.tokenizer, question.question, self.max_len),
            "targets": self.vocabulary.targets(question.answers or ()),
            "record": _record(example),
        }


def _record(example: Example) -> Record:
    question: Question = example.record
    return {
        "id": question.question_id,
        "question_id": question.question_id,
        "question": question.question,
        "image": str(example.pictures[0]),
        "question_type": question.question_type,
        "answer_type": question.answer_type,
        "answers": question.answers and list(question.answers),
    }


def _collate(examples: list[dict[str, Any]], *, num_answers: int, **sizes: Any) -> PairBatch:
    targets = torch.zeros(len(examples), num_answers)
    for row, example in enumerate(examples):
        for number, value in example["targets"].items():
            targets[row, number] = value
    return collate(examples, targets, num_pictures=1, **sizes)
