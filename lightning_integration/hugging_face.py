"""Complement objective training (COT) in the Trainer of Hugging Face transformers.

- `ComplementObjectiveTrainer`: the two steps of Chen et al. ("Complement Objective Training", ICLR 2019,
  arXiv 1903.01182), in place of `transformers.Trainer`;
- `complement_compute_loss` and `causal_lm_complement_compute_loss`: cross-entropy and complement entropy in one
  step (Kim et al., 2021, arXiv 2009.02189), for `transformers.Trainer(compute_loss_func=...)`.

This module imports transformers, and no Lightning.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from cot_kernels import complement_cross_entropy, complement_entropy, cross_entropy

from .batches import IGNORE_INDEX, causal_lm_logits_and_targets, described, logits_and_targets
from .checks import check_positive
from .loss import ComplementLoss, check_objective, scalar_loss

try:
    from transformers import Trainer
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        'lightning_integration.hugging_face needs transformers and accelerate: pip install "cot-kernels[transformers]"'
    ) from error

__all__ = ["ComplementObjectiveTrainer", "causal_lm_complement_compute_loss", "complement_compute_loss"]

LogitsAndTargets = Callable[[Any, Any], tuple[Tensor, Tensor]]
"""`(module, batch) -> (logits, targets)`, as in `lightning_integration.batches`."""

OF_TWO_STEPS = "pass logits=function, called as function(module, batch) -> (logits, targets)"
OF_ONE_STEP = (
    "pass a compute_loss_func of your own, function(outputs, labels, num_items_in_batch) -> scalar, on "
    "cot_kernels.complement_cross_entropy"
)


class ComplementObjectiveTrainer(Trainer):
    """`transformers.Trainer` with two-step COT.

    For each step of the Trainer, over the micro-batches of its accumulation window:

    1. cross-entropy, backward, gradient clipping, optimizer step;
    2. *fresh* forwards of the same micro-batches on the updated weights, complement loss, backward; the Trainer's
       own loop then clips these gradients and takes its step with the same optimizer.

        loss_1 = sum_i -ln p_i[g_i] / M
        loss_2 = complement_weight * sum_b m_b * complement_loss(logits_b, targets_b) / M

    with i over the targets that are not -100, b over the micro-batches, m_b such targets in micro-batch b, and M in
    the window (`num_items_in_batch`; over all processes with `average_tokens_across_devices`). An accumulated step
    therefore equals one step on one large batch, also in an epoch's last, shorter window. Both losses are computed
    from the logits: the model's own loss, which may not know `num_items_in_batch`, is only used in evaluation. A batch
    without "labels" cannot be counted: each micro-batch then has the same weight.

    Scheduler, `global_step`, callbacks, checkpoints and evaluation are those of plain training, once per Trainer step.
    Logged are `loss`, the cross-entropy; `train_complement`, the mean complement loss without its weight; and
    `grad_norm`, of step 2. `label_smoothing_factor` applies to the cross-entropy. With fp16 the gradient scaler
    judges each step by itself; the scheduler follows step 2.

    Args:
        *args: as for `transformers.Trainer`.
        complement_loss: `(logits, targets) -> scalar`, a mean over the targets that are not -100. Default:
            `cot_kernels.complement_entropy`, whose values are <= 0.
        complement_weight: factor on the complement loss, > 0.
        logits: `(module, batch) -> (logits, targets)`, logits (M, K) or (M, K, d1, ...) with their graph, targets (M)
            or (M, d1, ...). Default: `lightning_integration.batches.logits_and_targets`, for models with one label
            per row or token; causal language models take `causal_lm_logits_and_targets` from there. M above is the
            number of "labels" that are not -100, without the first of each row for `causal_lm_logits_and_targets`.
            Batches of encoder-decoders (T5, BART) must hold decoder_input_ids, as those of `DataCollatorForSeq2Seq`.
        **kwargs: as for `transformers.Trainer`.

    Raises:
        TypeError: `complement_loss` or `logits` is not callable, or `complement_weight` is not a number.
        ValueError: `complement_weight` is not positive and finite; `compute_loss_func` is given; the label names
            lack "labels"; the model is a causal language model and `logits` does not shift its labels.
        RuntimeError: DeepSpeed, FSDP, or tensor, context or sequence parallelism; when training starts, an optimizer
            whose step needs a closure.

    Example:
        trainer = ComplementObjectiveTrainer(model, training_arguments, train_dataset=dataset)
        trainer.train()

    Source: Chen et al., "Complement Objective Training", ICLR 2019, arXiv 1903.01182.
    """

    def __init__(
        self,
        *args: Any,
        complement_loss: ComplementLoss = complement_entropy,
        complement_weight: float = 1.0,
        logits: LogitsAndTargets = logits_and_targets,
        **kwargs: Any,
    ) -> None:
        check_objective("complement_loss", complement_loss)
        check_positive("complement_weight", complement_weight)
        if not callable(logits):
            raise TypeError(
                f"logits must be a callable (module, batch) -> (logits, targets), got {type(logits).__name__}"
            )
        super().__init__(*args, **kwargs)
        self.complement_loss = complement_loss
        self.complement_weight = complement_weight
        self._logits = logits
        finders = (logits_and_targets, causal_lm_logits_and_targets)
        self._find = functools.partial(logits, mend=OF_TWO_STEPS) if logits in finders else logits
        self._check_supported()
        self._model_accepts_num_items = self.model_accepts_loss_kwargs
        # To the Trainer: compute_loss divides by num_items_in_batch, whether or not the model's own loss does.
        self.model_accepts_loss_kwargs = True
        self._objective: Callable[[Tensor, Tensor], Tensor] = self._cross_entropy_sum
        self._start()

    def _check_supported(self) -> None:
        if self.compute_loss_func is not None:
            raise ValueError(
                "compute_loss_func must be None, got one: step 1 is cross-entropy and step 2 is complement_loss; for "
                "a loss of your own in one step use transformers.Trainer"
            )
        if "labels" not in self.label_names:
            raise ValueError(
                f'label_names must hold "labels", got {self.label_names}: name the targets "labels" and pass '
                'TrainingArguments(label_names=["labels"])'
            )
        if self._logits is logits_and_targets and _shifts_labels(self.model):
            raise ValueError(
                f"logits must shift the labels of a causal language model, got logits_and_targets for "
                f"{type(self.model).__name__}: pass logits=causal_lm_logits_and_targets"
            )
        unsupported = {
            "DeepSpeed": self.is_deepspeed_enabled,
            "FSDP": self.is_fsdp_enabled or self.is_fsdp_xla_enabled,
            "tensor, context or sequence parallelism": (
                getattr(self.accelerator, "parallelism_config", None) is not None
                or getattr(self, "is_distributed_loading_by_transformers", False)
            ),
        }
        for name, enabled in unsupported.items():
            if enabled:
                raise RuntimeError(
                    f"complement objective training does not support {name}, which splits the model or steps the "
                    "optimizer itself; use one process or DDP"
                )

    def _start(self) -> None:
        self._window: list[tuple[dict[str, Any], Tensor | int | None]] = []
        self._complement_sum = torch.zeros((), device=self.args.device)
        self._complement_steps = 0

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:
        """The Trainer's, at the start of each run.

        Raises:
            RuntimeError: the step of the optimizer needs a closure (LBFGS).
        """
        optimizer = super().create_optimizer(*args, **kwargs)
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise RuntimeError(
                f"complement objective training does not support {type(optimizer).__name__}, whose step needs a "
                "closure; use a first-order optimizer such as SGD or AdamW"
            )
        self._start()  # a run that was cut short (auto_find_batch_size, an interrupt) leaves its window behind
        return optimizer

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Tensor | int | None]:
        """The micro-batches of a window, and how many targets they hold."""
        batches, _ = super().get_batch_samples(*args, **kwargs)
        # The Trainer's count misses the shift of GPT-2 and others, and is rounded with several GPUs in one process.
        first = 1 if self._logits is causal_lm_logits_and_targets else 0
        counts = [_count_labels(batch, first) for batch in batches]
        known = [count.to(self.args.device) for count in counts if count is not None]
        if not known or len(known) < len(counts):
            return batches, None
        total = torch.stack(known).sum()
        if self.args.average_tokens_across_devices:
            total = self.accelerator.reduce(total, "sum")
        return batches, total

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Cross-entropy backward on a micro-batch; on the last of its window, also step 1 and the backward of step 2.

        Returns:
            The micro-batch's share of the cross-entropy, a scalar.
        """
        self._window.append((inputs, num_items_in_batch))
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            if self.args.max_grad_norm > 0:
                self.accelerator.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)
            cast(Optimizer, self.optimizer).step()
            model.zero_grad()
            self._backward_complement(model)
        return loss

    def _backward_complement(self, model: nn.Module) -> None:
        window, self._window = self._window, []
        self._objective = self._complement_sum_of
        try:
            for index, (inputs, num_items_in_batch) in enumerate(window):
                last = index == len(window) - 1
                # As in step 1, gradients cross processes once.
                with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                    loss = super().training_step(model, inputs, num_items_in_batch)
                self._complement_sum = self._complement_sum + loss / self.complement_weight
        finally:
            self._objective = self._cross_entropy_sum
        self._complement_steps += 1

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """In training, the loss of the current step from the logits; in evaluation, the Trainer's."""
        if return_outputs or not model.training:
            accepted = num_items_in_batch if self._model_accepts_num_items else None
            return super().compute_loss(model, inputs, return_outputs, accepted)
        if self._logits is logits_and_targets:
            _check_decoder_inputs(self.model, inputs)
        logits, targets = self._find(model, inputs)
        loss = _per_item(self._objective(logits, targets), targets, num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # the mean over processes is then the sum of their shares
        return loss

    def _cross_entropy_sum(self, logits: Tensor, targets: Tensor) -> Tensor:
        smoothing = self.args.label_smoothing_factor
        if smoothing == 0:
            return cross_entropy(logits, targets, reduction="sum")
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)

    def _complement_sum_of(self, logits: Tensor, targets: Tensor) -> Tensor:
        valid = (targets != IGNORE_INDEX).sum()
        if valid == 0:  # a mean of nothing is NaN; DDP still wants a backward pass
            return logits[:0].sum()
        return self.complement_weight * valid * scalar_loss("complement_loss", self.complement_loss, logits, targets)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds `train_complement`, the mean since the last log, where the Trainer logs its `loss`."""
        if "loss" in logs and self._complement_steps > 0:
            mean = self.accelerator.reduce(self._complement_sum / self._complement_steps, "mean")
            logs["train_complement"] = mean.item()
            self._complement_sum, self._complement_steps = torch.zeros_like(self._complement_sum), 0
        super().log(logs, *args, **kwargs)


def complement_compute_loss(*, gamma: float = -1.0, normalization: str = "complement") -> Callable[..., Tensor]:
    """One-step COT for `transformers.Trainer(compute_loss_func=complement_compute_loss())`.

        loss = sum_i ( -ln p_i[g_i] + gamma * c * H_i ) / M

    with i over the targets that are not -100, M their number (`num_items_in_batch` where the Trainer gives it), H the
    complement entropy in nats and c = 1 / (K - 1), or as `normalization` says. For models with one label per row or
    token: logits (..., K), labels (...). With two labels the complement is one class, H is 0 and the loss cross-entropy
    alone: a warning says so.

    The Trainer calls it in evaluation too: `eval_loss` includes the complement. `label_smoothing_factor` has no effect
    beside a `compute_loss_func`: that is the Trainer's rule. It calls the model without labels, so that batches of
    encoder-decoders (T5, BART) must hold decoder_input_ids: take `DataCollatorForSeq2Seq(tokenizer, model=model)`.

    Args:
        gamma: weight of the complement entropy; negative values, as published, flatten the wrong classes.
        normalization: "complement", "classes", "entropy" or "none", as in `cot_kernels.complement_cross_entropy`.

    Returns:
        A picklable function `(outputs, labels, num_items_in_batch=None) -> scalar`. It raises TypeError where outputs
        hold no logits or labels are not class indices, ValueError where they do not fit each other, there are no
        labels, or the outputs are those of a causal language model.

    Raises:
        TypeError: `gamma` is not a number.
        ValueError: `gamma` is not finite, or `normalization` is unknown.

    Source: Kim et al., "Imbalanced Image Classification with Complement Cross Entropy", 2021, arXiv 2009.02189.
    """
    return _compute_loss(logits_and_targets, gamma, normalization)


def causal_lm_complement_compute_loss(
    *, gamma: float = -1.0, normalization: str = "complement"
) -> Callable[..., Tensor]:
    """`complement_compute_loss` for causal language models: the logits of each position with the next label.

    Logits (N, T, K), labels (N, T), of which the first of each row is no target.
    """
    return _compute_loss(causal_lm_logits_and_targets, gamma, normalization)


def _compute_loss(
    find: Callable[..., tuple[Tensor, Tensor]], gamma: float, normalization: str
) -> Callable[..., Tensor]:
    # Bad arguments are found here, and not in the first batch.
    complement_cross_entropy(torch.zeros(3), torch.tensor(0), gamma=gamma, normalization=normalization)
    return functools.partial(_one_step_loss, find=find, gamma=gamma, normalization=normalization)


def _one_step_loss(
    outputs: Any,
    labels: Tensor | None,
    num_items_in_batch: Tensor | int | None = None,
    *,
    find: Callable[..., tuple[Tensor, Tensor]],
    gamma: float,
    normalization: str,
) -> Tensor:
    if labels is None:
        raise ValueError('the complement loss needs labels, got None: name the targets of the batch "labels"')
    # Of the model only its output is at hand. Unlike the two-step Trainer, this cannot ask the model's class.
    if find is logits_and_targets and "CausalLMOutput" in type(outputs).__name__:
        raise ValueError(
            "complement_compute_loss does not shift the labels of a causal language model, got "
            f"{type(outputs).__name__}: pass compute_loss_func=causal_lm_complement_compute_loss()"
        )
    logits, targets = find(lambda: outputs, {"labels": labels}, mend=OF_ONE_STEP)
    total = complement_cross_entropy(logits, targets, gamma=gamma, normalization=normalization, reduction="sum")
    return _per_item(total, targets, num_items_in_batch)


def _count_labels(batch: Any, first: int) -> Tensor | None:
    """How many labels of a batch are targets, from column `first`; None where there are none to count."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        return None
    return (labels[..., first:] != IGNORE_INDEX).sum()


