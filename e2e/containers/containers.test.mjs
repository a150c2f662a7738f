// docker compose, in a real Docker Engine: the image is built, everything comes up, pages write while each service is
// restarted, the other profiles come up, and all goes away. Ten minutes, most of it the build: ./test.sh --containers
import assert from 'node:assert/strict';
import { after, before, test } from 'node:test';
import { launchChromium, openPage, servePages, until } from '../lib/browser.mjs';
import { client } from '../lib/clients.mjs';
import { Engine, unable } from './engine.mjs';

const reason = process.env.HOMEPORT_CONTAINERS ? unable() : 'building the image takes minutes; ./test.sh --containers runs them';
if (reason) console.log(`containers: skipped, ${reason}`);
const options = { skip: reason };

let engine, pages, browser;
before(async () => {
  if (reason) return;
  engine = await Engine.start();
  [pages, browser] = [await servePages(), await launchChromium()];
});
after(async () => {
  await browser?.close();
  pages?.close();
  if (!engine) return;
  await engine.compose(['--profile', 'bridge', '--profile', 'proxy', 'down', '--volumes', '--timeout', '10']).catch(error => console.log(String(error)));
  await engine.stop();
});

const json = async url => (await fetch(url)).json();
async function eventually(what, check, patience = 60_000) {
  for (const deadline = Date.now() + patience; ; await new Promise(done => setTimeout(done, 50))) {
    const result = await check().catch(error => { what = `${what}: ${error.message}`.slice(0, 300); });
    if (result) return result;
    assert.ok(Date.now() < deadline, `nothing came of: ${what}`);
  }
}
/** The services that run, and how each is. */
const health = async () => (await engine.compose(['ps', '--format', '{{.Service}} {{.State}} {{.Health}}'])).split('\n').sort();

async function open(rtc, name = 'my-app') {
  const query = new URLSearchParams({ client, name, options: JSON.stringify({ rtc }) });
  const page = await openPage(browser, `${pages.url}/pages/database.html?${query}`);
  await until(page, 'the database', () => window.loaded === true);
  return page;
}
const linked = (page, what) => until(page, what, async () => Object.values(await window.paths()).some(path => path?.port === 3479));

test('the image is small, and is nobody', options, async () => {
  const start = Date.now();
  await engine.homeport();
  const [size, user] = (await engine.docker('image', 'inspect', '--format', '{{.Size}} {{.Config.User}}', 'homeport')).split(' ');
  console.log(`image: ${(size / 1e6).toFixed(1)} MB after ${Math.round((Date.now() - start) / 1_000)} s`);
  assert.ok(size < 40e6 && user === '10001:10001', `${size} ${user}`);
});

test('a fresh checkout comes up without an edit, and is healthy', options, async () => {
  console.log(await engine.image('prom/prometheus:v3.5.0', engine.program('/usr/bin/prometheus', ['COPY --chown=65534:65534 empty /prometheus', 'USER 65534', 'WORKDIR /prometheus', 'ENTRYPOINT ["/usr/bin/prometheus"]'])));
  console.log("Grafana's service is only validated: its image cannot be put together from Debian's packages");
  await engine.compose(['up', '--detach', '--wait', '--wait-timeout', '90', 'turn', 'relay', 'seed', 'prometheus']);
  assert.deepEqual(await health(), ['prometheus running ', 'relay running healthy', 'seed running healthy', 'turn running healthy']);
  await eventually('Prometheus sees all three', async () => {
    const { data } = await json('http://127.0.0.1:9090/api/v1/query?query=up');
    return data.result.length === 3 && data.result.every(({ value }) => value[1] === '1');
  });
  const check = await engine.compose(['exec', '--no-TTY', 'seed', '/usr/local/bin/homeport', 'check', '--json']);
  const failed = check.split('\n').filter(Boolean).map(JSON.parse).flat().filter(({ state }) => state === 'failure');
  assert.deepEqual(failed, []);
});

