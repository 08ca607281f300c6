"""The recipes with names. Each is a function that returns a complete recipe; the command line picks one by its name.

Sources: arXiv 2405.17976 (M32), arXiv 2311.15786 (Yuan 2.0) and the released training scripts, as spec 6.2 collects
them. `nano` and `small` are ours; how their numbers were found is beside them.
"""

from collections.abc import Callable

from yuanmoe.config import ModelConfig
from yuanmoe.errors import UsageError
from yuanmoe.hints import closest
from yuanmoe.model.lora.targets import LoraSettings
from yuanmoe.presets import preset
from yuanmoe.train.recipe.recipe import DataSettings, OptimizerSettings, Recipe, RunSettings, ScheduleSettings

CODE_PROMPTS = ("def read_lines(path):\n    ", "class Stack:\n    def __init__(self", "import os\n\nfor name in ")
TEXT_PROMPTS = ("The capital of France is", "def fibonacci(n):")


def nano() -> Recipe:
    """A model that learns to write recognisable Python in two minutes on two CPU cores.

    Bits a byte in the comments are of held-out text after the same time of one core, see docs/log.md.
    """
    return Recipe(
        model=preset("nano"),
        # Short windows: 64 x 16 tokens are less alike than 128 x 8 (1.30 against 1.36).
        data=DataSettings(sequence_length=64, batch_size=16),
        # AdamW moves every weight by about its learning rate, whatever the weight's size. From the published start,
        # N(0, 0.02) everywhere, the first steps of the layers drown the embedding they are added to, tokens look alike
        # to the router, and most choose the same experts: after 80 k tokens 2.7, no better than token frequencies.
        # An embedding as large as what the layers add, and faster where each weight rarely gets a gradient: 2.1.
        optimizer=OptimizerSettings(learning_rate=4e-3, embedding_rate=20.0, head_rate=5.0),
        schedule=ScheduleSettings(max_seconds=120.0, final_learning_rate=0.05),
        run=RunSettings(embedding_std=1.0, prompts=CODE_PROMPTS),
    )


def small() -> Recipe:
    """28M parameters, 4.3M for a token: hours on a CPU, minutes on one GPU; in 4 bits it takes 16 MB."""
    return Recipe(
        model=preset("small"),
        # 8,192 tokens are 512 for each expert: matrix products that a CPU runs at their full rate.
        data=DataSettings(sequence_length=256, batch_size=32, micro_batch_size=16, fim_rate=0.5),
        # As `nano`, whose start it shares; a wider model wants a smaller rate.
        optimizer=OptimizerSettings(learning_rate=2e-3, embedding_rate=10.0, head_rate=5.0),
        schedule=ScheduleSettings(max_tokens=1500 * 32 * 256, final_learning_rate=0.05),
        run=RunSettings(embedding_std=1.0, milestones=15, prompts=CODE_PROMPTS),
    )


def ablation_826m() -> Recipe:
    """The scale of Table 1 of arXiv 2405.17976: 826.0M parameters under the Attention Router, 825.8M under the
    classical one (`--set model.router=linear`).

    The paper gives 8 experts and these counts, no sizes. Of models without LFA, whose width and expert width are
    multiples of 128 and 256 and whose attention is as wide as the model, this one alone has both counts; with LFA none
    has. Schedule and batches are those of Yuan 2.0-2B, the nearest published run.
    """
    model = ModelConfig(
        vocab_size=135040,
        hidden_size=768,
        num_hidden_layers=18,
        num_attention_heads=12,
        head_dim=64,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=2048,
        localized_filtering=False,
        attention_dropout=0.1,  # spec 6.2
        packing="megatron",  # spec 1.7: positions restart at <eod>, attention does not
        max_position_embeddings=8192,
    )
    return Recipe(
        model=model,
        data=DataSettings(sequence_length=8192, batch_size=384, micro_batch_size=2, fim_rate=0.5),  # 2B, spec 6.2
        optimizer=_published(learning_rate=2e-4),  # 2B, spec 6.2
        schedule=_steps(95_367, warmup_steps=1_900, tokens_per_step=384 * 8192),  # 2B, spec 6.2
        run=_LARGE,
    )


