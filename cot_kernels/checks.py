"""What arguments must be, and errors that name the argument, what was got and what is wanted."""

from __future__ import annotations

import math
import warnings
from numbers import Real
from typing import NoReturn

import torch
from torch import Tensor

from cot_kernels import context, distributed

REDUCTIONS = ("mean", "sum", "none")
NORMALIZATIONS = ("classes", "complement", "entropy", "none")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LARGEST = 1e30  # an eps, alpha or gamma beyond it would overflow float32 on the way
SMALLEST = 1e-30  # so would the quotient of an eps below it and what is left of a probability
SIGNED = (torch.int64, torch.int32, torch.int16, torch.int8)
INTEGERS = (*SIGNED, torch.uint8, torch.uint16, torch.uint32, torch.uint64)


def check_rows(input: Tensor, target: Tensor, ignore_index: int, reduction: str) -> int:
    """Logits with their targets; returns the number of classes."""
    check_float("input", input, "logits")
    check_target(target)
    shape, dims = input.shape, input.dim()
    if dims == 0:
        raise ValueError("input must have shape (K), (N, K) or (N, K, d1, ...), got a scalar")
    expected = shape[:1] if dims == 2 else shape[:1] + shape[2:] if dims > 1 else shape[:0]
    if target.shape != expected:
        last = dims > 1 and target.shape == shape[:-1]
        raise ValueError(
            f"target must have shape {tuple(expected)} for input of shape {tuple(shape)}, got {tuple(target.shape)}"
            f"{': classes are dimension 1, use input.movedim(-1, 1)' * last}"
        )
    num_classes = shape[1] if dims > 1 else shape[0]
    if num_classes < 2:
        raise ValueError(
            f"input must have at least 2 classes, got {num_classes} in shape {tuple(shape)}: the complement of the "
            "target would be empty"
        )
    if distributed.is_dtensor(input) or distributed.is_dtensor(target):
        distributed.check(input, target)
    check_device("target", target, input)
    check_options(ignore_index, reduction)
    return num_classes


def check_projection(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    reduction: str,
    memory_budget: int | None,
) -> None:
    """Hidden states, the weight and bias of their projection to logits, and targets."""
    check_float("input", input, "hidden states")
    check_float("linear_weight", weight, "weights")
    check_target(target)
    if input.dim() == 0:
        raise ValueError("input must have shape (H), (N, H) or (N, d1, ..., H), got a scalar")
    if weight.dim() != 2 or weight.shape[1] != input.shape[-1]:
        raise ValueError(
            f"linear_weight must have shape (K, {input.shape[-1]}) for input of shape {tuple(input.shape)}, got "
            f"{tuple(weight.shape)}"
        )
    if len(weight) < 2:
        raise ValueError(f"linear_weight must have at least 2 classes, got {len(weight)} in {tuple(weight.shape)}")
    if target.shape != input.shape[:-1]:
        raise ValueError(
            f"target must have shape {tuple(input.shape[:-1])} for input of shape {tuple(input.shape)}, got "
            f"{tuple(target.shape)}"
        )
    others = {"linear_weight": weight}
    if bias is not None:
        check_float("linear_bias", bias, "bias")
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"linear_bias must have shape ({len(weight)},) for linear_weight of shape {tuple(weight.shape)}, got "
                f"{tuple(bias.shape)}"
            )
        others["linear_bias"] = bias
    autocast = context.in_autocast(input)
    for name, tensor in others.items():
        check_device(name, tensor, input)
        cast = autocast and torch.float64 not in (tensor.dtype, input.dtype)  # which autocast leaves as it is
        if tensor.dtype != input.dtype and not cast:
            raise TypeError(
                f"{name} must have the dtype of input, {input.dtype}, got {tensor.dtype}: convert one of them, or use "
                "torch.autocast, which casts all but float64"
            )
    check_device("target", target, input)
    check_options(ignore_index, reduction)
    if memory_budget is not None:
        if isinstance(memory_budget, bool) or not isinstance(memory_budget, int):
            raise TypeError(f"memory_budget must be None or an int, in bytes, got {type(memory_budget).__name__}")
        if memory_budget < 1:
            raise ValueError(f"memory_budget must be at least 1 byte, got {memory_budget}")


