"""Stage 4: measure models on a record file or on seven public benchmarks; write report.md, report.json and PNG plots.

    python evaluate.py                                             six rows on the held-out prompts, see the end of main
    python evaluate.py --model runs/grpo/model --label Ours        one row; the report is rebuilt from all rows there
    python evaluate.py --method sdc --benchmarks my_records.jsonl  another inference method, another record file
    python evaluate.py --judge NAME[@URL] --judge-agreement FILE   accuracy, precision, recall, kappa of a judge
    python evaluate.py --prepare --benchmark-dir benchmarks        download the benchmarks, print their licences
    python evaluate.py --benchmarks ifeval,cello,cfbench,complexbench,fb-bench,followbench,infobench --model MODEL
                       --method io --judge NAME@URL                answer, judge, score
    python evaluate.py --score cello --responses FILE              score recorded answers: one JSON object on stdout
    python evaluate.py --table 1 --runs runs/a,runs/b              the paper's table with our figures beside

Decoding is greedy with one token limit for all rows. Thought and tags are removed before scoring; an answer with a
broken format counts as a format failure and is scored on what is left of it. Every share comes with its n and a
percentile-bootstrap interval over prompts; rows are compared prompt by prompt (paired bootstrap). A killed run goes
on where it stopped: the same command again.

Suffixes: N prompts, K columns (statistics of rows, differences), R bootstrap resamples, B sequences, T tokens.
"""

import ast
import hashlib
import json
import math
import re
import string
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import rewards
from model import (
    Endpoint,
    append_jsonl,
    compute_dtype,
    data_dir,
    gather_objects,
    init_distributed,
    launch,
    load_model,
    make_engine,
    make_judge,
    markdown_table,
    open_chat,
    open_run,
    pad_right,
    parse_flags,
    prompt_text,
    pyplot,
    read_jsonl,
    record_seed,
    records_path,
    render_prompt,
    split_address,
    token_batches,
    token_logprobs,
    write_atomic,
    write_jsonl,
)
from rewards import InputError

METHODS = {  # inference method -> default label of its row
    "io": "I/O",  # the plain request
    "cot": "CoT",  # asked to think, the turn opened with <think>
    "direct": "Direct",  # the same with an empty thought, closed
    "closed": "CoT closed",  # the same with the thought closed for the model after --thought-tokens
    "other": "Another's thought",  # the thought that row --thought-row wrote for another prompt
    "expert": "Expert's thought",  # the thought of the record's expert
    "sdc": "SDC",  # self-DeepClaude: a thought first, then both in one user message
    "sc": "SC",  # self-consistency; this and the next two are baselines of Table 2
    "sr": "SR",  # self-refine
    "od": "OD",  # oracle decomposition
}
ROW_ORDER = [*METHODS.values(), "SFT", "Ours direct", "Ours"]  # further labels: in alphabetical order
SPLITS = ["all", "in-distribution", "ood"]


@dataclass
class Config:
    model: str = ""  # evaluate one row: smollm2-135m, folder, hub name, or NAME@URL if served (default: six rows)
    method: Literal["", *METHODS] = ""  # how the one row is produced: see METHODS in this file (default: cot)
    label: str = ""  # name of the one row in the tables (default: the name of its method)
    benchmarks: str = ""  # ifeval,cello,... or a record file (default: runs/evolve/ or data/ heldout.jsonl)
    out: str = ""  # folder of the report, where earlier rows stay (default: runs/evaluate, or runs/benchmarks)
    base_model: str = "smollm2-135m"  # model of the rows I/O and CoT, and the judge of perplexity
    sft_model: str = "runs/sft/model"  # model of the row SFT
    ours_model: str = "runs/grpo/model"  # model of the row Ours
    family: Literal["cold", "warm"] = "cold"  # answer format: cold (think and answer tags) or warm (think tags only)
    max_new_tokens: int = 0  # token limit of every turn, one for all rows of a report (default: 200; benchmarks 4096)
    thought_model: str = ""  # sdc: take the thoughts from this model, NAME[@URL], the answers from --model
    thought_tokens: int = 80  # closed: a thought is closed after so many tokens, if the model has not closed it itself
    thought_row: str = "Ours"  # other: the finished row whose thoughts are handed on, each to another prompt
    samples: int = 10  # sc: answers per prompt, at temperature 1
    refine_turns: int = 5  # sr: at most this many improvements after the first answer
    judge: str = ""  # model that answers yes/no questions: NAME (loaded here) or NAME@http://localhost:8000/v1 (served)
    judge_tokens: int = 1024  # token limit of a benchmark judge's reply
    judge_tries: int = 3  # how often a benchmark judge is asked until its reply can be read
    judge_agreement: str = ""  # JSONL of {instruction, answer, question, label: true|false}: measure the judge on it
    limit: int = 0  # evaluate only this many records, spread evenly over the file (0 = all)
    chunk: int = 64  # prompts generated between two writes of the row file; a killed run loses at most these
    resume: bool = True  # reuse the answers a row already has; --no-resume generates them anew
    engine: Literal["hf", "vllm"] = "hf"  # rollout engine
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # arithmetic of generation
    perplexity_items: int = 64  # answers per row whose perplexity under the base model is measured (0 = none)
    score: str = ""  # score recorded answers, without a model: ifeval, cello, cfbench, complexbench, fb-bench, ...
    benchmark_dir: str = "benchmarks"  # folder that holds ifeval/, cello/ and so on, the authors' own files
    prepare: bool = False  # download the files of --benchmarks (default: all) into --benchmark-dir, and check them
    table: Literal["", "1", "2", "ablation", "5"] = ""  # print a table of the paper, ours from --runs beside
    runs: str = ""  # run folders of --table, separated by commas (default: --out)
    responses: str = ""  # with --score: JSONL of {"id": ..., "response": text or null}
    judgements: str = ""  # with --score: JSONL of {"id": ..., "question": number or null, "reply": a judge's raw text}
    protocol: Literal["official", "raif", "corrected"] = "official"  # the authors' own; RAIF's headlines; slips mended
    resamples: int = 10000  # bootstrap resamples
    seed: int = 0  # seed of the bootstrap


PRESETS = {
    "lesson": dict(benchmarks="runs/lesson/evolve/heldout.jsonl", out="runs/lesson/evaluate", max_new_tokens=120,
                   sft_model="runs/lesson/sft/model", ours_model="runs/lesson/grpo/model", perplexity_items=8),
}


# ---------------------------------------------------------------- scoring one answer


def answer_text(text, family="cold"):
    """What is scored of an assistant turn: the answer block, or else the text left after the thought, without tags.

    A thought that never ends counts as no thought: what was written is the answer.
    """
    if "</think>" not in text and "<think>" in text:
        text = text.replace("<think>", "").strip()
    return rewards.parse_response(text, family).answer


def score_item(record, text, family="cold", judged=()):
    """{"kinds", "strict", "loose"} of one assistant turn: an entry per active constraint (math: one for the result).

    As in rewards.score a blank answer meets no constraint, whatever a judge says of it.

    judged: the verdicts of a judge on the active judge constraints, in their order.
    """
    if record["task"] == "math":
        correct = rewards.math_reward(text, record["answer"]) == 2.0
        return {"kinds": ["math"], "strict": [correct], "loose": [correct]}
    answer, prompt = answer_text(text, family), record["messages"][-1]["content"]
    constraints = record["constraints"]

    def verdicts(check):
        held, said = [], iter(judged)  # as in rewards.score: false if what it depends on is; inactive ones unchecked
        for c in constraints:
            passed = not c["active"] or (next(said) and answer.strip() != "" if c["kind"] == "judge" else
                                         check(c["id"], c["kwargs"], answer, prompt=prompt))
            held.append(passed and all(held[k] for k in c["depends_on"]))
        return [holds for holds, c in zip(held, constraints, strict=True) if c["active"]]

    kinds = [c.get("id", "judge") for c in constraints if c["active"]]
    return {"kinds": kinds, "strict": verdicts(rewards.check), "loose": verdicts(rewards.check_loose)}


