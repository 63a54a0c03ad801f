"use strict";
// Pictures are the addresses of PNGs that hold a model's levels exactly. Two of them are in hand, A and B; all else is asked of the server.

const $ = (id) => document.getElementById(id);
const hand = { A: null, B: null };
let model = null;

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function say(text, wrong = false) {
  $("said").textContent = text;
  $("said").classList.toggle("wrong", wrong);
}

// Asking: while an answer takes long, the status says what the server is at, and Stop is offered.

async function post(name, asked) {
  const response = await fetch(`/ask/${name}`, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(asked) });
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

async function ask(name, asked, button = null) {
  if (button) button.disabled = true;
  let answered = false;
  const timer = setInterval(async () => {
    const { doing } = await post("doing", {}).catch(() => ({ doing: "" }));
    if (answered) return;
    if (doing) say(`${doing} …`);
    if (asked.question) $("stop").hidden = false;
  }, 1000);
  try {
    const answer = await post(name, asked);
    if (name !== "advance") say(""); // chains would silence others
    return answer;
  } catch (error) {
    say(error instanceof TypeError ? "The server does not answer: is flowgen explore still running?" : `${error.message}`, true);
    return null;
  } finally {
    answered = true;
    clearInterval(timer);
    if (asked.question) $("stop").hidden = true;
    if (button) button.disabled = false;
  }
}

// Scores: one picture after another, those that are still shown.

const waiting = [];
let scoring = false;

async function scoreWaiting() {
  if (scoring) return;
  scoring = true;
  while (waiting.length) {
    const { figures, picture } = waiting.shift();
    if (!figures.isConnected) continue;
    try {
      write(figures, await post("score", { image: picture }));
    } catch (error) {
      figures.textContent = "no score";
      figures.title = error.message;
    }
  }
  scoring = false;
}

function write(figures, found) {
  const value = found.value === null ? "beyond float32" : found.value.toFixed(Math.abs(found.value) < 100 ? 3 : 1);
  const place = found.percentile === null ? "" : `percentile ${found.percentile.toFixed(0)}`;
  figures.replaceChildren(element("b", { textContent: value }), found.value === null ? "" : model.short, element("br"), place);
  figures.title = `${value} ${model.unit}${place && `, ${place}: so many of a hundred validation images are likelier. p = ${found.p.toFixed(4)}`}`;
  const button = figures.closest("button");
  if (button) button.setAttribute("aria-label", `${button.dataset.name}: ${value} ${model.unit}, ${place}`);
  if (figures.closest("#slot-A")) showCommand("score-command", found.command);
}

function scored(picture) {
  const figures = element("span", { className: "figures", textContent: "…" });
  figures.dataset.picture = picture;
  waiting.push({ figures, picture });
  return figures;
}

function scoreAgain() {
  for (const figures of document.querySelectorAll(".figures[data-picture]")) waiting.push({ figures, picture: figures.dataset.picture });
  scoreWaiting();
}

// Pictures that can be taken in hand.

function tile(picture, name, { score = true, caption = "" } = {}) {
  const figures = score ? scored(picture) : element("span", { className: "figures", textContent: caption });
  const made = element("button", { type: "button", className: "tile", title: "Take in hand" }, element("img", { src: picture, alt: "" }), figures);
  made.dataset.name = name;
  made.setAttribute("aria-label", name);
  made.addEventListener("click", async () => {
    const whole = score ? picture : (await ask("read", { image: picture }))?.picture; // probabilities become a picture
    if (whole) take(whole, name);
    for (const other of document.querySelectorAll(".tile[aria-pressed]")) other.removeAttribute("aria-pressed");
    made.setAttribute("aria-pressed", "true");
  });
  return made;
}

function fill(id, tiles) {
  $(id).replaceChildren(...tiles);
  scoreWaiting();
}

document.addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
  const group = document.activeElement?.closest(".tiles");
  if (!step || !group) return;
  const tiles = [...group.querySelectorAll(".tile")];
  tiles[Math.min(Math.max(tiles.indexOf(document.activeElement) + step, 0), tiles.length - 1)].focus();
  event.preventDefault();
});

