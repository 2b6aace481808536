"""Prompt-adaptive structured pruning of the feedforward blocks of Hugging Face causal language models.

The method is GRIFFIN (Dong, Chen and Chi, COLM 2024, arXiv 2404.01365). Three lines prune a model:

    with griffin.prune(model, "griffin", sparsity=0.5):
        model.generate(**inputs)

Evaluations use the engine beneath: `prefill` runs a prompt dense, `begin` chooses a method's experts for it, `decode`
and `score` continue any number of such rows together.
"""

from griffin.activations import ActivationStatistic, Recorded, record_activations, relative_activations
from griffin.checkpoint import compact_model
from griffin.choosing import choose
from griffin.compensation import COMPENSATIONS, Compensation
from griffin.correction import Correction
from griffin.decoding import decode, score
from griffin.draft_vocabulary import DRAFT_VOCABULARIES, output_embedding
from griffin.engine import MODES, Engine, refuse_uncroppable
from griffin.experts import Experts
from griffin.feedforward import FeedForwardBlock, UnsupportedModelError, find_feedforward_blocks
from griffin.method import DENSE, EXACT, LEARNING, METHODS, MOST_DRAFTED, RECIPE, VERIFICATIONS, Method, as_method
from griffin.offloading import move_without_dense
from griffin.onednn import with_onednn
from griffin.prompt import PromptState, prefill, wanted
from griffin.pruner import Pruner, prune
from griffin.refresh import REFRESHES
from griffin.rows import DraftStatistics, Generation, Row, RowStatistics, begin
from griffin.selection import BUDGETS, SELECTIONS, kept_neurons, kept_per_layer, select
from griffin.statistics import STATISTICS, TOKEN_STATISTICS, Evidence, Statistic, TokenStatistic, aggregate
from griffin.traffic import Traffic, neuron_bytes, traffic
from griffin.views import compiled_call, compiler_for, view_of

__version__ = "0.3.0"
