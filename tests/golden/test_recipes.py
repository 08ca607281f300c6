"""Recipes: the published values as spec 6.2 lists them, what they refuse, and how single settings are changed."""

import math

import pytest

from small_runs import recipe
from yuanmoe.checkpoint.adapters.adapter import active_lora_parameters, adaptable_matrices
from yuanmoe.errors import ConfigError, UsageError
from yuanmoe.model.lora.targets import num_parameters, targets
from yuanmoe.plan import cost
from yuanmoe.presets import preset
from yuanmoe.train.recipe.recipe import BalanceSettings
from yuanmoe.train.recipe.recipes import RECIPES, named
from yuanmoe.train.recipe.settings import differences, flat, override
from yuanmoe.train.steps.meter import flops_per_token
from yuanmoe.train.steps.schedule import learning_rate, spent


def test_m32_pretraining_is_the_published_one():
    made = named("m32-pretrain")
    steps = made.schedule.max_tokens / made.data.tokens_per_step
    assert (made.data.sequence_length, made.data.batch_size, made.data.micro_batch_size) == (4096, 1536, 2)
    assert steps == 318_000
    assert made.schedule.max_tokens / 1e9 == pytest.approx(2000.7, abs=0.05)
    assert made.schedule.warmup * steps == pytest.approx(6_400)
    rates = [made.optimizer.learning_rate * learning_rate(made.schedule, share) for share in (0.0, 6400 / 318e3, 1.0)]
    assert rates == pytest.approx([0, 1e-4, 1e-5])
    assert made.schedule.shape == "cosine"
    assert (made.model.rope_theta, made.model.attention_dropout, made.model.packing) == (10_000, 0.1, "megatron")
    assert sum(cost.parameters(made.model).values()) == 39_942_842_368


def test_m32_fine_tuning_is_the_published_one():
    made = named("m32-sft")
    assert (made.data.sequence_length, made.data.batch_size, made.data.micro_batch_size) == (16_384, 1152, 1)
    assert made.schedule.max_tokens / made.data.tokens_per_step == 4_220
    rates = [made.optimizer.learning_rate * learning_rate(made.schedule, share) for share in (0.0, 0.5, 1.0)]
    assert rates == pytest.approx([8e-5] * 3)
    assert made.model.rope_theta == 40_890


@pytest.mark.parametrize("name", ["ablation-826m", "m32-pretrain", "m32-sft"])
def test_what_all_published_runs_share(name):
    made = named(name)
    optimizer = made.optimizer
    assert (optimizer.betas, optimizer.weight_decay, optimizer.gradient_clip) == ((0.9, 0.95), 0.1, 1.0)
    assert (optimizer.embedding_rate, optimizer.head_rate) == (1.0, 1.0)
    assert made.balance == BalanceSettings(auxiliary_loss=0.0, z_loss=0.0, bias_rate=0.0)
    assert (made.run.dtype, made.run.activation_checkpointing, made.run.embedding_std) == ("bfloat16", True, None)
    assert made.model.initializer_range == 0.02


def test_the_ablation_has_the_counts_of_table_1():
    made = named("ablation-826m")
    counts = {
        router: sum(cost.parameters(made.model.replace(router=router)).values()) for router in ("attention", "linear")
    }
    assert {router: f"{count / 1e6:.1f}" for router, count in counts.items()} == {
        "attention": "826.0",
        "linear": "825.8",
    }
    assert made.model.num_experts == 8
    assert override(made, ["model.router=linear"]).model.router == "linear"


