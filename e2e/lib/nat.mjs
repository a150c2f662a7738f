// A server on a public-looking address, a client behind a router, each a network namespace. Needs root, iproute2, iptables.
import { execFile, execFileSync } from 'node:child_process';
import { promisify } from 'node:util';

const run = promisify(execFile);
export const SERVER = '45.79.10.10';
const [ROUTER, INSIDE, CLIENT] = ['45.79.10.1', '10.71.1.1', '10.71.1.2'];

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

export class Lab {
  /** `masquerade` are words for iptables: `--random-fully` makes another address for each destination. */
  static async start(masquerade = []) {
    const lab = new Lab();
    const id = `${process.pid}-${Math.floor(Math.random() * 1e6)}`;
    Object.assign(lab, { server: `homeport-server-${id}`, router: `homeport-router-${id}`, client: `homeport-client-${id}` });
    const { server, router, client } = lab;
    const ip = words => run('ip', words.split(' '));
    for (const name of [server, router, client]) {
      await ip(`netns add ${name}`);
      await ip(`-n ${name} link set lo up`);
    }
    await ip(`link add wan netns ${router} type veth peer name eth0 netns ${server}`);
    await ip(`link add lan netns ${router} type veth peer name eth0 netns ${client}`);
    for (const [name, device, address] of [[server, 'eth0', SERVER], [router, 'wan', ROUTER], [router, 'lan', INSIDE], [client, 'eth0', CLIENT]]) {
      await ip(`-n ${name} addr add ${address}/24 dev ${device}`);
      await ip(`-n ${name} link set ${device} up`);
    }
    await ip(`-n ${server} route add default via ${ROUTER}`);
    await ip(`-n ${client} route add default via ${INSIDE}`);
    const inRouter = words => run('ip', ['netns', 'exec', router, ...words]);
    await inRouter(['sysctl', '-qw', 'net.ipv4.ip_forward=1']);
    await inRouter(['iptables', '-t', 'nat', '-A', 'POSTROUTING', '-o', 'wan', '-j', 'MASQUERADE', ...masquerade]);
    // As routers at home do with what nobody has asked for.
    await inRouter(['iptables', '-A', 'INPUT', '-i', 'wan', '-p', 'udp', '-j', 'DROP']);
    return lab;
  }

  async stop() {
    for (const name of [this.server, this.router, this.client]) await run('ip', ['netns', 'del', name]);
  }
}
