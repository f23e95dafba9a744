"""Loss, schedule, optimizer groups, judged groups: the program side of training."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gfml.base.errors import UserError
from gfml.engine.train import plain_step
from gfml.longtail import class_weights, imbalanced_counts
from vision.data import Batch, load
from vision.experiment import Vision, groups, metrics
from vision.main import PROGRAM
from vision.training import Objective, Schedule, ScheduledStep

COUNTS = np.array([100, 40, 10, 4])
SEED_COMMAND = (
    "--model-name vit_gra --max-epochs 200 --batch-size 128 --weight-decay 5e-5 --lr 1e-3 --min-lr 1e-5 --warmup-epoch 5 --dropout 0.0 "
    "--head 12 --num-layers 7 --hidden 384 --mlp-hidden 384 --autoaugment --label-smoothing --lamb_gra 3.0 --lamb_mix 0.5 --mix_on 1 "
    "--mix_mode split --dist_mode l2 --mass_pos tail --num_split 6 --split_mix 1 --dataset cimb10 --num-classes 10 --project-name 221104-cimb10"
)


def options_of(*words):
    return PROGRAM.parse([*" ".join(map(str, words)).split()]).each()[0]


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    labels, others = torch.randint(0, 4, (2, 12), generator=generator)
    return Batch(torch.zeros(12, 3, 4, 4), labels, others, 0.7)


@pytest.fixture
def logits():
    return torch.randn(12, 4, generator=torch.Generator().manual_seed(1), requires_grad=True)


@pytest.fixture(scope="module")
def digits():
    return load(options_of())


# -- loss


def smoothed(logits, labels, eps):
    """1 - eps on the label, eps / (C - 1) on each other class, by loops."""
    total, c = 0.0, logits.shape[1]
    for row, label in zip(logits.log_softmax(-1), labels, strict=True):
        total -= sum((1 - eps if k == label else eps / (c - 1)) * row[k] for k in range(c))
    return total / len(labels)


@pytest.mark.parametrize("eps", [0.0, 0.1, 0.3])
def test_smoothing_is_that_of_the_other_classes(batch, logits, eps):
    options = options_of("--label-smoothing --smoothing", eps)
    terms = Objective(options, COUNTS).terms(logits, batch)
    expected = 0.7 * smoothed(logits, batch.labels, eps) + 0.3 * smoothed(logits, batch.others, eps)
    torch.testing.assert_close(terms["loss"], expected)
    # The library's uniform smoothing with eps C / (C - 1) is the same.
    one = F.cross_entropy(logits, batch.labels, label_smoothing=eps * 4 / 3)
    torch.testing.assert_close(smoothed(logits, batch.labels, eps), one)


def loop(name, logits, labels, eps, weights):
    """The loss of hard labels in float64: label smoothing of the other classes, an image counting with its label's weight."""
    total = weight_sum = 0.0
    prior = COUNTS / COUNTS.sum()
    for row, y in zip(logits.double(), labels.tolist(), strict=True):
        z = row.clone()
        if name == "balanced-softmax":
            z = z + torch.tensor(prior).log()
        elif name.startswith("ldam"):
            z[y] -= 0.5 * (COUNTS[y] / COUNTS.min()) ** -0.25
            z = 30 * z
        p = z.softmax(0)
        each = -sum((1 - eps if k == y else eps / (len(COUNTS) - 1)) * p[k].log() for k in range(len(COUNTS)))
        each = each * (1 - p[y]) if name == "focal" else each
        total, weight_sum = total + weights[y] * each, weight_sum + weights[y]
    return total / weight_sum


