"""`MMFTTrainer`: the stock Trainer with a sum of loss terms, caption draws and class logits.

It is one class in five files: this one, `checkpoints`, `averaging` (of weights), `pushes` (to the Hub) and `sharding` (FSDP).

Public methods of `transformers.Trainer` that are overridden:

| method | why |
|---|---|
| `train` | complete checkpoints of the same model only; averaged or sharded weights are put back at the end |
| `compute_loss`, `training_step` | loss terms over the batch of all processes; a loss that is not finite stops the run |
| `evaluate`, `predict`, `evaluation_loop`, `prediction_step` | class logits against a head of the current weights |
| `log` | means of what the loss terms return |
| `get_eval_dataloader` | persistent workers would keep serving the first dataset |
| `create_optimizer` | the last moment before FSDP shards the model; the rate of an adaptor |
| `save_model`, `push_to_hub`, `init_hf_repo`, `create_model_card` | a complete classifier, without pickles |

Private ones, which a release of transformers may change; `PRIVATE_HOOKS` lists them, and a test fails when one is gone:

| method | why |
|---|---|
| `_set_signature_columns_if_needed` | rows go to the collator: no column is unused |
| `_get_dataloader` | the views that read, crop and draw texts; frozen towers are encoded before |
| `_get_train_sampler` | an order that depends on the seed and the step's size alone |
| `_evaluate` | the untuned model is a candidate of the selection, as checkpoint-0 |
| `_run_epoch` | a run that was interrupted after its last step would make one more when it is resumed |
| `_init_training_state` | the best checkpoint of a folder that was moved is found |
| `_save` | LoRA: trained weights in checkpoints, merged ones elsewhere; averaged weights; no pickle |
| `_save_checkpoint` | only after finite losses; the stock rotation would delete a user's folder called checkpoint-… |
| `_load_from_checkpoint`, `_load_best_model` | averaged weights; prototypes of the weights before are outdated |
| `_load_optimizer_and_scheduler`, `_load_rng_state` | files that are no state of this run are named |
| `_issue_warnings_after_load` | what a LoRA checkpoint lacks is in the base model |
| `_push_from_checkpoint` | publishes a plain model with its head |

Private methods that are called: `_determine_best_metric`, `_finish_current_push`, `_prepare_inputs`. Private attributes:
`_signature_columns`, `_train_batch_size`, `_eval_dataloaders`.
"""

from __future__ import annotations

import copy
import logging
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import CLIPModel, CLIPProcessor, EvalPrediction, Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback

from ..core.console import say
from ..core.errors import UserError
from ..data.cache import check_short_side
from ..data.caption_sources import parse_mix, with_caption_sources
from ..data.caption_weights import WEIGHTS, with_caption_weights
from ..data.labels import class_names_of, has_several, labels_of
from ..data.sampling import IGNORED, ClassBalancedSampler, EpochSampler, is_example
from ..data.texts import class_prompt
from ..data.views import ImageView, TrainingView, check_dataset, warn_once
from ..model.collator import KEPT, MMFTDataCollator, PreparedRows, input_size
from ..model.embedding import add_embedding_forward, term_parameters, untuned_images
from ..model.families import FAMILIES, TEXT_INPUTS
from ..model.loading import encode_images, is_dual_encoder, logit_scale, run_head
from ..model.long_captions import check_stretched
from ..model.losses import Batch, class_cross_entropy
from ..model.towers import TOWERS, frozen_batch_norms
from ..predict.classifier import set_class_names
from ..predict.fitting.probe import log_priors
from ..predict.heads import ClassPrototypes, Head
from ..predict.metrics import report, several_report
from .averaging import WeightAveraging
from .checkpoints import TrainingCheckpoints, is_checkpoint
from .config import MMFTConfig
from .frozen import FrozenTowers
from .learnable import check_learnable, check_weights
from .progress import EpochLines
from .prototypes import prototypes_of
from .pushes import STAY, TrainingPushes
from .selection import SEVERAL, check_metric, metric_name, stale
from .sharding import ShardedTraining
from .terms import LossTerm, terms_of
from .texts import texts_of

