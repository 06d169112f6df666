/** Owns a file system of 96 MiB in memory, for a JetStream whose disk becomes full. */
import { spawnSync } from 'node:child_process';
import { closeSync, mkdtempSync, openSync, rmSync, writeSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

const SIZE = '96m';
const CHUNK = Buffer.alloc(65_536);

const fillOf = (directory: string): string => join(directory, 'fill');

/** Its directory; undefined where this process may not mount. */
export function mountSmallDisk(): string | undefined {
  const directory = mkdtempSync(join(tmpdir(), 'lamina-disk-'));
  if (spawnSync('mount', ['-t', 'tmpfs', '-o', `size=${SIZE}`, 'tmpfs', directory]).status === 0) return directory;
  rmSync(directory, { recursive: true, force: true });
  return undefined;
}

export function unmountSmallDisk(directory: string): void {
  spawnSync('umount', ['-l', directory]);
  rmSync(directory, { recursive: true, force: true });
}

export function canMount(): boolean {
  const directory = mountSmallDisk();
  if (directory !== undefined) unmountSmallDisk(directory);
  return directory !== undefined;
}

/** Writes until nothing more fits, whatever others write meanwhile. */
export function fillDisk(directory: string): void {
  const file = openSync(fillOf(directory), 'a');
  try {
    for (;;) writeSync(file, CHUNK);
  } catch (cause) {
    if (!(cause instanceof Error && 'code' in cause && cause.code === 'ENOSPC')) throw cause;
  } finally {
    closeSync(file);
  }
}

export function emptyDisk(directory: string): void {
  rmSync(fillOf(directory), { force: true });
}
