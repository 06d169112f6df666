/**
 * Owns the build of the native addon: `node packages/attention-kernel/build.mjs`, with Node alone (no node-gyp).
 *
 * Invariants
 * 1. Each SIMD variant is its own object with its own -m flags; everything else is compiled for the baseline, so one
 *    binary runs on every processor of the architecture.
 * 2. build/lamina_attention.node appears atomically (rename) and only after a complete link.
 * 3. Nothing is rebuilt when sources, compiler, architecture and flags are the same as last time.
 * 4. No compiler is no error (the portable kernel will be used); a compiler that fails is one.
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

const packageDir = dirname(fileURLToPath(import.meta.url));
const sourceDir = join(packageDir, 'native');
const buildDir = join(packageDir, 'build');
const addonPath = join(buildDir, 'lamina_attention.node');
const stampPath = join(buildDir, 'lamina_attention.stamp');

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

function stampOf(compiler, sources, headersDir) {
  const hash = createHash('sha256');
  hash.update(JSON.stringify([platform(), arch(), compiler, COMMON_FLAGS, LINK_FLAGS, SIMD_FLAGS, headersDir]));
  for (const name of sources) hash.update(`\0${name}\0`).update(readFileSync(join(sourceDir, name)));
  return hash.digest('hex');
}

async function compileAll(compiler, sources, headersDir, workDir) {
  const units = sources.filter((name) => name.endsWith('.cc'));
  const queue = [...units];
  const work = async () => {
    for (let name = queue.shift(); name !== undefined; name = queue.shift()) {
      const flags = arch() === 'x64' ? (SIMD_FLAGS[name] ?? []) : [];
      const object = join(workDir, `${basename(name, '.cc')}.o`);
      const args = [...COMMON_FLAGS, ...flags, `-I${headersDir}`, '-c', join(sourceDir, name), '-o', object];
      const output = await run(compiler.program, [...compiler.extra, ...args]);
      if (output !== '') process.stderr.write(output);
    }
  };
  await Promise.all(Array.from({ length: Math.min(availableParallelism(), units.length) }, work));
  return units.map((name) => join(workDir, `${basename(name, '.cc')}.o`));
}

async function main() {
  const compiler = platform() === 'win32' ? null : findCompiler();
  if (compiler === null) {
    console.log(
      'attention-kernel: no C++ compiler found (tried $CXX, c++, g++, clang++); the portable kernel will be used',
    );
    return;
  }
  const headersDir = join(dirname(createRequire(import.meta.url).resolve('node-api-headers/package.json')), 'include');
  const sources = readdirSync(sourceDir)
    .filter((name) => name.endsWith('.cc') || name.endsWith('.h'))
    .sort();
  const stamp = stampOf(compiler, sources, headersDir);
  if (existsSync(addonPath) && existsSync(stampPath) && readFileSync(stampPath, 'utf8') === stamp) {
    console.log('attention-kernel: native addon is up to date');
    return;
  }
  mkdirSync(buildDir, { recursive: true });
  const workDir = mkdtempSync(join(buildDir, 'work-'));
  try {
    const startMs = Date.now();
    const objects = await compileAll(compiler, sources, headersDir, workDir);
    const linked = join(workDir, 'lamina_attention.node');
    await run(compiler.program, [...compiler.extra, ...LINK_FLAGS, ...objects, '-o', linked]);
    rmSync(stampPath, { force: true });
    renameSync(linked, addonPath);
    writeFileSync(join(workDir, 'stamp'), stamp);
    renameSync(join(workDir, 'stamp'), stampPath);
    console.log(
      `attention-kernel: native addon built in ${((Date.now() - startMs) / 1000).toFixed(1)} s with ${compiler.version}`,
    );
  } finally {
    rmSync(workDir, { recursive: true, force: true });
  }
}

main().catch((error) => {
  console.error(
    `attention-kernel: the native addon could not be built\n${error instanceof Error ? error.message : error}`,
  );
  process.exitCode = 1;
});
