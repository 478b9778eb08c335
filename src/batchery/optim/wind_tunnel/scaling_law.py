# SPDX-License-Identifier: Apache-2.0
r"""The data-model scaling law: how large a model to train, on how many tokens, for a budget.

Use it on runs of your own, each of them decayed to its end (with WSD: one branch per point); a loss
read off before the decay belongs to no law. N counts parameters without the embeddings. Mind the
intervals: α and β trade off strongly, and an optimum far outside the runs is an extrapolation.

    L(N, D) = C_N · N^-α + C_D · D^-β + L0                           loss of a run
    min over θ of Σ_i huber_δ(log L(N_i, D_i) - log L_i)             the fit, δ = 1e-3
    min over θ of Σ_i (L(N_i, D_i) - L_i)²                           loss="lsq"

θ holds logarithms, so that all five are positive, of the two terms at the mean of log N and log D
rather than of C_N and C_D, which hardly depend on the exponents. With C = 6 N D the optimum is

    N* = G · (C/6)^(β/(α+β))    D* = (C/6)^(α/(α+β)) / G    G = (α C_N / (β C_D))^(1/(α+β))

Intervals are percentiles over refits to runs drawn with replacement. (Resampling the residuals at
fixed N and D gave intervals that were too narrow, in simulations with 15 and with 30 runs.)

Reference: Hu et al. (MiniCPM), arXiv 2404.06395, section 4; the robust fit is that of Hoffmann et
al. (Chinchilla), arXiv 2203.15556, approach 3. Where we differ: instead of L-BFGS from 4,500 starts
in uncentred parameters, trust-region Gauss-Newton on the same objective from the 27 below.
"""

import itertools
import reprlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from batchery._core.random import new_generator, seed_of
from batchery._core.validate import import_extra, integer, number, one_of, require

Array = npt.NDArray[np.float64]
FLOPS_PER_PARAMETER_AND_TOKEN = 6.0
HUBER_DELTA = 1e-3
# Of log terms, exponents and floor: far beyond any law, so that a search on bad data stays finite.
LIMITS = np.array(
    [[-50, np.log(1e-4), -50, np.log(1e-4), -50], [50, np.log(10), 50, np.log(10), 50]]
)


class Optimum(NamedTuple):
    """The best use of a budget.

    Examples:
        >>> law = ScalingLaw(C_N=400.0, alpha=0.34, C_D=410.0, beta=0.28, L0=1.69)
        >>> size, tokens, loss = law.optimal(1e21)
        >>> f"{size:.2g} parameters, {tokens:.2g} tokens, {loss:.2f} nats"
        '1.8e+09 parameters, 9.3e+10 tokens, 2.32 nats'
    """

    N: float  # parameters without embeddings
    D: float  # tokens
    loss: float  # that the law predicts