function take(picture, name, slot = document.querySelector("[name=target]:checked").value) {
  hand[slot] = { picture, name };
  if (slot === "A" && !hand.B) document.querySelector("[name=target][value=B]").checked = true;
  showHand(slot);
  say(`${name} is ${slot}.`);
}

function showHand(slot) {
  const held = hand[slot];
  const file = element("input", { type: "file", accept: "image/png,image/jpeg,image/webp,image/gif,image/bmp" });
  file.setAttribute("aria-label", `Open an image file as ${slot}`);
  file.addEventListener("change", () => open(file.files[0], slot));
  const buttons = element("span", { className: "buttons" }, element("label", { className: "button" }, "Open", file));
  const shown = held ? element("img", { src: held.picture, alt: `${slot}: ${held.name}` }) : element("div", { className: "empty", textContent: "drop an image" });
  if (held) buttons.append(element("a", { className: "button", href: held.picture, download: `${slot.toLowerCase()}.png`, textContent: "Save" }));
  $(`slot-${slot}`).replaceChildren(element("h3", { textContent: slot }), shown, ...(held ? [scored(held.picture)] : []), buttons);
  scoreWaiting();
  if (slot === "A" && model.able_to.complete) startBrush();
}

async function open(file, slot) {
  if (!file) return;
  if (file.size > 5.5e6) return say("That file is larger than 5.5 MB: make it smaller first.", true);
  const picture = await new Promise((resolve) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(reader.result));
    reader.addEventListener("error", () => resolve(null));
    reader.readAsDataURL(file);
  });
  const answer = picture && (await ask("read", { image: picture }));
  if (answer) take(answer.picture, "an image of yours", slot);
}

for (const slot of ["A", "B"]) {
  const place = $(`slot-${slot}`);
  place.addEventListener("dragover", () => place.classList.add("over"));
  for (const end of ["dragleave", "drop"]) place.addEventListener(end, () => place.classList.remove("over"));
  place.addEventListener("drop", (event) => open(event.dataTransfer.files[0], slot));
}
for (const name of ["dragover", "drop"]) document.addEventListener(name, (event) => event.preventDefault()); // a file dropped beside them opens nothing
$("swap").addEventListener("click", () => {
  [hand.A, hand.B] = [hand.B, hand.A];
  showHand("A");
  showHand("B");
});

// Commands to copy, and what sliders say.

function showCommand(id, text) {
  const code = element("code", { textContent: text });
  const copy = element("button", { type: "button", textContent: "Copy" });
  copy.setAttribute("aria-label", `Copy ${text}`);
  copy.addEventListener("click", async () => {
    await navigator.clipboard.writeText(text).then(() => say("Copied."), () => getSelection().selectAllChildren(code));
  });
  $(id).replaceChildren(code, copy);
  $(id).hidden = false;
}

function showValue(input) {
  const output = document.querySelector(`output[for="${input.id}"]`);
  if (output) output.textContent = input.id === "share" ? `${Math.round((100 * input.value) / input.max)} %` : input.value;
}
document.addEventListener("input", (event) => showValue(event.target));

const whole = (id) => Number.parseInt($(id).value, 10);

function onSubmit(id, action) {
  $(id).addEventListener("submit", (event) => {
    event.preventDefault();
    action(event.submitter ?? $(id).querySelector("button"));
  });
}

// Samples.

async function drawSamples(button = $("sample-form").querySelector("button")) {
  const asked = { count: whole("count"), temperature: Number($("temperature").value), seed: whole("seed") };
  if (model.able_to.classes && $("label").value) asked.label = whole("label");
  if (model.able_to.chains) Object.assign(asked, { method: $("sampler").value, sweeps: whole("sample-sweeps") });
  const answer = await ask("sample", asked, button);
  if (!answer) return;
  fill("sample-tiles", answer.pictures.map((picture, place) => tile(picture, `Sample ${place + 1} of seed ${answer.seed}`)));
  showCommand("sample-command", answer.command);
}
onSubmit("sample-form", drawSamples);
for (const id of ["temperature", "label", "count", "sampler", "sample-sweeps"]) $(id).addEventListener("change", () => $("sample-form").requestSubmit());
$("next-seed").addEventListener("click", () => {
  $("seed").value = whole("seed") + 1;
  $("sample-form").requestSubmit();
});

