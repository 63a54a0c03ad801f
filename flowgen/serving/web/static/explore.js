"use strict";
// An image is the data URL of a PNG that holds the model's pixel values exactly.
// The user selects two images, A and B. The server computes everything else.

const MAX_FILE_BYTES = 5.5e6; // base64 adds a third, and the server accepts 8 MiB
const MAX_DRAWS_SHOWN = 10;
const NUM_CHAINS = 16;
const STATUS_INTERVAL_MS = 1000;
const PERCENTILE_INTERVAL_MS = 3000;
const FRAME_INTERVAL_MS = 120;

const $ = (id) => document.getElementById(id);
const selection = { A: null, B: null };
let model = null;

function createElement(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function showMessage(text, isError = false) {
  $("message").textContent = text;
  $("message").classList.toggle("error", isError);
}

// Requests

async function post(endpoint, payload) {
  const response = await fetch(`/api/${endpoint}`, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(payload),
  });
  const result = await response.json();
  if (!response.ok) throw new Error(result.error);
  return result;
}

// The payload of the newest request to each endpoint. Responses to older requests are ignored, so
// that they do not replace a newer result.
const newestPayload = {};
const INDEPENDENT = ["advance_chains", "upload"]; // endpoints with several valid requests at once

// Send a request and return the result, or null after an error or if there is a newer request.
// During a long request, show the server's status. Requests with a request_id can be stopped.
async function request(endpoint, payload, button = null) {
  if (button) button.disabled = true;
  newestPayload[endpoint] = payload;
  const isOutdated = () => newestPayload[endpoint] !== payload && !INDEPENDENT.includes(endpoint);
  let isDone = false;
  const timer = setInterval(async () => {
    const { status } = await post("status", {}).catch(() => ({ status: "" }));
    if (isDone) return;
    if (status) showMessage(`${status} …`);
    if (payload.request_id) $("stop").hidden = false;
  }, STATUS_INTERVAL_MS);
  try {
    const result = await post(endpoint, payload);
    if (isOutdated()) return null;
    if (endpoint !== "advance_chains") showMessage(""); // running chains must not clear messages
    return result;
  } catch (error) {
    if (isOutdated()) return null;
    const isOffline = error instanceof TypeError; // raised by fetch
    showMessage(
      isOffline ? "The server does not respond. Is flowgen explore still running?" : error.message,
      true,
    );
    return null;
  } finally {
    isDone = true;
    clearInterval(timer);
    if (payload.request_id && !isOutdated()) $("stop").hidden = true;
    if (button) button.disabled = false;
  }
}

// Scores, computed one after another for the images that are still visible

const scoreQueue = [];
let isScoring = false;

async function processScoreQueue() {
  if (isScoring) return;
  isScoring = true;
  while (scoreQueue.length) {
    const { element, image } = scoreQueue.shift();
    if (!element.isConnected) continue;
    try {
      showScore(element, await post("score", { image }));
    } catch (error) {
      element.textContent = "no score";
      element.title = error.message;
    }
  }
  isScoring = false;
}

function formatNumber(value) {
  return value.toFixed(Math.abs(value) < 100 ? 3 : 1);
}

function showScore(element, score) {
  const isOverflow = score.value === null;
  const value = isOverflow ? "exceeds float32" : model.bound_sign + formatNumber(score.value);
  const percentile = score.percentile === null ? "" : `percentile ${score.percentile.toFixed(0)}`;
  const unit = isOverflow ? "" : model.shortUnit;
  element.replaceChildren(
    createElement("b", { textContent: value }),
    unit,
    createElement("br"),
    percentile,
  );
  element.title = `${value} ${model.unit}`;
  if (percentile) {
    const hint = "the percentage of validation images that are more likely";
    element.title += `, ${percentile}: ${hint}. p = ${score.p_value.toFixed(4)}`;
  }
  const button = element.closest("button");
  if (button) {
    const label = `${button.dataset.name}: ${value} ${model.unit}, ${percentile}`;
    button.setAttribute("aria-label", label);
  }
  if (element.closest("#slot-A")) showCommand("score-command", score.command);
}

