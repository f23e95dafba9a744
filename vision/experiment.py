"""From flags to objects: model, optimizer, schedule, loss, predictions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gfml.attention import AttentionSettings, parameter_groups
from gfml.base.errors import UserError
from gfml.data.images import ImageSet
from gfml.engine import distributed
from gfml.engine.distributed import World
from gfml.engine.runs import Run
from gfml.engine.train import Closure, Step, Terms, WeightAverage
from gfml.longtail import class_loss, deferred_weights, rank_groups, shot_groups, use_cosine_head
from gfml.metrics.classification import calibration_error, classification_metrics
from gfml.program import steps as program
from gfml.program.cli import Options
from gfml.program.steps import build_step
from vision.augment import normalize
from vision.data import Batch, TrainBatches, VisionData, augmentation, class_weights
from vision.models import build_model as network
from vision.vit import ViTSettings

LOSS_NAMES = {"class-balanced": "cb", "ldam-drw": "ldam"}
# The published cosine falls over this many epochs, however many are trained.
ORIGINAL_COSINE = 200


def build_model(options: Options, data: VisionData, device: torch.device) -> nn.Module:
    """The network of ``--model-name`` with fresh weights."""
    vit = ViTSettings(
        patch=options.patch, hidden=options.hidden, mlp_hidden=options.mlp_hidden, num_layers=options.num_layers,
        num_heads=options.head, dropout=options.dropout, cls_token=not options.off_cls_token, mass_pos=options.mass_pos,
    )  # fmt: skip
    model = network(
        options.model_name,
        num_classes=data.num_classes,
        image_size=data.image_size,
        vit=vit,
        attention=attention_settings(options),
        stem=options.stem,
    )
    if options.long_tail.startswith("ldam"):
        use_cosine_head(model, data.num_classes)
    return model.to(device)


def attention_settings(options: Options) -> AttentionSettings:
    """The gravity flags as settings of a layer."""
    return AttentionSettings(
        lamb=options.lamb_gra, learn_lamb=bool(options.learn_lamb), distance=options.dist_mode,
        mix=options.mix_mode if options.mix_on else "off", lamb_mix=options.lamb_mix, num_split=options.num_split,
        split_mix=bool(options.split_mix), mass=options.mass_from, mass_param=options.mass_param, mass_init=options.mass_init,
        per_head=options.mass_share == "per_head", query_mass=bool(options.query_mass), mass_combine=options.mass_combine,
        scale=options.gra_scale, dot_scale=options.dot_scale, head_order=options.head_order, kernel=options.attn_kernel,
    )  # fmt: skip


# -- loss


class Objective(nn.Module):
    """The loss of a batch: {"loss", "accuracy"}.

    Of mixed images the loss is keep L(y) + (1 - keep) L(y'), the accuracy alike. Smoothing eps gives 1 - eps to the
    label and eps / (C - 1) to each other class, which is the library's uniform smoothing with eps C / (C - 1).
    With several processes terms carry the batch's share, so that their mean over processes is that of all images.
    """

    def __init__(self, options: Options, counts: np.ndarray) -> None:
        super().__init__()
        self.counts, self.epochs = counts, options.epochs
        eps = options.smoothing if options.label_smoothing else 0.0
        try:
            self.loss = class_loss(
                LOSS_NAMES.get(options.long_tail, options.long_tail), counts, smoothing=eps * len(counts) / (len(counts) - 1),
                beta=options.cb_beta, tau=options.tau, gamma=options.gamma, max_margin=options.ldam_margin,
                scale=options.ldam_scale,
            )  # fmt: skip
        except ValueError as error:
            raise UserError(
                f"--long-tail {options.long_tail}: {error}: raise --imb-factor, or give another loss"
            ) from None
        self.weighted = options.long_tail in ("class-balanced", "ldam-drw")
        self.deferred = options.long_tail == "ldam-drw"
        self.first_deferred, self.beta = math.floor(options.drw_start * options.epochs) + 1, options.cb_beta

    def new_epoch(self, epoch: int) -> None:
        """Deferred weights begin after their share of the epochs."""
        if self.deferred:
            self.loss.reweigh(deferred_weights(self.counts, epoch, self.first_deferred, self.beta))

    def terms(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Of logits [B, C]."""
        logits = logits.float()
        answers = logits.detach().argmax(-1)

        def both(measure: Callable[[Tensor], Tensor]) -> Tensor:
            own = measure(batch.labels)
            return own if batch.keep == 1 else batch.keep * own + (1 - batch.keep) * measure(batch.others)

        return {
            "loss": self._share(batch) * both(lambda labels: self.loss(logits, labels)),
            "accuracy": batch.share * both(lambda labels: (answers == labels).float().mean()),
        }

    def _share(self, batch: Batch) -> Tensor | float:
        """Weight of this process's mean loss: by numbers of images, of a weighted loss by the sums of their weights."""
        if not self.weighted or distributed.world_size() == 1:
            return batch.share
        own = self.loss.weight[batch.labels].sum()
        return own * distributed.world_size() / distributed.sum_over(own)


# -- training


class Training:
    """Everything that ``fit`` is given beside the model: optimizer, step with its schedule, averages, batches, loss."""

    def __init__(self, options: Options, data: VisionData, model: nn.Module, world: World) -> None:
        self.world = world
        net = distributed.wrap(model, sync_batchnorm=world.device.type == "cuda")
        self.net = torch.compile(net) if options.compile else net
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[options.optimizer]
        self.optimizer = kind(
            parameter_groups(model, options.weight_decay),
            lr=options.lr,
            betas=(options.beta1, options.beta2),
            fused=True,
        )
        self.sampler = TrainBatches(
            data, augmentation(options, data), batch_size=options.batch_size, seed=options.seed, world=world,
            weights=class_weights(options.sampler, data.counts), workers=options.num_workers, most=1 if options.dry_run else None,
        )  # fmt: skip
        self.schedule = Schedule(options, self.sampler.num_batches)
        self.step = ScheduledStep(build_step(options, self.optimizer, options.clip_grad), self.schedule)
        self.ema = WeightAverage(model.parameters(), options.ema) if options.ema else None
        self.objective = Objective(options, data.counts).to(world.device)
        self.amp = uses_amp(options, world.device)

    def batches(self, epoch: int) -> Iterable[Batch]:
        """The batches of an epoch, and the loss made ready for it."""
        self.objective.new_epoch(epoch)
        return self.sampler.epoch(epoch)

    def loss(self, batch: Batch) -> Terms:
        """One forward pass."""
        return self.objective.terms(self.net(batch.images), batch)


class Schedule:
    """Learning rate of every step as a share of ``--lr``; steps count from 0.

    natural: linear from lr / W to lr over the W warm-up steps, then a cosine to exactly min_lr at the last step.
    original, constant within an epoch e from 0: lr e / W up to e = W (so the first epoch has none), then a cosine of
        200 epochs that starts at e = W + 1.
    """

    def __init__(self, options: Options, steps: int) -> None:
        self.kind, self.per_epoch = options.schedule, steps
        self.lr, self.least = options.lr, options.min_lr
        self.warm, self.total = options.warmup_epoch * steps, options.epochs * steps

    def at(self, step: int) -> float:
        """The learning rate of a step."""
        if self.kind == "original":
            return self.of_epoch(step // self.per_epoch, self.warm // self.per_epoch)
        if step < self.warm:
            return self.lr * (step + 1) / self.warm
        return self._cosine((step - self.warm) / max(self.total - 1 - self.warm, 1))

    def of_epoch(self, epoch: int, warm: int) -> float:
        """The published learning rate of an epoch."""
        if epoch <= warm:
            return self.lr * epoch / warm if warm else self.lr
        return self._cosine((epoch - warm - 1) / ORIGINAL_COSINE)

    def _cosine(self, share: float) -> float:
        return self.least + 0.5 * (self.lr - self.least) * (1 + math.cos(math.pi * min(share, 1.0)))


class ScheduledStep:
    """Another step with the learning rate of a :class:`Schedule`; it counts the steps and reports the rate as "lr"."""

    def __init__(self, inner: Step, schedule: Schedule) -> None:
        self.inner, self.schedule, self.count = inner, schedule, 0

    def __call__(self, closure: Closure, optimizer: torch.optim.Optimizer) -> Terms:
        rate = self.schedule.at(self.count)
        for group in optimizer.param_groups:
            group["lr"] = rate
        self.count += 1
        return {**self.inner(closure, optimizer), "lr": rate}

    def new_epoch(self) -> None:
        """Pass the start of an epoch on."""
        if hasattr(self.inner, "new_epoch"):
            self.inner.new_epoch()

    def state_dict(self) -> dict[str, Any]:
        """The count, and the inner step's state if it has one."""
        return {"count": self.count, "inner": self.inner.state_dict() if hasattr(self.inner, "state_dict") else {}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put :meth:`state_dict` back."""
        self.count = state["count"]
        if state["inner"]:
            self.inner.load_state_dict(state["inner"])


def uses_amp(options: Options, device: torch.device) -> bool:
    """bfloat16 autocast: where it is faster."""
    return options.precision == 16 and device.type == "cuda"


# -- judging


@torch.inference_mode()
def predict(options: Options, data: VisionData, model: nn.Module, part: ImageSet, world: World) -> Tensor:
    """Logits [N, C] of a part, float32 on the CPU, the same in every process; LDAM's cosines times their factor."""
    distributed.share_buffers(model)
    mean, std = (values.to(world.device) for values in data.statistics)
    images = torch.from_numpy(part.array())[: options.eval_batch_size if options.dry_run else None]
    found = []
    for rows in images[world.rows(len(images))].split(options.eval_batch_size):
        batch = normalize(rows.to(world.device).permute(0, 3, 1, 2), mean, std)
        with torch.autocast(world.device.type, dtype=torch.bfloat16, enabled=uses_amp(options, world.device)):
            found.append(model(batch).float())
    logits = torch.cat(found) if found else torch.zeros(0, data.num_classes, device=world.device)
    factor = options.ldam_scale if options.long_tail.startswith("ldam") else 1.0
    return (factor * distributed.gather(logits)).cpu()


def groups(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Many, medium and few shots by train counts, head, mid and tail by rank; none where classes are equal."""
    return shot_groups(counts) | rank_groups(counts) if counts.min() < counts.max() else {}


def metrics(options: Options, data: VisionData, logits: Tensor, part: ImageSet) -> dict[str, float]:
    """The figures of a part, with the calibration of its few and tail classes; groups without a class are left out."""
    labels, parts = torch.from_numpy(part.labels[: len(logits)]), groups(data.counts)
    found = classification_metrics(logits, labels, groups=parts)
    for name in sorted(parts.keys() & {"few", "tail"}):
        rows = torch.isin(labels, torch.from_numpy(parts[name]))
        found[f"ece_{name}"] = calibration_error(logits[rows].double().softmax(-1), labels[rows])
    return {name: value for name, value in found.items() if not math.isnan(value)}


@contextmanager
def last_weights(model: nn.Module, training: Training, run: Run) -> Iterator[None]:
    """Inside the block the model holds the weights of the last epoch, averaged if averages are judged.

    ``fit`` leaves the weights of the best epoch; those of the last one are in the checkpoint.
    """
    kept = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(run.load_checkpoint()["model"])
    try:
        with training.ema.swapped() if training.ema else nullcontext():
            yield
    finally:
        model.load_state_dict(kept)


def load_reported(
    options: Options, data: VisionData, device: torch.device, path: Path, *, done: bool = True
) -> nn.Module:
    """The model that a run's result is about, in eval mode."""
    return program.load_reported(build_model(options, data, device), path, done=done)


def describe(options: Options, data: VisionData, model: nn.Module, training: Training, run: Run) -> str:
    """What is about to run, in a few lines."""
    source, counts = data.source, data.counts
    parts = ", ".join(f"{name} {len(part):,}" for name, part in source.parts.items())
    tail = (
        f", {counts.max()} to {counts.min()} train images a class ({options.imb_type} {options.imb_factor:g})"
        if options.imb_factor
        else ""
    )
    how = training.sampler.how
    steps = [
        name
        for name, used in (
            ("crop", how.crop),
            ("mirror", how.crop and how.flip),
            ("AutoAugment", how.auto),
            ("crop-paste", how.paste),
        )
        if used
    ]
    steps += [how.mix] if how.mix != "none" else []
    notes = [f"note: {note}" for note in source.notes]
    if options.autoaugment and how.auto is None:
        notes.append("note: --aa_skip_imbalanced 1: no AutoAugment for this data set")
    smoothing = f", smoothing {options.smoothing:g}" if options.label_smoothing else ""
    count = sum(parameter.numel() for parameter in model.parameters())
    processes = f", {training.world.size} processes" if training.world.size > 1 else ""
    return "\n".join([
        f"{source.name}: {data.num_classes} classes, {data.image_size} x {data.image_size}; {parts} images{tail}",
        *notes,
        f"{options.model_name}: {count:,} parameters on {training.world.device}{processes}; "
        f"{training.sampler.num_batches} steps an epoch, {options.epochs} epochs",
        f"loss {options.long_tail}{smoothing}; sampler {options.sampler}; "
        f"augmentation: {', '.join(steps) or 'none'}; seed {options.seed}",
        f"reported: the last epoch{', and the best on validation' if source.valid is not None else ''}; "
        f"run directory {run.path}",
    ])  # fmt: skip
