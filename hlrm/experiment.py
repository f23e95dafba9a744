"""From flags to objects: data checks, model, optimizer, batches, and what selects the epoch."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gfml.base.errors import UserError
from gfml.data.interactions import Interactions, csr_from_pairs, pairs_from_csr
from gfml.engine.runs import Run
from gfml.engine.train import Step
from gfml.program.cli import Options
from gfml.program.steps import ProjectedStep, build_step
from gfml.ranking.encoders import Tables
from gfml.ranking.evaluation import evaluate
from gfml.ranking.pretrained import join_tables, read_nodes, read_table
from gfml.ranking.sampling import TripleSampler, seeded_generator
from gfml.ranking.topk import Scorer
from hlrm.data import History, PairBatch, PairSampler, fixed_histories
from hlrm.model import HingeOptions, RelationModel, TranslatedModel, clip_rows_
from hlrm.relations import DiagonalRelation, MemoryRelation

# fit keeps the highest value; a loss is judged by its negative.
MINUS_LOSS = "minus_loss"


def build_model(options: Options, data: Interactions, device: torch.device, *, start: bool = True) -> RelationModel:
    """The model as the flags say. start False: without start vectors, because saved weights will follow."""
    encoder = Tables(data.num_users, data.num_items, options.emb_size, init="ball")
    hinge = HingeOptions(
        options.loss_margin,
        options.squared,
        options.reduction,
        options.copy_relations,
        options.clip_norm,
        options.clip_memory,
        bool(options.compat),
    )
    if options.model == "transcf":
        model = TranslatedModel(
            encoder, hinge, neighbour_weight=options.neighbour_weight, distance_weight=options.distance_weight
        )
    else:
        model = RelationModel(encoder, _build_relation(options), hinge)
    if start and options.is_pretrained_embs:
        _start_from(options, data, model)
    encoder.nodes.requires_grad_(not options.freeze_embs)
    return model.to(device)


def build_training(options: Options, model: RelationModel) -> tuple[torch.optim.Optimizer, Any, Step]:
    """Optimizer, exponential decay of its rate per epoch, and a step that ends with the projection."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kinds = {"adam": partial(torch.optim.Adam, fused=True), "adagrad": torch.optim.Adagrad, "sgd": torch.optim.SGD}
    optimizer = kinds[options.optimizer](trained, lr=options.lr)
    step = build_step(options, optimizer, options.clip if options.clip > 0 else None)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, options.lr_scheduler_gamma)
    return optimizer, scheduler, ProjectedStep(step, model)


def build_sampler(options: Options, data: Interactions, device: torch.device) -> PairSampler:
    """Batches of the train part."""
    return PairSampler(
        data.train,
        batch_size=options.train_batch_size,
        width=options.num_inter,
        seed=options.seed,
        kind=options.history_sampling,
        with_audience=options.model == "transcf",
        device=device,
    )


def histories(options: Options, data: Interactions, split: str, device: torch.device) -> History:
    """What judging ``split`` knows of every user: train for valid, train and valid for test. A function of the seed."""
    return fixed_histories(
        data.seen(split),
        options.judge_inter,
        options.seed,
        kind=options.history_sampling,
        popularity=data.item_popularity,
        device=device,
    )


def scorer_of(options: Options, data: Interactions, model: RelationModel, split: str) -> Scorer:
    """All-item scores for judging ``split``."""
    history = histories(options, data, split, model.encoder.nodes.device)
    return model.scorer(history, train=data.train, block=options.eval_batch_size)


class Validation:
    """What selects the epoch: the loss of fixed validation pairs, or ranking metrics of some validation users.

    The pairs are all of the validation part, each with one negative that the user has in neither train nor validation
    and a fixed history. Without a negative (a user who has every item) a pair is left out.
    """

    def __init__(self, options: Options, data: Interactions, model: RelationModel, device: torch.device) -> None:
        self.options, self.model = options, model
        self.metric = MINUS_LOSS if options.select_metric == "loss" else options.select_metric
        self.batches = _validation_batches(options, data, device) if self.metric == MINUS_LOSS else []
        self.data = _some_users(data, options.select_users, options.seed)

    @property
    def select(self) -> str:
        """The name of the selection, for :func:`gfml.engine.train.fit`."""
        return f"val/{self.metric}"

    def __call__(self, split: str) -> dict[str, float]:
        if self.metric == MINUS_LOSS:
            return {"loss": (loss := self._loss()), MINUS_LOSS: -loss}
        k = int(self.metric.partition("@")[2])
        scorer = scorer_of(self.options, self.data, self.model, split)
        return evaluate(scorer, self.data, split, [k], device=self.model.encoder.nodes.device).means

    @torch.no_grad()
    def _loss(self) -> float:
        """Mean over the pairs, whatever --reduction says."""
        total = torch.zeros((), dtype=torch.float64)
        for batch in self.batches:
            share = 1 if self.options.reduction == "sum" else len(batch)
            total += float(self.model.loss(batch)["loss"]) * share
        return float(total / sum(map(len, self.batches)))


