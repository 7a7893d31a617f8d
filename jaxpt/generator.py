"""A model that writes: prompts of any lengths in, continuations out.

Prompts are padded at the right to a bucket of lengths (a power of two), each row's tokens at
indices 0, 1, ... of its cache, so that a program compiles once for a bucket and a row's text does
not depend on what else is in the batch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpt.data.vocabulary import Vocabulary
from jaxpt.decoding import Decoded, beam_search, sample
from jaxpt.errors import ConfigError
from jaxpt.mesh import Layout
from jaxpt.models.cache import Cache
from jaxpt.models.model import Model, Network
from jaxpt.objectives.prompt import Prompt
from jaxpt.sampling import GREEDY, Sampling
from jaxpt.state import Params

SMALLEST_BUCKET = 16  # positions


@dataclasses.dataclass(frozen=True)
class Continuation:
    """What a model wrote after a prompt.

    tokens: int32 [n], without the eos.
    ended: whether it ended by eos; False where the limit cut it off.
    log_prob: of the tokens, and of the eos if it ended, in nats; temperature and cuts left out.
    score: log_prob, in beam search over the length penalty.
    """

    tokens: np.ndarray
    ended: bool
    log_prob: float
    score: float


class Generator:
    """Writes with a model and its parameters on a layout.

    >>> generator = Generator(model, params, tokenizer.vocabulary, layout)
    >>> generator.sample([Prompt(ids)], max_tokens=32)[0].tokens
    """

    def __init__(self, model: Model, params: Params, vocabulary: Vocabulary, layout: Layout):
        if "tokens" not in model.config.outputs:
            raise ConfigError(
                "model", f"{type(model.config).__name__} gives no tokens, so it cannot write"
            )
        self.model, self.params, self.layout = model, params, layout
        self.eos, self.pad = vocabulary.eos, vocabulary.pad
        # Whole on every device: each of several processes reads the result.
        jit = functools.partial(jax.jit, out_shardings=layout.sharding(()))
        self._sample = jit(self._sample_rows, static_argnames=("sampling", "length"))
        self._beams = jit(self._beam_rows, static_argnames=("beams", "returned", "alpha", "length"))
        self._predict = jit(self._predict_rows)

    def sample(
        self,
        prompts: Sequence[Prompt],
        *,
        max_tokens: int,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        numbers: Sequence[int] | None = None,
    ) -> list[Continuation]:
        """One continuation for each prompt.

        Args:
          prompts: at least one; their holes are not looked at.
          max_tokens: the most tokens of each continuation, its eos counted.
          sampling: how tokens are drawn; the default is greedy.
          seed: of the draws.
          numbers: a number for each prompt, which with the seed and the step gives its draws;
            default 0, 1, ...

        Raises:
          ConfigError: more positions than the model has, or a model that does not write.
        """
        batch, length = self._prepare(prompts, max_tokens)
        rows = len(batch["tokens"])
        numbers_B = np.arange(rows, dtype=np.int32)
        if numbers is not None:
            numbers_B[: len(prompts)] = numbers
        # Rows that only fill the bucket stop after one token.
        limits_B = np.where(np.arange(rows) < len(prompts), max_tokens, 1).astype(np.int32)
        with self.layout.active():
            decoded = self._sample(
                self.params,
                batch,
                jax.random.key(seed),
                numbers_B,
                limits_B,
                sampling=sampling,
                length=length,
            )
        decoded = jax.tree.map(np.asarray, decoded)
        return [self._continuation(decoded, i) for i in range(len(prompts))]

    def beam(
        self,
        prompts: Sequence[Prompt],
        *,
        max_tokens: int,
        beams: int = 4,
        returned: int = 1,
        alpha: float = 0.6,
    ) -> list[list[Continuation]]:
        """The ``returned`` best continuations of each prompt by beam search, best first.

        Args:
          prompts, max_tokens: as for ``sample``.
          beams: width of the beam, at least ``returned``.
          returned: continuations of each prompt.
          alpha: strength of the length penalty (Wu et al. 2016, eq. 14; 0.6 to 0.7 there).

        Raises:
          ConfigError: as for ``sample``, and for a beam too narrow.
        """
        if beams < 1:
            raise ConfigError("beams", f"{beams} is not valid; give 1 or more")
        if not 1 <= returned <= beams:
            raise ConfigError(
                "samples", f"{returned} is not valid; a beam of {beams} gives 1 to {beams}"
            )
        batch, length = self._prepare(prompts, max_tokens)
        with self.layout.active():
            decoded = self._beams(
                self.params,
                batch,
                np.int32(max_tokens),
                beams=beams,
                returned=returned,
                alpha=alpha,
                length=length,
            )
        decoded = jax.tree.map(np.asarray, decoded)
        rows = range(len(prompts))
        return [[self._continuation(decoded, (i, j)) for j in range(returned)] for i in rows]

    def predict(self, prompts: Sequence[Prompt]) -> list[np.ndarray]:
        """Each prompt's tokens with its holes filled by the likeliest token, int32 [n].

        For models trained to predict in place (masked LM); all holes are filled at once.
        """
        batch = self._batch(prompts)
        with self.layout.active():
            best_BT = np.asarray(self._predict(self.params, batch))
        filled = []
        for row, prompt in zip(best_BT, prompts, strict=False):
            tokens = np.array(prompt.tokens, np.int32)
            if prompt.holes is not None:
                tokens[prompt.holes] = row[prompt.holes]
            filled.append(tokens)
        return filled

    # Host side: buckets.

    def _prepare(self, prompts: Sequence[Prompt], max_tokens: int) -> tuple[dict[str, Any], int]:
        """The batch, and the bucket of new tokens."""
        if self.model.config.kind == "encoder":
            raise ConfigError("model.kind", "an encoder writes no text; it can only fill masks")
        if max_tokens < 1:
            raise ConfigError("max_tokens", f"{max_tokens} is not valid; give 1 or more")
        # What fills a blank stands at its position: it takes none of its own.
        longest = max((len(p.tokens) for p in prompts if p.blank is None), default=0)
        if longest and (table := self._table) is not None and longest + max_tokens > table:
            raise ConfigError(
                "max_tokens",
                f"{max_tokens} after a prompt of {longest} tokens is beyond the model's "
                f"{table} positions; give at most {max(table - longest, 0)}",
            )
        return self._batch(prompts), bucket(max_tokens)

    @property
    def _table(self) -> int | None:
        """Positions that the model has; None where there is no end."""
        return self.model.config.max_length

    @property
    def _inner(self) -> int:
        """Positions inside a blank that the model has; beyond them, the last one counts."""
        return getattr(self.model.config, "inner_positions", 0)

    def _batch(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        two_streams = self.model.config.kind == "encoder_decoder"
        rows = _multiple(bucket(len(prompts), 1), self.layout.ways("batch"))
        tokens, segments, positions = self._padded([p.tokens for p in prompts], rows)
        prefix = np.zeros_like(segments)
        for i, prompt in enumerate(prompts):
            prefix[i] = segments[i] * prompt.prefix
            prefix[i, len(prompt.tokens) - prompt.given :] = 0
        batch = {"tokens": tokens, "segments": segments, "positions": positions, "prefix": prefix}
        if any(prompt.blank is not None for prompt in prompts):
            batch |= self._blanks(prompts, positions, prefix)
        if two_streams:
            inputs = [p.inputs for p in prompts if p.inputs is not None]
            if len(inputs) != len(prompts):
                raise ValueError("every prompt of an encoder-decoder needs `inputs`")
            names = ("inputs", "input_segments", "input_positions")
            batch |= dict(zip(names, self._padded(inputs, rows), strict=True))
        return batch

    def _blanks(self, prompts: Sequence[Prompt], positions, prefix) -> dict[str, Any]:
        """Lays the starts of blanks where these stand; ``blanks`` [rows, 2]: its position (-1: the
        prompt has none) and the prompt's tokens."""
        inner = np.zeros_like(positions)
        blanks = np.full((len(positions), 2), -1, np.int32)
        for i, prompt in enumerate(prompts):
            if prompt.blank is not None:
                last = len(prompt.tokens) - 1
                positions[i, last], inner[i, last], prefix[i, last] = prompt.blank, 1, 0
                blanks[i] = prompt.blank, last + 1
        return {"inner_positions": inner, "blanks": blanks}

    def _padded(self, sequences: Sequence[np.ndarray], rows: int) -> tuple[np.ndarray, ...]:
        """Tokens, segments and positions, int32 [rows, bucket]; spare rows repeat the first."""
        longest = max(map(len, sequences))
        if self._table is not None and longest > self._table:
            raise ConfigError(
                "prompt", f"{longest} tokens are beyond the model's {self._table} positions"
            )
        # A single token (a decoder's start) needs no bucket of its own.
        length = 1 if longest == 1 else bucket(longest)
        if length > 1:
            length = _multiple(length, self.layout.ways("length"))
        tokens = np.full((rows, length), self.pad, np.int32)
        segments = np.zeros((rows, length), np.int32)
        # Padding stays at position 0, which every table has.
        positions = np.zeros((rows, length), np.int32)
        for i in range(rows):
            ids = sequences[i] if i < len(sequences) else sequences[0]
            tokens[i, : len(ids)], segments[i, : len(ids)] = ids, 1
            positions[i, : len(ids)] = np.arange(len(ids))
        return tokens, segments, positions

    def _continuation(self, decoded: Any, at) -> Continuation:
        tokens = decoded.tokens[at][: decoded.lengths[at]]
        ended = bool(len(tokens)) and int(tokens[-1]) == self.eos
        return Continuation(
            tokens[:-1] if ended else tokens,
            ended,
            float(decoded.log_probs[at]),
            float(decoded.scores[at]),
        )

    # Device side: pure functions of the parameters.

    def _sample_rows(self, params, batch, key, numbers_B, limits_B, *, sampling, length) -> Decoded:
        network = self.model.bind(params)
        cache, logits_BV = self._prefill(network, batch, length)
        return sample(
            functools.partial(self._step, params, batch.get("blanks")),
            cache,
            logits_BV,
            sampling=sampling,
            key=key,
            rows_B=numbers_B,
            length=length,
            limits_B=limits_B,
            eos=self.eos,
            pad=self.pad,
        )

    def _beam_rows(self, params, batch, limit, *, beams, returned, alpha, length) -> Decoded:
        network = self.model.bind(params)
        cache, logits_BV = self._prefill(network, batch, length)
        return beam_search(
            functools.partial(self._step, params, batch.get("blanks")),
            Cache.take,
            cache,
            logits_BV,
            beams=beams,
            returned=returned,
            alpha=alpha,
            length=length,
            limit=limit,
            eos=self.eos,
            pad=self.pad,
        )

    def _predict_rows(self, params, batch) -> jax.Array:
        network = self.model.bind(params)
        return jnp.argmax(network.logits(network(batch)), axis=-1).astype(jnp.int32)

    def _prefill(self, network: Network, batch, length: int) -> tuple[Cache, jax.Array]:
        """The cache with the prompts in it and room for ``length`` tokens, and the next logits."""
        tokens_BP, segments_BP = batch["tokens"], batch["segments"]
        rows, prompt = tokens_BP.shape
        encoded = network.encode(batch) if "inputs" in batch else None
        cache = network.init_cache(
            rows, prompt + length, encoded=encoded, input_segments=batch.get("input_segments")
        )
        x_BPD, cache = network.decode(
            tokens_BP,
            cache,
            segments=segments_BP,
            positions=batch["positions"],
            prefix=batch["prefix"],
            inner_positions=batch.get("inner_positions"),
        )
        last_B = segments_BP.sum(1) - 1
        x_BD = jnp.take_along_axis(x_BPD, last_B[:, None, None], axis=1)[:, 0]
        return cache, network.logits(x_BD)

    def _step(self, params: Params, blanks_R2, cache: Cache, tokens_B: jax.Array):
        network = self.model.bind(params)
        # A row that has ended goes on until all have; it must not leave the table of positions.
        last = cache.segments.shape[1] if self._table is None else self._table
        positions_B1, inner_B1 = jnp.minimum(cache.index, last - 1)[:, None], None
        if blanks_R2 is not None:
            beams = len(tokens_B) // len(blanks_R2)
            blank_B1, prompt_B1 = jnp.split(jnp.repeat(blanks_R2, beams, axis=0), 2, axis=1)
            inside = jnp.minimum(cache.index[:, None] - prompt_B1 + 2, self._inner - 1)
            inner_B1 = jnp.where(blank_B1 >= 0, inside, 0)
            positions_B1 = jnp.where(blank_B1 >= 0, blank_B1, positions_B1)
        x_B1D, cache = network.decode(
            tokens_B[:, None], cache, positions=positions_B1, inner_positions=inner_B1
        )
        return network.logits(x_B1D[:, 0]), cache


def bucket(n: int, smallest: int = SMALLEST_BUCKET) -> int:
    """The least power of two that is at least ``n`` and ``smallest``."""
    return max(smallest, 1 << (n - 1).bit_length())


def _multiple(n: int, of: int) -> int:
    return -(-n // of) * of
