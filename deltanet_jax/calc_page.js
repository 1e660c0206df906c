'use strict';
// every number is a product of a cache array's axes and the bytes of its type,
// summed over layers; the axes come from the models themselves, as data

const DATA = JSON.parse(document.getElementById('data').textContent);
const BYTES = {float32: 4, bfloat16: 2, float8: 1};
const PARTS = ['tokens', 'state', 'convolution', 'positions'];
const RANGES = {context: [1, 2 ** 24, 1], batch: [1, 1024, 1], layers: [1, 256, 1]};
const $ = id => document.getElementById(id);
const count = n => Math.round(n).toLocaleString('en-US');
let view;

// ---- the model in view

function fresh(name) {
  const preset = DATA.presets[name];
  return {
    preset: name, context: 32768, batch: 1, dtype: 'bfloat16',
    state: 'float32', layers: preset.layers, ratio: preset.ratio.slice(),
    attention: {...preset.attention.fields},
    kind: preset.recurrent ? preset.recurrent.kind : 'GatedDeltaNet',
    recurrent: {...made(name).fields},
  };
}

// the recurrent mixer of a kind: the preset's own, or a new one
function made(name, kind) {
  const own = DATA.presets[name].recurrent;
  if (own && (!kind || own.kind === kind)) return own;
  return DATA.new[kind || 'GatedDeltaNet'];
}

const mixer = sort => sort === 'attention'
  ? DATA.presets[view.preset].attention : made(view.preset, view.kind);

function attentionLayers({layers: L, ratio: [R, A]}) {
  return Math.max(Math.min(A, 1), Math.floor((2 * L * A + R + A) / (2 * (R + A))));
}

// bytes of one layer's cache by part
function layer(sort, at) {
  const values = {...view[sort], context: at.context, batch: at.batch};
  const widths = {state: BYTES[at.state], positions: 4};
  const sums = {};
  for (const {part, axes} of mixer(sort).arrays) {
    const size = axes.reduce((product, axis) => product * (
      typeof axis === 'number' ? axis : values[axis[0]] + axis[1]), 1);
    sums[part] = (sums[part] || 0) + size * (widths[part] || BYTES[at.dtype]);
  }
  return sums;
}

const total = sums => Object.values(sums).reduce((a, b) => a + b, 0);

function sizes(context) {
  const at = {...view, context}, N = attentionLayers(view);
  const attention = layer('attention', at), recurrent = layer('recurrent', at);
  const full = total(attention), pure = total(recurrent), L = view.layers;
  return {
    attention, recurrent, N, full: L * full, pure: L * pure,
    hybrid: N * full + (L - N) * pure,
  };
}

// the fewest tokens at which the hybrid is the smaller; null: never
function breakEven() {
  const at = n => sizes(n), none = at(0), L = view.layers;
  if (none.N === L || none.N === 0) return null;
  const grows = (at(1).full - none.full) / L;
  const ahead = (none.pure - none.full) / L;
  return Math.max(1, Math.floor(ahead / grows) + 1);
}

// ---- words

function size(n) {
  const power = Math.min(4, Math.max(0, Math.floor(Math.log2(Math.max(n, 1)) / 10)));
  if (!power) return `${count(n)} B`;
  return `${(n / 1024 ** power).toFixed(1)} ${['KiB', 'MiB', 'GiB', 'TiB'][power - 1]}`;
}

const percent = x => `${(100 * x).toFixed(1)}%`;

function verdict() {
  const now = sizes(view.context), cross = breakEven(), L = view.layers;
  const tokens = `${count(view.context)} token${view.context === 1 ? '' : 's'}`;
  const many = view.batch === 1 ? tokens : `${tokens} in each of ${view.batch} sequences`;
  if (now.N === L) {
    return [`At ${many} attention in every layer keeps `, size(now.full),
      '. Move the ratio to see what recurrent layers would save.'];
  }
  const saved = 1 - now.hybrid / now.full;
  const more = now.hybrid === now.full ? 'the same'
    : saved > 0 ? `${percent(saved)} less` : `${percent(-saved)} more`;
  return [
    `At ${many} the hybrid keeps ${size(now.hybrid)} where attention in every`
    + ` layer would keep ${size(now.full)}: `, more,
    `. It is the smaller from ${count(cross)} token${cross === 1 ? '' : 's'}`
    + ` on, and saves ${percent(1 - now.N / L)} in the limit of long contexts.`,
  ];
}

