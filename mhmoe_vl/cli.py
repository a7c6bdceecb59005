"""The command line of the training tools: the only place where configuration, task, model and engine meet."""

from __future__ import annotations

import json
import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from . import __version__, config
from .errors import ConfigError, guard

USAGE = """\
usage: {tool} [--config FILE [FILE ...]] [--section.field VALUE ...]
       {tool} --eval RUN [--split NAME] [--section.field VALUE ...]

{about}

  --config FILE [FILE ...]  YAML files, merged left to right (default: {default})
  --eval RUN                evaluate a run folder or one of its checkpoints, train nothing
  --split NAME              what --eval reads: val (default) or test, where the task has one
  --print-config            print the resolved configuration and stop
  --debug                   show the traceback of an error
  --version                 print the version
  --help                    this page

Several processes: torchrun --nproc_per_node N {script} ...
Options, with type and default; the order of precedence is defaults, files, options:
"""


def run(kind: str, default_config: str, about: str, argv: Sequence[str] | None = None) -> NoReturn:
    """Run a training tool and exit: 0 done, 2 an error that the user can mend, 128 + n stopped by signal n.

    Args:
        kind: of the task that this tool trains.
        default_config: file used when the command line names none.
        about: what the tool does, for ``--help``.
        argv: the command line without the program's name.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Threads that spin while they wait take the cores from the processes that prepare data; read when torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    sys.exit(guard(lambda: _run(kind, default_config, about, arguments), debug="--debug" in arguments))


def _run(kind: str, default_config: str, about: str, arguments: list[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        script = "/".join(Path(sys.argv[0]).parts[-2:])
        print(
            USAGE.format(
                tool=f"python {script}", script=script, about=textwrap.fill(about, 100), default=default_config
            )
        )
        print(config.describe(config.run_config(kind)))
        return 0
    if "--version" in arguments:
        print(__version__)
        return 0
    own, overrides = _parse(arguments)
    evaluate = own["--eval"][-1] if own["--eval"] else None
    settings = _settings(kind, own["--config"] or [default_config], evaluate, overrides)
    if "--print-config" in arguments:
        print(config.dump(settings), end="")
        return 0
    if evaluate is None:
        if own["--split"]:
            raise ConfigError("--split: only with --eval (training evaluates on val)")
        return _train(settings)
    return _evaluate(settings, Path(evaluate), own["--split"][-1] if own["--split"] else "val")


def _parse(arguments: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """The values of ``--config``, ``--eval`` and ``--split``, and the other options."""
    meaning = {"--config": "FILE", "--eval": "RUN", "--split": "NAME"}
    own: dict[str, list[str]] = {name: [] for name in meaning}
    rest: list[str] = []
    queue = [a for a in arguments if a not in ("--debug", "--print-config")]
    while queue:
        argument = queue.pop(0)
        name, _, value = argument.partition("=")
        if name not in own:
            rest.append(argument)
            continue
        values = [value] if value else []
        while queue and not queue[0].startswith("--") and (name == "--config" or not values):
            values.append(queue.pop(0))
        if not values:
            raise ConfigError(f"{name} needs a value (write {name} {meaning[name]})")
        own[name] += values
    return own, rest


def _settings(kind: str, files: list[str], evaluate: str | None, overrides: list[str]) -> Any:
    """The configuration with ``parity`` solved, so that what is saved reruns the run alone."""
    if evaluate is not None:
        files = [str(run_folder(Path(evaluate)) / "config.yaml")]
    settings = config.load(config.run_config(kind), files, overrides)
    if settings.encoder is not None:
        from . import parity

        settings = settings.model_copy(update={"encoder": parity.resolve(settings.encoder, settings.parity)})
    return settings


def run_folder(path: Path) -> Path:
    """The run folder that ``path``, itself or one of its checkpoints, belongs to.

    Raises:
        ConfigError: there is none.
    """
    for folder in (path, path.parent.parent):
        if (folder / "config.yaml").is_file():
            return folder
    raise ConfigError(f"{path}: not a run folder or a checkpoint in one: config.yaml is missing (name a run folder)")


def build_task(settings: config.RunConfig) -> Any:
    """The task of a run; raises before data or accelerator are touched when sizes do not fit."""
    from .tasks import captioning, imagenet, masked_modeling, nlvr2, visual_tokenizer, vqa
    from .tasks.base import InputSpec

    tasks = {
        "masked_modeling": masked_modeling.MaskedModeling,
        "visual_tokenizer": visual_tokenizer.VisualTokenizerTask,
        "vqa": vqa.VQA,
        "nlvr2": nlvr2.NLVR2,
        "captioning": captioning.Captioning,
        "imagenet": imagenet.ImageNet,
    }
    if settings.encoder is None and settings.task.kind != "visual_tokenizer":
        raise ConfigError("encoder: not set (add the section, or a file of configs/model)")
    inputs = settings.encoder and InputSpec.of(settings.encoder)
    options = settings.task.model_dump(exclude={"kind"})
    return tasks[settings.task.kind](inputs, seed=settings.seed, accumulate=settings.train.accumulate, **options)


def _model(settings: config.RunConfig, task: Any, init_from: str | None) -> Any:
    """The model from the run's seed, then from ``init_from``: the encoder, and those heads that are in there too."""
    import torch

    from . import distributed
    from .models.factory import build_encoder, load_encoder_weights, load_head_weights

    torch.manual_seed(settings.seed)
    encoder = build_encoder(settings.encoder) if settings.encoder is not None else None
    if encoder is not None and init_from is not None:
        load_encoder_weights(encoder, init_from)
    model = task.model(encoder)
    if encoder is not None and init_from is not None:
        load_head_weights(model, init_from, print if distributed.is_main() else lambda line: None)
    return model


