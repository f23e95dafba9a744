"""What a retrieval run is made of: network, loss and batches by class, and how a part of the data is judged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contextual import data as datasets
from contextual.baselines import LossOptions, build_loss, parameter_groups
from contextual.data import RetrievalData
from contextual.foreign import contextual
from contextual.names import describe_lam
from contextual.network import EmbeddingNet, Projector, build_backbone
from contextual.samplers import PAIRS, BatchSampler, Plan, check_single_images, default_batches
from contextual.settings import ContextualSettings
from contextual.transforms import TrainBatches, in_order, test_transform, train_transform
from gfml.base.errors import UserError
from gfml.base.files import atomic_open, read_arrays
from gfml.base.optim import light
from gfml.base.weights import read_weights
from gfml.data.images import ArrayPictures, ImageSet
from gfml.engine import distributed
from gfml.engine.runs import Run, seed_everything
from gfml.engine.train import Closure, FitResult, Step, Terms
from gfml.metrics.retrieval import Retrieval, by_class, nmi, retrieve
from gfml.program.cli import resolve_device
from gfml.program.experiment import Experiment, Judged, Training
from gfml.program.foreign import load_named
from gfml.program.steps import build_step
from gfml.report.recommenders import text_table

NMI_UP_TO = 20_000
# How the baselines of --baselines are called in results.
NAMES = {"pixels": "pixels", "start": "starting network"}


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


class Retrieve(Experiment):
    """One network that maps pictures to unit vectors; classes of test are no classes of train."""

    judged_by_all = True
    # Pictures of what no file of the run holds are drawn of this judgement.
    redrawn = True
    settings: ContextualSettings
    data: RetrievalData

    @classmethod
    def load(cls, settings: ContextualSettings) -> RetrievalData:
        """The data with its validation classes held out, unless selection is on test."""
        data = datasets.load(
            settings.dataset, settings.root, split_lists=settings.split_lists, split_seed=settings.split_seed,
            check_counts=bool(settings.check_counts),
        )  # fmt: skip
        if settings.skip_bad_images:
            data = datasets.without_unreadable(data)
        if settings.single_images == "drop":
            data = datasets.without_singles(data)
        elif settings.single_images == "error" and settings.ipc:
            check_single_images(data.train.labels, data.train.classes)
        data = datasets.require_matches(data)
        if settings.frozen:
            data = with_features(data, settings)
        return (
            data if settings.select_on == "test" else datasets.hold_out(data, settings.val_share, settings.split_seed)
        )

    def whole(self) -> Self:
        """The same with every training class in the training part."""
        return type(self)(self.settings, self.load(replace(self.settings, select_on="test")), self.world)

    # -- model

    def check(self) -> None:
        """A --checkpoint that is there must fit the network."""
        if self.settings.checkpoint is not None and Path(self.settings.checkpoint).is_file():
            self.build()

    def build(self, *, start: bool = True) -> Retriever:
        return self._build(self.data.num_classes, start=start)

    def _build(self, num_classes: int, *, start: bool = True) -> Retriever:
        """Network, projector and loss as the flags say; ``--checkpoint`` weights are loaded into the network."""
        s = self.settings
        if s.frozen:
            backbone, channels = nn.Flatten(), self.data.train.image(0).shape[-1]
        else:
            backbone, channels = starting_backbone(s, start=start)
        net = EmbeddingNet(
            backbone, channels, s.embedding_size, pooling="backbone" if s.frozen else s.pooling, layer_norm=bool(s.layer_norm),
            kaiming=s.pipeline == "224", batch_norm=s.batch_norm,
        )  # fmt: skip
        linear = s.bottleneck == "linear"
        projector = Projector(s.embedding_size, s.train_embedding) if linear else None
        width = s.train_embedding if linear else s.embedding_size
        options = LossOptions(**{one.name: getattr(s, one.name) for one in fields(LossOptions)})
        criterion = build_loss(
            s.loss, num_classes=num_classes, embedding_dim=width, pipeline=s.pipeline, options=options
        )
        model = Retriever(net, projector, criterion)
        if s.checkpoint is not None and start:
            _start_from(model, Path(s.checkpoint))
        return model.to(self.device, memory_format=torch.channels_last)

    def adopt(self, state: Mapping[str, Tensor], origin: object) -> Retriever:
        model = self.build(start=False)
        load_named(model.net, state, origin)
        return model.eval()

    def training(self, model: Retriever) -> Training:
        """256: the head has lr, the backbone lr / 2, proxies a constant rate. 224: the backbone has lr, the head the same,
        the projector twice, proxies 100 times."""
        s = self.settings
        # Processes share batch statistics on CUDA: nothing else can.
        model.share(sync_batchnorm=s.batch_norm == "train" and self.device.type == "cuda")
        large = s.pipeline == "256"
        base = s.lr / s.embedding_lr_multi if large else s.lr
        groups = [
            {"params": [p for p in model.net.backbone.parameters() if p.requires_grad], "lr": base},
            {"params": list(model.net.head.parameters()), "lr": base * s.embedding_lr_multi},
        ]
        if len(model.encoder) > 1:
            groups.append({"params": list(model.encoder[1].parameters()), "lr": s.lr * s.projector_lr_multi})
        scheduled = len(groups)
        proxies = parameter_groups(model.criterion, pipeline=s.pipeline, lr=s.lr, loss_lr=s.loss_lr)
        groups += [{key: value for key, value in group.items() if key != "name"} for group in proxies]
        kind = torch.optim.AdamW if s.optimizer == "adamw" else torch.optim.Adam
        # Fused on CUDA, where its count of steps stays on the device.
        optimizer = light(kind)(groups, lr=s.lr, weight_decay=s.weight_decay, fused=self.device.type != "cpu")
        falling = lr_factor(s)
        factors: list[Callable[[int], float]] = [
            falling if number < scheduled or not large else lambda epoch: 1.0 for number in range(len(groups))
        ]
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
        step: Step = WarmStep(groups[0]["params"], s.warm) if s.mirror == "off" else build_step(s, optimizer)
        return Training(optimizer, self.batches(), model.loss, step, scheduler=scheduler, amp=self._amp)

    def batches(self) -> TrainBatches:
        """Batches of the training part; each process reads its rows of every batch."""
        s, data = self.settings, self.data
        sampler = BatchSampler(
            data.train.labels, self._plan(), seed=s.seed, supers=data.supers,
            pairs=PAIRS.get(s.dataset, PAIRS["sop"]), rows=self.world.rows(s.batch_size),
        )  # fmt: skip
        transform = train_transform(s.trainxform, s.pipeline, s.dataset, s.image_size, s.xform_scale, flip=data.flip)
        transform = unchanged if s.frozen else transform
        return TrainBatches(data.train, transform, sampler, self.device, s.workers)

    def _plan(self) -> Plan:
        s = self.settings
        kind = "halves" if s.hierarchical else "classes" if s.ipc else "shuffle"
        plan = Plan(kind, s.batch_size, s.ipc)
        steps = s.batches_per_epoch or default_batches(
            s.pipeline, s.dataset, len(self.data.train), self.data.num_classes, plan
        )
        return Plan(kind, s.batch_size, s.ipc, steps)

    @property
    def _amp(self) -> bool:
        """--amp, by default on CUDA alone."""
        return self.device.type == "cuda" if self.settings.amp is None else bool(self.settings.amp)

    # -- judging

    def part(self, split: str) -> ImageSet:
        """train, valid or test."""
        return {"train": self.data.train, "valid": self.data.valid, "test": self.data.test}[split]

    @torch.no_grad()
    def embeddings(self, images: ImageSet, encode: Callable[[Tensor], Tensor]) -> Tensor:
        """[N, D] on this process's device, in the order of the images, made by all processes together."""
        s, rows = self.settings, self.world.rows(len(images))
        transform = unchanged if s.frozen else test_transform(s.testxform, s.pipeline, s.dataset, s.image_size)
        own = images.subset(range(rows.start, rows.stop))
        found = []
        for pictures, _ in in_order(own, transform, s.batch_size, self.device, s.workers):
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._amp):
                found.append(encode(pictures).float())
        return distributed.gather(torch.cat(found))

    def retrieval(self, split: str, encode: Callable[[Tensor], Tensor], keep: int = 10) -> tuple[Retrieval, Tensor]:
        """Metrics of a part, and its embeddings. test is looked up in the gallery where the data has one."""
        images, s = self.part(split), self.settings
        embeddings, labels = self.embeddings(images, encode), torch.from_numpy(images.labels).to(self.device)
        references = ()
        if split == "test" and self.data.gallery is not None:
            gallery = self.data.gallery
            references = (self.embeddings(gallery, encode), torch.from_numpy(gallery.labels).to(self.device))
        found = retrieve(
            embeddings, labels, *references, ks=cut_offs(s), keep=keep, whole=bool(s.full_map), memory_mib=s.memory_mib
        )
        return found, embeddings

    def evaluate(self, model: Retriever, split: str) -> Mapping[str, float]:
        distributed.share_buffers(model)
        return self.retrieval(split, model.net)[0].means

    def judge(self, model: Retriever, fitted: FitResult | None, run: Run | None) -> Judged:
        s, data = self.settings, self.data
        found, embeddings = self.retrieval("test", model.net)
        result: dict[str, Any] = {
            "model": f"{s.backbone} {s.loss}", "pipeline": s.pipeline, "data": facts(data),
            "loss": model.criterion.describe(), "test": found.means, "unmatched_queries": found.unmatched,
            "per_class": per_class(found, data), "baselines": self._baselines(),
        }  # fmt: skip
        if s.loss == "hybrid":
            result["lam"] = describe_lam(s.lam_convention)
        if s.nmi or (s.nmi is None and len(data.test) <= NMI_UP_TO):
            result["test"]["nmi"] = nmi(embeddings.float(), torch.from_numpy(data.test.labels), seed=s.seed)
        if data.valid is not None and not s.refit:
            result["val"] = self.retrieval("valid", model.net)[0].means
        if s.judge_train:
            result["train"] = self.retrieval("train", model.net)[0].means
        arrays = {f"per_query/{name}": values.astype(np.float32) for name, values in found.per_query.items()}
        arrays |= {"labels": data.test.labels, "neighbours": found.neighbours.astype(np.int32), "right": found.right}
        return Judged(result, arrays, found)

    def _baselines(self) -> dict[str, Any]:
        """Test by the centred pixels of the test pictures, made 16 x 16, and by the pooled features of the starting network."""
        makers: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
            "pixels": lambda: small_pixels, "start": self._starting_features,
        }  # fmt: skip
        chosen = [name for name in makers if name in self.settings.baselines]
        names = NAMES | ({"start": "frozen features"} if self.settings.frozen else {})
        return {names[name]: {"test": self.retrieval("test", makers[name]())[0].means} for name in chosen}

    def _starting_features(self) -> Callable[[Tensor], Tensor]:
        """The pooled features of the network as it was before training."""
        seed_everything(self.settings.seed)
        net = self._build(2).net.eval()
        return lambda pictures: net.pool(net.backbone(pictures))

    def page(self, run: Run, judged: Judged) -> Path | None:
        """The page with ``--pictures`` queries; none with 0."""
        from contextual.report import write_page

        s = self.settings
        if not s.pictures:
            return None
        return write_page(run, self.data, judged.detail, queries=s.pictures, seed=s.seed)

    # -- words

    @property
    def label(self) -> str:
        return f"{self.data.name}-{self.settings.loss}"

    def data_lines(self) -> list[str]:
        data = self.data
        return [f"{data.name}: {data.sizes}", *(f"note: {note}" for note in data.notes)]

    def describe(self, model: Retriever) -> list[str]:
        s = self.settings
        frozen = (
            "note: the batch statistics of an untrained network are frozen, which leaves it without normalisation; "
            "--batch-norm train"
        )
        weights = "published weights" if s.pretrained else "from scratch"
        return [
            *([frozen] if s.batch_norm != "train" and not s.pretrained else []),
            f"{s.backbone}, {weights}, {s.image_size} pixels, {s.pooling} pooling, batch norm {s.batch_norm}, {s.embedding_size}-d",
            f"loss {model.criterion.describe()}",
            f"{len(self.batches())} steps an epoch of {s.batch_size} pictures, {s.ipc or 'any number'} per class",
        ]

    @classmethod
    def text(cls, settings: Any, results: list[tuple[Mapping[str, Any], Path]]) -> str:
        (result, _), *_rest = results
        rows = {f"{result['model']}, test": result["test"]}
        rows |= {f"{result['model']}, {part}": result[part] for part in ("val", "train") if part in result}
        rows |= {f"{name}, test": found["test"] for name, found in result["baselines"].items()}
        selection, missed = result["selection"], result["unmatched_queries"]
        lines = [f"\n{result['data']['name']}, epoch {selection['epoch']}, {selection['protocol']}"]
        lines += [f"loss {result['loss']}", text_table(rows, list(result["test"]))]
        if missed:
            lines.append(f"{missed} queries have no match; they count as misses in recall and are left out of the rest")
        return "\n".join(lines)


