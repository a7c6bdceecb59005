"""coco-caption's tokenizer and METEOR: what they are given, what is said where they are absent, and the real ones."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mhmoe_vl.errors import ConfigError
from mhmoe_vl.metrics import caption_reference
from mhmoe_vl.metrics.caption_reference import meteor, ptb_tokenize


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts modules with pycocoevalcap's names and signatures in its place."""

    def install(
        tokens: Callable[[str], str] = str.lower, meteor: Callable[[dict, dict], Any] = lambda gts, res: (0.5, [])
    ) -> None:
        class PTBTokenizer:
            def tokenize(self, captions: dict) -> dict:
                return {image: [tokens(entry["caption"]) for entry in entries] for image, entries in captions.items()}

        class Meteor:
            def compute_score(self, gts: dict, res: dict) -> Any:
                return meteor(gts, res)

        for name in ("", ".tokenizer", ".tokenizer.ptbtokenizer", ".meteor", ".meteor.meteor"):
            monkeypatch.setitem(sys.modules, "pycocoevalcap" + name, ModuleType("pycocoevalcap" + name))
        sys.modules["pycocoevalcap.tokenizer.ptbtokenizer"].PTBTokenizer = PTBTokenizer
        sys.modules["pycocoevalcap.meteor.meteor"].Meteor = Meteor
        monkeypatch.setattr(caption_reference.shutil, "which", lambda name: f"/bin/{name}")

    return install


def test_a_text_stays_one_line_for_java(stand_in: Callable[..., None]) -> None:
    stand_in()
    assert ptb_tokenize({7: ["A\r\ncat \u2028 sat", ""], 3: ["B"]}) == {7: ["a cat sat", ""], 3: ["b"]}


def test_meteor_gets_lists_in_the_order_of_the_references(stand_in: Callable[..., None]) -> None:
    def check(gts: dict, res: dict) -> tuple[float, list[float]]:
        assert list(gts.items()) == [(2, ["a", "b"]), (1, ["c"])]
        assert list(res.items()) == [(2, ["x"]), (1, ["y"])]
        return 0.25, [0.2, 0.3]

    stand_in(meteor=check)
    assert meteor({2: ("a", "b"), 1: ["c"]}, {1: "y", 2: "x"}) == 0.25


def test_what_is_absent_is_said_with_its_remedy(monkeypatch: pytest.MonkeyPatch, stand_in: Callable[..., None]) -> None:
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    with pytest.raises(ConfigError, match=r"pycocoevalcap is not installed \(pip install 'mhmoe-vl\[caption-ref\]'"):
        ptb_tokenize({1: ["a"]})
    stand_in()
    monkeypatch.setattr(caption_reference.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="no java command"):
        meteor({1: ["a"]}, {1: "a"})


def test_a_java_program_that_fails_is_one_line(stand_in: Callable[..., None]) -> None:
    def fail(text: str) -> str:
        raise PermissionError(13, "Permission denied", "/usr/lib/tmp")

    stand_in(tokens=fail)
    with pytest.raises(ConfigError, match=r"Java program failed: .*Permission denied"):
        ptb_tokenize({1: ["a"]})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_real_ones_give_the_known_numbers(data_dir: Path) -> None:
    pytest.importorskip("pycocoevalcap")
    if shutil.which("java") is None:
        pytest.skip("no java")
    folder = data_dir / "caption_known" / "clipscore_example"
    references, candidates, expected = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("refs", "good_captions", "expected")
    )
    tokens = {image: texts[0] for image, texts in ptb_tokenize({i: [text] for i, text in candidates.items()}).items()}
    assert tokens["image1"] == "an orange cat and a grey cat are lying together"
    found = meteor(ptb_tokenize(references), tokens)
    assert found == pytest.approx(expected["good_captions"]["METEOR"], abs=5.1e-5)
