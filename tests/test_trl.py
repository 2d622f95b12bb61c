"""A second implementation agrees: the GRPO loss of TRL on the same tensors, where its settings coincide."""

import pytest
import torch

import grpo
import model as m

pytest.importorskip("trl", reason="needs pip install trl (development only)")


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo"])
def test_loss_and_gradient_equal_those_of_trl(loss, tiny, tmp_path, monkeypatch):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    model, tokenizer = m.load_model(str(tiny))
    settings = GRPOConfig(str(tmp_path), per_device_train_batch_size=6, num_generations=6, beta=0.3, epsilon=0.2,
                          epsilon_high=0.3, loss_type=loss, max_completion_length=9, use_cpu=True, report_to=[],
                          use_bias_correction_kl=False)  # TRL's default multiplies the KL by the ratio
    trainer = GRPOTrainer(model, lambda completions, **_: [0.0] * len(completions), settings,
                          Dataset.from_list([{"prompt": "tea"}] * 6), processing_class=tokenizer)
    trainer.model.eval()  # no division by accumulation steps
    generator = torch.Generator().manual_seed(0)
    logp_BT, old_BT, ref_BT = (-2 * torch.rand(3, 6, 9, generator=generator, dtype=torch.float64)).unbind()
    advantages_B = torch.randn(6, generator=generator, dtype=torch.float64)
    mask_BT = torch.arange(9) < torch.tensor([9, 4, 1, 7, 2, 5])[:, None]
    logp_BT.requires_grad_()
    monkeypatch.setattr(trainer, "_get_per_token_logps_and_entropies",
                        lambda *args, **kwargs: (logp_BT, torch.zeros_like(old_BT), None))
    theirs = trainer._compute_loss(model, {
        "prompt_ids": torch.zeros(6, 2, dtype=torch.long), "prompt_mask": torch.ones(6, 2, dtype=torch.long),
        "completion_ids": torch.zeros(6, 9, dtype=torch.long), "completion_mask": mask_BT.long(),
        "advantages": advantages_B, "old_per_token_logps": old_BT, "ref_per_token_logps": ref_BT})
    ours, _ = grpo.grpo_loss(logp_BT, old_BT, ref_BT, advantages_B, mask_BT, kl_coef=0.3, clip_eps=0.2, clip_high=0.3,
                             weights_BT=grpo.token_weights(mask_BT, loss, len(logp_BT), 0, 9))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(x, logp_BT)[0] for x in (ours, theirs)), rtol=1e-9, atol=1e-12)
