"use strict";
// Draws the curves. Everything it shows goes through Plotly's text fields, which are escaped here,
// or textContent; nothing is read but the JSON in the page.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  if (!data.charts.length || !window.Plotly) return;
  const section = document.getElementById("curves");
  const holder = document.getElementById("charts");
  section.hidden = false;

  // Okabe and Ito's colours, told apart also by the colour-blind; a task has one colour in all charts.
  const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1"];
  const tasks = [];
  for (const chart of data.charts)
    for (const s of chart.series) if (s.task && !tasks.includes(s.task)) tasks.push(s.task);
  const GREY = "#7f7f7f"; // of no task, beside some
  const colour = (s, i, chart) => {
    if (s.task) return COLOURS[tasks.indexOf(s.task) % COLOURS.length];
    return chart.series.some((other) => other.task) ? GREY : COLOURS[i % COLOURS.length];
  };

  const AXIS = { step: "steps", tokens: "tokens", seconds: "time" };
  const state = { axis: data.axis, log: false, smooth: 0 };
  const escape = (t) => String(t).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const clock = (s) => {
    const parts = [Math.floor(s / 3600), Math.floor(s / 60) % 60, Math.floor(s % 60)];
    const two = (n) => String(n).padStart(2, "0");
    return parts[0] ? `${parts[0]}:${two(parts[1])}:${two(parts[2])}` : `${parts[1]}:${two(parts[2])}`;
  };

  // The exponential average with its start corrected, so that it begins at the first value.
  function smoothed(values, share) {
    let sum = 0, weight = 0;
    return values.map((v) => {
      sum = share * sum + (1 - share) * v;
      weight = share * weight + (1 - share);
      return sum / weight;
    });
  }

  function points(metric) {
    const xs = [], ys = [], column = data.columns[metric], axis = data.axes[state.axis];
    column.forEach((y, i) => {
      if (y !== null && axis[i] !== null && axis[i] !== undefined) { xs.push(axis[i]); ys.push(y); }
    });
    return { xs, ys };
  }

  function traces(chart) {
    const out = [];
    chart.series.forEach((s, i) => {
      const { xs, ys } = points(s.metric), line = colour(s, i, chart);
      const few = xs.length <= 40, evaluation = s.metric.startsWith("eval/");
      const soft = state.smooth > 0 && !s.exact && ys.length > 3;
      const base = { x: xs, name: escape(s.label), type: "scatter", hovertemplate: "%{y:.5~g}" };
      if (soft) out.push({ ...base, y: ys, mode: "lines", opacity: 0.25, line: { color: line, width: 1 }, showlegend: false, hoverinfo: "skip", hovertemplate: null });
      out.push({
        ...base, y: soft ? smoothed(ys, state.smooth) : ys,
        mode: few ? "lines+markers" : "lines", line: { color: line, width: 2 }, marker: { size: 5 },
      });
      const baseline = evaluation && s.metric.endsWith("/loss") ? data.baselines[s.task] : undefined;
      if (baseline !== undefined && xs.length)
        out.push({
          x: [0, data.axes[state.axis].at(-1)], y: [baseline, baseline], mode: "lines", name: escape(`${s.label} baseline`),
          line: { color: line, width: 1.5, dash: "dot" }, showlegend: false, hovertemplate: "%{y:.5~g}",
        });
    });
    // One entry of the legend speaks for all baselines.
    if (out.some((t) => t.line.dash))
      out.push({ x: [null], y: [null], mode: "lines", name: "baseline", line: { color: css("--dim"), width: 1.5, dash: "dot" }, hoverinfo: "skip" });
    return out;
  }

  function layout(chart, drawn) {
    const ink = css("--ink"), dim = css("--dim"), grid = css("--line"), card = css("--card");
    const positive = drawn.every((t) => t.y.every((y) => y === null || y > 0));
    const axis = data.axes[state.axis], ticks = {};
    const last = axis.at(-1) || 0, shown = drawn.filter((t) => t.showlegend !== false);
    if (state.axis === "seconds") {
      // Plotly has no axis of durations: ticks at round times, written as a clock.
      const step = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800, 86400].find((s) => last / s <= 6) || last / 5;
      ticks.tickvals = Array.from({ length: Math.floor(last / step) + 1 }, (_, i) => i * step);
      ticks.ticktext = ticks.tickvals.map(clock);
    }
    const bounds = data.phases.map((p) => ({ name: p.name, x: axis[p.row] })).filter((p) => p.x);
    return {
      margin: { l: 52, r: 14, t: 28, b: 38 }, paper_bgcolor: card, plot_bgcolor: card,
      font: { color: ink, size: 12, family: getComputedStyle(document.body).fontFamily },
      hovermode: "x unified", hoverlabel: { bgcolor: card, bordercolor: grid, font: { color: ink } },
      showlegend: shown.length > 1,
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { size: 11 }, entrywidth: 8 + 6.5 * Math.max(...shown.map((t) => t.name.length)) },
      xaxis: {
        title: { text: AXIS[state.axis], font: { color: dim, size: 11 }, standoff: 6 }, gridcolor: grid, zeroline: false, range: [0, last * 1.02 || 1],
        hoverformat: state.axis === "step" ? ",d" : ".4~s", tickfont: { color: dim }, ...ticks,
      },
      yaxis: {
        type: state.log && positive ? "log" : "linear", gridcolor: grid, zerolinecolor: grid, tickfont: { color: dim },
        tickformat: chart.unit === "share" ? ".0%" : undefined, exponentformat: "SI", automargin: true, nticks: 7,
      },
      shapes: bounds.map((p) => ({ type: "line", x0: p.x, x1: p.x, yref: "paper", y0: 0, y1: 1, line: { color: dim, width: 1, dash: "dash" } })),
      annotations: bounds.map((p) => ({ x: p.x, xref: "x", yref: "paper", y: 0, xanchor: "left", yanchor: "bottom", text: escape(p.name), showarrow: false, font: { size: 11, color: dim } })),
    };
  }

  const plots = data.charts.map((chart) => {
    const box = document.createElement("div"), title = document.createElement("h3"), unit = document.createElement("span");
    const plot = document.createElement("div");
    box.className = "chart"; plot.className = "plot";
    title.textContent = chart.title; unit.textContent = chart.unit === "share" ? "" : chart.unit;
    title.append(unit); box.append(title, plot); holder.append(box);
    return { chart, plot };
  });
  const config = { responsive: true, displaylogo: false, displayModeBar: matchMedia("(hover: hover)").matches ? "hover" : false, modeBarButtons: [["toImage", "resetScale2d"]] };
  function draw() {
    for (const { chart, plot } of plots) {
      const drawn = traces(chart);
      Plotly.react(plot, drawn, layout(chart, drawn), config);
    }
  }

  const noisy = data.charts[0].series.some((s) => data.columns[s.metric].filter((y) => y !== null).length > 60);
  const slider = document.getElementById("smooth");
  state.smooth = noisy ? 0.8 : 0;
  slider.value = state.smooth;
  slider.addEventListener("input", () => { state.smooth = Number(slider.value); draw(); });
  document.getElementById("log").addEventListener("change", (e) => { state.log = e.target.checked; draw(); });
  for (const button of document.querySelectorAll("[data-axis]")) {
    button.setAttribute("aria-pressed", String(button.dataset.axis === state.axis));
    button.addEventListener("click", () => {
      state.axis = button.dataset.axis;
      for (const other of document.querySelectorAll("[data-axis]")) other.setAttribute("aria-pressed", String(other === button));
      draw();
    });
  }
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  draw();
})();
