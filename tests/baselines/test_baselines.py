"""The baselines on frozen features against scikit-learn, loops over single numbers, and autograd."""

import ast
import builtins
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mmft_hf
from mmft_hf.baselines import clap, gda, linear, lp_plus_plus, proker, tip_adapter
from mmft_hf.core.errors import UserError
from mmft_hf.predict.fitting import inputs

QUICK = {"epochs": 30}
# Each method as (train_x, train_y, test_x, zero_shot) -> scores, with whatever it needs of them.
METHODS = {
    "lp": lambda x, y, t, w: linear.logistic_regression(x, y, t, C=30),
    "gda": lambda x, y, t, w: gda.gda(x, y, t, w),
    "tip": lambda x, y, t, w: tip_adapter.tip(x, y, t, w, alpha=10),
    "tip-f": lambda x, y, t, w: tip_adapter.tip_f(x, y, t, w, alpha=10),
    "lp++": lp_plus_plus.lp_plus_plus,
    "zs-lp": lambda x, y, t, w: clap.zs_lp(x, y, t, w, **QUICK),
    "clap": lambda x, y, t, w: clap.clap(x, y, t, w, **QUICK),
    "proker": lambda x, y, t, w: proker.proker(x, y, t, w, beta=20, ridge=0.1),
}
WITH_TEXTS = ("gda", "tip", "tip-f", "lp++", "zs-lp", "clap", "proker")


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def planted(counts=(9, 9, 9, 9, 9), size=12, noise=0.25, text_noise=0.3, seed=0, test=40):
    """Clusters on the sphere: train_x, train_y, test_x, test_y, and class weights that are near the centres."""
    g = np.random.default_rng(seed)
    centres = unit(g.normal(size=(len(counts), size)))
    y, test_y = np.repeat(np.arange(len(counts)), counts), np.repeat(np.arange(len(counts)), test)
    order = g.permutation(len(y))
    x, t = (unit(centres[labels] + noise * g.normal(size=(len(labels), size))) for labels in (y[order], test_y))
    return x, y[order], t, test_y, unit(centres + text_noise * g.normal(size=centres.shape))


def zero_shot(x, w):
    return 100 * x @ w.T


def accuracy(scores, y):
    return (scores.argmax(axis=1) == y).mean()


def softmax(scores):
    scores = np.exp(scores - scores.max(axis=1, keepdims=True))
    return scores / scores.sum(axis=1, keepdims=True)


# --- Against scikit-learn


