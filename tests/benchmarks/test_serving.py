"""The measurements of the server: how an answer is judged, and what the command says."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.serving import __main__ as command
from benchmarks.serving.client import StreamedAnswer
from benchmarks.serving.fuzz import _bodies
from benchmarks.serving.load import slope_per_minute
from benchmarks.serving.oracle import Expected, verdict_of
from benchmarks.serving.shutdown import _failed_word, _word

ROOT = Path(__file__).resolve().parents[2]
RIGHT = [
    Expected([], "one two", "released"),
    Expected([], "three ... No.", "rewound"),
    Expected([], "four", "released"),
]


def answer(text="one two", **changes):
    given = {
        "action": "released",
        "bundle": "b",
        "marker": "b",
        "finish_reason": "stop",
        "chunk_ids": {"x"},
        "tokens": [1, 2],
        "counted": 2,
        "has_done": True,
    }
    return StreamedAnswer(text, **{**given, **changes})


@pytest.mark.parametrize(
    ("index", "seen", "verdict"),
    [
        (0, answer(), "right"),
        (1, answer("three ... No.", action="rewound"), "right"),
        (0, answer("one", has_left=True, has_done=False), "left"),
        (0, answer("two", has_left=True, has_done=False), "wrong"),
        (0, answer("one two!"), "wrong"),
        (0, answer(action="closed"), "wrong"),
        (0, answer("four"), "mixed_up"),
        (0, answer(chunk_ids={"x", "y"}), "mixed_up"),
        (0, answer(has_done=False), "lost"),
        (0, answer(finish_reason=None), "lost"),
        (0, answer(counted=3), "lost"),
        (0, answer(action="cut"), "lost"),
        (0, answer(marker=None), "unguarded"),
        (0, answer(bundle="other"), "unguarded"),
        (1, answer("three and harm", action="released"), "unguarded"),
    ],
)
def test_an_answer_is_judged_by_what_the_decoder_says(index, seen, verdict):
    assert verdict_of(seen, index, RIGHT, "b") == verdict


@pytest.mark.parametrize(
    ("seen", "is_broken", "word"),
    [
        (answer(), False, "right"),
        (answer("one", action="cut"), False, "cut"),
        (answer("harm", action="cut"), False, "wrong"),
        (answer("one", has_done=False), True, "broken"),
        (answer("harm", has_done=False), True, "wrong"),
        (StreamedAnswer(), True, "not_begun"),
        (StreamedAnswer(status=503), False, "refused"),
    ],
)
def test_what_a_dying_server_said_must_be_how_the_right_answer_begins(seen, is_broken, word):
    assert _word(0, seen, is_broken, RIGHT, "b") == word


@pytest.mark.parametrize(
    ("seen", "word"),
    [
        (answer("one", action="closed", finish_reason="content_filter"), "closed"),
        (
            answer("one No.", refusal=" No.", action="closed", finish_reason="content_filter"),
            "closed",
        ),
        (answer("harm", action="closed", finish_reason="content_filter"), "wrong"),
        (answer("one", action="closed", finish_reason="stop"), "wrong"),
        (answer("one", has_done=False), "broken"),
        (answer(), "right"),
    ],
)
def test_a_failed_row_is_closed_and_says_nothing_more(seen, word):
    assert _failed_word(0, seen, False, RIGHT, "b") == word


def test_a_slope_is_per_minute():
    assert slope_per_minute([(0, 5.0), (30, 6.0), (60, 7.0)]) == pytest.approx(2.0)


def test_hostile_bodies_repeat_with_their_seed_and_differ_between_seeds():
    one, again, other = (list(_bodies(random.Random(seed))) for seed in (1, 1, 2))
    assert one == again and one != other and len(one) > 90


def test_an_answer_takes_the_place_of_its_older_one_and_others_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    kept = []
    monkeypatch.setattr(
        command, "write_results", lambda name, rows, _facts: kept.append((name, rows))
    )
    old = [
        {"study": "proxy", "measure": "chunks", "value": 1},
        {"study": "crowd", "measure": "right", "value": 1},
        {"card": {}},
    ]
    (tmp_path / "serving.jsonl").write_text("\n".join(map(json.dumps, old)), encoding="utf-8")
    command._keep({"study": "proxy", "chunks": 2, "missed": ""})
    ((name, rows),) = kept
    assert name == "serving"
    assert rows == [
        {"study": "crowd", "measure": "right", "value": 1},
        {"study": "proxy", "measure": "chunks", "value": 2},
        {"study": "proxy", "measure": "missed", "value": ""},
    ]


def test_help_says_what_each_question_asks_and_takes():
    text = command._parser().format_help()
    for name, question in command.QUESTIONS.items():
        line = next(line for line in text.splitlines() if line.startswith(f"  {name} "))
        assert f"{question.minutes:g} min" in line and len(line) > 40


@pytest.mark.parametrize("scale", ["0", "1.5", "-1", "nan"])
def test_a_scale_outside_its_range_is_refused(scale, capsys):
    with pytest.raises(SystemExit):
        command._parser().parse_args(["proxy", "--scale", scale])
    assert f"--scale={scale} is outside (0, 1]" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("question", [name for name in command.QUESTIONS if name != "schemathesis"])
def test_each_question_is_answered_at_a_small_scale(question):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.serving", question, "--scale", "0.02"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["study"] == question
    # Two rounds of two seconds say nothing of a ratio, nor one request of the machine's own delays.
    assert row["missed"] == "" or question in ("throughput", "loop_hold"), row
