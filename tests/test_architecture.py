"""The rules of the house, read from the source: who imports whom, what is never called, how long a door is."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mhmoe_vl"
HELPERS = {"config", "errors", "checks", "parity", "distributed"}
MAY_IMPORT = {
    "nn": set(),
    "data": set(),
    "metrics": set(),
    "models": {"nn"},
    "train": {"tasks.base", "data.loader"},
    "tasks": {"models", "data", "metrics"},
    "analysis": {"models", "data", "nn.router", "nn.dispatch"},
    "commands": {"data", "metrics", "models", "train.checkpoint"},
    "benchmarks": {"nn", "models", "data", "tasks", "train"},
}
LAZY_OK = {"cli.py", "__init__.py"}
OPTIONAL = {"open_clip", "sentencepiece", "tensorboard", "matplotlib", "pycocoevalcap"}
KERNELS = {"fused_kernels", "fused_choice_kernels"}  # import Triton
SOURCES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "tools").glob("*.py"), *(ROOT / "data_prep").glob("*.py")])
TREES = {path: ast.parse(path.read_text()) for path in SOURCES}


def imported(path: Path) -> list[tuple[ast.stmt, str]]:
    """Every import of a module of ours or others, as an absolute dotted name."""
    found = []
    parts = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            found += [(node, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(parts[: len(parts) - node.level]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            found += [(node, f"{module}.{alias.name}") for alias in node.names]
    return found


@pytest.mark.parametrize("path", [p for p in SOURCES if PACKAGE in p.parents], ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_imports_only_what_its_folder_may(path):
    folder = path.relative_to(PACKAGE).parts[0]
    if folder not in MAY_IMPORT:
        return
    for _, name in imported(path):
        if not name.startswith("mhmoe_vl."):
            continue
        target = name.removeprefix("mhmoe_vl.")
        allowed = HELPERS | MAY_IMPORT[folder] | {folder, "__version__"}
        assert any(target == a or target.startswith(a + ".") for a in allowed), f"{folder} must not import {target}"


def test_no_cycles():
    modules = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in SOURCES}
    graph = {}
    for name, path in modules.items():
        inside = {id(n) for f in ast.walk(TREES[path]) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
        targets = {t for node, t in imported(path) if id(node) not in inside}
        graph[name] = {m for t in targets for m in (t, t.rpartition(".")[0]) if m in modules and m != name}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail, name])
        if name not in done:
            for target in graph[name]:
                visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_inside_functions_are_of_optional_packages_only(path):
    if path.name in LAZY_OK or "commands" in path.parts:
        return
    for function in ast.walk(TREES[path]):
        if not isinstance(function, ast.FunctionDef):
            continue
        for node in ast.walk(function):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names += [node.module] if node.module else [a.name for a in node.names]
            for name in names:
                assert name.split(".")[0] in OPTIONAL | KERNELS or name.startswith("torch.utils.tensorboard"), (
                    f"{path.name}:{node.lineno} imports {name} inside {function.name}"
                )


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_foreign_is_executed(path):
    for node in ast.walk(TREES[path]):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names] + [getattr(node, "module", "") or ""]
            banned = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "torch.distributed.checkpoint"}
            assert not banned & set(names), f"{path}:{node.lineno}"
        if not isinstance(node, ast.Call):
            continue
        name, keywords = dotted(node.func), {k.arg: k.value for k in node.keywords}
        place = f"{path.name}:{node.lineno}: {name}"
        assert name not in {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.save"}, place
        assert not name.startswith(("os.exec", "os.spawn", "subprocess.get", "torch.hub.", "torch.jit.")), place
        assert not name.endswith((".extractall", ".extract", "read_pickle", "all_gather_object")), place
        assert not name.endswith(("broadcast_object_list", "unsafe_load", "full_load", "load_all")), place
        allowed = keywords.get("allow_pickle", ast.Constant(False))
        assert isinstance(allowed, ast.Constant) and allowed.value is False, place
        assert "shell" not in keywords, place
        if name == "torch.load":
            weights_only = keywords.get("weights_only")
            assert isinstance(weights_only, ast.Constant) and weights_only.value is True, place
        if name == "yaml.load":
            loader = keywords.get("Loader")
            assert isinstance(loader, ast.Name) and loader.id == "_StrictLoader", place
        if name.endswith("Environment") and "jinja2" in name:
            assert "autoescape" in keywords, place
        assert name != "jinja2.Template", place


def test_task_names_are_compared_nowhere_else():
    kinds = {"masked_modeling", "visual_tokenizer", "vqa", "nlvr2", "captioning", "imagenet", "detection"}
    for path in SOURCES:
        if PACKAGE not in path.parents or path.name in ("cli.py", "config.py") or "tasks" in path.parts:
            continue
        for node in ast.walk(TREES[path]):
            if isinstance(node, ast.Compare):
                literals = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
                assert not literals & kinds, f"{path}:{node.lineno}"


def test_doors_are_short():
    reports = dict.fromkeys(["count.py", "compare_ffn.py", "demo.py", "benchmark_ffn.py", "benchmark_training.py"], 150)
    for path in (ROOT / "tools").glob("*.py"):
        lines = len(path.read_text().splitlines())
        assert lines <= reports.get(path.name, 30), f"{path.name}: {lines} lines"


def test_the_package_imports_without_torch_or_timm():
    import subprocess
    import sys

    code = (
        "import sys, mhmoe_vl, mhmoe_vl.cli, mhmoe_vl.config; print([m for m in ('torch', 'timm') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "[]"


def test_readme_names_files_that_exist():
    text = (ROOT / "README.md").read_text()
    names = set(re.findall(r"(?:tools|configs|data_prep|mhmoe_vl|tests)/[A-Za-z0-9_./-]+\.(?:py|yaml|md)", text))
    assert names, "README names no file at all"
    assert not [name for name in names if not (ROOT / name).exists()]
