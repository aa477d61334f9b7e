"""The reader of machine code, on a program small enough to count by hand."""

from __future__ import annotations

import pytest

from benchmarks.machine_code import parse_gcn, parse_sass

KERNEL = """
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/              @P0  EXIT ;
.L_x_0:
        /*0020*/               @P1 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/               @P1 BRA `(.L_x_1) ;
        /*0040*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0050*/                   IADD3 R1, R1, 0x1, RZ ;
.L_x_1:
        /*0060*/                   MUFU.EX2 R4, R4 ;
        /*0070*/                   MUFU.EX2 R5, R5 ;
        /*0080*/              @!P2 BRA `(.L_x_0) ;
        /*0090*/                   MUFU.RCP R4, R4 ;
        /*00a0*/                   EXIT ;
.L_x_2:
        /*00b0*/                   BRA `(.L_x_2);
"""


def test_usual_path_is_the_shortest_turn_that_computes() -> None:
    """Beside it, from entry to exit: the two instructions before the loop, and the two after."""
    path = parse_sass(KERNEL).usual_path(2)
    assert (path.turn, path.turn_special) == (5, 2)
    assert (path.once, path.once_special) == (4, 1)
    assert path.masked == (7, 7)


def test_other_ways_through_a_turn_are_the_next_shortest_and_the_longest() -> None:
    third = KERNEL.replace(
        """
.L_x_1:""",
        """
        /*0054*/               @P2 BRA `(.L_x_1) ;
        /*0058*/                   NOP ;
.L_x_1:""",
    )
    path = parse_sass(third).usual_path(2)
    assert (path.turn, path.masked) == (5, (8, 9))
    alone = parse_sass(KERNEL.replace("@P1 BRA `(.L_x_1)", "    NOP")).usual_path(2)
    assert (alone.turn, alone.masked) == (7, None)


TWICE = KERNEL.replace(
    "        /*0090*/                   MUFU.RCP R4, R4 ;",
    """
.L_x_3:
        /*0090*/                   MUFU.EX2 R4, R4 ;
        /*00a0*/                   MUFU.EX2 R4, R4 ;
        /*00b0*/              @P2 BRA `(.L_x_3) ;
        /*00c0*/              @P2 BRA `(.L_x_0) ;""",
)


def test_two_loops_are_counted_together() -> None:
    """The loop that holds both is none of them."""
    path = parse_sass(TWICE).usual_path(2, loops=2)
    assert (path.turn, path.turn_special) == (5 + 3, 4)
    with pytest.raises(ValueError, match="1 loops of the kernel compute 2 exponentials, not 2"):
        parse_sass(KERNEL).usual_path(2, loops=2)


def test_without_a_loop_all_is_counted() -> None:
    straight = "\n".join(line for line in KERNEL.splitlines() if "`(.L_x_0)" not in line)
    path = parse_sass(straight).usual_path(2)
    assert (path.turn, path.turn_special, path.once, path.once_special) == (8, 3, 0, 0)


def test_waits_for_memory_are_counted() -> None:
    """What needs a load waits for all that were asked for before it; of a turn, also for those of the turn before."""
    assert parse_sass(KERNEL).usual_path(2).waits == (1,)
    load = "LDG.E.128 R4, desc[UR4][R2.64] ;"
    second = "\n        /*0024*/                   LDG.E R{}, desc[UR4][R2.64] ;"
    together = parse_sass(KERNEL.replace(load, load + second.format(8)).replace("MUFU.EX2 R5, R5", "MUFU.EX2 R5, R8"))
    assert together.usual_path(2).waits == (1,)
    one_by_one = KERNEL.replace("MUFU.EX2 R4, R4 ;", f"MUFU.EX2 R4, R7 ;{second.format(5)}")
    assert parse_sass(one_by_one).usual_path(2).waits == (2,)
    ahead = KERNEL.replace(load, "NOP ;").replace("MUFU.EX2 R5, R5 ;", f"MUFU.EX2 R5, R5 ;{second.format(4)}")
    assert parse_sass(ahead).usual_path(2).waits == (1,)
    path = parse_sass(KERNEL.replace("S2R R0, SR_TID.X ;", f"S2R R0, SR_TID.X ;{second.format(2)}")).usual_path(2)
    assert (path.waits, path.waits_once) == ((1,), 1)  # once for the address
    assert parse_sass(KERNEL.replace(load, "NOP ;")).usual_path(2).waits == (0,)