test('each service is restarted while pages write: they come back by themselves, and nothing is lost', options, async () => {
  const rtc = await json('http://127.0.0.1:8080/client-config.json');
  const both = [await open(rtc), await open(rtc)];
  for (const [index, page] of both.entries()) {
    await linked(page, 'a link with the seed');
    await page.evaluate(index => {
      window.number = 0;
      window.writing = setInterval(() => window.db.put({ number: window.number }, `page-${index}-${window.number++}`), 50);
    }, index);
  }
  for (const service of ['relay', 'turn', 'seed']) {
    const start = Date.now();
    await engine.compose(['restart', '--timeout', '10', service]);
    const restarted = Date.now() - start;
    if (service === 'turn') {
      const page = await openPage(browser, `${pages.url}/pages/turn.html`);
      await until(page, 'the page', () => window.loaded === true);
      const { echoed } = await eventually('a link through TURN', () => page.evaluate(servers => window.relay(servers), rtc.turnConfig));
      assert.equal(echoed, 100);
      await page.context().close();
    } else {
      // A newcomer meets somebody only if those who are there have come back.
      const newcomer = await open(rtc);
      await until(newcomer, 'both pages and the seed', () => window.db.room.getPeers().size === 3);
      for (const page of [...both, newcomer]) await linked(page, `a link with the seed after ${service} was restarted`);
      await newcomer.context().close();
    }
    console.log(`restart of ${service}: took ${restarted} ms, all back ${Date.now() - start - restarted} ms later`);
  }
  const written = await Promise.all(both.map(page => page.evaluate(() => { clearInterval(window.writing); return window.number; })));
  const wanted = written.flatMap((count, index) => Array.from({ length: count }, (_, number) => `page-${index}-${number}`));
  for (const page of both) await until(page, 'all that was written', async wanted => await window.count() >= wanted, wanted.length);
  await eventually('all that was written, in the archive', async () => {
    const shown = await engine.compose(['exec', '--no-TTY', 'seed', '/usr/local/bin/homeport', 'rooms', 'show', 'my-app', '--query', '{}']);
    const ids = new Set(shown.split('\n').filter(Boolean).map(line => JSON.parse(line).id));
    return wanted.every(id => ids.has(id));
  });
  console.log(`restarts: ${wanted.length} writes, all in the archive and on both pages`);
  for (const page of both) await page.context().close();
});

test('behind a proxy that ends TLS, apps are told of it and meet', options, async () => {
  console.log(await engine.image('caddy:2.10', engine.program('/usr/bin/caddy', ['ENV XDG_DATA_HOME=/data HOME=/data PATH=/usr/bin', 'WORKDIR /data'])));
  const env = {
    HOMEPORT_DOMAIN: 'localhost', HOMEPORT_RELAY__LISTEN: '127.0.0.1:8080', HOMEPORT_RELAY__TRUSTED_PROXY_HEADER: 'x-forwarded-for',
    HOMEPORT_RELAY__PUBLIC_URL: 'wss://localhost',
  };
  await engine.compose(['--profile', 'proxy', 'up', '--detach', '--wait', '--wait-timeout', '90', 'turn', 'relay', 'seed', 'proxy'], env);
  const own = await launchChromium(['--ignore-certificate-errors']);
  try {
    const page = await openPage(own, 'https://localhost/check');
    const rtc = await page.evaluate(async () => (await fetch('/client-config.json')).json());
    assert.deepEqual(rtc.relayUrls, ['wss://localhost']);
    const query = new URLSearchParams({ client, name: 'my-app', options: JSON.stringify({ rtc }) });
    const database = await openPage(own, `${pages.url}/pages/database.html?${query}`);
    await until(database, 'the database', () => window.loaded === true);
    await linked(database, 'a link with the seed, found through the proxy');
  } finally {
    await own.close();
  }
  await engine.compose(['--profile', 'proxy', 'down', '--volumes', '--timeout', '10'], env);
});

test('the bridge profile serves with published ports alone', options, async () => {
  await engine.compose(['--profile', 'bridge', 'up', '--detach', '--wait', '--wait-timeout', '90', 'bridge']);
  const rtc = await json('http://127.0.0.1:8080/client-config.json');
  const page = await openPage(browser, `${pages.url}/pages/turn.html`);
  await until(page, 'the page', () => window.loaded === true);
  const { echoed } = await page.evaluate(servers => window.relay(servers), rtc.turnConfig);
  assert.equal(echoed, 100);
  await page.context().close();
  const writer = await open(rtc);
  await linked(writer, 'a link with the seed in its own network');
  await writer.evaluate(() => window.db.put({ text: 'bridged' }, 'bridged'));
  await eventually('the archive has it', async () => (await engine.compose(
    ['--profile', 'bridge', 'exec', '--no-TTY', 'bridge', '/usr/local/bin/homeport', 'rooms', 'show', 'my-app', '--query', '{}'])).includes('bridged'));
  await writer.context().close();
});
