// The chat: what was said, what is asked next, and what the buttons do.

import { chatChunks, serverInfo } from "./api.js";
import { Attachments, takeDrops, takePastes } from "./pictures.js";
import { AnswerTurn, questionTurn } from "./turns.js";

const PAYLOAD_LIMIT = Number(document.documentElement.dataset.payloadLimit); // bytes
const KEY = "tessera-api-key";
const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];

const byId = (id) => document.getElementById(id);
const conversation = byId("conversation");
const question = byId("question");
const attached = new Attachments(byId("attached"), warnAboutSize);

let messages = []; // as they are sent
let answering = null; // the AbortController of the answer under way

async function ask(text) {
  const pictures = attached.pictures;
  const asked = { role: "user", content: content(text, pictures) };
  const body = requestBody([...messages, asked]);
  const tooLarge = sizeProblem(body);
  if (tooLarge) return say(byId("error"), tooLarge);
  say(byId("error"), "");
  const shown = questionTurn(text, pictures);
  const answer = new AnswerTurn();
  setDraft("", []);
  begin(shown, answer);
  const chat = messages;
  const failure = await follow(answer, body);
  if (chat !== messages) return; // another chat was begun meanwhile
  answering = null;
  showButtons();
  if (answer.text === "" && failure !== null) {
    giveBack(shown, answer, text, pictures, failure);
  } else {
    messages.push(asked, { role: "assistant", content: answer.text });
  }
}

/** Put both turns on the page, with everything in view. */
function begin(shown, answer) {
  answering = new AbortController();
  showButtons();
  byId("welcome").hidden = true;
  conversation.append(shown, answer.element);
  conversation.scrollTop = conversation.scrollHeight;
}

/** Let the answer grow to its end. Returns null if it got there, else why not, "" for a stop. */
async function follow(answer, body) {
  const { signal } = answering;
  try {
    for await (const chunk of chatChunks(body, byId("key").value, signal)) {
      const atEnd = conversation.scrollHeight - conversation.scrollTop - conversation.clientHeight < 60;
      answer.add(chunk);
      if (atEnd) conversation.scrollTop = conversation.scrollHeight;
    }
  } catch (error) {
    if (signal.aborted) {
      answer.end({ stopped: true });
      return "";
    }
    if (error.status === 401) askForKey();
    answer.end({ failure: error.message });
    return error.message;
  }
  answer.end();
  return null;
}

/** Nothing was answered: the question goes back to where it was written. */
function giveBack(shown, answer, text, pictures, failure) {
  shown.remove();
  answer.element.remove();
  byId("welcome").hidden = messages.length > 0;
  const draft = question.value ? `${text}\n${question.value}` : text;
  setDraft(draft, [...pictures, ...attached.pictures]);
  say(byId("error"), failure);
}

function newChat() {
  answering?.abort();
  answering = null;
  showButtons();
  messages = [];
  conversation.replaceChildren(byId("welcome"));
  byId("welcome").hidden = false;
  say(byId("error"), "");
  setDraft("", []);
  question.focus();
}

function content(text, pictures) {
  if (pictures.length === 0) return text;
  const parts = pictures.map(({ uri }) => ({ type: "image_url", image_url: { url: uri } }));
  return text ? [...parts, { type: "text", text }] : parts;
}

function requestBody(turns) {
  const system = byId("system").value.trim();
  const body = {
    model: "default",
    messages: system ? [{ role: "system", content: system }, ...turns] : turns,
    stream: true,
    stream_options: { include_usage: true },
  };
  for (const name of NUMBERS) {
    const value = byId(name).valueAsNumber;
    if (!Number.isNaN(value)) body[name] = value; // empty: the server's default
  }
  return body;
}

/** Why the server will not read this; "" if it will. */
function sizeProblem(body) {
  const bytes = new Blob([JSON.stringify(body)]).size;
  if (bytes <= PAYLOAD_LIMIT) return "";
  const mb = (count) => `${(count / 1e6).toFixed(1)} MB`;
  return (
    `With its pictures this conversation takes ${mb(bytes)}; the server reads at most ` +
    `${mb(PAYLOAD_LIMIT)}. Take smaller or fewer pictures, or begin a new chat.`
  );
}

function warnAboutSize() {
  const pictures = attached.pictures;
  const asked = { role: "user", content: content(question.value, pictures) };
  const body = requestBody([...messages, asked]);
  say(byId("notice"), pictures.length > 0 ? sizeProblem(body) : "");
}

async function attach(files) {
  try {
    await attached.add(files);
    question.focus();
  } catch (error) {
    say(byId("error"), error.message);
  }
}

async function showModel() {
  try {
    byId("model").textContent = (await serverInfo(byId("key").value)).model_id;
    say(byId("error"), "");
  } catch (error) {
    if (error.status === 401) askForKey();
    say(byId("error"), error.message);
  }
}

function askForKey() {
  byId("settings").open = true;
  byId("key").focus();
}

function setDraft(text, pictures) {
  question.value = text;
  attached.pictures = pictures;
}

function showButtons() {
  byId("send").hidden = answering !== null;
  byId("stop").hidden = answering === null;
}

function say(place, text) {
  place.textContent = text;
  place.hidden = text === "";
}

function listen() {
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    const text = question.value.trim();
    if (answering === null && (text || attached.pictures.length > 0)) ask(text);
  });
  question.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    byId("composer").requestSubmit();
  });
  byId("stop").addEventListener("click", () => {
    answering?.abort();
    question.focus();
  });
  byId("new-chat").addEventListener("click", newChat);
  byId("pictures").addEventListener("change", (event) => {
    attach([...event.target.files]);
    event.target.value = ""; // so that the same file can be chosen again
  });
  byId("key").addEventListener("change", () => {
    sessionStorage.setItem(KEY, byId("key").value);
    showModel();
  });
  takeDrops(byId("drop"), attach);
  takePastes(attach);
}

byId("key").value = sessionStorage.getItem(KEY) ?? "";
byId("settings").open = matchMedia("(min-width: 64rem)").matches;
listen();
showModel();
question.focus();
