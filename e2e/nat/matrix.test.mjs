// Which pairs of networks meet, over which way, and how fast: with all that Homeport offers, with STUN alone, and with no
// TURN, through the seed. Real Chromium behind each router; Trystero, and GenosDB when GENOSDB_DIST names its dist files,
// else the stand-in. A few pairs by default, since a pair that cannot meet takes long to say so; HOMEPORT_NAT=all for
// every pair, and HOMEPORT_NAT=write for the table in the README as well.
import assert from 'node:assert/strict';
import { readFile, writeFile } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { after, before, test } from 'node:test';
import { setTimeout as wait } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { launchChromium, openPage, until } from '../lib/browser.mjs';
import { client } from '../lib/clients.mjs';
import { KINDS, Lab, unable } from './lab.mjs';

const here = dirname(fileURLToPath(import.meta.url));
const reason = unable();
if (reason) console.log(`the NAT matrix: skipped, ${reason}`);

const kinds = Object.keys(KINDS);
const everything = ['all', 'write'].includes(process.env.HOMEPORT_NAT);
const pairs = everything
  ? kinds.flatMap((one, index) => kinds.slice(index).map(other => [one, other]))
  : [['port-restricted', 'symmetric'], ['symmetric', 'UDP blocked'], ['only TCP 443 out', 'only TCP 443 out'], ['IPv6 only', 'dual stack'],
    ['IPv6 only', 'port-restricted']];

const seedPort = 3479;
/** How long a pair is given that has no way. */
const HOPELESS = 12_000;
/** How long one is given that should have a way: an offer that came to nothing is made anew after a minute. */
const PATIENCE = 90_000;
/** How long a direct way may take to be found when another was faster. */
const SETTLING = 10_000;
const results = new Map();
const sites = new Map();
let lab, table;

before(async () => {
  if (reason) return;
  lab = await Lab.start();
  await lab.homeport({ HOMEPORT_SEED__ROOM: '[{name="with-turn"},{name="without-turn"}]' });
});
after(async () => {
  for (const { browser } of sites.values()) await browser.close();
  await lab?.stop();
});

/** A client behind a router of `kind`, with its browser; `second` is another one than the first. */
async function client_at(kind, second) {
  const name = `${kind} ${second}`;
  if (!sites.has(name)) {
    const site = await lab.site(kind);
    const server = await lab.spawn(site.client,
      [process.execPath, join(here, 'serve-pages.mjs')], /http:\S+/);
    // Where there is no IPv4 at all, Chromium's way to hide addresses behind names comes to no end, and it names none.
    const flags = KINDS[kind].v4 ? [] : ['--disable-features=WebRtcHideLocalIpsWithMdns'];
    const browser = await launchChromium(['--ignore-certificate-errors', ...flags], await site.browser('/usr/bin/chromium'));
    sites.set(name, { site, browser, pages: server.ready[0] });
  }
  return sites.get(name);
}

/** "direct", or through which transport of whose TURN server. */
function way({ local, protocol, remote }) {
  if (local === 'relay') return `TURN/${protocol.toUpperCase()}`;
  return remote === 'relay' ? 'TURN' : 'direct';
}
/** Of the two ends of a link, the one that says more. */
const longest = (...ways) => ways.sort((one, other) => other.length - one.length)[0];

/**
 * Two Trystero pages: after how many ms they meet, and which way; or undefined. What connects first need not be what data
 * goes by in the end: where a direct way is `expected`, it is given a while to be found.
 */
async function trystero(both, options, patience, expected) {
  const pages = await Promise.all(both.map(({ browser, pages }) => openPage(browser, `${pages}/pages/trystero.html`)));
  try {
    for (const page of pages) await until(page, 'the page', () => window.loaded === true);
    const start = Date.now();
    await Promise.all(pages.map((page, index) => {
      const { relayUrls: [url], turnConfig } = both[index].site.rtc(options);
      return page.evaluate(([url, servers]) => window.start(url, servers, false), [url, turnConfig]);
    }));
    try {
      for (const page of pages) await until(page, 'a peer', () => window.state.peers.length === 1, undefined, patience);
    } catch (error) {
      if (patience !== HOPELESS) throw error;
      return undefined;
    }
    const ms = Date.now() - start;
    await pages[0].evaluate(() => window.say('hello'));
    await until(pages[1], 'a message', () => window.state.messages[0] === 'hello');
    const found = async () => longest(...await Promise.all(pages.map(async page => way((await page.evaluate(() => window.paths()))[0]))));
    const first = await found();
    let last = first;
    while (expected && last !== expected && Date.now() - start - ms < SETTLING) {
      await wait(200);
      last = await found();
    }
    if (first !== last) console.log(`first by ${first}, then ${last}`);
    return { ms, way: last };
  } finally {
    for (const page of pages) await page.context().close();
  }
}

