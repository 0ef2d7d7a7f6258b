(() => {
"use strict";
// Every text of the data reaches the page through textContent, so that it stays text.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const make = (tag, kind, text) => {
  const one = document.createElement(tag);
  if (kind) one.className = kind;
  if (text !== undefined) one.textContent = text;
  return one;
};
const count = (value) => value === null ? "" : value.toLocaleString("en");
const number = (value) => value === null ? "" : Math.abs(value) >= 1000 ? count(Math.round(value)) : value.toPrecision(4);
const picks = data.picks.map(([index, score, tokens, source, best, scores, turns, left], place) =>
  ({place, index, score, tokens, source: data.sources[source], best: data.targets[best], scores, turns, left}));
const opening = (turns) => turns.map(([, text]) => text.slice(0, 300)).join(" · ").slice(0, 400);

// ------------------------------------------------------------------------ why a row has its score
const percent = (share) => Math.abs(share) >= 0.1 || !share ? `${(share * 100).toFixed(0)} %` : Math.abs(share) >= 0.001 ? `${(share * 100).toFixed(1)} %` : "< 0.1 %";
const turnOf = (role, said) => {
  const turn = make("div", "turn"), name = data.roles[role];
  if (name === "user" || name === "assistant") turn.classList.add(name);
  said.dir = "auto";
  turn.append(make("h4", "", name), said);
  return turn;
};
const explained = (why, turns) => {
  const box = make("div", "why"), pieces = [];
  if (why.turns) turns.replaceChildren(...why.turns.map(([role, texts]) => {
    const said = make("p", ""), spans = texts.map((text) => make("span", "", text));
    said.append(...spans);
    pieces.push(...spans);
    return turnOf(role, said);
  }));
  const shade = (levels) => pieces.forEach((piece, i) => { piece.className = levels[i] && levels[i] !== "0" ? `h${levels[i]}` : ""; });
  if (why.turns) shade(why.levels);
  box.append(make("p", "says", `${data.targets.length ? `For ${why.target}: ` : ""}${why.says}.`));
  const list = make("ol", "parts"), most = Math.max(...why.parts.map((part) => Math.abs(part.share)), 1e-9);
  for (const part of why.parts) {
    const item = make("li"), line = make(part.levels ? "button" : "div", "part"), bar = make("i", "bar");
    bar.style.width = `${Math.max(2, 100 * Math.abs(part.share) / most)}%`;
    const name = make("span", "name", part.name), track = make("span", "track");
    name.dir = "auto";
    track.append(bar);
    line.append(name, track, make("b", "", percent(part.share)));
    const more = [part.unit, part.made && `label ${part.made}`,
      part.usual === null ? "" : `${percent(part.usual)} in an average row`, part.rarity === null ? "" : `in ${percent(part.rarity)} of the pool's rows`].filter(Boolean).join(" · ");
    if (more) line.append(make("small", "", more));
    if (part.levels) {
      line.type = "button";
      line.setAttribute("aria-pressed", "false");
      line.addEventListener("click", () => {
        const on = line.getAttribute("aria-pressed") !== "true";
        for (const other of list.querySelectorAll("button")) other.setAttribute("aria-pressed", String(on && other === line));
        shade(on ? part.levels : why.levels);
      });
    }
    item.append(line);
    list.append(item);
  }
  if (why.parts.length) box.append(list);
  if (why.of > why.parts.length && why.parts.length) box.append(make("p", "left", `and ${count(why.of - why.parts.length)} more parts`));
  if (why.outside >= 0.02) box.append(make("p", "left", `${percent(why.outside)} comes from tokens that are not shown: those of the chat template, or further on.`));
  if (why.whole === false) box.append(make("p", "left", "The text is longer than what is shown here."));
  return box;
};

// ---------------------------------------------------------------------------------- a row as a card
const card = (pick, whole) => {
  const one = make("article", "card"), head = make("header"), turns = make("div", whole ? "turns" : "turns short");
  const say = (before, value) => { const part = make("span", "", before); part.append(make("strong", "", value)); head.append(part); };
  const why = data.why[pick.index];
  head.append(make("b", "", pick.place === undefined ? "not picked" : `${pick.place + 1}`));
  say("score ", number(pick.score));
  if (data.spread && pick.score !== null) say("above the pool ", `${((pick.score - data.mean) / data.spread).toFixed(1)} sd`);
  if (pick.tokens !== null) say("tokens ", count(pick.tokens));
  if (pick.source !== undefined) say("source ", pick.source);
  if (pick.best !== undefined) say("best for ", pick.best);
  say("row ", count(pick.index));
  one.append(head);
  for (const [role, text] of pick.turns) {
    turns.append(turnOf(role, make("p", "", text)));
  }
  if (!pick.turns.length) turns.append(make("p", "left", "The page was made without texts of the data."));
  one.append(turns);
  const reasons = why && explained(why, turns);
  if (pick.left && !(why && why.turns)) one.append(make("p", "left", `${count(pick.left)} more characters are in the data, not in this page.`));
  if (!whole) {
    const open = make("button", "open", "Show all");
    open.type = "button";
    open.hidden = true;
    open.setAttribute("aria-expanded", "false");
    open.addEventListener("click", () => {
      const short = turns.classList.toggle("short");
      open.textContent = short ? "Show all" : "Show less";
      open.setAttribute("aria-expanded", String(!short));
    });
    one.append(open);
  }
  if (reasons) one.append(reasons);
  return one;
};
const offer = (one) => { // the button, where a text is cut off on the screen
  const open = one.querySelector("button.open");
  if (open) open.hidden = ![...one.querySelectorAll(".turn p")].some((text) => text.scrollHeight > text.clientHeight + 2);
};

const cards = byId("cards");
if (cards) {
  let shown = 0;
  const more = () => {
    const fresh = picks.slice(shown, shown + (shown ? 12 : 6)).map((pick) => card(pick, false));
    cards.append(...fresh);
    fresh.forEach(offer);
    shown += fresh.length;
    byId("more").hidden = shown >= Math.min(picks.length, 200);
  };
  byId("more").addEventListener("click", more);
  more();
}

// ------------------------------------------------------------------------------------- the table
const HEIGHT = 40;
const view = byId("view"), space = byId("space"), found = byId("found");
const columns = [
  ["place", "rank", "n place", (pick) => count(pick.place + 1), (pick) => pick.place],
  ["score", "score", "n", (pick) => number(pick.score), (pick) => -(pick.score ?? -Infinity)],
  ...data.targets.map((name, i) => [`of ${name}`, name, "n of", (pick) => number(pick.scores[i]), (pick) => -(pick.scores[i] ?? -Infinity)]),
  ...(data.targets.length ? [["best", "best for", "best", (pick) => pick.best, (pick) => pick.best]] : []),
  ...(picks.some((pick) => pick.tokens !== null) ? [["tokens", "tokens", "n tokens", (pick) => count(pick.tokens), (pick) => -(pick.tokens ?? -1)]] : []),
  ...(data.sources.length ? [["source", "source", "source", (pick) => pick.source, (pick) => pick.source]] : []),
  ["index", "row", "n index", (pick) => count(pick.index), (pick) => pick.index],
  ...(picks.some((pick) => pick.turns.length) ? [["said", "text", "said", (pick) => opening(pick.turns), null]] : []),
];
let list = picks, sorted = "place", up = false, here = -1;

const head = make("div", "row"), sort = byId("sort");
head.setAttribute("role", "row");
for (const [key, name, kind, , by] of columns) {
  const cell = make("div", kind);
  cell.setAttribute("role", "columnheader");
  if (by) {
    const press = make("button", "", name);
    press.type = "button";
    press.addEventListener("click", () => order(key, sorted === key && !up));
    cell.append(press);
    const choice = make("option", "", name);
    choice.value = key;
    sort.append(choice);
  } else cell.textContent = name;
  cell.dataset.key = key;
  head.append(cell);
}
byId("head").append(head);
byId("table").setAttribute("aria-colcount", String(columns.length));

const drawn = new Map();
const draw = () => {
  const first = Math.max(0, Math.floor(view.scrollTop / HEIGHT) - 8);
  const last = Math.min(list.length, Math.ceil((view.scrollTop + view.clientHeight) / HEIGHT) + 8);
  for (const [i, row] of drawn) if (i < first || i >= last) { row.remove(); drawn.delete(i); }
  for (let i = first; i < last; i++) {
    if (drawn.has(i)) continue;
    const row = make("div", i === here ? "row here" : "row");
    row.setAttribute("role", "row");
    row.setAttribute("aria-rowindex", String(i + 2));
    row.id = `row-${i}`;
    row.style.top = `${i * HEIGHT}px`;
    for (const [key, , kind, value] of columns) {
      const cell = make("div", kind, value(list[i]) ?? "");
      cell.setAttribute("role", "cell");
      if (key === "said") cell.dir = "auto";
      row.append(cell);
    }
    row.addEventListener("click", () => open(i));
    drawn.set(i, row);
    space.append(row);
  }
};
const refresh = () => {
  drawn.forEach((row) => row.remove());
  drawn.clear();
  here = -1;
  view.removeAttribute("aria-activedescendant");
  space.style.height = `${list.length * HEIGHT}px`;
  view.scrollTop = 0;
  found.textContent = list.length === picks.length ? `${count(picks.length)} rows` : `${count(list.length)} of ${count(picks.length)} rows`;
  byId("table").setAttribute("aria-rowcount", String(list.length + 1));
  draw();
};
const choices = {}; // an option's text has lost its spaces, and a name may be empty
const chosen = (id) => choices[id]?.[byId(id).querySelector("select").selectedIndex - 1] ?? null;
const texts = picks.map(() => null);
const text = (pick) => texts[pick.place] ??= [...pick.turns.map(([, said]) => said), pick.source ?? ""].join("\n").toLowerCase();
const search = byId("search");
const order = (key, turned) => {
  sorted = key;
  up = turned;
  const by = columns.find(([name]) => name === key)[4];
  const words = search ? search.value.toLowerCase().split(/\s+/).filter(Boolean) : [];
  const source = chosen("of-source"), target = chosen("of-target");
  list = picks.filter((pick) => (source === null || pick.source === source) && (target === null || pick.best === target)
    && words.every((word) => text(pick).includes(word)));
  list.sort((a, b) => { const x = by(a), y = by(b); return (x < y ? -1 : x > y ? 1 : 0) * (up ? -1 : 1) || a.place - b.place; });
  const falls = key === "score" || key === "tokens" || key.startsWith("of "), rising = falls === up; // largest first, at first
  for (const cell of head.children) {
    const on = cell.dataset.key === key;
    cell.classList.toggle("sorted", on);
    cell.classList.toggle("up", on && rising);
    if (on) cell.setAttribute("aria-sort", rising ? "ascending" : "descending"); else cell.removeAttribute("aria-sort");
  }
  sort.value = key;
  refresh();
};
const filter = (id, names) => {
  if (names.length < 2) return;
  const label = byId(id), one = label.querySelector("select");
  one.append(make("option", "", "all"), ...names.map((name) => make("option", "", name)));
  choices[id] = names;
  label.hidden = false;
  one.addEventListener("change", () => order(sorted, up));
};
filter("of-source", [...data.sources].sort());
filter("of-target", data.targets);
let waiting = 0;
if (search) search.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(() => order(sorted, up), 120); });
sort.addEventListener("change", () => order(sort.value, false));
let asked = false;
view.addEventListener("scroll", () => { if (!asked) { asked = true; requestAnimationFrame(() => { asked = false; draw(); }); } }, {passive: true});
addEventListener("resize", draw);

