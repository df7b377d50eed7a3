// The server's API as this page needs it. Addresses are relative to this file, so that the page
// works below any path prefix.

const ROOT = new URL("../", import.meta.url);

/** What the server, or the way to it, refused; the message is for people. */
export class ApiError extends Error {
  /** @param {number} status HTTP status; 0 where there was no reply or only half of one. */
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** What GET /info says. Throws ApiError. */
export async function serverInfo(key) {
  return (await call("info", key)).json();
}

/**
 * The chunks of one streamed chat completion, parsed. Throws ApiError, also for a failure in the
 * middle of the answer, and AbortError after `signal`.
 */
export async function* chatChunks(body, key, signal) {
  const reply = await call("v1/chat/completions", key, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  for await (const data of eventData(reply.body, signal)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(messageOf(chunk.error));
    yield chunk;
  }
  throw new ApiError("The connection was lost before the answer was complete.");
}

async function call(path, key, options = {}) {
  if (/[^\x21-\x7e]/.test(key)) {
    throw new ApiError("The API key holds characters that no key can have.");
  }
  const headers = { ...options.headers, ...(key && { authorization: `Bearer ${key}` }) };
  let reply;
  try {
    reply = await fetch(new URL(path, ROOT), { ...options, headers });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new ApiError("The server cannot be reached.");
  }
  if (!reply.ok) throw new ApiError(await refusal(reply), reply.status);
  return reply;
}

async function refusal(reply) {
  try {
    return messageOf((await reply.json()).error);
  } catch {
    return `The server answered with status ${reply.status}.`; // a proxy's own page, for instance
  }
}

function messageOf(error) {
  return typeof error === "string" ? error : error.message;
}

/** The data of server-sent events; this server sends each on one line. */
async function* eventData(stream, signal) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let piece;
    try {
      piece = await reader.read();
    } catch (error) {
      if (signal.aborted) throw error;
      return; // cut off; the caller misses the end
    }
    if (piece.done) return;
    const lines = (rest + piece.value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data:")) yield line.slice(5).trim();
    }
  }
}
