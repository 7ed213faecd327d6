// What is wrong, from the alerting rules and from what could not be found out. Nothing that is unknown counts as well.

import { moment } from "./format.js";

const ORDER = ["critical", "warning", "info"];
// A rule that was not judged for so many of its group's intervals is not watched.
const INTERVALS = 4;
const WATCHDOG = "none"; // severity of an alert that always fires, so that its silence is noticed

function sentence(alert, rule) {
  const { summary, description } = alert.annotations;
  return summary || description || rule.name;
}

// Return {problems: [{level, text, since, alert, labels}], watched: number of rules} at a time in seconds.
export function judge(groups, time) {
  const problems = [];
  let watched = 0;
  for (const group of groups) {
    for (const rule of group.rules) {
      watched += 1;
      const watchdog = rule.labels?.severity === WATCHDOG;
      const evaluated = Date.parse(rule.lastEvaluation) / 1000;
      if (rule.health === "err") {
        problems.push({ level: "unknown", text: `The rule ${rule.name} cannot be judged: ${rule.lastError}` });
      } else if (!(evaluated > time - INTERVALS * Math.max(group.interval, 15))) {
        const since = evaluated > 0 ? `since ${moment(evaluated)}` : "yet";
        problems.push({ level: "unknown", text: `The rule ${rule.name} has not been judged ${since}.` });
      } else if (watchdog && rule.state !== "firing") {
        problems.push({ level: "unknown", text: `The alert ${rule.name}, which fires always, does not.` });
      }
      if (watchdog) continue;
      for (const alert of rule.alerts) {
        if (alert.state !== "firing") continue;
        problems.push({
          level: ORDER.includes(alert.labels.severity) ? alert.labels.severity : "critical",
          alert: rule.name,
          labels: alert.labels,
          text: sentence(alert, rule),
          since: Date.parse(alert.activeAt) / 1000,
        });
      }
    }
  }
  if (!watched) {
    problems.push({ level: "unknown", text: "Prometheus has no alerting rule: nothing is judged." });
  }
  const rank = (problem) => [...ORDER.slice(0, 2), "unknown", "info"].indexOf(problem.level);
  problems.sort((a, b) => rank(a) - rank(b) || (a.since ?? 0) - (b.since ?? 0));
  return { problems, watched };
}

// The rules that will fire if it goes on so.
export function pending(groups) {
  const waiting = groups.flatMap((group) => group.rules.flatMap((rule) => rule.alerts.map((alert) => ({ rule, alert }))));
  return waiting.filter(({ alert }) => alert.state === "pending").map(({ rule, alert }) => sentence(alert, rule));
}

// The state of a value by a panel's limits, or by larder status' own word (0 ok, 1 warning, 2 failed, 3 unknown).
export function state(value, panel, word) {
  if (value === null || value === undefined || Number.isNaN(value)) return "unknown";
  if (word !== undefined) return ["ok", "warning", "critical", "unknown"][word] ?? "unknown";
  const beyond = (limit) =>
    limit !== undefined &&
    ((limit.above !== undefined && value > limit.above) ||
      (limit.below !== undefined && value < limit.below) ||
      (limit.equal !== undefined && value === limit.equal));
  if (beyond(panel.bad)) return "critical";
  if (panel.unit === "state" && value === 3) return "unknown";
  if (beyond(panel.warn)) return "warning";
  return panel.bad || panel.warn || panel.state ? "ok" : "plain";
}
