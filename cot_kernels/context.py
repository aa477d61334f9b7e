"""Where a call happens: within a transform, a trace or forward mode, where kernels cannot be called as they are."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

_PLAIN = (Tensor, torch.nn.Parameter)


def transformed() -> bool:
    """Within a transform of torch.func; as torch.autograd.Function.apply asks."""
    return torch._C._are_functorch_transforms_active()


def traced() -> bool:
    """Under torch.jit.trace, fake tensors, make_fx or functionalization, which what a kernel does would escape."""
    if torch._C._get_tracing_state():
        return True
    if not torch._C._len_torch_dispatch_stack():
        return False
    keys = torch._C._TorchDispatchModeKey
    return any(torch._C._get_dispatch_mode(key) for key in (keys.FAKE, keys.PROXY, keys.FUNCTIONAL))


def in_forward_mode() -> bool:
    return forward_ad._current_level >= 0


def needs_plain_operations() -> bool:
    """Where no operator can be called: in forward mode, and where a compiler traces a transform of torch.func."""
    return transformed() if torch.compiler.is_compiling() else in_forward_mode()


def plain(tensor: Tensor) -> bool:
    """Of no subclass whose operations mean something else."""
    return type(tensor) in _PLAIN


def readable(upstream: Tensor) -> bool:
    """Whether a kernel can read what reaches a backward pass.

    It may run in a transform or a trace that its forward pass knew nothing of, for a batch of gradients
    (is_grads_batched=True), or for zeros that have no memory.
    """
    return (
        type(upstream) in _PLAIN
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._functorch.is_legacy_batchedtensor(upstream)
        and not upstream._is_zerotensor()
        and forward_ad._current_level < 0
        and not traced()
    )


def in_autocast(input: Tensor) -> bool:
    """Whether operations on it cast their arguments."""
    device = input.device.type
    return device != "meta" and torch.is_autocast_enabled(device)  # which raises for meta
