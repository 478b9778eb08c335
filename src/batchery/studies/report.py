# SPDX-License-Identifier: Apache-2.0
"""Shows results: tables as rows of text, figures as SVG, one self-contained HTML page.

Everything here reads stored results; nothing is computed a second time. The command line, the
site and the README all take their tables from these rows.
"""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeGuard

from batchery._core.state import atomic_write
from batchery._core.validate import import_extra
from batchery.cards import Card
from batchery.studies.harness import Result, load_result, result_path
from batchery.studies.study import SCALES, Scale, Study

Rows = list[list[str]]


def number(value: float | None, digits: int = 3) -> str:
    """Format a number for a table; a value that is not finite reads as a dash.

    Examples:
        >>> number(1.23456, 2), number(None)
        ('1.23', '–')
    """
    if not _known(value):
        return "–"
    if value and abs(value) < 10**-digits:
        return f"{value:.2g}"
    return f"{value:,.{digits}f}"


def _known(value: float | None) -> TypeGuard[float]:
    """Say whether a number is one: a fresh result holds NaN where a stored one holds None."""
    return value is not None and math.isfinite(value)


def _unit(metric: Mapping[str, Any]) -> str:
    return f"{metric['label']} ({metric['unit']})" if metric["unit"] else metric["label"]


def arm_rows(result: Result) -> tuple[list[str], Rows]:
    """Return header and rows, one row per arm: each metric as mean ± sd, seconds, peak memory."""
    metrics = result["metrics"]
    header = ["arm", *(_unit(m) for m in metrics), "seconds per run", "peak memory (MiB)"]
    rows = []
    for arm in result["arms"]:
        cells = [arm["name"]]
        for metric in metrics:
            summary = arm["summary"].get(metric["name"])
            cells.append("" if summary is None else _mean_sd(summary, metric["digits"]))
        memory = arm["memory"].get("cuda_mib", arm["memory"]["process_mib"])
        rows.append([*cells, number(arm["seconds"], 1), number(memory, 0)])
    return header, rows


def _mean_sd(summary: Mapping[str, float | None], digits: int) -> str:
    if not _known(summary["mean"]):
        return "diverged"
    mean = number(summary["mean"], digits)
    return f"{mean} ± {number(summary['sd'], digits)}" if _known(summary["sd"]) else mean


def comparison_rows(result: Result) -> tuple[list[str], Rows]:
    """Return header and rows, one row per comparison: effect, interval, bar and verdict."""
    metrics = {metric["name"]: metric for metric in result["metrics"]}
    header = ["comparison", "metric", "gain", "95 % interval", "bar", "verdict"]
    rows = []
    for item in result["comparisons"]:
        metric = metrics[item["metric"]]
        digits = metric["digits"]
        interval = item["interval"]
        span = "–" if interval is None else " … ".join(number(x, digits) for x in interval)
        bar = item["margin"] if item["require"] == "superior" else -item["margin"]
        why = f" ({item['reason']})" if item["reason"] else ""
        rows.append(
            [
                f"{item['arm']} vs {item['baseline']}"
                + ("" if item["claim"] else " (for information)"),
                _unit(metric),
                number(item["effect"], digits),
                span,
                f"> {bar:g}",
                item["verdict"] + why,
            ]
        )
    return header, rows


def markdown_table(header: Sequence[str], rows: Rows) -> str:
    """Write rows as a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in r) + " |" for r in lines
    )


def verdict_line(result: Result) -> str:
    """Return the verdict with its reason, as one line."""
    reason = f": {result['reason']}" if result["reason"] else ""
    return f"{result['verdict']}{reason}"


def provenance(result: Result) -> str:
    """Return where and when a result was made, as one line."""
    where = result["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    commit = where["commit"] or f"source {where['source']}"
    seeds = len(result["arms"][0]["runs"])
    made = [f"{where['device']}, {where['threads']} threads", versions, commit, result["date"][:10]]
    without = [f"without {arm}" for arm in result.get("left_out", {})]
    return "; ".join([*made, f"{seeds} seed{'s' if seeds > 1 else ''}", *without])


def results_markdown(results: Path, slug: str) -> str:
    """Write every stored result of a slug as Markdown (cpu and gpu; a smoke run proves nothing)."""
    parts = []
    for scale in SCALES[1:]:
        result = load_result(results, slug, scale)
        if result is None:
            continue
        parts += [
            f"### Scale `{scale}`: {verdict_line(result)}",
            f"**Claim.** {result['claim']}",
            f"**Protocol.** {result['protocol']}",
            markdown_table(*arm_rows(result)),
            markdown_table(*comparison_rows(result)),
            f"*Gain: arm against baseline, positive is better. {provenance(result)}.*",
        ]
    return "\n\n".join(parts) or "No stored result yet."


def draw(study: Study, result: Result, results: Path) -> Path:
    """Draw the study's figure beside its result, as SVG, and return its path."""
    matplotlib = import_extra("matplotlib", "study", "batchery study")
    with matplotlib.rc_context(_STYLE):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7.2, 3.6), layout="constrained")
        (study.figure or dots)(figure, result)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    path = result_path(results, study.slug, result["scale"]).with_suffix(".svg")
    return atomic_write(path, buffer.getvalue())


