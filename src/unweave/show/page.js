/* The page's own button: colours as the system has them, light or dark. */
"use strict";
(() => {
  const button = document.getElementById("uw-theme"), root = document.documentElement, order = ["auto", "light", "dark"];
  if (!button) return;
  const set = (theme) => {
    if (theme === "auto") delete root.dataset.theme;
    else root.dataset.theme = theme;
    button.textContent = "Colours: " + theme;
  };
  button.hidden = false;
  button.addEventListener("click", () => set(order[(order.indexOf(root.dataset.theme || "auto") + 1) % order.length]));
})();
