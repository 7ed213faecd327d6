// The board: panels of board.json, filled from Prometheus every half a minute, and one line that says what is wrong.

import { clock, format, moment, named, tick } from "./format.js";
import { now, range, Refused, rules, Unreachable } from "./prometheus.js";
import { runbook } from "./runbooks.js";
import { judge, pending, state } from "./verdict.js";

/* global uPlot */

const EVERY = 30;
const POINTS = 240;
const SHOWN = 8; // rows of a list before the others are folded away
const HEIGHT = 140;
const MARKS = { ok: "✓", warning: "!", critical: "✗", unknown: "?", plain: "" };
const WORST = ["critical", "warning", "unknown", "ok", "plain"];

const at = (id) => document.getElementById(id);

function element(tag, attributes = {}, ...children) {
  const made = Object.assign(document.createElement(tag), attributes);
  made.append(...children);
  return made;
}

// A name, which may be broken after each underscore.
function label(name) {
  const made = element("span", { className: "of", title: name });
  name.split(/(?<=_)/).forEach((part, index) => made.append(...(index ? [element("wbr")] : []), part));
  return made;
}

// A shown number, with what it is in full for whoever points at it, and for tests.
function number(value, unit) {
  const shown = element("data", { textContent: format(value, unit) });
  if (value !== null && !Number.isNaN(value)) {
    shown.value = String(value);
    shown.title = unit === "date" ? moment(value) : String(value);
  }
  return shown;
}

function worst(states) {
  return WORST.find((each) => states.includes(each)) ?? "unknown";
}

function byLabels(series, legend) {
  return new Map(series.map(({ labels, value }) => [named(legend, labels), value]));
}

// Ask for all of a panel at one time: [{name, value, state}], or the series of a graph.
async function asked(panel, time, seconds) {
  if (panel.kind === "graph") {
    const step = Math.max(15, Math.ceil(seconds / POINTS));
    const end = Math.floor(time / step) * step;
    const start = end - Math.floor(seconds / step) * step;
    const answers = await Promise.all(panel.queries.map(({ expr }) => range(expr, start, end, step)));
    const times = [];
    for (let each = start; each <= end; each += step) times.push(each);
    const series = answers.flatMap((answer, index) =>
      answer.map(({ labels, values }) => ({ name: named(panel.queries[index].legend, labels), values })),
    );
    // A series whose values are all missing is no data.
    return { times, series: series.filter(({ values }) => values.some((value) => value !== null)) };
  }
  const questions = panel.queries.map(({ expr }) => now(expr, time));
  const words = panel.state ? byLabels(await now(panel.state.expr, time), panel.state.legend) : undefined;
  const answers = await Promise.all(questions);
  const rows = answers.flatMap((answer, index) =>
    answer.map(({ labels, value }) => {
      const name = named(panel.queries[index].legend, labels);
      return { name, value, state: state(value, panel, words?.get(name)) };
    }),
  );
  // A fact that has no value has a state all the same.
  for (const [name, word] of words ?? []) {
    if (!rows.some((row) => row.name === name)) rows.push({ name, value: null, state: state(0, panel, word) });
  }
  const sign = panel.lowest ? 1 : -1;
  const size = ({ value }) => (value === null || Number.isNaN(value) ? -Infinity : value);
  rows.sort((a, b) => WORST.indexOf(a.state) - WORST.indexOf(b.state) || sign * (size(a) - size(b)) || a.name.localeCompare(b.name));
  return { rows };
}

class Panel {
  constructor(held) {
    this.held = held;
    this.body = element("div", { className: "body" });
    this.help = element("p", { className: "help", textContent: held.help });
    this.root = element("article", { className: `panel ${held.kind} unknown` }, element("h3", { textContent: held.title }), this.body, this.help);
    this.root.dataset.panel = held.title;
    this.state = "unknown";
    this.empty = true;
  }

  // What Prometheus says, or that it refuses the question.
  async ask(time, seconds) {
    try {
      return await asked(this.held, time, seconds);
    } catch (error) {
      if (error instanceof Refused) return { refused: error.message };
      throw error;
    }
  }

  fill(found, time) {
    this.root.dataset.time = String(time);
    if (found.refused !== undefined) {
      this.empty = true;
      this.show("unknown", [element("p", { className: "nothing", textContent: `Prometheus refuses the question: ${found.refused}` })]);
    } else if (found.series) this.graph(found);
    else if (this.held.kind === "value") this.value(found.rows);
    else this.list(found.rows);
  }

  show(reached, content) {
    this.state = reached;
    this.help.textContent = this.held.help;
    this.root.className = `panel ${this.held.kind} ${reached}`;
    this.body.replaceChildren(...content);
  }

  nothing() {
    this.empty = true;
    this.show("unknown", [element("p", { className: "nothing", textContent: "no data" })]);
    this.help.textContent = this.held.absent ?? this.held.help;
  }

