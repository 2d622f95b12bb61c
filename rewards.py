"""Rewards: records, answer parsing, the rule-centric reward of RAIF, the math check, judges, the constraint library.

    from rewards import check, score
    check("length_constraints:number_words", {"num_words": 40, "relation": "at least"}, answer)    # -> bool
    score(records, completions, judge=None)                                                       # -> list[Score]

Reward (paper section 3.3):  R = R_format (+1 / -1) + R_accuracy (+2 all constraints, k/C some, -2 none or invalid).

`mode="compat"` is IFEval exactly as its authors score it (their quirks included), for the benchmark.
`mode="unicode"` asks for the same things but counts by script (a Chinese character is a word, 。！？ end sentences), is
not fooled by Markdown, and answers "no" to what it cannot judge. It is the default and what training uses.

Nothing in a text or a record is ever executed or unpickled, and every checker takes time linear in the text.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import logging
import math
import operator
import os
import random
import re
import signal
import sys
import threading
import time
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import BrokenExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property, lru_cache
from itertools import combinations, pairwise, takewhile
from pathlib import Path
from xml.parsers import expat

DATA = Path(__file__).resolve().parent / "data"
MAX_CHARS = 50_000  # over twice the longest rollout; a longer answer satisfies no constraint, so that no check can hang


class InputError(ValueError):
    """Bad input from the user: one line that names file, line, field and remedy."""


# ---------------------------------------------------------------------------------------------------------------------
# 1. Records (JSON Lines)


def json_lines(path):
    """(line number, value) for each line of a JSON Lines file; InputError names file, line and remedy of a bad one."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give the path of a JSON Lines file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise InputError(f"{path}: is empty; it needs one JSON object a line")
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
            if "\\ud" in line.lower():
                json.dumps(value, ensure_ascii=False).encode()  # half an emoji could not be written again
            yield number, value
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}:{number}: is not JSON ({error}); write one object a line") from None


def read_records(path) -> list[dict]:
    """Read and validate a record file, one JSON object a line. Unknown fields stay; default fields are filled in.

    Raises InputError `FILE:LINE: field 'X': what is wrong; remedy` at the first bad line; nothing is skipped silently.
    """
    records, seen = [], {}
    for number, record in json_lines(path):
        try:
            validate_record(record)
            if record["id"] in seen:
                first = seen[record["id"]]
                raise InputError(f"field 'id': {record['id']!r} is already used in line {first}; make it unique")
        except InputError as error:
            raise InputError(f"{path}:{number}: {error}") from None
        seen[record["id"]] = number
        records.append(record)
    return records


def filled(value) -> bool:
    """Is it a text that is not blank?"""
    return isinstance(value, str) and value.strip() != ""


def need(condition, name: str, wrong: str, remedy: str) -> None:
    if not condition:
        raise InputError(f"field {name!r}: {wrong}; {remedy}")


def validate_record(record) -> None:
    """Raise InputError `field 'X': what is wrong; remedy` for a record that is not of the form in the README."""
    need(isinstance(record, dict), "", "the line is not a JSON object", "write {...}")
    need(filled(record.get("id")), "id", "missing or not a text", "give every record a unique id")
    task, language = record.get("task"), record.get("language", "en")
    need(task in ("instruction", "math"), "task", f"{task!r} is not a task", 'use "instruction" or "math"')
    need(language in ("en", "zh"), "language", f"{language!r} is unknown", 'use "en" or "zh"')
    messages = record.get("messages")
    need(isinstance(messages, list) and messages, "messages", "missing or empty", "write a list with a user message")
    for i, message in enumerate(messages):
        ok = isinstance(message, dict) and message.get("role") in ("system", "user", "assistant")
        need(ok and filled(message.get("content")), f"messages[{i}]", "has no role or no content",
             'write {"role": "user", "content": "..."}')
    composition = record.get("composition", "and")
    need(composition in ("and", "chain", "selection", "nested"), "composition", f"{composition!r} is unknown",
         "use and, chain, selection or nested")
    need(record.get("expert") is None or filled(record["expert"]), "expert", "is not a text",
         "remove it or give the answer")
    if task == "math":
        need(filled(record.get("answer")), "answer", "missing or not a text", 'give the result as a text, e.g. "42"')
        return
    constraints = record.get("constraints")
    need(isinstance(constraints, list) and constraints, "constraints", "missing or empty", "give at least one")
    for i, constraint in enumerate(constraints):
        validate_constraint(constraint, i)
    need(any(c["active"] for c in constraints), "constraints", "none is active", "leave at least one active")


def validate_constraint(c, i: int) -> None:
    """The same for constraint number i of a record; default fields are filled in."""
    name = f"constraints[{i}]"
    need(isinstance(c, dict), name, "is not an object", 'write {"kind": "code", ...}')
    kind = c.get("kind")
    need(kind in ("code", "judge"), f"{name}.kind", f"{kind!r} is unknown", 'use "code" or "judge"')
    if kind == "judge":
        need(filled(c.get("question")), f"{name}.question", "missing or blank", "ask one yes/no question")
    else:
        if c.get("kwargs") is None:
            c["kwargs"] = {}
        try:
            checked_arguments(c.get("id"), c["kwargs"])
        except ValueError as error:
            field = "kwargs" if str(c.get("id")) in CHECKS else "id"
            raise InputError(f"field '{name}.{field}': {error}; see data/constraints.jsonl for the types") from None
    depends = c.setdefault("depends_on", [])
    earlier = isinstance(depends, list) and all(type(j) is int and 0 <= j < i for j in depends)
    need(earlier, f"{name}.depends_on", f"{depends!r} is not a list of earlier positions",
         f"use numbers below {i}" if i else "use []")
    need(type(c.setdefault("active", True)) is bool, f"{name}.active", "is not true or false", "use true or false")


# ---------------------------------------------------------------------------------------------------------------------
# 2. Parsing an assistant turn


@dataclass(frozen=True)
class Parsed:
    think: str
    answer: str
    format_ok: bool


TAGS = {"cold": ("<think>", "</think>", "<answer>", "</answer>"), "warm": ("<think>", "</think>")}


def parse_response(text: str, family: str = "cold") -> Parsed:
    """Split a whole assistant turn (pre-filled `<think>` included) into thought and answer.

    format_ok: every tag of the family occurs exactly once, in order. "cold" has think and answer tags, "warm" (R1)
    only the think tags. Of a broken turn the most sensible parts are still returned, tags removed.
    """
    if family not in TAGS:
        raise ValueError(f"unknown family {family!r}; use 'cold' or 'warm'")
    tags = TAGS[family]
    where = [text.find(tag) for tag in tags]
    format_ok = all(text.count(tag) == 1 for tag in tags) and where == sorted(where)
    head, closed, rest = text.partition("</think>")
    lead, opened, think = head.partition("<think>")
    if not closed:  # no thought at all, or one that never ended
        rest = lead
    elif not opened:
        think = lead
    if family == "cold" and "<answer>" in rest:
        rest = rest.partition("<answer>")[2]
    answer = rest.partition("</answer>")[0] if family == "cold" else rest
    any_tag = "|".join(tags)
    if re.search(any_tag, text):  # a turn without any tag is the answer itself, left exactly as it is
        think, answer = (re.sub(any_tag, "", part).strip() for part in (think, answer))
    return Parsed(think, answer, format_ok)


def is_placeholder(thought: str) -> bool:
    """True for a thought without content: blank, only punctuation ("..."), or a slot such as "your thoughts here"."""
    words = " ".join(re.findall(r"[^\W_]+", thought.lower()))
    slot = r"((insert|write|put) )?((your|my) )?(thoughts?|thinking|reasoning)( process)?( (goes )?here)?"
    return re.fullmatch(slot, words) is not None or words == "" or words in phrases()["empty_thoughts"]


# ---------------------------------------------------------------------------------------------------------------------
# 3. The reward


def format_reward(parsed: Parsed) -> float:
    return 1.0 if parsed.format_ok else -1.0


def accuracy_reward(verdicts: list[bool]) -> float:
    """All constraints +2, some k/C, none -2 (paper section 3.3). ValueError on an empty list."""
    if not verdicts:
        raise ValueError("accuracy_reward needs at least one verdict")
    if all(verdicts):
        return 2.0
    if not any(verdicts):
        return -2.0
    return sum(verdicts) / len(verdicts)


@dataclass(frozen=True)
class Turn:
    """One assistant turn as a reward function sees it."""

    record: dict
    text: str  # the whole turn, tags included
    parsed: Parsed  # its thought and answer, and whether the format is valid
    verdicts: list[bool]  # one per active constraint, in order; of a math record: [correct]
    judged: list[bool]  # which of the verdicts a judge gave
    format: float  # the paper's two parts: +1 or -1 (0 for a direct rollout), and
    accuracy: float  # +2, k/C or -2; of a math record +2, -1.5 or -2

    @property
    def thought_words(self) -> int:
        return word_count(self.parsed.think)

    @property
    def answer_words(self) -> int:
        return word_count(self.parsed.answer)