def test_longer_contexts_change_the_base_by_the_formula():
    extended = preset("yuan2-m32").extend_context(16_384)
    assert (extended.rope_theta, extended.max_position_embeddings) == (40_890, 16_384)
    assert pytest.approx(40_890, abs=0.5) == 10_000 * 4 ** (128 / 126)
    assert preset("yuan2-m32").extend_context(4096) == preset("yuan2-m32")
    made = named("nano").extend_context(1024)
    assert made.data.sequence_length == made.model.max_position_embeddings == 1024
    with pytest.raises(ConfigError, match="a context of 256 tokens is below the model's 512"):
        named("nano").extend_context(256)
    with pytest.raises(ConfigError, match="rotates 2 channels has no RoPE base"):
        preset("tiny", partial_rotary_factor=2 / 32).extend_context(512)


def test_m32_lora_learns_less_than_a_hundredth():
    made = named("m32-lora")
    assert made.lora is not None
    shapes = targets(adaptable_matrices(made.model), made.lora)
    learned = sum(num_parameters(shape, made.lora.rank) for shape in shapes.values())
    assert learned == 361_758_720
    assert f"{learned / sum(cost.parameters(made.model).values()):.2%}" == "0.91%"
    # A token passes 2 of 32 experts, and the frozen weights have no gradient of their own.
    active = active_lora_parameters(made.model, made.lora)
    assert active == 4 * 2_359_296 + 352_321_536 / 16
    assert flops_per_token(made) == pytest.approx(
        4 * sum(cost.active_parameters(made.model).values()) + 6 * active + 12 * 4096 * 24 * 2049 / 2
    )


def test_every_recipe_can_be_written_down():
    for name in RECIPES:
        values = named(name).to_dict()
        assert values["model"] == named(name).model.to_dict()
        assert set(values) >= {"model", "data", "optimizer", "schedule", "balance", "run"}
    with pytest.raises(UsageError, match="unknown recipe 'smal'; did you mean small"):
        named("smal")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "data.batch_size is 0; it must be a number above 0"),
        ({"micro_batch_size": 3}, "data.batch_size 8 is no multiple of data.micro_batch_size 3"),
        ({"learning_rate": float("nan")}, "optimizer.learning_rate is nan; it must be a number above 0"),
        ({"betas": (0.9, 1.0)}, r"optimizer.betas are \(0.9, 1.0\); they must be two numbers"),
        ({"weight_decay": -1.0}, "optimizer.weight_decay is -1.0; it must be a number from 0 on"),
        ({"max_seconds": math.inf}, "schedule.max_seconds is inf; it must be a number above 0"),
        ({"warmup": 1.5}, "schedule.warmup is 1.5; it is a share, from 0 to 1"),
        ({"shape": "line"}, "schedule.shape is 'line'; it must be one of cosine, constant, wsd"),
        ({"shape": "wsd", "warmup": 0.5, "decay": 0.6}, "warmup 0.5 and schedule.decay 0.6 are more than the whole"),
        ({"max_tokens": None}, "a run needs an end: give schedule.max_tokens, schedule.max_seconds or both"),
        ({"sequence_length": 257}, "data.sequence_length 257 exceeds the model's context of 256"),
        ({"balance": BalanceSettings(bias_rate=1e-3)}, "moves biases that the model lacks; set model.router_bias=true"),
        ({"dtype": "float16"}, "run.dtype is 'float16'; it must be one of float32, bfloat16"),
        (
            {"model": preset("tiny", num_experts=0, intermediate_size=8), "balance": BalanceSettings(z_loss=0.1)},
            "a model without experts has nothing to balance",
        ),
    ],
)
def test_a_recipe_that_describes_no_run_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        recipe(**changes)


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("optimizer.learning_rate=3e-4", 3e-4),
        ("data.batch_size=24", 24),
        ("schedule.max_tokens=1e9", 10**9),
        ("schedule.max_seconds=none", None),
        ("schedule.shape=wsd", "wsd"),
        ("optimizer.betas=0.9,0.98", (0.9, 0.98)),
        ("model.localized_filtering=false", False),
        ("model.num_experts=4,0", (4, 0)),
        ("model.num_experts=16", 16),
        ('run.prompts=["a, b", "c"]', ("a, b", "c")),
        ("run.spike=none", None),
    ],
)
def test_settings_are_read_by_their_types(assignment, value):
    section, _, field = assignment.partition("=")[0].partition(".")
    changes = {"num_experts": {"model.intermediate_size=8"}, "max_seconds": {"schedule.max_tokens=1024"}}
    made = override(named("nano"), [assignment, *changes.get(field, set())])
    assert getattr(getattr(made, section), field) == value


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("optimizer.learning_rat=1", "unknown setting 'optimizer.learning_rat'; did you mean optimizer.learning_rate?"),
        ("lr_warmup=1", "unknown setting 'lr_warmup'; did you mean schedule.warmup?"),
        ("zzz=1", "unknown setting 'zzz'; sections: model, data, optimizer, schedule, balance"),
        ("data.batch_size", "'data.batch_size' sets nothing; write it as section.field=value"),
        ("data.batch_size=2.5", "data.batch_size is '2.5'; it must be a whole number"),
        ("data.micro_batch_size=x", "data.micro_batch_size is 'x'; it must be a whole number or none"),
        ("optimizer.learning_rate=fast", "optimizer.learning_rate is 'fast'; it must be a number"),
        ("run.compile=maybe", "run.compile is 'maybe'; it must be true or false"),
        ("schedule.shape=line", "schedule.shape is 'line'; it must be one of cosine, constant, wsd"),
        ("optimizer.betas=0.9,x", "optimizer.betas is '0.9,x'; it must be numbers with commas"),
        ("run.prompts=[1", "run.prompts is '.1'; it must be a list in JSON"),
    ],
)
def test_settings_that_cannot_be_are_refused(assignment, message):
    with pytest.raises(UsageError, match=message):
        override(named("nano"), [assignment])