def test_uniform_branches_are_conditional() -> None:
    uniform = KERNEL.replace("@P1 BRA `(.L_x_1)", "    BRA.U UP0, `(.L_x_1)")
    assert parse_sass(uniform).usual_path(2).turn == 5


def test_a_call_within_the_kernel_is_a_jump() -> None:
    usual = parse_sass(KERNEL).usual_path(2)
    call = KERNEL.replace("@!P2 BRA `(.L_x_0)", "@!P2 CALL.REL.NOINC `(.L_x_0)")
    assert parse_sass(call).usual_path(2) == usual
    function = KERNEL.replace("IADD3 R1, R1, 0x1, RZ", "CALL.REL.NOINC `($kernel$dp_division)")
    assert parse_sass(function).usual_path(2) == usual


def test_a_program_that_cannot_compute_its_tile_is_an_error() -> None:
    with pytest.raises(ValueError, match="no way through the kernel computes 3 exponentials"):
        parse_sass(KERNEL.replace("@!P2 BRA `(.L_x_0)", "@!P2 NOP")).usual_path(3)


NESTED = KERNEL.replace(
    ".L_x_0:",
    """
        /*0014*/                   NOP ;
.L_x_4:
        /*0018*/              @P3  BRA `(.L_x_3) ;
        /*001c*/                   NOP ;
.L_x_0:""",
).replace(
    "        /*0090*/                   MUFU.RCP R4, R4 ;",
    """
        /*0090*/                   SHFL.BFLY PT, R5, R0, 0x1, 0x1f ;
.L_x_3:
        /*00a0*/                   MUFU.EX2 R4, R4 ;
        /*00b0*/              @P2  BRA `(.L_x_4) ;
        /*00c0*/                   MUFU.RCP R4, R4 ;""",
)


def test_a_loop_within_a_loop() -> None:
    """A turn of the outer one that computes: not the short cut past the exchange between threads."""
    path = parse_sass(NESTED).usual_path(2, nested=True)
    assert (path.turn, path.turn_special) == (5, 2)
    assert (path.around, path.around_special) == (5, 1)
    assert (path.once, path.once_special) == (5, 1)


AMD = """
kernel:                                 ; @kernel
	.loc	1 71 0
	s_load_dwordx2 s[2:3], s[0:1], 0x0
	s_cbranch_scc1 .LBB0_4
	s_branch .LBB0_2
.LBB0_1:                                ;   in Loop: Header=BB0_2 Depth=1
	s_add_i32 s17, s17, 1
	s_cbranch_scc0 .LBB0_4
.LBB0_2:                                ; =>This Inner Loop Header: Depth=1
	s_cbranch_vccz .LBB0_3
	v_mul_f32_e32 v1, v2, v3
	v_mul_f32_e32 v1, v2, v3
.LBB0_3:
	v_exp_f32_e32 v1, v2
	v_rcp_iflag_f32_e32 v1, v2
	s_branch .LBB0_1
.LBB0_4:
	s_endpgm
"""


def test_assembly_of_amd() -> None:
    """The turn begins at the latch, which lies before the head of the loop, and the loop is left from there."""
    path = parse_gcn(AMD).usual_path(1)
    assert (path.turn, path.turn_special, path.once, path.once_special) == (6, 2, 4, 0)
    straight = parse_gcn(AMD.replace("s_branch .LBB0_1", "s_nop 0")).usual_path(1)
    assert (straight.turn, straight.turn_special, straight.once) == (8, 2, 0)
