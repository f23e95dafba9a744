"""What a retrieval run is made of: network, loss, optimizer and batches of classes, and how a part of the data is judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contextual import data as datasets
from contextual.baselines import LossOptions, build_loss, parameter_groups
from contextual.data import RetrievalData
from contextual.names import describe_lam
from contextual.network import EmbeddingNet, Projector, build_backbone
from contextual.samplers import PAIRS, BatchSampler, Plan, check_single_images, default_batches
from contextual.settings import ContextualSettings
from contextual.transforms import TrainBatches, in_order, test_transform, train_transform
from gfml.base.checkpoints import damaged, load_state
from gfml.data.images import ImageSet
from gfml.engine import distributed
from gfml.engine.runs import Run, seed_everything
from gfml.engine.train import Closure, FitResult, Step, Terms
from gfml.metrics.retrieval import Retrieval, by_class, nmi, retrieve
from gfml.program.experiment import Experiment, Judged, Training
from gfml.program.steps import build_step
from gfml.report.recommenders import text_table

NMI_UP_TO = 20_000
# How the baselines of --baselines are called in results.
NAMES = {"pixels": "pixels", "start": "starting network"}


class Contextual(Experiment):
    """Pictures of some classes, embedded so that neighbours are of one class; classes of test are never trained on."""

    judged_by_all = True
    settings: ContextualSettings
    data: RetrievalData

    @classmethod
    def load(cls, settings: ContextualSettings) -> RetrievalData:
        """The data with its validation classes held out, unless selection is on test."""
        s = settings
        data = datasets.load(
            s.dataset, s.root, split_lists=s.split_lists, split_seed=s.split_seed, check_counts=bool(s.check_counts)
        )
        if s.skip_bad_images:
            data = datasets.without_unreadable(data)
        if s.single_images == "drop":
            data = datasets.without_singles(data)
        elif s.single_images == "error" and s.ipc:
            check_single_images(data.train.labels, data.train.classes)
        return data if s.select_on == "test" else datasets.hold_out(data, s.val_share, s.split_seed)

    def whole(self) -> Self:
        """Every training class in the training part."""
        data = self.load(replace(self.settings, select_on="test"))
        return type(self)(self.settings, data, self.world)

    @property
    def label(self) -> str:
        return f"{self.data.name}-{self.settings.loss}"

    @property
    def use_amp(self) -> bool:
        """--amp, by default on CUDA alone."""
        s = self.settings
        return self.device.type == "cuda" if s.amp is None else bool(s.amp)

    # -- building and training

    def build(self, *, start: bool = True) -> Retriever:
        """``--checkpoint`` weights are loaded into the network."""
        s = self.settings
        backbone, channels = build_backbone(
            s.backbone, pretrained=bool(s.pretrained) and start, image_size=s.image_size,
            own_pooling=s.pooling == "backbone", width=s.width,
        )  # fmt: skip
        net = EmbeddingNet(
            backbone, channels, s.embedding_size, pooling=s.pooling, layer_norm=bool(s.layer_norm),
            kaiming=s.pipeline == "224", batch_norm=s.batch_norm,
        )  # fmt: skip
        linear = s.bottleneck == "linear"
        projector = Projector(s.embedding_size, s.train_embedding) if linear else None
        criterion = build_loss(
            s.loss, num_classes=self.data.num_classes, embedding_dim=s.train_embedding if linear else s.embedding_size,
            pipeline=s.pipeline, options=loss_options(s),
        )  # fmt: skip
        model = Retriever(net, projector, criterion)
        if s.checkpoint is not None and start:
            _start_from(model, Path(s.checkpoint))
        return model.to(self.device, memory_format=torch.channels_last)

    def training(self, model: Retriever) -> Training:
        """256: the head has lr, the backbone lr / 2, proxies a constant rate. 224: the backbone has lr, the head the same,
        the projector twice, proxies 100 times."""
        s, large = self.settings, self.settings.pipeline == "256"
        # Processes share batch statistics where they can: on CUDA alone.
        model.share(sync_batchnorm=s.batch_norm == "train" and self.device.type == "cuda")
        base = s.lr / s.embedding_lr_multi if large else s.lr
        groups = [
            {"params": [p for p in model.net.backbone.parameters() if p.requires_grad], "lr": base},
            {"params": list(model.net.head.parameters()), "lr": base * s.embedding_lr_multi},
        ]
        if len(model.encoder) > 1:
            groups.append({"params": list(model.encoder[1].parameters()), "lr": s.lr * s.projector_lr_multi})
        scheduled = len(groups)
        own = parameter_groups(model.criterion, pipeline=s.pipeline, lr=s.lr, loss_lr=s.loss_lr)
        groups += [{key: value for key, value in group.items() if key != "name"} for group in own]
        kind = torch.optim.AdamW if s.optimizer == "adamw" else torch.optim.Adam
        optimizer = kind(groups, lr=s.lr, weight_decay=s.weight_decay)
        falling = lr_factor(s)
        factors: list[Callable[[int], float]] = [
            falling if number < scheduled or not large else lambda epoch: 1.0 for number in range(len(groups))
        ]
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
        step = WarmStep(build_step(s, optimizer), optimizer, groups[0]["params"], s.warm)
        return Training(optimizer, self.batches(), model.loss, step, scheduler, amp=self.use_amp)

    def batches(self) -> TrainBatches:
        """Batches of the training part; each process reads its rows of every batch."""
        s, data = self.settings, self.data
        kind = "halves" if s.hierarchical else "classes" if s.ipc else "shuffle"
        plan = Plan(kind, s.batch_size, s.ipc)
        steps = s.batches_per_epoch or default_batches(s.pipeline, s.dataset, len(data.train), data.num_classes, plan)
        sampler = BatchSampler(
            data.train.labels, Plan(kind, s.batch_size, s.ipc, steps), seed=s.seed, supers=data.supers,
            pairs=PAIRS.get(s.dataset, PAIRS["sop"]), rows=self.world.rows(s.batch_size),
        )  # fmt: skip
        transform = train_transform(s.trainxform, s.pipeline, s.dataset, s.image_size, s.xform_scale, flip=data.flip)
        return TrainBatches(data.train, transform, sampler, self.device, s.workers)

    # -- judging: embeddings are made by all processes together and ranked in each

    def part(self, split: str) -> ImageSet:
        """train, valid or test."""
        return {"train": self.data.train, "valid": self.data.valid, "test": self.data.test}[split]

    @torch.no_grad()
    def embeddings(self, encode: Callable[[Tensor], Tensor], images: ImageSet) -> Tensor:
        """[N, D] on this process's device, in the order of the images."""
        s, rows = self.settings, self.world.rows(len(images))
        transform = test_transform(s.testxform, s.pipeline, s.dataset, s.image_size)
        own = images.subset(range(rows.start, rows.stop))
        found = []
        for pictures, _ in in_order(own, transform, s.batch_size, self.device, s.workers):
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.use_amp):
                found.append(encode(pictures).float())
        return distributed.gather(torch.cat(found))

    def retrieval(self, encode: Callable[[Tensor], Tensor], split: str, keep: int = 10) -> tuple[Retrieval, Tensor]:
        """Metrics of a part, and its embeddings. test is looked up in the gallery where the data has one."""
        s, images = self.settings, self.part(split)
        embeddings, labels = self.embeddings(encode, images), torch.from_numpy(images.labels).to(self.device)
        references = ()
        if split == "test" and self.data.gallery is not None:
            gallery = self.data.gallery
            references = (self.embeddings(encode, gallery), torch.from_numpy(gallery.labels).to(self.device))
        found = retrieve(
            embeddings, labels, *references, ks=cut_offs(s), keep=keep, whole=bool(s.full_map), memory_mib=s.memory_mib
        )
        return found, embeddings

    def evaluate(self, model: Retriever, split: str) -> Mapping[str, float]:
        distributed.share_buffers(model)
        return self.retrieval(model.net, split)[0].means

    def judge(self, model: Retriever, fitted: FitResult | None, run: Run) -> Judged:
        s, data = self.settings, self.data
        found, embeddings = self.retrieval(model.net, "test")
        result: dict[str, Any] = {
            "model": f"{s.backbone} {s.loss}", "pipeline": s.pipeline, "data": facts(data),
            "loss": model.criterion.describe(), "test": found.means, "unmatched_queries": found.unmatched,
            "per_class": per_class(found, data), "baselines": self.baselines(),
        }  # fmt: skip
        if s.loss == "hybrid":
            result["lam"] = describe_lam(s.lam_convention)
        if s.nmi or (s.nmi is None and len(data.test) <= NMI_UP_TO):
            result["test"]["nmi"] = nmi(embeddings.float(), torch.from_numpy(data.test.labels), seed=s.seed)
        if data.valid is not None and not s.refit:
            result["val"] = self.retrieval(model.net, "valid")[0].means
        if s.judge_train:
            result["train"] = self.retrieval(model.net, "train")[0].means
        arrays = {f"per_query/{name}": values.astype(np.float32) for name, values in found.per_query.items()}
        arrays |= {"labels": data.test.labels, "neighbours": found.neighbours.astype(np.int32), "right": found.right}
        return Judged(result, arrays, found)

    def baselines(self) -> dict[str, Any]:
        """Test by the centred pixels of the pictures, made 16 x 16, and by the pooled features of the starting network."""
        makers: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
            "pixels": lambda: small_pixels, "start": self.starting_features,
        }  # fmt: skip
        chosen = [name for name in makers if name in self.settings.baselines]
        return {NAMES[name]: {"test": self.retrieval(makers[name](), "test")[0].means} for name in chosen}

    def starting_features(self) -> Callable[[Tensor], Tensor]:
        """The pooled features of the network as it was before training."""
        seed_everything(self.settings.seed)
        net = self.build().net.eval()
        return lambda pictures: net.pool(net.backbone(pictures))

    # -- words

    def page(self, run: Run, judged: Judged) -> Path | None:
        """With ``--pictures`` queries; none with 0."""
        if not self.settings.pictures or not self.world.is_main:
            return None
        from contextual.report import write_page

        s = self.settings
        return write_page(run, self.data, judged.result, judged.detail, queries=s.pictures, seed=s.seed)

    redrawn = True

    def data_lines(self) -> list[str]:
        data = self.data
        parts = [("train", data.train), ("validation", data.valid), ("test", data.test), ("gallery", data.gallery)]
        sizes = ", ".join(
            f"{name} {len(part):,} of {len(part.classes):,} classes" for name, part in parts if part is not None
        )
        return [f"{data.name}: {sizes}", *(f"note: {note}" for note in data.notes)]

    def describe(self, model: Retriever) -> list[str]:
        s, lines = self.settings, []
        if s.batch_norm != "train" and not s.pretrained:
            lines.append(
                "note: the batch statistics of an untrained network are frozen, which leaves it without normalisation; --batch-norm train"
            )
        start = "published weights" if s.pretrained else "from scratch"
        return [
            *lines,
            f"{s.backbone}, {start}, {s.image_size} pixels, {s.pooling} pooling, batch norm {s.batch_norm}, {s.embedding_size}-d",
            f"loss {model.criterion.describe()}",
            f"batches of {s.batch_size} pictures, {s.ipc or 'any number'} per class",
        ]

    @classmethod
    def result_text(cls, result: Mapping[str, Any]) -> str:
        rows = {f"{result['model']}, test": result["test"]}
        rows |= {f"{result['model']}, {part}": result[part] for part in ("val", "train") if part in result}
        rows |= {f"{name}, test": found["test"] for name, found in result["baselines"].items()}
        selection, lost = result["selection"], result["unmatched_queries"]
        lines = [
            f"\n{result['data']['name']}, epoch {selection['epoch']}, {selection['protocol']}",
            f"loss {result['loss']}",
            text_table(rows, list(result["test"])),
        ]
        if lost:
            lines.append(f"{lost} queries have no match; they count as misses in recall and are left out of the rest")
        return "\n".join(lines)


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