def test_settings_that_only_fit_together_are_set_together():
    made = override(named("nano"), ["data.sequence_length=1024", "model.max_position_embeddings=1024"])
    assert made.data.sequence_length == 1024


def test_differences_name_what_changed():
    before, after = named("nano"), override(named("nano"), ["run.seed=3", "data.batch_size=4"])
    assert differences(flat(before.to_dict()), flat(after.to_dict())) == {
        "data.batch_size": (16, 4),
        "run.seed": (0, 3),
    }
    assert differences({"a": 1}, {"b": 2}) == {"a": (1, None), "b": (None, 2)}


def test_learning_rates_rise_linearly_and_fall_as_they_should():
    def rates(shares, **changes):
        schedule = recipe(warmup=0.2, final_learning_rate=0.1, **changes).schedule
        return [learning_rate(schedule, share) for share in shares]

    assert rates([0.0, 0.1, 0.2, 0.6, 1.0]) == pytest.approx([0.0, 0.5, 1.0, 0.55, 0.1])
    assert rates([0.1, 0.2, 0.6, 1.0], shape="constant") == pytest.approx([0.5, 1.0, 1.0, 1.0])
    assert rates([0.2, 0.6, 0.75, 0.8, 1.0], shape="wsd", decay=0.5) == pytest.approx([1.0, 0.82, 0.55, 0.46, 0.1])
    assert learning_rate(recipe(warmup=0.2).schedule, 0.0, 0.05) == pytest.approx(0.25)
    assert learning_rate(recipe(warmup=0.05).schedule, 0.0, 1.0) == 1.0
    assert learning_rate(recipe(warmup=0.0).schedule, 0.0) == 1.0
    assert learning_rate(recipe(warmup=1.0).schedule, 1.0) == 1.0


def test_the_first_budget_to_run_out_ends_the_run():
    both = recipe(max_seconds=10.0, max_tokens=4 * 128)
    assert spent(both, 128, 9.0) == pytest.approx(0.9)
    assert spent(both, 3 * 128, 1.0) == pytest.approx(0.75)
    assert spent(both, 5 * 128, 99.0) == 1.0
