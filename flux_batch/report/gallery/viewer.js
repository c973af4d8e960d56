"use strict";
// The gallery's page. It holds all rows by columns, but only the images near the screen. Values of rows are not trusted:
// they become text and never HTML. The chunks beside the page call gallery.rows and gallery.thumbnails.

const $ = (id) => document.getElementById(id);
const { runs, columns: shownColumns } = JSON.parse($("runs").textContent);
const TEXT_HEIGHT = 112, GAP = 12, MAX_HEIGHT = 15e6; // browsers limit a page to 17 to 33 million pixels
const LOADING_AT_ONCE = 6, CHUNKS_IN_MEMORY = 300, MAX_CHOICES = 40;
const READS = new Intl.NumberFormat("en");

// --- rows, by columns -------------------------------------------------------------------------------------------

class Run {
  constructor({ name, folder, num_rows, num_failed, original }) {
    Object.assign(this, { name, folder, original, numFailed: num_failed, size: num_rows, loaded: 0 });
    this.columns = new Map(); // name -> values
    this.chunk = new Array(num_rows); // the chunk of each row's thumbnail
    this.place = new Uint8Array(num_rows); // its index in the chunk
    this.orders = new Map();
  }

  add({ num, columns, thumbnails }) {
    for (const [name, { all, values, codes, each }] of Object.entries(columns)) {
      if (!this.columns.has(name)) this.columns.set(name, new Array(this.size).fill(null));
      const column = this.columns.get(name);
      for (let row = 0; row < num; row++) column[this.loaded + row] = each ? each[row] : codes ? values[codes[row]] : all;
    }
    for (const [chunk, rows] of Object.entries(thumbnails)) {
      for (const [row, place] of rows) {
        this.chunk[this.loaded + row] = chunk;
        this.place[this.loaded + row] = place;
      }
    }
    this.loaded += num;
    this.orders.clear();
    this.identities = undefined;
  }

  value(name, row) { return this.columns.get(name)?.[row] ?? null; }

  isNumeric(name) { return this.columns.get(name).every((value) => value === null || typeof value === "number"); }

  // The values of a column, most frequent first; null if there are too many to choose from.
  choices(name) {
    const counts = new Map();
    for (const value of this.columns.get(name)) {
      if (value !== null) counts.set(value, (counts.get(value) ?? 0) + 1);
      if (counts.size > MAX_CHOICES) return null;
    }
    return [...counts].sort((a, b) => b[1] - a[1]);
  }

  // The rows in the order of a column, those without a value last; cached, since every filter needs it.
  order(name, descending) {
    if (!this.orders.has(name)) this.orders.set(name, this.sorted(name));
    const { rows, numWithValue } = this.orders.get(name);
    if (!descending) return rows;
    const turned = rows.slice();
    turned.subarray(0, numWithValue).reverse();
    return turned;
  }

  sorted(name) {
    const rows = Uint32Array.from({ length: this.loaded }, (_, row) => row);
    const values = this.columns.get(name);
    if (!values) return { rows, numWithValue: this.loaded };
    const some = rows.filter((row) => values[row] !== null);
    some.sort((a, b) => (values[a] < values[b] ? -1 : values[a] > values[b] ? 1 : a - b));
    const sorted = new Uint32Array(this.loaded);
    sorted.set(some);
    sorted.set(rows.filter((row) => values[row] === null), some.length);
    return { rows: sorted, numWithValue: some.length };
  }

  // The index of every row, by id and image index.
  get byIdentity() {
    if (!this.identities) {
      this.identities = new Map();
      for (let row = 0; row < this.loaded; row++) this.identities.set(this.identity(row), row);
    }
    return this.identities;
  }

  identity(row) { return `${this.value("image_index", row) ?? 0}\0${this.value("id", row)}`; }
}

const [run, beside] = runs.map((each) => new Run(each));
if (beside?.name === run.name) beside.name += " (beside)";
const twin = (row) => beside?.byIdentity.get(run.identity(row));
const isMade = (row) => run.value("status", row) === "success";

function plain(value) {
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (typeof value === "number" && !Number.isInteger(value)) return String(Number(value.toPrecision(6)));
  return String(value ?? "");
}

// --- thumbnails: loaded as scripts, the most recently requested first -------------------------------------------

