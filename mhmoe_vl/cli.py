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
       {tool} --eval RUN [--section.field VALUE ...]

{about}

  --config FILE [FILE ...]  YAML files, merged left to right (default: {default})
  --eval RUN                evaluate a run folder or one of its checkpoints, train nothing
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
    files, evaluate, overrides, print_config = _split(arguments)
    settings = _settings(kind, files or [default_config], evaluate, overrides)
    if print_config:
        print(config.dump(settings), end="")
        return 0
    return _evaluate(settings, Path(evaluate)) if evaluate else _train(settings)


def _split(arguments: list[str]) -> tuple[list[str], str | None, list[str], bool]:
    """``--config`` files, the run to evaluate, the other options, and whether to print the configuration only."""
    files: list[str] = []
    evaluate = None
    rest: list[str] = []
    queue = [a for a in arguments if a not in ("--debug", "--print-config")]
    while queue:
        argument = queue.pop(0)
        name, _, value = argument.partition("=")
        if name not in ("--config", "--eval"):
            rest.append(argument)
            continue
        values = [value] if value else []
        while queue and not queue[0].startswith("--") and (name == "--config" or not values):
            values.append(queue.pop(0))
        if not values:
            raise ConfigError(f"{name} needs a file or folder (write {name} PATH)")
        if name == "--config":
            files += values
        else:
            evaluate = values[0]
    return files, evaluate, rest, "--print-config" in arguments


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
    from .tasks import masked_modeling, visual_tokenizer
    from .tasks.base import InputSpec

    tasks = {
        "masked_modeling": masked_modeling.MaskedModeling,
        "visual_tokenizer": visual_tokenizer.VisualTokenizerTask,
    }
    if settings.encoder is None and settings.task.kind != "visual_tokenizer":
        raise ConfigError("encoder: not set (add the section, or a file of configs/model)")
    inputs = settings.encoder and InputSpec.of(settings.encoder)
    options = settings.task.model_dump(exclude={"kind"})
    return tasks[settings.task.kind](inputs, seed=settings.seed, accumulate=settings.train.accumulate, **options)


def _assemble(settings: config.RunConfig) -> tuple[Any, Any]:
    """Task and freshly initialised model, both from the run's seed."""
    import torch

    from .models.factory import build_encoder, load_encoder_weights

    task = build_task(settings)
    torch.manual_seed(settings.seed)
    encoder = build_encoder(settings.encoder) if settings.encoder is not None else None
    if encoder is not None and settings.init_from is not None:
        load_encoder_weights(encoder, settings.init_from)
    return task, task.model(encoder)


def _train(settings: config.RunConfig) -> int:
    from . import distributed
    from .analysis.report import write_report
    from .analysis.summary import summarize, table
    from .train import engine

    output = Path(settings.output_dir)
    with engine.session(settings.train) as device:
        task, model = _assemble(settings)
        code = engine.fit(task, model, settings, output, device=device)
        if code == 0 and not (output / "baselines.json").exists():
            baselines = task.baselines(device)
            if distributed.is_main():
                (output / "baselines.json").write_text(json.dumps(baselines, indent=1))
        if distributed.is_main():
            summary = summarize(output)
            (output / "summary.json").write_text(json.dumps(summary, indent=1))
            report = write_report(output, metric=task.metric, higher_is_better=task.higher_is_better)
            print(table(summary, report))
    return code


def _evaluate(settings: config.RunConfig, path: Path) -> int:
    from . import distributed
    from .train import engine

    with engine.session(settings.train) as device:
        task, model = _assemble(settings)
        scores = engine.evaluate_checkpoint(task, model, settings, path, device=device)
        if distributed.is_main():
            for name, value in scores.items():
                print(f"{name:32} {value:.6g}")
    return 0
