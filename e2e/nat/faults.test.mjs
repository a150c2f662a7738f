// What a bad day brings, in minutes: services that are killed, networks that are cut, lose packets, change; and pages in
// three networks that write all the time. In the end every page and the archive hold what was written, and nothing else.
// The schedule follows from a number: HOMEPORT_FAULTS_SEED=random takes another each time and prints it, a number repeats
// one, HOMEPORT_FAULTS_SECONDS makes it longer.
import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { existsSync } from 'node:fs';
import { writeFile } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { test } from 'node:test';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { launchChromium, openPage, until } from '../lib/browser.mjs';
import { client } from '../lib/clients.mjs';
import { binary, TURN_USER } from '../lib/homeport.mjs';
import { Lab, SERVER, unable } from './lab.mjs';
import { archived, difference, model, SmallDisk, write } from './writing.mjs';

const run = promisify(execFile);
const here = dirname(fileURLToPath(import.meta.url));
const reason = unable();
if (reason) console.log(`faults: skipped, ${reason}`);
const canDelay = existsSync('/dev/net/tun');
if (!canDelay) console.log('faults: nothing is delayed, there is no /dev/net/tun');
const seconds = Number(process.env.HOMEPORT_FAULTS_SECONDS ?? 60);
const wish = process.env.HOMEPORT_FAULTS_SEED ?? '3';
const start = wish === 'random' ? Math.floor(Math.random() * 2 ** 32) : Number(wish);
const RELAYS = 5;

/** Numbers that follow from the seed (mulberry32). */
let state = start;
function random() {
  state = (state + 0x6d2b79f5) | 0;
  let value = Math.imul(state ^ (state >>> 15), 1 | state);
  value = (value + Math.imul(value ^ (value >>> 7), 61 | value)) ^ value;
  return ((value ^ (value >>> 14)) >>> 0) / 2 ** 32;
}
const between = (low, high) => Math.floor(low + random() * (high - low));
const wait = ms => new Promise(done => setTimeout(done, ms));

/** The services, each a process of its own on the server. */
class House {
  constructor(lab) {
    Object.assign(this, { lab, running: new Map(), library: join(lab.folder, 'strain.so') });
  }
  static async of(lab) {
    const house = new House(lab);
    await run('cc', ['-shared', '-fPIC', '-O2', '-Wall', '-Werror', '-o', house.library, join(here, 'strain.c')]);
    return house;
  }
  /** What a service suffers from now on, restarts included: how much longer a sync to disk takes, how far its clock is off. */
  async strain(name, { syncMs = 0, clockSeconds = 0 }) {
    await writeFile(this.strainOf(name), new Uint8Array(BigInt64Array.of(BigInt(syncMs * 1_000), BigInt(clockSeconds)).buffer), { flag: 'r+' });
  }
  strainOf(name) { return join(this.lab.folder, `strain-${name.replace(' ', '-')}`); }
  async start(name) {
    // Never shorter than what is mapped of it.
    if (!existsSync(this.strainOf(name))) await writeFile(this.strainOf(name), new Uint8Array(16));
    const [kind, number] = name.split(' ');
    const listen = `0.0.0.0:${8080 + Number(number ?? 0)}`;
    const metrics = { relay: 9500 + Number(number ?? 0), turn: 9600, seed: 9700 }[kind];
    const relays = Array.from({ length: RELAYS }, (_, index) => `"ws://${SERVER}:${8080 + index}/"`);
    this.running.set(name, await this.lab.spawn(this.lab.server, [binary, kind], /Homeport is up/, {
      LD_PRELOAD: this.library, STRAIN: this.strainOf(name), HOMEPORT_DATA: join(this.lab.folder, kind === 'seed' ? 'data' : name.replace(' ', '-')),
      HOMEPORT_RELAY__LISTEN: listen, HOMEPORT_METRICS__LISTEN: `127.0.0.1:${metrics}`,
      HOMEPORT_TURN__USERS: `{${TURN_USER.username}="${TURN_USER.credential}"}`,
      HOMEPORT_SEED__RELAYS: `[${relays}]`, HOMEPORT_SEED__ROOM: '[{name="faults"}]', HOMEPORT_METRICS__PROBE: 'false',
    }));
  }
  async kill(name) {
    const { child, ended } = this.running.get(name);
    child.kill('SIGKILL');
    await ended;
  }
}