/** Two pages of a database: when the second holds what the first writes, and how each is linked with the seed. */
async function database(both, name, options) {
  const pages = await Promise.all(both.map(({ browser, pages, site }) => {
    const query = new URLSearchParams({ client, name, options: JSON.stringify({ rtc: site.rtc(options) }) });
    return openPage(browser, `${pages}/pages/database.html?${query}`);
  }));
  try {
    for (const page of pages) await until(page, 'the database', () => window.loaded === true);
    const links = [];
    for (const page of pages) {
      await until(page, 'a link with the seed', async port => Object.values(await window.paths()).some(path => path?.port === port), seedPort);
      const path = Object.values(await page.evaluate(() => window.paths())).find(path => path?.port === seedPort);
      links.push(way(path));
    }
    const id = `node-${Math.random()}`;
    // The seed's room for the graph is another than the application's: what is written before its link is there is had on joining.
    await pages[0].evaluate(id => window.db.put({ text: 'hello' }, id), id);
    const start = Date.now();
    await until(pages[1], 'what the other wrote', async id => (await window.nodes()).some(([other]) => other === id), id);
    return { links, ms: Date.now() - start };
  } finally {
    for (const page of pages) await page.context().close();
  }
}

const hasUdp = kind => !KINDS[kind].lets;
/**
 * Whether hole punching can do: both have IPv4, and not a mapping on one side that the other cannot know and would not let
 * in. With IPv6, a page does not learn the address of one that hides it behind a name (mDNS, where there is IPv4 too): what
 * STUN sees is the same address, and is left out for that.
 */
function punches(one, other) {
  if (!hasUdp(one) || !hasUdp(other)) return false;
  if (!KINDS[one].v4 || !KINDS[other].v4) return !KINDS[one].v4 && !KINDS[other].v4;
  return [one, other].some(kind => KINDS[kind].takes === 'all') || (KINDS[one].keeps && KINDS[other].keeps);
}

for (const [one, other] of pairs) {
  test(`${one} and ${other} meet`, { skip: reason }, async () => {
    const both = [await client_at(one, 0), await client_at(other, one === other ? 1 : 0)];
    const met = await trystero(both, {}, PATIENCE, punches(one, other) ? 'direct' : undefined);
    assert.equal(met.way === 'direct', punches(one, other), `they met by ${met.way}`);
    const withTurn = await database(both, 'with-turn', {});
    for (const [index, kind] of [one, other].entries()) assert.equal(withTurn.links[index] === 'direct', hasUdp(kind), kind);
    const withoutTurn = hasUdp(one) && hasUdp(other) ? await database(both, 'without-turn', { turn: false }) : undefined;
    const stun = everything ? await trystero(both, { turn: false }, HOPELESS) : undefined;
    if (everything) assert.equal(stun !== undefined, punches(one, other), 'with STUN alone');
    results.set([one, other].join(), { met, withTurn, withoutTurn, stun });
    const seed = ({ links, ms }) => `seed ${links.join(' and ')}, a write after ${ms} ms`;
    console.log(`${one} and ${other}: met after ${met.ms} ms, ${met.way}; ${seed(withTurn)}; without TURN: ${withoutTurn ? seed(withoutTurn) : 'no UDP to the seed'}`
      + (everything ? `; STUN alone: ${stun ? `after ${stun.ms} ms` : 'never'}` : ''));
  });
}

test('the table of the README', { skip: reason || !everything && 'HOMEPORT_NAT=all was not asked for' }, async () => {
  const row = one => kinds.map(other => {
    const result = results.get([one, other].join()) ?? results.get([other, one].join());
    return result.stun ? result.met.way : `**${result.met.way}**`;
  });
  table = [`| | ${kinds.join(' | ')} |`, `| --- |${' --- |'.repeat(kinds.length)}`, ...kinds.map(one => `| ${one} | ${row(one).join(' | ')} |`)].join('\n');
  const all = [...results.values()];
  const times = all.map(({ met }) => met.ms).sort((one, other) => one - other);
  const through = all.filter(({ withoutTurn }) => withoutTurn);
  const summary = `${all.length} of ${all.length} pairs meet; with STUN alone ${all.filter(({ stun }) => stun).length}. Half of them within ${times[times.length >> 1]} ms, `
    + `the slowest within ${times.at(-1)} ms. With no TURN at all, what one page writes reaches the other through the seed in each of the ${through.length} `
    + 'pairs in which both have UDP.';
  console.log(`${table}\n\n${summary}`);
  if (process.env.HOMEPORT_NAT !== 'write') return;
  const readme = join(here, '../../README.md');
  const [begin, end] = ['<!-- nat: written by HOMEPORT_NAT=write -->', '<!-- /nat -->'];
  const text = await readFile(readme, 'utf8');
  assert.ok(text.includes(begin) && text.includes(end), 'the README has no place for it');
  await writeFile(readme, `${text.slice(0, text.indexOf(begin))}${begin}\n${table}\n\n${summary}\n${text.slice(text.indexOf(end))}`);
});
