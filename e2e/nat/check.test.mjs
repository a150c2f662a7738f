// What the connection check says of the NAT that its user is behind.
import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { dirname, join } from 'node:path';
import { test } from 'node:test';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { Lab, SERVER, unable } from './lab.mjs';

const reason = unable();
if (reason) console.log(`the connection check behind a NAT: skipped, ${reason}`);
const opener = join(dirname(fileURLToPath(import.meta.url)), 'open-check.mjs');

for (const [kind, said] of [
  ['port-restricted', /Others see you under one address, whichever way you take/],
  ['symmetric', /anew for everybody you talk to \(symmetric\): direct connections are rare/],
]) {
  test(`a ${kind} NAT is told of as such, and everything works through it`, { skip: reason }, async () => {
    const lab = await Lab.start();
    try {
      const site = await lab.site(kind);
      await lab.homeport();
      const { stdout } = await promisify(execFile)('ip', ['netns', 'exec', site.client, process.execPath, opener, `https://${SERVER}:443`]);
      const steps = JSON.parse(stdout);
      assert.match(steps['Seed peer'][1], said);
      for (const [name, [state]] of Object.entries(steps)) assert.equal(state, 'works', name);
    } finally {
      await lab.stop();
    }
  });
}
