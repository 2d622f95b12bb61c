"""Records, parsing, the rule-centric reward, math, judges, guards, and the official IFEval verdicts."""

import gzip
import importlib.util
import json
import operator
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

import rewards
from rewards import InputError, accuracy_reward, check, check_loose, math_reward, parse_response, read_records, score

# ---------------------------------------------------------------- conformance


def test_ifeval_gpt4_answers(shared):
    prompts = map(json.loads, (shared / "benchmarks/ifeval/input_data.jsonl").read_text("utf-8").splitlines())
    prompts = {row["key"]: row for row in prompts}
    counts = {"strict": 0, "loose": 0}
    with gzip.open(shared / "conformance/ifeval/verdicts_gpt4.jsonl.gz", "rt", encoding="utf-8") as file:
        for row in map(json.loads, file):
            prompt = prompts[row["key"]]
            args = list(zip(prompt["instruction_id_list"], prompt["kwargs"], strict=True))
            unstable = {entry["index"] for entry in row["unstable"]}
            for name, function in (("strict", check), ("loose", check_loose)):
                verdicts = [function(i, k, row["response"], prompt=prompt["prompt"], mode="compat") for i, k in args]
                same = [v == w or n in unstable for n, (v, w) in enumerate(zip(verdicts, row[name], strict=True))]
                assert all(same), row
                counts[name] += sum(verdicts)
    assert counts == {"strict": 698, "loose": 714}


def test_ifeval_unit_cases(shared):
    for line in (shared / "conformance/ifeval/unit_cases.jsonl").read_text("utf-8").splitlines():
        case = json.loads(line)
        if case["instruction_id"]:
            verdict = check(case["instruction_id"], case["kwargs"], case["response"], mode="compat")
            assert verdict == case["expected"], case


def test_ifeval_helper_cases(shared):
    for line in (shared / "conformance/ifeval/unit_cases_util.jsonl").read_text("utf-8").splitlines():
        case, text = json.loads(line), rewards.Text(json.loads(line)["text"])
        sentences = [" ".join(sentence.split()) for sentence in text.punkt_sentences]
        found = {"count_words": text.word_runs, "count_sentences": len(sentences), "split_into_sentences": sentences}
        assert found[case["function"]] == case["result"], case


# ---------------------------------------------------------------- parsing

GOOD = "<think>\nI plan.\n</think>\n<answer>\nTea.\n</answer>"


@pytest.mark.parametrize("text,family,think,answer,ok", [
    (GOOD, "cold", "I plan.", "Tea.", True),
    ("<think>a</think> b", "warm", "a", "b", True),
    ("<think>a</think> b", "cold", "a", "b", False),
    ("plain", "cold", "", "plain", False),
    ("  plain\n", "cold", "", "  plain\n", False),
    ("<think>never closed", "cold", "never closed", "", False),
    ("<think>a</think><answer>b", "cold", "a", "b", False),
    ("<think>a</think>b</answer>", "cold", "a", "b", False),
    ("<answer>b</answer><think>a</think>", "cold", "a", "", False),
    ("<think>a</think><answer>b</answer><answer>c</answer>", "cold", "a", "b", False),
    ("<think>a<answer>x</answer></think><answer>b</answer>", "cold", "ax", "b", False),
    ("a</think>b", "warm", "a", "b", False),
])
def test_parse_response(text, family, think, answer, ok):
    parsed = parse_response(text, family)
    assert (parsed.think, parsed.answer, parsed.format_ok) == (think, answer, ok)


# ---------------------------------------------------------------- the reward


def record(*constraints, **fields):
    rows = [{"depends_on": [], "active": True, **c} for c in constraints]
    return {"id": "r", "task": "instruction", "messages": [{"role": "user", "content": "Write about tea."}],
            "constraints": rows, **fields}


def code(kind, depends_on=(), active=True, **kwargs):
    return {"kind": "code", "id": kind, "kwargs": kwargs, "depends_on": list(depends_on), "active": active}


def asks(question, depends_on=(), active=True):
    return {"kind": "judge", "question": question, "depends_on": list(depends_on), "active": active}


NO_COMMA, TEA = code("punctuation:no_comma"), code("keywords:existence", keywords=["tea"])


def turn(answer, think="I plan."):
    return f"<think>\n{think}\n</think>\n<answer>\n{answer}\n</answer>"