def repetition(tokens):
    """Share of 4-grams of `tokens` that occurred before in it (0 for fewer than four tokens)."""
    grams = list(zip(tokens, tokens[1:], tokens[2:], tokens[3:], strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


@torch.no_grad()
def answer_perplexity(model, tokenizer, records, answers, token_budget=4096):
    """exp(mean negative log-likelihood per token) of the answers after the plain requests; None if all are blank."""
    pairs = []
    for record, answer in zip(records, answers, strict=True):
        prompt = render_prompt(tokenizer, record["messages"], "io", language=record.get("language", "en")).ids
        response = tokenizer(answer, add_special_tokens=False)["input_ids"]
        if response:
            pairs.append((prompt, response))
    total, count = 0.0, 0
    for batch in token_batches([len(prompt) + len(response) for prompt, response in pairs], token_budget):
        ids_BT, mask_BT = pad_right([pairs[i][0] + pairs[i][1] for i in batch])
        start_B = torch.tensor([len(pairs[i][0]) for i in batch], device=ids_BT.device)
        total -= token_logprobs(model, ids_BT, mask_BT, start_B).double().sum().item()
        count += sum(len(pairs[i][1]) for i in batch)
    return math.exp(total / count) if count else None


# ---------------------------------------------------------------- statistics


def bootstrap(values_NK, weights_NK=None, *, resamples=10000, seed=0):
    """Weighted means of the columns and their 95 % percentile-bootstrap limits over rows (prompts).

    Returns (estimate_K, low_K, high_K). The statistic is sum(values) / sum(weights) of a resample, so for a share per
    constraint values are constraints met and weights constraints asked. All columns see the same resamples: the
    difference of two rows of the table, taken per prompt, is one more column, and its interval is the paired one.
    """
    values_NK = np.asarray(values_NK, dtype=np.float64)
    weights_NK = np.ones_like(values_NK) if weights_NK is None else np.asarray(weights_NK, dtype=np.float64)
    n, rng, parts = len(values_NK), np.random.default_rng(seed), []
    for start in range(0, resamples, 1000):  # a thousand at a time bounds the memory
        # How often each prompt is drawn; faster than drawing N prompts for each resample.
        counts_RN = rng.multinomial(n, np.full(n, 1 / n), size=min(1000, resamples - start)).astype(np.float64)
        parts.append((counts_RN @ values_NK) / (counts_RN @ weights_NK))
    low_K, high_K = np.percentile(np.concatenate(parts), [2.5, 97.5], axis=0)
    return values_NK.sum(0) / weights_NK.sum(0), low_K, high_K


def spread(items, n):
    """`n` of the items at even distances (all of them if there are fewer)."""
    return [items[k * len(items) // n] for k in range(n)] if n < len(items) else list(items)


# ---------------------------------------------------------------- how good a judge is


def judge_agreement(judge, path, limit=0):
    """Verdicts of a judge against labels: ({accuracy, precision, recall, kappa, n …}, rows with `verdict` added).

    Positive is yes. An unreadable verdict counts as no, and in `unreadable`. kappa is Cohen's; a rate is None where
    its denominator is 0.
    """
    rows = []
    for number, row in rewards.json_lines(path):
        for field, kind, form in (("instruction", str, "a text"), ("answer", str, "a text"),
                                  ("question", str, "a yes/no question"), ("label", bool, "true or false")):
            if not isinstance(row, dict) or not isinstance(row.get(field), kind):
                raise InputError(f"{path}:{number}: field {field!r}: missing or of another type; give {form}")
        rows.append(row)
    rows = spread(rows, limit or len(rows))
    verdict_N = np.array(judge([(row["instruction"], row["answer"], row["question"]) for row in rows]))
    label_N = np.array([row["label"] for row in rows])

    def ratio(part, whole):
        return float(part / whole) if whole else None

    both, agreed = (verdict_N & label_N).sum(), (verdict_N == label_N).mean()
    chance = verdict_N.mean() * label_N.mean() + (1 - verdict_N.mean()) * (1 - label_N.mean())
    report = {"accuracy": float(agreed), "precision": ratio(both, verdict_N.sum()),
              "recall": ratio(both, label_N.sum()), "kappa": ratio(agreed - chance, 1 - chance), "n": len(rows),
              "labelled_yes": int(label_N.sum()), "judged_yes": int(verdict_N.sum()), "unreadable": judge.unreadable}
    return report, [{**row, "verdict": bool(verdict)} for row, verdict in zip(rows, verdict_N, strict=True)]


# ---------------------------------------------------------------- the seven benchmarks: their files
#
# Each benchmark is three functions: `load` reads the authors' own files into items, `verdict` judges one answer from
# the raw judge replies, `aggregate` turns the verdicts into the published metrics. An item has id, messages (what the
# model sees), language, group (resampled together), questions (what a judge is asked: [] nothing, [None] once,
# [0, 1, ...] once each), row (the authors' record) and, where the record has them, plan (its sub-questions).


def checked(path, number, row, **kinds):
    """`row` if it is an object with these fields of these types, else InputError `file:number: field ...`."""
    for name, kind in kinds.items():
        if not isinstance(row, dict) or name not in row or not isinstance(row[name], kind):
            names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            raise InputError(f"{path}:{number}: field {name!r}: missing or of another type; this benchmark's file has "
                             f"{names} there (--prepare downloads the files)")
    return row


def json_rows(path, **kinds):
    """(position from 1, row) of a file that is one JSON list; NaN is allowed, as in CELLO's files."""
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); --benchmark-dir is the folder that holds "
                         "ifeval/, cello/ and so on; --prepare downloads the files") from None
    except ValueError as error:
        raise InputError(f"{path}: is not JSON ({error}); --prepare downloads the file anew") from None
    if not isinstance(rows, list):
        raise InputError(f"{path}: holds no list; --prepare downloads the file anew")
    return [(number, checked(path, number, row, **kinds)) for number, row in enumerate(rows, 1)]


def benchmark_item(key, messages, language, row, questions=(), group=None, **more):
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    return {"id": str(key), "messages": messages, "language": language, "questions": list(questions),
            "group": str(key if group is None else group), "row": row, **more}


def load_ifeval(folder, path="ifeval/input_data.jsonl"):
    kinds = {"key": (int, str), "prompt": str, "instruction_id_list": list, "kwargs": list}
    items = []
    for number, row in rewards.json_lines(folder / path):
        checked(folder / path, number, row, **kinds)
        known = [error is None for error in map(unscored, row["instruction_id_list"], row["kwargs"])]
        items.append(benchmark_item(row["key"], row["prompt"], "en", row, known=known))
        if len(row["kwargs"]) != len(row["instruction_id_list"]) or path.startswith("ifeval") and not all(known):
            wrong = next(filter(None, map(unscored, row["instruction_id_list"], row["kwargs"])), "one per instruction")
            raise InputError(f"{folder / path}:{number}: field 'kwargs': {wrong}; --prepare downloads the file anew")
    return items


def unscored(name, kwargs):
    """Why rewards.check cannot score this constraint; None if it can."""
    try:
        rewards.check(name, kwargs, "x", mode="compat")
    except ValueError as error:
        return error
    return None


def load_ifbench(folder):
    return load_ifeval(folder, "ifbench/IFBench_test.jsonl")  # kinds that CONSTRAINTS has not are not scored


def load_cello(folder):
    paths, items = sorted((folder / "cello").glob("*.json")), []
    if not paths:
        raise InputError(f"{folder / 'cello'}: no *.json there; --benchmark-dir is the folder that holds cello/")
    criteria = {name: list for name in ("Count_limit", "Answer_format", "Task_prescribed_phrases",
                                        "Input_depdent_query", "histories")}
    for path in paths:
        for _, row in json_rows(path, Instruction=str, Instruction_id=str, lang=str, **criteria):
            turns = [text for pair in row["histories"] for text in pair] + [row["Instruction"]]
            messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
            items.append(benchmark_item(row["Instruction_id"], messages, "zh", row, file=path.stem))
    return items


def load_cfbench(folder):
    kinds = {"idx": (int, str), "prompt": str, "split": str, "criteria": list}
    return [benchmark_item(row["idx"], row["prompt"], "zh", row, [None], plan=[entry[0] for entry in row["criteria"]])
            for _, row in json_rows(folder / "cfbench" / "cfbench_data.json", **kinds)]


def load_complexbench(folder):
    path, kinds = folder / "complexbench" / "data_final.json", {"main_id": (int, str), "instruction": str,
                                                                "category": str, "scoring_questions": list}
    for number, row in (rows := json_rows(path, **kinds)):
        for question in row["scoring_questions"]:
            checked(path, number, question, question=str, rule=(str, type(None)), dep=list)
            if any(type(k) is not int or not 0 <= k < len(row["scoring_questions"]) for k in question["dep"]):
                raise InputError(f"{path}:{number}: field 'dep': {question['dep']} are not positions of questions; "
                                 "--prepare downloads the file anew")
    return [benchmark_item(row["main_id"], row["instruction"], "zh", row, range(len(row["scoring_questions"])),
                           group=row.get("group"), plan=[question["question"] for question in row["scoring_questions"]])
            for _, row in rows]


def load_fbbench(folder):
    path = folder / "fb-bench" / "fb_bench_dataset_v3.json"
    kinds = {"bench_type": str, "task_type": str, "user_query": str, "origin_first_response": str, "feedback": str,
             "checklist": list}
    items = []
    for number, row in json_rows(path, **kinds):
        messages = [{"role": role, "content": row[name]} for role, name in
                    (("user", "user_query"), ("assistant", "origin_first_response"), ("user", "feedback"))]
        plan = [point if isinstance(point, str) else point[0] for point in row["checklist"]]
        items.append(benchmark_item(number - 1, messages, "zh", row, [None], plan=plan))
    return items


FOLLOWBENCH_TYPES = ("content", "situation", "style", "format", "example", "mixed")


def load_followbench(folder):
    items = []
    for language, name in (("en", "data"), ("zh", "data_zh")):
        for kind in FOLLOWBENCH_TYPES:
            path = folder / "followbench" / name / f"{kind}_constraints.json"
            if not path.exists():
                continue
            steps = {}  # example -> its instructions of level 0, 1, ..., as the judge is shown them
            for _, row in json_rows(path, example_id=int, level=int, instruction=str, source=str, category=str):
                steps.setdefault(row["example_id"], []).append(row["instruction"])
                if row["level"]:
                    group = f"{language}/{kind}/{row['example_id']}"
                    by_rule = kind == "example" or followbench_rule(row, language) is not None
                    items.append(benchmark_item(f"{group}/{row['level']}", row["instruction"], language, row,
                                                [] if by_rule else [None], group, kind=kind,
                                                steps=steps[row["example_id"]][:]))
    if not items:
        raise InputError(f"{folder / 'followbench'}: no data/*_constraints.json or data_zh/*_constraints.json there; "
                         "--benchmark-dir is the folder that holds followbench/")
    return items


def load_infobench(folder):
    path, items = folder / "infobench" / "InfoBench.json", []
    for number, row in rewards.json_lines(path):  # JSON Lines in spite of its name
        checked(path, number, row, id=(str, int), instruction=str, input=str, subset=str, decomposed_questions=list)
        prompt = row["instruction"] + (f"\n{row['input']}" if row["input"] else "")
        questions = row["decomposed_questions"]
        items.append(benchmark_item(row["id"], prompt, "en", row, range(len(questions)), plan=questions))
    return items


# ---------------------------------------------------------------- the seven benchmarks: verdicts and metrics
#
# verdict(item, answer, replies, protocol): `answer` is the text without thought and tags, None = not answered;
# `replies` maps a question to the judge's raw reply. It returns a dict with judged and unparsable (replies counted),
# or "left_out": True where the authors drop the item. aggregate(rows, protocol): metrics over (item, verdict) pairs.


def mean(values):
    """Mean of the values that are not None, in the order given; None without any (NaN in the authors' code)."""
    values = [value for value in values if value is not None]
    return float(sum(values) / len(values)) if values else None


def ifeval_verdict(item, answer, replies, protocol):
    checks = list(zip(item["row"]["instruction_id_list"], item["row"]["kwargs"], strict=True))
    strict = [answer is not None and rewards.check(name, kwargs, answer, mode="compat") for name, kwargs in checks]
    loose = [met or answer is not None and rewards.check_loose(name, kwargs, answer, mode="compat")
             for met, (name, kwargs) in zip(strict, checks, strict=True)]
    return {"strict": strict, "loose": loose}


def ifeval_metrics(rows, protocol):
    metrics = {}
    for mode in ("strict", "loose"):
        metrics[f"prompt_{mode}"] = mean([all(verdict[mode]) for _, verdict in rows])
        metrics[f"instruction_{mode}"] = mean([met for _, verdict in rows for met in verdict[mode]])
    metrics["headline"] = percent_of(metrics["prompt_loose" if protocol == "raif" else "prompt_strict"])
    kinds = {}
    for item, verdict in rows:
        for name, met in zip(item["row"]["instruction_id_list"], verdict["strict"], strict=True):
            kinds.setdefault(name, []).append(met)
    return metrics | {"kinds": {name: mean(kinds[name]) for name in sorted(kinds)}}


def ifbench_verdict(item, answer, replies, protocol):
    return ifeval_verdict(item, answer, replies, protocol) if all(item["known"]) else {}


def ifbench_metrics(rows, protocol):
    """IFEval's four, over the prompts of which every kind can be scored, and what cannot."""
    scored = [(item, verdict) for item, verdict in rows if verdict]
    metrics, names = ifeval_metrics(scored, protocol), [name for item, _ in rows
                                                        for name in item["row"]["instruction_id_list"]]
    unknown = {name for item, _ in rows
               for name, known in zip(item["row"]["instruction_id_list"], item["known"], strict=True) if not known}
    four = [metrics[name] for name in ("prompt_strict", "instruction_strict", "prompt_loose", "instruction_loose")]
    share = sum(len(verdict["strict"]) for _, verdict in scored) / len(names) if names else None
    return metrics | {"headline": percent_of(mean(four)), "not_scored": sorted(unknown), "share_scored": share}


def percent_of(share):
    return None if share is None else 100 * share


# CELLO. A criterion that is not asked is None. Odd on purpose, as in the authors' scorer: see the comments.


def first_criterion(criteria, names):
    """(criterion, limit) of the first entry that is one of `names`; None if there is none or a NULL stands before."""
    for entry in criteria:
        if entry["criterion"] in names:
            return entry["criterion"], entry["limit"]
        if entry["criterion"] == "NULL":
            return None
    return None


def share_present(text, criteria):
    """Share of the required substrings that occur (a bare string is gone through character by character)."""
    found = first_criterion(criteria, ("keywords",))
    return found and sum(word in text for word in found[1]) / len(found[1])


def can_be_read(text, form):
    """0 or 1: can the text be read as dict (also asked for as json), list, tuple, xml or yaml?"""
    import xml.etree.ElementTree as ElementTree

    import yaml

    try:
        if form in ("json", "dict", "list", "tuple"):  # literals of Python, not JSON: true and null do not pass
            return int(isinstance(ast.literal_eval(text), {"list": list, "tuple": tuple}.get(form, dict)))
        if form == "xml":
            ElementTree.fromstring(text)
        elif form == "yaml":
            yaml.safe_load(text)
        return int(form in ("xml", "yaml"))  # an unknown form, ["xml"] in three records, is never met
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError, ElementTree.ParseError, yaml.YAMLError):
        return 0


def character_bleu(text, reference):
    """Corpus BLEU-4 over characters, uniform weights, no smoothing: 0 as soon as one n-gram order has no match."""
    logs = 0.0
    for n in range(1, 5):
        own = Counter(text[i : i + n] for i in range(len(text) - n + 1))
        given = Counter(reference[i : i + n] for i in range(len(reference) - n + 1))
        if not (matches := sum((own & given).values())):
            return 0.0
        logs += math.log(matches / (len(text) - n + 1)) / 4
    return math.exp(logs + min(0.0, 1 - len(reference) / len(text)))


def sample_score(text, criteria):
    """Best of the entries that count samples. An entry of another kind repeats the last one's test (on a text that a
    table test may have cut), and before any test it ends the count as not asked."""
    mode, scores = None, []
    for entry in criteria:
        if entry["criterion"] in ("sample-table", "sample-min", "sample-number"):
            mode, limit = entry["criterion"], entry["limit"]
        elif entry["criterion"] == "NULL" or mode is None:
            return None
        if mode == "sample-min":
            scores.append(sum(text.count(part) >= count for part, count in limit) / len(limit))
        elif mode == "sample-table":
            if "|" in text:
                text = text[text.index("|") : text.rindex("|") + 1]
            scores.append(int("|" in text and text.count("\n") == limit + 1))  # header, ruler and `limit` rows
        else:
            numbers = {float(digits) for digits in re.findall(r"\d+", text)}
            scores.append(int(limit in numbers and max(numbers) == limit))
    return max(scores, default=None)


def count_score(text, row, previous):
    """Mean of the asked ones of four: words, samples, sentences, revision. `previous`: the answer to be revised."""
    criteria, chinese, parts = row["Count_limit"], row["lang"] == "ch", [sample_score(text, row["Count_limit"])]
    if found := first_criterion(criteria, ("word-max", "word-min", "word-exact", "word-min-max")):
        n = len(re.findall("[\u4e00-\u9fa5]", text)) if chinese else sum(
            re.search("[A-Za-z0-9]", word) is not None for word in text.split())
        mode, limit = found
        over = mode == "word-max" and n > limit
        parts.append(1 - (n - limit) / n if over else n / limit if mode == "word-min" and n < limit else 1)
    if found := first_criterion(criteria, ("sentence-max", "sentence-min", "sentence-min-max", "sentence-exact")):
        # A Chinese sentence is a run of other characters and its end mark; only the last two characters are looked for,
        # so that a text without any mark is scanned once.
        n = len(re.findall("[^。！？；\n][。！？；\n]", text) if chinese else rewards.text_of(text).punkt_sentences)
        mode, limit = found
        if mode == "sentence-min":
            parts.append(min(1, n / limit))
        elif mode != "sentence-max":  # that one always ends as not asked
            low, high = limit if mode == "sentence-min-max" else (limit, limit)
            parts.append(int(low <= n <= high))
    if previous is not None and (found := first_criterion(criteria, ("revise",))):
        longer = len(text) - len(previous)
        parts.append(int(longer >= 0 if found[1] == "longer" else longer <= 0))
    return mean(parts)


def cello_verdict(item, answer, replies, protocol):
    row = item["row"]
    if answer is None:
        return {"scores": [0.0] * 4}  # on all four criteria, asked or not
    asked = first_criterion(row["Answer_format"], ("resolve",))
    form = mean([asked and can_be_read(answer, asked[1]), share_present(answer, row["Answer_format"])])
    # The authors append each answer to the history before scoring, so that a revision is compared with itself.
    previous = answer if protocol != "corrected" else row["histories"][-1][1] if row["histories"] else None
    query = share_present(answer, row["Input_depdent_query"])
    source = row.get("input_text")
    if query and isinstance(source, str) and source != "NULL":
        query *= 1 - character_bleu(answer, source)
    return {"scores": [form, query, share_present(answer, row["Task_prescribed_phrases"]),
                       count_score(answer, row, previous)]}


def cello_metrics(rows, protocol):
    tasks, criteria = {}, {}
    for task in sorted({item["file"] for item, _ in rows}):
        scores = [verdict["scores"] for item, verdict in rows if item["file"] == task]
        criteria[task] = [mean(column) for column in zip(*scores, strict=True)]
        tasks[task] = mean(criteria[task])  # of the criterion means, not of the samples' own means
    structure = mean([tasks.pop(name, None) for name in ("Structure_None", "Structure_hard", "Structure_simple")])
    tasks |= {"Structure": structure} if structure is not None else {}
    instruction = mean([tasks.get(name) for name in ("extraction", "Planning", "meta_prompt",
                                                     "brainstorming_single_round", "writing_single_round")])
    inputs = mean([tasks.get(name) for name in ("keywords_extraction", "closed_qa", "Summarization", "Structure",
                                                "brainstorming_multi_rounds", "writing_multi_rounds")])
    average = mean([instruction, inputs])
    names = ("answer_format", "input_dependent", "task_prescribed", "count_limit")
    return {"average": average, "complex_instruction": instruction, "complex_input": inputs,
            "headline": percent_of(average), "tasks": tasks,
            "criteria": dict(zip(names, map(mean, zip(*criteria.values(), strict=True)), strict=True))}


# CFBench. Scores are rounded to two decimals by numpy at every step, comparisons with 0.8 are strict.


def rounded_mean(values):
    return float(np.round(np.mean(values), 2)) if len(values) else None


def is_number(text):
    try:
        float(text)
    except ValueError:
        return False
    return True


def cfbench_points(reply, criteria):
    """The judge's 0 or 1 for each check point, or None: lines must repeat the points verbatim, in order."""
    fields = [part.split("\t") for part in reply.split("\n\n")]
    if [field[0] for field in fields] != criteria or any(len(field) != 2 for field in fields):
        return None
    scores = [float(field[1]) if is_number(field[1]) else -1.0 for field in fields]
    return scores if all(score in (0, 1) for score in scores) else None


def cfbench_verdict(item, answer, replies, protocol):
    reply, priorities = replies.get(None), [entry[1] for entry in item["row"]["criteria"]]
    scores = reply and cfbench_points(reply, [entry[0] for entry in item["row"]["criteria"]])
    if scores:
        csr = rounded_mean(scores)
        secondary = [score for score, priority in zip(scores, priorities, strict=True) if priority == "次需"]
        primary = [score for score, priority in zip(scores, priorities, strict=True) if priority == "主需"]
        if 0 in primary:
            psr = 0
        elif not primary:
            psr = int(csr > 0.8)
        else:
            psr = int(not secondary or 0.5 + 0.5 * rounded_mean(secondary) > 0.8)
        return {"CSR": csr, "ISR": int(csr == 1), "PSR": psr, "judged": 1, "unparsable": 0}
    # The fallback reads line by line. The authors keep only the ones, so that a single one makes everything 1, and
    # stop at a score that is no number; with "corrected" zeros stay and a point without a score is 0.
    found = [field[1] for field in (line.split("\t") for line in (reply or "").split("\n")) if len(field) == 2]
    if protocol == "corrected":
        scores = [float(score) for score in found if is_number(score) and float(score) in (0, 1)]
        scores += [0.0] * (len(priorities) - len(scores))
    else:
        scores = [1.0 for score in found if float(score) == 1] if all(map(is_number, found)) else []
    csr = rounded_mean(scores or [0.0])
    return {"CSR": csr, "ISR": int(csr == 1), "PSR": int(csr > 0.8), "judged": int(reply is not None),
            "unparsable": int(reply is not None)}


def cfbench_metrics(rows, protocol):
    metrics = {}
    for split in ("", "easy", "hard"):
        for name in ("CSR", "ISR", "PSR"):
            values = [verdict[name] for item, verdict in rows if split in ("", item["row"]["split"])]
            metrics[f"{name}_{split}".rstrip("_")] = rounded_mean(values)
    shown = ("CSR", "ISR", "PSR") if protocol == "raif" else ("PSR",)  # Table 1: the mean of the three
    return metrics | {"headline": percent_of(mean([metrics[name] for name in shown]))}


# ComplexBench. A question with a rule: a judge's reply names the spans of the answer that the rule is run on.

FULL_WIDTH = str.maketrans("!#$%&()*,.:;?\\^“”", "！＃＄％＆（）＊，。：；？＼＾\"\"")


def span_list(reply, answer):
    """The spans an extraction reply names: `all` is the whole answer, None no span, several are set apart by ||."""
    if reply is None or answer is None:
        return []
    reply = reply.rpartition("【模型回复中评分问题的评测对象】\n")[2]
    for note in ("\n\n请注意", "\n\n**注意", "\n\n注意"):
        reply = reply.rsplit(note, 1)[0]
    mark = next((mark for mark in ("评分对象：", "评测对象：", "：") if mark in reply), None)
    target = reply.rpartition(mark)[2] if mark else reply
    if target.startswith("all"):
        return [answer]
    return [] if "None" in target else [span.strip() for span in target.split("||")]


def unquoted(span):
    """Without leading line breaks and one pair of outer quotes or back-ticks, of any of the kinds on either side."""
    span = span.lstrip("\n")
    return span[1:-1] if span and span[0] in "\"“`" and span[-1] in "\"”`" else span


def first_object(text):
    """The first balanced {...} of a text; a closing brace too many before it spoils it, as in the authors' scan."""
    depth = start = 0
    for i, character in enumerate(text):
        if character == "{":
            start, depth = (i if depth == 0 else start), depth + 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return text[start : i + 1]
    return ""


def span_tests():
    """Test name -> (argument form, does the span meet the argument?); spans may come with full-width punctuation."""
    def wide(text):
        return text.translate(FULL_WIDTH)

    def opens(span, start):
        return span.startswith(wide(start))

    def closes(span, end):
        return any(span.endswith(wide(end) + mark) for mark in ("", "。", "？"))

    def count(span, words):
        return sum(wide(word) in span for word in words)

    def json_keys(span, keys):
        keys = [key for key in keys if key != ""]
        try:
            value = json.loads(first_object(span))
        except (ValueError, RecursionError):
            return False
        return isinstance(value, dict) and all(key in value for key in keys) and len(keys) in (0, len(value))

    def marks(span, allowed):
        allowed = [wide(mark) for mark in allowed]
        return all(wide(mark) in allowed for mark in string.punctuation if wide(mark) in span)

    def within(n, limits):
        return limits[0] <= n <= limits[1]

    return {
        "keyword": ("words", lambda span, words: count(span, words) == len(words)),
        "keyword_num": ("words", lambda span, words: within(count(span, words[2:]), [int(n) for n in words[:2]])),
        "forbidden_word": ("words", lambda span, words: count(span, words) == 0),
        "startswith": ("text", opens),
        "endswith": ("text", closes),
        "not_startswith": ("text", lambda span, start: not opens(span, start)),
        "not_endswith": ("text", lambda span, end: not closes(span, end)),
        "length": ("literal", lambda span, limits: within(len(span), limits)),
        "length_word": ("literal", lambda span, limits: within(len(span.split()), limits)),
        "constraint_punc": ("words", marks),
        "match": ("line", lambda span, text: span in (text, text + "。", text + ".")),
        "Json": ("literal", json_keys),
    }


SPAN_TESTS = span_tests()
# Rules on named spans, in the order in which the authors look for the names inside the rule text. Options: "each" all
# spans, not only the first; "wide" full-width punctuation first; "quotes" also without quotes, "bare" only without.
MODEL_RULES = {
    "model_keyword_each": "keyword each wide", "model_keyword_num_each": "keyword_num each untrimmed",
    "model_keyword_num": "keyword_num", "model_keyword": "keyword", "model_forbidden_word_each":
    "forbidden_word each wide", "model_forbidden_word": "forbidden_word", "model_number_each": "number",
    "model_length_each": "length each quotes", "model_length_word_each": "length_word each quotes",
    "model_length_word": "length_word quotes", "model_length": "length quotes",
    "model_startswith_each": "startswith each wide", "model_starts_with_list_each": "startswith pairs wide",
    "model_startswith": "startswith wide", "model_endswith_each": "endswith each wide quotes butlast",
    "model_endswith": "endswith wide", "model_constraint_punc_each": "constraint_punc each wide quotes",
    "model_constraint_punc": "constraint_punc bare", "model_not_startswith": "not_startswith wide",
    "model_not_endswith_each": "not_endswith each wide", "model_not_endswith": "not_endswith wide",
}
PLAIN_RULES = {"keyword": "keyword", "match": "match", "constraint_punc": "constraint_punc",
               "forbidden_word": "forbidden_word", "startswith": "startswith", "not endswith": "not_endswith",
               "endswith": "endswith", "length_word": "length_word", "length": "length", "Json": "Json"}
UNKNOWN = 2  # the authors' value for a rule they do not know: false in DRFR, but what depends on it stays


def rule_argument(rule, name, form, trim=True):
    """What stands after `name:` at the end of the rule text; None if it cannot be read (there the authors' code stops).

    A list of words has to stand on the last line; texts and literals may run over several.
    """
    bracket = form in ("words", "literal")
    found = re.search(name + (r":(\[.*?\])$" if bracket else ":(.*?)$"), rule,
                      0 if form == "line" or form == "words" and trim else re.DOTALL)
    if not found:
        return None
    if form == "words":
        words = found[1].strip("[]").split(",")
        return [word.strip() for word in words] if trim else words
    if form == "literal":
        try:
            return ast.literal_eval(found[1])
        except (ValueError, SyntaxError):
            return None
    return found[1]


def model_rule(name, rule, spans):
    """A rule on spans: True, False or UNKNOWN."""
    test, *options = MODEL_RULES[name].split()
    if not spans or spans == [""]:
        return test.startswith(("forbidden", "not_"))
    form, meets = SPAN_TESTS.get(test, ("literal", None))
    argument = rule_argument(rule, name, "words" if "pairs" in options else form, trim="untrimmed" not in options)
    if argument is None:
        return UNKNOWN
    if test == "number":
        return argument[0] <= len(spans) <= argument[1]
    arguments = [argument] * len(spans)
    if "pairs" in options:
        if len(argument) != len(spans):
            return False
        arguments = argument
    elif "each" not in options:
        spans = spans[:1]
    elif "butlast" in options and len(spans) > 1:
        spans = spans[:-1]
    for span, wanted in zip(spans, arguments, strict=False):
        if span == "" and ("each" in options or "pairs" in options):
            continue
        span = span.translate(FULL_WIDTH) if "wide" in options else span
        tried = {"quotes": [span, unquoted(span)], "bare": [unquoted(span)]}
        if not any(meets(text, wanted) for text in next((tried[o] for o in options if o in tried), [span])):
            return False
    return True


def opens_and_closes(rule, span):
    both = re.search(r"startswith:(.*?)\n(?:model_)?endswith:(.*?)$", rule, re.DOTALL)
    span = span.translate(FULL_WIDTH)
    return UNKNOWN if not both else SPAN_TESTS["startswith"][1](span, both[1]) and SPAN_TESTS["endswith"][1](
        span, both[2])


def plain_rule(rule, span):
    """A rule on one span; a blank one, and any that contains None, counts as absent."""
    names = [name for name in PLAIN_RULES if (name + ":" if name.startswith("length") else name) in rule]
    if "keyword_num" in rule and "forbidden_word" not in rule:
        names = [name for name in names if name != "keyword"]
    if not names:
        return UNKNOWN
    if span == "" or "None" in span:
        return names[0] in ("forbidden_word", "not endswith")
    if names[0] == "keyword" and "forbidden_word" in names:
        return UNKNOWN  # the authors' patterns do not fit this pair: their code stops
    if names[0] == "startswith" and "endswith" in rule:
        return opens_and_closes(rule, span)
    form, meets = SPAN_TESTS[PLAIN_RULES[names[0]]]
    argument = rule_argument(rule.strip() if names[0] == "Json" else rule, names[0], form)
    if argument is None:
        return UNKNOWN
    return bool(meets(span if names[0] == "Json" else span.translate(FULL_WIDTH), argument))


def complexbench_rule(rule, spans):
    """True, False or UNKNOWN for a rule text and the spans it is about."""
    if "model_keyword_num_each" in rule and "model_forbidden_word_each" in rule and "model_keyword_each" not in rule:
        if not spans or spans == [""]:
            return False
        both = re.search(r"model_keyword_num_each:(\[.*?\])\nmodel_forbidden_word_each:(\[.*?\])$", rule, re.DOTALL)
        if not both:
            return UNKNOWN
        wanted, banned = (part.strip("[]").split(",") for part in both.groups())
        return all(SPAN_TESTS["keyword_num"][1](span, wanted) and SPAN_TESTS["forbidden_word"][1](span, banned)
                   for span in spans if span)
    for name in MODEL_RULES:
        if (name + ":" if name == "model_length" else name) in rule:
            if name == "model_startswith" and "model_endswith" in rule:
                return bool(spans and spans != [""]) and opens_and_closes(rule, spans[0])
            return model_rule(name, rule, spans)
    if "model" in rule or "each" in rule:
        return UNKNOWN
    return plain_rule(rule, unquoted(spans[0])) or plain_rule(rule, spans[0]) if spans else plain_rule(rule, "")


def read_yes(reply):
    """(是 or 否 as a bool, could it be read?): one "答案：是" or "答案：否" decides, else 是 without any 否."""
    if len(said := re.findall("答案：(是|否)", reply)) == 1:
        return said[0] == "是", True
    return "是" in reply and "否" not in reply, ("是" in reply) != ("否" in reply)


def complexbench_verdict(item, answer, replies, protocol):
    raw, unparsable = [], 0
    for k, question in enumerate(item["row"]["scoring_questions"]):
        reply = replies.get(k)
        if question["rule"] is None:
            met, readable = read_yes(reply) if reply is not None else (False, True)
            unparsable += not readable
        else:
            missing = protocol == "corrected" and None in (reply, answer)  # the authors' "forbidden" rules then hold
            met = not missing and complexbench_rule(question["rule"], span_list(reply, answer))
        raw.append(met)
    # One step only: the raw verdicts of `dep` count, not the adjusted ones.
    met = [False if any(raw[d] is False for d in question["dep"]) else value
           for value, question in zip(raw, item["row"]["scoring_questions"], strict=True)]
    return {"met": met, "judged": len(replies), "unparsable": unparsable}


def complexbench_metrics(rows, protocol):
    values, groups = {}, {}  # category, its parts and all -> verdicts; group of items -> [(record, all hold?), ...]
    for item, verdict in rows:
        category = item["row"]["category"]
        for key in dict.fromkeys(("drfr", category, category.rsplit("_", 1)[0], category.split("_")[0])):
            values.setdefault(key, []).extend(met is True for met in verdict["met"])
        held = all(met is not False for met in verdict["met"])
        groups.setdefault(item["group"], []).append((item["row"], held))
    shares = {key: mean(values[key]) for key in sorted(values)}
    coherent = {}  # groups whose first item has one Selection question, or several; a group holds if all its items do
    for name, depths in (("single", (1,)), ("multiple", range(2, 100))):
        chosen = [[held for _, held in group] for group in groups.values()
                  if sum("Selection" in (question.get("composition_types") or ())
                         for question in group[0][0]["scoring_questions"]) in depths]
        origin, whole = mean([held for group in chosen for held in group]), mean([all(group) for group in chosen])
        coherent |= {f"{name}_origin": origin, f"{name}_coherent": whole,
                     f"{name}_relative_drop": (origin - whole) / origin if origin else None}
    # "Selection" pools Selection and Selection_and_Chain, as the authors do.
    return {"drfr": None, **shares, "headline": percent_of(shares.get("drfr")), "coherent": coherent}


# FB-Bench. The weights are those the judge repeats, not the data's; points may be missing, added or reworded.

REPETITIVE = "$REPETITIVE PATTERNS$"  # stored in place of a judgement that was refused; scored 0


def fbbench_score(reply):
    """Item score of a judgement {check point: {评判理由, 评判结果, weight}}; None if it cannot be read."""
    if REPETITIVE in reply:
        return 0.0
    try:
        points = json.loads(reply)
    except (ValueError, RecursionError):
        return None
    if not isinstance(points, dict):
        return None
    score, certain = 0.0, False
    for name, point in points.items():
        if not (name and isinstance(point, dict) and point.get("评判结果") in ("是", "否") and "weight" in point
                and isinstance(point.get("评判理由"), str) and point["评判理由"]):
            return None
        weight = point["weight"]
        if weight is not None and not (isinstance(weight, int | float) and 0 < weight <= 1):
            return None
        if point["评判结果"] == "是" and not certain:
            certain = weight is None  # a point without weight decides at once
            score = 1.0 if certain else score + weight
    return score if score <= 1 + 1e-6 else None


def fbbench_verdict(item, answer, replies, protocol):
    reply = replies.get(None) if answer is not None else None
    score = None if reply is None else fbbench_score(reply)
    judged = int(reply is not None)
    verdict = {"score": score, "judged": judged, "unparsable": int(judged and score is None)}
    if score is None:  # the authors leave the item out
        verdict |= {"score": 0.0} if protocol == "corrected" else {"left_out": True}
    return verdict


def fbbench_metrics(rows, protocol):
    cells = {}
    for item, verdict in rows:
        if not verdict.get("left_out"):
            cells.setdefault((item["row"]["bench_type"], item["row"]["task_type"]), []).append(verdict["score"])
    cells = {key: mean(scores) for key, scores in cells.items()}

    def average(chosen):
        value = mean([cells[key] for key in cells if key[0] in chosen])
        if value is None or round(value, 4) == 0 and protocol != "corrected":
            return None  # the authors report a zero average as missing
        return round(value, 4) * 100

    both = {"Error Correction": "error_correction", "Response Maintenance": "response_maintenance"}
    metrics = {key: average((name,)) for name, key in both.items()}
    overall = average(tuple(both))
    notes = [] if len(rows) == 734 else [f"{len(rows)} items: not the 734-item set of RAIF's published numbers"]
    halves = mean(list(metrics.values())) if protocol == "raif" else overall
    return metrics | {"overall": overall, "headline": halves, "tasks": {"/".join(key): value for key, value in
                                                                         sorted(cells.items())}} | {"notes": notes}


# FollowBench. Verdicts by rule are compared exactly, nothing is stripped. A level asks for all conditions up to it.


def followbench_parts(text, language):
    """(sentences, length of the text, length of a sentence): words in English, characters in Chinese."""
    sentences = [part for part in re.split("[.!?]" if language == "en" else "[。！？]", text) if part]
    if language == "en":
        return sentences, len(text.split(" ")), lambda sentence: len(sentence.split())
    return sentences, len(text), len


def summary_conditions(source, text, language):
    """The five conditions of a summarization source, in the order of the levels that add them."""
    sentences, length, length_of = followbench_parts(text, language)
    one, zh = len(sentences) == 1, language == "zh"
    punctuation = string.punctuation + ("，。：’“”" if zh else "")

    def has(word, part=text):
        return re.search(word if zh else rf"\b{re.escape(word)}\b", part) is not None

    def sentence_has(k, word):
        return len(sentences) > k and has(word, sentences[k])

    if source == "cnn_dailymail":
        words = ("波特", "演员", "电影", "奢侈") if zh else ("Potter", "actor", "films", "lavish")
        first, second, third, banned = words
        finished = "了" if zh else r"\b(has|have)\s+\w+"
        return [len(sentences) == 3, all(length_of(sentence) < 15 for sentence in sentences),
                sentence_has(0, first) and sentence_has(1, second) and sentence_has(2, third),
                not sentence_has(1, banned), len(sentences) > 2 and re.search(finished, sentences[2]) is not None]
    if source == "xsum":
        going_on = "在" if zh else r"\b(am|is|are)\s+\w+ing\b"
        return [one, length < 20, not has("牛顿斯图尔特" if zh else "Newton Stewart"),
                re.search(going_on, text) is not None, has("操作" if zh else "operation")]
    if source == "samsum":
        varied = "拖沓的" in text if zh else "procrast" in text.lower()
        return [one, length < 15, has("琐碎的" if zh else "stuff"), not varied,
                sum(mark in punctuation for mark in text) == 1]
    if source == "gigaword":
        plain = not any(mark.isnumeric() for mark in text) if zh else text.islower()
        return [length == 8, not any(mark in punctuation for mark in text), plain, not has("公交车" if zh else "bus"),
                has("在" if zh else "in")]
    return [one, length <= 20, text.startswith("我们" if zh else "We"), has("激活" if zh else "activations"),
            not has("transformer")]  # arxiv


def format_conditions(example_id, text, language, level):
    """Conditions of the two format examples that are scored by rule, in the order of the levels that add them."""
    if example_id == 30:
        # Sentences end at a full stop or question mark before white space, but not within i.e. or after Mr.
        sentences = re.split(r"(?<!\w\.\w.)(?<![A-Z][a-z]\.)(?<=\.|\?)\s", text)
        points = [sentence for sentence in sentences if any(f"{n}." in sentence for n in range(1, 6))]
        return ["**" in text, len(re.findall(r"\*\*[\d].+?:", text)) == 5,
                all(len(point.split(".")) < 3 for point in points),
                all(10 <= len(sentence.split()) <= 15 for sentence in sentences),
                not any(word.endswith("-ly") for word in text.split())]  # the three characters, hyphen included
    blocks = text.split("\n\n")
    sentences, _, length_of = followbench_parts(text, language)
    ending = "这些是建议" if language == "zh" else "Those are suggestions"
    return [len(blocks) == (4 if level == 5 else 3),
            all(len(followbench_parts(block, language)[0]) < 3 for block in blocks[:3]),
            all(length_of(sentence) > 20 for sentence in sentences),
            all(re.match(r"\d+\.", block.lstrip()) for block in blocks if block.strip()), text.endswith(ending)]


def last_is(pattern, text, target):
    found = re.findall(pattern, text)
    return bool(found) and found[-1] == target


def followbench_rule(row, language):
    """The rule of a record as a function text -> bool, None if a judge decides."""
    source, target, level = row["source"], row.get("target", ""), row["level"]
    if source in ("cnn_dailymail", "xsum", "samsum", "gigaword", "arxiv"):
        return lambda text: all(summary_conditions(source, text, language)[:level])
    if row["category"] == "format" and row["example_id"] in ((22, 30) if language == "en" else (22,)):
        return lambda text: all(format_conditions(row["example_id"], text, language, level)[:level])
    return {
        "E2E": lambda text: text == target,
        "text_editing": lambda text: text == target,
        "WIKIEVENTS": lambda text: set(text.split("\n")) <= set(target.split("\n")),
        "CONLL2003": lambda text: text in ast.literal_eval(target),
        "BBH_logical": lambda text: last_is(r"\([A-Z]\)", text, target),
        "BBH_time": lambda text: last_is(r"\d{2}/\d{2}/\d{4}", text, target),
        "gsm_8k": lambda text: last_is(r"\$\d+" if language == "en" else r"\d+美元", text, target),
        "self_made_space": lambda text: target in text,
    }.get(source)


def matches_template(text, target):
    """Example type: the template without its {instruction} line; {answer} and a literal .* match within a line."""
    template = target.replace("{instruction}\n", "").replace("{{", "{").replace("}}", "}").replace("{answer}", ".*")
    return re.fullmatch(".*".join(map(re.escape, template.split(".*"))), text) is not None


def read_levels(reply, level, language):
    """(all constraints hold, share that hold) from the last line of a judge reply; None if it cannot be read."""
    if language == "zh":
        reply = reply.replace("“", '"').replace("”", '"').strip("`").strip(" ").strip("\n").split("\n")[-1].strip(" ")
    else:
        reply = reply.strip("`").strip().split("\n")[-1]
    if level == 1:
        return (1, 1.0) if "YES" in reply else (0, 0.0) if "NO" in reply else None
    found = re.search(r"\[.*\]", reply)
    if not found:
        return None
    listed, refused = found[0], ("NO", "PARTIAL", "MAYBE", "UNKNOWN", "PARTIALLY" if language == "zh" else "N/A")
    if language == "zh" and '"' not in listed and "'" not in listed:
        listed = listed.replace("YES", "'YES'").replace("NO", "'NO'")
    try:
        words = ast.literal_eval(listed)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None
    if not isinstance(words, list) or len(words) < level or (language == "en" and len(words) != level):
        return None
    if any(word != "YES" and word not in refused for word in words[:level]):
        return None
    yes = words[:level].count("YES")
    return int(yes == level), yes / level


def followbench_verdict(item, answer, replies, protocol):
    row, text = item["row"], answer or ""
    if not item["questions"]:
        if item["kind"] == "example":
            met = matches_template(text, row["target"])
        else:
            met = followbench_rule(row, item["language"])(text)
        return {"hard": int(met), "soft": float(met)}
    reply = replies.get(None)
    if reply is None:
        return {"hard": 0, "soft": 0.0}
    read = read_levels(reply, row["level"], item["language"])
    if read is None:  # the authors add -1 and ask for a correction by hand
        read = (0, 0.0) if protocol == "corrected" else (-1, -1.0)
        return {"hard": read[0], "soft": read[1], "judged": 1, "unparsable": 1}
    return {"hard": read[0], "soft": read[1], "judged": 1}


def followbench_metrics(rows, protocol):
    metrics, raif, official = {}, [], []
    for language in ("en", "zh"):
        for kind in FOLLOWBENCH_TYPES:
            chosen = [(item, verdict) for item, verdict in rows if item["language"] == language
                      and item["kind"] == kind]
            # Judged ones first, then those by rule, as the authors add them up.
            chosen = sorted(chosen, key=lambda pair: not pair[0]["questions"])
            for name, key in (("HSR", "hard"), ("SSR", "soft")):
                rates = []
                for level in range(1, 6):
                    share = mean([verdict[key] for item, verdict in chosen if item["row"]["level"] == level])
                    rates.append(None if share is None else round(share * 100, 2))
                metrics[f"{language}.{kind}.{name}"] = rates if chosen else None
            runs = {}  # example -> its hard verdicts by level
            for item, verdict in chosen:
                runs.setdefault(item["group"], {})[item["row"]["level"]] = verdict["hard"]
            streaks = [next(level for level in range(1, 7) if run.get(level) != 1) - 1
                       for run in runs.values() if 1 in run]
            csl = mean(streaks)
            metrics[f"{language}.{kind}.CSL"] = None if csl is None else round(csl, 1)
        official += [mean(metrics[f"{language}.{kind}.HSR"] or []) for kind in FOLLOWBENCH_TYPES]
        # Table 1: the mean of six; CSL is scaled by 3.68; the five types that the authors' aggregator averages.
        judged = [kind for kind in FOLLOWBENCH_TYPES if kind != "example"]
        csl = mean([metrics[f"{language}.{kind}.CSL"] for kind in judged])
        raif += [None if csl is None else 100 * csl / 3.68]
        raif += [mean([mean(metrics[f"{language}.{kind}.{name}"] or []) for kind in judged])
                 for name in ("HSR", "SSR")]
    return metrics | {"headline": mean(raif if protocol == "raif" else official)}


# InFoBench. The first reply that cannot be read counts as no and ends the item; the rest of it is not asked.


def read_infobench(reply):
    """True, False or None (cannot be read)."""
    if reply.lower().startswith("yes"):
        return True
    if reply.lower().startswith("no"):
        return False
    return None if ("YES" in reply) == ("NO" in reply) else "YES" in reply


def infobench_verdict(item, answer, replies, protocol):
    if answer is None and protocol != "corrected":
        return {"left_out": True}
    met, judged, unparsable = [], 0, 0
    for k in item["questions"]:
        if k not in replies:
            met += [False] * (protocol == "corrected")  # there every question of every item counts
            continue
        value = read_infobench(replies[k])
        judged, unparsable = judged + 1, unparsable + (value is None)
        met.append(value is True)
        if value is None and protocol != "corrected":
            break
    return {"met": met, "judged": judged, "unparsable": unparsable}


def infobench_next(item, replies, protocol):
    """The next question of the conversation; none after a reply that cannot be read, unless every question counts."""
    unreadable = any(read_infobench(reply) is None for reply in replies.values())
    if unreadable and protocol != "corrected":
        return []
    return [k for k in item["questions"] if k not in replies][:1]


def infobench_metrics(rows, protocol):
    metrics = {}
    for name, subset in (("drfr", None), ("easy", "Easy_set"), ("hard", "Hard_set")):
        metrics[name] = mean([met for item, verdict in rows if subset in (None, item["row"]["subset"])
                              for met in verdict.get("met", [])])
    return metrics | {"headline": percent_of(metrics["drfr"])}


# What a judge is asked, in our own words (data/prompts/bench_*.txt), by the authors' protocol.


def from_user(text):
    return [{"role": "user", "content": text}]


def ask_cfbench(item, answer, k, replies):
    row = item["row"]
    return from_user(prompt_text("bench_cfbench", instruction=row["prompt"], reference=row.get("gold", ""),
                                 answer=answer, points="\n\n".join(item["plan"])))


def ask_complexbench(item, answer, k, replies):
    question = item["row"]["scoring_questions"][k]
    name = "" if question["rule"] is None else "_each" if "each" in question["rule"] else "_span"
    # Only what the judge sees is cut; rules are run on the whole answer.
    return from_user(prompt_text(f"bench_complexbench{name}", instruction=item["row"]["instruction"][:6000],
                                 answer=answer[:4000], question=question["question"]))


def ask_fbbench(item, answer, k, replies):
    row = item["row"]
    points = [point if isinstance(point, list) else [point, None] for point in row["checklist"]]
    template = {text: {"评判理由": "", "评判结果": "", "weight": weight} for text, weight in points}
    return from_user(prompt_text("bench_fbbench", user_query=row["user_query"], first=row["origin_first_response"],
                                 feedback=row["feedback"], answer=answer, checklist="\n".join(item["plan"]),
                                 template=json.dumps(template, ensure_ascii=False, indent=1)))


def ask_followbench(item, answer, k, replies):
    chinese = item["language"] == "zh"
    kinds = {"content": "内容", "situation": "情景", "style": "风格", "format": "格式"}
    kind = "" if item["kind"] == "mixed" else f"（{kinds[item['kind']]}）" if chinese else f" ({item['kind']})"
    title = "【加了{}个约束的版本】" if chinese else "[Version with {} added constraints]"
    steps = "\n\n".join(f"{title.format(level)}\n{text}" for level, text in enumerate(item["steps"]))
    return from_user(prompt_text(f"bench_followbench.{item['language']}", kind=kind, steps=steps, answer=answer,
                                 level=item["row"]["level"]))


def ask_infobench(item, answer, k, replies):
    """One conversation per item: earlier questions with the judge's own replies, then question k."""
    first, *later = item["plan"][: k + 1]
    given = item["row"]["input"] and f'\nGiven input:\n"{item["row"]["input"]}"\n'
    messages = from_user(prompt_text("bench_infobench", input=given, answer=answer, question=first,
                                     given=" and, where it matters, the given input" if given else ""))
    for j, question in enumerate(later):
        messages += [{"role": "assistant", "content": replies[j]}, *from_user(question)]
    return messages


class Benchmark(NamedTuple):
    title: str  # as in Table 1
    load: Callable  # (benchmark folder) -> items
    verdict: Callable  # (item, answer, replies, protocol) -> dict
    aggregate: Callable  # ([(item, verdict), ...], protocol) -> metrics
    ask: Callable | None = None  # (item, answer, question, earlier replies) -> the judge's conversation
    readable: Callable | None = None  # (item, question, reply) -> can the reply be read? If not: asked again


BENCHMARKS = {
    "ifeval": Benchmark("IFEval", load_ifeval, ifeval_verdict, ifeval_metrics),
    "cello": Benchmark("CELLO", load_cello, cello_verdict, cello_metrics),
    "cfbench": Benchmark("CF Bench", load_cfbench, cfbench_verdict, cfbench_metrics, ask_cfbench,
                         lambda item, k, reply: cfbench_points(reply, item["plan"]) is not None),
    "complexbench": Benchmark("Complex Bench", load_complexbench, complexbench_verdict, complexbench_metrics,
                              ask_complexbench, lambda item, k, reply:
                              item["row"]["scoring_questions"][k]["rule"] is not None or read_yes(reply)[1]),
    "fb-bench": Benchmark("FB Bench", load_fbbench, fbbench_verdict, fbbench_metrics, ask_fbbench,
                          lambda item, k, reply: fbbench_score(reply) is not None),
    "followbench": Benchmark("Follow Bench", load_followbench, followbench_verdict, followbench_metrics,
                             ask_followbench, lambda item, k, reply:
                             read_levels(reply, item["row"]["level"], item["language"]) is not None),
    "infobench": Benchmark("Info Bench", load_infobench, infobench_verdict, infobench_metrics, ask_infobench,
                           lambda item, k, reply: read_infobench(reply) is not None),
    "ifbench": Benchmark("IFBench", load_ifbench, ifbench_verdict, ifbench_metrics),  # out of distribution: Table 5
}


def score_answers(name, rows, protocol):
    """(metrics with `n`, verdicts) of recorded answers; a row is (item, answer or None, {question: raw reply})."""
    benchmark = BENCHMARKS[name]
    judged = [(item, benchmark.verdict(item, answer, replies, protocol)) for item, answer, replies in rows]
    n = {"asked": len(rows), "answered": sum(answer is not None for _, answer, _ in rows)}
    n |= {key: sum(verdict.get(key, 0) for _, verdict in judged) for key in ("judged", "unparsable")}
    return {**benchmark.aggregate(judged, protocol), "n": n}, judged


def read_responses(name, path, items):
    """(item, response or None) for each row of a response file, in its order."""
    known, rows, seen = {item["id"]: item for item in items}, [], {}
    for number, row in rewards.json_lines(path):
        checked(path, number, row, id=(str, int))
        key = str(row["id"])
        if key not in known:
            raise InputError(f"{path}:{number}: field 'id': {key!r} is not in {name}; its ids look like "
                             f"{items[0]['id']!r}")
        field = "answer" if "answer" in row and "response" not in row else "response"  # rows of a run have answers
        if field not in row or not isinstance(row[field], str | None):
            raise InputError(f"{path}:{number}: field {field!r}: missing or not a text; give the answer, or null for "
                             "not answered")
        if key in seen and name != "cello":  # whose published files repeat one id; there rows count
            raise InputError(f"{path}:{number}: field 'id': {key!r} is already in line {seen[key]}; keep one of them")
        seen[key] = number
        rows.append((known[key], row[field]))
    return rows


def read_judgements(name, path, items):
    """{id: {question: raw reply}} of a judgement file."""
    known, replies = {item["id"]: item for item in items}, {}
    for number, row in rewards.json_lines(path):
        checked(path, number, row, id=(str, int), reply=(str, type(None)))
        key, question = str(row["id"]), row.get("question")
        if key not in known:
            raise InputError(f"{path}:{number}: field 'id': {key!r} is not in {name}; remove the row")
        asked = known[key]["questions"]
        question = None if asked == [None] and question == 0 else question  # the only one may be called 0
        if type(question) not in (int, type(None)) or question not in asked:
            form = f"a number from 0 to {len(asked) - 1}" if asked and asked != [None] else "null" if asked else \
                "no row: this item is scored by rule"
            raise InputError(f"{path}:{number}: field 'question': {question!r} is not asked of {key!r}; give {form}")
        if question in replies.setdefault(key, {}):
            raise InputError(f"{path}:{number}: field 'question': a second reply for {key!r}, {question!r}; keep one")
        if row["reply"] is not None:
            replies[key][question] = row["reply"]
    return replies


def score_files(cfg):
    """--score: metrics of recorded answers, without a model."""
    if cfg.score not in BENCHMARKS:
        raise InputError(f"--score {cfg.score}: unknown; give one of {', '.join(BENCHMARKS)}")
    if not cfg.responses:
        raise InputError("--score: give --responses, a file of {\"id\": ..., \"response\": ...} rows")
    items = BENCHMARKS[cfg.score].load(Path(cfg.benchmark_dir))
    responses = read_responses(cfg.score, cfg.responses, items)
    replies = read_judgements(cfg.score, cfg.judgements, items) if cfg.judgements else {}
    if not cfg.judgements and any(item["questions"] and response is not None for item, response in responses):
        raise InputError(f"--judgements: {cfg.score} is scored from a judge's replies; give a file of "
                         "{\"id\": ..., \"question\": ..., \"reply\": ...} rows")
    if unused := len(replies.keys() - {item["id"] for item, _ in responses}):
        print(f"{cfg.judgements}: {unused} ids are not among the responses; not used", file=sys.stderr)
    # parse_response alone: of a thought that never ends nothing is left. (Rows of a run hold answers already.)
    rows = [(item, None if response is None else rewards.parse_response(response, cfg.family).answer,
             replies.get(item["id"], {})) for item, response in responses]
    metrics, _ = score_answers(cfg.score, rows, cfg.protocol)
    return {"benchmark": cfg.score, "protocol": cfg.protocol, **metrics}


# ---------------------------------------------------------------- producing a row


def questions_of(record):
    """The questions of the active judge constraints."""
    return [c["question"] for c in record.get("constraints", []) if c["active"] and c["kind"] == "judge"]


def read_benchmark(path, limit=0, judge=""):
    """(records of a file, a key of what their scores depend on: the file's SHA-256 and, if one is asked, the judge)."""
    records, key = rewards.read_records(path), hashlib.sha256(Path(path).read_bytes()).hexdigest()
    for number, record in enumerate(records, 1):
        if questions_of(record) and not judge:
            raise InputError(f"{path}:{number}: field 'constraints': judged; give --judge NAME (loaded here) or "
                             "NAME@URL (served), or set active to false")
    key += f", judged by {split_address(judge)[0]}" * any(map(questions_of, records))
    return spread(records, limit or len(records)), key


def model_stamp(name):
    """Changes when a local model folder is written anew, so that its old answers are not taken for the new model's."""
    weights = sorted(Path(name).glob("*.safetensors"))
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in weights]


