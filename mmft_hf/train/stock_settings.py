"""Stock settings that the Trainer would only refuse in the middle of a run: tried beforehand, on one parameter."""

from __future__ import annotations

import math
from copy import copy

import torch
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainingArguments, get_scheduler

from ..core.errors import UserError

STEPS = 1000  # of the schedule that is tried if the epochs decide the number
NEED_A_MODEL = ("galore", "apollo", "lomo", "adalomo")  # optimizers that one parameter cannot try


def check_stock_settings(config: TrainingArguments) -> None:
    """Builds the optimizer, the learning-rate schedule and a checkpointed forward.

    Raises:
        UserError: one of them cannot be built; the message names the settings and the reason.
    """
    parameter = torch.nn.Parameter(torch.zeros(2, 2))
    try:
        _try_optimizer(config, parameter)
    except Exception as error:  # each optimizer and package has errors of its own
        typed = f" with --optim_args {config.optim_args}" if config.optim_args else ""
        name = getattr(config.optim, "value", config.optim)
        raise _refused(f"--optim {name}{typed}: expected an optimizer that can be built", error) from error
    try:
        _try_schedule(config, torch.optim.SGD([parameter], config.learning_rate))
    except Exception as error:
        typed = f" with --lr_scheduler_kwargs {config.lr_scheduler_kwargs}" if config.lr_scheduler_kwargs else ""
        name = getattr(config.lr_scheduler_type, "value", config.lr_scheduler_type)
        what = f"--lr_scheduler_type {name}{typed}: expected a schedule that can be computed"
        raise _refused(what, error) from error
    if config.gradient_checkpointing:
        options = config.gradient_checkpointing_kwargs or {}
        try:
            checkpoint(torch.square, parameter, **{"use_reentrant": False, **options})
        except Exception as error:
            what = f"--gradient_checkpointing_kwargs {options}: expected options of torch.utils.checkpoint"
            raise _refused(what, error) from error


def _try_optimizer(config: TrainingArguments, parameter: torch.nn.Parameter) -> None:
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(config)
    except ValueError:
        if config.optim.startswith(NEED_A_MODEL):  # its package is there, which is all that can be known
            return
        raise
    plain = copy(config)
    plain.optim_args = None
    if config.optim_args and options == Trainer.get_optimizer_cls_and_kwargs(plain)[1]:
        raise ValueError("this optimizer ignores --optim_args")
    if not config.optim.startswith(NEED_A_MODEL):
        kind([parameter], **options)


def _try_schedule(config: TrainingArguments, optimizer: torch.optim.Optimizer) -> None:
    steps = config.max_steps if config.max_steps > 0 else STEPS
    warmup, options = config.get_warmup_steps(steps), config.lr_scheduler_kwargs
    schedule = get_scheduler(config.lr_scheduler_type, optimizer, warmup, steps, scheduler_specific_kwargs=options)
    for factor in getattr(schedule, "lr_lambdas", ()):
        for step in (0, steps // 2, steps - 1):
            if not math.isfinite(factor(step)):
                raise ValueError(f"the learning rate of step {step} would be {factor(step)} times --learning_rate")


def _refused(what: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:300].rstrip(".")
    return UserError(f"{what}, found: {reason or type(error).__name__}. Correct the settings, or leave them out.")