const thumbnails = {
  chunks: new Map(), // "folder/chunk" -> images in base64, "lost", or undefined while it loads; oldest first
  loading: 0,
  wanted: [],
  policy: window.trustedTypes?.createPolicy("chunks", {
    createScriptURL: (address) => {
      if (!/^(run|beside)\/thumbnails\/\d+\/\d+-[0-9a-f]+(-some)?\.js$/.test(address)) throw new TypeError(address);
      return address;
    },
  }),

  // The address of an image: "" while it loads, null if there is none.
  of(which, row) {
    const chunk = which.chunk[row];
    const found = chunk && this.chunks.get(`${which.folder}/${chunk}`);
    if (!chunk || found === "lost") return null;
    return found ? `data:image/webp;base64,${found[which.place[row]]}` : "";
  },

  want(names) {
    this.wanted = names;
    this.load();
  },

  load() {
    for (const name of this.wanted) {
      if (this.loading >= LOADING_AT_ONCE) return;
      if (this.chunks.has(name)) continue;
      this.chunks.set(name, undefined);
      this.loading++;
      const script = document.createElement("script");
      const [folder, ...rest] = name.split("/");
      const address = `${folder}/thumbnails/${rest.join("/")}.js`;
      script.chunk = name;
      script.src = this.policy ? this.policy.createScriptURL(address) : address;
      script.onerror = () => this.chunks.set(name, "lost");
      script.onload = () => { if (!this.chunks.get(name)) this.chunks.set(name, "lost"); };
      for (const end of ["load", "error"]) script.addEventListener(end, () => this.loaded(script));
      document.head.append(script);
    }
  },

  loaded(script) {
    script.remove();
    this.loading--;
    for (const name of this.chunks.keys()) {
      if (this.chunks.size <= CHUNKS_IN_MEMORY) break;
      if (!this.wanted.includes(name) && this.chunks.get(name)) this.chunks.delete(name);
    }
    grid.fill();
    if (large.dialog.open) large.fill();
    this.load();
  },
};

// --- marks ------------------------------------------------------------------------------------------------------

const marks = {
  name: `flux-batch gallery ${location.pathname}`,
  of: new Map(), // key -> "keep" or "drop"

  read() {
    try { this.of = new Map(JSON.parse(localStorage.getItem(this.name) ?? "[]")); } catch { /* no storage: marks are not saved */ }
  },

  set(row, mark) {
    const key = run.value("key", row);
    if (!isMade(row)) return;
    if (mark && this.of.get(key) !== mark) this.of.set(key, mark); else this.of.delete(key);
    this.changed();
  },

  clear() {
    this.of.clear();
    this.changed();
  },

  changed() {
    try { localStorage.setItem(this.name, JSON.stringify([...this.of])); } catch { /* as above */ }
    grid.fill();
    view.count();
    if (large.dialog.open) large.fill();
  },

  get: (row) => marks.of.get(run.value("key", row)),
  num: (mark) => [...marks.of.values()].filter((each) => each === mark).length,
};

function download(name, keys) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([`key\n${keys.map((key) => `${key}\n`).join("")}`], { type: "text/csv" }));
  link.download = `${run.name.replace(/[^\w.-]+/g, "-")}-${name}.csv`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

// --- the rows that are shown, in their order --------------------------------------------------------------------

const view = {
  rows: new Uint32Array(),
  filters: new Map(), // column -> a test of its value

  update() {
    const words = $("search").value.split(/\s+/).filter(Boolean).map(literal);
    const prompts = run.columns.get("prompt") ?? [];
    const tests = [...this.filters].map(([name, test]) => [run.columns.get(name), test]);
    const show = SHOWN.get($("show").value || "all");
    const rows = run.order($("sort").value, $("direction").ariaPressed === "true").filter((row) =>
      show(row) && words.every((word) => word.test(prompts[row])) &&
      tests.every(([values, test]) => test(values[row])));
    this.rows = rows;
    this.count();
    grid.reset();
  },

  count() {
    const [kept, dropped] = [marks.num("keep"), marks.num("drop")];
    $("count").textContent = `${READS.format(this.rows.length)} of ${READS.format(run.size)}` +
      (kept || dropped ? `; ${READS.format(kept)} kept, ${READS.format(dropped)} dropped` : "");
    $("keep-file").disabled = !kept;
    $("clear").disabled = !kept && !dropped;
  },
};

