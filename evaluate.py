"""Stage 4: measure models on a record file or on seven public benchmarks; write report.md, report.json and PNG plots.

    python evaluate.py                                             six rows on the held-out prompts, see rows_of_call
    python evaluate.py --model runs/grpo/model --label Ours        one row; the report is rebuilt from all rows there
    python evaluate.py --method sdc --benchmarks my_records.jsonl  another inference method, another record file
    python evaluate.py --judge NAME[@URL] --judge-agreement FILE   accuracy, precision, recall, kappa of a judge
    python evaluate.py --prepare --benchmark-dir benchmarks        download the benchmarks, print their licences
    python evaluate.py --benchmarks ifeval,cello,cfbench,complexbench,fb-bench,followbench,infobench --model MODEL
                       --method io --judge NAME@URL                answer, judge, score
    python evaluate.py --score cello --responses FILE              score recorded answers: one JSON object on stdout
    python evaluate.py --table 1 --runs runs/a,runs/b              the paper's table next to our figures

One way for all of them: load the items of a benchmark (a record file is one), generate an answer for each row of the
table, ask the judge what rules cannot check, score, take the metrics with their intervals, report.

Decoding is greedy with one token limit for all rows. Thought and tags are removed before scoring; an answer with a
broken format counts as a format failure and is scored on what is left of it. Every figure comes with its n and a
percentile-bootstrap interval over prompts; rows are compared prompt by prompt (paired bootstrap). A killed run
resumes where it stopped: give the same command again.

Words: an item is one prompt of a benchmark, a record what its authors (or evolve.py) wrote about it, a row one line of
the tables (a model with an inference method), an output what a row wrote for one item, a verdict what that is worth.
Suffixes: N items, G groups of items, R bootstrap resamples, M metrics, B sequences, T tokens.
"""

import ast
import hashlib
import itertools
import json
import math
import re
import string
import sys
import time
import urllib.request
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
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
    ask_until_readable,
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
    spread,
    token_batches,
    token_logprobs,
    write_atomic,
    write_jsonl,
)
from rewards import InputError

