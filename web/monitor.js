// Says how an app's WebRTC connections fare, to the Homeport that serves this file:
//
//   import { monitor } from 'https://relay.example.com/monitor.js';
//   monitor(db.room);
//
// A report is a few words a connection: whether it came to be, over what, how soon. No addresses, no ids, no names.

const EVERY_MS = 10_000;
/** An attempt that takes longer has failed. */
const PATIENCE_MS = 30_000;
const MAX_WAITING = 200;

/** The connections in whatever a room's getPeers() returns: a map, an array or an object of them. */
function connectionsIn(peers) {
  if (!peers) return [];
  const values = peers instanceof Map ? [...peers.values()] : Object.values(peers);
  return values
    .map(value => (value instanceof RTCPeerConnection ? value : value?.connection ?? value?.peerConnection ?? value?.pc))
    .filter(value => value instanceof RTCPeerConnection);
}

/** Numbers that say about how much, and no more. */
const coarse = (value, step) => (Number.isFinite(value) && value >= 0 ? Math.round(value / step) * step : null);

/** Over what a connection goes: the kinds of its two ends, and how a relay is reached. */
async function pathOf(connection) {
  const stats = await connection.getStats();
  const all = [...stats.values()];
  const selected = all.find(({ type, selectedCandidatePairId }) => type === 'transport' && selectedCandidatePairId);
  const pair = selected ? stats.get(selected.selectedCandidatePairId)
    : all.find(({ type, nominated, state }) => type === 'candidate-pair' && nominated && state === 'succeeded');
  if (!pair) return {};
  const [local, remote] = [stats.get(pair.localCandidateId), stats.get(pair.remoteCandidateId)];
  return {
    local: local?.candidateType ?? null,
    remote: remote?.candidateType ?? null,
    relay: local?.candidateType === 'relay' ? local.relayProtocol ?? null : null,
    rtt: coarse(pair.currentRoundTripTime * 1_000, 10),
  };
}

/**
 * Watches the connections of `room.getPeers()`, and those that are handed to `watch`. `sample` is the share of pages that
 * report at all. Returns `{ watch, stop }`.
 */
export function monitor(room, { url = new URL('/reports', import.meta.url).href, sample = 1 } = {}) {
  if (Math.random() >= sample) return { watch: () => {}, stop: () => {} };
  const seen = new WeakSet();
  let waiting = [];

  function watch(connection) {
    if (!(connection instanceof RTCPeerConnection) || seen.has(connection)) return;
    seen.add(connection);
    const start = performance.now();
    // One that is connected when it is first seen: how long that took is not known.
    const isEarly = connection.connectionState === 'new' || connection.connectionState === 'connecting';
    let unreachable = 0;
    let isOver = false;
    const end = async outcome => {
      if (isOver) return;
      isOver = true;
      clearTimeout(timer);
      const path = outcome === 'connected' ? await pathOf(connection).catch(() => ({})) : {};
      const ms = outcome === 'connected' && isEarly ? coarse(performance.now() - start, 50) : null;
      if (waiting.length < MAX_WAITING) waiting.push({ outcome, ms, unreachable, ...path });
    };
    // Who closes a connection itself is told by no event.
    const timer = setTimeout(() => end(connection.connectionState === 'closed' ? 'abandoned' : 'timed_out'), PATIENCE_MS);
    const look = () => {
      if (connection.connectionState === 'connected') end('connected');
      else if (connection.connectionState === 'failed') end('failed');
      else if (connection.connectionState === 'closed') end('abandoned');
    };
    connection.addEventListener('connectionstatechange', look);
    // 701: a STUN or TURN server could not be reached.
    connection.addEventListener('icecandidateerror', ({ errorCode }) => { if (errorCode === 701) unreachable += 1; });
    look();
  }

  function send() {
    if (waiting.length === 0) return;
    const body = JSON.stringify({ version: 1, links: waiting });
    waiting = [];
    // A beacon leaves also when the page does; as text, no browser asks for permission first.
    if (!navigator.sendBeacon(url, body)) fetch(url, { method: 'POST', body, keepalive: true, mode: 'no-cors' }).catch(() => {});
  }

  const looking = setInterval(() => connectionsIn(room?.getPeers?.()).forEach(watch), 500);
  const sending = setInterval(send, EVERY_MS);
  addEventListener('pagehide', send);
  return {
    watch,
    stop() {
      clearInterval(looking);
      clearInterval(sending);
      removeEventListener('pagehide', send);
      send();
    },
  };
}
