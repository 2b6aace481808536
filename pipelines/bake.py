"""`python -m pipelines.bake model=... data_files=... out=...`: a model pruned once for all prompts of a file.

Its experts are chosen by the paper's aggregation over many prompts, and written as an ordinary checkpoint with a model
card. The card says what one choice for all prompts gives away against each prompt's own, on rows that did not choose.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

import griffin
from pipelines.bake_config import BakeConfig
from pipelines.composition import compose_and_call
from pipelines.config_keys import BAKE, checked
from pipelines.data import read_jsonl
from pipelines.errors import UserError, told_in_one_line
from pipelines.methods import data_digests

if TYPE_CHECKING:
    from pipelines.tasks.prompts import Evaluation, Prompt

# Rows that the compensation of a layer is fitted to, of all prompts together.
ROWS = 2048

_CHOICES = {
    "model": "this model, the prompt included",
    "shared": "its experts, behind a dense prompt",
    "own": "per prompt, behind a dense prompt",
    "model - own": "this model less per prompt",
    "shared - own": "its experts less per prompt",
}
_MEASURES = {"kl": "KL from dense, nats a token", "top1_agreement": "top-1 agreement"}


def main() -> None:
    """Compose, bake, say where to. Exit code 1 if it cannot be done."""
    command = shlex.join(["python", "-m", "pipelines.bake", *sys.argv[1:]])
    if {"-m", "--multirun"} & {*sys.argv}:
        sys.exit("error: -m: expected one call for each model")
    composed: list[BakeConfig] = []  # none for --help
    compose_and_call(lambda cfg: composed.append(checked(cfg, BAKE)), "bake", BAKE)
    for config in composed:
        with told_in_one_line():
            try:
                bake(config, command)
            except UserError as error:
                raise UserError(str(error).removeprefix("task.")) from error  # the comparison's task has our keys
            except griffin.UnsupportedModelError as error:
                raise UserError(f"model={config.model.name}: {error}") from error
            except KeyboardInterrupt:
                print(f"interrupted; {config.out} is whole when its README.md is there", file=sys.stderr)
                raise


def bake(config: BakeConfig, command: str) -> None:
    """Choose, write the checkpoint, compare it with each held prompt's own experts, write the card."""
    choosing, held = rows(config)
    out, method = Path(str(config.out)), config.method
    try:
        out.mkdir(parents=True, exist_ok=True)
        from pipelines.models import load
        from pipelines.tasks.prompts import Evaluation, fitting

        loaded = load(config.model, config.device, config.seed)
        run = Evaluation(loaded, config.comparison(), [method], {method: set()})
        used, others = ({one: ids for one, ids in fitting(run, part)[0].items() if ids} for part in (choosing, held))
        if not used or len(others) < 2:
            room = loaded.context_length - config.max_new_tokens
            setting = f"data_files={config.data_files} with max_new_tokens={config.max_new_tokens}"
            raise UserError(f"{setting}: too few rows have 1 to {room} tokens, for which the model has room")
        experts = shared_experts(run, tqdm(used.values(), "choosing", unit="prompt"))
        pruned = griffin.compact_model(loaded.model, experts)
        pruned.save_pretrained(out)
        loaded.tokenizer.save_pretrained(out)
        comparing = tqdm(others.items(), "comparing", unit="prompt")
        samples = [*compared(run, experts, griffin.Engine(pruned, pruning=False), comparing)]
        facts = _facts(run, len(used), samples) | {"command": command}
        (out / "README.md").write_text(_card(facts, quality(samples), loaded.revision and config.model.repo), "utf-8")
    except OSError as error:
        raise UserError(f"out={out}: cannot write: {error.strerror or error}") from error
    if skipped := len(choosing) + len(held) - len(used) - len(others):
        print(f"note: {skipped} rows left out, which are empty or leave no room for max_new_tokens", file=sys.stderr)
    print("\n" + tabulate(facts.items(), tablefmt="plain", disable_numparse=True))
    print("\n" + tabulate(quality(samples), headers="keys", disable_numparse=True))
    source = "" if config.model.source == "hub" else "model.source=hub "
    runs = f"python -m pipelines.run model={config.model.name} {source}model.repo={out} sparsity=0 task=..."
    print(f"\n{out}: for from_pretrained, or {runs}")


def rows(config: BakeConfig) -> tuple[list[Prompt], list[Prompt]]:
    """The rows that choose, and those behind them, on which is compared; UserError where there are too few."""
    from pipelines.tasks.prompts import Prompt

    most = None if config.limit is None else config.offset + config.limit + config.held
    found = read_jsonl(Path(str(config.data_files)), (config.prompt_field,), "data_files", most)
    end = len(found) - config.held if config.limit is None else config.offset + config.limit
    if not config.offset < end <= len(found) - config.held:
        limit = "null" if config.limit is None else config.limit
        setting = f"limit={limit} with offset={config.offset} and held={config.held}"
        raise UserError(f"{setting}: expected fewer, {config.data_files} has {len(found)} rows")
    prompts = [Prompt(index, str(index), row[config.prompt_field]) for index, row in enumerate(found)]
    return prompts[config.offset : end], prompts[end : end + config.held]


