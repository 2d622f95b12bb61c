"""sft.py against values computed by hand: what is trained on, what a loss is the mean of, which order things have."""

import random

import pytest
import torch
from conftest import make_records, run_stage, write_records

import model as m
import sft


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """Two epochs of three updates, one of them smaller; (config, train rows, validation rows, metrics, folder)."""
    folder = tmp_path_factory.mktemp("sft")
    records = make_records(12)
    for i, record in enumerate(records):  # experts of different lengths
        record["expert"] = record["expert"].replace("i use", "i use " + "red and " * i)
    data = write_records(folder / "d.jsonl", records)
    cfg = sft.Config(records=str(data), model=str(tiny), epochs=2, batch_size=4, val_share=0.2, lr=1e-3, warmup=0.0)
    flags = ["--records", data, "--model", tiny, "--epochs", 2, "--batch-size", 4, "--val-share", 0.2, "--lr", 1e-3,
             "--warmup", 0.0, "--precision", "fp32", "--micro-tokens", 60]
    run_stage("sft.py", *flags, "--out", folder / "run")
    train, val = sft.load_examples(cfg, m.load_model(str(tiny))[1])
    return cfg, train, val, m.read_jsonl(folder / "run" / "metrics.jsonl"), folder / "run"


def token_losses(model, example) -> list[float]:
    """−log p of each response token, by the model's own logits."""
    with torch.no_grad():
        logp_TV = model(torch.tensor([example.ids])).logits[0].log_softmax(-1)
    return [-logp_TV[t - 1, example.ids[t]].item() for t in range(example.start, len(example.ids))]


def mean(values):
    return sum(values) / len(values)


def batch_of(cfg, train, step):
    """The examples of an update, found by their token count in the log: an order of its own in every epoch."""
    epoch, position = divmod(step, 3)
    order = random.Random(f"{cfg.seed}/{epoch}").sample(range(len(train)), len(train))
    return [train[i] for i in order[4 * position : 4 * position + 4]]


def test_validation_rows_are_not_trained_on(trained):
    _, train, val, metrics, _ = trained
    assert (len(train), len(val)) == (10, 2) and not {tuple(e.ids) for e in train} & {tuple(e.ids) for e in val}
    epochs = [[row["loss/tokens"] for row in metrics[:3]], [row["loss/tokens"] for row in metrics[3:]]]
    assert sum(epochs[0]) == sum(epochs[1]) == sum(len(e.ids) - e.start for e in train)
    assert len(metrics) == 6


def test_the_loss_is_the_mean_over_the_response_tokens_of_the_batch(trained, tiny):
    cfg, train, _, metrics, _ = trained
    model, _ = m.load_model(str(tiny))
    losses = [loss for example in batch_of(cfg, train, 0) for loss in token_losses(model, example)]
    assert len({len(e.ids) - e.start for e in batch_of(cfg, train, 0)}) > 1  # of unequal length: no mean of means
    assert metrics[0]["loss/train"] == pytest.approx(mean(losses), rel=1e-4)
    assert metrics[0]["loss/tokens"] == len(losses)


def test_the_validation_loss_is_the_token_mean_of_the_model_that_is_kept(trained):
    _, _, val, metrics, run = trained
    model, _ = m.load_model(str(run / "model"))
    losses = [loss for example in val for loss in token_losses(model, example)]
    assert min(row["loss/val"] for row in metrics if "loss/val" in row) == pytest.approx(mean(losses), rel=1e-4)
    assert metrics[2]["kept"] is True


def test_every_epoch_has_an_order_of_its_own(trained):
    cfg, train, _, metrics, _ = trained
    assert [row["loss/tokens"] for row in metrics[:3]] != [row["loss/tokens"] for row in metrics[3:]]
    for step, row in enumerate(metrics):
        assert row["loss/tokens"] == sum(len(e.ids) - e.start for e in batch_of(cfg, train, step))