@pytest.mark.parametrize("text,form,accuracy", [
    (turn("I like tea."), 1, 2), (turn("I like tea, hot."), 1, 0.5), (turn("Milk, please."), 1, -2),
    ("I like tea.", -1, -2), (turn(""), 1, -2), (turn("I like tea.", think=""), 1, -2),
    (turn("I like tea.", think="..."), 1, -2), (turn("I like tea.", think="Your thoughts here"), 1, -2),
    (turn("I like tea.") + "</answer>", -1, -2),
])
def test_rule_centric_reward(text, form, accuracy):
    result = score([record(NO_COMMA, TEA)], [text])[0]
    assert (result.format, result.accuracy, result.total) == (form, accuracy, form + accuracy)


def test_accuracy_reward_needs_verdicts():
    with pytest.raises(ValueError):
        accuracy_reward([])
    assert [accuracy_reward(v) for v in ([True], [False], [True, False, False])] == [2.0, -2.0, 1 / 3]


@pytest.mark.parametrize("text,accuracy", [
    ("<think>\n\n</think>\n\nI like tea.", 2), ("<think>\n\n</think>\n<answer>I like tea.</answer>", 2),
    ("I like tea.", 2), ("<think></think>\nTea, hot.", 0.5), ("<think>\n\n</think>\n", -2),
])
def test_direct_rollouts_are_scored_for_what_they_are_worth(text, accuracy):
    result = score([record(NO_COMMA, TEA)], [text], direct=True)[0]
    assert (result.format, result.accuracy, result.total) == (0, accuracy, accuracy)


def test_composition():
    chain = record(TEA, code("punctuation:no_comma", [0]), code("content:no_digits", [1]))
    assert score([chain], [turn("I like milk.")])[0].verdicts == [False, False, False]  # transitively
    assert score([chain], [turn("I like tea, hot.")])[0].verdicts == [True, False, False]
    selection = record(TEA, code("startend:quotation", active=False), code("content:no_digits"))
    assert score([selection], [turn("I like tea.")])[0] == rewards.Score(1, 2, 3, [True, True])
    through = record(TEA, code("startend:quotation", [0], active=False), code("content:no_digits", [1]))
    assert score([through], [turn("I like milk.")])[0].verdicts == [False, False]
    both = record(TEA, code("content:no_digits"), code("punctuation:no_comma", [0, 1]))
    assert score([both], [turn("I like milk.")])[0].verdicts == [False, True, False]  # the first dependency counts too
    assert score([both], [turn("3 cups of tea.")])[0].verdicts == [True, False, False]


def test_judge_constraints():
    seen = []

    def judge(items):
        seen.extend(items)
        return [question == "Is it kind?" for *_, question in items]

    rows = [record(TEA, asks("Is it kind?"), asks("Is it long?", [0])), record(asks("Is it kind?", active=False), TEA)]
    with pytest.raises(ValueError, match="judge"):
        score(rows, [turn("tea")] * 2)
    results = score(rows, [turn("tea"), turn("tea")], judge=judge)
    assert [r.verdicts for r in results] == [[True, True, False], [True]]
    assert seen == [("Write about tea.", "tea", "Is it kind?"), ("Write about tea.", "tea", "Is it long?")]
    seen.clear()
    assert score(rows[:1], ["no tags"], judge=judge)[0].verdicts == [False] * 3 and not seen
    assert score(rows[:1], [turn("milk")], judge=judge)[0].verdicts == [False, True, False]


def lenient(items):
    return [True] * len(items)


def test_a_blank_answer_meets_no_judged_constraint():
    for text, direct in ((turn(" "), False), ("<think>\nI plan.\n</think>\n", True)):
        result = score([record(asks("Is it short?"))], [text], judge=lenient, direct=direct)[0]
        assert (result.accuracy, result.verdicts) == (-2.0, [False])