def row_files(run, label):
    """(items file, settings file) of a row; the label I/O becomes the file name I-O."""
    name = "".join(c if c.isalnum() or c in " .+_" else "-" for c in label)
    return Path(run) / "rows" / f"{name}.jsonl", Path(run) / "rows" / f"{name}.json"


def open_row(cfg, label, model, method, benchmark):
    """(settings, finished items) of a row: those on disk if the settings are the same, else a new and empty row."""
    model, url = split_address(model)
    settings = {"label": label, "model": model, "model_url": url, "method": method, "stamp": model_stamp(model),
                "benchmark": benchmark}
    keys = ["family", "max_new_tokens", "engine", "precision", "thought_model"]
    keys += {"sc": ["samples", "seed"], "sr": ["refine_turns"], "closed": ["thought_tokens"],
             "other": ["thought_row"]}.get(method, [])
    settings |= {key: getattr(cfg, key) for key in keys}
    if cfg.thought_model:
        settings["thought_stamp"] = model_stamp(cfg.thought_model)
    items_file, settings_file = row_files(cfg.out, label)
    items = read_jsonl(items_file)
    if items:
        old = json.loads(settings_file.read_text(encoding="utf-8"))
        if (old["model"], old["method"]) != (model, method):
            raise InputError(f"{settings_file}: row {label!r} holds model {old['model']} with method {old['method']}; "
                             f"pass another --label or --out")
        changed = [key for key in settings if old.get(key, getattr(Config, key, "")) != settings[key]]
        changed += ["--no-resume"] * (not cfg.resume)
        if not changed:
            write_jsonl(items_file, items)  # without the last line that a killed run may have left half written
            old["base_model"] = cfg.base_model  # says where the model comes from; the answers do not depend on it
            write_atomic(settings_file, json.dumps(old, indent=1))
            return old, items
        print(f"row {label}: generated anew ({', '.join(changed)}); its earlier answers are in {items_file}.old")
        write_jsonl(f"{items_file}.old", items)
    settings |= {"base_model": cfg.base_model, "seconds": 0.0, "perplexity": None}
    write_jsonl(items_file, [])
    write_atomic(settings_file, json.dumps(settings, indent=1))
    return settings, []


