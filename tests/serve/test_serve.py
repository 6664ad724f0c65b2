"""The server as clients meet it: over a socket, on the embedded model, one server for all tests."""

import asyncio
import base64
import io
import json
import socket
import threading
import time

import httpx
import pytest
import uvicorn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import vlmfix
from vlmfix.asking.conversation import Conversation
from vlmfix.eval.pictures.data import Data
from vlmfix.serve.app import build
from vlmfix.serve.listening import Line
from vlmfix.serve.methods import Offer
from vlmfix.serve.wire import Refused, read_request
from vlmfix.serve.worker import Ticket, Worker

PICTURES = list(Data.load("organism", 4).images.values())
PROMPT = "Please describe this image in detail."


def url(i):
    return "data:image/webp;base64," + base64.b64encode(PICTURES[i].read_bytes()).decode()


def shown(i, text=PROMPT):
    return {
        "role": "user",
        "content": [{"type": "image_url", "image_url": {"url": url(i)}}, {"type": "text", "text": text}],
    }


@pytest.fixture(scope="module")
def server(organism):
    """Address, worker, model and processor."""
    worker = Worker(*organism, max_batch=16, max_waiting=64)
    app = build(worker, Offer("organism", ("none", "var")), max_body=2_000_000)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    running = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
    thread.start()
    while not running.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}", worker, *organism
    running.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def client(server):
    with httpx.Client(base_url=server[0], timeout=60) as client:
        yield client


def chat(client, **body):
    body = {"model": "organism", "messages": [shown(0)], "max_tokens": 12, **body}
    return client.post("/v1/chat/completions", json=body)


def refused(response, status=400):
    assert response.status_code == status, response.text
    return response.json()["error"]["message"]


def streamed(client, **body):
    """Text of each choice, and all chunks."""
    texts, chunks = {}, []
    body = {"model": "organism", "messages": [shown(0)], "max_tokens": 12, "stream": True, **body}
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    for line in lines:
        chunks.append(json.loads(line))
        for choice in chunks[-1]["choices"]:
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["delta"].get("content", "")
    return texts, chunks


@pytest.mark.parametrize("method", ["none", "var", "vhr:alpha=1.5", "rerank:n=2", "chunks"])
def test_every_method_answers_as_ask_does_streaming_and_not(server, client, method):
    _, _, model, processor = server
    record = vlmfix.Asker(model, processor, method).ask(PICTURES[0], PROMPT, max_new_tokens=12)
    body = chat(client, model=f"organism+{method}").json()
    (choice,) = body["choices"]
    assert choice["message"]["content"] == record.text and choice["finish_reason"] == record.finish
    assert body["vlmfix"]["effects"] == record.effects and body["vlmfix"]["passes"] == record.passes
    assert [m["name"] for m in body["vlmfix"]["method"]] == [m["name"] for m in record.method]
    n_prompt = int(vlmfix.Asker(model, processor).inputs([(PICTURES[0], PROMPT)])["attention_mask"].sum())
    assert body["usage"]["prompt_tokens"] == n_prompt
    assert body["usage"]["completion_tokens"] == len(record.token_ids)
    texts, chunks = streamed(client, model=f"organism+{method}", stream_options={"include_usage": True})
    assert texts == {0: record.text} and chunks[-1]["usage"] == body["usage"] and chunks[-1]["choices"] == []
    assert len(chunks) > 8 or method in ("rerank:n=2", "chunks")


def test_models_are_listed_and_the_bare_name_is_the_first_method(client):
    assert [m["id"] for m in client.get("/v1/models").json()["data"]] == ["organism", "organism+none", "organism+var"]
    assert client.get("/v1/models/organism+var").json()["id"] == "organism+var"
    assert chat(client).json()["vlmfix"]["method"] == []


def test_a_conversation_goes_through_the_template_whole(server, client):
    _, _, model, processor = server
    messages = [
        {"role": "system", "content": "Be brief."}, shown(1), {"role": "assistant", "content": "A dog."},
        shown(2, "Is there a dog in the image?"),
    ]  # fmt: skip
    body = chat(client, messages=messages).json()
    parts = [[{"type": "image"}, {"type": "text", "text": text}] for text in (PROMPT, "Is there a dog in the image?")]
    asked = Conversation([
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, {"role": "user", "content": parts[0]},
        {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]}, {"role": "user", "content": parts[1]},
    ])  # fmt: skip
    record = vlmfix.Asker(model, processor).ask([PICTURES[1], PICTURES[2]], asked, max_new_tokens=12)
    assert body["choices"][0]["message"]["content"] == record.text and record.prompt == "Is there a dog in the image?"
    text = asked.rendered(processor, 2)
    assert text.startswith("USER: Be brief.\n<image>") and text.count("<image>") == 2 and "A dog.</s>" in text
    with pytest.raises(ValueError, match="shows 2 pictures"):
        vlmfix.Asker(model, processor).ask([PICTURES[1]], asked)


