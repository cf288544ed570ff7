"""Which parts of a dual encoder are trained: each tower as a whole, with LoRA, in part or not at all.

LoRA layers are injected into the model itself, so the code that encodes or trains need not know of them. The logit scale
(for ALIGN the temperature) is always trained. PEFT neither trains nor saves such a bare parameter; this module does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import PreTrainedModel

from ..core.arguments import ModelArguments, last_blocks
from ..core.errors import UserError
from ..core.files import ADAPTER_FILES
from .families import unused_parameters
from .loading import freeze_unused, head_of, scale_parameter

if TYPE_CHECKING:
    from peft import LoraConfig

# Parameters of each tower, by the start of their names. Every family has all or some of these.
TOWERS = {
    "vision": ("vision_model.", "visual_projection."),
    "text": ("text_model.", "text_projection."),
}


def set_towers(
    model: PreTrainedModel,
    vision: str = "full",
    text: str = "full",
    lora_rank: int = 8,
    lora_alpha: int = 16,
    lora_dropout: float = 0.0,
    lora_targets: Sequence[str] | None = None,
) -> None:
    """Sets how each tower is trained. The logit scale always is.

    LoRA's A matrices are random; call `transformers.set_seed(…)` first to reproduce them. Its B matrices are zero, so the
    model's outputs do not change yet.

    Args:
        vision, text: the mode of each tower.
            `full`: all weights.
            `lora`: LoRA matrices alone.
            `last:K`: its last K blocks and what follows them: final norm, pooler, projection; of an EfficientNet the top
            convolution. A block is an entry of the tower's list of blocks: a layer of a transformer, an MBConv of EfficientNet, a
            stage of ResNet, ConvNeXt and Swin.
            `norms`: scales and shifts of all its norms. Batch norms are norms, too; their statistics stay as they are.
            `head`: the projection of its pooled output into the common space alone.
            `frozen`: nothing.
        lora_rank, lora_alpha, lora_dropout: of the LoRA layers, which add `alpha / rank * B A` to a weight.
        lora_targets: layers that get LoRA, by the ends of their names. Default: all linear layers in the tower's blocks, that
            is in attention and MLP. In a convolutional tower without any these are its convolutions, but for depthwise and
            other grouped ones, whose matrices are small already.

    Parameters that do not affect the embeddings stay frozen in any mode (`loading.freeze_unused`).

    Raises:
        UserError: a mode is unknown, both towers are frozen, or a tower lacks what its mode trains.

    References: Hu et al. 2022, "LoRA" (arXiv 2106.09685); Fahes et al. 2024, "CLIP's Visual Embedding Projector is a Few-shot
    Cornucopia" (arXiv 2410.05270), for `head`.
    """
    modes = {"vision": vision, "text": text}
    lora = {"lora_rank": lora_rank, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout}
    # Raises an error for an unknown mode, or a number out of range.
    ModelArguments(vision_tower=vision, text_tower=text, **(lora if "lora" in modes.values() else {}))
    if set(modes.values()) == {"frozen"}:
        raise UserError(
            "--vision_tower and --text_tower: expected one of them to be trained, for example full or lora, found both frozen."
        )
    if lora_layers(model):
        raise UserError(
            "model: expected one without LoRA, found LoRA layers in it. Load it again, then set its towers."
        )
    trained = {name for tower, mode in modes.items() for name in _trained(model, tower, mode)}
    if "lora" in modes.values():
        from peft import LoraConfig, inject_adapter_in_model

        towers = [tower for tower, mode in modes.items() if mode == "lora"]
        names = _targets(model, towers, lora_targets) if lora_targets else _in_blocks(model, towers)
        config = LoraConfig(r=lora_rank, lora_alpha=lora_alpha, lora_dropout=lora_dropout, target_modules=names)
        inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        if name.startswith((*TOWERS["vision"], *TOWERS["text"])):
            parameter.requires_grad_(name in trained or ".lora_" in name)
    scale_parameter(model).requires_grad_(True)
    freeze_unused(model)


def _trained(model: PreTrainedModel, tower: str, mode: str) -> set[str]:
    """Full names of the weights of a tower that a mode trains, without LoRA's."""
    names = [name for name, _ in model.named_parameters() if name.startswith(TOWERS[tower])]
    if mode in ("lora", "frozen"):
        return set()
    if mode == "head":
        head = head_of(model, tower)
        found = {name for name in names if name.startswith(f"{head}.")}
        lacks = "a projection of its pooled output, which is trained alone"
    elif mode == "norms":
        found = {
            f"{name}.{own}"
            for name, module in model.named_modules()
            if f"{name}.".startswith(TOWERS[tower]) and "Norm" in type(module).__name__
            for own, _ in module.named_parameters(recurse=False)
        }
        lacks = "norms with a scale"
    elif count := last_blocks(mode):
        found, lacks = _last_blocks(model, tower, count, names), "a list of blocks"
    else:
        return set(names)
    if not found:
        what = type(getattr(model, f"{tower}_model")).__name__
        raise UserError(
            f"--{tower}_tower {mode}: expected a tower with {lacks}; {what} has none. Type --{tower}_tower full or --{tower}_tower "
            "frozen."
        )
    return found