def generate_turns(engine, tokenizer, conversations, languages, mode, cfg, openings=None, **sampling):
    """n assistant turns for each conversation, prefill included: lists of (text, how it ended); greedy by default.

    openings: what each turn holds already, after the prefill.
    """
    sampling = {"n": 1, "max_tokens": cfg.max_new_tokens, "temperature": 0.0} | sampling
    if isinstance(engine, Endpoint) and openings:
        raise InputError("--method closed, other, expert: a served model's turn cannot be opened; give a local --model")
    if isinstance(engine, Endpoint):  # a chat server opens no turn for us: the trigger alone asks for the thought
        if mode == "cot" and cfg.family == "cold":  # a direct answer is asked for by the request alone
            conversations = [with_trigger(messages, language)
                             for messages, language in zip(conversations, languages, strict=True)]
        sampling.pop("seeds", None)  # a server has one seed for all
        return [[(served_turn(c), c.finish_reason) for c in group]
                for group in engine.chat(conversations, seed=cfg.seed, **sampling)]
    prompts = [render_prompt(tokenizer, messages, mode, family=cfg.family, language=language)
               for messages, language in zip(conversations, languages, strict=True)]
    seeds = sampling.pop("seeds", [0] * len(prompts))  # greedy decoding draws nothing
    openings = openings or [""] * len(prompts)
    begun = [prompt.ids + (tokenizer(opening, add_special_tokens=False)["input_ids"] if opening else [])
             for prompt, opening in zip(prompts, openings, strict=True)]
    completions = engine.generate(begun, seeds=seeds, **sampling)
    return [[(prompt.prefill + opening + c.text, c.finish_reason) for c in group]
            for prompt, opening, group in zip(prompts, openings, completions, strict=True)]


