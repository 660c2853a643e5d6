"""What a run leaves behind is read into a record, and records into comparisons and tables."""

import json
import os
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from scripts.bench import __main__ as bench
from scripts.bench import measure
from scripts.bench.__main__ import chosen_rows
from scripts.bench.measure import (
    LAUNCHER_REPORT,
    ROOT,
    command,
    end_on_signals,
    measured_lines,
    run_logged,
    run_row,
    summarise,
)
from scripts.bench.probes import take_probes
from scripts.bench.suites import SUITES, BenchRow
from scripts.bench.tables import compare, rewritten, table
from scripts.bench.trace import covered, kind_of, summarise_trace

ROW = SUITES["dense-1gpu"][0]


def metrics_line(step: int) -> dict[str, Any]:
    """Steps 11 to 25 take 1.0 to 2.4 s; those of the profiler 100."""
    seconds = {True: 1.0 + 0.1 * (step - 11), False: 100.0}[10 < step <= 25]
    parts = {"memory/optimizer_gib": 1.5, "memory/temporary_gib": None} if step == 2 else {}
    return {
        **{"step": step, "loss": 9.0 - step / 10, "rows": 4, "tokens": 400 * step, **parts},
        "tokens_per_second_per_device": 400 / seconds,
        "step_seconds": seconds,
        **{
            "mfu": 0.5,
            "mfu_documents": 0.4,
            "data_seconds": 0.0,
            "saving_seconds": 4.0 * (step == 16),
            "goodput": step / 100,
        },
        **{"compilations": 3 * (step < 3), "host_syncs": 1.0, "peak_memory_gib": 64.0},
        "peak_allocated_gib": 60.0,
    }


def write_metrics(folder: Path) -> Path:
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(metrics_line(step)) + "\n" for step in range(1, 29)))
    return path


def test_medians_are_of_the_steps_between_warm_up_and_profiler(tmp_path: Path) -> None:
    found = summarise(ROW, measured_lines(ROW, write_metrics(tmp_path)))
    assert found["steps_measured"] == 15
    assert found["tokens_per_second_per_gpu"] == round(400 / 1.7, 1)
    assert found["step_seconds"] == {"p10": 1.14, "p50": 1.7, "p90": 2.26}
    assert (found["mfu"], found["mfu_documents"], found["compilations"]) == (0.5, 0.4, 0)
    assert found["memory_gib"] == {"optimizer": 1.5} and found["save_seconds"] == [4.0]
    assert (found["tokens_per_row"], found["goodput"], found["passed"]) == (100, 0.25, False)


def test_the_profiled_step_follows_the_measured_ones_where_there_are_many() -> None:
    options = command(ROW, Path("run"))
    assert options[-4:] == [
        "--training.steps=28",
        "--profiling.enable_profiling",
        "--profiling.profile_freq=28",
        "--profiling.profiler_warmup=2",
    ]
    assert not any("profiling" in word for word in command(SUITES["context-2gpu"][0], Path("run")))


@pytest.mark.parametrize(
    ("code", "text", "outcome"),
    [
        (1, "torch.OutOfMemoryError: CUDA out of memory. Tried", "out of memory"),
        (1, "Cuda failure 2 'out of memory'", "out of memory"),
        (1, "ValueError: no", "failed"),
        (-9, "step 3", "timeout"),
    ],
)
def test_a_row_that_fails_is_recorded_with_how(tmp_path, monkeypatch, code, text, outcome) -> None:
    def run(arguments: list[str], log: Path, timeout_seconds: float) -> int:
        log.write_text(text)
        return code

    monkeypatch.setattr(measure, "run_logged", run)
    found = run_row(ROW, tmp_path, 1.0)
    assert (found["outcome"], found["exit_code"], found["passed"]) == (outcome, code, False)
    assert text in found["error"]


def test_a_row_that_hangs_after_its_steps_keeps_its_figures_and_does_not_pass(
    tmp_path, monkeypatch
) -> None:
    def run(arguments: list[str], log: Path, timeout_seconds: float) -> int:
        (folder,) = (Path(a.partition("=")[2]) for a in arguments if "dump_folder" in a)
        folder.mkdir()
        file = write_metrics(folder)
        file.write_text("".join(file.read_text().splitlines(True)[:num_steps]) + '{"step": 2')
        log.write_text("done")
        return -9

    monkeypatch.setattr(measure, "run_logged", run)
    num_steps, row = 25, replace(ROW, floor_tokens_per_second=1.0)
    found = run_row(row, tmp_path, 1.0)
    assert (found["outcome"], found["passed"]) == ("timeout", False)
    assert found["tokens_per_second_per_gpu"] == round(400 / 1.7, 1)
    ended = {**record(a=100.0)["rows"][0], "outcome": "timeout"}
    after = {**record(), "rows": [ended]}
    assert compare(record(a=100.0), after)[1] is False
    assert "| 100 (timeout) |" in table([after])
    num_steps = 24
    assert "tokens_per_second_per_gpu" not in run_row(row, tmp_path, 1.0)


