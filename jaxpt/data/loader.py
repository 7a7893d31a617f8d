"""From a source of documents to host batches: deterministic, resumable, by any number of processes.

The input is cut into a fixed number of logical shards (``jaxpt/data/stream.py``), each with an
order, packing and random state of its own. A batch is the rows of shard 0, then those of shard 1,
and so on, the same number of each: it depends on the seed and the step, never on how many
processes or workers make it. Process p of P serves a run of consecutive shards and yields
their rows, so that the processes' batches, one after the other, are the global batch.

Where a source has several parts (domains), a row holds text of one of them, and batches have a
further field ``domains``, int32 like ``tasks``: the number of the domain, 0 at padding. Which row
is whose is a function of the seed, the step and the step's weights (``jaxpt/data/mixing``).
"""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import grain
from absl import flags

from jaxpt.data.base import Source, Split, check_split, document_sizes
from jaxpt.data.blocks import Blocks, Counts, Place, join
from jaxpt.data.mixing.base import Domain, Policy
from jaxpt.data.mixing.fixed import Fixed
from jaxpt.data.mixing.mixer import Mixer, check_learning
from jaxpt.data.packing import Packer, Rows
from jaxpt.data.stream import BEGINNING, Pieces, Plan, State, Tokenised, piece_counts
from jaxpt.data.workers import by_process, losses_said
from jaxpt.errors import ConfigError, DataError

STATE_VERSION = 2
PIECE_SIZE = 32  # a piece of a document has at least so many characters for each position of a row