const SHOWN = new Map([
  ["all", () => true],
  ["images", isMade],
  ["failed", (row) => !isMade(row)],
  ["kept", (row) => marks.get(row) === "keep"],
  ["dropped", (row) => marks.get(row) === "drop"],
  ["without a mark", (row) => isMade(row) && !marks.get(row)],
]);

const literal = (word) => new RegExp(word.replace(/[\\^$.*+?()[\]{}|]/g, "\\$&"), "i");

// --- the grid ---------------------------------------------------------------------------------------------------

const grid = {
  list: $("cards"),
  cards: new Map(), // place in view.rows -> element
  current: 0, // the place that the keyboard acts on

  reset() {
    for (const card of this.cards.values()) card.remove();
    this.cards.clear();
    this.current = Math.max(0, Math.min(this.current, view.rows.length - 1));
    this.layout();
  },

  layout() {
    const width = this.list.clientWidth, size = Number($("size").value) * (beside ? 2 : 1);
    this.perLine = Math.max(1, Math.floor((width + GAP) / (size + GAP)));
    this.width = (width + GAP) / this.perLine - GAP;
    this.imageHeight = beside ? this.width / 2 : this.width;
    this.lineHeight = this.imageHeight + TEXT_HEIGHT + GAP;
    this.fullHeight = Math.ceil(view.rows.length / this.perLine) * this.lineHeight;
    this.list.style.height = `${Math.min(this.fullHeight, MAX_HEIGHT)}px`;
    this.list.style.setProperty("--image-height", `${this.imageHeight}px`);
    this.draw();
  },

  get above() { return this.list.getBoundingClientRect().top + scrollY; },

  // If a page would be too high, one pixel of scrolling moves by more than one pixel.
  get stretch() {
    const over = (height) => Math.max(1, height - innerHeight);
    return this.fullHeight > MAX_HEIGHT ? over(this.fullHeight) / over(MAX_HEIGHT) : 1;
  },

  draw() {
    const scrolled = Math.max(0, scrollY - this.above), top = scrolled * this.stretch;
    const first = Math.max(0, Math.floor((top - innerHeight / 2) / this.lineHeight)) * this.perLine;
    const last = Math.min(view.rows.length, Math.ceil((top + innerHeight * 1.5) / this.lineHeight) * this.perLine);
    for (const [place, card] of this.cards) {
      if (place < first || place >= last) {
        card.remove();
        this.cards.delete(place);
      }
    }
    for (let place = first; place < last; place++) {
      let card = this.cards.get(place);
      if (!card) {
        card = makeCard(place);
        this.cards.set(place, card);
        this.list.append(card);
      }
      card.style.width = `${this.width}px`;
      card.style.height = `${this.lineHeight - GAP}px`;
      card.style.left = `${(place % this.perLine) * (this.width + GAP)}px`;
      card.style.top = `${Math.floor(place / this.perLine) * this.lineHeight - top + scrolled}px`;
    }
    this.fill();
    const middle = (top + innerHeight / 2) / this.lineHeight * this.perLine;
    const near = [...this.cards.keys()].sort((a, b) => Math.abs(a - middle) - Math.abs(b - middle));
    thumbnails.want([...new Set(near.flatMap((place) => chunksOf(view.rows[place])))]);
  },

  fill() { for (const [place, card] of this.cards) fillCard(card, place); },

  go(place) {
    this.current = Math.max(0, Math.min(place, view.rows.length - 1));
    const top = Math.floor(this.current / this.perLine) * this.lineHeight;
    const bar = $("bar").getBoundingClientRect(), seen = (scrollY - this.above) * this.stretch;
    const hidden = getComputedStyle($("bar")).position === "sticky" ? bar.height + GAP : GAP;
    if (top < seen + hidden) scrollTo(0, this.above + (top - hidden) / this.stretch);
    else if (top + this.lineHeight > seen + innerHeight) {
      scrollTo(0, this.above + (top + this.lineHeight - innerHeight) / this.stretch);
    }
    this.draw();
    this.cards.get(this.current)?.querySelector(".open").focus({ preventScroll: true });
  },
};