const go = (i) => {
  if (!list.length) return;
  drawn.get(here)?.classList.remove("here");
  here = Math.max(0, Math.min(list.length - 1, i));
  const top = here * HEIGHT;
  if (top < view.scrollTop) view.scrollTop = top;
  else if (top + HEIGHT > view.scrollTop + view.clientHeight) view.scrollTop = top + HEIGHT - view.clientHeight;
  draw();
  drawn.get(here)?.classList.add("here");
  view.setAttribute("aria-activedescendant", `row-${here}`);
};
view.addEventListener("keydown", (event) => {
  const page = Math.max(1, Math.floor(view.clientHeight / HEIGHT) - 1);
  const step = {ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity}[event.key];
  if (step !== undefined) { event.preventDefault(); go(here < 0 && step === 1 ? 0 : here + step); }
  else if (event.key === "Enter" && here >= 0) { event.preventDefault(); open(here); } // else it presses a button of the dialog, too
});

// --------------------------------------------------------------------------------------- one row
const dialog = byId("one");
const open = (i) => {
  go(i);
  dialog.lastElementChild.replaceChildren(card(list[here], true));
  dialog.querySelector("span").textContent = `${count(here + 1)} of ${count(list.length)}`;
  byId("previous").disabled = here === 0;
  byId("next").disabled = here === list.length - 1;
  if (dialog.open) return;
  dialog.showModal();
  byId("close").focus();  // not the attribute autofocus, which also acts, and complains, when the page opens
};
byId("previous").addEventListener("click", () => open(here - 1));
byId("next").addEventListener("click", () => open(here + 1));
dialog.addEventListener("keydown", (event) => {
  if (event.key === "ArrowLeft") open(here - 1);
  else if (event.key === "ArrowRight") open(here + 1);
});
dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
addEventListener("keydown", (event) => {
  if (event.key === "/" && search && !dialog.open && !/^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement.tagName)) {
    event.preventDefault();
    search.focus();
    search.scrollIntoView({block: "center"});
  }
});
order("place", false);

