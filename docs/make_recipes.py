# SPDX-License-Identifier: Apache-2.0
"""Write docs/recipes.md from lora_rlhf/recipe/schema.py: `python docs/make_recipes.py`."""

import sys
import types
from pathlib import Path
from typing import Union, get_args, get_origin

from pydantic import BaseModel

from lora_rlhf.recipe import schema

INTRO = """# Recipes

A recipe is one YAML file that describes a whole run. `make docs` writes this page from
`lora_rlhf/recipe/schema.py`, where every key is defined once.

- Unknown or misspelt keys, duplicates, wrong types and impossible values are refused with file,
  line and a suggestion, before anything is loaded.
- So are keys that would have no effect, such as `split` of a file or `reward.combine` without an
  ensemble, unless they have their default values.
- YAML is plain data: no tags, no aliases, no environment variables. Scalars follow YAML 1.2: `1e-4`
  is a number, 010 is ten, only `true` and `false` are booleans. Types are exact: `"4"` is text.
- `--set key.sub=value` overrides one key; `--dry-run` prints the resolved recipe, secrets masked.
- Paths are relative to the recipe's folder; `data://x` is in the folder named by `LORA_RLHF_DATA`.
  `model.id` is a path if it begins with `.`, `~` or `/`, or if a folder of that name, with a
  config.json, is beside the recipe; otherwise it is a Hub id.
- Data files: `.jsonl`, `.ndjson`, `.json`, `.csv`, `.tsv`, `.parquet`, also with `.gz`. Columns:
  `prompt` and `completion`, or `messages`; `prompt`, `chosen`, `rejected` and optionally `margin`;
  `prompt`, `completions` and `ranks` (1 is best); `labeler` names who compared. A conversation may
  be in ShareGPT's `conversations`, with `from` and `value`, or an HH transcript. OpenAssistant's
  trees and messages are read in every set (`lang: en` keeps one language; deleted and synthetic
  messages are left out), and UltraFeedback's columns, also those of Argilla's and Zephyr's pairs,
  and those of HelpSteer2 (ratings, or preferences by `data_dir: preference`) and HelpSteer3.
- `args:` of a stage are passed to TRL's config of that stage (`SFTConfig`, `RewardConfig`,
  `GRPOConfig` for `ppo` and `grpo`, `RLOOConfig`, `DPOConfig`), so those names are TRL's. Keys that
  are set elsewhere in the recipe (`seed`, `bf16`, `beta`, `output_dir`, ...) are refused there,
  with the place to set them.
- When a run is continued, keys that do not change its numbers may change (`card`, `hub`,
  `report_to`, `reward.gate`, `checkpoint`, `model.shard` and some others, which a refusal lists),
  and everything that only later stages read: `ppo` until PPO has begun, for example. Other changes
  are refused, with a table ([what a run survives](reliability.md)); `threads` too, since sums then
  round differently.
- `ppo.reward: my_reward:score` optimises the function `score` of `my_reward.py` beside the recipe,
  in PPO, GRPO, RLOO and best of n. It has TRL's signature (`prompts`, `completions`,
  `completion_ids`, and every other column of the prompts; messages, if the base has a chat
  template) and returns one finite number for each completion. No comparisons are needed then.
- `algorithm` chooses what makes the policy. Of `ppo`, `grpo`, `rloo`, `dpo` and `best_of_n` only
  the section of that name is read, except that the other algorithms take settings that they do not
  set themselves from `ppo` ([is PPO worth it here?](compare.md)).
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
        meaning = " ".join((field.description or "").split())
        lines.append(f"| `{name}` | {kind} | {default} | {meaning} |")
    return lines


def render() -> str:
    lines = [INTRO, "## Top level", "", *table(schema.Recipe), ""]
    for name, field in schema.Recipe.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            lines += [f"## {(section.__doc__ or name).splitlines()[0]}", "", *table(section), ""]
    lines += ["## One entry of a `data` list", "", *table(schema.DataSource), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    page = Path(__file__).with_name("recipes.md")
    if "--check" in sys.argv:
        sys.exit(page.read_text(encoding="utf-8") != render())
    page.write_text(render(), encoding="utf-8")