function createScore(image) {
  const element = createElement("span", { className: "score", textContent: "…" });
  element.dataset.image = image;
  scoreQueue.push({ element, image });
  return element;
}

function refreshScores() {
  for (const element of document.querySelectorAll(".score[data-image]")) {
    scoreQueue.push({ element, image: element.dataset.image });
  }
  processScoreQueue();
}

// Tiles: images that can be selected

function createTile(image, name, { hasScore = true, caption = "" } = {}) {
  const text = hasScore
    ? createScore(image)
    : createElement("span", { className: "score", textContent: caption });
  const picture = createElement("img", { src: image, alt: "" });
  const tile = createElement(
    "button",
    { type: "button", className: "tile", title: "Select" },
    picture,
    text,
  );
  tile.dataset.name = name;
  tile.setAttribute("aria-label", name);
  tile.addEventListener("click", async () => {
    // Images without a score may be probabilities. The server converts them to pixel values.
    const pixels = hasScore ? image : (await request("upload", { image }))?.image;
    if (pixels) selectImage(pixels, name);
    for (const pressed of document.querySelectorAll(".tile[aria-pressed]"))
      pressed.removeAttribute("aria-pressed");
    tile.setAttribute("aria-pressed", "true");
  });
  return tile;
}

function showTiles(id, tiles) {
  $(id).replaceChildren(...tiles);
  processScoreQueue();
}

document.addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
  const group = document.activeElement?.closest(".tiles");
  if (!step || !group) return;
  const tiles = [...group.querySelectorAll(".tile")];
  const index = tiles.indexOf(document.activeElement) + step;
  tiles[Math.min(Math.max(index, 0), tiles.length - 1)].focus();
  event.preventDefault();
});

// The selected images A and B

function selectImage(image, name, slot = document.querySelector("[name=target]:checked").value) {
  selection[slot] = { image, name };
  if (slot === "A" && !selection.B) document.querySelector("[name=target][value=B]").checked = true;
  showSlot(slot);
  showMessage(`${name} is ${slot}.`);
}

function showSlot(slot) {
  const selected = selection[slot];
  const input = createElement("input", {
    type: "file",
    accept: "image/png,image/jpeg,image/webp,image/gif,image/bmp",
  });
  input.setAttribute("aria-label", `Open an image file as ${slot}`);
  input.addEventListener("change", () => openFile(input.files[0], slot));
  const title = createElement("h3", { textContent: slot });
  const buttons = createElement(
    "span",
    { className: "buttons" },
    createElement("label", { className: "button" }, "Open", input),
  );
  if (selected) {
    const download = `${slot.toLowerCase()}.png`;
    buttons.append(
      createElement("a", {
        className: "button",
        href: selected.image,
        download,
        textContent: "Save",
      }),
    );
    const picture = createElement("img", { src: selected.image, alt: `${slot}: ${selected.name}` });
    $(`slot-${slot}`).replaceChildren(title, picture, createScore(selected.image), buttons);
  } else {
    const placeholder = createElement("div", { className: "empty", textContent: "drop an image" });
    $(`slot-${slot}`).replaceChildren(title, placeholder, buttons);
  }
  processScoreQueue();
  if (slot === "A" && model.capabilities.inpainting) startBrush();
}

function readDataUrl(file) {
  return new Promise((resolve) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(reader.result));
    reader.addEventListener("error", () => resolve(null));
    reader.readAsDataURL(file);
  });
}

async function openFile(file, slot) {
  if (!file) return;
  if (file.size > MAX_FILE_BYTES) {
    showMessage("The file is larger than 5.5 MB. Shrink the image first.", true);
    return;
  }
  const image = await readDataUrl(file);
  const result = image && (await request("upload", { image }));
  if (result) selectImage(result.image, "Your image", slot);
}

for (const slot of ["A", "B"]) {
  const element = $(`slot-${slot}`);
  element.addEventListener("dragover", () => element.classList.add("over"));
  for (const type of ["dragleave", "drop"])
    element.addEventListener(type, () => element.classList.remove("over"));
  element.addEventListener("drop", (event) => openFile(event.dataTransfer.files[0], slot));
}
// Otherwise the browser would leave the page to show a file that is dropped outside of the slots.
for (const type of ["dragover", "drop"])
  document.addEventListener(type, (event) => event.preventDefault());
