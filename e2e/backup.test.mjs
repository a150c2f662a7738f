// Backups to storage that speaks S3: moto's server, which shares nothing with Homeport and its client.
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { rm, writeFile } from 'node:fs/promises';
import { dirname, join, resolve } from 'node:path';
import { after, before, test } from 'node:test';
import { fileURLToPath } from 'node:url';
import { Homeport, freePort } from './lib/homeport.mjs';

const here = dirname(fileURLToPath(import.meta.url));
let storage, endpoint, homeport;

before(async () => {
  const port = await freePort();
  endpoint = `http://127.0.0.1:${port}`;
  storage = spawn(resolve(here, '.venv/bin/moto_server'), ['-H', '127.0.0.1', '-p', String(port)], { stdio: 'ignore' });
  const deadline = Date.now() + 60_000;
  while (!await fetch(`${endpoint}/bucket`, { method: 'PUT' }).then(answer => answer.ok, () => false)) {
    assert.ok(Date.now() < deadline && storage.exitCode === null, 'no storage');
    await new Promise(done => setTimeout(done, 100));
  }
  homeport = await Homeport.start({
    rooms: ['my-app'],
    settings: {
      HOMEPORT_SEED__BACKUP__TO: 's3://bucket/homeport/main',
      HOMEPORT_SEED__BACKUP__ENDPOINT: endpoint,
      HOMEPORT_SEED__BACKUP__REGION: 'eu-north-1',
      HOMEPORT_SEED__BACKUP__ACCESS_KEY_ID: 'AKIAIOSFODNN7EXAMPLE',
      HOMEPORT_SEED__BACKUP__SECRET_ACCESS_KEY: 'wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY',
      HOMEPORT_SEED__BACKUP__EVERY: '1h',
    },
  });
});
after(async () => {
  await homeport?.stop();
  if (storage && storage.exitCode === null) {
    storage.kill();
    await once(storage, 'exit');
  }
});

/** The keys in the bucket, as S3 lists them. */
async function keys() {
  const text = await (await fetch(`${endpoint}/bucket?list-type=2`)).text();
  return [...text.matchAll(/<Key>([^<]+)<\/Key>/g)].map(([, key]) => key).sort();
}

const lines = text => text.split('\n').filter(Boolean);

test('the archive goes to a bucket by itself, and comes back onto an empty machine', async () => {
  const deadline = Date.now() + 30_000;
  while (await homeport.metric('homeport_seed_backups_total', '"made"') < 1) {
    assert.ok(Date.now() < deadline, `the first backup: ${homeport.log}`);
    await new Promise(done => setTimeout(done, 50));
  }
  const age = Date.now() / 1_000 - await homeport.metric('homeport_seed_backup_timestamp_seconds');
  assert.ok(age >= 0 && age < 60, `${age}`);

  const nodes = Array.from({ length: 25_000 }, (_, index) => JSON.stringify({ id: `n${index}`, value: { index, text: 'x☃'.repeat(20) } }));
  await writeFile(join(homeport.folder, 'nodes.jsonl'), nodes.join('\n'));
  await homeport.command('rooms', 'import', 'my-app', 'nodes.jsonl');
  assert.match(await homeport.command('rooms', 'backup'), /incremental: 1 rooms, 25000 operations/);
  const held = await keys();
  assert.equal(held.filter(key => /^homeport\/main\/segments\/[0-9a-f]{64}\.jsonl\.gz$/.test(key)).length, 2);
  assert.equal(held.filter(key => key.startsWith('homeport/main/manifests/')).length, 2);
  assert.equal(held.length, 4);
  assert.equal(lines(await homeport.command('rooms', 'backups')).length, 2);

  const before = lines(await homeport.command('rooms', 'export', 'my-app')).slice(1);
  await homeport.terminate();
  await rm(homeport.data, { recursive: true });
  const start = Date.now();
  assert.match(await homeport.command('rooms', 'restore-backup'), /is restored: 25000 operations/);
  console.log(`25,000 operations came back from the bucket in ${Date.now() - start} ms`);
  await homeport.run();
  assert.deepEqual(lines(await homeport.command('rooms', 'export', 'my-app')).slice(1), before);
});

test('storage that is gone is said, and nothing is taken for a backup', async () => {
  const before = (await keys()).length;
  storage.kill('SIGSTOP');
  storage.kill('SIGKILL');
  await once(storage, 'exit');
  await assert.rejects(homeport.command('rooms', 'backup'), /the place of backups/);
  assert.ok(before > 0);
});
