"""What would break a pruned model is refused in one sentence, and leaves it whole: threads, copies, wrong types."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import tiny
from prompts import prompt
from running import generate, new_tokens, step_logits
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

import griffin


class Pausing(StoppingCriteria):
    """Stops a generation in its middle until it may go on."""

    def __init__(self) -> None:
        self.inside, self.go_on = threading.Event(), threading.Event()

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> torch.Tensor:
        self.inside.set()
        assert self.go_on.wait(30)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


@pytest.mark.parametrize("mode", griffin.MODES)
@pytest.mark.parametrize("options", [{}, {"refresh": "experts"}])
@pytest.mark.parametrize("second", ["generate", "forward"])
def test_a_second_thread_is_refused_while_one_runs(second: str, options: dict[str, str], mode: str) -> None:
    model, ids = tiny("llama"), prompt(9)
    dense = generate(model, ids)
    found: list[Any] = []
    with griffin.prune(model, mode=mode, **options):
        expected = generate(model, ids)
        pausing = Pausing()
        criteria = StoppingCriteriaList([pausing])
        thread = threading.Thread(target=lambda: found.append(generate(model, ids, stopping_criteria=criteria)))
        thread.start()
        assert pausing.inside.wait(30)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="another thread is using this pruned model"):
                generate(model, prompt(5, 1)) if second == "generate" else model(prompt(5, 1))
        pausing.go_on.set()
        thread.join(30)
        assert new_tokens(found[0], ids) == new_tokens(expected, ids)
        assert new_tokens(generate(model, ids), ids) == new_tokens(expected, ids), "afterwards it is free"
    assert torch.equal(step_logits(generate(model, ids)), step_logits(dense))


def test_many_threads_leave_the_model_whole() -> None:
    """Whoever comes first is served, the others are told; nothing breaks."""
    model, ids = tiny("llama"), prompt(9)
    dense = generate(model, ids)
    outcomes: list[str] = []

    def work() -> None:
        for _ in range(5):
            try:
                generate(model, ids)
                outcomes.append("served")
            except RuntimeError as error:
                outcomes.append(str(error))

    with griffin.prune(model):
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        generate(model, ids)
    assert len(outcomes) == 15
    assert "served" in outcomes
    assert {outcome[:14] for outcome in outcomes} <= {"served", "another thread"}
    assert torch.equal(step_logits(generate(model, ids)), step_logits(dense))


def test_one_streaming_thread_goes_on_working() -> None:
    model, ids = tiny("llama"), prompt(9)

    class Tokens:
        def decode(self, tokens: Any, **_: Any) -> str:
            return " ".join(map(str, torch.as_tensor(tokens).flatten().tolist())) + " "

    with griffin.prune(model):
        expected = new_tokens(generate(model, ids), ids)[0]
        streamer = TextIteratorStreamer(Tokens(), skip_prompt=True, timeout=30)
        thread = threading.Thread(target=lambda: generate(model, ids, streamer=streamer))
        thread.start()
        text = "".join(streamer)
        thread.join(30)
    assert [int(token) for token in text.split()] == expected


@pytest.mark.parametrize("where", ["forward", "generate"])
def test_a_call_that_fails_does_not_keep_others_out(where: str) -> None:
    model = tiny("llama")
    wrong = torch.tensor([[10**6]])  # no such token
    with griffin.prune(model):
        with pytest.raises(IndexError):
            model(wrong) if where == "forward" else generate(model, wrong)
        done: list[Any] = []
        thread = threading.Thread(target=lambda: done.append(generate(model, prompt(5))))
        thread.start()
        thread.join(30)
        assert len(done) == 1


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "torch.save": lambda model: torch.save(model, io.BytesIO()),
    "state_dict": lambda model: model.state_dict(),
}


@pytest.mark.parametrize("mode", griffin.MODES)
@pytest.mark.parametrize("how", COPIES)
def test_copies_are_refused_inside_and_made_outside(how: str, mode: str) -> None:
    model, ids = tiny("llama"), prompt(9)
    with griffin.prune(model, mode=mode):
        expected = new_tokens(generate(model, ids), ids)
        with pytest.raises(RuntimeError, match=r"leave the griffin\.prune context before you copy or save it"):
            COPIES[how](model)
        assert new_tokens(generate(model, ids), ids) == expected
    COPIES[how](model)
    assert not {"__deepcopy__", "__reduce_ex__"} & {*vars(model)}


def test_a_model_is_not_saved_inside(tmp_path: Any) -> None:
    model = tiny("llama")
    with griffin.prune(model), pytest.raises(RuntimeError, match="before you copy or save it"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"sparsity": "0.5"}, "sparsity='0.5': expected a number"),
        ({"sparsity": None}, "sparsity=None: expected a number"),
        ({"sparsity": True}, "sparsity=True: expected a number"),
        ({"sparsity": [0.5, "x", 0.5]}, "sparsity='x': expected a number"),
        ({"sparsity": {0.5}}, "sparsity={0.5}: expected a number"),
        ({"statistic": None}, "statistic=None: expected one of"),
        ({"statistic": ["griffin"]}, "expected one of"),
        ({"seed": "1"}, "seed='1': expected a whole number"),
    ],
)
def test_arguments_of_the_wrong_type_are_named(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises((ValueError, TypeError)) as error:
        griffin.prune(tiny("llama"), **arguments)
    assert words in str(error.value)


@pytest.mark.parametrize("model", ["gpt2", None, 3, torch.nn.Linear])
def test_what_is_no_model_is_named(model: Any) -> None:
    with pytest.raises(TypeError, match="expected a transformers model"):
        griffin.prune(model)
