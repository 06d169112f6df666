/**
 * Owns the npm packages and what is built from the sources: TypeScript and the native kernel. Each step runs only when
 * its result is missing or older than its inputs.
 */
import { existsSync, readFileSync, statSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import process from 'node:process';
import { REPO_ROOT, runQuietly, SetupError, say } from './run.mjs';

const INSTALL_FLAGS = ['--ignore-scripts', '--no-audit', '--no-fund', '--loglevel=error'];

/** @param {string} path relative to the repository; 0 if it is not there */
function modifiedMs(path) {
  return statSync(join(REPO_ROOT, path), { throwIfNoEntry: false })?.mtimeMs ?? 0;
}

function packagesAreCurrent() {
  // npm writes this file last; it is a lock file of what is installed.
  const installedMs = modifiedMs('node_modules/.package-lock.json');
  return installedMs > 0 && installedMs >= modifiedMs('package-lock.json') && installedMs >= modifiedMs('package.json');
}

/** npm's own script, so that it runs with this Node; else the `npm` command. */
function npmCommand() {
  const script = process.env.npm_execpath;
  if (script?.endsWith('.js') && existsSync(script))
    return { command: process.execPath, first: [script], shell: false };
  return { command: 'npm', first: [], shell: process.platform === 'win32' };
}

/** @param {readonly string[]} args */
function npm(args, folder = REPO_ROOT) {
  const { command, first, shell } = npmCommand();
  return runQuietly(command, [...first, ...args, ...INSTALL_FLAGS], { shell, cwd: folder });
}

export async function installPackages() {
  if (packagesAreCurrent()) return;
  say('installing npm packages (about half a minute)');
  const attempts = existsSync(join(REPO_ROOT, 'package-lock.json'))
    ? // A lock file made on another platform may lack this one's optional packages, which `npm ci` refuses.
      [['ci'], ['install', '--no-save']]
    : [['install']];
  let output = '';
  for (const attempt of attempts) {
    const result = await npm(attempt);
    if (result.ok) {
      stamp('node_modules/.package-lock.json');
      return;
    }
    output += result.output;
  }
  throw new SetupError(`${output}\nThe npm packages could not be installed (npm's output is above).`);
}

/** Packages that only the benchmark runs, in its own folder: they are large. */
export async function installBenchmarkPeers() {
  const installedMs = modifiedMs('bench/node_modules/.package-lock.json');
  if (installedMs > 0 && installedMs >= modifiedMs('bench/package-lock.json')) return;
  say("installing the benchmark's peers (about a minute)");
  // Not `npm ci`: the lock lacks optional packages of platforms that its registry did not offer.
  const result = await npm(['install', '--no-save'], join(REPO_ROOT, 'bench'));
  if (!result.ok) throw new SetupError(`${result.output}\nThe peers could not be installed (npm's output is above).`);
  stamp('bench/node_modules/.package-lock.json');
}

/** Makes a file's time now, without changing it. @param {string} path */
function stamp(path) {
  const file = join(REPO_ROOT, path);
  if (existsSync(file)) writeFileSync(file, readFileSync(file));
}

/** `tsc -b` knows itself what is current, and takes a fifth of a second to find out. */
export async function buildTypeScript(project = '.') {
  const result = await runQuietly(process.execPath, ['node_modules/typescript/bin/tsc', '-b', project]);
  if (!result.ok) throw new SetupError(`${result.output}\nTypeScript did not compile (tsc's output is above).`);
}

/** The kernel's build script knows itself what is current, and does without a compiler if there is none. */
export async function buildNativeKernel() {
  const result = await runQuietly(process.execPath, ['deploy/native-addons.mjs']);
  if (!result.ok) throw new SetupError(`${result.output}\nThe attention kernel did not build (its output is above).`);
  const line = result.output.trim();
  if (line !== '' && !line.includes('up to date')) say(line);
}
