# SPDX-License-Identifier: Apache-2.0
"""Runs a study: every arm on every seed, measured, interruptible, with one JSON as the result.

Each finished run is kept under `<results>/.runs` until its study is complete, so the same command
after Ctrl-C goes on where it stopped.
"""

import contextlib
import hashlib
import importlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from batchery import datasets
from batchery._core.state import atomic_write
from batchery._core.validate import integer, one_of
from batchery.studies.records import KeptRuns, measure, to_json
from batchery.studies.study import (
    SCALES,
    Comparison,
    Metric,
    Scale,
    Study,
    Trial,
    compare,
    not_compared,
    overall,
)

Progress = Callable[[str, float], None]
Result = dict[str, Any]

_PACKAGES = ("torch", "numpy", "triton", "transformers", "accelerate", "scikit-learn")
_PACKAGE = Path(__file__).resolve().parents[1]
_SOURCES = {".py", ".c", ".jinja"}
_TICK = 0.1  # seconds between two reports of progress: a bar needs no more


def load_study(slug: str) -> Study:
    """Import the `STUDY` of a slug."""
    module = importlib.import_module(f"batchery.studies.{slug.replace('-', '_')}")
    study = module.STUDY
    if not isinstance(study, Study):
        raise TypeError(f"{module.__name__}.STUDY is a {type(study).__name__}, not a Study")
    return study


