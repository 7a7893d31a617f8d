"""Replaced-token detection (ELECTRA): a generator fills masks, a discriminator finds what it wrote.

Clark et al. 2020, "ELECTRA: Pre-training Text Encoders as Discriminators Rather Than Generators",
section 2.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxpt.errors import ConfigError
from jaxpt.mesh import active_layout, constrain
from jaxpt.objectives.base import Batch, Loss
from jaxpt.objectives.loss import Known, token_loss
from jaxpt.objectives.masked import MaskedLM
from kernels.cross_entropy import pick_chunk

PER_ROW = "masked_per_token"  # field of a batch: see ``ReplacedTokens.whole``
PARTS = 16  # a row's chosen tokens are drawn so many parts of its length at a time, or fewer


@dataclasses.dataclass(frozen=True)
class ReplacedTokens(MaskedLM):
    """The loss of section 2, L = L_MLM + weight L_Disc, for a model of two networks (``Electra``).

    The host half is masked LM's: 15% of the tokens are chosen, and hidden by the mask id. (The
    authors' code leaves 15% of the chosen as they are: ``mask=0.85``.) The generator predicts
    them: L_MLM is its mean cross-entropy over the chosen tokens. One token of its softmax is drawn
    for each, without gradient, and put in the place of the original; the discriminator reads that
    text and tells, for every token, whether it was replaced: L_Disc is the mean binary
    cross-entropy over all tokens. A token that was drawn and equals the original counts as
    original.

    Both are means over the global batch, however it is cut into micro-batches. Draws depend on
    the step's key; when evaluating they are the same every time.

    Metrics: "cross_entropy" and "accuracy" are the generator's, on the chosen tokens (what
    validation shows, beside the unigram entropy of the same tokens); "discriminator_loss",
    "discriminator_accuracy" are over all tokens; "replaced_precision" and "replaced_recall" are
    of "replaced" where the logit is positive; "replaced" is the share of the tokens that were.
    """

    mask: float = 1.0  # share of the chosen tokens that become the mask id
    random: float = 0.0  # share of those that become a random token
    weight: float = 50.0  # of the discriminator's loss (lambda)

    def __post_init__(self):
        super().__post_init__()
        if not self.weight >= 0:
            raise ConfigError("weight", f"{self.weight} is not valid; give a weight >= 0")

    @property
    def tasks(self) -> tuple[str, ...]:
        return ("replaced",)

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("tokens", "replaced")

    @property
    def validated(self) -> tuple[str, ...]:
        return (
            "discriminator_loss",
            "discriminator_accuracy",
            "replaced_precision",
            "replaced_recall",
        )

    def whole(self, batch: Batch) -> Batch:
        """Adds the chosen tokens per token of the global batch, float32 [B]: with it the sum of
        both means is a sum over tokens, divided by the number of the chosen."""
        rows = batch["tokens"].shape[0]
        return {**batch, PER_ROW: jnp.broadcast_to(_masked_per_token(batch), (rows,))}

    def loss(self, model: Any, batch: Batch, key: jax.Array | None) -> Loss:
        """``model.generator`` and ``model.discriminator``: see ``jaxpt/models/electra.py``."""
        keys = (None, None, jax.random.key(0)) if key is None else jax.random.split(key, 3)
        share = batch[PER_ROW][0] if PER_ROW in batch else _masked_per_token(batch)
        states_BTD = model.generator(batch, key=keys[0])
        masked = token_loss(
            Known(model.generator, states_BTD),
            batch,
            None,
            z_loss=self.z_loss,
            label_smoothing=self.label_smoothing,
        )
        original_BT = batch["targets"]
        chosen_BT = batch["weights"] > 0
        drawn_BT = draw(model.generator, states_BTD, chosen_BT, keys[2])
        read_BT = jnp.where(chosen_BT, drawn_BT, original_BT)
        x_BTD = model.discriminator({**batch, "tokens": read_BT}, key=keys[1])
        total, metrics = detection(
            model.discriminator.replaced(x_BTD), read_BT != original_BT, _real(batch)
        )
        entropy = masked.metrics.get("cross_entropy", (masked.total, masked.count))
        metrics = masked.metrics | {"cross_entropy": entropy} | metrics
        return Loss(
            masked.total + self.weight * share * total, masked.count, metrics, masked.tokens
        )


def _real(batch: Batch) -> jax.Array:
    """bool [B, T]: where there is a token."""
    segments = batch.get("segments")
    return jnp.ones(batch["tokens"].shape, bool) if segments is None else segments != 0


def _masked_per_token(batch: Batch) -> jax.Array:
    tokens = jnp.sum(_real(batch), dtype=jnp.float32)
    return jnp.sum(batch["weights"], dtype=jnp.float32) / jnp.maximum(tokens, 1)


def detection(
    logits_BT: jax.Array, replaced_BT: jax.Array, real_BT: jax.Array
) -> tuple[jax.Array, dict[str, tuple[jax.Array, jax.Array]]]:
    """Binary cross-entropy of "replaced" at real tokens, summed, in float32.

    Args:
      logits_BT: float32, of "replaced".
      replaced_BT, real_BT: bool.

    Returns:
      (sum, metrics: the discriminator's of ``ReplacedTokens``).
    """
    logits_BT, real_BT = logits_BT.astype(jnp.float32), real_BT.astype(jnp.float32)
    truth_BT = replaced_BT.astype(jnp.float32) * real_BT
    total = jnp.sum(real_BT * (jnp.logaddexp(0.0, logits_BT) - truth_BT * logits_BT))
    said_BT = (logits_BT > 0).astype(jnp.float32) * real_BT
    count, found = real_BT.sum(), jnp.sum(said_BT * truth_BT)
    right = jnp.sum(real_BT * (said_BT == truth_BT))
    return total, {
        "discriminator_loss": (total, count),
        "discriminator_accuracy": (right, count),
        "replaced_precision": (found, said_BT.sum()),
        "replaced_recall": (found, truth_BT.sum()),
        "replaced": (truth_BT.sum(), count),
    }


def draw(network: Any, states_BTD: jax.Array, chosen_BT: jax.Array, key: jax.Array) -> jax.Array:
    """A token of the network's softmax at each chosen position, int32 [B, T]; 0 elsewhere.

    By the Gumbel-max trick (Gumbel 1954): argmax of logits plus Gumbel noise. No gradient. Only
    chosen positions are computed, a part of the row at a time, so that [B, T, V] never exists.

    Args:
      network: has ``head()``, ``softcap``, ``logit_scale`` and ``vocab_size``, as for
        ``token_loss``.
    """
    states_BTD, (w_DV, bias_V) = jax.lax.stop_gradient((states_BTD, network.head()))
    layout, (B, T) = active_layout(), chosen_BT.shape
    shards, platform = 1, None
    if layout is not None:
        shards = layout.ways("batch") * layout.ways("vocab")
        platform = layout.mesh.devices.flat[0].platform
        w_DV = constrain(w_DV, None, "vocab", name="output matrix")
    fitting = pick_chunk(B, T, w_DV.shape[1], shards=shards, platform=platform)
    C = min(fitting, -(-T // PARTS))
    order_BT = jnp.argsort(~chosen_BT, axis=1, stable=True)  # the chosen of each row first
    order_BT = jnp.pad(order_BT, ((0, 0), (0, -T % C)))

    def part(i, drawn_BT):
        at_BC = jax.lax.dynamic_slice_in_dim(order_BT, i * C, C, axis=1)
        x_BCD = jnp.take_along_axis(states_BTD, at_BC[..., None], axis=1)
        logits_BCV = jnp.dot(x_BCD, w_DV.astype(x_BCD.dtype), preferred_element_type=jnp.float32)
        logits_BCV = logits_BCV * network.logit_scale + (0.0 if bias_V is None else bias_V)
        if network.softcap is not None:
            logits_BCV = network.softcap * jnp.tanh(logits_BCV / network.softcap)
        noise_BCV = jax.random.gumbel(jax.random.fold_in(key, i), logits_BCV.shape)
        is_id_V = jnp.arange(logits_BCV.shape[-1]) < network.vocab_size
        drawn_BC = jnp.argmax(jnp.where(is_id_V, logits_BCV + noise_BCV, -jnp.inf), axis=-1)
        return jax.lax.dynamic_update_slice_in_dim(
            drawn_BT, drawn_BC.astype(jnp.int32), i * C, axis=1
        )

    parts = -(-jnp.max(jnp.sum(chosen_BT, axis=1)) // C)
    drawn_BT = jax.lax.fori_loop(0, parts, part, jnp.zeros(order_BT.shape, jnp.int32))
    place_BT = jnp.argsort(order_BT[:, :T], axis=1)
    return jnp.where(chosen_BT, jnp.take_along_axis(drawn_BT, place_BT, axis=1), 0)
