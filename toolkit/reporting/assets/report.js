"use strict";
// Draws a report, or a comparison of runs, from the JSON in the page. Texts reach the page as text only.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const page = document.getElementById("page");

  // ---- small helpers -------------------------------------------------------------------------------------------

  function fill(node, attributes, children) {
    for (const [name, value] of Object.entries(attributes || {})) {
      if (typeof value === "function") node.addEventListener(name, value);
      else if (value !== undefined && value !== null && value !== false) node.setAttribute(name, value);
    }
    node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
    return node;
  }
  const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
  const svg = (tag, attributes, ...children) =>
    fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

  // A number as people read it: thousands apart, small ones with enough digits.
  function number(value, digits = 4) {
    if (value === null || value === undefined) return "n/a";
    if (Number.isInteger(value)) return value.toLocaleString("en");
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e7)) return value.toExponential(2);
    return Number(value.toPrecision(digits)).toLocaleString("en", { maximumFractionDigits: 6 });
  }
  const isRatio = (name) => name === "wer" || name === "cer";
  const scoreText = (name, value) =>
    value === null || value === undefined ? "n/a" : value.toFixed(isRatio(name) ? 4 : 2);
  const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;
  const words = (name) => name.replaceAll("_", " ");
  function duration(seconds) {
    const [hours, minutes] = [Math.floor(seconds / 3600), Math.floor(seconds / 60) % 60];
    if (hours) return `${hours} h ${minutes} min`;
    return minutes ? `${minutes} min ${Math.round(seconds % 60)} s` : `${Math.round(seconds)} s`;
  }

  // ---- charts --------------------------------------------------------------------------------------------------

  const [W, H] = [360, 210];
  const [LEFT, RIGHT, TOP, BOTTOM] = [46, 8, 10, 26];
  const colour = (index) => `s${index % 8}`;

  // Round numbers between two ends, about `count` of them.
  function ticks(low, high, count) {
    const rough = (high - low) / count || 1;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size >= rough * 0.999);
    const found = [];
    for (let tick = Math.ceil(low / step - 1e-9) * step; tick <= high + step * 1e-9; tick += step) found.push(tick);
    return found.map((tick) => Number(tick.toPrecision(12)));
  }

  function logTicks(low, high) {
    const within = (factors) => {
      const found = [];
      for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power += 1)
        for (const factor of factors) found.push(Number((factor * 10 ** power).toPrecision(3)));
      return found.filter((tick) => tick >= low * 0.999 && tick <= high * 1.001);
    };
    const choices = [[1], [1, 3], [1, 2, 5]].map(within);
    return choices.find((found) => found.length > 2) || [low, high];
  }

  const short = (value) =>
    Math.abs(value) >= 1000 ? `${Number((value / 1000).toPrecision(3))}k` : value && Math.abs(value) < 1e-3 ? value.toExponential(0) : String(Number(value.toPrecision(3)));

  function legend(series) {
    return el("div", { class: "legend" }, series.map(({ name }, index) => el("span", {}, el("i", { class: colour(index) }), name)));
  }

  function frame(title, hint) {
    return el("figure", { class: "card chart" }, el("figcaption", {}, el("h3", {}, title), hint && el("span", { class: "small" }, hint)));
  }

  // Curves over steps. series: {name, x, y, low, high}; options: title, hint, format, log, axis.
  function lineChart(series, { title, hint, format = number, tick = short, log = false, axis = "step" }) {
    const shown = series.filter((one) => one.y.length);
    if (!shown.length) return null;
    const readout = el("div", { class: "readout", "aria-hidden": "true" });
    const figure = frame(title, hint);
    const host = el("div");
    const positive = shown.every((one) => (one.low || one.y).every((value) => value > 0));
    let logarithmic = log && positive;
    if (log && positive) {
      const toggle = el("button", { type: "button", "aria-pressed": "true", click: () => {
        logarithmic = !logarithmic;
        toggle.setAttribute("aria-pressed", logarithmic);
        draw();
      } }, "log");
      figure.firstChild.append(toggle);
    }
    const said = shown.map((one) => `${one.name}: from ${format(one.y[0])} to ${format(one.y.at(-1))}`).join("; ");

    function draw() {
      const xs = shown.flatMap((one) => one.x);
      // A spike of one step must not flatten the curve: bands may leave the picture, means never do.
      const ys = shown.flatMap((one) => one.y);
      let [x0, x1] = [Math.min(...xs), Math.max(...xs)];
      if (x0 === x1) [x0, x1] = [x0 - 1, x1 + 1];
      let [y0, y1] = [Math.min(...ys), Math.max(...ys)];
      if (!logarithmic && y0 >= 0 && y0 < 0.6 * y1) y0 = 0;
      if (y0 === y1) [y0, y1] = logarithmic ? [y0 / 2, y1 * 2] : [y0 - (Math.abs(y0) || 1) / 2, y1 + (Math.abs(y1) || 1) / 2];
      else if (!logarithmic) y1 += (y1 - y0) * 0.04;
      const level = (y) => {
        const share = logarithmic ? Math.log(Math.max(y, 1e-300) / y0) / Math.log(y1 / y0) : (y - y0) / (y1 - y0);
        return TOP + (1 - Math.min(Math.max(share, 0), 1)) * (H - TOP - BOTTOM);
      };
      const place = (x) => LEFT + ((x - x0) / (x1 - x0)) * (W - LEFT - RIGHT);
      const path = (x, y) => x.map((value, index) => `${place(value).toFixed(1)},${level(y[index]).toFixed(1)}`);
      const picture = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `${title}. ${said}` });
      for (const value of logarithmic ? logTicks(y0, y1) : ticks(y0, y1, 4)) {
        const y = level(value);
        picture.append(svg("line", { class: "axis", x1: LEFT, x2: W - RIGHT, y1: y, y2: y }));
        picture.append(svg("text", { x: LEFT - 6, y: y + 4, "text-anchor": "end" }, tick(value)));
      }
      for (const value of ticks(x0, x1, 4))
        picture.append(svg("text", { x: place(value), y: H - 8, "text-anchor": place(value) > W - 30 ? "end" : "middle" }, short(value)));
      shown.forEach((one, index) => {
        const group = svg("g", { class: colour(index) });
        if (one.low) {
          const outline = [...path(one.x, one.high), ...path(one.x, one.low).reverse()];
          group.append(svg("path", { class: "band", d: `M${outline.join("L")}Z` }));
        }
        group.append(svg("path", { class: "line", d: `M${path(one.x, one.y).join("L")}` }));
        if (one.x.length <= 30)
          one.x.forEach((x, at) => group.append(svg("circle", { cx: place(x), cy: level(one.y[at]), r: 2.6 })));
        picture.append(group);
      });
      const guide = svg("line", { class: "guide", y1: TOP, y2: H - BOTTOM, visibility: "hidden" });
      picture.append(guide);
      picture.addEventListener("pointermove", (event) => {
        const box = picture.getBoundingClientRect();
        const x = x0 + ((((event.clientX - box.left) / box.width) * W - LEFT) / (W - LEFT - RIGHT)) * (x1 - x0);
        const near = (one) => one.x.reduce((best, value, at) => (Math.abs(value - x) < Math.abs(one.x[best] - x) ? at : best), 0);
        const places = shown.map(near);
        const spot = shown[0].x[places[0]];
        guide.setAttribute("x1", place(spot));
        guide.setAttribute("x2", place(spot));
        guide.setAttribute("visibility", "visible");
        const values = shown.map((one, index) => `${shown.length > 1 ? `${one.name} ` : ""}${format(one.y[places[index]])}`);
        readout.textContent = `${axis} ${number(spot)}: ${values.join(", ")}`;
      });
      picture.addEventListener("pointerleave", () => {
        guide.setAttribute("visibility", "hidden");
        readout.textContent = "";
      });
      host.replaceChildren(picture);
    }
    draw();
    figure.append(host, readout);
    if (shown.length > 1) figure.append(legend(shown));
    return figure;
  }

  // One bar a group, its value above and its number of clips below.
  function barChart(groups, { title, hint }) {
    if (!groups.length) return null;
    const figure = frame(title, hint);
    const said = groups.map((group) => `${group.label} words: ${group.value}`).join("; ");
    const picture = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `${title}. ${said}`, class: "s0" });
    const base = H - BOTTOM - 12;
    const room = (W - LEFT - RIGHT) / groups.length;
    for (const tick of [0, 25, 50, 75, 100]) {
      const y = base - (tick / 100) * (base - TOP - 8);
      picture.append(svg("line", { class: "axis", x1: LEFT, x2: W - RIGHT, y1: y, y2: y }));
      picture.append(svg("text", { x: LEFT - 6, y: y + 4, "text-anchor": "end" }, String(tick)));
    }
    groups.forEach((group, index) => {
      const height = (group.value / 100) * (base - TOP - 8);
      const middle = LEFT + (index + 0.5) * room;
      const width = Math.min(room * 0.7, 44);
      picture.append(svg("rect", { class: "bar", x: middle - width / 2, y: base - height, width, height, rx: 2 }, svg("title", {}, `${group.label} words: ${group.value}, ${group.clips} clips`)));
      picture.append(svg("text", { x: middle, y: base - height - 4, "text-anchor": "middle" }, group.value.toFixed(groups.length > 6 ? 0 : 1)));
      picture.append(svg("text", { x: middle, y: base + 14, "text-anchor": "middle" }, group.label));
      picture.append(svg("text", { x: middle, y: base + 27, "text-anchor": "middle", opacity: 0.75 }, `n ${short(group.clips)}`));
    });
    figure.append(picture);
    return figure;
  }

  // The first set as bars, the others as outlines over them.
  function histogram({ edges, series }, { title, hint }) {
    const sets = Object.entries(series);
    if (!sets.length) return null;
    const figure = frame(title, hint);
    const top = Math.max(...sets.flatMap(([, shares]) => shares));
    const place = (x) => LEFT + ((x - edges[0]) / (edges.at(-1) - edges[0])) * (W - LEFT - RIGHT);
    const level = (share) => TOP + (1 - share / (top * 1.05)) * (H - TOP - BOTTOM);
    const picture = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `${title}: ${sets.map(([name]) => name).join(", ")}` });
    for (const tick of ticks(0, top, 3)) {
      const y = level(tick);
      picture.append(svg("line", { class: "axis", x1: LEFT, x2: W - RIGHT, y1: y, y2: y }));
      picture.append(svg("text", { x: LEFT - 6, y: y + 4, "text-anchor": "end" }, percent(tick)));
    }
    for (const tick of ticks(edges[0], edges.at(-1), 5))
      picture.append(svg("text", { x: place(tick), y: H - 8, "text-anchor": place(tick) > W - 20 ? "end" : "middle" }, short(tick)));
    sets.forEach(([name, shares], index) => {
      const group = svg("g", { class: colour(index) });
      if (index === 0) {
        shares.forEach((share, bin) => group.append(svg("rect", {
          class: sets.length > 1 ? "bar pale" : "bar", x: place(edges[bin]) + 0.5, y: level(share),
          width: Math.max(place(edges[bin + 1]) - place(edges[bin]) - 1, 0.5), height: level(0) - level(share),
        }, svg("title", {}, `${name}: ${percent(share)}`))));
      } else {
        const corners = shares.flatMap((share, bin) => [[edges[bin], share], [edges[bin + 1], share]]);
        const points = [[edges[0], 0], ...corners, [edges.at(-1), 0]].map(([x, share]) => `${place(x).toFixed(1)},${level(share).toFixed(1)}`);
        group.append(svg("path", { class: "line", d: `M${points.join("L")}` }));
      }
      picture.append(group);
    });
    figure.append(picture);
    if (sets.length > 1) figure.append(legend(sets.map(([name]) => ({ name }))));
    return figure;
  }

  // ---- parts of a page -----------------------------------------------------------------------------------------

  const links = el("div", { class: "links" });
  function section(id, title, ...children) {
    const content = children.flat().filter(Boolean);
    if (!content.length) return;
    links.append(el("a", { href: `#${id}` }, title));
    page.append(el("section", { id }, el("h2", {}, title), content));
  }
  const grid = (...children) => {
    const content = children.flat().filter(Boolean);
    return content.length ? el("div", { class: "grid" }, content) : null;
  };
  const cell = (tag, kind, ...children) => el(tag, { class: kind || null, scope: tag === "th" ? "col" : null }, ...children);

  function table(head, rows, kind = "") {
    return el("div", { class: "card scroll", tabindex: "0" }, el("table", { class: kind },
      el("thead", {}, el("tr", {}, head)), el("tbody", {}, rows.map((row) => el("tr", {}, row)))));
  }

  function keyValues(pairs) {
    return el("table", { class: "settings" }, el("tbody", {}, Object.entries(pairs).map(([key, value]) =>
      el("tr", {}, el("th", { scope: "row" }, key), el("td", {}, String(value))))));
  }

  function fold(title, ...children) {
    return el("details", {}, el("summary", {}, title), el("div", { class: "inside scroll" }, ...children));
  }

  function tile(label, value, note, kind = "") {
    return el("div", { class: `card tile ${kind}` }, el("div", { class: "small" }, label), el("div", { class: "value" }, value), note && el("div", { class: "small" }, note));
  }

  function themeButton() {
    const isDark = () => (document.documentElement.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
    return el("button", { type: "button", "aria-label": "switch between light and dark", click: () => {
      document.documentElement.dataset.theme = isDark() ? "light" : "dark";
      skeletons.redraw();
    } }, "◐");
  }

  function notices(warnings) {
    return warnings.length ? el("ul", { class: "notices", "aria-label": "warnings" }, warnings.map((text) => el("li", {}, text))) : null;
  }

  function tilesOf(run) {
    const tiles = [];
    const main = run.scores[0];
    if (main) {
      const [[, scores], ...floors] = main.rows;
      const order = [run.select_by, "bleu4", "chrf", "wer", "cer"].filter((name) => name in scores);
      for (const name of new Set(order)) {
        if (scores[name] === null && name !== run.select_by) continue;
        const values = floors.map(([, floor]) => floor[name]).filter((value) => typeof value === "number");
        const lower = run.lower_is_better.includes(name);
        const floor = values.length && (lower ? Math.min(...values) : Math.max(...values));
        tiles.push(tile(`${run.headings[name]}, ${main.name}`, scoreText(name, scores[name]),
          values.length ? `best floor ${scoreText(name, floor)}` : null, name === run.select_by ? "main" : ""));
      }
    }
    for (const [name, value] of Object.entries(run.facts)) {
      const text = name === "training seconds" ? duration(value) : typeof value === "number" ? number(value) : String(value);
      tiles.push(tile(name === "training seconds" ? "training time" : name, text, null, typeof value === "string" ? "words" : ""));
    }
    return el("div", { class: "tiles" }, tiles);
  }

  // Where the score would lie on other clips of the same kind.
  const intervalOf = (name, split) => split.intervals[name] &&
    el("div", { class: "interval", title: "95 % interval, bootstrap over clips" }, split.intervals[name].map((value) => scoreText(name, value)).join(" – "));

  function scoresTable(split, run) {
    const rows = Object.entries(run.headings).filter(([name]) => split.rows.some(([, scores]) => name in scores)).map(([name, heading]) => {
      const arrow = run.lower_is_better.includes(name) ? "↓" : "↑";
      return [el("th", { scope: "row" }, `${heading} `, el("span", { class: "small" }, arrow)), ...split.rows.map(([label, scores], index) => {
        const value = scores[name];
        const share = typeof value === "number" ? Math.max(0, Math.min(isRatio(name) ? value : value / 100, 1)) : null;
        const inner = el("i");
        if (share !== null) inner.style.width = `${100 * share}%`;
        return cell("td", `number ${index ? "" : "strong"}`, scoreText(name, value), !index && intervalOf(name, split),
          share !== null && el("div", { class: "bar", "aria-hidden": "true" }, inner));
      })];
    });
    const head = [cell("th", "", ""), ...split.rows.map(([label]) => cell("th", "number", label))];
    const clips = typeof split.clips === "number" ? `${number(split.clips)} clips` : null;
    return el("div", {}, el("p", {}, el("strong", {}, split.name), " ", el("span", { class: "small" }, clips || "")), table(head, rows, "scores"));
  }

  // Signers, languages and lengths of sentences, one row each.
  function groupsTable(group, split, run) {
    const names = Object.keys(run.headings).filter((name) => group.rows.some(([, , scores]) => typeof scores[name] === "number"));
    return fold(`${split.name}, by ${group.by}`, table([cell("th", "", group.by), cell("th", "number", "clips"), ...names.map((name) => cell("th", "number", run.headings[name]))],
      group.rows.map(([label, clips, scores]) => [el("th", { scope: "row", dir: "auto" }, label), cell("td", "number", number(clips)),
        ...names.map((name) => cell("td", "number", scoreText(name, scores[name])))]), "scores groups"));
  }

  // ---- what a hypothesis got wrong -----------------------------------------------------------------------------

  const MOST_TOKENS = 400;
  const tokens = (text) => (text.trim().split(/\s+/).length > 5 ? text.match(/\s+|\S+/g) || [] : [...text]);

  // Marks of both texts, from their longest common subsequence of words (of characters in short texts).
  function compare(reference, hypothesis) {
    const byWord = tokens(reference).length < [...reference].length;
    const [a, b] = [tokens(reference), byWord ? hypothesis.match(/\s+|\S+/g) || [] : [...hypothesis]];
    if (a.length > MOST_TOKENS || b.length > MOST_TOKENS) return [[reference], [hypothesis]];
    const common = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
    for (let i = a.length - 1; i >= 0; i -= 1)
      for (let j = b.length - 1; j >= 0; j -= 1)
        common[i][j] = a[i] === b[j] ? common[i + 1][j + 1] + 1 : Math.max(common[i + 1][j], common[i][j + 1]);
    const [left, right] = [[], []];
    const add = (out, text, kind) => (out.length && out.at(-1).kind === kind ? (out.at(-1).text += text) : out.push({ text, kind }));
    let [i, j] = [0, 0];
    while (i < a.length || j < b.length) {
      if (i < a.length && j < b.length && a[i] === b[j]) {
        add(left, a[i], "");
        add(right, b[j], "");
        i += 1;
        j += 1;
      } else if (j >= b.length || (i < a.length && common[i + 1][j] >= common[i][j + 1])) add(left, a[i++], "missed");
      else add(right, b[j++], "wrong");
    }
    const nodes = (parts) => parts.map(({ text, kind }) => (kind ? el("mark", { class: kind }, text) : text));
    return [nodes(left), nodes(right)];
  }

  function sampleCard(sample, players) {
    const [reference, hypothesis] = compare(sample.reference, sample.hypothesis);
    const card = el("article", { class: "card sample" });
    if (sample.clip !== undefined) {
      const player = skeletons.player(data.clips[sample.clip], data.skeleton, sample.uid);
      players.push(player);
      card.append(player.root);
    }
    const none = el("span", { class: "empty" }, "nothing");
    card.append(
      el("dl", {}, el("div", {}, el("dt", {}, "reference"), el("dd", { dir: "auto" }, sample.reference ? reference : none.cloneNode(true))),
        el("div", {}, el("dt", {}, "hypothesis"), el("dd", { dir: "auto" }, sample.hypothesis ? hypothesis : none))),
      el("div", { class: "meta" }, el("span", {}, sample.uid), el("span", {}, `chrF++ ${sample.chrf.toFixed(1)}`)));
    return card;
  }

  function samplesOf(splits) {
    const kinds = ["best", "worst", "random"];
    const usable = splits.filter((split) => kinds.some((kind) => split.samples[kind].length));
    if (!usable.length) return null;
    const host = el("div", {});
    let [split, kind, players] = [usable[0], "", []];
    const buttons = {};
    function show(nextSplit, nextKind) {
      [split, kind] = [nextSplit, nextKind];
      skeletons.forget(players);
      players = [];
      for (const name of kinds) buttons[name].setAttribute("aria-pressed", name === kind);
      host.replaceChildren(grid(split.samples[kind].map((sample) => sampleCard(sample, players))) || el("p", { class: "empty" }, "none"));
    }
    // Paper shows all that buttons hide.
    function showAll() {
      skeletons.forget(players);
      players = [];
      host.replaceChildren(...usable.flatMap((one) => kinds.filter((name) => one.samples[name].length).flatMap((name) =>
        [el("h3", {}, `${one.name}: ${name}`), grid(one.samples[name].map((sample) => sampleCard(sample, players)))])));
    }
    const bar = el("div", { class: "toolbar", role: "group", "aria-label": "which samples" });
    for (const name of kinds) bar.append(buttons[name] = el("button", { type: "button", click: () => show(split, name) }, name));
    if (usable.length > 1) {
      bar.append(el("select", { "aria-label": "split", change: (event) => show(usable[event.target.selectedIndex], kind) },
        usable.map((one) => el("option", {}, one.name))));
    }
    if (data.clips.length) {
      let moving = true;
      bar.append(el("button", { type: "button", class: "push", click: (event) => {
        moving = !moving;
        skeletons.playAll(moving);
        event.target.textContent = moving ? "pause all" : "play all";
      } }, "pause all"));
    }
    // What a model gets wrong teaches most.
    show(split, ["worst", ...kinds].find((name) => split.samples[name].length));
    addEventListener("beforeprint", showAll);
    addEventListener("afterprint", () => show(split, kind));
    return [bar, host];
  }

  // ---- the two pages -------------------------------------------------------------------------------------------

  // Of each figure of the loop: heading, unit and whether a logarithmic scale serves it.
  const FIGURES = {
    loss: { title: "Training loss", hint: "nats per token", log: true },
    ctc_loss: { title: "CTC loss", hint: "nats per token", log: true },
    learning_rate: { title: "Learning rate", format: (value) => value.toExponential(2) },
    grad_norm: { title: "Gradient norm", hint: "before clipping", log: true },
    clips_per_second: { title: "Throughput", hint: "clips per second" },
    frames_per_second: { title: "Throughput", hint: "frames per second" },
    padding_share: { title: "Padding", hint: "share of all frames", format: percent, tick: percent },
  };
  const HIDDEN = new Set(["epoch"]);

  function trainCharts(runs, axis) {
    const names = new Set(runs.flatMap((run) => Object.keys(run.train)));
    const ordered = [...Object.keys(FIGURES).filter((name) => names.has(name)), ...[...names].filter((name) => !(name in FIGURES)).sort()];
    return ordered.filter((name) => !HIDDEN.has(name)).map((name) =>
      lineChart(curvesOf(runs, "train", name, axis), { title: words(name), axis, ...FIGURES[name] }));
  }

  function curvesOf(runs, kind, name, axis) {
    return runs.filter((run) => name in run[kind]).map((run) => {
      const scale = axis === "epoch" ? run.epochs_per_step : 1;
      const curve = run[kind][name];
      return { name: run.name, ...curve, x: curve.x.map((step) => step * scale) };
    });
  }

  // "dev_bleu4" -> ["dev", "bleu4"]; anything that ends with no score stands for itself.
  function scoreName(figure, headings) {
    const score = Object.keys(headings).find((name) => figure.endsWith(`_${name}`));
    return score ? [figure.slice(0, -score.length - 1), score] : [figure, null];
  }

  function evaluationCharts(run) {
    const grouped = new Map();
    for (const [name, curve] of Object.entries(run.evaluations)) {
      const [split, score] = scoreName(name, run.headings);
      const key = score ? `${split}: ${isRatio(score) ? "error rates" : "scores"}` : words(name);
      if (!grouped.has(key)) grouped.set(key, []);
      grouped.get(key).push({ name: score ? run.headings[score] : words(name), rank: Object.keys(run.headings).indexOf(score), ...curve });
    }
    return [...grouped].map(([title, series]) => lineChart(series.sort((one, other) => one.rank - other.rank), {
      title, hint: title.endsWith("error rates") ? "ratio, lower is better" : title.endsWith("scores") ? "0 to 100, higher is better" : "",
    }));
  }

  function head(title, status, ...lines) {
    page.append(el("nav", { "aria-label": "sections" }, links, themeButton()));
    page.append(el("header", {}, el("h1", {}, title, status && el("span", { class: `badge ${status}` }, status)), lines));
  }

  // The most of each phase on the fullest rank, beside the plan; columns without a figure are left out.
  function memoryTable(rows) {
    const shown = ["measured", "planned", "difference", "reserved", "process"].filter((name) => rows.some((row) => row[name] !== null));
    const value = (name, size) => (size === null ? "n/a" : name === "difference" ? `${size > 0 ? "+" : ""}${(100 * size).toFixed(0)} %` : size.toFixed(2));
    return [el("p", { class: "small" }, "GiB at most, of the fullest rank."), table(
      [cell("th", "", "phase"), ...shown.map((name) => cell("th", "number", name))],
      rows.map((row) => [el("th", { scope: "row" }, row.phase), ...shown.map((name) => cell("td", "number", value(name, row[name])))]))];
  }

  function drawRun(run) {
    const what = [run.recipe && `recipe ${run.recipe}`, run.description, run.time && `ended ${run.time.slice(0, 16).replace("T", " ")}`];
    if (run.status === "running") what[2] = run.time && `started ${run.time.slice(0, 16).replace("T", " ")}`;
    head(run.name, run.status, el("p", { class: "soft" }, what.filter(Boolean).join(" · ")), tilesOf(run), notices(run.warnings));
    section("scores", "Scores", run.scores.length > 0 && el("div", { class: "grid roomy" }, run.scores.map((split) => scoresTable(split, run))),
      run.scores.flatMap((split) => split.groups.map((group) => groupsTable(group, split, run))),
      run.scores.length > 0 && Object.keys(run.signature).length > 0 && fold("Signature: how the scores were computed", keyValues(run.signature)));
    section("curves", "Curves", grid(evaluationCharts(run), trainCharts([run], "step")));
    section("samples", "Samples", samplesOf(run.splits));
    section("lengths", "Lengths", grid(
      run.splits.map((split) => barChart(split.by_length, { title: `${split.name}: chrF++ by length`, hint: "mean per sentence; words of the reference" })),
      run.splits.map((split) => histogram(split.words, { title: `${split.name}: words`, hint: "share of sentences" })),
      run.corpus && histogram(run.corpus.seconds, { title: "Corpus: seconds per clip", hint: "share of clips" }),
      run.corpus && histogram(run.corpus.words, { title: "Corpus: words per sentence", hint: "share of clips" })));
    if (run.history) {
      const headRow = [cell("th", "", "reference"), ...run.history.steps.map((step) => cell("th", "", `step ${number(step)}`))];
      section("progress", "Progress", el("p", { class: "small" }, "The same clips after each evaluation."), table(headRow, run.history.rows.map((row) =>
        [el("th", { scope: "row", dir: "auto" }, row.reference), ...row.outputs.map((text) => el("td", { dir: "auto" }, text === null ? "" : compare(row.reference, text)[1]))]), "settings wide"));
    }
    section("memory", "Memory", run.memory.length > 0 && memoryTable(run.memory));
    section("settings", "Settings",
      Object.entries(run.texts).filter(([name]) => name === "recipe.yaml" || name === "deepspeed.json").map(([name, text]) => fold(name, el("pre", { tabindex: "0" }, text))),
      Object.keys(run.environment).length > 0 && fold("environment", keyValues(run.environment)),
      run.corpus && fold("corpus", keyValues(run.corpus.facts)),
      run.events.length > 0 && fold(`events (${run.events.length})`, el("table", { class: "settings" }, el("tbody", {}, run.events.map(({ step, what: event }) =>
        el("tr", {}, el("th", { scope: "row" }, `step ${number(step)}`), el("td", {}, Object.entries(event).map(([key, value]) => `${key} ${value}`).join(", "))))))));
    page.append(el("footer", {}, `${run.folder} · written ${run.written} by toolkit ${run.toolkit}`));
  }

  // What guessing scores on the same clips.
  const floorRows = (split, columns) => split.rows.slice(1).map(([label, scores]) =>
    [el("th", { scope: "row", class: "soft" }, label), ...columns.map((score) => cell("td", "number soft", scoreText(score, scores[score]))), el("td")]);

  function comparedScores(runs) {
    const names = [...new Set(runs.flatMap((run) => run.scores.map((split) => split.name)))];
    return names.map((name) => {
      const rows = runs.map((run) => ({ run, split: run.scores.find((split) => split.name === name) })).filter(({ split }) => split);
      const { headings, lower_is_better: lower } = runs[0];
      const columns = Object.keys(headings).filter((score) => rows.some(({ split }) => typeof split.rows[0][1][score] === "number"));
      const best = Object.fromEntries(columns.map((score) => {
        const values = rows.map(({ split }) => split.rows[0][1][score]).filter((value) => typeof value === "number");
        return [score, (lower.includes(score) ? Math.min : Math.max)(...values)];
      }));
      const headRow = [cell("th", "", ""), ...columns.map((score) => cell("th", "number", `${headings[score]} ${lower.includes(score) ? "↓" : "↑"}`)), cell("th", "number", "clips")];
      return el("div", {}, el("p", {}, el("strong", {}, name)), table(headRow, rows.map(({ run, split }) => [el("th", { scope: "row" }, run.name),
        ...columns.map((score) => cell("td", `number ${rows.length > 1 && split.rows[0][1][score] === best[score] ? "best" : ""}`, scoreText(score, split.rows[0][1][score]), intervalOf(score, split))),
        cell("td", "number", number(split.clips))]).concat(floorRows(rows[0].split, columns)), "scores"));
    });
  }

  function differing(rows, runs) {
    const headRow = [cell("th", "", ""), ...runs.map((run) => cell("th", "", run.name))];
    return rows.length ? table(headRow, rows.map(([key, ...values]) => [el("th", { scope: "row" }, key), ...values.map((value) => el("td", {}, value === null ? "–" : value))]), "settings wide") : null;
  }

  function drawComparison() {
    // Runs of different folders may share a name; a number distinguishes them.
    const runs = data.runs.map((run, index) => ({ ...run, name: data.runs.filter((other) => other.name === run.name).length > 1 ? `${run.name} (${index + 1})` : run.name }));
    head(`${runs.length} runs`, "", el("p", { class: "soft" }, runs.map((run) => run.name).join(" · ")));
    const facts = [...new Set(runs.flatMap((run) => Object.keys(run.facts)))];
    const headRow = [cell("th", "", ""), cell("th", "", "status"), ...facts.map((name) => cell("th", "number", name === "training seconds" ? "training time" : name))];
    section("runs", "Runs", table(headRow, runs.map((run) => [el("th", { scope: "row" }, run.name), el("td", {}, run.status),
      ...facts.map((name) => cell("td", "number", name in run.facts ? (name === "training seconds" ? duration(run.facts[name]) : typeof run.facts[name] === "number" ? number(run.facts[name]) : String(run.facts[name])) : "–"))]), "runs"));
    section("scores", "Scores", comparedScores(runs));
    const host = el("div");
    const toggle = el("button", { type: "button", click: () => draw(axis === "step" ? "epoch" : "step") });
    let axis = "step";
    function draw(next) {
      axis = next;
      toggle.textContent = axis === "step" ? "over epochs" : "over steps";
      const scores = [...new Set(runs.flatMap((run) => Object.keys(run.evaluations)))].map((name) => {
        const [split, score] = scoreName(name, runs[0].headings);
        return lineChart(curvesOf(runs, "evaluations", name, axis), { title: score ? `${split}: ${runs[0].headings[score]}` : words(name), axis });
      });
      host.replaceChildren(grid(scores, trainCharts(runs, axis)) || "");
    }
    draw(axis);
    const bothWays = runs.every((run) => run.epochs_per_step);
    section("curves", "Curves", host.childElementCount > 0 && [bothWays && el("div", { class: "toolbar" }, toggle), host]);
    section("settings", "What differs", differing(data.settings, runs) || el("p", { class: "soft" }, "No setting of recipe or DeepSpeed JSON differs."));
    section("surroundings", "Surroundings that differ", differing(data.surroundings, runs));
    section("warnings", "Warnings", runs.filter((run) => run.warnings.length).map((run) => el("div", {}, el("h3", {}, run.name), notices(run.warnings))));
    page.append(el("footer", {}, `written ${runs[0].written} by toolkit ${runs[0].toolkit}`));
  }

  data.kind === "comparison" ? drawComparison() : drawRun(data);

  // Paper is light, shows everything that is folded, and frames of a clip instead of motion.
  let before;
  addEventListener("beforeprint", () => {
    const folded = [...document.querySelectorAll("details:not([open])")];
    before = { folded, theme: document.documentElement.dataset.theme };
    document.documentElement.dataset.theme = "light";
    for (const one of folded) one.open = true;
    skeletons.redraw(true);
  });
  addEventListener("afterprint", () => {
    for (const one of before.folded) one.open = false;
    if (before.theme) document.documentElement.dataset.theme = before.theme;
    else delete document.documentElement.dataset.theme;
    skeletons.redraw(false);
  });
})();
