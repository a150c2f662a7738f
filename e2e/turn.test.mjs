// The TURN server with clients that somebody else wrote: Chromium, coturn's turnutils_uclient, and aioice.
import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { launchChromium, openPage, servePages, until } from './lib/browser.mjs';
import { freePort, Homeport, TURN_USER } from './lib/homeport.mjs';

const run = promisify(execFile);
let homeport, pages, browser, folder, tlsPort;

before(async () => {
  folder = await mkdtemp(join(tmpdir(), 'homeport-tls-'));
  const [cert, key] = [join(folder, 'cert.pem'), join(folder, 'key.pem')];
  await run('openssl', ['req', '-x509', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:prime256v1', '-nodes', '-days', '2',
    '-keyout', key, '-out', cert, '-subj', '/CN=localhost', '-addext', 'subjectAltName=DNS:localhost,IP:127.0.0.1']);
  tlsPort = await freePort();
  homeport = await Homeport.start({
    settings: {
      HOMEPORT_TURN__LISTEN_TLS: `[::]:${tlsPort}`, HOMEPORT_TLS__CERT: cert, HOMEPORT_TLS__KEY: key,
      // All clients here come from one address.
      HOMEPORT_TURN__UNAUTHENTICATED_PER_SECOND: '0',
    },
  });
  // The certificate is nobody's that a browser knows.
  [pages, browser] = [await servePages(), await launchChromium(['--ignore-certificate-errors'])];
});
after(async () => {
  await browser?.close();
  pages?.close();
  await homeport?.stop();
  await rm(folder, { recursive: true, force: true });
});

const uri = (transport, place) => {
  const host = homeport.turnHost;
  if (transport !== 'tls') return `turn:${host}:${homeport.ports.turn}?transport=${transport}`;
  return `turns:${host}:${place ? homeport.ports.relay : tlsPort}?transport=tcp`;
};

for (const [transport, place] of [['udp'], ['tcp'], ['tls'], ['tls', ' on the relay’s port']]) {
  test(`Chromium relays messages and video over ${transport}${place ?? ''}`, async () => {
    const page = await openPage(browser, `${pages.url}/pages/turn.html`);
    await until(page, 'the page', () => window.loaded === true);
    const { echoed, frames, paths } = await page.evaluate(
      servers => window.relay(servers), [{ urls: uri(transport, place), ...TURN_USER }]);
    assert.equal(echoed, 100);
    assert.ok(frames >= 30);
    assert.ok(paths.length > 0 && paths.every(path => path === `relay ${transport}`), `paths: ${paths}`);
    console.log(`Chromium over ${transport}${place ?? ''}: ${echoed} messages echoed, ${frames} frames`);
    await page.context().close();
  });
}

test('Chromium relays with credentials that the server gives to apps, by each way they name', async () => {
  const answer = await fetch(`${homeport.httpUrl}/turn-credentials`, { headers: { origin: 'https://app.example.com' } });
  assert.equal(answer.headers.get('access-control-allow-origin'), '*');
  const { username, password, ttl, uris } = await answer.json();
  assert.ok(ttl > 3_600);
  assert.deepEqual(uris.map(one => one.split(':')[0]), ['turn', 'turn', 'turns']);
  const page = await openPage(browser, `${pages.url}/pages/turn.html`);
  await until(page, 'the page', () => window.loaded === true);
  for (const urls of uris) {
    const { echoed } = await page.evaluate(servers => window.relay(servers), [{ urls, username, credential: password }]);
    assert.equal(echoed, 100);
  }
  await page.context().close();
});

/**
 * Runs coturn's client against `server`, with 4 clients of 20 packets if not told otherwise; it must lose none. Over TLS it
 * loses some on a busy machine, of coturn's own server too: then it may try again.
 */
async function uclient(name, server, port, flags) {
  for (let tries = flags.includes('-S') ? 3 : 1; ; tries -= 1) {
    const { stdout, stderr } = await run('turnutils_uclient', [
      '-u', TURN_USER.username, '-w', TURN_USER.credential, '-p', port, '-n', '20', '-m', '4', '-z', '5', ...flags, server,
    ], { timeout: 60_000 });
    const messages = /tot_send_msgs=(\d+), tot_recv_msgs=(\d+)\s*$/m.exec(stdout + stderr);
    if (tries > 1 && messages?.[1] !== messages?.[2]) {
      console.log(`turnutils_uclient, ${name}: ${messages?.[0]}, once more`);
      continue;
    }
    assert.match(stdout + stderr, /Total lost packets 0 /, name);
    assert.ok(Number(messages?.[1]) >= 80 && messages[1] === messages[2], `${name}: ${messages?.[0]}`);
    console.log(`turnutils_uclient, ${name}: ${messages[1]} sent, ${messages[2]} received`);
    return;
  }
}

test('turnutils_uclient loses nothing', async () => {
  const peer = execFile('turnutils_peer', ['-L', homeport.turnHost, '-p', '3480']);
  try {
    for (const [name, flags, shared] of [
      ['UDP, channels', []],
      ['UDP, Send indications', ['-s']],
      ['UDP, DONT-FRAGMENT and padding', ['-g', '-D']],
      ['UDP, more requests', ['-G']],
      ['UDP, 100 clients', ['-m', '100', '-z', '20']],
      ['TCP, channels', ['-t']],
      ['TCP, Send indications', ['-t', '-s']],
      ['TLS, channels', ['-t', '-S']],
      ['TLS on the relay’s port, channels', ['-t', '-S'], homeport.ports.relay],
      ['TCP on the relay’s port, Send indications', ['-t', '-s'], homeport.ports.relay],
    ]) {
      const port = shared ?? (flags.includes('-S') ? tlsPort : homeport.ports.turn);
      await uclient(name, homeport.turnHost, port, ['-c', '-e', homeport.turnHost, ...flags]);
    }
  } finally {
    peer.kill();
  }
});

test('turnutils_uclient loses nothing over IPv6, between the families, and with an allocation of both', async () => {
  const own = await Homeport.start({
    settings: { HOMEPORT_TURN__EXTERNAL_IP: '["127.0.0.1", "::1"]', HOMEPORT_TURN__UNAUTHENTICATED_PER_SECOND: '0' },
  });
  const peer = execFile('turnutils_peer', ['-L', '::1', '-p', '3482']);
  try {
    for (const [name, server, flags] of [
      ['IPv6 over UDP', '::1', ['-x', '-c', '-e', '::1', '-r', '3482']],
      ['IPv6 over TCP', '::1', ['-x', '-t', '-c', '-e', '::1', '-r', '3482']],
      ['IPv4 clients, IPv6 allocations', '127.0.0.1', ['-x', '-y', '-c']],
      ['IPv6 clients, IPv4 allocations', '::1', ['-y', '-c']],
      ['allocations of both families', '127.0.0.1', ['-Z', '-y']],
    ]) await uclient(name, server, own.ports.turn, flags);
  } finally {
    peer.kill();
    await own.stop();
  }
});

test('aioice gets back what it sends', async () => {
  const here = fileURLToPath(new URL('.', import.meta.url));
  const { turn, relay } = homeport.ports;
  for (const [transport, port] of [['udp', turn], ['tcp', turn], ['tls', tlsPort], ['tls', relay]]) {
    const { stdout } = await run(join(here, '.venv/bin/python'), [
      join(here, 'aioice_echo.py'), homeport.turnHost, port, transport, TURN_USER.username, TURN_USER.credential,
    ], { timeout: 60_000 });
    console.log(`aioice: ${stdout.trim()}`);
  }
});
