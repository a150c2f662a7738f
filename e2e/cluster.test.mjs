// Two machines of a cluster, each with a server of NATS of its own: pages that know one relay each meet, apps are told of
// the TURN server near them, and what happens to NATS is said.
import assert from 'node:assert/strict';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import { launchChromium, openPage, servePages, until } from './lib/browser.mjs';
import { client } from './lib/clients.mjs';
import { Homeport } from './lib/homeport.mjs';
import { Nats } from './lib/nats.mjs';


const SECRET = 'shared by the TURN servers of the cluster';
const TOKEN = 'north star';
const nats = [], machines = [];
let pages, browser;

const wait = ms => new Promise(done => setTimeout(done, ms));
async function eventually(what, check) {
  for (const deadline = Date.now() + 30_000; ;) {
    const answer = await check();
    if (answer) return answer;
    assert.ok(Date.now() < deadline, what);
    await wait(50);
  }
}

before(async () => {
  nats.push(await Nats.start());
  nats.push(await Nats.start(nats[0]));
  for (const [index, region] of ['eu', 'us'].entries()) {
    machines.push(await Homeport.start({
      rooms: ['notes'],
      settings: {
        HOMEPORT_CLUSTER__NATS: nats[index].url, HOMEPORT_CLUSTER__NAME: region, HOMEPORT_TURN__REGION: region,
        HOMEPORT_TURN__SECRET: SECRET, HOMEPORT_TURN__HOST: `turn-${region}.example.com`, HOMEPORT_METRICS__PROBE: 'false', HOMEPORT_RELAY__STATUS_TOKEN: TOKEN,
        // Each seed is in the room by itself: these servers of NATS keep nothing that leases could stand in.
        HOMEPORT_CLUSTER__ROOMS: 'false',
      },
    }));
  }
  [pages, browser] = [await servePages(), await launchChromium()];
});
after(async () => {
  await browser?.close();
  pages?.close();
  for (const machine of machines) await machine.stop();
  for (const server of nats) await server.stop();
});

test('two Trystero pages on relays of two machines meet and exchange messages', async () => {
  const both = [];
  for (const machine of machines) {
    const page = await openPage(browser, `${pages.url}/pages/trystero.html`);
    await until(page, 'the page', () => window.loaded === true);
    both.push([page, machine.relayUrl]);
  }
  const start = Date.now();
  for (const [page, url] of both) await page.evaluate(relay => window.start(relay, [], false), url);
  for (const [page] of both) await until(page, 'a peer', () => window.state.peers.length === 1);
  console.log(`cluster: pages on two relays met after ${Date.now() - start} ms`);
  await both[0][0].evaluate(() => window.say('hello'));
  await until(both[1][0], 'a message', () => window.state.messages.includes('hello'));
  for (const machine of machines) {
    assert.equal(await machine.metric('homeport_relay_connections') >= 1, true, 'each has a page of its own');
    assert.ok(await machine.metric('homeport_relay_cluster_messages_total', 'out') > 0);
  }
  for (const [page] of both) await page.context().close();
});

const hosts = async (machine, query = '') => {
  const { turnConfig } = await (await fetch(`${machine.httpUrl}/client-config.json${query}`)).json();
  return turnConfig.slice(1).map(({ urls }) => /^turn:([^:]+):/.exec(urls[0])[1]);
};

test('apps are told of the TURN server near them first, and of none that has ended', async () => {
  const [eu, us] = ['turn-eu.example.com', 'turn-us.example.com'];
  await eventually('each knows both', async () => (await Promise.all(machines.map(machine => hosts(machine)))).every(list => list.length === 2));
  assert.deepEqual(await hosts(machines[0]), [eu, us], 'near the relay, where no region is named');
  assert.deepEqual(await hosts(machines[0], '?region=us'), [us, eu]);
  assert.deepEqual(await hosts(machines[1], '?region=eu'), [eu, us]);
  const { username, password, uris } = await (await fetch(`${machines[0].httpUrl}/turn-credentials?region=us`)).json();
  assert.match(username, /^\d+:app$/);
  assert.ok(password && uris[0].includes(us) && uris.some(uri => uri.includes(eu)));

  const start = Date.now();
  await machines[1].terminate();
  await eventually('the one that ended is no longer listed', async () => (await hosts(machines[0], '?region=us')).join() === eu);
  console.log(`cluster: a TURN server that ends is gone from the list after ${Date.now() - start} ms`);
  await machines[1].run();
  await eventually('it is back', async () => (await hosts(machines[0], '?region=us'))[0] === us);
});