@dataclass(frozen=True)
class ScalingLaw:
    """The law L(N, D) = C_N · N^-alpha + C_D · D^-beta + L0.

    Attributes:
        C_N: coefficient of the model's size.
        alpha: its exponent.
        C_D: coefficient of the data.
        beta: its exponent.
        L0: loss that neither lowers.
        draws: laws fitted to resampled data; intervals come from them.

    Examples:
        >>> law = ScalingLaw(C_N=400.0, alpha=0.34, C_D=410.0, beta=0.28, L0=1.69)
        >>> round(law.predict(1e9, 2e10), 3)
        2.574
        >>> best = law.optimal(1e21)
        >>> 6 * best.N * best.D
        1e+21
        >>> f"{law.ratio(1e21):.0f} tokens per parameter"
        '52 tokens per parameter'
    """

    C_N: float
    alpha: float
    C_D: float
    beta: float
    L0: float
    draws: tuple["ScalingLaw", ...] = field(default=(), repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse coefficients and exponents that are not positive; the floor may be 0."""
        for name in ("C_N", "alpha", "C_D", "beta"):
            number("ScalingLaw", name, getattr(self, name), above=0)
        number("ScalingLaw", "L0", self.L0, at_least=0)

    @property
    def params(self) -> dict[str, float]:
        """The five numbers by name."""
        return {name: getattr(self, name) for name in ("C_N", "alpha", "C_D", "beta", "L0")}

    @property
    def ci(self) -> dict[str, tuple[float, float]]:
        """The 95 % intervals of the five numbers by name; needs a bootstrap."""
        return {
            name: self.interval(lambda law, name=name: getattr(law, name))  # type: ignore[misc]
            for name in self.params
        }

    def interval(
        self, of: Callable[["ScalingLaw"], float], level: float = 0.95
    ) -> tuple[float, float]:
        """Return the interval of any number that follows from the law.

        Args:
            of: law → number, for instance `lambda law: law.optimal(1e21).N`.
            level: share of the draws inside.

        Raises:
            ValueError: the law was fitted without a bootstrap.

        Examples:
            >>> draws = tuple(ScalingLaw(400, a / 1000, 410, 0.28, 1.69) for a in range(300, 401))
            >>> law = ScalingLaw(400, 0.34, 410, 0.28, 1.69, draws)
            >>> [round(end, 3) for end in law.interval(lambda law: law.alpha, level=0.9)]
            [0.305, 0.395]
        """
        number("ScalingLaw", "level", level, above=0, below=1)
        require(bool(self.draws), "ScalingLaw", "draws", "must come from a bootstrap", self.draws)
        values = [of(draw) for draw in self.draws]
        low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)

    def predict(self, N: npt.ArrayLike, D: npt.ArrayLike) -> Any:  # noqa: N803
        """Return the loss of N parameters after D tokens: a float, or an array that N and D span.

        Raises:
            ValueError: a value is not positive.
        """
        n, d = positive_array("ScalingLaw", "N", N), positive_array("ScalingLaw", "D", D)
        loss = self.C_N * n**-self.alpha + self.C_D * d**-self.beta + self.L0
        return float(loss) if np.ndim(loss) == 0 else loss

    def optimal(self, C: float) -> Optimum:  # noqa: N803
        """Return the parameters and tokens that reach the lowest loss with C = 6 N D operations.

        Raises:
            ValueError: C is not positive.
        """
        number("ScalingLaw", "C", C, above=0)
        product = C / FLOPS_PER_PARAMETER_AND_TOKEN
        both = self.alpha + self.beta
        lean = (self.alpha * self.C_N / (self.beta * self.C_D)) ** (1 / both)  # G
        size = lean * product ** (self.beta / both)
        return Optimum(size, product / size, self.predict(size, product / size))

    def ratio(self, C: float) -> float:  # noqa: N803
        """Return the tokens per parameter at the optimum of C operations."""
        best = self.optimal(C)
        return best.D / best.N


def fit_scaling_law(
    N: npt.ArrayLike,  # noqa: N803
    D: npt.ArrayLike,  # noqa: N803
    L: npt.ArrayLike,  # noqa: N803
    *,
    loss: Literal["huber", "lsq"] = "huber",
    starts: Sequence[Sequence[float]] | None = None,
    bootstrap: int = 0,
    generator: torch.Generator | None = None,
) -> ScalingLaw:
    """Fit the law to finished runs.

    Args:
        N: parameters without embeddings of each run, shape (n,).
        D: tokens of each run, shape (n,).
        L: final loss of each run, nats per token (or any positive unit), shape (n,).
        loss: `"huber"` on log L, in which a failed run hardly counts, or least squares on L, as in
            the MiniCPM paper.
        starts: where to begin, as (C_N, alpha, C_D, beta, L0); the best end wins. By default 27:
            exponents of 0.15, 0.35 and 0.8, and a floor of 10, 50 and 90 % of the lowest loss.
        bootstrap: refits to resampled runs, for intervals; 200 or more, of some 10 ms each. With
            fewer than ten runs the intervals are too narrow.
        generator: its seed decides what is drawn.

    Raises:
        ValueError: fewer than 6 runs, shapes that differ, values that are not positive, or fewer
            than three different N or D (which leave the exponents open).

    Warns:
        UserWarning: a run with no fewer parameters and no fewer tokens than another has a higher
            loss: such data are noisy, or the runs are not comparable.

    Examples:
        >>> N, D = (grid.ravel() for grid in np.meshgrid([1e7, 4e7, 2e8], [1e9, 3e9, 1e10]))
        >>> truth = ScalingLaw(C_N=400.0, alpha=0.34, C_D=410.0, beta=0.28, L0=1.69)
        >>> law = fit_scaling_law(N, D, truth.predict(N, D))
        >>> {name: round(value, 3) for name, value in law.params.items()}
        {'C_N': 400.0, 'alpha': 0.34, 'C_D': 410.0, 'beta': 0.28, 'L0': 1.69}
    """
    from tqdm import tqdm

    owner = "fit_scaling_law"
    one_of(owner, "loss", loss, ("huber", "lsq"))
    integer(owner, "bootstrap", bootstrap, at_least=0)
    arrays = [positive_array(owner, *pair) for pair in (("N", N), ("D", D), ("L", L))]
    shapes = [array.shape for array in arrays]
    require(len(set(shapes)) == 1 and arrays[0].ndim == 1, owner, "shapes", "must agree", shapes)
    require(len(arrays[0]) >= 6, owner, "L", "must hold 6 runs or more", len(arrays[0]))
    for name, array in zip("ND", arrays, strict=False):
        kinds = len(np.unique(array))
        require(kinds >= 3, owner, name, "must hold 3 different values or more", kinds)
    _warn_unless_monotone(owner, *arrays)
    size, data, found = (np.log(array) for array in arrays)
    centres = float(size.mean()), float(data.mean())
    n, d = size - centres[0], data - centres[1]
    begin = _default_starts(found) if starts is None else _given_starts(owner, starts, centres)
    rough = (_descend(owner, n, d, found, loss, start) for start in begin)
    theta = min(rough, key=lambda end: end[0])[1]
    theta = _descend(owner, n, d, found, loss, theta, tolerance=1e-14)[1]
    draws = []
    stream = new_generator(seed_of(owner, generator), owner)
    for _ in tqdm(range(bootstrap), "bootstrap", delay=2, disable=None):
        k = _resample(size, data, stream)
        draws.append(_law(_descend(owner, n[k], d[k], found[k], loss, theta)[1], centres))
    return _law(theta, centres, tuple(draws))


def _resample(size: Array, data: Array, generator: torch.Generator) -> npt.NDArray[np.int64]:
    """Draw runs with replacement, again and again until they can determine five numbers."""
    count = len(size)
    while True:
        drawn: npt.NDArray[np.int64] = torch.randint(count, (count,), generator=generator).numpy()
        kinds = [len(np.unique(values[drawn])) for values in (size, data)]
        if min(kinds) >= 3 and len(np.unique(drawn)) >= 5:
            return drawn


def _log_loss(theta: Array, n: Array, d: Array) -> tuple[Array, Array]:
    """Return log L (runs,) and its gradient (runs, 5) by θ, for centred log N and log D."""
    log_a, log_alpha, log_b, log_beta, log_floor = theta
    alpha, beta = np.exp(log_alpha), np.exp(log_beta)
    terms = np.stack([log_a - alpha * n, log_b - beta * d, np.full_like(n, log_floor)], 1)
    top = terms.max(1, keepdims=True)
    total = (top + np.log(np.exp(terms - top).sum(1, keepdims=True)))[:, 0]
    of_n, of_d, of_floor = np.exp(terms - total[:, None]).T
    gradient = np.stack([of_n, -alpha * n * of_n, of_d, -beta * d * of_d, of_floor], 1)
    return total, gradient


def _descend(
    owner: str,
    n: Array,
    d: Array,
    log_loss: Array,
    loss: str,
    start: Array,
    tolerance: float = 1e-8,
) -> tuple[float, Array]:
    """Return the objective and θ at the end of one descent."""
    optimize = import_extra("scipy.optimize", "laws", owner)
    robust = loss == "huber"
    unit = HUBER_DELTA if robust else 1.0

    def residual(theta: Array) -> Array:
        fitted = _log_loss(theta, n, d)[0]
        return (fitted - log_loss) / unit if robust else np.exp(fitted) - np.exp(log_loss)

    def jacobian(theta: Array) -> Array:
        fitted, gradient = _log_loss(theta, n, d)
        return gradient / unit if robust else gradient * np.exp(fitted)[:, None]

    end = optimize.least_squares(
        residual,
        start,
        jacobian,
        bounds=LIMITS,
        loss="huber" if robust else "linear",
        xtol=tolerance,
        ftol=tolerance,
        gtol=tolerance,
        max_nfev=500,
    )
    return float(end.cost), end.x


def _default_starts(log_loss: Array) -> list[Array]:
    lowest, middle = float(np.exp(log_loss.min())), float(np.exp(log_loss.mean()))
    starts = []
    for alpha, beta, share in itertools.product((0.15, 0.35, 0.8), (0.15, 0.35, 0.8), (1, 5, 9)):
        floor = share / 10 * lowest
        half = (middle - floor) / 2
        starts.append(np.log([half, alpha, half, beta, floor]))
    return starts


def _given_starts(
    owner: str, starts: Sequence[Sequence[float]], centres: tuple[float, float]
) -> list[Array]:
    rows = np.atleast_2d(positive_array(owner, "starts", starts))
    require(rows.shape[1] == 5, owner, "starts", "must hold five numbers each", rows.shape)
    logs = np.log(rows)
    logs[:, 0] -= rows[:, 1] * centres[0]
    logs[:, 2] -= rows[:, 3] * centres[1]
    return list(logs)


def _law(
    theta: Array, centres: tuple[float, float], draws: tuple[ScalingLaw, ...] = ()
) -> ScalingLaw:
    log_a, log_alpha, log_b, log_beta, log_floor = theta
    alpha, beta = float(np.exp(log_alpha)), float(np.exp(log_beta))
    return ScalingLaw(
        C_N=float(np.exp(log_a + alpha * centres[0])),
        alpha=alpha,
        C_D=float(np.exp(log_b + beta * centres[1])),
        beta=beta,
        L0=float(np.exp(log_floor)),
        draws=draws,
    )


def _warn_unless_monotone(owner: str, size: Array, data: Array, loss: Array) -> None:
    larger = (size[:, None] >= size) & (data[:, None] >= data)
    larger &= (size[:, None] > size) | (data[:, None] > data)
    wrong = larger & (loss[:, None] > loss)
    if wrong.any():
        i, j = np.argwhere(wrong)[0]
        warnings.warn(
            f"{owner}: in {wrong.sum()} of {larger.sum()} pairs the run with more has the higher "
            f"loss; the first: N={size[i]:g}, D={data[i]:g}, L={loss[i]:g} against "
            f"N={size[j]:g}, D={data[j]:g}, L={loss[j]:g}",
            stacklevel=3,
        )


def positive_array(owner: str, argument: str, values: npt.ArrayLike) -> Array:
    """Return `values` in float64 when all are finite and above 0.

    Raises:
        TypeError: they are no numbers.
        ValueError: one is not positive.
    """
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        got = reprlib.repr(values)
        raise TypeError(f"{owner}: {argument} must be numbers, got {got}") from error
    fine = np.isfinite(array) & (array > 0)
    require(bool(fine.all()), owner, argument, "must be positive", array[~fine][:3].tolist())
    return array
