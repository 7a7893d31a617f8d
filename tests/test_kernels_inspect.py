"""The count of cycles from a compiler's listing, on one written here; and of a real kernel, where
libtpu is installed."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import pytest

from kernels import inspect, tpu_program, tpu_schedule
from kernels.attention import cases
from kernels.attention import inspect as own

# A loop of as many trips as operand 0 has positive words of five, with a skip by each word. The
# branch at 8 goes to 16 if the word is not positive; the one at 18 back to 4.
LISTING = """
= control target key start
LB: loop body

     0   :  { %s1_s0 = smov [#allocation2]  ;;  %s2_s1 = inlined_call_operand.vmem [shape: s32[1,5], index: 0, kind: input] /* operand 0 */ }
   0x1   :  { %s3_s2 = sshll.u32 %s2_s1, 4  ;;  %s4_s2 = int_to_ptr.vmem [resolvable:$true] %s3_s2 }
   0x2   :  { %5 = dma.vmem_to_smem /*vmem=*/%s4_s2, /*size_in_granules=*/16, /*smem=*/%s1_s0, /*dst_syncflagno=*/[#allocation5] }
   0x3   :  { %s6_s3 = smov 0 /* copy ;; of { nothing */ }
   0x4 LB: > { %s8_s4 = sadd.s32 1, %s7_s3  ;;  %s7_s3 = sphi %s6_s3, %s15_s3 /* phi copy
on two lines */  ;;  %90 = sst [smem:[#allocation9_spill]] %s8_s4 }
   0x5   : > { %s9_s5 = sld [smem:[#allocation2 + %s7_s3]]  ;;  %p13_p1 = scmp.ge.s32.totalorder %s8_s4, 5 }
   0x6   : > { %p10_p0 = scmp.le.s32.totalorder %s9_s5, 0 }
   0x7   : > { %40 = dma.hbm_to_vmem [thread:$0]  (!%p10_p0), /*hbm=*/%s2_s1, /*size_in_granules=*/8, /*vmem=*/%s3_s2 }
   0x8   : > { %11 = sbr.rel (%p10_p0) target bundleno = 16 (0x10), region = 3 }
   0x9   :  {}
   0xa   :  {}
   0xb   :  {}
   0xc   :  {}
   0xd   : > { %20 = vmatmul.bf16.gmra.mxu0 %v1  ;;  %v2 = vld [vmem:[#allocation7_spill] sm:$0xff] }
   0xe   : > { %21 = vmatmul.bf16.gmra.mxu1 %v1  ;;  %22 = vst [vmem:[#allocation7_spill]] %v2 }
   0xf   : > { %23 = vmatmul.f32.gmra.mxu1 %v1 }
  0x10   : > { %s14_s6 = sld [smem:[#allocation9_spill]] }
  0x11   : > { %s15_s3 = smov (%p13_p1, %s14_s6), 7 }
  0x12   : > { %12 = sbr.rel (!%p13_p1) target bundleno = 4 (0x4), region = 9 }
  0x13   :  {}
  0x14   :  {}
  0x15   :  {}
  0x16   :  { %30 = dma.vmem_to_hbm /*size_in_granules=*/4 }
  0x17   :  { %31 = vsyncpa [#allocation8], 0 }
"""  # noqa: E501


def test_cycles_of_a_loop_with_a_skip():
    found = tpu_schedule.read(LISTING, {0: [1, 0, 7, -1 & 0xFFFFFFFF, 2]})
    counts = {block.begin: (block.bundles, block.count) for block in found.blocks}
    assert counts == {0: (4, 1), 4: (9, 5), 13: (3, 3), 16: (7, 5), 23: (1, 1)}
    assert found.cycles == 4 + 9 * 5 + 3 * 3 + 7 * 5 + 1
    assert found.unknown == 0
    assert (found.hottest.begin, found.hottest.bundles) == (4, 9)
    assert found.issued(tpu_schedule.is_matmul) == 3 * 3
    assert found.spills() == 3 * 2
    assert found.moved() == 3 * 8 * 32 + 5 * 4 * 32


def test_without_the_table_every_body_runs():
    found = tpu_schedule.read(LISTING)
    assert found.unknown == 5
    assert {block.begin: block.count for block in found.blocks}[13] == 5
    assert found.moved() == 5 * (8 + 4) * 32  # so do transfers


@pytest.mark.parametrize(("word", "skips"), [(0, 1), (3, 0)])
def test_a_table_of_one_word_comes_by_value(word, skips):
    listing = """
     0   :  { %s1_s0 = inlined_call_operand.<no memory space> [shape: s32[1,1], index: 2] }
   0x1   :  { %p2_p0 = scmp.eq.s32.totalorder %s1_s0, 0 }
   0x2   :  { %3 = sbr.rel (%p2_p0) target bundleno = 8 (0x8), region = 3 }
   0x3   :  {}
   0x4   :  {}
   0x5   :  {}
   0x6   :  {}
   0x7   :  { %4 = vmatmul.bf16.gmra.mxu0 %v1 }
   0x8   :  { %5 = vsyncpa [#allocation8], 0 }
"""
    found = tpu_schedule.read(listing, {2: [word]})
    assert found.unknown == 0
    assert found.issued(tpu_schedule.is_matmul) == 1 - skips


def test_what_cannot_be_read():
    with pytest.raises(ValueError, match="no bundles"):
        tpu_schedule.read("nothing")
    endless = LISTING.replace("(!%p13_p1) target", "target")
    with pytest.raises(RuntimeError, match="no end after 50"):
        tpu_schedule.read(endless, most=50)


@pytest.mark.parametrize(
    ("instruction", "values", "want"),
    [
        ("%s9 = sshra.s32 %s1, 2", {"%s1": -9 & 0xFFFFFFFF}, -3 & 0xFFFFFFFF),
        ("%s9 = sshrl.u32 %s1, 2", {"%s1": 0x80000000}, 0x20000000),
        ("%s9 = ssub.s32 %s1, %s2", {"%s1": 1, "%s2": 2}, 0xFFFFFFFF),
        ("%s9 = sand.u32 (!%p3), 6, %s1", {"%p3": 0, "%s1": 3}, 2),
        ("%s9 = smov (%p3, %s1), 7", {"%p3": 1, "%s1": 3}, 7),
        ("%s9 = smov (!%p3, %s1), 7", {"%p3": 1, "%s1": 3}, 3),
        ("%s9 = scalar_select %p3, 5, %s1", {"%p3": 1, "%s1": 3}, 5),
        ("%s9 = smin.s32 %s1, 1", {"%s1": -1 & 0xFFFFFFFF}, 0xFFFFFFFF),
        ("%s9 = smin.u32 %s1, 1", {"%s1": 0xFFFFFFFF}, 1),
        ("%p9 = scmp.lt.s32.totalorder %s1, 0", {"%s1": 0xFFFFFFFF}, 1),
        ("%p9 = scmp.lt.u32.totalorder %s1, 0", {"%s1": 0xFFFFFFFF}, 0),
        ("%p9 = pnand %p1, %p2", {"%p1": 1, "%p2": 0}, 1),
        ("%p9 = pneg %p1", {"%p1": 1}, 0),
        ("%s9 = sdivrem.u32 %s1, %s2", {"%s1": 7, "%s2": 2}, None),
        ("%s9 = sadd.s32 %s1, %s2", {"%s1": 7}, None),
    ],
)
def test_scalar_instructions(instruction, values, want):
    result, text = instruction.split(" = ")
    name, text = text.split(" ", 1)
    machine = tpu_schedule.Machine([], {})
    machine.values |= values
    assert machine._result(tpu_schedule.Op(result, name, text)) == want


PROGRAM = """
HloModule jit_run, is_scheduled=true

%fused (p.1: f32[2]) -> f32[2] {
  ROOT %inner.1 = f32[2]{0:T(128)} add(%p.1, %p.1)
}

%condition.3 (arg.1: (s32[])) -> pred[] {
  %constant.9 = s32[]{:T(128)} constant(6)
  ROOT %lt.1 = pred[]{:T(512)} compare(%arg.1, %constant.9), direction=LT
}

%body.2 (arg.2: (s32[])) -> (s32[]) {
  %fusion.7 = f32[2]{0:T(128)} fusion(%arg.2), kind=kLoop, calls=%fused
  ROOT %while.4 = (s32[]{:T(128)}) while(%fusion.7), condition=%condition.3, body=%inmost.2, backend_config={"known_trip_count":{"n":"2"}}
}

%inmost.2 (arg.3: (s32[])) -> (s32[]) {
  ROOT %copy.8 = f32[2]{0:T(128)} copy(%arg.3)
}

ENTRY %main.1 (q.1: bf16[4,16]) -> (f32[2], s32[]) {
  %constant.1 = s32[2,3]{1,0:T(2,128)} constant({ { 11, 12, -13 }, { 14, 15, 16 } }), metadata={}
  %constant.2 = s8[1,5,2]{2,1,0:T(8,128)(4,1)} constant({ { { 1, 2 }, { 3, 4 }, { 5, 6 }, { 7, -1 }, { 9, 8 } } })
  %copy-start.1 = (s32[2,3]{1,0:T(2,128)S(1)}, s32[2,3]{1,0}, u32[]{:S(2)}) copy-start(%constant.1)
  %copy-done.1 = s32[2,3]{1,0:T(2,128)S(1)} copy-done(%copy-start.1)
  %call.5 = (bf16[4]{0}, f32[4]{0:T(1,128)S(1)}) custom-call(%copy-done.1, %constant.2, /*index=2*/%q.1), custom_call_target="tpu_custom_call", operands={%constant.1}
  %while.1 = (s32[]{:T(128)}) while(%call.5), condition=%condition.3, body=%body.2
  ROOT %fusion.6 = f32[2]{0:T(128)} fusion(%while.1), kind=kLoop, calls=%fused
}
"""  # noqa: E501


def test_how_often_operations_run_and_with_what():
    computations, entry = tpu_program.instructions(PROGRAM)
    counts = tpu_program.times(computations, entry)
    assert counts["call.5"] == counts["fusion.6"] == 1
    assert counts["fusion.7"] == 6
    assert counts["copy.8"] == 12
    assert "inner.1" not in counts, "what is fused has no code of its own"
    known = {i.name: i for body in computations.values() for i in body}
    assert known["call.5"].operands == ["copy-done.1", "constant.2", "q.1"]
    words = tpu_program.table_of(known, "copy-done.1")
    assert len(words) == 2 * 128
    assert words[:4] == [11, 12, -13 & 0xFFFFFFFF, 0]
    assert words[128:131] == [14, 15, 16]
    packed = tpu_program.table_of(known, "constant.2")
    assert packed[:2] == [0x07050301, 0xFF060402]
    assert packed[128:130] == [9, 8]
    assert tpu_program.table_of(known, "q.1") == []
    with pytest.raises(ValueError, match=r"while\.1"):
        tpu_program.times(*tpu_program.instructions(PROGRAM.replace("LT", "NE")))


def write(folder, program=PROGRAM):
    (folder / "17-TLP-hlo.txt").write_text(program)
    (folder / "18-call.5-01-packed-bundles-post-ra.txt").write_text(
        LISTING.replace("s32[1,5], index: 0", "s32[1,5], index: 1")
    )
    (folder / "19-fusion.6-00-packed-bundles-post-ra.txt").write_text(
        "   0   :  { %1 = dma.vmem_to_hbm /*size_in_granules=*/1 }\n   0x1   :  {}"
    )
    (folder / "17-TLP-00-deduplication-map.txt").write_text(
        "key:fusion.6\nordinal:1\nequivalent_hlos[size=2]:\n  fusion.6\n  fusion.7\n"
    )


def test_rows_of_a_program(tmp_path):
    write(tmp_path)
    operations = {o.name: o for o in tpu_program.read(tmp_path)}
    assert {name: o.cycles for name, o in operations.items()} == {
        "call.5": 4 + 9 * 5 + 3 + 7 * 5 + 1,  # of the packed words one is above zero
        "fusion.6": 2,
        "fusion.7": 12,
    }
    counted = inspect.Counted(list(operations.values()), temporary=3 << 20)
    chip = inspect.Chip("", ghz=2.0, mxus=2, rows=1, flops=1e12, bandwidth=1e9)
    subject = inspect.Subject("ours", print, lambda make: (), flops=5e6, bytes=2000)
    call, many, total = inspect.rows(subject, counted, chip, least=0.05)
    assert (call["loop"], call["trips"], call["spills"]) == (9, 5, 2 / 1e3)
    assert call["MXU"] == pytest.approx((16 * 2 + 8) / 2 / 88)
    assert call["MXU of loop"] == 0
    assert (many["operation"], many["times"], many["trips"]) == ("fusion.7", 6, 6)
    assert many["MB"] == pytest.approx(6 * 32 / 1e6)
    assert total["ms"] == pytest.approx((88 + 14) / 2e6)
    assert (total["ms to compute"], total["ms to move"]) == pytest.approx((5e-3, 2e-3))
    assert total["note"] == "3 MiB of temporaries"
    write(tmp_path, PROGRAM)
    (tmp_path / "20-TLP-hlo.txt").write_text(PROGRAM)
    with pytest.raises(ValueError, match="2 programs"):
        tpu_program.read(tmp_path)


def test_without_libtpu_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"pip install 'jaxpt\[tpu\]'"):
        inspect.main(["attention", "--target", "v5e"])


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra: tpu)"
)
def test_a_real_kernel(capsys):
    options = ["--batch", "1", "--heads", "2", "--length", "1024", "--causal"]
    inspect.main(["attention", *options, "--by", "pallas_tpu", "jax splash", "xla", "--json"])
    record = json.loads(capsys.readouterr().out)
    rows = {(row["by"], row["operation"]): row for row in record["rows"]}
    kernel = rows["pallas_tpu", "attention_forward.1"]
    pairs = 1024 * 1025 // 2
    total = rows["pallas_tpu", "all"]
    assert total["ms to compute"] == pytest.approx(2 * 4 * 128 * pairs / 197e12 * 1e3)
    assert total["ms to compute"] < kernel["ms"] < 10 * total["ms to compute"]
    assert kernel["ms"] <= total["ms"]
    assert 0.2 < kernel["MXU"] < 1
    least = 2 * 1024 * 128 * 2 * 4  # q, k, v and the result of two heads, bfloat16
    assert total["MB"] * 1e6 == pytest.approx(least)
    assert kernel["MB"] * 1e6 < 1.2 * least  # part may lie in VMEM already
    assert all(row["note"] is None or "unknown" not in row["note"] for row in record["rows"])


def test_subjects_of_attention():
    parser = inspect.benchmark.parser_of("inspect", "")
    args = parser.parse_args(
        ["attention", "--blocks", "128", "256", "128", "128", "--length", "512", "--bias", "t5",
         "--backward", "--by", "pallas_tpu", "plain XLA"]
    )  # fmt: skip
    ours, plain = own.subjects(args)
    case = cases.Case(length=512, bias="t5", backward=True)
    assert (ours.name, plain.name) == ("pallas_tpu", "plain XLA")
    assert ours.flops == plain.flops == case.flops()
    arguments = ours.arguments(jax.ShapeDtypeStruct)
    assert arguments[0].shape == (4, 512, 16, 128)
    text = str(jax.jit(ours.function).trace(*arguments).jaxpr)
    assert "128,128" in text
    assert jnp.bfloat16 == arguments[0].dtype
