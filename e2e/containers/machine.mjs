// A Debian machine of the test's own, booted by systemd, at a public-looking address: debootstrap's tree in a container of
// systemd-nspawn. Needs root, debootstrap and systemd-container.
import { execFile, execFileSync, spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync } from 'node:fs';
import { chmod, mkdir, mkdtemp, readFile, rename, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { promisify } from 'node:util';

const run = promisify(execFile);
/** What debootstrap makes outlives a run: it takes a minute. */
const folder = process.env.HOMEPORT_MACHINE ?? '/var/tmp/homeport-machine';
const packages = 'ca-certificates,curl,dbus,iproute2,systemd,systemd-sysv';

/** The machine's address, and that of the network it is in. */
export const ADDRESS = '45.79.11.2';
const GATEWAY = '45.79.11.1';
/** What systemd-nspawn ends with when the machine wants to be started again. */
const REBOOT = 133;

/** Why there can be no such machine here, or false. */
export function unable() {
  if (process.getuid() !== 0) return 'a machine of its own needs root';
  const missing = ['/usr/bin/systemd-nspawn', '/usr/sbin/debootstrap'].filter(file => !existsSync(file));
  if (missing.length > 0) return `${missing.join(', ')} not found (Debian: systemd-container, debootstrap)`;
  try {
    execFileSync('cargo', ['deb', '--version']);
    return false;
  } catch {
    return 'there is no cargo-deb (cargo install --locked cargo-deb@3.8.0)';
  }
}

export class Machine {
  static async start() {
    const machine = new Machine();
    machine.name = `homeport-${process.pid}`;
    machine.folder = await mkdtemp(join(tmpdir(), 'homeport-machine-'));
    machine.tree = join(machine.folder, 'tree');
    await debian();
    await run('cp', ['--archive', '--reflink=auto', join(folder, 'debian'), machine.tree]);
    await machine.#connect();
    try {
      await machine.#boot();
    } catch (error) {
      await machine.stop();
      throw error;
    }
    return machine;
  }

  /** Switches it on, and waits until systemd has started all that it starts by itself. */
  async #boot() {
    this.process = spawn('systemd-nspawn', ['--quiet', '--register=no', '--keep-unit', '--boot', '--console=pipe',
      `--directory=${this.tree}`, `--machine=${this.name}`, '--hostname=vm', '--resolv-conf=off',
      `--network-namespace-path=/run/netns/${this.name}`,
    ], { stdio: ['ignore', 'pipe', 'pipe'] });
    let log = '';
    for (const stream of [this.process.stdout, this.process.stderr]) stream.on('data', data => { log += data; });
    this.ended = once(this.process, 'exit');
    for (const deadline = Date.now() + 60_000; ; await new Promise(done => setTimeout(done, 50))) {
      if (this.process.exitCode !== null) throw new Error(`systemd-nspawn ended:\n${log}`);
      // Before its socket is there, systemctl cannot wait.
      const state = await this.#init()
        && await this.run('timeout', '60', 'systemctl', 'is-system-running', '--wait').catch(({ stdout }) => stdout?.trim());
      if (state === 'running') return;
      if (state === 'degraded') throw new Error(await this.run('systemctl', '--failed', '--no-pager'));
      if (Date.now() > deadline) throw new Error(`the machine does not come up: ${state}`);
    }
  }

  /** A network of the machine's own, with this one on the other side. */
  async #connect() {
    const ip = words => run('ip', words.split(' '));
    const { name } = this;
    await ip(`netns add ${name}`);
    await ip(`link add hp-machine type veth peer name eth0 netns ${name}`);
    await ip(`addr add ${GATEWAY}/30 dev hp-machine`);
    await ip('link set hp-machine up');
    await ip(`-n ${name} link set lo up`);
    await ip(`-n ${name} addr add ${ADDRESS}/30 dev eth0`);
    await ip(`-n ${name} link set eth0 up`);
    await ip(`-n ${name} route add default via ${GATEWAY}`);
  }

  /** The first process inside, as it is called outside. */
  async #init() {
    const children = await readFile(`/proc/${this.process.pid}/task/${this.process.pid}/children`, 'utf8');
    return children.trim().split(' ')[0];
  }

  /** Runs a program inside; returns what it prints, or fails with that. */
  async run(...words) {
    const { stdout } = await run('nsenter', ['--target', await this.#init(), '--mount', '--uts', '--ipc', '--net', '--pid', '--cgroup',
      'env', '--ignore-environment', 'HOME=/root', 'PATH=/usr/sbin:/usr/bin:/sbin:/bin', ...words], { cwd: '/', maxBuffer: 1 << 28 });
    return stdout.trim();
  }

  async reboot() {
    // It may be gone before it answers.
    await this.run('systemctl', 'reboot').catch(() => {});
    const [code] = await this.ended;
    if (code !== REBOOT) throw new Error(`systemd-nspawn ended with ${code} instead of a reboot`);
    await this.#boot();
  }

  async stop() {
    this.process.kill('SIGTERM');
    await this.ended;
    await run('ip', ['link', 'del', 'hp-machine']);
    await run('ip', ['netns', 'del', this.name]);
    await rm(this.folder, { recursive: true, force: true });
  }
}

/** A small Debian with systemd, made once. */
async function debian() {
  const tree = join(folder, 'debian');
  if (existsSync(tree)) return;
  await mkdir(folder, { recursive: true });
  const begun = await mkdtemp(join(folder, 'begun-'));
  await run('/usr/sbin/debootstrap', ['--variant=minbase', `--include=${packages}`, 'bookworm', begun], { maxBuffer: 1 << 28 });
  // Or nobody but root could look into it, from inside.
  await chmod(begun, 0o755);
  await rename(begun, tree);
}
