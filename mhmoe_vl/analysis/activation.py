"""Expert activation over a data set, added up trace by trace.

Everything that grows is a sum of whole numbers or a sample of fixed size that depends on the tokens alone, so the
result does not depend on how the data were cut into batches and dealt to processes, and the memory not on their number.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..models.encoder import Encoder
from .counting import GROUPS, NATS, count_trace, divergence_bins, labelled_tokens
from .labels import Labels
from .specialisation import Specialisation, favourites, measure
from .token_sample import TokenSample
from .trace import PARTS, RoutingTrace, find_encoder

SHARES = {
    "token": "choices of an expert / tokens (sums to sub-tokens x top_k a layer)",
    "row": "choices of an expert / routed rows (sums to top_k a layer)",
    "even": "choices of an expert / even share (1 for all when balanced)",
}
"""What an activation can be measured by, with its definition. The first is the paper's."""
THRESHOLDS = {
    "token": (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    "row": (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    "even": (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 1.5, 2.0),
}
"""Thresholds that reports list; papers 1 and 2 do not state theirs."""
LABELS = {"colour": "colour of a patch", "word": "word of a text token", "class": "class of a sample"}


class Activation:
    """Counts of where tokens went, by pool of experts.

    Args:
        pools: names, as :attr:`Encoder.moe_names`.
        num_experts, top_k, num_subtokens: E, K, S, alike in all pools.
        words: listed words, as :func:`~.labels.read_words` gives them.

    Attributes:
        sums: int64 arrays by name, which add up over traces and processes.
        tokens: samples of tokens with their labels and choices, ``patch`` and ``text``.
    """

    def __init__(
        self, pools: Sequence[str], *, num_experts: int, top_k: int, num_subtokens: int, words: Collection[str] = ()
    ) -> None:
        self.pools = tuple(pools)
        self.num_experts, self.top_k, self.num_subtokens = num_experts, top_k, num_subtokens
        self.words = tuple(words)
        self.num_blocks = len({name.split(".")[1] for name in self.pools})
        self.sums: dict[str, np.ndarray] = {}
        self.tokens = {"patch": TokenSample(), "text": TokenSample()}
        self._specialisation: dict[str, dict[str, Specialisation]] = {}

    @classmethod
    def of(cls, encoder: Encoder, words: Collection[str] = ()) -> Activation:
        """Empty counts for an encoder.

        Raises:
            ConfigError: it has no layer of experts.
        """
        encoder = find_encoder(encoder)
        _, block, pool = encoder.moe_names[0].split(".")
        layer = encoder.blocks[int(block)].ffn[pool]
        return cls(
            encoder.moe_names,
            num_experts=layer.routed.num_experts,
            top_k=layer.routed.top_k,
            num_subtokens=getattr(layer, "num_subtokens", 1),
            words=words,
        )

    @classmethod
    def of_traces(cls, traces: Iterable[RoutingTrace]) -> Activation:
        """Counts of some traces of one model, without labels; at least one."""
        traces = list(traces)
        found = {layer.name: layer for trace in traces for layer in trace.layers}
        layers = sorted(found.values(), key=lambda layer: layer.order)
        sizes = {name: getattr(layers[0], name) for name in ("num_experts", "top_k", "num_subtokens")}
        activation = cls([layer.name for layer in layers], **sizes)
        for trace in traces:
            activation.add(trace)
        return activation

    # ------------------------------------------------------------------------------------------ adding
    def add(self, trace: RoutingTrace, labels: Labels | None = None) -> None:
        """Count a trace.

        Args:
            trace: of the model that these counts are for.
            labels: of its samples; without them tokens are counted, and none is sampled.
        """
        self._add_sums(count_trace(trace, labels, self.words))
        if labels is not None:
            for part, columns in labelled_tokens(trace, labels, self.pools).items():
                self.tokens[part].add(columns)

    def _add_sums(self, sums: Mapping[str, np.ndarray]) -> None:
        self._specialisation.clear()
        for name, value in sums.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    # --------------------------------------------------------------------------------------- processes
    def to_bytes(self) -> bytes:
        """All counts, for :meth:`add_bytes` of another process."""
        arrays = {f"sums:{name}": value for name, value in self.sums.items()}
        for part, sample in self.tokens.items():
            arrays |= {f"{part}:{name}": value for name, value in sample.columns.items()}
        file = io.BytesIO()
        header = list(arrays)
        np.savez(file, names=np.array(header, dtype=str), **{f"a{i}": arrays[n] for i, n in enumerate(header)})
        return file.getvalue()

    def add_bytes(self, data: bytes) -> None:
        """Add what :meth:`to_bytes` of equal counts of other samples gave."""
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            arrays = {str(name): file[f"a{i}"] for i, name in enumerate(file["names"])}
        sums: dict[str, np.ndarray] = {}
        columns: dict[str, dict[str, np.ndarray]] = {part: {} for part in self.tokens}
        for name, value in arrays.items():
            kind, _, rest = name.partition(":")
            if kind == "sums":
                sums[rest] = value
            else:
                columns[kind][rest] = value
        self._add_sums(sums)
        for part, found in columns.items():
            if found:
                self.tokens[part].add(found)

    # ----------------------------------------------------------------------------------------- results
    @property
    def used(self) -> list[str]:
        """The pools that tokens passed, bottom first."""
        return [name for name in self.pools if f"choices/{name}" in self.sums]

    def choices(self, pool: str) -> np.ndarray:
        """(3, E) choices of every expert, of class tokens, patches and text, before dropping."""
        return self.sums[f"choices/{pool}"]

    def num_tokens(self, pool: str) -> int:
        """Tokens that passed the pool."""
        return int(self.sums[f"tokens/{pool}"].sum())

    def shares(self, pool: str, per: str = "token") -> np.ndarray:
        """(E,) activation of the experts of a pool.

        Args:
            pool: its name.
            per: one of :data:`SHARES`.
        """
        tokens, total = self.num_tokens(pool), self.choices(pool).sum(0)
        rows = tokens * self.num_subtokens
        return total / max({"token": tokens, "row": rows, "even": rows * self.top_k / self.num_experts}[per], 1e-9)

    def activated(self, thresholds: Sequence[float] | np.ndarray, per: str = "token") -> np.ndarray:
        """Share of the experts of all pools whose activation is above each threshold; (len(thresholds),) float64."""
        shares = np.concatenate([self.shares(pool, per) for pool in self.used])
        return (shares > np.asarray(thresholds)[:, None]).mean(1)

    def text_share(self, pool: str) -> tuple[np.ndarray, float]:
        """(E,) share of an expert's choices that came from text, nan for an expert without any, and the pool's."""
        choices = self.choices(pool)
        total = choices.sum(0)
        share = np.divide(choices[PARTS.index("text")], total, out=np.full(len(total), np.nan), where=total > 0)
        return share, float(choices[PARTS.index("text")].sum() / max(choices.sum(), 1))

    def dropped(self, pool: str) -> float:
        """Share of the choices that capacity dropped."""
        return float(self.sums[f"dropped/{pool}"].sum() / max(self.choices(pool).sum(), 1))

    def entropy(self, pool: str) -> float:
        """Mean entropy of the router's softmax over all experts, in nats."""
        rows = self.num_tokens(pool) * self.num_subtokens
        return float(self.sums[f"entropy/{pool}"].sum() / NATS / max(rows, 1))

    def together(self, pool: str) -> np.ndarray:
        """(E, E) int64, symmetric: ordered pairs of different sub-tokens of one token, one of which chose the row's
        expert and the other the column's. All zero where tokens are not split."""
        return self.sums[f"together/{pool}"]

    def transitions(self) -> dict[tuple[str, str], np.ndarray]:
        """(E, E) int64 by (pool, pool of the next layer): pairs of a choice in the lower layer (row) and one in the
        upper (column) that the same token made."""
        found = {n.partition("/")[2]: v for n, v in self.sums.items() if n.startswith("transitions/")}
        places = {name: tuple(name.split(">")) for name in found}
        return {places[n]: found[n] for n in sorted(found, key=lambda n: [self.pools.index(p) for p in places[n]])}

    def divergence(self, *groups: str) -> np.ndarray:
        """Tokens of some :data:`GROUPS` by divergence: entry i counts those that reach i / ``num_blocks`` distinct
        experts, averaged over the layers."""
        size = divergence_bins(self.num_blocks, self.num_experts, self.num_subtokens * self.top_k)
        table = self.sums.get("divergence", np.zeros((len(GROUPS), size), np.int64))
        return table[[GROUPS.index(group) for group in groups]].sum(0)

    def mean_divergence(self, *groups: str) -> float:
        """Distinct experts that a token of these groups reaches, mean over layers and tokens; nan without tokens."""
        counts = self.divergence(*groups)
        total = int(counts.sum())
        return float((counts * np.arange(len(counts))).sum() / self.num_blocks / total) if total else float("nan")

    def listed_words(self) -> list[tuple[str, int, float]]:
        """(word, tokens, mean divergence) of every listed word, by divergence from the largest; nan if not met."""
        rows = []
        for word in self.words:
            count, total = map(int, self.sums.get(f"word/{word}", (0, 0)))
            rows.append((word, count, total / self.num_blocks / count if count else float("nan")))
        return sorted(rows, key=lambda row: (row[1] == 0, -row[2] if row[1] else 0, row[0]))

    def _labelled(self, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray | None] | None:
        """Choices (n, P, J), labels (n,) and groups (n,) of the sampled tokens that have this label; none without."""
        part = "text" if kind == "word" or (kind == "class" and not len(self.tokens["patch"])) else "patch"
        columns = self.tokens[part].columns
        if not columns:
            return None
        labels = columns["class" if kind == "class" else "label"]
        known = labels != ""
        if not known.any():
            return None
        return columns["choices"][known], labels[known], columns["sample"][known] if kind == "class" else None

    def specialisation(self, kind: str) -> dict[str, Specialisation]:
        """By pool, what its experts say about one of :data:`LABELS`; empty where no token has that label.

        From the sampled tokens: patches for colours and classes (text where there are no pictures), text for words.
        """
        if kind not in self._specialisation:  # shuffling takes a while, and is asked for by figure, table and JSON
            self._specialisation[kind] = self._measure(kind)
        return self._specialisation[kind]

    def _measure(self, kind: str) -> dict[str, Specialisation]:
        found: dict[str, Specialisation] = {}
        if (labelled := self._labelled(kind)) is None:
            return found
        choices, labels, groups = labelled
        for number, pool in enumerate(self.pools):
            here = (choices[:, number] >= 0).all(1)
            if here.any():
                mine = None if groups is None else groups[here]
                found[pool] = measure(choices[here, number], labels[here], self.num_experts, groups=mine)
        return found

    def favourites(self, kind: str, pool: str) -> list[list[tuple[str, int, float]]]:
        """Per expert of a pool, the labels that it takes above their share, see :func:`~.specialisation.favourites`;
        empty where no token has that label."""
        if (labelled := self._labelled(kind)) is None:
            return []
        return favourites(labelled[0][:, self.pools.index(pool)], labelled[1], self.num_experts)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        per_pool = {}
        for pool in self.used:
            text, of_all = self.text_share(pool)
            per_pool[pool] = {
                "tokens": dict(zip(PARTS, self.sums[f"tokens/{pool}"].tolist(), strict=True)),
                "rows": self.num_tokens(pool) * self.num_subtokens,
                "choices": dict(zip(PARTS, self.choices(pool).tolist(), strict=True)),
                "dropped": dict(zip(PARTS, self.sums[f"dropped/{pool}"].tolist(), strict=True)),
                "share_per_token": self.shares(pool, "token").tolist(),
                "share_per_row": self.shares(pool, "row").tolist(),
                "text_share": [None if np.isnan(value) else value for value in text.tolist()],
                "text_share_of_pool": of_all,
                "entropy_nats": round(self.entropy(pool), 5),
                "together": self.together(pool).tolist(),
            }
        samples = self.sums.get("samples", np.zeros(3, np.int64)).tolist()
        return {
            "num_experts": self.num_experts,
            "top_k": self.top_k,
            "num_subtokens": self.num_subtokens,
            "samples": dict(zip(("images", "texts", "pairs"), samples, strict=True)),
            "pools": per_pool,
            "activated": {
                per: [[t, s] for t, s in zip(marks, self.activated(marks, per).tolist(), strict=True)]
                for per, marks in THRESHOLDS.items()
            },
            "divergence": {
                group: {"tokens_by_sum_over_layers": self.divergence(group).tolist(), "layers": self.num_blocks}
                | {"mean": _number(self.mean_divergence(group))}
                for group in GROUPS
            },
            "listed_words": [{"word": w, "tokens": n, "divergence": _number(d)} for w, n, d in self.listed_words()],
            "transitions": [
                {"from": a, "to": b, "counts": table.tolist()} for (a, b), table in self.transitions().items()
            ],
            "specialisation": {
                kind: {pool: found.to_dict() for pool, found in self.specialisation(kind).items()} for kind in LABELS
            },
        }


def _number(value: float) -> float | None:
    return None if np.isnan(value) else value
