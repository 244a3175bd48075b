"use strict";
const root = document.documentElement;
const dark = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : dark.matches);

// Sorting: numbers by data-sort, else words; cells with neither stay last in both directions.
const collator = new Intl.Collator("en", { numeric: true });
for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button"; button.className = "sort"; button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") ? head.getAttribute("aria-sort") === "descending" : !head.classList.contains("n");
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const rows = [...table.tBodies[0].rows].map((row) => {
        const cell = row.cells[column], number = parseFloat(cell.dataset.sort ?? cell.textContent);
        const empty = cell.classList.contains("none") || (head.classList.contains("n") && Number.isNaN(number));
        return { row, empty, number: cell.dataset.sort !== undefined || head.classList.contains("n") ? number : NaN, words: cell.textContent.trim() };
      });
      rows.sort((a, b) => a.empty - b.empty || (up ? 1 : -1) * (Number.isNaN(a.number) || Number.isNaN(b.number) ? collator.compare(a.words, b.words) : a.number - b.number));
      table.tBodies[0].append(...rows.map((one) => one.row));
    });
  });
}

// Figures: click to enlarge.
const viewer = document.getElementById("viewer");
for (const button of document.querySelectorAll(".enlarge")) {
  button.addEventListener("click", () => {
    const picture = button.querySelector("img");
    viewer.querySelector("img").src = picture.src;
    viewer.querySelector("img").alt = viewer.querySelector("p").textContent = picture.alt;
    viewer.showModal();
  });
}
viewer.addEventListener("click", (event) => { if (event.target === viewer || event.target.id === "close") viewer.close(); });

// Commands: copy.
for (const button of document.querySelectorAll(".copy")) {
  button.addEventListener("click", async () => {
    const code = button.previousElementSibling;
    try { await navigator.clipboard.writeText(code.textContent); button.textContent = "copied"; }
    catch { getSelection().selectAllChildren(code); }
    setTimeout(() => { button.textContent = "copy"; }, 1500);
  });
}

// Open the details that a link points into.
const unfold = () => {
  const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  for (let node = target; node; node = node.parentElement) if (node.tagName === "DETAILS") node.open = true;
};
addEventListener("hashchange", unfold); unfold();

// Plots: unpack the library, then draw all of them.
const plots = [...document.querySelectorAll(".plot")];
const colour = (name) => getComputedStyle(root).getPropertyValue(name).trim();
const draw = (plot) => {
  const { data, layout } = JSON.parse(document.getElementById(plot.dataset.spec).textContent);
  const narrow = plot.clientWidth < 600, ink = colour("--ink"), soft = colour("--soft"), line = colour("--line");
  for (const trace of data) {
    if (trace.meta === "ink") trace.line.color = soft;
  }
  const axis = { gridcolor: line, linecolor: colour("--strong"), zerolinecolor: line, tickfont: { color: soft }, automargin: true, fixedrange: narrow };
  const full = { ...layout, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, size: narrow ? 11 : 13, color: ink },
    margin: { l: 56, r: 20, t: 12, b: narrow ? 110 : 52 }, hoverlabel: { bgcolor: colour("--raised"), bordercolor: colour("--strong"), font: { color: ink }, align: "left" },
    legend: { ...layout.legend, ...(narrow ? { orientation: "h", y: -0.22, x: 0 } : { x: 1.02, y: 1 }) } };
  for (const name of ["xaxis", "yaxis", "yaxis2"]) {
    if (layout[name]) full[name] = { ...axis, ...layout[name], title: { ...layout[name].title, standoff: 10, font: { color: soft, size: narrow ? 11 : 13 } } };
  }
  return Plotly.react(plot, data, full, { responsive: true, displaylogo: false, displayModeBar: narrow ? false : "hover", modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] });
};
for (const button of document.querySelectorAll("[data-plot]")) {
  button.addEventListener("click", () => {
    for (const other of button.parentElement.children) other.setAttribute("aria-pressed", String(other === button));
    const plot = button.closest(".plot-box").querySelector(".plot");
    plot.dataset.spec = button.dataset.plot;
    if (window.Plotly) draw(plot);
  });
}
const load = async () => {
  const packed = document.getElementById("plotly");
  if (!packed || !plots.length) return;
  const bytes = Uint8Array.from(atob(packed.textContent), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
  for (const plot of plots) await draw(plot);
  root.dataset.plots = "ready";
};
load().catch((error) => {
  for (const plot of plots) plot.textContent = "This browser cannot draw the plot; its data is in the CSV below.";
  console.error(error);
});
const redraw = () => { if (window.Plotly) plots.forEach(draw); };
document.getElementById("theme").addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  try { localStorage.setItem("theme", root.dataset.theme); } catch { /* not available in private windows */ }
  redraw();
});
dark.addEventListener("change", redraw);
