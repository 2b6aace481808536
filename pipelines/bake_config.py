"""The typed configuration of `python -m pipelines.bake`, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from griffin import Method
from griffin.method import DRAFTING
from pipelines.config import ModelConfig, RunConfig
from pipelines.errors import UserError
from pipelines.method_keys import AXES, GridConfig, MethodKeys, check, described, planned
from pipelines.task_config import GenerationTask

# What a checkpoint cannot have, and why.
_ONLY_WITH_PROMPTS = {
    "verification": "nothing checks what a checkpoint writes",
    "refresh": "nothing follows a text in a checkpoint",
    "quantization": "a checkpoint has the precision of its model",
    "budget": "a checkpoint has one FF width",
    **dict.fromkeys(DRAFTING, "a checkpoint drafts nothing"),
}


@dataclass
class BakeConfig(MethodKeys):
    """One call of `python -m pipelines.bake`: a model pruned once for all prompts of a file."""

    grid: ClassVar[Any] = GridConfig()  # of one method

    model: ModelConfig = described("which model")
    data_files: str | None = described("a JSON Lines file with a prompt in each row", None)
    prompt_field: str = described("the field that holds the prompt", "prompt")
    chat_template: bool = described("each prompt is what a user says to an instruction model", False)
    out: str | None = described("the folder of the checkpoint, a new or an empty one", None)
    limit: int | None = described("only the first N rows choose; null: all but those held", None, least=1)
    offset: int = described("rows of the data passed over before the first", 0, least=0)
    held: int = described("the rows behind these, on which the model is compared with the dense one", 8, least=2)
    max_new_tokens: int = described("tokens of the dense model's text that are compared, of each held row", 32, least=1)
    seed: int = described("of random statistics, selections and weights", 0, least=0)
    device: str = described("auto (GPUs if there are any), cpu, cuda, cuda:N, mps", "auto")

    def __post_init__(self) -> None:
        check(self)
        for key, place in (("data_files", "a JSON Lines file"), ("out", "a folder")):
            if not getattr(self, key):
                raise UserError(f"{key}=: expected {place}")
        folder = Path(str(self.out))
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise UserError(f"out={folder}: exists; expected a new folder, or an empty one")
        self._check_method()
        self.comparison()

    @property
    def method(self) -> Method:
        """How the model is pruned."""
        return planned(self)[0]

    def _check_method(self) -> None:
        method = self.method
        wrong = [key for key in _ONLY_WITH_PROMPTS if getattr(self, key) != AXES[key].default]
        if wrong:
            words = [f"{getattr(self, key)}: expected {AXES[key].default}, {_ONLY_WITH_PROMPTS[key]}" for key in wrong]
            raise UserError("; ".join(f"{key}={text}" for key, text in zip(wrong, words, strict=True)))
        if method.dense or not isinstance(method.sparsity, float):
            raise UserError(f"sparsity={self.sparsity}: expected one number, 0 < sparsity < 1, for a smaller FF width")
        if method.by_token or method.oracle:
            knows = "chooses for each token" if method.by_token else "knows what comes after the prompt"
            raise UserError(f"statistic={method.scorer.name}: expected one of prompts; it {knows}")

    def comparison(self) -> RunConfig:
        """What compares the model with the dense one, as a run of kind `fidelity`."""
        task = GenerationTask(
            name="held",
            kind="fidelity",
            data_files=self.data_files,
            article_field=self.prompt_field,
            summary_field=self.prompt_field,
            instruction="",
            shot_instruction="",
            shots=0,
            chat_template=self.chat_template,
            max_new_tokens=self.max_new_tokens,
        )
        return RunConfig(
            **{name: getattr(self, name) for name in AXES},
            model=self.model,
            task=task,
            limit=self.held,
            seed=self.seed,
            device=self.device,
        )
