// Serves the test pages in a network namespace of its own, and prints where. Further arguments: NAME=FOLDER.
import { servePages } from '../lib/browser.mjs';

const folders = Object.fromEntries(process.argv.slice(2).map(word => word.split('=')));
console.log((await servePages(folders)).url);
