"""Every loss term on the same rows, in one process or several: run by tests/train/test_terms.py.

As a script, under torchrun: `term_cases.py ROWS_OF_EACH_PROCESS` prints how far the loss and its gradient are from those of
one process, for every term.
"""

import json
import os
import sys

import torch
import torch.distributed as dist

from mmft_hf.predict.heads import LinearHead
from mmft_hf.train.terms import TERMS, Batch, LossTerm

ARGUMENTS = {"cross_entropy": lambda size: (LinearHead(torch.randn(3, size), ["a", "b", "c"], torch.zeros(3)),)}


def term_of(name: str, size: int) -> LossTerm:
    """The term of that name, for embeddings of `size` numbers and three classes."""
    torch.manual_seed(0)
    return TERMS[name](*ARGUMENTS.get(name, lambda size: ())(size))


class Rows:
    """Inputs of a small model with two towers and class texts, in float64."""

    def __init__(self, n: int):
        g = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(n, 6, generator=g, dtype=torch.float64)
        self.labels = torch.randint(0, 3, (n,), generator=g)
        self.labels[1] = -100
        self.class_inputs = torch.randn(3, 6, generator=g, dtype=torch.float64)
        shapes = {"image": (6, 4), "text": (6, 4), "scale": ()}
        self.parameters = {
            name: torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_()
            for name, shape in shapes.items()
        }

    def step(self, term: LossTerm, rows: slice) -> tuple[dict, dict[str, torch.Tensor]]:
        """What a term returns of the rows of this process, and the gradient of everything that has one."""
        p = self.parameters
        own = {name: value.detach().double().requires_grad_() for name, value in term.parameters.items()}
        batch = Batch.gathered(
            torch.nn.functional.normalize(self.inputs[rows] @ p["image"], dim=1),
            self.labels[rows],
            p["scale"].exp(),
            torch.nn.functional.normalize(self.inputs[rows].tanh() @ p["text"], dim=1),
            extras={"class_embeds": self.class_inputs @ p["text"]},
            parameters={term.name: own},
        )
        found = term(batch)
        every = p | {f"own {name}": value for name, value in own.items()}
        gradients = torch.autograd.grad(found["loss"], list(every.values()), allow_unused=True)
        return found, {name: g for name, g in zip(every, gradients, strict=True) if g is not None}


def main(sizes: list[int]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    assert world == len(sizes)
    rows, start = Rows(sum(sizes)), sum(sizes[:rank])
    found = {}
    for name in TERMS:
        values, gradients = rows.step(term_of(name, 4), slice(start, start + sizes[rank]))
        for gradient in gradients.values():  # what DDP does
            dist.all_reduce(gradient)
            gradient /= world
        found[name] = values, gradients
    dist.destroy_process_group()
    result = {}
    for name, (values, gradients) in found.items():
        expected, of_one = rows.step(term_of(name, 4), slice(0, sum(sizes)))
        assert gradients.keys() == of_one.keys() and values.keys() == expected.keys()
        result[name] = {
            "values": max(abs((values[key] - expected[key]).item()) for key in expected),
            "gradients": max((gradients[key] - of_one[key]).abs().max().item() for key in of_one),
            "largest": max(g.abs().max().item() for g in of_one.values()),
        }
    if rank == 0:
        print(json.dumps(result), flush=True)
    os._exit(0)  # without the end of the interpreter, in which threads of gloo may abort: see mmft_hf/core/launch.py


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
