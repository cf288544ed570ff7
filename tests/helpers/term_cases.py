"""Every loss term on the same rows, in one process or several."""

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
            image_extras={
                "untuned_image_embeds": self.inputs[rows, :4].cos(),
                "gram_patches": (self.inputs[rows] @ p["image"]).square().mean(dim=1),
            },
            parameters={term.name: own},
        )
        found = term(batch)
        every = p | {f"own {name}": value for name, value in own.items()}
        gradients = torch.autograd.grad(found["loss"], list(every.values()), allow_unused=True)
        return found, {name: g for name, g in zip(every, gradients, strict=True) if g is not None}


def every_term(sizes: list[int], rank: int | None = None) -> dict[str, tuple[dict, dict[str, torch.Tensor]]]:
    """What every term returns, and its gradients: of all rows, or of the shard of a process, averaged as DDP does."""
    rows, found = Rows(sum(sizes)), {}
    part = slice(0, sum(sizes)) if rank is None else slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    for name in TERMS:
        values, gradients = rows.step(term_of(name, 4), part)
        if rank is not None:
            for gradient in gradients.values():
                dist.all_reduce(gradient)
                gradient /= len(sizes)
        found[name] = values, gradients
    return found


def differences(found: dict, expected: dict) -> dict[str, dict[str, float]]:
    """How far the values and gradients of every term are apart, and the largest gradient."""
    result = {}
    for name, (values, gradients) in found.items():
        values_of_one, of_one = expected[name]
        assert gradients.keys() == of_one.keys() and values.keys() == values_of_one.keys()
        result[name] = {
            "values": max(abs((values[key] - values_of_one[key]).item()) for key in values),
            "gradients": max((gradients[key] - of_one[key]).abs().max().item() for key in of_one),
            "largest": max(g.abs().max().item() for g in of_one.values()),
        }
    return result
