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
  const said = { steps, verdict: await page.textContent('#verdict'), advice: await page.$$eval('#advice li', list => list.map(({ textContent }) => textContent)) };
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

const all = { 'This server': 'works', Relay: 'works', 'A message': 'works', STUN: 'works', 'TURN over UDP': 'works', 'TURN over TCP': 'works', 'TURN over TLS': 'skipped' };

test('with everything up, everything works', async () => {
  const { steps, verdict, advice, report } = await check('everything');
  assert.deepEqual(steps, all);
  assert.equal(verdict, 'Everything works from here.');
  assert.deepEqual(advice, []);
  assert.match(report, /TURN over UDP: works\nTURN over TCP: works\nTURN over TLS: not offered/);
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

test('a relay that is out of reach is named, and what to ask for', async () => {
  const port = await freePort();
  const gone = await check('relay-gone', told(config => ({ ...config, relayUrls: [`ws://127.0.0.1:${port}/`] })));
  assert.equal(gone.steps.Relay, 'fails');
  assert.equal(gone.steps['A message'], undefined, 'there is no message without a relay');
  assert.ok(gone.advice.some(text => text.startsWith('Apps cannot meet anybody from here')));
});
