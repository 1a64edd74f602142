
// ---- words

const WORDS = {
  en: {
    skip: "To the content", language: "Language", tasks: "Tasks", run: "{0} · step {1} · {2} M parameters",
    caption: "Caption", ask: "Ask", write: "Write", draw: "Draw", edit: "Edit", search: "Search",
    captionTitle: "What do the pictures show?", captionLead: "Names them in Chinese or English, or gives key words.",
    askTitle: "Ask about a picture", askLead: "Or ask without one. Give choices, and the answer is one of them.",
    writeTitle: "Write a text", writeLead: "A poem or a review, by a prompt of the form that the model has learned. It appears as it is written.",
    drawTitle: "Draw a picture", drawLead: "Several are drawn; those that fit the words best come first.",
    editTitle: "Redraw a part of a picture", editLead: "Mark a region by dragging over the picture. Nothing outside it changes.",
    searchTitle: "Find pictures by words", searchLead: "Put pictures into a collection once, then look for them in Chinese or English.",
    kind: "Say it as", kindZh: "Chinese name", kindEn: "English name", kindTags: "Key words",
    question: "Question", questionHint: "这是什么?", choices: "Choices", choicesHint: "杯子, 盘子, 勺子", choicesNote: "If you like: divided by commas, 16 at the most.",
    prompt: "Prompt", promptHint: "写一首诗。题目：春晓。作者：孟浩然。", more: "More settings", temperature: "Temperature",
    temperatureNote: "0: always the likeliest word", tokens: "Length, tokens", seed: "Seed", seedNote: "The same seed gives the same text.",
    drawText: "What it shows", drawHint: "红色的苹果", pictures: "Pictures", tries: "Tries", triesNote: "of which the best are kept", guidance: "Weight of the words",
    region: "Region, px", left: "left", top: "top", width: "width", height: "height", regionHere: "Region that is redrawn: arrow keys move it, with Shift they resize it",
    editText: "What it then shows", editHint: "戴帽子的猫 (or nothing)",
    collection: "Collection", collectionHint: "a name, such as shop-1", delete: "Delete", reallyDelete: "Really delete?",
    query: "Look for", queryHint: "红色的水果, red fruit …", stands: "{0} pictures, all can be found", standsPartly: "{0} pictures, {1} of them can be found so far", isNew: "New: it is made with the first pictures.",
    pick: "Choose a picture", pickSeveral: "Choose pictures", pickFolder: "Choose a folder", pickFiles: "Choose single pictures", orDrop: "or drop it here, or paste it", orDropSeveral: "or drop them here, or paste them", orFiles: "or drop pictures here",
    another: "Choose another", addMore: "Add more", remove: "Remove {0}", formats: "PNG, JPEG or WebP",
    doCaption: "Caption", doAsk: "Ask", doWrite: "Write", doDraw: "Draw", doEdit: "Redraw", doSearch: "Search", stop: "Stop", working: "Working …",
    resultCaption: "Captions appear here.", resultAsk: "The answer appears here.", resultWrite: "The text appears here.", resultDraw: "Drawings appear here.", resultEdit: "The new picture appears here.", resultSearch: "What is found appears here.",
    copy: "Copy", copied: "Copied", save: "Save", written: "{0} tokens in {1} s", stopped: "stopped", nothing: "(nothing)", took: "{0} s", none: "Nothing found.", among: "Best of {0} pictures, in {1} s",
    asJson: "As JSON, from a program", uploading: "{0} of {1} pictures", uploaded: "{0} pictures added", passed: "passed over: {0}",
    unable: "This model has not learned it.", noPicture: "Choose a picture first.", noPictures: "Choose at least one picture first.",
    tokenTitle: "Access token", tokenLead: "This server asks for one. It is kept until you close this tab.", token: "Token", enter: "Enter", tokenWrong: "This token is not right.",
    errors: {
      busy: ["Too much to do just now", "Wait a moment, then try again."], late: ["It took too long", "Ask for less (fewer tokens, tries or pictures), or try again later."],
      large: ["Too large", "Choose fewer or smaller pictures."], picture: ["This picture cannot be read", "Give a whole, still PNG, JPEG or WebP."],
      invalid: ["Something is not as it must be", "Change what is named below."], mistake: ["It cannot be done so", "Change what is named below."],
      not_learned: ["This model has not learned it", "Another run may have."], fault: ["The server made a mistake", "Try again; its log says more."],
      offline: ["The server does not answer", "See whether it runs, and try again."], full: ["There is no more room", "Delete what is not needed."], name: ["This name will not do", "Letters, digits, - and _; a letter or digit first."],
      no_collection: ["There is no such collection", "Choose another, or add pictures to make it."], other: ["It was refused", ""],
    },
  },
  zh: {
    skip: "跳到内容", language: "语言", tasks: "功能", run: "{0} · 第 {1} 步 · {2} M 参数",
    caption: "看图", ask: "问答", write: "写作", draw: "绘画", edit: "修图", search: "搜图",
    captionTitle: "图里是什么？", captionLead: "说出图片的中文名、英文名或关键词。",
    askTitle: "就图片提问", askLead: "也可以不给图片。给出选项时，答案必为其一。",
    writeTitle: "写一段文字", writeLead: "按模型学过的格式写诗词或评论，边写边显示。",
    drawTitle: "画一幅画", drawLead: "会画出多幅，最符合文字的排在前面。",
    editTitle: "重画图片的一部分", editLead: "在图上拖动选出区域，区域之外一点不变。",
    searchTitle: "用文字找图", searchLead: "先把图片放进图集，再用中文或英文来找。",
    kind: "说成", kindZh: "中文名", kindEn: "英文名", kindTags: "关键词",
    question: "问题", questionHint: "这是什么?", choices: "选项", choicesHint: "杯子，盘子，勺子", choicesNote: "可不填；用逗号分开，最多 16 个。",
    prompt: "提示", promptHint: "写一首诗。题目：春晓。作者：孟浩然。", more: "更多设置", temperature: "温度",
    temperatureNote: "0：总取最可能的词", tokens: "长度（词元）", seed: "随机种子", seedNote: "种子相同，文字相同。",
    drawText: "画什么", drawHint: "红色的苹果", pictures: "张数", tries: "尝试次数", triesNote: "从中留下最好的", guidance: "文字的分量",
    region: "区域（像素）", left: "左", top: "上", width: "宽", height: "高", regionHere: "要重画的区域：方向键移动，按住 Shift 改变大小",
    editText: "改成什么", editHint: "戴帽子的猫（可不填）",
    collection: "图集", collectionHint: "名称，如 商品-1", delete: "删除", reallyDelete: "确定删除？",
    query: "找什么", queryHint: "红色的水果，red fruit…", stands: "共 {0} 张，均可搜索", standsPartly: "共 {0} 张，目前可搜索 {1} 张", isNew: "新图集：加入第一批图片时建立。",
    pick: "选择图片", pickSeveral: "选择图片", pickFolder: "选择文件夹", pickFiles: "选择单张图片", orDrop: "或拖到这里，或直接粘贴", orDropSeveral: "或拖到这里，或直接粘贴", orFiles: "或把图片拖到这里",
    another: "换一张", addMore: "再加几张", remove: "移除 {0}", formats: "PNG、JPEG 或 WebP",
    doCaption: "看图", doAsk: "提问", doWrite: "写", doDraw: "画", doEdit: "重画", doSearch: "搜索", stop: "停止", working: "处理中…",
    resultCaption: "说明会显示在这里。", resultAsk: "答案会显示在这里。", resultWrite: "文字会显示在这里。", resultDraw: "画会显示在这里。", resultEdit: "新图会显示在这里。", resultSearch: "找到的图片会显示在这里。",
    copy: "复制", copied: "已复制", save: "保存", written: "{0} 个词元，{1} 秒", stopped: "已停止", nothing: "（空）", took: "{0} 秒", none: "没有找到。", among: "从 {0} 张中选出，用时 {1} 秒",
    asJson: "程序调用（JSON）", uploading: "{0} / {1} 张", uploaded: "已加入 {0} 张", passed: "跳过：{0}",
    unable: "这个模型没有学过。", noPicture: "请先选择一张图片。", noPictures: "请先选择图片。",
    tokenTitle: "访问令牌", tokenLead: "此服务需要令牌。关闭本标签页前一直有效。", token: "令牌", enter: "进入", tokenWrong: "令牌不对。",
    errors: {
      busy: ["现在太忙", "稍等片刻再试。"], late: ["用时过长", "少要一些（词元、次数或张数），或稍后再试。"],
      large: ["太大了", "请选更少或更小的图片。"], picture: ["这张图片无法读取", "请用完整、静止的 PNG、JPEG 或 WebP。"],
      invalid: ["有一项不合要求", "请修改下面所指的内容。"], mistake: ["这样做不了", "请修改下面所指的内容。"],
      not_learned: ["这个模型没有学过", "也许别的模型可以。"], fault: ["服务器出错了", "请重试；详情见其日志。"],
      offline: ["服务器没有回应", "请确认它在运行，然后重试。"], full: ["放不下了", "请删除不需要的内容。"], name: ["这个名称不行", "只能用文字、数字、- 和 _。"],
      no_collection: ["没有这个图集", "请另选一个，或加入图片来建立。"], other: ["请求被拒绝", ""],
    },
  },
};