def test_variants_and_guards():
    rows = [record(TEA, NO_COMMA, asks("Is it kind?"))]
    values = {v: score(rows, [turn("milk")], judge=lambda items: [True] * len(items), variant=v)[0].accuracy
              for v in rewards.VARIANTS}
    assert values == {"raif": 2 / 3, "fraction": 2 / 3, "all": 0.0, "rules_x_judge": 0.5}
    for verdicts, judged, value in (([True, False], [False, True], 0.0), ([True], [True], 1.0),
                                    ([True, True, False], [False, True, True], 0.0)):  # one no of the judge is enough
        seen = rewards.Turn(rows[0], "", parse_response(""), verdicts, judged, 1.0, 0.0)
        assert rewards.rules_x_judge(seen) == (1.0, value)
    stuffed = turn("tea " * 30)
    result = score([record(TEA)], [stuffed])[0]
    assert result.accuracy == 2.0 and result.guards == ["keyword_stuffing"]
    assert score([record(TEA)], [turn("Tea.")], truncated=[True])[0].guards == ["truncated"]
    prompt = "Please write a long and careful letter to my old friend about green tea and milk."
    assert rewards.guards(prompt, prompt) == ["prompt_copied"]
    assert rewards.guards(prompt, prompt, [code("combination:repeat_prompt", prompt_to_repeat=prompt)]) == []
    assert rewards.guards("Tea is warm. " * 20, "x") == ["repetition"] and rewards.guards("...", "x") == ["empty"]
    assert rewards.guards("我喜欢喝茶。" * 20, "x") == ["repetition"] and rewards.guards("我喜欢喝热茶。", "茶") == []
    assert rewards.guards("tea is warm and " * 20, "x") == ["repetition"]  # within one sentence
    words = [a + b for a in "bcdfgh" for b in ("at", "ed", "ig", "op", "un", "ay")]
    assert rewards.guards(" ".join(words), "x") == [] and rewards.guards("Tea. Tea. " + " ".join(words), "x") == []


MY_REWARD = '''
from dataclasses import dataclass

@dataclass
class Weights:
    words: float = 0.5

def score(turn):
    brevity = Weights().words if turn.answer_words <= 5 else 0.0
    return 0.0, turn.accuracy + brevity

def broken(turn):
    return turn.accuracy

LIMIT = 5
'''


def test_a_reward_of_ones_own(tmp_path):
    path = tmp_path / "my_reward.py"
    path.write_text(MY_REWARD, "utf-8")
    rows = [record(NO_COMMA, TEA), {**record(), "task": "math", "answer": "42"}]
    texts = [turn("I like tea."), turn(r"\boxed{42}")]
    assert [r.total for r in score(rows, texts, variant=f"{path}:score")] == [2.5, 2.5]
    assert [(r.format, r.accuracy) for r in score(rows, texts, variant="all")] == [(1.0, 1.0), (1.0, 1.0)]
    seen = []

    def spy(turn):
        seen.append(turn)
        return turn.format, 0.0

    assert score(rows[:1], texts[:1], variant=spy)[0].accuracy == 0.0
    assert (seen[0].text, seen[0].parsed.answer, seen[0].record["id"]) == (texts[0], "I like tea.", "r")
    assert (seen[0].verdicts, seen[0].judged, seen[0].thought_words, seen[0].answer_words) == (
        [True, True], [False, False], 2, 3)
    for name, message in (("raiff", "one of raif"), ("no.py:score", "not a Python file"), (f"{path}:sorce", "'sorce'"),
                          (f"{path}:LIMIT", "'LIMIT'"), (f"{path}", "FILE.py:FUNCTION"),
                          (f"{path}:broken", "two finite")):
        with pytest.raises(InputError, match=message):
            score(rows[:1], texts[:1], variant=name)
    assert rewards.load_reward("raif") is rewards.raif and rewards.load_reward(spy) is spy


