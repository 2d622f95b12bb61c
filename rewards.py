"""Rewards: constraint checkers, answer parsing, the math check, judges and the rule-centric reward of RAIF.

    from rewards import check, score
    check("length_constraints:number_words", {"num_words": 40, "relation": "at least"}, answer)    # -> bool
    score(records, completions, judge=None)                                                       # -> list[Score]

`mode="compat"` is IFEval exactly as its authors score it (their quirks included), for the benchmark.
`mode="unicode"` asks for the same things but counts by script (a Chinese character is a word, 。！？ end sentences), is
not fooled by Markdown, and answers "no" to what it cannot judge. It is the default and what training uses.

Reward (paper section 3.3):  R = R_format (+1 / -1) + R_accuracy (+2 all constraints, k/C some, -2 none or invalid).
Nothing in a text or a record is ever executed or unpickled, and every checker takes time linear in the text.
"""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import sys
import threading
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

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


def validate_record(record) -> None:
    """Raise InputError `field 'X': what is wrong; remedy` for a record that is not of the form in the README."""

    def need(ok, name, wrong, remedy):
        if not ok:
            raise InputError(f"field {name!r}: {wrong}; {remedy}")

    need(isinstance(record, dict), "", "the line is not a JSON object", "write {...}")
    need(filled(record.get("id")), "id", "missing or not a text", "give every record a unique id")
    need(record.get("task") in ("instruction", "math"), "task", f"{record.get('task')!r} is not a task",
         'use "instruction" or "math"')
    language, expert = record.get("language", "en"), record.get("expert")
    need(language in ("en", "zh"), "language", f"{language!r} is unknown", 'use "en" or "zh"')
    messages = record.get("messages")
    need(isinstance(messages, list) and messages, "messages", "missing or empty", "write a list with a user message")
    for i, message in enumerate(messages):
        ok = isinstance(message, dict) and message.get("role") in ("system", "user", "assistant")
        need(ok and filled(message.get("content")), f"messages[{i}]", "has no role or no content",
             'write {"role": "user", "content": "..."}')
    need(record.get("composition", "and") in ("and", "chain", "selection", "nested"), "composition",
         f"{record.get('composition')!r} is unknown", "use and, chain, selection or nested")
    need(expert is None or filled(expert), "expert", "is not a text", "remove it or give the answer")
    if record["task"] == "math":
        need(filled(record.get("answer")), "answer", "missing or not a text", 'give the result as a text, e.g. "42"')
        return
    constraints = record.get("constraints")
    need(isinstance(constraints, list) and constraints, "constraints", "missing or empty", "give at least one")
    for i, c in enumerate(constraints):
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
                _arguments(c.get("id"), c["kwargs"])
            except ValueError as error:
                field = "kwargs" if c.get("id") in [*CHECKS] else "id"  # a list: the id may be unhashable
                raise InputError(f"field '{name}.{field}': {error}; see data/constraints.jsonl for the kinds") from None
        depends = c.setdefault("depends_on", [])
        need(isinstance(depends, list) and all(type(j) is int and 0 <= j < i for j in depends), f"{name}.depends_on",
             f"{depends!r} is not a list of earlier positions", f"use numbers from 0 to {i - 1}" if i else "use []")
        need(type(c.setdefault("active", True)) is bool, f"{name}.active", "is not true or false", "use true or false")
    need(any(c["active"] for c in constraints), "constraints", "none is active", "leave at least one active")


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
    think = head.partition("<think>")[2] if "<think>" in head else (head if closed else "")
    if not closed:  # no thought at all, or one that never ended
        head, opened, think = text.partition("<think>")
        rest = head if opened else text
    answer = rest
    if family == "cold":
        if "<answer>" in rest:
            answer = rest.partition("<answer>")[2]
        answer = answer.partition("</answer>")[0] if "</answer>" in answer else answer
    if any(tag in text for tag in tags):  # a turn without any tag is the answer itself, left exactly as it is
        for tag in tags:
            think, answer = think.replace(tag, ""), answer.replace(tag, "")
        think, answer = think.strip(), answer.strip()
    return Parsed(think, answer, format_ok)


def is_placeholder(thought: str) -> bool:
    """True for a thought without content: blank, only punctuation ("..."), or a slot such as "your thoughts here"."""
    words = " ".join(re.findall(r"[^\W_]+", thought.lower()))
    slot = r"((insert|write|put) )?((your|my) )?(thoughts?|thinking|reasoning)( process)?( (goes )?here)?"
    return re.fullmatch(slot, words) is not None or words == "" or words in _phrases()["empty_thoughts"]


# ---------------------------------------------------------------------------------------------------------------------
# 3. One text, split once

HAN = "\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
KANA = "\u3041-\u3096\u30a1-\u30fa\u30fc-\u30fe\uff66-\uff9f"
CJK = re.compile(f"[{HAN}{KANA}]")
# vowel signs and other marks belong to their word (Hindi, Thai, accents written apart), which \w alone would cut
MARKS = "".join(chr(c) for c in range(0x300, 0x2000) if unicodedata.category(chr(c))[0] == "M") + "\u200c\u200d"
WORD = re.compile(f"[^\\W_][\\w{MARKS}]*")
CJK_STOP = re.compile(f"((?:[。！？｡؟۔।॥]|(?<=[{HAN}{KANA}])[.!?])+[!?.。！？…]*[”’」』》）)\"'\\]]*)")
RULE_LINE = re.compile(r"[ \t]*(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$")
BULLET = re.compile(r"[ \t]*(?:[*+-][ \t]+|[•●▪◦·][ \t]*)(?=\S)")
NUMBERED = re.compile(rf"[ \t]*(\d{{1,4}})(?:[.)](?:[ \t]+|(?=[{HAN}]))|[、．）][ \t]*)(?=\S)")
HEADING = re.compile(r" {0,3}(#{1,6})[ \t]+(?=\S)")
FENCE = re.compile(r"[ \t]*(```|~~~)")


@lru_cache(maxsize=1)
def _punkt():
    from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer

    def rows(name):
        return (DATA / "punkt" / "english" / name).read_text(encoding="utf-8").splitlines()

    params = PunktParameters()
    params.abbrev_types, params.sent_starters = set(rows("abbrev_types.txt")), set(rows("sent_starters.txt"))
    params.collocations = {tuple(row.split("\t")) for row in rows("collocations.tab")}
    orthography = (row.split("\t") for row in rows("ortho_context.tab"))
    params.ortho_context = defaultdict(int, {word: int(flags) for word, flags in orthography})
    tokenizer = PunktSentenceTokenizer()
    tokenizer._params = params
    return tokenizer


