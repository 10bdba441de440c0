"""The loss in the head of real architectures equals the loss from their logits, or the head is refused."""

import copy
from dataclasses import dataclass

import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from dft.loss.from_logits import count_terms, dft_loss_sum
from dft.loss.fused import LogitTransform
from dft.loss.head import LossHead, UnsupportedHead
from dft.loss.token_weight import TokenWeight
from examples.make_tiny_model import make_model
from tests.helpers import change_of_weights, relative_error

SMALL = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
ARCHITECTURES = {
    "Qwen2": {},
    "Qwen3 tied": {"tie_word_embeddings": True},
    "Llama": {},
    "Gemma2": {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "Gemma3": {"final_logit_softcapping": None, "query_pre_attn_scalar": 8},
    "Granite": {"logits_scaling": 6.0},
    "Cohere": {"logit_scale": 0.3},
    "Mistral": {"bias": True},
    "Mixtral": {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.1},
}


def model_of(name: str, **more) -> transformers.PreTrainedModel:
    kind, *tied = name.split()
    settings = {**SMALL, "tie_word_embeddings": bool(tied), **ARCHITECTURES[name], **more}
    has_bias = settings.pop("bias", False)
    config_name = "Gemma3TextConfig" if kind == "Gemma3" else f"{kind}Config"
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(**settings)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    if has_bias:
        model.lm_head = torch.nn.Linear(SMALL["hidden_size"], SMALL["vocab_size"])
    return model.train()


def batch(vocab_size: int = 120) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, vocab_size, (3, 20), generator=generator)
    labels = ids.clone()
    labels[torch.rand(3, 20, generator=generator) < 0.5] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def both_ways(model, check: bool = True) -> tuple[LossHead, dict[str, tuple]]:
    """Loss and gradients from logits and in the head."""
    head = LossHead(model, chunk_mb=7 * 4 * 120 / 1e6)
    inputs = batch()
    labels = inputs.pop("labels")
    found = {}
    for way in ("logits", "head"):
        model.zero_grad(set_to_none=True)
        if way == "logits":
            loss, tokens = dft_loss_sum(model(**inputs).logits, labels, TokenWeight(0.7))
        else:
            with head.computing(labels, TokenWeight(0.7)) as result:
                outputs = model(**inputs)
            if check:
                head.check(outputs.logits)
            loss, tokens = result.take(outputs.logits)
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found[way] = (loss.detach(), tokens, gradients)
    return head, found


def assert_same(found: dict[str, tuple]) -> None:
    (loss, tokens, gradients), (expected, theirs, expected_gradients) = found["head"], found["logits"]
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(tokens.p_correct, theirs.p_correct, rtol=1e-4, atol=1e-7)
    assert tokens.is_top1.tolist() == theirs.is_top1.tolist()
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        assert relative_error(gradients[name], gradient) < 1e-5, name


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_loss_in_the_head_equals_that_from_logits(name):
    head, found = both_ways(model_of(name))
    assert head.wrapping == ""
    assert_same(found)


def test_an_unknown_change_of_the_logits_is_found(monkeypatch):
    """Here Gemma's, as if its name in the configuration weren't known."""
    monkeypatch.setattr("dft.loss.head.logit_transform", lambda config: LogitTransform())
    with pytest.raises(UnsupportedHead, match="changes its logits"):
        both_ways(model_of("Gemma2"))
    _, found = both_ways(model_of("Gemma2"), check=False)
    with pytest.raises(AssertionError):
        assert_same(found)


def test_a_cut_vocabulary_is_found():
    head = LossHead(model_of("Qwen2"), chunk_mb=1)
    with pytest.raises(UnsupportedHead, match="changes its logits"):
        head.check(torch.linspace(-40.0, 40.0, 120)[None, None, :119])
    head.check(torch.linspace(-40.0, 40.0, 120)[None, None])


def lora(model, *targets: str):
    torch.manual_seed(1)
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=list(targets), lora_dropout=0.0))
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:  # zero at first
            torch.nn.init.normal_(parameter, std=0.2)
    return peft


@pytest.mark.parametrize(
    ("targets", "wrapping"), [(["q_proj"], ""), (["q_proj", "lm_head"], "the head has an adapter")]
)
def test_adapters_get_the_gradient_from_logits(targets, wrapping):
    model = lora(model_of("Qwen2"), *targets)
    head, found = both_ways(model)
    assert head.wrapping == wrapping
    assert_same(found)
    assert any("lora_B" in name for name in found["head"][2])
    assert not any("base_layer" in name for name in found["head"][2])


def test_hooks_of_the_head_are_honored():
    model = model_of("Llama")
    model.lm_head.register_forward_hook(lambda module, inputs, output: output * 2)
    head, found = both_ways(model)
    assert head.wrapping == "the head has hooks"
    assert_same(found)


