// Debian's Chromium under Playwright, and a web server for the pages.
import { createServer } from 'node:http';
import { readFile } from 'node:fs/promises';
import { dirname, extname, join, normalize, resolve, sep } from 'node:path';
import { fileURLToPath } from 'node:url';
import { once } from 'node:events';
import { chromium } from 'playwright-core';
import { dist } from './genosdb.mjs';

const here = resolve(dirname(fileURLToPath(import.meta.url)), '..');
const types = { '.html': 'text/html', '.mjs': 'text/javascript', '.js': 'text/javascript', '.wasm': 'application/wasm' };

/** Serves the test pages, npm's packages under `/node_modules`, and GenosDB's published files where they are. */
export async function servePages() {
  const roots = { pages: join(here, 'pages'), node_modules: join(here, 'node_modules'), ...(dist ? { genosdb: dist } : {}) };
  const server = createServer(async (request, response) => {
    const path = normalize(decodeURIComponent(new URL(request.url, 'http://x').pathname));
    const [, name, ...rest] = path.split(sep);
    try {
      const body = await readFile(join(roots[name], ...rest));
      response.writeHead(200, { 'content-type': types[extname(path)] ?? 'application/octet-stream' }).end(body);
    } catch {
      response.writeHead(404).end();
    }
  }).listen(0, '127.0.0.1');
  await once(server, 'listening');
  return {
    url: `http://127.0.0.1:${server.address().port}`,
    close: () => { server.closeAllConnections(); server.close(); },
  };
}

export async function launchChromium(flags = [], executablePath = process.env.CHROMIUM ?? '/usr/bin/chromium') {
  return chromium.launch({
    executablePath,
    headless: true,
    args: ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
      '--disable-component-update', '--disable-sync', ...flags],
  });
}

/** A page in a profile of its own, which runs `script` first; what it logs as an error comes with the test's failure. */
export async function openPage(browser, url, script) {
  const context = await browser.newContext();
  if (script) await context.addInitScript(script);
  const page = await context.newPage();
  page.errors = [];
  page.on('pageerror', error => page.errors.push(String(error)));
  page.on('console', message => { if (message.type() === 'error') page.errors.push(message.text()); });
  await page.goto(url);
  return page;
}

/** Ends the process of a page as a crash does: it says goodbye to nobody. */
export async function crash(page) {
  const crashed = page.waitForEvent('crash');
  const session = await page.context().newCDPSession(page);
  // Nobody is left to answer that.
  session.send('Page.crash').catch(() => {});
  await crashed;
}

/** Waits until `check`, run in the page with `argument`, comes out true; it may be asynchronous. */
export async function until(page, what, check, argument, timeout = 45_000) {
  const deadline = Date.now() + timeout;
  for (;;) {
    // A page that is just being loaded cannot be asked yet.
    const answer = await page.evaluate(check, argument).catch(error => ({ error }));
    if (answer === true) return;
    if (Date.now() > deadline) {
      const last = answer?.error?.message?.split('\n')[0] ?? answer;
      throw new Error(`nothing came of: ${what} (last: ${last}); page errors: ${page.errors.join('; ')}`);
    }
    await new Promise(done => setTimeout(done, 30));
  }
}
