// deploy/cluster/docker-compose.yml on three machines, each a Docker Engine in a network of its own: they find each other,
// share a room, and go on when one is stopped. Part of ./test.sh --containers
import assert from 'node:assert/strict';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { test } from 'node:test';
import { fileURLToPath } from 'node:url';
import { launchChromium, openPage, until } from '../lib/browser.mjs';
import { client } from '../lib/clients.mjs';
import { Lab, unable as noNamespaces } from '../nat/lab.mjs';
import { Engine, unable } from './engine.mjs';

const here = dirname(fileURLToPath(import.meta.url));
const skip = process.env.HOMEPORT_CONTAINERS ? unable() || noNamespaces() : 'building the image takes minutes; ./test.sh --containers runs them';
if (skip) console.log(`containers of a cluster: skipped, ${skip}`);
const NAMES = ['one', 'two', 'three'];
const OVERRIDE = 'deploy/cluster/docker-compose.yml';

async function eventually(what, check, patience = 90_000) {
  for (const deadline = Date.now() + patience; ; await new Promise(done => setTimeout(done, 200))) {
    const result = await check().catch(error => { what = `${what}: ${error.message}`.slice(0, 500); });
    if (result) return result;
    assert.ok(Date.now() < deadline, `nothing came of: ${what}`);
  }
}

test('three machines with Docker Compose are one Homeport, also when one of them is stopped', { skip }, async () => {
  const folder = await mkdtemp(join(tmpdir(), 'homeport-engines-'));
  const builder = await Engine.start();
  const archive = join(folder, 'images.tar');
  try {
    await builder.homeport();
    console.log(await builder.image('nats:2.12-alpine', builder.program('/usr/sbin/nats-server', ['ENTRYPOINT ["/usr/sbin/nats-server"]'])));
    await builder.docker('save', '--output', archive, 'homeport', 'nats:2.12-alpine');
  } finally {
    await builder.stop();
  }
  const lab = await Lab.start();
  const machines = [];
  let browser;
  try {
    for (const name of NAMES) machines.push({ name, host: await lab.host() });
    const addresses = Object.fromEntries(machines.map(({ name, host }) => [name.toUpperCase(), host.address]));
    for (const [index, machine] of machines.entries()) {
      machine.engine = await Engine.start({ namespace: machine.host.namespace, folder: join(folder, machine.name) });
      await machine.engine.docker('load', '--input', archive);
      // What env.example asks for; a password that begins with a digit is one that NATS would take for a number.
      machine.env = {
        ...addresses, MACHINE: machine.name, PRIVATE_ADDRESS: machine.host.address, HOMEPORT_CLUSTER__PASSWORD: '0123456789',
        NATS_ROUTE_PASSWORD: '5a9f00', HOMEPORT_TURN__SECRET: 'north', HOMEPORT_TURN__REGION: index < 2 ? 'eu' : 'us',
        HOMEPORT_TURN__EXTERNAL_IP: machine.host.address,
      };
      machine.compose = (...words) => machine.engine.compose(words, machine.env, OVERRIDE);
    }
    const start = Date.now();
    await Promise.all(machines.map(({ compose }) =>
      compose('up', '--detach', '--wait', '--wait-timeout', '90', 'nats', 'turn', 'relay', 'seed')));
    console.log(`containers of a cluster: all three were up after ${Math.round((Date.now() - start) / 1_000)} s`);

    const check = async ({ compose }) => {
      const said = await compose('exec', '--no-TTY', 'seed', '/usr/local/bin/homeport', 'check', '--json').catch(error => error.stdout);
      return JSON.parse(said).filter(({ what }) => what.startsWith('cluster'));
    };
    for (const machine of machines) {
      const findings = await eventually(`the doctor of ${machine.name}`, async () => {
        const findings = await check(machine);
        const isWell = findings.length === 4 && findings.every(({ verdict }) => verdict === 'ok');
        if (!isWell) throw new Error(JSON.stringify(findings));
        return findings;
      });
      if (machine === machines[0]) for (const { what, found } of findings) console.log(`  ${what}: ${found}`);
    }

    const site = await lab.site('port-restricted');
    const server = await lab.spawn(site.client,
      [process.execPath, join(here, '../nat/serve-pages.mjs')], /http:\S+/);
    browser = await launchChromium([], await site.browser('/usr/bin/chromium'));
    const status = await openPage(browser, `http://${machines[0].host.address}:8080/`);
    await until(status, 'the status page to show all', () => document.getElementById('verdict').textContent === 'Everything works.'
      && document.querySelectorAll('#machines h3').length === 3);
    const config = region => status.evaluate(async name => (await fetch(`/client-config.json?region=${name}`)).json(), region);
    const [near, far] = (await config('us')).turnConfig.slice(1).map(({ urls }) => urls[0]);
    assert.ok(near.includes(addresses.THREE) && !far.includes(addresses.THREE), `${near} ${far}`);

    const rtc = { relayUrls: machines.map(({ host }) => `ws://${host.address}:8080`), turnConfig: (await config('eu')).turnConfig };
    const query = new URLSearchParams({ client, name: 'my-app', options: JSON.stringify({ rtc }) });
    const open = async () => {
      const page = await openPage(browser, `${server.ready[0]}/pages/database.html?${query}`);
      await until(page, 'the database', () => window.loaded === true);
      return page;
    };
    const writer = await open();
    await until(writer, 'a link with the seed', () => window.db.room.getPeers().size > 0);
    await writer.evaluate(async () => { for (let n = 0; n < 100; n++) await window.db.put({ n }, `before-${n}`); });
    const archived = ({ compose }) => compose('exec', '--no-TTY', 'seed', '/usr/local/bin/homeport', 'rooms', 'show', 'my-app', '--query', '{}');
    for (const machine of machines) {
      await eventually(`the archive of ${machine.name}`, async () => (await archived(machine)).split('\n').filter(Boolean).length === 100);
    }

    const holder = async ({ compose }) =>
      JSON.parse(await compose('exec', '--no-TTY', 'seed', '/usr/local/bin/homeport', 'rooms', 'list', '--json'))[0].held_by;
    const gone = await holder(machines[0]);
    const first = machines.find(({ name }) => name === gone);
    const others = machines.filter(machine => machine !== first);
    await first.compose('stop', '--timeout', '10');
    await eventually('another holder', async () => ![gone, null].includes(await holder(others[0])));
    await writer.evaluate(async () => { for (let n = 0; n < 100; n++) await window.db.put({ n }, `after-${n}`); });
    for (const machine of others) {
      await eventually(`the archive of ${machine.name}`, async () => (await archived(machine)).split('\n').filter(Boolean).length === 200);
    }
    await first.compose('start');
    await eventually(`the archive of ${gone}, which was away`, async () => (await archived(first)).split('\n').filter(Boolean).length === 200);
    const newcomer = await open();
    await until(newcomer, 'all that was written', async () => await window.count() === 200);
    console.log(`containers of a cluster: ${gone} was stopped and started again, 200 nodes are in all three archives`);
  } finally {
    await browser?.close();
    for (const { engine, compose } of machines.filter(({ engine }) => engine)) {
      await compose('down', '--volumes', '--timeout', '10').catch(error => console.log(String(error)));
      await engine.stop();
    }
    await lab.stop();
    await rm(folder, { recursive: true, force: true });
  }
});
