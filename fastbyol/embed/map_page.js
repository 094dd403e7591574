// What surrounds the map: gestures, the image under the pointer, the chosen one, search and legend.

const pointers = new Map();
let moved = 0;
let pinch = 0;
let chosenGroup = -1;
let sought = "";
const listedMax = 50;
const palette = ["#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#ee7733", "#009988", "#bb5566", "#7a55b0"];

function colourOf(number) {
  if (number < palette.length) return palette[number];
  const [hue, light] = [(number * 137.508) % 360, 42 + 12 * (number % 3)];
  const channel = (shift) => {
    const at = (shift + hue / 30) % 12;
    const value = light / 100 - 0.55 * Math.min(light / 100, 1 - light / 100) * Math.max(-1, Math.min(at - 3, 9 - at, 1));
    return Math.round(255 * value).toString(16).padStart(2, "0");
  };
  return "#" + channel(0) + channel(8) + channel(4);
}

function describe(point) {
  const group = map.data.classes[point];
  const parts = group ? [mapFacts.classes[group - 1]] : [];
  if (map.data.clusters) parts.push("group " + map.data.clusters[point]);
  return parts.join(" · ");
}

// Draw a thumbnail that fills a canvas of `side` pixels of the page, or a square of its colour.
function fillCanvas(target, point, side) {
  target.width = target.height = Math.round(side * screen.ratio);
  const brush = target.getContext("2d");
  brush.fillStyle = map.css[map.colours[point]];
  brush.fillRect(0, 0, target.width, target.height);
  target.dataset.point = point;
  drawThumbnail(brush, point, 0, 0, target.width, () => {
    if (target.dataset.point === String(point)) fillCanvas(target, point, side);
  });
}

function hover(event) {
  const point = pointers.size ? -1 : pointAt(event.clientX, event.clientY, 10);
  const tip = byId("tip");
  tip.hidden = point < 0 || event.pointerType === "touch";
  canvas.classList.toggle("over", point >= 0);
  if (tip.hidden) return;
  const [picture, name, about] = tip.children;
  picture.hidden = point >= mapFacts.thumbnails;
  if (picture.dataset.point !== String(point) && !picture.hidden) fillCanvas(picture, point, 198);
  name.textContent = map.data.names[point];
  about.textContent = describe(point);
  const { width, height } = tip.getBoundingClientRect();
  const toLeft = event.clientX + 18 + width > innerWidth;
  tip.style.left = (toLeft ? event.clientX - 18 - width : event.clientX + 18) + "px";
  tip.style.top = Math.max(Math.min(event.clientY - height / 2, innerHeight - height - 8), 8) + "px";
}

function select(point, { flies = false } = {}) {
  map.selected = point;
  byId("panel").hidden = point < 0;
  document.body.classList.toggle("open", point >= 0);
  redraw();
  if (point < 0) return;
  const { names, neighbours, cosines, places } = map.data;
  byId("name").textContent = names[point];
  byId("about").textContent = describe(point);
  const picture = document.querySelector(".chosen canvas");
  picture.hidden = point >= mapFacts.thumbnails;
  if (!picture.hidden) fillCanvas(picture, point, innerWidth < 700 ? 112 : 294);
  const near = byId("near");
  near.replaceChildren();
  for (let k = point * mapFacts.nearest; k < (point + 1) * mapFacts.nearest; k++) {
    const button = document.createElement("button");
    const thumb = document.createElement("canvas");
    fillCanvas(thumb, neighbours[k], 54);
    button.title = names[neighbours[k]];
    button.setAttribute("aria-label", `${names[neighbours[k]]}, cosine ${(cosines[k] / 10000).toFixed(3)}`);
    button.append(thumb, (cosines[k] / 10000).toFixed(3));
    button.onclick = () => select(neighbours[k], { flies: true });
    near.append(button);
  }
  if (flies) {
    const scale = Math.max(view.scale, 4 * fitScale());
    const isLow = innerWidth < 700;
    aim({ x: places[2 * point], y: places[2 * point + 1] + (isLow ? 0.2 * innerHeight / scale : 0), scale });
  }
}

// Show the points of the chosen group whose names hold what is sought; all, if neither is given.
function filter() {
  const { names } = map.data;
  const text = sought.toLowerCase();
  map.shown = null;
  const found = [];
  if (text || chosenGroup >= 0) {
    map.shown = new Uint8Array(mapFacts.count);
    for (let point = 0; point < mapFacts.count; point++) {
      if (chosenGroup >= 0 && map.colours[point] !== chosenGroup) continue;
      if (text && !names[point].toLowerCase().includes(text)) continue;
      map.shown[point] = 1;
      found.push(point);
    }
  }
  map.found = found.length;
  redraw();
  return found;
}

function search() {
  const results = byId("results");
  results.hidden = !sought;
  const found = filter();
  results.replaceChildren();
  if (!sought) return;
  const said = document.createElement("p");
  const more = found.length > listedMax ? `, the first ${listedMax}` : "";
  said.textContent = `${found.length.toLocaleString("en")} ${found.length === 1 ? "image" : "images"}${more}`;
  results.append(said);
  for (const point of found.slice(0, listedMax)) {
    const button = document.createElement("button");
    button.textContent = button.title = map.data.names[point];
    button.onclick = () => select(point, { flies: true });
    results.append(button);
  }
}

