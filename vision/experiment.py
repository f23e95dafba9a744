"""What a vision run is made of: network, loss, schedule and augmented batches, and how predictions are judged."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from gfml.attention import AttentionSettings, log_masses, parameter_groups
from gfml.data.images import ImageSet
from gfml.engine import distributed
from gfml.engine.distributed import World
from gfml.engine.runs import Run
from gfml.engine.train import Closure, FitResult, Step, Terms, WeightAverage
from gfml.longtail import class_loss, deferred_weights, rank_groups, shot_groups, use_cosine_head, without_prior
from gfml.metrics.classification import (
    calibration_error,
    classification_metrics,
    confusion_matrix,
    recalls,
    sensitivity,
)
from gfml.program.experiment import Experiment, Judged, Training, places
from gfml.program.steps import build_step
from gfml.report.recommenders import text_table
from vision.augment import normalize
from vision.data import Batch, TrainBatches, VisionData, augmentation, class_weights, load
from vision.models import build_model as network
from vision.settings import VisionSettings
from vision.vit import ViTSettings

LOSS_NAMES = {"class-balanced": "cb", "ldam-drw": "ldam"}
# The published cosine falls over this many epochs, however many are trained.
ORIGINAL_COSINE = 200
# Columns of the printed table, those a result has.
SHOWN = (
    "accuracy",
    "accuracy_many",
    "accuracy_medium",
    "accuracy_few",
    "accuracy_head",
    "accuracy_mid",
    "accuracy_tail",
    "worst_class",
    "macro_f1",
    "nll",
    "ece",
)


class Vision(Experiment):
    """Images into classes. The headline is the last epoch; with a validation part the best epoch stands beside it."""

    judged_by_all = True
    settings: VisionSettings
    data: VisionData

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.trainer: Trainer | None = None

    @classmethod
    def load(cls, settings: VisionSettings) -> VisionData:
        torch.backends.cudnn.benchmark = not settings.off_benchmark
        return load(settings)

    def whole(self) -> Self:
        settings = replace(self.settings, val_fraction=0.0)
        return type(self)(settings, load(settings), self.world)

    @property
    def label(self) -> str:
        return f"{self.settings.project_name}-{self.data.source.name}-{self.settings.name}"

    @property
    def select(self) -> str | None:
        return None if self.data.source.valid is None else "val/balanced_accuracy"

    @property
    def epochs(self) -> int:
        return 1 if self.settings.dry_run else self.settings.epochs

    # -- building and training

    def build(self, *, start: bool = True) -> nn.Module:
        s = self.settings
        vit = ViTSettings(
            patch=s.patch, hidden=s.hidden, mlp_hidden=s.mlp_hidden, num_layers=s.num_layers, num_heads=s.head,
            dropout=s.dropout, cls_token=not s.off_cls_token, mass_pos=s.mass_pos,
        )  # fmt: skip
        model = network(
            s.name, num_classes=self.data.num_classes, image_size=self.data.image_size, vit=vit,
            attention=attention_settings(s), stem=s.stem,
        )  # fmt: skip
        if s.long_tail.startswith("ldam"):
            use_cosine_head(model, self.data.num_classes)
        return model.to(self.device)

    def training(self, model: nn.Module) -> Training:
        self.trainer = t = Trainer(self.settings, self.data, model, self.world)
        return Training(t.optimizer, t.batches, t.loss, t.step, ema=t.ema, amp=t.amp, compile=False)

    # -- judging

    def predict(self, model: nn.Module, part: ImageSet) -> Tensor:
        """Logits of a part, the same in every process."""
        return predict(self.settings, self.data, model, part, self.world)

    def evaluate(self, model: nn.Module, split: str) -> Mapping[str, float]:
        part = self.data.source.parts[split]
        return metrics(self.settings, self.data, self.predict(model, part), part)

    def judge(self, model: nn.Module, fitted: FitResult | None, run: Run) -> Judged:
        """ "test" is the last epoch's; with a validation part "selected" is that of the best epoch on it.

        fitted None: weights were loaded, and only they are judged.
        """
        s, source = self.settings, self.data.source
        result: dict[str, Any] = {"model": s.name, "data": data_facts(s, self.data)}
        if fitted is not None and source.valid is not None:
            chosen = self.predict(model, source.test)
            result["selected"] = {"epoch": fitted.best_epoch, "test": metrics(s, self.data, chosen, source.test)}
            with last_weights(model, self.trainer.ema, run):
                logits = self.predict(model, source.test)
                result["val"] = self.evaluate(model, "valid")
        else:
            logits = self.predict(model, source.test)
        result["test"] = metrics(s, self.data, logits, source.test)
        result["per_class"] = per_class(self.data, logits)
        if s.imb_factor and s.long_tail == "ce":
            adjusted = metrics(s, self.data, without_prior(logits, self.data.counts), source.test)
            result["also"] = {"log-prior taken off afterwards": adjusted}
        result["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        if fitted is not None:
            result |= self._cost(fitted)
        return Judged(result, self._arrays(model, logits))

    def _cost(self, fitted: FitResult) -> dict[str, Any]:
        sampler, seconds = self.trainer.sampler, fitted.train_seconds
        images = sampler.num_batches * sampler.batch_size * fitted.epochs
        cost = {"epoch": seconds / max(fitted.epochs, 1), "images_per_second": images / seconds if seconds else 0.0}
        cuda = self.device.type == "cuda"
        memory = {"peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30} if cuda else {}
        return {"seconds": cost, **memory}

    def _arrays(self, model: nn.Module, logits: Tensor) -> dict[str, np.ndarray]:
        labels = self.data.source.test.labels[: len(logits)]
        arrays = {"test_logits": logits.numpy(), "test_labels": labels, "train_counts": self.data.counts}
        masses = log_masses(model).items()
        return arrays | {f"log_mass/{name}": mass.detach().cpu().numpy() for name, mass in masses}

    def selection(self, fitted: FitResult | None, run: Run) -> dict[str, Any]:
        """The headline is the last epoch's, whether or not an epoch is selected beside it."""
        if fitted is None:
            return super().selection(fitted, run)
        facts = {"epoch": fitted.epochs, "rule": "last epoch", "protocol": "last epoch, nothing selected"}
        if self.settings.refit:
            anew = "trained anew on train and validation for the epochs that validation selected"
            facts |= {"epoch": fitted.best_epoch, "rule": "highest balanced accuracy on validation", "protocol": anew}
        return {**facts, "weights": fitted.weights, "epochs_trained": fitted.epochs}

    def final_weights(self, model: nn.Module, run: Run) -> dict[str, Any]:
        last = nullcontext() if self.data.source.valid is None else last_weights(model, self.trainer.ema, run)
        with last:
            return {"model": {key: value.detach().cpu().clone() for key, value in model.state_dict().items()}}

    # -- words

    def data_lines(self) -> list[str]:
        s, source, counts = self.settings, self.data.source, self.data.counts
        parts = ", ".join(f"{name} {len(part):,}" for name, part in source.parts.items())
        tail = (
            f", {counts.max()} to {counts.min()} train images a class ({s.imb_type} {s.imb_factor:g})"
            if s.imb_factor
            else ""
        )
        side = self.data.image_size
        return [
            f"{source.name}: {self.data.num_classes} classes, {side} x {side}; {parts} images{tail}",
            *(f"note: {note}" for note in source.notes),
        ]

    def describe(self, model: nn.Module) -> list[str]:
        s, how = self.settings, augmentation(self.settings, self.data)
        used = {"crop": how.crop, "mirror": how.crop and how.flip, "AutoAugment": how.auto, "crop-paste": how.paste}
        steps = [name for name, on in used.items() if on] + ([how.mix] if how.mix != "none" else [])
        notes = (
            ["note: --aa_skip_imbalanced 1: no AutoAugment for this data set"]
            if s.autoaugment and how.auto is None
            else []
        )
        smoothing = f", smoothing {s.smoothing:g}" if s.label_smoothing else ""
        beside = ", and the best on validation" if self.data.source.valid is not None else ""
        return [
            *notes,
            f"{s.name}: {self.epochs} epochs; loss {s.long_tail}{smoothing}; sampler {s.sampler}; "
            f"augmentation: {', '.join(steps) or 'none'}",
            f"reported: the last epoch{beside}",
        ]

    @classmethod
    def result_text(cls, result: Mapping[str, Any]) -> str:
        return table_text([(result["model"], result)])

    @classmethod
    def conclude(cls, settings: VisionSettings, results: Sequence[tuple[Mapping[str, Any], Path]]) -> str:
        """One row for each network, and one page for all."""
        named = [(label_of(own), result) for own, (result, _) in zip(settings.each(), results, strict=True)]
        lines = [table_text(named), *(places(path) for _, path in results)]
        if settings.report and not settings.eval_only:
            from vision.report import write_report

            lines.append(f"report          {write_report([path for _, path in results], data_root=settings.data_root)}")
        return "\n".join(lines)


