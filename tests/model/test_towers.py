"""Towers trained in part: `last:K`, `norms` and `head`, in every kind of dual encoder."""

import contextlib
import copy
import io
import json

import pytest
import tiny_encoders
import torch
import transformers as hf
from tiny_encoders import CONVOLUTIONAL
from torch import nn
from training import changed, make_trainer, weights

from mmft_hf import load_model, set_towers
from mmft_hf.cli import main
from mmft_hf.core.errors import UserError
from mmft_hf.model.loading import encode_images, encode_texts, freeze_unused, head_of, run_head, run_trunk
from mmft_hf.model.towers import TOWERS, parameter_counts

WITHOUT_HEAD = ("siglip", "align")  # images: the pooled output is the embedding


def two_towers(vision, text=None):
    """A dual encoder of any two towers, with random weights."""
    tokenizer = tiny_encoders.word_pieces()
    text = text or hf.BertConfig(**tiny_encoders.text(tokenizer))
    config = hf.VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=8)
    return hf.VisionTextDualEncoderModel(config)


def build(kind):
    torch.manual_seed(0)
    if kind in CONVOLUTIONAL:
        config, size, _ = CONVOLUTIONAL[kind]
        config = copy.deepcopy(config)
        config.hidden_size = size
        return two_towers(config)
    return tiny_encoders.KINDS[kind]()[0]


@pytest.fixture(scope="module")
def _models():
    return {kind: build(kind) for kind in (*tiny_encoders.KINDS, *CONVOLUTIONAL)}


@pytest.fixture(params=(*tiny_encoders.KINDS, *CONVOLUTIONAL))
def kind(request):
    return request.param


@pytest.fixture
def model(kind, _models):
    return copy.deepcopy(_models[kind])


def trained(model, tower, mode) -> set[str]:
    """Weights of a tower that a mode trains, by `set_towers`."""
    model = copy.deepcopy(model)
    other = "text" if tower == "vision" else "vision"
    set_towers(model, **{tower: mode, other: "full"})
    return {name for name, p in model.named_parameters() if p.requires_grad and name.startswith(TOWERS[tower])}


def inputs_of(model, tower) -> tuple[torch.Tensor, ...]:
    """Two pictures, or the tokens of two texts."""
    if tower == "vision":
        size = 32 if hasattr(model.config.vision_config, "depths") else 16
        return (torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)),)
    length = 64 if model.config.model_type == "siglip" else 5
    return torch.tensor([[5], [7]]).expand(2, length), torch.ones(2, length, dtype=torch.long)


ENCODE = {"vision": encode_images, "text": encode_texts}


@torch.no_grad()
def read_from(model, tower, module) -> set[str]:
    """Weights of a tower whose layers are first called with `module` or after it, as a forward shows."""
    order = {}

    def called(name):
        def hook(*_):
            order.setdefault(name, len(order))

        return hook

    hooks = [layer.register_forward_pre_hook(called(name)) for name, layer in model.named_modules()]
    ENCODE[tower](model.eval(), *inputs_of(model, tower))
    for hook in hooks:
        hook.remove()
    freeze_unused(model)
    late = {name for name, place in order.items() if place >= order[module]}
    found = set()
    for name, p in model.named_parameters():
        if p.requires_grad and name.startswith(TOWERS[tower]):
            # A weight may be read without a call of its layer, as in nn.MultiheadAttention.
            owner = next(name[:end] for end in reversed(range(len(name))) if name[:end] in order)
            found |= {name} if owner in late else set()
    return found


BLOCKS = {
    "vision": {
        "clip": "encoder.layers", "metaclip_2": "encoder.layers", "siglip": "encoder.layers", "chinese_clip": "encoder.layers",
        "altclip": "encoder.layers", "align": "encoder.blocks", "vit_bert": "layers", "clip_roberta": "encoder.layers",
        "efficientnet": "encoder.blocks", "resnet": "encoder.stages", "resnet-basic": "encoder.stages", "regnet": "encoder.stages",
        "convnext": "encoder.stages", "mobilenet_v2": "layer", "swin": "encoder.layers",
    },
    "text": {
        "clip": "encoder.layers", "metaclip_2": "encoder.layers", "siglip": "encoder.layers", "altclip": "roberta.encoder.layers",
    },
}  # fmt: skip