def shared_experts(run: Evaluation, prompts: Any) -> griffin.Experts:
    """The one set of experts of all these prompts, each its tokens, run one by one.

    Of each prompt stays what was recorded for its scores, D numbers a layer; and of the rows that a compensation is
    fitted to an equal part, evenly spaced in the prompt, so that all have about `ROWS` together, however many they are.
    """
    (method,), states = run.methods, list[griffin.PromptState]()
    for number, ids in enumerate(prompts):
        state = run.prefill(ids)
        share = (number + 1) * ROWS // len(prompts) - number * ROWS // len(prompts)
        recorded = replace(state.recorded, totals=thinned(state.recorded.totals, share))
        states.append(replace(state, cache=None, logits_TV=torch.empty(0), recorded=recorded))
    experts = griffin.choose(run.engine, states, method, run.config.seed)
    assert experts is not None
    return experts


def thinned(totals: Mapping[Any, tuple[Tensor, ...]], share: int) -> dict[Any, tuple[Tensor, ...]]:
    """What was recorded of a prompt, with so many at most of the rows of a compensation."""

    def few(rows_TX: Tensor) -> Tensor:
        count = min(share, len(rows_TX))
        return rows_TX[torch.arange(count, device=rows_TX.device) * len(rows_TX) // max(count, 1)]

    in_rows = [*griffin.COMPENSATIONS.values()]
    return {key: tuple(map(few, layers)) if key in in_rows else layers for key, layers in totals.items()}


def compared(
    run: Evaluation, experts: griffin.Experts, pruned: griffin.Engine, held: Iterable[tuple[Prompt, list[int]]]
) -> Iterator[dict[str, float]]:
    """Of each held prompt, how far the pruned model, its experts and the prompt's own are from dense along the dense
    model's continuation. The experts go on from the dense prompt's KV cache; the model has read the prompt itself."""
    from pipelines.tasks.fidelity import compare, continued

    (method,) = run.methods
    for prompt, ids in held:
        (text,) = continued(run, {prompt: ids})
        sample: dict[str, float] = {"tokens": len(text.tokens)}
        (whole,) = griffin.prefill(pruned, [[*ids, *text.tokens]], [], keep_logits=len(text.tokens))
        logits = {"model": whole.logits_TV}
        for choice, given in (("shared", experts), ("own", None)):
            row = griffin.begin(run.engine, [text.state], method, run.config.seed, experts=given)[0]
            ((_, logits[choice]),) = griffin.score(run.engine, [(row, text.tokens)])
        for choice, logits_CV in logits.items():
            values = compare(text.logprobs_CV, logits_CV.float().log_softmax(dim=-1))
            sample |= {f"{choice} {name}": float(one_C.mean()) for name, one_C in zip(_MEASURES, values, strict=True)}
        for name in _MEASURES:
            for choice in ("model", "shared"):
                sample[f"{choice} - own {name}"] = sample[f"{choice} {name}"] - sample[f"own {name}"]
        yield sample


def quality(samples: Sequence[Mapping[str, float]]) -> list[dict[str, str]]:
    """The table's lines: means over prompts with their standard errors, those of the difference over its pairs."""
    from pipelines.tasks.answers import means

    values, lines = means(samples, [*samples[0]]), []
    for choice, words in _CHOICES.items():
        sign, names = "+" if " - " in choice else "", [f"{choice} {name}" for name in _MEASURES]
        cells = [f"{values[name]:{sign}.4f} ± {values[f'{name}_stderr']:.4f}" for name in names]
        lines.append({"experts": words} | dict(zip(_MEASURES.values(), cells, strict=True)))
    return lines


def _facts(run: Evaluation, used: int, samples: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """How the model was made."""
    model, config, digests = run.loaded, run.config, data_digests(run.config)
    package = f"{config.model.package} {version(config.model.package)}" if config.model.package else None
    source = config.model.repo or package or f"random weights, seed {config.seed}"
    revision = model.revision or digests.get("repo")
    (traffic,), tokens = run.traffic.values(), sum(int(sample["tokens"]) for sample in samples)
    return {
        "method": run.methods[0].label,
        "model": f"{config.model.name}: {source}" + (f", revision {revision}" if revision else ""),
        "experts": f"chosen on {used} prompts, once for all",
        "compared": f"on {len(samples)} other prompts, along {tokens} tokens of the dense model's greedy text",
        "data": f"{Path(config.task.data_files).name}, {digests['data_files']}",
        "bytes a token": f"{traffic.pruned / traffic.dense:.4f} of the dense model's weights are read",
    }


def _card(facts: Mapping[str, str], lines: Sequence[Mapping[str, str]], base: str | None) -> str:
    origin = f"base_model: {base}\n" if base else ""
    made = "\n".join(f"- {key}: {f'`{text}`' if key == 'command' else text}" for key, text in facts.items())
    return f"""---
library_name: transformers
{origin}---

# {facts["model"].partition(":")[0]}, {facts["method"]}

A model without the feedforward neurons that matter least to a set of prompts, chosen once for all of them by GRIFFIN's
aggregation (arXiv 2404.01365). It loads with `from_pretrained`.

{made}

On prompts that did not choose: KL(dense || pruned), and how often the most likely token is the same, of this model,
which reads the prompt too; of its experts behind a prompt that ran dense; and of each prompt's own experts there, which
is the same method per prompt. Means with standard errors over prompts, of differences over their pairs.

{tabulate(lines, headers="keys", tablefmt="github", disable_numparse=True)}
"""


if __name__ == "__main__":
    main()
