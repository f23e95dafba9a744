"""What a vision run is made of: network, optimizer and augmented batches, and what is judged after the last epoch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from gfml.attention import AttentionSettings, log_masses, parameter_groups
from gfml.base.optim import light
from gfml.data.images import ImageSet
from gfml.engine import distributed
from gfml.engine.runs import Run
from gfml.engine.train import FitResult, Terms, WeightAverage
from gfml.longtail import rank_groups, shot_groups, use_cosine_head, without_prior
from gfml.metrics.classification import (
    calibration_error,
    classification_metrics,
    confusion_matrix,
    recalls,
    sensitivity,
)
from gfml.program.experiment import Experiment, Judged, Training
from gfml.program.steps import build_step
from gfml.report.recommenders import text_table
from vision.augment import normalize
from vision.data import Batch, TrainBatches, VisionData, augmentation, class_weights, load
from vision.models import build_model
from vision.settings import VisionSettings
from vision.training import Objective, Schedule, ScheduledStep
from vision.vit import ViTSettings

# Columns of the printed table, those a result has.
SHOWN = (
    "accuracy", "accuracy_many", "accuracy_medium", "accuracy_few", "accuracy_head", "accuracy_mid", "accuracy_tail",
    "worst_class", "macro_f1", "nll", "ece",
)  # fmt: skip


class Vision(Experiment):
    """One network on balanced or long-tailed images. The headline is the last epoch's test accuracy."""

    judged_by_all = True
    settings: VisionSettings
    data: VisionData

    @classmethod
    def load(cls, settings: VisionSettings) -> VisionData:
        torch.backends.cudnn.benchmark = not settings.off_benchmark
        return load(settings)

    def whole(self) -> Self:
        """Nothing set aside."""
        settings = replace(self.settings, val_fraction=0.0)
        return type(self)(settings, load(settings), self.world)

    # -- model

    def build(self, *, start: bool = True) -> nn.Module:
        """The network of ``--model-name`` with fresh weights."""
        s, data = self.settings, self.data
        vit = ViTSettings(
            patch=s.patch, hidden=s.hidden, mlp_hidden=s.mlp_hidden, num_layers=s.num_layers, num_heads=s.head,
            dropout=s.dropout, cls_token=not s.off_cls_token, mass_pos=s.mass_pos,
        )  # fmt: skip
        model = build_model(
            s.model, num_classes=data.num_classes, image_size=data.image_size, vit=vit,
            attention=attention_settings(s), stem=s.stem,
        )  # fmt: skip
        if s.long_tail.startswith("ldam"):
            use_cosine_head(model, data.num_classes)
        return model.to(self.device)

    def training(self, model: nn.Module) -> Training:
        s, data, world = self.settings, self.data, self.world
        net = distributed.wrap(model, sync_batchnorm=self.device.type == "cuda")
        net = torch.compile(net) if s.compile else net
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[s.optimizer]
        groups = parameter_groups(model, s.weight_decay)
        optimizer = light(kind)(groups, lr=s.lr, betas=(s.beta1, s.beta2), fused=True)
        sampler = TrainBatches(
            data, augmentation(s, data), batch_size=s.batch_size, seed=s.seed, world=world,
            weights=class_weights(s.sampler, data.counts), workers=s.num_workers, most=1 if s.dry_run else None,
        )  # fmt: skip
        objective = Objective(s, data.counts).to(self.device)
        step = ScheduledStep(build_step(s, optimizer, s.clip_grad), Schedule(s, sampler.num_batches))

        def batches(epoch: int) -> Iterable[Batch]:
            objective.new_epoch(epoch)
            return sampler.epoch(epoch)

        def loss(batch: Batch) -> Terms:
            return objective.terms(net(batch.images), batch)

        ema = WeightAverage(model.parameters(), s.ema) if s.ema else None
        self._ema, self._images = ema, sampler.num_batches * sampler.batch_size
        return Training(optimizer, batches, loss, step, ema=ema, amp=self._amp, compile=False)

    @property
    def _amp(self) -> bool:
        """bfloat16 autocast: where it is faster."""
        return self.settings.amp or (self.settings.precision == 16 and self.device.type == "cuda")

    @property
    def epochs(self) -> int:
        return 1 if self.settings.dry_run else self.settings.epochs

    # -- judging

    @property
    def select(self) -> str | None:
        return None if self.data.source.valid is None else "val/balanced_accuracy"

    def evaluate(self, model: nn.Module, split: str) -> Mapping[str, float]:
        return self._judged(model, self.data.source.valid)

    def judge(self, model: nn.Module, fitted: FitResult | None, run: Run | None) -> Judged:
        """The headline "test" is the last epoch's; with a validation part "selected" is that of the best epoch on it."""
        s, data, source = self.settings, self.data, self.data.source
        result: dict[str, Any] = {"model": s.model, "data": self._data_facts()}
        if fitted is not None and source.valid is not None:
            result["selected"] = {"epoch": fitted.best_epoch, "test": self._judged(model, source.test)}
            with self._last_weights(model, run):
                logits = self.predict(model, source.test)
                result["val"] = self._judged(model, source.valid)
        else:
            logits = self.predict(model, source.test)
        result["test"] = metrics(data, logits, source.test)
        result["per_class"] = _per_class(data, logits)
        if s.imb_factor and s.long_tail == "ce" and data.counts.all():
            adjusted = metrics(data, without_prior(logits, data.counts), source.test)
            result["also"] = {"log-prior taken off afterwards": adjusted}
        result["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        if fitted is not None:
            seen = self._images * fitted.epochs
            result["seconds"] = {
                "epoch": fitted.train_seconds / max(fitted.epochs, 1),
                "images_per_second": seen / fitted.train_seconds if fitted.train_seconds else 0.0,
            }
            if self.device.type == "cuda":
                result["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        arrays = {
            "test_logits": logits.numpy(),
            "test_labels": source.test.labels[: len(logits)],
            "train_counts": data.counts,
        }
        arrays |= {f"per_image/{name}": values for name, values in per_image(logits, source.test).items()}
        arrays |= {f"log_mass/{name}": mass.detach().cpu().numpy() for name, mass in log_masses(model).items()}
        return Judged(result, arrays)

    def selection(self, fitted: FitResult | None, run: Run) -> dict[str, Any]:
        """The headline is the last epoch's, whether or not an epoch is selected beside it."""
        if fitted is None:
            return super().selection(None, run)
        facts = {"epoch": fitted.epochs, "rule": "last epoch", "protocol": "last epoch, nothing selected"}
        if self.settings.refit:
            anew = "trained anew on train and validation for the epochs that validation selected"
            facts = {"epoch": fitted.best_epoch, "rule": "highest balanced accuracy on validation", "protocol": anew}
        return {**facts, "weights": fitted.weights, "epochs_trained": fitted.epochs}

    @torch.inference_mode()
    def predict(self, model: nn.Module, part: ImageSet) -> Tensor:
        """Logits [N, C] of a part, float32 on the CPU, the same in every process; LDAM's cosines times their factor."""
        s = self.settings
        distributed.share_buffers(model)
        mean, std = (values.to(self.device) for values in self.data.statistics)
        images = torch.from_numpy(part.array())[: s.eval_batch_size if s.dry_run else None]
        found = []
        for rows in images[self.world.rows(len(images))].split(s.eval_batch_size):
            batch = normalize(rows.to(self.device).permute(0, 3, 1, 2), mean, std)
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._amp):
                found.append(model(batch).float())
        logits = torch.cat(found) if found else torch.zeros(0, self.data.num_classes, device=self.device)
        factor = s.ldam_scale if s.long_tail.startswith("ldam") else 1.0
        return (factor * distributed.gather(logits)).cpu()

    def _judged(self, model: nn.Module, part: ImageSet) -> dict[str, float]:
        return metrics(self.data, self.predict(model, part), part)

    def _data_facts(self) -> dict[str, Any]:
        """Which images a result is about."""
        s, data, source = self.settings, self.data, self.data.source
        name = f"{source.name} {s.imb_type} {s.imb_factor:g}" if s.imb_factor else source.name
        return {
            "name": name, "classes": list(source.classes),
            "images": {name: len(part) for name, part in source.parts.items()}, "train_counts": data.counts.tolist(),
            "image_size": data.image_size, "notes": list(source.notes), "fingerprint": data.fingerprint,
        }  # fmt: skip

    # -- files

    @contextmanager
    def _last_weights(self, model: nn.Module, run: Run) -> Iterator[None]:
        """Inside the block the model holds the weights of the last epoch, averaged if averages are judged.

        ``fit`` leaves the weights of the best epoch; those of the last one are in the checkpoint.
        """
        kept = {key: value.clone() for key, value in model.state_dict().items()}
        model.load_state_dict(run.load_checkpoint()["model"])
        try:
            with self._ema.swapped() if self._ema else nullcontext():
                yield
        finally:
            model.load_state_dict(kept)

    def final_weights(self, model: nn.Module, run: Run) -> dict[str, Any]:
        with self._last_weights(model, run) if self.select is not None else nullcontext():
            return {"model": {key: value.detach().cpu().clone() for key, value in model.state_dict().items()}}

    def adopt(self, state: Mapping[str, Tensor], origin: object) -> nn.Module:
        """Without its masses where ``--mass_from`` is not position."""
        masses = self.settings.mass_from == "position"
        return super().adopt({name: value for name, value in state.items() if masses or ".mass." not in name}, origin)

    @classmethod
    def joint_page(cls, settings: VisionSettings, paths: list[Path]) -> Path | None:
        from vision.report import draw

        return draw(paths, data_root=settings.data_root)

    # -- words

    @property
    def label(self) -> str:
        return f"{self.settings.project_name}-{self.data.source.name}-{self.settings.model}"

    def data_lines(self) -> list[str]:
        s, source, counts = self.settings, self.data.source, self.data.counts
        parts = ", ".join(f"{name} {len(part):,}" for name, part in source.parts.items())
        shape = f"{s.imb_type} {s.imb_factor:g}" if s.imb_factor else ""
        tail = f", {counts.max()} to {counts.min()} train images a class ({shape})" if shape else ""
        size = f"{self.data.image_size} x {self.data.image_size}"
        return [
            f"{source.name}: {self.data.num_classes} classes, {size}; {parts} images{tail}",
            *(f"note: {note}" for note in source.notes),
        ]

    def describe(self, model: nn.Module) -> list[str]:
        s, how = self.settings, augmentation(self.settings, self.data)
        used = {"crop": how.crop, "mirror": how.crop and how.flip, "AutoAugment": how.auto, "crop-paste": how.paste}
        steps = [name for name, is_used in used.items() if is_used] + ([how.mix] if how.mix != "none" else [])
        lines = []
        if s.autoaugment and how.auto is None:
            lines.append("note: --aa_skip_imbalanced 1: no AutoAugment for this data set")
        smoothing = f", smoothing {s.smoothing:g}" if s.label_smoothing else ""
        reported = f"the last epoch{', and the best on validation' if self.select is not None else ''}"
        return [
            *lines,
            f"{s.model}: {s.epochs} epochs, batches of {s.batch_size}; reported: {reported}",
            f"loss {s.long_tail}{smoothing}; sampler {s.sampler}; augmentation: {', '.join(steps) or 'none'}",
        ]

    @classmethod
    def text(cls, settings: Any, results: list[tuple[Mapping[str, Any], Path]]) -> str:
        """One row for each run."""
        rows: dict[str, Mapping[str, float]] = {}
        for own, (result, _) in zip(settings.each(), results, strict=True):
            cost = {"train s": round(result["seconds"]["train"])} if "seconds" in result else {}
            rows[own.label] = {**result["test"], **cost}
            rows |= {f"{own.label}, {name}": found for name, found in others(result).items()}
        first = results[0][0]
        images = f"{first['data']['images']['test']:,} images"
        columns = [name for name in (*SHOWN, "train s") if any(name in row for row in rows.values())]
        return f"\ntest of {first['data']['name']}, {images}; {first['selection']['protocol']}\n{text_table(rows, columns)}"


