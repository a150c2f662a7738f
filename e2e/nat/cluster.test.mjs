// Three machines on the internet, each with NATS, a relay, a TURN server and a seed; pages behind routers of three kinds that
// write all the time. A machine dies, one is cut off for a minute, every service is started anew, a disk is full. In the end
// every page and every archive hold what was written. HOMEPORT_E2E_LOGS=FOLDER keeps what the services say.
import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { writeFile } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { test } from 'node:test';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { launchChromium, openPage, until } from '../lib/browser.mjs';
import { client } from '../lib/clients.mjs';
import { binary, TURN_USER } from '../lib/homeport.mjs';
import { Lab, unable } from './lab.mjs';
import { archived, difference, model, SmallDisk, write } from './writing.mjs';

const run = promisify(execFile);
const here = dirname(fileURLToPath(import.meta.url));
const reason = unable();
if (reason) console.log(`three machines: skipped, ${reason}`);

const ROOM = 'cluster';
const NAMES = ['one', 'two', 'three'];
const SERVICES = ['relay', 'turn', 'seed'];
const METRICS = { relay: 9464, turn: 9465, seed: 9466 };
/** How long a machine is cut off. */
const CUT_MS = 60_000;
/** A room whose holder has not changed for so long does not move by itself. */
const SETTLED_MS = 8_000;
const wait = ms => new Promise(done => setTimeout(done, ms));

async function eventually(what, check, timeout = 60_000) {
  for (const deadline = Date.now() + timeout; ; await wait(50)) {
    const answer = await check();
    if (answer) return answer;
    assert.ok(Date.now() < deadline, `nothing came of: ${what}`);
  }
}

/** One of the machines: what runs there, each a process of its own. */
class Machine {
  running = new Map();

  constructor(lab, host, name) {
    Object.assign(this, { lab, host, name, folder: join(lab.folder, name), data: join(lab.folder, name, 'data') });
  }

  async prepare(machines) {
    this.disk = await SmallDisk.mount(this.data, 48);
    this.relays = machines.map(({ host }) => `"ws://${host.address}:8080/"`);
    const routes = machines.map(({ host }) => `nats://${host.address}:6222`).join(', ');
    await writeFile(join(this.folder, 'nats.conf'), `
      server_name: ${this.name}
      listen: 127.0.0.1:4222
      jetstream { store_dir: "${this.folder}/streams" }
      cluster { name: homeport, listen: "${this.host.address}:6222", routes: [${routes}] }
      ping_interval: "2s", ping_max: 2, write_deadline: "5s"
    `);
  }

  async start(service) {
    this.running.set(service, service === 'nats'
      ? await this.lab.spawn(this.host.namespace, ['nats-server', '-c', join(this.folder, 'nats.conf')], /Server is ready/)
      : await this.lab.spawn(this.host.namespace, [binary, service], /Homeport is up/, {
        HOMEPORT_CLUSTER__NATS: 'nats://127.0.0.1:4222', HOMEPORT_CLUSTER__NAME: this.name, HOMEPORT_CLUSTER__REPLICAS: '3',
        HOMEPORT_DATA: service === 'seed' ? this.data : join(this.folder, service),
        HOMEPORT_RELAY__LISTEN: '0.0.0.0:8080', HOMEPORT_SEED__LISTEN: '0.0.0.0:3479', HOMEPORT_TURN__LISTEN: '0.0.0.0:3478',
        HOMEPORT_TURN__USERS: `{${TURN_USER.username}="${TURN_USER.credential}"}`,
        HOMEPORT_SEED__RELAYS: `[${this.relays}]`, HOMEPORT_SEED__ROOM: `[{name="${ROOM}"}]`,
        HOMEPORT_METRICS__LISTEN: `127.0.0.1:${METRICS[service]}`, HOMEPORT_METRICS__PROBE: 'false',
        HOMEPORT_LOG: process.env.HOMEPORT_LOG ?? 'info,seed_peer=debug',
      }));
  }

  async end(service, signal) {
    const { child, ended, output } = this.running.get(service);
    child.kill(signal);
    const [code] = await ended;
    if (signal === 'SIGTERM' && service !== 'nats') assert.equal(code, 0, `${service} of ${this.name} ended with ${code}:\n${output}`);
    await this.keepLog(service);
    this.running.delete(service);
  }