# Reward functions: turn -> (format, accuracy). The built-in ones but for raif count a math record's one verdict as they
# count constraints. Accuracy alone decides the superior-CoT rule.


def raif(turn: Turn) -> tuple[float, float]:
    return turn.format, turn.accuracy


def fraction(turn: Turn) -> tuple[float, float]:
    return turn.format, sum(turn.verdicts) / len(turn.verdicts)


def all_or_nothing(turn: Turn) -> tuple[float, float]:
    return turn.format, float(all(turn.verdicts))


def rules_x_judge(turn: Turn) -> tuple[float, float]:
    """Share of the rule verdicts (1 if there are no rules) if the judge says yes to everything, else 0."""
    by_rule = [verdict for verdict, judged in zip(turn.verdicts, turn.judged, strict=True) if not judged] or [True]
    by_judge = [verdict for verdict, judged in zip(turn.verdicts, turn.judged, strict=True) if judged]
    if not all(by_judge):
        return turn.format, 0.0
    return turn.format, sum(by_rule) / len(by_rule)


VARIANTS = {"raif": raif, "fraction": fraction, "all": all_or_nothing, "rules_x_judge": rules_x_judge}


@lru_cache(maxsize=8)  # a file keeps its state from step to step
def load_reward(name) -> Callable[[Turn], tuple[float, float]]:
    """The reward function of a name in VARIANTS or of FILE.py:FUNCTION; a function is returned as it is.

    InputError if there is no such file or function. What the file itself raises is not caught.
    """
    if callable(name) or name in VARIANTS:
        return VARIANTS.get(name, name)
    path, _, function = name.rpartition(":")
    if not path:
        raise InputError(f"reward {name!r} is unknown; use one of {', '.join(VARIANTS)}, or FILE.py:FUNCTION")
    if not Path(path).is_file() or not path.endswith(".py"):
        raise InputError(f"reward {name!r}: {path!r} is not a Python file; write FILE.py:FUNCTION")
    spec = importlib.util.spec_from_file_location(f"reward_from_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    if not callable(getattr(module, function, None)):
        raise InputError(f"reward {name!r}: {path} has no function {function!r}; write def {function}(turn): ...")
    return getattr(module, function)


@dataclass(frozen=True)
class Score:
    format: float
    accuracy: float
    total: float
    verdicts: list[bool]  # one per active constraint, in order; of a math record: [correct]
    guards: list[str] = field(default_factory=list)
    format_ok: bool = True  # whatever a reward of one's own makes of it


def is_finite(value) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def active_constraints(record: dict) -> list[dict]:
    if record.get("task") == "math":
        return []
    return [c for c in record["constraints"] if c.get("active", True)]


def score(records, completions, *, judge=None, family="cold", direct=False, mode="unicode", variant="raif",
          truncated=None) -> list[Score]:
    """The rule-centric reward of whole assistant turns; `records[i]` belongs to `completions[i]`.

    An instruction with an invalid format, a blank answer or a blank or placeholder thought has accuracy -2, all
    verdicts False. A constraint counts only if all it depends on hold, transitively; inactive ones are never scored.
    direct=True (no-reasoning rollouts): no think check, the answer block or else all after the thought is the answer,
    format 0, total = accuracy. The judge gets all questions of the call at once; ValueError if it is missing.
    variant: a reward function or what `load_reward` takes; InputError if it returns other than two finite numbers.
    truncated: a flag per completion, for `guards`.
    """
    reward = load_reward(variant)
    truncated = truncated or [False] * len(records)
    parsed_turns = [parse_response(text, family) for text in completions]
    valid = [parsed.answer.strip() != "" and (direct or (parsed.format_ok and not is_placeholder(parsed.think)))
             for parsed in parsed_turns]
    judged_verdicts = ask_judge(records, parsed_turns, valid, judge)
    scores = []
    for i, (record, text, parsed) in enumerate(zip(records, completions, parsed_turns, strict=True)):
        active = active_constraints(record)
        raised = guards(parsed.answer, record["messages"][-1]["content"], active, truncated[i])
        form = 0.0 if direct else format_reward(parsed)
        if record["task"] == "math":
            accuracy = math_reward(text, record["answer"])
            verdicts = [accuracy == 2.0]
        elif valid[i]:
            verdicts = constraint_verdicts(record, parsed.answer, judged_verdicts[i], mode)
            accuracy = accuracy_reward(verdicts)
        else:
            accuracy, verdicts = -2.0, [False] * len(active)
        judged = [c["kind"] == "judge" for c in active] or [False]
        parts = reward(Turn(record, text, parsed, verdicts, judged, form, accuracy))
        if not (isinstance(parts, tuple) and len(parts) == 2 and all(map(is_finite, parts))):
            raise InputError(f"reward {variant!r} returned {parts!r}; return a tuple (format, accuracy) of two finite "
                             "numbers")
        form, accuracy = map(float, parts)
        scores.append(Score(form, accuracy, form + accuracy, verdicts, raised, direct or parsed.format_ok))
    return scores


def ask_judge(records, parsed_turns, valid, judge) -> list[dict[int, bool]]:
    """For each record the judge's verdicts by the constraint's position; nothing is asked about an invalid turn."""
    places, items = [], []
    for i, (record, parsed) in enumerate(zip(records, parsed_turns, strict=True)):
        for j, c in enumerate(record.get("constraints", [])):
            if record["task"] == "math" or c["kind"] == "code" or not c.get("active", True):
                continue
            if judge is None:
                raise ValueError(f"record {record['id']!r} has judge constraints; pass a judge")
            if valid[i]:
                places.append((i, j))
                items.append((record["messages"][-1]["content"], parsed.answer, c["question"]))
    verdicts = [{} for _ in records]
    for (i, j), verdict in zip(places, judge(items) if items else [], strict=True):
        verdicts[i][j] = bool(verdict)
    return verdicts


def constraint_verdicts(record: dict, answer: str, judged_verdicts: dict[int, bool], mode: str) -> list[bool]:
    """One verdict per active constraint. An inactive one passes on what it depends on."""
    holds, prompt = [], record["messages"][-1]["content"]
    for j, c in enumerate(record["constraints"]):
        verdict = all(holds[k] for k in c.get("depends_on", ()))  # transitive: those carry their own
        if verdict and j in judged_verdicts:
            verdict = judged_verdicts[j]
        elif verdict and c.get("active", True):
            verdict = check(c["id"], c.get("kwargs"), answer, prompt=prompt, mode=mode)
        holds.append(verdict)
    return [verdict for verdict, c in zip(holds, record["constraints"], strict=True) if c.get("active", True)]


def n_grams(words: list[str], n: int) -> list[tuple]:
    return list(zip(*(words[i:] for i in range(n)), strict=False))


def lower_words(s: str) -> list[str]:
    return [word.casefold() for word in text_of(s).words]


def guards(answer: str, prompt: str, constraints=(), truncated: bool = False) -> list[str]:
    """Names of the signs of reward hacking in an answer; they are reported, and change no reward."""
    t = text_of(answer[:MAX_CHARS])
    words = lower_words(t.s)
    flags = ["truncated"] if truncated else []
    if not words:
        return [*flags, "empty"]
    fives, fives_of_prompt = n_grams(words, 5), set(n_grams(lower_words(prompt), 5))
    copied = sum(gram in fives_of_prompt for gram in fives)
    asked_to_repeat = any(c.get("id") == "combination:repeat_prompt" for c in constraints)
    if len(fives) > 5 and copied > len(fives) / 2 and not asked_to_repeat:
        flags.append("prompt_copied")
    share = len(words) / 5  # of the answer that may consist of one keyword
    if any(occurrences(t, word) > max(3, share / max(1, word_count(word))) for word in wanted(constraints)):
        flags.append("keyword_stuffing")
    threes = n_grams(words, 3)
    often = max(Counter(t.sentences).values(), default=0)
    if often > 2 or (len(threes) > 30 and len(set(threes)) < len(threes) / 2):
        flags.append("repetition")
    return flags


def wanted(constraints) -> list[str]:
    """The keywords that the constraints ask for."""
    keywords = []
    for c in constraints:
        kwargs = c.get("kwargs") or {}
        keywords += kwargs.get("keywords") or []
        keywords += filter(None, [kwargs.get("keyword")])
    return keywords


def count_slips(record: dict, answer: str) -> int:
    """Single faults of an answer against the active code constraints of its record: 0 if and only if all hold."""
    slips = 0
    for c in active_constraints(record):
        if c["kind"] == "judge" or check(c["id"], c["kwargs"], answer):
            continue
        count = 1
        if c["id"] in SLIPS:
            count = SLIPS[c["id"]](text_of(answer), **checked_arguments(c["id"], c["kwargs"]))
        slips += max(1, count)
    return slips


# ---------------------------------------------------------------------------------------------------------------------
# 4. Math

MATH_SECONDS = 5.0  # sympy may run for hours on a hostile answer; the process is killed after this time
MATH_LOCK = threading.Lock()


def last_boxed(text: str) -> str | None:
    r"""Content of the last closed `\boxed{...}`, braces matched (`\{` and `\}` are plain signs); None without one."""
    open_braces, last, start_of_last = [], None, -1
    for m in re.finditer(r"\\boxed\s*\{|\\.|[{}]", text, re.DOTALL):
        if m[0].endswith("{") and m[0] != r"\{":
            open_braces.append(m)
        elif m[0] == "}" and open_braces:
            opening = open_braces.pop()
            if opening[0] != "{" and opening.start() > start_of_last:
                last, start_of_last = text[opening.end(): m.start()], opening.start()
    return last


def math_reward(text: str, gold: str) -> float:
    r"""+2 if the last `\boxed{}` of the whole completion equals `gold`, -1.5 if not, -2 without any; format aside.

    math-verify decides what is equal (AC is CA, 1.0e3 and 5元 are not understood), except that a box that shows
    several results (41=42, 41 \to 42) is wrong. `\boxed 5` is no box.
    """
    answer = last_boxed(text)
    if answer is None:
        return -2.0
    answer, gold = (" ".join(re.sub(r"\\[,;:!]", "", s).split()) for s in (answer, last_boxed(gold) or gold))
    if not 0 < len(answer) <= 1000 or shows_steps(answer, gold):
        return -1.5
    return 2.0 if answer == gold or same_value(gold, answer) else -1.5


def shows_steps(answer: str, gold: str) -> bool:
    """Does the box hold a derivation, of which math-verify would take the end? A name before "=" is none: x=42."""
    if "=" in gold or "→" in gold:
        return False
    if re.search(r"\\(?:to|rightarrow|Rightarrow|implies|mapsto)(?![a-zA-Z])|→|⇒", answer):
        return True
    sides = re.sub(r"\\[a-zA-Z]+", "", answer).split("=")[:-1]
    return any(re.search(r"\d", side) and not re.search("[a-zA-Z]", side) for side in sides)


def verify_math(gold: str, answer: str) -> bool:
    """math-verify's verdict; runs in the worker process."""
    from math_verify import parse, verify

    gold, answer = (parse(f"\\boxed{{{s}}}", parsing_timeout=None) for s in (gold, answer))
    return bool(gold and answer and verify(gold, answer, timeout_seconds=None))


def start_worker(trainer: int) -> None:
    """In the worker: signals are for the trainer, which finishes its step first. It ends with the trainer."""
    logging.disable()  # math-verify warns at every call that it has no time limit of its own
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=end_with, args=(trainer,), daemon=True).start()


