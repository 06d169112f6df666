/** Owns what the fuzz tests say of themselves in the long form, `npm run fuzz`, and how they look at memory. */
import { setFlagsFromString } from 'node:v8';
import { runInNewContext } from 'node:vm';

export const IS_LONG = process.env.LAMINA_FUZZ === 'long';

/** A line for whoever waits for the long form. */
export function tell(line: string): void {
  if (IS_LONG) console.log(line);
}

export const count = (value: number): string => value.toLocaleString('en');
export const megabytes = (bytes: number): string => `${(bytes / 1e6).toFixed(1)} MB`;
export const secondsSince = (startedMs: number): string => `${((performance.now() - startedMs) / 1e3).toFixed(1)} s`;

/** Bytes that this process holds when all that nobody refers to is gone. */
export function heldBytes(): number {
  setFlagsFromString('--expose-gc');
  const collect: unknown = runInNewContext('gc');
  if (typeof collect !== 'function') throw new Error('this process cannot collect its heap');
  collect();
  const { heapUsed, external } = process.memoryUsage();
  return heapUsed + external;
}
