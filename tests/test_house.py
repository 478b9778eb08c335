# SPDX-License-Identifier: Apache-2.0
"""The rules of the house, as tests."""

import ast
import dataclasses
import doctest
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from batchery.cards import load_cards
from batchery.studies.harness import load_result, load_study
from batchery.studies.report import readme_table, stored_results
from batchery.studies.study import Comparison

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "batchery"
FILES = sorted(SOURCE.rglob("*.py"))
CARDS = load_cards()
LAYERS = {
    **dict.fromkeys(("__init__", "_core", "cards", "datasets", "dataset_readers"), 0),
    **{"kernels": 1, "studies": 3, "cli": 4, "__main__": 5},
}
PACKAGE_LAYER = 2
CLIENTS: set = set()  # (package, the package whose client it is): so far each stands alone

ids = {"ids": lambda value: str(getattr(value, "slug", value)).removeprefix(str(SOURCE))}


def room(path):
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "batchery":
            yield from (f"batchery.{name.name}" for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def stray_imports(own, tree):
    """What a file of a room imports from above, or from another package."""
    floor = LAYERS.get(own, PACKAGE_LAYER)
    for name in imports(tree):
        if name.startswith("."):
            yield name  # whole names alone can be judged
        elif name.startswith("batchery."):
            other = name.split(".")[1]
            target = LAYERS.get(other, PACKAGE_LAYER)
            across = target == floor == PACKAGE_LAYER and other != own
            if target > floor or (across and (own, other) not in CLIENTS):
                yield name


def module_name(path):
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", FILES, **ids)
def test_a_source_file_keeps_the_rules(path):
    text = path.read_text()
    tree = ast.parse(text)
    assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n")
    assert path.stem not in {"utils", "helpers", "common", "misc"}
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Assert), f"assert in line {node.lineno}"
        bare = isinstance(node, ast.ExceptHandler) and node.type is None
        assert not bare, f"bare except in line {getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"print in line {node.lineno}"


def test_no_file_is_over_500_lines():
    places = ("src", "tests", "benchmarks", "examples", "docs")
    files = (path for place in places for path in (ROOT / place).rglob("*.py"))
    lines = {str(path.relative_to(ROOT)): path.read_text().count("\n") for path in files}
    assert {path: count for path, count in lines.items() if count > 500} == {}


@pytest.mark.parametrize("path", FILES, **ids)
def test_imports_go_one_way(path):
    assert list(stray_imports(room(path), ast.parse(path.read_text()))) == []


@pytest.mark.parametrize(
    ("own", "line", "stray"),
    [
        ("kernels", "from batchery import optim", "batchery.optim"),
        ("optim", "from batchery import _core, studies", "batchery.studies"),
        ("optim", "import batchery.cli", "batchery.cli"),
        ("optim", "from batchery.select import HardBatchSampler", "batchery.select"),
        ("optim", "from . import lamb", "."),
        ("optim", "from ..select import hardness", "..select"),
        ("optim", "from batchery.optim.wsd import WSDScheduler", None),
        ("studies", "from batchery import datasets, optim, select", None),
    ],
)
def test_no_form_of_import_escapes_the_rule(own, line, stray):
    assert list(stray_imports(own, ast.parse(line))) == ([stray] if stray else [])