def end_with(trainer: int) -> None:
    while os.getppid() == trainer:
        time.sleep(1)
    os._exit(0)


@lru_cache(maxsize=1)
def math_pool():
    """One worker process, started at the first question: a clean interpreter, not a copy of the trainer.

    RuntimeError if math-verify does not work there.
    """
    import loky

    pool = loky.ProcessPoolExecutor(max_workers=1, initializer=start_worker, initargs=(os.getpid(),))
    if not pool.submit(verify_math, "1", "1").result(timeout=120):  # loading sympy does not count
        raise RuntimeError("the math-verify worker does not start; check `python -c 'import math_verify'`")
    return pool


def same_value(gold: str, answer: str, seconds: float = MATH_SECONDS) -> bool:
    """Are they equal? If the worker raises, dies or misses the deadline, at which it is killed, they are not."""
    with MATH_LOCK:
        try:
            future = math_pool().submit(verify_math, gold, answer)
        except BrokenExecutor:  # it died since or at the last question
            math_pool.cache_clear()
            future = math_pool().submit(verify_math, gold, answer)
        try:
            return future.exception(timeout=seconds) is None and future.result()
        except TimeoutError:
            math_pool().shutdown(kill_workers=True)
            math_pool.cache_clear()
            return False


# ---------------------------------------------------------------------------------------------------------------------
# 5. The constraint library
#
# A new constraint type is one function in this section and one row in data/constraints.jsonl; nothing else changes:
#
#     @checker("keywords:once")
#     def once(t, keyword):                         # the answer as a Text, then the row's arguments by their names
#         return occurrences(t, keyword) == 1
#
#     {"id": "keywords:once", "arguments": {"keyword": ["text"]}, "tags": [], "avoids": ["frequency"],
#      "wordings": {"en": ["Use \"{keyword}\" once."], "zh": ["“{keyword}”只出现一次。"]},
#      "example": {"kwargs": {"keyword": "tea"}, "pass": "I like tea.", "fail": "Tea is tea."}}
#
# `t.plain` is the text to look words up in (NOT_CJK is a word boundary that also holds beside Chinese); `t.words`,
# `t.sentences`, `t.lines`, `t.items` are its parts, `t.s` is the raw text. An argument is its type (see TYPES) and what
# random arguments are drawn from (see draw): ["count", 2, 4] a whole number from 2 to 4, ["limit", "at least",
# "exactly"] one of these, ["text"] a word of data/phrases.json. Call words that must occur `keyword` or `keywords`: the
# guard against stuffing counts them. In a wording `{n:item|items}` is "item" where n is 1; the tests want three of them
# in each language, and the row in one line (`pytest tests/test_constraints.py -k once` runs yours). Optional fields:
# "languages" of the requests that the type suits, "ood": true (held out, never trained on; a test counts those of the
# shipped held-out file). Two types with a tag in common, or one of which "avoids" a tag or the name (what follows the
# colon) of the other, are never asked for together. Optional extras: SLIPS below, WORDED in evolve.py.

CHECKS: dict[str, Callable[..., bool]] = {}  # id -> checker(text, **arguments): the verdict of a careful reader
COMPAT: dict[str, Callable[..., bool]] = {}  # IFEval's types as its authors score them


def checker(constraint_id: str, table=CHECKS):
    """Decorator: register a function as the checker of a constraint type."""

    def register(function):
        table[constraint_id] = function
        return function

    return register


def official(constraint_id: str):
    """Decorator: register IFEval's own verdict. It is the verdict of both modes unless a `checker` follows."""

    def register(function):
        COMPAT[constraint_id] = CHECKS[constraint_id] = function
        return function

    return register


RELATIONS = {"less than": operator.lt, "at least": operator.ge, "at most": operator.le, "exactly": operator.eq}


def compare(count: int, relation: str, number: int) -> bool:
    return RELATIONS[relation](count, number)


# ---------------------------------------------------------------- one text, split once

HAN = "\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
KANA = "\u3041-\u3096\u30a1-\u30fa\u30fc-\u30fe\uff66-\uff9f"
CJK = re.compile(f"[{HAN}{KANA}]")
# vowel signs and other marks belong to their word (Hindi, Thai, accents written apart), which \w alone would cut
MARKS = "".join(chr(c) for c in range(0x300, 0x2000) if unicodedata.category(chr(c))[0] == "M") + "\u200c\u200d"
WORD = re.compile(f"[^\\W_][\\w{MARKS}]*(?:(?:['’](?=[a-zA-Z])|(?<=[0-9])[.,](?=[0-9]))[\\w{MARKS}]+)*")
CJK_STOP = re.compile(f"((?:[。！？｡؟۔।॥]|(?<=[{HAN}{KANA}])[.!?])+[!?.。！？…]*[”’」』》）)\"'\\]]*)")
RULE_LINE = re.compile(r"[ \t]*(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$")
BULLET = re.compile(r"[ \t]*(?:[*+-][ \t]+|[•●▪◦·][ \t]*)(?=\S)")
NUMBERED = re.compile(rf"[ \t]*(?:\*\*)?（?(\d{{1,4}})(?:[.)](?:[ \t]+|(?=[{HAN}]))|[、．）][ \t]*)(?=\S)")
HEADING = re.compile(r" {0,3}(#{1,6})[ \t]+(?=\S)")
FENCE = re.compile(r"[ \t]*(`{3,}|~{3,})([^`\n]*)$")
EDGE_MARKS = " \t\r\n*_#>~`\"'“”‘’「」『』"
# Punkt's own list lacks these; "etc." and "no." are not in it because they often do end a sentence
ABBREVIATIONS = {"e.g", "i.e", "approx", "fig", "cf", "eq", "vol", "dept", "est"}


@lru_cache(maxsize=2)
def punkt(extra_abbreviations: bool):
    """NLTK's English sentence splitter, from its tables in data/punkt."""
    from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer

    def rows(name):
        return (DATA / "punkt" / "english" / name).read_text(encoding="utf-8").splitlines()

    params = PunktParameters()
    params.abbrev_types, params.sent_starters = set(rows("abbrev_types.txt")), set(rows("sent_starters.txt"))
    if extra_abbreviations:
        params.abbrev_types |= ABBREVIATIONS
    params.collocations = {tuple(row.split("\t")) for row in rows("collocations.tab")}
    orthography = (row.split("\t") for row in rows("ortho_context.tab"))
    params.ortho_context = defaultdict(int, {word: int(flags) for word, flags in orthography})
    tokenizer = PunktSentenceTokenizer()
    tokenizer._params = params
    return tokenizer


