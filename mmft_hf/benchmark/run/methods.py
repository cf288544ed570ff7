"""The methods of a benchmark, one row of a table each, and how a row becomes a classifier for a task.

Some methods differ from their papers. Methods on frozen features see each image once, without random crops (Tip-Adapter
averages ten), as its unit-norm embedding in the common space (the linear probe of the CLIP paper takes the features before the
projection). `flyp` trains and compares with one class template; with one of several drawn at each step, as in its paper, it is
`flyp-ens`. Class texts of methods on frozen features, and first heads, are averages over 80 templates.

With all images, validation selects the epoch of a training, by the texts that this training compares images with. Methods that
share a training (`mmft-train-captions` and `mmft-mixed` that of `mmft`, `mmft-test-captions` that of `mmft-no-captions`) are
judged at that epoch.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

from ...baselines import clap, gda, linear, lp_plus_plus, proker, tip_adapter
from ...core.errors import UserError
from ...train.selection import is_better, metric_name
from .budgets import AUTHORS, FIXED_HEAD_RECIPE, FLYP_RECIPE, WISE_FT_RECIPE, selects_epoch, settings_of
from .context import Context, Trained
from .inference import (
    FeatureHead,
    captions,
    chosen_on_validation,
    fitted,
    mixed,
    on_features,
    template,
    templates,
    trained_head,
    training_texts,
)
from .protocol import Classifier, Task
from .trainings import (
    Training,
    contrastive,
    cross_entropy,
    halfway,
    low_rank,
    none_without_captions,
    permuted_labels,
    shuffled_captions,
    two_stage,
    without_captions,
)

AT = "@"  # in the name of a method, before that of its captions
# Families of methods by their headings in the report.
FAMILIES = {
    "untuned": "Untuned model",
    "features": "On frozen features",
    "tuned": "Fine-tuned by other methods",
    "mmft": "MMFT: fine-tuned with captions",
    "ablation": "Ablations of MMFT",
}


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Args:
        name: as in `--methods` and in the rows of results.
        training: gives the weights; None: those of the untuned model. Methods with exactly the same training share its fit.
        inference: gives the head that images are compared with, see `inference`.
        family: a key of `FAMILIES`.
        about: what it is, or what the comparison with `mmft` shows, in one sentence.
        needs_captions: it reads captions, and is left out where the training images have none.
        takes_captions: it fits a head to captions where there are some, and runs without.
        sanity_check: its labels are permuted, so it should fall to chance; it is not a baseline.
        alpha: weights are `(1 - alpha) * untuned + alpha * trained`.
        share: of the trained model's logits in the scores; the rest is the untuned model with the head that the training started from.
        auto: weights and head are chosen on validation, as `--head auto` does; `inference` has no part in it.
        captions: the refined captions that it reads, by name; empty: those of the dataset.
    """

    name: str
    training: Training | None
    inference: Callable
    family: str
    about: str
    needs_captions: bool = False
    sanity_check: bool = False
    alpha: float = 1.0
    share: float = 1.0
    auto: bool = False
    captions: str = ""
    takes_captions: bool = False

    @property
    def reads_captions(self) -> bool:
        """Whether captions, where there are some, decide on its result."""
        return self.needs_captions or self.takes_captions


MMFT, NO_CAPTIONS = contrastive(), contrastive(without_captions)
WEIGHTED, MIXED = contrastive(weighted=True), contrastive(mixed=True)

