"""What a weight is, and the scope in which modules make their tensors.

A *weight* is how one matrix of a model is held. Its config (a frozen dataclass deriving from
``Weight``) says what it costs and builds a ``WeightModule``.

A *scope* is where a module stands: its path, its random key and the rules that apply there.
Modules make every tensor through it, which is how the table of tensors (shape, logical axes,
standard deviation, weight type) comes about, without any metadata inside the tensors.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import zlib
from collections.abc import Callable
from typing import ClassVar, Literal, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxpt.errors import ConfigError
from jaxpt.mesh import Axes
from jaxpt.weights.init import Init
from jaxpt.weights.module import Template, merge, split

FROZEN = "frozen"  # the kind (``Tensor.weight``) of numbers that no optimizer changes


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One row of the table of tensors. ``axes`` has one logical axis (or None) per dimension."""

    shape: tuple[int, ...]
    axes: Axes
    std: float  # at initialisation
    weight: str  # type of the weight that holds it, or what else it is (norm, bias, embedding)
    dtype: str = "float32"

    @property
    def trained(self) -> bool:
        """Whether it can be: integers cannot, and what is ``FROZEN`` is not."""
        return self.weight != FROZEN and jnp.issubdtype(jnp.dtype(self.dtype), jnp.floating)

    @property
    def stacked(self) -> bool:
        """Whether the first axis counts layers, so that the tensor is one matrix per layer."""
        return bool(self.axes) and self.axes[0] == "layers"


@dataclasses.dataclass(frozen=True)
class Product:
    """One matrix product of a model: ``stack`` copies of ``d_in x d_out``."""

    d_in: int
    d_out: int
    stack: int
    weight: Weight
    template: Template | None = dataclasses.field(default=None, compare=False, repr=False)

    def module(self, params: dict[str, jax.Array]) -> WeightModule:
        """The weight's module with these parameters, of one copy."""
        assert self.template is not None
        return merge(self.template, params)


Module = TypeVar("Module", bound="WeightModule")


class WeightModule(nnx.Module):
    """The module that a weight's config builds: how one [d_in, d_out] matrix is held and used."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., d_in] -> [..., d_out], in x's dtype."""
        raise NotImplementedError

    @staticmethod
    def in_type(params: dict[str, jax.Array], dtype) -> dict[str, jax.Array]:
        """Its parameters, stacked or not, with those in ``dtype`` that it uses in no other: as
        they are, unless it says otherwise."""
        return params

    def dense(self) -> jax.Array:
        """The matrix it stands for, [d_in, d_out], in the parameters' dtype."""
        raise NotImplementedError

    def from_dense(self, matrix: jax.Array) -> WeightModule:
        """A copy of itself that stands for (the nearest to) ``matrix`` [d_in, d_out]."""
        raise NotImplementedError


def replaced(module: Module, **arrays: jax.Array) -> Module:
    """A copy of a weight's module with these parameters in the place of its own."""
    template, params = split(module)
    new = {name: array.astype(params[name].dtype) for name, array in arrays.items()}
    return merge(template, params | new)


