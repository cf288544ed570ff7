"""Batches encoded in chunks: the same gradient, less memory, and what is said about memory before."""

import json
import sys
import textwrap

import pytest
import torch
from processes import run_python
from tiny_clip import colour_dataset
from tiny_encoders import KINDS
from training import changed, make_trainer, weights

from mmft_hf import MMFTConfig, MMFTDataCollator, MMFTLoss, set_towers
from mmft_hf.core.errors import UserError
from mmft_hf.data.views import TextView, TrainingView
from mmft_hf.model import embedding
from mmft_hf.model.embedding import add_embedding_forward
from mmft_hf.model.memory import MemoryEstimate, estimate_memory


def batch_of(clip, rows: int = 11, **settings) -> dict:
    view = TrainingView(
        colour_dataset(6), TextView(["red thing", "green thing", "blue thing"], "a photo of a {}.", seed=1)
    )
    return MMFTDataCollator(clip[1], **settings)([view[i] for i in range(rows)])


def gradients(model, batch: dict, chunk_size: int) -> dict[str, torch.Tensor]:
    model.zero_grad()
    inputs = {name: batch[name] for name in ("pixel_values", "input_ids", "attention_mask")}
    torch.manual_seed(3)
    out = model(**inputs, chunk_size=chunk_size)
    loss = MMFTLoss(0.3)(out["image_embeds"], out["text_embeds"], batch["labels"], out["scale"])["loss"]
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("towers", [("full", "full"), ("lora", "lora"), ("lora", "frozen")])
@pytest.mark.parametrize("chunk_size", [1, 4, 5])
def test_gradients_of_chunks_are_those_of_the_batch(clip, towers, chunk_size):
    model = clip[0]
    set_towers(model, *towers)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:  # they begin at zero, which would hide the gradient of the others
            torch.nn.init.normal_(parameter, std=0.1)
    model.train()
    batch = batch_of(clip)
    inputs = {name: batch[name] for name in ("pixel_values", "input_ids", "attention_mask")}
    # The oracle is the stock forward.
    stock = model(**inputs)
    loss = MMFTLoss(0.3)(stock.image_embeds, stock.text_embeds, batch["labels"], model.logit_scale.exp())["loss"]
    loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    add_embedding_forward(model)
    found = gradients(model, batch, chunk_size)
    torch.testing.assert_close(found.pop("loss"), loss.detach(), atol=1e-6, rtol=0)
    assert expected["logit_scale"].abs() > 1e-3
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5)


def test_random_numbers_of_dropout_are_replayed(clip, monkeypatch):
    model = clip[0]
    torch.manual_seed(0)
    set_towers(model, "lora", "full", lora_dropout=0.5)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.config.text_config.attention_dropout = 0.5
    for layer in model.text_model.encoder.layers:
        layer.self_attn.dropout = 0.5
    model.train()
    batch = batch_of(clip)
    add_embedding_forward(model)
    found = gradients(model, batch, 4)
    # The oracle keeps all activations of the same chunks, so it has nothing to replay.
    monkeypatch.setattr(embedding, "checkpoint", lambda encode, *chunk, use_reentrant: encode(*chunk))
    expected = gradients(model, batch, 4)
    model.eval()
    without = gradients(model, batch, 4)
    assert max((expected[n] - without[n]).abs().max() for n in expected) > 1e-2
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5)


