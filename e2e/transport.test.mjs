// The seed beside a client of its transport that neither we nor GenosDB wrote: Trystero 0.21, whose Nostr strategy
// GenosRTC descends from (wire §2 and §3). Its sources are what npm has, but for the name that topics begin with. It knows no
// deflated frames, so what is said here is short. The packages that its other strategies need are overridden in package.json by
// one that is small: there are 600 of them.
import assert from 'node:assert/strict';
import { createHash } from 'node:crypto';
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import { launchChromium, openPage, servePages, until } from './lib/browser.mjs';
import { Homeport } from './lib/homeport.mjs';

let other, homeport, pages, browser;
before(async () => {
  // A second relay, which pages and seed share as well.
  other = await Homeport.start();
  homeport = await Homeport.start({
    rooms: ['notes', 'relayed', 'orphans', 'alone', { name: 'secret', password: 'pw1' }],
    settings: { HOMEPORT_SEED__RELAYS: JSON.stringify([other.relayUrl]) },
  });
  [pages, browser] = [await servePages(), await launchChromium()];
});
after(async () => {
  await browser?.close();
  pages?.close();
  await homeport?.stop();
  await other?.stop();
});

async function open(name, config = {}, script) {
  const relayUrls = [homeport.relayUrl, other.relayUrl];
  const room = JSON.stringify({ name, config: { relayUrls, rtcConfig: { iceServers: [] }, ...config } });
  const page = await openPage(browser, `${pages.url}/pages/transport.html?${new URLSearchParams({ room })}`, script);
  await until(page, 'the page', () => window.loaded === true);
  return page;
}

const close = page => page.context().close();
const state = page => page.evaluate(() => window.state);
const joined = (page, count) => until(page, `${count} peers`, count => window.state.joined.length === count, count);

/** The only peer of a page that is alone with the seed. */
async function seedOf(page) {
  await joined(page, 1);
  return (await state(page)).joined[0];
}

async function metric(name, label, wanted) {
  const deadline = Date.now() + 30_000;
  for (;;) {
    const value = await homeport.metric(name, label);
    if (value === wanted) return;
    if (Date.now() > deadline) assert.fail(`${name} of ${label} is ${value}, not ${wanted}\n${homeport.log}`);
    await new Promise(done => setTimeout(done, 50));
  }
}

/** The SHA-1 of a text, each byte in base 36 (wire §1). */
const topicOf = text => [...createHash('sha1').update(text).digest()].map(byte => byte.toString(36)).join('');

const at = (physical, logical = 1) => ({ timestamp: { physical, logical } });

test('what a page says while it is here, another gets from the seed when it is gone', async () => {
  const now = Date.now();
  const writer = await open('notes');
  const seed = await seedOf(writer);
  await writer.evaluate(operations => window.say(operations), [
    { type: 'upsert', id: 'a', value: { text: 'ä "quoted" ☃' }, ...at(now) },
    { type: 'upsert', id: 'b', value: 1.5, ...at(now, 2) },
    { type: 'upsert', id: 'c', value: null, ...at(now, 3) },
    { type: 'link', sourceId: 'a', targetId: 'b', ...at(now + 1) },
    { type: 'remove', id: 'c', ...at(now + 2) },
  ]);
  await metric('homeport_seed_nodes', 'room="notes"', 2);
  assert.equal(typeof await writer.evaluate(peer => window.ping(peer), seed), 'number');
  await writer.evaluate(() => window.leave());
  await metric('homeport_seed_links', 'room="notes"', 0);
  await close(writer);

  const reader = await open('notes');
  assert.equal(await seedOf(reader), seed);
  await until(reader, 'a state', () => window.state.heard.some(({ type }) => type === 'fullStateSync'));
  const { heard } = await state(reader);
  const { graphData, removals } = heard.find(({ type }) => type === 'fullStateSync');
  assert.deepEqual(graphData, {
    a: { id: 'a', value: { text: 'ä "quoted" ☃' }, edges: ['b'], ...at(now + 1) },
    b: { id: 'b', value: 1.5, edges: [], ...at(now, 2) },
  });
  assert.deepEqual(removals, [{ id: 'c', ...at(now + 2) }]);
  await close(reader);
});

test('pages that reload are found again, over two relays, and nobody is dialled in vain', async () => {
  const [stays, reloads] = [await open('orphans'), await open('orphans')];
  await Promise.all([joined(stays, 2), joined(reloads, 2)]);
  const gone = (await state(reloads)).selfId;
  await reloads.reload();
  await until(reloads, 'the page', () => window.loaded === true);
  await Promise.all([joined(stays, 3), joined(reloads, 2)]);
  assert.deepEqual((await state(stays)).left, [gone]);
  await metric('homeport_seed_links', 'room="orphans"', 2);
  for (const outcome of ['no_path', 'no_dtls', 'no_channel']) {
    assert.equal(await homeport.metric('homeport_seed_link_outcomes_total', `outcome="${outcome}"`), 0, outcome);
  }
  await Promise.all([stays, reloads].map(close));
});