  value(rows) {
    const [row] = rows;
    if (!row || row.value === null || Number.isNaN(row.value)) return this.nothing();
    this.empty = false;
    this.show(row.state, [this.row(row)]);
  }

  row({ name, value, state: reached }) {
    const mark = element("span", { className: `mark ${reached}`, textContent: MARKS[reached] });
    mark.setAttribute("aria-label", reached);
    const made = element("div", { className: "row" }, mark);
    if (this.held.kind === "list") {
      made.append(label(name));
      if (this.held.unit === "ratio" && value !== null && !Number.isNaN(value)) {
        const meter = element("span", { className: `meter ${reached}` }, element("i"));
        meter.firstChild.style.width = `${Math.min(Math.max(value, 0), 1) * 100}%`;
        made.append(meter);
      }
    }
    made.append(number(value, this.held.unit));
    return made;
  }

  list(rows) {
    if (!rows.length) return this.nothing();
    this.empty = false;
    const open = this.body.querySelector("details")?.open ?? false;
    // Of a long list, all that is not well is shown.
    const odd = rows.filter((row) => row.state !== "ok" && row.state !== "plain").length;
    const shown = rows.length > SHOWN ? Math.max(odd, this.held.unit === "state" ? 0 : SHOWN) : rows.length;
    const content = rows.slice(0, shown).map((row) => this.row(row));
    if (rows.length > shown) {
      const more = element("details", { open }, element("summary", { textContent: `${rows.length - shown} more` }));
      more.append(...rows.slice(shown).map((row) => this.row(row)));
      content.push(more);
    }
    this.show(worst(rows.map((row) => row.state)), content);
  }

  graph({ times, series }) {
    if (!series.length) return this.nothing();
    this.empty = false;
    this.data = { times, series };
    const plot = element("div", { className: "plot" });
    const legend = element("ul", { className: "legend" });
    this.show("plain", [plot, legend]);
    this.draw(plot, legend);
  }

  draw(plot, legend) {
    const { times, series } = this.data;
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    const colours = series.map((_, index) => colour(`--series-${(index % 8) + 1}`));
    const values = series.map(() => element("data"));
    const tell = (index) => {
      series.forEach(({ values: row }, each) => {
        const value = index === null ? row.findLast((found) => found !== null) : row[index];
        values[each].textContent = format(value, this.held.unit);
        values[each].value = value ?? "";
      });
    };
    legend.replaceChildren(
      ...series.map(({ name }, index) => {
        const swatch = element("i");
        swatch.style.background = colours[index];
        return element("li", {}, swatch, label(name), values[index]);
      }),
    );
    const axis = { stroke: colour("--dim"), grid: { stroke: colour("--line"), width: 1 }, ticks: { show: false }, font: "11px system-ui" };
    const drawn = new uPlot(
      {
        width: plot.clientWidth,
        height: HEIGHT,
        cursor: { y: false, points: { size: 5 } },
        legend: { show: false },
        tzDate: (time) => uPlot.tzDate(new Date(time * 1000), "UTC"),
        scales: { y: { range: (_, low, high) => [Math.min(low, 0), high > 0 ? high * 1.05 : 1] } },
        series: [{}, ...series.map(({ name }, index) => ({ label: name, stroke: colours[index], width: 1.5, points: { show: false } }))],
        axes: [{ ...axis, size: 26, values: (_, splits) => splits.map((time) => tick(time, times.at(-1) - times[0])) }, { ...axis, size: 58, values: (_, splits) => splits.map((value) => format(value, this.held.unit)) }],
        hooks: { setCursor: [({ cursor }) => tell(cursor.idx ?? null)] },
      },
      [times, ...series.map(({ values: row }) => row)],
      plot,
    );
    tell(null);
    this.drawn = drawn;
  }

  resize() {
    if (this.data && this.body.querySelector(".plot")) this.draw(...this.cleared());
  }

  cleared() {
    const [plot, legend] = this.body.children;
    plot.replaceChildren();
    return [plot, legend];
  }
}

class Board {
  constructor(dashboards) {
    this.dashboards = dashboards.map(({ name, title, panels }) => {
      const made = panels.map((panel) => new Panel(panel));
      const jump = element("a", { href: `#${name}`, textContent: title });
      const root = element(
        "section",
        { id: name },
        element("h2", { textContent: title }),
        element("div", { className: "panels" }, ...made.map((panel) => panel.root)),
      );
      return { root, jump, panels: made };
    });
    this.panels = this.dashboards.flatMap(({ panels }) => panels);
    at("dashboards").append(...this.dashboards.map(({ root }) => root));
    at("sections").append(...this.dashboards.map(({ jump }) => jump));
    this.answered = 0;
    this.asking = false;
    this.open = new Set();
    this.round = 0;
  }

