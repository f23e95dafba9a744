"""From flags to objects: data, network, loss, optimizer, batches, and how a part of the data is judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from contextual import data as datasets
from contextual.baselines import LossOptions, build_loss, parameter_groups
from contextual.data import RetrievalData
from contextual.network import EmbeddingNet, Projector, build_backbone
from contextual.samplers import PAIRS, BatchSampler, Plan, check_single_images, default_batches
from contextual.transforms import TrainBatches, in_order, test_transform, train_transform
from gfml.data.images import ImageSet
from gfml.engine import distributed
from gfml.engine.distributed import World
from gfml.engine.runs import Run, seed_everything
from gfml.engine.train import Closure, FitResult, Terms
from gfml.metrics.retrieval import Retrieval, retrieve
from gfml.program import steps as program
from gfml.program.cli import Options


def load_data(options: Options) -> RetrievalData:
    """The data with its validation classes held out, unless selection is on test."""
    data = datasets.load(
        options.dataset,
        options.root,
        split_lists=options.split_lists,
        split_seed=options.split_seed,
        check_counts=bool(options.check_counts),
    )
    if options.skip_bad_images:
        data = datasets.without_unreadable(data)
    if options.single_images == "drop":
        data = datasets.without_singles(data)
    elif options.single_images == "error" and options.ipc:
        check_single_images(data.train.labels, data.train.classes)
    return data if options.select_on == "test" else datasets.hold_out(data, options.val_share, options.split_seed)


class Retriever(nn.Module):
    """The network with its training-only parts: projector behind the embedding, and the loss with its proxies."""

    def __init__(self, net: EmbeddingNet, projector: Projector | None, criterion: nn.Module) -> None:
        super().__init__()
        self.encoder = nn.Sequential(net, projector) if projector is not None else nn.Sequential(net)
        self.criterion = criterion
        # A plain attribute, not a module: files hold the parameters once, under plain names.
        self._called: list[nn.Module] = [self.encoder]

    @property
    def net(self) -> EmbeddingNet:
        """What is judged and used: images to unit vectors."""
        return self.encoder[0]

    def share(self, *, sync_batchnorm: bool) -> None:
        """Train together with the other processes; before the optimizer is made."""
        self._called = [distributed.wrap(self.encoder, sync_batchnorm=sync_batchnorm)]

    def loss(self, batch: tuple[Tensor, Tensor]) -> Terms:
        """The loss of the whole batch, gathered from all processes. pictures [B, 3, H, W], labels [B]."""
        pictures, labels = batch
        embeddings = distributed.gather(self._called[0](pictures))
        return self.criterion(embeddings, distributed.gather(labels))


def build_model(options: Options, num_classes: int, device: torch.device) -> Retriever:
    """Network, projector and loss as the flags say; ``--checkpoint`` weights are loaded into the network."""
    backbone, channels = build_backbone(
        options.backbone,
        pretrained=bool(options.pretrained),
        image_size=options.image_size,
        own_pooling=options.pooling == "backbone",
        width=options.width,
    )
    net = EmbeddingNet(
        backbone,
        channels,
        options.embedding_size,
        pooling=options.pooling,
        layer_norm=bool(options.layer_norm),
        kaiming=options.pipeline == "224",
        batch_norm=options.batch_norm,
    )
    linear = options.bottleneck == "linear"
    projector = Projector(options.embedding_size, options.train_embedding) if linear else None
    criterion = build_loss(
        options.loss,
        num_classes=num_classes,
        embedding_dim=options.train_embedding if linear else options.embedding_size,
        pipeline=options.pipeline,
        options=loss_options(options),
    )
    model = Retriever(net, projector, criterion)
    if options.checkpoint is not None:
        _start_from(model, Path(options.checkpoint))
    return model.to(device, memory_format=torch.channels_last)


def loss_options(options: Options) -> LossOptions:
    """The flags of the loss."""
    return LossOptions(
        lam=options.lam,
        gamma=options.gamma,
        lam_convention=options.lam_convention,
        regularise=options.regularise,
        k=options.k,
        eps=options.eps,
        slope=options.slope,
        pos_margin=options.pos_margin,
        neg_margin=options.neg_margin,
        reg_sim=options.reg_sim,
        alpha=options.alpha,
        mrg=options.mrg,
        backend=options.loss_backend,
        ablation=options.ablation,
    )


def _start_from(model: Retriever, path: Path) -> None:
    """The network's weights of an earlier run, or of the published programs' files; projector and proxies stay behind."""
    from contextual.foreign import contextual
    from gfml.base.errors import UserError
    from gfml.base.weights import read_weights

    state, prefix = read_weights(path), "encoder.0."
    saved = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if not saved:
        saved = dict(state) if "head.weight" in state else contextual(state)
    try:
        model.net.load_state_dict(saved)
    except RuntimeError as error:
        why = str(error).splitlines()[1 if "\n" in str(error) else 0].strip()
        raise UserError(f"{path} is of another network ({why}): give its --backbone and --embedding_size") from error


class WarmStep:
    """The ordinary step, but in the first ``epochs`` epochs the held parameters keep still."""

    def __init__(self, held: list[nn.Parameter], epochs: int) -> None:
        self.held, self.epochs, self.epoch = held, epochs, 0

    def new_epoch(self) -> None:
        """Count an epoch."""
        self.epoch += 1

    def __call__(self, closure: Closure, optimizer: torch.optim.Optimizer) -> Terms:
        optimizer.zero_grad(set_to_none=True)
        terms = closure()
        terms["loss"].backward()
        values = {key: value.detach().clone() if isinstance(value, Tensor) else value for key, value in terms.items()}
        if self.epoch <= self.epochs:
            # Without a gradient an optimizer passes a parameter over: no step, no decay, no moments.
            for parameter in self.held:
                parameter.grad = None
        optimizer.step()
        return values

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch = state["epoch"]


def build_training(
    options: Options, model: Retriever
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR, WarmStep]:
    """Optimizer with its groups of learning rates, their schedule, and the step.

    256: the head has lr, the backbone lr / 2, proxies a constant rate. 224: the backbone has lr, the head the same,
    the projector twice, proxies 100 times.
    """
    large = options.pipeline == "256"
    base = options.lr / options.embedding_lr_multi if large else options.lr
    groups = [
        {"params": [p for p in model.net.backbone.parameters() if p.requires_grad], "lr": base},
        {"params": list(model.net.head.parameters()), "lr": base * options.embedding_lr_multi},
    ]
    if len(model.encoder) > 1:
        groups.append({"params": list(model.encoder[1].parameters()), "lr": options.lr * options.projector_lr_multi})
    scheduled = len(groups)
    groups += [{key: value for key, value in group.items() if key != "name"} for group in
               parameter_groups(model.criterion, pipeline=options.pipeline, lr=options.lr, loss_lr=options.loss_lr)]  # fmt: skip
    kind = torch.optim.AdamW if options.optimizer == "adamw" else torch.optim.Adam
    optimizer = kind(groups, lr=options.lr, weight_decay=options.weight_decay)
    falling = lr_factor(options)
    factors: list[Callable[[int], float]] = [
        falling if number < scheduled or not large else lambda epoch: 1.0 for number in range(len(groups))
    ]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
    return optimizer, scheduler, WarmStep(groups[0]["params"], options.warm)


def lr_factor(options: Options) -> Callable[[int], float]:
    """Factor of the learning rate after so many epochs: --lr-decay-gamma to the number of falls so far."""

    def factor(epoch: int) -> float:
        done = epoch + options.start_epoch
        falls = (
            done // options.lr_decay_step
            if options.lr_decay_step
            else sum(milestone <= done for milestone in options.milestones)
        )
        return options.lr_decay_gamma**falls

    return factor


def build_batches(options: Options, data: RetrievalData, world: World) -> TrainBatches:
    """Batches of the training part; each process reads its rows of every batch."""
    kind = "halves" if options.hierarchical else "classes" if options.ipc else "shuffle"
    plan = Plan(kind, options.batch_size, options.ipc)
    steps = options.batches_per_epoch or default_batches(
        options.pipeline, options.dataset, len(data.train), data.num_classes, plan
    )
    plan = Plan(kind, options.batch_size, options.ipc, steps)
    sampler = BatchSampler(
        data.train.labels,
        plan,
        seed=options.seed,
        supers=data.supers,
        pairs=PAIRS.get(options.dataset, PAIRS["sop"]),
        rows=world.rows(options.batch_size),
    )
    transform = train_transform(
        options.trainxform, options.pipeline, options.dataset, options.image_size, options.xform_scale, flip=data.flip
    )
    return TrainBatches(data.train, transform, sampler, world.device, options.workers)


@dataclass
class Judge:
    """Judges parts of the data; embeddings are made by all processes together and ranked in each."""

    options: Options
    data: RetrievalData
    model: Retriever
    world: World

    def part(self, split: str) -> ImageSet:
        """train, valid or test."""
        return {"train": self.data.train, "valid": self.data.valid, "test": self.data.test}[split]

    @torch.no_grad()
    def embeddings(self, images: ImageSet, encode: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """[N, D] on this process's device, in the order of the images. encode: the network unless given."""
        options, rows = self.options, self.world.rows(len(images))
        transform = test_transform(options.testxform, options.pipeline, options.dataset, options.image_size)
        own = images.subset(range(rows.start, rows.stop))
        encode = encode or self.model.net
        found = []
        for pictures, _ in in_order(own, transform, options.batch_size, self.world.device, options.workers):
            with torch.autocast(
                self.world.device.type, dtype=torch.bfloat16, enabled=use_amp(options, self.world.device)
            ):
                found.append(encode(pictures).float())
        return distributed.gather(torch.cat(found))

    def retrieval(
        self, split: str, encode: Callable[[Tensor], Tensor] | None = None, keep: int = 10
    ) -> tuple[Retrieval, Tensor]:
        """Metrics of a part, and its embeddings. test is looked up in the gallery where the data has one."""
        images, options = self.part(split), self.options
        embeddings, labels = self.embeddings(images, encode), torch.from_numpy(images.labels).to(self.world.device)
        references = ()
        if split == "test" and self.data.gallery is not None:
            gallery = self.data.gallery
            references = (self.embeddings(gallery, encode), torch.from_numpy(gallery.labels).to(self.world.device))
        found = retrieve(
            embeddings,
            labels,
            *references,
            ks=cut_offs(options),
            keep=keep,
            whole=bool(options.full_map),
            memory_mib=options.memory_mib,
        )
        return found, embeddings

    def metrics(self, split: str) -> dict[str, float]:
        """The means alone, for selection."""
        distributed.share_buffers(self.model)
        return self.retrieval(split)[0].means


