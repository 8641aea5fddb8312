"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  document.documentElement.classList.add("js");

  // Filters: which runs are shown, in the tables, the charts and the rest of the page.
  const filters = document.getElementById("filters");
  const rows = all("#table tbody tr");
  const words = new Map(rows.map((row) => [row.dataset.run, row.textContent.toLowerCase()]));
  const choose = () => {
    const text = document.getElementById("filter-text").value.trim().toLowerCase();
    const chosen = all("select", filters);
    const kept = new Set();
    for (const row of rows) {
      const fits = words.get(row.dataset.run).includes(text) && chosen.every((select, place) => {
        const value = place ? row.getAttribute(`data-setting-${select.id.slice("filter-".length)}`) : row.dataset.verdict;
        return !select.value || select.value === value;
      });
      if (fits) kept.add(row.dataset.run);
    }
    for (const element of all("tr[data-run], li[data-run]")) element.hidden = !kept.has(element.dataset.run);
    for (const element of all("[data-runs]")) element.hidden = !element.dataset.runs.split(" ").some((run) => kept.has(run));
    for (const mark of all(".chart [data-run]")) mark.classList.toggle("off", !kept.has(mark.dataset.run));
    document.getElementById("count").textContent = kept.size === rows.length ? "" : `${kept.size} of ${rows.length} runs`;
  };
  if (filters) {
    filters.addEventListener("input", choose);
    filters.addEventListener("submit", (event) => event.preventDefault());
    choose(); // a browser may have kept what was typed
  }

  // What is wider than its place says so.
  const measured = new ResizeObserver((seen) => {
    for (const place of new Set(seen.map((one) => one.target.closest(".scroll"))))
      place.classList.toggle("wider", place.scrollWidth > place.clientWidth + 1);
  });
  for (const part of all(".scroll, .scroll > table")) measured.observe(part);

  // The table of runs is sorted by a click on a heading.
  const table = document.getElementById("table");
  const body = table.tBodies[0];
  const headings = all("thead th", table);
  const key = (row, column) => row.cells[column].dataset.sort ?? row.cells[column].textContent.trim();
  const compare = (one, other) => {
    if (one === "" || other === "") return (one === "") - (other === "");
    const [a, b] = [Number(one), Number(other)];
    return Number.isNaN(a) || Number.isNaN(b) ? one.localeCompare(other) : a - b;
  };
  if (rows.length > 1) headings.forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const up = heading.getAttribute("aria-sort") !== "ascending";
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", up ? "ascending" : "descending");
      const sorted = [...body.rows].sort((a, b) => (up ? 1 : -1) * compare(key(a, column), key(b, column)));
      body.append(...sorted);
    });
  });

  // Pointing at a mark of a chart, or at a row of the table, says what it is and makes the others faint.
  const pointer = document.getElementById("pointer");
  const light = (run) => {
    for (const mark of all(".chart [data-run]")) mark.classList.toggle("dim", run !== null && mark.dataset.run !== run);
  };
  document.addEventListener("pointerover", (event) => {
    const mark = event.target.closest(".chart [data-run], #table tbody tr");
    light(mark && rows.length > 1 ? mark.dataset.run : null);
    pointer.hidden = !mark?.dataset.tip;
    if (!pointer.hidden) pointer.textContent = mark.dataset.tip;
  });
  document.addEventListener("pointermove", (event) => {
    if (pointer.hidden) return;
    const { width, height } = pointer.getBoundingClientRect();
    pointer.style.left = `${Math.max(8, Math.min(event.clientX + 14, innerWidth - width - 8))}px`;
    pointer.style.top = `${event.clientY + 18 + height > innerHeight ? event.clientY - height - 10 : event.clientY + 18}px`;
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") pointer.hidden = true;
  });
})();