@lru_cache(maxsize=1)
def _detectors():
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

    detector = _detectors().create()
    detector.append(text)
    try:
        return detector.detect()
    except LangDetectException:
        return None


class Text:
    """An answer and its splits, each made at most once and shared by all constraints of the answer (see `text_of`)."""

    def __init__(self, s: str):
        self.s = s

    # the official splits

    @cached_property
    def lower(self) -> str:
        return self.s.lower()

    @cached_property
    def word_runs(self) -> int:
        return len(re.findall(r"\w+", self.s))

    @cached_property
    def punkt_sentences(self) -> list[str]:
        return _punkt().tokenize(self.s)

    @cached_property
    def nltk_tokens(self) -> list[str]:
        from nltk.tokenize import NLTKWordTokenizer

        return [token for sentence in self.punkt_sentences for token in NLTKWordTokenizer().tokenize(sentence)]

    @cached_property
    def language(self) -> str | None:
        return detect_language(self.s)

    # the splits by script

    @cached_property
    def words(self) -> list[str]:
        """Each Chinese or Japanese character is a word; elsewhere runs of letters, digits and their marks are."""
        return WORD.findall(CJK.sub(r" \g<0> ", self.s))

    @cached_property
    def lines(self) -> list[str]:
        return [line for line in self.s.splitlines() if line.strip()]

    @cached_property
    def prose_lines(self) -> list[str]:
        """All lines outside code fences, blank ones included."""
        kept, fence = [], None
        for line in self.s.splitlines():
            mark = FENCE.match(line)
            if mark and fence in (None, mark[1]):
                fence = mark[1] if fence is None else None
            elif fence is None:
                kept.append(line)
        return kept

    @cached_property
    def bullets(self) -> list[str]:
        return [line[m.end():] for line in self.prose_lines if (m := BULLET.match(line)) and not RULE_LINE.match(line)]

    @cached_property
    def paragraphs(self) -> list[str]:
        """Parts between blank lines."""
        return [part.strip() for part in re.split(r"\n[^\S\n]*\n", self.s) if part.strip()]

    @cached_property
    def sentences(self) -> list[str]:
        """Sentences by script. A list item, a heading and a blank line end a sentence; markers are not part of it."""
        blocks, block = [], []
        for line in [*self.prose_lines, ""]:
            mark = BULLET.match(line) or NUMBERED.match(line) or HEADING.match(line)
            if mark or not line.strip() or RULE_LINE.match(line):
                blocks.append("\n".join(block))
                block = [line[mark.end():]] if mark else []
                if mark and HEADING.match(line):
                    blocks.append(block.pop())
            else:
                block.append(line)
        pieces = []
        for block in blocks:
            parts = CJK_STOP.split(block)  # text, stop, text, stop, ..., text
            pieces += [text + stop for text, stop in zip(parts[::2], [*parts[1::2], ""], strict=True)]
        if len(self.s) > MAX_CHARS // 2:  # Punkt takes 40 us a sentence; nobody counts sentences in a text that long
            sentences = [s for piece in pieces for s in re.split(r"(?<=[.!?])\s+", piece)]
        else:
            sentences = [s for piece in pieces if piece.strip() for s in _punkt().tokenize(piece)]
        return [s.strip() for s in sentences if WORD.search(s)]

    @cached_property
    def letters(self) -> str:
        return "".join(c for c in self.s if c.isalpha())

    @cached_property
    def script(self) -> str:
        """The language for training: "zh" where Chinese characters outweigh other words, else langdetect's code."""
        han, kana = len(re.findall(f"[{HAN}]", self.s)), len(re.findall(f"[{KANA}]", self.s))
        if han + kana and han + kana >= len(self.words) - han - kana:
            return "ja" if kana * 10 > han else "zh"
        return (detect_language(self.lower) or "") if self.letters else ""


@lru_cache(maxsize=256)
def text_of(s: str) -> Text:
    return Text(s)


# ---------------------------------------------------------------------------------------------------------------------
# 4. Checkers


def _relation(count: int, relation: str, n: int) -> bool:
    return {"less than": count < n, "at least": count >= n, "at most": count <= n, "exactly": count == n}[relation]


def _is_json(s: str, tags=("```json", "```Json", "```JSON", "```"), strict: bool = False) -> bool:
    s = s.strip()
    for tag in tags:
        s = s.removeprefix(tag)
    return _loads(s.removesuffix("```").strip(), strict) is not None


def _loads(s: str, strict: bool):
    """The parsed JSON wrapped in a tuple, or None. strict: an object or a list, and no NaN or Infinity."""

    def refuse(name):
        raise ValueError(name)

    try:
        value = json.loads(s, parse_constant=refuse if strict else None)
    except (ValueError, RecursionError):  # RecursionError: nested thousands deep
        return None
    return (value,) if not strict or isinstance(value, dict | list) else None


def _spans(s: str, opening: str, closing: str) -> list[str]:
    """What stands between `opening` and the next `closing` on the same line (a lazy regular expression, but linear)."""
    found = []
    for line in s.split("\n"):
        start = line.find(opening)
        while start >= 0 and (end := line.find(closing, start + len(opening))) >= 0:
            found.append(line[start + len(opening): end])
            start = line.find(opening, end + len(closing))
    return found


def _has_title(s: str) -> bool:
    for line in s.split("\n"):
        start, end = line.find("<<"), line.rfind(">>")
        if start >= 0 and end >= start + 3 and line[start:end + 2].lstrip("<").rstrip(">").strip():
            return True
    return False


def _divided(s: str, pattern: str) -> list[str] | None:
    """Parts between dividers, blank first and last ones dropped; None if a blank part stands in the middle."""
    parts = re.split(pattern, s)
    parts = parts[(not parts[0].strip()):]
    if parts and not parts[-1].strip():
        parts.pop()
    return parts if all(part.strip() for part in parts) else None


def _two_responses(s: str) -> bool:
    parts = _divided(s, r"\*\*\*\*\*\*")
    return parts is not None and len(parts) == 2 and parts[0].strip() != parts[1].strip()


def _find(pattern: str, s: str) -> int:
    return len(re.findall(pattern, s, re.IGNORECASE))


def _regex(argument: str) -> str:
    """IFEval takes words as regular expressions; one that is none is taken literally."""
    try:
        re.compile(argument)
    except re.error:
        return re.escape(argument)
    return argument


