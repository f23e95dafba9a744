"""Gravity attention: tokens attract each other by their mass and their distance.

    gravity logit  ( mu_ij - lambda * log(1 + Q(q_i, k_j)) ) / S        dot logit  q_i . k_j / S_dot

    weight_ij = softmax over keys j       (per head; i query position, j key position)

Q is a squared distance (:mod:`gfml.distances`), mu the log-mass term, S a divisor. The softmax turns the gravity
logits into a normalised power law, weight_ij ~ exp(mu_j / S) * (1 + Q)^(-lambda / S): keys are weighted by a mass of
their own, and nearness only says how much of it is felt. A head's gravity logits do not change when all its queries
and keys are moved by one vector (l2, l1); dot logits do.

    attention = GravityAttention(384, 12, num_tokens=65, settings=AttentionSettings(lamb=3.0))
    replace_attention(timm_model, AttentionSettings(mix="split", num_split=2), mass_pos="tail")

Source: Byun, Lim, Song, "GFML: Gravity function for metric learning", Engineering Applications of Artificial
Intelligence 139, 109463, 2025. In the published code the mass never reaches the logits (``mass="none"`` is that form)
and heads of a split layer weigh another head's values (``head_order="original"``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from gfml.distances import DISTANCES, SquaredDistance, common_floats
from gfml.gravity import log_mass

if TYPE_CHECKING:
    from timm.models.vision_transformer import Attention

MIXES = ("off", "normal", "split")
MASSES = ("position", "content", "none")
MASS_PARAMS = ("raw", "softplus")
SCALES = ("sqrt_hidden", "sqrt_head", "none")
MASS_POSITIONS = ("full", "full_fix", "head", "tail")


@dataclass(frozen=True)
class AttentionSettings:
    """How the heads of a gravity layer attend.

    lamb, learn_lamb: lambda >= 0, fixed or learnable per gravity head (positive through softplus).
    distance: l2, l1, emd or kl.
    mix: off, every head is a gravity head; normal, every logit is (1 - lamb_mix) dot + lamb_mix gravity; split, heads
        0 .. num_split-1 are gravity heads (with ``split_mix`` that blend) and the others dot heads. num_split 0 is
        plain attention, num_split = H with split_mix False is off.
    mass: position, one raw mass per token position; content, w . k_j + b per head; none, distance alone.
    mass_param: raw, the parameter is the log-mass; softplus, log(1 + e^a). mass_init: uniform, U(0, 1), or zeros.
    per_head: position masses of their own for every gravity head instead of shared ones.
    mass_combine: sum, mu_ij = m_j, to which ``query_mass`` adds a query mass that the softmax cancels; product,
        mu_ij = m_i m_j, where the query mass is how strongly a query feels the masses.
    scale, dot_scale: divisors S and S_dot: sqrt_hidden (of the full width, as published), sqrt_head (of a head's
        width, the usual one) and for gravity none: lambda is then the exponent itself.
    head_order: natural, or original, where the weights come in the order dot heads, gravity heads while the values
        keep theirs.
    kernel: auto, the closed form with a backward pass of its own where there is one (l2), on CUDA one that keeps no
        [n, n] tensor, else explicit, and the library's fused attention for dot heads, which has no second derivative;
        explicit, logits by the definition.
    """

    lamb: float = 1.0
    learn_lamb: bool = False
    distance: str = "l2"
    mix: str = "off"
    lamb_mix: float = 0.5
    num_split: int = 6
    split_mix: bool = False
    mass: str = "position"
    mass_param: str = "raw"
    mass_init: str = "uniform"
    per_head: bool = False
    query_mass: bool = False
    mass_combine: str = "sum"
    scale: str = "sqrt_hidden"
    dot_scale: str = "sqrt_hidden"
    head_order: str = "natural"
    kernel: str = "auto"

    def __post_init__(self) -> None:
        for name, known in (
            ("distance", DISTANCES), ("mix", MIXES), ("mass", MASSES), ("mass_param", MASS_PARAMS),
            ("mass_init", ("uniform", "zeros")), ("mass_combine", ("sum", "product")), ("scale", SCALES),
            ("dot_scale", SCALES[:2]), ("head_order", ("natural", "original")), ("kernel", ("auto", "explicit")),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}: choose one of {', '.join(known)}")
        if not (math.isfinite(self.lamb) and self.lamb >= 0) or (self.learn_lamb and self.lamb == 0):
            raise ValueError(f"found lambda {self.lamb}, wanted a finite number >= 0, and > 0 if it is learned")
        if not 0 <= self.lamb_mix <= 1:
            raise ValueError(f"found lamb_mix {self.lamb_mix}, wanted a share between 0 and 1")
        if self.num_split == 0 and self.mix != "split":
            raise ValueError(
                f"found num_split 0, no gravity heads, with mix {self.mix!r}, all of them: give mix='split'"
            )

    @property
    def blend(self) -> float:
        """Share of the gravity logit in a gravity head; the rest is the dot logit."""
        blended = self.mix == "normal" or (self.mix == "split" and self.split_mix)
        return self.lamb_mix if blended else 1.0

    def num_gravity_heads(self, num_heads: int) -> int:
        """Gravity heads among ``num_heads``; ValueError where there are fewer heads than num_split."""
        if self.mix != "split":
            return num_heads
        if not 0 <= self.num_split <= num_heads:
            raise ValueError(f"found num_split {self.num_split} and {num_heads} heads, wanted 0 <= num_split <= heads")
        return self.num_split


PLAIN = AttentionSettings(mix="split", num_split=0)


class PositionMass(nn.Module):
    """Raw masses of n token positions: ``key`` [S, n], and ``query`` [S, n] where one is wanted; S = 1 is shared.

    init: uniform, U(0, 1), or zeros. Drawing leaves the global generator where it was, so that a model with masses
    starts from the same other weights as one without.
    """

    def __init__(
        self, num_tokens: int, rows: int = 1, *, param: str = "raw", init: str = "uniform", query: bool = False
    ) -> None:
        super().__init__()
        self.param = param
        self.key = nn.Parameter(torch.zeros(rows, num_tokens))
        self.query = nn.Parameter(torch.zeros(rows, num_tokens)) if query else None
        if init == "uniform":
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                for table in self.parameters():
                    table.uniform_()

    def log_key(self) -> Tensor:
        """Log-masses of keys [S, n]."""
        return _log_mass(self.key, self.param)

    def log_query(self) -> Tensor:
        """Log-masses of queries [S, n]; ValueError where there are none."""
        if self.query is None:
            raise ValueError("these masses have no query side")
        return _log_mass(self.query, self.param)


class ContentMass(nn.Module):
    """Log-masses read off the keys: M(w_h . k_j + b_h) per gravity head; both start at 0.

    Under param raw the bias would be the same for all keys of a head and cancel in the softmax: there is none.
    """

    def __init__(self, num_heads: int, head_width: int, *, param: str = "raw", bias: bool = False) -> None:
        super().__init__()
        self.param = param
        self.weight = nn.Parameter(torch.zeros(num_heads, head_width))
        self.bias = nn.Parameter(torch.zeros(num_heads)) if bias or param != "raw" else None

    def forward(self, k: Tensor) -> Tensor:
        """Shape: k [B, G, n, d] -> [B, G, n], in float32 at least, also under autocast."""
        return _content_mass(self.weight, self.bias, k, self.param)


def pairwise(q: Tensor, k: Tensor, distance: SquaredDistance) -> Tensor:
    """Q of every query with every key of its head. Shape: q, k [..., n, d] -> [..., n, n]."""
    if distance.kind == "l1":
        q, k = common_floats(q, k)
        return torch.cdist(q, k, p=1).square()
    form = distance.closed_form(q, k)
    found = form.query @ form.key.mT + form.query_bias.unsqueeze(-1) + form.key_bias.unsqueeze(-2)
    return found.square() if distance.is_squared_form else found.clamp_min(0)


# What is wrapped is traced by torch.fx as it stands: it looks at types and devices, which a trace does not know.
@torch.fx.wrap
def gravity_logits(q: Tensor, k: Tensor, mu: Tensor | float, *, lamb: Tensor | float, divisor: float,
                   distance: SquaredDistance = SquaredDistance()) -> Tensor:  # fmt: skip
    """( mu_ij - lambda log(1 + Q(q_i, k_j)) ) / divisor, in float32 at least, also under autocast.

    Shape: q, k [B, H, n, d]; mu broadcasts to the result [B, H, n, n]; lamb a number or [H, 1, 1].
    """
    with torch.autocast(q.device.type, enabled=False):
        return (mu - lamb * torch.log1p(pairwise(q, k, distance))) / divisor


@torch.fx.wrap
def power_law_weights(q: Tensor, k: Tensor, column: Tensor | None, beta: Tensor | float, alpha: float = 0.0) -> Tensor:
    """softmax_j( column_j - beta log(1 + D2_ij) + 2 alpha q_i . k_j ) with D2 = |q_i - k_j|^2 in float32 at least.

    One matrix product gives 1 + D2; the dot term needs none of its own, as 2 q.k = |q|^2 + |k|^2 - D2 and the
    softmax cancels |q_i|^2. The backward pass is written by hand: two products and no stored logits.

    Shape: q, k [B, H, n, d]; column broadcasts to [B, H, 1, n], None is 0; beta a number or [H, 1, 1]. Returns [B, H, n, n].
    Gradient: to q, k, column and beta; a second derivative goes through the definition. Equals :func:`gravity_logits`
    with l2 and a softmax.
    """
    with torch.autocast(q.device.type, enabled=False):
        q, k = common_floats(q, k)
        column = q.new_zeros(()) if column is None else column
        column = column + alpha * k.square().sum(-1).unsqueeze(-2) if alpha else column
        try:
            return _PowerLaw.apply(q, k, column, beta, alpha)[0]
        except NotImplementedError as error:  # of forward-mode differentiation
            raise ValueError(f"gravity attention's own kernel: {error} Give the settings kernel='explicit'") from error


@torch.fx.wrap
def _dot_logits(q: Tensor, k: Tensor, divisor: float) -> Tensor:
    with torch.autocast(q.device.type, enabled=False):
        q, k = common_floats(q, k)
        return q @ k.mT / divisor


@torch.fx.wrap
def _content_mass(weight: Tensor, bias: Tensor | None, k: Tensor, param: str) -> Tensor:
    with torch.autocast(k.device.type, enabled=False):
        k, weight = common_floats(k, weight)
        raw = torch.einsum("bgnd,gd->bgn", k, weight)
        return _log_mass(raw if bias is None else raw + bias[:, None], param)


@torch.fx.wrap
def _without_masks(x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
    """x itself; ValueError when there is a mask."""
    if attn_mask is not None or is_causal:
        raise ValueError("gravity attention knows no masks: found attn_mask or is_causal")
    return x


@torch.fx.wrap
def _check_tokens(x: Tensor, wanted: int) -> Tensor:
    """x itself; ValueError when it has not so many tokens."""
    if x.shape[1] != wanted:
        raise ValueError(f"found {x.shape[1]} tokens, wanted {wanted}: each position has its own mass")
    return x


class _PowerLaw(torch.autograd.Function):
    """Weights softmax_j(column_j - beta log z_ij - alpha z_ij), z = 1 + |q_i - k_j|^2 = left_i . right_j.

    left = [-2 q, |q|^2 + 1, 1] and right = [k, 1, |k|^2]. With U = -dL/dz, the products U right and U^T left hold the
    row and column sums of U next to U k and U^T q, which is all that dq = 2 (U k - q rowsum U) and dk need.
    """

    @staticmethod
    def forward(q: Tensor, k: Tensor, column: Tensor, beta: Tensor | float, alpha: float) -> tuple[Tensor, ...]:
        query_norm, key_norm = q.square().sum(-1, keepdim=True), k.square().sum(-1, keepdim=True)
        one = torch.ones_like(key_norm)
        left, right = torch.cat([-2 * q, query_norm + 1, one], -1), torch.cat([k, one, key_norm], -1)
        z = (left @ right.mT).clamp_(min=1)
        logits = z.log().mul_(-beta).add_(column)
        if alpha:
            logits.sub_(z, alpha=alpha)
        return torch.softmax(logits, -1), left, right, z

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        q, k, column, beta, alpha = inputs
        weights, *parts = output
        ctx.mark_non_differentiable(*parts)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, column, *parts, weights, beta if isinstance(beta, Tensor) else None)
        ctx.beta, ctx.alpha, ctx.column_shape = beta, alpha, column.shape

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        raise ValueError("gravity attention's own kernel cannot be mapped over: give the settings kernel='explicit'")

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        q, k, column, left, right, z, weights, beta = ctx.saved_tensors
        if grad is None:
            return (None,) * 5
        if torch.is_grad_enabled():
            # A second derivative is asked for: ordinary operations, which autograd follows.
            return _by_definition(grad, (q, k, column, beta), ctx.needs_input_grad, ctx.beta, ctx.alpha)
        with torch.autocast(grad.device.type, enabled=False):
            logit = torch.ops.aten._softmax_backward_data(grad, weights, -1, weights.dtype)
            wants = ctx.needs_input_grad
            column = logit.sum(-2, keepdim=True).sum_to_size(ctx.column_shape) if wants[2] else None
            exponent = -(logit * z.log()).sum((-1, -2), keepdim=True).sum_to_size(beta.shape) if wants[3] else None
            pull = torch.div(logit, z).mul_(ctx.beta if beta is None else beta)
            if ctx.alpha:
                pull.add_(logit, alpha=ctx.alpha)
            query, key = pull @ right, pull.mT @ left
            d = right.shape[-1] - 2
            q_grad = query[..., :d].mul(2).addcmul_(left[..., :d], query[..., d : d + 1])
            k_grad = torch.addcmul(-key[..., :d], right[..., :d], key[..., d + 1 :], value=-2)
        return q_grad, k_grad, column, exponent, None


class _FusedPowerLaw(torch.autograd.Function):
    """Values mixed by :func:`power_law_weights`, by kernels that keep no weights (:mod:`gfml.kernels.power_law`)."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, column: Tensor, beta: Tensor | float, options: Any
    ) -> Tensor:
        from gfml.kernels import power_law

        full = column.detach().float().squeeze(-2).expand(*q.shape[:3])
        power = beta.detach().float().reshape(-1) if isinstance(beta, Tensor) else beta
        out, lse = power_law.forward(q, k, v, full, power, options)
        ctx.save_for_backward(q, k, v, full, out, lse, power if isinstance(beta, Tensor) else None)
        ctx.power, ctx.options, ctx.column_shape = power, options, column.shape
        ctx.beta_shape = beta.shape if isinstance(beta, Tensor) else None
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from gfml.kernels import power_law

        if (
            torch.is_grad_enabled()
        ):  # torch's own mark, once_differentiable, may leave a share of the Hessian out silently
            raise RuntimeError(
                "found create_graph with fused gravity attention, which has no second derivative: use kernel='explicit'"
            )

        q, k, v, column, out, lse, power = ctx.saved_tensors
        beta = ctx.power if power is None else power
        to_q, to_k, to_v, to_column, to_beta = power_law.backward(
            grad.to(out.dtype), out, lse, q, k, v, column, beta, ctx.options
        )
        to_column = to_column.unsqueeze(-2).sum_to_size(ctx.column_shape)
        return to_q, to_k, to_v, to_column, None if to_beta is None else to_beta.reshape(ctx.beta_shape), None


