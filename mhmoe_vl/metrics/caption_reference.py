"""coco-caption's own tokenizer and METEOR, which need Java and the ``caption-ref`` extra (pycocoevalcap)."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from ..errors import ConfigError, one_line

PIP = "pip install 'mhmoe-vl[caption-ref]'"


def check_reference() -> None:
    """Find out early whether the functions below can run.

    Raises:
        ConfigError: pycocoevalcap is not installed, or there is no ``java`` command.
    """
    try:
        import pycocoevalcap  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"--tokenizer ptb: pycocoevalcap is not installed ({PIP}, or take --tokenizer own)"
        ) from error
    if shutil.which("java") is None:
        raise ConfigError("--tokenizer ptb: no java command (install a Java runtime, or take --tokenizer own)")


def ptb_tokenize(captions: Mapping[Hashable, Sequence[str]]) -> dict[Hashable, list[str]]:
    """The token strings of Stanford's PTBTokenizer without coco-caption's list of punctuation.

    Args:
        captions: texts by image id.

    Raises:
        ConfigError: as :func:`check_reference`, or the Java program failed.
    """
    check_reference()
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    # One text is one line to the Java program, so no text may break its line.
    lines = {image: [{"caption": " ".join(text.split())} for text in texts] for image, texts in captions.items()}
    tokens = _with_java(lambda: PTBTokenizer().tokenize(lines))
    if {image: len(texts) for image, texts in tokens.items()} != {image: len(texts) for image, texts in lines.items()}:
        raise ConfigError("--tokenizer ptb: Java gave fewer texts than it got (take --tokenizer own)")
    return tokens


def meteor(references: Mapping[Hashable, Sequence[str]], candidates: Mapping[Hashable, str]) -> float:
    """METEOR 1.5 (Denkowski and Lavie 2014) of a whole set, on token strings by image id.

    Raises:
        ConfigError: as :func:`check_reference`, or the Java program failed.
    """
    check_reference()
    from pycocoevalcap.meteor.meteor import Meteor

    texts = {image: list(captions) for image, captions in references.items()}
    single = {image: [candidates[image]] for image in texts}
    score, _ = _with_java(lambda: Meteor().compute_score(texts, single))
    return float(score)


def _with_java(action: Callable[[], Any]) -> Any:
    try:
        return action()
    except (OSError, ValueError) as error:
        what = one_line(error, 120)
        raise ConfigError(f"--tokenizer ptb: the Java program failed: {what} (take --tokenizer own)") from error
