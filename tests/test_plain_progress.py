"""Progress without a terminal: a line every half minute, none in a short run."""

import sys
import threading

import pytest

from probes.runs import progress as workbench
from safe_decode.cli import console
from safe_decode.plain_progress import EVERY_S, PlainProgress, beating


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_a_line_is_written_every_half_minute_and_at_the_end_of_a_long_run(clock):
    lines = []
    told = PlainProgress("harvesting", lines.append, total=4000, clock=clock)
    for _ in range(4):
        clock.now += 20
        told.advance(1000)
    told.finish()
    assert lines == [
        "harvesting: 2,000 of 4,000, 40 s so far",
        "harvesting: 4,000 of 4,000, 1 min 20 s so far",
        "harvesting: done in 1 min 20 s",
    ]


@pytest.mark.parametrize("took", [0.0, 29.9])
def test_a_short_run_is_silent(clock, took):
    lines = []
    told = PlainProgress("harvesting", lines.append, total=2, clock=clock)
    clock.now += took
    told.advance(2)
    told.finish()
    assert not lines


def test_hours_are_told_as_hours(clock):
    lines = []
    told = PlainProgress("training", lines.append, clock=clock)
    clock.now += 2 * 3600 + 5 * 60 + 7
    told.tell_if_due()
    assert lines == ["training: 2 h 5 min so far"]


@pytest.mark.parametrize("progress", [console.progress, workbench.progress])
def test_commands_and_the_workbench_tell_counted_work_on_standard_error(progress, clock, capsys):
    with progress("scoring [b]x[/b]", 10, clock=clock) as advance:
        clock.now += 10
        advance(3)
        assert capsys.readouterr().err == ""
        clock.now += 25
        advance(3)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines() == [
        "scoring [b]x[/b]: 6 of 10, 35 s so far",
        "scoring [b]x[/b]: done in 35 s",
    ]


def test_work_that_reports_nothing_is_told_from_a_thread_that_ends_with_it(clock, capsys):
    before = threading.active_count()
    with console.working("Loading the model", clock=clock, every_s=0.005):
        clock.now += 31
        heard = threading.Event()
        while "so far" not in capsys_so_far(capsys, heard):
            heard.wait(0.005)
    assert "Loading the model: done in 31 s" in heard.text + capsys.readouterr().err
    assert threading.active_count() == before


def capsys_so_far(capsys, heard):
    heard.text = getattr(heard, "text", "") + capsys.readouterr().err
    return heard.text


def test_work_that_fails_is_not_told_as_done(clock):
    lines = []
    told = PlainProgress("training", lines.append, clock=clock)
    with pytest.raises(RuntimeError), beating(told):
        clock.now += 2 * EVERY_S
        raise RuntimeError
    assert not any("done" in line for line in lines)


def test_a_terminal_gets_no_plain_line(clock, monkeypatch):
    class Terminal:
        is_terminal = True

        def status(self, label):
            import contextlib

            lines.append(label)
            return contextlib.nullcontext()

    lines = []
    monkeypatch.setattr(console, "console", lambda **_: Terminal())
    with console.working("Loading", clock=clock):
        clock.now += 100
    assert lines == ["Loading"] and sys.stderr
