// shows the chosen router; without scripts the page shows the first one picked
(() => {
  const { views, routers, experts, similar } = JSON.parse(document.getElementById("routing").textContent);
  const select = document.getElementById("router");
  const slider = document.getElementById("layer");
  const texts = [...document.querySelectorAll("[data-text]")];
  const colour = (expert) => `var(--e${expert % 8})`;
  let chosen = 0;
  let marked = null;

  const words = (weights) =>
    weights
      .map((weight, expert) => [weight, experts[expert]])
      .filter(([weight]) => weight > 0)
      .sort(([a], [b]) => b - a)
      .map(([weight, name]) => `${name} ${weight} %`)
      .join(", ") || "no expert";

  const paint = (span, weights) => {
    const total = weights.reduce((sum, weight) => sum + weight, 0) || 1;
    const best = weights.indexOf(Math.max(...weights));
    let end = 0;
    const stops = weights.flatMap((weight, expert) => {
      if (weight === 0) return [];
      const start = end;
      end += (100 * weight) / total;
      return [`${colour(expert)} ${start.toFixed(1)}% ${end.toFixed(1)}%`];
    });
    if (stops.length === 0) stops.push("transparent 0% 100%");
    span.style.setProperty("--c", colour(best));
    span.style.setProperty("--strip", `linear-gradient(90deg, ${stops.join(", ")})`);
    span.title = words(weights);
    span.classList.toggle("again", best > 7);
    span.classList.toggle("dim", marked !== null && !(weights[marked] > 0));
  };

  const tone = (cell, value, size, text) => {
    cell.className = value === null ? "none" : size > 0.65 ? "hi" : size > 0.5 ? "mid" : "";
    cell.classList.toggle("minus", value !== null && value < 0);
    cell.style.setProperty("--v", size.toFixed(3));
    cell.textContent = text;
  };

  // maps that are compared share their scale
  const beside = { domains: "shuffled", shuffled: "domains" };

  const fill = (figure, rows, other) => {
    const signed = figure.dataset.map === similar;
    const all = [...rows, ...(other ?? [])].flat().filter((value) => value !== null);
    const top = signed ? 1 : Math.max(Number(figure.dataset.least), Math.ceil(10 * Math.max(0, ...all) - 1e-9) / 10);
    [...figure.querySelectorAll("tbody tr")].forEach((line, row) =>
      [...line.querySelectorAll("td")].forEach((cell, column) => {
        const value = rows[row][column];
        const size = value === null ? 0 : Math.min(1, Math.abs(value) / top);
        const text = value === null ? "–" : signed ? (Math.round(100 * value) / 100 + 0).toFixed(2) : (100 * value).toFixed(0);
        tone(cell, value, size, text);
      }));
    const end = figure.querySelector("[data-top]");
    if (end) end.textContent = `${Math.round(100 * top)} %`;
  };

  const stack = (chart, bins) => {
    const height = Number(chart.dataset.height);
    const top = Number(chart.dataset.top);
    const ends = bins.map(() => 0);
    chart.querySelectorAll("rect[data-expert]").forEach((bar) => {
      const bin = Number(bar.dataset.bin);
      const share = bins[bin] === null ? 0 : bins[bin][Number(bar.dataset.expert)] ?? 0;
      bar.setAttribute("y", (top + height * (1 - ends[bin] - share)).toFixed(2));
      bar.setAttribute("height", (height * share).toFixed(2));
      ends[bin] += share;
    });
  };

  const tell = (text, token) => {
    const spans = [...text.children];
    spans.forEach((span, index) => span.classList.toggle("here", index === token));
    text.dataset.at = String(token);
    const line = text.parentElement.querySelector(".told");
    const weights = views[Number(text.dataset.text)][chosen][token];
    if (line && weights) line.textContent = `token ${token}: ${words(weights)}`;
  };

  const show = (router) => {
    chosen = router;
    select.value = slider.value = String(router);
    slider.setAttribute("aria-valuetext", select.selectedOptions[0].textContent);
    const reads = routers ? routers[router].reads : null;
    texts.forEach((text) => {
      text.hidden = reads !== null && text.dataset.reads !== reads;
      if (text.hidden) return;
      const weights = views[Number(text.dataset.text)][router];
      [...text.children].forEach((span, token) => paint(span, weights[token]));
      if (text.dataset.at) tell(text, Number(text.dataset.at));
    });
    if (!routers) return;
    document.querySelectorAll("[data-map]").forEach((figure) => {
      const rows = routers[router][figure.dataset.map];
      if (rows) fill(figure, rows, routers[router][beside[figure.dataset.map]]);
    });
    document.querySelectorAll("[data-stack]").forEach((chart) =>
      stack(chart, routers[router][chart.dataset.stack]));
    document.querySelectorAll("[data-say]").forEach((place) => {
      place.textContent = routers[router][place.dataset.say];
    });
  };

  texts.forEach((text) => {
    text.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const at = text.dataset.at === undefined ? (step > 0 ? -1 : 0) : Number(text.dataset.at);
      tell(text, Math.min(text.children.length - 1, Math.max(0, at + step)));
    });
    text.addEventListener("pointerover", (event) => {
      const token = [...text.children].indexOf(event.target);
      if (token >= 0) tell(text, token);
    });
  });
  document.querySelectorAll("button[data-expert]").forEach((button, _, all) =>
    button.addEventListener("click", () => {
      const expert = Number(button.dataset.expert);
      marked = marked === expert ? null : expert;
      all.forEach((other) =>
        other.setAttribute("aria-pressed", String(Number(other.dataset.expert) === marked)));
      show(chosen);
    }));
  select.addEventListener("change", () => show(Number(select.value)));
  slider.addEventListener("input", () => show(Number(slider.value)));
  document.querySelector(".picker").hidden = select.options.length < 2;
  show(Number(select.value));
})();