def _per_item(total: Tensor, targets: Tensor, num_items: Tensor | int | None) -> Tensor:
    """A sum over the valid targets, divided by their number in the window or, where that is unknown, in `targets`."""
    count = (targets != IGNORE_INDEX).sum() if num_items is None else torch.as_tensor(num_items)
    return total / count.clamp(min=1)  # a window without targets has loss 0


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT's wrapper


def _is_encoder_decoder(base: Any) -> bool:
    return bool(getattr(getattr(base, "config", None), "is_encoder_decoder", False))


def _check_decoder_inputs(model: Any, batch: Mapping[str, Any]) -> None:
    # Without labels T5 refuses to run, and BART shifts the encoder's inputs in their place, which is another task.
    base = _base(model)
    generates = hasattr(base, "prepare_decoder_input_ids_from_labels") or (
        type(base).__name__.endswith("ForConditionalGeneration")
    )
    if _is_encoder_decoder(base) and generates and not {"decoder_input_ids", "decoder_inputs_embeds"} & set(batch):
        raise ValueError(
            f"a batch for {type(base).__name__} must hold decoder_input_ids, which this encoder-decoder makes from "
            f"labels for its own loss only, got {described(batch)}: add decoder_input_ids, as "
            "data_collator=DataCollatorForSeq2Seq(tokenizer, model=model) does"
        )


def _shifts_labels(model: Any) -> bool:
    """Whether the labels of a model are its inputs, each to be predicted from those before it."""
    base = _base(model)
    if _is_encoder_decoder(base):
        return False
    causal = ("ForCausalLM", "ForConditionalGeneration")
    return type(base).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() or (
        getattr(base, "loss_type", None) in causal
    )
