# SPDX-License-Identifier: Apache-2.0
# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # RLHF on one GPU, from a CSV to a card
#
# Better and worse answers go in; a policy comes out, with an evaluation that says if it is better than supervised
# fine-tuning, and a model card. In Colab choose a GPU first (Runtime, Change runtime type). It takes some minutes.
#
# This notebook is kept as `quickstart.py`; `make docs` writes the `.ipynb` from it.

# %%
# %pip install -q "lora-rlhf[serve,feedback]"

# %%
import csv
import json
import os
import random

import lora_rlhf

MODEL = os.environ.get("LORA_RLHF_NOTEBOOK_MODEL")  # None: chosen for this GPU
SMALLER = os.environ.get("LORA_RLHF_NOTEBOOK_SET", "").split()  # overrides, such as ppo.updates=10

# %% [markdown]
# ## Your data
#
# One row is a question with a better and a worse answer. Here the questions are about a shop's products: the better
# answer is short and says what the record says, the worse one rambles or makes something up. Use a file of yours
# instead; columns may have other names.

# %%
draw = random.Random(0)
facts = {
    "price": ("What does it cost?", [f"{n} euros" for n in range(5, 95, 5)]),
    "color": ("Which color is it?", ["red", "blue", "green", "black", "white", "grey"]),
    "weight": ("How heavy is it?", [f"{n} grams" for n in range(100, 1000, 100)]),
}
things = ["mug", "lamp", "bag", "chair", "clock", "scarf", "knife", "shelf", "radio", "umbrella"]
with open("shop.csv", "w", newline="", encoding="utf-8") as file:
    rows = csv.writer(file)
    rows.writerow(["question", "better", "worse"])
    for _ in range(240):
        thing, chosen = draw.choice(things), {k: draw.choice(v) for k, (_, v) in facts.items()}
        key = draw.choice(list(facts))
        record = ", ".join(f"{name} {value}" for name, value in chosen.items())
        wrong = draw.choice([v for v in facts[key][1] if v != chosen[key]])
        rambling = f"That is a very good question about our {thing}. Many people ask it."
        rows.writerow(
            [f"A {thing}: {record}. {facts[key][0]}", chosen[key], draw.choice([wrong, rambling])]
        )

# %% [markdown]
# ## A recipe
#
# `init` says what each column is taken for, chooses a base model and sizes for this GPU, and writes a commented recipe.

# %%
lora_rlhf.init(["shop.csv"], model=MODEL, say=print, force=True)
print(open("recipe.yaml", encoding="utf-8").read())

# %% [markdown]
# Does it fit? The plan is made from the base's config, before any weights are loaded.

# %%
recipe = lora_rlhf.load_recipe("recipe.yaml", SMALLER)
lora_rlhf.plan(recipe)

# %% [markdown]
# ## Run it
#
# SFT, reward model, PPO, evaluation, cards. If Colab stops, run this cell again: finished stages are kept, and an
# interrupted one goes on from its last checkpoint.

# %%
record = lora_rlhf.run(recipe, "runs/shop")
record

# %% [markdown]
# If something looks odd, `doctor` names the stage at fault.

# %%
for finding in lora_rlhf.doctor("runs/shop"):
    print(finding.stage, "-", finding.what)

# %% [markdown]
# ## Was PPO worth it?
#
# The cheapest competitor needs no training: the best of several SFT answers by the reward model. SFT and reward model are
# taken from the first run.

# %%
other = lora_rlhf.load_recipe("recipe.yaml", [*SMALLER, "algorithm=best_of_n", "best_of_n.n=4"])
lora_rlhf.run(other, "runs/best", start_from="runs/shop")
lora_rlhf.compare("runs/shop", "runs/best")

# %% [markdown]
# ## Talk to it

# %%
with lora_rlhf.chat("runs/shop") as chat:
    print(chat.ask("A mug: price 10 euros, color red, weight 300 grams. Which color is it?").text)

# %% [markdown]
# ## Label ten pairs
#
# Answers of SFT and policy to held-out prompts, side by side and in random order: which one is better? Your labels are a
# judge that you can trust (`lora-rlhf label labels --export`), and train the next reward model (`lora_rlhf.iterate`).

# %%
answers: dict[int, dict] = {}
with open("runs/shop/samples.jsonl", encoding="utf-8") as file:
    for line in map(json.loads, file):
        if line["model"] in ("sft", "policy"):
            row = answers.setdefault(line["index"], {"prompt": line["prompt"], "answers": {}})
            row["answers"][line["model"]] = line["completion"]
pairs = [one for one in answers.values() if len(set(one["answers"].values())) == 2][:10]
with open("tasks.jsonl", "w", encoding="utf-8") as file:
    file.writelines(json.dumps({"id": str(n), **one}) + "\n" for n, one in enumerate(pairs))
server = lora_rlhf.label("labels", new="tasks.jsonl")

# %% [markdown]
# ## Share it
#
# The card says what the policy is, if it beats SFT, by whose judgement, and how to load it with plain PEFT.

# %%
print(open("runs/shop/adapters/policy/README.md", encoding="utf-8").read()[:3000])

# %%
if os.environ.get("HF_TOKEN") and not os.environ.get("LORA_RLHF_NOTEBOOK_MODEL"):
    print(lora_rlhf.push(record, "policy", "my-name/my-shop-assistant"))

# %%
server.stop()
