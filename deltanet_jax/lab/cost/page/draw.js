// ---- what the page shows

function draw() {
  build();
  for (const show of refresh) show();
  const preset = DATA.presets[view.preset];
  $('preset').value = view.preset;
  $('about').textContent = preset.about;
  $('dtype').value = view.dtype;
  $('state').value = view.state;
  $('kind').value = view.kind;
  $('attention-kind').textContent =
    preset.attention.kind === 'Attention' ? '' : preset.attention.kind;
  const [before, much, after] = verdict();
  $('verdict').innerHTML = '<span></span><strong></strong><span></span>';
  [before, much, after].forEach((x, i) => {
    $('verdict').children[i].textContent = x.replace(
      / (?=[KMGT]?i?B\b)/g,
      '\u00a0',
    );
  });
  $('command').value = command();
  $('command').rows = command().split('\n').length;
  $('copied').textContent = '';
  table();
  chart();
  announce(before + much + after);
}

let waiting;

// a slider on its way is not read out at every step
function announce(text) {
  clearTimeout(waiting);
  waiting = setTimeout(() => {
    $('status').textContent = text;
  }, 500);
}

function table() {
  const now = sizes(view.context),
    next = sizes(view.context + 1),
    none = sizes(0);
  const L = view.layers,
    rows = [],
    N = now.N;
  const parts = (sort, kind, layers) =>
    PARTS.filter(part => now[sort][part] !== undefined).map(part => [
      'part',
      `${kind}, ${part}`,
      x => layers * x[sort][part],
      `${sort}-${part}`,
    ]);
  const attention = DATA.presets[view.preset].attention.kind;
  rows.push(['line full', `Attention in all ${L}`, x => x.full, 'full']);
  if (N < L) {
    rows.push([
      'line hybrid',
      `Hybrid, ${L - N} + ${N}`,
      x => x.hybrid,
      'hybrid',
    ]);
    rows.push(...parts('recurrent', view.kind, L - N));
  }
  if (N) rows.push(...parts('attention', attention, N));
  if (N < L)
    rows.push(['line pure', `Recurrent in all ${L}`, x => x.pure, 'pure']);
  $('at').textContent =
    `${count(view.context)} token${view.context === 1 ? '' : 's'}`;
  $('rows').replaceChildren(
    ...rows.map(([name, label, of, key]) => {
      const row = document.createElement('tr'),
        head = document.createElement('th');
      const values = [of(next) - of(now), of(none), of(now)];
      Object.assign(row, {className: name, id: `row-${key}`});
      Object.assign(head, {scope: 'row', textContent: label});
      row.append(
        head,
        ...[size(values[2]), ...values.map(count)].map(x => {
          const cell = document.createElement('td');
          cell.textContent = x;
          return cell;
        }),
      );
      row.dataset.bytes = values.join(' ');
      return row;
    }),
  );
}

// ---- the chart, both axes logarithmic

const TICKS = {
  x: [
    [8, '256'],
    [10, '1K'],
    [12, '4K'],
    [14, '16K'],
    [16, '64K'],
    [18, '256K'],
    [20, '1M'],
    [22, '4M'],
    [24, '16M'],
  ],
  y: [
    ['B', 0],
    ['KiB', 10],
    ['MiB', 20],
    ['GiB', 30],
    ['TiB', 40],
    ['PiB', 50],
  ].flatMap(([unit, at]) => [
    [at, `1 ${unit}`],
    [at + 5, `32 ${unit}`],
  ]),
};

function chart() {
  const width = $('chart').clientWidth || 640,
    small = width < 520;
  const height = small ? 300 : 400;
  const box = {
    left: small ? 50 : 56,
    right: width - (small ? 98 : 112),
    top: 26,
    bottom: height - 36,
  };
  const names = [
    ['full', 'All attention'],
    ['hybrid', `Hybrid ${view.ratio.join(':')}`],
    ['pure', 'All recurrent'],
  ];
  const mixed = sizes(1).N < view.layers;
  const shown = mixed ? names : names.slice(0, 1);
  const ends = [2 ** 8, 2 ** 24]
    .map(sizes)
    .flatMap(x => shown.map(([key]) => Math.log2(x[key])));
  const low = Math.floor(Math.min(...ends)) - 1,
    high = Math.ceil(Math.max(...ends)) + 1;
  const x = n => box.left + ((Math.log2(n) - 8) / 16) * (box.right - box.left);
  const y = bytes =>
    box.bottom -
    ((Math.log2(bytes) - low) / (high - low)) * (box.bottom - box.top);
  const cross = breakEven();
  const parts = [
    ...axes(x, y, box, [low, high], small),
    ...lines(shown, x, y, mixed ? cross : null),
    ...labels(shown, y, box),
    ...marks(shown, x, y, box, cross),
  ];
  const about =
    'Bytes of states and KV cache against tokens of context; the table has the numbers.';
  $('chart').innerHTML =
    `<svg viewBox="0 0 ${width} ${height}" height="${height}" role="img"` +
    ` aria-label="${about}">${parts.join('')}</svg>`;
  $('chart').dataset.box = [box.left, box.right].join(' ');
}

function axes(x, y, box, [low, high], small) {
  const parts = [];
  for (const [at, label] of TICKS.y.filter(([at]) => at >= low && at <= high)) {
    parts.push(
      line('grid', box.left, y(2 ** at), box.right, y(2 ** at)),
      words('', box.left - 8, y(2 ** at) + 4, label, 'end'),
    );
  }
  for (const [i, [at, label]] of TICKS.x.entries()) {
    if (small && i % 2 === 1) continue;
    parts.push(words('', x(2 ** at), box.bottom + 18, label, 'middle'));
  }
  parts.push(words('', box.right, box.bottom + 33, 'tokens of context', 'end'));
  return parts;
}

