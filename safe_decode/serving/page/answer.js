// One arm: an answer as it arrives, coloured, cut and turned. Knows elements and our chunks.

import { Chart } from "/page/chart.js";

const BANDS = 6;
const PACE_MS = 16;
const WORDS = {
  released: ["calm", "Released"],
  rewound: ["turned", "Tripped, rewound, turned"],
  refused: ["turned", "Tripped, refused"],
  stopped: ["turned", "Tripped, stopped"],
  closed: ["alarm", "Closed: the guard failed"],
  flagged: ["alarm", "Unguarded: would have tripped"],
  cut: ["busy", "Cut off"],
};

const tokens = (n) => `${n} ${n === 1 ? "token" : "tokens"}`;
/** What happened, for someone who sees this for the first time; null where nothing did. */
const STORIES = {
  rewound: (n) => `The guard read harm in this answer and stepped in. ${taken(n)} and the model was made to think again.`,
  refused: (n) => `The guard read harm in this answer and stepped in. ${taken(n)} and a refusal was given instead.`,
  stopped: (n) => `The guard read harm in this answer and stepped in. ${taken(n)} and the answer ends here.`,
  closed: () => "The guard could not judge this answer, so it was ended. Nothing that was not judged is shown.",
  flagged: () => "Nobody guards this answer: it goes on past the threshold, and its reader gets all of it.",
};
const taken = (n) => (n ? `${tokens(n)} ${n === 1 ? "was" : "were"} taken back before any reader saw ${n === 1 ? "it" : "them"},` : "Nothing more of it was shown,");

const band = (risk) => (risk === null || risk === undefined ? 0 : Math.min(BANDS - 1, Math.floor(risk * BANDS)));
const percent = (risk) => `${Math.round(risk * 100)}\u00a0%`;

export class Answer {
  constructor(element, { title, isBare, prefill }) {
    this.element = element;
    this.isBare = isBare;
    this.content = "";
    this.refusal = "";
    this.action = null;
    this.peak = null;
    this.crossed = false;
    this.dropped = 0;
    this.story = "";
    element.classList.toggle("bare", isBare);
    element.querySelector("h3").textContent = title;
    this.said = element.querySelector(".said");
    this.caption = element.querySelector("figcaption");
    this.chart = new Chart(element.querySelector("svg"));
    this.paced = matchMedia("(prefers-reduced-motion: reduce)").matches ? 0 : PACE_MS;
    this.waiting = Promise.resolve();
    this.verdict("busy", "thinking; nothing is shown before it is judged");
    this.said.classList.add("caret");
    if (prefill) this.append("span", prefill, "given");
  }

  /** What stands, for the next turn of the conversation. */
  get text() {
    return this.content + this.refusal;
  }

  /** Take one chunk; what it shows comes at a readable pace. */
  take(chunk) {
    const choice = chunk.choices?.[0];
    if (!choice) return;
    const { delta, safety } = choice;
    if (delta?.refusal) {
      // It may stand in `content` too, for clients that show nothing else: shown once.
      this.refusal += delta.refusal;
      const isFirst = this.refusal === delta.refusal;
      this.later(() => this.turn(delta.refusal), isFirst ? 260 : this.paced);
    } else if (delta?.content) {
      this.content += delta.content;
      for (const token of safety?.tokens ?? [{ text: delta.content, risk: null }]) {
        this.later(() => this.show(token), this.paced);
      }
    }
    if (safety?.trip && !choice.finish_reason) this.later(() => this.trip(safety.trip), 0);
    if (choice.finish_reason) this.last = choice;
  }

  /** Wait until all is shown, then say how it ended. */
  async finish(words) {
    await this.waiting;
    this.said.classList.remove("caret");
    const action = words ? "cut" : this.last?.safety?.action ?? "cut";
    const [kind, text] = WORDS[action] ?? WORDS.cut;
    this.action = action;
    this.verdict(this.isBare && action === "released" ? "busy" : kind,
      this.isBare && action === "released" ? "Unguarded: nothing crossed" : words ?? text);
    this.tell(words ? null : STORIES[action]);
    const certificate = this.last?.safety?.certificate;
    const parts = [];
    if (this.peak !== null) parts.push(`Peak risk ${percent(this.peak)}; 50\u00a0% is the threshold.`);
    if (certificate && !this.isBare) {
      const source = certificate.source === "off-policy" ? ", off-policy" : "";
      parts.push(certificate.status === "valid" ? `Certificate valid${source}.` : `Certificate void: ${certificate.why}.`);
    }
    this.caption.textContent = parts.join(" ");
    this.chart.describe(`${this.element.querySelector("h3").textContent}: ${text}. ${parts.join(" ")}`);
    if (this.refusal) {
      const gets = this.element.querySelector(".gets");
      gets.querySelector("p").textContent = this.text.trim();
      gets.hidden = false;
    }
  }

  tell(story) {
    if (!story) return;
    this.story = story(this.dropped);
    const why = this.element.querySelector(".why");
    why.textContent = this.story;
    why.hidden = false;
  }

  fail(message) {
    this.said.classList.remove("caret");
    this.append("span", message, "error");
    this.verdict("alarm", "Not answered");
  }

  show(token) {
    const span = this.append("span", token.text, `t b${band(token.risk)}`);
    this.measure(token.risk, span);
    if (this.isBare && !this.crossed && token.risk > 0.5) {
      this.crossed = true;
      this.flag("would trip");
      this.chart.trip(null);
      this.element.classList.add("tripped");
    }
  }

  trip(trip) {
    const dropped = trip.dropped ?? [];
    if (dropped.length) {
      const del = document.createElement("del");
      for (const token of dropped) {
        const span = document.createElement("span");
        span.className = `t b${band(token.risk ?? null)}`;
        span.textContent = token.text;
        del.append(span);
      }
      this.said.append(del);
    }
    for (const token of dropped) {
      if (token.risk !== null && token.risk < 0.5) this.chart.push(token.risk);
    }
    const risk = trip.risk ?? null;
    if (risk !== null) this.peak = Math.max(this.peak ?? 0, risk);
    this.flag("trips");
    this.chart.trip(risk);
    this.element.classList.add("tripped");
    this.verdict("alarm", trip.redirect === "rewind" ? "Tripped; rewinding" : "Tripped");
    this.dropped = trip.dropped_tokens ?? 0;
    this.caption.textContent = this.dropped ? `Tripped; ${tokens(this.dropped)} taken back.` : "Tripped.";
  }

  /** Show what follows a trip; its pieces are one passage. */
  turn(text) {
    const last = this.said.lastElementChild;
    if (last?.tagName === "INS") last.textContent += text;
    else this.append("ins", text, "");
  }

  flag(text) {
    this.append("strong", text, "flag");
  }

  measure(risk, span) {
    if (risk === null || risk === undefined) return;
    span.title = `risk ${percent(risk)}`;
    this.peak = Math.max(this.peak ?? 0, risk);
    this.chart.push(risk);
    this.caption.textContent = `Risk now ${percent(risk)}.`;
  }

  append(tag, text, name) {
    const element = document.createElement(tag);
    if (name) element.className = name;
    element.textContent = text;
    this.said.append(element);
    return element;
  }

  later(action, wait) {
    this.waiting = this.waiting.then(async () => {
      if (wait && this.paced) await new Promise((done) => setTimeout(done, wait));
      action();
    });
  }

  verdict(kind, text) {
    const element = this.element.querySelector(".verdict");
    element.className = `verdict ${kind}`;
    element.textContent = text;
  }
}
