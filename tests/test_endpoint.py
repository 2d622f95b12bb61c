"""model.Endpoint and model.EndpointJudge against a loopback server that fails as real ones do."""

import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import JsonHandler, serving

import model as m
from model import EndpointJudge
from rewards import InputError


@pytest.mark.parametrize("given, name, url", [
    ("smollm2-135m", "smollm2-135m", ""), ("Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-7B-Instruct", ""),
    ("toy@http://127.0.0.1:8000/v1", "toy", "http://127.0.0.1:8000/v1"), ("./runs/a@b", "./runs/a@b", ""),
    ("org/model@https://user@host/v1", "org/model", "https://user@host/v1"),
])
def test_a_model_is_served_where_its_name_says_so(given, name, url):
    assert m.split_address(given) == (name, url)
    chat = m.open_chat(given)
    assert isinstance(chat, m.Endpoint if url else m.LocalChat)


def test_a_served_model_cannot_be_trained():
    with pytest.raises(InputError, match="a served model cannot be loaded"):
        m.load_model("toy@http://127.0.0.1:8000/v1")


def said(text):
    return [{"role": "user", "content": text}]


def test_a_local_model_answers_like_an_endpoint_and_keeps_finished_chunks(tiny, tmp_path, monkeypatch):
    talks = [said(f"Name {word}.") for word in "red blue green white black".split()]
    settings = {"n": 2, "max_tokens": 6, "temperature": 1.0, "seed": 3}
    monkeypatch.setattr(m.LocalChat, "CHUNK", 2)
    chat = m.LocalChat(str(tiny), precision="fp32", cache=tmp_path)
    replies = chat.chat(talks, **settings)
    texts = [[completion.text for completion in group] for group in replies]
    assert [len(group) for group in replies] == [2] * 5 and texts[0][0] != texts[0][1]
    assert len(list(tmp_path.rglob("*.json"))) == 3 and chat.tokens["completion_tokens"] > 20
    again = m.LocalChat(str(tiny), precision="fp32", cache=tmp_path)
    monkeypatch.setattr(m, "load_model", lambda *_, **__: pytest.fail("a finished chunk was generated twice"))
    assert again.chat(talks, **settings) == [
        [m.Completion([], c.text, c.finish_reason) for c in group] for group in replies]
    assert again.tokens == chat.tokens
    monkeypatch.undo()
    alone = m.LocalChat(str(tiny), precision="fp32").chat(talks[2:3], **settings)  # no neighbour changes a reply
    assert [completion.text for completion in alone[0]] == texts[2]
    other = m.LocalChat(str(tiny), precision="fp32").chat(talks[2:3], **settings | {"seed": 4})
    assert [completion.text for completion in other[0]] != texts[2]


def test_a_conversation_without_room_for_an_answer_gets_a_blank_reply(tiny):
    chat = m.LocalChat(str(tiny), precision="fp32")
    [long], [short] = chat.chat([said("x y z " * 900), said("Name red.")], max_tokens=8, temperature=0.0)
    assert (long.text, long.finish_reason) == ("", "refused") and short.finish_reason in ("stop", "length")


SHAPES = ['{"choices": [null]}', '{"choices": "abc"}', '{"choices": [{"message": "hi"}]}', '{"choices": [{}]}',
          '{"choices": [{"message": {"content": ["a", "list"]}}]}']  # JSON, but not what the protocol says


class Faulty(JsonHandler):
    """Answers with the last word of the last message; a share of the requests meets a fault first."""

    share, requests, rng, lock = 0.3, 0, random.Random(0), threading.Lock()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.lock:
            type(self).requests += 1
            faulty = self.rng.random() < self.share
            fault = self.rng.choice([429, 500, 503, "hang", "garbage", "empty", *SHAPES]) if faulty else 0
        if fault == "hang":
            time.sleep(1.0)
            return
        if isinstance(fault, int) and fault:
            return self.send(fault, b'{"error": {"message": "busy"}}')
        if fault == "garbage":
            return self.send(200, b'{"choices": [{"mess')
        if fault == "empty":
            return self.send(200, b"{}")
        if fault in SHAPES:
            return self.send(200, fault.encode())
        word = body["messages"][-1]["content"].split()[-1]
        if word == "forbidden":
            return self.send(401, b'{"error": {"message": "no key"}}')
        if word == "long":
            return self.send(413, b'{"error": {"message": "too long"}}')
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": word},
                  "logprobs": {"content": [{"token": word, "logprob": -0.5, "top_logprobs": None}]}}
        self.send(200, json.dumps({"id": "x", "object": "chat.completion", "created": 0, "model": "toy",
                                   "usage": {"prompt_tokens": "many", "completion_tokens": 3},
                                   "choices": [choice] * body.get("n", 1)}).encode())


@pytest.fixture
def server():
    Faulty.requests, Faulty.share = 0, 0.3
    with serving(Faulty) as address:
        yield address


def talk(word):
    return [{"role": "user", "content": f"say {word}"}]


