"""The seven benchmarks: recorded answers and judge replies with the verdicts of the authors' own code.

The conformance data is not part of the project: those tests skip where ../shared (or RAIF_SHARED) is absent. The
others use small cases written for this project and always run.
"""

import gzip
import io
import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import evaluate
from evaluate import (
    BENCHMARKS,
    cfbench_points,
    complexbench_rule,
    make_item,
    read_infobench,
    read_levels,
    read_yes,
    span_list,
)
from model import Completion, Prompt
from rewards import InputError


def rows_of(path):
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def items_of(name, folder):
    return {item.id: item for item in BENCHMARKS[name].load(folder)}


def score(name, triples):
    """(metrics, verdicts) by the authors' own protocol."""
    return evaluate.score_answers(BENCHMARKS[name], triples, "official")[:2]


@pytest.fixture
def cases(shared):
    return shared / "conformance"


@pytest.fixture
def files(shared):
    return shared / "benchmarks"


# ------------------------------------------------------------------------------------------------ official verdicts


def test_ifeval_gpt4_strict_and_loose(cases, files):
    items, rows = items_of("ifeval", files), rows_of(cases / "ifeval" / "verdicts_gpt4.jsonl.gz")
    metrics, verdicts = score("ifeval", [(items[str(row["key"])], row["response"], {}) for row in rows])
    for row, verdict in zip(rows, verdicts, strict=True):
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
    metrics, verdicts = score("cello", [(items[row["Instruction_id"]], row["model_answer"], {}) for row in rows])
    for row, verdict in zip(rows, verdicts, strict=True):
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
        expected, plan = case["expected"], [criterion[0] for criterion in case["criteria"]]
        item = make_item(0, "x", "zh", {"criteria": case["criteria"]}, plan=plan)
        points = cfbench_points(case["judge_response"], plan)
        assert points == (expected["strict_parse"] and [float(score) for score in expected["strict_parse"]])
        if expected["final"]:
            verdict = BENCHMARKS["cfbench"].verdict(item, "x", {None: case["judge_response"]}, "official")
            assert {key: verdict[key] for key in ("CSR", "ISR", "PSR")} == {
                key: expected["final"][key] for key in ("CSR", "ISR", "PSR")}, case
            assert verdict["unparsable"] == (expected["final"]["judge_parsing"] != "1")


def test_cfbench_published_judgements(cases, files):
    items = items_of("cfbench", files)
    recomputed = json.loads((cases / "cfbench" / "recomputed_scores.json").read_text("utf-8"))
    for path in sorted((cases / "cfbench").glob("*_eval.json")):
        rows = json.loads(path.read_text("utf-8"))
        metrics, verdicts = score("cfbench", [
            (items[str(row["idx"])], row["response"], {None: row["judge_response"]}) for row in rows])
        for row, verdict in zip(rows, verdicts, strict=True):
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
        scored.append((make_item(len(scored), "x", "zh", row, group=row["group"]), "x", replies))
    metrics, verdicts = score("complexbench", scored)
    assert [verdict["met"] for verdict in verdicts] == [row["point_judges_rely"] for row in rows]
    assert metrics["drfr"] == pytest.approx(expected["overall_drfr"], abs=1e-12)
    assert {key: metrics[key] for key in expected["categorized_drfr"]} == pytest.approx(expected["categorized_drfr"])
    assert {key: metrics[key] for key in expected["categorized_avg_drfr"]} == pytest.approx(
        expected["categorized_avg_drfr"])
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
        metrics, verdicts = score("fb-bench", scored)
        assert [verdict["score"] for verdict in verdicts] == pytest.approx([row["score"] for row in rows])
        assert {key: metrics[key] for key in scores} == scores, model


def test_followbench_rule_cases(cases, files):
    items = items_of("followbench", files)
    for case in rows_of(cases / "followbench" / "rule_cases_en.jsonl.gz"):
        item = items[f"{case['lang']}/{case['constraint_type']}/{case['example_id']}/{case['level']}"]
        assert not item.questions
        verdict = BENCHMARKS["followbench"].verdict(item, case["generation"], {}, "official")
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
            assert bool(items[key].questions) == (key in replies)
            rows.append((items[key], row["generation"], replies.get(key, {})))
    metrics, _ = score("followbench", rows)
    tables = json.loads((cases / "followbench" / f"run_{language}_expected_tables.json").read_text("utf-8"))
    for name, (_, (_, *cells)) in tables.items():
        kind, what = name.removesuffix(".csv").split("_", 1)
        key = f"{language}.{kind}.{'HSR' if what == 'rule_based' else what.upper()}"
        expected = [float(str(cell).rstrip("%")) for cell in cells]
        assert metrics[key] == (expected[0] if what == "csl" else expected), name


def test_infobench_replies(cases):
    for case in rows_of(cases / "infobench" / "reply_cases.jsonl"):
        assert [read_infobench(case["judge_reply"])] == case["eval"], case


def test_infobench_order_of_turns(cases, files):
    items = list(items_of("infobench", files).values())
    shapes = [[turn["role"] for turn in case["turns"]]
              for case in rows_of(cases / "infobench" / "conversation_shape.jsonl")]
    for item in (next(item for item in items if bool(item.record["input"]) == given) for given in (True, False)):
        replies = dict.fromkeys(item.questions, "YES")
        for k in item.questions:
            turns = BENCHMARKS["infobench"].conversation(item, "some text", k, replies)
            assert [turn["role"] for turn in turns] in shapes or k > 3
            assert "some text" in turns[0]["content"] and item.plan[0] in turns[0]["content"]
            assert (item.record["input"] in turns[0]["content"]) and item.record["instruction"] not in str(turns)
            assert [turn["content"] for turn in turns[1:]] == [
                text for question in item.plan[1 : k + 1] for text in ("YES", question)]


# ------------------------------------------------------------------------------------------------ own cases

OWN = evaluate.data_dir / "benchmarks"  # a few records of each benchmark's form, written for this project


def score_own(tmp_path, capsys, name, responses, judgements=None, *flags):
    """What `evaluate.py --score` prints for these rows on the project's own sample."""
    files = []
    for flag, rows in (("--responses", responses), ("--judgements", judgements)):
        if rows is not None:
            path = tmp_path / f"{flag[2:]}.jsonl"
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
            files += [flag, str(path)]
    evaluate.main(["--score", name, "--benchmark-dir", str(OWN), *files, *flags])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def answers(**texts):
    return [{"id": key.lstrip("_"), "response": text} for key, text in texts.items()]