def loss_options(options: ContextualSettings) -> LossOptions:
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
    """The network's weights of an earlier run; its projector and proxies are for other classes and stay behind."""
    prefix = "encoder.0."
    saved = {
        key.removeprefix(prefix): value for key, value in load_state(path)["model"].items() if key.startswith(prefix)
    }
    try:
        model.net.load_state_dict(saved)
    except RuntimeError as error:
        raise damaged(path, f"of another network: {str(error).splitlines()[0]}") from error


class WarmStep:
    """Another step, but in the first ``epochs`` epochs the held parameters keep still."""

    def __init__(self, inner: Step, optimizer: torch.optim.Optimizer, held: list[nn.Parameter], epochs: int) -> None:
        self.inner, self.held, self.epochs, self.epoch = inner, held, epochs, 0
        optimizer.register_step_pre_hook(self._hold)

    def _hold(self, *_: object) -> None:
        # Without a gradient an optimizer passes a parameter over: no step, no decay, no moments.
        if self.epoch <= self.epochs:
            for parameter in self.held:
                parameter.grad = None

    def new_epoch(self) -> None:
        """Count an epoch."""
        self.epoch += 1
        if hasattr(self.inner, "new_epoch"):
            self.inner.new_epoch()

    def __call__(self, closure: Closure, optimizer: torch.optim.Optimizer) -> Terms:
        return self.inner(closure, optimizer)

    def state_dict(self) -> dict[str, Any]:
        inner = {"inner": self.inner.state_dict()} if hasattr(self.inner, "state_dict") else {}
        return {"epoch": self.epoch, **inner}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch = state["epoch"]
        if "inner" in state:
            self.inner.load_state_dict(state["inner"])