def _differentiable_once(part: Tensor) -> None:
    """Second derivatives with respect to what goes into the library's fused attention, which has none, are one line."""

    def refuse(_: Tensor) -> None:
        raise RuntimeError(
            "found a second derivative of torch's fused attention, which has none: give the settings kernel='explicit'"
        )

    def guard(grad: Tensor) -> None:
        if grad.requires_grad:
            grad.register_hook(refuse)

    if part.requires_grad:
        part.register_hook(guard)


def power_law_attention(
    q: Tensor, k: Tensor, v: Tensor, column: Tensor, beta: Tensor | float, *, scale: float = 1.0, alpha: float = 0.0
) -> Tensor:
    """softmax_j( scale column_j - beta log(1 + |q_i - k_j|^2) + 2 alpha q_i . k_j ) times v, [n, n] nowhere in memory.

    For CUDA devices (and Triton's interpreter). Shape and gradient as :func:`power_law_weights` with v [B, H, n, d];
    float32, bfloat16 or float16, of one kind. Gradient: once; ``kernel="explicit"`` is for second derivatives on CUDA.
    """
    from gfml.kernels.power_law import Options

    return _FusedPowerLaw.apply(q, k, v, column, beta, Options(scale, alpha))


def _by_definition(
    grad: Tensor, inputs: tuple[Tensor, ...], wanted: Sequence[bool], beta: Any, alpha: float
) -> tuple[Tensor | None, ...]:
    """The gradients of :class:`_PowerLaw` by the definition, with a graph."""
    # Aliases: where the column comes from the keys, the gradient to them as such does not hold that part too.
    inputs = tuple(None if part is None else part.view_as(part) for part in inputs)
    q, k, column, learned = inputs
    z = 1 + (q.unsqueeze(-2) - k.unsqueeze(-3)).square().sum(-1)
    weights = (column - (beta if learned is None else learned) * z.log() - alpha * z).softmax(-1)
    places = [place for place in range(4) if wanted[place]]
    found = torch.autograd.grad(weights, [inputs[place] for place in places], grad, create_graph=True)
    own = dict(zip(places, found, strict=True))
    return (*(own.get(place) for place in range(4)), None)


