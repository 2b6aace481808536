"""A pruned model for good: a model of its own, that saves as an ordinary smaller checkpoint.

Dimensions: K = kept neurons.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from griffin.compact import CompactView
from griffin.dense import DenseView
from griffin.experts import Experts
from griffin.feedforward import UnsupportedModelError, find_feedforward_blocks


def compact_model(model: nn.Module, experts: Experts) -> Any:
    """The model on one set of experts: a model of its own, which shares all but its FF weights with the dense one.

    Args:
        model: a `transformers` causal language model.
        experts: as `griffin.choose` or `Pruner.chosen` gives them.

    Returns:
        A model of the same class. `save_pretrained` writes it as a checkpoint that `from_pretrained` loads, and raises
        an `UnsupportedModelError` that says why where the architecture has no config for it.
    """
    view = CompactView(model, DenseView(model, pruning=True))
    view.load(experts)
    pruned = view.module
    try:
        widths = {block.width for block in find_feedforward_blocks(model)}
        pruned.config = _config(pruned, widths, {len(neurons_K) for neurons_K in experts.neurons})
    except UnsupportedModelError as reason:
        message = str(reason)

        def save_pretrained(*_: Any, **__: Any) -> None:
            raise UnsupportedModelError(message)

        pruned.save_pretrained = save_pretrained
    return pruned


def _config(pruned: Any, dense: set[int], widths: set[int]) -> Any:
    """A config from which a model of these shapes is made: one whose FF width is that of the experts."""
    if len(widths) > 1:
        raise UnsupportedModelError(
            f"layers keep {min(widths)} to {max(widths)} neurons: a checkpoint has one FF width; expected "
            "budget='uniform' and one sparsity"
        )
    (width,) = widths
    shapes = {name: value.shape for name, value in pruned.state_dict().items()}
    text = pruned.config.get_text_config(decoder=True)
    names = [name for name, value in vars(text).items() if isinstance(value, int) and value in dense]
    # Some have none, and make a multiple of the hidden size of it.
    names += [name for name, value in vars(text).items() if value is None]
    for name in names:
        config = copy.deepcopy(pruned.config)
        setattr(config.get_text_config(decoder=True), name, width)
        try:
            with torch.device("meta"):
                made = type(pruned)._from_config(config)
        except (ValueError, TypeError, RuntimeError, AssertionError, AttributeError, KeyError, ZeroDivisionError):
            continue  # not what says the FF width
        if {key: value.shape for key, value in made.state_dict().items()} == shapes:
            return config
    raise UnsupportedModelError(
        f"{type(pruned).__name__} has no config for an FF width of {width} with these biases: it cannot be saved as a "
        "checkpoint"
    )