@pytest.mark.parametrize("name", ["ce", "class-balanced", "focal", "balanced-softmax", "ldam", "ldam-drw"])
@pytest.mark.parametrize("eps", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixed_smoothed_and_weighted_losses_by_loops(batch, logits, name, eps, dtype):
    """Every loss with mixed images, smoothing, and logits of a network under autocast."""
    if name == "focal" and eps:
        pytest.skip("the focal loss has no smoothed labels")
    # The partner's label is another image's of the batch.
    batch = replace(batch, others=batch.labels[torch.randperm(12, generator=torch.Generator().manual_seed(2))])
    words = f"--epochs 10 --long-tail {name}" + (f" --label-smoothing --smoothing {eps}" if eps else "")
    objective, logits = Objective(options_of(words), COUNTS), (0.1 * logits).detach().to(dtype)
    objective.new_epoch(10)
    weights = class_weights(COUNTS) if name in ("class-balanced", "ldam-drw") else np.ones(4)
    wanted = sum(
        share * loop(name, logits, labels, eps, weights) for share, labels in ((0.7, batch.labels), (0.3, batch.others))
    )
    assert objective.terms(logits, batch)["loss"].item() == pytest.approx(wanted.item(), rel=1e-5)


def test_a_smoothed_weighted_loss_trains_an_image_towards_its_class():
    """10 classes, 10,000 images, factor 0.01: at .9 for the label and .011 for each other class the gradient is 0."""
    counts = imbalanced_counts("exp", 10, 10_000, 0.01)
    target = torch.full((10,), 0.1 / 9).index_fill(0, torch.tensor(0), 0.9)
    for name in ("class-balanced", "ldam-drw"):
        objective = Objective(
            options_of("--epochs 1 --label-smoothing --drw-start 0 --ldam-scale 1 --long-tail", name), counts
        )
        objective.new_epoch(1)
        z = target.log()
        z[0] += 0 if name == "class-balanced" else objective.loss.margin[0]
        z = z[None].requires_grad_()
        label = torch.zeros(1, dtype=torch.long)
        objective.terms(z, Batch(torch.zeros(1, 3, 4, 4), label, label, 1.0))["loss"].backward()
        assert z.grad.abs().max() < 1e-6


def test_a_loss_that_needs_every_class_says_so():
    with pytest.raises(
        UserError, match="balanced-softmax: found a class without training examples.*raise --imb-factor"
    ):
        Objective(options_of("--long-tail balanced-softmax"), np.array([9, 3, 0]))


@pytest.mark.parametrize("name", ["ce", "class-balanced", "ldam-drw", "logit-adjustment"])
def test_smoothing_beyond_equal_weights_is_refused_before_training(name):
    """The library refuses it at the first loss only: of two classes .6 is .4 for the label, a smoothing of 1.2."""
    options = options_of("--label-smoothing --smoothing 0.6 --long-tail", name)
    with pytest.raises(UserError, match=r"--smoothing 0.6 with 2 classes: above 0.5 "):
        Objective(options, np.array([5, 9]))
    least = Objective(options_of("--label-smoothing --smoothing 0.5 --long-tail", name), np.array([5, 9]))
    assert least.loss(torch.randn(3, 2), torch.tensor([0, 1, 0])).isfinite()


def test_without_the_flag_nothing_is_smoothed(batch, logits):
    whole = Batch(batch.images, batch.labels, batch.labels, 1.0)
    terms = Objective(options_of("--smoothing 0.3"), COUNTS).terms(logits, whole)
    torch.testing.assert_close(terms["loss"], F.cross_entropy(logits, batch.labels))
    assert terms["accuracy"] == (logits.argmax(1) == batch.labels).float().mean()


def test_accuracy_of_mixed_images_counts_both_labels(batch, logits):
    answers = logits.argmax(1)
    expected = 0.7 * (answers == batch.labels).float().mean() + 0.3 * (answers == batch.others).float().mean()
    assert Objective(options_of(), COUNTS).terms(logits, batch)["accuracy"] == pytest.approx(expected.item())


@pytest.mark.parametrize(
    "name", ["ce", "class-balanced", "focal", "balanced-softmax", "logit-adjustment", "ldam", "ldam-drw"]
)
def test_every_long_tail_loss_has_a_gradient(batch, logits, name):
    objective = Objective(options_of("--epochs 10 --long-tail", name), COUNTS)
    objective.new_epoch(1)
    objective.terms(logits, batch)["loss"].backward()
    assert bool(torch.isfinite(logits.grad).all()) and logits.grad.abs().sum() > 0


def test_deferred_weights_begin_late(batch, logits):
    objective = Objective(options_of("--epochs 10 --drw-start 0.8 --long-tail ldam-drw"), COUNTS)
    weights = []
    for epoch in range(1, 11):
        objective.new_epoch(epoch)
        weights.append(objective.loss.weight.clone())
    assert all(torch.equal(weight, torch.ones(4)) for weight in weights[:8])
    torch.testing.assert_close(weights[8], torch.tensor(class_weights(COUNTS)).float())
    assert torch.equal(weights[8], weights[9])


# -- schedule


@pytest.mark.parametrize("schedule", ("natural", "original"))
def test_recorded_steps_follow_the_schedule(recorded, schedule):
    """Weights and the reported rate of every step; one recording serves all rates."""

    def trained(record):
        torch.manual_seed(0)
        net, images = torch.nn.Linear(4, 2), torch.randn(24, 8, 4)
        optimizer = torch.optim.AdamW(net.parameters())
        words = f"--dataset c10 --schedule {schedule} --max-epochs 6 --warmup-epoch 2"
        step = ScheduledStep(plain_step, Schedule(options_of(words), 4))
        call, made = recorded(net, optimizer, step, lambda batch: {"loss": net(batch).square().mean()}, record=record)
        rates = [float(call(batch)["lr"]) for batch in images]
        assert len(made) == record and step.count == 24
        return rates, list(net.parameters())

    (found, one), (wanted, two) = trained(True), trained(False)
    assert found == wanted and len(set(wanted)) > 4
    torch.testing.assert_close(one, two, rtol=0, atol=0)


def rates(words, steps):
    schedule = Schedule(options_of(words), steps)
    return [schedule.at(step) for step in range(schedule.total)]


def test_the_original_schedule():
    """Published values by epoch, from 0, measured with the real scheduler; constant within an epoch."""
    found = rates("--dataset c10 --schedule original", 3)
    assert all(found[3 * e] == found[3 * e + 1] == found[3 * e + 2] for e in range(200))
    for epoch, value in {
        0: 0.0,
        1: 2e-4,
        4: 8e-4,
        5: 1e-3,
        6: 1e-3,
        8: 9.998e-4,
        100: 5.516e-4,
        198: 1.390e-5,
        199: 1.299e-5,
    }.items():
        assert found[3 * epoch] == pytest.approx(value, rel=5e-4), epoch


def test_the_natural_schedule():
    found = rates("--dataset c10 --epochs 20", 7)
    assert (
        found[0] == pytest.approx(1e-3 / 35)
        and found[34] == pytest.approx(1e-3)
        and found[-1] == pytest.approx(1e-5, rel=1e-9)
    )
    assert all(a < b for a, b in zip(found[:34], found[1:35], strict=True)) and all(
        a > b for a, b in zip(found[35:-1], found[36:], strict=True)
    )
    middle = 1e-5 + 0.5 * (1e-3 - 1e-5) * (1 + math.cos(math.pi * 52 / 104))
    assert found[35 + 52] == pytest.approx(middle)


@pytest.mark.parametrize(
    "words",
    [
        "--warmup-epoch 0",
        "--epochs 1 --warmup-epoch 0",
        "--epochs 2 --warmup-epoch 5",
        "--warmup-epoch 0 --schedule original",
    ],
)
def test_schedules_at_their_ends(words):
    found = rates(f"--dataset c10 {words}", 1)
    assert all(0 < rate <= 1e-3 + 1e-12 for rate in found)


def test_the_step_sets_the_rate_and_goes_on_from_a_checkpoint():
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    schedule = Schedule(options_of("--dataset c10 --epochs 4 --warmup-epoch 1"), 5)

    def inner(closure, optimizer):
        return {"loss": 0.0, "seen": optimizer.param_groups[0]["lr"]}

    step = ScheduledStep(inner, schedule)
    terms = [step(dict, optimizer) for _ in range(7)]
    assert [t["lr"] for t in terms] == [t["seen"] for t in terms] == [schedule.at(n) for n in range(7)]
    other = ScheduledStep(inner, schedule)
    other.load_state_dict(step.state_dict())
    assert other(dict, optimizer)["lr"] == schedule.at(7)


# -- optimizer and judging


def test_masses_and_lambdas_do_not_decay(digits):
    options = options_of("--model-name vit_gra --learn_lamb 1 --weight-decay 0.01")
    vision = Vision(options, digits)
    model = vision.build()
    training = vision.training(model)
    free = [p for group in training.optimizer.param_groups if group["weight_decay"] == 0 for p in group["params"]]
    names = {name for name, p in model.named_parameters() if any(p is q for q in free)}
    assert len(free) == 8 and all("mass" in name or "lamb" in name for name in names)
    assert sum(len(group["params"]) for group in training.optimizer.param_groups) == len(list(model.parameters()))


@pytest.mark.parametrize("kind", ["adam", "adamw"])
def test_the_optimizer_is_the_one_asked_for(digits, kind):
    options = options_of(f"--model-name vit --optimizer {kind} --beta1 0.8 --beta2 0.95")
    vision = Vision(options, digits)
    training = vision.training(vision.build())
    assert type(training.optimizer).__name__.lower() == kind and training.optimizer.defaults["betas"] == (0.8, 0.95)


def test_groups_partition_the_classes(digits):
    found = groups(digits.counts)
    for names in (("many", "medium", "few"), ("head", "mid", "tail")):
        assert sorted(int(c) for name in names for c in found[name]) == list(range(10))
    assert [len(found[name]) for name in ("head", "mid", "tail")] == [3, 4, 3]
    assert groups(np.full(10, 50)) == {}


def test_class_accuracies_average_to_the_overall_one(digits):
    """On a balanced test part, and so do the groups, weighted by their sizes."""
    test = digits.source.test
    logits = torch.randn(500, 10, generator=torch.Generator().manual_seed(0)) + 2 * F.one_hot(
        torch.from_numpy(test.labels), 10
    )
    found, parts = metrics(digits, logits, test), groups(digits.counts)
    assert found["accuracy"] == pytest.approx(found["balanced_accuracy"])
    for names in (("many", "medium", "few"), ("head", "mid", "tail")):
        whole = sum(len(parts[name]) * found[f"accuracy_{name}"] for name in names if len(parts[name]))
        assert whole / 10 == pytest.approx(found["accuracy"])


def test_predictions_are_those_of_the_network(digits):
    """Block by block equals at once, normalised by the train part's statistics."""
    options = options_of("--model-name vit --eval-batch-size 64")
    torch.manual_seed(0)
    model = Vision(options, digits).build().eval()
    found = Vision(options, digits).predict(model, digits.source.test)
    pixels = torch.from_numpy(digits.source.test.array()).permute(0, 3, 1, 2).float() / 255
    mean, std = digits.statistics
    with torch.no_grad():
        expected = model((pixels - mean[:, None, None]) / std[:, None, None])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    scaled = Vision(options_of("--model-name vit --long-tail ldam"), digits).predict(model, digits.source.test)
    torch.testing.assert_close(scaled, 30 * found, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "words",
    ["--model-name vit", "--mass_pos full", "--mass_pos tail --dist_mode l1", "--mass_from none", "--mass_from content --mass_pos head",
     "--mix_on 1 --mix_mode normal", "--mix_on 1 --mix_mode split --num_split 1 --mass_pos full_fix", "--mix_on 1 --mix_mode split --num_split 1 --split_mix 1 --off-cls-token"],
)  # fmt: skip
def test_64_images_are_learned_by_heart(digits, words):
    """Every mode reaches more than 99 % within 200 steps."""
    options = options_of(
        "--model-name vit_gra --hidden 32 --mlp-hidden 32 --head 2 --num_split 1 --num-layers 2 --lr 3e-3", words
    )
    torch.manual_seed(0)
    model = Vision(options, digits).build()
    where = np.random.default_rng(0).permutation(len(digits.source.train))[:64]
    images = torch.from_numpy(digits.source.train.array()[where]).permute(0, 3, 1, 2).float() / 128 - 1
    labels = torch.from_numpy(digits.source.train.labels[where])
    optimizer = torch.optim.Adam(model.parameters(), lr=options.lr)
    for _ in range(200):
        logits = model(images)
        if (logits.argmax(1) == labels).float().mean() > 0.99:
            return
        optimizer.zero_grad()
        F.cross_entropy(logits, labels).backward()
        optimizer.step()
    pytest.fail("not learned by heart after 200 steps")


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "configs" / "vision").glob("*.toml")), ids=lambda path: path.stem
)
def test_stored_settings_are_flags(path):
    options = options_of("--config", path)
    assert options.hidden == 96 and options.dot_scale == "sqrt_head"


