"""A model of next to nothing, with stacked and single weights, for what is done to weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxpt.models import stacking
from jaxpt.models.base import ModelConfig
from jaxpt.state import TrainState, flatten, unflatten
from jaxpt.weights import Constant, Dense, FanIn
from jaxpt.weights.base import Rules

KEY = jax.random.key(0)


@dataclasses.dataclass(frozen=True)
class Matrices(ModelConfig):
    """``layers`` layers of up [12, 20], down [20, 12] and a norm, and a head [12, 8]."""

    weights: tuple = (("*", Dense()),)
    layers: int = 3
    dtype: str = "float32"
    scan: bool = True

    @property
    def stacked(self):
        return self.scan

    def with_stacks(self):
        return dataclasses.replace(self, scan=True)

    @property
    def rules(self):
        return Rules(self.weights, (), self.dtype)

    def network(self, vocab_size, scope):
        return Chain(self, scope)


class Layer(nnx.Module):
    def __init__(self, scope):
        self.up = scope.weight("up", 12, 20, ("embed", "mlp"), FanIn())
        self.down = scope.weight("down", 20, 12, ("mlp", "embed"), FanIn())
        self.scale = scope.param("scale", (12,), ("width",), Constant(1.0), kind="norm")


class Chain(nnx.Module):
    def __init__(self, config, scope):
        self.head = scope.weight("head", 12, 8, ("embed", "vocab"), FanIn())
        at = scope / "layers"
        if not config.scan:
            for i in range(config.layers):
                setattr(self, f"layers_{i}", Layer(at.layer(i)))
            return

        def one(key):
            nonlocal template
            template, params = stacking.split(Layer(at.stacked(key, config.layers)))
            return params

        template = None
        params = jax.vmap(one)(at.layer_keys(config.layers))
        self.layers = stacking.merge(template, params)


def trained_state(model, optimizer, count: int, seed: int = 1) -> TrainState:
    """A state after ``count`` updates of a run's last phase, drawn in numpy: nothing compiles."""
    rng = np.random.default_rng(seed)

    def drawn(x, low):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.asarray(rng.integers(1, 4, x.shape), x.dtype)
        return jnp.asarray(rng.uniform(low, 0.5, x.shape), x.dtype)

    params = jax.tree.map(lambda x: drawn(x, -0.5), model.abstract())
    states = jax.eval_shape(optimizer.init, params)
    states = jax.tree.map(lambda x: drawn(x, 0.1), states)
    return TrainState(jnp.int32(count + 7), params, states._replace(count=jnp.int32(count)), {})


def first_state(program, seed: int = 0) -> TrainState:
    """A state that a phase may begin with, on the program's devices; drawn in numpy, which takes
    none of the seconds that ``program.init`` compiles for."""
    rng = np.random.default_rng(seed)

    def value(tensor):
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            return rng.integers(1, 4, tensor.shape).astype(tensor.dtype)
        plain = 1.0 if tensor.weight == "norm" else 0.01 if tensor.weight == "frozen" else 0.0
        return (plain + tensor.std * rng.normal(size=tensor.shape)).astype(tensor.dtype)

    state = program.abstract
    params = {path: value(tensor) for path, tensor in program.model.tensors.items()}
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state)
    state = dataclasses.replace(zeros, params=unflatten(params))
    return jax.device_put(state, jax.tree.map(lambda x: x.sharding, program.abstract))


def run_steps(program, batches, state=None):
    """(losses, state) after a step on each batch."""
    state, key, losses = first_state(program) if state is None else state, jax.random.key(1), []
    for batch in batches:
        state, metrics = program.train_step(state, program.put(batch), key)
        losses.append(float(metrics["loss"][0]) / float(metrics["loss"][1]))
    return losses, state


def matrices(model, params) -> dict[str, np.ndarray]:
    """Path of a weight -> the matrices that it stands for, [L, d_in, d_out] or [d_in, d_out]."""

    @jax.jit
    def dense(params):
        found, flat = {}, flatten(params)
        for path, product in model.products.items():
            own = {p.rpartition("/")[2]: x for p, x in flat.items() if p.rpartition("/")[0] == path}
            stacked = model.tensors[f"{path}/{next(iter(own))}"].stacked
            one = lambda own, product=product: product.module(own).dense()  # noqa: E731
            found[path] = jax.vmap(one)(own) if stacked else one(own)
        return found

    return jax.tree.map(np.asarray, dense(params))


def build(optimizer, model):
    return optimizer.build(model.tensors, lambda step: jnp.float32(0.1))
