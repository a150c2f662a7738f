// A browser client of the GenosDB wire, written from the wire notes alone: what CI drives where GenosDB itself
// cannot be had. It has the part of GenosDB's interface that the tests use (gdb, put, get, link, remove, map), runs on
// the browser's own WebRTC, and shares no code with Homeport.
import { schnorr } from '@noble/secp256k1';
import { Cells } from './cells.mjs';
import { Security } from './security.mjs';

const utf8 = new TextEncoder();
const text = new TextDecoder('utf-8', { fatal: true });
/** With more bytes in a channel's buffer than this, whoever sends waits. */
const FULL = 65535;
const hex = bytes => [...bytes].map(byte => byte.toString(16).padStart(2, '0')).join('');
const digest = async (name, value) => new Uint8Array(await crypto.subtle.digest(name, utf8.encode(value)));
const newer = (one, other) =>
  !other || one.physical > other.physical || (one.physical === other.physical && one.logical > other.logical);

async function topicOf(plain) {
  const topic = [...await digest('SHA-1', plain)].map(byte => byte.toString(36)).join('');
  const sum = [...topic].reduce((total, character) => total + character.charCodeAt(0), 0);
  return { topic, kind: 20000 + (sum % 10000) };
}

const transform = async (bytes, stream) =>
  new Uint8Array(await new Response(new Blob([bytes]).stream().pipeThrough(stream)).arrayBuffer());

class Sealer {
  static async of(password, room) {
    const sealer = new Sealer();
    const raw = await digest('SHA-256', `${password}:1234:${room}`);
    sealer.key = await crypto.subtle.importKey('raw', raw, 'AES-GCM', false, ['encrypt', 'decrypt']);
    return sealer;
  }
  async seal(sdp) {
    const iv = crypto.getRandomValues(new Uint8Array(12));
    const sealed = new Uint8Array(await crypto.subtle.encrypt({ name: 'AES-GCM', iv }, this.key, utf8.encode(sdp)));
    return `${[...iv].join(',')}$${btoa(String.fromCharCode(...sealed))}`;
  }
  async open(sealed) {
    const [iv, body] = sealed.split('$');
    const bytes = Uint8Array.from(atob(body), character => character.charCodeAt(0));
    const opened = await crypto.subtle.decrypt(
      { name: 'AES-GCM', iv: Uint8Array.from(iv.split(',').map(Number)) }, this.key, bytes);
    return text.decode(opened);
  }
}

/** All relays as one: what is published goes to each, what comes from several is heard once. They are reached again when lost. */
class Relays {
  constructor(urls) {
    this.subscriptions = new Map();
    this.heard = new Set();
    const { secretKey, publicKey } = schnorr.keygen();
    this.secretKey = secretKey;
    this.pubkey = hex(publicKey);
    this.sockets = urls.map(() => undefined);
    this.ready = Promise.any(urls.map((url, index) => new Promise(done => this.connect(url, index, done))));
  }
  connect(url, index, opened) {
    const socket = new WebSocket(url);
    socket.onopen = () => {
      this.sockets[index] = socket;
      for (const [id, { request }] of this.subscriptions) socket.send(JSON.stringify(['REQ', id, request()]));
      opened?.();
    };
    socket.onmessage = ({ data }) => {
      socket.waits = undefined;
      const [verb, subscription, event] = JSON.parse(data);
      if (verb !== 'EVENT' || this.heard.has(event.id)) return;
      this.heard.add(event.id);
      if (this.heard.size > 5000) this.heard.delete(this.heard.values().next().value);
      this.subscriptions.get(subscription)?.handler(JSON.parse(event.content));
    };
    socket.onclose = () => {
      this.sockets[index] = undefined;
      setTimeout(() => this.connect(url, index, opened), 1000);
    };
  }
  say(message) {
    for (const socket of this.sockets) {
      if (socket?.readyState !== 1) continue;
      // A relay answers whatever it is told. After a change of networks a connection may lead nowhere without saying so.
      if (performance.now() - (socket.waits ??= performance.now()) > 15_000) {
        socket.onclose();
        socket.onclose = socket.onmessage = null;
        socket.close();
      } else socket.send(JSON.stringify(message));
    }
  }
  async subscribe({ topic, kind }, handler) {
    await this.ready;
    const id = hex(crypto.getRandomValues(new Uint8Array(32)));
    const request = () => ({ kinds: [kind], since: Math.floor(Date.now() / 1000), '#x': [topic] });
    this.subscriptions.set(id, { request, handler });
    this.say(['REQ', id, request()]);
  }
  async publish({ topic, kind }, content) {
    await this.ready;
    const event = {
      kind, content: JSON.stringify(content), pubkey: this.pubkey, created_at: Math.floor(Date.now() / 1000), tags: [['x', topic]],
    };
    const id = await digest('SHA-256',
      JSON.stringify([0, event.pubkey, event.created_at, event.kind, event.tags, event.content]));
    event.id = hex(id);
    event.sig = hex(await schnorr.signAsync(id, this.secretKey));
    this.say(['EVENT', event]);
  }
}

