"use strict";
// Draws one reading of the demo app: the moving skeleton, and how sure the model is of each part of its text.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const page = document.getElementById("page");
  const player = skeletons.player(data.clip, data.skeleton, data.name);
  const heading = document.createElement("h3");
  heading.textContent = "How sure the model is";
  const parts = document.createElement("p");
  parts.className = "parts";
  parts.dir = "auto";
  for (const [text, chance] of data.parts) {
    const part = document.createElement("span");
    const percent = `${Math.round(100 * chance)} %`;
    part.className = "part";
    part.textContent = text;
    part.title = percent;
    part.style.setProperty("--doubt", `${Math.round(100 * (1 - chance))}%`);
    const small = document.createElement("small");
    small.textContent = percent;
    part.append(small);
    parts.append(part);
  }
  const holder = document.createElement("div");
  holder.append(player.root, ...(data.parts.length ? [heading, parts] : []));
  page.append(holder);
})();
