"""The device half that all objectives over one stream of targets share."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxpt.errors import ConfigError
from jaxpt.gather import gathered
from jaxpt.mesh import active_layout
from jaxpt.objectives.base import Batch, Loss, Objective
from kernels.cross_entropy import cross_entropy, pick_chunk


@dataclasses.dataclass(frozen=True)
class TokenObjective(Objective):
    """An objective whose loss is the cross-entropy of ``targets``, weighted by ``weights``."""

    _: dataclasses.KW_ONLY
    z_loss: float = 0.0  # weight of log(sum(exp(logits)))^2 in the loss
    label_smoothing: float = 0.0  # target mass spread evenly over the vocabulary

    def __post_init__(self):
        if not self.z_loss >= 0:
            raise ConfigError("z_loss", f"{self.z_loss} is not valid; give a weight >= 0")
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError("label_smoothing", f"{self.label_smoothing} does not lie in [0, 1)")

    def only(self, task: int) -> Objective:
        if task != 0:
            raise IndexError(f"{type(self).__name__} has one component, not {task + 1}")
        return self

    def loss(self, model: Any, batch: Batch, key: jax.Array | None) -> Loss:
        return token_loss(
            model,
            batch,
            key,
            tasks=self.tasks,
            z_loss=self.z_loss,
            label_smoothing=self.label_smoothing,
        )


@dataclasses.dataclass
class Known:
    """A network whose states have been computed, as ``token_loss`` takes it."""

    network: Any
    states: jax.Array

    def __call__(self, batch: Batch, key: jax.Array | None = None) -> jax.Array:
        return self.states

    def __getattr__(self, name: str) -> Any:
        return getattr(self.network, name)


def token_loss(
    model: Any,
    batch: Batch,
    key: jax.Array | None,
    *,
    tasks: tuple[str, ...] = (),
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> Loss:
    """Weighted cross-entropy of a batch, summed over its targets, in float32.

    Args:
      model: ``model(batch, key=key)`` gives the decoder's states [B, T, D]; ``model.head()`` the
        projection ([D, V], and a bias [V] or None); ``model.softcap``, ``model.logit_scale``
        and ``model.vocab_size``, the number of columns of the projection that are ids.
      batch: targets [B, T], weights [B, T] (0 at padding) and, with several tasks, tasks [B, T].
      key: of dropout; None for none.
      tasks: names of the components; where there are several, "loss/NAME" is reported for each.
      z_loss: weight of the squared log-normaliser (PaLM, section 5; 1e-4 there).
      label_smoothing: mass taken from the target and spread evenly over the vocabulary.

    Returns:
      Loss whose metrics, each a (sum, count) over targets, are "accuracy" (share of the targets
      that no logit exceeds), "loss/NAME" in nats without z-loss and smoothing, and where these
      are used "cross_entropy" (the loss without them) and "z_loss" (its weighted share). Its
      ``tokens`` are in nats, without z-loss and smoothing.
    """
    hidden_BTD = model(batch, key=key)
    w_DV, bias_V = model.head()
    columns = {name: batch[name] for name in ("targets", "weights", "tasks") if name in batch}
    columns["weights"] = columns["weights"].astype(jnp.float32)
    hidden_BTD, columns, rows, shards, platform = _by_device(hidden_BTD, columns)
    if shards > 1:
        # Gathered over fsdp once, not in every chunk.
        w_DV = gathered(w_DV, ("embed", "vocab"), ("width", "vocab"))
    B, T = columns["targets"].shape
    weights_BT = columns["weights"]
    result = cross_entropy(
        hidden_BTD,
        w_DV,
        columns["targets"],
        weights_BT,
        bias=bias_V,
        z_loss=z_loss,
        label_smoothing=label_smoothing,
        softcap=model.softcap,
        logit_scale=model.logit_scale,
        vocabulary=model.vocab_size,
        chunk=pick_chunk(B, T, w_DV.shape[1], shards=shards, platform=platform),
        row_shards=rows,
    )
    count = weights_BT.sum()
    metrics = {"accuracy": (jnp.sum(weights_BT * result.correct_BT), count)}
    if z_loss or label_smoothing:
        metrics["cross_entropy"] = (jnp.sum(weights_BT * result.loss_BT), count)
    if z_loss:
        metrics["z_loss"] = (z_loss * jnp.sum(weights_BT * result.lse_BT**2), count)
    if len(tasks) > 1:
        for i, name in enumerate(tasks):
            share_BT = jnp.where(columns["tasks"] == i, weights_BT, 0.0)
            metrics[f"loss/{name}"] = (jnp.sum(share_BT * result.loss_BT), share_BT.sum())
    loss_BT = jax.lax.stop_gradient(result.loss_BT).reshape(batch["targets"].shape)
    return Loss(result.total, count, metrics, (loss_BT, batch["weights"].astype(jnp.float32)))


def _by_device(hidden_BTD, columns):
    """Positions that are cut over devices become rows, so that chunks hold some of each device's.

    Returns:
      (states, columns, devices over which the rows are now cut, devices over which the logits
      are, platform). Where the mesh does not divide the batch, XLA lays it out as it sees fit.
    """
    layout = active_layout()
    if layout is None:
        return hidden_BTD, columns, 1, 1, None
    B, T = columns["targets"].shape
    context = layout.ways("length") if T % layout.ways("length") == 0 else 1
    rows = layout.ways("batch") * context if B % layout.ways("batch") == 0 else 1
    hidden_BTD, columns = jax.tree.map(
        lambda a: a.reshape(B * context, T // context, *a.shape[2:]), (hidden_BTD, columns)
    )
    platform = layout.mesh.devices.flat[0].platform
    return hidden_BTD, columns, rows, rows * layout.ways("vocab"), platform