  // Where answers take longer than the time between two rounds, the next round waits; another range of the graphs does not.
  async refresh(atOnce = false) {
    if (this.asking && !atOnce) return;
    const round = ++this.round;
    this.asking = true;
    const time = Math.floor(Date.now() / 1000);
    const seconds = Number(at("range").value);
    try {
      const groups = await rules();
      const found = await Promise.all(this.panels.map((panel) => panel.ask(time, seconds)));
      if (round !== this.round) return;
      // All panels change at once, so that the page is of one time.
      this.panels.forEach((panel, index) => panel.fill(found[index], time));
      this.answered = time;
      this.tell(groups, time);
    } catch (error) {
      if (round === this.round) this.unreachable(error);
      if (!(error instanceof Unreachable)) throw error;
    } finally {
      if (round === this.round) this.asking = false;
    }
  }

  tell(groups, time) {
    const { problems, watched } = judge(groups, time);
    const blind = this.panels.filter(({ held, empty }) => held.needed && empty);
    if (blind.length) problems.push({ level: "unknown", text: `No data: ${blind.map(({ held }) => held.title).join("; ")}.` });
    const firing = problems.filter(({ level }) => level === "critical" || level === "warning");
    // Without an alert that says so, a value beyond its limit is no reason to say that all is well.
    const beyond = firing.length ? [] : this.panels.filter((panel) => panel.state === "critical");
    problems.push(...beyond.map(({ held }) => ({ level: "warning", text: `No alert fires, but see: ${held.title}.` })));
    const unknown = problems.filter(({ level }) => level === "unknown");
    const level = worst([...problems.map((problem) => problem.level), "ok"]);
    let said = "healthy";
    if (firing.length === 1) said = firing[0].text;
    else if (firing.length) said = `${firing.length} alerts: ${firing[0].text}`;
    else if (beyond.length) said = `No alert fires, but see: ${beyond.map(({ held }) => held.title).join(", ")}`;
    else if (unknown.length) said = "Nothing is known to be wrong, but not all is known";
    if ((firing.length || beyond.length) && unknown.length) said += ` (and ${unknown.length} unknown)`;
    this.verdict(level, said, problems);
    const waiting = pending(groups);
    at("when").textContent =
      `${watched} alerting rules, judged by Prometheus. As of ${clock(time)} UTC.` +
      (waiting.length ? ` Alerts soon, if it goes on so: ${waiting.join(" ")}` : "");
    document.body.classList.remove("stale");
    for (const { jump, panels } of this.dashboards) jump.className = worst(panels.map((panel) => panel.state));
  }

  unreachable(error) {
    document.body.classList.add("stale");
    const why = error instanceof Unreachable ? error.message : `this page has failed: ${error.message}`;
    this.verdict("unknown", "Prometheus does not answer", [{ level: "unknown", text: `What is wrong is not known: ${why}.` }]);
    at("when").textContent = this.answered
      ? `What follows is of ${moment(this.answered)}, and may not hold any more. Asked again every ${EVERY} seconds.`
      : `Asked again every ${EVERY} seconds.`;
    for (const { jump } of this.dashboards) jump.className = "unknown";
  }

  // The runbook of an alert, which stays open when the page asks again.
  help(alert, labels) {
    const key = JSON.stringify(labels);
    const made = element("details", { className: "runbook", open: this.open.has(key) }, element("summary", { textContent: "what to do" }));
    const fill = async () => {
      if (made.open) this.open.add(key);
      else this.open.delete(key);
      if (made.open && made.children.length === 1) made.append(...(await runbook(alert, labels)));
    };
    made.addEventListener("toggle", fill);
    return made;
  }

  verdict(level, said, problems) {
    at("verdict").className = level;
    at("said").textContent = said;
    document.title = `${level === "ok" ? "healthy" : said} · Larder`;
    at("problems").replaceChildren(
      ...problems.map(({ level: of, text, since, alert, labels }) => {
        const mark = element("span", { className: `mark ${of}`, textContent: MARKS[of] ?? "i" });
        mark.setAttribute("aria-label", of);
        const line = element("li", { className: of }, mark, element("span", { className: "text", textContent: text }));
        if (since) line.append(element("span", { className: "since", textContent: `since ${moment(since)}` }));
        if (alert) {
          line.dataset.alert = alert;
          line.append(this.help(alert, labels));
        }
        return line;
      }),
    );
  }
}

async function main() {
  const answer = await fetch("board.json", { cache: "no-cache" });
  if (!answer.ok) throw new Error(`board.json: HTTP ${answer.status}`);
  const board = new Board((await answer.json()).dashboards);
  const refresh = (atOnce = false) => {
    if (!document.hidden) board.refresh(atOnce);
  };
  const redraw = () => board.panels.forEach((panel) => panel.resize());
  let waiting;
  at("range").addEventListener("change", () => refresh(true));
  document.addEventListener("visibilitychange", () => refresh());
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  addEventListener("resize", () => {
    clearTimeout(waiting);
    waiting = setTimeout(redraw, 200);
  });
  setInterval(() => refresh(), EVERY * 1000);
  refresh();
}

main().catch((error) => {
  at("said").textContent = `This page could not be loaded: ${error.message}`;
  at("when").textContent = "Load it again.";
});
