/** Owns running a script of this repository to its end, and what a process has used of the CPU. */
import { execFile } from 'node:child_process';
import { readFile } from 'node:fs/promises';
import { promisify } from 'node:util';

const execute = promisify(execFile);
const MAX_OUTPUT_BYTES = 16 * 1024 * 1024;
/** Clock ticks of /proc/<pid>/stat; the same on every Linux that Node runs on. */
const TICKS_PER_SECOND = 100;

/** @returns what it printed. @throws Error with what it complained about. */
export async function output(command: string, args: readonly string[]): Promise<string> {
  const { stdout } = await execute(command, args, { maxBuffer: MAX_OUTPUT_BYTES });
  return stdout;
}

export const runScript = (path: string, args: readonly string[]): Promise<string> =>
  output(process.execPath, [path, ...args]);

/** Seconds of CPU, user and system, that a process has used. @throws Error where there is no /proc. */
export async function cpuSecondsOf(pid: number | undefined): Promise<number> {
  const fields = (await readFile(`/proc/${pid}/stat`, 'utf8')).replace(/^.*\) /s, '').split(' ');
  return (Number(fields[11]) + Number(fields[12])) / TICKS_PER_SECOND;
}

export const sleep = (ms: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, ms));