def m32_pretrain() -> Recipe:
    """The pre-training of Yuan 2.0-M32: 2000.7 billion tokens (arXiv 2405.17976 section 4.1, spec 6.2)."""
    return Recipe(
        model=preset("yuan2-m32", attention_dropout=0.1, packing="megatron"),  # --flash-attn-drop, spec 1.6 and 1.7
        data=DataSettings(sequence_length=4096, batch_size=1536, micro_batch_size=2, fim_rate=0.5),  # FIM and SPM .5
        optimizer=_published(learning_rate=1e-4),  # to 1e-5 as a cosine
        schedule=_steps(318_000, warmup_steps=6_400, tokens_per_step=1536 * 4096),
        run=_LARGE,
    )


def m32_sft() -> Recipe:
    """The fine-tuning of Yuan 2.0-M32 on 16K contexts (pretrain_yuan2.0_moe_2x32B_sft.sh, spec 6.2): start it with
    `--init` from the pre-trained weights. The RoPE base 40890 follows from the context."""
    model = preset("yuan2-m32", attention_dropout=0.1, packing="megatron").extend_context(16_384)
    return Recipe(
        model=model,
        data=DataSettings(sequence_length=16_384, batch_size=1152, micro_batch_size=1),
        optimizer=_published(learning_rate=8e-5),
        schedule=ScheduleSettings(shape="constant", warmup=0.0, max_tokens=4_220 * 1152 * 16_384),
        run=_LARGE,
    )


def m32_lora() -> Recipe:
    """Factors of rank 16 beside attention and every expert of a model given with `--init`, in 4 bits or whole: 0.91 %
    of M32's parameters learn.

    There is no published run of this kind. The learning rate is that of LoRA on GPT-3 (arXiv 2106.09685, table 12);
    batches and length are ours, for one machine.
    """
    return Recipe(
        model=preset("yuan2-m32"),
        data=DataSettings(sequence_length=2048, batch_size=16, micro_batch_size=1),
        # Weight decay would pull B A towards 0, which is the base itself.
        optimizer=OptimizerSettings(learning_rate=2e-4, betas=(0.9, 0.95), weight_decay=0.0, gradient_clip=1.0),
        schedule=ScheduleSettings(shape="cosine", warmup=0.03, max_tokens=1_000 * 16 * 2048),
        run=RunSettings(dtype="bfloat16", activation_checkpointing=True, milestones=20, prompts=TEXT_PROMPTS),
        lora=LoraSettings(rank=16, alpha=32.0, dropout=0.05),
    )


_LARGE = RunSettings(
    dtype="bfloat16",
    activation_checkpointing=True,  # `recompute` of all published runs, spec 6.2
    milestones=40,
    checkpoint_steps=500,
    prompts=TEXT_PROMPTS,
)


def _published(learning_rate: float) -> OptimizerSettings:
    """Common to all published runs (spec 6.2): betas 0.9 and 0.95, decay 0.1, clip 1.0. Megatron spares biases and
    norms from decay, not the embedding."""
    return OptimizerSettings(
        learning_rate=learning_rate, betas=(0.9, 0.95), weight_decay=0.1, decay_embedding=True, gradient_clip=1.0
    )


def _steps(steps: int, *, warmup_steps: int, tokens_per_step: int) -> ScheduleSettings:
    """A linear warm-up and a cosine to a tenth, as all published pre-training."""
    return ScheduleSettings(
        shape="cosine", warmup=warmup_steps / steps, final_learning_rate=0.1, max_tokens=steps * tokens_per_step
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    "nano": nano,
    "small": small,
    "ablation-826m": ablation_826m,
    "m32-pretrain": m32_pretrain,
    "m32-sft": m32_sft,
    "m32-lora": m32_lora,
}


def named(name: str) -> Recipe:
    """The recipe of that name. Raises UsageError for an unknown one."""
    if name not in RECIPES:
        close = closest(name, RECIPES)
        hint = f"did you mean {close}? " if close else ""
        raise UsageError(f"unknown recipe {name!r}; {hint}Recipes: {', '.join(RECIPES)}")
    return RECIPES[name]()
