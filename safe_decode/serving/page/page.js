// The page: a conversation, attempts to try, the certificate in words. Knows the document.

import { Answer } from "/page/answer.js";
import { Refused, events } from "/page/stream.js";

const byId = (id) => document.getElementById(id);
const prompt = byId("prompt"), prefill = byId("prefill"), status = byId("status");
const ATTACKS = new Set(["framed", "prefilled", "turn", "harmful"]);

let facts = null;
let history = [];
let running = null;
const next = new Map();

async function begin() {
  theme(localStorage.getItem("theme"));
  const response = await fetch("/page/facts");
  facts = await response.json();
  byId("model").textContent = `${facts.model} · re-checks itself before every token`;
  byId("compare-label").hidden = !facts.shows_bare;
  byId("key-field").hidden = !facts.needs_key;
  certificate(facts);
  scenes(facts.scenes);
  prompt.focus();
}

function certificate({ certificate: c, redirect, holdback_tokens: k, bundle, max_tokens: cap }) {
  const share = (value) => `${Number((100 * value).toPrecision(3))}\u00a0%`;
  byId("certificate").textContent =
    `With ${share(c.confidence)} confidence, at most ${share(c.alpha)} of ${c.population} responses raise an ` +
    `alarm. It was computed from ${c.responses.toLocaleString("en")} responses, ` +
    `${c.greedy ? "chosen greedily" : "sampled"}, of up to ${c.max_new_tokens} tokens; ` +
    `they were ${c.calibrated_on} (${c.source}).`;
  byId("limits").textContent =
    "A call outside these bounds voids it, and the answer says so. It bounds false alarms; nothing certifies the " +
    "share of harm that is caught.";
  const rows = [["Trips become", redirect], ["Held back", `${k} tokens`], ["Longest answer", `${cap} tokens`], ["Bundle", bundle.slice(0, 12)]];
  if (c.threshold !== undefined) rows.push(["Threshold", c.threshold.toFixed(3)]);
  byId("facts").replaceChildren(...rows.flatMap(([name, value]) => [node("dt", name), node("dd", value)]));
}

function scenes(all) {
  byId("scenes").replaceChildren(...all.map((scene) => {
    const button = node("button", scene.title.replace(/^A (.)/, (_, letter) => letter.toUpperCase()));
    button.type = "button";
    button.dataset.scene = scene.scene;
    button.dataset.attack = ATTACKS.has(scene.scene);
    button.title = scene.about;
    button.setAttribute("aria-pressed", "false");
    button.addEventListener("click", () => choose(scene, button));
    return button;
  }));
}

function choose(scene, button) {
  // Each press takes the next prompt of that kind; the first is the one that shows it best.
  const number = next.get(scene.scene) ?? 0;
  next.set(scene.scene, (number + 1) % scene.prompts.length);
  const chosen = scene.prompts[number];
  clear();
  history = chosen.messages.slice(0, -1);
  prompt.value = chosen.messages.at(-1).content;
  prefill.value = chosen.prefill ?? "";
  grow();
  for (const other of byId("scenes").children) other.setAttribute("aria-pressed", String(other === button));
  byId("about").textContent = scene.about;
  byId("about").hidden = false;
  prompt.focus();
  status.textContent = `${scene.title}: the prompt is filled in. ${scene.about}`;
}

async function send() {
  const text = prompt.value.trim();
  if (!text || running) return;
  const messages = [...history, { role: "user", content: text }];
  const begun = prefill.value;
  byId("empty")?.remove();
  const turn = byId("turn").content.cloneNode(true).firstElementChild;
  turn.querySelector(".asked p").textContent = text;
  byId("log").append(turn);
  prompt.value = "";
  prefill.value = "";
  byId("about").hidden = true;
  grow();
  running = new AbortController();
  busy(true);
  status.textContent = "The model is answering.";
  const arms = [arm(turn, messages, begun, false)];
  if (facts.shows_bare && byId("compare").checked) arms.push(arm(turn, messages, begun, true));
  const [guarded] = await Promise.all(arms);
  if (guarded.text || begun) history = [...messages, { role: "assistant", content: begun + guarded.text }];
  running = null;
  busy(false);
  const how = guarded.element.querySelector(".verdict").textContent;
  status.textContent = `${how}. ${guarded.story} The reader gets: ${guarded.text || "nothing"}`;
  prompt.focus({ preventScroll: true });
}

async function arm(turn, messages, begun, isBare) {
  const element = byId("arm").content.cloneNode(true).firstElementChild;
  turn.querySelector(".arms").append(element);
  const answer = new Answer(element, { title: isBare ? "Bare model" : "Guarded", isBare, prefill: begun });
  if (!isBare) turn.scrollIntoView({ block: "start", behavior: "auto" });
  const asked = begun ? [...messages, { role: "assistant", content: begun }] : messages;
  const body = { model: facts.model, messages: asked, stream: true };
  const controller = running ?? new AbortController();
  try {
    // Where the bare model may be shown, what was taken back may be too; clients never see it.
    const guarded = facts.shows_bare ? "/page/guarded" : "/v1/chat/completions";
    const path = isBare ? "/page/bare" : guarded;
    for await (const chunk of events(path, body, { key: byId("key").value, signal: controller.signal })) {
      answer.take(chunk);
    }
    await answer.finish();
  } catch (error) {
    await stopped(answer, error);
  }
  if (!isBare && facts.shows_bare && turn.querySelectorAll(".arm").length === 1) offer(element, turn, messages, begun);
  return answer;
}

async function stopped(answer, error) {
  if (error.name === "AbortError") await answer.finish("Stopped by you");
  else if (error instanceof Refused) answer.fail(error.message);
  else answer.fail("The connection was lost.");
}

function offer(element, turn, messages, begun) {
  const button = element.querySelector(".compare");
  button.hidden = byId("compare").checked;
  button.addEventListener("click", async () => {
    button.hidden = true;
    const answer = await arm(turn, messages, begun, true);
    status.textContent = `The bare model says: ${answer.text}`;
  });
}

function busy(is) {
  byId("send").hidden = is;
  byId("stop").hidden = !is;
  byId("fresh").disabled = is;
  for (const button of byId("scenes").children) button.disabled = is;
}

function clear() {
  history = [];
  for (const turn of document.querySelectorAll(".turn")) turn.remove();
}

function grow() {
  prompt.rows = Math.min(6, Math.max(1, prompt.value.split("\n").length, Math.ceil(prompt.value.length / 80)));
}

function theme(name) {
  const dark = name ? name === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  if (name) document.documentElement.dataset.theme = name;
  byId("theme").textContent = dark ? "☀" : "☾";
  byId("theme").dataset.next = dark ? "light" : "dark";
}

function node(tag, text) {
  const element = document.createElement(tag);
  element.textContent = text;
  return element;
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
prompt.addEventListener("input", grow);
prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
byId("stop").addEventListener("click", () => running?.abort());
byId("fresh").addEventListener("click", () => {
  clear();
  prompt.focus();
  status.textContent = "A new conversation.";
});
byId("theme").addEventListener("click", () => {
  const name = byId("theme").dataset.next;
  localStorage.setItem("theme", name);
  theme(name);
});

begin().catch(() => {
  status.textContent = "The server cannot be reached.";
  byId("certificate").textContent = "The server cannot be reached.";
});
