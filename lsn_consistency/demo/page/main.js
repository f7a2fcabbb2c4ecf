// What a visitor does, and the picture that is refreshed every second.

import * as api from "./api.js";
import { showNodes } from "./nodes.js";
import { $, PROMISES, badge, fill, historyRow, make, money, showAnswer } from "./view.js";

const REFRESH_MS = 1000;
const KNOWN_ORDERS = 200;
const SHOWN_ORDERS = 8;
const SHOWN_READS = 12;
const SHOWN_EVENTS = 80;

// The orders that this page was told of: what a read has to show if it is not stale.
const known = new Map();
const counts = { reads: 0, replica: 0, primary: 0, waited: 0, stale: 0, twin: 0, twinStale: 0 };
let products = [];
let reading = null;
let mostOrders = 0;
let lastEntry = 0;
let signed = "";

const level = () => $("input[name=level]:checked").value;

function complain(text) {
  const line = $("#problem");
  line.textContent = text;
  line.hidden = !text;
}

async function guarded(action) {
  try {
    const result = await action();
    complain("");
    return result;
  } catch (error) {
    complain(error.name === "TypeError" ? "The demo does not answer: is it still running?" : `It did not work: ${error.message}`);
    return null;
  }
}

// Reading

const newest = (ids) => [...new Set(ids)].sort((a, b) => b - a).slice(0, SHOWN_ORDERS);

function remember(orders) {
  for (const order of orders) known.set(order.id, order);
  const surplus = [...known.keys()].sort((a, b) => a - b).slice(0, Math.max(0, known.size - KNOWN_ORDERS));
  surplus.forEach((id) => known.delete(id));
}

// Which of the wanted orders an answer lacks, and how many orders it lacks in all.
function lacking(answer, wanted) {
  if (answer.error !== undefined) return { ids: [], count: 0 };
  const shown = new Set(answer.orders.map((order) => order.id));
  // A full list shows the newest only: what is older than all of them is not missing.
  const oldest = shown.size < SHOWN_ORDERS ? 0 : Math.min(...shown);
  const ids = wanted.filter((id) => id > oldest && !shown.has(id));
  return { ids, count: ids.length && Math.max(ids.length, mostOrders - answer.total) };
}

// One read at a time; one that is asked for meanwhile follows.
async function read() {
  if (reading) {
    reading.again = true;
    return;
  }
  reading = { again: false };
  $("#read").disabled = true;
  const wanted = newest(known.keys());
  const asked = level();
  const answer = await guarded(() => api.read(asked));
  if (answer?.body.read) show(answer, wanted, PROMISES[asked].token);
  else if (answer) complain(answer.body.error);
  const { again } = reading;
  reading = null;
  $("#read").disabled = false;
  if (again) await read();
}

function show(answer, wanted, asks) {
  const { read: routed, twin, level: promised } = answer.body;
  if (answer.token) signed = answer.token;
  mostOrders = Math.max(mostOrders, routed.total ?? 0);
  const missing = lacking(routed, wanted);
  remember(routed.orders ?? []);
  // What the routed read has just shown is there, so the other router has to show it as well.
  const seen = (routed.orders ?? []).map((order) => order.id);
  const twinMissing = lacking(twin, newest([...wanted, ...seen]));
  $("#with-title").textContent = asks ? "With your token" : "Your token is not asked for at this level";
  showAnswer($("#with"), routed, missing, known);
  showAnswer($("#without"), twin, twinMissing, known);
  if (routed.error !== undefined) complain(`No server may answer this read: ${routed.error}`);
  showProducts(routed.products ?? twin.products ?? products);
  count(routed, twin, asks ? missing : { count: 0 }, twinMissing);
  const entry = { number: counts.reads, level: promised, routed, twin, missing, twinMissing };
  $("#history").prepend(historyRow(entry));
  while ($("#history").children.length > SHOWN_READS) $("#history").lastChild.remove();
}

function count(routed, twin, missing, twinMissing) {
  counts.reads += 1;
  if (routed.error === undefined) {
    counts[routed.node === "primary" ? "primary" : "replica"] += 1;
    counts.waited += routed.waited_ms > 0;
    counts.stale += missing.count > 0;
  }
  counts.twinStale += twin.error === undefined && twinMissing.count > 0;
  showCounters();
}

