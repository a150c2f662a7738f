// The connection check in Chromium: with everything up, and with one thing broken after the other.
import assert from 'node:assert/strict';
import { mkdir } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { after, before, test } from 'node:test';
import { fileURLToPath } from 'node:url';
import { launchChromium, until } from './lib/browser.mjs';
import { freePort, Homeport } from './lib/homeport.mjs';

const artifacts = join(dirname(fileURLToPath(import.meta.url)), 'artifacts');
let homeport, browser;
before(async () => {
  browser = await launchChromium();
  await mkdir(artifacts, { recursive: true });
  homeport = await Homeport.start({ rooms: ['notes'] });
});
after(async () => {
  await browser?.close();
  await homeport?.stop();
});

/** Opens the check, with `prepare` for what is to be broken; returns what each step came to, and the rest that it says. */
async function check(name, prepare = async () => {}) {
  const context = await browser.newContext({ permissions: ['clipboard-read', 'clipboard-write'] });
  const page = await context.newPage();
  page.errors = [];
  await prepare(page);
  await page.goto(`${homeport.httpUrl}/check`);
  await until(page, 'the end of the check', () => !document.getElementById('again').disabled, undefined, 90_000);
  const steps = Object.fromEntries(await page.$$eval('#steps li', list => list.map(({ dataset }) => [dataset.name, dataset.state])));
  const lines = Object.fromEntries(await page.$$eval('#steps li', list => list.map(line => [line.dataset.name, line.lastChild.textContent])));
  const said = { steps, lines, verdict: await page.textContent('#verdict'), advice: await page.$$eval('#advice li', list => list.map(({ textContent }) => textContent)) };
  await page.click('#share');
  await until(page, 'the report', () => document.getElementById('share')?.textContent === 'Copied' || document.querySelector('pre') !== null);
  said.report = await page.evaluate(async () => document.querySelector('pre')?.textContent ?? navigator.clipboard.readText());
  await page.screenshot({ path: join(artifacts, `check-${name}.png`), fullPage: true });
  await context.close();
  assert.ok(!/\d+\.\d+\.\d+\.\d+/.test(said.report), `no addresses in: ${said.report}`);
  return said;
}

/** What apps are told, changed. */
const told = change => page => page.route('**/client-config.json', async route => {
  const answer = await route.fetch();
  await route.fulfill({ response: answer, json: change(await answer.json()) });
});

const all = { 'This server': 'works', 'Your clock': 'works', Relay: 'works', 'A message': 'works', STUN: 'works', 'Seed peer': 'works', 'TURN over UDP': 'works', 'TURN over TCP': 'works', 'TURN over TLS': 'skipped' };

test('with everything up, everything works', async () => {
  const { steps, lines, verdict, advice, report } = await check('everything');
  assert.deepEqual(steps, all);
  assert.equal(verdict, 'Everything works from here.');
  assert.match(lines['Seed peer'], /^Open after \d+ ms\. (Nothing on the way translates addresses|Others see you under one address)/);
  assert.deepEqual(advice, []);
  assert.match(report, /TURN over UDP: works\nTURN over TCP: works\nTURN over TLS: not offered/);
});

test('a page whose script got lost on the way says what to do', async () => {
  const context = await browser.newContext();
  const page = await context.newPage();
  // As where a phone goes from one network to another while it loads.
  await page.route('**/*.js', route => route.abort('connectionfailed'));
  for (const path of ['/check', '/']) {
    await page.goto(`${homeport.httpUrl}${path}`);
    assert.match(await page.textContent('#verdict'), /load this page again/);
  }
  await context.close();
});

test('where UDP does not get through, TCP is said to', async () => {
  const port = await freePort();
  const { steps, verdict, advice } = await check('no-udp', told(config => ({
    ...config,
    turnConfig: config.turnConfig.map(server => ({ ...server, urls: server.urls.map(url => (/transport=tcp/.test(url) ? url : url.replace(/:\d+(?=$|\?)/, `:${port}`))) })),
  })));
  assert.deepEqual(steps, { ...all, STUN: steps.STUN, 'TURN over UDP': 'fails' });
  assert.match(verdict, /^Does not work: .*TURN over UDP/);
  assert.ok(advice.some(text => text.startsWith('UDP is blocked here')), `${advice}`);
});

