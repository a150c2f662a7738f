// Trystero, unmodified, with our relay alone; then with our TURN server alone to carry its links.
import assert from 'node:assert/strict';
import { after, before, test } from 'node:test';
import { launchChromium, openPage, servePages, until } from './lib/browser.mjs';
import { Homeport, TURN_USER } from './lib/homeport.mjs';

let homeport, pages, browser;
before(async () => {
  [homeport, pages, browser] = [await Homeport.start(), await servePages(), await launchChromium()];
});
after(async () => {
  await browser?.close();
  pages?.close();
  await homeport?.stop();
});

async function meet(relayOnly) {
  const iceServers = [{ urls: `turn:${homeport.turnHost}:${homeport.ports.turn}?transport=udp`, ...TURN_USER }];
  const both = await Promise.all([1, 2].map(() => openPage(browser, `${pages.url}/pages/trystero.html`)));
  for (const page of both) {
    await until(page, 'the page', () => window.loaded === true);
    await page.evaluate(([url, servers, relay]) => window.start(url, servers, relay),
      [homeport.relayUrl, relayOnly ? iceServers : [], relayOnly]);
  }
  const start = Date.now();
  for (const page of both) await until(page, 'a peer', () => window.state.peers.length === 1);
  console.log(`trystero${relayOnly ? ', relay only' : ''}: met after ${Date.now() - start} ms`);
  return both;
}

async function exchange([one, other]) {
  await one.evaluate(() => window.say({ text: 'hello', n: 1.5 }));
  await other.evaluate(() => window.say('héllo ☃'));
  await until(other, 'a message', () => window.state.messages.length === 1);
  await until(one, 'a message', () => window.state.messages.length === 1);
  assert.deepEqual(await other.evaluate(() => window.state.messages), [{ text: 'hello', n: 1.5 }]);
  assert.deepEqual(await one.evaluate(() => window.state.messages), ['héllo ☃']);
  const sha256 = await one.evaluate(() => window.sendFile(1_000_000, 'a file'));
  await until(other, 'a file', () => window.state.files.length === 1);
  assert.deepEqual(await other.evaluate(() => window.state.files), [{ name: 'a file', length: 1_000_000, sha256 }]);
}

test('two Trystero pages meet through our relay alone and exchange messages and a file', async () => {
  const both = await meet(false);
  await exchange(both);
  for (const page of both) await page.context().close();
});

test('with iceTransportPolicy "relay" our TURN server carries it all', async () => {
  const both = await meet(true);
  await exchange(both);
  for (const page of both) {
    const paths = await page.evaluate(() => window.paths());
    assert.ok(paths.length > 0 && paths.every(type => type === 'relay'), `paths: ${paths}`);
  }
  assert.ok(await homeport.metric('homeport_turn_allocations_total', 'created') >= 2);
  assert.ok(await homeport.metric('homeport_turn_relayed_bytes_total') > 1_000_000);
  for (const page of both) await page.context().close();
});
