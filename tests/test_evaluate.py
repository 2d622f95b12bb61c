"""evaluate.py: scoring of one answer, statistics, rows that resume, layout of the report. No real model."""

import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import evaluate
import rewards
from evaluate import Config, Sample, answer_text, bootstrap, limits, main, repetition, spread
from model import Completion, Prompt, device, read_jsonl
from rewards import InputError


def record(key, constraints, **extra):
    filled = [{"kind": "code", "text": "…", "depends_on": [], "active": True, **c} for c in constraints]
    messages = [{"role": "user", "content": f"Write a line. ({key})"}]
    return {"id": key, "source": "evolve", "task": "instruction", "language": "en", "messages": messages,
            "constraints": filled, "composition": "and", **extra}


def item_of(record):
    return evaluate.make_item(record["id"], record["messages"], "en", record)


def verdict_of(record, turn, replies=()):
    """What evaluate.py makes of one assistant turn to a record."""
    benchmark, output = evaluate.RecordFile("records.jsonl"), {"text": turn, "answer": answer_text(turn)}
    item = item_of(record)
    verdict = benchmark.verdict(item, benchmark.answer_of(item, output), dict(replies), "official")
    return {name: verdict[name] for name in ("kinds", "strict", "loose")}


TEA = {"id": "keywords:existence", "kwargs": {"keywords": ["tea"]}}
NO_COMMA = {"id": "punctuation:no_comma", "kwargs": {}}
LOWER = {"id": "change_case:english_lowercase", "kwargs": {}}


# ------------------------------------------------------------------------------------------------ one answer


@pytest.mark.parametrize("text, answer", [
    ("<think>\nplan\n</think>\n<answer>\nhot tea\n</answer>", "hot tea"),
    ("<think>plan</think> hot tea", "hot tea"),  # no answer block: the text left after the thought
    ("<think>plan</think><answer>hot tea", "hot tea"),  # cut at the token limit
    ("<think>\nhot tea", "hot tea"),  # the thought never ends: the whole text, without tags
    ("<think>\nlet me see <answer>hot tea</answer>", "hot tea"),
    ("hot tea", "hot tea"),
    ("<think>\n\n</think>\n\nhot tea</answer>", "hot tea"),
    ("<think>plan</think>", ""),
])
def test_scored_text_of_a_turn(text, answer):
    assert answer_text(text) == answer


def test_warm_family_answer_is_everything_after_the_thought():
    assert answer_text("<think>plan</think>\nhot tea", "warm") == "hot tea"


def test_verdicts_strict_loose_dependent_and_inactive():
    item = record("a", [TEA, {**NO_COMMA, "depends_on": [0]}, {**LOWER, "active": False}])
    assert verdict_of(item, "Hot tea.") == {
        "kinds": ["keywords:existence", "punctuation:no_comma"], "strict": [True, True], "loose": [True, True]}
    assert verdict_of(item, "Coffee.")["strict"] == [False, False]  # no comma, but what it depends on is false
    lower = record("b", [LOWER])
    first_line = verdict_of(lower, "Sure, HERE it is:\nhot tea")
    assert first_line["strict"] == [False] and first_line["loose"] == [True]  # loose: without the first line


def test_strict_verdicts_are_those_of_the_reward():
    constraints = [TEA, {**LOWER, "active": False, "depends_on": [0]}, {**NO_COMMA, "depends_on": [1]}]
    item = record("a", constraints)
    for answer in ("Hot tea", "Coffee", "Tea, please", "Coffee, black", ""):
        turn = f"<think>\nplan it\n</think>\n<answer>{answer}</answer>"
        assert verdict_of(item, turn)["strict"] == rewards.score([item], [turn], direct=True)[0].verdicts


def test_math_is_met_when_the_boxed_result_is_right():
    item = {"id": "m", "source": "own", "task": "math", "language": "en", "answer": "42",
            "messages": [{"role": "user", "content": "6 x 7?"}]}
    assert verdict_of(item, r"It is \boxed{42}.") == {"kinds": ["math"], "strict": [True], "loose": [True]}
    assert verdict_of(item, "It is 42.")["strict"] == [False]


def test_repetition_counts_repeated_4_grams():
    assert repetition([1, 2, 3]) == 0
    assert repetition([1, 2, 3, 4, 5]) == 0
    assert repetition([7] * 7) == pytest.approx(3 / 4)