def _highlights(s: str) -> int:
    single, double = re.findall(r"\*[^\n\*]*\*", s), re.findall(r"\*\*([^\n\*]*)\*\*", s)
    return sum(bool(m.strip("*").strip()) for m in single) + sum(bool(m.strip()) for m in double)


def _nth_first_word(s: str, k: dict) -> bool:
    paragraphs = re.split(r"\n\n", s)
    count = sum(bool(p.strip()) for p in paragraphs)
    if not 0 < k["nth_paragraph"] <= count or not (paragraph := paragraphs[k["nth_paragraph"] - 1].strip()):
        return False
    word = re.split(r"[.,?!'\"]", paragraph.split()[0].lstrip("'").lstrip('"'), maxsplit=1)[0]
    return count == k["num_paragraphs"] and word.lower() == k["first_word"].lower()


def _postscript(s: str, marker: str) -> bool:
    pattern = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}.get(marker)
    return _find(pattern or _regex(marker.lower()), s) > 0


# IFEval as its authors score it: id -> verdict of (text, kwargs). Compared with official verdicts in tests/.
COMPAT: dict[str, Callable[[Text, dict], bool]] = {
    "keywords:existence": lambda t, k: all(_find(_regex(w), t.s) for w in k["keywords"]),
    "keywords:frequency": lambda t, k: _relation(
        _find(_regex(k["keyword"].strip()), t.s), k["relation"], k["frequency"]),
    "keywords:forbidden_words": lambda t, k: not any(_find(rf"\b{_regex(w)}\b", t.s) for w in k["forbidden_words"]),
    "keywords:letter_frequency": lambda t, k: _relation(
        t.lower.count(k["letter"].lower()), k["let_relation"], k["let_frequency"]),
    "language:response_language": lambda t, k: t.language in (k["language"], None),
    "length_constraints:number_sentences": lambda t, k: _relation(
        len(t.punkt_sentences), k["relation"], k["num_sentences"]),
    "length_constraints:number_paragraphs": lambda t, k: (
        parts := _divided(t.s, r"\s?\*\*\*\s?")) is not None and len(parts) == k["num_paragraphs"],
    "length_constraints:number_words": lambda t, k: _relation(t.word_runs, k["relation"], k["num_words"]),
    "length_constraints:nth_paragraph_first_word": lambda t, k: _nth_first_word(t.s, k),
    "detectable_content:number_placeholders": lambda t, k: len(_spans(t.s, "[", "]")) >= k["num_placeholders"],
    "detectable_content:postscript": lambda t, k: _postscript(t.lower, k["postscript_marker"].strip()),
    # a lone "*" swallows the line after it, as officially; [^\S\n] instead of \s keeps a page of blank lines linear
    "detectable_format:number_bullet_lists": lambda t, k: len(re.findall(r"(?m)^[^\S\n]*\*[^\*].*$", t.s)) + len(
        re.findall(r"(?m)^[^\S\n]*-", t.s)) == k["num_bullets"],
    "detectable_format:constrained_response": lambda t, k: re.search(r"My answer is (yes|no|maybe)\.", t.s) is not None,
    "detectable_format:number_highlighted_sections": lambda t, k: _highlights(t.s) >= k["num_highlights"],
    "detectable_format:multiple_sections": lambda t, k: len(
        re.findall(rf"{_regex(k['section_spliter'].strip())}\s?\d", t.s)) >= k["num_sections"],
    "detectable_format:json_format": lambda t, k: _is_json(t.s),
    "detectable_format:title": lambda t, k: _has_title(t.s),
    "combination:two_responses": lambda t, k: _two_responses(t.s),
    "combination:repeat_prompt": lambda t, k: t.s.strip().lower().startswith(k["prompt_to_repeat"].strip().lower()),
    "startend:end_checker": lambda t, k: t.s.strip().strip('"').lower().endswith(k["end_phrase"].strip().lower()),
    "startend:quotation": lambda t, k: len(s := t.s.strip()) > 1 and s[0] == '"' == s[-1],
    "change_case:english_capital": lambda t, k: t.s.isupper() and t.language in ("en", None),
    "change_case:english_lowercase": lambda t, k: t.s.islower() and t.language in ("en", None),
    "change_case:capital_word_frequency": lambda t, k: _relation(
        sum(w.isupper() for w in t.nltk_tokens), k["capital_relation"], k["capital_frequency"]),
    "punctuation:no_comma": lambda t, k: "," not in t.s,
}


# The same requests, counted by script and judged as a careful reader would.

NOT_CJK = f"[^\\W_{HAN}{KANA}]"  # word characters that are set apart by spaces: only beside these has a word a boundary


@lru_cache(maxsize=4096)
def _keyword(word: str) -> re.Pattern:
    """The word itself: a whole word where the script has spaces, anywhere in Chinese; any case, any white space."""
    body = r"\s+".join(re.escape(part) for part in word.split())
    left = f"(?<!{NOT_CJK})" if re.match(NOT_CJK, word.strip()) else ""
    right = f"(?!{NOT_CJK})" if re.match(NOT_CJK, word.strip()[-1]) else ""
    return re.compile(left + body + right, re.IGNORECASE)


def _count(t: Text, word: str) -> int:
    return sum(1 for _ in _keyword(word).finditer(t.s))


FULL_MARKS = "[，。！？；：、（）“”【】《》]"
EDGE_MARKS = " \t\r\n*_#>~`\"'“”‘’「」『』"


def _opens_with(part: str, word: str) -> bool:
    return _keyword(word).match(part.lstrip(EDGE_MARKS + "([（【-")) is not None


def _nth_opens_with(t: Text, k: dict) -> bool:
    parts = t.paragraphs
    return len(parts) == k["num_paragraphs"] >= k["nth_paragraph"] > 0 and _opens_with(
        parts[k["nth_paragraph"] - 1], k["first_word"])


def _speaks(t: Text, code: str) -> bool:
    return t.script == ("zh" if code.lower().startswith("zh") else code.lower())


def _placeholders(t: Text) -> int:
    found = re.findall(r"[\[【［]([^\[\]【】［］\n]+)[\]】］](?!\()", t.s)  # "[text](link)" and "[x]" are none
    return sum(bool(WORD.search(slot)) and slot not in "xX" for slot in found)


def _has_postscript(t: Text, marker: str) -> bool:
    pattern = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s[.:：]"}.get(marker) or re.escape(
        unicodedata.normalize("NFKC", marker.strip().lower()))
    found = re.search(rf"(?<![\w.]){pattern}", unicodedata.normalize("NFKC", t.lower))
    return found is not None and WORD.search(found.string, found.end()) is not None