const kept = (store, key) => { try { return store.getItem(key); } catch { return null; } };
const keep = (store, key, value) => { try { store.setItem(key, value); } catch { /* a browser may forbid it */ } };
let language = kept(localStorage, "m6-language") || (navigator.language.startsWith("zh") ? "zh" : "en");

function t(key, ...values) {
  return (WORDS[language][key] ?? key).replace(/\{(\d)\}/g, (_, number) => values[number]);
}

const spoken = []; // what is to be said anew in another language

function speak() {
  document.documentElement.lang = language;
  for (const one of document.querySelectorAll("[data-t]")) one.textContent = t(one.dataset.t);
  for (const one of document.querySelectorAll("[data-t-placeholder]")) one.placeholder = t(one.dataset.tPlaceholder);
  for (const one of document.querySelectorAll("[data-t-label]")) one.setAttribute("aria-label", t(one.dataset.tLabel));
  for (const one of document.querySelectorAll("[data-language]")) one.setAttribute("aria-pressed", one.dataset.language === language);
  for (const say of spoken) say();
}

// ---- elements: text is only ever set as text

const $ = (selector, within = document) => within.querySelector(selector);
const $$ = (selector, within = document) => [...within.querySelectorAll(selector)];
const SVG = "http://www.w3.org/2000/svg";

