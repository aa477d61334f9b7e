"""The reader of machine code, on a program small enough to count by hand."""

from __future__ import annotations

import pytest

from benchmarks.sass import Program

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
    path = Program.parse(KERNEL).usual_path(2)
    assert (path.instructions, path.special, path.in_loop) == (5, 2, True)


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
    path = Program.parse(TWICE).usual_path(2, loops=2)
    assert (path.instructions, path.special, path.in_loop) == (5 + 3, 4, True)
    with pytest.raises(ValueError, match="1 loops of the kernel compute 2 exponentials, not 2"):
        Program.parse(KERNEL).usual_path(2, loops=2)


def test_without_a_loop_all_is_counted() -> None:
    straight = "\n".join(line for line in KERNEL.splitlines() if "`(.L_x_0)" not in line)
    path = Program.parse(straight).usual_path(2)
    assert (path.instructions, path.special, path.in_loop) == (8, 3, False)


def test_uniform_branches_are_conditional() -> None:
    uniform = KERNEL.replace("@P1 BRA `(.L_x_1)", "    BRA.U UP0, `(.L_x_1)")
    assert Program.parse(uniform).usual_path(2).instructions == 5


def test_a_program_that_cannot_compute_its_tile_is_an_error() -> None:
    with pytest.raises(ValueError, match="no way through the kernel computes 3 exponentials"):
        Program.parse(KERNEL).usual_path(3)
