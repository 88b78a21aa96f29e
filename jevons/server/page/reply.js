// Replies in progress. A reply writes into its message, wherever the person looks meanwhile: another conversation can be read,
// or asked, while this one goes on. The view hears of each change and draws at its own pace.

import { newId } from "./store.js";
import { complete, requestBody } from "./stream.js";

const now = () => performance.now() / 1000;

export class Replies extends EventTarget {
  #running = new Map(); // conversation id -> AbortController

  constructor(store, settings) {
    super();
    Object.assign(this, { store, settings });
  }

  running(conversation) {
    return this.#running.has(conversation?.id);
  }

  stop(conversation) {
    this.#running.get(conversation?.id)?.abort();
  }

  #keep(conversation, options) {
    if (this.store.conversations.has(conversation.id)) this.store.save(conversation, options); // not if it was deleted meanwhile
  }

  /** Answers the conversation's last message; resolves when the reply has ended, however it did. */
  async start(conversation) {
    const { store, settings } = this;
    const history = conversation.messages.filter((m) => m.role === "user" || m.content);
    const body = requestBody(settings, history);
    const message = { id: newId(), role: "assistant", content: "", reasoning: "", state: "streaming", model: settings.model, created: Date.now() };
    const controller = new AbortController();
    const clock = { start: now(), thinking: 0 };
    conversation.messages.push(message);
    this.#running.set(conversation.id, controller);
    this.#tell(conversation, message, "start");
    try {
      for await (const chunk of complete(body, { key: settings.key, signal: controller.signal })) {
        this.#take(message, chunk, clock);
        this.#keep(conversation);
        this.#tell(conversation, message, "piece");
      }
      message.state = "done";
    } catch (error) {
      message.state = error.name === "AbortError" ? "stopped" : "failed";
      if (message.state === "failed") {
        const { status = 0, type = "", retryAfter = null } = error;
        message.error = { message: error.message, status, type, retryAt: retryAfter === null ? null : Date.now() + 1000 * retryAfter };
      }
    }
    this.#endThinking(message, clock);
    message.duration ??= now() - clock.start;
    if (this.#running.get(conversation.id) === controller) this.#running.delete(conversation.id); // else a later reply took its place
    this.#keep(conversation, { touch: true });
    store.flush();
    this.#tell(conversation, message, "end");
  }

  #take(message, chunk, clock) {
    const choice = chunk.choices?.[0];
    const delta = choice?.delta ?? {};
    const reasoning = delta.reasoning_content ?? delta.reasoning ?? "";
    if (reasoning || delta.content) message.firstToken ??= now() - clock.start;
    if (reasoning) {
      if (!clock.thinking) clock.thinking = now();
      message.thinkingSince ??= Date.now();
      message.reasoning += reasoning;
    }
    if (delta.content) {
      this.#endThinking(message, clock);
      message.content += delta.content;
    }
    if (choice?.finish_reason) message.finish = choice.finish_reason;
    if (chunk.usage) {
      message.usage = chunk.usage;
      const time = chunk.usage.jevons?.time; // the server's clock leaves the network out
      if (time?.first_token != null) message.firstToken = time.first_token;
      if (time?.duration != null) message.duration = time.duration;
    }
  }

  #endThinking(message, clock) {
    if (clock.thinking) message.thinkingSeconds ??= now() - clock.thinking;
  }

  #tell(conversation, message, what) {
    this.dispatchEvent(new CustomEvent("change", { detail: { conversation, message, what } }));
  }
}

/** Tokens per second after the first. */
export function speed(message) {
  const tokens = message.usage?.completion_tokens;
  const time = message.duration - message.firstToken;
  return tokens > 1 && time > 0 ? (tokens - 1) / time : null;
}
