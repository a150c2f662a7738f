// Opens the connection check at the address given, and prints what each step says, as JSON. For a process of its own, in
// another network namespace.
import { launchChromium, openPage, until } from '../lib/browser.mjs';

// The certificate is nobody's that a browser knows.
const browser = await launchChromium(['--ignore-certificate-errors']);
const page = await openPage(browser, `${process.argv[2]}/check`);
await until(page, 'the end of the check', () => !document.getElementById('again').disabled, undefined, 90_000);
console.log(JSON.stringify(await page.$$eval('#steps li', list =>
  Object.fromEntries(list.map(line => [line.dataset.name, [line.dataset.state, line.children[2].textContent]])))));
await browser.close();
