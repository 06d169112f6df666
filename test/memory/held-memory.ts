/**
 * Owns how much memory a process holds: the least that is resident while all of its heaps are collected.
 *
 * V8 lets the heap of a small process rise by 8 MiB and more before it collects all of it, and a worker that runs has some
 * 10 MB of young garbage, or has not: what is resident at any other moment says little.
 */
import { readFileSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';

/** In which every thread has collected its heap: each when it comes to it, and young garbage gathers again from then on. */
const COLLECT_MS = 2_000;
const POLL_MS = 20;
/** Of SIGUSR2 in the mask of signals that a process catches. It would end one that does not, and has a meaning for nats-server. */
const SIGUSR2_BIT = 1n << 11n;

/** What a Node process is started with, so that it can be told to collect its heaps. */
export const COLLECTABLE = `--import ${new URL('collect.mjs', import.meta.url).href}`;

/** By process id; without those that are gone, or that do not collect when they are told. Takes two seconds. */
export async function heldBytesOf(pids: readonly number[]): Promise<Map<number, number>> {
  const least = new Map<number, number>();
  const collecting = pids.filter(isToldToCollect);
  const untilMs = performance.now() + COLLECT_MS;
  while (performance.now() < untilMs) {
    for (const pid of collecting) {
      const bytes = residentBytesOf(pid);
      if (bytes !== undefined) least.set(pid, Math.min(least.get(pid) ?? bytes, bytes));
    }
    await sleep(POLL_MS);
  }
  return least;
}

/** False for a process that is gone, or that has not loaded collect.mjs yet. */
function isToldToCollect(pid: number): boolean {
  try {
    const caught = /^SigCgt:\s+([0-9a-f]+)$/m.exec(readFileSync(`/proc/${pid}/status`, 'utf8'))?.[1];
    if (caught === undefined || (BigInt(`0x${caught}`) & SIGUSR2_BIT) === 0n) return false;
    return process.kill(pid, 'SIGUSR2');
  } catch {
    return false;
  }
}

/** Undefined when the process is gone. */
export function residentBytesOf(pid: number): number | undefined {
  try {
    const kilobytes = /^VmRSS:\s+(\d+) kB$/m.exec(readFileSync(`/proc/${pid}/status`, 'utf8'))?.[1];
    return kilobytes === undefined ? undefined : Number(kilobytes) * 1024;
  } catch {
    return undefined;
  }
}
