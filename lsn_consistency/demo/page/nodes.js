// The cards of the servers: made once, then only changed, so that the focus stays where it is.

import { $, badge, bytes, duration, fill, make } from "./view.js";

const DELAYS = [0, 0.3, 1, 3, 10];
const cards = new Map();

export function showNodes(nodes, act) {
  for (const node of nodes) {
    if (!cards.has(node.name)) {
      cards.set(node.name, makeCard(node, act));
      $("#nodes").append(cards.get(node.name).element);
    }
    update(cards.get(node.name), node);
  }
}

function makeCard(node, act) {
  const card = {
    badges: make("p", { className: "badges" }),
    facts: make("dl", { className: "facts" }),
    power: make("button", { type: "button" }),
    port: make("span", { className: "note" }),
  };
  const controls = make("div", { className: "controls" });
  card.power.onclick = () => act(node.name, card.node.running ? "stop" : "start");
  if (node.name !== "primary") {
    card.replay = make("button", { type: "button" });
    card.replay.onclick = () => act(node.name, card.node.paused ? "resume" : "pause");
    card.delay = make("select");
    card.delay.onchange = () => act(node.name, "delay", Number(card.delay.value));
    controls.append(card.replay, make("label", {}, "apply delay", card.delay));
  } else {
    controls.append(make("p", { className: "note" }, "Takes every write, and the reads that no replica may answer."));
  }
  controls.append(card.power);
  const title = make("h3", {}, node.name, " ", card.port);
  card.element = make("article", { className: "node" }, title, card.badges, card.facts, controls);
  return card;
}

function update(card, node) {
  card.node = node;
  card.port.textContent = `port ${node.port}`;
  const trouble = !node.running || !node.healthy;
  const slowed = node.paused || node.delay_seconds > 0;
  card.element.className = `node ${trouble ? "bad" : slowed ? "warn" : ""}`;
  card.badges.replaceChildren(...badges(node));
  fill(card.facts, facts(node));
  card.power.textContent = node.running ? `Stop ${node.name}` : `Start ${node.name}`;
  card.power.disabled = node.busy;
  if (!card.replay) return;
  card.replay.textContent = node.paused ? "Resume replay" : "Pause replay";
  card.replay.setAttribute("aria-label", `${card.replay.textContent} of ${node.name}`);
  card.delay.setAttribute("aria-label", `Apply delay of ${node.name}`);
  card.replay.disabled = card.delay.disabled = node.busy || !node.running;
  if (document.activeElement !== card.delay) offer(card.delay, node.delay_seconds);
}

function offer(select, chosen) {
  const values = [...new Set([...DELAYS, chosen])].sort((a, b) => a - b);
  const options = values.map((value) => new Option(value ? `${value} s` : "none", value, false, value === chosen));
  select.replaceChildren(...options);
}

function badges(node) {
  const shown = [];
  if (!node.running) shown.push(badge("stopped", "bad"));
  else if (!node.healthy) shown.push(badge("unreachable", "bad"));
  else shown.push(badge(node.role, node.role === "primary" ? "primary" : ""));
  if (node.busy) shown.push(badge("working …"));
  if (node.paused) shown.push(badge("replay paused", "warn"));
  if (node.delay_seconds) shown.push(badge(`${node.delay_seconds} s late`, "warn"));
  if (node.breaker === "open") shown.push(badge("breaker open", "bad"));
  return shown;
}

function facts(node) {
  const replica = node.name !== "primary";
  const lines = [[replica ? "replayed" : "log position", make("span", { className: "mono" }, node.replay_lsn ?? "unknown")]];
  if (!replica) return [...lines, ["timeline", `${node.timeline ?? "unknown"}`]];
  lines.push(["lag", duration(node.lag_seconds)]);
  lines.push(["behind", node.behind_bytes === null ? "unknown" : bytes(node.behind_bytes)]);
  lines.push(["your token", reached(node.missing_bytes)]);
  return lines;
}

function reached(missing) {
  if (missing === null) return "–";
  return missing === 0 ? badge("reached", "good") : badge(`${bytes(missing)} short`, "bad");
}