// ----------------------------------------------------------------------------------- near misses
const near = byId("near-rows");
const missed = data.near.filter(([index]) => data.why[index]).map(([index, score, tokens, turns]) =>
  card({index, score, tokens, turns, left: 0}, false));
byId("near-cards").append(...missed);
missed.forEach(offer);
if (data.near.length) {
  const below = data.spread && data.cut !== null, texts = data.near.some(([, , , turns]) => turns.length), top = near.createTHead().insertRow(), body = near.createTBody();
  const names = [["n", "score"], ...(below ? [["n sparse", "below the cut"]] : []), ["n sparse", "tokens"], ["n", "row"], ...(texts ? [["", "text"]] : [])];
  for (const [kind, name] of names) { const cell = make("th", kind, name); cell.scope = "col"; top.append(cell); }
  for (const [index, score, tokens, turns] of data.near) {
    const row = body.insertRow(), add = (value, kind) => row.append(make("td", kind ?? "n", value));
    add(number(score));
    if (below) add(`${((data.cut - score) / data.spread).toFixed(3)} sd`, "n sparse");
    add(count(tokens), "n sparse");
    add(count(index));
    if (texts) { const said = make("p", "", opening(turns)), cell = make("td"); said.dir = "auto"; cell.append(said); row.append(cell); }
  }
}