logger = logging.getLogger(__name__)

# Private methods of transformers.Trainer that are overridden or called, with the parameters that are relied on.
PRIVATE_HOOKS = {
    "_set_signature_columns_if_needed": (),
    "_get_dataloader": ("dataset", "description", "batch_size", "is_training"),
    "_get_train_sampler": ("train_dataset",),
    "_evaluate": ("trial", "ignore_keys_for_eval", "skip_scheduler"),
    "_run_epoch": (),
    "_init_training_state": (),
    "_save": ("output_dir", "state_dict"),
    "_save_checkpoint": ("model", "trial"),
    "_load_from_checkpoint": ("resume_from_checkpoint",),
    "_load_best_model": (),
    "_load_optimizer_and_scheduler": ("checkpoint",),
    "_load_rng_state": ("checkpoint",),
    "_issue_warnings_after_load": ("load_result",),
    "_push_from_checkpoint": ("checkpoint_folder",),
    "_determine_best_metric": ("metrics", "trial"),
    "_finish_current_push": (),
    "_prepare_inputs": ("inputs",),
}
# Attributes of transformers.Trainer that are read or set without being documented.
PRIVATE_ATTRIBUTES = ("_signature_columns", "_train_batch_size", "_eval_dataloaders")


class MMFTTrainer(WeightAveraging, TrainingPushes, TrainingCheckpoints, ShardedTraining, Trainer):
    """Fine-tunes a `CLIPModel` on images with labels and captions.

    Args:
        model (`CLIPModel`): as `load_model` returns it, in float32.
        args (`MMFTConfig`): settings of the training and of the method.
        train_dataset (`datasets.Dataset`): columns `image`, `label` (`ClassLabel`, or lists of it for several labels per
            picture) and, if there are any, `captions`.
        eval_dataset (`datasets.Dataset`, *optional*): columns `image`, `label`: validation, which selects the best
            epoch. Without it the last step is kept.
        processing_class (`CLIPProcessor`): that of the model.
        compute_metrics (*optional*): gets class logits `(n, C)` and labels `(n,)`; the default gives `accuracy`,
            `top5_accuracy` and `mean_per_class_accuracy`, with several labels per picture `mean_average_precision`.
        loss (`LossTerm` or a list of them, *optional*): what is minimized, see `train.terms`. Default: MMFT's own two terms,
            with the weights of `args`.

    Each step makes one forward of the wrapped model with B images and B texts; one caption per image is drawn in
    every epoch. Evaluation compares images with the class prototypes of the current weights (`args.prototypes`); its
    `eval_loss` is the cross-entropy of the class logits, which, unlike a contrastive loss, does not depend on the batch size.

    Raises:
        UserError: a model, a dataset or a checkpoint does not fit.

    References: Enomoto & Yamaguchi 2026, "MultiModal Fine-tuning with Synthetic Captions" (arXiv 2601.21426).
    """

    def __init__(
        self,
        model: CLIPModel,
        args: MMFTConfig,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: CLIPProcessor | None = None,
        compute_metrics=None,
        loss: LossTerm | Sequence[LossTerm] | None = None,
        **kwargs,
    ):
        # -- model and data ----------------------------------------------------------------------------------------
        if not is_dual_encoder(model):
            raise UserError(
                f"model: expected a CLIPModel or another dual encoder, found {type(model).__name__}. Use mmft_hf.load_model(…)."
            )
        if hasattr(model, "get_base_model") or getattr(model, "_hf_peft_config_loaded", False):
            raise UserError(
                "model: expected a CLIPModel without an adapter of PEFT, which would not keep the trained logit scale. Use "
                'mmft_hf.set_towers(model, "lora", "lora").'
            )
        if processing_class is None:
            raise UserError("processing_class: expected the CLIPProcessor of the model. Use mmft_hf.load_model(…).")
        half = sorted({str(p.dtype) for p in model.parameters() if p.dtype in (torch.float16, torch.bfloat16)})
        if half:
            raise UserError(
                f"model: expected float32 weights, found {half[0]}, in which AdamW's steps vanish. Load it with "
                "mmft_hf.load_model(…) or dtype=torch.float32, and use bf16=True for speed."
            )
        for name in ("gradient_checkpointing", "activation_checkpointing"):  # which releases of transformers differ in
            if getattr(args, name, False) and not model.supports_gradient_checkpointing:
                raise UserError(
                    f"--{name}: expected a model that can, found a {type(model).__name__}. Type --loss_chunk_size 16 instead: the "
                    "loss is that of the whole batch, and the memory that of 16 images."
                )
        if args.head_learning_rate and FAMILIES[model.config.model_type].texts != "vectors":
            raise UserError(
                f"--head_learning_rate: expected a model with an adaptor, as --text_trunk makes one, found a {type(model).__name__}. Leave "
                "it out, or type --text_trunk too."
            )
        if args.long_captions == "stretch":
            check_stretched(model)
        if args.decode_cache:
            check_short_side(args.decode_cache, input_size(processing_class))
        if args.n_gpu > 1:
            raise UserError(
                f"expected one process per GPU, found one process with {args.n_gpu} GPUs. Type accelerate launch "
                f"--num_processes {args.n_gpu} recipes/finetune.py …, or set CUDA_VISIBLE_DEVICES=0 to use one."
            )
        self.class_names: list[str] | None = None
        if train_dataset is not None:
            train_dataset = check_dataset("train_dataset", train_dataset)
            self.class_names = class_names_of(train_dataset)
        several = train_dataset is not None and has_several(train_dataset)
        if several or args.metric_for_best_model is None:
            named, args = args.metric_for_best_model, copy.copy(args)
            args.metric_for_best_model = check_metric(named, self.class_names, True) if several else metric_name(None)
        if eval_dataset is not None:
            eval_dataset = check_dataset("eval_dataset", eval_dataset, self.class_names)
            if train_dataset is not None and has_several(eval_dataset) != several:
                raise UserError(
                    "eval_dataset: expected labels as in train_dataset, found lists of labels in one of them, and one label per "
                    "picture in the other. Give lists, or one label per picture, in both."
                )
        else:
            if args.eval_strategy != "no":
                logger.warning("There is no eval_dataset: no epoch is selected, the last step is kept.")
            args = copy.copy(args)
            args.eval_strategy, args.eval_on_start, args.load_best_model_at_end = "no", False, False
        if args.gradient_accumulation_steps > 1:
            logger.warning(
                "gradient_accumulation_steps=%d averages gradients over several batches; it does not enlarge the contrastive "
                "batch of %d images. For that, give it a larger per_device_train_batch_size, with loss_chunk_size=%d.",
                args.gradient_accumulation_steps,
                args.per_device_train_batch_size * args.world_size,
                args.per_device_train_batch_size,
            )

        # -- loss and batches --------------------------------------------------------------------------------------
        self.terms = terms_of(loss, args)
        if train_dataset is not None:
            for note in check_learnable(labels_of(train_dataset), self.terms, args, model):
                if args.process_index == 0:
                    logger.warning(note)
        self.loss_weights: list[float] = []  # of the present step
        self.mean_weights: dict[str, float] = {}  # as of the last log, by the name of the term
        self._adjustment: torch.Tensor | None = None  # added to class logits, `(C,)`
        if args.logit_adjustment and train_dataset is not None:
            labels = labels_of(train_dataset)
            counts = np.bincount(labels[labels != IGNORED], minlength=len(self.class_names))
            self._adjustment = args.logit_adjustment * log_priors(torch.from_numpy(counts)).to(args.device)
        add_embedding_forward(model, {term.name: term.parameters for term in self.terms})
        needs = {need for term in self.terms for need in term.needs}
        if train_dataset is not None:
            train_dataset = _weighted(train_dataset, args, "texts" in needs)
            train_dataset = _with_sources(train_dataset, args, "texts" in needs)
        class_texts = (class_prompt(args.class_template, name) for name in self.class_names or ())
        data_collator = kwargs.pop("data_collator", None) or MMFTDataCollator(
            processing_class,
            distinct_texts=not args.torch_compile,
            pad_to_limit=args.torch_compile,
            texts="texts" in needs,
            class_texts=tuple(class_texts) if "class_texts" in needs else (),
        )

        # -- the stock Trainer -------------------------------------------------------------------------------------
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics or self._class_metrics,
            **kwargs,
        )
        self._tokens = "image_tokens" in needs
        self._untuned = untuned_images(self.model).to(args.device) if "untuned_images" in needs else None
        self.texts = texts_of(self.class_names or (), args, processing_class, self._data_seed)
        if self.class_names:
            set_class_names(self.model, self.class_names)
        self._batch_norms = frozen_batch_norms(self.model)
        self.prototypes: Head | None = None
        self._prototypes_of: object = None
        self._sampler: EpochSampler | None = None
        self._told_fallback = False
        self._eval_loader_of: Dataset | None = None
        self._sums: dict[str, torch.Tensor | float] = defaultdict(float)
        self._unseen_losses: list[tuple[int, torch.Tensor, torch.cuda.Event | None]] = []

        # -- three lines that every contrastive Trainer needs --------------------------------------------------------
        # CLIPModel.forward takes **kwargs, so the Trainer would assume that the model divides the loss by the number of
        # accumulated items. It does not, and gradients would be multiplied by the accumulation steps.
        self.model_accepts_loss_kwargs = False
        # training_step divides by the accumulation steps; in transformers 5.2 accelerate would do so again.
        if not self.is_deepspeed_enabled:
            self.accelerator.gradient_accumulation_steps = 1
        # Otherwise evaluate() would leave out the loss.
        self.can_return_loss = True
        self.label_names = ["labels"]

        self._frozen = FrozenTowers(self.model, processing_class, args, self.data_collator)
        self.add_callback(self._frozen)
        self.add_callback(_Beginnings(self))
        if args.patience and args.load_best_model_at_end:
            self.add_callback(_Patience())
        # One line per epoch instead of a dictionary.
        self.remove_callback(PrinterCallback if args.disable_tqdm else ProgressCallback)
        start = getattr(model, "mmft_start", "untuned model")
        bar = not args.disable_tqdm
        self.add_callback(EpochLines(self.terms, self.mean_weights, lambda: self.prototypes, bar, start))

    @property
    def _data_seed(self) -> int:
        """Seed of the order of the images, of their crops and of the drawn texts."""
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    # -- data -------------------------------------------------------------------------------------------------------
    def _set_signature_columns_if_needed(self):
        # Rows go to the collator, not to model.forward: nothing is unused.
        self._signature_columns = ["image", "pixel_values", "label", "text", "box", "skipped", "cut", "weight", *KEPT]

    def _get_dataloader(self, dataset, description, batch_size, *args, is_training=False, **kwargs):
        if isinstance(dataset, Dataset):
            if is_training:
                options = (
                    self.args.crop_min_area,
                    self.args.on_bad_image,
                    self.args.decode_cache,
                    self.args.horizontal_flip,
                )
                view = TrainingView(dataset, self.texts, *options)
                if isinstance(self.eval_dataset, Dataset):  # now, while one process has all weights
                    self._frozen.attach(
                        ImageView(self.eval_dataset, self.args.on_bad_image, "validation"), self.eval_dataset
                    )
            else:
                name = "validation" if description == "Evaluation" else description.lower()
                dataset = check_dataset(f"{name} data", dataset, self.class_names)
                view = ImageView(dataset, self.args.on_bad_image, name)
            self._frozen.attach(view, dataset)
            dataset = PreparedRows.of(view, self.data_collator)
        if is_training:
            batch_size = self.args.train_batch_size  # auto_find_batch_size lowers the chunks instead: see _chunk_size
        return super()._get_dataloader(dataset, description, batch_size, *args, is_training=is_training, **kwargs)

    def get_eval_dataloader(self, eval_dataset=None):
        # With persistent workers, the stock method returns its first loader, whatever dataset it is asked for.
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if self._eval_loader_of is not dataset:
            vars(self).get("_eval_dataloaders", {}).clear()
        self._eval_loader_of = dataset
        return super().get_eval_dataloader(eval_dataset)

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        args, seed = self.args, self._data_seed
        # Only a single process may have a shorter last batch, unless the model is compiled for one shape.
        fill_up = args.world_size > 1 or args.torch_compile
        share = (args.world_size, args.train_batch_size if fill_up else None)
        if args.samples_per_class or args.class_balance:
            labels, step_size = self.train_dataset["label"][:], args.world_size * args.train_batch_size
            self._sampler = ClassBalancedSampler(labels, step_size, args.samples_per_class or 1, seed, *share)
        else:
            self._sampler = EpochSampler(len(dataset), seed, *share)
        return self._sampler

    # -- training ---------------------------------------------------------------------------------------------------
    def create_optimizer(self, *args, **kwargs):
        """The stock optimizer; the adaptor of an `AdaptedCLIP` has a learning rate of its own."""
        new, model = self.optimizer is None, self.model
        optimizer = super().create_optimizer(*args, **kwargs)
        if new and FAMILIES[model.config.model_type].texts == "vectors":
            rate = self.args.head_learning_rate or 10 * self.args.learning_rate
            adaptor = {id(p) for name, p in model.named_parameters() if name.startswith(TOWERS["text"])}
            for group in list(optimizer.param_groups):
                own = [p for p in group["params"] if id(p) in adaptor]
                group["params"] = [p for p in group["params"] if id(p) not in adaptor]
                if own:
                    optimizer.add_param_group({**group, "params": own, "lr": rate})
            # A group that is left without parameters has nothing to train, but stays: states of checkpoints are by group.
        return optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The sum of the loss terms, through exactly one forward of the wrapped model."""
        for layer in self._batch_norms:  # the stock step has just called model.train()
            layer.eval()
        outputs = self._forward(model, inputs)
        scalars = {"batches": torch.ones(()), "images": is_example(inputs["labels"]).sum()}
        scalars["skipped_images"] = inputs["skipped"].sum()
        if "captions_cut" in inputs:
            scalars["captions_cut"] = inputs["captions_cut"].sum()
        # Everything that the loss needs from other processes is gathered here.
        embeds = {name: outputs[name] for name in ("image_embeds", "text_embeds") if name in outputs}
        extras = {name: outputs[name] for name in ("class_embeds",) if name in outputs}
        extras |= {} if self._adjustment is None else {"adjustment": self._adjustment}
        own = {name: outputs[name] for name in ("untuned_image_embeds",) if name in outputs}
        with torch.autocast(inputs["labels"].device.type, enabled=False):
            for term in self.terms:
                own |= term.local(outputs)
        shared = {"parameters": outputs["parameters"], "extras": extras, "image_extras": own, "equal_sizes": True}
        if self.args.sample_weight:
            if "weights" not in inputs:  # of a collator of the user's
                raise UserError("data_collator: expected weights in each batch with --sample_weight, found none.")
            shared["weights"] = inputs["weights"]
        batch = Batch.gathered(labels=inputs["labels"], scale=outputs["scale"], **embeds, **shared)
        loss = 0.0
        with torch.autocast(batch.labels.device.type, enabled=False):
            for term, weight in zip(self.terms, self.loss_weights, strict=True):
                values = dict(term(batch))
                value = values.pop("loss")
                scalars |= {f"{term.name}_loss": value, **values, f"{term.name}_weight": torch.tensor(weight)}
                if weight:  # otherwise it is left out, so that an overflow cannot leak into the sum
                    loss = loss + weight * value
        for name, value in scalars.items():
            self._sums[name] = self._sums[name] + value.detach()
        return (loss, outputs) if return_outputs else loss

    def _forward(self, model, inputs: dict[str, torch.Tensor]) -> dict:
        """Embeddings of the images of this process, of their texts and of the class texts, and the scale of the logits."""
        names = ("pixel_values", *TEXT_INPUTS, "image_trunk", "text_trunk")
        encoded = {name: inputs[name] for name in names if name in inputs}
        options = {"chunk_size": self._chunk_size()} | ({"tokens": True} if self._tokens else {})
        outputs = dict(model(**encoded, **options))
        untuned = {} if self._untuned is None else self._untuned_images(inputs, options)
        texts, rows = outputs.pop("text_embeds", None), inputs.get("text_rows")
        if "class_rows" in inputs:
            outputs["class_embeds"] = texts[inputs["class_rows"]]
        if texts is not None and "captions_cut" in inputs:
            own = texts[: len(inputs["labels"])] if "class_rows" in inputs else texts
            outputs["text_embeds"] = own if rows is None else texts[rows]
        outputs |= outputs.pop("projected", {})
        # The embeddings of a frozen tower come with the batch.
        return outputs | untuned | {name: inputs[name] for name in ("image_embeds", "text_embeds") if name in inputs}

    def _untuned_images(self, inputs: dict[str, torch.Tensor], options: dict) -> dict[str, torch.Tensor]:
        """Embeddings, and tokens, of the images of this process by the image tower as this Trainer got it."""
        if "image_embeds" in inputs:  # of a frozen tower
            return {"untuned_image_embeds": inputs["image_embeds"]}
        pictures = {name: inputs[name] for name in ("pixel_values", "image_trunk") if name in inputs}
        with torch.no_grad(), self.accelerator.autocast():
            found = self._untuned(**pictures, **options)
        found |= found.pop("projected", {})
        return {f"untuned_{name}": found[name] for name in ("image_embeds", "image_tokens") if name in found}

    def _chunk_size(self) -> int:
        """Rows encoded at a time; 0: all. If memory runs out, `auto_find_batch_size` lowers this and not the batch."""
        chosen = self.args.loss_chunk_size or 0
        if self.args.auto_find_batch_size and self._train_batch_size < self.args.train_batch_size:
            return min(chosen, self._train_batch_size) if chosen else self._train_batch_size
        return chosen

    def training_step(self, model, inputs, num_items_in_batch=None):
        """One forward and backward. A loss that is not finite stops the training before anything is saved."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        arrived = None
        if loss.device.type == "cuda":
            # Reading it now would wait for the GPU's whole queue. It is copied, and read one step later.
            sent, arrived = loss.to("cpu", non_blocking=True), torch.cuda.Event()
            arrived.record()
        else:
            sent = loss
        self._unseen_losses.append((self.state.global_step + 1, sent, arrived))
        self._expect_finite_losses(0 if loss.device.type == "cpu" else 1)
        return loss

    def log(self, logs, start_time=None):
        """Adds the means of what the loss terms returned since the last log of a training loss."""
        if "loss" in logs and self._sums:
            totals = {
                name: self.accelerator.reduce(
                    torch.as_tensor(total, dtype=torch.float32, device=self.args.device)
                ).item()
                for name, total in self._sums.items()
            }
            batches, images = totals.pop("batches"), totals.pop("images")
            logs["skipped_images"] = totals.pop("skipped_images")
            if "captions_cut" in totals:
                logs["captions_cut"] = totals.pop("captions_cut") / images
            means = {name: total / batches for name, total in totals.items()}
            for term in self.terms:
                self.mean_weights[term.name] = means[f"{term.name}_weight"]
                if not term.log_weight:
                    del means[f"{term.name}_weight"]
            logs |= means
            self._sums.clear()
        super().log(logs, start_time)

    # -- evaluation -------------------------------------------------------------------------------------------------
    def build_prototypes(self, shard: bool = True) -> Head:
        """The head that a loss term trains, else prototypes of the current weights, from the source that `args.prototypes`
        names.

        Args:
            shard: each of several processes encodes its share; all of them must call this.
        """
        model, processor = self.accelerator.unwrap_model(self.model), self.processing_class
        for term in self.terms:
            head = term.head(term_parameters(model).get(term.name, {}), self.class_names)
            if head is not None:
                return replace(head, several_labels=has_several(self.train_dataset))
        found = prototypes_of(model, processor, self.train_dataset, self.args, shard)
        if isinstance(found, ClassPrototypes) and found.fallback_classes and not self._told_fallback:
            self._told_fallback = True
            logger.warning("Classes without captions use the template: %s", ", ".join(found.fallback_classes))
        return found

    def current_prototypes(self) -> Head:
        """The head of the current weights: that of the last call if its weights are unchanged, else a new one."""
        model = self.accelerator.unwrap_model(self.model)
        tower = TOWERS["vision" if self.args.prototypes == "images" else "text"]
        tower += ("loss_terms.",)  # which may hold the head itself
        trained = any(p.requires_grad for name, p in model.named_parameters() if name.startswith(tower))
        of = self.state.global_step if trained else STAY
        if self.prototypes is None or self._prototypes_of != of:
            with self.accelerator.autocast():  # as for the images that are compared with it
                self.prototypes = self.build_prototypes()
            self._prototypes_of = of
        if isinstance(self.prototypes, ClassPrototypes):  # the scale is always trained
            self.prototypes.logit_scale = logit_scale(model).detach().float().item()
        return self.prototypes

    def forget_prototypes(self) -> None:
        """To be called after weights were changed by anything other than training."""
        self._prototypes_of = None

    def evaluation_loop(self, *args, **kwargs):
        """The stock loop, with a head of the current weights."""
        self._expect_finite_losses()
        self.current_prototypes()
        output = super().evaluation_loop(*args, **kwargs)
        if isinstance(output.predictions, np.ndarray) and self.preprocess_logits_for_metrics is None:
            # The stock mean gives batches equal weights, even if they are shorter or have unreadable images.
            labels = torch.from_numpy(output.label_ids)
            loss = _cross_entropy(torch.from_numpy(output.predictions), labels).item()
            output.metrics[f"{kwargs.get('metric_key_prefix', 'eval')}_loss"] = loss
        for name, value in output.metrics.items():
            if name.endswith("_loss") and not math.isfinite(value):
                self.stop_at("the validation loss", value, self.state.global_step)
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Class logits `(B, C)` of a batch, and their mean cross-entropy as the loss."""
        inputs = self._prepare_inputs(inputs)
        labels = inputs["labels"]
        with torch.no_grad(), self.accelerator.autocast():
            embeds = inputs.get("image_embeds")
            if embeds is None:
                plain = self.accelerator.unwrap_model(model)
                if "image_trunk" in inputs:
                    embeds = run_head(plain, "vision", inputs["image_trunk"])
                else:
                    embeds = encode_images(plain, inputs["pixel_values"])
        logits = self.prototypes.logits(embeds)
        loss = _cross_entropy(logits, labels)
        return (loss, None, None) if prediction_loss_only else (loss, logits, labels)

    def _class_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        labels, names = prediction.label_ids, self.prototypes.class_names
        if labels.ndim == 2:  # the decisions of several labels are fitted later
            return {SEVERAL: several_report(prediction.predictions, labels, names)[SEVERAL]}
        result = report(prediction.predictions, labels, names)
        keys = ("accuracy", "top5_accuracy", "mean_per_class_accuracy")
        return {key: result[key] for key in keys if key in result}

    def save_model(self, output_dir=None, _internal_call=False):
        """Saves a folder that predicts: model, processor, class names and head. Checkpoints get no head.

        Args:
            output_dir: the folder. Default: `args.output_dir`.
        """
        folder = Path(output_dir or self.args.output_dir)
        if self.class_names and not is_checkpoint(folder):
            with self._averaged(), self._unsharded():
                if self.args.should_save:
                    self.build_prototypes(shard=False).save_pretrained(folder)
        super().save_model(output_dir, _internal_call)

    def create_model_card(self, *args, **kwargs):
        """Does nothing: the stock card would overwrite the one with the results."""


def _weighted(dataset: Dataset, args: MMFTConfig, texts: bool) -> Dataset:
    """The training images with the weights of their captions that `args.sample_weight` asks for, and with no others.

    Args:
        texts: whether the loss has texts that could be weighted.
    """
    if not args.sample_weight:
        return dataset.remove_columns(WEIGHTS) if WEIGHTS in dataset.column_names else dataset
    if not texts:
        raise UserError(
            f"--sample_weight: expected a loss of images and texts, found one without texts, with {args.sample_weight}. Leave it out."
        )
    dataset, notes = with_caption_weights(dataset, args.sample_weight)
    for note in notes if args.process_index == 0 else ():
        warn_once(note)
    return dataset


def _with_sources(dataset: Dataset, args: MMFTConfig, texts: bool) -> Dataset:
    """The training images with the sources of their captions, as far as `args.text_mix` names any.

    Args:
        texts: whether the loss has texts that could be drawn.
    """
    if args.text_mix and not texts:
        raise UserError(
            f"--text_mix: expected a loss of images and texts, found one without texts, with {' '.join(args.text_mix)}. Leave it out."
        )
    dataset, notes = with_caption_sources(dataset, parse_mix(args.text_mix or ()))
    for note in notes if args.process_index == 0 else ():
        warn_once(note)
    return dataset


class _Beginnings(TrainerCallback):
    """Prepares the start of a training, an epoch and a step."""

    def __init__(self, trainer: MMFTTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        # A schedule is looked at before the first step, at up to a thousand of its steps.
        for step in range(0, state.max_steps, 1 + state.max_steps // 1000):
            check_weights(self.trainer.terms, step, state.max_steps)
        # A second training, or a restart after memory ran out, counts its steps from 0 with other weights.
        self.trainer.forget_prototypes()
        self.trainer._sums.clear()
        self.trainer._unseen_losses.clear()

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer.loss_weights = check_weights(self.trainer.terms, state.global_step, state.max_steps)

    # The stock call misses a wrapped loader, as after a resume within an epoch on several processes.
    def on_epoch_begin(self, args, state, control, **kwargs):
        if self.trainer._sampler is not None:
            self.trainer._sampler.set_epoch(int(state.epoch or 0))


class _Patience(TrainerCallback):
    """Ends a training in which validation has long stopped improving. It looks at the log alone, so a resume changes nothing."""

    def on_evaluate(self, args, state, control, **kwargs):
        metric = metric_name(args.metric_for_best_model)
        values = {log["step"]: log[f"eval_{metric}"] for log in state.log_history if f"eval_{metric}" in log}
        if (
            stale(list(values.values()), args.greater_is_better) >= args.patience
            and state.global_step < state.max_steps
        ):
            control.should_training_stop = True
            say(f"Validation has not improved for {args.patience} times: the training ends here (--patience).")


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean over the rows `(B, C)` with a label; 0 if none has one. Labels are `(B,)` or `(B, C)`."""
    if labels.ndim == 2:
        return class_cross_entropy(logits, labels)
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum") / (labels != IGNORED).sum().clamp(
        min=1
    )