METHODS = {  # inference method -> default label of its row; the functions are in ANSWER_BY
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
    base_model: str = "smollm2-135m"  # model of the rows I/O and CoT, the judge of perplexity; what --model came from
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
    limit: int = 0  # evaluate only this many items, spread evenly over the file (0 = all)
    chunk: int = 64  # prompts generated between two writes of the row file; a killed run loses at most these
    resume: bool = True  # reuse the answers a row already has; --no-resume generates them again
    engine: Literal["hf", "vllm"] = "hf"  # rollout engine
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # arithmetic of generation
    perplexity_items: int = 64  # answers per row whose perplexity under the base model is measured (0 = none)
    score: str = ""  # score recorded answers, without a model: ifeval, cello, cfbench, complexbench, fb-bench, ...
    benchmark_dir: str = "benchmarks"  # folder that holds ifeval/, cello/ and so on, the authors' own files
    prepare: bool = False  # download the files of --benchmarks (default: all) into --benchmark-dir, and check them
    table: Literal["", "1", "2", "ablation", "5"] = ""  # print a table of the paper next to ours from --runs
    runs: str = ""  # run folders of --table, separated by commas (default: --out)
    responses: str = ""  # with --score: JSONL of {"id": ..., "response": text or null}
    judgements: str = ""  # with --score: JSONL of {"id": ..., "question": number or null, "reply": a judge's raw text}
    protocol: Literal["official", "raif", "corrected"] = "official"  # the authors' own; RAIF's headlines; slips fixed
    resamples: int = 10000  # bootstrap resamples
    seed: int = 0  # seed of the bootstrap


PRESETS = {
    "lesson": dict(benchmarks="runs/lesson/evolve/heldout.jsonl", out="runs/lesson/evaluate", max_new_tokens=120,
                   sft_model="runs/lesson/sft/model", ours_model="runs/lesson/grpo/model", perplexity_items=8),
}


# ---------------------------------------------------------------- statistics


def total(values_RN):
    """Sums (R,) over the items, one after the other as Python's sum adds them (numpy's own sum adds in pairs)."""
    return values_RN.cumsum(axis=1)[:, -1] if values_RN.shape[1] else np.zeros(len(values_RN))


def divide(part_R, whole_R):
    """part / whole, NaN where the whole is 0: there is nothing to take a share of."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(whole_R == 0, np.nan, part_R / whole_R)


def rounded(values_R, digits):
    """Each value rounded as Python rounds (numpy's rounding differs in some ties)."""
    return np.array([round(float(value), digits) for value in values_R])


class Sample:
    """Items with their verdicts, and R resamples of them: weights_RN says how often each resample draws each item.

    A mean is taken in all resamples at once: an array (R,), NaN where a resample holds nothing to take it of. The
    figure itself, without resampling, is the one row in which every weight is 1.
    """

    def __init__(self, items, verdicts, weights_RN):
        self.items, self.verdicts, self.weights_RN = items, verdicts, weights_RN
        self.nothing = np.full(len(weights_RN), np.nan)

    def pick(self, positions):
        """The sample of the items at these positions only."""
        return Sample([self.items[n] for n in positions], [self.verdicts[n] for n in positions],
                      self.weights_RN[:, positions])

    def where(self, flags):
        """The sample of the items whose flag is true."""
        return self.pick([n for n, flag in enumerate(flags) if flag])

    def values(self, name):
        """What the verdicts say under this name."""
        return [verdict[name] for verdict in self.verdicts]

    def ratio(self, parts, wholes):
        """Sum of the parts over sum of the wholes: constraints met of constraints asked."""
        parts_N, wholes_N = np.array(parts, dtype=np.float64), np.array(wholes, dtype=np.float64)
        return divide(total(self.weights_RN * parts_N), total(self.weights_RN * wholes_N))

    def mean(self, values):
        """Mean of the values that are not None."""
        values = list(values)
        return self.ratio([value or 0 for value in values], [value is not None for value in values])

    def share(self, lists):
        """Share of what holds among all entries of the items' lists."""
        return self.ratio([sum(entries) for entries in lists], [len(entries) for entries in lists])

    def numpy_mean(self, values):
        """Mean with numpy's order of addition, for authors who round what np.mean gives them."""
        return divide((self.weights_RN * np.array(values, dtype=np.float64)).sum(axis=1), self.weights_RN.sum(axis=1))

    def mean_of(self, metrics):
        """Mean of metrics (R,), those without a value left out."""
        metrics_MR = np.stack([self.nothing, *metrics])
        return divide(np.nancumsum(metrics_MR, axis=0)[-1], (~np.isnan(metrics_MR)).sum(axis=0))


def positions_by(keys):
    """{key: positions of the items that have it}, in the order of first occurrence."""
    positions = {}
    for n, key in enumerate(keys):
        positions.setdefault(key, []).append(n)
    return positions


def resampled_weights(groups, resamples, seed):
    """How often each resample draws each item, in arrays (at most 1000, N) that bound the memory.

    Items of one group are drawn together. The same groups, count and seed give the same resamples: the difference of
    two rows of a table, taken resample by resample, has the interval of the paired bootstrap.
    """
    positions = positions_by(groups)
    group_N = np.empty(len(groups), dtype=int)
    for g, members in enumerate(positions.values()):
        group_N[members] = g
    rng = np.random.default_rng(seed)
    for start in range(0, resamples, 1000):
        # How often each group is drawn; faster than drawing as many groups for each resample.
        share_G = np.full(len(positions), 1 / len(positions))
        counts_RG = rng.multinomial(len(positions), share_G, size=min(1000, resamples - start))
        yield counts_RG[:, group_N].astype(np.float64)


def bootstrap(measure, groups, *, resamples=10000, seed=0):
    """The metrics of all items, and the values of each in resamples of their groups: (metrics, {name: values (R,)}).

    measure(weights_RN) gives metrics by name; those that are arrays (R,) are resampled, the others come as they are.
    """
    metrics = measure(np.ones((1, len(groups))))
    parts = {name: [] for name, value in metrics.items() if isinstance(value, np.ndarray)}
    for weights_RN in resampled_weights(groups, resamples, seed):
        part = measure(weights_RN)
        for name, values in parts.items():
            values.append(part[name])
    return plain(metrics), {name: np.concatenate(values) for name, values in parts.items() if values}


def plain(metric):
    """A metric as JSON has it: arrays of one resample become numbers, NaN becomes None."""
    if isinstance(metric, np.ndarray):
        return None if np.isnan(metric[0]) else float(metric[0])
    if isinstance(metric, dict):
        return {name: plain(value) for name, value in metric.items()}
    if isinstance(metric, list):
        return [plain(value) for value in metric]
    return metric


def limits(values_R):
    """(low, high): the 95 % percentile-bootstrap interval; (None, None) if no resample has a value."""
    values_R = values_R[~np.isnan(values_R)]
    return tuple(np.percentile(values_R, [2.5, 97.5]).tolist()) if len(values_R) else (None, None)


def mean(values):
    """Mean of the values that are not None; None without any."""
    values = [value for value in values if value is not None]
    return float(sum(values) / len(values)) if values else None


# ---------------------------------------------------------------- benchmarks: what they have in common


@dataclass
class Item:
    """One prompt of a benchmark, and what is needed to score an answer to it."""

    id: str
    messages: list  # what the model sees
    language: str  # en or zh
    record: dict  # the authors' record
    questions: list = field(default_factory=list)  # what a judge is asked: [] nothing, [None] once, [0, 1, ...] each
    group: str = ""  # items of one group are resampled together
    part: str = ""  # CELLO: the task file; FollowBench: the constraint type
    plan: list = field(default_factory=list)  # sub-questions, which oracle decomposition gives away
    steps: list = field(default_factory=list)  # FollowBench: the instruction of level 0, 1, ... up to this one
    thought: tuple = ("", "stop")  # handed to the model by sdc, other, expert: (text, how it ended)


def make_item(key, messages, language, record, **more):
    """An Item; a text becomes the one user message, and an item without a group is a group of its own."""
    item = Item(str(key), from_user(messages) if isinstance(messages, str) else messages, language, record, **more)
    item.group = str(item.group or key)
    return item


def from_user(text):
    return [{"role": "user", "content": text}]


class Benchmark:
    """A benchmark: its files, the judge's questions, the verdict on an answer, the published metrics.

    Protocols: official is the authors' own, raif that with the headlines of the paper's Table 1, corrected counts the
    unreadable as 0 and fixes slips that the classes name.
    """

    name = title = ""
    path = ""  # of the authors' file below --benchmark-dir
    is_jsonl = False  # one record a line, or else one list
    fields = {}  # what every record has to hold: field -> type or types
    json_mode = False  # is the judge asked to reply in JSON mode?

    def load(self, folder):
        """The items of the benchmark."""
        path = folder / self.path
        return [self.item(record, number, path) for number, record in self.read(path)]

    def read(self, path):
        """(position from 1, record) of a file of the authors."""
        records = rewards.json_lines(path) if self.is_jsonl else json_list(path)
        return [(number, checked(path, number, record, **self.fields)) for number, record in records]

    def item(self, record, number, path):
        """The Item of a record; `number` and `path` say where it is."""
        raise NotImplementedError

    def conversation(self, item, answer, question, replies):
        """What the judge is asked; `replies` are its raw replies to earlier questions."""
        raise NotImplementedError

    def readable(self, item, question, reply):
        """Can the judge's reply be read? If not, it is asked again."""
        return True

    def open_judge(self, cfg):
        """What answers the questions: here the chat function of a served or a local model."""
        return open_chat(cfg.judge, precision=cfg.precision, cache=judge_cache(cfg), timeout=600,
                         skip_refused=True).chat

    def ask(self, judge, jobs, cfg):
        """The judge's raw reply to each Job."""
        return raw_judgements(self, judge, jobs, cfg)

    def answer_of(self, item, output):
        """What of an output is judged and scored; None is no answer."""
        return None if output.get("refused") else output["answer"]

    def next_questions(self, item, replies, protocol):
        """The questions that can be asked now, given the replies so far."""
        return [question for question in item.questions if question not in replies]

    def verdict(self, item, answer, replies, protocol):
        """What one answer is worth: a dict, with the judge's replies counted as `judged` and `unparsable`.

        answer: the text without thought and tags, None if there is none. "left_out": True where the authors drop it.
        """
        raise NotImplementedError

    def metrics(self, sample, protocol):
        """Metrics by name, arrays (R,); `headline` is the figure of the tables, in percent."""
        raise NotImplementedError

    def details(self, sample, protocol):
        """Further figures, of the items as they are only."""
        return {}


def checked(path, number, record, **fields):
    """`record` if it is an object with these fields of these types, else InputError `file:number: field ...`."""
    for name, types in fields.items():
        if not isinstance(record, dict) or name not in record or not isinstance(record[name], types):
            allowed = types if isinstance(types, tuple) else (types,)
            raise InputError(f"{path}:{number}: field {name!r}: missing or of another type; it has to be "
                             f"{' or '.join(t.__name__ for t in allowed)} (--prepare downloads the benchmarks' files)")
    return record


def json_list(path):
    """(position from 1, value) of a file that is one JSON list; NaN is allowed, as in CELLO's files."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); --benchmark-dir is the folder that holds "
                         "ifeval/, cello/ and so on; --prepare downloads the files") from None
    except ValueError as error:
        raise InputError(f"{path}: is not JSON ({error}); --prepare downloads the file again") from None
    if not isinstance(values, list):
        raise InputError(f"{path}: holds no list; --prepare downloads the file again")
    return enumerate(values, 1)


@lru_cache
def rule_table(name):
    """data/benchmarks/NAME_rules.json."""
    return json.loads((data_dir / "benchmarks" / f"{name}_rules.json").read_text(encoding="utf-8"))


def literal(text):
    """The Python literal that a text spells, None if it spells none. Text of a model is never evaluated."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


# ---------------------------------------------------------------- IFEval and IFBench


class IFEval(Benchmark):
    """541 English prompts whose 25 types of constraints are checked by rules."""

    name, title, path, is_jsonl = "ifeval", "IFEval", "ifeval/input_data.jsonl", True
    fields = {"key": (int, str), "prompt": str, "instruction_id_list": list, "kwargs": list}

    def item(self, record, number, path):
        problem = self.problem(record)
        if problem:
            raise InputError(f"{path}:{number}: field 'kwargs': {problem}; --prepare downloads the file again")
        return make_item(record["key"], record["prompt"], "en", record)

    def problem(self, record):
        """What keeps the record from being scored; None if nothing does."""
        if len(record["kwargs"]) != len(record["instruction_id_list"]):
            return "one per instruction"
        for name, kwargs in constraints_of(record):
            error = unscorable(name, kwargs)
            if error:
                return error
        return None

    def verdict(self, item, answer, replies, protocol):
        strict, loose = [], []
        for name, kwargs in constraints_of(item.record):
            met = answer is not None and rewards.check(name, kwargs, answer, mode="compat")
            strict.append(met)
            loose.append(met or answer is not None and rewards.check_loose(name, kwargs, answer, mode="compat"))
        return {"strict": strict, "loose": loose}

    def metrics(self, sample, protocol):
        metrics = {}
        for mode in ("strict", "loose"):
            met = sample.values(mode)
            metrics[f"prompt_{mode}"] = sample.mean(map(all, met))
            metrics[f"instruction_{mode}"] = sample.share(met)
        headline = "prompt_loose" if protocol == "raif" else "prompt_strict"
        return metrics | {"headline": 100 * metrics[headline]}

    def details(self, sample, protocol):
        met = {}  # constraint type -> its strict verdicts
        for item, strict in zip(sample.items, sample.values("strict"), strict=True):
            for name, holds in zip(item.record["instruction_id_list"], strict, strict=True):
                met.setdefault(name, []).append(holds)
        return {"kinds": {name: mean(met[name]) for name in sorted(met)}}


class IFBench(IFEval):
    """Constraint types outside IFEval's (Table 5). What rewards.CONSTRAINTS does not know is named, not scored."""

    name, title, path = "ifbench", "IFBench", "ifbench/IFBench_test.jsonl"

    def problem(self, record):
        return None if len(record["kwargs"]) == len(record["instruction_id_list"]) else "one per instruction"

    def verdict(self, item, answer, replies, protocol):
        unknown = [name for name, kwargs in constraints_of(item.record) if unscorable(name, kwargs)]
        if unknown:
            return {"left_out": True, "unknown": unknown}
        return super().verdict(item, answer, replies, protocol)

    def metrics(self, sample, protocol):
        """IFEval's four, over the prompts of which every type can be scored; the headline is their mean."""
        metrics = super().metrics(scored(sample), protocol)
        del metrics["headline"]
        return metrics | {"headline": 100 * sample.mean_of(metrics.values())}

    def details(self, sample, protocol):
        part, unknown = scored(sample), set()
        for verdict in sample.verdicts:
            unknown |= set(verdict.get("unknown", []))
        count = sum(len(item.record["kwargs"]) for item in sample.items)
        share = sum(map(len, part.values("strict"))) / max(1, count)
        note = f"{share:.0%} of the instructions are scored; types that are not: {', '.join(sorted(unknown))}"
        return super().details(part, protocol) | {"not_scored": sorted(unknown), "share_scored": share,
                                                  "notes": [note]}


def constraints_of(record):
    """(constraint id, kwargs) pairs of an IFEval record."""
    return list(zip(record["instruction_id_list"], record["kwargs"], strict=True))


def unscorable(name, kwargs):
    """Why rewards.check cannot score this constraint; None if it can."""
    try:
        rewards.check(name, kwargs, "x", mode="compat")
    except ValueError as error:
        return error
    return None


def scored(sample):
    """The sample without the items that the authors leave out."""
    return sample.where(not verdict.get("left_out") for verdict in sample.verdicts)


# ---------------------------------------------------------------- CELLO


class Cello(Benchmark):
    """523 Chinese prompts; four criteria in 0..1 by rules, None where one is not asked. Odd on purpose where the
    authors' scorer is: see the comments."""

    name, title = "cello", "CELLO"
    fields = {"Instruction": str, "Instruction_id": str, "lang": str, "histories": list, "Count_limit": list,
              "Answer_format": list, "Task_prescribed_phrases": list, "Input_depdent_query": list}
    instruction_tasks = ("extraction", "Planning", "meta_prompt", "brainstorming_single_round", "writing_single_round")
    input_tasks = ("keywords_extraction", "closed_qa", "Summarization", "Structure", "brainstorming_multi_rounds",
                   "writing_multi_rounds")

    def load(self, folder):
        paths, items = sorted((folder / "cello").glob("*.json")), []
        if not paths:
            raise InputError(f"{folder / 'cello'}: no *.json there; --benchmark-dir is the folder that holds cello/")
        for path in paths:
            items += [self.item(record, number, path) for number, record in self.read(path)]
        return items

    def item(self, record, number, path):
        messages = []
        for request, answer in record["histories"]:
            messages += [*from_user(request), {"role": "assistant", "content": answer}]
        messages += from_user(record["Instruction"])
        return make_item(record["Instruction_id"], messages, "zh", record, part=path.stem)

    def verdict(self, item, answer, replies, protocol):
        record = item.record
        if answer is None:
            return {"scores": [0.0] * 4}  # on all four criteria, asked or not
        form = [share_present(answer, record["Answer_format"])]
        criterion = first_criterion(record["Answer_format"], ("resolve",))
        if criterion:
            form.append(int(can_be_read(answer, criterion[1])))
        query, source = share_present(answer, record["Input_depdent_query"]), record.get("input_text")
        if query and isinstance(source, str) and source != "NULL":
            query *= 1 - character_bleu(answer, source)
        # The authors append each answer to the history before scoring, so that a revision is compared with itself.
        previous = answer
        if protocol == "corrected":
            previous = None
            if record["histories"]:
                previous = record["histories"][-1][1]
        return {"scores": [mean(form), query, share_present(answer, record["Task_prescribed_phrases"]),
                           count_score(answer, record, previous)]}

    def metrics(self, sample, protocol):
        tasks, criteria = {}, {}
        for task, positions in sorted(positions_by(item.part for item in sample.items).items()):
            part = sample.pick(positions)
            criteria[task] = [part.mean(column) for column in zip(*part.values("scores"), strict=True)]
            tasks[task] = sample.mean_of(criteria[task])  # of the criterion means, not of the samples' own means
        structure = [tasks.pop(name) for name in ("Structure_None", "Structure_hard", "Structure_simple")
                     if name in tasks]
        if structure:
            tasks["Structure"] = sample.mean_of(structure)
        instruction = sample.mean_of([tasks[name] for name in self.instruction_tasks if name in tasks])
        inputs = sample.mean_of([tasks[name] for name in self.input_tasks if name in tasks])
        average = sample.mean_of([instruction, inputs])
        names = ("answer_format", "input_dependent", "task_prescribed", "count_limit")
        columns = [sample.mean_of(column) for column in zip(*criteria.values(), strict=True)]
        return {"average": average, "complex_instruction": instruction, "complex_input": inputs,
                "headline": 100 * average, "tasks": tasks, "criteria": dict(zip(names, columns, strict=True))}


def first_criterion(criteria, names):
    """(criterion, limit) of the first entry that is one of `names`; None if there is none or a NULL comes first."""
    for entry in criteria:
        if entry["criterion"] in names:
            return entry["criterion"], entry["limit"]
        if entry["criterion"] == "NULL":
            return None
    return None


def share_present(text, criteria):
    """Share of the required substrings that occur (a bare string is gone through character by character)."""
    criterion = first_criterion(criteria, ("keywords",))
    if criterion is None:
        return None
    words = criterion[1]
    return sum(word in text for word in words) / len(words)


def can_be_read(text, form):
    """Can the text be read as dict (also asked for as json), list, tuple, xml or yaml?"""
    import xml.etree.ElementTree as ElementTree

    import yaml

    if form in ("json", "dict"):  # literals of Python, not JSON: true and null do not pass
        return isinstance(literal(text), dict)
    if form in ("list", "tuple"):
        return type(literal(text)).__name__ == form
    try:
        if form == "xml":
            ElementTree.fromstring(text)
        elif form == "yaml":
            yaml.safe_load(text)
        else:
            return False  # an unknown form, ["xml"] in three records, is never met
    except (ValueError, TypeError, RecursionError, ElementTree.ParseError, yaml.YAMLError):
        return False
    return True


def character_bleu(text, reference):
    """Corpus BLEU-4 over characters, uniform weights, no smoothing: 0 as soon as one n-gram order has no match."""
    log_precision = 0.0
    for n in range(1, 5):
        matches = (character_grams(text, n) & character_grams(reference, n)).total()
        if not matches:
            return 0.0
        log_precision += math.log(matches / (len(text) - n + 1)) / 4
    return math.exp(log_precision + min(0.0, 1 - len(reference) / len(text)))


def character_grams(text, n):
    return Counter(text[i : i + n] for i in range(len(text) - n + 1))


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


def word_score(text, record):
    """How near the text is to its limit of words (Chinese: characters); None if there is no such limit."""
    criterion = first_criterion(record["Count_limit"], ("word-max", "word-min", "word-exact", "word-min-max"))
    if criterion is None:
        return None
    mode, limit = criterion
    if record["lang"] == "ch":
        n = len(re.findall("[\u4e00-\u9fa5]", text))
    else:
        n = sum(re.search("[A-Za-z0-9]", word) is not None for word in text.split())
    if mode == "word-max" and n > limit:
        return 1 - (n - limit) / n
    if mode == "word-min" and n < limit:
        return n / limit
    return 1  # also for an exact number and for a range: those never count against an answer


def sentence_score(text, record):
    """How near the text is to its limit of sentences; None if there is no such limit."""
    criterion = first_criterion(record["Count_limit"],
                                ("sentence-max", "sentence-min", "sentence-min-max", "sentence-exact"))
    if criterion is None or criterion[0] == "sentence-max":  # a maximum always ends as not asked
        return None
    mode, limit = criterion
    if record["lang"] == "ch":
        # A run of other characters and its end mark. Only the last two characters of a sentence are looked for, so
        # that a text without any mark is scanned once.
        n = len(re.findall("[^。！？；\n][。！？；\n]", text))
    else:
        n = len(rewards.text_of(text).punkt_sentences)
    if mode == "sentence-min":
        return min(1, n / limit)
    low, high = limit if mode == "sentence-min-max" else (limit, limit)
    return int(low <= n <= high)


def revision_score(text, record, previous):
    """Is the answer as long as, or longer (shorter) than, the one it revises? None if nothing was to be revised."""
    criterion = first_criterion(record["Count_limit"], ("revise",))
    if criterion is None or previous is None:
        return None
    if criterion[1] == "longer":
        return int(len(text) >= len(previous))
    return int(len(text) <= len(previous))


def count_score(text, record, previous):
    """Mean of the asked ones of four: samples, words, sentences, revision."""
    return mean([sample_score(text, record["Count_limit"]), word_score(text, record), sentence_score(text, record),
                 revision_score(text, record, previous)])


# ---------------------------------------------------------------- CFBench


class CFBench(Benchmark):
    """1,000 Chinese prompts; one judge call marks every check point 0 or 1. Scores are rounded to two decimals by
    numpy at every step, comparisons with 0.8 are strict."""

    name, title, path = "cfbench", "CF Bench", "cfbench/cfbench_data.json"
    fields = {"idx": (int, str), "prompt": str, "split": str, "criteria": list}

    def item(self, record, number, path):
        return make_item(record["idx"], record["prompt"], "zh", record, questions=[None],
                         plan=[criterion[0] for criterion in record["criteria"]])

    def conversation(self, item, answer, question, replies):
        return from_user(prompt_text("bench_cfbench", instruction=item.record["prompt"], answer=answer,
                                     reference=item.record.get("gold", ""), points="\n\n".join(item.plan)))

    def readable(self, item, question, reply):
        return cfbench_points(reply, item.plan) is not None

    def verdict(self, item, answer, replies, protocol):
        reply = replies.get(None)
        points = cfbench_points(reply, item.plan) if reply else None
        if points:
            csr = rounded_mean(points)
            psr = priority_score(points, [criterion[1] for criterion in item.record["criteria"]])
            return {"CSR": csr, "ISR": int(csr == 1), "PSR": psr, "judged": 1, "unparsable": 0}
        csr = rounded_mean(self.fallback(reply or "", len(item.plan), protocol))
        judged = int(reply is not None)
        return {"CSR": csr, "ISR": int(csr == 1), "PSR": int(csr > 0.8), "judged": judged, "unparsable": judged}

    def fallback(self, reply, count, protocol):
        """Points read line by line from a reply of another form.

        The authors keep only the ones, so that a single one makes everything 1, and stop at a score that is no
        number. Corrected: zeros stay, and a point without a score is 0.
        """
        lines = [line.split("\t") for line in reply.split("\n")]
        scores = [as_number(fields[1]) for fields in lines if len(fields) == 2]
        if protocol == "corrected":
            scores = [score for score in scores if score in (0, 1)]
            return scores + [0.0] * (count - len(scores)) or [0.0]
        if None in scores:
            return [0.0]
        return [score for score in scores if score == 1] or [0.0]

    def metrics(self, sample, protocol):
        metrics = {}
        for split in ("", "easy", "hard"):
            part = sample.where(split in ("", item.record["split"]) for item in sample.items)
            for name in ("CSR", "ISR", "PSR"):
                metrics[f"{name}_{split}".rstrip("_")] = np.round(part.numpy_mean(part.values(name)), 2)
        names = ("CSR", "ISR", "PSR") if protocol == "raif" else ("PSR",)  # Table 1: the mean of the three
        return metrics | {"headline": 100 * sample.mean_of([metrics[name] for name in names])}


def as_number(text):
    try:
        return float(text)
    except ValueError:
        return None


def rounded_mean(values):
    return float(np.round(np.mean(values), 2))


def cfbench_points(reply, criteria):
    """The judge's 0 or 1 for each check point, or None: lines must repeat the points verbatim, in order."""
    lines = [part.split("\t") for part in reply.split("\n\n")]
    if [fields[0] for fields in lines] != criteria or any(len(fields) != 2 for fields in lines):
        return None
    scores = [as_number(fields[1]) for fields in lines]
    return scores if all(score in (0, 1) for score in scores) else None


def priority_score(points, priorities):
    """PSR: every primary point has to hold, and enough of the secondary ones."""
    primary, secondary = [], []
    for point, priority in zip(points, priorities, strict=True):
        if priority == "主需":
            primary.append(point)
        elif priority == "次需":
            secondary.append(point)
    if 0 in primary:
        return 0
    if not primary:
        return int(rounded_mean(points) > 0.8)
    return int(not secondary or 0.5 + 0.5 * rounded_mean(secondary) > 0.8)


# ---------------------------------------------------------------- ComplexBench


class ComplexBench(Benchmark):
    """1,150 Chinese prompts; yes/no questions to a judge. For a question with a rule the judge's reply names spans of
    the answer, and the rule is run on them."""

    name, title, path = "complexbench", "Complex Bench", "complexbench/data_final.json"
    fields = {"main_id": (int, str), "instruction": str, "category": str, "scoring_questions": list}

    def item(self, record, number, path):
        questions = record["scoring_questions"]
        for question in questions:
            checked(path, number, question, question=str, rule=(str, type(None)), dep=list)
            if any(type(k) is not int or not 0 <= k < len(questions) for k in question["dep"]):
                raise InputError(f"{path}:{number}: field 'dep': {question['dep']} are not positions of questions; "
                                 "--prepare downloads the file again")
        return make_item(record["main_id"], record["instruction"], "zh", record, group=record.get("group"),
                         questions=list(range(len(questions))), plan=[question["question"] for question in questions])

    def conversation(self, item, answer, question, replies):
        entry, name = item.record["scoring_questions"][question], "bench_complexbench"
        if entry["rule"] is not None:
            name += "_each" if "each" in entry["rule"] else "_span"
        # Only what the judge sees is cut; rules are run on the whole answer.
        return from_user(prompt_text(name, instruction=item.record["instruction"][:6000], answer=answer[:4000],
                                     question=entry["question"]))

    def readable(self, item, question, reply):
        if item.record["scoring_questions"][question]["rule"] is not None:
            return reply.strip() != ""  # a refusal; any other text names spans, or none
        return read_yes(reply)[1]

    def verdict(self, item, answer, replies, protocol):
        questions, raw, unparsable = item.record["scoring_questions"], [], 0
        for k, question in enumerate(questions):
            reply = replies.get(k)
            if question["rule"] is not None:
                if reply is not None and not reply.strip():
                    reply, unparsable = None, unparsable + 1
                raw.append(self.rule_verdict(question["rule"], reply, answer, protocol))
            elif reply is None:
                raw.append(False)
            else:
                met, readable = read_yes(reply)
                raw.append(met)
                if not readable:
                    unparsable += 1
        met = []
        for value, question in zip(raw, questions, strict=True):
            # One step only: the raw verdicts of `dep` count, not the adjusted ones.
            if any(raw[k] is False for k in question["dep"]):
                value = False
            met.append(value)
        return {"met": met, "judged": len(replies), "unparsable": unparsable}

    def rule_verdict(self, rule, reply, answer, protocol):
        """The rule on the spans that the reply names. Without a reply or answer the authors' "forbidden" rules hold."""
        if protocol == "corrected" and (reply is None or answer is None):
            return False
        return complexbench_rule(rule, span_list(reply, answer))

    def metrics(self, sample, protocol):
        positions = {"drfr": list(range(len(sample.items)))}
        for n, item in enumerate(sample.items):
            category = item.record["category"]
            # "Selection" pools Selection and Selection_and_Chain, as the authors do.
            for key in {category, category.rsplit("_", 1)[0], category.split("_")[0]}:
                positions.setdefault(key, []).append(n)
        metrics = {}
        for key in sorted(positions):
            part = sample.pick(positions[key])
            metrics[key] = part.share([[value is True for value in met] for met in part.values("met")])
        return metrics | {"headline": 100 * metrics["drfr"]}

    def details(self, sample, protocol):
        """The coherent test: groups whose first item has one Selection question, or several. `origin` is the share of
        their items that hold, `coherent` the share of groups all of whose items do."""
        groups = {"single": [], "multiple": []}  # the verdicts of each group
        for positions in positions_by(item.group for item in sample.items).values():
            depth = selection_depth(sample.items[positions[0]].record)
            holds = [all(value is not False for value in sample.verdicts[n]["met"]) for n in positions]
            if depth:
                groups["single" if depth == 1 else "multiple"].append(holds)
        coherent = {}
        for name, verdicts in groups.items():
            origin, whole = mean(sum(verdicts, [])), mean(map(all, verdicts))
            coherent |= {f"{name}_origin": origin, f"{name}_coherent": whole,
                         f"{name}_relative_drop": (origin - whole) / origin if origin else None}
        return {"coherent": coherent}


def selection_depth(record):
    """The number of a record's Selection questions."""
    return sum("Selection" in (question.get("composition_types") or ()) for question in record["scoring_questions"])


def read_yes(reply):
    """(是 or 否 as a bool, could it be read?): one "答案：是" or "答案：否" decides, else 是 without any 否."""
    stated = re.findall("答案：(是|否)", reply)
    if len(stated) == 1:
        return stated[0] == "是", True
    return "是" in reply and "否" not in reply, ("是" in reply) != ("否" in reply)


def span_list(reply, answer):
    """The spans an extraction reply names: `all` is the whole answer, None no span, || separates several."""
    if reply is None or answer is None:
        return []
    target = reply.rpartition("【模型回复中评分问题的评测对象】\n")[2]
    for note in ("\n\n请注意", "\n\n**注意", "\n\n注意"):
        target = target.rsplit(note, 1)[0]
    for mark in ("评分对象：", "评测对象：", "："):
        if mark in target:
            target = target.rpartition(mark)[2]
            break
    if target.startswith("all"):
        return [answer]
    return [] if "None" in target else [span.strip() for span in target.split("||")]


# A rule is a text such as model_length:[1,10]. The first entry of data/benchmarks/complexbench_rules.json whose
# `contains` are all in the text, and none of whose `without`, says how to read and run it:
#   name, or pattern   where the arguments are (a null pattern: the authors' code stops there)
#   argument           their form: words [a,b], untrimmed words, a literal, a text, a line
#   tests              the functions in SPAN_TESTS, one per argument; none: a rule that the authors do not know
#   spans              first (the default), each, each but the last, paired with the words, counted
#   wide               map punctuation to its full-width forms first;  quotes: removed, or tried either way
#   absent             the verdict if there is no span (default false);  plain: None and blank count as no span

UNKNOWN = 2  # the authors' value for a rule they do not know: false in DRFR, but what depends on it stays
FULL_WIDTH = str.maketrans("!#$%&()*,.:;?\\^“”", "！＃＄％＆（）＊，。：；？＼＾\"\"")
# A list of words has to be on the last line; untrimmed ones, literals and texts may run over several lines.
ARGUMENT_FORMS = {"words": r":(\[.*?\])$", "line": r":(.*?)$", "untrimmed words": r"(?s::(\[.*?\])$)",
                  "literal": r"(?s::(\[.*?\])$)", "text": r"(?s::(.*?)$)"}


def complexbench_rule(rule, spans):
    """True, False or UNKNOWN for a rule text and the spans of the answer that it is about."""
    entry = rule_entry(rule)
    if entry is None or not entry["tests"]:
        return UNKNOWN
    if spans in ([], [""]) and not entry.get("plain"):
        return entry.get("absent", False)
    arguments, reach = rule_arguments(entry, rule), entry.get("spans", "first")
    if entry.get("plain"):
        return span_verdict(entry, arguments, spans[0] if spans else "")
    if arguments is None:
        return UNKNOWN
    if reach == "counted":
        low, high = arguments[0]
        return low <= len(spans) <= high
    if reach == "first":
        return span_verdict(entry, arguments, spans[0])
    wanted = [arguments] * len(spans)
    if reach == "paired":
        wanted = [[word] for word in arguments[0]]
        if len(wanted) != len(spans):
            return False
    if reach == "each but the last" and len(spans) > 1:
        spans, wanted = spans[:-1], wanted[:-1]
    return all(span_verdict(entry, words, span) for span, words in zip(spans, wanted, strict=True) if span != "")


def rule_entry(rule):
    """The entry of the table for a rule text; None if there is none."""
    for entry in rule_table("complexbench"):
        missing = [text for text in entry["contains"] if text not in rule]
        unwanted = [text for text in entry.get("without", []) if text in rule]
        if not missing and not unwanted:
            return entry
    return None


def rule_arguments(entry, rule):
    """The arguments at the end of the rule text; None if they cannot be read (there the authors' code stops)."""
    pattern = entry["pattern"] if "pattern" in entry else entry["name"] + ARGUMENT_FORMS[entry["argument"]]
    match = re.search(pattern, rule) if pattern else None
    if match is None:
        return None
    arguments = [rule_argument(text, entry["argument"]) for text in match.groups()]
    return None if None in arguments else arguments


def rule_argument(text, form):
    """One argument as its form has it; None for a literal that cannot be read."""
    if form == "literal":
        return literal(text)
    if form == "words":
        return [word.strip() for word in text.strip("[]").split(",")]
    if form == "untrimmed words":
        return text.strip("[]").split(",")
    return text


def span_verdict(entry, arguments, span):
    """The tests of an entry on one span: True, False, or UNKNOWN if the arguments could not be read."""
    verdict = False
    for text in {"removed": [unquoted(span)], "either": [unquoted(span), span]}.get(entry.get("quotes"), [span]):
        if entry.get("plain") and (text == "" or "None" in text):
            verdict = entry.get("absent", False)
        elif arguments is None:
            verdict = UNKNOWN
        else:
            text = text.translate(FULL_WIDTH) if entry.get("wide") else text
            verdict = all(SPAN_TESTS[test](text, argument)
                          for test, argument in zip(entry["tests"], arguments, strict=True))
        if verdict:
            return verdict
    return verdict


def unquoted(span):
    """Without leading line breaks and one pair of outer quotes or back-ticks, of any of the kinds on either side."""
    span = span.lstrip("\n")
    return span[1:-1] if span and span[0] in "\"“`" and span[-1] in "\"”`" else span


def wide(text):
    return text.translate(FULL_WIDTH)


def words_in(span, words):
    return sum(wide(word) in span for word in words)


def has_all_words(span, words):
    return words_in(span, words) == len(words)


def has_so_many_words(span, argument):
    low, high, *words = argument
    return int(low) <= words_in(span, words) <= int(high)


def has_no_word(span, words):
    return words_in(span, words) == 0


def opens_with(span, start):
    return span.startswith(wide(start))


def closes_with(span, end):
    return any(span.endswith(wide(end) + mark) for mark in ("", "。", "？"))


def opens_otherwise(span, start):
    return not opens_with(span, start)


def closes_otherwise(span, end):
    return not closes_with(span, end)


def has_length(span, bounds):
    return bounds[0] <= len(span) <= bounds[1]


def has_word_count(span, bounds):
    return bounds[0] <= len(span.split()) <= bounds[1]


def has_only_marks(span, allowed):
    """No other ASCII punctuation, or its full-width form, than the allowed."""
    banned = {wide(mark) for mark in string.punctuation} - {wide(mark) for mark in allowed}
    return not any(mark in span for mark in banned)


def is_the_text(span, text):
    return span in (text, text + "。", text + ".")


def is_json_with_keys(span, keys):
    """Is the first object a JSON object with these keys and no others (with any, if none are named)?"""
    keys = [key for key in keys if key != ""]
    try:
        value = json.loads(first_object(span))
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and all(key in value for key in keys) and len(keys) in (0, len(value))


def first_object(text):
    """The first balanced {...} of a text; a closing brace too many before it spoils it, as in the authors' scan."""
    depth = start = 0
    for i, character in enumerate(text):
        if character == "{":
            if depth == 0:
                start = i
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return text[start : i + 1]
    return ""


SPAN_TESTS = {
    "keyword": has_all_words, "keyword_num": has_so_many_words, "forbidden_word": has_no_word,
    "startswith": opens_with, "endswith": closes_with, "not_startswith": opens_otherwise,
    "not_endswith": closes_otherwise, "length": has_length, "length_word": has_word_count,
    "constraint_punc": has_only_marks, "match": is_the_text, "Json": is_json_with_keys,
}


# ---------------------------------------------------------------- FB-Bench


class FBBench(Benchmark):
    """591 Chinese conversations with feedback. The weights are those the judge repeats, not the data's; points may be
    missing, added or reworded."""

    name, title, path, json_mode = "fb-bench", "FB Bench", "fb-bench/fb_bench_dataset_v3.json", True
    fields = {"bench_type": str, "task_type": str, "user_query": str, "origin_first_response": str, "feedback": str,
              "checklist": list}

    def item(self, record, number, path):
        messages = [*from_user(record["user_query"]),
                    {"role": "assistant", "content": record["origin_first_response"]}, *from_user(record["feedback"])]
        return make_item(number - 1, messages, "zh", record, questions=[None],
                         plan=[text for text, _ in checklist_of(record)])

    def conversation(self, item, answer, question, replies):
        record, template = item.record, {}
        for text, weight in checklist_of(record):
            template[text] = {"评判理由": "", "评判结果": "", "weight": weight}
        return from_user(prompt_text(
            "bench_fbbench", user_query=record["user_query"], first=record["origin_first_response"],
            feedback=record["feedback"], answer=answer, checklist="\n".join(item.plan),
            template=json.dumps(template, ensure_ascii=False, indent=1)))

    def readable(self, item, question, reply):
        return fbbench_score(reply) is not None

    def verdict(self, item, answer, replies, protocol):
        reply = None if answer is None else replies.get(None)
        judged = int(reply is not None)
        score = fbbench_score(reply) if judged else None
        if score is not None:
            return {"score": score, "judged": judged, "unparsable": 0}
        counts = {"judged": judged, "unparsable": judged}
        if protocol == "corrected":
            return counts | {"score": 0.0}
        return counts | {"score": None, "left_out": True}

    def metrics(self, sample, protocol):
        part, cells = scored(sample), {}
        for cell, positions in positions_by(
                (item.record["bench_type"], item.record["task_type"]) for item in part.items).items():
            members = part.pick(positions)
            cells[cell] = members.mean(members.values("score"))

        def average(*scenarios):
            values = rounded(sample.mean_of([cells[cell] for cell in cells if cell[0] in scenarios]), 4)
            if protocol != "corrected":
                values = np.where(values == 0, np.nan, values)  # the authors report a zero average as missing
            return values * 100

        correction, maintenance = average("Error Correction"), average("Response Maintenance")
        overall = average("Error Correction", "Response Maintenance")
        headline = sample.mean_of([correction, maintenance]) if protocol == "raif" else overall
        return {"error_correction": correction, "response_maintenance": maintenance, "overall": overall,
                "headline": headline, "tasks": {"/".join(cell): cells[cell] for cell in sorted(cells)}}

    def details(self, sample, protocol):
        count = len(sample.items)
        note = f"{count} items: not the 734-item set of RAIF's published numbers"
        return {"notes": [note] if count != 734 else []}


def checklist_of(record):
    """(check point, weight) pairs; the points of Response Maintenance come without weights."""
    return [(point, None) if isinstance(point, str) else tuple(point) for point in record["checklist"]]


REPETITIVE = "$REPETITIVE PATTERNS$"  # stored in place of a judgement that was refused; scored 0


def fbbench_score(reply):
    """Item score of a judgement {check point: {评判理由, 评判结果, weight}}; None if it cannot be read."""
    if REPETITIVE in reply:
        return 0.0
    try:
        points = json.loads(reply)
    except (ValueError, RecursionError):
        return None
    if not isinstance(points, dict) or not all(is_point(name, point) for name, point in points.items()):
        return None
    score = 0.0
    for point in points.values():
        if point["评判结果"] == "是":
            if point["weight"] is None:  # a point without weight decides at once
                return 1.0
            score += point["weight"]
    return score if score <= 1 + 1e-6 else None


def is_point(name, point):
    """Is it a judged check point: a reason, 是 or 否, and a weight in (0, 1] or null?"""
    if not name or not isinstance(point, dict) or "weight" not in point:
        return False
    reason, weight = point.get("评判理由"), point["weight"]
    if not isinstance(reason, str) or not reason or point.get("评判结果") not in ("是", "否"):
        return False
    return weight is None or isinstance(weight, int | float) and 0 < weight <= 1


# ---------------------------------------------------------------- FollowBench


FOLLOWBENCH_TYPES = ("content", "situation", "style", "format", "example", "mixed")


class FollowBench(Benchmark):
    """820 English and 790 Chinese prompts; level k asks for k constraints at once. Part of them is scored by rule
    (compared exactly, nothing is stripped), the rest by a judge."""

    name, title = "followbench", "Follow Bench"
    fields = {"example_id": int, "level": int, "instruction": str, "source": str, "category": str}

    def load(self, folder):
        items = []
        for language, folder_name in (("en", "data"), ("zh", "data_zh")):
            for part in FOLLOWBENCH_TYPES:
                path = folder / "followbench" / folder_name / f"{part}_constraints.json"
                if path.exists():
                    items += self.load_file(path, language, part)
        if not items:
            raise InputError(f"{folder / 'followbench'}: no data/*_constraints.json or data_zh/*_constraints.json "
                             "there; --benchmark-dir is the folder that holds followbench/")
        return items

    def load_file(self, path, language, part):
        steps, items = {}, []  # steps: example -> its instructions of level 0, 1, ..., as the judge is shown them
        for _, record in self.read(path):
            example = record["example_id"]
            steps.setdefault(example, []).append(record["instruction"])
            if record["level"]:
                group = f"{language}/{part}/{example}"
                item = make_item(f"{group}/{record['level']}", record["instruction"], language, record, group=group,
                                 part=part, steps=list(steps[example]))
                item.questions = [None] if followbench_rule(item, "") is None else []
                items.append(item)
        return items

    def conversation(self, item, answer, question, replies):
        types = {"content": "内容", "situation": "情景", "style": "风格", "format": "格式"}
        if item.language == "zh":
            kind, title = f"（{types.get(item.part)}）", "【加了{}个约束的版本】"
        else:
            kind, title = f" ({item.part})", "[Version with {} added constraints]"
        if item.part == "mixed":
            kind = ""
        steps = "\n\n".join(f"{title.format(level)}\n{text}" for level, text in enumerate(item.steps))
        return from_user(prompt_text(f"bench_followbench.{item.language}", kind=kind, steps=steps, answer=answer,
                                     level=item.record["level"]))

    def readable(self, item, question, reply):
        return read_levels(reply, item.record["level"], item.language) is not None

    def verdict(self, item, answer, replies, protocol):
        if not item.questions:
            met = followbench_rule(item, answer or "")
            return {"hard": int(met), "soft": float(met)}
        if None not in replies:
            return {"hard": 0, "soft": 0.0}
        levels = read_levels(replies[None], item.record["level"], item.language)
        if levels is not None:
            return {"hard": levels[0], "soft": levels[1], "judged": 1}
        counts = {"judged": 1, "unparsable": 1}
        if protocol == "corrected":
            return counts | {"hard": 0, "soft": 0.0}
        return counts | {"hard": -1, "soft": -1.0}  # the authors add -1 and ask for a correction by hand

    def metrics(self, sample, protocol):
        metrics, official, raif = {}, [], []
        positions = positions_by((item.language, item.part) for item in sample.items)
        for language in ("en", "zh"):
            for part in FOLLOWBENCH_TYPES:
                metrics |= self.part_metrics(sample.pick(positions.get((language, part), [])), f"{language}.{part}")
            # Table 1: the mean of six; CSL is scaled by 3.68; the five types that the authors' aggregator averages.
            judged = [f"{language}.{part}" for part in FOLLOWBENCH_TYPES if part != "example"]
            raif.append(100 * sample.mean_of([metrics[f"{name}.CSL"] for name in judged]) / 3.68)
            for rate in ("HSR", "SSR"):
                raif.append(sample.mean_of([sample.mean_of(metrics[f"{name}.{rate}"] or []) for name in judged]))
            official += [sample.mean_of(metrics[f"{language}.{part}.HSR"] or []) for part in FOLLOWBENCH_TYPES]
        return metrics | {"headline": sample.mean_of(raif if protocol == "raif" else official)}

    def part_metrics(self, sample, name):
        """HSR and SSR of levels 1 to 5 in percent, and CSL: the levels an example holds without a break from 1 on."""
        if not sample.items:
            return {f"{name}.HSR": None, f"{name}.SSR": None, f"{name}.CSL": sample.nothing}
        # Judged ones first, then those by rule, as the authors add them up.
        judged = [n for n, item in enumerate(sample.items) if item.questions]
        sample = sample.pick(judged + [n for n, item in enumerate(sample.items) if not item.questions])
        levels = positions_by(item.record["level"] for item in sample.items)
        metrics = {}
        for rate, key in (("HSR", "hard"), ("SSR", "soft")):
            rates = []
            for level in range(1, 6):
                members = sample.pick(levels.get(level, []))
                rates.append(rounded(members.mean(members.values(key)) * 100, 2))
            metrics[f"{name}.{rate}"] = rates
        streaks = [None] * len(sample.items)  # of an example, at its first level
        for positions in positions_by(item.group for item in sample.items).values():
            hard = {sample.items[n].record["level"]: sample.verdicts[n]["hard"] for n in positions}
            first = [n for n in positions if sample.items[n].record["level"] == 1]
            if first:
                streaks[first[0]] = unbroken_levels(hard)
        return metrics | {f"{name}.CSL": rounded(sample.mean(streaks), 1)}


def unbroken_levels(hard):
    """The number of levels from 1 on that hold without a break; hard: level -> 1, 0 or -1."""
    level = 1
    while hard.get(level) == 1:
        level += 1
    return level - 1


def read_levels(reply, level, language):
    """(all constraints hold, share that hold) from the last line of a judge reply; None if it cannot be read."""
    if language == "zh":
        reply = reply.replace("“", '"').replace("”", '"').strip("`").strip(" ").strip("\n").split("\n")[-1].strip(" ")
    else:
        reply = reply.strip("`").strip().split("\n")[-1]
    if level == 1:
        if "YES" in reply:
            return 1, 1.0
        return (0, 0.0) if "NO" in reply else None
    match = re.search(r"\[.*\]", reply)
    if match is None:
        return None
    listed = match[0]
    if language == "zh" and '"' not in listed and "'" not in listed:
        listed = listed.replace("YES", "'YES'").replace("NO", "'NO'")
    words = literal(listed)
    if not isinstance(words, list) or len(words) < level or (language == "en" and len(words) != level):
        return None
    known = ("YES", "NO", "PARTIAL", "MAYBE", "UNKNOWN", "PARTIALLY" if language == "zh" else "N/A")
    if any(word not in known for word in words[:level]):
        return None
    yes = words[:level].count("YES")
    return int(yes == level), yes / level


def followbench_rule(item, text):
    """Does the text meet the record's constraints, by rule? A level asks for all conditions up to it. None: a judge
    decides."""
    source, target, level = item.record["source"], item.record.get("target", ""), item.record["level"]
    if item.part == "example":
        return matches_template(text, target)
    if source in rule_table("followbench"):
        conditions = rule_table("followbench")[source][item.language]
        return all(meets_condition(name, wanted, text, item.language) for name, wanted in conditions[:level])
    if item.record["category"] == "format" and item.record["example_id"] == 22:
        return all(twenty_second_format(text, item.language, level)[:level])
    if item.record["category"] == "format" and item.record["example_id"] == 30 and item.language == "en":
        return all(thirtieth_format(text)[:level])
    if source in ("E2E", "text_editing"):
        return text == target
    if source == "WIKIEVENTS":
        return set(text.split("\n")) <= set(target.split("\n"))
    if source == "CONLL2003":
        return text in ast.literal_eval(target)
    if source == "self_made_space":
        return target in text
    patterns = {"BBH_logical": r"\([A-Z]\)", "BBH_time": r"\d{2}/\d{2}/\d{4}",
                "gsm_8k": r"\$\d+" if item.language == "en" else r"\d+美元"}
    if source in patterns:
        return re.findall(patterns[source], text)[-1:] == [target]
    return None


def matches_template(text, target):
    """Example type: the template without its {instruction} line; {answer} and a literal .* match within a line."""
    template = target.replace("{instruction}\n", "").replace("{{", "{").replace("}}", "}").replace("{answer}", ".*")
    return re.fullmatch(".*".join(map(re.escape, template.split(".*"))), text) is not None


def sentences_of(text, language):
    return [part for part in re.split("[.!?]" if language == "en" else "[。！？]", text) if part]


def sentence_length(sentence, language):
    """Words in English, characters in Chinese."""
    return len(sentence.split()) if language == "en" else len(sentence)


def meets_condition(name, wanted, text, language):
    """One condition of data/benchmarks/followbench_rules.json: what a level adds for the five summarization sources."""
    sentences = sentences_of(text, language)
    if name == "sentences":
        return len(sentences) == wanted
    if name == "longest sentence":
        return all(sentence_length(sentence, language) <= wanted for sentence in sentences)
    if name == "length":  # counted between single spaces, unlike a sentence's
        length = len(text.split(" ")) if language == "en" else len(text)
        return wanted[0] <= length <= wanted[1]
    if name == "matches":
        return re.search(wanted, text) is not None
    if name == "lacks":
        return re.search(wanted, text) is None
    if name == "sentences match":
        return len(sentences) >= len(wanted) and all(map(re.search, wanted, sentences))
    if name == "second sentence lacks":
        return len(sentences) < 2 or re.search(wanted, sentences[1]) is None
    if name == "lower case":
        return text.islower()
    if name == "no numerals":
        return not any(map(str.isnumeric, text))
    raise ValueError(f"followbench_rules.json: condition {name!r} is unknown")


def twenty_second_format(text, language, level):
    """Conditions of format example 22, in the order of the levels that add them."""
    blocks = text.split("\n\n")
    numbered = [re.match(r"\d+\.", block.lstrip()) for block in blocks if block.strip()]
    return [len(blocks) == (4 if level == 5 else 3),
            all(len(sentences_of(block, language)) < 3 for block in blocks[:3]),
            all(sentence_length(sentence, language) > 20 for sentence in sentences_of(text, language)),
            all(numbered), text.endswith("这些是建议" if language == "zh" else "Those are suggestions")]


def thirtieth_format(text):
    """Conditions of format example 30, in the order of the levels that add them."""
    # Sentences end at a full stop or question mark before white space, but not within i.e. or after Mr.
    sentences = re.split(r"(?<!\w\.\w.)(?<![A-Z][a-z]\.)(?<=\.|\?)\s", text)
    points = [sentence for sentence in sentences if any(f"{n}." in sentence for n in range(1, 6))]
    return ["**" in text, len(re.findall(r"\*\*[\d].+?:", text)) == 5,
            all(len(point.split(".")) < 3 for point in points),
            all(10 <= len(sentence.split()) <= 15 for sentence in sentences),
            not any(word.endswith("-ly") for word in text.split())]  # the three characters, hyphen included


# ---------------------------------------------------------------- InFoBench


class InfoBench(Benchmark):
    """500 English prompts with yes/no questions, one conversation with the judge per item. The first reply that
    cannot be read counts as no and ends the item; corrected: every question of every item is asked and counts."""

    name, title, path, is_jsonl = "infobench", "Info Bench", "infobench/InfoBench.json", True  # in spite of its name
    fields = {"id": (str, int), "instruction": str, "input": str, "subset": str, "decomposed_questions": list}

    def item(self, record, number, path):
        prompt = f"{record['instruction']}\n{record['input']}" if record["input"] else record["instruction"]
        questions = record["decomposed_questions"]
        return make_item(record["id"], prompt, "en", record, questions=list(range(len(questions))), plan=questions)

    def conversation(self, item, answer, question, replies):
        """Earlier questions with the judge's own replies, then this one. The instruction itself is not shown."""
        source, block, mention = item.record["input"], "", ""
        if source:
            block, mention = f'\nGiven input:\n"{source}"\n', " and, where it matters, the given input"
        messages = from_user(prompt_text("bench_infobench", input=block, given=mention, answer=answer,
                                         question=item.plan[0]))
        for k in range(question):
            messages += [{"role": "assistant", "content": replies[k]}, *from_user(item.plan[k + 1])]
        return messages

    def readable(self, item, question, reply):
        return read_infobench(reply) is not None

    def next_questions(self, item, replies, protocol):
        unreadable = any(read_infobench(reply) is None for reply in replies.values())
        if unreadable and protocol != "corrected":
            return []
        return super().next_questions(item, replies, protocol)[:1]

    def verdict(self, item, answer, replies, protocol):
        if answer is None and protocol != "corrected":
            return {"left_out": True, "met": []}
        met, judged, unparsable = [], 0, 0
        for question in item.questions:
            if question in replies:
                value = read_infobench(replies[question])
                met.append(value is True)
                judged += 1
                if value is None:
                    unparsable += 1
                    if protocol != "corrected":
                        break
            elif protocol == "corrected":
                met.append(False)
        return {"met": met, "judged": judged, "unparsable": unparsable}

    def metrics(self, sample, protocol):
        metrics = {}
        for name, subset in (("drfr", None), ("easy", "Easy_set"), ("hard", "Hard_set")):
            part = sample.where(subset in (None, item.record["subset"]) for item in sample.items)
            metrics[name] = part.share(part.values("met"))
        return metrics | {"headline": 100 * metrics["drfr"]}


def read_infobench(reply):
    """True, False or None (cannot be read)."""
    if reply.lower().startswith("yes"):
        return True
    if reply.lower().startswith("no"):
        return False
    if ("YES" in reply) == ("NO" in reply):
        return None
    return "YES" in reply


BENCHMARKS = {benchmark.name: benchmark for benchmark in (
    IFEval(), Cello(), CFBench(), ComplexBench(), FBBench(), FollowBench(), InfoBench(), IFBench())}


# ---------------------------------------------------------------- a record file as a benchmark


class RecordFile(Benchmark):
    """Records as evolve.py writes them: constraints checked as in the reward, but for the format of the turn."""

    name, title = "records", "Records"

    def __init__(self, path):
        self.path = Path(path)

    def load(self, folder=None):
        items = []
        for record in rewards.read_records(self.path):
            chance = record.get("chance")
            if chance is None:
                record.pop("chance", None)
            elif not isinstance(chance, int | float) or not 0 <= chance <= 1:
                raise InputError(f"{self.path}: record {record['id']!r}: field 'chance': {chance!r} is no share from 0 "
                                 "to 1; give a number, or remove it")
            if not isinstance(record.get("ood", False), bool):
                raise InputError(f"{self.path}: record {record['id']!r}: field 'ood': is not true or false")
            active = rewards.active_constraints(record)
            count = sum(c["kind"] == "judge" for c in active)
            plan = [c.get("text") or c.get("question") for c in active if c.get("text") or c.get("question")]
            items.append(make_item(record["id"], record["messages"], record.get("language", "en"), record,
                                   questions=list(range(count)), plan=plan))
        return items

    def conversation(self, item, answer, question, replies):
        """(instruction, answer, question), as the judge of the reward is asked."""
        questions = [c["question"] for c in item.record["constraints"] if c["active"] and c["kind"] == "judge"]
        return item.messages[-1]["content"], answer, questions[question]

    def open_judge(self, cfg):
        return make_judge(cfg.judge, precision=cfg.precision, cache=judge_cache(cfg))

    def ask(self, judge, jobs, cfg):
        verdicts = judge([job.conversation for job in jobs]) if jobs else []
        return ["yes" if verdict else "no" for verdict in verdicts]

    def answer_of(self, item, output):
        """As in rewards.score: a blank answer is none, and math is searched for in the whole turn."""
        if output.get("refused"):
            return None
        if item.record["task"] == "math":
            return output["text"]
        return output["answer"] if output["answer"].strip() else None

    def verdict(self, item, answer, replies, protocol):
        """{"kinds", "strict", "loose"}: an entry per active constraint (math: one for the result)."""
        counts = {"judged": len(replies), "unparsable": 0}
        if item.record["task"] == "math":
            correct = answer is not None and rewards.math_reward(answer, item.record["answer"]) == 2.0
            return counts | {"kinds": ["math"], "strict": [correct], "loose": [correct]}
        kinds = [c.get("id") or "judge" for c in item.record["constraints"] if c["active"]]
        return counts | {"kinds": kinds, "strict": holding(item, answer, replies, rewards.check),
                         "loose": holding(item, answer, replies, rewards.check_loose)}

    def metrics(self, sample, protocol):
        """Of each split: all_strict and all_loose, shares of prompts with all constraints met; each_strict and
        each_loose, shares of single constraints; lift, all_strict minus chance (where every record has one)."""
        metrics = {}
        lifted = all("chance" in item.record for item in sample.items)
        for split, positions in split_positions(sample.items).items():
            part = sample.pick(positions)
            for mode in ("strict", "loose"):
                met = part.values(mode)
                metrics[split, f"all_{mode}"] = part.mean(map(all, met))
                metrics[split, f"each_{mode}"] = part.share(met)
            if lifted:
                chance = part.mean([item.record["chance"] for item in part.items])
                metrics[split, "lift"] = metrics[split, "all_strict"] - chance
        return metrics


def split_positions(items):
    """{split: positions of its items}; a split may be empty."""
    positions = {split: [] for split in SPLITS}
    for n, item in enumerate(items):
        positions["all"].append(n)
        positions["ood" if item.record.get("ood") else "in-distribution"].append(n)
    return positions


def holding(item, answer, replies, check):
    """The verdicts on the active constraints; as in rewards.score one is false if what it depends on is."""
    verdicts, question = [], 0
    for constraint in item.record["constraints"]:
        if not constraint["active"]:
            passed = True  # the branch not taken: not checked, and nothing fails because of it
        elif constraint["kind"] == "judge":
            passed = answer is not None and replies.get(question) == "yes"
            question += 1
        else:
            passed = answer is not None and check(constraint["id"], constraint["kwargs"], answer,
                                                  prompt=item.messages[-1]["content"])
        verdicts.append(passed and all(verdicts[k] for k in constraint["depends_on"]))
    return [verdict for verdict, c in zip(verdicts, item.record["constraints"], strict=True) if c["active"]]


# ---------------------------------------------------------------- inference methods


def answer_text(text, family="cold"):
    """What is scored of an assistant turn: the answer block, or else the text left after the thought, without tags.

    A thought that never ends counts as no thought: what was written is the answer.
    """
    if "</think>" not in text and "<think>" in text:
        text = text.replace("<think>", "").strip()
    return rewards.parse_response(text, family).answer


@dataclass
class Reply:
    """The final assistant turn for one item."""

    text: str  # prefill included
    ended: str  # stop, length or refused
    thought: str = ""  # handed to the model, or written in a call of its own
    thought_ended: str = "stop"


class Writer:
    """A model that writes assistant turns, greedily unless told otherwise, and keeps all it has written."""

    def __init__(self, engine, tokenizer, cfg):
        self.engine, self.tokenizer, self.cfg = engine, tokenizer, cfg
        self.written = {}  # item id -> the texts of all calls: 10 samples, several turns

    def turns(self, items, mode, conversations=None, openings=None, **sampling):
        """n turns (text, how it ended) for each item; openings: what each turn already holds after the prefill."""
        conversations = conversations or [item.messages for item in items]
        sampling = {"n": 1, "max_tokens": self.cfg.max_new_tokens, "temperature": 0.0} | sampling
        languages = ["zh" if item.language == "zh" else "en" for item in items]
        if isinstance(self.engine, Endpoint):
            if openings:
                raise InputError("--method closed, other, expert: a served model's turn cannot be opened; give a "
                                 "local --model")
            groups = self.served_turns(conversations, languages, mode, sampling)
        else:
            groups = self.local_turns(conversations, languages, mode, openings or [""] * len(items), sampling)
        for item, group in zip(items, groups, strict=True):
            self.written.setdefault(item.id, []).extend(text for text, _ in group)
        return groups

    def local_turns(self, conversations, languages, mode, openings, sampling):
        prompts = [render_prompt(self.tokenizer, messages, mode, family=self.cfg.family, language=language)
                   for messages, language in zip(conversations, languages, strict=True)]
        begun = [prompt.ids + self.tokens(opening) for prompt, opening in zip(prompts, openings, strict=True)]
        seeds = sampling.pop("seeds", [0] * len(prompts))  # greedy decoding draws nothing
        completions = self.engine.generate(begun, seeds=seeds, **sampling)
        return [[(prompt.prefill + opening + completion.text, completion.finish_reason) for completion in group]
                for prompt, opening, group in zip(prompts, openings, completions, strict=True)]

    def served_turns(self, conversations, languages, mode, sampling):
        """A chat server opens no turn for us: the trigger alone asks for a thought, the request alone for none."""
        if mode == "cot" and self.cfg.family == "cold":
            conversations = [with_trigger(messages, language)
                             for messages, language in zip(conversations, languages, strict=True)]
        sampling.pop("seeds", None)  # a server has one seed for all
        completions = self.engine.chat(conversations, seed=self.cfg.seed, **sampling)
        return [[(served_turn(completion), completion.finish_reason) for completion in group]
                for group in completions]

    def replies(self, items, mode, conversations=None, openings=None, **sampling):
        """One turn for each item; conversations: other ones than the items' own."""
        groups = self.turns(items, mode, conversations, openings, **sampling)
        return [Reply(*group[0]) for group in groups]

    def tokens(self, text):
        """Token ids of a text; without a tokenizer (a served model) its words."""
        if self.tokenizer is None:
            return list(rewards.text_of(text).words)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    def answer(self, reply):
        return answer_text(reply.text, self.cfg.family)


def with_trigger(messages, language):
    """The conversation with the request to think first, in its system message or in a new one."""
    trigger = prompt_text(f"cot.{language}")
    if messages[0]["role"] == "system":
        return [messages[0] | {"content": f"{messages[0]['content']}\n{trigger}"}, *messages[1:]]
    return [{"role": "system", "content": trigger}, *messages]


def served_turn(completion):
    """The whole assistant turn of a served model: the thought that its server sends apart is put back in front.

    Of a refused request `reasoning` is the server's error, not a thought.
    """
    if not completion.reasoning or completion.finish_reason == "refused":
        return completion.text
    return f"<think>\n{completion.reasoning.strip()}\n</think>\n{completion.text}"


def rewritten(item, name, **parts):
    """The item's conversation with its last request put into one of the data/prompts."""
    language = "zh" if item.language == "zh" else "en"
    text = prompt_text(f"{name}.{language}", request=item.messages[-1]["content"], **parts)
    return item.messages[:-1] + from_user(text)


def answer_io(writer, items):
    return writer.replies(items, "io")


def answer_cot(writer, items):
    return writer.replies(items, "cot")


def answer_direct(writer, items):
    return writer.replies(items, "direct")


def answer_closed(writer, items):
    """The thought is closed for the model, so that there is an answer to score, of the same length limit as ever."""
    begun = writer.replies(items, "cot", max_tokens=writer.cfg.thought_tokens, stop=("</think>",))
    return answer_after(writer, items, [rewards.parse_response(reply.text).think for reply in begun])


def answer_given(writer, items):
    """The thought is another's: see with_thoughts."""
    return answer_after(writer, items, [item.thought[0] for item in items])


def answer_after(writer, items, thoughts):
    """Answers after thoughts that the turns are opened with."""
    tags = "</think>\n<answer>\n" if writer.cfg.family == "cold" else "</think>\n\n"
    openings = [f"{thought.strip()}\n{tags}" for thought in thoughts]
    return writer.replies(items, "cot", openings=openings)


def answer_sdc(writer, items):
    """Self-DeepClaude. Call 1 thinks, and only its thought is kept (with --thought-model that model has thought
    already); call 2 sees request and thought in one user message."""
    thoughts = [item.thought for item in items]
    if not writer.cfg.thought_model:
        first = writer.replies(items, "cot")
        thoughts = [(rewards.parse_response(reply.text, writer.cfg.family).think, reply.ended) for reply in first]
    conversations = [rewritten(item, "sdc", thought=thought)
                     for item, (thought, _) in zip(items, thoughts, strict=True)]
    replies = writer.replies(items, "io", conversations)
    for reply, (thought, ended) in zip(replies, thoughts, strict=True):
        reply.thought, reply.thought_ended = thought, ended
    return replies


def answer_sc(writer, items):
    """Self-consistency: of --samples answers the one that most others are like."""
    seeds = [record_seed(writer.cfg.seed, 0, item.id) for item in items]
    replies = []
    for group in writer.turns(items, "io", n=writer.cfg.samples, temperature=1.0, seeds=seeds):
        samples = [Reply(*turn) for turn in group]
        replies.append(samples[most_agreed([writer.answer(sample) for sample in samples])])
    return replies


def most_agreed(texts):
    """Index of the text that is most like the others: the majority vote of free text.

    Alike is the mean overlap (Dice) of character trigrams, so identical answers vote for one another; ties: the first.
    """
    grams = [character_grams(text, 3) if len(text) > 2 else Counter([text]) for text in texts]
    likeness = [sum(dice(text, other) for other in grams) for text in grams]
    return likeness.index(max(likeness))


def dice(a, b):
    """Twice the common part of two multisets, as a share of both (here without the factor 2)."""
    return (a & b).total() / (a.total() + b.total())


def answer_sr(writer, items):
    """Self-refine: the model checks its own answer until it finds nothing to fix, at most --refine-turns times."""
    replies = answer_io(writer, items)
    unfinished = list(range(len(items)))
    for _ in range(writer.cfg.refine_turns):
        if not unfinished:
            break
        requests = [rewritten(items[n], "refine", answer=writer.answer(replies[n])) for n in unfinished]
        better = writer.replies([items[n] for n in unfinished], "io", requests)
        changed = []
        for n, reply in zip(unfinished, better, strict=True):
            improved = writer.answer(reply).strip()
            if improved and not improved.startswith("DONE"):  # a blank or refused improvement is none
                replies[n] = reply
                changed.append(n)
        unfinished = changed
    return replies


def answer_od(writer, items):
    """Oracle decomposition: the request with the benchmark's own sub-questions, or the texts of the constraints."""
    conversations = []
    for item in items:
        if not item.plan:
            raise InputError(f"--method od: {item.id} comes without sub-questions; evaluate it with another method")
        plan = "\n".join(f"{k}. {text}" for k, text in enumerate(item.plan, 1))
        conversations.append(rewritten(item, "plan", plan=plan))
    return writer.replies(items, "io", conversations)


ANSWER_BY = {"io": answer_io, "cot": answer_cot, "direct": answer_direct, "closed": answer_closed,
             "other": answer_given, "expert": answer_given, "sdc": answer_sdc, "sc": answer_sc, "sr": answer_sr,
             "od": answer_od}


def repetition(tokens):
    """Share of 4-grams of `tokens` that occurred before in it (0 for fewer than four tokens)."""
    grams = list(zip(tokens, tokens[1:], tokens[2:], tokens[3:], strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def write_outputs(writer, items, method):
    """Outputs (the lines of a row file) for a few items."""
    outputs = []
    for item, reply in zip(items, ANSWER_BY[method](writer, items), strict=True):
        parsed, answer = rewards.parse_response(reply.text, writer.cfg.family), writer.answer(reply)
        thought = reply.thought
        if method != "sdc" and "</think>" in reply.text:
            thought = parsed.think
        answer_tokens = writer.tokens(answer)
        outputs.append({
            "id": item.id,
            "text": reply.text,
            "thought": thought,
            "answer": answer,
            "format_ok": parsed.format_ok if method == "cot" else None,
            "truncated": "length" in (reply.ended, reply.thought_ended),
            "refused": reply.ended == "refused",  # by a server: no answer
            "thought_tokens": len(writer.tokens(thought)),
            "answer_tokens": len(answer_tokens),
            "written_tokens": sum(len(writer.tokens(text)) for text in writer.written[item.id]),
            "repetition": repetition(answer_tokens),
        })
    return outputs


# ---------------------------------------------------------------- rows: generate, resume


class Row(NamedTuple):
    label: str
    model: str  # NAME[@URL]
    method: str


class Task(NamedTuple):
    """A benchmark in one call."""

    benchmark: Benchmark
    items: list
    key: str  # changes with what is asked of the model
    cfg: Config  # with the folder of this benchmark's rows as `out`


def model_stamp(name):
    """Changes when a local model folder is rewritten, so that its old answers are not taken for the new model's."""
    weights = sorted(Path(name).glob("*.safetensors"))
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in weights]


def judge_cache(cfg):
    """Folder of the judge's finished replies: another one for another address and for rewritten weights."""
    judge = json.dumps([cfg.judge, model_stamp(split_address(cfg.judge)[0])])
    return Path(cfg.out) / "judge_cache" / hashlib.sha256(judge.encode()).hexdigest()[:16]


def row_files(run, label, folder="rows"):
    """(outputs file, settings file) of a row; the label I/O becomes the file name I-O."""
    name = "".join(c if c.isalnum() or c in " .+_" else "-" for c in label)
    return Path(run) / folder / f"{name}.jsonl", Path(run) / folder / f"{name}.json"


def write_settings(run, settings):
    write_atomic(row_files(run, settings["label"])[1], json.dumps(settings, indent=1))


def row_settings(cfg, row, key):
    """All that the outputs of a row depend on."""
    model, url = split_address(row.model)
    settings = {"label": row.label, "model": model, "model_url": url, "method": row.method,
                "stamp": model_stamp(model), "benchmark": key}
    names = {"sc": ["samples", "seed"], "sr": ["refine_turns"], "closed": ["thought_tokens"], "other": ["thought_row"]}
    for name in ["family", "max_new_tokens", "engine", "precision", "thought_model", *names.get(row.method, [])]:
        settings[name] = getattr(cfg, name)
    if cfg.thought_model:
        settings["thought_stamp"] = model_stamp(cfg.thought_model)
    return settings


def open_row(cfg, row, key):
    """(settings, finished outputs) of a row: those on disk if the settings are the same, else a new and empty row."""
    settings = row_settings(cfg, row, key)
    outputs_file, settings_file = row_files(cfg.out, row.label)
    outputs = read_jsonl(outputs_file)
    if outputs:
        old = json.loads(settings_file.read_text(encoding="utf-8"))
        if (old["model"], old["method"]) != (settings["model"], row.method):
            raise InputError(f"{settings_file}: row {row.label!r} holds model {old['model']} with method "
                             f"{old['method']}; pass another --label or --out")
        changed = [name for name in settings if old.get(name, getattr(Config, name, "")) != settings[name]]
        if not cfg.resume:
            changed.append("--no-resume")
        if not changed:
            write_jsonl(outputs_file, outputs)  # without the last line that a killed run may have left half written
            old["base_model"] = cfg.base_model  # says what the model was trained from; the answers do not depend on it
            write_settings(cfg.out, old)
            return old, outputs
        print(f"row {row.label}: generated again ({', '.join(changed)}); its earlier answers are in "
              f"{outputs_file}.old")
        write_jsonl(f"{outputs_file}.old", outputs)
    settings |= {"base_model": cfg.base_model, "seconds": 0.0, "perplexity": None}
    write_jsonl(outputs_file, [])
    write_settings(cfg.out, settings)
    return settings, []


def answer_row(task, row, load):
    """Complete the outputs of one row, chunk by chunk. `load(name)` gives (tokenizer, engine), only when needed.

    The ranks of torchrun share each chunk; rank 0 reads and writes.
    """
    cfg, (rank, world) = task.cfg, init_distributed()
    items = with_thoughts(task, row, load)
    opened = open_row(cfg, row, task.key) if rank == 0 else None
    settings, outputs = gather_objects([opened])[0]
    finished = {output["id"] for output in outputs}
    items = [item for item in items if item.id not in finished]
    with tqdm(total=len(task.items), initial=len(finished), desc=row.label, unit="prompt", disable=rank > 0) as bar:
        for start in range(0, len(items), cfg.chunk):
            tokenizer, engine = load(row.model)
            began = time.perf_counter()
            chunk = items[start : start + cfg.chunk]
            mine = chunk[rank::world]
            outputs = write_outputs(Writer(engine, tokenizer, cfg), mine, row.method) if mine else []
            outputs = {output["id"]: output for output in gather_objects(outputs)}
            if rank == 0:
                for item in chunk:
                    append_jsonl(row_files(cfg.out, row.label)[0], outputs[item.id])
                settings["seconds"] += time.perf_counter() - began
                write_settings(cfg.out, settings)
            bar.update(len(chunk))


def with_thoughts(task, row, load):
    """The items, each with the thought that its method hands to the model; for most methods there is none."""
    if row.method == "expert":
        thoughts = expert_thoughts(task.items)
    elif row.method == "other":
        thoughts = exchanged_thoughts(task)
    elif row.method == "sdc" and task.cfg.thought_model:
        thoughts = model_thoughts(task, row.label, load)
    else:
        return task.items
    return [replace(item, thought=thought) for item, thought in zip(task.items, thoughts, strict=True)]


def expert_thoughts(items):
    for item in items:
        if not item.record.get("expert"):
            raise InputError(f"--method expert: record {item.id!r} has no expert; evaluate a file whose records have "
                             "one, such as data/teacher.jsonl")
    return [(rewards.parse_response(item.record["expert"]).think, "stop") for item in items]


def exchanged_thoughts(task):
    """Each item gets the thought that row --thought-row wrote for the item half the file away."""
    cfg = task.cfg
    thoughts = {output["id"]: output["thought"] for output in read_jsonl(row_files(cfg.out, cfg.thought_row)[0])}
    for item in task.items:
        if item.id not in thoughts:
            raise InputError(f"--method other: row {cfg.thought_row!r} in {cfg.out} has no thought for {item.id!r}; "
                             "finish that row first, or name another with --thought-row")
    half = len(task.items) // 2 or 1
    return [(thoughts[task.items[(n + half) % len(task.items)].id], "stop") for n in range(len(task.items))]


def model_thoughts(task, label, load):
    """What --thought-model thinks about each item: the outputs of a row of RUN/thoughts."""
    cfg = replace(task.cfg, out=str(Path(task.cfg.out) / "thoughts"), thought_model="")
    answer_row(task._replace(cfg=cfg), Row(label, task.cfg.thought_model, "cot"), load)
    rank, _ = init_distributed()
    outputs = read_jsonl(row_files(cfg.out, label)[0]) if rank == 0 else None
    outputs = {output["id"]: output for output in gather_objects([outputs])[0]}  # once it is written
    return [(outputs[item.id]["thought"], "length" if outputs[item.id]["truncated"] else "stop")
            for item in task.items]


def read_rows(task):
    """Finished rows of a task's folder: {label: (settings, outputs in the order of the items)}."""
    rows, wanted = {}, {"benchmark": task.key, "max_new_tokens": task.cfg.max_new_tokens}
    for settings_file in sorted((Path(task.cfg.out) / "rows").glob("*.json")):
        settings = json.loads(settings_file.read_text(encoding="utf-8"))
        outputs = {output["id"]: output for output in read_jsonl(settings_file.with_suffix(".jsonl"))}
        differs = [name for name in wanted if settings[name] != wanted[name]]
        missing = sum(item.id not in outputs for item in task.items)
        problem = f"{missing} of {len(task.items)} prompts unanswered" if missing else None
        if differs:
            problem = f"other {', '.join(differs)} than in this call"
        if problem:
            print(f"row {settings['label']} is left out of the report: {problem}")
        else:
            rows[settings["label"]] = settings, [outputs[item.id] for item in task.items]
    known = [label for label in ROW_ORDER if label in rows]
    return {label: rows[label] for label in known + sorted(rows.keys() - set(known))}


@torch.no_grad()
def answer_perplexity(model, tokenizer, items, answers, token_budget=4096):
    """exp(mean negative log-likelihood per token) of the answers after the plain requests; None if all are blank."""
    prompts, responses = [], []
    for item, answer in zip(items, answers, strict=True):
        if answer:
            prompts.append(render_prompt(tokenizer, item.messages, "io", language=item.language).ids)
            responses.append(tokenizer(answer, add_special_tokens=False)["input_ids"])
    sequences = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    nll = 0.0
    for batch in token_batches([len(sequence) for sequence in sequences], token_budget):
        ids_BT, mask_BT = pad_right([sequences[i] for i in batch])
        start_B = torch.tensor([len(prompts[i]) for i in batch], device=ids_BT.device)
        nll -= token_logprobs(model, ids_BT, mask_BT, start_B).double().sum().item()
    count = sum(len(response) for response in responses)
    return math.exp(nll / count) if count else None


def add_perplexity(task, rows):
    """Measure the perplexity of rows that lack it, on the same items in every row, and store it with the row."""
    cfg, loaded = task.cfg, None
    chosen = spread(range(len(task.items)), cfg.perplexity_items)
    ids = json.dumps([task.items[n].id for n in chosen])
    base = {"model": cfg.base_model, "stamp": model_stamp(cfg.base_model), "answers": len(chosen),
            "ids": hashlib.sha256(ids.encode()).hexdigest()[:16]}
    for settings, outputs in rows.values():
        measured = settings["perplexity"] or {}
        if chosen and measured.get("base") != base:
            loaded = loaded or load_model(cfg.base_model, dtype=compute_dtype(cfg.precision))
            value = answer_perplexity(*loaded, [task.items[n] for n in chosen], [outputs[n]["answer"] for n in chosen])
            settings["perplexity"] = {"base": base, "value": value}
            write_settings(cfg.out, settings)


# ---------------------------------------------------------------- judge


class Job(NamedTuple):
    """One question to the judge."""

    item: Item
    question: int | None
    conversation: list
    sha: str  # of all that the reply depends on

    @property
    def key(self):
        return self.item.id, self.question


def judge_row(task, settings, answers, judge):
    """{item id: {question: raw reply}} for the answers of a row; None is no answer, and not judged.

    Replies are kept in judgements/LABEL - JUDGE.jsonl of the run, a file that --judgements reads. A stored reply is
    used again if nothing it depends on has changed: the conversation (prompt, checklist, answer, earlier replies), the
    judge's address or weights, its token limit. One that cannot be read is asked again in every call; a served judge's
    replies are cached by request, so that this costs something only with more --judge-tries.
    """
    benchmark, cfg, label = task.benchmark, task.cfg, settings["label"]
    name = split_address(cfg.judge)[0]
    path = row_files(cfg.out, f"{label} - {name}", folder="judgements")[0]
    depends = [cfg.judge, model_stamp(name), cfg.judge_tokens]
    stored = {(line["id"], line["question"]): line for line in read_jsonl(path)}
    asking = [(item, answer) for item, answer in zip(task.items, answers, strict=True)
              if answer is not None and item.questions]
    if not asking:
        return {}
    write_jsonl(path, stored.values())  # without the last line that a killed run may have left half written
    replies, used = {item.id: {} for item, _ in asking}, {}
    bar = tqdm(total=sum(len(item.questions) for item, _ in asking), desc=f"{label}: judge", unit="reply")
    jobs = next_jobs(task, asking, replies, depends)
    while jobs:
        for start in range(0, len(jobs), cfg.chunk):
            chunk = jobs[start : start + cfg.chunk]
            open_jobs = [job for job in chunk if not is_answered(benchmark, job, stored.get(job.key))]
            before = judge_counts(judge)
            for job, reply in zip(open_jobs, benchmark.ask(judge, open_jobs, cfg), strict=True):
                stored[job.key] = {"id": job.item.id, "question": job.question, "reply": reply, "sha": job.sha}
                append_jsonl(path, stored[job.key])
            keep_judge_counts(cfg, settings, before, judge_counts(judge))
            for job in chunk:
                used[job.key] = stored[job.key]
                replies[job.item.id][job.question] = stored[job.key]["reply"]
            bar.update(len(chunk))
        jobs = next_jobs(task, asking, replies, depends)
    bar.close()
    # Lines of items that are not in this call stay; of those that are, nothing stale does.
    write_jsonl(path, [line for line in stored.values() if line["id"] not in replies] + list(used.values()))
    return replies


def next_jobs(task, asking, replies, depends):
    """The questions that can be asked now, given the replies so far; asking: (item, answer) pairs."""
    jobs = []
    for item, answer in asking:
        for question in task.benchmark.next_questions(item, replies[item.id], task.cfg.protocol):
            conversation = task.benchmark.conversation(item, answer, question, replies[item.id])
            sha = hashlib.sha256(json.dumps([depends, conversation]).encode()).hexdigest()[:16]
            jobs.append(Job(item, question, conversation, sha))
    return jobs


def is_answered(benchmark, job, line):
    """Does a stored line answer the question as it would be asked now?"""
    return line and line.get("sha") == job.sha and benchmark.readable(job.item, job.question, line["reply"])


JUDGE_COUNTERS = ("asked", "unreadable", "truncated")


def judge_counts(judge):
    """What the judge of a record file counts: questions, replies that it could not read, answers that it had to cut."""
    return {name: getattr(judge, name, 0) for name in JUDGE_COUNTERS}


def keep_judge_counts(cfg, settings, before, after):
    """Add to the row's settings what its judge has counted, over all calls."""
    new = {name: after[name] - before[name] for name in JUDGE_COUNTERS}
    if new["asked"]:
        earlier = settings.get("judge") or {}
        settings["judge"] = {name: earlier.get(name, 0) + new[name] for name in JUDGE_COUNTERS}
        write_settings(cfg.out, settings)


def raw_judgements(benchmark, chat, jobs, cfg):
    """The judge's raw replies. Greedy first; what cannot be read is asked again, warmer and with another seed,
    --judge-tries times in all."""
    talk = chat_in_json if benchmark.json_mode else chat_plainly

    def ask(attempt, open_jobs):
        settings = {"n": 1, "max_tokens": cfg.judge_tokens, "temperature": 0.5 if attempt else 0.0, "seed": attempt}
        return talk(chat, [jobs[j].conversation for j in open_jobs], settings)

    def readable(j, text):
        return benchmark.readable(jobs[j].item, jobs[j].question, text)

    return ask_until_readable(ask, len(jobs), readable, max(1, cfg.judge_tries))


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


def judge_agreement(judge, path, limit=0):
    """Verdicts of a judge against labels: ({accuracy, precision, recall, kappa, n …}, lines with `verdict` added).

    Positive is yes. An unreadable verdict counts as no, and in `unreadable`. kappa is Cohen's; a rate is None where
    its denominator is 0.
    """
    lines = [checked(path, number, line, instruction=str, answer=str, question=str, label=bool)
             for number, line in rewards.json_lines(path)]
    lines = spread(lines, limit or len(lines))
    verdicts = judge([(line["instruction"], line["answer"], line["question"]) for line in lines])
    lines = [{**line, "verdict": bool(verdict)} for line, verdict in zip(lines, verdicts, strict=True)]

    def ratio(part, whole):
        return part / whole if whole else None

    n, counts = len(lines), Counter((line["label"], line["verdict"]) for line in lines)
    labelled, judged = counts[True, True] + counts[True, False], counts[True, True] + counts[False, True]
    accuracy = (counts[True, True] + counts[False, False]) / n
    chance = (labelled * judged + (n - labelled) * (n - judged)) / n**2
    report = {"accuracy": accuracy, "precision": ratio(counts[True, True], judged),
              "recall": ratio(counts[True, True], labelled), "kappa": ratio(accuracy - chance, 1 - chance), "n": n,
              "labelled_yes": labelled, "judged_yes": judged, "unreadable": judge.unreadable}
    return report, lines


# ---------------------------------------------------------------- score


class Scored(NamedTuple):
    """A row on one benchmark."""

    settings: dict
    outputs: list
    verdicts: list
    metrics: dict  # with `n`
    resampled: dict  # metric -> its values (R,) in the resamples, which are the same for all rows


def score_answers(benchmark, triples, protocol, *, resamples=0, seed=0):
    """(metrics with `n`, verdicts, resampled metrics) of (item, answer or None, {question: raw reply}) triples."""
    items = [item for item, _, _ in triples]
    verdicts = [benchmark.verdict(item, answer, replies, protocol) for item, answer, replies in triples]

    def measure(weights_RN):
        return benchmark.metrics(Sample(items, verdicts, weights_RN), protocol)

    metrics, resampled = bootstrap(measure, [item.group for item in items], resamples=resamples, seed=seed)
    whole = Sample(items, verdicts, np.ones((1, len(items))))
    n = {"asked": len(items), "answered": sum(answer is not None for _, answer, _ in triples)}
    for name in ("judged", "unparsable"):
        n[name] = sum(verdict.get(name, 0) for verdict in verdicts)
    return {**metrics, **plain(benchmark.details(whole, protocol)), "n": n}, verdicts, resampled


def score_rows(task, judge):
    """{label: Scored} of all finished rows of a task."""
    benchmark, cfg, scored_rows = task.benchmark, task.cfg, {}
    rows = read_rows(task)
    if isinstance(benchmark, RecordFile):
        add_perplexity(task, rows)
    for label, (settings, outputs) in rows.items():
        answers = [benchmark.answer_of(item, output) for item, output in zip(task.items, outputs, strict=True)]
        replies = judge_row(task, settings, answers, judge)
        triples = [(item, answer, replies.get(item.id, {}))
                   for item, answer in zip(task.items, answers, strict=True)]
        metrics, verdicts, resampled = score_answers(benchmark, triples, cfg.protocol, resamples=cfg.resamples,
                                                     seed=cfg.seed)
        scored_rows[label] = Scored(settings, outputs, verdicts, metrics, resampled)
    return scored_rows


def known_lines(benchmark, path, items, **fields):
    """(line number, Item, line) for each line of a file whose ids are those of the benchmark."""
    known = {item.id: item for item in items}
    for number, line in rewards.json_lines(path):
        checked(path, number, line, id=(str, int), **fields)
        if str(line["id"]) not in known:
            raise InputError(f"{path}:{number}: field 'id': {str(line['id'])!r} is not in {benchmark.name}; its ids "
                             f"look like {items[0].id!r}")
        yield number, known[str(line["id"])], line


def read_responses(benchmark, path, items):
    """(item, response or None) for each line of a response file, in its order."""
    responses, seen = [], {}
    for number, item, line in known_lines(benchmark, path, items):
        name = "answer" if "answer" in line and "response" not in line else "response"  # outputs of a run have answers
        if name not in line or not isinstance(line[name], str | None):
            raise InputError(f"{path}:{number}: field {name!r}: missing or not a text; give the answer, or null for "
                             "not answered")
        if item.id in seen and benchmark.name != "cello":  # whose published files repeat one id; there lines count
            raise InputError(f"{path}:{number}: field 'id': {item.id!r} is already in line {seen[item.id]}; keep one "
                             "of them")
        seen[item.id] = number
        responses.append((item, line[name]))
    return responses


def read_judgements(benchmark, path, items):
    """{item id: {question: raw reply}} of a judgement file."""
    replies = {}
    for number, item, line in known_lines(benchmark, path, items, reply=(str, type(None))):
        question = line.get("question")
        if item.questions == [None] and question == 0:  # the only one may be called 0
            question = None
        if type(question) not in (int, type(None)) or question not in item.questions:
            raise InputError(f"{path}:{number}: field 'question': {question!r} is not asked of {item.id!r}; its "
                             f"questions are {json.dumps(item.questions)}")
        if question in replies.setdefault(item.id, {}):
            raise InputError(f"{path}:{number}: field 'question': a second reply for {item.id!r}, {question!r}; keep "
                             "one")
        if line["reply"] is not None:
            replies[item.id][question] = line["reply"]
    return replies


def score_files(cfg):
    """--score: metrics of recorded answers, without a model."""
    if cfg.score not in BENCHMARKS:
        raise InputError(f"--score {cfg.score}: unknown; give one of {', '.join(BENCHMARKS)}")
    if not cfg.responses:
        raise InputError("--score: give --responses, a file of {\"id\": ..., \"response\": ...} lines")
    benchmark = BENCHMARKS[cfg.score]
    items = benchmark.load(Path(cfg.benchmark_dir))
    responses = read_responses(benchmark, cfg.responses, items)
    replies = read_judgements(benchmark, cfg.judgements, items) if cfg.judgements else {}
    if not cfg.judgements and any(item.questions and response is not None for item, response in responses):
        raise InputError(f"--judgements: {cfg.score} is scored from a judge's replies; give a file of "
                         "{\"id\": ..., \"question\": ..., \"reply\": ...} lines")
    unused = len(replies.keys() - {item.id for item, _ in responses})
    if unused:
        print(f"{cfg.judgements}: {unused} ids are not among the responses; not used", file=sys.stderr)
    triples = []
    for item, response in responses:
        if response is not None:  # of a thought that never ends nothing is left (outputs of a run hold answers already)
            response = rewards.parse_response(response, cfg.family).answer
        triples.append((item, response, replies.get(item.id, {})))
    metrics, _, _ = score_answers(benchmark, triples, cfg.protocol)
    return {"benchmark": cfg.score, "protocol": cfg.protocol, **metrics}


# ---------------------------------------------------------------- report
#
# A figure is a dict: share (0..1) or value (percent), low, high, n. A table of figures is {column: {line: figure}}.


def shown(value, form=".1f"):
    return "–" if value is None else format(value, form)


def named_figure(name, n, a, metric, b=None):
    """A metric of a Scored row, or a − b, paired: both rows have seen the same resamples."""
    value, values_R = a.metrics[metric], a.resampled[metric]
    if b is not None:
        other = b.metrics[metric]
        value = None if None in (value, other) else value - other
        values_R = values_R - b.resampled[metric]
    low, high = limits(values_R)
    return {name: value, "low": low, "high": high, "n": n}


def figure_of(cell, metric="headline"):
    """A metric of a benchmark's cell in percent: shares are stored in 0..1, headlines in percent."""
    if not cell or cell.get(metric) is None:
        return None
    scale = 1 if metric == "headline" else 100
    figure = {"value": scale * cell[metric], "n": cell.get("n", {}).get("asked")}
    for name, limit in zip(("low", "high"), cell.get("intervals", {}).get(metric, ()), strict=False):
        figure[name] = scale * limit
    return figure


def in_percent(figure):
    """[value, low, high]; None where there is none."""
    name, scale = ("share", 100) if "share" in figure else ("value", 1)
    numbers = [figure.get(key) for key in (name, "low", "high")]
    return [None if number is None else scale * number for number in numbers]


def figure_text(figure, sign=""):
    """A figure with its interval, in percent (points); a text stays as it is. sign: "+" for differences."""
    if figure is None or isinstance(figure, str):
        return figure or "–"
    value, low, high = in_percent(figure)
    interval = "" if low is None else f" [{shown(low, sign + '.1f')}, {shown(high, sign + '.1f')}]"
    return shown(value, sign + ".1f") + interval


def lines_of(columns):
    """The lines of a table {column: {line: figure}}, in the order of their first occurrence."""
    lines = {}
    for column in columns.values():
        lines |= dict.fromkeys(column)
    return list(lines)


def figure_table(corner, columns, sign=""):
    """A Markdown table of {column: {line: figure}}."""
    table = [[line, *(figure_text(column.get(line), sign) for column in columns.values())]
             for line in lines_of(columns)]
    return markdown_table([corner, *columns], table)


def row_pairs(labels):
    """The pairs of rows to compare: the later row minus the earlier, Ours first."""
    return [(later, earlier) for earlier, later in combinations(labels, 2)][::-1]


def difference_section(columns, what):
    """columns: {benchmark or split: {"A − B": figure}}."""
    reading = {}
    for pair in dict.fromkeys(itertools.chain.from_iterable(columns.values())):
        figures = {title.partition(" (n=")[0]: column.get(pair) for title, column in columns.items()}
        known = {title: figure for title, figure in figures.items() if figure and figure["low"] is not None}
        unclear = [title for title, figure in known.items() if figure["low"] <= 0 <= figure["high"]]
        if unclear:
            reading[pair] = f"the interval includes 0 ({', '.join(unclear)}): no difference shown"
        else:
            reading[pair] = "clear of 0" if known else "no figure"
    return [f"## Differences between rows\n\n{what}, in percentage points; paired by prompt.\n",
            figure_table("rows", columns | {"reading": reading}, "+")]


def costs_of(scored_row):
    """What a row cost and how its outputs look; means per item."""
    settings, outputs = scored_row.settings, scored_row.outputs
    costs = {"settings": settings, "seconds": settings["seconds"], "n": scored_row.metrics["n"],
             "perplexity": (settings["perplexity"] or {}).get("value"), "judge_counts": settings.get("judge")}
    for name in ("thought_tokens", "answer_tokens", "written_tokens", "repetition", "truncated"):
        costs[name] = mean([output[name] for output in outputs])
    formats = [output["format_ok"] for output in outputs if output["format_ok"] is not None]
    return costs | {"format_failures": mean([not format_ok for format_ok in formats])}


def cost_section(lines):
    """lines: (label, benchmark, cell) triples."""
    shares, numbers = ("format_failures", "truncated", "repetition"), (
        "thought_tokens", "answer_tokens", "written_tokens", "perplexity", "seconds")
    table = []
    for label, name, cell in lines:
        table.append([label, name, cell["settings"]["model"], cell["settings"]["method"], *cell["n"].values(),
                      *(shown(cell.get(key), ".1%") for key in shares), *(shown(cell.get(key)) for key in numbers)])
    titles = [key.replace("_", " ") for key in (*shares, *numbers)]
    return ["## Format, length and costs\n\nUnparsable: judge replies that could not be read. Format failures: tags "
            "missing or out of order. Truncated: a turn hit the token limit. Repetition: share of the answer's 4-grams "
            "that occurred before in it. Tokens: mean per item by the row's own tokenizer; written: of all calls.\n",
            markdown_table(["row", "benchmark", "model", "method", "asked", "answered", "judge replies", "unparsable",
                            *titles], table)]


def notes_of(lines):
    """What a reader has to know of how rows came about; lines: (label, benchmark, cell) triples."""
    notes = []
    for label, name, cell in lines:
        notes += [f"- {name}: {note}\n" for note in cell.get("notes", [])]
        counts = cell.get("judge_counts")
        if counts:
            notes.append(f"- Judge of row {label}: {counts['asked']} questions, {counts['unreadable']} unreadable "
                         f"replies (counted as no), {counts['truncated']} answers cut to fit.\n")
        if cell["settings"]["model_url"]:
            notes.append("- Answers of a chat server: the trigger alone asks for a thought, the turn is not opened; "
                         "Direct is the request alone; tokens are words.\n")
    return list(dict.fromkeys(notes))


def write_report(cfg, report, sections):
    write_atomic(Path(cfg.out) / "report.json", json.dumps(report, indent=1, ensure_ascii=False))
    write_atomic(Path(cfg.out) / "report.md", "\n".join(sections))
    print(f"report: {Path(cfg.out) / 'report.md'}")


# ---------------------------------------------------------------- the report on a record file


def record_report(task, scored_rows):
    """What report.md says, as one JSON object. Shares in 0..1, an empty split is None."""
    counts = {split: len(positions) for split, positions in split_positions(task.items).items()}
    report = {"n": counts["all"], "rows": {}, "differences": {}, "kinds": kinds_met(scored_rows), "difficulty": None,
              "chance": chance_of(task.items)}
    for label, row in scored_rows.items():
        cell = costs_of(row) | {split: {} if n else None for split, n in counts.items()}
        for split, name in row.resampled:
            if counts[split]:
                cell[split][name] = named_figure("share", counts[split], row, (split, name))
        report["rows"][label] = cell
    for a, b in row_pairs(scored_rows):
        report["differences"][f"{a} − {b}"] = {
            split: named_figure("share", n, scored_rows[a], (split, "all_strict"), scored_rows[b]) if n else None
            for split, n in counts.items()}
    if "I/O" in scored_rows:
        easy = [kind for kind, shares in report["kinds"].items() if shares["I/O"] > 0.9]
        report["difficulty"] = {"io_share": scored_rows["I/O"].metrics["all", "all_strict"], "kinds_above_90": easy}
    return report


def kinds_met(scored_rows):
    """{constraint type: {"n": how many there are, label: share met by the row, strict}}."""
    met = {}
    for label, row in scored_rows.items():
        for verdict in row.verdicts:
            for kind, holds in zip(verdict["kinds"], verdict["strict"], strict=True):
                met.setdefault(kind, {}).setdefault(label, []).append(holds)
    kinds = {}
    for kind in sorted(met):
        kinds[kind] = {"n": len(next(iter(met[kind].values())))}
        kinds[kind] |= {label: mean(verdicts) for label, verdicts in met[kind].items()}
    return kinds


def chance_of(items):
    """{split: mean chance}: the share of unrelated base-model answers that meet the same constraints."""
    if not all("chance" in item.record for item in items):
        return dict.fromkeys(SPLITS)
    return {split: mean([items[n].record["chance"] for n in positions])
            for split, positions in split_positions(items).items()}


def record_columns(cells, counts, name=None):
    """{split: {line: figure}}; cells: line -> split -> figure, or with `name` -> the figure of that metric."""
    columns = {}
    for split, n in counts.items():
        columns[f"{split} (n={n})"] = {line: cell[split] and (cell[split].get(name) if name else cell[split])
                                       for line, cell in cells.items()}
    return columns


def write_record_report(task, scored_rows):
    """report.json, report.md with tables, plots and ten fixed prompts, and what to print of a record file."""
    cfg, items = task.cfg, task.items
    report = {"benchmarks": str(task.benchmark.path), "settings": asdict(cfg), **record_report(task, scored_rows)}
    counts = {split: len(positions) for split, positions in split_positions(items).items()}
    rows, lines = report["rows"], [(label, "records", row) for label, row in report["rows"].items()]
    strict = record_columns(rows, counts, "all_strict")
    singles = {}
    for title, name in (("all met, loose", "all_loose"), ("per constraint", "each_strict"),
                        ("per constraint, loose", "each_loose")):
        singles[title] = {label: row["all"][name] for label, row in rows.items()}
    kinds = [[kind, shares["n"], *(shown(100 * shares[label]) for label in scored_rows)]
             for kind, shares in report["kinds"].items()]
    plot_figures(Path(cfg.out) / "rows.png", strict, "all constraints met, strict (%)")
    for label, row in rows.items():
        lift = f", lift {figure_text(row['all']['lift'], '+')}" if "lift" in row["all"] else ""
        print(f"{label:8} all constraints met {figure_text(row['all']['all_strict'])} %{lift}  "
              f"({row['seconds']:.0f} s)")
    write_report(cfg, report, [
        "# Evaluation\n",
        f"{counts['all']} prompts of `{task.benchmark.path}`; `ood`: those marked as out of distribution. "
        f"Greedy decoding, at most {cfg.max_new_tokens} new tokens a turn in every row. In brackets: 95 % percentile-"
        f"bootstrap intervals over prompts ({cfg.resamples} resamples); differences are paired by prompt.\n",
        "## Constraints met\n\nShare of prompts with all constraints met (strict, unless it says loose), and share of "
        "single constraints met, over all prompts; in percent.\n",
        figure_table("row", strict | singles),
        *lift_section(rows, report["chance"], counts),
        *difference_section(record_columns(report["differences"], counts), "All constraints met, strict"),
        *cost_section(lines),
        f"Perplexity: of the answer after the plain request under {cfg.base_model}, on "
        f"{min(cfg.perplexity_items, len(items))} prompts, the same in every row.\n",
        *notes_of(lines),
        "## Per kind of constraint\n\nConstraints met, strict, in percent.\n",
        markdown_table(["kind", "n", *scored_rows], kinds),
        *difficulty_section(report), "![rows.png](rows.png)\n", *plot_training(cfg),
        "## Ten prompts, all rows\n", *prompt_tables(items, scored_rows)])


def lift_section(rows, chance, counts):
    """The lift over chance, where every record has one."""
    if chance["all"] is None:
        return []
    columns = record_columns(rows, counts, "lift")
    for column, share in zip(columns.values(), chance.values(), strict=True):
        column["chance, percent"] = None if share is None else shown(100 * share)
    return ["## Lift over chance\n\nAll constraints met, strict, minus chance: the share of 20 answers of the base "
            "model, half to the same request without its constraints and half to other requests, that meet them "
            "(field `chance` of the records); in percentage points.\n", figure_table("row", columns, "+")]


def difficulty_section(report):
    if not report["difficulty"]:
        return []
    easy = ", ".join(report["difficulty"]["kinds_above_90"]) or "none"
    return [f"Difficulty: I/O meets all constraints on {report['difficulty']['io_share']:.1%} of the prompts; "
            f"kinds it meets above 90 %: {easy}.\n"]


def prompt_tables(items, scored_rows):
    """Ten fixed prompts, each with the thoughts and answers of all rows."""
    sections = []
    for n in spread(range(len(items)), 10):
        lines = [["thought"], ["answer"], ["met"]]
        for row in scored_rows.values():
            strict = row.verdicts[n]["strict"]
            cells = row.outputs[n]["thought"], row.outputs[n]["answer"], f"{sum(strict)}/{len(strict)}"
            for line, cell in zip(lines, cells, strict=True):
                line.append(cell)
        request = items[n].messages[-1]["content"].replace("\n", "\n> ")
        sections += [f"> {request}\n", markdown_table([items[n].id, *scored_rows], lines)]
    return sections


# ---------------------------------------------------------------- the report on public benchmarks


def benchmark_cell(task, row):
    """The metrics of a row on one benchmark with their intervals, and what the row cost."""
    intervals = {}
    for name, values in row.resampled.items():
        low, high = limits(values)
        if low is not None:
            intervals[name] = [low, high]
    low, high = intervals.get("headline", (None, None))
    return {**costs_of(row), "low": low, "high": high, "intervals": intervals, **row.metrics,
            "judge": split_address(task.cfg.judge)[0]}


def benchmark_report(cfg, scored_tasks):
    """What report.md says, as one JSON object; scored_tasks: (task, {label: Scored}) pairs.

    Benchmarks of earlier calls stay if they were scored by the same protocol.
    """
    report = {"protocol": cfg.protocol, "settings": asdict(cfg), "benchmarks": {}, "differences": {}}
    path = Path(cfg.out) / "report.json"
    if path.exists():
        earlier = json.loads(path.read_text(encoding="utf-8"))
        if earlier.get("protocol") == cfg.protocol:
            report["benchmarks"], report["differences"] = earlier["benchmarks"], earlier.get("differences", {})
    for task, rows in scored_tasks:
        name, n = task.benchmark.name, len(task.items)
        report["benchmarks"][name] = {label: benchmark_cell(task, row) for label, row in rows.items()}
        report["differences"][name] = {f"{a} − {b}": named_figure("value", n, rows[a], "headline", rows[b])
                                       for a, b in row_pairs(rows)}
    return report


def average_headline(cells):
    """The plain mean of the headlines, None if one is missing."""
    values = [cell["headline"] if cell else None for cell in cells]
    return None if None in values else mean(values)


def write_benchmark_report(cfg, scored_tasks):
    """report.json, report.md and a plot of all benchmarks in the run folder, and what to print."""
    report, columns, differences, lines = benchmark_report(cfg, scored_tasks), {}, {}, []
    for name, cells in report["benchmarks"].items():
        title = BENCHMARKS[name].title
        columns[title] = {label: figure_of(cell) for label, cell in cells.items()}
        differences[title] = report["differences"].get(name, {})
        lines += [(label, name, cell) for label, cell in cells.items()]
    kinds = {label: cell["kinds"] for label, cell in report["benchmarks"].get("ifeval", {}).items()}
    plot_figures(Path(cfg.out) / "benchmarks.png", columns, f"headline, {cfg.protocol} (%)", kinds)
    average = {}
    for label in lines_of(columns):
        value = average_headline([cells.get(label) for cells in report["benchmarks"].values()])
        average[label] = shown(value)
    for label, name, cell in lines:
        print(f"{name:12} {label:8} {figure_text(figure_of(cell))}  ({cell['seconds']:.0f} s)")
    write_report(cfg, report, [
        "# Benchmarks\n", f"Protocol: {report['protocol']}. Headline of each benchmark in percent, in brackets its "
        f"95 % percentile-bootstrap interval over items ({cfg.resamples} resamples). Thought and tags are removed "
        "before scoring.\n",
        figure_table("row", columns | {"Avg.": average}),
        *difference_section(differences, "Headlines"), *cost_section(lines), *notes_of(lines),
        "![benchmarks](benchmarks.png)\n"])


# ---------------------------------------------------------------- plots


def plot_figures(path, columns, ylabel, kinds=None):
    """Bars of {column: {row: figure}} with 95 % intervals; a figure that is missing leaves a gap.

    kinds, {row: {constraint type: share met}}: a heat map below.
    """
    plt = pyplot()
    labels = lines_of(columns)
    series = {title: [in_percent(column.get(label) or {}) for label in labels] for title, column in columns.items()
              if any(column.values())}
    fig, axes = plt.subplots(2 if kinds else 1, figsize=(max(6, 1.5 + 1.4 * len(labels)), 7 if kinds else 3.6),
                             layout="constrained", squeeze=False)
    width = 0.8 / max(1, len(series))
    for position, (title, figures) in enumerate(series.items()):
        value_K, low_K, high_K = np.array(figures, dtype=float).T
        axes[0, 0].bar(np.arange(len(figures)) + width * position, value_K, 0.9 * width, label=title, capsize=2,
                       yerr=np.nan_to_num(np.maximum(0, [value_K - low_K, high_K - value_K])))
    axes[0, 0].set(xticks=np.arange(len(labels)) + 0.4 - width / 2, xticklabels=labels, ylabel=ylabel)
    fig.legend(loc="outside upper center", ncols=4, frameon=False)
    if kinds:
        names = list(next(iter(kinds.values())))
        image = axes[1, 0].imshow([[shares.get(name, np.nan) for name in names] for shares in kinds.values()],
                                  aspect="auto", vmin=0, vmax=1, cmap="viridis")
        fig.colorbar(image, label="met, strict")
        axes[1, 0].set(yticks=range(len(kinds)), yticklabels=kinds, xticks=range(len(names)))
        axes[1, 0].set_xticklabels(names, rotation=90, fontsize=7)
    fig.savefig(path, dpi=120)
    plt.close(fig)


def plot_training(cfg):
    """training.png: what sft.py and grpo.py logged next to the models of the rows SFT and Ours, a panel per metric.

    Nothing is smoothed, so that what is seen is what was logged. Returns the line of report.md that shows it.
    """
    wanted = [(f"sft: {key}", cfg.sft_model, key) for key in ("loss/train", "loss/val")]
    wanted += [(f"grpo: {key}", cfg.ours_model, key) for key in (
        "reward/mean", "reward/all_met", "dev/all_met", "dev/slips", "rollout/entropy", "rollout/skip_rate")]
    curves = {}
    for title, model, key in wanted:
        metrics = read_jsonl(Path(model).parent / "metrics.jsonl")
        points = [(line["step"], line[key]) for line in metrics if "step" in line and line.get(key) is not None]
        if points:
            curves[title] = zip(*points, strict=True)
    if not curves:
        return []
    plt = pyplot()
    fig, axes = plt.subplots(1, len(curves), figsize=(3.2 * len(curves), 2.8), layout="constrained", squeeze=False)
    for ax, (title, points) in zip(axes[0], curves.items(), strict=True):
        ax.plot(*points, linewidth=1)
        ax.set(title=title, xlabel="step")
    fig.savefig(Path(cfg.out) / "training.png", dpi=120)
    plt.close(fig)
    return ["![training.png](training.png)\n"]


# ---------------------------------------------------------------- the paper's tables


def compared_cell(figure, published, marked=False):
    """Ours (paper's, difference) [our interval] n; † marks a published figure that the paper itself contradicts."""
    figure = figure or {}
    value, mark = figure.get("value"), "†" if marked else ""
    text = shown(value, ".2f")
    if published is not None:
        gap = "" if value is None else f", {value - published:+.2f}"
        text += f" ({published:.2f}{mark}{gap})"
    if "low" in figure:
        text += f" [{shown(figure['low'])}, {shown(figure['high'])}]"
    return text + (f" n={figure['n']}" if figure.get("n") else "")


def cells_of_runs(cfg, published):
    """{(model, label): {benchmark: cell}} of the run folders; a trained model is listed under its base model."""
    cells, origin = {}, {}
    for folder in (cfg.runs or cfg.out).split(","):
        path = Path(folder.strip()) / "report.json"
        if not path.exists():
            raise InputError(f"{path}: is not there; --runs takes folders of evaluate.py --benchmarks runs")
        report = json.loads(path.read_text(encoding="utf-8"))
        if cfg.table in ("1", "ablation") and report.get("protocol") != "raif":
            raise InputError(f"{path}: scored by protocol {report.get('protocol')!r}; the paper's figures are those of "
                             "--protocol raif: evaluate with it (answers and judgements on disk are used again)")
        benchmarks = report["benchmarks"] if isinstance(report["benchmarks"], dict) else {}  # a record file: its path
        for name, rows in benchmarks.items():
            for label, cell in rows.items():
                model = published_model(cell, report, published)
                earlier = origin.setdefault((model, label, name), folder)
                if earlier != folder:
                    raise InputError(f"--runs: {earlier} and {folder} both hold {name} of row {label!r} of {model}; "
                                     "give one of them another --label")
                cells.setdefault((model, label), {})[name] = cell
    if not cells:
        raise InputError(f"--table {cfg.table}: no benchmark rows in {cfg.runs or cfg.out}; run --benchmarks first")
    return cells


def published_model(cell, report, published):
    """The paper's name of a row's model, or else of the model that it was trained from."""
    # Rows written by earlier versions have no base model of their own: theirs is the last call's.
    base = cell["settings"].get("base_model", report["settings"]["base_model"])
    names = [path.rstrip("/").split("/")[-1] for path in (cell["settings"]["model"], base)]
    model, base = (published["models"].get(name, name) for name in names)
    return model if model in published["table 1"]["rows"] else base


def table_figures(table, columns, cells):
    """Our figures for a line of Table 1, of the ablation or of Table 5; the last column is their mean."""
    if table == "5":
        return [figure_of(cells.get("ifbench"), column) for column in columns[:-1]] + [figure_of(cells.get("ifbench"))]
    by_title = {BENCHMARKS[name].title: cell for name, cell in cells.items()}
    chosen = [by_title.get(column) for column in columns[:-1]]
    return [figure_of(cell) for cell in chosen] + [{"value": average_headline(chosen)}]


def paper_table(cfg):
    """--table: the layout of the paper's table, our figures from run folders and the paper's."""
    published = json.loads((data_dir / "results.json").read_text(encoding="utf-8"))
    columns, rows = (published[f"table {cfg.table}"][key] for key in ("columns", "rows"))
    cells = cells_of_runs(cfg, published)
    models = sorted({model for model, _ in cells})
    if cfg.table in ("2", "ablation") and len(models) > 1:
        raise InputError(f"--table {cfg.table}: of one model, but the runs hold {', '.join(models)}; give --runs of "
                         "one (a trained model counts as its --base-model)")
    head, printed, ours = [models[0]], {}, {}  # both: titles of a line -> its figures
    if cfg.table == "2":  # of one model; lines are categories, columns are methods
        for category in rows:
            printed[category,] = rows[category]
            ours[category,] = [figure_of(cells.get((models[0], column), {}).get("complexbench"), category)
                               for column in columns]
    elif cfg.table == "ablation":  # a row is found by its label
        printed = {(label,): figures for label, figures in rows.items()}
        ours = {(label,): table_figures(cfg.table, columns, cells[model, label]) for model, label in cells}
    else:
        head = ["model", "method"]
        for model, methods in rows.items():
            printed |= {(model, label): figures for label, figures in methods.items()}
        ours = {titles: table_figures(cfg.table, columns, cells[titles]) for titles in cells}
    anomalies = {}  # figures of Table 1 that the paper itself contradicts
    if cfg.table == "1":
        anomalies = {(model, label, column): note for model, label, column, note in published["anomalies"]}
    lines, notes, nothing = [], [], [None] * len(columns)
    for titles in dict.fromkeys([*printed, *ours]):
        texts = []
        for column, figure, given in zip(columns, ours.get(titles, nothing), printed.get(titles, nothing), strict=True):
            note = anomalies.get((*titles, column))
            if note:
                notes.append(f"† {', '.join(titles)}, {column}: {note}.  ")
            texts.append(compared_cell(figure, given, bool(note)))
        lines.append([*titles, *texts])
    title = f"Ours (paper, difference) [95 % interval] n; {published['source']}.\n"
    return "\n".join([title, markdown_table([*head, *columns], lines), *notes])


# ---------------------------------------------------------------- the call


def prepare(names, folder, opener=urllib.request.urlopen):
    """Download the authors' files of the benchmarks, print their licence, check SHA-256 where it is known and rows."""
    sources = json.loads((data_dir / "benchmarks" / "sources.json").read_text(encoding="utf-8"))
    for name in names:
        if name not in sources:
            raise InputError(f"--prepare --benchmarks {name}: unknown; give some of {', '.join(sources)}")
    for name in names or sources:
        print(f"{name}: licence {sources[name]['licence']}")
        for path, (address, expected) in sources[name]["files"].items():
            try:
                with opener(address) as reply:
                    content = reply.read()
            except OSError as error:
                raise InputError(f"{address}: cannot be downloaded ({error}); put the file at {folder / path} by hand "
                                 "and check it with --score") from None
            sha = hashlib.sha256(content).hexdigest()
            if expected and sha != expected:
                raise InputError(f"{address}: SHA-256 {sha}, expected {expected}: another version; compare it before "
                                 "use")
            write_atomic(folder / path, content)
            known = "" if expected else " (none to compare with)"
            print(f"  {folder / path}: {len(content)} bytes, SHA-256 {sha}{known}")
        count = len(BENCHMARKS[name].load(folder))
        if count != sources[name]["items"]:
            raise InputError(f"{folder / name}: {count} items, {sources[name]['items']} expected; a cut file, or "
                             "another version")
        print(f"  {count} items")


def measure_judge(cfg):
    """--judge-agreement: a judge against labels; one JSON object on stdout, the verdicts in the run folder."""
    judge = make_judge(cfg.judge, precision=cfg.precision, cache=judge_cache(cfg))
    if judge is None:
        raise InputError("--judge-agreement: which judge? give --judge NAME (loaded here) or NAME@URL (served)")
    agreement, verdicts = judge_agreement(judge, cfg.judge_agreement, cfg.limit)
    write_jsonl(Path(cfg.out) / "judge_agreement.jsonl", verdicts)
    print(json.dumps({"judge": cfg.judge, **agreement}))


def benchmark_names(cfg):
    """The benchmarks of --benchmarks; none if it is a record file."""
    names = [name.strip() for name in cfg.benchmarks.split(",") if name.strip()]
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown and len(names) > 1 and not Path(cfg.benchmarks).exists():
        raise InputError(f"--benchmarks: {unknown[0]!r} is unknown; give some of {', '.join(BENCHMARKS)}, or a record "
                         "file")
    return [] if unknown else names


def load_tasks(cfg):
    """The benchmarks of this call, with their items: a record file, or some of BENCHMARKS."""
    names, tasks = benchmark_names(cfg), []
    if not names:
        default = "runs/evolve/heldout.jsonl"
        path = records_path(cfg.benchmarks or default, default, "heldout")
        benchmark = RecordFile(path)
        items, key = benchmark.load(), hashlib.sha256(path.read_bytes()).hexdigest()
        for number, item in enumerate(items, 1):
            if item.questions and not cfg.judge:
                raise InputError(f"{path}:{number}: field 'constraints': judged; give --judge NAME (loaded here) or "
                                 "NAME@URL (served), or set active to false")
        return [Task(benchmark, spread(items, cfg.limit or len(items)), key, cfg)]
    for name in names:
        items = BENCHMARKS[name].load(Path(cfg.benchmark_dir))
        key = hashlib.sha256(json.dumps([item.messages for item in items]).encode()).hexdigest()
        items = spread(items, cfg.limit or len(items))
        if any(item.questions for item in items) and not cfg.judge:
            raise InputError(f"--benchmarks {name}: give --judge NAME (loaded here) or NAME@URL (served)")
        tasks.append(Task(BENCHMARKS[name], items, key, replace(cfg, out=str(Path(cfg.out) / name))))
    return tasks


def rows_of_call(cfg):
    """The one row of the flags; without --model, --method and --label six that tell thinking from its training."""
    if cfg.model or cfg.method or cfg.label:
        method = cfg.method or "cot"
        return [Row(cfg.label or METHODS[method], cfg.model or cfg.base_model, method)]
    for model, stage in ((cfg.sft_model, "sft.py"), (cfg.ours_model, "grpo.py")):
        if not (Path(model) / "config.json").is_file():
            raise InputError(f"{model}: no model there; run python {stage} first, or give --model for one row")
    return [Row("I/O", cfg.base_model, "io"), Row("CoT", cfg.base_model, "cot"),
            Row("CoT closed", cfg.base_model, "closed"), Row("SFT", cfg.sft_model, "cot"),
            Row("Ours", cfg.ours_model, "cot"), Row("Ours direct", cfg.ours_model, "direct")]


def model_loader(cfg):
    """load(NAME[@URL]) -> (tokenizer, engine); one model is in memory at a time, none after an empty name."""
    loaded = {}

    def load(name):
        model_name, url = split_address(name)
        if url:
            return None, Endpoint(url, model_name, progress="answers", timeout=600, skip_refused=True)
        if name not in loaded:
            loaded.clear()
        if name and name not in loaded:
            model, tokenizer = load_model(name, dtype=compute_dtype(cfg.precision))
            engine = make_engine(cfg.engine, model, tokenizer, source=name, max_length=4096 + cfg.max_new_tokens)
            engine.wake()
            engine.sync(model)
            loaded[name] = tokenizer, engine
        return loaded.get(name)

    return load


def check_settings(cfg):
    least = {"limit": 0, "max_new_tokens": 0, "perplexity_items": 0, "refine_turns": 0, "resamples": 1, "chunk": 1,
             "samples": 1, "thought_tokens": 1, "judge_tokens": 1, "judge_tries": 1}
    for name, lowest in least.items():
        if getattr(cfg, name) < lowest:
            raise InputError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: must be at least {lowest}")


def main(argv=None):
    cfg = parse_flags(Config, argv, PRESETS)
    check_settings(cfg)
    names = benchmark_names(cfg)
    cfg.out = cfg.out or ("runs/benchmarks" if names or cfg.table else "runs/evaluate")
    cfg.max_new_tokens = cfg.max_new_tokens or (4096 if names else 200)
    if cfg.score:
        print(json.dumps(score_files(cfg), ensure_ascii=False))
        return
    if cfg.table:
        print(paper_table(cfg))
        return
    if cfg.prepare:
        prepare([name.strip() for name in cfg.benchmarks.split(",") if name], Path(cfg.benchmark_dir))
        return
    if cfg.judge_agreement:
        measure_judge(cfg)
        return

    # 1. Load what is asked, and say which rows answer it.
    tasks, rows = load_tasks(cfg), rows_of_call(cfg)
    rank, _ = init_distributed()
    open_run(cfg.out, cfg, resume=True)

    # 2. Generate. All answers are written before the first is judged, so that a local judge is loaded once.
    load = model_loader(cfg)
    for task in tasks:
        for row in rows:
            answer_row(task, row, load)
    if rank:
        return
    load("")  # a judge in this process has the memory for itself

    # 3. Judge, score, report: all finished rows of the folder, not only those of this call.
    judge = tasks[0].benchmark.open_judge(cfg) if cfg.judge else None
    scored_tasks = [(task, score_rows(task, judge)) for task in tasks]
    if names:
        write_benchmark_report(cfg, scored_tasks)
    else:
        write_record_report(*scored_tasks[0])


if __name__ == "__main__":
    launch(main)
