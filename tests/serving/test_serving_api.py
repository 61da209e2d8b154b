"""The server as OpenAI's clients see it: what it answers, whom, and what it refuses."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from running_server import OWNER, QUESTIONS, Running, chat_model, make_adapter, make_store, running

from grun.config.options import ModelConfig
from grun.data.templates import TEMPLATES, encode_prompt
from grun.evaluation.generation import generate_answers
from grun.loading.adapters import load_model
from grun.loading.models import load_base

CLIENT = "client-of-the-tests"
LONGEST = 90
"""Tokens of a prompt."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, two adapters, and a store of both."""
    folder = tmp_path_factory.mktemp("served")
    model = chat_model(folder / "model")
    one = make_adapter(model, folder / "one", 1)
    two = make_adapter(
        model, folder / "two", 2, gate_read="every_token", gate_accumulate="running_max", edit_write="every_token"
    )
    make_store(folder / "store", {"one": one, "two": two})
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    """The store, for clients with a key."""
    options: dict[str, Any] = {"max_prompt_tokens": LONGEST, "max_new_tokens": 40, "batch_size": 5}
    with running(folder / "store", folder / "model", client=CLIENT, **options) as found:
        yield found


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, str]:
    """Greedy answers of 12 tokens to each question, each asked by itself by the code of evaluations."""
    loaded = load_model(
        ModelConfig(path=str(folder / "model"), device="cpu"), str(folder / "store"), strict=True, gate_threshold=None
    )
    found = {}
    for question in QUESTIONS:
        prompt = encode_prompt(TEMPLATES.get("chat"), loaded.tokenizer, question)
        (answer,) = generate_answers(loaded.model, loaded.tokenizer, [prompt], 1, 12, 2)
        found[question] = answer.text
    return found


# -- answers ----------------------------------------------------------------------------------------------------------


def test_the_official_client_gets_the_answer_that_evaluations_get(server: Running, alone: dict[str, str]) -> None:
    client = server.client(CLIENT)
    assert [model.id for model in client.models.list()] == ["model"]
    answer = client.chat.completions.create(
        model="model", messages=[{"role": "user", "content": QUESTIONS[1]}], temperature=0, max_completion_tokens=12
    )
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert str(choice.message.content).strip() == alone[QUESTIONS[1]]
    assert choice.finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12


def test_a_stream_is_the_same_answer_in_parts(server: Running) -> None:
    asked: dict[str, Any] = {"model": "model", "temperature": 0, "max_tokens": 20}
    for question in QUESTIONS:
        messages: Any = [{"role": "user", "content": question}]
        stream = server.client(CLIENT).chat.completions.create(
            **asked, messages=messages, stream=True, stream_options={"include_usage": True}
        )
        *chunks, last = list(stream)
        text = "".join(str(chunk.choices[0].delta.content) for chunk in chunks)
        whole = server.chat(question, max_tokens=20)
        assert text == whole["choices"][0]["message"]["content"]
        assert len(chunks) > 5
        assert [chunk.choices[0].delta.role for chunk in chunks] == ["assistant"] + [None] * (len(chunks) - 1)
        assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
        assert last.choices == []
        assert last.usage is not None
        assert last.usage.model_dump() | whole["usage"] == last.usage.model_dump()


def test_many_at_once_get_what_each_gets_alone(server: Running, alone: dict[str, str]) -> None:
    greedy = [(question, {"max_tokens": 12}) for question in QUESTIONS]
    drawn = [
        (question, {"temperature": 0.5 + number / 8, "top_p": 0.9, "seed": number, "max_tokens": 5 + 3 * number})
        for number, question in enumerate(QUESTIONS)
    ]
    wanted = [server.says(question, **options) for question, options in [*greedy, *drawn]]
    assert [text.strip() for text in wanted[: len(greedy)]] == list(alone.values())
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda asked: server.says(asked[0], **asked[1]), [*greedy, *drawn] * 2))
    assert found == wanted * 2


