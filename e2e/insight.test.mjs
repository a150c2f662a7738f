// What Homeport says of connections, against what is known of them: dials of which a known share fails, and pages that
// report what they saw.
import assert from 'node:assert/strict';
import { after, before, test } from 'node:test';
import { finalizeEvent, generateSecretKey } from 'nostr-tools/pure';
import WebSocket from 'ws';
import { launchChromium, openPage, servePages, until } from './lib/browser.mjs';
import { Homeport } from './lib/homeport.mjs';

const DIALS = 200;
/** How long the relay waits before a dial counts as connected. */
const WINDOW_MS = 75_000;

let homeport, pages, browser, dialled;
before(async () => {
  pages = await servePages();
  browser = await launchChromium();
  homeport = await Homeport.start({ rooms: ['notes'] });
  dialled = dial();
});
after(async () => {
  await browser?.close();
  pages?.close();
  for (const peer of (await dialled?.catch(() => undefined))?.peers ?? []) peer.socket.terminate();
  await homeport?.stop();
});

/** A peer of the signalling alone. */
class Peer {
  static async join(number) {
    const peer = Object.assign(new Peer(), { id: `peer${number}`.padEnd(20, '0'), topic: `self${number}`, key: generateSecretKey(), offers: [] });
    peer.socket = new WebSocket(homeport.relayUrl);
    await new Promise((done, failed) => { peer.socket.once('open', done); peer.socket.once('error', failed); });
    peer.socket.send(JSON.stringify(['REQ', 'self', { kinds: [20_001], '#x': [peer.topic] }]));
    await new Promise(done => peer.socket.on('message', data => {
      const [verb, , event] = JSON.parse(data);
      if (verb === 'EOSE') done();
      if (verb === 'EVENT') peer.heard?.(JSON.parse(event.content));
    }));
    return peer;
  }
  say(topic, content) {
    const event = { kind: 20_001, created_at: Math.floor(Date.now() / 1000), tags: [['x', topic]], content: JSON.stringify({ peerId: this.id, ...content }) };
    this.socket.send(JSON.stringify(['EVENT', finalizeEvent(event, this.key)]));
  }
}

/** Dials of which it is known what becomes of them. */
async function dial() {
  const peers = await Promise.all(Array.from({ length: 40 }, (_, number) => Peer.join(number)));
  const truth = { connected: 0, redialled: 0, unanswered: 0 };
  const sleep = ms => new Promise(done => setTimeout(done, ms));
  const once = (from, to, isAnswered) => {
    to.heard = content => { if (isAnswered && content.offer) to.say(from.topic, { answer: { type: 'answer', sdp: '…' } }); };
    from.say(to.topic, { offer: { type: 'offer', sdp: '…' } });
  };
  // Each pair in its turn; of every ten attempts five connect, two are dialled again, and the rest is unanswered.
  const plan = ['connect', 'connect', 'silence', 'connect', 'redial', 'connect', 'silence', 'connect', 'silence'];
  const pairs = peers.flatMap((from, index) => [1, 3, 7, 11, 13].map(step => [from, peers[(index + step) % peers.length]]));
  let attempts = 0;
  for (const [index, [from, to]] of pairs.entries()) {
    if (attempts >= DIALS) break;
    const what = plan[index % plan.length];
    once(from, to, what !== 'silence');
    attempts += 1;
    if (what === 'silence') truth.unanswered += 1;
    if (what === 'connect') truth.connected += 1;
    await sleep(40);
    if (what === 'redial') {
      await sleep(1_200);
      once(from, to, true);
      attempts += 1;
      truth.redialled += 1;
      truth.connected += 1;
      await sleep(40);
    }
  }
  return { peers, truth, attempts, ended: Date.now() };
}

