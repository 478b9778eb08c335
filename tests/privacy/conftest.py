# SPDX-License-Identifier: Apache-2.0
"""Where tests of the ledger and of `batchery release` have their files."""

import json
from pathlib import Path

import numpy as np
import pytest
from release_runs import CITIES, csv_of


@pytest.fixture
def path(tmp_path):
    return tmp_path / "streams.db"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def table(folder):
    """Forty records: a city, a bit, an amount; as rows, and in a.csv and a.jsonl."""
    rng = np.random.default_rng(0)
    rows = [
        {"city": CITIES[c], "bit": int(b), "amount": int(a)}
        for c, b, a in zip(
            rng.choice(3, 40, p=[0.6, 0.3, 0.1]),
            rng.integers(0, 2, 40),
            rng.integers(-5, 21, 40),
            strict=True,
        )
    ]
    Path("a.csv").write_text(csv_of(rows))
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows
