/**
 * Owns the check that a file system has room for what is about to be written.
 *
 * Invariants
 * 1. The answer names the bytes that are needed and those that are free, before the first is written.
 */
import { statfs } from 'node:fs/promises';
import { LaminaError } from '@lamina/tensor';

/** Throws config_invalid if the file system of the existing directory `dir` has less than `neededBytes` free. */
export async function checkFreeSpace(dir: string, neededBytes: number, what: string): Promise<void> {
  const { bavail, bsize } = await statfs(dir);
  const freeBytes = bavail * bsize;
  if (freeBytes >= neededBytes) return;
  const message = `${dir}: ${what} needs ${neededBytes} bytes (${inGiB(neededBytes)}) and ${freeBytes} (${inGiB(freeBytes)}) are free`;
  throw new LaminaError('config_invalid', `${message}; free some, or give a directory on another file system`);
}

function inGiB(bytes: number): string {
  return `${(bytes / 1024 ** 3).toFixed(1)} GiB`;
}
