"""Several labels per picture: decisions, metrics, the heads that know them, and what refuses them."""

import types
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, average_precision_score, f1_score
from tiny_clip import COLOURS, colour_dataset, striped_dataset

from mmft_hf import ClassPrototypes, ImageClassifier
from mmft_hf.core.errors import UserError
from mmft_hf.data.labels import labels_of
from mmft_hf.data.sampling import IGNORED
from mmft_hf.hub.publish import inference_code
from mmft_hf.predict.calibration import f1_thresholds, fit_decisions, image_losses
from mmft_hf.predict.evaluation import classify
from mmft_hf.predict.fitting.auto import State, select
from mmft_hf.predict.fitting.data import HeadData, head_data
from mmft_hf.predict.fitting.heads import FITTERS, fit_head
from mmft_hf.predict.fitting.one_vs_rest import one_vs_rest
from mmft_hf.predict.heads import LinearHead, load_head
from mmft_hf.predict.metrics import average_precision, several_report


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# -- metrics -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("ties", [False, True])
def test_metrics_are_those_of_scikit_learn(ties):
    rng = np.random.default_rng(0)
    truth = rng.random((80, 5)) < [0.5, 0.3, 0.2, 0.1, 0.4]
    scores = np.clip(0.5 * truth + rng.random((80, 5)) - 0.2, 0, 1)
    scores = np.round(scores, 1) if ties else scores
    found = several_report(scores, truth.astype(np.float32), list("abcde"))
    predicted = scores >= 0.5
    assert found["mean_average_precision"] == pytest.approx(average_precision_score(truth, scores, average="macro"))
    assert found["micro_f1"] == pytest.approx(f1_score(truth, predicted, average="micro"))
    assert found["macro_f1"] == pytest.approx(f1_score(truth, predicted, average="macro"))
    assert found["accuracy"] == pytest.approx(accuracy_score(truth, predicted))
    for c, row in enumerate(found["per_class"]):
        assert row["average_precision"] == pytest.approx(average_precision_score(truth[:, c], scores[:, c]))
        assert row["f1"] == pytest.approx(f1_score(truth[:, c], predicted[:, c]))


def test_means_are_over_the_classes_that_occur_and_rows_that_are_no_example_are_left_out():
    scores = np.array([[0.9, 0.1, 0.8], [0.2, 0.9, 0.1], [0.9, 0.9, 0.9]])
    labels = np.array([[1, 0, 0], [0, 1, 0], [IGNORED] * 3], dtype=np.float32)
    found = several_report(scores, labels, ["a", "b", "c"])
    assert found["mean_average_precision"] == 1 and found["macro_f1"] == 1
    assert found["micro_f1"] == pytest.approx(2 * 2 / (3 + 2)) and found["accuracy"] == 0.5
    assert found["examples"] == 2 and found["skipped"] == 1
    assert found["per_class"][2] == {
        "label": "c", "images": 0, "average_precision": None, "precision": 0.0, "recall": None, "f1": None,
    }  # fmt: skip


def test_average_precision_of_a_hand_made_order():
    assert average_precision(np.array([4.0, 3, 2, 1]), np.array([True, False, True, False])) == pytest.approx(
        (1 + 2 / 3) / 2
    )


# -- decisions -----------------------------------------------------------------------------------------------------------
def test_decisions_find_the_scale_and_the_offsets_of_the_data():
    """Logits that were drawn with T = 4 and one offset for each class, far from 0 as those of CLIP are."""
    g = generator()
    true = torch.tensor([-1.0, 0.0, 1.0, -2.0])
    z = torch.randn(20_000, 4, generator=g, dtype=torch.float64) * 8
    labels = (torch.rand(z.shape, generator=g, dtype=torch.float64) < (z / 4 + true).sigmoid()).double()
    temperature, offsets = fit_decisions(z + 100, labels)
    assert temperature == pytest.approx(4, rel=0.03)
    assert offsets + 100 / temperature == pytest.approx(true, abs=0.06)


def test_the_fit_is_the_least_of_its_objective():
    g = generator(1)
    z = torch.randn(60, 3, generator=g).double() * 5
    labels = (torch.rand(60, 3, generator=g) < (z / 2 - 1).sigmoid()).double()
    temperature, offsets = fit_decisions(z, labels)

    def objective(t, o):
        p = (z / t + o).sigmoid()
        losses = -(labels * p.log() + (1 - labels) * (1 - p).log()).sum()
        return (losses + np.log(t) ** 2 / 2 + ((o - o.mean()) ** 2).sum() / 2).item()

    least = objective(temperature, offsets)
    for step in (-0.02, 0.02):
        assert objective(temperature * (1 + step), offsets) > least
        for c in range(3):
            assert objective(temperature, offsets + step * torch.eye(3).double()[c]) > least


