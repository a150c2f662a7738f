// A Docker Engine of the test's own: Debian's, with its data in a folder apart, and images for where no registry can be
// reached. Needs root, docker.io and debootstrap.
import { execFile, execFileSync, spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync } from 'node:fs';
import { copyFile, cp, mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { dirname, join, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';

const run = promisify(execFile);
const here = dirname(fileURLToPath(import.meta.url));
export const root = resolve(here, '../..');
/** Images outlive a run: making them takes minutes. */
const images = process.env.HOMEPORT_ENGINE ?? '/var/tmp/homeport-engine';

/** Why there can be no engine here, or false. */
export function unable() {
  if (process.getuid() !== 0) return 'a Docker Engine of its own needs root';
  const missing = ['/usr/bin/docker', '/usr/sbin/dockerd', '/usr/sbin/debootstrap'].filter(file => !existsSync(file));
  return missing.length > 0 && `${missing.join(', ')} not found (Debian: docker.io, debootstrap)`;
}

export class Engine {
  /** One in this machine's own network, or in a namespace of its own with its data in a folder of its own. */
  static async start({ namespace, folder = images } = {}) {
    const engine = new Engine();
    engine.folder = folder;
    engine.socket = join(folder, 'docker.sock');
    engine.env = { ...process.env, DOCKER_HOST: `unix://${engine.socket}`, DOCKER_BUILDKIT: '1' };
    // Not ip netns exec, which would hide the control groups.
    engine.inside = namespace ? ['nsenter', `--net=/run/netns/${namespace}`] : [];
    await mkdir(folder, { recursive: true });
    await rm(join(folder, 'dockerd.pid'), { force: true });
    engine.rules = execFileSync(...engine.words('iptables-save'), { encoding: 'utf8' });
    engine.daemon = spawn(...engine.words('/usr/sbin/dockerd', '--data-root', join(folder, 'root'), '--exec-root', join(folder, 'exec'),
      '--pidfile', join(folder, 'dockerd.pid'), '--host', `unix://${engine.socket}`, '--exec-opt', 'native.cgroupdriver=cgroupfs',
    ), { stdio: ['ignore', 'ignore', 'pipe'] });
    let log = '';
    engine.ended = once(engine.daemon, 'exit');
    await new Promise((done, failed) => {
      engine.daemon.stderr.on('data', data => {
        log += data;
        if (/API listen on/.test(log)) done();
      });
      engine.ended.then(() => failed(new Error(`dockerd ended:\n${log.slice(-2_000)}`)));
    });
    return engine;
  }

  /** A program and its arguments, to be run in the engine's network. */
  words(...words) {
    const [program, ...rest] = [...this.inside, ...words];
    return [program, rest];
  }

  /** Debian's own docker: it builds with BuildKit and needs no plugin for that. */
  async docker(...words) {
    const { stdout } = await run('/usr/bin/docker', words, { env: this.env, cwd: root, maxBuffer: 1 << 28 });
    return stdout.trim();
  }

  async compose(words, env = {}, ...overrides) {
    const program = join(root, 'e2e/.venv/bin/docker-compose');
    const files = ['docker-compose.yml', ...overrides].flatMap(file => ['--file', join(root, file)]);
    const { stdout } = await run(program, ['--project-name', 'homeport-e2e', ...files, ...words],
      { env: { ...this.env, ...env }, cwd: root, maxBuffer: 1 << 28 });
    return stdout.trim();
  }

  /** Gets an image from a registry, or lets `make` put together what stands in for it. Returns what was done. */
  async image(name, make) {
    const has = async () => (await this.docker('images', '--quiet', name)) !== '';
    if (await has()) return `${name}: was there`;
    try {
      await run('/usr/bin/docker', ['pull', name], { env: this.env, timeout: 30_000 });
      return `${name}: from its registry`;
    } catch {
      await make.call(this, name);
      return `${name}: a stand-in, no registry can be reached`;
    }
  }

  /** What builds Homeport: Debian with a C compiler, and this machine's Rust. */
  async rust(name) {
    await this.image('debian:bookworm-slim', this.debian);
    const context = await mkdtemp(join(tmpdir(), 'homeport-image-'));
    try {
      const sysroot = execFileSync('rustc', ['--print', 'sysroot'], { cwd: root, encoding: 'utf8' }).trim();
      for (const part of ['bin', 'lib']) await cp(join(sysroot, part), join(context, part), { recursive: true });
      await copyFile('/etc/ssl/certs/ca-certificates.crt', join(context, 'ca-certificates.crt'));
      await writeFile(join(context, 'Dockerfile'), [
        'FROM debian:bookworm-slim',
        'RUN apt-get update -qq && apt-get install -y --no-install-recommends ca-certificates g++ gcc libc6-dev make perl',
        'COPY ca-certificates.crt /etc/ssl/certs/',
        'COPY bin /usr/local/bin', 'COPY lib /usr/local/lib', ''].join('\n'));
      await this.docker('build', '--quiet', '--network', 'host', '--tag', name, context);
    } finally {
      await rm(context, { recursive: true, force: true });
    }
  }

  async debian(name) {
    const tree = await mkdtemp(join(tmpdir(), 'homeport-debian-'));
    try {
      await run('/usr/sbin/debootstrap', ['--variant=minbase', 'bookworm', tree], { maxBuffer: 1 << 28 });
      const tar = spawn('tar', ['-C', tree, '-c', '.'], { stdio: ['ignore', 'pipe', 'inherit'] });
      const load = spawn('/usr/bin/docker', ['import', '-', name], { env: this.env, stdio: [tar.stdout, 'ignore', 'inherit'] });
      const [code] = await once(load, 'exit');
      if (code !== 0) throw new Error(`docker import ended with ${code}`);
    } finally {
      await rm(tree, { recursive: true, force: true });
    }
  }

  /** A program of this machine in an image, set up as what is published under that name is; `empty` is a folder without files. */
  program(path, settings) {
    return async function make(name) {
      const context = await mkdtemp(join(tmpdir(), 'homeport-image-'));
      try {
        const libraries = execFileSync('sh', ['-c', `ldd ${path} 2>/dev/null | grep -o '/[^ ]*' || true`], { encoding: 'utf8' });
        const files = [path, '/etc/ssl/certs/ca-certificates.crt', ...libraries.split('\n').filter(Boolean)];
        for (const file of files) {
          await mkdir(dirname(join(context, 'tree', file)), { recursive: true });
          await copyFile(file, join(context, 'tree', file));
        }
        await mkdir(join(context, 'empty'));
        await writeFile(join(context, 'Dockerfile'), ['FROM scratch', 'COPY tree /', ...settings, ''].join('\n'));
        await this.docker('build', '--quiet', '--tag', name, context);
      } finally {
        await rm(context, { recursive: true, force: true });
      }
    };
  }

  /** Builds Homeport as deploy/Dockerfile says. */
  async homeport() {
    console.log(await this.image('rust:1.95-bookworm', this.rust));
    await this.docker('build', '--network', 'host', '--file', 'deploy/Dockerfile', '--tag', 'homeport', '.');
  }

  async stop() {
    this.daemon.kill('SIGTERM');
    await this.ended;
    // What dockerd leaves behind: a mount, and a device and rules in its network.
    const left = join(this.folder, 'exec/netns/default');
    if (existsSync(left)) await run('umount', ['--lazy', left]).catch(error => console.log(String(error)));
    await run(...this.words('ip', 'link', 'del', 'docker0')).catch(error => console.log(String(error)));
    execFileSync(...this.words('iptables-restore'), { input: this.rules });
  }
}
