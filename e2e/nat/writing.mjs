// Pages that write all the time, and what there must be in the end.
import { execFile, execFileSync } from 'node:child_process';
import { mkdir, open, rm } from 'node:fs/promises';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { binary } from '../lib/homeport.mjs';

/** Writes twenty times a second: nodes of its own, which it also removes, and such that all write to. */
export function write(name) {
  const [own, shared, all] = [new Map(), [], []];
  let last = 0;
  window.writing = setInterval(() => all.push(one(last += 1)), 50);
  const one = async number => {
    const pick = Math.random();
    if (pick < 0.5) {
      const [id, value] = [`shared-${Math.floor(Math.random() * 10)}`, { by: name, number }];
      await window.db.put(value, id);
      const { result } = await window.db.get(id);
      if (result?.value.by === name && result.value.number === number) shared.push([id, value, [result.timestamp.physical, result.timestamp.logical]]);
    } else {
      const id = `${name}-${Math.floor(Math.random() * 300)}`;
      if (pick > 0.95 && own.get(id)) {
        own.set(id, null);
        await window.db.remove(id);
      } else {
        own.set(id, { number });
        await window.db.put({ number }, id);
      }
    }
  };
  window.written = async () => {
    clearInterval(window.writing);
    await Promise.all(all);
    return { own: [...own], shared, number: last };
  };
}

/** What all hold in the end: of shared nodes the newest; of those that two wrote at the same time, either. */
export function model(written) {
  const nodes = new Map(written.flatMap(({ own }) => own).filter(([, value]) => value).map(([id, value]) => [id, [value]]));
  const newest = new Map();
  for (const [id, value, at] of written.flatMap(({ shared }) => shared)) {
    const [before, order] = [newest.get(id), at[0] - newest.get(id)?.at[0] || at[1] - newest.get(id)?.at[1]];
    if (!before || order > 0) newest.set(id, { at, values: [value] });
    else if (order === 0) before.values.push(value);
  }
  for (const [id, { values }] of newest) nodes.set(id, values);
  return nodes;
}

/** How what somebody holds differs from the model, in words; empty when it does not. */
export function difference(expected, held) {
  const wrong = [...held].filter(([id, value]) => !expected.get(id)?.some(one => JSON.stringify(one) === JSON.stringify(value)))
    .map(([id, value]) => `${id} is ${JSON.stringify(value)} and not ${JSON.stringify(expected.get(id))}`);
  return [...wrong, ...[...expected.keys()].filter(id => !held.has(id)).map(id => `${id} is missing`)];
}

/** A disk of an archive's own, small enough to be filled. Needs root. */
export class SmallDisk {
  static async mount(folder, mib) {
    await mkdir(folder, { recursive: true });
    execFileSync('mount', ['-t', 'tmpfs', '-o', `size=${mib}m`, 'tmpfs', folder], { stdio: 'pipe' });
    return Object.assign(new SmallDisk(), { folder, filler: join(folder, 'filler') });
  }

  /** Leaves no byte. What stands in the archive's write-ahead log already can be written over for a while. */
  async fill() {
    const file = await open(this.filler, 'w');
    try {
      for (;;) await file.write(Buffer.alloc(64 << 10));
    } catch (error) {
      if (error.code !== 'ENOSPC') throw error;
    } finally {
      await file.close();
    }
  }

  async free() { await rm(this.filler); }

  /** Is gone as soon as nobody uses it. */
  unmount() { execFileSync('umount', ['--lazy', this.folder]); }
}

/** What an archive holds of a room, also while a seed runs on it. */
export async function archived(room, folder) {
  const { stdout } = await promisify(execFile)(binary, ['rooms', 'show', room, '--query', '{}'],
    { env: { ...process.env, HOMEPORT_DATA: folder }, maxBuffer: 1 << 28 });
  return new Map(stdout.split('\n').filter(Boolean).map(JSON.parse).map(({ id, value }) => [id, value]));
}
