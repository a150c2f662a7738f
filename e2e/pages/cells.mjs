// A room in cells, as the wire notes have it (section 5): who is there, when that is acted on, who links with whom,
// what is passed on. A part of the stand-in client.

/** A peer whose link died is taken for gone when it has not been heard for so long; a bridge at once. */
const SILENCE = 30_000;
const hash = text => {
  let value = 0;
  for (let index = 0; index < text.length; index++) value = Math.imul(value ^ text.charCodeAt(index), 2654435761) >>> 0;
  return value;
};
const greatest = (list, score) => list.reduce((best, one) => (score(one) > score(best) ? one : best));

/** Who is in which cell, and who bridges, among the peers of a sealed roster. */
class Topology {
  constructor(roster, size) {
    this.total = Math.max(1, Math.ceil(roster.length / size));
    this.cellOf = new Map(roster.map(peer =>
      [peer, greatest([...Array(this.total).keys()], cell => hash(`${peer}:${cell}`))]));
    this.bridges = new Map();
    for (const cell of new Set(this.cellOf.values())) {
      const members = roster.filter(peer => this.cellOf.get(peer) === cell);
      if (this.total > 1) this.bridges.set(cell, greatest(members, peer => hash(`${peer}@${cell}`)));
    }
    this.ttl = Math.min(150, 2 * Math.ceil(Math.log2(this.total + 1)) + 3);
  }
  isBridge(peer) { return this.bridges.get(this.cellOf.get(peer)) === peer; }
  areNeighbours(one, other) { return Number.isInteger(Math.log2(Math.abs(one - other))); }
  areLinked(one, other) {
    const [cell, others] = [this.cellOf.get(one), this.cellOf.get(other)];
    if (cell === undefined || others === undefined) return false;
    return cell === others || (this.areNeighbours(cell, others) && (this.isBridge(one) || this.isBridge(other)));
  }
  channels(peer) {
    const own = this.cellOf.get(peer);
    const all = [...Array(this.total).keys()];
    return this.isBridge(peer) ? all.filter(cell => cell === own || this.areNeighbours(cell, own)) : [own];
  }
}

export class Cells {
  constructor(room, size, delivered) {
    Object.assign(this, {
      room, size, delivered, roster: new Set([room.id]), silent: new Map(), seen: new Set(), sequence: 0, sealed: false,
    });
    this.topology = new Topology([room.id], size);
    setInterval(() => this.tick(), 250);
  }
  /** A peer announced itself. Returns whether to dial it. */
  announced(peer) {
    this.silent.delete(peer);
    if (!this.roster.has(peer)) { this.roster.add(peer); this.change(); }
    return this.wants(peer);
  }
  left(peer) {
    this.silent.delete(peer);
    if (this.roster.delete(peer)) this.change();
  }
  /** The link to a peer died, and nobody has said bye. */
  died(peer) {
    if (this.topology.isBridge(peer)) this.left(peer);
    else this.silent.set(peer, Date.now());
  }
  wants(peer) { return !this.sealed || this.topology.areLinked(this.room.id, peer); }
  change() {
    const now = Date.now();
    this.changed = { first: this.changed?.first ?? now, last: now };
  }
  tick() {
    const now = Date.now();
    for (const [peer, since] of this.silent) if (now >= since + SILENCE) this.left(peer);
    if (this.changed && (now >= this.changed.last + 2000 || now >= this.changed.first + 10000)) {
      this.changed = null;
      this.topology = new Topology([...this.roster].sort(), this.size);
      Object.assign(this, { sealed: true, sealedAt: now });
      for (const peer of this.roster) if (peer !== this.room.id && this.wants(peer)) this.room.dial(peer);
    }
    if (this.sealed && !this.changed && now >= this.sealedAt + 5000) {
      for (const [peer, link] of this.room.peers) if (link.channel && !this.wants(peer)) this.room.drop(peer);
    }
  }
  /** Sends data to everybody. */
  send(data) {
    const { id } = this.room;
    const message = {
      t: 'msg', id: `${id}:${Date.now().toString(36)}:${this.sequence++}`, ttl: this.topology.ttl, data, origin: id,
      originCell: `cell-${this.topology.cellOf.get(id)}`,
    };
    this.seen.add(message.id);
    return this.spread(message);
  }
  async spread(message, except) {
    for (const cell of this.topology.channels(this.room.id)) {
      for (const peer of [...this.room.peers.keys()]) {
        // Somebody who is new and in no cell yet is told as well.
        const theirs = this.topology.cellOf.get(peer) ?? this.topology.cellOf.get(this.room.id);
        if (peer !== except && theirs === cell) await this.room.send(`c${cell}`, JSON.stringify(message), peer);
      }
    }
  }
  async receive(from, channel, text) {
    const cell = Number(channel.slice(1));
    if (this.sealed && !this.topology.channels(this.room.id).includes(cell)) return;
    const message = JSON.parse(text);
    if (this.seen.has(message.id)) return;
    this.seen.add(message.id);
    if (this.topology.isBridge(this.room.id) && message.ttl > 0) await this.spread({ ...message, ttl: message.ttl - 1 }, from);
    if (message.t === 'msg') this.delivered(message.origin, message.data);
  }
}