function el(name, properties = {}, ...children) {
  const one = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key.startsWith("on")) one.addEventListener(key.slice(2), value);
    else if (key === "t") { one.dataset.t = value; one.textContent = t(value); }
    else if (key in one) one[key] = value;
    else one.setAttribute(key, value);
  }
  one.append(...children.filter((child) => child !== null && child !== undefined));
  return one;
}

function icon(path) {
  const svg = document.createElementNS(SVG, "svg"), drawn = document.createElementNS(SVG, "path");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  drawn.setAttribute("d", path);
  svg.append(drawn);
  return svg;
}

// ---- the server

class Refused extends Error {
  constructor(status, code, message, after) {
    super(message);
    Object.assign(this, { status, code, after });
  }
}

const headers = () => {
  const token = kept(sessionStorage, "m6-token");
  return token ? { Authorization: `Bearer ${token}` } : {};
};

async function fetched(path, options = {}) {
  const { json, ...rest } = options;
  if (json !== undefined) Object.assign(rest, { method: "POST", body: JSON.stringify(json) });
  const kind = json !== undefined ? { "Content-Type": "application/json" } : {};
  let response;
  try {
    response = await fetch(path, { ...rest, headers: { ...headers(), ...kind } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "offline", String(error.message));
  }
  if (response.ok) return response;
  const told = await response.json().catch(() => ({}));
  if (response.status === 401) {
    await askToken(Boolean(headers().Authorization));
    return fetched(path, options);
  }
  const { code = "other", message = response.statusText } = told.error ?? {};
  throw new Refused(response.status, code, message, Number(response.headers.get("Retry-After")) || 1);
}

const asked = async (path, options) => (await fetched(path, options)).json();

let asking = null;

function askToken(wrong) {
  return asking ??= new Promise((resolve) => {
    const dialog = $("#token"), value = $("#token-value"), error = $(".error", dialog);
    error.hidden = !wrong;
    error.textContent = t("tokenWrong");
    dialog.addEventListener("cancel", (event) => event.preventDefault());
    dialog.addEventListener("close", () => {
      keep(sessionStorage, "m6-token", value.value.trim());
      value.value = "";
      asking = null;
      resolve();
    }, { once: true });
    dialog.showModal();
  });
}

// ---- pictures

const SIDE = 1024; // px that are sent of a picture to be looked at: more than the model sees
const EDITED = 2048; // and of one to be edited
const SENT = new Set(["image/png", "image/jpeg", "image/webp"]);
const IMAGE = "M4 5h16v14H4zM4 16l5-6 4 4 2-2 5 5M15.5 9v.1";

/** A file as it is sent: smaller if it is large, and in a format that the server reads if the browser can. */
async function prepared(file, side) {
  const bitmap = await createImageBitmap(file).catch(() => null);
  if (!bitmap) return { blob: file, name: file.name, width: 0, height: 0 };
  const ratio = Math.min(1, side / Math.max(bitmap.width, bitmap.height));
  const width = Math.max(1, Math.round(bitmap.width * ratio)), height = Math.max(1, Math.round(bitmap.height * ratio));
  if (ratio === 1 && SENT.has(file.type)) return { blob: file, name: file.name, width, height };
  const canvas = el("canvas", { width, height });
  canvas.getContext("2d").drawImage(bitmap, 0, 0, width, height);
  const kind = file.type === "image/jpeg" ? "image/jpeg" : "image/png";
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, kind, 0.95));
  return { blob, name: file.name, width, height };
}

