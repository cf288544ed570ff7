"""A captioner in this process: what a row says does not depend on its batch, and what fails is told apart."""

import asyncio
import gc
import io
import json
import shutil
import threading
import time
import weakref

import pytest
import torch
from caption_tools import NAMES, dataset
from caption_tools import picture as shapes
from PIL import Image
from processes import run_python
from safetensors.torch import load_file, save_file
from tiny_vlm import CHAT_TEMPLATE
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration
from vlm_requests import GREEDY, LONG, MIXED, ask, picture, request, seen

from mmft_hf.captioning.apply import apply_steps
from mmft_hf.captioning.ask.backends.transformers import TransformersBackend
from mmft_hf.captioning.ask.captioner import Captioner
from mmft_hf.captioning.ask.limits import Limits
from mmft_hf.captioning.ask.roles import open_roles
from mmft_hf.captioning.asker import Asker, PicturesOfDataset
from mmft_hf.captioning.caption_table import CaptionTable
from mmft_hf.captioning.judge.checks import CaptionChecker
from mmft_hf.captioning.steps.choice import Choice
from mmft_hf.captioning.steps.rubric import Rubric
from mmft_hf.captioning.types import Fatal, Picture, Request, Sampling, Unanswerable
from mmft_hf.core.errors import UserError


@pytest.fixture
def copy(vlm, tmp_path):
    return shutil.copytree(vlm, tmp_path / "tiny-vlm")


@pytest.fixture(scope="module")
def expected(vlm):
    """What transformers itself writes, one row at a time, without padding: text, tokens in, tokens out, finish reason."""
    processor = AutoProcessor.from_pretrained(vlm)
    model = AutoModelForImageTextToText.from_pretrained(vlm, dtype=torch.float32).eval()

    def write(row: Request) -> tuple:
        inputs = processor(
            images=Image.open(io.BytesIO(row.pictures[0].data)),
            text=f"<s>user: <image>{row.prompt}\nassistant:",
            add_special_tokens=False,
            return_tensors="pt",
        )
        ids = model.generate(**inputs, max_new_tokens=row.max_tokens, do_sample=False)[0, inputs.input_ids.shape[1] :]
        text = processor.decode(ids, skip_special_tokens=True)
        ended = model.generation_config.eos_token_id in ids
        return text, inputs.input_ids.shape[1], len(ids), "stop" if ended else "length"

    return write


def test_a_question_may_have_several_pictures_or_none(vlm):
    processor = AutoProcessor.from_pretrained(vlm)
    model = AutoModelForImageTextToText.from_pretrained(vlm, dtype=torch.float32).eval()
    shown = [(), ("red", "blue"), ("lime",), ()]
    requests = [Request(tuple(map(picture, colours)), f"Which {i}?", 9, ("visual",)) for i, colours in enumerate(shown)]
    answers = ask(TransformersBackend(vlm, sampling=GREEDY), requests)
    for asked, found in zip(requests, answers, strict=True):
        images = [Image.open(io.BytesIO(one.data)) for one in asked.pictures]
        text = f"<s>user: {'<image>' * len(images)}{asked.prompt}\nassistant:"
        inputs = processor(images=images or None, text=text, add_special_tokens=False, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=9, do_sample=False)[0, inputs.input_ids.shape[1] :]
        assert found.text == processor.decode(ids, skip_special_tokens=True)
        assert found.tokens_in == inputs.input_ids.shape[1]


class Faults:
    """Stands in front of `generate` of the model class and raises where it is told to. Keeps the sizes of batches."""

    def __init__(self, monkeypatch, error=None, when=lambda ids: False):
        real, self.sizes = LlavaForConditionalGeneration.generate, []

        def generate(model, *args, **inputs):
            self.sizes.append(len(inputs["input_ids"]))
            self.model = weakref.ref(model)
            if when(inputs["input_ids"]):
                raise error
            return real(model, *args, **inputs)

        monkeypatch.setattr(LlavaForConditionalGeneration, "generate", generate)


# -- what is written --------------------------------------------------------------------------------------------------
def test_a_batch_writes_what_each_row_gets_alone(vlm, expected):
    backend = TransformersBackend(str(vlm), sampling=GREEDY)
    found = [seen(answer) for answer in ask(backend, MIXED)]
    assert found == [expected(row) for row in MIXED]
    assert found == [seen(ask(backend, [row])[0]) for row in MIXED]
    assert len({text for text, *_ in found}) == len(MIXED)  # else another order would go unseen
    assert {reason for *_, reason in found} == {"stop", "length"}


