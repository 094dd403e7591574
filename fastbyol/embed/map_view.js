// The view of the map: where it looks, and how it is drawn. Dots are written pixel by pixel, since a hundred thousand of
// them would take a canvas's own calls longer than a frame; thumbnails are drawn above them where few images share a place.

const canvas = byId("map");
const context = canvas.getContext("2d", { alpha: false });
const border = 24; // pixels around the window into which dots at its edge are drawn
const cellMin = 44; // least side of a thumbnail's cell on the screen
const sideMax = 144;
const levelMax = 20;
const crowdMax = 14; // images for a thumbnail, on the average, from which on there are dots alone
const manyPoints = 50000; // above it the pixels of the screen are counted larger, so that a frame stays short
const view = { x: 0.5, y: 0.5, scale: 1 };
const map = { data: null, shown: null, found: 0, colours: null, selected: -1 };
const cellsOfLevel = new Map();
let drawn = []; // thumbnails on the screen: point, left, top, side
let screen = { width: 0, height: 0, ratio: 1, pixels: null, image: null };
let isQueued = false;
let flight = null;

function redraw() {
  if (isQueued || map.data === null) return;
  isQueued = true;
  requestAnimationFrame((now) => {
    isQueued = false;
    if (flight) fly(now);
    draw();
  });
}

function resize() {
  const ratio = Math.min(window.devicePixelRatio || 1, mapFacts.count > manyPoints ? 1.5 : 2);
  const [width, height] = [Math.round(innerWidth * ratio), Math.round(innerHeight * ratio)];
  canvas.width = width;
  canvas.height = height;
  const image = new ImageData(width + 2 * border, height + 2 * border);
  screen = { width, height, ratio, image, pixels: new Uint32Array(image.data.buffer) };
  redraw();
}

function packColour(text) {
  const number = parseInt(text.slice(1), 16);
  return 0xff000000 | ((number & 0xff) << 16) | (number & 0xff00) | (number >> 16);
}

// Return the view of everything, in the part of the window that nothing covers.
function viewOfAll() {
  const isNarrow = innerWidth < 700;
  const free = isNarrow
    ? { left: 12, top: 124, width: innerWidth - 24, height: innerHeight - 200 }
    : { left: 360, top: 20, width: innerWidth - 420, height: innerHeight - 40 };
  const scale = Math.max(0.94 * Math.min(free.width, free.height), 60);
  return {
    x: 0.5 - (free.left + free.width / 2 - innerWidth / 2) / scale,
    y: 0.5 - (free.top + free.height / 2 - innerHeight / 2) / scale,
    scale,
  };
}

const fitScale = () => viewOfAll().scale;

function fit() {
  aim(viewOfAll());
}

function aim(target) {
  const isStill = matchMedia("(prefers-reduced-motion: reduce)").matches;
  if (isStill) Object.assign(view, target);
  flight = isStill ? null : { from: { ...view }, to: target, began: performance.now() };
  redraw();
}

function fly(now) {
  const part = Math.min(Math.max(now - flight.began, 0) / 320, 1);
  const eased = part * part * (3 - 2 * part);
  const { from, to } = flight;
  const scale = from.scale * (to.scale / from.scale) ** eased;
  const share = Math.abs(to.scale - from.scale) < 1e-6 * to.scale
    ? eased : (1 / from.scale - 1 / scale) / (1 / from.scale - 1 / to.scale);
  Object.assign(view, { scale, x: from.x + (to.x - from.x) * share, y: from.y + (to.y - from.y) * share });
  if (part === 1) flight = null;
  else redraw();
}

// Zoom by a factor and keep the place below (x, y) of the window where it is.
function zoom(factor, x, y) {
  flight = null;
  const scale = Math.min(Math.max(view.scale * factor, 0.5 * fitScale()), 20000 * fitScale());
  const change = 1 / view.scale - 1 / scale;
  view.x += (x - innerWidth / 2) * change;
  view.y += (y - innerHeight / 2) * change;
  view.scale = scale;
  redraw();
}

const onScreen = (point) => [
  (map.data.places[2 * point] - view.x) * view.scale + innerWidth / 2,
  (map.data.places[2 * point + 1] - view.y) * view.scale + innerHeight / 2,
];

