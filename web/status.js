// The status page: asks /status.json every five seconds, and draws what it says. Text only ever goes in as text.

const EVERY_MS = 5_000;
const SVG = 'http://www.w3.org/2000/svg';
const $ = id => document.getElementById(id);

let token = decodeURIComponent(/[#&]token=([^&]*)/.exec(location.hash)?.[1] ?? '');

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function drawn(name, attributes, ...children) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

const number = new Intl.NumberFormat('en');
const percent = new Intl.NumberFormat('en', { style: 'percent', maximumFractionDigits: 1 });

/** A service: how it is, and which of its parts are not well. */
function service(kind, { name, state, parts }) {
  return element(kind, {},
    element('strong', { textContent: name }), ' ',
    element('span', { className: state === 'ok' ? 'good' : 'bad', textContent: state === 'ok' ? 'works' : state }),
    ...parts.filter(part => part.state !== 'ok').map(part =>
      element('div', { className: 'soft', textContent: part.reason ? `${part.name}: ${part.reason}` : part.name })));
}

/** The services; in a cluster, by their machines. */
function services(list, machines) {
  $('services-section').hidden = machines.length > 0;
  $('machines-section').hidden = machines.length === 0;
  $('services').replaceChildren(...list.map(one => service('li', one)));
  $('machines').replaceChildren(...machines.map(machine => element('li', {},
    element('h3', { textContent: machine.name }),
    ...machine.services.map(one => service('div', one)),
    element('div', { className: 'soft', textContent: `Homeport ${machine.version}` }))));
}

/** What is not well, by name. */
function troubles(list, machines) {
  const troubled = ({ state }) => state !== 'ok';
  return machines.length === 0 ? list.filter(troubled).map(({ name }) => name)
    : machines.flatMap(machine => machine.services.filter(troubled).map(({ name }) => `${name} of ${machine.name}`));
}

/** The share of attempts that succeeded, in words. */
function ratio([succeeded, attempted]) {
  return attempted >= 5 ? percent.format(succeeded / attempted) : 'too few to say';
}

function numbers({ now, success }) {
  const all = Object.values(success).reduce(([one, two], [ok, tried]) => [one + ok, two + tried], [0, 0]);
  const shown = [
    ['Attempts that connect', ratio(all)],
    ['Clients of the relay', now.connections],
    ['TURN allocations', now.allocations],
    ['Links with the seed', now.links],
    ['Nodes kept', now.nodes],
  ].filter(([, value]) => value !== null && value !== undefined);
  $('numbers').replaceChildren(...shown.map(([name, value]) => element('div', {},
    element('dt', { textContent: name }),
    element('dd', { textContent: typeof value === 'number' ? number.format(value) : value }))));
}

/** A line of the last hour. */
function chart(name, values) {
  const known = values.filter(value => value !== null);
  const isShare = name.startsWith('Share');
  const top = Math.max(1, ...known);
  const most = isShare ? '' : `; at most ${number.format(Math.max(0, ...known))}`;
  const width = 240;
  const points = values.map((value, index) => [index * width / Math.max(1, values.length - 1), value])
    .filter(([, value]) => value !== null).map(([x, value]) => `${x.toFixed(1)},${(40 - 38 * value / top).toFixed(1)}`);
  return element('div', { className: 'chart' },
    element('div', { className: 'soft', textContent: `${name}, last hour${most}` }),
    drawn('svg', { viewBox: `0 0 ${width} 42`, role: 'img', 'aria-label': `${name} over the last hour` },
      drawn('polyline', { points: points.join(' ') })));
}

function charts({ connections, links, allocations, success }) {
  $('charts').replaceChildren(chart('Clients of the relay', connections), chart('Links with the seed', links),
    chart('TURN allocations', allocations), chart('Share that connects', success));
}

/** A room's mesh: the seed in the middle, its pages or cells around it. */
function mesh({ cells, peers, links, paused }) {
  const picture = drawn('svg', { class: 'mesh', viewBox: '-100 -100 200 200', role: 'img' });
  const around = (count, index, radius) => {
    const angle = 2 * Math.PI * index / count - Math.PI / 2;
    return [radius * Math.cos(angle), radius * Math.sin(angle)].map(value => value.toFixed(1));
  };
  const title = drawn('title', {});
  picture.append(title);
  if (cells.length > 0) {
    title.textContent = `${cells.length} cells, ${cells.filter(cell => cell.bridged).length} with the seed as their bridge`;
    const places = cells.map((_, index) => around(cells.length, index, 70));
    // Neighbours are so many steps of powers of two apart.
    cells.forEach((_, index) => {
      for (let step = 1; index + step < cells.length; step *= 2) {
        const [[x1, y1], [x2, y2]] = [places[index], places[index + step]];
        picture.append(drawn('line', { x1, y1, x2, y2 }));
      }
    });
    cells.forEach(({ members, bridged }, index) => {
      const [cx, cy] = places[index];
      if (bridged) picture.append(drawn('line', { x1: 0, y1: 0, x2: cx, y2: cy }));
      picture.append(drawn('circle', { cx, cy, r: 10 + Math.min(10, members), ...(bridged ? { class: 'bridged' } : {}) }),
        drawn('text', { x: cx, y: cy }, String(members)));
    });
  } else {
    title.textContent = `a full mesh of ${peers} peers`;
    const shown = Math.min(peers, 60);
    const places = Array.from({ length: shown }, (_, index) => around(shown, index, 75));
    if (shown <= 16) {
      places.forEach(([x1, y1], index) => places.slice(index + 1).forEach(([x2, y2]) => picture.append(drawn('line', { x1, y1, x2, y2 }))));
    }
    places.forEach(([x2, y2]) => { if (links > 0) picture.append(drawn('line', { x1: 0, y1: 0, x2, y2 })); });
    places.forEach(([cx, cy]) => picture.append(drawn('circle', { cx, cy, r: 5, class: 'page' })));
  }
  if (!paused) picture.append(drawn('circle', { cx: 0, cy: 0, r: 9, class: 'seed' }));
  return picture;
}

function rooms(list, details) {
  $('rooms-section').hidden = !details || list.length === 0;
  $('token-form').hidden = details;
  $('rooms').replaceChildren(...list.map(room => element('li', {},
    element('strong', { textContent: room.name }),
    element('div', { className: 'soft', textContent: room.paused ? 'paused'
      : `${number.format(room.peers)} present, ${number.format(room.links)} links, ${number.format(room.nodes)} nodes${
        room.held_by ? `, held by ${room.held_by}` : ''}` }),
    mesh(room))));
}

function verdict(text, good) {
  $('verdict').textContent = text;
  $('verdict').className = good ? 'good' : 'bad';
}

async function look() {
  try {
    const headers = token ? { authorization: `Bearer ${token}` } : {};
    const answer = await fetch('/status.json', { headers, signal: AbortSignal.timeout(EVERY_MS) });
    if (!answer.ok) throw new Error(answer.status);
    const status = await answer.json();
    const troubled = troubles(status.services, status.machines);
    verdict(troubled.length === 0 ? 'Everything works.' : `Not all is well: ${troubled.join(', ')}.`, troubled.length === 0);
    services(status.services, status.machines);
    numbers(status);
    charts(status.history);
    rooms(status.rooms, status.details);
    $('version').textContent = `Homeport ${status.version}`;
    $('version').className = 'soft';
  } catch {
    verdict('Homeport does not answer.', false);
  } finally {
    setTimeout(look, EVERY_MS);
  }
}

$('snippet').textContent = `const rtc = await (await fetch('${location.origin}/client-config.json')).json();\nconst db = await gdb('my-app', { rtc });`;
$('copy').addEventListener('click', async () => {
  try {
    await navigator.clipboard.writeText($('snippet').textContent);
  } catch {
    // Without HTTPS there is no clipboard: mark it, so that it can be copied by hand.
    getSelection().selectAllChildren($('snippet'));
    return;
  }
  $('copy').textContent = 'Copied';
  setTimeout(() => { $('copy').textContent = 'Copy'; }, 2_000);
});
$('token-form').addEventListener('submit', event => {
  event.preventDefault();
  token = $('token').value;
});
look();