def test_the_line_about_memory_is_kept_wherever_it_is(tmp_path: Path) -> None:
    log, line = tmp_path / "log", "[rank1]: torch.OutOfMemoryError: CUDA out of memory. Tried"
    other = "[rank0]: NCCL watchdog\n" * 200
    for text in (f"begin\n{line}\n{other}", f"{other}{LAUNCHER_REPORT}] Sending\n{line}\n{other}"):
        log.write_text(text)
        found = measure.outcome(1, log)
        assert found["outcome"] == "out of memory"
        assert found["error"].startswith(f"{line}\n")
        assert found["error"].endswith("NCCL watchdog\n")


STARTS_A_SESSION = "setsid sleep 60 & echo $!; wait"  # as torchrun starts each rank


def is_running(log: Path) -> bool:
    try:
        return psutil.Process(int(log.read_text())).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_what_a_command_started_ends_with_it_when_time_is_up_or_this_process_is_ended(
    tmp_path: Path,
) -> None:
    log, before = tmp_path / "log", [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP)]
    assert run_logged(["sh", "-c", STARTS_A_SESSION], log, 0.3) == -signal.SIGKILL
    assert not is_running(log)
    try:
        end_on_signals()
        killer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM))
        killer.start()
        with pytest.raises(SystemExit, match="143"):
            run_logged(["sh", "-c", STARTS_A_SESSION], log, 30.0)
        assert not is_running(log)
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGHUP), before, strict=True):
            signal.signal(number, handler)


def test_idle_time_is_what_no_kernel_covers_and_collectives_hide_nothing() -> None:
    def event(name: str, start: float, length: float, category: str = "kernel") -> dict[str, Any]:
        return {"name": name, "ts": start, "dur": length, "cat": category}

    assert covered([(0.0, 2.0), (1.0, 3.0), (5.0, 6.0)]) == 4.0
    found = summarise_trace(
        [
            event("ProfilerStep#27", 1000.0, 10_000.0, "user_annotation"),
            event("multi_tensor_apply", 0.0, 2000.0),  # of the step before, half of it in this one
            event("nvjet_tst_128x256", 2000.0, 3000.0),
            event("ncclDevKernel_AllGather", 4000.0, 3000.0),
            event("cudnn_sdpa_sm90_flash_fprop", 8000.0, 1000.0),
            event("triton_poi_fused" + "_x" * 99, 9000.0, 600.0),
            event("triton_poi_fused" + "_x" * 98, 9600.0, 5000.0),  # ends behind the step
            event("aten::mm", 1000.0, 9000.0, "cpu_op"),
            {"name": "nothing", "ph": "M"},
        ]
    )
    assert (found["step_ms"], found["gpu_idle"], found["gpu_only_communicates"]) == (10, 0.1, 0.2)
    assert found["ms_by_kind"] == {
        **{"matrix products": 3.0, "collectives": 3.0, "other": 2.0, "optimizer": 1.0},
        "attention": 1.0,
    }
    assert found["kernels"] == 6
    assert found["longest_kernels_ms"][("triton_poi_fused" + "_x" * 99)[:120]] == 2.0
    assert summarise_trace([]) == {}


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_sm90_tst_320x128_64x3_1x2_h_bz_coopB_NNT", "matrix products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26", "attention"),
        ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(ncclDevKernelArgsStorage)", "collectives"),
        ("void at::native::detail::chunk_cat_cuda_kernel<float, BFloat16>", "copies of shards"),
        ("multi_tensor_apply_kernel<TensorListMetadata<2>, CopyFunctor<BF", "copies of shards"),
        ("Memcpy PtoP (Device -> Device)", "copies of shards"),
        ("multi_tensor_apply_kernel<TensorListMetadata<1>, LpNormFunctor<f", "gradient norm"),
        ("multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata<4>, Fu", "optimizer"),
        ("triton_poi_fused_mul_silu_4", "other"),
        ("triton_red_fused__fused_rms_norm__scaled_mm__to_copy_abs_t", "other"),
        ("triton_tem_fused_mm_3", "matrix products"),
        ("triton_tem_fused_flex_attention_0", "attention"),
    ],
)
def test_kernels_are_told_apart_by_their_names(kernel: str, kind: str) -> None:
    assert kind_of(kernel) == kind