// Return the pixels of a dot: offsets from its own, and how much of each it leaves, and adds in every colour, in 64ths:
// numbers that small are multiplied as integers.
function makeDot(radius, opacity, colours) {
  const reach = Math.ceil(radius);
  const [offsets, rests] = [[], []];
  for (let y = -reach; y <= reach; y++) {
    for (let x = -reach; x <= reach; x++) {
      const part = Math.round(64 * opacity * Math.min(Math.max(radius + 0.5 - Math.hypot(x, y), 0), 1));
      if (part > 0) {
        offsets.push(y * (screen.width + 2 * border) + x);
        rests.push(64 - part);
      }
    }
  }
  const length = offsets.length;
  const [outer, inner] = [new Int32Array(length * colours.length), new Int32Array(length * colours.length)];
  colours.forEach((colour, number) => rests.forEach((rest, k) => {
    outer[number * length + k] = (colour & 0xff00ff) * (64 - rest);
    inner[number * length + k] = (colour & 0xff00) * (64 - rest);
  }));
  return { offsets: Int32Array.from(offsets), rests: Int32Array.from(rests), outer, inner };
}

// Write the dots of the points whose `shown` is `wanted`, of all without one.
function drawDots(wanted, radius, opacity) {
  const { width, height, ratio, pixels } = screen;
  const { places } = map.data;
  const { shown, colours } = map;
  const { offsets, rests, outer, inner } = makeDot(radius, opacity, wanted ? map.palette : [map.faded]);
  const scale = view.scale * ratio;
  const [left, top] = [width / 2 - view.x * scale, height / 2 - view.y * scale];
  const [stride, length] = [width + 2 * border, offsets.length];
  for (let point = mapFacts.count - 1; point >= 0; point--) {
    if (shown !== null && shown[point] !== wanted) continue;
    const x = Math.round(places[2 * point] * scale + left);
    const y = Math.round(places[2 * point + 1] * scale + top);
    if (x < -8 || y < -8 || x >= width + 8 || y >= height + 8) continue;
    const at = (y + border) * stride + x + border;
    const own = wanted ? colours[point] * length : 0;
    for (let k = 0; k < length; k++) {
      const place = at + offsets[k];
      const below = pixels[place];
      pixels[place] = 0xff000000
        | (((below & 0xff00ff) * rests[k] + outer[own + k]) >> 6) & 0xff00ff
        | (((below & 0xff00) * rests[k] + inner[own + k]) >> 6) & 0xff00;
    }
  }
}

function countVisible(limit) {
  const { places } = map.data;
  const [halfX, halfY] = [innerWidth / 2 / view.scale, innerHeight / 2 / view.scale];
  let count = 0;
  for (let point = 0; point < limit; point++) {
    if (Math.abs(places[2 * point] - view.x) < halfX && Math.abs(places[2 * point + 1] - view.y) < halfY) count++;
  }
  return count;
}

// Return the first point with a thumbnail in each cell of a level, whose cells have sides of 2^-level.
function firstOfCells(level) {
  if (!cellsOfLevel.has(level)) {
    const { places } = map.data;
    const [side, taken, found] = [2 ** level, new Set(), []];
    for (let point = 0; point < mapFacts.thumbnails; point++) {
      const cell = Math.floor(places[2 * point] * side) * 2 * side + Math.floor(places[2 * point + 1] * side);
      if (!taken.has(cell)) {
        taken.add(cell);
        found.push(point);
      }
    }
    cellsOfLevel.set(level, found);
  }
  return cellsOfLevel.get(level);
}

// Compute the cells of all levels bit by bit, so that the first zoom does not wait for them.
function prepareLevels(level = 0) {
  firstOfCells(level);
  if (level < levelMax) setTimeout(prepareLevels, 40, level + 1);
}

// Return the level with the smallest cells that still hold a thumbnail; a coarser one, with larger thumbnails, if its
// cells are enough for most images.
function levelOfView() {
  let level = Math.min(Math.max(Math.floor(Math.log2(view.scale / cellMin)), 0), levelMax);
  const isRoomy = () => firstOfCells(level - 1).length > 0.7 * mapFacts.thumbnails;
  while (level > 0 && view.scale / 2 ** (level - 1) < 1.2 * sideMax && isRoomy()) level--;
  return level;
}