# -- flags


def test_the_published_command_parses_word_for_word():
    options = options_of(SEED_COMMAND)
    assert (options.model, options.epochs, options.hidden, options.head, options.lamb_gra, options.mass_pos) == (
        "vit_gra",
        200,
        384,
        12,
        3.0,
        "tail",
    )
    assert (options.imb_type, options.imb_factor, options.seed, options.patch, options.batch_size) == (
        "exp",
        0.01,
        42,
        8,
        128,
    )
    seed = Path(__file__).parents[3] / "shared" / "seeds" / "gfml.md"
    if seed.is_file():
        assert SEED_COMMAND in seed.read_text(encoding="utf-8")


def test_published_defaults():
    """Every flag of the published program, by its name, with its default (the bare program aside)."""
    options = options_of("--dataset c10")
    published = {
        "api_key": None, "model_name": ("vit_gra",), "patch": 8, "batch_size": 128, "eval_batch_size": 1024, "lr": 1e-3, "min_lr": 1e-5, "beta1": 0.9,
        "beta2": 0.999, "off_benchmark": False, "epochs": 200, "dry_run": False, "weight_decay": 5e-5, "warmup_epoch": 5, "precision": 16,
        "autoaugment": False, "criterion": "ce", "label_smoothing": False, "smoothing": 0.1, "rcpaste": False, "cutmix": False, "mixup": False,
        "dropout": 0.0, "head": 12, "num_layers": 7, "hidden": 384, "mlp_hidden": 384, "off_cls_token": False, "seed": 42, "project_name": "vit-gravity",
        "lamb_gra": 1.0, "lamb_mix": 0.5, "mix_on": 0, "mix_mode": "normal", "score_norm": 1, "dist_mode": "l2", "mass_pos": "full", "num_split": 6,
        "split_mix": 0,
    }  # fmt: skip
    assert {name: getattr(options, name) for name in published} == published


