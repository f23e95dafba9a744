"""Pair losses of free vectors with gradients by formula, where autograd would build them from dozens of tensors.

    loss = FusedPairLoss(encoder, gravity, "mix_bpr", decay=1e-4, mass_decay=1e-2, mix_ratio=0.5)
    terms = loss(batch)                      # as the loss of autograd: terms["loss"].backward()

Values and gradients are those of :func:`gfml.losses.pair_loss` on :class:`gfml.ranking.encoders.Tables`, up to rounding.
The backward pass writes ``.grad`` of the tables itself: a dense tensor that is kept between batches, of which only the
rows of a batch are written and cleared; see :func:`touched_rows`. So, as with ``zero_grad(set_to_none=False)``, whoever
wants a gradient after the next backward pass takes a copy. ``torch.autograd.grad`` does not see it. Where an optimizer
sums the rows itself (:class:`Held`), as the AdamWs of :mod:`gfml.engine.optimizers` do in a plain step, there is none.

Sums are taken in the order of the batch whatever the number of threads (:mod:`gfml.kernels`). The first use after an
installation compiles for some seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from gfml.cml import ItemFeatures, MetricOptions
from gfml.gravity import Gravity
from gfml.ranking.encoders import Tables
from gfml.ranking.sampling import Triples

# Coordinates that are worth a thread of their own: half a millisecond's work. To wake a thread takes .06 ms on an idle
# machine and far more on a busy one, and rows that the other one wrote come from its cache.
COORDINATES_PER_THREAD = 1 << 19


def why_not_fused(encoder: Tables, gravity: Gravity, loss_mode: str, *, compat: bool = False) -> str | None:
    """Why :class:`FusedPairLoss` cannot give this loss, None where it can."""
    if compat:
        return "published formulas"
    if gravity.distance.kind == "kl" and gravity.distance.kl_kind == "compat" and loss_mode not in ("dot", "bpr"):
        return "the published kl"
    return _why_not_rows(encoder)


def why_not_on_device(encoder: Tables, gravity: Gravity, loss_mode: str, *, compat: bool = False) -> str | None:
    """Why :class:`DevicePairLoss` cannot give this loss, None where it can."""
    if compat:
        return "published formulas"
    if type(encoder) is not Tables or encoder.nodes.dtype != torch.float32:
        return _why_not_rows(encoder) or f"parameters are {str(encoder.nodes.dtype).removeprefix('torch.')}"
    if loss_mode not in ("dot", "bpr") and gravity.distance.kind != "l2":
        return f"the distance {gravity.distance.kind}"
    return None if find_spec("triton") else "Triton is not installed"


def why_no_fused_hinge(encoder: Tables, options: MetricOptions, features: ItemFeatures | None) -> str | None:
    """Why :class:`FusedHinge` cannot give :func:`gfml.cml.metric_loss`, None where it can."""
    if options.cov_weight or (features is not None and options.feature_weight):
        return "a covariance penalty" if options.cov_weight else "item features"
    return _why_not_rows(encoder)


def path_text(found: object, rows: int = 0) -> str:
    """Whence the gradients come, in words: from a loss of this module, whose batches touch so many rows, or from autograd
    for the reason that ``found`` is."""
    if not isinstance(found, _RowLoss):
        return f"gradients by autograd: {found}"
    coordinates = rows * found.encoder.nodes.shape[1]
    taken, there = threads_for(coordinates), torch.get_num_threads()
    few = f"; {taken} of {there} threads, since a batch has {coordinates:,} numbers and a thread pays from {COORDINATES_PER_THREAD:,}"
    return f"gradients by formula, row by row{few if taken < there else ''}"


def _why_not_rows(encoder: Tables) -> str | None:
    if type(encoder) is not Tables:
        return "vectors come from a graph"
    if encoder.nodes.device.type != "cpu":
        return f"parameters are on {encoder.nodes.device.type}"
    if encoder.nodes.dtype not in (torch.float32, torch.float64):
        return f"parameters are {str(encoder.nodes.dtype).removeprefix('torch.')}"
    return None


class _Kept(NamedTuple):
    """Rows first .. last - 1 of a table of nodes, of which a kept gradient has ``nodes``; true of one version of it.

    On a GPU the nodes are sorted and may repeat.
    """

    nodes: np.ndarray | Tensor
    first: int
    last: int
    version: int


def _is_known(gradient: Tensor) -> bool:
    """Whether nobody else wrote to a kept gradient since its rows were noted."""
    kept = getattr(gradient, "kept", None)
    return kept is not None and kept.version == gradient._version


def touched_rows(gradient: Tensor) -> np.ndarray | None:
    """Rows, int64 [n], outside which a gradient is 0 for sure, in no order; None where nobody knows."""
    kept: _Kept | None = gradient.kept if _is_known(gradient) else None  # type: ignore[attr-defined]
    if kept is None or isinstance(kept.nodes, Tensor):
        return None
    mine = (kept.nodes >= kept.first) & (kept.nodes < kept.last)
    return kept.nodes[mine] - kept.first


def touched_on_device(gradient: Tensor) -> tuple[Tensor, tuple[int, int]] | None:
    """Sorted nodes with repeats and which of them a table holds, of a gradient of :class:`DevicePairLoss`, else None."""
    kept = gradient.kept if _is_known(gradient) else None  # type: ignore[attr-defined]
    return (kept.nodes, (kept.first, kept.last)) if kept and isinstance(kept.nodes, Tensor) else None


class Held(NamedTuple):
    """The gradient of a table of nodes that whoever steps its rows sums up itself, while they are in the cache: for each
    of ``rows``, those of this batch, its chain (:class:`gfml.kernels.rows.Chains`) in ``out.rows``, times ``scale``."""

    rows: np.ndarray
    now: int
    chains: Any
    out: Any
    scale: float


class Computed(NamedTuple):
    """The loss of a batch, its weighted parts, its derivative by log lambda, and what the backward pass scatters."""

    total: float | Tensor
    parts: np.ndarray | Tensor
    by_log_lamb: float | Tensor
    out: Any


class _RowLoss:
    """A loss of tables that computes its gradients with its value; :meth:`compute` is left to the kinds."""

    def __init__(self, encoder: Tables, user: nn.Parameter | None, item: nn.Parameter | None) -> None:
        self.encoder = encoder
        self.gradients = RowGradients(encoder.nodes, user, item, num_users=encoder.num_users)
        self._held = RowGradients(encoder.nodes, user, item, num_users=encoder.num_users, held=True)
        self._kernel = _kernels()[0]
        self._free: list[Any] = []

    def compute(self, batch: Triples) -> Computed:
        raise NotImplementedError

    def _apply(self, batch: Triples, log_lamb: Tensor | None) -> tuple[Tensor, Tensor]:
        """The loss and its parts; the loss has a ``straight``, if that does all that ``backward`` would, in half the time."""
        nodes = self.encoder.nodes
        with torch.no_grad():
            found = self.compute(batch)
        loss, parts = _Fused.apply(self, found, nodes, log_lamb)
        if log_lamb is None and nodes.device.type == "cpu":
            loss.straight = partial(self.scatter, found.out, 1.0)
        return loss, parts

    def scatter(self, out: Any, scale: Tensor | float) -> None:
        """Write ``scale`` times the gradients of :meth:`compute` and take their memory back.

        Of a table that has a ``taken``, the gradient goes there as :class:`Held`, if it has none yet.
        """
        nodes, self._free = self.encoder.nodes, [out]
        taken: dict[Tensor, Held] | None = getattr(nodes, "taken", None)
        if taken is not None and nodes not in taken and self.gradients.are_new:
            taken[nodes] = self._held.hold(out, float(scale))
            return
        if taken is not None and nodes in taken:
            self.gradients.settle(taken.pop(nodes))
        self.gradients.write(out, float(scale))

    def _run(self, pairs: Callable[..., None], batch: Triples, recipe: Any, count: int) -> Any:
        """A loop of :mod:`gfml.kernels.pairs` over a batch, ``count`` rows to a pair, shared out among threads."""
        size, out = len(batch), self._room(len(batch), count)
        inputs = (
            self.encoder.num_users,
            self._kernel.Parameters(*self.gradients.parameter_arrays()),
            self._kernel.Pairs(batch.users.numpy(), batch.pos.numpy(), batch.neg.view(size, -1).numpy()),
            recipe,
            out,
        )
        parts = threads_for(out.rows.size)
        self.gradients.team(lambda part: pairs(size * part // parts, size * (part + 1) // parts, *inputs), parts)
        return out

    def _room(self, size: int, count: int) -> Any:
        """Memory for the gradients of a batch: that of the last one, if its backward pass gave it back."""
        nodes, room = self.encoder.nodes, self._free.pop() if self._free else None
        if room is not None and room.places.shape == (size, count):
            return room
        return self._kernel.Gradients(
            np.empty((size, count, nodes.shape[1]), _kind(nodes)),
            np.empty((size, count), np.int64),
            np.empty((size, count), _kind(nodes)),
            np.empty((size, len(self._kernel.PARTS))),
        )


class FusedHinge(_RowLoss):
    """The hinge of :func:`gfml.cml.mined_hinge` as a function of a batch; see :func:`why_no_fused_hinge`."""

    def __init__(self, encoder: Tables, options: MetricOptions) -> None:
        _refuse(why_no_fused_hinge(encoder, options, None))
        super().__init__(encoder, None, None)
        self.options = options

    def __call__(self, batch: Triples) -> dict[str, Tensor]:
        """{"loss": hinge, "hinge": the same}; only "loss" has a gradient."""
        loss, parts = self._apply(batch, None)
        return {"loss": loss, "hinge": parts[0]}

    def compute(self, batch: Triples) -> Computed:
        """See :class:`Computed`."""
        options, size = self.options, len(batch)
        weight = 1.0 if options.reduction == "sum" else 1 / size
        recipe = self._kernel.HingeRecipe(
            options.margin, self.encoder.num_items, options.use_rank_weight, options.rank_floor, weight
        )
        out = self._run(self._kernel.hinge_pairs, batch, recipe, 3)
        total = out.values[:, 0].sum()
        return Computed(total, np.array([total]), 0.0, out)


class FusedPairLoss(_RowLoss):
    """One of the six pair losses of tables as a function of a batch; arguments as :func:`gfml.losses.pair_loss`.

    Where :func:`why_not_fused` gives a reason, use autograd. As many threads as torch has, fewer for small batches.
    """

    why_not = staticmethod(why_not_fused)

    def __init__(
        self,
        encoder: Tables,
        gravity: Gravity,
        loss_mode: str,
        *,
        decay: float = 0.0,
        mass_decay: float = 0.0,
        mix_ratio: float = 0.5,
    ) -> None:
        _refuse(self.why_not(encoder, gravity, loss_mode))
        self.gravity, self.loss_mode = gravity, loss_mode
        self.decay, self.mass_decay, self.mix_ratio = decay, mass_decay, mix_ratio
        self.uses_gravity = loss_mode not in ("dot", "bpr")
        masses = (gravity.mass.user, gravity.mass.item) if self.uses_gravity else (None, None)
        super().__init__(encoder, *masses)
        self._recipe = self._build_recipe()
        linear = not self.uses_gravity or gravity.distance.kind == "l2"
        self._pairs = self._kernel.linear_pairs if linear else self._kernel.general_pairs

    def __call__(self, batch: Triples) -> dict[str, Tensor]:
        """{"loss": total, named parts} of :func:`gfml.losses.pair_loss`; only "loss" has a gradient."""
        log_lamb = getattr(self.gravity, "log_lamb", None) if self.uses_gravity else None
        loss, values = self._apply(batch, log_lamb)
        weights = {"dot": self._recipe.dot > 0, "gravity": self.uses_gravity, "emb_reg": self.decay,
                   "mass_reg": self.mass_decay * self.uses_gravity}  # fmt: skip
        parts = zip(weights.items(), values.unbind(), strict=True)
        return {"loss": loss, **{name: value for (name, weight), value in parts if weight}}

    def compute(self, batch: Triples) -> Computed:
        """See :class:`Computed`."""
        recipe, size = self._recipe, len(batch)
        out = self._run(self._pairs, batch, self._recipe_of(size), 2 + batch.neg.numel() // size)
        dot, gravity, emb_reg, mass_reg, by_log_lamb = self._kernel.totals(out.values).tolist()
        parts = np.array([dot, gravity, recipe.decay * emb_reg, recipe.mass_decay * mass_reg]) / size
        total = recipe.dot_weight * parts[0] + recipe.gravity_weight * parts[1] + parts[2] + parts[3]
        return Computed(total, parts, by_log_lamb, out)

    def _build_recipe(self) -> Any:
        kernel, mode, distance, mass = self._kernel, self.loss_mode, self.gravity.distance, self.gravity.mass
        suffix = {"emd": distance.emd_input, "kl": distance.kl_kind}.get(distance.kind)
        name = f"{distance.kind}-softmax" if suffix == "softmax" else distance.kind
        mixed = mode in ("mix", "mix_bpr")
        return kernel.Recipe(
            dot={"dot": kernel.BCE, "mix": kernel.BCE, "bpr": kernel.BPR, "mix_bpr": kernel.BPR}.get(mode, 0),
            gravity=0 if not self.uses_gravity else kernel.BPR if mode == "bpr_gra" else kernel.BCE,
            dot_weight=1 - self.mix_ratio if mixed else 1.0,
            gravity_weight=self.mix_ratio if mixed else 1.0,
            distance=kernel.DISTANCES.index(name),
            squared=distance.is_squared_form,
            norm=self.gravity.emb_norm,
            lamb=1.0,
            eps=self.gravity.eps,
            product=mass.mode == "both" and mass.combine == "product",
            param=kernel.MASS_PARAMS.index(mass.param),
            decay=float(self.decay),
            mass_decay=float(self.mass_decay),
        )

    def _recipe_of(self, size: int) -> Any:
        """The recipe with the weights of one of ``size`` pairs and the present lambda."""
        recipe = self._recipe
        return recipe._replace(
            dot_weight=recipe.dot_weight / size,
            gravity_weight=recipe.gravity_weight / size,
            lamb=self._lamb(),
            decay=recipe.decay / size,
            mass_decay=recipe.mass_decay / size,
        )

    def _lamb(self) -> Tensor | float:
        return float(self.gravity.lamb)


class DevicePairLoss(FusedPairLoss):
    """:class:`FusedPairLoss` for dot products and l2 on CUDA (:mod:`gfml.kernels.triples`): four kernels forward and
    backward, and nothing that waits for the device; see :func:`why_not_on_device`."""

    why_not = staticmethod(why_not_on_device)

    def compute(self, batch: Triples) -> Computed:
        """See :class:`Computed`."""
        from gfml.kernels import triples

        size, recipe = len(batch), self._recipe_of(len(batch))
        items = torch.cat([batch.pos[:, None], batch.neg.view(size, -1)], 1) + self.encoder.num_users
        tables = [None if p is None else p.detach() for p in self.gradients.parameters]
        places = torch.cat([batch.users[:, None], items], 1)
        out = triples.pair_gradients(tables, places, self.encoder.num_users, recipe)
        *parts, by_log_lamb = out.values.sum(0).unbind()
        weights = 1 / size, 1 / size, recipe.decay, recipe.mass_decay
        values = torch.stack([weight * part for weight, part in zip(weights, parts, strict=True)])
        total = recipe.dot_weight * parts[0] + recipe.gravity_weight * parts[1] + values[2] + values[3]
        return Computed(total, values, by_log_lamb, out)

    def scatter(self, out: Any, scale: Any) -> None:
        """As in :class:`FusedPairLoss`; the gradients are new tensors, in which only the rows of the batch are written."""
        from gfml.kernels import triples

        parameters, users = self.gradients.parameters, self.encoder.num_users
        found = [None if p is None else torch.zeros_like(p) for p in parameters]
        places = triples.sum_rows(out, scale, users, found)
        spans = (0, len(parameters[0])), (0, users), (users, len(parameters[0]))
        for parameter, gradient, span in zip(parameters, found, spans, strict=True):
            if parameter is None or gradient is None:
                continue
            if parameter.grad is None:
                gradient.kept = _Kept(places, *span, gradient._version)  # type: ignore[attr-defined]
                parameter.grad = gradient
            else:
                parameter.grad += gradient

    def _lamb(self) -> Tensor | float:
        lamb = self.gravity.lamb
        return lamb.detach() if isinstance(lamb, Tensor) else lamb


class _Fused(torch.autograd.Function):
    """The loss and its parts; the backward pass writes the tables' gradients and returns that of log lambda."""

    @staticmethod
    def forward(
        ctx: Any, loss: _RowLoss, found: Computed, nodes: Tensor, log_lamb: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.loss, ctx.out = loss, found.out
        ctx.by_log_lamb = None if log_lamb is None else found.by_log_lamb
        # An array of the right type costs less than torch's conversion.
        with np.errstate(over="ignore"):  # a loss beyond float32 is infinite, which the loop reports
            total, parts = (value if isinstance(value, Tensor) else torch.from_numpy(np.array(value, _kind(nodes)))
                            for value in (found.total, found.parts))  # fmt: skip
        ctx.mark_non_differentiable(parts)
        return total, parts

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[None, None, None, Tensor | None]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "found create_graph with a fused loss, which has no second derivative: use `kernel autograd`"
            )
        ctx.loss.scatter(ctx.out, upstream)
        return None, None, None, None if ctx.by_log_lamb is None else upstream * ctx.by_log_lamb


