/**
 * Owns the directories of the build cache: who is building what, taking up what a killed process left, and making a
 * finished build visible. What is built is build-model.ts.
 *
 *   <target>            a finished build
 *   <target>.partial    one that is being built, by the process that `owner.<host>.<pid>.<id>` in it names
 *
 * Invariants
 * 1. A build becomes visible whole or not at all: it is written to the partial directory and renamed.
 * 2. One process builds, others wait for it. An owner whose process is gone, or that has not touched its file for
 *    STALE_AFTER_MS, is replaced, by renaming its file: one of several succeeds.
 * 3. What is written depends on the target's name alone, so an owner that was replaced by mistake (it slept) does no
 *    harm: both write the same bytes, and the one that still has its file publishes them.
 */
import { randomUUID } from 'node:crypto';
import { mkdir, readdir, rename, rm, stat, utimes, writeFile } from 'node:fs/promises';
import { hostname } from 'node:os';
import { dirname, join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { systemErrorCode } from './model-error.ts';

/** Silence after which an owner is taken for dead, in milliseconds. */
const STALE_AFTER_MS = 30_000;
const HEARTBEAT_MS = 5000;
const POLL_MS = 100;
/** Age at which a partial build that nobody takes up is removed, in milliseconds. */
const ABANDONED_AFTER_MS = 24 * 60 * 60 * 1000;
const PARTIAL = '.partial';
const OWNER = 'owner.';
const HOST = hostname().replaceAll(/[^\w-]/g, '-');

export interface BuildSteps {
  isComplete(target: string): Promise<boolean>;
  /** Builds into `dir`, which may hold what an earlier try left there. */
  build(dir: string): Promise<void>;
}

/** Returns when `target` is complete, whoever built it. A failed build is removed and its error thrown. */
export async function buildOnce(target: string, steps: BuildSteps): Promise<void> {
  const partial = target + PARTIAL;
  while (!(await steps.isComplete(target))) {
    const owner = await claim(partial);
    if (owner === null) {
      await sleep(POLL_MS);
      continue;
    }
    const heartbeat = setInterval(() => void touch(owner), HEARTBEAT_MS);
    try {
      if (await steps.isComplete(target)) {
        await rm(partial, { recursive: true, force: true });
        return;
      }
      await removeAbandoned(dirname(target));
      await steps.build(partial);
      // Replaced while it slept: the one that replaced it may be writing the same bytes again, and publishes them.
      if (!(await isThere(owner))) continue;
      await rm(owner, { force: true });
      await publish(partial, target, steps);
    } catch (error) {
      // Replaced while it slept, and overtaken: what it worked on has been published or removed.
      if (systemErrorCode(error) === 'ENOENT' && !(await isThere(owner))) continue;
      await rm(partial, { recursive: true, force: true }).catch(() => {});
      throw error;
    } finally {
      clearInterval(heartbeat);
    }
  }
}

async function isThere(path: string): Promise<boolean> {
  return (await stat(path).catch(() => null)) !== null;
}

/** Path of the owner's file if the partial directory is now this caller's; null if it may be another's. */
async function claim(partial: string): Promise<string | null> {
  const name = `${OWNER}${HOST}.${process.pid}.${randomUUID()}`;
  const fresh = `${partial}.${randomUUID()}${PARTIAL}`;
  await mkdir(dirname(partial), { recursive: true });
  const current = await readdir(partial).catch(() => null);
  if (current === null) {
    await mkdir(fresh);
    await writeFile(join(fresh, name), '');
    let isOurs = false;
    try {
      isOurs = await wasFirst(rename(fresh, partial));
    } finally {
      if (!isOurs) await rm(fresh, { recursive: true, force: true });
    }
    return isOurs ? join(partial, name) : null;
  }
  const owner = current.find((file) => file.startsWith(OWNER));
  if (owner === undefined) {
    // Being published, or cut off while it was.
    if (await isStale(partial)) await rm(partial, { recursive: true, force: true });
    return null;
  }
  if (await isAlive(join(partial, owner), owner)) return null;
  await touch(join(partial, owner));
  return (await wasFirst(rename(join(partial, owner), join(partial, name)))) ? join(partial, name) : null;
}

async function isAlive(path: string, name: string): Promise<boolean> {
  const [, host, pid] = name.split('.');
  if (host === HOST) {
    try {
      process.kill(Number(pid), 0);
    } catch (error) {
      if (systemErrorCode(error) === 'ESRCH') return false;
    }
  }
  return !(await isStale(path));
}

async function isStale(path: string): Promise<boolean> {
  const { mtimeMs } = await stat(path).catch(() => ({ mtimeMs: Date.now() }));
  return Date.now() - mtimeMs > STALE_AFTER_MS;
}

async function touch(path: string): Promise<void> {
  const now = new Date();
  await utimes(path, now, now).catch(() => {});
}

/** Renames a finished build into place, or drops it if another process was first. */
async function publish(partial: string, target: string, steps: BuildSteps): Promise<void> {
  for (;;) {
    try {
      await rename(partial, target);
      return;
    } catch (error) {
      const code = systemErrorCode(error);
      if (code !== 'ENOTEMPTY' && code !== 'EEXIST' && code !== 'EPERM') throw error;
      if (await steps.isComplete(target)) {
        await rm(partial, { recursive: true, force: true });
        return;
      }
      if (code === 'EPERM') throw error;
    }
    // What is there is damaged: move it aside, so that whoever has it open keeps it, and try again.
    const aside = `${target}.${randomUUID()}${PARTIAL}`;
    await rename(target, aside).catch((error: unknown) => {
      if (systemErrorCode(error) !== 'ENOENT') throw error;
    });
    await rm(aside, { recursive: true, force: true });
  }
}

/** Removes partial builds, of any model, that were left long ago. */
async function removeAbandoned(cacheDir: string): Promise<void> {
  for (const name of await readdir(cacheDir)) {
    if (!name.endsWith(PARTIAL)) continue;
    const path = join(cacheDir, name);
    const files = await readdir(path).catch(() => []);
    const touched = await Promise.all(
      [path, ...files.map((file) => join(path, file))].map((file) =>
        stat(file).then(
          ({ mtimeMs }) => mtimeMs,
          () => 0,
        ),
      ),
    );
    if (Date.now() - Math.max(...touched) < ABANDONED_AFTER_MS) continue;
    await rm(path, { recursive: true, force: true }).catch(() => {});
  }
}

/** Errors of a rename whose source or target another process has just renamed; EPERM: on Windows, of an open directory. */
const OVERTAKEN: readonly string[] = [
  'ENOENT',
  'ENOTEMPTY',
  'EEXIST',
  ...(process.platform === 'win32' ? ['EPERM'] : []),
];

/** False if another process was faster. Anything else would fail again for ever, so it is thrown. */
async function wasFirst(renamed: Promise<void>): Promise<boolean> {
  try {
    await renamed;
    return true;
  } catch (error) {
    if (!OVERTAKEN.includes(systemErrorCode(error))) throw error;
    return false;
  }
}