def attention_settings(s: VisionSettings) -> AttentionSettings:
    """The gravity flags as settings of a layer."""
    return AttentionSettings(
        lamb=s.lamb_gra, learn_lamb=bool(s.learn_lamb), distance=s.dist_mode, mix=s.mix_mode if s.mix_on else "off",
        lamb_mix=s.lamb_mix, num_split=s.num_split, split_mix=bool(s.split_mix), mass=s.mass_from,
        mass_param=s.mass_param, mass_init=s.mass_init, per_head=s.mass_share == "per_head",
        query_mass=bool(s.query_mass), mass_combine=s.mass_combine, scale=s.gra_scale, dot_scale=s.dot_scale,
        head_order=s.head_order, kernel=s.attn_kernel,
    )  # fmt: skip


def groups(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Many, medium and few shots by train counts, head, mid and tail by rank; none where classes are equal."""
    return shot_groups(counts) | rank_groups(counts) if counts.min() < counts.max() else {}


def metrics(data: VisionData, logits: Tensor, part: ImageSet) -> dict[str, float]:
    """The figures of a part, with the calibration of its few and tail classes; groups without a class are left out."""
    labels, parts = torch.from_numpy(part.labels[: len(logits)]), groups(data.counts)
    found = classification_metrics(logits, labels, groups=parts)
    for name in sorted(parts.keys() & {"few", "tail"}):
        rows = torch.isin(labels, torch.from_numpy(parts[name]))
        found[f"ece_{name}"] = calibration_error(logits[rows].double().softmax(-1), labels[rows])
    return {name: value for name, value in found.items() if not math.isnan(value)}


def per_image(logits: Tensor, part: ImageSet) -> dict[str, np.ndarray]:
    """Whether the answer is right, and the negative log-likelihood, of each image: their means are accuracy and nll."""
    labels = torch.from_numpy(part.labels[: len(logits)]).long()
    nll = torch.nn.functional.cross_entropy(logits.double(), labels, reduction="none")
    return {"accuracy": (logits.argmax(1) == labels).numpy().astype(np.float32), "nll": nll.numpy().astype(np.float32)}


def _per_class(data: VisionData, logits: Tensor) -> dict[str, Any]:
    """Accuracy and share of the answers of every class, and how accuracy follows the train counts."""
    labels = torch.from_numpy(data.source.test.labels[: len(logits)])
    answers = logits.argmax(-1)
    found = recalls(confusion_matrix(labels, answers, data.num_classes))
    share = torch.bincount(answers, minlength=data.num_classes).double() / max(len(answers), 1)
    slope = sensitivity(found, data.counts)
    facts = {"accuracy": [None if value != value else value for value in found.tolist()], "answers": share.tolist()}
    return facts | {name: value for name, value in slope._asdict().items() if value == value}


def others(result: Mapping[str, Any]) -> dict[str, Mapping[str, float]]:
    """Test metrics beside the headline, by name."""
    chosen = {"best epoch on validation": result["selected"]["test"]} if "selected" in result else {}
    return {**chosen, **result.get("also", {})}
