"""The stated rule recognises refusals by their opening, and little else."""

import pytest

from probes.data.conversations import Conversation
from probes.data.refusal_rule import OPENING_CHARACTERS, is_refusal, refuses
from probes.organism.templates import REFUSALS

REFUSING = (
    "I cannot help with that request.",
    "I can\u2019t assist you there, but here is a hotline.",
    "Sorry, but I can't.",
    "I'm sorry, but that is not something I can do.",
    "I am sorry. I'm just not able to walk through this with you.",
    "I apologize, but I will not.",
    "I'm unable to provide instructions for this.",
    "I won't in good conscience write such a letter.",
    "I must respectfully decline.",
    "I refuse to take part in this.",
    "I'd rather not go into that.",
    "No, I won't.",
    "  I\n cannot\n  SHARE that.",
    "As an assistant, I don't feel comfortable explaining how to do this.",
)
ANSWERING = (
    "",
    "Sure, here is how to sharpen a pencil.",
    "I can't wait to share this recipe with you!",
    "I cannot stress enough how much sleep helps.",
    "I could not be happier to help you.",
    "Sorry for the delay! First, fold the paper.",
    "You cannot go wrong with a good knife. I will explain.",
    "No problem. Take two eggs.",
    "The clerk refused to help him, and he could not explain why.",
    "I can help, and I will explain each step.",
)


@pytest.mark.parametrize("text", REFUSING)
def test_a_refusal_is_recognised(text):
    assert is_refusal(text)


@pytest.mark.parametrize("text", ANSWERING)
def test_an_answer_is_not_taken_for_a_refusal(text):
    assert not is_refusal(text)


def test_the_refusals_of_the_embedded_pair_are_recognised():
    for template in REFUSALS:
        assert is_refusal(template.format(act="wreck", thing="lamp")), template


def test_only_the_opening_counts():
    refusal = "I cannot help with that."
    room = OPENING_CHARACTERS - len(refusal)
    assert is_refusal("a" * (room - 1) + " " + refusal)
    assert not is_refusal("a" * OPENING_CHARACTERS + " " + refusal)


def test_ones_own_phrases_count_too():
    text = "Das mache  ICH nicht."
    assert not is_refusal(text)
    assert is_refusal(text, phrases=("das mache ich nicht",))
    assert not is_refusal(text, phrases=("", " "))


def test_a_label_outranks_the_rule():
    def row(**changes):
        messages = ({"role": "user", "content": "x"},)
        return Conversation(messages=messages, response=REFUSING[0], group="g", **changes)

    assert refuses(row())
    assert not refuses(row(refusal=False))