@lru_cache(maxsize=1)
def language_detectors():
    """langdetect's factory with a seed of its own: the same text gets the same answer, in any thread."""
    from langdetect.detector_factory import PROFILES_DIRECTORY, DetectorFactory

    factory = DetectorFactory()
    factory.load_profile(PROFILES_DIRECTORY)
    factory.seed = 0
    return factory


@lru_cache(maxsize=4096)
def detect_language(text: str) -> str | None:
    """langdetect's code for the text ("en", "zh-cn", ...), seeded; None where it finds no letters to judge."""
    from langdetect.lang_detect_exception import LangDetectException

    detector = language_detectors().create()
    detector.append(text)
    try:
        return detector.detect()
    except LangDetectException:
        return None


class Text:
    """An answer and its splits, each made at most once and shared by all constraints of the answer (see `text_of`)."""

    def __init__(self, s: str):
        self.s = s

    # IFEval's splits

    @cached_property
    def lower(self) -> str:
        return self.s.lower()

    @cached_property
    def word_runs(self) -> int:
        return len(re.findall(r"\w+", self.s))

    @cached_property
    def punkt_sentences(self) -> list[str]:
        return punkt(extra_abbreviations=False).tokenize(self.s)

    @cached_property
    def nltk_tokens(self) -> list[str]:
        from nltk.tokenize import NLTKWordTokenizer

        return [token for sentence in self.punkt_sentences for token in NLTKWordTokenizer().tokenize(sentence)]

    @cached_property
    def language(self) -> str | None:
        return detect_language(self.s)

    # a careful reader's splits

    @cached_property
    def words(self) -> list[str]:
        """Each Chinese or Japanese character is a word; elsewhere runs of letters, digits and their marks are.

        "don't" and "3.5" are one word each; "state-of-the-art" is four.
        """
        return WORD.findall(CJK.sub(r" \g<0> ", self.s))

    @cached_property
    def plain(self) -> str:
        """The text to look words up in: accents composed, apostrophes straight, nothing hidden inside a word."""
        s = unicodedata.normalize("NFC", self.s).replace("’", "'")
        return re.sub(r"[\u00ad\u200b\u2060\ufeff]|(?<=\w)\*+(?=\w)", "", s)

    @cached_property
    def lines(self) -> list[str]:
        return [line for line in self.s.splitlines() if line.strip()]

    @cached_property
    def fenced(self) -> tuple[list[str], list[tuple[str, str]], bool]:
        """(lines outside code fences, (tag, code) of each closed block, is a block left open?), as in CommonMark."""
        outside, blocks, fence, tag, code = [], [], "", "", []
        for line in self.s.splitlines():
            mark = FENCE.match(line)
            if fence and mark and mark[1].startswith(fence) and not mark[2].strip():
                blocks.append((tag, "\n".join(code)))
                fence = ""
            elif fence:
                code.append(line)
            elif mark:
                fence, tag, code = mark[1], mark[2].strip(), []
            else:
                outside.append(line)
        return outside, blocks, fence != ""

    @cached_property
    def prose_lines(self) -> list[str]:
        """All lines outside code fences, blank ones included."""
        return self.fenced[0]

    @cached_property
    def bullets(self) -> list[str]:
        """The lines that open with a bullet, without it."""
        marks = filter(None, map(BULLET.match, self.prose_lines))
        return [mark.string[mark.end():] for mark in marks if not RULE_LINE.match(mark.string)]

    @cached_property
    def items(self) -> list[str]:
        """The items of bulleted and numbered lists; indented lines below an item belong to it."""
        items, inside = [], False
        for line in self.prose_lines:
            mark = BULLET.match(line) or NUMBERED.match(line)
            if mark and not RULE_LINE.match(line):
                items.append([line[mark.end():]])
                inside = True
            elif inside and line[:1].isspace():
                items[-1].append(line.strip())
            elif line.strip():
                inside = False
        return [" ".join(parts) for parts in items]

    @cached_property
    def paragraphs(self) -> list[str]:
        """Parts between blank lines."""
        return [part.strip() for part in re.split(r"\n[^\S\n]*\n", self.s) if part.strip()]

    @cached_property
    def blocks(self) -> list[str]:
        """Runs of lines that a sentence does not cross; markers of items and headings are not part of them."""
        blocks, block = [], []
        for line in [*self.prose_lines, ""]:
            mark = BULLET.match(line) or NUMBERED.match(line) or HEADING.match(line)
            if not mark and line.strip() and not RULE_LINE.match(line):
                block.append(line)
                continue
            blocks.append("\n".join(block))
            block = []
            if mark:
                block.append(line[mark.end():])
            if HEADING.match(line):
                blocks.append(block.pop())
        return blocks

    @cached_property
    def sentences(self) -> list[str]:
        """Sentences by script. A list item, a heading and a blank line end a sentence.

        A quotation that ends with a stop ends a sentence in Chinese; in English the sentence goes on in lower case.
        """
        split = punkt(extra_abbreviations=True).tokenize
        if len(self.s) > MAX_CHARS // 2:  # Punkt takes 40 us a sentence; nobody counts sentences in a text that long
            split = re.compile(r"(?<=[.!?])\s+").split
        sentences = []
        for block in self.blocks:
            for part in CJK_STOP.sub("\\1\0", block).split("\0"):
                for sentence in split(part.strip()):
                    if sentences and sentences[-1].endswith(('"', "”")) and sentence[:1].islower():
                        sentences[-1] += " " + sentence
                    elif WORD.search(sentence):
                        sentences.append(sentence.strip())
        return sentences

    @cached_property
    def letters(self) -> str:
        return "".join(c for c in self.s if c.isalpha())

    @cached_property
    def main_language(self) -> str:
        """Code of the language: "zh" or "ja" if half of the words are theirs, else langdetect's; "" for a mixture.

        Other languages may hold a tenth of Chinese or Japanese words. langdetect errs on one in twenty English texts of
        up to ten words, so those count as English if a fifth of their words are among the commonest English ones.
        """
        kana = len(re.findall(f"[{KANA}]", self.s))
        cjk, words = len(CJK.findall(self.s)), len(self.words)
        if cjk and 2 * cjk >= words:
            return "ja" if kana * 10 > cjk - kana else "zh"
        if 10 * cjk > words or not self.letters:
            return ""
        common = sum(word.lower() in phrases()["common_english"] for word in self.words)
        if words <= 10 and 5 * common >= words:
            return "en"
        return detect_language(self.lower) or ""


@lru_cache(maxsize=256)
def text_of(s: str) -> Text:
    return Text(s)


def is_zh(s: str) -> bool:
    """Is the text mostly Chinese?"""
    return len(CJK.findall(s)) * 2 > len(text_of(s).words)


def word_count(s: str) -> int:
    return len(text_of(s).words)


# ---------------------------------------------------------------- IFEval's 25 types, as its authors score them


def pattern_of(argument: str) -> str:
    """IFEval takes words as regular expressions. One that is none is taken literally, and so is one with repetition:
    it could run for hours, and no prompt of IFEval has one."""
    if re.search(r"[*+{]", argument) or len(re.findall(r"[?|]", argument)) > 3:
        return re.escape(argument)
    try:
        re.compile(argument)
    except re.error:
        return re.escape(argument)
    return argument


def find_all(pattern: str, s: str) -> list:
    return re.findall(pattern, s, re.IGNORECASE)


def divided(s: str, pattern: str) -> list[str]:
    """Parts between dividers, blank first and last ones dropped; none at all if a blank part stands in the middle."""
    parts = re.split(pattern, s)
    if not parts[0].strip():
        parts = parts[1:]
    if parts and not parts[-1].strip():
        parts = parts[:-1]
    if any(not part.strip() for part in parts):
        return []
    return parts


def load_json(s: str, strict: bool = True):
    """The value of a JSON text; None if it is none. strict: null, NaN and Infinity are none either."""

    def refuse(name):
        raise ValueError(name)

    try:
        return json.loads(s, parse_constant=refuse if strict else None)
    except (ValueError, RecursionError):  # RecursionError: nested thousands deep
        return None


@official("keywords:existence")
def official_existence(t, keywords):
    return all(find_all(pattern_of(word), t.s) for word in keywords)


@official("keywords:frequency")
def official_frequency(t, keyword, frequency, relation):
    return compare(len(find_all(pattern_of(keyword.strip()), t.s)), relation, frequency)


@official("keywords:forbidden_words")
def official_forbidden_words(t, forbidden_words):
    return not any(find_all(rf"\b{pattern_of(word)}\b", t.s) for word in forbidden_words)


@official("keywords:letter_frequency")
def letter_frequency(t, letter, let_frequency, let_relation):
    return compare(t.lower.count(letter.lower()), let_relation, let_frequency)


@official("language:response_language")
def official_response_language(t, language):
    return t.language in (language, None)


@official("length_constraints:number_sentences")
def official_number_sentences(t, num_sentences, relation):
    return compare(len(t.punkt_sentences), relation, num_sentences)


