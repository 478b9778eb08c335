# SPDX-License-Identifier: Apache-2.0
r"""The batch-size law: how the best batch grows as the loss falls.

Use it to choose a batch size, or a schedule of them, for a loss not reached yet, from runs on your
own data and tokenizer. Do not use it far below the losses you fitted, nor with others' constants:
losses in nats per token depend on the tokenizer.

Each run trains at one batch size B and is read off several times: at loss L after D tokens. At a
fixed loss level, log D against log B is near a parabola; its lowest point is the batch size that
gets there with the fewest tokens. These points follow

    log D_L(B) = c0 + c1 log B + c2 (log B)²        B*(L) = exp(-c1 / (2 c2))
    log B*(L) = log a - b · log L                   B*(L) = a / L^b

Intervals: a run's readings are off together, so the runs, not the readings, are what is
independent. With J_r the gradient of (log a, b) by run r's log D at all levels, and S the
covariance of the residuals between levels, estimated from n runs with n - 3 degrees of freedom,
Var(log a, b) = Σ_r J_r S J_rᵀ; quantiles are Student's.

Reference: Hu et al. (MiniCPM), arXiv 2404.06395, section 3.2; Kaplan et al., arXiv 2001.08361.
Where we differ: the paper gives no intervals.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from batchery._core.validate import import_extra, number, require
from batchery.optim.wind_tunnel.scaling_law import Array, positive_array


@dataclass(frozen=True)
class BatchSizeLaw:
    """The law B* = coef / loss^exponent, in tokens per step for a loss in nats per token.

    Attributes:
        coef: a.
        exponent: b.
        covariance: of (log a, b), row by row; None where unknown.
        quantile: of Student's distribution, by which standard errors are multiplied.
        points: the (loss, best batch) pairs that were fitted.

    Examples:
        >>> law = BatchSizeLaw(coef=1e6, exponent=2.0)
        >>> law.predict(10.0)
        10000.0
    """

    coef: float
    exponent: float
    covariance: tuple[tuple[float, float], tuple[float, float]] | None = None
    quantile: float = float("nan")
    points: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        """Refuse a coefficient that is not positive, or an exponent that is no number."""
        number("BatchSizeLaw", "coef", self.coef, above=0)
        number("BatchSizeLaw", "exponent", self.exponent)

    @overload
    def predict(self, loss: float) -> float: ...
    @overload
    def predict(self, loss: Array) -> Array: ...
    def predict(self, loss: Any) -> Any:
        """Return the best batch in tokens at a loss, or at each of an array of losses."""
        levels = positive_array("BatchSizeLaw", "loss", loss)
        batch = self.coef * levels**-self.exponent
        return float(batch) if batch.ndim == 0 else batch

    def interval(self, loss: float) -> tuple[float, float]:
        """Return the 95 % interval of the best batch at a loss.

        Raises:
            ValueError: the law was not fitted, or with too few runs.

        Examples:
            >>> law = BatchSizeLaw(1e6, 2.0, covariance=((0.0, 0.0), (0.0, 0.01)), quantile=2.0)
            >>> [round(end) for end in law.interval(10.0)]
            [6310, 15849]
        """
        level = float(positive_array("BatchSizeLaw", "loss", loss))
        batch, half = self.predict(level), self.quantile * self._std(1.0, -np.log(level))
        return float(batch * np.exp(-half)), float(batch * np.exp(half))

    @property
    def stderr(self) -> float:
        """The standard error of the exponent."""
        return self._std(0.0, 1.0)

    @property
    def ci(self) -> dict[str, tuple[float, float]]:
        """The 95 % intervals of `coef` and `exponent`. The two trade off: see `interval`."""
        half = self.quantile * self.stderr
        return {
            "coef": self.interval(1.0),
            "exponent": (self.exponent - half, self.exponent + half),
        }

    def _std(self, *weights: float) -> float:
        known = self.covariance is not None
        require(known, "BatchSizeLaw", "covariance", "must be known", self.covariance)
        vector = np.array(weights)
        return float(np.sqrt(vector @ np.array(self.covariance) @ vector))


MINICPM_BATCH_LAW = BatchSizeLaw(coef=1.21e9, exponent=6.24)
"""The paper's fit, for losses on C4 with its own tokenizer.