# fmt: off
_ROWS = (
    Method("zs", None, template, "untuned", "The untuned model with the class template."),
    Method("zs-ens", None, templates, "untuned", "The untuned model with the average over 80 templates."),
    Method("zs-cap", None, captions, "untuned", "The untuned model with class averages of the captions.", True),

    Method("lp", None, on_features(linear.logistic_regression, linear.choose, texts=None), "features",
           "Logistic regression on image embeddings, C from validation."),
    Method("gda", None, on_features(gda.gda, gda.choose), "features",
           "Gaussian discriminant analysis, its weight from validation."),
    Method("tip", None, on_features(tip_adapter.tip, tip_adapter.choose), "features",
           "Tip-Adapter without training, its two parameters from validation."),
    Method("tip-f", None, on_features(tip_adapter.tip_f, tip_adapter.choose_f, seeded=True), "features",
           "Tip-Adapter with trained keys, its two parameters from validation."),
    Method("lp++", None, on_features(lp_plus_plus.lp_plus_plus), "features",
           "LP++: trained visual prototypes blended with class texts."),
    Method("zs-lp", None, on_features(clap.zs_lp, seeded=True), "features",
           "A linear probe that starts at the zero-shot weights."),
    Method("clap", None, on_features(clap.clap, seeded=True), "features",
           "CLAP: zs-lp with a penalty that keeps it near the zero-shot weights."),
    Method("proker", None, on_features(proker.proker, proker.choose), "features",
           "ProKeR: class texts and a kernel ridge regression, its two parameters from validation."),
    Method("gda-cap", None, on_features(gda.gda, gda.choose, texts="captions"), "features",
           "gda with class averages of the captions for class texts.", True),
    Method("tip-cap", None, on_features(tip_adapter.tip, tip_adapter.choose, texts="captions"), "features",
           "tip with class averages of the captions for class texts.", True),
    Method("tip-f-cap", None, on_features(tip_adapter.tip_f, tip_adapter.choose_f, texts="captions", seeded=True), "features",
           "tip-f with class averages of the captions for class texts.", True),
    Method("zs-lp-cap", None, on_features(clap.zs_lp, texts="captions", seeded=True), "features",
           "zs-lp with class averages of the captions for class texts.", True),
    Method("clap-cap", None, on_features(clap.clap, texts="captions", seeded=True), "features",
           "clap with class averages of the captions for class texts.", True),
    Method("proker-cap", None, on_features(proker.proker, proker.choose, texts="captions"), "features",
           "proker with class averages of the captions for class texts.", True),
    Method("timo-cap", None, fitted("timo"), "features",
           "After TIMO: captions weighted by the images they fit, and Gaussians of both.", True),
    Method("zs+mean", None, fitted("mean"), "features",
           "The head of --head mean on the untuned model.", takes_captions=True),
    Method("zs+kernel", None, fitted("kernel"), "features",
           "The head of --head kernel on the untuned model.", takes_captions=True),
    Method("zs+auto", None, template, "features",
           "The head that --head auto chooses on the untuned model.", auto=True, takes_captions=True),
    Method("zs-no-captions+auto", none_without_captions, template, "features",
           "zs+auto without captions: what captions bring with this head and no training.", auto=True),
    Method("lp-permuted-labels", None,
           on_features(linear.logistic_regression, linear.choose, permuted_labels, texts=None), "features",
           "lp with labels shuffled among all images: a control that should fall to chance.", sanity_check=True),

    Method("flyp", contrastive(without_captions, recipe=FLYP_RECIPE, supcon_weight=0.0), template, "tuned",
           "Both towers on class templates with the CLIP loss alone."),
    Method("ce", cross_entropy(recipe=WISE_FT_RECIPE), trained_head, "tuned",
           "The image tower by cross-entropy, with a trained head that starts at zero-shot weights."),
    Method("clip-lora", low_rank, template, "tuned",
           "LoRA in both towers by cross-entropy over the class templates."),
    Method("ce-frozen", cross_entropy(fixed=True, recipe=FIXED_HEAD_RECIPE), trained_head, "tuned",
           "The image tower by cross-entropy, with a fixed head of zero-shot weights."),
    Method("lp-ft", cross_entropy("regression"), trained_head, "tuned",
           "The image tower by cross-entropy, with a trained head that starts at the weights of lp."),
    Method("flyp-ens",
           contrastive(without_captions, templates=True, recipe=FLYP_RECIPE, supcon_weight=0.0, prototypes="templates"), templates, "tuned", "flyp with 80 class templates: one drawn at each step, their average at inference."),
    Method("ce-last4", cross_entropy("captions", in_part=True), trained_head, "tuned",
           "The last four blocks of the image tower by cross-entropy; the head starts at captions and 80 templates.", True),
    Method("ce-last4-gram", cross_entropy("captions", in_part=True, anchor=True), trained_head, "tuned",
           "ce-last4 with an anchor to the cosines between images of the untuned tower, after MPS-Tuning.", True),
    Method("2sfs", two_stage(), trained_head, "tuned",
           "2SFS: the norms of both towers by cross-entropy over class texts, then a head that starts at these texts."),
    Method("2sfs-cap", two_stage(start_at_captions=True), trained_head, "tuned",
           "2sfs with a head that starts at class averages of the captions.", True),

    Method("mmft", MMFT, training_texts, "mmft",
           "Both towers on captions with the SupCon and the CLIP loss.", True),
    Method("mmft-lora", contrastive(vision_tower="lora", text_tower="lora", small_lora=True, recipe=None), training_texts, "mmft",
           "The LoRA of clip-lora in both towers instead of whole towers.", True),
    Method("mmft-mixed", MMFT, mixed, "mmft",
           "Compared with prototypes halfway between captions and class template.", True),
    Method("mmft-balanced", contrastive(samples_per_class=4), training_texts, "mmft",
           "Four images of each class in a batch: more positives for the SupCon term.", True),
    Method("mmft-schedule", contrastive(supcon_weight=0.5, supcon_weight_end=0.0), training_texts, "mmft",
           "w falls from 0.5 to 0 during training: classes first, then single images.", True),
    Method("mmft-averaged", contrastive(weight_averaging=0.95), training_texts, "mmft",
           "The running average of the weights (decay 0.95) instead of the last ones.", True),
    Method("mmft-dropout", contrastive(caption_dropout=0.5), training_texts, "mmft",
           "Half of the captions dropped in training: do class templates among them help?", True),
    Method("mmft-weighted", WEIGHTED, training_texts, "mmft",
           "Captions count in the loss by the score of --sample_weight: are better captions worth more?", True),
    Method("mmft-text-mix", MIXED, training_texts, "mmft",
           "Texts come from the sources of --text_mix: does it matter which captions are drawn how often?", True),
    Method("mmft-lora-all", contrastive(vision_tower="lora", text_tower="lora", recipe=None), training_texts, "mmft",
           "LoRA of rank 8 in all layers of both towers instead of whole towers.", True),
    Method("mmft-frozen-text", contrastive(text_tower="frozen"), training_texts, "mmft",
           "Only the image tower is trained.", True),
    Method("mmft-frozen-vision", contrastive(vision_tower="frozen"), training_texts, "mmft",
           "Only the text tower is trained.", True),

    Method("mmft-no-captions", NO_CAPTIONS, template, "ablation",
           "Class templates in training and at inference: the total effect of captions."),
    Method("mmft-train-captions", MMFT, template, "ablation",
           "Captions in training, the class template at inference: the effect of captions in training alone.", True),
    Method("mmft-test-captions", NO_CAPTIONS, captions, "ablation",
           "Class templates in training, captions at inference: the effect of captions at inference alone.", True),
    Method("mmft-w0", contrastive(supcon_weight=0.0), training_texts, "ablation",
           "w = 0, the CLIP loss alone: the effect of the SupCon term.", True),
    Method("mmft-w1", contrastive(supcon_weight=1.0), training_texts, "ablation",
           "w = 1, the SupCon loss alone: the effect of the CLIP term.", True),
    Method("mmft-shuffle-within", contrastive(partial(shuffled_captions, within=True)), training_texts, "ablation",
           "Captions shuffled within each class: does it help that a text belongs to its image?", True),
    Method("mmft-shuffle-across", contrastive(partial(shuffled_captions, within=False)), training_texts, "ablation",
           "Captions shuffled among all images, a control that should lose: do captions have to be true?", True),
    Method("mmft-permuted-labels", contrastive(permuted_labels), training_texts, "ablation",
           "Labels shuffled among all images, a control that should lose: only the class names in the texts are left.",
           True, sanity_check=True),
)
# fmt: on


