"""Items of responses: what is listed, and what a continuation begins with."""

from __future__ import annotations

from typing import Any

import pytest

from serve_app.stored.items import dump_items, input_items, load_items, output_items


def test_a_text_is_one_message_of_the_user() -> None:
    (item,) = input_items("Hi")
    assert item.item == {"type": "message", "role": "user", "content": "Hi"}
    assert item.listed() == {
        "id": item.id,
        "type": "message",
        "role": "user",
        "status": "completed",
        "content": [{"type": "input_text", "text": "Hi"}],
    }
    assert item.id.startswith("msg_")


def test_items_keep_what_was_sent() -> None:
    sent: list[dict[str, Any]] = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
        {"type": "function_call", "id": "fc_1", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "42"},
    ]
    items = input_items(sent)
    assert [one.item for one in load_items(dump_items(items))] == sent
    assert load_items(dump_items(items)) == items
    assert items[1].listed()["content"] == [
        {"type": "output_text", "text": "Ho", "annotations": []}
    ]
    assert items[2].id == "fc_1"
    assert items[3].id.startswith("fco_")
    assert len({one.id for one in items}) == 4


@pytest.mark.parametrize("output", [None, "text", []])
def test_no_output_adds_nothing(output: object) -> None:
    assert output_items({"output": output}) == []


def test_output_goes_back_but_for_empty_messages() -> None:
    message = {"type": "message", "id": "msg_1", "role": "assistant", "content": [{"text": "a"}]}
    empty = {**message, "id": "msg_2", "content": []}
    call = {"type": "function_call", "id": "fc_1", "name": "f"}
    kept = output_items({"output": [message, empty, call]})
    assert [(one.id, one.item) for one in kept] == [("msg_1", message), ("fc_1", call)]
