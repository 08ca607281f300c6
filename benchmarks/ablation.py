"""Routers and Localized Filtering compared on the same tokens: held-out loss of small models, some seeds of each.

    python benchmarks/ablation.py small-run/tokens small-run/ablation --tokens 1000000 --seeds 2

DATA is what `yuanmoe data pack --heldout` writes. Every run is `yuanmoe train nano` with the settings below, so that a
seed gives every variant the same windows in the same order. Called again it keeps the runs that are finished, goes on
with one that was cut off, and prints the table. All variants have the same parameters to within a few thousand; the one
with a shared expert computes with three experts for a token instead of two, since the softmax over a single chosen
expert is 1 and would teach its router nothing. The learning rates are those that suit the Attention Router with LFA.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from yuanmoe.data.sets.packed import PackedTokens
from yuanmoe.plan import cost
from yuanmoe.train.recipe.recipe import Recipe
from yuanmoe.train.recipe.recipes import nano
from yuanmoe.train.recipe.settings import override

VARIANTS = {
    "attention": [],
    "linear": ["model.router=linear"],
    "shared-expert": ["model.router=shared-expert", "model.num_shared_experts=1", "model.num_experts=31"],
    "attention, no LFA": ["model.localized_filtering=false"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="Folder with train and heldout.")
    parser.add_argument("out", type=Path, help="Folder of the runs.")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="Budget of each run.")
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    vocab_size = PackedTokens(options.data / "train").manifest.vocab_size
    common = [f"model.vocab_size={vocab_size}", f"schedule.max_tokens={options.tokens}", "schedule.max_seconds=none"]
    found: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for seed in range(options.seeds):
        for variant, settings in VARIANTS.items():
            folder = options.out / f"{variant.replace(', ', '-').replace(' ', '-')}-{seed}"
            result = run(options.data, folder, [*common, *settings, f"run.seed={seed}", "run.milestones=4"])
            found[variant].append(result["heldout_bits_per_byte"])
            print(f"{variant}, seed {seed}: {found[variant][-1]:.4f} bits a byte", file=sys.stderr, flush=True)
    print(table({variant: override(nano(), [*common, *VARIANTS[variant]]) for variant in VARIANTS}, found))


def run(data: Path, folder: Path, settings: list[str]) -> dict[str, Any]:
    """What the run found, from the file that it left when it was finished."""
    done = folder / "result.json"
    if not done.is_file():
        changes = [word for setting in settings for word in ("--set", setting)]
        begun = ["--resume"] if (folder / "checkpoints").is_dir() else []
        command = [sys.executable, "-m", "yuanmoe", "train", "nano", "--data", str(data), "--out", str(folder)]
        made = subprocess.run(
            [*command, "--threads", "1", *changes, *begun], stdout=subprocess.PIPE, text=True, check=True
        )
        done.write_text(made.stdout.splitlines()[-1] + "\n", encoding="utf-8")
    return json.loads(done.read_text(encoding="utf-8"))


def table(recipes: dict[str, Recipe], found: dict[str, list[float]]) -> str:
    """Held-out bits a byte of every variant, seed by seed, and the mean with its distance from the first variant's."""
    seeds = range(len(next(iter(found.values()))))
    lines = [f"| router | parameters | for a token | {' | '.join(f'seed {seed}' for seed in seeds)} | mean | paired |"]
    lines.append("|---" * (5 + len(seeds)) + "|")
    base = next(iter(found.values()))
    for name, values in found.items():
        total = sum(cost.parameters(recipes[name].model).values())
        active = sum(cost.active_parameters(recipes[name].model).values())
        apart = [value - other for value, other in zip(values, base, strict=True)]
        paired = f"{statistics.mean(apart):+.4f} ({min(apart):+.4f} to {max(apart):+.4f})"
        cells = [name, f"{total:,}", f"{active:,}", *(f"{value:.4f}" for value in values)]
        lines.append("| " + " | ".join([*cells, f"{statistics.mean(values):.4f}", paired]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
