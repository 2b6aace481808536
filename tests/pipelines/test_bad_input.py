"""Mistakes in a call: one line that names the key and the value, at once, with nothing loaded and nothing written."""

import sys
from pathlib import Path

import pytest
from calling import Entry, composed, process, ran, tiny

from pipelines.composition import Call
from pipelines.errors import UserError
from pipelines.job import attempt
from pipelines.models import device_kind
from pipelines.sweeps import FAILED
from pipelines.tasks import module_of

GOOD_ROW = '{"article": "Rain fell.", "summary": "Rain."}\n'
FILES = {
    "malformed.jsonl": GOOD_ROW.encode() + b'{"article": "Rain fell."\n',
    "no_summary.jsonl": b'{"article": "Rain fell."}\n',
    "number.jsonl": b'\n{"article": "Rain fell.", "summary": 3}\n',
    "latin1.jsonl": GOOD_ROW.encode() + '{"article": "Caf\u00e9.", "summary": "Caf\u00e9."}\n'.encode("latin-1"),
    "surrogate.jsonl": b'{"article": "Rain fell.", "summary": "Rain \\ud800."}\n',
    "list.jsonl": b'["Rain fell.", "Rain."]\n',
    "empty.jsonl": b"",
    "good.jsonl": GOOD_ROW.encode(),
    "text.txt": b"The ferry was late again. " * 40,
    "short.txt": b"short",
    "questions.jsonl": b'{"question": "How many?", "answer": "#### 7"}\n' * 7,
}

