"""A method as one argument: of `model.generate`, of transformers' pipelines, and of what calls either."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from griffin.method import Method, as_method
from griffin.own_loop import DecodingMethod

# What `decode_with` takes beside the fields of a method.
OPTIONS = ("seed", "shared_experts", "compiled", "experts", "streamer")


def decode_with(method: Method | str | float | Sequence[float] = "exact", **options: Any) -> DecodingMethod:
    """A decoding method: `model.generate(**inputs, custom_generate=griffin.decode_with("exact"))`.

    It serves any number of calls, of any models. Several prompts have experts each, and drafts are checked prompt by
    prompt. `generate` keeps a streamer and stop strings from it: say `decode_with("exact", streamer=streamer)`, or call
    `griffin.generate`.

    Args:
        method: a `griffin.Method`, the name of one (`griffin.METHODS`), or a sparsity.
        options: `seed`, `shared_experts`, `compiled` and `experts` as `griffin.prune` has them, and `streamer`; fields
            of `griffin.Method` that are to be others than `method` has.

    Raises:
        ValueError: a value that is not allowed, or a method that cannot generate.
        TypeError: no such option.
    """
    own = {name: options.pop(name) for name in OPTIONS if name in options}
    method = as_method(method, **options)
    if method.oracle:
        raise ValueError(f"statistic={method.scorer.name!r} knows what comes after the prompt: it cannot generate")
    return DecodingMethod(method, **own)


def generate(model: Any, method: Method | str | float | Sequence[float] = "exact", **options: Any) -> Any:
    """`model.generate` under a method, with the options of `decode_with` and of `model.generate` side by side.

    Returns what `model.generate` does: token ids [B, S + N], or its output class.

    Raises:
        ValueError: as `decode_with`; or an option of `model.generate` that our loop cannot honour.
        UnsupportedModelError: the model cannot be pruned, or its KV cache cannot be cropped.
    """
    own = {*OPTIONS, *(field.name for field in fields(Method))} & options.keys()
    decoding = decode_with(method, **{name: options.pop(name) for name in own})
    return decoding.run(model.generate, (), options)


def save_custom_generate(folder: str | Path) -> None:
    """Write a folder that `generate(custom_generate=folder, trust_remote_code=True)` loads, and that can be published
    as such a repository. Its code is one import of this package. OSError: it cannot be written."""
    folder = Path(folder)
    (folder / "custom_generate").mkdir(parents=True, exist_ok=True)
    for name, text in _FILES.items():
        (folder / name).write_text(text, encoding="utf-8")


_FILES = {
    "README.md": """---
library_name: transformers
tags:
- custom_generate
---

# Verified decoding with pruned, quantised experts

Greedy and sampled decoding that reads fewer bytes of weights, by [GRIFFIN](https://arxiv.org/abs/2404.01365) and what
was made of it. With `method="exact"` the text is the model's own.

```python
model.generate(**inputs, custom_generate=FOLDER, trust_remote_code=True, method="exact", sparsity=0.5)
```

`method` is the name of a method of the package `griffin-pruning`; its fields can be said beside it.
""",
    "config.json": json.dumps({"model_type": "custom_generate"}, indent=2) + "\n",
    "custom_generate/requirements.txt": "griffin-pruning\n",
    "custom_generate/generate.py": "from griffin import generate\n",
}