def test_text_alone_is_answered_and_methods_say_that_they_left_it(client):
    body = chat(client, model="organism+var", messages=[{"role": "user", "content": "Is there a dog?"}]).json()
    assert body["choices"][0]["message"]["content"] and body["vlmfix"]["effects"][0]["acted"] is False


def test_stop_texts_n_seed_and_log_probabilities(client):
    whole = chat(client).json()["choices"][0]["message"]["content"]
    stop = whole.split()[3]
    body = chat(client, stop=[stop], logprobs=True, top_logprobs=3).json()
    (choice,) = body["choices"]
    assert choice["message"]["content"] == whole.partition(stop)[0].strip() and choice["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] < 8
    assert streamed(client, stop=stop)[0][0] == choice["message"]["content"]
    (first,) = choice["logprobs"]["content"]
    assert len(first["top_logprobs"]) == 3 and first["logprob"] == first["top_logprobs"][0]["logprob"] <= 0
    assert whole.startswith(first["token"].strip())
    sampling = {"temperature": 2.0, "n": 3, "seed": 7}
    answers = [c["message"]["content"] for c in chat(client, **sampling).json()["choices"]]
    assert answers == [c["message"]["content"] for c in chat(client, **sampling).json()["choices"]]
    assert len(set(answers)) > 1 and streamed(client, **sampling)[0] == dict(enumerate(answers))
    assert answers != [c["message"]["content"] for c in chat(client, **{**sampling, "seed": 8}).json()["choices"]]


def test_fifty_clients_get_what_each_alone_gets_in_few_batches(server, client):
    """Two methods, two pictures, two lengths; questions about one picture share its pass."""
    _, worker, _, _ = server
    kinds = [(m, i, n) for m in ("organism", "organism+var") for i in range(2) for n in (6, 7)]
    alone = {kind: chat(client, model=kind[0], messages=[shown(kind[1])], max_tokens=kind[2]).json() for kind in kinds}

    async def all_at_once():
        async with httpx.AsyncClient(base_url=server[0], timeout=120, limits=httpx.Limits(max_connections=50)) as many:
            asked = [kinds[k % len(kinds)] for k in range(50)]
            bodies = [{"model": m, "messages": [shown(i)], "max_tokens": n} for m, i, n in asked]
            return asked, await asyncio.gather(*(many.post("/v1/chat/completions", json=body) for body in bodies))

    before = worker.counts["batches"]
    asked, responses = asyncio.run(all_at_once())
    for kind, response in zip(asked, responses, strict=True):
        assert response.json()["choices"][0]["message"] == alone[kind]["choices"][0]["message"]
    assert worker.counts["batches"] - before < 25
    tokens = {r.json()["vlmfix"]["tokens"] for r in responses if r.json()["vlmfix"]["batch_size"] > 4}
    assert min(tokens) < min(body["vlmfix"]["tokens"] for body in alone.values()), "pictures are shared"


def test_what_is_not_done_is_refused_in_openais_form(server, client):
    assert "there is organism, organism+none, organism+var" in refused(chat(client, model="gpt"), 404)
    assert "unknown method 'vahr'" in refused(chat(client, model="organism+vahr"), 404)
    assert "did you mean 'rho'" in refused(chat(client, model="organism+var:rhoo=1"))
    for spec in ("headgain:head_list=/etc/passwd", "headgain:head_list=pyproject.toml", "os:path"):
        assert refused(chat(client, model=f"organism+{spec}"), 404 if spec == "os:path" else 400)
    for bad in ("http://example.org/a.png", "file:///etc/passwd", "/etc/passwd", str(PICTURES[0])):
        content = [{"type": "image_url", "image_url": {"url": bad}}, {"type": "text", "text": "?"}]
        assert "data URLs only" in refused(chat(client, messages=[{"role": "user", "content": content}]))
    for field, value in (("presence_penalty", 1), ("tools", [{}]), ("response_format", {"type": "json_object"}),
                         ("max_tokens", 10**6), ("temperature", -1), ("n", 99), ("frobnicate", 1)):  # fmt: skip
        assert refused(chat(client, **{field: value})).startswith(field)
    assert "whole answers" in refused(chat(client, model="organism+rerank", logprobs=True))
    assert "expected head_list=FILE" in refused(chat(client, model="organism+headgain"))
    assert "content-type" in refused(client.post("/v1/chat/completions", content=b"{}"), 415)
    assert "larger than" in refused(chat(client, user="x" * 2_000_001), 413)
    assert "there is POST /v1/chat/completions" in refused(client.get("/v2"), 404)
    png = io.BytesIO()
    Image.effect_noise((60, 60), 50).save(png, "PNG")
    damaged = "data:image/png;base64," + base64.b64encode(png.getvalue()[:900]).decode()
    content = [{"type": "image_url", "image_url": {"url": damaged}}, {"type": "text", "text": "?"}]
    assert "damaged" in refused(chat(client, messages=[{"role": "user", "content": content}]))


def test_a_client_that_leaves_frees_the_model(server, client):
    _, worker, _, _ = server
    long = {"model": "organism", "messages": [shown(0)], "max_tokens": 4096, "stream": True, "temperature": 3.0}
    before = worker.counts["new_tokens"]
    with client.stream("POST", "/v1/chat/completions", json=long) as response:
        next(response.iter_lines())
    assert chat(client).status_code == 200, "the next one does not wait for the rest"
    assert worker.counts["new_tokens"] - before < 2000


def test_a_full_queue_turns_away_and_a_stopped_server_says_so(organism):
    asked = read_request(json.dumps({"model": "organism", "messages": [shown(0)]}).encode())
    idle = Worker.__new__(Worker)  # without its thread: nobody takes what waits
    idle.max_waiting, idle._closed, idle._waiting, idle._asking = 1, False, [], []
    idle._changed = threading.Condition()
    tickets = [Ticket(asked, "none", asyncio.new_event_loop()) for _ in range(3)]
    idle._asking = [tickets[2]]
    idle.submit(tickets[0])
    with pytest.raises(Refused, match="1 requests wait already") as error:
        idle.submit(tickets[1])
    assert error.value.status == 429
    idle.close()
    for ticket in (tickets[0], tickets[2]):
        ticket.loop.run_until_complete(asyncio.sleep(0))
        assert ticket.events.get_nowait().status == 503 and ticket.abandoned
    for ticket in tickets:
        ticket.loop.close()


def test_a_key_is_asked_for(server):
    from fastapi.testclient import TestClient

    app = build(server[1], Offer("organism", ("none",), only_listed=True), api_key="secret")
    keyed = TestClient(app)  # without its lifespan, which would close the worker
    assert "API key" in refused(keyed.get("/v1/models"), 401)
    assert keyed.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200
    assert keyed.get("/health").json() == {"status": "ok"}
    response = keyed.post("/v1/chat/completions", headers={"Authorization": "Bearer secret"},
                          json={"model": "organism+var", "messages": [shown(0)]})  # fmt: skip
    assert "not offered" in refused(response, 404)


def test_metrics_are_prometheus_text(client):
    chat(client)
    text = client.get("/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values["vlmfix_answers_total"]) >= 1 and float(values['vlmfix_requests_total{status="200"}']) >= 1
    assert values["vlmfix_waiting"] == "0"


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
FIELDS = ("model", "messages", "max_tokens", "temperature", "top_p", "n", "seed", "stop", "stream", "logprobs", "tools")


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=60) | ANYTHING.map(lambda x: json.dumps(x).encode())
       | st.dictionaries(st.sampled_from(FIELDS), ANYTHING, max_size=6).map(
           lambda x: json.dumps({"model": "organism", "messages": [{"role": "user", "content": "a"}], **x}).encode()))  # fmt: skip
