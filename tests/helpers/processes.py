"""Processes that tests start. One that hangs is ended together with all that it started."""

import atexit
import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

HANGS = 600.0  # seconds; under load, what takes ten seconds may take minutes
_started: list[subprocess.Popen] = []


def start(command: list, cwd: Path | None = None, inherit: bool = True, **environment) -> subprocess.Popen:
    """`python COMMAND`, with these variables added to the environment, or with these alone."""
    command = [sys.executable, *map(str, command)]
    variables = (os.environ if inherit else {}) | {key: str(value) for key, value in environment.items()}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    _started.append(process := subprocess.Popen(command, cwd=cwd, env=variables, **pipes))
    return process


def end(process: subprocess.Popen, code: int = 0, seconds: float = HANGS) -> tuple[str, str]:
    """Its output and errors, after it ended with this exit code."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        kill(process)
        out, err = process.communicate()
        raise AssertionError(f"{process.args} did not end within {seconds:g} s\n{out}{err}") from None
    finally:
        kill(process)
    assert process.returncode == code, out + err
    return out, err


def run_python(command: list, code: int = 0, **more) -> tuple[str, str]:
    """Starts a process and waits for its end."""
    return end(start(command, **more), code)


def kill(process: subprocess.Popen) -> None:
    """Also what it started: torchrun gives each of its workers a session of its own, so no signal to a group reaches all."""
    if process.poll() is not None:
        return
    top = psutil.Process(process.pid)
    for member in [top, *top.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()


@atexit.register
def _kill_all() -> None:
    """What a failed test did not wait for."""
    for process in _started:
        kill(process)


def until(condition, seconds: float = HANGS, every: float = 0.005) -> None:
    """Waits until the condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(every)
