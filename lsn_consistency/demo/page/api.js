// The shop's interface: JSON both ways, and an error that says what the server said.

const LIMIT_MS = 20000;

async function ask(path, options = {}) {
  const answer = await fetch(path, { ...options, signal: AbortSignal.timeout(LIMIT_MS) });
  const body = await answer.json().catch(() => ({ error: `status ${answer.status}` }));
  const token = answer.headers.get("X-Consistency-Token");
  return { ok: answer.ok, body, token };
}

// A read that no server may answer comes with the other router's answer, so it is not thrown.
export const read = (level) => ask(`/api/orders?level=${encodeURIComponent(level)}`);

export async function state(after) {
  return demand(await ask(`/api/state?after=${after}`));
}

export async function send(path, body = {}) {
  const headers = { "Content-Type": "application/json" };
  return demand(await ask(path, { method: "POST", headers, body: JSON.stringify(body) }));
}

function demand(answer) {
  if (!answer.ok) throw new Error(answer.body.error ?? "the server refused");
  return answer;
}
