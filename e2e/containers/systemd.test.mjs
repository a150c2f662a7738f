// The Debian package on a machine that systemd has booted: installed, set up as the docs say, restarted and killed while a
// page writes, restored from a backup, rebooted, removed. A minute, and one more to make the Debian: ./test.sh --containers
import assert from 'node:assert/strict';
import { execFile, execFileSync } from 'node:child_process';
import { copyFile, readdir, rm, stat } from 'node:fs/promises';
import { dirname, join, resolve } from 'node:path';
import { after, before, test } from 'node:test';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { launchChromium, openPage, servePages, until } from '../lib/browser.mjs';
import { client } from '../lib/clients.mjs';
import { ADDRESS, Machine, unable } from './machine.mjs';

const root = resolve(dirname(fileURLToPath(import.meta.url)), '../..');
const reason = process.env.HOMEPORT_CONTAINERS ? unable() : 'building the package takes minutes; ./test.sh --containers runs them';
if (reason) console.log(`systemd: skipped, ${reason}`);
const options = { skip: reason };

let machine, pages, browser, page;
before(async () => {
  if (reason) return;
  [machine, pages, browser] = [await Machine.start(), await servePages(), await launchChromium()];
});
after(async () => {
  await browser?.close();
  pages?.close();
  await machine?.stop();
});

const property = async name => machine.run('systemctl', 'show', '--property', name, '--value', 'homeport');
const count = () => page.evaluate(() => window.count());
const health = async () => JSON.parse(await machine.run('homeport', 'healthcheck'));
/** How many nodes the archive holds, as root sees it on the machine. */
const kept = async () => (await machine.run('homeport', 'rooms', 'show', 'notes', '--query', '{}')).split('\n').length;

async function eventually(what, check, patience = 30_000) {
  for (const deadline = Date.now() + patience; ; await new Promise(done => setTimeout(done, 50))) {
    const result = await check().catch(error => { what = `${what}: ${error.message}`.slice(0, 300); });
    if (result) return result;
    assert.ok(Date.now() < deadline, `nothing came of: ${what}`);
  }
}

async function open() {
  const rtc = await (await fetch(`http://${ADDRESS}:8080/client-config.json`)).json();
  const query = new URLSearchParams({ client, name: 'notes', options: JSON.stringify({ rtc }) });
  const page = await openPage(browser, `${pages.url}/pages/database.html?${query}`);
  await until(page, 'the database', () => window.loaded === true);
  return page;
}
const linked = (page, what) => until(page, what, async () => Object.values(await window.paths()).some(path => path?.port === 3479));

test('the package is built, and installs on a Debian that has nothing else', options, async () => {
  const folder = join(process.env.CARGO_TARGET_DIR ?? join(root, 'target'), 'debian');
  await rm(folder, { recursive: true, force: true });
  await promisify(execFile)(join(root, 'deploy/debian/build.sh'), ['--profile', 'dev', '--fast'], { cwd: root, maxBuffer: 1 << 28 });
  const [name] = (await readdir(folder)).filter(name => name.endsWith('.deb'));
  console.log(execFileSync('dpkg-deb', ['--info', join(folder, name)], { encoding: 'utf8' }).match(/Version.*|Depends.*/g).join('; '));
  await copyFile(join(folder, name), join(machine.tree, 'root/homeport.deb'));
  assert.match(await machine.run('dpkg', '--install', '/root/homeport.deb'), /homeport init --config \/etc\/homeport\/homeport.toml/);
  assert.equal(await machine.run('stat', '--format', '%U %a', '/var/lib/homeport'), 'homeport 700');
  for (const file of ['man1/homeport.1.gz', 'man1/homeport-check.1.gz']) await machine.run('test', '-s', `/usr/share/man/${file}`);
});

test('init says what comes next, and that is all there is to do', options, async () => {
  const said = await machine.run('homeport', 'init', '--yes', '--config', '/etc/homeport/homeport.toml', '--tls', 'none',
    '--room', 'notes', '--external-ip', ADDRESS);
  assert.match(said, /systemctl enable --now homeport/);
  assert.equal(await machine.run('stat', '--format', '%U %a', '/etc/homeport/homeport.toml'), 'root 600');
  await machine.run('systemctl', 'enable', '--now', 'homeport');
  // Started is: it answers.
  assert.equal((await health()).status, 'ok');
  const findings = JSON.parse(await machine.run('homeport', 'check', '--json'));
  assert.deepEqual(findings.filter(({ verdict }) => verdict !== 'ok').map(({ what }) => what), ['backups']);
  const process = await property('MainPID');
  assert.equal(await machine.run('stat', '--format', '%U', `/proc/${process}`), 'homeport');
  assert.equal(await machine.run('grep', 'CapBnd', `/proc/${process}/status`), 'CapBnd:\t0000000000000400', 'CAP_NET_BIND_SERVICE');
  console.log((await machine.run('systemd-analyze', 'security', '--no-pager', 'homeport')).split('\n').at(-1));
});