class TokenGrid:
    """Which of the patches that have a mass a layer sees: those of another image size, or what patch dropping kept.

    size: rows and columns of the patches that the masses are of; prefix: tokens before them. The model's patch
    embedding and patch dropping leave here what they do, as hooks.
    """

    def __init__(self, size: tuple[int, int], prefix: int) -> None:
        self.size, self.prefix, self.now = size, prefix, size
        self.kept: Tensor | None = None

    def see(self, embedding: Any, inputs: Any, output: Tensor) -> None:
        """A forward hook of timm's patch embedding: its output is a grid where image sizes vary. A trace has one size."""
        varies = not isinstance(output, torch.fx.Proxy) and output.dim() == 4
        found = output.shape[1:3] if varies else embedding.grid_size
        self.now, self.kept = (int(found[0]), int(found[1])), None

    @property
    def num_tokens(self) -> int:
        """Tokens of a layer at present."""
        return self.prefix + (self.now[0] * self.now[1] if self.kept is None else self.kept.shape[1])

    def of(self, masses: Tensor) -> Tensor:
        """Masses [S, n] of the positions at present: [S, n'], or [B, S, n'] after patch dropping.

        Resampled as timm resamples its position embedding (bicubic).
        """
        if self.now != self.size:
            from timm.layers import resample_abs_pos_embed

            masses = resample_abs_pos_embed(masses.T[None], list(self.now), list(self.size), self.prefix)[0].T
        if self.kept is None:
            return masses
        first, rest = masses[:, : self.prefix], masses[:, self.prefix :]
        first = first.expand(len(self.kept), -1, -1)
        return torch.cat([first, rest.T[self.kept].mT], -1)


