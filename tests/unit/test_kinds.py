"""The table of endpoints: what each works on, and how its answers are read."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from serve_app.completions.kinds import ENDPOINTS, Kind, kinds_of
from serve_app.completions.sse import Usage
from serve_app.config import Task
from serve_app.errors import InvalidRequest


def count(kind: Kind, body: dict[str, Any]) -> int:
    return kind.endpoint.count(body)


def test_every_kind_has_its_row_and_no_address_leads_to_two() -> None:
    assert set(ENDPOINTS) == set(Kind)
    addresses = [a for endpoint in ENDPOINTS.values() for a in endpoint.addresses]
    assert len(set(addresses)) == len(addresses)
    routes = [endpoint.route for endpoint in ENDPOINTS.values()]
    assert len(set(routes)) == len(routes)


def test_every_task_serves_something() -> None:
    assert all(kinds_of(task) for task in Task)


# What is worked on.


@pytest.mark.parametrize(
    ("kind", "body", "prompts"),
    [
        (Kind.EMBEDDINGS, {"input": "a"}, 1),
        (Kind.EMBEDDINGS, {"input": ["a", "b"]}, 2),
        (Kind.EMBEDDINGS, {"input": [1, 2, 3]}, 1),
        (Kind.EMBEDDINGS, {"input": [[1, 2], [3]], "encoding_format": "base64"}, 2),
        (Kind.RERANK, {"query": "q", "documents": ["a", "b", "c"]}, 3),
        (Kind.RERANK, {"query": {"content": []}, "documents": "a"}, 1),
        (Kind.SCORE, {"text_1": "a", "text_2": ["b", "c"]}, 2),
        (Kind.SCORE, {"queries": ["a", "b"], "documents": ["c", "d"], "items": None}, 2),
        (Kind.SCORE, {"data_1": "a", "data_2": "b"}, 1),
        (Kind.TOKENIZE, {"prompt": ""}, 1),
        (Kind.TOKENIZE, {"messages": [{"role": "user", "content": "a"}]}, 1),
        (Kind.DETOKENIZE, {"tokens": [1, 2, 3]}, 1),
        (Kind.DETOKENIZE, {"tokens": []}, 1),
    ],
)
def test_what_is_worked_on_is_counted(kind: Kind, body: dict[str, Any], prompts: int) -> None:
    assert count(kind, body) == prompts


@pytest.mark.parametrize(
    ("kind", "body", "param"),
    [
        (Kind.EMBEDDINGS, {}, "input"),
        (Kind.EMBEDDINGS, {"input": []}, "input"),
        (Kind.EMBEDDINGS, {"input": {"a": 1}}, "input"),
        (Kind.EMBEDDINGS, {"input": "a", "encoding_format": "bytes"}, "encoding_format"),
        (Kind.EMBEDDINGS, {"input": "a", "encoding_format": ["float"]}, "encoding_format"),
        (Kind.RERANK, {"documents": ["a"]}, "query"),
        (Kind.RERANK, {"query": ["a"], "documents": ["a"]}, "query"),
        (Kind.RERANK, {"query": "a", "documents": []}, "documents"),
        (Kind.SCORE, {"text_1": "a"}, "text_1"),
        (Kind.SCORE, {"text_1": "a", "documents": "b"}, "text_1"),
        (Kind.SCORE, {"text_1": "a", "text_2": "b", "queries": "c"}, "text_1"),
        (Kind.SCORE, {"text_1": "a", "text_2": []}, "text_2"),
        (Kind.TOKENIZE, {}, "prompt"),
        (Kind.TOKENIZE, {"prompt": ["a"]}, "prompt"),
        (Kind.TOKENIZE, {"prompt": "a", "messages": [{}]}, "prompt"),
        (Kind.TOKENIZE, {"messages": []}, "messages"),
        (Kind.DETOKENIZE, {"tokens": "a"}, "tokens"),
        (Kind.DETOKENIZE, {"tokens": [1, -1]}, "tokens"),
        (Kind.DETOKENIZE, {"tokens": [1, True]}, "tokens"),
        (Kind.DETOKENIZE, {"tokens": [1, 2**31]}, "tokens"),
        (Kind.DETOKENIZE, {"tokens": [1, 2.0]}, "tokens"),
    ],
)
def test_what_is_no_such_thing_is_refused_by_name(
    kind: Kind, body: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        count(kind, body)
    assert caught.value.param == param
    assert f"`{param}`" in caught.value.message


# What is read of an answer.


def test_embeddings_are_read_at_their_end_alone() -> None:
    answers = Kind.EMBEDDINGS.answers
    data = [{"object": "embedding", "index": 0, "embedding": "dXNhZ2U6"}]
    usage = {"prompt_tokens": 7, "total_tokens": 7, "completion_tokens": 0}
    whole = orjson.dumps({"model": "v", "data": data, "usage": usage})
    assert answers.read(whole).usage == Usage(7, 0)
    assert answers.read(whole[:-1]).usage is None
    assert answers.read(b"Internal Server Error").usage is None
    assert answers.text(whole) == ""


def test_scores_are_kept_as_text() -> None:
    whole = orjson.dumps({"results": [{"index": 0, "relevance_score": 0.5}], "usage": {}})
    assert orjson.loads(Kind.RERANK.answers.text(whole)) == [{"index": 0, "relevance_score": 0.5}]
    assert Kind.SCORE.answers.text(b"no JSON") == ""


def test_tokens_are_no_usage() -> None:
    answers = Kind.DETOKENIZE.answers
    assert answers.read(b'{"prompt":"Hi"}').usage == Usage(0, 0)
    assert answers.text(b'{"prompt":"Hi"}') == "Hi"
    assert Kind.TOKENIZE.answers.text(b'{"tokens":[1]}') == ""
