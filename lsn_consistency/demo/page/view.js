// Elements from data. Text is only ever set as text, never as markup.

export const $ = (selector, root = document) => root.querySelector(selector);

export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

export const badge = (text, kind = "") => make("span", { className: `badge ${kind}` }, text);
export const money = (cents) => `€ ${(cents / 100).toFixed(2)}`;
export const milliseconds = (ms) => `${ms < 10 ? ms.toFixed(1) : Math.round(ms)} ms`;

export const wait = (ms) => (ms > 0 ? `waited ${milliseconds(ms)}` : "no wait");

export function bytes(count) {
  if (count < 10000) return `${count} B`;
  return count < 10000000 ? `${Math.round(count / 1024)} KiB` : `${Math.round(count / 1048576)} MiB`;
}

export function duration(seconds) {
  if (seconds === null) return "unknown";
  return seconds < 1 ? `${Math.round(seconds * 1000)} ms` : `${seconds.toFixed(1)} s`;
}

export function fill(list, pairs) {
  list.replaceChildren(...pairs.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
}

export const REASONS = {
  caught_up: "This replica has replayed everything that your token asks for.",
  within_lag: "No token counted here; this replica's lag is within the level's bound.",
  primary_required: "This level, or a pin, asks for the primary.",
  not_caught_up: "No replica reached your token in time, so the primary answered.",
  lag_exceeded: "Every replica lags for more than the bound, so the primary answered.",
  timeline_changed: "Your token is of another timeline, so the primary answered.",
  no_replica: "No replica is healthy or known, so the primary answered.",
  primary_down: "The primary is unreachable, and this replica satisfies your token.",
};

// What each level promises, and whether it asks what your token asks for, or more.
export const PROMISES = {
  causal: { token: true, text: "Everything you wrote and everything you saw; the default." },
  read_your_writes: { token: true, text: "Everything you wrote; what others wrote may come and go." },
  bounded: { token: false, text: "Data at most 2 s old, whatever you wrote: your own order can be missing." },
  eventual: { token: false, text: "Any healthy replica: your own order can be missing." },
  strong: { token: true, text: "The primary answers, always." },
};

// One column of the comparison. `wanted` holds the orders that it has to show, newest first.
export function showAnswer(article, answer, missing, wanted) {
  article.classList.toggle("stale", missing.count > 0);
  const [line, why, list] = [$(".answer", article), $(".why", article), $(".orders", article)];
  if (answer.error !== undefined) {
    line.replaceChildren(badge("no answer", "bad"));
    why.textContent = answer.error;
    list.replaceChildren();
    return;
  }
  const parts = [badge(answer.node, answer.node === "primary" ? "primary" : ""), `port ${answer.port}`];
  if (answer.reason) parts.push(" ", badge(answer.reason, "good"), wait(answer.waited_ms));
  if (missing.count) parts.push(" ", badge(`stale: ${answer.total} of ${answer.total + missing.count} orders`, "bad"));
  line.replaceChildren(...parts);
  why.textContent = answer.reason ? REASONS[answer.reason] ?? "" : "Chosen at random; nobody asked what it has replayed.";
  list.replaceChildren(...rows(answer, missing, wanted));
}

function rows(answer, missing, wanted) {
  const gone = missing.ids.map((id) => ({ ...wanted.get(id), id, missing: true }));
  const all = [...answer.orders, ...gone].sort((a, b) => b.id - a.id).slice(0, 8);
  if (!all.length) return [make("li", { className: "none" }, "no orders yet")];
  const hidden = answer.total + missing.count - all.length;
  const items = all.map((order) =>
    make(
      "li",
      { className: order.missing ? "missing" : "" },
      make("span", {}, `no. ${order.id}`),
      make("span", {}, `${order.quantity} × ${order.product}`),
      order.missing ? make("b", {}, "missing") : make("span", { className: "number" }, money(order.cents)),
    ),
  );
  if (hidden > 0) items.push(make("li", { className: "none" }, `and ${hidden} older`));
  return items;
}

export function historyRow(entry) {
  const { number, level, routed, twin, missing, twinMissing } = entry;
  const cell = (content, className = "") => make("td", { className }, content);
  const failed = routed.error !== undefined;
  const verdict = twin.error !== undefined ? badge("no answer", "bad") : staleness(twinMissing);
  return make(
    "tr",
    {},
    cell(`${number}`, "number"),
    cell(level),
    cell(failed ? badge("no answer", "bad") : `${routed.node} :${routed.port}`),
    cell(failed ? "" : routed.reason, "mono"),
    cell(failed || !routed.waited_ms ? "" : milliseconds(routed.waited_ms), "number"),
    cell(failed ? "" : missing.count ? staleness(missing) : `${routed.total}`),
    cell(twin.error !== undefined ? "" : `${twin.node} :${twin.port}`, "twin"),
    cell(twin.error !== undefined ? "" : `${twin.total}`),
    cell(verdict),
  );
}

const staleness = (missing) => (missing.count ? badge(`stale: ${missing.count} missing`, "bad") : badge("same", "good"));
