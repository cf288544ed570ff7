"""The losses against a double loop in plain Python, which shares no code with them."""

import math

import pytest
import torch

from mmft_hf import MMFTLoss, clip_loss, supcon_loss
from mmft_hf.model.losses import IGNORED, Batch, _cross_entropy, batch_supcon, class_cross_entropy, contrast


def oracle_supcon(logits: list[list[float]], rows: list[int], columns: list[int], excluded=()) -> float:
    """Mean over anchors with a positive of the mean of log(sum of exp) - logit over their positives."""
    per_anchor = []
    for i, row in enumerate(logits):
        positives = [j for j in range(len(row)) if rows[i] == columns[j] and (i, j) not in excluded]
        if positives:
            total = math.log(sum(math.exp(value) for value in row))
            per_anchor.append(sum(total - row[j] for j in positives) / len(positives))
    return sum(per_anchor) / len(per_anchor) if per_anchor else 0.0


def oracle_ce(logits: list[list[float]]) -> float:
    return sum(math.log(sum(map(math.exp, row))) - row[i] for i, row in enumerate(logits)) / len(logits)


def oracle_total(logits, labels, w=0.1, include_self=False) -> dict[str, float]:
    turned = [list(column) for column in zip(*logits, strict=True)]
    excluded = () if include_self else {(i, i) for i in range(len(labels))}
    clip = (oracle_ce(logits) + oracle_ce(turned)) / 2
    alone = all(labels.count(label) == 1 for label in labels) and not include_self
    supcon = clip if alone else sum(oracle_supcon(m, labels, labels, excluded) for m in (logits, turned)) / 2
    return {"loss": w * supcon + (1 - w) * clip, "supcon": supcon, "clip": clip}


def cosines(a: torch.Tensor, b: torch.Tensor, scale: float) -> list[list[float]]:
    """Scaled cosines by hand, in Python floats."""

    def unit(rows):
        return [[x / math.sqrt(sum(y * y for y in row)) for x in row] for row in rows.double().tolist()]

    return [[scale * sum(x * y for x, y in zip(p, q, strict=True)) for q in unit(b)] for p in unit(a)]


def pairs(n: int, d: int = 5, seed: int = 0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g, dtype=torch.float64).to(dtype), torch.randn(
        n, d, generator=g, dtype=torch.float64
    ).to(dtype)


TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-5, torch.float16: 2e-5}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("labels", [[0, 0, 1, 2, 0, 1], [3, 3, 3, 3, 3, 3], [0, 1, 2, 3, 4, 5], [7, 7, 1, 2, 3, 4]])
@pytest.mark.parametrize("include_self", [False, True])
def test_total_equals_double_loop(dtype, labels, include_self):
    images, texts = pairs(6, dtype=dtype)  # half precision is computed in float32: only its inputs are rounded
    found = MMFTLoss(0.3, include_self)(images, texts, torch.tensor(labels), torch.tensor(7.0))
    expected = oracle_total(cosines(images, texts, 7.0), labels, 0.3, include_self)
    for key, value in expected.items():
        assert found[key].item() == pytest.approx(value, abs=TOLERANCE[dtype] * 7), key


def test_supcon_of_unequal_anchors_and_candidates_with_exclusions():
    anchors, _ = pairs(3, seed=1)
    candidates, _ = pairs(5, seed=2)
    exclude = torch.zeros(3, 5, dtype=torch.bool)
    exclude[0, 0] = exclude[2, 1] = True
    found = supcon_loss(anchors, torch.tensor([0, 1, 2]), candidates, torch.tensor([0, 2, 0, 1, 3]), 4.0, exclude)
    logits = cosines(anchors, candidates, 4.0)
    assert found.item() == pytest.approx(oracle_supcon(logits, [0, 1, 2], [0, 2, 0, 1, 3], {(0, 0), (2, 1)}), abs=1e-10)


def test_clip_equals_double_loop():
    images, texts = pairs(4, seed=3)
    logits = cosines(images, texts, 3.0)
    expected = (oracle_ce(logits) + oracle_ce([list(c) for c in zip(*logits, strict=True)])) / 2
    assert clip_loss(images, texts, 3.0).item() == pytest.approx(expected, abs=1e-10)


