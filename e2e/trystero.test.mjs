// Trystero, unmodified: with our relay alone, with our TURN server alone to carry its links, and with and without the
// economy of announces.
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
    assert.ok(paths.length > 0 && paths.every(({ local }) => local === 'relay'), JSON.stringify(paths));
  }
  assert.ok(await homeport.metric('homeport_turn_allocations_total', 'udp') >= 2);
  // Packets are counted many at a time, a moment after they were relayed.
  const deadline = Date.now() + 10_000;
  while (await homeport.metric('homeport_turn_relayed_bytes_total') <= 1_000_000) {
    assert.ok(Date.now() < deadline, 'the file was not counted');
    await new Promise(done => setTimeout(done, 50));
  }
  for (const page of both) await page.context().close();
});

test('rooms of six are whole and equal with the economy of announces, without it, and with hardly any announce', async () => {
  for (const [how, budget] of [['all announces', 0], ['the default budget', 50], ['one a second', 1]]) {
    const own = await Homeport.start({ settings: { HOMEPORT_RELAY__ANNOUNCE_BUDGET: `${budget}` } });
    try {
      const six = await Promise.all(Array.from({ length: 6 }, () => openPage(browser, `${pages.url}/pages/trystero.html`)));
      for (const page of six) await until(page, 'the page', () => window.loaded === true);
      const start = Date.now();
      for (const page of six.slice(0, 2)) await page.evaluate(url => window.start(url, [], false), own.relayUrl);
      for (const page of six.slice(0, 2)) await until(page, 'a peer', () => window.state.peers.length === 1);
      const two = Date.now() - start;
      for (const page of six.slice(2)) await page.evaluate(url => window.start(url, [], false), own.relayUrl);
      for (const page of six) await until(page, 'all peers', () => window.state.peers.length === 5);
      console.log(`trystero, ${how}: two met after ${two} ms, all six after ${Date.now() - start} ms`);
      // Nobody is taken for gone because little was heard of it: several announce periods later all are still there.
      await new Promise(done => setTimeout(done, 10_000));
      for (const page of six) assert.equal(await page.evaluate(() => Object.keys(window.room.getPeers()).length), 5);
      for (const page of six) await page.context().close();
    } finally {
      await own.stop();
    }
  }
});
