"""Experiments of recommenders: data of users and items, full ranking, baselines beside the model, lists and vectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import scipy.sparse as sp
import torch
from torch import nn

from gfml.base.errors import UserError
from gfml.data.interactions import Interactions
from gfml.data.options import load_from_args
from gfml.distances import SquaredDistance
from gfml.engine import distributed
from gfml.engine.runs import Run
from gfml.engine.tracking import Tracker
from gfml.engine.train import FitResult, Terms
from gfml.gravity import Mass
from gfml.program.experiment import Experiment, Judged
from gfml.program.flags import baseline_grids
from gfml.program.steps import check_judgeable, cut_offs, definitions_of, shared_loss
from gfml.ranking.evaluation import Evaluation, evaluate
from gfml.ranking.foldin import fold_in
from gfml.ranking.topk import Scorer
from gfml.report.recommenders import baseline_results, data_facts, data_lines, judged_text, list_names, mass_report

# Steps between evaluations where the settings leave that open: 5 epochs of the embedded demo in batches of 2048 pairs.
STEPS_BETWEEN = 80


class Recommender(Experiment):
    """An experiment whose data is :class:`Interactions` and whose model ranks all items for every user."""

    @classmethod
    def load(cls, settings: Any) -> Any:
        data = load_from_args(settings)
        check_judgeable(data, settings.topks, settings.select_metric, settings.select_on)
        return data

    @property
    def interactions(self) -> Interactions:
        """Who has which items."""
        return self.data

    @property
    def fingerprint(self) -> str:
        return self.interactions.fingerprint

    def whole(self) -> Self:
        return type(self)(self.settings, self.data.refit(), self.world)

    @property
    def ks(self) -> tuple[int, ...]:
        """The list lengths to judge."""
        return cut_offs(self.settings.topks, self.settings.select_metric)

    # -- to be said by a paper

    def scorer(self, model: nn.Module, split: str = "test") -> Scorer:
        """All-item scores for judging a split."""
        return model.scorer()

    def fold_in(self, model: nn.Module, histories: sp.csr_array) -> Scorer:
        """Scores of new users with these histories [n, I]; see :func:`gfml.ranking.foldin.fold_in`."""
        encoder = model if hasattr(model, "new_users") else getattr(model, "encoder", None)
        return fold_in(self.scorer(model, "test"), histories, encoder)

    def mass(self, model: nn.Module) -> Mass | None:
        """The masses that rank, if the model has any."""
        return None

    def vectors(self, model: nn.Module) -> tuple[torch.Tensor, torch.Tensor] | None:
        """User [U, D] and item [I, D] vectors; None for a model that has none."""
        user, item = model.encoder.vectors()
        return user.detach(), item.detach()

    def item_space(self, model: nn.Module) -> tuple[torch.Tensor, SquaredDistance]:
        """Item vectors [I, D] and the squared distance that makes neighbours of them.

        Here 2 - 2 cos: unit vectors, for models that learn no distance. UserError for a model without item vectors.
        """
        vectors = self.vectors(model)
        if vectors is None:
            raise UserError(f"{self.name} has no item vectors, so no item is near another: ask for lists of users")
        return torch.nn.functional.normalize(vectors[1], dim=1), SquaredDistance("l2")

    def is_logit(self, model: nn.Module) -> bool:
        """Whether the sigmoid of the ranking score is a probability."""
        return False

    def facts(self, model: nn.Module, test: Evaluation) -> dict[str, Any]:
        """Further entries of the result."""
        return {}

    @property
    def name(self) -> str:
        """What the model is called in tables."""
        raise NotImplementedError

    # -- training

    def shared(self, loss: Callable[[Any], Terms], model: nn.Module, *, reduction: str) -> Callable[[Any], Terms]:
        """The loss; with several processes that of this one's rows, all of which make one step together."""
        distributed.average_gradients(model)
        return shared_loss(loss, self.world, reduction=reduction)

    @property
    def why_autograd(self) -> str | None:
        """What keeps gradients from being taken by formula (:mod:`gfml.fused`), whatever the loss; None: nothing."""
        return "--compile" if self.settings.compile else "several processes" if self.world.size > 1 else None

    @property
    def constant_batches(self) -> bool:
        """Whether batches are filled up to one shape by rows without weight: where steps may be recorded and the loss is a
        sum over rows. On the CPU that would cost time for nothing."""
        recorded = self.device.type != "cpu" and self.world.size == 1 and self.settings.cuda_graph != "0"
        return recorded and self.sharing_problem() is None

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch, about: each pair once."""
        return -(-self.interactions.train.nnz // self.settings.batch_size)

    # -- judging

    @property
    def eval_every(self) -> int:
        """Epochs between evaluations; none given: as many as make about ``STEPS_BETWEEN`` steps, at most ten.

        No more than ten, since a small table is judged in no time and few epochs would be told apart by nothing.
        """
        return self.settings.eval_every or min(10, max(1, round(STEPS_BETWEEN / max(self.steps_per_epoch, 1))))

    def evaluation(self, model: nn.Module, split: str, *, beyond: bool = False, **how: Any) -> Evaluation:
        """Full ranking of one part."""
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        with torch.no_grad():
            scorer = how.pop("scorer", None) or self.scorer(model, split)
        how = {"definitions": definitions_of(self.settings, judging=beyond), **how}
        return evaluate(scorer, self.interactions, split, self.ks, beyond=beyond, device=device, **how)

    def evaluate(self, model: nn.Module, split: str) -> Mapping[str, float]:
        return self.evaluation(model, split).means

    def judge(self, model: nn.Module, fitted: FitResult | None, run: Run | None) -> Judged:
        settings, data = self.settings, self.interactions
        test = self.evaluation(model, "test", beyond=True)
        names = [] if "none" in settings.baselines else settings.baselines
        cache = Path(settings.out) / "baselines"
        result: dict[str, Any] = {
            "model": self.name,
            "topks": list(settings.topks),
            "data": data_facts(data),
            "test": test.means,
            "cold_users": test.cold_users,
            "baselines": baseline_results(
                names,
                data,
                self.ks,
                cache_dir=cache,
                grids=baseline_grids(settings.baseline_grid),
                definitions=definitions_of(settings, judging=True),
            ),
        }
        if data.valid.nnz:
            result["val"] = self.evaluation(model, "valid", beyond=True).means
        mass = self.mass(model)
        if mass is not None:
            norms = self.vectors(model)[1].norm(dim=1).cpu().double().numpy()
            result["mass"] = mass_report(mass, data, norms)
        return Judged(result | self.facts(model, test), self.arrays(model, test), test)

    def arrays(self, model: nn.Module, test: Evaluation) -> dict[str, np.ndarray]:
        """What reports and comparisons between runs read."""
        data, mass = self.interactions, self.mass(model)
        arrays = {
            "item_popularity": data.item_popularity,
            "user_activity": data.user_activity,
            "test_users": test.users,
            "top": test.top.astype(np.int32),
            **list_names(data, test.users),
        }
        # Values per user for intervals and tests: the accuracies, of item groups too, and the lists' statistics.
        kept = {
            name: values
            for name, values in test.per_user.items()
            if "_" not in name or "_recall@" in name or "graded_" in name
        }
        arrays |= {f"per_user/{name}": values.astype(np.float32) for name, values in kept.items()}
        for side in ("item", "user"):
            if mass is not None and getattr(mass, side) is not None:
                arrays[f"{side}_log_mass"] = getattr(mass, f"log_{side}")().detach().cpu().numpy()
        true = {"true_item_mass": data.true_item_mass, "true_user_mass": data.true_user_mass}
        arrays |= {name: mass for name, mass in true.items() if mass is not None}
        return arrays

    def page(self, run: Run, judged: Judged) -> Path | None:
        from gfml.report.ranking_page import write_report

        return write_report([run.path])

    # -- words and curves

    def data_lines(self) -> list[str]:
        return data_lines(self.interactions)

    @classmethod
    def result_text(cls, result: Mapping[str, Any]) -> str:
        """The table of one result."""
        return judged_text(result, {result["model"]: result["test"]}) + mass_text(result.get("mass", {}))

    def track(self, tracker: Tracker, model: nn.Module, judged: Judged) -> None:
        if tracker.log_dir is None:
            return
        super().track(tracker, model, judged)
        epoch, data, mass = judged.result["selection"]["epoch"] or 0, self.interactions, self.mass(model)
        for side in ("item", "user"):
            if mass is not None and getattr(mass, side) is not None:
                tracker.histogram(f"mass/{side}", getattr(mass, f"log_{side}")(), epoch)
        vectors = self.vectors(model)
        if vectors is not None:
            popular = np.argsort(-data.item_popularity, kind="stable")[:2000].copy()
            names = popular if data.item_ids is None else data.item_ids[popular]
            labels = [[name, int(data.item_popularity[i])] for name, i in zip(names, popular.tolist(), strict=True)]
            items = vectors[1].cpu()[torch.from_numpy(popular)]
            tracker.projector("items", items, labels, columns=["item", "train interactions"], step=epoch)


def mass_text(mass: Mapping[str, float]) -> str:
    """A line on the item masses, empty without any."""
    if "item_spearman_popularity" not in mass:
        return ""
    line = f"\nitem mass: Spearman {mass['item_spearman_popularity']:.3f} with popularity"
    line += f", {mass['item_spearman_true']:.3f} with the true mass" if "item_spearman_true" in mass else ""
    return line + (f", {mass['item_dead']:.0%} without gradient" if "item_dead" in mass else "")
