"""From host batches to batches on the device, some ahead of the one in use; and what processes
have to tell one another for that."""

from __future__ import annotations

import collections
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from jaxpt.data.blocks import Place
from jaxpt.data.loader import Loader, merge_states
from jaxpt.data.packing import Rows
from jaxpt.data.stream import State

Agree = Callable[[bool], bool]
Prepare = Callable[[dict[str, jax.Array]], dict[str, jax.Array]]


def to_device(
    batch: Rows, shardings: Mapping[str, Sharding] | Sharding | None
) -> dict[str, jax.Array]:
    """A host batch as global arrays; returns before the transfer has ended.

    Args:
      batch: this process's rows, the same number in each process.
      shardings: of the global arrays, one for each field or one for all; None: the default device.
    """
    if shardings is None:
        return {name: jax.device_put(values) for name, values in batch.items()}
    each = shardings if isinstance(shardings, Mapping) else dict.fromkeys(batch, shardings)
    return {
        name: jax.make_array_from_process_local_data(each[name], values)
        for name, values in batch.items()
    }


def whole_to_device(batch: Rows, shardings: Mapping[str, Sharding]) -> dict[str, jax.Array]:
    """``to_device`` of a global batch that every process holds whole."""
    if jax.process_count() == 1:
        return to_device(batch, shardings)
    return {
        name: jax.make_array_from_callback(values.shape, shardings[name], values.__getitem__)
        for name, values in batch.items()
    }


class DeviceBatches:
    """A loader's batches on the device, ``depth`` of them on their way while one is in use.

    ``state``, ``metrics`` and ``observe`` speak of the batch that was handed out last, not of
    those ahead; see ``Loader``. ``host`` is that batch as it was on the host.

    Args:
      loader: closed with this.
      shardings: see ``to_device``.
      depth: batches ahead.
      agree: for several processes whose data may end at different steps, which must take the same
        number of steps: asked at every batch, by all of them, with whether the data has ended
        here; says whether it has everywhere. Until then, the others get padding.
      prepare: makes the batch of what has been transferred; returns before that is done.
    """

    def __init__(
        self,
        loader: Loader,
        shardings: Mapping[str, Sharding] | Sharding | None = None,
        depth: int = 2,
        agree: Agree | None = None,
        prepare: Prepare | None = None,
    ):
        if depth < 1:
            raise ValueError(f"depth is {depth}; at least one batch has to be on its way")
        self._loader, self._shardings, self._depth = loader, shardings, depth
        self._ahead: collections.deque[tuple[dict[str, jax.Array], Rows, Place]] = (
            collections.deque()
        )
        self._place = loader.place
        self._agree, self._prepare = agree, prepare
        self._ended = False
        self.host: dict[str, np.ndarray] | None = None

    def __iter__(self) -> DeviceBatches:
        return self

    def __next__(self) -> dict[str, jax.Array]:
        self.fill()
        if not self._ahead:
            raise StopIteration
        batch, self.host, self._place = self._ahead.popleft()
        return batch

    def fill(self) -> None:
        """Waits until there are batches ahead: the next one is then there at once. What is
        interrupted here hands out no batch, and ``state`` is as it was."""
        while not self._ended and len(self._ahead) <= self._depth:
            host = next(self._loader, None)
            ended = host is None
            if ended if self._agree is None else self._agree(ended):
                self._ended = True
                return
            host = self._loader.padding() if host is None else host
            batch = to_device(host, self._shardings)
            batch = batch if self._prepare is None else self._prepare(batch)
            self._ahead.append((batch, host, self._loader.place))

    def state(self) -> State:
        """JSON, of this process; ``gathered`` makes one of all of theirs."""
        return self._loader.state(self._place)

    def observe(self, metrics: Mapping[str, Any]) -> None:
        """The metrics of the step that the batch was given to; never waits for them."""
        self._loader.observe(metrics, self._place)

    def metrics(self) -> dict[str, float]:
        """What the loader knows of the batch, for the log: see ``Loader.metrics``."""
        return self._loader.metrics(self._place)

    def close(self) -> None:
        """Closes the loader and lets go of the batches ahead."""
        self._ended = True
        self._ahead.clear()
        self._loader.close()

    def __enter__(self) -> DeviceBatches:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def device_batches(
    loader: Loader,
    shardings: Mapping[str, Sharding] | Sharding | None = None,
    depth: int = 2,
    agree: Agree | None = None,
    prepare: Prepare | None = None,
) -> DeviceBatches:
    """``loader``'s batches as global ``jax.Array``s; see ``DeviceBatches``."""
    return DeviceBatches(loader, shardings, depth, agree, prepare)


# Between processes; each of these is called by all of them at the same point.


def all_ended(ended: bool) -> bool:
    """Whether the data has ended in every process. Waits for the devices."""
    return bool(np.all(multihost_utils.process_allgather(np.array(ended))))


def gathered(state: State) -> State:
    """The data position of all processes, of each one's own; the same in all of them."""
    if jax.process_count() == 1:
        return state
    data = np.frombuffer(json.dumps(state).encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.array(data.size))).reshape(-1)
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: data.size] = data
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return merge_states(
        [json.loads(row[:n].tobytes()) for row, n in zip(rows, sizes.tolist(), strict=True)]
    )
