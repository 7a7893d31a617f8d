"""Which exchanges the sharding of a train step asks for, by formula; and whether what a compiled
program does is explained by it.

Of the Transformers of ``jaxpt.models.transformer`` with optimizers that go entry by entry. Sizes
are those of one device and one step, ``B T`` its own tokens, as in ``jaxpt.hlo.Collective``:

- parameters that are cut over axes that tokens are cut over too (fsdp): gathered for the forward
  pass and again for the backward pass, in the type of the products; the output matrix once, for its
  gradients are made in the forward pass; the embedding once, or rows of it handed round
  (``jaxpt.models.lookup``);
- gradients: scattered over the axes that their parameter is gathered over, those parts added up
  over all others that tokens are cut over. Of layers' matrices in the type of the products, of all
  else in float32;
- tensor: rows [B T, D] added up after each branch of a layer, and their gradients before it; where
  layers are computed again, also once more after each branch but the last. Of an encoder-decoder
  the encoder's gradient from each layer's cross-attention. The embedding's rows; of each position's
  logits the greatest, the sum and the target's, and the gradient of the rows;
- context: keys and values, forward and backward, and their gradients;
- parameters whose state is cut further (``Mesh.shard_state``): gathered after the update.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import jax.numpy as jnp

from jaxpt.hlo import Collective
from jaxpt.models.lookup import cut_of
from jaxpt.models.transformer import Transformer
from jaxpt.program import Program
from jaxpt.weights.base import Tensor

STRAY = 0.02  # of all that is sent: what may be beyond the formula (norms, counts, metrics)
SCALARS = 2**17  # bytes of the same, where next to nothing is sent
FLOAT = 4


@dataclasses.dataclass(frozen=True)
class Asked:
    """An exchange that the sharding asks for, and what for."""

    what: str
    exchange: Collective


@dataclasses.dataclass(frozen=True)
class Held:
    """Measured against the formula along one group of mesh axes, in bytes sent."""

    axes: tuple[str, ...]
    found: float
    asked: float

    @property
    def excess(self) -> float:
        return max(0.0, self.found - self.asked)


def compare(found: Iterable[Collective], asked: Iterable[Asked]) -> tuple[list[Held], bool]:
    """What is sent beside what is asked for, by axes; and whether the one explains the other: all
    but a few hundredths.

    A ring that XLA makes of a gather and a product goes round once more than it would have to, in
    both directions: that is let pass.
    """
    sums: dict[tuple[str, ...], list[float]] = {}
    for each in found:
        ring = each.kind == "collective-permute" and each.size > 2
        share = (each.size - 1) / (each.size + 1) if ring else 1.0
        sums.setdefault(each.axes, [0.0, 0.0])[0] += share * each.sent
    for one in asked:
        sums.setdefault(one.exchange.axes, [0.0, 0.0])[1] += one.exchange.sent
    rows = [Held(axes, *both) for axes, both in sums.items()]
    total = sum(row.found for row in rows)
    explained = sum(row.excess for row in rows) <= STRAY * total + SCALARS
    return sorted(rows, key=lambda row: -row.found), explained


def expected(program: Program) -> tuple[Asked, ...] | None:
    """Of a program's train step; None where there is no formula for its model."""
    config = program.model.config
    if not isinstance(config, Transformer) or type(config) is not Transformer:
        return None  # of a head on one, too
    if program.layout.mesh.size == 1:
        return None
    with program.layout.active():
        formula = _Formula(program, config)
        found = [*formula.tensors(), *formula.rows(), *formula.keys()]
    sums: dict[tuple, list[float]] = {}
    for one in found:
        e = one.exchange
        total = sums.setdefault((one.what, e.kind, e.axes, e.size), [0, 0])
        total[0], total[1] = total[0] + e.count, total[1] + e.bytes
    asked = (
        Asked(what, Collective(kind, axes, size, int(n), round(total)))
        for (what, kind, axes, size), (n, total) in sums.items()
    )
    return tuple(sorted(asked, key=lambda one: -one.exchange.sent))