// --------------------------------------------------------------------- features of the targets
const features = byId("feature-list");
if (features) for (const [target, found] of Object.entries(data.features)) {
  if (Object.keys(data.features).length > 1) features.append(make("h3", "", target));
  const list = make("ol", "features"), most = Math.max(...found.map((one) => one.share), 1e-9);
  for (const one of found) {
    const item = make("li"), head = make("div", "feature"), name = make("b", "", one.name), track = make("span", "track"), bar = make("i", "bar"), of = make("i", "bar pool");
    name.dir = "auto";
    bar.style.width = `${100 * one.share / most}%`;
    of.style.width = `${100 * one.usual / most}%`;
    track.append(bar, of);
    head.append(name, track, make("span", "", `${percent(one.share)} of the exemplars' activation, ${percent(one.usual)} of the pool's`));
    const more = [one.unit, one.made && `label ${one.made}`,
      one.rarity === null ? "" : one.rarity ? `active in ${percent(one.rarity)} of the pool's rows` : "active in no row of the pool"].filter(Boolean).join(" · ");
    item.append(head, make("small", "", more));
    for (const [row, pieces, levels] of one.snippets) {
      const said = make("p", "snippet");
      said.dir = "auto";
      said.append(...pieces.map((piece, i) => make("span", levels[i] && levels[i] !== "0" ? `h${levels[i]}` : "", piece)));
      const from = make("div", "from", `row ${count(row)}`);
      from.append(said);
      item.append(from);
    }
    list.append(item);
  }
  features.append(list);
}

