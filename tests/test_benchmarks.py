"""The seven benchmarks: recorded answers and judge replies with the verdicts of the authors' own code.

The conformance data is not part of the project: those tests skip where ../shared (or RAIF_SHARED) is absent. The
others use small cases written for this project and always run.
"""

import gzip
import json

import pytest

import evaluate
from evaluate import (
    BENCHMARKS,
    cfbench_points,
    complexbench_rule,
    read_infobench,
    read_levels,
    read_yes,
    score_answers,
    span_list,
)


def rows_of(path):
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def items_of(name, folder):
    return {item["id"]: item for item in BENCHMARKS[name].load(folder)}


@pytest.fixture
def cases(shared):
    return shared / "conformance"


@pytest.fixture
def files(shared):
    return shared / "benchmarks"


# ------------------------------------------------------------------------------------------------ official verdicts


def test_ifeval_gpt4_strict_and_loose(cases, files):
    items, rows = items_of("ifeval", files), rows_of(cases / "ifeval" / "verdicts_gpt4.jsonl.gz")
    metrics, judged = score_answers("ifeval", [(items[str(row["key"])], row["response"], {}) for row in rows],
                                    "official")
    for row, (_, verdict) in zip(rows, judged, strict=True):
        stable = [name not in row["unstable"] for name in row["instruction_id_list"]]
        for mode in ("strict", "loose"):
            pairs = zip(verdict[mode], row[mode], stable, strict=True)
            assert all(own == given for own, given, sure in pairs if sure), row["key"]
    assert metrics["prompt_strict"] == 417 / 541 and metrics["instruction_strict"] == 698 / 834
    assert metrics["prompt_loose"] == 431 / 541 and metrics["instruction_loose"] == 714 / 834
    assert metrics["n"] == {"asked": 541, "answered": 541, "judged": 0, "unparsable": 0}


@pytest.mark.parametrize("model", ["chatgpt", "moss", "qwenlm"])
def test_cello_scores_and_averages(cases, files, model):
    items, rows = items_of("cello", files), rows_of(cases / "cello" / f"{model}.jsonl.gz")
    metrics, judged = score_answers("cello", [(items[row["Instruction_id"]], row["model_answer"], {}) for row in rows],
                                    "official")
    for row, (_, verdict) in zip(rows, judged, strict=True):
        given = row["scores"] if isinstance(row["scores"], list) else [
            row["scores"][name] for name in ("format_score", "input_score", "task_score", "count_limit_score")]
        assert verdict["scores"] == [pytest.approx(score, abs=1e-9) if score is not None else None for score in given]
    expected = json.loads((cases / "cello" / "expected_scores.json").read_text("utf-8"))[model]
    for name, key in (("average", "Average"), ("complex_instruction", "Ave_complex_ins"),
                      ("complex_input", "Ave_complex_input")):
        assert metrics[name] == pytest.approx(expected[key], abs=1e-9)
    assert list(metrics["criteria"].values()) == pytest.approx(list(expected["by_criterion"].values()), abs=1e-9)


def test_cfbench_parser_cases(cases):
    for case in rows_of(cases / "cfbench" / "parser_cases.jsonl"):
        expected, item = case["expected"], {"row": {"criteria": case["criteria"]}}
        points = cfbench_points(case["judge_response"], [entry[0] for entry in case["criteria"]])
        assert points == (expected["strict_parse"] and [float(score) for score in expected["strict_parse"]])
        if expected["final"]:
            verdict = evaluate.cfbench_verdict(item, "x", {None: case["judge_response"]}, "official")
            assert {key: verdict[key] for key in ("CSR", "ISR", "PSR")} == {
                key: expected["final"][key] for key in ("CSR", "ISR", "PSR")}, case
            assert verdict["unparsable"] == (expected["final"]["judge_parsing"] != "1")


def test_cfbench_published_judgements(cases, files):
    items = items_of("cfbench", files)
    recomputed = json.loads((cases / "cfbench" / "recomputed_scores.json").read_text("utf-8"))
    for path in sorted((cases / "cfbench").glob("*_eval.json")):
        rows = json.loads(path.read_text("utf-8"))
        metrics, judged = score_answers("cfbench", [
            (items[str(row["idx"])], row["response"], {None: row["judge_response"]}) for row in rows], "official")
        for row, (_, verdict) in zip(rows, judged, strict=True):
            assert {key: verdict[key] for key in row["judge_metric"]} == row["judge_metric"]
        expected = recomputed[path.name.removesuffix("_eval.json")]
        assert {key: metrics[key] for key in expected if key != "name"} == {
            key: value for key, value in expected.items() if key != "name"}