def _start_from(model: Retriever, path: Path) -> None:
    """The network's weights of an earlier run, or of the published programs' files; projector and proxies stay behind."""
    state, prefix = read_weights(path), "encoder.0."
    saved = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if not saved:
        saved = dict(state) if "head.weight" in state else contextual(state)
    try:
        model.net.load_state_dict(saved)
    except RuntimeError as error:
        why = str(error).splitlines()[1 if "\n" in str(error) else 0].strip()
        raise UserError(
            f"cannot use the checkpoint {path}, of another network ({why}): give its --backbone, --pooling and --embedding_size"
        ) from error


def starting_backbone(s: ContextualSettings, *, start: bool = True) -> tuple[nn.Module, int]:
    """The backbone of the flags and its channels; start False: weights will follow."""
    return build_backbone(
        s.backbone, pretrained=bool(s.pretrained) and start, image_size=s.image_size,
        own_pooling=s.pooling == "backbone", width=s.width,
    )  # fmt: skip


class FeatureRows(ArrayPictures):
    """Features in the place of pictures: float32 [N, 1, 1, C]."""

    def __init__(self, array: np.ndarray, source: str) -> None:
        self.array, self.source = array, source

    def take(self, indices: np.ndarray) -> FeatureRows:
        return FeatureRows(self.array[indices], self.source)