@pytest.mark.parametrize("targets", [[], ["lm_head"]])
def test_checkpointing_of_activations_keeps_loss_and_gradient(targets):
    model = model_of("Qwen3 tied") if not targets else lora(model_of("Qwen2"), *targets)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    assert_same(both_ways(model)[1])


@pytest.mark.parametrize("wrap", [False, True])
def test_the_model_is_left_as_it_was(wrap):
    model = lora(model_of("Qwen2"), "lm_head") if wrap else model_of("Qwen2")
    other = copy.deepcopy(model)
    inputs = batch()
    labels = inputs.pop("labels")
    before = model(**inputs).logits
    head = LossHead(model, chunk_mb=1)
    with head.computing(labels, TokenWeight()):
        assert other(**inputs).logits.shape == before.shape
        model(**inputs)
    with pytest.raises(UnsupportedHead, match="hidden states of"), head.computing(labels[:, 1:], TokenWeight()):
        model(**inputs)
    torch.testing.assert_close(model(**inputs).logits, before, rtol=1e-5, atol=1e-5)
    assert model.state_dict().keys() == other.state_dict().keys()
    assert not any("lm_head" in vars(module) for module in model.modules())


def test_a_model_that_does_not_call_its_head_is_found():
    model = model_of("Qwen2")
    head = LossHead(model, chunk_mb=1)
    with head.computing(batch()["labels"], TokenWeight()) as result:
        model.model(batch()["input_ids"])
    with pytest.raises(UnsupportedHead, match="doesn't call"):
        result.take(torch.zeros(1))


# ---- in the trainer -----------------------------------------------------------------------------


@dataclass
class Trained:
    """What two steps of plain SGD leave, whose change of the weights is the sum of two gradients."""

    change: torch.Tensor  # of all weights, [P]
    records: list[dict]
    evaluation: dict[str, float]


def train_two_steps(make_trainer, fused_loss: str, **settings) -> Trained:
    model = make_model(600, 32, 2)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(8.0)  # so that tokens differ in their probability, and thus in weight
    trainer = make_trainer(
        model,
        fused_loss=fused_loss,
        loss_chunk_mb=0.01,
        optim="sgd",
        learning_rate=0.5,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
        **settings,
    )
    change = change_of_weights(trainer)
    records = [r for r in trainer.state.log_history if "grad_norm" in r]
    return Trained(change, records, trainer.evaluate())


SETTINGS = [
    {"dft_alpha": 0.7},
    {"dft_alpha": 0.7, "loss_normalization": "turn"},
    {"dft_alpha": 0.9, "dft_gamma": 0.5, "dft_floor": 0.2},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_training_and_evaluation_are_those_from_logits(make_trainer, settings):
    found, expected = (train_two_steps(make_trainer, fused, **settings) for fused in ("on", "off"))
    assert relative_error(found.change, expected.change) < 1e-5
    for ours, theirs in zip(found.records, expected.records, strict=True):
        for key in ("loss", "ce_loss", "grad_norm", "train/avg_p_correct"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5), key
    for key in ("eval_loss", "eval_ce_loss", "eval_avg_p_correct", "eval_acc", "eval_perplexity"):
        assert found.evaluation[key] == pytest.approx(expected.evaluation[key], rel=1e-5), key


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_comparison_of_trainings_rejects_mutants(make_trainer, monkeypatch, settings):
    """Weights of other tokens, and a setting that doesn't reach the loss."""
    expected = train_two_steps(make_trainer, "off", **settings)
    *others, _ = settings.items()
    ignoring = train_two_steps(make_trainer, "on", **dict(others))
    call = TokenWeight.__call__
    monkeypatch.setattr(TokenWeight, "__call__", lambda self, tokens: call(self, tokens).roll(1))
    mixed = train_two_steps(make_trainer, "on", **settings)
    for mutant in (ignoring, mixed):
        assert relative_error(mutant.change, expected.change) > 1e-3
        assert mutant.records[0]["loss"] != pytest.approx(expected.records[0]["loss"], rel=1e-3)


def test_evaluation_makes_no_logits(make_trainer, monkeypatch):
    trainer = make_trainer(fused_loss="on")
    seen = []
    score = trainer.scorer.score
    monkeypatch.setattr(trainer.scorer, "score", lambda *args: seen.append(args[-1]) or score(*args))
    trainer.evaluate()
    assert set(seen) == {False}  # needs_logits
    seen.clear()
    assert trainer.predict(trainer.eval_dataset).predictions.shape[-1] == 600
    assert set(seen) == {True}


def test_an_unknown_head_is_used_through_its_logits_or_refused(make_trainer, monkeypatch, caplog):
    monkeypatch.setattr("dft.loss.head.logit_transform", lambda config: LogitTransform(0.5))
    expected = make_trainer(fused_loss="off").evaluate()
    trainer = make_trainer(fused_loss="auto")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)
    assert "changes its logits in a way that is not known" in caplog.text
    assert trainer.scorer.head is None
    with pytest.raises(UnsupportedHead, match="fused_loss is on, but the model changes its logits"):
        make_trainer(fused_loss="on").evaluate()