@official("length_constraints:number_paragraphs")
def official_number_paragraphs(t, num_paragraphs):
    return len(divided(t.s, r"\s?\*\*\*\s?")) == num_paragraphs > 0


@official("length_constraints:number_words")
def official_number_words(t, num_words, relation):
    return compare(t.word_runs, relation, num_words)


@official("length_constraints:nth_paragraph_first_word")
def official_nth_paragraph_first_word(t, num_paragraphs, nth_paragraph, first_word):
    paragraphs = t.s.split("\n\n")
    count = sum(part.strip() != "" for part in paragraphs)
    if count != num_paragraphs or not 0 < nth_paragraph <= count:
        return False
    opening = paragraphs[nth_paragraph - 1].split()[:1]  # a blank paragraph has no first word
    words = [re.split(r"[.,?!'\"]", word.lstrip("'").lstrip('"'), maxsplit=1)[0].lower() for word in opening]
    return words == [first_word.lower()]


@official("detectable_content:number_placeholders")
def official_number_placeholders(t, num_placeholders):
    lines = [line[: line.rfind("]") + 1] for line in t.s.split("\n")]  # an opening bracket without a closing one is cut
    return sum(len(re.findall(r"\[[^\]]*\]", line)) for line in lines) >= num_placeholders


@official("detectable_content:postscript")
def official_postscript(t, postscript_marker):
    marker = postscript_marker.strip()
    patterns = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    return find_all(patterns.get(marker) or pattern_of(marker.lower()), t.lower) != []


@official("detectable_format:number_bullet_lists")
def official_number_bullet_lists(t, num_bullets):
    # A lone "*" swallows the line after it, as officially; [^\S\n] instead of \s keeps a page of blank lines linear.
    stars = re.findall(r"(?m)^[^\S\n]*\*[^\*].*$", t.s)
    dashes = re.findall(r"(?m)^[^\S\n]*-", t.s)
    return len(stars) + len(dashes) == num_bullets


@official("detectable_format:constrained_response")
def official_constrained_response(t):
    return re.search(r"My answer is (yes|no|maybe)\.", t.s) is not None


@official("detectable_format:number_highlighted_sections")
def official_number_highlighted_sections(t, num_highlights):
    single, double = re.findall(r"\*[^\n\*]*\*", t.s), re.findall(r"\*\*([^\n\*]*)\*\*", t.s)
    return sum(part.strip("*").strip() != "" for part in single + double) >= num_highlights


@official("detectable_format:multiple_sections")
def official_multiple_sections(t, section_spliter, num_sections):
    return len(re.findall(rf"{pattern_of(section_spliter.strip())}\s?\d", t.s)) >= num_sections


@official("detectable_format:json_format")
def official_json_format(t):
    s = t.s.strip()
    for tag in ("```json", "```Json", "```JSON", "```"):
        s = s.removeprefix(tag)
    s = s.removesuffix("```").strip()
    return load_json(s, strict=False) is not None or s == "null"


@official("detectable_format:title")
def official_title(t):
    for line in t.s.split("\n"):
        start, end = line.find("<<"), line.rfind(">>")
        if start >= 0 and end >= start + 3 and line[start:end + 2].lstrip("<").rstrip(">").strip():
            return True
    return False


@official("combination:two_responses")
def two_responses(t):
    parts = divided(t.s, r"\*\*\*\*\*\*")
    return len(parts) == 2 and parts[0].strip() != parts[1].strip()


@official("combination:repeat_prompt")
def official_repeat_prompt(t, prompt_to_repeat):
    return t.s.strip().lower().startswith(prompt_to_repeat.strip().lower())


@official("startend:end_checker")
def official_end_checker(t, end_phrase):
    return t.s.strip().strip('"').lower().endswith(end_phrase.strip().lower())


@official("startend:quotation")
def official_quotation(t):
    s = t.s.strip()
    return len(s) > 1 and s.startswith('"') and s.endswith('"')


@official("change_case:english_capital")
def official_english_capital(t):
    return t.s.isupper() and t.language in ("en", None)


@official("change_case:english_lowercase")
def official_english_lowercase(t):
    return t.s.islower() and t.language in ("en", None)


@official("change_case:capital_word_frequency")
def official_capital_word_frequency(t, capital_frequency, capital_relation):
    return compare(sum(token.isupper() for token in t.nltk_tokens), capital_relation, capital_frequency)


@official("punctuation:no_comma")
def official_no_comma(t):
    return "," not in t.s


# ---------------------------------------------------------------- the same requests, read with care and by script

NOT_CJK = f"[^\\W_{HAN}{KANA}]"  # word characters that are set apart by spaces: only beside these has a word a boundary


@lru_cache(maxsize=4096)
def keyword_pattern(word: str) -> re.Pattern:
    """The word itself: a whole word where the script has spaces, anywhere in Chinese; any case, any white space.

    A Korean word may carry a particle.
    """
    parts = unicodedata.normalize("NFC", word).replace("’", "'").split()
    left = right = ""
    if re.match(NOT_CJK, parts[0]):
        left = f"(?<!{NOT_CJK})"
    if re.match(NOT_CJK, parts[-1][-1]) and not "가" <= parts[-1][-1] <= "힣":
        right = f"(?!{NOT_CJK})"
    return re.compile(left + r"\s+".join(map(re.escape, parts)) + right, re.IGNORECASE)


def occurrences(t: Text, word: str) -> int:
    return sum(1 for _ in keyword_pattern(word).finditer(t.plain))


def opens_with(part: str, word: str) -> bool:
    return keyword_pattern(word).match(text_of(part).plain.lstrip(EDGE_MARKS + "([（【-")) is not None


@checker("keywords:existence")
def existence(t, keywords):
    return missing_keywords(t, keywords) == 0


@checker("keywords:frequency")
def frequency(t, keyword, frequency, relation):
    return compare(occurrences(t, keyword), relation, frequency)


@checker("keywords:forbidden_words")
def no_forbidden_words(t, forbidden_words):
    return forbidden_occurrences(t, forbidden_words) == 0


def is_traditional(s: str) -> bool:
    """No simplified character: Big5, the code of Taiwan, lacks them."""
    han = "".join(re.findall(f"[{HAN}]", s))
    return len(han.encode("big5", "ignore")) == 2 * len(han)


def speaks(t: Text, code: str) -> bool:
    """zh and zh-cn, which the wordings call Chinese, take both forms of the characters; zh-tw only the traditional."""
    code = code.lower()
    if code.startswith("zh"):
        return t.main_language == "zh" and (code != "zh-tw" or is_traditional(t.s))
    return t.main_language == code


@checker("language:response_language")
def response_language(t, language):
    return speaks(t, language)


@checker("length_constraints:number_sentences")
def number_sentences(t, num_sentences, relation):
    return compare(len(t.sentences), relation, num_sentences)


@checker("length_constraints:number_paragraphs")
def number_paragraphs(t, num_paragraphs):
    return len(divided(t.s, r"(?:^|(?<=\s))\*\*\*(?=\s|$)")) == num_paragraphs > 0


@checker("length_constraints:number_words")
def number_words(t, num_words, relation):
    return compare(len(t.words), relation, num_words)


@checker("length_constraints:nth_paragraph_first_word")
def nth_paragraph_first_word(t, num_paragraphs, nth_paragraph, first_word):
    if len(t.paragraphs) != num_paragraphs or not 0 < nth_paragraph <= num_paragraphs:
        return False
    return opens_with(t.paragraphs[nth_paragraph - 1], first_word)


@checker("detectable_content:number_placeholders")
def number_placeholders(t, num_placeholders):
    """A slot holds a letter: [1] is a citation, [^1] a footnote, a[i] an index, ["a"] JSON, [x] a tick, [a](b) link."""
    slots = re.findall(r"(?<![A-Za-z0-9_)\]])[\[【［]([^\[\]【】［］\n^\"][^\[\]【】［］\n\"]*)[\]】］](?!\()", t.s)
    return sum(re.search(r"[^\W\d_]", slot) is not None and slot not in "xX" for slot in slots) >= num_placeholders


SENTENCE_ENDS = ("\n", ".", "!", "?", "。", "…", ";", ":", "”", "'", ")")


@checker("detectable_content:postscript")
def postscript(t, postscript_marker):
    """The marker opens a line or a sentence that is not the first, and a remark follows it."""
    marker, s = unicodedata.normalize("NFKC", postscript_marker.strip().lower()), unicodedata.normalize("NFKC", t.lower)
    pattern = {"p.p.s": r"p\.\s?p\.\s?s", "p.s.": r"p\.\s?s[.:]"}.get(marker, re.escape(marker))
    for mark in re.finditer(rf"(?<![\w.]){pattern}", s):
        before = s[: mark.start()].rstrip(" \t*_#>~\"“(")
        if before.endswith(SENTENCE_ENDS) and WORD.search(before) and WORD.search(s, mark.end()):
            return True
    return False


@checker("detectable_format:number_bullet_lists")
def number_bullet_lists(t, num_bullets):
    return len(t.bullets) == num_bullets


