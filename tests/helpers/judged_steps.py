"""Runs steps that ask, without a driver; images with planted names, and who knows which of them are true."""

from collections import Counter

import numpy as np

from mmft_hf.captioning.steps.asking import answered, rendered
from tests.helpers.scripted_responder import ScriptedResponder
from tests.helpers.step_rows import Vectors, row


def ran(step, rows, respond, scorer=None):
    """What `ask` found of each row, and the new records."""
    fitted = step.fit(rows, scorer)
    made, most = len(getattr(respond, "asked", ())), sum((step.bound(r, fitted) for r in rows), Counter())
    found = [answered(step.ask(r, fitted), respond) for r in rows]
    distinct = Counter(ask.role for ask in set(getattr(respond, "asked", ())[made:]))
    assert all(distinct[role] <= most[role] for role in distinct), (distinct, most)
    assert set(distinct) <= set(step.roles())
    assert not any(ask.class_name and ask.class_name in rendered(ask) for ask in getattr(respond, "asked", ()))
    once = step.apply(rows, scorer, found)
    assert once == step.apply(rows, scorer, found)
    return found, once


def texts(records, status="ok"):
    return [r["text"] for r in records if r["status"] == status]


KINDS = [[f"{kind}{k}" for k in range(40)] for kind in ("cat", "tree")]


def planted(number):
    """Captions of three true names and one that is not there, images of two classes, and the truth."""
    rng, rows, truth = np.random.default_rng(0), [], {}
    for i in range(number):
        own = rng.choice(KINDS[i % 2], 4, replace=False).tolist()
        false = int(rng.integers(4))
        rows.append(row(i, [", ".join(own)], label=i % 2))
        truth[rows[-1].image_sha256] = [name for k, name in enumerate(own) if k != false]
    return rows, truth


def responder(truth, error=0.0, seed=0):
    return ScriptedResponder(truth, error, seed, names=[name for kind in KINDS for name in kind])


def axes(rows, truth):
    """A scorer for which each name is an axis, and an image the mean of its true names."""
    vectors = dict(zip([name for kind in KINDS for name in kind], np.eye(80), strict=True))
    return Vectors([np.mean([vectors[name] for name in truth[r.image_sha256]], axis=0) for r in rows], vectors)