const chunksOf = (row) =>
  [[run, row], [beside, beside && twin(row)]].filter(([which, at]) => which && which.chunk[at] !== undefined)
    .map(([which, at]) => `${which.folder}/${which.chunk[at]}`);

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function makeCard(place) {
  const row = view.rows[place];
  const prompt = plain(run.value("prompt", row));
  const open = element("button", { type: "button", className: "open" });
  open.onclick = () => large.show(place);
  open.onfocus = () => { grid.current = place; };
  const buttons = ["keep", "drop"].map((mark) => {
    const button = element("button", { type: "button", className: mark, textContent: mark, tabIndex: -1 });
    button.onclick = () => marks.set(row, mark);
    return button;
  });
  const card = element("li", {}, open,
    element("p", { className: "prompt", dir: "auto", textContent: prompt }),
    element("p", { className: "faint", dir: "auto", textContent: facts(row) }),
    element("div", { className: "marks", hidden: !isMade(row) }, ...buttons));
  card.setAttribute("aria-setsize", view.rows.length);
  card.setAttribute("aria-posinset", place + 1);
  open.setAttribute("aria-label", `${isMade(row) ? "Image" : "Failed"}: ${prompt || run.value("key", row)}`);
  return card;
}

function fillCard(card, place) {
  const row = view.rows[place], mark = marks.get(row);
  const open = card.firstChild;
  open.tabIndex = place === grid.current ? 0 : -1;
  card.dataset.mark = mark ?? "";
  for (const button of card.querySelectorAll(".marks button")) button.ariaPressed = String(button.className === mark);
  if (card.dataset.filled) return;
  const parts = [[run, row], ...(beside ? [[beside, twin(row)]] : [])].map(([which, at]) => imageOf(which, at));
  open.replaceChildren(...parts.map((part) => part.element));
  if (parts.every((part) => part.isFinal)) card.dataset.filled = "yes";
}

// An image, or the reason why there is none; replaced when its chunk has loaded.
function imageOf(which, row, address = null) {
  const note = (text) => element("span", { className: "none", dir: "auto", textContent: text });
  if (row === undefined) return { element: note(`no such row in ${which.name}`), isFinal: true };
  if (which.value("status", row) !== "success") {
    return { element: note(`${plain(which.value("error_type", row))}: ${plain(which.value("error_message", row))}`), isFinal: true };
  }
  const small = thumbnails.of(which, row);
  if (small === null) return { element: note("no thumbnail: its chunk is missing"), isFinal: true };
  if (!small) return { element: element("span", { className: "none" }), isFinal: false };
  const image = element("img", { alt: plain(which.value("prompt", row)), decoding: "async", src: address ?? small });
  if (address) image.onerror = () => { image.onerror = null; image.src = small; };
  return { element: image, isFinal: true };
}

// The text under an image: the requested columns, or seed and size, and the column of the sorting.
function facts(row) {
  const named = (name) => `${name} ${plain(run.value(name, row))}`;
  const names = shownColumns ?? ["seed"];
  const sort = $("sort").value;
  const isThere = (name) => run.value(name, row) !== null;
  const sorted = sort && sort !== "prompt" && !names.includes(sort) && isThere(sort) ? [sort] : [];
  const size = shownColumns || !run.value("width", row) ? [] : [`${run.value("width", row)} × ${run.value("height", row)}`];
  return [...sorted.map(named), ...size, ...names.filter(isThere).map(named)].join(" · ");
}

// --- the large view ---------------------------------------------------------------------------------------------

const large = {
  dialog: $("large"),

  show(place) {
    grid.go(place);
    this.place = grid.current; // a browser focuses an earlier card when it closes the dialog
    if (!this.dialog.open) this.dialog.showModal();
    this.fill();
  },

  fill() {
    const row = view.rows[this.place], other = twin(row);
    const rows = [[run, row], ...(beside ? [[beside, other]] : [])];
    $("large-title").textContent = `${plain(run.value("key", row))} · ${READS.format(this.place + 1)} of ${READS.format(view.rows.length)}`;
    $("large-prompt").textContent = plain(run.value("prompt", row));
    $("large-images").replaceChildren(...rows.map(([which, at]) =>
      element("figure", {}, imageOf(which, at, originalOf(which, at)).element,
        element("figcaption", { hidden: !beside, textContent: which.name }))));
    for (const mark of ["keep", "drop"]) {
      const button = this.dialog.querySelector(`[data-do=${mark}]`);
      button.ariaPressed = String(marks.get(row) === mark);
      button.disabled = !isMade(row);
    }
    const names = [...new Set(rows.flatMap(([which]) => [...which.columns.keys()]))].filter((name) => name !== "prompt");
    const lines = names.map((name) => {
      const values = rows.map(([which, at]) => plain(which.value(name, at)));
      return { name, values, differs: new Set(values).size > 1 };
    }).filter(({ values }) => values.some(Boolean)).sort((a, b) => b.differs - a.differs);
    const titles = beside ? ["setting", run.name, beside.name] : [];
    const head = titles.length ? [element("tr", {}, ...titles.map((title) => element("th", { scope: "col", textContent: title })))] : [];
    $("large-values").replaceChildren(...head, ...lines.map(({ name, values, differs }) =>
      element("tr", { className: differs ? "differs" : "" }, element("th", { scope: "row", textContent: name }),
        ...values.map((value) => element("td", {}, element("bdi", { textContent: value }))))));
    thumbnails.want(chunksOf(row));
  },

  act(action) {
    const row = view.rows[this.place];
    if (action === "close") this.dialog.close();
    else if (action === "previous") this.show(this.place - 1);
    else if (action === "next") this.show(this.place + 1);
    else marks.set(row, action);
  },
};

