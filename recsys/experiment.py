"""What a recommender run is made of: encoder, gravity and loss of the flags, optimizer, triples, and what masses do."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor, nn

from gfml.base.checkpoints import load_state
from gfml.base.errors import UserError
from gfml.base.optim import light
from gfml.base.settings import as_tokens
from gfml.cml import FeatureProjection, ItemFeatures, MetricOptions
from gfml.data.items import read_item_features
from gfml.distances import SquaredDistance
from gfml.engine.optimizers import build_optimizer
from gfml.engine.runs import Run
from gfml.engine.train import WeightAverage
from gfml.fused import FusedHinge, FusedPairLoss, path_text
from gfml.gravity import Gravity, GravityScorer, Mass, unit_rows
from gfml.program.experiment import Training
from gfml.program.flags import baseline_grids
from gfml.program.recommender import Recommender
from gfml.program.steps import ProjectedStep, build_step
from gfml.ranking.encoders import LightGCN, Tables
from gfml.ranking.evaluation import Evaluation, evaluate
from gfml.ranking.graph import build_graph
from gfml.ranking.ials import IALS
from gfml.ranking.pretrained import read_nodes
from gfml.ranking.sampling import TripleSampler
from gfml.ranking.topk import FactorScorer, Scorer
from gfml.report.recommenders import GRIDS, build_baseline, tuned_baseline
from recsys.model import BlendScorer, PairOptions
from recsys.model import Recommender as Model
from recsys.settings import SEARCHED

MASS_SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)


class Recsys(Recommender):
    """Users, positives and negatives, scored by the dot product, gravity, a blend of both, or CML's distance."""

    @property
    def name(self) -> str:
        s = self.settings
        return f"ials, D {s.embedding_dim}" if s.model == "ials" else f"{s.model} {s.loss_mode}"

    @property
    def label(self) -> str:
        s = self.settings
        return f"{self.data.name}-{s.model}" + ("" if s.model == "ials" else f"-{s.loss_mode}")

    @property
    def patience(self) -> int | None:
        return self.settings.patience if self.settings.early_stopping else None

    # -- building

    def check(self) -> None:
        """A --pretrain-file that is there must fit the data."""
        if self.settings.pretrain and Path(self.settings.pretrain_file).exists():
            self._start()

    def _start(self) -> Tensor:
        shape = (self.data.num_users, self.data.num_items, self.settings.embedding_dim)
        return read_nodes(self.settings.pretrain_file, shape, self.data)

    def build(self, *, start: bool = True) -> Model:
        s, data = self.settings, self.data
        distance = SquaredDistance(s.dist_mode, emd_input=s.emd_input, emd_power=s.emd_power, kl_kind=s.kl_kind)
        gravity = Gravity(
            data.num_users, data.num_items, distance=distance, mass=s.mass_mode, combine=s.mass_combine,
            mass_param=s.mass_param, mass_init=s.mass_init, lamb=s.lamb, learn_lamb=s.learn_lamb, eps=s.eps,
            emb_norm=bool(s.emb_norm),
        )  # fmt: skip
        metric = MetricOptions(
            margin=s.margin, use_rank_weight=s.use_rank_weight, feature_weight=s.feature_l2_reg,
            cov_weight=s.cov_loss_weight if s.use_cov_loss else 0.0,
        )  # fmt: skip
        model = Model(
            self._encoder(), gravity, s.loss_mode, pair=PairOptions(s.mix_ratio, s.decay, s.mass_reg, bool(s.compat)),
            metric=metric, radius=s.clip_norm if s.model == "cml" else None,
            features=None if s.features is None else self._features(),
        )  # fmt: skip
        if s.pretrain and start:
            model.encoder.nodes.data.copy_(self._start())
        return model.to(self.device)

    def _encoder(self) -> Tables:
        s, data = self.settings, self.data
        if s.model == "ials":
            tables = Tables(
                data.num_users, data.num_items, s.embedding_dim, init=s.init, std=s.init_std / s.embedding_dim**0.5
            )
            tables.vectors()[0].detach().zero_()  # users come first, from the items
            return tables
        if s.model != "lgn":
            return Tables(data.num_users, data.num_items, s.embedding_dim, init=s.init, std=s.init_std)
        return LightGCN(
            build_graph(data.train), s.embedding_dim, s.num_layers, combine=s.combine, init=s.init, std=s.init_std,
            edge_keep=s.keepprob if s.dropout else 1.0, undirected_dropout=s.undirected_dropout,
        )  # fmt: skip

    def _features(self) -> ItemFeatures:
        """CML's feature network over every item, as published: those without interactions take part too."""
        s = self.settings
        table = torch.from_numpy(read_item_features(s.features, self.data).values)
        projection = FeatureProjection(
            table.shape[1], s.embedding_dim, hidden_dim=s.hidden_layer_dim, dropout=s.dropout_rate,
            scale=s.feature_projection_scaling_factor, radius=s.clip_norm,
        )  # fmt: skip
        every = torch.ones(self.data.num_items, dtype=torch.bool)
        return ItemFeatures(projection, table, every, ~every, cold_offset=0.0)

    # -- training

    def training(self, model: Model) -> Training:
        s = self.settings
        if s.model == "ials":
            return self._least_squares(model)
        optimizer = build_optimizer(s.optimizer, model.parameter_groups(s.adamw_decay, bool(s.mass_adamw)), s.lr)
        step = build_step(s, optimizer, s.clip_grad)
        ema = None
        if s.ema_on:
            averaged = model.gravity.mass.parameters() if s.ema_scope == "mass" else model.parameters()
            ema = WeightAverage(averaged, s.lam_d)
        fused = self.fused_or_reason(model)
        sampler = TripleSampler(
            self.data.train, batch_size=s.batch_size, seed=s.seed, scheme=s.sampler, num_negatives=s.num_neg,
            device=self.device, constant=self.constant_batches and isinstance(fused, str),
        )  # fmt: skip
        loss = self.shared(
            model.loss if isinstance(fused, str) else fused, model, reduction="sum" if s.loss_mode == "cml" else "mean"
        )
        return Training(
            optimizer, sampler.epoch, loss,
            step=ProjectedStep(step, model) if s.model == "cml" else step, scheduler=_schedule(s, optimizer), ema=ema,
        )  # fmt: skip

    def _least_squares(self, model: Model) -> Training:
        """An epoch is one step, which solves for all users, then for all items."""
        nodes, solver = model.encoder.nodes, self._ials(model)

        def step(*_: Any) -> dict[str, Any]:
            tables = nodes.detach().cpu()  # on a CPU these are the parameters themselves
            solver.user, solver.item = tables.split([self.data.num_users, self.data.num_items])
            solver.epoch()
            nodes.data.copy_(tables)
            return {"loss": torch.tensor(solver.objective() / self.data.train.nnz)}

        return Training(light(torch.optim.SGD)([nodes], lr=1.0), lambda _: [None], lambda _: {}, step=step)

    def _ials(self, model: Model) -> IALS:
        s = self.settings
        solver = IALS(self.data.train, s.embedding_dim, l2=s.ials_l2, alpha0=s.ials_alpha0, nu=s.ials_nu)
        solver.user, solver.item = (part.detach().cpu() for part in model.encoder.vectors())
        return solver

    def fold_in(self, model: Model, histories: sp.csr_array) -> Scorer:
        """For iALS the rows' own least squares, else as any recommender's."""
        if self.settings.model != "ials" or not np.diff(histories.indptr).all():
            return super().fold_in(model, histories)
        return FactorScorer(self._ials(model).fold_in(histories).to(self.device), model.encoder.vectors()[1].detach())

    def fused_or_reason(self, model: Model) -> FusedPairLoss | FusedHinge | str:
        """The loss with gradients by formula, or why autograd makes them."""
        if self.settings.kernel == "autograd":
            return "--kernel autograd"
        found = self.why_autograd or model.fused_loss(on_device=self.settings.kernel == "fused")
        if self.settings.kernel == "fused" and isinstance(found, str):
            raise UserError(
                f"found --kernel fused, wanted a loss with gradients by formula ({found}): give --kernel auto"
            )
        return found

    unshared = ("--compat 1", "--loss_mode cml --use_cov_loss", "--features", "--model ials")

    def sharing_problem(self) -> str | None:
        s = self.settings
        whole = {
            "--compat 1": s.compat,
            "--use_cov_loss": s.loss_mode == "cml" and s.use_cov_loss,
            "--features": s.features,
            "--model ials": s.model == "ials",
        }
        return next((flag for flag, given in whole.items() if given), None)

    # -- judging

    def scorer(self, model: Model, split: str = "test") -> Scorer:
        return model.scorer(self.settings.infer_mode, self.settings.mass_scale)

    def mass(self, model: Model) -> Mass | None:
        return model.gravity.mass if model.ranks_by_gravity and model.gravity.mass.mode != "none" else None

    def facts(self, model: Model, test: Evaluation) -> dict[str, Any]:
        started = time.perf_counter()
        curve = self.mass_curve(model) if self.mass(model) is not None else None
        facts = {"seconds": {"report": time.perf_counter() - started}}
        return facts if self.mass(model) is None else facts | {"mass_curve": curve}

    def mass_curve(self, model: Model) -> dict[str, Any] | None:
        """Overall, head and tail recall as the item masses are damped: on validation, so that test stays unread."""
        if model.gravity.mass.item is None:
            return None
        split, k = "valid" if self.data.valid.nnz else "test", max(self.settings.topks)
        names = (f"recall@{k}", f"ndcg@{k}", f"head_recall@{k}", f"tail_recall@{k}", f"arp@{k}")
        points = []
        for scale in MASS_SCALES:
            scorer = model.scorer(self.settings.infer_mode, scale)
            means = evaluate(scorer, self.data, split, [k], beyond=True, device=self.device).means
            points.append({"mass_scale": scale} | {name: means[name] for name in names if name in means})
        return {"split": split, "points": points}

    def is_logit(self, model: Model) -> bool:
        """A gravity score, a blend, or the dot product under loss dot."""
        s = self.settings
        plain = s.loss_mode == "dot" and s.model != "ials" and s.infer_mode in ("mat", "dot")
        return plain or isinstance(self.scorer(model), (GravityScorer, BlendScorer))

    def item_space(self, model: Model) -> tuple[Tensor, SquaredDistance]:
        """The gravity score's distance; for loss cml the squared Euclidean one; dot and bpr learn none."""
        learned = model.loss_mode not in ("dot", "bpr", "cml")
        vectors = model.encoder.vectors()[1].detach()
        unit = model.gravity.emb_norm if learned else model.loss_mode != "cml"
        return unit_rows(vectors) if unit else vectors, model.gravity.distance if learned else SquaredDistance("l2")

    def describe(self, model: Model) -> list[str]:
        s = self.settings
        gravity = f", {s.dist_mode} distance, {s.mass_mode} mass, lambda {s.lamb:g}"
        if s.model == "ials":
            return [f"ials, weight {s.ials_alpha0:g} of what is not in train, l2 {s.ials_l2:g}, rows solved in turns"]
        lines = [f"{s.model}, loss {s.loss_mode}{'' if s.loss_mode in ('dot', 'bpr', 'cml') else gravity}"]
        if s.is_searched(s):
            point = " ".join(as_tokens(SEARCHED[s.loss_mode])).replace("=", " ")
            lines.append(f"{point}: as chosen in recsys/README.md, Defaults; --lr 1e-3 gives the published ones")
        touched = s.batch_size * (3 if s.loss_mode == "cml" else 2 + s.num_neg)
        return [*lines, path_text(self.fused_or_reason(model), touched)]


