// Rooms with a Security Manager: the seed signs, believes nobody who does not, and rules around the clock. Driven by a
// stand-in that signs and verifies with ethers; and by unmodified GenosDB, when GENOSDB_DIST names its dist files.
import assert from 'node:assert/strict';
import { writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { ethers } from 'ethers';
import { launchChromium, openPage, servePages, until } from './lib/browser.mjs';
import { clients } from './lib/clients.mjs';
import { Homeport } from './lib/homeport.mjs';

const ADMIN = 'test test test test test test test test test test test junk';
const SEED = 'zoo zoo zoo zoo zoo zoo zoo zoo zoo zoo zoo wrong';
const ONE = 'legal winner thank year wave sausage worth useful legal winner thank yellow';
const TWO = 'letter advice cage absurd amount doctor acoustic avoid letter advice cage above';
const [admin, seed, one, two] = [ADMIN, SEED, ONE, TWO].map(words => ethers.Wallet.fromPhrase(words).address);
const superAdmins = [admin, seed];

clients.forEach(suite);

function suite({ name: client, module, skip }) {
  describe(client, { skip }, () => {
    let homeport, pages, browser;
    before(async () => {
      pages = await servePages();
      browser = await launchChromium();
      homeport = await Homeport.start({
        settings: { HOMEPORT_CONFIG: 'homeport.toml', HOMEPORT_SEED__IDENTITY: SEED },
        files: { 'homeport.toml': settings() },
      });
    });
    after(async () => {
      await browser?.close();
      pages?.close();
      await homeport?.stop();
    });

    async function open(name, mnemonic) {
      const options = { rtc: homeport.rtc, ...(name === 'open' ? {} : { sm: { superAdmins, acls: true } }) };
      const query = new URLSearchParams({ client: module, name, options: JSON.stringify(options) });
      const page = await openPage(browser, `${pages.url}/pages/database.html?${query}`);
      await until(page, 'the database', () => window.loaded === true);
      if (mnemonic) await page.evaluate(words => window.db.sm.loginOrRecoverUserWithMnemonic(words), mnemonic);
      return page;
    }
    const close = (...opened) => Promise.all(opened.map(page => page.context().close()));
    const put = (page, id, value) => page.evaluate(([id, value]) => window.db.put(value, id), [id, value]);
    const assign = (page, address, role, expiresAt) =>
      page.evaluate(([address, role, expiresAt]) => window.db.sm.assignRole(address, role, expiresAt), [address, role, expiresAt]);
    /** Waits until a page holds a node whose value has some members. */
    const holds = (page, id, members) => until(page, `${id} ${JSON.stringify(members)}`, async ([id, members]) => {
      const value = (await window.nodes()).find(([other]) => other === id)?.[1];
      return value !== undefined && Object.entries(members).every(([name, wanted]) => value[name] === wanted);
    }, [id, members]);
    /** What the archive holds, users apart. */
    const archive = async name => Object.fromEntries((await homeport.command('rooms', 'show', name, '--query', '{}'))
      .split('\n').filter(Boolean).map(JSON.parse).filter(({ id }) => !id.startsWith('user:')).map(({ id, value }) => [id, value]));
    async function eventually(what, check) {
      const deadline = Date.now() + 45_000;
      while (!await check()) {
        if (Date.now() > deadline) assert.fail(`nothing came of: ${what}; the log:\n${homeport.log.split('\n').slice(-20).join('\n')}`);
        await new Promise(done => setTimeout(done, 50));
      }
    }
    const archived = (name, id, members) => eventually(`${id} in the archive`, async () => {
      const value = (await archive(name))[id];
      return value && Object.entries(members).every(([key, wanted]) => value[key] === wanted);
    });
    const refused = async (reason, act) => {
      const count = () => homeport.metric('homeport_seed_operations_total', `"${reason}"`);
      const before = await count();
      await act();
      // The stand-in sends what it may not, as somebody would who has changed the page; GenosDB may not even do that.
      if (client === 'stand-in') await eventually(`something ${reason}`, async () => await count() > before);
    };

    test('a verifying newcomer takes from the seed what an author has left', async () => {
      const [ruler, author] = [await open('signed', ADMIN), await open('signed', ONE)];
      await holds(ruler, `user:${one}`, { role: 'guest' });
      await assign(ruler, one, 'user');
      await holds(author, `user:${one}`, { role: 'user' });
      // In both rooms of the database: the seed is to hear it from the author, not from who passes it on.
      await eventually('links with the seed', async () => await homeport.metric('homeport_seed_links', 'room="signed"') === 4);
      for (let index = 0; index < 3; index++) await put(author, `n${index}`, { index, text: '☃ "quoted"', pi: 3.14159e-7 });
      for (let index = 0; index < 3; index++) await archived('signed', `n${index}`, { index });
      await close(ruler, author);
      const newcomer = await open('signed');
      for (let index = 0; index < 3; index++) await holds(newcomer, `n${index}`, { index });
      await close(newcomer);
      const verified = await homeport.command('rooms', 'verify', 'signed');
      assert.match(verified, /0 are not signed, 0 nodes/);
      // By their author's own signature, or in a delta that somebody else has signed: whichever link was faster.
      assert.match(verified, /^[1-9]\d* operations hold/m);
    });

    test('what a guest writes is taken neither by the seed nor by a page', async () => {
      const [guest, stranger] = [await open('guests', TWO), await open('guests')];
      await refused('not_permitted', () => put(guest, 'mine', { by: 'guest' }).catch(() => {}));
      await refused('unsigned', () => put(stranger, 'nobodys', { by: 'nobody' }).catch(() => {}));
      const newcomer = await open('guests', ADMIN);
      await put(newcomer, 'last', { by: 'admin' });
      await archived('guests', 'last', { by: 'admin' });
      await holds(newcomer, `user:${two}`, { role: 'guest' });
      assert.deepEqual(Object.keys(await archive('guests')), ['last']);
      const ids = (await newcomer.evaluate(() => window.nodes())).map(([id]) => id).filter(id => !id.startsWith('user:'));
      assert.deepEqual(ids, ['last']);
      await close(guest, stranger, newcomer);
    });

    test('a role is used until it expires', async () => {
      const [ruler, author] = [await open('roles', ADMIN), await open('roles', ONE)];
      await holds(ruler, `user:${one}`, { role: 'guest' });
      const end = Date.now() + 4_000;
      await assign(ruler, one, 'user', new Date(end).toISOString());
      await holds(author, `user:${one}`, { role: 'user' });
      await put(author, 'early', { index: 1 });
      await archived('roles', 'early', { index: 1 });
      await eventually('the end of the role', () => Date.now() > end);
      await refused('not_permitted', () => put(author, 'late', { index: 2 }).catch(() => {}));
      assert.deepEqual(Object.keys(await archive('roles')), ['early']);
      await close(ruler, author);
    });

    test('a node that belongs to somebody is for its owner and those it names', async () => {
      const [ruler, owner, other] = [await open('owned', ADMIN), await open('owned', ONE), await open('owned', TWO)];
      for (const address of [one, two]) {
        await holds(ruler, `user:${address}`, { role: 'guest' });
        await assign(ruler, address, 'user');
      }
      await holds(owner, `user:${one}`, { role: 'user' });
      await holds(other, `user:${two}`, { role: 'user' });
      await owner.evaluate(() => window.db.sm.acls.set({ text: 'mine' }, 'diary'));
      await archived('owned', 'diary', { text: 'mine', owner: one });
      await holds(other, 'diary', { text: 'mine' });
      const thief = await open('owned', TWO);
      await holds(thief, 'diary', { text: 'mine' });
      await refused('not_permitted', () => put(thief, 'diary', { text: 'stolen' }).catch(() => {}));
      await close(thief);
      assert.equal((await archive('owned')).diary.text, 'mine');
      await owner.evaluate(address => window.db.sm.acls.grant('diary', address, 'write'), two);
      await eventually('the grant', async () => (await archive('owned')).diary.collaborators?.[two] === 'write');
      await holds(other, 'diary', { owner: one });
      await eventually('the grant at the page', () => other.evaluate(async address =>
        (await window.nodes()).find(([id]) => id === 'diary')[1].collaborators?.[address] === 'write', two));
      const value = (await archive('owned')).diary;
      await put(other, 'diary', { ...value, text: 'ours' });
      await archived('owned', 'diary', { text: 'ours', owner: one });
      await close(ruler, owner, other);
    });

    test('the ladder is climbed and lost with nobody there who rules', async () => {
      const page = await open('ladder', ONE);
      const role = wanted => holds(page, `user:${one}`, { role: wanted });
      await role('user');
      await put(page, 'post', { index: 1 });
      await archived('ladder', 'post', { index: 1 });
      const self = members => page.evaluate(async ([id, members]) => {
        const value = (await window.nodes()).find(([other]) => other === id)[1];
        return window.db.put({ ...value, ...members }, id);
      }, [`user:${one}`, members]);
      await self({ posts: 2 });
      await role('manager');
      await self({ banned: true });
      await role('guest');
      await refused('not_permitted', () => put(page, 'again', { index: 2 }).catch(() => {}));
      assert.deepEqual(Object.keys(await archive('ladder')), ['post']);
      await close(page);
    });

    test('an open page sees a room brought back to what it was', async () => {
      const page = await open('open');
      for (let index = 0; index < 20; index++) await put(page, `n${index}`, { index });
      await page.evaluate(() => window.db.link('n0', 'n1'));
      await eventually('20 nodes', async () => Object.keys(await archive('open')).length === 20);
      await eventually('the link', async () => (await homeport.command('rooms', 'show', 'open', '--query', '{"id":"n0"}')).includes('["n1"]'));
      await new Promise(done => setTimeout(done, 20));
      const then = new Date().toISOString();
      await new Promise(done => setTimeout(done, 20));
      await page.evaluate(async () => {
        await window.db.remove('n0');
        await window.db.put({ index: 'other' }, 'n1');
        await window.db.put({ index: 20 }, 'n20');
      });
      await archived('open', 'n20', { index: 20 });
      const done = await homeport.command('rooms', 'restore', 'open', '--at', then, '--yes');
      assert.match(done, /operations were written, and peers follow/);
      await until(page, 'the room as it was', async () => {
        const nodes = await window.nodes();
        const [first] = nodes;
        return nodes.length === 20 && first[0] === 'n0' && first[2][0] === 'n1' && nodes.every(([id, value]) => id === `n${value.index}`);
      });
      await close(page);
    });

    test('a thousand random operations sign and verify both ways', async () => {
      const page = await open('random', ADMIN);
      const count = 1_000;
      // From when the seed hears each operation by itself: what it was told of as a state stands on the teller's word.
      await put(page, 'n0', { index: 0 });
      await archived('random', 'n0', { index: 0 });
      await page.evaluate(async ([source, count]) => {
        const random = new Function(`return ${source}`)();
        for (let index = 0; index < count; index++) await window.db.put(random(), `n${index}`);
      }, [`${randomValue}`, count]);
      await eventually('a thousand nodes', async () => Object.keys(await archive('random')).length === count);
      const verified = await homeport.command('rooms', 'verify', 'random');
      const [, hold, told] = /^(\d+) operations hold, (\d+) stand on the word/.exec(verified);
      assert.ok(Number(hold) >= count && Number(told) <= 1, verified);
      await close(page);

      const lines = Array.from({ length: count }, (_, index) => JSON.stringify({ id: `s${index}`, value: randomValue() }));
      await writeFile(join(homeport.folder, 'nodes.jsonl'), lines.join('\n'));
      await homeport.command('rooms', 'import', 'random', 'nodes.jsonl');
      const entries = (await homeport.command('rooms', 'log', 'random', '--last', String(count), '--json')).split('\n').filter(Boolean);
      const sorted = value => JSON.stringify(value, (_, inner) => (inner && typeof inner === 'object' && !Array.isArray(inner)
        ? Object.fromEntries(Object.keys(inner).sort().map(key => [key, inner[key]])) : inner));
      assert.equal(entries.length, count);
      for (const entry of entries) {
        const { originEthAddress, signature, ...rest } = JSON.parse(entry).operation;
        assert.equal(ethers.verifyMessage(sorted(rest), signature), seed);
        assert.equal(originEthAddress, seed);
      }
    });
  });
}

/** A value with unicode, floats, index-like keys and nesting. Runs in the page as well: it stands alone. */
function randomValue() {
  const pick = list => list[Math.floor(Math.random() * list.length)];
  const text = () => Array.from({ length: Math.floor(Math.random() * 6) }, () =>
    pick(['a', 'Z', '"', '\\', '\n', '\u0001', 'é', '☃', '😀', '\ud800', '\uffff', '\u2028', '/', '10', '9'])).join('');
  const number = () => pick([0, -0, 1, -1, 1.5, 1e21, 1e-7, 5e-324, Number.MAX_VALUE, 2 ** 53, Math.random(), Math.random() * 1e300, -Math.random() * 1e-12]);
  const value = depth => {
    const kind = Math.floor(Math.random() * (depth > 3 ? 4 : 6));
    if (kind === 0) return text();
    if (kind === 1) return number();
    if (kind === 2) return pick([true, false, null]);
    if (kind === 3) return Math.floor(Math.random() * 1e6);
    const size = Math.floor(Math.random() * 5);
    if (kind === 4) return Array.from({ length: size }, () => value(depth + 1));
    return Object.fromEntries(Array.from({ length: size }, () => [pick([text(), '10', '9', '-1', 'x', 'value', 'Å']), value(depth + 1)]));
  };
  return { a: value(0), z: value(0) };
}

/** The settings of the rooms. */
function settings() {
  const rules = [
    { if: { role: 'guest' }, then: { assignRole: 'user' }, offsetTimestamp: 300 },
    { if: { role: 'user', posts: { $gte: 2 } }, then: { assignRole: 'manager' } },
    { if: { banned: true }, then: { assignRole: 'guest' } },
  ];
  const rooms = ['signed', 'guests', 'roles', 'owned', 'random'].map(name =>
    `[[seed.room]]\nname = "${name}"\nsuper_admins = ${JSON.stringify(superAdmins)}\n`);
  return [...rooms, '[[seed.room]]\nname = "open"\n',
    `[[seed.room]]\nname = "ladder"\nsuper_admins = ${JSON.stringify(superAdmins)}\n`,
    ...rules.map(({ if: condition, then, offsetTimestamp }) =>
      `[[seed.room.governance]]\nif = ${toml(condition)}\nthen = ${toml(then)}\n${offsetTimestamp ? `offsetTimestamp = ${offsetTimestamp}\n` : ''}`),
  ].join('\n');
}

/** An inline table of TOML. */
function toml(value) {
  if (value === null || typeof value !== 'object') return JSON.stringify(value);
  return `{ ${Object.entries(value).map(([key, inner]) => `"${key}" = ${toml(inner)}`).join(', ')} }`;
}
