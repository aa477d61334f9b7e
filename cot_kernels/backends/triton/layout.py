"""How logits lie in memory, and on which device: what the launch table is asked for them."""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

from cot_kernels.backends.triton import launch


@functools.cache
def multiprocessors(device: torch.device) -> int:
    # Triton's interpreter runs on the CPU: any number will do, and a GPU's takes the paths that a GPU takes.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@functools.cache
def _capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


def _pairs(device: torch.device) -> bool:
    """Whether float32 arithmetic takes two numbers at a time: on AMD's GPUs, and from compute capability 10 on."""
    return torch.version.hip is not None or _capability(device) >= 10


def _packs(device: torch.device) -> bool:
    """Whether two numbers of 16 bits are compared at a time: by NVIDIA's GPUs, from compute capability 8 on."""
    return torch.version.hip is None and not 0 < _capability(device) < 8


def strides(logits: Tensor, across: bool = False) -> tuple[int, int, int, int]:
    """inner, stride_n, stride_k, stride_d of (N, K) or (N, K, D) logits; row n * inner + d. Where rows lie side by
    side, those of (N, K) are one plane."""
    if logits.dim() == 2:
        stride_n, stride_k = logits.stride()
        return (logits.shape[0], 0, stride_k, stride_n) if across else (1, stride_n, stride_k, 0)
    stride_n, stride_k, stride_d = logits.stride()
    return logits.shape[2], stride_n, stride_k, stride_d


def _rows_adjoin(logits: Tensor) -> bool:
    inner, stride_n, stride_k, stride_d = strides(logits, across=True)
    return stride_d == 1 and all(number % 16 == 0 for number in (inner, stride_n, stride_k))


def begin(tensor: Tensor, boundary: int = 16) -> int:
    """How many numbers after a boundary of so many bytes a tensor begins."""
    return tensor.data_ptr() % boundary // tensor.itemsize


def gradient_like(logits: Tensor) -> Tensor:
    """Memory for a gradient, of which all rows begin as far from a 16-byte boundary as those of the logits, long ones
    as far from that of a cache line.

    They can so be written in the accesses that they are read in. A slice of padded rows gets padded ones; dense logits
    get a gradient that lies as they do.
    """
    boundary = launch.LINE if logits.shape[1] * logits.itemsize > launch.SHORT_ROW else 16
    first = begin(logits, boundary)
    if (logits.is_contiguous() and not first) or strides(logits)[2] != 1:
        return torch.empty_like(logits)
    per_boundary = boundary // logits.itemsize
    laid, extent = list(logits.stride()), logits.shape[1]
    for dim in sorted((0, *range(2, logits.dim())), key=logits.stride):
        if logits.shape[dim] != 1:
            laid[dim] = extent + (logits.stride(dim) - extent) % per_boundary
            extent = laid[dim] * logits.shape[dim]
    return logits.new_empty(first + extent).as_strided(logits.shape, laid, first)


def tile(*tensors: Tensor, in_place: bool = False) -> launch.Tile:
    """The tile for logits, or for logits and their gradient, which is read and written alike; or for both in place."""
    logits = tensors[0]
    num_classes, itemsize = logits.shape[1], logits.itemsize
    _, stride_n, _, stride_d = strides(logits)
    per_access = 16 // itemsize
    begins = {begin(each) for each in tensors}
    on_boundary = begins == {0}
    alike = len(begins) == 1 and all(
        (one - other) % per_access == 0
        for each in tensors[1:]
        for one, other in zip(each.stride(), logits.stride(), strict=True)
    )
    rows_aligned = on_boundary and alike and stride_n % per_access == 0 and stride_d == 0
    return launch.choose_tile(
        num_classes,
        itemsize,
        inner=strides(logits, across=True)[0],
        classes_adjoin=all(strides(each)[2] == 1 for each in tensors),
        rows_aligned=rows_aligned,
        head_aligned=alike,
        rows_lined=stride_d == 0 and not begin(logits, launch.LINE) and stride_n * itemsize % launch.LINE == 0,
        rows_adjoin=on_boundary and all(_rows_adjoin(each) for each in tensors),
        backward=len(tensors) > 1,
        in_place=in_place,
        warp=32 if torch.version.hip is None else 64,
        pairs=_pairs(logits.device),
        packs=_packs(logits.device),
    )


def blocks(tile: launch.Tile, num_rows: int, inner: int) -> int:
    """The tiles that hold each row."""
    planes, in_each = (num_rows // inner, inner) if tile.plane else (1, num_rows)
    return planes * -(-in_each // tile.rows)


def splits(tile: launch.Tile, num_rows: int, num_classes: int, device: torch.device) -> int:
    """The programs that share each row."""
    if not tile.long or not num_rows:
        return 1
    tiles = triton.cdiv(num_classes + tile.overhang, tile.block)
    return launch.choose_splits(num_rows, tiles, multiprocessors(device))


def with_padding(logits: Tensor) -> Tensor:
    """With what pads their rows to whole accesses, as far as there is any."""
    (num_rows, num_classes), per_access = logits.shape, 16 // logits.itemsize
    padded = triton.cdiv(num_classes, per_access) * per_access
    last = logits.storage_offset() + (num_rows - 1) * logits.stride(0) + padded
    if padded > logits.stride(0) or last * logits.itemsize > logits.untyped_storage().nbytes():
        return logits
    return logits.as_strided((num_rows, padded), logits.stride())
