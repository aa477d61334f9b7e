"""The executor of PTX, on programs small enough to work out by hand."""

from __future__ import annotations

import re

import numpy as np
import ptx
import pytest

KERNEL = """
.version 8.7
.target sm_90a
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0,
	.param .u32 kernel_param_1
)
{{
	.reg .pred 	%p<9>;
	.reg .b32 	%r<99>;
	.reg .b64 	%rd<9>;
	ld.param.b64 	%rd1, [kernel_param_0];
	ld.param.b32 	%r1, [kernel_param_1];
	mov.u32 	%r2, %tid.x;   // lanes
	mad.wide.u32 	%rd2, %r2, 4, %rd1;
{body}
	st.global.b32 [ %rd2 + 0 ], {{ %r9 }};
	ret;
}}
"""


def run(body: str, content: np.ndarray | None = None, argument: int = 0, ordered: bool = False) -> np.ndarray:
    """What 32 threads leave in as many numbers of 32 bits."""
    content = np.zeros(32, np.uint32) if content is None else content
    memory = ptx.Memory()
    start = memory.allocate(content.tobytes())
    ptx.launch(KERNEL.format(body=body), memory, [start, argument], programs=1, warps=1, shared=256, ordered=ordered)
    return memory.bytes[start : start + content.nbytes].view(content.dtype)


LANE = np.arange(32, dtype=np.uint32)


def test_products_are_rounded_but_in_multiply_adds() -> None:
    values = np.full(32, 1 + 2**-12, np.float32)
    load = "ld.global.b32 { %r3 }, [ %rd2 + 0 ];\n mul.f32 %r4, %r3, %r3;\n neg.f32 %r5, %r4;\n"
    assert (run(load + "add.f32 %r9, %r4, %r5;", values) == 0).all()
    assert (run(load + "fma.rn.f32 %r9, %r3, %r3, %r5;", values) == 2**-24).all()


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_a_half_less_a_float(kind: str) -> None:
    half = f"cvt.rn.{kind}.f32 %rs1, %r3;\n mov.b32 %r4, 0f3F000000;\n"
    found = run(
        f"ld.global.b32 {{ %r3 }}, [ %rd2 + 0 ];\n{half}sub.rn.f32.{kind} %r9, %rs1, %r4;", LANE.astype(np.float32)
    )
    assert (found == LANE - 0.5).all()


def test_predicates_keep_what_was_there() -> None:
    found = run("setp.lt.u32 %p1, %r2, 5;\n mov.b32 %r9, 7;\n @!%p1 mov.b32 %r9, %r1;", argument=3)
    assert found.tolist() == [7] * 5 + [3] * 27


def test_integers() -> None:
    assert (run("bfe.s32 %r9, %r2, 1, 2;").view(np.int32) == (LANE.astype(np.int32) >> 1 & 3 ^ 2) - 2).all()
    assert (run("bfe.u32 %r9, %r2, 1, 2;") == LANE >> 1 & 3).all()
    assert (run("add.s32 %r3, %r2, 16;\n shl.b32 %r9, 1, %r3;")[16:] == 0).all()  # no machine's wrap around 32
    assert (run("mov.b32 %r3, -8;\n add.s32 %r4, %r2, 30;\n shr.s32 %r9, %r3, %r4;").view(np.int32) == -1).all()
    assert (run("mov.b32 %r3, 0x11223344;\n prmt.b32 %r9, %r3, 0, 0x7701U;") == 0x4433).all()
    assert (run("mov.b32 %r3, 0x91223344;\n prmt.b32 %r9, %r3, 0, 0x77BBU;") == 0xFFFF).all()
    by_lane = run("mov.b32 %r3, 0x11223344;\n prmt.b32 %r9, %r3, 0, %r2;")  # every other digit is 0
    assert by_lane[[0, 1, 2, 3, 0x10]].tolist() == [0x44444444, 0x44444433, 0x44444422, 0x44444411, 0x44443344]


def test_half_precision_rounds_to_even() -> None:
    values = np.array([1 + 2**-8, 1 + 3 * 2**-8, np.nan, -np.inf] * 8, np.float32)
    pair = "ld.global.b32 { %r3 }, [ %rd2 + 0 ];\n cvt.rn.bf16x2.f32 %r9, %r3, %r3;"
    assert run(pair, values).view(np.uint32)[:4].tolist() == [0x3F803F80, 0x3F823F82, 0x7FFF7FFF, 0xFF80FF80]