def _refuse(reason: str | None) -> None:
    if reason is not None:
        raise ValueError(f"found a loss that has no fused form ({reason}), wanted one of tables on a CPU")


class RowGradients:
    """Writes ``.grad`` of node vectors [U + I, D] and of raw masses [U] and [I], either or both None, row by row.

    held: of the masses alone; that of the vectors is handed over as :class:`Held`.
    """

    def __init__(
        self,
        nodes: nn.Parameter,
        user: nn.Parameter | None,
        item: nn.Parameter | None,
        *,
        num_users: int,
        held: bool = False,
    ) -> None:
        self.parameters, self.num_users = (nodes, user, item), num_users
        self._written = (None if held else nodes, user, item)
        self._kernel = _kernels()[1]
        from gfml.base.compiled import Team  # not before it is needed: it imports numba

        self.team = Team()
        self._kept: list[Tensor] = []
        self._old: Any = None
        self._chains: Any = None
        self._number = 0

    def parameter_arrays(self) -> list[np.ndarray]:
        """The parameters as arrays, empty where there is none; a view of their memory."""
        return self._arrays(self.parameters)

    def write(self, out: Any, scale: float) -> None:
        """Gradients become ``scale`` times those of ``out``, or grow by them where a parameter has one already."""
        if self.are_new:
            self._set(out, scale)
        else:
            self._add(out, scale, self.parameters)

    @property
    def are_new(self) -> bool:
        """Whether no parameter has a gradient yet."""
        return all(parameter is None or parameter.grad is None for parameter in self.parameters)

    def hold(self, out: Any, scale: float) -> Held:
        """Write the masses' gradients, and tell that of the vectors."""
        if self._chains is None or len(self._chains.following) != out.places.size:
            nodes = np.zeros((len(self.parameters[0]), 2), np.int32) if self._chains is None else self._chains.nodes
            self._chains = self._kernel.Chains(nodes, np.empty(out.places.size, np.int32))
        return Held(self._set(out, scale), self._number, self._chains, out, scale)

    def settle(self, held: Held) -> None:
        """A gradient that was held becomes one like others, so that more can be added."""
        self._add(held.out, held.scale, (self.parameters[0], None, None))

    def _add(self, out: Any, scale: float, parameters: tuple[nn.Parameter | None, ...]) -> None:
        there = [parameter for parameter in parameters if parameter is not None]
        for parameter in there:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        arrays = self._arrays([None if p is None else p.grad for p in parameters])
        self._kernel.add_rows(self.num_users, self._kernel.Tables(*arrays), out.places, out.rows, out.masses, scale)
        for parameter in there:
            parameter.grad.kept = None  # type: ignore[union-attr]

    def _set(self, out: Any, scale: float) -> np.ndarray:
        """Gradients become those of ``out``; the nodes that have one."""
        there = [parameter for parameter in self._written if parameter is not None]
        # Chains are told in a tenth of a millisecond: as long as it takes to ask another thread.
        parts = threads_for(out.rows.size) if self._written[0] is not None else 1
        self._prepare(there, parts)
        touched = self._kernel.Touched(
            self._stamps, np.empty((parts, out.places.size), np.int64), np.empty(parts, np.int64)
        )
        kept = iter(self._kept)
        arrays = self._arrays([None if p is None else next(kept) for p in self._written])
        self._number += 1
        known = scale, self._old, touched
        if self._written[0] is None:
            kernel = self._kernel.chain_rows
            content = out.places.reshape(-1), out.masses.reshape(-1), *known, self._chains, self._number
        else:
            kernel, content = self._kernel.set_rows, (out.places, out.rows, out.masses, *known, self._number)
        inputs = (self.num_users, self._kernel.Tables(*arrays), *content)
        self.team(lambda part: kernel(part, *inputs), parts)
        self._old = touched
        return self._hand_over(there, touched)

    def _prepare(self, there: list[nn.Parameter], parts: int) -> None:
        """Kept gradients that are 0 outside the rows of the last batch: made now, or cleared if others wrote to them."""
        known = self._old is not None and len(self._old.counts) == parts
        if known and all(map(_is_known, self._kept)):
            return
        if self._old is None:
            # NumPy asks the system for large pages, which reading scattered rows needs; torch does not.
            self._kept = [torch.from_numpy(np.zeros(p.shape, _kind(p))) for p in there]
            self._stamps = np.zeros(len(self.parameters[0]), np.int32)
        else:
            for gradient in self._kept:
                gradient.zero_()
        nothing = np.empty((parts, 0), np.int64)
        self._old = self._kernel.Touched(self._stamps, nothing, np.zeros(parts, np.int64))

    def _hand_over(self, there: list[nn.Parameter], touched: Any) -> np.ndarray:
        rows = np.concatenate([row[:count] for row, count in zip(touched.rows, touched.counts, strict=True)])
        whole, users = len(self.parameters[0]), self.num_users
        spans = ((0, whole), (0, users), (users, whole))
        shown = [span for parameter, span in zip(self._written, spans, strict=True) if parameter is not None]
        for parameter, gradient, (first, last) in zip(there, self._kept, shown, strict=True):
            gradient.kept = _Kept(rows, first, last, gradient._version)  # type: ignore[attr-defined]
            parameter.grad = gradient
        return rows

    def _arrays(self, tensors: Any) -> list[np.ndarray]:
        kind = _kind(self.parameters[0])
        empty = np.empty((0, self.parameters[0].shape[1]), kind), np.empty(0, kind), np.empty(0, kind)
        return [
            there if tensor is None else tensor.detach().numpy() for tensor, there in zip(tensors, empty, strict=True)
        ]


def threads_for(coordinates: int) -> int:
    """Threads that pay for so many coordinates: at most torch's number, and one for little work."""
    return max(1, min(torch.get_num_threads(), coordinates // COORDINATES_PER_THREAD))


def _kind(tensor: Tensor) -> Any:
    return np.float32 if tensor.dtype == torch.float32 else np.float64


def _kernels() -> tuple[ModuleType, ModuleType]:
    """numba is not imported before it is needed."""
    from gfml.kernels import pairs, rows

    return pairs, rows
