"""Tuning a caption encoder on pairs of captions: pairs, loss, retrieval, training, resume, several processes."""

import itertools
import json
import random
import textwrap
from pathlib import Path

import pytest
import tiny_trunks
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from processes import run_python
from safetensors.torch import load_file
from transformers import TrainingArguments, set_seed

from mmft_hf.model.caption_encoder import CaptionEncoder
from mmft_hf.model.features import Encoding
from mmft_hf.train.caption_contrast import CaptionPairs, CaptionTrainer, Pair, caption_loss, caption_retrieval

COMBINATIONS = list(itertools.product(*tiny_trunks.ATTRIBUTES))
random.Random(0).shuffle(COMBINATIONS)
KINDS = list(tiny_trunks.ATTRIBUTES[1])
UNSEEN = 100


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MMFT_HF_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_trunks.save_llama(tmp_path_factory.mktemp("llama") / "llama", tokenizer=tiny_trunks.wording_tokenizer())


def captioned(captions: list, labels: list[int], names=tuple(KINDS)) -> Dataset:
    features = Features({"label": ClassLabel(names=list(names)), "captions": List(Value("string"))})
    return Dataset.from_dict({"label": labels, "captions": captions}, features=features)


def pairs_of(combinations) -> CaptionPairs:
    """Each combination is a class of its own."""
    captions = [tiny_trunks.wordings(combination) for combination in combinations]
    return CaptionPairs(captioned(captions, list(range(len(captions))), [" ".join(c) for c in combinations]))


def tune(encoder: CaptionEncoder, folder, pairs: CaptionPairs, resume=None, **more) -> CaptionTrainer:
    given = {"per_device_train_batch_size": 48, "learning_rate": 5e-3, "save_strategy": "no", "logging_strategy": "no"}
    given |= {"report_to": [], "remove_unused_columns": False, "disable_tqdm": True, "dataloader_pin_memory": False}
    trainer = CaptionTrainer(encoder, TrainingArguments(str(folder), **(given | more)), pairs)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


# -- pairs -----------------------------------------------------------------------------------------------------------
def test_a_pair_is_two_captions_or_a_caption_and_its_class():
    captions = [["a", "b", "c", " a "], ["only"], [], None, ["a photo of a dog."], ["same", "same", ""]]
    pairs = CaptionPairs(captioned(captions, [0, 1, 2, 3, 1, 4]), "a photo of a {}.")
    assert pairs.texts == [["a", "b", "c"], ["only", "a photo of a dog."], ["same", "a photo of a cow."]]
    assert (pairs.labels, pairs.left_out, len(pairs)) == ([0, 1, 4], 3, 3)
    assert pairs.fixed() == [
        Pair("a", "b", 0),
        Pair("only", "a photo of a dog.", 1),
        Pair("same", "a photo of a cow.", 4),
    ]


def test_draws_are_of_two_different_texts_and_new_in_each_epoch():
    pairs = CaptionPairs(captioned([["a", "b", "c"], ["d", "e"]], [0, 1]), seed=3)
    seen = set()
    for pairs.epoch in range(60):
        for row in range(2):
            query, document, label = pairs[row]
            assert query != document and {query, document} <= set(pairs.texts[row]) and label == row
            seen.add((query, document))
    assert seen == set(itertools.permutations("abc", 2)) | set(itertools.permutations("de", 2))
    pairs.epoch = 5
    assert pairs[0] == pairs[0]
    other = CaptionPairs(captioned([["a", "b", "c"], ["d", "e"]], [0, 1]), seed=4)
    draws = [[(setattr(p, "epoch", epoch), p[0])[1] for epoch in range(60)] for p in (pairs, other)]
    assert draws[0] != draws[1]


# -- loss and retrieval ----------------------------------------------------------------------------------------------
def by_hand(queries, documents, labels, scale: float, masked: bool) -> float:
    total = 0.0
    for i in range(len(labels)):
        cosine = [torch.cosine_similarity(queries[i], document, dim=0).item() for document in documents]
        kept = [scale * c for j, c in enumerate(cosine) if j == i or labels[j] != labels[i] or not masked]
        total += torch.tensor(kept, dtype=torch.float64).logsumexp(0).item() - scale * cosine[i]
    return total / len(labels)


def test_the_loss_is_that_of_a_double_loop():
    torch.manual_seed(0)
    queries, documents = torch.randn(2, 7, 5, dtype=torch.float64)
    for labels in (list(range(7)), [0, 1, 0, 2, 1, 0, 3]):
        for scale, same_class in itertools.product((1.0, 50.0), ("mask", "negative")):
            found = caption_loss(queries, documents, torch.tensor(labels), scale, same_class).item()
            wanted = by_hand(queries, documents, labels, scale, same_class == "mask")
            assert found == pytest.approx(wanted, abs=1e-9)