test('what pages report is what they saw', async () => {
  const open = async () => {
    const query = new URLSearchParams({ client: '/pages/wire-client.mjs', name: 'notes', options: JSON.stringify({ rtc: homeport.rtc }) });
    const page = await openPage(browser, `${pages.url}/pages/database.html?${query}`);
    await until(page, 'the database', () => window.loaded === true);
    await page.evaluate(async url => {
      const { monitor } = await import(url);
      window.monitor = monitor(window.db.room);
    }, `${homeport.httpUrl}/monitor.js`);
    return page;
  };
  const count = 4;
  const opened = [];
  for (let index = 0; index < count; index++) opened.push(await open());
  // Each with each other, and with the seed.
  await Promise.all(opened.map(page => until(page, 'links with all', wanted =>
    [...window.db.room.getPeers().values()].filter(peer => peer.connectionState === 'connected').length === wanted, count)));
  await opened[0].evaluate(async () => {
    for (let index = 0; index < 3; index++) {
      const connection = new RTCPeerConnection();
      connection.createDataChannel('x');
      window.monitor.watch(connection);
      await connection.setLocalDescription();
      connection.close();
    }
    for (let index = 0; index < 2; index++) {
      const connection = new RTCPeerConnection();
      connection.createDataChannel('x');
      window.monitor.watch(connection);
      window.kept = [...window.kept ?? [], connection];
      await connection.setLocalDescription();
    }
  });
  const reported = outcome => homeport.metric('homeport_relay_reported_links_total', `"${outcome}"`);
  const deadline = Date.now() + 60_000;
  // Each link has two ends, and those with the seed have one that reports.
  const links = count * (count - 1) + count;
  while (await reported('connected') < links || await reported('abandoned') < 3 || await reported('timed_out') < 2) {
    assert.ok(Date.now() < deadline, `${await reported('connected')} of ${links} connected, ${await reported('abandoned')} abandoned, ${await reported('timed_out')} timed out`);
    await new Promise(done => setTimeout(done, 250));
  }
  assert.deepEqual([await reported('connected'), await reported('timed_out'), await reported('failed')], [links, 2, 0]);
  assert.equal(await homeport.metric('homeport_relay_reports_total', '"malformed"'), 0);
  const paths = await homeport.metric('homeport_relay_reported_paths_total', '"host"') + await homeport.metric('homeport_relay_reported_paths_total', '"nat"');
  assert.equal(paths, links, 'on one machine nothing is relayed');
  assert.ok(await homeport.metric('homeport_seed_link_paths_total') >= count);
  assert.ok(await homeport.metric('homeport_seed_link_step_seconds_count', '"dtls"') >= count);
  await Promise.all(opened.map(page => page.context().close()));
});

test('reports that are none are refused, and make no series', async () => {
  const series = async () => (await (await fetch(`${homeport.metricsUrl}/metrics`)).text()).split('\n').filter(line => line && !line.startsWith('#')).length;
  const before = await series();
  for (const body of ['', '{}', '{"version":1,"links":[{"outcome":"x","ms":1}]}', `{"version":1,"links":[{"outcome":"connected","ms":1,"local":"${'a'.repeat(100)}"}]}`]) {
    assert.equal((await fetch(`${homeport.httpUrl}/reports`, { method: 'POST', body })).status, 400);
  }
  assert.equal((await fetch(`${homeport.httpUrl}/reports`, { method: 'POST', body: 'x'.repeat(100_000) })).status, 413);
  assert.equal(await series(), before);
});

test('the dial ledger says what became of two hundred dials', async () => {
  const { truth, attempts, ended } = await dialled;
  const of = outcome => homeport.metric('homeport_relay_dials_total', `"${outcome}"`);
  await new Promise(done => setTimeout(done, Math.max(0, ended + WINDOW_MS + 3_000 - Date.now())));
  const found = { connected: await of('connected'), redialled: await of('redialled'), unanswered: await of('unanswered') };
  console.log(`${attempts} dials: ${JSON.stringify(truth)}; with those of the pages before: ${JSON.stringify(found)}`);
  // The pages of the test before have dialled as well, and connected: each pair, and the seed, in two rooms.
  const pagesDialled = found.connected - truth.connected;
  assert.ok(pagesDialled >= 0 && pagesDialled <= 40, `${pagesDialled}`);
  const total = outcomes => outcomes.connected + outcomes.redialled + outcomes.unanswered;
  const expected = (truth.connected + pagesDialled) / (total(truth) + pagesDialled);
  const ratio = found.connected / total(found);
  assert.ok(Math.abs(ratio - expected) <= 0.02, `${ratio} instead of ${expected}`);
  assert.equal(await homeport.metric('homeport_relay_unwatched_dials_total'), 0);
});
