# SPDX-License-Identifier: Apache-2.0
"""Write docs/recipes.md from the classes in lora_rlhf/sections.py: `python docs/make_recipes.py`."""

import sys
import types
from pathlib import Path
from typing import Union, get_args, get_origin

from pydantic import BaseModel

from lora_rlhf import sections

INTRO = """# Recipes

A recipe is one YAML file that states a whole run. This page is written by `make docs` from
`lora_rlhf/sections.py`, where every key has its one home.

- Unknown or misspelt keys, duplicates, wrong types, impossible values are refused with file, line
  and a suggestion, before anything is loaded.
- YAML is data: no tags, no aliases, no environment variables. `1e-4` is a number; only `true` and
  `false` are booleans.
- `--set key.sub=value` overrides one key; `--dry-run` prints the resolved recipe, secrets masked.
- Paths are relative to the recipe's folder; `data://x` is the folder named by `LORA_RLHF_DATA`.
- `args:` of a stage goes through to TRL's config of that stage (`SFTConfig`, `RewardConfig`,
  `GRPOConfig`), so those names are TRL's. Keys that have their home elsewhere in the recipe
  (`seed`, `bf16`, `beta`, `output_dir`, ...) are refused there, with the place to set them.
- A run that is continued may change `card`, `hub`, `report_to`, `threads`, `reward.gate`, and
  whatever only stages to come read: `ppo` until PPO is done, say. Other changes are refused.
"""


def type_name(annotation: object) -> str:
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(type_name(a) for a in get_args(annotation) if a is not type(None))
    if get_origin(annotation) is list:
        return f"list of {type_name(get_args(annotation)[0])}"
    if get_origin(annotation) is dict:
        return "mapping"
    if getattr(annotation, "__name__", "") == "Literal" or str(annotation).startswith("typing.Lit"):
        return " or ".join(f"`{a}`" for a in get_args(annotation))
    return getattr(annotation, "__name__", str(annotation))


def table(model: type[BaseModel]) -> list[str]:
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            continue
        default = (
            "required"
            if field.is_required()
            else f"`{field.get_default(call_default_factory=True)}`"
        )
        kind = type_name(field.annotation).replace("|", "\\|")
        lines.append(f"| `{name}` | {kind} | {default} | {field.description} |")
    return lines


def render() -> str:
    lines = [INTRO, "## Top level", "", *table(sections.Recipe), ""]
    for name, field in sections.Recipe.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            lines += [f"## {(section.__doc__ or name).splitlines()[0]}", "", *table(section), ""]
    lines += ["## One entry of a `data` list", "", *table(sections.DataSource), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    page = Path(__file__).with_name("recipes.md")
    if "--check" in sys.argv:
        sys.exit(page.read_text(encoding="utf-8") != render())
    page.write_text(render(), encoding="utf-8")