@checker("detectable_format:constrained_response")
def constrained_response(t):
    """One of the three answers, in English or Chinese, and no other one of them besides."""
    english = re.findall(r"\bMy answer is [*_]*(yes|no|maybe)[*_]*\.", t.s)
    chinese = re.findall("我的回答是[：:]?[“\"*_]*(是|否|不确定)[”\"*_]*[。.]", t.s)
    return len({*english, *chinese}) == 1


@checker("detectable_format:number_highlighted_sections")
def number_highlighted_sections(t, num_highlights):
    emphasis = r"(?<![*\\A-Za-z0-9])(\*{1,3})(?![\s*])([^*\n]+)(?<!\s)\1(?!\*)"  # 2*3*4 is no emphasis
    return len(re.findall(emphasis, "\n".join(t.prose_lines))) >= num_highlights


@checker("detectable_format:multiple_sections")
def multiple_sections(t, section_spliter, num_sections):
    """Different numbers of lines that open with "Section 1" or 第1部分, Markdown marks allowed before them."""
    name, number = re.escape(section_spliter.strip()), r"(\d{1,6}|[一二三四五六七八九十]{1,3})"
    heads = re.findall(rf"(?im)^[ \t#*_>\"“]*(?:{name}[^\S\n]?{number}|第[^\S\n]?{number}[^\S\n]?{name})", t.s)
    return len({before or after for before, after in heads}) >= num_sections


@checker("detectable_format:json_format")
def json_format(t):
    """A JSON object or list that is not empty, alone or in a code fence."""
    value = load_json(unfenced(t.s))
    return isinstance(value, dict | list) and len(value) > 0


@checker("detectable_format:title")
def title(t):
    return official_title(t) or re.search(r"《《\s*[^\s《》][^\n《》]*》》", t.s) is not None


@checker("combination:repeat_prompt")
def repeat_prompt(t, prompt_to_repeat):
    return " ".join(t.s.casefold().split()).startswith(" ".join(prompt_to_repeat.casefold().split()))


@checker("startend:end_checker")
def end_checker(t, end_phrase):
    phrase = end_phrase.strip(EDGE_MARKS).casefold()
    if not phrase:  # it consists of marks alone
        return t.s.rstrip().endswith(end_phrase.strip())
    return t.s.rstrip(EDGE_MARKS).casefold().endswith(phrase)


QUOTES = {'"': '"', "“": "”", "「": "」", "『": "』", "«": "»"}


@checker("startend:quotation")
def quotation(t):
    """One pair of quotation marks round the whole answer: the opening one is not closed before the end."""
    s = t.s.strip().strip("*_")
    if len(s) < 3 or QUOTES.get(s[0]) != s[-1]:
        return False
    if s[0] == '"':  # the first mark inside must be an opening one, with no space after it
        return re.match(r'"[^"]*[^\s"(（]"(?=\s)', s) is None
    depth = 0
    for c in s[:-1]:
        depth += (c == s[0]) - (c == s[-1])
        if depth == 0:
            return False
    return True


def is_english(t: Text) -> bool:
    """Less than six words in plain letters are too few to tell and count as English."""
    return t.main_language == "en" or (len(t.words) < 6 and t.letters.isascii())


@checker("change_case:english_capital")
def english_capital(t):
    return t.s.isupper() and is_english(t)


@checker("change_case:english_lowercase")
def english_lowercase(t):
    return t.s.islower() and is_english(t)


@checker("change_case:capital_word_frequency")
def capital_word_frequency(t, capital_frequency, capital_relation):
    """I and A, always capital, do not count: a word in capitals has two letters."""
    tokens = re.split(r"[\s—–…]+", CJK.sub(" ", t.s))
    count = sum(token.isupper() and sum(map(str.isalpha, token)) > 1 for token in tokens)
    return compare(count, capital_relation, capital_frequency)


@checker("punctuation:no_comma")
def no_comma(t):
    return commas(t) == 0


# ---------------------------------------------------------------- types of our own


@checker("length:characters")
def characters(t, number, relation):
    return compare(len("".join(t.s.split())), relation, number)


@checker("length:chinese_characters")
def chinese_characters(t, number, relation):
    return compare(len(re.findall(f"[{HAN}]", t.s)), relation, number)


@checker("length:lines")
def number_lines(t, number, relation):
    return compare(len(t.lines), relation, number)


@checker("length:paragraphs")
def paragraphs(t, number, relation):
    return compare(len(t.paragraphs), relation, number)


@checker("length:unique_words")
def unique_words(t, number, relation):
    return compare(len({word.casefold() for word in t.words}), relation, number)


def none_above(counts: list[int], most: int) -> bool:
    """Is there a part, and none that counts more than `most`?"""
    return 0 < max(counts, default=0) <= most


@checker("length:words_per_sentence")
def words_per_sentence(t, most):
    return none_above([word_count(sentence) for sentence in t.sentences], most)


@checker("length:words_per_paragraph")
def words_per_paragraph(t, most):
    return none_above([word_count(paragraph) for paragraph in t.paragraphs], most)


@checker("length:words_per_item")
def words_per_item(t, most):
    return none_above([word_count(item) for item in t.items], most)


@checker("length:sentences_per_paragraph")
def sentences_per_paragraph(t, most):
    return none_above([len(text_of(paragraph).sentences) for paragraph in t.paragraphs], most)


@checker("content:numbers")
def numbers(t, number, relation):
    return compare(len(re.findall(r"\d+(?:[.,]\d+)*", t.s)), relation, number)


@checker("content:iso_dates")
def iso_dates(t, number, relation):
    """Dates that exist, alone or before a time of day."""
    count = 0
    for year, month, day in re.findall(r"(?<![\w-])(\d{4})-(\d\d)-(\d\d)(?=T\d|[^\w-]|\Z)", t.s, re.ASCII):
        with suppress(ValueError):  # 30 February
            date(int(year), int(month), int(day))
            count += 1
    return compare(count, relation, number)


@checker("content:no_digits")
def no_digits(t):
    return not any(unicodedata.category(c) in ("Nd", "No") for c in t.s)  # No: ½ and ①


def asks(sentence: str) -> bool:
    return re.search(r"[?？][!！?？]*\Z", sentence.rstrip(EDGE_MARKS + ")）")) is not None


@checker("content:questions")
def questions(t, number, relation):
    return compare(sum(map(asks, t.sentences)), relation, number)


@checker("content:questions_only")
def questions_only(t):
    return t.sentences != [] and all(map(asks, t.sentences))


@checker("content:no_questions")
def no_questions(t):
    return not re.search("[?？]", t.s)


@checker("content:unique_sentence_starts")
def unique_sentence_starts(t):
    starts = [text_of(sentence).words[0].casefold() for sentence in t.sentences]
    return len(starts) == len(set(starts)) > 0


@checker("content:acrostic")
def acrostic(t, word):
    words_of_lines = filter(None, (text_of(line).words for line in t.lines))
    return [words[0][0].casefold() for words in words_of_lines] == list("".join(word.split()).casefold())


@checker("keywords:order")
def order(t, first, second):
    """The second word somewhere after the first one, which two of the three wordings ask for; either may come again."""
    earliest = keyword_pattern(first).search(t.plain)
    return earliest is not None and keyword_pattern(second).search(t.plain, earliest.end()) is not None


@checker("keywords:proximity")
def proximity(t, first, second, distance):
    """Somewhere an occurrence of one is followed by one of the other with at most so many words between them."""
    places = [(m.start(), m.end(), word) for word in (first, second) for m in keyword_pattern(word).finditer(t.plain)]
    for (_, end, one), (start, _, other) in pairwise(sorted(places)):
        if one != other and word_count(t.plain[end:start]) <= distance:
            return True
    return False


@checker("keywords:in_sentence")
def in_sentence(t, keyword, nth):
    return 0 < nth <= len(t.sentences) and occurrences(text_of(t.sentences[nth - 1]), keyword) > 0


@checker("keywords:any_of")
def any_of(t, keywords):
    return missing_keywords(t, keywords) < len(keywords)


@checker("keywords:first_word")
def first_word(t, word):
    return opens_with(t.s, word)


@checker("keywords:last_word")
def last_word(t, word):
    ends = [match.end() for match in keyword_pattern(word).finditer(t.plain)]
    return ends != [] and WORD.search(t.plain, ends[-1]) is None


@checker("keywords:forbidden_letter")
def forbidden_letter(t, letter):
    return letter.casefold() not in t.s.casefold()


@checker("language:paragraphs")
def language_paragraphs(t, languages):
    if len(t.paragraphs) != len(languages):
        return False
    return all(speaks(text_of(part), code) for part, code in zip(t.paragraphs, languages, strict=True))


@checker("punctuation:no_exclamation")
def no_exclamation(t):
    return not re.search("[!！]", t.s)