/** Where pictures are chosen, dropped and pasted. */
class Drop {
  constructor(root, changed) {
    Object.assign(this, { root, changed, pictures: [], several: "several" in root.dataset, marking: "region" in root.dataset });
    this.upload = "upload" in root.dataset;
    const id = `${root.closest("section").id}-files`;
    this.input = el("input", { type: "file", id, accept: "image/*", multiple: this.several || this.upload });
    if (this.upload) this.input.webkitdirectory = true;
    this.shown = el("div", { className: this.several ? "shown" : "shown one" });
    this.main = el("b");
    this.hint = el("span", { className: "note" });
    this.label = el("label", { htmlFor: id }, icon(IMAGE), this.main, this.hint);
    root.append(this.input, this.shown, this.label);
    if (this.upload) root.append(this.files());
    this.input.addEventListener("change", () => this.given(this.input));
    for (const name of ["dragenter", "dragover"]) root.addEventListener(name, (event) => { event.preventDefault(); root.classList.add("over"); });
    for (const name of ["dragleave", "drop"]) root.addEventListener(name, () => root.classList.remove("over"));
    root.addEventListener("drop", async (event) => { event.preventDefault(); this.take(await dropped(event.dataTransfer)); });
    spoken.push(() => this.say());
  }

  say() {
    const empty = this.several ? "pickSeveral" : "pick", more = this.several ? "addMore" : "another";
    this.main.textContent = t(this.upload ? "pickFolder" : this.pictures.length ? more : empty);
    this.hint.textContent = `${t(this.upload ? "orFiles" : this.several ? "orDropSeveral" : "orDrop")} · ${t("formats")}`;
    for (const one of $$(".remove", this.shown)) one.setAttribute("aria-label", t("remove", one.title));
  }

  /** A way to single files, beside that to a folder. */
  files() {
    const input = el("input", { type: "file", accept: "image/*", multiple: true, hidden: true, onchange: () => this.given(input) });
    return el("div", { className: "single" }, input, el("button", { type: "button", className: "link", t: "pickFiles", onclick: () => input.click() }));
  }

  given(input) {
    this.take([...input.files]);
    input.value = "";
  }

  async take(files) {
    const images = files.filter((file) => file.type.startsWith("image/") || !file.type);
    if (!images.length || this.root.closest("fieldset").disabled) return;
    if (this.upload) { this.changed(images); return; }
    const found = await Promise.all((this.several ? images : images.slice(0, 1)).map((file) => prepared(file, this.marking ? EDITED : SIDE)));
    const room = this.several ? server.limits.pictures : 1;
    this.pictures = (this.several ? [...this.pictures, ...found] : found).slice(0, room);
    this.show();
    this.changed();
  }

  show() {
    for (const image of $$("img", this.shown)) URL.revokeObjectURL(image.src);
    this.shown.replaceChildren(...this.pictures.map((picture) => this.figure(picture)));
    this.root.classList.toggle("filled", this.pictures.length > 0);
    this.say();
  }

  figure(picture) {
    const image = el("img", { src: URL.createObjectURL(picture.blob), alt: picture.name, draggable: false });
    const remove = el("button", { type: "button", className: "remove", title: picture.name, textContent: "×", onclick: () => {
      this.pictures = this.pictures.filter((one) => one !== picture);
      this.show();
      this.changed();
      this.input.focus();
    } });
    return el("figure", {}, this.marking ? this.stage(picture, image) : image, remove, el("figcaption", { textContent: picture.name, title: picture.name }));
  }

  /** As large as there is room for, so that a small picture can be marked, too. */
  stage({ width, height }, image) {
    const stage = el("div", { className: "stage" }, image), ratio = width / height || 1;
    Object.assign(stage.style, { aspectRatio: ratio, width: `min(100%, ${22 * ratio}rem)` });
    return stage;
  }
}


/** All files of what was dropped, those of folders too. */
async function dropped(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.some((entry) => entry.isDirectory)) return [...transfer.files];
  const files = [];
  const walk = async (entry) => {
    if (entry.isFile) { files.push(await new Promise((resolve, reject) => entry.file(resolve, reject))); return; }
    const reader = entry.createReader();
    for (;;) {
      const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
      if (!some.length) return;
      for (const one of some) await walk(one);
    }
  };
  for (const entry of entries) await walk(entry);
  return files;
}

/** A region of a picture, marked by dragging, by keys or by numbers. */
class Region {
  constructor(drop, numbers) {
    Object.assign(this, { drop, numbers, inputs: ["left", "top", "width", "height"].map((id) => $(`#${id}`, numbers)) });
    for (const input of this.inputs) input.addEventListener("input", () => this.set(this.inputs.map((one) => Number(one.value)), input));
    spoken.push(() => this.box?.setAttribute("aria-label", t("regionHere")));
  }

  /** Begin with the middle of a new picture. */
  begin() {
    const [picture] = this.drop.pictures;
    this.numbers.hidden = !picture?.width;
    this.box = null;
    if (this.numbers.hidden) return;
    this.size = [picture.width, picture.height];
    this.stage = $(".stage", this.drop.shown);
    this.box = el("div", { className: "region", tabIndex: 0, role: "group", onkeydown: (event) => this.key(event) });
    this.box.setAttribute("aria-label", t("regionHere"));
    this.stage.append(this.box);
    this.stage.addEventListener("pointerdown", (event) => this.drag(event));
    this.set([...this.size.map((side) => Math.round(side / 4)), ...this.size.map((side) => Math.round(side / 2))]);
  }