def lr_factor(options: ContextualSettings) -> Callable[[int], float]:
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


def cut_offs(options: ContextualSettings) -> tuple[int, ...]:
    """--ks and the cut-off of the metric that selects."""
    cut = options.select_metric.partition("recall@")[2]
    return tuple(sorted({*options.ks, *([int(cut)] if cut else [])}))


def facts(data: RetrievalData) -> dict[str, Any]:
    """Name, sizes, fingerprint and notes of the data."""
    parts = {"train": data.train, "valid": data.valid, "test": data.test, "gallery": data.gallery}
    sizes = {
        name: {"images": len(part), "classes": len(part.classes)} for name, part in parts.items() if part is not None
    }
    return {"name": data.name, "fingerprint": data.fingerprint, "notes": list(data.notes), **sizes}


def per_class(found: Retrieval, data: RetrievalData) -> list[dict[str, Any]]:
    """The classes of test, hardest first, by name; values that do not exist are None."""
    rows = by_class(found, data.test.labels)
    return [
        {
            name: data.test.classes[value] if name == "class" else None if value != value else value
            for name, value in row.items()
        }
        for row in rows
    ]


def small_pixels(pictures: Tensor) -> Tensor:
    """[B, 3, H, W] -> [B, 768]: the picture at 16 x 16, its mean taken out."""
    small = F.adaptive_avg_pool2d(pictures, 16).flatten(1)
    return small - small.mean(dim=1, keepdim=True)