/** One room of the transport: links with everybody in it, or as its cells ask for. */
class Room {
  constructor(name, id, iceServers, handlers, cellSize) {
    Object.assign(this, { name, id, iceServers, handlers, peers: new Map(), left: false });
    if (cellSize) {
      this.cells = new Cells(this, cellSize, (origin, data) => {
        if (data && typeof data === 'object' && '_ch' in data) handlers.message?.(origin, data._ch, data._d);
        else handlers.bare?.(origin, data);
      });
    }
  }
  /** Sends JSON to everybody. */
  broadcast(channel, value) {
    return this.cells ? this.cells.send({ _ch: channel, _d: value }) : this.send(channel, value);
  }
  async join(relay, password) {
    this.relay = relay;
    this.sealer = await Sealer.of(password, this.name);
    this.root = await topicOf(`GenosRTC@1234@${this.name}`);
    await relay.subscribe(this.root, content => this.heard(content));
    await relay.subscribe(await this.topicOfPeer(this.id), content => this.heard(content));
    const announce = () => this.left || relay.publish(this.root, { peerId: this.id });
    await announce();
    setInterval(announce, 2500);
    setInterval(() => this.tend(), 1000);
    addEventListener('pagehide', () => { this.left = true; relay.publish(this.root, { peerId: this.id, bye: 1 }); });
  }
  /** Asks peers that went quiet whether they are there, and drops those that do not say so, and dials without an answer. */
  tend() {
    for (const [peer, link] of this.peers) {
      const quiet = performance.now() - link.heard;
      if (quiet > (link.channel ? 20_000 : 57_000)) this.ended(peer, link);
      else if (link.channel && quiet > 10_000) this.send('@_ping', '', peer);
    }
  }
  topicOfPeer(peer) { return topicOf(`GenosRTC@1234@${this.name}@${peer}`); }

  async heard(content) {
    const peer = content.peerId;
    if (!peer || peer === this.id || this.left) return;
    const known = this.peers.get(peer);
    if (content.bye) { this.cells?.left(peer); this.drop(peer); }
    else if (content.offer) {
      if (known?.offered && !known.channel && this.id > peer) return;
      this.drop(peer);
      const link = this.link(peer, false);
      try {
        const sdp = await this.sealer.open(content.offer.sdp);
        await link.connection.setRemoteDescription({ type: 'offer', sdp });
      } catch { return this.drop(peer); }
      await link.connection.setLocalDescription();
      const answer = { type: 'answer', sdp: await this.sealer.seal(await complete(link.connection)) };
      this.relay.publish(await this.topicOfPeer(peer), { peerId: this.id, answer });
    } else if (content.answer) {
      if (!known?.offered || known.connection.signalingState !== 'have-local-offer') return;
      const sdp = await this.sealer.open(content.answer.sdp).catch(() => null);
      if (sdp) await known.connection.setRemoteDescription({ type: 'answer', sdp });
    } else if (this.cells ? this.cells.announced(peer) : true) {
      await this.dial(peer);
    }
  }
  async dial(peer) {
    if (this.peers.has(peer)) return;
    const link = this.link(peer, true);
    await link.connection.setLocalDescription();
    const offer = { type: 'offer', sdp: await this.sealer.seal(await complete(link.connection)) };
    if (this.peers.get(peer) === link) this.relay.publish(await this.topicOfPeer(peer), { peerId: this.id, offer });
  }

  link(peer, offered) {
    const connection = new RTCPeerConnection({ iceServers: this.iceServers });
    const link = {
      connection, offered, nonces: {}, unfinished: new Map(), queue: Promise.resolve(), outbox: Promise.resolve(), heard: performance.now(),
    };
    link.dropped = new Promise(done => { link.drop = done; });
    this.peers.set(peer, link);
    const use = channel => {
      channel.binaryType = 'arraybuffer';
      channel.onopen = () => { link.channel = channel; link.heard = performance.now(); this.handlers.joined?.(peer); };
      channel.onmessage = ({ data }) => { link.heard = performance.now(); link.queue = link.queue.then(() => this.frame(peer, link, new Uint8Array(data))); };
      channel.onclose = () => { if (this.peers.get(peer) === link) this.drop(peer); };
    };
    if (offered) use(connection.createDataChannel('data'));
    else connection.ondatachannel = ({ channel }) => use(channel);
    connection.onconnectionstatechange = () => {
      if (['failed', 'closed'].includes(connection.connectionState) && this.peers.get(peer) === link) this.ended(peer, link);
    };
    return link;
  }
  /** A link has ended, and perhaps nobody has made it end: one that lives is never quiet for so long. */
  ended(peer, link) {
    if (link.channel && performance.now() - link.heard > 12_000) this.cells?.died(peer);
    this.drop(peer);
  }
  drop(peer) {
    const link = this.peers.get(peer);
    link?.connection.close();
    link?.drop();
    this.peers.delete(peer);
  }