def _section_numbers(t: Text, splitter: str) -> int:
    """Different numbers of lines that open with "Section 1" or 第1部分, Markdown marks allowed before them."""
    name, number = re.escape(splitter.strip()), r"(\d{1,6}|[一二三四五六七八九十]{1,3})"
    found = re.findall(rf"(?im)^[ \t#*_>\"“]*(?:{name}[^\S\n]?{number}|第[^\S\n]?{number}[^\S\n]?{name})", t.s)
    return len({a or b for a, b in found})


ANSWERS = re.compile(r"\bMy answer is (yes|no|maybe)\.|我的回答是[：:]?[“\"]?(是|否|不确定)[”\"]?。")
EMPHASIS = re.compile(r"(?<![*\\])(\*{1,3})(?![\s*])([^*\n]+)(?<!\s)\1(?!\*)")
QUOTES = {'"': '"', "“": "”", "「": "」", "『": "』", "«": "»"}


def _is_quoted(s: str) -> bool:
    s = s.strip().strip("*_")
    return len(s) > 2 and QUOTES.get(s[0]) == s[-1]


def _is_english(t: Text) -> bool:
    """Detected on the lower-cased text (capitals mislead the detector); a few plain words, too short to tell, count."""
    return t.script == "en" or (0 < len(t.words) < 6 and t.letters.isascii() and t.letters != "")


def _capital_words(t: Text) -> int:
    tokens = re.split(r"[\s—–…]+", CJK.sub(" ", t.s))
    return sum(token.isupper() for token in tokens)


UNICODE: dict[str, Callable[[Text, dict], bool]] = COMPAT | {
    "keywords:existence": lambda t, k: all(_count(t, w) for w in k["keywords"]),
    "keywords:frequency": lambda t, k: _relation(_count(t, k["keyword"]), k["relation"], k["frequency"]),
    "keywords:forbidden_words": lambda t, k: not any(_count(t, w) for w in k["forbidden_words"]),
    "language:response_language": lambda t, k: _speaks(t, k["language"]),
    "length_constraints:number_sentences": lambda t, k: _relation(len(t.sentences), k["relation"], k["num_sentences"]),
    "length_constraints:number_paragraphs": lambda t, k: (
        parts := _divided(t.s, r"(?:^|(?<=\s))\*\*\*(?=\s|$)")) is not None and len(parts) == k["num_paragraphs"],
    "length_constraints:number_words": lambda t, k: _relation(len(t.words), k["relation"], k["num_words"]),
    "length_constraints:nth_paragraph_first_word": _nth_opens_with,
    "detectable_content:number_placeholders": lambda t, k: _placeholders(t) >= k["num_placeholders"],
    "detectable_content:postscript": lambda t, k: _has_postscript(t, k["postscript_marker"]),
    "detectable_format:number_bullet_lists": lambda t, k: len(t.bullets) == k["num_bullets"],
    "detectable_format:constrained_response": lambda t, k: len({m[0] for m in ANSWERS.finditer(t.s)}) == 1,
    "detectable_format:number_highlighted_sections": lambda t, k: len(
        EMPHASIS.findall("\n".join(t.prose_lines))) >= k["num_highlights"],
    "detectable_format:multiple_sections": lambda t, k: _section_numbers(t, k["section_spliter"]) >= k["num_sections"],
    "detectable_format:json_format": lambda t, k: _is_json(t.s, strict=True),
    "detectable_format:title": lambda t, k: _has_title(t.s) or any(map(str.strip, _spans(t.s, "《《", "》》"))),
    "combination:repeat_prompt": lambda t, k: " ".join(t.s.casefold().split()).startswith(
        " ".join(k["prompt_to_repeat"].casefold().split())),
    "startend:end_checker": lambda t, k: (t.s.rstrip(EDGE_MARKS).casefold().endswith(phrase) if (
        phrase := k["end_phrase"].strip(EDGE_MARKS).casefold()) else t.s.rstrip().endswith(k["end_phrase"].strip())),
    "startend:quotation": lambda t, k: _is_quoted(t.s),
    "change_case:english_capital": lambda t, k: t.s.isupper() and _is_english(t),
    "change_case:english_lowercase": lambda t, k: t.s.islower() and _is_english(t),
    "change_case:capital_word_frequency": lambda t, k: _relation(
        _capital_words(t), k["capital_relation"], k["capital_frequency"]),
    "punctuation:no_comma": lambda t, k: not re.search("[,，﹐،]", t.s),
}
# Kinds of our own: scope x measure x relation x value, one form for both modes.

def _gap(t: Text, first: str, second: str) -> int | None:
    """Fewest words between an occurrence of one and of the other; None unless both occur."""
    spans = sorted((m.start(), m.end(), w) for w in (first, second) for m in _keyword(w).finditer(t.s))
    gaps = [len(text_of(t.s[a[1]: b[0]]).words) for a, b in zip(spans, spans[1:], strict=False) if a[2] != b[2]]
    return min(gaps, default=None)


def _first_at(t: Text, word: str) -> int:
    found = _keyword(word).search(t.s)
    return found.start() if found else -1


def _unfenced(s: str) -> str:
    """The inside of an answer that is one code block, else the answer."""
    s = s.strip()
    return s.partition("\n")[2][:-3] if s.startswith("```") and s.endswith("```") and "\n" in s else s


def _is_xml(s: str) -> bool:
    """Well-formed, without a document type: no entities, nothing to expand; no tree, so depth costs nothing."""
    from xml.parsers import expat

    if "<!" in s.replace("<!--", "").replace("<![CDATA[", ""):
        return False
    try:
        expat.ParserCreate().Parse(_unfenced(s).strip(), True)
    except (expat.ExpatError, ValueError):  # ValueError: lone surrogates cannot be encoded
        return False
    return True


def _closed(tokens) -> bool:
    """(name, opens) tokens that nest properly, at least one of them."""
    stack, some = [], False
    for name, opens in tokens:
        some = True
        if opens:
            stack.append(name)
        elif not stack or stack.pop() != name:
            return False
    return some and not stack


VOID_TAGS = frozenset("area base br col embed hr img input link meta source track wbr".split())


def _html_balanced(s: str) -> bool:
    tags = [(name.lower(), slash == "") for slash, name, attributes in re.findall(r"<(/?)([A-Za-z][\w-]*+)([^<>]*)>", s)
            if name.lower() not in VOID_TAGS and not attributes.endswith("/")]
    return _closed(tags)