def source_hash(root: Path = _PACKAGE) -> str:
    """Return a short hash of all of the library's source: Python, C and templates."""
    digest = hashlib.sha256()
    for path in sorted(path for path in root.rglob("*") if path.suffix in _SOURCES):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def environment(device: torch.device) -> dict[str, Any]:
    """Describe where a result comes from: hardware, versions, commit, source hash."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions,
        "commit": _commit(),
        "source": source_hash(),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Return the commit of the source tree, marked when `src` has changes; None outside a tree.

    `BATCHERY_COMMIT` names it for a tree that was copied without its history, or with an older one.
    """
    given = os.environ.get("BATCHERY_COMMIT")
    root = Path(__file__).resolve().parents[3]
    if given or not ((root / ".git").exists() and shutil.which("git")):
        return given

    def git(*words: str) -> subprocess.CompletedProcess[str]:
        command = ["git", "-C", str(root), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    head, changed = git("rev-parse", "--short", "HEAD"), git("status", "--porcelain", "--", "src")
    if head.returncode:
        return None
    return head.stdout.strip() + ("-dirty" if changed.stdout.strip() else "")


def run_study(
    study: Study,
    scale: Scale,
    *,
    results: Path,
    device: torch.device | None = None,
    seeds: int | None = None,
    keep_runs: bool = False,
    on_progress: Progress = lambda label, fraction: None,
) -> Result:
    """Run every arm of a study on every seed and return its result.

    Args:
        study: what to run.
        scale: `"smoke"`, `"cpu"` or `"gpu"`.
        results: folder for `<slug>.<scale>.json`; unfinished runs wait in its `.runs`.
        device: where to compute; by default CUDA at scale `"gpu"`, else the CPU.
        seeds: how many seeds, instead of the study's own number.
        keep_runs: leave the finished runs for the caller to `forget_runs`, when this study is
            one of several that are resumed together.
        on_progress: called with what is running and the fraction of the study that is done.

    Returns:
        The result as written to the file (numbers that are not finite read `None` there).

    Raises:
        MissingData: a data set that the study needs at this scale is not here and cannot be
            fetched. Nothing ran.
        RuntimeError: scale `"gpu"` without a CUDA device.
        ValueError: unknown scale, or fewer than one seed.
    """
    owner = f"study {study.slug}"
    one_of(owner, "scale", scale, SCALES)
    count = integer(owner, "seeds", study.seeds[scale] if seeds is None else seeds, at_least=1)
    if device is None:
        device = torch.device("cuda" if scale == "gpu" else "cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"{owner}: scale {scale!r} on device {device} needs CUDA, none is here")
    for name in study.data.get(scale, ()):
        on_progress(f"{study.slug} · data {name}", 0.0)
        datasets.fetch(name)
    left_out = dict(study.left_out(scale))
    for arm, why in left_out.items():
        one_of(owner, "left_out", arm, study.arms)
        on_progress(f"{study.slug} · {arm} left out: {why}", 0.0)
    arms = {arm: function for arm, function in study.arms.items() if arm not in left_out}
    with _threads(study.threads):
        where = environment(device)
        kept = KeptRuns(_runs_folder(results, study.slug, scale), where)
        total = len(arms) * count + (study.prepare is not None)
        done = 0

        def execute(label: str, seed: int, function: Callable[[Trial], Any]) -> dict[str, Any]:
            nonlocal done
            name = f"{study.slug} · {label}"
            on_progress(name, done / total)
            record = kept.load(label, seed)
            if record is None:
                tick = _throttled(lambda part: on_progress(name, (done + part) / total))
                record = measure(function, Trial(seed, scale, device, prepared, tick), device)
                kept.save(label, seed, record)
            done += 1
            on_progress(name, done / total)
            return record

        started = datetime.now(timezone.utc)
        prepared: dict[str, Any] = {}
        preparation = None
        if study.prepare is not None:
            preparation = execute("prepare", 0, study.prepare)
            prepared = preparation["value"]
        # Seed by seed, so that an early stop leaves complete pairs.
        runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
        for seed in range(count):
            for arm, function in arms.items():
                runs[arm].append({"seed": seed, **execute(arm, seed, function)})

    result = _assemble(study, scale, runs, left_out)
    result |= {"date": started.isoformat(timespec="seconds"), "environment": where}
    result["prepared"] = preparation
    atomic_write(result_path(results, study.slug, scale), to_json(result).encode())
    if not keep_runs:
        forget_runs(results, study.slug, scale)
    return result


def forget_runs(results: Path, slug: str, scale: Scale) -> None:
    """Drop the kept runs of a study: its next call starts anew."""
    shutil.rmtree(_runs_folder(results, slug, scale), ignore_errors=True)


def kept_runs(results: Path, slug: str, scale: Scale) -> int:
    """Count the finished runs that an interrupted study left."""
    return len(list(_runs_folder(results, slug, scale).glob("*.json")))


def _runs_folder(results: Path, slug: str, scale: Scale) -> Path:
    return results / ".runs" / f"{slug}.{scale}"


def result_path(results: Path, slug: str, scale: str) -> Path:
    """Return where the result of a study at a scale lies."""
    return results / f"{slug}.{scale}.json"


class CorruptResult(RuntimeError):
    """A file is not a result as `run_study` writes it; the message names the file."""


_FIELDS: dict[str, type] = {
    **dict.fromkeys(("slug", "scale", "claim", "protocol", "verdict", "reason", "date"), str),
    **dict.fromkeys(("metrics", "comparisons", "arms"), list),
    "environment": dict,
}
_PARTS = {
    "metrics": {field.name for field in fields(Metric)},
    "comparisons": {field.name for field in fields(Comparison)}
    | {"effect", "interval", "relative", "verdict", "reason"},
    "arms": {"name", "summary", "seconds", "memory", "runs"},
    "environment": {"device", "threads", "versions", "commit", "source"},
}


def load_result(results: Path, slug: str, scale: str) -> Result | None:
    """Read a stored result, or None when there is none.

    Raises:
        CorruptResult: the file is not JSON, or lacks a part of a result.
    """
    path = result_path(results, slug, scale)
    if not path.is_file():
        return None
    try:
        result: Result = json.loads(path.read_text())
    except ValueError as error:
        raise CorruptResult(f"stored result {path} is not JSON: {error}") from error
    fault = _fault(result)
    if fault:
        raise CorruptResult(f"stored result {path} {fault}; run its study again")
    return {"left_out": {}, **result}  # results of before arms could be left out lack it


def _fault(result: Any) -> str:
    """Say what a result lacks of what its readers use; an empty string when nothing."""
    if not isinstance(result, dict):
        return f"is a JSON {type(result).__name__}, not a result"
    for name, kind in _FIELDS.items():
        if not isinstance(result.get(name), kind):
            return f"has no {name}, or not as a {kind.__name__}"
    for name, keys in _PARTS.items():
        items = result[name] if isinstance(result[name], list) else [result[name]]
        if not items or not all(isinstance(item, dict) and keys <= item.keys() for item in items):
            return f"has {name} that lack some of {', '.join(sorted(keys))}"
    return ""


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _throttled(report: Callable[[float], None]) -> Callable[[int, int], None]:
    last = 0.0

    def tick(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _TICK:
            last = now
            report(min(done / max(total, 1), 1.0))

    return tick


def _assemble(
    study: Study, scale: Scale, runs: dict[str, list[dict[str, Any]]], left_out: dict[str, str]
) -> Result:
    """Summarise the runs, judge every comparison, and conclude."""
    values: dict[str, dict[str, list[float]]] = {}
    arms: list[dict[str, Any]] = []
    for arm, records in runs.items():
        values[arm] = {}
        summary: dict[str, dict[str, float]] = {}
        for metric in study.metrics:
            if metric.name not in records[0]["metrics"]:
                continue
            numbers = [_number(record["metrics"][metric.name]) for record in records]
            values[arm][metric.name] = numbers
            mean = statistics.fmean(numbers)
            known = len(numbers) > 1 and math.isfinite(mean)
            spread = statistics.stdev(numbers) if known else math.nan
            summary[metric.name] = {"mean": mean, "sd": spread}
        seconds = statistics.fmean(record["seconds"] for record in records)
        peaks = {
            kind: max(record["memory"][kind] for record in records) for kind in records[0]["memory"]
        }
        arms.append(
            {"name": arm, "summary": summary, "seconds": seconds, "memory": peaks, "runs": records}
        )
    comparisons = []
    for comparison in study.comparisons:
        metric = study.metric(comparison.metric)
        both = (comparison.arm, comparison.baseline)
        absent = [f"{arm} left out: {left_out[arm]}" for arm in both if arm in left_out]
        if absent:
            comparisons.append(not_compared(comparison, absent[0]))
            continue
        pair = [values[arm].get(metric.name) for arm in both]
        if pair[0] is None or pair[1] is None:
            raise ValueError(f"study {study.slug}: {comparison} needs {metric.name} of both arms")
        comparisons.append(compare(comparison, metric, pair[0], pair[1]))
    verdict, reason = overall(scale, comparisons)
    return {
        "format": 1,
        "slug": study.slug,
        "scale": scale,
        "claim": study.claim,
        "protocol": study.protocol,
        "verdict": verdict,
        "reason": reason,
        "metrics": [vars(metric) for metric in study.metrics],
        "comparisons": comparisons,
        "arms": arms,
        "left_out": left_out,
    }


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