def test_pictures_of_one_class_teach_nothing():
    queries, documents = torch.randn(2, 4, 5, requires_grad=True)
    loss = caption_loss(queries, documents, torch.zeros(4, dtype=torch.long))
    grads = torch.autograd.grad(loss, (queries, documents))
    assert loss.item() == 0.0 and not any(grad.any() for grad in grads)


class Table:
    """A caption encoder of vectors that are given."""

    size, max_length = 2, 9

    def __init__(self, vectors: dict):
        self.vectors = vectors

    def identity(self) -> dict:
        return {"base": "table", "vectors": self.vectors}

    def encode_batch(self, texts):
        return torch.tensor([self.vectors[text] for text in texts], dtype=torch.float32), torch.zeros(len(texts)).bool()


def test_retrieval_of_a_table():
    vectors = {"q1": [1, 0], "q2": [0, 1], "q3": [-1, 0], "q4": [0, 2], "d1": [3, 1], "d2": [2, 4], "d3": [1, -3]}
    pairs = [Pair("q1", "d1", 0), Pair("q2", "d2", 1), Pair("q3", "d3", 2), Pair("q4", "d1", 1)]
    # q3 is closest to d3 of its own; q4 to d2, a document of its class, and then to d1, its own.
    found = caption_retrieval(Table(vectors), pairs, Encoding(2))
    assert found == {
        "recall_at_1": 0.75,
        "recall_at_5": 1.0,
        "chance": pytest.approx(1 / 3),
        "class_at_1": 1.0,
        "pictures": 4,
        "documents": 3,
    }
    # Documents that are equally close are found by luck, which does not count.
    same = {"q1": [1, 0], "q2": [1, 0], "d1": [1, 1], "d2": [1, 1]}
    found = caption_retrieval(Table(same), [Pair("q1", "d1", 0), Pair("q2", "d2", 1)], Encoding(2))
    assert found["recall_at_1"] == 0.0


# -- training --------------------------------------------------------------------------------------------------------
def test_captions_find_captions_of_unseen_combinations(llama, tmp_path):
    """The two wordings share no word. Measured with models of seeds 0 to 2: 0 to 0.02 before, 0.5 to 0.99 after."""
    unseen, how = pairs_of(COMBINATIONS[:UNSEEN]).fixed(), Encoding(256)
    encoder = CaptionEncoder.from_pretrained(llama, device="cpu")
    before = caption_retrieval(encoder, unseen, how)
    base = {name: value.clone() for name, value in encoder.model.state_dict().items()}
    set_seed(0)
    encoder.add_lora()
    trainer = tune(encoder, tmp_path / "out", pairs_of(COMBINATIONS[UNSEEN:]), max_steps=70, warmup_steps=0.1)
    after = caption_retrieval(encoder, unseen, how)
    assert before["recall_at_1"] <= 0.05 and after["recall_at_1"] >= 0.3
    now = encoder.model.state_dict()
    for name, value in base.items():  # the base model stays as it is
        place = f"base_model.model.{name}"
        wrapped = place.replace(".weight", ".base_layer.weight")
        assert torch.equal(now[wrapped if wrapped in now else place], value)
    trainer.save_model()
    again = CaptionEncoder.from_pretrained(tmp_path / "out", device="cpu")
    assert caption_retrieval(again, unseen, how) == after


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_other_kinds_of_models_are_tuned(kind, tmp_path):
    encoder = CaptionEncoder.from_pretrained(getattr(tiny_trunks, f"save_{kind}")(tmp_path / kind), device="cpu")
    encoder.add_lora(dropout=0.0)
    encoder.checkpoint_gradients()
    tune(encoder, tmp_path / "out", pairs_of(COMBINATIONS[:8]), max_steps=2, per_device_train_batch_size=4)
    for name, parameter in encoder.named_parameters():
        assert ("lora_B" in name) == (parameter.requires_grad and bool((parameter != 0).any()) and "lora_A" not in name)