def test_offsets_of_rare_classes_stay_nearer_to_the_others():
    """Two positives among 30 images, and none, whose offset would be -inf if it were fitted by itself."""
    g = generator(2)
    z = torch.randn(30, 6, generator=g).double()
    labels = (torch.rand(30, 6, generator=g) < z.sigmoid()).double()
    labels[:, 4:] = 0
    labels[:2, 4] = 1
    _, offsets = fit_decisions(z, labels)
    alone = LogisticRegression(C=1e9).fit(z[:, 4:5].numpy(), labels[:, 4].numpy()).intercept_[0]
    others = offsets[:4].mean().item()
    assert alone < offsets[4].item() < others and offsets[4].item() - alone > 0.25 * (others - alone)
    assert others - 4 < offsets[5].item() < offsets[4].item()


def test_separable_data_and_no_data_give_finite_decisions():
    z = torch.tensor([[9.0, -9], [-9, 9], [9, -9]])
    for logits, labels in ((z, (z > 0).float()), (z[:0], z[:0]), (z, torch.ones(3, 2))):
        temperature, offsets = fit_decisions(logits, labels)
        assert 0.05 <= temperature <= 20 and offsets.isfinite().all()


def test_thresholds_have_the_best_f1_that_any_threshold_has():
    rng = np.random.default_rng(3)
    truth = rng.random((120, 4)) < [0.5, 0.3, 0.15, 0.05]
    scores = np.round(np.clip(0.35 * truth + 0.6 * rng.random((120, 4)), 0, 1), 2)  # with ties
    found = f1_thresholds(scores.astype(np.float32), truth.astype(np.float32))
    steps = np.arange(0, 1.001, 0.005)
    for c in range(3):
        best = max(f1_score(truth[:, c], scores[:, c] >= step) for step in steps)
        assert f1_score(truth[:, c], scores[:, c] >= found[c]) == pytest.approx(best)
    # The last class has too few positives for a threshold of its own: it takes that of all classes together.
    assert 0 < truth[:, 3].sum() < 10
    best = max(f1_score(truth, scores >= step, average="micro") for step in steps)
    assert f1_score(truth, scores >= found[3], average="micro") == pytest.approx(best)


def test_thresholds_of_scores_that_tell_classes_apart_or_tell_nothing():
    truth = np.arange(40)[:, None] < 20
    assert f1_thresholds(np.where(truth, 0.9, 0.3), truth) == pytest.approx([0.6])  # midway between the two
    assert f1_thresholds(np.full((40, 1), 0.7), truth) == pytest.approx([0.35])  # all hold, or none
    assert f1_thresholds(np.zeros((40, 1)), truth) == pytest.approx([0.0])
    assert f1_thresholds(np.full((40, 2), 0.7), np.zeros((40, 2))).tolist() == [0.5, 0.5]


def test_losses_of_images():
    logits = torch.tensor([[0.0, 2.0], [-1.0, 3.0]])
    found = image_losses(logits, torch.tensor([[1.0, 0], [IGNORED, IGNORED]]))
    assert found.tolist() == pytest.approx([(np.log(2) + np.log1p(np.exp(2))) / 2, 0], rel=1e-6)


# -- heads ---------------------------------------------------------------------------------------------------------------
def made_up(n=240, d=16, seed=0):
    """Embeddings that are sums of the directions of their classes, and class texts near those."""
    g = generator(seed)
    directions = torch.nn.functional.normalize(torch.randn(4, d, generator=g), dim=1)
    labels = (torch.rand(n, 4, generator=g) < torch.tensor([0.5, 0.3, 0.2, 0.1])).float()
    x = labels @ directions + 0.5 * torch.randn(1, d, generator=g) + 0.1 * torch.randn(n, d, generator=g)
    texts = torch.nn.functional.normalize(directions + 0.3 * torch.randn(4, d, generator=g), dim=1)
    return torch.nn.functional.normalize(x, dim=1), labels, texts


def data_of(x, labels, texts):
    prototypes = ClassPrototypes(texts, list("abcd"), 20.0, "template", several_labels=True)
    return HeadData(prototypes, texts, x, labels, texts[:0], torch.zeros(0, dtype=torch.long))


def test_one_vs_rest_is_the_least_of_its_objective_and_stays_at_the_texts_with_a_large_ridge():
    x, labels, texts = made_up(60)
    weight, bias = one_vs_rest(x, labels, texts, 20.0, ridge=0.5)
    temperature, offsets = fit_decisions(20.0 * x.double() @ texts.double().T, labels)
    start = 20.0 / temperature * texts.double()

    # Its gradient by hand: sigmoid minus label, times the image, and the pull towards the start.
    residual = (x.double() @ weight.T + bias).sigmoid() - labels
    assert (residual.T @ x.double() + 0.5 * (weight - start)).abs().max() < 1e-4
    assert (residual.sum(dim=0) + 0.5 * (bias - offsets)).abs().max() < 1e-4
    near, _ = one_vs_rest(x, labels, texts, 20.0, ridge=1e6)
    torch.testing.assert_close(near, start, rtol=0, atol=1e-3)


