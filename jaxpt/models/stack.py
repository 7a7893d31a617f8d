"""A layer, and a stack of them: scanned or unrolled, with or without remat."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxpt.errors import ConfigError
from jaxpt.gather import gathering, gathers
from jaxpt.mesh import constrain
from jaxpt.models import stacking
from jaxpt.models.attention import AttentionModule, Rule
from jaxpt.models.cache import Cache
from jaxpt.models.mlp import dropout
from jaxpt.models.position import BiasTable, RelativeBias
from jaxpt.models.recompute import elementwise
from jaxpt.models.transformer import Transformer
from jaxpt.weights.base import Scope, WeightModule

_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "branches": jax.checkpoint_policies.save_only_these_names("branch"),
}


@dataclasses.dataclass(frozen=True)
class Context:
    """What every layer of a stack is given."""

    rule: Rule  # of self-attention
    angles: Any = None  # of rotary positions
    bias: Any = None  # on the scores of self-attention
    cross_rule: Rule | None = None
    encoded: jax.Array | None = None  # [B, S', D]; None where the cache holds its keys
    local_angles: Any = None  # of layers with a window, where they have their own


# (layers, x, context, key) -> x after all layers
Runner = Callable[["Layers", jax.Array, Context, "jax.Array | None"], jax.Array]
_runner: contextvars.ContextVar[Runner | None] = contextvars.ContextVar("runner", default=None)


@contextlib.contextmanager
def running(runner: Runner) -> Iterator[None]:
    """While a model is traced, its stacks (not those that decode) are run by ``runner``: for steps
    that go through the layers by themselves."""
    token = _runner.set(runner)
    try:
        yield
    finally:
        _runner.reset(token)


@contextlib.contextmanager
def watched() -> Iterator[list[jax.Array]]:
    """While a model is traced, its stacks (not those that decode) put the outputs of their layers
    into the list, [L, B, T, D] each, in the order of their calls; where windows have a period,
    those of the last layer of each."""
    found: list[jax.Array] = []

    def runner(layers, x_BTD, context, key):
        x_BTD, outputs_LBTD = layers.outputs(x_BTD, context, key)
        found.append(outputs_LBTD)
        return x_BTD

    if _runner.get() is not None:
        raise ConfigError("step", "goes through the layers by itself, which are watched here")
    with running(runner):
        yield found


def rows(x_BTD: jax.Array, positions: str, name: str) -> jax.Array:
    """Laid out with its positions as that logical axis says; a single one is not cut."""
    return constrain(x_BTD, "batch", positions if x_BTD.shape[1] > 1 else None, "width", name=name)


class Layer(nnx.Module):
    def __init__(self, config: Transformer, scope: Scope, *, cross: bool, first: bool = False):
        self.config, self.cross = config, cross
        self.unnormed = ("attention",) if first and not config.first_norm else ()
        attention, width, norm = config.attention, config.width, config.norm
        self.attention = AttentionModule(attention, scope / "attention", width, norm)
        if cross:
            self.cross_attention = AttentionModule(
                attention, scope / "cross_attention", width, norm
            )
        self.mlp = config.mlp.build(scope / "mlp", width)
        branches = ("attention", "cross_attention", "mlp") if cross else ("attention", "mlp")
        for name in ("branches",) if config.parallel and not config.parallel_norms else branches:
            if name in self.unnormed:
                continue
            if config.placement != "sandwich":
                setattr(self, f"{name}_norm", norm.build(scope / f"{name}_norm", width))
            else:
                for side in ("before", "after"):
                    at = f"{name}_norm_{side}"
                    setattr(self, at, norm.build(scope / at, width))
        if isinstance(config.positions, RelativeBias) and config.positions.per_layer:
            encoder, at = config.depth_of_encoder > 0 and not cross, scope / "relative_bias"
            self.relative_bias = BiasTable(config.positions, at, attention.heads, width, encoder)

    def __call__(self, x_BTD, context: Context, window, key, cache: Cache | None, index):
        """One layer. ``index`` is its number, which says where its keys lie in ``cache``."""
        keys = (None,) * 6 if key is None else jax.random.split(key, 6)

        def attention(x):
            nonlocal cache
            y, cache = self._self_attention(x, context, window, keys[0], cache, index)
            return dropout(y, self.config.dropout, keys[1])

        def cross_attention(x):
            y = self._cross_attention(x, context, keys[2], cache, index)
            return dropout(y, self.config.dropout, keys[3])

        def mlp(x):
            return dropout(self.mlp(x, keys[4]), self.config.dropout, keys[5])

        branches = {"attention": attention, "cross_attention": cross_attention, "mlp": mlp}
        if not self.cross:
            del branches["cross_attention"]
        if self.config.parallel and not self.config.parallel_norms:
            parts = tuple(branches.values())
            branches = {"branches": lambda x: sum(part(x) for part in parts)}
        if self.config.parallel_norms:
            added = sum(self._normed(name, f)(x_BTD) for name, f in branches.items())
            return self._sum(x_BTD, added), cache
        for name, branch in branches.items():
            norm = getattr(self, f"{name}_norm") if self.config.placement == "post" else None
            x_BTD = self._sum(x_BTD, self._normed(name, branch)(x_BTD), norm)
        return x_BTD, cache

    def _normed(self, name: str, branch):
        """The branch with the norms that stand before and after it, as a function."""
        before, after = {
            "pre": (f"{name}_norm", None),
            "post": (None, None),
            "after": (None, f"{name}_norm"),
            "sandwich": (f"{name}_norm_before", f"{name}_norm_after"),
        }[self.config.placement]
        before = None if name in self.unnormed else before

        def normed(x):
            y = rows(getattr(self, before)(x) if before else x, "length", f"{name}/input")
            y = rows(branch(y), "residual", f"{name}/output")
            return getattr(self, after)(y) if after else y

        return normed

    def _sum(self, x, y, norm=None):
        y = x + checkpoint_name(y, "branch")
        y = y if norm is None else norm(y)
        return rows(y, "residual", "residual")

    def _self_attention(self, x, context: Context, window, key, cache: Cache | None, index):
        local = window is not None and context.local_angles is not None
        angles = context.local_angles if local else context.angles
        q = self.attention.queries(x, angles)
        k, v = self.attention.keys_values(x, angles)
        if cache is not None:
            at = (index, jnp.arange(x.shape[0])[:, None], context.rule.positions)
            keys = cache.keys.at[at].set(k.astype(cache.keys.dtype), mode="drop")
            values = cache.values.at[at].set(v.astype(cache.values.dtype), mode="drop")
            cache = dataclasses.replace(cache, keys=keys, values=values)
            k, v = keys[index].astype(q.dtype), values[index].astype(q.dtype)
        bias = self.relative_bias() if hasattr(self, "relative_bias") else context.bias
        y = self.attention.attend(q, k, v, context.rule, bias=bias, window=window, key=key)
        return y, cache

    def _cross_attention(self, x, context: Context, key, cache: Cache | None, index):
        q = self.cross_attention.queries(x)
        if cache is None:
            assert context.encoded is not None
            k, v = self.cross_attention.keys_values(context.encoded)
        else:
            assert cache.cross_keys is not None
            assert cache.cross_values is not None
            k = cache.cross_keys[index].astype(q.dtype)
            v = cache.cross_values[index].astype(q.dtype)
        return self.cross_attention.attend(q, k, v, context.cross_rule or Rule(), key=key)


class Layers(nnx.Module):
    """``depth`` layers as attributes ``layers`` (stacked parameters) or ``layers_0``, ..."""

    def __init__(self, config: Transformer, scope: Scope, depth: int, *, cross: bool):
        self.config, self.depth = config, depth
        at = scope / "layers"
        self.path = at.path  # of the layers' parameters
        if not config.scan:
            for i in range(depth):
                setattr(self, f"layers_{i}", Layer(config, at.layer(i), cross=cross, first=i == 0))
            return
        template = None

        def one(key):
            nonlocal template
            template, params = stacking.split(Layer(config, at.stacked(key, depth), cross=cross))
            return params

        params = jax.vmap(one)(at.layer_keys(depth))
        assert template is not None
        self.layers = stacking.merge(template, params)

    def run(self, x_BTD, context: Context, key, cache: Cache | None = None):
        """x and cache after all layers."""
        runner = _runner.get()
        if runner is not None and cache is None:
            return runner(self, x_BTD, context, key), None
        keys = None if key is None else jax.random.split(key, self.depth)
        return (self._scanned if self.config.scan else self._unrolled)(x_BTD, context, keys, cache)

    def _function(self, template, context: Context, layer: int, *, remat: bool):
        """(params, x, key, cache, index) -> (x, cache) of the layer (or one like it)."""
        window = self.config.attention.window_of_layer(layer)

        def apply(params, x, key, cache, index):
            return stacking.merge(template, params)(x, context, window, key, cache, index)

        if self.config.remat == "none" or not remat:
            return apply
        if self.config.remat == "elementwise":

            def sparing(*args):
                with elementwise(prevent_cse=not self.config.scan):
                    return apply(*args)

            return sparing

        def again(*args):
            with gathering():
                return apply(*args)

        # Inside a scan nothing can be merged with the forward pass, so no barrier is needed.
        return jax.checkpoint(
            again, policy=_POLICIES[self.config.remat], prevent_cse=not self.config.scan
        )

    def _unrolled(self, x, context, keys, cache):
        for i in range(self.depth):
            template, params = stacking.split(getattr(self, f"layers_{i}"))
            key = None if keys is None else keys[i]
            function = self._function(template, context, i, remat=cache is None)
            x, cache = function(params, x, key, cache, i)
        return x, cache

    def _scanned(self, x, context, keys, cache):
        remat, params = cache is None, stacking.split(self.layers)[1]
        if remat and self.config.remat in _POLICIES and gathers():
            # As they will be gathered: so are all layers' gradients, until the update.
            params = _in_type(self.layers, params, self.config.compute_dtype())
        xs = (params, keys, jnp.arange(self.depth))
        if self.period > 1:
            period = self.unit(context, remat=remat)
            return jax.lax.scan(
                lambda carry, xs: (period(*carry, *xs), None), (x, cache), self.by_period(xs)
            )[0]
        layer = self._function(stacking.split(self.layers)[0], context, 0, remat=remat)

        def body(carry, xs):
            # As they come: of a slice of the parameters the backward pass would keep a copy.
            (x, cache), (own, key, index) = carry, xs
            return layer(own, x, key, cache, index), None

        return jax.lax.scan(body, (x, cache), xs)[0]

    def outputs(self, x_BTD, context: Context, key) -> tuple[jax.Array, jax.Array]:
        """x after all layers, and after each period of them, [L / period, B, T, D]."""
        keys = None if key is None else jax.random.split(key, self.depth)
        if not self.config.scan:
            outputs = []
            for i in range(self.depth):
                template, params = stacking.split(getattr(self, f"layers_{i}"))
                function = self._function(template, context, i, remat=True)
                x_BTD, _ = function(params, x_BTD, None if keys is None else keys[i], None, i)
                outputs.append(x_BTD)
            return x_BTD, jnp.stack(outputs[self.period - 1 :: self.period])
        period = self.unit(context, remat=True)

        def body(x, xs):
            x, _ = period(x, None, *xs)
            return x, x

        xs = self.by_period((stacking.split(self.layers)[1], keys, jnp.arange(self.depth)))
        return jax.lax.scan(body, x_BTD, xs)

    @property
    def period(self) -> int:
        """Layers after which their kinds of window come round."""
        return max(len(self.config.attention.window), 1)

    def by_period(self, tree: Any) -> Any:
        """Arrays [L, ...] as [L / period, period, ...]."""
        return jax.tree.map(lambda a: a.reshape(-1, self.period, *a.shape[1:]), tree)

    def unit(self, context: Context, *, remat: bool = False):
        """(x, cache, params, keys, indices) -> (x, cache) of ``period`` stacked layers."""
        template = stacking.split(self.layers)[0]
        functions = [self._function(template, context, i, remat=remat) for i in range(self.period)]

        def apply(x, cache, params, keys, indices):
            for i, function in enumerate(functions):
                at = jax.tree.map(lambda a, i=i: a[i], (params, keys, indices))
                x, cache = function(at[0], x, at[1], cache, at[2])
            return x, cache

        return apply

    def cross_keys_values(self, encoded_BSD) -> tuple[jax.Array, jax.Array]:
        """Keys and values of every layer's cross-attention, each [L, B, S, K, H]."""
        if not self.config.scan:
            each = [
                getattr(self, f"layers_{i}").cross_attention.keys_values(encoded_BSD)
                for i in range(self.depth)
            ]
            return jnp.stack([k for k, _ in each]), jnp.stack([v for _, v in each])
        template, params = stacking.split(self.layers)

        def one(_, params):
            layer = stacking.merge(template, params)
            return None, layer.cross_attention.keys_values(encoded_BSD)

        return jax.lax.scan(one, None, params)[1]


def _in_type(module: nnx.Module, params: Any, dtype) -> Any:
    """A module's parameters, its weights' in the type that they are used in."""
    if isinstance(module, WeightModule):
        return module.in_type(params, dtype)
    return {
        name: _in_type(getattr(module, name), own, dtype) if isinstance(own, dict) else own
        for name, own in params.items()
    }