// Colour the points by class, by group or alike, and list what the colours mean.
function colour(kind) {
  const groups = { class: map.data.classes, group: map.data.clusters }[kind];
  map.colours = new Uint16Array(mapFacts.count);
  const [count, shift] = [kind === "class" ? mapFacts.classes.length : mapFacts.clusters, kind === "class" ? 0 : 1];
  if (groups) groups.forEach((group, point) => { map.colours[point] = group + shift; });
  const style = getComputedStyle(document.documentElement);
  const plain = groups ? style.getPropertyValue("--muted").trim() : style.getPropertyValue("--accent").trim();
  map.css = [plain, ...Array.from({ length: groups ? count : 0 }, (_, number) => colourOf(number))];
  map.palette = Uint32Array.from(map.css, packColour);
  map.paper = packColour(style.getPropertyValue("--paper").trim());
  map.faded = packColour(style.getPropertyValue("--line").trim());
  map.ink = style.getPropertyValue("--ink").trim();
  chosenGroup = -1;
  listGroups(kind, groups ? count : 0);
  if (map.selected >= 0) select(map.selected);
  search();
}

function listGroups(kind, count) {
  const sizes = new Uint32Array(count + 1);
  map.colours.forEach((number) => sizes[number]++);
  const entries = byId("entries");
  entries.replaceChildren();
  entries.className = "";
  const names = kind === "class" ? ["no class", ...mapFacts.classes] : ["", ...Array.from(sizes, (_, k) => "group " + k)];
  const numbers = Array.from({ length: count }, (_, k) => k + 1).concat(sizes[0] && count ? [0] : []);
  for (const number of numbers.slice(0, 200)) {
    const button = document.createElement("button");
    const [dot, name, size] = ["i", "span", "small"].map((tag) => document.createElement(tag));
    dot.style.background = map.css[number];
    name.textContent = button.title = names[number];
    size.textContent = sizes[number].toLocaleString("en");
    button.append(dot, name, size);
    button.onclick = () => {
      chosenGroup = chosenGroup === number ? -1 : number;
      entries.className = chosenGroup < 0 ? "" : "filtered";
      for (const each of entries.querySelectorAll("button")) each.classList.toggle("on", each === button);
      search();
    };
    const entry = document.createElement("li");
    entry.append(button);
    entries.append(entry);
  }
  byId("legend").hidden = count === 0 && byId("colouring").hidden;
}

function listColourings() {
  const kinds = [...(mapFacts.classes.length ? ["class"] : []), ...(mapFacts.clusters ? ["group"] : []), "none"];
  const choice = byId("colour");
  for (const kind of kinds) choice.append(new Option(kind, kind));
  byId("colouring").hidden = kinds.length < 2;
  choice.onchange = () => colour(choice.value);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => colour(choice.value));
  colour(kinds[0]);
}

function middle() {
  const [first, second] = pointers.values();
  const distance = Math.hypot(first.x - second.x, first.y - second.y);
  return { x: (first.x + second.x) / 2, y: (first.y + second.y) / 2, distance };
}

function onDown(event) {
  canvas.setPointerCapture(event.pointerId);
  pointers.set(event.pointerId, { x: event.clientX, y: event.clientY });
  if (pointers.size === 1) moved = 0;
  flight = null;
  byId("tip").hidden = true;
}

function onMove(event) {
  const before = pointers.get(event.pointerId);
  if (!before) return hover(event);
  const old = pointers.size === 2 ? middle() : null;
  const [dx, dy] = [event.clientX - before.x, event.clientY - before.y];
  Object.assign(before, { x: event.clientX, y: event.clientY });
  moved += Math.abs(dx) + Math.abs(dy);
  if (moved < 4) return undefined;
  canvas.classList.add("dragged");
  if (old) {
    const now = middle();
    view.x -= (now.x - old.x) / view.scale;
    view.y -= (now.y - old.y) / view.scale;
    zoom(now.distance / Math.max(old.distance, 1), now.x, now.y);
  } else {
    view.x -= dx / view.scale;
    view.y -= dy / view.scale;
  }
  return redraw();
}

function onUp(event) {
  if (!pointers.delete(event.pointerId) || pointers.size) return;
  canvas.classList.remove("dragged");
  if (event.type === "pointerup" && moved < 4) {
    select(pointAt(event.clientX, event.clientY, event.pointerType === "touch" ? 22 : 10));
  }
}

function listen() {
  canvas.addEventListener("pointerdown", onDown);
  canvas.addEventListener("pointermove", onMove);
  canvas.addEventListener("pointerup", onUp);
  canvas.addEventListener("pointercancel", onUp);
  canvas.addEventListener("pointerleave", () => { byId("tip").hidden = true; });
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    const step = event.deltaMode === 1 ? 24 * event.deltaY : event.deltaY;
    zoom(Math.exp(-Math.max(Math.min(step, 200), -200) * (event.ctrlKey ? 0.01 : 0.002)), event.clientX, event.clientY);
    byId("tip").hidden = true;
  }, { passive: false });
  addEventListener("keydown", (event) => {
    if (event.key === "Escape") select(-1);
    if (event.target === byId("search")) return;
    if (event.key === "+" || event.key === "=") zoom(1.5, innerWidth / 2, innerHeight / 2);
    if (event.key === "-") zoom(1 / 1.5, innerWidth / 2, innerHeight / 2);
    if (event.key === "0") fit();
  });
  addEventListener("resize", resize);
  byId("in").onclick = () => aim({ ...view, scale: Math.min(2 * view.scale, 20000 * fitScale()) });
  byId("out").onclick = () => aim({ ...view, scale: Math.max(view.scale / 2, 0.5 * fitScale()) });
  byId("fit").onclick = fit;
  byId("close").onclick = () => select(-1);
  byId("search").oninput = (event) => {
    sought = event.target.value.trim();
    search();
  };
}

unpackAll().then((data) => {
  map.data = data;
  Object.assign(view, viewOfAll());
  resize();
  listColourings();
  listen();
  prepareLevels();
  byId("status").hidden = true;
}).catch((error) => {
  byId("status").textContent = "This browser cannot unpack the map: " + error.message;
});
