"""Refresh: what was chosen from the prompt follows the text that is being generated.

A prompt tells which neurons matter for the prompt; what is generated moves away from it. So a few steps of the
generation, after 8, 16, 32, .. tokens, run dense and read again what has been generated since the last of them: the KV
cache then holds the dense model's entries of it, and its activations join the prompt's. Such a step costs little more
than a dense one where decoding is bound by memory, and there are few: four in the first 128 tokens, eight in 2,048.

Not in the paper, whose experts are the prompt's until the end. The step itself is `griffin.decoding.Batch`'s.
"""

from __future__ import annotations

# name: what is refreshed.
REFRESHES = {
    "none": "nothing, as in the paper",
    "experts": "the experts, and the compensation that goes with them",
    "drift": "the same, when the activations have drifted instead of on a schedule (see `griffin.drift`)",
    "compensation": "the compensation, which goes on learning with the experts that it has",
}

# A token that was generated counts as so many of the prompt: it says more of what comes next (docs/selection.md).
WEIGHT = 4.0

_FIRST, _FACTOR = 8, 2


def next_refresh(generated: int) -> int:
    """After how many tokens the next refresh comes when so many have been generated: 8, 16, 32, .."""
    after = _FIRST
    while after <= generated:
        after *= _FACTOR
    return after


def call_ends(tokens: int) -> list[int]:
    """Where the forward calls end, from 0 on, that read a given text of so many tokens as if it were generated.

    A refresh comes with one token of its own; the tokens between two of them need one call only.
    """
    ends, refresh_at = [0], next_refresh(0)
    while refresh_at < tokens:
        ends += [refresh_at, refresh_at + 1]
        refresh_at = next_refresh(refresh_at)
    return sorted({*ends, tokens})