def attention_settings(options: VisionSettings) -> AttentionSettings:
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

    def __init__(self, options: VisionSettings, counts: np.ndarray) -> None:
        super().__init__()
        self.counts, self.epochs = counts, options.epochs
        eps = options.smoothing if options.label_smoothing else 0.0
        self.loss = class_loss(
            LOSS_NAMES.get(options.long_tail, options.long_tail), counts, smoothing=eps * len(counts) / (len(counts) - 1),
            beta=options.cb_beta, tau=options.tau, gamma=options.gamma, max_margin=options.ldam_margin, scale=options.ldam_scale,
        )  # fmt: skip
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
            return batch.share * (
                own if batch.keep == 1 else batch.keep * own + (1 - batch.keep) * measure(batch.others)
            )

        return {
            "loss": both(lambda labels: self.loss(logits, labels)),
            "accuracy": both(lambda labels: (answers == labels).float().mean()),
        }


# -- training


class Trainer:
    """Everything that ``fit`` is given beside the model: optimizer, step with its schedule, averages, batches, loss."""

    def __init__(self, options: VisionSettings, data: VisionData, model: nn.Module, world: World) -> None:
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

    def __init__(self, options: VisionSettings, steps: int) -> None:
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


def uses_amp(options: VisionSettings, device: torch.device) -> bool:
    """bfloat16 autocast: where it is faster."""
    return options.precision == 16 and device.type == "cuda"


