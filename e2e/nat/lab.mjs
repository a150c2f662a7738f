// A server with public-looking addresses, and clients behind routers of their own: each a network namespace. Needs root,
// iproute2, iptables and conntrack.
import { execFile, execFileSync, spawn } from 'node:child_process';
import { once } from 'node:events';
import { chmod, mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { binary, TURN_USER } from '../lib/homeport.mjs';

const run = promisify(execFile);
const here = dirname(fileURLToPath(import.meta.url));

/** The server's address: one, with relay and TURN over TLS both on port 443. */
export const SERVER = '45.79.10.10';
const SERVER_V6 = '2a01:4f8:10::10';

/**
 * What a router does to the client behind it. `v4`, `v6`: which addresses the client has; `keeps`: whether one port of
 * the client is one port outside, whomever it talks to; `lets`: what else comes in or goes out.
 */
export const KINDS = {
  'full cone': { v4: true, keeps: true, takes: 'all' },
  'port-restricted': { v4: true, keeps: true },
  symmetric: { v4: true, keeps: false },
  'UDP blocked': { v4: true, keeps: false, lets: 'tcp' },
  'only TCP 443 out': { v4: true, keeps: false, lets: '443' },
  'IPv6 only': { v6: true, keeps: true },
  'dual stack': { v4: true, v6: true, keeps: true },
};

/** Why there can be no namespaces here, or false. */
export function unable() {
  if (process.getuid() !== 0) return 'network namespaces need root';
  try {
    execFileSync('ip', ['netns', 'list']);
    execFileSync('iptables', ['--version']);
    return false;
  } catch (error) {
    return `ip or iptables cannot be used: ${error.message}`;
  }
}

/** A client and the router before it. */
class Site {
  constructor(lab, index) {
    this.lab = lab;
    this.router = `${lab.id}-router-${index}`;
    this.client = `${lab.id}-client-${index}`;
    this.wan = { v4: `45.79.10.${20 + index}`, v6: `2a01:4f8:10::${20 + index}` };
    this.inside = { v4: `10.71.${index}.1`, v6: `2a01:4f8:${20 + index}::1` };
    this.address = { v4: `10.71.${index}.2`, v6: `2a01:4f8:${20 + index}::2` };
    this.network6 = `2a01:4f8:${20 + index}::/64`;
  }

  async start(kind, index) {
    const { lab, router, client } = this;
    const { v4, v6 } = KINDS[kind];
    await lab.namespace(router);
    await lab.namespace(client);
    await ip(`link add wan netns ${router} type veth peer name site${index} netns ${lab.server}`);
    await ip(`-n ${lab.server} link set site${index} master internet up`);
    await ip(`link add lan netns ${router} type veth peer name eth0 netns ${client}`);
    await lab.address(router, 'wan', this.wan.v4, this.wan.v6);
    await lab.address(router, 'lan', v4 && this.inside.v4, v6 && this.inside.v6);
    await lab.address(client, 'eth0', v4 && this.address.v4, v6 && this.address.v6);
    if (v4) await ip(`-n ${client} route add default via ${this.inside.v4}`);
    if (v6) {
      await ip(`-n ${client} -6 route add default via ${this.inside.v6}`);
      await ip(`-n ${lab.server} -6 route add ${this.network6} via ${this.wan.v6}`);
      await ip(`-n ${router} -6 route add default via ${SERVER_V6}`);
    }
    await ip(`-n ${router} route add default via ${SERVER}`);
    await run('ip', ['netns', 'exec', router, 'sysctl', '-qw', 'net.ipv4.ip_forward=1', 'net.ipv6.conf.all.forwarding=1']);
    await this.become(kind);
    await this.settled();
  }

  /**
   * The kernel gives a device its link-local address a second or two after it is up. A browser takes that for a change of
   * networks and drops what it is loading (`ERR_NETWORK_CHANGED`): none may start before.
   */
  async settled() {
    const deadline = Date.now() + 10_000;
    for (;;) {
      const { stdout } = await ip(`-n ${this.client} -j addr show dev eth0`);
      const [{ operstate, addr_info: addresses }] = JSON.parse(stdout);
      if (operstate === 'UP' && addresses.some(({ scope, tentative }) => scope === 'link' && !tentative)) return;
      if (Date.now() > deadline) throw new Error(`the client's network does not come up: ${stdout}`);
      await new Promise(done => setTimeout(done, 20));
    }
  }

  /** Sets the router up as of another kind, of the same address families, and forgets what it knew of connections. */
  async become(kind) {
    this.kind = kind;
    const { keeps, takes, lets } = KINDS[kind];
    const [tables, tables6] = ['iptables', 'ip6tables'].map(command => async words => {
      await run('ip', ['netns', 'exec', this.router, command, '-w', ...words.split(' ')]);
    });
    for (const table of ['nat', 'filter']) await tables(`-t ${table} -F`);
    await tables6('-t filter -F');
    await tables(`-t nat -A POSTROUTING -o wan -j MASQUERADE${keeps ? '' : ' --random-fully'}`);
    // As routers at home do with what nobody has asked for.
    await tables('-A INPUT -i wan -m conntrack --ctstate NEW,INVALID -j DROP');
    if (takes === 'all') await tables(`-t nat -A PREROUTING -i wan -j DNAT --to-destination ${this.address.v4}`);
    else await tables('-A FORWARD -i wan -m conntrack --ctstate NEW,INVALID -j DROP');
    await tables6('-A FORWARD -i wan -m conntrack --ctstate NEW,INVALID -j DROP');
    if (lets === 'tcp') await tables('-A FORWARD -p udp -j REJECT');
    if (lets === '443') {
      await tables('-A FORWARD -i lan -p tcp --dport 443 -j ACCEPT');
      await tables('-A FORWARD -i lan -j DROP');
    }
    await this.rebind();
  }

  /** From now on loses a share of all packets: 1 is a cable that is cut, 0 none. */
  async lose(share) {
    const rule = share === 1 ? ['-j', 'DROP'] : ['-m', 'statistic', '--mode', 'random', '--probability', `${share}`, '-j', 'DROP'];
    for (const command of ['iptables', 'ip6tables']) {
      const tables = words => run('ip', ['netns', 'exec', this.router, command, '-w', '-t', 'mangle', ...words]);
      await tables(['-F', 'FORWARD']);
      if (share > 0) await tables(['-A', 'FORWARD', ...rule]);
    }
  }

  /** From now on holds up what leaves the client's network over IPv4 for so many milliseconds; 0 does not. */
  async delay(ms) {
    const router = words => run('ip', ['netns', 'exec', this.router, ...words.split(' ')]);
    // What is held up comes back by another device; only then may its connection be tracked, and its address changed.
    const untracked = how => router(`iptables -w -t raw -${how} PREROUTING -i lan -j NOTRACK`);
    if (this.holding) {
      await untracked('D');
      await router('ip rule del iif lan lookup 100');
      this.holding.child.kill('SIGTERM');
      await this.holding.ended;
      this.holding = undefined;
    }
    if (ms > 0) {
      this.holding = await this.lab.spawn(this.router, ['python3', join(here, 'delay.py'), 'held', `${ms}`], /ready/);
      await router('ip link set held up');
      await router('sysctl -qw net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.held.rp_filter=0 net.ipv4.conf.lan.rp_filter=0');
      await router('ip route replace default dev held table 100');
      await router('ip rule add iif lan lookup 100');
      await untracked('A');
    }
  }

  /** The client gets another IPv4 address, as one that goes from one network to another. */
  async move() {
    const before = this.address.v4;
    this.address.v4 = before.endsWith('.2') ? before.replace(/2$/, '3') : before.replace(/3$/, '2');
    await ip(`-n ${this.client} addr del ${before}/24 dev eth0`);
    await ip(`-n ${this.client} addr add ${this.address.v4}/24 dev eth0`);
    await ip(`-n ${this.client} route add default via ${this.inside.v4}`);
    await this.become(this.kind);
  }

  /** Forgets every mapping, as a router does that was switched off and on. */
  async rebind() {
    // It says how many it has forgotten as if that were an error.
    await run('ip', ['netns', 'exec', this.router, 'conntrack', '-F']);
  }

  /**
   * What an app is given here: by address, over TLS where that is the only way out. (By name Chromium does not find STUN
   * servers here: for UDP it asks a resolver that these networks do not have.)
   */
  rtc({ turn = true } = {}) {
    const host = KINDS[this.kind].v4 ? SERVER : `[${SERVER_V6}]`;
    const uris = [`turn:${host}:3478?transport=udp`, `turn:${host}:3478?transport=tcp`, `turns:${host}:443?transport=tcp`];
    return {
      relayUrls: [`wss://${host}`],
      turnConfig: [{ urls: `stun:${host}:3478` }, ...(turn ? [{ urls: uris, ...TURN_USER }] : [])],
    };
  }

  /** A program that runs the browser named by its path, for what starts browsers, in the client's network. */
  async browser(path) {
    const file = join(this.lab.folder, `${this.client}-${path.split('/').pop()}`);
    await writeFile(file, `#!/bin/sh\nexec ip netns exec ${this.client} ${path} "$@"\n`);
    await chmod(file, 0o755);
    return file;
  }
}

/** A machine on the internet, beside the server. */
class Host {
  constructor(lab, index) {
    Object.assign(this, { lab, namespace: `${lab.id}-host-${index}`, address: `45.79.10.${11 + index}`, device: `host${index}` });
  }

  async start() {
    const { lab, namespace, address, device } = this;
    await lab.namespace(namespace);
    await ip(`link add eth0 netns ${namespace} type veth peer name ${device} netns ${lab.server}`);
    await ip(`-n ${lab.server} link set ${device} master internet up`);
    await lab.address(namespace, 'eth0', address);
    // To whoever is behind a router without addresses of its own.
    await ip(`-n ${namespace} route add default via ${SERVER}`);
  }

  /** Takes the cable out, or puts it in again. */
  async plug(isIn) {
    await ip(`-n ${this.lab.server} link set ${this.device} ${isIn ? 'up' : 'down'}`);
  }
}

const ip = words => run('ip', words.split(' '));

export class Lab {
  #sites = [];
  #hosts = [];
  #processes = [];

  static async start() {
    const lab = new Lab();
    lab.id = `homeport-${process.pid}-${Math.floor(Math.random() * 1e6)}`;
    lab.folder = await mkdtemp(join(tmpdir(), 'homeport-nat-'));
    lab.server = `${lab.id}-server`;
    await lab.namespace(lab.server);
    await ip(`-n ${lab.server} link add internet type bridge`);
    await lab.address(lab.server, 'internet', SERVER, SERVER_V6);
    // Between sites, as on the internet: through the server's host, which is a bridge to them.
    await run('ip', ['netns', 'exec', lab.server, 'sysctl', '-qw', 'net.ipv6.conf.all.forwarding=1']);
    return lab;
  }

  async namespace(name) {
    await ip(`netns add ${name}`);
    // Nobody else can have an address here: there is no need to wait for who objects.
    await run('ip', ['netns', 'exec', name, 'sysctl', '-qw', 'net.ipv6.conf.default.accept_dad=0', 'net.ipv6.conf.all.accept_dad=0']);
    await ip(`-n ${name} link set lo up`);
  }

  async address(namespace, device, v4, v6) {
    if (v4) await ip(`-n ${namespace} addr add ${v4}/24 dev ${device}`);
    if (v6) await ip(`-n ${namespace} addr add ${v6}/64 dev ${device} nodad`);
    await ip(`-n ${namespace} link set ${device} up`);
  }

  /** One more client, behind a router of a kind. */
  async site(kind) {
    const index = this.#sites.length + 1;
    const site = new Site(this, index);
    this.#sites.push(site);
    await site.start(kind, index);
    return site;
  }

  /** One more machine on the internet. */
  async host() {
    const host = new Host(this, this.#hosts.length + 1);
    this.#hosts.push(host);
    await host.start();
    return host;
  }

  /** Starts a program in a namespace, and waits until it prints what matches `ready`. */
  async spawn(namespace, words, ready, env = {}) {
    const child = spawn('ip', ['netns', 'exec', namespace, ...words], {
      cwd: this.folder, env: { ...process.env, ...env }, stdio: ['ignore', 'pipe', 'pipe'],
    });
    const program = { child, ended: once(child, 'exit'), output: '' };
    this.#processes.push(program);
    const found = new Promise((done, failed) => {
      const hear = data => {
        program.output += data;
        const match = ready.exec(program.output);
        if (match) done(match);
      };
      child.stdout.on('data', hear);
      child.stderr.on('data', hear);
      program.ended.then(([code]) => failed(new Error(`${words[0]} ended with ${code}:\n${program.output}`)));
    });
    program.ready = await found;
    return program;
  }

  /** Homeport on the server, with a certificate that nobody knows. */
  async homeport(env = {}) {
    const [cert, key] = ['cert.pem', 'key.pem'].map(name => join(this.folder, name));
    await run('openssl', ['req', '-x509', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:prime256v1', '-nodes', '-days', '2',
      '-keyout', key, '-out', cert, '-subj', '/CN=homeport', '-addext', `subjectAltName=IP:${SERVER}`]);
    return this.spawn(this.server, [binary, 'up', '--room', 'notes', '--data', join(this.folder, 'data')], /gdb\(/, {
      HOMEPORT_RELAY__LISTEN: '[::]:443', HOMEPORT_TLS__CERT: cert, HOMEPORT_TLS__KEY: key,
      HOMEPORT_TURN__USERS: `{${TURN_USER.username}="${TURN_USER.credential}"}`, ...env,
    });
  }

  async stop() {
    for (const { child, ended } of this.#processes) {
      if (child.exitCode === null && child.signalCode === null) child.kill('SIGTERM');
      await ended;
    }
    for (const { router, client } of this.#sites) for (const name of [router, client]) await ip(`netns del ${name}`);
    for (const { namespace } of this.#hosts) await ip(`netns del ${namespace}`);
    await ip(`netns del ${this.server}`);
    await rm(this.folder, { recursive: true, force: true });
  }
}