_STYLE = {
    "svg.hashsalt": "batchery",  # the same result gives the same file
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}


def dots(figure: Any, result: Result) -> None:
    """Draw the default figure: up to three metrics, a dot per seed, a bar at the mean."""
    metrics = result["metrics"][:3]
    for axes, metric in zip(
        figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True
    ):
        arms = [arm for arm in result["arms"] if metric["name"] in arm["summary"]]
        for place, arm in enumerate(arms):
            values = [run["metrics"][metric["name"]] for run in arm["runs"]]
            values = [value for value in values if _known(value)]
            axes.plot(values, [place] * len(values), "o", alpha=0.5, color=f"C{place}")
            mean = arm["summary"][metric["name"]]["mean"]
            if _known(mean):
                axes.plot([mean], [place], "|", markersize=22, color=f"C{place}")
        axes.set_yticks(range(len(arms)), [arm["name"] for arm in arms])
        axes.invert_yaxis()
        axes.set_xlabel(f"{_unit(metric)}, {metric['better']} is better")


def html_report(results: Path, entries: Sequence[tuple[str, str]], folder: Path) -> Path:
    """Write one self-contained page for the stored results of (slug, scale) pairs.

    Returns:
        The path of `folder/index.html`; pictures are inside the page.
    """
    jinja2 = import_extra("jinja2", "study", "batchery report")
    studies = []
    for slug, scale in entries:
        result = load_result(results, slug, scale)
        if result is None:
            raise FileNotFoundError(f"no stored result {result_path(results, slug, scale)}")
        svg = result_path(results, slug, scale).with_suffix(".svg")
        studies.append(
            {
                "result": result,
                "arms": arm_rows(result),
                "comparisons": comparison_rows(result),
                "verdict": verdict_line(result),
                "provenance": provenance(result),
                "figure": base64.b64encode(svg.read_bytes()).decode() if svg.is_file() else None,
                "seconds": (result["prepared"] or {"seconds": 0.0})["seconds"]
                + sum(r["seconds"] for arm in result["arms"] for r in arm["runs"]),
            }
        )
    loader = jinja2.PackageLoader("batchery.studies", ".")
    page = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    text = page.get_template("report.html.jinja").render(
        studies=studies, made=datetime.now(timezone.utc).isoformat(timespec="minutes")
    )
    return atomic_write(folder / "index.html", text.encode())


def stored_results(cards: Sequence[Card], results: Path) -> list[tuple[str, Scale]]:
    """List the (slug, scale) pairs that have a stored result, in the cards' order."""
    pairs = [(card.slug, scale) for card in cards for scale in SCALES]
    return [pair for pair in pairs if result_path(results, *pair).is_file()]


README_BEGIN, README_END = "<!-- systems: begin -->", "<!-- systems: end -->"


def readme_table(cards: Sequence[Card], results: Path) -> str:
    """Write the table of systems: what each answers, and what its studies found."""
    rows = []
    for card in cards:
        verdicts = []
        for scale in SCALES[1:]:
            result = load_result(results, card.slug, scale)
            if result is not None:
                verdicts.append(f"{scale}: {result['verdict']}")
        names = ", ".join(f"`{path.rsplit('.', 1)[1]}`" for path in card.objects)
        link = f"[{card.slug}](src/batchery/cards/{card.slug}.md)"
        rows.append([link, card.question, names, "; ".join(verdicts) or "–"])
    return markdown_table(["system", "question", "names", "its claim, in our studies"], rows)


def write_readme_table(path: Path, cards: Sequence[Card], results: Path) -> Path:
    """Put the table of systems between its two markers in a README.

    Raises:
        ValueError: the file lacks a marker.
    """
    text = path.read_text()
    if README_BEGIN not in text or README_END not in text:
        raise ValueError(f"{path} lacks the markers {README_BEGIN} and {README_END}")
    head, rest = text.split(README_BEGIN, 1)
    tail = rest.split(README_END, 1)[1]
    table = readme_table(cards, results)
    return atomic_write(path, f"{head}{README_BEGIN}\n{table}\n{README_END}{tail}".encode())