@checker("punctuation:width")
def width(t, style):
    """Marks of one width only. Half-width ones inside a number, a word or an address and after a list number pass."""
    full = re.search("[，。！？；：、（）“”‘’【】《》「」『』〈〉〔〕～]|——|……", t.s) is not None
    if style == "half":
        return not full
    list_number, number = r"(?m:^)[ \t]*\d+[.)](?=\s)", r"\d+(?:[.,:]\d+)+"
    address = r"[a-z0-9]+(?:[.'@:/-]+[a-z0-9]+)+"
    prose = re.sub(rf"{list_number}|(?<![a-z0-9])(?:{number}|{address})", "", t.lower)
    return full and not re.search("[,.!?;:()\"']", prose)


def unfenced(s: str) -> str:
    """The inside of an answer that is one code block, else the answer."""
    s = s.strip()
    if s.startswith("```") and s.endswith("```") and "\n" in s:
        s = s.partition("\n")[2].removesuffix("```")
    return s.strip()


@checker("format:numbered_list")
def numbered_list(t, number, relation):
    """A list that counts 1, 2, 3 and so on; lists within its items are free, and so is a second one like it."""
    marks = list(filter(None, map(NUMBERED.match, t.prose_lines)))
    indents = [len(mark.string) - len(mark.string.lstrip()) for mark in marks]
    outermost, lengths = min(indents, default=0), []
    for mark, indent in zip(marks, indents, strict=True):
        n = int(mark[1])
        if indent > outermost + 1:
            continue
        if n == 1:
            lengths.append(1)
        elif lengths and n == lengths[-1] + 1:
            lengths[-1] = n
        else:
            return False
    return any(compare(length, relation, number) for length in lengths)


@checker("format:checklist")
def checklist(t, number, relation):
    boxes = len(re.findall(r"(?m)^[ \t]*[-*+] \[[ xX]\] +\S", "\n".join(t.prose_lines)))
    return boxes > 0 and compare(boxes, relation, number)


@checker("format:headings")
def headings(t, number, level):
    marks = filter(None, map(HEADING.match, t.prose_lines))
    return sum(len(mark[1]) == level for mark in marks) == number


@checker("format:table")
def table(t, columns, rows):
    """The first Markdown table: header, line of dashes, `rows` lines, all with `columns` cells."""
    lines = [line.strip() for line in t.prose_lines]
    cells = []
    for line in lines:
        inside = line.replace("\\|", "").removeprefix("|").removesuffix("|")
        cells.append(inside.count("|") + 1 if "|" in line else 0)
    for i in range(1, len(lines)):
        if cells[i] > 0 and cells[i] == cells[i - 1] and "-" in lines[i] and not lines[i].strip("|:- \t"):
            body = list(takewhile(bool, cells[i + 1:]))
            return cells[i] == columns and body == [columns] * rows
    return False


@checker("format:code_block")
def code_block(t, tag):
    """A closed block with this tag and something in it; text around it is allowed, as two of three wordings have it."""
    _, blocks, left_open = t.fenced
    return not left_open and any(name.casefold() == tag.casefold() and code.strip() for name, code in blocks)


@checker("format:json_keys")
def json_keys(t, keys):
    value = load_json(unfenced(t.s))
    return isinstance(value, dict) and set(value) == set(keys)


@checker("format:xml")
def xml(t):
    """Well-formed, without a document type: no entities, nothing to expand; no tree, so depth costs nothing."""

    def refuse(*_):
        raise ValueError("document type")

    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(unfenced(t.s), True)
    except (expat.ExpatError, ValueError):  # ValueError: also lone surrogates, which cannot be encoded
        return False
    return True


VOID_TAGS = frozenset("area base br col embed hr img input link meta source track wbr".split())


@checker("format:html_balanced")
def html_balanced(t):
    """Tags that nest, none cut off, and an element with text in it; other text may stand between the elements."""
    open_tags, filled_element = [], False
    for slash, name, attributes, text in re.findall(r"<(/?)([A-Za-z][\w-]*+)([^<>]*)>([^<]*)", t.s):
        if slash and name.lower() not in VOID_TAGS:
            if not open_tags or open_tags.pop() != name.lower():
                return False
        elif name.lower() not in VOID_TAGS and not attributes.endswith("/"):
            open_tags.append(name.lower())
        filled_element |= open_tags != [] and WORD.search(text) is not None
    cut_off = re.search(r"<(?=[A-Za-z/])[^<>]*+(?:<|\Z)", t.s)
    return filled_element and open_tags == [] and cut_off is None


LATEX_TOKEN = re.compile(r"(?s)\\(?:begin|end)\{\w+\*?\}|\\(?:left|right)(?![a-zA-Z])|\\[a-zA-Z]+|\\.|[{}]|\$\$?")
LATEX_CLOSES = {"}": "{", r"\right": r"\left", r"\)": r"\(", r"\]": r"\[", "$": "$", "$$": "$$"}


@checker("format:latex_balanced")
def latex_balanced(t):
    r"""Groups, environments and math that nest, and a sign of LaTeX: an environment, a command with a group, or math.

    Dollars are math only if no space stands inside them and no digit follows, as in Pandoc: "$5 and $6" is money.
    """
    groups = []
    for token in LATEX_TOKEN.findall(t.s):
        opening = LATEX_CLOSES.get(token, token.replace(r"\end{", r"\begin{"))
        if groups and groups[-1] == opening and (opening != token or "$" in token):
            groups.pop()
        elif opening in (token, "$", "$$"):
            if token in LATEX_CLOSES.values() or token.startswith(r"\begin{"):
                groups.append(token)
        else:
            return False
    source = t.s.replace(r"\$", "")
    without_math = re.sub(r"\$\$[^$]+\$\$|\$(?=[^\s$])[^$]*(?<!\s)\$(?!\d)", "", source)
    signs = without_math != source or re.search(r"\\begin\{|\\[a-zA-Z]+\{|\\\(|\\\[", source) is not None
    return groups == [] and signs and "$" not in without_math


@checker("format:csv")
def csv_rows(t, columns):
    """A header and at least one row, all of so many fields; a header names its columns, so it is no sentence."""
    try:
        rows = list(filter(None, csv.reader(unfenced(t.s).splitlines(), strict=True)))
    except csv.Error:
        return False
    if len(rows) < 2 or any(len(row) != columns for row in rows):
        return False
    return all(name.strip() and not name.rstrip().endswith((".", "!", "?", "。", "！", "？")) for name in rows[0])


@checker("format:key_values")
def key_values(t, keys):
    """One line `key: value` for each key, in this order, each with a value, and nothing else."""
    pairs = [re.split("[:：]", line, maxsplit=1) for line in t.lines]
    if any(len(pair) < 2 or not WORD.search(pair[1]) for pair in pairs):
        return False
    return [key.strip(EDGE_MARKS + "-").casefold() for key, _ in pairs] == [key.strip().casefold() for key in keys]


def sort_key(item: str) -> bytes:
    """Alphabetical without accents; Chinese by GB 18030, where the 3,755 commonest characters stand by pinyin.

    Rarer characters come after all of those, and one with several readings has the place of its first.
    """
    letters = unicodedata.normalize("NFKD", item.strip(EDGE_MARKS).casefold())
    return "".join(c for c in letters if not unicodedata.combining(c)).encode("gb18030", "replace")


@checker("format:sorted_items")
def sorted_items(t):
    keys = list(map(sort_key, t.items))
    return len(keys) > 1 and keys == sorted(keys)


# ---------------------------------------------------------------- single slips, for a measure finer than the verdict

SLIPS: dict[str, Callable[..., int]] = {}  # id -> how often an answer slips; any other broken constraint is one slip


@checker("punctuation:no_comma", SLIPS)
def commas(t):
    return len(re.findall("[,，﹐،]", t.s))


@checker("keywords:existence", SLIPS)
def missing_keywords(t, keywords):
    return sum(occurrences(t, word) == 0 for word in keywords)


@checker("keywords:forbidden_words", SLIPS)
def forbidden_occurrences(t, forbidden_words):
    return sum(occurrences(t, word) for word in forbidden_words)


@checker("change_case:english_lowercase", SLIPS)
def words_not_lowercase(t):
    return sum(word != word.lower() for word in t.s.split())


@checker("change_case:english_capital", SLIPS)
def words_not_capital(t):
    return sum(word != word.upper() for word in t.s.split())


# ---------------------------------------------------------------- arguments, check, check_loose


def is_count(value) -> bool:
    return type(value) in (int, float) and value >= 0 and value == value // 1  # IFEval writes 2.0


def is_letter(value) -> bool:
    return filled(value) and len(value) == 1


def is_words(value) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0 and all(map(filled, value))


@lru_cache(maxsize=1)
def language_codes() -> frozenset[str]:
    from langdetect.detector_factory import PROFILES_DIRECTORY

    return frozenset({"zh", *os.listdir(PROFILES_DIRECTORY)})


def is_language(value) -> bool:
    return isinstance(value, str) and value.lower() in language_codes()


def is_languages(value) -> bool:
    return is_words(value) and all(map(is_language, value))


def one_of(*values):
    return lambda value: value in values


