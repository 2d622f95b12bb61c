"""Checkers, samplers and wordings of every type: examples, scripts, properties, hostile texts."""

import random
import re
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rewards
from rewards import CONSTRAINTS, InputError, check, check_loose, compatible, render

DRAFTS = {
    "en": [
        "Tea is made from the leaves of a plant. First, boil 2 cups of fresh water. Then pour it over the leaves, wait "
        "three minutes, and enjoy the warm drink! Many people like tea with milk or sugar.",
        "Regular exercise has many benefits. It makes the heart strong, improves the mood and helps you sleep. "
        "It costs little. Why not start today? Even a short walk every day can make a difference.",
        "Yes, whales are mammals. They breathe air and feed their young with milk.",
        "Packing list:\n\n- warm socks\n- a good book\n- water\n\nPut the heavy things at the bottom.",
    ],
    "zh": [
        "绿茶是一种历史悠久的饮料，深受人们喜爱。先把2杯水烧开，再把茶叶放进杯子里！等三分钟，就可以喝到一杯好茶了。绿茶很香。",
        "运动对身体有很多好处。它能增强心脏功能，改善心情。为什么不从今天开始呢？每天散步也会有收获。",
        "是的，鲸鱼是哺乳动物。它们用肺呼吸。",
        "旅行清单：\n\n- 袜子\n- 一本好书\n- 水\n\n重的东西放在下面。",
    ],
}


def draws(constraint, count):
    for seed in range(count):
        rng = random.Random(seed)
        for language in ("en", "zh"):
            kwargs = constraint.sample(rng, language, "What is it?\nTell me more.")
            if kwargs is not None:
                yield rng, language, kwargs


def values(kwargs):
    for name, value in kwargs.items():
        for item in value if isinstance(value, list) else [value]:
            yield name, item


def properties(constraint, count):
    """Drawn arguments are valid, differ where they can, and stand in every wording."""
    drawn = list(draws(constraint, count))
    assert len(drawn) == count * len(constraint.languages)
    for rng, language, kwargs in drawn:
        check(constraint.id, kwargs, "Any text.")  # raises for arguments that are not valid
        assert kwargs.keys() == constraint.arguments.keys()
        text = render(constraint.id, kwargs, language, rng.randrange(6))
        for name, value in values(kwargs):
            if name in ("language", "languages"):
                value = rewards.phrases()["languages"][value][language]
            shown = rewards.phrases()["values_zh"].get(value, value) if language == "zh" else value
            assert str(shown) in text, (name, value, text)
        words = [value for name, value in values(kwargs) if constraint.arguments[name] in (["text"], ["words", 1, 3])]
        assert len(words) == len(set(words))  # a word never stands twice in one constraint
    if any(spec[0] not in ("prompt", "style") for spec in constraint.arguments.values()):
        assert len({str(kwargs) for _, _, kwargs in drawn}) > 1


@pytest.mark.parametrize("kind", CONSTRAINTS)
def test_properties(kind):
    properties(CONSTRAINTS[kind], 50)


def test_a_type_is_drawn_only_where_it_suits_the_request():
    rng = random.Random(0)
    assert CONSTRAINTS["change_case:english_capital"].sample(rng, "zh") is None
    assert CONSTRAINTS["length:chinese_characters"].sample(rng, "en") is None
    repeat = CONSTRAINTS["combination:repeat_prompt"]
    assert repeat.sample(rng, "en") is None and repeat.sample(rng, "en", "Why?") == {"prompt_to_repeat": "Why?"}


@pytest.mark.parametrize("kind", CONSTRAINTS)
def test_example_and_wordings(kind):
    constraint = CONSTRAINTS[kind]
    example = constraint.example
    for mode in ("unicode", "compat"):
        assert constraint.check(example["kwargs"], example["pass"], mode=mode)
        assert not constraint.check(example["kwargs"], example["fail"], mode=mode)
        assert not constraint.check(example["kwargs"], " \n", mode=mode)  # blank is never enough
    official = kind in rewards.COMPAT
    assert len(set(constraint.wordings["en"])) >= (6 if official else 3) and len(set(constraint.wordings["zh"])) >= 3


