"""For tests through the local Hub: a child process that keeps its imports, and what was said, kept or told in it.

with client(hub, token="hf_alice") as alice:
    code, text = alice.mmft("push", folder, "--repo_id", "alice/tuned")
    alice.run("out['names'] = [m.id for m in huggingface_hub.list_models()]")["names"]
"""

import contextlib
import hashlib
import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

from tiny_clip import COLOURS, colour_images

from mmft_hf.cli import main

WORKER = r"""
import contextlib, gc, io, json, os, sys, traceback, warnings
from pathlib import Path
# The answers go where standard output went; whatever else is printed goes to standard error.
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
import huggingface_hub
from mmft_hf import cli
from mmft_hf.hub import client
client.LONGEST_PAUSE_S = 0.05

def mmft(*words):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = cli.main([str(word) for word in words])
    return [code, said.getvalue()]

names = dict(globals())
for line in sys.stdin:
    task = json.loads(line)
    os.environ.pop("HF_TOKEN", None)
    os.environ.update({"HF_TOKEN": task["token"]} if task["token"] else {})
    names.update(out={}, args=task["args"])
    gc.freeze()  # as in conftest.py
    try:
        exec(task["code"], names)
    except BaseException:
        names["out"] = {"error": traceback.format_exc()}
    print(json.dumps(names["out"]), file=answers, flush=True)
"""


class Client:
    """See `client`."""

    def __init__(self, process: subprocess.Popen, token: str | None):
        self.process, self.token, self.said = process, token, ""

    def run(self, code: str, *args, token: str | None = "") -> dict:
        """What the code left in `out`; it finds its arguments in `args`. Names stay from one call to the next.

        Args:
            token: another one for this call; None: no token at all.
        """
        task = {"code": code, "args": [str(a) for a in args], "token": self.token if token == "" else token}
        print(json.dumps(task), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        assert answer, "the child process has ended"
        out = json.loads(answer)
        assert "error" not in out, out["error"]
        return out

    def mmft(self, *words, token: str | None = "") -> tuple[int, str]:
        """Exit code and output of `mmft-hf …`."""
        code, said = self.run("out['done'] = mmft(*args)", *words, token=token)["done"]
        self.said += said
        return code, said


@contextlib.contextmanager
def client(hub, token: str | None = "hf_alice", home: str = "home", **env):
    """A child process that works with the Hub, until the block ends. What it writes to standard error is `log`."""
    with open(hub.folder / f"{home}.log", "ab") as log:
        command = [sys.executable, "-c", WORKER]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log, "text": True}
        process = subprocess.Popen(command, env=hub.environment(None, home, **env), cwd=hub.folder, **pipes)
        with process:
            yield Client(process, token)
            process.stdin.close()
            process.wait(30)


def in_one(*words) -> str:
    """`mmft-hf …` in this process, which is offline; its output."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        assert main([str(word) for word in words]) == 0, said.getvalue()
    return said.getvalue()


def printed_command(text: str) -> list[str]:
    """The words after `mmft-hf` of the command that a message names."""
    (command,) = re.findall(r"type: (mmft-hf .*)", text)
    return shlex.split(command)[1:]


def content(folder: Path) -> dict[str, str]:
    """sha256 of every file of a folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


def pictures(folder: Path, per_class: int = 4, seed: int = 0) -> Path:
    """A folder with one subfolder per colour."""
    for i, (image, label) in enumerate(colour_images(per_class, seed)):
        path = folder / list(COLOURS)[label] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    return folder


def training(*more) -> list[str]:
    """Settings of a training that takes a second."""
    words = [
        "--num_train_epochs",
        1,
        "--per_device_train_batch_size",
        4,
        "--learning_rate",
        "1e-3",
        "--use_cpu",
        "true",
    ]
    return [str(word) for word in (*words, "--disable_tqdm", "true", *more)]
