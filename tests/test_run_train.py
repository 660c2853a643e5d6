"""`scripts/run_train.sh` hands its environment and arguments to torchrun."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_script_starts_torchrun_with_the_file_the_ranks_and_the_options(tmp_path: Path) -> None:
    fake = tmp_path / "torchrun"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment |= {"CONFIG_FILE": "some.toml", "NGPU": "3"}
    options = ["--training.steps", "5", "--job.description", "two words"]
    run = subprocess.run(
        [str(ROOT / "scripts" / "run_train.sh"), *options],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    said = run.stdout.splitlines()
    assert "--nproc_per_node=3" in said or said[said.index("--nproc_per_node") + 1] == "3"
    assert said[-4:] == options and any("some.toml" in word for word in said)
