"""For tests of captioning runs: pictures, their expected captions, and commands as real processes that can be killed.

An expected caption is computed from the bytes of the picture and from a prompt written here, never from what the library
recorded.
"""

import atexit
import functools
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
from caption_server import caption_of
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

NAMES = ["blue_thing", "red_thing"]
ASPECTS = ("visual", "shape", "texture")


def picture(i: int, kind: str = "PNG") -> bytes:
    """A small picture, different for each number."""
    pixels = np.random.default_rng(i).integers(0, 256, (10, 12 + i % 3, 3), dtype=np.uint8)
    file = io.BytesIO()
    PILImage.fromarray(pixels).save(file, kind)
    return file.getvalue()


def dataset(pictures, names=NAMES, labels=None) -> Dataset:
    """A dataset of encoded pictures; the default labels alternate."""
    pictures = list(pictures)
    labels = labels or [i % len(names) for i in range(len(pictures))]
    columns = {"image": [{"bytes": data, "path": None} for data in pictures], "label": labels}
    return Dataset.from_dict(columns, features=Features({"image": Image(), "label": ClassLabel(names=list(names))}))


def image_folder(path: Path, count: int, start: int = 0) -> Path:
    """`count` PNG files in one subfolder per class."""
    for i in range(start, start + count):
        file = path / NAMES[i % 2] / f"{i:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture(i))
    return path


def prompt(name: str, aspect: str) -> str:
    name = name.replace("_", " ").lower()
    return (
        f"To differentiate this {name} photo from other general objects photos, describe its primary {aspect} "
        "characteristics based on the photo in 50 words."
    )


def expected(data: bytes, name: str, aspect: str) -> str:
    return caption_of(hashlib.sha256(data).hexdigest(), prompt(name, aspect))


def pairs(data: bytes, name: str, aspects=ASPECTS) -> set[tuple[str, str]]:
    """The requests that the server must have received for a picture: its sha256 with each prompt."""
    return {(hashlib.sha256(data).hexdigest(), prompt(name, aspect)) for aspect in aspects}


def asked(rows) -> list[tuple[str, str]]:
    """What the server was asked, from its log."""
    return [(row["picture"], row["prompt"]) for row in rows]


def wrong(rows, aspects=ASPECTS, names=NAMES) -> list:
    """Rows of a captioned dataset (images not decoded) with a missing or a wrong caption."""
    found = []
    for row in rows:
        name, data = names[row["label"]], row["image"]["bytes"]
        own = {aspect: expected(data, name, aspect) for aspect in aspects}
        records = {r["aspect"]: r["text"] for r in row["caption_records"]}
        if row["captions"] != list(own.values()) or records != own:
            found.append((row["image"]["path"], row["captions"], records))
        if row["image_sha256"] != hashlib.sha256(data).hexdigest():
            found.append((row["image"]["path"], row["image_sha256"]))
    return found


def written(folder: Path, split: str = "train") -> list[dict]:
    """The rows of a captioned folder, read without the library."""
    return [row for file in sorted((folder / "data").glob(f"{split}-*")) for row in pq.read_table(file).to_pylist()]


def undecoded(captioned) -> list[dict]:
    return list(captioned.cast_column("image", Image(decode=False)))


# -- processes --------------------------------------------------------------------------------------------------------
class Command:
    """`mmft-hf …` as a process, forked from one that has imported everything, which takes 10 ms in place of 4 s."""

    def __init__(self, pid: int, output: Path):
        self.pid, self.output = pid, output

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        """The exit code, negative if a signal ended the process."""
        return _launcher().ask({"wait": self.pid})

    @property
    def text(self) -> str:
        return self.output.read_text()


class Launcher:
    def __init__(self):
        command = [sys.executable, __file__]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        atexit.register(self.close)

    def ask(self, message) -> int:
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


@functools.cache
def _launcher() -> Launcher:
    return Launcher()


def start(words, output: Path, before: str = "", **environment) -> Command:
    """Starts a command. `before`: Python code that its process runs first; `environment`: additional variables."""
    message = {"words": [str(word) for word in words], "output": str(output), "before": before, "env": environment}
    return Command(_launcher().ask(message), output)


def caption(server, data: Path, output: Path, *more) -> list:
    """The command line of a captioning run."""
    words = ["caption", "--captioner", "openai", "--captioner_model", "m", "--base_url", f"{server.url}/v1"]
    return [*words, "--dataset_name", data, "--output_dir", output, *more]


def until(condition, seconds: float = 30.0, every: float = 0.005) -> None:
    """Waits until the condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(every)


def _serve() -> None:
    import mmft_hf.captioning.ask.backends.openai
    import mmft_hf.commands.caption.actions
    from mmft_hf.cli import main, quiet_libraries
    from mmft_hf.model.loading import load_tokenizer

    quiet_libraries()
    load_tokenizer("builtin/tiny-clip")
    for line in sys.stdin:
        message = json.loads(line)
        if "wait" in message:
            print(os.waitstatus_to_exitcode(os.waitpid(message["wait"], 0)[1]), flush=True)
            continue
        if message["words"][0] == "finetune":
            import mmft_hf.train.workflow  # noqa: F401 - torch, which captioning does without
        pid = os.fork()
        if pid:
            print(pid, flush=True)
            continue
        os.setsid()
        handle = os.open(message["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0), os.dup2(handle, 1), os.dup2(handle, 2)
        os.environ.update(message["env"])
        if "HF_DATASETS_CACHE" in message["env"]:
            datasets.config.HF_DATASETS_CACHE = Path(message["env"]["HF_DATASETS_CACHE"])
        code = 1
        try:
            exec(message["before"], {})
            code = main(message["words"])
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)


if __name__ == "__main__":
    _serve()
