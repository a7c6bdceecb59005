"""Promise 6: a number that is not finite, wherever it comes from, costs all ranks one step and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from mhmoe_vl import distributed
from mhmoe_vl.nn.router import LinearRouter, RouterScores
from mhmoe_vl.tasks.masked_modeling import MaskedModeling
from mhmoe_vl.train import checkpoint
from mhmoe_vl.train.step import Trainer

from .harness import Found, error_line, in_ranks
from .runs import losses, pretrain, write_run

TITLE = "not a number"
AT = 3
"""the step, counted from 0, at which the number is injected"""
ROW = 10
"""such steps in a row stop a run"""

_here = {"now": False}


def _inject(steps: range, rank: int) -> None:
    """Let the injections below know when it is their step and rank."""
    update = Trainer.update

    def watched(trainer: Trainer, step: int, *arguments, **options):
        _here["now"] = step in steps and distributed.rank() == rank
        try:
            return update(trainer, step, *arguments, **options)
        finally:
            _here["now"] = False

    Trainer.update = watched


def in_loss(value: float) -> None:
    original = MaskedModeling.loss

    def loss(task, output, batch):
        terms = original(task, output, batch)
        return {name: term * value if _here["now"] else term for name, term in terms.items()}

    MaskedModeling.loss = loss


def in_gradient(value: float) -> None:
    """In one number of one parameter, after gradients were averaged: this rank alone sees it."""
    original = Trainer._complete_gradients

    def complete(trainer):
        original(trainer)
        if _here["now"]:
            trainer.parameters[2].grad.view(-1)[0] = value

    Trainer._complete_gradients = complete


def in_image(value: float) -> None:
    original = MaskedModeling.prepare

    def prepare(task, batch, device):
        batch = original(task, batch, device)
        if _here["now"]:
            batch.images[0, 0, 0, 0] = value
        return batch

    MaskedModeling.prepare = prepare


def in_router(value: float) -> None:
    original = LinearRouter.score

    def score(router, rows):
        scores = original(router, rows)
        if not _here["now"]:
            return scores
        logits = scores.logits.clone()
        logits[0, 0] = value
        return RouterScores(logits, logits)

    LinearRouter.score = score


PLACES: dict[str, Callable[[float], None]] = {
    "loss": in_loss, "gradient": in_gradient, "image": in_image, "router": in_router
}  # fmt: skip


def check(folder: Path, full: bool) -> Found:
    found = Found("")
    cases = [(place, 2, 1, torch.nan) for place in PLACES]
    if full:
        cases = [(p, w, r, v) for p in PLACES for w in (1, 2) for r in range(w) for v in (torch.nan, torch.inf)]
    skipped = 0
    for place, world, rank, value in cases:
        name = f"{place}-{rank}-of-{world}-{value}"
        problem = _one_step(folder, name, place, world, rank, value)
        skipped += problem is None
        if problem is not None:
            found.failures.append(f"{name}: {problem}")
    stopped = _in_a_row(folder, 2, found)
    found.figure = (
        f"{skipped} of {len(cases)} injections ({', '.join(PLACES)}; each rank) skipped by all ranks together, weights,"
        f" buffers and optimizer unchanged, counted; {ROW} in a row: {stopped}"
    )
    found.numbers = {"injections": len(cases), "skipped": skipped}
    return found


def _run(file: Path, place: str, value: float, steps: range, rank: int) -> int:
    _inject(steps, rank)
    PLACES[place](value)
    return pretrain("--config", file)


def _one_step(folder: Path, name: str, place: str, world: int, rank: int, value: float) -> str | None:
    """What is wrong after one bad step on one rank; none when it was skipped and left no trace."""
    file = write_run(folder, name, steps=AT + 2, eval_every=0, save_every=1, keep_steps=True)
    said = folder / f"{name}-said"
    codes = in_ranks(lambda me: _run(file, place, value, range(AT, AT + 1), rank), world, said)
    text = (said / "rank-0.txt").read_text()
    if codes != [0] * world:
        return f"exit codes {codes}: {text[-300:]}"
    [warning] = [line for line in text.splitlines() if line.startswith("warning: ")] or [""]
    expected = f"router of blocks.1.joint (rank {rank})" if place == "router" else ""
    if f"step {AT + 1} skipped: not finite: " not in warning or expected not in warning:
        return f"warning {warning!r}"
    counts = [line["skipped"] for line in losses(folder / name) if line["split"] == "train"]
    if counts != [0] * AT + [1, 1]:
        return f"counted {counts}"
    before, after = (_tensors(folder / name / f"checkpoints/step-{step:08d}") for step in (AT, AT + 1))
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    if changed:
        return f"{len(changed)} tensors changed: {changed[:3]}"
    later = _tensors(folder / name / "checkpoints/last")
    return None if any(not torch.equal(later[key], after[key]) for key in after) else "no step after it was made"


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    checkpoint.read(path)  # verifies, and refuses what is not finite
    return {f"{f.stem}/{key}": value for f in path.glob("*.safetensors") for key, value in load_file(f).items()}


def _in_a_row(folder: Path, world: int, found: Found) -> str:
    """Bad steps without end, on the last rank: the run must stop in one line and leave good checkpoints."""
    file = write_run(folder, "row", steps=40, eval_every=0, save_every=2)
    said = folder / "row-said"
    codes = in_ranks(lambda me: _run(file, "loss", torch.nan, range(AT, 99), world - 1), world, said)
    lines = [line for line in (said / "rank-0.txt").read_text().splitlines() if line.startswith("error: ")]
    wrong = error_line("\n".join(lines))
    if codes != [2] * world or wrong or f"{ROW} steps in a row" not in lines[0]:
        found.failures.append(f"in a row: exit codes {codes}, {wrong}: {lines}")
        return "not stopped"
    for path in (folder / "row/checkpoints").iterdir():
        checkpoint.read(path)
    step = checkpoint.read(folder / "row/checkpoints/last").state["step"]
    return f"stopped in one line, checkpoint of step {step} kept"