def with_trigger(messages, language):
    """The conversation with the request to think first, in its system message or in a new one."""
    trigger = prompt_text(f"cot.{language}")
    if messages[0]["role"] == "system":
        return [messages[0] | {"content": f"{messages[0]['content']}\n{trigger}"}, *messages[1:]]
    return [{"role": "system", "content": trigger}, *messages]


def served_turn(completion):
    """The whole assistant turn of a served model: the thought that its server sends apart is put back in front."""
    if not completion.reasoning:
        return completion.text
    return f"<think>\n{completion.reasoning.strip()}\n</think>\n{completion.text}"


def reworded(record, name, **parts):
    """The record's conversation with its last request put into one of the data/prompts."""
    language = "zh" if record.get("language") == "zh" else "en"
    return record["messages"][:-1] + from_user(
        prompt_text(f"{name}.{language}", request=record["messages"][-1]["content"], **parts))


def plan_of(record):
    """The sub-questions that oracle decomposition gives away: the benchmark's own, or the texts of the constraints."""
    plan = record.get("plan") or [c["text"] for c in record.get("constraints", []) if c["active"]]
    if not plan:
        raise InputError(f"--method od: {record['id']} comes without sub-questions; evaluate it with another method")
    return "\n".join(f"{k}. {text}" for k, text in enumerate(plan, 1))


def most_agreed(texts):
    """Index of the text that is most like the others: the majority vote of free text.

    Alike is the mean overlap (Dice) of character trigrams, so identical answers vote for one another; ties: the first.
    """
    grams = [Counter(text[i : i + 3] for i in range(max(1, len(text) - 2))) for text in texts]
    return max(range(len(texts)), key=lambda i: sum(
        (own & other).total() / (own.total() + other.total()) for own in [grams[i]] for other in grams))


