import io
import logging
import os
import sys
import threading
from importlib.metadata import version
from pathlib import Path

import pytest

from engine import logging as engine_logging
from engine.logging import ERASE_LINE, environment_report, source_commit, start_logging

log = logging.getLogger("tessera")


class Screen(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def open_screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    """Put one terminal behind stdout and stderr; no fixture, since pytest sets them between."""
    stream = Screen()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def test_rank_0_shows_information_and_others_only_warnings(capsys):
    for rank in (0, 3):
        output = start_logging(rank=rank)
        log.info("fine at %d", rank)
        log.warning("odd at %d", rank)
        output.close()
    lines = [line.partition(" ")[2] for line in capsys.readouterr().err.splitlines()]
    assert lines == ["fine at 0", "warning: odd at 0", "rank 3: warning: odd at 3"]


def test_each_rank_s_file_holds_what_it_printed_and_logged(tmp_path: Path, capsys):
    for rank in (0, 1):
        output = start_logging(rank=rank, folder=tmp_path / "logs")
        print(f"printed by {rank}")
        print(f"complained by {rank}", file=sys.stderr)
        log.info("logged by %d", rank)
        output.close()
    shown = capsys.readouterr()
    assert shown.out == "printed by 0\nprinted by 1\n"
    assert "logged by 0" in shown.err and "logged by 1" not in shown.err
    for rank in (0, 1):
        text = (tmp_path / f"logs/rank-{rank}.log").read_text()
        assert text.startswith(f"printed by {rank}\ncomplained by {rank}\n")
        assert text.endswith(f"logged by {rank}\n")
        assert text.count("\n") == 3


def test_a_resumed_run_appends_to_the_file(tmp_path: Path, capsys):
    for attempt in (1, 2):
        output = start_logging(rank=0, folder=tmp_path)
        print(f"attempt {attempt}")
        output.close()
    assert (tmp_path / "rank-0.log").read_text() == "attempt 1\nattempt 2\n"


def test_closing_gives_the_streams_and_the_logger_back():
    streams, handlers = (sys.stdout, sys.stderr), list(log.handlers)
    output = start_logging(rank=0)
    assert (sys.stdout, sys.stderr) != streams
    output.close()
    assert (sys.stdout, sys.stderr) == streams
    assert log.handlers == handlers
    assert log.propagate


def test_a_traceback_reaches_the_terminal_and_the_file_of_the_rank(tmp_path: Path, capsys):
    output = start_logging(rank=2, folder=tmp_path)
    try:
        raise RuntimeError("the model broke")
    except RuntimeError as error:
        sys.__excepthook__(RuntimeError, error, error.__traceback__)
    output.close()
    for text in (capsys.readouterr().err, (tmp_path / "rank-2.log").read_text()):
        assert text.startswith("Traceback")
        assert text.endswith("RuntimeError: the model broke\n")


def test_the_live_line_stays_below_what_is_printed(monkeypatch, tmp_path: Path):
    screen = open_screen(monkeypatch)
    output = start_logging(rank=0, folder=tmp_path, use_color=False)
    assert output.is_live
    output.show("step 1")
    print("hello")  # two writes: the text, then the end of the line
    output.show("step 2")
    output.show("")
    output.close()
    assert screen.getvalue() == (f"step 1{ERASE_LINE}hello\nstep 1{ERASE_LINE}step 2{ERASE_LINE}")
    assert (tmp_path / "rank-0.log").read_text() == "hello\n"


def test_an_unfinished_line_is_not_written_over_by_the_live_line(monkeypatch):
    screen = open_screen(monkeypatch)
    output = start_logging(rank=0)
    print("working ...", end="")
    output.show("step 1")
    print(" done")
    output.close()
    assert screen.getvalue() == f"working ... done\nstep 1{ERASE_LINE}"


def test_there_is_no_live_line_without_a_terminal(capsys):
    output = start_logging(rank=0)
    output.show("step 1")
    output.close()
    assert capsys.readouterr().err == ""


def test_there_is_no_live_line_on_other_ranks(monkeypatch):
    screen = open_screen(monkeypatch)
    output = start_logging(rank=1)
    output.show("step 1")
    output.close()
    assert screen.getvalue() == ""


@pytest.mark.parametrize("use_color", [True, False])
def test_color_is_on_terminals_and_can_be_switched_off(
    monkeypatch, tmp_path: Path, use_color: bool
):
    screen = open_screen(monkeypatch)
    output = start_logging(rank=0, folder=tmp_path, use_color=use_color)
    log.warning("odd")
    output.close()
    text = screen.getvalue()
    assert ("\x1b[33m" in text) is use_color
    assert "\x1b" not in (tmp_path / "rank-0.log").read_text()


def test_there_is_no_color_without_a_terminal(capsys):
    output = start_logging(rank=0)
    log.warning("odd")
    output.close()
    assert "\x1b" not in capsys.readouterr().err


def test_a_message_that_cannot_be_formatted_does_not_end_the_run(capsys):
    output = start_logging(rank=0)
    log.info("%d tokens", "many")
    log.info("still here")
    output.close()
    assert "still here" in capsys.readouterr().err


def test_a_forked_worker_can_print_although_another_thread_was_printing(monkeypatch):
    screen = open_screen(monkeypatch)
    output = start_logging(rank=0)
    output.show("step 1")
    with output._lock:
        child = os.fork()
        if child == 0:
            worker = threading.Thread(target=print, args=("from the worker",))
            worker.start()
            worker.join(timeout=5)
            shown = screen.getvalue()
            os._exit(0 if shown.endswith("from the worker\n") else 1)
    _, status = os.waitpid(child, 0)
    output.close()
    assert os.waitstatus_to_exitcode(status) == 0


def test_the_environment_report_names_versions_devices_and_commit():
    report = environment_report()
    assert report["torch"] == version("torch")
    assert report["python"] == sys.version.split()[0]
    assert report["commit"] == source_commit()
    assert report.keys() >= {"tessera", "transformers", "cuda", "gpus", "platform"}
    assert all(value for value in report.values())


def test_a_copy_without_git_takes_its_commit_as_given_and_says_so(monkeypatch):
    monkeypatch.setenv("TESSERA_COMMIT", "abc123")
    monkeypatch.setattr(engine_logging, "_first_line", lambda *command: "unknown")
    assert source_commit() == "abc123 (given by TESSERA_COMMIT)"
    monkeypatch.delenv("TESSERA_COMMIT")
    assert source_commit() == "unknown"


def test_the_commit_that_git_knows_wins_over_a_given_one(monkeypatch):
    monkeypatch.setattr(engine_logging, "_first_line", lambda *command: "0123-dirty")
    monkeypatch.setenv("TESSERA_COMMIT", "abc123")
    assert source_commit() == "0123-dirty"


def test_an_absent_package_or_command_is_reported_and_not_raised(monkeypatch):
    assert engine_logging._package_version("no-such-package-here") == "not installed"
    assert engine_logging._first_line("no-such-command-here") == "unknown"
    assert engine_logging._first_line("false") == "unknown"