// the hybrid on top, and a shade over what it saves from `cross` on
function lines(shown, x, y, cross) {
  const steps = Array.from({length: 97}, (_, i) => 2 ** (8 + i / 6));
  const points = (key, from) =>
    steps.filter(n => n >= from).map(n => [x(n), y(sizes(n)[key])]);
  const path = (name, points, end = '') => {
    const text = points.map(p => p.map(v => v.toFixed(1)).join(' ')).join('L');
    return `<path class="${name}" d="M${text}${end}"/>`;
  };
  const parts = shown.toReversed().map(([key]) => path(key, points(key, 0)));
  const edge = cross === null ? [] : points('full', cross);
  if (edge.length) {
    edge.push(...points('hybrid', cross).reverse());
    parts.unshift(path('shade', edge, 'Z'));
  }
  return parts;
}

const line = (name, x1, y1, x2, y2) =>
  `<line class="${name}" x1="${x1}" y1="${y1}" x2="${x2}" y2="${y2}"/>`;
const words = (name, x, y, text, anchor = 'start') =>
  `<text class="${name}" x="${x}" y="${y}" text-anchor="${anchor}">${text}</text>`;

// names stand at the lines' ends, apart enough to be read
function labels(shown, y, box) {
  const ends = shown
    .map(([key, name]) => ({key, name, at: y(sizes(2 ** 24)[key])}))
    .sort((a, b) => a.at - b.at);
  for (let i = 1; i < ends.length; i++)
    ends[i].at = Math.max(ends[i].at, ends[i - 1].at + 16);
  return ends.map(({key, name, at}) =>
    words(`name ${key}`, box.right + 8, at + 4, name),
  );
}

// the context in view, and where hybrid and all attention are the same size
function marks(shown, x, y, box, cross) {
  const parts = [],
    now = sizes(view.context);
  if (view.context >= 2 ** 8) {
    const at = x(view.context),
      end = at > (box.left + box.right) / 2;
    parts.push(
      line('now', at, box.top - 6, at, box.bottom),
      words(
        'mark',
        at + (end ? 4 : -4),
        box.top - 12,
        `${count(view.context)} tokens`,
        end ? 'end' : 'start',
      ),
    );
    for (const [key] of shown)
      parts.push(
        `<circle class="${key}" cx="${at}" cy="${y(now[key])}" r="4"/>`,
      );
  }
  if (cross !== null && cross >= 2 ** 8 && cross <= 2 ** 24) {
    const at = x(cross),
      end = at > (box.left + box.right) / 2;
    parts.push(
      `<circle class="cross" cx="${at}" cy="${y(sizes(cross).full)}" r="5.5"/>`,
      words(
        'mark',
        at + (end ? -10 : 10),
        y(sizes(cross).full) + 22,
        `hybrid smaller from ${count(cross)}`,
        end ? 'end' : 'start',
      ),
    );
  }
  return parts;
}

// ---- start

function choose() {
  for (const [title, wanted] of [
    ['Hybrids', true],
    ['Attention in every layer', false],
  ]) {
    const group = document.createElement('optgroup');
    group.label = title;
    for (const [name, preset] of Object.entries(DATA.presets)) {
      if (Boolean(preset.recurrent) === wanted)
        group.append(new Option(name, name));
    }
    $('preset').append(group);
  }
  $('kind').append(
    ...Object.keys(DATA.new).map(name => new Option(name, name)),
  );
  $('preset').addEventListener('change', () =>
    changed(() => {
      const {context, batch, dtype, state} = view;
      view = {...fresh($('preset').value), context, batch, dtype, state};
    }),
  );
  $('kind').addEventListener('change', () =>
    changed(() => setKind($('kind').value)),
  );
  for (const name of ['dtype', 'state']) {
    $(name).addEventListener('change', () =>
      changed(() => {
        view[name] = $(name).value;
      }),
    );
  }
  $('reset').addEventListener('click', () =>
    changed(() => {
      const {context, batch, dtype, state} = view;
      view = {...fresh(view.preset), context, batch, dtype, state};
    }),
  );
  $('copy').addEventListener('click', () => {
    $('command').select();
    copy($('command').value, 'the command is selected');
  });
  $('link').addEventListener('click', () =>
    copy(location.href, 'the address bar has it'),
  );
  for (const form of document.forms)
    form.addEventListener('submit', event => event.preventDefault());
  $('chart').addEventListener('click', point);
  $('chart').addEventListener('pointermove', event => {
    // a finger that moves is scrolling
    if (event.buttons & 1 && event.pointerType !== 'touch') point(event);
  });
}

// a press or a drag on the chart sets the context; the slider does it by key
function point(event) {
  const [left, right] = $('chart').dataset.box.split(' ').map(Number);
  const share =
    (event.clientX - $('chart').getBoundingClientRect().left - left) /
    (right - left);
  const steps = Math.round(64 * Math.min(1, Math.max(0, share))) / 4;
  changed(() => {
    view.context = Math.round(2 ** (8 + steps));
  });
}

async function copy(text, otherwise) {
  try {
    await navigator.clipboard.writeText(text);
    $('copied').textContent = 'Copied';
  } catch {
    $('copied').textContent = `Not allowed here: ${otherwise}`;
  }
}

choose();
fromHash();
draw();
addEventListener('hashchange', () => {
  fromHash();
  draw();
});
new ResizeObserver(chart).observe($('chart'));