$("swap").addEventListener("click", () => {
  [selection.A, selection.B] = [selection.B, selection.A];
  showSlot("A");
  showSlot("B");
});

// Commands and sliders

function showCommand(id, text) {
  const code = createElement("code", { textContent: text });
  const button = createElement("button", { type: "button", textContent: "Copy" });
  button.setAttribute("aria-label", `Copy ${text}`);
  button.addEventListener("click", () => {
    const selectText = () => getSelection().selectAllChildren(code); // if the clipboard is blocked
    navigator.clipboard.writeText(text).then(() => showMessage("Copied."), selectText);
  });
  $(id).replaceChildren(code, button);
  $(id).hidden = false;
}

function showValue(input) {
  const output = document.querySelector(`output[for="${input.id}"]`);
  if (!output) return;
  output.textContent =
    input.id === "share" ? `${Math.round((100 * input.value) / input.max)} %` : input.value;
}
document.addEventListener("input", (event) => showValue(event.target));

const intValue = (id) => Number.parseInt($(id).value, 10);

function onSubmit(id, action) {
  $(id).addEventListener("submit", (event) => {
    event.preventDefault();
    action(event.submitter ?? $(id).querySelector("button"));
  });
}

// Samples

async function drawSamples(button = $("sample-form").querySelector("button")) {
  const payload = {
    count: intValue("count"),
    temperature: Number($("temperature").value),
    seed: intValue("seed"),
  };
  if (model.capabilities.classes && $("label").value) payload.label = intValue("label");
  if (model.capabilities.chains)
    Object.assign(payload, { sampler: $("sampler").value, steps: intValue("sample-steps") });
  const result = await request("sample", payload, button);
  if (!result) return;
  const tiles = result.images.map((image, index) =>
    createTile(image, `Sample ${index + 1} of seed ${result.seed}`),
  );
  showTiles("sample-tiles", tiles);
  showCommand("sample-command", result.command);
}
onSubmit("sample-form", drawSamples);
for (const id of ["temperature", "label", "count", "sampler", "sample-steps"]) {
  $(id).addEventListener("change", () => $("sample-form").requestSubmit());
}
$("next-seed").addEventListener("click", () => {
  $("seed").value = intValue("seed") + 1;
  $("sample-form").requestSubmit();
});

// Interpolation

let latentImages = [];

onSubmit("interpolation-form", async (button) => {
  if (!selection.A || !selection.B) {
    showMessage("Select two images first, A and B.", true);
    return;
  }
  const first = selection.A.image;
  const second = selection.B.image;
  const payload = {
    first,
    second,
    steps: intValue("interpolation-steps"),
    spherical: $("spherical").checked,
  };
  const result = await request("interpolate", payload, button);
  if (!result) return;
  latentImages = result.latent;
  $("share").max = latentImages.length - 1;
  $("share").value = (latentImages.length - 1) / 2;
  $("interpolation-result").hidden = false;
  $("inexact").hidden = latentImages[0] === first && latentImages.at(-1) === second;
  showMixture();
  showTiles(
    "latent-tiles",
    result.latent.map((image, index) => createTile(image, `Step ${index} through the latents`)),
  );
  showTiles(
    "pixels-tiles",
    result.pixels.map((image, index) => createTile(image, `Step ${index} through the pixels`)),
  );
  showCommand("interpolation-command", result.command);
});

function showMixture() {
  showValue($("share"));
  const percent = document.querySelector("output[for=share]").textContent;
  showTiles("mixture", [
    createTile(latentImages[intValue("share")], `The mixture with ${percent} of B`),
  ]);
}
$("share").addEventListener("input", showMixture);

// Attributes, with one slider each

const displayName = (attribute) => attribute.replaceAll("_", " ");

function createSlider(attribute, index) {
  const slider = createElement("input", {
    type: "range",
    id: `amount-${index}`,
    min: -2,
    max: 2,
    step: 0.1,
    value: 0,
  });
  slider.dataset.attribute = attribute;
  const output = createElement("output", { textContent: "0" });
  output.setAttribute("for", slider.id);
  return createElement("label", {}, `${displayName(attribute)} `, output, slider);
}