test('a machine dies while pages write: the others go on, and both archives hold all when it is back', async () => {
  const all = machines.map(({ relayUrl }) => relayUrl);
  // Each page knows the relay of its machine first, as a balancer would have it, and the other.
  const both = [];
  for (const relayUrls of [all, all.toReversed()]) {
    const query = new URLSearchParams({ client, name: 'notes', options: JSON.stringify({ rtc: { relayUrls, turnConfig: [] } }) });
    const page = await openPage(browser, `${pages.url}/pages/database.html?${query}`);
    await until(page, 'the database', () => window.loaded === true);
    both.push(page);
  }
  const write = (page, name) => page.evaluate(async prefix => {
    for (let number = 0; number < 100; number++) await window.db.put({ number }, `${prefix}-${number}`);
  }, name);
  const hold = count => Promise.all(both.map(page => until(page, `${count} nodes`, async wanted => await window.count() === wanted, count)));
  const archived = async (machine, count) => eventually(`${count} nodes in an archive`,
    async () => await machine.metric('homeport_seed_nodes', 'notes') === count);
  for (const page of both) await until(page, 'a link', () => window.db.room.getPeers().size > 0);
  await write(both[0], 'before');
  await hold(100);
  for (const machine of machines) await archived(machine, 100);

  await machines[1].kill();
  await write(both[1], 'while');
  await hold(200);
  await archived(machines[0], 200);
  const start = Date.now();
  await machines[1].run();
  await archived(machines[1], 200);
  console.log(`cluster: the archive of a machine that was gone has caught up ${Date.now() - start} ms after it was started`);
  await write(both[0], 'after');
  await hold(300);
  for (const machine of machines) {
    await archived(machine, 300);
    const shown = await machine.command('rooms', 'show', 'notes', '--query', '{}');
    const held = shown.split('\n').filter(Boolean).map(JSON.parse).map(({ id, value }) => [id, value.number]);
    const expected = ['before', 'while', 'after'].flatMap(name => Array.from({ length: 100 }, (_, number) => [`${name}-${number}`, number]));
    assert.deepEqual(new Map(held), new Map(expected.sort(([one], [other]) => (one < other ? -1 : 1))));
  }
  for (const page of both) await page.context().close();
});

test('the status page of each machine shows all of them, those that are down too', async () => {
  const states = async machine => {
    const answer = await fetch(`${machine.httpUrl}/status.json`, { headers: { authorization: `Bearer ${TOKEN}` } });
    const { machines: shown } = await answer.json();
    return Object.fromEntries(shown.map(({ name, services }) => [name, [...new Set(services.map(({ state }) => state))].join()]));
  };
  const both = (eu, us) => async () => JSON.stringify(await states(machines[0])) === JSON.stringify({ eu, ...(us && { us }) });
  await eventually('both are shown', both('ok', 'ok'));
  const strangers = await (await fetch(`${machines[0].httpUrl}/status.json`)).json();
  assert.deepEqual(strangers.machines.map(({ name }) => name), ['machine 1', 'machine 2'], 'their names are for who knows the token');
  const page = await openPage(browser, `${machines[0].httpUrl}/#token=${encodeURIComponent(TOKEN)}`);
  await until(page, 'a verdict', () => document.getElementById('verdict').textContent === 'Everything works.');
  assert.deepEqual(await page.$$eval('#machines h3', names => names.map(name => name.textContent)), ['eu', 'us']);
  assert.equal(await page.isVisible('#services-section'), false);
  const connections = async machine => (await (await fetch(`${machine.httpUrl}/status.json`)).json()).now.connections;
  await eventually('numbers are those of all machines', async () => {
    const own = await Promise.all(machines.map(machine => machine.metric('homeport_relay_connections')));
    const shown = await Promise.all(machines.map(connections));
    return own.every(count => count > 0) && shown.every(count => count === own[0] + own[1]);
  });

  await machines[1].kill();
  await eventually('the one that died is down', both('ok', 'down'));
  await until(page, 'that, on the page', () => document.getElementById('verdict').textContent.includes('relay of us'));
  await machines[1].run();
  await eventually('it is back', both('ok', 'ok'));
  await machines[1].terminate();
  await eventually('the one that ended in order is gone', both('ok'));
  await machines[1].run();
  await eventually('it is back again', both('ok', 'ok'));
  await page.context().close();
});

test('the doctor names NATS when it is out of reach, and health says that the machine is alone', async () => {
  const findings = JSON.parse(await machines[0].command('check', 'relay', '--json').catch(error => error.stdout));
  const of = list => list.find(({ what }) => what === 'cluster');
  assert.equal(of(findings).verdict, 'ok', JSON.stringify(findings));
  await nats[0].kill();
  const parts = async () => (await (await fetch(`${machines[0].metricsUrl}/readyz`)).json()).parts.cluster;
  await eventually('health says so', async () => (await parts()).state === 'degraded');
  const later = JSON.parse(await machines[0].command('check', 'relay', '--json').catch(error => error.stdout));
  assert.equal(of(later).verdict, 'failure');
  assert.match(of(later).advice, /cluster\.nats/);
  await nats[0].resume();
  await eventually('health says that it is back', async () => (await parts()).state === 'ok');
});
