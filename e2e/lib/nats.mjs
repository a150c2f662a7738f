// A server of NATS of the test's own (Debian's nats-server), alone or as one of several that know each other.
import { spawn } from 'node:child_process';
import { connect } from 'node:net';
import { once } from 'node:events';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { freePort } from './homeport.mjs';

export class Nats {
  static async start(...others) {
    const nats = new Nats();
    [nats.port, nats.route] = [await freePort(), await freePort()];
    nats.words = ['--addr', '127.0.0.1', '--port', `${nats.port}`, '--name', `nats-${nats.port}`, '--cluster_name', 'e2e',
      '--cluster', `nats://127.0.0.1:${nats.route}`,
      ...(others.length ? ['--routes', others.map(({ route }) => `nats://127.0.0.1:${route}`).join(',')] : [])];
    await nats.resume();
    return nats;
  }

  /** One that is alone, and keeps streams. */
  static async withStreams() {
    const nats = new Nats();
    [nats.port, nats.folder] = [await freePort(), await mkdtemp(join(tmpdir(), 'homeport-nats-'))];
    nats.words = ['--addr', '127.0.0.1', '--port', `${nats.port}`, '--jetstream', '--store_dir', nats.folder];
    await nats.resume();
    return nats;
  }

  get url() { return `nats://127.0.0.1:${this.port}`; }

  async resume() {
    this.child = spawn('nats-server', this.words, { stdio: 'ignore' });
    this.ended = once(this.child, 'exit');
    for (const deadline = Date.now() + 20_000; ;) {
      const socket = connect(this.port, '127.0.0.1');
      const listens = await Promise.race([once(socket, 'connect').then(() => true, () => false), this.ended.then(() => false)]);
      socket.destroy();
      if (listens) return;
      if (Date.now() > deadline || this.child.exitCode !== null) throw new Error('nats-server does not listen');
      await new Promise(done => setTimeout(done, 20));
    }
  }

  async kill() {
    if (this.child.exitCode !== null || this.child.signalCode !== null) return;
    this.child.kill('SIGKILL');
    await this.ended;
  }

  /** Ends for good, with what was kept. */
  async stop() {
    await this.kill();
    if (this.folder) await rm(this.folder, { recursive: true, force: true });
  }
}