def unchanged(features: Tensor) -> Tensor:
    """Features [C, 1, 1] as they are."""
    return features


def with_features(data: RetrievalData, s: ContextualSettings) -> RetrievalData:
    """The data with every picture replaced by the pooled features [1, 1, C] of the starting network; kept below ``--out``.

    A network from scratch is drawn by ``--seed``.
    """
    how = [
        s.backbone,
        s.pretrained,
        s.image_size,
        s.pooling,
        s.testxform,
        s.pipeline,
        s.width,
        0 if s.pretrained else s.seed,
    ]
    name = hashlib.sha256(json.dumps([data.fingerprint, how]).encode()).hexdigest()[:16]
    file = Path(s.out) / "features" / f"{name}.npz"
    parts = {part: images for part in ("train", "test", "gallery") if (images := getattr(data, part)) is not None}
    if file.exists():
        made = read_arrays(file, f"delete {file}")
    else:
        made = {part: _pooled(images, s) for part, images in parts.items()}
        with atomic_open(file, "wb") as stream:
            np.savez(stream, **made)
    found = {
        part: replace(images, pictures=FeatureRows(made[part], f"features of {data.name}"))
        for part, images in parts.items()
    }
    return replace(data, **found)


@torch.no_grad()
def _pooled(images: ImageSet, s: ContextualSettings) -> np.ndarray:
    seed_everything(s.seed)
    backbone, channels = starting_backbone(s)
    net = EmbeddingNet(backbone, channels, 1, pooling=s.pooling).to(resolve_device(s)).eval()
    transform = test_transform(s.testxform, s.pipeline, s.dataset, s.image_size)
    batches = in_order(images, transform, s.batch_size, next(net.parameters()).device, s.workers)
    rows = [net.pool(net.backbone(pictures)).float().cpu() for pictures, _ in batches]
    return torch.cat(rows).numpy()[:, None, None, :]