class PatchDrop(nn.Module):
    """timm's patch dropping, which tells a :class:`TokenGrid` which patches stay."""

    def __init__(self, drop: Any, grid: TokenGrid) -> None:
        super().__init__()
        from timm.layers import patch_dropout

        # By the version of timm: a class of its own, or an argument.
        own: Any = getattr(patch_dropout, "PatchDropoutWithIndices", None)
        plain: Any = patch_dropout.PatchDropout
        settings = {"prob": drop.prob, "num_prefix_tokens": drop.num_prefix_tokens, "ordered": drop.ordered}
        self.drop = own(**settings) if own else plain(**settings, return_indices=True)
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        x, self.grid.kept = self.drop(x)
        return x


class GravityAttention(nn.Module):
    """Multi-head self-attention whose first heads attend by gravity; see the module text and the settings.

    width h, split into ``num_heads`` heads; ``qkv`` is one map to queries, keys and values, ``proj`` the output map,
    both with bias. num_tokens: positions that have a mass. mass: masses shared with another layer.
    dropout: of the output. There is none on the weights unless a replaced layer had it (``attn_drop``).

    Shape: x [B, n, h] -> [B, n, h]. ValueError when n is not num_tokens and masses belong to positions.
    """

    mass: PositionMass | ContentMass | None

    def __init__(self, width: int, num_heads: int, num_tokens: int, settings: AttentionSettings = AttentionSettings(), *,
                 dropout: float = 0.0, mass: PositionMass | None = None) -> None:  # fmt: skip
        super().__init__()
        if num_heads < 1 or width % num_heads:
            raise ValueError(f"found width {width} and {num_heads} heads, wanted a width that the heads divide")
        self.width, self.num_heads, self.head_width, self.settings = width, num_heads, width // num_heads, settings
        self.num_tokens, self.num_gravity_heads = num_tokens, settings.num_gravity_heads(num_heads)
        self.grid: TokenGrid | None = None
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm, self.norm = nn.Identity(), nn.Identity(), nn.Identity()
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(dropout)
        self.distance = SquaredDistance(settings.distance)
        self.mass = new_mass(settings, self.num_gravity_heads, num_tokens, self.head_width) if mass is None else mass
        if self.num_gravity_heads and settings.learn_lamb:
            self.raw_lamb = nn.Parameter(torch.full((self.num_gravity_heads, 1, 1), _inverse_softplus(settings.lamb)))

    @property
    def lamb(self) -> Tensor | float:
        """lambda: a number when fixed, [G, 1, 1] with gradient when learnable."""
        return F.softplus(self.raw_lamb) if hasattr(self, "raw_lamb") else self.settings.lamb

    @property
    def divisor(self) -> float:
        """S of the gravity logits."""
        return {"sqrt_hidden": self.width**0.5, "sqrt_head": self.head_width**0.5, "none": 1.0}[self.settings.scale]

    @property
    def dot_divisor(self) -> float:
        """S_dot of the dot logits."""
        return (self.width if self.settings.dot_scale == "sqrt_hidden" else self.head_width) ** 0.5

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attend among all tokens; masks are refused (the arguments are those of timm's attention)."""
        x = _without_masks(x, attn_mask, is_causal)
        q, k, v = self._project(x)
        if self.settings.kernel == "explicit":
            heads = self.attn_drop(self._weights(q, k)).to(v.dtype) @ v
        else:
            heads = self._attend(q, k, v)
        return self.proj_drop(self.proj(self.norm(heads.transpose(1, 2).flatten(2))))

    def weights(self, x: Tensor) -> Tensor:
        """Attention weights [B, H, n, n] of x [B, n, h], by the definition; heads in the order of the values."""
        q, k, _ = self._project(x)
        return self._weights(q, k)

    def logits(self, x: Tensor) -> Tensor:
        """Logits [B, H, n, n] of x [B, n, h]; heads as in :meth:`weights`."""
        q, k, _ = self._project(x)
        return self._logits(q, k)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if isinstance(self.mass, PositionMass):
            x = _check_tokens(x, self.num_tokens if self.grid is None else self.grid.num_tokens)
        heads = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_width)).permute(2, 0, 3, 1, 4)
        q, k, v = heads.unbind(0)
        return self.q_norm(q), self.k_norm(k), v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Heads [B, H, n, d]: gravity heads from their weights, dot heads by the library's fused attention."""
        count = self.num_gravity_heads
        original = self.settings.head_order == "original"
        v_gravity, v_dot = (
            (v[:, -count or self.num_heads :], v[:, : self.num_heads - count])
            if original
            else (v[:, :count], v[:, count:])
        )
        parts = []
        if count:
            parts.append(self._gravity_heads(q[:, :count], k[:, :count], v_gravity))
        if count < self.num_heads:
            parts.append(self._dot_heads(q[:, count:].to(v.dtype), k[:, count:].to(v.dtype), v_dot))
        return torch.cat(parts[::-1] if original else parts, 1)

    def _dot_heads(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Mixed values [B, heads, n, d] of dot heads: the library's fused attention, which torch.func cannot transform."""
        dropout, scale = self.attn_drop.p if self.training else 0.0, 1 / self.dot_divisor
        if isinstance(q, Tensor) and not torch.compiler.is_compiling():  # nothing traces this
            if torch._C._functorch.maybe_current_level() is not None:
                return self.attn_drop((q @ k.mT * scale).softmax(-1)) @ v
            if torch._fused_sdp_choice(q, k, v, dropout_p=dropout):
                for part in (q, k, v):
                    _differentiable_once(part)
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)

    def _gravity_heads(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Mixed values [B, G, n, d] of the gravity heads."""
        if not self._has_kernel(q, k, v):
            return self.attn_drop(self._gravity_weights(q, k)).to(v.dtype) @ v
        column = self._key_mass(k)
        column = q.new_zeros((1, 1, 1)) if column is None else column
        return power_law_attention(q, k, v, column, self._beta, scale=self._mass_scale, alpha=self._alpha)

    def _gravity_weights(self, q: Tensor, k: Tensor) -> Tensor:
        """Weights [B, G, n, n] of the gravity heads' queries and keys."""
        if not self._has_closed_form:
            return self._gravity_logits(q, k).softmax(-1)
        column = self._key_mass(k)
        column = None if column is None else column * self._mass_scale
        return power_law_weights(q, k, column, self._beta, self._alpha)

    @property
    def _has_closed_form(self) -> bool:
        return self.settings.distance == "l2" and self._query_mass() is None

    @property
    def _mass_scale(self) -> float:
        return self.settings.blend / self.divisor

    @property
    def _beta(self) -> Tensor | float:
        return self.settings.blend * self.lamb / self.divisor

    @property
    def _alpha(self) -> float:
        return (1 - self.settings.blend) / (2 * self.dot_divisor)

    def _has_kernel(self, q: Tensor, k: Tensor, v: Tensor) -> bool:
        """Whether kernels that keep no weights serve: not in traces, which hold no tensors, nor in compiled programs."""
        if not isinstance(q, Tensor) or q.device.type != "cuda" or torch.compiler.is_compiling():
            return False
        fits = q.dtype == k.dtype == v.dtype != torch.float64 and self.head_width <= 128
        return fits and self._has_closed_form and not (self.training and self.attn_drop.p > 0)

    def _weights(self, q: Tensor, k: Tensor) -> Tensor:
        return self._logits(q, k).softmax(-1)

    def _logits(self, q: Tensor, k: Tensor) -> Tensor:
        count = self.num_gravity_heads
        gravity, dot = (
            self._gravity_logits(q[:, :count], k[:, :count]),
            _dot_logits(q[:, count:], k[:, count:], self.dot_divisor),
        )
        return torch.cat([dot, gravity] if self.settings.head_order == "original" else [gravity, dot], 1)

    def _gravity_logits(self, q: Tensor, k: Tensor) -> Tensor:
        """Logits [B, G, n, n] of gravity heads, blended with the dot logit where the settings say so."""
        share = self.settings.blend
        logits = gravity_logits(q, k, self._mass(k), lamb=self.lamb, divisor=self.divisor, distance=self.distance)
        return logits if share == 1 else torch.lerp(_dot_logits(q, k, self.dot_divisor), logits, share)

    def _key_mass(self, k: Tensor) -> Tensor | None:
        """Log-masses of the keys, broadcastable to [B, G, 1, n]; None without masses."""
        if isinstance(self.mass, ContentMass):
            return self.mass(k).unsqueeze(-2)
        return None if self.mass is None else self._at_present(self.mass.log_key()).unsqueeze(-2)

    def _at_present(self, masses: Tensor) -> Tensor:
        return masses if self.grid is None else self.grid.of(masses)

    def _query_mass(self) -> Tensor | None:
        """Log-masses of the queries, broadcastable to [B, G, n, 1]; None where the settings have none."""
        if isinstance(self.mass, PositionMass) and self.mass.query is not None:
            return self._at_present(self.mass.log_query()).unsqueeze(-1)
        return None

    def _mass(self, k: Tensor) -> Tensor | float:
        """mu_ij, broadcastable to [B, G, n, n]."""
        key, query = self._key_mass(k), self._query_mass()
        if key is None or query is None:
            return 0.0 if key is None else key
        return query * key if self.settings.mass_combine == "product" else query + key


def new_mass(
    settings: AttentionSettings, num_gravity_heads: int, num_tokens: int, head_width: int
) -> PositionMass | ContentMass | None:
    """The masses that a layer with these settings needs: none for distance alone and for plain attention."""
    if settings.mass == "none" or not num_gravity_heads:
        return None
    if settings.mass == "content":
        if settings.query_mass or settings.mass_combine == "product":
            raise ValueError("masses read off the keys have no query side: found query_mass or mass_combine product")
        return ContentMass(num_gravity_heads, head_width, param=settings.mass_param)
    query = settings.query_mass or settings.mass_combine == "product"
    rows = num_gravity_heads if settings.per_head else 1
    return PositionMass(num_tokens, rows, param=settings.mass_param, init=settings.mass_init, query=query)


def gravity_layers(mass_pos: str, num_layers: int) -> range:
    """Layers with gravity: all (full; full_fix, where they share masses), the first (head) or the last (tail)."""
    if mass_pos not in MASS_POSITIONS:
        raise ValueError(f"unknown mass_pos {mass_pos!r}: choose one of {', '.join(MASS_POSITIONS)}")
    layers = range(num_layers)
    return {"head": layers[:1], "tail": layers[-1:]}.get(mass_pos, layers)


def shared_mass(settings: AttentionSettings, mass_pos: str, num_heads: int, num_tokens: int) -> PositionMass | None:
    """The one table of full_fix; None where layers have their own masses (content masses always do)."""
    if mass_pos != "full_fix" or settings.mass != "position":
        return None
    found = new_mass(settings, settings.num_gravity_heads(num_heads), num_tokens, 0)
    return found if isinstance(found, PositionMass) else None


def replace_attention(
    model: nn.Module,
    settings: AttentionSettings,
    *,
    mass_pos: str = "full",
    num_tokens: int | None = None,
    input_size: tuple[int, int, int] | None = None,
) -> nn.Module:
    """Give layers of a timm vision transformer gravity attention, in place; returns the model.

    Every attention of timm's standard kind that ``mass_pos`` selects is replaced. Its maps, norms and
    dropouts are carried over as they are (trained or not) and dot logits keep its divisor, so ``PLAIN`` settings
    (``mix="split", num_split=0``) compute what the model computed before. Masses and lambdas join the model's
    ``no_weight_decay()``.

    num_tokens: tokens that every layer sees. By default a VisionTransformer's patches and prefix tokens, whose masses
    are then resampled at other image sizes as its position embedding is, and picked where patches are dropped; of
    another model each layer's own number, found by one picture of ``input_size`` (channels, height, width; by default
    that of its published weights).

    ValueError when the model has no such attention, one that is gated or masked, or no fixed number of tokens.

    Examples:
        >>> import timm
        >>> vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=10)
        >>> vit = replace_attention(vit, AttentionSettings(lamb=3.0), mass_pos="tail")
        >>> [name for name, _ in gravity_attentions(vit)]
        ['blocks.1.attn']
        >>> vit(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 10])
    """
    from timm.models.vision_transformer import Attention, VisionTransformer

    found = [(name, layer) for name, layer in model.named_modules() if type(layer) is Attention]
    if not found:
        raise ValueError(f"found no standard timm attention in {type(model).__name__}, wanted a vision transformer")
    settings, grid = replace(settings, dot_scale="sqrt_head"), None
    chosen = [found[index] for index in gravity_layers(mass_pos, len(found))]
    if num_tokens is not None or settings.mass != "position":
        numbers = [num_tokens or 0] * len(chosen)
    elif isinstance(model, VisionTransformer):
        grid = TokenGrid(tuple(model.patch_embed.grid_size), model.num_prefix_tokens)
        numbers = [grid.num_tokens] * len(chosen)
    else:
        numbers = _token_numbers(model, [layer for _, layer in chosen], input_size)
    if mass_pos == "full_fix" and len(set(numbers)) > 1:
        raise ValueError(f"found layers of {min(numbers)} to {max(numbers)} tokens, which cannot share their masses")
    mass = shared_mass(settings, mass_pos, found[0][1].num_heads, numbers[0])
    for (name, layer), number in zip(chosen, numbers, strict=True):
        parent, _, child = name.rpartition(".")
        new = _converted(layer, settings, number, mass)
        new.grid = grid if isinstance(new.mass, PositionMass) else None
        setattr(model.get_submodule(parent), child, new)
    if grid is not None and isinstance(model, VisionTransformer):
        model.patch_embed.register_forward_hook(grid.see)
        if hasattr(model.patch_drop, "prob"):
            model.set_submodule("patch_drop", PatchDrop(model.patch_drop, grid))
    _exempt_from_decay(model)
    return model


@torch.no_grad()
def _token_numbers(model: nn.Module, layers: Sequence[nn.Module], input_size: tuple[int, int, int] | None) -> list[int]:
    """Tokens that each attention sees in one picture."""
    seen: dict[int, int] = {}
    handles = [
        layer.register_forward_pre_hook(lambda own, inputs: seen.__setitem__(id(own), inputs[0].shape[1]))
        for layer in layers
    ]
    size: Any = input_size or getattr(model, "pretrained_cfg", {}).get("input_size")
    parameter = next(model.parameters())
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()(torch.zeros(1, *size, device=parameter.device, dtype=parameter.dtype))
        return [seen[id(layer)] for layer in layers]
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, AssertionError) as error:
        what = (
            f"cannot tell how many tokens the attention of {type(model).__name__} sees ({str(error).splitlines()[0]})"
        )
        raise ValueError(f"{what}: give num_tokens, or masses that have no position, mass='content'") from error
    finally:
        for module, training in modes:
            module.training = training
        for handle in handles:
            handle.remove()


