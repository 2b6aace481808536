"""The benchmark of a GPU, end to end on a CPU with a tiny shape."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import benchmark
import pytest
from benchmark import main

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = "--shapes tiny --rows 1 2 --prompt 24 --new 6 --repeats 2 --dtype float32 --device cpu --draft-tokens 2"


def test_make_bench_gpu_ends_in_its_table() -> None:
    command = ["make", "--silent", "bench-gpu", f"PYTHON={sys.executable}", f"BENCH={TINY}"]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "copies read and write" in ended.stdout
    lines = [
        re.split("  +", line)
        for line in ended.stdout.splitlines()
        if line.startswith("tiny   1 ") or line.startswith("tiny   2 ")
    ]
    names = ["dense", "griffin 50%", "recipe 50%"]
    expected = [("1", name) for name in (*names, "verified 80%", "exact")] + [("2", name) for name in names]
    assert [(line[1], line[3]) for line in lines] == expected
    assert all(float(line[4]) > 0 for line in lines)
    parts = [
        re.split("  +", line)[1:3]
        for line in ended.stdout.splitlines()
        if "of 3 tokens" in line or "draft step" in line
    ]
    assert ["verified 80%", "check of 3 tokens"] in parts
    assert ["exact", "draft step"] in parts
    # Of 2 layers, 2 x 3 x 64 x 256 of all weights are FF, and half of them are left.
    limits = {line[3]: float(line[6]) for line in lines if line[3] != "dense"}
    attention, feedforward, head = 2 * (4 * 64 * 64 + 2 * 64) + 64, 2 * 3 * 64 * 256, 1000 * 64
    dense = attention + feedforward + head
    assert limits["griffin 50%"] == pytest.approx(dense / (dense - feedforward / 2), abs=0.006)


def test_verified_decoding_is_worth_what_is_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    limits = []
    for acceptance in ("0", "1"):
        main([*TINY.split(), "--rows", "1", "--new", "24", "--repeats", "1", "--acceptance", acceptance])
        (line,) = [line for line in capsys.readouterr().out.splitlines() if re.match("tiny +1 .*verified", line)]
        limits.append(float(re.split("  +", line)[6]))
    # Of two drafts and a check come one token, or three.
    assert limits[1] == pytest.approx(3 * limits[0], abs=0.03)  # of two printed digits
    assert limits[0] < 1


def test_the_default_is_possible() -> None:
    benchmark._parse(["--device", "cpu"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--rows 0", "expected a whole number from 1 on"),
        ("--acceptance 2", "expected 0 to 1"),
        ("--draft-tokens 33", "expected 1 to 32"),
        ("--new 5000", "more than the context of llama2_13b"),
        ("--shapes foo", "invalid choice: 'foo'"),
    ],
)
def test_what_is_wrong_is_told(arguments: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments.split())
    assert ended.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