def test_number_of_kinds_and_conflicts():
    assert len(CONSTRAINTS) >= 45 and len(rewards.COMPAT) == 25
    for kind, constraint in CONSTRAINTS.items():
        assert kind in constraint.conflicts
        assert all(kind in CONSTRAINTS[other].conflicts for other in constraint.conflicts)
    assert compatible(["punctuation:no_comma", "keywords:existence"])
    assert not compatible(["change_case:english_capital", "change_case:english_lowercase"])
    assert not compatible(["punctuation:no_comma", "punctuation:no_comma"])


@pytest.mark.parametrize("kind,kwargs", [
    ("no:such_kind", {}), ("keywords:existence", {}), ("keywords:existence", {"keywords": None}),
    ("keywords:existence", {"keywords": "tea"}), ("keywords:existence", {"keywords": []}),
    ("length_constraints:number_words", {"num_words": 5}), ("punctuation:no_comma", {"frequency": 3}),
    ("length_constraints:number_words", {"num_words": "5", "relation": "at least"}),
    ("length_constraints:number_words", {"num_words": 5, "relation": "around"}),
    ("length_constraints:number_words", {"num_words": True, "relation": "at least"}),
    ("length_constraints:number_words", {"num_words": float("nan"), "relation": "at least"}),
    ("keywords:letter_frequency", {"letter": "ab", "let_frequency": 1, "let_relation": "at least"}),
])
@pytest.mark.parametrize("mode", ["unicode", "compat"])
def test_wrong_arguments_are_errors(kind, kwargs, mode):
    with pytest.raises(ValueError):
        check(kind, kwargs, "Some text.", mode=mode)


def test_wordings_leave_what_they_quote_alone():
    kwargs = {"prompt_to_repeat": "Summarize chapter 1 key points."}
    assert all(kwargs["prompt_to_repeat"] in rewards.render("combination:repeat_prompt", kwargs, "en", v)
               for v in range(3))
    kwargs = {"keyword": "full", "frequency": 1, "relation": "at least"}
    assert "full" in rewards.render("keywords:frequency", kwargs, "zh", 0)
    assert "1 times" not in rewards.render("keywords:frequency", kwargs, "en", 0)


def test_null_arguments_count_as_absent():
    kwargs = {"num_words": 2, "relation": "at least", "keywords": None, "letter": None}
    assert check("length_constraints:number_words", kwargs, "warm tea")