def _exempt_from_decay(model: Any) -> None:
    """Add masses and lambdas to the names that timm's optimizers do not decay."""
    own = {id(parameter) for parameter in mass_parameters(model)}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in own}
    before = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    model.no_weight_decay = partial(set, frozenset({*before, *names}))


def _converted(
    layer: Attention, settings: AttentionSettings, num_tokens: int, mass: PositionMass | None
) -> GravityAttention:
    width = layer.num_heads * layer.head_dim
    if getattr(layer, "gate", None) is not None or layer.qkv.in_features != width or layer.proj.out_features != width:
        raise ValueError("found a gated attention or one that changes the width, wanted plain multi-head attention")
    if not math.isclose(layer.scale, layer.head_dim**-0.5):
        raise ValueError(f"found the dot scale {layer.scale}, wanted {layer.head_dim**-0.5:.4g}")
    with torch.random.fork_rng(devices=[]):
        new = GravityAttention(width, layer.num_heads, num_tokens, settings, mass=mass)
    new.to(layer.qkv.weight.device, layer.qkv.weight.dtype).train(layer.training)
    for name in ("qkv", "q_norm", "k_norm", "attn_drop", "norm", "proj", "proj_drop"):
        setattr(new, name, getattr(layer, name, getattr(new, name)))
    return new


