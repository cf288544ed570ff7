"""Vectors of a caption encoder on disk: none is computed twice, by whichever process, and none is another encoder's."""

import json
import shutil
import textwrap
from pathlib import Path

import pytest
import tiny_trunks
import torch
from forked import fork
from processes import run_python
from safetensors.torch import load_file

from mmft_hf.core.errors import UserError
from mmft_hf.model.caption_encoder import CaptionEncoder
from mmft_hf.model.features import Encoding, encode_captions_once, sorted_distinct

TEXTS = sorted_distinct(f"{a} {b} {c} on the left" for a in ("red", "blue", "a") for b in ("cat", "dog") for c in "ab")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MMFT_HF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_trunks.save_llama(tmp_path_factory.mktemp("llama") / "llama")


class Counted:
    """A caption encoder, and which texts it has computed."""

    def __init__(self, folder: Path, **options):
        self.encoder = CaptionEncoder.from_pretrained(folder, device="cpu", **options)
        self.texts: list[str] = []
        plain = self.encoder.encode_batch
        self.encoder.encode_batch = lambda texts: (self.texts.extend(texts), plain(texts))[1]

    def once(self, texts=TEXTS, batch_size=5, **options):
        self.texts.clear()
        return encode_captions_once(self.encoder, texts, Encoding(batch_size, **options))


def test_a_hit_computes_nothing_and_has_the_same_bits(llama, folder):
    counted = Counted(llama)
    fresh = counted.once()
    assert counted.texts == TEXTS and not fresh.hit
    assert torch.equal(fresh.embeds, fresh.embeds.half().float()) and fresh.embeds.dtype == torch.float32
    torch.testing.assert_close(fresh.embeds, counted.encoder.encode(TEXTS), rtol=0, atol=1e-3)
    (path,) = folder.glob("captions-*/*")
    assert path.stat().st_size == len(TEXTS) * (32 + 1 + 2 * 48 + 4)  # two bytes a number
    again = counted.once()
    assert again.hit and not counted.texts and torch.equal(again.embeds, fresh.embeds)


def test_texts_are_shared_by_all_data_sets(llama):
    counted = Counted(llama)
    first = counted.once(TEXTS[:7])
    whole = counted.once(TEXTS)
    assert counted.texts == TEXTS[7:] and not whole.hit
    assert torch.equal(whole.embeds[:7], first.embeds)
    back = counted.once(TEXTS[::-1])
    assert not counted.texts and torch.equal(back.embeds.flip(0), whole.embeds)
    assert counted.once([]).embeds.shape == (0, 48)


def test_which_texts_were_truncated_is_kept(llama, caplog):
    counted = Counted(llama, max_length=6)
    texts = ["a red cat", "a red cat on the left"]
    assert counted.once(texts).flags.tolist() == [False, True]
    assert "1 truncated at 6 tokens" in caplog.text
    assert counted.once(texts).flags.tolist() == [False, True] and not counted.texts


def test_every_setting_has_its_own_vectors(llama, tmp_path):
    tuned = CaptionEncoder.from_pretrained(llama, device="cpu")
    tuned.add_lora(rank=2)
    for seed, name in ((0, "lora"), (1, "other lora")):
        torch.manual_seed(seed)
        for key, value in tuned.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(value, std=0.3)
        tuned.save_pretrained(tmp_path / name)
    encoders = [
        Counted(llama),
        Counted(tmp_path / "lora"),
        Counted(tmp_path / "other lora"),
        Counted(llama, pooling="last"),
        Counted(llama, bidirectional=False),
        Counted(llama, instruction="the photo shows "),
        Counted(llama, normalize=False),
        Counted(llama, max_length=7),
        Counted(tiny_trunks.save_llama(tmp_path / "seed", seed=1)),
    ]
    found = [counted.once() for counted in encoders]
    assert all(counted.texts == TEXTS for counted in encoders)
    for counted, features in zip(encoders, found, strict=True):
        torch.testing.assert_close(features.embeds, counted.encoder.encode(TEXTS), rtol=1e-3, atol=1e-3)
    shutil.copytree(llama, tmp_path / "copy")  # the same model elsewhere
    assert Counted(tmp_path / "copy").once().hit


def test_damaged_records_are_computed_again(llama, folder):
    counted = Counted(llama)
    fresh = counted.once(batch_size=1)
    (path,) = folder.glob("captions-*/*")
    content, record = bytearray(path.read_bytes()), 32 + 1 + 2 * 48 + 4
    content[2 * record + 40] ^= 1  # in the vector
    content[5 * record + 3] ^= 1  # in the text's hash
    path.write_bytes(content[:-7])  # the last one was cut by a full disk or a crash
    again = counted.once(batch_size=1)
    assert counted.texts == [TEXTS[2], TEXTS[5], TEXTS[-1]]
    assert torch.equal(again.embeds, fresh.embeds)
    assert counted.once().hit


def test_a_disk_that_cannot_be_written_costs_only_the_cache(llama, monkeypatch, caplog):
    monkeypatch.setenv("MMFT_HF_CACHE", "/dev/null/none")
    counted = Counted(llama)
    assert torch.equal(counted.once().embeds, counted.once().embeds) and counted.texts == TEXTS
    assert caplog.text.count("Nothing can be kept in /dev/null/none") == 1


