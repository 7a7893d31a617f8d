"""A model without arrays (``Model``), and the module that it binds parameters to (``Network``)."""

from __future__ import annotations

import math
from typing import Any

import jax

from jaxpt.errors import ConfigError
from jaxpt.mesh import Layout
from jaxpt.models import flops, stacking
from jaxpt.models.base import ModelConfig
from jaxpt.models.network import Network
from jaxpt.state import Params, flatten, unflatten
from jaxpt.weights.base import Product, Record, Scope, Tensor

__all__ = ["Model", "Network"]


class Model:
    """A model's config and its vocabulary: what its tensors are, how to draw and bind them.

    tensors: path -> shape, logical axes, standard deviation at initialisation, kind; the paths
      are those of the flattened parameters. Of several networks each has its name in front, and
      what two of them share stands once.
    products: path -> one matrix product each.
    """

    def __init__(self, config: ModelConfig, vocab_size: int):
        if vocab_size < 1:
            raise ConfigError("vocab_size", f"{vocab_size} is not valid; give 1 or more")
        self.config, self.vocab_size = config, vocab_size
        record = Record()
        self._template: stacking.Template | None = None

        def create(key):
            self._template, params = stacking.split(self._network(key, record))
            return params

        self._abstract = jax.eval_shape(create, jax.random.key(0))
        self.tensors: dict[str, Tensor] = {p: record.tensors[p] for p in flatten(self._abstract)}
        self.products: dict[str, Product] = record.products
        for name in config.networks:
            self._check_patterns(name, record)

    def _network(self, key, record: Record) -> Any:
        return self.config.network(self.vocab_size, Scope(key, self.config.rules, record))

    def _check_patterns(self, network: str, record: Record) -> None:
        """Every pattern of a network must match something in it."""
        rules, start = self.config.networks[network].rules, f"{network}/" if network else ""
        for field, table in {"weights": self.products, "inits": self.tensors}.items():
            known = sorted(p.removeprefix(start) for p in table if p.startswith(start))
            for pattern, _ in getattr(rules, field):
                if (start + field, pattern) not in record.used:
                    raise ConfigError(
                        field,
                        f"{pattern!r} matches nothing that an earlier pattern leaves it; "
                        f"known: {', '.join(known)}",
                    ).within(network)

    def __repr__(self):
        return f"Model({self.config.kind}, {self.parameters:,} parameters)"

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters; a pure function of the key, to be jitted."""
        if self.config.stacked:
            return stacking.split(self._network(key, Record()))[1]
        # Stacked layers draw the same, in a program that does not grow with their number.
        params = Model(self.config.with_stacks(), self.vocab_size).init(key)
        for name, network in self.config.networks.items():
            if not network.stacked and not name:
                params = stacking.unstacked(params)
            elif not network.stacked:
                params[name] = stacking.unstacked(params[name])
        flat = flatten(params)  # where the first layer has no norm, the stacked ones have one
        return unflatten({path: flat[path] for path in self.tensors})

    def abstract(self) -> Params:
        """The parameters' shapes and dtypes."""
        return jax.tree.map(lambda x: x, self._abstract)

    def bind(self, params: Params) -> Any:
        """The module with these parameters: a ``Network``, or what the config makes."""
        assert self._template is not None
        return stacking.merge(self._template, params)

    def part(self, name: str) -> Model:
        """One network of several as a model of its own; its parameters are ``params[name]``.

        Raises:
          ConfigError: no such network, or one that shares what another holds.
        """
        networks = self.config.networks
        if name not in networks or not name:
            known = ", ".join(filter(None, networks)) or "it is one network"
            raise ConfigError("model", f"no network {name!r}; known: {known}")
        part = networks[name].build(self.vocab_size)
        lacking = [path for path in part.tensors if f"{name}/{path}" not in self.tensors]
        if lacking:
            raise ConfigError(
                "model", f"{name} cannot stand alone: another network holds {', '.join(lacking)}"
            )
        return part

    def shardings(self, layout: Layout) -> dict[str, Any]:
        """The sharding of each parameter, nested as the parameters are.

        Raises:
          ConfigError: a dimension that the mesh does not divide, naming the tensor; a placement
            that no parameter has.
        """
        layout.check_placements(self.tensors)
        flat = {}
        for path, tensor in self.tensors.items():
            try:
                flat[path] = layout.sharding(tensor.axes, tensor.shape, path)
            except ConfigError as error:
                raise ConfigError(error.field, f"{path}: {error.message}") from None
        return unflatten(flat)

    @property
    def parameters(self) -> int:
        """The number of trainable parameters, padding of the vocabulary included."""
        return sum(math.prod(t.shape) for t in self.tensors.values() if t.trained)

    def flops(self, batch: int, length: int, target_length: int | None = None) -> float:
        """Floating-point operations of the forward pass of one batch: see ``flops.forward``."""
        config, products = self.config, self.products
        return config.flops(products, self.vocab_size, batch, length, target_length)

    def train_flops(self, batch: int, length: int, target_length: int | None = None) -> float:
        """Operations of a train step on one batch, nothing computed again: forward, and backward
        two products for each of the forward pass's, one where the matrix is frozen, none in a
        network that is frozen as a whole (a teacher)."""
        total, rows = 0.0, (batch, length, target_length)
        for name, network in self.config.networks.items():
            start = f"{name}/" if name else ""
            own = {p[len(start) :]: v for p, v in self.products.items() if p.startswith(start)}
            forward = network.flops(own, self.vocab_size, *rows)
            trained = any(t.trained for p, t in self.tensors.items() if p.startswith(start))
            total += 3 * forward - flops.frozen(network, own, *rows) if trained else forward
        return total
