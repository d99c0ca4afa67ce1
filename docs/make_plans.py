# SPDX-License-Identifier: Apache-2.0
"""Write the plan of every GPU recipe into its README and into recipes/README.md: `make docs`.

A GPU recipe says `for one GPU of N GB` in its first line. Its page has `<!-- plan -->...<!-- /plan
-->`. Everything comes from `config.json` and `recipe.yaml`; nothing is downloaded.
"""

import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

from lora_rlhf.models.loading import find_config
from lora_rlhf.planning import meta_backbone
from lora_rlhf.planning.memory_budget import CUDA_CONTEXT, FRAGMENTATION, Plan, format_bytes
from lora_rlhf.planning.plan import planner_for
from lora_rlhf.recipe.loader import load_recipe
from lora_rlhf.recipe.schema import Recipe

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
_GPU = re.compile(r"# .*for one GPU of (\d+) GB\.")
_BLOCK = re.compile(r"(<!-- plan -->).*?(<!-- /plan -->)", re.DOTALL)
_HEAD = "| recipe | base | data | GPU | 4-bit | planned, GB |\n|---|---|---|---|---|---|\n"


class GpuRecipe(NamedTuple):
    """A recipe for one GPU, of `gpu` GB."""

    folder: Path
    recipe: Recipe
    gpu: int

    @property
    def config(self) -> Any:
        """The base's config, from the file beside the recipe."""
        return find_config(self.recipe.model, self.folder)

    @property
    def data(self) -> str:
        """The Hub datasets that it names."""
        data = self.recipe.data
        sources = [*data.comparisons, *data.demonstrations, *data.prompts]
        return ", ".join(dict.fromkeys(source.hub or "" for source in sources))

    def plan(self) -> Plan:
        """Plan it for its GPU."""
        return planner_for(self.config, "cuda").plan(self.recipe, self.gpu * 10**9)


def all_recipes() -> list[GpuRecipe]:
    """Return the GPU recipes, the smallest GPU first."""
    found = []
    for file in sorted(RECIPES.glob("*/recipe.yaml")):
        if named := _GPU.match(file.read_text(encoding="utf-8")):
            found.append(GpuRecipe(file.parent, load_recipe(file), int(named[1])))
    return sorted(found, key=lambda one: (one.gpu, one.folder.name))


def block(one: GpuRecipe, plan: Plan) -> str:
    """Return the plan as it stands in a recipe's README."""
    phases = "".join(f"| {name} | {p.total / 1e9:.2f} |\n" for name, p in plan.phases.items())
    return (
        f"\n`lora-rlhf plan recipes/{one.folder.name} --gpu {one.gpu}GB`: it needs "
        f"**{format_bytes(plan.needed)}** of {one.gpu} GB. The peak is in *{plan.worst}*, where "
        f"{plan.sampled_at_once} episodes are sampled at once; {100 * FRAGMENTATION:g} % for "
        f"fragmentation and {format_bytes(CUDA_CONTEXT)} for CUDA's context are added to it. "
        f"The base has {meta_backbone.parameters(one.config):,} parameters, "
        f"{format_bytes(plan.backbone)} in memory. Minutes: not measured.\n\n"
        f"| phase | planned, GB |\n|---|---|\n{phases}"
    )


def table(planned: list[tuple[GpuRecipe, Plan]]) -> str:
    """Return the table of all GPU recipes."""
    lines = [
        f"| [{one.folder.name}]({one.folder.name}) | {one.recipe.model.id} | {one.data} | "
        f"{one.gpu} GB | {'yes' if one.recipe.model.load_in_4bit else 'no'} | "
        f"{plan.needed / 1e9:.2f} |\n"
        for one, plan in planned
    ]
    return f"\n{_HEAD}{''.join(lines)}"


def render() -> dict[Path, str]:
    """Return every page with its block as the plan is now."""
    planned = [(one, one.plan()) for one in all_recipes()]
    blocks = {one.folder / "README.md": block(one, plan) for one, plan in planned}
    blocks[RECIPES / "README.md"] = table(planned)
    pages = {}
    for page, text in blocks.items():
        before = page.read_text(encoding="utf-8")
        assert _BLOCK.search(before), f"{page} has no <!-- plan --> block"
        pages[page] = _BLOCK.sub(lambda found, text=text: found[1] + text + found[2], before)
    return pages


if __name__ == "__main__":
    for path, content in render().items():
        path.write_text(content, encoding="utf-8")
        print(path.relative_to(RECIPES.parent), file=sys.stderr)
