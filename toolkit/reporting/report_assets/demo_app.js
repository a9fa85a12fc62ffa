"use strict";
// Draws one reading of the demo app: the moving skeleton, and how sure the model is of each piece of its text.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const page = document.getElementById("page");
  const player = skeletons.player(data.clip, data.skeleton, data.name);
  const heading = document.createElement("h3");
  heading.textContent = "How sure the model is";
  const pieces = document.createElement("p");
  pieces.className = "pieces";
  pieces.dir = "auto";
  for (const [text, chance] of data.pieces) {
    const piece = document.createElement("span");
    const percent = `${Math.round(100 * chance)} %`;
    piece.className = "piece";
    piece.textContent = text;
    piece.title = percent;
    piece.style.setProperty("--doubt", `${Math.round(100 * (1 - chance))}%`);
    const small = document.createElement("small");
    small.textContent = percent;
    piece.append(small);
    pieces.append(piece);
  }
  const holder = document.createElement("div");
  holder.append(player.root, ...(data.pieces.length ? [heading, pieces] : []));
  page.append(holder);
})();