def _train(settings: config.RunConfig) -> int:
    from . import distributed
    from .analysis.gallery import write_gallery
    from .analysis.report import write_report
    from .analysis.summary import summarize, table
    from .train import engine

    output = Path(settings.output_dir)
    with engine.session(settings.train) as device:
        task = build_task(settings)
        model = _model(settings, task, settings.init_from)
        code = engine.fit(task, model, settings, output, device=device)
        if code == 0 and not (output / "baselines.json").exists():
            baselines = task.baselines(device)
            if distributed.is_main():
                (output / "baselines.json").write_text(json.dumps(baselines, indent=1))
        if distributed.is_main():
            summary = summarize(output)
            (output / "summary.json").write_text(json.dumps(summary, indent=1))
            if cards := task.gallery(_last_records(output)):
                write_gallery(output, cards)
            report = write_report(output, metric=task.metric, higher_is_better=task.higher_is_better)
            print(table(summary, report))
    return code


def _last_records(run_dir: Path, most: int = 48) -> list[dict[str, Any]]:
    """The first predictions of the last evaluation of a run."""
    files = sorted((run_dir / "predictions").glob("val_step-*.jsonl"))
    lines = files[-1].read_text(encoding="utf-8").splitlines() if files else []
    return [json.loads(line) for line in lines[:most]]


def _evaluate(settings: config.RunConfig, path: Path, split: str) -> int:
    """Evaluate on ``val``, or predict ``test``: records and official files into the run's ``predictions/SPLIT``."""
    from . import distributed
    from .train import engine, resume
    from .train.evaluation import write_predictions, write_texts

    if split != "val" and (split == "train" or getattr(settings.task, split, None) is None):
        raise ConfigError(f"--split {split}: task.{split} is not set, or the task has none (val, or set the section)")
    with engine.session(settings.train) as device:
        task = build_task(settings)
        task.restore(resume.recorded(run_folder(path)))
        model = _model(settings, task, None)
        records, scores = engine.evaluate_checkpoint(task, model, settings, path, split=split, device=device)
        if distributed.is_main():
            folder = run_folder(path) / "predictions" / split
            try:
                write_predictions(folder / "records.jsonl", records)
                write_texts(folder, task.submission(records))
            except OSError as error:
                raise ConfigError(
                    f"{folder}: cannot be written: {error.strerror} (evaluate a copy of the run)"
                ) from error
            for name, value in scores.items():
                print(f"{name:32} {value:.6g}")
            print(f"{'predictions':32} {folder}")
    return 0