AT_LEAST = {"relation": "at least"}
LESS = {"relation": "less than"}
SCRIPTS = [  # kind, kwargs, text, compat verdict, unicode verdict
    ("length_constraints:number_words", {"num_words": 6} | AT_LEAST, "我喜欢喝茶。", False, False),
    ("length_constraints:number_words", {"num_words": 5} | AT_LEAST, "我喜欢喝茶。", False, True),
    ("length_constraints:number_words", {"num_words": 6} | AT_LEAST, "我用 Python 写代码", False, True),
    ("length_constraints:number_words", {"num_words": 4} | LESS, "नमस्ते दुनिया आज", False, True),
    ("length_constraints:number_words", {"num_words": 1} | AT_LEAST, "____ ---", True, False),
    ("length_constraints:number_sentences", {"num_sentences": 3} | AT_LEAST, "茶很香。你喜欢吗？太好了！", False, True),
    ("length_constraints:number_sentences", {"num_sentences": 3} | AT_LEAST, "他说：“你好！”然后走了。再见。",
     False, True),
    ("length_constraints:number_sentences", {"num_sentences": 2} | AT_LEAST, "I like 绿茶。It is warm.", False, True),
    ("length_constraints:number_sentences", {"num_sentences": 2} | LESS, "Dr. Smith met Mr. B. Jones at 3.5 km.",
     True, True),
    ("length_constraints:number_sentences", {"num_sentences": 3} | AT_LEAST, "# Tea\n\n* warm\n* sweet", False, True),
    ("keywords:existence", {"keywords": ["war"]}, "He walked toward us.", True, False),
    ("keywords:existence", {"keywords": ["茶"]}, "我爱喝绿茶和tea", True, True),
    ("keywords:existence", {"keywords": ["tea"]}, "我爱喝tea和咖啡", True, True),
    ("keywords:existence", {"keywords": ["C++"]}, "I write C++ code.", True, True),
    ("keywords:forbidden_words", {"forbidden_words": ["茶"]}, "我爱喝绿茶和咖啡", True, False),
    ("keywords:forbidden_words", {"forbidden_words": ["tea"]}, "喝tea吧", True, False),
    ("keywords:forbidden_words", {"forbidden_words": ["tea"]}, "The teacher left.", True, True),
    ("keywords:frequency", {"keyword": "茶", "frequency": 3} | AT_LEAST, "绿茶红茶都是茶", True, True),
    ("punctuation:no_comma", {}, "茶很香，也很暖。", True, False),
    ("punctuation:no_comma", {}, "茶、酒、水", True, True),
    ("startend:quotation", {}, "“茶很香。”", False, True),
    ("startend:end_checker", {"end_phrase": "That is all."}, "Tea. **That is all.**", False, True),
    ("startend:end_checker", {"end_phrase": "再见。"}, "茶很香。“再见。”", False, True),
    ("detectable_format:number_bullet_lists", {"num_bullets": 1}, "-5 degrees\n---\n* tea", False, True),
    ("detectable_format:number_bullet_lists", {"num_bullets": 1}, "**bold** start\n*italic* start\n* tea", False, True),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "• 茶\n• 水", False, True),
    ("detectable_format:number_bullet_lists", {"num_bullets": 1}, "* tea\n```\n* code\n```", False, True),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "* a\n* b * c\n*茶*", True, False),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "***x***", True, False),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "喝*绿茶*和**红茶**", True, True),
    ("detectable_content:number_placeholders", {"num_placeholders": 1}, "See [here](http://x.y)", True, False),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "【姓名】和[日期]", False, True),
    ("detectable_format:json_format", {}, "NaN", True, False),
    ("detectable_format:json_format", {}, "\"text\"", True, False),
    ("detectable_format:json_format", {}, "```json\n{\"茶\": 1}\n```", True, True),
    ("detectable_format:title", {}, "《《绿茶》》\n很香", False, True),
    ("detectable_format:multiple_sections", {"section_spliter": "Section", "num_sections": 2},
     "In Section 1 of Section 2", True, False),
    ("detectable_format:multiple_sections", {"section_spliter": "部分", "num_sections": 2},
     "第一部分\n茶\n第二部分\n水", False, True),
    ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "最后"},
     "茶\n\n\n\n**最后**，水", False, True),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "***bold*** tea\n\n***\n\nwater", False, True),
    ("language:response_language", {"language": "en"}, "12345 !!!", True, False),
    ("language:response_language", {"language": "zh-cn"}, "我今天喝了 tea。", False, True),
    ("change_case:english_lowercase", {}, "i like warm tea in the morning.", True, True),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "P.S.", True, False),
    ("detectable_content:postscript", {"postscript_marker": "附："}, "茶很香。\n\n附：记得加水。", True, True),
    ("keywords:existence", {"keywords": ["tea"]}, "I like _tea_.", True, True),
    ("keywords:forbidden_words", {"forbidden_words": ["(sic"]}, "He wrote (sic here", True, False),
    ("startend:end_checker", {"end_phrase": "~~~"}, "Tea.", False, False),
    ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 2.0, "nth_paragraph": 2.0, "first_word": "add"},
     "Boil the water.\n\nAdd the tea.", True, True),
    ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 2, "nth_paragraph": 0, "first_word": "add"},
     "Boil the water.\n\nAdd the tea.", False, False),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 0}, "a *** *** b", False, False),
    ("detectable_format:multiple_sections", {"section_spliter": " Part (", "num_sections": 1}, "Part (1", True, True),
]


