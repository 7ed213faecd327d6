// Questions to Prometheus' HTTP API, through the gateway. Only GET: the gateway passes nothing else on.

const API = "api/v1/";
const SECONDS = 15;
const REFUSED = {
  401: "the gateway refuses the login: load this page again, and give a viewer's token as the password",
  403: "the gateway refuses this token: it must be a viewer's",
  429: "the gateway refuses requests because there are too many",
};

// Prometheus was not reached: every number of the page is of before.
export class Unreachable extends Error {}

// Prometheus answered, and refused the question.
export class Refused extends Error {}

async function ask(path, parameters = {}) {
  let response;
  try {
    response = await fetch(`${API}${path}?${new URLSearchParams(parameters)}`, {
      cache: "no-store",
      signal: AbortSignal.timeout(SECONDS * 1000),
    });
  } catch (error) {
    throw new Unreachable(error.name === "TimeoutError" ? `no answer within ${SECONDS} seconds` : "the gateway cannot be reached");
  }
  if (response.status in REFUSED) throw new Unreachable(REFUSED[response.status]);
  let body;
  try {
    body = await response.json();
  } catch {
    throw new Unreachable(`the answer is not Prometheus' (HTTP ${response.status})`);
  }
  if (body.status === "success") return body.data;
  if (body.error === undefined) throw new Unreachable(body.detail ?? `HTTP ${response.status}`);
  throw new Refused(body.error);
}

// The series of an expression at a time, in seconds: [{labels, value}].
export async function now(expr, time) {
  const { result, resultType } = await ask("query", { query: expr, time });
  if (resultType === "scalar") return [{ labels: {}, value: Number(result[1]) }];
  return result.map(({ metric, value }) => ({ labels: metric, value: Number(value[1]) }));
}

// The series of an expression over a range: [{labels, values}], a value or null for each of `times`.
export async function range(expr, start, end, step) {
  const { result } = await ask("query_range", { query: expr, start, end, step });
  return result.map(({ metric, values }) => {
    const at = new Map(values.map(([time, value]) => [Math.round(time), Number(value)]));
    const row = [];
    for (let time = start; time <= end; time += step) {
      const value = at.get(time);
      row.push(Number.isFinite(value) ? value : null);
    }
    return { labels: metric, values: row };
  });
}

// The groups of alerting rules, with the alerts of each rule.
export async function rules() {
  return (await ask("rules", { type: "alert" })).groups;
}
