# SPDX-License-Identifier: Apache-2.0
"""From a recipe to answers, in Python."""

import lora_rlhf

recipe = lora_rlhf.load_recipe("recipes/closed-world/recipe.yaml", ["ppo.updates=20"])
record = lora_rlhf.run(recipe, "runs/quickstart")  # run it again: finished stages are kept

for model, metrics in record.data["evaluation"].items():
    success = metrics["success"]
    print(f"{model}: success {success['value']:.2f} [{success['low']:.2f}, {success['high']:.2f}]")

question = "Record: Kofi speaks Russian. Kofi works as a pilot.\nWhat is Kofi's job?"
for answer in lora_rlhf.generate("runs/quickstart", question, temperature=0.0):
    print(answer["model"], answer["reward"], answer["text"])
