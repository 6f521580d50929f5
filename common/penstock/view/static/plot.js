// Curves by plotly.js, which the server has as a package. Loaded behind the first content of the page.

import { el } from "./dom.js";

let library;
const undrawn = new WeakMap();

function plotly() {
  library ??= new Promise((loaded, failed) => {
    const script = el("script", { src: "view/plotly.min.js" });
    script.addEventListener("load", () => loaded(window.Plotly));
    script.addEventListener("error", () =>
      failed(new Error("the package plotly is not installed where this page is served")),
    );
    document.head.append(script);
  });
  return library;
}

/** A colour of the style sheet as the library understands it: `rgba(...)`, in the present scheme. */
export function colour(name, alpha = 1) {
  const probe = el("span", { style: { color: `var(--${name})` } });
  document.body.append(probe);
  const [red, green, blue] = getComputedStyle(probe).color.match(/[\d.]+/g);
  probe.remove();
  return `rgba(${red},${green},${blue},${alpha})`;
}

/** The colours of runs, and of what is compared within one. */
export const series = (place, alpha = 1) => colour(`series-${place % 6}`, alpha);

/** A line with the band between its lowest and highest values, as traces. */
export function banded(name, curve, place, { low = curve.low, high = curve.high, dash = "solid", of = "y" } = {}) {
  const line = series(place);
  const band = { x: curve.x, mode: "lines", line: { width: 0 }, hoverinfo: "skip", showlegend: false, yaxis: of };
  const isNarrow = curve.y.every((value, index) => low[index] === value && high[index] === value);
  return [
    ...(isNarrow
      ? []
      : [
          { ...band, y: low },
          { ...band, y: high, fill: "tonexty", fillcolor: series(place, 0.16) },
        ]),
    {
      x: curve.x,
      y: curve.y,
      name,
      mode: curve.x.length < 2 ? "markers" : "lines",
      line: { color: line, width: 1.6, dash },
      yaxis: of,
      hovertemplate: `%{y:.4~g}<extra>${plain(name)}</extra>`,
    },
  ];
}

/** A name without what the library would read as markup. */
export const plain = (text) => text.replace(/[<>&]/g, " ");

/** Points with an interval each. */
export function points(name, x, y, low, high, place) {
  return {
    x,
    y,
    name: plain(name),
    mode: "markers+lines",
    line: { color: series(place), width: 1, dash: "dot" },
    marker: { color: series(place), size: 6, symbol: "diamond" },
    error_y: {
      type: "data",
      symmetric: false,
      thickness: 1,
      width: 2,
      color: series(place, 0.6),
      array: high.map((value, index) => value - y[index]),
      arrayminus: low.map((value, index) => y[index] - value),
    },
    hovertemplate: `%{y:.4~g}<extra>${plain(name)}</extra>`,
  };
}

/** A chart in a figure. said: what it shows, for who does not see it. onStep: called with the x that was clicked. */
export function chart(title, said, traces, { height = 150, layout = {}, last = "", onStep = null, wide = false } = {}) {
  const place = el("div", { class: "plot", style: { height: `${height}px` }, role: "img", "aria-label": said });
  const figure = el(
    "figure",
    { class: wide ? "wide" : null },
    el("figcaption", {}, el("span", {}, title), el("span", { class: "last" }, last)),
    place,
  );
  undrawn.set(place, () => draw(place, traces, layout, onStep));
  return figure;
}

/** Draw the charts of a content that is on the page now: one that is not has no size. */
export function drawIn(content) {
  for (const place of content.querySelectorAll(".plot")) {
    undrawn
      .get(place)?.()
      .catch((error) => place.replaceChildren(error.message));
    undrawn.delete(place);
  }
}

async function draw(place, traces, layout, onStep) {
  const library = await plotly();
  if (!place.isConnected) return; // the reader has gone on
  const line = colour("line"),
    text = colour("quiet");
  const axis = {
    gridcolor: line,
    zerolinecolor: line,
    linecolor: line,
    tickfont: { size: 10 },
    automargin: true,
    fixedrange: true,
  };
  await library.newPlot(
    place,
    traces,
    {
      margin: { l: 36, r: 8, t: 6, b: 24 },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: "system-ui, sans-serif", size: 11, color: text },
      showlegend: false,
      hovermode: "x unified",
      hoverlabel: { bgcolor: colour("raised"), bordercolor: line, font: { size: 11, color: colour("ink") } },
      ...layout,
      xaxis: { ...axis, ...layout.xaxis },
      yaxis: { ...axis, nticks: 5, rangemode: "nonnegative", ...layout.yaxis },
    },
    { displayModeBar: false, responsive: true, showTips: false },
  );
  if (onStep) place.on("plotly_click", (event) => onStep(event.points[0].x, event.points[0]));
}
