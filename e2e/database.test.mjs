// A community's database: pages write and go, the seed remembers. Driven twice: by a stand-in written from the wire
// notes, always; and by unmodified GenosDB, when GENOSDB_DIST names a folder with its published `dist` files.
import assert from 'node:assert/strict';
import { after, before, describe, test } from 'node:test';
import { launchChromium, openPage, servePages, until } from './lib/browser.mjs';
import { clients } from './lib/clients.mjs';
import { Homeport } from './lib/homeport.mjs';

const NODES = 300;
clients.forEach(suite);

function suite({ name: client, module, skip }) {
  describe(client, { skip }, () => {
    let homeport, pages, browser;
    before(async () => {
      pages = await servePages();
      browser = await launchChromium();
      homeport = await Homeport.start({
        rooms: ['notes', 'reload', 'late', { name: 'secret', password: 'pw1' }],
      });
    });
    after(async () => {
      await browser?.close();
      pages?.close();
      await homeport?.stop();
    });

    /** Opens a page of its own profile on a database. */
    async function open(name, { password, wait = true } = {}) {
      const options = { rtc: homeport.rtc, ...(password ? { password } : {}) };
      const query = new URLSearchParams({ client: module, name, options: JSON.stringify(options) });
      const page = await openPage(browser, `${pages.url}/pages/database.html?${query}`);
      if (wait) await until(page, 'the database', () => window.loaded === true);
      return page;
    }

    const close = page => page.context().close();
    const nodes = page => page.evaluate(() => window.nodes());
    const holds = (page, count) =>
      until(page, `${count} nodes`, async wanted => await window.count() === wanted, count);

    /** Fails with the nodes that differ, not with all of them. */
    function assertSame(actual, expected) {
      const texts = list => new Set(list.map(node => JSON.stringify(node)));
      const [got, wanted] = [texts(actual), texts(expected)];
      const only = (here, there) => [...here].filter(node => !there.has(node)).slice(0, 5);
      assert.deepEqual({ unexpected: only(got, wanted), missing: only(wanted, got) }, { unexpected: [], missing: [] });
    }

    /** Waits until what two pages hold is the same. */
    async function same(one, other) {
      const deadline = Date.now() + 30_000;
      for (;;) {
        const [left, right] = [await nodes(one), await nodes(other)];
        if (JSON.stringify(left) === JSON.stringify(right)) return left;
        if (Date.now() > deadline) assertSame(right, left);
        await new Promise(done => setTimeout(done, 100));
      }
    }

    /** Waits until the archive holds so many nodes of a room. */
    async function archived(name, count) {
      const deadline = Date.now() + 30_000;
      for (;;) {
        const held = await homeport.metric('homeport_seed_nodes', `room="${name}"`);
        if (held === count) return;
        if (Date.now() > deadline) assert.fail(`the archive holds ${held} nodes of ${name}, not ${count}`);
        await new Promise(done => setTimeout(done, 50));
      }
    }

    /** Two pages write, edit, link and remove; what is left is returned. */
    async function writeTogether(name, password) {
      const [one, other] = await Promise.all([open(name, { password }), open(name, { password })]);
      const put = (page, prefix, count) => page.evaluate(async ([prefix, count]) => {
        for (let index = 0; index < count; index++) {
          await window.db.put({ index, text: `node ${index} of ${prefix} ☃ "quoted"`, pi: 3.14159 * index }, `${prefix}${index}`);
        }
      }, [prefix, count]);
      const half = NODES / 2;
      await Promise.all([put(one, 'a', half + 10), put(other, 'b', half + 10)]);
      await Promise.all([holds(one, NODES + 20), holds(other, NODES + 20)]);
      await one.evaluate(async half => {
        for (let index = 0; index < half; index += 3) await window.db.put({ edited: index }, `b${index}`);
        for (let index = 1; index < half; index += 3) await window.db.link(`a${index}`, `b${index}`);
      }, half);
      await same(one, other);
      await other.evaluate(async half => {
        for (let index = half; index < half + 10; index++) {
          await window.db.remove(`a${index}`);
          await window.db.remove(`b${index}`);
        }
        await window.db.remove('b1');
        await window.db.put({ again: true }, 'b1');
      }, half);
      await Promise.all([holds(one, NODES), holds(other, NODES)]);
      const written = await same(one, other);
      await archived(name, NODES);
      await Promise.all([close(one), close(other)]);
      return written;
    }

    test('two pages write and close; a fresh page gets exactly what they had; so it does after kill -9', async () => {
      const written = await writeTogether('notes');
      assert.equal(written.length, NODES);
      assert.ok(written.some(([, , edges]) => edges.length > 0), 'no edges');

      const fresh = await open('notes');
      const after = await fresh.evaluate(count => window.heldAfter(count), NODES);
      console.log(`${client}: a fresh page held ${NODES} nodes ${Math.round(after)} ms after it was opened`);
      await holds(fresh, NODES);
      assertSame(await nodes(fresh), written);
      await close(fresh);

      await homeport.kill();
      await homeport.run();
      const survivor = await open('notes');
      await until(survivor, 'the nodes from disk', async count => await window.count() === count, NODES);
      assertSame(await nodes(survivor), written);
      await close(survivor);
    });

    test('a password room keeps its data from who does not know the password', async () => {
      const written = await writeTogether('secret', 'pw1');
      const friend = await open('secret', { password: 'pw1' });
      await holds(friend, NODES);
      assertSame(await nodes(friend), written);
      const before = await homeport.metric('homeport_seed_link_outcomes_total', 'wrong_password');
      const stranger = await open('secret', { password: 'guess' });
      const deadline = Date.now() + 30_000;
      while (await homeport.metric('homeport_seed_link_outcomes_total', 'wrong_password') === before) {
        assert.ok(Date.now() < deadline, 'the stranger did not even try');
        await new Promise(done => setTimeout(done, 100));
      }
      assert.equal(await stranger.evaluate(() => window.count()), 0);
      await Promise.all([close(friend), close(stranger)]);
    });

    test('a tab that reloads keeps what it had and goes on writing', async () => {
      const tab = await open('reload');
      await tab.evaluate(async () => { for (let index = 0; index < 20; index++) await window.db.put({ index }, `n${index}`); });
      await archived('reload', 20);
      await tab.reload();
      await until(tab, 'the database', () => window.loaded === true);
      await holds(tab, 20);
      await tab.evaluate(async () => { await window.db.put({ after: 'reload' }, 'n20'); await window.db.remove('n0'); });
      await holds(tab, 20);
      await archived('reload', 20);
      const written = await nodes(tab);
      const fresh = await open('reload');
      await holds(fresh, 20);
      await same(tab, fresh);
      assertSame(await nodes(fresh), written);
      await Promise.all([close(tab), close(fresh)]);
    });

    test('a page that stays while the seed restarts is found again and misses nothing', async () => {
      const page = await open('late');
      await page.evaluate(() => window.db.put({ before: true }, 'before'));
      await archived('late', 1);
      const took = await homeport.terminate();
      console.log(`${client}: SIGTERM took ${took} ms`);
      await page.evaluate(() => window.db.put({ during: true }, 'during'));
      await homeport.run();
      const other = await open('late');
      await page.evaluate(() => window.db.put({ after: true }, 'after'));
      await page.reload();
      await until(page, 'the database', () => window.loaded === true);
      await Promise.all([holds(page, 3), holds(other, 3)]);
      await archived('late', 3);
      await Promise.all([close(page), close(other)]);
    });
  });
}
