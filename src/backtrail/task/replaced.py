"""Functions of torch whose backward pass, or second derivative, is not the true one.

Each is computed by plain operations instead, wherever a gradient is going to be differentiated. It
has the same value, and the training's gradient. Found by `torch.autograd.gradcheck` and
`gradgradcheck` over torch's own list of functions (torch 2.13).
"""

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from backtrail.task.surrogate import stopped, with_surrogate


def _with_all_arguments(
    function: Callable[..., Any], replacement: Callable[..., Any]
) -> Callable[..., Any]:
    """Call the replacement with the function's arguments by name, also those left out."""
    described = signature(function)

    def call(*args: Any, **kwargs: Any) -> Any:
        bound = described.bind(*args, **kwargs)
        bound.apply_defaults()
        return replacement(**bound.arguments)

    return call


def _embedding(
    *,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None,
    max_norm: float | None,
    scale_grad_by_freq: bool,
    **settings: Any,
) -> Any:
    """An embedding: the padding row gets no gradient, and gradients may be scaled by frequency.

    The padding row is read all the same; where it is another layer's weight as well, it is trained.
    """
    if max_norm is not None or (padding_idx is None and not scale_grad_by_freq):
        return NotImplemented
    true = functional.embedding(input, weight)
    surrogate = functional.embedding(input, weight, padding_idx, **settings)
    if scale_grad_by_freq:
        # torch scales the gradient, and forgets the scale in the derivative of the gradient.
        _, place, counts = torch.unique(input, return_inverse=True, return_counts=True)
        scale = (1 / counts[place]).unsqueeze(-1).to(surrogate.dtype)
        surrogate = surrogate * scale + (1 - scale) * surrogate.detach()
    return with_surrogate(true, surrogate)


def _gumbel_softmax(*, logits: Tensor, hard: bool, **settings: Any) -> Any:
    """A sample of one-hot vectors, trained with the gradient of the soft ones."""
    if not hard:
        return NotImplemented
    surrogate = functional.gumbel_softmax(logits, hard=True, **settings)
    return with_surrogate(surrogate.detach(), surrogate)


def _quantised(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A rounding, trained as if it were the identity."""

    def quantise(*args: Any, **kwargs: Any) -> Tensor:
        surrogate = function(*args, **kwargs)
        return with_surrogate(surrogate.detach(), surrogate)

    return quantise


def _hardsigmoid(*, input: Tensor, **settings: Any) -> Tensor:
    """Hardsigmoid by plain operations: torch's own has no second derivative."""
    del settings
    return functional.relu6(input + 3) / 6


def _cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: object = None) -> Tensor:
    """Distances of all pairs by plain operations: torch's own have no second derivative."""
    del compute_mode
    distances: Tensor = torch.linalg.vector_norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p, dim=-1)
    return distances


def _embedding_bag(
    *,
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None,
    max_norm: float | None,
    scale_grad_by_freq: bool,
    mode: str,
    sparse: bool,
    per_sample_weights: Tensor | None,
    include_last_offset: bool,
    padding_idx: int | None,
    **settings: Any,
) -> Any:
    """Bags of embeddings by plain operations: torch's own have no second derivative."""
    del sparse, settings
    if max_norm is not None or scale_grad_by_freq:
        return NotImplemented
    if input.dim() == 2:
        bags = len(input)
        bag = torch.arange(bags, device=input.device).repeat_interleave(input.shape[1])
        flat = input.reshape(-1)
    else:
        assert offsets is not None
        starts = offsets[:-1] if include_last_offset else offsets
        bags = len(starts)
        flat = input[: int(offsets[-1])] if include_last_offset else input
        places = torch.arange(len(flat), device=input.device)
        bag = torch.bucketize(places, starts, right=True) - 1
    vectors = functional.embedding(flat, weight)
    if per_sample_weights is not None:
        vectors = vectors * per_sample_weights.reshape(-1, 1)
    if padding_idx is not None:
        kept = flat != padding_idx % len(weight)
        vectors, bag = vectors[kept], bag[kept]
    index = bag.unsqueeze(1).expand_as(vectors)
    shape = (bags, weight.shape[1])
    if mode == "max":
        largest = vectors.new_zeros(shape)
        most: Tensor = largest.scatter_reduce(0, index, vectors, "amax", include_self=False)
        return most
    total = vectors.new_zeros(shape).scatter_add(0, index, vectors)
    if mode == "sum":
        return total
    count = torch.bincount(bag, minlength=bags).clamp(min=1)
    return total / count.unsqueeze(1).to(total.dtype)


