"""Completions with their experts: each token in the colour of its first expert, and how often every expert worked."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from yuanmoe.cli.generate.answer import spelled_out
from yuanmoe.cli.generate.experts import chosen_layer, colour, expert_layers, loads
from yuanmoe.lm import Completion, LanguageModel


def show_completions(
    console: Console, lm: LanguageModel, prompts: Sequence[str], completions: Sequence[Completion]
) -> None:
    """The prompts with what followed, and under them a table of layers and experts."""
    place = chosen_layer(lm.config, None)
    for prompt, completion in zip(prompts, completions, strict=True):
        console.print()
        console.print(Text(prompt, style="bold") + coloured_tokens(lm, prompt, completion, place), soft_wrap=True)
    console.print()
    console.print(load_table(lm, expert_loads(lm, completions), place), soft_wrap=True)


def coloured_tokens(lm: LanguageModel, prompt: str, completion: Completion, place: int) -> Text:
    """What was said, each token on the colour of its first expert in the layer at `place` among those with experts."""
    text, previous = Text(), lm.text_ids(prompt)[-1]
    for token_id, routing in zip(completion.ids, completion.routings, strict=True):
        piece = lm.tokenizer.surface(token_id, previous, skip_special=True).decode(errors="replace")
        style = "" if routing is None else f"black on color({colour(int(routing.experts[place, 0]))})"
        # A newline on a colour would paint the rest of the line.
        for part in spelled_out(piece).splitlines(keepends=True):
            text.append(part.rstrip("\n"), style).append("\n" if part.endswith("\n") else "")
        previous = token_id
    return text


def load_table(lm: LanguageModel, layer_loads: Sequence[Counter[int]], place: int) -> Text:
    """On what share of the tokens each expert worked: a row for each layer, the one at `place` in colour."""
    experts, layers = range(max(lm.config.experts_per_layer)), expert_layers(lm.config)
    table = Text.assemble(("Each expert's share of these tokens, in %", "bold"), f"; colours: layer {layers[place]}\n")
    table.append("expert   " + " ".join(f"{expert % 100:>2}" for expert in experts), "dim")
    for row, (layer, load) in enumerate(zip(layers, layer_loads, strict=True)):
        table.append(f"\nlayer {layer:<3}")
        tokens = load.total() / lm.config.num_experts_per_tok
        for expert in experts:
            share = min(99, round(100 * load[expert] / tokens)) if tokens else 0
            style = f"black on color({colour(expert)})" if row == place else ""
            table.append(f"{share:>2}" if load[expert] else " .", style if load[expert] else "dim").append(" ")
    return table


def expert_loads(lm: LanguageModel, completions: Sequence[Completion]) -> list[Counter[int]]:
    """How often each expert of each layer was chosen for what was said."""
    routings = [routing for completion in completions for routing in completion.routings if routing]
    return loads(routings, len(expert_layers(lm.config)))


def completions_json(
    lm: LanguageModel, prompts: Sequence[str], completions: Sequence[Completion]
) -> list[dict[str, Any]]:
    """The same for programs; `tokens_by_expert` has one object a layer."""
    return [
        {
            "prompt": prompt,
            "text": completion.text,
            "tokens_by_expert": [dict(sorted(load.items())) for load in expert_loads(lm, [completion])],
        }
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
