"use strict";
// sorts tables by their column heads, and leaves out rows in which runs agree; without it the page shows everything
document.documentElement.classList.add("scripted");

for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const rows = Array.from(body.rows);
  const heads = Array.from(table.tHead.rows[0].cells);
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    const numeric = head.classList.contains("n");
    button.addEventListener("click", () => {
      const order = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", order);
      const value = (row) => row.cells[column].dataset.v ?? row.cells[column].textContent.trim();
      const compare = (a, b) => {
        const [x, y] = [value(a), value(b)];
        if (x === "" || y === "") return (x === "") - (y === ""); // what is missing stands last, in both orders
        const way = order === "ascending" ? 1 : -1;
        return way * (numeric ? Number(x) - Number(y) : x.localeCompare(y, undefined, { numeric: true }));
      };
      body.append(...rows.slice().sort(compare));
    });
  });
}

for (const box of document.querySelectorAll(".choice input")) {
  const table = document.getElementById(box.dataset.table);
  box.addEventListener("change", () => table.classList.toggle("only", box.checked));
}

let closed = [];
addEventListener("beforeprint", () => {
  closed = Array.from(document.querySelectorAll("details:not([open])"));
  closed.forEach((part) => { part.open = true; });
});
addEventListener("afterprint", () => closed.forEach((part) => { part.open = false; }));