def _multi_margin_loss(
    *,
    input: Tensor,
    target: Tensor,
    p: int,
    margin: float,
    weight: Tensor | None,
    reduction: str,
    **settings: Any,
) -> Tensor:
    """Multi-class hinge loss by plain operations: torch's own has no second derivative."""
    del settings
    scores = input.reshape(-1, input.shape[-1])
    labels = target.reshape(-1, 1)
    excess = (margin - scores.gather(1, labels) + scores).clamp(min=0) ** p
    if weight is not None:
        excess = excess * weight[labels]
    others = torch.ones_like(excess).scatter(1, labels, 0.0)
    losses = (excess * others).sum(1) / scores.shape[1]
    return _reduced(losses if input.dim() == 2 else losses.squeeze(0), reduction)


def _multilabel_margin_loss(
    *, input: Tensor, target: Tensor, reduction: str, **settings: Any
) -> Tensor:
    """Multi-label hinge loss by plain operations: torch's own has no second derivative."""
    del settings
    scores = input.reshape(-1, input.shape[-1])
    labels = target.reshape(-1, input.shape[-1])
    # The labels of a row end at the first negative one.
    valid = (labels >= 0).cumprod(1).bool()
    chosen = labels.clamp(min=0)
    is_label = torch.zeros_like(scores).scatter_reduce(1, chosen, valid.to(scores.dtype), "amax")
    excess = (1 - scores.gather(1, chosen).unsqueeze(2) + scores.unsqueeze(1)).clamp(min=0)
    counted = valid.unsqueeze(2) * (1 - is_label).unsqueeze(1)
    losses = (excess * counted).sum((1, 2)) / scores.shape[1]
    return _reduced(losses if input.dim() == 2 else losses.squeeze(0), reduction)


def _ctc_loss(
    *,
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Any,
    target_lengths: Any,
    blank: int,
    reduction: str,
    zero_infinity: bool,
) -> Any:
    """Connectionist temporal classification by plain operations: the forward recursion.

    torch's own has no second derivative. Its gradient is that of log-probabilities which are
    normalised, whether or not they are.
    """
    is_batch = log_probs.dim() == 3
    scores = log_probs if is_batch else log_probs.unsqueeze(1)
    device = scores.device
    lengths = torch.as_tensor(input_lengths, device=device).reshape(-1)
    label_counts = torch.as_tensor(target_lengths, device=device).reshape(-1)
    if bool((lengths == 0).any()):
        return NotImplemented
    if targets.dim() == 1:
        rows = list(torch.split(targets.to(device), label_counts.tolist()))
        labels = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=blank)
    else:
        labels = targets.to(device)[:, : int(label_counts.max())]
    losses = _ctc_losses(scores, labels.long(), lengths, label_counts, blank)
    # The gradient by a log-probability is its probability, less what the alignments need.
    times = torch.arange(len(scores), device=device).reshape(-1, 1, 1)
    counted = times < lengths.reshape(1, -1, 1)
    total_probability = torch.where(counted, scores.exp(), 0.0).sum((0, 2))
    surrogate = losses + total_probability - total_probability.detach()
    losses = with_surrogate(losses, surrogate)
    impossible = losses.detach() > -IMPOSSIBLE / 2
    losses = torch.where(impossible, 0.0 if zero_infinity else torch.inf, losses)
    if reduction == "mean":
        return (losses / label_counts.clamp(min=1)).mean()
    return _reduced(losses if is_batch else losses.squeeze(0), reduction)