@pytest.mark.parametrize("counts", [(9, 9, 9, 9, 9), (1, 2, 7, 30), (5, 8)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_logistic_regression_is_that_of_scikit_learn(counts, dtype):
    from sklearn.linear_model import LogisticRegression

    x, y, t, *_ = planted(counts)
    x, t = x.astype(dtype), t.astype(dtype)
    for C, extra in ((1.0, {}), (30.0, {"C": 30.0})):
        model = LogisticRegression(C=C, max_iter=1000).fit(x, y)
        scores = linear.logistic_regression(x, y, t, **extra)
        assert scores.shape == (len(t), len(counts)) and scores.dtype == np.float64
        np.testing.assert_allclose(softmax(scores), model.predict_proba(t), atol=1e-6)
        if len(counts) > 2:
            np.testing.assert_allclose(scores, model.decision_function(t), atol=1e-6)
        else:
            np.testing.assert_allclose(scores[:, 1] - scores[:, 0], model.decision_function(t), atol=1e-6)


@pytest.mark.parametrize(("per_class", "size"), [(4, 12), (2, 40)])
def test_gda_is_shrunk_linear_discriminant_analysis_times_a_known_factor(per_class, size):
    """For classes of equal size the ridge is scikit-learn's shrinkage of D / (D + n - 1), up to the scale of the scores."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    x, y, t, _, w = planted((per_class,) * 5, size)
    n = len(x)
    model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=size / (size + n - 1)).fit(x, y)
    factor = size * (n - 1) / (n * (n - 1 + size))
    prior = math.log(1 / 5)
    gaussians = gda.gda(x, y, t, w) - zero_shot(t, w)
    np.testing.assert_allclose(gaussians - prior, factor * (model.decision_function(t) - prior), atol=1e-6)


def test_chosen_strength_is_the_best_of_all_fits_from_scratch():
    from sklearn.linear_model import LogisticRegression

    x, y, t, test_y, _ = planted((3,) * 6, noise=0.4)
    grid = np.logspace(-6, 6, 96)
    assert np.allclose(linear.STRENGTHS, grid)
    found = [accuracy(LogisticRegression(C=C, max_iter=1000).fit(x, y).predict_proba(t), test_y) for C in grid[30:70:4]]
    choice = linear.choose(x, y, t, test_y)
    assert choice.tried == 96 and choice.accuracy >= max(found) - 1e-9
    scores = linear.logistic_regression(x, y, t, **choice.parameters)
    assert accuracy(scores, test_y) == choice.accuracy


# --- Against loops


def loop_gda(x, y, t, w, alpha, scale):
    n, size = x.shape
    classes = range(y.max() + 1)
    means = [sum(x[i] for i in range(n) if y[i] == c) / sum(y[i] == c for i in range(n)) for c in classes]
    cov = np.zeros((size, size))
    for i in range(n):
        cov += np.outer(x[i] - means[y[i]], x[i] - means[y[i]]) / (n - 1)
    inverse = size * np.linalg.inv((n - 1) * cov + np.trace(cov) * np.eye(size))
    scores = np.array([[m @ inverse @ f + math.log(1 / len(classes)) - m @ inverse @ m / 2 for m in means] for f in t])
    return np.array([[scale * f @ v for v in w] for f in t]) + alpha * scores


def loop_tip(x, y, t, w, alpha, beta, scale):
    scores = [[scale * sum(f * v) for v in w] for f in t]
    for row, f in zip(scores, t, strict=True):
        for key, c in zip(x, y, strict=True):
            row[c] += alpha * math.exp(-beta * (1 - sum(f * key)))
    return np.array(scores)


def test_gda_equals_its_formula():
    x, y, t, _, w = planted((1, 2, 3, 6), size=5, test=3)
    np.testing.assert_allclose(gda.gda(x, y, t, w), loop_gda(x, y, t, w, 1.0, 100.0), atol=1e-9)
    np.testing.assert_allclose(gda.gda(x, y, t, w, 0.1, 30.0), loop_gda(x, y, t, w, 0.1, 30.0), atol=1e-9)


def test_gda_of_one_image_per_class_is_the_nearest_mean():
    x, y, t, _, w = planted((1,) * 6)
    distances = np.linalg.norm(t[:, None] - x[np.argsort(y)][None], axis=2)
    assert ((gda.gda(x, y, t, w) - zero_shot(t, w)).argmax(axis=1) == distances.argmin(axis=1)).all()


def test_tip_equals_its_formula():
    x, y, t, _, w = planted((1, 3, 2), size=4, test=2)
    np.testing.assert_allclose(tip_adapter.tip(x, y, t, w, 2.0, 3.0, 20.0), loop_tip(x, y, t, w, 2.0, 3.0, 20.0))
    np.testing.assert_allclose(tip_adapter.tip(x, y, t, w, 2.0), loop_tip(x, y, t, w, 2.0, 5.5, 100.0))


def test_tip_in_parts_is_tip_at_once():
    x, y, t, _, w = planted(test=300)  # 1,500 test rows, in parts of 1,024
    whole = tip_adapter.tip(x, y, t, w)
    np.testing.assert_allclose(
        np.concatenate([tip_adapter.tip(x, y, t[i : i + 1], w) for i in (0, 1023, 1024, 1499)]),
        whole[[0, 1023, 1024, 1499]],
    )


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor has that is computed within."""

    found = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.found = max(self.found, result.numel())
        return result


@pytest.mark.parametrize("most", [None, 7 * 600])
def test_tip_holds_few_similarities_at_once_and_finds_the_same(most, monkeypatch):
    x, y, t, test_y, w = planted((200,) * 3, size=3, noise=0.7, text_noise=0.9, test=400)  # 600 keys, 1,200 images

    def tip(alpha, beta):
        return 20 * t @ w.T + alpha * np.exp(-beta * (1 - t @ x.T)) @ np.eye(3)[y]

    if most:
        monkeypatch.setattr(tip_adapter, "MOST_SIMILARITIES", most, raising=False)
    with Largest() as largest:
        scores = tip_adapter.tip(x, y, t, w, 2.0, 3.0, scale=20)
        choice = tip_adapter.choose(x, y, t, test_y, w, scale=20)
    assert largest.found <= (most or 1024 * 600)
    np.testing.assert_allclose(scores, tip(2.0, 3.0))
    grid = [accuracy(tip(alpha, beta), test_y) for alpha in tip_adapter.ALPHAS for beta in tip_adapter.BETAS]
    assert choice.accuracy == max(grid) == accuracy(tip(**choice.parameters), test_y) > min(grid)


def test_a_step_of_tip_f_is_the_first_step_of_adam():
    """Adam's first step is lr * g / (|g| + eps), here with g by finite differences, and AdamW's decay of 0.01 before it."""
    x, y, t, _, w = planted((2, 1), size=3, test=2)

    def loss(keys):
        p = softmax(loop_tip(keys, y, x, w, tip_adapter.ALPHA, tip_adapter.BETA, 5.0))
        return -np.log(p[range(len(y)), y]).mean()

    gradient = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[i] = 1e-5
        gradient[i] = (loss(x + step) - loss(x - step)) / 2e-5
    keys = x * (1 - 0.02 * 0.01) - 0.02 * gradient / (np.abs(gradient) + 1e-4)
    scores = tip_adapter.tip_f(x, y, t, w, 3.0, 2.0, scale=5.0, epochs=1, learning_rate=0.02)
    np.testing.assert_allclose(scores, loop_tip(keys, y, t, w, 3.0, 2.0, 5.0), atol=2e-4)


def test_lp_plus_plus_gradients_are_those_of_autograd():
    x, y, _, _, w = (torch.tensor(a) for a in planted((1, 5, 2)))
    g = torch.Generator().manual_seed(0)
    v = torch.randn(3, 12, generator=g, dtype=torch.float64, requires_grad=True)
    a = torch.randn(3, generator=g, dtype=torch.float64, requires_grad=True)
    loss = torch.nn.functional.cross_entropy(x @ (v + a[:, None] * w).T, y)
    loss.backward()
    found = lp_plus_plus.loss_and_gradients(x, x @ w.T, y, v.detach(), a.detach())
    for one, other in zip(found, (loss, v.grad, a.grad), strict=True):
        torch.testing.assert_close(one, other.detach())


def test_lp_plus_plus_starts_from_class_means_whatever_the_class_sizes():
    x, y, *_, w = planted((1, 5, 2))
    v, a, _ = lp_plus_plus.fit(inputs.check(x, y, x, w), scale=40.0, iterations=0)
    own = []
    for c in range(3):
        np.testing.assert_allclose(v[c], x[y == c].mean(axis=0))
        own.append(np.mean([f @ w[c] for f in x[y == c]]))
    np.testing.assert_allclose(a, 100 * np.mean(own))  # the paper's 250 at its models' scale of 100


def test_lp_plus_plus_takes_the_steps_that_it_names():
    """23 iterations by torch's SGD and autograd, a after every tenth of them."""
    x, y, t, _, w = planted((1, 5, 2, 4), noise=0.4)
    n = len(y)
    v = torch.tensor(np.array([x[y == c].mean(axis=0) for c in range(4)]), requires_grad=True)
    own = [np.mean(x[y == c] @ w[c]) for c in range(4)]
    a = torch.full((4,), 250 * np.mean(own), dtype=torch.float64, requires_grad=True)
    of_v = torch.optim.SGD([v], lr=4 * n / np.linalg.eigvalsh(x.T @ x)[-1], momentum=0.9)
    of_a = torch.optim.SGD([a], lr=n / (4 * max(sum((x @ w.T) ** 2))))
    examples, texts = torch.tensor(x), torch.tensor(w)
    for i in range(23):
        for optimizer in (of_v, of_a) if i in (9, 19) else (of_v,):
            of_v.zero_grad()
            of_a.zero_grad()
            torch.nn.functional.cross_entropy(examples @ (v + a[:, None] * texts).T, torch.tensor(y)).backward()
            optimizer.step()
    expected = torch.tensor(t) @ (v + a[:, None] * texts).T
    np.testing.assert_allclose(lp_plus_plus.lp_plus_plus(x, y, t, w, iterations=23), expected.detach(), atol=1e-8)


def test_step_sizes_of_lp_plus_plus_make_the_loss_fall():
    """Twice the inverse of the Lipschitz constant: without momentum the loss never rises; with it, it falls further."""
    x, y, *_, w = planted((1, 5, 9, 2), noise=0.5)
    checked = inputs.check(x, y, x, w)
    *_, plain = lp_plus_plus.fit(checked, momentum=0.0)
    *_, heavy = lp_plus_plus.fit(checked)
    assert all(after <= before + 1e-12 for before, after in itertools.pairwise(plain))
    assert heavy[-1] < plain[-1] < plain[0]


def test_multipliers_of_clap_are_mean_zero_shot_probabilities():
    x, y, *_, w = planted((1, 5, 0, 2))
    found = clap.multipliers(inputs.check(x, y, x, w), 7.0)
    own = [softmax(7.0 * x[i : i + 1] @ w.T)[0, y[i]] for i in range(len(y))]
    means = {c: np.mean([own[i] for i in range(len(y)) if y[i] == c]) for c in (0, 1, 3)}
    np.testing.assert_allclose(found, [means[0], means[1], np.mean(list(means.values())), means[3]])


def test_a_step_of_clap_is_a_step_of_its_loss():
    """One step leaves the penalty without effect, two do not; both against finite differences in one batch."""
    x, y, t, _, w = planted((2, 1), size=3, test=2)
    penalty = clap.multipliers(inputs.check(x, y, x, w), 5.0).numpy()

    def loss(v, strength):
        p = softmax(5.0 * x @ unit(v).T)
        return -np.log(p[range(len(y)), y]).mean() + (strength * ((v - w) ** 2).sum(axis=1)).sum()

    for method, strength in ((clap.zs_lp, 0 * penalty), (clap.clap, penalty)):
        v, speed = w.copy(), np.zeros_like(w)
        for step in range(2):
            gradient = np.zeros_like(w)
            for i in np.ndindex(w.shape):
                d = np.zeros_like(w)
                d[i] = 1e-5
                gradient[i] = (loss(v + d, strength) - loss(v - d, strength)) / 2e-5
            speed = 0.9 * speed + gradient
            v = v - 0.2 * (1 + math.cos(math.pi * step / 2)) / 2 * speed
        scores = method(x, y, t, w, scale=5.0, epochs=2, learning_rate=0.2)
        np.testing.assert_allclose(scores, 5.0 * t @ unit(v).T, atol=1e-5)


def test_clap_stays_nearer_to_its_start_than_zs_lp():
    x, y, t, _, w = planted((1,) * 5, text_noise=0.1)
    start = zero_shot(t, w)
    near, free = (np.abs(f(x, y, t, w, learning_rate=0.1) - start).mean() for f in (clap.clap, clap.zs_lp))
    assert 0 < near < 0.8 * free


# --- What holds for all of them


@pytest.mark.parametrize("name", METHODS)
def test_learns_what_is_planted_and_nothing_from_permuted_labels(name):
    x, y, t, test_y, w = planted((1, 2, 12, 30, 8))  # unequal classes, one of one image
    assert accuracy(METHODS[name](x, y, t, w), test_y) > 0.75
    # Permuted labels and texts of nothing: over several draws, chance is 1/5.
    found = []
    for seed in range(6):
        g = np.random.default_rng(seed)
        x, y, t, test_y, w = planted(seed=seed)
        found.append(accuracy(METHODS[name](x, g.permutation(y), t, unit(g.normal(size=w.shape))), test_y))
    assert 0.05 < np.mean(found) < 0.4


@pytest.mark.parametrize("name", WITH_TEXTS)
def test_examples_help_beyond_the_texts(name):
    gains = []
    for seed in range(3):
        x, y, t, test_y, w = planted((8,) * 5, text_noise=0.5, seed=seed)
        gains.append(accuracy(METHODS[name](x, y, t, w), test_y) - accuracy(zero_shot(t, w), test_y))
    assert np.mean(gains) > 0.03


@pytest.mark.parametrize("name", METHODS)
def test_order_of_the_examples_other_test_rows_and_repetition_change_nothing(name):
    x, y, t, _, w = planted((1, 4, 9, 2))
    scores = METHODS[name](x, y, t, w)
    state = torch.get_rng_state()
    assert np.array_equal(METHODS[name](x, y, t, w), scores)
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_allclose(METHODS[name](x, y, t[5:8], w), scores[5:8], atol=1e-9)
    # All examples are in one batch here, so that the order of the rows is that of a sum and no more.
    order = np.random.default_rng(1).permutation(len(y))
    close = {"lp": 5e-3, "tip-f": 1e-2}.get(name, 2e-3 if name in ("zs-lp", "clap") else 1e-8)
    np.testing.assert_allclose(METHODS[name](x[order], y[order], t, w), scores, atol=close)


@pytest.mark.parametrize("name", METHODS)
def test_classes_may_be_renumbered(name):
    x, y, t, _, w = planted((1, 4, 9, 2))
    new = np.array([2, 0, 3, 1])
    renumbered = np.empty_like(w)
    renumbered[new] = w
    close = 5e-3 if name in ("lp", "tip-f", "zs-lp", "clap") else 1e-8
    np.testing.assert_allclose(METHODS[name](x, new[y], t, renumbered)[:, new], METHODS[name](x, y, t, w), atol=close)


@pytest.mark.parametrize("name", METHODS)
def test_tensors_and_half_precision_are_taken(name):
    x, y, t, test_y, w = planted()
    half = [torch.tensor(a).to(torch.bfloat16) for a in (x, t, w)]
    scores = METHODS[name](half[0], torch.tensor(y, dtype=torch.int32), half[1], half[2])
    assert isinstance(scores, np.ndarray) and scores.dtype == np.float64
    assert accuracy(scores, test_y) > 0.75


@pytest.mark.parametrize("method", [tip_adapter.tip_f, clap.clap])
def test_seed_draws_batches(method):
    x, y, t, _, w = planted((4,) * 5)
    one = method(x, y, t, w, batch_size=8, epochs=3, seed=1)
    assert np.array_equal(one, method(x, y, t, w, batch_size=8, epochs=3, seed=1))
    assert not np.array_equal(one, method(x, y, t, w, batch_size=8, epochs=3, seed=2))


# --- Choosing on validation


def test_choice_is_the_best_of_its_grid_and_ties_stay_at_the_default():
    x, y, t, test_y, w = planted((3,) * 5, noise=0.45, text_noise=0.6)
    for choose, method, grid in (
        (gda.choose, gda.gda, [{"alpha": a} for a in gda.ALPHAS]),
        (
            tip_adapter.choose,
            tip_adapter.tip,
            [{"alpha": a, "beta": b} for a in tip_adapter.ALPHAS for b in tip_adapter.BETAS],
        ),
        (tip_adapter.choose_f, tip_adapter.tip_f, None),
    ):
        choice = choose(x, y, t, test_y, w)
        assert accuracy(method(x, y, t, w, **choice.parameters), test_y) == pytest.approx(choice.accuracy)
        if grid:
            found = [accuracy(method(x, y, t, w, **one), test_y) for one in grid]
            assert choice.tried == len(grid) and choice.accuracy == pytest.approx(max(found))
    # One validation image that everything gets right tells nothing.
    assert gda.choose(x, y, w[:1], [0], w).parameters == {"alpha": gda.ALPHA}
    assert tip_adapter.choose(x, y, w[:1], [0], w).parameters == pytest.approx({"alpha": 1.0, "beta": 5.5})
    c = linear.choose(x, y, x[:1], y[:1]).parameters["C"]
    assert c == min(linear.STRENGTHS, key=lambda s: abs(math.log(s)))


def test_choosing_tip_f_trains_the_keys_that_tip_f_has():
    x, y, t, test_y, w = planted((4,) * 5, noise=0.45)
    settings = {"epochs": 5, "learning_rate": 0.05, "batch_size": 7, "seed": 3, "scale": 10.0}
    choice = tip_adapter.choose_f(x, y, t, test_y, w, **settings)
    scores = tip_adapter.tip_f(x, y, t, w, **choice.parameters, **settings)
    assert accuracy(scores, test_y) == pytest.approx(choice.accuracy)


# --- Bad input


@pytest.mark.parametrize("name", METHODS)
def test_bad_arrays_are_refused(name):
    method = METHODS[name]
    x, y, t, _, w = planted((3, 3, 3), test=2)
    broken = x.copy()
    broken[4, 0] = np.nan
    refused = [
        ((broken, y, t, w), "train_x: expected finite numbers, found NaN or infinity in 1 of 9 rows.*row 4"),
        ((x, y, np.full_like(t, np.inf), w), "test_x: expected finite numbers"),
        ((x, y, t[:, :5], w), "test_x: expected the embedding size of train_x, 12, found 5"),
        ((x[0], y, t, w), "train_x: expected floats of shape"),
        ((x[:0], y[:0], t, w), "train_x: expected floats of shape"),
        ((x[:, None], y, t, w), "train_x: expected floats of shape"),
        ((x, y[:-1], t, w), "train_y: expected one label for each of 9 examples"),
        ((x, y.astype(float), t, w), "train_y: expected integers"),
        ((x, y - 1, t, w), "train_y: expected labels from 0 to"),
        ((x, 0 * y, t, w[:1]), "expected examples of at least 2 classes"),
    ]
    if name in WITH_TEXTS:
        refused += [
            ((x, y + 1, t, w), "train_y: expected labels from 0 to 2, found 3"),
            ((x, y, t, w[:, :5]), "zero_shot: expected the embedding size"),
            ((x, y, t, 7 * w), "zero_shot: expected rows of norm 1, found norms from 7 to 7"),
            ((2 * x, y, t, w), "train_x: expected rows of norm 1"),
            ((x, y, 2 * t, w), "test_x: expected rows of norm 1"),
        ]
    for arguments, message in refused:
        with pytest.raises(UserError, match=message):
            method(*arguments)


def test_a_class_without_example_is_refused_where_the_method_cannot_do_without():
    x, y, t, _, w = planted((3, 0, 3), test=2)
    for name in ("lp", "gda"):
        with pytest.raises(UserError, match=r"found none of class 1"):
            METHODS[name](x, y, t, w)
    for name in ("tip", "tip-f", "lp++", "zs-lp", "clap"):
        assert np.isfinite(METHODS[name](x, y, t, w)).all()
    np.testing.assert_allclose(tip_adapter.tip(x, y, t, w)[:, 1], zero_shot(t, w)[:, 1])


def test_bad_parameters_and_validation_are_refused():
    x, y, t, test_y, w = planted((3, 3, 3), test=2)
    for call in (
        lambda: linear.logistic_regression(x, y, t, C=0),
        lambda: gda.gda(x, y, t, w, alpha=-1.0),
        lambda: tip_adapter.tip(x, y, t, w, beta=math.nan),
        lambda: clap.clap(x, y, t, w, scale=0.0),
        lambda: clap.clap(x, y, t, w, epochs=0),
        lambda: tip_adapter.tip_f(x, y, t, w, batch_size=0),
        lambda: lp_plus_plus.lp_plus_plus(x, y, t, w, iterations=0),
    ):
        with pytest.raises(UserError, match=r"expected a number above 0"):
            call()
    for choose in (linear.choose, lambda *a: gda.choose(*a, w), lambda *a: tip_adapter.choose(*a, w)):
        with pytest.raises(UserError, match="val_y: expected labels from 0 to 2"):
            choose(x, y, t, test_y + 1)
        with pytest.raises(UserError, match="val_x: expected the embedding size"):
            choose(x, y, t[:, :4], test_y)


def test_logistic_regression_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    x, y, t, *_ = planted()
    with pytest.raises(UserError, match=r"pip install 'mmft_hf\[benchmark\]'"):
        linear.logistic_regression(x, y, t)


def test_one_image_per_class_is_no_reason_to_warn(recwarn):
    x, y, t, *_ = planted((1,) * 6)
    linear.logistic_regression(x, y, t)
    assert not recwarn.list


def test_no_method_has_a_place_for_test_labels():
    for path in (Path(mmft_hf.__file__).parent / "baselines").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert "test_y" not in {a.arg for a in [*node.args.args, *node.args.kwonlyargs]}, node.name
