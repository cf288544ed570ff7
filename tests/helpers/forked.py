"""Python code in processes that are forked from one that has imported what they need, which takes 10 ms in place of 4 to 8 s."""

import atexit
import functools
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

from processes import HANGS

CAPTIONING = ("mmft_hf.captioning.ask.backends.openai", "mmft_hf.commands.caption.actions")
TRAINING = ("mmft_hf.train.workflow",)


class Forked:
    """A running process."""

    def __init__(self, pid: int, output: Path):
        self.pid, self.output = pid, output

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def wait(self, seconds: float = HANGS) -> int:
        """The exit code, negative if a signal ended the process. One that hangs is killed, and the test fails."""
        code = _launcher().ask({"wait": self.pid, "seconds": seconds})
        assert code is not None, f"did not end within {seconds:g} s\n{self.text}"
        return code

    @property
    def text(self) -> str:
        return self.output.read_text()


class Launcher:
    def __init__(self):
        command = [sys.executable, __file__]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        atexit.register(self.close)

    def ask(self, message: dict) -> int | None:
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


@functools.cache
def _launcher() -> Launcher:
    return Launcher()


def fork(code: str, output: Path, modules=(), **environment) -> Forked:
    """Runs Python code. `modules`: what it imports; `environment`: additional variables."""
    environment = {key: str(value) for key, value in environment.items()}
    message = {"code": code, "modules": modules, "output": str(output), "environment": environment}
    return Forked(_launcher().ask(message), output)


def start(words, output: Path, before: str = "", **environment) -> Forked:
    """`mmft-hf WORDS`. `before`: code that runs first."""
    words = [str(word) for word in words]
    modules = TRAINING if words[0] == "finetune" else CAPTIONING
    code = f"{before}\nimport sys\nfrom mmft_hf.cli import main\nsys.exit(main({words!r}))"
    return fork(code, output, modules, **environment)


def _wait(pid: int, seconds: float) -> int | None:
    last = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > last:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return None
        time.sleep(0.002)


def _run(message: dict) -> int:
    """In the new process: its exit code."""
    import datasets

    os.setsid()
    handle = os.open(message["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0), os.dup2(handle, 1), os.dup2(handle, 2)
    os.environ.update(message["environment"])
    datasets.config.HF_DATASETS_CACHE = Path(os.environ["HF_DATASETS_CACHE"])
    try:
        exec(message["code"], {})
    except SystemExit as end:
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _serve() -> None:
    from mmft_hf.cli import quiet_libraries
    from mmft_hf.model.loading import load_tokenizer

    quiet_libraries()
    load_tokenizer("builtin/tiny-clip")
    running = set()
    for line in sys.stdin:
        message = json.loads(line)
        if "wait" in message:
            running.discard(message["wait"])
            print(json.dumps(_wait(message["wait"], message["seconds"])), flush=True)
            continue
        for module in message["modules"]:
            importlib.import_module(module)
        gc.freeze()  # as in conftest.py
        if pid := os.fork():
            running.add(pid)
            print(pid, flush=True)
            continue
        code = 1
        try:
            code = _run(message)
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    for pid in running:  # what a failed test did not wait for
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    _serve()
