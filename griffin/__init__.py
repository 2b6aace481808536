"""Prompt-adaptive structured pruning of the feedforward blocks of Hugging Face causal language models.

The method is GRIFFIN (Dong, Chen and Chi, COLM 2024, arXiv 2404.01365). Three lines prune a model:

    with griffin.prune(model, "griffin", sparsity=0.5):
        model.generate(**inputs)

Evaluations use the engine beneath: `prefill` runs a prompt dense, `begin` chooses a method's experts for it, `decode`
and `score` continue any number of such rows together.

Names of tensors end in their dimensions. Everywhere: B = rows of a batch, S = positions, L = layers, D = FF width (how
many neurons), K = kept neurons, H = hidden size, V = vocabulary. A module says what else it names.
"""

from griffin.activations import ActivationStatistic, Recorded, Recorder, record_activations, relative_activations
from griffin.compact import compact_model
from griffin.custom_generate import decode_with, generate, save_custom_generate
from griffin.decoding import decode, score
from griffin.draft_vocabulary import DRAFT_VOCABULARIES, output_embedding
from griffin.engine import MODES, Engine, refuse_uncroppable
from griffin.feedforward import FeedForwardBlock, UnsupportedModelError, find_feedforward_blocks
from griffin.method import DENSE, EXACT, METHODS, MOST_DRAFTED, RECIPE, VERIFICATIONS, Method, as_method
from griffin.offloading import move_without_dense
from griffin.prompt import PromptState, choose, prefill, wanted
from griffin.pruner import Pruner, prune
from griffin.refresh import REFRESHES
from griffin.ridge import COMPENSATIONS, Correction
from griffin.rows import DraftStatistics, Generation, Row, RowStatistics, Traffic, begin, neuron_bytes, traffic
from griffin.selection import BUDGETS, SELECTIONS, Experts, kept_neurons, kept_per_layer, select
from griffin.statistics import STATISTICS, TOKEN_STATISTICS, Evidence, Statistic, TokenStatistic, aggregate
from griffin.views import compiled_call, compiler_for, view_of, with_onednn

__version__ = "0.3.0"