async function findDirections() {
  const result = await request("attributes", {}, $("find-directions"));
  if (!result) return;
  $("find-directions").hidden = true;
  $("edit-form").hidden = false;
  $("edit-hint").textContent =
    "An amount of 1 leads from the average training image without an attribute " +
    "to the average image with it, or from the class of A to another class.";
  $("amounts").replaceChildren(...result.attributes.map(createSlider));
}

async function editImage() {
  const amounts = {};
  for (const slider of $("amounts").querySelectorAll("input")) {
    if (Number(slider.value) !== 0) amounts[slider.dataset.attribute] = Number(slider.value);
  }
  if (!selection.A) {
    showMessage("Select an image as A first.", true);
    return;
  }
  const image = selection.A.image;
  const changes = Object.entries(amounts).map(
    ([attribute, amount]) => `${displayName(attribute)} by ${amount}`,
  );
  if (!changes.length) {
    clearEdit();
    return;
  }
  const result = await request("edit", { image, amounts });
  if (!result) return;
  showTiles("edit-tiles", [
    createTile(image, "A unchanged"),
    createTile(result.image, `A with ${changes.join(", ")}`),
  ]);
  showCommand("edit-command", result.command);
}

function clearEdit() {
  delete newestPayload.edit; // the response of a running request is ignored
  showTiles("edit-tiles", []);
  $("edit-command").hidden = true;
}
$("find-directions").addEventListener("click", findDirections);
$("amounts").addEventListener("change", editImage);
$("edit-form").addEventListener("submit", (event) => event.preventDefault());
$("reset").addEventListener("click", () => {
  for (const slider of $("amounts").querySelectorAll("input")) {
    slider.value = 0;
    showValue(slider);
  }
  clearEdit();
});

// The brush. `erased` has one entry per pixel; `scale` is the side of a pixel on the canvas.

const brush = { erased: new Uint8Array(0), image: new Image(), x: 0, y: 0, scale: 1 };

function startBrush() {
  const [, height, width] = model.shape;
  brush.erased = new Uint8Array(height * width);
  brush.scale = Math.max(4, Math.floor(512 / Math.max(height, width)));
  Object.assign($("canvas"), { width: width * brush.scale, height: height * brush.scale });
  brush.x = width >> 1;
  brush.y = height >> 1;
  $("known").value = "all";
  brush.image = new Image();
  brush.image.addEventListener("load", showBrush);
  if (selection.A) brush.image.src = selection.A.image;
}

function showBrush() {
  drawCanvas();
  const numErased = brush.erased.reduce((sum, isErased) => sum + isErased, 0);
  const text = numErased
    ? `${numErased} of ${brush.erased.length} pixels are erased.`
    : "No pixels are erased. Paint on the image or choose the known pixels.";
  // Screen readers announce every assignment.
  if ($("erased").textContent !== text) $("erased").textContent = text;
  $("save-mask").href = maskUrl();
}

function drawCanvas() {
  const width = model.shape[2];
  const canvas = $("canvas");
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  context.drawImage(brush.image, 0, 0, canvas.width, canvas.height);
  const side = brush.scale;
  brush.erased.forEach((isErased, index) => {
    if (!isErased) return;
    const x = index % width;
    const y = Math.floor(index / width);
    context.fillStyle = (x + y) % 2 ? "#c8783c" : "#d99a68";
    context.fillRect(x * side, y * side, side, side);
  });
  if (document.activeElement === canvas) {
    const size = intValue("brush-size");
    const left = brush.x - (size >> 1);
    const top = brush.y - (size >> 1);
    context.strokeStyle = "#2f8fe0";
    context.lineWidth = 2;
    context.strokeRect(left * side, top * side, size * side, size * side);
  }
}

// The mask as a PNG: white pixels are known.
function maskUrl() {
  const [, height, width] = model.shape;
  const mask = createElement("canvas", { width, height });
  const pixels = new ImageData(width, height);
  brush.erased.forEach((isErased, index) => {
    const gray = isErased ? 0 : 255;
    pixels.data.set([gray, gray, gray, 255], 4 * index);
  });
  mask.getContext("2d").putImageData(pixels, 0, 0);
  return mask.toDataURL("image/png");
}