// The address of an image's own file, if it has one.
function originalOf(which, row) {
  if (!which.original || which !== run || row === undefined) return null;
  const [shard] = (which.chunk[row] ?? "").split("/");
  return shard && which.original.replace("{shard}", shard).replace("{key}", encodeURIComponent(which.value("key", row)));
}

// --- filters ----------------------------------------------------------------------------------------------------

function addFilter(name, chosen = []) {
  document.querySelector(`#filters > [data-column="${CSS.escape(name)}"]`)?.remove();
  const choices = run.isNumeric(name) && !chosen.length ? null : run.choices(name);
  const [inputs, test] = choices ? choiceFilter(choices, chosen) : run.isNumeric(name) ? rangeFilter(name) : textFilter(name);
  const remove = element("button", { type: "button", textContent: "Remove" });
  remove.setAttribute("aria-label", `Remove the filter of ${name}`);
  const box = element("li", {}, element("fieldset", {}, element("legend", { textContent: name }), ...inputs, remove));
  box.dataset.column = name;
  remove.onclick = () => {
    view.filters.delete(name);
    box.remove();
    $("filter").focus();
    view.update();
  };
  const change = () => {
    view.filters.set(name, test());
    view.update();
  };
  box.oninput = change;
  $("filters").append(box);
  change();
  inputs[0]?.querySelector("input").focus();
}

function choiceFilter(choices, chosen) {
  const boxes = choices.map(([value, count]) => {
    const input = element("input", { type: "checkbox", checked: chosen.includes(value) });
    return { value, input, label: element("label", {}, input, ` ${plain(value) || "(empty)"} (${READS.format(count)})`) };
  });
  return [boxes.map((box) => box.label), () => {
    const wanted = new Set(boxes.filter((box) => box.input.checked).map((box) => box.value));
    return wanted.size ? (value) => wanted.has(value) : () => true;
  }];
}

