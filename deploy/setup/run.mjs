/** Owns how the set-up runs other programs: quietly, or in the foreground with signals passed on. */
import { spawn } from 'node:child_process';
import { constants } from 'node:os';
import { fileURLToPath } from 'node:url';

export const REPO_ROOT = fileURLToPath(new URL('../../', import.meta.url)).replace(/[/\\]$/, '');

/** A step that failed for a reason that its message tells in full. */
export class SetupError extends Error {}

/** @param {string} line */
export function say(line) {
  process.stderr.write(`${line}\n`);
}

/**
 * Runs a program to its end and keeps its output.
 * @param {string} command
 * @param {readonly string[]} args
 * @param {{ cwd?: string, shell?: boolean }} [options]
 * @returns {Promise<{ ok: boolean, output: string }>} `ok` is false, too, when the program is not there
 */
export function runQuietly(command, args, options = {}) {
  return new Promise((resolve) => {
    let output = '';
    const child = spawn(command, args, {
      cwd: options.cwd ?? REPO_ROOT,
      shell: options.shell ?? false,
      stdio: ['ignore', 'pipe', 'pipe'],
    });
    const collect = (/** @type {Buffer} */ chunk) => {
      output += chunk.toString();
    };
    child.stdout.on('data', collect);
    child.stderr.on('data', collect);
    child.on('error', (error) => resolve({ ok: false, output: `${output}${error.message}\n` }));
    child.on('close', (code) => resolve({ ok: code === 0, output }));
  });
}

/**
 * Runs a Node script in the foreground. A first SIGINT or SIGTERM is passed on and the child decides when it ends;
 * a second one kills it.
 * @param {readonly string[]} args
 * @param {Record<string, string>} [environment] added to this process's
 * @returns {Promise<number>} the exit code, 128 + the signal's number if a signal ended it
 */
export function runInForeground(args, environment = {}) {
  return new Promise((resolve) => {
    const child = spawn(process.execPath, args, {
      cwd: REPO_ROOT,
      stdio: 'inherit',
      env: { ...process.env, ...environment },
    });
    let stopping = false;
    const stop = (/** @type {NodeJS.Signals} */ signal) => {
      // A terminal sends Ctrl-C to the child as well.
      const alreadySent = signal === 'SIGINT' && process.stdin.isTTY === true;
      if (stopping) child.kill('SIGKILL');
      else if (!alreadySent) child.kill(signal);
      stopping = true;
    };
    process.on('SIGINT', stop);
    process.on('SIGTERM', stop);
    child.on('error', (error) => {
      say(error.message);
      resolve(1);
    });
    child.on('exit', (code, signal) => resolve(code ?? 128 + (signal === null ? 0 : constants.signals[signal])));
  });
}