test('credentials that do not hold are said to be refused', async () => {
  const { steps, advice } = await check('wrong-credential', told(config => ({
    ...config, turnConfig: config.turnConfig.map(server => (server.credential ? { ...server, credential: 'wrong' } : server)),
  })));
  assert.deepEqual(steps, { ...all, 'TURN over UDP': 'fails', 'TURN over TCP': 'fails' });
  assert.ok(advice.some(text => text.startsWith('Nothing goes through the TURN server')));
});

test('a clock that is wrong is said to be, by how much, and what to do', async () => {
  for (const [minutes, said] of [[7, /7 min ahead of/], [-300, /5 hours behind/]]) {
    const { steps, lines, verdict, advice } = await check('wrong-clock', page => page.addInitScript(ms => {
      const now = Date.now;
      Date.now = () => now() + ms;
    }, minutes * 60_000));
    assert.deepEqual(steps, { ...all, 'Your clock': 'fails' });
    assert.match(lines['Your clock'], said);
    assert.equal(verdict, 'Your clock is wrong.');
    assert.ok(advice.some(text => text.includes('Let this device set its clock by itself')));
  }
});

test('a server that does not say what time it is says nothing of a clock', async () => {
  const { steps, verdict } = await check('no-time', page => page.route('**/healthz', route => route.abort()));
  assert.deepEqual(steps, { ...all, 'Your clock': 'skipped' });
  assert.equal(verdict, 'Everything works from here.');
});

test('a relay that is out of reach is named, and what to ask for', async () => {
  const port = await freePort();
  const gone = await check('relay-gone', told(config => ({ ...config, relayUrls: [`ws://127.0.0.1:${port}/`] })));
  assert.equal(gone.steps.Relay, 'fails');
  assert.equal(gone.steps['A message'], undefined, 'there is no message without a relay');
  assert.ok(gone.advice.some(text => text.startsWith('Apps cannot meet anybody from here')));
});

test('a seed peer that does not answer is named', async () => {
  const { steps, advice } = await check('seed-gone', page => page.route('**/check/link', route =>
    route.fulfill({ status: 502, json: { reason: 'no seed peer answers there' } })));
  assert.deepEqual(steps, { ...all, 'Seed peer': 'fails' });
  assert.ok(advice.some(text => text.startsWith('The seed peer is out of reach')));
});

test('the services try themselves out', async () => {
  const deadline = Date.now() + 30_000;
  const tries = ['homeport_relay_probe_success', 'homeport_seed_probe_success', 'homeport_turn_probe_success'];
  for (;;) {
    const found = await Promise.all(tries.map(name => homeport.metric(name)));
    // TURN over UDP and over TCP.
    if (found.join() === '1,1,2') break;
    if (Date.now() > deadline) assert.fail(`${tries} are ${found}`);
    await new Promise(done => setTimeout(done, 100));
  }
  // None of that, nor of the checks above but their TURN, is anybody's success.
  assert.equal(await homeport.metric('homeport_seed_link_outcomes_total'), 0);
  assert.equal(await homeport.metric('homeport_relay_dials_total'), 0);
});

test('who asks for links again and again is told to wait', async () => {
  const ask = () => fetch(`${homeport.httpUrl}/check/link`, {
    method: 'POST', headers: { 'content-type': 'application/json' }, body: JSON.stringify({ sdp: 'v=0' }),
  });
  const statuses = await Promise.all(Array.from({ length: 30 }, async () => (await ask()).status));
  assert.ok(statuses.includes(429), `${statuses}`);
  const long = await fetch(`${homeport.httpUrl}/check/link`, {
    method: 'POST', headers: { 'content-type': 'application/json' }, body: JSON.stringify({ sdp: 'x'.repeat(20_000) }),
  });
  assert.equal(long.status, 413);
});