  set([left, top, width, height], from) {
    const [w, h] = this.size, within = (value, least, most) => Math.round(Math.min(Math.max(value || 0, least), most));
    left = within(left, 0, w - 1); top = within(top, 0, h - 1);
    this.value = [left, top, within(width, 1, w - left), within(height, 1, h - top)];
    this.value.forEach((value, place) => { if (this.inputs[place] !== from) this.inputs[place].value = value; });
    const share = [left / w, top / h, this.value[2] / w, this.value[3] / h].map((part) => `${part * 100}%`);
    Object.assign(this.box.style, { left: share[0], top: share[1], width: share[2], height: share[3] });
  }

  at(event) {
    const { left, top, width, height } = this.stage.getBoundingClientRect();
    return [(event.clientX - left) / width * this.size[0], (event.clientY - top) / height * this.size[1]];
  }

  drag(event) {
    event.preventDefault();
    this.box.focus();
    const [x, y] = this.at(event), old = this.value, moving = event.target === this.box;
    const move = (later) => {
      const [u, v] = this.at(later);
      if (moving) this.set([Math.min(old[0] + u - x, this.size[0] - old[2]), Math.min(old[1] + v - y, this.size[1] - old[3]), old[2], old[3]]);
      else this.set([Math.max(0, Math.min(x, u)), Math.max(0, Math.min(y, v)), Math.abs(u - x), Math.abs(v - y)]);
    };
    this.stage.setPointerCapture(event.pointerId);
    this.stage.addEventListener("pointermove", move);
    for (const name of ["pointerup", "pointercancel"]) this.stage.addEventListener(name, () => this.stage.removeEventListener("pointermove", move), { once: true });
  }

  key(event) {
    const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!way) return;
    event.preventDefault();
    const step = Math.max(1, Math.round(Math.max(...this.size) / 50)), by = way.map((one) => one * step), value = [...this.value];
    const first = event.shiftKey ? 2 : 0;
    value[first] += by[0];
    value[first + 1] += by[1];
    if (!event.shiftKey) { value[0] = Math.min(value[0], this.size[0] - value[2]); value[1] = Math.min(value[1], this.size[1] - value[3]); }
    this.set(value);
  }
}

// ---- tasks

let server = { tasks: {}, limits: { pictures: 16 } };

/** A section: its form, what it asks the server for, and what it shows of the answer. */
class Task {
  constructor(id) {
    this.section = $(`#${id}`);
    Object.assign(this, { id, form: $("form", this.section), fieldset: $("fieldset", this.section), result: $(".result", this.section) });
    const place = $(".drop", this.section);
    this.drop = place && new Drop(place, (files) => this.chose(files));
    this.act = el("button", { type: "submit", className: "act", t: `do${id[0].toUpperCase()}${id.slice(1)}` });
    this.stop = el("button", { type: "button", className: "quiet", t: "stop", hidden: true, onclick: () => this.abort.abort() });
    $(".actions", this.section).append(this.act, this.stop);
    this.call = el("pre", { tabIndex: 0 });
    this.form.append(el("details", { className: "call" }, el("summary", { t: "asJson" }), this.call, el("button", { type: "button", className: "link", t: "copy", onclick: (event) => copy(event.target, this.call.textContent) })));
    this.form.addEventListener("submit", (event) => { event.preventDefault(); this.run(); });
    this.form.addEventListener("input", () => this.hint());
    for (const box of $$(".examples", this.section)) this.examples(box);
    this.empty();
    spoken.push(() => { this.hint(); this.notice?.querySelector("b")?.replaceChildren(t("unable")); });
  }

  empty() { this.result.replaceChildren(el("p", { className: "empty", t: `result${this.act.dataset.t.slice(2)}` })); }

  examples(box) {
    const field = $(`#${box.dataset.for}`);
    box.append(...box.dataset.examples.split("|").map((text) => el("button", { type: "button", textContent: text, lang: /[a-z]/.test(text) ? "en" : "zh", onclick: () => {
      field.value = text;
      field.focus();
      this.hint();
    } })));
  }

  /** What the run cannot do is greyed, with the reason. */
  able({ able, why }) {
    this.fieldset.disabled = this.form.hidden = this.result.hidden = !able;
    $(`nav [data-tab="${this.id}"]`).classList.toggle("unable", !able);
    this.notice?.remove();
    this.notice = null;
    if (able) return;
    this.notice = el("div", { className: "notice" }, el("b", { textContent: t("unable") }), el("small", { lang: "en", textContent: why }));
    $("p", this.section).after(this.notice);
  }

  chose() { this.hint(); }

  field(name) { return this.form.elements[name]?.value ?? ""; }

  numbers(...names) { return Object.fromEntries(names.map((name) => [name, Number(this.field(name))])); }

