'use strict';
// every number is a product of the axes of a cache array and the bytes of its
// dtype, summed over layers; page.py takes the axes from the models

const DATA = JSON.parse(document.getElementById('data').textContent);
const BYTES = {float32: 4, bfloat16: 2, float8: 1};
const PARTS = ['tokens', 'state', 'convolution', 'positions'];
const RANGES = {
  context: [1, 2 ** 24, 1],
  batch: [1, 1024, 1],
  layers: [1, 256, 1],
};
const $ = id => document.getElementById(id);
const count = n => Math.round(n).toLocaleString('en-US');
let view;

// ---- the model in view

function fresh(name) {
  const preset = DATA.presets[name];
  return {
    preset: name,
    context: 32768,
    batch: 1,
    dtype: 'bfloat16',
    state: 'float32',
    layers: preset.layers,
    ratio: preset.ratio.slice(),
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

const mixer = sort =>
  sort === 'attention'
    ? DATA.presets[view.preset].attention
    : made(view.preset, view.kind);

function attentionLayers({layers: L, ratio: [R, A]}) {
  return Math.max(
    Math.min(A, 1),
    Math.floor((2 * L * A + R + A) / (2 * (R + A))),
  );
}

// bytes of one layer's cache by part
function layer(sort, at) {
  const values = {...view[sort], context: at.context, batch: at.batch};
  const widths = {state: BYTES[at.state], positions: 4};
  const sums = {};
  for (const {part, axes} of mixer(sort).arrays) {
    const size = axes.reduce(
      (product, axis) =>
        product * (typeof axis === 'number' ? axis : values[axis[0]] + axis[1]),
      1,
    );
    sums[part] = (sums[part] || 0) + size * (widths[part] || BYTES[at.dtype]);
  }
  return sums;
}

const total = sums => Object.values(sums).reduce((a, b) => a + b, 0);

function sizes(context) {
  const at = {...view, context},
    N = attentionLayers(view);
  const attention = layer('attention', at),
    recurrent = layer('recurrent', at);
  const full = total(attention),
    pure = total(recurrent),
    L = view.layers;
  return {
    attention,
    recurrent,
    N,
    full: L * full,
    pure: L * pure,
    hybrid: N * full + (L - N) * pure,
  };
}

// the fewest tokens at which the hybrid is the smaller; null: never
function breakEven() {
  const at = n => sizes(n),
    none = at(0),
    L = view.layers;
  if (none.N === L || none.N === 0) return null;
  const grows = (at(1).full - none.full) / L;
  const ahead = (none.pure - none.full) / L;
  return Math.max(1, Math.floor(ahead / grows) + 1);
}

// ---- words

function size(n) {
  const power = Math.min(
    4,
    Math.max(0, Math.floor(Math.log2(Math.max(n, 1)) / 10)),
  );
  if (!power) return `${count(n)} B`;
  return `${(n / 1024 ** power).toFixed(1)} ${['KiB', 'MiB', 'GiB', 'TiB'][power - 1]}`;
}

const percent = x => `${(100 * x).toFixed(1)}%`;

function verdict() {
  const now = sizes(view.context),
    cross = breakEven(),
    L = view.layers;
  const tokens = `${count(view.context)} token${view.context === 1 ? '' : 's'}`;
  const many =
    view.batch === 1 ? tokens : `${tokens} in each of ${view.batch} sequences`;
  if (now.N === L) {
    return [
      `At ${many} attention in every layer takes `,
      size(now.full),
      '. Move the ratio to see how much recurrent layers would save.',
    ];
  }
  const saved = 1 - now.hybrid / now.full;
  const more =
    now.hybrid === now.full
      ? 'the same'
      : saved > 0
        ? `${percent(saved)} less`
        : `${percent(-saved)} more`;
  return [
    `At ${many} the hybrid takes ${size(now.hybrid)}, attention in every` +
      ` layer ${size(now.full)}: `,
    more,
    `. The hybrid is smaller from ${count(cross)} token${cross === 1 ? '' : 's'}` +
      ` on, by up to ${percent(1 - now.N / L)} for long contexts.`,
  ];
}

// the same numbers from launch.calc
function command() {
  const base = fresh(view.preset);
  const words = [`--preset=${view.preset}`, `--context=${view.context}`];
  for (const [flag, name] of [
    ['batch', 'batch'],
    ['dtype', 'dtype'],
    ['state_dtype', 'state'],
  ]) {
    if (view[name] !== base[name]) words.push(`--${flag}=${view[name]}`);
  }
  const changed = (now, was) =>
    Object.keys(now)
      .filter(name => now[name] !== was[name])
      .map(name => `${name}=${now[name]}`);
  if (view.layers !== base.layers) words.push(`--layers=${view.layers}`);
  if (String(view.ratio) !== String(base.ratio))
    words.push(`--ratio=${ratioText()}`);
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
  const base = fresh(view.preset),
    out = new URLSearchParams({preset: view.preset});
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
  const asked = given.get('preset');
  const name = Object.hasOwn(DATA.former, asked) ? DATA.former[asked] : asked;
  view = fresh(Object.hasOwn(DATA.presets, name) ? name : DATA.start);
  if (Object.hasOwn(DATA.new, given.get('kind') || ''))
    setKind(given.get('kind'));
  for (const name of ['context', 'batch', 'layers']) {
    const n = whole(given.get(name), RANGES[name]);
    if (n !== null) view[name] = n;
  }
  if (given.get('dtype') in BYTES) view.dtype = given.get('dtype');
  if (['float32', 'bfloat16'].includes(given.get('state')))
    view.state = given.get('state');
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
