"""Errors have one form: a line that says what and where, and a hint that says the remedy."""

from __future__ import annotations

import pytest

from tests.house.messages import GOLDEN, listing, messages

PLACES = sorted({found.place for found in messages()})


@pytest.mark.parametrize("place", PLACES)
def test_a_message_is_one_line_with_a_hint(place: str) -> None:
    wrong = []
    for found in messages():
        if found.place != place:
            continue
        for text in (found.message, found.hint):
            if "\n" in text or text.rstrip().endswith((".", ":")) or text != text.strip():
                wrong.append(f"{place}:{found.line}: one line without a stop at its end: {text!r}")
        if not found.hint and found.kind != "PoseError":  # a file that must be replaced
            wrong.append(f"{place}:{found.line}: no hint: {found.message!r}")
    assert not wrong, "\n".join(wrong)


def test_the_list_of_messages_is_up_to_date() -> None:
    """A message that changes is seen in review; ``python tests/house/messages.py`` writes the list."""
    assert GOLDEN.read_text(encoding="utf-8") == listing()