def test_maxima_let_nan_through_where_they_should() -> None:
    values = np.array([np.nan, 1, -1, np.inf] * 8, np.float32)
    load = "ld.global.b32 { %r3 }, [ %rd2 + 0 ];\n mov.b32 %r4, 0f00000000;\n"
    assert run(load + "max.f32 %r9, %r3, %r4;", values)[:4].tolist() == [0, 1, 0, np.inf]
    assert np.isnan(run(load + "max.NaN.f32 %r9, %r3, %r4;", values)[0])
    three = load + "mov.b32 %r5, 0f40000000;\n max.f32 %r9, %r3, %r4, %r5;"
    assert run(three, values)[:4].tolist() == [2, 2, 2, np.inf]


def test_both_halves_of_a_register() -> None:
    """In bfloat16: NaN and 1 in its halves; -2 and infinity in those of another."""
    both = "mov.b32 %r3, 0x7FC03F80;\n mov.b32 %r4, 0xC0007F80;\n"
    assert (run(both + "max.bf16x2 %r9, %r3, %r4;") == 0xC0007F80).all()
    assert (run(both + "max.NaN.bf16x2 %r9, %r3, %r4;") == 0x7FC07F80).all()
    assert (run("mov.b32 %r3, 0x7E003C00;\n mov.b32 %r4, 0xC0007C00;\n max.f16x2 %r9, %r3, %r4;") == 0xC0007C00).all()


def test_the_approximate_quotient_ends_where_reciprocals_are_subnormal() -> None:
    values = np.array([2.0**125, 2.0**127, np.inf, np.nan] * 8, np.float32)
    load = "ld.global.b32 { %r3 }, [ %rd2 + 0 ];\n mov.b32 %r4, 0f41000000;\n"
    found = run(load + "div.approx.ftz.f32 %r9, %r4, %r3;", values)[:4]
    assert found[:3].tolist() == [2.0**-122, 0, 0] and np.isnan(found[3])


def test_threads_that_went_apart_exchange_when_all_are_there() -> None:
    """The way back lies before the way there: the one that is behind must not go alone."""
    body = """
	mov.b32 %r9, %r2;
	setp.lt.u32 %p1, %r2, 3;
	@%p1 bra $there;
	bra.uni $back;
$back:
	shfl.sync.bfly.b32 %r9, %r9, 1, 31, -1;
	bra.uni $end;
$there:
	add.s32 %r9, %r9, 100;
	bra.uni $back;
$end:
"""
    found = run(body)
    assert found[:4].tolist() == [101, 100, 3, 102] and (found[4:] == (LANE ^ 1)[4:]).all()


def test_threads_that_never_meet_are_an_error() -> None:
    body = """
	setp.lt.u32 %p1, %r2, 3;
	@%p1 bra $end;
	bar.sync 0;
$end:
	mov.b32 %r9, 0;
	bar.sync 0;
	bar.sync 0;
"""
    with pytest.raises(RuntimeError, match=r"threads wait for each other at bar\.sync"):
        run(body)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("add.s64 %rd3, %rd2, 2;\n ld.global.b32 { %r9 }, [ %rd3 + 0 ];", "4 bytes is not aligned"),
        ("ld.global.v4.b32 { %r9, %r4, %r5, %r6 }, [ %rd2 + 0 ];", "16 bytes is not aligned"),
        ("ld.global.b32 { %r9 }, [ %rd2 + 4 ];", "lies beside every allocation"),
        ("add.s64 %rd3, %rd2, -4;\n st.global.b32 [ %rd3 + 0 ], { %r2 };", "lies beside every allocation"),
        ("mov.b32 %r3, 254;\n ld.shared.b32 %r9, [%r3];", "shared memory is not aligned"),
        ("mov.b32 %r3, 256;\n ld.shared.b32 %r9, [%r3];", "shared memory is not aligned, or beside it"),
        ("mov.b32 %r3, -4;\n st.shared.b32 [%r3], %r2;", "shared memory is not aligned, or beside it"),
        ("tanh.approx.f32 %r9, %r2;", "not understood: tanh"),
        ("mul.hi.u32 %r9, %r2, 4;", "not understood: mul.hi"),
        ("shfl.sync.down.b32 %r9, %r2, 1, 31, -1;", "not understood: shfl.sync.down"),
        ("setp.lt.and.u32 %p1, %r2, 3, %p2;", "not understood: setp.lt.and"),
        ("cvt.rni.s32.f32 %r9, %r2;", "not understood: cvt.rni"),
        ("ld.global.s8 %r9, [%rd2];", "not understood: ld.global.s8"),
    ],
)
def test_what_a_gpu_would_not_do_is_an_error(body: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=re.escape(message)):
        run(body)