def test_a_run_that_was_stopped_goes_on_to_the_bit(llama, tmp_path):
    pairs = pairs_of(COMBINATIONS[:16])

    def run(folder: str, resume=None):
        encoder = CaptionEncoder.from_pretrained(llama, device="cpu")
        set_seed(0)
        encoder.add_lora(rank=2)
        options = {"per_device_train_batch_size": 8, "num_train_epochs": 3, "save_strategy": "epoch"}
        tune(encoder, tmp_path / folder, pairs, resume, **options).save_model()
        return load_file(tmp_path / folder / "adapter_model.safetensors")

    whole = run("whole")
    files = {path.name for path in (tmp_path / "whole" / "checkpoint-2").iterdir()}
    assert "adapter_model.safetensors" in files and not {"model.safetensors", "pytorch_model.bin"} & files
    rest = run("rest", resume=str(tmp_path / "whole" / "checkpoint-2"))
    assert whole.keys() == rest.keys() and all(torch.equal(whole[name], rest[name]) for name in whole)


WORKER = textwrap.dedent(
    """
    import os, sys
    import torch
    from mmft_hf.model.caption_encoder import CaptionEncoder
    from test_caption_contrast import COMBINATIONS, pairs_of, tune

    torch.set_num_threads(1)
    model, folder = sys.argv[1:]
    encoder = CaptionEncoder.from_pretrained(model, device="cpu")
    torch.manual_seed(0)
    encoder.add_lora(rank=2, dropout=0.0)
    options = {"num_train_epochs": 2, "use_cpu": True, "optim": "sgd", "learning_rate": 0.1}
    size = 8 // int(os.environ.get("WORLD_SIZE", "1"))
    trainer = tune(encoder, folder, pairs_of(COMBINATIONS[:16]), per_device_train_batch_size=size, **options)
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()
    os._exit(0)  # without the end of the interpreter, in which threads of gloo may abort: see mmft_hf/core/launch.py
    """
)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_train_as_one(llama, tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    root = Path(__file__).parents[1]
    path = ":".join(map(str, (root.parent, root / "helpers", root / "train")))
    run_python([script, llama, tmp_path / "one"], PYTHONPATH=path)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script]
    run_python([*command, llama, tmp_path / "two"], PYTHONPATH=path)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert any(value.abs().max() > 1e-3 for name, value in one.items() if "lora_B" in name)
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-5


# -- the recipe ------------------------------------------------------------------------------------------------------
RECIPE = Path(__file__).parents[2] / "recipes" / "llm2clip" / "cc.py"


def recipe():
    import importlib.util
    import sys

    spec = importlib.util.spec_from_file_location("cc", RECIPE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["cc"], path = module, list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


@pytest.fixture(scope="module")
def words_of(llama):
    """The command line of a short run on the embedded data."""

    def words(folder, **more) -> list[str]:
        given = {"text_trunk": llama, "captions_column": "text", "output_dir": folder, "max_steps": 4}
        given |= {"per_device_train_batch_size": 8, "lora_rank": 2, "shots": 2}
        return [word for key, value in (given | more).items() for word in (f"--{key}", str(value))]

    return words


def test_the_recipe_writes_a_text_trunk(words_of, tmp_path, capsys):
    folder = tmp_path / "trunk"
    assert recipe().main(words_of(folder, instruction="there stands ", pooling="last")) == 0
    out = capsys.readouterr().out
    assert "captions found by captions" in out and f"mmft-hf finetune --text_trunk {folder}" in out
    results = json.loads((folder / "cc_results.json").read_text())
    assert results["settings"]["learning_rate"] == 2e-4 and {"before", "after", "pairs"} <= results.keys()
    encoder = CaptionEncoder.from_pretrained(folder, device="cpu")
    assert (encoder.pooling, encoder.instruction) == ("last", "there stands ") and encoder.lora_digest
    # A second run in the same folder, and one with other settings.
    for more, code, said in (
        ({}, 2, "resume_from_checkpoint true to go on"),
        ({"resume_from_checkpoint": True, "learning_rate": 1e-3}, 2, "--learning_rate: expected 0.0002"),
        ({"resume_from_checkpoint": True}, 0, ""),
    ):
        assert recipe().main(words_of(folder, instruction="there stands ", pooling="last", **more)) == code
        assert said in capsys.readouterr().err


def test_the_recipe_says_what_to_type(words_of, tmp_path, capsys):
    for words, said in (
        ([], "--text_trunk"),
        (["--text_trunkk", "x"], "Did you mean 'text_trunk'? See `python recipes/llm2clip/cc.py --help`."),
        (words_of(tmp_path / "a", max_length=2), "--max_length: expected 3 or more"),
        (words_of(tmp_path / "a", text_trunk=tmp_path / "none"), "type --text_trunk"),
        ([w for w in words_of(tmp_path / "a") if w not in ("--captions_column", "text")], "mmft-hf caption"),
    ):
        assert recipe().main(words) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        recipe().main(["--help"])
    assert "usage: python recipes/llm2clip/cc.py [--config FILE.yaml]" in capsys.readouterr().out