test('what pages write outlives everything that can happen to services and networks', { skip: reason }, async () => {
  console.log(`faults: HOMEPORT_FAULTS_SEED=${start}, ${seconds} s`);
  const lab = await Lab.start();
  const browsers = [];
  let disk;
  try {
    disk = await SmallDisk.mount(join(lab.folder, 'data'), 64);
    const house = await House.of(lab);
    const services = [...Array.from({ length: RELAYS }, (_, index) => `relay ${index}`), 'turn', 'seed'];
    for (const name of services) await house.start(name);
    const places = [];
    for (const kind of ['port-restricted', 'symmetric', 'UDP blocked']) {
      const site = await lab.site(kind);
      const server = await lab.spawn(site.client,
        [process.execPath, join(here, 'serve-pages.mjs')], /http:\S+/);
      const browser = await launchChromium([], await site.browser('/usr/bin/chromium'));
      browsers.push(browser);
      const options = { rtc: { ...site.rtc(), relayUrls: Array.from({ length: RELAYS }, (_, index) => `ws://${SERVER}:${8080 + index}`) } };
      const query = new URLSearchParams({ client, name: 'faults', options: JSON.stringify(options) });
      const page = await openPage(browser, `${server.ready[0]}/pages/database.html?${query}`);
      await until(page, 'the database', () => window.loaded === true);
      places.push({ site, page, kind });
    }
    for (const { page, kind } of places) {
      await until(page, 'a link', () => window.db.room.getPeers().size > 0);
      await page.evaluate(write, kind.replaceAll(' ', '-'));
    }

    const faults = {
      'the seed is killed': async () => { await house.kill('seed'); await wait(between(0, 4_000)); await house.start('seed'); },
      'TURN is killed': async () => { await house.kill('turn'); await wait(between(0, 3_000)); await house.start('turn'); },
      'four of five relays are killed': async () => {
        const kept = between(0, RELAYS);
        const killed = services.filter(name => name.startsWith('relay') && name !== `relay ${kept}`);
        for (const name of killed) await house.kill(name);
        await wait(between(1_000, 8_000));
        for (const name of killed) await house.start(name);
      },
      'a network is cut': async ({ site }) => { await site.lose(1); await wait(between(1_000, 12_000)); await site.lose(0); },
      'a fifth of the packets is lost': async ({ site }) => { await site.lose(0.2); await wait(between(3_000, 8_000)); await site.lose(0); },
      ...(canDelay && {
        'what leaves a network takes 300 ms longer': async ({ site }) => { await site.delay(300); await wait(between(3_000, 8_000)); await site.delay(0); },
      }),
      "the seed's disk is slow": async () => {
        await house.strain('seed', { syncMs: between(200, 1_500) });
        await wait(between(2_000, 8_000));
        await house.strain('seed', {});
      },
      "the seed's disk is full": async () => { await disk.fill(); await wait(between(4_000, 10_000)); await disk.free(); },
      'a clock is set by hours': async () => {
        const name = services[between(0, services.length)];
        await house.strain(name, { clockSeconds: between(-5 * 3_600, 5 * 3_600) });
        return name;
      },
      'a router forgets its mappings': async ({ site }) => site.rebind(),
      'a client changes its address': async ({ site }) => site.move(),
      'a router is replaced by one of another kind': async ({ site, kind }) => {
        await site.become(site.kind === kind ? 'symmetric' : kind);
      },
    };
    const end = Date.now() + seconds * 1_000;
    const happened = {};
    while (Date.now() < end) {
      const [name, fault] = Object.entries(faults)[between(0, Object.keys(faults).length)];
      const place = places[between(0, places.length)];
      const left = Math.round((end - Date.now()) / 1_000);
      const what = await fault(place) ?? (fault.length ? place.kind : '');
      console.log(`  ${left} s to go: ${name}${what && ` (${what})`}`);
      happened[name] = (happened[name] ?? 0) + 1;
      await wait(between(200, 4_000));
    }

    const written = await Promise.all(places.map(({ page }) => page.evaluate(() => window.written())));
    const calm = Date.now();
    const expected = model(written);
    const archive = () => archived('faults', join(lab.folder, 'data'));
    const all = [['the archive', archive], ...places.map(({ page, kind }) =>
      [`the page behind ${kind}`, async () => new Map((await page.evaluate(() => window.nodes())).map(([id, value]) => [id, value]))])];
    const deadline = Date.now() + 300_000;
    const agreed = {};
    for (const [who, held] of all) {
      for (let wrong; (wrong = difference(expected, await held())).length > 0; await wait(250)) {
        assert.ok(Date.now() < deadline, `${who} differs (HOMEPORT_FAULTS_SEED=${start}): ${wrong.slice(0, 5).join('; ')}; ${wrong.length} in all`);
      }
      agreed[who] = Date.now() - calm;
    }
    const writes = written.reduce((sum, { number }) => sum + number, 0);
    console.log(`faults: ${writes} writes, ${expected.size} nodes, ${JSON.stringify(happened)}; the same after ms: ${JSON.stringify(agreed)}`);
  } finally {
    for (const browser of browsers) await browser.close();
    disk?.unmount();
    await lab.stop();
  }
});