class _Formula:
    def __init__(self, program: Program, config: Transformer):
        self.program, self.layout, self.config = program, program.layout, config
        phase, spec = program.phase, self.layout.spec(("batch", "length", "heads", "vocab"))
        self.batch, self.length, self.heads, self.vocab = (tuple(_names([e])) for e in spec)
        self.width = self.config.compute_dtype().itemsize
        self.micro = getattr(phase.step, "accumulate", 1)
        self.own = phase.batch // self.micro // self.ways(self.batch)  # rows of a device
        both = self.config.kind == "encoder_decoder"
        self.targets = (phase.target_length if both else phase.length) or 0
        self.inputs = phase.length if both else 0

    def ways(self, names: Collection[str]) -> int:
        return math.prod(self.layout.mesh.shape[name] for name in names)

    def ask(self, what: str, kind: str, axes: Collection[str], size: float, times=1):
        """An exchange of arrays of ``size`` bytes over these axes, in the mesh's order."""
        axes = tuple(
            n for n in self.layout.mesh.shape if n in axes and self.layout.mesh.shape[n] > 1
        )
        if axes and size:
            times = times * self.micro
            yield Asked(what, Collective(kind, axes, self.ways(axes), times, round(times * size)))

    # Parameters and gradients.

    def tensors(self) -> Iterator[Asked]:
        for path, tensor in self.program.model.tensors.items():
            spec = self.layout.spec(tensor.axes, path=path)
            names = _names(spec)
            over = tuple(n for n in names if n in (*self.batch, *self.length))
            kept = [n for n in names if n not in over]
            numbers = math.prod(tensor.shape) / self.ways(kept)
            yield from self._gathers(path, tensor, over, numbers)
            if tensor.trained:
                yield from self._gradients(path, tensor, over, numbers)
                yield from self._state(path, tensor, numbers / self.ways(over))

    def _gathers(self, path: str, tensor: Tensor, over, numbers: float) -> Iterator[Asked]:
        item = min(self.width, _item(tensor))
        if path == "embedding/w":
            if not self._handed_round():
                yield from self.ask("parameters", "all-gather", over, numbers * _item(tensor))
            if self.config.tied:
                yield from self.ask("parameters", "all-gather", over, numbers * item)
            return
        layers = tensor.shape[0] if tensor.stacked else 1
        passes = 1 if path.startswith("lm_head") else 2
        size = numbers / layers * item
        yield from self.ask("parameters", "all-gather", over, size, layers * passes)

    def _gradients(self, path: str, tensor: Tensor, over, numbers: float) -> Iterator[Asked]:
        matrix = "layers" in path and len(tensor.shape) - tensor.stacked > 1
        layers = tensor.shape[0] if tensor.stacked and matrix else 1
        size = numbers / layers * (self.width if matrix else FLOAT)
        rest = [n for n in (*self.batch, *self.length) if n not in over]
        if path != "embedding/w" or not self._handed_round() or self.config.tied:
            yield from self.ask("gradients", "reduce-scatter", over, size, layers)
        yield from self.ask("gradients", "all-reduce", rest, size / self.ways(over), layers)

    def _state(self, path: str, tensor: Tensor, numbers: float) -> Iterator[Asked]:
        """What the update has to hand out again where its state is cut over more devices."""
        if self.layout.shard_state:
            own = self.layout.sharding(tensor.axes, tensor.shape, path)
            more = self.layout.spread(own, tensor.shape)
            before, after = (_names(each.spec) for each in (own, more))
            size = numbers * _item(tensor)
            yield from self.ask("update", "all-gather", set(after) - set(before), size)

    # Rows.

    def _lookups(self) -> list[int]:
        """Lengths of what is looked up."""
        return [n for n in (self.inputs, self.targets) if n]

    def _handed_round(self) -> bool:
        table = self.program.model.tensors["embedding/w"].shape
        rows = self.program.phase.batch // self.micro
        return all(cut_of(table, (rows, n), self.layout) is not None for n in self._lookups())

    def rows(self) -> Iterator[Asked]:
        config, cut_length = self.config, self.ways(self.length)
        tokens = {n: self.own * n / cut_length for n in {self.inputs, self.targets}}
        row = config.width_of_embedding * self.width
        spec = self.layout.spec(("vocab", "embed"))
        width = _names([spec[1]]) if len(spec) > 1 else []
        if self._handed_round():
            for n in self._lookups():
                ids = tokens[n] * self.ways(width) * 4
                yield from self.ask("embedding's rows", "all-gather", width, ids, 2)
                yield from self.ask("embedding's rows", "all-to-all", width, tokens[n] * row, 2)
        for n in self._lookups():
            yield from self.ask("embedding's rows", "all-reduce", self.vocab, tokens[n] * row)
        yield from self._branches(tokens)
        positions = tokens[self.targets]
        yield from self.ask("logits", "all-reduce", self.vocab, 3 * positions * FLOAT)
        wide = positions * config.width_of_output * FLOAT
        yield from self.ask("logits", "all-reduce", self.vocab, wide)

    def _branches(self, tokens: dict[int, float]) -> Iterator[Asked]:
        """After and before the branches of all layers."""
        config, again = self.config, self.config.remat not in ("none", "elementwise")
        row = config.width * self.width
        for encoder, depth in ((True, config.depth_of_encoder), (False, config.depth_of_decoder)):
            cross = not encoder and bool(self.inputs)
            n = self.inputs if encoder and self.inputs else self.targets
            branches = 1 if config.parallel else 3 if cross else 2
            times = depth * (2 * branches + (branches - 1 if again else 0))
            yield from self.ask("branches", "all-reduce", self.heads, tokens[n] * row, times)
            if cross:
                size = tokens[self.inputs] * row
                yield from self.ask("branches", "all-reduce", self.heads, size, depth)

    def keys(self) -> Iterator[Asked]:
        """Keys and values that go to the other devices of context, and their gradients back."""
        config, again = self.config, self.config.remat not in ("none", "elementwise")
        heads = config.attention.groups() / self.ways(self.heads)
        row = 2 * heads * config.head_dim  # of a key and a value
        for encoder, depth in ((True, config.depth_of_encoder), (False, config.depth_of_decoder)):
            n = self.inputs if encoder and self.inputs else self.targets
            for length in [n] if encoder or not self.inputs else [n, self.inputs]:
                size = self.own * length * row
                passes = depth * (3 if again else 2)
                whole = size * self.width
                yield from self.ask("keys", "all-gather", self.length, whole, passes)
                yield from self.ask("keys", "reduce-scatter", self.length, size * FLOAT, depth)


def _names(spec: Iterable[Any]) -> list[str]:
    """Mesh axes of a PartitionSpec."""
    return [n for entry in spec for n in ((entry,) if isinstance(entry, str) else entry or ())]


def _item(tensor: Tensor) -> int:
    return jnp.dtype(tensor.dtype).itemsize
