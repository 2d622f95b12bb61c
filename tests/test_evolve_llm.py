"""Instruction evolution with a served model: a loopback server that answers every kind of prompt from a script."""

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from conftest import ROOT

import evolve
from rewards import parse_response, read_records, score

PLAIN = "First, put the kettle on and look out of the window. The garden is quiet, and the day is long. Then sit down."
PLAIN_ZH = "先把水烧开，看看窗外。花园里很安静，白天很长。然后坐下来，慢慢喝一杯茶。"


def reply(text, reasoning="", finish="stop"):
    return SimpleNamespace(text=text, reasoning=reasoning, finish_reason=finish)


def script(messages, folder):
    """(content, reasoning) of a model that does what each prompt asks, the same for the same messages."""
    prompt = messages[-1]["content"]
    quoted = re.findall(r"^-----\n(.*?)\n-----$", prompt, re.S | re.M)
    zh = re.search("(better words|another request,|one instruction,) in Chinese", prompt)
    if messages[0]["role"] == "system":
        return answer_of(prompt, folder)
    if prompt.startswith("You sort requests"):
        return json.dumps({"topic": "problem solving", "ability": ["tips", "planning"][len(quoted[0]) % 2]}), ""
    if "still with words drawn by chance" in prompt:
        words = "茶壶 窗户 花园 杯子 早晨 阳光".split() if zh else "kettle window garden teacup morning sunlight".split()
        return "Sure:\n```json\n" + json.dumps({"words": words}) + "\n```", ""
    if "taken apart" in prompt:
        parts = [
            {"text": f"第{i}点要写清楚。" if zh else f"Make point {i} clear.", "question": f"Is point {i} clear?"}
            for i in range(int(re.search(r"Exactly (\d+) parts", prompt)[1]))
        ]
        value = {"parts": parts}
        truth = re.search(r"plainly (\w+)(?: and the inner one (\w+))? of it", prompt)
        if truth:
            value["condition"] = {"if": f"it is {truth[1]} at noon", "why": "it says so"}
        if truth and truth[2]:
            value["condition"]["inner"] = {"if": f"it is {truth[2]} at night", "why": "it says so too"}
        return json.dumps(value), ""
    if prompt.startswith("The request, between") and "Statement about" in prompt:
        return re.search(r"it is (true|false) at", prompt)[1].capitalize() + ".", ""
    if prompt.startswith("Turn a request"):
        parts = [json.loads(line) for line in prompt.split("The new parts:\n")[1].split("\n\nKeep")[0].split("\n")]
        texts = [p["text"] if "text" in p else f"It matters whether {p['condition']['if']}." for p in parts]
        return json.dumps({"instruction": " ".join([quoted[0], *texts])}), ""
    if prompt.startswith("Compare a list"):
        return "yes", ""
    if "checked for one fault" in prompt:
        return "False", ""
    if prompt.startswith(("You check whether", "请检查")):
        return "yes", ""
    return (PLAIN_ZH if re.search("[\u4e00-\u9fff]", prompt) else PLAIN), ""


def answer_of(instruction, folder):
    """An expert's (content, reasoning): the plain text, repaired to meet the code constraints; every second in tags."""
    path = next((folder / "steps").glob("*-constraints.jsonl"))
    for line in path.read_text("utf-8").splitlines():
        record = json.loads(line)
        if record["messages"][0]["content"] == instruction:
            break
    drawn = [(c["id"], c["kwargs"]) for c in record["constraints"] if c["kind"] == "code" and c["active"]]
    text = PLAIN_ZH if record["language"] == "zh" else PLAIN
    text = evolve.repair(random.Random(0), text, drawn)[0] or text
    if len(instruction) % 2:
        return text, "The request is simple enough, so I write it down."
    return f"<think>I go through the points.</think>\n<answer>{text}</answer>", ""


