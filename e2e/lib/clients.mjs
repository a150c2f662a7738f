// Which client of GenosDB the pages load: GenosDB itself, where GENOSDB_DIST names a folder with its published files, or
// the stand-in that was written from the wire notes.
import { existsSync } from 'node:fs';
import { join, resolve } from 'node:path';

const dist = process.env.GENOSDB_DIST && resolve(process.env.GENOSDB_DIST);
const file = dist && ['index.min.js', 'index.js'].find(name => existsSync(join(dist, name)));
if (dist && !file) throw new Error(`GENOSDB_DIST=${dist} holds neither index.min.js nor index.js`);

/** Folders that pages load them from, by the names that they are served under. */
export const folders = dist ? { genosdb: dist } : {};
const STAND_IN = '/pages/wire-client.mjs';
const missing = dist ? false : 'GENOSDB_DIST names no folder with the published dist files of GenosDB';
if (missing) console.log(`pages of GenosDB: ${missing}; a stand-in takes their place`);

/** The module of the one that there is, for what one client can show. */
export const client = dist ? `/genosdb/${file}` : STAND_IN;

/** Each by its name, for what is shown of both: the module, and why it is skipped. */
export const clients = [
  { name: 'stand-in', module: STAND_IN, skip: false },
  { name: 'GenosDB', module: client, skip: missing },
];