SCRIPTS += [  # an exact number is exact, a highlight counts once, capitals alone are not English, half is Chinese
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* tea\n* milk\n* water", False, False),
    ("detectable_format:number_bullet_lists", {"num_bullets": 3}, "* tea\n* milk\n* water", True, True),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 1}, "Use **fresh** water.", True, True),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "Use **fresh** water.", False, False),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 3}, "Use *fresh* and *cold* water.", False,
     False),
    ("change_case:english_capital", {}, "DER FLUSS IST RUHIG UND DIE VÖGEL SINGEN HEUTE.", False, False),
    ("change_case:english_lowercase", {}, "der fluss ist ruhig und die vögel singen heute.", False, False),
    ("language:response_language", {"language": "zh-cn"}, "我喝热茶 with my old friends", False, True),
    ("language:response_language", {"language": "zh-cn"}, "我喝热茶 with my very old friends", False, False),
]


@pytest.mark.parametrize("kind,kwargs,text,compat,unicode", SCRIPTS)
def test_scripts_and_markdown(kind, kwargs, text, compat, unicode):
    assert (check(kind, kwargs, text, mode="compat"), check(kind, kwargs, text)) == (compat, unicode)


OWN_CASES = [
    ("keywords:proximity", {"first": "tea", "second": "milk", "distance": 1}, "tea with milk",
     "tea with a lot of milk"),
    ("format:json_keys", {"keys": ["a"]}, "```json\n{\"a\": 1}\n```", "[" * 10_000),
    ("format:xml", {}, "<a><b/><!-- c --></a>", '<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>'),
    ("format:html_balanced", {}, "<p>a<br>b</p>", "<p>a</div>"),
    ("format:latex_balanced", {}, r"\left( \frac{1}{2} \right) costs \$5", r"\frac{1}{2"),
    ("format:table", {"columns": 2, "rows": 2}, "a | b\n--|--\n1 | 2\n3 | 4", "a | b\n--|--\n1 | 2\n3"),
    ("format:csv", {"columns": 2}, 'a,b\n"x, y",2', 'a,b\n"x" y,2'),
    ("content:iso_dates", {"number": 1, "relation": "exactly"}, "2024-02-29", "2023-02-29 and 12024-01-01"),
    ("content:acrostic", {"word": "茶香"}, "茶叶\n香味", "茶叶香味"),
    ("content:acrostic", {"word": "SUN"}, "Sit\n\nUnder\nNice trees", "Sit\nUnder\nNice\nTrees"),
    ("punctuation:width", {"style": "half"}, "茶, 水.", "茶，水。"),
    ("keywords:last_word", {"word": "茶"}, "我喜欢喝茶。", "茶很好喝。"),
    ("language:paragraphs", {"languages": ["zh", "en"]}, "我喜欢喝茶。\n\nI like to drink tea with my friends.",
     "I like to drink tea with my friends.\n\n我喜欢喝茶。"),
    ("length:words_per_item", {"most": 2}, "1. warm tea\n2. water", "1. very warm tea"),
    ("format:numbered_list", {"number": 2, "relation": "exactly"}, "1.绿茶\n2、 红茶", "1.5 cups\n2.5 cups"),
    ("format:numbered_list", {"number": 3, "relation": "at most"}, "1. tea", "Tea is warm."),
    ("format:checklist", {"number": 3, "relation": "less than"}, "- [ ] tea", "Tea is warm."),
    ("format:sorted_items", {}, "* 茶\n* 水", "* 水\n* 茶"),
    ("punctuation:width", {"style": "half"}, "绿茶 (很香), 红茶", "绿茶（很香）、红茶"),
    ("keywords:last_word", {"word": "tea"}, "I like _tea_.", "tea, I like"),
    ("format:headings", {"number": 2, "level": 2}, "## 茶\n## 水\n# 饮", "```\n## a\n## b\n```"),
]