def test_complexbench_rules_spans_replies(cases):
    for case in rows_of(cases / "complexbench" / "rule_cases.jsonl.gz"):
        expected = 2 if str(case["expected"]).startswith("EXC") else case["expected"]
        found = complexbench_rule(case["rule"], list(case["segments"]))
        assert found == expected and isinstance(found, bool) == isinstance(expected, bool), case
    for case in rows_of(cases / "complexbench" / "extraction_cases.jsonl"):
        assert span_list(case["extractor_reply"], case["response"]) == case["segments"]
    for case in rows_of(cases / "complexbench" / "judge_reply_cases.jsonl"):
        assert read_yes(case["judge_reply"])[0] == case["point_judge"]


def test_complexbench_aggregation(cases):
    rows = json.loads((cases / "complexbench" / "aggregation_items.json").read_text("utf-8"))
    expected = json.loads((cases / "complexbench" / "aggregation_expected.json").read_text("utf-8"))
    scored = []
    for row in rows:
        replies = {k: "答案：是" if met else "答案：否" for k, met in enumerate(row["point_judges"])}
        scored.append(({"row": row, "group": row["group"], "questions": []}, "x", replies))
    metrics, judged = score_answers("complexbench", scored, "official")
    assert [verdict["met"] for _, verdict in judged] == [row["point_judges_rely"] for row in rows]
    assert metrics["drfr"] == pytest.approx(expected["overall_drfr"], abs=1e-12)
    assert {key: metrics[key] for key in expected["categorized_drfr"]} == pytest.approx(expected["categorized_drfr"])
    assert metrics["tables"]["prefix"] == pytest.approx(expected["categorized_avg_drfr"])
    assert metrics["coherent"]["single_coherent"] == expected["single_coherent_test"] == 0.375
    assert metrics["coherent"]["multiple_coherent"] == pytest.approx(expected["multiple_coherent_test"])
    assert metrics["coherent"]["multiple_relative_drop"] == pytest.approx(expected["miltiple_relative_drop"])
    assert metrics["coherent"]["single_relative_drop"] == pytest.approx(expected["single_relative_drop"])


def test_fbbench_nine_models(cases, files):
    items = items_of("fb-bench", files)
    expected = json.loads((cases / "fb-bench" / "expected_scores.json").read_text("utf-8"))
    assert len(expected) == 9
    for model, scores in expected.items():
        rows = rows_of(cases / "fb-bench" / "judgments" / f"{model}.jsonl.gz")
        scored = [(items[str(row["dataset_index"])], "x", {None: json.dumps(row["judgement"], ensure_ascii=False)})
                  for row in rows]
        metrics, judged = score_answers("fb-bench", scored, "official")
        assert [verdict["score"] for _, verdict in judged] == pytest.approx([row["score"] for row in rows])
        assert {key: metrics[key] for key in scores} == scores, model


def test_followbench_rule_cases(cases, files):
    items = items_of("followbench", files)
    for case in rows_of(cases / "followbench" / "rule_cases_en.jsonl.gz"):
        item = items[f"{case['lang']}/{case['constraint_type']}/{case['example_id']}/{case['level']}"]
        assert not item["questions"]
        verdict = evaluate.followbench_verdict(item, case["generation"], {}, "official")
        assert bool(verdict["hard"]) == case["expected"], case


@pytest.mark.parametrize("language", ["en", "zh"])
def test_followbench_judge_replies_and_tables(cases, files, language):
    for case in rows_of(cases / "followbench" / f"judge_parse_cases_{language}.jsonl"):
        read = read_levels(case["judge_reply"], case["level"], language) or (-1, -1)
        assert read == (case["hard"], pytest.approx(case["soft"])), case
    items, replies, rows = items_of("followbench", files), {}, []
    for kind in evaluate.FOLLOWBENCH_TYPES:
        if kind != "example":
            for row in rows_of(cases / "followbench" / f"run_{language}_modelA_{kind}_judge.jsonl.gz"):
                replies[f"{language}/{kind}/{row['example_id']}/{row['level']}"] = {None: row["judge_reply"]}
        for row in rows_of(cases / "followbench" / f"run_{language}_modelA_{kind}_generations.jsonl.gz"):
            key = f"{language}/{kind}/{row['example_id']}/{row['level']}"
            assert bool(items[key]["questions"]) == (key in replies)
            rows.append((items[key], row["generation"], replies.get(key, {})))
    metrics, _ = score_answers("followbench", rows, "official")
    tables = json.loads((cases / "followbench" / f"run_{language}_expected_tables.json").read_text("utf-8"))
    for name, (_, (_, *cells)) in tables.items():
        kind, what = name.removesuffix(".csv").split("_", 1)
        key = f"{language}.{kind}.{'HSR' if what == 'rule_based' else what.upper()}"
        expected = [float(str(cell).rstrip("%")) for cell in cells]
        assert metrics[key] == (expected[0] if what == "csl" else expected), name


def test_infobench_replies(cases):
    for case in rows_of(cases / "infobench" / "reply_cases.jsonl"):
        assert [read_infobench(case["judge_reply"])] == case["eval"], case
