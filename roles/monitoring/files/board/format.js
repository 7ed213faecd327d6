// Numbers as people read them.

const NUMBER = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });
const WHOLE = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const STATES = ["ok", "warning", "failed", "unknown"];
const NONE = "no data";

function seconds(value) {
  const size = Math.abs(value);
  if (size === 0) return "0 s";
  if (size < 1e-3) return `${NUMBER.format(value * 1e6)} µs`;
  if (size < 1) return `${NUMBER.format(value * 1e3)} ms`;
  if (size < 120) return `${NUMBER.format(value)} s`;
  if (size < 7200) return `${WHOLE.format(value / 60)} min`;
  if (size < 172800) return `${NUMBER.format(value / 3600)} h`;
  return `${NUMBER.format(value / 86400)} days`;
}

// A ratio near 1 has as many digits as tell it from 1: 99.9 % may be just above an objective, or just below.
function ratio(value) {
  const percent = value * 100;
  const missing = Math.abs(100 - percent);
  const digits = missing > 0 && missing < 1 ? Math.min(2 - Math.floor(Math.log10(missing)), 6) : 1;
  return `${Number(percent.toFixed(digits))} %`;
}

function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  let left = value;
  while (Math.abs(left) >= 1000 && unit < units.length - 1) {
    left /= 1024;
    unit += 1;
  }
  return `${NUMBER.format(left)} ${units[unit]}`;
}

const UNITS = {
  seconds,
  ratio,
  bytes,
  count: (value) => (Number.isInteger(value) || Math.abs(value) >= 1000 ? WHOLE.format(value) : NUMBER.format(value)),
  rate: (value) => `${NUMBER.format(value)}/s`,
  state: (value) => STATES[value] ?? NUMBER.format(value),
  yes: (value) => (value === 1 ? "yes" : "no"),
  date: (value) => new Date(value * 1000).toISOString().slice(0, 10),
};

export const units = Object.keys(UNITS);

export function format(value, unit) {
  return value === null || value === undefined || Number.isNaN(value) ? NONE : UNITS[unit](value);
}

// The name of a series: `{{label}}` stands for the label's value, as in Grafana.
export function named(legend, labels) {
  const text = legend.replace(/\{\{(\w+)\}\}/g, (_, label) => labels[label] ?? "").trim();
  return text || "all";
}

export function clock(time) {
  return new Date(time * 1000).toISOString().slice(11, 19);
}

// A time on the axis of a graph that spans so many seconds.
export function tick(time, span) {
  const text = new Date(time * 1000).toISOString();
  return span > 172800 ? text.slice(5, 10) : text.slice(11, 16);
}

export function moment(time) {
  return `${new Date(time * 1000).toISOString().slice(0, 16).replace("T", " ")} UTC`;
}