  async keepLog(service) {
    const folder = process.env.HOMEPORT_E2E_LOGS;
    if (folder) await writeFile(join(folder, `${this.name}-${service}.log`), this.running.get(service).output, { flag: 'a' });
  }

  /** What runs there ends at once, as when the power goes; or comes back. */
  async power(isOn) {
    for (const service of ['nats', ...SERVICES]) await (isOn ? this.start(service) : this.end(service, 'SIGKILL'));
  }

  async rooms(...words) {
    const { stdout } = await run(binary, ['rooms', ...words], { env: { ...process.env, HOMEPORT_DATA: this.data }, maxBuffer: 1 << 28 });
    return stdout;
  }

  /** Which machine holds the room, as this one knows it. */
  async holder() {
    const [room] = JSON.parse(await this.rooms('list', '--json'));
    return room.held_by;
  }

  /** The parts of a service's health. */
  async health(service) {
    const { stdout } = await run('ip', ['netns', 'exec', this.host.namespace, 'curl', '-s', `http://127.0.0.1:${METRICS[service]}/healthz`]);
    return JSON.parse(stdout).parts;
  }

  /** Waits until every part of every service is well. */
  async untilWell() {
    let unwell;
    const isWell = async () => {
      const parts = (await Promise.all(SERVICES.map(service => this.health(service)))).flatMap(Object.entries);
      unwell = parts.filter(([, { state }]) => state !== 'ok');
      return unwell.length === 0;
    };
    await eventually(`${this.name} is well`, isWell, 120_000).catch(error => { throw new Error(`${error.message}: ${JSON.stringify(unwell)}`); });
  }
}

/** A page behind a router, which knows the relays and TURN servers of two machines, as a balancer would have it. */
async function openPlace(lab, kind, machines) {
  const site = await lab.site(kind);
  const server = await lab.spawn(site.client,
    [process.execPath, join(here, 'serve-pages.mjs')], /http:\S+/);
  const browser = await launchChromium([], await site.browser('/usr/bin/chromium'));
  const hosts = machines.map(({ host }) => host.address);
  const rtc = {
    relayUrls: hosts.map(host => `ws://${host}:8080`),
    turnConfig: hosts.flatMap(host => [{ urls: `stun:${host}:3478` },
      { urls: [`turn:${host}:3478?transport=udp`, `turn:${host}:3478?transport=tcp`], ...TURN_USER }]),
  };
  const query = new URLSearchParams({ client, name: ROOM, options: JSON.stringify({ rtc }) });
  const page = await openPage(browser, `${server.ready[0]}/pages/database.html?${query}`);
  await until(page, 'the database', () => window.loaded === true);
  return { kind, page, browser };
}

const peersOf = ({ page }) => page.evaluate(() => [...window.db.room.getPeers().keys()]);

/** The ids of the pages: once all have links with each other and with the seed, what all of them have a link with is the seed. */
async function idsOfPages(places) {
  return eventually('pages that have links with each other and the seed', async () => {
    const peers = await Promise.all(places.map(peersOf));
    const all = [...new Set(peers.flat())];
    const pages = all.filter(id => !peers.every(list => list.includes(id)));
    return pages.length === places.length && all.length > pages.length && pages;
  });
}

/** Waits until every page has a link with somebody whom it had none with before, and who is no page: another seed. In ms. */
async function anotherSeed(places, since, before) {
  const each = await Promise.all(places.map(async (place, index) => {
    await eventually(`another seed for the page behind ${place.kind}`,
      async () => (await peersOf(place)).some(id => !before[index].includes(id)));
    return Date.now() - since;
  }));
  return Math.max(...each);
}