// Draw thumbnails, one in a cell, if the cells hold few images each.
function drawThumbnails() {
  drawn = [];
  const level = levelOfView();
  const [cell, side] = [2 ** -level, Math.min((0.9 * view.scale) / 2 ** level, sideMax)];
  const [halfX, halfY] = [innerWidth / 2 / view.scale + cell, innerHeight / 2 / view.scale + cell];
  const { places } = map.data;
  const seen = firstOfCells(level).filter((point) =>
    Math.abs(places[2 * point] - view.x) < halfX && Math.abs(places[2 * point + 1] - view.y) < halfY);
  const crowd = countVisible(mapFacts.thumbnails) / Math.max(seen.length, 1);
  const opacity = Math.min(Math.max((crowdMax - crowd) / 4, 0), 1);
  if (opacity === 0) return;
  const half = side / 2 / view.scale;
  const inside = (value) => {
    const low = Math.floor(value / cell) * cell;
    return Math.min(Math.max(value, low + half), low + cell - half);
  };
  const rim = side > 36 ? 2 : 1.5;
  for (const point of seen) {
    const left = (inside(places[2 * point]) - view.x) * view.scale + innerWidth / 2 - side / 2;
    const top = (inside(places[2 * point + 1]) - view.y) * view.scale + innerHeight / 2 - side / 2;
    const isShown = map.shown === null || map.shown[point] === 1;
    context.globalAlpha = isShown ? opacity : 0.1 * opacity;
    context.fillStyle = isShown ? map.css[map.colours[point]] : map.css[0];
    context.fillRect(left, top, side, side);
    drawThumbnail(context, point, left + rim, top + rim, side - 2 * rim, redraw);
    drawn.push({ point, left, top, side });
  }
  context.globalAlpha = 1;
}

// Mark the chosen image and join it with its neighbours.
function drawSelection() {
  if (map.selected < 0) return;
  const [x, y] = onScreen(map.selected);
  context.strokeStyle = context.fillStyle = map.ink;
  context.lineWidth = 1;
  context.globalAlpha = 0.55;
  for (let k = 0; k < mapFacts.nearest; k++) {
    const [toX, toY] = onScreen(map.data.neighbours[map.selected * mapFacts.nearest + k]);
    context.beginPath();
    context.moveTo(x, y);
    context.lineTo(toX, toY);
    context.stroke();
    context.beginPath();
    context.arc(toX, toY, 4, 0, 7);
    context.stroke();
  }
  context.globalAlpha = 1;
  context.lineWidth = 3;
  const side = drawn.length ? drawn[0].side : 0;
  const own = drawn.find((each) => each.point === map.selected)
    || { point: map.selected, left: x - side / 2, top: y - side / 2, side };
  if (side > 0 && drawThumbnail(context, own.point, own.left, own.top, side, redraw)) {
    context.strokeRect(own.left - 2, own.top - 2, side + 4, side + 4);
    drawn.push(own);
  } else {
    context.beginPath();
    context.arc(x, y, 9, 0, 7);
    context.stroke();
  }
}

// Return the radius of so many dots: a part of their distance, were they spread evenly.
function radiusOf(count) {
  const distance = Math.sqrt((innerWidth * innerHeight) / Math.max(count, 1));
  return screen.ratio * Math.min(Math.max(0.16 * distance, 1.1), 5);
}

function draw() {
  const { ratio, pixels, image } = screen;
  pixels.fill(map.paper);
  const crowd = countVisible(mapFacts.count);
  if (map.shown !== null) drawDots(0, 0.8 * radiusOf(crowd), 0.5);
  drawDots(1, radiusOf(map.shown === null ? crowd : Math.min(crowd, map.found)), 0.8);
  context.setTransform(1, 0, 0, 1, 0, 0);
  context.putImageData(image, -border, -border);
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  drawThumbnails();
  drawSelection();
}

// Return the point below a place of the window: of a thumbnail, else the nearest dot within reach; -1 for none.
function pointAt(x, y, reach) {
  for (let k = drawn.length - 1; k >= 0; k--) {
    const { point, left, top, side } = drawn[k];
    if (x >= left && y >= top && x < left + side && y < top + side) return point;
  }
  const { places } = map.data;
  const [atX, atY] = [(x - innerWidth / 2) / view.scale + view.x, (y - innerHeight / 2) / view.scale + view.y];
  let [found, best] = [-1, (reach / view.scale) ** 2];
  for (let point = 0; point < mapFacts.count; point++) {
    const [dx, dy] = [places[2 * point] - atX, places[2 * point + 1] - atY];
    const distance = dx * dx + dy * dy;
    if (distance < best && (map.shown === null || map.shown[point] === 1)) [found, best] = [point, distance];
  }
  return found;
}
