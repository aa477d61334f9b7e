"""The tile table: how many rows, classes and warps a program takes, decided here and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass

# Rows of at most this many bytes, with what precedes them in their first access, are taken whole by a warp, several of
# them up to half as many; of longer ones a program takes tile after tile.
SHORT_ROW = 4096

# Programs to keep every multiprocessor busy: with fewer rows than this many a multiprocessor, rows are split.
PROGRAMS_PER_MULTIPROCESSOR = 4

# Warps of programs to a multiprocessor, several times what it holds at once, that are left where rows are taken in
# turn: programs that start together end together, and the last ones leave others idle.
WARPS_PER_MULTIPROCESSOR = 128
WARPS_PER_MULTIPROCESSOR_BACKWARD = 256

# Tiles of its row that a program of the backward pass takes in turn, or fewer than twice as many where they do not come
# out even; and of whole rows at most.
TILE_TURNS = 4
ROW_TURNS = 8

# Bytes of a row that its threads access together, at least: half a cache line, or, class by class, the least part of
# one that is moved.
PIECE = 64
SECTOR = 32

# What an L2 cache keeps: the tiles of the gradient of long rows begin on one.
LINE = 128

# Accesses of a row that a thread has at most.
PIECES = 8

# Rows of which a thread has logits, at most: it holds five numbers of each in the backward pass.
ROWS_PER_THREAD = 16

# Registers of a thread of the kernels for long rows backward, at most: 64 let 1,024 threads share a multiprocessor,
# which then has 32 KiB of logits or more under way. Left alone the compiler takes up to 128. And of those that read
# rows side by side, eight a thread: up to 168.
REGISTERS = 64
REGISTERS_ACROSS = 128

# Of more partial sums than this the last program would take longer, a turn's latency after the other, than all before.
FOLD_BLOCK = 4096


@dataclass(frozen=True)
class Tile:
    """The shape of a program's tile: ``rows`` by ``pieces * lanes * vec`` classes.

    ``vec`` neighbouring classes are folded within a thread, which has one such access of each of the ``pieces`` of a
    row that is whole in its tile: as few as hold the row. ``align`` is the number of classes in 16 bytes where accesses
    of that width can be promised to the compiler, and 1 where not. With ``heads`` rows begin anywhere, and each is read
    from the boundary before it: there are up to ``overhang`` places before its first class. A ``long`` row takes many
    tiles, of which most need no mask, and in each of them ``depth`` lanes are folded together. ``across`` rows, which
    lie side by side, are read class after class, in tiles of one ``plane``, or of any rows; all others are whole in one
    tile. A ``warp`` is so many threads.
    """

    rows: int
    lanes: int
    vec: int
    align: int
    warps: int
    heads: bool = False
    long: bool = False
    across: bool = False
    plane: bool = False
    overhang: int = 0
    pieces: int = 1
    warp: int = 32
    depth: int = 1
    packs: bool = False

    @property
    def block(self) -> int:
        return self.pieces * self.lanes * self.vec

    @property
    def narrow(self) -> bool:
        """Logits of 16 bits are kept in pairs, and scaled and shifted in one: see :mod:`.monoid`.

        Not of rows side by side, of which a thread has so many that the level of each would take too many registers;
        nor of long rows where arithmetic on pairs does as well; nor of a few classes, of which it spares less than a
        row costs, or whose loads, where they begin anywhere, the compiler would then scatter; nor on AMD GPUs, where it
        costs the registers that it spares in instructions.
        """
        if self.vec != 8 or self.across or not self.packs:
            return False
        return self.depth > 1 if self.long else self.block > (128 if self.heads else 32)

    @property
    def turns(self) -> int:
        """How often at most the forward pass takes ``rows`` in turn: each thread then finishes a row.

        Not the longest rows, of which a thread has hundreds of logits, and for which it would take twice the registers.
        """
        return max(1, min(32, self.warp * self.warps // self.rows)) if self.warps < 8 else 1


def longest_whole(itemsize: int, warp: int, *, in_place: bool = False) -> int:
    """Bytes of a row, with what precedes it in its first access, that is taken whole.

    On NVIDIA GPUs two warps share one of 16-bit logits, of which instructions and waits cost more than the bytes do: a
    tile after the other, each warp would wait for memory as often as there are tiles. In float32, which has time for
    that, an H200 took an eighth longer for the gradient of such rows, and in place there would be too few registers.
    """
    return 2 * SHORT_ROW if itemsize == 2 and warp == 32 and not in_place else SHORT_ROW


def next_power_of_two(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


def choose_tile(
    num_classes: int,
    itemsize: int,
    *,
    classes_adjoin: bool,
    rows_aligned: bool,
    head_aligned: bool,
    rows_lined: bool = False,
    inner: int = 1,
    rows_adjoin: bool = False,
    backward: bool = False,
    in_place: bool = False,
    warp: int = 32,
    pairs: bool = False,
    packs: bool = True,
) -> Tile:
    """The tile for rows of ``num_classes`` logits of ``itemsize`` bytes.

    Args:
        classes_adjoin: neighbouring classes are neighbours in memory, in all tensors involved.
        rows_aligned: every row begins on a 16-byte boundary.
        head_aligned: no row does for certain, but the rows of all tensors involved begin equally far from one.
        rows_lined: every row begins on a cache line.
        inner: rows of a plane, which lie side by side where classes do not adjoin: D of (N, K, D), N of (N, K).
        rows_adjoin: neighbouring rows are neighbours in memory, 16 of them from a 16-byte boundary on, in all tensors.
        backward: the gradient is written. Where rows begin anywhere, the accesses at either end of one are written
            class by class.
        in_place: both passes in one.
        warp: threads of one.
        pairs: float32 arithmetic takes two numbers at a time.
        packs: on an NVIDIA GPU, two numbers of 16 bits are compared at a time.
    """
    vec = 16 // itemsize
    packs &= warp == 32
    if not classes_adjoin:
        return choose_tile_across(num_classes, itemsize, inner, rows_adjoin=rows_adjoin, backward=backward, warp=warp)
    aligned = rows_aligned and num_classes % vec == 0
    # Of a few accesses most are ends: all are then written class by class, and read so.
    heads = head_aligned and not aligned and not (backward and num_classes <= 4 * vec)
    overhang = vec - 1 if heads else 0
    places = num_classes + overhang
    if places * itemsize <= longest_whole(itemsize, warp, in_place=in_place):
        # A warp a program, or two, and few threads a row: what every thread of a row does, its merge and the loading of
        # its state, is done by the fewest, and within a warp. Of a longer row a thread has up to 128 bytes; of shorter
        # ones so many that it has 32 logits. On an AMD GPU masks are scalar registers, of which there are enough for
        # half as many, and class by class for a quarter.
        wholly = aligned or heads
        block = max(next_power_of_two(places), vec)
        most = PIECES if warp == 32 else PIECES // 2 if wholly else PIECES // 4
        pieces = max(1, min(block * itemsize // (PIECE if wholly else SECTOR), most))
        warps = 1 if places * itemsize <= SHORT_ROW else 2
        lanes = min(block // vec // pieces, warps * warp)
        threads = lanes if wholly else lanes * vec  # of a row
        a_thread = (32 if warp == 32 else 16 if wholly else 8) // (2 if itemsize > 4 else 1)
        return Tile(
            rows=max(1, warp // threads, min(a_thread * warp // block, ROWS_PER_THREAD * warp // threads)),
            lanes=lanes,
            vec=vec,
            align=vec if aligned else 1,
            warps=warps,
            heads=heads,
            overhang=overhang,
            pieces=-(-places // (lanes * vec)),
            warp=warp,
            packs=packs,
        )
    # From 4,096 classes on eight tiles a row or more: what a thread does once a row is spread over 128 logits. It has
    # 16 at a time, in float64 4, so that no variant runs out of registers.
    wide = 4 if itemsize > 4 else 1
    warps = min(max(next_power_of_two(num_classes + 1) // 8192, 1), 8)
    lanes = 512 * warps // wide // vec
    heads, align = head_aligned and not rows_aligned, vec if head_aligned else 1
    boundary, on_boundary = (LINE, rows_lined) if backward else (16, rows_aligned)
    overhang = boundary // itemsize - 1 if head_aligned and not on_boundary else 0
    # What a thread has is folded together, for one rescaling; but two lanes apart make pairs.
    depth = 1 if pairs else max(1, lanes // (warp * warps))
    return Tile(
        1, lanes, vec, align, warps, heads=heads, long=True, overhang=overhang, warp=warp, depth=depth, packs=packs
    )


def choose_tile_across(
    num_classes: int, itemsize: int, inner: int, *, rows_adjoin: bool, backward: bool, warp: int
) -> Tile:
    """The tile where neighbours in memory are rows; see :func:`choose_tile`."""
    vec = 16 // itemsize
    if rows_adjoin:
        # A thread takes as many rows as an access holds. Forward eight classes at once ask for more memory; of fewer
        # than two such turns too many places are none. With four the masks of half precision run out of AMD's scalar
        # registers.
        if warp == 64:
            classes = 2 if itemsize < 4 else 4
        else:
            classes = 4 if backward or num_classes <= 16 or itemsize > 4 else 8
        return Tile(rows=128 * vec, lanes=1, vec=classes, align=1, warps=128 // warp, across=True)
    if inner < warp:
        return Tile(rows=128, lanes=1, vec=4, align=1, warps=128 // warp, across=True)
    # A thread takes a few rows of a plane, as far apart as there are threads, from one address: many classes of them at
    # once forward, and backward, where it has the state of more rows, few. Most of its places should be rows.
    a_thread, vec = (4, 2) if backward else (2, 8)
    if itemsize > 4:
        a_thread, vec = (2, 2) if backward else (2, 4)
    vec = min(vec, next_power_of_two(num_classes))
    rows = a_thread * warp * 4
    while rows > warp and -(-inner // rows) * rows > 1.25 * inner:
        rows //= 2
    return Tile(rows=rows, lanes=1, vec=vec, align=1, warps=max(1, rows // (a_thread * warp)), across=True, plane=True)


def choose_splits(num_rows: int, tiles: int, multiprocessors: int) -> int:
    """Programs a row: more than one only where rows alone leave multiprocessors idle."""
    wanted = multiprocessors * PROGRAMS_PER_MULTIPROCESSOR
    if num_rows * 2 > wanted:
        return 1
    return max(1, min(tiles, wanted // num_rows))


def choose_row_turns(tile: Tile, num_rows: int, multiprocessors: int) -> int:
    """How often a program of the forward pass takes its number of rows in turn."""
    warps = -(-num_rows // tile.rows) * tile.warps
    return max(1, min(tile.turns, warps // (multiprocessors * WARPS_PER_MULTIPROCESSOR)))


def choose_turns(tile: Tile, num_rows: int, tiles: int, multiprocessors: int) -> int:
    """Tiles of its row or rows that a program takes in turn, or where rows fit a tile, how often it takes rows:
    several save instructions, and reading the state of many rows again, where enough programs are left.

    Rows that fit a tile are taken once: programs that come and go hide the latency of memory better than turns do. Only
    of rows of a few classes, which are written class by class, the instructions count for more.
    """
    programs = -(-num_rows // tile.rows) * tiles
    if not tile.long and not tile.across:
        warps = programs * tile.warps // (multiprocessors * WARPS_PER_MULTIPROCESSOR_BACKWARD)
        return 1 if tile.heads or tile.align > 1 else max(1, min(ROW_TURNS, warps))
    most = -(-tiles // max(1, tiles // TILE_TURNS)) if tile.long else tiles
    return max(1, min(most, programs // (multiprocessors * 2 * PROGRAMS_PER_MULTIPROCESSOR)))