// The walk.

let way = [];

onSubmit("walk-form", async (button) => {
  if (!hand.A || !hand.B) return say("Take two pictures in hand first, A and B.", true);
  const asked = { first: hand.A.picture, second: hand.B.picture, steps: whole("steps"), spherical: $("spherical").checked };
  const answer = await ask("walk", asked, button);
  if (!answer) return;
  way = answer.latent;
  $("share").max = way.length - 1;
  $("share").value = (way.length - 1) / 2;
  $("walk-result").hidden = false;
  $("inexact").hidden = way[0] === hand.A.picture && way.at(-1) === hand.B.picture;
  showMixture();
  fill("latent-tiles", answer.latent.map((picture, place) => tile(picture, `Step ${place} through the latents`)));
  fill("pixels-tiles", answer.pixels.map((picture, place) => tile(picture, `Step ${place} through the pixels`)));
  showCommand("walk-command", answer.command);
});
function showMixture() {
  showValue($("share"));
  fill("mix", [tile(way[whole("share")], `The mixture with ${document.querySelector("output[for=share]").textContent} of B`)]);
}
$("share").addEventListener("input", showMixture);

// Attributes: a slider each, from -2 to 2, where 0 leaves A alone.

async function findDirections() {
  const answer = await ask("attributes", {}, $("find"));
  if (!answer) return;
  $("find").hidden = true;
  $("edit-form").hidden = false;
  $("edit-hint").textContent = "1 is as far as from the training images without an attribute to those with it, or from A's class to another.";
  const sliders = answer.attributes.map((name, place) => {
    const slider = element("input", { type: "range", id: `amount-${place}`, min: -2, max: 2, step: 0.1, value: 0 });
    slider.dataset.attribute = name;
    const output = element("output", { textContent: "0" });
    output.setAttribute("for", slider.id);
    return element("label", {}, `${name.replaceAll("_", " ")} `, output, slider);
  });
  $("amounts").replaceChildren(...sliders);
}

async function moveA() {
  const moved = [...$("amounts").querySelectorAll("input")].filter((slider) => Number(slider.value) !== 0);
  const amounts = Object.fromEntries(moved.map((slider) => [slider.dataset.attribute, Number(slider.value)]));
  if (!hand.A) return say("Take a picture in hand first, as A.", true);
  if (!moved.length) return fill("edit-tiles", []);
  const answer = await ask("edit", { image: hand.A.picture, amounts });
  if (!answer) return;
  const said = Object.entries(amounts).map(([name, by]) => `${name.replaceAll("_", " ")} by ${by}`);
  fill("edit-tiles", [tile(hand.A.picture, "A as it is"), tile(answer.picture, `A with ${said.join(", ")}`)]);
  showCommand("edit-command", answer.command);
}
$("find").addEventListener("click", findDirections);
$("amounts").addEventListener("change", moveA);
$("edit-form").addEventListener("submit", (event) => event.preventDefault());
$("reset").addEventListener("click", () => {
  for (const slider of $("amounts").querySelectorAll("input")) {
    slider.value = 0;
    showValue(slider);
  }
  fill("edit-tiles", []);
  $("edit-command").hidden = true;
});

// The brush: what is erased is a set of pixels, seen on a canvas on which each pixel is a square.

const brush = { erased: new Uint8Array(0), image: new Image(), x: 0, y: 0, scale: 1 };

function startBrush() {
  const [, height, width] = model.shape;
  brush.erased = new Uint8Array(height * width);
  brush.scale = Math.max(4, Math.floor(512 / height));
  Object.assign($("canvas"), { width: width * brush.scale, height: height * brush.scale });
  [brush.x, brush.y] = [width >> 1, height >> 1];
  $("keep").value = "all";
  brush.image = new Image();
  brush.image.addEventListener("load", showBrush);
  if (hand.A) brush.image.src = hand.A.picture;
}

