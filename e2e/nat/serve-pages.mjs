// Serves the test pages in a network namespace of its own, and prints where.
import { servePages } from '../lib/browser.mjs';

console.log((await servePages()).url);
