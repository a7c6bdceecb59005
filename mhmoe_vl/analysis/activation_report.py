"""``activation.json``, ``report.html`` and figures of the expert activation of some models over a data set."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from . import figures as draw
from .activation import LABELS, SHARES, THRESHOLDS, Activation
from .charts import number, percent
from .plotting import png
from .report import template
from .trace import RoutingTrace

MAX_WORD_ROWS = 500
_NOTES = {
    "activation": [
        "First layer of experts on top.",
        "Choices are counted before capacity drops any; tokens without padding.",
    ],
    "activated_share": ["Share of the experts of all layers whose activation is above a threshold."],
    "divergence": ["Distinct experts that the sub-tokens of a token reach, mean over the layers of experts."],
    "modality_share": ["0.5: an expert takes both modalities alike, however many tokens of each there are."],
    "specialisation": [
        "Mutual information of the chosen expert and a label, over a fair sample of tokens.",
        "Shuffled: the same after the labels changed places between tokens (classes: between samples).",
    ],
    "coactivation": [
        "Pairs of choices by two sub-tokens of one token, against independent choices with the same rates."
    ],
    "transitions": ["Where tokens that chose an expert go in the next layer of experts."],
    "divergence_maps": ["One picture by kept checkpoints: distinct experts that the sub-tokens of a patch reach."],
}


@dataclass(frozen=True)
class StepMaps:
    """One picture, traced by kept checkpoints of a run.

    Attributes:
        image: (H, W, 3) uint8, as the model saw it.
        traces: by name of the step.
    """

    image: np.ndarray
    traces: Mapping[str, RoutingTrace]


@dataclass(frozen=True)
class Findings:
    """What a report shows.

    Attributes:
        models: activation by name, in the order given; none for a dense model, which has nothing to route.
        data: where the samples come from, as it was named.
        num_samples: samples of the data.
        listed: name of the list of words; none without one.
        capacity_factor: of the rule that counts what would be dropped; none drops nothing.
        maps: by model, what to draw divergence maps of.
    """

    models: Mapping[str, Activation | None]
    data: str
    num_samples: int
    listed: str | None = None
    capacity_factor: float | None = None
    maps: Mapping[str, StepMaps] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The models that something is shown of."""
        return list(dict.fromkeys([*self.models, *self.maps]))

    @property
    def sparse(self) -> dict[str, Activation]:
        """The models with experts."""
        return {name: activation for name, activation in self.models.items() if activation is not None}


