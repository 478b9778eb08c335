# SPDX-License-Identifier: Apache-2.0
"""The rules of the house, as tests."""

import ast
import doctest
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from batchery.cards import load_cards

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "batchery"
FILES = sorted(SOURCE.rglob("*.py"))
CARDS = load_cards()
LAYERS = {"_core": 0, "cards": 0, "datasets": 0, "kernels": 1, "studies": 3, "cli": 4}
PACKAGE_LAYER = 2

ids = {"ids": lambda value: str(getattr(value, "slug", value)).removeprefix(str(SOURCE))}


def layer(path):
    first = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    return LAYERS.get(first, 0 if first == "__init__" else PACKAGE_LAYER)


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module


def module_name(path):
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", FILES, **ids)
def test_a_source_file_keeps_the_rules(path):
    text = path.read_text()
    tree = ast.parse(text)
    assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n")
    assert text.count("\n") <= 500
    assert path.stem not in {"utils", "helpers", "common", "misc"}
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Assert), f"assert in line {node.lineno}"
        bare = isinstance(node, ast.ExceptHandler) and node.type is None
        assert not bare, f"bare except in line {getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"print in line {node.lineno}"


@pytest.mark.parametrize("path", FILES, **ids)
def test_imports_go_one_way(path):
    for name in imports(ast.parse(path.read_text())):
        if not name.startswith("batchery."):
            continue
        target = SOURCE / name.removeprefix("batchery.").split(".")[0]
        assert layer(target) <= layer(path), f"{path.name} imports {name}"


def modules_after(statement):
    code = f"import sys; {statement}; print(chr(10).join(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": str(SOURCE.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    return {name.split(".")[0] for name in done.stdout.split()}


HEAVY = {"transformers", "accelerate", "sklearn", "scipy", "matplotlib", "pyarrow", "faiss", "ray"}


def test_importing_the_package_imports_nothing_heavy():
    assert not modules_after("import batchery") & (HEAVY | {"torch", "numpy"})
    assert not modules_after("import batchery.optim, batchery.select") & (HEAVY | {"torch"})


@pytest.mark.parametrize("card", CARDS, **ids)
def test_importing_a_system_needs_torch_and_numpy_alone(card):
    statement = "; ".join("from {} import {}".format(*path.rsplit(".", 1)) for path in card.objects)
    assert not modules_after(statement) & HEAVY


@pytest.mark.parametrize("card", CARDS, **ids)
def test_a_system_has_its_five_places(card):
    name = card.slug.replace("-", "_")
    assert (SOURCE / "studies" / f"{name}.py").is_file()
    assert (ROOT / "benchmarks" / f"{name}.py").is_file()
    assert list((ROOT / "tests").rglob(f"test_{name}.py"))
    assert importlib.import_module(card.home)
    assert f"`{card.slug}`" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("card", CARDS, **ids)
def test_the_example_of_a_card_runs(card):
    code = card.example()
    assert code
    exec(compile(code, f"{card.slug}.md", "exec"), {"print": lambda *values: None})


@pytest.mark.parametrize("card", CARDS, **ids)
def test_results_of_a_system_are_stored_with_figures(card):
    folder = ROOT / "docs" / "results"
    found = [scale for scale in ("cpu", "gpu") if (folder / f"{card.slug}.{scale}.json").is_file()]
    assert "cpu" in found
    assert all((folder / f"{card.slug}.{scale}.svg").is_file() for scale in found)


STUBS = sorted(SOURCE.rglob("__init__.pyi"))


@pytest.mark.parametrize("stub", STUBS, **ids)
def test_what_a_stub_names_can_be_imported(stub):
    module = importlib.import_module(module_name(stub.with_suffix(".py")))
    named = {
        alias.asname or alias.name
        for node in ast.parse(stub.read_text()).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert set(module.__all__) == named
    assert all(hasattr(module, name) for name in named)


DOCTESTED = [path for path in FILES if ">>>" in path.read_text()]


@pytest.mark.parametrize("path", DOCTESTED, **ids)
def test_examples_in_docstrings_run(path):
    failed, tried = doctest.testmod(
        importlib.import_module(module_name(path)), optionflags=doctest.NORMALIZE_WHITESPACE
    )
    assert tried > 0
    assert failed == 0


def test_the_readme_shows_the_stored_results():
    from batchery.studies.report import readme_table

    text = (ROOT / "README.md").read_text()
    assert readme_table(CARDS, ROOT / "docs" / "results") in text


def test_the_project_speaks_of_itself_alone():
    forbidden = re.compile(r"/(work|root)/|py(pi)\.org|registry\.(npm)js")
    for pattern in ("*.md", "*.toml", "Makefile", "src/**/*.py", "docs/**/*.md", ".ci/run"):
        for path in ROOT.glob(pattern):
            assert not forbidden.search(path.read_text()), path