def answer_chunk(engine, tokenizer, records, method, cfg, judge=None):
    """Items (the lines of a row file) for a few records."""
    def turns(conversations, mode, which, **sampling):  # of the records `which`; what is written is kept for its length
        languages = ["zh" if records[k].get("language") == "zh" else "en" for k in which]
        groups = generate_turns(engine, tokenizer, conversations, languages, mode, cfg, **sampling)
        for k, group in zip(which, groups, strict=True):
            written[k] += [text for text, _ in group]
        return groups

    def tokens(text):
        return len(tokenizer(text, add_special_tokens=False)["input_ids"]) if tokenizer else len(
            rewards.text_of(text).words)

    every, written = range(len(records)), [[] for _ in records]
    conversations = [record["messages"] for record in records]
    thoughts = [record.get("thought", ("", "stop")) for record in records]  # (text, how it ended)
    if method == "sdc":  # call 1 thinks, only its thought is kept; call 2 sees request and thought in one user message
        if not cfg.thought_model:
            thoughts = [(rewards.parse_response(text, cfg.family).think, ended)
                        for ((text, ended),) in turns(conversations, "cot", every)]
        conversations = [reworded(r, "sdc", thought=thought) for r, (thought, _) in zip(records, thoughts, strict=True)]
    openings = None
    if method == "closed":
        thoughts = [(rewards.parse_response(text).think, "stop") for ((text, _),) in turns(
            conversations, "cot", every, max_tokens=cfg.thought_tokens, stop=("</think>",))]
    if method in ("closed", "other", "expert"):  # what follows is an answer, of the same length limit as ever
        tags = "</think>\n<answer>\n" if cfg.family == "cold" else "</think>\n\n"
        openings = [f"{thought.strip()}\n{tags}" for thought, _ in thoughts]
    if method == "od":
        conversations = [reworded(record, "plan", plan=plan_of(record)) for record in records]
    if method == "sc":
        groups = turns(conversations, "io", every, n=cfg.samples, temperature=1.0,
                       seeds=[record_seed(cfg.seed, 0, record["id"]) for record in records])
        final = [group[most_agreed([answer_text(text, cfg.family) for text, _ in group])] for group in groups]
    else:
        mode = "cot" if openings else method if method in ("cot", "direct") else "io"
        final = [group[0] for group in turns(conversations, mode, every, openings=openings)]
    active = list(every) if method == "sr" else []
    for _ in range(cfg.refine_turns):  # self-refine: the model checks its own answer until it finds nothing to mend
        drafts = [answer_text(final[k][0], cfg.family) for k in active]
        asked = [reworded(records[k], "refine", answer=draft) for k, draft in zip(active, drafts, strict=True)]
        better = dict(zip(active, turns(asked, "io", active), strict=True)) if active else {}
        active = [k for k in active if not answer_text(better[k][0][0], cfg.family).strip().startswith("DONE")]
        for k in active:
            final[k] = better[k][0]

    answers = [answer_text(text, cfg.family) for text, _ in final]
    asked = [(record["messages"][-1]["content"], answer, question)
             for record, answer in zip(records, answers, strict=True) if answer.strip()
             for question in questions_of(record)]
    said, items = iter(judge(asked) if asked else ()), []
    for k, (record, (text, ended), (thought, thought_ended)) in enumerate(zip(records, final, thoughts, strict=True)):
        parsed, answer = rewards.parse_response(text, cfg.family), answers[k]
        if method != "sdc" and "</think>" in text:
            thought = parsed.think
        answer_ids = tokenizer(answer, add_special_tokens=False)["input_ids"] if tokenizer else answer.split()
        items.append({
            "id": record["id"],
            "text": text,
            "thought": thought,
            "answer": answer,
            **(score_item(record, text, cfg.family, [answer.strip() != "" and next(said)
                                                     for _ in questions_of(record)])
               if "task" in record else {}),
            "format_ok": parsed.format_ok if method == "cot" else None,
            "truncated": "length" in (ended, thought_ended),
            "refused": ended == "refused",  # by a server: no answer
            "thought_tokens": tokens(thought),
            "answer_tokens": tokens(answer),
            "written_tokens": sum(map(tokens, written[k])),  # of all calls: 10 samples, several turns
            "repetition": repetition(answer_ids),
        })
    return items


def answer_row(cfg, label, model_name, method, records, benchmark, load, judge=None):
    """Complete one row, chunk by chunk. `load(name)` gives (model, tokenizer, engine), only when needed.

    The ranks of torchrun share each chunk; rank 0 reads and writes.
    """
    rank, world = init_distributed()
    opened = open_row(cfg, label, model_name, method, benchmark) if rank == 0 else None
    settings, items = gather_objects([opened])[0]
    items_file, settings_file = row_files(cfg.out, label)
    done = {item["id"] for item in items}
    todo = [record for record in records if record["id"] not in done]
    with tqdm(total=len(records), initial=len(done), desc=label, unit="prompt", disable=rank > 0) as bar:
        for start in range(0, len(todo), cfg.chunk):
            _, tokenizer, engine = load(model_name)
            began = time.perf_counter()
            chunk = todo[start : start + cfg.chunk]
            own = chunk[rank::world]
            answered = gather_objects(answer_chunk(engine, tokenizer, own, method, cfg, judge) if own else [])
            if rank == 0:
                answered = {item["id"]: item for item in answered}
                for record in chunk:
                    append_jsonl(items_file, answered[record["id"]])
                settings["seconds"] += time.perf_counter() - began
                write_atomic(settings_file, json.dumps(settings, indent=1))
            bar.update(len(chunk))


def with_thoughts(cfg, label, method, records, benchmark, load):
    """The records, each with the thought that its method hands to the model; for most methods there is none.

    sdc with --thought-model: that model's (a row of RUN/thoughts). expert: its expert's. other: the one that row
    --thought-row wrote for the record half the file away.
    """
    if method == "expert":
        if missing := [record["id"] for record in records if not record.get("expert")]:
            raise InputError(f"--method expert: record {missing[0]!r} has no expert; evaluate a file whose records "
                             "have one, such as data/teacher.jsonl")
        return [{**record, "thought": (rewards.parse_response(record["expert"]).think, "stop")} for record in records]
    if method == "other":
        own = {row["id"]: row["thought"] for row in read_jsonl(row_files(cfg.out, cfg.thought_row)[0])}
        if missing := [record["id"] for record in records if record["id"] not in own]:
            raise InputError(f"--method other: row {cfg.thought_row!r} in {cfg.out} has no thought for {missing[0]!r}; "
                             "finish that row first, or name another with --thought-row")
        half = len(records) // 2 or 1
        return [{**record, "thought": (own[records[(k + half) % len(records)]["id"]], "stop")}
                for k, record in enumerate(records)]
    if method != "sdc" or not cfg.thought_model:
        return records
    own = replace(cfg, out=str(Path(cfg.out) / "thoughts"), thought_model="")
    answer_row(own, label, cfg.thought_model, "cot", [{**r, "constraints": []} for r in records], benchmark, load)
    rank, _ = init_distributed()
    rows = gather_objects([read_jsonl(row_files(own.out, label)[0])] if rank == 0 else [])[0]  # once it is written
    thoughts = {row["id"]: (row["thought"], "length" if row["truncated"] else "stop") for row in rows}
    return [{**record, "thought": thoughts[record["id"]]} for record in records]


def read_rows(run, records, wanted):
    """Finished rows of a run folder on these records: {label: (settings, items in the order of the records)}."""
    rows = {}
    for settings_file in sorted((Path(run) / "rows").glob("*.json")):
        settings = json.loads(settings_file.read_text(encoding="utf-8"))
        items = {item["id"]: item for item in read_jsonl(settings_file.with_suffix(".jsonl"))}
        differs = [key for key in wanted if settings[key] != wanted[key]]
        if differs:
            print(f"row {settings['label']} is left out of the report: other {', '.join(differs)} than in this call")
        elif missing := sum(record["id"] not in items for record in records):
            print(f"row {settings['label']} is left out of the report: {missing} of {len(records)} prompts unanswered")
        else:
            rows[settings["label"]] = (settings, [items[record["id"]] for record in records])
    rank = {label: position for position, label in enumerate(ROW_ORDER)}
    return {label: rows[label] for label in sorted(rows, key=lambda label: (rank.get(label, len(rank)), label))}


def add_perplexity(cfg, records, rows):
    """Measure the perplexity of rows that lack it, on the same records in every row, and store it with the row."""
    chosen = spread(range(len(records)), cfg.perplexity_items)
    base, model = {"model": cfg.base_model, "answers": len(chosen)}, None
    for label, (settings, items) in rows.items():
        if chosen and (settings["perplexity"] or {}).get("base") != base:
            if model is None:
                model, tokenizer = load_model(cfg.base_model, dtype=compute_dtype(cfg.precision))
            some, answers = [records[k] for k in chosen], [items[k]["answer"] for k in chosen]
            settings["perplexity"] = {"base": base, "value": answer_perplexity(model, tokenizer, some, answers)}
            write_atomic(row_files(cfg.out, label)[1], json.dumps(settings, indent=1))


# ---------------------------------------------------------------- running the benchmarks


def prepare(names, folder, opener=urllib.request.urlopen):
    """Download the authors' files of the benchmarks, print their licence, check SHA-256 where it is known and rows."""
    sources = json.loads((data_dir / "benchmarks" / "sources.json").read_text(encoding="utf-8"))
    if unknown := [name for name in names if name not in sources]:
        raise InputError(f"--prepare --benchmarks {unknown[0]}: unknown; give some of {', '.join(sources)}")
    for name in names or sources:
        print(f"{name}: licence {sources[name]['licence']}")
        for path, (address, sha) in sources[name]["files"].items():
            try:
                with opener(address) as reply:
                    content = reply.read()
            except OSError as error:
                raise InputError(f"{address}: cannot be downloaded ({error}); put the file at {folder / path} by hand "
                                 "and check it with --score") from None
            own = hashlib.sha256(content).hexdigest()
            if sha and own != sha:
                raise InputError(f"{address}: SHA-256 {own}, expected {sha}: another version; compare it before use")
            write_atomic(folder / path, content)
            print(f"  {folder / path}: {len(content)} bytes, SHA-256 {own}{'' if sha else ' (none to compare with)'}")
        items = len(BENCHMARKS[name].load(folder))
        if items != sources[name]["items"]:
            raise InputError(f"{folder / name}: {items} items, {sources[name]['items']} expected; a cut file, or "
                             "another version")
        print(f"  {items} items")


def judge_answers(cfg, name, label, pairs, chat):
    """{id: {question: raw reply}} for (item, answer) pairs; None is no answer, and not judged.

    Replies are kept in judgements/LABEL - JUDGE.jsonl of the run, a file that --judgements reads. A stored reply is
    used again if nothing it depends on has changed: the conversation (prompt, checklist, answer, earlier replies), the
    judge's address or weights, its token limit. One that cannot be read is asked again in every call; a served judge's
    replies are cached by request, so that this costs something only with more --judge-tries.
    """
    benchmark, judge = BENCHMARKS[name], split_address(cfg.judge)[0]
    path = Path(cfg.out) / "judgements" / row_files(cfg.out, f"{label} - {judge}")[0].name
    settings = [cfg.judge, model_stamp(judge), cfg.judge_tokens]
    stored = {(row["id"], row["question"]): row for row in read_jsonl(path)}
    write_jsonl(path, stored.values())  # without the last line that a killed run may have left half written
    judged = {item["id"]: (item, answer) for item, answer in pairs if answer is not None}
    replies, used = {key: {} for key in judged}, {}

    def next_questions(item):
        if name == "infobench":  # one conversation, question by question
            return infobench_next(item, replies[item["id"]], cfg.protocol)
        return [k for k in item["questions"] if k not in replies[item["id"]]]

    def waiting():
        """The questions that can be asked now, each with its conversation and the row kept of it so far."""
        jobs = []
        for key, (item, answer) in judged.items():
            for k in next_questions(item):
                conversation = benchmark.ask(item, answer, k, replies[key])
                sha = hashlib.sha256(json.dumps([settings, conversation]).encode()).hexdigest()[:16]
                kept = stored.get((key, k))
                if kept and (kept.get("sha") != sha or not benchmark.readable(item, k, kept["reply"])):
                    kept = None
                jobs.append((item, k, conversation, sha, kept))
        return jobs

    total = sum(len(item["questions"]) for item, _ in judged.values())
    with tqdm(total=total, desc=f"{label}: judge", unit="reply") as bar:
        while jobs := waiting():
            for start in range(0, len(jobs), cfg.chunk):
                chunk = jobs[start : start + cfg.chunk]
                asked = [job for job in chunk if job[4] is None]
                texts = iter(ask_until_readable(cfg, name, asked, chat))
                for item, k, _, sha, kept in chunk:
                    if kept is None:
                        kept = {"id": item["id"], "question": k, "reply": next(texts), "sha": sha}
                        append_jsonl(path, kept)
                    used[item["id"], k] = kept
                    replies[item["id"]][k] = kept["reply"]
                bar.update(len(chunk))
    # Rows of items that are not in this call stay; of those that are, nothing stale does.
    write_jsonl(path, [row for row in stored.values() if row["id"] not in judged] + list(used.values()))
    return replies


def ask_until_readable(cfg, name, jobs, chat):
    """The judge's raw replies to (item, question, conversation, ...) jobs.

    Greedy first; what cannot be read is asked again, warmer and with another seed, --judge-tries times in all.
    """
    texts = {}
    for attempt in range(max(1, cfg.judge_tries)):
        open_jobs = [j for j, (item, k, *_) in enumerate(jobs)
                     if j not in texts or not BENCHMARKS[name].readable(item, k, texts[j])]
        if not open_jobs:
            break
        settings = {"n": 1, "max_tokens": cfg.judge_tokens, "temperature": 0.5 if attempt else 0.0, "seed": attempt}
        ask = chat_in_json if name == "fb-bench" else chat_plainly
        replies = ask(chat, [jobs[j][2] for j in open_jobs], settings)
        texts |= dict(zip(open_jobs, replies, strict=True))
    return [texts[j] for j in range(len(jobs))]


def chat_plainly(chat, conversations, settings):
    return [completions[0].text for completions in chat(conversations, **settings)]


def chat_in_json(chat, conversations, settings):
    """FB-Bench's judge replies in JSON mode; what a server refuses in this mode is asked at once without it."""
    first = chat(conversations, **settings, response_format={"type": "json_object"})
    texts = [completions[0].text for completions in first]
    refused = [j for j, completions in enumerate(first) if completions[0].finish_reason == "refused"]
    if refused:
        again = chat_plainly(chat, [conversations[j] for j in refused], settings)
        for j, text in zip(refused, again, strict=True):
            texts[j] = text
    return texts


def metric_intervals(name, judged, protocol, resamples, seed):
    """Metric -> its 95 % percentile-bootstrap limits over groups of items; a metric without a value is left out."""
    groups = {}
    for item, verdict in judged:
        groups.setdefault(item["group"], []).append((item, verdict))
    groups, rng, values = list(groups.values()), np.random.default_rng(seed), {}
    for _ in range(min(resamples, 1000)):
        rows = [({**item, "group": draw}, verdict)  # a group drawn twice is two groups
                for draw, k in enumerate(rng.integers(0, len(groups), len(groups))) for item, verdict in groups[k]]
        for key, value in BENCHMARKS[name].aggregate(rows, protocol).items():
            if isinstance(value, float):
                values.setdefault(key, []).append(value)
    return {key: list(map(float, np.percentile(found, [2.5, 97.5]))) for key, found in values.items()}