class WarmStep:
    """The ordinary step, but in the first ``epochs`` epochs the held parameters keep still."""

    def __init__(self, held: list[nn.Parameter], epochs: int) -> None:
        self.held, self.epochs, self.epoch = held, epochs, 0

    def new_epoch(self) -> None:
        """Count an epoch."""
        self.epoch += 1

    def graph_key(self) -> bool:
        """Whether the held parameters keep still (:mod:`gfml.engine.capture`)."""
        return self.epoch <= self.epochs

    def __call__(self, closure: Closure, optimizer: torch.optim.Optimizer) -> Terms:
        optimizer.zero_grad(set_to_none=True)
        terms = closure()
        terms["loss"].backward()
        values = {key: value.detach().clone() if isinstance(value, Tensor) else value for key, value in terms.items()}
        if self.graph_key():
            # Without a gradient an optimizer passes a parameter over: no step, no decay, no moments.
            for parameter in self.held:
                parameter.grad = None
        optimizer.step()
        return values

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch = state["epoch"]


def lr_factor(settings: ContextualSettings) -> Callable[[int], float]:
    """Factor of the learning rate after so many epochs: --lr-decay-gamma to the number of falls so far."""

    def factor(epoch: int) -> float:
        done = epoch + settings.start_epoch
        falls = (
            done // settings.lr_decay_step
            if settings.lr_decay_step
            else sum(milestone <= done for milestone in settings.milestones)
        )
        return settings.lr_decay_gamma**falls

    return factor


def cut_offs(settings: ContextualSettings) -> tuple[int, ...]:
    """--ks and the cut-off of the metric that selects."""
    cut = settings.select_metric.partition("recall@")[2]
    return tuple(sorted({*settings.ks, *([int(cut)] if cut else [])}))


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