def cut_offs(options: Options) -> tuple[int, ...]:
    """--ks and the cut-off of the metric that selects."""
    cut = options.select_metric.partition("recall@")[2]
    return tuple(sorted({*options.ks, *([int(cut)] if cut else [])}))


def use_amp(options: Options, device: torch.device) -> bool:
    """--amp, by default on CUDA alone."""
    return device.type == "cuda" if options.amp is None else bool(options.amp)


def refit(
    options: Options, data: RetrievalData, world: World, fitted: FitResult, run: Run
) -> tuple[Retriever, RetrievalData]:
    """A model trained anew on all training classes for the selected number of epochs, and that data."""
    whole = whole_data(options)
    seed_everything(options.seed)
    model = build_model(options, whole.num_classes, world.device)
    model.share(sync_batchnorm=syncs_batchnorm(options, world))
    optimizer, scheduler, step = build_training(options, model)
    model = program.refit(
        model,
        optimizer,
        fitted=fitted,
        run=run,
        family="contextual",
        batches=build_batches(options, whole, world),
        loss_fn=model.loss,
        step=step,
        scheduler=scheduler,
        amp=use_amp(options, world.device),
        checkpoint_every=options.checkpoint_every,
        progress=options.progress,
    )
    return model, whole


def whole_data(options: Options) -> RetrievalData:
    """The data with every training class in the training part."""
    changed = Options(**{**vars(options), "select_on": "test"})
    return load_data(changed)


