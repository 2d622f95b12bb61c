"""Stage 1 with a scripted draft writer: what is kept is right, the split is clean, the run is repeatable."""

import json
import random

import pytest

import evolve
from rewards import CONSTRAINTS, InputError, check, read_records, render, score

OPENINGS = [
    "A calm morning is the best time to begin with this.",
    "Most people find that a little patience helps here.",
    "My neighbour once showed me a simple and cheap solution.",
    "There are many ways to look at this small question.",
]
MIDDLES = [
    "First, gather what is on the table, and keep the window open.",
    "The garden, the kitchen and the old street all play their part in it.",
    "A good friend can share the work, so the whole day feels lighter.",
    "Warm water and a soft cloth are often enough for the task.",
]
ENDINGS = ["In the evening, everything looks bright again.", "Later you will be glad that you took the time."]


def fake_drafts(requests, seeds):
    """Three plain sentences per request, the same for the same seed; every ninth draft is a list (to be dropped)."""
    texts = []
    for seed in seeds:
        rng = random.Random(seed)
        texts.append(
            " ".join(rng.choice(part) for part in (OPENINGS, MIDDLES, ENDINGS)) if seed % 9 else "- a\n- b\n- c"
        )
    return texts


@pytest.fixture(scope="module")
def run_evolve(tmp_path_factory):
    def run(name, *flags, generator=fake_drafts):
        folder = tmp_path_factory.mktemp(name)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(evolve, "local_generator", lambda cfg: generator)
            evolve.main(["--out", str(folder), *flags])
        return folder

    return run


@pytest.fixture(scope="module")
def folder(run_evolve):
    return run_evolve("en", "--limit", "60")


@pytest.fixture(scope="module")
def files(folder):
    return read_records(folder / "train.jsonl"), read_records(folder / "heldout.jsonl")


def test_every_expert_scores_three(files):
    for records in files:
        assert [s.total for s in score(records, [r["expert"] for r in records])] == [3.0] * len(records)


def test_ood_kinds_never_train(files):
    train, heldout = files
    assert len(set(evolve.OOD_KINDS)) >= 5 and set(evolve.OOD_KINDS) < set(CONSTRAINTS)
    trained = {c["id"] for r in train for c in r.get("constraints", [])}
    assert trained and not trained & set(evolve.OOD_KINDS)
    for record in heldout:
        assert record["ood"] == any(c["id"] in evolve.OOD_KINDS for c in record["constraints"])
    assert {record["ood"] for record in heldout} == {True, False}


def test_split_shares_no_request_and_no_wording(files):
    instructions = [[r for r in records if r["task"] == "instruction"] for records in files]
    seeds = [{r["seed"] for r in records} for records in instructions]
    assert seeds[0] and seeds[1] and not seeds[0] & seeds[1]
    for record in instructions[0] + instructions[1]:
        for c in record["constraints"]:
            total = len(CONSTRAINTS[c["id"]].wordings[record["language"]])
            reserved = range(total - max(1, total // 3), total)
            texts = {render(c["id"], c["kwargs"], record["language"], v) for v in reserved}
            assert (c["text"] in texts) == ("ood" in record)


def test_instruction_states_request_and_every_constraint(files):
    requests = {s["id"]: s["text"] for s in evolve.read_seeds(evolve.Config())}
    for record in [r for records in files for r in records if r["task"] == "instruction"]:
        instruction = record["messages"][0]["content"]
        assert requests[record["seed"]] in instruction
        for c in record["constraints"]:
            assert c["text"].rstrip(".")[1:] in instruction
        kinds = [c["id"] for c in record["constraints"]]
        assert 1 <= len(kinds) == len(set(kinds)) <= 3


def test_math_ratio(files):
    train, heldout = files
    math = sum(r["task"] == "math" for r in train)
    assert math == round(0.2 * (len(train) - math))
    assert all(r["task"] == "instruction" for r in heldout)


def test_same_seed_same_files_and_finished_drafts_are_kept(run_evolve, folder, monkeypatch):
    again = run_evolve("again", "--limit", "60")
    other = run_evolve("other", "--limit", "60", "--seed", "1")
    names = ["train.jsonl", "heldout.jsonl", "drafts.jsonl", "report.md", "metrics.jsonl"]
    before = [(folder / name).read_bytes() for name in names]
    assert [(again / name).read_bytes() for name in names] == before
    assert (other / "train.jsonl").read_bytes() != before[0]
    monkeypatch.setattr(evolve, "local_generator", lambda cfg: pytest.fail("drafts were written twice"))
    evolve.main(["--out", str(folder), "--limit", "60"])
    assert [(folder / name).read_bytes() for name in names] == before


def test_chinese(run_evolve):
    train = [
        r for r in read_records(run_evolve("zh", "--language", "zh") / "train.jsonl") if r["task"] == "instruction"
    ]
    assert len(train) > 30 and {r["language"] for r in train} == {"zh"}
    for record in train:
        answer = record["expert"].split("<answer>\n")[1].removesuffix("\n</answer>")
        assert all(check(c["id"], c["kwargs"], answer) for c in record["constraints"])


def test_near_duplicates_are_dropped_and_counted():
    texts = [
        "Write a short note about the old bridge in our town, please.",
        "Write a short note about the old bridge in our town please!",
        "Write a short note about the old bridge in our town, thanks.",
        "How do bees make honey?",
    ]
    funnel = {"requests": evolve.Counter()}
    kept = evolve.drop_duplicates([{"text": text} for text in texts], funnel)
    assert [seed["text"] for seed in kept] == [texts[0], texts[3]]
    assert funnel["requests"] == {"exact duplicate": 1, "near duplicate": 1, "kept": 2}


@pytest.mark.parametrize(
    "text, expected",
    [
        (
            "One plain sentence stands here with enough words. And it never ends",
            "One plain sentence stands here with enough words.",
        ),
        (
            "I asked Mrs. Miller about the old tree near the station.",
            "I asked Mrs. Miller about the old tree near the station.",
        ),
        ("A tale, a tale, a tale, a tale, a tale, a tale, a tale.", None),
        ("Here is a list:\n1. One thing.\n2. Another thing.", None),
        ("As an AI, there is nothing that I would like to say about that.", None),
    ],
)
def test_cut_draft(text, expected):
    draft, reason = evolve.cut_draft(text, "en", 45)
    assert draft == expected and (draft is None) == bool(reason)


@pytest.mark.parametrize(
    "lines, message",
    [
        ([], "no requests"),
        (["{"], ":1: is not JSON"),
        ([{"id": "a", "language": "en", "text": "Why?"}, {"id": "b", "language": "en"}], ":2: field 'text'"),
        ([{"id": "a", "language": "fr", "text": "Pourquoi ?"}], ":1: field 'language'"),
        ([{"id": "a", "language": "zh", "text": "为什么？"}], ":1: field 'draft'"),
        ([{"id": "a", "language": "en", "text": "Why?"}] * 2, ":2: field 'id'"),
    ],
)
def test_bad_seed_line_is_named(tmp_path, lines, message):
    path = tmp_path / "seeds.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), "utf-8")
    with pytest.raises(InputError, match=message):
        evolve.read_seeds(evolve.Config(seeds=str(path)))
