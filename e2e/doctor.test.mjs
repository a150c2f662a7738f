// `homeport init`, then `homeport check`, on a machine of their own with a public-looking address: all is well; and then with
// one thing broken after the other, each of which is named, and nothing else.
import assert from 'node:assert/strict';
import { execFile, spawn } from 'node:child_process';
import { mkdir, mkdtemp, open, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { once } from 'node:events';
import { after, before, test } from 'node:test';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { binary } from './lib/homeport.mjs';
import { unable } from './nat/lab.mjs';

const run = promisify(execFile);
const [HOST, ADDRESS, ELSEWHERE] = ['relay.homeport.test', '45.79.10.10', '45.79.10.99'];
const httpProxy = join(dirname(fileURLToPath(import.meta.url)), 'lib', 'http-proxy.mjs');
const namespace = `homeport-doctor-${process.pid}`;
const reason = unable();
if (reason) console.log(`homeport check on a machine of its own: skipped, ${reason}`);

let folder, homeport, summary;
const file = name => join(folder, name);
/** Runs a command on that machine. */
const there = (...words) => run('ip', ['netns', 'exec', namespace, ...words], { cwd: folder, env: { ...process.env, SSL_CERT_FILE: file('ca.pem') } });
const hosts = address => writeFile(`/etc/netns/${namespace}/hosts`, `127.0.0.1 localhost\n${address ? `${address} ${HOST}\n` : ''}`);

/** A certificate of the test's own authority, in the files of the settings. */
async function certify(name, ...days) {
  await run('openssl', ['req', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:prime256v1', '-nodes', '-keyout', file('new.key'),
    '-out', file('new.csr'), '-subj', `/CN=${name}`]);
  await writeFile(file('ext'), `subjectAltName=DNS:${name}\n`);
  await run('openssl', ['x509', '-req', '-in', file('new.csr'), '-CA', file('ca.pem'), '-CAkey', file('ca.key'), '-CAcreateserial',
    ...days, '-extfile', file('ext'), '-out', file('new.pem')]);
  await run('mv', [file('new.key'), file('key.pem')]);
  await run('mv', [file('new.pem'), file('cert.pem')]);
}

async function start() {
  homeport = spawn('ip', ['netns', 'exec', namespace, binary, 'up'], { cwd: folder, stdio: ['ignore', 'pipe', 'pipe'] });
  summary = '';
  homeport.stderr.on('data', data => { summary += data; });
  for await (const data of homeport.stdout) {
    summary += data;
    if (/gdb\(/.test(summary)) break;
  }
  assert.match(summary, /Homeport is up/, summary);
}

async function stop() {
  const ended = once(homeport, 'exit');
  homeport.kill('SIGTERM');
  await ended;
}

/** What the doctor finds: the name of each failure, and all that it says. */
async function check(prefix = []) {
  const { stdout, code } = await there(...prefix, binary, 'check', '--json').then(
    ({ stdout }) => ({ stdout, code: 0 }), error => ({ stdout: error.stdout, code: error.code }));
  const findings = JSON.parse(stdout);
  const failures = findings.filter(({ verdict }) => verdict === 'failure');
  assert.equal(code, failures.length > 0 ? 1 : 0);
  assert.ok(failures.every(({ advice }) => advice), 'each says what to do');
  return { findings, failures: failures.map(({ what }) => what) };
}

before(async () => {
  if (reason) return;
  folder = await mkdtemp(join(tmpdir(), 'homeport-doctor-'));
  await mkdir(`/etc/netns/${namespace}`, { recursive: true });
  await hosts(ADDRESS);
  // Nobody answers there, at once.
  await writeFile(`/etc/netns/${namespace}/resolv.conf`, 'nameserver 127.0.0.1\noptions timeout:1 attempts:1\n');
  await run('ip', ['netns', 'add', namespace]);
  for (const words of ['link set lo up', 'link add eth0 type veth peer name outside',
    'link set outside up', `addr add ${ADDRESS}/24 dev eth0`, 'link set eth0 up', 'route add default dev eth0']) {
    await run('ip', ['-n', namespace, ...words.split(' ')]);
  }
  // The doctor's own sockets are not to have ports that a test closes.
  await there('sysctl', '-qw', 'net.ipv4.ip_local_port_range=20000 40000');
  await run('openssl', ['req', '-x509', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:prime256v1', '-nodes', '-days', '90',
    '-keyout', file('ca.key'), '-out', file('ca.pem'), '-subj', '/CN=The test’s own authority']);
  await certify(HOST, '-days', '60');
  const { stdout } = await there(binary, 'init', '--domain', HOST, '--room', 'notes', '--tls', 'files',
    '--cert', file('cert.pem'), '--key', file('key.pem'), '--external-ip', ADDRESS);
  assert.match(stdout, /UDP +49152-65535/);
  await start();
});

after(async () => {
  if (reason) return;
  if (homeport?.exitCode === null) await stop();
  await run('ip', ['netns', 'del', namespace]);
  await rm(`/etc/netns/${namespace}`, { recursive: true, force: true });
  await rm(folder, { recursive: true, force: true });
});

const options = { skip: reason };

test('what init writes works, and the doctor says so', options, async () => {
  const { findings, failures } = await check();
  assert.deepEqual(failures, []);
  const bad = findings.filter(({ verdict, what }) => verdict !== 'ok' && what !== 'backups');
  assert.deepEqual(bad, []);
  for (const what of [`name ${HOST}`, 'relay, from here', `relay, as wss://${HOST}`, 'certificate of the relay', 'certificate of TURN',
    'TURN over UDP', 'TURN over TCP', 'TURN over TLS', "TURN over TLS, at the relay's port", 'link with the seed', 'disk', 'clock', 'archive']) {
    assert.ok(findings.some(finding => finding.what === what && finding.verdict === 'ok'), `${what} in ${JSON.stringify(findings)}`);
  }
  assert.ok(!JSON.stringify(findings).includes((await readFile(file('homeport.toml'), 'utf8')).match(/secret = "(.*)"/)[1]), 'no secrets');
  const again = await there(binary, 'init');
  assert.match(again.stdout, /nothing was changed/);
});

/** Closes ports for what comes in, for as long as `then` takes. */
async function closed(protocol, ports, then) {
  const rule = ['INPUT', '-d', ADDRESS, '-p', protocol, '--dport', ports, '-j', 'DROP'];
  await there('iptables', '-I', ...rule);
  try {
    await then();
  } finally {
    await there('iptables', '-D', ...rule);
  }
}

for (const [what, protocol, ports, expected] of [
  ['the port of the relay', 'tcp', '443', [`relay, as wss://${HOST}`]],
  ['the UDP port of TURN', 'udp', '3478', ['TURN over UDP']],
  ['the TCP port of TURN', 'tcp', '3478', ['TURN over TCP']],
  ['the port of TURN over TLS', 'tcp', '5349', ['TURN over TLS']],
  ['the ports of relayed traffic', 'udp', '49152:65535', ['TURN over UDP', 'TURN over TCP', 'TURN over TLS']],
  ['the port of the seed', 'udp', '3479', ['link with the seed']],
]) {
  test(`${what}, closed in the firewall, is named`, options, () => closed(protocol, ports, async () => {
    const { findings, failures } = await check();
    assert.deepEqual(failures, expected);
    const { found, advice } = findings.find(({ what }) => what === expected[0]);
    assert.match(`${found} ${advice}`, /firewall/);
  }));
}

test('what speaks HTTP alone before the relay, so that TURN at its port does not get through, is named', options, async () => {
  const proxy = spawn('ip', ['netns', 'exec', namespace, process.execPath, httpProxy, file('cert.pem'), file('key.pem'), '8443', '443'],
    { stdio: ['ignore', 'pipe', 'inherit'] });
  const ended = once(proxy, 'exit');
  const rule = ['OUTPUT', '-d', ADDRESS, '-p', 'tcp', '--dport', '443', '-j', 'REDIRECT', '--to-ports', '8443'];
  try {
    await once(proxy.stdout, 'data');
    await there('iptables', '-t', 'nat', '-I', ...rule);
    try {
      const { findings, failures } = await check();
      assert.deepEqual(failures, ["TURN over TLS, at the relay's port"]);
      assert.match(findings.find(({ what }) => what === failures[0]).advice, /HTTP alone.*turn\.host/);
    } finally {
      await there('iptables', '-t', 'nat', '-D', ...rule);
    }
  } finally {
    proxy.kill();
    await ended;
  }
});

test('a name that leads nowhere, or elsewhere, is named', options, async () => {
  try {
    await hosts(ELSEWHERE);
    const { findings, failures } = await check();
    assert.ok(failures.includes(`name ${HOST}`));
    assert.match(findings.find(({ what }) => what === `name ${HOST}`).found, new RegExp(ELSEWHERE));
    await hosts();
    assert.ok((await check()).failures.includes(`name ${HOST}`));
  } finally {
    await hosts(ADDRESS);
  }
});

test('a certificate for another name, and one that has expired, are named', options, async () => {
  const names = ['certificate of the relay', 'certificate of TURN'];
  /** The services have another certificate; returns what fails. They would take it by themselves, within half a minute. */
  const become = async wanted => {
    await stop();
    await start();
    const { findings, failures } = await check();
    for (const { what, found } of findings) if (names.includes(what)) assert.match(found, wanted);
    return failures;
  };
  await certify('other.homeport.test', '-days', '60');
  // A browser would not connect either, nor does the doctor.
  assert.deepEqual(await become(/^it is for other\.homeport\.test/), [`relay, as wss://${HOST}`, ...names]);
  await certify(HOST, '-not_before', '20200101000000Z', '-not_after', '20200201000000Z').catch(() => certify(HOST, '-days', '-1'));
  assert.deepEqual(await become(/expired/), [`relay, as wss://${HOST}`, ...names]);
  await certify(HOST, '-days', '5');
  assert.deepEqual(await become(/ends in [45] days/), []);
  await certify(HOST, '-days', '60');
  assert.deepEqual(await become(/good for (59|60) days/), []);
});

test('too few file descriptors are named', options, async () => {
  assert.deepEqual((await check(['prlimit', '--nofile=1024:1024'])).failures, ['file descriptors']);
});

test('services that do not run, a full disk, a clock that is years behind, and a damaged archive are named', options, async () => {
  await stop();
  const { failures } = await check();
  assert.ok(failures.includes('relay, from here') && failures.includes('TURN over UDP') && failures.includes('link with the seed'));
  await run('touch', ['-d', '2040-01-01', file('homeport-data/archive.sqlite')]);
  assert.ok((await check()).failures.includes('clock'));
  await run('touch', [file('homeport-data/archive.sqlite')]);
  const archive = await open(file('homeport-data/archive.sqlite'), 'r+');
  await archive.write(Buffer.alloc(4096, 0x5a), 0, 4096, 4096);
  await archive.close();
  assert.ok((await check()).failures.includes('archive'));
  const data = file('full');
  await mkdir(data);
  await run('mount', ['-t', 'tmpfs', '-o', 'size=16m', 'none', data]);
  try {
    await writeFile(file('small.toml'), `[seed]\ndata = "${data}"\n`);
    const { stdout } = await there(binary, 'check', '--offline', '--json', '--config', file('small.toml')).catch(error => error);
    assert.deepEqual(JSON.parse(stdout).filter(({ verdict }) => verdict === 'failure').map(({ what }) => what), ['disk']);
  } finally {
    await run('umount', [data]);
  }
});