def syncs_batchnorm(options: Options, world: World) -> bool:
    """Whether processes share batch statistics: CUDA alone can."""
    return options.batch_norm == "train" and world.device.type == "cuda"


def load_reported(options: Options, data: RetrievalData, world: World, run: Run) -> tuple[Retriever, RetrievalData]:
    """The model that a run's result is about, in eval mode, and the data it was trained on."""
    data = whole_data(options) if options.refit and run.is_done else data
    quiet = Options(**{**vars(options), "pretrained": 0, "checkpoint": None})
    return program.load_reported(build_model(quiet, data.num_classes, world.device), run.path, done=run.is_done), data


def describe(
    options: Options, data: RetrievalData, model: Retriever, batches: TrainBatches, world: World, run: Run
) -> str:
    """What is about to run, in a few lines."""
    parts = [("train", data.train), ("validation", data.valid), ("test", data.test), ("gallery", data.gallery)]
    sizes = ", ".join(
        f"{name} {len(part):,} of {len(part.classes):,} classes" for name, part in parts if part is not None
    )
    parameters = sum(p.numel() for p in model.net.parameters())
    lines = [f"{data.name}: {sizes}", *(f"note: {note}" for note in data.notes)]
    if options.batch_norm != "train" and not options.pretrained:
        lines.append(
            "note: the batch statistics of an untrained network are frozen, which leaves it without normalisation; --batch-norm train"
        )
    lines += [
        f"{options.backbone}, {'published weights' if options.pretrained else 'from scratch'}, {options.image_size} pixels, "
        f"{options.pooling} pooling, batch norm {options.batch_norm}, {options.embedding_size}-d; {parameters:,} parameters on {world.device}",
        f"loss {model.criterion.describe()}",
    ]
    processes = f" over {world.size} processes" if world.size > 1 else ""
    where = "TEST, the original protocol: optimistic" if options.select_on == "test" else "validation classes"
    lines += [
        f"{len(batches)} steps an epoch of {options.batch_size} pictures{processes}, {options.ipc or 'any number'} per class; seed {options.seed}",
        f"selecting by {options.select_metric} on {where}",
        f"run directory {run.path}",
    ]
    return "\n".join(lines)
