// GenosDB's published files, where GENOSDB_DIST names a folder with them.
import { existsSync } from 'node:fs';
import { join, resolve } from 'node:path';

/** The folder, if it is named. */
export const dist = process.env.GENOSDB_DIST && resolve(process.env.GENOSDB_DIST);
const file = dist && ['index.min.js', 'index.js'].find(name => existsSync(join(dist, name)));
if (dist && !file) throw new Error(`GENOSDB_DIST=${dist} holds neither index.min.js nor index.js`);

/** The module that pages load, under what the folder is served as. */
export const genosdb = dist && `/genosdb/${file}`;
