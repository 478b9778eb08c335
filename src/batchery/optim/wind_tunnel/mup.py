# SPDX-License-Identifier: Apache-2.0
r"""MuP: learning rates found on a narrow model stay right when the model grows wider.

Use it to tune on models of a few million parameters and train a large one once, with Adam or
AdamW. Apply it to a model with fresh weights, never to a trained one. The rates below are Adam's:
SGD needs others, and so do layer-wise optimizers, whose steps already follow the weights' size
(`LAMB(…, adapt=False, decoupled=True)` is AdamW).

With r = width / base width, L layers, e = scale_emb and s = scale_depth / √L, the paper's rules are

    parameter                        multiplier of the output    initial std    rate
    embeddings                       e                           σ              η
    matrices                         1                           σ / √r         η / r
    ... that end a residual branch   s                           σ / √r         η / r
    output head                      1 / r                       σ              η
    biases and norms                 that of their module        as built       η

and attention keeps 1/√(head width). For Adam with decay λ and ε, a multiplier m on a weight of rate
η is *the same* as no multiplier on m times the weight, with rate m·η, decay λ/m and ε/m. So every
multiplier is moved into the weights and their groups:

    w ← m · w        lr = m · η · (1/r for matrices)        weight decay = λ / m        eps = ε / m

The forward pass is that of the unmodified model: there is no cost, and nothing that saving,
`from_pretrained`, FSDP, `torch.compile` or an inference engine could lose. When the head's weight
is tied to the embedding, its multiplier 1/(e·r) goes to the gain of the norm before it instead.

Reference: Hu et al. (MiniCPM), arXiv 2404.06395; the rules are those of Yang et al., "Tensor
Programs V", arXiv 2203.03466; `depth="completep"` is the multiplier 1/L of Dey et al., arXiv
2505.01618.

Where we differ: the paper's code multiplies in the forward pass. Training is the same but for the
global gradient norm, which counts the gradient of m·w. As in the paper, the decay of a matrix per
step, lr · λ, falls with its rate.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor, nn

from batchery._core.state import check_fits
from batchery._core.validate import integer, number, one_of, require
from batchery.optim.wind_tunnel.roles import Placed, Role, place

Depth = Literal["sqrt", "completep"]
Model = TypeVar("Model", bound=nn.Module)


class MuPFactors(NamedTuple):
    """What muP does to a parameter of one role at one width.

    Examples:
        >>> factors = mup_factors("residual", ratio=4.0, branch=0.5)
        >>> factors.output * factors.rate  # times the rate at base width: with the multiplier moved
        0.125
    """

    output: float  # m: multiplier of the module's output, moved into the parameter
    init: float  # multiplier of the initial weights, beside m
    rate: float  # multiplier of the learning rate, beside m


def mup_factors(
    role: Role,
    ratio: float,
    *,
    matrix: bool = True,
    scale_emb: float = 1.0,
    branch: float = 1.0,
    tied: bool = False,
) -> MuPFactors:
    """Return the factors of a parameter; the table in the module's header as a function.

    Args:
        role: what the parameter's module is in the network.
        ratio: r, width over base width.
        matrix: whether the parameter has two dimensions or more; else it is a bias or a gain.
        scale_emb: e.
        branch: s, the multiplier of a residual branch.
        tied: whether head and embedding share their weight.

    Examples:
        >>> mup_factors("hidden", 4.0)
        MuPFactors(output=1.0, init=0.5, rate=0.25)
        >>> mup_factors("head", 4.0)
        MuPFactors(output=0.25, init=1.0, rate=1.0)
    """
    one_of("mup_factors", "role", role, get_args(Role))
    number("mup_factors", "ratio", ratio, above=0)
    output = {"embedding": scale_emb, "residual": branch, "head": 1 / ratio}.get(role, 1.0)
    if role == "final_norm" and tied:
        output = 1 / (scale_emb * ratio)
    if matrix and role in ("hidden", "residual"):
        return MuPFactors(output, ratio**-0.5, 1 / ratio)
    return MuPFactors(output, 1.0, 1.0)


@dataclass(frozen=True)
class MuP:
    """The rules of a wind tunnel: one object serves models of every width.

    `apply` prepares a model, `param_groups` makes its optimizer's groups. What was applied is noted
    in `model.config.mup` (`model.mup` where there is no transformers config), which goes into
    `config.json`: groups can be made after `from_pretrained`, and a second `apply` is refused.

    Args:
        base_width: width at which the settings were found, d0; 256 in the paper.
        scale_emb: multiplier of the embeddings.
        scale_depth: multiplier of residual branches, before their depth rule.
        depth: divide `scale_depth` by √L (`"sqrt"`), by L (`"completep"`), or not at all (None).
        init_std: σ, to which matrices and embeddings are first scaled (0.1 in the paper), whatever
            their initialiser; None takes them as they are, which is right when their std did not
            depend on the width, as in transformers.
        roles: as in `find_roles`.

    Raises:
        ValueError: a width or scale is not positive, or `depth` is unknown.

    Examples:
        >>> roles = {"0": "embedding", "1": "hidden", "2": "head"}
        >>> mup = MuP(base_width=16, scale_emb=2.0, init_std=0.1, roles=roles)
        >>> model = nn.Sequential(nn.Embedding(9, 64), nn.Linear(64, 64), nn.Linear(64, 9))
        >>> groups = mup.param_groups(mup.apply(model, width=64), lr=0.01, weight_decay=0.1)
        >>> {g["params"][0][0]: (g["lr"], g["weight_decay"]) for g in groups}
        {'0.weight': (0.02, 0.05), '1.weight': (0.0025, 0.1), '1.bias': (0.01, 0.0),
         '2.weight': (0.0025, 0.4), '2.bias': (0.0025, 0.0)}
        >>> optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    """

    base_width: int
    scale_emb: float = 12.0
    scale_depth: float = 1.4
    depth: Depth | None = "sqrt"
    init_std: float | None = None
    roles: Mapping[str, Role] | None = None

    def __post_init__(self) -> None:
        """Check the settings; see the class."""
        integer("MuP", "base_width", self.base_width, at_least=1)
        number("MuP", "scale_emb", self.scale_emb, above=0)
        number("MuP", "scale_depth", self.scale_depth, above=0)
        if self.depth is not None:
            one_of("MuP", "depth", self.depth, get_args(Depth))
        if self.init_std is not None:
            number("MuP", "init_std", self.init_std, above=0)

    @torch.no_grad()
    def apply(self, model: Model, *, width: int | None = None, layers: int | None = None) -> Model:
        """Rescale a model's fresh weights in place and return it.

        Call it before the model is wrapped (FSDP, DDP, compile) and before a checkpoint of weights
        trained with muP is loaded.

        Args:
            model: with fresh weights.
            width: of the model; by default `model.config.hidden_size`.
            layers: L; by default `model.config.num_hidden_layers`. Needed where a parameter has
                role `"residual"` and `depth` is not None.

        Raises:
            ValueError: width or layers are not known, muP was already applied, weights are on the
                meta device, a tied head has no norm before it, or as in `find_roles`.

        Examples:
            >>> model = nn.Sequential(nn.Linear(8, 8, bias=False))
            >>> before = model[0].weight.detach().clone()
            >>> MuP(base_width=2, roles={"0": "hidden"}).apply(model, width=8)
            Sequential( (0): Linear(in_features=8, out_features=8, bias=False) )
            >>> torch.equal(model[0].weight, before / 2)
            True
        """
        noted = _record(model)
        require(noted is None, "MuP", "model", "must not have been prepared before", noted)
        placed = place(model, self.roles)
        roles = {p.role for p in placed}
        config = getattr(model, "config", None)
        width = getattr(config, "hidden_size", None) if width is None else width
        layers = getattr(config, "num_hidden_layers", None) if layers is None else layers
        require(width is not None, "MuP", "width", "must be given without a config", width)
        counts = self.depth is not None and "residual" in roles
        require(layers is not None or not counts, "MuP", "layers", "must be given", layers)
        homeless = any(p.tied for p in placed) and "final_norm" not in roles
        require(not homeless, "MuP", "roles", "must name the norm before a tied head", self.roles)
        meta = [p.name for p in placed if p.parameter.is_meta]
        require(not meta, "MuP", "model", "must hold weights, not meta tensors", meta[:8])
        record = self._settings() | {
            "width": integer("MuP", "width", width or 0, at_least=1),
            "layers": integer("MuP", "layers", layers or 1, at_least=1),
        }
        for p, factors in self._factors(placed, record):
            scale = factors.output * factors.init
            if self.init_std is not None and p.parameter.ndim >= 2:
                wide = torch.promote_types(p.parameter.dtype, torch.float32)
                std = float(p.parameter.to(wide).std())
                scale *= self.init_std / std if std > 0 else 1.0  # a head of zeros stays zero
            p.parameter.mul_(scale)
        _note(model, record)
        return model

    def param_groups(
        self, model: nn.Module, lr: float, weight_decay: float = 0.1, *, eps: float = 1e-8
    ) -> list[dict[str, Any]]:
        """Return the groups for Adam or AdamW of a model that `apply` has prepared.

        Schedulers that multiply every group's rate by one factor (`WSDScheduler` and most others)
        keep them in proportion.

        Args:
            model: prepared, or loaded from a checkpoint of one that was; sharded or not.
            lr: η, the rate at base width.
            weight_decay: λ of matrices and embeddings; biases and norms have none.
            eps: ε of Adam.

        Returns:
            Groups with `params` (named), `lr`, `weight_decay` and `eps`; frozen parameters are left
            out.

        Raises:
            ValueError: `apply` was not called, or with other settings; both values are named.

        Examples:
            >>> mup = MuP(base_width=2, roles={"0": "hidden"})
            >>> model = mup.apply(nn.Sequential(nn.Linear(8, 8)), width=8)
            >>> [group["lr"] for group in mup.param_groups(model, lr=0.1)]
            [0.025, 0.1]
        """
        number("MuP", "lr", lr, at_least=0)
        number("MuP", "weight_decay", weight_decay, at_least=0)
        number("MuP", "eps", eps, at_least=0)
        record = _record(model)
        require(record is not None, "MuP", "model", "must go through apply first", record)
        check_fits("MuP", record or {}, self._settings())
        groups: dict[tuple[float, float, float], list[tuple[str, Tensor]]] = {}
        for p, (output, _, rate) in self._factors(place(model, self.roles), record or {}):
            if p.parameter.requires_grad:
                decay = weight_decay / output if p.parameter.ndim >= 2 else 0.0
                key = (output * rate * lr, decay, eps / output)
                groups.setdefault(key, []).append((p.name, p.parameter))
        names = ("lr", "weight_decay", "eps")
        return [{"params": p, **dict(zip(names, key, strict=True))} for key, p in groups.items()]

    def _settings(self) -> dict[str, Any]:
        names = ("base_width", "scale_emb", "scale_depth", "depth")
        return {name: getattr(self, name) for name in names}

    def _factors(
        self, placed: Sequence[Placed], record: Mapping[str, Any]
    ) -> Iterator[tuple[Placed, MuPFactors]]:
        power = {"sqrt": 0.5, "completep": 1.0, None: 0.0}[self.depth]
        tied = any(p.tied for p in placed)
        for p in placed:
            yield (
                p,
                mup_factors(
                    p.role,
                    record["width"] / self.base_width,
                    matrix=p.parameter.ndim >= 2,
                    scale_emb=self.scale_emb,
                    branch=self.scale_depth / record["layers"] ** power,
                    tied=tied,
                ),
            )


def _note(model: nn.Module, record: dict[str, Any]) -> None:
    """Write down what was applied, in the config that transformers saves, else on the model."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "save_pretrained"):
        model.mup = record  # type: ignore[assignment]
        return
    own = copy.deepcopy(config)  # other models may be built from the same object
    own.mup = record
    for module in model.modules():
        if getattr(module, "config", None) is config:
            module.config = own


def _record(model: nn.Module) -> dict[str, Any] | None:
    config = getattr(model, "config", None)
    return getattr(config if hasattr(config, "save_pretrained") else model, "mup", None)