def _last_blocks(model: PreTrainedModel, tower: str, count: int, names: list[str]) -> set[str]:
    """Which of the `names` of a tower's weights, in their order, belong to its last `count` blocks or follow them.

    What a tower defines after its blocks also comes after them in its forward, but for embedding tables: those of relative
    positions are read by every block.
    """
    blocks, total = _block_list(model, tower), block_count(model, tower)
    if blocks is None:
        return set()
    if count > total:
        what = type(getattr(model, f"{tower}_model")).__name__
        raise UserError(f"--{tower}_tower last:{count}: expected at most the {total} blocks of {what}, found {count}.")
    tables = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.Embedding))
    inside = [i for i, name in enumerate(names) if name.startswith(f"{blocks}.")]
    last = tuple(f"{blocks}.{i}." for i in range(total - count, total))
    after = (name for name in names[inside[-1] + 1 :] if not name.startswith(tables))
    return {*(name for name in names if name.startswith(last)), *after}


def block_count(model: PreTrainedModel, tower: str) -> int:
    """How many blocks a tower has, of which `last:K` trains the last ones; 0 for one without a list of blocks."""
    blocks = _block_list(model, tower)
    return len(model.get_submodule(blocks)) if blocks else 0


def _block_list(model: PreTrainedModel, tower: str) -> str | None:
    """The name of a tower's list of blocks."""
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    sizes = {
        own: sum(p.numel() for p in model.get_submodule(own).parameters())
        for own in lists
        if own.startswith(TOWERS[tower]) and not any(own.startswith(f"{other}.") for other in lists)
    }
    return max(sizes, key=sizes.get, default=None)  # some towers have further lists, of small layers


def _linear_layers(model: PreTrainedModel, tower: str) -> list[str]:
    """Full names of the linear layers of a tower that take part in the embeddings; of its convolutions if its blocks have none.

    The one inside `nn.MultiheadAttention` is left out: its weight is used without calling the layer, so LoRA would have no
    effect.
    """
    unused = unused_parameters(model.config)
    modules = {
        name: module
        for name, module in model.named_modules()
        if f"{name}.".startswith(TOWERS[tower]) and not f"{name}.".startswith(unused)
    }
    blocks = _blocks(model)
    linear = [
        name
        for name, module in modules.items()
        if isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear)
    ]
    if any(name.startswith(blocks) for name in linear):
        return linear
    return linear + [name for name, module in modules.items() if isinstance(module, nn.Conv2d) and module.groups == 1]


def _blocks(model: PreTrainedModel) -> tuple[str, ...]:
    return tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))


def _in_blocks(model: PreTrainedModel, towers: Sequence[str]) -> list[str]:
    """Full names of the `_linear_layers` in the repeated blocks of `towers`, in transformers those of attention and MLP."""
    blocks = _blocks(model)
    names = []
    for tower in towers:
        own = [name for name in _linear_layers(model, tower) if name.startswith(blocks)]
        if not own:
            what = type(getattr(model, f"{tower}_model")).__name__
            raise UserError(
                f"--{tower}_tower lora: expected a tower of blocks with linear layers or convolutions, which get LoRA; {what} has "
                f"none. Type --{tower}_tower full or --{tower}_tower frozen."
            )
        names += own
    return names


def _targets(model: PreTrainedModel, towers: Sequence[str], ends: Sequence[str]) -> list[str]:
    """Full names of the `_linear_layers` of `towers` whose names end in one of `ends`."""
    linear = [name for tower in towers for name in _linear_layers(model, tower)]
    names = [name for name in linear if f".{name}".endswith(tuple(f".{end}" for end in ends))]
    unknown = [end for end in ends if not any(f".{name}".endswith(f".{end}") for name in names)]
    without = [tower for tower in towers if not any(f"{name}.".startswith(TOWERS[tower]) for name in names)]
    if unknown or without:
        known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linear}))
        what = f"no layer is named {', '.join(unknown)}" if unknown else f"the {without[0]} tower has none of them"
        raise UserError(
            f"--lora_targets: expected linear layers (or convolutions) of the {' and the '.join(towers)} tower ({known}), found "
            f"{', '.join(ends)}; {what}."
        )
    return names