def run_benchmarks(cfg, names, jobs, load):
    """Rows of each benchmark in RUN/NAME, judged and scored; report.json, report.md and a plot of them all in RUN.

    All answers are written before the first is judged, so that a local judge is loaded once.
    """
    rank, _ = init_distributed()
    report, todo, path = {"protocol": cfg.protocol, "settings": asdict(cfg), "benchmarks": {}}, [], Path(cfg.out)
    if (path / "report.json").exists():  # benchmarks of earlier calls stay
        earlier = json.loads((path / "report.json").read_text(encoding="utf-8"))
        report["benchmarks"] |= earlier["benchmarks"] if earlier.get("protocol") == cfg.protocol else {}
    for name in names:
        items = BENCHMARKS[name].load(Path(cfg.benchmark_dir))
        sha = hashlib.sha256(json.dumps([item["messages"] for item in items]).encode()).hexdigest()
        items = spread(items, cfg.limit or len(items))
        if any(item["questions"] for item in items) and not cfg.judge:
            raise InputError(f"--benchmarks {name}: give --judge NAME (loaded here) or NAME@URL (served)")
        todo.append((name, items, sha, replace(cfg, out=str(Path(cfg.out) / name))))
    for _, items, sha, own in todo:
        for label, model, method in jobs:
            answer_row(own, label, model, method, with_thoughts(own, label, method, items, sha, load), sha, load)
    if rank:
        return report
    load("")  # a judge in this process has the memory for itself
    judge = open_chat(cfg.judge, precision=cfg.precision, cache=path / "judge_cache", timeout=600, skip_refused=True)
    for name, items, sha, own in todo:
        wanted = {"benchmark": sha, "max_new_tokens": cfg.max_new_tokens}
        cells = report["benchmarks"][name] = {}
        for label, (settings, answers) in read_rows(own.out, items, wanted).items():
            pairs = [(item, None if row.get("refused") else row["answer"])
                     for item, row in zip(items, answers, strict=True)]
            asks = any(item["questions"] for item in items)
            replies = judge_answers(own, name, label, pairs, judge.chat) if asks else {}
            metrics, judged = score_answers(
                name, [(item, answer, replies.get(item["id"], {})) for item, answer in pairs], cfg.protocol)
            intervals = metric_intervals(name, judged, cfg.protocol, cfg.resamples, cfg.seed)
            low, high = intervals.get("headline", (None, None))
            means = {key: mean([row[key] for row in answers]) for key in (
                "thought_tokens", "answer_tokens", "written_tokens", "truncated")}
            formats = [not row["format_ok"] for row in answers if row["format_ok"] is not None]
            cells[label] = {"low": low, "high": high, "intervals": intervals, **metrics, **means,
                            "format_failures": mean(formats), "settings": settings, "seconds": settings["seconds"],
                            "judge": split_address(cfg.judge)[0]}
    write_atomic(path / "report.json", json.dumps(report, indent=1, ensure_ascii=False))
    write_atomic(path / "report.md", benchmarks_markdown(report))
    plot_benchmarks(report, path / "benchmarks.png")
    return report


def shown(value, form=".1f"):
    return "–" if value is None else format(value, form)


def average_cell(cells):
    """The plain mean of the headlines, None if one is missing."""
    values = [cell and cell["headline"] for cell in cells]
    return None if None in values else mean(values)


def benchmarks_markdown(report):
    """report.md of a benchmark run: headlines with intervals, then what was asked, judged and written."""
    names = list(report["benchmarks"])
    labels = list(dict.fromkeys(label for cells in report["benchmarks"].values() for label in cells))
    main, detail = [], []
    for label in labels:
        cells = [report["benchmarks"][name].get(label) for name in names]
        main.append([label, *(f"{shown(c['headline'])} [{shown(c['low'])}, {shown(c['high'])}]" if c else "–"
                              for c in cells), shown(average_cell(cells))])
        for name, cell in zip(names, cells, strict=True):
            if cell:
                detail.append([label, name, cell["settings"]["model"], cell["settings"]["method"], *cell["n"].values(),
                               *(shown(cell[key], ".1%") for key in ("format_failures", "truncated")),
                               *(shown(cell[key]) for key in ("thought_tokens", "answer_tokens", "written_tokens",
                                                              "seconds"))])
    notes = [f"- {name}: {note}\n" for name, cells in report["benchmarks"].items()
             for note in dict.fromkeys(note for cell in cells.values() for note in cell.get("notes", []))]
    if any(cell["settings"]["model_url"] for cells in report["benchmarks"].values() for cell in cells.values()):
        notes.append("- Answers of a chat server: the trigger alone asks for a thought, the turn is not opened; "
                     "Direct is the request alone; tokens are words.\n")
    for cell in list(report["benchmarks"].get("ifbench", {}).values())[:1]:
        notes.append(f"- ifbench: {shown(cell['share_scored'], '.0%')} of the instructions are scored; kinds that are "
                     f"not: {', '.join(cell['not_scored'])}\n")
    titles = [BENCHMARKS[name].title for name in names]
    return "\n".join([
        "# Benchmarks\n", f"Protocol: {report['protocol']}. Headline of each benchmark in percent, in brackets its "
        "95 % percentile-bootstrap interval over items. Thought and tags are removed before scoring.\n",
        markdown_table(["row", *titles, "Avg."], main),
        "## Counts and costs\n\nTokens: mean per item; written: of all calls.\n",
        markdown_table(["row", "benchmark", "model", "method", "asked", "answered", "judge replies", "unparsable",
               "format failures", "truncated", "thought tokens", "answer tokens", "written tokens", "seconds"], detail),
        *notes, "![benchmarks](benchmarks.png)\n"])


def plot_benchmarks(report, path):
    """Bars of the headlines with their intervals and, with IFEval, a heat map of the strict verdicts per kind."""
    plt = pyplot()
    shares = {label: cell["kinds"] for label, cell in report["benchmarks"].get("ifeval", {}).items()}
    names = [name for name, cells in report["benchmarks"].items() if cells]
    labels = list(dict.fromkeys(label for cells in report["benchmarks"].values() for label in cells))
    fig, axes = plt.subplots(1 + bool(shares), figsize=(9, 3.5 + 3.5 * bool(shares)), layout="constrained",
                             squeeze=False)
    for position, label in enumerate(labels):
        cells = [report["benchmarks"][name].get(label, {}) for name in names]
        value_K, low_K, high_K = (np.array([cell.get(key) for cell in cells], dtype=float)  # None: a gap
                                  for key in ("headline", "low", "high"))
        axes[0, 0].bar(np.arange(len(names)) + 0.8 * position / len(labels), value_K, 0.75 / len(labels), label=label,
                       yerr=np.maximum(0, [value_K - low_K, high_K - value_K]), capsize=2)
    axes[0, 0].set(xticks=range(len(names)), xticklabels=names, ylabel=f"headline, {report['protocol']} (%)")
    axes[0, 0].legend(frameon=False)
    if shares:
        kinds = list(next(iter(shares.values())))
        image = axes[1, 0].imshow([[row.get(kind, np.nan) for kind in kinds] for row in shares.values()],
                                  aspect="auto", vmin=0, vmax=1, cmap="viridis")
        fig.colorbar(image, label="met, strict")
        axes[1, 0].set(yticks=range(len(shares)), yticklabels=shares, xticks=range(len(kinds)))
        axes[1, 0].set_xticklabels(kinds, rotation=90, fontsize=7)
    fig.savefig(path, dpi=120)
    plt.close(fig)


# ---------------------------------------------------------------- the paper's tables


def limits_of(cell, metric):
    """The interval of a metric in percent, None if the cell has none; shares are stored in 0..1, headlines in %."""
    found = cell.get("intervals", {}).get(metric)
    return found and [limit if metric == "headline" else percent_of(limit) for limit in found]


def beside(own, published, limits=None, marked=False, n=None):
    """Ours (paper's, difference) [our limits] n; † marks a published figure that the paper itself contradicts."""
    difference = "" if None in (own, published) else f", {own - published:+.2f}"
    printed = "" if published is None else f" ({published:.2f}{'†' if marked else ''}{difference})"
    interval = f" [{shown(limits[0])}, {shown(limits[1])}]" if limits else ""
    return shown(own, ".2f") + printed + interval + (f" n={n}" if n else "")


def asked_of(cell):
    """The number of items behind a cell; None without one."""
    return cell["n"]["asked"] if cell and "n" in cell else None


def paper_table(cfg):
    """--table: the layout of the paper's table, our figures from run folders with the paper's beside."""
    published = json.loads((data_dir / "results.json").read_text(encoding="utf-8"))
    columns, rows = (published[f"table {cfg.table}"][key] for key in ("columns", "rows"))
    titles = {benchmark.title: name for name, benchmark in BENCHMARKS.items()}
    own, lines, notes, origin = {}, [], [], {}  # (model, label) -> benchmark -> cell of its report
    for folder in (cfg.runs or cfg.out).split(","):
        path = Path(folder.strip()) / "report.json"
        if not path.exists():
            raise InputError(f"{path}: is not there; --runs takes folders of evaluate.py --benchmarks runs")
        report = json.loads(path.read_text(encoding="utf-8"))
        if cfg.table in ("1", "ablation") and report.get("protocol") != "raif":
            raise InputError(f"{path}: scored by protocol {report.get('protocol')!r}; the paper's figures are those of "
                             "--protocol raif: evaluate with it (answers and judgements on disk are used again)")
        for name, cells in report["benchmarks"].items() if isinstance(report["benchmarks"], dict) else []:
            for label, cell in cells.items():
                # Rows written by earlier versions have no base model of their own: theirs is the last call's.
                base_path = cell["settings"].get("base_model", report["settings"]["base_model"])
                model, base = (published["models"].get(name, name) for name in (
                    path.rstrip("/").split("/")[-1] for path in (cell["settings"]["model"], base_path)))
                # A trained model is listed under its base model.
                model = model if model in published["table 1"]["rows"] else base
                earlier = origin.setdefault((model, label, name), folder)
                if earlier != folder:
                    raise InputError(f"--runs: {earlier} and {folder} both hold {name} of row {label!r} of {model}; "
                                     "give one of them another --label")
                own.setdefault((model, label), {})[name] = cell
    if not own:
        raise InputError(f"--table {cfg.table}: no benchmark rows in {cfg.runs or cfg.out}; run --benchmarks first")

    def line(model, label, printed):
        """One row of cells: our figure with its interval, and what the paper prints."""
        cells, text = own.get((model, label), {}), []
        if cfg.table == "5":
            cell = cells.get("ifbench", {})
            values = [percent_of(cell.get(column)) for column in columns[:-1]] + [cell.get("headline")]
            limits = [limits_of(cell, column) for column in columns[:-1]] + [limits_of(cell, "headline")]
            counts = [asked_of(cell)] * len(columns)
        else:
            chosen = [cells.get(titles.get(column)) for column in columns[:-1]]
            values = [cell and cell["headline"] for cell in chosen] + [average_cell(chosen)]
            limits = [cell and limits_of(cell, "headline") for cell in chosen] + [None]
            counts = [*map(asked_of, chosen), None]
        for column, value, given, pair, n in zip(columns, values, printed or [None] * len(columns), limits, counts,
                                                 strict=True):
            said = [note for *key, note in published["anomalies"] if key == [model, label, column] and cfg.table == "1"]
            notes.extend(f"† {model}, {label}, {column}: {note}.  " for note in said)
            text.append(beside(value, given, pair, bool(said), n))
        return text

    models = sorted({model for model, _ in own})
    if cfg.table in ("2", "ablation") and len(models) > 1:
        raise InputError(f"--table {cfg.table}: of one model, but the runs hold {', '.join(models)}; give --runs of "
                         "one (a trained model counts as its --base-model)")
    if cfg.table == "2":  # of one model; rows are categories, columns are methods
        head = [models[0], *columns]
        for category, printed in rows.items():
            cells = [own.get((models[0], column), {}).get("complexbench", {}) for column in columns]
            lines.append([category, *(beside(percent_of(cell.get(category)), given, limits_of(cell, category),
                                             n=asked_of(cell)) for cell, given in zip(cells, printed, strict=True))])
    elif cfg.table == "ablation":  # a row is found by its label
        head = [models[0], *columns]
        lines = [[label, *line(models[0], label, rows.get(label))]
                 for label in dict.fromkeys([*rows, *(label for _, label in own)])]
    else:
        head = ["model", "method", *columns]
        pairs = dict.fromkeys([*((model, label) for model, methods in rows.items() for label in methods), *own])
        lines = [[model, label, *line(model, label, rows.get(model, {}).get(label))] for model, label in pairs]
    title = f"Ours (paper, difference) [95 % interval]; {published['source']}.\n"
    return "\n".join([title, markdown_table(head, lines), *notes])


# ---------------------------------------------------------------- the report