def test_nothing_is_lost_and_nothing_is_asked_twice(server, tmp_path):
    endpoint = m.Endpoint(server, "toy", timeout=0.4, cache=tmp_path)
    words = [f"word{i}" for i in range(60)]
    first = endpoint.chat([talk(word) for word in words], n=2, max_tokens=8, temperature=0.0, seed=1)
    assert [[c.text for c in group] for group in first] == [[word, word] for word in words]
    assert Faulty.requests > 60  # there were faults
    asked = Faulty.requests
    assert endpoint.chat([talk(word) for word in words], n=2, max_tokens=8, temperature=0.0, seed=1) == first
    assert Faulty.requests == asked
    endpoint.chat([talk("word0")], n=2, max_tokens=9, temperature=0.0, seed=1)  # another request
    assert Faulty.requests > asked


def test_the_reply_of_one_model_is_not_taken_for_that_of_another(server, tmp_path):
    Faulty.share = 0.0
    for model in ("toy", "other", "toy"):
        m.Endpoint(server, model, cache=tmp_path).chat([talk("tea")], max_tokens=8)
    assert Faulty.requests == 2


def test_a_refusal_is_an_error_at_once_and_a_dead_server_after_the_retries(server):
    Faulty.share = 0.0
    with pytest.raises(InputError, match="refused the request"):
        m.Endpoint(server, "toy").chat([talk("forbidden")], max_tokens=8)
    assert Faulty.requests == 1
    with pytest.raises(InputError, match="no valid reply after 2 tries"):
        m.Endpoint("http://127.0.0.1:9/v1", "toy", max_retries=1, timeout=1).chat([talk("x")], max_tokens=8)


def test_a_served_judge_keeps_the_order_and_counts_what_it_cannot_read(server):
    judge = EndpointJudge(m.Endpoint(server, "toy", timeout=0.4).chat)
    # the template ends with the question, so this server echoes its last word
    verdicts = judge([("request", "answer", f"Answer {word}") for word in ["yes", "no", "perhaps", "yes"]])
    assert verdicts == [True, False, False, True] and (judge.asked, judge.unreadable) == (4, 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_json_of_another_shape_is_asked_for_again_and_then_an_error(shape, monkeypatch):
    class Odd(JsonHandler):
        def do_POST(self):
            self.send(200, shape.encode())

    monkeypatch.setattr(m.time, "sleep", lambda seconds: None)
    with serving(Odd) as address, pytest.raises(InputError, match="no valid reply after 3 tries"):
        m.Endpoint(address, "toy", max_retries=2).chat([talk("tea")], max_tokens=8)


def test_what_a_server_refuses_is_an_unreadable_verdict_and_said(server, capsys):
    Faulty.share = 0.0
    judge = m.make_judge(f"toy@{server}")
    items = [("request", "answer", "Answer " + word) for word in ("yes", "long", "long", "long")]
    assert judge(items) == [True, False, False, False]
    assert m.judge_counts(judge) == {"judge/asked": 4, "judge/unreadable": 3, "judge/truncated": 0}
    assert "3 of 4 verdicts of the judge cannot be read, count as no" in capsys.readouterr().err
    assert m.judge_counts(None) == {}
    with pytest.raises(InputError, match="refused all of 3 questions .*top_logprobs"):
        m.make_judge(f"toy@{server}")(items[1:])


@pytest.mark.slow
def test_a_judge_on_a_real_server(tmp_path):
    """`transformers serve` with SmolLM2 (pip install "transformers[serving]"): nothing lost, order kept, none asked
    again."""
    pytest.importorskip("fastapi", reason='needs pip install "transformers[serving]"')
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = str(m.smollm2_folder())
    command = [str(Path(sys.executable).parent / "transformers"), "serve", folder, "--host", "127.0.0.1", "--port",
               str(port)]
    with open(tmp_path / "server.log", "w") as log:
        served = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    try:
        for _ in range(120):
            assert served.poll() is None, (tmp_path / "server.log").read_text()[-2000:]
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(1)
        url = f"http://127.0.0.1:{port}/v1"
        items = [("Write a line about tea.", answer, question)
                 for answer in ("Tea is a warm drink.", "Bread!", "A cup of tea makes me calm.")
                 for question in ("Is it about tea?", "Is it rude?", "Does it mention bread? Answer yes or no.")]
        judge = EndpointJudge(m.Endpoint(url, folder, concurrency=4, cache=tmp_path / "cache").chat)
        verdicts = judge(items)
        alone = [EndpointJudge(m.Endpoint(url, folder).chat)([item])[0] for item in items]
    finally:
        served.terminate()
        served.wait()
    assert verdicts == alone and judge.asked == len(items)
    again = EndpointJudge(m.Endpoint(url, folder, max_retries=0, cache=tmp_path / "cache").chat)
    assert again(items) == verdicts and again.unreadable == judge.unreadable  # the server is gone
    print(f"{len(items)} items, {sum(verdicts)} yes, {judge.unreadable} unreadable")
