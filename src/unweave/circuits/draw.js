/* Pointing at a node shows its edges and its card; a click, Enter or the address's hash keeps it; Esc lets go. */
"use strict";
(() => {
  const svg = document.querySelector(".uw-circuit-picture svg"), cards = document.querySelector(".uw-circuit-cards");
  const nodes = new Map([...svg.querySelectorAll('a[href^="#node-"]')].map((a) => [a.getAttribute("href").slice(6), a]));
  const edges = [...svg.querySelectorAll("[data-u]")];
  let kept = null;

  const show = (id) => {
    cards.classList.add("uw-picked");
    const near = new Set([id]);
    for (const edge of edges) {
      const mine = edge.dataset.u === id || edge.dataset.d === id;
      edge.classList.toggle("uw-near", mine);
      if (mine) near.add(edge.dataset.u).add(edge.dataset.d);
    }
    svg.classList.toggle("uw-some", id !== null);
    for (const [name, a] of nodes) {
      a.classList.toggle("uw-near", near.has(name));
      a.classList.toggle("uw-this", name === id);
    }
    for (const card of cards.querySelectorAll(".uw-card")) card.classList.toggle("uw-on", card.id === "node-" + id);
    cards.scrollTop = 0;
  };
  const keep = (id) => {
    kept = nodes.has(id) ? id : null;
    history.replaceState(null, "", kept === null ? location.pathname + location.search : "#node-" + kept);
    show(kept);
  };

  for (const [id, a] of nodes) {
    a.addEventListener("pointerenter", () => show(id));
    a.addEventListener("pointerleave", () => show(kept));
    a.addEventListener("focus", () => show(id));
    a.addEventListener("blur", () => show(kept));
  }
  document.addEventListener("click", (event) => {
    const link = event.target.closest('a[href^="#node-"]');
    if (link) {
      event.preventDefault();
      keep(link.getAttribute("href").slice(6));
      if (!svg.contains(link)) nodes.get(kept).focus();
    } else if (event.target.closest(".uw-circuit-picture")) keep(null);
  });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") { document.activeElement.blur(); keep(null); } });
  const size = document.getElementById("uw-size");
  size.hidden = false;
  size.addEventListener("click", () => {
    const full = svg.parentElement.classList.toggle("uw-full");
    size.textContent = full ? "Fit the window" : "Full size";
  });
  addEventListener("hashchange", () => keep(location.hash.replace("#node-", "")));
  if (location.hash.startsWith("#node-")) keep(location.hash.slice(6));
})();
