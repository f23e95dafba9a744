"""What an HLRM run is made of: the model of the flags, its optimizer and batches, and its two protocols of judging."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gfml.base.checkpoints import load_state, save_state
from gfml.base.errors import UserError
from gfml.base.optim import light
from gfml.data.interactions import Interactions, csr_from_pairs, pairs_from_csr
from gfml.distances import SquaredDistance
from gfml.engine.runs import Run
from gfml.engine.train import FitResult
from gfml.program.experiment import Judged, Training
from gfml.program.flags import baseline_grids
from gfml.program.recommender import Recommender
from gfml.program.steps import ProjectedStep, build_step, definitions_of
from gfml.ranking.encoders import Tables
from gfml.ranking.evaluation import evaluate
from gfml.ranking.pretrained import join_tables, read_nodes, read_table
from gfml.ranking.sampling import TripleSampler, seeded_generator
from gfml.ranking.topk import Scorer
from gfml.report.recommenders import baseline_results, data_facts, other_conventions, text_table
from hlrm.data import History, PairBatch, PairSampler, fixed_histories
from hlrm.metrics import cohort_metrics, cohorts
from hlrm.model import HingeOptions, RelationModel, TranslatedModel, clip_rows_
from hlrm.relations import DiagonalRelation, HistoryAttention, MemoryRelation, Relation

# fit keeps the highest value; a loss is judged by its negative.
MINUS_LOSS = "minus_loss"
# Our metric names for the columns of the printed tables, which are the port's.
COLUMNS = {"HitRate": "hit", "MAP": "map", "MRR": "mrr", "NDCG": "ndcg", "PREC": "precision", "REC": "recall"}
PAPER_COLUMNS = {"HitRate": "hitrate", "MAP": "map", "MRR": "mrr", "NDCG": "ndcg", "PREC": "prec", "REC": "rec",
                 "NDCG local": "ndcg_local", "MMR": "mmr"}  # fmt: skip


class HLRM(Recommender):
    """Pairs against one negative each, by the distance of translated points; histories say who a user is."""

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self._validation: Validation | None = None

    @property
    def name(self) -> str:
        s = self.settings
        if s.model != "hlr":
            return {"lrml": "LRML", "cml": "CML", "transcf": "TransCF-style", "attcml": "AttCML-style"}[s.model]
        name = "HLR" if s.hlrm_type == "base" else "HLR++"
        return name if s.relation_form == "memory" else f"{name}, diagonal form of the port"

    @property
    def label(self) -> str:
        s = self.settings
        return f"{self.data.name}-{f'{s.relation_form}-{s.hlrm_type}' if s.model == 'hlr' else s.model}"

    @property
    def ks(self) -> tuple[int, ...]:
        return self.settings.topks

    # -- building and training

    def build(self, *, start: bool = True) -> RelationModel:
        s = self.settings
        encoder = Tables(self.data.num_users, self.data.num_items, s.embedding_dim, init="ball")
        hinge = HingeOptions(
            s.margin, s.squared, s.reduction, s.copy_relations, s.clip_norm, s.clip_memory, bool(s.compat)
        )
        if s.model == "transcf":
            model: RelationModel = TranslatedModel(
                encoder, hinge, neighbour_weight=s.neighbour_weight, distance_weight=s.distance_weight
            )
        else:
            model = RelationModel(encoder, self._relation(), hinge)
        if start and s.is_pretrained_embs:
            self._start(model)
        encoder.nodes.requires_grad_(not s.freeze_embs)
        return model.to(self.device)

    def _relation(self) -> Relation | None:
        s = self.settings
        if s.model == "cml":
            return None
        if s.model == "attcml":
            return HistoryAttention()
        if s.model == "lrml":
            return MemoryRelation(s.embedding_dim, s.num_relations, user_slot=True)
        if s.relation_form == "diagonal":
            return DiagonalRelation(s.embedding_dim, s.num_relations, s.hlrm_type, user_slot=s.include_user_slot)
        return MemoryRelation(
            s.embedding_dim, s.num_relations, s.hlrm_type, user_slot=s.include_user_slot, beta=s.beta,
            diff_memory=s.diff_memory,
        )  # fmt: skip

    def check(self) -> None:
        """Start vectors whose files are there must fit the data."""
        s = self.settings
        if s.is_pretrained_embs and all(Path(file).exists() for file in (s.pretrained, s.user_emb, s.item_emb) if file):
            self._vectors()

    def _vectors(self) -> Tensor:
        """The given start vectors of users and items."""
        s = self.settings
        shape = (self.data.num_users, self.data.num_items, s.embedding_dim)
        if s.pretrained is not None:
            return read_nodes(s.pretrained, shape, self.data)
        tables = (read_table(file, side, self.data) for file, side in ((s.user_emb, "user"), (s.item_emb, "item")))
        return join_tables(*tables, shape, f"{s.user_emb} and {s.item_emb}")

    @torch.no_grad()
    def _start(self, model: RelationModel) -> None:
        """Copy given vectors; into the ball unless they are frozen, which leaves them exactly as they are."""
        s = self.settings
        model.encoder.nodes.copy_(self._vectors())
        if not s.freeze_embs:
            clip_rows_(model.encoder.nodes, s.clip_norm, compat=bool(s.compat))

    def training(self, model: RelationModel) -> Training:
        """The rate decays exponentially by epoch; every step ends with the projection into the ball."""
        s = self.settings
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        kinds = {
            "adam": partial(light(torch.optim.Adam), fused=True),
            "adagrad": light(torch.optim.Adagrad),
            "sgd": light(torch.optim.SGD),
        }
        optimizer = kinds[s.optimizer](trained, lr=s.lr)
        sampler = PairSampler(
            self.data.train, batch_size=s.batch_size, width=s.num_inter, seed=s.seed, kind=s.history_sampling,
            with_audience=s.model == "transcf", device=self.device, constant=self.constant_batches,
        )  # fmt: skip
        return Training(
            optimizer, sampler.epoch, self.shared(model.loss, model, reduction=s.reduction),
            step=ProjectedStep(build_step(s, optimizer, s.clip if s.clip > 0 else None), model),
            scheduler=torch.optim.lr_scheduler.ExponentialLR(optimizer, s.lr_scheduler_gamma),
        )  # fmt: skip

    # -- judging

    def histories(self, split: str) -> History:
        """What judging ``split`` knows of every user: train for valid, train and valid for test. A function of the seed."""
        s = self.settings
        return fixed_histories(
            self.data.seen(split), s.judge_inter, s.seed, kind=s.history_sampling, popularity=self.data.item_popularity,
            device=self.device,
        )  # fmt: skip

    def scorer(self, model: RelationModel, split: str = "test") -> Scorer:
        return model.scorer(self.histories(split), train=self.data.train, block=self.settings.eval_batch_size)

    def item_space(self, model: RelationModel) -> tuple[Tensor, SquaredDistance]:
        return model.encoder.vectors()[1].detach(), SquaredDistance("l2")

    @property
    def select(self) -> str:
        s = self.settings
        return f"{s.select_on}/{MINUS_LOSS if s.select_metric == 'loss' else s.select_metric}"

    def evaluate(self, model: RelationModel, split: str) -> Mapping[str, float]:
        if self._validation is None:
            self._validation = Validation(self)
        return self._validation(model, split)

    def judge(self, model: RelationModel, fitted: FitResult | None, run: Run | None) -> Judged:
        return self.report(model, "test")

    def report(self, model: RelationModel, split: str) -> Judged:
        """Both protocols on one part, with the model's name, the data and the baselines.

        ``<split>``: full catalogue, every user of the part, usual definitions (and figures beyond accuracy).
        "sampled": the paper's protocol: cohorts of random users, the published formulas, means and deviations over
        cohorts. Both rank the whole catalogue; "sampled" samples users. They share one ranking.
        """
        s, data = self.settings, self.data
        found = self.evaluation(model, split, beyond=True, mask_seen=s.mask_seen)
        groups = cohorts(len(found.users), s.eval_size, s.num_cohorts, s.split_seed)
        relevant, sampled = data.split(split)[found.users], {}
        for k in s.topks:
            sampled |= cohort_metrics(found.top, relevant, data.item_popularity, k, groups, whole_list=bool(s.compat))
        names = [] if "none" in s.baselines or split != "test" or not s.mask_seen else s.baselines
        result = {
            "model": self.name, "topks": list(s.topks), "data": data_facts(data),
            "val" if split == "valid" else split: found.means, "sampled": sampled,
            "protocol": {
                "split": split, "users": len(found.users), "cohorts": len(groups), "cohort_size": len(groups[0]),
                "seen items": "left out" if s.mask_seen else "recommended too, as in the port",
            },
            "cold_users": found.cold_users,
            "baselines": baseline_results(
                names, data, s.topks, cache_dir=Path(s.out) / "baselines", grids=baseline_grids(s.baseline_grid),
                definitions=definitions_of(s, judging=True),
            ),
        }  # fmt: skip
        return Judged(result, self.arrays(model, found), found)

    # -- files and words

    def final_weights(self, model: RelationModel, run: Run) -> dict[str, Any]:
        """Weights with everything eval.py needs: flags, and which data they were trained on."""
        return {"model": model.state_dict(), "options": self.settings.resolved, "data": self.data.fingerprint}

    def finished(self, model: RelationModel, judged: Judged, run: Run) -> None:
        s = self.settings
        if s.save_model:
            save_state(s.save_dir, self.final_weights(model, run) | {"selection": judged.result["selection"]})
            print(f"saved model     {s.save_dir}")

    def describe(self, model: RelationModel) -> list[str]:
        s = self.settings
        history = f", at most {s.num_inter} {s.history_sampling} history items" if s.num_inter else ""
        if s.judge_inter != s.num_inter:
            history += f" ({s.judge_inter} when judging)"
        short = ["warning: one epoch, the port's default, leaves the model untrained: give --epochs 100"]
        return [
            *short * (s.epochs == 1),
            f"{self.name}, margin {s.margin:g} on {'squared' if s.squared else 'plain'} distances{history}",
        ]

    @classmethod
    def result_text(cls, result: Mapping[str, Any]) -> str:
        """The tables of both protocols."""
        protocol, selection = result["protocol"], result["selection"]
        split = "val" if protocol["split"] == "valid" else "test"
        judged = f"{protocol['users']} users, seen items {protocol['seen items']}"
        rows = {result["model"]: result[split]}
        rows |= {name: found["test"] for name, found in result["baselines"].items() if "test" in found}
        groups = f"{protocol['cohorts']} cohorts of {protocol['cohort_size']} of these users"
        sampled = result["sampled"].items()
        both = {
            f"{result['model']}, {kind}": {name: value[kind] for name, value in sampled} for kind in ("mean", "std")
        }
        return "\n".join([
            f"\n{protocol['split']} of {result['data']['name']}, epoch {selection['epoch']}, {selection['protocol']}",
            f"\nfull catalogue, all {judged}, usual definitions",
            _tables(rows, COLUMNS, result["topks"]),
            *other_conventions(rows),
            f"\nsampled users as in the paper, {groups}, published formulas",
            _tables(both, PAPER_COLUMNS, result["topks"]),
        ])  # fmt: skip


def _tables(rows: Mapping[str, Mapping[str, float]], columns: Mapping[str, str], ks: Sequence[int]) -> str:
    """One table for every K, under the port's names."""
    tables = []
    for k in ks:
        named = {
            name: {f"{shown}@{k}": means[f"{ours}@{k}"] for shown, ours in columns.items() if f"{ours}@{k}" in means}
            for name, means in rows.items()
        }
        tables.append(text_table(named, list(next(iter(named.values())))))
    return "\n".join(tables)


