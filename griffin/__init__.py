"""Prompt-adaptive structured pruning of the feedforward blocks of Hugging Face causal language models.

The method is GRIFFIN (Dong, Chen and Chi, COLM 2024, arXiv 2404.01365). Three lines prune a model:

    with griffin.prune(model, sparsity=0.5, statistic="griffin"):
        model.generate(**inputs)
"""

from griffin.budgets import BUDGETS, kept_per_layer
from griffin.compensation import COMPENSATIONS, Compensation
from griffin.continuing import Decoding, continue_in_turn, continue_together
from griffin.correction import Correction
from griffin.feedforward import FeedForwardBlock, UnsupportedModelError, find_feedforward_blocks
from griffin.modes import MODES
from griffin.offloading import Offload, move_without_dense
from griffin.prefilled import prefilled
from griffin.pruner import Pruner, prune
from griffin.refresh import REFRESHES, Reader
from griffin.selection import SELECTIONS, kept_neurons, select
from griffin.shared_prompt import SharedPrompt
from griffin.statistics import STATISTICS, Statistic, aggregate

__version__ = "0.1.0"

__all__ = [
    "BUDGETS",
    "COMPENSATIONS",
    "MODES",
    "REFRESHES",
    "SELECTIONS",
    "STATISTICS",
    "Compensation",
    "Correction",
    "Decoding",
    "FeedForwardBlock",
    "Offload",
    "Pruner",
    "Reader",
    "SharedPrompt",
    "Statistic",
    "UnsupportedModelError",
    "aggregate",
    "continue_in_turn",
    "continue_together",
    "find_feedforward_blocks",
    "kept_neurons",
    "kept_per_layer",
    "move_without_dense",
    "prefilled",
    "prune",
    "select",
]
