// recolours the tokens for the chosen router; without scripts the page shows the clearest one
(() => {
  const { views, colours, tints } = JSON.parse(document.getElementById("routing").textContent);
  const select = document.getElementById("router");
  const slider = document.getElementById("layer");
  const texts = [...document.querySelectorAll(".tokens")].map((text) => [...text.children]);

  const paint = (span, weights) => {
    const total = weights.reduce((sum, weight) => sum + weight, 0) || 1;
    const best = weights.indexOf(Math.max(...weights));
    let end = 0;
    const stops = weights.flatMap((weight, expert) => {
      if (weight === 0) return [];
      const start = end;
      end += (100 * weight) / total;
      return [`${colours[expert]} ${start.toFixed(1)}% ${end.toFixed(1)}%`];
    });
    span.style.background =
      `linear-gradient(90deg, ${stops.join(", ")}) 0 100% / 100% 5px no-repeat, ${tints[best]}`;
    span.title = weights
      .map((weight, expert) => ({ weight, expert }))
      .filter(({ weight }) => weight > 0)
      .map(({ weight, expert }) => `expert ${expert}: ${weight} %`)
      .join("\n");
  };

  const show = (router) => {
    select.value = slider.value = String(router);
    texts.forEach((spans, text) =>
      spans.forEach((span, token) => paint(span, views[text][router][token])));
  };

  select.addEventListener("change", () => show(Number(select.value)));
  slider.addEventListener("input", () => show(Number(slider.value)));
  document.querySelector(".picker").hidden = false;
  show(Number(select.value));
})();