# ------------------------------------------------------------------------------------------------ statistics


def intervals(values_NK, weights_NK=None, **settings):
    """(estimates, lows, highs) of columns: the sum of their values over the sum of their weights."""
    values_NK = np.array(values_NK, dtype=float)
    weights_NK = np.ones_like(values_NK) if weights_NK is None else np.array(weights_NK, dtype=float)

    def measure(weights_RN):
        sample = Sample(range(len(values_NK)), range(len(values_NK)), weights_RN)
        return {k: sample.ratio(values_NK[:, k], weights_NK[:, k]) for k in range(values_NK.shape[1])}

    metrics, resampled = bootstrap(measure, range(len(values_NK)), **settings)
    bounds = [limits(values) for values in resampled.values()]
    return list(metrics.values()), [low for low, _ in bounds], [high for _, high in bounds]


def test_bootstrap_agrees_with_the_normal_interval():
    values = np.repeat([1.0, 0.0], [120, 280])[:, None]
    share, low, high = intervals(values)
    half = 1.96 * math.sqrt(0.3 * 0.7 / 400)
    assert share[0] == pytest.approx(0.3)
    assert low[0] == pytest.approx(0.3 - half, abs=0.004) and high[0] == pytest.approx(0.3 + half, abs=0.004)


def test_bootstrap_of_a_ratio_and_of_constants():
    share, low, high = intervals([[2, 1], [1, 1]], [[2, 1], [2, 1]])
    assert share == [0.75, 1] and (low[1], high[1]) == (1, 1)
    assert low[0] == pytest.approx(0.5) and high[0] == pytest.approx(1)


def test_paired_difference_is_narrower_than_the_rows():
    easy = np.arange(200) % 2 == 0  # both rows meet the easy half, the second also a few hard prompts
    a, b = easy.astype(float), (easy | (np.arange(200) % 20 == 1)).astype(float)
    share, low, high = intervals(np.stack([a, b, b - a], axis=1))
    assert share[2] == pytest.approx(0.05) and low[2] > 0 and high[2] - low[2] < 0.5 * (high[0] - low[0])


def test_bootstrap_follows_its_seed():
    values = np.arange(50.0)[:, None]
    first, same, other = (intervals(values, resamples=200, seed=seed) for seed in (3, 3, 4))
    assert first == same and first[1:] != other[1:]


def test_a_resample_without_any_item_of_a_kind_has_no_value():
    assert limits(np.array([np.nan, 1.0, 1.0])) == (1, 1) and limits(np.array([np.nan])) == (None, None)
    sample = Sample([0, 1], [0, 1], np.array([[0.0, 2.0]]))
    assert np.isnan(sample.pick([0]).mean([1.0])) and np.isnan(sample.pick([]).mean([])) and sample.mean([1, None]) != 1


def test_spread_covers_the_file():
    assert spread(list(range(300)), 3) == [0, 100, 200] and spread([1, 2], 10) == [1, 2]


def test_perplexity_is_that_of_the_tiny_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                                         num_attention_heads=2, num_key_value_heads=2)).eval().to(device())
    records, answers = [record("a", [TEA]), record("b", [TEA]), record("c", [TEA])], ["green tea", "", "some hot tea"]
    items = [item_of(item) for item in records]
    measured = evaluate.answer_perplexity(model, FakeTokenizer(), items, answers)
    nll, count = 0.0, 0
    for item, answer in zip(records, answers, strict=True):
        prompt, response = list(item["messages"][-1]["content"].encode()), list(answer.encode())
        logits = model(torch.tensor([prompt + response], device=device())).logits[0].log_softmax(-1)
        nll -= sum(logits[len(prompt) + t - 1, token].item() for t, token in enumerate(response))
        count += len(response)
    assert measured == pytest.approx(math.exp(nll / count), rel=1e-4)
    assert evaluate.answer_perplexity(model, FakeTokenizer(), items[:1], [""]) is None


# ---------------------------------------------------------------------------------------- whole runs, fake model