Warning: the constants hold for that tokenizer and that data alone. With another vocabulary the same
model has another loss, and at a loss of 3 the sixth power turns a tenth of a nat into a fifth of
the batch. Fit your own law; this one is for comparison.
"""


@overload
def optimal_batch_size(loss: float, law: BatchSizeLaw) -> float: ...
@overload
def optimal_batch_size(loss: Array, law: BatchSizeLaw) -> Array: ...
def optimal_batch_size(loss: Any, law: BatchSizeLaw) -> Any:
    """Return the batch in tokens that reaches a loss with the fewest tokens.

    Args:
        loss: nats per token, a number or an array.
        law: fitted by `fit_batch_size_law`. There is no default: see `MINICPM_BATCH_LAW`.

    Examples:
        >>> [f"{optimal_batch_size(loss, MINICPM_BATCH_LAW):.3g}" for loss in (4.0, 3.0, 2.5)]
        ['2.12e+05', '1.28e+06', '3.98e+06']
    """
    return law.predict(loss)


def fit_batch_size_law(
    losses: npt.ArrayLike,
    batch: npt.ArrayLike,
    tokens: npt.ArrayLike,
    *,
    models: Sequence[object] | None = None,
    levels: npt.ArrayLike | None = None,
) -> BatchSizeLaw:
    """Fit the law to readings of runs at several batch sizes.

    Reading i says: the run of batch size `batch[i]` had loss `losses[i]` after `tokens[i]` tokens.
    Readings of one batch size (and one model) are one run. Each run needs its own tuned, or
    muP-transferred, learning rate, and smoothed or held-out losses.

    Args:
        losses: nats per token, shape (n,).
        batch: tokens per step, shape (n,); at least three different ones per model.
        tokens: tokens seen, shape (n,).
        models: labels of the model each reading belongs to, n of them; None: all the same.
        levels: losses at which to compare the runs; by default nine, for each model, between the
            first and the last loss that all its runs have reached.

    Returns:
        The law; with four or more batch sizes, with intervals.

    Raises:
        ValueError: fewer than 6 readings, shapes that differ, values that are not positive, fewer
            than three batch sizes, or fewer than three levels with a best batch inside them.

    Examples:
        >>> grid = np.meshgrid([4.0, 3.0, 2.0], 2.0 ** np.arange(9, 17))
        >>> losses, batch = (values.ravel() for values in grid)
        >>> tokens = 1e9 / losses**6 * np.exp(0.1 * np.log(batch / (1e5 / losses**3)) ** 2)
        >>> law = fit_batch_size_law(losses, batch, tokens, levels=[4.0, 3.0, 2.0])
        >>> f"{law.coef:.1f}", f"{law.exponent:.6f}", f"{optimal_batch_size(2.5, law):.1f}"
        ('100000.0', '3.000000', '6400.0')
    """
    owner = "fit_batch_size_law"
    arrays = [positive_array(owner, *pair) for pair in (("losses", losses), ("batch", batch))]
    arrays.append(positive_array(owner, "tokens", tokens))
    shapes = [array.shape for array in arrays]
    require(len(set(shapes)) == 1 and arrays[0].ndim == 1, owner, "shapes", "must agree", shapes)
    count = len(arrays[0])
    require(count >= 6, owner, "losses", "must hold 6 readings or more", count)
    labels = [None] * count if models is None else list(models)
    require(len(labels) == count, owner, "models", f"must hold {count} labels", len(labels))
    wanted = None if levels is None else positive_array(owner, "levels", np.atleast_1d(levels))
    parts = []
    for label in dict.fromkeys(labels):
        own = np.array([other == label for other in labels])
        log_losses, log_batch, log_tokens = (np.log(array[own]) for array in arrays)
        parts.append(_optima(owner, label, log_losses, log_batch, log_tokens, wanted))
    log_loss = np.concatenate([part[0] for part in parts])
    log_best = np.concatenate([part[1] for part in parts])
    enough = len(np.unique(log_loss)) >= 3
    require(enough, owner, "levels", "with a best batch must be 3 or more", len(log_loss))
    line = np.linalg.pinv(np.stack([np.ones_like(log_loss), -log_loss], 1))  # (2, levels)
    log_coef, exponent = line @ log_best
    variance, start, freedom = np.zeros((2, 2)), 0, 0
    for own_loss, _, gradient, residual in parts:
        columns = line[:, start : start + len(own_loss)]
        start += len(own_loss)
        spare = len(residual) - 3
        freedom += spare
        spread = residual.T @ residual / max(spare, 1)
        for run in gradient:
            pull = columns * run
            variance += pull @ spread @ pull.T
    found = tuple(zip(np.exp(log_loss).tolist(), np.exp(log_best).tolist(), strict=True))
    if freedom == 0:
        return BatchSizeLaw(float(np.exp(log_coef)), float(exponent), points=found)
    (aa, ab), (ba, bb) = variance.tolist()
    stats = import_extra("scipy.stats", "laws", owner)
    return BatchSizeLaw(
        float(np.exp(log_coef)),
        float(exponent),
        ((aa, ab), (ba, bb)),
        float(stats.t.ppf(0.975, freedom)),
        found,
    )


def _optima(
    owner: str,
    label: object,
    log_loss: Array,
    log_batch: Array,
    log_tokens: Array,
    levels: Array | None,
) -> tuple[Array, Array, Array, Array]:
    """Find the best batch of one model at each level.

    Returns:
        Log levels (k,), log of the best batch (k,), its gradient by each run's log tokens at that
        level (runs, k), and what the parabolas leave of those (runs, k).
    """
    sizes = np.unique(log_batch)
    of_model = "" if label is None else f" of model {label!r}"
    require(len(sizes) >= 3, owner, "batch" + of_model, "must hold 3 sizes or more", len(sizes))
    curves = []
    for size in sizes:
        run = log_batch == size
        order = np.argsort(log_tokens[run])
        loss, seen = log_loss[run][order], log_tokens[run][order]
        first = loss < np.concatenate([[np.inf], np.minimum.accumulate(loss)[:-1]])
        curves.append((-loss[first], seen[first]))  # rising, for np.interp
    top = min(-curve[0][0] for curve in curves)
    low = max(-curve[0][-1] for curve in curves)
    if levels is None:
        ends = float(np.exp(top)), float(np.exp(low))
        require(low < top, owner, "losses" + of_model, "of all runs must overlap", ends)
        at = np.linspace(top, low, 9)
    else:
        at = np.log(levels)
        at = at[(at <= top + 1e-12) & (at >= low - 1e-12)]
    cost = np.stack([np.interp(-at, *curve) for curve in curves])  # (runs, k)
    centre = sizes.mean()
    design = np.vander(sizes - centre, 3, increasing=True)
    solve = np.linalg.pinv(design)  # (3, runs)
    _, slope, bend = solve @ cost
    with np.errstate(divide="ignore", invalid="ignore"):
        best = centre - slope / (2 * bend)
        gradient = (slope / bend**2 * solve[2][:, None] - solve[1][:, None] / bend) / 2
    inside = (bend > 0) & (best > sizes[0]) & (best < sizes[-1])
    if not inside.all():
        lost = ", ".join(f"{value:.3f}" for value in np.exp(at[~inside]))
        warnings.warn(
            f"{owner}: no best batch within those tried{of_model} at losses {lost}", stacklevel=3
        )
    residual = cost - design @ (solve @ cost)
    return at[inside], best[inside], gradient[:, inside], residual[:, inside]
