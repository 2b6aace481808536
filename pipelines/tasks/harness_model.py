"""Our model in lm-eval: its HFLM, pruned by a method. Importing this module registers it as `griffin`."""

from __future__ import annotations

import inspect
import sys
from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import simple_parse_args_string
from torch import Tensor

import griffin
from griffin import METHODS, as_method
from pipelines.errors import UserError, did_you_mean, one_of
from pipelines.method_keys import AXES, as_typed, help_of
from pipelines.task_config import PROTOCOLS
from pipelines.tasks.scoring import Request, score

# The arguments that are not the method's own fields: default and meaning.
_ARGUMENTS = {
    "method": ("griffin", f"a method by its name: {', '.join(METHODS)}; those below go on top of it"),
    "protocol": ("paper", f"for log-likelihoods: {', '.join(PROTOCOLS)}"),
    "seed": (0, "of random statistics and selections"),
}


@register_model("griffin")
class GriffinLM(HFLM):
    """lm-eval's HFLM, pruned: log-likelihoods under a protocol, generations with each request's own experts.

    Beside those of `_ARGUMENTS` it takes fields of `griffin.Method`, and HFLM's own, `pretrained` first.

    Raises:
        UserError: a value that is not allowed, before the model is loaded.
    """

    def __init__(self, *, method: str = "griffin", protocol: str = "paper", seed: int = 0, **arguments: Any) -> None:
        one_of("method", method, tuple(METHODS))
        one_of("protocol", protocol, PROTOCOLS)
        try:
            fields = {name: arguments.pop(name) for name in AXES if name in arguments}
            self.method = as_method(method, **fields)
        except (ValueError, TypeError) as refusal:
            raise UserError(as_typed(str(refusal))) from refusal
        if self.method.oracle:
            raise UserError(f"statistic={self.method.scorer.name}: knows the continuation, and lm-eval's tasks do not")
        self.protocol, self.seed = protocol, int(seed)
        print(f"griffin: {self.method.label}, protocol={protocol}, seed={seed}", file=sys.stderr)
        super().__init__(**arguments)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> GriffinLM:
        """As lm-eval's; a mistake is told before a model is loaded, and the settings are printed."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> GriffinLM:
        """As `create_from_arg_string`, of parsed arguments."""
        known = {*_ARGUMENTS, *AXES, *inspect.signature(HFLM.__init__).parameters}
        for key in arg_dict.keys() - known:
            raise UserError(f"--model_args {key}={arg_dict[key]}: no such argument{did_you_mean(key, known)}")
        if not arg_dict.get("pretrained"):
            raise UserError("--model_args: expected pretrained=NAME, a model of the hub or a folder")
        return cls(**arg_dict, **{key: value for key, value in (additional_config or {}).items() if value is not None})

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        method = self.method
        if method.dense:
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        if method.verified:
            expected = "expected verification=none, or tasks that generate"
            raise UserError(f"verification={method.verification}: log-likelihoods cannot be verified; {expected}")
        scores = score(
            griffin.Engine(self.model),
            [Request(tuple(context), tuple(continuation)) for _, context, continuation in requests],
            [method],
            protocol=self.protocol,
            context_length=self.max_length,
            batch_size=override_bs or (1 if self.batch_size == "auto" else self.batch_size),
            seed=self.seed,
        )
        answers = {number: (one.loglikelihood, one.greedy) for batch in scores for _, number, one in batch}
        return [answers[number] for number in range(len(requests))]

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        """As HFLM, with each row's own experts."""
        method = self.method
        if method.dense:
            return super()._model_generate(context, max_length, stop, **options)
        alone = method.verified or (len(context) == 1 and not method.by_token)
        with griffin.prune(self.model, method, mode="compact" if alone else "masked", seed=self.seed):
            return super()._model_generate(context, max_length, stop, **options)


def arguments_help() -> str:
    """The arguments of the model `griffin` with their meanings and defaults, beside HFLM's own."""
    arguments = _ARGUMENTS | {name: (axis.default, help_of(axis)) for name, axis in AXES.items()}
    head = "--model griffin takes HFLM's --model_args, and these (defaults in brackets):\n"
    return head + "".join(f"  {name:22} {text} ({default})\n" for name, (default, text) in arguments.items())


def main() -> None:
    """lm-eval's own command line, which now knows the model `griffin`; a mistake in the model's arguments ends the
    process with one line."""
    from lm_eval.__main__ import cli_evaluate

    if {"-h", "--help"} & {*sys.argv[1:]}:
        print(arguments_help())
    try:
        cli_evaluate()
    except (UserError, OSError, ValueError) as error:  # a model that is not there, a task that is none
        sys.exit(f"error: {' '.join(str(error).split())}")
