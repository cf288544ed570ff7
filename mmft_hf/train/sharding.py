"""FSDP2: weights, gradients and optimizer state of a dual encoder are sharded over several processes.

`accelerate launch --config_file recipes/accelerate/fsdp2.yaml` turns it on. accelerate does the sharding; this module adds
what a dual encoder needs in addition. Without FSDP, nothing here has any effect.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments

from ..core.errors import UserError


class ShardedTraining:
    """The part of `MMFTTrainer` for FSDP2."""

    _whole: nn.Module | None = None  # a copy in main memory from before the model was sharded

    def create_optimizer(self, *args, **kwargs):
        """The stock optimizer. Under FSDP2 this is the last call before the model is sharded."""
        if not self.is_fsdp_enabled:
            return super().create_optimizer(*args, **kwargs)
        plugin = self.accelerator.state.fsdp_plugin
        self._whole = copy.deepcopy(self.model).cpu()
        plugin.ignored_modules = [*(plugin.ignored_modules or ()), keep_whole(self.model)]
        return super().create_optimizer(*args, **kwargs)

    def train(self, resume_from_checkpoint=None, **kwargs):
        if self.is_fsdp_enabled:
            if self._whole is not None:
                raise UserError(
                    "train: expected the first training of this Trainer under FSDP. Make a new MMFTTrainer."
                )
            check_settings(self.args, self.accelerator.state.fsdp_plugin)
        if resume_from_checkpoint:
            check_checkpoint(Path(resume_from_checkpoint), self.is_fsdp_enabled)
        result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        if self.is_fsdp_enabled:  # from here on every process works alone, with the whole model
            self.model = self.model_wrapped = gather_into(self._whole, self.model)
        return result

    @contextmanager
    def _unsharded(self) -> Iterator[None]:
        """Within this context every process holds all weights, so that it can encode batches on its own."""
        parts = [module for module in self.model.modules() if isinstance(module, FSDPModule)]
        if not parts:
            yield
            return
        for name in ("get_image_features", "get_text_features"):
            if name not in vars(self.model):
                register_fsdp_forward_method(self.model, name)
        for part in parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        try:
            yield
        finally:
            usual = self.accelerator.state.fsdp_plugin.reshard_after_forward
            for part in parts:
                part.set_reshard_after_forward(usual and part is not self.model, recurse=False)
                part.reshard()


def check_settings(args: TrainingArguments, plugin) -> None:
    """Raises `UserError` for settings under which a sharded run could not be trained, saved or resumed."""
    for name in ("loss_chunk_size", "auto_find_batch_size"):
        if getattr(args, name, None):
            # All processes take part in every forward, but they may have different numbers of distinct texts, and so of chunks.
            raise UserError(
                f"--{name}: expected nothing under FSDP, found {getattr(args, name)}. Type --gradient_checkpointing true to "
                "save memory, or start without FSDP."
            )
    kind = getattr(plugin.state_dict_type, "name", str(plugin.state_dict_type))
    for name, expected, found in (
        ("fsdp_version", "2", str(plugin.fsdp_version)),
        ("fsdp_state_dict_type", "FULL_STATE_DICT", kind),
        ("fsdp_cpu_ram_efficient_loading", "false", str(plugin.cpu_ram_efficient_loading).lower()),
    ):
        if found != expected:
            raise UserError(
                f"{name}: expected {expected}, found {found}. Type accelerate launch --config_file "
                "recipes/accelerate/fsdp2.yaml …, which has these settings."
            )


def check_checkpoint(checkpoint: Path, fsdp: bool) -> None:
    """Raises `UserError` if a checkpoint was written with FSDP and this run has none, or the reverse: optimizer states differ."""
    left = (checkpoint / "optimizer.bin").is_file()
    if left != fsdp:
        before, now = ("with", "without") if left else ("without", "with")
        raise UserError(
            f"--resume_from_checkpoint {checkpoint}: expected a run {before} FSDP, like the one that wrote it, found one {now}. "
            "Start it with the same accelerate configuration as before, or type a new --output_dir."
        )


def keep_whole(model: nn.Module) -> nn.Module:
    """Prepares a dual encoder for FSDP2; returns a module of the parameters that FSDP must leave alone.

    These are the logit scale, since FSDP2 shards no scalar, and the parameters of loss terms: both are read outside of
    the forward. Their gradients are averaged here, as FSDP2 averages those of the others.
    """
    # accelerate shards the input embedding of a language model separately, and CLIPModel refuses to name one.
    model.get_input_embeddings = lambda: None
    ignored = nn.Module()
    for name, parameter in model.named_parameters():
        if "." in name and not name.startswith("loss_terms."):
            continue
        ignored.register_parameter(name.replace(".", "_"), parameter)
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_average_gradient)
    return ignored


def _average_gradient(parameter: nn.Parameter) -> None:
    dist.all_reduce(parameter.grad)
    parameter.grad /= dist.get_world_size()


@torch.no_grad()
def gather_into(whole: nn.Module, model: nn.Module) -> nn.Module:
    """Copies the weights of a sharded model into `whole`, its copy from before sharding; returns it on the model's device."""
    state = {n: v.full_tensor() if isinstance(v, DTensor) else v for n, v in model.state_dict().items()}
    whole.load_state_dict(state)
    return whole.to(model.device)
