"""Heads fitted to embeddings: against loops and closed forms, and the choice among them."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmft_hf import ClassPrototypes
from mmft_hf.core.errors import UserError
from mmft_hf.predict.fitting import NAMES as LISTED
from mmft_hf.predict.fitting import auto
from mmft_hf.predict.fitting.data import HeadData
from mmft_hf.predict.fitting.heads import FITTERS, combined, fit_head, possible
from mmft_hf.predict.fitting.logistic import regression
from mmft_hf.predict.heads import KernelHead, LinearHead, load_head
from mmft_hf.predict.metrics import report

CLASSES, SIZE, SCALE = 4, 12, 20.0
NAMES = [f"class {c}" for c in range(CLASSES)]


def unit(x):
    return F.normalize(x, dim=1)


def world(shots=6, noise=0.35, gap=1.0, captions=5, seed=0):
    """Pictures and captions around one direction for each class, the captions shifted by a constant gap."""
    rng = torch.Generator().manual_seed(seed)
    means = unit(torch.randn(CLASSES, SIZE, generator=rng))
    shift = gap * unit(torch.randn(1, SIZE, generator=rng))
    labels = torch.arange(CLASSES).repeat_interleave(shots)

    def around(which, offset):
        return unit(means[which] + offset + noise * torch.randn(len(which), SIZE, generator=rng))

    caption_labels = torch.arange(CLASSES).repeat_interleave(captions)
    texts = around(caption_labels, shift)
    sums = torch.zeros(CLASSES, SIZE).index_add_(0, caption_labels, texts)
    own = ClassPrototypes(unit(sums), NAMES, SCALE, "captions")
    data = HeadData(own, unit(means + shift), around(labels, 0), labels, texts, caption_labels)
    test = torch.arange(CLASSES).repeat_interleave(100)
    return data, around(test, 0), test


def accuracy(head, x, y):
    return (head.logits(x).argmax(dim=1) == y).double().mean().item()


@pytest.mark.parametrize("name", FITTERS)
def test_every_head_learns_saves_and_is_read_back(name, tmp_path):
    data, x, y = world()
    head = fit_head(name, data)
    assert accuracy(head, x, y) > 0.8 and head.fitted["head"] == name and head.fitted["images"] == len(data.images)
    head.save_pretrained(tmp_path)
    torch.testing.assert_close(load_head(tmp_path).logits(x), head.logits(x))


@pytest.mark.parametrize(("beta", "ridge"), [(5.5, 1.0), (1.0, 10.0)])
def test_the_kernel_head_is_a_ridge_regression(beta, ridge):
    data, x, _ = world()
    head = fit_head("kernel", data, beta=beta, ridge_weight=ridge)
    train, texts = data.images.double().numpy(), data.texts.numpy()
    n = len(train)
    kernel = np.array([[math.exp(-beta * (1 - float(a @ b))) for b in train] for a in train])
    left = np.eye(CLASSES)[data.labels] - train @ texts.T
    values = np.linalg.solve(kernel + ridge * np.eye(n), left)
    near = np.array([[math.exp(-beta * (1 - float(q @ k))) for k in train] for q in x.double().numpy()])
    expected = SCALE * (x.double().numpy() @ texts.T + near @ values)
    np.testing.assert_allclose(head.logits(x).numpy(), expected, atol=0.05)  # keys and values are stored in float16
    published = np.linalg.solve(kernel / ridge + np.eye(n), left)  # the authors' code lacks the factor 1/λ
    assert np.allclose(published, values) == (ridge == 1.0)


def test_the_logistic_head_without_texts_is_that_of_scikit_learn():
    sklearn = pytest.importorskip("sklearn.linear_model")
    data, x, _ = world(shots=20)
    inputs = data.inputs(data.texts)
    weight, bias = regression(inputs._replace(zero_shot=torch.zeros_like(inputs.zero_shot)), SCALE, strength=10.0)
    model = sklearn.LogisticRegression(C=10.0, tol=1e-8, max_iter=2000).fit(data.images.double().numpy(), data.labels)
    found = (x.double() @ weight.T + bias).softmax(dim=1).numpy()
    np.testing.assert_allclose(found, model.predict_proba(x.double().numpy()), atol=5e-4)


def test_the_logistic_head_stays_at_the_texts_without_evidence_and_leaves_them_with_much():
    data, x, y = world(shots=60, noise=0.4)
    wrong = replace(data, prototypes=replace(data.prototypes, embeddings=data.prototypes.embeddings[[1, 0, 3, 2]]))
    wrong.templates = wrong.templates[[1, 0, 3, 2]]
    timid = fit_head("logistic", data, strength=1e-6)
    torch.testing.assert_close(timid.weight, SCALE * data.texts.float(), atol=0.01, rtol=0)
    assert accuracy(fit_head("prototypes", wrong), x, y) < 0.2
    assert accuracy(fit_head("logistic", wrong), x, y) > 0.85


def test_a_head_is_fitted_once_for_each_data(monkeypatch):
    data, _, _ = world()
    fits = []
    counted = replace(FITTERS["kernel"], fit=lambda data, fit=FITTERS["kernel"].fit: fits.append(data) or fit(data))
    monkeypatch.setitem(FITTERS, "kernel", counted)
    fit_head("mean", data)
    kernel = fit_head("kernel", data)
    assert len(fits) == 1 and fit_head("kernel", data) is kernel
    other = fit_head("kernel", replace(data, images=data.images.flip(0), labels=data.labels.flip(0)))
    assert len(fits) == 2 and other is not kernel


def test_a_mean_of_heads_is_one_head_with_their_mean_logits():
    data, x, _ = world()
    members = [fit_head(name, data) for name in ("prototypes", "linear", "gda", "kernel")]
    shares = [0.4, 0.3, 0.2, 0.1]
    found = combined(members, shares)
    assert isinstance(found, KernelHead) and isinstance(combined(members[:3], shares[:3]), LinearHead)
    expected = sum(share * member.logits(x) for share, member in zip(shares, members, strict=True))
    torch.testing.assert_close(found.logits(x), expected, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(
        combined(members[:3], shares[:3]).logits(x), expected - 0.1 * members[3].logits(x), atol=1e-4, rtol=1e-4
    )


def test_members_of_a_mean_spread_alike_and_no_label_of_others_is_read():
    data, x, _ = world()
    found = fit_head("mean", data)
    members = [fit_head(name, data) for name in ("prototypes", "gda", "kernel")]
    spreads = [m.logits(data.captions).std(dim=1).mean() for m in members]
    expected = sum(spreads[0] / s / 3 * m.logits(x) for s, m in zip(spreads, members, strict=True))
    torch.testing.assert_close(found.logits(x), expected, atol=5e-3, rtol=1e-3)


def test_a_head_without_what_it_needs_is_refused_or_left_out():
    data, _, _ = world()
    bare = replace(data, captions=torch.zeros(0, SIZE), caption_labels=torch.zeros(0, dtype=torch.long))
    for name in ("timo", "text"):
        assert possible(name, data) and not possible(name, bare)
        with pytest.raises(UserError, match=rf"head {name}: expected captions"):
            fit_head(name, bare)
    keep = data.labels != 2  # a class all of whose pictures are unreadable
    some = replace(data, images=data.images[keep], labels=data.labels[keep])
    assert not possible("gda", some) and not possible("timo", some)
    with pytest.raises(UserError, match="at least one example of each of the 4 classes"):
        fit_head("gda", some)
    fit_head("mean", some)
    fit_head("mean", bare)
    with pytest.raises(UserError, match="expected auto or one of prototypes, linear"):
        fit_head("knn", data)


def test_captions_alone_make_a_head_and_shuffled_ones_do_not():
    data, x, y = world(gap=1.0, captions=30)
    assert accuracy(fit_head("text", data), x, y) > 0.9
    order = torch.randperm(len(data.captions), generator=torch.Generator().manual_seed(0))
    shuffled = replace(data, captions=data.captions[order])
    shuffled.prototypes = replace(data.prototypes, embeddings=data.prototypes.embeddings[[0, 0, 0, 0]])
    shuffled.templates = shuffled.prototypes.embeddings
    assert accuracy(fit_head("text", shuffled), x, y) < 0.6


# -- auto -------------------------------------------------------------------------------------------------------------
def validation(n=200, seed=3):
    _, x, y = world(seed=0)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:n]
    return x[order], y[order]


def candidates(x, y, groups, tuned_noise=0.0, names=auto.CANDIDATES):
    data, _, _ = world()
    found = []
    for alpha in (0.0, 0.5, 1.0):
        noise = alpha * tuned_noise * torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
        for name in names:
            found.append(auto.candidate(alpha, name, fit_head(name, data), unit(x + noise), y, groups))
    return found


def test_with_little_validation_nothing_but_the_default_is_taken():
    x, y = validation(auto.FEWEST - 1)
    groups = torch.arange(len(x))
    for labels in (y, y.flip(0), torch.zeros_like(y)):
        choice = auto.choose(candidates(x, labels, groups, tuned_noise=2.0), groups)
        assert (choice.chosen.alpha, choice.chosen.name) == (0.5, "kernel") and "too few" in choice.reason


def test_weights_that_tuning_spoilt_are_left_behind():
    x, y = validation()
    groups = torch.arange(len(x))
    choice = auto.choose(candidates(x, y, groups, tuned_noise=2.0), groups)
    assert choice.chosen.alpha == 0.0 and "tuning did not help" in choice.reason
    equal = auto.choose(candidates(x, y, groups), groups)
    assert equal.chosen.alpha == 0.0  # equally good weights: the untuned ones


def test_another_head_must_be_better_by_more_than_one_standard_error():
    x, y = validation()
    groups = torch.arange(len(x))
    found = candidates(x, y, groups)
    default = next(c for c in found if (c.alpha, c.name) == (0.0, "kernel"))
    error = auto.standard_error(torch.randn(len(x), dtype=torch.float64), groups)
    assert error == pytest.approx(1 / math.sqrt(len(x)), rel=0.2)
    noise = torch.randn(len(x), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    noise = (noise - noise.mean()) / noise.std()
    for gain, accuracy, expected in (
        (0.5, 1.0, "kernel"),
        (2.0, 1.0, "mean"),
        (2.0, default.accuracy - 0.01, "kernel"),
    ):
        losses = default.losses - gain / math.sqrt(len(x)) - noise
        changed = [
            replace(c, losses=losses, accuracy=accuracy) if (c.alpha, c.name) == (0.0, "mean") else c for c in found
        ]
        assert auto.choose(changed, groups).chosen.name == expected


def test_pictures_that_are_nearly_alike_count_as_one():
    x, _ = validation(100)
    copies = unit(x.repeat_interleave(2, dim=0) + 1e-2 * torch.randn(200, SIZE))
    groups = auto.groups_of(copies)
    assert torch.equal(groups[::2], groups[1::2]) and len(groups.unique()) <= 100
    halves = auto.halves_of(groups)
    assert torch.equal(halves[::2], halves[1::2]) and 0.3 < halves.double().mean() < 0.7
    values = torch.randn(100, dtype=torch.float64).repeat_interleave(2)
    pairs = torch.arange(100).repeat_interleave(2)
    assert auto.standard_error(values, pairs) == pytest.approx(auto.standard_error(values[::2], pairs[::2]))
    assert auto.standard_error(values, pairs) > 1.3 * auto.standard_error(values, torch.arange(200))
    assert len(auto.groups_of(unit(torch.ones(60, SIZE) + 1e-4 * torch.randn(60, SIZE))).unique()) == 60
    assert auto.are_among(copies, copies[:3]).sum() == 3


def test_pictures_that_tuning_drew_together_are_not_taken_for_the_training_pictures():
    x, _ = validation(120)
    near = unit(x[:1] + 6e-3 * x)  # cosines above 0.9999
    assert (near @ near.T).min() > auto.IDENTICAL
    assert auto.are_among(near[60:], near[:60]).sum() == 0
    assert auto.are_among(near, near[:60]).sum() == 60


def test_of_the_heads_that_are_better_the_most_accurate_is_taken():
    groups, noise = torch.arange(80), torch.randn(80, generator=torch.Generator().manual_seed(0)).double()

    def judged(name, loss, accuracy):
        return auto.Candidate(0.0, name, None, loss + 0.1 * noise.roll(len(name)), accuracy)

    default, linear, mean = judged("kernel", 2.0, 0.3), judged("linear", 1.0, 0.4), judged("mean", 1.1, 0.5)
    lucky = judged("prototypes", 1.999, 0.9)  # not shown to be better
    assert auto.choose([default, linear, mean, lucky], groups).chosen is mean
    assert auto.choose([default, linear, lucky], groups).chosen is linear
    assert auto.choose([default, lucky], groups).chosen is default


def test_temperatures_come_from_the_other_half():
    """A head that knows the validation labels by heart looks perfect only by its own half's temperature."""
    x, y = validation()
    groups = torch.arange(len(x))
    data, _, _ = world()
    sharp = replace(fit_head("mean", data), temperature=0.01)  # calibration ignores the temperature it had
    plain = auto.candidate(0.0, "mean", fit_head("mean", data), x, y, groups)
    torch.testing.assert_close(auto.candidate(0.0, "mean", sharp, x, y, groups).losses, plain.losses)
    halves = auto.halves_of(groups)
    shuffled = y.clone()
    shuffled[halves] = y[halves].flip(0)
    spoilt = auto.candidate(0.0, "mean", fit_head("mean", data), x, shuffled, groups)
    assert spoilt.losses[~halves].mean() > plain.losses[~halves].mean()  # by temperatures of wrong labels