def describe(options: Options, data: Interactions, model: RelationModel, device: torch.device, run: Run) -> str:
    """What is about to run, in a few lines."""
    notes = [f"note: {key}: {value}" for key, value in data.notes.items()]
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    history = f", at most {options.num_inter} {options.history_sampling} history items" if options.num_inter else ""
    if options.judge_inter != options.num_inter:
        history += f" ({options.judge_inter} when judging)"
    distance = "squared distances" if options.squared else "plain distances"
    return "\n".join(
        [
            f"{data.name}: {data.num_users:,} users x {data.num_items:,} items; train {data.train.nnz:,}, "
            f"validation {data.valid.nnz:,}, test {data.test.nnz:,} interactions",
            *notes,
            f"{model_name(options)}, margin {options.loss_margin:g} on {distance}{history}; "
            f"{count:,} trained parameters on {device}; seed {options.seed}",
            f"selecting by {options.select_metric} on validation",
            f"run directory {run.path}",
        ]
    )


def model_name(options: Options) -> str:
    """What the model is called in tables."""
    if options.model != "hlr":
        return {"lrml": "LRML", "cml": "CML", "transcf": "TransCF-style"}[options.model]
    name = "HLR" if options.hlrm_type == "base" else "HLR++"
    return name if options.relation_form == "memory" else f"{name}, diagonal form of the port"


def _build_relation(options: Options) -> MemoryRelation | DiagonalRelation | None:
    if options.model == "cml":
        return None
    if options.model == "lrml":
        return MemoryRelation(options.emb_size, options.num_relations, user_slot=True)
    if options.relation_form == "diagonal":
        return DiagonalRelation(
            options.emb_size, options.num_relations, options.hlrm_type, user_slot=options.include_user_slot
        )
    return MemoryRelation(
        options.emb_size,
        options.num_relations,
        options.hlrm_type,
        user_slot=options.include_user_slot,
        beta=options.beta,
        diff_memory=options.diff_memory,
    )


@torch.no_grad()
def _start_from(options: Options, data: Interactions, model: RelationModel) -> None:
    """Copy given vectors; into the ball unless they are frozen, which leaves them exactly as they are."""
    shape = (data.num_users, data.num_items, options.emb_size)
    if options.pretrained is not None:
        nodes = read_nodes(options.pretrained, shape, data)
    else:
        source = f"{options.user_emb} and {options.item_emb}"
        nodes = join_tables(
            read_table(options.user_emb, "user", data), read_table(options.item_emb, "item", data), shape, source
        )
    model.encoder.nodes.copy_(nodes)
    if not options.freeze_embs:
        clip_rows_(model.encoder.nodes, options.clip_norm, compat=bool(options.compat))


def _validation_batches(options: Options, data: Interactions, device: torch.device) -> list[PairBatch]:
    known = TripleSampler(data.train_and_valid, batch_size=1, seed=options.seed, device=device)
    users, items = pairs_from_csr(data.valid)
    open_users = np.diff(data.train_and_valid.indptr) < data.num_items
    users, items = (torch.from_numpy(side[open_users[users]]).to(device) for side in (users, items))
    if len(users) == 0:
        raise UserError(
            f"{data.name} has no validation pair with an item left over as a negative: select by ndcg@10 instead"
        )
    negatives = known.negatives(users, seeded_generator(device, options.seed, 0, 3))
    history = histories(options, data, "valid", device)
    audience = None
    if options.model == "transcf":
        audience = fixed_histories(
            data.train.T.tocsr(),
            options.num_inter,
            options.seed,
            kind="random",
            popularity=data.user_activity,
            device=device,
        )
    return [
        _judged_batch(users[part], items[part], negatives[part], history, audience)
        for part in torch.arange(len(users), device=device).split(options.eval_batch_size)
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
