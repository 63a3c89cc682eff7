"""The main job: the official client, the real model, through nginx."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from tests.serve_configs import ANSWER, QUESTION, REAL_MODEL
from tests.stack_runner import RunningStack

PROMPTS = (
    QUESTION,
    "Name three colours.",
    "Write one sentence about the sea.",
    "Count from one to ten.",
    "What is 2+2?",
)
MOST_TOKENS = 32
SMALLEST_LEAD = 0.01
EOS = 2

_REFERENCE = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, most, prompts = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
answers = []  # of each prompt: (token id, lead of its logit over the next one)
for prompt in prompts:
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )
    with torch.no_grad():
        out = model.generate(
            **inputs, max_new_tokens=most, do_sample=False,
            output_logits=True, return_dict_in_generate=True,
        )
    ids = out.sequences[0][inputs["input_ids"].shape[1]:].tolist()
    best = [torch.topk(step[0].float(), 2).values for step in out.logits]
    leads = [float(two[0] - two[1]) for two in best]
    answers.append([s for s in zip(ids, leads) if s[0] != tokenizer.eos_token_id])
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def reference(stack: RunningStack) -> list[list[tuple[int, float]]]:
    """Greedy token ids of Hugging Face transformers on the same weights, with their leads."""
    folder = Path(stack.env["COMP_AI_MODEL_PATH"]) / REAL_MODEL
    done = subprocess.run(
        [sys.executable, "-c", _REFERENCE, str(folder), str(MOST_TOKENS), json.dumps(PROMPTS)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answers: list[list[tuple[int, float]]] = json.loads(done.stdout.strip().splitlines()[-1])
    return answers


def test_greedy_tokens_equal_those_of_transformers(
    client: OpenAI, reference: list[list[tuple[int, float]]]
) -> None:
    compared, to_the_end = 0, 0
    for prompt, expected in zip(PROMPTS, reference, strict=True):
        answer = client.chat.completions.create(
            model=REAL_MODEL,
            messages=[{"role": "user", "content": prompt}],
            temperature=0,
            max_tokens=MOST_TOKENS,
            extra_body={"return_token_ids": True},
        )
        ids = [i for i in answer.choices[0].model_dump()["token_ids"] if i != EOS]
        sure = _sure(expected)
        assert ids[: len(sure)] == sure, prompt
        compared += len(sure)
        if len(sure) == len(expected):
            assert ids == sure
            to_the_end += 1
    assert to_the_end >= 3, "enough prompts are compared to their end"
    assert compared >= 50, "enough tokens are compared"


def _sure(expected: list[tuple[int, float]]) -> list[int]:
    """Return the tokens up to the first that hardly leads.

    Two correct engines add up in different orders; one token may then lead in one and the next
    in the other, and after that they differ by everything.
    """
    ids = []
    for token_id, lead in expected:
        if lead < SMALLEST_LEAD:
            break
        ids.append(token_id)
    return ids


def test_whole_answer_with_an_api_key(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=REAL_MODEL,
        messages=[{"role": "user", "content": QUESTION}],
        temperature=0,
        max_tokens=20,
    )
    assert answer.choices[0].message.content == ANSWER
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8


@pytest.mark.parametrize("base", ["/v1", "/api/v1/comp-ai/v1"])
def test_stream_with_an_access_token(stack: RunningStack, base: str) -> None:
    token = stack.cli("token", "--subject", "ada").strip()
    client = OpenAI(base_url=stack.url + base, api_key=token, max_retries=0)
    stream = client.chat.completions.create(
        model=REAL_MODEL,
        messages=[{"role": "user", "content": QUESTION}],
        temperature=0,
        max_tokens=20,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == ANSWER
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 8
    rows = stack.settled_rows(
        "select * from comp_ai.requests where principal_id = 'ada' order by created_at", 1
    )
    assert {row["outcome"] for row in rows} == {"completed"}
    assert {row["completion_tokens"] for row in rows} == {8}


def test_text_completion(client: OpenAI) -> None:
    answer = client.completions.create(
        model=REAL_MODEL, prompt="The capital of Japan is", temperature=0, max_tokens=4
    )
    assert "Tokyo" in answer.choices[0].text


def test_the_log_keeps_what_was_asked_and_answered(stack: RunningStack) -> None:
    token = stack.cli("token", "--subject", "grace").strip()
    client = OpenAI(base_url=f"{stack.url}/v1", api_key=token, max_retries=0)
    for stream in (False, True):
        answer = client.chat.completions.create(
            model=REAL_MODEL,
            messages=[{"role": "user", "content": QUESTION}],
            temperature=0,
            max_tokens=20,
            stream=stream,
        )
        if stream:
            list(answer)  # type: ignore[arg-type]
    rows = stack.settled_rows(
        "select p.user_id, p.model_used, p.tokens_used, b.* from comp_ai.requests_plain p "
        "join comp_ai.request_bodies b on b.id = p.id where user_id = 'grace'",
        2,
    )
    assert len(rows) == 2
    for row, kept in zip(rows, stack.bodies(rows), strict=True):
        assert kept is not None
        assert kept.response == ANSWER
        assert QUESTION in (kept.request or "")
        assert row["model_used"] == REAL_MODEL
        assert row["tokens_used"] == 37 + 8


def test_models_are_listed(client: OpenAI) -> None:
    assert REAL_MODEL in [model.id for model in client.models.list()]
    assert client.models.retrieve(REAL_MODEL).id == REAL_MODEL


def test_text_becomes_tokens_and_text_again(client: OpenAI) -> None:
    text = "Paris is the capital of France."
    made: Any = client.post("/tokenize", body={"model": REAL_MODEL, "prompt": text}, cast_to=object)
    assert made["count"] == len(made["tokens"]) > 1
    back: Any = client.post(
        "/detokenize", body={"model": REAL_MODEL, "tokens": made["tokens"]}, cast_to=object
    )
    assert back["prompt"] == text