@pytest.mark.parametrize("tower", TOWERS)
def test_the_last_blocks_and_all_that_follows_them_are_trained(kind, model, tower):
    """As the order of calls in a forward says: independently of names and of the order of definition."""
    blocks = f"{tower}_model.{BLOCKS[tower].get(kind, 'encoder.layer')}"
    total = len(model.get_submodule(blocks))
    for count in {1, total}:
        assert trained(model, tower, f"last:{count}") == read_from(model, tower, f"{blocks}.{total - count}")
    what = type(getattr(model, f"{tower}_model")).__name__
    with pytest.raises(
        UserError, match=rf"^{tower}_tower last:40: expected at most the {total} blocks of {what}, found 40\.$"
    ):
        set_towers(model, **{tower: "last:40"})


KINDS_OF_NORMS = (nn.LayerNorm, nn.BatchNorm2d)


def test_norms_train_scales_and_shifts_of_all_norms(kind, model):
    for tower in TOWERS:
        norms = [
            name
            for name, layer in model.named_modules()
            if isinstance(layer, KINDS_OF_NORMS) and name.startswith(TOWERS[tower])
        ]
        assert norms
        assert trained(model, tower, "norms") == {f"{name}.{own}" for name in norms for own in ("weight", "bias")}


def test_head_trains_the_projection_alone(kind, model):
    projection = "text_model.head" if kind == "siglip" else "text_projection"
    own = {name for name, _ in model.named_parameters() if name.startswith(f"{projection}.")}
    assert trained(model, "text", "head") == own and f"{projection}.weight" in own
    if kind in WITHOUT_HEAD:
        what = type(model.vision_model).__name__
        message = (
            rf"vision_tower head: expected a tower with a projection of its pooled output, .*; {what} has none\. Type"
        )
        with pytest.raises(UserError, match=message):
            set_towers(model, "head", "full")
    else:
        assert trained(model, "vision", "head") == {"visual_projection.weight"}


@pytest.mark.parametrize("half", [False, True])
@torch.no_grad()
def test_trunk_and_head_are_the_tower_to_the_bit(kind, model, half):
    for tower in TOWERS:
        if head_of(model.eval(), tower):
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                whole = ENCODE[tower](model, *inputs_of(model, tower))
                pooled = run_trunk(model, tower, *inputs_of(model, tower))
                assert torch.equal(run_head(model, tower, pooled), whole) and pooled.dtype == torch.float32
            assert not model.get_submodule(head_of(model, tower))._forward_pre_hooks  # nothing is left


def test_tables_of_relative_positions_are_not_trained_with_the_last_block():
    """MPNet defines its table after the blocks, and every block reads it."""
    words = hf.MPNetConfig(**tiny_encoders.text(tiny_encoders.word_pieces()))
    model = two_towers(hf.ViTConfig(**tiny_encoders.VISION), words)
    found = trained(model, "text", "last:1")
    assert {name.split(".")[1] for name in found if name.startswith("text_model.")} == {"encoder", "pooler"}
    assert not [name for name in found if "relative_attention_bias" in name]
    assert "text_model.encoder.relative_attention_bias.weight" in trained(model, "text", "full")


@pytest.mark.slow
def test_the_embedded_models():
    vision, text = (parameter_counts(load_model("builtin/photo")[0])[tower][1] for tower in TOWERS)
    model, _ = load_model("builtin/photo")
    set_towers(model, "last:4", "last:4")
    some = {name for name, p in model.named_parameters() if p.requires_grad}
    assert "vision_model.encoder.top_conv.weight" in some and "vision_model.encoder.top_bn.bias" in some
    assert {name.split(".")[3] for name in some if "encoder.blocks" in name} == {"12", "13", "14", "15"}
    counts = parameter_counts(model)
    assert 0 < counts["vision"][0] < vision and 0 < counts["text"][0] < text
    with pytest.raises(UserError, match="text_tower last:5: expected at most the 4 blocks of AlbertModel, found 5"):
        set_towers(model, "full", "last:5")


@pytest.mark.parametrize(
    "mode", ["last:0", "last:", "last:K", "last:-1", "last:1.5", "last: 1", "last:٣", "last:1\n", "Norms"]
)
def test_unknown_modes_are_refused(mode, clip):
    with pytest.raises(UserError, match="vision_tower: expected one of full, lora, last:K, norms, head, frozen, found"):
        set_towers(clip[0], mode, "full")