function showBrush() {
  const [, height, width] = model.shape;
  const canvas = $("canvas");
  const paint = canvas.getContext("2d");
  paint.imageSmoothingEnabled = false;
  paint.drawImage(brush.image, 0, 0, canvas.width, canvas.height);
  const side = brush.scale;
  brush.erased.forEach((gone, place) => {
    if (!gone) return;
    const [x, y] = [place % width, Math.floor(place / width)];
    paint.fillStyle = (x + y) % 2 ? "#c8783c" : "#d99a68";
    paint.fillRect(x * side, y * side, side, side);
  });
  if (document.activeElement === canvas) {
    paint.strokeStyle = "#2f8fe0";
    paint.lineWidth = 2;
    const size = whole("brush-size");
    paint.strokeRect((brush.x - (size >> 1)) * side, (brush.y - (size >> 1)) * side, size * side, size * side);
  }
  const gone = brush.erased.reduce((sum, each) => sum + each, 0);
  const said = gone ? `${gone} of ${height * width} pixels are erased.` : "Nothing is erased: paint on the picture, or choose what to keep.";
  if ($("erased").textContent !== said) $("erased").textContent = said;
  const mask = element("canvas", { width, height });
  const pixels = new ImageData(width, height);
  brush.erased.forEach((gone, place) => pixels.data.set(gone ? [0, 0, 0, 255] : [255, 255, 255, 255], 4 * place));
  mask.getContext("2d").putImageData(pixels, 0, 0);
  $("save-mask").href = mask.toDataURL("image/png");
}

function stroke(x, y, erase) {
  const [, height, width] = model.shape;
  const size = whole("brush-size");
  [brush.x, brush.y] = [x, y];
  for (let row = y - (size >> 1); row < y - (size >> 1) + size; row++)
    for (let column = x - (size >> 1); column < x - (size >> 1) + size; column++)
      if (row >= 0 && row < height && column >= 0 && column < width) brush.erased[row * width + column] = erase ? 1 : 0;
  showBrush();
}

const erasing = () => document.querySelector("[name=brush]:checked").value === "erase";
function pointed(event) {
  const box = $("canvas").getBoundingClientRect();
  stroke(Math.floor(((event.clientX - box.left) / box.width) * model.shape[2]), Math.floor(((event.clientY - box.top) / box.height) * model.shape[1]), erasing());
}
$("canvas").addEventListener("pointerdown", (event) => {
  $("canvas").setPointerCapture(event.pointerId);
  pointed(event);
});
$("canvas").addEventListener("pointermove", (event) => event.buttons && pointed(event));
$("canvas").addEventListener("keydown", (event) => {
  const [, height, width] = model.shape;
  const [right, down] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key] ?? [0, 0];
  brush.x = Math.min(Math.max(brush.x + right, 0), width - 1);
  brush.y = Math.min(Math.max(brush.y + down, 0), height - 1);
  if (event.key === " ") stroke(brush.x, brush.y, true);
  else if (event.key === "r" || event.key === "R") stroke(brush.x, brush.y, false);
  else if (right || down) showBrush();
  else return;
  event.preventDefault();
});
for (const name of ["focus", "blur"]) $("canvas").addEventListener(name, showBrush);
$("keep").addEventListener("change", () => {
  const [, height, width] = model.shape;
  const [top, left] = [Math.floor(height / 4), Math.floor(width / 4)];
  const keeps = {
    all: () => true,
    left: (x) => x < Math.floor(width / 2),
    right: (x) => x >= Math.floor(width / 2),
    top: (x, y) => y < Math.floor(height / 2),
    bottom: (x, y) => y >= Math.floor(height / 2),
    border: (x, y) => x < left || x >= width - left || y < top || y >= height - top,
  };
  brush.erased = brush.erased.map((_, place) => (keeps[$("keep").value](place % width, Math.floor(place / width)) ? 0 : 1));
  showBrush();
});
let completion = ""; // the question that Stop ends