def test_more_rows_than_a_batch_keep_their_order(vlm, expected, monkeypatch):
    faults = Faults(monkeypatch)
    found = ask(TransformersBackend(str(vlm), sampling=GREEDY, batch_size=4), MIXED[::-1])
    assert faults.sizes == [4, 2]
    assert [seen(answer) for answer in found] == [expected(row) for row in MIXED[::-1]]


def test_any_of_several_end_tokens_ends(copy):
    long = request(prompt="Colour?", max_tokens=40)
    (free,) = ask(TransformersBackend(str(copy), sampling=GREEDY), [long])
    assert free.finish_reason == "length"
    last = free.text.split()[3]
    config = json.loads((copy / "generation_config.json").read_text())
    ends = [config["eos_token_id"], AutoProcessor.from_pretrained(copy).tokenizer.convert_tokens_to_ids(f" {last}")]
    (copy / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": ends}))
    # Beside a row that runs on, so that this one is padded.
    answer, _ = ask(TransformersBackend(str(copy), sampling=GREEDY), [long, request("blue", LONG, 40)])
    assert answer.finish_reason == "stop"
    assert answer.tokens_out == free.text.split().index(last) + 1
    assert answer.text.split()[-1] == last


def test_same_seed_same_text_and_nobody_elses_random_numbers(vlm):
    backend = TransformersBackend(str(vlm), sampling=Sampling(temperature=1.0))
    rows = [request(seed=1, max_tokens=20), request("blue", seed=2, max_tokens=20)]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = ask(backend, rows)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert ask(backend, rows) == first
    assert ask(TransformersBackend(str(vlm), sampling=Sampling(temperature=1.0)), rows) == first
    others = ask(backend, [request(seed=3, max_tokens=20), request("blue", seed=4, max_tokens=20)])
    assert [a.text for a in others] != [a.text for a in first]


def test_options_reach_generate_and_null_takes_one_away(vlm, expected):
    row = request("red", "Colour?", 20)
    one = Sampling(temperature=1.0, options={"top_k": 1})
    greedy = expected(row)[0]
    assert ask(TransformersBackend(str(vlm), sampling=one), [row])[0].text == greedy
    plain = Sampling(temperature=1.0, options={"do_sample": None})
    assert ask(TransformersBackend(str(vlm), sampling=plain), [row])[0].text == greedy
    word = greedy.split()[2]
    stopping = Sampling(temperature=0, options={"stop_strings": [f" {word}"]})
    answer, _ = ask(TransformersBackend(str(vlm), sampling=stopping), [row, request("red", LONG, 20)])
    assert (answer.text.split()[-1], answer.finish_reason) == (word, "stop")


def test_thoughts_stay_marked_also_where_their_end_is_a_special_token(copy):
    row = request("red", "Colour?", 20)
    words = ask(TransformersBackend(str(copy), sampling=GREEDY), [row])[0].text.split()
    closing = words[4]
    text = (copy / "tokenizer.json").read_text()
    tokens = json.loads(text)
    for token in tokens["added_tokens"]:
        if token["content"] == f" {closing}":
            token.update(content="</think>", special=True)
    (copy / "tokenizer.json").write_text(json.dumps(tokens))
    (copy / "chat_template.jinja").write_text(CHAT_TEMPLATE + "{% if thinking %}<think>{% endif %}")
    sampling = Sampling(temperature=0, options={"chat_template_kwargs": {"thinking": False}})
    (closed,) = ask(TransformersBackend(str(copy), sampling=sampling), [row])
    before = words.index(closing)
    assert closed.text.split("</think>")[0].split() == words[:before]
    assert closed.thinking_tokens == before + 1
    sampling = Sampling(temperature=0, options={"chat_template_kwargs": {"thinking": True}})
    (cut,) = ask(TransformersBackend(str(copy), sampling=sampling), [request("red", "Colour?", 1)])
    assert cut.text.startswith("<think>")  # the template's own word
    assert (cut.finish_reason, cut.thinking_tokens) == ("length", 1)


# -- what fails -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), RuntimeError("MPS backend out of memory (…)")],
)
def test_out_of_memory_halves_the_batch_for_good(vlm, expected, monkeypatch, error):
    faults = Faults(monkeypatch, error, lambda ids: len(ids) > 2)
    backend = TransformersBackend(str(vlm), sampling=GREEDY, batch_size=6)
    wanted = [expected(row) for row in MIXED]
    faults.sizes.clear()
    assert [seen(answer) for answer in ask(backend, MIXED)] == wanted
    assert faults.sizes == [6, 3, 2, 2, 2]
    assert [seen(answer) for answer in ask(backend, MIXED)] == wanted
    assert faults.sizes[5:] == [2, 2, 2]