# -- judging


@torch.inference_mode()
def predict(options: VisionSettings, data: VisionData, model: nn.Module, part: ImageSet, world: World) -> Tensor:
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


def metrics(options: VisionSettings, data: VisionData, logits: Tensor, part: ImageSet) -> dict[str, float]:
    """The figures of a part, with the calibration of its few and tail classes; groups without a class are left out."""
    labels, parts = torch.from_numpy(part.labels[: len(logits)]), groups(data.counts)
    found = classification_metrics(logits, labels, groups=parts)
    for name in sorted(parts.keys() & {"few", "tail"}):
        rows = torch.isin(labels, torch.from_numpy(parts[name]))
        found[f"ece_{name}"] = calibration_error(logits[rows].double().softmax(-1), labels[rows])
    return {name: value for name, value in found.items() if not math.isnan(value)}


@contextmanager
def last_weights(model: nn.Module, ema: WeightAverage | None, run: Run) -> Iterator[None]:
    """Inside the block the model holds the weights of the last epoch, averaged if averages are judged.

    ``fit`` leaves the weights of the best epoch; those of the last one are in the checkpoint.
    """
    kept = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(run.load_checkpoint()["model"])
    try:
        with ema.swapped() if ema else nullcontext():
            yield
    finally:
        model.load_state_dict(kept)


def data_facts(options: VisionSettings, data: VisionData) -> dict[str, Any]:
    """Which images a result is about."""
    source = data.source
    facts = {
        "name": f"{source.name}{f' {options.imb_type} {options.imb_factor:g}' if options.imb_factor else ''}",
        "classes": list(source.classes),
    }
    facts |= {"images": {name: len(part) for name, part in source.parts.items()}, "train_counts": data.counts.tolist()}
    facts |= {"image_size": data.image_size, "notes": list(source.notes), "fingerprint": data.fingerprint}
    return facts


def per_class(data: VisionData, logits: Tensor) -> dict[str, Any]:
    """Accuracy and share of the answers of every class, and how accuracy follows the train counts."""
    labels = torch.from_numpy(data.source.test.labels[: len(logits)])
    answers = logits.argmax(-1)
    found = recalls(confusion_matrix(labels, answers, data.num_classes))
    share = torch.bincount(answers, minlength=data.num_classes).double() / max(len(answers), 1)
    slope = sensitivity(found, data.counts)
    facts = {"accuracy": [None if value != value else value for value in found.tolist()], "answers": share.tolist()}
    return facts | {name: value for name, value in slope._asdict().items() if value == value}


def label_of(options: VisionSettings) -> str:
    """A model's short name in tables: with its attention, where it has gravity."""
    name = options.name
    if not name.endswith("_gra"):
        return name
    mix = f", {options.mix_mode} mix" if options.mix_on else ""
    mass = {"position": "", "content": ", content mass", "none": ", no mass"}[options.mass_from]
    return f"{name} ({options.dist_mode}, lambda {options.lamb_gra:g}{mass}{mix}, {options.mass_pos})"


def others(result: Mapping[str, Any]) -> dict[str, Mapping[str, float]]:
    """Test metrics beside the headline, by name."""
    chosen = {"best epoch on validation": result["selected"]["test"]} if "selected" in result else {}
    return {**chosen, **result.get("also", {})}


def table_text(results: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """One row for each result, and for what was judged beside it."""
    rows = {}
    for label, result in results:
        cost = {"train s": result["seconds"]["train"]} if "train" in result.get("seconds", {}) else {}
        rows[label] = {**result["test"], **cost}
        rows |= {f"{label}, {name}": found for name, found in others(result).items()}
    first = results[0][1]
    columns = [name for name in (*SHOWN, "train s") if any(name in row for row in rows.values())]
    head = f"\ntest of {first['data']['name']}, {first['data']['images']['test']:,} images; {first['selection']['protocol']}"
    return f"{head}\n{text_table(rows, columns)}"
