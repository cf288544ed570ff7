"""The settings of training: `TrainingArguments` plus the settings of the method."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType

from ..core import launch
from ..core.arguments import Range, check_settings, setting
from ..core.console import some
from ..core.errors import UserError
from ..core.reading import parse_json, read_bytes
from ..data.caption_sources import parse_mix
from ..data.caption_weights import check_weighting
from ..data.texts import DEFAULT_TEMPLATE, check_template
from ..predict.fitting import NAMES
from .selection import METRICS, metric_name

LONG_CAPTIONS = ("cut", "windows", "stretch")
PROTOTYPE_SOURCES = ("captions", "template", "templates", "images")
SHARE = Range(0, 1)
# Stock settings that no weight depends on, so that a resume may change them. Any other one counts as deciding, also one that
# a later version of transformers adds. Our own say it themselves (`decides` in their metadata).
HARMLESS = frozenset(
    """
    output_dir resume_from_checkpoint save_total_limit save_on_each_node do_train do_eval do_predict
    logging_dir logging_first_step logging_nan_inf_filter logging_steps logging_strategy log_level log_level_replica
    log_on_each_node disable_tqdm report_to run_name project trackio_bucket_id trackio_space_id trackio_static_space_id
    debug skip_memory_metrics include_for_metrics include_inputs_for_metrics include_num_input_tokens_seen
    include_tokens_per_second per_device_eval_batch_size eval_accumulation_steps
    dataloader_drop_last dataloader_in_order dataloader_multiprocessing_context dataloader_num_workers
    dataloader_persistent_workers dataloader_pin_memory dataloader_prefetch_factor
    push_to_hub push_to_hub_model_id push_to_hub_organization push_to_hub_token hub_always_push hub_model_id
    hub_private_repo hub_revision hub_strategy hub_token
    use_cpu _n_gpu local_rank accelerator_config full_determinism auto_find_batch_size
    ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph ddp_timeout
    activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs
    torch_compile torch_compile_backend torch_compile_mode
    """.split()
)
# Stock settings that must keep their default, and why.
UNSUPPORTED = {
    "prediction_loss_only": (False, "it has no meaning for this loss"),
    "label_smoothing_factor": (0.0, "it has no meaning for this loss"),
    "train_sampling_strategy": ("random", "it has no meaning for this loss"),
    "neftune_noise_alpha": (None, "CLIP's text tower has no such noise"),
    "dataloader_drop_last": (False, "it would also drop the last images of every evaluation"),
    "eval_do_concat_batches": (True, "metrics are computed over all images at once"),
}


MOST_EPOCHS = 1_000_000  # an infinite number has no schedule
MOST_STEPS = 10**12
# Of stock settings that the Trainer does not check.
RANGES = {"warmup_steps": Range(high=MOST_STEPS), "eval_accumulation_steps": Range(1), "data_seed": Range()}


@dataclass
class MMFTConfig(TrainingArguments):
    """`TrainingArguments` with the settings of the method, and the paper's defaults where they differ.

    References: Enomoto & Yamaguchi 2026, "MultiModal Fine-tuning with Synthetic Captions" (arXiv 2601.21426): AdamW at
    1e-5 with weight decay 1e-4, cosine to zero without warm-up, no clipping, batches of 64, 50 epochs, w = 0.1.
    """

    GROUPS: ClassVar = {
        "method": "supcon_weight supcon_weight_end include_self class_template caption_dropout text_mix long_captions sample_weight "
        "prototypes template_weight samples_per_class class_balance weight_averaging crop_min_area horizontal_flip on_bad_image",
        "classifier": "head head_alphas logit_adjustment calibrate reject_below reject_for_accuracy threshold",
        "training": "num_train_epochs max_steps per_device_train_batch_size learning_rate head_learning_rate tune lr_scheduler_type warmup_steps "
        "weight_decay max_grad_norm seed eval_strategy eval_on_start load_best_model_at_end metric_for_best_model "
        "greater_is_better patience",
        "speed and memory": "use_cpu bf16 per_device_eval_batch_size loss_chunk_size auto_find_batch_size *",
        "output": "output_dir overwrite_output_dir resume_from_checkpoint save_strategy save_total_limit "
        "logging_strategy logging_nan_inf_filter report_to push_to_hub hub_model_id hub_private_repo",
    }
    STOCK_HELP: ClassVar = {
        "max_steps": "Number of training steps. -1: num_train_epochs decides.",
        "warmup_steps": "Steps in which the learning rate rises from 0 to its peak; below 1, a share of all steps.",
        "use_cpu": "Train on the CPU even if there is an accelerator.",
        "resume_from_checkpoint": "true: continue the run in output_dir from its last complete checkpoint; or a "
        "checkpoint's folder.",
        "push_to_hub": "Publish the model on the Hub during and after training.",
        "hub_model_id": "Name of the Hub repository. Default: the name of output_dir.",
        "hub_private_repo": "Create the Hub repository as private.",
    }

    output_dir: str | None = setting(
        "outputs/mmft", "Folder of the results. A folder that holds a run is not overwritten."
    )
    overwrite_output_dir: bool = setting(
        False, "Delete the run that output_dir holds, and start a new one there.", decides=False
    )
    supcon_weight: float = setting(0.1, "w of the loss w * SupCon + (1 - w) * CLIP, from 0 to 1.", range=SHARE)
    supcon_weight_end: float | None = setting(
        None,
        "Final value of w: it changes linearly, step by step, from supcon_weight to this value after the last step. "
        "Default: w is constant.",
        range=SHARE,
    )
    include_self: bool = setting(False, "UniCL form: an image's own text is a positive of the SupCon term, too.")
    class_template: str = setting(
        DEFAULT_TEMPLATE, "Text before every caption, and the zero-shot prompt; {} stands for the class name."
    )
    caption_dropout: float = setting(
        0.0,
        "Probability, from 0 to 1, that a training text is the class template alone, without a caption.",
        range=SHARE,
    )
    long_captions: str = setting(
        "cut",
        "Captions that are longer than the text tower reads, 77 tokens for CLIP. cut: their ends are left out; windows: they are "
        "split at sentences, of which training draws one part and prototypes average all; stretch: the text tower reads 248 tokens, "
        "with positions in between the learned ones (CLIP and MetaCLIP 2 alone).",
        choices=LONG_CAPTIONS,
    )
    text_mix: list[str] | None = setting(
        None,
        "NAME=SHARE …, for example template=0.2 short=0.5: with these probabilities a training text is the class template alone, or has a "
        "caption of that step, aspect or prompt_id in caption_records; otherwise one of all captions. Default: always one of all captions.",
    )
    sample_weight: str | None = setting(
        None,
        "score:NAME, for example score:clip_gain: an image and its caption count in the loss by the score of the caption, a score that "
        "mmft-hf caption refine wrote. The lowest eighth of all scores counts 0.125, the highest 1.875. Default: all count alike.",
    )
    samples_per_class: int | None = setting(
        None,
        "Class-balanced batches with this many images of each class (2 or more), so that SupCon has positives even with "
        "many classes. Default: plain shuffle.",
        range=Range(2),
    )
    class_balance: bool = setting(
        False,
        "Draw each class equally often, so that rare classes are seen more often and common ones less; an epoch keeps its "
        "number of images.",
    )
    loss_chunk_size: int | None = setting(
        None,
        "Encode a batch in chunks of this many images. This saves memory and costs one more forward; the loss and its "
        "gradient are still those of the whole batch. Default: all at once.",
        range=Range(1),
        decides=False,
    )
    prototypes: str = setting(
        "captions",
        "What an image is compared with: class averages of the training captions, of one template, of "
        "several templates, or of the training images.",
        choices=PROTOTYPE_SOURCES,
    )
    weight_averaging: float = setting(
        0.0,
        "Decay, below 1 (for example 0.99), of an exponential moving average of the trained weights. The average is what "
        "is evaluated and saved; it takes the memory of one more copy of them. 0: off.",
        range=Range(0, 1, open=("high",)),
    )
    template_weight: float = setting(
        0.0,
        "Share t, from 0 to 1, of the class template in prototypes of captions: (1 - t) * captions + t * template, "
        "normalized.",
        range=SHARE,
    )
    crop_min_area: float = setting(
        0.9,
        "Random crops keep at least this share of the area, at ratios of 3:4 to 4:3 (a wider image is cropped to 4:3 in "
        "the middle); 1: no random crop.",
        range=Range(0, 1, open=("low",)),
    )
    horizontal_flip: bool = setting(
        False,
        "Mirror half of the training pictures, drawn anew in each epoch; not where left and right mean something.",
    )
    on_bad_image: str = setting(
        "fail", "fail: stop at an image that cannot be read; skip: leave it out and count it.", choices=("fail", "skip")
    )

    head: str = setting(
        "auto",
        "What turns an image embedding into a class. auto: the mean of class prototypes, Gaussians and a kernel regression on "
        "the training images, or another head if validation shows that it is better; prototypes: the paper's method.",
        choices=("auto", *NAMES),
        decides=False,
    )
    head_alphas: list[float] = setting(
        [0.0, 0.5, 1.0],
        "Weights that are compared for the head: (1 - a) * untuned + a * tuned. 0.5 is kept unless validation shows that "
        "another one is better. With LoRA 0 and 1 are compared.",
        decides=False,
    )
    logit_adjustment: float = setting(
        0.0,
        "For classes of unequal sizes: while the head linear or logistic, or a cross-entropy over the classes, is trained, this "
        "many times the logarithm of a class's share of the images is added to its logits, so that rare classes are not neglected. "
        "Try 1.",
        range=Range(0, 10),
    )
    calibrate: bool = setting(True, "Fit the temperature of the class probabilities on validation.", decides=False)
    reject_below: float | None = setting(
        None,
        "Answer `unknown` if the best class has a probability below this. Default: each picture gets a class. With several labels "
        "per picture: a class holds from this score on; default 0.5.",
        range=SHARE,
        decides=False,
    )
    reject_for_accuracy: float | None = setting(
        None,
        "Choose reject_below on validation, so that accepted answers have this accuracy (for example 0.95), with 95 %% confidence.",
        range=Range(0, 1, open=("low", "high")),
        decides=False,
    )
    threshold: str = setting(
        "half",
        "With several labels per picture, the score from which on a class holds. half: 0.5, or reject_below; f1: for each class the "
        "one with the best F1 on validation.",
        choices=("half", "f1"),
        decides=False,
    )
    cache_frozen_features: bool = setting(
        True,
        "Encode everything with a frozen tower only once, and keep the embeddings on disk (mmft-hf env says where) for "
        "later epochs and runs on the same content.",
        decides=False,
    )
    decode_cache: int | None = setting(
        None,
        "Keep decoded training pictures on disk, with a short side of this many pixels (for example 256). This saves "
        "time where decoding takes most of it; results differ slightly from those of the original pictures. Evaluation "
        "reads the originals. Default: no such cache.",
        range=Range(1),
    )

    # Defaults of the method, or of what a classifier's user expects, where they differ from the Trainer's.
    learning_rate: float = setting(1e-5, "Peak learning rate of AdamW.", range=Range(0, open=("low", "high")))
    head_learning_rate: float | None = setting(
        None,
        "Peak learning rate of the adaptor of --text_trunk. Default: 10 times learning_rate.",
        range=Range(0, open=("low", "high")),
    )
    tune: int | None = setting(
        None,
        "Try this many learning rates around learning_rate (6, for example) in short trainings, and train with the one that is best "
        "on validation. This takes about as many steps as the training itself. Default: no search.",
        range=Range(2, 32),
    )
    seed: int = setting(42, "Seed of everything random in training.", range=Range(0, 2**32 - 1))
    gradient_accumulation_steps: int = setting(
        1, "Batches whose gradients are averaged for one step; the contrastive batch stays.", range=Range(1)
    )
    weight_decay: float = setting(1e-4, "Weight decay (not on norms and biases).", range=Range(0))
    lr_scheduler_type: SchedulerType | str = setting("cosine", "Learning-rate schedule.")
    max_grad_norm: float = setting(0.0, "Gradient clipping; 0: none.", range=Range(0))
    num_train_epochs: float | None = setting(
        None, "Epochs of training. Default: 50 with an accelerator, 10 on a CPU.", chosen="50; on a CPU 10"
    )
    per_device_train_batch_size: int = setting(64, "Training batch per process.", range=Range(1))
    per_device_eval_batch_size: int = setting(256, "Evaluation batch per process.", range=Range(1))
    eval_strategy: IntervalStrategy | str = setting("epoch", "When validation accuracy is measured.")
    eval_on_start: bool = setting(True, "Include the untuned model in the selection, as epoch 0.")
    save_strategy: SaveStrategy | str = setting("epoch", "When a checkpoint is saved.")
    save_total_limit: int | None = setting(1, "Number of checkpoints kept in addition to the best one. Empty: all.")
    load_best_model_at_end: bool = setting(
        True, "Keep the weights that are best on validation (metric_for_best_model), not the last ones."
    )
    metric_for_best_model: str | None = setting(
        None,
        "What chooses epoch, weights and head on validation: accuracy, mean_per_class_accuracy, top5_accuracy, or loss, the "
        "cross-entropy of the class probabilities. Default: accuracy for the epoch, loss for weights and head. With several "
        "labels per picture: mean_average_precision for the epoch, loss for weights and head.",
    )
    greater_is_better: bool | None = setting(
        None, "Whether a higher value of that metric is better. Default: yes, except for a loss."
    )
    patience: int | None = setting(
        5,
        "Stop after this many validations in a row that are not better than the best one by metric_for_best_model. Empty: train "
        "to the end.",
        range=Range(1),
    )
    logging_strategy: IntervalStrategy | str = setting("epoch", "When the losses are logged.")
    logging_nan_inf_filter: bool = setting(
        False, "Hide non-finite losses. Off: training stops at the first one and names the step."
    )
    bf16: bool | None = setting(
        None,
        "Compute in bfloat16, with weights in float32. Default: yes on GPUs that support it, no on a CPU (where it is "
        "faster only with AMX or AVX512-BF16).",
    )
    dataloader_num_workers: int | None = setting(
        None, "Processes that read images. Default: up to 8 with an accelerator, 0 on a CPU.", range=Range(0, 1024)
    )
    dataloader_persistent_workers: bool | None = setting(
        None, "Keep these processes from epoch to epoch. Default: yes, if there are any."
    )
    auto_find_batch_size: bool = setting(
        False,
        "If memory runs out, start again with smaller chunks (see loss_chunk_size); the batch of the loss stays the same. "
        "Evaluation is not adjusted.",
    )
    ddp_find_unused_parameters: bool | None = setting(
        None, "Search for parameters without a gradient in each step. Default: no, since there are none."
    )
    # HfArgumentParser reads no other order of these types.
    report_to: None | str | list[str] = setting("none", "Trackers, e.g. tensorboard, wandb.")  # noqa: RUF036

    def __post_init__(self):
        accelerated = torch.accelerator.is_available() and not self.use_cpu
        if self.num_train_epochs is None:
            self.num_train_epochs = 50.0 if accelerated else 10.0
        if self.bf16 and not torch.accelerator.is_available():
            self.use_cpu = True  # the Trainer requires it for bf16 on a CPU
        if self.bf16 is None:
            self.bf16 = accelerated and not self.fp16 and _has_bf16()
        if self.dataloader_num_workers is None:
            share = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            share //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            self.dataloader_num_workers = min(8, max(1, share - 1)) if accelerated else 0
        if self.dataloader_persistent_workers is None:
            self.dataloader_persistent_workers = self.dataloader_num_workers > 0
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False
        sharded = any(os.environ.get(f"ACCELERATE_USE_{kind}") == "true" for kind in ("FSDP", "DEEPSPEED"))
        if self.weight_averaging and (sharded or self.fsdp or self.deepspeed):
            raise UserError(
                f"--weight_averaging: expected 0 under FSDP and DeepSpeed, found {self.weight_averaging}: no process has all "
                "the weights to average. Leave it out, or start without them."
            )
        if self.tune and (sharded or self.fsdp or self.deepspeed):
            raise UserError(
                f"--tune: expected nothing under FSDP and DeepSpeed, found {self.tune}: they take a single training per process. "
                "Search without them, and type the --learning_rate that was found."
            )
        for name in ("accelerator_config", "fsdp_config", "deepspeed"):  # transformers reads them, and checks little
            if isinstance(found := getattr(self, name), str) and os.path.exists(found):
                parse_json(read_bytes(found), f"--{name} {found}")
        launch.start(self.use_cpu, self.ddp_timeout)
        named, self.metric_for_best_model = self.metric_for_best_model, metric_name(self.metric_for_best_model)
        with launch.own_words():
            super().__post_init__()
            launch.check(self.world_size)
        self.metric_for_best_model = named
        # Pinned memory speeds up copies to an accelerator; without one it only warns, at every epoch.
        self.dataloader_pin_memory = self.dataloader_pin_memory and accelerated
        if self.dataloader_pin_memory and not self.accelerator_config.non_blocking:
            self.accelerator_config.non_blocking = True
        for name in ("split_batches", "dispatch_batches"):
            if getattr(self.accelerator_config, name):
                raise UserError(
                    f"--accelerator_config: expected {name} false, found true. Batches of a contrastive loss are dealt out "
                    "by the sampler, per_device_train_batch_size to each process. Leave it out."
                )
        check_template(self.class_template)
        if self.text_mix:
            if self.caption_dropout:
                raise UserError(
                    f"--caption_dropout: expected 0 with --text_mix, found {self.caption_dropout:g}. Leave it out, and type "
                    f"--text_mix template={self.caption_dropout:g} with the other sources."
                )
            # One form for each mix, so that a resume knows it.
            self.text_mix = [f"{name}={share}" for name, share in parse_mix(self.text_mix).items()] or None
        if self.sample_weight:
            check_weighting(self.sample_weight)
        check_settings(self)
        if self.template_weight and self.prototypes != "captions":
            raise UserError(
                f"--template_weight: expected 0 with --prototypes {self.prototypes}, found {self.template_weight}: it mixes "
                "prototypes of captions with the class template. Leave it out, or type --prototypes captions."
            )
        step = self.per_device_train_batch_size * self.world_size
        if self.samples_per_class is not None and self.samples_per_class > step:
            raise UserError(
                f"--samples_per_class: expected 2 to {step} (a batch of all processes), found {self.samples_per_class}."
            )
        if self.logit_adjustment and (self.class_balance or self.samples_per_class):
            raise UserError(
                f"--logit_adjustment: expected 0 with {'--class_balance' if self.class_balance else '--samples_per_class'}, found "
                f"{self.logit_adjustment:g}: each of them makes up for unequal classes, and both do so twice. Leave one out."
            )
        if self.dataloader_persistent_workers and self.dataloader_num_workers == 0:
            raise UserError(
                "--dataloader_persistent_workers: expected false without workers, found true. Leave it out, or type "
                "--dataloader_num_workers 4."
            )
        name, most = ("max_steps", MOST_STEPS) if self.max_steps >= 0 else ("num_train_epochs", MOST_EPOCHS)
        head_alone = name == "num_train_epochs" and self.head != "prototypes"
        if getattr(self, name) not in Range(high=most, open=() if head_alone else ("low",)):
            least = "0 (a head on the untuned model) to" if head_alone else "more than 0 and at most"
            raise UserError(
                f"--{name}: expected {least} {most:,}, found {getattr(self, name)!r}. To measure, type mmft-hf evaluate."
            )
        if self.tune and self.max_steps <= 0 and self.num_train_epochs == 0:
            raise UserError(
                f"--tune: expected nothing with --num_train_epochs 0, found {self.tune}: nothing is trained. Leave one of them out."
            )
        if not self.head_alphas or any(alpha not in SHARE for alpha in self.head_alphas):
            raise UserError(
                f"--head_alphas: expected one or more numbers from 0 to 1, found {some(self.head_alphas)}. Type for example "
                "--head_alphas 0 0.5 1."
            )
        if self.reject_below is not None and self.reject_for_accuracy is not None:
            raise UserError(
                "--reject_below and --reject_for_accuracy: expected one of them, found both: the second chooses the first."
            )
        if self.threshold == "f1" and self.reject_below is not None:
            raise UserError(
                f"--threshold f1: expected no --reject_below, found {self.reject_below:g}: validation chooses a threshold for each class. "
                "Leave one of them out."
            )
        for name, allowed in RANGES.items():
            if (found := getattr(self, name)) is not None and found not in allowed:
                raise UserError(f"--{name}: expected {allowed}, found {found!r}.")
        for name in ("gradient_checkpointing_kwargs", "lr_scheduler_kwargs"):
            if (found := getattr(self, name)) is not None and not isinstance(found, dict):
                raise UserError(f"--{name}: expected an object such as '{{\"key\": 1}}', found {found!r}.")
        if (self.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise UserError(
                "--gradient_checkpointing_kwargs: expected use_reentrant false, found true, with which older transformers "
                "give a lora tower no gradient. Leave it out."
            )
        metric = metric_name(self.metric_for_best_model)
        if self.greater_is_better is not None and self.greater_is_better != METRICS.get(metric, self.greater_is_better):
            raise UserError(
                f"--greater_is_better: expected {str(METRICS[metric]).lower()} with --metric_for_best_model {metric}, found "
                f"{str(self.greater_is_better).lower()}: the worst epoch would be kept. Leave it out."
            )
        if self.load_best_model_at_end and self.save_strategy == "steps" and self.save_steps != self.eval_steps:
            raise UserError(
                f"--save_steps and --eval_steps: expected the same number, found {self.save_steps:g} and {self.eval_steps:g}: "
                "the best step could not be restored if it was not saved."
            )
        for name, (default, reason) in UNSUPPORTED.items():
            if getattr(self, name) != default:
                raise UserError(f"--{name}: expected {default}, found {getattr(self, name)}; {reason}. Leave it out.")
        from .stock_settings import check_stock_settings  # with the Trainer, which takes long to import

        check_stock_settings(self)

    @classmethod
    def decides(cls, name: str) -> bool:
        """Whether a setting can change the result of a run, so that a resume must have the same one."""
        known = next((field.metadata for field in fields(cls) if field.name == name), {})
        return known.get("decides", name not in HARMLESS)

    def supcon_weight_at(self, step: int, steps: int) -> float:
        """w of the loss in the step after `step` of `steps`. It depends on nothing else, so a resume changes nothing."""
        if self.supcon_weight_end is None:
            return self.supcon_weight
        return self.supcon_weight + (self.supcon_weight_end - self.supcon_weight) * step / steps


def _has_bf16() -> bool:
    """Whether the accelerator computes in bfloat16 natively."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return False