# Worked out by hand from the formulas, on logits; the second matrix is not symmetric, so a lost transpose shows.
L1 = [[5, 1, 2, 0], [1, 4, 0, 2], [2, 0, 3, 1], [0, 2, 1, 6]]
L2 = [[4, 1, 0, 2], [3, 2, 1, 0], [0, 1, 5, 2], [1, 0, 2, 3]]


@pytest.mark.parametrize(
    ("logits", "labels", "supcon", "total"),
    [
        (L1, [0, 0, 1, 2], 3.628677, 0.525926),
        (L1, [0, 0, 1, 1], 3.681176, 0.531176),
        (L2, [0, 0, 1, 0], 2.438943, 0.668920),
        (L2, [0, 0, 1, 1], 1.972250, 0.622250),
    ],
)
def test_golden_values(logits, labels, supcon, total):
    logits, labels = torch.tensor(logits, dtype=torch.float64), torch.tensor(labels)
    positives = (labels[:, None] == labels[None]) & ~torch.eye(4, dtype=torch.bool)
    found = (contrast(logits, positives) + contrast(logits.T, positives)) / 2
    valid = torch.ones(len(logits), dtype=torch.bool)
    clip = (_cross_entropy(logits, valid) + _cross_entropy(logits.T, valid)) / 2
    assert found.item() == pytest.approx(supcon, abs=1e-6)
    assert (0.1 * found + 0.9 * clip).item() == pytest.approx(total, abs=1e-6)


@pytest.mark.parametrize("include_self", [False, True])
def test_gradients_are_right(include_self):
    images, texts = (x.requires_grad_() for x in pairs(5))
    labels, scale = torch.tensor([0, 0, 1, 1, 2]), torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    loss = MMFTLoss(0.4, include_self)
    assert torch.autograd.gradcheck(lambda *x: loss(x[0], x[1], labels, x[2])["loss"], (images, texts, scale))


def test_order_of_the_batch_does_not_matter():
    images, texts = pairs(8)
    labels, order = torch.tensor([0, 1, 0, 2, 2, 0, 3, 1]), torch.tensor([5, 2, 7, 0, 1, 3, 6, 4])
    a = MMFTLoss()(images, texts, labels, 5.0)["loss"]
    b = MMFTLoss()(images[order], texts[order], labels[order], 5.0)["loss"]
    torch.testing.assert_close(a, b)


def test_names_of_the_classes_do_not_matter():
    images, texts = pairs(6)
    a = MMFTLoss()(images, texts, torch.tensor([0, 0, 1, 1, 2, 3]), 5.0)["loss"]
    b = MMFTLoss()(images, texts, torch.tensor([9, 9, 4, 4, 7, 0]), 5.0)["loss"]
    torch.testing.assert_close(a, b)


def test_unique_labels_give_the_clip_loss():
    images, texts = pairs(6)
    found = MMFTLoss(0.5)(images, texts, torch.arange(6), 5.0)
    torch.testing.assert_close(found["loss"], clip_loss(images, texts, 5.0))


def test_unique_labels_with_self_as_positive_are_the_clip_loss():
    images, texts = pairs(6)
    torch.testing.assert_close(
        MMFTLoss(1.0, include_self=True)(images, texts, torch.arange(6), 5.0)["loss"], clip_loss(images, texts, 5.0)
    )


def test_no_positive_gives_zero_with_finite_gradients():
    anchors, candidates = (x.requires_grad_() for x in pairs(3))
    loss = supcon_loss(anchors, torch.tensor([0, 1, 2]), candidates, torch.tensor([3, 4, 5]), 100.0)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(anchors.grad, torch.zeros_like(anchors))


def test_singleton_classes_contribute_nothing_to_supcon():
    images, texts = pairs(5)
    labels = torch.tensor([0, 0, 1, 2, 3])
    exclude = torch.eye(5, dtype=torch.bool)
    everyone = supcon_loss(images, labels, texts, labels, 5.0, exclude)
    pair_alone = supcon_loss(images[:2], labels[:2], texts, labels, 5.0, exclude[:2])
    torch.testing.assert_close(everyone, pair_alone)


def test_one_image():
    images, texts = pairs(1)
    images.requires_grad_()
    found = MMFTLoss()(images, texts, torch.tensor([4]), 100.0)
    found["loss"].backward()
    assert found["loss"].item() == 0
    assert torch.isfinite(images.grad).all()