class Validation:
    """What selects the epoch: the loss of fixed validation pairs, or ranking metrics of some validation users.

    The pairs are all of the validation part, each with one negative that the user has in neither train nor validation
    and a fixed history. Without a negative (a user who has every item) a pair is left out.
    """

    def __init__(self, run: HLRM) -> None:
        s = run.settings
        self.run, self.by_loss = run, s.select_metric == "loss"
        self.batches = _validation_batches(run) if self.by_loss else []
        self.some = HLRM(s, _some_users(run.data, s.select_users, s.seed), run.world)

    def __call__(self, model: RelationModel, split: str) -> dict[str, float]:
        if self.by_loss:
            return {"loss": (loss := self._loss(model)), MINUS_LOSS: -loss}
        k = int(self.run.settings.select_metric.partition("@")[2])
        scorer = self.some.scorer(model, split)
        return evaluate(scorer, self.some.data, split, [k], device=self.run.device).means

    @torch.no_grad()
    def _loss(self, model: RelationModel) -> float:
        """Mean over the pairs, whatever --reduction says."""
        total = torch.zeros((), dtype=torch.float64)
        for batch in self.batches:
            share = 1 if self.run.settings.reduction == "sum" else len(batch)
            total += float(model.loss(batch)["loss"]) * share
        return float(total / sum(map(len, self.batches)))


