// ---- changes

function setKind(kind) {
  view.kind = kind;
  view.recurrent = {...mixer('recurrent').fields};
}

// of two fields that must divide, the one not just set follows
function fit(sort, name) {
  const fields = view[sort],
    {ranges} = mixer(sort);
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
  const box = document.createElement('div'),
    number = document.createElement('input');
  const range = document.createElement('input'),
    name = document.createElement('label');
  const problem = document.createElement('p');
  box.className = 'control';
  Object.assign(name, {textContent: label, htmlFor: id});
  Object.assign(number, {
    id,
    type: 'number',
    min: least,
    max: most,
    step,
    inputMode: 'numeric',
  });
  const [low, high, by] = log ? [log.from, Math.log2(most), log.step] : allowed;
  Object.assign(range, {
    type: 'range',
    id: `${id}-range`,
    min: low,
    max: high,
    step: by,
  });
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
    if (
      document.activeElement !== number ||
      whole(number.value, allowed) !== null
    ) {
      if (Number(number.value) !== n) number.value = n;
      number.setAttribute('aria-invalid', false);
      problem.hidden = true;
    }
    if (
      document.activeElement !== range ||
      (log ? Math.round(2 ** range.value) : Number(range.value)) !== n
    ) {
      range.value = log ? Math.log2(n) : n;
    }
    range.setAttribute('aria-valuetext', count(n));
  };
}

let refresh = [],
  built = '';

function build() {
  const key = JSON.stringify([view.preset, view.kind]);
  if (key === built) return;
  built = key;
  refresh = [];
  for (const id of ['run', 'pattern', 'attention', 'recurrent'])
    $(id).replaceChildren();
  const plain = (parent, name, label, log) =>
    refresh.push(
      control($(parent), {
        id: name,
        label,
        allowed: RANGES[name],
        log,
        get: () => view[name],
        set: n => {
          view[name] = n;
        },
      }),
    );
  plain('run', 'context', 'Context, tokens', {from: 6, step: 0.25});
  plain('run', 'batch', 'Batch, sequences', {from: 0, step: 1});
  plain('pattern', 'layers', 'Layers');
  refresh.push(ratioControl($('pattern')));
  for (const sort of ['attention', 'recurrent']) {
    for (const name of Object.keys(view[sort])) {
      const {label} = DATA.fields[name];
      refresh.push(
        control($(sort), {
          id: `${sort}-${name}`,
          label,
          allowed: mixer(sort).ranges[name],
          get: () => view[sort][name],
          set: n => {
            view[sort][name] = n;
            fit(sort, name);
          },
        }),
      );
    }
  }
}

// recurrent to attention layers; released models also have 20 : 7
function ratioControl(parent) {
  const box = document.createElement('div');
  box.className = 'control';
  box.innerHTML = `<label for="ratio">Recurrent layers per attention layer</label>
    <input id="ratio" inputmode="text" autocomplete="off"
      aria-describedby="ratio-hint">
    <input id="ratio-range" type="range" min="0" max="15" step="1"
      aria-label="Recurrent layers per attention layer, slider">
    <p class="hint" id="ratio-hint"></p>`;
  parent.append(box);
  const [text, range, hint] = ['ratio', 'ratio-range', 'ratio-hint'].map($);
  range.addEventListener('input', () =>
    changed(() => {
      view.ratio = [Number(range.value), 1];
    }),
  );
  text.addEventListener('input', () => {
    const ratio = readRatio(text.value);
    text.setAttribute('aria-invalid', !ratio);
    if (ratio)
      changed(() => {
        view.ratio = ratio;
      });
    else hint.textContent = 'Such as 3 or 20:7; 0: attention in every layer';
  });
  return () => {
    const N = attentionLayers(view),
      rest = view.layers - N;
    if (String(readRatio(text.value)) !== String(view.ratio))
      text.value = ratioText();
    text.setAttribute('aria-invalid', false);
    const near = Math.round(view.ratio[0] / view.ratio[1]);
    if (Number(range.value) !== near) range.value = near;
    range.setAttribute(
      'aria-valuetext',
      `${ratioText()}: ${rest} recurrent, ${N} attention`,
    );
    hint.textContent = `${rest} recurrent, ${N} attention`;
  };
}