def test_the_config_of_a_run_reads_back(tmp_path):
    from gfml.base.toml import toml_text

    for words in ("", "--dataset c10", SEED_COMMAND, "--model-name vit --imb-type balanced --ema 0.99 --clip-grad 1"):
        options = options_of(words)
        (tmp_path / "config.toml").write_text(toml_text(options.resolved))
        again = options_of("--config", tmp_path / "config.toml")
        assert again.resolved == options.resolved


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model-nam vit", "unknown flag --model-nam; did you mean '--model-name'?"),
        ("--mass_pos middle", "choose one of full, full_fix, head, tail"),
        ("--model-name vit vit", "names a model twice"),
        ("--model-name vit vit_gra --run-name a", "give one --model-name"),
        (
            "--model-name vit_gra --mix_on 1 --mix_mode split --num_split 9 --head 4",
            "num_split may be 0 to the number of heads",
        ),
        ("--hidden 100 --head 12", "heads must divide the width"),
        ("--min-lr 1 --lr 0.1", "above --lr"),
        ("--long-tail focal --label-smoothing", "drop --label-smoothing"),
        ("--mirror two_step --clip-grad 1", "--mirror-clip"),
        ("--learn_lamb 1 --lamb_gra 0", "starts above 0"),
        ("--dataset c10 --imb-type exp", "needs --imb-factor"),
        ("--imb-type balanced --imb-factor 0.1", "drop one of them"),
        ("--lamb_mix 1.5", "wanted a number >= 0 and <= 1"),
        ("--epochs -1", "wanted a whole number >= 0"),
    ],
)
def test_wrong_flags_are_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        PROGRAM.parse(words.split())
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1