def test_a_new_type_is_one_function_and_one_row(tmp_path):
    """A copy of the library with the function and the row that its own comment shows."""
    source = (ROOT / "rewards.py").read_text("utf-8")
    comment = source.partition("# 5. The constraint library")[2].partition("# An argument is")[0]
    lines = [line.removeprefix("#     ") for line in comment.splitlines() if line.startswith("#     ")]
    function, row = "\n".join(lines[:3]), " ".join(lines[3:])
    assert function.startswith("@checker") and json.loads(row)["id"] == "keywords:once"
    here = source.index("# ---------------------------------------------------------------- arguments")
    (tmp_path / "rewards.py").write_text(f"{source[:here]}{function}\n\n\n{source[here:]}", "utf-8")
    shutil.copytree(ROOT / "data", tmp_path / "data", ignore=shutil.ignore_patterns("*teacher*", "benchmarks"))
    with open(tmp_path / "data/constraints.jsonl", "a", encoding="utf-8") as file:
        file.write(row + "\n")
    spec = importlib.util.spec_from_file_location("rewards_with_once", tmp_path / "rewards.py")
    copy = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    once = copy.CONSTRAINTS["keywords:once"]
    kwargs = once.sample(random.Random(0), "en")
    assert copy.render("keywords:once", kwargs, "en", 0) == f'Use "{kwargs["keyword"]}" once.'
    assert not copy.compatible(["keywords:once", "keywords:frequency"])
    row = record(code("keywords:once", keyword="tea"))
    copy.validate_record(row)
    assert [r.accuracy for r in copy.score([row] * 2, [turn("I like tea."), turn("Tea is tea.")])] == [2.0, -2.0]
    assert once.check(**{"kwargs": once.example["kwargs"], "response": once.example["pass"]})


# ---------------------------------------------------------------- math


@pytest.mark.parametrize("text,gold,value", [
    (r"so \boxed{0.5}", "1/2", 2.0), (r"\boxed{\frac{1}{2}}", "0.5", 2.0), (r"\boxed{41} no, \boxed{42}", "42", 2.0),
    (r"\boxed{42} no, \boxed{41}", "42", -1.5), ("42", "42", -2.0), (r"\boxed{42", "42", -2.0),
    (r"\boxed{}", "42", -1.5), (r"\boxed{1 1/2}", "11/2", -1.5), (r"\boxed{ x + 1 }", "x+1", 2.0),
    (r"\boxed{1,000}", "1000", 2.0), (r"\boxed{\{1,2\}}", r"\{2,1\}", 2.0), (r"\boxed{x^2+2x+1}", "(x+1)^2", 2.0),
    (r"<think>\boxed{42}</think> no tags needed", "42", 2.0), (r"\boxed{\text{Monday}}", "Monday", 2.0),
    (r"\boxed{41=42}", "42", -1.5), (r"\boxed{41 \to 42}", "42", -1.5), (r"\boxed{x=42}", "42", 2.0),
    (r"\boxed{41 \Rightarrow 42}", "42", -1.5), (r"\boxed{x=1}", "x=1", 2.0), (r"\boxed{1\,000}", "1000", 2.0),
    (r"\boxed 5", "5", -2.0), (r"\boxed{\theta=30}", "30", 2.0),
])
def test_math_reward(text, gold, value):
    assert math_reward(text, gold) == value


def test_math_has_a_deadline_and_recovers(monkeypatch):
    assert rewards.same_value("2", "1+1")
    start = time.monotonic()
    assert not rewards.same_value("1", "10^{10^{10^{10}}}", seconds=0.5)
    assert time.monotonic() - start < 10
    assert rewards.same_value("2", "1+1")  # a new process
    monkeypatch.setattr(rewards, "verify_math", operator.truediv)
    assert not rewards.same_value("2", "1+1")  # it raises: wrong, and the worker lives
    monkeypatch.setattr(rewards, "verify_math", os.execv)
    assert not rewards.same_value("/bin/false", ["false"])  # the worker becomes another program, which ends
    monkeypatch.undo()
    assert rewards.same_value("2", "1+1")


def test_the_math_worker_does_not_outlive_a_killed_trainer():
    program = ("import os, rewards; assert rewards.same_value('2', '1+1'); "  # no main guard needed
               "print(*rewards.math_pool()._processes, flush=True); os.kill(os.getpid(), 9)")
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    worker = int(result.stdout)
    deadline = time.monotonic() + 20
    while Path(f"/proc/{worker}/cmdline").exists() and "loky" in Path(f"/proc/{worker}/cmdline").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_very_long_box_is_wrong_without_being_computed():
    assert math_reward(r"\boxed{" + "1+" * 700 + "1}", "701") == -1.5
    assert math_reward(r"\boxed{" + "9" * 1001 + "}", "9" * 1001) == -1.5  # not even the same text


def test_last_boxed():
    assert rewards.last_boxed(r"\boxed{a{b}\}c} \boxed{d") == r"a{b}\}c"
    assert rewards.last_boxed(r"\boxed{\boxed{5}}") == "5" and rewards.last_boxed("}" * 9) is None


