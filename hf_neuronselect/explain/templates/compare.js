(() => {
"use strict";
// ------------------------------------------------------------------- tables are sorted by their heads
const value = (row, i) => {
  const text = row.cells[i].textContent.trim(), number = parseFloat(text.replaceAll(",", ""));
  return {text, number: row.cells[i].classList.contains("n") && !Number.isNaN(number) ? number : null};
};
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells], first = [...body.rows];
  if (first.length < 2) continue;
  heads.forEach((head, i) => {
    const press = document.createElement("button");
    press.type = "button";
    press.textContent = head.textContent;
    head.replaceChildren(press);
    press.addEventListener("click", () => {
      const was = head.getAttribute("aria-sort"), numbers = head.classList.contains("n");
      const up = was ? was === "descending" : !numbers; // numbers fall at first, words rise
      const turn = up ? 1 : -1, found = first.map((row) => [row, value(row, i)]);
      found.sort(([, a], [, b]) => {
        if (a.text === "" || b.text === "") return (a.text === "") - (b.text === ""); // what is not known stays below
        const order = a.number !== null && b.number !== null ? a.number - b.number : a.text.localeCompare(b.text, "en");
        return order * turn;
      });
      body.append(...found.map(([row]) => row));
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
    });
  });
}

// ------------------------------------------------------------- pictures that share a place, and copying
for (const box of document.querySelectorAll(".pictures")) {
  const pictures = [...box.children].filter((one) => one.dataset.name);
  if (pictures.length < 2) continue;
  const tabs = document.createElement("div");
  tabs.className = "tabs";
  const show = (i) => {
    pictures.forEach((picture, j) => { picture.hidden = i !== j; });
    [...tabs.children].forEach((tab, j) => tab.setAttribute("aria-pressed", String(i === j)));
  };
  pictures.forEach((picture, i) => {
    const tab = document.createElement("button");
    tab.type = "button";
    tab.textContent = picture.dataset.name;
    tab.addEventListener("click", () => show(i));
    tabs.append(tab);
  });
  pictures[0].before(tabs);
  show(0);
}
const copy = document.getElementById("copy"), command = document.getElementById("command");
if (copy) copy.addEventListener("click", async () => {
  let done = false;
  try { await navigator.clipboard.writeText(command.textContent); done = true; } catch {
    getSelection().selectAllChildren(command);
    try { done = document.execCommand("copy"); } catch { done = false; }
  }
  copy.textContent = done ? "Copied" : "Press Ctrl+C";
  setTimeout(() => { copy.textContent = "Copy"; }, 2500);
});
})();