onSubmit("complete-form", async (button) => {
  if (!hand.A) return say("Take a picture in hand first, as A.", true);
  completion = crypto.randomUUID();
  const asked = { image: hand.A.picture, mask: $("save-mask").href, method: $("method").value, sweeps: whole("sweeps"), seed: whole("complete-seed") };
  const answer = await ask("complete", { ...asked, question: completion }, button);
  if (!answer) return;
  $("complete-result").hidden = false;
  const draws = answer.draws.slice(0, 10);
  const still = { score: false };
  fill("complete-tiles", [
    tile(answer.mean, "The mean of the completions", { ...still, caption: "mean" }),
    tile(answer.spread, "The spread of the completions", { ...still, caption: "spread" }),
    ...draws.map((picture, place) => tile(picture, `Completion ${place + 1}`, model.bits > 1 ? {} : still)),
  ]);
  const facts = Object.entries(answer.figures).map(([name, value]) => `${name.replaceAll("_", " ")} ${value.toFixed(3)}`);
  $("complete-figures").textContent = `${draws.length} of ${answer.draws.length} draws. ${facts.join(", ")}`;
  showCommand("complete-command", answer.command);
});
$("stop").addEventListener("click", () => post("stop", { question: completion }));

// Chains that run while they are watched.

let running = 0;

async function runChains(how, name) {
  const mine = ++running;
  $("pause").disabled = false;
  for (let frames = 0; mine === running; frames++) {
    const answer = await ask("advance", { ...how, chains: name, frames, sweeps: frames ? how.sweeps : 1 });
    if (!answer || mine !== running) break;
    fill("chains-tiles", answer.pictures.map((picture, place) => tile(picture, `Chain ${place + 1}`, { score: false })));
    $("sweep").textContent = `P(v = 1) at sweep ${frames * how.sweeps}.`;
    showCommand("chains-command", answer.command);
    await new Promise((resolve) => setTimeout(resolve, 120));
  }
}
onSubmit("chains-form", async (button) => {
  const how = { method: $("chains-method").value, seed: whole("chains-seed"), count: 16, sweeps: whole("chains-sweeps") };
  const answer = await ask("start_chains", how, button);
  if (answer) runChains(how, answer.chains);
});
$("pause").addEventListener("click", async () => {
  running++;
  $("pause").disabled = true;
  for (const each of $("chains-tiles").querySelectorAll(".tile")) {
    const answer = await ask("read", { image: each.querySelector("img").src });
    if (answer) each.querySelector(".figures").replaceWith(scored(answer.picture));
  }
  scoreWaiting();
});
$("show-filters").addEventListener("click", async () => {
  const answer = await ask("filters", {}, $("show-filters"));
  if (answer) Object.assign($("filters-picture"), { src: answer.picture, hidden: false, alt: "Weights of up to a hundred hidden units, as images" });
});

// The beginning.

async function begin() {
  model = await ask("about", {});
  if (!model) return;
  model.short = model.unit === "bits/dim" ? " bits/dim" : " nats";
  document.title = `flowgen explore ${model.run}`;
  const [channels, height, width] = model.shape;
  $("about").textContent = `${model.run}: ${model.model} of ${model.data}, ${width}x${height}${channels === 3 ? " in colour" : ""}, ${model.bits} bit${model.bits > 1 ? "s" : ""}, step ${model.step}`;
  $("temperature").value = model.temperature;
  for (let label = 0; label < (model.num_classes ?? 0); label++) $("label").append(element("option", { value: label, textContent: label }));
  for (const list of document.querySelectorAll("select.methods")) list.append(...model.methods.map((name) => element("option", { textContent: name })));
  if (model.able_to.chains) $("sampler").value = "tempering"; // as flowgen sample
  for (const each of document.querySelectorAll(".classes")) each.hidden = !model.able_to.classes;
  for (const each of document.querySelectorAll("label.chains, #chains, #filters")) each.hidden = !model.able_to.chains;
  document.querySelector(".methods-label").hidden = model.methods.length < 2;
  $("complete").hidden = !model.able_to.complete;
  for (const input of document.querySelectorAll("input[type=range]")) showValue(input);
  for (const slot of ["A", "B"]) showHand(slot);
  watchPercentiles();
  if (model.able_to.classes) findDirections(); // which such a model knows
  await drawSamples();
}

async function watchPercentiles() {
  const hint = $("percentile-hint");
  const { percentiles, no_percentiles: reason } = await post("doing", {}).catch(() => ({}));
  if (percentiles) hint.textContent = "Percentile: so many of a hundred validation images are likelier.";
  else hint.textContent = reason ? `No percentiles: ${reason}.` : "Percentiles come as soon as validation images have been scored.";
  if (percentiles) scoreAgain();
  else if (!reason) setTimeout(watchPercentiles, 3000);
}
begin();