  async frame(peer, link, bytes) {
    const channel = text.decode(bytes.subarray(0, 12)).replaceAll('\0', '');
    const [nonce, flags] = [bytes[12], bytes[13]];
    const key = `${channel}/${nonce}`;
    const chunks = link.unfinished.get(key) ?? [];
    chunks.push(bytes.slice(15));
    if (!(flags & 1)) { link.unfinished.set(key, chunks); return; }
    link.unfinished.delete(key);
    let payload = new Uint8Array(await new Blob(chunks).arrayBuffer());
    if (flags & 16) payload = await transform(payload, new DecompressionStream('deflate'));
    if (channel === '@_ping') return this.send('@_pong', '', peer);
    if (channel === '@_leave') return this.drop(peer);
    if (this.cells && /^c\d+$/.test(channel)) return this.cells.receive(peer, channel, text.decode(payload));
    if (flags & 8) return this.handlers.message?.(peer, channel, JSON.parse(text.decode(payload)));
  }
  /** Once what was to be sent to each is on its way. */
  drained() {
    return Promise.all([...this.peers.values()].map(({ outbox }) => outbox));
  }
  /** Sends JSON, or a string on the transport's own channels and those of cells. */
  async send(channel, value, target) {
    const string = channel.startsWith('@_') || /^c\d+$/.test(channel);
    let payload = utf8.encode(string ? value : JSON.stringify(value));
    let flags = string ? 0 : 8;
    if (payload.length > 500) {
      payload = await transform(payload, new CompressionStream('deflate'));
      flags |= 16;
    }
    const size = 16384 - 15;
    const count = Math.max(1, Math.ceil(payload.length / size));
    for (const [peer, link] of this.peers) {
      if (link.channel?.readyState !== 'open' || (target && peer !== target)) continue;
      const nonce = link.nonces[channel] = ((link.nonces[channel] ?? -1) + 1) & 255;
      const frames = Array.from({ length: count }, (_, index) => {
        const chunk = payload.subarray(index * size, (index + 1) * size);
        const frame = new Uint8Array(15 + chunk.length);
        frame.set(utf8.encode(channel).subarray(0, 12));
        frame.set([nonce, flags | (index === count - 1 ? 1 : 0), Math.round(255 * (index + 1) / count)], 12);
        frame.set(chunk, 15);
        return frame;
      });
      link.outbox = link.outbox.then(() => deliver(link, frames));
    }
  }
}

/** Sends frames over a link as its channel takes them; what a link has not taken when it is dropped is lost with it. */
async function deliver({ channel, dropped }, frames) {
  channel.bufferedAmountLowThreshold = FULL;
  for (const frame of frames) {
    if (channel.bufferedAmount > FULL) {
      await Promise.race([new Promise(done => channel.addEventListener('bufferedamountlow', done, { once: true })), dropped]);
    }
    if (channel.readyState !== 'open') return;
    channel.send(frame);
  }
}

/** The local description once gathering is complete: nothing is trickled. */
async function complete(connection) {
  if (connection.iceGatheringState !== 'complete') {
    await new Promise(done => {
      connection.addEventListener('icegatheringstatechange',
        () => connection.iceGatheringState === 'complete' && done());
      setTimeout(done, 5000);
    });
  }
  return connection.localDescription.sdp;
}

