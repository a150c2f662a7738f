// Certificates: from files that change, and from a certificate authority, for relay and TURN alike.
import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { once } from 'node:events';
import { mkdtemp, readFile, rename, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import { connect } from 'node:tls';
import { promisify } from 'node:util';
import { finalizeEvent, generateSecretKey } from 'nostr-tools/pure';
import WebSocket from 'ws';
import { Homeport, freePort } from './lib/homeport.mjs';
import { Pebble } from './lib/pebble.mjs';

const run = promisify(execFile);
let folder;
before(async () => { folder = await mkdtemp(join(tmpdir(), 'homeport-tls-')); });
after(async () => { await rm(folder, { recursive: true, force: true }); });

/** What a client is shown that connects with TLS, trusting `ca` alone; fails if it is not for `servername`. */
async function shown(port, servername, ca) {
  const socket = connect({ port, host: '127.0.0.1', servername, ca });
  await once(socket, 'secureConnect');
  const certificate = socket.getPeerCertificate();
  socket.end();
  return certificate.serialNumber;
}

async function until(what, check) {
  const deadline = Date.now() + 60_000;
  for (;;) {
    const answer = await check().catch(error => { if (Date.now() > deadline) throw error; return undefined; });
    if (answer) return answer;
    if (Date.now() > deadline) assert.fail(`nothing came of: ${what}`);
    await new Promise(done => setTimeout(done, 100));
  }
}

/** A client of the relay that subscribes to what it publishes itself. */
class Client {
  constructor(url, options) {
    this.socket = new WebSocket(url, options);
    this.opened = once(this.socket, 'open');
    this.socket.on('close', () => { this.closed = true; });
  }
  async echo() {
    await this.opened;
    const event = finalizeEvent(
      { kind: 20_001, created_at: Math.floor(Date.now() / 1000), tags: [['x', 'tls']], content: '' }, generateSecretKey());
    const heard = new Promise(done => {
      this.socket.on('message', data => { const [verb, , what] = JSON.parse(data); if (verb === 'EVENT' && what.id === event.id) done(); });
    });
    this.socket.send(JSON.stringify(['REQ', 'own', { kinds: [20_001], '#x': ['tls'] }]));
    this.socket.send(JSON.stringify(['EVENT', event]));
    await heard;
  }
}

async function selfSigned(name) {
  const [cert, key] = [join(folder, `${name}.pem`), join(folder, `${name}.key`)];
  await run('openssl', ['req', '-x509', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:prime256v1', '-nodes', '-days', '2',
    '-keyout', key, '-out', cert, '-subj', `/CN=${name}`, '-addext', `subjectAltName=DNS:${name}`]);
  return [cert, key];
}

const acme = (domains, { directory, ca }, httpPort) => ({
  HOMEPORT_TLS__ACME__DOMAINS: JSON.stringify(domains),
  HOMEPORT_TLS__ACME__EMAIL: 'somebody@homeport.test',
  HOMEPORT_TLS__ACME__DIRECTORY: directory,
  HOMEPORT_TLS__ACME__CA: ca,
  HOMEPORT_TLS__ACME__LISTEN: `127.0.0.1:${httpPort}`,
});

test('files of a certificate serve relay and TURN, and new ones are taken while clients stay', async () => {
  const [cert, key] = await selfSigned('one.test');
  const [tlsPort, old] = [await freePort(), await readFile(cert)];
  const homeport = await Homeport.start({
    settings: { HOMEPORT_TURN__LISTEN_TLS: `[::]:${tlsPort}`, HOMEPORT_TLS__CERT: cert, HOMEPORT_TLS__KEY: key },
  });
  try {
    const { relay } = homeport.ports;
    const serial = await shown(relay, 'one.test', old);
    assert.equal(await shown(tlsPort, 'one.test', old), serial);
    const client = new Client(`wss://127.0.0.1:${relay}`, { ca: old, servername: 'one.test' });
    await client.echo();
    // What does not begin with TLS is served on the same port: the seed, and a proxy in front.
    const plain = new Client(`ws://127.0.0.1:${relay}`);
    await plain.echo();
    plain.socket.close();
    assert.deepEqual((await (await fetch(`${homeport.httpUrl}/client-config.json`)).json()).relayUrls, [`wss://127.0.0.1:${relay}`]);
    const [next, nextKey] = await selfSigned('two.test');
    const renewed = await readFile(next);
    await rename(next, cert);
    await rename(nextKey, key);
    for (const port of [relay, tlsPort]) await until('the new certificate', () => shown(port, 'two.test', renewed));
    await client.echo();
    assert.ok(!client.closed, 'who is connected stays');
    client.socket.close();
    assert.ok(await homeport.metric('homeport_relay_certificate_expiry_timestamp_seconds') > Date.now() / 1000);
    assert.ok(await homeport.metric('homeport_relay_tls_handshakes_total', 'ok') >= 3);
  } finally {
    await homeport.stop();
  }
});

test('a certificate is asked for, shared by relay and TURN, and renewed while a client is connected', async () => {
  const httpPort = await freePort();
  // A third of its time before it ends, it is renewed: after twenty seconds.
  const pebble = await Pebble.start(folder, { seconds: 30, httpPort });
  const tlsPort = await freePort();
  const homeport = await Homeport.start({
    settings: {
      HOMEPORT_TURN__LISTEN_TLS: `[::]:${tlsPort}`,
      ...acme(['relay.homeport.test', 'turn.homeport.test'], pebble, httpPort),
    },
  });
  try {
    const { relay } = homeport.ports;
    const first = await until('a certificate at the relay', () => shown(relay, 'relay.homeport.test', pebble.root));
    assert.equal(await until('the same at TURN', () => shown(tlsPort, 'turn.homeport.test', pebble.root)), first);
    const client = new Client(`wss://127.0.0.1:${relay}`, { ca: pebble.root, servername: 'relay.homeport.test' });
    await client.echo();
    const config = await (await fetch(`${homeport.httpUrl}/client-config.json`)).json();
    assert.deepEqual(config.relayUrls, [`wss://relay.homeport.test:${relay}`]);
    assert.ok(config.turnConfig.some(({ urls }) => [urls].flat().includes(`turns:relay.homeport.test:${tlsPort}?transport=tcp`)));
    const redirected = await fetch(`http://127.0.0.1:${httpPort}/somewhere?x=1`, { redirect: 'manual', headers: { host: 'relay.homeport.test' } });
    assert.equal(redirected.status, 308);

    const isNew = port => async () => {
      const serial = await shown(port, 'relay.homeport.test', pebble.root);
      return serial !== first && serial;
    };
    const second = await until('a renewed certificate at the relay', isNew(relay));
    await until('the same at TURN', async () => await shown(tlsPort, 'turn.homeport.test', pebble.root) === second);
    await client.echo();
    assert.ok(!client.closed, 'who is connected stays');
    client.socket.close();
    // After a restart the account and the certificate are there.
    await homeport.terminate();
    await homeport.run();
    await until('the certificate after a restart', () => shown(relay, 'relay.homeport.test', pebble.root));
    assert.equal(pebble.log.match(/There are now \d+ accounts in memory/g)?.length ?? 1, 1, 'one account');
    console.log(`pebble issued ${first} and then ${second}`);
  } catch (error) {
    throw new Error(`${error.stack}\n${homeport.log}\n${pebble.log}`);
  } finally {
    await homeport.stop();
    await pebble.stop();
  }
});

test('an authority that asks at the relay’s port is convinced there, and TURN shares the port', async () => {
  const relay = await freePort();
  const pebble = await Pebble.start(folder, { seconds: 600, tlsPort: relay });
  const homeport = await Homeport.start({
    ports: { relay },
    settings: {
      HOMEPORT_TURN__LISTEN_TLS: `[::]:${relay}`,
      ...acme(['relay.homeport.test'], pebble, await freePort()),
      HOMEPORT_TLS__ACME__CHALLENGE: 'tls-alpn-01',
    },
  });
  try {
    // It asks nowhere else: nobody listens at its `httpPort`.
    await until('a certificate', () => shown(relay, 'relay.homeport.test', pebble.root));
    const client = new Client(`wss://127.0.0.1:${relay}`, { ca: pebble.root, servername: 'relay.homeport.test' });
    await client.echo();
    client.socket.close();
    const speak = async ALPNProtocols => {
      const socket = connect({ port: relay, host: '127.0.0.1', servername: 'relay.homeport.test', ca: pebble.root, ALPNProtocols });
      await once(socket, 'secureConnect');
      socket.end();
    };
    await speak(['h2', 'http/1.1']);
    await assert.rejects(speak(['acme-tls/1']), 'nothing is to be proven any more');
    const { turnConfig } = await (await fetch(`${homeport.httpUrl}/client-config.json`)).json();
    assert.ok(turnConfig.some(({ urls }) => [urls].flat().includes(`turns:relay.homeport.test:${relay}?transport=tcp`)));
    // With a certificate from the start, the first try from inside succeeds.
    await homeport.terminate();
    await homeport.run();
    await until('a try of TURN over TLS', async () => await homeport.metric('homeport_turn_probe_success', 'tls') === 1);
  } catch (error) {
    throw new Error(`${error.stack}\n${homeport.log}\n${pebble.log}`);
  } finally {
    await homeport.stop();
    await pebble.stop();
  }
});

test('an authority that is not convinced is quoted, and the services go on', async () => {
  const pebble = await Pebble.start(folder, { seconds: 600, httpPort: await freePort() });
  const started = Homeport.start({
    settings: {
      // Not where the authority asks.
      ...acme(['relay.homeport.test'], pebble, await freePort()),
    },
  });
  // It is not ready, and says so.
  await assert.rejects(started, /homeport is not ready[^]*no certificate was issued[^]*Connection refused/i);
  await pebble.stop();
});
