// Firefox ESR with Chromium, and with the seed: directly, and through our TURN server alone.
import assert from 'node:assert/strict';
import { after, before, test } from 'node:test';
import puppeteer from 'puppeteer-core';
import { launchChromium, openPage, servePages, until } from './lib/browser.mjs';
import { client } from './lib/clients.mjs';
import { Homeport, TURN_USER } from './lib/homeport.mjs';


let homeport, pages, chromium, firefox;
before(async () => {
  homeport = await Homeport.start({ rooms: ['notes'] });
  pages = await servePages();
  chromium = await launchChromium();
  firefox = await puppeteer.launch({
    browser: 'firefox', executablePath: process.env.FIREFOX ?? '/usr/bin/firefox-esr', headless: true,
    // Names instead of addresses (mDNS) are for those who can be asked for them: here is no network for that.
    extraPrefsFirefox: { 'media.peerconnection.ice.obfuscate_host_addresses': false },
  });
});
after(async () => {
  await firefox?.close();
  await chromium?.close();
  pages?.close();
  await homeport?.stop();
});

/** A page in Firefox; with `relayOnly`, none of its connections may go another way. */
async function openInFirefox(url, relayOnly) {
  const page = await firefox.newPage();
  page.errors = [];
  page.on('pageerror', error => page.errors.push(String(error)));
  if (relayOnly) {
    await page.evaluateOnNewDocument(() => {
      const Native = window.RTCPeerConnection;
      window.RTCPeerConnection = class extends Native {
        constructor(configuration) { super({ ...configuration, iceTransportPolicy: 'relay' }); }
      };
    });
  }
  await page.goto(url);
  await until(page, 'the page', () => window.loaded === true);
  return page;
}

for (const relayOnly of [false, true]) {
  const how = relayOnly ? 'through TURN alone' : 'directly';

  test(`Firefox and Chromium meet ${how}`, async () => {
    const iceServers = [{ urls: `turn:${homeport.turnHost}:${homeport.ports.turn}?transport=udp`, ...TURN_USER }];
    const both = [await openInFirefox(`${pages.url}/pages/trystero.html`), await openPage(chromium, `${pages.url}/pages/trystero.html`)];
    await until(both[1], 'the page', () => window.loaded === true);
    const start = Date.now();
    for (const page of both) {
      await page.evaluate((url, servers, relay) => window.start(url, servers, relay), homeport.relayUrl, iceServers, relayOnly)
        .catch(() => page.evaluate(([url, servers, relay]) => window.start(url, servers, relay), [homeport.relayUrl, iceServers, relayOnly]));
    }
    for (const page of both) await until(page, 'a peer', () => window.state.peers.length === 1);
    const ms = Date.now() - start;
    await both[0].evaluate(() => window.say('from Firefox'));
    await both[1].evaluate(() => window.say('from Chromium'));
    await until(both[1], 'a message', () => window.state.messages[0] === 'from Firefox');
    await until(both[0], 'a message', () => window.state.messages[0] === 'from Chromium');
    const paths = await Promise.all(both.map(async page => (await page.evaluate(() => window.paths()))[0]));
    for (const path of paths) assert.equal(path.local === 'relay', relayOnly, JSON.stringify(paths));
    console.log(`Firefox and Chromium, ${how}: met after ${ms} ms`);
    await both[0].close();
    await both[1].context().close();
  });

  test(`Firefox is linked with the seed ${how}, and what it writes outlives it`, async () => {
    const query = new URLSearchParams({ client, name: 'notes', options: JSON.stringify({ rtc: homeport.rtc }) });
    const url = `${pages.url}/pages/database.html?${query}`;
    const writer = await openInFirefox(url, relayOnly);
    const port = homeport.ports.seed;
    await until(writer, 'a link with the seed', eval(`async () => Object.values(await window.paths()).some(path => path?.port === ${port})`));
    const path = Object.values(await writer.evaluate(() => window.paths())).find(path => path?.port === port);
    assert.equal(path.local === 'relay', relayOnly, JSON.stringify(path));
    const id = relayOnly ? 'relayed' : 'direct';
    await writer.evaluate(id => window.db.put({ text: 'from Firefox ☃' }, id), id);
    const held = () => homeport.command('rooms', 'show', 'notes', '--query', '{}');
    for (const deadline = Date.now() + 30_000; !(await held()).includes(`"${id}"`);) assert.ok(Date.now() < deadline, 'the archive does not have it');
    await writer.close();
    const newcomer = await openInFirefox(url, relayOnly);
    await until(newcomer, 'what was written', async id => (await window.nodes()).some(([other, value]) => other === id && value.text === 'from Firefox ☃'), id);
    await newcomer.close();
  });
}