def test_math_records_score_independent_of_format():
    row = {"id": "m", "task": "math", "messages": [{"role": "user", "content": "6 x 7?"}], "answer": "42"}
    results = score([row] * 3, [turn(r"\boxed{42}"), r"\boxed{42}", turn("42")])
    assert [(r.format, r.accuracy, r.verdicts) for r in results] == [(1, 2, [True]), (-1, 2, [True]), (1, -2, [False])]


# ---------------------------------------------------------------- records

VALID = {"id": "a", "task": "instruction", "language": "en", "messages": [{"role": "user", "content": "Tea?"}],
         "constraints": [{"kind": "code", "id": "punctuation:no_comma", "kwargs": {}}], "composition": "and", "note": 1}


def test_read_records_fills_and_keeps(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(VALID) + "\n", "utf-8")
    (row,) = read_records(path)
    assert row["note"] == 1 and row["constraints"][0]["depends_on"] == [] and row["constraints"][0]["active"] is True


@pytest.mark.parametrize("change,field", [
    ({"id": ""}, "id"), ({"task": "chat"}, "task"), ({"messages": []}, "messages"), ({"language": "fr"}, "language"),
    ({"messages": [{"role": "user", "content": " "}]}, "messages[0]"), ({"composition": "or"}, "composition"),
    ({"constraints": []}, "constraints"), ({"expert": 3}, "expert"), ({"task": "math"}, "answer"),
    ({"constraints": [{"kind": "code", "id": "no:such", "kwargs": {}}]}, "constraints[0].id"),
    ({"constraints": [{"kind": "code", "id": "keywords:existence", "kwargs": {}}]}, "constraints[0].kwargs"),
    ({"constraints": [{"kind": "judge", "question": " "}]}, "constraints[0].question"),
    ({"constraints": [VALID["constraints"][0] | {"depends_on": [0]}]}, "constraints[0].depends_on"),
    ({"constraints": [VALID["constraints"][0] | {"active": False}]}, "constraints"),
    ({"constraints": [VALID["constraints"][0] | {"active": 1}]}, "constraints[0].active"),
])
def test_bad_records_name_line_and_field(tmp_path, change, field):
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(VALID) + "\n" + json.dumps(VALID | {"id": "b"} | change) + "\n", "utf-8")
    with pytest.raises(InputError) as error:
        read_records(path)
    message = str(error.value)
    assert message.startswith(f"{path}:2: field '{field}': ") and "; " in message and "\n" not in message


@pytest.mark.parametrize("content,expected", [
    ("", "empty"), ("{", ":1: "), (json.dumps(VALID) + "\n\n" + json.dumps(VALID), ":2: "), ("[1]", "object"),
    (json.dumps(VALID) + "\n" + json.dumps(VALID), "already used in line 1"), ("[" * 100_000, ":1: "),
])
def test_bad_files(tmp_path, content, expected):
    path = tmp_path / "r.jsonl"
    path.write_text(content, "utf-8")
    with pytest.raises(InputError, match=expected):
        read_records(path)
    with pytest.raises(InputError):
        read_records(tmp_path / "missing.jsonl")


@pytest.mark.parametrize("kind, kwargs, answer, slips", [
    ("punctuation:no_comma", {}, "Tea, milk, sugar.", 2), ("punctuation:no_comma", {}, "Tea.", 0),
    ("change_case:english_lowercase", {}, "i like Tea and MILK in the morning.", 2),
    ("change_case:english_capital", {}, "I LIKE tea AND MILK IN THE morning.", 2),
    ("keywords:existence", {"keywords": ["tea", "milk", "cup"]}, "A cup of coffee.", 2),
    ("keywords:forbidden_words", {"forbidden_words": ["tea", "cup"]}, "Tea in a cup of tea.", 3),
    ("detectable_format:title", {}, "No title here.", 1), ("detectable_format:title", {}, "<<Tea>> Warm.", 0),
    ("change_case:english_lowercase", {}, "", 1),  # a blank answer meets nothing
])
def test_slips_count_single_faults(kind, kwargs, answer, slips):
    constraint = {"kind": "code", "id": kind, "kwargs": kwargs, "text": "…", "depends_on": [], "active": True}
    assert rewards.count_slips({"constraints": [constraint]}, answer) == slips
    assert rewards.count_slips({"constraints": [constraint, constraint | {"active": False}]}, answer) == slips
