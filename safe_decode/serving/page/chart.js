// The statistic as a live line, its threshold in the middle. Knows numbers and one svg.

const WIDTH = 600, HEIGHT = 96, STEPS = 40, EDGE = 5;

export class Chart {
  constructor(svg) {
    this.svg = svg;
    this.risks = [];
    this.tripAt = null;
  }

  /** Append the risk in [0, 1] of one token; null where none was taken. */
  push(risk) {
    if (risk !== null && risk !== undefined) this.risks.push(risk);
    this.draw();
  }

  trip(risk) {
    if (risk !== null && risk !== undefined) this.risks.push(risk);
    this.tripAt = Math.max(0, this.risks.length - 1);
    this.draw();
  }

  /** Say in words what the line shows. */
  describe(text) {
    this.svg.setAttribute("aria-label", text);
  }

  place(name, x, y) {
    const mark = this.svg.querySelector(name);
    for (const [attribute, value] of [["x1", x], ["x2", x], ["y1", y], ["y2", y]]) mark.setAttribute(attribute, value);
  }

  draw() {
    const span = Math.max(STEPS, this.risks.length - 1);
    const x = (index) => (EDGE + (index * (WIDTH - 2 * EDGE)) / span).toFixed(1);
    const y = (risk) => (HEIGHT - 4 - risk * (HEIGHT - 8)).toFixed(1);
    const points = this.risks.map((risk, index) => `${x(index)},${y(risk)}`).join(" ");
    this.svg.querySelector(".line").setAttribute("points", points);
    const last = x(Math.max(0, this.risks.length - 1));
    const area = points ? `${EDGE},${HEIGHT} ${points} ${last},${HEIGHT}` : "";
    this.svg.querySelector(".area").setAttribute("points", area);
    // A line without length, drawn with a round cap, is a dot that no scaling distorts.
    if (this.risks.length) this.place(".dot", last, y(this.risks.at(-1)));
    if (this.tripAt !== null) {
      const mark = this.svg.querySelector(".trip");
      mark.setAttribute("x1", x(this.tripAt));
      mark.setAttribute("x2", x(this.tripAt));
    }
  }
}
