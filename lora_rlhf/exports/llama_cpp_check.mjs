// SPDX-License-Identifier: Apache-2.0
// Reads {module, model, adapter, context, rows: [{prompt, answer}], texts} from stdin and prints what llama.cpp
// gives through node-llama-cpp: for each token of each answer its log-prob and the most probable token in its place,
// and the ids of each text.
import {readFileSync} from "node:fs";
import {pathToFileURL} from "node:url";

const given = JSON.parse(readFileSync(0, "utf8"));
const {getLlama, LlamaLogLevel, getModuleVersion} = await import(pathToFileURL(given.module));
const llama = await getLlama({gpu: false, build: "never", logLevel: LlamaLogLevel.error, logger: () => {}, maxThreads: given.threads});
const model = await llama.loadModel({modelPath: given.model, gpuLayers: 0, defaultContextFlashAttention: false});
const context = await model.createContext({
    contextSize: given.context,
    threads: given.threads,
    lora: given.adapter ? {adapters: [{filePath: given.adapter}]} : undefined
});
const sequence = context.getSequence();
const rows = [];
for (const {prompt, answer} of given.rows) {
    await sequence.clearHistory();
    const ids = [...prompt, ...answer.slice(0, -1)];
    const input = ids.map((token, i) => {
        const next = i - prompt.length + 1;
        return next < 0 ? token : [token, {generateNext: {
            totalLogitWeight: true,
            logits: {filter: {tokens: [answer[next]], includeTop: 1}}
        }}];
    });
    const out = await sequence.controlledEvaluate(input);
    const logprobs = [], tops = [];
    for (let next = 0; next < answer.length; next++) {
        const {logits, totalLogitWeight} = out[prompt.length - 1 + next].next;
        const [top, most] = [...logits].reduce((a, b) => b[1] > a[1] ? b : a);
        tops.push(top);
        logprobs.push(logits.get(answer[next]) - most - Math.log(totalLogitWeight));
    }
    rows.push({tops, logprobs});
}
const texts = given.texts.map((text) => model.tokenize(text, true));
process.stdout.write(JSON.stringify({rows, texts, version: await getModuleVersion()}));
process.exit(0);
