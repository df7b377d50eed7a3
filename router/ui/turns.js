// One question and one answer as they stand in the conversation. Text is only ever set as text.

import { image } from "./pictures.js";

/** The element of a question. */
export function questionTurn(text, pictures) {
  const turn = element("article", "turn question");
  turn.setAttribute("aria-label", "You");
  if (pictures.length > 0) {
    const shown = element("div", "shown");
    shown.append(...pictures.map(image));
    turn.append(shown);
  }
  if (text) turn.append(element("div", "text", text));
  return turn;
}

/** An answer that grows, with the numbers behind it. Times are in milliseconds. */
export class AnswerTurn {
  element = element("article", "turn answer");
  text = "";
  #node = document.createTextNode("");
  #usage = null;
  #pieces = 0; // of text; nearly always one per token
  #asked = performance.now();
  #first = null;
  #last = null;

  constructor() {
    this.element.setAttribute("aria-label", "Answer");
    this.element.setAttribute("aria-busy", "true"); // screen readers wait for the whole
    const text = element("div", "text");
    text.append(this.#node);
    this.element.append(text);
  }

  /** Take in a chunk of the stream. */
  add(chunk) {
    this.#last = performance.now();
    const piece = chunk.choices[0]?.delta.content;
    if (piece) {
      this.#first ??= this.#last;
      this.#pieces += 1;
      this.text += piece;
      this.#node.data = this.text.trimStart(); // many models begin with a space
    }
    this.#usage = chunk.usage ?? this.#usage;
    for (const warning of chunk.warnings ?? []) {
      this.element.append(element("p", "warning", warning));
    }
  }

  /** Show the numbers. `failure` says why the answer is not whole, `stopped` that nobody waits. */
  end({ stopped = false, failure = "" } = {}) {
    this.element.setAttribute("aria-busy", "false");
    if (failure) this.element.append(element("p", "warning failure", failure));
    const list = element("ul", "numbers");
    list.setAttribute("aria-label", "Numbers of this answer");
    if (stopped) list.append(element("li", "", "stopped"));
    for (const [name, text] of this.#numbers()) {
      const item = element("li", "", text);
      item.dataset.number = name;
      list.append(item);
    }
    this.element.append(list);
  }

  *#numbers() {
    if (this.#usage) {
      const { prompt_tokens, completion_tokens, prompt_tokens_details: details } = this.#usage;
      yield ["prompt", `${prompt_tokens} prompt tokens`];
      yield ["image", `${details?.image_tokens ?? 0} image tokens`];
      yield ["cached", `${details?.cached_tokens ?? 0} cached tokens`];
      yield ["answer", `${completion_tokens} tokens`];
    }
    if (this.#first === null) return;
    yield ["ttft", `first token ${seconds(this.#first - this.#asked)}`];
    const tokens = this.#usage?.completion_tokens ?? this.#pieces;
    const took = this.#last - this.#asked; // the whole answer
    if (took > 0) {
      yield ["rate", `${((1000 * tokens) / took).toFixed(1)} tokens/s`];
    }
  }
}

function element(tag, className, text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

function seconds(ms) {
  return ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(2)} s`;
}