@pytest.mark.parametrize("kind,kwargs,passing,failing", OWN_CASES)
def test_own_kinds(kind, kwargs, passing, failing):
    assert check(kind, kwargs, passing) and not check(kind, kwargs, failing)


CAREFUL = {  # kind -> (kwargs, text, verdict): answers that were once accepted wrongly, or refused
    "format:latex_balanced": [
        ({}, "It costs $5 today and $6 tomorrow.", False), ({}, r"The path is C:\Users", False),
        ({}, "Tea is {warm}.", False), ({}, r"\[ x = 1", False), ({}, r"\( x = 1 \]", False),
        ({}, "Tea is warm.", False), ({}, r"\[ x = 1 \] costs \$5", True), ({}, "So $x + 1$ and $y$.", True),
        ({}, "$$\nx = 1\n$$", True), ({}, r"\textbf{tea} is $warm", False), ({}, r"a \\[2pt] \emph{b}", True)],
    "format:code_block": [
        ({"tag": "python"}, "```python\n```\nAll of my answer is out here.", False),
        ({"tag": "python"}, "```\nprint(1)\n```python", False), ({"tag": "python"}, "```python\nprint(1)", False),
        ({"tag": "python"}, "````python\n```\nprint(1)\n```\n````", True),
        ({"tag": "python"}, "```python\n~~~\nprint(1)\n```", True)],
    "format:key_values": [
        ({"keys": ["topic", "answer"]}, "topic:\nanswer:", False),
        ({"keys": ["topic", "answer"]}, "Here it is\ntopic: tea\nanswer: warm", False),
        ({"keys": ["topic", "answer"]}, "**Topic:** tea\n- answer：warm: yes", True)],
    "format:csv": [
        ({"columns": 2}, "Tea is warm, and sweet.\nCoffee is hot, and strong.", False),
        ({"columns": 2}, "name,\ntea,warm", False), ({"columns": 2}, "name, taste\ntea, It is warm.", True)],
    "format:html_balanced": [
        ({}, "<b></b> plain text", False), ({}, "<p>tea</p> <unclosed", False), ({}, "Tea is <b>warm</b>.", True),
        ({}, "<p>1 < 2</p>", True)],
    "length:words_per_item": [
        ({"most": 3}, "* Boil\n  the fresh water for five long minutes\n* Pour", False),
        ({"most": 3}, "* Boil\n1. Pour the fresh water slowly", False),
        ({"most": 3}, "* Boil\n* Pour\n\nThat is all of it", True)],
    "language:response_language": [
        ({"language": "en"}, "The river is calm and the birds are singing now. 今天天气很好我们", False),
        ({"language": "en"}, "The river is calm and all the birds of 北京 sing in a tree by the deep old water.", True),
        ({"language": "zh-tw"}, "这个国家的人喜欢喝茶。", False),
        ({"language": "zh-tw"}, "這個國家的人喜歡喝茶。", True),
        ({"language": "en"}, "my teenage son spends all weekend in his room.", True),
        *(({"language": code}, text, True) for code, text in (
            ("de", "Der Fluss ist ruhig und schön."), ("fr", "Je bois du thé chaud."), ("es", "Me gusta mucho el té."),
            ("it", "Il tè è a casa mia."), ("pt", "Eu gosto de chá do Brasil."))),
        ({"language": "en"}, "Der Fluss ist ruhig.", False)],
    "change_case:english_capital": [({}, "THE RIVER IS CALM AND THE BIRDS ARE SINGING NOW. 今天天气很好我们", False)],
    "change_case:english_lowercase": [({}, "my teenage son spends all weekend in his room.", True)],
    "language:paragraphs": [({"languages": ["en", "zh-cn"]}, "How does it work?\n\n茶很香。", True)],
    "punctuation:width": [
        ({"style": "full"}, "API,SDK和Web,都很好。", False), ({"style": "full"}, "价格是5,都好。", False),
        ({"style": "full"}, "绿茶(Green Tea)很香。", False), ({"style": "full"}, '他说"茶很香"。', False),
        ({"style": "full"}, "1. 版本3.5，见a.com，10:30开始，don't慌。", True),
        ({"style": "half"}, "绿茶「很香」, 真的.", False), ({"style": "half"}, "绿茶……很香", False),
        ({"style": "half"}, "绿茶——真的", False)],
    "detectable_content:number_placeholders": [
        ({"num_placeholders": 1}, text, verdict) for text, verdict in (
            ("Tea is warm [1].", False), ("Take a[i] and b[j].", False), ('["tea", "milk"]', False),
            ("Tea.[^note]", False), ("尊敬的[姓名]", True), ("Dear [first name 1]", True))],
    "detectable_format:number_highlighted_sections": [({"num_highlights": 1}, "2*3*4 = 24 and a*b*c", False)],
    "detectable_content:postscript": [
        ({"postscript_marker": "P.S."}, "P.S. is short for postscript. Tea is warm.", False),
        ({"postscript_marker": "P.S."}, "The letters P.S. stand for it.", False),
        ({"postscript_marker": "P.S."}, "Tea is warm.\n\n**P.S.** Add milk.", True),
        ({"postscript_marker": "P.S."}, "Tea is warm. P.S. Add milk.", True)],
    "startend:quotation": [
        ({}, '"Yes," he said. "No."', False), ({}, "“茶。”他说。“水。”", False),
        ({}, '"He said "tea" and left."', True),
        ({}, "“他说“茶”。”", True)],
    "change_case:capital_word_frequency": [
        ({"capital_frequency": 1, "capital_relation": "at least"}, "I think I like what I drink. A cup.", False),
        ({"capital_frequency": 2, "capital_relation": "at least"}, "I like HOT (GREEN) tea.", True)],
    "content:no_digits": [({}, "Half a cup is ½.", False), ({}, "① Tea", False), ({}, "二〇二四年三月。", True)],
    "detectable_format:json_format": [({}, "{}", False), ({}, "[]", False), ({}, '["tea"]', True)],
    "keywords:existence": [
        ({"keywords": ["cafe"]}, "The cafe\u0301 is open.", False),
        ({"keywords": ["café"]}, "The cafe\u0301 is open.", True),
        ({"keywords": ["don't"]}, "I don’t know.", True), ({"keywords": ["차"]}, "나는 차를 마신다.", True),
        ({"keywords": ["차"]}, "나는 홍차를 마신다.", False)],
    "keywords:forbidden_words": [
        ({"forbidden_words": ["sugar"]}, "No su\u00adgar.", False),
        ({"forbidden_words": ["sugar"]}, "No su**gar**.", False)],
    "keywords:order": [
        ({"first": "water", "second": "tea"}, "Tea is good. Boil water and add tea.", True),
        ({"first": "water", "second": "tea"}, "Tea comes from water.", False)],
    "length_constraints:number_words": [
        ({"num_words": 6, "relation": "less than"}, "Don't panic, it's just tea.", True),
        ({"num_words": 5, "relation": "less than"}, "Add 3.5 or 1,000 cups.", False),
        ({"num_words": 6, "relation": "less than"}, "Add 3.5 or 1,000 cups.", True)],
    "length_constraints:number_sentences": [
        ({"num_sentences": 2, "relation": "less than"}, text, True) for text in (
            "Many drinks, e.g. Indian tea, i.e. Assam, are warm.",
            "It takes approx. Three minutes, see Fig. 3 for that.",
            'He said: "Stop!" and left.', "He said: “Stop!” and left.")],
    "format:table": [
        ({"columns": 2, "rows": 1}, "|a|b|\n|-|-|\n|1|2|", True),
        ({"columns": 2, "rows": 1}, "|a|b|\n|-|:-:|\n|1||", True)],
    "format:numbered_list": [
        ({"number": 2, "relation": "exactly"}, text, True) for text in (
            "1. Boil\n   1. water\n   2. milk\n   3. tea\n2. Pour", "1. Boil\n2. Pour\n\nThen:\n\n1. Drink",
            "**1. Boil**\n**2. Pour**", "（1）烧水\n（2）泡茶")] + [
        ({"number": 2, "relation": "exactly"}, "2. Pour\n3. Drink", False)],
    "content:questions": [
        ({"number": 1} | AT_LEAST, "你喜欢吗？！", True), ({"number": 1} | AT_LEAST, "Really?! (Why?)", True)],
    "content:iso_dates": [
        ({"number": 1} | AT_LEAST, "At 2024-05-01T10:00 sharp.", True),
        ({"number": 1} | AT_LEAST, "2024-05-01-17", False)],
    "format:sorted_items": [({}, "* éclair\n* fig", True), ({}, "1. fig\n2. éclair", False)],
    "format:xml": [({}, "<a><![CDATA[<!DOCTYPE b>]]></a>", True), ({}, "<!DOCTYPE a><a/>", False)],
    "detectable_format:constrained_response": [
        ({}, "My answer is **yes**.", True), ({}, "我的回答是:是.", True),
        ({}, "My answer is yes. My answer is no.", False)],
    "content:unique_sentence_starts": [({}, "Tea is warm.", True)],
}