def test_the_pair_itself_stays_in_the_denominator():
    images, texts = pairs(2, seed=5)
    labels, exclude = torch.tensor([0, 0]), torch.eye(2, dtype=torch.bool)
    found = supcon_loss(images, labels, texts, labels, 1.0, exclude)
    (a, b), (c, d) = cosines(images, texts, 1.0)
    expected = (math.log(math.exp(a) + math.exp(b)) - b + math.log(math.exp(c) + math.exp(d)) - c) / 2
    assert found.item() == pytest.approx(expected, abs=1e-12)
    assert found.item() > 0


@pytest.mark.parametrize("scale", [88.0, 100.0, 1000.0])
def test_large_logits_stay_finite(scale):
    images = torch.ones(64, 4, requires_grad=True)
    losses = MMFTLoss()(images, torch.ones(64, 4), torch.arange(64) % 8, torch.tensor(scale))
    losses["loss"].backward()
    assert losses["clip"].item() == pytest.approx(math.log(64), abs=1e-3)
    assert torch.isfinite(images.grad).all()


def test_half_precision_inside_autocast_is_computed_in_float32():
    images, texts = pairs(16, 8, dtype=torch.float32)
    labels = torch.arange(16) % 5
    expected = MMFTLoss()(images, texts, labels, 50.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = MMFTLoss()(images, texts, labels, 50.0)
    assert found["loss"].dtype == torch.float32
    assert torch.equal(found["loss"], expected["loss"])


def test_embeddings_of_any_norm():
    images, texts = pairs(4)
    a = MMFTLoss()(images, texts, torch.tensor([0, 0, 1, 1]), 5.0)["loss"]
    b = MMFTLoss()(images * 31, texts * 0.01, torch.tensor([0, 0, 1, 1]), 5.0)["loss"]
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("w", [-0.1, 1.1])
def test_weight_outside_zero_to_one_is_refused(w):
    with pytest.raises(ValueError, match="supcon_weight"):
        MMFTLoss(w)


def test_shapes_that_do_not_fit_are_refused():
    images, texts = pairs(4)
    with pytest.raises(ValueError, match="4 labels"):
        MMFTLoss()(images, texts, torch.tensor([0, 1]), 1.0)
    with pytest.raises(ValueError, match="text_embeds"):
        clip_loss(images, texts[:2], 1.0)
    with pytest.raises(ValueError, match="exclude"):
        supcon_loss(images, torch.zeros(4), texts, torch.zeros(4), 1.0, torch.eye(2, dtype=torch.bool))


def test_anchors_with_positives():
    images, texts = pairs(5)
    labels = torch.tensor([0, 1, 0, 2, IGNORED])
    assert MMFTLoss()(images, texts, labels, 1.0)["anchors_with_positives"].item() == 0.5
    assert MMFTLoss(include_self=True)(images, texts, labels, 1.0)["anchors_with_positives"].item() == 1


@pytest.mark.parametrize("w", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("include_self", [False, True])
def test_ignored_rows_are_as_if_they_were_not_there(w, include_self):
    images, texts = (x.requires_grad_() for x in pairs(8))
    labels = torch.tensor([0, IGNORED, 1, 0, 2, IGNORED, IGNORED, 1])
    kept = labels != IGNORED
    loss = MMFTLoss(w, include_self)
    found, expected = loss(images, texts, labels, 5.0), loss(images[kept], texts[kept], labels[kept], 5.0)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-14, rtol=0)
    for x in (images, texts):
        gradients = [torch.autograd.grad(y["loss"], x, retain_graph=True)[0] for y in (found, expected)]
        torch.testing.assert_close(*gradients, atol=1e-14, rtol=0)
        assert (gradients[0][~kept] == 0).all() and gradients[0][kept].abs().max() > 1e-3


def test_a_batch_of_ignored_rows_alone_gives_zero():
    images, texts = (x.requires_grad_() for x in pairs(3))
    found = MMFTLoss()(images, texts, torch.full((3,), IGNORED), 5.0)["loss"]
    found.backward()
    assert found.item() == 0
    assert (images.grad == 0).all() and (texts.grad == 0).all()


# -- several labels per image -----------------------------------------------------------------------------------------
def batch_of(labels, owner=None, dtype=torch.float64, **fields):
    images, texts = pairs(len(labels), dtype=dtype)
    return Batch(images, labels, torch.tensor(7.0, dtype=dtype), texts, owner, **fields)


@pytest.mark.parametrize("owner", [None, [1, 0, 0, -1, 4, 2]])
@pytest.mark.parametrize("weights", [None, [1.0, 0.5, 2.0, 1.0, 0.0, 1.0]])
@pytest.mark.parametrize("include_self", [False, True])
def test_one_hot_rows_give_the_loss_of_class_numbers_bit_for_bit(owner, weights, include_self):
    classes = torch.tensor([0, 2, IGNORED, 2, 0, 1])
    rows = torch.nn.functional.one_hot(classes.clamp(min=0), 3).float()
    rows[2] = IGNORED
    fields = {} if weights is None else {"weights": torch.tensor(weights), "text_weights": torch.tensor(weights)}
    owner = None if owner is None else torch.tensor(owner)
    numbers, several = (batch_of(labels, owner, torch.float32, **fields) for labels in (classes, rows))
    for one, other in zip(batch_supcon(numbers, include_self), batch_supcon(several, include_self), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(numbers.clip_loss, several.clip_loss)
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        class_cross_entropy(logits, classes), class_cross_entropy(logits, rows), rtol=1e-6, atol=0
    )


def test_supcon_of_several_labels_weighs_texts_by_the_overlap_of_their_classes():
    """Against loops over sets: shared classes among all classes of the two."""
    sets = [{0, 1}, {1}, {0, 1, 2}, set(), {2}, {1, 2}]
    labels = torch.tensor([[float(c in own) for c in range(3)] for own in sets])
    batch = batch_of(labels)
    overlap = [[len(a & b) / len(a | b) if a | b else 0.0 for b in sets] for a in sets]
    assert batch.overlap.tolist() == pytest.approx([pytest.approx(row) for row in overlap])
    logits = cosines(batch.image_embeds, batch.text_embeds, 7.0)
    expected = []
    for matrix in (logits, [list(column) for column in zip(*logits, strict=True)]):
        values = []
        for i, row in enumerate(matrix):
            shares = [0.0 if i == j else overlap[i][j] for j in range(6)]
            if sum(shares):
                total = math.log(sum(map(math.exp, row)))
                values.append(sum(p * (total - x) for p, x in zip(shares, row, strict=True)) / sum(shares))
        expected.append(sum(values) / len(values))
    loss, share = batch_supcon(batch)
    assert loss.item() == pytest.approx(sum(expected) / 2, rel=1e-6)
    assert share.item() == pytest.approx(5 / 6)  # the image without a class has no positive
    # Its own text is still its pair.
    assert batch.clip_loss.item() == pytest.approx(
        (oracle_ce(logits) + oracle_ce([list(column) for column in zip(*logits, strict=True)])) / 2, rel=1e-6
    )


def test_an_image_that_is_no_example_is_left_out_of_several_labels_too():
    labels = torch.tensor([[1.0, 0, 1], [1, 1, 0], [IGNORED] * 3, [0, 0, 1]])
    kept = [0, 1, 3]
    images, texts = pairs(4)
    whole = Batch(images, labels, 7.0, texts)
    part = Batch(images[kept], labels[kept], 7.0, texts[kept])
    torch.testing.assert_close(batch_supcon(whole), batch_supcon(part))
    torch.testing.assert_close(whole.clip_loss, part.clip_loss)


def test_cross_entropy_of_several_labels_shares_the_classes_of_a_row():
    logits = torch.tensor([[2.0, 1.0, -1.0], [0.5, 0.0, 3.0], [1.0, 1.0, 1.0], [9.0, 9.0, 0.0]])
    labels = torch.tensor([[1.0, 1, 0], [0, 0, 1], [0, 0, 0], [IGNORED] * 3])
    logs = [[x - math.log(sum(map(math.exp, row))) for x in row] for row in logits[:2].tolist()]
    expected = -((logs[0][0] + logs[0][1]) / 2 + logs[1][2]) / 2
    assert class_cross_entropy(logits, labels).item() == pytest.approx(expected, rel=1e-6)
