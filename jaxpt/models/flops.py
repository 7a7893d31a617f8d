"""How many floating-point operations a forward pass takes, by formula."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from jaxpt.weights.base import Product

if TYPE_CHECKING:
    from jaxpt.models.base import ModelConfig
    from jaxpt.models.transformer import Transformer


def forward(
    config: Transformer,
    products: Mapping[str, Product],
    vocab_size: int,
    batch: int,
    length: int,
    target_length: int | None,
) -> float:
    """Operations of one forward pass over ``batch`` rows, logits of every target included.

    A matrix product [m, k] x [k, n] counts 2 m k n. Counted are

    - every weight's product, by the weight's own count, for each token that goes through it;
    - the output projection;
    - attention's two products, 4 T S N H a layer and row, over the full T x S rectangle: neither
      the causal half nor windows are taken off, since plain XLA computes all of it.

    Not counted: softmax, norms, activations, biases, the embedding's look-up.
    """
    both = config.kind == "encoder_decoder"
    targets = (target_length or 0) if both else length
    total = 0.0
    for path, product in products.items():
        count = product.weight.flops(product.d_in, product.d_out) * product.stack
        total += float(batch * _tokens(config, path, length, target_length) * count)
    if config.tied:
        total += 2.0 * batch * targets * config.width_of_output * config.padded_vocab(vocab_size)
    scores = 4.0 * batch * config.attention.heads * config.head_dim
    encoder, decoder = config.depth_of_encoder, config.depth_of_decoder
    total += scores * encoder * length**2
    total += scores * decoder * targets**2
    if both:
        total += scores * decoder * targets * length
    return total


def frozen(
    config: ModelConfig,
    products: Mapping[str, Product],
    batch: int,
    length: int,
    target_length: int | None,
) -> float:
    """Those operations of ``forward`` that multiply by matrices without gradients."""
    total = 0.0
    for path, product in products.items():
        count = product.weight.frozen_flops(product.d_in, product.d_out) * product.stack
        total += float(batch * _tokens(config, path, length, target_length) * count)
    return total


def _tokens(config: ModelConfig, path: str, length: int, target_length: int | None) -> int:
    """How many tokens of a row go through the product at this path."""
    both = config.kind == "encoder_decoder"
    from_encoder = path.startswith("encoder/") and both
    to_cross = "/cross_attention/key" in path or "/cross_attention/value" in path
    return length if from_encoder or to_cross or not both else target_length or 0
