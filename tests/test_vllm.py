"""model.VllmEngine against a strict stand-in: unknown arguments are refused and sleep states are those of the real one.

The stand-in follows vllm 0.32 where RL code goes wrong: a push into a sleeping engine is lost in silence, an engine
woken from level 2 without a push computes with garbage, and a push leaves the old prefix cache in place.
"""

import copy
import inspect
import sys
import types
from types import SimpleNamespace

import pytest
import torch

import model as m


class SamplingParams:
    def __init__(self, *, n=1, temperature=1.0, top_p=1.0, top_k=0, seed=None, stop=None, stop_token_ids=None,
                 max_tokens=16, logprobs=None):
        assert seed is None or 0 <= seed < 2**31
        self.__dict__.update({k: v for k, v in locals().items() if k != "self"})


class FakeLLM:
    """Computes with a transformers model; the weights are noise while none were pushed."""

    source = None  # what "loading the folder" gives
    ignored = ()  # parameters that a push silently leaves out

    def __init__(self, model, *, dtype, distributed_executor_backend, tensor_parallel_size=1,
                 gpu_memory_utilization=0.92, max_model_len=None, enable_sleep_mode=False, generation_config="auto",
                 logprobs_mode="raw_logprobs", seed=0):
        assert distributed_executor_backend == "external_launcher" and enable_sleep_mode
        assert dtype == "bfloat16" and generation_config == "vllm" and logprobs_mode == "processed_logprobs"
        torch.manual_seed(0)  # as the real one does to the trainer's process
        self.own, tokenizer = copy.deepcopy(self.source[0]).float(), self.source[1]
        self.engine = m.Engine(self.own, tokenizer)
        self.awake, self.stale_prefixes, self.calls = {"weights", "kv_cache", "scheduling"}, False, []

    def sleep(self, level=1, mode="abort"):
        assert level in (0, 1, 2) and mode in ("abort", "keep")
        self.calls.append("sleep")
        self.awake = set()
        if level == 2:
            for parameter in self.own.parameters():
                torch.nn.init.normal_(parameter)

    def wake_up(self, tags=None):
        self.calls.append(f"wake {tags}")
        self.awake |= set(tags or ("weights", "kv_cache", "scheduling"))

    def collective_rpc(self, method, timeout=None, args=(), kwargs=None):
        assert method == "reload_weights" and set(kwargs) == {"weights_iterator"}
        self.calls.append("push")
        weights = list(kwargs["weights_iterator"])
        assert all(tensor.dtype == torch.bfloat16 for _, tensor in weights)
        if "weights" in self.awake:  # else the push is lost
            self.own.load_weights = types.MethodType(self._load, self.own)
            self.own.load_weights(weights)
            self.stale_prefixes = True
        return [None]

    def _load(self, own, weights):
        named, loaded = dict(own.named_parameters()), set()
        for name, tensor in weights:
            if name not in self.ignored:
                named[name].data.copy_(tensor)
                loaded.add(name)
        return loaded

    def apply_model(self, function):
        return [function(self.own)]

    def reset_prefix_cache(self):
        self.calls.append("reset")
        self.stale_prefixes = False
        return True

    def generate(self, prompts, sampling_params=None, *, use_tqdm=True, lora_request=None, priority=None):
        assert self.awake == {"weights", "kv_cache", "scheduling"}, "generate on a sleeping engine"
        assert not self.stale_prefixes, "answers would come from the old weights' prefix cache"
        self.calls.append("generate")
        outputs = []
        for prompt, s in zip(prompts, sampling_params, strict=True):
            assert set(prompt) == {"prompt_token_ids"}
            group = self.engine.generate([prompt["prompt_token_ids"]], n=s.n, max_tokens=s.max_tokens,
                                         temperature=s.temperature, stop=s.stop, seeds=[s.seed])[0]
            outputs.append(SimpleNamespace(outputs=[
                SimpleNamespace(text=c.text, token_ids=tuple(c.token_ids), finish_reason=c.finish_reason, logprobs=[
                    {token: SimpleNamespace(logprob=logp, rank=1)}
                    for token, logp in zip(c.token_ids, c.logprobs, strict=True)])
                for c in group]))
        return outputs


@pytest.fixture
def engine(tiny, monkeypatch):
    model, tokenizer = m.load_model(str(tiny))
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=FakeLLM, SamplingParams=SamplingParams))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(FakeLLM, "source", (model, tokenizer))
    state = torch.get_rng_state()
    engine = m.make_engine("vllm", model, tokenizer, source=str(tiny), max_length=64)
    assert torch.equal(torch.get_rng_state(), state)  # the trainer's generator is as before
    return engine, model, tokenizer


def test_a_step_is_wake_sync_generate_sleep(engine):
    engine, model, tokenizer = engine
    for _ in range(2):
        engine.llm.calls.clear()
        engine.wake()
        engine.sync(model)
        groups = engine.generate([[5, 6, 7], [8, 9]], n=[3, 1], max_tokens=6, seeds=[2**62, 1])
        engine.sleep()
        assert [len(group) for group in groups] == [3, 1]
        assert engine.llm.calls == ["wake ['weights']", "push", "wake ['kv_cache', 'scheduling']", "reset", "generate",
                                    "generate", "sleep"]  # the first generate is the probe of the check
        for completion in groups[0]:
            assert 1 <= len(completion.token_ids) == len(completion.logprobs) <= 6
        with torch.no_grad():  # the engine now computes with new weights: they must arrive
            for parameter in model.parameters():
                parameter.mul_(1.1)


def test_a_wrong_order_is_an_error(engine):
    engine, model, _ = engine
    with pytest.raises(RuntimeError, match="sync before wake"):
        engine.sync(model)
    engine.wake()
    with pytest.raises(RuntimeError, match="generate without weights"):
        engine.generate([[5, 6]], max_tokens=2, seeds=[0])
    engine.sync(model)
    engine.sleep()
    engine.wake()
    with pytest.raises(RuntimeError, match="generate without weights"):
        engine.generate([[5, 6]], max_tokens=2, seeds=[0])


def test_weights_that_do_not_arrive_stop_the_run_and_are_named(engine, monkeypatch):
    engine, model, _ = engine
    left_out = next(name for name, _ in model.named_parameters() if "embed" in name)
    monkeypatch.setattr(FakeLLM, "ignored", (left_out,))
    engine.wake()
    with pytest.raises(m.InputError, match=f"nats a token.*not loaded: {left_out}"):
        engine.sync(model)


def test_the_engine_needs_torchrun_and_vllm(tiny, monkeypatch):
    model, tokenizer = m.load_model(str(tiny))
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(m.InputError, match="requirements-gpu.txt"):
        m.make_engine("vllm", model, tokenizer, source=str(tiny), max_length=64)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=FakeLLM, SamplingParams=SamplingParams))
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(m.InputError, match="torchrun"):
        m.make_engine("vllm", model, tokenizer, source=str(tiny), max_length=64)


def test_both_engines_have_the_same_interface():
    for name in ("generate", "sync", "sleep", "wake"):
        ours, theirs = (inspect.signature(getattr(cls, name)) for cls in (m.Engine, m.VllmEngine))
        assert ours == theirs.replace(return_annotation=ours.return_annotation), name