def test_ifeval_own(tmp_path, capsys):
    rows = answers(_1="Tea is warm and kind and it keeps me awake at night friends",
                   _2="<think>\na title\n</think>\n<answer>\nSure:\n<<Rain>>\n</answer>", _3="- a\n- b", _4=None)
    result = score_own(tmp_path, capsys, "ifeval", rows)
    assert result["prompt_strict"] == 2 / 4 and result["instruction_strict"] == 3 / 6
    assert result["n"] == {"asked": 4, "answered": 3, "judged": 0, "unparsable": 0}
    unfinished = score_own(tmp_path, capsys, "ifeval", answers(_1="<think>\n" + rows[0]["response"]))
    assert unfinished["instruction_strict"] == 0 and unfinished["n"]["answered"] == 1  # a thought is no answer
    rows[0]["response"] = "Sure:\n- Nile\n- Rhine\n- Po\n- Done\n"
    rows[0]["id"] = 3
    rows = [rows[0]]  # a file may hold a part; four bullets fail, three are left of the loose variant
    result = score_own(tmp_path, capsys, "ifeval", rows, None, "--protocol", "raif")
    assert (result["prompt_strict"], result["prompt_loose"], result["headline"]) == (0, 0, 0)


def test_ifeval_headline_is_strict_but_loose_in_the_papers_table(tmp_path, capsys):
    rows = answers(_3="- Nile\n- Rhine\n- Po\n- Done")  # without its last line three bullets are left
    for protocol, headline in (("official", 0), ("corrected", 0), ("raif", 100)):
        assert score_own(tmp_path, capsys, "ifeval", rows, None, "--protocol", protocol)["headline"] == headline


def test_cello_own(tmp_path, capsys):
    ids = [key * 8 for key in ("e1a2b3c4", "b1b2b3b4", "c1d2c3d4")]
    texts = ["{'时间': '三点', '地点': '图书馆'}", "周末爬山1 2 3 4 6", "茶" * 60]
    rows = [{"id": key, "response": text} for key, text in zip(ids, texts, strict=True)]
    official = score_own(tmp_path, capsys, "cello", rows)
    assert official["tasks"]["extraction"] == pytest.approx(1, abs=0.05)  # format 1, query 1 x (1 - BLEU)
    assert official["tasks"]["brainstorming_single_round"] == 1  # words come first: samples are not asked
    assert official["tasks"]["writing_multi_rounds"] == 1  # the revision is compared with itself
    corrected = score_own(tmp_path, capsys, "cello", rows, None, "--protocol", "corrected")
    assert corrected["tasks"]["writing_multi_rounds"] == 0.5  # 60 characters are not shorter
    rows += [{"id": ids[0], "response": None}] * 2  # rows count; no answer is 0 on all four criteria
    repeated = score_own(tmp_path, capsys, "cello", rows)
    assert repeated["n"]["asked"] == 5 and repeated["n"]["answered"] == 3
    assert repeated["tasks"]["extraction"] == pytest.approx((1 / 3 + 0.33 + 0 + 0) / 4, abs=0.05)


def test_cello_counts_chinese_sentences_in_linear_time(tmp_path, capsys):
    (tmp_path / "cello").mkdir()
    record = {"Instruction": "写", "Instruction_id": "a", "lang": "ch", "histories": [], "Answer_format": [],
              "Task_prescribed_phrases": [], "Input_depdent_query": [],
              "Count_limit": [{"criterion": "sentence-min", "limit": 4}]}
    (tmp_path / "cello" / "closed_qa.json").write_text(json.dumps([record]), "utf-8")
    began = time.perf_counter()
    for text, score in (("一。。二！三\n尾", 0.75), ("茶" * 50_000, 0)):
        result = score_own(tmp_path, capsys, "cello", answers(a=text), None, "--benchmark-dir", str(tmp_path))
        assert result["tasks"]["closed_qa"] == score
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize("protocol, csr, psr", [("official", 1.0, 1.0), ("corrected", 0.67, 0.0)])
def test_cfbench_fallback_keeps_zeros_only_when_corrected(tmp_path, capsys, protocol, csr, psr):
    reply = "介绍了雨伞\t1\n只有两句话\t0\n语气正式\t1"  # single line breaks: the strict parse fails
    result = score_own(tmp_path, capsys, "cfbench", answers(_0="雨伞。"),
                       [{"id": 0, "question": None, "reply": reply}], "--protocol", protocol)
    assert (result["CSR"], result["PSR"], result["CSR_easy"], result["CSR_hard"]) == (csr, psr, csr, None)
    assert result["n"] == {"asked": 1, "answered": 1, "judged": 1, "unparsable": 1}


def test_cfbench_primary_point_decides(tmp_path, capsys):
    reply = "是请假邮件\t1\n\n有称呼\t1\n\n写明原因\t0\n\n有落款\t1"
    judgements = [{"id": "1", "question": None, "reply": reply}]
    result = score_own(tmp_path, capsys, "cfbench", answers(_1="请假", _0=None), judgements, "--protocol", "raif")
    assert (result["CSR_hard"], result["ISR_hard"], result["PSR_hard"]) == (0.75, 0, 0)
    assert (result["CSR"], result["CSR_easy"]) == (0.38, 0)  # no answer and no judgement: 0
    assert result["headline"] == pytest.approx(100 * 0.38 / 3)


@pytest.mark.parametrize("priorities, scores, psr", [
    (["次需"] * 5, [1, 1, 1, 1, 0], 0),  # CSR 0.8 is not above 0.8
    (["次需"] * 6, [1, 1, 1, 1, 1, 0], 1),
    (["主需"] + ["次需"] * 5, [1, 1, 1, 1, 0, 0], 0),  # 0.5 + 0.5 x 0.6 is not above 0.8
    (["主需"] + ["次需"] * 3, [1, 1, 1, 0], 1),
])
def test_cfbench_psr_is_above_its_threshold_not_at_it(tmp_path, capsys, priorities, scores, psr):
    (tmp_path / "cfbench").mkdir()
    criteria = [[f"第{k}点", priority, "", ""] for k, priority in enumerate(priorities)]
    record = {"idx": 0, "prompt": "写", "gold": "", "split": "easy", "criteria": criteria}
    (tmp_path / "cfbench" / "cfbench_data.json").write_text(json.dumps([record]), "utf-8")
    reply = "\n\n".join(f"第{k}点\t{score}" for k, score in enumerate(scores))
    result = score_own(tmp_path, capsys, "cfbench", answers(_0="x"), [{"id": 0, "question": None, "reply": reply}],
                       "--benchmark-dir", str(tmp_path))
    assert (result["PSR"], result["n"]["unparsable"]) == (psr, 0)