@pytest.mark.parametrize("kind,case", [(kind, case) for kind, cases in CAREFUL.items() for case in cases])
def test_a_careful_reader(kind, case):
    kwargs, text, verdict = case
    assert check(kind, kwargs, text) == verdict


def test_languages_are_codes():
    for kwargs in ({"language": "English"}, {"language": "en-US"}, {"language": 3}):
        with pytest.raises(ValueError, match="language code"):
            check("language:response_language", kwargs, "Tea is warm.")
    with pytest.raises(ValueError, match="language codes"):
        check("language:paragraphs", {"languages": ["en", "klingon"]}, "Tea is warm.")


def test_compat_has_no_limit_of_length_and_no_runaway_pattern():
    long = "word " * 10_001
    assert check("punctuation:no_comma", {}, long, mode="compat")
    assert check("length_constraints:number_words", {"num_words": 100, "relation": "at least"}, long, mode="compat")
    assert not check("punctuation:no_comma", {}, long)
    start = time.perf_counter()
    for pattern in ("(a+)+b", "(a|a)" * 40 + "b", "a?" * 40 + "a" * 40):
        assert not check("keywords:existence", {"keywords": [pattern]}, "a" * 39, mode="compat")
    assert time.perf_counter() - start < 2
    assert check("keywords:existence", {"keywords": ["t.a"]}, "warm tea", mode="compat")  # as officially


