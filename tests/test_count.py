from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DENSE = """
encoder: {embed_dim: 24, depth: 2, img_size: 16, patch_size: 8, vocab_size: 50, max_text_len: 9}
"""
SPARSE = """
parity: {num_experts: 4, hidden_dim: 96}
encoder:
  embed_dim: 24
  depth: 2
  img_size: 16
  patch_size: 8
  vocab_size: 50
  max_text_len: 9
  ffn: {kind: mh_moe, num_experts: parity, hidden_dim: 24, num_subtokens: 2}
"""


def count(folder, *arguments):
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "count.py"), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "dense.yaml").write_text(DENSE)
    (tmp_path / "sparse.yaml").write_text(SPARSE)
    (tmp_path / "wider.yaml").write_text("encoder: {ffn: {hidden_dim: 32}}")
    return tmp_path


def cells(output, label):
    line = next(line for line in output.splitlines() if line.startswith(f"  {label} "))
    return line.split()[len(label.split()) :]


def test_models_stand_side_by_side(folder):
    result = count(folder, "--config", "dense.yaml", "sparse.yaml", "--json", "out.json")
    assert result.returncode == 0, result.stderr
    dense, sparse = json.loads((folder / "out.json").read_text())["models"]
    assert dense["config"] == "dense.yaml"
    assert result.stdout.splitlines()[0].split() == ["dense", "sparse"]
    assert cells(result.stdout, "total") == [f"{m['parameters']['total'] / 1e6:,.3f}" for m in (dense, sparse)]
    assert cells(result.stdout, "pair") == [f"{m['flops']['pair'] / 1e6:,.3f}" for m in (dense, sparse)]
    assert cells(result.stdout, "layer parameters")[0] == "-"
    # Two branches of two dense blocks: 24 x 96 twice, biases, sub-LN.
    assert dense["parts"]["dense_ffn"]["parameters"] == 4 * (2 * 24 * 96 + 96 + 24 + 2 * 96)
    assert dense["parameters"]["active"] == dense["parameters"]["total"]
    experts = sparse["parts"]["experts"]["parameters"]
    assert cells(result.stdout, "experts") == ["0.000", f"{experts / 1e6:,.3f}"]
    for model in (dense, sparse):
        assert sum(part["flops"] for part in model["parts"].values()) == model["flops"]["pair"]


def test_parity_is_solved_and_the_rest_reported(folder):
    result = count(folder, "--config", "sparse.yaml", "--json", "out.json")
    [model] = json.loads((folder / "out.json").read_text())["models"]
    assert isinstance(model["ffn"]["num_experts"], int)
    left = model["difference_percent"]["layer"]["parameters"]
    assert 0 < abs(left) < 5
    assert cells(result.stdout, "layer parameters") == [f"{left:+.2f}"]


def test_files_are_merged_over_a_base(folder):
    result = count(folder, "--base", "sparse.yaml", "--config", "wider.yaml", "--json", "out.json")
    assert result.returncode == 0, result.stderr
    ffn = json.loads((folder / "out.json").read_text())["models"][0]["ffn"]
    assert (ffn["kind"], ffn["hidden_dim"]) == ("mh_moe", 32)


def test_heads_and_text_length_are_counted(folder):
    count(folder, "--config", "dense.yaml", "--num-codes", "7", "--text-len", "3", "--json", "out.json")
    [model] = json.loads((folder / "out.json").read_text())["models"]
    assert model["parts"]["heads"]["parameters"] == 25 * (7 + 50)
    assert model["parts"]["heads"]["flops"] == 2 * 24 * (7 * 5 + 50 * 3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config", "none.yaml"], "none.yaml: No such file"),
        (["--config", "wider.yaml"], "'parity' without a baseline"),
        (["--config", "empty.yaml"], "empty.yaml: holds no encoder"),
        (["--config", "dense.yaml", "--text-len", "10"], "dense.yaml: text_len: 10 tokens for 9"),
        (["--config", "dense.yaml", "--text-len", "0"], "--text-len: 0 is below 1"),
        (["--config", "dense.yaml", "--json", "no/out.json"], "no/out.json: No such file"),
        (["--base", "sparse.yaml", "--config", "rare.yaml"], "rare.yaml: moe_every: 99 leaves no block of 2"),
        (["--base", "sparse.yaml", "--config", "small.yaml"], "small.yaml: img_size: 4 x 4 pixels are not whole"),
        (["--base", "dense.yaml", "--config", "small.yaml"], "small.yaml: img_size: 4 x 4 pixels are not whole"),
        (["--base", "dense.yaml", "--config", "none_of_both.yaml"], "none_of_both.yaml: modalities: "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line_and_exit_code_2(folder, arguments, words):
    (folder / "empty.yaml").write_text("seed: 1")
    (folder / "wider.yaml").write_text("encoder: {ffn: {kind: dense, hidden_dim: parity}}")
    (folder / "rare.yaml").write_text("encoder: {moe_every: 99}")
    (folder / "small.yaml").write_text("encoder: {img_size: 4}")
    (folder / "none_of_both.yaml").write_text("encoder: {modalities: []}")
    result = count(folder, *arguments)
    assert result.returncode == 2
    assert words in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_the_tool_imports_no_torch(folder):
    code = "import sys, runpy; runpy.run_path(sys.argv[1]); sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, "-c", code, str(ROOT / "tools" / "count.py")]
    assert subprocess.run(arguments, env=environment, check=False).returncode == 0
