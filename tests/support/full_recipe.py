# SPDX-License-Identifier: Apache-2.0
"""A recipe in which every key is set to something other than its default."""

EVERY_KEY = """
name: every
seed: 3
threads: 2
report_to: [none]
model: {id: /base, dtype: float16, load_in_4bit: true, hub_id: a/base, gradient_checkpointing: true,
  shard: true}
lora: {r: 2, alpha: 5, top_fraction: 0.5, target_modules: [q_proj]}
data:
  demonstrations: [{hub: a/d, name: en, data_dir: b, split: test, revision: abc,
    license: mit, limit: 9,
    lang: en, skip_bad: 2, ignore: [rating], dialogue_as_text: true,
    format: {json_schema: {type: object}, bullets: 2, max_words: 9, regex: "a+"}}]
  comparisons:
    - {task: closed-world, n: 7, completions: 3, agreement: 0.9}
    - {path: /c.csv, columns: {chosen: a, rejected: b}, labeler_instructions: "Which is: better?"}
  prompts: [{path: "data://p.jsonl"}]
  text: [{path: /t.jsonl, columns: {text: body}}]
  evaluate: [{path: /e.jsonl}]
  held_out: 0.2
  max_prompt_tokens: 9
  max_tokens: 10
  max_lost: 0.5
  max_prompts_per_user: 9
  personal_data: redact
  name_model: /names
  near_duplicates: 0.8
  common_prefix: 90
  contamination: drop
  contamination_suites: [quick]
  augment: {paraphrases: 0.1, identities: 0.2}
  identity_test: true
sft: {privacy: {epsilon: 8, delta: 1e-6, clip_norm: 0.5, canaries: 9},
  args: {learning_rate: 1e-5, tags: [a, "1"], nested: {"1": null, yes: "no"}}}
reward:
  {gate: warn, held_out_model: true, ensemble: 3, combine: mean_minus_std,
   combine_std: 0.5, privacy: {epsilon: 3, delta: 1e-7, clip_norm: 2, canaries: 7},
   args: {a: 1}}
algorithm: grpo
ppo: {updates: 2, reward: gold, kl_coef: 1, kl_target: 3, kl_horizon: 5, kl_budget: 9, gamma: 0.9,
  lam: 0.9, clip_value: 0.3, vf_coef: 0.2, missing_eos_penalty: 0, value_learning_rate: 1e-4,
  value_warmup_updates: 0, max_grad_norm_value: 2, value: head, normalize_reward: true,
  clip_reward: 5, entropy_coef: 0.1, ptx_coef: 0.1, watch: best, trunk_states: cpu,
  rollout_server: "http://127.0.0.1:8000", max_staleness: 1, args: {a: 1}}
grpo: {updates: 3, kl_coef: 0.1, num_generations: 2, args: {a: 1}}
rloo: {updates: 3, kl_coef: 0.1, num_generations: 2, args: {a: 1}}
dpo: {beta: 0.2, args: {a: 1}}
best_of_n: {n: 3}
evaluate: {n: 3, max_new_tokens: 4, temperature: 0, batch_size: 2, samples: 1}
checkpoint: {every_minutes: 0, every_steps: 7, keep: 3, max_minutes: 90,
  hub: acme/kept, hub_minutes: 3}
rounds:
  - {number: 2, run: first, record_sha256: ab, model: policy, strategy: novelty, tasks_sha256: cd,
    labels: people, labels_sha256: ef, rankings: 9, noise: 0.5, start: policy}
card: {title: "1e3", license: mit, language: [en, "no"], authors: "null", intended_use: "yes",
  limits: "a: b\\n# c"}
hub: {policy: a/p, reward: a/r, value: a/v, sft: a/s, public: true}
"""