test('three machines lose one, are cut, rolled, and run out of disk, and nothing that was written', { skip: reason }, async () => {
  const lab = await Lab.start();
  const [machines, places, waits] = [[], [], {}];
  try {
    for (const name of NAMES) machines.push(new Machine(lab, await lab.host(), name));
    for (const machine of machines) await machine.prepare(machines);
    await Promise.all(machines.map(machine => machine.start('nats')));
    for (const machine of machines) for (const service of SERVICES) await machine.start(service);
    for (const machine of machines) await machine.untilWell();
    for (const [index, kind] of ['port-restricted', 'symmetric', 'UDP blocked'].entries()) {
      places.push(await openPlace(lab, kind, [machines[index], machines[(index + 1) % 3]]));
    }
    const pages = await idsOfPages(places);
    for (const { page, kind } of places) await page.evaluate(write, kind.replaceAll(' ', '-'));
    await wait(3_000);

    // When machines come and go the room may move; it has settled when all name the same one for a while.
    const holder = async () => {
      let [named, since] = [undefined, Date.now()];
      await eventually('a holder that all agree upon', async () => {
        const said = new Set(await Promise.all(machines.map(machine => machine.holder())));
        if (said.size > 1 || !said.has(named)) [named, since] = [[...said][0], Date.now()];
        return named && Date.now() - since > SETTLED_MS;
      });
      return machines.find(({ name }) => name === named);
    };
    const allWell = async () => {
      for (const machine of machines) await machine.untilWell();
    };
    /** Does something to whoever holds the room, and waits until the pages have a seed elsewhere; `happen` may say since when. */
    const without = async (what, happen) => {
      const machine = await holder();
      const before = (await Promise.all(places.map(peersOf))).map(ids => [...ids, ...pages]);
      const at = Date.now();
      const since = await happen(machine) ?? at;
      waits[what] = await anotherSeed(places, since, before);
      console.log(`three machines: ${what} (${machine.name}): every page had another seed after ${waits[what]} ms`);
      return machine;
    };

    const dead = await without('the machine that holds the room dies', machine => machine.power(false));
    await wait(5_000);
    await dead.power(true);
    await allWell();

    const cut = await without('it is cut off for a minute', async machine => {
      machine.cutAt = Date.now();
      await machine.host.plug(false);
    });
    await wait(Math.max(0, CUT_MS - (Date.now() - cut.cutAt)));
    await cut.host.plug(true);
    await allWell();

    for (const machine of machines) {
      for (const service of ['nats', ...SERVICES]) {
        const ends = () => machine.end(service, 'SIGTERM');
        if (service === 'seed' && await holder() === machine) await without('its seed is told to stop', ends);
        else await ends();
        await machine.start(service);
        await allWell();
      }
    }
    console.log('three machines: every service was stopped and started again');

    const full = await without('its disk is full', async machine => {
      await machine.disk.fill();
      await eventually('a write that is refused', async () => (await machine.health('seed')).archive.state === 'degraded', 120_000);
      return Date.now();
    });
    await wait(5_000);
    await full.disk.free();
    await allWell();
    await wait(3_000);

    const written = await Promise.all(places.map(({ page }) => page.evaluate(() => window.written())));
    const calm = Date.now();
    const expected = model(written);
    const all = [
      ...machines.map(({ name, data }) => [`the archive of ${name}`, () => archived(ROOM, data)]),
      ...places.map(({ page, kind }) =>
        [`the page behind ${kind}`, async () => new Map((await page.evaluate(() => window.nodes())).map(([id, value]) => [id, value]))]),
    ];
    const agreed = {};
    for (const [who, held] of all) {
      let wrong;
      await eventually(`${who} holds what was written`, async () => (wrong = difference(expected, await held())).length === 0, 120_000)
        .catch(error => { throw new Error(`${error.message}: ${wrong.slice(0, 5).join('; ')}; ${wrong.length} in all`); });
      agreed[who] = Date.now() - calm;
    }
    // Not only what is, also what was: the same operations in the same order.
    const logs = await Promise.all(machines.map(machine => machine.rooms('log', ROOM, '--from', '1', '--json')));
    const operations = log => log.split('\n').filter(Boolean).map(line => JSON.parse(line).operation);
    const first = operations(logs[0]);
    assert.ok(first.length > expected.size);
    for (const log of logs.slice(1)) assert.deepEqual(operations(log), first);
    const writes = written.reduce((sum, { number }) => sum + number, 0);
    console.log(`three machines: ${writes} writes, ${first.length} operations, ${expected.size} nodes; the same after ms: ${JSON.stringify(agreed)}`);
    console.log(`three machines: ms until every page had another seed: ${JSON.stringify(waits)}`);
  } finally {
    for (const { browser } of places) await browser.close();
    for (const machine of machines) for (const service of machine.running.keys()) await machine.keepLog(service);
    machines.forEach(({ disk }) => disk?.unmount());
    await lab.stop();
  }
});