def test_a_tower_without_what_the_mode_trains_is_refused(clip):
    clip[0].vision_model = nn.Sequential(nn.Linear(3, 3))
    for mode, lacks in (("last:1", "a list of blocks"), ("norms", "norms with a scale")):
        message = f"vision_tower {mode}: expected a tower with {lacks}; Sequential has none. Type vision_tower full or"
        with pytest.raises(UserError, match=message):
            set_towers(clip[0], mode, "full")


@pytest.mark.parametrize(("vision", "text"), [("last:1", "frozen"), ("norms", "head"), ("head", "last:2")])
def test_a_training_changes_just_that(clip, tmp_path, vision, text):
    model = clip[0]
    set_towers(model, vision, text)
    expected = {name for name, p in model.named_parameters() if p.requires_grad}
    before = weights(model)
    make_trainer(clip, tmp_path, evaluate=False, max_steps=2, weight_decay=0.1).train()
    moved = changed(before, weights(model))
    # Biases of keys shift all logits of a softmax alike: their gradient is zero up to rounding.
    assert {n for n in moved if "k_proj.bias" not in n} == {n for n in expected if "k_proj.bias" not in n}


def test_statistics_of_batch_norms_stay(tmp_path):
    """With `norms` in a convolutional tower: the scales and shifts move."""
    torch.manual_seed(0)
    model, processor = tiny_encoders.align()
    set_towers(model, "norms", "frozen")
    before = weights(model)
    make_trainer((model, processor), tmp_path, evaluate=False, max_steps=2, learning_rate=1e-2).train()
    moved = changed(before, weights(model))
    norms = {name for name, layer in model.vision_model.named_modules() if isinstance(layer, nn.BatchNorm2d)}
    assert moved == {f"vision_model.{name}.{own}" for name in norms for own in ("weight", "bias")} | {"temperature"}


# -- the command line ----------------------------------------------------------------------------------------------------


def words(clip_folder, data_folder, output, *more) -> list[str]:
    settings = f"--model_name_or_path {clip_folder} --dataset_name {data_folder} --output_dir {output} --use_cpu true"
    modes = "--vision_tower last:1 --text_tower norms --num_train_epochs 1 --learning_rate 1e-3 --head prototypes"
    return ["finetune", *settings.split(), *modes.split(), "--per_device_train_batch_size", "8", *more]


@pytest.fixture(scope="module")
def run(clip_folder, data_folder, tmp_path_factory):
    """A finished run: its folder and what it printed."""
    folder, printed = tmp_path_factory.mktemp("towers") / "out", io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(words(clip_folder, data_folder, folder)) == 0
    return folder, printed.getvalue()


def test_plan_card_and_record_name_the_modes(run):
    folder, printed = run
    assert "vision tower last:1 (" in printed and "text tower norms (" in printed
    card = (folder / "README.md").read_text()
    assert "weights were trained in the last block, the text tower's trained in the norms alone, in batches" in card
    identity = json.loads((folder / "mmft.json").read_text())["identity"]
    assert (identity["vision_tower"], identity["text_tower"], identity["lora"]) == ("last:1", "norms", None)
    assert not (folder / "adapter").exists()


def test_a_resume_with_another_number_of_blocks_is_refused(run, clip_folder, data_folder, capsys):
    again = words(clip_folder, data_folder, run[0], "--vision_tower", "last:2", "--resume_from_checkpoint", "true")
    assert main(again) == 2
    assert "vision_tower was 'last:1', now 'last:2'" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_another_head_can_be_fitted(run, tmp_path):
    assert main(["head", str(run[0]), "--head", "kernel", "--output_dir", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "trained in the last block" in card


def test_a_mode_that_the_model_cannot_take_ends_with_exit_code_2(clip_folder, data_folder, tmp_path, capsys):
    assert main(words(clip_folder, data_folder, tmp_path / "out", "--vision_tower", "last:3")) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "--vision_tower last:3: expected at most the 2 blocks of CLIPVisionModel, found 3." in error
    assert not (tmp_path / "out").exists()
    assert main(words(clip_folder, data_folder, tmp_path / "out", "--text_tower", "last:x")) == 2
    assert "last:K" in capsys.readouterr().err