# The good case of these is on the way of every call: no function is called in it that can be spared.


def check_float(name: str, tensor: Tensor, what: str) -> None:
    if not isinstance(tensor, Tensor) or tensor.is_nested or tensor.layout is not torch.strided:
        _refuse(name, tensor)
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64 {what}, got {tensor.dtype}")


def check_target(target: Tensor) -> None:
    if not isinstance(target, Tensor) or target.is_nested or target.layout is not torch.strided:
        _refuse("target", target)
    if target.dtype not in INTEGERS:
        hint = "; class probabilities are not supported: pass class indices" if target.is_floating_point() else ""
        raise TypeError(f"target must hold integer class indices, got {target.dtype}{hint}")


def signed(target: Tensor, ignore_index: int) -> Tensor:
    """The target in a dtype that can hold the ignore_index: in uint8, -100 would be compared as class 156."""
    if target.dtype is torch.int64:
        return target
    fits = target.dtype in SIGNED and torch.iinfo(target.dtype).min <= ignore_index <= torch.iinfo(target.dtype).max
    return target if fits else target.long()


def _refuse(name: str, tensor: Tensor) -> NoReturn:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
    if tensor.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got a nested one: pad it")
    raise TypeError(f"{name} must be a dense tensor, got layout {tensor.layout}: convert it with to_dense()")


def check_device(name: str, tensor: Tensor, input: Tensor) -> None:
    if tensor.device != input.device:
        raise ValueError(f"input and {name} must be on one device, got {input.device} and {tensor.device}")


def check_options(ignore_index: int, reduction: str) -> None:
    check_word("reduction", reduction, REDUCTIONS)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index must fit in 64 bits, got {ignore_index}")


def check_word(name: str, value: str, words: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in words:
        got = repr(value) if isinstance(value, str) else type(value).__name__
        raise ValueError(f"{name} must be one of {', '.join(words)}, got {got}")


def check_finite(name: str, value: float) -> None:
    if type(value) is float and -LARGEST <= value <= LARGEST:
        return
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    try:
        size = abs(float(value))
    except OverflowError:  # an int that no float can hold
        size = math.inf
    if not size <= LARGEST:
        wanted = f"at most {LARGEST:g} in magnitude" if size < math.inf else "finite"
        raise ValueError(f"{name} must be {wanted}, got {value}")


def check_nonnegative(name: str, value: float) -> None:
    check_finite(name, value)
    if value < 0:
        raise ValueError(f"{name} must be at least 0, got {value}")


def check_eps(eps: float) -> None:
    check_nonnegative("eps", eps)
    if 0 < eps < SMALLEST:
        raise ValueError(f"eps must be 0 or at least {SMALLEST:g}, got {eps}: use 0")


def scale_of(normalization: str, num_classes: int) -> float:
    """What a normalization multiplies the complement entropy of so many classes with."""
    check_word("normalization", normalization, NORMALIZATIONS)
    if normalization == "classes":
        return 1 / num_classes
    if normalization == "complement":
        return 1 / (num_classes - 1)
    if normalization == "none":
        return 1.0
    if num_classes == 2:
        raise ValueError(
            "normalization='entropy' divides by ln(K - 1), which is 0 for the K = 2 classes of input: use at least 3 "
            "classes, or another normalization"
        )
    return 1 / math.log(num_classes - 1)


OF_COMPLEMENT = "the loss, but for what eps adds, says nothing; use cross_entropy alone"
OF_SUM = "the loss is that of cross_entropy alone"


def warn_of_two_classes(name: str, num_classes: int, consequence: str = OF_COMPLEMENT) -> None:
    """To be called by the function of that name, whose caller is told."""
    if num_classes == 2 and not torch.compiler.is_compiling():
        warnings.warn(
            f"{name} got 2 classes: the complement then holds a single class, its entropy is 0 and {consequence}",
            stacklevel=3,
        )