class FakeTokenizer:
    """One token per byte."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": list(text.encode())}

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        return messages[-1]["content"]


class FakeEngine:
    """Answers from the prompt: the good model always mentions tea, the base model for every second record."""

    def __init__(self, name):
        self.name, self.asked, self.fail_after = name, [], None

    def generate(self, prompts, *, n, max_tokens, temperature, seeds, stop=(), progress=None):
        assert n == 1 and temperature == 0 and len(seeds) == len(prompts)
        if self.fail_after is not None and len(self.asked) >= self.fail_after:
            raise RuntimeError("killed")
        self.asked += [bytes(ids).decode() for ids in prompts]
        return [[self.answer(text)] for text in self.asked[-len(prompts) :]]

    def wake(self):
        pass

    def sync(self, model):
        assert model.name == self.name

    def answer(self, prompt):
        number = int(re.search(r"\(r(\d+)\)", prompt)[1])
        good = "good" in self.name or number % 2
        text = "hot tea" if good else "Coffee, black"
        if prompt.startswith("cot") and not prompt.endswith("<answer>\n"):
            text = f"Tea it is.\n</think>\n<answer>{text}</answer>" if number % 5 else text
        return Completion(list(text.encode()), text, "stop" if number else "length", None)


@pytest.fixture
def fakes(monkeypatch, tmp_path):
    engines = {}

    def fake_load(name, *, dtype=None, device=None):
        engines.setdefault(name, FakeEngine(name))
        return SimpleNamespace(name=name), FakeTokenizer()

    def fake_prompt(tokenizer, messages, mode, family="cold", language="en"):
        prefill = {"cot": "<think>\n", "direct": "<think>\n\n</think>\n\n"}.get(mode, "")
        return Prompt(list(f"{mode} {messages[-1]['content']}".encode()), prefill)

    monkeypatch.setattr(evaluate, "load_model", fake_load)
    monkeypatch.setattr(evaluate, "make_engine", lambda backend, model, *args, **kwargs: engines[model.name])
    monkeypatch.setattr(evaluate, "answer_perplexity", lambda *args: 12.5)
    monkeypatch.setattr(evaluate, "render_prompt", fake_prompt)
    monkeypatch.chdir(tmp_path)
    records = [record(f"r{k}", [TEA, NO_COMMA] if k % 3 else [TEA], ood=k >= 20) for k in range(30)]
    write(tmp_path / "held.jsonl", records)
    return engines


def write(path, records):
    path.write_text("".join(json.dumps(item) + "\n" for item in records), encoding="utf-8")


FLAGS = ["--benchmarks", "held.jsonl", "--resamples", "500", "--chunk", "8"]


def model_folder(path):
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_text("weights")


def test_six_rows_report_and_added_row(fakes, tmp_path):
    model_folder(tmp_path / "runs/sft/model")
    model_folder(tmp_path / "runs/good/model")
    write(tmp_path / "runs/sft/metrics.jsonl", [{"step": k, "loss/train": 3 / (k + 1)} for k in range(5)])
    main([*FLAGS, "--ours-model", "runs/good/model"])
    report = json.loads((tmp_path / "runs/evaluate/report.json").read_text())
    assert list(report["rows"]) == ["I/O", "CoT", "CoT closed", "SFT", "Ours direct", "Ours"]
    assert report["rows"]["Ours direct"]["thought_tokens"] == 0
    closed = read_jsonl(tmp_path / "runs/evaluate/rows/CoT closed.jsonl")
    assert all(item["thought"] == "Tea it is." for item in closed if int(item["id"][1:]) % 5)
    begun = [prompt for prompt in fakes["smollm2-135m"].asked if prompt.endswith("</think>\n<answer>\n")]
    assert len(begun) == 30 and all(prompt.startswith("cot Write a line.") for prompt in begun)
    ours, io = report["rows"]["Ours"], report["rows"]["I/O"]
    assert ours["all"]["all_strict"] == {"share": 1, "low": 1, "high": 1, "n": 30}
    assert io["all"]["all_strict"]["share"] == 0.5 and io["ood"]["all_strict"]["n"] == 10
    assert io["format_failures"] is None and ours["format_failures"] == pytest.approx(6 / 30)
    assert io["truncated"] == pytest.approx(1 / 30) and io["perplexity"] == 12.5
    assert io["thought_tokens"] == 0 and ours["thought_tokens"] == 10 * 24 / 30 and ours["answer_tokens"] == 7
    assert list(report["differences"])[:2] == ["Ours − Ours direct", "Ours − SFT"]
    assert report["differences"]["Ours − SFT"]["all"]["share"] == 0.5
    assert report["kinds"]["keywords:existence"] == {
        "n": 30, "I/O": 0.5, "CoT": 0.5, "CoT closed": 0.5, "SFT": 0.5, "Ours direct": 1, "Ours": 1}
    assert report["difficulty"] == {"io_share": 0.5, "kinds_above_90": []}
    text = (tmp_path / "runs/evaluate/report.md").read_text()
    assert "Ours − SFT" in text and "clear of 0" in text
    assert "CoT − I/O" in text and "the interval includes 0" in text
    assert text.count("> Write a line.") == 10 and "(rows.png)" in text and "(training.png)" in text
    assert (tmp_path / "runs/evaluate/rows.png").exists() and (tmp_path / "runs/evaluate/training.png").exists()

    main([*FLAGS, "--method", "sdc"])  # a later call adds a row; the others are read back
    report = json.loads((tmp_path / "runs/evaluate/report.json").read_text())
    assert list(report["rows"]) == ["I/O", "CoT", "CoT closed", "SDC", "SFT", "Ours direct", "Ours"]
    second_call = fakes["smollm2-135m"].asked[-1]
    assert second_call.startswith("io Write a line.") and "Tea it is." in second_call and "<think>" not in second_call


def test_another_prompts_thought_and_the_experts(fakes, tmp_path):
    model_folder(tmp_path / "runs/good/model")
    records = [record(f"r{k}", [TEA], expert=f"<think>plan {k}</think><answer>hot tea</answer>") for k in range(6)]
    write(tmp_path / "held.jsonl", records)
    one = [*FLAGS, "--model", "runs/good/model"]
    with pytest.raises(InputError, match="row 'Ours' in .* has no thought for 'r0'"):
        main([*one, "--method", "other"])
    main([*one, "--label", "Ours"])
    rows = tmp_path / "runs/evaluate/rows"
    thoughts = [f"{item['thought']} {k}".strip() for k, item in enumerate(read_jsonl(rows / "Ours.jsonl"))]
    write(rows / "Ours.jsonl", [item | {"thought": thought} for item, thought in zip(
        read_jsonl(rows / "Ours.jsonl"), thoughts, strict=True)])
    main([*one, "--method", "other"])
    assert [item["thought"] for item in read_jsonl(rows / "Another-s thought.jsonl")] == thoughts[3:] + thoughts[:3]
    main([*one, "--method", "expert"])
    assert [item["thought"] for item in read_jsonl(rows / "Expert-s thought.jsonl")] == [f"plan {k}" for k in range(6)]
    assert fakes["runs/good/model"].asked[-1].endswith("plan 5\n</think>\n<answer>\n")
    write(tmp_path / "held.jsonl", [records[0], {k: v for k, v in records[1].items() if k != "expert"}])
    with pytest.raises(InputError, match="record 'r1' has no expert"):
        main([*one, "--method", "expert", "--out", "runs/new"])


def test_killed_row_resumes_and_a_finished_one_asks_nothing(fakes, tmp_path):
    row = [*FLAGS, "--method", "cot"]
    fakes["smollm2-135m"] = engine = FakeEngine("smollm2-135m")
    engine.fail_after = 16
    with pytest.raises(RuntimeError, match="killed"):
        main(row)
    items = tmp_path / "runs/evaluate/rows/CoT.jsonl"
    assert len(items.read_text().splitlines()) == 16
    with items.open("a") as file:
        file.write('{"id": "r16", "te')  # the line that was being written
    engine.fail_after = None
    main(row)
    assert len(engine.asked) == 30 and len(set(engine.asked)) == 30
    assert [json.loads(line)["id"] for line in items.read_text().splitlines()] == [f"r{k}" for k in range(30)]
    main(row)
    assert len(engine.asked) == 30
    main([*row, "--max-new-tokens", "99"])  # other settings: the row is made anew, the old answers are kept aside
    assert len(engine.asked) == 60 and items.with_suffix(".jsonl.old").exists()


def test_retrained_model_is_answered_anew(fakes, tmp_path):
    model_folder(tmp_path / "m")
    row = [*FLAGS, "--model", "./m", "--label", "Mine"]
    main(row)
    (tmp_path / "m/model.safetensors").write_text("other weights")
    main(row)
    assert len(fakes["./m"].asked) == 60


def test_a_quick_look_takes_nothing_from_a_long_row(fakes, tmp_path, capsys):
    main([*FLAGS, "--method", "io"])
    main([*FLAGS, "--method", "cot", "--limit", "6"])
    report = json.loads((tmp_path / "runs/evaluate/report.json").read_text())
    assert list(report["rows"]) == ["I/O", "CoT"] and report["n"] == 6
    asked = sum(len(engine.asked) for engine in fakes.values())
    main([*FLAGS, "--method", "io"])  # all of its answers are still there; the other row lacks some
    assert sum(len(engine.asked) for engine in fakes.values()) == asked
    assert "row CoT is left out of the report: 24 of 30 prompts unanswered" in capsys.readouterr().out
    main([*FLAGS, "--method", "io", "--max-new-tokens", "9", "--label", "Short"])
    assert "row I/O is left out of the report: other max_new_tokens" in capsys.readouterr().out


def test_a_label_belongs_to_one_model_and_method(fakes, tmp_path):
    main([*FLAGS, "--method", "io"])
    with pytest.raises(InputError, match="row 'I/O' holds model smollm2-135m .* --label"):
        main([*FLAGS, "--method", "io", "--model", "other"])
    (tmp_path / "runs/evaluate/rows/I-O.jsonl").write_text("")  # a call that failed before its first answer
    main([*FLAGS, "--method", "io", "--model", "other"])


def test_bad_input_is_named_with_its_remedy(fakes, tmp_path):
    with pytest.raises(InputError, match=r"runs/sft/model: .*python sft.py first"):
        main(FLAGS)
    with pytest.raises(SystemExit):
        main([*FLAGS, "--method", "nope"])
    judge = {"kind": "judge", "question": "Formal?", "text": "Be formal.", "depends_on": [], "active": True}
    write(tmp_path / "judge.jsonl", [record("j", [TEA]) | {"constraints": [judge]}])
    with pytest.raises(InputError, match="judge.jsonl:1: field 'constraints': judged"):
        main(["--benchmarks", "judge.jsonl", "--method", "io"])
    write(tmp_path / "twice.jsonl", [record("j", [TEA])] * 2)
    with pytest.raises(InputError, match="field 'id'"):
        main(["--benchmarks", "twice.jsonl", "--method", "io"])


def test_judged_constraints_of_a_record_file_are_asked(fakes, tmp_path, monkeypatch):
    questions = [{"kind": "judge", "question": q, "text": q, "depends_on": [], "active": True}
                 for q in ("Formal?", "Kind?")]
    item = record("r1", [TEA])
    write(tmp_path / "judge.jsonl", [item | {"constraints": [questions[0], *item["constraints"], questions[1]]}])
    asked = []

    def judge(items):
        asked.extend(items)
        return [question == "Kind?" for _, _, question in items]

    monkeypatch.setattr(evaluate, "make_judge", lambda *args, **more: judge)
    main(["--benchmarks", "judge.jsonl", "--method", "io", "--judge", "some", "--perplexity-items", "0"])
    report = json.loads((tmp_path / "runs/evaluate/report.json").read_text())
    assert report["kinds"] == {"judge": {"n": 2, "I/O": 0.5}, "keywords:existence": {"n": 1, "I/O": 1}}
    assert [question for _, _, question in asked] == ["Formal?", "Kind?"] and asked[0][1] == "hot tea"
    rows = read_jsonl(tmp_path / "runs/evaluate/judgements/I-O - some.jsonl")
    assert [(row["question"], row["reply"]) for row in rows] == [(0, "no"), (1, "yes")]


def test_blank_and_refused_answers_meet_no_judged_constraint(fakes, tmp_path, monkeypatch):
    question = {"kind": "judge", "question": "Kind?", "text": "Be kind.", "depends_on": [], "active": True}
    write(tmp_path / "judge.jsonl", [record(f"r{k}", [TEA]) | {"constraints": [question]} for k in range(4)])
    turns = [("<think>plan</think><answer></answer>", "stop"), (" ", "stop"), ("hot tea", "stop"),
             ("too long", "refused")]
    monkeypatch.setattr(FakeEngine, "answer", lambda self, prompt: Completion(
        [1], *turns[int(re.search(r"\(r(\d)\)", prompt)[1])], None))
    asked = []

    def judge(items):
        asked.extend(items)
        return [True] * len(items)

    monkeypatch.setattr(evaluate, "make_judge", lambda *args, **more: judge)
    main(["--benchmarks", "judge.jsonl", "--method", "io", "--judge", "some", "--perplexity-items", "0"])
    report = json.loads((tmp_path / "runs/evaluate/report.json").read_text())
    assert report["rows"]["I/O"]["all"]["all_strict"]["share"] == 0.25
    assert report["rows"]["I/O"]["n"] == {"asked": 4, "answered": 1, "judged": 1, "unparsable": 0}
    assert [answer for _, answer, _ in asked] == ["hot tea"]


def test_the_report_says_what_the_judge_could_not_read_or_had_to_cut(fakes, tmp_path, monkeypatch):
    question = {"kind": "judge", "question": "Kind?", "text": "Be kind.", "depends_on": [], "active": True}
    write(tmp_path / "judge.jsonl", [record(f"r{k}", [TEA]) | {"constraints": [question]} for k in range(3)])

    class Judge:
        asked = unreadable = truncated = 0

        def __call__(self, items):
            self.asked, self.unreadable, self.truncated = self.asked + len(items), self.unreadable + 1, 2
            return [False] * len(items)

    monkeypatch.setattr(evaluate, "make_judge", lambda *args, **more: Judge())
    run = ["--benchmarks", "judge.jsonl", "--method", "io", "--judge", "some", "--perplexity-items", "0"]
    for _ in range(2):  # the second call asks nothing, and still says what the first one counted
        main(run)
        row = json.loads((tmp_path / "runs/evaluate/report.json").read_text())["rows"]["I/O"]
        assert row["judge_counts"] == {"asked": 3, "unreadable": 1, "truncated": 2} and row["n"]["judged"] == 3
        text = (tmp_path / "runs/evaluate/report.md").read_text()
        assert "Judge of row I/O: 3 questions, 1 unreadable replies (counted as no), 2 answers cut to fit" in text


def summary(records, verdicts):
    """report.json of one row I/O with these verdicts."""
    benchmark, items = evaluate.RecordFile("records.jsonl"), [item_of(item) for item in records]
    output = {"format_ok": None, "truncated": False, "thought_tokens": 0, "answer_tokens": 3, "written_tokens": 3,
              "repetition": 0.0}
    settings = {"seconds": 1.0, "perplexity": None}

    def measure(weights_RN):
        return benchmark.metrics(Sample(items, verdicts, weights_RN), "official")

    metrics, resampled = bootstrap(measure, [item.group for item in items], resamples=100)
    row = evaluate.Scored(settings, [output] * len(items), verdicts, metrics | {"n": {}}, resampled)
    return evaluate.record_report(evaluate.Task(benchmark, items, "", Config()), {"I/O": row})


def test_summary_without_ood_has_an_empty_split():
    report = summary([record("a", [TEA])], [{"strict": [True, False], "loose": [True, True], "kinds": ["x", "y"]}])
    row = report["rows"]["I/O"]
    assert row["ood"] is None and row["all"]["all_strict"]["share"] == 0 and row["all"]["each_strict"]["share"] == 0.5
    assert row["all"]["all_loose"]["share"] == 1 and report["differences"] == {}
    assert report["difficulty"]["kinds_above_90"] == ["x"]


def test_lift_is_the_share_met_minus_chance_in_each_split():
    chances = {"a": 0.1, "b": 0.3, "c": 0.05}
    records = [record(key, [TEA], chance=chance, ood=key == "c") for key, chance in chances.items()]
    verdicts = [{"strict": [met], "loose": [met], "kinds": ["x"]} for met in (True, False, True)]
    report = summary(records, verdicts)
    lifts = {split: report["rows"]["I/O"][split]["lift"]["share"] for split in evaluate.SPLITS}
    assert lifts == pytest.approx({"all": 2 / 3 - 0.15, "in-distribution": 0.5 - 0.2, "ood": 1 - 0.05})
    assert report["chance"] == pytest.approx({"all": 0.15, "in-distribution": 0.2, "ood": 0.05})
    del records[1]["chance"]  # a record without: there is no lift, rather than a wrong one
    report = summary(records, verdicts)
    assert "lift" not in report["rows"]["I/O"]["all"] and report["chance"]["all"] is None


def test_every_setting_has_a_comment():
    import inspect

    lines = [line for line in inspect.getsource(Config).splitlines() if re.match(r"    \w+: ", line)]
    assert lines and all("  # " in line for line in lines)


def test_judge_agreement(tmp_path, capsys, monkeypatch):
    rows = [{"instruction": "Write.", "answer": a, "question": "Is it tea?", "label": a.startswith("tea")}
            for a in ["tea"] * 6 + ["milk"] * 4]
    rows[0]["answer"] = "milk"  # labelled yes, judged no
    rows[9]["answer"] = "tea"  # labelled no, judged yes

    class Judge:
        unreadable = 0

        def __call__(self, items):
            return [answer == "tea" for _, answer, _ in items]

    path = tmp_path / "labels.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report, verdicts = evaluate.judge_agreement(Judge(), path)
    # 5 true and 1 false yes, 3 true and 1 false no; chance agreement 0.6² + 0.4²
    assert report["accuracy"] == 0.8 and report["precision"] == report["recall"] == pytest.approx(5 / 6)
    assert report["kappa"] == pytest.approx((0.8 - 0.52) / 0.48) and report["n"] == 10
    assert [row["verdict"] for row in verdicts] == [row["answer"] == "tea" for row in rows]
    monkeypatch.setattr(evaluate, "make_judge", lambda *args, **kwargs: Judge())
    evaluate.main(["--judge", "toy", "--judge-agreement", str(path), "--out", str(tmp_path / "run")])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["accuracy"] == 0.8
    path.write_text('{"instruction": "Write.", "answer": "tea", "question": "Is it?", "label": "yes"}\n')
    with pytest.raises(evaluate.InputError, match=r"labels.jsonl:1: field 'label'"):
        evaluate.judge_agreement(Judge(), path)


def test_fields_of_a_users_own_file(tmp_path):
    """Without text, chance and ood a record is fine; a chance or ood that cannot be used is named."""
    bare = record("r1", [{**TEA, "text": None}])
    math = {**record("m1", [TEA]), "task": "math", "answer": "4", "constraints": None}
    path = tmp_path / "own.jsonl"
    write(path, [bare, math, {**bare, "id": "r2", "chance": None}])
    items = evaluate.RecordFile(path).load()
    assert [(item.questions, item.plan, "chance" in item.record) for item in items] == [([], [], False)] * 3
    for wrong, message in (({"chance": "0.5"}, "'chance': '0.5' is no share"), ({"chance": 2}, "'chance': 2 is no"),
                           ({"ood": "false"}, "'ood': is not true or false")):
        write(path, [bare | wrong])
        with pytest.raises(InputError, match=f"own.jsonl: record 'r1': field {message}"):
            evaluate.RecordFile(path).load()


@pytest.mark.parametrize("flag, value", [("--resamples", 0), ("--limit", -1), ("--chunk", 0), ("--thought-tokens", 0)])
def test_a_setting_below_its_least_is_named(flag, value):
    with pytest.raises(InputError, match=f"{flag} {value}: must be at least"):
        main([flag, value])


def test_an_unknown_benchmark_among_others_is_named():
    with pytest.raises(InputError, match="'celo' is unknown; give some of ifeval"):
        main(["--benchmarks", "ifeval,celo", "--model", "x"])


def test_a_difference_without_a_figure_is_not_clear_of_0():
    columns = {"FB-Bench": {"A − B": None, "A − C": {"value": 5.0, "low": 1.0, "high": 9.0, "n": 4}}}
    text = evaluate.difference_section(columns, "Headline")[1]
    assert re.search(r"A − B \|.*no figure", text) and re.search(r"A − C \|.*clear of 0", text)


def test_a_rewritten_judge_has_replies_of_its_own(tmp_path):
    judge = tmp_path / "judge"
    judge.mkdir()
    cfg, caches = Config(judge=str(judge), out=str(tmp_path)), set()
    for weights in (b"1", b"22"):
        (judge / "model.safetensors").write_bytes(weights)
        caches.add(evaluate.judge_cache(cfg))
    caches.add(evaluate.judge_cache(Config(judge="toy@http://one/v1", out=str(tmp_path))))
    caches.add(evaluate.judge_cache(Config(judge="toy@http://two/v1", out=str(tmp_path))))
    assert len(caches) == 4
