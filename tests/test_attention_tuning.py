"""Block sizes: what a length costs by a kernel's code, what wins, and what the kernels are told."""

import types

import jax
import jax.numpy as jnp
import pytest

from kernels import inspect, tpu_schedule
from kernels.attention import blocks, tpu, tune, tuned, tuning
from kernels.platform import compiling_for
from kernels.tpu_program import Operation

# Three pairs; each takes 7 cycles, one more of kind FULL 100 and of DIAGONAL 40, and 10 where a row
# of pairs ends. There are 3 before and 2 after them.
LISTING = """
   0   :  { %s1 = smov [#allocation2]  ;;  %s2 = inlined_call_operand.vmem [shape: s32[1,3], index: 0] }
   0x1   :  { %5 = dma.vmem_to_smem /*vmem=*/%s2, /*size_in_granules=*/16, /*smem=*/%s1 }
   0x2   :  { %s6 = smov 0 }
   0x3   :  { %s7 = sphi %s6, %s8  ;;  %s9 = sld [smem:[#allocation2 + %s7]]  ;;  %s8 = sadd.s32 1, %s7 }
   0x4   :  { %s10 = sshrl.u32 %s9, KIND  ;;  %s11 = sand.u32 3, %s10  ;;  %s12 = sand.u32 LAST, %s9 }
   0x5   :  { %p13 = scmp.ne.s32.totalorder %s11, FULL  ;;  %p14 = scmp.ne.s32.totalorder %s11, DIAGONAL }
   0x6   :  { %p15 = scmp.eq.s32.totalorder %s12, 0  ;;  %p16 = scmp.ge.s32.totalorder %s8, 3 }
"""  # noqa: E501


def listing() -> str:
    """With branches, of five cycles each, about what only some pairs do."""
    lines, at = [LISTING], 7
    for predicate, cycles in (("%p13", 100), ("%p14", 40), ("%p15", 10)):
        after = at + 5 + cycles
        lines.append(f"  {at:#x}   :  {{ %1 = sbr.rel ({predicate}) target bundleno = {after} }}\n")
        lines += [f"  {n:#x}   :  {{}}\n" for n in range(at + 1, after)]
        at = after
    lines.append(f"  {at:#x}   :  {{ %2 = sbr.rel (!%p16) target bundleno = 3 }}\n")
    lines += [f"  {at + n:#x}   :  {{}}\n" for n in range(1, 7)]
    text = "".join(lines)
    for name in ("KIND", "FULL", "DIAGONAL"):
        text = text.replace(name, str(getattr(blocks, name)))
    return text.replace("LAST", str(1 << blocks.LAST))


STEP = 4 + 4 * 5  # of a pair of no kind


def test_costs_of_pairs_are_read_off_the_code():
    schedule = tpu_schedule.read(listing())
    cost = tune.cost(schedule, least=0)
    assert cost == tune.Cost(full=STEP + 100, diagonal=STEP + 40, row=10, head=3 + 2)
    # Four rows: four pairs of the diagonal and six below it.
    assert cost.of(4 * 256, 256) == 5 + 4 * 10 + 4 * (STEP + 40) + 6 * (STEP + 100)
    slow = tune.cost(schedule, least=90)  # keys that take longer than the work of a diagonal pair
    assert (slow.full, slow.diagonal) == (STEP + 100, 90)


def test_the_fewest_cycles_win(monkeypatch):
    costs = {  # by block and chunk
        (512, 128): tune.Cost(100, 60, 0, 0),
        (1024, 128): tune.Cost(350, 200, 0, 0),
        (1024, 256): tune.Cost(300, 210, 0, 0),
    }
    monkeypatch.setattr(tune, "cost", lambda schedule, least: costs[schedule])
    found = []
    for key in costs:
        operations = [Operation(f"x_attention_{d}.1", "", 1, key) for d in ("forward", "backward")]
        found.append((*key, inspect.Counted(operations, 0)))
    found.append((256, 128, inspect.Counted([], 0, "RESOURCE_EXHAUSTED: of VMEM")))
    best = tune.winners(found, 64, inspect.CHIPS["v5e"])
    assert best[512] == (512, 512, 128, 128)
    assert best[1024] == (1024, 1024, 128, 128)  # 200; 2 * 60 + 100 of the small ones
    assert best[8192] == (1024, 1024, 256, 256)
    text = tune.text({"v5e": {(64, True): best}}, {"v5e": ("by hand", "today")})
    made: dict = {}
    exec(text, made)
    assert made["SIZES"] == {"v5e": {(64, True): best}}
    assert made["MADE"] == {"v5e": ("by hand", "today")}


ROWS = {
    (64, False): {512: (512, 256, 128, 128), 2048: (1024, 512, 256, 256)},
    (256, False): {512: (128, 128, 128, 128)},
}


@pytest.mark.parametrize(
    ("width", "length", "sizes"),
    [
        (64, 100, (512, 256, 128, 128)),
        (32, 2047, (512, 256, 128, 128)),
        (64, 9000, (1024, 512, 256, 256)),
        (65, 9000, (128, 128, 128, 128)),
        (300, 512, (128, 128, 128, 128)),
    ],
)
def test_sizes_are_those_of_the_next_width_and_the_length_below(width, length, sizes, monkeypatch):
    monkeypatch.setattr(tuned, "SIZES", {"v5e": ROWS})
    assert tuning.best_sizes(width, False, length) == tuning.Sizes(*sizes)


def test_every_chip_has_sizes():
    for chip in tuning.CHIPS:
        device = types.SimpleNamespace(platform="tpu", device_kind=chip.kinds[0])
        with compiling_for(device):
            assert tuning.chip() == chip
            for biased in (False, True):
                sizes = tuning.best_sizes(64, biased, 4096)
                assert sizes.forward % 128 == sizes.backward_chunk % 128 == 0


def test_keys_must_fit_the_chip():
    """Gradients of keys and values are held in VMEM: v5p has half as much as v5e."""
    q = jax.ShapeDtypeStruct((1, 128, 1, 128), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1, 32768, 1, 128), jnp.bfloat16)
    given = dict.fromkeys(("positions", "kv_positions", "bias", "dropout"))
    for kind, refused in (("TPU v5 lite", None), ("TPU v5p", "length of keys")):
        with compiling_for(types.SimpleNamespace(platform="tpu", device_kind=kind)):
            assert tpu.unserved(q, k, k, **given) == refused