def summarise(records, rows, *, resamples=10000, seed=0):
    """What report.md says, as one JSON object; `rows` as from read_rows. Shares in 0..1, an empty split is None."""
    labels, items_of = list(rows), {label: items for label, (_, items) in rows.items()}
    pairs = [(b, a) for a, b in combinations(labels, 2)][::-1]  # the later row minus the earlier, Ours first
    columns = {}  # name -> (values_N, weights_N)
    for label, items in items_of.items():
        asked_N = np.array([len(item["strict"]) for item in items])
        for mode in ("strict", "loose"):
            met_N = np.array([sum(item[mode]) for item in items])
            columns[label, f"all_{mode}"] = (met_N == asked_N).astype(float), np.ones(len(items))
            columns[label, f"each_{mode}"] = met_N, asked_N
    # Lift: what a row meets beyond the share of unrelated base-model answers that meet the same constraints.
    lifts = all("chance" in record for record in records)
    chance_N = np.array([record.get("chance", 0.0) for record in records])
    for label in labels if lifts else ():
        columns[label, "lift"] = columns[label, "all_strict"][0] - chance_N, np.ones(len(records))
    for a, b in pairs:
        columns[a, b] = columns[a, "all_strict"][0] - columns[b, "all_strict"][0], np.ones(len(records))
    values_NK, weights_NK = (np.stack([column[k] for column in columns.values()], axis=1) for k in (0, 1))

    report = {"n": len(records), "rows": {}, "differences": {}, "kinds": {}, "difficulty": None}
    for label, (settings, items) in rows.items():
        formats = [item["format_ok"] for item in items if item["format_ok"] is not None]
        averages = {key: float(np.mean([item[key] for item in items]))
                    for key in ("thought_tokens", "answer_tokens", "repetition", "truncated")}
        report["rows"][label] = {"settings": settings, "seconds": settings["seconds"], **averages,
                                 "format_failures": 1 - float(np.mean(formats)) if formats else None,
                                 "perplexity": (settings["perplexity"] or {}).get("value")}
    ood_N = np.array([bool(record.get("ood")) for record in records])
    report["chance"] = {}
    for split, mask_N in zip(SPLITS, (np.ones_like(ood_N), ~ood_N, ood_N), strict=True):
        n = int(mask_N.sum())
        intervals = {}
        if n:
            stats = bootstrap(values_NK[mask_N], weights_NK[mask_N], resamples=resamples, seed=seed)
            intervals = {name: {"share": float(share), "low": float(low), "high": float(high), "n": n}
                         for name, share, low, high in zip(columns, *stats, strict=True)}
        report["chance"][split] = float(chance_N[mask_N].mean()) if n and lifts else None
        for label in labels:
            names = ["all_strict", "all_loose", "each_strict", "each_loose"] + ["lift"] * lifts
            report["rows"][label][split] = {name: intervals[label, name] for name in names} if n else None
        for a, b in pairs:
            report["differences"].setdefault(f"{a} − {b}", {})[split] = intervals[a, b] if n else None

    for label, items in items_of.items():
        for item in items:
            for kind, met in zip(item["kinds"], item["strict"], strict=True):
                report["kinds"].setdefault(kind, {name: [] for name in labels})[label].append(met)
    for kind, verdicts in report["kinds"].items():
        shares = {label: float(np.mean(verdicts[label])) for label in labels}
        report["kinds"][kind] = {"n": len(verdicts[labels[0]]), **shares}
    report["kinds"] = dict(sorted(report["kinds"].items()))
    if "I/O" in rows:
        easy = [kind for kind, shares in report["kinds"].items() if shares["I/O"] > 0.9]
        report["difficulty"] = {"io_share": report["rows"]["I/O"]["all"]["all_strict"]["share"], "kinds_above_90": easy}
    return report


def percent(cell, signed=False):
    """A share or a difference with its interval, in percent (points)."""
    sign = "+" if signed else ""
    return f"{100 * cell['share']:{sign}.1f} [{100 * cell['low']:{sign}.1f}, {100 * cell['high']:{sign}.1f}]"


def report_markdown(report, records, rows, cfg, benchmark_path, plots):
    """report.md: the tables of `report`, the plots, and ten fixed prompts with the answers of all rows."""
    splits = {split: next(iter(report["rows"].values()))[split] for split in SPLITS}
    n = {split: cells["all_strict"]["n"] if cells else 0 for split, cells in splits.items()}
    titles = [f"{split} (n={n[split]})" for split in SPLITS]
    main, lift, cost, pairs = [], [], [], []
    for label, row in report["rows"].items():
        cells = [row[split] for split in SPLITS]
        main.append([label, *(percent(c["all_strict"]) if c else "–" for c in cells), percent(cells[0]["all_loose"]),
                     percent(cells[0]["each_strict"]), percent(cells[0]["each_loose"])])
        lift.append([label, *(percent(c["lift"], signed=True) if c and "lift" in c else "–" for c in cells)])
        cost.append([label, row["settings"]["model"], row["settings"]["method"], shown(row["format_failures"], ".1%"),
                     f"{row['truncated']:.1%}", f"{row['thought_tokens']:.1f}", f"{row['answer_tokens']:.1f}",
                     shown(row["perplexity"], ".1f"), f"{row['repetition']:.1%}", f"{row['seconds']:.0f}"])
    for name, difference in report["differences"].items():
        unclear = [split for split, d in difference.items() if d and d["low"] <= 0 <= d["high"]]
        reading = f"the interval includes 0 ({', '.join(unclear)}): no difference shown" if unclear else "clear of 0"
        pairs.append([name, *(percent(d, signed=True) if d else "–" for d in difference.values()), reading])
    kinds = [[kind, row["n"], *(f"{100 * row[label]:.1f}" for label in rows)] for kind, row in report["kinds"].items()]
    text = [
        "# Evaluation\n",
        f"{n['all']} prompts of `{benchmark_path}`; `ood`: those marked as out of distribution. "
        f"Greedy decoding, at most {cfg.max_new_tokens} new tokens a turn in every row. In brackets: 95 % percentile-"
        f"bootstrap intervals over prompts ({cfg.resamples} resamples); differences are paired by prompt.\n",
        "## Constraints met\n\nShare of prompts with all constraints met (strict, unless it says loose), and share of "
        "single constraints met, over all prompts; in percent.\n",
        markdown_table(["row", *titles, "all met, loose", "per constraint", "per constraint, loose"], main),
        "## Differences between rows\n\nAll constraints met, strict, in percentage points.\n",
        markdown_table(["rows", *titles, "reading"], pairs),
        "## Format, length and fluency\n\nTruncated: the turn hit the token limit. Tokens: mean per prompt, row's own "
        f"tokenizer. Perplexity: of the answer after the plain request under {cfg.base_model}, on "
        f"{min(cfg.perplexity_items, report['n'])} prompts, the same in every row. Repetition: share of the answer's "
        "4-grams that occurred before in it.\n",
        markdown_table(["row", "model", "method", "format failures", "truncated", "thought tokens", "answer tokens",
               "perplexity", "repetition", "seconds"], cost),
        "## Per kind of constraint\n\nConstraints met, strict, in percent.\n",
        markdown_table(["kind", "n", *rows], kinds),
    ]
    if report["chance"]["all"] is not None:
        chance = ["chance, percent", *(shown(share and 100 * share) for share in report["chance"].values())]
        text[4:4] = [
            "## Lift over chance\n\nAll constraints met, strict, minus chance: the share of 20 answers of the base "
            "model, half to the same request without its constraints and half to other requests, that meet them "
            "(field `chance` of the records); in percentage points.\n",
            markdown_table(["row", *titles], [*lift, chance])]
    if report["difficulty"]:
        easy = ", ".join(report["difficulty"]["kinds_above_90"]) or "none"
        text.append(f"Difficulty: I/O meets all constraints on {report['difficulty']['io_share']:.1%} of the prompts; "
                    f"kinds it meets above 90 %: {easy}.\n")
    text += [f"![{name}]({name})\n" for name in plots]
    text.append("## Ten prompts, all rows\n")
    for k in spread(range(len(records)), 10):
        met = [f"{sum(items[k]['strict'])}/{len(items[k]['strict'])}" for _, items in rows.values()]
        text.append("> " + records[k]["messages"][-1]["content"].replace("\n", "\n> ") + "\n")
        text.append(markdown_table([records[k]["id"], *rows], [
            ["thought", *(items[k]["thought"] for _, items in rows.values())],
            ["answer", *(items[k]["answer"] for _, items in rows.values())],
            ["met", *met],
        ]))
    return "\n".join(text)


def plot_rows(report, path):
    """Bars: share of prompts with all constraints met, per row and split, with 95 % intervals."""
    plt = pyplot()
    labels = list(report["rows"])
    fig, ax = plt.subplots(figsize=(1.5 + 1.4 * len(labels), 3.6), layout="constrained")
    for position, split in enumerate(SPLITS):
        if report["rows"][labels[0]][split]:
            cells = [report["rows"][label][split]["all_strict"] for label in labels]
            share_K, low_K, high_K = (np.array([cell[key] for cell in cells]) for key in ("share", "low", "high"))
            x_K = np.arange(len(labels)) + 0.27 * (position - 1)
            ax.bar(x_K, share_K, 0.25, yerr=np.maximum(0, [share_K - low_K, high_K - share_K]), capsize=2, label=split)
    ax.set(xticks=range(len(labels)), xticklabels=labels, ylim=(0, 1), ylabel="all constraints met (strict)")
    fig.legend(loc="outside upper center", ncols=len(SPLITS), frameon=False)
    fig.savefig(path, dpi=120)
    plt.close(fig)


def plot_training(curves, path):
    """One panel per (title, x_N, y_N); nothing is smoothed, so that what is seen is what was logged."""
    plt = pyplot()
    fig, axes = plt.subplots(1, len(curves), figsize=(3.2 * len(curves), 2.8), layout="constrained", squeeze=False)
    for ax, (title, x, y) in zip(axes[0], curves, strict=True):
        ax.plot(x, y, linewidth=1)
        ax.set(title=title, xlabel="step")
    fig.savefig(path, dpi=120)
    plt.close(fig)


def training_curves(cfg):
    """(title, steps, values) of what sft.py and grpo.py logged beside the models of the rows SFT and Ours."""
    wanted = [("sft", cfg.sft_model, key) for key in ("loss/train", "loss/val")]
    wanted += [("grpo", cfg.ours_model, key) for key in (
        "reward/mean", "reward/all_met", "dev/all_met", "dev/slips", "rollout/entropy", "rollout/skip_rate")]
    curves = []
    for stage, model, key in wanted:
        metrics = read_jsonl(Path(model).parent / "metrics.jsonl")
        points = [(row["step"], row[key]) for row in metrics if "step" in row and row.get(key) is not None]
        if points:
            curves.append((f"{stage}: {key}", *zip(*points, strict=True)))
    return curves


def write_report(cfg, records, rows, benchmark_path):
    """report.json, report.md and the PNG plots in the run folder; returns the report."""
    report = {"benchmarks": str(benchmark_path), "settings": asdict(cfg),
              **summarise(records, rows, resamples=cfg.resamples, seed=cfg.seed)}
    folder, plots, curves = Path(cfg.out), ["rows.png"], training_curves(cfg)
    plot_rows(report, folder / "rows.png")
    if curves:
        plot_training(curves, folder / "training.png")
        plots.append("training.png")
    write_atomic(folder / "report.json", json.dumps(report, indent=1, ensure_ascii=False))
    write_atomic(folder / "report.md", report_markdown(report, records, rows, cfg, benchmark_path, plots))
    return report


def main(argv=None):
    cfg = parse_flags(Config, argv, PRESETS)
    names = [name.strip() for name in cfg.benchmarks.split(",")] if cfg.benchmarks else []
    on_benchmarks = bool(names) and all(name in BENCHMARKS for name in names)
    cfg.out = cfg.out or ("runs/benchmarks" if on_benchmarks or cfg.table else "runs/evaluate")
    if cfg.score:
        print(json.dumps(score_files(cfg), ensure_ascii=False))
        return
    if cfg.table:
        print(paper_table(cfg))
        return
    if cfg.prepare:
        prepare(names, Path(cfg.benchmark_dir))
        return
    cfg.max_new_tokens = cfg.max_new_tokens or (4096 if on_benchmarks else 200)
    judge = None if on_benchmarks else make_judge(cfg.judge, precision=cfg.precision,
                                                  cache=Path(cfg.out) / "judge_cache")
    if cfg.judge_agreement:
        if judge is None:
            raise InputError("--judge-agreement: which judge? give --judge NAME (loaded here) or NAME@URL (served)")
        agreement, verdicts = judge_agreement(judge, cfg.judge_agreement, cfg.limit)
        write_jsonl(Path(cfg.out) / "judge_agreement.jsonl", verdicts)
        print(json.dumps({"judge": cfg.judge, **agreement}))
        return
    if not on_benchmarks:
        default = "runs/evolve/heldout.jsonl"
        path = records_path(cfg.benchmarks or default, default, "heldout")
        records, sha = read_benchmark(path, cfg.limit, cfg.judge)
    if cfg.model or cfg.method or cfg.label:
        method = cfg.method or "cot"
        jobs = [(cfg.label or METHODS[method], cfg.model or cfg.base_model, method)]
    else:
        for model, stage in ((cfg.sft_model, "sft.py"), (cfg.ours_model, "grpo.py")):
            if not (Path(model) / "config.json").is_file():
                raise InputError(f"{model}: no model there; run python {stage} first, or give --model for one row")
        jobs = [("I/O", cfg.base_model, "io"), ("CoT", cfg.base_model, "cot"),
                ("CoT closed", cfg.base_model, "closed"), ("SFT", cfg.sft_model, "cot"),
                ("Ours", cfg.ours_model, "cot"), ("Ours direct", cfg.ours_model, "direct")]
    rank, _ = init_distributed()
    open_run(cfg.out, cfg, resume=True)

    loaded = {}

    def load(name):
        """(model, tokenizer, engine) of NAME[@URL]; one model is in memory at a time, none after an empty name."""
        model_name, url = split_address(name)
        if url:
            return None, None, Endpoint(url, model_name, progress="answers", timeout=600, skip_refused=True)
        if name not in loaded:
            loaded.clear()
        if name and name not in loaded:
            model, tokenizer = load_model(name, dtype=compute_dtype(cfg.precision))
            engine = make_engine(cfg.engine, model, tokenizer, source=name, max_length=4096 + cfg.max_new_tokens)
            engine.wake()
            engine.sync(model)
            loaded[name] = model, tokenizer, engine
        return loaded.get(name)

    if on_benchmarks:
        report = run_benchmarks(cfg, names, jobs, load)
        for name, cells in report["benchmarks"].items():
            for label, cell in cells.items():
                interval = f"[{shown(cell['low'])}, {shown(cell['high'])}]"
                print(f"{name:12} {label:8} {shown(cell['headline'])} {interval}  ({cell['seconds']:.0f} s)")
        return
    for label, model, method in jobs:
        answer_row(cfg, label, model, method, with_thoughts(cfg, label, method, records, sha, load), sha, load, judge)
    if rank:
        return
    wanted = {"benchmark": sha, "max_new_tokens": cfg.max_new_tokens}
    rows = read_rows(cfg.out, records, wanted)
    add_perplexity(cfg, records, rows)
    report = write_report(cfg, records, rows, path)
    for label, row in report["rows"].items():
        lift = row["all"].get("lift")
        print(f"{label:8} all constraints met {percent(row['all']['all_strict'])} %"
              + (f", lift {percent(lift, signed=True)}" if lift else "") + f"  ({row['seconds']:.0f} s)")
    print(f"report: {Path(cfg.out) / 'report.md'}")


if __name__ == "__main__":
    launch(main)