test('with iceTransportPolicy "relay" a page reaches the seed through our TURN server', async () => {
  const { turnConfig: iceServers } = homeport.rtc;
  const page = await open('relayed', { rtcConfig: { iceServers, iceTransportPolicy: 'relay' } });
  const seed = await seedOf(page);
  assert.equal((await page.evaluate(peer => window.path(peer), seed)).local, 'relay');
  await close(page);
});

test('a page with the password meets the seed, one with another is told and stays outside', async () => {
  const friend = await open('secret', { password: 'pw1' });
  const seed = await seedOf(friend);
  const stranger = await open('secret', { password: 'guess' });
  await until(stranger, 'a refusal', seed => window.state.refused.some(({ peerId }) => peerId === seed), seed);
  assert.deepEqual((await state(stranger)).joined, []);
  await Promise.all([friend, stranger].map(close));
});

// Who links while another offer of its own is still being made keeps that one for ever (strategy.js: what is pending is not given
// up once the peer is connected). From then on it does not dial, and takes an offer only if the other's id is the greater.
test('a page that keeps an offer for the seed from before is linked again after each crash', { timeout: 180_000 }, async () => {
  const page = await open('orphans', { relayUrls: [other.relayUrl] }, () => {
    // An id that is greater than nearly all.
    const { random } = Math;
    let calls = 0;
    Math.random = () => [0.999, 0.999, 0.999, 0][calls++] ?? random();
    // A page has 20 offers ready at first, but throws them away after a minute: from then on it takes as long to make one as to
    // gather candidates, which is up to 5 s.
    const [every, { now }] = [setInterval, Date];
    setInterval = (run, ms) => every(run, ms > 50_000 ? 100 : ms);
    Date.now = () => now() + (window.later ?? 0);
    const [{ createDataChannel, setLocalDescription }, once] = [RTCPeerConnection.prototype, setTimeout];
    Object.assign(window, { offers: 0, judged: 0 });
    Object.assign(RTCPeerConnection.prototype, {
      createDataChannel(...options) {
        if (window.gathersSlowly) window.offers++;
        return createDataChannel.apply(this, options);
      },
      async setLocalDescription(description) {
        if (window.gathersSlowly && !this.remoteDescription) await new Promise(done => once(done, 4_000));
        return setLocalDescription.call(this, description);
      },
    });
    // After nine tenths of the time between two announces it is judged whether to give up an offer.
    setTimeout = (run, ms, ...more) => (Math.round(ms) === 4_800
      ? once(() => { run(); window.judged++; }, 1_000)
      : once(run, ms, ...more));
  });
  const seed = await seedOf(page);
  assert.match((await state(page)).selfId, /^zzz0/);
  await page.evaluate(async () => {
    Object.assign(window, { gathersSlowly: true, later: 60_000 });
    await new Promise(done => setTimeout(done, 500));
    window.later = 0;
  });
  const before = await page.evaluate(() => window.judged);
  for (let crash = 1; crash <= 2; crash++) {
    await homeport.kill();
    await homeport.run();
    await until(page, `the seed again, after crash ${crash}`, ([seed, count]) => {
      const { joined } = window.state;
      return joined.length > count && joined.at(-1) === seed;
    }, [seed, crash], 60_000);
    await until(page, 'every offer judged', before => window.judged >= before + window.offers, before);
  }
  assert.ok(await page.evaluate(() => window.offers) >= 2);
  await close(page);
});

// It subscribes once, at its start (nostr.js).
test('a page that does not ask again after its relay was away is found by newcomers, and finds them', { timeout: 120_000 }, async () => {
  const relayUrls = [homeport.relayUrl];
  const page = await open('alone', { relayUrls });
  const seed = await seedOf(page);
  // The relay writes down what its clients ask for every five seconds.
  const topic = topicOf(`GenosRTC@1234@graph-sync-room-alone@${(await state(page)).selfId}`);
  const written = () => readFile(join(homeport.data, 'returning.jsonl'), 'utf8').catch(() => '');
  for (const deadline = Date.now() + 30_000; !(await written()).includes(topic);) {
    assert.ok(Date.now() < deadline, 'the relay wrote nothing down');
    await new Promise(done => setTimeout(done, 50));
  }
  await homeport.kill();
  await homeport.run();
  await until(page, 'the seed again', seed => window.state.joined.filter(peer => peer === seed).length === 2, seed, 60_000);
  const other = await open('alone', { relayUrls });
  await Promise.all([joined(other, 2), joined(page, 3)]);
  assert.ok(await homeport.metric('homeport_relay_subscriptions_resumed_total') >= 2);
  await Promise.all([page, other].map(close));
});

test('when one of two relays dies, pages and seed meet over the other', async () => {
  await other.kill();
  const page = await open('orphans');
  const seed = await seedOf(page);
  assert.ok(await page.evaluate(peer => window.path(peer), seed));
  await close(page);
});