def test_a_copy_of_a_model_runs_its_own_weights(clip):
    import copy

    model = clip[0]
    add_embedding_forward(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.visual_projection.weight.mul_(-1)
    pixels = torch.randn(2, 3, 16, 16)
    images = [m(pixel_values=pixels, chunk_size=0)["image_embeds"] for m in (model, other)]
    torch.testing.assert_close(images[0], -images[1])


@pytest.mark.parametrize("settings", [{"loss_chunk_size": 3}, {"loss_chunk_size": 5, "gradient_checkpointing": True}])
def test_training_in_chunks_is_the_same_training(clip, _clip, tmp_path, settings):
    import copy

    sgd = {"optim": "sgd", "learning_rate": 0.1, "evaluate": False}
    chunked = make_trainer(clip, tmp_path / "chunked", **sgd, **settings)
    whole = make_trainer((copy.deepcopy(_clip[0]), _clip[1]), tmp_path / "whole", **sgd)
    before = weights(whole.model)
    chunked.train()
    whole.train()
    assert len(changed(before, weights(whole.model))) > 50
    for name, value in weights(whole.model).items():
        torch.testing.assert_close(chunked.model.state_dict()[name], value, atol=1e-6, rtol=0)


# A CLIP whose activations are large beside the interpreter, in a process of its own, whose memory is measured.
BIG = """
    import json, resource, sys
    sys.path.insert(0, sys.argv[1])
    import torch
    from tiny_clip import byte_tokenizer, colour_dataset
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor
    from mmft_hf import MMFTConfig, MMFTTrainer
    from mmft_hf.model.memory import estimate_memory

    torch.set_num_threads(2)
    tokenizer = byte_tokenizer()
    tower = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 4}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 1}
    config = CLIPConfig(
        text_config={**tower, **ids, "num_hidden_layers": 1, "vocab_size": len(tokenizer)},
        vision_config={**tower, "image_size": 64, "patch_size": 8},
        projection_dim=64,
    )
    size = {"height": 64, "width": 64}
    processor = CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": 64}, crop_size=size), tokenizer)
    model = CLIPModel(config)
"""


def in_a_process(tmp_path, code: str, *arguments) -> dict:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(BIG) + textwrap.dedent(code))
    tests = str(__file__).rsplit("/", 1)[0]
    # Large blocks go straight to the system and back, so that what is in use is what is measured.
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "2"}
    out, _ = run_python([script, tests, tmp_path, *arguments], **environment)
    return json.loads(out.strip().splitlines()[-1])


