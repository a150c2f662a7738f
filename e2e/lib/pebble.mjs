// A certificate authority of the test's own: Debian's pebble, with the names of a DNS server made for it.
import { execFile, spawn } from 'node:child_process';
import { createSocket } from 'node:dgram';
import { readFile, writeFile } from 'node:fs/promises';
import { get } from 'node:https';
import { once } from 'node:events';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { freePort } from './homeport.mjs';

const run = promisify(execFile);

/** Answers every question for an IPv4 address with this machine's, and all others with nothing. */
async function dns() {
  const socket = createSocket('udp4');
  socket.on('message', (query, client) => {
    let end = 12;
    while (query[end] !== 0) end += query[end] + 1;
    const question = query.subarray(12, end + 5);
    const isAddress = query.readUInt16BE(end + 1) === 1;
    const header = Buffer.from([query[0], query[1], 0x81, 0x80, 0, 1, 0, isAddress ? 1 : 0, 0, 0, 0, 0]);
    const answer = Buffer.from([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 5, 0, 4, 127, 0, 0, 1]);
    socket.send(Buffer.concat([header, question, ...(isAddress ? [answer] : [])]), client.port, client.address);
  });
  socket.bind(0, '127.0.0.1');
  await once(socket, 'listening');
  return socket;
}

export class Pebble {
  #process;
  #dns;
  #log = '';

  /** Starts it in `folder`; it issues certificates that are good for `seconds`, and asks at `httpPort` and `tlsPort`. */
  static async start(folder, { seconds, httpPort, tlsPort }) {
    const pebble = new Pebble();
    const file = name => join(folder, name);
    // The certificate of the authority's own web server: ACME is HTTPS.
    await run('openssl', ['req', '-x509', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:prime256v1', '-nodes', '-days', '2',
      '-keyout', file('ca.key'), '-out', file('ca.pem'), '-subj', '/CN=The test’s own authority']);
    await run('openssl', ['req', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:prime256v1', '-nodes', '-keyout', file('pebble.key'),
      '-out', file('pebble.csr'), '-subj', '/CN=localhost']);
    await writeFile(file('pebble.ext'), 'subjectAltName=DNS:localhost,IP:127.0.0.1\nextendedKeyUsage=serverAuth\n');
    await run('openssl', ['x509', '-req', '-in', file('pebble.csr'), '-CA', file('ca.pem'), '-CAkey', file('ca.key'),
      '-CAcreateserial', '-days', '2', '-extfile', file('pebble.ext'), '-out', file('pebble.pem')]);
    const [port, management] = [await freePort(), await freePort()];
    await writeFile(file('pebble.json'), JSON.stringify({ pebble: {
      listenAddress: `127.0.0.1:${port}`, managementListenAddress: `127.0.0.1:${management}`,
      certificate: file('pebble.pem'), privateKey: file('pebble.key'),
      httpPort: httpPort ?? await freePort(), tlsPort: tlsPort ?? await freePort(), ocspResponderURL: '', externalAccountBindingRequired: false,
      certificateValidityPeriod: seconds,
    } }));
    pebble.#dns = await dns();
    pebble.directory = `https://localhost:${port}/dir`;
    pebble.ca = file('ca.pem');
    pebble.#process = spawn('pebble', ['-config', file('pebble.json'), '-dnsserver', `127.0.0.1:${pebble.#dns.address().port}`], {
      // Of nonces it refuses some at random, which clients must bear; and it does not dawdle.
      env: { ...process.env, PEBBLE_VA_NOSLEEP: '1' }, stdio: ['ignore', 'pipe', 'pipe'],
    });
    for (const stream of [pebble.#process.stdout, pebble.#process.stderr]) stream.on('data', data => { pebble.#log += data; });
    const ca = await readFile(pebble.ca);
    const root = () => new Promise((done, fail) => {
      get(`https://localhost:${management}/roots/0`, { ca }, answer => {
        let text = '';
        answer.on('data', data => { text += data; }).on('end', () => done(text));
      }).on('error', fail);
    });
    for (let tries = 0; ; tries++) {
      try {
        // The root of what it issues, made anew at each start.
        pebble.root = await root();
        return pebble;
      } catch (error) {
        if (tries > 200 || pebble.#process.exitCode !== null) throw new Error(`pebble does not start: ${error}\n${pebble.#log}`);
        await new Promise(done => setTimeout(done, 50));
      }
    }
  }

  get log() { return this.#log; }

  async stop() {
    const ended = once(this.#process, 'exit');
    this.#process.kill();
    await ended;
    this.#dns.close();
  }
}