  async run() {
    const missing = this.missing();
    if (missing) { this.fail(new Refused(0, "missing", missing)); return; }
    this.abort = new AbortController();
    this.busy(true);
    const start = performance.now();
    this.seconds = () => ((performance.now() - start) / 1000).toFixed(1);
    try {
      await this.do(this.abort.signal);
    } catch (error) {
      if (error.name !== "AbortError") this.fail(error);
      else if (!$(".text", this.result)) this.empty();
    } finally {
      this.busy(false);
      if (this.result.getBoundingClientRect().top > innerHeight * 0.8) this.result.scrollIntoView({ behavior: "smooth" });
    }
  }

  missing() { return ""; }

  busy(on) {
    this.act.disabled = on;
    this.act.classList.toggle("busy", on);
    this.act.dataset.t = on ? "working" : `do${this.id[0].toUpperCase()}${this.id.slice(1)}`;
    this.act.textContent = t(this.act.dataset.t);
    this.stop.hidden = !on;
    this.result.setAttribute("aria-busy", on);
  }

  fail(error) { this.result.replaceChildren(told(error)); }

  show(...children) { this.result.replaceChildren(...children); }

  hint() { this.call.textContent = curl(this.request()); }
}

/** An error, in words of this page and, below, in the server's own. */
function told(error) {
  if (error.code === "missing") return el("div", { className: "error", role: "alert" }, el("b", { textContent: error.message }));
  if (!(error instanceof Refused)) console.error(error);
  const [title, way] = WORDS[language].errors[error.code] ?? WORDS[language].errors.other;
  return el("div", { className: "error", role: "alert" }, el("b", { textContent: title }), way, el("small", { lang: "en", textContent: error.message }));
}

async function copy(button, text) {
  await navigator.clipboard.writeText(text).catch(() => null);
  button.textContent = t("copied");
  setTimeout(() => { button.textContent = t("copy"); }, 1500);
}

const quoted = (text) => `'${String(text).replaceAll("'", "'\\''")}'`;

/** The same request by curl. */
function curl({ path, json, form }) {
  const lines = [`curl ${new URL(path, location.href)}`];
  if (headers().Authorization) lines.push('-H "Authorization: Bearer $M6_TOKEN"');
  if (json) lines.push("-H 'Content-Type: application/json'", `-d ${quoted(JSON.stringify(json))}`);
  for (const [name, value] of form ?? []) lines.push(`-F ${quoted(`${name}=${value}`)}`);
  return lines.join(" \\\n  ");
}

function formData(fields, pictures) {
  const data = new FormData();
  for (const [name, value] of fields) data.append(name, value);
  for (const [name, picture] of pictures) data.append(name, picture.blob, "picture");
  return data;
}

class Caption extends Task {
  missing() { return this.drop.pictures.length ? "" : t("noPictures"); }

  request() { return { path: "v1/caption", form: [["images", "@picture.png"], ["kind", this.field("kind")]] }; }

  async do(signal) {
    const pictures = this.drop.pictures, kind = this.field("kind");
    const body = formData([["kind", kind]], pictures.map((picture) => ["images", picture]));
    const { captions } = await asked("v1/caption", { method: "POST", body, signal });
    const lang = kind === "en" ? "en" : "zh";
    this.show(el("div", { className: "captioned" }, ...captions.map((text, place) => el("figure", { className: "card" },
      el("img", { src: URL.createObjectURL(pictures[place].blob), alt: pictures[place].name }),
      el("figcaption", { className: "said", lang, dir: "auto", textContent: text || t("nothing") })))),
    el("p", { className: "note", textContent: t("took", this.seconds()) }));
  }
}

class Ask extends Task {
  choices() { return this.field("choices").split(/[,，、;；\n]/).map((one) => one.trim()).filter(Boolean); }

  fields() { return [["question", this.field("question")], ...this.choices().map((one) => ["choices", one])]; }

  request() {
    const fields = this.drop.pictures.length ? [["image", "@picture.png"]] : [];
    return { path: "v1/ask", form: [...fields, ...this.fields()] };
  }

  async do(signal) {
    const body = formData(this.fields(), this.drop.pictures.map((picture) => ["image", picture]));
    const { answer } = await asked("v1/ask", { method: "POST", body, signal });
    this.show(el("div", { className: "card" },
      el("p", { className: "soft", dir: "auto", textContent: this.field("question") }),
      el("p", { className: "answer", lang: "zh", dir: "auto", textContent: answer || t("nothing") }),
      el("div", { className: "under" }, el("span", { textContent: t("took", this.seconds()) }), el("button", { type: "button", t: "copy", onclick: (event) => copy(event.target, answer) }))));
  }
}

class Write extends Task {
  asked() { return { prompt: this.field("prompt"), ...this.numbers("temperature", "tokens", "seed") }; }

  request() { return { path: "v1/write", json: { ...this.asked(), stream: true } }; }

