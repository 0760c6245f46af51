"use strict";
(() => {
  const experts = JSON.parse(document.getElementById("experts").textContent);
  const form = document.getElementById("filter");
  const status = document.getElementById("matches");
  const layers = [...document.querySelectorAll("details.layer")];
  let found = null; // "layer/expert" of every match, null without a filter.

  function materialise(section) {
    const template = section.querySelector(":scope > template");
    if (template) template.replaceWith(template.content);
  }
  function show(section) {
    for (const item of section.querySelectorAll("[data-expert]")) {
      item.hidden = found !== null && !found.has(item.dataset.expert);
    }
  }
  function matches([layer, expert, state, domains, starved], words, wanted, domain) {
    if (wanted === "starved" ? !starved : wanted && state !== wanted) return false;
    if (domain && !domains.includes(domain)) return false;
    const text = `l${layer} e${expert} ${domains.join(" ")}`.toLowerCase().split(/\s+/);
    return words.every((w) => (/^[le]\d+$/.test(w) ? text.includes(w)
      : /^\d+$/.test(w) ? String(expert) === w : text.some((t) => t.includes(w))));
  }
  function apply() {
    const words = form.elements.words.value.toLowerCase().split(/\s+/).filter(Boolean);
    const { value: wanted } = form.elements.state;
    const { value: domain } = form.elements.domain;
    const on = words.length || wanted || domain;
    const hits = on ? experts.filter((e) => matches(e, words, wanted, domain)) : experts;
    found = on ? new Set(hits.map((e) => `${e[0]}/${e[1]}`)) : null;
    const inLayer = new Set(hits.map((e) => String(e[0])));
    for (const section of layers) {
      section.hidden = !inLayer.has(section.dataset.layer);
      show(section);
    }
    status.textContent = status.dataset.text.replace("#found", hits.length)
      .replace("#total", experts.length);
  }
  for (const section of layers) {
    section.addEventListener("toggle", () => {
      if (section.open) { materialise(section); show(section); }
    });
  }
  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(apply));
  let closed = [];
  addEventListener("beforeprint", () => {
    // A large model's appendix would be thousands of pages: what is open is printed.
    if (layers.length > 12) return;
    closed = layers.filter((section) => !section.open);
    for (const section of closed) { materialise(section); section.open = true; }
  });
  addEventListener("afterprint", () => { for (const section of closed) section.open = false; });
  apply();
})();
