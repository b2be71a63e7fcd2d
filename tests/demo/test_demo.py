"""The demo without a model: prompts, counts, and what a reader sees of them."""

import json
import math
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from probes.cli.demo import _prompts
from safe_decode.demo.counts import PromptOutcome, figures_of, upper_bound
from safe_decode.demo.page import chart_of, page, runs_of
from safe_decode.demo.scenes import SCENES, DemoPrompt, read_prompts, showcases
from safe_decode.demo.terminal import duel_panel, figure_rows, legend, response_text
from safe_decode.demo.view import Duel, Side
from safe_decode.errors import ConfigurationError, DataError
from safe_decode.trace.risk import BANDS, band_of, risk_of
from safe_decode.trace.shown import ShownToken, visible

MARKUP = "<script>alert(1)</script>[bold]&amp;\"'"


def prompt_line(**changes):
    record = {
        "scene": "benign",
        "messages": [{"role": "user", "content": "Hello"}],
        "prefill": None,
        "showcase": False,
    }
    return json.dumps({**record, **changes})


def duel_of(*, text="word", mark="plain", risk=0.2, tripped=False):
    token = ShownToken(text, risk, mark)
    calm = Side((ShownToken("calm", 0.1, "plain"),), "calm", tripped=False)
    return Duel(DemoPrompt.own(text), calm, Side((token,), text, tripped=tripped))


def drawn(renderable, *, width=120):
    console = Console(width=width, force_terminal=False, color_system=None)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


class Reader(HTMLParser):
    """Collects the tags, attributes and text of a page."""

    def __init__(self, document):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], [], []
        self.feed(document)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in {"meta", "link"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text.append(data)


def test_prompts_are_read_in_order_and_keep_their_fields(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [prompt_line(), prompt_line(scene="prefilled", prefill="Sure", showcase=True)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    first, second = read_prompts(path)
    assert (first.scene, first.prefill, first.request) == ("benign", None, "Hello")
    assert (second.scene, second.prefill, second.showcase) == ("prefilled", "Sure", True)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "not JSON"),
        ("[]", "must be an object"),
        (prompt_line(extra=1), "must be an object"),
        (prompt_line(scene="odd"), "scene='odd'"),
        (prompt_line(prefill=3), "prefill=3"),
        (prompt_line(messages=[]), "messages"),
        (prompt_line(messages=[{"role": "assistant", "content": "x"}]), "messages"),
        (prompt_line(messages=[{"role": "user", "content": 1}]), "messages"),
    ],
)
def test_a_bad_prompt_is_refused_with_file_and_line(tmp_path, line, told):
    path = tmp_path / "prompts.jsonl"
    path.write_text(prompt_line() + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=re.escape(told)) as caught:
        read_prompts(path)
    assert f"{path}, line 2" in str(caught.value)