  async do(signal) {
    const text = el("div", { className: "text going", lang: "zh", dir: "auto" }), under = el("span");
    const done = el("div", { className: "under", hidden: true }, under, el("button", { type: "button", t: "copy", onclick: (event) => copy(event.target, text.textContent) }));
    this.show(el("div", { className: "card" }, text, done));
    try {
      const response = await fetched("v1/write", { json: { ...this.asked(), stream: true }, signal });
      for await (const [name, data] of events(response)) {
        if (name === "piece") text.append(data.text);
        else if (name === "error") throw new Refused(200, data.code, data.message);
        else { text.textContent = data.text || t("nothing"); under.textContent = t("written", data.tokens, this.seconds()); }
      }
    } catch (error) {
      if (error.name !== "AbortError") {
        if (!text.textContent) throw error;
        this.result.append(told(error)); // what was written stays
        return;
      }
      under.textContent = t("stopped");
    } finally {
      text.classList.remove("going");
      done.hidden = false;
    }
  }
}

/** Server-sent events of a response: name and data. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const lines = Object.fromEntries(part.split("\n").map((line) => [line.slice(0, line.indexOf(":")), line.slice(line.indexOf(":") + 2)]));
      yield [lines.event, JSON.parse(lines.data)];
    }
  }
}

class Draw extends Task {
  asked() { return { text: this.field("text"), ...this.numbers("pictures", "tries", "guidance", "seed") }; }

  request() { return { path: "v1/draw", json: this.asked() }; }

  async do(signal) {
    const { pictures } = await asked("v1/draw", { json: this.asked(), signal });
    this.drawn(pictures, this.field("text"));
  }

  drawn(pictures, words) {
    this.show(el("div", { className: "drawn" }, ...pictures.map((data, place) => {
      const src = `data:image/png;base64,${data}`;
      return el("figure", { className: "card" }, el("img", { src, alt: words }), el("figcaption", {},
        el("span", { textContent: `${place + 1}` }), el("a", { className: "link", href: src, download: `m6-${this.id}-${place + 1}.png`, t: "save" })));
    })), el("p", { className: "note", textContent: t("took", this.seconds()) }));
  }
}

class Edit extends Draw {
  constructor(id) {
    super(id);
    this.region = new Region(this.drop, $(".region-numbers", this.section));
  }

  chose() { this.region.begin(); this.hint(); }

  missing() { return this.drop.pictures.length ? "" : t("noPicture"); }

  fields() {
    const numbers = Object.entries(this.numbers("pictures", "tries", "seed"));
    return [["region", (this.region?.value ?? [0, 0, 64, 64]).join(",")], ["text", this.field("text")], ...numbers];
  }

  request() { return { path: "v1/edit", form: [["image", "@picture.png"], ...this.fields()] }; }

  async do(signal) {
    const body = formData(this.fields(), this.drop.pictures.map((picture) => ["image", picture]));
    const { pictures } = await asked("v1/edit", { method: "POST", body, signal });
    this.drawn(pictures, this.field("text"));
  }
}

const PORTION = 8; // pictures of a request
const PORTION_BYTES = 6e6;

class Search extends Task {
  constructor(id) {
    super(id);
    Object.assign(this, { names: new Map(), known: new Map(), collection: $("#collection"), stand: $("#stand"), remove: $("#delete") });
    this.collection.addEventListener("input", () => this.tell());
    this.remove.addEventListener("click", () => this.delete());
    this.remove.addEventListener("blur", () => { this.remove.dataset.t = "delete"; this.remove.textContent = t("delete"); });
    spoken.push(() => this.tell());
  }

  path(more = "") { return `v1/collections/${encodeURIComponent(this.collection.value.trim())}${more}`; }

  request() {
    const name = this.collection?.value.trim() || "NAME";
    return { path: `v1/collections/${encodeURIComponent(name)}/search`, json: { query: this.field("query"), k: 12 } };
  }

  async load() {
    const { collections } = await asked("v1/collections");
    this.known = new Map(collections.map((one) => [one.name, one]));
    $("#collections").replaceChildren(...collections.map(({ name }) => el("option", { value: name })));
    if (!this.collection.value && collections.length) this.collection.value = collections[0].name;
    this.tell();
  }

  tell() {
    const name = this.collection.value.trim(), one = this.known.get(name);
    this.remove.hidden = !one;
    this.stand.textContent = one ? t(one.indexed < one.pictures ? "standsPartly" : "stands", one.pictures, one.indexed) : name ? t("isNew") : "";
    this.hint();
  }

  async delete() {
    if (this.remove.dataset.t === "delete") {
      this.remove.dataset.t = "reallyDelete";
      this.remove.textContent = t("reallyDelete");
      return;
    }
    try {
      await fetched(this.path(), { method: "DELETE" });
      this.collection.value = "";
      this.empty();
      await this.load();
    } catch (error) { this.fail(error); }
  }

  /** Upload in portions, one after another, so that each is soon done. */
  async chose(files) {
    if (!this.collection.value.trim()) this.collection.value = "pictures";
    if (!this.collection.reportValidity()) return;
    const bar = el("progress", { max: files.length, value: 0 }), line = el("span"), passed = el("ul", { className: "note" });
    bar.setAttribute("aria-label", t("pickFolder"));
    this.show(el("div", { className: "card uploading", role: "status" }, line, bar, passed));
    this.fieldset.disabled = true;
    let added = 0;
    const tell = (done) => { bar.value = done; line.textContent = t("uploading", done, files.length); };
    tell(0);
    try {
      for (let start = 0; start < files.length; start += PORTION) {
        const portion = await Promise.all(files.slice(start, start + PORTION).map((file) => prepared(file, SIDE)));
        added += await this.send(portion, (picture, error) => passed.append(el("li", { textContent: t("passed", `${picture.name} (${error.message})`) })));
        tell(Math.min(start + PORTION, files.length));
      }
      line.textContent = t("uploaded", added);
    } catch (error) {
      this.result.append(told(error));
    } finally {
      this.fieldset.disabled = false;
      await this.load().catch((error) => this.result.append(told(error)));
    }
  }

  /** How many were taken; one that is refused does not keep out the others. */
  async send(pictures, refused) {
    if (!pictures.length) return 0;
    const half = Math.ceil(pictures.length / 2), bytes = pictures.reduce((sum, one) => sum + one.blob.size, 0);
    const halves = async () => await this.send(pictures.slice(0, half), refused) + await this.send(pictures.slice(half), refused);
    if (pictures.length > 1 && bytes > PORTION_BYTES) return halves();
    for (;;) {
      try {
        const { ids } = await asked(this.path(), { method: "POST", body: formData([], pictures.map((one) => ["images", one])) });
        ids.forEach((id, place) => this.names.set(id, pictures[place].name));
        return pictures.length;
      } catch (error) {
        if (error.code === "busy") await new Promise((resolve) => setTimeout(resolve, error.after * 1000));
        else if (!["picture", "large"].includes(error.code)) throw error;
        else if (pictures.length > 1) return halves();
        else { refused(pictures[0], error); return 0; }
      }
    }
  }

  async do(signal) {
    const { hits, indexed } = await asked(this.path("/search"), { json: { query: this.field("query"), k: 12 }, signal });
    if (!hits.length) { this.show(el("p", { className: "empty", t: "none" })); return; }
    const most = Math.max(...hits.map((hit) => hit.score), 1e-9);
    const figures = await Promise.all(hits.map(async (hit) => {
      const blob = await (await fetched(hit.href, { signal })).blob(), name = this.names.get(hit.id);
      const fit = el("progress", { className: "fit", max: 1, value: Math.max(0, hit.score / most) });
      fit.setAttribute("aria-label", hit.score.toFixed(2));
      return el("figure", {}, el("img", { src: URL.createObjectURL(blob), alt: hit.details }), fit,
        el("figcaption", {}, el("span", { lang: "zh", textContent: hit.details }), name ? el("p", { className: "note", textContent: name }) : null));
    }));
    this.show(el("p", { className: "note", textContent: t("among", indexed, this.seconds()) }), el("div", { className: "sheet" }, ...figures));
  }
}

