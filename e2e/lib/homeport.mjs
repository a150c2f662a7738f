// A Homeport of the test's own: real binary, free ports, data in a folder that goes away.
import { execFile, spawn } from 'node:child_process';
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { createServer } from 'node:net';
import { createSocket } from 'node:dgram';
import { tmpdir } from 'node:os';
import { dirname, join, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import { once } from 'node:events';
import { promisify } from 'node:util';

const root = resolve(dirname(fileURLToPath(import.meta.url)), '../..');
export const binary = process.env.HOMEPORT_BINARY ?? join(root, 'target/debug/homeport');

export const TURN_USER = { username: 'alice', credential: 'e2e-password' };

/** Tries to listen on a port of all addresses; says whether it is free. */
function isFree(listener, listen) {
  return new Promise(done => {
    listener.once('error', () => done(false));
    listen(() => listener.close(() => done(true)));
  });
}

/**
 * A port that is free for TCP and for UDP. Not one that the system gives: those it gives to every connection as well, so
 * that one may be taken again before it is used.
 */
export async function freePort() {
  for (;;) {
    const port = 10_000 + Math.floor(Math.random() * 20_000);
    const tcp = createServer();
    const udp = createSocket({ type: 'udp6' });
    if (await isFree(tcp, then => tcp.listen(port, '::', then)) && await isFree(udp, then => udp.bind(port, '::', then))) {
      return port;
    }
  }
}

/** Settings by environment, as `HOMEPORT_…` variables. */
export class Homeport {
  #process;
  #log = '';

  static async start({ rooms = [], settings = {}, data, files = {}, ports = {} } = {}) {
    const homeport = new Homeport();
    homeport.folder = await mkdtemp(join(tmpdir(), 'homeport-e2e-'));
    homeport.data = data ?? join(homeport.folder, 'data');
    homeport.rooms = rooms;
    homeport.ports = {
      relay: await freePort(),
      metrics: await freePort(),
      turn: await freePort(),
      seed: await freePort(),
      ...ports,
    };
    homeport.settings = settings;
    for (const [name, text] of Object.entries(files)) await writeFile(join(homeport.folder, name), text);
    await homeport.run();
    return homeport;
  }

  get relayUrl() { return `ws://127.0.0.1:${this.ports.relay}`; }
  get httpUrl() { return `http://127.0.0.1:${this.ports.relay}`; }
  get metricsUrl() { return `http://127.0.0.1:${this.ports.metrics}`; }
  get log() { return this.#log; }

  /** What an app is given; TURN by the static user. */
  get rtc() {
    return {
      relayUrls: [this.relayUrl],
      turnConfig: [{ urls: [`turn:${this.turnHost}:${this.ports.turn}?transport=udp`], ...TURN_USER }],
    };
  }

  /** The rooms that a test has named; others stand in a file. */
  get #rooms() {
    if (this.rooms.length === 0) return {};
    const rooms = this.rooms.map(room => (typeof room === 'string' ? { name: room } : room));
    return { HOMEPORT_SEED__ROOM: JSON.stringify(rooms).replaceAll(/"(\w+)":/g, '$1=') };
  }

  /** The variables that hold the settings. */
  get #environment() {
    return {
      ...process.env,
      HOMEPORT_RELAY__LISTEN: `[::]:${this.ports.relay}`,
      HOMEPORT_TURN__LISTEN: `[::]:${this.ports.turn}`,
      HOMEPORT_SEED__LISTEN: `[::]:${this.ports.seed}`,
      HOMEPORT_METRICS__LISTEN: `127.0.0.1:${this.ports.metrics}`,
      HOMEPORT_TURN__USERS: `{${TURN_USER.username}="${TURN_USER.credential}"}`,
      ...this.#rooms,
      HOMEPORT_LOG: process.env.HOMEPORT_LOG ?? 'info,seed_peer=debug',
      ...this.settings,
    };
  }

  /** Runs another command of the binary with the same settings; returns what it printed, or fails with that. */
  async command(...words) {
    const options = { cwd: this.folder, env: { ...this.#environment, HOMEPORT_DATA: this.data }, maxBuffer: 1 << 28 };
    const { stdout } = await promisify(execFile)(binary, words, options);
    return stdout;
  }

  /** Starts the process, again if need be, and waits until it is ready. */
  async run() {
    const child = spawn(binary, ['up', '--data', this.data], {
      cwd: this.folder, env: this.#environment, stdio: ['ignore', 'pipe', 'pipe'],
    });
    this.#process = child;
    const ended = once(child, 'exit');
    this.ended = ended;
    let summary = '';
    child.stderr.on('data', data => { this.#log += data; });
    child.stdout.on('data', data => { summary += data; });
    const deadline = Date.now() + 30_000;
    for (;;) {
      if (child.exitCode !== null) throw new Error(`homeport ended at start:\n${this.#log}`);
      // The summary comes through a pipe of its own, before or after the first answer.
      const turn = /turn:([^ ]+):\d+ \(UDP/.exec(summary);
      const ready = await fetch(`${this.metricsUrl}/readyz`).then(answer => answer.ok, () => false);
      if (ready && turn) {
        this.turnHost = turn[1];
        return;
      }
      if (Date.now() > deadline) {
        await this.kill();
        throw new Error(`homeport is not ready:\n${this.#log}`);
      }
      await new Promise(done => setTimeout(done, 25));
    }
  }

  /** `kill -9`: as a power cut, as far as the process goes. */
  async kill() {
    this.#process.kill('SIGKILL');
    await this.ended;
  }

  /** SIGTERM; returns how long the end took, in ms. */
  async terminate() {
    const start = Date.now();
    this.#process.kill('SIGTERM');
    const [code] = await this.ended;
    if (code !== 0) throw new Error(`homeport ended with ${code}:\n${this.#log}`);
    return Date.now() - start;
  }

  /** The sum of a metric's series whose labels contain `label`. */
  async metric(name, label = '') {
    const text = await (await fetch(`${this.metricsUrl}/metrics`)).text();
    return text.split('\n')
      .filter(line => (line.startsWith(`${name}{`) || line.startsWith(`${name} `)) && line.includes(label))
      .reduce((sum, line) => sum + Number(line.slice(line.lastIndexOf(' '))), 0);
  }

  async stop() {
    if (this.#process.exitCode === null && this.#process.signalCode === null) await this.terminate();
    await rm(this.folder, { recursive: true, force: true });
  }
}
