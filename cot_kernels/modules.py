"""The losses as modules. Their arguments are those of the functions of the same names in :mod:`.functional` and
:mod:`.linear`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from cot_kernels import functional, linear


class _Loss(nn.Module):
    """Holds the keyword arguments of a loss and, if told, the number of classes to insist on."""

    def __init__(self, num_classes: int | None, **arguments: Any) -> None:
        super().__init__()
        if num_classes is not None and (not isinstance(num_classes, int) or num_classes < 2):
            got = num_classes if isinstance(num_classes, int) else type(num_classes).__name__
            raise ValueError(f"num_classes must be None or an int of at least 2, got {got}")
        self.num_classes = num_classes
        self.arguments = arguments

    def _check_classes(self, input: Tensor) -> None:
        if self.num_classes is None or not isinstance(input, Tensor) or input.is_nested or not input.dim():
            return
        got = input.shape[min(1, input.dim() - 1)]
        if got != self.num_classes:
            raise ValueError(
                f"input must have num_classes = {self.num_classes} classes, got {got} in shape {tuple(input.shape)}"
            )

    def extra_repr(self) -> str:
        given = {} if self.num_classes is None else {"num_classes": self.num_classes}
        return ", ".join(f"{name}={value}" for name, value in {**given, **self.arguments}.items())


class ComplementEntropy(_Loss):
    """:func:`cot_kernels.complement_entropy` as a module.

    ``ComplementEntropy(num_classes)(logits, target)`` takes the place of the published module and returns its value,
    which is negative: it is minimised.

    Args:
        num_classes: K, checked against each input; None accepts any.
    """

    def __init__(
        self,
        num_classes: int | None = None,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        eps: float = 1e-7,
        normalization: str = "classes",
    ) -> None:
        super().__init__(
            num_classes, ignore_index=ignore_index, reduction=reduction, eps=eps, normalization=normalization
        )

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        self._check_classes(input)
        return functional.complement_entropy(input, target, **self.arguments)


class GuidedComplementEntropy(_Loss):
    """:func:`cot_kernels.guided_complement_entropy` as a module.

    Args:
        num_classes: K, checked against each input; None accepts any.
    """

    def __init__(
        self,
        num_classes: int | None = None,
        *,
        alpha: float = 1 / 3,
        ignore_index: int = -100,
        reduction: str = "mean",
        eps: float = 1e-7,
    ) -> None:
        super().__init__(num_classes, alpha=alpha, ignore_index=ignore_index, reduction=reduction, eps=eps)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        self._check_classes(input)
        return functional.guided_complement_entropy(input, target, **self.arguments)


class ComplementCrossEntropy(_Loss):
    """:func:`cot_kernels.complement_cross_entropy` as a module.

    Args:
        num_classes: K, checked against each input; None accepts any.
    """

    def __init__(
        self,
        num_classes: int | None = None,
        *,
        gamma: float = -1.0,
        normalization: str = "complement",
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__(
            num_classes, gamma=gamma, normalization=normalization, ignore_index=ignore_index, reduction=reduction
        )

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        self._check_classes(input)
        return functional.complement_cross_entropy(input, target, **self.arguments)


class LinearComplementCrossEntropy(_Loss):
    """:func:`cot_kernels.linear_complement_cross_entropy` as a module: ``criterion(input, linear_weight, target)``.

    The weight is an argument, as in the function, so that it may be tied to an embedding.
    """

    def __init__(
        self,
        *,
        gamma: float = -1.0,
        normalization: str = "complement",
        ignore_index: int = -100,
        reduction: str = "mean",
        memory_budget: int | None = None,
        return_parts: bool = False,
    ) -> None:
        super().__init__(
            None,
            gamma=gamma,
            normalization=normalization,
            ignore_index=ignore_index,
            reduction=reduction,
            memory_budget=memory_budget,
            return_parts=return_parts,
        )

    def forward(
        self, input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = None
    ) -> Tensor | linear.LinearLoss:
        loss: Tensor | linear.LinearLoss = linear.linear_complement_cross_entropy(
            input, linear_weight, target, linear_bias=linear_bias, **self.arguments
        )
        return loss


class LinearComplementEntropy(_Loss):
    """:func:`cot_kernels.linear_complement_entropy` as a module: ``criterion(input, linear_weight, target)``.

    The weight is an argument, as in the function, so that it may be tied to an embedding.
    """

    def __init__(
        self,
        *,
        eps: float = 1e-7,
        normalization: str = "classes",
        ignore_index: int = -100,
        reduction: str = "mean",
        memory_budget: int | None = None,
        return_parts: bool = False,
    ) -> None:
        super().__init__(
            None,
            eps=eps,
            normalization=normalization,
            ignore_index=ignore_index,
            reduction=reduction,
            memory_budget=memory_budget,
            return_parts=return_parts,
        )

    def forward(
        self, input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = None
    ) -> Tensor | linear.LinearLoss:
        loss: Tensor | linear.LinearLoss = linear.linear_complement_entropy(
            input, linear_weight, target, linear_bias=linear_bias, **self.arguments
        )
        return loss