def test_out_of_memory_with_one_picture_is_that_pictures_failure(vlm, expected, monkeypatch):
    Faults(monkeypatch, torch.OutOfMemoryError("CUDA out of memory"), lambda ids: ids.shape[1] > 300)
    backend = TransformersBackend(str(vlm), sampling=GREEDY)
    found = ask(backend, MIXED)
    assert [getattr(a, "kind", None) for a in found] == [None, None, None, "out_of_memory", None, None]
    assert seen(found[4]) == expected(MIXED[4])
    with pytest.raises(Unanswerable) as failure:
        ask(backend, [MIXED[3]])
    assert failure.value.kind == "out_of_memory"


def test_one_odd_row_leaves_the_others(vlm, expected, monkeypatch):
    Faults(monkeypatch, ValueError("image features and image tokens do not match"), lambda ids: ids.shape[1] > 300)
    rows = [
        *MIXED,
        Request((Picture(b"\x89PNG broken", "image/png", 9, 9),), "Describe it.", 9, ("visual",)),
        request(prompt="A cat named <image>"),
        request(prompt="A cat</s> named x"),
    ]
    found = ask(TransformersBackend(str(vlm), sampling=GREEDY), rows)
    kinds = [getattr(answer, "kind", None) for answer in found]
    assert kinds == [None] * 3 + ["model_error"] + [None] * 2 + ["bad_image", "control_token", "control_token"]
    assert [seen(found[i]) for i in (0, 1, 2, 4, 5)] == [expected(MIXED[i]) for i in (0, 1, 2, 4, 5)]
    assert "do not match" in str(found[3])
    assert all(isinstance(found[i], Unanswerable) and found[i].__traceback__ is None for i in (3, 6, 7, 8))


def test_a_lost_accelerator_stops_everything(vlm, monkeypatch):
    faults = Faults(monkeypatch, RuntimeError("CUDA error: device-side assert triggered"), lambda ids: True)
    with pytest.raises(Fatal, match="device-side assert"):
        ask(TransformersBackend(str(vlm), sampling=GREEDY), MIXED)
    assert len(faults.sizes) == 1


def test_calls_wait_for_each_other_and_the_event_loop_goes_on(vlm, monkeypatch):
    real, inside, most, threads = LlavaForConditionalGeneration.generate, [], [], set()

    def slow(model, *args, **inputs):
        inside.append(1)
        most.append(len(inside))
        threads.add(threading.current_thread())
        time.sleep(0.1)
        inside.pop()
        return real(model, *args, **inputs)

    monkeypatch.setattr(LlavaForConditionalGeneration, "generate", slow)
    backend = TransformersBackend(str(vlm), sampling=GREEDY)

    async def together():
        ticks = 0
        calls = [asyncio.create_task(backend.generate([row])) for row in MIXED[:3]]
        while not all(call.done() for call in calls):
            ticks += 1
            await asyncio.sleep(0.01)
        return ticks

    assert asyncio.run(together()) > 10
    assert max(most) == 1
    assert threading.main_thread() not in threads


def test_closing_frees_the_model(vlm, monkeypatch):
    faults = Faults(monkeypatch)
    backend = TransformersBackend(str(vlm), sampling=GREEDY)
    first = ask(backend, MIXED[:1])
    assert faults.model() is not None
    asyncio.run(backend.aclose())
    gc.collect()
    assert faults.model() is None
    assert ask(backend, MIXED[:1]) == first


def test_a_model_is_loaded_once_for_all_steps_and_freed_after_the_last(vlm, tmp_path, monkeypatch):
    loaded, real = [], AutoModelForImageTextToText.from_pretrained

    def counted(*args, **options):
        loaded.append(args)
        return real(*args, **options)

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", counted)
    data = dataset([shapes(i) for i in range(2)]).add_column("captions", [["one", "two"]] * 2)
    table, steps = CaptionTable("data", data), [Rubric(), Choice(), Rubric(dimensions=("grammar",))]
    roles = open_roles({"judge": Captioner("transformers", str(vlm), sampling=GREEDY)}, 1, None, 0.0, None)
    pictures = PicturesOfDataset(table.part.images, table.part.hashes)
    checker, limits = CaptionChecker(NAMES), Limits()
    with Asker(roles, pictures, tmp_path, checker, limits, "a run", False, steps) as asker:
        held = []

        def asking(step, *args):
            found = asker(step, *args)
            held.append(roles["judge"].backend._model is not None)
            return found

        apply_steps(table, steps, None, asking, checker)
    assert len(loaded) == 1 and held == [True, True, False]