def test_loose_variants():
    kind, kwargs = "startend:end_checker", {"end_phrase": "the end."}
    assert not check(kind, kwargs, "*The end.*", mode="compat")
    assert check_loose(kind, kwargs, "*The end.*", mode="compat")
    assert check_loose("punctuation:no_comma", {}, "Sure, here it is:\nWarm tea.", mode="compat")
    assert check_loose("punctuation:no_comma", {}, "Warm tea.\nBye, now", mode="compat")
    assert not check_loose("punctuation:no_comma", {}, "Warm, sweet tea.", mode="compat")  # its cuts are empty
    assert not check_loose("punctuation:no_comma", {}, " ")


def test_language_detection_is_thread_safe():
    texts = [d for drafts in DRAFTS.values() for d in drafts] * 3
    expected = [rewards.detect_language.__wrapped__(t) for t in texts]
    found = [None] * len(texts)

    def work(i):
        found[i] = rewards.detect_language.__wrapped__(texts[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


def test_language_detection_equals_langdetect():
    import langdetect

    langdetect.DetectorFactory.seed = 0
    texts = [*DRAFTS["en"], *DRAFTS["zh"], "HELLO WORLD", "Ça va très bien, merci.", "こんにちは世界", "x"]
    assert [rewards.detect_language(t) for t in texts] == [langdetect.detect(t) for t in texts]
    assert rewards.detect_language("123") is None


BAIT = ["[", "(", "*", "**", "<<", "<a>", "{", "\\begin{a}", '"', "***", "a. ", "A.B. ", "?!", "\n", " \n", "p. s. ",
        "Section 1 ", "|", "| a ", "- ", "1. ", "```\n", "茶", "茶。", "$", "\\", ",", "2024-01-01 ", "a:", "#",
        "# a\n", "😀", "\ud800", "\x00", "a" * 60 + "@", "<" + "a" * 25_000, "a|\n" + "-" * 25_000 + "x|"]


def check_everything(text, limit, modes=("unicode", "compat")):
    start = time.perf_counter()
    for kind, constraint in CONSTRAINTS.items():
        for mode in modes if kind in rewards.COMPAT else ("unicode",):
            assert check(kind, constraint.example["kwargs"], text, mode=mode) in (True, False)
    rewards.guards(text, text)
    rewards.parse_response(text)
    rewards.last_boxed(text)
    assert time.perf_counter() - start < limit, repr(text[:80])


@pytest.mark.parametrize("bait", BAIT + ["[" * 9 + "]", "<a></a>", "({[<", '{"a":[', "\n\n"])
def test_bait_is_linear(bait):
    check_everything("warm up: load the tables.", 60)
    check_everything(bait * (26_000 // len(bait)), 8)  # all kinds together; each alone stays below 1 s
    check_everything(bait * (1_000_000 // len(bait)), 8, modes=("unicode",))  # compat has no limit of length


TEXTS = st.one_of(
    st.text(max_size=300),
    st.lists(st.sampled_from(BAIT + ["tea", "is", "<think>", "</answer>", "\\boxed{"]), max_size=60).map("".join),
)


@settings(max_examples=200, deadline=None)
@given(TEXTS)
def test_fuzz(text):
    check_everything(text, 10)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None)
@given(TEXTS)
def test_fuzz_10000(text):
    check_everything(text, 10)


def test_what_a_type_avoids_is_a_tag_or_a_name():
    """A misspelled one, or a whole id, would avoid nothing."""
    rows = rewards.constraint_rows()
    known = {name for i, row in rows.items() for name in (i.partition(":")[2], *row["tags"])}
    assert {i: set(row["avoids"]) - known for i, row in rows.items() if set(row["avoids"]) - known} == {}


@pytest.mark.parametrize("change, message", [
    ({"tags": None}, "field 'tags' is missing"),
    ({"arguments": {"n": ["int"]}}, "argument 'n' is ['int']; write [type, ...]"),
    ({"arguments": {"n": "count"}}, "argument 'n' is 'count'; write [type, ...]"),
    ({"wordings": {"en": ["Use {n}."]}}, "wordings in 'zh' are missing"),
    ({"wordings": {"en": ["Use {m}."], "zh": ["用{n}。"]}}, "a slot that is no argument"),
])
def test_a_mistake_in_a_row_is_named(change, message):
    row = {"id": "content:n", "arguments": {"n": ["count", 2, 4]}, "tags": [], "avoids": [], "example": {},
           "wordings": {"en": ["Use {n}."], "zh": ["用{n}。"]}}
    rewards.check_row(row)
    row = {name: value for name, value in (row | change).items() if value is not None}
    with pytest.raises(InputError, match=re.escape(message)):
        rewards.check_row(row)
