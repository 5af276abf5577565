/* The latents' explorer: a searchable, sortable list beside one latent in full.
 *
 * Plain JavaScript without dependencies. `unweaveExplorer(root, data)` fills `root` from data of format 1 (explorer.py
 * describes it); elements with a data-uw-explorer attribute are filled when the page has loaded. Only the rows in view
 * exist in the document, and a latent's contexts are decoded when they are shown or first searched.
 * The address's hash, #latent-123, selects a latent.
 */
"use strict";

function unweaveExplorer(root, data) {
  const ROW = 66, SPARE = 6, LEVELS = 9;
  const KINDS = { top: "Where it fires most strongly", quantile: "Across its range", random: "Random contexts" };
  const latents = data.latents.map((row) => ({
    index: row[0], rate: row[1] || 0, max: row[2] || 0, promoted: row[3], suppressed: row[4], contexts: row[5], note: row[6],
  }));
  const place = new Map(latents.map((latent, at) => [latent.index, at]));
  let shown = latents.map((_, at) => at), current = -1;

  /* ---- text ---- */
  const SIGNS = { "\n": "\u21b5", "\t": "\u21e5", "\x7f": "\u2421" };
  const visible = (token) => {
    if (token === "") return "\u2205";
    if (/^ +$/.test(token)) return "\u2423".repeat(token.length);
    return token.replace(/[\x00-\x1f\x7f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]/g, (c) =>
      SIGNS[c] || (c < " " ? String.fromCharCode(0x2400 + c.charCodeAt(0))
        : "[U+" + c.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0") + "]"));
  };
  const number = (value) => value === null ? "n/a"
    : value === 0 ? "0" : Math.abs(value) < 1e-4 ? value.toExponential(1)
    : value.toLocaleString("en-GB", { maximumSignificantDigits: 3 }).replace("-", "\u2212");
  const percent = (rate) => (rate >= 0.1 ? (rate * 100).toFixed(1).replace(/\.0$/, "")
    : Number((rate * 100).toPrecision(2)).toString()) + "\u202f%";
  const thousands = (value) => value.toLocaleString("en-GB");

  /* ---- elements ---- */
  const make = (tag, name, children, attributes) => {
    const element = document.createElement(tag);
    if (name) element.className = name;
    for (const child of [].concat(children === undefined ? [] : children)) if (child !== "") element.append(child);
    for (const key in attributes || {}) element.setAttribute(key, attributes[key]);
    return element;
  };
  const blank = (token) => token.startsWith(" ") && !/^ +$/.test(token);
  const chip = (token, value) => {
    const inside = blank(token) ? [make("span", "uw-blank", "\u00b7"), visible(token.slice(1))] : visible(token);
    const title = JSON.stringify(token) + (value === undefined ? "" : "  " + (value > 0 ? "+" : "") + number(value));
    return make("span", "uw-chip", inside, { title });
  };
  const pairs = (flat) => {
    const list = [];
    for (let i = 0; i < flat.length; i += 2) list.push([data.tokens[flat[i]], flat[i + 1]]);
    return list;
  };
  const words = (context) => context[1].split(" ").map((code) => data.tokens[parseInt(code, 36)]);
  const peaks = (latent) => {
    if (!latent.peaks) {
      const tops = latent.contexts.filter((context) => data.kinds[context[0]][0] === "top");
      latent.peaks = [...new Set(tops.map((context) => words(context)[context[3]]))];
    }
    return latent.peaks;
  };

  /* ---- the frame ---- */
  const search = make("input", "uw-search", undefined,
    { type: "search", placeholder: "Search tokens, text or a number", "aria-label": "Search the latents", spellcheck: "false" });
  const select = (label, options) => {
    const element = make("select", "", options.map(([value, text]) => make("option", "", text, { value })), { "aria-label": label });
    return element;
  };
  const where = select("Search in", [["all", "in everything"], ["peaks", "in what it fires on"], ["logits", "in what it raises"]]);
  const order = select("Order", [["auto", "best match first"], ["index", "by number"], ["often", "most frequent"],
    ["rare", "least frequent"], ["strong", "strongest"]]);
  const filter = select("Show", [["all", "all latents"], ["alive", "that fire"], ["dead", "that never fire"],
    ...data.tags.map((tag, at) => ["tag" + at, tag[0]])]);
  const dice = make("button", "uw-button", "Random", { type: "button", title: "Show a latent drawn at random" });
  const count = make("p", "uw-count", "", { "aria-live": "polite" });
  const list = make("div", "uw-list", undefined, { tabindex: "0", role: "listbox", "aria-label": "Latents" });
  const space = list.appendChild(make("div", "uw-space"));
  const detail = make("section", "uw-detail", undefined, { "aria-label": "The chosen latent", tabindex: "-1" });
  const bubble = make("div", "uw-bubble", undefined, { role: "status", hidden: "" });
  root.replaceChildren(
    make("div", "uw-tools", [search, where, filter, order, dice]),
    make("div", "uw-panes", [make("div", "uw-side", [count, list]), detail]), bubble);

  /* ---- the list: only rows in view are in the document ---- */
  const row = (at, line) => {
    const latent = latents[at];
    const first = peaks(latent).slice(0, 5).map((token) => chip(token));
    const second = pairs(latent.promoted).slice(0, 5).map(([token]) => visible(token).trim()).join("  ");
    const element = make("div", "uw-item" + (at === current ? " uw-chosen" : ""), [
      make("span", "uw-index", String(latent.index)),
      make("span", "uw-fires", first.length ? first : make("span", "uw-none", "never fired")),
      make("span", "uw-rate", latent.max > 0 ? percent(latent.rate) : ""),
      make("span", "uw-writes", second ? "\u2192 " + second : ""),
    ], { role: "option", id: "uw-option-" + latent.index, "aria-selected": String(at === current),
      "aria-posinset": String(line + 1), "aria-setsize": String(shown.length) });
    element.style.top = line * ROW + "px";
    element.addEventListener("click", () => choose(at, true));
    return element;
  };
  const draw = () => {
    const from = Math.max(0, Math.floor(list.scrollTop / ROW) - SPARE);
    const to = Math.min(shown.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + SPARE);
    const rows = [];
    for (let line = from; line < to; line++) rows.push(row(shown[line], line));
    space.style.height = shown.length * ROW + "px";
    space.replaceChildren(...rows);
    if (current >= 0 && space.querySelector(".uw-chosen")) list.setAttribute("aria-activedescendant", "uw-option-" + latents[current].index);
    else list.removeAttribute("aria-activedescendant");
  };
  const reveal = () => {
    const line = shown.indexOf(current);
    if (line < 0) return;
    const above = line * ROW - list.scrollTop, room = list.clientHeight - ROW;
    if (above < -ROW || above > room + ROW) list.scrollTop = line * ROW - room / 2;
    else if (above < 0) list.scrollTop = line * ROW;
    else if (above > room) list.scrollTop = line * ROW - room;
  };

  /* ---- one latent ---- */
  const tokenLine = (latent, context) => {
    const line = make("p", "uw-context"), digits = context[2], peak = context[3];
    words(context).forEach((token, i) => {
      const step = Number(digits[i]);
      const names = (step ? "uw-a" + step : token.trim() ? "" : "uw-blank") + (i === peak ? " uw-peak" : "");
      const span = make("span", names.trim(), visible(blank(token) ? token.slice(1) : token), i === peak ? { tabindex: "0" } : {});
      if (i && blank(token)) line.append(" ");
      const value = i === peak ? context[4] : step / LEVELS * latent.max;
      span.uwSay = [token, step || i === peak ? (i === peak ? "" : "\u2248\u202f") + number(value) : "0"];
      line.append(span);
    });
    return line;
  };
  const group = (latent, kind) => {
    const members = latent.contexts.filter((context) => data.kinds[context[0]][0] === kind);
    if (!members.length) return "";
    const rows = members.map((context) => {
      const label = data.kinds[context[0]][1];
      return make("div", "uw-row", [label ? make("span", "uw-label", label) : "", tokenLine(latent, context)]);
    });
    return make("div", "uw-group", [make("h4", "uw-kind", KINDS[kind] || kind), ...rows]);
  };
  const logits = (name, flat) => flat.length
    ? [make("dt", "", name), make("dd", "", pairs(flat).map(([token, value]) => chip(token, value)))] : [];
  const step = (by) => {
    const line = shown.indexOf(current);
    const next = line < 0 ? 0 : Math.min(shown.length - 1, Math.max(0, line + by));
    if (shown.length) choose(shown[next], true);
  };
  const show = (latent) => {
    const badges = data.tags.filter((tag) => tag[1].includes(latent.index)).flatMap((tag) => [" ", make("span", "uw-badge", tag[0])]);
    const back = make("button", "uw-button", "\u2190", { type: "button", "aria-label": "Previous latent in the list" });
    const next = make("button", "uw-button", "\u2192", { type: "button", "aria-label": "Next latent in the list" });
    back.addEventListener("click", () => step(-1));
    next.addEventListener("click", () => step(1));
    const facts = latent.max > 0
      ? "fires on " + percent(latent.rate) + " of tokens" + (latent.rate < 0.5 && latent.rate > 0 ? ", one in " + thousands(Math.round(1 / latent.rate)) : "")
        + "; strongest activation " + number(latent.max)
      : "never fired on the text that was read";
    const order = [...Object.keys(KINDS), ...new Set(data.kinds.map((kind) => kind[0]).filter((kind) => !KINDS[kind]))];
    detail.replaceChildren(...[
      make("header", "uw-detail-head", [
        make("div", "", [make("h3", "", ["Latent\u00a0" + latent.index, ...badges]), make("p", "uw-facts", facts)]),
        make("div", "uw-steps", [back, next])]),
      latent.note ? make("p", "uw-note", latent.note) : "",
      make("dl", "uw-logits", [...logits("Raises", latent.promoted), ...logits("Lowers", latent.suppressed)]),
      ...order.map((kind) => group(latent, kind)),
    ].filter((part) => part !== ""));
    detail.scrollTop = 0;
  };
  const choose = (at, tell) => {
    current = at;
    show(latents[at]);
    reveal();
    draw();
    if (tell) {
      try { history.replaceState(null, "", "#latent-" + latents[at].index); } catch (error) { /* some viewers forbid it */ }
      if (detail.offsetTop > list.offsetTop + list.offsetHeight - 1) detail.scrollIntoView({ block: "nearest" });
    }
  };

  /* ---- search, order, filter ---- */
  const haystack = (latent) => {
    if (latent.text === undefined) latent.text = latent.contexts.map((context) => words(context).join("")).join("\n").toLowerCase();
    return latent.text;
  };
  const score = (latent, query, scope) => {
    const graded = (tokens, exact, part) => {
      let best = 0;
      for (const token of tokens) {
        const text = token.toLowerCase();
        if (text.trim() === query) return exact;
        if (text.includes(query)) best = part;
      }
      return best;
    };
    const onPeak = scope === "logits" ? 0 : graded(peaks(latent), 8, 5);
    if (onPeak === 8 || scope === "peaks") return onPeak;
    const onLogits = graded(pairs(latent.promoted).map(([token]) => token), 6, 4);
    const best = Math.max(onPeak, onLogits);
    if (best || scope === "logits") return best;
    return latent.note.toLowerCase().includes(query) ? 3 : haystack(latent).includes(query) ? 1 : 0;
  };
  const refresh = () => {
    const query = search.value.trim().toLowerCase(), tag = filter.value.startsWith("tag") ? data.tags[Number(filter.value.slice(3))] : null;
    const rank = tag ? new Map(tag[1].map((index, at) => [index, at])) : null;
    const exact = /^#?\d+$/.test(query) ? place.get(Number(query.replace("#", ""))) : undefined;
    const scores = new Map();
    shown = [];
    latents.forEach((latent, at) => {
      if (filter.value === "alive" && !(latent.max > 0)) return;
      if (filter.value === "dead" && latent.max > 0) return;
      if (rank && !rank.has(latent.index)) return;
      if (query) {
        const points = at === exact ? 100 : score(latent, query, where.value);
        if (!points) return;
        scores.set(at, points);
      }
      shown.push(at);
    });
    const by = {
      auto: (a, b) => query ? scores.get(b) - scores.get(a) || latents[b].rate - latents[a].rate
        : rank ? rank.get(latents[a].index) - rank.get(latents[b].index) : 0,
      index: (a, b) => latents[a].index - latents[b].index,
      often: (a, b) => latents[b].rate - latents[a].rate,
      rare: (a, b) => (latents[a].rate || 2) - (latents[b].rate || 2),
      strong: (a, b) => latents[b].max - latents[a].max,
    }[order.value];
    shown.sort((a, b) => by(a, b) || a - b);
    count.textContent = shown.length === latents.length ? thousands(latents.length) + " latents"
      : thousands(shown.length) + " of " + thousands(latents.length) + " latents";
    list.scrollTop = 0;
    // a search leads to its best match; another order or filter keeps the latent in view where it can
    if (shown.length && (query || shown.indexOf(current) < 0)) choose(shown[0], false);
    else draw();
  };

  /* ---- the activation at a token, by pointer or by keyboard ---- */
  const tell = (span) => {
    const [token, value] = span.uwSay;
    bubble.replaceChildren(make("b", "", value), " at ", make("span", "uw-chip", visible(token)));
    bubble.hidden = false;
    const box = span.getBoundingClientRect(), size = bubble.getBoundingClientRect();
    const left = Math.min(innerWidth - size.width - 8, Math.max(8, box.left + box.width / 2 - size.width / 2));
    bubble.style.left = left + "px";
    bubble.style.top = (box.top - size.height - 6 < 4 ? box.bottom + 6 : box.top - size.height - 6) + "px";
  };
  const hide = () => { bubble.hidden = true; };
  for (const kind of ["pointerover", "focusin"]) detail.addEventListener(kind, (event) => { if (event.target.uwSay) tell(event.target); else hide(); });
  for (const kind of ["pointerleave", "focusout"]) detail.addEventListener(kind, hide);
  for (const target of [detail, window]) target.addEventListener("scroll", hide, { passive: true });
  detail.addEventListener("keydown", (event) => {
    const span = event.target;
    if (!span.uwSay || (event.key !== "ArrowLeft" && event.key !== "ArrowRight")) return;
    const next = event.key === "ArrowLeft" ? span.previousElementSibling : span.nextElementSibling;
    if (!next) return;
    event.preventDefault();
    span.removeAttribute("tabindex");
    next.setAttribute("tabindex", "0");
    next.focus();
  });

  /* ---- what the reader does ---- */
  let timer = 0;
  search.addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(refresh, 120); });
  for (const element of [where, order, filter]) element.addEventListener("change", refresh);
  dice.addEventListener("click", () => {
    const living = shown.filter((at) => latents[at].max > 0), pool = living.length ? living : shown;
    if (pool.length) choose(pool[Math.floor(Math.random() * pool.length)], true);
  });
  list.addEventListener("scroll", draw, { passive: true });
  list.addEventListener("keydown", (event) => {
    const by = { ArrowDown: 1, ArrowUp: -1, PageDown: 8, PageUp: -8, Home: -latents.length, End: latents.length }[event.key];
    if (by === undefined) return;
    event.preventDefault();
    step(by);
  });
  addEventListener("resize", draw);
  const fromHash = () => {
    const found = /^#latent-(\d+)$/.exec(location.hash), at = found ? place.get(Number(found[1])) : undefined;
    if (at === undefined) return false;
    if (shown.indexOf(at) < 0) { search.value = ""; filter.value = "all"; refresh(); }
    choose(at, false);
    root.scrollIntoView({ block: "start" });
    return true;
  };
  addEventListener("hashchange", fromHash);
  // links to the latent that is already in the address change no hash, yet should lead to it
  document.addEventListener("click", (event) => {
    const link = event.target.closest && event.target.closest("a");
    const goal = link && (link.getAttribute("href") || link.getAttribute("xlink:href"));
    if (goal && goal.startsWith("#latent-") && goal === location.hash) { event.preventDefault(); fromHash(); }
  });
  const first = data.tags.length ? place.get(data.tags[0][1][0]) : latents.findIndex((latent) => latent.max > 0);
  refresh();
  if (!fromHash() && first > 0) choose(first, false);
}

(() => {
  const start = () => {
    for (const root of document.querySelectorAll("[data-uw-explorer]")) {
      const source = document.getElementById(root.dataset.uwExplorer);
      if (source) unweaveExplorer(root, JSON.parse(source.textContent));
    }
  };
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
  else start();
})();
