"""Mistakes in a call: one line that names the key and the value, at once, with nothing loaded and nothing written."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from calling import Outcome, composed, process, tiny

from pipelines.errors import UserError
from pipelines.models import device_kind
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
    "blank.jsonl": b"\n  \n",
    "good.jsonl": GOOD_ROW.encode(),
}

# (overrides, what the error must name); FILES stands for the folder with the files above.
# What composing refuses, and one of each kind of the others: by the entry.
CALLS: list[tuple[str, ...]] = [
    ("+task.hub.splits=test", "task.hub.splits"),
    ("statistic=foo", "statistic=foo", "wanda"),
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
    ("task=xsumm", "task=xsumm", "did you mean xsum?"),
]
# What the configuration's classes and the readers of data refuse: without the entry, which says all alike.
VALUES: list[tuple[str, ...]] = [
    ("task=humaneval", "task.allow_code_execution=false", "set task.allow_code_execution=true"),
    ("task=humaneval task.allow_code_execution=true task.timeout=0", "task.timeout=0", "1 or more"),
    ("task=piqa task.chat_template=true", "task.chat_template=true", "a task that generates"),
    ("task=gsm8k task.data_files=FILES/good.jsonl", "task.data_files without task.shots_file", "task.shots=0"),
    ("statistic=teal compensation=ridge", "compensation=ridge with statistic=teal", "compensation=none"),
    ("grid.statistic=[griffin,teal] compensation=ridge", "compensation=ridge with grid.statistic=teal", "=none"),
    ("statistic=teal shared_experts=true", "statistic=teal with shared_experts=true", "its own experts"),
    ("refresh=drift", "refresh=drift: expected one of none, compensation"),  # of version 0.2
    ("refresh=compensation", "refresh=compensation with compensation=none", "ridge"),
    ("compile=maybe", "compile=maybe", "true, false or auto"),
    *((f"draft_tokens={value}", f"draft_tokens={value}", "auto, or 1 to 16") for value in ("0", "17", "few", "null")),
    ("verification=exact sparsity=0", "verification=exact with sparsity=0", "sparsity > 0"),
    ("grid.verification=[none,exact] sparsity=[0,0,0]", "grid.verification=exact", "sparsity > 0"),
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
    ("grid.statistic=[oracle]", "statistic=oracle", "fidelity"),
    *((f"task={task} offset=1000", "offset=1000: expected less") for task in ("briefs", "briefs_choice", "flocking")),
    ("task.decoding=foo", "task.decoding=foo", "greedy"),
    ("model.dtype=int8", "model.dtype=int8", "bfloat16"),
    ("device=foo", "device=foo", "cpu"),
    ("device=cuda:99", "device=cuda:99"),
    ("sparsity=1", "sparsity=1", "< 1"),
    ("sparsity=null", "sparsity=null"),
    ("sparsity=", "sparsity="),
    ("sparsity=[]", "sparsity=[]"),
    ("compile=true task.kind=fidelity", "compile=true", "task=briefs", "generation or latency"),
    ("grid.method=[griffin,recipee]", "grid.method=recipee", "did you mean recipe?"),
    ("+task.max_tokens=3", "task.max_tokens", "task.max_new_tokens"),
    ("+wandb.name=mine", "wandb.name"),
    ("batch_size=two", "batch_size=two", "auto"),
    ("batch_size=true", "batch_size=True", "auto"),
    ("batch_size=0", "batch_size=0", "auto"),
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
    ("task=perplexity task.data_files=FILES/blank.jsonl", "task.data_files=FILES/blank.jsonl", "found no row"),
    ("task=briefs_qa task.protocol=continuation", "task.protocol=continuation", "classification"),
    ("task=latency batch_size=2", "task=latency", "shared_experts=true"),
    ("task=latency statistic=teal", "statistic=teal with task=latency", "no faster than dense"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    return folder


def with_bad(good: list[str], bad: list[str]) -> list[str]:
    """The call with its bad overrides instead of the good ones of the same keys."""
    keys = {override.partition("=")[0] for override in bad}
    return [override for override in good if override.partition("=")[0] not in keys] + bad


def left_behind(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("case", CALLS, ids=[case[0] for case in CALLS])
def test_mistakes_are_told_in_one_line_before_anything_is_loaded(
    case: tuple[str, ...], call: Callable[..., Outcome], files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    bad = overrides.split()
    good = [one for one in tiny(tmp_path / "out") if not one.startswith("task.") or not bad[0].startswith("task=")]
    with pytest.raises(UserError) as error:
        read(*with_bad(good, bad))
    assert [word for word in named if word not in str(error.value)] == []
    assert len(str(error.value)) < 1000, "an error is read by a person"
    assert left_behind(tmp_path / "out") == []


def test_slurm_where_there_is_none_is_told_before_anything_is_written(
    call: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    for launcher in ("slurm", "slurm_gpu"):
        ended = call("-m", *tiny(tmp_path / "out", "sparsity=0,0.5", f"launcher={launcher}"))
        ended.refused(f"launcher={launcher}", "sbatch", "launcher=joblib")
        assert not (tmp_path / "out").exists()


def test_a_mistake_is_told_before_what_takes_seconds_is_imported(tmp_path: Path) -> None:
    slow = ["pipelines.models", "pipelines.tasks.generation", "datasets", "lm_eval", "wandb", "rouge_score"]
    script = (
        "import atexit, sys; from pipelines import run\n"
        f"atexit.register(lambda: print([name for name in {slow} if name in sys.modules]))\n"
        "run.main()"
    )
    ended = process([sys.executable, "-c", script, *with_bad(tiny(tmp_path / "out"), ["sparsity=1"])], tmp_path)
    ended.refused("sparsity=1")
    assert ended.out == "[]\n"


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ("model.package=no-such-package model=smollm2_135m", ["model=smollm2_135m", "no-such-package"]),
        ("model.architecture.model_type=foo", ["model.architecture", "foo"]),
        ("model.architecture.hidden_size=wide", ["model.architecture", "hidden_size", "wide"]),
        ("model.architecture.hidden_size=65", ["model.architecture", "65"]),  # not a multiple of the heads
        ("model.architecture.model_type=bert", ["model"]),
        (
            "model.architecture.model_type=falcon_h1 +model.architecture.mamba_d_ssm=64 "
            "+model.architecture.mamba_n_heads=4 +model.architecture.mamba_d_head=16 "
            "+model.architecture.mamba_d_state=8 +model.architecture.mamba_n_groups=1",
            ["model=random_tiny", "layer 0", "cannot be cropped"],  # a recurrent state
        ),
    ],
)
def test_what_only_the_model_can_tell_is_one_line_too(
    overrides: str, named: list[str], call: Callable[..., Outcome], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ended = call(*with_bad(tiny(out), overrides.split()))
    ended.refused(*named)
    assert {Path(name).name for name in left_behind(out)} <= {"config.yaml", "state.json", ".lock"}


def test_unused_embedded_data_that_is_absent_is_not_called_an_output_folder(
    call: Callable[..., Outcome], tmp_path: Path
) -> None:
    # data_files replace the embedded data, so nothing needs to be there; if it is refused, then by its own name.
    ended = call(*tiny(tmp_path / "out", "task.embedded=absent.jsonl"))
    assert "Error executing job" not in ended.err
    if ended.code:
        ended.refused("task.embedded", "absent.jsonl")