def _schedule(s: Any, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler | None:
    if s.lr_schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(s.epochs, 1))
    if s.lr_schedule == "step":
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, [s.epochs // 2, s.epochs * 3 // 4])
    return None


class Fixed(nn.Module):
    """A recommender without parameters. chosen: its settings; tried: points judged on validation, with their values."""

    def __init__(
        self, scorer: Scorer, chosen: Mapping[str, Any], tried: Sequence[tuple[Mapping[str, Any], float]]
    ) -> None:
        super().__init__()
        self.chosen, self.tried, self._scorer = dict(chosen), list(tried), scorer

    def scorer(self) -> Scorer:
        return self._scorer


class Baseline(Recommender):
    """A simple recommender whose settings validation chooses; nothing is trained."""

    select = None

    @property
    def name(self) -> str:
        return self.settings.method

    @property
    def label(self) -> str:
        return f"{self.data.name}-{self.settings.method}"

    def build(self, *, start: bool = True) -> Fixed:
        method = self.settings.method
        grid = {**GRIDS[method], **baseline_grids(self.settings.baseline_grid).get(method, {})}
        chosen, tried = tuned_baseline(method, self.data, grid)
        return Fixed(build_baseline(method, self.data, chosen), chosen, tried)

    def training(self, model: nn.Module) -> None:
        return None

    def vectors(self, model: nn.Module) -> None:
        return None

    def facts(self, model: Fixed, test: Evaluation) -> dict[str, Any]:
        return {"settings": model.chosen, "tried": len(model.tried), "seconds": {}}

    def selection(self, fitted: Any, run: Run) -> dict[str, Any]:
        return {"epoch": 0, "metric": "ndcg@20", "split": "val", "protocol": "no training, tuned on validation"}

    def final_weights(self, model: Fixed, run: Run) -> dict[str, Any]:
        return {"settings": model.chosen}

    def restore(self, path: Path, *, done: bool = True) -> Fixed:
        chosen = load_state(path / "final.pt")["settings"]
        return Fixed(build_baseline(self.settings.method, self.data, chosen), chosen, [])
