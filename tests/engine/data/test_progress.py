import io
import sys

import pytest

from engine.data import progress
from engine.data.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_file_gets_the_start_and_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    with Progress("tokenising text", total=4) as line:
        line.advance("5 tokens")
        monkeypatch.setattr(progress, "PLAIN_SECONDS", -1.0)
        line.advance("9 tokens")
    captured = capsys.readouterr()
    assert captured.err == "tokenising text\ntokenising text: 50% (9 tokens)\n"
    assert captured.out == ""


def test_a_terminal_gets_a_live_line_that_is_cleared_at_the_end(monkeypatch: pytest.MonkeyPatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with pytest.raises(KeyError), Progress("tokenising text", total=2) as line:
        line.advance("5 tokens")
        raise KeyError("the live line is cleared even then")
    shown = terminal.getvalue()
    assert "tokenising text (5 tokens)" in shown
    assert shown.endswith("\x1b[2K"), "the last thing done is to clear the line"
    assert sys.stderr is terminal
