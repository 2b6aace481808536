"""The draft's vocabulary: rows of the output embedding that a prompt makes likely.

The output embedding is a large part of what a sparse draft still reads, and a text needs few of its rows: the prompt's
own tokens, and those that the dense model finds most likely at its positions and at those it checks. A token outside of
them costs a rejected draft and nothing else. Not in the paper; FR-Spec (arXiv 2502.14856) and VocabTrim (arXiv
2506.22694) use lists that are the same for all prompts.

Dimensions: C = rows that there is room for, M = candidates.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from griffin.compact import CompactView
from griffin.feedforward import UnsupportedModelError
from griffin.quantization import rounded
from griffin.views import Compiler, View, view_of

DRAFT_VOCABULARIES = {"full": "all of the model's", "prompt": "what the prompt and the text so far make likely"}

# So many tokens are likely at a position, of at most so many positions of the prompt, evenly spread: logits of all of
# them would cost as much as several layers.
BEST = 32
POSITIONS = 128

# Rows that there is room for; tokens that come when it is full are not drafted.
CAPACITY = 8192

_PIECE = 32  # positions whose logits are in memory at a time


def output_embedding(model: nn.Module) -> nn.Linear:
    """The model's output embedding; an `UnsupportedModelError` where it has none that is a linear layer."""
    whole: Any = model
    head = whole.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no linear output embedding: expected draft_vocabulary=full"
        )
    return head


def find_likely(head: nn.Linear, hidden_SH: Tensor) -> Tensor:
    """The best `BEST` tokens at up to `POSITIONS` of these positions, some more than once, on the positions' device.
    What models do to logits behind the embedding, such as soft-capping and scaling, does not change their order."""
    sampled_SH = hidden_SH[:: max(1, -(-len(hidden_SH) // POSITIONS))].to(head.weight.device)
    pieces = [sampled_SH[first : first + _PIECE] for first in range(0, max(1, len(sampled_SH)), _PIECE)]
    best = [head(piece_SH).topk(min(BEST, head.out_features), dim=-1).indices for piece_SH in pieces]
    return torch.cat(best).flatten().to(hidden_SH.device)


class DraftView(View):
    """The compact view with a part of the output embedding: the same FF projections, rows in a buffer that stays."""

    @torch.inference_mode(False)
    def __init__(self, compact: CompactView, compiler: Compiler | None = None) -> None:
        super().__init__(compact.module, compiler, compact.shared)
        if compact.head is not None:  # which is quantised row by row
            self.module.set_output_embeddings(view_of(compact.head))
        head = output_embedding(self.module)
        self._head, self.size, device = head, len(head.weight), head.weight.device
        self._whole = {name: whole.detach() for name, whole in head.named_parameters(recurse=False)}  # weight, bias
        self._quantization = compact.quantization
        self._capacity = min(self.size, CAPACITY)
        # One row more takes what there is no room for.
        self._rows = {
            name: whole.new_zeros(self._capacity + 1, *whole.shape[1:]) for name, whole in self._whole.items()
        }
        self._tokens_C = torch.full((self._capacity + 1,), self.size, device=device)
        self._known_V = torch.zeros(self.size, dtype=torch.bool, device=device)
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        self._static = compiler is not None
        self.used = 0
        self.tokens_C = self._tokens_C[:0]

    @torch.no_grad()
    def begin(self, tokens_M: Tensor) -> None:
        """Have these tokens, and no others."""
        self._known_V.zero_()
        self.count.zero_()
        self._tokens_C.fill_(self.size)
        self.add(tokens_M)
        self.use(self._capacity if self._static else int(self.count))

    @torch.no_grad()
    def add(self, tokens_M: Tensor) -> None:
        """Have these tokens too, from the next `use` on. Nothing here waits for the device."""
        tokens_M = tokens_M.to(self._known_V.device)
        order_M = torch.arange(len(tokens_M), device=tokens_M.device)
        first_V = torch.full_like(self._known_V, len(tokens_M), dtype=torch.int64)
        first_V.scatter_reduce_(0, tokens_M, order_M, "amin")
        new_M = (first_V[tokens_M] == order_M) & ~self._known_V[tokens_M]
        place_M = self.count + new_M.cumsum(0) - 1
        fits_M = new_M & (place_M < self._capacity)
        place_M = place_M.where(fits_M, self._capacity)
        for name, whole in self._whole.items():
            rows = rounded(whole[tokens_M], self._quantization) if name == "weight" else whole[tokens_M]
            self._rows[name].index_copy_(0, place_M, rows)
        self._tokens_C.index_copy_(0, place_M, tokens_M.where(fits_M, self.size))
        self._known_V.index_fill_(0, tokens_M, True)
        self.count += fits_M.sum()

    def use(self, rows: int) -> None:
        """Compute the logits of so many rows; where calls are compiled, of all that there is room for."""
        rows = self._capacity if self._static else rows
        if rows == self.used:
            return
        self.used = rows
        for name, buffer in self._rows.items():
            self._head._parameters[name] = nn.Parameter(buffer[:rows], requires_grad=False)
        self.tokens_C = self._tokens_C[:rows]

    def allowed(self, logits_C: Tensor) -> Tensor:
        """The logits of a call, minus infinity where the buffer has no token."""
        return logits_C.masked_fill(self.tokens_C == self.size, -torch.inf) if self._static else logits_C

    def spread(self, logits_C: Tensor) -> Tensor:
        """Logits [V] of all tokens; minus infinity of those that it does not have."""
        logits_V = logits_C.new_full((self.size + 1,), -torch.inf)
        return logits_V.index_copy_(0, self.tokens_C, logits_C)[: self.size]