def _halfway(method: Method) -> Method:
    """`NAME+wise`: halfway between untuned and tuned weights, as WiSE-FT recommends where nothing is tuned."""
    about = f"Weights halfway to those of the untuned model. {method.about}"
    return replace(method, name=f"{method.name}+wise", about=about, alpha=0.5)


def _with_auto(method: Method) -> Method:
    """`NAME+auto`: weights and head as `--head auto` chooses them on validation."""
    about, takes = f"Weights and head of --head auto. {method.about}", method.training.captions
    return replace(method, name=f"{method.name}+auto", about=about, auto=True, takes_captions=takes)


def _with_kernel(method: Method) -> Method:
    """`NAME+kernel`: the head of `--head kernel` on the trained weights."""
    about, takes = f"The head of --head kernel. {method.about}", method.training.captions
    head = fitted("kernel")
    return replace(method, name=f"{method.name}+kernel", about=about, inference=head, takes_captions=takes)


def _with_mix(method: Method) -> Method:
    """`NAME+mix`: mostly the untuned model, as MPS-Tuning mixes them at inference."""
    about = f"0.3 times the trained logits and 0.7 times the untuned ones, which takes two image towers. {method.about}"
    return replace(method, name=f"{method.name}+mix", about=about, share=0.3)


_TRAINED = [row for row in _ROWS if row.training and not row.auto]
_VARIANTS = [vary(row) for vary in (_halfway, _with_auto, _with_kernel) for row in _TRAINED]
_MIXES = [_with_mix(row) for row in _TRAINED if row.inference is trained_head]
METHODS = {row.name: row for row in (*_ROWS, *_VARIANTS, *_MIXES)}


