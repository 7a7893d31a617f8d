"""Weights held as blocks, and as two of every four: what they stand for, how supports change."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_low_rank import AXES
from test_low_rank import build as build_weight
from test_sparse_training import sparse_run, stepped
from test_steps import host_batches, program_of
from weight_cases import Matrices, matrices

from jaxpt.config import codec
from jaxpt.errors import ConfigError
from jaxpt.growth import Convert
from jaxpt.mesh import Mesh
from jaxpt.models import stacking
from jaxpt.sparsity import Gradual, RigL
from jaxpt.state import flatten
from jaxpt.weights import (
    Blocks,
    BlocksInParts,
    BlockSparse,
    Dense,
    Groups,
    LowRankPlusBlockSparse,
    Masked,
    TwoFour,
)
from jaxpt.weights.base import replaced
from jaxpt.weights.two_four import pack, unpack

D_IN, D_OUT = 16, 20
build: Any = build_weight
EVEN = BlocksInParts(4, 5, 1, 0)
SPARSE = [
    BlockSparse(0.3, Blocks(5, 8)),  # blocks that reach beyond both edges
    BlockSparse(0.5, EVEN),
    BlockSparse(0.5, BlocksInParts(4, 5, 2, 2)),
    TwoFour(),
]
ALL = [*SPARSE, LowRankPlusBlockSparse(3, 6.0, 0.2, Blocks(4, 4))]


def units(module):
    """Entries of the matrix that are held, bool [d_in, d_out]."""
    pattern = module.pattern if hasattr(module, "pattern") else Groups(4)
    return pattern.spread(module.support(), D_IN, D_OUT)


@pytest.mark.parametrize("config", ALL, ids=str)
def test_a_weight_multiplies_by_the_matrix_that_it_stands_for(config):
    module, record = build(config, D_IN, D_OUT)
    if hasattr(module, "b"):
        module.b[...] = jax.random.normal(jax.random.key(3), module.b.shape)
    template, params = stacking.split(module)
    x, g = (jax.random.normal(jax.random.key(i), (2, 3, d)) for i, d in ((1, D_IN), (2, D_OUT)))

    def run(through):
        def f(x, params):
            module = stacking.merge(template, params)
            return module(x) if through else x @ module.dense()

        @jax.jit
        def both(x, params):
            trained = {n: p for n, p in params.items() if p.dtype == jnp.float32}
            y, pull = jax.vjp(lambda x, t: f(x, params | t), x, trained)
            return y, *pull(g)

        return both(x, params)

    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, atol=2e-5), run(True), run(False))
    low = module(x.astype(jnp.bfloat16))
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(jnp.float32), run(False)[0], atol=0.15)
    trained = [t for t in record.tensors.values() if t.trained]
    assert sum(np.prod(t.shape) for t in trained) == config.parameters(D_IN, D_OUT)
    held = np.asarray(units(module))
    assert float(module.entries()) == held.sum()
    if config in SPARSE:
        assert not np.asarray(module.dense())[~held].any()
        kept = np.asarray(config.pattern.held(module.support()))
        assert (kept == config.count(D_IN, D_OUT)).all(), "sparsity asked = sparsity held"


@pytest.mark.parametrize("config", SPARSE, ids=str)
def test_what_stays_goes_along_and_what_is_new_is_0(config):
    """``places`` and ``carry`` against a mask."""
    module, _ = build(config, D_IN, D_OUT)
    (name,) = config.held
    for seed in range(2):
        support = config.pattern.draw(jax.random.key(seed), config.count(D_IN, D_OUT), D_IN, D_OUT)
        carried = module.carry(getattr(module, name)[...], support)
        after = replaced(module, **{name: carried}, **module.places(support))
        np.testing.assert_array_equal(after.support(), support)
        want = jnp.where(units(after), module.dense(), 0)
        np.testing.assert_array_equal(after.dense(), want)
        assert 0 < np.count_nonzero(want) < np.count_nonzero(module.dense())


def test_from_dense_keeps_the_strongest():
    matrix = jax.random.normal(jax.random.key(0), (D_IN, D_OUT))
    for config in SPARSE:
        module, _ = build(config, D_IN, D_OUT)
        made = module.from_dense(matrix)
        np.testing.assert_array_equal(made.dense(), jnp.where(units(made), matrix, 0))
        squares = config.pattern.mean(jnp.square(matrix))
        if config == SPARSE[0]:  # blocks at the edge are smaller
            squares *= config.pattern.mean(jnp.ones_like(matrix))
            ones = jnp.ones((D_IN, D_OUT))
            padded = jnp.pad(ones, ((0, 4), (0, 4))).reshape(4, 5, 3, 8).sum((1, 3))
            squares = squares * padded
        best = config.pattern.top(squares, config.count(D_IN, D_OUT))
        np.testing.assert_array_equal(made.support(), best)
    low, _ = build(LowRankPlusBlockSparse(2, 4.0, 0.2, Blocks(4, 4)), D_IN, D_OUT)
    target = replaced(low, b=jax.random.normal(jax.random.key(1), low.b.shape)).dense()
    far, near = (float(jnp.linalg.norm(m.dense() - target)) for m in (low, low.from_dense(target)))
    assert near < 0.05 * far


@pytest.mark.parametrize("sides", [Mesh(data=2, tensor=4), Mesh(data=2, fsdp=2, tensor=2)], ids=str)
def test_eight_devices_equal_one(sides):
    """As a first matrix, whose outputs are cut, and as a second one, whose inputs are."""
    configs = (
        BlockSparse(0.5, BlocksInParts(4, 4, 1, 4)),
        BlockSparse(0.5, BlocksInParts(4, 4, 4, 1)),
    )
    up, record = build(configs[0], 16, 32)
    at = build_scope(configs[1])
    down = at[0]
    tensors = record.tensors | at[1].tensors
    templates, params = zip(*(stacking.split(m) for m in (up, down)), strict=True)
    x = jax.random.normal(jax.random.key(1), (4, 6, 16))

    def loss(params, x):
        up, down = (stacking.merge(t, p) for t, p in zip(templates, params, strict=True))
        return jnp.sum(jnp.sin(down(jnp.tanh(up(x)))))

    def floats(params):
        return [{"blocks": p["blocks"]} for p in params]

    def gradients(params, x):
        def f(some, x):
            return loss([p | s for p, s in zip(params, some, strict=True)], x)

        return jax.value_and_grad(f, argnums=(0, 1))(floats(params), x)

    want = jax.jit(gradients)(list(params), x)
    layout = sides.build()
    with layout.active():
        laid = [
            {
                name: jax.device_put(
                    a, layout.sharding(tensors[f"model/{of}/{name}"].axes, a.shape)
                )
                for name, a in p.items()
            }
            for of, p in zip(("up", "down"), params, strict=True)
        ]
        assert len(laid[0]["blocks"].sharding.device_set) == 8
        assert laid[0]["blocks"].addressable_shards[0].data.shape[1] < 4
        got = jax.jit(gradients)(laid, x)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, atol=2e-4), got, want)


def build_scope(config):
    """The second matrix of an MLP."""
    from jaxpt.weights import FanIn
    from jaxpt.weights.base import Record, Rules, Scope

    record = Record()
    scope = Scope(jax.random.key(1), Rules((("*", config),)), record, path="model")
    return scope.weight("down", 32, 16, AXES[::-1], FanIn()), record


def test_rigl_exchanges_blocks_at_a_fixed_count(tmp_path):
    """In the compiled step: which blocks change only when it is due, as many as before, and new
    ones begin at 0."""
    weights = (("*/mlp/*", BlockSparse(0.5, Blocks(4, 8))), ("*", Dense()))
    run = sparse_run(tmp_path, RigL(every=2, stop=4, drop=0.5), weights=weights, steps=5)
    program = program_of(run)
    program.check()
    found, _ = stepped(program, host_batches(program, run, 5))
    supports, blocks = [], []
    for state, metrics in found:
        flat = flatten(state.params)
        path = next(p for p in flat if p.endswith("up/blocks")).removesuffix("blocks")
        rows, columns = (flat[f"{path}{name}"][:, 0, 0] for name in ("rows", "columns"))
        supports.append([set(zip(r, c, strict=True)) for r, c in zip(rows, columns, strict=True)])
        assert all(len(s) == 8 for s in supports[-1])
        blocks.append(flat[f"{path}blocks"])
        assert metrics["density"] == pytest.approx(0.5)
    changed = [supports[i] != supports[i - 1] for i in range(1, 5)]
    assert changed == [False, True, False, False], "of the last one the share is 0"
    assert np.abs(blocks[-1] - blocks[-2]).max() > 0
    new = [
        (layer, slot)
        for layer in range(2)
        for slot, at in enumerate(sorted(supports[2][layer], key=lambda p: (p[1], p[0])))
        if at not in supports[1][layer]
    ]
    assert new
    for layer, slot in new:  # trained by one step from 0
        assert 0 < np.abs(blocks[2][layer, 0, 0, slot]).max() < 0.05


def test_gradual_pruning_refuses_what_holds_a_fixed_number(tmp_path):
    run = sparse_run(tmp_path, Gradual(), weights=(("*", BlockSparse(0.5, Blocks(4, 4))),))
    with pytest.raises(ConfigError, match="holds a fixed number of units"):
        program_of(run).check()


def test_masked_blocks_become_blocks():
    """The way from gradual pruning to work that is skipped: the same matrices, held otherwise."""
    masked, blocks = (
        Matrices((("*/up", weight), ("*", Dense()))).build(5)
        for weight in (Masked(0.25, Blocks(4, 5)), BlockSparse(0.25, Blocks(4, 5)))
    )
    params = jax.jit(masked.init)(jax.random.key(0))
    Convert().validate(masked, blocks)
    after = jax.jit(lambda p: Convert()(p, masked, blocks, jax.random.key(1)))(params)
    before, now = matrices(masked, params), matrices(blocks, after)
    for path, matrix in before.items():
        np.testing.assert_array_equal(now[path], matrix)
    assert np.count_nonzero(now["layers/up"]) == 3 * 3 * 20


def test_two_bits_a_place():
    rng = np.random.default_rng(0)
    for groups in (1, 2, 5):
        places = np.sort(rng.permuted(np.tile(np.arange(4), (groups, 7, 1)), axis=-1)[..., :2])
        places = jnp.asarray(places.swapaxes(1, 2))
        packed = pack(places)
        assert (packed.dtype, packed.shape) == (jnp.uint8, (-(-groups // 2), 7))
        np.testing.assert_array_equal(unpack(packed, groups), places)
    module, _ = build(TwoFour(), 64, 32)
    dense = 64 * 32 * 2
    held = module.values[...].astype(jnp.bfloat16).nbytes + module.indices[...].nbytes
    assert held / dense == 9 / 16


@pytest.mark.parametrize("config", [TwoFour(), LowRankPlusBlockSparse(3, 6.0, 0.1, Blocks(8, 8))])
def test_the_backward_pass_keeps_no_matrix(config):
    d_in, d_out = 64, 48
    module, _ = build(config, d_in, d_out)
    template, params = stacking.split(module)
    x = jnp.ones((4, d_in))

    def f(x, params):
        return stacking.merge(template, params)(x)

    kept = jax.tree.leaves(jax.vjp(f, x, params)[1])
    assert [a.shape for a in kept if a.size >= d_in * d_out] == []
    if isinstance(config, LowRankPlusBlockSparse):
        text = str(
            jax.make_jaxpr(lambda x, p: jax.vjp(f, x, p)[1](jnp.ones((4, d_out))))(x, params)
        )
        assert f"[{d_in},{d_out}]" not in text, "W is formed"


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: BlockSparse(0.0), "density"),
        (lambda: LowRankPlusBlockSparse(density=2.0), "density"),
        (lambda: LowRankPlusBlockSparse(rank=0), "rank"),
        (lambda: LowRankPlusBlockSparse(alpha=0.0), "alpha"),
        (lambda: BlocksInParts(0), "rows"),
        (lambda: BlocksInParts(inputs=-1), "inputs"),
        (lambda: TwoFour(0.25), "density"),
        (lambda: build(TwoFour(), 6, 4), "weights"),
        (lambda: build(BlockSparse(0.5, BlocksInParts(4, 4, 3)), 16, 16), "weights"),
    ],
)
def test_wrong_choices_are_named(make, field):
    with pytest.raises(ConfigError) as error:
        make()
    assert error.value.field == field


@pytest.mark.parametrize("config", ALL, ids=str)
def test_configs_go_to_json_and_back_and_say_what_they_cost(config):
    assert codec.from_json(codec.to_json(config), type(config)) == config
    assert config.cost.split(":")[0].startswith(("faster", "smaller"))