function paint(x, y, erase) {
  const [, height, width] = model.shape;
  const size = intValue("brush-size");
  const left = x - (size >> 1);
  const top = y - (size >> 1);
  brush.x = x;
  brush.y = y;
  for (let row = Math.max(top, 0); row < Math.min(top + size, height); row++) {
    for (let column = Math.max(left, 0); column < Math.min(left + size, width); column++) {
      brush.erased[row * width + column] = erase ? 1 : 0;
    }
  }
  showBrush();
}

function paintAtPointer(event) {
  const [, height, width] = model.shape;
  const box = $("canvas").getBoundingClientRect();
  const x = Math.floor(((event.clientX - box.left) / box.width) * width);
  const y = Math.floor(((event.clientY - box.top) / box.height) * height);
  paint(x, y, document.querySelector("[name=brush]:checked").value === "erase");
}
$("canvas").addEventListener("pointerdown", (event) => {
  $("canvas").setPointerCapture(event.pointerId);
  paintAtPointer(event);
});
$("canvas").addEventListener("pointermove", (event) => {
  if (event.buttons) paintAtPointer(event);
});
$("canvas").addEventListener("keydown", (event) => {
  const [, height, width] = model.shape;
  const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  const move = moves[event.key];
  if (move) {
    brush.x = Math.min(Math.max(brush.x + move[0], 0), width - 1);
    brush.y = Math.min(Math.max(brush.y + move[1], 0), height - 1);
    showBrush();
  } else if (event.key === " ") paint(brush.x, brush.y, true);
  else if (event.key.toLowerCase() === "r") paint(brush.x, brush.y, false);
  else return;
  event.preventDefault();
});
for (const type of ["focus", "blur"]) $("canvas").addEventListener(type, showBrush);
$("known").addEventListener("change", () => {
  const [, height, width] = model.shape;
  const top = Math.floor(height / 4);
  const left = Math.floor(width / 4);
  const isKnown = {
    all: () => true,
    left: (x) => x < Math.floor(width / 2),
    right: (x) => x >= Math.floor(width / 2),
    top: (x, y) => y < Math.floor(height / 2),
    bottom: (x, y) => y >= Math.floor(height / 2),
    border: (x, y) => x < left || x >= width - left || y < top || y >= height - top,
  }[$("known").value];
  brush.erased = brush.erased.map((_, index) =>
    isKnown(index % width, Math.floor(index / width)) ? 0 : 1,
  );
  showBrush();
});

// Inpainting

let inpaintingId = ""; // the request that the Stop button cancels

onSubmit("complete-form", async (button) => {
  if (!selection.A) {
    showMessage("Select an image as A first.", true);
    return;
  }
  inpaintingId = crypto.randomUUID();
  const payload = {
    image: selection.A.image,
    mask: $("save-mask").href,
    sampler: $("complete-sampler").value,
    steps: intValue("complete-steps"),
    seed: intValue("complete-seed"),
    request_id: inpaintingId,
  };
  const result = await request("complete", payload, button);
  if (!result) return;
  $("complete-result").hidden = false;
  const draws = result.draws.slice(0, MAX_DRAWS_SHOWN);
  const hasScore = model.bits > 1; // draws of an RBM are probabilities
  showTiles("complete-tiles", [
    createTile(result.mean, "The mean of the completions", { hasScore: false, caption: "mean" }),
    createTile(result.spread, "Twice the standard deviation of the completions", {
      hasScore: false,
      caption: "spread",
    }),
    ...draws.map((image, index) => createTile(image, `Completion ${index + 1}`, { hasScore })),
  ]);
  const metrics = Object.entries(result.metrics).map(
    ([name, value]) =>
      `${displayName(name)} ${name === "bits_per_dim" ? model.bound_sign : ""}${value.toFixed(3)}`,
  );
  $("complete-metrics").textContent =
    `${draws.length} of ${result.draws.length} draws. ${metrics.join(", ")}`;
  showCommand("complete-command", result.command);
});
$("stop").addEventListener("click", () => post("cancel", { request_id: inpaintingId }));

// Markov chains