def method_named(name: str) -> Method:
    """The method of a name. `NAME@SOURCE` is the method NAME with the captions of a refined folder, see `refined`.

    Raises:
        KeyError: there is none.
    """
    own, at, source = name.partition(AT)
    method = METHODS[own]
    if not at:
        return method
    return replace(method, name=name, about=f"{own} with the captions of {source}.", captions=source)


def weighs(name: str) -> bool:
    """Whether a method weighs captions by their scores."""
    return method_named(name).training is WEIGHTED


def mixes(name: str) -> bool:
    """Whether a method draws texts by their sources."""
    return method_named(name).training is MIXED


@dataclass
class Fitted:
    """A method fitted to a task.

    Args:
        classifier: gives scores.
        policy: what validation was used for: `last` (nothing), `val-k`, `val-full`.
        chosen: what validation chose, from `tried` candidates.
        steps: optimizer steps of the training that was kept.
        seconds: of all fits one after the other, including a training that other methods share.
    """

    classifier: Classifier
    policy: str
    validation_accuracy: float
    chosen: dict = field(default_factory=dict)
    tried: int = 1
    steps: int | None = None
    images: int | None = None
    seconds: float = 0.0


def fit(method: Method, context: Context, task: Task) -> Fitted:
    """Fits a method to a task. Validation chooses among the learning rates of a training, and the parameters of some heads.

    A learning rate at which training fails is not chosen; where all of them fail, the first error is raised. Of equally
    good ones the first is taken. `metric_for_best_model` compares them; parameters of heads on frozen features are compared by
    accuracy.
    """
    metric, best_value = metric_name(context.config.metric_for_best_model), None
    best, seconds, failed, untuned = None, 0.0, {}, Trained(context.model, task.train)
    trains = method.training not in (None, none_without_captions)
    recipe = method.training.recipe if trains else None
    rates = context.learning_rates if trains else (0.0,)
    if trains and context.budget == AUTHORS:
        rates = (settings_of(AUTHORS, recipe, task.shots)["learning_rate"],)
    for rate in rates:
        start = time.monotonic()
        try:
            trained = context.train(method.training, task, rate) if method.training else untuned
        except UserError as error:  # for example a loss of NaN: another rate may work
            failed[rate] = error
            seconds += time.monotonic() - start
            continue
        start, spent = time.monotonic(), (trained.steps, trained.images)
        if method.alpha < 1:
            trained = halfway(trained, context.model, method.alpha)
        picked = {}
        if method.auto:
            trained, head, picked = chosen_on_validation(context, task, trained)
        else:
            head = method.inference(context, task, trained)
        classifier = context.classifier(trained.model, head)
        if method.share < 1:
            classifier = context.mixture(trained, method.share)
        choice = head.choice if isinstance(head, FeatureHead) else None
        accuracy = value = choice.accuracy if choice else context.accuracy(classifier, task.validation)
        if len(rates) > 1 and metric != "accuracy":
            mixed = classifier if method.share < 1 else None
            value = context.report(trained.model, head, task.validation, mixed)[metric]
        seconds += trained.seconds + time.monotonic() - start
        if best is None or is_better(metric, value, best_value):
            best_value = value
            chosen = {"learning_rate": rate} if len(rates) > 1 else {}
            chosen |= trained.chosen | (choice.parameters if choice else {}) | picked
            tried = choice.tried if choice else len(rates)
            best = Fitted(classifier, "last", accuracy, chosen, tried, *spent)
    if best is None:
        raise next(iter(failed.values()))
    if failed:
        best.chosen["failed_rates"] = " ".join(f"{rate:g}" for rate in failed)
    if best.chosen or (method.training and selects_epoch(context.budget, recipe, task.shots)):
        best.policy = task.policy
    best.seconds = seconds
    return best