def record(**speeds: float | None) -> dict[str, Any]:
    rows = [
        {"row": name, "gpus": 1, "command": "--training.local_batch_size=4 --training.seq_len=8192"}
        | (
            {"tokens_per_second_per_gpu": speed, "mfu": 0.5, "peak_memory_gib": 10.0}
            if speed
            else {"outcome": "out of memory"}
        )
        for name, speed in speeds.items()
    ]
    return {"rows": rows, "machine": {"gpu": "GPU", "torch": "2", "date": "2026-01-01"}}


@pytest.mark.parametrize(
    ("after", "is_good"),
    [({"a": 98.1, "b": 200.0}, True), ({"a": 98.0}, False), ({"a": None}, False), ({}, False)],
)
def test_two_percent_less_or_a_failure_is_a_loss(after, is_good) -> None:
    lines, found = compare(record(a=100.0), record(**after))
    assert found is is_good
    assert any(line.startswith("a: ") for line in lines)


def test_a_table_has_the_best_of_each_peer_and_the_floor() -> None:
    peer = {"row": "a", "version": "1", "peak_memory_gib": 12.0}
    peers = [
        {**peer, "peer": "titan flex", "tokens_per_second_per_gpu": 90},
        {**peer, "peer": "titan varlen", "tokens_per_second_per_gpu": 95},
        {"row": "a", "peer": "other", "outcome": "not installed"},
    ]
    floors = [{"row": "a", "floor_tokens_per_second_per_gpu": 125.0}]
    found = table([record(a=100.0, b=None), {**record(), "peers": peers, "floors": floors}])
    assert (
        "| a | 1 | 4 x 8,192 | 100 | 50.0% | 10.0 | 2026-01-01 | 80.0% of 125 | 95 (12.0 GiB) |"
        in found
    )
    assert "| b | 1 | 4 x 8,192 | out of memory | - | - | 2026-01-01 | - | - |" in found
    assert found.endswith("\nGPU, torch 2.\n")
    older = {**record(a=100.0, b=90.0), "peers": peers}
    newer = table([older, {**record(a=110.0), "peers": [peers[0]]}])
    assert [line.split(" | ")[3] for line in newer.splitlines()[2:4]] == ["110", "90"]
    assert newer.splitlines()[2].endswith(" | 90 (12.0 GiB) |"), "of the row's own record"


def test_a_suite_goes_on_after_a_row_that_fails_and_its_peers_stand_in_the_record(
    tmp_path, monkeypatch, capsys
) -> None:
    rows = SUITES["dense-1gpu"]
    ended = dict(zip([row.name for row in rows], [100.0, None, 120.0], strict=True))

    def run(row: BenchRow, log_folder: Path, timeout_seconds: float) -> dict[str, Any]:
        (found,) = record(**{row.name: ended[row.name]})["rows"]
        return {**found, "passed": ended[row.name] is not None}

    monkeypatch.setattr(bench, "run_row", run)
    monkeypatch.setattr(bench, "run_peers", lambda row, *rest: [{"row": row.name, "peer": "other"}])
    monkeypatch.setattr(bench, "take_probes", lambda gpus: {"matmul_8192_bf16_tflops": 790.0})
    out = tmp_path / "new" / "record.json"
    monkeypatch.setattr(sys, "argv", ["bench", "peers", "dense-1gpu", "--out", str(out)])
    assert bench.main() == 1
    written = json.loads(out.read_text())
    assert [row["row"] for row in written["rows"]] == list(ended)
    assert [row["row"] for row in written["peers"]] == list(ended)
    assert f"| {rows[1].name} | 1 | 4 x 8,192 | out of memory |" in capsys.readouterr().out
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert take_probes(2) == {"not taken": "this machine has 0 of 2 GPUs"}
    monkeypatch.setattr(sys, "argv", ["bench", "compare", str(out), str(tmp_path / "none.json")])
    assert bench.main() == 2
    assert "none.json is no file" in capsys.readouterr().err


def test_the_tables_of_the_readme_are_those_of_the_records() -> None:
    text = (ROOT / "README.md").read_text()
    assert "| llama-8b FSDP4, sdpa |" in text
    assert rewritten(text) == text, "run python -m scripts.bench table --write README.md"


def test_a_row_is_chosen_by_its_suite_or_its_name_and_names_are_unique_in_a_suite() -> None:
    assert chosen_rows("dense-1gpu", "8 rows") == [SUITES["dense-1gpu"][2]]
    assert chosen_rows(ROW.name) == [ROW]
    for name in ("nothing", ""):
        with pytest.raises(ValueError, match="no suite and no row"):
            chosen_rows(name)
    with pytest.raises(ValueError, match="--only 'x' is in no row"):
        chosen_rows("dense-1gpu", "x")
    assert all(len({row.name for row in suite}) == len(suite) for suite in SUITES.values())
