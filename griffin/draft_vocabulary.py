"""The draft's vocabulary: rows of the output embedding that a prompt makes likely.

The output embedding is a large part of what a sparse draft still reads, and a text needs few of its rows: the prompt's
own tokens, and those that the dense model finds most likely at positions of the prompt and at every checked position. A
token outside of them costs a rejected draft and nothing else. Not in the paper; FR-Spec (arXiv 2502.14856) and
VocabTrim (arXiv 2506.22694) use lists that are the same for all prompts.

Dimensions: S = positions, H = hidden size, V = vocabulary, N = tokens of the draft's vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from griffin.executors import CompactProjection
from griffin.feedforward import UnsupportedModelError

DRAFT_VOCABULARIES = {
    "full": "all of the model's",
    "prompt": "what the prompt and the text so far make likely",
}

# So many tokens are likely at a position, of at most so many positions of the prompt, evenly spread: logits of all of
# them would cost as much as several layers.
BEST = 32
POSITIONS = 128

_PIECE = 32  # positions whose logits are in memory at a time


def output_embedding(model: nn.Module) -> nn.Linear:
    """The model's output embedding.

    Raises:
        UnsupportedModelError: it has none that is a linear layer.
    """
    whole: Any = model
    head = whole.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no linear output embedding: expected draft_vocabulary=full"
        )
    return head


def find_likely(head: nn.Linear, hidden_SH: Tensor) -> Tensor:
    """Tokens that are likely somewhere: the best `BEST` at up to `POSITIONS` of these positions, some more than once.

    What models do to logits after the embedding, such as soft-capping and scaling, leaves their order as it is.
    """
    sampled_SH = hidden_SH[:: max(1, -(-len(hidden_SH) // POSITIONS))]
    pieces = [sampled_SH[first : first + _PIECE] for first in range(0, max(1, len(sampled_SH)), _PIECE)]
    best = [head(piece_SH).topk(min(BEST, head.out_features), dim=-1).indices for piece_SH in pieces]
    return torch.cat(best).flatten()


class DraftVocabulary:
    """An output embedding that can be switched to a part of its rows.

    Args:
        head: the output embedding; its parameters are never written to.
        padded: whether the last token stands there more than once, so that N is a power of two: a compiled graph is for
            one N.

    Attributes:
        tokens_N: the tokens of the rows, int64, ascending.
    """

    def __init__(self, head: nn.Linear, *, padded: bool = False) -> None:
        self._padded = padded
        self._projection = CompactProjection(head, neurons_out=True, parts=1)
        self._in_V = torch.zeros(head.out_features, dtype=torch.bool, device=head.weight.device)
        self.tokens_N = torch.empty(0, dtype=torch.int64, device=head.weight.device)

    def begin(self, tokens: Tensor) -> None:
        """Have these tokens, and no others."""
        self._in_V.fill_(False)
        self.add(tokens)

    def add(self, tokens: Tensor) -> None:
        """Have these tokens too. The host waits for the device, to know how many are new."""
        self._in_V[tokens] = True
        found_N = self._in_V.nonzero().squeeze(1)
        if self._padded:
            more = 2 ** (len(found_N) - 1).bit_length() - len(found_N)
            found_N = torch.cat([found_N, found_N[-1:].expand(more)])
        if len(found_N) != len(self.tokens_N) or not torch.equal(found_N, self.tokens_N):
            self._projection.gather(found_N)
            self.tokens_N = found_N

    def on(self) -> None:
        """Compute logits of these tokens only, from the next forward call on."""
        self._projection.install()

    def off(self) -> None:
        """Compute all logits, with the module's own parameters."""
        self._projection.uninstall()