# -- who answers ------------------------------------------------------------------------------------------------------
def test_identity_is_that_of_the_weights_and_knows_no_path(vlm, copy, monkeypatch):
    identity = TransformersBackend(str(vlm)).identity()
    assert {k: v for k, v in identity.items() if k != "revision"} == {
        "backend": "transformers",
        "model": "tiny-vlm",
        "dtype": "float32",
    }
    (copy / "README.md").write_text("A card.")
    assert TransformersBackend(f"{copy}/").identity() == identity
    monkeypatch.chdir(copy)
    assert TransformersBackend(".").identity() == identity

    weights = load_file(copy / "model.safetensors")
    next(tensor for name, tensor in weights.items() if "up_proj" in name)[3, 3] += 1e-3
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    changed = TransformersBackend(str(copy)).identity()
    assert changed["revision"] != identity["revision"]
    (copy / "chat_template.jinja").write_text(CHAT_TEMPLATE + " ")
    assert TransformersBackend(str(copy)).identity()["revision"] != changed["revision"]


def test_identity_samples_large_files_from_end_to_end(copy):
    large = copy / "model-00002-of-00002.safetensors"
    size, found = 12 << 20, set()
    for place in (None, 0, size // 2, size - 1):
        content = bytearray(size)
        if place is not None:
            content[place : place + (1 << 18)] = b"x" * len(content[place : place + (1 << 18)])
        large.write_bytes(content)
        found.add(TransformersBackend(str(copy)).identity()["revision"])
    assert len(found) == 4


@pytest.mark.slow
def test_identity_is_the_same_in_another_process_and_a_commit_for_a_hub_model(vlm, tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "hub" / "models--someone--tiny-vlm"
    shutil.copytree(vlm, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    code = f"""if True:
        import asyncio, json
        from mmft_hf.captioning.ask.backends.transformers import TransformersBackend
        from vlm_requests import GREEDY, MIXED
        hub = TransformersBackend("someone/tiny-vlm", sampling=GREEDY)
        answer = asyncio.run(hub.generate(MIXED[:1]))[0]
        print(json.dumps([TransformersBackend({str(vlm)!r}).identity(), hub.identity(), answer.text]))"""
    out, _ = run_python(["-c", code], HF_HOME=tmp_path, HF_HUB_CACHE=tmp_path / "hub", HF_HUB_OFFLINE=1)
    local, hub, text = json.loads(out)
    backend = TransformersBackend(str(vlm), sampling=GREEDY)
    assert local == backend.identity()
    assert hub == {**local, "model": "someone/tiny-vlm", "revision": commit}
    assert text == ask(backend, MIXED[:1])[0].text


# -- what cannot be used ----------------------------------------------------------------------------------------------
def test_identity_refuses_what_is_no_captioner(copy, clip_folder):
    def refused(folder, match: str) -> None:
        with pytest.raises(UserError, match=match):
            TransformersBackend(str(folder)).identity()

    refused(copy / "missing", "no such folder")
    refused("./missing", "no such folder")
    refused("nobody/nothing", "a folder that exists")
    refused(clip_folder, "found model_type 'clip'")
    (copy / "chat_template.jinja").unlink()
    refused(copy, "chat template")
    (copy / "processor_config.json").unlink()
    refused(copy, "processor")
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    refused(copy, r"\*\.safetensors")
    (copy / "config.json").write_text('{"model_type": "nothing"}')
    refused(copy, "Is the folder complete")
    (copy / "config.json").unlink()
    refused(copy, r"config\.json")


def test_an_index_that_names_a_pickle_is_refused(copy):
    (copy / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model.bin", "b": "model.safetensors"}}')
    with pytest.raises(UserError, match=r"index.json names model\.bin, which can run any code"):
        TransformersBackend(str(copy)).identity()


def test_weights_that_lack_something_are_refused(copy):
    weights = load_file(copy / "model.safetensors")
    del weights[next(name for name in weights if "linear_1.weight" in name)]
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"1 are missing, for example .*linear_1\.weight"):
        ask(TransformersBackend(str(copy)), MIXED)
    (copy / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(UserError, match="weights as safetensors"):
        ask(TransformersBackend(str(copy)), MIXED)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"sampling": Sampling(options={"top_kk": 5})}, "'top_k'"),
        ({"sampling": Sampling(options={"max_new_tokens": 5})}, "max_tokens"),
        ({"sampling": Sampling(options={"num_return_sequences": 5})}, "num_return_sequences"),
    ],
)
def test_arguments_that_cannot_be_used(arguments, match):
    with pytest.raises(UserError, match=match):
        TransformersBackend("any", **arguments)
