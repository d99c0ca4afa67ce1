"use strict";
// The labelling page. Foreign text only ever becomes a text node, and every request goes to the
// server that sent this page.
(() => {
  const $ = (id) => document.getElementById(id);
  const el = (tag, properties, ...children) => {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(properties || {})) {
      if (name in node) node[name] = value; else node.setAttribute(name, value);
    }
    node.append(...children.filter((child) => child !== null));
    return node;
  };
  const button = (text, onclick, properties) => el("button", { type: "button", onclick, ...properties }, text);
  const kbd = (key) => el("kbd", { "aria-hidden": "true" }, key);
  const letter = (i) => "ABCDEFGHI"[i];
  const listed = (items) => items.length < 2 ? items.join("")
    : `${items.slice(0, -1).join(", ")} and ${items.at(-1)}`;
  const count = (n, noun) => `${n.toLocaleString("en")} ${noun}${n === 1 ? "" : "s"}`;
  const say = (text) => { $("say").textContent = text; };
  const complain = (text) => { $("message").textContent = text; };
  const uuid = () => {
    const bytes = crypto.getRandomValues(new Uint8Array(16));
    bytes[6] = bytes[6] & 15 | 64;
    bytes[8] = bytes[8] & 63 | 128;
    const hex = [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
    return hex.replace(/(.{8})(.{4})(.{4})(.{4})(.*)/, "$1-$2-$3-$4-$5");
  };
  const stored = (storage) => { // storage may be forbidden, in an embedded page for example
    const own = {};
    const attempt = (act) => { try { return act(window[storage]); } catch { return null; } };
    return {
      get: (name) => attempt((place) => place.getItem(name)) ?? own[name] ?? null,
      set: (name, text) => { own[name] = text; attempt((place) => place.setItem(name, text)); },
      remove: (name) => { delete own[name]; attempt((place) => place.removeItem(name)); },
      names: () => attempt((place) => Object.keys(place)) ?? Object.keys(own),
    };
  };
  const browser = stored("localStorage"), session = stored("sessionStorage");

  // --- the server, which may be gone for a while

  class Refused extends Error {}
  const JSON_BODY = { "Content-Type": "application/json" };
  const waiting = new Set();
  const wake = () => { for (const go of [...waiting]) go(); };
  const pause = (milliseconds) => new Promise((resolve) => {
    const go = () => { clearTimeout(timer); waiting.delete(go); resolve(); };
    const timer = setTimeout(go, milliseconds);
    waiting.add(go);
  });
  function gone(reason) {
    const text = `${reason || "The server does not answer."} What you entered is kept; this page tries again ` +
      "every few seconds. If the server was started anew, open the link that it printed.";
    if ($("gone-text").textContent !== text) $("gone-text").textContent = text;
    $("gone").hidden = false;
  }
  function here() {
    if ($("gone").hidden) return;
    $("gone").hidden = true;
    $("gone-text").textContent = "";
    say("The server answers again.");
    wake();
  }
  // Sends until the server answers; a body that is a function is made anew for each attempt, and null gives up.
  async function call(method, path, body) {
    for (let attempt = 0; ; attempt++) {
      const content = typeof body === "function" ? body() : body;
      if (content === null) return null;
      let reason = "";
      try {
        const response = await fetch(`api/${path}`, {
          method, cache: "no-store", signal: AbortSignal.timeout(20000),
          ...(content && { headers: JSON_BODY, body: JSON.stringify(content) }),
        });
        const answer = await response.json().catch(() => null);
        if (response.ok && answer) { here(); return answer; }
        reason = answer && answer.error ? [answer.error, answer.remedy].filter(Boolean).map(sentence).join(" ")
          : `The server answered with error ${response.status}.`;
        if (answer && ![401, 403, 500, 502, 503, 504].includes(response.status)) {
          here();
          throw Object.assign(new Refused(reason), { status: response.status });
        }
      } catch (error) {
        if (error instanceof Refused) throw error;
      }
      gone(reason);
      await pause(Math.min(500 * 2 ** attempt, 5000));
    }
  }
  const sentence = (text) => text[0].toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
  addEventListener("online", wake);
  addEventListener("focus", wake);
  $("retry").onclick = wake;

  // A reload keeps the tab's name; a duplicated tab starts with a copy of it and takes a new one.
  async function ownName() {
    const channel = "BroadcastChannel" in window ? new BroadcastChannel("lora-rlhf label") : null;
    let name = session.get("tab"), taken = false;
    if (channel) channel.onmessage = ({ data }) => { taken ||= data.taken === name; };
    if (channel && name) {
      channel.postMessage({ ask: name });
      await new Promise((resolve) => setTimeout(resolve, 80));
    }
    if (!name || taken) session.set("tab", name = uuid());
    if (channel) channel.onmessage = ({ data }) => { if (data.ask === name) channel.postMessage({ taken: name }); };
    return name;
  }

  // --- what is on the page

  let tab, state, task = null, form = null, entry = null, submission = "", shown = 0, busy = false, sending = false;

  const view = (title, ...children) => {
    const heading = el("h1", { tabIndex: -1 }, title);
    $("main").replaceChildren(heading, ...children.filter((child) => child !== null));
    $("main").dataset.type = task ? task.type : "";
    $("bar").hidden = task === null;
    complain("");
    $("saved").textContent = "";
    document.title = state && state.project ? `${title} – ${state.project.name}` : title;
    scrollTo(0, 0);
    heading.focus({ preventScroll: true });
  };
  function progress(now) {
    if (!now) return;
    state.progress = now;
    const { done, total, seconds_median: seconds } = now, left = Math.max(0, total - done);
    const minutes = Math.ceil(left * (seconds || 0) / 60);
    $("progress").hidden = !total;
    $("meter").max = total || 1;
    $("meter").value = done;
    $("count").textContent = `${done} of ${total}` +
      (minutes && left ? `, about ${minutes < 90 ? `${minutes} min` : `${Math.round(minutes / 60)} h`} left` : "");
  }
  function text(content, properties) { // foreign text; what is long can be opened
    const box = el("div", { className: "text", dir: "auto", ...properties }, content);
    if (content.length < 1500 && content.split("\n").length < 24) return box;
    box.classList.add("long");
    box.tabIndex = 0;
    box.setAttribute("role", "group");
    box.setAttribute("aria-label", "long text");
    const more = button(`Show all ${content.length.toLocaleString("en")} characters`, () => {
      const open = box.classList.toggle("open");
      more.textContent = open ? "Show less" : `Show all ${content.length.toLocaleString("en")} characters`;
      more.setAttribute("aria-expanded", open);
    }, { className: "link", "aria-expanded": "false" });
    return el("div", { className: "fold" }, box, more);
  }

  // Markdown of the guidelines, as nodes; blocks that are not in `before` are marked as new.
  function markdown(source, before) {
    const root = el("div");
    const inline = (line) => {
      const node = document.createDocumentFragment();
      const mark = /\*\*(.+?)\*\*|\*(\S.*?)\*|`(.+?)`|\[([^\]]+)\]\((https?:\/\/[^)\s]+)\)/g;
      let at = 0;
      for (const found of line.matchAll(mark)) {
        const [all, strong, em, code, label, href] = found;
        node.append(line.slice(at, found.index), strong ? el("strong", null, inline(strong))
          : em ? el("em", null, inline(em)) : code ? el("code", null, code)
          : el("a", { href, target: "_blank", rel: "noopener noreferrer" }, label));
        at = found.index + all.length;
      }
      node.append(line.slice(at));
      return node;
    };
    const joined = (lines) => inline(lines.map((line) => line.trim()).join(" "));
    const blocks = (content) => content.replaceAll("\r\n", "\n").replace(/<!--[^]*?-->/g, "")
      .replace(/^(#{1,6} .*)\n?/gm, "\n$1\n\n").replace(/\n(?=\s*([-*]|\d+\.) )/g, "\n\n")
      .split(/\n\s*\n/).filter((block) => block.trim());
    const known = before === null ? null : new Set(blocks(before).map((block) => block.trim()));
    let list = null;
    for (const block of blocks(source)) {
      const lines = block.replace(/^\n+/, "").trimEnd().split("\n"), [first] = lines;
      const heading = /^(#{1,6}) +(.*)/.exec(first), item = /^\s*([-*]|\d+\.) +/.exec(first);
      let node;
      if (heading) node = el(`h${Math.min(6, heading[1].length + 1)}`, null, inline(heading[2]));
      else if (item) node = el("li", null, joined([first.slice(item[0].length), ...lines.slice(1)]));
      else if (first[0] === ">") node = el("blockquote", null, joined(lines.map((line) => line.replace(/^> ?/, ""))));
      else if (first.startsWith("|")) {
        const cells = (line) => line.replace(/^\||\|\s*$/g, "").split("|").map((cell) => cell.trim());
        const row = (line, i) => el("tr", null, ...cells(line).map((cell) => el(i ? "td" : "th", null, inline(cell))));
        node = el("table", null, ...lines.filter((line) => !/^[|:\s-]+$/.test(line)).map(row));
      } else node = el("p", null, joined(lines));
      if (known && !known.has(block.trim())) node.classList.add("new");
      const kind = item ? /\d/.test(item[1]) ? "OL" : "UL" : null;
      if (kind && (!list || list.tagName !== kind)) root.append(list = el(kind));
      if (!kind) list = null;
      (kind ? list : root).append(node);
    }
    return root;
  }

  function welcome() {
    task = null;
    const field = (id, properties) =>
      el("input", { type: "text", id, autocomplete: "off", "aria-describedby": `${id}-why`, ...properties });
    const name = field("name", { required: true, maxLength: 80, spellcheck: false, value: state.labeler || "" });
    const group = field("group", { maxLength: 200 });
    const problem = el("p", { role: "alert", className: "problem" });
    const begin = async (event) => {
      event.preventDefault();
      if (busy) return;
      busy = true;
      try {
        const people = group.value.trim();
        await call("POST", "labeler", { name: name.value.trim(), ...(people && { group: people }) });
        await refresh();
      } catch (error) {
        problem.textContent = error.message;
        name.focus();
      } finally { busy = false; }
    };
    view("Who labels?", el("form", { className: "panel narrow", onsubmit: begin },
      el("label", { htmlFor: "name" }, "Your pseudonym"), name,
      el("p", { id: "name-why", className: "quiet" },
        "Any word that is not your name. Use the same one each time: it is stored with every label."),
      el("label", { htmlFor: "group" }, "A group you describe yourself as belonging to (optional)"), group,
      el("p", { id: "group-why", className: "quiet" },
        "Agreement is compared between groups of five people or more, and never shown for fewer."),
      problem, el("button", { className: "main" }, "Go on")));
    name.focus();
  }

  function guidelines() {
    task = null;
    const { text: source, sha256 } = state.guidelines, before = browser.get("guidelines");
    const changed = state.progress.done > 0 || before !== null && before !== source;
    view(changed ? "The guidelines have changed" : "Guidelines",
      el("p", { className: "lead" }, changed ? `Please read them again before you go on${before === null ? ""
        : "; what is new has a bar beside it"}. Your earlier labels stay as they are.`
        : "Please read them before the first label. You can open them again at any time."),
      el("div", { className: "panel guidelines" }, markdown(source, changed ? before : null)),
      button("I have read the guidelines", async () => {
        if (busy) return;
        busy = true;
        try {
          await call("POST", "guidelines", { sha256 });
          browser.set("guidelines", source);
        } catch (error) { // they changed once more while they were read
          if (!(error instanceof Refused)) throw error;
        } finally { busy = false; }
        state = await call("GET", "state");
        await route();
      }, { className: "main", id: "acknowledge" }));
  }

  async function route() {
    $("project").textContent = state.project.name;
    $("who").hidden = $("open-guidelines").hidden = !state.labeler;
    $("who").textContent = state.labeler ? `as ${state.labeler}` : "";
    $("who").setAttribute("aria-label", `You label as ${state.labeler}. Change`);
    progress(state.progress);
    if (!state.labeler) welcome();
    else if (!state.guidelines.acknowledged) guidelines();
    else await next();
  }
  async function refresh() {
    state = await call("GET", "state");
    await route();
  }
  // A refusal by the server: new guidelines to read, or a message with what was entered still on the page.
  async function refused(error) {
    if (!(error instanceof Refused)) throw error;
    const now = await call("GET", "state");
    if (now.labeler !== state.labeler || !now.guidelines.acknowledged) { state = now; await route(); return; }
    if (!task) {
      view("This did not work", el("div", { className: "panel narrow" }, el("p", { className: "lead" }, error.message),
        button("Try again", refresh, { className: "main" })));
      return;
    }
    complain(error.message);
    if (error.status === 409) $("message").append(" ", button("Go to the next task", refresh, { className: "link" }));
  }
  async function next() {
    try { show(await call("POST", "next", { tab })); } catch (error) { await refused(error); }
  }

  function show(answer) {
    progress(answer.progress);
    if (!answer.assignment) { finished(); return; }
    task = answer.assignment;
    submission = uuid();
    shown = performance.now();
    form = forms[task.type];
    entry = newest(task);
    const several = task.prompt.length > 1, names = { user: "User", assistant: "Assistant", system: "System" };
    const turns = task.prompt.map(({ role, content }, i) => el("div", { className: role === "user" ? "turn" : "turn other" },
      several ? el("h3", null, names[role] || role) : null, text(content, i + 1 === task.prompt.length ? { id: "asked" } : null)));
    view(form.title(),
      task.previous ? el("p", { className: "note", id: "changing" },
        "You are changing your last label. The earlier one stays on record; this one will count.") : null,
      form.lead ? el("p", { className: "lead" }, form.lead) : null,
      el("section", { className: "prompt", "aria-labelledby": "prompt" },
        el("h2", { id: "prompt" }, several ? "Conversation" : "Prompt"), ...turns),
      ...form.build(), extras());
    $("undo").disabled = !state.progress.done;
    update();
    if (form !== forms.demonstration) return;
    check();
    // Who begins to type should write, not press keys; on a phone the keyboard would hide the prompt.
    if (!matchMedia("(pointer: coarse)").matches) $("text").focus({ preventScroll: true });
  }
  function finished() {
    const { done } = state.progress;
    task = null;
    view("Nothing left to label here", el("div", { className: "panel narrow" },
      el("p", { className: "lead" }, done ? `Thank you: ${count(done, "label")} of yours ${done === 1 ? "is" : "are"} saved.`
        : "There are no tasks for you."),
      el("p", { className: "quiet" }, "Tasks that are open in another tab or with another labeler are not listed. " +
        "New ones appear when the project's owner adds them."),
      el("div", { className: "buttons" }, button("Look for new tasks", refresh, { className: "main" }),
        done ? button("Change the last label", undo) : null)));
  }

  // --- the entry of this task: kept in the browser at once, on the server soon after

  const blank = () => ({
    ranks: task.answers.map(() => null), strength: null, overall: null, questions: {}, text: "",
    flags: [], both_bad: false, note: "", at: 0,
  });
  const keptAs = ({ id, prompt, answers }) => { // the same number may be another project's task
    let a = 0xdeadbeef, b = 0x41c6ce57;
    for (const c of JSON.stringify([state.project.name, state.labeler, id, prompt, answers])) {
      a = Math.imul(a ^ c.codePointAt(0), 2654435761);
      b = Math.imul(b ^ c.codePointAt(0), 1597334677);
    }
    return `draft ${a >>> 0} ${b >>> 0}`;
  };
  let key = "", onServer = 0, timer = 0, saving = Promise.resolve();
  const dirty = () => entry !== null && entry.at > onServer;
  const parsed = (json) => { try { return JSON.parse(json); } catch { return null; } };

  function newest({ previous, draft }) {
    key = keptAs(task);
    const fits = (one) => one && one.at > 0 && one.ranks && one.ranks.length === task.answers.length;
    const best = [draft, parsed(browser.get(key))].filter(fits).sort((a, b) => b.at - a.at)[0];
    onServer = fits(draft) ? draft.at : 0;
    if (best && best.at > onServer) later(0);
    const { value, flags, both_bad, note } = previous || {};
    return { ...blank(), ...(previous && { ...value, flags, both_bad, note }), ...best };
  }
  function changed() {
    entry.at = Math.max(Date.now(), entry.at + 1);
    browser.set(key, JSON.stringify(entry));
    $("saved").textContent = "";
    complain("");
    later(500);
    update();
  }
  const setter = (name) => (value) => { entry[name] = value; changed(); };
  function later(milliseconds) {
    clearTimeout(timer);
    timer = setTimeout(() => { saving = saving.then(save); }, milliseconds);
  }
  async function save() {
    const mine = task;
    let at = 0;
    const body = () => {
      if (task !== mine || sending || !dirty()) return null;
      at = entry.at;
      return { assignment: mine.id, tab, draft: entry };
    };
    try {
      if (!await call("PUT", "draft", body)) return;
      $("saved").textContent = "Draft saved";
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      $("saved").textContent = "Draft kept in this browser only";
    }
    if (task !== mine) return;
    onServer = Math.max(onServer, at);
    if (dirty()) later(500);
  }
  addEventListener("pagehide", () => {
    if (!task || !dirty()) return;
    const body = JSON.stringify({ assignment: task.id, tab, draft: entry });
    fetch("api/draft", { method: "PUT", keepalive: body.length < 30000, headers: JSON_BODY, body }).catch(() => {});
  });

  function update() {
    const open = task.type === "ranking" ? entry.ranks.indexOf(null) : -1;
    answers().forEach((node, i) => node.classList.toggle("next", i === open));
    $("order").replaceChildren(...(form.line ? [form.line()] : []));
    $("save").classList.toggle("ready", !form.missing());
  }
  function hold(on) { // while a label is on its way, the page shows what was sent
    busy = sending = on;
    for (const field of $("main").querySelectorAll("input, textarea")) {
      field[field.type === "textarea" ? "readOnly" : "disabled"] = on;
    }
    for (const name of ["save", "skip", "undo"]) $(name).classList.toggle("held", on);
  }
  async function send(path, content, ready) {
    if (busy || !task || performance.now() - shown < 250) return;
    const used = key, patience = setTimeout(() => { $("saved").textContent = "Sending…"; }, 300);
    hold(true);
    clearTimeout(timer);
    wake();
    try {
      await saving;
      if (ready && !await ready()) return;
      await call("POST", path, { assignment: task.id, tab, ...content });
      browser.remove(used);
      task = entry = null;
      await refresh();
      say(path === "skip" ? "Skipped." : "Saved.");
    } catch (error) {
      if (path === "skip" && error.status === 409) await refresh(); // an earlier attempt got through
      else await refused(error);
    } finally {
      clearTimeout(patience);
      hold(false);
      if (task && dirty()) later(0);
      if (task && document.activeElement === document.body) $("save").focus(); // its field was held
    }
  }
  async function submit() {
    const complete = () => {
      const missing = form.missing();
      if (missing) { complain(missing.text); missing.focus.focus(); }
      return !missing;
    };
    if (busy || !task || !complete()) return;
    const { flags, both_bad, note } = entry, mine = task;
    await send("label", { submission, value: form.value(), flags, both_bad, note }, form.ready);
    if (task === mine && !$("message").textContent) complete(); // its check has found something
  }
  const skip = () => send("skip", { flags: entry.flags, note: entry.note });
  async function undo() {
    if (busy) return;
    busy = true;
    try {
      clearTimeout(timer);
      await (saving = saving.then(save));
      show(await call("POST", "undo", { tab }));
      say("Your last label, to change.");
    } catch (error) { await refused(error); } finally { busy = false; }
  }

  // --- parts of forms

  const all = (where) => [...document.querySelectorAll(where)];
  const answers = () => all(".answer");
  const radio = (name, value) => document.querySelector(`input[name="${name}"][value="${value}"]`);
  const checkbox = (properties, ...label) =>
    el("label", { className: "check" }, el("input", { type: "checkbox", ...properties }), ...label);
  // Options: value, text, name for a screen reader if the text does not say enough, key.
  const picks = (name, legend, options, chosen, pick) => el("fieldset", { className: "picks" },
    el("legend", null, ...[legend].flat()),
    el("div", { className: "row" }, ...options.map(([value, label, spoken, shortcut]) => el("label", { className: "pick" },
      el("input", { type: "radio", name, value: String(value), checked: value === chosen, "aria-label": spoken || label,
        onchange: () => pick(value) }),
      el("span", { "aria-hidden": "true" }, label, shortcut ? kbd(shortcut) : null)))));
  const card = (i, title, ...children) => el("article",
    { className: "answer", tabIndex: -1, id: `answer-${i}`, "aria-labelledby": `answer-${i}-title` },
    el("h3", { id: `answer-${i}-title` }, title), text(task.answers[i]), ...children);

  function extras() {
    const names = { harmful: "Harmful", personal_data: "Personal data", broken: "Broken: cannot be judged" };
    const mark = ({ target }) => setter("both_bad")(target.checked);
    const bad = checkbox({ id: "both-bad", checked: entry.both_bad, onchange: mark },
      task.answers.length === 2 ? "Both answers are bad " : "All answers are bad ", kbd("b"));
    const flags = state.flags.map((flag) => checkbox({
      name: "flag", value: flag, checked: entry.flags.includes(flag),
      onchange: () => setter("flags")(all("input[name=flag]:checked").map((box) => box.value)),
    }, names[flag] || flag.replaceAll("_", " ")));
    return el("section", { className: "extras", "aria-label": "Flags and note" },
      task.answers.length > 1 ? bad : null,
      el("fieldset", { className: "flags" }, el("legend", null, "Flag ", kbd("f")), ...flags),
      el("div", null, el("label", { htmlFor: "note" }, "Note ", kbd("t")),
        el("textarea", { id: "note", rows: 1, maxLength: 5000, dir: "auto", value: entry.note,
          oninput: ({ target }) => setter("note")(target.value) })));
  }

  const bring = (node) => { node.focus({ preventScroll: true }); node.scrollIntoView({ block: "nearest" }); };
  const at = (nodes) => nodes.findIndex((node) => node.contains(document.activeElement));
  const move = (nodes, step) => {
    const from = at(nodes), last = nodes.length - 1;
    bring(nodes[from < 0 ? (step > 0 ? 0 : last) : Math.min(last, Math.max(0, from + step))]);
  };
  const press = (input) => { input.checked = true; input.dispatchEvent(new Event("change")); };
  const whereNext = () => (form.missing() || { focus: $("save") }).focus;

  const tiers = () => [...new Set(entry.ranks.filter((rank) => rank !== null))].sort((a, b) => a - b)
    .map((rank) => entry.ranks.flatMap((other, i) => other === rank ? [letter(i)] : []));
  // One more than the number of better answers, so that equal ones share a rank.
  const competition = (given) => given.map((mine) =>
    mine === null ? null : 1 + given.filter((other) => other !== null && other < mine).length);
  function setRank(i, rank, push) {
    const old = entry.ranks[i] ?? Infinity; // with `push`, the answers between there and here make room
    const made = (other) => other >= rank && other < old ? other + 1 : other > old && other <= rank ? other - 1 : other;
    if (push) entry.ranks = entry.ranks.map((other) => other === null ? null : made(other));
    entry.ranks[i] = rank;
    if (entry.ranks.some((other) => other > entry.ranks.length)) entry.ranks = competition(entry.ranks);
    entry.ranks.forEach((given, k) => {
      for (const input of all(`input[name=rank-${k}]`)) input.checked = Number(input.value) === given;
    });
    changed();
    say(`Answer ${letter(i)}: ${rank === null ? "no rank" : `rank ${entry.ranks[i]}`}. ` +
      `Order: ${tiers().map(listed).join(", then ") || "empty"}.`);
  }
  const openQuestions = () => state.questions.flatMap(({ key: name }, i) => name in entry.questions ? [] : [i]);
  const questions = () => all(".question");

  const forms = {
    ranking: {
      lead: "1 is the best. Equal answers may share a rank.",
      title: () => `Rank these ${task.answers.length} answers`,
      build: () => {
        const n = task.answers.length;
        const options = task.answers.map((_, i) => [i + 1, String(i + 1), { 0: "1, best", [n - 1]: `${n}, worst` }[i]]);
        return [el("div", { className: `answers of-${n}` }, ...task.answers.map((_, i) => card(i, `Answer ${letter(i)}`,
          picks(`rank-${i}`, ["Rank", el("span", { className: "hidden" }, ` of answer ${letter(i)}`)], options,
            entry.ranks[i], (rank) => setRank(i, rank)))))];
      },
      missing: () => {
        const open = entry.ranks.flatMap((rank, i) => rank === null ? [i] : []);
        if (!open.length || entry.both_bad && open.length === entry.ranks.length) return null;
        const names = `answer${open.length === 1 ? "" : "s"} ${listed(open.map(letter))}`;
        return { text: `No rank yet: ${names}.`, focus: answers()[open[0]] };
      },
      value: () => ({ ranks: competition(entry.ranks).map((rank) => rank ?? 1) }), // all bad without ranks is a tie
      line: () => el("ol", { "aria-label": "Your order, best first" },
        ...tiers().map((tier) => el("li", null, tier.join(" = ")))),
      digit: (n, push) => {
        if (n > task.answers.length) return;
        const here = at(answers()), i = here >= 0 ? here : Math.max(0, entry.ranks.indexOf(null));
        setRank(i, n || null, push && n > 0);
        const after = entry.ranks.indexOf(null, i);
        bring(!n || after < 0 ? whereNext() : answers()[after]);
      },
      move: (step) => move(answers(), step),
      help: () => [["1", `– ${task.answers.length}`, "rank of the outlined answer; then the next one"],
        ["Shift", "1", "the same, and moves what has this rank or a worse one down"],
        ["0", "", "takes the rank away"], ["←", "→", "answer before, answer after (also k and j)"]],
    },
    pair: {
      title: () => "Which answer is better?",
      build: () => {
        const words = ["about the same", "slightly better", "better", "much better"];
        const options = [-3, -2, -1, 0, 1, 2, 3].map((n) =>
          [n, `${n < 0 ? "A " : n > 0 ? "B " : ""}${words[Math.abs(n)]}`, "", String(n + 4)]);
        return [el("div", { className: "answers of-2" }, ...task.answers.map((_, i) => card(i, `Answer ${letter(i)}`))),
          picks("strength", "Your preference", options, entry.strength, setter("strength"))];
      },
      missing: () => entry.strength !== null || entry.both_bad ? null
        : { text: "Choose which answer is better first.", focus: radio("strength", 0) },
      value: () => ({ strength: entry.strength ?? 0 }),
      digit: (n) => {
        const input = radio("strength", n - 4);
        if (input) { press(input); bring(input); }
      },
      move: (step) => forms.pair.digit(Math.min(7, Math.max(1, (entry.strength ?? 0) + 4 + step))),
      help: () => [["1", "– 7", "from A much better to B much better; 4 is about the same"],
        ["←", "→", "one step towards A or B"]],
    },
    rating: {
      title: () => "Rate this answer",
      build: () => [el("div", { className: "answers of-1" }, card(0, "Answer")),
        picks("overall", "Overall quality, from 1 (very poor) to 7 (excellent)",
          [1, 2, 3, 4, 5, 6, 7].map((n) => [n, String(n)]), entry.overall, setter("overall")),
        el("div", { className: "questions" }, ...state.questions.map(({ key: name, text: question }) =>
          el("div", { className: "question", tabIndex: -1 },
            picks(`question-${name}`, question, [[true, "Yes"], [false, "No"]], entry.questions[name],
              (yes) => setter("questions")({ ...entry.questions, [name]: yes }))))),
        button("No to the rest", () => {
          for (const i of openQuestions()) press(radio(`question-${state.questions[i].key}`, false));
          bring(whereNext());
        }, { id: "rest" })],
      missing: () => {
        const open = openQuestions();
        if (entry.overall === null) return { text: "Choose the overall quality first.", focus: radio("overall", 4) };
        if (!open.length) return null;
        return { text: `Answer every question first: ${open.length} left.`, focus: questions()[open[0]] };
      },
      value: () => ({ overall: entry.overall, questions: entry.questions }),
      digit: (n) => {
        const input = radio("overall", n);
        if (input) { press(input); bring(whereNext()); }
      },
      yes: (answer) => {
        const here = at(questions()), i = here >= 0 ? here : openQuestions()[0] ?? 0;
        press(radio(`question-${state.questions[i].key}`, answer));
        bring(questions()[i + 1] || whereNext());
      },
      move: (step) => move(questions(), step),
      help: () => [["1", "– 7", "overall quality"], ["y", "n", "yes or no to the outlined question; then the next one"],
        ["←", "→", "question before, question after (also k and j)"]],
    },
    demonstration: {
      title: () => "Write the best answer",
      build: () => {
        const area = el("textarea", { id: "text", rows: 10, maxLength: 100000, dir: "auto", spellcheck: true,
          value: entry.text, "aria-describedby": "asked wanted problems",
          oninput: () => { setter("text")(area.value); check(); } });
        const { json_schema: schema } = task.checks || {};
        return [el("section", { className: "write", "aria-labelledby": "write" },
          el("h2", { id: "write" }, el("label", { htmlFor: "text" }, "Your answer")),
          el("p", { id: "wanted", className: "quiet" }, wanted() || "As the ideal assistant would write it."),
          schema ? el("pre", { className: "text", tabIndex: 0 }, JSON.stringify(schema, null, 2)) : null,
          area, el("p", { id: "counts", className: "quiet" }), el("div", { id: "problems", role: "status" }))];
      },
      ready: async () => { await checkNow(); return !problems.length; },
      missing: () => !entry.text.trim() ? { text: "Write an answer first.", focus: $("text") }
        : problems.length ? { text: `Not yet in the wanted form: ${problems.join(" ")}`, focus: $("text") } : null,
      value: () => ({ text: entry.text }),
      help: () => [["Ctrl", "Enter", "saves while you write"], ["Esc", "", "leaves the text; then the other keys work"]],
    },
  };

  function wanted() {
    const parts = Object.entries(task.checks || {}).map(([name, value]) => ({
      max_words: `at most ${count(value, "word")}`, regex: `text that matches ${value}`,
      bullets: value === true ? "a list of bullets" : count(value, "bullet"), json_schema: "JSON that fits the schema below",
    }[name] || `${name}: ${JSON.stringify(value)}`));
    return parts.length ? `Wanted: ${parts.join("; ")}.` : "";
  }
  let problems = [], checking = 0;
  function check() { // while it is written, a moment after the last key
    const words = entry.text.trim() ? entry.text.trim().split(/\s+/u).length : 0;
    $("counts").textContent = `${count(words, "word")}, ${count([...entry.text].length, "character")}`;
    problems = [];
    clearTimeout(checking);
    checking = setTimeout(() => checkNow().catch(refused), 300);
  }
  async function checkNow() {
    if (!task || form !== forms.demonstration) return;
    clearTimeout(checking);
    const content = entry.text, mine = task;
    const still = () => task === mine && entry.text === content;
    const checked = Boolean(content.trim() && mine.checks);
    const answer = checked ? await call("POST", "check", () => still() ? { assignment: mine.id, text: content } : null)
      : { problems: [] };
    if (!answer || !still()) return;
    problems = answer.problems.map(sentence);
    $("problems").replaceChildren(problems.length
      ? el("ul", { className: "problem" }, ...problems.map((problem) => el("li", null, problem)))
      : checked ? el("p", { className: "good" }, "✓ In the wanted form") : "");
    update();
  }

  // --- keys

  const enabled = () => browser.get("keys") !== "off";
  function help() {
    const several = task && task.answers.length > 1;
    const rows = [...(task ? form.help() : []), ["Enter", "", "saves and goes on (Ctrl + Enter inside text)"],
      ...(several ? [["b", "", `${task.answers.length === 2 ? "both" : "all"} answers are bad`]] : []),
      ["s", "", "skips the task"], ["u", "", "goes back to the last label, to change it"],
      ["f", "", "flags: harmful, personal data, broken"], ["t", "", "note"], ["g", "", "guidelines"],
      ["?", "", "these keys"], ["Esc", "", "closes this, or leaves a text field"]];
    const spoken = (name) => el("kbd", null, name);
    $("help-keys").replaceChildren(...rows.flatMap(([first, second, meaning]) => [
      el("dt", null, spoken(first), " ", second.startsWith("–") || !second ? second : spoken(second)),
      el("dd", null, meaning)]));
    $("keys-on").checked = enabled();
    $("help").showModal();
  }
  function openGuidelines() {
    if (!state || !state.labeler) return;
    $("guidelines-text").replaceChildren(markdown(state.guidelines.text, null));
    $("guidelines").showModal();
    $("guidelines-text").focus();
  }
  const once = (act) => ({ detail }) => { if (detail < 2) act(); }; // of a double click, the first
  $("open-help").onclick = help;
  $("open-guidelines").onclick = openGuidelines;
  $("who").onclick = welcome;
  $("save").onclick = once(submit);
  $("skip").onclick = once(skip);
  $("undo").onclick = once(undo);
  $("keys-on").onchange = ({ target }) => browser.set("keys", target.checked ? "on" : "off");

  const keys = {
    b: () => { const box = $("both-bad"); if (box) { box.click(); box.focus(); } },
    s: skip, u: undo, f: () => bring(document.querySelector("input[name=flag]")), t: () => bring($("note")),
    y: () => form.yes && form.yes(true), n: () => form.yes && form.yes(false), Enter: submit,
    ...Object.fromEntries([["j", 1], ["k", -1], ["ArrowRight", 1], ["ArrowLeft", -1]]
      .map(([name, step]) => [name, () => form.move && form.move(step)])),
  };
  const leave = () => document.querySelector("h1").focus();
  function action({ key: name, code, target, ctrlKey, metaKey, altKey, shiftKey }) {
    const dialog = document.querySelector("dialog[open]"), plain = !ctrlKey && !metaKey && !altKey;
    const letters = plain && enabled();
    if (dialog) return letters && { g: "guidelines", "?": "help" }[name] === dialog.id ? () => dialog.close() : null;
    if (name === "Enter" && (ctrlKey || metaKey)) return task && submit;
    if (target.matches("textarea, input[type=text]")) return name === "Escape" && task ? leave : null;
    if (!plain || name.length === 1 && !letters) return null;
    if (name === "?") return help;
    if (name === "g") return openGuidelines;
    if (!task) return name === "u" && state && state.progress.done && $("acknowledge") === null ? undo : null;
    const digit = /^\d$/.test(name) ? name : (/^Digit(\d)$/.exec(code) || [])[1];
    if (digit) return form.digit && (() => form.digit(Number(digit), shiftKey && digit !== name));
    const native = name === "Enter" ? "button, a" : name.startsWith("Arrow") ? "input[type=radio], .text" : null;
    return native && target.closest(native) ? null : Object.hasOwn(keys, name) ? keys[name] : null;
  }
  document.addEventListener("keydown", (event) => {
    if (event.isComposing || event.defaultPrevented) return;
    const act = action(event), moves = event.key.startsWith("Arrow");
    if (!act) return;
    event.preventDefault();
    if ((!event.repeat || moves) && !(busy && task)) act();
  });

  (async () => {
    for (const name of browser.names().filter((one) => one.startsWith("draft "))) { // left behind long ago
      if (!((parsed(browser.get(name)) || {}).at > Date.now() - 30 * 86400000)) browser.remove(name);
    }
    tab = await ownName();
    await refresh();
  })();
})();