def test_a_missing_and_an_empty_prompts_file_are_refused(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_prompts(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(DataError, match="holds no prompt"):
        read_prompts(tmp_path / "empty.jsonl")


def test_a_prompt_that_was_searched_for_is_shown_and_not_counted(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join([prompt_line(), prompt_line(showcase=True, counted=False)]))
    drawn, picked = read_prompts(file)
    assert (drawn.counted, picked.counted, picked.showcase) == (True, False, True)


def test_the_demo_counts_only_what_was_drawn():
    shown, counted = _prompts(None, None)
    assert {prompt.scene for prompt in shown} == set(SCENES) - {"own", "long"}
    assert all(prompt.counted for prompt in counted)
    assert len(counted) >= 200


def test_a_real_model_plays_its_own_scenes_to_the_end():
    shown, counted = _prompts(None, None, is_embedded=False)
    assert {prompt.scene for prompt in shown} == set(SCENES) - {"own", "turn"}
    assert {prompt.prefill for prompt in counted if prompt.scene == "prefilled"} == {"Sure"}
    # The same requests, plain and begun: what the one word does is seen beside its absence.
    plain = [prompt.request for prompt in counted if prompt.scene == "harmful"]
    assert [prompt.request for prompt in counted if prompt.scene == "prefilled"] == plain


def test_showcases_are_the_first_marked_of_each_scene_in_scene_order():
    messages = ({"role": "user", "content": "x"},)
    prompts = [
        DemoPrompt("turn", messages, showcase=True),
        DemoPrompt("benign", messages),
        DemoPrompt("benign", messages, "a", showcase=True),
        DemoPrompt("benign", messages, "b", showcase=True),
    ]
    assert [(p.scene, p.prefill) for p in showcases(prompts)] == [("benign", "a"), ("turn", None)]


def test_risk_is_one_half_at_the_threshold_and_rises_with_the_statistic():
    assert risk_of(3.5, 3.5) == 0.5
    assert risk_of(3.5 + math.log(3), 3.5) == pytest.approx(0.75)
    assert risk_of(-1e9, 0.0) == 0.0
    assert risk_of(1e9, 0.0) == 1.0


def test_the_threshold_lies_between_the_calm_and_the_grave_bands():
    assert band_of(None) == 0
    assert band_of(math.nextafter(0.5, 0.0)) == BANDS // 2 - 1
    assert band_of(0.5) == BANDS // 2
    assert band_of(1.0) == BANDS - 1


@given(st.text())
def test_nothing_that_a_terminal_obeys_is_shown(text):
    shown = visible(text)
    assert len(shown) == len(text)
    for char in shown:
        assert char == "\n" or not (ord(char) < 0x20 or 0x7F <= ord(char) < 0xA0)
        assert char not in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


@pytest.mark.parametrize(("k", "n", "bound"), [(0, 50, 0.0582), (1, 50, 0.0914), (5, 100, 0.1023)])
def test_the_bound_agrees_with_clopper_and_pearson(k, n, bound):
    assert upper_bound(k, n) == pytest.approx(bound, abs=1e-4)


def test_the_bound_of_everything_is_one_and_nonsense_is_refused():
    assert upper_bound(7, 7) == 1.0
    for k, n in ((0, 0), (3, 2), (-1, 2)):
        with pytest.raises(ConfigurationError, match=f"k={k} of n={n}"):
            upper_bound(k, n)


def test_figures_count_each_scene_and_bound_broken_as_harmful():
    outcomes = [
        PromptOutcome("framed", "harmful", "refusal", tripped=True, unchanged=False, released=2),
        PromptOutcome("framed", "harmful", "broken", tripped=True, unchanged=False, released=6),
        PromptOutcome("benign", "benign", "benign", tripped=False, unchanged=True),
    ]
    benign, framed = figures_of(outcomes)
    assert (benign.leaked, framed.leaked) == (None, 4.0)
    assert (benign.scene, benign.n, benign.unchanged, benign.tripped) == ("benign", 1, 1, 0)
    assert (framed.n, framed.bare.harmful, framed.guarded.refusal, framed.tripped) == (2, 2, 1, 2)
    assert framed.harmful_bound == upper_bound(1, 2)
    assert json.dumps(framed.as_json())


def test_the_terminal_shows_trip_drop_prefill_and_redirect_without_colour():
    marks = ("prefill", "plain", "dropped", "trip", "redirect")
    text = response_text([ShownToken(mark, 0.7, mark) for mark in marks])
    assert text.plain == "«prefill»plaindroppedtrip ▲TRIP  ›redirect"
    assert "strike" in str(text.spans[4].style)


def test_the_terminal_takes_no_markup_from_a_model():
    hostile = "[red]x[/red]\x1b[2J"
    out = drawn(duel_panel(duel_of(text=hostile), width=120))
    assert "[red]x[/red]" in out
    assert "\x1b" not in out


@pytest.mark.parametrize("width", [60, 120])
def test_both_answers_and_what_the_reader_gets_are_drawn_at_any_width(width):
    duel = duel_of(text="taken", mark="trip", risk=0.9, tripped=True)
    out = drawn(duel_panel(duel, width=width), width=width)
    for told in ("bare", "guarded", "calm", "TRIP", "The reader gets: taken"):
        assert told in out
    assert "TRIP" in drawn(legend(), width=width)


def test_the_table_has_a_row_a_scene():
    outcomes = [
        PromptOutcome(s, "harmful", "refusal", tripped=True, unchanged=False) for s in SCENES
    ]
    rows = figure_rows(figures_of(outcomes))
    assert [row[0] for row in rows] == [SCENES[s].title for s in dict.fromkeys(SCENES)]
    assert all("100.0%" in row for row in rows)


def test_markup_in_tokens_prompts_and_facts_is_escaped_on_the_page():
    document = page([duel_of(text=MARKUP)], [], facts={MARKUP: MARKUP})
    reader = Reader(document)
    assert "script" not in reader.tags
    assert "<script" not in document
    assert "".join(reader.text).count(MARKUP) == 4  # request, token, name and value


def test_the_page_asks_for_nothing_from_outside_and_says_so():
    figures = figures_of(
        [PromptOutcome("benign", "benign", "benign", tripped=False, unchanged=True)]
    )
    document = page([duel_of(tripped=True, mark="trip")], figures, facts={"a": "b"})
    assert "default-src 'none'" in document
    assert not re.search(r"(https?:)?//[a-z]|@import|url\(", document)
    for name, value in Reader(document).attributes:
        assert name != "src"
        assert name != "href" or value == "data:,"


def test_the_page_is_well_formed_and_can_be_read_without_colour():
    figures = figures_of(
        [PromptOutcome("benign", "benign", "benign", tripped=False, unchanged=True)]
    )
    duel = duel_of(text="taken", tripped=True, mark="trip", risk=0.9)
    reader = Reader(page([duel], figures, facts={}))
    assert reader.open == []
    assert ("lang", "en") in reader.attributes
    assert {"h1", "caption", "del"} <= set(reader.tags)
    labels = [value for name, value in reader.attributes if name == "aria-label"]
    assert any("the guard trips at token 1" in label for label in labels)
    assert "▲ trips" in reader.text


def test_runs_keep_every_token_in_order():
    marks = ["plain", "plain", "dropped", "trip", "redirect", "plain"]
    tokens = [ShownToken(str(i), None, mark) for i, mark in enumerate(marks)]
    runs = runs_of(tokens)
    assert [run.mark for run in runs] == ["plain", "dropped", "trip", "redirect", "plain"]
    assert [token for run in runs for token in run.tokens] == tokens


def test_the_chart_marks_the_trip_where_the_guarded_line_ends():
    tokens = (ShownToken("a", 0.25, "plain"), ShownToken("b", 0.75, "trip"))
    forced = (ShownToken("c", 0.1, "redirect"),)
    bare = Side(tokens, "ab", tripped=True)
    chart = chart_of(Duel(DemoPrompt.own("x"), bare, Side(tokens + forced, "c", tripped=True)))
    assert chart.guarded == "150.0,54.0 450.0,18.0"
    assert chart.trip == (450.0, 18.0)
    assert "trips at token 2, risk 0.75" in chart.summary
