"""A peer is told of a row what makes it the same work, and its figures are read from its output."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from scripts.bench import peers
from scripts.bench.peers import PeerRow, peers_of, run_peers, titan_config, titan_model
from scripts.bench.suites import SUITES
from scripts.bench.titan_peer import StoredRows

DENSE = SUITES["dense-1gpu"][0]
FOUR_GPUS = SUITES["dense-4gpu"]

LOGGED = """[titan] 2026-11-22 - root - INFO - step:  1  loss: 12.1846  grad_norm:  2.1  \
memory: 70.10GiB(50.20%)  tps: 1,234  tflops: 10.00  mfu: 1.10%
[titan] - root - INFO - step: 10  loss:  9.5000  grad_norm:  1.0  memory: 74.50GiB(53.00%)  \
tps: 50,000  tflops: 500.00  mfu: 55.00%
[titan] - root - INFO - step: 15  loss:  9.1000  grad_norm:  1.0  memory: 74.50GiB(53.00%)  \
tps: 54,997  tflops: 585.00  mfu: 59.20%
[titan] - root - INFO - step: 20  loss:  8.9000  grad_norm:  1.0  memory: 74.50GiB(53.00%)  \
tps: 55,001  tflops: 586.00  mfu: 59.30%
[titan] - root - INFO - step: 25  loss:  8.7000  grad_norm:  1.0  memory: 74.40GiB(53.00%)  \
tps: 54,000  tflops: 580.00  mfu: 58.10%
"""


def test_torchtitan_is_told_batch_degrees_and_checkpointing_of_a_row(tmp_path: Path) -> None:
    found = titan_config(PeerRow.of(FOUR_GPUS[1]), tmp_path)
    assert found["parallelism"]["data_parallel_replicate_degree"] == 2
    assert found["parallelism"]["data_parallel_shard_degree"] == 2
    assert found["training"]["local_batch_size"] == 1
    assert found["training"]["steps"] == 25
    assert found["activation_checkpoint"]["mode"] == "none"
    selective = titan_config(PeerRow.of(SUITES["context-4gpu"][0]), tmp_path)
    assert selective["activation_checkpoint"] == {"mode": "selective", "selective_ac_option": "op"}


@pytest.mark.parametrize(("row", "hidden"), [(DENSE, 8192), (FOUR_GPUS[0], 14336)])
def test_torchtitans_rule_for_the_feed_forward_gives_the_width(row, hidden) -> None:
    arguments = titan_model(PeerRow.of(row).architecture.config, "sdpa")
    # torchtitan 0.2.2, models/llama3/model/model.py, FeedForward.__init__
    width = int(arguments["ffn_dim_multiplier"] * int(2 * 4 * arguments["dim"] / 3))
    multiple = arguments["multiple_of"]
    assert multiple * ((width + multiple - 1) // multiple) == hidden


def test_torchtitans_figures_are_the_medians_after_warm_up() -> None:
    assert peers.titan_summary(LOGGED, 10) == {
        "steps_measured": 15,
        "tokens_per_second_per_gpu": 54997.0,
        "slowest_and_fastest": [54000.0, 55001.0],
        "mfu": pytest.approx(0.592),
        "peak_memory_gib": 74.5,
        "first_and_last_loss": [12.1846, 8.7],
    }
    assert peers.titan_summary("nothing", 10)["outcome"] == "failed"


def test_a_peer_trains_a_row_only_where_its_work_is_the_same() -> None:
    packed, long = PeerRow.of(FOUR_GPUS[3]), PeerRow.of(SUITES["context-4gpu"][1])
    assert peers_of(packed) == ["torchtitan flex", "torchtitan varlen"]
    assert peers_of(long) == ["torchtitan sdpa"]
    tied = PeerRow.of(SUITES["documents-1gpu"][0])
    assert peers_of(tied) == []
    assert peers_of(PeerRow.of(DENSE)) == ["torchtitan sdpa", "transformers", "transformers-liger"]
    plain, *float8, small_state = SUITES["float8-1gpu"]
    assert peers_of(PeerRow.of(plain)) == peers_of(PeerRow.of(DENSE))
    assert [peers_of(PeerRow.of(row)) for row in float8] == [["torchtitan sdpa"]] * 2
    for row in (small_state, *SUITES["lora-1gpu"], *SUITES["preference-1gpu"]):
        assert peers_of(PeerRow.of(row)) == []


def test_what_is_not_installed_is_said_and_nothing_is_written(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    found = run_peers(DENSE, tmp_path, 1.0)
    assert [row["outcome"] for row in found] == ["not installed"] * 3
    assert found[0]["missing"] == ["torchtitan", "torchdata", "tyro"]
    assert not list(tmp_path.iterdir())


def test_a_peer_reads_the_tokens_of_our_steps(tmp_path, monkeypatch) -> None:
    """What two ranks of torchtitan read in three steps, against the rows of ours."""
    short = ("--training.seq_len=8", "--training.steps=3", "--training.local_batch_size=2")
    row = peers.BenchRow(
        name="short", gpus=2, config_file=DENSE.config_file, overrides=(*DENSE.overrides, *short)
    )
    monkeypatch.setattr(peers, "find_spec", lambda name: name)
    monkeypatch.setattr(peers, "version", lambda name: "0")
    words = SimpleNamespace(vocab_size=97, eos_id=1)  # the built-in ones take a while to train
    monkeypatch.setattr(peers, "open_tokenizer", lambda config: words)
    seen: list[list[list[int]]] = []

    def run(arguments: list[str], log: Path, timeout_seconds: float, **more: str) -> int:
        folder = Path(more["TESSERA_PEER_FOLDER"])
        seen.append(np.load(folder / "tokens.npy").tolist())
        assert json.loads((folder / "model.json").read_text())["arguments"]["dim"] == 2048
        for rank in range(2):
            rows = iter(StoredRows(folder, rank=rank, degree=2, local_batch_size=2))
            read = [next(rows) for _ in range(6)]
            seen.append([inputs["input"].tolist() for inputs, _ in read])
            assert all((label[:-1] == inputs["input"][1:]).all() for inputs, label in read)
        log.write_text(LOGGED)
        return 0

    monkeypatch.setattr(peers, "run_logged", run)
    (found,) = run_peers(row, tmp_path, 1.0)
    every, *of_ranks = seen
    assert len(every) == 3 * 4
    numbers = ([0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11])
    assert of_ranks == [[every[number] for number in each] for each in numbers]
    assert (found["outcome"], found["tokens_per_second_per_gpu"]) == ("ok", 54997.0)