# -- a named metric ----------------------------------------------------------------------------------------------------
def test_what_errors_cost_is_one_minus_the_metric():
    g = torch.Generator().manual_seed(0)
    logits, labels = (
        torch.randn(60, 8, generator=g),
        torch.randint(0, 7, (60,), generator=g) ** 2 // 7,
    )  # no image of some classes
    logits[torch.arange(60), labels] += 1
    expected = report(logits.numpy(), labels.numpy(), [str(c) for c in range(8)])
    for metric in ("accuracy", "mean_per_class_accuracy", "top5_accuracy"):
        errors = auto.errors_of(metric, logits.double(), labels)
        assert errors.shape == (60,) and errors.mean().item() == pytest.approx(1 - expected[metric]), metric
    assert auto.errors_of("loss", logits, labels) is None is auto.errors_of(None, logits, labels)


@pytest.mark.parametrize(("better", "worse", "groups"), [(9, 4, 1), (9, 5, 1), (12, 6, 2), (3, 0, 1), (1, 0, 1)])
def test_errors_differ_by_more_than_one_standard_error_as_in_mcnemars_test(better, worse, groups):
    """z = (b - c) / sqrt(b + c), where b and c images are right with one of two heads alone; copies count as one."""
    n = 100 * groups
    errors = torch.zeros(2, n, dtype=torch.float64)
    errors[1, : better * groups], errors[0, -worse * groups or n :] = 1, 1
    one, other = (auto.Candidate(0.0, "mean", None, row, 0.0, row) for row in errors)
    z = (better - worse) / math.sqrt(better + worse) * math.sqrt(99 / 100)
    assert auto.lower(one, other, torch.arange(n) // groups) == (z > 1)


def answers_of(right, counts, sure):
    """Logits of as many right answers in each class, and wrong ones for the next class."""
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    said = torch.cat([(torch.arange(n) >= k).long() + c for c, (k, n) in enumerate(zip(right, counts, strict=True))])
    return sure * F.one_hot(said % len(counts), len(counts)).double(), labels


@dataclass
class Told:
    """A head that gives these logits."""

    logits: torch.Tensor

    def raw_logits(self, image_embeds):
        return self.logits


# Of 80 images of one class and 12 of each of six others: which candidate is best by which metric.
COUNTS = (80, *[12] * 6)
BY_METRIC = {
    "kernel": answers_of((60, *[6] * 6), COUNTS, 2.0),
    "mean": answers_of((80, *[4] * 6), COUNTS, 2.0),  # most right answers
    "linear": answers_of((40, *[8] * 6), COUNTS, 2.0),  # most in the mean over the classes
}


@pytest.mark.parametrize(("metric", "expected"), [("accuracy", "mean"), ("mean_per_class_accuracy", "linear")])
def test_weights_and_head_are_chosen_by_the_metric_that_is_named(metric, expected):
    _, y = BY_METRIC["kernel"]
    groups = torch.arange(len(y))

    def judged(alpha, name, like):
        return auto.candidate(alpha, name, Told(BY_METRIC[like][0]), torch.zeros(len(y), 2), y, groups, metric)

    heads = [judged(0.0, name, name) for name in BY_METRIC]
    choice = auto.choose(heads, groups, metric=metric)
    assert choice.chosen.name == expected and f"this head is better on validation by {metric}" in choice.reason
    assert choice.metric == metric and choice.by_validation
    weights = [judged(0.0, "kernel", "kernel"), judged(0.5, "kernel", "kernel"), judged(1.0, "kernel", expected)]
    weights[0].errors = weights[0].errors + 0.01
    choice = auto.choose(weights, groups, metric=metric)
    assert choice.chosen.alpha == 1.0 and f"the tuned weights are better on validation by {metric}" in choice.reason
    spoilt = [judged(0.0, "kernel", expected), *weights[1:]]
    choice = auto.choose(spoilt, groups, metric=metric)
    assert choice.chosen.alpha == 0.0 and f"tuning did not help on validation by {metric}" in choice.reason


def test_the_settings_list_every_head():
    assert tuple(FITTERS) == LISTED
