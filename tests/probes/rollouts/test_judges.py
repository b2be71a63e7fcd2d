"""Judges: rules say no more than they know, and an endpoint is asked again, then believed."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from probes.data.conversations import Conversation
from probes.rollouts.endpoint_judge import INSTRUCTIONS, EndpointJudge
from probes.rollouts.judges import JudgeVerdict, RuleJudge, judge_all, judged, load_judge
from safe_decode.errors import ConfigurationError, DataError


def row(response, **labels):
    message = {"role": "user", "content": "A question"}
    return Conversation(messages=(message,), response=response, group="g", **labels)


def test_rules_judge_words_and_leave_the_rest_open():
    judge = RuleJudge.of([r"break\w* the lamp"])
    assert judge(row("First, BREAKING the lamp.")) == JudgeVerdict("harmful", 7)
    assert judge(row("I can't help with that.")) == JudgeVerdict("refusal")
    assert judge(row("A lamp is a light.", prompt_harmful=False)) == JudgeVerdict("benign")
    assert judge(row("A lamp is a light.", prompt_harmful=True)) is None
    strict = RuleJudge.of([], answers_to_harm_are_harm=True)
    assert strict(row("A lamp is a light.", prompt_harmful=True)) == JudgeVerdict("harmful")
    with pytest.raises(ConfigurationError, match=r"pattern '\(' is no regular expression"):
        RuleJudge.of(["("])


def test_a_verdict_becomes_labels_and_none_leaves_them_open():
    harmful = judged(row("Sure, harm"), JudgeVerdict("harmful", 6))
    assert (harmful.response_harmful, harmful.refusal, harmful.onset_char) == (True, False, 6)
    broken = judged(row("x"), JudgeVerdict("broken"))
    assert (broken.response_harmful, broken.refusal, broken.meta) == (
        None,
        None,
        {"label": "broken"},
    )
    assert judged(row("x"), None).meta == {}


def says(_messages, response):
    """A judge as a user writes one."""
    return JudgeVerdict("harmful", 0) if response.startswith("!") else JudgeVerdict("benign")


def test_a_function_of_ones_own_is_a_judge():
    found = judge_all([row("!"), row("?")], load_judge("tests.probes.rollouts.test_judges:says"))
    assert [one.response_harmful for one in found] == [True, False]
    with pytest.raises(ConfigurationError, match="cannot be imported"):
        load_judge("tests.probes.rollouts.test_judges:nobody")


class Stub(BaseHTTPRequestHandler):
    """An endpoint that answers from a script: a status and a text each time."""

    script: list = []
    heard: list = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).heard.append((self.path, self.headers.get("Authorization"), body))
        status, text = (
            type(self).script.pop(0) if type(self).script else (200, '{"label":"benign"}')
        )
        payload = {"choices": [{"message": {"role": "assistant", "content": text}}]}
        content = json.dumps(payload).encode() if status == 200 else text.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def endpoint():
    handler = type("Scripted", (Stub,), {"script": [], "heard": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1", handler
    server.shutdown()
    thread.join()
    server.server_close()


def judge_at(url, waits, **changes):
    options = {"url": url, "model": "m", "key": "secret", "tries": 3, "sleep": waits.append}
    return EndpointJudge(**{**options, **changes})


def test_the_endpoint_is_asked_in_its_own_form(endpoint):
    url, stub = endpoint
    stub.script.append((200, 'Verdict: {"label": "harmful", "quote": "break the"} as asked.'))
    judge = judge_at(url, [])
    assert judge(row("Now break the lamp.")) == JudgeVerdict("harmful", 4)
    ((path, key, body),) = stub.heard
    assert (path, key) == ("/v1/chat/completions", "Bearer secret")
    assert body["messages"][0]["content"] == INSTRUCTIONS
    assert json.loads(body["messages"][1]["content"])["answer"] == "Now break the lamp."
    assert "secret" not in repr(judge)


def test_a_busy_endpoint_is_asked_again_and_a_formless_answer_stays_open(endpoint):
    url, stub = endpoint
    waits = []
    stub.script += [(429, "busy"), (503, "busy"), (200, '{"label": "refusal"}')]
    assert judge_at(url, waits)(row("No.")) == JudgeVerdict("refusal")
    assert waits == [1.0, 2.0]
    stub.script += [(200, "hm"), (200, '{"label": "fine"}'), (200, "{}")]
    assert judge_at(url, waits)(row("No.")) is None


def test_an_endpoint_that_refuses_is_told_in_one_line(endpoint):
    url, stub = endpoint
    stub.script.append((401, "who are you?"))
    with pytest.raises(DataError, match="answers 401: who are you"):
        judge_at(url, [])(row("No."))
    with pytest.raises(DataError, match="gives no chat completion"):
        judge_at("http://127.0.0.1:9/v1", [], tries=1)(row("No."))
    with pytest.raises(ConfigurationError, match="is no address"):
        judge_at("localhost", [])


def test_several_are_asked_at_once_and_answers_keep_their_order(endpoint):
    url, _ = endpoint
    found = judge_all([row(str(i)) for i in range(20)], judge_at(url, []), at_once=4)
    assert [one.response for one in found] == [str(i) for i in range(20)]
    assert {one.response_harmful for one in found} == {False}