class Scripted(BaseHTTPRequestHandler):
    share, served, asked, folder, victim, lock = 0.0, Counter(), 0, None, None, threading.Lock()
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with self.lock:
            cls = type(self)
            cls.asked += 1
            # the fault depends on the request and on how often it came, not on the order of the threads
            cls.served[body] += 1
            rng = random.Random(hashlib.sha256(body + bytes([cls.served[body] % 256])).hexdigest())
            fault = rng.choice([429, 500, "cut", "garbage", "blank", "long"]) if rng.random() < cls.share else 0
            if cls.victim and cls.asked == cls.victim[1]:
                os.kill(cls.victim[0].pid, signal.SIGKILL)
        if isinstance(fault, int) and fault:
            return self.send(fault, b'{"error": {"message": "busy"}}')
        if fault == "cut":
            self.close_connection = True
            return None
        if fault == "garbage":
            return self.send(200, b'{"choices": [{"mess')
        text, reasoning = script(json.loads(body)["messages"], self.folder)
        message = {"role": "assistant", "content": "" if fault == "blank" else text[: 20 if fault == "long" else None]}
        message |= {"reasoning_content": reasoning} if reasoning and fault != "blank" else {}
        choice = {"index": 0, "finish_reason": "length" if fault == "long" else "stop", "message": message}
        usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
        return self.send(200, json.dumps({"id": "x", "object": "chat.completion", "created": 0, "model": "toy",
                                          "choices": [choice], "usage": usage}).encode())

    def send(self, status, payload):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    Scripted.share, Scripted.served, Scripted.asked, Scripted.victim = 0.0, Counter(), 0, None
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Scripted)
    httpd.daemon_threads = True
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}/v1"
    httpd.shutdown()


def flags(server, folder, limit=24):
    Scripted.folder = folder
    return ["--llm", "toy", "--llm-url", server, "--out", str(folder), "--limit", str(limit), "--compositions", "all",
            "--language", "both", "--kinds", "ifeval", "--heldout-share", "0.3"]


NAMES = ["train.jsonl", "heldout.jsonl"]


def test_all_steps_with_faults_give_the_same_files_and_a_second_run_asks_nothing(server, tmp_path):
    evolve.main(flags(server, tmp_path / "calm") + ["--price-in", "1", "--price-out", "2"])
    calm = [(tmp_path / "calm" / name).read_bytes() for name in NAMES]
    records = [r for name in NAMES for r in read_records(tmp_path / "calm" / name) if r["task"] == "instruction"]
    assert len(records) >= 18
    assert {c["kind"] for r in records for c in r["constraints"]} == {"code", "judge"}
    assert len({r["composition"] for r in records}) >= 3 and {r["language"] for r in records} == {"en", "zh"}
    scores = score(records, [r["expert"] for r in records], judge=lambda items: [True] * len(items))
    assert [s.total for s in scores] == [3.0] * len(records)
    thoughts = {parse_response(r["expert"]).think for r in records}
    assert len(thoughts) == 2  # from the reasoning field and from the tags
    report = (tmp_path / "calm" / "report.md").read_text("utf-8")
    for heading in ("filter: unsafe", "Tokens", "| rewrite |", "Records per dimension", "| selection |"):
        assert heading in report
    calls = [json.loads(line) for line in (tmp_path / "calm" / "calls.jsonl").read_text("utf-8").splitlines()]
    assert len(calls) == Scripted.asked and all(call["used"] for call in calls)
    steps = {path.name.partition("-")[2] for path in (tmp_path / "calm" / "steps").iterdir()}
    assert {"requests.jsonl", "drafts.jsonl", "constraints.jsonl", "expert.jsonl", "filter-length.jsonl"} <= steps

    asked = Scripted.asked
    evolve.main(flags(server, tmp_path / "calm"))
    assert Scripted.asked == asked and [(tmp_path / "calm" / name).read_bytes() for name in NAMES] == calm

    Scripted.share = 0.3
    evolve.main(flags(server, tmp_path / "rough"))
    assert Scripted.asked > 2.3 * asked  # there were faults
    assert [(tmp_path / "rough" / name).read_bytes() for name in NAMES] == calm


def test_a_killed_run_goes_on_where_it_was(server, tmp_path):
    command = [sys.executable, str(ROOT / "evolve.py"), *flags(server, tmp_path / "killed", 12)]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        Scripted.victim = (process, 80)
        assert process.wait(timeout=120) == -signal.SIGKILL, (tmp_path / "log").read_text()[-2000:]
    stored = [json.loads(path.read_text("utf-8"))["request"] for path in (tmp_path / "killed/calls").rglob("*.json")]
    assert len(stored) > 40
    Scripted.served, Scripted.victim = Counter(), None
    evolve.main(flags(server, tmp_path / "killed", 12))
    again = [json.loads(body) for body in Scripted.served]
    assert again and not [request for request in stored if request in again]
    evolve.main(flags(server, tmp_path / "whole", 12))
    for name in NAMES:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
