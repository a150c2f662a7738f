// nostr-tools, the JavaScript client that most Nostr apps use, against the relay: publish, subscribe, count, prove a key.
import assert from 'node:assert/strict';
import { after, before, test } from 'node:test';
import { finalizeEvent, generateSecretKey, getPublicKey } from 'nostr-tools/pure';
import { Relay, useWebSocketImplementation } from 'nostr-tools/relay';
import WebSocket from 'ws';
import { Homeport } from './lib/homeport.mjs';

useWebSocketImplementation(WebSocket);

const secret = generateSecretKey();
const publicKey = getPublicKey(secret);
const now = () => Math.floor(Date.now() / 1000);
const sign = (kind, content, tags = []) => finalizeEvent({ kind, content, tags, created_at: now() }, secret);

let open, closed;
before(async () => {
  open = await Homeport.start({ settings: { HOMEPORT_RELAY__STORE: 'true' } });
  closed = await Homeport.start({
    settings: { HOMEPORT_RELAY__ADMISSION: 'auth', HOMEPORT_RELAY__ALLOWED_PUBKEYS: `["${publicKey}"]` },
  });
});
after(async () => {
  await open?.stop();
  await closed?.stop();
});

/** The events of a subscription until EOSE, and those that come later. */
function subscribe(relay, filters) {
  const stored = [];
  const live = [];
  let finished = false;
  let wake = () => {};
  const eose = new Promise((resolve, reject) => {
    const subscription = relay.subscribe(filters, {
      onevent: event => { (finished ? live : stored).push(event); wake(); },
      oneose: () => { finished = true; resolve(stored); },
      onclose: reason => reject(new Error(reason)),
    });
    subscription.eoseTimeout = 10_000;
  });
  const next = async count => {
    while (live.length < count) await new Promise(done => { wake = done; });
    return live;
  };
  return { eose, next };
}

test('nostr-tools publishes, reads back, hears and counts', async () => {
  const relay = await Relay.connect(open.relayUrl);
  const note = sign(1, 'a note ☃ "quoted"', [['t', 'e2e']]);
  await relay.publish(note);
  const { eose, next } = subscribe(relay, [{ kinds: [1, 20001], '#t': ['e2e'] }]);
  const plain = ({ id, kind, content, pubkey, sig, tags, created_at }) => ({ id, kind, content, pubkey, sig, tags, created_at });
  assert.deepEqual((await eose).map(plain), [plain(note)]);
  const flash = sign(20001, 'now or never', [['t', 'e2e']]);
  await relay.publish(flash);
  assert.deepEqual((await next(1)).map(plain), [plain(flash)]);
  assert.equal(await relay.count([{ kinds: [1] }], {}), 1);
  relay.close();
});

test('nostr-tools proves its key to a relay that asks for it', async () => {
  const relay = await Relay.connect(closed.relayUrl);
  await assert.rejects(relay.publish(sign(20001, 'unknown', [['t', 'e2e']])), /auth-required:/);
  await relay.auth(template => finalizeEvent(template, secret));
  const { eose, next } = subscribe(relay, [{ kinds: [20001], '#t': ['e2e'] }]);
  assert.deepEqual(await eose, []);
  const flash = sign(20001, 'known', [['t', 'e2e']]);
  await relay.publish(flash);
  assert.equal((await next(1))[0].id, flash.id);
  relay.close();
});
