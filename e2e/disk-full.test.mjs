// A disk that fills up under a running seed: it stays, says so, and catches up when there is space again.
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { mkdtemp, open, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import { launchChromium, openPage, servePages, until } from './lib/browser.mjs';
import { Homeport } from './lib/homeport.mjs';

// A small disk of our own needs the right to mount one.
function mountSmallDisk(folder) {
  try {
    execFileSync('mount', ['-t', 'tmpfs', '-o', 'size=4m', 'tmpfs', folder], { stdio: 'pipe' });
    return undefined;
  } catch (error) {
    return `cannot mount a small disk here: ${String(error.stderr ?? error).trim()}`;
  }
}

const disk = await mkdtemp(join(tmpdir(), 'homeport-disk-'));
const skip = mountSmallDisk(disk);
if (skip) console.log(`a full disk: skipped, ${skip}`);

let homeport, pages, browser;
before(async () => {
  if (skip) return;
  pages = await servePages();
  browser = await launchChromium();
  homeport = await Homeport.start({ rooms: ['notes'], data: disk });
});
after(async () => {
  await browser?.close();
  pages?.close();
  await homeport?.stop();
  if (!skip) execFileSync('umount', [disk]);
  await rm(disk, { recursive: true, force: true });
});

async function openDatabase() {
  const query = new URLSearchParams({
    client: '/pages/wire-client.mjs', name: 'notes', options: JSON.stringify({ rtc: homeport.rtc }),
  });
  const page = await openPage(browser, `${pages.url}/pages/database.html?${query}`);
  await until(page, 'the database', () => window.loaded === true);
  return page;
}

async function eventually(what, check) {
  const deadline = Date.now() + 30_000;
  for (;;) {
    const answer = await check();
    if (answer) return answer;
    assert.ok(Date.now() < deadline, `nothing came of: ${what}\n${homeport.log}`);
    await new Promise(done => setTimeout(done, 50));
  }
}

const ready = async () => (await fetch(`${homeport.metricsUrl}/readyz`)).json();

test('a full disk is said in health and metrics, and nothing is lost once there is space again', { skip }, async () => {
  const page = await openDatabase();
  await page.evaluate(() => window.db.put({ before: true }, 'before'));
  await eventually('the first node', async () => await homeport.metric('homeport_seed_nodes') === 1);

  const filler = await open(join(disk, 'filler'), 'w');
  let written = 0;
  for (;;) {
    const result = await filler.write(Buffer.alloc(4096)).catch(error => {
      assert.equal(error.code, 'ENOSPC');
      return undefined;
    });
    if (!result) break;
    written += result.bytesWritten;
  }
  await filler.close();
  assert.ok(written > 0);

  await page.evaluate(async () => {
    for (let index = 0; index < 100; index++) await window.db.put({ index, text: 'x'.repeat(1000) }, `n${index}`);
  });
  const report = await eventually('degraded health', async () => {
    const report = await ready();
    return report.status === 'degraded' && report;
  });
  assert.match(report.parts.archive.reason, /full/);
  assert.ok((await fetch(`${homeport.metricsUrl}/healthz`)).ok, 'it lives, all the same');
  await eventually('tries that fail', async () => await homeport.metric('homeport_seed_archive_failures_total') >= 2);
  assert.match(homeport.log, /the archive cannot write/);

  await rm(join(disk, 'filler'));
  await eventually('good health', async () => (await ready()).status === 'ok');
  await eventually('every node', async () => await homeport.metric('homeport_seed_nodes') === 101);
  const expected = await page.evaluate(() => window.nodes());
  await page.context().close();
  await homeport.kill();
  await homeport.run();
  const fresh = await openDatabase();
  await until(fresh, 'what was written to a full disk', async () => await window.count() === 101);
  assert.deepEqual(await fresh.evaluate(() => window.nodes()), expected);
});