@dataclasses.dataclass(frozen=True)
class Weight:
    """Config of a weight; subclasses live in a file each in ``jaxpt/weights``.

    factors: names of two of its parameters, A [d_in, R] and B [R, d_out], that matter by their
      product alone; () where there are none.
    """

    factors: ClassVar[tuple[str, ...]] = ()
    # what a sparse weight costs beside a dense one, in a line that a run begins with
    cost: ClassVar[str | None] = None

    def build(self, scope: Scope, d_in: int, d_out: int, axes: Axes, init: Init) -> WeightModule:
        """The module. ``axes`` are logical, of (d_in, d_out); ``init`` draws the entries."""
        raise NotImplementedError

    def flops(self, d_in: int, d_out: int) -> int:
        """Floating-point operations of the forward product for one token."""
        raise NotImplementedError

    def frozen_flops(self, d_in: int, d_out: int) -> int:
        """Those of ``flops`` by matrices that have no gradient."""
        return 0

    def parameters(self, d_in: int, d_out: int) -> int:
        """Trained numbers that stand for one matrix."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Rules:
    """What applies where: ordered (path pattern, value) pairs, the first match wins.

    Patterns are shell-style (``*/attention/*``, ``*/mlp/up``) over paths without layer numbers
    (``decoder/layers/mlp/up``).
    """

    weights: tuple[tuple[str, Weight], ...]
    inits: tuple[tuple[str, Init], ...] = ()
    dtype: str = "float32"  # of the parameters


class Record:
    """What the scopes of one model write down while it is built."""

    def __init__(self):
        self.tensors: dict[str, Tensor] = {}
        self.products: dict[str, Product] = {}
        # (field of Rules, after its network's name; pattern) that matched something
        self.used: set[tuple[str, str]] = set()


class Scope:
    """Path, key and rules of one module under construction."""

    def __init__(
        self,
        key: jax.Array,
        rules: Rules,
        record: Record,
        path: str = "",
        kind: str = "",
        stack: int = 0,
        name: str | None = None,
        root: str = "",
        frozen: bool = False,
    ):
        self.key, self.rules, self.record, self.frozen = key, rules, record, frozen
        self.path, self.kind, self.stack, self.root = path, kind, stack, root
        self.name = path if name is None else name  # `path` with the layer's number left out

    def _at(self, **changes) -> Scope:
        names = ("key", "rules", "record", "path", "kind", "stack", "name", "root", "frozen")
        return Scope(**({f: getattr(self, f) for f in names} | changes))

    def __truediv__(self, child: str) -> Scope:
        return self._at(path=_join(self.path, child), name=_join(self.name, child))

    def network(self, name: str, rules: Rules, *, frozen: bool = False) -> Scope:
        """The scope of a network of its own among several: its rules match paths from here on.
        All numbers of a ``frozen`` one are of that kind."""
        key = jax.random.fold_in(self.key, zlib.crc32(name.encode()))
        path = _join(self.path, name)
        return Scope(key, rules, self.record, path, name="", root=path, frozen=frozen)

    def stacked(self, key: jax.Array, layers: int) -> Scope:
        """The scope of a layer of which ``layers`` copies are stacked; ``key`` is one copy's."""
        return self._at(key=key, stack=layers)

    def layer(self, index: int) -> Scope:
        """The scope of one layer that stands alone: same keys and patterns as the stacked one's."""
        return self._at(key=jax.random.fold_in(self.key, index), path=f"{self.path}_{index}")

    def layer_keys(self, layers: int) -> jax.Array:
        return jax.vmap(lambda i: jax.random.fold_in(self.key, i))(jnp.arange(layers))

    def match(self, field: Literal["weights", "inits"], path: str):
        """The first value of that field of the rules whose pattern matches, or None."""
        for pattern, value in getattr(self.rules, field):
            if fnmatch.fnmatchcase(path, pattern):
                self.record.used.add((_join(self.root, field), pattern))
                return value
        return None

    def param(
        self,
        name: str,
        shape: tuple[int, ...],
        axes: Axes,
        init: Init,
        *,
        fan_in: int = 1,
        fan_out: int = 1,
        dtype: str | None = None,
        kind: str | None = None,
        key_of: str | None = None,
    ) -> nnx.Param:
        """A trainable tensor, drawn by the first matching rule, else by ``init``.

        Its key depends on the seed and its path alone: adding a tensor changes no other.
        ``kind`` is what the table of tensors calls it, where no weight holds it. ``key_of``
        names the tensor whose key it is drawn with, where that is another.
        """
        path, named = _join(self.path, name), _join(self.name, name)
        init = self.match("inits", named) or init
        dtype = dtype or self.rules.dtype
        stack = (self.stack,) if self.stack else ()
        self.record.tensors[path] = Tensor(
            stack + shape,
            (("layers",) if stack else ()) + axes,
            init.std(fan_in, fan_out),
            FROZEN if self.frozen else kind or self.kind,
            dtype,
        )
        key = self._key(_join(self.name, key_of) if key_of else named)
        return nnx.Param(init(key, shape, fan_in, fan_out, jnp.dtype(dtype)))

    def constant(
        self,
        name: str,
        shape: tuple[int, ...],
        axes: Axes,
        draw: Callable[[jax.Array], jax.Array],
        dtype: str,
        *,
        kind: str = "index",
        key_of: str | None = None,
    ) -> nnx.Param:
        """A tensor drawn once and never trained, of integers or of kind ``FROZEN``: part of the
        parameters, so that it is saved, laid out and stacked as they are."""
        path, named = _join(self.path, name), _join(self.name, name)
        stack = (self.stack,) if self.stack else ()
        layers = ("layers",) if stack else ()
        self.record.tensors[path] = Tensor(stack + shape, layers + axes, 0.0, kind, dtype)
        key = self._key(_join(self.name, key_of) if key_of else named)
        return nnx.Param(draw(key).astype(dtype))

    def _key(self, named: str) -> jax.Array:
        return jax.random.fold_in(self.key, zlib.crc32(named.encode()))

    def weight(self, name: str, d_in: int, d_out: int, axes: Axes, init: Init) -> WeightModule:
        """The weight that serves the matrix at ``path/name``, by the model's patterns.

        ``init`` is the default of the matrix's entries; a rule for ``path/name/w`` overrides it,
        whatever weight holds the matrix.
        """
        at = self / name
        config = self.match("weights", at.name)
        if config is None:
            known = ", ".join(sorted({*self.record.products, at.name}))
            raise ConfigError("weights", f"no pattern matches {at.name}; matrices so far: {known}")
        init = self.match("inits", f"{at.name}/w") or init
        module = config.build(at._at(kind=type(config).__name__), d_in, d_out, axes, init)
        product = Product(d_in, d_out, max(self.stack, 1), config, split(module)[0])
        self.record.products[at.path] = product
        return module


def _join(path: str, child: str) -> str:
    return f"{path}/{child}" if path else child
