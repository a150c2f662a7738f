// Every panel of every dashboard, asked of a real Prometheus that scrapes two machines of a cluster with traffic on them.
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { dirname, join, resolve } from 'node:path';
import { once } from 'node:events';
import { fileURLToPath } from 'node:url';
import { after, before, test } from 'node:test';
import { launchChromium, openPage, servePages, until } from './lib/browser.mjs';
import { freePort, Homeport } from './lib/homeport.mjs';
import { Nats } from './lib/nats.mjs';

const dashboards = resolve(dirname(fileURLToPath(import.meta.url)), '../grafana/dashboards');

let homeport, other, nats, pages, browser, prometheus, folder, url;
before(async () => {
  nats = await Nats.withStreams();
  const machine = (name, settings) => Homeport.start({
    rooms: ['notes', { name: 'crowd', cells: true }],
    settings: { HOMEPORT_CLUSTER__NATS: nats.url, HOMEPORT_CLUSTER__NAME: name, HOMEPORT_RELAY__STORE: 'true', HOMEPORT_TURN__SECRET: 'of both', ...settings },
  });
  homeport = await machine('one', { HOMEPORT_SEED__BACKUP__TO: 'vault' });
  other = await machine('two');
  folder = await mkdtemp(join(tmpdir(), 'homeport-prometheus-'));
  const port = await freePort();
  url = `http://127.0.0.1:${port}`;
  await writeFile(join(folder, 'prometheus.yml'), JSON.stringify({
    global: { scrape_interval: '1s' },
    rule_files: [join(dashboards, '../../deploy/prometheus/rules.yml')],
    scrape_configs: [{ job_name: 'homeport', static_configs: [{ targets: [homeport, other].map(({ ports }) => `127.0.0.1:${ports.metrics}`) }] }],
  }));
  prometheus = spawn('prometheus', [`--config.file=${join(folder, 'prometheus.yml')}`,
    `--storage.tsdb.path=${join(folder, 'data')}`, `--web.listen-address=127.0.0.1:${port}`], { stdio: 'ignore' });
  const failed = once(prometheus, 'error').then(([error]) => { throw error; });
  failed.catch(() => {});
  pages = await servePages();
  browser = await launchChromium();
  // What happened before Prometheus first looked does not count as an increase.
  await scraped();
  // Enough links for a share of them to mean something.
  for (let page = 0; page < 3; page++) await openDatabase();
  // And somebody on the other machine.
  await openDatabase(other);
  // Packets through TURN.
  const check = await openPage(browser, `${homeport.httpUrl}/check`);
  // On a busy machine a step may run out of time; then who looks would try again.
  await until(check, 'the connection check', () => {
    const works = document.getElementById('verdict').textContent === 'Everything works from here.';
    const again = document.getElementById('again');
    if (!works && !again.disabled) again.click();
    return works;
  }, undefined, 120_000);
});
after(async () => {
  await browser?.close();
  pages?.close();
  if (prometheus?.exitCode === null) {
    prometheus.kill();
    await once(prometheus, 'exit');
  }
  await homeport?.stop();
  await other?.stop();
  await nats?.stop();
  if (folder) await rm(folder, { recursive: true, force: true });
});

/** A page that keeps writing. */
async function openDatabase(machine = homeport) {
  const query = new URLSearchParams({
    client: '/pages/wire-client.mjs', name: 'notes', options: JSON.stringify({ rtc: machine.rtc }),
  });
  const page = await openPage(browser, `${pages.url}/pages/database.html?${query}`);
  await until(page, 'the database', () => window.loaded === true);
  await page.evaluate(() => { let index = 0; setInterval(() => window.db.put({ index }, `n${index++ % 50}`), 100); });
}

async function scraped() {
  const deadline = Date.now() + 30_000;
  for (;;) {
    // Until it has started, Prometheus refuses the connection.
    const values = await ask('homeport_seed_link_open_seconds_count').catch(() => []);
    if (values.length > 0) return;
    assert.ok(Date.now() < deadline, 'Prometheus scrapes nothing');
    await new Promise(done => setTimeout(done, 200));
  }
}

const panelsOf = list => list.flatMap(panel => [panel, ...panelsOf(panel.panels ?? [])]);

async function ask(expression) {
  const query = expression.replaceAll('$__rate_interval', '10s').replaceAll('$__interval', '5s')
    .replaceAll(/\$(instance|room)/g, '.*');
  const answer = await fetch(`${url}/api/v1/query`, { method: 'POST', body: new URLSearchParams({ query }) });
  const { status, error, data } = await answer.json();
  if (status !== 'success') throw new Error(`${expression}: ${error}`);
  return data.result.map(({ value }) => Number(value[1])).filter(value => !Number.isNaN(value));
}

test('every panel of every dashboard returns data', async () => {
  const waiting = [];
  for (const file of (await readdir(dashboards)).filter(name => name.endsWith('.json'))) {
    const dashboard = JSON.parse(await readFile(join(dashboards, file), 'utf8'));
    for (const { query } of dashboard.templating.list) {
      const [, series, label] = /^label_values\((.*), (\w+)\)$/.exec(query.query);
      waiting.push({ expr: `count by (${label}) (${series})`, name: `${file}: a variable` });
    }
    assert.ok(dashboard.links.length > 0, `${file} leads nowhere`);
    for (const panel of panelsOf(dashboard.panels).filter(({ type }) => type !== 'row')) {
      assert.ok(panel.description && panel.fieldConfig.defaults.unit, `${file}: ${panel.title} lacks description or unit`);
      assert.ok(panel.targets.length > 0, `${file}: ${panel.title} asks nothing`);
      waiting.push(...panel.targets.map(({ expr }) => ({ expr, name: `${file}: ${panel.title}` })));
    }
  }
  assert.ok(waiting.length > 20);
  const total = waiting.length;
  const deadline = Date.now() + 60_000;
  while (waiting.length > 0) {
    for (let index = waiting.length - 1; index >= 0; index--) {
      if ((await ask(waiting[index].expr)).length > 0) waiting.splice(index, 1);
    }
    assert.ok(waiting.length === 0 || Date.now() < deadline,
      `empty: ${waiting.map(({ name, expr }) => `${name}: ${expr}`).join('\n')}`);
    await new Promise(done => setTimeout(done, 500));
  }
  console.log(`${total} queries of the dashboards returned data`);
});