def test_the_linear_head_learns_from_images_what_texts_do_not_tell():
    x, labels, texts = made_up()
    data, (new, truth, _) = data_of(x[:160], labels[:160], texts), (x[160:], labels[160:], None)
    found = {}
    for name in ("prototypes", "linear"):
        head = fit_head(name, data)
        assert head.several_labels and head.fitted["head"] == name
        found[name] = several_report(head.scores(new).numpy(), truth.numpy(), list("abcd"))
    assert found["linear"]["mean_average_precision"] > found["prototypes"]["mean_average_precision"] + 0.02
    assert found["linear"]["micro_f1"] > 0.9


@pytest.mark.parametrize("name", sorted(set(FITTERS) - {"linear", "prototypes"}))
def test_other_heads_refuse_several_labels_in_one_sentence(name):
    with pytest.raises(UserError, match=f"head {name}: expected one class for each picture, found lists of labels"):
        fit_head(name, data_of(*made_up(20)))


@pytest.mark.parametrize(("count", "chosen"), [(30, "linear"), (80, "linear")])
def test_auto_takes_linear_unless_validation_says_otherwise(count, chosen):
    x, labels, texts = made_up()
    state = State(1.0, data_of(x[:160], labels[:160], texts), x[160 : 160 + count], labels[160 : 160 + count])
    choice = select([state])
    assert choice.chosen.name == chosen and {c.name for c in choice.candidates} == {"linear", "prototypes"}
    assert ("too few" in choice.reason) == (count < 50)
    assert all(0 < c.accuracy <= 1 and len(c.losses) == count for c in choice.candidates)


def test_auto_takes_prototypes_where_training_labels_are_wrong():
    x, labels, _ = made_up()
    g = generator()
    directions = torch.linalg.lstsq(labels.double(), x.double()).solution
    texts = torch.nn.functional.normalize(directions, dim=1).float()
    shuffled = labels[:160][torch.randperm(160, generator=g)]
    state = State(1.0, data_of(x[:160], shuffled, texts), x[160:], labels[160:])
    assert select([state]).chosen.name == "prototypes"


@pytest.mark.parametrize("name", ["linear", "prototypes"])
def test_a_head_is_saved_with_its_decisions(name, tmp_path):
    x, labels, texts = made_up()
    head = fit_head(name, data_of(x, labels, texts))
    head = replace(head, temperature=2.0, offsets=torch.tensor([0.5, -1.0, 0.0, 2.0]))
    head.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["head.safetensors"]  # no file of the first edition
    again = load_head(tmp_path)
    assert again.several_labels and torch.equal(again.scores(x), head.scores(x))
    expected = (head.raw_logits(x) / 2 + torch.tensor([0.5, -1.0, 0.0, 2.0])).sigmoid()
    torch.testing.assert_close(again.scores(x), expected)


# -- pictures ------------------------------------------------------------------------------------------------------------
@pytest.fixture
def classifier(clip) -> ImageClassifier:
    """The tiny CLIP with a head that was fitted to striped pictures: their colours are easy for any weights."""
    model, processor = clip
    train = striped_dataset(64, captions=True)
    prototypes = ClassPrototypes.from_captions(model, processor, train)
    assert prototypes.several_labels and prototypes.source == "captions"
    return ImageClassifier(model, processor, fit_head("linear", head_data(model, processor, train, prototypes)))


def test_a_caption_counts_for_each_class_of_its_picture(clip):
    model, processor = clip
    train = striped_dataset(8, captions=True)
    found = ClassPrototypes.from_captions(model, processor, train)
    names, single = list(COLOURS), []
    for c in range(3):
        texts = [
            f"a photo of a {', '.join(names[k] for k in row['label'])}. {row['captions'][0]}"
            for row in train
            if c in row["label"]
        ]
        tokens = processor.tokenizer(texts, padding=True, return_tensors="pt")
        with torch.no_grad():
            embeds = torch.nn.functional.normalize(model.get_text_features(**tokens).pooler_output, dim=1)
        single.append(torch.nn.functional.normalize(embeds.mean(dim=0), dim=0))
    torch.testing.assert_close(found.embeddings, torch.stack(single), rtol=0, atol=1e-5)