export async function gdb(name, { rtc, password = '', sm }) {
  // A reloaded tab keeps its id and its graph; a fresh profile has neither.
  const alphabet = '0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz';
  const id = sessionStorage.peerId ??= [...crypto.getRandomValues(new Uint8Array(20))].map(byte => alphabet[byte % 62]).join('');
  const stored = JSON.parse(localStorage[name] ?? '{"nodes":{},"removals":{},"log":[]}');
  const nodes = new Map(Object.entries(stored.nodes));
  const removals = new Map(Object.entries(stored.removals));
  const log = stored.log;
  const save = () => {
    localStorage[name] = JSON.stringify(
      { nodes: Object.fromEntries(nodes), removals: Object.fromEntries(removals), log });
  };
  const latest = () => {
    let highest = null;
    for (const node of nodes.values()) if (newer(node.timestamp, highest)) highest = node.timestamp;
    for (const at of removals.values()) if (newer(at, highest)) highest = at;
    return highest;
  };
  const clock = { physical: 0, logical: 0, ...latest() };
  const now = () => {
    clock.physical = Math.max(clock.physical, Date.now());
    clock.logical += 1;
    return { ...clock };
  };
  const record = operation => { log.push(operation); if (log.length > 200) log.shift(); };
  const apply = operation => {
    const { timestamp } = operation;
    clock.physical = Math.max(clock.physical, timestamp.physical);
    clock.logical = Math.max(clock.logical, timestamp.logical) + 1;
    const node = nodes.get(operation.id ?? operation.sourceId);
    if (operation.type === 'upsert') {
      if (!('value' in operation) || !newer(timestamp, node?.timestamp)) return;
      if (!newer(timestamp, removals.get(operation.id))) return;
      nodes.set(operation.id, { id: operation.id, value: operation.value, edges: node?.edges ?? [], timestamp });
      removals.delete(operation.id);
    } else if (operation.type === 'remove') {
      if (!newer(timestamp, node?.timestamp) || !newer(timestamp, removals.get(operation.id))) return;
      nodes.delete(operation.id);
      for (const other of nodes.values()) other.edges = other.edges.filter(target => target !== operation.id);
      removals.set(operation.id, timestamp);
    } else if (operation.type === 'link') {
      if (!node || !newer(timestamp, node.timestamp)) return;
      if (!node.edges.includes(operation.targetId)) node.edges.push(operation.targetId);
      node.timestamp = timestamp;
    }
    record(operation);
  };
  const fullState = () => ({
    type: 'fullStateSync',
    graphData: Object.fromEntries(nodes),
    removals: [...removals].map(([removed, timestamp]) => ({ id: removed, timestamp })),
    timestamp: latest(),
  });
  const security = sm && new Security(sm, nodes);
  /** Sends operations to everybody, signed if there is an identity. */
  const say = async operations =>
    graph.broadcast('syncGraph', security ? await Promise.all(operations.map(one => security.sign(one))) : operations);
  /** Sends everybody the state, as it is when those before have gone out: of several that wait, the last says all. */
  let answering;
  const answer = () => {
    answering ??= graph.drained().then(() => { answering = undefined; return say([fullState()]); });
  };
  const cellSize = rtc.cells === true ? 10 : rtc.cells?.cellSize;
  const graph = new Room(`graph-sync-room-${name}`, id, rtc.turnConfig, {
    joined: () => say([{ type: 'sync', timestamp: latest() }]),
    message: async (_, channel, operations) => {
      if (channel !== 'syncGraph') return;
      for (const said of operations) {
        const operation = security ? security.accepted(said) : said;
        if (!operation) continue;
        if (operation.type === 'sync') {
          const recent = operation.timestamp && log.length > 0 && !newer(log[0].timestamp, operation.timestamp);
          say([recent ? { type: 'deltaSync', operations: log, timestamp: latest() } : fullState()]);
        } else if (operation.type === 'deltaSync') operation.operations.forEach(apply);
        else if (operation.type === 'fullStateSync') {
          for (const { id: removed, timestamp } of operation.removals) apply({ type: 'remove', id: removed, timestamp });
          const theirs = operation.graphData;
          for (const node of Object.values(theirs)) {
            if (newer(node.timestamp, nodes.get(node.id)?.timestamp) && newer(node.timestamp, removals.get(node.id))) {
              nodes.set(node.id, node);
              removals.delete(node.id);
            }
          }
          const lacks = [...nodes.values()].some(node => newer(node.timestamp, theirs[node.id]?.timestamp));
          if (lacks) answer();
        } else apply(operation);
      }
      save();
    },
  }, cellSize);
  const listeners = new Map();
  const app = new Room(`app-sync-${name}`, id, rtc.turnConfig, {
    message: (origin, channel, data) => listeners.get(channel)?.forEach(listener => listener(data, origin)),
  }, cellSize);
  app.getPeers = () => new Map([...app.peers].map(([peer, { connection }]) => [peer, connection]));
  // `db.room.channel(name)`: to everybody in the application's room.
  app.channel = channel => ({
    send: data => app.broadcast(channel, data),
    on: (_, listener) => listeners.set(channel, [...(listeners.get(channel) ?? []), listener]),
  });
  const relay = new Relays(rtc.relayUrls);
  await Promise.all([graph.join(relay, password), app.join(relay, password)]);
  const write = async operation => {
    apply(operation);
    save();
    await say([operation]);
  };
  const put = async (value, nodeId) => { await write({ type: 'upsert', id: nodeId, value, timestamp: now() }); return nodeId; };
  const get = async nodeId => ({ result: nodes.get(nodeId) ?? null });
  return {
    sm: security?.interface({ put, get }),
    room: app,
    graph,
    put,
    get,
    link: async (sourceId, targetId) => write({ type: 'link', sourceId, targetId, timestamp: now() }),
    remove: async nodeId => write({ type: 'remove', id: nodeId, value: nodes.get(nodeId)?.value, timestamp: now() }),
    map: async () => ({ results: [...nodes.values()] }),
  };
}
