/* Finds behaviours by the words of their contexts, answers and latents, and puts them in another order. */
"use strict";
for (const tools of document.querySelectorAll("form[data-behaviours]")) {
  const list = tools.nextElementSibling;
  const [box, order, told] = ["input", "select", "output"].map((name) => tools.querySelector(name));
  const cards = [...list.querySelectorAll("[data-place]")];
  const words = new Map(cards.map((card) => [card, card.dataset.text.toLowerCase()]));
  const show = () => {
    const asked = box.value.toLowerCase().split(/\s+/).filter(Boolean);
    let n = 0;
    for (const card of cards) {
      card.hidden = !asked.every((word) => words.get(card).includes(word));
      n += !card.hidden;
    }
    told.textContent = n === cards.length ? cards.length + " behaviours" : n + " of " + cards.length;
  };
  const sort = () => {
    const key = order.value, sign = key === "place" ? 1 : -1;
    list.append(...[...cards].sort((a, b) => sign * (a.dataset[key] - b.dataset[key]) || a.dataset.place - b.dataset.place));
  };
  box.addEventListener("input", show);
  order.addEventListener("change", sort);
  tools.addEventListener("submit", (event) => event.preventDefault());
  tools.hidden = false;
  show();
}