def test_router_losses_are_added_as_the_model_would(make_trainer):
    """The mean over micro-batches, whatever their number."""
    data = Dataset.from_dict({k: v.tolist() for k, v in batch().items()}).repeat(2)
    model = model_of("Mixtral")
    inputs = data.with_format("torch")[:3]
    own = model(**{k: inputs[k] for k in ("input_ids", "attention_mask", "labels")})
    gate = model.model.layers[0].mlp.gate.weight
    expected, of_router = (torch.autograd.grad(x, gate, retain_graph=True)[0] for x in (own.loss, own.aux_loss))
    without = expected - model.config.router_aux_loss_coef * of_router
    for accumulation in (1, 2):
        trainer = make_trainer(
            copy.deepcopy(model),
            dft_alpha=0.0,
            max_steps=1,
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
            gradient_accumulation_steps=accumulation,
            per_device_train_batch_size=3,
            train_sampling_strategy="sequential",
        )
        trainer.train_dataset = data
        trainer.train()
        change = model.model.layers[0].mlp.gate.weight - trainer.model.model.layers[0].mlp.gate.weight
        assert relative_error(change, expected) < 1e-4
        assert relative_error(change, without) > 1e-3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run(make_trainer, bad):
    """Before the step is made, with the rows of the micro-batch."""
    trainer = make_trainer(
        model_of("Qwen2", vocab_size=600),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=4,
        train_sampling_strategy="sequential",
        source_of_row="chats.jsonl:{}".format,
    )
    rows_seen = [set(trainer.train_dataset[i]["input_ids"]) for i in range(8)]
    token = next(iter(rows_seen[6] - set.union(*rows_seen[:6])))  # the second step's second micro-batch
    with torch.no_grad():
        trainer.model.get_input_embeddings().weight[token] = bad
    head = trainer.model.lm_head.weight
    before = head.clone()
    with pytest.raises(FloatingPointError) as error:
        trainer.train()
    assert "in step 2. The rows of its batch: chats.jsonl:6, chats.jsonl:7." in str(error.value)
    assert trainer.state.global_step == 1
    assert torch.isfinite(head).all()
    assert not torch.equal(head, before)  # the first step was made


def test_alpha_rises_to_its_value_during_the_warm_up(make_trainer):
    trainer = make_trainer(dft_alpha=0.8, dft_alpha_warmup_ratio=0.5, max_steps=8, learning_rate=0.0)
    trainer.train()
    records = [r for r in trainer.state.log_history if "grad_norm" in r]
    assert [r["train/dft_alpha"] for r in records] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 0.8, 0.8, 0.8])
    assert records[0]["loss"] == pytest.approx(records[0]["ce_loss"], rel=1e-5)
    assert records[4]["loss"] < 0.5 * records[4]["ce_loss"]


def test_plain_tokens_are_learned_at_alpha_1(make_trainer):
    """With p near 0, DFT gives no gradient; plain tokens get that of cross-entropy."""
    every = tuple(range(600))
    plain = make_trainer(dft_alpha=1.0, plain_tokens=every, max_steps=1)
    plain.train()
    record = next(r for r in plain.state.log_history if "grad_norm" in r)
    assert record["loss"] == pytest.approx(record["ce_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dft_gamma": 0.0}, "gamma"),
        ({"dft_floor": 2.0}, "floor"),
        ({"dft_alpha_warmup_ratio": 1.5}, "dft_alpha_warmup_ratio"),
        ({"loss_normalization": "row"}, "loss_normalization"),
        ({"loss_chunk_mb": 0.0}, "loss_chunk_mb"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make_trainer, settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(**settings)


def test_turns_weigh_the_same(make_trainer):
    """One turn of one token and one of nine: each has half of the loss, however the batch is cut."""
    ids = list(range(3, 15))
    labels = [[-100] * 3 + [ids[3]] + [-100] * 8, [-100] * 3 + ids[3:]]
    data = Dataset.from_dict({"input_ids": [ids, ids], "labels": labels})
    losses = []
    for size in (1, 2):
        trainer = make_trainer(dft_alpha=0.0, loss_normalization="turn", per_device_eval_batch_size=size)
        losses.append(trainer.evaluate(data)["eval_loss"])
    single = [trainer.evaluate(data.select([i]))["eval_ce_loss"] for i in range(2)]
    assert losses == pytest.approx([sum(single) / 2] * 2, rel=1e-5)
    assert losses[0] != pytest.approx((single[0] + 9 * single[1]) / 10, rel=1e-3)  # the mean over tokens
    assert int(count_terms(torch.tensor(labels), "turn")) == 2


def test_special_tokens_need_the_tokenizer(make_trainer):
    with pytest.raises(ValueError, match="give it as processing_class"):
        make_trainer(dft_special_tokens="ce")
