/**
 * Owns the build of the native addons: `node deploy/native-addons.mjs`, with Node alone (no node-gyp).
 *
 * Invariants
 * 1. Each SIMD variant is its own object with its own -m flags; everything else is compiled for the baseline, so one
 *    binary runs on every processor of the architecture.
 * 2. An addon appears in build/ of its package atomically (rename) and only after a complete link.
 * 3. Nothing is rebuilt when sources, compiler, architecture and flags are the same as last time.
 * 4. No compiler is no error (what is portable will be used); a compiler that fails is one.
 */
import { spawn, spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  writeFileSync,
} from 'node:fs';
import { createRequire } from 'node:module';
import { arch, availableParallelism, platform } from 'node:os';
import { basename, dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

const packagesDir = fileURLToPath(new URL('../packages', import.meta.url));
/** What both addons read their arguments with. */
const sharedDir = join(packagesDir, 'tensor/native');
const ADDONS = [
  { name: 'lamina_attention', packageDir: join(packagesDir, 'attention-kernel') },
  { name: 'lamina_link', packageDir: join(packagesDir, 'bus') },
];

const COMMON_FLAGS = ['-std=c++17', '-O2', '-fPIC', '-fvisibility=hidden', '-Wall', '-Wextra', '-pthread'];
const LINK_FLAGS = platform() === 'darwin' ? ['-bundle', '-undefined', 'dynamic_lookup'] : ['-shared', '-pthread'];
/** -m flags by source file, on x64 only. */
const SIMD_FLAGS = {
  'simd_avx2.cc': ['-mavx2', '-mfma', '-mf16c'],
  // GCC's own avx512fintrin.h starts from a register that it leaves uninitialized on purpose, and warns of it.
  'simd_avx512.cc': [
    '-mavx512f',
    '-mavx512bw',
    '-mavx512vl',
    '-mavx2',
    '-mfma',
    '-mf16c',
    '-Wno-uninitialized',
    '-Wno-maybe-uninitialized',
  ],
};

function findCompiler() {
  for (const command of [process.env.CXX, 'c++', 'g++', 'clang++']) {
    if (command === undefined || command === '') continue;
    const [program, ...extra] = command.split(/\s+/).filter((word) => word !== '');
    if (program === undefined) continue;
    const probe = spawnSync(program, [...extra, '--version'], { encoding: 'utf8' });
    if (probe.status === 0) return { program, extra, version: probe.stdout.split('\n')[0] ?? '' };
  }
  return null;
}

/** Runs to the end; resolves with what was printed, rejects when the exit status is not 0. */
function run(program, args) {
  return new Promise((resolve, reject) => {
    const child = spawn(program, args, { stdio: ['ignore', 'pipe', 'pipe'] });
    let output = '';
    child.stdout.on('data', (chunk) => {
      output += chunk;
    });
    child.stderr.on('data', (chunk) => {
      output += chunk;
    });
    child.on('error', reject);
    child.on('close', (status) => {
      if (status === 0) resolve(output);
      else reject(new Error(`${program} ${args.join(' ')}\n${output}`));
    });
  });
}

/** C++ files of a directory, as paths. */
function sourcesIn(dir) {
  return readdirSync(dir)
    .filter((name) => name.endsWith('.cc') || name.endsWith('.h'))
    .sort()
    .map((name) => join(dir, name));
}

function stampOf(compiler, sources, headersDir) {
  const hash = createHash('sha256');
  hash.update(JSON.stringify([platform(), arch(), compiler, COMMON_FLAGS, LINK_FLAGS, SIMD_FLAGS, headersDir]));
  for (const path of sources) hash.update(`\0${basename(path)}\0`).update(readFileSync(path));
  return hash.digest('hex');
}

async function compileAll(compiler, sources, headersDir, workDir) {
  const objectOf = (path) => join(workDir, `${basename(path, '.cc')}.o`);
  const units = sources.filter((path) => path.endsWith('.cc'));
  const queue = [...units];
  const work = async () => {
    for (let path = queue.shift(); path !== undefined; path = queue.shift()) {
      const flags = arch() === 'x64' ? (SIMD_FLAGS[basename(path)] ?? []) : [];
      const args = [...COMMON_FLAGS, ...flags, `-I${headersDir}`, `-I${sharedDir}`, '-c', path, '-o', objectOf(path)];
      const output = await run(compiler.program, [...compiler.extra, ...args]);
      if (output !== '') process.stderr.write(output);
    }
  };
  await Promise.all(Array.from({ length: Math.min(availableParallelism(), units.length) }, work));
  return units.map(objectOf);
}

async function build(compiler, headersDir, { name, packageDir }) {
  const buildDir = join(packageDir, 'build');
  const addonPath = join(buildDir, `${name}.node`);
  const stampPath = join(buildDir, `${name}.stamp`);
  const sources = [...sourcesIn(join(packageDir, 'native')), ...sourcesIn(sharedDir)];
  const stamp = stampOf(compiler, sources, headersDir);
  if (existsSync(addonPath) && existsSync(stampPath) && readFileSync(stampPath, 'utf8') === stamp) return;
  mkdirSync(buildDir, { recursive: true });
  const workDir = mkdtempSync(join(buildDir, 'work-'));
  try {
    const startMs = Date.now();
    const objects = await compileAll(compiler, sources, headersDir, workDir);
    const linked = join(workDir, `${name}.node`);
    await run(compiler.program, [...compiler.extra, ...LINK_FLAGS, ...objects, '-o', linked]);
    rmSync(stampPath, { force: true });
    renameSync(linked, addonPath);
    writeFileSync(join(workDir, 'stamp'), stamp);
    renameSync(join(workDir, 'stamp'), stampPath);
    console.log(`${name}: built in ${((Date.now() - startMs) / 1000).toFixed(1)} s with ${compiler.version}`);
  } finally {
    rmSync(workDir, { recursive: true, force: true });
  }
}

async function main() {
  const compiler = platform() === 'win32' ? null : findCompiler();
  if (compiler === null) {
    console.log(
      'no C++ compiler found (tried $CXX, c++, g++, clang++): attention and the tensor plane will be the portable ones, which are slow',
    );
    return;
  }
  const headersDir = join(dirname(createRequire(import.meta.url).resolve('node-api-headers/package.json')), 'include');
  for (const addon of ADDONS) await build(compiler, headersDir, addon);
}

main().catch((error) => {
  console.error(`a native addon could not be built\n${error instanceof Error ? error.message : error}`);
  process.exitCode = 1;
});
