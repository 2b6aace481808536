"""How many kernels verified decoding launches: `python tests/gpu/launches.py`.

torch.profiler counts the operations that would each launch a kernel on a GPU; those of the CPU stand in for them. A
model of 32 tiny layers does, since their number does not depend on the sizes. torch and transformers are all it needs.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from small import model, prompt
from torch.profiler import ProfilerActivity, profile, record_function

import griffin
from griffin import draft, verification, views

LAYERS = 32
# Operations that launch nothing: they make views of memory, or allocate it.
VIEWS = {
    *("view", "_unsafe_view", "reshape", "_reshape_alias", "as_strided", "slice", "select", "t", "transpose"),
    *("permute", "expand", "unsqueeze", "squeeze", "detach", "detach_", "alias", "narrow", "unbind", "split"),
    *("chunk", "diagonal", "split_with_sizes", "item", "is_nonzero", "_local_scalar_dense", "resolve_conj"),
    *("resolve_neg", "lift_fresh", "empty", "empty_strided", "empty_like", "new_empty", "resize_", "set_"),
    *("result_type", "broadcast_tensors", "to", "_to_copy", "matmul", "linear", "zeros", "ones", "new_zeros"),
}


def main() -> None:
    """Run the command and print the table."""
    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4}
    whole = model(torch.device("cpu"), **sizes, num_key_value_heads=2, num_hidden_layers=LAYERS)
    owners = {"forward": (views.View, "__call__"), "round": (verification, "_round")}
    for label, (owner, name) in (owners | {part: (draft.DraftModel, part) for part in ("draft", "learn")}).items():
        setattr(owner, name, record_function(label)(getattr(owner, name)))
    ids = torch.tensor([prompt(200)])
    # A small sparsity, so that a model of random weights accepts some drafts and there is something to learn.
    with griffin.prune(whole, "recipe", verification="exact", sparsity=0.1, draft_tokens=4) as pruner:
        whole.generate(ids, max_new_tokens=8, do_sample=False)
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            whole.generate(ids, max_new_tokens=60, do_sample=False)
    counts = Counter(part for event in profiled.events() for part in _parts(event))
    (drafts,) = pruner.drafts
    print(f"{LAYERS} layers, {drafts.checks} rounds, {drafts.drafted} draft tokens, {drafts.accepted} accepted")
    for part, number in (("draft", drafts.drafted), ("check", drafts.checks), ("learn", drafts.checks)):
        inside, outside = (counts[part, forward] / number for forward in (True, False))
        print(f"{part}: {inside:.0f} launches in the forward call, {outside:.1f} outside of it")


def _operation(event: Any) -> bool:
    return event.name.startswith("aten::") and event.name.removeprefix("aten::") not in VIEWS


def _parts(event: Any) -> set[tuple[str, bool]]:
    """Of an operation of a round that has no smaller ones: its part, and whether it is in the forward call."""
    if not _operation(event) or any(map(_operation, event.cpu_children)):
        return set()
    around = set()
    while event is not None:
        around.add(event.name)
        event = event.cpu_parent
    part = "draft" if "draft" in around else "learn" if "learn" in around else "check"
    return {(part, "forward" in around)} if "round" in around else set()


if __name__ == "__main__":
    main()
