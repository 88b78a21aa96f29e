// Requests to the server of this page: server-sent events read off a fetch, and failures with all that the server said of them.
//
// EventSource cannot POST or send a key, so the format is read here: lines end in \n, \r\n or \r, an event ends at an empty
// line, "data:" lines are joined, comments (": keep-alive") are dropped. A reply must end in [DONE]: a connection that closes
// before it was cut, and is told apart from a reply that is complete.

export class RequestError extends Error {
  constructor(message, { status = 0, type = "", retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { status, type, retryAfter });
  }
}

/** The data of each event of a stream of byte chunks. */
export async function* events(chunks) {
  const decoder = new TextDecoder();
  let rest = "";
  let data = [];
  for await (const chunk of chunks) {
    const text = rest + decoder.decode(chunk, { stream: true });
    const lines = text.split(/\r\n|\n|\r(?!$)/); // a \r at the end may be half of \r\n
    rest = lines.pop();
    for (const line of lines) {
      if (line === "") {
        if (data.length) yield data.join("\n");
        data = [];
      } else if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
    }
  }
}

async function* read(body) {
  const reader = body.getReader(); // Safari's streams are not async iterable
  try {
    for (let part = await reader.read(); !part.done; part = await reader.read()) yield part.value;
  } finally {
    reader.releaseLock();
  }
}

const headers = (key) => (key ? { authorization: `Bearer ${key}` } : {});

/** Fetches a path of this server; everything but a 2xx is a RequestError in the server's own words. */
export async function request(path, { key = "", body = null, signal = null } = {}) {
  let response;
  try {
    response = await fetch(new URL(path, document.baseURI), {
      method: body ? "POST" : "GET",
      headers: { ...headers(key), ...(body && { "content-type": "application/json" }) },
      body: body && JSON.stringify(body),
      signal,
      cache: "no-store",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new RequestError("The server cannot be reached. Is it still running?", { type: "connection" });
  }
  if (!response.ok) throw await failure(response);
  return response;
}

async function failure(response) {
  const text = await response.text();
  let error = {};
  try {
    error = JSON.parse(text).error ?? {};
  } catch {
    error = {}; // a proxy's page, not our JSON
  }
  const seconds = Number.parseFloat(response.headers.get("retry-after"));
  return new RequestError(error.message ?? (text.slice(0, 300) || response.statusText), {
    status: response.status,
    type: error.type ?? "",
    retryAfter: Number.isFinite(seconds) ? seconds : null,
  });
}

/** The chunks of a streamed chat completion. */
export async function* complete(body, { key, signal }) {
  const response = await request("v1/chat/completions", { key, body, signal });
  try {
    for await (const data of events(read(response.body))) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new RequestError(chunk.error.message ?? data, { type: chunk.error.type ?? "", status: chunk.error.status ?? 0 });
      yield chunk;
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof RequestError) throw error;
    throw new RequestError(`The reply was cut: ${error.message}`, { type: "connection" });
  }
  throw new RequestError("The reply was cut: the connection closed before its end.", { type: "connection" });
}

const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"];

/** The request that settings and messages make. What is left empty is not sent: the model's own defaults hold. */
export function requestBody(settings, messages) {
  const body = { model: settings.model, messages: [], stream: true, stream_options: { include_usage: true } };
  if (settings.system.trim()) body.messages.push({ role: "system", content: settings.system });
  for (const { role, content } of messages) body.messages.push({ role, content }); // past thinking is not sent back
  for (const name of NUMBERS) if (settings[name] !== "") body[name] = Number(settings[name]);
  if (settings.thinking !== "auto") body.thinking = { type: settings.thinking === "on" ? "enabled" : "disabled" };
  if (settings.thinking !== "off") {
    if (settings.effort) body.reasoning_effort = settings.effort;
    if (settings.budget !== "") body.thinking = { type: "enabled", ...body.thinking, budget_tokens: Number(settings.budget) };
  }
  return body;
}