// the same numbers from launch.calc
function command() {
  const base = fresh(view.preset);
  const words = [`--preset=${view.preset}`, `--context=${view.context}`];
  for (const [flag, name] of [['batch', 'batch'], ['dtype', 'dtype'], ['state_dtype', 'state']]) {
    if (view[name] !== base[name]) words.push(`--${flag}=${view[name]}`);
  }
  const changed = (now, was) => Object.keys(now)
    .filter(name => now[name] !== was[name]).map(name => `${name}=${now[name]}`);
  if (view.layers !== base.layers) words.push(`--layers=${view.layers}`);
  if (String(view.ratio) !== String(base.ratio)) words.push(`--ratio=${ratioText()}`);
  const attention = changed(view.attention, base.attention);
  if (attention.length) words.push(`--attention=${attention}`);
  const own = DATA.presets[view.preset].recurrent;
  const kept = own && own.kind === view.kind;
  if (view.ratio[0] > 0) {
    const fields = changed(view.recurrent, kept ? base.recurrent : {});
    if (!kept) fields.unshift(view.kind);
    if (fields.length) words.push(`--recurrent=${fields}`);
  }
  const lines = ['python -m launch.calc'];
  for (const word of words) {
    if (lines.at(-1).length + word.length > 70) lines.push(' ');
    lines[lines.length - 1] += ` ${word}`;
  }
  return lines.join(' \\\n');
}

const ratioText = () =>
  view.ratio[1] === 1 ? String(view.ratio[0]) : view.ratio.join(':');

// ---- the address: what differs from the preset

function toHash() {
  const base = fresh(view.preset), out = new URLSearchParams({preset: view.preset});
  for (const name of ['context', 'batch', 'dtype', 'state', 'layers', 'kind']) {
    if (view[name] !== base[name]) out.set(name, view[name]);
  }
  if (String(view.ratio) !== String(base.ratio)) out.set('ratio', ratioText());
  for (const sort of ['attention', 'recurrent']) {
    const was = mixer(sort).fields;
    for (const [name, value] of Object.entries(view[sort])) {
      if (value !== was[name]) out.set(`${sort}.${name}`, value);
    }
  }
  return `#${out.toString().replaceAll('%3A', ':')}`;
}

// what is unknown or out of range in an address is left as the preset has it
function fromHash() {
  const given = new URLSearchParams(location.hash.slice(1));
  const name = given.get('preset');
  view = fresh(Object.hasOwn(DATA.presets, name) ? name : DATA.start);
  if (Object.hasOwn(DATA.new, given.get('kind') || '')) setKind(given.get('kind'));
  for (const name of ['context', 'batch', 'layers']) {
    const n = whole(given.get(name), RANGES[name]);
    if (n !== null) view[name] = n;
  }
  if (given.get('dtype') in BYTES) view.dtype = given.get('dtype');
  if (['float32', 'bfloat16'].includes(given.get('state'))) view.state = given.get('state');
  view.ratio = readRatio(given.get('ratio')) || view.ratio;
  for (const sort of ['attention', 'recurrent']) {
    for (const name of Object.keys(view[sort])) {
      const n = whole(given.get(`${sort}.${name}`), mixer(sort).ranges[name]);
      if (n !== null) view[sort][name] = n;
    }
    for (const name of Object.keys(view[sort])) fit(sort, name);
  }
}

function whole(text, [least, most, step]) {
  const n = /^\d{1,9}$/.test(text ?? '') ? Number(text) : NaN;
  return n >= least && n <= most && (n - least) % step === 0 ? n : null;
}

function readRatio(text) {
  const found = /^(\d{1,3})(?::(\d{1,3}))?$/.exec(text ?? '');
  if (!found) return null;
  const [R, A] = [Number(found[1]), Number(found[2] ?? 1)];
  return A >= 1 ? [R, A] : null;
}

// ---- changes

function setKind(kind) {
  view.kind = kind;
  view.recurrent = {...mixer('recurrent').fields};
}

// of two fields that must divide, the one not just set follows
function fit(sort, name) {
  const fields = view[sort], {ranges} = mixer(sort);
  for (const [part, {divides: all}] of Object.entries(DATA.fields)) {
    if (!(part in fields) || !(all in fields)) continue;
    if (name === part) {
      const most = ranges[all][1];
      let times = Math.max(1, Math.round(fields[all] / fields[part]));
      while (times > 1 && times * fields[part] > most) times--;
      fields[all] = times * fields[part];
    } else if (name === all) {
      while (fields[all] % fields[part]) fields[part]--;
    }
  }
}

function changed(write) {
  write();
  history.replaceState(null, '', toHash());
  draw();
}

// ---- controls: a label, a number to type, a slider