def _latex_balanced(s: str) -> bool:
    found = re.findall(r"\\(begin|end)\{(\w+\*?)\}|\\(?:(left|right)(?![a-zA-Z])|[a-zA-Z]+|[^a-zA-Z])"
                       r"|([{}])|(\$\$?)", s)
    dollars = [mark for *_, mark in found if mark]
    tokens = [(env or "left" if side or env else "{", (mark or side or brace) in ("begin", "left", "{"))
              for mark, env, side, brace, dollar in found if mark or side or brace]
    return len(found) > 0 and all(a == b for a, b in zip(dollars[::2], dollars[1::2], strict=False)) and (
        len(dollars) % 2 == 0) and (not tokens or _closed(tokens))


def _sort_key(item: str) -> bytes:
    """Alphabetical; common Chinese characters by pinyin, which is their order in GB 18030."""
    return item.strip(EDGE_MARKS).casefold().encode("gb18030", "replace")


def _table_shape(t: Text) -> tuple[int, int] | None:
    """(columns, body rows) of the first Markdown table, None without one or with ragged rows."""
    cells = [len(line.strip().strip("|").replace("\\|", "").split("|")) if "|" in line else 0 for line in t.prose_lines]
    for i in range(1, len(cells)):
        if cells[i] and cells[i] == cells[i - 1] and "--" in (line := t.prose_lines[i]) and not line.strip("|:- \t"):
            end = next((j for j in range(i + 1, len(cells)) if not cells[j]), len(cells))
            return (cells[i], end - i - 1) if set(cells[i + 1: end]) <= {cells[i]} else None
    return None


def _csv_shape(s: str) -> tuple[int, int] | None:
    import csv

    try:
        rows = [row for row in csv.reader(_unfenced(s).strip().splitlines(), strict=True) if row]
    except csv.Error:
        return None
    return (len(rows[0]), len(rows)) if rows and len({len(row) for row in rows}) == 1 else None


def _items(t: Text) -> list[str]:
    return t.bullets or [line[m.end():] for line in t.prose_lines if (m := NUMBERED.match(line))]


def _valid_dates(s: str) -> int:
    from datetime import date

    count = 0
    for y, m, d in re.findall(r"(?<![\w-])(\d{4})-(\d\d)-(\d\d)(?![\w-])", s, re.ASCII):
        with suppress(ValueError):  # 30 February
            date(int(y), int(m), int(d))
            count += 1
    return count


def _initials(t: Text) -> list[str]:
    return [found[0][0].casefold() for line in t.lines if (found := WORD.findall(CJK.sub(r" \g<0> ", line)))]


def _starts(t: Text) -> list[str]:
    return [text_of(sentence).words[0].casefold() for sentence in t.sentences]


def _asks(sentence: str) -> bool:
    return sentence.rstrip(EDGE_MARKS + ")）").endswith(("?", "？"))


def _json_keys(s: str) -> set | None:
    loaded = _loads(_unfenced(s), strict=True)
    return set(loaded[0]) if loaded and isinstance(loaded[0], dict) else None


# measure per answer, compared with k["number"] by k["relation"]
COUNTS: dict[str, Callable[[Text], int]] = {
    "length:characters": lambda t: len("".join(t.s.split())),
    "length:chinese_characters": lambda t: len(re.findall(f"[{HAN}]", t.s)),
    "length:lines": lambda t: len(t.lines),
    "length:paragraphs": lambda t: len(t.paragraphs),
    "length:unique_words": lambda t: len({w.casefold() for w in t.words}),
    "content:numbers": lambda t: len(re.findall(r"\d+(?:[.,]\d+)*", t.s)),
    "content:iso_dates": lambda t: _valid_dates(t.s),
    "content:questions": lambda t: sum(map(_asks, t.sentences)),
    "format:numbered_list": lambda t: len(n) if (n := [
        int(m[1]) for line in t.prose_lines if (m := NUMBERED.match(line))]) == [*range(1, len(n) + 1)] and n else -1,
    "format:checklist": lambda t: len(re.findall(r"(?m)^[ \t]*[-*+] \[[ xX]\] +\S", "\n".join(t.prose_lines))) or -1,
}
# parts of the answer, none of which may have more than k["most"] words (sentences, for paragraphs)
EACH: dict[str, Callable[[Text], list[int]]] = {
    "length:words_per_sentence": lambda t: [len(text_of(s).words) for s in t.sentences],
    "length:words_per_paragraph": lambda t: [len(text_of(p).words) for p in t.paragraphs],
    "length:words_per_item": lambda t: [len(text_of(i).words) for i in _items(t)],
    "length:sentences_per_paragraph": lambda t: [len(text_of(p).sentences) for p in t.paragraphs],
}
OWN: dict[str, Callable[[Text, dict], bool]] = {
    **{i: lambda t, k, f=f: (n := f(t)) >= 0 and _relation(n, k["relation"], k["number"]) for i, f in COUNTS.items()},
    **{i: lambda t, k, f=f: 0 < max(f(t), default=0) <= k["most"] for i, f in EACH.items()},
    "keywords:order": lambda t, k: 0 <= _first_at(t, k["first"]) < _first_at(t, k["second"]),
    "keywords:proximity": lambda t, k: (gap := _gap(t, k["first"], k["second"])) is not None and gap <= k["distance"],
    "keywords:in_sentence": lambda t, k: 0 < k["nth"] <= len(t.sentences) and bool(
        _count(text_of(t.sentences[k["nth"] - 1]), k["keyword"])),
    "keywords:any_of": lambda t, k: any(_count(t, w) for w in k["keywords"]),
    "keywords:first_word": lambda t, k: _opens_with(t.s, k["word"]),
    "keywords:last_word": lambda t, k: re.search(
        _keyword(k["word"]).pattern + r"[\W_]*\Z", t.s[-len(k["word"]) - 200:], re.IGNORECASE) is not None,
    "keywords:forbidden_letter": lambda t, k: k["letter"].casefold() not in t.s.casefold(),
    "content:no_digits": lambda t, k: not re.search(r"\d", t.s),
    "content:questions_only": lambda t, k: len(t.sentences) > 0 and all(map(_asks, t.sentences)),
    "content:no_questions": lambda t, k: not re.search("[?？]", t.s),
    "content:unique_sentence_starts": lambda t, k: len(t.sentences) == len(set(_starts(t))) > 1,
    "content:acrostic": lambda t, k: _initials(t) == [c.casefold() for c in k["word"] if not c.isspace()],
    "punctuation:no_exclamation": lambda t, k: not re.search("[!！]", t.s),
    "punctuation:width": lambda t, k: bool(re.search(FULL_MARKS, t.s)) == (k["style"] == "full") and not (
        k["style"] == "full" and re.search(f"(?<=[{HAN}{KANA}])[,.!?;:]", t.s)),
    "format:headings": lambda t, k: sum(
        len(m[1]) == k["level"] for line in t.prose_lines if (m := HEADING.match(line))) == k["number"],
    "format:table": lambda t, k: _table_shape(t) == (k["columns"], k["rows"]),
    "format:code_block": lambda t, k: any(
        line.strip()[3:].strip().casefold() == k["tag"].casefold() for line in t.lines if FENCE.match(line)) and (
        sum(bool(FENCE.match(line)) for line in t.lines) % 2 == 0),
    "format:json_keys": lambda t, k: _json_keys(t.s) == set(k["keys"]),
    "format:xml": lambda t, k: _is_xml(t.s),
    "format:html_balanced": lambda t, k: _html_balanced(t.s),
    "format:latex_balanced": lambda t, k: _latex_balanced(t.s),
    "format:csv": lambda t, k: (shape := _csv_shape(t.s)) is not None and shape[0] == k["columns"] and shape[1] > 1,
    "format:key_values": lambda t, k: [re.split("[:：]", line, maxsplit=1)[0].strip(EDGE_MARKS + "-").casefold()
                                       for line in t.lines if re.search("[:：]", line)] == [
        w.strip().casefold() for w in k["keys"]],
    "format:sorted_items": lambda t, k: len(_items(t)) > 1 and (
        found := [_sort_key(i) for i in _items(t)]) == sorted(found),
    "language:paragraphs": lambda t, k: len(t.paragraphs) == len(k["languages"]) and all(
        _speaks(text_of(p), code) for p, code in zip(t.paragraphs, k["languages"], strict=True)),
}
CHECKS = UNICODE | OWN