// ----------------------------------------------------------------------------- a map of the pool
const plane = byId("plane");
if (plane) {
  const svg = plane.querySelector("svg"), ring = svg.querySelector(".ring"), told = byId("here");
  const scores = new Map(picks.map((pick) => [pick.index, pick]));
  let at = -1;
  const tell = (i) => {
    if (i === at || i < 0) return;
    at = i;
    const [x, y, of, kind, text] = data.map[i];
    ring.removeAttribute("display");
    ring.setAttribute("cx", x);
    ring.setAttribute("cy", y);
    const head = make("p", "left"), said = make("p", "", text || "The text of this row is not in the page."), pick = scores.get(of);
    head.append(make("b", "", ["a row of the pool", "a pick", "an exemplar"][kind]), kind === 2 ? ` of ${of}` : ` · row ${count(of)}`, pick ? ` · place ${count(pick.place + 1)} · score ${number(pick.score)}` : "");
    said.dir = "auto";
    told.replaceChildren(head, said);
  };
  const best = (far) => { let found = -1, least = Infinity; data.map.forEach((point, i) => { const value = far(point, i); if (value < least) { least = value; found = i; } }); return found; };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) * 1000 / box.width, y = (event.clientY - box.top) * 620 / box.height;
    const reach = 24 * 1000 / Math.min(1000, box.width);
    tell(best(([a, b, , kind]) => { const far = Math.hypot(a - x, b - y) - 2 * kind; return far < reach ? far : Infinity; }));
  });
  plane.addEventListener("keydown", (event) => {
    const step = {ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[event.key];
    if (!step) return;
    event.preventDefault();
    if (at < 0) { tell(Math.max(0, data.map.findIndex(([, , , kind]) => kind === 1))); return; }
    const [x, y] = data.map[at];
    tell(best(([a, b], i) => {
      const along = (a - x) * step[0] + (b - y) * step[1], across = Math.abs((a - x) * step[1]) + Math.abs((b - y) * step[0]);
      return i !== at && along > 0 && across <= along ? along + across : Infinity;
    }));
  });
}

// ------------------------------------------------------------- pictures of several targets, and copying
const pictures = [...document.querySelectorAll("#pictures figure")];
if (pictures.length > 1) {
  const tabs = make("div", "tabs");
  const show = (i) => {
    pictures.forEach((picture, j) => { picture.hidden = i !== j; });
    [...tabs.children].forEach((tab, j) => tab.setAttribute("aria-pressed", String(i === j)));
  };
  pictures.forEach((picture, i) => {
    const tab = make("button", "", picture.dataset.name);
    tab.type = "button";
    tab.addEventListener("click", () => show(i));
    tabs.append(tab);
  });
  pictures[0].before(tabs);
  show(0);
}
const copy = byId("copy"), command = byId("command");
const select = () => getSelection().selectAllChildren(command);
copy.addEventListener("click", async () => {
  let done = false;
  try { await navigator.clipboard.writeText(command.textContent); done = true; } catch {
    select();
    try { done = document.execCommand("copy"); } catch { done = false; }
  }
  copy.textContent = done ? "Copied" : "Press Ctrl+C";
  setTimeout(() => { copy.textContent = "Copy"; }, 2500);
});
})();
