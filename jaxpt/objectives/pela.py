"""PELA (Guo et al. 2024, "PELA: Learning Parameter-Efficient Models with Low-Rank Approximation"):
a factorised model learns from the one that it was made of."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxpt.data.vocabulary import Vocabulary
from jaxpt.errors import ConfigError
from jaxpt.objectives.base import Batch, Features, Loss, Objective, Wrapper
from jaxpt.objectives.loss import Known


@dataclasses.dataclass(frozen=True)
class PELA(Wrapper):
    """The loss of ``objective`` for the student of a ``Distilled`` model, and beside it

        features      (h' - h)^2, h' and h the outputs of a layer of the student and the teacher:
                      the mean over layers, width and a row's tokens, and over rows, which count
                      by their targets (so the loss does not depend on how the batch is cut)
        logits        KL(teacher || student) of the distributions over the vocabulary, per target
        perturbation  ||W' - W||_F^2 / ||W||_F^2, W' a matrix of the student that is not held dense
                      and W the teacher's: the mean over these (the paper has the distance of the
                      recovered weight from the original one; that it is relative is ours)

    each times its weight. The student begins as truncated singular value decompositions of the
    teacher's matrices: ``begin=(Convert(),)`` with ``LowRank(rank=SHARE)`` for a target ratio.

    Metrics: "cross_entropy" is that of the targets, and each term that is used has its own name.
    """

    _: dataclasses.KW_ONLY
    features: float = 1.0  # weight of the distance between the layers' outputs
    logits: float = 0.0  # weight of the divergence between the distributions over the vocabulary
    perturbation: float = 1.0  # weight of the relative distance between the matrices

    def __post_init__(self):
        for name in ("features", "logits", "perturbation"):
            value = getattr(self, name)
            if not value >= 0:
                raise ConfigError(name, f"{value} is not valid; give a weight >= 0")
        if self.objective.outputs != ("tokens",):
            name = type(self.objective).__name__
            raise ConfigError("objective", f"{name} trains a model of its own; give one of tokens")

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("tokens", "teacher")

    @property
    def on_host(self) -> Objective:
        return dataclasses.replace(self, objective=self.objective.on_host)

    @property
    def validated(self) -> tuple[str, ...]:
        used = (name for name in ("features", "logits", "perturbation") if getattr(self, name))
        return (*self.objective.validated, *used)

    def only(self, task: int) -> Objective:
        return dataclasses.replace(self, objective=self.objective.only(task))

    def build(self, vocabulary: Vocabulary, *, length: int, target_length: int | None) -> Features:
        return self.objective.build(vocabulary, length=length, target_length=target_length)

    def loss(self, model: Any, batch: Batch, key: jax.Array | None) -> Loss:
        """``model.student`` and ``model.teacher``: see ``jaxpt/models/distilled.py``."""
        (states_BTD, mine), (targets_BTD, taught) = model.both(batch, key)
        found = self.objective.loss(Known(model.student, states_BTD), batch, key)
        count, total, metrics = found.count, found.total, dict(found.metrics)
        metrics.setdefault("cross_entropy", (total, count))
        terms = {}
        if self.features:
            terms["features"] = _features(mine, taught, batch)
        if self.logits:
            weights_BT = batch["weights"].astype(jnp.float32)
            terms["logits"] = _divergence(model, states_BTD, targets_BTD, weights_BT)
        if self.perturbation:
            terms["perturbation"] = count * model.perturbation()
        for name, term in terms.items():
            metrics[name] = (term, count)
            total = total + getattr(self, name) * term
        return dataclasses.replace(found, total=total, metrics=metrics)


def _features(mine: list[jax.Array], taught: list[jax.Array], batch: Batch) -> jax.Array:
    """Summed over rows, each times its targets: the mean over all stacks' layers and tokens of the
    squared distance between outputs [L, B, T, D], per number."""
    if [x.shape for x in mine] != [x.shape for x in taught]:
        raise ConfigError(
            "features", "the teacher's layers are not the student's in number and width; give 0"
        )
    rows_B = batch["weights"].astype(jnp.float32).sum(1)
    names = ("input_segments", "segments") if len(mine) > 1 else ("segments",)
    squares_B = jnp.zeros_like(rows_B)
    layers = sum(len(x) for x in mine)
    for x_LBTD, y_LBTD, name in zip(mine, taught, names, strict=True):
        real_BT = (batch[name] != 0).astype(jnp.float32) if name in batch else None
        gap = x_LBTD.astype(jnp.float32) - y_LBTD.astype(jnp.float32)
        squares_BT = jnp.mean(jnp.square(gap), -1).sum(0)
        if real_BT is None:
            real_BT = jnp.ones_like(squares_BT)
        tokens_B = jnp.maximum(real_BT.sum(1), 1.0)
        squares_B += jnp.sum(real_BT * squares_BT, 1) / tokens_B / layers
    return jnp.sum(rows_B * squares_B)


def _divergence(model: Any, states_BTD, targets_BTD, weights_BT) -> jax.Array:
    """KL(teacher || student), summed over targets; the logits of one position at a time."""

    @jax.checkpoint
    def at(position):
        states_BD, targets_BD, weights_B = position
        mine = jax.nn.log_softmax(model.student.logits(states_BD))
        taught = jax.nn.log_softmax(model.teacher.logits(targets_BD))
        return jnp.sum(weights_B * jnp.sum(jnp.exp(taught) * (taught - mine), -1))

    by_position = jax.tree.map(
        lambda x: jnp.moveaxis(x, 1, 0), (states_BTD, targets_BTD, weights_BT)
    )
    return jax.lax.map(at, by_position).sum()
