/**
 * Owns that one process at a time pulls a model, across processes and hosts that share a cache.
 *
 * Invariants
 * 1. Who holds the lock touches its file every BEAT_MS; a file that was not touched for STALE_MS belongs to nobody.
 * 2. A holder on this host that is gone (Ctrl-C) is not waited for.
 */
import { open, readFile, rm, stat, utimes } from 'node:fs/promises';
import { hostname } from 'node:os';
import { systemErrorCode } from './model-error.ts';

const BEAT_MS = 2_000;
const STALE_MS = 15_000;
const POLL_MS = 200;

/** Runs `work` alone. `onWait` is called once if another process has to be waited for. */
export async function whileLocked<T>(path: string, onWait: () => void, work: () => Promise<T>): Promise<T> {
  let isWaiting = false;
  while (!(await take(path))) {
    if (!isWaiting) onWait();
    isWaiting = true;
    await new Promise((resolve) => setTimeout(resolve, POLL_MS));
  }
  const beat = setInterval(() => {
    const now = new Date();
    // A lock that somebody removed is not made again: the download stays correct, it is only done twice.
    utimes(path, now, now).catch(() => undefined);
  }, BEAT_MS);
  try {
    return await work();
  } finally {
    clearInterval(beat);
    await rm(path, { force: true });
  }
}

async function take(path: string): Promise<boolean> {
  try {
    const file = await open(path, 'wx');
    await file.writeFile(`${hostname()} ${process.pid}`).finally(() => file.close());
    return true;
  } catch (error) {
    if (systemErrorCode(error) !== 'EEXIST') throw error;
  }
  if (await isAbandoned(path)) await rm(path, { force: true });
  return false;
}

async function isAbandoned(path: string): Promise<boolean> {
  const touched = await stat(path).catch(() => undefined);
  if (touched === undefined) return false;
  if (Date.now() - touched.mtimeMs > STALE_MS) return true;
  const [host, pid] = (await readFile(path, 'utf8').catch(() => '')).split(' ');
  return host === hostname() && pid !== undefined && !isAlive(Number(pid));
}

function isAlive(pid: number): boolean {
  try {
    process.kill(pid, 0);
    return true;
  } catch (error) {
    return systemErrorCode(error) !== 'ESRCH';
  }
}
