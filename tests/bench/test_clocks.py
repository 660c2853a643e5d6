"""What a GPU was clocked at is told of the time at full load alone, or not at all."""

import time
from pathlib import Path

import psutil
import pytest

from scripts.bench.clocks import sampled, summarise

LINES = """\
3, 345, 77.87, Not Active
100, 1980, 650.10, Not Active
100, 1620, 690.00, Active
98, 1650, [N/A], Active
100, 1635, 691.30, Active
100, 16
"""


def test_medians_are_of_the_samples_at_full_load() -> None:
    found = summarise(LINES)
    assert found == {"samples": 4, "sm_mhz": 1642.5, "watts": 690, "limited_by_power": 0.75}
    assert summarise("3, 345, 77.87, Not Active\n") == summarise("") == {}


def test_the_program_is_asked_and_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    told = f"cat <<'END'\n{LINES}END\necho $$ > {tmp_path}/pid\nexec sleep 60\n"
    program.write_text(f"#!/bin/sh\necho $* > {tmp_path}/words\n{told}")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    pid, deadline = tmp_path / "pid", time.monotonic() + 30.0
    with sampled() as found:
        while not (pid.is_file() and pid.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert found == {}
    assert found["samples"] == 4
    assert "--id=3" in (tmp_path / "words").read_text().split()
    assert not psutil.pid_exists(int(pid.read_text()))


def test_nothing_is_told_without_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with sampled() as found:
        pass
    assert found == {}