def test_predict_gives_all_classes_above_the_decision_and_the_published_code_the_same(classifier):
    data = striped_dataset(16, seed=5)
    pictures = data["image"][:]
    answers = classifier.predict(pictures, top_k=1)
    predictions = classify(classifier, data, progress=False)
    assert [{one["label"] for one in row} for row in answers] == [
        {name for name, score in zip(COLOURS, row, strict=True) if score >= 0.5} for row in predictions.scores
    ]
    assert {len(row) for row in answers} >= {0, 2}
    for row in answers:
        assert [one["score"] for one in row] == sorted((one["score"] for one in row), reverse=True)
    assert predictions.report()["micro_f1"] > 0.9 and predictions.certainty() == {}
    # `reject_below` moves the decision.
    sure = ImageClassifier(classifier.model, classifier.processor, classifier.head.rejecting(0.97))
    found = classify(sure, data, progress=False)
    expected = several_report(predictions.scores, predictions.labels, sure.class_names, 0.97)
    assert {key: found.report()[key] for key in expected} == expected
    for row in sure.predict(pictures):
        assert all(one["score"] >= 0.97 for one in row)
    assert sum(map(len, sure.predict(pictures))) == (predictions.scores >= 0.97).sum() < sum(map(len, answers))

    module = types.ModuleType("mmft_inference")
    exec(compile(inference_code(classifier.head), "mmft_inference.py", "exec"), vars(module))
    head = {field.name: getattr(classifier.head, field.name) for field in fields(classifier.head)}
    this = types.SimpleNamespace(head=head, class_names=classifier.class_names)
    with torch.no_grad():
        embeds = torch.nn.functional.normalize(
            classifier.model.get_image_features(classifier.preprocess(pictures)).pooler_output, dim=1
        )
    for x, expected in zip(embeds, answers, strict=True):
        logits = module.logits(x[None], **head)
        found = module.MMFTImageClassificationPipeline.postprocess(this, {"logits": logits}, top_k=1)
        this.head["reject_below"] = 0.97
        surer = module.MMFTImageClassificationPipeline.postprocess(this, {"logits": logits}, top_k=1)
        this.head["reject_below"] = None
        assert surer == [one for one in found if one["score"] >= 0.97]
        assert [one["label"] for one in found] == [one["label"] for one in expected]
        assert [one["score"] for one in found] == pytest.approx([one["score"] for one in expected], abs=1e-4)


def test_each_class_may_have_a_threshold_of_its_own(classifier, tmp_path):
    own = torch.tensor([0.2, 0.97, 0.5])
    classifier = ImageClassifier(
        classifier.model, classifier.processor, replace(classifier.head, thresholds=own, temperature=4.0)
    )
    data = striped_dataset(16, seed=5)
    predictions = classify(classifier, data, progress=False)
    expected = [{n for n, s, t in zip(COLOURS, row, own, strict=True) if s >= t} for row in predictions.scores]
    assert expected != [{n for n, s in zip(COLOURS, row, strict=True) if s >= 0.5} for row in predictions.scores]
    assert [{n for n, holds in zip(COLOURS, row, strict=True) if holds} for row in predictions.predicted] == expected
    assert [{one["label"] for one in row} for row in classifier.predict(data["image"][:])] == expected
    truth = labels_of(data)
    assert predictions.report()["macro_f1"] == pytest.approx(
        f1_score(truth, predictions.scores >= own.numpy(), average="macro")
    )
    classifier.head.save_pretrained(tmp_path)
    again = load_head(tmp_path)
    assert torch.equal(again.thresholds, own)
    assert again.rejecting(0.4).decision == 0.4  # what is typed counts for all classes
    module = types.ModuleType("mmft_inference")
    exec(compile(inference_code(again), "mmft_inference.py", "exec"), vars(module))
    head = {field.name: getattr(again, field.name) for field in fields(again)}
    this = types.SimpleNamespace(head=head, class_names=classifier.class_names)
    with torch.no_grad():
        pixels = classifier.preprocess(data["image"][:])
        embeds = torch.nn.functional.normalize(classifier.model.get_image_features(pixels).pooler_output, dim=1)
    for x, names in zip(embeds, expected, strict=True):
        found = module.MMFTImageClassificationPipeline.postprocess(this, {"logits": module.logits(x[None], **head)})
        assert {one["label"] for one in found} == names
    replace(again, thresholds=own[:2]).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="expected a head for the model's embedding size"):
        load_head(tmp_path).check_model(classifier.model, "model")


def test_labels_of_the_other_kind_are_refused(classifier):
    with pytest.raises(
        UserError, match=r"expected a list of labels for each picture.* found one class for each picture"
    ):
        classify(classifier, colour_dataset(2, captions=False), progress=False)
    single = LinearHead(classifier.head.weight, classifier.class_names)
    with pytest.raises(UserError, match=r"expected one class for each picture.* found a list of labels"):
        classify(ImageClassifier(classifier.model, classifier.processor, single), striped_dataset(4), progress=False)