class _Table(NamedTuple):
    """Rows of cells; with a ``name`` it is folded away under it."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    name: str = ""
    note: str = ""


class _Section(NamedTuple):
    title: str
    notes: Sequence[str]
    figures: Sequence[str]
    tables: Sequence[_Table] = ()


def report_files(findings: Findings, per: str = "token") -> dict[str, bytes]:
    """The contents of all files by name; ``report.html`` holds the figures too.

    Args:
        findings: what to show.
        per: what the heat map's activation is measured by, one of :data:`~.activation.SHARES`.
    """
    pictures = _pictures(findings, per)
    page = template("activation.html").render(
        title=", ".join(findings.names),
        data=_subtitle(findings),
        sections=[
            {
                **section._asdict(),
                "figures": [
                    {"file": name, "address": "data:image/png;base64," + base64.b64encode(pictures[name]).decode()}
                    for name in section.figures
                ],
            }
            for section in _sections(findings, list(pictures))
        ],
    )
    text = json.dumps(to_dict(findings), allow_nan=False, ensure_ascii=True, indent=1)
    return pictures | {"activation.json": text.encode(), "report.html": page.encode()}


def to_dict(findings: Findings) -> dict[str, Any]:
    """What ``activation.json`` holds."""
    return {
        "data": findings.data,
        "num_samples": findings.num_samples,
        "listed": findings.listed,
        "capacity_factor": findings.capacity_factor,
        "definitions": SHARES,
        "models": {
            name: {"routed": False} if activation is None else {"routed": True} | activation.to_dict()
            for name, activation in findings.models.items()
        },
        "divergence_by_step": {
            name: {step: trace.divergence("patch")[0].reshape(trace.grid).tolist() for step, trace in m.traces.items()}
            for name, m in findings.maps.items()
        },
    }


# ------------------------------------------------------------------------------------------- figures
def _pictures(findings: Findings, per: str) -> dict[str, bytes]:
    """All figures that the findings give, as PNG by file name; one for each model where they are too many for one."""
    sparse = findings.sparse
    made: dict[str, Any] = {}
    if sparse:
        made["activation.png"] = draw.activation_heat_maps(sparse, per)
        made["activated_share.png"] = draw.activated_share(sparse)
        made["divergence.png"] = draw.divergence_histograms(sparse, findings.listed or "listed words")
        if any(_both_modalities(activation) for activation in sparse.values()):
            made["modality_share.png"] = draw.modality_shares(sparse)
        if any(activation.specialisation(kind) for activation in sparse.values() for kind in LABELS):
            made["specialisation.png"] = draw.specialisation(sparse)
    for name, activation in sparse.items():
        if activation.num_subtokens > 1:
            made[_numbered(findings, "coactivation", name)] = draw.coactivation(activation, name)
        if activation.transitions():
            made[_numbered(findings, "transitions", name)] = draw.transitions(activation, name)
    for name, maps in findings.maps.items():
        made[_numbered(findings, "divergence_maps", name)] = draw.divergence_maps(maps.image, maps.traces)
    return {file: png(figure) for file, figure in made.items()}


def _numbered(findings: Findings, kind: str, name: str) -> str:
    """A file name that no model's name gets into."""
    names = findings.names
    return f"{kind}.png" if len(names) == 1 else f"{kind}-{names.index(name) + 1}.png"


def _both_modalities(activation: Activation) -> bool:
    images, texts, _ = activation.sums["samples"]
    return bool(images and texts)


# -------------------------------------------------------------------------------------------- tables
def _sections(findings: Findings, files: Sequence[str]) -> list[_Section]:
    """The page's parts; those with neither figure nor table are left out."""
    sparse = findings.sparse
    sections = []
    if findings.models:
        sections.append(_Section("Models", _dense_notes(findings), (), [_models_table(findings)]))
    if sparse:
        share = [_threshold_table(sparse, per) for per in SHARES]
        sections += [
            _Section("Activation", _NOTES["activation"], _of("activation.png", files), _expert_tables(findings)),
            _Section("Activated share", _NOTES["activated_share"], _of("activated_share", files), share),
            _divergence_section(findings, files),
        ]
    tables = {"specialisation": _specialisation_tables(sparse)}
    for kind in ("modality_share", "specialisation", "coactivation", "transitions", "divergence_maps"):
        title = kind.replace("_", " ").capitalize()
        sections.append(_Section(title, _NOTES[kind], _of(kind, files), tables.get(kind, ())))
    return [section for section in sections if section.figures or section.tables]


def _of(kind: str, files: Sequence[str]) -> list[str]:
    return [file for file in files if file.startswith(kind)]


def _subtitle(findings: Findings) -> str:
    if not findings.models:
        return "No data set, one picture."
    listed = f"; listed words: {findings.listed}" if findings.listed else ""
    capacity = "nothing is dropped"
    if findings.capacity_factor is not None:
        capacity = f"capacity factor {findings.capacity_factor:g}, every sample as a batch of its own"
    return f"{findings.num_samples:,} samples of {findings.data}{listed}; {capacity}"


def _dense_notes(findings: Findings) -> list[str]:
    dense = [name for name, activation in findings.models.items() if activation is None]
    return [f"Dense, there is nothing to route: {', '.join(dense)}."] if dense else []


