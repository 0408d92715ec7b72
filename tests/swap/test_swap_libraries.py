"""swap: swapped models under transformers' Trainer, peft and accelerate do what unswapped ones do."""

from __future__ import annotations

import copy

import fastlm
import pytest
import torch

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
ROWS = 16


class Tokens(torch.utils.data.Dataset):
    def __init__(self):
        self.rows = torch.randint(3, 50, (ROWS, 12), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return ROWS

    def __getitem__(self, i):
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


def llama(**options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, **options,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def served(report):
    return sum(row.ran > 0 and row.now == "attention" and not row.why for row in report.seen)


def trained(model, folder, **options):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1,
        report_to=[], save_strategy="no", use_cpu=True, seed=0, disable_tqdm=True, **options,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Tokens())
    trainer.train()
    return torch.tensor([row["loss"] for row in trainer.state.log_history if "loss" in row])


@pytest.mark.grid(fast=2)
@pytest.mark.parametrize("reentrant", [None, False, True], ids=["kept", "checkpointed", "reentrant"])
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_trainer_follows_the_unswapped_models_losses(bf16, reentrant, tmp_path):
    pytest.importorskip("accelerate")
    options = {"bf16": bf16, "gradient_checkpointing": reentrant is not None}
    if reentrant is not None:
        options["gradient_checkpointing_kwargs"] = {"use_reentrant": reentrant}
    original, swapped = llama(), llama()
    report = fastlm.swap(swapped)
    losses = [trained(model, tmp_path, **options) for model in (swapped, original)]
    assert served(report) == 2
    tolerance = 2e-2 if bf16 else 1e-3
    torch.testing.assert_close(*losses, rtol=tolerance, atol=tolerance)
    for mine, theirs in zip(swapped.parameters(), original.parameters(), strict=True):
        assert (mine - theirs).abs().mean() < (2e-3 if bf16 else 1e-4)


@pytest.mark.parametrize("order", ["swap first", "peft first"])
def test_lora_trains_as_it_does_unswapped(order):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=True, task_type="CAUSAL_LM")
    results = []
    for swap in (True, False):
        model, report = llama(), None
        if swap and order == "swap first":
            report = fastlm.swap(model)
        torch.manual_seed(1)
        model = peft.get_peft_model(model, config)
        if swap and order == "peft first":
            report = fastlm.swap(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        tokens = Tokens().rows[:4]
        for _ in range(3):
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert report is None or served(report) == 2
        merged = model.merge_and_unload()
        results.append((loss, merged(input_ids=tokens).logits))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("order", ["swap first", "hooks first"])
def test_offloaded_layers_run_the_ops(order):
    accelerate = pytest.importorskip("accelerate")
    original = llama().eval()
    swapped = copy.deepcopy(original)
    tokens = Tokens().rows[:3]
    expected = original(tokens).logits
    report = fastlm.swap(swapped) if order == "swap first" else None
    accelerate.cpu_offload(swapped, execution_device="cpu")
    report = report or fastlm.swap(swapped)
    with torch.no_grad():
        got = swapped(tokens).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert served(report) == 2
    assert fastlm.unswap(swapped) > 0
    with torch.no_grad():
        assert torch.equal(swapped(tokens).logits, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    """With dropout in attention: the forward that is run again draws the same masks."""
    models = [llama(attention_dropout=0.3).train() for _ in range(2)]
    tokens = Tokens().rows[:4]
    grads = []
    for model, checkpointed in zip(models, (True, False), strict=True):
        fastlm.swap(model)
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        fastlm.rng.set(model, 1, 2, [0, 1, 2, 3])
        model(input_ids=tokens, labels=tokens).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)