test('it is restarted and killed while a page writes: it comes back by itself, and nothing is lost', options, async () => {
  page = await open();
  await linked(page, 'a link with the seed');
  await page.evaluate(() => {
    window.number = 0;
    window.writing = setInterval(() => window.db.put({ number: window.number }, `node-${window.number++}`), 50);
  });
  const link = async what => {
    const start = Date.now();
    // The page may take its old link for good for a while.
    await eventually(what, async () => /^homeport_seed_links\{room="notes"\} [1-9]/m.test(await machine.run('curl', '--silent', 'http://127.0.0.1:9464/metrics')));
    console.log(`${what} after ${Date.now() - start} ms`);
  };
  await machine.run('systemctl', 'restart', 'homeport');
  await link('a link after the restart');
  await machine.run('systemctl', 'kill', '--signal', 'KILL', 'homeport');
  await eventually('systemd starts it again', async () => await property('NRestarts') === '1' && (await health()).status === 'ok');
  await link('a link after the kill');
  await page.evaluate(() => clearInterval(window.writing));
  const written = await count();
  await eventually(`${written} nodes in the archive`, async () => await kept() === written);
});

test('root restores a backup, and the service runs on it', options, async () => {
  const written = await count();
  await machine.run('mkdir', '--mode', '700', '/root/backups');
  await machine.run('homeport', 'rooms', 'backup', '--to', '/root/backups');
  await page.context().close();
  await machine.run('systemctl', 'stop', 'homeport');
  assert.equal(await property('Result'), 'success');
  await machine.run('sh', '-c', 'rm -r /var/lib/homeport/*');
  await machine.run('homeport', 'rooms', 'restore-backup', '--from', '/root/backups');
  await machine.run('systemctl', 'start', 'homeport');
  assert.equal(await kept(), written);
  page = await open();
  await until(page, 'all nodes in a new page', async wanted => await window.count() === wanted, written);
});

test('stopping waits for calls as long as turn.drain says, though the unit knows nothing of it', options, async () => {
  await machine.run('sed', '-i', 's/^\\[turn\\]/[turn]\\ndrain = 20/', '/etc/homeport/homeport.toml');
  await machine.run('systemctl', 'restart', 'homeport');
  const { turnConfig } = await (await fetch(`http://${ADDRESS}:8080/client-config.json`)).json();
  await page.evaluate(async ({ turnConfig }) => {
    window.call = new RTCPeerConnection({ iceServers: turnConfig, iceTransportPolicy: 'relay' });
    window.call.createDataChannel('call');
    await window.call.setLocalDescription();
  }, { turnConfig });
  await until(page, 'an allocation', () => window.call.localDescription.sdp.includes('typ relay'));
  const start = Date.now();
  await machine.run('systemctl', 'stop', 'homeport');
  const took = Date.now() - start;
  console.log(`stopped after ${took} ms`);
  assert.equal(await property('Result'), 'success');
  assert.ok(took > 15_000, `${took} ms: longer than the unit would wait`);
  await page.context().close();
});

test('after a reboot it is there by itself', options, async () => {
  await machine.run('systemctl', 'start', 'homeport');
  const before = await kept();
  await machine.reboot();
  await eventually('it answers', async () => (await health()).status === 'ok');
  assert.equal(await kept(), before);
  assert.equal(await machine.run('journalctl', '--quiet', '--boot', '--unit', 'homeport', '--priority', 'warning', '--no-pager'), '');
});

test('a service alone is its own unit', options, async () => {
  await machine.run('systemctl', 'disable', '--now', 'homeport');
  await machine.run('systemctl', 'start', 'homeport@turn');
  assert.equal((await health()).status, 'ok');
  await machine.run('homeport', 'check', 'turn');
  await machine.run('systemctl', 'stop', 'homeport@turn');
});

test('removed, it stops, and leaves settings and archive', options, async () => {
  await machine.run('systemctl', 'enable', '--now', 'homeport');
  await machine.run('dpkg', '--remove', 'homeport');
  await assert.rejects(fetch(`http://${ADDRESS}:8080/`), 'nothing listens');
  assert.ok((await stat(join(machine.tree, 'var/lib/homeport/archive.sqlite'))).size > 0);
  assert.ok((await stat(join(machine.tree, 'etc/homeport/homeport.toml'))).size > 0);
});