def test_what_lies_behind_a_tensor_is_read_and_not_written() -> None:
    """An access of 16 bytes that begins within a tensor lies within its allocation."""
    store = "add.s64 %rd3, %rd2, 4;\n st.global.b32 [ %rd3 + 0 ], { %r2 };"
    load = "ld.global.b32 { %r9 }, [ %rd2 + 4 ];"
    content = np.zeros(33, np.uint32)
    run(load + store, content)
    memory = ptx.Memory()
    start = memory.allocate(content[:31].tobytes())
    with pytest.raises(RuntimeError, match="beside every allocation: st"):
        ptx.launch(KERNEL.format(body="mov.b32 %r9, 0;"), memory, [start, 0], programs=1, warps=1, shared=0)


def test_subnormal_numbers_are_flushed_where_it_is_asked_for() -> None:
    values = np.full(32, 2.0**-140, np.float32)
    load = "ld.global.b32 { %r3 }, [ %rd2 + 0 ];\n mov.b32 %r4, 0f3F800000;\n mov.b32 %r5, 0f00000000;\n"
    assert (run(load + "fma.rn.f32 %r9, %r3, %r4, %r5;", values) == values).all()
    assert (run(load + "fma.rn.ftz.f32 %r9, %r3, %r4, %r5;", values) == 0).all()


def test_threads_read_from_a_lane() -> None:
    assert (run("shfl.sync.idx.b32 %r9, %r2, 5, 31, -1;") == 5).all()


def test_layouts_are_exchanged_by_matrices() -> None:
    """Stored in rows and read back as they are, and transposed."""
    store = """
	and.b32 %r3, %r2, 7;
	shl.b32 %r4, %r3, 4;
	shl.b32 %r5, %r2, 1;
	add.s32 %r6, %r5, 1;
	shl.b32 %r7, %r6, 16;
	or.b32 %r8, %r7, %r5;
	stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r4], {%r8};
	bar.sync 0;
"""
    plain = run(store + "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r9}, [%r4];")
    assert (plain == 2 * LANE + ((2 * LANE + 1) << 16)).all()
    turned = run(store + "ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%r9}, [%r4];")
    low = 8 * (2 * (LANE % 4)) + LANE // 4  # element (row, column) holds 8 row + column
    assert (turned == low + ((low + 8) << 16)).all()


def test_nothing_orders_accesses_but_a_barrier() -> None:
    """A thread reads what another one writes, before that or after; or both write."""
    other = "xor.b32 %r3, %r2, 1;\n mad.wide.u32 %rd3, %r3, 4, %rd1;\n"
    read, barrier = "ld.global.b32 { %r9 }, [ %rd3 + 0 ];\n", "bar.sync 0;\n"
    wrote = "st.global.b32 [ %rd3 + 0 ], { %r2 };\n"
    own = "st.global.b32 [ %rd2 + 0 ], { %r2 };\n"
    assert (run(other + read + barrier, LANE, ordered=True) == LANE ^ 1).all()
    assert (run(own + barrier + other + read + barrier, ordered=True) == LANE ^ 1).all()
    assert (run(other + wrote + barrier + "mov.b32 %r9, 5;\n", ordered=True) == 5).all()
    run("ld.global.b32 { %r9 }, [ %rd2 + 0 ];\n", LANE, ordered=True)  # its own place
    all_read_one = "ld.global.b32 { %r9 }, [ %rd1 + 0 ];\n"
    run(all_read_one + barrier + "ld.global.b32 { %r9 }, [ %rd2 + 0 ];\n", LANE, ordered=True)
    for races in (other + read, own + other + read + barrier, other + wrote + "mov.b32 %r9, 5;\n"):
        run(races, LANE)
        with pytest.raises(RuntimeError, match="no barrier lies between"):
            run(races, LANE, ordered=True)
    with pytest.raises(RuntimeError, match="no barrier lies between"):
        run(all_read_one, LANE, ordered=True)