// ---- the page

const tasks = { caption: new Caption("caption"), ask: new Ask("ask"), write: new Write("write"), draw: new Draw("draw"), edit: new Edit("edit"), search: new Search("search") };

function openTab() {
  const chosen = location.hash.slice(1) in tasks ? location.hash.slice(1) : "caption";
  for (const [id, task] of Object.entries(tasks)) task.section.hidden = id !== chosen;
  for (const link of $$("nav a")) {
    if (link.dataset.tab === chosen) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${t(chosen)} · M6`;
}

for (const link of $$("nav a")) {
  link.addEventListener("click", (event) => { // without a jump to the section
    event.preventDefault();
    history.pushState(null, "", link.hash);
    openTab();
  });
}
for (const button of $$("[data-language]")) {
  button.addEventListener("click", () => { language = button.dataset.language; keep(localStorage, "m6-language", language); speak(); });
}
addEventListener("popstate", openTab);
addEventListener("paste", (event) => {
  const files = [...event.clipboardData.files], task = Object.values(tasks).find((one) => !one.section.hidden);
  if (files.length && task?.drop) { event.preventDefault(); task.drop.take(files); }
});
for (const name of ["dragover", "drop"]) addEventListener(name, (event) => event.preventDefault()); // a miss must not leave the page
spoken.push(openTab, () => {
  if (!server.model) return;
  const millions = (server.parameters / 1e6).toLocaleString(language, { maximumFractionDigits: 1 });
  $("#run").textContent = t("run", server.model, server.step.toLocaleString(language), millions);
});
speak();

(async () => {
  try {
    server = await asked("v1/model");
    for (const [id, task] of Object.entries(tasks)) task.able(server.tasks[id]);
    speak();
    if (server.tasks.search.able) await tasks.search.load();
  } catch (error) {
    for (const task of Object.values(tasks)) task.fail(error);
  }
  document.documentElement.dataset.ready = "";
})();
