// Rooms in cells: pages that hold links with their cell only, and the seed between the cells. Driven twice, as
// database.test.mjs: by the stand-in, and by GenosDB when GENOSDB_DIST names its published files.
import assert from 'node:assert/strict';
import { after, before, describe, test } from 'node:test';
import { crash, launchChromium, openPage, servePages, until } from './lib/browser.mjs';
import { clients } from './lib/clients.mjs';
import { Homeport } from './lib/homeport.mjs';

clients.forEach(suite);

function suite({ name: client, module, skip }) {
  describe(`${client} in cells`, { skip }, () => {
    let homeport, pages, browser;
    before(async () => {
      pages = await servePages();
      browser = await launchChromium();
      homeport = await Homeport.start({ rooms: [
        { name: 'one', cells: { cell_size: 3, bridge: 'one' } },
        { name: 'every', cells: { cell_size: 4, bridge: 'every' } },
        { name: 'growing', cells: { cell_size: 4, bridge: 'every' } },
        { name: 'pages', cells: { cell_size: 3, bridge: 'off' } },
        'mesh',
      ] });
    });
    after(async () => {
      await browser?.close();
      pages?.close();
      await homeport?.stop();
    });

    async function open(name, cellSize) {
      const rtc = cellSize ? { ...homeport.rtc, cells: { cellSize } } : homeport.rtc;
      const query = new URLSearchParams({ client: module, name, options: JSON.stringify({ rtc }) });
      const page = await openPage(browser, `${pages.url}/pages/database.html?${query}`);
      await until(page, 'the database', () => window.loaded === true);
      return page;
    }
    const close = page => page.context().close();
    const metric = (name, room) => homeport.metric(name, `room="${room}"`);
    async function holds(page, count, timeout) {
      try {
        await until(page, `${count} nodes`, async wanted => await window.count() === wanted, count, timeout);
      } catch (error) {
        // Who is missing what, and where it takes itself and others to be, says why.
        const view = await page.evaluate(async () => {
          const { cells, peers } = window.db.graph ?? {};
          return {
            nodes: (await window.nodes()).map(([id]) => id), cell: cells?.topology.cellOf.get(window.db.graph.id),
            sealed: cells && [...cells.topology.cellOf], roster: cells?.roster.size, links: peers && [...peers.keys()],
          };
        });
        throw new Error(`${error.message}\n${JSON.stringify(view)}\nthe seed: ${homeport.log}`);
      }
    }

    async function reaches(name, room, wanted) {
      const deadline = Date.now() + 45_000;
      for (;;) {
        const value = await metric(name, room);
        if (value === wanted) return;
        if (Date.now() > deadline) assert.fail(`${name} of ${room} is ${value}, not ${wanted}`);
        await new Promise(done => setTimeout(done, 100));
      }
    }

    /**
     * Waits until a word of each member reaches all others, and does so again once everybody must have sealed the
     * same roster: until then, peers may take each other's frames for those of a cell that is not theirs.
     */
    async function settle(members) {
      await Promise.all(members.map(page => page.evaluate(() => {
        window.words = new Map();
        window.presence = window.db.room.channel('presence');
        window.presence.on('message', ({ from, round }) => window.words.set(from, round));
      })));
      const sealed = 5_000;
      let first;
      for (let round = 1; round < 60; round++) {
        const started = Date.now();
        await Promise.all(members.map((page, from) =>
          page.evaluate(word => window.presence.send(word), { from, round })));
        const all = await Promise.all(members.map(page =>
          until(page, 'a word of each', ([count, round]) => [...window.words.values()].filter(one => one === round).length >= count,
            [members.length - 1, round], 1_000).then(() => true, () => false)));
        if (all.every(Boolean)) first ??= started;
        if (all.every(Boolean) && started >= first + sealed) return;
        await new Promise(done => setTimeout(done, 250));
      }
      assert.fail('words still do not reach everybody');
    }

    /** Everybody writes, everybody has all of it; a channel of the application reaches everybody too. */
    async function talk(members) {
      await settle(members);
      for (const page of members) {
        await page.evaluate(() => {
          window.heard = [];
          window.talk = window.db.room.channel('chat');
          window.talk.on('message', data => window.heard.push(data));
        });
      }
      await Promise.all(members.map((page, index) => page.evaluate(async index => {
        for (let count = 0; count < 5; count++) await window.db.put({ index, count }, `n${index}-${count}`);
        window.talk.send({ from: index, padding: 'x'.repeat(20_000) });
      }, index)));
      for (const page of members) {
        await holds(page, members.length * 5);
        await until(page, 'a word of each other', count => window.heard.length >= count, members.length - 1);
        assert.equal(await page.evaluate(() => window.heard.length), members.length - 1, 'each word once');
      }
    }

    // Three cells are all neighbours: each page links with every bridge, in both rooms of the database.
    for (const [bridge, cellSize, cells, bridged] of [['one', 3, 3, 1], ['every', 4, 3, 3]]) {
      test(`eight pages in three cells, the seed as the bridge of ${bridge}`, async () => {
        const members = await Promise.all(Array.from({ length: 8 }, () => open(bridge, cellSize)));
        await reaches('homeport_seed_present_peers', bridge, 8);
        await reaches('homeport_seed_cells', bridge, cells);
        await reaches('homeport_seed_bridged_cells', bridge, bridged);
        await reaches('homeport_seed_links', bridge, 2 * 8 * bridged);
        await talk(members);
        await reaches('homeport_seed_nodes', bridge, 40);
        await Promise.all(members.map(close));
        const fresh = await open(bridge, cellSize);
        await holds(fresh, 40);
        await close(fresh);
      });
    }

    test('a room grows from two to twelve pages, and the seed with it', async () => {
      const members = [await open('growing', 4), await open('growing', 4)];
      await members[0].evaluate(() => window.db.put({ first: true }, 'first'));
      await holds(members[1], 1);
      for (let count = 2; count < 12; count++) members.push(await open('growing', 4));
      for (const page of members) await holds(page, 1);
      // Three pages and one of the seed's ids to a cell.
      await reaches('homeport_seed_cells', 'growing', 4);
      await reaches('homeport_seed_bridged_cells', 'growing', 4);
      await members[11].evaluate(() => window.db.put({ last: true }, 'last'));
      for (const page of members) await holds(page, 2);
      await Promise.all(members.map(close));
    });

    // The seed is a member like any other here: cells rely on pages.
    test('a page that was the bridge of its cell crashes, and another takes its place', async () => {
      const members = await Promise.all(Array.from({ length: 8 }, () => open('pages', 3)));
      await reaches('homeport_seed_present_peers', 'pages', 8);
      await reaches('homeport_seed_cells', 'pages', 3);
      await settle(members);
      // GenosDB's pages do not say which of them is a bridge: there, any will do.
      const bridges = await Promise.all(members.map(page => page.evaluate(() => {
        const { id, cells } = window.db.graph ?? {};
        return cells ? cells.topology.isBridge(id) : null;
      })));
      assert.ok(bridges.includes(true) || bridges.every(is => is === null), 'a page is a bridge');
      const [lost] = members.splice(Math.max(0, bridges.indexOf(true)), 1);
      await crash(lost);
      await Promise.all(members.map((page, index) => page.evaluate(index => window.db.put({ index }, `n${index}`), index)));
      // A link that died is found out after 20 s, and rosters are sealed anew after that.
      for (const page of members) await holds(page, 7, 90_000);
      await reaches('homeport_seed_present_peers', 'pages', 7);
      await reaches('homeport_seed_nodes', 'pages', 7);
      await Promise.all([...members, lost].map(close));
    });

    test('a page returns after five thousand operations, and two databases do not meet', async () => {
      const sleeper = await open('mesh');
      const writer = await open('mesh');
      await writer.evaluate(() => window.db.put({ seen: true }, 'seen'));
      await holds(sleeper, 1);
      // Two pages, two rooms: both are linked with the seed, so that it hears every operation.
      await reaches('homeport_seed_links', 'mesh', 4);
      const url = sleeper.url();
      await sleeper.goto('about:blank');
      await writer.evaluate(async () => {
        for (let index = 0; index < 5_000; index++) await window.db.put({ index }, `n${index % 500}`);
      });
      await reaches('homeport_seed_logged_operations', 'mesh', 5_001);
      await close(writer);
      await sleeper.goto(url);
      await until(sleeper, 'the database', () => window.loaded === true);
      await holds(sleeper, 501);
      const other = await open('growing', 4);
      await other.evaluate(() => window.db.put({ mine: true }, 'mine'));
      assert.equal(await other.evaluate(async () => (await window.nodes()).some(([id]) => id === 'seen')), false);
      await Promise.all([close(sleeper), close(other)]);
    });
  });
}