TYPES: dict[str, tuple[str, Callable]] = {
    "count": ("a whole number from 0", lambda v: type(v) in (int, float) and v >= 0 and v == v // 1),
    "text": ("a text", lambda v: isinstance(v, str) and v.strip() != ""),
    "prompt": ("the text to repeat", lambda v: isinstance(v, str) and v.strip() != ""),
    "letter": ("one character", lambda v: isinstance(v, str) and len(v) == 1 and not v.isspace()),
    "words": ("a list of words", lambda v: isinstance(v, list | tuple) and len(v) > 0 and all(
        isinstance(w, str) and w.strip() for w in v)),
    "relation": ('"at least" or "less than"', lambda v: v in ("at least", "less than")),
    "limit": ("a relation", lambda v: v in ("at least", "less than", "at most", "exactly")),
    "style": ('"full" or "half"', lambda v: v in ("full", "half")),
}


@lru_cache(maxsize=1)
def _rows() -> dict[str, dict]:
    """data/constraints.jsonl by id: arguments (type and what to draw), what it excludes, wordings, example."""
    lines = (DATA / "constraints.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["id"]: row for row in map(json.loads, lines)}


def _arguments(constraint_id, kwargs) -> dict:
    """The checked arguments, nulls dropped. ValueError: unknown id; missing, unknown or wrong arguments."""
    if not isinstance(constraint_id, str) or constraint_id not in CHECKS:
        raise ValueError(f"unknown constraint id {constraint_id!r}")
    if not isinstance(kwargs, dict | None):
        raise ValueError(f"{constraint_id}: kwargs are not an object")
    given = {name: value for name, value in (kwargs or {}).items() if value is not None}
    wanted = _rows()[constraint_id]["arguments"]
    for name, (kind, *_) in wanted.items():
        expected, accepts = TYPES[kind]
        if name not in given:
            raise ValueError(f"{constraint_id}: argument {name!r} is missing; it is {expected}")
        if not accepts(given[name]):
            raise ValueError(f"{constraint_id}: argument {name!r} is {given[name]!r} but must be {expected}")
        if kind == "count":
            given[name] = int(given[name])  # IFEval writes 2.0
    if extra := given.keys() - wanted.keys():
        raise ValueError(f"{constraint_id}: takes no argument {sorted(extra)[0]!r}")
    return given


def check(constraint_id: str, kwargs: dict, response: str, *, prompt: str = "", mode: str = "unicode") -> bool:
    """Does `response` (the answer without tags) satisfy the constraint? A blank one never does.

    mode "compat" is IFEval's own verdict, "unicode" the same meaning for every script (see the head of the file).
    ValueError for an unknown id or mode and for missing or wrong arguments (null is missing): none is ever drawn.
    `prompt` is there for kinds that compare with the instruction; none of the present ones does.
    """
    if mode not in ("compat", "unicode"):
        raise ValueError(f"unknown mode {mode!r}; use 'compat' or 'unicode'")
    return _holds(constraint_id, _arguments(constraint_id, kwargs), response, mode)


def _holds(constraint_id: str, kwargs: dict, response: str, mode: str) -> bool:
    if not response.strip() or len(response) > MAX_CHARS:
        return False
    table = COMPAT if mode == "compat" and constraint_id in COMPAT else CHECKS
    return bool(table[constraint_id](text_of(response), kwargs))


def check_loose(constraint_id: str, kwargs: dict, response: str, *, prompt: str = "", mode: str = "unicode") -> bool:
    """IFEval's loose verdict: one of eight variants passes (first, last, both lines dropped; all also without *)."""
    if check(constraint_id, kwargs, response, prompt=prompt, mode=mode):
        return True
    lines, kwargs = response.split("\n"), _arguments(constraint_id, kwargs)
    cuts = [response, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    variants = dict.fromkeys([*cuts, *(cut.replace("*", "") for cut in cuts)])
    return any(_holds(constraint_id, kwargs, variant, mode) for variant in variants if variant != response)


# ---------------------------------------------------------------------------------------------------------------------
# 5. Making constraints: random arguments and their wordings


@lru_cache(maxsize=1)
def _phrases() -> dict:
    """data/phrases.json: `empty_thoughts` (see is_placeholder), `words` to draw, names of `languages`, `values_zh`."""
    return json.loads((DATA / "phrases.json").read_text(encoding="utf-8"))


def is_zh(s: str) -> bool:
    return len(CJK.findall(s)) * 2 > len(text_of(s).words)


def _draw(rng: random.Random, language: str, words, kind: str, *choices):
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
        bank = _phrases()["words"][language]
        words = iter(rng.sample(bank, len(bank)))
        return {name: prompt if spec[0] == "prompt" else _draw(rng, language, words, *spec)
                for name, spec in self.arguments.items()}


def _load_constraints() -> dict[str, Constraint]:
    """Two kinds conflict if they share a tag (claim the same place) or one avoids a tag or the name of the other."""
    rows = _rows()
    tags = {i: {i.split(":")[1], *row["tags"]} for i, row in rows.items()}
    conflicts = {i: frozenset(j for j in rows if tags[i] & tags[j] or tags[i] & set(rows[j]["avoids"])
                              or tags[j] & set(rows[i]["avoids"])) for i in rows}
    return {i: Constraint(i, row["arguments"], row.get("languages", ["en", "zh"]), row.get("ood", False), conflicts[i],
                          row["wordings"], row["example"]) for i, row in rows.items()}


CONSTRAINTS: dict[str, Constraint] = _load_constraints()


def compatible(ids) -> bool:
    """Can these constraint ids be asked for together? (No id twice, no pair in conflict.)"""
    ids = list(ids)
    return not any(b in CONSTRAINTS[a].conflicts for i, a in enumerate(ids) for b in ids[i + 1:])


def _join(items: list[str], zh: bool) -> str:
    if len(items) < 2:
        return "".join(items)
    last = "和" if zh else " and " if len(items) == 2 else ", and "
    return ("、" if zh else ", ").join(items[:-1]) + last + items[-1]


ONE = re.compile(r"\b1 ((?:[a-zA-Z]+ )?(?:word|sentence|paragraph|time|point|part|section|placeholder|phrase|line|"
                 r"heading|item|column|row|character|date|number|question|field|figure|box|spot|slot))e?s\b")


def render(constraint_id: str, kwargs: dict, language: str, variant: int) -> str:
    """The constraint as a sentence for the user's instruction: wording number `variant`, in "en" or "zh"."""
    wordings, zh, shown = CONSTRAINTS[constraint_id].wordings[language], language == "zh", {}
    for name, value in _arguments(constraint_id, kwargs).items():
        if name in ("language", "languages"):
            codes = [value] if name == "language" else value
            value = _join([_phrases()["languages"].get(code, [code, code])[zh] for code in codes], zh)
        elif isinstance(value, list | tuple):
            value = _join([f"“{v}”" if zh else f'"{v}"' for v in value], zh)
        elif zh and (name.endswith("relation") or name == "style"):
            value = _phrases()["values_zh"][value]
        shown[name] = value
    words = r"keyword|word|first|second|first_word"  # single words stand in quotes, as lists of them do
    quoted = "“{\\1}”" if zh else '"{\\1}"'
    template = re.sub(rf'["“]?{{({words})}}["”]?', quoted, wordings[variant % len(wordings)])
    counts = {name: value if isinstance(value, int) else f"{{{name}}}" for name, value in shown.items()}
    text = ONE.sub(lambda m: f"1 {m[1]}", template.format(**counts))  # not in what is quoted
    return re.sub(r"\{(\w+)\}", lambda m: str(shown.get(m[1], m[0])), text)


# ---------------------------------------------------------------------------------------------------------------------
# 6. Math


def last_boxed(text: str) -> str | None:
    r"""Content of the last closed `\boxed{...}`, braces matched (`\{` and `\}` are plain signs); None without one."""
    open_boxes, last, start_of_last = [], None, -1
    for m in re.finditer(r"\\boxed\s*\{|\\.|[{}]", text, re.DOTALL):
        if m[0] == "}":
            if open_boxes and (box := open_boxes.pop()) is not None and box.start() > start_of_last:
                last, start_of_last = text[box.end(): m.start()], box.start()
        elif m[0] == "{":
            open_boxes.append(None)
        elif m[0].startswith("\\boxed"):
            open_boxes.append(m)
    return last


class MathWorker:
    """math-verify in a process of its own: sympy may run for hours on a hostile answer, so each call has a deadline.

    The process starts at the first question; one that misses the deadline is killed and the answer counts as wrong.
    """

    def __init__(self, deadline: float = 5.0):
        self.deadline, self.process, self.lock = deadline, None, threading.Lock()

    def _exchange(self, line: str, seconds: float) -> str:
        timer = threading.Timer(seconds, self.process.kill)
        timer.start()
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
            return self.process.stdout.readline().strip()
        except BrokenPipeError:
            return ""
        except BaseException:  # interrupted: its reply would be taken for that of the next question
            self.process.kill()
            raise
        finally:
            timer.cancel()

    def same(self, gold: str, answer: str) -> bool:
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                self.process = subprocess.Popen(
                    [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL, text=True, encoding="utf-8")
                if self._exchange(json.dumps(["1", "1"]), 120.0) != "true":  # loading sympy does not count
                    raise RuntimeError("the math-verify worker does not start; check `python -c 'import math_verify'`")
            reply = self._exchange(json.dumps([gold, answer]), self.deadline)
            if reply not in ("true", "false"):  # killed at the deadline, or sympy brought it down
                self.process.kill()
                self.process.wait()
            return reply == "true"


MATH_WORKER = MathWorker()


def math_reward(text: str, gold: str) -> float:
    r"""+2 if the last `\boxed{}` of the whole completion equals `gold`, -1.5 if not, -2 without any; format aside."""
    answer = last_boxed(text)
    if answer is None:
        return -2.0
    plain = " ".join(answer.split())
    correct = bool(plain) and len(plain) <= 1000 and (
        plain == " ".join((last_boxed(gold) or gold).split()) or MATH_WORKER.same(last_boxed(gold) or gold, answer))
    return 2.0 if correct else -1.5


def _math_worker_main() -> None:
    """The worker: reads [gold, answer] lines, writes true or false. `python rewards.py` is this."""
    from math_verify import parse, verify

    for number in (signal.SIGINT, signal.SIGTERM):  # the trainer's: it finishes its step, and this ends with its pipe
        signal.signal(number, signal.SIG_IGN)
    for line in sys.stdin:
        gold, answer = (parse(f"\\boxed{{{s}}}", parsing_timeout=None) for s in json.loads(line))
        print(json.dumps(bool(gold and answer and verify(gold, answer, timeout_seconds=None))), flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# 7. Rewards


def format_reward(parsed: Parsed) -> float:
    return 1.0 if parsed.format_ok else -1.0


def accuracy_reward(verdicts: list[bool]) -> float:
    """All constraints +2, some k/C, none -2 (paper section 3.3). ValueError on an empty list."""
    if not verdicts:
        raise ValueError("accuracy_reward needs at least one verdict")
    return 2.0 if all(verdicts) else sum(verdicts) / len(verdicts) if any(verdicts) else -2.0


def rules_x_judge(verdicts: list[bool], judged: list[bool]) -> float:
    """Share of the rule verdicts, times 1 or 0 for the judge's (all yes or not); without rules the judge's alone."""
    rules = [v for v, by_judge in zip(verdicts, judged, strict=True) if not by_judge]
    soft = all(v for v, by_judge in zip(verdicts, judged, strict=True) if by_judge)
    return (sum(rules) / len(rules) if rules else 1.0) * soft


# Accuracy as a function of (verdicts, which of them a judge gave), for ablations.
VARIANTS: dict[str, Callable[[list[bool], list[bool]], float]] = {
    "raif": lambda verdicts, judged: accuracy_reward(verdicts),
    "fraction": lambda verdicts, judged: sum(verdicts) / len(verdicts),
    "all": lambda verdicts, judged: float(all(verdicts)),
    "rules_x_judge": rules_x_judge,
}


def guards(answer: str, prompt: str, constraints=(), truncated: bool = False) -> list[str]:
    """Names of the signs of reward hacking in an answer; they are reported, and change a reward only if asked to."""
    t, raised = text_of(answer[:MAX_CHARS]), ["truncated"] if truncated else []
    words = [w.casefold() for w in t.words]
    if not words:
        return [*raised, "empty"]

    def grams(ws, n):
        return list(zip(*(ws[i:] for i in range(n)), strict=False))

    mine, theirs = grams(words, 5), set(grams([w.casefold() for w in text_of(prompt).words], 5))
    asked_to_repeat = any(c.get("id") == "combination:repeat_prompt" for c in constraints)
    if not asked_to_repeat and len(mine) > 5 and sum(g in theirs for g in mine) > len(mine) / 2:
        raised.append("prompt_copied")
    arguments = [c.get("kwargs") or {} for c in constraints]
    wanted = [w for k in arguments for w in [*(k.get("keywords") or []), *filter(None, [k.get("keyword")])]]
    if any(_count(t, w) > max(3, 0.2 * len(words) / len(text_of(w).words or [w])) for w in wanted):
        raised.append("keyword_stuffing")
    threes, often = grams(words, 3), Counter(t.sentences).most_common(1)
    if len(threes) > 30 and len(set(threes)) < len(threes) / 2 or often and often[0][1] > 2:
        raised.append("repetition")
    return raised


# How often an answer slips where one constraint can be broken many times; every other broken constraint is one slip.
SLIPS: dict[str, Callable[[Text, dict], int]] = {
    "punctuation:no_comma": lambda t, k: len(re.findall("[,，﹐،]", t.s)),
    "change_case:english_lowercase": lambda t, k: sum(word != word.lower() for word in t.s.split()),
    "change_case:english_capital": lambda t, k: sum(word != word.upper() for word in t.s.split()),
    "keywords:existence": lambda t, k: sum(_count(t, word) == 0 for word in k["keywords"]),
    "keywords:forbidden_words": lambda t, k: sum(_count(t, word) for word in k["forbidden_words"]),
}


def count_slips(record: dict, answer: str) -> int:
    """Single faults of an answer against the active code constraints of its record: 0 if and only if all hold."""
    slips, t = 0, text_of(answer)
    for c in record.get("constraints", []):
        if c["kind"] == "code" and c["active"] and not check(c["id"], c["kwargs"], answer):
            slips += max(1, SLIPS[c["id"]](t, c["kwargs"]) if c["id"] in SLIPS else 1)
    return slips


@dataclass(frozen=True)
class Score:
    format: float
    accuracy: float
    total: float
    verdicts: list[bool]  # one per active constraint, in order; of a math record: [correct]
    guards: list[str] = field(default_factory=list)


def score(records, completions, *, judge=None, family="cold", direct=False, mode="unicode", variant="raif",
          apply_guards=False, truncated=None) -> list[Score]:
    """The rule-centric reward of whole assistant turns; `records[i]` belongs to `completions[i]`.

    An instruction with an invalid format, a blank answer or a blank or placeholder thought has accuracy -2, all
    verdicts False. A constraint counts only if all it depends on hold, transitively; inactive ones are never scored.
    direct=True (no-reasoning rollouts): no think check, the answer block or else all after the thought is the answer,
    format 0, total = accuracy. The judge gets all questions of the call at once; ValueError if it is missing.
    variant: one of VARIANTS. truncated: a flag per completion, for `guards`; with apply_guards a raised one fails all.
    """
    truncated = truncated or [False] * len(records)
    questions, parsed_turns = [], []
    for record, text in zip(records, completions, strict=True):
        active = [c for c in record.get("constraints", []) if c.get("active", True)] if record["task"] != "math" else []
        asked = [c["question"] for c in active if c["kind"] == "judge"]
        if asked and judge is None:
            raise ValueError(f"record {record['id']!r} has judge constraints; pass a judge")
        parsed = parse_response(text, family)
        valid = parsed.answer.strip() != "" and (direct or (parsed.format_ok and not is_placeholder(parsed.think)))
        parsed_turns.append((parsed, valid, active))
        if valid:
            questions += [(record["messages"][-1]["content"], parsed.answer, question) for question in asked]
    judged = iter(judge(questions) if questions else [])

    scores = []
    for record, text, cut, (parsed, valid, active) in zip(records, completions, truncated, parsed_turns, strict=True):
        prompt = record["messages"][-1]["content"]
        raised = guards(parsed.answer, prompt, active, cut)
        if record["task"] == "math":
            accuracy = math_reward(text, record["answer"])
            verdicts = [accuracy == 2.0]
        else:
            holds = []
            for c in record["constraints"]:
                verdict = all(holds[j] for j in c.get("depends_on", ()))  # transitive: those carry their own
                if valid and c.get("active", True):
                    verdict &= bool(next(judged)) if c["kind"] == "judge" else check(
                        c["id"], c.get("kwargs"), parsed.answer, prompt=prompt, mode=mode)
                holds.append(verdict)
            failed = not valid or (apply_guards and raised)
            verdicts = [hold and not failed for hold, c in zip(holds, record["constraints"], strict=True)
                        if c.get("active", True)]
            accuracy = VARIANTS[variant](verdicts, [c["kind"] == "judge" for c in active])
        form = 0.0 if direct else format_reward(parsed)
        scores.append(Score(form, accuracy, form + accuracy, verdicts, raised))
    return scores


if __name__ == "__main__":
    _math_worker_main()