# In the place of the logarithm of zero, whose derivative is not finite.
IMPOSSIBLE = -1e30


def _ctc_losses(
    scores: Tensor, labels: Tensor, lengths: Tensor, label_counts: Tensor, blank: int
) -> Tensor:
    """Minus the log-probability of all alignments of each sequence, `[sequence]`."""
    count = len(labels)
    # Labels with a blank before, between and behind them.
    states = labels.new_full((count, 2 * labels.shape[1] + 1), blank)
    states[:, 1::2] = labels
    # A blank may be left out between two different labels.
    may_skip = torch.zeros_like(states, dtype=torch.bool)
    may_skip[:, 2:] = (states[:, 2:] != blank) & (states[:, 2:] != states[:, :-2])
    emitted = scores.gather(2, states.expand(len(scores), *states.shape))
    is_first = torch.arange(states.shape[1], device=scores.device) < 2
    alpha = torch.where(is_first, emitted[0], IMPOSSIBLE)
    for time in range(1, len(scores)):
        one_back = functional.pad(alpha, (1, 0), value=IMPOSSIBLE)[:, :-1]
        two_back = functional.pad(alpha, (2, 0), value=IMPOSSIBLE)[:, :-2]
        two_back = torch.where(may_skip, two_back, IMPOSSIBLE)
        moved = torch.stack([alpha, one_back, two_back]).logsumexp(0) + emitted[time]
        alpha = torch.where((time < lengths).unsqueeze(1), moved, alpha)
    last_blank = 2 * label_counts.unsqueeze(1)
    at_blank = alpha.gather(1, last_blank)
    at_label = alpha.gather(1, (last_blank - 1).clamp(min=0))
    at_label = torch.where(last_blank > 0, at_label, IMPOSSIBLE)
    return -torch.cat([at_blank, at_label], 1).logsumexp(1)


def _ctc_loss_of_torch(*args: Any, **kwargs: Any) -> Any:
    """`torch.ctc_loss`, whose reduction is a number."""
    names = tuple(signature(functional.ctc_loss).parameters)
    settings = dict(zip(names, args, strict=False)) | kwargs
    number = settings.pop("reduction", 1)
    reduction = ("none", "mean", "sum")[number]
    return _ctc_loss(**{"blank": 0, "zero_infinity": False} | settings, reduction=reduction)


def _linear_cross_entropy(*args: Any, options: object = None, **settings: Any) -> Any:
    """A last layer and its loss in one, without chunks: their second derivative is wrong (2.13)."""
    if options is None:
        return NotImplemented
    return functional.linear_cross_entropy(*args, options=None, **settings)


def _pdist(input: Tensor, p: float = 2.0) -> Tensor:
    """Distances of the pairs of rows by plain operations: torch's have no second derivative."""
    first, second = torch.triu_indices(len(input), len(input), 1, device=input.device)
    distances: Tensor = torch.linalg.vector_norm(input[first] - input[second], p, dim=-1)
    return distances


def _reduced(losses: Tensor, reduction: str) -> Tensor:
    match reduction:
        case "mean":
            return losses.mean()
        case "sum":
            return losses.sum()
        case _:
            return losses


def _normal(mean: Any, std: Any = 1.0, *args: Any, **kwargs: Any) -> Any:
    """Normal noise with a mean or a deviation that is a tensor: torch's gradient of it is zero."""
    is_tensor = isinstance(mean, Tensor) or isinstance(std, Tensor)
    if args or "out" in kwargs or not is_tensor:
        return NotImplemented
    with torch.no_grad():
        drawn = torch.normal(mean, std, **kwargs)
        noise = (drawn - mean) / std
        noise = torch.nan_to_num(noise)  # a deviation of zero
    return with_surrogate(mean + std * noise, drawn)