function rangeFilter(name) {
  const [low, high] = run.columns.get(name).reduce(([low, high], value) =>
    value === null ? [low, high] : [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
  const ends = ["from", "to"].map((word, end) => {
    const input = element("input", { type: "number", step: "any", placeholder: plain([low, high][end]) });
    return { input, label: element("label", {}, `${word} `, input) };
  });
  return [ends.map((end) => end.label), () => {
    const [from, to] = ends.map((end) => (end.input.value === "" ? null : Number(end.input.value)));
    if (from === null && to === null) return () => true;
    return (value) => value !== null && (from === null || value >= from) && (to === null || value <= to);
  }];
}

function textFilter(name) {
  const input = element("input", { type: "text", spellcheck: false });
  return [[element("label", {}, "has ", input)], () => {
    const text = input.value.toLowerCase();
    return text ? (value) => plain(value).toLowerCase().includes(text) : () => true;
  }];
}

function listReasons() {
  const reasons = new Map();
  for (let row = 0; row < run.loaded; row++) {
    if (isMade(row)) continue;
    const type = run.value("error_type", row);
    const reason = reasons.get(type) ?? { num: 0, example: run.value("error_message", row) };
    reason.num++;
    reasons.set(type, reason);
  }
  if (!reasons.size) return;
  const num = [...reasons.values()].reduce((sum, reason) => sum + reason.num, 0);
  const some = num < run.numFailed ? `, of which ${READS.format(num)} are shown` : "";
  $("reasons").hidden = false;
  $("reasons").querySelector("summary").textContent = `${READS.format(Math.max(num, run.numFailed))} failed${some}`;
  $("reasons").querySelector("ul").append(...[...reasons].sort((a, b) => b[1].num - a[1].num).map(([type, { num, example }]) => {
    const button = element("button", { type: "button", textContent: `${plain(type)} (${READS.format(num)})` });
    button.onclick = () => addFilter("error_type", [type]);
    return element("li", {}, button, element("bdi", { textContent: ` ${plain(example)}` }));
  }));
}

// --- start ------------------------------------------------------------------------------------------------------

const STEPS = {
  ArrowRight: () => 1,
  ArrowLeft: () => -1,
  ArrowDown: () => grid.perLine,
  ArrowUp: () => -grid.perLine,
  PageDown: () => grid.perLine * Math.max(1, Math.floor(innerHeight / grid.lineHeight)),
  PageUp: () => -STEPS.PageDown(),
  Home: () => -Infinity,
  End: () => Infinity,
};
const MARKS = { k: "keep", d: "drop", u: null };

function onKey(event) {
  const isTyping = event.target.matches("input, select, textarea");
  if (event.ctrlKey || event.metaKey || event.altKey || $("help").open) return;
  if (isTyping) {
    if (event.key !== "Escape" || large.dialog.open) return;
    event.preventDefault(); // a browser would clear the search field
    grid.go(grid.current);
    return;
  }
  if (event.key in STEPS && !event.target.closest("#large .table") && view.rows.length) {
    if (large.dialog.open) large.show(large.place + STEPS[event.key]());
    else grid.go(grid.current + STEPS[event.key]());
  } else if (event.key in MARKS && view.rows.length) marks.set(view.rows[large.dialog.open ? large.place : grid.current], MARKS[event.key]);
  else if (event.key === "/" && !large.dialog.open) $("search").focus();
  else if (event.key === "?") $("help").showModal();
  else return;
  event.preventDefault();
}

function options(select, names, first) {
  select.append(...(first ? [new Option(first, "")] : []), ...names.map((name) => new Option(name, name)));
}

function start() {
  const names = [...run.columns.keys()].filter((name) => run.columns.get(name).some((value) => value !== null));
  options($("show"), [...SHOWN.keys()]);
  options($("sort"), names, "prompt order");
  options($("filter"), names, "column");
  listReasons();
  $("search").oninput = () => view.update();
  for (const id of ["show", "sort"]) $(id).onchange = () => view.update();
  $("direction").onclick = () => {
    $("direction").ariaPressed = String($("direction").ariaPressed !== "true");
    view.update();
  };
  $("filter").onchange = () => {
    const name = $("filter").value;
    $("filter").value = "";
    if (name) addFilter(name);
  };
  $("size").oninput = () => grid.layout();
  $("keep-file").onclick = () => download("kept", keysOf((mark) => mark === "keep", run.order("", false)));
  $("rest-file").onclick = () => download("selected", keysOf((mark) => mark !== "drop", view.rows));
  $("clear").onclick = () => marks.clear();
  $("help-button").onclick = () => $("help").showModal();
  for (const button of document.querySelectorAll("#large [data-do]")) button.onclick = () => large.act(button.dataset.do);
  $("help").querySelector("[data-do=close]").onclick = () => $("help").close();
  large.dialog.onclose = () => grid.go(large.place);
  document.addEventListener("keydown", onKey);
  addEventListener("scroll", () => requestAnimationFrame(() => grid.draw()), { passive: true });
  addEventListener("resize", () => grid.layout());
  view.update();
  if (run.loaded < run.size) $("count").textContent += `: chunks of rows are missing beside this page`;
  document.body.dataset.ready = "yes";
}

marks.read();
if (innerWidth < 640) $("size").value = 160;

window.gallery = {
  rows(text) {
    const which = document.currentScript.dataset.run === run.folder ? run : beside;
    which.add(JSON.parse(text));
    if (which === run && !view.rows.length) view.update(); // show the first rows while others load
  },
  thumbnails(images) { thumbnails.chunks.set(document.currentScript.chunk, images); },
};

const keysOf = (test, rows) => [...rows].filter((row) => isMade(row) && test(marks.get(row))).map((row) => run.value("key", row));

document.addEventListener("DOMContentLoaded", start);