def _validation_batches(run: HLRM) -> list[PairBatch]:
    data, s, device = run.data, run.settings, run.device
    # Drawn on the CPU, so that a model is judged alike on every device.
    known = TripleSampler(data.train_and_valid, batch_size=1, seed=s.seed)
    users, items = pairs_from_csr(data.valid)
    open_users = np.diff(data.train_and_valid.indptr) < data.num_items
    users, items = (torch.from_numpy(side[open_users[users]]) for side in (users, items))
    if len(users) == 0:
        raise UserError(
            f"{data.name} has no validation pair with an item left over as a negative: select by ndcg@10 instead"
        )
    negatives = known.negatives(users, seeded_generator("cpu", s.seed, 0, 3)).to(device)
    users, items = users.to(device), items.to(device)
    history, audience = run.histories("valid"), None
    if s.model == "transcf":
        audience = fixed_histories(
            data.train.T.tocsr(), s.num_inter, s.seed, kind="random", popularity=data.user_activity, device=device
        )
    return [
        _judged_batch(users[part], items[part], negatives[part], history, audience)
        for part in torch.arange(len(users), device=device).split(s.eval_batch_size)
    ]


def _judged_batch(users: Tensor, pos: Tensor, neg: Tensor, history: History, audience: History | None) -> PairBatch:
    both = torch.cat([pos, neg])
    crowd = None if audience is None else History(audience.ids[both], audience.counts[both])
    return PairBatch(users, pos, neg, History(history.ids[users], history.counts[users]), crowd)