@dataclasses.dataclass(frozen=True)
class Loading:
    """How batches are made: ``shards``, ``window``, ``pack`` say of what, the rest how fast."""

    workers: int = 0  # processes that make batches, at most one a logical shard; 0: a thread does
    prefetch: int = 2  # host batches made ahead of the one in use
    device_prefetch: int = 2  # batches on the device ahead of the one in use
    shards: int | None = None  # logical shards; default: the greatest common divisor of batch and 8
    # rows of a shard and domain made and shuffled at a time; default: 2^16 / length, at most 256,
    # shared by the domains, and at least 16
    window: int | None = None
    # a source of fewer documents is cut into about so many pieces to shuffle; 1: never
    pieces: int = 4096
    pack: bool = True  # several examples a row, cut to fit; else one
    cache: int = 256 * 2**20  # bytes of token ids kept in memory for the next epoch, in each worker

    def __post_init__(self):
        for name, least in (
            ("workers", 0),
            ("prefetch", 1),
            ("device_prefetch", 1),
            ("pieces", 1),
            ("cache", 0),
        ):
            if getattr(self, name) < least:
                raise ConfigError(
                    name, f"{getattr(self, name)} is not valid; give a number >= {least}"
                )
        for name in ("shards", "window"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(name, f"{getattr(self, name)} is not valid; give a number >= 1")


class Loader:
    """Iterates over dicts of numpy arrays [batch / processes, positions]; see ``build_loader``.

    When the data ends before a batch is full, what is there is padded with rows of segment 0 (so
    nothing is lost), and the next call raises StopIteration.

    Batches are made ahead. ``place``, ``state``, ``metrics`` and ``observe`` speak of the
    batch that was handed out last.
    """

    def __init__(
        self,
        plans: tuple[Plan, ...],
        mixer: Mixer,
        batch: int,
        loading: Loading,
        process_index: int,
        process_count: int,
    ):
        self._plans, self._plan, self._loading = plans, plans[0], loading
        self._mixer = mixer
        each = self._plan.shards // process_count
        mine = range(process_index * each, (process_index + 1) * each)
        self._rows = batch // self._plan.shards
        shards = {shard: [BEGINNING] * len(plans) for shard in mine}
        self.place: Place = Place(0, shards, mixing=mixer.place())
        self._open: list[Any] = []  # what has to be closed
        self._ended = self._closed = False
        self.counts = Counts()

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Rows:
        if self._closed:
            raise ValueError("the loader is closed")
        if self._ended:
            raise StopIteration
        if not self._open:
            # The mixer first: a thread that waits in it could not be ended otherwise.
            self._open += [self._mixer, iter(self._dataset())]
            # Closes also at the interpreter's exit, and lets go before modules are torn down.
            self._close = weakref.finalize(self, _close, self._open)
        self._mixer.check_ready(self.place.step)
        with losses_said():
            element = next(self._open[-1])
        if element["ended"]:
            self._ended = True
            self._stop()
            raise StopIteration
        self.place = element["place"]
        self.counts.add(element["batch"])
        return element["batch"]

    def state(self, place: Place | None = None) -> State:
        """The place after the last batch that was handed out, as JSON; of this process's shards.

        With several processes, ``merge_states`` makes one of all of theirs. Where an online
        policy mixes, waits for the losses that it has not yet taken in.

        Args:
          place: an earlier one.

        Raises:
          RuntimeError: an online policy mixes, and the last batch's losses have not been observed.
        """
        place = place or self.place
        shards = {str(shard): state for shard, state in place.shards.items()}
        mixing = self._mixer.state(place.mixing)
        learnt = {} if mixing is None else {"mixing": mixing}
        return self._identity() | {"step": place.step, "shards": shards} | learnt

    def restore(self, state: State) -> None:
        """Goes on where ``state()`` was taken, by however many processes and workers.

        Raises:
          DataError: the state is of another seed, number of shards, way of packing or mixture, or
            lacks a shard of this process.
        """
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise DataError(
                    f"the data position was saved with {name} = {state.get(name)!r}, "
                    f"and this loader has {value!r}"
                )
        mine = self.place.shards
        lacking = [shard for shard in mine if str(shard) not in state["shards"]]
        if lacking:
            raise DataError(f"the data position has no logical shards {lacking}")
        self._stop()
        self._mixer = self._mixer.fresh(state.get("mixing"))
        shards = {shard: state["shards"][str(shard)] for shard in mine}
        self.place = Place(state["step"], shards, mixing=self._mixer.place())
        self._ended = False

    def observe(self, metrics: Mapping[str, Any], place: Place | None = None) -> None:
        """The metrics of the step that the last batch was given to, for a policy that learns.

        Returns at once: what is on the device is read when it is needed, steps later.
        """
        self._mixer.observe((place or self.place).step - 1, metrics)

    def metrics(self, place: Place | None = None) -> dict[str, float]:
        """``epoch``: how often the source has been gone through, by the pieces before those in use.

        With several domains that of the one furthest on, and for each "epoch/NAME" and
        "mixture/NAME", the weight that the last batch was drawn with.
        """
        place = place or self.place
        others = self._plan.shards / len(place.shards)  # the other processes have as many
        epochs = [
            sum(states[i]["next"][0] for states in place.shards.values())
            * others
            / len(plan.pieces)
            for i, plan in enumerate(self._plans)
        ]
        found = {"epoch": max(epochs)}
        if len(epochs) > 1:
            names = [domain.name for domain in self._mixer.domains]
            found |= {f"epoch/{name}": n for name, n in zip(names, epochs, strict=True)}
            weights = place.weights or ()
            found |= {f"mixture/{name}": w for name, w in zip(names, weights, strict=False)}
        return found

    @property
    def epoch(self) -> float:
        """How often the source has been gone through; see ``metrics``."""
        return self.metrics()["epoch"]

    @property
    def finite(self) -> bool:
        """Whether the data ends."""
        return all(plan.epochs is not None for plan in self._plans)

    def padding(self) -> Rows:
        """A batch of nothing but padding: for a process whose data ends before the others'."""
        batch = self._plan.packer.empty(self._rows * len(self.place.shards))
        return batch | ({"domains": batch["tasks"]} if len(self._plans) > 1 else {})

    def close(self) -> None:
        """Stops workers and threads. The loader cannot be used afterwards."""
        self._stop()
        self._closed = True

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _identity(self) -> State:
        plan, packer = self._plan, self._plan.packer
        return {
            "version": STATE_VERSION,
            "seed": plan.seed,
            "shuffle": plan.shuffle,
            "shard_count": plan.shards,
            "window": plan.window,
            "pack": packer.pack,
            "length": packer.length,
            "target_length": packer.target_length,
            "pieces": [len(plan.pieces) for plan in self._plans],
        }

    def _stop(self) -> None:
        if self._open:
            self._close()

    def _dataset(self) -> grain.IterDataset:
        loading, shards = self._loading, len(self.place.shards)
        dataset: grain.IterDataset = Blocks(self._plans, self._mixer, self._rows, self.place)
        workers = max((n for n in range(1, loading.workers + 1) if shards % n == 0), default=0)
        if workers:
            if not flags.FLAGS.is_parsed():  # grain 0.2.18 reads flags that only absl.app parses
                flags.FLAGS.mark_as_parsed()
            dataset = by_process(dataset, workers, loading.prefetch)
            if workers > 1:
                dataset = dataset.batch(workers, drop_remainder=True, batch_fn=join)
        return grain.experimental.ThreadPrefetchIterDataset(
            dataset, prefetch_buffer_size=loading.prefetch
        )


def _close(things: list[Any]) -> None:
    while things:
        things.pop(0).close()


def build_loader(
    source: Source,
    features: Any,
    tokenizer: Any,
    *,
    batch: int,
    length: int,
    target_length: int | None = None,
    split: Split = "train",
    seed: int = 0,
    epochs: int | None = None,
    shuffle: bool = True,
    loading: Loading | None = None,
    process_index: int = 0,
    process_count: int = 1,
    learn: bool = False,
) -> Loader:
    """Batches of examples from a source.

    Each document is tokenised, ended by ``Features.document_end``, and cut from its beginning to
    its end into the stretches that the objective requests, or shorter ones where that fills a row
    (``jaxpt/data/fitting.py``): no token is dropped. (Few long documents are first cut into pieces
    that are shuffled; see ``Loading.pieces``.) An example's random numbers depend on the seed and
    on where its text lies in the order of all text: neither on shards nor packing.

    Args:
      source: where documents come from.
      features: the host half of the objective (``jaxpt.objectives.base.Features``); picklable.
      tokenizer: a built tokenizer.
      batch: rows of the global batch.
      length: positions of a row of the encoder, or of the only stack.
      target_length: positions of a row of the decoder; None where there is one stack.
      split: train or validation.
      seed: of the order of documents and of the examples.
      epochs: how often to go through each part of the source at most; None: without end.
      shuffle: a new order of documents in every epoch, and of rows in every window.
      loading: workers, prefetching, packing and logical shards.
      process_index: this process, of ``process_count`` that serve a part of the batch each.
      learn: a mixing policy that is online waits for ``Loader.observe`` after every step; else
        it stays as it begins.

    Raises:
      ConfigError: a batch that the shards do not divide, shards that the processes do not divide,
        or a policy that cannot learn here.
      DataError: the source cannot be read, or has no documents.
    """
    loading = loading or Loading()
    check_split(split)
    shards = loading.shards or math.gcd(batch, 8)
    if batch < 1 or batch % shards:
        raise ConfigError(
            "batch", f"{batch} rows cannot be shared evenly by {shards} logical shards"
        )
    if shards % process_count:
        raise ConfigError(
            "loader.shards",
            f"{shards} logical shards cannot be shared evenly by {process_count} processes; "
            f"give a number that both {process_count} and the batch of {batch} allow",
        )
    if epochs is not None and epochs < 1:
        raise ConfigError("epochs", f"{epochs} is not valid; give a number >= 1")
    if learn:
        check_learning(source.mixing(), loading)
    parts = source.parts_of(split)
    if empty := [i for i, (documents, _) in enumerate(parts) if not len(documents)]:
        raise DataError(
            f"{type(source).__name__}: split {split!r} has no documents (parts {empty})"
        )

    def pieces(documents: Sequence[str]) -> Pieces:
        cache, wanted = loading.cache // len(parts), loading.pieces if shuffle else 1
        encoder = features.encoder(tokenizer)
        tokens = Tokenised(documents, encoder, features.document_end, cache)
        return Pieces(tokens, piece_counts(documents, wanted, PIECE_SIZE * length))

    packer = Packer(length, target_length, tokenizer.vocabulary.pad, loading.pack, features.extra)
    packer = features.packer(packer)
    window = loading.window or max(16, min(256, 2**16 // length) // len(parts))
    domains, policy = _mixing(source, split, parts)
    plans = tuple(
        Plan(
            pieces=pieces(documents),
            features=features,
            packer=packer,
            seed=seed,
            shuffle=shuffle,
            epochs=min((n for n in (domain.epochs, epochs) if n is not None), default=None),
            shards=shards,
            window=window,
            part=part,
        )
        for part, ((documents, _), domain) in enumerate(zip(parts, domains, strict=True))
    )
    mixer = Mixer(policy, domains, learn=learn)
    return Loader(plans, mixer, batch, loading, process_index, process_count)


def _mixing(
    source: Source, split: Split, parts: Sequence[tuple[Sequence[str], float]]
) -> tuple[list[Domain], Policy]:
    """The domains, with their sizes where the policy needs them; validation has plain weights."""
    domains, policy = list(source.domains()), source.mixing()
    if split == "validation":
        weights = [weight for _, weight in parts]
        pairs = zip(domains, weights, strict=True)
        return [dataclasses.replace(domain, weight=w) for domain, w in pairs], Fixed()
    if policy.sized:
        for i, (documents, _) in enumerate(parts):
            domains[i] = dataclasses.replace(domains[i], size=int(document_sizes(documents).sum()))
    return domains, policy


def merge_states(states: Sequence[State]) -> State:
    """One state of the states of all processes, to be restored by any number of them.

    A process whose data ended before the others' is behind in its step: the furthest counts.
    """
    merged = dict(max(states, key=lambda state: state["step"]))
    merged["shards"] = {
        shard: place for state in states for shard, place in state["shards"].items()
    }
    return merged
