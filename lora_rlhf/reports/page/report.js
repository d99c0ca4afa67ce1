"use strict";
// Sorts tables, and lists the samples. Foreign text only ever becomes a text node.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const el = (tag, properties, ...children) => {
    const node = Object.assign(document.createElement(tag), properties);
    node.append(...children.filter((child) => child !== null));
    return node;
  };
  const count = (n) => n.toLocaleString("en");
  const prompts = (n) => `${count(n)} ${n === 1 ? "prompt" : "prompts"}`;
  const plain = (x) => x === null ? "–" : String(+x.toPrecision(4)).replace("-", "−");

  // --- tables

  const key = (row, column) => {
    const cell = row.cells[column], number = cell.querySelector("data");
    return number ? Number(number.value) : cell.querySelector(".none") ? null : cell.textContent;
  };
  const compared = (a, b) => typeof a === "string" ? a.localeCompare(b, "en") : a - b;
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const button = el("button", { type: "button" }, ...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const down = head.ariaSort === "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.ariaSort = down ? "descending" : "ascending";
        const rows = [...table.tBodies[0].rows].map((row) => [key(row, column), row]);
        rows.sort(([a], [b]) => a === null || b === null
          ? (a === null) - (b === null) : (down ? -1 : 1) * compared(a, b));
        table.tBodies[0].append(...rows.map(([, row]) => row));
      });
    });
  }

  const scrollers = () => {
    for (const box of document.querySelectorAll(".scroll, .text")) {
      const over = box.scrollWidth > box.clientWidth + 1 || box.scrollHeight > box.clientHeight + 1;
      if (over) box.tabIndex = 0; else box.removeAttribute("tabindex");
    }
  };
  addEventListener("resize", scrollers);
  addEventListener("toggle", scrollers, true);

  // --- samples

  const PAGE = 20;
  const { targets, metrics, better } = data;
  const samples = data.rows.map(([set, id, kind, why, prompt, cut, answers], place) =>
    ({ set, id, kind, why, prompt, cut, answers, place }));
  const value = (sample, model, metric) => {
    const place = metrics[sample.set].indexOf(metric);
    return sample.answers[model] && place >= 0 ? sample.answers[model][4][place] : null;
  };
  const unique = (items) => [...new Set(items)];
  const fill = (select, options, preferred) => {
    const before = select.options.length ? select.value : preferred;
    const values = options.map(([option]) => option);
    const chosen = values.includes(before) ? before : values.includes(preferred) ? preferred : values[0];
    select.replaceChildren(...options.map(([option, text]) =>
      new Option(text, option, option === chosen, option === chosen)));
  };
  const inSet = (sample) => !$("set").value || sample.set === $("set").value;
  const shownModels = () => [...$("models").querySelectorAll("input")]
    .filter((box) => box.checked).map((box) => Number(box.value));

  function options() {
    const scope = samples.filter(inSet);
    const names = unique(unique(scope.map((sample) => sample.set)).flatMap((set) => metrics[set]));
    fill($("metric"), names.map((name) => [name, name]), data.start ? data.start[1] : "");
    fill($("kind"), [["", "all kinds"], ...unique(scope.map((sample) => sample.kind))
      .filter(Boolean).sort().map((kind) => [kind, kind])], "");
    const ranked = better[$("metric").value] && better[$("metric").value] !== "neither";
    const [worse, best] = ranked ? ["worse", "better"] : ["lower", "higher"];
    const model = $("model").value === "" ? "a model" : targets[$("model").value];
    fill($("outcome"), [["", "all"], ["worse", `${model} is ${worse} than another`],
      ["better", `${model} is ${best} than all others`], ["differ", "models differ"],
      ["same", "all models the same"], ["none", "no value for some model"]], "");
    fill($("order"), [["worst", ranked ? "worst first" : "lowest first"],
      ["best", ranked ? "best first" : "highest first"],
      ["gap", "largest difference first"], ["report", "as in report.json"]], "worst");
  }

  // Everything that the controls say, read once for a listing.
  function choice() {
    const metric = $("metric").value, shown = shownModels();
    const sign = better[metric] === "lower" ? -1 : 1;
    const goodness = (sample, model) => {
      const x = value(sample, model, metric);
      return x === null ? null : sign * x;
    };
    const known = (sample, models) => models.map((model) => [goodness(sample, model), model])
      .filter(([x]) => x !== null).sort(([a], [b]) => a - b);
    const ranked = (sample) => { // the [goodness, model] by which a sample is placed
      const all = known(sample, $("model").value === "" ? shown : [Number($("model").value)]);
      return all.length ? all[$("order").value === "best" ? all.length - 1 : 0] : null;
    };
    const spread = (sample) => {
      const all = known(sample, shown);
      return all.length < 2 ? null : all[all.length - 1][0] - all[0][0];
    };
    return { metric, shown, goodness, known, ranked, spread };
  }

  function outcome(sample, { shown, goodness, ranked, spread }) {
    const wanted = $("outcome").value, mine = ranked(sample), gap = spread(sample);
    const others = mine === null ? [] : targets.map((_, model) => model)
      .filter((model) => model !== mine[1]).map((model) => goodness(sample, model))
      .filter((x) => x !== null);
    switch (wanted) {
      case "worse": return others.some((x) => x > mine[0]);
      case "better": return others.length > 0 && others.every((x) => x < mine[0]);
      case "differ": return gap !== null && gap > 0;
      case "same": return gap === 0;
      case "none": return shown.some((model) => goodness(sample, model) === null);
      default: return true;
    }
  }

  function sorted(list, { known, ranked, spread }) {
    const order = $("order").value;
    if (order === "report") return list;
    const lead = (sample, mine) => { // of the best other model; decides between equal values
      const all = known(sample, targets.map((_, model) => model));
      return all.length ? all[all.length - 1][0] - mine[0] : 0;
    };
    const keys = new Map(list.map((sample) => {
      const mine = ranked(sample), gap = spread(sample);
      if (order === "gap") return [sample, gap === null ? null : [-gap, 0]];
      if (mine === null) return [sample, null];
      return [sample, order === "best" ? [-mine[0], 0] : [mine[0], -lead(sample, mine)]];
    }));
    return [...list].sort((a, b) => {
      const x = keys.get(a), y = keys.get(b);
      if (x === null || y === null) return (x === null) - (y === null) || a.place - b.place;
      return x[0] - y[0] || x[1] - y[1] || a.place - b.place;
    });
  }

  function reason(sample, chosen) {
    const order = $("order").value, { metric, ranked, known, shown } = chosen;
    if (order === "report" || !metric) return "In the order of report.json.";
    if (order === "gap") {
      const all = known(sample, shown);
      if (all.length < 2) return `Fewer than two models have a value of ${metric}.`;
      const [low, high] = [all[0][1], all[all.length - 1][1]];
      return `${metric}: ${targets[high]} ${plain(value(sample, high, metric))}, ` +
        `${targets[low]} ${plain(value(sample, low, metric))}.`;
    }
    const mine = ranked(sample);
    if (mine === null) return `No value of ${metric}: undecided, or it does not apply.`;
    const all = samples.filter(inSet).map(ranked).filter((pair) => pair !== null);
    const best = order === "best";
    const ahead = all.filter(([x]) => best ? x > mine[0] : x < mine[0]).length;
    const equal = all.filter(([x]) => x === mine[0]).length;
    const neither = !better[metric] || better[metric] === "neither";
    const most = best ? (neither ? "highest" : "best") : (neither ? "lowest" : "worst");
    const than = { best: "better", worst: "worse", highest: "higher", lowest: "lower" }[most];
    const rank = ahead ? `${count(ahead)} of ${prompts(all.length)} ${ahead === 1 ? "is" : "are"} ${than}`
      : equal > 1 ? `the ${most} value, as on ${count(equal)} of ${prompts(all.length)}`
      : `the ${most} of ${prompts(all.length)}`;
    return `${metric} of ${targets[mine[1]]} is ${plain(value(sample, mine[1], metric))}: ${rank}.`;
  }

  function words() {
    const term = $("text").value.trim();
    return term ? new RegExp(term.replace(/[\\^$.*+?()[\]{}|/-]/g, "\\$&"), "gi") : null;
  }

  // A text with the searched words marked.
  function marked(text, cut, pattern) {
    const box = el("p", { className: "text", dir: "auto" });
    let end = 0;
    if (pattern) for (const match of text.matchAll(pattern)) {
      box.append(text.slice(end, match.index), el("mark", {}, match[0]));
      end = match.index + match[0].length;
    }
    box.append(text.slice(end));
    if (!text) box.append(el("span", { className: "none" }, "(empty)"));
    if (cut) box.append(el("span", { className: "none" }, ` … ${count(cut)} more characters in report.json`));
    return box;
  }

  function answer(sample, model, metric, pattern) {
    const packed = sample.answers[model];
    const title = el("h4", {}, targets[model]);
    if (!packed) return el("section", { className: "answer" }, title, el("p", { className: "none" }, "no answer"));
    const [text, cut, tokens, finished, values] = packed;
    const facts = [tokens === null ? null : `${count(tokens)} tokens`,
      finished === false ? "stopped at the limit of new tokens" : null].filter(Boolean).join(", ");
    const names = metrics[sample.set].map((name, place) => [name, place])
      .sort(([a], [b]) => (b === metric) - (a === metric));
    return el("section", { className: "answer" }, title, marked(text, cut, pattern),
      el("dl", {}, ...names.map(([name, place]) => el("div", { className: name === metric ? "chosen" : "" },
        el("dt", {}, name), el("dd", {}, plain(values[place]))))),
      el("p", { className: "n" }, facts));
  }

  function card(sample, chosen, pattern) {
    const about = [sample.set, sample.kind].filter(Boolean).join(" · ");
    return el("article", { className: "sample" },
      el("h3", {}, sample.id, " ", el("span", { className: "on" }, about)),
      el("p", { className: "why" }, reason(sample, chosen), sample.why ? ` Chosen by the evaluation: ${sample.why}` : null),
      el("div", { className: "prompt" }, el("h4", {}, "Prompt"), marked(sample.prompt, sample.cut, pattern)),
      el("div", { className: "answers" }, ...chosen.shown.map((model) =>
        answer(sample, model, chosen.metric, pattern))));
  }

  let found = [], listed = 0, chosen, pattern;
  function more() {
    const next = found.slice(listed, listed + PAGE).map((sample) => card(sample, chosen, pattern));
    $("list").append(...next);
    listed += next.length;
    $("more").hidden = listed >= found.length;
    $("count").textContent = found.length ? `${count(listed)} of ${prompts(found.length)} shown` +
      (found.length < samples.length ? `, of ${count(samples.length)} on this page.` : ".")
      : "No prompt matches these filters.";
    scrollers();
    return next[0];
  }
  function update() {
    options();
    chosen = choice();
    pattern = words();
    const has = (text) => text.search(pattern) >= 0;
    found = samples.filter((sample) => inSet(sample)
      && (!$("kind").value || sample.kind === $("kind").value)
      && (!pattern || has(sample.id) || has(sample.prompt)
        || chosen.shown.some((model) => sample.answers[model] && has(sample.answers[model][0])))
      && outcome(sample, chosen));
    found = sorted(found, chosen);
    listed = 0;
    $("list").replaceChildren();
    more();
  }

  if (!samples.length) {
    $("count").textContent = "The report has no samples.";
  } else {
    const sets = unique(samples.map((sample) => sample.set));
    fill($("set"), [...sets.map((set) => [set, set]), ...sets.length > 1 ? [["", "all sets"]] : []],
      data.start ? data.start[0] : sets[0]);
    fill($("model"), [...targets.map((name, model) => [String(model), name]),
      ["", "the worst of them"]], String(targets.indexOf(data.model)));
    $("models").append(...targets.map((name, model) => el("label", {},
      el("input", { type: "checkbox", value: model, defaultChecked: true }), " ", name)));
    $("text").addEventListener("input", update);
    $("controls").addEventListener("change", (event) => event.target === $("text") || update());
    $("controls").addEventListener("submit", (event) => event.preventDefault());
    $("more").addEventListener("click", () => {
      const first = more().querySelector("h3");
      first.tabIndex = -1;
      first.focus();
    });
    $("controls").hidden = false;
    update();
  }
  scrollers();
})();