def test_complexbench_own(tmp_path, capsys):
    rows = answers(_3="3+4=7，7*2=14，结果是14。", _4="鲸是哺乳动物，不是鱼。", _5=None)
    replies = [(3, 0, "分析：没有\n答案：否"), (3, 1, "评分对象：all"), (3, 2, "答案：是"), (4, 0, "答案：是"),
               (4, 1, "评分对象：鲸是哺乳动物，不是鱼。"), (5, 0, "说不清")]
    judgements = [{"id": key, "question": k, "reply": reply} for key, k, reply in replies]
    result = score_own(tmp_path, capsys, "complexbench", rows, judgements)
    # 3: question 0 is false and takes 1 down; 2 hangs on 1, whose own verdict is true, so it stays: one step only.
    assert result["Chain_2"] == pytest.approx(1 / 3) and result["Selection_1"] == 2 / 4
    assert result["drfr"] == pytest.approx(3 / 7)
    assert result["coherent"]["single_origin"] == 0.5 and result["coherent"]["single_coherent"] == 0
    assert result["n"] == {"asked": 3, "answered": 2, "judged": 6, "unparsable": 1}


@pytest.mark.parametrize("rule, spans, met", [
    ("model_length:[2,4]", ["“完成了”"], True), ("model_length:[2,4]", ["“完成了吗”"], True),
    ("model_length:[2,4]", ["完成了没有"], False), ("model_length:[2,4]", [], False),
    ("model_length_each:[1,2]", ["字字", "", "字字字"], False), ("model_length_word:[2,2]", ["two words"], True),
    ("model_number_each:[2,3]", ["a", "b"], True), ("model_keyword_num:[1,1,a,b]", ["a b"], False),
    ("model_forbidden_word:[坏]", [], True), ("model_not_endswith:完", [""], True),
    ("model_startswith:你好,", ["你好，世界"], True),  # ASCII marks are mapped to full width on both sides
    ("model_keyword:[你好,世界]", ["你好,世界"], True),  # two words here, and the answer is not mapped
    ("model_keyword:[好!]", ["好!"], False), ("endswith:完", ["写完。"], True), ("endswith:完", ["写完！"], False),
    ("match:完成", ["完成。"], True), ("Json:[\"a\"]", ["x {\"a\": 1} y"], True),
    ("Json:[\"a\"]", ["{\"b\": 1}"], False),
    ("forbidden_word:[坏]", ["今天None坏"], True), ("constraint_punc:[。]", ["一，二。"], False),
    ("keyword:[好]\nforbidden_word:[坏]", ["好"], 2), ("model_new:[1]", ["a"], 2), ("each_new:[1]", ["a"], 2),
    ("model_startswith:开\nmodel_endswith:完", ["开始到写完"], True),
    ("model_starts_with_list_each:[a,b]", ["ax"], False),
    ("model_endswith_each:。", ["一。", "二", "三"], False), ("model_endswith_each:。", ["一。", "二。", "三"], True),
])
def test_complexbench_rules_own(rule, spans, met):
    assert complexbench_rule(rule, spans) == met


def point(met, weight):
    return {"评判理由": "因为", "评判结果": "是" if met else "否", "weight": weight}


def test_fbbench_own(tmp_path, capsys):
    rows = answers(_0="144", _1="Good morning", _2="7是质数")
    replies = [{"a": point(True, 0.6), "b": point(False, 0.4)}, {"a": point(True, 2)},
               {"a": point(False, None), "b": point(True, None)}]
    judgements = [{"id": k, "question": None, "reply": json.dumps(reply)} for k, reply in enumerate(replies)]
    result = score_own(tmp_path, capsys, "fb-bench", rows, judgements)
    assert (result["error_correction"], result["response_maintenance"], result["overall"]) == (60, 100, 80)
    assert result["n"]["unparsable"] == 1 and "734" in result["notes"][0]  # a weight of 2: the item is left out
    corrected = score_own(tmp_path, capsys, "fb-bench", rows, judgements, "--protocol", "corrected")
    assert corrected["error_correction"] == 30


def test_fbbench_weights_may_not_exceed_one_together(tmp_path, capsys):
    for weight, unparsable in ((0.5, 0), (0.6, 1)):
        reply = json.dumps({"a": point(True, weight), "b": point(True, weight)})
        judgements = [{"id": 0, "question": None, "reply": reply}]
        result = score_own(tmp_path, capsys, "fb-bench", answers(_0="144"), judgements)
        assert result["n"]["unparsable"] == unparsable


def test_followbench_own(tmp_path, capsys):
    rows = [{"id": f"en/content/1/{level}", "response": "…"} for level in range(1, 6)]
    rows += [{"id": f"en/content/2/{level}", "response": "name[The Blue Cup], eatType[cafe]" + "." * (level > 2)}
             for level in range(1, 6)]
    rows += [{"id": f"en/example/1/{level}", "response": "Answer: 5" if level < 3 else None} for level in range(1, 6)]
    rows += [{"id": f"zh/mixed/1/{level}", "response": "今天在下大雨了啊"} for level in range(1, 6)]
    replies = ["fine\n['YES']", "['YES', 'NO']", "sorry", "['YES', 'YES', 'YES', 'YES']", "['YES'] * 5"]
    judgements = [{"id": f"en/content/1/{k}", "question": None, "reply": text} for k, text in enumerate(replies, 1)]
    result = score_own(tmp_path, capsys, "followbench", rows, judgements)
    assert result["en.content.HSR"] == [100, 50, -50, 50, -50] and result["en.content.SSR"] == [100, 75, -50, 50, -50]
    assert result["en.content.CSL"] == 1.5 and result["en.example.HSR"] == [100, 100, 0, 0, 0]
    assert result["zh.mixed.HSR"] == [100] * 5 and result["zh.mixed.CSL"] == 5 and result["zh.style.HSR"] is None
    assert result["n"] == {"asked": 20, "answered": 17, "judged": 5, "unparsable": 2}
    raif = score_own(tmp_path, capsys, "followbench", rows, judgements, "--protocol", "raif")
    six = [100 * 1.5 / 3.68, 20, 25, 100 * 5 / 3.68, 100, 100]  # English and Chinese: CSL / 3.68, HSR, SSR
    assert raif["headline"] == pytest.approx(sum(six) / 6)
    corrected = score_own(tmp_path, capsys, "followbench", rows, judgements, "--protocol", "corrected")
    assert corrected["en.content.HSR"] == [100, 50, 0, 50, 0]


