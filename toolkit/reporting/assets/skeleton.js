"use strict";
// Moving skeletons on a canvas, shared by reports and the demo app. Defines `skeletons`, nothing else.
const skeletons = (() => {
  const MISSING = -1;
  const SPAN = 16000;
  const MARGIN = 8000;
  const FILM_FRAMES = 6;
  const players = new Set();
  const calm = matchMedia("(prefers-reduced-motion: reduce)");
  let running = false;

  function unpack(clip) {
    const bytes = Uint8Array.from(atob(clip.data), (letter) => letter.charCodeAt(0));
    return new Int16Array(bytes.buffer);
  }

  // Parts whose lines share a colour; all that is neither a hand nor the face counts as body.
  function groups(skeleton) {
    const group = new Array(skeleton.points).fill("body");
    for (const name of ["left_hand", "right_hand", "face"])
      for (const point of skeleton.parts[name] || []) group[point] = name;
    return group;
  }

  // One frame into a rectangle of the canvas.
  function drawFrame(context, state, frame, left, top, width, height, colours) {
    const { values, skeleton, group, clip } = state;
    const scale = Math.min(width, height / clip.aspect);
    const x0 = left + (width - scale) / 2;
    const thickness = Math.min(scale, 360 * Math.max(devicePixelRatio || 1, 1));
    const y0 = top + (height - scale * clip.aspect) / 2;
    const at = (point) => {
      const index = (frame * skeleton.points + point) * 2;
      if (values[index] === MISSING) return null;
      return [x0 + ((values[index] - MARGIN) / SPAN) * scale, y0 + ((values[index + 1] - MARGIN) / SPAN) * scale];
    };
    context.save();
    context.beginPath();
    context.rect(left, top, width, height);
    context.clip();
    context.lineCap = context.lineJoin = "round";
    for (const [start, end] of skeleton.edges) {
      const from = at(start);
      const to = at(end);
      if (!from || !to) continue;
      context.strokeStyle = colours[group[start]];
      context.lineWidth = thickness * (group[start] === "body" ? 0.016 : 0.009);
      context.beginPath();
      context.moveTo(...from);
      context.lineTo(...to);
      context.stroke();
    }
    for (let point = 0; point < skeleton.points; point += 1) {
      const place = at(point);
      if (!place) continue;
      context.fillStyle = colours[group[point]];
      context.beginPath();
      context.arc(...place, thickness * (group[point] === "body" ? 0.012 : 0.0065), 0, 2 * Math.PI);
      context.fill();
    }
    context.restore();
  }

  function coloursOf(element) {
    const style = getComputedStyle(element);
    const colour = (name) => style.getPropertyValue(name).trim();
    return {
      body: colour("--ink-soft"),
      left_hand: colour("--series-0"),
      right_hand: colour("--series-1"),
      face: colour("--ink-faint"),
    };
  }

  function draw(player) {
    const { canvas, state } = player;
    const ratio = Math.max(devicePixelRatio || 1, 1);
    const width = Math.round((canvas.clientWidth || 320) * ratio);
    const height = Math.round((canvas.clientHeight || 240) * ratio);
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    const context = canvas.getContext("2d");
    context.clearRect(0, 0, width, height);
    const colours = coloursOf(canvas);
    if (!player.film) return drawFrame(context, state, player.frame, 0, 0, width, height, colours);
    // On paper nothing moves: some frames of the clip, in reading order.
    const columns = FILM_FRAMES / 2;
    for (let cell = 0; cell < FILM_FRAMES; cell += 1) {
      const frame = Math.min(state.clip.frames - 1, Math.floor(((cell + 0.5) * state.clip.frames) / FILM_FRAMES));
      const left = ((cell % columns) * width) / columns;
      const top = Math.floor(cell / columns) * (height / 2);
      drawFrame(context, state, frame, left, top, width / columns, height / 2, colours);
    }
  }

  function tick(now) {
    running = false;
    for (const player of players) {
      if (!player.playing || !player.visible) continue;
      running = true;
      const frame = Math.floor(player.from + ((now - player.since) / 1000) * player.state.clip.fps);
      const wrapped = frame % player.state.clip.frames;
      if (wrapped !== player.frame) player.show(wrapped);
    }
    if (running) requestAnimationFrame(tick);
  }

  function wake(player) {
    player.since = performance.now();
    player.from = player.frame;
    if (!running) {
      running = true;
      requestAnimationFrame(tick);
    }
  }

  // A figure with picture, play button, slider and time. It plays by itself while it is seen, unless the reader's
  // system asks for less motion.
  function player(clip, skeleton, label) {
    const root = document.createElement("div");
    root.className = "player";
    const canvas = document.createElement("canvas");
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `moving skeleton of ${label}`);
    const bar = document.createElement("div");
    bar.className = "player-bar";
    const button = document.createElement("button");
    button.type = "button";
    const slider = document.createElement("input");
    Object.assign(slider, { type: "range", min: 0, max: clip.frames - 1, value: 0, step: 1 });
    slider.setAttribute("aria-label", `frame of ${label}`);
    const clock = document.createElement("span");
    clock.className = "clock";
    bar.append(button, slider, clock);
    root.append(canvas, bar);

    const self = {
      root, canvas, frame: 0, playing: false, visible: false, film: false, since: 0, from: 0,
      state: { clip, skeleton, values: unpack(clip), group: groups(skeleton) },
      show(frame) {
        self.frame = frame;
        slider.value = frame;
        clock.textContent = `${(frame / clip.fps).toFixed(1)} / ${(clip.frames / clip.fps).toFixed(1)} s`;
        draw(self);
      },
      play(on) {
        self.playing = on && clip.frames > 1;
        button.textContent = self.playing ? "❚❚" : "▶";
        button.setAttribute("aria-label", `${self.playing ? "pause" : "play"} ${label}`);
        root.dataset.playing = self.playing;
        if (self.playing) wake(self);
      },
    };
    button.addEventListener("click", () => self.play(!self.playing));
    canvas.addEventListener("click", () => self.play(!self.playing));
    slider.addEventListener("input", () => {
      self.play(false);
      self.show(Number(slider.value));
    });
    new IntersectionObserver(([entry]) => {
      self.visible = entry.isIntersecting;
      if (self.visible) {
        draw(self);
        if (self.playing) wake(self);
      }
    }).observe(canvas);
    new ResizeObserver(() => draw(self)).observe(canvas);
    self.play(!calm.matches);
    self.show(0);
    players.add(self);
    return self;
  }

  // Players that a page no longer shows.
  function forget(gone) {
    for (const one of gone) players.delete(one);
  }

  function redraw(film) {
    for (const one of players) {
      if (film !== undefined) one.film = film;
      draw(one);
    }
  }

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => redraw());
  return { player, forget, redraw, playAll: (on) => players.forEach((one) => one.play(on)) };
})();
