# SPDX-License-Identifier: Apache-2.0
"""CPU seconds of best of n with one shared prefill, and of n requests one after another, in pairs.

python tests/benchmarks/best_of_n_latency.py RUN [PAIRS]; docs/use.md has the numbers.
"""

import statistics
import sys
import time

from lora_rlhf.serving.inference import InferenceEngine, Request

PROMPT = "Which of these boxes has the red lid, and where does it stand? " * 4
TURNS = ({"role": "user", "content": PROMPT},)


def seconds(call) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def main(run: str, pairs: int, tokens: int = 24) -> None:
    engine = InferenceEngine.load([run])
    request = {"model": "sft", "max_tokens": tokens, "temperature": 1.5}
    print(f"prompt of {engine.count_tokens(TURNS)} tokens, answers of up to {tokens}", flush=True)
    for n in (1, 2, 4, 8, 16):
        shared, apart = [], []
        for seed in range(pairs):
            one = Request(TURNS, **request, best_of=n, scored=True, seed=seed)
            each = [Request(TURNS, **request, scored=True, seed=100 * seed + i) for i in range(n)]
            shared.append(seconds(lambda one=one: engine.generate(one)))
            apart.append(seconds(lambda each=each: [engine.generate(r) for r in each]))
        a, b = statistics.median(shared), statistics.median(apart)
        print(f"| {n} | {a:.2f} | {b:.2f} | {b / a:.1f} |", flush=True)
    engine.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 3)