@pytest.mark.parametrize("text, language, level, read", [
    ("```\n['YES', 'NO']\n```", "en", 2, (0, 0.5)), ("[YES, NO]", "en", 2, None), ("[YES, NO]", "zh", 2, (0, 0.5)),
    ("['YES', 'N/A']", "en", 2, (0, 0.5)), ("['YES', 'N/A']", "zh", 2, None), ("YES NO", "en", 1, (1, 1.0)),
    ("[“YES”, “YES”]", "zh", 2, (1, 1.0)), ("['YES', 'YES', 'NO']", "zh", 2, (1, 1.0)), ("yes", "en", 1, None),
    ("['YES', 'YES', 'NO']", "en", 2, None), ("['YES', 'YES']\nThanks", "en", 2, None),
    ("[['YES'], 1]", "en", 2, None), ("[{['YES']}, 1]", "en", 2, None),
])
def test_followbench_replies_own(text, language, level, read):
    assert read_levels(text, level, language) == read


def test_infobench_own(tmp_path, capsys):
    rows = answers(own_task_1="Sorry.", own_task_2=None)
    judgements = [{"id": "own_task_1", "question": k, "reply": reply}
                  for k, reply in enumerate(["Yes.", "Maybe", "YES"])]
    result = score_own(tmp_path, capsys, "infobench", rows, judgements)
    assert (result["drfr"], result["easy"], result["hard"]) == (0.5, 0.5, None)  # the first None ends the item
    assert result["n"] == {"asked": 2, "answered": 1, "judged": 2, "unparsable": 1}
    assert score_own(tmp_path, capsys, "infobench", rows, judgements, "--protocol", "corrected")["drfr"] == 2 / 5


@pytest.mark.parametrize("text, read", [("yesterday", True), ("No doubt: YES", False), ("The answer is YES", True),
                                        ("UNKNOWN", False), (" yes", None), ("YES and NO", True), ("", None)])
def test_infobench_replies_own(text, read):
    assert read_infobench(text) is read


@pytest.mark.parametrize("name, responses, judgements, said", [
    ("ifeval", [{"id": 1}], None, "responses.jsonl:1: field 'response'"),
    ("ifeval", [{"id": 9, "response": "x"}], None, "responses.jsonl:1: field 'id': '9'"),
    ("ifeval", [{"response": "x"}], None, "field 'id'"),
    ("ifeval", answers(_1="x") * 2, None, "responses.jsonl:2: field 'id'"),
    ("cfbench", answers(_0="x"), None, "--judgements"),
    ("cfbench", answers(_0="x"), [{"id": 0, "question": 1, "reply": "x"}], "judgements.jsonl:1: field 'question'"),
    ("infobench", answers(own_task_1="x"), [{"id": "own_task_1", "question": 3, "reply": "x"}], "are [0, 1, 2]"),
    ("infobench", answers(own_task_1="x"), [{"id": "own_task_1", "question": 0}], "field 'reply'"),
    ("nobench", answers(_1="x"), None, "--score nobench"),
])
def test_bad_rows_are_named(tmp_path, capsys, name, responses, judgements, said):
    with pytest.raises(InputError) as error:
        score_own(tmp_path, capsys, name, responses, judgements)
    assert said in str(error.value) and "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------ whole runs


