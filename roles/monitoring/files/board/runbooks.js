// The section of the runbooks (docs/alerts.md, Markdown) that has an alert's name, as elements. HOST and NAME in it are the alert's.

const make = (tag, attributes = {}) => Object.assign(document.createElement(tag), attributes);

let sections;

async function read() {
  const answer = await fetch("alerts.md", { cache: "no-cache" });
  if (!answer.ok) throw new Error(`HTTP ${answer.status}`);
  const found = new Map();
  let lines = [];
  for (const line of (await answer.text()).split("\n")) {
    const heading = /^#+\s+(.*)$/.exec(line);
    if (heading) found.set(heading[1].trim().toLowerCase(), (lines = []));
    else lines.push(line);
  }
  return found;
}

// Text with `code`, **strong** and [links](https://…). Links to other pages of docs/ are text: the board has the runbooks alone.
function inline(tag, text) {
  const made = make(tag);
  for (const part of text.split(/(`[^`]+`|\*\*[^*]+\*\*|\[[^\]]+\]\([^)]+\))/)) {
    const link = /^\[([^\]]+)\]\(([^)]+)\)$/.exec(part);
    if (link && /^https?:\/\//.test(link[2])) made.append(make("a", { href: link[2], textContent: link[1], rel: "noreferrer" }));
    else if (link) made.append(link[2].startsWith("#") ? link[1] : `${link[1]} (docs/${link[2]})`);
    else if (/^`.+`$/.test(part)) made.append(make("code", { textContent: part.slice(1, -1) }));
    else if (/^\*\*.+\*\*$/.test(part)) made.append(make("strong", { textContent: part.slice(2, -2) }));
    else made.append(part);
  }
  return made;
}

function row(line, tag) {
  const made = make("tr");
  const cells = line.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/);
  made.append(...cells.map((text) => inline(tag, text.trim().replaceAll("\\|", "|"))));
  return made;
}

// Paragraphs, lists, tables and code: [[kind, text]], in which a paragraph or an item has all of its lines.
function parts(lines) {
  const found = [];
  let code = false;
  let ended = true;
  for (const line of lines) {
    const item = /^\s*(?:[-*]|\d+\.)\s+(.*)$/.exec(line);
    if (line.trimStart().startsWith("```")) {
      code = !code;
      if (code) found.push(["pre", ""]);
      ended = true;
    } else if (code) {
      found.at(-1)[1] += `${line}\n`;
    } else if (line.startsWith("|")) {
      if (!/^[|\s:-]+$/.test(line)) found.push(["tr", line]);
      ended = true;
    } else if (!line.trim()) {
      ended = true;
    } else if (item) {
      found.push(["li", item[1]]);
      ended = false;
    } else if (ended) {
      found.push(["p", line]);
      ended = false;
    } else {
      found.at(-1)[1] += ` ${line.trim()}`;
    }
  }
  return found;
}

function blocks(lines) {
  const made = [];
  const within = (tag) => {
    if (made.at(-1)?.tagName !== tag.toUpperCase()) made.push(make(tag));
    return made.at(-1);
  };
  for (const [kind, text] of parts(lines)) {
    if (kind === "pre") made.push(make("pre", { textContent: text }));
    else if (kind === "li") within("ul").append(inline("li", text));
    else if (kind === "tr") within("table").append(row(text, within("table").children.length ? "td" : "th"));
    else made.push(inline("p", text));
  }
  return made;
}

export async function runbook(alert, labels) {
  try {
    sections ??= await read();
  } catch (error) {
    return [inline("p", `The runbooks cannot be read (${error.message}): see docs/alerts.md.`)];
  }
  const lines = sections.get(alert.toLowerCase());
  const about = (line) => line.replace(/\bHOST\b/g, labels.host ?? "HOST").replace(/\bNAME\b/g, labels.name ?? "NAME");
  return lines ? blocks(lines.map(about)) : [inline("p", `docs/alerts.md has no section ${alert}.`)];
}
