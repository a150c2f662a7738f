// Which client of GenosDB a test's pages load: GenosDB itself, where it is there, or the stand-in that was written from the
// wire notes.
import { genosdb } from './genosdb.mjs';

const STAND_IN = '/pages/wire-client.mjs';
const missing = genosdb ? false : 'GENOSDB_DIST names no folder with the published dist files of GenosDB';
if (missing) console.log(`pages of GenosDB: ${missing}; a stand-in takes their place`);

/** The module of the one that there is, for what one client can show. */
export const client = genosdb ?? STAND_IN;

/** Each by its name, for what is shown of both: the module, and why it is skipped. */
export const clients = [
  { name: 'stand-in', module: STAND_IN, skip: false },
  { name: 'GenosDB', module: genosdb, skip: missing },
];