# (overrides, what the error must name); FILES stands for the folder with the files above.
# What composing refuses, and one of each kind of the others: by the entry.
CALLS: list[tuple[str, ...]] = [
    ("+task.hub.splits=test", "task.hub.splits"),
    ("task.kind=foo", "task.kind=foo", "generation"),
    ("grid.sparsity=[half]", "grid.sparsity=half", "a number"),
    ("sparsiti=0.3", "sparsiti", "sparsity"),
    ("+sparsiti=0.3", "sparsiti", "sparsity"),
    ("task.max_tokens=3", "task.max_tokens", "task.max_new_tokens"),
    ("limit=all", "limit=all"),
    ("wandb=offline", "wandb=offline"),
    ("task=null", "task"),
    ("task.data_files=FILES/malformed.jsonl", "task.data_files=FILES/malformed.jsonl", "line 2"),
    ("launcher=foo", "launcher=foo", "slurm_gpu"),
    ("hydra.launcher.n_jobs=2", "hydra.launcher.n_jobs", "launcher"),
    ("launcher=joblib hydra.launcher.partition=gpu", "hydra.launcher.partition", "launcher"),
    ("launcher=slurm hydra.launcher.partion=gpu", "hydra.launcher.partion", "hydra.launcher.partition"),
    ("launcher=slurm +hydra.launcher.partion=gpu", "hydra.launcher.partion", "hydra.launcher.partition"),
    ("launcher=slurm hydra.launcher.timeout_min=soon", "hydra.launcher.timeout_min=soon"),
    ("launcher=slurm hydra.launcher.timeout_min=2", "hydra.launcher.signal_delay_s=120", "timeout_min=2"),
    ("launcher=joblib hydra.launcher.n_jobs=0", "hydra.launcher.n_jobs=0", "-1"),
    ("launcher=joblib hydra.sweeper.max_batch_size=0", "hydra.sweeper.max_batch_size=0", "1 or more"),
    ("launcher=slurm hydra.launcher.partition=", "hydra.launcher.partition=", "name"),
    ("launcher=slurm hydra.launcher.timeout_min=0", "hydra.launcher.timeout_min=0", "1 or more"),
    ("hydra.mode=MULTIRUN launcher=joblib,local", "launcher=joblib,local", "expected one"),
    ("output_dir=FILES/good.jsonl", "output_dir", "FILES/good.jsonl"),
    ("output_dir=FILES/good.jsonl/below", "output_dir", "FILES/good.jsonl/below"),
    ("output_dir=/proc/griffin", "output_dir", "/proc/griffin"),
    ("output_dir=", "output_dir="),
    ("sparsity", "sparsity", "KEY=VALUE"),
    ("sparsity=[0.5", "sparsity=[0.5"),
    ("=3", "=3"),
    ("statistic=griffin,magnitude", "statistic=griffin,magnitude", "-m statistic=", "'grid.statistic=["),
    ("sparsity=0,0.5", "several values", "-m sparsity=0,0.5", "'grid.sparsity=[0,0.5]' in one process"),
    ("grid.sparsity=0.5", "grid.sparsity=0.5: expected a list, 'grid.sparsity=[0.5]'"),
    ("grid.sparsity=0,0.5", "grid.sparsity=0,0.5: expected a list, 'grid.sparsity=[0,0.5]'"),
    ("statistic=grifin", "statistic=grifin", "did you mean griffin?"),
    ("method=recipee", "method=recipee", "did you mean recipe?"),
    ("method=griffin,recipe", "several values", "-m method=griffin,recipe", "'grid.method=[griffin,recipe]' in one"),
]
# What the configuration's classes and the readers of data refuse: without the entry, which says all alike.
VALUES: list[tuple[str, ...]] = [
    ("task=humaneval", "task.allow_code_execution=false", "set task.allow_code_execution=true"),
    ("task=humaneval task.allow_code_execution=true task.timeout=0", "task.timeout=0", "1 or more"),
    ("task=piqa task.chat_template=true", "task.chat_template=true", "a task that generates"),
    ("task=gsm8k task.data_files=FILES/good.jsonl", "task.data_files without task.shots_file", "task.shots=0"),
    ("grid.statistic=[griffin,teal] compensation=ridge", "compensation=ridge with grid.statistic=teal", "=none"),
    ("statistic=teal shared_experts=true", "statistic=teal with shared_experts=true", "its own experts"),
    ("refresh=drift", "refresh=drift: expected one of none, compensation"),  # of version 0.2
    ("refresh=compensation", "refresh=compensation with compensation=none", "ridge"),
    ("compile=maybe", "compile=maybe", "true, false or auto"),
    *((f"draft_tokens={value}", f"draft_tokens={value}", "auto, or 1 to 32") for value in ("0", "33", "few", "null")),
    ("verification=exact sparsity=0", "verification=exact with sparsity=0", "sparsity > 0"),
    ("grid.verification=[none,exact] sparsity=[0,0,0]", "grid.verification=exact", "sparsity > 0"),
    ("task.kind=exactness batch_size=2", "task.kind=exactness", "batch_size=2", "expected 1"),
    ("task.kind=exactness task.decoding=reference_sampling", "task.decoding=reference_sampling", "expected greedy"),
    ("task=perplexity verification=exact", "verification=exact", "task=perplexity", "generates"),
    ("assistance=prompt_lookup", "assistance=prompt_lookup", "sparsity=0.5", "sparsity=0"),
    ("assistance=model sparsity=0", "assistance=model", "assistant=null"),
    ("assistant=foo sparsity=0", "assistance=none", "assistant=foo"),
    ("assistance=model assistant=foo sparsity=0", "assistance=model", "folder"),
    ("assistance=prompt_lookup sparsity=0 task.kind=fidelity", "assistance=prompt_lookup", "generation task"),
    ("verification=exact batch_size=2", "verification=exact", "batch_size=2", "expected 1"),
    ("verification=exact mode=masked", "verification=exact", "mode=masked", "compact"),
    *(
        (f"verification=exact {key}=true", "verification=exact", f"{key}=true", "one of the two")
        for key in ("shared_experts", "offload_dense")
    ),
    ("budget=late sparsity=[0.1,0.2,0.3]", "budget=late with a sparsity for each layer", "one of the two"),
    ("statistic=oracle", "statistic=oracle", "fidelity"),
    *((f"task={task} offset=1000", "offset=1000: expected less") for task in ("briefs", "briefs_choice", "flocking")),
    ("task.decoding=foo", "task.decoding=foo", "greedy"),
    ("model.dtype=int8", "model.dtype=int8", "bfloat16"),
    ("device=foo", "device=foo", "cpu"),
    ("device=cuda:99", "device=cuda:99"),
    ("sparsity=1", "sparsity=1", "< 1"),
    ("sparsity=null", "sparsity=null"),
    ("compile=true task.kind=fidelity", "compile=true", "task=briefs", "generation or latency"),
    ("grid.method=[griffin,recipee]", "grid.method=recipee", "did you mean recipe?"),
    ("+task.max_tokens=3", "task.max_tokens", "task.max_new_tokens"),
    ("batch_size=two", "batch_size=two", "auto"),
    ("batch_size=true", "batch_size=True", "auto"),
    ("limit=0", "limit=0"),
    ("task.max_new_tokens=0", "task.max_new_tokens=0"),
    ("mode=compact batch_size=4", "mode=compact", "batch_size=4"),
    ("batch_size=auto shared_experts=true", "batch_size=auto", "shared_experts=true"),
    ("offload_dense=true batch_size=2", "offload_dense=true", "mode=masked", "compact"),
    ("offload_dense=true compile=true", "offload_dense=true", "compile=true"),
    ("offload_dense=true task.kind=fidelity", "offload_dense=true", "task=briefs"),
    ("task=xsum task.shots=1", "task.data_files", "task.shots_file"),
    ("model.source=hub", "model.repo", "model.source=hub"),
    ("task.data_files=FILES/absent.jsonl", "task.data_files=FILES/absent.jsonl"),
    ("task.data_files=FILES", "task.data_files=FILES"),
    ("task.data_files=FILES/no_summary.jsonl", "line 1", "'summary'", "article"),
    ("task.data_files=FILES/number.jsonl", "line 2", "'summary'", "int"),
    ("task.data_files=FILES/latin1.jsonl", "task.data_files=FILES/latin1.jsonl", "line 2", "UTF-8"),
    ("task.data_files=FILES/surrogate.jsonl", "task.data_files=FILES/surrogate.jsonl", "line 1"),
    ("task.data_files=FILES/list.jsonl", "line 1", "list", "object"),
    ("task.data_files=FILES/empty.jsonl", "task.data_files=FILES/empty.jsonl"),
    ("task.article_field=document", "task.data_files", "'document'"),
    ("task.shots=1 task.shots_file=FILES/absent.jsonl", "task.shots_file=FILES/absent.jsonl"),
    ("task.shots=1 task.shots_file=FILES/malformed.jsonl task.shots=2", "task.shots_file", "line 2"),
    ("task.shots=2 task.shots_file=FILES/good.jsonl", "task.shots=2"),
    ("task=flocking task.kept=1.0", "task.kept=1.0"),
    ("task=flocking task.data_files=nowhere.txt", "task.data_files=nowhere.txt", "no such file"),
    ("task=briefs_qa task.protocol=continuation", "task.protocol=continuation", "classification"),
    ("task=latency batch_size=2", "task=latency times mode=compact", "shared_experts=true"),
    ("task=latency mode=masked", "task=latency times mode=compact"),
    ("task=latency statistic=teal", "statistic=teal with task=latency", "no faster than dense"),
]
# What takes the model to see: one point of a call fails, without the entry.
SHAPE = "model.architecture"
RECURRENT = (
    f"{SHAPE}.model_type=falcon_h1 +{SHAPE}.mamba_d_ssm=64 +{SHAPE}.mamba_n_heads=4 +{SHAPE}.mamba_d_head=16 "
    f"+{SHAPE}.mamba_d_state=8 +{SHAPE}.mamba_n_groups=1"
)
PERPLEXITY = "task=perplexity task.data_files=FILES/text.txt"
PRUNED = ("task=briefs", "task=fidelity", "task=briefs_choice", "task=briefs_qa", PERPLEXITY, "task=latency")
MODELS: list[tuple[str, ...]] = [
    ("model.package=no-such-package model=smollm2_135m", "model=smollm2_135m", "no-such-package"),
    (f"{SHAPE}.model_type=foo", SHAPE, "foo"),
    (f"{SHAPE}.hidden_size=wide", SHAPE, "hidden_size", "wide"),
    (f"{SHAPE}.hidden_size=65", SHAPE, "65"),  # not a multiple of the heads
    (f"{SHAPE}.model_type=bert", "model"),
    (f"{SHAPE}.model_type=mixtral +{SHAPE}.num_local_experts=2 offload_dense=true", "model=random_tiny: "),
    *((f"{task} sparsity=[0.5,0.2]", "model=random_tiny", "3") for task in PRUNED),
    *((f"{task} {SHAPE}.model_type=mixtral", "model=random_tiny", "mixture") for task in (*PRUNED, "task=flocking")),
    *((f"{task} {RECURRENT}", "model=random_tiny", "layer 0", "cropped") for task in (*PRUNED, "task=flocking")),
    (f"{PERPLEXITY} task.prompt_lengths=[3000]", "the text has 1040 tokens, expected at least 3256"),
    (f"{PERPLEXITY} task.prompt_lengths=[8000]", "expected at most 4096 tokens together, the context of random_tiny"),
    ("task=flocking task.sequence_length=5000", "the context of random_tiny"),
    ("task=flocking task.data_files=FILES/short.txt", "the text has 5 tokens, expected at least"),
    ("task=piqa task.data_files=FILES/good.jsonl", "task.data_files=FILES/good.jsonl"),
    ("task=gsm8k task.data_files=FILES/questions.jsonl task.shots_file=FILES/questions.jsonl task.shots=8", "shots=8"),
    (
        "task=gsm8k_cot_zeroshot task.data_files=FILES/questions.jsonl task.chat_template=true",
        "task.chat_template=true: the model has no chat template",
    ),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    return folder


def with_bad(good: list[str], bad: list[str]) -> list[str]:
    """The call with its bad overrides instead of the good ones of the same keys, or of another task."""
    keys = {override.partition("=")[0] for override in bad}
    apart = "task." if "task" in keys else " "
    return [one for one in good if one.partition("=")[0] not in keys and not one.startswith(apart)] + bad


def left_behind(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("case", CALLS, ids=[case[0] for case in CALLS])
def test_mistakes_are_told_in_one_line_before_anything_is_loaded(
    case: tuple[str, ...], call: Entry, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.models.load", lambda *_, **__: pytest.fail("a model was loaded"))
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    monkeypatch.chdir(cwd)
    out = tmp_path / "out"
    overrides, *named = [text.replace("FILES", str(files)) for text in case]
    ended = call(*with_bad(tiny(out), overrides.split()))
    ended.refused(*named)
    assert len(ended.err.splitlines()) == 1
    assert left_behind(out) == left_behind(cwd) == []
    assert left_behind(files) == sorted(FILES)


def read(*overrides: str) -> None:
    """All that a job does before it loads a model."""
    config = composed(*overrides)
    device_kind(config.device)
    module_of(config.task.kind).read(config)


@pytest.mark.parametrize("case", VALUES, ids=[case[0] for case in VALUES])
def test_bad_values_are_named_with_what_is_allowed(case: tuple[str, ...], files: Path, tmp_path: Path) -> None:
    overrides, *named = [text.replace("FILES", str(files)) for text in case]
    with pytest.raises(UserError) as error:
        read(*with_bad(tiny(tmp_path / "out"), overrides.split()))
    assert [word for word in named if word not in str(error.value)] == []
    assert len(str(error.value)) < 1000, "an error is read by a person"
    assert left_behind(tmp_path / "out") == []


def test_slurm_where_there_is_none_is_told_before_anything_is_written(
    call: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    for launcher in ("slurm", "slurm_gpu"):
        ended = call("-m", *tiny(tmp_path / "out", "sparsity=0,0.5", f"launcher={launcher}"))
        ended.refused(f"launcher={launcher}", "sbatch", "launcher=joblib")
        assert not (tmp_path / "out").exists()


SLOW = ["pipelines.models", "pipelines.tasks.generation", "datasets", "lm_eval", "wandb", "rouge_score"]


@pytest.mark.parametrize(("override", "slow"), [("sparsity=1", SLOW), ("wandb.mode=disabled", ["wandb"])])
def test_what_takes_seconds_is_imported_where_it_is_needed(override: str, slow: list[str], tmp_path: Path) -> None:
    script = (
        "import atexit, sys; from pipelines import run\n"
        f"atexit.register(lambda: print([name for name in {slow} if name in sys.modules]))\n"
        "run.main()"
    )
    ended = process([sys.executable, "-c", script, *tiny(tmp_path / "out", override)], tmp_path)
    assert (ended.code, ended.out.splitlines()[-1]) == (int(override == "sparsity=1"), "[]"), ended.err


@pytest.mark.parametrize("case", MODELS, ids=[case[0] for case in MODELS])
def test_what_only_the_model_can_tell_is_one_line_too(
    case: tuple[str, ...], files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides, *named = [text.replace("FILES", str(files)) for text in case]
    config = composed(*with_bad(tiny(tmp_path / "out"), overrides.split()))
    (status,) = attempt(config, Call((), None, single=True))
    printed = capsys.readouterr().err
    assert [line for line in printed.splitlines() if line.startswith("error: ")] == [f"error: {status.reason}"]
    assert "Traceback" not in printed
    assert (status.state, [word for word in named if word not in str(status.reason)]) == (FAILED, [])
    assert {Path(name).name for name in left_behind(tmp_path / "out")} <= {"config.yaml", "state.json", ".lock"}


def test_embedded_data_that_is_not_used_need_not_be_there(tmp_path: Path) -> None:
    assert ran(*tiny(tmp_path / "out", "task.embedded=absent.jsonl"))