def _normalised_weight(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Weight normalisation by plain operations: torch's own second derivative is wrong (2.13)."""
    if dim == -1:
        norm = v.square().sum().sqrt()
    else:
        axes = [axis for axis in range(v.dim()) if axis != dim % v.dim()]
        norm = v.square().sum(axes, keepdim=True).sqrt() if axes else v.abs()
    return v * (g / norm)


def _normalised_weight_and_norm(v: Tensor, g: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    weight = _normalised_weight(v, g, dim)
    axes = [axis for axis in range(v.dim()) if axis != dim % v.dim()]
    return weight, v.square().sum(axes, keepdim=True).sqrt()


def _batch_norm(
    *,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Any:
    """Batch normalisation with running statistics, which torch does not differentiate."""
    if running_mean is None or running_var is None:
        return NotImplemented
    if not training:
        return _normalise(
            input, mean=running_mean, variance=running_var, weight=weight, bias=bias, eps=eps
        )
    axes = [axis for axis in range(input.dim()) if axis != 1]
    _update(running_mean, input.mean(axes), momentum)
    _update(running_var, input.var(axes), momentum)
    return functional.batch_norm(
        input, None, None, weight, bias, training=True, momentum=momentum, eps=eps
    )


def _instance_norm(
    *,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
) -> Any:
    """Instance normalisation with running statistics, which torch does not differentiate."""
    if running_mean is None or running_var is None:
        return NotImplemented
    if not use_input_stats:
        return _normalise(
            input, mean=running_mean, variance=running_var, weight=weight, bias=bias, eps=eps
        )
    axes = list(range(2, input.dim()))
    # Each instance has statistics of its own, and their mean over the batch is kept.
    _update(running_mean, input.mean(axes).mean(0), momentum)
    _update(running_var, input.var(axes).mean(0), momentum)
    return functional.instance_norm(
        input, None, None, weight, bias, use_input_stats=True, momentum=momentum, eps=eps
    )


def _update(running: Tensor, found: Tensor, momentum: float) -> None:
    """Move a running statistic. In training it has no gradient."""
    running.copy_((1 - momentum) * running + momentum * stopped(found).to(running.dtype))


def _normalise(
    inputs: Tensor,
    *,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    scale = (variance + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale
    if bias is not None:
        shift = shift + bias
    by_channel = [1, -1] + [1] * (inputs.dim() - 2)
    return inputs * scale.view(by_channel) + shift.view(by_channel)


# Functions of torch whose backward pass, or second derivative, is not the true one. A replacement
# returns NotImplemented where its arguments make it a plain function.
REPLACED: dict[Any, Callable[..., Any]] = {
    functional.embedding: _with_all_arguments(functional.embedding, _embedding),
    functional.gumbel_softmax: _with_all_arguments(functional.gumbel_softmax, _gumbel_softmax),
    functional.batch_norm: _with_all_arguments(functional.batch_norm, _batch_norm),
    functional.instance_norm: _with_all_arguments(functional.instance_norm, _instance_norm),
    functional.hardsigmoid: _with_all_arguments(functional.hardsigmoid, _hardsigmoid),
    functional.embedding_bag: _with_all_arguments(functional.embedding_bag, _embedding_bag),
    functional.multi_margin_loss: _with_all_arguments(
        functional.multi_margin_loss, _multi_margin_loss
    ),
    functional.multilabel_margin_loss: _with_all_arguments(
        functional.multilabel_margin_loss, _multilabel_margin_loss
    ),
    functional.ctc_loss: _with_all_arguments(functional.ctc_loss, _ctc_loss),
    torch.ctc_loss: _ctc_loss_of_torch,
    torch.cdist: _cdist,
    torch.pdist: _pdist,
    torch.normal: _normal,
    torch.fake_quantize_per_tensor_affine: _quantised(torch.fake_quantize_per_tensor_affine),
    torch.fake_quantize_per_channel_affine: _quantised(torch.fake_quantize_per_channel_affine),
    torch._weight_norm: _normalised_weight,
    torch._weight_norm_interface: _normalised_weight_and_norm,
}
if hasattr(functional, "linear_cross_entropy"):  # torch 2.13
    REPLACED[functional.linear_cross_entropy] = _linear_cross_entropy