def gravity_attentions(model: nn.Module) -> Iterator[tuple[str, GravityAttention]]:
    """Every :class:`GravityAttention` of a model with its name, plain ones (without gravity heads) included."""
    return ((name, layer) for name, layer in model.named_modules() if isinstance(layer, GravityAttention))


def mass_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Masses and learnable lambdas: what weight decay should leave alone. A shared table is listed once."""
    found: dict[int, nn.Parameter] = {}
    for _, layer in gravity_attentions(model):
        own = [] if layer.mass is None else [*layer.mass.parameters()]
        own += [layer.raw_lamb] if hasattr(layer, "raw_lamb") else []
        found |= {id(parameter): parameter for parameter in own}
    return list(found.values())


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups: everything decays except masses and lambdas. One group where there are none."""
    free = mass_parameters(model)
    kept = {id(parameter) for parameter in free}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in kept and parameter.requires_grad]
    groups = [{"params": rest, "weight_decay": weight_decay}]
    return [*groups, {"params": free, "weight_decay": 0.0}] if free else groups


def log_masses(model: nn.Module) -> dict[str, Tensor]:
    """Learned log-masses of positions by layer name, [S, n] each; layers without position masses are left out."""
    layers = gravity_attentions(model)
    return {name: layer.mass.log_key().detach() for name, layer in layers if isinstance(layer.mass, PositionMass)}