class FakeTokenizer:
    """One token per byte."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": list(text.encode())}


class FakeEngine:
    """The model echoes the end of its request, with a thought if asked for one; the judge says yes to everything,
    in one form that FollowBench, InFoBench and ComplexBench can read and CFBench and FB-Bench cannot."""

    def __init__(self, name):
        self.name, self.asked, self.fail_after, self.settings = name, [], None, []

    def wake(self):
        pass

    def sync(self, model):
        assert model.name == self.name

    def generate(self, prompts, *, n, max_tokens, temperature, seeds, stop=(), progress=None):
        self.settings += [(n, temperature, seed) for seed in seeds]
        if self.fail_after is not None and len(self.asked) >= self.fail_after:
            raise RuntimeError("killed")
        self.asked += [bytes(ids).decode() for ids in prompts]
        return [[self.answer(text, k) for k in range(n)] for text in self.asked[-len(prompts):]]

    def answer(self, prompt, k):
        if self.name == "judge":
            level = prompt.count("added constraints]") - 2 if "added" in prompt else prompt.count("个约束的版本】") - 1
            text = f"YES 答案：是 {['YES'] * level}" if level > 0 else "YES 答案：是"
        elif prompt.startswith("cot"):
            text = "a plan\n</think>\n<answer>" + prompt[-20:] + "</answer>"
        elif "DONE" in prompt:
            text = "DONE" if "better" in prompt else "better"
        else:
            text = ("odd one", "same", "same again")[k % 3] if "sampled" in self.name else prompt[-20:]
        return Completion(list(text.encode()), text, "stop", None)


@pytest.fixture
def fakes(monkeypatch, tmp_path):
    engines = {}

    def fake_load(name, *, dtype=None):
        engines.setdefault(name, FakeEngine(name))
        return SimpleNamespace(name=name), FakeTokenizer()

    def fake_prompt(tokenizer, messages, mode, family="cold", language="en"):
        text = " / ".join(message["content"] for message in messages)
        return Prompt(list(f"{mode} {text}".encode()), "<think>\n" if mode == "cot" else "")

    monkeypatch.setattr(evaluate, "load_model", fake_load)
    monkeypatch.setattr(evaluate, "make_engine", lambda backend, model, *args, **kwargs: engines[model.name])
    def fake_chat(name, **_):
        def chat(conversations, *, n, max_tokens, temperature, seed, **_):
            prompts = [fake_prompt(None, messages, "io").ids for messages in conversations]
            return engines.setdefault(name, FakeEngine(name)).generate(
                prompts, n=n, max_tokens=max_tokens, temperature=temperature, seeds=[seed] * len(prompts))

        return SimpleNamespace(chat=chat)

    monkeypatch.setattr(evaluate, "render_prompt", fake_prompt)
    monkeypatch.setattr(evaluate, "open_chat", fake_chat)
    monkeypatch.chdir(tmp_path)
    return engines


ALL = "ifeval,cello,cfbench,complexbench,fb-bench,followbench,infobench"
FLAGS = ["--benchmark-dir", str(OWN), "--resamples", "20", "--chunk", "5", "--judge", "judge", "--model", "m"]


def test_all_seven_end_to_end_killed_and_resumed(fakes, capsys):
    fakes["judge"] = FakeEngine("judge")
    fakes["judge"].fail_after = 12
    with pytest.raises(RuntimeError, match="killed"):
        evaluate.main(["--benchmarks", ALL, "--method", "cot", *FLAGS])
    fakes["judge"].fail_after = None
    evaluate.main(["--benchmarks", ALL, "--method", "cot", *FLAGS])
    report = json.loads(Path("runs/benchmarks/report.json").read_text("utf-8"))["benchmarks"]
    assert list(report) == ALL.split(",")
    cells = {name: rows["CoT"] for name, rows in report.items()}
    assert cells["cfbench"]["n"] == {"asked": 2, "answered": 2, "judged": 2, "unparsable": 2}
    # CFBench's two replies cannot be read: asked three times, and once more so after the kill.
    assert len([prompt for prompt in fakes["judge"].asked if "检查员" in prompt]) == 2 * 3 * 2
    assert cells["infobench"]["drfr"] == 1 and cells["infobench"]["n"]["judged"] == 5
    assert cells["followbench"]["en.content.HSR"][0] == 50 and cells["followbench"]["zh.style.CSL"] == 5
    assert cells["complexbench"]["n"]["judged"] == 20 and cells["fb-bench"]["n"]["unparsable"] == 3
    assert all(cell["thought_tokens"] == 6 and cell["format_failures"] == 0 for cell in cells.values())
    spans = [prompt for prompt in fakes["judge"].asked if "请摘取" in prompt or "看回答实际走了" in prompt]
    assert len(spans) == 20  # killed half-way through these; none is asked twice
    second = next(prompt for prompt in fakes["judge"].asked if prompt.endswith("Does it have two lines?"))
    assert " / YES 答案：是 / Does it have two lines?" in second  # the judge's own reply is kept in the conversation
    answered, judged = len(fakes["m"].asked), len(fakes["judge"].asked)
    evaluate.main(["--benchmarks", ALL, "--method", "cot", *FLAGS])
    assert len(fakes["m"].asked) == answered
    again = fakes["judge"].asked[judged:]  # only what could not be read: two replies of CFBench, three of FB-Bench
    assert len(again) == 3 * (2 + 3) and all("检查" in prompt for prompt in again)
    text = Path("runs/benchmarks/report.md").read_text("utf-8")
    assert "| Complex Bench |" in text and "not the 734-item set" in text
    assert Path("runs/benchmarks/benchmarks.png").exists()

    # The stored replies score the stored answers again, without a model.
    capsys.readouterr()
    run = "runs/benchmarks/complexbench"
    evaluate.main(["--score", "complexbench", "--benchmark-dir", str(OWN), "--responses", f"{run}/rows/CoT.jsonl",
                   "--judgements", f"{run}/judgements/CoT - judge.jsonl"])
    assert json.loads(capsys.readouterr().out)["drfr"] == cells["complexbench"]["drfr"]


def test_methods_sc_sr_od_and_thought_model(fakes):
    flags = ["--benchmarks", "infobench,fb-bench", *FLAGS]
    evaluate.main([*flags, "--method", "sc", "--model", "sampled", "--samples", "3"])
    evaluate.main([*flags, "--method", "sr"])
    evaluate.main([*flags, "--method", "od"])
    evaluate.main([*flags, "--method", "sdc", "--thought-model", "thinker"])
    rows = {label: [json.loads(line) for line in Path(f"runs/benchmarks/infobench/rows/{label}.jsonl").open()]
            for label in ("SC", "SR", "OD", "SDC")}
    assert [row["answer"] for row in rows["SC"]] == ["same", "same"]  # most like the others
    assert rows["SC"][0]["written_tokens"] == len("odd one" + "same" + "same again")
    assert [row["answer"] for row in rows["SR"]] == ["better", "better"]
    assert sum("1. Is the generated text an apology?" in prompt for prompt in fakes["m"].asked) == 1
    assert rows["SDC"][0]["thought"] == "a plan" and "a plan" in fakes["m"].asked[-1]
    assert len(fakes["thinker"].asked) == 5
    fbbench = [prompt for prompt in fakes["m"].asked if "124" in prompt]
    assert all("12乘以12等于多少？ / 12乘以12等于124。 / " in prompt for prompt in fbbench)  # three turns
    with pytest.raises(InputError, match="sub-questions"):
        evaluate.main(["--benchmarks", "ifeval", *FLAGS, "--method", "od"])


def test_self_consistency_draws_each_prompts_samples_from_its_own_seed(fakes):
    evaluate.main(["--benchmarks", "infobench", *FLAGS, "--method", "sc", "--samples", "3", "--seed", "5"])
    seeds = [evaluate.record_seed(5, 0, key) for key in ("own_task_1", "own_task_2")]
    assert fakes["m"].settings == [(3, 1.0, seed) for seed in seeds] and seeds[0] != seeds[1]


def test_self_refine_asks_at_most_so_many_times(fakes, monkeypatch):
    monkeypatch.setattr(FakeEngine, "answer", lambda self, prompt, k: Completion([1], "YES 答案：是", "stop", None))
    evaluate.main(["--benchmarks", "infobench", *FLAGS, "--method", "sr", "--refine-turns", "2"])
    assert len(fakes["m"].asked) == 2 * (1 + 2)  # two prompts; a first answer and two improvements each
    assert sum("DONE" in prompt for prompt in fakes["m"].asked) == 4


def test_a_cut_thought_marks_the_answer_as_truncated(fakes):
    class ShortThoughts(FakeEngine):
        def answer(self, prompt, k):
            return Completion([1], "plan", "length" if prompt.startswith("cot") else "stop", None)

    fakes["m"] = ShortThoughts("m")
    evaluate.main(["--benchmarks", "infobench", *FLAGS, "--method", "sdc"])
    rows = [json.loads(line) for line in Path("runs/benchmarks/infobench/rows/SDC.jsonl").open()]
    assert [row["truncated"] for row in rows] == [True, True]


def test_a_reply_that_cannot_be_read_is_asked_again_warmer(fakes):
    evaluate.main(["--benchmarks", "cfbench", *FLAGS, "--method", "io", "--judge-tries", "3"])
    assert fakes["judge"].settings == [(1, 0.0, 0)] * 2 + [(1, 0.5, 1)] * 2 + [(1, 0.5, 2)] * 2


def test_an_example_drawn_twice_counts_twice(fakes, tmp_path):
    (tmp_path / "followbench" / "data").mkdir(parents=True)
    records = [{"example_id": example, "level": level, "instruction": f"Say {example}, {level}.", "source": "own",
                "category": "example", "target": "{answer}" if example == 0 else "no"}
               for example in range(4) for level in range(1, 6)]
    path = tmp_path / "followbench" / "data" / "example_constraints.json"
    path.write_text(json.dumps(records), "utf-8")
    evaluate.main(["--benchmarks", "followbench", "--benchmark-dir", str(tmp_path), "--model", "m", "--method", "io",
                   "--resamples", "1000"])
    report = json.loads(Path("runs/benchmarks/report.json").read_text("utf-8"))
    cell = report["benchmarks"]["followbench"]["I/O"]
    assert cell["en.example.CSL"] == 1.2 and cell["intervals"]["en.example.CSL"] == [0.0, 3.8]  # 15/4: thrice of four


def test_refused_answers_are_not_judged_and_changed_ones_are_judged_again(fakes, monkeypatch):
    class Served:
        def __init__(self, url, name, **_):
            pass

        def chat(self, conversations, **_):
            refused = Completion([], "", "refused", None, reasoning="400: the prompt is too long")
            return [[refused], [Completion([], "Dear all", "stop", None)]]

    monkeypatch.setattr(evaluate, "Endpoint", Served)
    fakes["judge"] = FakeEngine("judge")
    run = ["--benchmarks", "infobench", *FLAGS, "--model", "m@http://u", "--method", "io"]
    evaluate.main(run)
    assert len(fakes["judge"].asked) == 2 and all("Dear all" in prompt for prompt in fakes["judge"].asked)
    path = Path("runs/benchmarks/infobench/rows/I-O.jsonl")
    assert [json.loads(line)["thought"] for line in path.open()] == ["", ""]  # a server's error is no thought
    evaluate.main(run)
    assert len(fakes["judge"].asked) == 2
    path.write_text(path.read_text("utf-8").replace("Dear all", "Dear none"), "utf-8")
    evaluate.main(run)
    assert len(fakes["judge"].asked) == 4 and all("Dear none" in prompt for prompt in fakes["judge"].asked[2:])


def test_served_model_and_served_judge(fakes, monkeypatch):
    talks, json_mode = [], []

    class Served:
        def __init__(self, url, name, **_):
            self.name = name

        def chat(self, conversations, *, n, max_tokens, temperature, seed, **more):
            json_mode.append(more)
            talks.extend((self.name, messages) for messages in conversations)
            text = "yes" if self.name == "judge" else "<think>a b</think>three more words"
            return [[Completion([], text, "stop", None)] for _ in conversations]

    monkeypatch.setattr(evaluate, "Endpoint", Served)
    monkeypatch.setattr(evaluate, "open_chat", lambda name, **_: Served("u", evaluate.split_address(name)[0]))
    served = [f"{name}@http://u" if name in ("m", "judge") else name for name in FLAGS]
    evaluate.main(["--benchmarks", "infobench", *served, "--method", "cot"])
    cell = json.loads(Path("runs/benchmarks/report.json").read_text("utf-8"))["benchmarks"]["infobench"]["CoT"]
    assert (cell["drfr"], cell["thought_tokens"], cell["answer_tokens"]) == (1, 2, 3) and not fakes
    assert [messages[0]["role"] for name, messages in talks if name == "m"] == ["system"] * 2
    assert "the trigger alone" in Path("runs/benchmarks/report.md").read_text("utf-8")


def cell_of(name, label="I/O"):
    report = json.loads(Path("runs/benchmarks/report.json").read_text("utf-8"))
    return report["benchmarks"][name][label]


@pytest.fixture
def talks(monkeypatch):
    """What the judge and the served model m were asked: (name, messages, settings); `reply` says what they answer."""
    class Talks(list):
        def reply(self, name, messages, settings):
            return Completion([], "YES" if name == "judge" else "Dear all", "stop", None)

        def chat_of(self, name):
            def chat(conversations, **settings):
                self.extend((name, messages, settings) for messages in conversations)
                return [[self.reply(name, messages, settings)] for messages in conversations]

            return SimpleNamespace(chat=chat)

    talks = Talks()
    monkeypatch.setattr(evaluate, "open_chat", lambda name, **_: talks.chat_of(evaluate.split_address(name)[0]))

    class Served:
        def __init__(self, url, name, **_):
            self.chat = talks.chat_of(name).chat

    monkeypatch.setattr(evaluate, "Endpoint", Served)
    return talks


def test_judgements_depend_on_all_that_the_judge_was_asked(fakes, talks):
    run = ["--benchmarks", "infobench", *FLAGS, "--method", "io"]
    talks.reply = lambda name, messages, settings: Completion(
        [], "YES" if settings["max_tokens"] > 100 else "Let me", "length", None)
    evaluate.main([*run, "--judge-tokens", "8"])
    assert cell_of("infobench")["drfr"] == 0 and cell_of("infobench")["n"]["unparsable"] == 2
    evaluate.main([*run, "--judge-tokens", "1024"])
    assert cell_of("infobench")["drfr"] == 1 and cell_of("infobench")["n"]["unparsable"] == 0
    asked = len(talks)
    evaluate.main([*run, "--judge-tokens", "1024"])
    assert len(talks) == asked  # nothing has changed
    evaluate.main([*run, "--judge", "judge@http://elsewhere/v1"])
    assert len(talks) == asked + 5
    rows = [json.loads(line) for line in Path("runs/benchmarks/infobench/judgements/I-O - judge.jsonl").open()]
    assert len({(row["id"], row["question"]) for row in rows}) == len(rows) == 5  # one row each: --judgements reads it


def test_unreadable_judgements_are_asked_again_in_the_next_call(fakes, talks):
    run = ["--benchmarks", "infobench", *FLAGS, "--method", "io"]
    talks.reply = lambda *_: Completion([], "Perhaps", "stop", None)
    evaluate.main(run)
    assert cell_of("infobench")["n"] == {"asked": 2, "answered": 2, "judged": 2, "unparsable": 2}
    talks.reply = lambda *_: Completion([], "YES", "stop", None)
    evaluate.main(run)
    assert cell_of("infobench")["drfr"] == 1 and cell_of("infobench")["n"]["judged"] == 5


def test_corrected_infobench_asks_on_after_an_unreadable_reply(fakes, talks):
    talks.reply = lambda name, messages, settings: Completion(
        [], "Maybe" if len(messages) == 1 else "YES", "stop", None)
    evaluate.main(["--benchmarks", "infobench", *FLAGS, "--method", "io", "--protocol", "corrected"])
    assert cell_of("infobench")["n"] == {"asked": 2, "answered": 2, "judged": 5, "unparsable": 2}
    assert cell_of("infobench")["drfr"] == 3 / 5
    evaluate.main(["--benchmarks", "infobench", *FLAGS, "--method", "io"])
    assert cell_of("infobench")["n"]["judged"] == 2  # officially the first such reply ends an item


def test_fbbench_without_json_mode_is_judged_at_temperature_0(fakes, talks):
    refused = Completion([], "", "refused", None)
    readable = Completion([], json.dumps({"a": point(True, 1)}), "stop", None)
    talks.reply = lambda name, messages, settings: refused if "response_format" in settings else readable
    evaluate.main(["--benchmarks", "fb-bench", *FLAGS, "--method", "io"])
    calls = [(settings["temperature"], "response_format" in settings) for _, _, settings in talks]
    assert calls == [(0.0, True)] * 3 + [(0.0, False)] * 3 and cell_of("fb-bench")["n"]["unparsable"] == 0


def test_rows_are_compared_in_pairs_with_all_resamples(fakes, monkeypatch):
    class Better(FakeEngine):
        def answer(self, prompt, k):
            text = "- Nile\n- Rhine\n- Po" if self.name == "better" and "rivers" in prompt else "A note, short"
            return Completion([1], text, "stop", None)

    drawn, resample = [], evaluate.resampled_weights
    for name in ("m", "better"):
        fakes[name] = Better(name)

    def count(groups, resamples, seed):
        drawn.append((len(groups), resamples, seed))
        return resample(groups, resamples, seed)

    monkeypatch.setattr(evaluate, "resampled_weights", count)
    run = ["--benchmarks", "ifeval,cello", *FLAGS, "--resamples", "1500", "--method", "io"]
    evaluate.main(run)
    evaluate.main([*run, "--label", "Ours", "--model", "better"])
    report = json.loads(Path("runs/benchmarks/report.json").read_text("utf-8"))
    ours, plain = (report["benchmarks"]["ifeval"][label] for label in ("Ours", "I/O"))
    assert (ours["headline"], plain["headline"]) == (25, 0)  # one prompt of four
    assert report["differences"]["ifeval"]["Ours − I/O"] == {
        "value": 25, "low": ours["low"], "high": ours["high"], "n": 4}
    # Equal answers differ in no resample, though the figure itself does from one to the next.
    assert report["differences"]["cello"]["Ours − I/O"] == {"value": 0, "low": 0, "high": 0, "n": 3}
    assert report["benchmarks"]["cello"]["Ours"]["low"] < report["benchmarks"]["cello"]["Ours"]["high"]
    assert set(drawn) == {(4, 1500, 0), (3, 1500, 0)}  # the same draws for both rows, as many as asked for
    text = Path("runs/benchmarks/report.md").read_text("utf-8")
    assert "| Ours − I/O | +25.0 [" in text and "the interval includes 0 (IFEval, CELLO)" in text


SERVED = ["--model", "m@http://u", "--max-new-tokens", "99"]


def test_a_served_thought_belongs_to_the_turn(fakes, talks):
    talks.reply = lambda name, messages, settings: Completion(
        [], "<answer>Dear all</answer>", "stop", None, reasoning="a short plan")
    run = ["--benchmarks", "ifeval", *FLAGS, *SERVED]
    evaluate.main([*run, "--method", "cot"])
    cell = cell_of("ifeval", "CoT")
    assert (cell["format_failures"], cell["thought_tokens"], cell["answer_tokens"]) == (0, 3, 2)
    evaluate.main([*run, "--method", "sdc"])
    assert "a short plan" in talks[-1][1][-1]["content"]
    evaluate.main([*run, "--method", "direct"])
    assert [message["role"] for message in talks[-1][1]] == ["user"]  # no trigger: it would ask for a thought


def test_a_served_model_sees_one_system_message(fakes, talks, tmp_path):
    record = {"id": "r", "source": "own", "task": "instruction", "language": "en", "composition": "and",
              "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Write."}],
              "constraints": [{"kind": "code", "id": "punctuation:no_comma", "kwargs": {}, "text": "…",
                               "depends_on": [], "active": True}]}
    (tmp_path / "records.jsonl").write_text(json.dumps(record) + "\n")
    evaluate.main(["--benchmarks", "records.jsonl", *SERVED, "--method", "cot", "--perplexity-items", "0"])
    system, user = talks[0][1]
    assert system["role"] == "system" and system["content"].startswith("Be brief.\n") and "<think>" in system["content"]
    assert user == record["messages"][1]


def test_a_trained_row_is_listed_under_its_own_base_model(fakes, capsys):
    def run(model, label, base, out):
        evaluate.main(["--benchmarks", "ifeval", *FLAGS, "--method", "io", "--model", model, "--label", label,
                       "--base-model", f"Qwen/{base}", "--protocol", "raif", "--out", out])

    run("runs/grpo/model", "Ours", "Qwen2.5-1.5B-Instruct", "runs/a")
    run("Qwen/Qwen2.5-7B-Instruct", "I/O", "Qwen2.5-7B-Instruct", "runs/a")
    capsys.readouterr()
    evaluate.main(["--table", "1", "--runs", "runs/a"])
    lines = capsys.readouterr().out.splitlines()
    ours = [line.split("|")[3].strip() for line in lines if "| Ours |" in line and "Qwen2.5-" in line]
    assert [text.startswith("–") for text in ours] == [False, True] and ours[0].endswith("n=4")  # 1.5B, 7B
    run("runs/seed1/model", "Ours", "Qwen2.5-1.5B-Instruct", "runs/b")
    with pytest.raises(InputError, match="runs/a and runs/b both hold ifeval of row 'Ours'.*--label"):
        evaluate.main(["--table", "1", "--runs", "runs/a,runs/b"])
    run("runs/grpo/model", "Ours", "Qwen2.5-7B-Instruct", "runs/a")  # the base model put right: nothing else changes
    assert json.loads(Path("runs/a/ifeval/rows/Ours.json").read_text())["base_model"] == "Qwen/Qwen2.5-7B-Instruct"
    assert len(fakes["runs/grpo/model"].asked) == 4


def test_a_judge_is_needed(fakes):
    with pytest.raises(InputError, match="--judge"):
        evaluate.main(["--benchmarks", "cfbench", "--benchmark-dir", str(OWN), "--model", "m"])


def test_ifbench_names_what_it_cannot_score(tmp_path, fakes):
    (tmp_path / "ifbench").mkdir()
    rows = [{"key": str(k), "prompt": "No commas.", "instruction_id_list": [name], "kwargs": [{"N": n}]}
            for k, (name, n) in enumerate([("punctuation:no_comma", None), ("count:nothing_known", 3)])]
    (tmp_path / "ifbench" / "IFBench_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluate.main(["--benchmarks", "ifbench", "--benchmark-dir", str(tmp_path), "--model", "m", "--resamples", "5"])
    cell = json.loads(Path("runs/benchmarks/report.json").read_text("utf-8"))["benchmarks"]["ifbench"]["CoT"]
    assert cell["prompt_strict"] == 1 and cell["not_scored"] == ["count:nothing_known"] and cell["share_scored"] == 0.5


def test_prepare_checks_and_names_the_licence(tmp_path, capsys):
    content = {path: (OWN / path).read_bytes() for path in ("infobench/InfoBench.json", "complexbench/data_final.json")}

    def opener(address):
        return io.BytesIO(next(text for path, text in content.items() if path.split("/")[1] in address))

    with pytest.raises(InputError, match="8 items, 1150 expected"):  # the sample again
        evaluate.prepare(["complexbench"], tmp_path, opener)
    said = capsys.readouterr().out
    assert "licence MIT" in said and "none to compare with" in said
    with pytest.raises(InputError, match="ifevall: unknown"):
        evaluate.prepare(["ifevall"], tmp_path, opener)
    with pytest.raises(InputError, match="SHA-256"):  # the sample is not the published file
        evaluate.prepare(["infobench"], tmp_path, opener)
    assert not (tmp_path / "infobench").exists()

    def offline(address):
        raise OSError("no route")

    with pytest.raises(InputError, match="no route"):
        evaluate.prepare(["cfbench"], tmp_path, offline)


def test_tables_of_the_paper(tmp_path, capsys):
    limits = {"headline": [45.0, 55.0], "And_1": [0.8, 0.95], "prompt_strict": [0.1, 0.3]}
    cell = {"headline": 50.0, "intervals": limits, "And_1": 0.9, "drfr": 0.5, "prompt_strict": 0.2,
            "instruction_strict": 0.3, "prompt_loose": 0.25, "instruction_loose": 0.35,
            "settings": {"model": "runs/grpo/model"}}
    for label in ("I/O", "Ours"):
        folder = tmp_path / label.replace("/", "-")
        folder.mkdir()
        report = {"protocol": "raif", "settings": {"base_model": "Qwen/Qwen2.5-7B-Instruct"},
                  "benchmarks": {name: {label: cell} for name in [*ALL.split(","), "ifbench"]}}
        (folder / "report.json").write_text(json.dumps(report))
    said = {}
    for name in ("1", "2", "ablation", "5"):
        evaluate.main(["--table", name, "--runs", f"{tmp_path / 'I-O'},{tmp_path / 'Ours'}"])
        said[name] = capsys.readouterr().out
    assert "| Qwen2.5-7B-Instruct | I/O | 50.00 (72.82, -22.82) [45.0, 55.0] |" in said["1"]
    assert "50.00 (79.20†, -29.20)" in said["1"] and "the appendix has 76.75" in said["1"]
    assert said["1"].count("\n| ") == 2 + 29 and "| LLaMA3.1-8B-Instruct | Ours | – (13.49) |" in said["1"]
    assert "| And_1 | 90.00 (85.85, +4.15) [80.0, 95.0] | – (84.27) |" in said["2"]
    assert "| drfr | 50.00 (74.47" in said["2"]
    assert "| math 1, complex 1, SupCoT, BC | – (70.06) |" in said["ablation"]
    assert "| Ours | 50.00 [" in said["ablation"]
    assert "| Qwen2.5-7B-Instruct | Ours | 20.00 (29.82, -9.82) [10.0, 30.0] | 30.00 (30.76" in said["5"]
    (tmp_path / "Ours" / "report.json").write_text(json.dumps(report | {"protocol": "official"}))
    for name in ("1", "ablation"):
        with pytest.raises(InputError, match="--protocol raif"):
            evaluate.main(["--table", name, "--runs", str(tmp_path / "Ours")])
    evaluate.main(["--table", "2", "--runs", str(tmp_path / "Ours")])  # whose columns do not depend on the protocol


def test_a_refused_reply_on_a_rule_question_meets_nothing():
    """The rule "forbidden" would hold for a reply that names no span; a blank one names nothing because it is none."""
    benchmark = evaluate.BENCHMARKS["complexbench"]
    question = {"question": "Is it free of it?", "rule": "model_forbidden_word:tea", "dep": []}
    item = evaluate.make_item("1", [{"role": "user", "content": "Write."}], "zh", {"scoring_questions": [question]})
    assert not benchmark.readable(item, 0, " ") and benchmark.readable(item, 0, "[]")
    verdict = benchmark.verdict(item, "milk", {0: " "}, "corrected")
    assert verdict["met"] == [False] and verdict["unparsable"] == 1
