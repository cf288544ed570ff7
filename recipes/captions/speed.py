"""Measures the captioning driver against a local server that answers after 200 ms: captions per second, CPU time, memory.

    python recipes/captions/speed.py --images 20000 --noop 100000
    python recipes/captions/speed.py --images 2000 --questions 3 --noop 0    # the questions of refining steps

The server runs in its own process and does not look at the pictures. The script prints the captions per second with
64 requests in flight, as a share of the 320 that 200 ms allow; the CPU time per caption, split into the picture (read,
hash, decode) and the driver (HTTP client, sending, checks, journal); and the time of a second run with nothing to do.
Memory is the peak of the anonymous memory of the process, without the pages of the dataset that the system caches.
"""

import argparse
import asyncio
import hashlib
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

# Python looks for modules in this folder first; processes that are spawned inherit the path.
sys.path[:] = [path for path in sys.path if path != os.path.dirname(os.path.abspath(__file__))]

import numpy as np
from aiohttp import web
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as Picture
from PIL import Image

from mmft_hf.captioning import Captioner
from mmft_hf.captioning.ask import driver
from mmft_hf.captioning.ask.journal import Journal
from mmft_hf.captioning.ask.limits import Limits
from mmft_hf.captioning.ask.plan import Keys
from mmft_hf.captioning.ask.roles import open_roles
from mmft_hf.captioning.asker import Asker, PicturesOfDataset
from mmft_hf.captioning.caption_table import CaptionTable
from mmft_hf.captioning.split import SplitCaptioner, make_checker
from mmft_hf.captioning.steps.asking import Ask
from mmft_hf.captioning.steps.base import Step
from mmft_hf.data.texts import PromptSet

LATENCY_S, IN_FLIGHT = 0.2, 64
ANSWER = json.dumps(
    {
        "model": "speed",
        "choices": [
            {"message": {"content": "a small thing with a round body and two thin dark lines"}, "finish_reason": "stop"}
        ],
        "usage": {"prompt_tokens": 300, "completion_tokens": 12},
    }
).encode()


def serve(pipe) -> None:
    """Answers every request `LATENCY_S` after it has arrived completely."""

    async def answer(request: web.Request) -> web.Response:
        async for _ in request.content.iter_any():
            pass
        await asyncio.sleep(LATENCY_S)
        return web.Response(body=ANSWER, content_type="application/json")

    async def main() -> None:
        app = web.Application(client_max_size=2**24)
        app.router.add_post("/v1/chat/completions", answer)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, backlog=512)
        await site.start()
        pipe.send(site._server.sockets[0].getsockname()[1])
        await asyncio.Event().wait()

    asyncio.run(main())


def make_images(folder: Path, count: int, size: int) -> None:
    """Writes distinct JPEG files of about `size` bytes: one photo-like picture, with a different trailer in each file."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8)).resize(
        (512, 384), Image.Resampling.BICUBIC
    )
    noise = rng.normal(0, 14, (384, 512, 3))
    picture = Image.fromarray(np.clip(np.asarray(coarse) + noise, 0, 255).astype(np.uint8))
    path = folder / "base.jpg"
    for quality in range(40, 100):
        picture.save(path, quality=quality)
        if path.stat().st_size >= size:
            break
    data = path.read_bytes()
    path.unlink()
    for i in range(count):
        (folder / f"{i:06d}.jpg").write_bytes(data + hashlib.sha256(str(i).encode()).digest())
    print(f"{count:,} JPEGs of {len(data) / 1000:.0f} kB, {picture.width} x {picture.height}")


def dataset_of(folder: Path) -> Dataset:
    files = sorted(str(path) for path in folder.glob("*.jpg"))
    rows = {"image": [{"bytes": None, "path": file} for file in files], "label": [i % 10 for i in range(len(files))]}
    features = Features(
        {
            "image": {"bytes": Value("binary"), "path": Value("string")},
            "label": ClassLabel(names=[f"class {c}" for c in range(10)]),
        }
    )
    return Dataset.from_dict(rows, features=features)


class Timed:
    """Wraps a function and sums the CPU time of its calls in all threads."""

    def __init__(self, function):
        self.function, self.seconds = function, 0.0

    def __call__(self, *args):
        started = time.thread_time()
        try:
            return self.function(*args)
        finally:
            self.seconds += time.thread_time() - started


class Memory(threading.Thread):
    """Tracks the peak of the anonymous memory of this process, ten times a second."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak = 0
        self.start()

    def run(self) -> None:
        while True:
            with open("/proc/self/status") as file:
                now = next(int(line.split()[1]) for line in file if line.startswith("RssAnon"))
            self.peak = max(self.peak, now)
            time.sleep(0.1)


def cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000, help="Number of pictures, one caption each.")
    parser.add_argument("--bytes", type=int, default=100_000, help="Size of a picture in bytes.")
    parser.add_argument(
        "--noop", type=int, default=100_000, help="Number of journaled requests in the run with nothing to do."
    )
    parser.add_argument(
        "--questions",
        type=int,
        default=0,
        help="Questions about each picture, instead of captions; half as many follow.",
    )
    args = parser.parse_args()

    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    server = context.Process(target=serve, args=(theirs,), daemon=True)
    server.start()
    url = f"http://127.0.0.1:{pipe.recv()}/v1"
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "images").mkdir()
        make_images(work / "images", args.images, args.bytes)
        data = dataset_of(work / "images")
        captioner = Captioner("openai", "speed", PromptSet(("visual",)), base_url=url)
        if args.questions:
            ask_questions(work, data, captioner, args.questions)
            server.terminate()
            return
        checker = make_checker(captioner, data.features["label"].names)
        limits = Limits(concurrency=IN_FLIGHT)
        before, memory = anonymous_mb(), Memory()
        timed = Timed(driver.Driver._picture)
        driver.Driver._picture = lambda made, item: timed(made, item)
        with SplitCaptioner(captioner, data, work / "run", checker, limits, progress=False) as run:
            plan = run.plan()
            cpu = cpu_s()
            outcome = run.fill(plan)
            cpu = cpu_s() - cpu
        assert outcome.results["ok"] == args.images, outcome
        possible = IN_FLIGHT / LATENCY_S
        rate = args.images / outcome.seconds
        per_picture = timed.seconds / args.images
        print(f"captions/s             {rate:.1f} of {possible:.0f} possible: {rate / possible:.1%}")
        print(
            f"CPU per caption        {1000 * cpu / args.images:.2f} ms, {1000 * per_picture:.2f} ms of it for the picture"
        )
        print(f"driver per caption     {1000 * (cpu / args.images - per_picture):.2f} ms")
        print(f"peak memory            {memory.peak / 1024:.0f} MB, {before:.0f} MB of it before the first picture")
        server.terminate()
        if args.noop:
            nothing_to_do(work, args.noop)


@dataclass(frozen=True)
class Questions(Step):
    """Asks about each picture, then about half of the answers."""

    count: int = 1
    name: ClassVar[str] = "questions"
    about: ClassVar[str] = "asks"

    def roles(self):
        return ("judge",)

    def ask(self, row, fitted):
        answers = yield [
            Ask("judge", f"Question {k} about {row.image_sha256}.", row.picture()) for k in range(self.count)
        ]
        again = yield [Ask("judge", f"And {k}: {answers[k]}", row.picture()) for k in range((self.count + 1) // 2)]
        return len(answers) + len(again)

    def apply(self, rows, scorer, found=()):
        return [row.records for row in rows]


def ask_questions(work: Path, data: Dataset, captioner: Captioner, count: int) -> None:
    """Times the questions of a step, and a second run which finds all of them in the journal."""
    table = CaptionTable("data", data.cast_column("image", Picture()).add_column("captions", [["a text"]] * len(data)))
    pictures = PicturesOfDataset(table.part.images, table.part.hashes)
    checker = make_checker(captioner, data.features["label"].names)
    step, calls = Questions(count), len(data) * (count + (count + 1) // 2)
    before, memory = anonymous_mb(), Memory()
    for _ in range(2):
        roles = open_roles({"judge": captioner}, IN_FLIGHT, None, 0.0, None)
        with Asker(roles, pictures, work / "run", checker, Limits(IN_FLIGHT), "speed", progress=False) as asker:
            cpu, started = cpu_s(), time.monotonic()
            asked = asker(step, table.rows, None)
            cpu, seconds = cpu_s() - cpu, time.monotonic() - started
        assert asked.figures["answered"] == calls and sum(asked.found) == calls, asked.figures
        if asker.outcome.calls:
            possible = IN_FLIGHT / LATENCY_S
            print(
                f"questions/s            {calls / seconds:.1f} of {possible:.0f} possible: {calls / seconds / possible:.1%}"
            )
            print(f"CPU per question       {1000 * cpu / calls:.2f} ms, the picture included")
        else:
            print(f"nothing to ask         {seconds:.1f} s for {calls:,} questions")
    print(f"peak memory            {memory.peak / 1024:.0f} MB, {before:.0f} MB of it before the first question")


def anonymous_mb() -> float:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) / 1024


def nothing_to_do(work: Path, requests: int) -> None:
    """Times a run over a journal that has everything: plan, results, and no call."""
    images = -(-requests // 3)
    folder = work / "many"
    folder.mkdir()
    picture = next((work / "images").glob("*.jpg")).read_bytes()
    for i in range(images):
        (folder / f"{i:06d}.jpg").write_bytes(picture + hashlib.sha256(f"many {i}".encode()).digest())
    data = dataset_of(folder)
    captioner = Captioner(
        "openai", "speed", PromptSet(("visual", "shape", "texture")), base_url="http://127.0.0.1:1/v1"
    )
    checker = make_checker(captioner, data.features["label"].names)
    run = SplitCaptioner(captioner, data, work / "noop", checker, progress=False)
    keys: Keys = run.keys
    with Journal(work / "noop" / "journal") as journal:
        for i in range(images):
            digest = hashlib.sha256((folder / f"{i:06d}.jpg").read_bytes()).hexdigest()
            row = {
                "status": "ok",
                "raw_text": f"a thing number {i}",
                "text": f"a thing number {i}",
                "checks": "[]",
                "reask": 0,
            }
            slots = keys.slots(digest, f"class {i % 10}")
            journal.put(
                [
                    row | {"key": s.key, "slot": s.key, "image_sha256": digest, "aspect": s.aspect, "sample": 0}
                    for s in slots
                ]
            )
    started = time.monotonic()
    with run:
        plan = run.plan()
        outcome = run.fill(plan)
        results = run.results(plan)
        run.fingerprint(results)
    seconds = time.monotonic() - started
    assert not plan.items and not outcome.calls and not results.open
    print(f"nothing to do          {seconds:.1f} s for {3 * images:,} journaled requests of {images:,} images")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
