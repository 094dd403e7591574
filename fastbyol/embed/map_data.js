// The data of the map: arrays in the order of its points, and sheets of thumbnails that are decoded when they are seen.

const byId = (id) => document.getElementById(id);
const mapFacts = JSON.parse(byId("mapFacts").textContent);
const sheetsKept = 40;
const perSheet = mapFacts.perRow * mapFacts.perRow;
const sheets = new Map();

function bytesOf(id) {
  const text = atob(byId(id).textContent);
  const bytes = new Uint8Array(text.length);
  for (let k = 0; k < text.length; k++) bytes[k] = text.charCodeAt(k);
  return bytes;
}

async function unpack(name) {
  const stream = new Blob([bytesOf("data-" + name)]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}

async function unpackAll() {
  const [places, classes, neighbours, cosines, names] = await Promise.all(
    ["places", "classes", "neighbours", "cosines", "names"].map(unpack));
  return {
    places: new Float32Array(places),
    classes: new Uint16Array(classes),
    neighbours: new Uint32Array(neighbours),
    cosines: new Int16Array(cosines),
    names: JSON.parse(new TextDecoder().decode(names)),
    clusters: mapFacts.clusters ? new Uint16Array(await unpack("clusters")) : null,
  };
}

// Return the sheet that holds a point's thumbnail, or null while it is decoded; ready() is called when it is there.
function sheetOf(point, ready) {
  const number = Math.floor(point / perSheet);
  let sheet = sheets.get(number);
  if (sheet === undefined) {
    sheet = { bitmap: null, waiting: [] };
    createImageBitmap(new Blob([bytesOf("sheet-" + number)], { type: "image/jpeg" })).then((bitmap) => {
      sheet.bitmap = bitmap;
      sheet.waiting.splice(0).forEach((call) => call());
    });
  }
  sheets.delete(number);
  sheets.set(number, sheet); // the last in the order of a Map is the one used last
  if (sheets.size > sheetsKept) {
    const [oldest, dropped] = sheets.entries().next().value;
    sheets.delete(oldest);
    if (dropped.bitmap) dropped.bitmap.close();
  }
  if (sheet.bitmap === null && !sheet.waiting.includes(ready)) sheet.waiting.push(ready);
  return sheet.bitmap;
}

// Draw a point's thumbnail into a square of a canvas; return false where there is none, or not yet.
function drawThumbnail(context, point, left, top, side, ready) {
  if (point >= mapFacts.thumbnails) return false;
  const bitmap = sheetOf(point, ready);
  if (bitmap === null) return false;
  const place = point % perSheet;
  const x = (place % mapFacts.perRow) * mapFacts.px;
  const y = Math.floor(place / mapFacts.perRow) * mapFacts.px;
  context.imageSmoothingEnabled = side < mapFacts.px || mapFacts.px > 32;
  context.imageSmoothingQuality = "medium";
  context.drawImage(bitmap, x, y, mapFacts.px, mapFacts.px, left, top, side, side);
  return true;
}