def test_any_body_is_read_or_refused(body):
    try:
        read_request(body)
    except Refused as error:
        assert json.dumps(error.body()) and error.status == 400
        str(error).encode()


def test_odd_bodies_over_the_wire_leave_no_trace_in_the_log(client, capfd):
    for body in (b"", b"[]", b"[" * 100_000, b'{"model": NaN}', b'{"model": "\\ud800", "messages": []}', b"\xff\xfe"):
        head = {"Content-Type": "application/json"}
        assert refused(client.post("/v1/chat/completions", content=body, headers=head))
    assert "Traceback" not in capfd.readouterr().err


class Letters:
    @staticmethod
    def decode(tokens, skip_special_tokens=True):
        return "".join(map(chr, tokens))


@given(st.text("ab ", max_size=12), st.lists(st.text("ab ", min_size=1, max_size=3), max_size=2))
def test_a_stream_is_the_text_up_to_the_stop_text(text, stop):
    told = []
    line = Line(Letters, frozenset(), stop, told.append)
    for letter in text:
        line.take(ord(letter))
    line.finish()
    written = text.lstrip()
    cuts = [written.find(each) for each in stop if each in written]
    assert "".join(told) == line.text()
    assert not cuts or line.stopped
    assert line.text() in written and not any(each in line.text() for each in stop)


def test_openais_own_client(server):
    openai = pytest.importorskip("openai")
    there = openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0)
    plain = there.chat.completions.create(model="organism+var", messages=[shown(0)], max_tokens=12)
    parts = there.chat.completions.create(model="organism+var", messages=[shown(0)], max_tokens=12, stream=True)
    text = "".join(part.choices[0].delta.content or "" for part in parts)
    assert text == plain.choices[0].message.content and plain.vlmfix["effects"][0]["acted"]
    with pytest.raises(openai.NotFoundError, match="there is organism"):
        there.chat.completions.create(model="x", messages=[shown(0)])