function control(parent, {id, label, allowed, log, get, set}) {
  const [least, most, step] = allowed;
  const box = document.createElement('div'), number = document.createElement('input');
  const range = document.createElement('input'), name = document.createElement('label');
  const problem = document.createElement('p');
  box.className = 'control';
  Object.assign(name, {textContent: label, htmlFor: id});
  Object.assign(number, {id, type: 'number', min: least, max: most, step, inputMode: 'numeric'});
  const [low, high, by] = log ? [log.from, Math.log2(most), log.step] : allowed;
  Object.assign(range, {type: 'range', id: `${id}-range`, min: low, max: high, step: by});
  range.setAttribute('aria-label', `${label}, slider`);
  problem.id = `${id}-problem`;
  problem.className = 'hint problem';
  problem.hidden = true;
  number.setAttribute('aria-describedby', problem.id);
  box.append(name, number, range, problem);
  parent.append(box);
  range.addEventListener('input', () => {
    const x = Number(range.value);
    changed(() => set(log ? Math.round(2 ** x) : x));
  });
  number.addEventListener('input', () => {
    const n = whole(number.value, allowed);
    number.setAttribute('aria-invalid', n === null);
    problem.hidden = n !== null;
    problem.textContent = `${step === 2 ? 'An even' : 'A whole'} number from ${least} to ${count(most)}`;
    if (n !== null) changed(() => set(n));
  });
  return () => {
    const n = get();
    if (document.activeElement !== number || whole(number.value, allowed) !== null) {
      if (Number(number.value) !== n) number.value = n;
      number.setAttribute('aria-invalid', false);
      problem.hidden = true;
    }
    if (document.activeElement !== range || (log ? Math.round(2 ** range.value) : Number(range.value)) !== n) {
      range.value = log ? Math.log2(n) : n;
    }
    range.setAttribute('aria-valuetext', count(n));
  };
}

let refresh = [], built = '';

function build() {
  const key = JSON.stringify([view.preset, view.kind]);
  if (key === built) return;
  built = key;
  refresh = [];
  for (const id of ['run', 'pattern', 'attention', 'recurrent']) $(id).replaceChildren();
  const plain = (parent, name, label, log) => refresh.push(control($(parent), {
    id: name, label, allowed: RANGES[name], log,
    get: () => view[name], set: n => { view[name] = n; },
  }));
  plain('run', 'context', 'Context, tokens', {from: 6, step: 0.25});
  plain('run', 'batch', 'Sequences at once', {from: 0, step: 1});
  plain('pattern', 'layers', 'Layers');
  refresh.push(ratioControl($('pattern')));
  for (const sort of ['attention', 'recurrent']) {
    for (const name of Object.keys(view[sort])) {
      const {label} = DATA.fields[name];
      refresh.push(control($(sort), {
        id: `${sort}-${name}`, label, allowed: mixer(sort).ranges[name],
        get: () => view[sort][name],
        set: n => { view[sort][name] = n; fit(sort, name); },
      }));
    }
  }
}

// recurrent layers to one of attention; released models also have 20 : 7
function ratioControl(parent) {
  const box = document.createElement('div');
  box.className = 'control';
  box.innerHTML = `<label for="ratio">Recurrent layers to attention</label>
    <input id="ratio" inputmode="text" autocomplete="off"
      aria-describedby="ratio-hint">
    <input id="ratio-range" type="range" min="0" max="15" step="1"
      aria-label="Recurrent layers to one of attention, slider">
    <p class="hint" id="ratio-hint"></p>`;
  parent.append(box);
  const [text, range, hint] = ['ratio', 'ratio-range', 'ratio-hint'].map($);
  range.addEventListener('input', () =>
    changed(() => { view.ratio = [Number(range.value), 1]; }));
  text.addEventListener('input', () => {
    const ratio = readRatio(text.value);
    text.setAttribute('aria-invalid', !ratio);
    if (ratio) changed(() => { view.ratio = ratio; });
    else hint.textContent = 'As 3, or 20:7; 0 is attention everywhere';
  });
  return () => {
    const N = attentionLayers(view), rest = view.layers - N;
    if (String(readRatio(text.value)) !== String(view.ratio)) text.value = ratioText();
    text.setAttribute('aria-invalid', false);
    const near = Math.round(view.ratio[0] / view.ratio[1]);
    if (Number(range.value) !== near) range.value = near;
    range.setAttribute('aria-valuetext', `${ratioText()}: ${rest} recurrent, ${N} attention`);
    hint.textContent = `${rest} recurrent, ${N} attention`;
  };
}
