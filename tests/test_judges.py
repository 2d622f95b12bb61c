"""Judges: the local one against two full conversations of every question, the served one against scripted replies."""

import random
from types import SimpleNamespace

import pytest
import torch
from conftest import build_model, build_tokenizer

import model as m


@pytest.fixture(scope="module")
def judge_model():
    # in the second tokenizer the replies are several tokens each
    tokenizers = build_tokenizer(["yes no yes no is the tea warm"] * 9, 400), build_tokenizer(["abc"], 258)
    return [(build_model(len(tokenizer), seed=3), tokenizer) for tokenizer in tokenizers]


@pytest.mark.parametrize("which", [0, 1])
def test_local_judge_equals_two_full_conversations(judge_model, which):
    model, tokenizer = judge_model[which]
    judge = m.LocalJudge(model, tokenizer, budget=300)
    assert [len(reply) == 1 for reply in judge.replies] == [which == 0] * 2
    rng = random.Random(0)
    words = "tea warm cup water good leaf".split()
    items = []
    for _ in range(8):
        answer = " ".join(rng.choices(words, k=rng.randint(1, 30)))
        items += [("Write.", answer, f"Is {rng.choice(words)} {n} there?") for n in range(rng.randint(1, 5))]
    items.append(("写一段话。", "茶很香。", "语气是否正式？"))
    rng.shuffle(items)

    def reply_logprob(item, reply):
        prompt = judge._prompt_ids(*item)
        with torch.no_grad():
            logp_TV = model(torch.tensor([prompt + reply])).logits[0].log_softmax(-1)
        return sum(logp_TV[len(prompt) + i - 1, token].item() for i, token in enumerate(reply))

    slow = [reply_logprob(item, judge.replies[0]) > reply_logprob(item, judge.replies[1]) for item in items]
    assert judge(items) == slow and judge.asked == len(items) and judge.truncated == 0


def test_local_judge_never_cuts_the_question(judge_model):
    model, tokenizer = judge_model[0]
    judge = m.LocalJudge(model, tokenizer, max_tokens=400)
    answer = "start " + "tea " * 500 + "finish"
    items = [("Write about it.", answer, question) for question in ("Is the tea warm?", "Is it polite and long?")]
    assert len(judge(items)) == 2 and judge.truncated == 1
    for ids, (*_, question) in zip(judge._fit(*items[0][:2], [q for *_, q in items]), items, strict=True):
        text = tokenizer.decode(ids)
        assert len(ids) < 400 and question in text and "start" in text and "finish" in text and "…" in text
    with pytest.raises(ValueError, match="question"):
        judge([("a", "b", "Is it " + "very " * 400 + "long?")])


def test_endpoint_judge():
    replies = {"q1": "Yes.", "q2": "no, it is not", "q3": "是", "q4": "perhaps", "q5": None,
               "q6": "<think>no?</think>\nyes", "q7": "yes and no", "q8": "否", "q9": "The answer is no."}

    def chat(conversations, *, n, max_tokens, temperature, stop, seed):
        assert (n, temperature) == (1, 0.0)
        texts = [replies[c[-1]["content"].rsplit(None, 1)[-1]] for c in conversations]
        return [[SimpleNamespace(text=t)] if t is not None else [] for t in texts]

    judge = m.EndpointJudge(chat)
    items = [("Write {answer}.", "Tea {question}", q) for q in replies]
    assert judge(items) == [True, False, True, False, False, True, True, False, False]
    assert judge.asked == 9 and judge.unreadable == 2
    top = [{" Yes": -0.1, "No": -2.0, "yes": -5.0}]
    assert m.read_verdict(SimpleNamespace(text="No", top_logprobs=top)) is True
    top = [{"Yes": -2.0, "no": -0.1}]
    assert m.read_verdict(SimpleNamespace(text="Yes", top_logprobs=top)) is False
    assert m.read_verdict(SimpleNamespace(text="No", top_logprobs=[{"maybe": -1.0}])) is False
    said = {"是否符合要求：否": False, "是否满足？不满足": False, "是否提到茶？是": True, "满足": True, "不符合": False,
            "不": False, "不。": False, "未完全满足要求": False, "内容不长，是": True, "无法判断": None,
            "not yes": False, "Not yes.": False, "Yes or no: no": False, "是/否：是": True, "Perhaps not": None,
            "符合要求": True, "Yes, it does not rhyme": True, "No, yes would be wrong": False}
    assert {text: m.read_verdict(SimpleNamespace(text=text)) for text in said} == said


def test_judge_prompt_keeps_braces_apart():
    text = m.judge_prompt("Use {answer} and {x}.", "A {question}", "Is it?")
    assert "Use {answer} and {x}." in text and "A {question}" in text and text.rstrip().endswith("Is it?")
    assert m.judge_prompt("写", "茶", "是否正式？").startswith("请")
    english = m.judge_prompt("写", "茶", "Is 茶 named in it?")  # more than half must be Chinese
    assert english == m.judge_prompt("写", "茶", "Is it?").replace("Is it?", "Is 茶 named in it?")
    assert m.judge_prompt("写", "茶", "是否提到 tea？").startswith("请")