function showCounters() {
  const lines = [
    ["reads", counts.reads, ""],
    ["by a replica", counts.replica, ""],
    ["by the primary", counts.primary, ""],
    ["had to wait", counts.waited, ""],
    ["stale with your token", counts.stale, counts.stale ? "bad" : "good"],
    ["stale without tokens", counts.twinStale, counts.twinStale ? "bad" : ""],
  ];
  const groups = lines.map(([name, value, className]) => make("div", { className }, make("dt", {}, name), make("dd", {}, `${value}`)));
  $("#counters").replaceChildren(...groups);
}

// Ordering

function showProducts(list) {
  products = list;
  if ($("#products").children.length !== list.length) $("#products").replaceChildren(...list.map(productLine));
  list.forEach((product, index) => {
    $(".stock", $("#products").children[index]).textContent = `${product.stock} left`;
  });
}

function productLine(product) {
  const button = make("button", { type: "button" }, `Order, ${money(product.cents)}`);
  button.setAttribute("aria-label", `Order ${product.name} for ${money(product.cents)}`);
  button.onclick = () => order(product, "/api/orders", { product_id: product.id, quantity: 1 });
  return make("li", {}, product.name, make("span", { className: "stock" }), button);
}

async function order(product, path, body) {
  const answer = await guarded(() => api.send(path, body));
  if (!answer) return;
  if (answer.token) signed = answer.token;
  remember(answer.body.ids.map((id) => ({ id, product: product.name, quantity: 1, cents: product.cents })));
  await Promise.all([read(), refresh()]);
}

// Servers

async function act(name, action, seconds = 0) {
  const done = guarded(() => api.send(`/api/nodes/${name}/${action}`, { seconds }));
  await refresh();
  await done;
  await refresh();
}

async function refresh() {
  const answer = await api.state(lastEntry);
  const { nodes, token, entries, settings } = answer.body;
  $("#wait").textContent = `${Math.round(settings.wait_seconds * 1000)} ms`;
  showNodes(nodes, act);
  showToken(token);
  const fresh = entries.filter((entry) => entry.number > lastEntry);
  for (const entry of fresh) $("#events").prepend(eventLine(entry));
  while ($("#events").children.length > SHOWN_EVENTS) $("#events").lastChild.remove();
  lastEntry = Math.max(lastEntry, ...fresh.map((entry) => entry.number));
}

function eventLine(entry) {
  const time = new Date(entry.time * 1000).toLocaleTimeString([], { hour12: false });
  return make("li", { className: entry.kind }, make("time", {}, time), entry.text);
}

function showToken(token) {
  const lines = token.positions.flatMap((position) => [
    ["log position", make("strong", { className: "mono" }, position.lsn)],
    ["timeline", `${position.timeline}`],
    ["system", make("span", { className: "mono" }, position.system_id)],
  ]);
  if (token.pin_until) lines.push(["primary until", new Date(token.pin_until * 1000).toLocaleTimeString()]);
  if (signed) lines.push(["as sent", make("span", { className: "mono" }, signed)]);
  fill($("#token"), lines.length ? lines : [["none yet", "order something, or read at the level causal"]]);
}

// The picture

let lost = false;

async function keepFresh() {
  try {
    if (!document.hidden) {
      await refresh();
      if (lost) complain("");
      lost = false;
      if ($("#repeat").checked) await read();
    }
  } catch {
    lost = true;
    complain("The demo does not answer: is it still running?");
  }
  setTimeout(keepFresh, REFRESH_MS);
}

function promise() {
  $("#promise").textContent = PROMISES[level()].text;
}

$("#read").onclick = read;
$("#burst").onclick = () => products.length && order(products[0], "/api/burst", { product_id: products[0].id, count: 25 });
$("#restock").onclick = async () => {
  if (await guarded(() => api.send("/api/restock"))) await read();
};
$("#levels").onchange = () => {
  promise();
  read();
};
document.addEventListener("visibilitychange", () => document.hidden || refresh().catch(() => {}));

promise();
showCounters();
await read();
await keepFresh();