def test_vectors_that_are_not_finite_are_refused(llama):
    counted = Counted(llama, normalize=False)
    with torch.no_grad():
        counted.encoder.model.norm.weight.fill_(1e6)
    with pytest.raises(UserError, match="finite in half precision"):
        counted.once()


CAPTIONS = [
    f"a {a} {b} on {c} near the {d}" for a in range(10) for b in range(10) for c in range(10) for d in range(10)
]
ENCODE = textwrap.dedent(
    """
    import os, signal
    from mmft_hf.model.caption_encoder import CaptionEncoder
    from mmft_hf.model.features import Encoding, encode_captions_once
    from safetensors.torch import save_file

    encoder = CaptionEncoder.from_pretrained({model!r}, device="cpu")
    texts = open({texts!r}).read().splitlines()
    plain, calls = encoder.encode_batch, 0

    def counted(batch):
        global calls
        calls += 1
        if calls == {last}:
            os.kill(os.getpid(), signal.SIGKILL)
        with open({log!r}, "a") as file:
            file.writelines(f"{{text}}\\n" for text in batch)
        return plain(batch)

    encoder.encode_batch = counted
    embeds = encode_captions_once(encoder, texts, Encoding(256)).embeds
    save_file({{"embeds": embeds}}, {result!r})
    """
)


def test_a_killed_run_goes_on_without_computing_any_text_twice(llama, tmp_path):
    texts, log, result = (str(tmp_path / name) for name in ("texts", "log", "result"))
    Path(texts).write_text("\n".join(CAPTIONS))

    def run(last: int, cache: Path) -> int:
        code = ENCODE.format(model=str(llama), texts=texts, log=log, result=result, last=last)
        modules = ("mmft_hf.model.caption_encoder", "mmft_hf.model.features")
        return fork(code, tmp_path / "output", modules, MMFT_HF_CACHE=cache).wait()

    assert run(15, tmp_path / "cache") == -9
    assert len(Path(log).read_text().splitlines()) == 14 * 256 and not Path(result).exists()
    assert run(8, tmp_path / "cache") == -9
    assert run(0, tmp_path / "cache") == 0
    assert sorted(Path(log).read_text().splitlines()) == sorted(CAPTIONS)
    resumed = load_file(result)["embeds"]
    assert run(0, tmp_path / "other") == 0
    assert torch.equal(load_file(result)["embeds"], resumed)


WORKER = textwrap.dedent(
    """
    import json, os, sys
    import torch
    import torch.distributed as dist
    from safetensors.torch import save_file
    from mmft_hf.model.caption_encoder import CaptionEncoder
    from mmft_hf.model.features import Encoding, encode_captions_once

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, (model, folder) = dist.get_rank(), sys.argv[1:]
    texts = json.loads(open(f"{folder}/texts.json").read())
    encoder = CaptionEncoder.from_pretrained(model, device="cpu")
    plain, computed = encoder.encode_batch, []
    encoder.encode_batch = lambda batch: (computed.extend(batch), plain(batch))[1]

    def once(some=texts):
        return encode_captions_once(encoder, some, Encoding(5, shard=True)).embeds

    embeds = once()
    first = list(computed)
    assert torch.equal(once(), embeds) and computed == first
    os.environ["MMFT_HF_CACHE"] = "/dev/null/none"  # nothing can be kept
    assert torch.equal(once(), embeds)
    # Only one of the machines has the vectors: all encode.
    os.environ["MMFT_HF_CACHE"] = f"{folder}/" + ("cache" if rank == 0 else "other")
    assert torch.equal(once(), embeds)
    assert len(computed) == 3 * len(first), (len(computed), len(first))
    os.environ["MMFT_HF_CACHE"] = f"{folder}/third"
    assert torch.equal(once(texts[:3]), embeds[:3])  # one batch: the second process has none
    if rank:
        encoder.pooling = "last"
    try:
        once()
        refused = ""
    except Exception as error:
        refused = f"{type(error).__name__}: {error}"
    save_file({"embeds": embeds}, f"{folder}/rank{rank}.safetensors")
    with open(f"{folder}/rank{rank}.json", "w") as file:
        json.dump({"computed": first, "refused": refused}, file)
    dist.destroy_process_group()
    os._exit(0)  # without the end of the interpreter, in which threads of gloo may abort: see mmft_hf/core/launch.py
    """
)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_share_the_work_and_get_the_bits_of_one(llama, tmp_path):
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS))
    (tmp_path / "worker.py").write_text(WORKER)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", tmp_path / "worker.py"]
    run_python([*command, llama, tmp_path], MMFT_HF_CACHE=tmp_path / "cache")
    said = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert said[0]["computed"] == TEXTS[:5] + TEXTS[10:] and said[1]["computed"] == TEXTS[5:10]
    assert all(s["refused"].startswith("UserError") and "same model and settings" in s["refused"] for s in said)
    one = Counted(llama)
    assert one.once().hit  # what two have kept, with the cache of this test's environment
    shutil.rmtree(tmp_path / "cache")
    embeds = one.once().embeds
    for rank in (0, 1):
        assert torch.equal(load_file(tmp_path / f"rank{rank}.safetensors")["embeds"], embeds)
