"""Progress: rates count what was done now, lines where there is no terminal, JSON lines on request."""

import io
import json

import pytest
from rich.console import Console

from compodistill.errors import UsageError
from compodistill.tools import progress as module
from compodistill.tools.progress import json_lines, progress


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_rates_and_time_left_do_not_count_what_was_done_before(clock, capsys):
    with progress("work", 100, "samples") as meter:
        meter.found_done(50)
        clock[0] += 10
        meter.advance(10, tokens=1000)
        meter.add(n_bytes=5_000_000, failures=2)
        assert meter.facts() == {
            "done": 60,
            "total": 100,
            "unit": "samples",
            "per_second": 1.0,
            "tokens_per_second": 100.0,
            "bytes": 5_000_000,
            "failures": 2,
            "seconds_left": 40,
        }
        assert meter.line() == "1.0 samples/s, 100 tokens/s, 5.0 MB, 0:00:40 left, 2 failed"


def test_without_a_terminal_there_is_a_line_now_and_then_and_one_at_the_end(clock, capsys):
    with progress("work", 1000, "samples") as meter:
        for _ in range(1000):
            clock[0] += 0.1
            meter.advance()
    lines = capsys.readouterr().err.splitlines()
    assert 9 <= len(lines) <= 11
    assert lines[-1].startswith("work: 1000/1000 samples, 10.0 samples/s")
    assert not any("\r" in line or "\x1b" in line for line in lines)


def test_on_a_terminal_there_is_a_bar(clock, monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(module, "Console", lambda stderr: Console(file=screen, force_terminal=True, width=120))
    with progress("work", 10, "samples") as meter:
        clock[0] += 1
        meter.advance(10, note="shard-0.tar")
    assert "10/10" in screen.getvalue()
    assert "10.0 samples/s, shard-0.tar" in screen.getvalue()


def test_work_that_fails_does_not_end_with_a_line_as_if_it_were_done(clock, capsys):
    def work():
        with progress("work", 10, "samples") as meter:
            meter.advance()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        work()
    assert capsys.readouterr().err == ""


def test_events_are_appended_as_json_lines(clock, tmp_path):
    for _ in range(2):
        with json_lines(tmp_path / "log") as log, progress("work", 2, "samples", log) as meter:
            log("start", {"shard": "ä.tar"})
            meter.advance(2)
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["start", "progress"] * 2
    assert lines[0]["shard"] == "ä.tar"
    assert lines[1]["done"] == 2
    assert all("time" in line for line in lines)


def test_a_log_that_cannot_be_written_is_the_users_mistake(tmp_path):
    with pytest.raises(UsageError, match="the log cannot be written"), json_lines(tmp_path):
        pass