def _some_users(data: Interactions, number: int, seed: int) -> Interactions:
    """The data with the validation pairs of at most ``number`` random users."""
    users, items = pairs_from_csr(data.valid)
    judged = np.unique(users)
    if len(judged) <= number:
        return data
    chosen = np.zeros(data.num_users, dtype=bool)
    chosen[np.random.default_rng(seed).choice(judged, number, replace=False)] = True
    kept = chosen[users]
    return replace(data, valid=csr_from_pairs(users[kept], items[kept], data.num_users, data.num_items))


def read_model(path: Path) -> tuple[dict[str, Any], Path]:
    """What a training saved, from the file or from the run directory that holds it, and the file."""
    file = path / "final.pt" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"there is no saved model {file}: train one with hlrm/train.py, or give --save_dir FILE")
    saved = load_state(file)
    if not {"model", "options", "data", "selection"} <= saved.keys():
        raise UserError(
            f"{file} was not written by hlrm/train.py (it holds {', '.join(sorted(saved))}): give another --save_dir"
        )
    return saved, file


def restore(this: HLRM, saved: Mapping[str, Any], file: Path) -> RelationModel:
    """The saved model, in eval mode. UserError when data or shapes are others."""
    if saved["data"] != this.data.fingerprint:
        raise UserError(
            f"{file} was trained on other data ({saved['data'][:12]}) than {this.data.name} ({this.data.fingerprint[:12]}): "
            "give the data and the split of its training"
        )
    model = this.build(start=False)
    try:
        model.load_state_dict(saved["model"])
    except RuntimeError as error:
        raise UserError(
            f"{file} holds a model of another shape ({str(error).splitlines()[-1].strip()}): give its own flags"
        ) from None
    return model.eval()