let chainsRun = 0; // Start and Pause increase it, which ends the loop of earlier chains

async function runChains(options, chainId) {
  const run = ++chainsRun;
  $("pause").disabled = false;
  for (let frames = 0; run === chainsRun; frames++) {
    const steps = frames ? options.steps : 1; // the first step returns the initial noise
    const result = await request("advance_chains", {
      ...options,
      chain_id: chainId,
      frames,
      steps,
    });
    if (!result || run !== chainsRun) break;
    const tiles = result.images.map((image, index) =>
      createTile(image, `Chain ${index + 1}`, { hasScore: false }),
    );
    showTiles("chains-tiles", tiles);
    $("chains-step").textContent = `P(v = 1) after step ${frames * options.steps}.`;
    showCommand("chains-command", result.command);
    await new Promise((resolve) => setTimeout(resolve, FRAME_INTERVAL_MS));
  }
}
onSubmit("chains-form", async (button) => {
  const options = {
    sampler: $("chains-sampler").value,
    seed: intValue("chains-seed"),
    count: NUM_CHAINS,
    steps: intValue("chains-steps"),
  };
  const result = await request("start_chains", options, button);
  if (result) runChains(options, result.chain_id);
});
$("pause").addEventListener("click", async () => {
  chainsRun++;
  $("pause").disabled = true;
  for (const tile of $("chains-tiles").querySelectorAll(".tile")) {
    const result = await request("upload", { image: tile.querySelector("img").src });
    if (result) tile.querySelector(".score").replaceWith(createScore(result.image));
  }
  processScoreQueue();
});
$("show-filters").addEventListener("click", async () => {
  const result = await request("filters", {}, $("show-filters"));
  if (!result) return;
  const alt = "Weights of up to a hundred hidden units as images";
  Object.assign($("filters-image"), { src: result.image, hidden: false, alt });
});

// Start of the page

function describeModel() {
  const [channels, height, width] = model.shape;
  const color = channels === 3 ? " in color" : "";
  const bits = model.bits > 1 ? `${model.bits} bits` : "1 bit";
  const size = `${width}x${height}${color}, ${bits}`;
  return `${model.run}: ${model.model} trained on ${model.data}, ${size}, step ${model.step}`;
}

async function startPage() {
  model = await request("about", {});
  if (!model) return;
  model.shortUnit = model.unit === "bits/dim" ? " bits/dim" : " nats";
  document.title = `flowgen explore ${model.run}`;
  $("about").textContent = describeModel();
  const [, height, width] = model.shape;
  document.documentElement.style.setProperty("--image-ratio", `${width} / ${height}`);
  $("temperature").value = model.temperature;
  for (let label = 0; label < (model.num_classes ?? 0); label++) {
    $("label").append(createElement("option", { value: label, textContent: label }));
  }
  for (const list of document.querySelectorAll("select.samplers")) {
    list.append(...model.samplers.map((name) => createElement("option", { textContent: name })));
  }
  const { classes, chains, inpainting } = model.capabilities;
  if (chains) $("sampler").value = "tempering"; // the default of flowgen sample
  for (const element of document.querySelectorAll(".classes")) element.hidden = !classes;
  for (const element of document.querySelectorAll("label.chains, #chains, #filters"))
    element.hidden = !chains;
  $("complete-sampler-label").hidden = model.samplers.length < 2;
  $("complete").hidden = !inpainting;
  for (const input of document.querySelectorAll("input[type=range]")) showValue(input);
  showSlot("A");
  showSlot("B");
  waitForPercentiles();
  if (classes) findDirections(); // class-conditional models need no computation
  await drawSamples();
}

async function waitForPercentiles() {
  const { percentiles, scorer_error: error } = await post("status", {}).catch(() => ({}));
  if (percentiles) {
    $("percentile-hint").textContent =
      "Percentile: the percentage of validation images that are more likely.";
    refreshScores();
  } else if (error) {
    $("percentile-hint").textContent = `Percentiles are unavailable: ${error}.`;
  } else {
    $("percentile-hint").textContent =
      "Percentiles appear when the validation images have been scored.";
    setTimeout(waitForPercentiles, PERCENTILE_INTERVAL_MS);
  }
}
startPage();