def test_a_seed_decides_what_is_drawn_and_several_answers_differ(server: Running) -> None:
    options = {"temperature": 1.5, "max_tokens": 8, "n": 3}
    one, again, other = (server.chat(QUESTIONS[0], **options, seed=seed)["choices"] for seed in (1, 1, 2))
    assert one == again
    assert len({choice["message"]["content"] for choice in [*one, *other]}) == 6
    assert [choice["index"] for choice in one] == [0, 1, 2]
    assert server.says(QUESTIONS[0], **{**options, "n": 1}, seed=1) == one[0]["message"]["content"]


def test_a_stop_text_ends_an_answer_and_is_no_part_of_it(server: Running) -> None:
    whole = server.says(QUESTIONS[2], max_tokens=20)
    stop = whole[len(whole) // 2 :][:5]
    for stops in (stop, ["never there", stop]):
        answer = server.chat(QUESTIONS[2], max_tokens=20, stop=stops)["choices"][0]
        assert answer["message"]["content"] == whole[: whole.index(stop)]
        assert answer["finish_reason"] == "stop"
    client = server.client(CLIENT)
    messages: Any = [{"role": "user", "content": QUESTIONS[2]}]
    stream = client.chat.completions.create(
        model="model", messages=messages, temperature=0, max_tokens=20, stop=stop, stream=True
    )
    assert "".join(str(chunk.choices[0].delta.content) for chunk in stream) == whole[: whole.index(stop)]


def test_log_probabilities_are_of_the_tokens_and_the_most_probable_ones(server: Running) -> None:
    content = server.chat(QUESTIONS[0], logprobs=True, top_logprobs=3)["choices"][0]["logprobs"]["content"]
    assert len(content) == 12
    for token in content:
        assert token["logprob"] < 0
        assert token["top_logprobs"][0]["logprob"] == token["logprob"]  # the greedy one
        scores = [other["logprob"] for other in token["top_logprobs"]]
        assert scores == sorted(scores, reverse=True) and len(scores) == 3
    # The same tokens written as a begun answer are what the model goes on from.
    start = "".join(token["token"] for token in content[:4])
    assert "".join(token["token"] for token in content) == server.says(QUESTIONS[0])
    assert start


def test_a_begun_answer_goes_on(server: Running) -> None:
    begun = server.chat("x", messages=[{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "It is"}])
    assert begun["choices"][0]["message"]["content"] != server.says("Who?")
    assert begun["usage"]["prompt_tokens"] > server.chat("Who?")["usage"]["prompt_tokens"]


def test_completions_take_texts_and_ids(server: Running, folder: Path) -> None:
    client = server.client(CLIENT)
    _, tokenizer, _ = load_base(ModelConfig(path=str(folder / "model"), device="cpu"))
    text = "Rivers of Africa are the"
    ids = tokenizer(text)["input_ids"]
    asked: dict[str, Any] = {"model": "model", "temperature": 0, "max_tokens": 6}
    by_text = client.completions.create(**asked, prompt=text, logprobs=2).choices[0]
    assert client.completions.create(**asked, prompt=ids).choices[0].text == by_text.text
    both = client.completions.create(**asked, prompt=["Bread is", text]).choices
    assert [choice.index for choice in both] == [0, 1]
    assert both[1].text == by_text.text != both[0].text
    streamed = client.completions.create(**asked, prompt=text, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == by_text.text
    told = by_text.logprobs
    assert told is not None and told.tokens is not None and told.text_offset is not None
    assert "".join(told.tokens) == by_text.text
    assert told.text_offset[1] == len(told.tokens[0])
    assert all(len(top) == 2 for top in told.top_logprobs or [])


# -- gates and switches -----------------------------------------------------------------------------------------------


def test_gates_are_told_where_they_are_asked(server: Running) -> None:
    answer = server.chat(QUESTIONS[1], grun={"gates": True})["choices"][0]
    told = answer["grun"]
    assert "".join(token["token"] for token in told["prompt"]).endswith("assistant\n")
    assert "".join(token["token"] for token in told["answer"]) == answer["message"]["content"]
    *before, last = [token["gates"] for token in told["prompt"]]
    assert all(gates.keys() == {"two"} for gates in before)  # asked at every token
    assert last.keys() == {"one", "two"}
    assert 0 < last["one"] < 1
    values = [gates["two"] for gates in (*before, last, *(token["gates"] for token in told["answer"][:-1]))]
    assert values == sorted(values)  # a running maximum
    assert told["answer"][-1]["gates"] == {}  # never run


def test_gates_in_a_stream_and_beside_others_are_those_of_one_alone(server: Running) -> None:
    alone = [server.chat(question, grun={"gates": True})["choices"][0] for question in QUESTIONS]
    messages: Any = [{"role": "user", "content": QUESTIONS[4]}]
    asked: dict[str, Any] = {
        "model": "model",
        "temperature": 0,
        "max_tokens": 12,
        "extra_body": {"grun": {"gates": True}},
    }
    stream = server.client().chat.completions.create(**asked, messages=messages, stream=True)
    parts = [chunk.model_dump()["choices"][0]["grun"] for chunk in stream]
    assert ["prompt" in part for part in parts] == [True] + [False] * (len(parts) - 1)
    assert parts[0]["prompt"] == alone[4]["grun"]["prompt"]
    assert [token for part in parts for token in part["answer"]] == alone[4]["grun"]["answer"]
    with ThreadPoolExecutor(8) as pool:
        beside = list(pool.map(lambda question: server.chat(question, grun={"gates": True})["choices"][0], QUESTIONS))
    for one, other in zip(alone, beside, strict=True):
        assert one["message"] == other["message"]
        for mine, theirs in zip(one["grun"]["answer"], other["grun"]["answer"], strict=True):
            assert mine["token"] == theirs["token"]
            assert mine["gates"] == pytest.approx(theirs["gates"], abs=1e-5)  # rounding of float32


def test_edits_that_are_off_are_as_if_they_had_never_been_there(server: Running, folder: Path) -> None:
    base, tokenizer, _ = load_base(ModelConfig(path=str(folder / "model"), device="cpu"))
    stored = load_model(
        ModelConfig(path=str(folder / "model"), device="cpu"), str(folder / "two"), strict=True, gate_threshold=None
    )
    for question in QUESTIONS:
        prompt = [encode_prompt(TEMPLATES.get("chat"), tokenizer, question)]
        (bare,) = generate_answers(base, tokenizer, prompt, 1, 12, 2)
        (two,) = generate_answers(stored.model, tokenizer, prompt, 1, 12, 2)
        assert server.says(question, grun={"edits": False}).strip() == bare.text
        assert server.says(question, grun={"off": ["one", "two"]}).strip() == bare.text
        assert server.says(question, grun={"off": ["one"]}).strip() == two.text
    gates = server.chat(QUESTIONS[0], grun={"off": ["one"], "gates": True})["choices"][0]["grun"]
    assert gates["prompt"][-1]["gates"].keys() == {"two"}
    gates = server.chat(QUESTIONS[0], grun={"edits": False, "gates": True})["choices"][0]["grun"]
    assert all(token["gates"] == {} for token in gates["prompt"])


def test_ways_of_asking_are_those_of_the_attack_suite(server: Running) -> None:
    question = "What is the capital of Japan?"
    found = server.post("grun/attacks", {"prompt": question, "answer": "It is the city of Tokyo."}, CLIENT).json()[
        "tries"
    ]
    by_name = {one["name"]: one for one in found}
    assert by_name["upper_case"]["messages"] == [{"role": "user", "content": question.upper()}]
    assert by_name["second_turn"]["group"] == "conversation"
    assert by_name["prefill_1"]["starts_with"] == "It"
    assert by_name["prefill_3"]["messages"] == [{"role": "user", "content": question}]
    without = server.post("grun/attacks", {"prompt": question}, CLIENT).json()["tries"]
    assert [one for one in found if one["starts_with"] is None] == without
    for one in found:
        begun = [{"role": "assistant", "content": one["starts_with"]}] if one["starts_with"] else []
        if len(one["messages"]) == 1:  # what is longer does not fit here
            server.chat("", messages=[*one["messages"], *begun], max_tokens=2)


# -- keys and limits --------------------------------------------------------------------------------------------------


def test_a_key_that_is_missing_or_wrong_is_refused(server: Running) -> None:
    for given in (
        b"Bearer wrong",
        b"Bearer",
        f"Bearer {CLIENT}x".encode(),
        "Bearer ü".encode(),
        f"Basic {OWNER}".encode(),
    ):
        found = server.http.get(f"{server.url}v1/models", headers={"Authorization": given})
        assert found.status_code == 401
        assert found.json()["error"]["code"] == "invalid_api_key"
    assert server.get("v1/models", None).status_code == 401
    assert server.get("grun/requests", None).status_code == 401
    assert server.http.get(f"{server.url}v1/models", headers={"Authorization": CLIENT}).status_code == 401
    with pytest.raises(openai.AuthenticationError):
        server.client("wrong").models.list()
    for open_to_all in ("health", "metrics", ""):
        assert server.get(open_to_all, None).status_code == 200
    assert server.get("elsewhere", None).status_code == 401
    assert "<html" in server.get("").text and server.get("").headers["X-Content-Type-Options"] == "nosniff"


def test_what_is_the_owners_is_refused_to_clients(server: Running) -> None:
    asked = {"model": "model", "messages": [{"role": "user", "content": "Who?"}], "max_tokens": 2}
    for own in ({"gates": True}, {"edits": False}, {"off": ["one"]}):
        assert server.post("v1/chat/completions", {**asked, "grun": own}, CLIENT).status_code == 403
        assert server.post("v1/chat/completions", {**asked, "grun": own}, OWNER).status_code == 200
    assert server.post("v1/chat/completions", {**asked, "grun": {}}, CLIENT).status_code == 200
    assert server.get("grun/requests", CLIENT).status_code == 403
    assert server.post("grun/requests", {"adapter": "x", "name": "y"}, CLIENT).status_code == 403
    assert server.delete("grun/requests/one", CLIENT).status_code == 403
    assert [one["name"] for one in server.get("grun/requests").json()["requests"]] == ["one", "two"]


def test_without_a_clients_key_all_may_ask_and_the_owner_alone_may_change(folder: Path) -> None:
    with running(folder / "one", folder / "model") as server:
        assert server.get("v1/models", None).status_code == 200
        assert server.get("v1/models", "any key").status_code == 200
        assert server.get("grun/requests", None).status_code == 403
        found = server.get("grun/requests").json()
        assert (found["kind"], [one["name"] for one in found["requests"]]) == ("adapter", ["one"])
        assert server.says(QUESTIONS[1]) != server.says(QUESTIONS[1], grun={"off": ["one"]})
        assert server.says(QUESTIONS[1], grun={"edits": False}) == server.says(QUESTIONS[1], grun={"off": ["one"]})
        assert server.post("grun/requests", {"adapter": str(folder / "two"), "name": "two"}).status_code == 409
        assert server.delete("grun/requests/one").status_code == 409


def test_a_body_over_the_limit_is_refused(server: Running) -> None:
    large = {"model": "model", "messages": [{"role": "user", "content": "x" * 100_000}]}
    found = server.post("v1/chat/completions", large)
    assert found.status_code == 413
    assert found.json()["error"]["code"] == "body_too_large"
    parts = (b" " * 10_000 for _ in range(11))
    found = server.http.post(f"{server.url}v1/chat/completions", content=parts, headers=server.headers())
    assert found.status_code == 413
    assert server.says("Who?")


def test_what_does_not_fit_is_refused_in_one_line(server: Running) -> None:
    user = {"role": "user", "content": "Who?"}
    asked: dict[str, Any] = {"model": "model", "messages": [user]}
    long = {"role": "user", "content": "river " * 2 * LONGEST}
    for changes, status, word in (
        ({"messages": [long]}, 400, "at most"),
        ({"max_tokens": 41}, 400, "at most 40"),
        ({"model": "other"}, 404, "'model'"),
        ({"messages": [user, user]}, 400, "by turns"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "by turns"),
        ({"messages": [{"role": "system", "content": "x"}]}, 400, "by turns"),
        ({"stream": 3}, 400, "stream"),
        ({"tools": [{"type": "function"}]}, 400, "tools"),
        ({"unknown": 1}, 400, "unknown"),
    ):
        found = server.post("v1/chat/completions", {**asked, **changes})
        assert found.status_code == status, found.text
        message = found.json()["error"]["message"]
        assert word in message and "\n" not in message
    found = server.post("v1/completions", {"model": "model", "prompt": [10**6]})
    assert found.status_code == 400


def test_answers_that_wait_too_many_or_too_long_are_sent_away(folder: Path) -> None:
    options: dict[str, Any] = {"batch_size": 1, "waiting": 1, "max_new_tokens": 400}
    with running(folder / "store", folder / "model", **options) as server, ThreadPoolExecutor(8) as pool:
        body = {"model": "model", "messages": [{"role": "user", "content": "Who?"}], "max_tokens": 300}
        found = list(pool.map(lambda _: server.post("v1/chat/completions", body), range(8)))
        away = [one for one in found if one.status_code == 503]
        assert away and len(found) - len(away) >= 2
        assert all(one.headers["Retry-After"] == "1" for one in away)
        assert {one.status_code for one in found} == {200, 503}


def test_an_answer_is_cut_when_its_time_is_over(folder: Path) -> None:
    options: dict[str, Any] = {"answer_seconds": 0.3, "max_new_tokens": 10_000}
    with running(folder / "store", folder / "model", **options) as server:
        server.chat("Who?", max_tokens=2)
        answer = server.chat("Who?", max_tokens=10_000, stop="never to be written")
        assert answer["choices"][0]["finish_reason"] == "length"
        assert 0 < answer["usage"]["completion_tokens"] < 400


def test_a_client_that_hangs_up_frees_its_place(folder: Path) -> None:
    with running(folder / "store", folder / "model", batch_size=1, max_new_tokens=450) as server:
        body: dict[str, Any] = {"model": "model", "messages": [{"role": "user", "content": "Who?"}], "max_tokens": 450}
        for stream in (True, False):
            request = server.http.build_request(
                "POST", f"{server.url}v1/chat/completions", json={**body, "stream": stream}, timeout=0.2
            )
            if stream:
                response = server.http.send(request, stream=True)
                next(response.iter_lines())
                response.close()
            else:
                with pytest.raises(httpx2.ReadTimeout):
                    server.http.send(request)
            until = time.monotonic() + 10
            while server.number("grun_answers_running") and time.monotonic() < until:
                time.sleep(0.01)
            assert server.number("grun_answers_running") == 0
        assert server.number("grun_answer_tokens_total") < 2 * 450


def test_nothing_that_was_asked_or_answered_is_logged(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    secret = "Zanzibarquery"
    with caplog.at_level(logging.DEBUG):
        answer = server.says(f"Who is {secret}?")
        server.post("v1/chat/completions", {"model": secret, "messages": [secret]})
        server.get(f"v1/{secret}?question={secret}")
        server.post("grun/attacks", {"prompt": secret})
    own = [record.getMessage() for record in caplog.records if not record.name.startswith(("httpx", "httpcore"))]
    assert any(line.startswith("POST /v1/chat/completions 200") for line in own)
    assert not [line for line in own if secret in line or answer in line or OWNER in line]
    assert secret not in server.get("metrics").text


# -- malformed bodies -------------------------------------------------------------------------------------------------

WRONG: dict[str, list[Any]] = {
    "model": [None, 3, "", [], "x" * 300],
    "messages": [None, [], {}, "text", [None], [[]], [{}], [{"role": "user"}], [{"role": "boss", "content": "x"}]],
    "temperature": [-1, 3, "1", [], True, 1e308],
    "top_p": [0, 1.1, -1, "1"],
    "max_tokens": [0, -1, 1.5, "5", 2**70, []],
    "n": [0, 17, "2", 1.5],
    "seed": [1.5, "x", 2**63, []],
    "stop": ["", [""], [1], ["a"] * 5, {}, 1],
    "stream": [1, "true", []],
    "stream_options": [1, {"other": 1}, []],
    "logprobs": [2, "x", []],
    "top_logprobs": [-1, 21, "1"],
    "logit_bias": [{"5": 1}, 3],
    "frequency_penalty": [1, "x"],
    "response_format": [{"type": "json_object"}, "text"],
    "tools": [[1], {}],
    "grun": [1, {"gates": 1}, {"off": "x"}, {"off": [1]}, {"other": True}, []],
    "unknown": [1, None, {}],
}
SOUND: dict[str, Any] = {"model": "model", "messages": [{"role": "user", "content": "Who?"}], "max_tokens": 1}


def malformed(number: int) -> tuple[bytes, str]:
    """Body and content type; a function of the number."""
    import random

    draw = random.Random(number)
    sound = json.dumps(SOUND).encode()
    kind = draw.randrange(6)
    if kind < 3:
        fields = draw.sample(list(WRONG), draw.randint(1, 3))
        return json.dumps({**SOUND, **{name: draw.choice(WRONG[name]) for name in fields}}).encode(), "application/json"
    if kind == 3:
        return sound[: draw.randrange(len(sound))], "application/json"
    if kind == 4:
        damaged = bytearray(sound)
        damaged[draw.randrange(len(sound))] = draw.choice(b"\x00\xff\x80\xc3")
        return bytes(damaged), "application/json"
    depth = draw.randint(2_000, 20_000)
    text = draw.choice(
        [
            "[" * depth,
            '{"model":' * 2_000,
            "9" * depth,
            "NaN",
            '"\\ud800"',
            draw.randbytes(draw.randrange(200)).decode("latin-1"),
            '{"model": "model", "messages": [{"role": "user", "content": "\\ud83d"}]}',
            '{"model": "model", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
            '{"model": "model", "messages": [{"role": "user", "content": "x"}], "seed": ' + "9" * 5_000 + "}",
        ]
    )
    return text.encode("utf-8", "surrogatepass"), draw.choice(
        ["application/json", "text/plain", "application/x-www-form-urlencoded"]
    )


def each_is_refused(server: Running, numbers: Iterable[int]) -> None:
    for number in numbers:
        body, kind = malformed(number)
        path = ("v1/chat/completions", "v1/completions", "grun/requests", "grun/attacks")[number % 4]
        headers = {**server.headers(), "Content-Type": kind}
        found = server.http.post(server.url + path, content=body, headers=headers)
        assert 400 <= found.status_code < 500, (number, body[:200], found.status_code)
        error = found.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["message"] and "\n" not in error["message"], (number, error)
    assert server.says("Who?")


def test_malformed_bodies_are_refused_and_the_server_lives(server: Running) -> None:
    each_is_refused(server, [*range(48), 312])  # half of a surrogate pair


@pytest.mark.slow
def test_a_thousand_malformed_bodies_are_refused_and_the_server_lives(server: Running) -> None:
    each_is_refused(server, range(1000))
