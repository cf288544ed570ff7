"""The roles of steps: which model answers their questions, at what price, and under which keys its answers are stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...core.errors import UserError
from ..steps.asking import Ask, forced
from ..steps.base import Step
from ..types import FEATURES, Backend
from .captioner import BACKENDS, EXAMPLES, Captioner, named_as
from .cost import CostMeter, price_of
from .pictures import PicturePolicy, sha256
from .plan import canonical

KEY_VERSION = 1


@dataclass
class Role:
    """Who answers the questions of a role.

    Args:
        name: one of `asking.ROLES`.
        captioner: the model and how it is asked. Roles with equal ones share a backend.
        meter: prices what it answers, and counts towards the limit of all roles.
    """

    name: str
    captioner: Captioner
    backend: Backend
    meter: CostMeter

    def __post_init__(self):
        with named_as(self.name):
            self.identity = {**self.backend.identity(), "tag": self.captioner.tag}
        self._same = {"version": KEY_VERSION, "identity": self.identity, "sampling": self.captioner.sampling.spec()}

    def check_key(self) -> None:
        """Raises `UserError` if a key is needed and its environment variable is not set."""
        with named_as(self.name):
            self.backend.check_key()

    @property
    def pictures(self) -> PicturePolicy:
        return self.captioner.pictures

    @property
    def max_tokens(self) -> int:
        return self.captioner.sampling.max_tokens

    def key(self, ask: Ask, prompt: str, reask: int) -> str:
        """sha256 in hex of everything that determines the answer: not the step, the row, the dataset or the address.

        Args:
            prompt: the whole text of this try.
        """
        shown = [[view.image_sha256, view.what, self.pictures.spec()] for view in ask.pictures]
        same = {**self._same, "pictures": shown, "prompt": prompt, "sample": ask.sample, "reask": reask}
        text = forced(ask)
        return sha256(canonical(same if text is None else same | {"forced": text}).encode())


def open_roles(
    captioners: Mapping[str, Captioner], concurrency: int, prices: str | None, spent: float, limit: float | None
) -> dict[str, Role]:
    """The roles by name, which share one limit of dollars.

    Raises:
        UserError: a limit for a model of unknown price; an address, key or model that cannot be used.
    """
    roles: dict[str, Role] = {}
    whole = CostMeter(None, spent, limit)
    for name, captioner in captioners.items():
        same = next((role for role in roles.values() if role.captioner == captioner), None)
        if same is not None:
            roles[name] = Role(name, captioner, same.backend, same.meter)
            continue
        local = captioner.backend == "transformers"
        price = None if local else price_of(captioner.model, prices)
        if limit is not None and price is None and not local:
            raise UserError(
                f"--max_cost_usd: expected models whose prices are known, found {captioner.model!r} as {name}, which is not in the price "
                "table. Type --prices FILE.yaml with its price, or leave --max_cost_usd out."
            )
        with named_as(name):
            backend = captioner.open(concurrency)
        roles[name] = Role(name, captioner, backend, whole.beside(price))
    return roles


def check_roles(steps: Sequence[Step], captioners: Mapping[str, Captioner]) -> None:
    """Raises `UserError` if a step asks a role that nobody has."""
    for number, step in enumerate(steps, 1):
        for role in step.roles():
            if role in captioners:
                continue
            prefix = "captioner_model" if role == "captioner" else f"{role}_model"
            url = "base_url" if role == "captioner" else f"{role}_base_url"
            raise UserError(
                f"--{role}: expected the model that answers the questions of step {number} {step.title}, found none. For example, type "
                f"--{role} openai --{prefix} NAME --{url} http://localhost:8000/v1, or --{role} transformers --{prefix} "
                f"{EXAMPLES['transformers']}."
            )


def check_samples(steps: Sequence[Step], captioners: Mapping[str, Captioner]) -> None:
    """Raises `UserError` for votes of a model that answers the same question in the same way each time."""
    for number, step in enumerate(steps, 1):
        for role in step.roles() if step.samples() > 1 else ():
            if captioners[role].sampling.temperature == 0:
                flag = "--temperature" if role == "captioner" else f"--{role}_temperature"
                raise UserError(
                    f"{flag}: expected more than 0 for step {number} {step.title}, which asks the same question {step.samples()} times, "
                    f"found 0. Type {flag} 0.7, or let the step ask once."
                )


def check_features(steps: Sequence[Step], roles: Mapping[str, Role]) -> None:
    """Raises `UserError` if a step needs what the backend of its role cannot do."""
    for number, step in enumerate(steps, 1):
        for role, needed in step.needs().items():
            for feature in needed:
                if feature in roles[role].backend.features:
                    continue
                able = [name for name in BACKENDS if feature in features_of(name)]
                raise UserError(
                    f"--{role} {roles[role].captioner.backend}: step {number} {step.title} expected a backend with {FEATURES[feature]}, "
                    f"which this one does not have. Type {' or '.join(f'--{role} {name}' for name in able)}."
                )


def features_of(backend: str) -> frozenset[str]:
    """What a kind of backend can do. Loads torch for `transformers`."""
    if backend == "transformers":
        from .backends.transformers import TransformersBackend

        return TransformersBackend.features
    from .backends.base import HTTPBackend

    return HTTPBackend.features


def role_summary(role: Role) -> dict[str, Any]:
    """Entry of `captions.json`: who it is, without address and key."""
    return {**role.identity, "sampling": role.backend.sampling_fields()}