@torch.no_grad()
def attention_weights(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Weights [B, H, n, n] of every :class:`GravityAttention` while the model reads ``images``, by layer name.

    The model is run in eval mode and left in the mode it was in.
    """
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda layer, inputs: found.__setitem__(name, layer.weights(inputs[0]))

    handles = [layer.register_forward_pre_hook(keep(name)) for name, layer in gravity_attentions(model)]
    training = model.training
    try:
        model.eval()(images)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return found


class AttentionSummary(NamedTuple):
    """What heads look at, averaged over images and queries."""

    entropy: Tensor  # [H] nats; log n is uniform attention
    first_token: Tensor  # [H] share of the weight on token 0 (the class token)
    received: Tensor  # [H, n] mean weight on every key position; sums to 1


def summarize_weights(weights: Tensor) -> AttentionSummary:
    """Entropy per head, share on token 0, and mean weight per key position. Shape: weights [B, H, n, n]."""
    entropy = -torch.special.xlogy(weights, weights).sum(-1).mean((0, 2))
    received = weights.mean((0, 2))
    return AttentionSummary(entropy, received[:, 0], received)


def _log_mass(raw: Tensor, param: str) -> Tensor:
    return log_mass(raw, "exp" if param == "raw" else param)


def _inverse_softplus(value: float) -> float:
    return value + math.log(-math.expm1(-value))
