// The status page in Chromium: what it says, to whom, and that it loads nothing from elsewhere.
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdir, mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { after, before, test } from 'node:test';
import { fileURLToPath } from 'node:url';
import { launchChromium, openPage, servePages, until } from './lib/browser.mjs';
import { Homeport, binary, freePort } from './lib/homeport.mjs';

const artifacts = join(dirname(fileURLToPath(import.meta.url)), 'artifacts');
let homeport, pages, browser;
before(async () => {
  pages = await servePages();
  browser = await launchChromium();
  await mkdir(artifacts, { recursive: true });
  homeport = await Homeport.start({
    rooms: ['notes', { name: '<b>crowd</b>', cells: { cell_size: 2 } }], settings: { HOMEPORT_RELAY__STATUS_TOKEN: 'north star' },
  });
});
after(async () => {
  await browser?.close();
  pages?.close();
  await homeport?.stop();
});

async function open(hash = '', options = {}) {
  const context = await browser.newContext(options);
  const page = await context.newPage();
  page.errors = [];
  page.requested = [];
  page.on('console', message => { if (message.type() === 'error') page.errors.push(message.text()); });
  page.on('pageerror', error => page.errors.push(String(error)));
  page.on('request', request => page.requested.push(new URL(request.url()).origin));
  await page.goto(`${homeport.httpUrl}/${hash}`);
  await until(page, 'a verdict', () => document.getElementById('verdict').textContent !== 'Looking…');
  return page;
}

test('a stranger sees that it works, and no names', async () => {
  const page = await open();
  assert.equal(await page.textContent('#verdict'), 'Everything works.');
  assert.deepEqual(await page.$$eval('#services strong', names => names.map(name => name.textContent)), ['turn', 'relay', 'seed', 'tries from inside']);
  assert.equal(await page.isVisible('#rooms-section'), false);
  assert.ok(!(await page.content()).includes('notes'));
  assert.ok((await page.textContent('#snippet')).includes(`${homeport.httpUrl}/client-config.json`));
  const answer = await (await fetch(`${homeport.httpUrl}/status.json`, { headers: { authorization: 'Bearer wrong' } })).json();
  assert.deepEqual([answer.details, answer.rooms], [false, []]);
  assert.deepEqual([...new Set(page.requested)], [homeport.httpUrl]);
  assert.deepEqual(page.errors.filter(text => !text.includes('favicon')), []);
  await page.screenshot({ path: join(artifacts, 'status.png'), fullPage: true });
  await page.context().close();
});

test('who knows the token sees rooms and their meshes, on a phone and in the dark too', async () => {
  const opened = [];
  for (const name of ['notes', '<b>crowd</b>', '<b>crowd</b>', '<b>crowd</b>']) {
    const rtc = { ...homeport.rtc, ...(name === 'notes' ? {} : { cells: { cellSize: 2 } }) };
    const query = new URLSearchParams({ client: '/pages/wire-client.mjs', name, options: JSON.stringify({ rtc }) });
    opened.push(await openPage(browser, `${pages.url}/pages/database.html?${query}`));
  }
  await Promise.all(opened.map(page => until(page, 'the database', () => window.loaded === true)));
  await opened[0].evaluate(() => window.db.put({ text: 'hello' }, 'a'));
  const page = await open(`#token=${encodeURIComponent('north star')}`, { viewport: { width: 360, height: 740 }, colorScheme: 'dark' });
  const rooms = () => page.$$eval('#rooms > li', list => list.map(({ innerText }) => innerText.split('\n').slice(0, 2)));
  await until(page, 'rooms', () => [...document.querySelectorAll('#rooms > li')].some(({ innerText }) => innerText.includes('1 nodes')));
  // A name is a name, whatever it looks like.
  assert.deepEqual((await rooms()).map(([name]) => name), ['<b>crowd</b>', 'notes']);
  assert.equal(await page.$$eval('#rooms b', list => list.length), 0);
  await until(page, 'cells', () => document.querySelectorAll('#rooms .mesh circle:not(.seed):not(.page)').length >= 2);
  assert.ok(await page.$$eval('#rooms .mesh .bridged', list => list.length) >= 1, 'the seed bridges a cell');
  assert.equal(await page.$$eval('#rooms .mesh .page', list => list.length), 1);
  assert.ok(await page.evaluate(() => document.documentElement.scrollWidth <= innerWidth), 'it fits a phone');
  await page.screenshot({ path: join(artifacts, 'status-phone-dark.png'), fullPage: true });
  await Promise.all([...opened, page].map(one => one.context().close()));
});

test('when it is down, the page says so, and when it is back too', async () => {
  const page = await open();
  await homeport.terminate();
  await until(page, 'bad news', () => document.getElementById('verdict').textContent === 'Homeport does not answer.');
  await homeport.run();
  await until(page, 'good news', () => document.getElementById('verdict').textContent === 'Everything works.');
  await page.context().close();
});

test('of services that are separate processes, the page shows all, and which of them is gone', async () => {
  const folder = await mkdtemp(join(tmpdir(), 'homeport-status-'));
  const ports = { relay: await freePort(), turn: await freePort(), seed: await freePort() };
  const watched = { relay: await freePort(), turn: await freePort(), seed: await freePort() };
  const started = {};
  const start = async service => {
    const child = spawn(binary, [service], {
      cwd: folder, stdio: ['ignore', 'pipe', 'inherit'],
      env: {
        ...process.env,
        HOMEPORT_RELAY__LISTEN: `127.0.0.1:${ports.relay}`, HOMEPORT_TURN__LISTEN: `[::]:${ports.turn}`, HOMEPORT_SEED__LISTEN: `[::]:${ports.seed}`,
        HOMEPORT_METRICS__LISTEN: `127.0.0.1:${watched[service]}`,
        HOMEPORT_METRICS__OTHERS: JSON.stringify([`127.0.0.1:${watched.turn}`, `127.0.0.1:${watched.seed}`]),
        HOMEPORT_SEED__RELAYS: `["ws://127.0.0.1:${ports.relay}/"]`, HOMEPORT_SEED__ROOM: '[{name="apart"}]',
      },
    });
    started[service] = child;
    let summary = '';
    for await (const data of child.stdout) {
      summary += data;
      if (/metrics/.test(summary)) return;
    }
  };
  const end = async service => {
    const ended = once(started[service], 'exit');
    started[service].kill('SIGTERM');
    await ended;
  };
  try {
    // The TURN server makes up the secret that the others then share.
    await start('turn');
    await start('relay');
    await start('seed');
    const page = await (await browser.newContext()).newPage();
    page.errors = [];
    await page.goto(`http://127.0.0.1:${ports.relay}/`);
    const lists = names => until(page, names.join(), names =>
      [...document.querySelectorAll('#services > li')].map(({ innerText }) => innerText.split('\n')[0]).join() === names.join(), names);
    await lists(['relay works', 'tries from inside works', 'turn works', 'seed works']);
    await until(page, 'the room', () => document.querySelector('#rooms > li')?.innerText.includes('apart'));
    await end('turn');
    await lists(['relay works', 'tries from inside works', 'turn down', 'seed works']);
    assert.match(await page.textContent('#verdict'), /Not all is well: turn/);
    await page.screenshot({ path: join(artifacts, 'status-turn-gone.png'), fullPage: true });
    await start('turn');
    await lists(['relay works', 'tries from inside works', 'turn works', 'seed works']);
    await page.context().close();
  } finally {
    for (const [service, child] of Object.entries(started)) if (child.exitCode === null) await end(service);
    await rm(folder, { recursive: true, force: true });
  }
});
