// What the connection check says of the NAT that its user is behind.
import assert from 'node:assert/strict';
import { execFile, spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { test } from 'node:test';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { binary } from './lib/homeport.mjs';
import { Lab, SERVER, unable } from './lib/nat.mjs';

const reason = unable();
if (reason) console.log(`the connection check behind a NAT: skipped, ${reason}`);
const opener = join(dirname(fileURLToPath(import.meta.url)), 'lib/open-check.mjs');

for (const [kind, masquerade, said] of [
  ['keeps one address for all', [], /Others see you under one address, whichever way you take/],
  ['makes one for everybody', ['--random-fully'], /anew for everybody you talk to \(symmetric\): direct connections are rare/],
]) {
  test(`a NAT that ${kind} is told of as such, and everything works through it`, { skip: reason }, async () => {
    const folder = await mkdtemp(join(tmpdir(), 'homeport-nat-'));
    const lab = await Lab.start(masquerade);
    const homeport = spawn('ip', ['netns', 'exec', lab.server, binary, 'up', '--room', 'notes'], { cwd: folder, stdio: ['ignore', 'pipe', 'inherit'] });
    try {
      for await (const data of homeport.stdout) if (/gdb\(/.test(data)) break;
      const { stdout } = await promisify(execFile)('ip', ['netns', 'exec', lab.client, process.execPath, opener, `http://${SERVER}:8080`]);
      const steps = JSON.parse(stdout);
      assert.match(steps['Seed peer'][1], said);
      for (const name of ['Relay', 'A message', 'STUN', 'Seed peer', 'TURN over UDP', 'TURN over TCP']) assert.equal(steps[name][0], 'works', name);
    } finally {
      const ended = once(homeport, 'exit');
      homeport.kill('SIGTERM');
      await ended;
      await lab.stop();
      await rm(folder, { recursive: true, force: true });
    }
  });
}