def lora_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The layers with LoRA, by name; empty for a plain model."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def frozen_batch_norms(model: nn.Module) -> list[nn.Module]:
    """Puts the batch norms of a model into evaluation mode, and returns them; `model.train()` undoes this.

    ALIGN's image tower has some. With the statistics of a batch, an embedding would depend on the rest of the batch and on
    the number of processes; and running statistics of small batches would be worse than those of pre-training. Scales and
    shifts are trained like any other parameter.
    """
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    layers = [module for module in model.modules() if isinstance(module, kinds)]
    for layer in layers:
        layer.eval()
    return layers


def parameter_counts(model: PreTrainedModel) -> dict[str, tuple[int, int, int]]:
    """`{"vision": (trainable parameters, all without LoRA's, layers with LoRA), "text": …}`."""
    counts = {}
    for tower, prefixes in TOWERS.items():
        own = {name: p for name, p in model.named_parameters() if name.startswith(prefixes)}
        trained = sum(p.numel() for p in own.values() if p.requires_grad)
        total = sum(p.numel() for name, p in own.items() if ".lora_" not in name)
        counts[tower] = (trained, total, sum(f"{name}.".startswith(prefixes) for name in lora_layers(model)))
    return counts


def checkpoint_state(model: PreTrainedModel, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The weights that a checkpoint holds: with LoRA only the trained ones, since the base model has the rest."""
    state = model.state_dict() if state is None else state
    if not lora_layers(model):
        return state
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: value for name, value in state.items() if name in trained}


def plain_state(model: PreTrainedModel, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The weights of the plain model to save: LoRA merged, and without the parameters of loss terms.

    Args:
        state: the weights of `model`, where they are known already.
    """
    state = merged_state(model) if lora_layers(model) else state or model.state_dict()
    return {name: value for name, value in state.items() if not name.startswith("loss_terms.")}


@torch.no_grad()
def merged_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights of the equivalent plain model without LoRA layers; `model` is not changed."""
    state = {n.replace(".base_layer.", "."): v for n, v in model.state_dict().items() if ".lora_" not in n}
    for name, layer in lora_layers(model).items():
        state[f"{name}.weight"] = state[f"{name}.weight"] + layer.get_delta_weight("default")
    return state


def merge(model: PreTrainedModel) -> None:
    """Merges the LoRA layers into the weights, in place; the result is the equivalent plain model."""
    state = merged_state(model)
    for name, layer in lora_layers(model).items():
        model.set_submodule(name, layer.get_base_layer())
    del model.peft_config
    model.load_state_dict(state)


@dataclass
class Adapter:
    """The difference to the base model in PEFT's format: LoRA weights, the logit scale, and what is trained of a tower without.

    `peft.PeftModel.from_pretrained(base, folder)` computes the same as the merged model.
    """

    config: LoraConfig
    weights: dict[str, Tensor]
    base_class: type

    @classmethod
    def of(cls, model: PreTrainedModel) -> Adapter | None:
        """The adapter of a model with LoRA layers, which stays valid when the model is merged; None for a plain model."""
        if not lora_layers(model):
            return None
        return cls(model.peft_config["default"], checkpoint_state(model), type(model))

    def save_pretrained(self, folder: str | Path, base_model: str, revision: str | None = None) -> None:
        """Writes `adapter_config.json`, which names `base_model`, and `adapter_model.safetensors`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.config.base_model_name_or_path, self.config.revision = base_model, revision
        self.config.target_modules = sorted(self.config.target_modules)
        name, library = self.base_class.__name__, self.base_class.__module__
        self.config.auto_mapping = {"base_model_class": name, "parent_library": library}
        self.config.inference_mode = True
        self.config.save_pretrained(folder)
        # PEFT also loads entries that are not LoRA weights, if the model has parameters of these names.
        weights = {f"base_model.model.{n.replace('.default.', '.')}": v for n, v in self.weights.items()}
        save_file({n: v.detach().cpu().contiguous() for n, v in weights.items()}, folder / ADAPTER_FILES[1])