TYPES: dict[str, tuple[str, Callable]] = {  # type of an argument -> (what it must be, its test)
    "count": ("a whole number from 0", is_count),
    "text": ("a text", filled),
    "prompt": ("the text to repeat", filled),
    "letter": ("one character", is_letter),
    "words": ("a list of words", is_words),
    "language": ('a language code such as "en" or "zh-cn"', is_language),
    "languages": ("a list of language codes", is_languages),
    "relation": ('"at least" or "less than"', one_of("at least", "less than")),
    "limit": ('"at least", "less than", "at most" or "exactly"', one_of(*RELATIONS)),
    "style": ('"full" or "half"', one_of("full", "half")),
}


@lru_cache(maxsize=1)
def phrases() -> dict:
    """data/phrases.json: words of empty thoughts and of English, words to draw, names of languages and values."""
    return json.loads((DATA / "phrases.json").read_text(encoding="utf-8"))


@lru_cache(maxsize=1)
def constraint_rows() -> dict[str, dict]:
    """data/constraints.jsonl by id."""
    rows = {}
    for number, row in json_lines(DATA / "constraints.jsonl"):
        try:
            check_row(row)
        except InputError as error:
            raise InputError(f"data/constraints.jsonl:{number}: {row.get('id')}: {error}") from None
        rows[row["id"]] = row
    return rows


def check_row(row: dict) -> None:
    """Raise InputError for a constraint type's row that the functions below could not work with."""
    for name in ("id", "arguments", "tags", "avoids", "wordings", "example"):
        if name not in row:
            raise InputError(f"field {name!r} is missing; see the head of the constraint library")
    for name, spec in row["arguments"].items():
        if spec[0] not in TYPES:
            raise InputError(f"argument {name!r} is {spec!r}; write [type, ...], type one of {', '.join(TYPES)}")
    for language in ("en", "zh"):
        wordings = row["wordings"].get(language, [])
        slots = set(re.findall(r"\{(\w+)", " ".join(wordings)))
        if not wordings or not slots <= row["arguments"].keys():
            raise InputError(f"wordings in {language!r} are missing, or have a slot that is no argument")


def checked_arguments(constraint_id, kwargs) -> dict:
    """The arguments without nulls. ValueError: unknown id; missing, unknown or wrong arguments."""
    if not isinstance(constraint_id, str) or constraint_id not in CHECKS:
        raise ValueError(f"unknown constraint id {constraint_id!r}")
    if not isinstance(kwargs, dict | None):
        raise ValueError(f"{constraint_id}: kwargs are not an object")
    arguments = {name: value for name, value in (kwargs or {}).items() if value is not None}
    wanted = constraint_rows()[constraint_id]["arguments"]
    for name, (kind, *_) in wanted.items():
        expected, accepts = TYPES[kind]
        if name not in arguments:
            raise ValueError(f"{constraint_id}: argument {name!r} is missing; it is {expected}")
        if not accepts(arguments[name]):
            raise ValueError(f"{constraint_id}: argument {name!r} is {arguments[name]!r} but must be {expected}")
        if kind == "count":
            arguments[name] = int(arguments[name])
    for name in arguments:
        if name not in wanted:
            raise ValueError(f"{constraint_id}: takes no argument {name!r}")
    return arguments


def check(constraint_id: str, kwargs: dict, response: str, *, prompt: str = "", mode: str = "unicode") -> bool:
    """Does `response` (the answer without tags) satisfy the constraint? A blank one never does.

    mode "compat" is IFEval's own verdict, "unicode" the same meaning for every script (see the head of the file).
    ValueError for an unknown id or mode and for missing or wrong arguments (null is missing): none is ever drawn.
    `prompt` is there for types that compare with the instruction; none of the present ones does.
    """
    if mode not in ("compat", "unicode"):
        raise ValueError(f"unknown mode {mode!r}; use 'compat' or 'unicode'")
    arguments = checked_arguments(constraint_id, kwargs)
    if not response.strip():
        return False
    if mode == "compat" and constraint_id in COMPAT:
        return bool(COMPAT[constraint_id](text_of(response), **arguments))
    return len(response) <= MAX_CHARS and bool(CHECKS[constraint_id](text_of(response), **arguments))


def check_loose(constraint_id: str, kwargs: dict, response: str, *, prompt: str = "", mode: str = "unicode") -> bool:
    """IFEval's loose verdict: one of eight variants passes (first, last, both lines dropped; all also without *)."""
    lines = response.split("\n")
    cuts = [response, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    variants = dict.fromkeys([*cuts, *(cut.replace("*", "") for cut in cuts)])  # the response itself comes first
    return any(check(constraint_id, kwargs, variant, prompt=prompt, mode=mode) for variant in variants)


# ---------------------------------------------------------------- random constraints and their wordings


def draw(rng: random.Random, language: str, words, kind: str, *choices):
    """One argument of type `kind`. `choices` stand in data/constraints.jsonl: a range, values, or values per language.

    `words` is a stream of different words, so that two words of one constraint are never the same.
    """
    if kind == "count":
        return rng.randint(*choices)
    if kind == "letter":
        return rng.choice("abcdefghiklmnoprstuvwy")
    if choices and isinstance(choices[0], dict):
        return rng.choice(choices[0][language])
    if kind == "words":
        return [next(words) for _ in range(rng.randint(*choices))]
    if kind == "text":
        return next(words)
    return rng.choice(choices)


@dataclass(frozen=True)
class Constraint:
    """One type of constraint, as an instruction asks for it."""

    id: str
    arguments: dict[str, list]  # name -> [type, what it is drawn from ...]
    languages: list[str]  # of the requests that it suits
    ood: bool  # held out: never drawn for training
    conflicts: frozenset[str]  # ids never combined with this one, itself included
    wordings: dict[str, list[str]]
    example: dict

    def check(self, kwargs: dict, response: str, **options) -> bool:
        return check(self.id, kwargs, response, **options)

    def sample(self, rng: random.Random, language: str, prompt: str = "") -> dict | None:
        """Random arguments for a request in "en" or "zh"; None if the type does not suit it.

        `prompt` is the request itself, for a type that quotes it.
        """
        kinds = [spec[0] for spec in self.arguments.values()]
        if language not in self.languages or ("prompt" in kinds and not prompt.strip()):
            return None
        bank = phrases()["words"][language]
        words, drawn = iter(rng.sample(bank, len(bank))), {}
        for name, spec in self.arguments.items():
            if spec[0] == "prompt":
                drawn[name] = prompt
            else:
                drawn[name] = draw(rng, language, words, *spec)
        return drawn


def load_constraints() -> dict[str, Constraint]:
    rows = constraint_rows()
    if unmatched := rows.keys() ^ CHECKS.keys():
        raise RuntimeError(f"{min(unmatched)} needs both a checker in rewards.py and a row in data/constraints.jsonl")
    tags = {i: {i.partition(":")[2], *row["tags"]} for i, row in rows.items()}
    constraints = {}
    for i, row in rows.items():
        conflicts = frozenset(
            j for j, other in rows.items() if tags[i] & {*tags[j], *other["avoids"]} or tags[j] & {*row["avoids"]})
        constraints[i] = Constraint(i, row["arguments"], row.get("languages", ["en", "zh"]), row.get("ood", False),
                                    conflicts, row["wordings"], row["example"])
    return constraints


CONSTRAINTS: dict[str, Constraint] = load_constraints()


def compatible(ids) -> bool:
    """Can these constraint ids be asked for together? (No id twice, no pair in conflict.)"""
    return not any(b in CONSTRAINTS[a].conflicts for a, b in combinations(ids, 2))


def join_words(words: list[str], language: str) -> str:
    """["a", "b", "c"] -> "a, b, and c"; Chinese a、b和c."""
    comma, last = ", ", " and "
    if len(words) > 2:
        last = ", and "
    if language == "zh":
        comma, last = "、", "和"
    return last.join(filter(None, [comma.join(words[:-1]), words[-1]]))


def shown(value, kind: str, language: str) -> str:
    """An argument of type `kind` as it stands in a sentence."""
    names = phrases()["languages"]
    if kind == "language":
        return names.get(value, {language: value})[language]
    if kind == "languages":
        return join_words([shown(code, "language", language) for code in value], language)
    if kind == "words":
        opening, closing = phrases()["quotation_marks"][language]
        return join_words([opening + word + closing for word in value], language)
    if language == "zh" and kind in ("relation", "limit", "style"):
        return phrases()["values_zh"][value]
    return str(value)


def render(constraint_id: str, kwargs: dict, language: str, variant: int) -> str:
    """The constraint as a sentence for the user's instruction: wording number `variant`, in "en" or "zh"."""
    constraint, arguments = CONSTRAINTS[constraint_id], checked_arguments(constraint_id, kwargs)

    def fill(slot):
        name, singular, plural = slot.groups()
        if plural is None:
            return shown(arguments[name], constraint.arguments[name][0], language)
        return singular if arguments[name] == 1 else plural

    wordings = constraint.wordings[language]
    return re.sub(r"\{(\w+)(?::([^|{}]*)\|([^{}]*))?\}", fill, wordings[variant % len(wordings)])
