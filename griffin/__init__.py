"""Prompt-adaptive structured pruning of the feedforward blocks of Hugging Face causal language models.

The method is GRIFFIN (Dong, Chen and Chi, COLM 2024, arXiv 2404.01365). Three lines prune a model:

    with griffin.prune(model, sparsity=0.5, statistic="griffin"):
        model.generate(**inputs)

Evaluations use the engine beneath: `prefill` runs a prompt dense, `begin` chooses a method's experts for it, `decode`
and `score` continue any number of such rows together.
"""

from griffin.activations import Recorded, record_activations, relative_activations
from griffin.compensation import COMPENSATIONS, Compensation
from griffin.compiling import compiled_call
from griffin.correction import Correction
from griffin.decoding import decode, score
from griffin.draft_vocabulary import DRAFT_VOCABULARIES
from griffin.engine import Engine, refuse_uncroppable
from griffin.executors import MODES, Experts
from griffin.feedforward import FeedForwardBlock, UnsupportedModelError, find_feedforward_blocks
from griffin.method import LEARNING, MOST_DRAFTED, VERIFICATIONS, Method
from griffin.offloading import Offload, move_without_dense
from griffin.onednn import onednn_linear
from griffin.prompt import PromptState, choose, prefill, wanted
from griffin.pruner import Pruner, prune
from griffin.refresh import REFRESHES
from griffin.rows import Drafting, Generation, Row, begin, greedy
from griffin.selection import BUDGETS, SELECTIONS, kept_neurons, kept_per_layer, select
from griffin.self_generated import prepare
from griffin.statistics import STATISTICS, Statistic, aggregate
from griffin.token_statistics import TOKEN_STATISTICS, TokenStatistic
from griffin.traffic import Traffic, neuron_bytes, traffic

__version__ = "0.2.0"

__all__ = [
    "BUDGETS",
    "COMPENSATIONS",
    "DRAFT_VOCABULARIES",
    "LEARNING",
    "MODES",
    "MOST_DRAFTED",
    "REFRESHES",
    "SELECTIONS",
    "STATISTICS",
    "TOKEN_STATISTICS",
    "VERIFICATIONS",
    "Compensation",
    "Correction",
    "Drafting",
    "Engine",
    "Experts",
    "FeedForwardBlock",
    "Generation",
    "Method",
    "Offload",
    "PromptState",
    "Pruner",
    "Recorded",
    "Row",
    "Statistic",
    "TokenStatistic",
    "Traffic",
    "UnsupportedModelError",
    "aggregate",
    "begin",
    "choose",
    "compiled_call",
    "decode",
    "find_feedforward_blocks",
    "greedy",
    "kept_neurons",
    "kept_per_layer",
    "move_without_dense",
    "neuron_bytes",
    "onednn_linear",
    "prefill",
    "prepare",
    "prune",
    "record_activations",
    "refuse_uncroppable",
    "relative_activations",
    "score",
    "select",
    "traffic",
    "wanted",
]