def modules_after(statement):
    code = f"import sys; {statement}; print(chr(10).join(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": str(SOURCE.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    return {name.split(".")[0] for name in done.stdout.split()}


ADAPTERS = {  # made from classes of transformers, which they import
    "batchery.compress.quant.disable_transformers",
    "batchery.compress.quant.enable_transformers",
    "batchery.optim.DecayTrigger",
    "batchery.select.HardBatchCallback",
}
HEAVY = {"transformers", "accelerate", "sklearn", "scipy", "matplotlib", "pyarrow", "faiss", "ray"}


def test_importing_the_package_imports_nothing_heavy():
    assert not modules_after("import batchery") & (HEAVY | {"torch", "numpy"})
    assert not modules_after("import batchery.optim, batchery.select") & (HEAVY | {"torch"})


@pytest.mark.parametrize("card", CARDS, **ids)
def test_importing_a_system_needs_torch_and_numpy_alone(card):
    paths = [path.rsplit(".", 1) for path in card.objects if path not in ADAPTERS]
    statement = "; ".join("from {} import {}".format(*path) for path in paths)
    assert not modules_after(statement) & HEAVY
    assert modules_after(f"sys.modules['triton'] = None; {statement}")


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


@pytest.mark.parametrize("entry", stored_results(CARDS, ROOT / "docs" / "results"), ids=".".join)
def test_a_stored_result_is_of_the_study_as_it_is(entry):
    slug, scale = entry
    study, result = load_study(slug), load_result(ROOT / "docs" / "results", slug, scale)
    own = [field.name for field in dataclasses.fields(Comparison)]
    now = {
        "claim": study.claim,
        "metrics": [vars(metric) for metric in study.metrics],
        "comparisons": [vars(comparison) for comparison in study.comparisons],
    }
    bars = [{name: item[name] for name in own} for item in result["comparisons"]]
    stale = [name for name, value in now.items() if (result | {"comparisons": bars})[name] != value]
    again = f"run again: batchery study {slug} --scale {scale}"
    assert stale == [], f"docs/results/{slug}.{scale}.json has other {', '.join(stale)}; {again}"


STUBS = sorted(SOURCE.rglob("__init__.pyi"))


def names_of(stub):
    return {
        alias.asname or alias.name
        for node in ast.parse(stub.read_text()).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


@pytest.mark.parametrize("stub", STUBS, **ids)
def test_what_a_stub_names_can_be_imported(stub):
    module = importlib.import_module(module_name(stub.with_suffix(".py")))
    named = names_of(stub)
    assert set(module.__all__) == named
    assert all(hasattr(module, name) for name in named)


WITHOUT_CARD = {
    "batchery.compress.quant": "a package, whose names are in a card",
    "batchery.compress.quant.LayerReport": "part of a QuantizationReport",
    "batchery.compress.quant.QuantizationReport": "what gptq_quantize_model returns",
    "batchery.optim.wind_tunnel.MINICPM_BATCH_LAW": "a BatchSizeLaw",
    "batchery.privacy.Challenge": "two records, given to a ContinualGame",
    "batchery.privacy.HardStream": "what hard_stream returns",
    "batchery.privacy.Release": "what a Stream keeps",
    "batchery.privacy.Stream": "what Ledger.open returns",
    "batchery.select.RoundStats": "what a HardBatchSampler says of a round",
}


def test_every_public_name_is_in_a_card():
    public = {
        f"{module}.{name}": getattr(importlib.import_module(module), name)
        for stub in STUBS
        for module in [module_name(stub.with_suffix(".py"))]
        for name in names_of(stub)
    }
    errors = {
        path
        for path, found in public.items()
        if isinstance(found, type) and issubclass(found, Exception)
    }  # documented where they are raised
    in_cards = {path for card in CARDS for path in card.objects}
    assert sorted(set(public) - errors - in_cards) == sorted(WITHOUT_CARD)


DOCTESTED = [path for path in FILES if ">>>" in path.read_text()]


@pytest.mark.parametrize("path", DOCTESTED, **ids)
def test_examples_in_docstrings_run(path):
    failed, tried = doctest.testmod(
        importlib.import_module(module_name(path)), optionflags=doctest.NORMALIZE_WHITESPACE
    )
    assert tried > 0
    assert failed == 0


def test_the_readme_shows_the_stored_results():
    text = (ROOT / "README.md").read_text()
    assert readme_table(CARDS, ROOT / "docs" / "results") in text


def test_the_project_speaks_of_itself_alone():
    forbidden = re.compile(r"/(work|root)/|py(pi)\.org|registry\.(npm)js")
    for pattern in ("*.md", "*.toml", "Makefile", "src/**/*.py", "docs/**/*.md", ".ci/run"):
        for path in ROOT.glob(pattern):
            assert not forbidden.search(path.read_text()), path


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda p: p.stem)
def test_a_benchmark_that_keeps_its_numbers_says_where_it_ran(path):
    text = path.read_text()
    assert ('"--json"' in text) == ("environment(" in text)
