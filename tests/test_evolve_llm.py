"""Instruction evolution with a model: a loopback server that answers every kind of prompt from a script."""

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
from collections import Counter, defaultdict
from types import SimpleNamespace

import pytest
from conftest import ROOT, JsonHandler, serving

import evolve
from model import read_jsonl
from rewards import CONSTRAINTS, parse_response, read_records, score, validate_record

PLAIN = "First, put the kettle on and look out. The garden is quiet, and the day is long. Then sit down with a cup."
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
        words = "茶壶 窗户 花园 杯子 阳光".split() if zh else "kettle window garden teacup morning sunlight".split()
        return "Sure:\n```json\n" + json.dumps({"words": words}) + "\n```", ""
    if "taken apart" in prompt:
        parts = [
            {"text": f"第{i}点写清楚。" if zh else f"Make point {i} clear.", "question": f"Point {i} clear?"}
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
        texts = [p["text"] if "text" in p else f"It matters whether {p['condition']}." for p in parts]
        return json.dumps({"instruction": " ".join([quoted[0], *texts])}), ""
    if prompt.startswith("Compare a list"):
        return "yes", ""
    if "checked for one fault" in prompt:
        return "False", ""
    if prompt.startswith(("You check whether", "请检查")):
        return "yes", ""
    return (PLAIN_ZH if re.search("[\u4e00-\u9fff]", prompt) else PLAIN), ""


def answer_of(instruction, folder):
    """An expert's (content, reasoning): an answer that meets the code constraints; every second one in tags.

    The constraints are looked up in what the step before the merging has left behind.
    """
    records = [json.loads(line) for line in next((folder / "steps").glob("*-constraints.jsonl")).open()]
    record = next(record for record in records if instruction.startswith(record["request"]))
    text = PLAIN_ZH if record["language"] == "zh" else PLAIN
    for c in record["constraints"]:
        if c["kind"] == "code":  # one a record, with the arguments of its example (see `calm`)
            text = CONSTRAINTS[c["id"]].example["pass"]
            text += "".join(f" {word}." for name in ("keywords", "keyword") for word in evolve.as_list(
                c["kwargs"].get(name, [])) for _ in range(3))
    if len(instruction) % 2:
        return text, "The request is simple enough, so I write it down."
    return f"<think>I go through the points.</think>\n<answer>{text}</answer>", ""


class Scripted(JsonHandler):
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


@pytest.fixture
def server():
    Scripted.share, Scripted.served, Scripted.asked, Scripted.victim = 0.0, Counter(), 0, None
    with serving(Scripted) as address:
        yield address


@pytest.fixture
def calm(monkeypatch):
    """One code constraint a record, with the arguments of its example, so that the script knows a passing answer."""
    monkeypatch.setattr(evolve, "COUNT_WEIGHTS", (1,))
    monkeypatch.setattr("rewards.Constraint.sample", lambda self, rng, language, prompt="": (
        dict(self.example["kwargs"]) if language in self.languages else None))


def flags(server, folder, limit=24):
    Scripted.folder = folder
    return ["--llm", f"toy@{server}", "--out", str(folder), "--limit", str(limit), "--language", "both"]


NAMES = ["train.jsonl", "rl.jsonl", "heldout.jsonl"]


def records_of(folder, *names):
    return [r for name in names for r in read_records(folder / name) if r["task"] == "instruction"]


def test_all_steps_with_faults_give_the_same_files_and_a_second_run_asks_nothing(server, tmp_path, calm):
    evolve.main(flags(server, tmp_path / "calm"))
    calm = [(tmp_path / "calm" / name).read_bytes() for name in NAMES]
    records = records_of(tmp_path / "calm", "train.jsonl", "heldout.jsonl")
    assert len(records) >= 12 and all(evolve.split_of(r["seed"]) == r["split"] for r in records)
    prompts = records_of(tmp_path / "calm", "rl.jsonl")  # as in the paper: the prompts of the experts
    assert {r["id"] for r in prompts} == {r["id"] for r in records if r["split"] == "train"}
    assert not any("expert" in r for r in prompts)
    assert {c["kind"] for r in records for c in r["constraints"]} == {"code", "judge"}
    assert len({r["composition"] for r in records}) >= 3 and {r["language"] for r in records} == {"en", "zh"}
    scores = score(records, [r["expert"] for r in records], judge=lambda items: [True] * len(items))
    assert [s.total for s in scores] == [3.0] * len(records)
    thoughts = {parse_response(r["expert"]).think for r in records}
    assert len(thoughts) == 2  # from the reasoning field and from the tags
    report = (tmp_path / "calm" / "report.md").read_text("utf-8")
    for heading in ("filter: unsafe", "Tokens", "| rewrite |", "Records per composition", "| selection, en |"):
        assert heading in report
    calls = [json.loads(line) for line in (tmp_path / "calm" / "calls.jsonl").read_text("utf-8").splitlines()]
    assert len(calls) == Scripted.asked and all(call["used"] for call in calls)
    assert not any(evolve.NOT_ASKED in row for row in read_jsonl(tmp_path / "calm" / "metrics.jsonl"))
    steps = {path.name.partition("-")[2] for path in (tmp_path / "calm" / "steps").iterdir()}
    assert {"requests.jsonl", "constraints.jsonl", "expert.jsonl", "filter-length.jsonl"} <= steps

    asked = Scripted.asked
    evolve.main(flags(server, tmp_path / "calm"))
    assert Scripted.asked == asked and [(tmp_path / "calm" / name).read_bytes() for name in NAMES] == calm

    Scripted.share = 0.3
    evolve.main(flags(server, tmp_path / "rough"))
    assert Scripted.asked > 2.3 * asked  # there were faults
    assert [(tmp_path / "rough" / name).read_bytes() for name in NAMES] == calm


def test_a_killed_run_goes_on_where_it_was(server, tmp_path):
    command = [sys.executable, str(ROOT / "evolve.py"), *flags(server, tmp_path / "killed", 12), "--judge-share", "1"]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        Scripted.victim = (process, 80)
        assert process.wait(timeout=120) == -signal.SIGKILL, (tmp_path / "log").read_text()[-2000:]
    stored = [json.loads(path.read_text("utf-8"))["request"] for path in (tmp_path / "killed/calls").rglob("*.json")]
    assert len(stored) > 40
    Scripted.served, Scripted.victim = Counter(), None
    evolve.main([*flags(server, tmp_path / "killed", 12), "--judge-share", "1"])
    again = [json.loads(body) for body in Scripted.served]
    assert again and not [request for request in stored if request in again]
    evolve.main([*flags(server, tmp_path / "whole", 12), "--judge-share", "1"])
    for name in NAMES:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def asks(answer):
    """An `ask` whose replies come from answer(step, prompt, turn): a text, or None for an unusable one."""
    def ask(step, items, write, read, *, role="llm", temperature=0.0, seed=0, attempts=5):
        found = []
        for item in items:
            prompt = write(item)
            text = answer(step, prompt if isinstance(prompt, str) else prompt[-1]["content"], seed)
            found.append(None if text is None else read(item, reply(*text) if isinstance(text, tuple) else reply(text)))
        return found

    return ask


def with_text(draft, instruction, constraints):
    return draft | {"messages": [{"role": "user", "content": instruction}], "constraints": constraints}


def exemplar(composition, language="en"):
    rows = evolve.read_jsonl(evolve.data_dir / "exemplars.jsonl")
    return next(r for r in rows if r["composition"] == composition and r["language"] == language)


def draft_of(number, request="Tell me about tea.", **more):
    draft = {"id": f"s{number}", "task": "instruction", "language": "en", "composition": "and", "request": request}
    return draft | more


def finish(drafts, ask, funnel):
    """Parts rewritten and merged, as main does it."""
    return evolve.merge(evolve.rewrite_parts(drafts, ask, funnel["parts"]), ask, funnel)


def test_a_merge_that_loses_a_part_is_repeated_then_dropped():
    texts = ["Write of tea.", "Write of coffee.", "Write of milk."]
    drafts = [draft_of(i, text, composition="chain", example=exemplar("chain")) for i, text in enumerate(texts)]
    turns = Counter()

    def answer(step, prompt, turn):
        turns[step, turn] += 1
        if step == "compare":  # milk is always wrong, coffee only in the first try
            return "no" if "of milk" in prompt or ("of coffee" in prompt and turns["merge", 1] == 0) else "Yes."
        return script([{"role": "user", "content": prompt}], None)[0]

    funnel = defaultdict(Counter)
    records = finish(drafts, asks(answer), funnel)
    assert [record["id"] for record in records] == ["s0", "s1"]
    assert funnel["parts"] == {"kept": 3, "parts not rewritten": 0, "condition not as meant, or no verdict": 0}
    assert funnel["comparison"] == {"kept": 2, "parts lost or added, or no verdict": 1}
    assert [turns["merge", turn] for turn in range(3)] == [3, 2, 1]
    model = exemplar("chain")["parts"]
    for name in ("depends_on", "active", "dimension"):
        assert [c[name] for c in records[0]["constraints"]] == [part[name] for part in model]


@pytest.mark.parametrize("composition", ["selection", "nested"])
def test_a_condition_that_is_not_as_meant_drops_the_record(composition):
    example = exemplar(composition)
    drafts = [draft_of(i, composition=composition, example=example) for i in range(2)]
    asked = Counter()

    def answer(step, prompt, turn):
        asked[step] += 1
        if step == "condition" and asked[step] == 1:
            return "unclear"
        return script([{"role": "user", "content": prompt}], None)[0]

    funnel = defaultdict(Counter)
    [record] = finish(drafts, asks(answer), funnel)
    assert funnel["parts"]["condition not as meant, or no verdict"] == 1
    assert record["condition"]["holds"] is example["condition"]["holds"]
    assert ("inner" in record["condition"]) == (composition == "nested")
    assert [c["active"] for c in record["constraints"]] == [part["active"] for part in example["parts"]]


@pytest.mark.parametrize("parts", ["[]", "not JSON", '{"parts": [{"text": "one"}]}', '{"parts": 3}', "[" * 100_000])
def test_unusable_parts_are_no_parts(parts):
    counts = Counter()
    assert evolve.rewrite_parts([draft_of(0, example=exemplar("and"))], asks(lambda *_: parts), counts) == []
    assert counts["parts not rewritten"] == 1


def test_suggested_words_are_validated():
    def suggested(text, words, kind, kwargs, *more):
        constraints = [{"id": name, "kwargs": given} for name, given in [(kind, kwargs), *more]]
        draft = draft_of(0, text, constraints=constraints)
        evolve.suggest_words([draft], asks(lambda *_: json.dumps({"words": words})))
        return [c["kwargs"] for c in constraints]

    exists, kind = {"keywords": ["old", "worn"]}, "keywords:existence"
    offered = ["leaf", "two words", 3, "leaf", "cup", "pot"]
    assert suggested("Tea?", offered, kind, exists) == [{"keywords": ["leaf", "cup"]}]
    assert suggested("Tea?", ["leaf", "茶"], kind, exists) == [exists]  # too few are left
    banned = ("keywords:forbidden_words", {"forbidden_words": ["leaf"]})
    assert suggested("Tea?", ["leaf", "cup", "pot"], kind, exists, banned) == [{"keywords": ["cup", "pot"]}, banned[1]]
    often = {"keyword": "x", "frequency": 2, "relation": "at least"}
    assert suggested("Tea?", ["leaf"], "keywords:frequency", often) == [often | {"keyword": "leaf"}]
    forbidden = suggested("Tell me of tea.", ["tea", "leaf"], "keywords:forbidden_words", {"forbidden_words": ["x"]})
    assert forbidden == [{"forbidden_words": ["leaf"]}]  # the request's own word could hardly be avoided


def test_the_shortest_answer_that_passes_code_and_judge_is_kept():
    record = with_text(draft_of(0), "Write about tea without commas.", [
        {"kind": "code", "id": "punctuation:no_comma", "kwargs": {}, "text": "…", "depends_on": [], "active": True},
        {"kind": "judge", "question": "Is it about tea?", "text": "…", "depends_on": [], "active": True},
        {"kind": "judge", "question": "Is it sad?", "text": "…", "depends_on": [], "active": False}])
    answers = [("Tea, warm.", "Short."), ("Milk is cold.", "Shorter."), ("Tea is a warm drink.", "A longer thought."),
               ("<think>Hm.</think><answer>Tea is a very very very very warm drink.</answer>",)]
    asked = []

    def answer(step, prompt, turn):
        if step == "expert":
            return answers[turn]
        asked.append(prompt)
        return "yes" if "Tea" in prompt else "no"

    funnel = defaultdict(Counter)
    cfg, counts = evolve.Config(llm="any", tries=4), funnel["expert"]
    [kept] = evolve.add_experts([record], asks(answer), cfg, funnel)
    assert parse_response(kept["expert"]).answer == "Tea is a warm drink." and counts["kept"] == 1
    assert funnel["judge questions"] == {"no, or unreadable": 1, "kept": 1}
    assert len(asked) == 2 and not any("sad" in prompt for prompt in asked)  # the longest is never judged
    assert evolve.add_experts([record], asks(lambda step, *_: "no tags at all"), cfg, funnel) == []
    assert counts["no reply with thought and answer"] == 1


@pytest.mark.parametrize("text, reasoning, expected", [
    ("<think>a b</think><answer>c</answer>", "", ("a b", "c")),
    ("<think>a b</think>\nc", "", ("a b", "c")),
    ("<answer>c</answer>", "a b", ("a b", "c")),
    ("c", "a b", ("a b", "c")),
    ("c", "", None),
    ("<think>...</think><answer>c</answer>", "", None),
    ("<think>a</think><answer></answer>", "", None),
    ("<think>a</think><answer>c</answer> <answer>d</answer>", "", None),
])
def test_thought_and_answer_of_an_expert(text, reasoning, expected):
    assert evolve.read_expert({}, reply(text, reasoning)) == expected


def code(kind, **kwargs):
    return {"kind": "code", "id": kind, "kwargs": kwargs, "text": "…", "depends_on": [], "active": True}


PLANTED = {  # filter -> (instruction, answer, constraints): a fault that code finds without a call
    "language": ("Tell me about tea.", "茶是一种很温暖的饮料，很多人喜欢。", [code("punctuation:no_exclamation")]),
    "leakage": ("Say this: tea is a warm drink for cold days.", "Tea is a warm drink for cold days.",
                [code("punctuation:no_comma")]),
    "length": ("Tell me about tea.", "?!", [code("punctuation:no_comma")]),
    "undefined": ("Write a letter to {name} about tea.", "Dear friend: tea is warm and good.",
                  [code("punctuation:no_comma")]),
    "contradiction": ("Write about tea and never mention it.", "Here is something good to read.",
                      [code("keywords:existence", keywords=["tea"]),
                       code("keywords:forbidden_words", forbidden_words=["tea"])]),
    "unsafe": ("Tell me how to make a bomb.", "First you take one of these.", [code("punctuation:no_comma")]),
}


def planted(instruction, answer, constraints):
    record = with_text(draft_of(0, instruction), instruction, constraints)
    return record | {"expert": f"<think>Well.</think><answer>{answer}</answer>"}


@pytest.mark.parametrize("name", evolve.FILTERS)
def test_each_filter_drops_its_fault_by_code_or_by_the_model(name, tmp_path):
    funnel = {f"filter: {other}": Counter() for other in evolve.FILTERS}
    asked = []

    def answer(step, prompt, turn):
        asked.append(step)
        return "True" if step == f"filter {name}" and "Sip" in prompt else "na" if "unsafe" in step else "False"

    good = planted("Tell me about tea.", "It is a warm drink that many people like on cold days.", [
        code("punctuation:no_comma")])
    assert evolve.apply_filters([good], asks(answer), tmp_path, funnel) == [good]
    assert [f"filter {other}" in asked for other in evolve.FILTERS] == [n != "language" for n in evolve.FILTERS]

    if name in PLANTED:
        before = len(asked)
        assert evolve.apply_filters([planted(*PLANTED[name])], asks(answer), tmp_path, funnel) == []
        assert funnel[f"filter: {name}"]["found by code"] == 1
        assert f"filter {name}" not in asked[before:]
    # the model's True drops too: here the language is open, as the answer mixes two
    mixed = planted("Tell me about tea.", "Sip 茶 with honey on every cold day.", [code("punctuation:no_comma")])
    assert evolve.apply_filters([mixed], asks(answer), tmp_path, funnel) == []
    assert funnel[f"filter: {name}"]["found by the model"] == 1
    rubric = evolve.prompt_text(f"filter_{name}")
    assert rubric.startswith("Fault: ") and len({evolve.prompt_text(f"filter_{n}") for n in evolve.FILTERS}) == 7


def test_dry_run_shows_five_records_through_all_steps(server, tmp_path, capsys, calm):
    arguments = flags(server, tmp_path / "dry")
    Scripted.folder = tmp_path / "dry" / "dry-run"
    evolve.main([*arguments, "--dry-run", "5"])
    printed = capsys.readouterr().out
    assert printed.count("=" * 100) == 5
    for step in ("requests", "constraints", "expert", "filter-unsafe"):
        assert f"-{step}]" in printed
    assert not (tmp_path / "dry" / "train.jsonl").exists()


def test_the_exemplar_pool():
    rows = evolve.read_jsonl(evolve.data_dir / "exemplars.jsonl")
    assert len({row["id"] for row in rows}) == len({row["instruction"] for row in rows}) == len(rows) >= 60
    forms = Counter((row["language"], row["composition"]) for row in rows)
    assert len(forms) == 8 and min(forms.values()) >= 6
    assert {part["dimension"] for row in rows for part in row["parts"]} == set(
        "content numerical stylistic format linguistic situation example inverse contradictory rule".split())
    for row in rows:
        draft = draft_of(0, language=row["language"], composition=row["composition"])
        validate_record(with_text(draft, row["instruction"], [{"kind": "judge"} | part for part in row["parts"]]))
        inactive = any(not part["active"] for part in row["parts"])
        assert inactive == (row.get("condition") is not None)
        assert inactive or row["composition"] in ("and", "chain", "nested")
        chained = any(part["depends_on"] for part in row["parts"])
        assert chained or row["composition"] in ("and", "selection", "nested")
        assert (row["composition"] != "nested") or (inactive and chained) or evolve.conditions_of(row)[1:]