STEP = """
    batch, chunk = int(sys.argv[3]), int(sys.argv[4])
    from mmft_hf.model.collator import tokenize
    from mmft_hf.model.embedding import add_embedding_forward
    from mmft_hf.model.losses import MMFTLoss

    texts = ["a photo of a thing"]
    estimate = estimate_memory(model, processor, texts).total(batch, chunk)
    add_embedding_forward(model)
    optimizer = torch.optim.AdamW(model.parameters())
    tokens, _ = tokenize(processor, texts * batch)

    def step(batch):
        pixels = torch.zeros(batch, 3, 64, 64)
        out = model(pixel_values=pixels, **{k: v[:batch] for k, v in tokens.items()}, chunk_size=chunk)
        loss = MMFTLoss()(out["image_embeds"], out["text_embeds"], torch.arange(batch) % 7, out["scale"])["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    import os, re
    rss = int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    weights = sum(p.numel() * 4 for p in model.parameters())
    open("/proc/self/clear_refs", "w").write("5")  # the peak of the imports is forgotten
    step(batch)
    peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
    print(json.dumps({"estimate": estimate, "used": peak - rss + weights}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_chunks_is_that_of_one_chunk_and_the_estimate_is_near(tmp_path):
    # The peak is the process' own, and what threads and allocators add to it differs from run to run: the least of two.
    found = {
        sizes: min((in_a_process(tmp_path, STEP, *sizes) for _ in range(2)), key=lambda measured: measured["used"])
        for sizes in [(32, 0), (256, 0), (256, 32)]
    }
    assert found[256, 32]["used"] < 1.3 * found[32, 0]["used"]
    assert found[256, 0]["used"] > 3 * found[256, 32]["used"]
    for sizes, measured in found.items():
        # What kernels need for themselves is not in the estimate: a share, or a hundred megabytes of a small step.
        assert measured["used"] == pytest.approx(measured["estimate"], rel=0.35, abs=150e6), sizes


AUTO = """
    # As much memory as a chunk of 100 images needs, but not 128.
    size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    data = colour_dataset(43).select(range(128))

    def train(name, **settings):
        torch.manual_seed(0)
        model = CLIPModel(config)
        args = MMFTConfig(
            f"{sys.argv[2]}/{name}", per_device_train_batch_size=128, max_steps=1, use_cpu=True, disable_tqdm=True,
            save_strategy="no", load_best_model_at_end=False, optim="sgd", crop_min_area=1, **settings,
        )
        trainer = MMFTTrainer(model, args, data, processing_class=processor)
        trainer.train()
        return model, trainer

    whole, _ = train("whole")
    estimate = estimate_memory(whole, processor, ["a photo of a red thing. red no 3"])
    limit = size + 200_000_000 + estimate.total(128, 100)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    found, trainer = train("found", auto_find_batch_size=True)
    worst = max((a - b).abs().max().item() for a, b in zip(whole.parameters(), found.parameters()))
    print(json.dumps({"chunk": trainer._chunk_size(), "worst": worst}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_auto_find_batch_size_makes_chunks_smaller_and_not_the_batch(tmp_path):
    """Memory really runs out, and the loss is still that of 128 images."""
    found = in_a_process(tmp_path, AUTO)
    assert 32 <= found["chunk"] < 128
    assert found["worst"] < 1e-6


def test_the_estimate_counts_what_it_says(clip):
    model, processor = clip
    numbers = sum(p.numel() for p in model.parameters())
    estimate = estimate_memory(model, processor, ["a", "a longer text"])
    # Some hundred bytes are kept once for a batch: positions, the mask.
    assert 0 <= estimate.weights - 4 * numbers < 1000 and estimate.gradients_and_optimizer == 12 * numbers
    assert estimate.pixels_per_image == 4 * 3 * 16 * 16
    longer = estimate_memory(model, processor, ["a", "a much longer text than the other one"])
    assert longer.activations_per_image > estimate.activations_per_image
    set_towers(model, "frozen", "lora")
    lora = estimate_memory(model, processor, ["a", "a longer text"])
    assert lora.gradients_and_optimizer == 12 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert lora.activations_per_image < estimate.activations_per_image


def test_the_chunk_that_fits():
    estimate = MemoryEstimate(weights=100, gradients_and_optimizer=300, activations_per_image=10, pixels_per_image=1)
    assert estimate.total(64) == 400 + 64 + 640
    assert estimate.total(64, 8) == 400 + 64 + 80
    assert estimate.chunk_that_fits(64, 400 + 64 + 165) == 16
    assert estimate.chunk_that_fits(60, 10_000) == 64
    assert estimate.chunk_that_fits(64, 470) is None


@pytest.mark.parametrize("value", [0, -4])
def test_a_chunk_of_nothing_is_refused(value):
    with pytest.raises(UserError, match="loss_chunk_size: expected 1 or more"):
        MMFTConfig(loss_chunk_size=value)


def test_copies_of_weights_in_half_precision_are_not_counted_for_every_image(clip):
    """They made the estimate of a model with large weights ten times what it takes."""
    model, processor = clip
    full = estimate_memory(model, processor, ["a text"])
    half = estimate_memory(model, processor, ["a text"], torch.autocast("cpu", torch.bfloat16))
    assert half.activations_per_image < 1.2 * full.activations_per_image
    assert full.weights < half.weights <= 1.5 * full.weights


def test_the_estimate_leaves_model_and_random_numbers_as_they_are(monkeypatch):
    model, processor = KINDS["align"]()  # whose batch norms count what passes by
    forked = []
    fork = torch.random.fork_rng
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: forked.append(list(devices)) or fork(devices))
    before, random = weights(model), torch.random.get_rng_state()
    estimate_memory(model, processor, ["a text"])
    assert not changed(before, weights(model))
    assert torch.equal(random, torch.random.get_rng_state())
    assert forked == [[]]  # with no device given each process would start up every GPU of the machine


def test_no_chunks_are_advised_under_fsdp_which_refuses_them(tmp_path, monkeypatch):
    from mmft_hf.commands.finetune import memory_line
    from mmft_hf.model import memory

    config = MMFTConfig(str(tmp_path), use_cpu=True)
    estimate = memory.MemoryEstimate(0, 0, activations_per_image=1, pixels_per_image=0)
    monkeypatch.setattr(memory, "available_memory", lambda device: 1)
    assert "Type --" in memory_line(estimate, config)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # as accelerate launch sets it
    line = memory_line(estimate, config)
    assert line.startswith("at most") and "Type --" not in line