def _models_table(findings: Findings) -> _Table:
    columns = ["model", "experts", "top-k", "sub-tokens", "layers", "images", "texts", "router entropy, nats"]
    columns += ["distinct experts a patch", "a word", "dropped"]
    rows = []
    for name, a in findings.models.items():
        if a is None:
            rows.append([name, "dense", *[""] * (len(columns) - 2)])
            continue
        images, texts, _ = map(int, a.sums["samples"])
        entropy = number(float(np.mean([a.entropy(pool) for pool in a.used])), 3)
        reached = [_mean(a, "patch"), _mean(a, "word", "listed")]
        dropped = percent(float(np.mean([a.dropped(pool) for pool in a.used])))
        sizes = [a.num_experts, a.top_k, a.num_subtokens, a.num_blocks]
        rows.append([name, *sizes, f"{images:,}", f"{texts:,}", entropy, *reached, dropped])
    return _Table(columns, rows)


def _mean(activation: Activation, *groups: str) -> str:
    mean = activation.mean_divergence(*groups)
    return "" if np.isnan(mean) else f"{mean:.2f}"


def _threshold_table(sparse: Mapping[str, Activation], per: str) -> _Table:
    marks = THRESHOLDS[per]
    rows = [[name, *(percent(share) for share in a.activated(marks, per).tolist())] for name, a in sparse.items()]
    return _Table(["above", *(f"{mark:g}" for mark in marks)], rows, note=f"Activation: {SHARES[per]}.")


def _expert_tables(findings: Findings) -> list[_Table]:
    return [_expert_table(name, a, pool) for name, a in findings.sparse.items() for pool in a.used]


def _expert_table(name: str, activation: Activation, pool: str) -> _Table:
    """The experts of a pool, the most chosen first, with what they take above its share."""
    favourites = {kind: activation.favourites(kind, pool) for kind in LABELS}
    kinds = [kind for kind, found in favourites.items() if any(found)]
    columns = [
        "expert",
        "choices",
        "per token",
        "per row",
        "of even share",
        "from text",
        *(f"{k}: lift" for k in kinds),
    ]
    total, text = activation.choices(pool).sum(0), activation.text_share(pool)[0]
    shares = [activation.shares(pool, per) for per in SHARES]
    rows = []
    for expert in sorted(range(activation.num_experts), key=lambda e: (-total[e], e)):
        liked = [
            "  ".join(f"{label} {lift:.1f}" for label, _, lift in favourites[kind][expert] if lift >= 1.05)
            for kind in kinds
        ]
        of_text = "" if np.isnan(text[expert]) else percent(float(text[expert]))
        numbers = [number(float(share[expert]), 3) for share in shares]
        rows.append([expert, f"{int(total[expert]):,}", *numbers, of_text, *liked])
    note = "Lift: how much more often than at all experts together, from the sample of tokens; at least 5 choices."
    return _Table(columns, rows, f"{name}, {draw.pool_label(pool)}", note if kinds else "")


def _divergence_section(findings: Findings, files: Sequence[str]) -> _Section:
    tables = []
    for name, activation in findings.sparse.items():
        words = activation.listed_words()
        if not words:
            continue
        met = [[word, f"{count:,}", f"{mean:.3f}"] for word, count, mean in words if count]
        absent = len(words) - len(met)
        note = f"Listed words that do not occur: {absent:,}." if absent else ""
        note += f" The first {MAX_WORD_ROWS}; all are in activation.json." if len(met) > MAX_WORD_ROWS else ""
        columns = ["listed word", "tokens", "distinct experts"]
        tables.append(_Table(columns, met[:MAX_WORD_ROWS], f"{name}: {len(met):,} listed words", note))
    return _Section("Divergence", _NOTES["divergence"], _of("divergence.png", files), tables)


def _specialisation_tables(sparse: Mapping[str, Activation]) -> list[_Table]:
    columns = ["model", "layer", "label", "bits", "shuffled", "deviation", "of at most", "tokens", "labels"]
    rows = []
    for kind in LABELS:
        for name, activation in sparse.items():
            for pool, s in activation.specialisation(kind).items():
                bits = [f"{s.bits:.4f}", f"{s.baseline:.4f}", f"{s.deviation:.1g}", f"{s.label_bits:.3f}"]
                counts = [f"{s.num_tokens:,}", f"{s.num_labels:,}"]
                rows.append([name, draw.pool_label(pool), kind, *bits, *counts])
    return [_Table(columns, rows, "Numbers")] if rows else []
